"""ModelBackend: what serves a model. Implement what it can; the rest is read off that."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Sequence,
)
from types import GeneratorType
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard, cast

from .errors import BackendError, RegistrationError
from .messages import (
    Capability,
    Choice,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    GenerateResult,
    Prompt,
    ToolCall,
    ToolCallDelta,
    as_json_text,
)


class ModelBackend:
    """Base of all backends. Define any of these; what is not defined is not offered.

    - `async embed(texts, opts) -> EmbedResult`
    - `async generate(prompt, opts) -> GenerateResult`
    - `generate_stream(prompt, opts) -> AsyncIterator[GenerateChunk]` (an async generator)

    `name` is the kind, as it stands in `hdb_model_calls.backend`; `provider_model` the name of
    the model it asks for, if it has one; `opts.model` is the provider's name to use for this call.
    `opts.signal` tells that the caller has left; the task is cancelled as well. `state` is one
    word or sentence for people: `ready`, or what is wrong; `about` what they should know of it.
    `max_retries` counts further attempts after errors that say `retryable`. `features` names what
    else it can do; a call that needs what is not there is refused before the backend sees it.
    `token_input` says that `embed` takes arrays of token numbers as they are; others get text.

    What it raises and is no `HarperError` is a `BackendError` to the caller (502; a `TimeoutError`
    504): status and words of another call's are not the answer's, and its trace is in the log.

    `provider_model` and what it can do may be settled in `open`, and stay as they are from then on.
    """

    name: str = ""
    provider_model: str | None = None
    tools: ClassVar[bool] = False
    structured_output: ClassVar[bool] = False
    logprobs: ClassVar[bool] = False
    token_input: ClassVar[bool] = False
    features: frozenset[Capability] = frozenset()
    about: str | None = None
    max_retries: int = 0
    state: str = "ready"

    def capabilities(self) -> frozenset[Capability]:
        """What this backend can do: the methods it has and the flags it sets."""
        found: set[Capability] = set(self.features)
        if hasattr(self, "embed"):
            found.add("embed")
        if hasattr(self, "generate_stream"):
            found |= {"stream", "generate"}
        if hasattr(self, "generate"):
            found.add("generate")
        if self.tools:
            found.add("tools")
        if self.structured_output:
            found.add("structured_output")
        if self.logprobs:
            found.add("logprobs")
        return frozenset(found)

    def served(self) -> Sequence[str]:
        """The models its provider serves, as far as it knows now: what a pattern is listed by.

        Must answer at once. Whoever has to ask a provider does so in the background.
        """
        return ()

    async def open(self) -> None:
        """Begin what takes time, in the background; called once when the server starts."""

    async def close(self) -> None:
        """Let go of connections; called once when the server stops."""


class Embeds(Protocol):
    """A backend that can embed."""

    async def embed(self, texts: list[str], opts: EmbedOpts) -> EmbedResult:
        """One vector per text."""
        ...


class Generates(Protocol):
    """A backend that answers whole."""

    async def generate(self, prompt: Prompt, opts: GenerateOpts) -> GenerateResult:
        """The whole answer."""
        ...


class Streams(Protocol):
    """A backend that answers piece by piece."""

    def generate_stream(self, prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[GenerateChunk]:
        """The answer's pieces."""
        ...


Streamer: TypeAlias = Callable[..., AsyncIterable[Any] | Iterable[Any]]


def define_backend(
    name: str,
    *,
    embed: Callable[..., Any] | None = None,
    generate: Callable[..., Any] | None = None,
    generate_stream: Streamer | None = None,
    tools: bool = False,
    structured_output: bool = False,
    features: Iterable[Capability] = (),
) -> ModelBackend:
    """A backend from plain functions `(prompt, opts)`, which may take fewer arguments.

    `generate_stream` is a generator of `GenerateChunk` or plain text, sync or async; `generate`
    returns a `GenerateResult` or text; `embed` takes a list of texts and returns vectors or an
    `EmbedResult`. Raises `RegistrationError` when there is nothing to call, or `generate` yields.
    """
    given = {"embed": embed, "generate": generate, "generate_stream": generate_stream}
    functions = {key: value for key, value in given.items() if callable(value)}
    if not name or not functions:
        message = "define_backend: give it a name and one of embed, generate, generate_stream"
        raise RegistrationError(message)
    if inspect.isasyncgenfunction(generate) or inspect.isgeneratorfunction(generate):
        message = f"define_backend: {name!r} generates by yielding: give it as generate_stream"
        raise RegistrationError(message)
    for key, function in functions.items():
        if (needs := required(function)) > positional(function, 2):
            message = (
                f"define_backend: {key} of {name!r}: expected a function of the "
                f"{'texts' if key == 'embed' else 'prompt'} and the options, or of the first of "
                f"them, got one that needs {needs} arguments"
            )
            raise RegistrationError(message)
    body: dict[str, Any] = {
        "tools": tools,
        "structured_output": structured_output,
        "features": frozenset(features),
    }
    if embed:
        body["embed"] = staticmethod(_embedder(embed))
    if generate:
        body["generate"] = staticmethod(_generator(generate))
    if generate_stream:
        body["generate_stream"] = staticmethod(_streamer(generate_stream))
    backend: ModelBackend = type("DefinedBackend", (ModelBackend,), body)()
    backend.name = name
    return backend


def _embedder(function: Callable[..., Any]) -> Callable[..., Awaitable[EmbedResult]]:
    call = fitted(function, 2)

    async def embed(texts: list[str], opts: EmbedOpts) -> EmbedResult:
        answer = await settled(call(texts, opts))
        return answer if isinstance(answer, EmbedResult) else EmbedResult(vectors=list(answer))

    return embed


def _generator(function: Callable[..., Any]) -> Callable[..., Awaitable[GenerateResult]]:
    call = fitted(function, 2)

    async def generate(prompt: Prompt, opts: GenerateOpts) -> GenerateResult:
        answer = await settled(call(prompt, opts))
        if isinstance(answer, str):
            return GenerateResult(content=answer)
        if not isinstance(answer, GenerateResult):
            raise _misfit(answer, GenerateResult)
        return answer

    return generate


def _streamer(function: Streamer) -> Callable[..., AsyncIterator[GenerateChunk]]:
    call = fitted(function, 2)

    async def generate_stream(prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[GenerateChunk]:
        items = aiterate(await settled(call(prompt, opts)))
        try:
            async for item in items:
                if isinstance(item, str):
                    yield GenerateChunk(delta_content=item)
                elif isinstance(item, GenerateChunk):
                    yield item
                else:
                    raise _misfit(item, GenerateChunk)
        finally:
            await aclose(items)

    return generate_stream


def _misfit(given: object, expected: type) -> TypeError:
    told = f"expected a text or a {expected.__name__}, got {type(given).__name__}"
    return TypeError(f"a function of define_backend: {told}")


def fitted(function: Callable[..., Any], most: int) -> Callable[..., Any]:
    """The function as one of `most` positional arguments, cut from the right to what it takes."""
    count = positional(function, most)
    return function if count == most else lambda *given: function(*given[:count])


def positional(function: Callable[..., Any], most: int) -> int:
    """How many positional arguments a function takes, at most `most`."""
    count = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return most
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
    return min(count, most)


def required(function: Callable[..., Any]) -> int:
    """How many arguments a function cannot do without."""
    parameters = inspect.signature(function).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(one.default is one.empty and one.kind not in optional for one in parameters)


def is_awaitable(value: object) -> TypeGuard[Awaitable[Any]]:
    """As `inspect.isawaitable`, which takes longer for what is none."""
    if hasattr(value, "__await__"):
        return True
    return isinstance(value, GeneratorType) and inspect.isawaitable(cast("object", value))


async def settled(value: Any) -> Any:
    """The value, awaited if it wants to be."""
    return await value if is_awaitable(value) else value


async def _from_iterable(items: Iterable[Any]) -> AsyncIterator[Any]:
    try:
        for item in items:
            yield item
    finally:
        if isinstance(items, Generator):
            items.close()


def aiterate(items: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    """An async iterator over any iterable."""
    return aiter(items) if isinstance(items, AsyncIterable) else _from_iterable(items)


async def aclose(items: AsyncIterator[Any]) -> None:
    """Close an iterator that can be closed, from the task that steps it."""
    if (close := getattr(items, "aclose", None)) is not None:
        await close()


_LISTS = ("logprobs", "refusal_logprobs", "annotations", "reasoning_details")
MOST_ANSWERS = 128
"""As OpenAI's own: a body that somebody passes on may ask for any number."""


def check_answer(index: int) -> None:
    """Raises `BackendError` for an answer beyond all that may be asked for at once."""
    if not 0 <= index < MOST_ANSWERS:
        message = f"a chunk of answer {index}; expected 0 to {MOST_ANSWERS - 1}"
        raise BackendError(message)


class Assembly:
    """Puts the chunks of a stream together into one `GenerateResult`."""

    __slots__ = ("_calls", "_choices", "_pieces", "result")

    def __init__(self) -> None:
        self.result = GenerateResult()
        self._choices: dict[int, Choice] = {0: self.result}
        self._pieces: defaultdict[tuple[int, str], list[Any]] = defaultdict(list)
        self._calls: dict[int, dict[str | int, ToolCall]] = {}

    def add(self, chunk: GenerateChunk) -> None:
        """Take one chunk in."""
        index = chunk.index
        if index not in self._choices:
            check_answer(index)
            self._choices[index] = Choice()
        if chunk.delta_content:
            self._pieces[index, "content"].append(chunk.delta_content)
        self._add_rarer(chunk)
        for delta in chunk.delta_tool_calls or ():
            _add_call(self._calls.setdefault(index, {}), delta)
        if chunk.finish_reason:
            self._choices[index].finish_reason = chunk.finish_reason
        elif index in self._calls and self._choices[index].finish_reason == "stop":
            self._choices[index].finish_reason = "tool_calls"
        _tell(self.result, chunk)

    def _add_rarer(self, chunk: GenerateChunk) -> None:
        pieces, index = self._pieces, chunk.index
        if chunk.delta_refusal:
            pieces[index, "refusal"].append(chunk.delta_refusal)
        if chunk.delta_reasoning_content:
            pieces[index, "reasoning_content"].append(chunk.delta_reasoning_content)
        if chunk.logprobs:
            pieces[index, "logprobs"] += chunk.logprobs
        if chunk.refusal_logprobs:
            pieces[index, "refusal_logprobs"] += chunk.refusal_logprobs
        if chunk.delta_annotations:
            pieces[index, "annotations"] += chunk.delta_annotations
        if chunk.delta_reasoning_details:
            pieces[index, "reasoning_details"] += chunk.delta_reasoning_details

    def finish(self) -> GenerateResult:
        """The whole answer so far."""
        for (index, field), pieces in self._pieces.items():
            whole = pieces if field in _LISTS else "".join(pieces)
            setattr(self._choices[index], field, whole)
        for index, calls in self._calls.items():
            self._choices[index].tool_calls = list(calls.values())
        self.result.others = [self._choices[index] for index in sorted(self._choices) if index]
        return self.result


def _tell(result: GenerateResult, chunk: GenerateChunk) -> None:
    """Take over what a chunk says of the whole answer."""
    if chunk.usage is not None:
        result.usage = chunk.usage
    if chunk.system_fingerprint is not None:
        result.system_fingerprint = chunk.system_fingerprint
    if chunk.service_tier is not None:
        result.service_tier = chunk.service_tier
    if chunk.moderation is not None:
        result.moderation = chunk.moderation


def call_key(known: dict[str | int, Any], delta: ToolCallDelta | ToolCall) -> str | int:
    """What a piece's call is known by: its index, else its id, else it is a piece of the latest."""
    if isinstance(delta, ToolCall):
        return delta.id or len(known)
    key = delta.id if delta.index is None else delta.index
    return next(reversed(known), 0) if key is None else key


def _add_call(calls: dict[str | int, ToolCall], delta: ToolCallDelta | ToolCall) -> None:
    key = call_key(calls, delta)
    if key not in calls:
        calls[key] = ToolCall(id=delta.id or f"call_{len(calls)}", name="", type=delta.type)
    call = calls[key]
    call.name = call.name or delta.name or ""
    call.extra_content = delta.extra_content or call.extra_content
    call.arguments = as_json_text(call.arguments) + as_json_text(delta.arguments)
