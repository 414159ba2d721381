"""`scope.models`: names, capabilities, fallback, backends of one's own, signals, and the rows."""

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from harperpy import (
    AbortController,
    Aborted,
    BackendError,
    BackendTimeout,
    Batched,
    Body,
    Capability,
    CapabilityError,
    Choice,
    ClientError,
    Context,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    GenerateResult,
    InvalidBody,
    Message,
    ModelBackend,
    ModelCall,
    ModelNotFound,
    Models,
    NotImplementedYet,
    Prompt,
    RegistrationError,
    RequestTarget,
    Resource,
    Scope,
    ServiceUnavailable,
    TokenLogprob,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
    ToolDef,
    UpstreamAuthError,
    UpstreamRejected,
    define_backend,
    get_context,
)
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer, streamed
from helpers import HELLO, ask, finished_calls, openai_client, provider

TOOL = ToolDef(name="look_up")
USER: Any = {"role": "user", "content": "hi"}
Method = Callable[..., Any]


@asynccontextmanager
async def serving(
    config: str = ECHO, backends: Mapping[str, ModelBackend] | None = None, **fallback: list[str]
) -> AsyncIterator[tuple[RunningServer, Models]]:
    """A server with these backends, of each kind that they can be, and its models."""

    def register(scope: Scope) -> None:
        for name, backend in (backends or {}).items():
            able = backend.capabilities()
            options: dict[str, Any] = {"fallback": fallback.get(name, []), "replace": True}
            if "generate" in able:
                scope.models.register_backend("generative", name, backend, **options)
            if "embed" in able:
                scope.models.register_backend("embedding", name, backend, **options)

    async with running(config, handle_application=register) as server:
        yield server, server.server.core.models


async def text_of(models: Models, method: str, given: Any = "hi", **options: Any) -> str:
    """What a method of the facade answers, as text; vectors as their first numbers."""
    async with asyncio.timeout(20):
        if method == "embed":
            return str([vector[0] for vector in await models.embed(given, **options)])
        if method == "generate":
            return (await models.generate(given, **options)).content
        chunks = models.generate_stream(given, **options)
        return "".join([chunk.delta_content or "" async for chunk in chunks])


def columns(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    """Some columns of the rows, the oldest first."""
    return [tuple(row[name] for name in names) for row in reversed(rows)]


async def later_told(call: ModelCall) -> None:
    """Nobody awaits it."""


async def a_vector() -> list[list[float]]:
    """An embedding."""
    return [[0.5]]


async def two_words() -> AsyncIterator[str]:
    """A stream."""
    yield "well"
    yield " done"


def fine(name: str = "spare") -> ModelBackend:
    """A backend that answers all three methods."""
    return define_backend(
        name, embed=a_vector, generate=lambda: "well done", generate_stream=two_words
    )


def failing(error: BaseException, name: str = "first") -> ModelBackend:
    """A backend that raises whatever it is asked."""

    async def refuse() -> Any:
        raise error

    async def refuse_to_stream() -> AsyncIterator[str]:
        yield await refuse()

    return define_backend(name, embed=refuse, generate=refuse, generate_stream=refuse_to_stream)


every_method = pytest.mark.parametrize("method", ["embed", "generate", "generateStream"])
ANSWERS = {"embed": "[0.5]", "generate": "well done", "generateStream": "well done"}

FIVE_LINES = """
async def answer(prompt):
    for word in ("You", " said ", prompt.text):
        yield word
def handle_application(scope):
    scope.models.register_backend(
        "generative", "my-model", scope.models.define_backend("my-rag", generate_stream=answer))
"""


async def test_five_lines_make_a_model(tmp_path: Path) -> None:
    """A generator in a file is listed, streams to OpenAI's client, and is accounted for."""
    (tmp_path / "mine.py").write_text(FIVE_LINES)
    config = f"{ECHO}\nplugins: {{mine: {{path: mine.py}}}}"
    async with running(config, directory=tmp_path) as server, openai_client(server) as client:
        listed = {model.id: model.owned_by async for model in client.models.list()}
        messages: Any = [{"role": "user", "content": "hi"}]
        stream = await client.chat.completions.create(
            model="my-model", messages=messages, stream=True
        )
        words = [chunk.choices[0].delta.content async for chunk in stream]
        answer = await client.chat.completions.create(model="my-model", messages=messages)
        rows = await server.rows()

    assert "my-rag" == listed["my-model"]
    assert ["You", " said ", "hi", None] == words
    assert "You said hi" == answer.choices[0].message.content
    assert [
        ("my-rag", "my-model", "my-model", "generateStream", 3, True),
        ("my-rag", "my-model", "my-model", "generate", 3, True),
    ] == columns(
        rows, "backend", "backend_name", "model", "method", "completion_tokens", "usage_estimated"
    )


async def generates_async(prompt: Prompt) -> str:
    """Async, one parameter, text."""
    return prompt.text + "!"


async def generates_a_result(prompt: Prompt, opts: GenerateOpts) -> GenerateResult:
    """Async, two parameters, a result."""
    return GenerateResult(content=f"{prompt.text}{opts.temperature}")


def streams_sync(prompt: Prompt) -> Iterator[str]:
    """A plain generator of text."""
    yield prompt.text
    yield "!"


async def streams_async(prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[GenerateChunk]:
    """An async generator of chunks."""
    yield GenerateChunk(delta_content=prompt.text)
    yield GenerateChunk(delta_content=str(opts.temperature), finish_reason="length")


async def promises_a_stream(prompt: Prompt) -> AsyncIterator[str]:
    """A function that prepares before it streams."""
    word = await generates_async(prompt)

    async def stream() -> AsyncIterator[str]:
        yield word

    return stream()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: "constant", "constant"),
        (lambda prompt: prompt.text + "!", "hi!"),
        (lambda prompt, opts: f"{prompt.text}{opts.temperature}", "hi0.5"),
        (lambda *given: str(len(given)), "2"),
        (generates_async, "hi!"),
        (generates_a_result, "hi0.5"),
    ],
)
async def test_any_function_generates(function: Method, expected: str) -> None:
    """Sync or async, of none to two parameters, text or a result."""
    backend = define_backend("mine", generate=function)
    async with serving(backends={"m": backend}) as (_, models):
        assert expected == await text_of(models, "generate", model="m", temperature=0.5)
        with pytest.raises(CapabilityError) as caught:
            models.generate_stream("hi", model="m")

    assert ("stream", 400) == (caught.value.param, caught.value.status)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda prompt: ["a", prompt.text], "ahi"),
        (lambda prompt: iter([GenerateChunk(delta_content=prompt.text)]), "hi"),
        (streams_sync, "hi!"),
        (streams_async, "hi0.5"),
        (promises_a_stream, "hi!"),
    ],
)
async def test_any_iterable_streams(function: Method, expected: str) -> None:
    """Lists, generators and async generators stream; the same function answers whole."""
    backend = define_backend("mine", generate_stream=function)
    async with serving(backends={"m": backend}) as (_, models):
        for method in ("generateStream", "generate"):
            assert expected == await text_of(models, method, model="m", temperature=0.5)


EMBEDDERS: dict[str, Method] = {
    "vectors": lambda texts: [[float(len(text))] for text in texts],
    "with options": lambda texts, opts: [[len(text) * opts.dimensions / 2] for text in texts],
    "a result": lambda texts: EmbedResult(vectors=[[float(len(text))] for text in texts]),
    "a generator": lambda texts: ([float(len(text))] for text in texts),
}


@pytest.mark.parametrize("how", EMBEDDERS)
async def test_any_function_embeds(how: str) -> None:
    """Vectors in the order of the texts, or a result; one text is a list of one."""
    async with serving(backends={"m": define_backend("mine", embed=EMBEDDERS[how])}) as (
        server,
        models,
    ):
        assert [[1.0], [3.0]] == await models.embed(["a", "bcd"], model="m", dimensions=2)
        assert [[2.0]] == await models.embed("ab", model="m", dimensions=2)
        result = await models.embed_with_usage("one two", model="m", dimensions=2)
        rows = await server.rows()

    assert TokenUsage(embedding_tokens=2) == result.usage
    assert [("embed", True)] * 3 == columns(rows, "method", "usage_estimated")


class Tensor:
    """Numbers as a library has them, which knows them as a list too."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers)

    def tolist(self) -> list[float]:
        """As plain numbers."""
        return [*self.numbers]


class Words(str):
    """Text as a library has it."""

    __slots__ = ()


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_numbers_and_texts_of_libraries_are_told_as_plain_ones(encoding: str) -> None:
    """Vectors as NumPy and Torch have them, and LangChain's texts, are sent as any others."""

    async def says() -> AsyncIterator[str]:
        yield Words("well ")
        yield Words("done")

    class Asks(Resource):
        @staticmethod
        async def get(target: RequestTarget, context: Context) -> Any:
            vectors = await context.models.embed("a", model="m")
            return {"vectors": vectors, "text": Words("hi"), Words("a"): Tensor(1, 2)}

    backend = define_backend("m", embed=lambda _: [Tensor(0.5, 1.0)], generate_stream=says)

    def apply(scope: Scope) -> None:
        scope.resources.set("asks", Asks)
        scope.models.register_backend("embedding", "m", backend)
        scope.models.register_backend("generative", "m", backend)

    async with running(ECHO, handle_application=apply) as server, openai_client(server) as client:
        given: Any = encoding
        embedded = await client.embeddings.create(model="m", input="a", encoding_format=given)
        stream = await client.chat.completions.create(model="m", messages=[USER], stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        answer = await ask(server, "GET", "/asks")

    expected: Any = "AAAAPwAAgD8=" if encoding == "base64" else [0.5, 1.0]
    assert expected == embedded.data[0].embedding
    assert "well done" == "".join(said)
    assert {"vectors": [[0.5, 1.0]], "text": "hi", "a": [1, 2]} == answer.json


@pytest.mark.parametrize("wrong", [["ab"], [1.0], [[None]]], ids=str)
async def test_what_is_no_vector_is_a_failure_of_its_backend(wrong: list[Any]) -> None:
    """A text in the place of a vector is 502 to the caller, as whatever else is none."""
    backend = define_backend("m", embed=lambda: wrong)
    async with serving(backends={"m": backend}) as (server, _):
        answer = await ask(server, "POST", "/v1/embeddings", json={"model": "m", "input": "a"})

    assert 502 == answer.status


async def test_a_stream_is_put_together_with_its_tools_and_usage() -> None:
    """What only streams answers whole too: text, calls from their pieces, reason and usage."""

    async def stream() -> AsyncIterator[GenerateChunk]:
        first = ToolCallDelta(index=0, id="a", name="f", arguments='{"x":')
        yield GenerateChunk(delta_content="so")
        yield GenerateChunk(delta_tool_calls=[first])
        yield GenerateChunk(delta_tool_calls=[ToolCallDelta(index=0, arguments="1}")])
        yield GenerateChunk(delta_tool_calls=[ToolCallDelta(index=1, id="b", name="g")])
        yield GenerateChunk(usage=TokenUsage(prompt_tokens=4, completion_tokens=5))

    backend = define_backend("mine", generate_stream=stream, tools=True)
    async with serving(backends={"m": backend}) as (server, models):
        result = await models.generate({"messages": [USER], "tools": [TOOL]}, model="m")
        (row,) = await server.rows()

    assert "so" == result.content
    calls = [ToolCall(id="a", name="f", arguments='{"x":1}'), ToolCall(id="b", name="g")]
    assert calls == result.tool_calls
    assert {"x": 1} == calls[0].arguments_object()
    assert "tool_calls" == result.finish_reason == row["finish_reason"]
    assert (4, 5, False) == (
        row["prompt_tokens"],
        row["completion_tokens"],
        row["usage_estimated"],
    )


PIECES: dict[str, list[ToolCallDelta | ToolCall]] = {
    "by index": [
        ToolCallDelta(index=0, id="a", name="f", arguments='{"x"'),
        ToolCallDelta(index=1, id="b", name="g", arguments='{"y"'),
        ToolCallDelta(index=0, arguments=":1}"),
        ToolCallDelta(index=1, arguments=":2}"),
    ],
    "by id": [
        ToolCallDelta(id="a", name="f", arguments='{"x"'),
        ToolCallDelta(id="b", name="g", arguments='{"y"'),
        ToolCallDelta(id="a", arguments=":1}"),
        ToolCallDelta(id="b", arguments=":2}"),
    ],
    "one after the other": [
        ToolCallDelta(id="a", name="f", arguments='{"x"'),
        ToolCallDelta(arguments=":1}"),
        ToolCallDelta(id="b", name="g", arguments='{"y"'),
        ToolCallDelta(arguments=":2}"),
    ],
    "whole": [
        ToolCall(id="", name="f", arguments='{"x":1}'),
        ToolCall(id="", name="g", arguments='{"y":2}'),
    ],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
async def test_pieces_of_calls_are_put_together_as_they_are_streamed(
    pieces: list[Any], *, stream: bool
) -> None:
    """A piece belongs to the call of its index, else of its id, else to the latest."""

    async def answer() -> AsyncIterator[GenerateChunk]:
        for piece in pieces:
            yield GenerateChunk(delta_tool_calls=[piece])

    backend = define_backend("mine", generate_stream=answer, tools=True)
    async with serving(backends={"m": backend}) as (server, _), openai_client(server) as client:
        tool = {"type": "function", "function": {"name": "f"}}
        asked: Any = {"model": "m", "messages": [USER], "tools": [tool]}
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                told = await events.get_final_completion()
        else:
            told = await client.chat.completions.create(**asked)

    calls = [call.function for call in told.choices[0].message.tool_calls or []]
    assert [("f", '{"x":1}'), ("g", '{"y":2}')] == [(one.name, one.arguments) for one in calls]


@pytest.mark.parametrize(
    ("kind", "name", "backend", "why"),
    [
        ("generative", "default", fine(), "registered already"),
        ("generative", "", fine(), "needs a name"),
        ("generative", "m", define_backend("e", embed=a_vector), "must implement generate"),
        ("embedding", "m", define_backend("g", generate=lambda: ""), "must implement embed"),
        ("decision", "m", fine(), "kind 'decision' is unknown"),
        ("generative", "m", ModelBackend(), "needs a name"),
    ],
)
async def test_a_backend_that_cannot_be_registered_is_refused_at_once(
    kind: Any, name: str, backend: ModelBackend, why: str
) -> None:
    """The mistake is told where it is made, in words that mend it."""

    def register(scope: Scope) -> None:
        with pytest.raises(RegistrationError, match=why):
            scope.models.register_backend(kind, name, backend)

    async with running(handle_application=register) as server:
        assert {"ok"} == {plugin.status for plugin in server.server.health.plugins.values()}


@pytest.mark.parametrize(("name", "functions"), [("", {"generate": lambda: ""}), ("mine", {})])
def test_a_backend_of_nothing_is_refused(name: str, functions: dict[str, Any]) -> None:
    """A backend has a name and something to call."""
    with pytest.raises(RegistrationError, match="give it a name and one of"):
        define_backend(name, **functions)


@pytest.mark.parametrize("function", [streams_sync, streams_async])
def test_a_generator_is_no_answer(function: Method) -> None:
    """Who yields is told where to give it, before anybody asks."""
    with pytest.raises(RegistrationError, match="'mine' generates by yielding: give it as"):
        define_backend("mine", generate=function)


@pytest.mark.parametrize("index", [-1, 128, 3_000_000])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_beyond_all_that_may_be_asked_for_is_a_failure(
    index: int, *, stream: bool
) -> None:
    """A number alone makes no millions of answers: the caller is told that its model failed."""

    async def odd() -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(delta_content="x", index=index)

    backend = define_backend("mine", generate_stream=odd)
    async with serving(backends={"m": backend}) as (server, _):
        asked = {"model": "m", "messages": [USER], "stream": stream}
        answer = await ask(server, "POST", "/v1/chat/completions", json=asked)

    assert 502 == answer.status
    assert "The model provider failed to answer." == answer.json["error"]["message"]


@pytest.mark.parametrize("method", ["embed", "generate", "generateStream"])
async def test_a_subscriber_that_fails_costs_no_answer(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a provider has answered is given, and asked of no other; the next subscriber is told."""
    told: list[str] = []

    def apply(scope: Scope) -> None:
        for name, others in {"spare": [], "first": ["spare"]}.items():
            kind: Any = "embedding" if method == "embed" else "generative"
            scope.models.register_backend(kind, name, fine(name), fallback=others)
        scope.ledger.subscribe(lambda call: told.append(told[call.id]))
        scope.ledger.subscribe(lambda call: told.append(call.model or ""))

    async with running(ECHO, handle_application=apply) as server:
        answer = await text_of(server.server.core.models, method, model="first")
        rows = await server.rows()

    assert ("0.5" if method == "embed" else "well done") in answer
    assert [("first", True)] == columns(rows, "model", "success")
    assert ["first"] == told
    assert "a subscriber of the ledger failed" in caplog.text


@pytest.mark.parametrize("given", [5, later_told], ids=["a number", "async"])
async def test_what_cannot_be_told_of_calls_is_refused(given: Any) -> None:
    """Its plugin does not start, instead of being told nothing."""
    async with running(ECHO, handle_application=lambda scope: scope.ledger.subscribe(given)) as one:
        told = one.server.health.plugins["test"].error

    assert told is not None
    assert "ledger.subscribe: expected a function that is not async, got" in told


DEMANDING: dict[str, Method] = {
    "embed": lambda _texts, _opts, _client: [[0.5]],
    "generate": lambda _prompt, *, _client: "hi",
    "generate_stream": lambda _prompt, _opts, _client: ["hi"],
}


@pytest.mark.parametrize("method", DEMANDING)
async def test_a_function_that_needs_more_than_it_is_given_is_no_backend(method: str) -> None:
    """The plugin's author is told which, and what is given, before anybody asks."""
    given: Any = {method: DEMANDING[method]}
    needs = 2 if method == "generate" else 3

    with pytest.raises(RegistrationError) as caught:
        define_backend("mine", **given)

    assert f"{method} of 'mine': expected a function of the " in str(caught.value)
    assert str(caught.value).endswith(f"got one that needs {needs} arguments")


async def test_a_function_alone_is_no_backend() -> None:
    """Its plugin fails, and is told what makes one of it."""
    given: Any = lambda: "hi"  # noqa: E731

    def apply(scope: Scope) -> None:
        scope.models.register_backend("generative", "m", given)

    async with running(ECHO, handle_application=apply) as server:
        told = server.server.health.plugins["test"].error

    expected = "expected a ModelBackend; define_backend makes one of a function, got function"
    assert f"models: generative 'm': {expected}" == told


WANTED = ("GenerateResult", "GenerateChunk", "GenerateChunk")


@pytest.mark.parametrize("given", [None, 5, {"content": "hi"}, b"hi"], ids=repr)
async def test_what_is_no_answer_is_a_failure_of_the_backend(
    caplog: pytest.LogCaptureFixture, given: Any
) -> None:
    """502 where nothing has come yet, else an error in the stream; the log says what it was."""
    backends = {
        "w": define_backend("w", generate=lambda: given),
        "s": define_backend("s", generate_stream=lambda: [given]),
        "late": define_backend("late", generate_stream=lambda: ["a", given]),
    }
    async with serving(backends=backends) as (server, _):
        asked = [{"model": "w"}, *({"model": one, "stream": True} for one in ("s", "late"))]
        answers = [
            await ask(server, "POST", "/v1/chat/completions", json={**HELLO, **body})
            for body in asked
        ]
        rows = await server.rows()

    assert [502, 502, 200] == [answer.status for answer in answers]
    assert '"error"' in answers[2].text
    assert ["backend_error"] * 3 == [row["error_code"] for row in rows]
    told = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    expected = [f"expected a text or a {one}, got {type(given).__name__}" for one in WANTED]
    assert [True] * 3 == [one in text for one, text in zip(expected, told, strict=True)]


ODD_CALLS: Any = [{"id": "1", "name": "f", "arguments": {}}]


@pytest.mark.parametrize(
    "odd", [{"tool_calls": ODD_CALLS}, {"usage": {"prompt_tokens": 1}}], ids=str
)
async def test_an_answer_of_what_it_cannot_hold_is_a_failure_of_the_backend(
    odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is none: 502, its row says so, and the log what it was."""
    backend = define_backend("m", generate=lambda: GenerateResult(**odd))
    async with serving(backends={"m": backend}) as (server, _):
        answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "model": "m"})
        (row,) = await server.rows()

    assert (502, "backend_error") == (answer.status, row["error_code"])
    assert "the backend of model 'm' raised AttributeError" in caplog.text


async def test_who_only_calls_a_tool_may_say_none() -> None:
    """An answer whose content is None, as OpenAI's own, is one with calls alone."""
    nothing: Any = None
    called = ToolCall(id="1", name="f", arguments={})
    backend = define_backend(
        "m", generate=lambda: GenerateResult(content=nothing, tool_calls=[called])
    )
    async with serving(backends={"m": backend}) as (server, _):
        answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "model": "m"})

    assert 200 == answer.status
    message = answer.json["choices"][0]["message"]
    assert (None, "f") == (message["content"], message["tool_calls"][0]["function"]["name"])


async def test_registration_ends_when_the_server_has_started() -> None:
    """What a running server offers does not change under its callers."""
    async with serving() as (_, models):
        with pytest.raises(RegistrationError, match="the server has started"):
            models.register_backend("generative", "late", fine())


async def test_a_registration_may_take_a_configured_name() -> None:
    """`replace=True` puts one's own backend in the place of a configured one."""
    async with serving(backends={"default": fine("mine")}) as (server, models):
        assert "well done" == await text_of(models, "generate")
        (row,) = await server.rows()

    assert ("mine", "default", "default") == (row["backend"], row["backend_name"], row["model"])


NAMES = """
models:
  {kind}:
    default: {{backend: openai, model: base, baseUrl: "{url}"}}
    logical: {{backend: openai, model: shared, baseUrl: "{url}"}}
    shared: {{backend: openai, model: other, baseUrl: "{url}"}}
    gpt-*: {{backend: openai, baseUrl: "{url}"}}
    gpt-4*: {{backend: openai, model: gpt-4-turbo, baseUrl: "{url}"}}
    o?-mini: {{backend: openai, model: gpt-o, baseUrl: "{url}"}}
"""


@every_method
@pytest.mark.parametrize(
    ("asked", "entry", "sent"),
    [
        ("logical", "logical", "shared"),
        ("shared", "shared", "other"),
        ("other", "shared", "other"),
        ("base", "default", "base"),
        ("default", "default", "base"),
        (None, "default", "base"),
        ("gpt-5-nano", "gpt-*", "gpt-5-nano"),
        ("gpt-4-turbo", "gpt-4*", "gpt-4-turbo"),
        ("gpt-4o", "gpt-*", "gpt-4o"),
        ("o3-mini", "o?-mini", "gpt-o"),
    ],
)
async def test_a_name_resolves_in_one_order(
    upstream: ScriptedUpstream, method: str, asked: str | None, entry: str, sent: str
) -> None:
    """Exactly, then by the provider's name, then by pattern, the first of two; absent: default."""
    kind = "embedding" if method == "embed" else "generative"
    config = NAMES.format(url=upstream.url, kind=kind)
    async with serving(config) as (server, models):
        await text_of(models, method, model=asked)
        (row,) = await server.rows()

    assert sent == upstream.requests[0].body["model"]
    assert (asked or "default", entry, sent, "openai") == (
        row["model"],
        row["backend_name"],
        row["provider_model"],
        row["backend"],
    )


@every_method
@pytest.mark.parametrize("name", ["", 5, {"a": 1}, ["default"]])
async def test_a_name_that_is_none_is_refused(method: str, name: Any) -> None:
    """Empty and other things than text are the caller's error, and leave their row."""
    async with serving() as (server, models):
        with pytest.raises(ClientError) as caught:
            await text_of(models, method, model=name)
        (row,) = await server.rows()

    assert (400, "model") == (caught.value.status, caught.value.param)
    assert ("unknown", False) == (row["backend"], row["success"])


@every_method
async def test_a_name_that_is_a_body_is_nobodys(upstream: ScriptedUpstream, method: str) -> None:
    """Each event of a stream would hold it; no more of it is told than helps."""
    kind = "embedding" if method == "embed" else "generative"
    async with serving(NAMES.format(url=upstream.url, kind=kind)) as (_, models):
        with pytest.raises(ModelNotFound) as caught:
            await text_of(models, method, model="gpt-" + "x" * 1_000_000)

    assert not upstream.requests
    assert len(str(caught.value)) < 400


@every_method
async def test_without_a_default_a_model_has_to_be_named(method: str) -> None:
    """Where nothing stands for an absent name, that is told."""
    config = "models: {generative: {a: {backend: echo}}, embedding: {a: {backend: echo}}}"
    async with serving(config) as (_, models):
        with pytest.raises(ClientError, match="there is no default") as caught:
            await text_of(models, method)

    assert (400, "model") == (caught.value.status, caught.value.param)


async def test_what_cannot_be_served_raises_from_the_call_itself() -> None:
    """`generate_stream` refuses before anything is iterated, and each refusal is a row."""
    echo = "models: {generative: {parrot: {backend: echo}}}"
    async with serving(echo, {"mute": define_backend("mute", generate=lambda: "")}) as (
        server,
        models,
    ):
        with pytest.raises(ModelNotFound):
            models.generate_stream("hi", model="nobody")
        with pytest.raises(CapabilityError) as no_stream:
            models.generate_stream("hi", model="mute")
        with pytest.raises(CapabilityError) as no_format:
            models.generate_stream("hi", model="parrot", response_format="json")
        with pytest.raises(CapabilityError) as no_embedding:
            models.generate_stream("hi", model="parrot", requires=["embed", "structured_output"])
        models.generate_stream("hi", model="parrot")
        rows = await server.rows()

    assert ["stream", "response_format", "model"] == [
        caught.value.param for caught in (no_stream, no_format, no_embedding)
    ]
    missing = ("generateStream", "unknown", "capability_unsupported")
    assert [("generateStream", "unknown", "backend_not_found"), *[missing] * 3] == columns(
        rows, "method", "backend", "error_code"
    )


async def test_whom_to_ask_depends_on_what_is_needed_whatever_was_asked_before() -> None:
    """Where one of those in turn lacks it, and where the caller names what even the ablest lack."""
    everything = frozenset(get_args(Capability)) - {"embed", "n", "allowed_tools"}

    def overloaded() -> str:
        raise BackendError(upstream_status=503)

    backends = {
        "first": define_backend("first", generate=overloaded, features=everything),
        "alone": define_backend("alone", generate_stream=two_words, features=everything),
        "spare": fine(),
    }
    async with serving(backends=backends, first=["spare"]) as (_, models):
        for _ in range(2):
            assert "well done" == await text_of(models, "generate", model="first")
            assert "well done" == await text_of(models, "generate", model="alone")
            with pytest.raises(BackendError):
                await models.generate("hi", model="first", response_format="json")
            assert "well done" == await text_of(
                models, "generate", model="alone", response_format="json"
            )
            with pytest.raises(CapabilityError, match="does not support allowed_tools"):
                await models.generate("hi", model="alone", requires=["allowed_tools"])


async def test_tools_need_a_backend_that_has_them() -> None:
    """Tools are refused where nobody could call them, unless the caller forbids their use."""
    given = {"messages": [USER], "tools": [TOOL]}
    async with serving(backends={"m": fine()}) as (_, models):
        with pytest.raises(CapabilityError) as caught:
            await models.generate(given, model="m")
        assert "well done" == await text_of(
            models, "generate", given, model="m", tool_choice="none"
        )
        assert "well done" == await text_of(models, "generate", {**given, "tools": []}, model="m")

    assert ("tools", "unsupported_parameter") == (caught.value.param, caught.value.code)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", Prompt(messages=[Message(role="user", content="hi")])),
        ([USER], Prompt(messages=[Message(role="user", content="hi")])),
        ([Message(role="user", content="hi")], Prompt(messages=[Message(**USER)])),
        (
            {"messages": [USER], "system": "Be kind.", "tools": [TOOL]},
            Prompt(
                messages=[Message(role="system", content="Be kind."), Message(**USER)],
                tools=[TOOL],
            ),
        ),
        (
            {
                "messages": [
                    {**USER, "name": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c",
                                "type": "function",
                                "function": {"name": "look_up", "arguments": "{}"},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "rain"},
                ],
                "tools": [{"type": "function", "function": {"name": "look_up"}}],
                "stream": True,
            },
            Prompt(
                messages=[
                    Message(**USER),
                    Message(
                        role="assistant",
                        tool_calls=[ToolCall(id="c", name="look_up", arguments="{}")],
                    ),
                    Message(role="tool", tool_call_id="c", content="rain"),
                ],
                tools=[TOOL],
            ),
        ),
    ],
)
async def test_input_has_several_forms(given: Any, expected: Prompt) -> None:
    """Text, messages, Harper's object and an OpenAI body all become one kind of prompt."""
    seen: list[Prompt] = []
    backend = define_backend("mine", generate=lambda prompt: str(seen.append(prompt)), tools=True)
    async with serving(backends={"m": backend}) as (_, models):
        await models.generate(given, model="m")

    assert [expected] == seen


ODD = {"mode": "auto", "tools": [{"type": "function", "function": "f"}]}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "messages"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        (["hi"], "messages[0]"),
        ([USER, {"role": "robot", "content": "x"}], "messages[1].role"),
        ({"messages": [USER], "tools": [{"name": 5}]}, "tools[0].name"),
        (5, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {"a": 1}}, "messages"),
        ({"messages": [USER], "system": 5}, "system.content"),
        ({"messages": [USER], "tools": 5}, "tools"),
        ({"messages": [USER], "functions": "f"}, "functions"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "\ud800", "content": "x"}], "messages[0]"),
        ({"messages": [USER], "tool_choice": {"type": []}}, "tool_choice"),
        ({"messages": [USER], "tool_choice": {"type": "function", "function": 5}}, "tool_choice"),
        (
            {"messages": [USER], "tool_choice": {"type": "allowed_tools", "allowed_tools": 5}},
            "tool_choice.allowed_tools",
        ),
        (
            {"messages": [USER], "tool_choice": {"type": "allowed_tools", "allowed_tools": ODD}},
            "tool_choice.allowed_tools.tools[0]",
        ),
    ],
)
async def test_input_that_does_not_fit_names_the_place(given: Any, param: str) -> None:
    """The same paths that the gateway tells, for callers of the facade."""
    async with serving() as (_, models):
        with pytest.raises(InvalidBody) as caught:
            models.generate_stream(given)

    assert param == caught.value.param


@pytest.mark.parametrize("n", [-5, 129, 10**9])
async def test_so_many_answers_are_none(n: int) -> None:
    """A body that a plugin passes on keeps nobody busy, whatever it asks for."""
    async with serving() as (server, models):
        with pytest.raises(InvalidBody, match=r"^n: expected 1 to 128$"):
            await models.generate({"messages": [USER], "n": n})
        with pytest.raises(InvalidBody, match=r"^n: expected 1 to 128$"):
            models.generate_stream({"messages": [USER], "n": n})
        assert [] == await server.rows()


async def test_options_are_keywords_or_a_struct() -> None:
    """Either form reaches the backend, whose `model` is never the logical name."""
    seen: list[GenerateOpts] = []
    backend = define_backend("mine", generate=lambda _, opts: str(seen.append(opts)))
    async with serving(backends={"m": backend}) as (_, models):
        await models.generate("hi", model="m", temperature=0.5, stop=["x"])
        await models.generate("hi", opts=GenerateOpts(model="m", temperature=0.5, stop=["x"]))
        await models.generate({"messages": [USER], "temperature": 0.5, "seed": 7}, model="m")
        await models.generate({"messages": [USER], "temperature": 0.5}, model="m", temperature=0)

    assert [(None, 0.5, ["x"], None)] * 2 + [(None, 0.5, None, 7), (None, 0, None, None)] == [
        (opts.model, opts.temperature, opts.stop, opts.seed) for opts in seen
    ]


async def test_options_in_both_forms_are_a_mistake() -> None:
    """Nobody has to guess which of the two wins."""
    async with serving() as (server, models):
        with pytest.raises(TypeError, match="not both"):
            await models.generate("hi", opts=GenerateOpts(), temperature=1)
        with pytest.raises(TypeError, match="not both"):
            models.generate_stream("hi", opts=GenerateOpts(), seed=1)
        with pytest.raises(TypeError, match="not both"):
            await models.embed("hi", opts=EmbedOpts(), model="default")
        assert [] == await server.rows()


MISNAMED: dict[str, tuple[str, str]] = {
    "temprature": ("generate", "no option 'temprature'; did you mean 'temperature'?"),
    "maxTokens": ("generateStream", "no option 'maxTokens'; did you mean 'max_tokens'?"),
    "tools": ("generate", "no option 'tools': give it with the prompt, as {'messages': …"),
    "dimension": ("embed", "no option 'dimension'; did you mean 'dimensions'?"),
    "voice": ("embed", "no option 'voice'; the known options are "),
}


@pytest.mark.parametrize("name", MISNAMED)
async def test_an_option_that_does_not_exist_is_told_the_nearest(name: str) -> None:
    """Whoever calls a model from Python reads what is wrong, and no model is asked."""
    method, told = MISNAMED[name]
    async with serving() as (server, models):
        with pytest.raises(TypeError) as caught:
            await text_of(models, method, **{name: 1})
        assert [] == await server.rows()

    assert str(caught.value).startswith(told)


async def test_running_tools_on_the_server_does_not_exist_yet() -> None:
    """`tool_mode='auto'` says so from the call itself."""
    async with serving() as (_, models):
        with pytest.raises(NotImplementedYet, match="tool_mode 'auto'"):
            models.generate_stream("hi", tool_mode="auto")
        with pytest.raises(NotImplementedYet) as caught:
            await models.generate("hi", opts=GenerateOpts(tool_mode="auto"))

    assert 501 == caught.value.status
    assert "tool_mode 'auto'" in caught.value.public_message


MAY_FALL_BACK: list[Exception] = [
    BackendError("down"),
    BackendError("down", status=503, upstream_status=503),
    BackendTimeout("slow"),
    UpstreamAuthError("whose key?", upstream_status=401),
    UpstreamRejected("no such model", upstream_status=404),
    UpstreamRejected("conflict", upstream_status=409),
    UpstreamRejected("slow down", upstream_status=429),
    ClientError("too slow", status=408),
    ServiceUnavailable("loading"),
    CapabilityError("cannot"),
    RuntimeError("a bug"),
    ConnectionResetError("gone"),
    TimeoutError("slow"),
]
MUST_NOT: list[Exception] = [
    UpstreamRejected("bad", upstream_status=400),
    UpstreamRejected("large", upstream_status=413),
    UpstreamRejected("odd", upstream_status=422),
    InvalidBody("bad"),
    Aborted("left"),
]


def named(error: Exception) -> str:
    """How a test calls an error."""
    return f"{type(error).__name__}-{getattr(error, 'status', '')}"


@every_method
@pytest.mark.parametrize("error", MAY_FALL_BACK, ids=named)
async def test_another_backend_is_asked_where_it_may_do_better(
    method: str, error: Exception
) -> None:
    """The caller sees the second one's answer; the rows show both attempts."""
    backends = {"first": failing(error), "spare": fine()}
    async with serving(backends=backends, first=["spare"]) as (server, models):
        assert ANSWERS[method] == await text_of(models, method, model="first")
        rows = await server.rows()

    attempts = [("first", "first", method, False), ("spare", "first", method, True)]
    assert attempts == columns(rows, "backend_name", "model", "method", "success")


@every_method
@pytest.mark.parametrize("error", MUST_NOT, ids=named)
async def test_no_other_backend_is_asked_where_none_would_do_better(
    method: str, error: Exception
) -> None:
    """What is wrong with the call itself is wrong everywhere."""
    backends = {"first": failing(error), "spare": fine()}
    async with serving(backends=backends, first=["spare"]) as (server, models):
        with pytest.raises(type(error), match=str(error)):
            await text_of(models, method, model="first")
        rows = await server.rows()

    assert [("first", False)] == columns(rows, "backend_name", "success")


@every_method
async def test_the_last_error_is_the_one_that_is_told(method: str) -> None:
    """When all fail, the last candidate's error is raised, and each attempt has its own code."""
    backends = {
        "first": failing(BackendError("one", upstream_status=500)),
        "second": failing(BackendTimeout("two"), "second"),
        "third": failing(UpstreamRejected("three", upstream_status=429), "third"),
    }
    async with serving(backends=backends, first=["second", "third"]) as (server, models):
        with pytest.raises(UpstreamRejected, match="three"):
            await text_of(models, method, model="first")
        rows = await server.rows()

    assert [
        ("first", "backend_error", 500),
        ("second", "timeout", None),
        ("third", "backend_error", 429),
    ] == columns(rows, "backend_name", "error_code", "upstream_status")


async def test_who_lacks_a_capability_is_passed_over() -> None:
    """Only who can serve a call is asked; the reasons of the first are told if nobody can."""
    able = define_backend("able", generate=lambda: "with tools", tools=True)
    first = define_backend("first", generate_stream=two_words)
    backends = {"first": first, "able": able}
    given = {"messages": [USER], "tools": [TOOL]}
    async with serving(backends=backends, first=["able"]) as (server, models):
        assert "with tools" == await text_of(models, "generate", given, model="first")
        with pytest.raises(CapabilityError, match=r"'first' .*does not support tools"):
            models.generate_stream(given, model="first")
        rows = await server.rows()

    assert [("able", True), (None, False)] == columns(rows, "backend_name", "success")


async def test_a_stream_falls_back_until_its_first_chunk_and_never_after() -> None:
    """A text half told cannot be told again by another."""
    gone = BackendError("gone")

    async def breaks() -> AsyncIterator[str]:
        yield "half"
        raise gone

    backends = {"first": define_backend("first", generate_stream=breaks), "spare": fine()}
    async with serving(backends=backends, first=["spare"]) as (server, models):
        chunks = models.generate_stream("hi", model="first")
        told = (await anext(chunks)).delta_content
        with pytest.raises(BackendError, match="gone"):
            await anext(chunks)
        rows = await server.rows()

    assert "half" == told
    assert [("first", False, 1, "backend_error")] == columns(
        rows, "backend_name", "success", "completion_tokens", "error_code"
    )


FALLBACK = """
models:
  generative:
    default: {{backend: openai, model: m, baseUrl: "{url}", fallback: spare, {more}}}
    spare: {{backend: echo, model: spare-model}}
  embedding:
    default: {{backend: openai, model: m, baseUrl: "{url}", fallback: [spare], {more}}}
    spare: {{backend: echo, model: spare-model}}
"""
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "embed": ("/v1/embeddings", {"input": "hello"}),
    "generate": ("/v1/chat/completions", {"messages": HELLO["messages"]}),
    "generateStream": ("/v1/chat/completions", {"messages": HELLO["messages"], "stream": True}),
}


@every_method
@pytest.mark.parametrize("status", [401, 403, 404, 408, 409, 429, 500, 502, 503, 529])
async def test_a_providers_fault_falls_back(
    upstream: ScriptedUpstream, method: str, status: int
) -> None:
    """Clients get the spare model's answer; only the last candidate would be asked again."""
    config = FALLBACK.format(url=upstream.url, more="maxRetries: 2")
    upstream.script(Answer(status=status, body=b""))
    path, body = CALLS[method]
    async with serving(config) as (server, _):
        answer = await ask(server, "POST", path, json=body)
        rows = await server.rows()

    assert 200 == answer.status
    assert 1 == len(upstream.requests)
    assert [("openai", "m", False, status), ("echo", "spare-model", True, None)] == columns(
        rows, "backend", "provider_model", "success", "upstream_status"
    )


@every_method
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_providers_refusal_does_not_fall_back(
    upstream: ScriptedUpstream, method: str, status: int
) -> None:
    """Clients get the refusal itself."""
    config = FALLBACK.format(url=upstream.url, more="maxRetries: 2")
    upstream.script(Answer(status=status, body={"error": {"message": "no"}}))
    path, body = CALLS[method]
    async with serving(config) as (server, _):
        answer = await ask(server, "POST", path, json=body)
        rows = await server.rows()

    assert (status, "no") == (answer.status, answer.json["error"]["message"])
    assert [("openai", status)] == columns(rows, "backend", "upstream_status")


@every_method
@pytest.mark.parametrize(
    "limit", ["connectTimeoutMs: 1000", "firstByteTimeoutMs: 100", "requestTimeoutMs: 100"]
)
async def test_a_provider_that_is_silent_or_gone_falls_back(
    upstream: ScriptedUpstream, deaf_port: int, method: str, limit: str
) -> None:
    """No connection and no answer in time are reasons to ask another."""
    gone = limit.startswith("connect")
    url = f"http://127.0.0.1:{deaf_port}/v1" if gone else upstream.url
    upstream.script(Answer(hang="head"))
    path, body = CALLS[method]
    async with serving(FALLBACK.format(url=url, more=limit)) as (server, _):
        answer = await ask(server, "POST", path, json=body)
        rows = await server.rows()

    assert 200 == answer.status
    assert [("openai", "backend_error" if gone else "timeout"), ("echo", None)] == columns(
        rows, "backend", "error_code"
    )


async def test_only_the_last_candidate_is_tried_again(upstream: ScriptedUpstream) -> None:
    """The first gives way at once; the last one gets its retries; every attempt is a row."""
    config = """
models:
  generative:
    default: {{backend: openai, model: one, baseUrl: "{url}", maxRetries: 5, fallback: last}}
    last: {{backend: openai, model: two, baseUrl: "{url}", maxRetries: 2}}
"""
    upstream.script(*[Answer(status=503, headers={"Retry-After": "0"}, body=b"")] * 4)
    async with serving(config.format(url=upstream.url)) as (server, models):
        with pytest.raises(BackendError) as caught:
            await models.generate("hi")
        rows = await server.rows()

    assert 503 == caught.value.status
    assert [("default", "one")] + [("last", "two")] * 3 == columns(
        rows, "backend_name", "provider_model"
    )
    assert ["one", "two", "two", "two"] == [asked.body["model"] for asked in upstream.requests]


class Patient:
    """A backend that begins, says so, and waits until it is ended."""

    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.reasons: list[str | None] = []
        self.backend = define_backend(
            "patient", embed=self.wait, generate=self.wait, generate_stream=self.stream
        )

    async def wait(self, _: Any, opts: Any) -> Any:
        """Wait for ever, then note what the signal says of the end."""
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.reasons.append(opts.signal.reason)
            self.ended.set()

    async def stream(self, prompt: Any, opts: Any) -> AsyncIterator[str]:
        """One word, then wait for ever."""
        if prompt.text == "say something":
            yield "something"
        await self.wait(prompt, opts)


@every_method
async def test_a_callers_own_signal_ends_a_call(method: str) -> None:
    """`abort()` raises `Aborted` in the caller, ends the backend, asks no other, and is a row."""
    patient, controller = Patient(), AbortController()
    backends = {"first": patient.backend, "spare": fine()}
    async with serving(backends=backends, first=["spare"]) as (server, models):
        options: dict[str, Any] = {"model": "first", "signal": controller.signal}
        call = asyncio.create_task(text_of(models, method, **options))
        async with asyncio.timeout(20):
            await patient.begun.wait()
            controller.abort("changed my mind")
            with pytest.raises(Aborted, match="changed my mind"):
                await call
            await patient.ended.wait()
        rows = await server.rows()

    assert ["changed my mind"] == patient.reasons
    assert [("first", "aborted", False)] == columns(rows, "backend_name", "error_code", "success")


async def test_a_callers_own_signal_ends_a_stream_in_the_middle() -> None:
    """What was told until then is in the row."""
    patient, controller = Patient(), AbortController()
    async with serving(backends={"m": patient.backend}) as (server, models):
        chunks = models.generate_stream("say something", model="m", signal=controller.signal)
        async with asyncio.timeout(20):
            assert "something" == (await anext(chunks)).delta_content
            rest = asyncio.ensure_future(anext(chunks))
            await patient.begun.wait()
            controller.abort()
            with pytest.raises(Aborted):
                await rest
        assert patient.ended.is_set()
        (row,) = await server.rows()

    assert ("aborted", 1) == (row["error_code"], row["completion_tokens"])
    assert row["ttft_ms"] > 0


@every_method
async def test_a_signal_that_has_fired_asks_nobody(method: str) -> None:
    """An aborted call does not begin."""
    patient, controller = Patient(), AbortController()
    controller.abort("too late")
    async with serving(backends={"m": patient.backend}) as (_, models):
        with pytest.raises(Aborted, match="too late"):
            await text_of(models, method, model="m", signal=controller.signal)

    assert not patient.begun.is_set()


async def test_a_stream_that_is_left_closes_its_backend() -> None:
    """`aclose` ends the backend's generator and writes one row, as aborted."""
    closed: list[str] = []

    async def stream() -> AsyncIterator[str]:
        try:
            yield "one"
            yield "two"
        finally:
            closed.append("closed")

    backend = define_backend("mine", generate_stream=stream)
    async with serving(backends={"m": backend}) as (server, models):
        chunks: Any = models.generate_stream("hi", model="m")
        await anext(chunks)
        await chunks.aclose()
        assert ["closed"] == closed
        (row,) = await server.rows()

    assert (False, "aborted", 1) == (row["success"], row["error_code"], row["completion_tokens"])


async def test_a_stream_that_nobody_reads_leaves_no_row() -> None:
    """Nothing was asked, nothing is billed."""
    async with serving() as (server, models):
        chunks: Any = models.generate_stream("hi")
        await chunks.aclose()
        assert [] == await server.rows()


class Ask(Resource):
    """Asks models on behalf of whoever posts here."""

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> Any:
        """All three methods; one through `get_context`, as code far from the handler would."""
        body = await data
        await context.models.embed("hi", model=body["model"])
        await get_context().models.generate("hi", model=body["model"], conversation_id="c-1")
        chunks = context.models.generate_stream("hi", model=body["model"], adapter="a-1")
        return [chunk.delta_content async for chunk in chunks if chunk.delta_content]


ROW: dict[str, Any] = {
    "tenant": "acme",
    "user": "ada",
    "app": "lab/ask",
    "request_id": "r-1",
    "model": "provider/model",
    "backend": "kind",
    "backend_name": "mine",
    "provider_model": "provider/model",
    "adapter": None,
    "conversation_id": None,
    "prompt_tokens": None,
    "completion_tokens": None,
    "embedding_tokens": None,
    "cached_tokens": None,
    "reasoning_tokens": None,
    "usage_estimated": False,
    "gpu_ms": None,
    "success": True,
    "error_code": None,
    "finish_reason": None,
    "upstream_status": None,
    "cost": None,
    "price_version": None,
    "reserved_tokens": None,
    "reserved_cost": None,
}


def counting() -> ModelBackend:
    """A backend whose every answer says what it took."""
    usage = TokenUsage(prompt_tokens=3, completion_tokens=4, cached_tokens=1, reasoning_tokens=2)

    async def stream() -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(delta_content="yes")
        yield GenerateChunk(finish_reason="length", usage=usage)

    backend = define_backend(
        "kind",
        embed=lambda: EmbedResult(vectors=[[1.0]], usage=TokenUsage(embedding_tokens=7)),
        generate_stream=stream,
    )
    backend.provider_model = "provider/model"
    return backend


async def test_a_row_tells_who_asked_what_of_whom() -> None:
    """Every column, for the three methods, called in a request of one user of one tenant."""

    def register(scope: Scope) -> None:
        backend = counting()
        scope.models.register_backend("generative", "mine", backend)
        scope.models.register_backend("embedding", "mine", backend)

    async with running(resources={"lab/ask": Ask}, handle_application=register) as server:
        await server.operate(
            "add_role", role="asker", permission={"resources": {"lab/*": ["create"]}}
        )
        key = await server.key_for("ada", role="asker", tenant="acme")
        body, headers = {"model": "provider/model"}, {"x-request-id": "r-1"}
        answer = await ask(server, "POST", "/lab/ask", key=key, json=body, headers=headers)
        rows = [*reversed(await server.rows())]
        keys = await server.operate("list_api_keys")

    assert ["yes"] == answer.json
    for row in rows:
        assert row.pop("id") > 0
        assert row.pop("__createdtime__") > 1.7e12
        assert row.pop("latency_ms") > 0
    assert rows[2].pop("ttft_ms") > 0
    both = {**ROW, "api_key": next(key.id for key in keys if key.user == "ada")}
    counted = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 1,
        "reasoning_tokens": 2,
        "finish_reason": "length",
    }
    assert [
        {**both, "method": "embed", "embedding_tokens": 7, "ttft_ms": None},
        {**both, **counted, "method": "generate", "conversation_id": "c-1", "ttft_ms": None},
        {**both, **counted, "method": "generateStream", "adapter": "a-1"},
    ] == rows


async def test_outside_a_request_nobody_is_billed() -> None:
    """A plugin's own calls work, and their rows say that no user asked."""
    async with serving() as (server, models):
        await models.generate("hi")
        (row,) = await server.rows()

    assert (None, None, None, None) == (
        row["tenant"],
        row["user"],
        row["app"],
        row["request_id"],
    )
    assert ("default", "echo") == (row["model"], row["provider_model"])


async def test_rows_are_numbered_in_order_of_time() -> None:
    """The id sorts by time, however many calls begin at once."""
    async with serving() as (server, models):
        await asyncio.gather(*(models.generate("hi") for _ in range(200)))
        rows = await server.rows()

    ids = [row["id"] for row in rows]
    assert sorted(ids, reverse=True) == ids
    assert 200 == len(set(ids))


@pytest.mark.parametrize("count", [10**30, -1, float("nan"), "many"])
async def test_a_count_that_is_none_does_not_hold_up_the_rows(count: Any) -> None:
    """What a backend of one's own reports may be nonsense: it is estimated, the rest counts."""
    usage = TokenUsage(prompt_tokens=count, completion_tokens=2)
    backend = define_backend("mine", generate=lambda: GenerateResult(content="x", usage=usage))
    async with serving(backends={"m": backend}) as (server, models):
        await models.generate("hi", model="m")
        await models.generate("hi")
        rows = await server.rows()

    assert [("mine", 5, 2, True), ("echo", 1, 1, False)] == columns(
        rows, "backend", "prompt_tokens", "completion_tokens", "usage_estimated"
    )


BAD_KEY = "invalid key sk-1"


class LibraryError(Exception):
    """As a provider's library raises them."""

    status_code = 401


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(LibraryError, 502, "backend_error"), (TimeoutError, 504, "timeout")],
)
async def test_what_a_backend_did_not_foresee_is_a_failure_of_its_own(
    caplog: pytest.LogCaptureFixture, error: type[Exception], status: int, code: str
) -> None:
    """Its status and words are in the log, never in our answer; what it falls back to is tried."""

    def whole() -> GenerateResult:
        raise error(BAD_KEY)

    async def begun() -> AsyncIterator[str]:
        yield "a"
        raise error(BAD_KEY)

    backends = {
        "w": define_backend("w", generate=whole),
        "s": define_backend("s", generate_stream=begun),
        "f": define_backend("f", generate=whole),
    }
    async with serving(backends=backends, f=["default"]) as (server, models):
        asked = [{"model": "w"}, {"model": "s"}, {"model": "s", "stream": True}, {"model": "f"}]
        answers = [
            await ask(server, "POST", "/v1/chat/completions", json={**HELLO, **body})
            for body in asked
        ]
        with pytest.raises(BackendError) as caught:
            await models.generate("hi", model="w")
        rows = await server.rows()

    assert [status, status, 200, 200] == [answer.status for answer in answers]
    assert BAD_KEY not in "".join(answer.text for answer in answers)
    assert '"error"' in answers[2].text
    assert isinstance(caught.value.__cause__, error)
    assert [code] * 5 == [row["error_code"] for row in rows if not row["success"]]
    logged = [record.exc_info for record in caplog.records if record.name == "harperpy.models"]
    assert [error] * 5 == [info[0] for info in logged if info]


async def test_what_a_reader_of_a_stream_raises_is_no_failure_of_the_backend(
    upstream: ScriptedUpstream,
) -> None:
    """It goes through the backend's own hands where pieces come, and comes out as it was."""

    def broken(batch: Any) -> bool:
        raise LibraryError(batch)

    upstream.script(Answer(events=streamed("a", "b"), pause=0.05))
    async with running(provider(upstream.url)) as server:
        chunks: Any = server.server.core.models.generate_stream("hi")
        batches = chunks.batches()
        await anext(batches)
        chunks.divert(broken)
        with pytest.raises(LibraryError):
            await anext(batches)


async def test_a_stream_that_failed_is_not_asked_for_what_another_says() -> None:
    """Where a backend falls back to one that gives its pieces by its iterator alone."""
    asked: list[Any] = []

    async def none() -> AsyncIterator[Any]:
        if not asked:
            raise BackendError
        yield ()

    class Diverting(ModelBackend):
        """One that can give its pieces to a function."""

        name = "first"

        def generate_stream(self, prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[Any]:
            return Batched(none(), asked.append)

    backends = {"first": Diverting(), "spare": fine()}
    async with serving(backends=backends, first=["spare"]) as (server, _):
        body = {**HELLO, "model": "first", "stream": True}
        answer = await ask(server, "POST", "/v1/chat/completions", json=body)
        rows = await server.rows()
    assert "[DONE]" in answer.text
    assert [] == asked
    assert {"first": False, "spare": True} == {row["backend"]: row["success"] for row in rows}


class Count(int):
    """A count that is also something else."""


class Measure(float):
    """As the numbers of libraries that reckon with arrays are."""


class Reason(str, enum.Enum):  # noqa: UP042  # which has another name than its value
    """Why an answer ended, as a backend may write it."""

    FULL = "length"


ODD_USAGE: Any = TokenUsage(
    prompt_tokens=Measure(3),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    completion_tokens=Count(2),
    cached_tokens=1.5,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    gpu_ms=Measure(7),
)


@pytest.mark.parametrize("stream", [True, False])
async def test_numbers_of_a_backends_own_kind_are_counted(*, stream: bool) -> None:
    """As plain ones, which the journal can hold; the place of the call is free when it ends."""

    async def chunks() -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(delta_content="x", finish_reason=Reason.FULL, usage=ODD_USAGE)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def whole() -> GenerateResult:
        return GenerateResult(content="x", finish_reason=Reason.FULL, usage=ODD_USAGE)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    backend = define_backend("mine", generate=whole, generate_stream=chunks)
    one_at_a_time = "\nlimits: {rules: [{per: user, concurrent: 1}]}"
    async with serving(ECHO + one_at_a_time, backends={"m": backend}) as (server, _):
        finished = finished_calls(server)
        key = await server.key_for("ada")
        body = {**HELLO, "model": "m", "stream": stream}
        answers = [
            await ask(server, "POST", "/v1/chat/completions", key=key, json=body) for _ in range(2)
        ]
        assert [200, 200] == [answer.status for answer in answers]
        call = finished.get_nowait()

    assert (3, 2, 2, 7.0, "length") == (
        *(call.prompt_tokens, call.completion_tokens, call.cached_tokens),
        *(call.gpu_ms, call.finish_reason),
    )
    noted = msgspec.json.encode(call)
    assert noted == msgspec.json.encode(msgspec.json.decode(noted, type=ModelCall))


async def test_a_call_that_cannot_be_noted_gives_back_what_it_held() -> None:
    """And those who count calls are told of it."""

    def broken(call: ModelCall) -> None:
        raise ValueError(call)

    one_at_a_time = "\nlimits: {rules: [{per: user, concurrent: 1}]}"
    async with serving(ECHO + one_at_a_time) as (server, _):
        finished = finished_calls(server)
        key, ledger = await server.key_for("ada"), server.server.core.ledger
        ledger.price = broken
        body = {**HELLO, "model": "echo"}
        failed = await ask(server, "POST", "/v1/chat/completions", key=key, json=body)
        ledger.price = None
        answer = await ask(server, "POST", "/v1/chat/completions", key=key, json=body)

    assert (500, 200, 2) == (failed.status, answer.status, finished.qsize())


@pytest.mark.parametrize(
    ("given", "stored"),
    [({"a": 1}, "{'a': 1}"), (["x"], "['x']"), ("\ud800", "?"), (10**30, str(10**30))],
)
async def test_a_label_that_is_none_does_not_hold_up_the_rows(given: Any, stored: Any) -> None:
    """A handler may pass on what a client sent: its call is recorded, and those after it."""
    async with serving() as (server, models):
        await models.generate("hi", conversation_id=given)
        await models.generate("hi", conversation_id="c-1")
        rows = await server.rows()

    assert [(stored,), ("c-1",)] == columns(rows, "conversation_id")


async def test_subscribers_see_each_call_as_it_ends() -> None:
    """A plugin may count calls itself; it is told what the row will say."""
    async with serving() as (server, models):
        finished = finished_calls(server)
        await models.generate("hi", model="echo")
        async with asyncio.timeout(20):
            call = await finished.get()
        (row,) = await server.rows()

    assert (row["id"], row["model"], row["completion_tokens"]) == (
        call.id,
        call.model,
        call.completion_tokens,
    )


class Leaving(Resource):
    """Streams what a model says to anyone."""

    public = True

    @staticmethod
    async def get(target: RequestTarget, context: Context) -> AsyncIterator[str]:
        """The pieces of the answer, or the code of what prevents it."""
        controller = AbortController()
        chunks = context.models.generate_stream(
            "say something", model="patient", signal=controller.signal
        )
        async for chunk in chunks:
            yield chunk.delta_content or ""


async def test_leaving_a_handler_of_ones_own_ends_its_calls_too() -> None:
    """The request's own signal counts beside the one that the caller gives."""
    patient = Patient()

    def register(scope: Scope) -> None:
        scope.models.register_backend("generative", "patient", patient.backend)

    async with running(resources={"leave": Leaving}, handle_application=register) as server:
        finished = finished_calls(server)
        async with asyncio.timeout(20), server.session() as client:
            response = await client.get("/leave", headers={"Accept": "text/event-stream"})
            assert b"something" in await response.content.readline()
            response.close()
            await patient.ended.wait()
            call = await finished.get()

    assert ("aborted", "leave", 1) == (call.error_code, call.app, call.completion_tokens)
    assert ["client_disconnected"] == patient.reasons


async def test_an_error_of_the_facade_is_worded_for_the_client() -> None:
    """A handler needs no `try`: what models raise is answered as what it is."""

    def register(scope: Scope) -> None:
        scope.models.register_backend(
            "generative", "busy", failing(UpstreamRejected("later", upstream_status=429))
        )

    class Simple(Resource):
        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> Any:
            return (await context.models.generate("hi", model=(await data)["model"])).content

    async with running(resources={"simple": Simple}, handle_application=register) as server:
        statuses = {
            model: (await ask(server, "POST", "/simple", json={"model": model})).status
            for model in ("busy", "nobody", "", "echo")
        }

    assert {"busy": 429, "nobody": 404, "": 400, "echo": 200} == statuses


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0.5, "seed": 7, "top_p": None}, {"temperature": 0.5, "seed": 7}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"tool_choice": "auto", "tools": [{"function": {"name": "f"}}]}, {"tool_choice": "auto"}),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "tools": [{"function": {"name": "f"}}],
            },
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}},
        ),
        ({"response_format": {"type": "text"}}, {}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
    ],
)
async def test_an_openai_body_brings_its_options(
    upstream: ScriptedUpstream, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    """What an OpenAI body given as input asks for reaches the provider, and nothing else does."""
    async with serving(provider(upstream.url)) as (_, models):
        await models.generate({"messages": [USER], **body})
    sent = upstream.requests[0].body
    own = {"messages", "model", "stream", "tools"}
    assert expected == {name: value for name, value in sent.items() if name not in own}


async def test_an_openai_body_with_a_wrong_option_is_refused() -> None:
    """A wrong value in a body given as input is refused with its name."""
    async with serving() as (_, models):
        with pytest.raises(InvalidBody) as refused:
            await models.generate({"messages": [USER], "temperature": "hot"})
    assert "temperature" == refused.value.param


async def test_n_answers_leave_what_a_backend_gave_as_it_was() -> None:
    """Chunks and results that a backend gives each time anew keep their place and their cost."""
    usage = TokenUsage(prompt_tokens=2, completion_tokens=1)
    said = [GenerateChunk(delta_content="a"), GenerateChunk(finish_reason="stop", usage=usage)]
    result = GenerateResult(content="a", usage=usage)
    backend = define_backend("mine", generate=lambda: result, generate_stream=lambda: said)

    async with serving(backends={"m": backend}) as (_, models):
        for _ in range(2):
            answer = await models.generate("hi", model="m", n=2)
            assert (1, answer.usage) == (
                len(answer.others),
                TokenUsage(prompt_tokens=4, completion_tokens=2),
            )
            chunks = [chunk async for chunk in models.generate_stream("hi", model="m", n=2)]
            assert [0, 1] == sorted(chunk.index for chunk in chunks if chunk.delta_content)
            assert answer.usage == chunks[-1].usage

    assert GenerateResult(content="a", usage=usage) == result
    assert GenerateChunk(finish_reason="stop", usage=usage) == said[1]


async def test_of_a_count_that_grows_the_last_is_the_cost_of_each_of_n() -> None:
    """Some tell with each chunk what all of them cost so far."""

    async def answers() -> AsyncIterator[GenerateChunk]:
        for at in (1, 2):
            usage = TokenUsage(prompt_tokens=5, completion_tokens=at)
            yield GenerateChunk(delta_content="a", usage=usage)

    async with serving(backends={"m": define_backend("m", generate_stream=answers)}) as (_, models):
        chunks = [chunk async for chunk in models.generate_stream("hi", model="m", n=3)]

    assert TokenUsage(prompt_tokens=15, completion_tokens=6) == chunks[-1].usage


@pytest.mark.parametrize("kind", [asyncio.CancelledError, RuntimeError])
async def test_one_of_n_that_ends_in_any_way_keeps_nobody_waiting(
    kind: type[BaseException],
) -> None:
    """A cancellation of a backend's own making, or a failure to clean up, ends all of them."""

    class Stream:
        def __aiter__(self) -> AsyncIterator[str]:
            return self

        async def __anext__(self) -> str:
            if kind is RuntimeError:
                raise StopAsyncIteration
            raise kind

        async def aclose(self) -> None:
            if kind is RuntimeError:
                raise kind

    backend = define_backend("m", generate_stream=Stream)
    async with serving(backends={"m": backend}) as (_, models), asyncio.timeout(30):
        with pytest.raises(BackendError if kind is RuntimeError else kind):
            _ = [chunk async for chunk in models.generate_stream("hi", model="m", n=2)]


async def test_a_stream_is_put_together_with_all_that_it_told() -> None:
    """Who only streams answers whole too: texts joined, lists in a row, of the rest the last."""
    likely, unlikely = [TokenLogprob(token=token, logprob=-1) for token in "ab"]
    whole: dict[str, Any] = {
        "usage": TokenUsage(prompt_tokens=1, completion_tokens=2),
        "system_fingerprint": "fp",
        "service_tier": "flex",
        "moderation": {"flagged": False},
    }
    chunks = [
        GenerateChunk(delta_refusal="n", logprobs=[likely], refusal_logprobs=[unlikely]),
        GenerateChunk(delta_refusal="o", logprobs=[unlikely], refusal_logprobs=[likely]),
        GenerateChunk(
            delta_reasoning_content="h", delta_annotations=[1], index=1, delta_reasoning_details=[3]
        ),
        GenerateChunk(
            delta_reasoning_content="m", delta_annotations=[2], index=1, delta_reasoning_details=[4]
        ),
        GenerateChunk(finish_reason="length", index=1, **{**whole, "service_tier": "default"}),
        GenerateChunk(**whole),
    ]
    backend = define_backend("m", generate_stream=lambda: chunks, features=["n"])

    async with serving(backends={"m": backend}) as (_, models):
        answer = await models.generate("hi", model="m", n=2)

    second = Choice(
        finish_reason="length",
        reasoning_content="hm",
        annotations=[1, 2],
        reasoning_details=[3, 4],
    )
    assert answer == GenerateResult(
        refusal="no",
        logprobs=[likely, unlikely],
        refusal_logprobs=[unlikely, likely],
        others=[second],
        **whole,
    )
