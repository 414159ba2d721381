"""`GET /`: what is served here, to each caller what is open to them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any

from harperpy import Context, Entry, RequestTarget, Resource, Scope

from .openapi import open_to


def handle_application(scope: Scope) -> None:
    """Answer where nothing else is mounted at the root."""
    own = {"entries": scope.resources}
    scope.resources.set("", type("Listing", (Listing,), own), yields=True)


class Listing(Resource):
    """Strangers read the name alone."""

    public = {"read"}  # noqa: RUF012  # as plugin authors write it; nobody changes it
    hidden = True
    entries: Iterable[Entry]

    @classmethod
    async def get(cls, target: RequestTarget, context: Context) -> dict[str, Any]:
        """The name; for users the version, and paths with the methods that are open to them."""
        if context.user is None:
            return {"name": "harperpy"}
        shown = {
            f"/{entry.path}": list(methods)
            async for entry, methods in open_to(context, cls.entries)
        }
        version = metadata.version("harperpy")
        return {"name": "harperpy", "version": version, "resources": shown}
