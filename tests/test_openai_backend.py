"""The `openai` backend before providers that refuse, break, stall, lie or hang up."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harperpy.plugins.openai import OpenAI

from harperpy import ConfigError, GenerateOpts, Message, ModelConfig, ModelEntry, Prompt, Secret
from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer, chunk, streamed, whole
from helpers import HELLO, Answered, ask, events, provider

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (CHAT, HELLO),
    "stream": (CHAT, {**HELLO, "stream": True}),
    "embed": (EMBEDDINGS, {"model": "gpt-4o-mini", "input": "hi"}),
}
METHODS = {"whole": "generate", "stream": "generateStream", "embed": "embed"}
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


TOLD = {
    "message": "They say no.",
    "type": "their_type",
    "param": "messages[0].content",
    "code": "their_code",
}
PASSED = (400, 404, 409, 413, 422, 429)
OUR_TEXT = "The model provider failed to answer."


@every_call
@pytest.mark.parametrize("status", PASSED)
async def test_a_refusal_of_the_call_passes_on(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, status: int
) -> None:
    """What is wrong with the call itself is told in the provider's words, with its status."""
    upstream.script(Answer(status=status, body={"error": TOLD}))
    answer = await make(gateway, call)
    row = await only_row(gateway)

    assert status == answer.status
    assert TOLD == error(answer)
    assert (METHODS[call], False, "backend_error", status) == (
        row["method"],
        row["success"],
        row["error_code"],
        row["upstream_status"],
    )


@pytest.mark.parametrize("status", PASSED)
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
        b'{"detail": "no"}',
    ],
)
async def test_a_refusal_without_words_gets_ours(
    gateway: RunningServer, upstream: ScriptedUpstream, status: int, body: bytes
) -> None:
    """What is not an OpenAI error is not quoted; status and envelope hold all the same."""
    upstream.script(Answer(status=status, body=body))
    answer = await make(gateway, "whole")

    assert status == answer.status
    assert {
        "message": f"The model provider answered {status}.",
        "type": "rate_limit_error" if status == 429 else "invalid_request_error",
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


@every_call
@pytest.mark.parametrize("body", [{"error": TOLD}, b"<html>They say no.</html>"])
@pytest.mark.parametrize(
    ("status", "ours", "code", "row_code"),
    [
        (401, 502, "upstream_auth_error", "backend_error"),
        (403, 502, "upstream_auth_error", "backend_error"),
        (408, 504, "timeout", "timeout"),
        (500, 500, None, "backend_error"),
        (502, 502, None, "backend_error"),
        (503, 503, None, "backend_error"),
        (529, 529, None, "backend_error"),
        (402, 502, None, "backend_error"),
        (302, 502, None, "backend_error"),
        (204, 502, None, "backend_error"),
    ],
)
async def test_a_fault_of_the_provider_is_told_in_our_words(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    *,
    call: str,
    body: Any,
    status: int,
    ours: int,
    code: str | None,
    row_code: str,
) -> None:
    """Faults and refused keys are not the caller's: nothing that the provider said is quoted."""
    upstream.script(Answer(status=status, body=b"" if status == 204 else body))
    answer = await make(gateway, call)
    row = await only_row(gateway)

    assert ours == answer.status
    assert "They say no." not in answer.text
    told = error(answer)
    assert ("server_error", None, code) == (told["type"], told["param"], told["code"])
    titles = {
        "upstream_auth_error": "The model provider refused this server's credentials.",
        "timeout": "The model provider did not answer in time.",
    }
    assert titles.get(code or "", OUR_TEXT) == told["message"]
    assert (row_code, status) == (row["error_code"], row["upstream_status"])


@every_call
@pytest.mark.parametrize("status", [429, 503, 529])
async def test_when_to_come_back_passes_on(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, status: int
) -> None:
    """`Retry-After` reaches the client, whose SDK waits that long."""
    headers = {"Retry-After": "17"}
    upstream.script(Answer(status=status, headers=headers, body={"error": TOLD}))
    answer = await make(gateway, call)

    assert (status, "17") == (answer.status, answer.headers["Retry-After"])


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


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (None, "max_completion_tokens"),
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://api.openai.com:443/v1/", "max_completion_tokens"),
        ("https://api.openai.com.example.org/v1", "max_tokens"),
        ("https://example.org/api.openai.com/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_limit_has_the_name_that_the_provider_knows(url: str | None, name: str) -> None:
    """OpenAI's newest models refuse `max_tokens`; most others know nothing else."""
    settings = ModelConfig(backend="openai", model="m", base_url=url, api_key=Secret("x"))
    backend = OpenAI(ModelEntry("generative", "m", settings, Path()))
    prompt = Prompt(messages=[Message(role="user", content="hi")])
    body = msgspec.json.decode(backend._chat(prompt, GenerateOpts(max_tokens=5), stream=False))

    assert {name: 5} == {key: value for key, value in body.items() if key.startswith("max_")}


@every_call
async def test_a_provider_that_is_not_there_is_a_bad_gateway(call: str, deaf_port: int) -> None:
    """A refused connection is 502, and tells neither address nor cause."""
    async with running(provider(f"http://127.0.0.1:{deaf_port}/v1")) as server:
        answer = await make(server, call)
        row = await only_row(server)

    assert (502, OUR_TEXT) == (answer.status, error(answer)["message"])
    assert ("backend_error", None) == (row["error_code"], row["upstream_status"])


@pytest.mark.parametrize("scheme", ["https://127.0.0.1", "http://nobody.invalid"])
async def test_a_provider_that_cannot_be_reached_is_a_bad_gateway(
    upstream: ScriptedUpstream, scheme: str
) -> None:
    """TLS that fails and names that do not resolve are 502 as well."""
    port = upstream.url.split(":")[2].removesuffix("/v1")
    async with running(provider(f"{scheme}:{port}/v1")) as server:
        answer = await make(server, "whole")

    assert (502, OUR_TEXT) == (answer.status, error(answer)["message"])


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


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@every_call
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"this is no HTTP at all\r\n\r\n",
        HEAD + b"Content-Length: 1000\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
    ],
)
async def test_a_connection_that_breaks_is_a_bad_gateway(call: str, sent: bytes) -> None:
    """Cut before the head, within it or within the body, or no HTTP: 502, and one row."""
    async with raw_upstream([sent]) as url, running(provider(url)) as server:
        answer = await make(server, call)
        row = await only_row(server)

    assert (502, OUR_TEXT) == (answer.status, error(answer)["message"])
    assert "backend_error" == row["error_code"]


async def test_a_pooled_connection_that_was_closed_is_no_failure() -> None:
    """A kept connection may end at any moment: the call goes over a new one, as one attempt."""
    answer = http(msgspec.json.encode(whole("hello")))
    async with raw_upstream([answer, b""], [answer]) as url, running(provider(url)) as server:
        statuses = [(await make(server, "whole")).status for _ in range(2)]
        rows = await server.rows()

    assert [200, 200] == statuses
    assert [True, True] == [row["success"] for row in rows]


async def test_connections_are_used_again() -> None:
    """Three answers in a row come over one connection."""
    answer = http(msgspec.json.encode(whole("hello")))
    async with raw_upstream([answer] * 3) as url, running(provider(url)) as server:
        statuses = [(await make(server, "whole")).status for _ in range(3)]

    assert [200, 200, 200] == statuses


BAD_ANSWERS: list[tuple[str, Any]] = [
    ("whole", b"{"),
    ("whole", b""),
    ("whole", b"<html></html>"),
    ("whole", b"\xff"),
    ("whole", []),
    ("whole", {}),
    ("whole", {"choices": []}),
    ("whole", {"choices": None}),
    ("whole", {"choices": [{"index": 0}]}),
    ("whole", {"choices": [{"index": 0, "message": {"content": 5}}]}),
    ("whole", {"error": TOLD}),
    ("stream", b"{"),
    ("stream", b""),
    ("stream", whole("this is no stream")),
    ("embed", b"{"),
    ("embed", {}),
    ("embed", {"data": []}),
    ("embed", {"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1]}]}),
    ("embed", {"data": [{"index": 0, "embedding": "AAAA"}]}),
    ("embed", {"data": [{"index": 0, "embedding": [None]}]}),
    ("embed", b'{"data": [{"index": 0, "embedding": [NaN]}]}'),
]


@pytest.mark.parametrize(("call", "body"), BAD_ANSWERS)
async def test_an_answer_that_is_none_is_a_bad_gateway(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, body: Any
) -> None:
    """A 200 that does not hold what was asked for is 502, and none of it is quoted."""
    upstream.script(Answer(body=body))
    answer = await make(gateway, call)
    row = await only_row(gateway)

    assert (502, OUR_TEXT) == (answer.status, error(answer)["message"])
    assert (False, "backend_error") == (row["success"], row["error_code"])


BROKEN_STREAMS: dict[str, Answer] = {
    "malformed event": Answer(events=[*streamed("one", done=False), b"data: {broken\n\n"]),
    "event of another shape": Answer(events=[*streamed("one", done=False), {"choices": 5}]),
    "ends without reason and [DONE]": Answer(events=streamed("one", done=False)),
    "is cut": Answer(events=streamed("one", done=False), cut=True),
    "tells of an error": Answer(events=[*streamed("one", done=False), {"error": TOLD}]),
    "tells an error as text": Answer(events=[*streamed("one", done=False), {"error": "No."}]),
    "event beyond measure": Answer(
        events=[*streamed("one", done=False), b"data: " + b"x" * (2 << 20) + b"\n\n"]
    ),
    "too many tool calls": Answer(
        events=[
            *streamed("one", done=False),
            *(chunk({"tool_calls": [{"index": at, "id": "x"}]}) for at in range(200)),
        ]
    ),
}


@pytest.mark.parametrize("what", BROKEN_STREAMS)
async def test_a_stream_that_breaks_is_told_in_band(
    gateway: RunningServer, upstream: ScriptedUpstream, what: str
) -> None:
    """After the first chunk an error is the last event, and no `[DONE]` feigns an end."""
    upstream.script(BROKEN_STREAMS[what])
    answer = await make(gateway, "stream")
    row = await only_row(gateway)

    first, *_, last = events(answer.text)
    assert 200 == answer.status
    assert "one" == first["choices"][0]["delta"]["content"]
    told = {"message": OUR_TEXT, "type": "server_error", "param": None, "code": None}
    assert {"error": told} == last
    assert (False, "backend_error") == (row["success"], row["error_code"])
    assert row["completion_tokens"] > 0


@pytest.mark.parametrize(
    "first",
    [b"data: {broken\n\n", {"error": TOLD}, {"error": "No."}, {"choices": "x"}],
)
async def test_a_stream_that_breaks_at_once_has_a_real_status(
    gateway: RunningServer, upstream: ScriptedUpstream, first: Any
) -> None:
    """Before the first chunk the head is not sent yet: the error can be its status."""
    upstream.script(Answer(events=[first]))
    answer = await make(gateway, "stream")

    assert (502, OUR_TEXT) == (answer.status, error(answer)["message"])


async def test_a_status_told_in_the_stream_is_in_the_row(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Some providers answer 200 and tell their 429 in an event."""
    told = {"error": {"message": "slow down", "code": 429}}
    upstream.script(Answer(events=[*streamed("one", done=False), told]))
    await make(gateway, "stream")

    assert 429 == (await only_row(gateway))["upstream_status"]


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


@every_call
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3.0, "completion_tokens": 2.0}, (3, 2, False)),
        ({"prompt_tokens": "3", "completion_tokens": None}, None),
        ({"prompt_tokens": -1, "completion_tokens": 1.5}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": True}, None),
        ({}, None),
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


TIMEOUTS: dict[str, tuple[str, str, Answer]] = {
    f"{option} in {call}, {answer.hang} hangs": (option, call, answer)
    for option, call, answer in [
        ("firstByteTimeoutMs", "whole", Answer(hang="head")),
        ("firstByteTimeoutMs", "stream", Answer(hang="head")),
        ("firstByteTimeoutMs", "embed", Answer(hang="head")),
        ("idleTimeoutMs", "whole", Answer(body=whole("hi"), hang="body")),
        ("idleTimeoutMs", "stream", Answer(events=[], hang="body")),
        ("idleTimeoutMs", "embed", Answer(body={}, hang="end")),
        ("requestTimeoutMs", "whole", Answer(hang="head")),
        ("requestTimeoutMs", "stream", Answer(hang="head")),
        ("requestTimeoutMs", "embed", Answer(body={}, hang="body")),
    ]
}


@pytest.mark.parametrize("what", TIMEOUTS)
async def test_a_provider_that_stalls_is_a_timeout(upstream: ScriptedUpstream, what: str) -> None:
    """Each limit of the configuration ends the wait with 504, and the provider is left."""
    option, call, answer = TIMEOUTS[what]
    upstream.script(answer)
    async with running(provider(upstream.url, f"{option}: 100")) as server:
        answered = await make(server, call)
        row = await only_row(server)
        async with asyncio.timeout(20):
            await upstream.left.wait()

    assert (504, "timeout") == (answered.status, error(answered)["code"])
    assert "The model provider did not answer in time." == error(answered)["message"]
    assert (False, "timeout", None) == (row["success"], row["error_code"], row["upstream_status"])


@pytest.mark.parametrize("option", ["idleTimeoutMs", "requestTimeoutMs"])
async def test_a_stream_that_stalls_in_the_middle_is_told_in_band(
    upstream: ScriptedUpstream, option: str
) -> None:
    """After the first chunk a timeout is an event, like any other error."""
    upstream.script(Answer(events=streamed("one", done=False), hang="end"))
    async with running(provider(upstream.url, f"{option}: 200")) as server:
        answer = await make(server, "stream")
        row = await only_row(server)

    first, last = events(answer.text)
    assert "one" == first["choices"][0]["delta"]["content"]
    assert ("server_error", "timeout") == (last["error"]["type"], last["error"]["code"])
    assert (False, "timeout", 1) == (row["success"], row["error_code"], row["completion_tokens"])


async def test_a_provider_that_takes_no_connection_is_a_timeout() -> None:
    """A connection that is neither taken nor refused ends with the limit for connecting."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filling in (first, second):
            filling.settimeout(0)
            filling.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        async with running(provider(url, "connectTimeoutMs: 100")) as server:
            answer = await make(server, "whole")

    assert (504, "timeout") == (answer.status, error(answer)["code"])


def retrying(url: str, most: int) -> str:
    """A provider that may be asked again."""
    return provider(url).replace("maxRetries: 0", f"maxRetries: {most}")


SOON = {"Retry-After": "0"}


@every_call
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
async def test_what_passes_by_is_tried_again(
    upstream: ScriptedUpstream, call: str, status: int
) -> None:
    """A moment later it may work: the client sees the success, the rows all attempts."""
    upstream.script(*[Answer(status=status, headers=SOON, body=b"")] * 2)
    async with running(retrying(upstream.url, 2)) as server:
        answer = await make(server, call)
        rows = await server.rows()

    assert 200 == answer.status
    assert 3 == len(upstream.requests)
    assert [(True, None), (False, status), (False, status)] == [
        (row["success"], row["upstream_status"]) for row in rows
    ]
    assert 1 == len({row["request_id"] for row in rows})


async def test_trying_again_has_an_end(upstream: ScriptedUpstream) -> None:
    """`maxRetries` counts further attempts; the last one's error is told."""
    upstream.script(
        Answer(status=500, headers=SOON, body=b""), Answer(status=503, headers=SOON, body=b"")
    )
    async with running(retrying(upstream.url, 1)) as server:
        answer = await make(server, "whole")
        rows = await server.rows()

    assert 503 == answer.status
    assert [503, 500] == [row["upstream_status"] for row in rows]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
async def test_what_stays_is_not_tried_again(upstream: ScriptedUpstream, status: int) -> None:
    """The same call would be refused in the same way."""
    upstream.script(Answer(status=status, headers=SOON, body=b""))
    async with running(retrying(upstream.url, 2)) as server:
        await make(server, "whole")
        rows = await server.rows()

    assert 1 == len(upstream.requests) == len(rows)


@pytest.mark.parametrize("wait", ["60", "Wed, 21 Oct 2065 07:28:00 GMT"])
async def test_a_long_wait_is_the_clients(upstream: ScriptedUpstream, wait: str) -> None:
    """A provider that wants a minute is not tried again: the client is told how long."""
    upstream.script(Answer(status=429, headers={"Retry-After": wait}, body=b""))
    async with running(retrying(upstream.url, 2)) as server:
        answer = await make(server, "whole")

    assert (429, wait) == (answer.status, answer.headers["Retry-After"])
    assert 1 == len(upstream.requests)


async def test_a_refused_connection_is_tried_again(deaf_port: int) -> None:
    """A provider that restarts refuses for a moment; each attempt is a row."""
    async with running(retrying(f"http://127.0.0.1:{deaf_port}/v1", 1)) as server:
        answer = await make(server, "whole")
        rows = await server.rows()

    assert (502, 2) == (answer.status, len(rows))
