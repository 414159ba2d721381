"""The `local` backend: a small demo model on this machine, no key and no service needed.

Chat is SmolLM2-135M-Instruct (or `modelFile`) in a child process; embeddings are
all-MiniLM-L6-v2. Both are for trying things out: name a real provider for real work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from harperpy import (
    BackendError,
    BackendFactory,
    BackendTimeout,
    Batched,
    Capability,
    ClientError,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    ModelBackend,
    ModelEntry,
    NoParameters,
    NotFound,
    Prompt,
    Scope,
    TokenUsage,
    ToolCallDelta,
    ToolDef,
    UpstreamRejected,
)

from .llama_child import unavailable
from .local_runner import SLOTS, Runner
from .local_tools import needs_schema, read_call, with_schema, without_tool_turns
from .minilm import MiniLM
from .openai_protocol import chat_body
from .weights import CATALOGUE, SMOLLM2, Cache, Source, user_cache

logger = logging.getLogger("harperpy.plugins.local")

DEMO = "a small demo model, often wrong"
_QUEUE = 16
_MOST_TOKENS = 512
# By others of its own llama.cpp ends, is busy for minutes, or answers at length.
_PASSED_ON = frozenset({"top_k", "min_p", "typical_p", "repeat_penalty"})


def register_model_backends(register: Callable[[str, BackendFactory], None]) -> None:
    """Offer the kind `local`; entries and servers of one data folder share a file's process."""
    runners: dict[str, Runner] = {}

    def make(entry: ModelEntry) -> ModelBackend:
        if entry.kind == "embedding":
            return LocalEmbeddings(entry.processors)
        key = entry.settings.model_file or SMOLLM2.name
        return LocalChat(entry, runners.setdefault(key, Runner(entry)))

    register("local", make)


def handle_application(scope: Scope) -> None:
    """Add the operations on the model files in the user's cache."""
    files = ModelFiles(Cache(user_cache(os.environ)))
    scope.operations.add("list_model_files", files.list, NoParameters, reads=True)
    scope.operations.add("pull_model_file", files.pull, NamedFile)
    scope.operations.add("remove_model_file", files.remove, NamedFile)


class NamedFile(msgspec.Struct, forbid_unknown_fields=True):
    """A model file by its model's name."""

    name: str = SMOLLM2.name


class ModelFiles:
    """The model files that can be fetched."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def list(self) -> list[dict[str, Any]]:
        """What can be fetched, and whether it is there."""
        return [
            {
                "name": source.name,
                "fetched": await asyncio.to_thread(self._cache.holds, source),
                "path": str(self._cache.path(source)),
                "size": source.size,
                "licence": source.licence,
                "source": source.requirement,
            }
            for source in CATALOGUE
        ]

    async def pull(self, request: NamedFile) -> str:
        """Fetch a file, unless it is there."""
        source = _source(request.name)
        if await asyncio.to_thread(self._cache.holds, source):
            return f"{source.name} is there already: {self._cache.path(source)}"
        logger.warning("%s", source.notice)
        stop = threading.Event()
        try:
            path = await asyncio.to_thread(self._cache.fetch, source, _say, stop)
        finally:
            stop.set()
        return f"{source.name} is fetched: {path}"

    async def remove(self, request: NamedFile) -> str:
        """Delete a file."""
        source = _source(request.name)
        found = await asyncio.to_thread(self._cache.remove, source)
        return f"{source.name} is removed" if found else f"{source.name} was not there"


def _say(percent: int) -> None:
    logger.warning("fetching: %d %%", percent)


def _source(name: str) -> Source:
    for source in CATALOGUE:
        if source.name == name:
            return source
    known = ", ".join(source.name for source in CATALOGUE)
    message = f"name: expected one of {known}, got {name!r}"
    raise NotFound(message, param="name")


class LocalEmbeddings(ModelBackend):
    """all-MiniLM-L6-v2 on onnxruntime: 384 floats, normalised."""

    name = "local"
    provider_model = "all-minilm-l6-v2"

    def __init__(self, processors: tuple[int, ...] = ()) -> None:
        self._model = MiniLM(processors=processors)

    @property
    def state(self) -> str:  # type: ignore[override]  # a backend's own is read, never set
        """`ready`, or what is missing and the command that mends it."""
        return self._model.state

    async def embed(self, texts: list[str], opts: EmbedOpts) -> EmbedResult:
        """Unit vectors and the tokens the model saw. Raises `ModelUnavailable`."""
        if opts.dimensions not in (None, 384):
            message = f"dimensions: {self.provider_model} makes 384, got {opts.dimensions}"
            raise ClientError(message, param="dimensions")
        vectors, tokens = await self._model.embed(texts)
        return EmbedResult(vectors=[*vectors], usage=TokenUsage(embedding_tokens=tokens))

    async def close(self) -> None:
        """Let go of the model and its thread."""
        await self._model.close()


class LocalChat(ModelBackend):
    """Chat on the local model, as a provider would answer it."""

    name = "local"
    tools = True
    structured_output = True
    logprobs = True
    features = frozenset[Capability]({"logit_bias"})
    max_retries = 2
    about = DEMO

    def __init__(self, entry: ModelEntry, runner: Runner) -> None:
        self._runner = runner
        self.provider_model = entry.settings.model or runner.name

    @property
    def state(self) -> str:  # type: ignore[override]  # a backend's own is read, never set
        """`ready`, or what is missing and the command that mends it."""
        return self._runner.state

    async def open(self) -> None:
        """Start fetching and loading; nobody waits for it."""
        self._runner.open()

    async def close(self) -> None:
        """End the child."""
        await self._runner.close()

    async def generate_stream(
        self, prompt: Prompt, opts: GenerateOpts
    ) -> AsyncIterator[GenerateChunk]:
        """An answer as it comes. Raises `ModelUnavailable`, and 429 when too many wait."""
        schema = needs_schema(prompt, opts)
        tools = prompt.tools
        prompt = without_tool_turns(prompt)
        if schema:
            prompt, opts = with_schema(Prompt(messages=prompt.messages, tools=tools), opts)
        async with self._slot():
            transport = await self._runner.ready()
            told = transport.chunks("/chat/completions", self._body(prompt, opts))
            chunks = _told(told, self._runner.look)
            if schema:
                chunks = _as_calls(chunks, tools)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    def _body(self, prompt: Prompt, opts: GenerateOpts) -> bytes:
        own = {name: told for name, told in opts.provider_options.items() if name in _PASSED_ON}
        # Without the last one llama.cpp does not notice who leaves while it reads the prompt.
        defaults = {"temperature": 0, "max_tokens": _MOST_TOKENS, "return_progress": True}
        opts.provider_options = {**own, **defaults}
        opts.model = self._runner.name
        return chat_body(prompt, opts, "max_tokens", stream=True, usage=True)

    @asynccontextmanager
    async def _slot(self) -> AsyncGenerator[None]:
        """A place among those served at once; a bounded number waits for one."""
        runner = self._runner
        if runner.waiting >= _QUEUE:
            message = f"The local model serves {SLOTS} calls at once and {_QUEUE} wait already."
            headers = {"Retry-After": "2"}
            raise ClientError(message, status=429, code="rate_limit_exceeded", headers=headers)
        runner.waiting += 1
        try:
            await runner.slots.acquire()
        finally:
            runner.waiting -= 1
        try:
            yield
        finally:
            runner.slots.release()


async def _told(
    chunks: Batched[GenerateChunk], look: Callable[[], None]
) -> AsyncGenerator[GenerateChunk]:
    """The child's failures in the words of a model that runs here; `look` finds the next one."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except UpstreamRejected as error:
        raise _rejected(error) from error
    except BackendTimeout:
        raise
    except BackendError as error:
        look()
        message = "The local model's process ended during the call; it is being started again."
        gone = unavailable(message)
        # Nobody was there to take the call: the next try waits for the new process.
        gone.retryable, gone.retry_after = error.retryable, None
        raise gone from error


def _rejected(error: UpstreamRejected) -> ClientError:
    if error.type == "exceed_context_size_error":
        message = f"This model's context is too small for the messages: {error}"
        return ClientError(message, code="context_length_exceeded", param="messages")
    return error


async def _as_calls(
    chunks: AsyncGenerator[GenerateChunk], tools: list[ToolDef]
) -> AsyncGenerator[GenerateChunk]:
    """The JSON that the schema made the model write, as the tool call it stands for."""
    text: list[str] = []
    last = GenerateChunk()
    async with aclosing(chunks):
        async for chunk in chunks:
            text.append(chunk.delta_content or "")
            last.finish_reason = chunk.finish_reason or last.finish_reason
            last.usage = chunk.usage or last.usage
    answer = read_call("".join(text), tools)
    if isinstance(answer, ToolCallDelta):
        answer.id = f"call_{os.urandom(12).hex()}"
        yield GenerateChunk(delta_tool_calls=[answer])
        last.finish_reason = "tool_calls"
    elif answer:
        yield GenerateChunk(delta_content=answer)
    yield last
