"""Deadlines: end what takes too long, at next to no cost for what does not."""

from __future__ import annotations

import asyncio
from contextvars import Context
from types import TracebackType
from typing import Protocol, Self

# How often in its time what waits is looked at, at most.
_LOOKS = 64


class Ends(Protocol):
    """What may not go on for longer than its time."""

    def expire(self) -> None:
        """End it."""
        ...


class Deadlines:
    """Blocks, or other things, that may all take equally long; one timer looks after all of them.

    A timer for each, as `asyncio.timeout` sets it, would cost more than the dispatch itself.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # The oldest first: they are equally long.
        self._running: dict[Ends, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __contains__(self, deadline: Ends) -> bool:
        return deadline in self._running

    def add(self, deadline: Ends) -> None:
        """Look after one more from now on."""
        if (loop := self._loop) is None:
            loop = self._loop = asyncio.get_running_loop()
        self._running[deadline] = when = loop.time() + self.seconds
        if self._timer is None:
            # In no request's context, which would live as long as the timer.
            self._timer = loop.call_at(when, self._look, loop, context=Context())

    def remove(self, deadline: Ends) -> None:
        """It has ended."""
        self._running.pop(deadline, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for deadline, when in list(self._running.items()):
            if when > now:
                self._timer = loop.call_at(when, self._look, loop)
                return
            self.remove(deadline)
            deadline.expire()


class Waiter(Protocol):
    """What waits time and again."""

    @property
    def since(self) -> float:
        """When it last began to; infinity while it does not."""
        ...

    def expire(self) -> None:
        """End it."""
        ...


class Waits:
    """Ends what has waited for `seconds`. Each notes by itself when it waits, at no further cost.

    They are looked at now and then: with many of them, one may wait a 64th longer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._all: set[Waiter] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, one: Waiter) -> None:
        """Look after one more from now on."""
        self._all.add(one)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._look, loop, context=Context())

    def remove(self, one: Waiter) -> None:
        """It waits no more."""
        self._all.discard(one)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = oldest = loop.time()
        for one in [*self._all]:
            if one.since + self._seconds <= now:
                self.remove(one)
                one.expire()
            else:
                oldest = min(oldest, one.since)
        if self._all:
            when = max(oldest + self._seconds, now + self._seconds / _LOOKS)
            self._timer = loop.call_at(when, self._look, loop)


class AllWaits:
    """The `Waits` of each length: one timer for all that wait equally long."""

    def __init__(self) -> None:
        self._known: dict[float, Waits] = {}

    def of(self, seconds: float) -> Waits:
        """Those that wait for so long."""
        waits = self._known.get(seconds)
        if waits is None:
            waits = self._known[seconds] = Waits(seconds)
        return waits


class Deadline:
    """Ends its block when its time is over, by the rules of `asyncio.timeout`."""

    __slots__ = ("_before", "_deadlines", "_task", "expired")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self.expired = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            message = "a Deadline ends a task's block; there is none here"
            raise RuntimeError(message)
        self._task = task
        self._before = task.cancelling()
        self._deadlines.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._deadlines.remove(self)
        # Someone else cancelled this task too: then the cancellation is theirs to see.
        if (
            self.expired
            and self._task.uncancel() <= self._before
            and kind is asyncio.CancelledError
        ):
            raise TimeoutError from error

    def expire(self) -> None:
        """Cancel the block."""
        self.expired = True
        self._task.cancel()
