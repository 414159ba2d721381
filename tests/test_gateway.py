"""The gateway as OpenAI's clients use it: chat, streams, tools, formats, embeddings, models."""

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer, chunk, streamed, whole
from helpers import HELLO, ask, events, finished_calls, openai_client, provider

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server whose models are the scripted upstream's."""
    async with running(provider(upstream.url)) as server:
        yield server


@pytest.fixture
async def client(gateway: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client of that server."""
    async with openai_client(gateway) as client:
        yield client


def user(text: str) -> Any:
    """The messages of a user who says this."""
    return [{"role": "user", "content": text}]


async def chat(server: RunningServer, **fields: Any) -> Any:
    """The body of a chat's answer, whole or as the data of its events."""
    answer = await ask(server, "POST", CHAT, json={**HELLO, **fields})
    assert 200 == answer.status, answer.text
    return events(answer.text) if fields.get("stream") else answer.json


async def test_a_whole_answer_has_every_field_that_clients_insist_upon(
    server: RunningServer,
) -> None:
    """A `chat.completion` is complete by OpenAI's schema, and says nothing more."""
    answer = await chat(server, model="echo", messages=user("hello there"))

    assert re.fullmatch(r"chatcmpl-\w{20,}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    assert {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    } == answer


async def test_a_stream_has_every_field_that_clients_insist_upon(server: RunningServer) -> None:
    """Each `chat.completion.chunk` is complete, the role comes once, and `[DONE]` ends it."""
    *chunks, done = await chat(server, model="echo", messages=user("hello there"), stream=True)

    envelopes = [(one.pop("id"), one.pop("created"), one.pop("object")) for one in chunks]
    assert 1 == len(set(envelopes))
    assert "chat.completion.chunk" == envelopes[0][2]
    said: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": "hello"}, None),
        ({"content": " there"}, None),
        ({}, "stop"),
    ]
    assert [
        {
            "model": "echo",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
        }
        for delta, reason in said
    ] == chunks
    assert "[DONE]" == done


async def test_a_stream_is_plain_server_sent_events(gateway: RunningServer) -> None:
    """Only `data:` lines are sent: an `id:` breaks OpenAI's Python client on the next comment."""
    answer = await ask(gateway, "POST", CHAT, json={**HELLO, "stream": True})

    assert "text/event-stream" == answer.headers["Content-Type"]
    assert "no-cache" == answer.headers["Cache-Control"]
    lines = [line for line in answer.text.split("\n") if line]
    assert [] == [line for line in lines if not line.startswith(("data: {", "data: [DONE]"))]
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json", "text/plain", "*/*"])
async def test_a_stream_is_one_whatever_accept_says(gateway: RunningServer, accept: str) -> None:
    """The body asks for the stream; the header cannot take it back."""
    body = {**HELLO, "stream": True}
    answer = await ask(gateway, "POST", CHAT, json=body, headers={"Accept": accept})

    assert "text/event-stream" == answer.headers["Content-Type"]
    assert "[DONE]" == events(answer.text)[-1]


def use_sync_client(url: str, key: str) -> tuple[str | None, str, int]:
    """What the synchronous client reads: a whole chat, a streamed one, an embedding's size."""
    with openai.OpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0) as client:
        whole = client.chat.completions.create(model="echo", messages=user("whole"))
        with client.chat.completions.create(
            model="echo", messages=user("bit by bit"), stream=True
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        vectors = client.embeddings.create(model="echo", input="the sea")
        return whole.choices[0].message.content, text, len(vectors.data[0].embedding)


async def test_the_synchronous_client_works(server: RunningServer) -> None:
    """Scripts use `openai.OpenAI`, with a connection of its own kind."""
    read = await asyncio.to_thread(use_sync_client, server.url, server.api_key)

    assert ("whole", "bit by bit", 16) == read


async def test_the_asynchronous_client_works(client: openai.AsyncOpenAI) -> None:
    """Applications use `openai.AsyncOpenAI`."""
    answer = await client.chat.completions.create(model="gpt-4o-mini", messages=user("hello"))
    stream = await client.chat.completions.create(
        model="gpt-4o-mini", messages=user("hello"), stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert "Hello world" == answer.choices[0].message.content
    assert "Hello world" == text
    assert answer.usage is not None
    assert 4 == answer.usage.total_tokens


async def test_the_clients_stream_helper_works(client: openai.AsyncOpenAI) -> None:
    """OpenAI's helper validates every chunk and puts the whole answer together."""
    async with client.chat.completions.stream(
        model="gpt-4o-mini", messages=user("hello"), stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()

    assert {"chunk", "content.delta", "content.done"} == kinds
    assert "Hello world" == final.choices[0].message.content
    assert final.usage is not None
    assert 5 == final.usage.total_tokens


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_without_include_usage_every_chunk_has_a_choice(
    gateway: RunningServer, options: dict[str, Any] | None
) -> None:
    """Many programs read `choices[0]` of every chunk."""
    *chunks, _ = await chat(gateway, stream=True, stream_options=options)

    assert [1] * len(chunks) == [len(one["choices"]) for one in chunks]
    assert [one for one in chunks if "usage" in one] == []


async def test_with_include_usage_the_last_chunk_brings_it(gateway: RunningServer) -> None:
    """The usage comes once, without a choice; every chunk before says null."""
    *chunks, last, _ = await chat(gateway, stream=True, stream_options={"include_usage": True})

    assert [] == last["choices"]
    assert {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5} == last["usage"]
    assert [None] * len(chunks) == [one["usage"] for one in chunks]


async def test_details_of_the_usage_reach_the_client(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Cached and reasoning tokens have prices of their own."""
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    upstream.script(Answer(body={**whole("hi"), "usage": usage}))

    assert usage == (await chat(gateway))["usage"]
    (row,) = await gateway.rows()
    assert (8, 5) == (row["cached_tokens"], row["reasoning_tokens"])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_that_counts_nothing_is_counted_for(
    gateway: RunningServer, upstream: ScriptedUpstream, *, stream: bool
) -> None:
    """Usage is never missing: an estimate is given, and the row says that it is one."""
    counted = whole("one two three")
    del counted["usage"]
    told = [chunk({"content": text}) for text in ("one", " two", " three")]
    ended = [*told, chunk({}, finish_reason="stop"), "[DONE]"]
    upstream.script(Answer(events=ended) if stream else Answer(body=counted))
    asked = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await chat(gateway, **asked)
    usage = (answer[-2] if stream else answer)["usage"]

    assert 3 == usage["completion_tokens"]
    assert usage["prompt_tokens"] > 0
    (row,) = await gateway.rows()
    assert (True, 3) == (row["usage_estimated"], row["completion_tokens"])


async def test_a_tool_is_called_and_its_result_taken_by_echo(server: RunningServer) -> None:
    """The round trip of a tool: the call comes back, its result goes in, an answer comes out."""
    messages = user('call get_weather {"city": "Oslo"}')
    async with openai_client(server) as client:
        first = await client.chat.completions.create(
            model="echo", messages=messages, tools=[WEATHER]
        )
        said = first.choices[0].message
        assert said.tool_calls
        result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "rain"}
        messages += [said.model_dump(), result]
        second = await client.chat.completions.create(
            model="echo", messages=messages, tools=[WEATHER]
        )

    call = said.tool_calls[0]
    assert call.type == "function"
    assert ("get_weather", '{"city": "Oslo"}') == (call.function.name, call.function.arguments)
    assert ("tool_calls", None) == (first.choices[0].finish_reason, said.content)
    assert ("stop", None) == (
        second.choices[0].finish_reason,
        second.choices[0].message.tool_calls,
    )


async def test_a_streamed_tool_call_is_put_together_by_the_client(server: RunningServer) -> None:
    """OpenAI's helper needs index, id, type and name on the first piece, and the reason."""
    async with (
        openai_client(server) as client,
        client.chat.completions.stream(
            model="echo", messages=user('call get_weather {"city": "Oslo"}'), tools=[WEATHER]
        ) as stream,
    ):
        final = await stream.get_final_completion()

    (call,) = final.choices[0].message.tool_calls or []
    assert "tool_calls" == final.choices[0].finish_reason
    assert ("get_weather", {"city": "Oslo"}) == (call.function.name, call.function.parsed_arguments)


async def test_the_turns_of_a_tool_reach_the_upstream_as_they_came(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Calls, their results and the tools' definitions are passed on, not made anew."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":  "Oslo"}'},
    }
    messages = [
        *user("How is the weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    await chat(gateway, messages=messages, tools=[WEATHER], parallel_tool_calls=False)

    body = upstream.requests[0].body
    assert messages == body["messages"]
    assert [WEATHER] == body["tools"]
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    "choice",
    ["auto", "none", "required", {"type": "function", "function": {"name": "get_weather"}}],
)
async def test_the_choice_of_tools_reaches_the_upstream(
    gateway: RunningServer, upstream: ScriptedUpstream, choice: Any
) -> None:
    """A client may leave the choice to the model, forbid tools, or name one."""
    await chat(gateway, tools=[WEATHER], tool_choice=choice)

    assert choice == upstream.requests[0].body["tool_choice"]


def tool_delta(index: int, arguments: str, **first: Any) -> dict[str, Any]:
    """A chunk with a piece of one tool call."""
    name = {"name": first.pop("name")} if "name" in first else {}
    kind = {"type": "function"} if first else {}
    function = {**name, "arguments": arguments}
    return chunk({"tool_calls": [{"index": index, **first, **kind, "function": function}]})


async def test_pieces_of_tool_calls_arrive_as_they_come(
    upstream: ScriptedUpstream, client: openai.AsyncOpenAI
) -> None:
    """Each piece is there while the upstream still talks; none waits for the call to be whole."""
    pieces = [
        tool_delta(0, "", id="call_a", name="get_weather"),
        tool_delta(0, '{"city": '),
        tool_delta(1, "{", id="call_b", name="get_time"),
        tool_delta(0, '"Oslo"}'),
        tool_delta(1, "}"),
    ]
    upstream.script(Answer(events=pieces, hang="end"))
    got: list[Any] = []
    async with asyncio.timeout(20):
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=user("hi"), tools=[WEATHER], stream=True
        )
        async for one in stream:
            (call,) = one.choices[0].delta.tool_calls or []
            got.append(call.model_dump(exclude_unset=True))
            if len(got) == len(pieces):
                break
        await stream.close()

    assert [one["choices"][0]["delta"]["tool_calls"][0] for one in pieces] == got


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "person",
                "schema": SCHEMA,
                "description": "Someone.",
                "strict": False,
            },
        },
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
    ],
)
async def test_a_response_format_reaches_the_upstream_unchanged(
    gateway: RunningServer, upstream: ScriptedUpstream, wanted: Any
) -> None:
    """The schema keeps its own name, description and strictness."""
    await chat(gateway, response_format=wanted)

    assert wanted == upstream.requests[0].body["response_format"]


async def test_the_client_parses_a_structured_answer(
    client: openai.AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """OpenAI's `parse` sends a schema made from a type and reads the answer into it."""
    import pydantic  # noqa: PLC0415  # the client's own dependency

    class Person(pydantic.BaseModel):
        age: int

    upstream.script(Answer(body=whole('{"age": 7}')))
    answer = await client.chat.completions.parse(
        model="gpt-4o-mini", messages=user("hi"), response_format=Person
    )

    assert Person(age=7) == answer.choices[0].message.parsed
    sent = upstream.requests[0].body["response_format"]["json_schema"]
    assert ("Person", True) == (sent["name"], sent["strict"])


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.5, "top_p": 0.5}, {"temperature": 1.5, "top_p": 0.5}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"seed": 7}, {"seed": 7}),
        (
            {"presence_penalty": -1, "frequency_penalty": 2},
            {"presence_penalty": -1, "frequency_penalty": 2},
        ),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_tokens": 6}),
        ({"response_format": {"type": "text"}}, {}),
        ({"top_k": 40, "mirostat": {"tau": 5}}, {"top_k": 40, "mirostat": {"tau": 5}}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"logit_bias": {"50256": -100}}, {"logit_bias": {"50256": -100}}),
        (
            {"user": "ada", "metadata": {"a": "b"}, "store": False},
            {"user": "ada", "metadata": {"a": "b"}, "store": False},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_shapes_the_answer_reaches_the_upstream(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    sent: dict[str, Any],
    arrives: dict[str, Any],
    *,
    stream: bool,
) -> None:
    """Sampling, limits, labels for the books and a provider's own fields arrive."""
    await chat(gateway, **sent, stream=stream)

    usage = {"stream_options": {"include_usage": True}} if stream else {}
    assert {**HELLO, "stream": stream, **usage, **arrives} == upstream.requests[0].body


async def test_extra_body_of_the_client_reaches_the_upstream(
    client: openai.AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """`extra_body` is how OpenAI's client sends what only one provider knows."""
    await client.chat.completions.create(
        model="gpt-4o-mini", messages=user("hi"), extra_body={"guided_regex": "[a-z]+"}
    )

    assert "[a-z]+" == upstream.requests[0].body["guided_regex"]


async def test_null_is_the_same_as_absent(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Clients written in typed languages send null for whatever was not set."""
    optional = (
        "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls",
        "response_format", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop",
        "seed", "presence_penalty", "frequency_penalty", "n", "logprobs", "top_logprobs", "audio",
        "modalities", "functions", "function_call", "user", "metadata", "store",
    )  # fmt: skip
    await chat(gateway, **dict.fromkeys(optional))
    nulls = dict.fromkeys(("encoding_format", "dimensions", "user"))
    body = {"model": "gpt-4o-mini", "input": "a", **nulls}
    answer = await ask(gateway, "POST", EMBEDDINGS, json=body)

    assert {**HELLO, "stream": False} == upstream.requests[0].body
    assert 200 == answer.status
    assert [1.0, 0.0] == answer.json["data"][0]["embedding"]


async def test_null_fields_of_messages_and_tools_are_absent_too(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """A message that was dumped from a client's own type can be sent back as it is."""
    nulls = dict.fromkeys(("name", "tool_calls", "tool_call_id", "refusal"))
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    await chat(
        gateway,
        messages=[{"role": "user", "content": "hi", **nulls}],
        tools=[{"type": "function", "function": function}],
    )

    body = upstream.requests[0].body
    assert user("hi") == body["messages"]
    assert [{"type": "function", "function": {"name": "f"}}] == body["tools"]


async def test_messages_of_every_role_and_kind_reach_the_upstream(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Parts, names and refusals are passed on as they were sent."""
    url = {"url": "data:image/png;base64,AA", "detail": "low"}
    picture = {"type": "image_url", "image_url": url}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "name": "ada", "content": [{"type": "text", "text": "What?"}, picture]},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": ""},
    ]
    await chat(gateway, messages=messages)

    assert messages == upstream.requests[0].body["messages"]


async def test_a_refusal_reaches_the_client(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """A refusal is no content, whole or streamed."""
    upstream.script(
        Answer(body=whole(None, refusal="I will not.")),
        Answer(events=[chunk({"refusal": "I will"}), chunk({"refusal": " not."}),
                       chunk({}, finish_reason="stop"), "[DONE]"]),
    )  # fmt: skip
    message = (await chat(gateway))["choices"][0]["message"]
    chunks = await chat(gateway, stream=True)

    assert {"role": "assistant", "content": None, "refusal": "I will not."} == message
    deltas = [one["choices"][0]["delta"] for one in chunks[:-1]]
    assert [{"role": "assistant", "refusal": "I will"}, {"refusal": " not."}, {}] == deltas


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        # There is no call to make in this answer.
        ("tool_calls", "stop"),
        ("function_call", "stop"),
        ("eos", "stop"),
        ("model_length", "length"),
        ("MAX_TOKENS", "length"),
        ("sensitive", "content_filter"),
        ("content_filter: SAFETY", "content_filter"),
    ],
)
async def test_the_reason_for_the_end_is_one_that_clients_know(
    gateway: RunningServer, upstream: ScriptedUpstream, given: str, told: str
) -> None:
    """A provider's own word becomes one of OpenAI's four, in the answer and in the row."""
    answered = whole("hi")
    answered["choices"][0]["finish_reason"] = given
    upstream.script(
        Answer(body=answered),
        Answer(events=[chunk({"content": "hi"}), chunk({}, finish_reason=given), "[DONE]"]),
    )
    reasons = [
        (await chat(gateway))["choices"][0]["finish_reason"],
        (await chat(gateway, stream=True))[-2]["choices"][0]["finish_reason"],
    ]

    assert [told, told] == reasons
    assert [told, told] == [row["finish_reason"] for row in await gateway.rows()]


async def test_the_limit_of_tokens_ends_an_answer(server: RunningServer) -> None:
    """An answer cut at its limit says `length`."""
    answer = await chat(server, model="echo", messages=user("one two three"), max_tokens=2)

    choice = answer["choices"][0]
    assert ("one two", "length") == (choice["message"]["content"], choice["finish_reason"])


async def test_text_of_every_script_arrives_whole(server: RunningServer) -> None:
    """Letters outside ASCII, quotes and line ends of all kinds survive the stream."""
    text = 'Grüße, "世界"\n\n🎉 data: [DONE]\r\n\tend \u2028\x85.'
    async with openai_client(server) as client:
        stream = await client.chat.completions.create(
            model="echo", messages=user(text), stream=True
        )
        told = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == told


async def test_embeddings_come_as_the_client_asks_unasked(
    client: openai.AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """OpenAI's client asks for base64 by itself, and so is the upstream, which may send floats."""
    answer = await client.embeddings.create(model="gpt-4o-mini", input=["a", "b"], dimensions=2)

    assert [[1.0, 0.0], [1.0, 1.0]] == [one.embedding for one in answer.data]
    assert (2, 2) == (answer.usage.prompt_tokens, answer.usage.total_tokens)
    expected = {"model": "gpt-4o-mini", "input": ["a", "b"], "dimensions": 2}
    assert {**expected, "encoding_format": "base64"} == upstream.requests[0].body


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings_are_floats_or_base64_as_asked(
    server: RunningServer, encoding: str | None
) -> None:
    """base64 is of little-endian float32s, 16 of them for echo; floats are the default."""
    body = {"model": "echo", "input": "the sea", "encoding_format": encoding}
    answer = (await ask(server, "POST", EMBEDDINGS, json=body)).json
    vector = answer["data"][0].pop("embedding")
    if encoding == "base64":
        vector = struct.unpack("<16f", base64.b64decode(vector, validate=True))

    assert pytest.approx(1.0) == sum(number * number for number in vector)
    assert {
        "object": "list",
        "data": [{"object": "embedding", "index": 0}],
        "model": "echo",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    } == answer


async def test_embeddings_keep_the_order_of_their_texts(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """An upstream that answers out of order is put right by its own indices."""
    data = [{"index": at, "embedding": [float(at)]} for at in (2, 0, 1)]
    upstream.script(Answer(body={"data": data, "usage": {"prompt_tokens": 3}}))
    body = {"model": "gpt-4o-mini", "input": ["a", "b", "c"]}
    answer = (await ask(gateway, "POST", EMBEDDINGS, json=body)).json

    assert [(0, [0.0]), (1, [1.0]), (2, [2.0])] == [
        (one["index"], one["embedding"]) for one in answer["data"]
    ]


async def test_as_many_texts_as_openai_takes_are_embedded_at_once(server: RunningServer) -> None:
    """2048 texts are one request."""
    body = {"model": "echo", "input": ["x"] * 2048}
    answer = await ask(server, "POST", EMBEDDINGS, json=body)

    assert 2048 == len(answer.json["data"])


NAMED = """
models:
  generative:
    default: {backend: echo}
    meta-llama/Llama-3.1-8B: {backend: echo, model: "org/team/llama 8b"}
    gpt-*: {backend: echo, model: pattern-model}
  embedding:
    default: {backend: echo}
    embedder: {backend: echo, model: echo-embed}
"""
IDS = [
    "default",
    "echo",
    "meta-llama/Llama-3.1-8B",
    "org/team/llama 8b",
    "pattern-model",
    "embedder",
    "echo-embed",
]


async def test_models_are_listed_once_each_by_every_name(tmp_path: Path) -> None:
    """Logical and provider's names are listed; what the list says holds after a restart."""
    lists: list[Any] = []
    for _ in range(2):
        async with running(NAMED, root=tmp_path) as server:
            lists += [(await ask(server, "GET", MODELS)).json for _ in range(2)]

    told = [[(one["id"], one["object"], one["owned_by"]) for one in each["data"]] for each in lists]
    assert [[(name, "model", "echo") for name in IDS]] * 4 == told
    assert {"list"} == {each["object"] for each in lists}
    (created,) = {one["created"] for each in lists for one in each["data"]}
    assert isinstance(created, int)


async def test_every_listed_model_can_be_retrieved() -> None:
    """Ids may hold slashes and spaces, encoded by the client or not."""
    async with running(NAMED) as server, openai_client(server) as client:
        listed = [model async for model in client.models.list()]
        retrieved = [await client.models.retrieve(model.id) for model in listed]
        plain = await ask(server, "GET", f"{MODELS}/meta-llama/Llama-3.1-8B")

    assert IDS == [model.id for model in listed]
    assert listed == retrieved
    assert "meta-llama/Llama-3.1-8B" == plain.json["id"]


async def test_an_unlisted_model_cannot_be_retrieved(server: RunningServer) -> None:
    """An unknown id is OpenAI's `model_not_found`."""
    async with openai_client(server) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/nothing")

    assert ("model_not_found", "model") == (caught.value.code, caught.value.param)
    assert "`org/nothing`" in caught.value.message


async def test_a_request_id_is_the_clients_or_ours(gateway: RunningServer) -> None:
    """Answers and rows carry one id, and the client may choose it."""
    options: dict[str, Any] = {"json": HELLO}
    ours = await ask(gateway, "POST", CHAT, **options)
    theirs = await ask(gateway, "POST", CHAT, **options, headers={"x-request-id": "run-7.a_b"})
    bad = await ask(gateway, "POST", CHAT, **options, headers={"x-request-id": "no spaces"})

    assert "run-7.a_b" == theirs.headers["x-request-id"]
    assert "no spaces" != bad.headers["x-request-id"]
    assert [answer.headers["x-request-id"] for answer in (bad, theirs, ours)] == [
        row["request_id"] for row in await gateway.rows()
    ]


async def test_many_streams_at_once_do_not_mix(server: RunningServer) -> None:
    """Each of a hundred concurrent streams gets its own words, and its own row."""

    async def one(at: int) -> str:
        stream = await client.chat.completions.create(
            model="echo", messages=user(f"stream number {at}"), stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with openai_client(server) as client:
        texts = await asyncio.gather(*(one(at) for at in range(100)))

    assert [f"stream number {at}" for at in range(100)] == texts
    assert 100 == len(await server.rows("success = 1 AND method = 'generateStream'"))


async def test_leaving_in_mid_stream_is_told_upstream_and_billed(
    gateway: RunningServer, upstream: ScriptedUpstream, client: openai.AsyncOpenAI
) -> None:
    """The upstream is hung up on, and one row says `aborted` with the tokens so far."""
    upstream.script(Answer(events=streamed("one", " two", done=False), hang="end"))
    finished = finished_calls(gateway)
    async with asyncio.timeout(20):
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=user("hi"), stream=True
        )
        text = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        assert not upstream.left.is_set()
        await stream.close()
        await upstream.left.wait()
        await finished.get()
    await chat(gateway)

    assert ["one", " two"] == text
    _, row = await gateway.rows()
    assert (False, "aborted", 2, True) == (
        row["success"],
        row["error_code"],
        row["completion_tokens"],
        row["usage_estimated"],
    )
    assert row["prompt_tokens"] > 0
    assert row["ttft_ms"] > 0
