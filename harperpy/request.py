"""Request: what arrived. RequestTarget: what is left of its path once a resource is found."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, cast
from urllib.parse import parse_qsl, unquote

import msgspec
from msgspec.structs import replace
from typing_extensions import TypeVar  # its own knows no default before Python 3.13

from .content import Body

Query = TypeVar("Query", default=Any)

_NO_PARAMS: Mapping[str, str] = MappingProxyType({})


class Shown(msgspec.Struct, eq=False, gc=False):
    """A credential as a client sent it last: who sends the same again has it hashed already.

    `course` is what a dispatch knows of the whole head by which it came: its own business.
    """

    header: str = ""
    key: bytes = b""
    course: Any = None


class Request(msgspec.Struct, eq=False):
    """One request, free of any server library."""

    method: str
    """In capitals."""
    path: str
    """As the client sent it, with its leading `/`."""
    headers: Mapping[str, str]
    """Looked up in any case."""
    query: str = ""
    """What comes after `?`, undecoded."""
    body: Body = msgspec.field(default_factory=Body)
    """To be awaited."""
    id: str = ""
    """The client's `x-request-id` if it is one, else the server's."""
    peer: str = ""
    """The client's address."""
    trusted: bool = False
    """Whether it came by the local socket, whose file permissions are its credential."""
    websocket: bool = False
    """Whether it asks to become a WebSocket."""
    shown: Shown = msgspec.field(default_factory=Shown)
    """What the client showed before on the same connection, by this very head."""
    brief: bool = False
    """Whether who sends the answer takes its head as lines, as nobody changes it any more."""

    # What it holds is no log's business.
    __repr__ = object.__repr__


class RequestTarget(msgspec.Struct, Generic[Query], eq=False):
    """Where a request points inside the resource that answers it.

    Where nothing is left of the path, a parameter of the mount called `id` is the `id`.
    """

    pathname: str = ""
    """What is left of the path: `""`, `"/"`, `"/123"`."""
    id: str | None = None
    """The same decoded, without slashes around it; None if nothing is left."""
    is_collection: bool = False
    """Whether the path ends in a slash, or has a query and no id."""
    params: Mapping[str, str] = _NO_PARAMS
    """The decoded values of a mount such as `users/:id` or `files/*path`."""
    search: str = ""
    """What comes after `?`, undecoded."""
    query: Query = cast("Query", None)
    """The same decoded, where the verb takes a `RequestTarget[Search]`: a `Search`."""
    _pairs: list[tuple[str, str]] | None = None

    # What somebody asks for is no log's business.
    __repr__ = object.__repr__

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first query value of that name."""
        return next((value for key, value in self.pairs if key == name), default)

    def get_all(self, name: str) -> list[str]:
        """All query values of that name."""
        return [value for key, value in self.pairs if key == name]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query as pairs, in order."""
        if self._pairs is None:
            self._pairs = parse_qsl(self.search, keep_blank_values=True)
        return self._pairs


def target_of(pathname: str, search: str, params: Mapping[str, str] = _NO_PARAMS) -> RequestTarget:
    """The target for what is left of a path, a query, and the values of a mount's parameters."""
    named = decoded(pathname.strip("/")) or params.get("id")
    collects = pathname.endswith("/") or bool(search and not named)
    return RequestTarget(pathname, named, collects, params, search)


def decoded(text: str) -> str:
    """Percent-decoded; what is no UTF-8 then stays as it is, apart from all else that is none."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text


def own_target(like: RequestTarget) -> RequestTarget:
    """One like it for another request: a handler may do with it what it wants."""
    return replace(like, params={**like.params}) if like.params else replace(like)
