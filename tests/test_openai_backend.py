"""The `openai` backend before providers of all kinds; what of them fails: test_error_table.py."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harperpy.plugins.openai import OpenAI
from harperpy.plugins.openai_answers import ChunkReader
from harperpy.plugins.openai_protocol import chat_body
from harperpy.resources.models.v1.chat_completions import V1ChatCompletions

from harperpy import (
    BackendError,
    ConfigError,
    GenerateChunk,
    GenerateOpts,
    Message,
    ModelConfig,
    ModelEntry,
    Prompt,
    Secret,
)
from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer, chunk, streamed, whole
from helpers import HELLO, Answered, ask, events, provider

pytestmark = pytest.mark.usefixtures("transport")

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (CHAT, HELLO),
    "stream": (CHAT, {**HELLO, "stream": True}),
    "embed": (EMBEDDINGS, {"model": "gpt-4o-mini", "input": "hi"}),
}
KEY = "made-up-key-of-the-provider"
every_call = pytest.mark.parametrize("call", CALLS)


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server whose models are the scripted upstream's, which knows it by a key."""
    async with running(provider(upstream.url, f'apiKey: "{KEY}"')) as server:
        yield server


async def make(server: RunningServer, call: str) -> Answered:
    """The answer to one of the three calls."""
    path, body = CALLS[call]
    async with asyncio.timeout(20):
        return await ask(server, "POST", path, json=body)


def error(answer: Answered) -> dict[str, Any]:
    """The error object of an answer, which holds nothing else."""
    body = answer.json
    assert {"error"} == set(body)
    assert {"message", "type", "param", "code"} == set(body["error"])
    return body["error"]


async def only_row(server: RunningServer) -> dict[str, Any]:
    """The one call that was recorded."""
    (row,) = await server.rows()
    return row


@pytest.mark.parametrize(
    "body",
    [
        b"<html>no</html>",
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"error": null}',
        b'{"error": {"message": ["no"]}}',
        b'{"detail": ["no"]}',
        b'{"error": "\xed\xa0"}',
    ],
)
async def test_a_refusal_without_words_gets_ours(
    gateway: RunningServer, upstream: ScriptedUpstream, body: bytes
) -> None:
    """What is not an OpenAI error is not quoted; status and envelope hold all the same."""
    upstream.script(Answer(status=400, body=body))
    answer = await make(gateway, "whole")

    assert 400 == answer.status
    assert {
        "message": "The model provider answered 400.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    } == error(answer)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"error": "Just text."}, ("Just text.", "invalid_request_error", None)),
        ({"error": {"message": "m", "code": 1234}}, ("m", "invalid_request_error", "1234")),
        ({"error": {"message": "m", "type": None}}, ("m", "invalid_request_error", None)),
    ],
)
async def test_other_shapes_of_an_error_are_understood(
    gateway: RunningServer, upstream: ScriptedUpstream, told: Any, expected: Any
) -> None:
    """Compatible providers send text alone, or codes as numbers; clients get OpenAI's shape."""
    upstream.script(Answer(status=400, body=told))
    body = error(await make(gateway, "whole"))

    assert expected == (body["message"], body["type"], body["code"])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: [redacted]."),
        ("Key sk-proj-AbC_123-456789 is spent.", "Key [redacted] is spent."),
        ("Sent 'Authorization: Bearer abc.def'", "Sent 'Authorization: [redacted]"),
        ("x" * 501, "x" * 500),
        ("x" * 490 + " sk-abcdefghijklmnop", "x" * 490 + " [redacted]"[:10]),
        ("x" * 485 + f" {KEY}", "x" * 485 + " [redacted]"),
    ],
)
async def test_a_providers_words_hide_keys_and_end(
    gateway: RunningServer, upstream: ScriptedUpstream, message: str, shown: str
) -> None:
    """Secrets are masked before the message is cut at 500 characters."""
    upstream.script(Answer(status=400, body={"error": {"message": message}}))
    answer = await make(gateway, "whole")

    assert shown == error(answer)["message"]


async def test_our_key_goes_to_the_provider_and_the_callers_does_not(
    upstream: ScriptedUpstream,
) -> None:
    """The provider is told who we are, and nothing of who asks."""
    more = f'apiKey: "{KEY}", organization: org-7'
    async with running(provider(upstream.url, more)) as server:
        for call in CALLS:
            await make(server, call)
        secret = server.api_key

    assert 3 == len(upstream.requests)
    for asked in upstream.requests:
        assert f"Bearer {KEY}" == asked.headers["Authorization"]
        assert "org-7" == asked.headers["OpenAI-Organization"]
        # Firewalls turn away who has none.
        assert "harperpy" == asked.headers["User-Agent"]
        assert secret not in str(asked)


async def test_without_a_key_none_is_sent(upstream: ScriptedUpstream) -> None:
    """A model on one's own machine needs no key."""
    async with running(provider(upstream.url)) as server:
        await make(server, "whole")

    assert "Authorization" not in upstream.requests[0].headers


async def test_openai_itself_needs_a_key() -> None:
    """Without one the server does not start, and says which entry lacks it."""
    config = "models: {generative: {smart: {backend: openai, model: gpt-5}}}"
    with pytest.raises(ConfigError, match=r"models\.generative\.smart\.apiKey"):
        async with running(config):
            pass


@pytest.mark.parametrize("end", ["chat/completions", "embeddings/", "completions"])
async def test_the_address_of_one_endpoint_is_no_base_url(end: str) -> None:
    """Who copied it whole is told before the first call: all that is asked there would be 404."""
    url = f"http://localhost:11434/v1/{end}"
    config = f"models: {{generative: {{default: {{backend: openai, baseUrl: '{url}'}}}}}}"
    expected = rf"models\.generative\.default\.baseUrl: expected what comes before /{end}$"
    with pytest.raises(ConfigError, match=expected):
        async with running(config):
            pass


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (None, "max_completion_tokens"),
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://api.openai.com:443/v1/", "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("https://mine.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("https://mine.cognitiveservices.azure.com/openai/v1", "max_completion_tokens"),
        ("https://api.openai.com.example.org/v1", "max_tokens"),
        ("https://openai.azure.com.example.org/v1", "max_tokens"),
        ("https://example.org/api.openai.com/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_limit_has_the_name_that_the_provider_knows(url: str | None, name: str) -> None:
    """OpenAI's newest models refuse `max_tokens`; most others know nothing else."""
    settings = ModelConfig(backend="openai", model="m", base_url=url, api_key=Secret("x"))
    backend = OpenAI(ModelEntry("generative", "m", settings, Path()))
    prompt = Prompt(messages=[Message(role="user", content="hi")])
    body = msgspec.json.decode(chat_body(prompt, GenerateOpts(max_tokens=5), backend.limit_name))

    assert {name: 5} == {key: value for key, value in body.items() if key.startswith("max_")}


@asynccontextmanager
async def raw_upstream(*connections: list[bytes]) -> AsyncIterator[str]:
    """The URL of a provider that answers the requests of each connection with these bytes.

    A connection is closed after its last answer.
    """
    script = iter(connections)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in next(script):
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def http(body: bytes, kind: str = "application/json", status: str = "200 OK") -> bytes:
    """A complete HTTP answer that lets the connection live."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_a_pooled_connection_that_was_closed_is_no_failure() -> None:
    """A kept connection may end at any moment: the call goes over a new one; both have a row."""
    answer = http(msgspec.json.encode(whole("hello")))
    async with raw_upstream([answer, b""], [answer]) as url, running(provider(url)) as server:
        statuses = [(await make(server, "whole")).status for _ in range(2)]
        rows = await server.rows()

    assert [200, 200] == statuses
    told = [(row["success"], row["error_code"]) for row in reversed(rows)]
    assert [(True, None), (False, "connection_lost"), (True, None)] == told


async def test_a_provider_that_hangs_up_is_not_asked_on_every_pooled_connection() -> None:
    """One that reads a request and closes gets it once more, over a new connection."""
    answer = http(msgspec.json.encode(whole("hello")))
    pooled = [[answer, b""] for _ in range(4)]
    async with (
        raw_upstream(*pooled, [b""], [answer]) as url,
        running(provider(url)) as server,
    ):
        warm = await asyncio.gather(*(make(server, "whole") for _ in range(4)))
        refused = await make(server, "whole")

    assert ([200] * 4, 502) == ([one.status for one in warm], refused.status)


async def test_connections_are_used_again() -> None:
    """Three answers in a row come over one connection."""
    answer = http(msgspec.json.encode(whole("hello")))
    async with raw_upstream([answer] * 3) as url, running(provider(url)) as server:
        statuses = [(await make(server, "whole")).status for _ in range(3)]

    assert [200, 200, 200] == statuses


CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([chunk({"content": "hi"}), "[DONE]"], "stop"),
        ([chunk({"tool_calls": [CALL]}), "[DONE]"], "tool_calls"),
        ([chunk({"content": "hi"}), chunk({}, finish_reason="length")], "length"),
        ([chunk({"content": "hi"}, finish_reason="stop")], "stop"),
        (["[DONE]"], "stop"),
        ([chunk({"content": "hi"}), "[DONE]", chunk({"content": "more"})], "stop"),
        ([chunk({"content": "hi"}), b"data: [DONE]"], "stop"),
    ],
)
async def test_a_stream_that_ends_in_its_own_way_is_complete(
    gateway: RunningServer, upstream: ScriptedUpstream, sent: list[Any], reason: str
) -> None:
    """A reason or `[DONE]` is enough; clients get both, and nothing that comes after."""
    upstream.script(Answer(events=sent))
    answer = await make(gateway, "stream")
    row = await only_row(gateway)

    *_, last, done = events(answer.text)
    assert (reason, "[DONE]") == (last["choices"][0]["finish_reason"], done)
    assert "more" not in answer.text
    assert (True, reason) == (row["success"], row["finish_reason"])


async def test_the_stream_of_an_unusual_provider_is_read(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """CRLF, comments, named events, other choices, empty deltas: all within the standard."""
    encode = msgspec.json.encode
    upstream.script(
        Answer(
            events=[
                b": ping\r\n\r\n",
                b"event: chunk\r\nid: 7\r\ndata:" + encode(chunk({"content": "Hel"})) + b"\r\n\r\n",
                b"retry: 10\n\n",
                {**chunk({"content": "no"}), "choices": [{"index": 1, "delta": {"content": "no"}}]},
                {**chunk({}), "choices": None},
                chunk({"content": ""}),
                chunk({"content": "lo"}),
                chunk({"content": None}, finish_reason="stop"),
            ]
        )
    )
    answer = await make(gateway, "stream")

    deltas = [one["choices"][0]["delta"] for one in events(answer.text)[:-1]]
    assert [{"role": "assistant", "content": "Hel"}, {"content": "lo"}, {}] == deltas


async def test_a_slow_answer_may_take_longer_than_a_silence_in_it(
    upstream: ScriptedUpstream,
) -> None:
    """It is broken off where nothing of it comes for too long, and not before."""
    pieces = [chunk({"content": text}) for text in "slow but sure"]
    slowly = Answer(events=[*pieces, "[DONE]"], pause=0.1)
    upstream.script(slowly, Answer(events=pieces, hang="end"))
    async with running(provider(upstream.url, "idleTimeoutMs: 400")) as server:
        slow, silent = [events((await make(server, "stream")).text) for _ in range(2)]

    texts = [one["choices"][0]["delta"].get("content", "") for one in slow[:-1]]
    assert "slow but sure" == "".join(texts)
    assert "[DONE]" == slow[-1]
    assert "timeout" == silent[-1]["error"]["code"]


async def test_a_stream_that_goes_on_needs_no_sign_of_life(upstream: ScriptedUpstream) -> None:
    """However its events come to the client, each of them is one."""
    upstream.script(Answer(events=streamed(*"abcdefghijkl"), pause=0.1))
    chats = type("Chats", (V1ChatCompletions,), {"keepalive": 0.5})
    async with running(provider(upstream.url), resources={"chats": chats}) as server:
        answer = await ask(server, "POST", "/chats", json={**HELLO, "stream": True})

    assert "abcdefghijkl" in "".join(
        choice["delta"].get("content") or ""
        for one in events(answer.text)[:-1]
        for choice in one["choices"]
    )
    assert "keepalive" not in answer.text


async def test_an_answer_has_its_whole_time_from_when_it_was_asked_for(
    upstream: ScriptedUpstream,
) -> None:
    """However long its connection was kept before, and however steadily it comes."""
    steady = [chunk({"content": text}) for text in "steady"]
    late = Answer(body=whole("late"), pause=0.3)
    upstream.script(Answer(body=whole("at once")), late, Answer(events=steady, pause=0.2))
    async with running(provider(upstream.url, "requestTimeoutMs: 600")) as server:
        answers = [await make(server, "whole")]
        await asyncio.sleep(0.8)
        answers += [await make(server, "whole"), await make(server, "stream")]

    assert [200, 200, 200] == [answer.status for answer in answers]
    told = events(answers[-1].text)
    assert "timeout" == told[-1]["error"]["code"]
    assert 1 < len(told) < 5


def test_what_is_said_of_the_whole_is_no_piece_of_an_answer() -> None:
    """It comes once, with the first piece: until then nothing was answered, and others may."""
    reader = ChunkReader()

    def read(delta: dict[str, Any]) -> Any:
        event = {**chunk(delta), "service_tier": "flex", "usage": None}
        return reader.read(msgspec.json.encode(event).decode())

    assert [] == read({"role": "assistant", "content": ""})
    assert [GenerateChunk(delta_content="a", service_tier="flex")] == read({"content": "a"})
    assert [GenerateChunk(delta_content="b")] == read({"content": "b"})


def test_what_is_said_of_an_empty_answer_comes_at_its_end() -> None:
    """Where no piece follows it comes with the reason."""
    reader = ChunkReader()
    reader.read(msgspec.json.encode({**chunk({}), "system_fingerprint": "fp"}).decode())
    reader.read("[DONE]")

    expected = [GenerateChunk(finish_reason="stop"), GenerateChunk(system_fingerprint="fp")]
    assert expected == [*reader.finish()]


def told(text: str | None = "a", index: int = 0, **more: Any) -> str:
    """An event of a stream as providers write it."""
    choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
    return msgspec.json.encode({"id": "1", "model": "a", "choices": [choice], **more}).decode()


ALIKE = [told(text) for text in "abc"]
NOT_ALIKE: dict[str, list[str]] = {
    "text of all kinds": [told(text) for text in ('"', "\\", "\n", "", "é\u2028", "\U0001f600")],
    "text that stands elsewhere too": [told(text) for text in ("id", "a", "choices", ":", '","')],
    "text that something else is too": [told("a", padding=text) for text in "abca"],
    "text that is a name": [told("finish_reason"), *ALIKE],
    "the whole as before": [told("a", service_tier=tier) for tier in "ttttutttt"],
    "escapes": [told().replace('"a"}', '"\\u0041"}'), told().replace('"a"}', '"\\/"}')],
    "no text": [told(None), told().replace('"a"}', "7}")],
    "more than a text": [told().replace('"a"}', '"b","refusal":"no"}'),
                         told().replace('"a"}', '"b","content":"c"}')],
    "another word of the whole": [told(system_fingerprint="f"), *ALIKE, told(service_tier="t"),
                                  *ALIKE, told(system_fingerprint="f"), *ALIKE],
    "usage": [told(usage={"prompt_tokens": 1, "completion_tokens": 2}), *ALIKE],
    "usage in each": [told(text, usage={"prompt_tokens": 1}) for text in "abcd"],
    "an error": [told(error={"message": "no"}), *ALIKE],
    "what is no event": ["", "{", *ALIKE],
    "the end": ["[DONE]", *ALIKE],
    "the end in other words": [" [DONE]", *ALIKE],
    "a reason": [told().replace("null", '"stop"'), *ALIKE],
    "another choice": [told("x", index=1), told("y"), told("z", index=1), told("x", index=2)] * 4,
    "two choices at once": [told().replace("}]", "}," + told("b", 1).partition("[")[2][:-1])] * 3,
    "never the same": [told(text, padding="x" * at) for at, text in enumerate("abcdefgh")],
    "now and then the same": [told(text, created=at // 3) for at, text in enumerate("abcdefgh")],
}  # fmt: skip


@pytest.mark.parametrize("odd", NOT_ALIKE.values(), ids=NOT_ALIKE)
def test_events_that_are_alike_are_read_as_all_others(odd: list[str]) -> None:
    """What differs in its text alone goes a shorter way, to the same chunks and the same end."""
    for given in ([*ALIKE, *odd], odd, [*ALIKE, *odd, *ALIKE]):
        expected = read(given, one_by_one=True)

        assert expected == read(given, one_by_one=False)


def read(given: list[str], *, one_by_one: bool) -> tuple[list[GenerateChunk], Any]:
    """The chunks of these events, and what is said at their end."""
    reader, chunks = ChunkReader(2), list[GenerateChunk]()
    try:
        if one_by_one:
            for data in given:
                chunks += reader.read(data)
        else:
            reader.read_all(given, chunks)
        return chunks, [*reader.finish()]
    except BackendError as error:
        return chunks, str(error)


def sent_as(*data: str) -> list[bytes]:
    """Each event in a write of its own."""
    return [f"data: {one}\n\n".encode() for one in data]


WRITES: dict[str, list[bytes]] = {
    **{name: sent_as(*ALIKE, *odd, *ALIKE) for name, odd in NOT_ALIKE.items()},
    "several at once": [*sent_as(*ALIKE), b"".join(sent_as(*ALIKE)), *sent_as("[DONE]")],
    "an event in two": [*sent_as(*ALIKE), b"data: " + told()[:30].encode(),
                        told()[30:].encode() + b"\n\n", *sent_as("[DONE]")],
    "an event in the middle of another": [*sent_as(*ALIKE), b'data: {"id', *sent_as(*ALIKE)],
    "lines around the text": sent_as(*ALIKE, told().replace('"a"}', '\n"a"}'), *ALIKE),
    "lines after the text": sent_as(*ALIKE, told().replace('"a"}', '"a"\n}'), *ALIKE),
    "such among others": [*sent_as(*ALIKE), b"".join(
        sent_as(told(), told().replace('"a"}', '"a"\n}'), *ALIKE))],
    "half a text": sent_as(*ALIKE, told().replace('"a"}', '"}'), *ALIKE),
    "a text without its end": sent_as(*ALIKE, told().replace('"a"}', '"a\\"}'), *ALIKE),
    "no text of any encoding": [*sent_as(*ALIKE),
                                *(one.replace(b'"b"}', b'"\xff"}') for one in sent_as(*ALIKE))],
    "comments between": [*sent_as(*ALIKE), b": a\n\n", *sent_as(*ALIKE),
                         b": a\n" + sent_as(told())[0]],
    "a name before": [*sent_as(*ALIKE), b"event: a\n" + sent_as(told())[0], *sent_as(*ALIKE)],
    "a line without an end": [*sent_as(*ALIKE), b"data: " + told().encode() + b"\n", b"\n"],
}  # fmt: skip


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
async def test_a_read_of_events_that_are_alike_is_read_as_any_other(
    gateway: RunningServer, upstream: ScriptedUpstream, writes: list[bytes]
) -> None:
    """It goes a shorter way than one of other line ends, to the same answer and the same row."""
    told: list[str] = []
    for ends in (b"\n", b"\r\n"):
        sent = [one.replace(b"\n", ends) for one in writes]
        upstream.script(Answer(events=sent, pause=0.003))
        answer = await make(gateway, "stream")
        told.append(re.sub(r'"id":"[^"]+"|"created":\d+', "", answer.text))

    counted = ("completion_tokens", "prompt_tokens", "usage_estimated", "finish_reason", "success")
    rows = [[row[name] for name in counted] for row in await gateway.rows()]

    assert told[0] == told[1]
    assert rows[0] == rows[1]


async def test_tool_calls_without_an_index_are_told_apart(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Providers that leave `index` out start a call with its id; clients get it on each piece."""
    pieces = [
        {"id": "a", "function": {"name": "f", "arguments": ""}},
        {"function": {"arguments": "{}"}},
        {"id": "b", "function": {"name": "g", "arguments": "{"}},
        {"function": {"arguments": "}"}},
    ]
    upstream.script(
        Answer(
            events=[
                *(chunk({"tool_calls": [piece]}) for piece in pieces),
                chunk({}, finish_reason="tool_calls"),
                "[DONE]",
            ]
        )
    )
    answer = await make(gateway, "stream")

    deltas = [one["choices"][0]["delta"] for one in events(answer.text)[:-2]]
    calls = [delta["tool_calls"][0] for delta in deltas]
    assert [(0, "a"), (0, None), (1, "b"), (1, None)] == [
        (call["index"], call.get("id")) for call in calls
    ]
    assert ["", "{}", "{", "}"] == [call["function"]["arguments"] for call in calls]


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 1000}, (1000, 2, True)),
        ({"prompt_tokens": 1000, "completion_tokens": -1}, (1000, 2, True)),
        ({"prompt_tokens": 1000, "completion_tokens": None}, (1000, 2, True)),
        ({"completion_tokens": 50}, (5, 50, True)),
        ({"prompt_tokens": -5, "completion_tokens": 50}, (5, 50, True)),
        ({"prompt_tokens": 1e300, "completion_tokens": 50}, (5, 50, True)),
        ({"prompt_tokens": 1000, "completion_tokens": 0}, (1000, 2, True)),
    ],
)
async def test_only_the_count_that_is_missing_is_estimated(
    gateway: RunningServer, upstream: ScriptedUpstream, *, call: str, usage: Any, counted: Any
) -> None:
    """What a provider did report is billed, whether an answer is whole or a stream; so it is told.

    Its details are kept.
    """
    usage = {**usage, "prompt_tokens_details": {"cached_tokens": 3}}
    pieces = [chunk({"content": "hi "}), {**chunk({"content": "you"}), "usage": usage}, "[DONE]"]
    bodies = {
        "whole": Answer(body={**whole("hi you"), "usage": usage}),
        "stream": Answer(events=pieces),
    }
    upstream.script(bodies[call])
    more = {"stream": True, "stream_options": {"include_usage": True}} if call == "stream" else {}
    answer = await ask(gateway, "POST", "/v1/chat/completions", json={**HELLO, **more})
    row = await only_row(gateway)

    told = events(answer.text)[-2]["usage"] if call == "stream" else answer.json["usage"]
    assert counted == (row["prompt_tokens"], row["completion_tokens"], row["usage_estimated"])
    assert counted[:2] == (told["prompt_tokens"], told["completion_tokens"])
    assert (3, 3) == (row["cached_tokens"], told["prompt_tokens_details"]["cached_tokens"])


@every_call
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3.0, "completion_tokens": 2.0}, (3, 2, False)),
        ({"prompt_tokens": "3", "completion_tokens": None}, None),
        ({"prompt_tokens": -1, "completion_tokens": 1.5}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": True}, None),
        ({}, None),
        # An empty object, as PHP writes it.
        ({"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": []}, (3, 2, False)),
        (
            {"prompt_tokens": 3, "completion_tokens": 2, "completion_tokens_details": ""},
            (3, 2, False),
        ),
        ([], None),
        ("", None),
        (False, None),
    ],
)
async def test_usage_that_counts_nothing_is_estimated(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    *,
    call: str,
    usage: Any,
    counted: Any,
) -> None:
    """A good answer is not lost over its usage, and no nonsense reaches the rows."""
    vectors = [{"index": 0, "embedding": [1.0]}]
    answers = {
        "whole": Answer(body={**whole("hi"), "usage": usage}),
        "stream": Answer(events=[{**chunk({"content": "hi"}), "usage": usage}, "[DONE]"]),
        "embed": Answer(body={"data": vectors, "usage": usage}),
    }
    upstream.script(answers[call])
    answer = await make(gateway, call)
    row = await only_row(gateway)

    assert 200 == answer.status
    prompt = row["embedding_tokens" if call == "embed" else "prompt_tokens"]
    assert (counted is None) == row["usage_estimated"]
    if counted is None:
        assert 0 < prompt < 100
    else:
        completion = None if call == "embed" else 2
        assert (3, completion) == (prompt, row["completion_tokens"])


@pytest.mark.parametrize("call", ["whole", "stream", "begin", "embed"])
async def test_zeros_are_no_count(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str
) -> None:
    """Some send them where they count nothing, or before they have: no answer is free by that."""
    nothing = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    begun = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    first, *rest = [chunk({"content": "word "}) for _ in range(7)]
    stop = chunk({}, finish_reason="stop")
    answers = {
        "whole": Answer(body={**whole("seven words and then there are more"), "usage": nothing}),
        "stream": Answer(events=[first, *rest, stop, {"choices": [], "usage": nothing}, "[DONE]"]),
        "begin": Answer(events=[{**first, "usage": begun}, *rest, stop, "[DONE]"]),
        "embed": Answer(body={"data": [{"index": 0, "embedding": [1.0]}], "usage": nothing}),
    }
    upstream.script(answers[call])
    answer = await make(gateway, "stream" if call == "begin" else call)
    row = await only_row(gateway)

    assert (200, True) == (answer.status, row["usage_estimated"])
    assert 0 < row["embedding_tokens" if call == "embed" else "prompt_tokens"] < 20
    if call != "embed":
        assert 7 == row["completion_tokens"]


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        # xAI and Gemini leave the tokens of thoughts out of the answer's.
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135,
          "completion_tokens_details": {"reasoning_tokens": 94}}, (32, 103, None, 94)),
        ({"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81}, (21, 60, None, None)),
        ({"prompt_tokens": 21, "total_tokens": 81}, (21, 60, None, None)),
        ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, (3, 2, None, None)),
        ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": "99"}, (3, 2, None, None)),
        # DeepSeek and Kimi have a place of their own for what was in their cache.
        ({"prompt_tokens": 11, "completion_tokens": 2, "prompt_cache_hit_tokens": 8,
          "prompt_cache_miss_tokens": 3}, (11, 2, 8, None)),
        ({"prompt_tokens": 19, "completion_tokens": 13, "cached_tokens": 12}, (19, 13, 12, None)),
        ({"prompt_tokens": 19, "completion_tokens": 13, "cached_tokens": 12,
          "prompt_tokens_details": {"cached_tokens": 0}}, (19, 13, 0, None)),
    ],
)  # fmt: skip
async def test_tokens_are_counted_wherever_a_provider_tells_them(
    gateway: RunningServer, upstream: ScriptedUpstream, *, call: str, usage: Any, counted: Any
) -> None:
    """Thoughts that only the total counts are billed, and what was cached is billed as such."""
    pieces = [chunk({"content": "hi"}), {"choices": [], "usage": usage}, "[DONE]"]
    whole_one = Answer(body={**whole("hi"), "usage": usage})
    upstream.script(whole_one if call == "whole" else Answer(events=pieces))
    more = {"stream": True, "stream_options": {"include_usage": True}} if call == "stream" else {}
    answer = await ask(gateway, "POST", "/v1/chat/completions", json={**HELLO, **more})
    row = await only_row(gateway)

    told = events(answer.text)[-2]["usage"] if call == "stream" else answer.json["usage"]
    names = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    assert counted == tuple(row[name] for name in names)
    assert not row["usage_estimated"]
    assert (*counted[:2], sum(counted[:2])) == (
        told["prompt_tokens"],
        told["completion_tokens"],
        told["total_tokens"],
    )


async def test_embeddings_are_billed_by_the_total_where_nothing_else_is_told(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Voyage counts no `prompt_tokens`: nothing but what was asked is embedded."""
    vectors = [{"index": 0, "embedding": [1.0]}]
    upstream.script(Answer(body={"data": vectors, "usage": {"total_tokens": 77}}))
    answer = await make(gateway, "embed")
    row = await only_row(gateway)

    assert {"prompt_tokens": 77, "total_tokens": 77} == answer.json["usage"]
    assert (77, False) == (row["embedding_tokens"], row["usage_estimated"])
