"""Models: the one door to all backends. Resolves names, asks, and records each attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from .accounting import Caller, Ledger, Method, current_caller
from .backend import (
    Assembly,
    Embeds,
    Generates,
    ModelBackend,
    Streams,
    aclose,
    define_backend,
)
from .calls import Call, Opts, Recorder
from .errors import NotImplementedYet
from .messages import (
    Capability,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateInput,
    GenerateOpts,
    GenerateResult,
    Prompt,
    TokenUsage,
    estimate_tokens,
    options_in,
    to_prompt,
)
from .routing import Candidate, Kind, ModelInfo, Registration, Routes

OptsType = TypeVar("OptsType", GenerateOpts, EmbedOpts)
Vectors: TypeAlias = list[Sequence[float]]


class Models:
    """embed, generate and generate_stream over every registered backend.

    Each attempt at a backend is one `ModelCall` in the ledger, billed to the running request's
    user. A call ends when the signal given with it or the request's own fires.
    """

    define_backend = staticmethod(define_backend)

    def __init__(self, routes: Routes, ledger: Ledger) -> None:
        self._routes = routes
        self._ledger = ledger

    def register_backend(
        self,
        kind: Kind,
        name: str,
        backend: ModelBackend,
        *,
        fallback: Sequence[str] = (),
        replace: bool = False,
    ) -> None:
        """Offer a backend under a logical name. Raises `RegistrationError`."""
        self._routes.add(Registration(kind, name, backend, tuple(fallback)), replace=replace)

    def list(self) -> list[ModelInfo]:
        """The names callers may use."""
        return self._routes.listing()

    async def embed(
        self, texts: str | Sequence[str], *, opts: EmbedOpts | None = None, **options: Any
    ) -> Vectors:
        """One vector per text; `options` are the fields of `EmbedOpts`."""
        return (await self.embed_with_usage(texts, opts=opts, **options)).vectors

    async def embed_with_usage(
        self, texts: str | Sequence[str], *, opts: EmbedOpts | None = None, **options: Any
    ) -> EmbedResult:
        """As `embed`, with the tokens it took."""
        settings = _settings(EmbedOpts, opts, options)
        given = [texts] if isinstance(texts, str) else [*texts]
        call = self._call("embedding", "embed", settings, ["embed"])

        async def attempt(candidate: Candidate, recorder: Recorder) -> EmbedResult:
            backend = cast("Embeds", candidate.backend)
            result = await backend.embed(given, call.opts_for(candidate))
            if result.usage is None:
                result.usage = TokenUsage(embedding_tokens=sum(map(estimate_tokens, given)))
                recorder.call.usage_estimated = True
            recorder.count(result.usage)
            return result

        return await call.whole(attempt)

    async def generate(
        self, given: GenerateInput, *, opts: GenerateOpts | None = None, **options: Any
    ) -> GenerateResult:
        """A whole answer; `options` are the fields of `GenerateOpts`."""
        prompt, settings = _ask(given, opts, options)
        requires = _requires("generate", prompt, settings)
        call = self._call("generative", "generate", settings, requires)

        async def attempt(candidate: Candidate, recorder: Recorder) -> GenerateResult:
            result = await _answer(candidate.backend, prompt, call.opts_for(candidate))
            if result.usage is None:
                result.usage = recorder.estimate(prompt, estimate_tokens(result.content))
            recorder.count(result.usage)
            recorder.call.finish_reason = result.finish_reason
            return result

        return await call.whole(attempt)

    def generate_stream(
        self, given: GenerateInput, *, opts: GenerateOpts | None = None, **options: Any
    ) -> AsyncIterator[GenerateChunk]:
        """An answer piece by piece; an unknown model or a missing capability raises right here."""
        prompt, settings = _ask(given, opts, options)
        requires = _requires("stream", prompt, settings)
        return self._call("generative", "generateStream", settings, requires).stream(prompt)

    async def open(self) -> None:
        """Let every backend begin its own preparations; called once when the server starts."""
        await asyncio.gather(*(backend.open() for backend in self._backends()))

    async def close(self) -> None:
        """Let go of every backend's connections."""
        closing = (backend.close() for backend in self._backends())
        await asyncio.gather(*closing, return_exceptions=True)

    def _backends(self) -> Iterable[ModelBackend]:
        return {id(one.backend): one.backend for one in self._routes}.values()

    def _call(self, kind: Kind, method: Method, opts: Opts, requires: Sequence[Capability]) -> Call:
        call = Call(self._ledger, method, opts, current_caller.get() or Caller())
        call.resolve(lambda: self._routes.candidates(kind, opts.model, [*requires, *opts.requires]))
        return call


async def _answer(backend: ModelBackend, prompt: Prompt, opts: GenerateOpts) -> GenerateResult:
    """The backend's whole answer; one that only streams is drained."""
    if hasattr(backend, "generate"):
        return await cast("Generates", backend).generate(prompt, opts)
    assembly = Assembly()
    chunks = cast("Streams", backend).generate_stream(prompt, opts)
    try:
        async for chunk in chunks:
            assembly.add(chunk)
    finally:
        await aclose(chunks)
    return assembly.finish()


def _ask(
    given: GenerateInput, opts: GenerateOpts | None, options: dict[str, Any]
) -> tuple[Prompt, GenerateOpts]:
    if isinstance(given, Mapping):
        options = options if opts is not None else {**options_in(given), **options}
    settings = _settings(GenerateOpts, opts, options)
    if settings.tool_mode == "auto":
        message = "tool_mode 'auto' (running tools on the server) does not exist yet; use 'return'."
        raise NotImplementedYet(message, param="tool_mode")
    return to_prompt(given), settings


def _settings(kind: type[OptsType], opts: OptsType | None, options: dict[str, Any]) -> OptsType:
    if opts is None:
        return kind(**options)
    if options:
        message = f"give either opts= or keyword options, not both ({', '.join(options)})"
        raise TypeError(message)
    return opts


def _requires(base: Capability, prompt: Prompt, opts: GenerateOpts) -> list[Capability]:
    needs: list[Capability] = [base]
    if prompt.tools and opts.tool_choice != "none":
        needs.append("tools")
    if opts.response_format not in (None, "text"):
        needs.append("structured_output")
    if opts.logprobs:
        needs.append("logprobs")
    return needs
