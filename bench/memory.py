"""How much memory a server takes for connections that do little, or nothing at all."""

import asyncio
import socket
import time
from contextlib import ExitStack
from typing import NamedTuple, cast

from load import Streams, Tally, connect, request, run_async
from machine import family, memory_kib
from scenarios import SLOW, STUCK, Scenario
from servers import Target

# The kernel's own for a connection, small: what a client does not read stays the server's.
RECEIVE_BUFFER = 65_536


class Taken(NamedTuple):
    """A server's memory before, what each connection took of it, and took in the second half."""

    before_mib: float
    kib: float
    later_kib: float = 0.0


def idle(target: Target, connections: int) -> Taken:
    """Connections that have asked once and stay open."""
    asked = request(target, Scenario("idle", connections))
    pids = family(target.pid)
    before = memory_kib(pids)
    with ExitStack() as opened:
        clients = [_open(target, opened) for _ in range(connections)]
        for client in clients:
            client.sendall(asked)
        for client in clients:
            client.recv(65_536)
        time.sleep(0.5)
        after = memory_kib(pids)
    return Taken(before / 1024, (after - before) / connections)


def slow(target: Target, connections: int, seconds: float) -> Taken:
    """Streams of ten events a second."""
    asked = request(target, SLOW)
    pids = family(target.pid)
    before, during = memory_kib(pids), 0
    tally = Tally(connections, time.perf_counter() + 600)

    async def drive() -> None:
        nonlocal during
        clients = await connect(target.port, lambda: Streams(asked, tally), tally, pause=0.001)
        await asyncio.sleep(seconds)
        during = memory_kib(pids)
        for client in clients:
            cast("Streams", client).transport.abort()

    run_async(drive())
    return Taken(before / 1024, (during - before) / connections)


def stuck(target: Target, connections: int, seconds: float) -> Taken:
    """Streams of many megabytes that nobody reads."""
    asked = request(target, STUCK)
    pids = family(target.pid)
    before = memory_kib(pids)
    with ExitStack() as opened:
        for _ in range(connections):
            _open(target, opened).sendall(asked)
        time.sleep(seconds / 2)
        half = memory_kib(pids)
        time.sleep(seconds / 2)
        after = memory_kib(pids)
    return Taken(before / 1024, (after - before) / connections, (after - half) / connections)


def _open(target: Target, opened: ExitStack) -> socket.socket:
    client = opened.enter_context(socket.socket())
    client.settimeout(10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    client.connect(("127.0.0.1", target.port))
    return client
