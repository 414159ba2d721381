"""aiohttp on one side, Request and Reply on the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import secrets
from collections.abc import AsyncIterator, Coroutine
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from .content import Body
from .context import Context
from .dispatch import Dispatch
from .errors import BodyTimeout, ClientError
from .negotiation import JSON
from .rendering import Reply
from .request import Request
from .signal import DISCONNECTED, SHUTDOWN
from .sse import encode_json

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLOSE_SECONDS = 5.0
# What a connection may hold for a slow reader before its producer has to wait.
_UNSENT_BYTES = 64 * 1024
_KEEPALIVE = b": keepalive\n\n"
_SERVER = "harperpy"
# Not the same, as the library tells the one from the other by nothing else.
_LINE_SIZE = 16_384
_FIELD_SIZE = 16_394

logger = logging.getLogger("harperpy.wire")


def _new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(6)}"


class _Request(web.BaseRequest):
    """aiohttp's request, which knows the context to tell when its connection is lost."""

    context: Context | None = None

    def _cancel(self, exc: BaseException) -> None:
        # Called before the handler's task is cancelled: the signal is there when it unwinds.
        if self.context is not None:
            # aiohttp gives a CancelledError where the server, and not the client, ends it.
            ours = isinstance(exc, asyncio.CancelledError)
            self.context.abort(SHUTDOWN if ours else DISCONNECTED)
            if ours:
                # aiohttp would wait as long again for a handler that has been asked to end.
                self.task.cancel()
        super()._cancel(exc)


class _Handler(RequestHandler):
    """aiohttp's connection, whose own refusals (of what is no HTTP) look like ours."""

    __slots__ = ("_fresh",)

    def __init__(self, *given: Any, fresh: set[RequestHandler], **options: Any) -> None:
        super().__init__(*given, **options)
        self._fresh = fresh

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._fresh.add(self)
        if isinstance(transport, asyncio.WriteTransport):
            transport.set_write_buffer_limits(high=_UNSENT_BYTES)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._fresh.discard(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            told = "the answer had begun"
            raise ConnectionError(told) from exc
        if isinstance(exc, LineTooLong):
            status = 431 if _FIELD_SIZE in exc.args else 414
        elif status == 400 and "Too many headers" in str(exc):
            status = 431
        refused = _new_id("req_")
        logger.log(
            logging.INFO if status < 500 else logging.ERROR,
            "%s answered %d before it was a request: %s",
            refused,
            status,
            type(exc).__name__,
            exc_info=exc if status >= 500 else None,
        )
        body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
        response = web.Response(
            status=status,
            body=encode_json({**body, "request_id": refused}),
            headers={"Content-Type": JSON, "Server": _SERVER, "x-request-id": refused},
        )
        response.force_close()
        return response


class _Server(web.Server):
    """aiohttp's server with our connections."""

    def __init__(self, handler: Any, *, fresh: set[RequestHandler], **options: Any) -> None:
        self._fresh = fresh
        self._options = {
            name: value
            for name, value in options.items()
            if name not in ("request_factory", "handler_cancellation")
        }
        super().__init__(handler, **options)

    def __call__(self) -> RequestHandler:
        loop = asyncio.get_running_loop()
        return _Handler(self, loop=loop, fresh=self._fresh, **self._options)


class Wire:
    """Serves one port's dispatch. `trusted` marks the local socket."""

    def __init__(
        self, dispatch: Dispatch, *, max_body: int, body_seconds: float, trusted: bool = False
    ) -> None:
        self._dispatch = dispatch
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._trusted = trusted
        self._prefix = _new_id("req_")
        self._count = itertools.count(1)
        self._fresh: set[RequestHandler] = set()

    @property
    def awaits_first(self) -> bool:
        """Whether there is a connection that has brought no request yet."""
        return bool(self._fresh)

    def server(self, keepalive_seconds: float = 75.0) -> web.Server:
        """The aiohttp server that calls this wire."""
        loop = asyncio.get_running_loop()

        def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> _Request:
            self._fresh.discard(protocol)
            return _Request(message, payload, protocol, writer, task, loop)

        return _Server(
            self.handle,
            fresh=self._fresh,
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=keepalive_seconds,
            max_line_size=_LINE_SIZE,
            max_field_size=_FIELD_SIZE,
        )

    async def handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        context = self._dispatch.open(self._read(raw))
        if isinstance(raw, _Request):
            raw.context = context
        outgoing = _Outgoing(raw)
        try:
            reply = await self._dispatch.answer(context, outgoing.begin)
            if isinstance(reply.body, bytes) and not reply.committed:
                return _whole(reply)
            return await outgoing.send(reply)
        except (asyncio.CancelledError, ConnectionError):
            context.abort(DISCONNECTED)
            raise

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
        )

    def _body(self, raw: web.BaseRequest) -> Body | None:
        if not raw.body_exists:
            return None
        return Body(
            self._chunks(raw),
            content_type=raw.headers.get("content-type", ""),
            length=raw.content_length,
            limit=self._max_body,
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
                raise ClientError(message) from error
            if not chunk:
                return
            yield chunk

    def _next_id(self) -> str:
        return f"{self._prefix}{next(self._count):06x}"


def _whole(reply: Reply) -> web.Response:
    headers = reply.headers
    headers["Server"] = _SERVER
    body = reply.body if isinstance(reply.body, bytes) else b""
    return web.Response(status=reply.status, headers=headers, body=body or None)


class _Outgoing:
    """A streamed answer: its head, its writes, and a comment when it is silent for long."""

    def __init__(self, raw: web.BaseRequest) -> None:
        self._raw = raw
        self._response: web.StreamResponse | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._interval: float | None = None

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
            self._hush()
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
        reply.headers["Server"] = _SERVER
        self._response = web.StreamResponse(status=reply.status, headers=reply.headers)
        self._interval = reply.keepalive
        await self._response.prepare(self._raw)
        self._listen()

    async def _write(self, data: bytes) -> None:
        if self._response is not None:
            # A reader that is behind needs no comment that we are alive.
            self._hush()
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
