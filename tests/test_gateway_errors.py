"""What the gateway refuses, field by field; the other causes: test_error_table.py."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from harperpy import BackendError, GenerateChunk, Prompt, Scope, define_backend
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running
from helpers import HELLO, Answered, ask, events, openai_client, provider

pytestmark = pytest.mark.usefixtures("transport")

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
INVALID = "invalid_request_error"
USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "f"}}
TEXT = {"model": "echo", "input": "hi"}


def told(answer: Answered) -> dict[str, Any]:
    """The error object of an answer, which is JSON and holds nothing else."""
    assert "application/json" == answer.headers["Content-Type"]
    body = answer.json
    assert {"error"} == set(body)
    assert {"message", "type", "param", "code"} == set(body["error"])
    assert body["error"]["message"]
    return body["error"]


def kind(answer: Answered) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and param of a refusal."""
    error = told(answer)
    return answer.status, error["type"], error["code"], error["param"]


async def test_the_client_knows_the_classes_of_our_refusals(server: RunningServer) -> None:
    """OpenAI's client raises its own exceptions, and finds code and param in them."""
    messages = [USER]
    async with openai_client(server, "hk_wrong") as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.chat.completions.create(model="echo", messages=messages)
    async with openai_client(server) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-9", messages=messages, stream=True)
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model="echo", messages=messages, temperature=9)

    assert "invalid_api_key" == unknown.value.code
    assert ("model_not_found", "model") == (missing.value.code, missing.value.param)
    assert (INVALID, "temperature") == (wrong.value.type, wrong.value.param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [USER, {**USER, "role": "robot"}]}, "messages[1].role"),
        ({"messages": [{**USER, "role": 1}]}, "messages[0].role"),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content"),
        ({"messages": [{**USER, "content": [{"type": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "1", **TOOL, "function": {"name": "f", "arguments": {}}}
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 1}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"n": 0}, "n"),
        ({"tools": {}}, "tools"),
        ({"tools": [{**TOOL, "type": "retrieval"}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "two words"}}]},
            "tools[0].function.name",
        ),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": {**TOOL, "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
async def test_a_chat_that_does_not_fit_names_the_field(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    """400 with the path of the first thing that is wrong; nothing is called."""
    answer = await ask(server, "POST", CHAT, json={"model": "echo", "messages": [USER], **fields})

    assert (400, INVALID, param) == (answer.status, told(answer)["type"], told(answer)["param"])
    assert f"'{param}'" in told(answer)["message"]
    assert [] == await server.rows("success = 1")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
        ),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_what_would_change_the_answer_is_refused_where_it_cannot_be_had(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    """What nobody would honour is refused, by gateway or backend, and never ignored."""
    answer = await ask(server, "POST", CHAT, json={"model": "echo", "messages": [USER], **fields})

    assert (400, INVALID, "unsupported_parameter", param) == kind(answer)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "invalid_type", "input"),
        ({"input": ""}, "string_below_min_length", "input"),
        ({"input": []}, "empty_array", "input"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": ["a", ""]}, "string_below_min_length", "input[1]"),
        ({"input": ["a", None]}, "invalid_type", "input[1]"),
        ({"input": ["a"] * 2049}, "array_above_max_length", "input"),
        ({"encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"dimensions": 0}, "integer_below_min_value", "dimensions"),
        ({"dimensions": 4097}, None, "dimensions"),
        ({"dimensions": 2**62}, None, "dimensions"),
        ({"model": 1}, "invalid_type", "model"),
        ({"model": ""}, "string_below_min_length", "model"),
    ],
)
async def test_an_embedding_that_does_not_fit_names_the_field(
    server: RunningServer, fields: dict[str, Any], code: str | None, param: str
) -> None:
    """400 with the path of what is wrong."""
    answer = await ask(server, "POST", EMBEDDINGS, json={**TEXT, **fields})

    assert (400, INVALID, code, param) == kind(answer)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": [USER], "response_format": {}}, "response_format.type"),
    ],
)
async def test_a_field_that_is_missing_is_named(
    server: RunningServer, body: Any, field: str
) -> None:
    """The message says which field a client forgot."""
    answer = await ask(server, "POST", CHAT, json=body)

    assert (400, INVALID, "missing_required_parameter", field) == kind(answer)
    assert f"Missing required parameter: '{field}'." == told(answer)["message"]


SECRET = "the database password is hunter2"


def broken(scope: Scope) -> None:
    """Models that fail as models do: at once, or in the middle of a stream."""

    async def raises() -> str:
        raise RuntimeError(SECRET)

    async def embeds() -> list[list[float]]:
        raise RuntimeError(SECRET)

    async def begins() -> AsyncIterator[str]:
        yield "one"
        raise RuntimeError(SECRET)

    async def never_begins(prompt: Prompt) -> AsyncIterator[str]:
        if prompt.messages:
            raise RuntimeError(SECRET)
        yield ""

    async def fails() -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(delta_content="one")
        raise BackendError(SECRET, upstream_status=500)

    define = scope.models.define_backend
    register = scope.models.register_backend
    register("generative", "raises", define("raises", generate=raises))
    register("generative", "begins", define("begins", generate_stream=begins))
    register("generative", "fails", define("fails", generate_stream=fails))
    register("generative", "never-begins", define("never", generate_stream=never_begins))
    register("embedding", "raises", define("raises", embed=embeds))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"model": "raises"}),
        (CHAT, {"model": "begins"}),
        (CHAT, {"model": "never-begins"}),
        (CHAT, {"model": "never-begins", "stream": True}),
        (EMBEDDINGS, {"model": "raises", "input": "hi"}),
    ],
)
async def test_an_exception_never_tells_its_text(path: str, body: dict[str, Any]) -> None:
    """What a backend did not foresee is a 502 that says no more; its row says `backend_error`."""
    async with running(handle_application=broken) as server:
        answer = await ask(server, "POST", path, json={**HELLO, **body})
        rows = await server.rows()

    assert (502, "server_error", None, None) == kind(answer)
    assert SECRET not in answer.text
    assert [("backend_error", False)] == [(row["error_code"], row["success"]) for row in rows]


@pytest.mark.parametrize("model", ["begins", "fails"])
async def test_a_failure_in_mid_stream_is_told_in_band(model: str) -> None:
    """The stream ends with an error, without `[DONE]`, and without the exception's text."""
    async with running(handle_application=broken) as server:
        body = {**HELLO, "model": model, "stream": True}
        answer = await ask(server, "POST", CHAT, json=body)
        async with openai_client(server) as client:
            stream = await client.chat.completions.create(model=model, messages=[USER], stream=True)
            assert "one" == (await anext(stream)).choices[0].delta.content
            with pytest.raises(openai.APIError) as caught:
                await anext(stream)

    first, last = events(answer.text)
    assert "one" == first["choices"][0]["delta"]["content"]
    assert {"error"} == set(last)
    assert {"type": "server_error", "param": None, "code": None} == {
        name: value for name, value in last["error"].items() if name != "message"
    }
    assert last["error"]["message"] == caught.value.message
    assert SECRET not in answer.text


async def test_a_gateway_that_did_not_start_says_so() -> None:
    """The mounts of a plugin that failed keep its wording, and tell nothing of the cause."""

    def fail(scope: Scope) -> None:
        from harperpy.resources.models.v1 import V1Models  # noqa: PLC0415

        scope.resources.set("v1/models", V1Models)
        raise RuntimeError(SECRET)

    config = f"{ECHO}\nplugins: {{models_gateway: false}}"
    async with running(config, handle_application=fail) as server:
        answer = await ask(server, "GET", MODELS)

    assert (500, "server_error", None, None) == kind(answer)
    assert "plugin test did not start" in told(answer)["message"]
    assert SECRET not in answer.text


@pytest.mark.parametrize("field", ["temperature", "unknown"])
async def test_a_number_that_no_machine_holds_is_refused(server: RunningServer, field: str) -> None:
    """1e400 is JSON, and still nothing that can be honoured or passed on."""
    body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{field}": 1e400}}'
    headers = {"Content-Type": "application/json"}
    answer = await ask(server, "POST", CHAT, data=body, headers=headers)

    assert (400, INVALID) == (answer.status, told(answer)["type"])
    assert "[...]" not in answer.text


async def test_a_body_that_is_not_compressed_as_it_says_is_refused(server: RunningServer) -> None:
    """What does not inflate is the client's error."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await ask(server, "POST", CHAT, data=b"not gzip", headers=headers)

    assert (400, INVALID) == (answer.status, told(answer)["type"])


async def test_nesting_that_can_be_read_but_not_written_is_refused(
    upstream: ScriptedUpstream,
) -> None:
    """However deep, it goes upstream or is refused: there is no depth in between."""
    async with running(provider(upstream.url)) as gateway:
        await check_depths(gateway)


async def check_depths(gateway: RunningServer) -> None:
    """Ask with each depth around that which a decoder takes."""
    for depth in range(960, 1030, 2):
        deep = "[" * depth + "]" * depth
        for path, field in ((CHAT, '"messages": [{"role": "user", "content": "hi"}]'),
                            (EMBEDDINGS, '"input": "hi"')):  # fmt: skip
            body = f'{{{field}, "foo": {deep}}}'
            headers = {"Content-Type": "application/json"}
            answer = await ask(gateway, "POST", path, data=body, headers=headers)
            assert answer.status in (200, 400)


@pytest.mark.parametrize("accept", ["application/xml", "text/event-stream", "text/csv"])
async def test_answers_that_are_not_streamed_are_json_whatever_was_accepted(
    server: RunningServer, accept: str
) -> None:
    """As OpenAI has it: nothing is called and paid for, and then not delivered."""
    for method, path, body in (("POST", CHAT, {**HELLO, "model": "echo"}),
                               ("POST", EMBEDDINGS, TEXT), ("GET", MODELS, None)):  # fmt: skip
        answer = await ask(server, method, path, json=body, headers={"Accept": accept})
        assert (200, "application/json") == (answer.status, answer.headers["Content-Type"])


@pytest.mark.parametrize("vectors", [[[1.0]], [[1.0], [float("nan")]], [[1.0]] * 3])
async def test_vectors_that_do_not_fit_the_inputs_are_a_fault(vectors: list[list[float]]) -> None:
    """One vector of numbers for each input, or a 502: none is missing, none is null."""

    def handle_application(scope: Scope) -> None:
        backend = define_backend("odd", embed=lambda: vectors)
        scope.models.register_backend("embedding", "odd", backend)

    async with running(handle_application=handle_application) as server:
        answer = await ask(server, "POST", EMBEDDINGS, json={"model": "odd", "input": ["a", "b"]})

    assert (502, "server_error") == (answer.status, told(answer)["type"])
