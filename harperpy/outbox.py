"""Outbox: what is written in one turn of the loop, all together at its end."""

from __future__ import annotations

import asyncio


class Outbox:
    """Bytes for several transports. Written one right after the other they wake their reader once.

    For messages that are whole and few: nobody learns that a transport is behind.
    """

    __slots__ = ("_loop", "_unsent")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent: list[tuple[asyncio.WriteTransport, bytes]] = []

    def send(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write this when all that can run now has run."""
        if not self._unsent:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self.flush)
        self._unsent.append((transport, data))

    def flush(self) -> None:
        """Write it now, as for a transport that is about to be closed."""
        unsent, self._unsent = self._unsent, []
        for transport, data in unsent:
            if not transport.is_closing():
                transport.write(data)
