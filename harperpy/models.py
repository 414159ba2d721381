"""Models: the one door to all backends. Resolves names, asks, and records each attempt."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import msgspec

from .accounting import Caller, Ledger, Method, clipped, current_caller
from .backend import (
    MOST_ANSWERS,
    Assembly,
    Embeds,
    ModelBackend,
    Streams,
    aclose,
    define_backend,
)
from .batches import Batched
from .calls import Call, with_allowed_tools
from .errors import BackendError, ConfigError, HarperError, InvalidBody, NotImplementedYet
from .fanout import all_of, interleaved, joined, topped_up
from .messages import (
    EmbedInput,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateInput,
    GenerateOpts,
    GenerateResult,
    Prompt,
    TokenUsage,
)
from .permission import Permission
from .prompts import options_in, to_prompt
from .recorder import Recorder, answered_tokens
from .routing import Candidate, Kind, ModelInfo, Registration, Routes
from .signal import AbortSignal
from .spelling import nearest
from .vectors import Vector
from .vocabulary import EmbedInputs, Vocabulary, embed_inputs

OptsType = TypeVar("OptsType", GenerateOpts, EmbedOpts)
Vectors: TypeAlias = list[Sequence[float]]


class Models:
    """embed, generate and generate_stream over every registered backend.

    Each attempt at a backend is one `ModelCall` in the ledger, billed to the running request's
    user, who may ask those models that their role has. A call ends when the signal given with it or
    the request's own fires.
    """

    define_backend = staticmethod(define_backend)

    def __init__(self, routes: Routes, ledger: Ledger) -> None:
        self._routes = routes
        self._ledger = ledger
        self._vocabulary = Vocabulary()
        self.owner: str | None = None
        """The plugin whose own is what is registered here."""

    def of(self, owner: str) -> Models:
        """The same, for a plugin: what it registers is its own."""
        same = copy.copy(self)
        same.owner = owner
        return same

    def register_backend(
        self,
        kind: Kind,
        name: str,
        backend: ModelBackend,
        *,
        fallback: Sequence[str] = (),
        replace: bool = False,
    ) -> None:
        """Offer a backend under a logical name, to plugins and at `/v1` alike.

        `fallback` names the ones to try after it; where one does not exist when all plugins have
        started, this plugin did not. Raises `RegistrationError` for a taken name (unless `replace`)
        and for a backend that cannot do what `kind` says.
        """
        registration = Registration(kind, name, backend, tuple(fallback), self.owner)
        self._routes.add(registration, replace=replace)

    def list(self) -> list[ModelInfo]:
        """The names that the running request's user may use; all, where there is none."""
        return self._routes.listing(_permission(current_caller.get() or Caller(source="system")))

    async def embed(
        self, given: EmbedInput, *, opts: EmbedOpts | None = None, **options: Any
    ) -> Vectors:
        """One vector per text or array of tokens; `options` are the fields of `EmbedOpts`.

        Raises as `generate`.
        """
        return (await self.embed_with_usage(given, opts=opts, **options)).vectors

    async def embed_with_usage(
        self, given: EmbedInput, *, opts: EmbedOpts | None = None, **options: Any
    ) -> EmbedResult:
        """As `embed`, with the tokens it took. Raises `InvalidBody` for what is no input."""
        settings = _settings(EmbedOpts, opts, options)
        call = self._call("embed", embed_inputs(given), settings)
        return await call.first(self._embedding, _embedded)

    async def generate(
        self, given: GenerateInput, *, opts: GenerateOpts | None = None, **options: Any
    ) -> GenerateResult:
        """A whole answer; `options` are the fields of `GenerateOpts`.

        Raises `ModelNotFound`, `CapabilityError`, what the last backend that was tried raises (a
        `BackendError`, or `UpstreamRejected`), and `TransactionError` in a request that has written
        and not committed.
        """
        prompt, settings = _ask(given, opts, options)
        call = self._call("generate", prompt, settings)
        if (count := settings.n or 1) == 1:
            return await call.first(_asked, _told)
        _check_count(count)
        results: list[GenerateResult] = []
        begun = 0
        if call.gives_many:
            results.append(result := await call.first(_asked, _told))
            if (begun := 1 + len(result.others)) >= count:
                return result
        # Some providers do not know `n`, and do not say so.
        more = [self._one_call("generate", prompt, settings, at) for at in range(begun, count)]
        return joined([*results, *await all_of([call.first(_asked, _told) for call in more])])

    def generate_stream(
        self, given: GenerateInput, *, opts: GenerateOpts | None = None, **options: Any
    ) -> AsyncIterator[GenerateChunk]:
        """An answer piece by piece; an unknown model or a missing capability raises right here.

        Whatever else `generate` raises comes with the first piece or a later one.
        """
        prompt, settings = _ask(given, opts, options)
        call = self._call("generateStream", prompt, settings)
        if (count := settings.n or 1) == 1:
            return Batched(call.batches(), call.divert)
        _check_count(count)

        def one(index: int) -> AsyncIterator[GenerateChunk]:
            call = self._one_call("generateStream", prompt, settings, index)
            return Batched(call.batches(), call.divert)

        if call.gives_many:
            return topped_up(Batched(call.batches(), call.divert), count, one)
        return interleaved({index: one(index) for index in range(count)})

    async def open(self) -> None:
        """Let every backend begin its own preparations; called once when the server starts.

        Raises `ConfigError` for one that fails.
        """
        await asyncio.gather(*map(_open, self._registrations()))
        self._routes.opened()

    async def close(self) -> None:
        """Let go of every backend's connections."""
        closing = (one.backend.close() for one in self._registrations())
        await asyncio.gather(*closing, return_exceptions=True)

    def _registrations(self) -> Iterable[Registration]:
        """One of each backend."""
        return {id(one.backend): one for one in self._routes}.values()

    def _embedding(
        self, call: Call, candidate: Candidate, opts: EmbedOpts, _: Recorder
    ) -> Awaitable[EmbedResult]:
        inputs: EmbedInputs = call.asked
        backend: Any = candidate.backend
        if inputs.arrays and not backend.token_input:
            return self._embed_arrays(backend, inputs, opts)
        coming: Awaitable[EmbedResult] = backend.embed(inputs.texts or inputs.arrays, opts)
        return coming

    async def _embed_arrays(
        self, backend: Embeds, inputs: EmbedInputs, opts: EmbedOpts
    ) -> EmbedResult:
        """By a backend that takes text only."""
        return await backend.embed(await self._vocabulary.texts(inputs), opts)

    def _one_call(self, method: Method, prompt: Prompt, opts: GenerateOpts, index: int) -> Call:
        """The call for one of `n` answers."""
        return self._call(method, prompt, _one_of(opts, index))

    def _call(self, method: Method, asked: Any, opts: Any) -> Call:
        caller = current_caller.get() or Caller(source="system")
        signal = caller.signal
        if signal is None or opts.signal is not None:
            signal = AbortSignal.any_of(signal, opts.signal)
        try:
            plan = self._routes.plan(method, asked, opts, _permission(caller))
        except HarperError as error:
            Call(self._ledger, caller, asked, opts, signal, ()).refuse(method, error)
            raise
        return Call(self._ledger, caller, asked, opts, signal, plan)


def _permission(caller: Caller) -> Permission | None:
    """What the caller's role may; the server itself, and whoever is not known, ask any model."""
    user = caller.user
    return None if user is None else user.role.permission


async def _open(registration: Registration) -> None:
    try:
        await registration.backend.open()
    except HarperError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}".removesuffix(": ")
        message = f"models: {registration.kind} {registration.name!r} does not open: {told}"
        raise ConfigError(message) from error


def _asked(
    call: Call, candidate: Candidate, opts: GenerateOpts, _: Recorder
) -> Awaitable[GenerateResult]:
    prompt, backend = call.asked, candidate.backend
    if opts.allowed_tools is not None:
        prompt = with_allowed_tools(prompt, candidate, opts)
    if (generate := getattr(backend, "generate", None)) is None:
        return _drained(cast("Streams", backend).generate_stream(prompt, opts))
    coming: Awaitable[GenerateResult] = generate(prompt, opts)
    return coming


def _told(call: Call, result: GenerateResult, recorder: Recorder) -> None:
    recorder.call.finish_reason = clipped(result.finish_reason)
    if result.usage is not None:
        recorder.count(result.usage)
    if not recorder.counted:
        result.usage = recorder.estimate(call.asked, answered_tokens(result))


def _embedded(call: Call, result: EmbedResult, recorder: Recorder) -> None:
    inputs: EmbedInputs = call.asked
    if result.usage is not None:
        recorder.count(result.usage)
    _check_vectors(result.vectors, len(inputs.texts) + len(inputs.arrays))
    row = recorder.call
    # What was asked is what there is to embed, where a backend counts it so.
    if row.embedding_tokens is None and row.prompt_tokens is None:
        row.embedding_tokens, row.usage_estimated = inputs.estimate(), True
        result.usage = TokenUsage(embedding_tokens=row.embedding_tokens)


async def _drained(chunks: AsyncIterator[GenerateChunk]) -> GenerateResult:
    """The whole answer of a backend that only streams."""
    assembly = Assembly()
    try:
        async for chunk in chunks:
            assembly.add(chunk)
    finally:
        await aclose(chunks)
    return assembly.finish()


def _ask(
    given: GenerateInput, opts: GenerateOpts | None, options: dict[str, Any]
) -> tuple[Prompt, GenerateOpts]:
    if opts is None and isinstance(given, Mapping):
        options = {**options_in(given), **options}
    if opts is None or options:
        opts = _settings(GenerateOpts, opts, options)
    if opts.tool_mode == "auto":
        message = "tool_mode 'auto' (running tools on the server) does not exist yet; use 'return'."
        raise NotImplementedYet(message, param="tool_mode")
    return given if isinstance(given, Prompt) else to_prompt(given), opts


def _settings(kind: type[OptsType], opts: OptsType | None, options: dict[str, Any]) -> OptsType:
    if opts is None:
        try:
            return kind(**options)
        except TypeError:
            raise TypeError(_misnamed(kind, options)) from None
    if options:
        message = f"give either opts= or keyword options, not both ({', '.join(options)})"
        raise TypeError(message)
    return opts


def _misnamed(kind: type[msgspec.Struct], options: Iterable[str]) -> str:
    known = kind.__struct_fields__
    name = next(name for name in options if name not in known)
    if kind is GenerateOpts and name in Prompt.__struct_fields__:
        return f"no option {name!r}: give it with the prompt, as {{'messages': …, {name!r}: …}}"
    return f"no option {name!r}; {nearest(name, known, 'options')}"


def _check_count(answers: int) -> None:
    if not 1 <= answers <= MOST_ANSWERS:
        message = f"n: expected 1 to {MOST_ANSWERS}"
        raise InvalidBody(message, param="n")


def _check_vectors(vectors: Vectors, count: int) -> None:
    """One vector of numbers for each input. Raises `BackendError`."""
    if len(vectors) != count:
        message = f"{len(vectors)} vectors for {count} inputs"
        raise BackendError(message)
    for vector in vectors:
        if not isinstance(vector, Vector) and not _is_finite(vector):
            message = "a vector holds what is no number"
            raise BackendError(message)


def _is_finite(vector: Sequence[float]) -> bool:
    try:
        return math.isfinite(sum(vector))
    except TypeError:
        return False


def _one_of(opts: GenerateOpts, index: int) -> GenerateOpts:
    """The options of one of `n` calls: the same seed would give the same answer."""
    seed = None if opts.seed is None else opts.seed + index
    return msgspec.structs.replace(opts, n=None, seed=seed)
