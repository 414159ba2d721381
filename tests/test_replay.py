"""A feed whose readers come back: what they missed, what is gone, and how it ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harperpy import (
    SSE,
    AbortController,
    Context,
    ReplayBuffer,
    RequestTarget,
    Resource,
    encode_sse,
)
from harperpy.testing import RunningServer, running
from helpers import until

pytestmark = pytest.mark.usefixtures("way")

SECONDS = 20
RETRY = "retry: 1000\n\n"


def serving(feed: ReplayBuffer) -> type[Resource]:
    """A class that serves a feed."""

    class Feed(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> AsyncIterator[SSE]:
            return feed.since(context.last_event_id)

    return Feed


class Reader:
    """A client of the feed, event by event."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> str:
        """The next event's text."""
        return (await self.response.content.readuntil(b"\n\n")).decode()

    async def rest(self) -> str:
        """All there is until the stream's end."""
        return await self.response.text()


class Readers(AsyncExitStack):
    """Clients that are there at once; each leaves with the block."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__()
        self._server = server

    async def come(self, last: str | None = None, *, query: bool = False) -> Reader:
        """A new one, past the line that opens each stream."""
        client = await self.enter_async_context(self._server.session(""))
        headers = {"Last-Event-ID": last} if last is not None and not query else {}
        path = f"/feed?lastEventId={last}" if query else "/feed"
        reader = Reader(await self.enter_async_context(client.get(path, headers=headers)))
        assert "text/event-stream" == reader.response.headers["Content-Type"]
        assert RETRY == await reader.next()
        return reader


def event(told: SSE) -> str:
    """An event as it is sent."""
    return encode_sse(told).decode()


async def collect(reader: AsyncIterator[SSE], count: int) -> list[tuple[str | None, Any]]:
    """The names and data of a reader's next events."""
    seen = [await anext(reader) for _ in range(count)]
    return [(told.event, told.data) for told in seen if told.retry is None]


# --- through a running server


async def test_who_comes_first_gets_what_comes_from_then_on() -> None:
    """The stream opens at once with the time to come back in, then each event with its id."""
    feed = ReplayBuffer()
    feed.append("before")

    async with (
        asyncio.timeout(SECONDS),
        running(resources={"feed": serving(feed)}) as server,
        Readers(server) as readers,
    ):
        reader = await readers.come()
        one, two = feed.append({"a": 1}), feed.append("x\ny", event="note")
        told = await reader.next() + await reader.next()

    assert (
        f'data: {{"a":1}}\nid: {one.id}\n\nevent: note\ndata: x\ndata: y\nid: {two.id}\n\n' == told
    )


@pytest.mark.parametrize("query", [False, True], ids=["by header", "by query"])
async def test_who_comes_back_gets_what_it_missed_and_goes_on(query: bool) -> None:  # noqa: FBT001
    """`Last-Event-ID`, or `?lastEventId=`, says where; nothing is told twice, nothing is lost."""
    feed = ReplayBuffer()
    async with asyncio.timeout(SECONDS), running(resources={"feed": serving(feed)}) as server:
        async with Readers(server) as readers:
            reader = await readers.come()
            last = feed.append("a")
            assert event(last) == await reader.next()
        missed = [feed.append("b"), feed.append("c")]
        async with Readers(server) as readers:
            reader = await readers.come(str(last.id), query=query)
            replayed = [await reader.next(), await reader.next()]
            live = feed.append("d")
            replayed.append(await reader.next())

    assert [event(told) for told in (*missed, live)] == replayed


@pytest.mark.parametrize(
    ("header", "query", "expected"),
    [
        ("a-1", "b-2", "a-1"),
        (None, "b-2", "b-2"),
        (None, "b%2D2%20%C3%9F", "b-2 ß"),
        ("", "b-2", "b-2"),
        (None, "", None),
        (None, None, None),
    ],
)
async def test_the_header_counts_before_the_query(
    header: str | None, query: str | None, expected: str | None
) -> None:
    """Who cannot set a header puts it into the query; empty ones are none."""

    class Asks(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> list[str | None]:
            return [context.last_event_id]

    headers = {} if header is None else {"Last-Event-ID": header}
    path = "/asks" if query is None else f"/asks?x=1&lastEventId={query}"
    async with (
        running(resources={"asks": Asks}) as server,
        server.session("") as client,
        client.get(path, headers=headers) as response,
    ):
        assert [expected] == await response.json()


async def test_who_asks_for_what_is_gone_is_told_how_much() -> None:
    """A `replay-gap` with the number comes first, then the oldest that is held, then live."""
    feed = ReplayBuffer(max_events=2)
    async with asyncio.timeout(SECONDS), running(resources={"feed": serving(feed)}) as server:
        first, second, *held = [feed.append(str(number)) for number in range(4)]
        async with Readers(server) as readers:
            reader = await readers.come(str(first.id))
            told = [await reader.next() for _ in range(3)]

    gap = f'event: replay-gap\ndata: {{"missed":1}}\nid: {second.id}\n\n'
    assert [gap, *map(event, held)] == told


async def test_who_comes_from_another_run_is_told_so() -> None:
    """Ids of an earlier server are not mistaken for this one's: nobody knows what is missed."""
    old, feed = ReplayBuffer(), ReplayBuffer()
    stale = old.append("old")
    async with asyncio.timeout(SECONDS), running(resources={"feed": serving(feed)}) as server:
        held = feed.append("new")
        async with Readers(server) as readers:
            reader = await readers.come(str(stale.id))
            told = [await reader.next(), await reader.next()]

    run = str(held.id).partition("-")[0]
    assert [f'event: replay-gap\ndata: {{"missed":null}}\nid: {run}-0\n\n', event(held)] == told


async def test_many_readers_get_the_same_feed() -> None:
    """Each has all events in order, wherever it began."""
    feed = ReplayBuffer()
    begin = feed.append("begin")
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"feed": serving(feed)}) as server,
        Readers(server) as readers,
    ):
        crowd = [await readers.come(str(begin.id)) for _ in range(20)]
        sent = [feed.append(str(number)) for number in range(50)]
        for reader in crowd:
            assert [event(told) for told in sent] == [await reader.next() for _ in sent]


async def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    """The feed forgets who waits for it, and costs the others nothing."""
    feed = ReplayBuffer()
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"feed": serving(feed)}) as server,
        Readers(server) as readers,
    ):
        stays = await readers.come()
        async with Readers(server) as others:
            await others.come()
            await until(lambda: len(feed._waiting) == 2)
        await until(lambda: len(feed._waiting) == 1)
        assert 1 == len(server.server.health.stopping._callbacks)
        told = feed.append("a")
        assert event(told) == await stays.next()


async def test_a_closed_feed_ends_its_streams_in_good_form() -> None:
    """Readers get all that is held, then the stream's end; a late one too."""
    feed = ReplayBuffer()
    begin = feed.append("begin")
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"feed": serving(feed)}) as server,
        Readers(server) as readers,
    ):
        reader = await readers.come()
        last = feed.append("last")
        feed.close()
        assert event(last) == await reader.rest()
        late = await readers.come(str(begin.id))
        assert event(last) == await late.rest()

    with pytest.raises(ValueError, match="closed"):
        feed.append("more")


async def test_a_feed_ends_as_the_server_begins_to_stop() -> None:
    """No reader keeps the server waiting, and none is cut: each may come back elsewhere."""
    feed = ReplayBuffer()
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(resources={"feed": serving(feed)}))
        async with Readers(server) as readers:
            reader = await readers.come()
            stopping = asyncio.create_task(stack.pop_all().aclose())
            assert "" == await reader.rest()
            await stopping

    assert set() == feed._waiting


# --- what is held


def numbered(feed: ReplayBuffer, count: int) -> list[SSE]:
    """So many events of ten bytes of data."""
    return [feed.append(f"{number:010}") for number in range(count)]


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


async def test_what_is_too_old_is_dropped_when_it_is_not_asked_for_either() -> None:
    """Age counts from when an event was added, also while nothing new comes."""
    clock = Clock()
    feed = ReplayBuffer(max_age=60, clock=clock)
    first, second = numbered(feed, 2)
    clock.now += 30
    numbered(feed, 1)
    clock.now += 31

    assert 1 == len(feed)
    reader = feed.since(str(first.id))
    assert [("replay-gap", {"missed": 1}), (None, "0000000000")] == await collect(reader, 3)
    clock.now += 30
    assert (0, 0) == (len(feed), feed.size)
    assert [("replay-gap", {"missed": 1})] == await collect(feed.since(str(second.id)), 2)


BOUNDS: dict[str, tuple[Callable[[], ReplayBuffer], int]] = {
    "events": (lambda: ReplayBuffer(max_events=3), 3),
    "bytes": (lambda: ReplayBuffer(max_bytes=120), 3),
    "neither": (ReplayBuffer, 100),
}


@pytest.mark.parametrize(("make", "held"), BOUNDS.values(), ids=BOUNDS)
def test_a_feed_holds_no_more_than_it_may(make: Callable[[], ReplayBuffer], held: int) -> None:
    """Beyond its bounds the oldest goes; the size is that of what is sent."""
    feed = make()

    kept = numbered(feed, 100)[-held:]

    assert held == len(feed)
    assert sum(len(encode_sse(told)) for told in kept) == feed.size


def test_an_event_larger_than_the_feed_is_refused() -> None:
    """Who makes it learns of it; what is held stays."""
    feed = ReplayBuffer(max_bytes=100)
    feed.append("small")

    with pytest.raises(ValueError, match=r"an event of \d+ bytes; this ReplayBuffer holds 100"):
        feed.append("x" * 100)

    assert 1 == len(feed)
    assert str(feed.append("next").id).endswith("-2")


async def test_an_event_is_as_it_was_when_it_was_added() -> None:
    """What becomes of its data later is no news; what has no JSON form is refused at once."""
    feed = ReplayBuffer()
    data = {"a": 1}
    begin = feed.append("begin")
    feed.append(data)
    data["a"] = 2

    assert [(None, '{"a":1}')] == await collect(feed.since(str(begin.id)), 2)
    with pytest.raises(TypeError):
        feed.append(object())
    assert 2 == len(feed)


UNKNOWN = ["", "-", "nonsense", "{run}", "{run}-", "{run}--1", "{run}-3", "{run}-²", "{run}-1x"]
UNKNOWN += ["{run}-" + "9" * 5000, "other-1", "{run}-1-1"]


@pytest.mark.parametrize("asked", UNKNOWN, ids=lambda text: text[:12])
async def test_an_id_that_the_feed_never_gave_is_a_gap(asked: str) -> None:
    """It goes on with the oldest that is held, and nobody knows what is missed."""
    feed = ReplayBuffer()
    run = str(numbered(feed, 2)[0].id).partition("-")[0]

    told = await collect(feed.since(asked.replace("{run}", run)), 4)

    assert [("replay-gap", {"missed": None}), (None, "0000000000"), (None, "0000000001")] == told


async def test_the_place_after_a_gap_is_known_again() -> None:
    """Who leaves right after it comes back with the gap's id, and has missed nothing since."""
    feed = ReplayBuffer(max_events=1)
    first, _, last = numbered(feed, 3)
    reader = feed.since(str(first.id))
    _, gap = await anext(reader), await anext(reader)

    assert [(None, last.data)] == await collect(feed.since(str(gap.id)), 2)


async def test_a_reader_that_is_too_slow_is_told_how_much_it_missed() -> None:
    """It holds nothing of its own: what was dropped meanwhile is a gap in its midst."""
    feed = ReplayBuffer(max_events=2)
    reader = feed.since(None)
    await anext(reader)
    numbered(feed, 2)
    assert [(None, "0000000000")] == await collect(reader, 1)

    numbered(feed, 5)

    expected = [("replay-gap", {"missed": 4}), (None, "0000000003"), (None, "0000000004")]
    assert expected == await collect(reader, 3)


async def test_a_reader_begins_where_it_was_asked_for() -> None:
    """Events between `since` and the first step are not lost."""
    feed = ReplayBuffer()
    reader = feed.since(None)
    numbered(feed, 1)

    assert [(None, "0000000000")] == await collect(reader, 2)


async def test_a_reader_may_have_an_end_of_its_own() -> None:
    """`until` is any signal, outside of a request as well."""
    feed, end = ReplayBuffer(), AbortController()
    reader = feed.since(None, until=end.signal)
    await anext(reader)
    waiting = asyncio.ensure_future(anext(reader, "ended"))
    await until(lambda: bool(feed._waiting))

    end.abort("enough")

    assert "ended" == await waiting
    assert set() == feed._waiting


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.just("append"), st.integers(0, 2)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 120),
)
def test_what_is_read_and_what_is_missed_is_all_there_was(
    steps: list[Any], max_events: int, most_bytes: int
) -> None:
    """However appends and three readers interleave, each reader's account adds up."""

    async def play() -> None:
        feed = ReplayBuffer(max_events=max_events, max_bytes=60 + most_bytes)
        readers = [feed.since(None) for _ in range(3)]
        for reader in readers:
            await anext(reader)
        accounts = [0, 0, 0]
        appended = 0
        for step in steps:
            if step == "append":
                appended += 1
                feed.append(appended)
                assert len(feed) <= max_events
                assert feed.size <= 60 + most_bytes
            elif accounts[step] < appended:
                told = await anext(readers[step])
                missed = told.data["missed"] if told.event else 1
                accounts[step] += missed
                assert missed > 0
                assert told.event or told.data == str(accounts[step])
                assert str(told.id).endswith(f"-{accounts[step]}")

    asyncio.run(play())
