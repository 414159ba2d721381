"""Streams: their type, their head, their errors, who steps and closes them; OpenAI's chunks."""

import asyncio
import json
import re
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Self

import aiohttp
import pytest

from harperpy import (
    SSE,
    BackendError,
    ClientError,
    Context,
    EventStream,
    GenerateChunk,
    HarperError,
    Request,
    RequestTarget,
    Resource,
    Response,
    ServiceUnavailable,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
    encode_sse,
    get_context,
    json_response,
    openai_stream,
)
from harperpy.testing import ECHO, running
from helpers import Answered, ask, events

SECONDS = 20
KEEPALIVE = b": keepalive\n\n"
ACCEPTS = [None, "*/*", "application/json", "application/x-ndjson", "text/plain", "image/png"]


def serving(make: Callable[[], Any], **attributes: Any) -> type[Resource]:
    """A class whose get returns what this makes."""
    return type("Serving", (Resource,), {"get": staticmethod(make), **attributes})


async def served(make: Callable[[], Any], accept: str | None = None, **attributes: Any) -> Answered:
    """What the client gets of a verb that returns this."""
    headers = {"Accept": accept} if accept else {}
    async with running(resources={"it": serving(make, **attributes)}) as server:
        return await ask(server, "GET", "/it", headers=headers)


async def async_items(items: Iterable[Any]) -> AsyncIterator[Any]:
    """The items, one a turn; an exception among them is raised."""
    for item in items:
        await asyncio.sleep(0)
        if isinstance(item, Exception):
            raise item
        yield item


def sync_items(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an exception among them is raised."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


BROKEN = ClientError("No more.", code="no_more")
BOTH = pytest.mark.parametrize("source", [async_items, sync_items])
Source = Callable[[Iterable[Any]], Any]


# --- the type


@BOTH
@pytest.mark.parametrize("accept", ACCEPTS)
async def test_a_first_sse_message_makes_it_an_event_stream(
    source: Source, accept: str | None
) -> None:
    """Whatever `Accept` says, a handler that yields `SSE` is answered as events."""
    answer = await served(lambda: source([SSE(data="a"), SSE(event="e", data={"b": 1})]), accept)

    assert 200 == answer.status
    assert "text/event-stream" == answer.headers["Content-Type"]
    assert 'data: a\n\nevent: e\ndata: {"b":1}\n\n' == answer.text


@BOTH
@pytest.mark.parametrize("accept", ACCEPTS)
async def test_an_event_stream_is_one_whatever_the_client_accepts(
    source: Source, accept: str | None
) -> None:
    """`EventStream` says so itself, for any items; no proxy may keep or gather it."""
    stream = EventStream(source(["a", {"b": 1}]), {"X-Own": "1", "Cache-Control": "no-store"})

    answer = await served(lambda: stream, accept)

    assert 'data: a\n\ndata: {"b":1}\n\n' == answer.text
    expected = {
        "Content-Type": "text/event-stream",
        "X-Own": "1",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
    }
    assert expected == {name: answer.headers[name] for name in expected}


@BOTH
@pytest.mark.parametrize(
    ("accept", "items", "media", "text"),
    [
        (None, [1, "a", None], "application/json", '[1,"a",null]'),
        ("application/json", [{"a": 1}], "application/json", '[{"a":1}]'),
        ("application/json", [], "application/json", "[]"),
        ("application/x-ndjson", [1, "a"], "application/x-ndjson", '1\n"a"\n'),
        ("application/x-ndjson", [], "application/x-ndjson", ""),
        ("text/plain", ["a", "ß", 1], "text/plain", "aß1"),
        ("text/event-stream", ["a", None, 1], "text/event-stream", "data: a\n\ndata: 1\n\n"),
        ("text/event-stream", [], "text/event-stream", ""),
        ("application/json, text/event-stream", ["a"], "application/json", '["a"]'),
    ],
)
async def test_any_other_iterator_is_sent_as_negotiated(
    source: Source, accept: str | None, items: list[Any], media: str, text: str
) -> None:
    """A JSON array, lines of JSON, text or events: what the client accepts, from the first item."""
    answer = await served(lambda: source(items), accept)

    assert (200, media, text) == (answer.status, answer.headers["Content-Type"], answer.text)


async def test_an_iterator_that_the_client_cannot_read_is_406() -> None:
    """Only events go to who does not accept them; a generator of anything else is closed."""
    closed: list[bool] = []

    async def items() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(True)

    answer = await served(items, "image/png")

    assert (406, [True]) == (answer.status, closed)


@BOTH
@pytest.mark.parametrize("media", ["text/html", "text/event-stream", None])
async def test_a_responses_iterator_is_written_as_it_is(source: Source, media: str | None) -> None:
    """Text and bytes of `Response(body=…)` go out untouched, with its status and type."""
    headers = {"content-type": media} if media else {}

    answer = await served(lambda: Response(202, headers, body=source(["data: ß\n", b"\n"])))

    assert (202, "data: ß\n\n") == (answer.status, answer.text)
    assert (media or "application/octet-stream") == answer.headers["Content-Type"]


async def test_items_arrive_as_they_are_made() -> None:
    """Each item is with the client before the next one is asked for."""
    go_on = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        for letter in "abc":
            yield letter
            await go_on.wait()
            go_on.clear()

    resources = {"it": serving(lambda: EventStream(items()))}
    async with (
        asyncio.timeout(SECONDS),
        running(resources=resources) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        for letter in "abc":
            assert f"data: {letter}\n\n".encode() == await response.content.readuntil(b"\n\n")
            go_on.set()
        assert b"" == await response.content.read()


# --- the head


def failing(error: Exception) -> dict[str, Callable[[], Any]]:
    """The kinds of streams that fail before their first item."""
    return {
        "async generator": lambda: async_items([error]),
        "generator": lambda: sync_items([error]),
        "event stream": lambda: EventStream(async_items([error])),
        "response": lambda: Response(200, body=async_items([error])),
        "chunks": lambda: openai_stream(async_items([error]), model="m"),
    }


@pytest.mark.parametrize("accept", ACCEPTS)
@pytest.mark.parametrize("kind", failing(ClientError()))
async def test_an_error_before_the_first_item_keeps_its_status(
    kind: str, accept: str | None
) -> None:
    """The head waits for the first item: a refusal instead of it is an answer like any other."""
    error = ClientError("Slow down.", status=429, headers={"Retry-After": "7"})

    answer = await served(failing(error)[kind], accept)

    assert (429, "7") == (answer.status, answer.headers["Retry-After"])
    assert "Slow down." == answer.json["detail"]


async def test_an_unforeseen_error_before_the_first_item_is_500_and_tells_nothing() -> None:
    """The resource's own wording is asked, with none of the error's text."""

    def told(error: HarperError, _: Context) -> Response:
        return json_response(error.status, [error.public_message])

    make = failing(ValueError("swordfish"))["event stream"]
    answer = await served(make, present_error=staticmethod(told))

    assert 500 == answer.status
    assert ["The server had an error while processing the request."] == answer.json


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_the_first_step_may_still_set_the_head(accept: str) -> None:
    """Status and headers that a generator sets before its first item are sent with it."""

    async def items() -> AsyncIterator[str]:
        context = get_context()
        context.status = 206
        context.response_headers["X-Made"] = "in time"
        yield "a"
        context.response_headers["X-Late"] = "too late"

    answer = await served(items, accept)

    assert (206, "in time") == (answer.status, answer.headers["X-Made"])
    assert "X-Late" not in answer.headers


CORS = "http: {cors: true, corsAccessList: ['https://page.example']}"


async def test_the_head_does_not_wait_longer_than_it_is_told_to() -> None:
    """After `first_item_wait` the head of an event stream goes out, whole, with a first comment."""
    go_on = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        get_context().response_headers["X-Made"] = "in time"
        await go_on.wait()
        yield "late"

    resources = {"it": serving(lambda: EventStream(items()), first_item_wait=0.01, keepalive=600)}
    headers = {"Origin": "https://page.example", "X-Request-Id": "mine"}
    async with (
        asyncio.timeout(SECONDS),
        running(CORS, resources=resources) as server,
        server.session() as client,
        client.get("/it", headers=headers) as response,
    ):
        assert KEEPALIVE == await response.content.readuntil(b"\n\n")
        go_on.set()
        assert b"data: late\n\n" == await response.content.read()

    expected = {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
        "Server": "harperpy",
        "X-Made": "in time",
        "X-Request-Id": "mine",
        "Access-Control-Allow-Origin": "https://page.example",
        "Vary": "Authorization, Origin",
    }
    assert 200 == response.status
    assert expected == {name: response.headers.get(name) for name in expected}


@pytest.mark.parametrize("faulty", [False, True])
async def test_an_error_after_an_early_head_comes_in_band(faulty: bool) -> None:  # noqa: FBT001
    """The status is gone by then: the stream ends with the error, even if its wording fails."""
    go_on = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        await go_on.wait()
        raise BROKEN
        yield "never"

    own = {"present_stream_error": staticmethod(lambda *_: 1 / 0)} if faulty else {}
    make = serving(lambda: EventStream(items()), first_item_wait=0.01, keepalive=600, **own)
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": make}) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        assert KEEPALIVE == await response.content.readuntil(b"\n\n")
        go_on.set()
        event, data, *_ = (await response.text()).split("\n")

    assert 200 == response.status
    assert "event: harper-error" == event
    assert "no_more" == json.loads(data.removeprefix("data: "))["code"]


async def test_silence_is_filled_with_comments() -> None:
    """After `keepalive` seconds without an event a comment is sent, between events only."""
    go_on = asyncio.Event()

    async def items() -> AsyncIterator[SSE]:
        yield SSE(data="a")
        await go_on.wait()
        yield SSE(data="b")

    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": serving(items, keepalive=0.01)}) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        assert b"data: a\n\n" == await response.content.readuntil(b"\n\n")
        for _ in range(3):
            assert KEEPALIVE == await response.content.readuntil(b"\n\n")
        go_on.set()
        rest = await response.content.read()

    assert b"data: b\n\n" == rest.replace(KEEPALIVE, b"")


@pytest.mark.parametrize("wait", [60.0, 0.0])
@pytest.mark.parametrize("length", [None, "12"])
async def test_bytes_that_are_sent_as_they_are_know_no_comments(
    length: str | None, wait: float
) -> None:
    """Events that somebody else wrote may come in any pieces, and their length may be told."""
    go_on = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.02)
        yield b"data: hel"
        await go_on.wait()
        yield b"lo\n\n" if length is None else b"o\n\n"

    headers = {"Content-Type": "text/event-stream"}
    if length is not None:
        headers["Content-Length"] = length
    own: dict[str, Any] = {"keepalive": 0.001, "first_item_wait": wait}
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    answer = await served(lambda: Response(200, headers, body=pieces()), **own)

    text = answer.text.removeprefix(": keepalive\n\n") if length is None else answer.text
    assert f"data: {'hello' if length is None else 'helo'}\n\n" == text


READS_ON = """
import socket, sys
reader = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
reader.sendall(b"GET /it HTTP/1.1\\r\\nHost: t\\r\\nConnection: close\\r\\n\\r\\n")
while reader.recv(1 << 20):
    pass
"""


@pytest.mark.parametrize("front", ["on", "off"])
async def test_a_source_that_never_waits_lets_others_have_their_turn(front: str) -> None:
    """Although its reader keeps up with it."""
    begun, enough = asyncio.Event(), threading.Event()
    ended: list[str] = []

    def items() -> Iterator[bytes]:
        loop = asyncio.get_running_loop()
        late = loop.time() + 5
        begun.set()
        while not enough.is_set() and loop.time() < late:
            yield bytes(1000)
        ended.append("enough" if enough.is_set() else "late")

    configured = f"{ECHO}\nhttp: {{front: {front}}}"
    mounts = {"it": serving(lambda: Response(200, body=items()), public=True)}
    async with asyncio.timeout(SECONDS), running(configured, resources=mounts) as server:
        port = str(server.server.http_port)
        reader = await asyncio.create_subprocess_exec(sys.executable, "-c", READS_ON, port)
        await begun.wait()
        assert 200 == (await ask(server, "GET", "/health")).status
        enough.set()
        await reader.wait()

    assert ["enough"] == ended


@pytest.mark.parametrize("front", ["on", "off"])
async def test_what_has_no_body_gets_no_comment(front: str) -> None:
    """It would be read as the next answer, where the head goes out late."""
    go_on = asyncio.Event()

    async def items() -> AsyncIterator[SSE]:
        await go_on.wait()
        yield SSE(data="a")

    def none() -> EventStream:
        get_context().status = 204
        return EventStream(items())

    own: dict[str, Any] = {"first_item_wait": 0.01, "keepalive": 0.01, "public": True}
    configured = f"{ECHO}\nhttp: {{front: {front}}}"
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    request = "GET /it HTTP/1.1\r\nHost: t\r\n\r\nGET /health HTTP/1.1\r\nHost: t\r\n"
    async with (
        asyncio.timeout(SECONDS),
        running(configured, resources={"it": serving(none, **own)}) as server,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        writer.write(f"{request}Connection: close\r\n\r\n".encode())
        told = (await reader.read()).decode()
        writer.close()

    first, _, second = told.partition("\r\n\r\n")
    assert first.startswith("HTTP/1.1 204 ")
    assert second.startswith("HTTP/1.1 200 ")


async def test_silence_is_some_time() -> None:
    """A class that would send comments without end is not mounted."""
    async with running(resources={"it": serving(lambda: "a", keepalive=0)}) as server:
        told = (await ask(server, "GET", "/health")).json["plugins"]["test"]["error"]

    assert "Serving.keepalive: expected seconds, more than 0" == told


async def test_other_streams_know_no_comments() -> None:
    """A JSON array is not stirred by silence, however short the patience."""
    silences = 0

    async def items() -> AsyncIterator[int]:
        nonlocal silences
        yield 1
        loop, silent = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(0.05, silent.set)
        await silent.wait()
        silences += 1
        yield 2

    answer = await served(items, keepalive=0.001, first_item_wait=0.001)

    assert ("[1,2]", 1) == (answer.text, silences)


# --- errors on the way

TOLD = {"error": "no_more", "message": "No more.", "status": 400}


@BOTH
@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ("application/json", f'[1,{{"error":{json.dumps(TOLD, separators=(",", ":"))}}}]'),
        (
            "application/x-ndjson",
            f'1\n{{"$harperStreamError":{json.dumps(TOLD, separators=(",", ":"))}}}\n',
        ),
    ],
)
async def test_a_later_error_is_the_last_item(source: Source, accept: str, text: str) -> None:
    """Where a format can say it, an error ends the stream in good form."""
    answer = await served(lambda: source([1, BROKEN, 2]), accept)

    assert (200, text) == (answer.status, answer.text)


@BOTH
async def test_a_later_error_of_an_event_stream_is_an_event(source: Source) -> None:
    """By default it is a `harper-error` with the problem as its data."""
    answer = await served(lambda: EventStream(source(["a", BROKEN, "b"])))

    first, last, rest = answer.text.split("\n\n")
    event, data = last.split("\n")
    assert ("data: a", "event: harper-error", "") == (first, event, rest)
    problem = json.loads(data.removeprefix("data: "))
    assert (400, "No more.", "no_more") == (problem["status"], problem["detail"], problem["code"])
    assert answer.headers["x-request-id"] == problem["request_id"]


@pytest.mark.parametrize("error", [ValueError("swordfish"), ServiceUnavailable("swordfish")])
@pytest.mark.parametrize(
    "accept", ["application/json", "application/x-ndjson", "text/event-stream"]
)
async def test_a_later_error_of_ours_tells_nothing_of_itself(error: Exception, accept: str) -> None:
    """In no format does the text of a 5xx leave the house."""
    answer = await served(lambda: async_items(["a", error]), accept)

    assert 200 == answer.status
    assert "swordfish" not in answer.text
    assert "rror" in answer.text


async def test_a_class_words_its_streams_errors() -> None:
    """`present_stream_error` makes the last message, as `present_error` makes the refusal."""

    def worded(error: HarperError, context: Context) -> SSE:
        return SSE(data=[error.public_message, context.request_id], event="over")

    wording = staticmethod(worded)
    answer = await served(
        lambda: async_items([SSE(data="a"), BROKEN]), present_stream_error=wording
    )

    request_id = answer.headers["x-request-id"]
    assert f'data: a\n\nevent: over\ndata: ["No more.","{request_id}"]\n\n' == answer.text


@pytest.mark.parametrize(
    ("accept", "begin", "end"),
    [
        ("application/json", '[1,{"error":{"error":"ServerError",', "}}]"),
        ("application/x-ndjson", '1\n{"$harperStreamError":{', "}}\n"),
        ("text/event-stream", "data: 1\n\nevent: harper-error\ndata: {", "}\n\n"),
    ],
)
async def test_an_item_that_cannot_be_sent_is_such_an_error(
    accept: str, begin: str, end: str
) -> None:
    """What has no JSON form ends the stream like any fault of the handler's."""
    answer = await served(lambda: async_items([1, object(), 2]), accept)

    assert (200, begin) == (answer.status, answer.text[: len(begin)])
    assert answer.text.endswith(end)
    assert '"status":500' in answer.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: async_items(["a", BROKEN]),
        lambda: Response(200, {"Content-Type": "text/plain"}, body=async_items(["a", BROKEN])),
    ],
    ids=["text", "response"],
)
async def test_where_no_error_can_be_said_the_connection_is_cut(make: Callable[[], Any]) -> None:
    """Plain text and raw bytes cannot tell an error from data: the client sees the break."""
    headers = {"Accept": "text/plain"}
    async with (
        running(resources={"it": serving(make)}) as server,
        server.session() as client,
        client.get("/it", headers=headers) as response,
    ):
        assert b"a" == await response.content.readexactly(1)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()


# --- who steps it, who closes it


class Trace:
    """Which tasks ran a generator's steps and its end, and what ended it."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.entered, self.ended = asyncio.Event(), asyncio.Event()
        self.reason: type[BaseException] | None = None

    def step(self) -> None:
        """Note who runs this."""
        self.tasks.append(asyncio.current_task())

    async def stream(self, items: Iterable[Any]) -> AsyncIterator[Any]:
        """The items, `...` for silence without end; it holds what must not change tasks."""
        token = HELD.set("held")
        try:
            async with asyncio.timeout(SECONDS):
                for item in items:
                    self.step()
                    await self._wait(item)
                    yield item
        except BaseException as error:
            self.reason = type(error)
            raise
        finally:
            await asyncio.sleep(0)
            self.step()
            HELD.reset(token)
            self.ended.set()

    async def _wait(self, item: Any) -> None:
        if isinstance(item, Exception):
            raise item
        if item is ...:
            self.entered.set()
            await asyncio.Event().wait()


HELD: ContextVar[str] = ContextVar("held")


def kinds(trace: Trace, *items: Any) -> dict[str, Callable[[], Any]]:
    """The ways in which a handler may hand over its generator."""
    chunks = [
        GenerateChunk(delta_content=item) if isinstance(item, str) else item for item in items
    ]
    return {
        "itself": lambda: trace.stream(items),
        "event stream": lambda: EventStream(trace.stream(items)),
        "response": lambda: Response(200, body=trace.stream(items)),
        "chunks": lambda: EventStream(openai_stream(trace.stream(chunks), model="m")),
        "twice wrapped": lambda: EventStream(relay(relay(trace.stream(items)))),
    }


async def relay(source: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A generator around another, closing it when it is closed."""
    try:
        async for item in source:
            yield item
    finally:
        await source.aclose()  # type: ignore[attr-defined]


KINDS = pytest.mark.parametrize("kind", kinds(Trace()))


@KINDS
@pytest.mark.parametrize("items", [("a", "b"), (), ("a", BROKEN), (BROKEN,)], ids=repr)
async def test_one_task_steps_and_ends_a_generator(kind: str, items: tuple[Any, ...]) -> None:
    """From the first step to the last `finally`, in a normal end or an error, it is one task."""
    trace = Trace()

    async with asyncio.timeout(SECONDS):
        try:
            await served(kinds(trace, *items)[kind])
        except aiohttp.ClientPayloadError:
            assert "response" == kind
        await trace.ended.wait()

    assert len(trace.tasks) == len([*items]) + 1
    assert 1 == len(set(trace.tasks))
    assert (type(BROKEN) if BROKEN in items else None) is trace.reason


@KINDS
@pytest.mark.parametrize("items", [(...,), ("a", ...), ("a", "b", ...)], ids=len)
async def test_the_same_task_ends_it_when_the_client_leaves(
    kind: str, items: tuple[Any, ...]
) -> None:
    """A generator that waits is cancelled where it waits, and its `finally` runs at once."""
    trace = Trace()
    resources = {"it": serving(kinds(trace, *items)[kind])}

    async with asyncio.timeout(SECONDS), running(resources=resources) as server:
        call = asyncio.create_task(ask(server, "GET", "/it"))
        await trace.entered.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await trace.ended.wait()

    assert len(trace.tasks) == len(items) + 1
    assert 1 == len(set(trace.tasks))
    assert asyncio.CancelledError is trace.reason


@KINDS
async def test_the_same_task_closes_it_when_the_client_stops_reading(kind: str) -> None:
    """A generator that rests between items, as the wire is full, is closed from the same task."""
    trace = Trace()
    resources = {"it": serving(kinds(trace, *["x" * (1 << 20)] * 1000)[kind])}

    async with asyncio.timeout(SECONDS), running(resources=resources) as server:
        async with server.session() as client:
            response = await client.get("/it")
            await response.content.readany()
            response.close()
        await trace.ended.wait()

    assert len(trace.tasks) < 1000
    assert 1 == len(set(trace.tasks))
    assert trace.reason in (GeneratorExit, asyncio.CancelledError)


@KINDS
async def test_head_closes_a_generator_without_starting_it(kind: str) -> None:
    """HEAD has GET's head and none of its work: no step is taken."""
    trace = Trace()
    async with running(resources={"it": serving(kinds(trace, "a")[kind])}) as server:
        head = await ask(server, "HEAD", "/it")
        assert [] == trace.tasks
        whole = await ask(server, "GET", "/it")

    assert (200, "") == (head.status, head.text)
    assert whole.headers["Content-Type"] == head.headers["Content-Type"]
    assert 2 == len(trace.tasks)


class Closable:
    """An async iterator that is no generator: nothing closes it but `aclose`."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self.entered, self.closed = asyncio.Event(), asyncio.Event()
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.closings = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self.tasks.append(asyncio.current_task())
        item = next(self._items, None)
        if item is ...:
            self.entered.set()
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            raise item
        if item is None:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Close it."""
        self.tasks.append(asyncio.current_task())
        self.closings += 1
        self.closed.set()


@pytest.mark.parametrize(
    ("items", "steps"), [(("a", "b"), 3), ((), 1), (("a", BROKEN), 2), ((BROKEN,), 1)], ids=repr
)
async def test_an_iterator_of_ones_own_is_closed_too(items: tuple[Any, ...], steps: int) -> None:
    """Whatever has an `aclose` gets it at the end, from the task that stepped it."""
    source = Closable(items)

    async with running(resources={"it": serving(lambda: source)}) as server:
        await ask(server, "HEAD", "/it")
        assert (1, 1) == (source.closings, len(source.tasks))
        await ask(server, "GET", "/it")

    assert source.closings > 1
    assert steps == len(source.tasks) - source.closings
    assert 1 == len(set(source.tasks[1:]))


@pytest.mark.parametrize("items", [(...,), ("a", ...)], ids=len)
async def test_an_iterator_of_ones_own_is_closed_when_the_client_leaves(
    items: tuple[Any, ...],
) -> None:
    """Also when not even its first item was there."""
    source = Closable(items)

    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": serving(lambda: source)}) as server,
    ):
        call = asyncio.create_task(ask(server, "GET", "/it"))
        await source.entered.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await source.closed.wait()

    assert 1 == len(set(source.tasks))


@pytest.mark.parametrize("bad", ["a\r\nX-Smuggled: b", "\0", 5], ids=repr)
@pytest.mark.parametrize("where", ["own", "context"])
async def test_a_header_that_cannot_be_sent_is_an_error_before_the_head(
    where: str, bad: Any
) -> None:
    """HTTP forbids it: the answer is a 500 in good form, and the generator has ended."""
    trace = Trace()

    def stream() -> EventStream:
        if where == "own":
            return EventStream(trace.stream(["a", ...]), {"X-Bad": bad})
        get_context().response_headers["X-Bad"] = bad
        return EventStream(trace.stream(["a", ...]))

    answer = await served(stream)

    assert (500, 500) == (answer.status, answer.json["status"])
    assert answer.headers["x-request-id"] == answer.json["request_id"]
    assert not {"X-Bad", "X-Smuggled"} & set(answer.headers)
    assert 2 == len(trace.tasks)
    assert 1 == len(set(trace.tasks))


async def test_a_stream_that_is_never_written_is_closed() -> None:
    """Primed, but not begun as the connection broke: closing the reply ends the generator."""
    trace = Trace()

    async with running(resources={"it": serving(lambda: trace.stream(["a", ...]))}) as server:
        dispatch = server.server._wire("rest", ())._dispatch
        headers = {"authorization": f"Bearer {server.api_key}"}
        reply = await dispatch.answer(dispatch.open(Request("GET", "/it", headers=headers)))
        assert not trace.ended.is_set()
        await reply.close()

    assert trace.ended.is_set()
    assert GeneratorExit is trace.reason
    assert {asyncio.current_task()} == set(trace.tasks)


class Fatal(BaseException):
    """What no `except Exception` sees."""


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("how", ["verb", "stream", "late stream"])
async def test_what_no_answer_can_come_of_ends_the_connection(how: str) -> None:
    """Its client is not left waiting, and the next one is answered."""
    begun = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        if how == "stream":
            yield "a"
        await begun.wait()
        raise Fatal

    async def get() -> Any:
        if how == "verb":
            raise Fatal
        return EventStream(items())

    raising = serving(get, public=True, first_item_wait=0.0 if how == "late stream" else 1.0)
    mounts = {"it": raising, "fine": serving(lambda: "fine")}
    async with asyncio.timeout(SECONDS), running(resources=mounts) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        writer.write(b"GET /it HTTP/1.1\r\nHost: test\r\n\r\n")
        if how != "verb":
            await reader.readuntil(b"\r\n\r\n")
        begun.set()
        told = await reader.read(-1)
        writer.close()
        assert 200 == (await ask(server, "GET", "/fine")).status

    assert not told.endswith(b"0\r\n\r\n")
    assert b"HTTP/1.1" not in told


async def test_a_plain_generator_is_closed_when_the_client_leaves() -> None:
    """Even one that somebody else still holds runs its `finally` then, in the same task."""
    trace = Trace()

    def flood() -> Iterator[str]:
        trace.step()
        try:
            while True:
                yield "x" * (1 << 20)
        finally:
            trace.step()
            trace.ended.set()

    held = flood()
    async with asyncio.timeout(SECONDS), running(resources={"it": serving(lambda: held)}) as server:
        async with server.session() as client:
            response = await client.get("/it")
            await response.content.readany()
            response.close()
        await trace.ended.wait()

    assert 2 == len(trace.tasks)
    assert 1 == len(set(trace.tasks))


# --- OpenAI's chunks


async def messages(tokens: AsyncIterable[Any] | Iterable[Any], **options: Any) -> list[SSE]:
    """All messages of a stream of tokens."""
    return [message async for message in openai_stream(tokens, model="m", **options)]


async def chunks(tokens: AsyncIterable[Any] | Iterable[Any], **options: Any) -> list[Any]:
    """The chunks of a stream that ends with `[DONE]`."""
    *parts, done = [message.data for message in await messages(tokens, **options)]
    assert "[DONE]" == done
    return [json.loads(part) for part in parts]


def deltas(parts: list[Any]) -> list[tuple[dict[str, Any], str | None]]:
    """What each chunk adds, and why the last one ended."""
    return [(part["choices"][0]["delta"], part["choices"][0]["finish_reason"]) for part in parts]


def call(index: int, call_id: str, name: str, arguments: str = "") -> dict[str, Any]:
    """The first piece of a tool call."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": call_id, "type": "function", "function": function}


def more(index: int, arguments: str) -> dict[str, Any]:
    """A later piece of a tool call."""
    return {"index": index, "function": {"arguments": arguments}}


def calling(*calls: Any) -> GenerateChunk:
    """A chunk with pieces of tool calls."""
    return GenerateChunk(delta_tool_calls=[*calls])


def said(text: str) -> GenerateChunk:
    """A chunk of text."""
    return GenerateChunk(delta_content=text)


Deltas = list[tuple[dict[str, Any], str | None]]
ANSWERS: dict[str, tuple[list[Any], Deltas]] = {
    "texts": (
        ["Hel", "lo"],
        [({"role": "assistant", "content": "Hel"}, None), ({"content": "lo"}, None), ({}, "stop")],
    ),
    "chunks of text": (
        [said("Hel"), "lo"],
        [({"role": "assistant", "content": "Hel"}, None), ({"content": "lo"}, None), ({}, "stop")],
    ),
    "nothing": ([], [({"role": "assistant"}, "stop")]),
    "empty text": (
        ["", GenerateChunk()],
        [({"role": "assistant", "content": ""}, None), ({}, "stop")],
    ),
    "a reason of its own": (
        ["a", GenerateChunk(finish_reason="length")],
        [({"role": "assistant", "content": "a"}, None), ({}, "length")],
    ),
    "text and reason at once": (
        [GenerateChunk(delta_content="a", finish_reason="content_filter")],
        [({"role": "assistant", "content": "a"}, None), ({}, "content_filter")],
    ),
    "a refusal": (
        [GenerateChunk(delta_refusal="No.")],
        [({"role": "assistant", "refusal": "No."}, None), ({}, "stop")],
    ),
    "a call in pieces": (
        [
            calling(ToolCallDelta(index=0, id="c1", name="f")),
            calling(ToolCallDelta(index=0, arguments='{"a"')),
            calling(ToolCallDelta(index=0, id="c1", name="f", arguments=": 1}")),
        ],
        [
            ({"role": "assistant", "tool_calls": [call(0, "c1", "f")]}, None),
            ({"tool_calls": [more(0, '{"a"')]}, None),
            ({"tool_calls": [more(0, ": 1}")]}, None),
            ({}, "tool_calls"),
        ],
    ),
    "calls side by side, counted from nought": (
        [
            calling(
                ToolCallDelta(index=3, id="c1", name="f"), ToolCallDelta(index=5, id="c2", name="g")
            ),
            calling(ToolCallDelta(index=5, arguments="{}")),
            calling(ToolCallDelta(index=3, arguments="[]")),
        ],
        [
            (
                {"role": "assistant", "tool_calls": [call(0, "c1", "f"), call(1, "c2", "g")]},
                None,
            ),
            ({"tool_calls": [more(1, "{}")]}, None),
            ({"tool_calls": [more(0, "[]")]}, None),
            ({}, "tool_calls"),
        ],
    ),
    "pieces without an index": (
        [
            calling(ToolCallDelta(id="c1", name="f", arguments="{")),
            calling(ToolCallDelta(arguments="}")),
            calling(ToolCallDelta(id="c2", name="g")),
            calling(ToolCallDelta(arguments="{}")),
        ],
        [
            ({"role": "assistant", "tool_calls": [call(0, "c1", "f", "{")]}, None),
            ({"tool_calls": [more(0, "}")]}, None),
            ({"tool_calls": [call(1, "c2", "g")]}, None),
            ({"tool_calls": [more(1, "{}")]}, None),
            ({}, "tool_calls"),
        ],
    ),
    "whole calls": (
        [
            calling(ToolCall(id="c1", name="f", arguments={"a": [1, "ß"]})),
            calling(
                ToolCall(id="c2", name="g", arguments='{ "b": 1.0 }'), ToolCall(id="c3", name="h")
            ),
        ],
        [
            ({"role": "assistant", "tool_calls": [call(0, "c1", "f", '{"a":[1,"ß"]}')]}, None),
            ({"tool_calls": [call(1, "c2", "g", '{ "b": 1.0 }'), call(2, "c3", "h", "{}")]}, None),
            ({}, "tool_calls"),
        ],
    ),
    "text, call and reason at once": (
        [
            GenerateChunk(
                delta_content="a",
                delta_tool_calls=[ToolCallDelta(index=0, id="c1", name="f", arguments={})],
                finish_reason="stop",
            )
        ],
        [
            ({"role": "assistant", "content": "a"}, None),
            ({"tool_calls": [call(0, "c1", "f", "{}")]}, None),
            # Calls are there to be made, whatever the reason says.
            ({}, "tool_calls"),
        ],
    ),
}


@BOTH
@pytest.mark.parametrize(("tokens", "expected"), ANSWERS.values(), ids=ANSWERS)
async def test_tokens_become_deltas(source: Source, tokens: list[Any], expected: Deltas) -> None:
    """Role once; id, type and name once a call; arguments as they come; at the end the reason."""
    assert expected == deltas(await chunks(source(tokens)))


@pytest.mark.parametrize("tokens", [tokens for tokens, _ in ANSWERS.values()], ids=ANSWERS)
async def test_every_chunk_is_whole(tokens: list[Any]) -> None:
    """All chunks of an answer share id, time and model; each has one choice and no usage."""
    parts = await chunks(tokens)

    assert 1 == len({(part["id"], part["created"]) for part in parts})
    for part in parts:
        assert part["id"].startswith("chatcmpl-")
        assert isinstance(part["created"], int)
        assert {"id", "object", "created", "model", "choices"} == set(part)
        assert ("chat.completion.chunk", "m") == (part["object"], part["model"])
        (choice,) = part["choices"]
        assert {"index", "delta", "logprobs", "finish_reason"} == set(choice)
        assert (0, None) == (choice["index"], choice["logprobs"])


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", ["", "é\u2028", '"\\\n', "\U0001f600"])
async def test_text_alone_is_worded_as_text_beside_something(
    text: str,
    include_usage: bool,  # noqa: FBT001
) -> None:
    """The short way that pieces of text go yields the same bytes as the long one."""
    tokens = [GenerateChunk(delta_content="a"), GenerateChunk(delta_content=text)]
    others = [tokens[0], GenerateChunk(delta_content=text, finish_reason="stop")]
    given: dict[str, Any] = {"model": "m", "id": "one", "include_usage": include_usage}

    alone = [event.data async for event in openai_stream(tokens, **given)]
    beside = [event.data async for event in openai_stream(others, **given)]

    # The second they began in may differ.
    assert re.sub(r'"created":\d+', "", beside[1]) == re.sub(r'"created":\d+', "", alone[1])


@pytest.mark.parametrize(
    "field",
    [one for one in GenerateChunk.__struct_fields__ if one not in ("delta_content", "index")],
)
async def test_text_beside_anything_is_not_text_alone(field: str) -> None:
    """No field of a chunk is lost on the short way, those to come included."""
    values: dict[str, Any] = {
        "delta_tool_calls": [ToolCallDelta(index=0, id="c", name="f", arguments="{}")],
        "usage": TokenUsage(prompt_tokens=1, completion_tokens=1),
        "moderation": {"flagged": False},
        "delta_audio": {"id": "a"},
    }
    for name in ("logprobs", "refusal_logprobs", "delta_annotations"):
        values[name] = [{"a": 1}]
    other: dict[str, Any] = {field: values.get(field, "length")}
    first = GenerateChunk(delta_content="a")
    given: dict[str, Any] = {"model": "m", "id": "one", "include_usage": True}

    async def told(*more: GenerateChunk) -> str:
        data = [event.data async for event in openai_stream([first, *more], **given)]
        return re.sub(r'"created":\d+', "", "".join(map(str, data)))

    alone = await told(GenerateChunk(delta_content="b"))
    assert alone == await told(GenerateChunk(delta_content="b"))
    assert alone != await told(GenerateChunk(delta_content="b", **other))


async def test_two_answers_have_two_ids_and_one_may_be_given() -> None:
    """An id is made for each answer, unless the caller has one."""
    first, second = [(await chunks(["a"]))[0]["id"] for _ in range(2)]
    third = (await chunks(["a"], id="x"))[0]["id"]

    assert first != second
    assert "x" == third


async def test_a_call_without_id_gets_one() -> None:
    """No client takes a tool call without an id."""
    first, second, *_ = await chunks(
        [calling(ToolCallDelta(index=0, name="f")), calling(ToolCallDelta(index=1, name="g"))]
    )

    ids = [part["choices"][0]["delta"]["tool_calls"][0]["id"] for part in (first, second)]
    assert all(made.startswith("call_") for made in ids)
    assert 2 == len(set(ids))


async def test_a_message_is_data_and_nothing_else() -> None:
    """`data` is JSON text in one line; an event or id line would break clients."""
    tokens = ["a\nb", calling(ToolCall(id="c", name='"', arguments={"a": "\n"})), said("ß")]

    for message in await messages(tokens):
        assert isinstance(message.data, str)
        assert (None, None, None, None) == (
            message.event,
            message.id,
            message.retry,
            message.comment,
        )
        assert f"data: {message.data}\n\n".encode() == encode_sse(message)


async def test_a_models_name_is_told_as_it_is() -> None:
    """Any name is proper JSON on every chunk."""
    name = 'a "quoted" größer\\name\n'

    parts = [message async for message in openai_stream(["a"], model=name)][:-1]

    assert {name} == {json.loads(part.data)["model"] for part in parts}


USAGE = TokenUsage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=0)


async def test_usage_is_told_only_if_it_was_asked_for() -> None:
    """With `include_usage` all chunks have the field; one more has the numbers and no choice."""
    tokens = ["a", GenerateChunk(usage=USAGE)]

    unasked = await chunks(tokens)
    *asked, last = await chunks(tokens, include_usage=True)

    assert deltas(unasked) == deltas(asked)
    assert [None, None] == [part["usage"] for part in asked]
    assert [] == last["choices"]
    assert {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    } == last["usage"]
    assert {"id", "object", "created", "model", "choices", "usage"} == set(last)
    assert asked[0]["id"] == last["id"]


@pytest.mark.parametrize("tokens", [[], [GenerateChunk(usage=USAGE), GenerateChunk()]], ids=len)
@BOTH
async def test_an_error_before_the_first_message_is_raised(
    source: Source, tokens: list[Any]
) -> None:
    """As long as nothing was sent, an error can still become a status."""
    stream = openai_stream(source([*tokens, BROKEN]), model="m")

    with pytest.raises(ClientError) as caught:
        await anext(stream)

    assert BROKEN is caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BROKEN, ("No more.", "invalid_request_error", "no_more")),
        (
            ClientError("Slow down.", status=429),
            ("Slow down.", "rate_limit_error", None),
        ),
        (
            BackendError("swordfish"),
            ("The model provider failed to answer.", "server_error", None),
        ),
        (
            ValueError("swordfish"),
            ("The server had an error while processing the request.", "server_error", None),
        ),
    ],
    ids=repr,
)
@BOTH
async def test_a_later_error_is_the_last_message(
    source: Source, error: Exception, expected: tuple[str, str, str | None]
) -> None:
    """OpenAI's error object ends the stream, without `[DONE]`, and with nothing of ours told."""
    first, last = [
        json.loads(message.data) for message in await messages(source(["a", error, "b"]))
    ]

    assert "a" == first["choices"][0]["delta"]["content"]
    text, kind, code = expected
    assert {"error": {"message": text, "type": kind, "param": None, "code": code}} == last


async def test_closing_the_chunks_closes_the_tokens() -> None:
    """Who stops listening ends the model's generator with it."""
    trace = Trace()

    stream = openai_stream(trace.stream(["a", "b", "c"]), model="m")
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]

    assert trace.ended.is_set()
    assert GeneratorExit is trace.reason
    assert 1 == len(set(trace.tasks))


@pytest.mark.parametrize("wrapped", [EventStream, lambda chunks: chunks], ids=["wrapped", "bare"])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_any_resource_may_answer_in_chunks(wrapped: Any, accept: str) -> None:
    """A handler that returns `openai_stream(…)` is what OpenAI's clients read."""
    answer = await served(lambda: wrapped(openai_stream(["a", "b"], model="m")), accept)

    *parts, done = events(answer.text)
    assert "text/event-stream" == answer.headers["Content-Type"]
    assert "[DONE]" == done
    assert [{"role": "assistant", "content": "a"}, {"content": "b"}, {}] == [
        delta for delta, _ in deltas(parts)
    ]
    assert len(parts) + 1 == answer.text.count("\n\n")


async def test_a_target_reaches_the_generator() -> None:
    """An async generator verb is stepped with what it was called with."""

    class Counts(Resource):
        @staticmethod
        async def get(target: RequestTarget) -> AsyncIterator[SSE]:
            for number in range(int(target.get("to", "0") or 0)):
                yield SSE(data=number)

    async with running(resources={"counts": Counts}) as server:
        answer = await ask(server, "GET", "/counts?to=3")

    assert [0, 1, 2] == events(answer.text)
