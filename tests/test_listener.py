"""A port that stops loses nobody: whom it took is served, the others are the next process's."""

import asyncio
import socket
from contextlib import closing

import pytest

from harperpy.listener import Listener


class Greeting(asyncio.Protocol):
    """Says that it has begun."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say it, and end."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"taken")
        transport.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_connection_is_served_or_left_in_the_socket(turns: int) -> None:
    """Whatever the loop had done with it when the port stopped."""
    with closing(socket.create_server(("127.0.0.1", 0))) as held:
        held.settimeout(0)
        listener = Listener(Greeting)  # type: ignore[arg-type]  # it asks of them no more than this
        await listener.take(held.dup())
        with closing(socket.create_connection(held.getsockname())) as client:
            client.settimeout(0)
            for _ in range(turns):
                await asyncio.sleep(0)

            await listener.stop()

            assert _left(held) or b"taken" == await _heard(client)


def _left(held: socket.socket) -> bool:
    try:
        held.accept()[0].close()
    except BlockingIOError:
        return False
    return True


async def _heard(client: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 10), 5)
