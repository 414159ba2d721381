"""Listener: where one port's connections come from."""

from __future__ import annotations

import asyncio
import socket

from .connections import Connections
from .held import BACKLOG


class Listener:
    """Takes the connections of a port, at one place or several, until it is to stop."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self._places: list[asyncio.Server] = []

    @property
    def listens(self) -> bool:
        """Whether it takes connections."""
        return bool(self._places)

    @property
    def port(self) -> int:
        """The number of the port, also where any was asked for."""
        bound: int = self._places[0].sockets[0].getsockname()[1]
        return bound

    async def take(self, one: socket.socket) -> None:
        """Listen on a socket that is bound already."""
        loop = asyncio.get_running_loop()
        self._places.append(await loop.create_server(self.connections, sock=one, backlog=BACKLOG))

    async def bind(self, host: str, port: int) -> None:
        """Listen at a host's port; 0 is any that is free. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._places.append(await loop.create_server(self.connections, host, port, backlog=BACKLOG))

    async def stop(self) -> None:
        """Take no more connections; those that were taken are begun."""
        places, self._places = self._places, []
        loop = asyncio.get_running_loop()
        for place in places:
            for one in place.sockets:
                loop.remove_reader(one)
        # A connection is begun in the turn after the one that took it; a closed server drops it.
        await asyncio.sleep(0)
        for place in places:
            place.close()

    async def close(self, seconds: float) -> None:
        """Stop, let what runs end within so many seconds, and cut off what does not."""
        await self.stop()
        # What came in before is to have begun.
        await asyncio.sleep(0)
        self.connections.pre_shutdown()
        await self.connections.shutdown(seconds)
