"""What the embeddings of an OpenAI-compatible provider are."""

from __future__ import annotations

import msgspec

from harperpy import BackendError, EmbedResult, TokenUsage, Vector

from .openai_usage import Usage, understood


class _Vector(msgspec.Struct, gc=False):
    embedding: msgspec.Raw
    index: int = 0

    def read(self) -> Vector:
        """What it is, whichever way it was sent. Raises `BackendError`."""
        text = bytes(self.embedding)
        try:
            if text[:1] == b'"':
                return Vector.from_base64(msgspec.json.decode(text, type=str))
            return Vector.from_json(text)
        except ValueError as error:
            message = f"an embedding is not what it should be: {error}"
            raise BackendError(message) from error


class _Embeddings(msgspec.Struct, gc=False):
    """A provider's embeddings."""

    data: list[_Vector]
    usage: Usage | None = None


_decode = msgspec.json.Decoder(_Embeddings).decode


def embedded(data: bytes) -> EmbedResult:
    """Embeddings in the order of what was embedded. Raises `DecodeError` and `BackendError`."""
    told = understood(_decode, data)
    given = told.data
    if len(given) > 1:
        given = sorted(given, key=lambda one: one.index)
    # What else it counts is no part of it.
    tokens = None if told.usage is None else told.usage.prompt_tokens
    usage = None if tokens is None else TokenUsage(embedding_tokens=tokens)
    return EmbedResult(vectors=[one.read() for one in given], usage=usage)
