"""Streams that come fast: what comes within a moment goes on together, and nothing else changes."""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from harperpy.plugins.openai_pace import Pace

from harperpy.testing import RunningServer, chunk, running
from helpers import HELLO, events, provider, until
from raw_provider import DONE, END, HEAD, Provider, certificate, event, piece, read_request

STREAMS, EVENTS = 12, 150
STREAMED = {**HELLO, "stream": True}
WORDS = [f" {number}" if number % 7 else f'"\u00e9\n{number}' for number in range(EVENTS)]


def text(said: str, number: int) -> bytes:
    """The event of a piece of text; not all of them are made in the same way."""
    told = event(chunk({"content": said}))
    return told.replace(b'"choices"', b'"of":"another","choices"') if number % 50 == 49 else told


class Fast(Provider):
    """A provider that says its words one soon after the other, then `last`, or waits."""

    def __init__(self, last: bytes | None) -> None:
        super().__init__()
        self.last = last

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.open += 1
        try:
            while True:
                await read_request(reader)
                writer.write(HEAD)
                for number, word in enumerate(WORDS):
                    writer.write(piece(text(word, number)))
                    await asyncio.sleep(0.001)
                if self.last is None:
                    await reader.read()
                writer.write(self.last or b"")
                if not self.last:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.transport.abort()


@asynccontextmanager
async def speaking(
    last: bytes | None, path: Path | None = None
) -> AsyncGenerator[tuple[RunningServer, Fast]]:
    """A server in front of such a provider."""
    context = None
    if path is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(path)
    them = Fast(last)
    listener = await asyncio.start_server(them.serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        scheme = "http" if path is None else "https"
        async with (
            asyncio.timeout(60),
            running(provider(f"{scheme}://localhost:{port}/v1")) as server,
        ):
            yield server, them


async def answer(client: aiohttp.ClientSession) -> tuple[int, str]:
    """In how many parts an answer came, and all of it."""
    parts, told = 0, b""
    async with client.post("/v1/chat/completions", json=STREAMED) as response:
        async for data, whole in response.content.iter_chunks():
            parts += whole
            told += data
    return parts, told.decode()


async def answers(server: RunningServer) -> list[tuple[int, str]]:
    """Those of many chats at once."""
    async with server.session() as client:
        return await asyncio.gather(*(answer(client) for _ in range(STREAMS)))


def words(told: str) -> list[str]:
    """The pieces of text of an answer, without what ends it."""
    said = [one["choices"][0]["delta"] for one in events(told) if isinstance(one, dict)]
    return [delta["content"] for delta in said if delta.get("content")]


@pytest.mark.parametrize("secure", [False, True])
async def test_what_comes_fast_on_many_streams_goes_on_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, secure: bool
) -> None:
    """In fewer parts than it came in; all of it, in its order, over connections used again."""
    path = certificate(tmp_path) if secure else None
    if secure:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    last = piece(event(chunk({}, finish_reason="stop")) + DONE) + END
    async with speaking(last, path) as (server, them):
        told = [*await answers(server), *await answers(server)]
        rows = await server.rows()
        assert STREAMS >= them.open

    for _, one in told:
        assert WORDS == words(one)
        assert one.endswith("data: [DONE]\n\n")
    assert sum(parts for parts, _ in told) < len(told) * EVENTS / 2
    counted = {(row["success"], row["finish_reason"], row["completion_tokens"]) for row in rows}
    assert {(True, "stop", rows[0]["completion_tokens"])} == counted
    assert 2 * STREAMS == len(rows)


async def test_what_breaks_off_while_it_comes_fast_says_so_at_its_end() -> None:
    """After all that came before it."""
    async with speaking(b"") as (server, _):
        told = await answers(server)
        rows = await server.rows()
    for _, one in told:
        *said, end = one.removesuffix("\n\n").split("\n\n")
        assert WORDS == words("\n\n".join(said) + "\n\n")
        assert "server_error" == json.loads(end.removeprefix("data: "))["error"]["type"]
    assert [False] * STREAMS == [row["success"] for row in rows]


async def test_who_leaves_while_it_comes_fast_is_not_answered_on() -> None:
    """The provider sees each of them go."""
    async with speaking(None) as (server, them):
        async with server.session() as client:
            asked = [client.post("/v1/chat/completions", json=STREAMED) for _ in range(STREAMS)]
            responses = await asyncio.gather(*asked)
            for response in responses:
                await response.content.readuntil(b" 29")
                response.close()
        await until(lambda: not them.open)
        rows = await server.rows()
    assert [(False, "aborted")] * STREAMS == [(row["success"], row["error_code"]) for row in rows]


def beside(others: int) -> dict[Pace, None]:
    """So many streams that come fast, all of them read a second after the loop began."""
    fast: dict[Pace, None] = {}
    for _ in range(others):
        pace = Pace(fast)
        pace.last = 1.0
        fast[pace] = None
    return fast


# When each read is, what it brings, and how long after it nothing is read beside 19 others.
READS = {
    "as models speak": [(0.02, 300, 0.0), (0.04, 300, 0.0), (0.06, 300, 0.0), (0.08, 300, 0.0)],
    "fast": [(1.0, 300, 0.0), (1.001, 300, 0.0), (1.002, 300, 0.0134), (1.0155, 4000, 0.0134)],
    "much at once": [(1.0, 300, 0.0), (1.001, 300, 0.0), (1.002, 20000, 0.0), (1.003, 300, 0.0134)],
    "several at once": [(1.0, 300, 0.0), (1.003, 2500, 0.0134)],
    "much, read late": [(1.0, 300, 0.0), (1.012, 2500, 0.0134), (1.04, 4000, 0.0134)],
    "little, read late": [(1.0, 300, 0.0), (1.008, 300, 0.0), (1.016, 300, 0.0), (1.03, 2500, 0.0)],
    "slow again": [(1.0, 300, 0.0), (1.001, 300, 0.0), (1.002, 300, 0.0134), (1.03, 300, 0.0)],
}


@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_a_stream_rests_only_while_it_comes_fast_with_others(
    reads: list[tuple[float, int, float]],
) -> None:
    """Alone it never does; with any number of others no longer than a thirtieth of a second."""
    for others, most in ((0, 0.0), (19, 1.0), (10_000, 0.03)):
        fast = beside(others)
        pace = Pace(fast)
        rests = [pace.rest(now, size) for now, size, _ in reads]
        if others == 19:
            assert [rest for *_, rest in reads] == pytest.approx(rests, abs=1e-4)
        assert all(rest <= most for rest in rests)
        pace.end()
        assert others == len(fast)


def test_a_stream_that_becomes_slow_rests_no_more() -> None:
    """Although what comes in a rest is there at its end."""
    pace = Pace(beside(60))
    came = [1.0, 1.001, 1.002, *(1.02 + number / 50 for number in range(100))]
    rests, free = list[float](), 0.0
    while came:
        now = max(free, came[0])
        read = [moment for moment in came if moment <= now]
        rests.append(pace.rest(now, 300 * len(read)))
        free = now + rests[-1]
        del came[: len(read)]
    assert 10 < sum(rest > 0 for rest in rests) < 20
    assert not any(rests[30:])


def test_streams_that_fall_silent_let_the_others_go_on() -> None:
    """Those that think, or wait for a tool, take no reads from one that comes fast."""
    fast = beside(60)
    pace = Pace(fast)
    rests = [pace.rest(2 + number / 500, 300) for number in range(100)]
    assert {pace: None} == fast
    assert not any(rests[70:])
