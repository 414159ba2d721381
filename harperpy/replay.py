"""ReplayBuffer: the last events of a feed, for readers that come back for what they missed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from .accounting import current_caller
from .context import Context
from .signal import AbortSignal
from .sse import SSE, encode_json, encode_sse


class _Held(msgspec.Struct, gc=False):
    event: SSE
    size: int
    at: float


class ReplayBuffer:
    """Holds a feed's last events and hands them, then each new one, to any number of readers.

    Events are dropped, oldest first, beyond `max_events`, `max_age` seconds or `max_bytes` (as they
    are sent). A reader holds no events of its own: to one that is too slow, or asks for what is no
    longer there, an event `replay-gap` says how many it has `missed` (null: nobody knows), and it
    goes on with the oldest that is held. Each reader is told first in how many ms to come back
    when the stream breaks (`retry`), which opens the stream at once. Ids differ from one server
    run to the next. To be used from the server's event loop.
    """

    def __init__(
        self,
        *,
        max_events: int = 1000,
        max_age: float = 300.0,
        max_bytes: int = 1 << 20,
        retry: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_events = max_events
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._clock = clock
        self._retry = SSE(retry=retry)
        self._run = secrets.token_hex(4)
        self._held: deque[_Held] = deque()
        self._bytes = 0
        self._last = 0
        self._closed = False
        self._waiting: set[asyncio.Future[None]] = set()

    def append(self, data: Any = None, *, event: str | None = None) -> SSE:
        """Add an event under the next id, and wake the readers; the event as they get it.

        Raises `ValueError` for one that alone is larger than `max_bytes`, or after `close`.
        """
        if self._closed:
            message = "a closed ReplayBuffer takes no more events"
            raise ValueError(message)
        # Text, so that what is done to the data later changes nothing that was sent.
        text = data if data is None or isinstance(data, str) else encode_json(data).decode()
        told = SSE(data=text, event=event, id=self._id(self._last + 1))
        size = len(encode_sse(told))
        if size > self._max_bytes:
            message = f"an event of {size} bytes; this ReplayBuffer holds {self._max_bytes}"
            raise ValueError(message)
        self._last += 1
        self._bytes += size
        self._held.append(_Held(told, size, self._clock()))
        self._drop()
        self._wake()
        return told

    def since(
        self, last_event_id: str | None, *, until: AbortSignal | None = None
    ) -> AsyncIterator[SSE]:
        """What came after that id, then each event as it is added; without an id, new ones only.

        Ends after `close`, or when `until` fires: by default as the server begins to stop.
        """
        if until is None and isinstance(caller := current_caller.get(), Context):
            until = caller.stopping
        if last_event_id is None:
            return self._read(self._last, None, until)
        run, _, number = last_event_id.rpartition("-")
        # No number of ours has more digits than a counter can reach.
        known = run == self._run and number.isascii() and number.isdecimal() and len(number) < 20
        after = int(number) if known else -1
        if not 0 <= after <= self._last:
            return self._read(self._oldest() - 1, self._gap(None), until)
        return self._read(after, None, until)

    def close(self) -> None:
        """Take no more events; readers get what is held, and end."""
        self._closed = True
        self._wake()

    def __len__(self) -> int:
        self._drop()
        return len(self._held)

    @property
    def size(self) -> int:
        """How many bytes it holds now."""
        self._drop()
        return self._bytes

    async def _read(
        self, after: int, gap: SSE | None, until: AbortSignal | None
    ) -> AsyncIterator[SSE]:
        yield self._retry
        if gap is not None:
            yield gap
        while until is None or not until.aborted:
            missed = self._oldest() - 1 - after
            if missed > 0:
                after += missed
                yield self._gap(missed)
            elif after < self._last:
                after += 1
                yield self._held[after - self._last - 1].event
            elif self._closed:
                return
            else:
                await self._next(until)

    async def _next(self, until: AbortSignal | None) -> None:
        """Return when there is something new, be it the end."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        remove = until.add_callback(lambda: _settle(waiting)) if until is not None else None
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if remove is not None:
                remove()

    def _wake(self) -> None:
        for waiting in self._waiting:
            _settle(waiting)
        self._waiting.clear()

    def _drop(self) -> None:
        """Let go of what is too much or too old."""
        eldest = self._clock() - self._max_age
        held = self._held
        while held and (
            len(held) > self._max_events or self._bytes > self._max_bytes or held[0].at < eldest
        ):
            self._bytes -= held.popleft().size

    def _oldest(self) -> int:
        """The number of the oldest event that is held, or of the next if there is none."""
        self._drop()
        return self._last - len(self._held) + 1

    def _gap(self, missed: int | None) -> SSE:
        """Its id is where the reader goes on, should it leave before the next event."""
        before = self._id(self._oldest() - 1)
        return SSE(event="replay-gap", data={"missed": missed}, id=before)

    def _id(self, number: int) -> str:
        return f"{self._run}-{number}"


def _settle(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
