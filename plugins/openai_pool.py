"""Pool: the connections to one provider, the last used first."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from yarl import URL

from harperpy import BackendError, BackendTimeout, ConfigError, Deadlines, Outbox, Waits

from .openai_answering import ROOM, Answering
from .openai_apart import apart
from .openai_connection import Connection, Exchange, Ways
from .openai_exchange import Timeouts
from .openai_heads import Heads
from .openai_kept import Kept

_KEPT_SECONDS = 30.0
# The end of a body comes right behind its last event; this long it is waited for.
_REST_SECONDS = 1.0
_NAMED = b"X-Client-Request-Id: %d\r\n"
_POST = b"%b" + _NAMED + b"Content-Length: %d\r\n\r\n%b"


class Pool:
    """Sends requests over kept connections; without `kept`, each over one of its own.

    Raises `ConfigError` for a base URL or a header that no request can be made of.
    """

    def __init__(
        self, base: str, headers: Mapping[str, str], timeouts: Timeouts, *, kept: bool = True
    ) -> None:
        url = URL(base)
        self._host, self._port = url.raw_host or "", url.port or 0
        self._tls = url.scheme == "https"
        self._timeouts = timeouts
        self._path = url.raw_path.rstrip("/")
        self._lines = _lines(url, headers)
        self._posts: dict[str, bytes] = {}
        self._free = Kept(_KEPT_SECONDS)
        self._ways = Ways(
            heads=Heads(ROOM),
            outbox=Outbox(),
            total=Waits(timeouts.total),
            idle=Waits(timeouts.idle),
            rests=Deadlines(_REST_SECONDS),
            fast={},
            free=self._free.put if kept else Connection.abort,
            gone=self._forget,
        )
        self._open: set[Connection] = set()
        self._first: dict[float, Deadlines] = {}
        self._doubted = 0
        self._context: ssl.SSLContext | None = None

    def send(
        self, path: str, body: bytes | None, first_byte: float | None, call_id: int | None
    ) -> Exchange | Anew:
        """Post, or get what has no body."""
        request = self._request(path, body, call_id)
        first = None if first_byte is None else self._until_head(first_byte)
        if self._doubted:
            # One was just found to be gone.
            self._doubted -= 1
        elif (connection := self._free.take()) is not None:
            return connection.ask(request, first)
        return Anew(self._connect(first_byte), request, first)

    async def close(self) -> None:
        """Close all connections."""
        for connection in list(self._open):
            connection.abort()

    def _until_head(self, seconds: float) -> Deadlines:
        """The deadlines of heads."""
        first = self._first.get(seconds)
        if first is None:
            first = self._first[seconds] = Deadlines(seconds)
        return first

    async def _connect(self, first_byte: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        if self._tls and self._context is None:
            self._context = ssl.create_default_context()
        try:
            times = self._timeouts
            async with asyncio.timeout(min(times.connect, first_byte or times.total)):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._ways),
                    self._host,
                    self._port,
                    ssl=self._context,
                )
        except TimeoutError as error:
            late = BackendTimeout()
            late.retryable = True
            raise late from error
        except OSError as error:
            raise _unreached(error) from error
        if connection.is_closing():
            raise _unreached(ConnectionResetError())
        # One that nobody came to have may end unheard of.
        self._ways.total.add(connection)
        self._open.add(connection)
        return connection

    def _forget(self, connection: Connection, stale: bool) -> None:  # noqa: FBT001  # a callback
        self._doubted += stale
        self._open.discard(connection)
        self._free.forget(connection)

    def _request(self, path: str, body: bytes | None, call_id: int | None) -> bytes:
        if body is None:
            named = b"" if call_id is None else _NAMED % call_id
            return b"%b%b\r\n" % (self._head("GET", path), named)
        head = self._posts.get(path)
        if head is None:
            head = self._posts[path] = self._head("POST", path)
        if call_id is None:
            return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        return _POST % (head, call_id, len(body), body)

    def _head(self, method: str, path: str) -> bytes:
        target = URL(f"http://x{self._path}{path}").raw_path_qs
        return f"{method} {target} HTTP/1.1\r\n".encode() + self._lines


class Anew:
    """An exchange over a connection that is still to be made."""

    def __init__(
        self, connecting: Coroutine[Any, Any, Connection], request: bytes, first: Deadlines | None
    ) -> None:
        self._exchange: Exchange | None = None
        self._coming: Coroutine[Any, Any, bytes | Answering] | None
        self._coming = self._answer(connecting, request, first)

    @property
    def answer(self) -> Awaitable[bytes | Answering]:
        """To be awaited, once."""
        if self._coming is None:
            message = "it was awaited before"
            raise RuntimeError(message)
        coming, self._coming = self._coming, None
        return coming

    async def _answer(
        self, connecting: Coroutine[Any, Any, Connection], request: bytes, first: Deadlines | None
    ) -> bytes | Answering:
        connection = await apart(connecting)
        self._exchange = exchange = connection.ask(request, first)
        return await exchange.answer

    def finish(self) -> None:
        """Drop what has not come yet, which is not much."""
        if self._exchange is not None:
            self._exchange.finish()

    def close(self) -> None:
        """Break off what has not come yet."""
        if self._exchange is not None:
            self._exchange.close()


def _lines(url: URL, headers: Mapping[str, str]) -> bytes:
    """The header lines that all requests share."""
    lines = {"Host": url.host_port_subcomponent or "", "Accept": "*/*"}
    if url.user is not None:
        pair = f"{url.user}:{url.password or ''}".encode()
        lines["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    lines |= headers
    for name, value in lines.items():
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
            message = f"the header {name} of requests to a provider: expected no control characters"
            raise ConfigError(message)
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()


def _unreached(error: OSError) -> BackendError:
    failure = BackendError(f"no connection to the provider: {type(error).__name__}: {error}")
    failure.retryable = True
    return failure
