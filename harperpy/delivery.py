"""Delivery: a streamed answer on its way to its client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from math import inf
from typing import Any, Protocol, TypeAlias

from .context import Context
from .deadlines import AllWaits, Waits
from .rendering import NO_HEADERS, Reply
from .signal import DISCONNECTED, REVOKED

_CLOSE_SECONDS = 5.0
# So long one stream may keep all others waiting.
_TURN_SECONDS = 0.01
_KEEPALIVE = b": keepalive\n\n"
# Whatever a resource gives for these, it would be read as the next answer.
BODILESS = frozenset({204, 304})

logger = logging.getLogger("harperpy.wire")

Push: TypeAlias = Callable[[bytes], bool]


class Line(Protocol):
    """A connection, as one answer sees it.

    `sent` counts the bytes of the body, `last` is when it was given some, and `behind` says
    that its client has been behind, until that is taken back.
    """

    sent: int
    last: float
    behind: bool

    @property
    def push(self) -> Push | None:
        """As `write`, together with others; whether the client keeps up.

        None where a write always has to be awaited.
        """
        ...

    async def head(self, reply: Reply) -> None:
        """Send the head, or let it go with the first bytes of the body."""
        ...

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Send a part of the body; what to await where the client is behind."""
        ...

    async def end(self) -> None:
        """Nothing more comes."""
        ...

    def abort(self) -> None:
        """End the connection at once."""
        ...


class Delivery:
    """A streamed answer: its head, its writes, and a comment when it is silent for long.

    `task` is the one that answers; `silences` look after those that are silent. `begun` is when the
    head went out, by `time.perf_counter()`.
    """

    __slots__ = (
        *("_beginning", "_behind", "_context", "_line", "_loop", "_push", "_silence", "_silences"),
        *("_task", "_tasks", "_watch", "begun", "status"),
    )

    def __init__(
        self,
        line: Line,
        context: Context,
        task: asyncio.Task[Any] | None,
        silences: AllWaits,
    ) -> None:
        self.begun = 0.0
        self.status = 0
        self._line = line
        self._push: Push | None = None
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._task = task
        self._beginning: asyncio.Task[None] | None = None
        self._silences = silences
        self._silence: Waits | None = None
        self._behind = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None

    @property
    def sent(self) -> int:
        """How many bytes of the body."""
        return self._line.sent

    @property
    def early(self) -> bool:
        """Whether a head went out before there was a first item."""
        return self._beginning is not None

    def begin(self, reply: Reply) -> None:
        """Send the head now, although the first item is not there yet; after another, none can."""
        if self.early:
            self._refuse(reply)
        else:
            self._beginning = self._spawn(self._begin(reply))

    async def send(self, reply: Reply) -> None:
        """Write the body to its end; whatever happens, its iterator is closed here.

        Raises `ConnectionError`, and ends the connection, where the head of another went out.
        """
        body, line, ended = reply.body, self._line, False
        try:
            await self._headed(reply)
            if isinstance(body, bytes):
                await self._write(body)
            elif reply.status not in BODILESS:
                if reply.divert is not None:
                    self._push, line.behind = line.push, True
                turn = self._loop.time() + _TURN_SECONDS
                async for data in body:
                    if (drained := self._put(data)) is not None:
                        await self._wait(drained)
                    # The next may take long to come: nothing of this one is kept meanwhile.
                    del data, drained
                    if line.last > turn:
                        # Who makes it may wait for nothing, and its reader keep up.
                        await asyncio.sleep(0)
                        turn = line.last + _TURN_SECONDS
                    if line.behind and self._push is not None and reply.divert is not None:
                        line.behind = False
                        reply.divert(self._push)
                ended = True
        except ConnectionError:
            # What is closed now may want to know why.
            self._context.abort(DISCONNECTED)
            raise
        finally:
            self.end()
            # At its end it has closed what it is made from.
            if not ended:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        await reply.close()
        await line.end()

    def end(self) -> None:
        """Count and ask no more."""
        if self._silence is not None:
            self._silence.remove(self)
            self._silence = None
        if self._watch is not None:
            self._watch.cancel()
            # Its end leads back to here.
            self._watch = None

    @property
    def since(self) -> float:
        """When something was sent last; a reader that is behind needs no comment that we live."""
        return inf if self._behind else self._line.last

    def expire(self) -> None:
        """Break a silence that is long enough."""
        if self._silence is not None:
            self._line.last = self._loop.time()
            self._silence.add(self)
            self._spawn(self._remind())

    async def _headed(self, reply: Reply) -> None:
        if self._beginning is None:
            await self._prepare(reply)
        elif reply.committed:
            await self._beginning
        else:
            self._refuse(reply)
            raise ConnectionError

    def _refuse(self, reply: Reply) -> None:
        status = reply.status
        logger.error("an answer broke off: after its head came another one, of %d", status)
        self._line.abort()

    async def _begin(self, reply: Reply) -> None:
        await self._prepare(reply)
        if reply.keepalive is not None and reply.status not in BODILESS:
            await self._write(_KEEPALIVE)

    async def _prepare(self, reply: Reply) -> None:
        begun = time.perf_counter()
        self.status = reply.status
        await self._line.head(reply)
        self.begun = begun
        # It is sent, and a stream may last: what no one reads any more is not kept for so long.
        reply.headers = NO_HEADERS
        self._context.call_headers.clear()
        if reply.keepalive is None or reply.status in BODILESS:
            return
        if not reply.quiet:
            self._line.last = self._loop.time()
            self._silence = self._silences.of(reply.keepalive)
            self._silence.add(self)
        if reply.check is not None:
            self._watch = self._spawn(self._ask(reply.check, reply.keepalive))

    async def _remind(self) -> None:
        # The stream may have ended since this was to be done.
        if self._silence is not None:
            await self._write(_KEEPALIVE)

    async def _write(self, data: bytes) -> None:
        if (drained := self._put(data)) is not None:
            await self._wait(drained)

    def _put(self, data: bytes) -> Awaitable[None] | None:
        """Send a part of the body; what to await where the client is behind."""
        if self._push is None:
            return self._line.write(data)
        return None if self._push(data) else self._line.write(b"")

    async def _wait(self, drained: Awaitable[None]) -> None:
        self._behind = True
        await drained
        self._behind = False
        self._line.last = self._loop.time()

    async def _ask(self, check: Callable[[], Awaitable[None]], seconds: float) -> None:
        """End the stream when who reads it may not go on."""
        try:
            while True:
                await asyncio.sleep(seconds)
                await check()
        except Exception:  # noqa: BLE001  # whatever it is, nobody has said that they may
            self._context.abort(REVOKED)
            if self._task is not None:
                self._task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        # A lost connection is the writer's to see.
        if not task.cancelled():
            task.exception()
