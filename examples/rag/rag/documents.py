"""Documents: added, listed, read and removed."""

import re
import textwrap
from typing import Annotated, Any

import msgspec

from harperpy import Context, NotFound, RequestTarget, Resource

from .store import Store

LONGEST_PASSAGE = 800


class Document(msgspec.Struct, forbid_unknown_fields=True):
    title: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    text: Annotated[str, msgspec.Meta(pattern=r"\S", max_length=100_000)]


def documents(store: Store) -> type[Resource]:
    class Documents(Resource):
        """What answers are made from."""

        sub_paths = True

        @staticmethod
        async def post(target: RequestTarget, data: Document, context: Context) -> dict[str, int]:
            """Add a document."""
            texts = split(data.text)
            vectors = await context.models.embed(texts, input_type="document")
            # Only now: nobody who wants to write waits for the model.
            added = await store.add(context.transaction(), data.title, texts, vectors)
            context.created(added)
            return {"id": added, "passages": len(texts)}

        @staticmethod
        async def get(target: RequestTarget, context: Context) -> Any:
            """One document's text, or the list of them."""
            if target.id is None:
                return await store.titles(context.transaction())
            texts = await store.texts(context.transaction(), target.id)
            if not texts:
                raise NotFound
            return {"text": "\n\n".join(texts)}

        @staticmethod
        async def delete(target: RequestTarget, context: Context) -> None:
            """Remove a document."""
            if not await store.remove(context.transaction(), target.id or ""):
                raise NotFound

    return Documents


def split(text: str) -> list[str]:
    """Paragraphs, put together while they fit; a longer one is cut between words."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in textwrap.wrap(paragraph, LONGEST_PASSAGE):
            if found and len(found[-1]) + len(piece) < LONGEST_PASSAGE:
                found[-1] += f"\n{piece}"
            else:
                found.append(piece)
    return found
