"""What a provider may send, and what of it is understood: HTTP/1.1 read as RFC 9112 says."""

import asyncio
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harperpy import Body, Context, RequestTarget, Resource
from harperpy.testing import RunningServer, running
from helpers import HELLO, Answered, ask, provider, uncollected, until
from raw_provider import (
    HEAD,
    OK,
    Provider,
    Send,
    certificate,
    connections,
    event,
    piece,
    said,
    sized,
)

CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def answering(
    *answers: bytes | Send, more: str = "", **options: Any
) -> AsyncGenerator[tuple[RunningServer, Provider]]:
    """A server in front of a provider with these answers; afterwards it answers "again"."""
    them = Provider()
    them.answers = [*answers]
    listener = await asyncio.start_server(them.serve, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with running(provider(f"http://127.0.0.1:{port}/v1", more), **options) as server:
            yield server, them


async def make(server: RunningServer, *, stream: bool = False) -> Answered:
    """The answer to a chat."""
    return await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "stream": stream})


def text_of(answer: Answered) -> str:
    """What it says, which must be well."""
    assert 200 == answer.status, answer.text
    return answer.json["choices"][0]["message"]["content"]


def letters(data: bytes) -> Send:
    """Each byte by itself."""

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)

    return send


HI = said("hi")
WELL: dict[str, bytes | Send] = {
    "with its length": sized(HI),
    "in chunks": CHUNKED + piece(HI[:9]) + piece(HI[9:]) + b"0\r\n\r\n",
    "in chunks of a byte": CHUNKED + b"".join(piece(bytes([one])) for one in HI) + b"0\r\n\r\n",
    "with extensions of chunks": CHUNKED + piece(HI, b";a=b;c") + b"0\r\n\r\n",
    "with trailers": CHUNKED + piece(HI) + b"0\r\nX-Sum: 2\r\n\r\n",
    "to the end of the connection": OK + b"\r\n" + HI,
    "by HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + HI,
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\n" + sized(HI),
    "after 103": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + sized(HI),
    "without a reason": sized(HI, status=b"HTTP/1.1 200\r\n"),
    "with odd letters": sized(HI, b"x-A:\t \xe9 ", b"TRAILER:", b"Content-Encoding: IDENTITY"),
    "byte by byte": letters(sized(HI)),
    "byte by byte, in chunks": letters(CHUNKED + piece(HI, b";a") + b"0\r\nX: y\r\n\r\n"),
}


AGAIN = sized(said("again"))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("answer", WELL.values(), ids=WELL)
async def test_what_is_well_formed_is_read(answer: bytes | Send, before: int) -> None:
    """However it is framed and cut, and whatever has come over its connection before."""
    async with answering(*[AGAIN] * before, answer) as (server, _):
        assert ["again"] * before == [text_of(await make(server)) for _ in range(before)]
        assert "hi" == text_of(await make(server))
        assert "again" == text_of(await make(server))


TWICE = b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
ODD: dict[str, bytes] = {
    "two lengths": OK + TWICE % (len(HI), len(HI) + 1) + HI,
    "one length twice": OK + TWICE % (len(HI), len(HI)) + HI,
    "a length with a sign": OK + b"Content-Length: +%d\r\n\r\n" % len(HI) + HI,
    "a length below nothing": OK + b"Content-Length: -1\r\n\r\n" + HI,
    "a length and chunks": OK
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    + piece(HI)
    + b"0\r\n\r\n",
    "chunks and a length": OK
    + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"
    + piece(HI)
    + b"0\r\n\r\n",
    "chunks twice": OK
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
    + piece(HI)
    + b"0\r\n\r\n",
    "chunks in disguise": OK + b"Transfer-Encoding: xchunked\r\n\r\n" + HI,
    "chunks that are packed": OK
    + b"Transfer-Encoding: gzip, chunked\r\n\r\n"
    + piece(HI)
    + b"0\r\n\r\n",
    "a body that is packed": sized(HI, b"Content-Encoding: gzip"),
    "a chunk of no size": CHUNKED + b";a=b\r\n" + HI + b"\r\n0\r\n\r\n",
    "a chunk of 0x": CHUNKED + b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(HI), HI),
    "a chunk of any size": CHUNKED + b"f" * 20 + b"\r\n" + HI + b"\r\n0\r\n\r\n",
    "a chunk that is longer": CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HI) - 1, HI),
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: %d\n\n%b" % (len(HI), HI),
    "a space before the colon": sized(HI, b"X : y"),
    "a line that goes on": sized(HI, b"X: y", b" z"),
    "a line without a colon": sized(HI, b"X"),
    "a NUL in the head": sized(HI, b"X: a\0b"),
    "a CR in the head": sized(HI, b"X: a\rb"),
    "HTTP/2": sized(HI, status=b"HTTP/2.0 200 OK\r\n"),
    "no status line": HI,
    "a status of four digits": sized(HI, status=b"HTTP/1.1 2000 OK\r\n"),
    "a status below 100": sized(HI, status=b"HTTP/1.1 099 OK\r\n"),
    "another protocol": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    + sized(HI),
    "nothing": b"",
    "half a head": OK,
    "half a body": sized(HI)[:-3],
    "half a chunk": (CHUNKED + piece(HI))[:-9],
    "no last chunk": CHUNKED + piece(HI),
    "a head of a megabyte": sized(HI, *(b"X-%d: %b" % (at, b"y" * 999) for at in range(1000))),
    "a line of a megabyte": sized(HI, b"X: " + b"y" * (1 << 20)),
    "a megabyte of extensions": CHUNKED + piece(HI, b";" + b"a" * (1 << 20)) + b"0\r\n\r\n",
    "a megabyte of trailers": CHUNKED
    + piece(HI)
    + b"0\r\n"
    + b"".join(b"X-%d: %b\r\n" % (at, b"y" * 999) for at in range(1000))
    + b"\r\n",
    "a thousand times 100": b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + sized(HI),
}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
async def test_what_two_could_read_differently_is_not_read(answer: bytes, before: int) -> None:
    """It is a 502 that says nothing of it, its connection is never used again, the next call is."""
    if not answer and before:
        pytest.skip("a connection that ends while it is kept is not an answer")
    async with answering(*[AGAIN] * before, answer) as (server, them):
        assert ["again"] * before == [text_of(await make(server)) for _ in range(before)]
        refused = await make(server)
        assert "again" == text_of(await make(server))
        row = (await server.rows())[-1 - before]

    told = "The model provider failed to answer."
    assert (502, told) == (refused.status, refused.json["error"]["message"])
    assert (False, "backend_error") == (row["success"], row["error_code"])
    assert [before + 1, 1] == them.asked


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("answer", [b"", HI, sized(HI)[:-3]], ids=["none", "odd", "half"])
async def test_what_failed_goes_with_all_that_it_was_asked_with(
    caplog: pytest.LogCaptureFixture, answer: bytes, before: int
) -> None:
    """A prompt may be large, and the collector comes seldom."""
    # What is logged is kept, with its traceback.
    caplog.set_level("CRITICAL", "harperpy")
    async with answering(*[AGAIN] * before, answer) as (server, _):
        assert ["again"] * before == [text_of(await make(server)) for _ in range(before)]
        await server.rows()
        with uncollected() as found:
            assert (200 if before and not answer else 502) == (await make(server)).status
            await server.rows()

    assert set() == found


@pytest.mark.parametrize("more", [0, 1, -1, 9])
async def test_a_head_that_was_seen_before_promises_no_more_than_it_says(more: int) -> None:
    """Of a body that is too short or too long nothing is taken for what an answer before held."""
    body = said("other")
    told = OK + b"Content-Length: %d\r\n\r\n" % (len(body) + more) + body

    async with answering(AGAIN, AGAIN, told) as (server, them):
        answers = [await make(server) for _ in range(4)]

    expected = [200, 200, 502 if more else 200, 200]
    assert expected == [answer.status for answer in answers]
    assert [3, 1] == them.asked


async def test_answers_of_one_head_have_each_their_own_length() -> None:
    """One after the other, over one connection; what is not there yet is waited for."""
    texts = ["again" + "." * size for size in (0, 9, 100, 1, 70_000, 10, 0)]

    async def halves(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = sized(said("again"))
        for begin, end in ((0, -20), (-20, len(data))):
            writer.write(data[begin:end])
            await writer.drain()
            await asyncio.sleep(0.05)

    async with answering(*(sized(said(text)) for text in texts), halves) as (server, them):
        assert texts == [text_of(await make(server)) for _ in texts]
        assert "again" == text_of(await make(server))
    assert [len(texts) + 1] == them.asked


async def test_an_answer_that_nobody_asked_for_is_nobodys() -> None:
    """Neither behind another in one read, nor on a connection that waits."""
    smuggled = sized(said("smuggled"))
    dropped = asyncio.Event()

    async def later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sized(HI))
        await writer.drain()
        writer.write(smuggled)
        await reader.read()
        dropped.set()

    for before in (0, 2):
        for answer in (sized(HI) + smuggled, later):
            dropped.clear()
            async with answering(*[AGAIN] * before, answer) as (server, them):
                assert ["again"] * before == [text_of(await make(server)) for _ in range(before)]
                assert "hi" == text_of(await make(server))
                if answer is later:
                    await asyncio.wait_for(dropped.wait(), 30)
                assert "again" == text_of(await make(server))
            assert before + 2 == sum(them.asked)
            assert before + 1 == them.asked[0]


def test_an_answer_is_none_to_what_has_not_left_yet() -> None:
    """That is asked over another connection, and neither it nor what follows gets another's."""
    writers: list[asyncio.StreamWriter] = []

    async def doubled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sized(HI))
        writers.append(writer)
        await reader.read()

    class Three(Resource):
        """What three calls are answered, of which the second has just been made."""

        public = True

        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> list[str]:
            first = await context.models.generate("hi")
            asking = asyncio.ensure_future(context.models.generate("hi"))
            await asyncio.sleep(0)
            writers[0].write(sized(said("smuggled")))
            answers = [first, await asking, await context.models.generate("hi")]
            return [answer.content for answer in answers]

    async def call() -> None:
        async with answering(doubled, resources={"three": Three}) as (server, them):
            async with asyncio.timeout(20):
                answered = await ask(server, "POST", "/three")
        assert ["hi", "again", "again"] == answered.json
        assert [1, 2] == them.asked

    # Another loop sends before it reads.
    pytest.importorskip("uvloop").run(call())


async def test_a_connection_is_used_again() -> None:
    """By one call after the other; what two make at once goes over two."""
    async with answering(*[sized(said("again"))] * 3) as (server, them):
        for _ in range(3):
            assert "again" == text_of(await make(server))
        assert [3] == them.asked
        await asyncio.gather(*(make(server) for _ in range(2)))
        assert [4, 1] == them.asked


AGAIN_IN_CHUNKS = CHUNKED + piece(said("again")) + b"0\r\n\r\n"


@pytest.mark.parametrize("before", [AGAIN, AGAIN_IN_CHUNKS], ids=["with its length", "in chunks"])
async def test_who_leaves_ends_what_was_asked_and_nothing_else(before: bytes) -> None:
    """Over a connection that has brought an answer; the next call has a connection of its own."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        ended.set()

    async with answering(before, before, hang) as (server, them):
        assert ["again", "again"] == [text_of(await make(server)) for _ in range(2)]
        waiting = asyncio.ensure_future(make(server))
        await asyncio.wait_for(asked.wait(), 30)
        waiting.cancel()
        await asyncio.wait_for(ended.wait(), 30)
        assert "again" == text_of(await make(server))
    assert [3, 1] == them.asked


class Leaving(Resource):
    """Asks a model that does not answer, and leaves after ever more turns of the loop."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> None:
        """Each time over a connection of its own."""
        for turns in range(20):
            call = asyncio.ensure_future(context.models.generate("hi"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_leaves_while_a_connection_is_made_leaves_none(loop: str) -> None:
    """Whenever that is, nothing is left of it, here or at the provider."""

    async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async def leave() -> None:
        before = len(connections())
        async with answering(*[hang] * 2000, resources={"leaving": Leaving}) as (server, them):
            # A machine that is busy may not come to connect in so many turns.
            while not them.asked:
                assert 204 == (await ask(server, "POST", "/leaving")).status
            await until(lambda: not them.open)
            await until(lambda: len(connections()) == before)

    pytest.importorskip(loop).run(leave())


@pytest.mark.parametrize("begin", [b"", OK, b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_head_has_its_time_as_a_whole(begin: bytes) -> None:
    """However steadily its bytes drip."""

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        for at in range(100_000):
            writer.write(b"X-%d: y\r\n" % at if begin == OK else begin or b"H"[at:])
            await writer.drain()
            await asyncio.sleep(0.01)

    async with answering(drip, more="firstByteTimeoutMs: 200") as (server, _):
        refused = await make(server)
        assert (504, "timeout") == (refused.status, refused.json["error"]["code"])
        assert "again" == text_of(await make(server))


async def test_a_body_that_does_not_go_on_has_its_time() -> None:
    """From the last read on."""

    async def stop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sized(HI)[:-2])
        await reader.read()

    async with answering(stop, more="idleTimeoutMs: 200") as (server, _):
        refused = await make(server)
    assert (504, "timeout") == (refused.status, refused.json["error"]["code"])


async def test_a_stream_that_nobody_reads_is_not_read_on() -> None:
    """The provider is held back; when the client leaves, its connection ends."""
    sent: list[int] = [0]
    ended = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = piece(event({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]}))
        writer.write(HEAD)
        try:
            while True:
                writer.write(data)
                async with asyncio.timeout(1):
                    await writer.drain()
                sent[0] += len(data)
        except TimeoutError:
            held.set()
            await reader.read()
        except ConnectionError:
            pass
        finally:
            ended.set()

    held = asyncio.Event()
    async with answering(flood) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        body = msgspec.json.encode({**HELLO, "stream": True})
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (server.api_key.encode(), len(body), body)
        )
        await reader.readline()
        await asyncio.wait_for(held.wait(), 30)
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 30)
    assert sent[0] < 64 << 20


@pytest.mark.parametrize("known", [True, False])
async def test_a_provider_shows_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """Over TLS; who is not known by its certificate is told nothing."""
    path = certificate(tmp_path)
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    them = Provider()
    listener = await asyncio.start_server(them.serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with running(provider(f"https://localhost:{port}/v1")) as server:
            answers = [await make(server) for _ in range(2)]

    if known:
        assert ["again", "again"] == [text_of(one) for one in answers]
        assert [2] == them.asked
    else:
        assert [502, 502] == [one.status for one in answers]
        assert not sum(them.asked)
