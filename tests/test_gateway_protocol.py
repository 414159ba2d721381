"""The protocol beyond plain text: roles, tools of all kinds, choices, what providers add."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from harperpy import Scope
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running
from helpers import HELLO, ask, events, openai_client, provider

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": SCHEMA}}
GRAMMAR = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]+"}}
SUM = {"type": "custom", "custom": {"name": "sum", "description": "Adds", "format": GRAMMAR}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CUSTOM_CALL = {"id": "c2", "type": "custom", "custom": {"name": "sum", "input": "1 + 1"}}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server in front of the scripted provider, and of echo."""
    echo = "    echo: {backend: echo}\n"
    config = provider(upstream.url).replace("  embedding:", f"{echo}  embedding:")
    async with running(config) as server:
        yield server


def whole(message: dict[str, Any], reason: str = "stop", **more: Any) -> Answer:
    """A provider's whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    return Answer(body={"choices": [choice], "usage": usage, **more})


def chunk(delta: dict[str, Any], reason: str | None = None, index: int = 0, **more: Any) -> Any:
    """A chunk of a provider's stream."""
    return {"choices": [{"index": index, "delta": delta, "finish_reason": reason}], **more}


async def chat(server: RunningServer, **fields: Any) -> Any:
    """The whole answer's body, or the events of a stream, to a request that is fine."""
    answer = await ask(server, "POST", CHAT, json={**HELLO, **fields})
    assert 200 == answer.status, answer.text
    return events(answer.text) if fields.get("stream") else answer.json


BAD_MESSAGES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a result without a call": ([USER, {"role": "tool", "tool_call_id": "c1", "content": ""}],
                                "messages[1].role"),
    "a result of another call": (
        [USER, {"role": "assistant", "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "c9", "content": ""}],
        "messages[2].tool_call_id",
    ),
    "a call without its result": (
        [USER, {"role": "assistant", "tool_calls": [CALL]}, USER], "messages[1].tool_calls"),
    "a call at the end": ([USER, {"role": "assistant", "tool_calls": [CALL]}],
                          "messages[1].tool_calls"),
    "one of two calls answered": (
        [USER, {"role": "assistant", "tool_calls": [CALL, CUSTOM_CALL]},
         {"role": "tool", "tool_call_id": "c1", "content": ""}, USER],
        "messages[1].tool_calls",
    ),
    "a function's result without a call": (
        [USER, {"role": "function", "name": "f", "content": ""}], "messages[1].role"),
    "no tool_call_id": ([USER, {"role": "tool", "content": ""}], "messages[1].tool_call_id"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "no parts": ([{"role": "user", "content": []}], "messages[0].content"),
    "an image in a system message": (
        [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0].type",
    ),
    "a refusal of the user": (
        [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}],
        "messages[0].content[0].type",
    ),
    "an image without a URL": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0].image_url.url",
    ),
    "sound of an unknown format": (
        [{"role": "user", "content": [
            {"type": "text", "text": "hear:"},
            {"type": "input_audio", "input_audio": {"data": "", "format": "ogg"}}]}],
        "messages[0].content[1].input_audio.format",
    ),
    "a call without an id": (
        [{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}],
        "messages[0].tool_calls[0].id",
    ),
    "a call of an unknown type": (
        [{"role": "assistant", "tool_calls": [{**CALL, "type": "search"}]}],
        "messages[0].tool_calls[0].type",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
async def test_messages_that_do_not_fit_together_are_refused(
    server: RunningServer, messages: list[dict[str, Any]], param: str
) -> None:
    """400 with the path of the message, and of the field in it."""
    answer = await ask(server, "POST", CHAT, json={"model": "echo", "messages": messages})

    error = answer.json["error"]
    assert (400, "invalid_request_error", param) == (answer.status, error["type"], error["param"])


BAD_TOOLS: dict[str, tuple[dict[str, Any], str]] = {
    "a name twice": ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    "a custom tool of a function's name": (
        {"tools": [WEATHER, {"type": "custom", "custom": {"name": "weather"}}]},
        "tools[1].custom.name",
    ),
    "a bad name of a custom tool": (
        {"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools[0].custom.name"),
    "a name of 65 letters": (
        {"tools": [{"type": "function", "function": {"name": "a" * 65}}]},
        "tools[0].function.name",
    ),
    "129 tools": ({"tools": [WEATHER] * 129}, "tools"),
    "an unknown choice": (
        {"tools": [WEATHER], "tool_choice": {"type": "custom", "custom": {"name": "sum"}}},
        "tool_choice",
    ),
    "an allowed tool that is not there": (
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [
                {"type": "function", "function": {"name": "weather"}},
                {"type": "function", "function": {"name": "clock"}}]}}},
        "tool_choice.allowed_tools.tools[1]",
    ),
    "a mode that is none": (
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "none", "tools": [{"type": "function", "function": {"name": "weather"}}]}}},
        "tool_choice.allowed_tools.mode",
    ),
    "a choice without tools": ({"tool_choice": "auto"}, "tool_choice"),
    "the old choice without functions": ({"function_call": "none"}, "function_call"),
    "parallel calls without tools": ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    "a name that ends its line": (
        {"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools[0].function.name"),
    "tools and functions": ({"tools": [WEATHER], "functions": [{"name": "f"}]}, "functions"),
    "a function twice": ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
    "a function that is not there": (
        {"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "129 choices": ({"n": 129}, "n"),
    "audio without its voice": ({"modalities": ["audio"]}, "audio"),
    "a bias out of range": ({"logit_bias": {"7": 101}}, "logit_bias"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS.values(), ids=BAD_TOOLS)
async def test_options_that_do_not_fit_together_are_refused(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    """400 with the path of the field."""
    body = {"model": "echo", "messages": [USER], **fields}
    answer = await ask(server, "POST", CHAT, json=body)

    error = answer.json["error"]
    assert (400, "invalid_request_error", param) == (answer.status, error["type"], error["param"])


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "invalid_value",
            (
                "Invalid value for 'messages[0].role': 'robot'. Supported values are: 'developer', "
                "'system', 'user', 'assistant', 'tool', 'function'."
            ),
        ),
        (
            {"reasoning_effort": "huge"},
            "invalid_value",
            (
                "Invalid value for 'reasoning_effort': 'huge'. Supported values are: 'high', "
                "'low', 'max', 'medium', 'minimal', 'none', 'xhigh'."
            ),
        ),
        (
            {"temperature": 3},
            "decimal_above_max_value",
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2.",
        ),
        (
            {"n": 0},
            "integer_below_min_value",
            "Invalid 'n': integer below minimum value. Expected a value >= 1.",
        ),
        (
            {"messages": []},
            "empty_array",
            "Invalid 'messages': empty array. Expected an array with minimum length 1.",
        ),
        (
            {"stop": ["a"] * 5},
            "array_above_max_length",
            "Invalid 'stop': array too long. Expected an array with maximum length 4.",
        ),
        (
            {"model": 5},
            "invalid_type",
            "Invalid type for 'model': expected a string, but got an integer instead.",
        ),
        (
            {"stop": 5},
            "invalid_type",
            "Invalid type for 'stop': expected a string or an array, but got an integer instead.",
        ),
        (
            {"metadata": {"a": 5}},
            "invalid_type",
            "Invalid type for 'metadata': expected a string, but got an integer instead.",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "ä"}}]},
            "invalid_value",
            (
                "Invalid 'tools[0].function.name': string does not match pattern. Expected a "
                "string that matches the pattern '^[a-zA-Z0-9_-]{1,64}$'."
            ),
        ),
        (
            {"safety_identifier": "a" * 65},
            "string_above_max_length",
            (
                "Invalid 'safety_identifier': string too long. Expected a string with maximum "
                "length 64."
            ),
        ),
    ],
)
async def test_a_refusal_has_openais_words_and_code(
    server: RunningServer, fields: dict[str, Any], code: str, message: str
) -> None:
    """Programs read the code, people the message: it says what was expected instead."""
    body = {"model": "echo", "messages": [USER], **fields}
    error = (await ask(server, "POST", CHAT, json=body)).json["error"]

    assert (code, message) == (error["code"], error["message"])


async def test_functions_of_the_old_protocol_are_called_in_it(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """`functions` go out as tools, their results with an id; calls come back as function_call."""
    functions = [{"name": "weather", "parameters": SCHEMA}]
    history = [
        USER,
        {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    pieces = [{"index": 0, **CALL}, {"index": 0, "function": {"arguments": " "}}]
    upstream.script(
        whole({"content": None, "tool_calls": [CALL]}, "tool_calls"),
        Answer(
            events=[
                *(chunk({"tool_calls": [piece]}) for piece in pieces),
                chunk({}, "tool_calls"),
                "[DONE]",
            ]
        ),
    )
    asked = {"messages": history, "functions": functions, "function_call": {"name": "weather"}}
    answer = await chat(gateway, **asked)
    *chunks, _ = await chat(gateway, **asked, stream=True)

    sent = upstream.requests[0].body
    assert [WEATHER] == sent["tools"]
    assert {"type": "function", "function": {"name": "weather"}} == sent["tool_choice"]
    assert [{**CALL, "id": "call_1"}] == sent["messages"][1]["tool_calls"]
    assert {"role": "tool", "tool_call_id": "call_1", "content": "rain"} == sent["messages"][2]
    (choice,) = answer["choices"]
    assert {"name": "weather", "arguments": "{}"} == choice["message"]["function_call"]
    assert ("function_call", False) == (choice["finish_reason"], "tool_calls" in choice["message"])
    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert [
        {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
        {"function_call": {"arguments": " "}},
        {},
    ] == deltas
    assert "function_call" == chunks[-1]["choices"][0]["finish_reason"]


async def test_custom_tools_go_there_and_back(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Their definition, choice, calls and results pass as they are, whole and in pieces."""
    upstream.script(
        whole({"content": None, "tool_calls": [CUSTOM_CALL]}, "tool_calls"),
        Answer(
            events=[
                chunk({"tool_calls": [{"index": 0, **CUSTOM_CALL}]}),
                chunk({"tool_calls": [{"index": 0, "custom": {"input": " + 1"}}]}),
                chunk({}, "tool_calls"),
            ]
        ),
    )
    choice = {"type": "custom", "custom": {"name": "sum"}}
    result = {"role": "tool", "tool_call_id": "c2", "content": "2"}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [CUSTOM_CALL]}, result]
    asked = {"messages": history, "tools": [SUM, WEATHER], "tool_choice": choice}
    answer = await chat(gateway, **asked)
    *chunks, _ = await chat(gateway, **asked, stream=True)
    refused = await ask(gateway, "POST", CHAT, json={**HELLO, "model": "echo", "tools": [SUM]})

    sent = upstream.requests[0].body
    assert asked == {name: sent[name] for name in asked}
    assert [CUSTOM_CALL] == answer["choices"][0]["message"]["tool_calls"]
    first, second, _ = (one["choices"][0]["delta"] for one in chunks)
    assert [{"index": 0, **CUSTOM_CALL}] == first["tool_calls"]
    assert [{"index": 0, "custom": {"input": " + 1"}}] == second["tool_calls"]
    assert (400, "tools") == (refused.status, refused.json["error"]["param"])


async def test_of_all_tools_only_the_allowed_ones_are_offered(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """A provider that may not know `allowed_tools` gets the mode and just these tools."""
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": choice}
    await chat(gateway, **asked)
    answer = await chat(gateway, **asked, model="echo")

    sent = upstream.requests[0].body
    assert ([CLOCK], "required") == (sent["tools"], sent["tool_choice"])
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert "clock" == call["function"]["name"]


async def test_several_choices_of_one_provider_are_one_call(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """`n` goes to a provider that knows it; choices nobody asked for are passed over."""
    choices = [{"index": at, "message": {"content": f"{at}"}} for at in (1, 0, 2)]
    upstream.script(
        Answer(body={"choices": choices}),
        Answer(
            events=[
                chunk({"content": "b"}, index=1),
                chunk({"content": "a"}),
                chunk({"content": "c"}, index=2),
                chunk({}, "length", index=1),
                chunk({}, "stop"),
            ]
        ),
    )
    answer = await chat(gateway, n=2)
    *chunks, _ = await chat(gateway, n=2, stream=True)

    assert [2, 2] == [request.body["n"] for request in upstream.requests]
    told = [(one["index"], one["message"]["content"]) for one in answer["choices"]]
    assert [(0, "0"), (1, "1")] == told
    streamed = [one["choices"][0] for one in chunks]
    # Clients count the choices as they come, so the first one begins first.
    assert [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": "b"}, None),
        (0, {"content": "a"}, None),
        (0, {}, "stop"),
        (1, {}, "length"),
    ] == [(one["index"], one["delta"], one["finish_reason"]) for one in streamed]
    assert 2 == len(await gateway.rows())


async def test_answers_that_a_provider_left_out_are_asked_for_one_by_one(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Some do not know `n` and give one answer: clients get as many as they asked for."""
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    single = [chunk({"content": "a"}), chunk({}, "stop", usage=usage), "[DONE]"]
    upstream.script(
        *(whole({"content": "a"}) for _ in range(3)), *(Answer(events=single) for _ in range(3))
    )
    answer = await chat(gateway, n=3)
    options = {"include_usage": True}
    *chunks, last, _ = await chat(gateway, n=3, stream=True, stream_options=options)

    assert [3, None, None] * 2 == [request.body.get("n") for request in upstream.requests]
    assert [(0, "a"), (1, "a"), (2, "a")] == [
        (one["index"], one["message"]["content"]) for one in answer["choices"]
    ]
    assert ({"a"}, 3 + 6) == (
        {one["message"]["content"] for one in answer["choices"]},
        answer["usage"]["total_tokens"],
    )
    texts = [one["choices"][0] for one in chunks]
    for index in range(3):
        said = [one["delta"].get("content", "") for one in texts if one["index"] == index]
        assert "a" == "".join(said)
    assert ([], 12) == (last["choices"], last["usage"]["total_tokens"])
    assert 6 == len(await gateway.rows("success = 1"))


@pytest.mark.parametrize("knows", [True, False])
async def test_the_details_of_several_choices_are_told(
    gateway: RunningServer, upstream: ScriptedUpstream, *, knows: bool
) -> None:
    """Whole and streamed, from a provider that gives all at once and from one that does not."""
    usage = {
        "prompt_tokens": 8,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1, "accepted_prediction_tokens": 3},
    }
    places = range(2) if knows else range(1)
    choices = [{"index": at, "message": {"content": "a"}} for at in places]
    ends = [chunk({"content": "a"}, "stop", index=at) for at in places]
    pieces = [*ends, {"choices": [], "usage": usage}, "[DONE]"]
    times = 1 if knows else 2
    upstream.script(
        *[Answer(body={"choices": choices, "usage": usage})] * times,
        *[Answer(events=pieces)] * times,
    )
    answer = await chat(gateway, n=2)
    *_, last, _ = await chat(gateway, n=2, stream=True, stream_options={"include_usage": True})

    for told in (answer["usage"], last["usage"]):
        for details in ("prompt_tokens_details", "completion_tokens_details"):
            expected = {name: count * times for name, count in usage[details].items()}
            assert expected == told[details]


async def test_who_gives_one_answer_at_a_time_is_asked_n_times(server: RunningServer) -> None:
    """Echo answers three times, whole and streamed; each call is a row, and all are paid for."""
    asked: Any = {"model": "echo", "messages": [USER], "n": 3}
    options: Any = {"include_usage": True}
    async with openai_client(server) as client:
        one = await client.chat.completions.create(**{**asked, "n": 1})
        answer = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked, stream_options=options) as stream:
            final = await stream.get_final_completion()

    assert one.usage
    for several in (answer, final):
        assert [(0, "hi"), (1, "hi"), (2, "hi")] == [
            (choice.index, choice.message.content) for choice in several.choices
        ]
        assert several.usage
        assert one.usage.total_tokens * 3 == several.usage.total_tokens
    rows = await server.rows()
    methods = sorted(row["method"] for row in rows)
    assert ["generate"] * 4 + ["generateStream"] * 3 == methods


async def test_one_failure_of_n_ends_the_others_and_is_told() -> None:
    """No answer is better than half of what was asked for; the calls that were left are rows."""

    def handle_application(scope: Scope) -> None:
        calls: list[int] = []

        async def answers() -> AsyncIterator[str]:
            calls.append(1)
            number = len(calls)
            yield "one"
            if number == 2:
                message = "the second fails"
                raise RuntimeError(message)
            while True:
                yield "more"

        backend = scope.models.define_backend("moody", generate_stream=answers)
        scope.models.register_backend("generative", "moody", backend)

    async with running(handle_application=handle_application) as server:
        body = {"model": "moody", "messages": [USER], "n": 2, "stream": True}
        answer = await ask(server, "POST", CHAT, json=body)
        rows = await server.rows()

    assert {"error"} == set(events(answer.text)[-1])
    assert {"backend_error", "aborted"} == {row["error_code"] for row in rows}


FROM_PROVIDER: Any = {"system_fingerprint": "fp_1", "service_tier": "flex"}
DETAILS = {
    "prompt_tokens": 9,
    "completion_tokens": 8,
    "total_tokens": 17,
    "prompt_tokens_details": {"audio_tokens": 1, "cached_tokens": 3},
    "completion_tokens_details": {
        "accepted_prediction_tokens": 1,
        "rejected_prediction_tokens": 2,
        "reasoning_tokens": 4,
    },
}


async def test_what_a_provider_adds_reaches_the_client_whole(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Fingerprint, tier, reasoning, citations, sound, the details of usage: as they were given."""
    message = {
        "content": "hi",
        "reasoning_content": "well…",
        "annotations": [{"type": "url_citation", "url_citation": {"url": "https://a.example"}}],
        "audio": {"id": "a1", "data": "AAAA", "expires_at": 1, "transcript": "hi"},
    }
    upstream.script(whole(message, **FROM_PROVIDER, usage=DETAILS, extra="not ours"))
    answer = await chat(gateway)

    assert {"role": "assistant", "refusal": None, **message} == answer["choices"][0]["message"]
    assert FROM_PROVIDER == {name: answer[name] for name in FROM_PROVIDER}
    assert (DETAILS, False) == (answer["usage"], "extra" in answer)


async def test_what_a_provider_adds_reaches_the_client_in_a_stream(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """The same on the chunks: of the whole on each, pieces as they come, usage at the end."""
    upstream.script(
        Answer(
            events=[
                chunk({"role": "assistant", "content": ""}, **FROM_PROVIDER),
                chunk({"reasoning": "well"}, **FROM_PROVIDER),
                chunk({"reasoning_content": "…"}, **FROM_PROVIDER),
                chunk({"content": "hi"}, **FROM_PROVIDER),
                chunk({}, "stop", **FROM_PROVIDER),
                {"choices": [], "usage": DETAILS, **FROM_PROVIDER},
                "[DONE]",
            ]
        )
    )
    *chunks, last, _ = await chat(gateway, stream=True, stream_options={"include_usage": True})

    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert [
        {"role": "assistant", "reasoning_content": "well"},
        {"reasoning_content": "…"},
        {"content": "hi"},
        {},
    ] == deltas
    for one in (*chunks, last):
        assert FROM_PROVIDER == {name: one[name] for name in FROM_PROVIDER}
    assert DETAILS == last["usage"]
    (row,) = await gateway.rows()
    assert (9, 8, 3, 4) == tuple(
        row[name]
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    )


async def test_every_role_reaches_the_provider(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Names, refusals, reasoning, a sound of before and a part's caching hint go with them."""
    hinted = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "developer", "content": "be short", "name": "dev"},
        {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [hinted], "name": "ada"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "b"}, {"type": "refusal", "refusal": "no"}],
            "refusal": "no",
            "reasoning_content": "hm",
            "audio": {"id": "a1"},
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    await chat(gateway, messages=messages)

    assert messages == upstream.requests[0].body["messages"]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_answer_says_how_long_it_took(server: RunningServer, *, stream: bool) -> None:
    """`openai-processing-ms` and `openai-version` are on answers, streams and refusals."""
    fine = await ask(server, "POST", CHAT, json={**HELLO, "model": "echo", "stream": stream})
    wrong = await ask(server, "POST", CHAT, json={**HELLO, "model": "x", "stream": stream})
    nobody = await ask(server, "POST", CHAT, json=HELLO, key="")

    for answer in (fine, wrong, nobody):
        assert int(answer.headers["openai-processing-ms"]) >= 0
        assert "2020-10-01" == answer.headers["openai-version"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1", "/v1/completions"])
async def test_an_api_that_is_not_there_names_the_setting_of_the_usual_clients(
    server: RunningServer, path: str
) -> None:
    """Who sees this message has pointed a client at /v1, and can mend it in one line."""
    error = (await ask(server, "POST", path, json={})).json["error"]

    assert "unknown_url" == error["code"]
    for hint in ("openai.chat(model)", "use_responses_api=False", "OpenAIChatModel"):
        assert hint in error["message"]
