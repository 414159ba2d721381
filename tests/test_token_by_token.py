"""A streamed answer as models give it: each piece goes on before the provider has the next."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from harperpy.resources.models.v1.chat_completions import V1ChatCompletions

from harperpy import (
    BackendError,
    Body,
    Context,
    EventStream,
    GenerateChunk,
    RequestTarget,
    Resource,
    Response,
    get_context,
    openai_stream,
)
from harperpy.testing import (
    Answer as Scripted,
)
from harperpy.testing import (
    RunningServer,
    ScriptedUpstream,
    chunk,
    running,
    streamed,
)
from helpers import HELLO, ask, events, provider, uncollected, until
from raw_provider import DONE, END, HEAD, connections, event, piece, read_request


def text(content: str) -> bytes:
    """The event of a piece of text."""
    return event(chunk({"content": content}))


class Feed:
    """A provider that streams what it is told to, when it is; `asked` counts by connection."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.left = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        number = len(self.asked)
        self.asked.append(0)
        try:
            while True:
                await read_request(reader)
                self.asked[number] += 1
                self._writer = writer
                writer.write(HEAD)
                await self.tell(text("first"))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            writer.close()

    async def tell(self, *events: bytes) -> None:
        """Send events together."""
        assert self._writer is not None
        self._writer.write(piece(b"".join(events)))
        await self._writer.drain()

    def end(self, *events: bytes) -> None:
        """Send the last events, and the end of the body with them."""
        assert self._writer is not None
        self._writer.write(piece(b"".join(events)) + END if events else END)

    def hang_up(self) -> None:
        """End the connection."""
        assert self._writer is not None
        self._writer.close()


class Answer:
    """What a client has of a streamed answer."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def event(self) -> Any:
        """The next event's data; nothing at the answer's end."""
        line = await self._response.content.readline()
        await self._response.content.readline()
        data = line.removeprefix(b"data: ").strip()
        return data.decode() if data in (b"", b"[DONE]") else json.loads(data)

    async def text(self) -> str:
        """The text that the next event brings."""
        return (await self.event())["choices"][0]["delta"]["content"]


@asynccontextmanager
async def feeding(**options: Any) -> AsyncGenerator[tuple[RunningServer, Feed]]:
    """A server in front of such a provider."""
    feed = Feed()
    listener = await asyncio.start_server(feed.serve, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with running(provider(f"http://127.0.0.1:{port}/v1"), **options) as server:
            yield server, feed


@asynccontextmanager
async def asking(
    server: RunningServer, path: str = "/v1/chat/completions"
) -> AsyncGenerator[Answer]:
    """A chat whose answer has begun, by its first piece."""
    async with (
        asyncio.timeout(30),
        server.session() as client,
        client.post(path, json={**HELLO, "stream": True}) as response,
    ):
        answer = Answer(response)
        assert "first" == await answer.text()
        yield answer


async def test_each_piece_is_there_before_the_next_is_sent() -> None:
    """Whatever it holds, to the end; counted once, over a connection that is used again."""
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}
    usage = {"prompt_tokens": 3, "completion_tokens": 70}
    async with feeding() as (server, feed):
        for _ in range(2):
            async with asking(server) as answer:
                for said in ("second", 'th"ird\n', "\u00e9\U0001f600"):
                    await feed.tell(text(said))
                    assert said == await answer.text()
                await feed.tell(text("two"), text("more"))
                assert ["two", "more"] == [await answer.text(), await answer.text()]
                await feed.tell(event(chunk({"tool_calls": [call]})))
                told = (await answer.event())["choices"][0]["delta"]["tool_calls"]
                assert ("call_1", "f") == (told[0]["id"], told[0]["function"]["name"])
                reason = event(chunk({}, finish_reason="tool_calls"))
                feed.end(reason, event({"choices": [], "usage": usage}), DONE)
                assert "tool_calls" == (await answer.event())["choices"][0]["finish_reason"]
                assert ["[DONE]", ""] == [await answer.event(), await answer.event()]
        rows = await server.rows()

    assert [2] == feed.asked
    counted = [(row["success"], row["prompt_tokens"], row["completion_tokens"]) for row in rows]
    assert [(True, 3, 70)] * 2 == counted


ODD = text("odd").replace(b'"choices"', b'"of":"another","choices"')
# What one read brings after a first one that had text alone.
TOGETHER = {
    "texts": [text("a"), text("b"), text("c")],
    "nothing between": [text("a"), text(""), text("b"), text("")],
    "another kind last": [text("a"), text("b"), ODD],
    "another kind first": [ODD, text("a"), text("b")],
    "another kind between": [text("a"), ODD, text("b")],
    "a comment between": [text("a"), b": hello\n\n", text("b")],
    "what looks like an event": [text('a"}}]}\n\ndata: {"choices":[{"delta":{"content":"x'), ODD],
}


@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize("ends", [False, True])
async def test_what_comes_together_stays_in_its_order(
    together: list[bytes],
    *,
    ends: bool,
) -> None:
    """With what ends the answer behind it, or before that."""
    said = [json.loads(one.partition(b"data: ")[2] or b"{}").get("choices") for one in together]
    texts = [choices[0]["delta"]["content"] for choices in said if choices]
    last = event(chunk({}, finish_reason="length")), DONE
    async with feeding() as (server, feed), asking(server) as answer:
        await feed.tell(text("second"))
        assert "second" == await answer.text()
        if ends:
            feed.end(*together, *last)
        else:
            await feed.tell(*together)
        assert [one for one in texts if one] == [await answer.text() for one in texts if one]
        if not ends:
            feed.end(*last)
        assert "length" == (await answer.event())["choices"][0]["finish_reason"]
        assert ["[DONE]", ""] == [await answer.event(), await answer.event()]


async def test_the_providers_last_word_ends_the_answer() -> None:
    """Although its body goes on."""
    async with feeding() as (server, feed):
        async with asking(server) as answer:
            await feed.tell(text("second"))
            assert "second" == await answer.text()
            await feed.tell(DONE)
            assert "stop" == (await answer.event())["choices"][0]["finish_reason"]
            assert ["[DONE]", ""] == [await answer.event(), await answer.event()]
        await asyncio.wait_for(feed.left.wait(), 30)
        [row] = await server.rows()
    assert (True, 2) == (row["success"], row["completion_tokens"])


class Passed(Resource):
    """A streamed answer, chunk by chunk."""

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> Any:
        """Whatever is posted."""

        async def each() -> AsyncGenerator[GenerateChunk]:
            async for one in context.models.generate_stream("hi"):
                yield one

        return openai_stream(each(), model="m")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/passed"])
async def test_a_body_that_ends_after_the_last_word_leaves_its_connection(path: str) -> None:
    """The client has all of its answer before; what comes of the next call is that one's."""
    async with feeding(resources={"passed": Passed}) as (server, feed):
        before = {id(one) for one in connections()}
        for _ in range(3):
            async with asking(server, path) as answer:
                await feed.tell(text("second"))
                assert "second" == await answer.text()
                [used] = (one for one in connections() if id(one) not in before)
                kept = used.kept
                await feed.tell(DONE, b": more\n\n")
                assert "stop" == (await answer.event())["choices"][0]["finish_reason"]
                assert ["[DONE]", ""] == [await answer.event(), await answer.event()]
            assert kept == used.kept
            feed.end()
            await until(lambda used=used, kept=kept: used.kept > kept)
    assert [3] == feed.asked


async def test_a_body_that_goes_on_after_the_last_word_is_not_read_on() -> None:
    """It ends the connection, long before its time is over."""
    async with feeding() as (server, feed):
        async with asking(server) as answer:
            await feed.tell(DONE)
            assert "stop" == (await answer.event())["choices"][0]["finish_reason"]
        sent = 0
        with suppress(ConnectionError):
            while True:
                await feed.tell(b"x" * 9999)
                sent += 1
    assert sent < 5000


BROKEN = {
    "an event that is none": b"data: {oops\n\n",
    "an error": event({"error": {"message": "secret", "code": 500}}),
    "no more": None,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_what_goes_wrong_is_the_last_event(broken: bytes | None) -> None:
    """After what came with it before; the row has what was said until then."""
    async with feeding() as (server, feed):
        async with asking(server) as answer:
            await feed.tell(text("second"))
            assert "second" == await answer.text()
            if broken is None:
                feed.hang_up()
            else:
                await feed.tell(text("third"), broken, text("never"))
                assert "third" == await answer.text()
            told = (await answer.event())["error"]
            assert "" == await answer.event()
        [row] = await server.rows()

    assert "The model provider failed to answer." == told["message"]
    said = 2 if broken is None else 3
    assert (False, "backend_error", said) == (
        *(row["success"], row["error_code"]),
        row["completion_tokens"],
    )


async def test_a_client_that_was_behind_misses_nothing() -> None:
    """Its provider waits for it; then all comes in order."""
    async with feeding() as (server, feed), asking(server) as answer:
        sent = 0
        try:
            while True:
                async with asyncio.timeout(1):
                    await feed.tell(text(f"{sent} {'x' * 1000}"))
                sent += 1
        except TimeoutError:
            # What did not fit is on the way all the same.
            sent += 1
        read = 0
        while read < sent:
            assert str(read) == (await answer.text()).split()[0]
            read += 1
        await feed.tell(text("at last"))
        assert "at last" == await answer.text()
        feed.end(DONE)
        assert "stop" == (await answer.event())["choices"][0]["finish_reason"]


async def test_a_client_that_leaves_is_not_answered_on() -> None:
    """Its provider sees it, and the row has what was said until then."""
    async with feeding() as (server, feed):
        async with asking(server) as answer:
            await feed.tell(text("second"))
            assert "second" == await answer.text()
        await asyncio.wait_for(feed.left.wait(), 30)
        [row] = await server.rows()
    assert (False, "aborted", 2) == (row["success"], row["error_code"], row["completion_tokens"])


@pytest.mark.parametrize("end", ["read to its end", "left", "broken off", "nonsense"])
async def test_what_a_stream_was_made_of_goes_with_it(
    caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """Its buffers are large, and the collector comes seldom."""
    # What is logged is kept, with its traceback.
    caplog.set_level("CRITICAL", "harperpy")
    async with feeding() as (server, feed):
        with uncollected() as found:
            async with asking(server) as answer:
                await feed.tell(text("second"))
                assert "second" == await answer.text()
                if end in ("broken off", "nonsense"):
                    if end == "nonsense":
                        await feed.tell(b"data: {oops\n\n")
                    else:
                        feed.hang_up()
                    assert "The model provider" in (await answer.event())["error"]["message"]
                if end == "read to its end":
                    feed.end(DONE)
                    assert "stop" == (await answer.event())["choices"][0]["finish_reason"]
                    assert ["[DONE]", ""] == [await answer.event(), await answer.event()]
            del answer
            await server.rows()
            if end == "left":
                await asyncio.wait_for(feed.left.wait(), 30)

    assert set() == found


def test_a_connection_that_is_kept_holds_nothing_of_what_it_was_made_for() -> None:
    """Neither does what looks after it."""
    begun = time.perf_counter()

    def held() -> int:
        gc.collect()
        known = (one for one in gc.get_objects() if type(one) is Context)
        # Those of other tests may wait for a collector of their own.
        mine = (one.request for one in known if one.started >= begun)
        return sum(one.path == "/v1/chat/completions" for one in mine)

    async def keep() -> None:
        async with feeding() as (server, feed):
            for _ in range(2):
                async with asking(server) as answer:
                    await feed.tell(text("second"))
                    assert "second" == await answer.text()
                    assert 1 == held()
                    feed.end(DONE)
                    assert "stop" == (await answer.event())["choices"][0]["finish_reason"]
                await until(lambda: not held())
            assert [2] == feed.asked

    # The timers of asyncio's own loop keep what they were set for when they are cancelled.
    pytest.importorskip("uvloop").run(keep())


async def test_a_stream_holds_no_body() -> None:
    """What a chat was asked with may be long, and its answer last for long."""
    bodies: list[Body] = []

    class Chats(V1ChatCompletions):
        """Notes what it was given."""

        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> Any:
            """As it is answered anyway."""
            bodies.append(data)
            return await V1ChatCompletions.post(target, data, context)

    async with (
        feeding(resources={"chats": Chats}) as (server, feed),
        asking(server, "/chats") as answer,
    ):
        await feed.tell(text("second"))
        assert "second" == await answer.text()
        assert [b""] == [await body.bytes() for body in bodies]
    # The class goes when the collector comes, which is another test's business.
    bodies.clear()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("end", ["well", "badly", "left"])
async def test_what_events_are_made_of_goes_with_them(end: str, raw: bool) -> None:  # noqa: FBT001
    """Of whoever reads them it is asked anew meanwhile whether they may."""
    go_on, left = asyncio.Event(), asyncio.Event()

    async def items() -> AsyncGenerator[str]:
        try:
            yield "data: a\n\n" if raw else "a"
            await go_on.wait()
            if end == "badly":
                raise BackendError
        finally:
            left.set()

    def get() -> Any:
        if raw:
            return Response(200, {"Content-Type": "text/event-stream"}, body=items())
        return EventStream(items())

    own = {"get": staticmethod(get), "keepalive": 0.01}
    async with running(resources={"it": type("It", (Resource,), own)}) as server:
        with uncollected() as found:
            async with server.session() as client, client.get("/it") as response:
                for _ in range(1 if raw else 4):
                    await response.content.readuntil(b"\n\n")
                if end != "left":
                    go_on.set()
                    with suppress(aiohttp.ClientPayloadError):
                        await response.read()
            del response
            await asyncio.wait_for(left.wait(), 30)
            await asyncio.sleep(0)

    assert set() == found


@pytest.mark.parametrize("encoded", [False, True])
async def test_a_stream_of_which_some_was_read_goes_on_from_there(
    upstream: ScriptedUpstream,
    encoded: bool,  # noqa: FBT001
) -> None:
    """However many of its pieces came in one read."""

    async def rest() -> EventStream:
        tokens = get_context().models.generate_stream("x", model="default")
        if not encoded:
            assert "a" == (await anext(tokens)).delta_content
        told = openai_stream(tokens, model="m")
        if encoded:
            await anext(told)
        return EventStream(told)

    upstream.script(Scripted(events=streamed(*"abcdefgh")))
    mounts = {"it": type("It", (Resource,), {"post": staticmethod(rest)})}
    async with running(provider(upstream.url), resources=mounts) as server:
        answer = await ask(server, "POST", "/it", json={})

    choices = [one["choices"][0] for one in events(answer.text)[:-1]]
    assert "bcdefgh" == "".join(one["delta"].get("content", "") for one in choices)
