"""Kept: the connections to one provider that wait to be used again."""

from __future__ import annotations

import asyncio

from .openai_connection import Connection


class Kept:
    """Gives the last used first, and ends what nobody has used for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # The one that waits for longest is always the first.
        self._waiting: list[Connection] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, connection: Connection) -> None:
        """It can be used again."""
        loop = connection.loop
        connection.kept = now = loop.time()
        self._waiting.append(connection)
        if self._timer is None:
            self._timer = loop.call_at(now + self._seconds, self._look, loop)

    def take(self) -> Connection | None:
        """One that is open, as far as anybody knows."""
        waiting = self._waiting
        while waiting:
            connection = waiting.pop()
            if not connection.is_closing():
                return connection
        return None

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        if connection in self._waiting:
            self._waiting.remove(connection)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End those whose time is over."""
        self._timer = None
        waiting, until = self._waiting, loop.time() - self._seconds
        while waiting and waiting[0].kept <= until:
            waiting.pop(0).expire()
        if waiting:
            self._timer = loop.call_at(waiting[0].kept + self._seconds, self._look, loop)
