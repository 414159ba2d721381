"""Every parameter that the openai package knows has a treatment, and gets it."""

import asyncio
import io
import json
import runpy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from harperpy.plugins.openai_protocol import chat_body
from harperpy.resources.models.v1.parameters import CHAT, EMBEDDINGS, PARTS, Parameter
from harperpy.resources.models.v1.schema import ChatRequest, EmbeddingRequest
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params

from harperpy import (
    Body,
    Context,
    GenerateOpts,
    Prompt,
    RequestTarget,
    Resource,
    ToolDef,
)
from harperpy.calls import with_allowed_tools
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running
from helpers import HELLO, ask, provider

PAGE = Path(__file__).parents[1] / "docs" / "openai-compatibility.md"
USER = {"role": "user", "content": "hello"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}

# A value for each parameter, what must stand beside it, and what of it reaches a provider
# (the same, where nothing is said).
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
    "function_call": {"functions": [FUNCTION]},
    "top_logprobs": {"logprobs": True},
    "modalities": {"audio": {"voice": "alloy", "format": "wav"}},
}
VALUES: dict[str, Any] = {
    "messages": [USER],
    "model": "gpt-4o-mini",
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "functions": [FUNCTION],
    "function_call": {"name": "f"},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True},
    },
    "temperature": 0.5,
    "top_p": 0.5,
    "max_completion_tokens": 7,
    "max_tokens": 7,
    "stop": ["END"],
    "seed": 7,
    "presence_penalty": 1.5,
    "frequency_penalty": -1.5,
    "logit_bias": {"50256": -100.0},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "reasoning_effort": "high",
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "hello"},
    "web_search_options": {"search_context_size": "low"},
    "moderation": {"model": "omni-moderation-latest"},
    "service_tier": "flex",
    "store": True,
    "user": "ada",
    "safety_identifier": "ada",
    "metadata": {"a": "b"},
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
}
ARRIVES: dict[str, dict[str, Any]] = {
    "max_completion_tokens": {"max_tokens": 7},
    "functions": {"tools": [TOOL]},
    "function_call": {"tool_choice": VALUES["tool_choice"]},
}
NEEDY = [one for one in CHAT if one.needs and one.name not in ("stream", "tools", "functions")]


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server whose default model is the scripted provider, and that has echo besides."""
    echo = "echo: {backend: echo}"
    config = provider(upstream.url).replace("  embedding:", f"    {echo}\n  embedding:")
    async with running(config) as server:
        yield server


def names(table: tuple[Parameter, ...]) -> list[str]:
    """The names of a table's rows."""
    return [one.name for one in table]


def test_every_parameter_of_the_openai_package_is_in_the_table_once() -> None:
    """A parameter that the package gains fails here until someone decides what it does."""
    chat = get_type_hints(completion_create_params.CompletionCreateParamsStreaming)
    embeddings = get_type_hints(embedding_create_params.EmbeddingCreateParams)

    assert sorted(chat) == sorted(names(CHAT)) == sorted(ChatRequest.__struct_fields__)
    assert sorted(embeddings) == sorted(names(EMBEDDINGS))
    assert sorted(embeddings) == sorted(EmbeddingRequest.__struct_fields__)
    assert sorted(VALUES) == sorted(chat)


def body_of(name: str) -> dict[str, Any]:
    """A request with a parameter and what must stand beside it."""
    return {**HELLO, **BESIDE.get(name, {}), name: VALUES[name]}


@pytest.mark.parametrize("name", names(CHAT))
async def test_what_the_table_says_reaches_the_provider(
    gateway: RunningServer, upstream: ScriptedUpstream, name: str
) -> None:
    """Each parameter arrives as it was sent, or by the name that providers have for it."""
    upstream.script(Answer(status=418))
    await ask(gateway, "POST", "/v1/chat/completions", json=body_of(name))

    arrived = upstream.requests[0].body
    for key, value in ARRIVES.get(name, {name: VALUES[name]}).items():
        assert value == arrived[key]


class Ask(Resource):
    """Hands the body of a request to the models as it is."""

    path = "Ask"

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> dict[str, str]:
        """The answer's text."""
        body = await data
        result = await context.models.generate(body, model=body["model"])
        return {"said": result.content}


# Labels are for the gateway to pass on, and streams are asked for by another method.
ITS_OWN = ("stream", "stream_options", *(one.name for one in CHAT if one.effect == "accepted"))


@pytest.mark.parametrize("name", [name for name in names(CHAT) if name not in ITS_OWN])
async def test_a_body_means_the_same_to_the_models_as_to_the_gateway(
    upstream: ScriptedUpstream, name: str
) -> None:
    """A resource of one's own that passes an OpenAI body on asks the provider the same."""
    async with running(provider(upstream.url), resources={"Ask": Ask}) as server:
        for path in ("/Ask", "/v1/chat/completions"):
            upstream.script(Answer(status=418))
            await ask(server, "POST", path, json=body_of(name))

    own, gateways = upstream.requests
    assert gateways.body == own.body


TOOLS = [TOOL, {"type": "custom", "custom": {"name": "sum", "format": {"type": "text"}}}]
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "c2", "type": "custom", "custom": {"name": "sum", "input": "1 + 1"}},
]
LESS_USUAL: dict[str, dict[str, Any]] = {
    "custom tools and their calls": {
        "tools": TOOLS,
        "tool_choice": {"type": "custom", "custom": {"name": "sum"}},
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            *({"role": "tool", "tool_call_id": call["id"], "content": "2"} for call in CALLS),
        ],
    },
    "allowed tools": {
        "tools": TOOLS,
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "auto",
                "tools": [{"type": "custom", "custom": {"name": "sum"}}],
            },
        },
    },
    "functions of the old protocol": {
        "functions": [FUNCTION],
        "messages": [
            USER,
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "rain"},
        ],
    },
    "parts of messages": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "https://a.example/a.png"}},
                ],
            }
        ]
    },
}


@pytest.mark.parametrize("fields", LESS_USUAL.values(), ids=LESS_USUAL)
async def test_less_usual_bodies_mean_the_same_too(
    upstream: ScriptedUpstream, fields: dict[str, Any]
) -> None:
    """What the protocol has besides functions and text arrives the same by both ways."""
    async with running(provider(upstream.url), resources={"Ask": Ask}) as server:
        for path in ("/Ask", "/v1/chat/completions"):
            upstream.script(Answer(status=418))
            await ask(server, "POST", path, json={**HELLO, **fields})

    own, gateways = upstream.requests
    assert gateways.body == own.body


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", "allowed_tools"),
        ("https://api.openai.com.example/v1", "auto"),
    ],
)
async def test_openai_itself_is_told_which_tools_are_allowed(url: str, sent: str) -> None:
    """There the list of tools stays as it is, which keeps its cache; others get the mode."""
    config = f'models: {{generative: {{gpt: {{backend: openai, apiKey: k, baseUrl: "{url}"}}}}}}'
    async with running(config) as server:
        (candidate,) = server.server.core.models._routes.candidates("generative", "gpt", {})
    backend: Any = candidate.backend
    opts = GenerateOpts(tool_choice="auto", allowed_tools=["f"], n=1)
    prompt = Prompt(messages=[], tools=[ToolDef(name="f"), ToolDef(name="g")])
    asked = with_allowed_tools(prompt, candidate, opts)
    body = json.loads(chat_body(asked, opts, backend.limit_name))

    choice = body["tool_choice"]
    assert sent == (choice if isinstance(choice, str) else choice["type"])
    assert (2 if sent == "allowed_tools" else 1) == len(body["tools"])


@pytest.mark.parametrize("one", NEEDY, ids=names(tuple(NEEDY)))
async def test_what_a_backend_cannot_do_is_refused_by_name(
    gateway: RunningServer, one: Parameter
) -> None:
    """Echo has none of these: 400 with the parameter, and no call."""
    request = {**body_of(one.name), "model": "echo"}
    answer = await ask(gateway, "POST", "/v1/chat/completions", json=request)

    error = answer.json["error"]
    assert (400, "invalid_request_error") == (answer.status, error["type"])
    assert ("unsupported_parameter", one.name) == (error["code"], error["param"])
    assert [] == await gateway.rows("success = 1")


IDLE: dict[str, Any] = {
    "response_format": {"type": "text"},
    "logit_bias": {},
    "logprobs": False,
    "reasoning_effort": "none",
    "verbosity": "medium",
    "modalities": ["text"],
    "service_tier": "auto",
    "store": False,
}


@pytest.mark.parametrize("name", [one.name for one in CHAT if one.idle])
async def test_a_value_that_asks_for_nothing_is_honoured_by_everyone(
    gateway: RunningServer, name: str
) -> None:
    """The values that the page gives in brackets are no reason for a refusal."""
    request = {**HELLO, "model": "echo", name: IDLE[name]}
    answer = await ask(gateway, "POST", "/v1/chat/completions", json=request)

    assert (200, "hello") == (answer.status, answer.json["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", [one.name for one in CHAT if one.effect == "accepted"])
async def test_a_label_changes_nothing(gateway: RunningServer, name: str) -> None:
    """With it or without, the answer is the same."""
    plain = {**HELLO, "model": "echo"}
    answers = [
        (await ask(gateway, "POST", "/v1/chat/completions", json=request)).json
        for request in (plain, {**plain, name: VALUES[name]})
    ]
    first, second = ({**one, "id": "", "created": 0} for one in answers)
    assert first == second


@pytest.mark.parametrize("name", [name for name in names(CHAT) if name not in HELLO])
async def test_null_is_the_same_as_absent(gateway: RunningServer, name: str) -> None:
    """Clients that dump their models send null for what is not there."""
    request = {**HELLO, "model": "echo", name: None}
    answer = await ask(gateway, "POST", "/v1/chat/completions", json=request)

    assert (200, "hello") == (answer.status, answer.json["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("text", {"text": "hello"}),
        ("image_url", {"image_url": {"url": "https://example.org/a.png", "detail": "low"}}),
        ("input_audio", {"input_audio": {"data": "AAAA", "format": "wav"}}),
        ("file", {"file": {"file_data": "data:text/plain;base64,AAAA", "filename": "a.txt"}}),
    ],
)
async def test_parts_of_a_message_reach_who_can_use_them(
    gateway: RunningServer, upstream: ScriptedUpstream, part: str, content: dict[str, Any]
) -> None:
    """A provider gets each part as it was sent; echo, which reads text, refuses the others."""
    sent = {"type": part, **content}
    messages = [{"role": "user", "content": [{"type": "text", "text": "look:"}, sent]}]
    upstream.script(Answer(status=418))
    request = {**HELLO, "messages": messages}
    await ask(gateway, "POST", "/v1/chat/completions", json=request)
    answer = await ask(gateway, "POST", "/v1/chat/completions", json={**request, "model": "echo"})

    assert messages == upstream.requests[0].body["messages"]
    assert part in names(PARTS)
    if part == "text":
        assert "look:hello" == answer.json["choices"][0]["message"]["content"]
    else:
        error = answer.json["error"]
        told = (answer.status, error["code"], error["param"])
        assert (400, "unsupported_parameter", "messages[0].content[1].type") == told


async def test_unknown_and_labelling_fields_of_an_embedding_reach_the_provider(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """What `extra_body` adds and the label go upstream as they are."""
    more = {"user": "ada", "input_type": "query", "truncate": {"at": 5}}
    await ask(gateway, "POST", "/v1/embeddings", json={"input": "hello", **more})

    assert more == {name: upstream.requests[0].body[name] for name in more}


async def test_a_body_has_a_thousand_unknown_fields_at_most(gateway: RunningServer) -> None:
    """Each costs time of its own: a body of nothing else would keep others waiting."""
    for count, status in ((1000, 200), (1001, 400)):
        more = {f"unknown_{at}": at for at in range(count)}
        answer = await ask(gateway, "POST", "/v1/embeddings", json={"input": "hello", **more})
        assert status == answer.status
    assert "1000 fields that OpenAI does not know" in answer.json["error"]["message"]


async def test_a_long_answer_of_echo_stops_nobody() -> None:
    """Others have turns while it is made."""
    turns, message = 0, {"role": "user", "content": "a " * 2_000_000}
    body = io.BytesIO(json.dumps({"model": "echo", "messages": [message]}).encode())
    headers = {"Content-Type": "application/json"}
    async with running() as server:
        path = "/v1/chat/completions"
        answer = asyncio.create_task(ask(server, "POST", path, data=body, headers=headers))
        while not answer.done():
            turns += 1
            await asyncio.sleep(0)
    assert 200 == answer.result().status
    assert turns > 2000


def test_the_page_says_what_the_table_says() -> None:
    """docs/openai-compatibility.md is what `make docs` writes."""
    written = runpy.run_path(str(PAGE.with_name("openai_compatibility.py")))["page"]()
    assert PAGE.read_text(encoding="utf-8") == written
