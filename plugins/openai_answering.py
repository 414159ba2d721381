"""Answering: an answer that comes in piece by piece, for who reads it as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Protocol, TypeAlias

from harperpy import BackendError, Waits

# One read becomes events, chunks and an answer that are there at once, several times its size.
ROOM = 64 << 10
# What is held for who does not read on is at most this and one read.
_MOST_HELD = ROOM
_OK = 200


class Line(Protocol):
    """What an answer comes over; `complete` says that all of it has, `paused` that none does."""

    complete: bool
    loop: asyncio.AbstractEventLoop
    paused: bool

    def hold(self) -> None:
        """There is no room for more."""
        ...

    def go_on(self) -> None:
        """There is room for more."""
        ...

    def came(self, now: float, size: int) -> None:
        """So many bytes of a stream were passed on at once."""
        ...

    def expire(self) -> None:
        """End it, as it takes too long."""
        ...


class Answering:
    """The answer to one request, while it comes in and after; `asked` waits for its head.

    `since` is when the read that waits began to; `held` is how many bytes nobody has read.
    """

    __slots__ = (
        *("_counted", "_error", "_flow", "_idle", "_line", "_loop", "_read", "_sink", "_together"),
        "_waiter",
        *("fields", "held", "parts", "since", "status"),
    )

    def __init__(self, line: Line, asked: Asked, idle: Waits) -> None:
        self.status = 0
        self.fields: Sequence[tuple[bytes, bytes]] = ()
        self.parts: list[bytes] = []
        self.held = self._counted = 0
        self.since = inf
        self._read = self._together = False
        self._line: Line | None = line
        self._loop = line.loop
        self._error: BackendError | None = None
        self._waiter: Asked | None = asked
        # Whom to give what comes; the second only while there is nothing left and a reader waits.
        self._sink: Callable[[bytes], bool] | None = None
        self._flow: Callable[[bytes], bool] | None = None
        self._idle = idle

    @property
    def headers(self) -> Mapping[str, str]:
        """Those of a refusal's head, by their names in lower case."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.fields}

    async def read(self) -> bytes:
        """What has come since the last time; nothing at the end. Raises `BackendError`."""
        parts = self.parts
        if not parts and self._line is not None:
            if not self._read:
                self._read = True
                self._idle.add(self)
            self.since = self._loop.time()
            self._waiter = self._loop.create_future()
            self._flow = self._sink
            await self._waiter
        if not parts and self._error is not None:
            raise self._let_go(self._error)
        if self.held > _MOST_HELD and len(parts) > 1:
            # Each byte will have several shapes at once: not all of them together.
            return self._half()
        data = b"".join(parts)
        parts.clear()
        self.held = self._counted = 0
        if (line := self._line) is not None and line.paused:
            line.go_on()
        return data

    def _let_go(self, error: BackendError) -> BackendError:
        """Once it is raised it leads to here, so nothing here may lead to it."""
        self._error = None
        return error

    def _half(self) -> bytes:
        parts = self.parts
        taken = len(parts) // 2
        data = b"".join(parts[:taken])
        del parts[:taken]
        self._counted = len(parts)
        self.held -= len(data)
        return data

    def news(self) -> int:
        """How many bytes have come into `parts` since the last time; who waits learns of them."""
        parts = self.parts
        if parts and (flow := self._flow) is not None:
            data = b"".join(parts)
            parts.clear()
            self.since = now = self._loop.time()
            try:
                if not flow(data):
                    self._sink = self._flow = None
                elif self._together and self._line is not None:
                    self._line.came(now, len(data))
            except Exception as error:  # noqa: BLE001  # raised where it is waited for
                self._sink = None
                self._wake(error)
            return len(data)
        fresh = sum(map(len, parts[self._counted :]))
        self._counted = len(parts)
        self.held += fresh
        if (line := self._line) is not None and self.held > _MOST_HELD:
            line.hold()
        # Before the first read it is the head that somebody waits for, or all that there is.
        told = fresh if self._read else line is not None and not line.complete
        if told and self._waiter is not None and self.status:
            self._wake()
        return fresh

    def divert(self, sink: Callable[[bytes], bool], *, together: bool = False) -> None:
        """See `Answer`."""
        if self._line is not None:
            self._sink, self._together = sink, together

    def end(self, error: BackendError | None) -> None:
        """Nothing more comes: it is complete, or this went wrong."""
        # What it leads to leads back to here.
        self._line, self._error, self._sink, self._flow = None, error, None, None
        if self._read:
            self._idle.remove(self)
        waiter = self._waiter
        if waiter is None:
            return
        if self._read or error is not None or self.status != _OK:
            self._wake()
        elif not waiter.done():
            waiter.set_result(b"".join(self.parts))

    def expire(self) -> None:
        """It took too long."""
        if self._line is not None:
            self._line.expire()

    def _wake(self, error: Exception | None = None) -> None:
        """There is news for who waits."""
        waiter, self._waiter, self._flow, self.since = self._waiter, None, None, inf
        if waiter is None or waiter.done():
            return
        if error is None and not self.status:
            error = self._error
        if error is not None:
            waiter.set_exception(error)
        else:
            waiter.set_result(self)


Asked: TypeAlias = asyncio.Future[bytes | Answering]
"""What a request brings: the body of a good answer that is there at once, or what reads it."""
