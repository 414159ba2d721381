"""Connection: HTTP/1.1 to a provider as an asyncio protocol, one exchange at a time.

It reads what RFC 9112 allows and gives up on what two parties could read differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, cast

import httptools

from harperpy import BackendError, BackendTimeout, Deadlines, Outbox, Waits

from .openai_heads import Heads

# The same as most servers allow.
_MOST_HEAD = 64 << 10
# What chunks may cost beside their bytes; one of a single byte costs five more.
_MOST_FRAMING = 16
# One read becomes events, chunks and an answer that are there at once, several times its size.
ROOM = 64 << 10
# What is held for who does not read on is at most this and one read.
_MOST_HELD = ROOM
_OK = 200
_VERSIONS = ("1.1", "1.0")


class Answering:
    """The answer to one request, while it comes in and after.

    `since` is when the read that waits began to; `held` is how many bytes nobody has read.
    """

    __slots__ = (
        *("_connection", "_counted", "_error", "_first", "_idle", "_loop", "_read", "_sink"),
        *("_total", "_waiter", "fields", "held", "parts", "since", "status"),
    )

    def __init__(self, connection: Connection, total: Deadlines, idle: Waits) -> None:
        self.status = 0
        self.fields: Sequence[tuple[bytes, bytes]] = ()
        self.parts: list[bytes] = []
        self.held = self._counted = 0
        self.since = inf
        self._read = False
        self._connection: Connection | None = connection
        self._loop = connection.loop
        self._error: BackendError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._first: Deadlines | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._total, self._idle = total, idle
        total.add(self)

    @property
    def headers(self) -> Mapping[str, str]:
        """Those of a refusal's head, by their names in lower case."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.fields}

    def head(self, first: Deadlines | None) -> asyncio.Future[None]:
        """Done when the head is there; without `first` it takes as long as the whole may.

        Raises `BackendError`. Who is cancelled meanwhile closes, which ends the wait as well.
        """
        if first is not None:
            self._first = first
            first.add(self)
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def whole(self) -> bytes | None:
        """The body, where nobody has read of it and all of it is here already."""
        if self._connection is not None or self._error is not None:
            return None
        return b"".join(self.parts)

    async def read(self) -> bytes:
        """What has come since the last time; nothing at the end. Raises `BackendError`."""
        parts = self.parts
        if not parts and self._connection is not None:
            if not self._read:
                self._read = True
                self._idle.add(self)
            self.since = self._loop.time()
            self._waiter = waiter = self._loop.create_future()
            await waiter
        if not parts and self._error is not None:
            raise self._error
        if self.held > _MOST_HELD and len(parts) > 1:
            # Each byte will have several shapes at once: not all of them together.
            return self._half()
        data = b"".join(parts)
        parts.clear()
        self.held = self._counted = 0
        if (connection := self._connection) is not None and connection.paused:
            connection.go_on()
        return data

    def _half(self) -> bytes:
        parts = self.parts
        taken = len(parts) // 2
        data = b"".join(parts[:taken])
        del parts[:taken]
        self._counted = len(parts)
        self.held -= len(data)
        return data

    def close(self) -> None:
        """Break off what has not come yet."""
        self.parts.clear()
        connection = self._connection
        # Within a read, all of it may be here before anybody has been told.
        if connection is not None and not connection.complete:
            connection.abort()
            self.end(None)

    def news(self) -> int:
        """How many bytes have come into `parts` since the last time; who waits learns of them."""
        parts, waiter, sink = self.parts, self._waiter, self._sink
        if sink is not None and parts and waiter is not None and not waiter.done():
            # It waits since there was nothing left: all of this is new.
            data = b"".join(parts)
            parts.clear()
            self.since = self._loop.time()
            try:
                if not sink(data):
                    self._sink = None
            except Exception as error:  # noqa: BLE001  # raised where it is waited for
                self._wake(error)
                self._sink = None
            return len(data)
        fresh = sum(map(len, parts[self._counted :]))
        self._counted = len(parts)
        self.held += fresh
        if self.held > _MOST_HELD and self._connection is not None:
            self._connection.hold()
        # Before the first read it is the head that somebody waits for.
        if waiter is not None and self.status and (fresh or not self._read):
            self._wake()
        return fresh

    def divert(self, sink: Callable[[bytes], bool]) -> None:
        """See `Exchange`."""
        if self._connection is not None:
            self._sink = sink

    def end(self, error: BackendError | None) -> None:
        """Nothing more comes: it is complete, or this went wrong."""
        # What it leads to leads back to here.
        self._connection, self._error, self._sink = None, error, None
        self._total.remove(self)
        if self._read:
            self._idle.remove(self)
        if self._waiter is not None:
            self._wake()

    def expire(self) -> None:
        """It took too long."""
        connection = self._connection
        if connection is not None:
            self.parts.clear()
            self.end(BackendTimeout())
            connection.abort()

    def _wake(self, error: Exception | None = None) -> None:
        """There is news for who waits."""
        waiter, self._waiter, self.since = self._waiter, None, inf
        if self._first is not None:
            self._first.remove(self)
            self._first = None
        if waiter is None or waiter.done():
            return
        if error is None and not self.status:
            error = self._error
        if error is not None:
            waiter.set_exception(error)
        else:
            waiter.set_result(None)


class Connection(asyncio.BufferedProtocol):
    """One connection. `free` is told when it may be used again, `gone` when it has ended.

    `since` is when it was; `complete` says that its answer has come to its end, `paused` that it
    reads no more for now.
    `heads` is where it reads to; connections share it, as it is free again after each read.
    """

    __slots__ = (
        *("_allowed", "_answering", "_bounded", "_excess", "_free", "_gone"),
        *("_headers", "_heads", "_lasts", "_odd", "_parser", "_reused", "_transport", "_whole"),
        *("complete", "loop", "on_body", "paused", "since"),
    )

    on_body: Callable[[bytes], None]
    """Where a piece of a body goes: no frame of ours for each of what may be thousands."""

    def __init__(
        self,
        free: Callable[[Connection], None],
        gone: Callable[[Connection], None],
        heads: Heads,
    ) -> None:
        self._free, self._gone, self._heads = free, gone, heads
        self.loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", None)
        self._parser: Any = None
        self._answering: Answering | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._allowed = self._whole = 0
        self._bounded = self.complete = self._excess = False
        self._lasts = self._reused = self.paused = False
        self.since = 0.0
        self._odd = ""

    @property
    def is_open(self) -> bool:
        """Whether it can be used, as far as anybody knows."""
        return not self._transport.is_closing()

    def ask(self, request: bytes, outbox: Outbox, total: Deadlines, idle: Waits) -> Answering:
        """Send a whole request; its answer is to come."""
        answering = self._answering = Answering(self, total, idle)
        self.on_body = answering.parts.append
        self._parser = None
        self.complete = False
        outbox.send(self._transport, request)
        return answering

    def hold(self) -> None:
        """There is no room for more."""
        if not self.paused and not self.complete:
            self.paused = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """There is room for more."""
        self.paused = False
        self._transport.resume_reading()

    def abort(self) -> None:
        """End it at once; the provider sees that."""
        self._answering = None
        self._transport.abort()

    def expire(self) -> None:
        """It was kept long enough."""
        self._transport.abort()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return self._heads.room

    def buffer_updated(self, nbytes: int) -> None:
        """Read on in the answer; what nobody has asked for ends the connection."""
        answering = self._answering
        if answering is None:
            self._transport.abort()
            return
        parser = self._parser
        if begins := parser is None:
            if (known := self._heads.body(nbytes)) is not None:
                answering.status = _OK
                answering.parts.append(known)
                self.complete = self._lasts = True
                self._end()
                return
            parser = self._begin()
        try:
            parser.feed_data(self._heads.room[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._stop(error)
        if self._excess:
            del answering.parts[self._whole :]
        body = answering.news()
        # What may still come beside the body, of which each byte allows for more.
        self._allowed += body * (1 + _MOST_FRAMING) - nbytes
        if self._allowed < 0:
            self._odd = self._odd or "too much beside its body"
        if self._odd:
            self._fail(BackendError(f"the provider's answer is malformed: {self._odd}"))
        elif self.complete:
            if begins and answering.status == _OK and self._lasts and not self._excess:
                self._heads.note(nbytes, body)
            self._end()

    def _begin(self) -> Any:
        """A parser for an answer whose head may be any."""
        self._headers = []
        self._allowed = _MOST_HEAD
        self._bounded = self._excess = False
        self._parser = parser = httptools.HttpResponseParser(self)
        return parser

    def _stop(self, error: Exception) -> None:
        """It cannot be read on; beyond its end that takes nothing from it."""
        self._excess = self.complete
        if not self.complete:
            self._odd = self._odd or f"{type(error).__name__}: {error}"

    def eof_received(self) -> None:
        """Nothing more comes, so nothing more is sent."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever has not come yet never will."""
        self._gone(self)
        answering = self._answering
        if answering is None:
            return
        if exc is None and answering.status and not self._bounded:
            self._answering = None
            answering.end(None)
            return
        told = f"{type(exc).__name__}: {exc}" if exc else "it was closed"
        error = BackendError(f"the connection to the provider was lost: {told}")
        error.stale = self._reused and self._parser is None
        self._fail(error)

    # --- httptools' side

    def on_message_begin(self) -> None:
        """Another answer, which nobody asked for, takes nothing from the first."""
        self._excess = self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the body they count for nothing."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is there, unless another one follows it."""
        status = self._parser.get_status_code()
        headers = self._headers
        self._headers = []
        if self.complete or self._answering is None or 100 <= status < 200:
            return
        known = dict(headers)
        coded = b"transfer-encoding" in known
        self._bounded = coded or b"content-length" in known or status in (204, 304)
        if coded or b"content-encoding" in known:
            self._odd = _oddity(known, headers)
        if status < 100 or self._parser.get_http_version() not in _VERSIONS:
            self._odd = "its status line is none of HTTP/1.1"
        if not self._odd:
            self._answering.status = status
            if status != _OK:
                self._answering.fields = headers

    def on_message_complete(self) -> None:
        """The end, unless it was one that only announces another."""
        if not self.complete and self._answering is not None:
            self.complete = self._parser.get_status_code() >= 200
            self._lasts = self._parser.should_keep_alive()
            self._whole = len(self._answering.parts)

    def _end(self) -> None:
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.end(None)
        if self.paused:
            self.go_on()
        unsent = self._transport.get_write_buffer_size()
        if self._excess or unsent or not self._lasts:
            self._transport.abort()
        else:
            self._reused = True
            self._free(self)

    def _fail(self, error: BackendError) -> None:
        answering, self._answering = self._answering, None
        self._transport.abort()
        if answering is not None:
            answering.end(error)


def _oddity(known: dict[bytes, bytes], headers: Sequence[tuple[bytes, bytes]]) -> str:
    """What keeps a head from being understood; nothing if it can be."""
    coded = known.get(b"transfer-encoding")
    if coded is not None:
        names = [name for name, _ in headers] if len(known) < len(headers) else []
        twice = names.count(b"transfer-encoding") > 1
        if twice or coded.strip().lower() != b"chunked":
            return "its Transfer-Encoding is not chunked"
        if b"content-length" in known:
            return "it has a Content-Length beside its Transfer-Encoding"
    if known.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        return "its Content-Encoding was not asked for"
    return ""
