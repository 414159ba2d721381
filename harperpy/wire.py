"""aiohttp on one side, Request and Reply on the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from aiohttp import web

from .caching import vary
from .connections import SERVER, ConnectedRequest, Connections, new_id
from .content import Body
from .context import Context
from .dispatch import Dispatch
from .errors import BodyTimeout, ClientError
from .incoming import Socket
from .inflating import inflated
from .meter import Meter
from .negotiation import EVENTS
from .rendering import Reply
from .request import Request
from .sections import HttpConfig
from .signal import DISCONNECTED, REVOKED
from .websocket import converse

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLOSE_SECONDS = 5.0
_KEEPALIVE = b": keepalive\n\n"


class Wire:
    """Serves one port's dispatch. `trusted` marks the local socket; a `meter` counts."""

    def __init__(
        self,
        dispatch: Dispatch,
        http: HttpConfig,
        *,
        trusted: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self._dispatch = dispatch
        self._http = http
        self._max_body = http.max_body_size
        self._body_seconds = http.timeout_seconds
        self._trusted = trusted
        self._meter = meter
        self._sockets = 0
        self._prefix = new_id("req_")
        self._count = itertools.count(1)
        self._connections: Connections | None = None

    @property
    def awaits_first(self) -> bool:
        """Whether there is a connection that has brought no request yet."""
        return self._connections is not None and bool(self._connections.fresh)

    def server(self) -> web.Server:
        """The aiohttp server that calls this wire."""
        meter = self._meter
        if meter is None:
            self._connections = Connections(self.handle, self._http)
            return self._connections
        handler = partial(self._metered, meter)
        connections = Connections(handler, self._http, meter.connected)
        meter.watch(lambda: len(connections.connections), lambda: self._sockets)
        self._connections = connections
        return connections

    async def handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        context = self._dispatch.open(self._read(raw))
        if isinstance(raw, ConnectedRequest):
            raw.context = context
        outgoing = _Outgoing(raw)
        try:
            reply = await self._dispatch.answer(context, outgoing.begin)
            if reply.socket is not None:
                return await self._converse(raw, reply, reply.socket, context)
            if isinstance(reply.body, bytes) and not reply.committed:
                return self._whole(reply, raw)
            return await outgoing.send(reply)
        except (asyncio.CancelledError, ConnectionError):
            outgoing.end()
            context.abort(DISCONNECTED)
            raise

    async def _metered(self, meter: Meter, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, and measure it."""
        response = None
        try:
            response = await self.handle(raw)
            return response
        finally:
            _measure(meter, raw, response)

    async def _converse(
        self, raw: web.BaseRequest, reply: Reply, socket: Socket, context: Context
    ) -> web.StreamResponse:
        self._sockets += 1
        try:
            return await converse(raw, reply, socket, context, self._max_body)
        finally:
            self._sockets -= 1

    def _whole(self, reply: Reply, raw: web.BaseRequest) -> web.Response:
        headers = reply.headers
        headers["Server"] = SERVER
        body = reply.body if isinstance(reply.body, bytes) else b""
        response = web.Response(status=reply.status, headers=headers, body=body or None)
        threshold = self._http.compression_threshold
        packs = "Content-Encoding" not in headers and headers.get("Content-Type") != EVENTS
        if threshold and len(body) > threshold and packs:
            vary(response.headers, "Accept-Encoding")
            if _takes_gzip(raw.headers.get("accept-encoding", "")):
                response.enable_compression(web.ContentCoding.gzip)
        return response

    def _read(self, raw: web.BaseRequest) -> Request:
        headers = raw.headers
        path, _, query = raw.raw_path.partition("?")
        client_id = headers.get("x-request-id", "")
        return Request(
            raw.method,
            path if path.startswith("/") else raw.rel_url.raw_path,
            query=query,
            headers=headers,
            body=self._body(raw),
            id=client_id if _CLIENT_ID.fullmatch(client_id) else self._next_id(),
            peer=raw.remote or "",
            trusted=self._trusted,
            websocket=isinstance(raw, ConnectedRequest) and raw.websocket,
        )

    def _body(self, raw: web.BaseRequest) -> Body | None:
        if not raw.body_exists:
            return None
        chunks = self._chunks(raw)
        encoding = ", ".join(raw.headers.getall("content-encoding", ())).strip().lower()
        return Body(
            chunks if encoding in ("", "identity") else inflated(chunks, encoding),
            content_type=raw.headers.get("content-type", ""),
            length=raw.content_length,
            limit=self._max_body,
            decoders=self._dispatch.types.decoders,
        )

    async def _chunks(self, raw: web.BaseRequest) -> AsyncIterator[bytes]:
        if raw.headers.get("expect", "").lower() == "100-continue":
            await raw.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            raw.writer.output_size = 0
        limit = self._body_seconds
        deadline = asyncio.get_running_loop().time() + limit if limit else None
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await raw.content.readany()
            except TimeoutError as error:
                raise BodyTimeout(limit) from error
            except web.RequestPayloadError as error:
                message = "the request body is not what its headers say"
                # What else comes on this connection cannot be told apart from it.
                raise ClientError(message, headers={"Connection": "close"}) from error
            if not chunk:
                return
            yield chunk

    def _next_id(self) -> str:
        return f"{self._prefix}{next(self._count):06x}"


class _Streamed(web.StreamResponse):
    """A response that knows when its head went out, and how much of its body has."""

    begun = 0.0
    sent = 0


def _measure(meter: Meter, raw: web.BaseRequest, response: web.StreamResponse | None) -> None:
    context = raw.context if isinstance(raw, ConnectedRequest) else None
    if context is None:
        return
    path, method, now = context.app, context.method, time.perf_counter()
    received = raw.content.total_bytes
    if isinstance(response, web.Response):
        body, ms = response.body, (now - context.started) * 1000
        sent = len(body) if isinstance(body, bytes) else 0
        meter.answered(path, method, response.status, ms, sent, received)
    elif isinstance(response, _Streamed):
        ms = (response.begun - context.started) * 1000
        meter.answered(path, method, response.status, ms, response.sent, received)
        meter.transferred(path, method, (now - response.begun) * 1000)
    elif response is None:
        meter.lost(path, method)


def _takes_gzip(accept_encoding: str) -> bool:
    """Whether a client asks for gzip by name, and not with a quality of 0."""
    wanted = (part.partition(";") for part in accept_encoding.lower().split(","))
    return any(
        name.strip() == "gzip" and not re.fullmatch(r"\s*q=0(\.0*)?\s*", quality)
        for name, _, quality in wanted
    )


class _Outgoing:
    """A streamed answer: its head, its writes, and a comment when it is silent for long."""

    def __init__(self, raw: web.BaseRequest) -> None:
        self._raw = raw
        self._response: _Streamed | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._interval: float | None = None
        self._watch: asyncio.Task[None] | None = None

    def begin(self, reply: Reply) -> None:
        """Send the head now, although the first item is not there yet."""
        self._beginning = self._spawn(self._begin(reply))

    async def send(self, reply: Reply) -> web.StreamResponse:
        """Write the body to its end; whatever happens, its iterator is closed here."""
        body = reply.body
        try:
            await (self._beginning or self._prepare(reply))
            if isinstance(body, bytes):
                await self._write(body)
            else:
                async for data in body:
                    await self._write(data)
        finally:
            self.end()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await reply.close()
        response = self._response
        if response is None:
            message = "a streamed answer ended before its head"
            raise ConnectionError(message)
        await response.write_eof()
        return response

    async def _begin(self, reply: Reply) -> None:
        await self._prepare(reply)
        if reply.keepalive is not None:
            await self._write(_KEEPALIVE)

    async def _prepare(self, reply: Reply) -> None:
        reply.headers["Server"] = SERVER
        self._response = _Streamed(status=reply.status, headers=reply.headers)
        self._response.begun = time.perf_counter()
        self._interval = reply.keepalive
        await self._response.prepare(self._raw)
        self._listen()
        if reply.check is not None and reply.keepalive is not None:
            self._watch = self._spawn(self._ask(reply.check, reply.keepalive))

    def end(self) -> None:
        """Count and ask no more."""
        self._hush()
        if self._watch is not None:
            self._watch.cancel()

    async def _ask(self, check: Callable[[], Awaitable[None]], seconds: float) -> None:
        """End the stream when who reads it may not go on."""
        raw = self._raw
        try:
            while True:
                await asyncio.sleep(seconds)
                await check()
        except Exception:  # noqa: BLE001  # whatever it is, nobody has said that they may
            if isinstance(raw, ConnectedRequest) and raw.context is not None:
                raw.context.abort(REVOKED)
            raw.task.cancel()

    async def _write(self, data: bytes) -> None:
        if self._response is not None:
            # A reader that is behind needs no comment that we are alive.
            self._hush()
            self._response.sent += len(data)
            await self._response.write(data)
            self._listen()

    def _listen(self) -> None:
        """Start to count the silence anew."""
        self._hush()
        if self._interval is not None:
            loop = asyncio.get_running_loop()
            self._quiet = loop.call_later(self._interval, self._comment)

    def _hush(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None

    def _comment(self) -> None:
        self._spawn(self._write(_KEEPALIVE))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # A lost connection is the writer's to see.
        if not task.cancelled():
            task.exception()
