"""Request: what arrived. RequestTarget: what is left of its path once a resource is found."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic
from urllib.parse import parse_qsl, unquote

import msgspec
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
    body: Body = Body()
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


class RequestTarget(Generic[Query]):
    """Where a request points inside the resource that answers it.

    Where nothing is left of the path, a parameter of the mount called `id` is the `id`.
    """

    pathname: str
    """What is left of the path: `""`, `"/"`, `"/123"`."""
    id: str | None
    """The same decoded, without slashes around it; None if nothing is left."""
    is_collection: bool
    """Whether the path ends in a slash, or has a query and no id."""
    params: Mapping[str, str]
    """The decoded values of a mount such as `users/:id` or `files/*path`."""
    search: str
    """What comes after `?`, undecoded."""

    __slots__ = ("_pairs", "id", "is_collection", "params", "pathname", "query", "search")

    query: Query
    """The same decoded, where the verb takes a `RequestTarget[Search]`: a `Search`."""

    def __init__(
        self, pathname: str = "", search: str = "", params: Mapping[str, str] = _NO_PARAMS
    ) -> None:
        self.pathname = pathname
        self.search = search
        self.params = params
        self.id = params.get("id") if params else None
        self.is_collection = False
        if pathname:
            self.id = unquote(pathname.strip("/")) or self.id
            self.is_collection = pathname.endswith("/")
        if search and not self.id:
            self.is_collection = True
        self._pairs: list[tuple[str, str]] | None = None

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
