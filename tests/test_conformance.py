"""What the gateway sends is valid by OpenAI's published schemas and by its client's own types."""

import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import jsonschema
import openai.types
import pydantic
import pytest
import pytest_asyncio

from conformance import (
    check_embeddings,
    check_error,
    check_schema,
    check_stream,
    check_type,
    check_whole,
)
from harperpy.testing import RunningServer, ScriptedUpstream, running, scripted_upstream
from harperpy.upstream import Answer, chunk, streamed, whole
from helpers import Answered, ask, events

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
CONFIG = """
models:
  generative:
    echo: {{backend: echo}}
    gpt: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", maxRetries: 0}}
  embedding:
    echo: {{backend: echo}}
    gpt: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", maxRetries: 0}}
"""


class Chain(NamedTuple):
    """A server of two models: `echo`, and `gpt`, which is a scripted upstream's."""

    server: RunningServer
    upstream: ScriptedUpstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_chain() -> AsyncIterator[Chain]:
    """The chain that all tests share."""
    async with (
        scripted_upstream() as upstream,
        running(CONFIG.format(url=upstream.url)) as server,
    ):
        yield Chain(server, upstream)


@pytest.fixture
def chain(one_chain: Chain) -> Iterator[Chain]:
    """The chain, whose upstream has forgotten what it was asked and told."""
    one_chain.upstream.requests.clear()
    yield one_chain
    one_chain.upstream._script.clear()


async def answered(chain: Chain, answer: Answer | None = None, **fields: Any) -> Answered:
    """The answer to a chat, for which the upstream gives this one."""
    if answer is not None:
        chain.upstream.script(answer)
    body = {"model": "gpt", "messages": [{"role": "user", "content": "hello there"}], **fields}
    answered = await ask(chain.server, "POST", CHAT, json=body)
    assert 200 == answered.status, answered.text
    return answered


# Whole answers.


def choice(
    index: int = 0, reason: str = "stop", logprobs: Any = None, **message: Any
) -> dict[str, Any]:
    """A choice of a whole answer, as OpenAI sends it."""
    said = {"role": "assistant", "content": None, "refusal": None, **message}
    return {"index": index, "message": said, "logprobs": logprobs, "finish_reason": reason}


def function_call(id: str, name: str, arguments: str) -> dict[str, Any]:  # noqa: A002
    """A tool call, as OpenAI sends it."""
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


def likely(token: str) -> dict[str, Any]:
    """The logprobs object of a choice of one token."""
    it = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
    other = {"token": "no", "logprob": -1, "bytes": None}
    return {"content": [{**it, "top_logprobs": [it, other]}], "refusal": None}


FUNCTION: Any = {"type": "function", "function": {"name": "get_weather"}}
TOOLS: Any = {"tools": [FUNCTION, {"type": "function", "function": {"name": "get_time"}}]}
CUSTOM: Any = {"tools": [{"type": "custom", "custom": {"name": "shell"}}]}
OLD: Any = {"functions": [FUNCTION["function"]], "function_call": {"name": "get_weather"}}
TWO_CALLS = [
    function_call("call_a", "get_weather", '{"city":  "Oslo"}'),
    function_call("call_b", "get_time", "{}"),
]
CUSTOM_CALL = {"id": "call_c", "type": "custom", "custom": {"name": "shell", "input": "ls -l"}}
CITED = [
    {
        "type": "url_citation",
        "url_citation": {"start_index": 0, "end_index": 3, "url": "http://a", "title": "a"},
    }
]
SOUND = {"id": "audio_a", "expires_at": 1, "data": "AA==", "transcript": "See a."}
LIKELY = {"logprobs": True, "top_logprobs": 2}
UNLIKELY = {"content": None, "refusal": likely("No")["content"]}

# What a client asks for, and the choices of the upstream's answer, which are those of ours.
WHOLE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "text": ({}, [choice(content="Hello.")]),
    "empty text": ({}, [choice(content="")]),
    "annotations and sound": ({}, [choice(content="See a.", annotations=CITED, audio=SOUND)]),
    "tool calls": (TOOLS, [choice(tool_calls=TWO_CALLS, reason="tool_calls")]),
    "text and tool calls": (
        TOOLS,
        [choice(content="I look.", tool_calls=TWO_CALLS, reason="tool_calls")],
    ),
    "custom tool call": (CUSTOM, [choice(tool_calls=[CUSTOM_CALL], reason="tool_calls")]),
    "refusal": ({}, [choice(refusal="I will not.")]),
    "logprobs": (LIKELY, [choice(content="Hi", logprobs=likely("Hi"))]),
    "logprobs of a refusal": (LIKELY, [choice(refusal="No", logprobs=UNLIKELY)]),
    "length": ({"max_tokens": 1}, [choice(content="Hel", reason="length")]),
    "content filter": ({}, [choice(content="", reason="content_filter")]),
    "two choices": ({"n": 2}, [choice(0, content="One."), choice(1, "length", content="Two")]),
    "two choices of all kinds": (
        {"n": 2, **TOOLS, **LIKELY},
        [choice(0, "tool_calls", tool_calls=TWO_CALLS), choice(1, refusal="No.")],
    ),
}


@pytest.mark.parametrize("what", WHOLE)
async def test_whole_answers_of_an_upstream_are_openais(chain: Chain, what: str) -> None:
    """Every kind of whole answer is valid, and holds what the upstream said, no more, no less."""
    fields, choices = WHOLE[what]
    answer = await answered(chain, Answer(body={**whole(""), "choices": choices}), **fields)

    check_whole(answer.json)
    assert choices == answer.json["choices"]
    assert "gpt" == answer.json["model"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1},
        {**TOOLS, "tool_choice": "required"},
        {"n": 2},
        {"n": 3, **TOOLS, "tool_choice": "required"},
        OLD,
        {"n": 2, **OLD},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_of_echo_are_openais(
    chain: Chain, fields: dict[str, Any], *, stream: bool
) -> None:
    """The model that ships for tests is no less exact than a provider."""
    answer = await answered(chain, model="echo", stream=stream, **fields)

    if stream:
        check_stream(answer, choices=fields.get("n", 1))
    else:
        check_whole(answer.json)
        assert fields.get("n", 1) == len(answer.json["choices"])


GIVEN = {
    "system_fingerprint": "fp_44709d6fcb",
    "service_tier": "default",
    "usage": {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 1},
        "completion_tokens_details": {
            "reasoning_tokens": 2,
            "audio_tokens": 1,
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 1,
        },
    },
}


async def test_what_an_upstream_tells_of_itself_passes_through(chain: Chain) -> None:
    """The fingerprint, the tier and every detail of the usage reach the client."""
    answer = await answered(chain, Answer(body={**whole("hi"), **GIVEN}))

    check_whole(answer.json)
    assert GIVEN == {name: answer.json.get(name) for name in GIVEN}


NULLS = {
    "system_fingerprint": None,
    "service_tier": None,
    "usage": {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "total_tokens": 2,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    },
}


async def test_nulls_of_an_upstream_are_not_passed_on(chain: Chain) -> None:
    """Many servers send null where OpenAI's schema wants a value or nothing."""
    said = dict.fromkeys(("tool_calls", "function_call", "annotations", "audio"))
    answer = await answered(chain, Answer(body={**whole("hi", **said), **NULLS}))
    ended = {**chunk({"content": "hi", **said}, finish_reason="stop"), **NULLS}
    stream = await answered(chain, Answer(events=[ended, "[DONE]"]), stream=True)

    check_whole(answer.json)
    check_stream(stream)
    assert "system_fingerprint" not in answer.text + stream.text


async def test_an_upstream_that_says_the_least_is_completed(chain: Chain) -> None:
    """What a compatible server forgets is there all the same, with OpenAI's own values."""
    said = {"message": {"content": "hi"}}
    answer = await answered(chain, Answer(body={"choices": [said]}))

    check_whole(answer.json)
    assert [choice(content="hi")] == answer.json["choices"]


async def test_reasoning_passes_through(chain: Chain) -> None:
    """`reasoning_content` is no field of OpenAI's, but of many of its likes: it is kept."""
    answer = await answered(chain, Answer(body=whole("42", reasoning_content="6 times 7")))
    deltas = [{"role": "assistant", "reasoning_content": "6 times"}, {"reasoning_content": " 7"}]
    said = [chunk(delta) for delta in (*deltas, {"content": "42"})]
    stream = await answered(
        chain, Answer(events=[*said, chunk({}, finish_reason="stop"), "[DONE]"]), stream=True
    )

    check_whole(answer.json, (".choices[0].message.reasoning_content",))
    assert "6 times 7" == answer.json["choices"][0]["message"]["reasoning_content"]
    *chunks, _ = events(stream.text)
    told = [one["choices"][0]["delta"] for one in chunks]
    assert [*deltas, {"content": "42"}, {}] == told


# Streams.


def piece(
    delta: dict[str, Any], index: int = 0, reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    """An upstream's chunk with a piece of one of its choices."""
    told = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return {**chunk({}), "choices": [told]}


def together(*chunks: dict[str, Any]) -> dict[str, Any]:
    """An upstream's chunk with the pieces of several."""
    return {**chunk({}), "choices": [one["choices"][0] for one in chunks]}


def call_piece(index: int, arguments: str, **first: Any) -> dict[str, Any]:
    """A delta with a piece of a tool call; `id` and `name` on its first."""
    name = {"name": first.pop("name")} if first else {}
    kind = {"type": "function"} if first else {}
    call = {"index": index, **first, **kind, "function": {**name, "arguments": arguments}}
    return {"tool_calls": [call]}


CALLING = [
    call_piece(0, "", id="call_a", name="get_weather"),
    call_piece(0, '{"city": '),
    call_piece(1, "", id="call_b", name="get_time"),
    call_piece(0, '"Oslo"}'),
    call_piece(1, "{}"),
]
# What a client asks for, and the upstream's chunks after the role, which are those of ours.
STREAMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "text": (
        {},
        [piece({"content": "Hel"}), piece({"content": "lo."}), piece({}, reason="stop")],
    ),
    "tool calls": (TOOLS, [*map(piece, CALLING), piece({}, reason="tool_calls")]),
    "text and tool calls": (
        TOOLS,
        [piece({"content": "I look."}), *map(piece, CALLING), piece({}, reason="tool_calls")],
    ),
    "refusal": (
        {},
        [piece({"refusal": "I will"}), piece({"refusal": " not."}), piece({}, reason="stop")],
    ),
    "logprobs": (
        LIKELY,
        [
            piece({"content": "Hi"}, logprobs=likely("Hi")),
            piece({"content": "!"}, logprobs=likely("!")),
            piece({}, reason="stop"),
        ],
    ),
    "logprobs of half a letter": (
        LIKELY,
        [
            piece({"content": "a"}, logprobs=likely("a")),
            piece({"content": ""}, logprobs=likely("\N{GRINNING FACE}")),
            piece({"content": "\N{GRINNING FACE}"}, logprobs=likely("\N{GRINNING FACE}")),
            piece({}, reason="stop"),
        ],
    ),
    "logprobs of a refusal": (
        LIKELY,
        [piece({"refusal": "No"}, logprobs=UNLIKELY), piece({}, reason="stop")],
    ),
    "length": ({"max_tokens": 1}, [piece({"content": "Hel"}), piece({}, reason="length")]),
    "content filter": ({}, [piece({"content": "H"}), piece({}, reason="content_filter")]),
    "two choices": (
        {"n": 2},
        [
            piece({"content": "One"}),
            piece({"content": "Two"}, 1),
            piece({"content": "."}, 1),
            piece({}, 1, "stop"),
            piece({"content": ", then."}),
            piece({}, 0, "length"),
        ],
    ),
    "two choices in one chunk": (
        {"n": 2},
        [
            together(piece({"content": "One"}), piece({"content": "Two"}, 1)),
            together(piece({}, 0, "stop"), piece({}, 1, "length")),
        ],
    ),
    "two choices with tool calls": (
        {"n": 2, **TOOLS},
        [
            *itertools.chain(*((piece(call, 0), piece(call, 1)) for call in CALLING)),
            piece({}, 0, "tool_calls"),
            piece({}, 1, "tool_calls"),
        ],
    ),
}


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("what", STREAMS)
async def test_streams_of_an_upstream_are_openais(chain: Chain, what: str, *, usage: bool) -> None:
    """Chunk by chunk what the upstream said, as it came; usage only if it was asked for."""
    fields, told = STREAMS[what]
    indices = {choice["index"] for one in told for choice in one["choices"]}
    roles = [piece({"role": "assistant", "content": None}, index) for index in sorted(indices)]
    sent = [*roles, *told, {**chunk({}), **GIVEN, "choices": []}, "[DONE]"]
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer = await answered(chain, Answer(events=sent), stream=True, **options, **fields)

    check_stream(answer, choices=len(indices), usage=usage)
    assert said_in(sent[:-1]) == said_in(events(answer.text)[:-1])


def said_in(chunks: list[dict[str, Any]]) -> tuple[list[Any], dict[int, str]]:
    """What is said in chunks, in order, and why each choice ends; not where the role stands."""
    said: list[Any] = []
    reasons: dict[int, str] = {}
    for one in itertools.chain.from_iterable(one["choices"] for one in chunks):
        delta = {name: told for name, told in one["delta"].items() if told and name != "role"}
        if delta or one["logprobs"]:
            said.append((one["index"], delta, one["logprobs"]))
        if one["finish_reason"]:
            reasons[one["index"]] = one["finish_reason"]
    return said, reasons


async def test_what_an_upstream_tells_of_itself_is_in_every_chunk(chain: Chain) -> None:
    """The fingerprint and the tier are on all chunks of a stream, as OpenAI sends them."""
    told = {name: GIVEN[name] for name in ("system_fingerprint", "service_tier")}
    sent = [{**one, **told} for one in streamed("one", " two")[:-2]]
    usage = {**chunk({}), **GIVEN, "choices": []}
    answer = await answered(
        chain,
        Answer(events=[*sent, usage, "[DONE]"]),
        stream=True,
        stream_options={"include_usage": True},
    )

    check_stream(answer, usage=True)
    *chunks, last, _ = events(answer.text)
    assert [told] * len(chunks) == [{name: one.get(name) for name in told} for one in chunks]
    assert GIVEN == {name: last.get(name) for name in GIVEN}


async def test_the_input_of_a_custom_tool_is_streamed_as_it_comes(chain: Chain) -> None:
    """OpenAI's schema of chunks has no word for custom tools; they are told as its server does."""
    first = {"index": 0, "id": "call_c", "type": "custom", "custom": {"name": "shell", "input": ""}}
    deltas = [first, *({"index": 0, "custom": {"input": text}} for text in ("ls", " -l"))]
    sent = [piece({"tool_calls": [delta]}) for delta in deltas]
    ended = [piece({}, reason="tool_calls"), "[DONE]"]
    answer = await answered(chain, Answer(events=[*sent, *ended]), stream=True, **CUSTOM)

    *chunks, last, _ = events(answer.text)
    assert deltas == [one["choices"][0]["delta"]["tool_calls"][0] for one in chunks]
    assert "tool_calls" == last["choices"][0]["finish_reason"]


async def test_a_failure_in_mid_stream_is_openais_error(chain: Chain) -> None:
    """The frame that ends a broken stream is an error body like any other."""
    answer = await answered(chain, Answer(events=streamed("one", done=False)), stream=True)

    first, last = events(answer.text)
    check_schema("CreateChatCompletionStreamResponse", first)
    check_error(last)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["echo", "gpt"])
async def test_an_id_is_of_one_call(chain: Chain, model: str, *, stream: bool) -> None:
    """Each call has an id of its own, never the upstream's, the same on all its chunks."""
    ids: list[set[str]] = []
    for _ in range(3):
        answer = await answered(chain, model=model, stream=stream)
        bodies = events(answer.text)[:-1] if stream else [answer.json]
        ids.append({one["id"] for one in bodies})

    assert [1, 1, 1] == [len(one) for one in ids]
    assert 3 == len(set.union(*ids))
    assert "chatcmpl-scripted" not in set.union(*ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_are_asked_of_an_upstream_at_once(
    chain: Chain, *, stream: bool
) -> None:
    """A provider that knows `n` gets it: one request, one row."""
    choices = [choice(0, content="One."), choice(1, content="Two.")]
    told = STREAMS["two choices"][1]
    answer = Answer(events=[*told, "[DONE]"]) if stream else Answer(body={"choices": choices})
    before = await chain.server.rows()
    await answered(chain, answer, stream=stream, n=2)

    (asked,) = chain.upstream.requests
    assert 2 == asked.body["n"]
    assert 1 == len(await chain.server.rows()) - len(before)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_of_another_model_are_several_calls(
    chain: Chain, *, stream: bool
) -> None:
    """A model that answers once is asked as often as there are choices, each a row."""
    before = await chain.server.rows()
    answer = await answered(chain, model="echo", stream=stream, n=3)
    texts = ["", "", ""]
    for one in events(answer.text)[:-1] if stream else [answer.json]:
        for told in one["choices"]:
            texts[told["index"]] += told["delta" if stream else "message"].get("content") or ""

    assert ["hello there"] * 3 == texts
    assert 3 == len(await chain.server.rows()) - len(before)


# Errors, models, embeddings.


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("status", "method", "path", "options"),
    [
        (400, "POST", CHAT, {"json": {}}),
        (400, "POST", CHAT, {"json": {"model": "echo", "messages": [USER], "temperature": 9}}),
        (400, "POST", EMBEDDINGS, {"json": {"model": "echo", "input": []}}),
        (400, "POST", CHAT, {"data": b"{"}),
        (401, "GET", MODELS, {"key": ""}),
        (401, "GET", MODELS, {"key": "hk_wrong"}),
        (404, "GET", "/v1/nothing", {}),
        (404, "GET", f"{MODELS}/nothing", {}),
        (404, "POST", CHAT, {"json": {"model": "nothing", "messages": [USER]}}),
        (405, "GET", CHAT, {}),
        (429, "POST", CHAT, {"json": {"model": "gpt", "messages": [USER]}}),
        (503, "POST", CHAT, {"json": {"model": "gpt", "messages": [USER], "stream": True}}),
        (503, "POST", EMBEDDINGS, {"json": {"model": "gpt", "input": "hi"}}),
    ],
)
async def test_errors_are_openais(
    chain: Chain, status: int, method: str, path: str, options: dict[str, Any]
) -> None:
    """Every refusal is an `ErrorResponse`; what is not known is null, not left out."""
    chain.upstream.script(Answer(status=status, body=b"no"))
    answer = await ask(chain.server, method, path, **options)

    assert status == answer.status
    check_error(answer.json)


async def test_models_are_openais(chain: Chain) -> None:
    """The list of models and each of them hold OpenAI's fields alone."""
    listed = (await ask(chain.server, "GET", MODELS)).json
    single = [(await ask(chain.server, "GET", f"{MODELS}/{one['id']}")).json
              for one in listed["data"]]  # fmt: skip

    assert {"object", "data"} == set(listed)
    check_schema("ListModelsResponse", listed)
    assert {"echo", "gpt"} <= {one["id"] for one in listed["data"]}
    assert single == listed["data"]
    for model in single:
        check_schema("Model", model)
        check_type(openai.types.Model, model)


@pytest.mark.parametrize("model", ["echo", "gpt"])
@pytest.mark.parametrize("given", ["the sea", ["the sea", "the sky"]])
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_embeddings_are_openais(
    chain: Chain, model: str, given: Any, encoding: str | None
) -> None:
    """A list of vectors in order; base64 holds the same numbers as little-endian float32s."""
    body = {"model": model, "input": given, "encoding_format": encoding}
    answer = (await ask(chain.server, "POST", EMBEDDINGS, json=body)).json
    plain = await ask(chain.server, "POST", EMBEDDINGS, json={"model": model, "input": given})

    kind = str if encoding == "base64" else list
    assert {kind} == {type(one["embedding"]) for one in answer["data"]}
    vectors = check_embeddings(answer)
    assert model == answer["model"]
    assert (1 if isinstance(given, str) else len(given)) == len(vectors)
    assert {16 if model == "echo" else 2} == {len(vector) for vector in vectors}
    assert [*map(pytest.approx, vectors)] == check_embeddings(plain.json)


# The checks themselves.


@pytest.mark.parametrize(
    "spoil",
    [
        {"system_fingerprint": None},
        {"created": "1"},
        {"created": 1.5},
        {"object": "chat.completion.chunk"},
        {"choices": [choice(content="hi", tool_calls=None)]},
        {"choices": [{**choice(content="hi"), "more": 1}]},
        {"choices": [choice(content="hi", tool_calls=[{**TWO_CALLS[0], "index": 0}])]},
        {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cost": 1}},
        {"more": None},
    ],
)
async def test_what_is_not_openais_is_found(spoil: dict[str, Any]) -> None:
    """The checks see a null, a wrong type and an additional field, however deep."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    good = {**whole(""), "choices": [choice(content="hi")], "usage": usage}
    check_whole(good)
    with pytest.raises((jsonschema.ValidationError, pydantic.ValidationError, AssertionError)):
        check_whole({**good, **spoil})
