"""What a connection may cost: time for its heads, and bytes that nobody asked for."""

import asyncio
import contextlib
import gc
import logging
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvloop

from harperpy import (
    Body,
    EventStream,
    RequestTarget,
    Resource,
    Response,
    Scope,
    define_backend,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import HELLO, ask, ask_raw

pytestmark = pytest.mark.usefixtures("way")

SECONDS = 30
WHOLE = b"GET /it HTTP/1.1\r\nHost: test\r\n\r\n"
HALF = b"GET /it HTTP/1.1\r\nHost: te"


class It(Resource):
    """Answers."""

    public = True

    @staticmethod
    def get() -> str:
        """A word."""
        return "got"

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """How much was sent."""
        return len(await data.bytes())


def http(**keys: Any) -> str:
    """A config.yaml with these keys of `http`."""
    told = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return f"{ECHO}\nhttp: {{{told}}}"


@contextlib.asynccontextmanager
async def connected(
    server: RunningServer,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, its bytes written by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
    yield reader, writer
    writer.close()


async def answered(reader: asyncio.StreamReader) -> str:
    """One whole answer that has a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().partition("content-length: ")[2].split()[0])
    return head + (await reader.readexactly(length)).decode()


async def later(seconds: float) -> None:
    """Outlast a limit by the loop's clock."""
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, passed.set)
    await passed.wait()


# --- heads


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["the first head", "a later one"])
async def test_a_head_that_does_not_end_is_408(
    before: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """After `http.headersTimeout` its sender is told, and the connection is closed."""
    caplog.set_level(logging.INFO)
    async with (
        asyncio.timeout(SECONDS),
        running(http(headersTimeout="50ms"), resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        if before:
            writer.write(before)
            assert '"got"' in await answered(reader)
        writer.write(HALF)
        told = await answered(reader)
        assert b"" == await reader.read()

    assert told.startswith("HTTP/1.1 408 Request Timeout\r\n")
    assert '"status":408' in told
    assert "Server: harperpy\r\n" in told
    line = next(line for line in caplog.messages if "answered 408" in line)
    assert line.split()[0] in told


async def test_one_byte_after_the_other_buys_no_time(caplog: pytest.LogCaptureFixture) -> None:
    """The time is the head's, not that between its bytes."""
    caplog.set_level(logging.INFO)
    async with (
        asyncio.timeout(SECONDS),
        running(http(headersTimeout="100ms"), resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(HALF)
        closed = asyncio.create_task(reader.read())
        while not closed.done():
            writer.write(b"e")
            await asyncio.wait([closed], timeout=0.005)
        # Who writes on to a closed connection may lose what stood in it.
        await asyncio.gather(closed, return_exceptions=True)

    assert any("answered 408" in line for line in caplog.messages)


async def test_each_head_has_its_own_time() -> None:
    """Several at once, some of which end: only the others are refused."""
    async with (
        asyncio.timeout(SECONDS),
        running(http(headersTimeout="200ms"), resources={"it": It}) as server,
        connected(server) as (slow, slow_writer),
        connected(server) as (quick, quick_writer),
    ):
        slow_writer.write(HALF)
        quick_writer.write(HALF)
        assert 200 == (await ask(server, "GET", "/it")).status
        quick_writer.write(b"st\r\n\r\n")
        assert '"got"' in await answered(quick)
        assert b" 408 " in await slow.read()
        quick_writer.write(WHOLE)
        assert '"got"' in await answered(quick)


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["new", "kept"])
async def test_a_connection_without_a_request_is_closed(before: bytes) -> None:
    """After `http.keepAliveTimeout`, without a word: there is nothing to answer."""
    async with (
        asyncio.timeout(SECONDS),
        running(http(keepAliveTimeout="50ms"), resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        if before:
            writer.write(before)
            await answered(reader)
        assert b"" == await reader.read()


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["new", "kept"])
async def test_who_has_begun_is_not_idle(before: bytes) -> None:
    """A head has the time of `http.headersTimeout` (0: any), however short the other is."""
    config = http(keepAliveTimeout="50ms", headersTimeout=0)
    async with (
        asyncio.timeout(SECONDS),
        running(config, resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        if before:
            writer.write(before)
            await answered(reader)
        writer.write(HALF)
        await later(0.15)
        writer.write(b"st\r\n\r\n")
        assert '"got"' in await answered(reader)
        assert b"" == await reader.read()


async def test_a_body_is_no_head() -> None:
    """It may take longer than a head may."""
    head = b"POST /it HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n"
    async with (
        asyncio.timeout(SECONDS),
        running(http(headersTimeout="30ms"), resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(head + b"ab")
        await later(0.1)
        writer.write(b"cd")
        assert (await answered(reader)).endswith("\r\n\r\n4")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (f"X-Long: {'a' * 900}", 200),
        (f"X-Long: {'a' * 1500}", 431),
        (f"X-{'a' * 1500}: 1", 431),
    ],
)
async def test_a_header_has_a_size(line: str, status: int) -> None:
    """`http.maxHeaderSize` bounds each header, and the request line."""
    async with running(http(maxHeaderSize=1000), resources={"it": It}) as server:
        answer = await ask_raw(server, f"GET /it HTTP/1.1\r\nHost: test\r\n{line}\r\n\r\n")
        long = await ask_raw(server, f"GET /{'a' * 1500} HTTP/1.1\r\nHost: test\r\n\r\n")

    assert (status, 414) == (answer.status, long.status)


async def test_a_head_that_goes_on_and_on_is_431() -> None:
    """What is held of one that is not whole is four times `http.maxHeaderSize` at most."""
    lines = b"".join(b"X-%d: %s\r\n" % (at, b"a" * 900) for at in range(5))
    async with (
        asyncio.timeout(SECONDS),
        running(http(maxHeaderSize=1000), resources={"it": It}) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(HALF + b"st\r\n" + lines)
        told = await answered(reader)
        assert b"" == await reader.read()

    assert told.startswith("HTTP/1.1 431 Request Header Fields Too Large\r\n")


# --- bodies


class Closed(Resource):
    """Nobody may, so nobody reads a body."""

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """Never called."""
        return len(await data.bytes())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_refused_body_in_a_wrong_encoding_is_no_error_of_ours(
    encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody can send one: nobody reads it, and the connection goes on."""
    caplog.set_level(logging.DEBUG)
    head = f"POST /it HTTP/1.1\r\nHost: test\r\nContent-Encoding: {encoding}\r\n"
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": Closed}) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(f"{head}Content-Length: 8\r\n\r\n".encode())
        assert " 401 " in await answered(reader)
        writer.write(b"no such!" + f"{head}Content-Length: 0\r\n\r\n".encode())
        assert " 401 " in await answered(reader)

    traced = [record for record in caplog.records if record.exc_info and record.name != "asyncio"]
    assert [] == traced
    assert [] == [record for record in caplog.records if record.levelno >= logging.ERROR]


class Progress(Resource):
    """Answers before it reads."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> AsyncIterator[str]:
        """Two items."""
        yield "begun"
        yield await data.text()


async def test_nobody_is_told_to_continue_after_an_answer_has_begun() -> None:
    """That would be a part of its body; what is sent is read all the same."""
    head = b"POST /it HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": Progress}) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
        told = await reader.readuntil(b"begun")
        writer.write(b"body")
        told += await reader.readuntil(b"0\r\n\r\n")

    assert b'8\r\n["begun"\r\n7\r\n,"body"\r\n1\r\n]\r\n0\r\n\r\n' == told


def unread(server: RunningServer, request: bytes) -> socket.socket:
    """A connection whose client reads nothing."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made.connect(("127.0.0.1", server.server.http_port))
    made.sendall(request)
    made.setblocking(False)  # noqa: FBT003
    return made


async def still(server: RunningServer, count: Callable[[], int]) -> int:
    """What a count comes to once it rises no more."""
    before = -1
    while before != count():
        before = count()
        for _ in range(5):
            assert 200 == (await ask(server, "GET", "/v1/models")).status
    return before


async def held_until_still(server: RunningServer, count: Callable[[], int]) -> int:
    """How many bytes of memory have been taken by the time that a count rises no more."""
    tracemalloc.start()
    try:
        await still(server, count)
        # What the clients that asked meanwhile have left is not held.
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held


class Sender:
    """Sends the same bytes again and again for as long as they are taken."""

    def __init__(self, connection: socket.socket, data: bytes) -> None:
        self.sent = 0
        self._connection = connection
        self._data = data

    def count(self) -> int:
        """How many bytes were taken until now."""
        try:
            while True:
                rest = memoryview(self._data)[self.sent % len(self._data) :]
                self.sent += self._connection.send(rest)
        except BlockingIOError:
            return self.sent


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"POST /it HTTP/1.1\r\nHost: test\r\nContent-Length: 9000000000\r\n\r\n", b"x" * 65536),
        (
            b"POST /it HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"10000\r\n" + b"x" * 65536 + b"\r\n",
        ),
        (WHOLE, WHOLE * 1000),
    ],
    ids=["a body", "a chunked body", "pipelined requests"],
)
async def test_what_nobody_awaits_is_not_taken(head: bytes, more: bytes) -> None:
    """While a handler runs that reads no body, its client can send no more than buffers hold."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        entered.set()
        await leave.wait()

    body: dict[str, Any] = {"get": staticmethod(stay), "post": staticmethod(stay), "public": True}
    mounts = {"it": type("Staying", (Resource,), body)}
    async with asyncio.timeout(SECONDS), running(http(timeout=0), resources=mounts) as server:
        with unread(server, head) as connection:
            await entered.wait()
            sender = Sender(connection, more)
            held = await held_until_still(server, sender.count)
        leave.set()

    assert sender.sent < 16 * 1024 * 1024
    assert held < 1024 * 1024


async def test_what_nobody_reads_is_not_made() -> None:
    """Who asks again and again and reads no answer is given no more of them than buffers hold."""
    made: list[str] = []

    def make() -> str:
        made.append("")
        return "x" * 200_000

    body: dict[str, Any] = {"get": staticmethod(make), "public": True}
    mounts = {"it": type("Made", (Resource,), body)}
    async with asyncio.timeout(SECONDS), running(resources=mounts) as server:
        with unread(server, WHOLE) as connection:
            sender = Sender(connection, WHOLE * 1000)
            held = await held_until_still(server, sender.count)

    assert 0 < len(made) < 50
    assert held < 2 * 1024 * 1024


# --- streams

SIZE = 64 * 1024


class Source:
    """Items without end, and how many were asked for."""

    def __init__(self) -> None:
        self.made = 0

    async def items(self) -> AsyncIterator[str]:
        """Each one is a string of its own."""
        while True:
            self.made += 1
            yield f"{self.made:06}" + "x" * SIZE

    def mount(self, kind: str) -> type[Resource]:
        """A public resource that streams them."""

        def get() -> Any:
            match kind:
                case "events":
                    return EventStream(self.items())
                case "raw":
                    return Response(200, body=self.items())
                case _:
                    return self.items()

        return type("Streaming", (Resource,), {"get": staticmethod(get), "public": True})


def request(server: RunningServer, kind: str) -> bytes:
    """What asks for a stream of a kind."""
    if kind == "gateway":
        body = '{"model":"m","stream":true,"messages":[{"role":"user","content":"a"}]}'
        lines = ["POST /v1/chat/completions HTTP/1.1", f"Content-Length: {len(body)}"]
    else:
        accept = "application/x-ndjson" if kind == "ndjson" else "application/json"
        body, lines = "", ["GET /it HTTP/1.1", f"Accept: {accept}"]
    lines += ["Host: test", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {server.api_key}", "", body]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("kind", ["events", "ndjson", "json", "raw", "gateway"])
async def test_a_stream_that_nobody_reads_holds_little(kind: str) -> None:
    """Its producer is asked for no more, and what it has made is at most 512 KiB of memory."""
    source = Source()

    def apply(scope: Scope) -> None:
        backend = define_backend("m", generate_stream=source.items)
        scope.models.register_backend("generative", "m", backend)

    mounts = {"it": source.mount(kind)}
    async with (
        asyncio.timeout(SECONDS),
        running(ECHO, resources=mounts, handle_application=apply) as server,
    ):
        assert 200 == (await ask(server, "GET", "/v1/models")).status
        # What the first one makes for all is none of the next one's, nor is what counts the lines.
        with unread(server, request(server, kind)):
            first = await still(server, lambda: source.made)
        tracemalloc.start()
        try:
            with unread(server, request(server, kind)):
                made = await still(server, lambda: source.made) - first
                # What the clients that asked meanwhile have left is not held.
                gc.collect()
                held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert made
    assert held < 512 * 1024


HUGE = 16 * 1024 * 1024


def huge() -> str:
    """A string of its own."""
    return "".join(["x" * (HUGE // 2), "y" * (HUGE // 2)])


def one(value: Any) -> Iterator[Any]:
    """A stream of it alone."""
    yield value


@pytest.mark.parametrize(
    "make",
    [
        lambda: EventStream([huge()]),
        lambda: Response(200, body=one(huge())),
        lambda: one(huge()),
        huge,
        lambda: {"text": huge()},
    ],
    ids=["an event", "raw", "json items", "a text", "json"],
)
async def test_a_huge_item_is_not_copied_many_times(make: Callable[[], Any]) -> None:
    """The item, its bytes, and two of what waits to be sent: asyncio's own loop has both."""
    body: dict[str, Any] = {"get": staticmethod(make), "public": True}
    mounts = {"it": type("Huge", (Resource,), body)}
    async with asyncio.timeout(SECONDS), running(resources=mounts) as server:
        assert 200 == (await ask(server, "GET", "/v1/models")).status
        tracemalloc.start()
        try:
            with unread(server, request(server, "it")):
                peaks: list[int] = []
                for _ in range(10):
                    assert 200 == (await ask(server, "GET", "/v1/models")).status
                    peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    assert HUGE < peaks[-1] < 4.5 * HUGE


class Flood:
    """Items that wait for nothing, and how many were asked for: no end of them is in sight."""

    MOST = 20_000

    def __init__(self) -> None:
        self.made = 0
        self.ended = asyncio.Event()

    def raw(self) -> Iterator[str]:
        """As what is sent as it is."""
        try:
            while self.made < self.MOST:
                self.made += 1
                yield "x" * 1000
        finally:
            self.ended.set()

    async def items(self) -> AsyncIterator[str]:
        """As events, and what a model says."""
        for item in self.raw():
            yield item

    async def stubborn(self) -> AsyncIterator[str]:
        """As events of what takes no notice when it is cancelled."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for item in self.raw():
            yield item

    def mount(self, kind: str) -> type[Resource]:
        """A public resource that streams them."""

        def get() -> Any:
            if kind == "raw":
                return Response(200, body=self.raw())
            return EventStream(self.stubborn() if kind == "stubborn" else self.items())

        return type("Flooding", (Resource,), {"get": staticmethod(get), "public": True})


@pytest.mark.parametrize("loops", [asyncio, uvloop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["events", "stubborn", "raw", "gateway"])
def test_for_who_asks_and_leaves_next_to_nothing_is_made(kind: str, loops: Any) -> None:
    """Not even by what never waits, and so never lets the loop say that nobody is there."""

    async def leave() -> int:
        flood = Flood()

        def apply(scope: Scope) -> None:
            backend = define_backend("m", generate_stream=flood.items)
            scope.models.register_backend("generative", "m", backend)

        mounts = {"it": flood.mount(kind)}
        async with (
            asyncio.timeout(SECONDS),
            running(ECHO, resources=mounts, handle_application=apply) as server,
        ):
            # From then on nothing is to be waited for to know who asks, and what they may.
            hello = {**HELLO, "model": "default"}
            assert 200 == (await ask(server, "POST", "/v1/chat/completions", json=hello)).status
            with socket.create_connection(("127.0.0.1", server.server.http_port)) as made:
                made.sendall(request(server, kind))
            await flood.ended.wait()
        return flood.made

    with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
        assert 0 < runner.run(leave()) < 1000
