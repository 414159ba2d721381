"""`GET /openapi`: what this server answers, as OpenAPI 3.1; in a browser, a page to try it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from harperpy import (
    Context,
    Entry,
    Request,
    RequestTarget,
    Resource,
    Response,
    Scope,
)

if TYPE_CHECKING:
    from .openapi_document import Shown

_MOST_KEPT = 64
_VARY = "Accept, Authorization"
_PAGE = Path(__file__).parent / "data" / "openapi.html"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class OpenAPIOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What the document calls the server."""

    title: str = "harperpy"
    version: str = msgspec.field(default_factory=lambda: metadata.version("harperpy"))


def handle_application(scope: Scope) -> None:
    """Mount it; what other plugins mount later is described too."""
    page = _PAGE.read_text(encoding="utf-8")
    own: dict[str, Any] = {
        "entries": scope.resources,
        "options": scope.options.decode(OpenAPIOptions),
        "made": {},
        "page": page,
        "policy": _policy(page),
    }
    scope.resources.set("openapi", type("OpenAPI", (OpenAPIResource,), own))


class OpenAPIResource(Resource):
    """Describes the mounts, to each caller those that are open to them."""

    public = {"read"}  # noqa: RUF012  # as plugin authors write it; nobody changes it
    hidden = True
    entries: Iterable[Entry]
    options: OpenAPIOptions
    made: dict[tuple[Shown, ...], bytes]
    page: str
    policy: str

    @classmethod
    async def get(cls, target: RequestTarget, context: Context) -> Response:
        """The document as JSON, or a page to try it where HTML is asked for."""
        if "text/html" in context.headers.get("accept", ""):
            headers = {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Security-Policy": cls.policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Vary": _VARY,
            }
            return Response(200, headers, body=cls.page)
        shown = tuple([each async for each in open_to(context, cls.entries)])
        # Mounts do not change any more, and few roles see different ones.
        if (described := cls.made.get(shown)) is None:
            # Many servers are never asked for it.
            from .openapi_document import document  # noqa: PLC0415

            options = cls.options
            described = msgspec.json.encode(
                document(shown, title=options.title, version=options.version)
            )
            if len(cls.made) < _MOST_KEPT:
                cls.made[shown] = described
        headers = {"Content-Type": "application/json", "Vary": _VARY, "Cache-Control": "no-store"}
        return Response(200, headers, body=described)


async def open_to(context: Context, entries: Iterable[Entry]) -> AsyncIterator[Shown]:
    """The entries that the caller may use, with the methods they may use of each."""
    from .openapi_document import DESCRIBED, verbs_of  # noqa: PLC0415  # as above

    for entry in entries:
        if entry.resource.hidden:
            continue
        methods = tuple(
            [
                method
                for method, (_, permission) in DESCRIBED.items()
                if verbs_of(entry, method)
                and await entry.permits(permission, RequestTarget(), _as_if(method, entry, context))
            ]
        )
        if methods:
            yield entry, methods


def _as_if(method: str, entry: Entry, context: Context) -> Context:
    """The context that a hook would see if the caller asked for the mount itself."""
    asked = context.request
    request = Request(
        method,
        f"/{entry.path}",
        headers=asked.headers,
        id=asked.id,
        peer=asked.peer,
        trusted=asked.trusted,
    )
    imagined = Context(request, context.models, user=context.user, types=context.types)
    imagined.app = entry.path
    return imagined


def _policy(page: str) -> str:
    """The page may run its own script and ask this server, and nothing else."""
    hashes = {"script": "", "style": ""}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind] += f" 'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src{hashes['script']}; style-src{hashes['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
