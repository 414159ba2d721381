"""Front: HTTP/1.1 in its common form, served right on the transport; the rest is aiohttp's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from math import inf
from typing import Any

from msgspec.structs import replace

from .content import body_of
from .context import Context
from .delivery import BODILESS, Delivery
from .fronts import Fronts, address, promised
from .heads import Head, read_head
from .lines import first_line, told_lines
from .names import CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, DATE
from .names import SERVER as SERVER_NAME
from .negotiation import OCTETS
from .port import SERVER, UNSENT_BYTES, client_id, refusal
from .rendering import Reply
from .request import Request
from .signal import DISCONNECTED, SHUTDOWN

_MOST_AHEAD_BYTES = 64 * 1024
# A head that is larger is not worth its memory while nothing comes.
_MOST_KEPT_BYTES = 2 * 1024
# From here on a copy costs more than a second write.
_LARGE = 64 * 1024
_CHUNK = b"%x\r\n%b\r\n"
_SIGNED = f"Server: {SERVER}\r\n\r\n"

logger = logging.getLogger("harperpy.wire")


class Front(asyncio.Protocol):
    """One connection. A request is served once it has arrived as a whole, in a task of its own.

    What is not HTTP/1.1, kept alive, with a short body of known length is handed to another
    protocol on the same transport, with all bytes that nobody has answered; so is what is wrong.
    """

    __slots__ = (
        *("_buffer", "_chunked", "_closing", "_context", "_delivery", "_drained"),
        *("_fronts", "_head", "_left", "_needed", "_peer", "_task", "_unsent"),
        *("behind", "last", "sent", "since", "transport"),
    )

    def __init__(self, fronts: Fronts) -> None:
        self._fronts = fronts
        self.since = fronts.loop.time()
        self.transport: Any = None
        self._peer = ""
        self._buffer = b""
        self._head: Head | None = None
        self._needed = 0
        self._task: asyncio.Task[None] | None = None
        self._context: Context | None = None
        self._delivery: Delivery | None = None
        self._drained: asyncio.Future[None] | None = None
        self._closing = False
        self._chunked = False
        self._left: int | None = None
        self._unsent = b""
        self.sent, self.last, self.behind = 0, 0.0, False

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self.transport = transport
        self._peer = address(transport)
        self._fronts.came(self)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has left, or was cut off: nobody waits for the answer any more."""
        self._fronts.left(self)
        self._buffer = b""
        self.resume_writing()
        self._cancel(DISCONNECTED)

    def pause_writing(self) -> None:
        """The client is behind."""
        self._drained = self._fronts.loop.create_future()
        self.since, self.behind = inf, True

    def resume_writing(self) -> None:
        """It has caught up."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)
        if self._task is None:
            self._after()

    def expire(self) -> None:
        """It was idle for too long, or its body takes too long."""
        if self._needed:
            self._hand_over(self._buffer)
        else:
            self._fronts.outbox.flush()
            self.transport.close()

    def close(self) -> None:
        """End it when it has answered what it was asked, or has begun to be asked."""
        self._closing = True
        if not (self._task or self._drained or self._needed):
            self.transport.close()

    def cut(self) -> None:
        """End what it does now."""
        self._cancel(SHUTDOWN)
        if self._task is None:
            self.abort()

    def abort(self) -> None:
        """End it at once."""
        self.transport.abort()

    def _cancel(self, reason: str) -> None:
        if self._task is not None:
            if self._context is not None:
                self._context.abort(reason)
            self._task.cancel()

    def _hand_over(self, data: bytes) -> None:
        """Let another protocol go on, as if it had been there from the beginning."""
        self._fronts.outbox.flush()
        if self._drained is not None:
            # The other would not know that its client is behind: see `resume_writing`.
            self._buffer = data
            return
        self._fronts.left(self)
        self._buffer = b""
        if self._closing:
            self.transport.close()
            return
        self._fronts.hand_over(self.transport, data)

    # --- what comes in

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._buffer:
            data = self._buffer + data
        if self._task is None and self._drained is None:
            self._next(data)
            return
        self._buffer = data
        if len(data) > _MOST_AHEAD_BYTES:
            self.transport.pause_reading()

    def _go_on(self) -> None:
        """Serve what has come meanwhile, if nothing has yet."""
        idle = self._task is None and self._drained is None
        if idle and self._buffer and not self._closing:
            self.transport.resume_reading()
            self._next(self._buffer)

    def _next(self, data: bytes) -> None:
        """Serve the next request if it is here."""
        head, begun = self._head, self._needed > 0
        if head is None or not (begun or data.startswith(head.told)):
            self._head = head = self._read(data)
            if head is None:
                self._hand_over(data)
                return
        if len(data) < head.whole:
            self._buffer, self._needed, self.since = data, head.whole, inf
            if not begun:
                self._fronts.bodies.add(self)
            return
        if begun:
            self._needed = 0
            self._fronts.bodies.remove(self)
        self._start(data, head)

    def _read(self, data: bytes) -> Head | None:
        """A head that is not the one before; None where somebody else has to read it."""
        fronts, port = self._fronts, self._fronts.port
        head = self._head and self._head.again(data)
        if head is None and (head := read_head(data, fronts.most_head)) is not None:
            request = head.request
            request.id = client_id(request.headers)
            request.peer, request.trusted, request.brief = self._peer, port.trusted, fronts.brief
            told, decoders = request.headers.get(CONTENT_TYPE, ""), port.dispatch.types.decoders
            head.body = body_of(told, port.http.max_body_size, decoders)
        if head is None or head.length > fronts.most_body:
            return None
        fronts.fresh.discard(self)
        return head

    def _start(self, data: bytes, head: Head) -> None:
        """Answer the request that is whole now."""
        fronts = self._fronts
        self.since = inf
        self._buffer = data[head.whole :]
        if len(head.told) > _MOST_KEPT_BYTES:
            self._head = None
        like = head.request
        name = like.id or fronts.port.next_id()
        if head.length:
            body = replace(head.body, whole=data[len(head.told) : head.whole])
            request = replace(like, id=name, body=body)
        else:
            request = replace(like, id=name)
        answer = self._answer(request, head.length)
        self._task = asyncio.Task(answer, loop=fronts.loop, name=name)

    # --- what goes out

    async def _answer(self, request: Request, received: int) -> None:
        port = self._fronts.port
        dispatch = port.dispatch
        context = self._context = dispatch.open(request)
        try:
            reply = dispatch.serve(context, self._early)
            if not isinstance(reply, Reply):
                reply = await reply
            if self._delivery is None and isinstance(reply.body, bytes):
                if port.packs:
                    await port.pack(reply, context)
                sent = self._whole(reply, reply.body)
                port.answered(context, reply.status, sent, received)
            else:
                delivery = self._delivery = self._delivery or self._deliver(context)
                await delivery.send(reply)
                port.streamed(context, delivery, received)
        except (asyncio.CancelledError, ConnectionError):
            context.abort(DISCONNECTED)
            port.lost(context)
            self.transport.abort()
        except Exception as error:  # noqa: BLE001  # nobody after us would answer it
            port.lost(context)
            self._failed(error)
        except BaseException:
            port.lost(context)
            self.transport.abort()
            raise
        finally:
            if self._delivery is not None:
                self._delivery.end()
            self._context = self._task = self._delivery = None
        self._after()

    def _after(self) -> None:
        """Go on to what has arrived meanwhile, or wait for it."""
        fronts = self._fronts
        if self._closing:
            fronts.outbox.flush()
            self.transport.close()
        elif self._drained is not None:
            # Answers that wait for their reader are not to become more: see `resume_writing`.
            return
        elif not self._buffer:
            self.since = fronts.loop.time()
        elif not self.transport.is_closing():
            # What one request has set in its context is not the next one's.
            fronts.loop.call_soon(self._go_on, context=fronts.context)

    def _early(self, reply: Reply) -> None:
        """Send a stream's head, as its first item is late."""
        if self._context is not None:
            self._delivery = self._delivery or self._deliver(self._context)
            self._delivery.begin(reply)

    def _deliver(self, context: Context) -> Delivery:
        return Delivery(self, context, self._task, self._fronts.port.silences)

    def _whole(self, reply: Reply, body: bytes) -> int:
        """Send an answer that has all its bytes; how many there are in its body."""
        size, lines = len(body), reply.lines
        length = f"Content-Length: {size}\r\n"
        if reply.status in BODILESS:
            body, length, size = b"", "", 0
        if lines:
            end = "Connection: close\r\n" if self._closing else ""
            head = f"{lines}{length}{end}{self._fronts.stamp()}".encode()
        else:
            headers = reply.headers
            if CONTENT_LENGTH in headers:
                del headers[CONTENT_LENGTH]
            if size and CONTENT_TYPE not in headers:
                headers[CONTENT_TYPE] = OCTETS
            head = self._head_bytes(reply, length)
        if size < _LARGE:
            self._fronts.outbox.send(self.transport, head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return size

    async def head(self, reply: Reply) -> None:
        """Prepare a stream's head, to go out with the first of its bytes."""
        headers, self.sent = reply.headers, 0
        bare = reply.status in BODILESS
        length = promised(headers)
        if not bare:
            headers.setdefault(CONTENT_TYPE, OCTETS)
        self._chunked = not bare and length is None
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        self._left = None if self._chunked else 0 if bare else length
        self._unsent = self._head_bytes(reply, "")

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Send a part of a stream; what to await where the client is behind, or has left."""
        self.sent += len(data)
        self.last = self._fronts.loop.time()
        if self._left is not None:
            # What is more than was promised would be the beginning of another answer.
            data = data[: self._left]
            self._left -= len(data)
        if len(data) >= _LARGE:
            self._write_large(data)
        elif data:
            self._send(_CHUNK % (len(data), data) if self._chunked else data)
        if self._drained is None and self.transport.is_closing():
            self._await_end()
        return self._drained

    def _await_end(self) -> None:
        """Let who makes what nobody reads wait until it is cancelled.

        Who waits for nothing would never let the loop say that the connection is lost. Raises
        `ConnectionResetError` where it has been said.
        """
        if self not in self._fronts.all:
            raise ConnectionResetError
        self._drained = self._fronts.loop.create_future()

    def push(self, data: bytes) -> bool:
        """As `write`, of what was read just now: with what else this turn of the loop sends.

        Whether the client keeps up.
        """
        size, fronts = len(data), self._fronts
        if not (size and self._chunked) or size >= _LARGE:
            return self.write(data) is None
        self.sent += size
        self.last = fronts.loop.time()
        data = _CHUNK % (size, data)
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        fronts.outbox.send(self.transport, data)
        return self._drained is None and not self.transport.is_closing()

    def _write_large(self, data: bytes) -> None:
        """As `write`, without copies of what is large."""
        self._send(b"%x\r\n" % len(data) if self._chunked else b"")
        self.transport.write(data)
        if self._chunked:
            self.transport.write(b"\r\n")

    async def end(self) -> None:
        """End a stream; who was promised more than came sees it by the connection's end."""
        self._send(b"0\r\n\r\n" if self._chunked else b"")
        if self._left:
            self._closing = True

    def _send(self, data: bytes) -> None:
        """Send bytes now, after what was pushed; the head, where they are the first, with them."""
        self._fronts.outbox.flush()
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        if data:
            self.transport.write(data)

    def _head_bytes(self, reply: Reply, length: str) -> bytes:
        """A head. Raises `ValueError` for what would be more than one line of it."""
        headers = reply.headers
        if SERVER_NAME in headers:
            del headers[SERVER_NAME]
        if self._closing:
            headers[CONNECTION] = "close"
        elif CONNECTION in headers:
            self._closing = headers[CONNECTION].lower() == "close"
        last = _SIGNED if DATE in headers else self._fronts.stamp()
        return f"{first_line(reply.status)}{told_lines(headers)}\r\n{length}{last}".encode()

    def _failed(self, error: Exception) -> None:
        """Answer what cannot be sent as it is; end what had begun."""
        begun = self._delivery is not None and self._delivery.begun and not self._unsent
        self._unsent = b""
        self._closing = True
        if begun:
            logger.error("an answer broke off: %s", type(error).__name__, exc_info=error)
            return
        headers, body = refusal(500, logging.ERROR, error)
        self._whole(Reply(500, headers), body)
