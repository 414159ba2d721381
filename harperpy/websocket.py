"""A WebSocket, from the answer that opens it to the code that closes it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from aiohttp import WSMsgType
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from aiohttp.web_ws import WebSocketResponse

from .backend import aclose
from .context import Context
from .errors import Aborted
from .framing import as_harper_error, exited, log_error
from .handshake import SUBPROTOCOL
from .incoming import Socket, closing
from .outgoing import framed
from .port import SERVER
from .rendering import Reply
from .signal import DISCONNECTED, REVOKED, SHUTDOWN, is_ending

_END_SECONDS = 5.0
_NORMAL, _GOING_AWAY = 1000, 1001


async def converse(
    raw: BaseRequest, reply: Reply, socket: Socket, context: Context, most_bytes: int
) -> StreamResponse:
    """Open a WebSocket, and return when it is closed; whatever happens, so is its generator."""
    response = WebSocketResponse(
        timeout=_END_SECONDS,
        autoping=False,
        protocols=(SUBPROTOCOL,),
        compress=False,
        # The library refuses what is as long as its limit.
        max_msg_size=most_bytes + 1,
        # Ask after each message whether the connection is behind.
        writer_limit=0,
    )
    response.headers.update(reply.headers)
    response.headers["Server"] = SERVER
    try:
        await response.prepare(raw)
    except BaseException:
        await reply.close()
        raise
    await _Conversation(raw, response, socket, context).hold()
    return response


class _Conversation:
    """Three tasks: one steps the generator and sends, one reads, one asks whether to go on."""

    def __init__(
        self,
        raw: BaseRequest,
        response: WebSocketResponse,
        socket: Socket,
        context: Context,
    ) -> None:
        self._raw = raw
        self._response = response
        self._socket = socket
        self._incoming = socket.incoming
        self._context = context
        self._heard = False
        self._sending = False
        self._sender = asyncio.create_task(self._send())
        self._reader = asyncio.create_task(self._read())
        self._watch = asyncio.create_task(self._ask())

    async def hold(self) -> None:
        """Until one of the three is done, or the server or the connection ends it."""
        tasks = (self._sender, self._reader, self._watch)
        forget = self._context.stopping.add_callback(self._incoming.end)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            forget()
            try:
                await self._take_leave()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=_END_SECONDS)
            await self._close(*self._verdict())

    async def _send(self) -> None:
        source = self._socket.source
        try:
            async for item in source:
                if self._context.signal.aborted:
                    return
                await self._write(*framed(item))
        except SystemExit as error:
            raise exited() from error
        except RuntimeError as error:
            # Python's word for a generator's `await anext(incoming)` that has no next one.
            if not (self._incoming.ended and isinstance(error.__cause__, StopAsyncIteration)):
                raise
        except asyncio.CancelledError as error:
            if is_ending():
                raise
            message = "what a WebSocket's handler waited for was cancelled"
            raise RuntimeError(message) from error
        finally:
            await aclose(source)

    async def _write(self, data: bytes, text: bool) -> None:  # noqa: FBT001  # as `framed` gives it
        self._sending = True
        try:
            await self._response.send_frame(data, WSMsgType.TEXT if text else WSMsgType.BINARY)
        except ConnectionError:
            self._context.abort(DISCONNECTED)
        finally:
            self._sending = False

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await self._incoming.room()
                message: Any = await self._response.receive()
                self._heard = True
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    self._incoming.put(message.data)
                elif message.type is WSMsgType.PING:
                    await self._response.pong(message.data)
                elif message.type is not WSMsgType.PONG:
                    return
                else:
                    # Nobody waits for one: of a flood of them each gives the others a turn.
                    await asyncio.sleep(0)

    async def _ask(self) -> None:
        """Return when nobody is there any more. Raises what refuses the user by now."""
        asked = False
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(self._socket.interval)
                # Whom we do not listen to, and who does not listen, cannot answer.
                deaf = self._sending or self._incoming.full or self._context.stopping.aborted
                if asked and not (self._heard or deaf):
                    return
                await self._socket.check()
                asked = not deaf
                if asked:
                    self._heard = False
                # Of who has left, nothing but a write tells while nothing is read.
                if not self._sending:
                    await self._response.ping()

    async def _take_leave(self) -> None:
        """Tell the handler, if it still runs, and give it time to end if it was listening."""
        if self._sender.done():
            return
        refused = self._watch.done() and self._watch.exception() is not None
        self._context.abort(REVOKED if refused else DISCONNECTED)
        self._incoming.end()
        if self._incoming.taken and self._context.signal.reason == DISCONNECTED:
            await asyncio.wait((self._sender,), timeout=_END_SECONDS)

    def _verdict(self) -> tuple[int, bytes]:
        """The code and the reason to close with."""
        signal = self._context.signal
        for task in (self._watch, self._sender, self._reader):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, Exception) and not (signal.aborted and isinstance(error, Aborted)):
                log_error(error)
                return closing(as_harper_error(error))
        if self._context.stopping.aborted:
            return _GOING_AWAY, SHUTDOWN.encode()
        return _NORMAL, b""

    async def _close(self, code: int, reason: bytes) -> None:
        watch = self._watch
        gone = watch.done() and not watch.cancelled() and watch.exception() is None
        if not gone:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await self._response.close(code=code, message=reason)
                    return
        # Nobody reads: what is not sent by now would keep the connection for ever.
        if self._raw.transport is not None:
            self._raw.transport.abort()
