"""Providers that speak OpenAI's protocol in their own way, and what clients get of it."""

import logging
from collections import ChainMap
from collections.abc import AsyncIterator
from typing import Any

import pytest

from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running, whole
from helpers import HELLO, Answered, ask, events, openai_client, provider

pytestmark = pytest.mark.usefixtures("transport")

TOOL: Any = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server in front of the scripted provider."""
    async with running(provider(upstream.url)) as server:
        yield server


def chunk(delta: dict[str, Any], finish_reason: str | None = None, index: int = 0) -> Any:
    """A chunk of a provider's stream."""
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}


async def make(server: RunningServer, call: str) -> Answered:
    """The answer to a chat, whole or streamed."""
    body = {**HELLO, "stream": call == "stream"}
    return await ask(server, "POST", "/v1/chat/completions", json=body)


def named(name: str | None = None, arguments: Any = None, **more: Any) -> dict[str, Any]:
    """A piece of a tool call."""
    told = {"name": name, "arguments": arguments}
    return {**more, "function": {key: one for key, one in told.items() if one is not None}}


TWO = [("f", '{"a":1}'), ("g", '{"b":2}')]
PIECES: dict[str, tuple[list[list[dict[str, Any]]], list[tuple[str, str]]]] = {
    "no index, the id on each piece": (
        [[named("f", "", id="c1")], [named(None, '{"a":', id="c1")],
         [named(None, "1}", id="c1")], [named("g", '{"b":2}', id="c2")]],
        TWO,
    ),
    "one index for two ids": (
        [[named("f", '{"a":1}', index=0, id="c1")], [named("g", '{"b":', index=0, id="c2")],
         [named(None, "2}", index=0)]],
        TWO,
    ),
    "no index and no id, in one event": (
        [[named("f", '{"a":1}'), named("g", '{"b":2}')]], TWO),
    "no index and no id, in two": ([[named("f", '{"a":1}')], [named("g", '{"b":2}')]], TWO),
    "no index and no id, in pieces": (
        [[named("f", '{"a"')], [named("f", ":1}")], [named("g", '{"b":')], [named(None, "2}")]],
        TWO,
    ),
    "the name on each piece": (
        [[named("f", '{"a"', index=0, id="c1")], [named("f", ":1}", index=0)],
         [named("g", '{"b":2}', index=1, id="c2")]],
        TWO,
    ),
    "interleaved": (
        [[named("f", "", index=0, id="c1"), named("g", "", index=1, id="c2")],
         [named(None, '{"b":', index=1)], [named(None, '{"a":1}', index=0)],
         [named(None, "2}", index=1)]],
        TWO,
    ),
    "the name after the arguments began": (
        [[named(None, '{"a":', index=0, id="c1")], [named("f", "1}", index=0)],
         [named("g", '{"b":2}', index=1, id="c2")]],
        TWO,
    ),
    "arguments as an object": (
        [[named("f", {"a": 1}, index=0, id="c1"), named("g", {"b": 2}, index=1, id="c2")]], TWO),
    "indexes as text, ids as numbers": (
        [[named("f", '{"a":1}', index="0", id=1)], [named("g", '{"b":2}', index=1.0, id=2)]], TWO),
    "empty ids": (
        [[named("f", '{"a":', index=0, id="")], [named(None, "1}", index=0, id="")],
         [named("g", '{"b":2}', index=1, id="")]],
        TWO,
    ),
    "one index and no id for two calls": (
        [[named("f", '{"a":1}', index=0), named("g", '{"b":2}', index=0)]], TWO),
    "one index and no id for two calls, in two events": (
        [[named("f", '{"a":1}', index=0, id="")], [named("g", '{"b":2}', index=0, id="")]], TWO),
    "one index and no id for two calls of a function": (
        [[named("f", '{"a":1}', index=0)], [named("f", '{"a":2}', index=0)]],
        [("f", '{"a":1}'), ("f", '{"a":2}')],
    ),
    "one index and no id, in pieces": (
        [[named("f", "", index=0)], [named("f", '{"a"', index=0)], [named("f", ":1}", index=0)],
         [named("f", "", index=0)], [named("g", "", index=0)], [named("g", '{"b":2}', index=0)],
         [named("g", "", index=0)]],
        TWO,
    ),
    "blanks at the end": (
        [[named("f", '{"a":1}', index=0)], [named("f", " ", index=0)],
         [named("g", '{"b":2}', index=1)]],
        [("f", '{"a":1} '), ("g", '{"b":2}')],
    ),
    "no arguments at all": ([[named("f", index=0, id="c1")]], [("f", "{}")]),
    "empty arguments": (
        [[named("f", "", index=0, id="c1")], [named("g", "", index=1, id="c2")],
         [named(None, '{"b":2}', index=1)]],
        [("f", "{}"), ("g", '{"b":2}')],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pieces", "calls"), PIECES.values(), ids=PIECES)
async def test_pieces_of_tool_calls_are_put_in_order(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    pieces: list[list[dict[str, Any]]],
    calls: list[tuple[str, str]],
) -> None:
    """OpenAI's client reads each call with its name and arguments, whatever providers leave out."""
    deltas = [chunk({"tool_calls": given}) for given in pieces]
    upstream.script(Answer(events=[*deltas, chunk({}, "tool_calls"), "[DONE]"]))
    asked: Any = {**HELLO, "tools": [TOOL]}
    async with openai_client(gateway) as client:
        stream = await client.chat.completions.create(**asked, stream=True)
        said = [one.choices[0].delta.tool_calls or [] async for one in stream]

    found: dict[int, list[Any]] = {}
    for delta in (one for several in said for one in several):
        found.setdefault(delta.index, []).append(delta)
    assert list(range(len(calls))) == sorted(found)
    for index, (name, arguments) in enumerate(calls):
        first, *rest = found[index]
        assert (name, "function") == (first.function.name, first.type)
        assert first.id
        assert arguments == "".join(one.function.arguments or "" for one in found[index])
        assert [] == [one for one in rest if one.id or one.function.name]


async def test_a_call_with_nothing_is_json_everywhere(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """In whole answers, and in the turns that a client repeats: some providers read them as JSON.

    Of a call that was cut off nobody knows what it was to be given.
    """
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    cut = [chunk({"tool_calls": [{"index": 0, **call}]}), chunk({}, "length"), "[DONE]"]
    upstream.script(Answer(body={"choices": [{"message": message}]}), Answer(events=cut))
    whole = (await make(gateway, "whole")).json["choices"][0]["message"]
    broken_off = (await make(gateway, "stream")).text
    result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    body = {**HELLO, "messages": [*HELLO["messages"], message, result]}
    await ask(gateway, "POST", "/v1/chat/completions", json=body)

    assert "{}" == whole["tool_calls"][0]["function"]["arguments"]
    assert "{}" not in broken_off.replace('"delta":{}', "")
    (sent,) = upstream.requests[2].body["messages"][1]["tool_calls"]
    assert "{}" == sent["function"]["arguments"]


async def test_mistral_is_not_asked_for_what_it_refuses(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no `stream_options`, and tells the usage of each stream: clients get it."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    ended = {**chunk({"content": "salut"}, "stop"), "usage": usage}
    upstream.script(Answer(events=[ended, "[DONE]"]))
    monkeypatch.setenv("HTTP_PROXY", upstream.url.removesuffix("/v1"))
    config = provider("http://api.mistral.ai/v1").replace("transport: own", "transport: aiohttp")
    async with running(config) as server:
        body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
        answer = await ask(server, "POST", "/v1/chat/completions", json=body)

    assert usage == events(answer.text)[-2]["usage"]
    (request,) = upstream.requests
    assert "stream_options" not in request.body


async def test_what_a_provider_wants_to_see_again_comes_and_goes(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Gemini signs its thoughts in `extra_content` of a call, and refuses the call without it."""
    extra = {"google": {"thought_signature": "c2lnbmVk"}}
    call = {"id": "c1", "type": "function", "extra_content": extra,
            "function": {"name": "f", "arguments": "{}"}}  # fmt: skip
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    upstream.script(
        Answer(body={"choices": [{"index": 0, "message": message}]}),
        Answer(events=[chunk({"tool_calls": [{"index": 0, **call}]}), chunk({}, "tool_calls")]),
    )
    whole = (await make(gateway, "whole")).json["choices"][0]["message"]
    first, *_ = events((await make(gateway, "stream")).text)
    result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    body = {**HELLO, "messages": [*HELLO["messages"], whole, result]}
    await ask(gateway, "POST", "/v1/chat/completions", json=body)

    assert [call] == whole["tool_calls"]
    assert [{"index": 0, **call}] == first["choices"][0]["delta"]["tool_calls"]
    assert [call] == upstream.requests[2].body["messages"][1]["tool_calls"]


async def test_the_details_of_a_thought_come_and_go(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """OpenRouter's, whose models refuse the result of a call that was thought of without them."""
    text = {"type": "reasoning.text", "text": "hm", "index": 0}
    secret = {"type": "reasoning.encrypted", "data": "c2lnbmVk", "index": 0}
    message = {"role": "assistant", "content": "hi", "reasoning_details": [text, secret]}
    upstream.script(
        Answer(body={"choices": [{"index": 0, "message": message}]}),
        Answer(
            events=[
                chunk({"content": "", "reasoning_details": [text]}),
                chunk({"content": "hi", "reasoning_details": []}),
                chunk({"content": "", "reasoning_details": [secret]}, "stop"),
            ]
        ),
    )
    whole = (await make(gateway, "whole")).json["choices"][0]["message"]
    told = events((await make(gateway, "stream")).text)
    body = {**HELLO, "messages": [*HELLO["messages"], whole, *HELLO["messages"]]}
    await ask(gateway, "POST", "/v1/chat/completions", json=body)

    assert [text, secret] == whole["reasoning_details"]
    deltas = [event["choices"][0]["delta"] for event in told[:3]]
    assert [[text], None, [secret]] == [delta.get("reasoning_details") for delta in deltas]
    assert [text, secret] == upstream.requests[2].body["messages"][1]["reasoning_details"]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3, "completion_tokens": 2.0}])
@pytest.mark.parametrize("call", ["whole", "stream"])
async def test_odd_words_on_an_answer_are_left_out(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, usage: Any
) -> None:
    """What is odd costs neither the answer nor what is said well beside it."""
    odd = {"system_fingerprint": 5, "moderation": "no", "service_tier": "flex", "usage": usage}
    said = {"content": "hi"}
    upstream.script(
        Answer(body={"choices": [{"index": 0, "message": said}], **odd})
        if call == "whole"
        else Answer(events=[{**chunk(said), **odd}, {**chunk({}, "stop"), **odd}, "[DONE]"])
    )
    answer = await make(gateway, call)
    first = answer.json if call == "whole" else events(answer.text)[0]
    (row,) = await gateway.rows("success = 1")

    choice = first["choices"][0]
    assert "hi" == choice["message" if call == "whole" else "delta"]["content"]
    assert "flex" == first["service_tier"]
    assert not {"system_fingerprint", "moderation"} & set(first)
    if usage:
        assert (3, 2, False) == (
            row["prompt_tokens"],
            row["completion_tokens"],
            row["usage_estimated"],
        )


SURE = {"token": "hi", "logprob": -0.1, "bytes": None, "top_logprobs": []}
HARDLY = {"token": "ho", "logprob": -9999.0, "bytes": None}
LIKELY: dict[str, tuple[Any, Any]] = {
    "null": ({"content": [SURE | {"logprob": None}]}, [SURE | {"logprob": -9999.0}]),
    "null of another": (
        {"content": [SURE | {"top_logprobs": [HARDLY | {"logprob": None}]}]},
        [SURE | {"top_logprobs": [HARDLY]}],
    ),
    "no others": ({"content": [SURE | {"top_logprobs": None}]}, [SURE]),
    "a number": ({"content": [SURE | {"token": 7}]}, None),
    "no map": ([SURE], None),
    "a text": ({"content": "hi"}, None),
}


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(("odd", "told"), LIKELY.values(), ids=LIKELY)
async def test_odd_logprobs_cost_no_answer(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, odd: Any, told: Any
) -> None:
    """What nobody can understand of them is left out; minus infinity, as null, is a number."""
    said, end = chunk({"content": "hi"}), chunk({}, "stop")
    said["choices"][0]["logprobs"] = odd
    choice = {"index": 0, "message": {"content": "hi"}, "logprobs": odd, "finish_reason": "stop"}
    upstream.script(
        Answer(body={"choices": [choice]})
        if call == "whole"
        else Answer(events=[said, end, "[DONE]"])
    )
    answer = await make(gateway, call)
    first = (answer.json if call == "whole" else events(answer.text)[0])["choices"][0]

    assert "hi" == first["message" if call == "whole" else "delta"]["content"]
    assert told == (first["logprobs"] and first["logprobs"]["content"])


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parts": ({"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, {}),
    "a thought": (
        {"content": [THINKING, {"type": "text", "text": "hi"}]},
        {"reasoning_content": "hm"},
    ),
    "a plain thought": (
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hi"}]},
        {"reasoning_content": "hm"},
    ),
    "odd words": (
        {"content": "hi", "refusal": False, "annotations": {}, "reasoning_content": []},
        {},
    ),
    "no sound": ({"content": "hi", "audio": []}, {}),
}


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(("odd", "more"), SAID.values(), ids=SAID)
async def test_an_answer_is_found_in_what_is_odd(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    call: str,
    odd: dict[str, Any],
    more: dict[str, Any],
) -> None:
    """Its text may come in parts, and beside it what is no part of it, or of another kind."""
    choice = {"index": None, "message": odd, "finish_reason": "stop"}
    upstream.script(
        Answer(body={"choices": [choice]})
        if call == "whole"
        else Answer(events=[chunk(odd), chunk({}, "stop"), "[DONE]"])
    )
    answer = await make(gateway, call)
    if call == "whole":
        said = answer.json["choices"][0]["message"]
    else:
        deltas = [event["choices"][0]["delta"] for event in events(answer.text)[:-1]]
        said = dict(ChainMap(*deltas))

    told = {"role": "assistant", "content": "hi", **more}
    assert told == {name: value for name, value in said.items() if value is not None}


HALF = rb'"choices": [{"index": 0, "%b": {"content": "a\ud83d b"}, "finish_reason": "stop"}]'
UNSURE = HALF.replace(rb"\ud83d", b"").replace(
    b'"stop"', b'"stop", "logprobs": {"content": [{"token": "a", "logprob": -Infinity}]}'
)


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (HALF, "a\ufffd b"),
        (HALF.replace(rb"\ud83d", b"\xf0\x9f"), "a\ufffd b"),
        (HALF.replace(rb"\ud83d", rb"\ud83d\ude00"), "a\U0001f600 b"),
        (UNSURE, "a b"),
    ],
    ids=["half of a pair", "half of a letter", "a pair", "minus infinity"],
)
async def test_what_other_languages_write_as_json_is_read(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, written: bytes, said: str
) -> None:
    """JavaScript cuts letters in two, Python writes numbers that are none: no answer is lost."""
    body = b"{%b}" % (written % (b"message" if call == "whole" else b"delta"))
    upstream.script(
        Answer(body=body) if call == "whole" else Answer(events=[b"data: %b\n\n" % body, "[DONE]"])
    )
    answer = await make(gateway, call)
    first = (answer.json if call == "whole" else events(answer.text)[0])["choices"][0]

    assert said == first["message" if call == "whole" else "delta"]["content"]
    if written is UNSURE:
        assert -9999.0 == first["logprobs"]["content"][0]["logprob"]


CALL = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize(
    "said",
    [{"content": "hi"}, {"reasoning_content": "hm"}, {"refusal": "no"}, {"tool_calls": [CALL]}],
    ids=lambda said: str(*said),
)
async def test_whatever_was_written_is_estimated(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, said: Any
) -> None:
    """A provider that counts nothing is billed for thoughts and calls as it is for text."""
    upstream.script(
        Answer(body={"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]})
        if call == "whole"
        else Answer(events=[chunk(said), chunk({}, "stop"), "[DONE]"])
    )
    await make(gateway, call)
    (row,) = await gateway.rows("success = 1")

    assert row["usage_estimated"]
    assert 0 < row["completion_tokens"] < 10


async def test_a_thought_that_is_broken_off_is_billed(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """A stream that ends before its first word has produced something."""
    upstream.script(Answer(events=[chunk({"reasoning_content": "hm"}), {"error": "no"}]))
    await make(gateway, "stream")
    (row,) = await gateway.rows("success = 0")

    assert (True, 1) == (row["usage_estimated"], row["completion_tokens"])


async def test_tools_are_a_part_of_what_is_asked(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Also where nobody has counted it: their names and schemas are read by the model."""
    for more in ({}, {"tools": [TOOL]}):
        upstream.script(Answer(body={"choices": [{"index": 0, "message": {"content": "hi"}}]}))
        await ask(gateway, "POST", "/v1/chat/completions", json={**HELLO, **more})
    having, without = await gateway.rows("usage_estimated = 1")

    assert without["prompt_tokens"] < having["prompt_tokens"]


async def test_a_call_in_the_old_protocols_form_is_a_call(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """`function_call` from a provider is no empty answer."""
    call = {"name": "f", "arguments": "{}"}
    message = {"role": "assistant", "content": None, "function_call": call}
    upstream.script(
        Answer(body={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}),
        Answer(events=[chunk({"function_call": call}), chunk({}, "function_call")]),
    )
    whole = (await make(gateway, "whole")).json["choices"][0]
    *chunks, _ = events((await make(gateway, "stream")).text)

    assert call == whole["message"]["tool_calls"][0]["function"]
    assert call == chunks[0]["choices"][0]["delta"]["tool_calls"][0]["function"]
    reasons = (whole["finish_reason"], chunks[-1]["choices"][0]["finish_reason"])
    assert ("tool_calls", "tool_calls") == reasons


async def test_a_stream_of_messages_is_read_as_one_of_deltas(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Some servers forget the difference; their text still arrives."""
    choice = {"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}
    upstream.script(Answer(events=[{"choices": [choice]}, "[DONE]"]))
    first, *_ = events((await make(gateway, "stream")).text)

    assert "hi" == first["choices"][0]["delta"]["content"]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"detail": "no"}, "no", None),
        ({"object": "error", "message": "no", "param": "n", "code": 400}, "no", "n"),
        ([{"error": {"message": "no", "code": 400, "status": "INVALID_ARGUMENT"}}], "no", None),
        ({"error": {"message": "no", "param": ["a"], "type": 5}}, "no", None),
        ({"error": "no"}, "no", None),
    ],
)
async def test_the_words_of_a_plainer_refusal_are_found(
    gateway: RunningServer, upstream: ScriptedUpstream, body: Any, message: str, param: str | None
) -> None:
    """FastAPI, vLLM and Google have forms of their own; one odd field spoils nothing else."""
    upstream.script(Answer(status=400, body=body))
    error = (await make(gateway, "whole")).json["error"]

    assert (message, param) == (error["message"], error["param"])


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("call", ["whole", "stream", "in a stream"])
async def test_what_a_provider_says_of_a_refusal_is_the_callers_alone(
    upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture, call: str, status: int
) -> None:
    """It may quote what was asked: that is no log's business."""
    caplog.set_level(logging.DEBUG)
    error = {"error": {"message": "'my prompt' is not what I want", "code": status}}
    late = Answer(events=[chunk({"content": "a"}), error])
    upstream.script(late if call == "in a stream" else Answer(status=status, body=error))
    async with running(provider(upstream.url)) as server:
        answer = await make(server, "whole" if call == "whole" else "stream")

    assert call == "in a stream" or "my prompt" in answer.text
    assert "my prompt" not in caplog.text
    assert "UpstreamRejected" in caplog.text or call == "in a stream"


@pytest.mark.parametrize("call", ["whole", "stream"])
@pytest.mark.parametrize("reason", ["error", "abort", "insufficient_system_resource"])
async def test_an_answer_that_says_it_failed_is_no_answer(
    upstream: ScriptedUpstream, call: str, reason: str
) -> None:
    """Half of one is not told as all of it: the next model is asked, or the stream breaks off."""
    choice = {"index": 0, "message": {"content": "half"}, "finish_reason": reason}
    said = Answer(events=[chunk({"content": "half"}), chunk({}, reason), "[DONE]"])
    upstream.script(Answer(body={"choices": [choice]}) if call == "whole" else said)
    spare = "    spare: {backend: echo}\n"
    config = provider(upstream.url, "fallback: [spare]") + spare
    async with running(config.replace("  embedding", f"{spare}  embedding")) as server:
        answer = await make(server, call)
        (row,) = await server.rows("backend_name = 'default'")

    if call == "whole":
        assert "hello" == answer.json["choices"][0]["message"]["content"]
    else:
        *_, last = events(answer.text)
        assert "server_error" == last["error"]["type"]
    assert (False, "backend_error") == (row["success"], row["error_code"])


@pytest.mark.parametrize("told", [whole("hi", tool_calls=[named("f", "{}", id="c1")]), whole("hi")])
async def test_a_whole_answer_to_who_wants_a_stream_is_one(
    gateway: RunningServer, upstream: ScriptedUpstream, told: Any
) -> None:
    """Caches before providers, and models that cannot stream, answer so."""
    upstream.script(Answer(body=told))
    asked: Any = {**HELLO, "tools": [TOOL]}
    async with openai_client(gateway) as client:
        stream = await client.chat.completions.create(**asked, stream=True)
        chunks = [one.choices[0] async for one in stream]
    (row,) = await gateway.rows()

    calls = [call for one in chunks for call in one.delta.tool_calls or ()]
    assert "hi" == "".join(one.delta.content or "" for one in chunks)
    assert len(told["choices"][0]["message"].get("tool_calls", ())) == len(calls)
    assert told["choices"][0]["finish_reason"] == chunks[-1].finish_reason
    assert (True, 3, 1, False) == (
        row["success"],
        row["prompt_tokens"],
        row["completion_tokens"],
        row["usage_estimated"],
    )


SAYS = {"message": "no: sk-abcdef123456", "type": "t", "param": "p", "code": "c"}
REFUSALS: dict[str, tuple[Any, int]] = {
    "OpenRouter's": ({"error": {"message": "no", "code": 429, "metadata": {"raw": "x"}}}, 429),
    "Azure's": ({"error": {**SAYS, "code": "content_filter", "status": 400}}, 400),
    "Groq's": ({"error": {**SAYS, "status_code": 413, "failed_generation": "x"}}, 413),
    "vLLM's": ({"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, 400),
    "Google's": ([{"error": {"message": "no", "code": 404, "status": "NOT_FOUND"}}], 404),
    "a number as text": ({"error": {"message": "no", "code": "422"}}, 422),
    "OpenAI's code": ({"error": {"message": "no", "code": "rate_limit_exceeded"}}, 429),
    "OpenAI's type": ({"error": {"message": "no", "type": "invalid_request_error"}}, 400),
    "no status": ({"error": SAYS}, 502),
    "Ollama's": ({"error": "model runner has unexpectedly stopped: no"}, 502),
    "z.ai's": ({"code": 500, "msg": "no", "success": False}, 500),
    "our key": ({"error": {"message": "no", "code": 401}}, 502),
    "no credit": ({"error": {"message": "no", "code": 402}}, 502),
    "another harperpy's": ({"error": {"message": "no", "code": "timeout"}}, 504),
    "a choice's": (
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": ""},
                      "error": {"message": "no", "code": 429}}]}, 429),
}  # fmt: skip


@pytest.mark.parametrize("call", ["whole", "stream", "event", "embedding"])
@pytest.mark.parametrize(("told", "status"), REFUSALS.values(), ids=REFUSALS)
async def test_an_error_within_a_good_answer_is_the_refusal_that_it_tells(
    gateway: RunningServer, upstream: ScriptedUpstream, told: Any, status: int, call: str
) -> None:
    """With the status it names, its words where callers may read them, and no key in them."""
    upstream.script(Answer(events=[told, "[DONE]"]) if call == "event" else Answer(body=told))
    if call == "embedding":
        answer = await ask(gateway, "POST", "/v1/embeddings", json={"input": "a"})
    else:
        answer = await make(gateway, "whole" if call == "whole" else "stream")
    (row,) = await gateway.rows()
    said = answer.json["error"]

    assert status == answer.status
    assert ("no" == said["message"].partition(":")[0]) is (status < 500)
    assert "sk-abc" not in answer.text
    assert (False, "timeout" if status == 504 else "backend_error") == (
        row["success"],
        row["error_code"],
    )


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "no", "code": 429}},
        b'event: error\ndata: {"message": "no", "type": "rate_limit_error"}\n\n',
        b'{"error": {"message": "no", "code": 429}}\n',
        {**chunk({"content": ""}, "error"), "error": {"message": "no", "code": 429}},
        {"choices": [{"index": 0, "delta": {}, "error": {"message": "no", "code": 429}}]},
    ],
    ids=["an error", "an event named error", "no event", "beside a choice", "in a choice"],
)
async def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_words(
    gateway: RunningServer, upstream: ScriptedUpstream, error: Any
) -> None:
    """What the provider sends after it does not make half an answer pass for a whole one."""
    after = [] if isinstance(error, bytes) and error[:1] == b"{" else ["[DONE]"]
    upstream.script(Answer(events=[chunk({"content": "half"}), error, *after]))
    *_, last = events((await make(gateway, "stream")).text)
    (row,) = await gateway.rows()

    assert "no" == last["error"]["message"]
    assert (False, 429, True) == (row["success"], row["upstream_status"], row["usage_estimated"])


async def test_no_error_is_looked_for_in_what_is_longer_than_one(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """The loop is not kept by it, and what passes on of a shorter one is short."""
    told = {"message": "no", "code": 400}
    upstream.script(
        Answer(body={"error": {**told, "param": "p" * 300_000}}),
        Answer(body={"error": {**told, "type": "t" * 9000}}),
    )
    long, short = [await make(gateway, "whole") for _ in range(2)]

    assert (502, 400) == (long.status, short.status)
    assert "t" * 500 == short.json["error"]["type"]


@pytest.mark.parametrize("blank", [{}, {"message": "", "type": "", "code": None}, "", None])
async def test_an_error_that_says_nothing_is_none(
    gateway: RunningServer, upstream: ScriptedUpstream, blank: Any
) -> None:
    """Some relays have the field in each answer, also in those of good ones."""
    choice = {"index": 0, "message": {"content": "hi"}, "error": blank}
    late = {**chunk({}, "stop"), "error": blank}
    upstream.script(
        Answer(body={"choices": [choice], "error": blank}),
        Answer(events=[{**chunk({"content": "hi"}), "error": blank}, late, "[DONE]"]),
    )
    choice = (await make(gateway, "whole")).json["choices"][0]
    first, *_, last = events((await make(gateway, "stream")).text)

    assert "hi" == choice["message"]["content"] == first["choices"][0]["delta"]["content"]
    assert "[DONE]" == last


async def test_an_error_within_a_good_answer_leads_to_the_next_model(
    upstream: ScriptedUpstream,
) -> None:
    """As the status would that it should have had: a 429 does, a 400 does not."""
    spare = "    spare: {backend: echo}\n"
    config = provider(upstream.url, "fallback: [spare]") + spare
    async with running(config.replace("  embedding", f"{spare}  embedding")) as server:
        for status in (429, 400):
            upstream.script(Answer(body={"error": {"message": "no", "code": status}}))
        first, second = [await make(server, "whole") for _ in range(2)]
        rows = await server.rows()

    assert (200, 400) == (first.status, second.status)
    assert [(429, False), (None, True), (400, False)] == [
        (row["upstream_status"], row["success"]) for row in sorted(rows, key=lambda row: row["id"])
    ]


TOOK = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
FAILED: Any = {"index": 0, "message": {"content": "half"}, "finish_reason": "error"}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("whole", Answer(body={"choices": [FAILED], "usage": TOOK})),
        ("whole", Answer(body={"error": {"message": "no", "code": 400}, "usage": TOOK})),
        ("stream", Answer(events=[{**chunk({}, "error"), "usage": TOOK}])),
        ("stream", Answer(events=[chunk({"content": "a"}), {"error": "no", "usage": TOOK}])),
        ("embed", Answer(body={"data": [], "usage": TOOK})),
        ("embed", Answer(body={"data": [{"embedding": "?"}], "usage": TOOK})),
    ],
    ids=["a reason", "an error", "a stream's reason", "a stream's error", "no vector", "no number"],
)
async def test_what_a_failed_answer_took_is_billed(
    gateway: RunningServer, upstream: ScriptedUpstream, call: str, told: Answer
) -> None:
    """The provider says so, and asks for its money."""
    upstream.script(told)
    if call == "embed":
        await ask(gateway, "POST", "/v1/embeddings", json={"input": "a"})
    else:
        await make(gateway, call)
    (row,) = await gateway.rows()

    counted = (row["prompt_tokens"] or row["embedding_tokens"], row["completion_tokens"])
    assert (False, False) == (row["success"], row["usage_estimated"])
    assert (1000, None if call == "embed" else 500) == counted


COMPLETE = [chunk({"content": "hi"}), chunk({}, finish_reason="stop")]


@pytest.mark.parametrize(
    "tail",
    [
        Answer(events=COMPLETE, cut=True),
        Answer(events=[*COMPLETE, b"data: {nonsense\n\n"]),
        Answer(events=[*COMPLETE, {"error": {"message": "too late"}}]),
        Answer(events=[*COMPLETE, b"data: \n\n", b"data: [DONE] \n\n"]),
    ],
    ids=["cut", "nonsense", "an error", "blanks"],
)
async def test_what_breaks_off_after_the_end_takes_nothing_from_the_answer(
    gateway: RunningServer, upstream: ScriptedUpstream, tail: Answer
) -> None:
    """A reason was given: the answer is whole, whatever becomes of the connection."""
    upstream.script(tail)
    *chunks, last = events((await make(gateway, "stream")).text)

    assert ("[DONE]", "stop") == (last, chunks[-1]["choices"][0]["finish_reason"])
    assert 1 == len(await gateway.rows("success = 1"))
