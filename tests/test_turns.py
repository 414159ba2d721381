"""The queue in front of llama.cpp's slots, which all processes that share a child stand in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from harperpy.plugins.llama_worker import Turns


class Served:
    """What stands for llama.cpp: it tells who came, and answers when it is let."""

    def __init__(self) -> None:
        self.came = asyncio.Queue[bytes]()
        self.left = asyncio.Queue[bytes]()
        self.may_answer = asyncio.Event()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: its line comes back, unless whoever sent it leaves before."""
        line = await reader.readline()
        self.came.put_nowait(line)
        answering = asyncio.create_task(self._answer(line, writer))
        await reader.read()
        answering.cancel()
        self.left.put_nowait(line)
        writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        await self.may_answer.wait()
        writer.write(line)
        writer.close()


@asynccontextmanager
async def listening(handle: Any) -> AsyncIterator[str]:
    """The address of a server on a free port, whose connections end with it."""
    tasks = set[Any]()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def call(address: str, line: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with a line sent on it."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(line)
    return reader, writer


async def test_who_leaves_the_queue_never_takes_a_slot() -> None:
    """One at a time is served; who left while waiting is passed over, who leaves in it frees it."""
    served = Served()
    async with (
        asyncio.timeout(20),
        listening(served.take) as llama,
        listening(Turns(llama, slots=1).take) as turns,
    ):
        _, first = await call(turns, b"first\n")
        assert b"first\n" == await served.came.get()
        gone, second = await call(turns, b"second\n")
        second.write_eof()
        assert b"" == await gone.read()
        reader, third = await call(turns, b"third\n")
        assert served.came.empty()
        first.close()
        assert b"first\n" == await served.left.get()
        assert b"third\n" == await served.came.get()
        served.may_answer.set()
        assert b"third\n" == await reader.read()
        for writer in (first, second, third):
            writer.close()


async def test_who_says_nothing_takes_no_slot() -> None:
    """A connection that brings no request keeps nobody from being served."""
    served = Served()
    served.may_answer.set()
    async with (
        asyncio.timeout(20),
        listening(served.take) as llama,
        listening(Turns(llama, slots=1).take) as turns,
    ):
        _, idle = await call(turns, b"")
        reader, second = await call(turns, b"second\n")
        assert b"second\n" == await reader.read()
        for writer in (idle, second):
            writer.close()


async def ping(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What stands for a llama.cpp that comes to no end: its server says that it is there."""
    with suppress(ConnectionError):
        while True:
            writer.write(b"3\r\n:\n\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)


async def test_who_answers_nobody_is_stuck() -> None:
    """It shows while somebody waits, pings or not; not where nobody asks, or all are answered."""
    silent, lively = Served(), Served()
    lively.may_answer.set()
    async with (
        asyncio.timeout(20),
        listening(silent.take) as silence,
        listening(ping) as pings,
        listening(lively.take) as life,
        AsyncExitStack() as stack,
    ):
        queues = [Turns(address, slots=1) for address in (silence, pings, life, silence)]
        looks = [asyncio.create_task(queue.stuck(0.2)) for queue in queues]
        addresses = [await stack.enter_async_context(listening(one.take)) for one in queues]
        callers = [await call(address, b"a line\n") for address in addresses[:3]]
        assert b"a line\n" == await callers[2][0].read()
        await asyncio.gather(*looks[:2])
        await queues[0].stuck(0.2)
        assert [False, False] == [look.done() for look in looks[2:]]
        for look in looks[2:]:
            look.cancel()
        for _, writer in callers:
            writer.close()
