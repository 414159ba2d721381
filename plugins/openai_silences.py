"""Silences: answers of which nothing comes any more, found at no cost for those that go on."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Reading(Protocol):
    """An answer that is read. `since` is when a read of it last began to wait."""

    since: float

    @property
    def waits(self) -> bool:
        """Whether a read waits now."""
        ...

    def expire(self) -> None:
        """End it."""
        ...


class Silences:
    """Ends each answer of which nothing has come for `seconds`, though somebody waits for it.

    An answer notes each wait itself; here it is added once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._all: set[Reading] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, answer: Reading) -> None:
        """It is read from now on."""
        self._all.add(answer)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._look, loop)

    def remove(self, answer: Reading) -> None:
        """It has ended."""
        self._all.discard(answer)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = oldest = loop.time()
        for answer in [*self._all]:
            if not answer.waits:
                continue
            if answer.since + self._seconds <= now:
                self.remove(answer)
                answer.expire()
            else:
                oldest = min(oldest, answer.since)
        if self._all:
            self._timer = loop.call_at(oldest + self._seconds, self._look, loop)
