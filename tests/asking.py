"""Requests without end against a running command, and what tests see of it meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from commands import SECONDS, Serving, until


def put(file: Path, text: str) -> None:
    """Write a file at once, as editors do."""
    made = file.with_suffix(".new")
    made.write_text(text)
    made.replace(file)


async def restarted(server: Serving) -> str:
    """The line of the next restart."""
    printed = await until(server.process, "restarted: ")
    return printed.splitlines()[-1]


async def logged(folder: Path, text: str, times: int = 1) -> str:
    """The log, once a text stands in it so often."""
    async with asyncio.timeout(SECONDS):
        while (log := (folder / "log").read_text()).count(text) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return log


def children(pid: int) -> list[str]:
    """The processes that a process started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def exchange(url: str) -> str:
    """A GET on a connection of its own: status and body. Unlike aiohttp's it is never repeated."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection("127.0.0.1", where.port)
    try:
        head = f"GET {where.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    status, _, body = answer.partition("\r\n\r\n")
    return f"{status[9:12]} {body}".strip() or "nothing"


class Loop:
    """Requests without end, each on a connection of its own; what was answered, and what failed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failed: list[str] = []
        self.answers: dict[str, int] = {}
        self.longest = 0.0
        self._heard = asyncio.Condition()

    async def run(self) -> None:
        """Ask, and ask again."""
        while True:
            began = time.monotonic()
            try:
                answer = await exchange(self.url)
            except OSError as error:
                self.failed.append(repr(error))
                continue
            self.longest = max(self.longest, time.monotonic() - began)
            async with self._heard:
                self.answers[answer] = self.answers.get(answer, 0) + 1
                self._heard.notify_all()

    async def heard(self, answer: str) -> None:
        """Return when this was answered."""
        await self.until(lambda answers: answer in answers)

    async def until(self, enough: Callable[[dict[str, int]], bool]) -> None:
        """Return when what was answered so far is enough."""
        async with asyncio.timeout(SECONDS), self._heard:
            await self._heard.wait_for(lambda: enough(self.answers))


@asynccontextmanager
async def asking(url: str, clients: int = 4) -> AsyncIterator[Loop]:
    """A loop of several clients while the block runs."""
    loop = Loop(url)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop.run()) for _ in range(clients)]
        yield loop
        for task in tasks:
            task.cancel()
