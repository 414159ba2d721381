"""Outbox: what is written in one turn of the loop, all together at its end."""

from __future__ import annotations

import asyncio

_MOST_BYTES = 256 * 1024


class Outbox:
    """Bytes for several transports. Written one right after the other they wake their reader once.

    For what comes in answer to something that was read: who writes on and on never lets it go out.
    That a transport is behind is learnt when it is written to; so much does not wait for that.
    `flushes` is how often all of it has been written: while that stays the same nothing has left.
    """

    __slots__ = ("_loop", "_size", "_unsent", "flushes")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._size = self.flushes = 0
        self._unsent: list[tuple[asyncio.WriteTransport, bytes]] = []

    def send(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write this when all that can run now has run."""
        if not self._unsent:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self.flush)
        self._unsent.append((transport, data))
        self._size += len(data)
        if self._size > _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write it now, as for a transport that is about to be closed or written to."""
        if not self._unsent:
            return
        unsent, self._unsent, self._size = self._unsent, [], 0
        self.flushes += 1
        for transport, data in unsent:
            if not transport.is_closing():
                transport.write(data)
