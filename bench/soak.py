"""Everything at once for minutes, and whether the server's memory stays where it was.

    python bench/soak.py                 ten minutes
    python bench/soak.py --minutes 1     a look

Chats, embeddings, streams, streams that are left, streams that nobody reads, and what is refused
come on connections that come and go. Clients pause between their calls: it is a day's load, not the
most there can be.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from load import LAST_CHUNK, request, run_async
from machine import LOAD_CPUS, busy_ns, cpu_ns, family, memory_kib
from memory import RECEIVE_BUFFER
from report import Figure, tables
from run import interrupt, tell
from scenarios import CHAT, SPEED, STREAM, STUCK, Scenario
from servers import Servers, Target, harperpy

# The memory of the second of ten minutes is what the end is compared with.
FIRST_PART = 0.2
# So long a part is looked at, since any one moment has its own streams.
LOOK_PART = 0.05
SAMPLE_SECONDS = 0.5
CALLS_BY_CONNECTION = 50
STUCK_SECONDS = 5.0
WANTED = 1.05

MODELS, EMBED_ONE, EMBED_MANY = SPEED[0], SPEED[4], SPEED[5]
SLOW_STREAM = Scenario("slow", 0, "mock-t40-r20", stream=True)
LEFT = Scenario("left", 0, "mock-t4000-r100", stream=True)


class Kind(NamedTuple):
    """What so many clients ask, how it is answered, and how long they pause in between."""

    name: str
    clients: int
    pause: float
    asked: Callable[[Target, int], bytes]
    status: int = 200


def same(scenario: Scenario) -> Callable[[Target, int], bytes]:
    """A request that is always the same."""
    return lambda target, _number: request(target, scenario)


def elsewhere(target: Target, number: int) -> bytes:
    """A path that does not exist, another one each time."""
    return request(target, MODELS).replace(b"/v1/models", b"/nothing/%d" % number)


def stranger(target: Target, number: int) -> bytes:
    """A chat with a key that nobody has, another one each time."""
    name = {"Authorization": f"Bearer hk_nobody{number}"}
    return request(Target(target.port, target.pid, target.upstream, name), CHAT)


def broken(target: Target, _number: int) -> bytes:
    """A chat whose body is no JSON."""
    return request(target, CHAT).replace(b'"model"', b"'model'")


KINDS = (
    Kind("models", 2, 0.05, same(MODELS)),
    Kind("chats", 16, 0.05, same(CHAT)),
    Kind("one embedded", 4, 0.05, same(EMBED_ONE)),
    Kind("a hundred embedded", 1, 0.1, same(EMBED_MANY)),
    Kind("streams", 8, 0.1, same(STREAM)),
    Kind("slow streams", 50, 0.1, same(SLOW_STREAM)),
    Kind("unknown paths", 2, 0.1, elsewhere, 404),
    Kind("unknown keys", 2, 0.1, stranger, 401),
    Kind("broken bodies", 2, 0.1, broken, 400),
)
LEAVERS, STUCK_READERS = 4, 4


class Soak:
    """All clients, until it is over; what was answered otherwise than expected is told."""

    def __init__(self, target: Target, seconds: float) -> None:
        self._target = target
        self._until = time.monotonic() + seconds
        self._chance = random.Random(7)  # noqa: S311  # no secret
        self.done = Counter[str]()
        self.wrong = Counter[str]()

    @property
    def on(self) -> bool:
        """Whether it goes on."""
        return time.monotonic() < self._until

    async def run(self) -> None:
        """Everything at once."""
        works = [self._calls(kind) for kind in KINDS for _ in range(kind.clients)]
        works += [self._leave() for _ in range(LEAVERS)]
        works += [self._stick() for _ in range(STUCK_READERS)]
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)

    def _pause(self, seconds: float) -> Coroutine[Any, Any, None]:
        return asyncio.sleep(self._chance.uniform(0, 2 * seconds))

    async def _calls(self, kind: Kind) -> None:
        """One call after the other, on a new connection now and then."""
        while self.on:
            reader, writer = await self._connect()
            for _ in range(CALLS_BY_CONNECTION):
                if not self.on:
                    break
                number = self.done[kind.name] = self.done[kind.name] + 1
                writer.write(kind.asked(self._target, number))
                if (status := await answered(reader)) != kind.status:
                    self.wrong[f"{kind.name}: {status}"] += 1
                await self._pause(kind.pause)
            writer.close()

    async def _leave(self) -> None:
        """Streams whose client goes before they end."""
        while self.on:
            reader, writer = await self._connect()
            writer.write(request(self._target, LEFT))
            await reader.readuntil(b"data: ")
            await self._pause(0.2)
            writer.transport.abort()
            self.done["left streams"] += 1

    async def _stick(self) -> None:
        """Streams of many megabytes that nobody reads."""
        while self.on:
            _reader, writer = await self._connect(RECEIVE_BUFFER)
            writer.write(request(self._target, STUCK))
            await self._pause(STUCK_SECONDS)
            writer.transport.abort()
            self.done["stuck readers"] += 1

    async def _connect(
        self, buffer: int | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        client = socket.socket()
        client.settimeout(0)
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        where = ("127.0.0.1", self._target.port)
        await asyncio.get_running_loop().sock_connect(client, where)
        return await asyncio.open_connection(sock=client, limit=buffer or 2**22)


async def answered(reader: asyncio.StreamReader) -> int:
    """The status of an answer that has come to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    at = head.find(b"content-length:")
    if at >= 0:
        await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
    else:
        await reader.readuntil(LAST_CHUNK)
    return int(head[9:12])


async def watch(soak: Soak, pids: list[int], found: list[int]) -> None:
    """The server's memory, again and again."""
    while soak.on:
        found.append(memory_kib(pids))
        await asyncio.sleep(SAMPLE_SECONDS)


def soaked(target: Target, seconds: float) -> tuple[Soak, list[int], str]:
    """What was done, the server's memory meanwhile, and how busy it and others were."""
    soak, found, pids = Soak(target, seconds), list[int](), family(target.pid)

    async def drive() -> None:
        watching = asyncio.ensure_future(watch(soak, pids, found))
        await soak.run()
        await watching

    began, cpu, busy = time.monotonic(), cpu_ns(pids), busy_ns()
    run_async(drive())
    wall = (time.monotonic() - began) * 1e9
    ours, all_ = (cpu_ns(pids) - cpu) / wall, (busy_ns() - busy) / wall
    return soak, found, f"the server used {ours:.2f} of the {all_:.2f} busy processors"


def told(soak: Soak, found: list[int], minutes: float) -> tuple[str, bool]:
    """The tables, and whether the memory stayed where it was."""
    first, look = round(len(found) * FIRST_PART), max(1, round(len(found) * LOOK_PART))
    before = [kib / 1024 for kib in found[first : first + look]]
    after = [kib / 1024 for kib in found[-look:]]
    middle = statistics.median(before)
    figure = Figure("memory at the end", [mib / middle for mib in after], "of the first", WANTED)
    lines = [f"- {count:,} {name}" for name, count in soak.done.items()]
    lines.append(
        f"- memory at minute {minutes * FIRST_PART:g} {middle:.1f} MiB, "
        f"at minute {minutes:g} {statistics.median(after):.1f} MiB"
    )
    stayed = statistics.median(figure.values) <= WANTED
    return "\n".join([*lines, "", tables([], [figure], [])]), stayed


def main() -> int:
    """Soak a server; the exit code."""
    parser = argparse.ArgumentParser(description="Mixed load for minutes, and memory's way.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=29700, help="the first one; free ones follow")
    parser.add_argument("--samples", type=Path, help="write the memory's course here, in KiB")
    given = parser.parse_args()
    os.sched_setaffinity(0, LOAD_CPUS)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Servers(given.port) as servers:
            tell(f"This takes {given.minutes:g} minutes")
            soak, found, how = soaked(harperpy(servers), given.minutes * 60)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if given.samples:
        given.samples.write_text("\n".join(map(str, found)), encoding="utf-8")
    shown, stayed = told(soak, found, given.minutes)
    print(f"- {how}\n{shown}")
    for what, times in soak.wrong.items():
        tell(f"{what}, {times} times")
    return 0 if stayed and not soak.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
