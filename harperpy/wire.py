"""aiohttp on one side, Request and Reply on the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from aiohttp.web_protocol import RequestPayloadError
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from .connections import ConnectedRequest, Connections
from .content import Body, body_of
from .context import Context
from .delivery import BODILESS, Delivery
from .errors import BodyTimeout, ClientError
from .fronts import promised
from .incoming import Socket
from .inflating import inflated
from .lines import told_lines
from .names import CONTENT_LENGTH
from .port import SERVER, Port
from .rendering import Reply
from .request import Request
from .signal import DISCONNECTED
from .websocket import converse

_Response = TypeVar("_Response", bound=StreamResponse)


class Wire:
    """Serves one port's dispatch."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._dispatch = port.dispatch
        self._max_body = port.http.max_body_size
        self._body_seconds = port.http.timeout_seconds
        self._sockets = 0
        self._connections: Connections | None = None

    @property
    def awaits_first(self) -> bool:
        """Whether there is a connection that has brought no request yet."""
        return self._connections is not None and self._connections.awaits_first

    def server(self) -> Connections:
        """The aiohttp server that calls this wire."""
        connections = self._connections = Connections(self.handle, self._port)
        if self._port.meter is not None:
            self._port.meter.watch(lambda: len(connections.connections), lambda: self._sockets)
        return connections

    async def handle(self, raw: BaseRequest) -> StreamResponse:
        """Answer one request."""
        port = self._port
        context = self._dispatch.open(self._read(raw))
        if isinstance(raw, ConnectedRequest):
            raw.context = context
        line = _Line(raw)
        delivery = Delivery(line, context, asyncio.current_task(), port.silences)
        try:
            reply = await self._dispatch.answer(context, delivery.begin)
            if reply.socket is not None and not delivery.early:
                return await self._converse(raw, reply, reply.socket, context)
            if isinstance(reply.body, bytes) and not delivery.early:
                await port.pack(reply, context)
                response = _whole(reply, raw.method)
                sent = 0 if reply.status in BODILESS else len(reply.body)
                port.answered(context, reply.status, sent, raw.content.total_bytes)
                return response
            await delivery.send(reply)
        except (asyncio.CancelledError, ConnectionError):
            delivery.end()
            context.abort(DISCONNECTED)
            port.lost(context)
            raise
        except BaseException:
            delivery.end()
            port.lost(context)
            raise
        port.streamed(context, delivery, raw.content.total_bytes)
        return line.response

    async def _converse(
        self, raw: BaseRequest, reply: Reply, socket: Socket, context: Context
    ) -> StreamResponse:
        self._sockets += 1
        try:
            return await converse(raw, reply, socket, context, self._max_body)
        finally:
            self._sockets -= 1

    def _read(self, raw: BaseRequest) -> Request:
        headers = raw.headers
        path, _, query = raw.raw_path.partition("?")
        return Request(
            raw.method,
            path if path.startswith("/") else raw.rel_url.raw_path,
            query=query,
            headers=headers,
            body=self._body(raw),
            id=self._port.request_id(headers),
            peer=raw.remote or "",
            trusted=self._port.trusted,
            websocket=isinstance(raw, ConnectedRequest) and raw.websocket,
        )

    def _body(self, raw: BaseRequest) -> Body:
        if not raw.body_exists:
            return Body()
        chunks = self._chunks(raw)
        encoding = ", ".join(raw.headers.getall("content-encoding", ())).strip().lower()
        return body_of(
            raw.headers.get("content-type", ""),
            self._max_body,
            self._dispatch.types.decoders,
            chunks if encoding in ("", "identity") else inflated(chunks, encoding),
            _length(raw),
        )

    async def _chunks(self, raw: BaseRequest) -> AsyncIterator[bytes]:
        expects = raw.headers.get("expect", "").lower() == "100-continue"
        # What comes after a head would be a part of its body.
        if expects and not raw.writer.output_size and raw.transport is not None:
            raw.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        limit = self._body_seconds
        deadline = asyncio.get_running_loop().time() + limit if limit else None
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await raw.content.readany()
            except TimeoutError as error:
                raise BodyTimeout(limit) from error
            except RequestPayloadError as error:
                message = "the request body is not what its headers say"
                # What else comes on this connection cannot be told apart from it.
                raise ClientError(message, headers={"Connection": "close"}) from error
            if not chunk:
                return
            yield chunk


class _Line:
    """One answer over aiohttp."""

    push: Callable[[bytes], bool] | None = None

    def __init__(self, raw: BaseRequest) -> None:
        self._raw = raw
        self.sent, self.last, self.behind = 0, 0.0, False
        self.response = StreamResponse()

    async def head(self, reply: Reply) -> None:
        promised(reply.headers)
        self.response = _named(StreamResponse(status=reply.status, headers=reply.headers))
        await self.response.prepare(self._raw)

    def write(self, data: bytes) -> Awaitable[None] | None:
        self.sent += len(data)
        self.last = asyncio.get_running_loop().time()
        return self.response.write(data)

    async def end(self) -> None:
        await self.response.write_eof()
        if self._raw.writer.length and self.response.status not in BODILESS:
            # Who was promised more than came sees it by the connection's end.
            self.response.force_close()

    def abort(self) -> None:
        if self._raw.transport is not None:
            self._raw.transport.abort()


def _length(raw: BaseRequest) -> int | None:
    """How long a body is said to be; None where that has more zeros than Python reads."""
    try:
        return raw.content_length
    except ValueError:
        return None


def _whole(reply: Reply, method: str) -> Response:
    if method != "HEAD":
        # The length is that of its body.
        reply.headers.popall(CONTENT_LENGTH, None)
    body = reply.body if isinstance(reply.body, bytes) else b""
    return _named(Response(status=reply.status, headers=reply.headers, body=body or None))


def _named(response: _Response) -> _Response:
    """Say who answers; the connection ends where the answer says so.

    Raises `ValueError` for a header that is more than a line.
    """
    told_lines(response.headers)
    response.headers["Server"] = SERVER
    if response.headers.get("Connection", "").lower() == "close":
        response.force_close()
    return response
