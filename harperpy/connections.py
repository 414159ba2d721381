"""Connections: aiohttp's with our limits; what is no request is refused in our words."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

from aiohttp import HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse
from aiohttp.web_server import Server

from .context import Context
from .deadlines import Deadlines
from .front import Front
from .fronts import Fronts
from .port import UNSENT_BYTES, Port, refusal
from .signal import DISCONNECTED, SHUTDOWN

# How many of the longest line a head may have that arrives bit by bit.
_MOST_LINES = 4
_UNLIMITED = 1e9

logger = logging.getLogger("harperpy.wire")


class ConnectedRequest(BaseRequest):
    """aiohttp's request, which knows the context to tell when its connection is lost."""

    context: Context | None = None
    websocket = False

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


class Connections(Server):
    """aiohttp's server, and all connections of a port; its own ones, where they may, come first.

    `fresh` are those that have brought no request yet.
    """

    def __init__(self, handler: Any, port: Port) -> None:
        http = port.http
        self._meter = port.meter
        self.fresh: set[RequestHandler] = set()
        self.heads = Deadlines(http.headers_timeout_seconds or _UNLIMITED)
        # The library tells a field from a line by nothing else than its limit.
        self.field_size = http.max_header_size + 10
        self._options: dict[str, Any] = {
            "access_log": None,
            # The library would refuse or overlook an encoding before there is a request to answer.
            "auto_decompress": False,
            "keepalive_timeout": http.keep_alive_timeout_seconds,
            "max_line_size": http.max_header_size,
            "max_field_size": self.field_size,
        }
        self._loop = asyncio.get_running_loop()
        self._fronts = Fronts(port, self._go_on) if http.front else None
        super().__init__(
            handler,
            request_factory=self._request,
            handler_cancellation=True,
            **self._options,
        )

    def __call__(self) -> RequestHandler | Front:  # type: ignore[override]
        """A new connection."""
        if self._meter is not None:
            self._meter.connected()
        return self._plain() if self._fronts is None else Front(self._fronts)

    @property
    def awaits_first(self) -> bool:
        """Whether there is a connection that has brought no request yet."""
        return bool(self.fresh or (self._fronts and self._fronts.fresh))

    @property
    def connections(self) -> list[Any]:
        """All that there are, of either kind."""
        return [*super().connections, *(() if self._fronts is None else self._fronts.all)]

    def pre_shutdown(self) -> None:
        """End those that are idle."""
        if self._fronts is not None:
            self._fronts.close()
        super().pre_shutdown()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # as it is there
        """Wait so long for the others, then cut them off."""
        ends = [super().shutdown(timeout)]
        if self._fronts is not None:
            ends.append(self._fronts.shutdown(timeout))
        await asyncio.gather(*ends)

    def _plain(self) -> _Connection:
        return _Connection(self, loop=self._loop, connections=self, **self._options)

    def _go_on(self, transport: asyncio.Transport, data: bytes) -> None:
        connection = self._plain()
        transport.set_protocol(connection)
        connection.begin(transport, data)

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> ConnectedRequest:
        self.fresh.discard(protocol)
        self.heads.remove(protocol)
        request = ConnectedRequest(message, payload, protocol, writer, task, self._loop)
        if message.upgrade:
            request.websocket = _asks_for_websocket(request)
        return request


def _asks_for_websocket(request: ConnectedRequest) -> bool:
    """Whether what it wants to become is a WebSocket; nothing else is, and nothing with a body."""
    named = request.headers.get("upgrade", "").lower() == "websocket"
    sound = request.version == HttpVersion11 and not request.body_exists
    return request.method == "GET" and named and sound


class _Connection(RequestHandler):
    """One connection. A head that has begun to arrive has to be whole in time."""

    __slots__ = ("_arrived", "_connections")

    def __init__(self, *given: Any, connections: Connections, **options: Any) -> None:
        super().__init__(*given, **options)
        self._connections = connections
        self._arrived = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.fresh.add(self)
        if isinstance(transport, asyncio.WriteTransport):
            transport.set_write_buffer_limits(high=UNSENT_BYTES)

    def begin(self, transport: asyncio.Transport, data: bytes) -> None:
        """Go on where another protocol has read, and answered nothing of it."""
        self.connection_made(transport)
        super().data_received(data)
        if not self._messages:
            self._head_goes_on(len(data))

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.fresh.discard(self)
        self._connections.heads.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Still none: what has arrived is a part of a head.
        if (waiter := self._waiter) is not None and data and not waiter.done():
            self._head_goes_on(len(data))

    def _head_goes_on(self, size: int) -> None:
        heads = self._connections.heads
        if self not in heads:
            # It is idle no more: from now on it has its time for the head.
            self.keep_alive(True)  # noqa: FBT003
            heads.add(self)
            self._arrived = 0
        self._arrived += size
        if self._arrived > self._connections.field_size * _MOST_LINES:
            self._refuse(431)

    def expire(self) -> None:
        """The head has not come in time."""
        self._refuse(408)

    def _refuse(self, status: int) -> None:
        """Answer in place of a request that will not come, and close."""
        headers, body = refusal(status, logging.INFO, "its head is too slow or too large")
        headers.update({"Content-Length": str(len(body)), "Connection": "close"})
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.transport is not None:
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.force_close()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """One line for what a client has done, as anyone can do it at any time."""
        error = kw.get("exc_info")
        if isinstance(error, HttpProcessingError | RequestPayloadError):
            logger.info("a body is not what its headers say: %s", type(error).__name__)
        else:
            super().log_exception(*args, **kw)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        if request.writer.output_size > 0:
            told = "the answer had begun"
            raise ConnectionError(told) from exc
        if isinstance(exc, LineTooLong):
            status = 431 if self._connections.field_size in exc.args else 414
        elif status == 400 and "Too many headers" in str(exc):
            status = 431
        level = logging.INFO if status < 500 else logging.ERROR
        headers, body = refusal(status, level, exc)
        response = Response(status=status, body=body, headers=headers)
        response.force_close()
        return response
