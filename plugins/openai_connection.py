"""Connection: HTTP/1.1 to a provider as an asyncio protocol, one exchange at a time.

It reads what RFC 9112 allows and gives up on what two parties could read differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, cast

import httptools
import msgspec

from harperpy import BackendError, BackendTimeout, Deadlines, Outbox, Waits

from .openai_answering import Answering, Asked
from .openai_heads import Heads
from .openai_pace import Pace

# The same as most servers allow.
_MOST_HEAD = 64 << 10
# How many bytes may come for each of a body; a chunk of a single one takes six.
_MOST_PER_BYTE = 17
# Of what is left of an answer when nobody needs more of it.
_MOST_REST = 16 << 10
_OK = 200
_VERSIONS = ("1.1", "1.0")


class Ways(msgspec.Struct, eq=False):
    """What the connections to one provider share.

    `heads` is where they read to: it is free again after each read. `rests` are what is left of
    answers when nobody needs more of them. `fast` are those over which a stream comes fast. `free`
    is told when one may be used again, `gone` when one has ended, and whether that left a request
    without any answer.
    """

    heads: Heads
    outbox: Outbox
    total: Waits
    idle: Waits
    rests: Deadlines
    fast: dict[Pace, None]
    free: Callable[[Connection], None]
    gone: Callable[[Connection, bool], None]


class Exchange(msgspec.Struct, eq=False):
    """A request over a connection; see `Exchange` of any upstream."""

    answer: Asked
    connection: Connection

    def finish(self) -> None:
        """Drop what has not come yet, which is not much."""
        self.connection.finish(self.answer)

    def close(self) -> None:
        """Break off what has not come yet; only once."""
        self.connection.leave(self.answer)
        # What it raised leads back to who has this.
        del self.answer


class Connection(asyncio.BufferedProtocol):
    """One connection, over which `ways` it is asked.

    `since` is when it was asked what has no answer yet, `kept` when it could be used again;
    `complete` says that its answer has come to its end, `paused` that it reads no more for now.
    """

    __slots__ = (
        *("_allowed", "_answering", "_asked", "_bounded", "_excess", "_first", "_flushes"),
        *("_free", "_headers", "_heads", "_lasts", "_odd", "_outbox", "_pace", "_parser"),
        *("_resting", "_transport", "_ways", "_whole", "complete", "is_closing", "kept", "loop"),
        *("on_body", "paused", "since"),
    )

    is_closing: Callable[[], bool]
    """Whether it can be used no more, as far as anybody knows."""

    on_body: Callable[[bytes], None]
    """Where a piece of a body goes: no frame of ours for each of what may be thousands."""

    def __init__(self, ways: Ways) -> None:
        self._ways = ways
        self._heads, self._outbox, self._free = ways.heads, ways.outbox, ways.free
        self.loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", None)
        self._parser: Any = None
        self._pace = Pace(ways.fast)
        self._resting: asyncio.TimerHandle | None = None
        self._asked: Asked | None = None
        self._answering: Answering | None = None
        self._first: Deadlines | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._allowed = self._flushes = self._whole = 0
        self._bounded = self.complete = self._excess = False
        self._lasts = self.paused = False
        self.since, self.kept = inf, 0.0
        self._odd = ""

    def ask(self, request: bytes, first: Deadlines | None) -> Exchange:
        """Send a whole request; without `first` its head may take as long as the whole."""
        loop = self.loop
        self._asked = asked = loop.create_future()
        self.since = loop.time()
        if first is not None:
            self._first = first
            first.add(self)
        self._flushes = self._outbox.flushes
        self._outbox.send(self._transport, request)
        return Exchange(asked, self)

    def leave(self, asked: Asked) -> None:
        """Who asked this wants no more of it."""
        # Within a read, all of it may be here before anybody has been told.
        if self._asked is asked and not self.complete:
            self._transport.abort()
            self._over(None)

    def finish(self, asked: Asked) -> None:
        """Who asked this needs no more of it: it can be used again if the rest comes soon."""
        if self._asked is asked and not self.complete:
            parser = self._parser
            self._over(None)
            self._asked = nobody = self.loop.create_future()
            nobody.cancel()
            self._answering = Answering(self, nobody, self._ways.idle)
            self._parser, self._allowed = parser, _MOST_REST
            self._first = self._ways.rests
            self._first.add(self)

    def hold(self) -> None:
        """There is no room for more."""
        if not self.paused and not self.complete:
            self.paused = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """There is room for more."""
        self.paused = False
        if self._resting is None:
            self._transport.resume_reading()

    def came(self, now: float, size: int) -> None:
        """A part of a stream was passed on; one that comes fast is not read for a while."""
        seconds = self._pace.rest(now, size)
        if seconds and self._resting is None and not self.is_closing():
            self._transport.pause_reading()
            self._resting = self.loop.call_later(seconds, self._rested)

    def abort(self) -> None:
        """End it at once; the provider sees that."""
        self._fail(BackendError("the connection to the provider was closed"))

    def expire(self) -> None:
        """What it is asked took too long, or it was kept long enough."""
        if self._answering is not None:
            self._answering.parts.clear()
        self._fail(BackendTimeout())

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_closing = transport.is_closing

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return self._heads.room

    def buffer_updated(self, nbytes: int) -> None:
        """Read on in the answer; what nobody has asked for ends the connection."""
        answering = self._answering
        if begins := answering is None:
            asked = self._asked
            # Before a request has left there is no answer to it.
            if asked is None or self._flushes == self._outbox.flushes:
                self._transport.abort()
                return
            if (body := self._heads.body(nbytes)) is not None:
                self._at_once(asked, body)
                return
            answering = self._begin(asked)
        try:
            self._parser.feed_data(self._heads.room[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._stop(error)
        if self._excess:
            del answering.parts[self._whole :]
        fresh = answering.news()
        # What may still come beside the body, of which each byte allows for more.
        self._allowed = allowed = self._allowed + fresh * _MOST_PER_BYTE - nbytes
        if self._odd or allowed < 0:
            told = self._odd or "too much beside its body"
            self._fail(BackendError(f"the provider's answer is malformed: {told}"))
        elif self.complete:
            # By that head another answer can be understood at once, if it begins with it.
            if begins and answering.status == _OK and self._lasts and not self._excess:
                self._heads.note(nbytes, fresh)
            self._end()

    def _at_once(self, asked: Asked, body: bytes) -> None:
        """All of a good answer is there, by a head that is known."""
        if not asked.done():
            asked.set_result(body)
        self._asked, self.since = None, inf
        if self._first is not None:
            self._begun(self._first)
        self._keep()

    def _begin(self, asked: Asked) -> Answering:
        """Read an answer whose head may be any."""
        self._answering = answering = Answering(self, asked, self._ways.idle)
        self.on_body = answering.parts.append
        self._headers = []
        self._allowed = _MOST_HEAD
        self._bounded = self._excess = False
        self._parser = httptools.HttpResponseParser(self)
        return answering

    def _stop(self, error: Exception) -> None:
        """It cannot be read on; beyond its end that takes nothing from it."""
        self._excess = self.complete
        if not self.complete:
            self._odd = self._odd or f"{type(error).__name__}: {error}"

    def eof_received(self) -> None:
        """Nothing more comes, so nothing more is sent."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever has not come yet never will."""
        answering = self._answering
        stale = self._asked is not None and answering is None and self.kept > 0
        if self._resting is not None:
            self._resting.cancel()
        self._ways.total.remove(self)
        self._ways.gone(self, stale)
        if exc is None and answering is not None and answering.status and not self._bounded:
            self._over(None)
            return
        told = f"{type(exc).__name__}: {exc}" if exc else "it was closed"
        error = BackendError(f"the connection to the provider was lost: {told}")
        error.stale = stale
        self._over(error)

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
            if self._first is not None:
                self._begun(self._first)
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
        """All of the answer is there."""
        self._over(None)
        self.complete = False
        if self._resting is not None:
            self._resting.cancel()
            self._rested()
        if self.paused:
            self.go_on()
        if self._excess or not self._lasts:
            self._transport.abort()
        else:
            self._keep()

    def _rested(self) -> None:
        self._resting = None
        if not self.paused and not self.is_closing():
            self._transport.resume_reading()

    def _keep(self) -> None:
        """It can be used again, unless what it was asked is still on its way."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._free(self)

    def _fail(self, error: BackendError) -> None:
        self._transport.abort()
        self._over(error)

    def _over(self, error: BackendError | None) -> None:
        """Nothing more comes of what it was asked: that is complete, or this went wrong."""
        if (asked := self._asked) is None:
            return
        self._asked, self.since = None, inf
        if self._first is not None:
            self._begun(self._first)
        if (answering := self._answering) is not None:
            self._pace.end()
            self._answering = self._parser = None
            answering.end(error)
        elif error is not None and not asked.done():
            asked.set_exception(error)

    def _begun(self, first: Deadlines) -> None:
        """The head is there, or nobody waits for it."""
        self._first = None
        first.remove(self)


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
