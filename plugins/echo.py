"""The `echo` backend: answers with the last user message, the same each time. For tests.

`call NAME {"json": "arguments"}` as last user message calls that tool, if it was offered.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from harperpy import (
    BackendFactory,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    InvalidBody,
    ModelBackend,
    ModelEntry,
    Prompt,
    TokenUsage,
    ToolCallDelta,
    estimate_tokens,
)

DIMENSIONS = 16
MOST_DIMENSIONS = 4096
_AT_ONCE = 1000
_WORD = re.compile(r"\s*\S+|\s+$")
_CALL = re.compile(r"\s*call\s+(?P<name>[\w-]+)\s*(?P<arguments>\{.*\})?\s*", re.DOTALL)


def register_model_backends(register: Callable[[str, BackendFactory], None]) -> None:
    """Offer the kind `echo`."""
    register("echo", Echo)


class Echo(ModelBackend):
    """Answers with what it was asked, word by word; embeds by hashing words."""

    name = "echo"
    tools = True

    def __init__(self, entry: ModelEntry) -> None:
        self.provider_model = entry.settings.model or "echo"

    async def embed(self, texts: list[str], opts: EmbedOpts) -> EmbedResult:
        """Unit vectors of 16 numbers, or as many as `dimensions` says; like texts lie near."""
        size = opts.dimensions or DIMENSIONS
        if size > MOST_DIMENSIONS:
            message = f"dimensions: expected at most {MOST_DIMENSIONS} for this model"
            raise InvalidBody(message, param="dimensions")
        tokens = sum(map(estimate_tokens, texts))
        vectors = [_vector(text, size) for text in texts]
        return EmbedResult(vectors=[*vectors], usage=TokenUsage(embedding_tokens=tokens))

    async def generate_stream(
        self, prompt: Prompt, opts: GenerateOpts
    ) -> AsyncIterator[GenerateChunk]:
        """One chunk a word, then the reason and the usage."""
        asked = sum(estimate_tokens(message.text) for message in prompt.messages)
        call = _tool_call(prompt, opts)
        said = "" if call else _before(prompt.text, opts.stop or ())
        reason: Literal["tool_calls", "stop", "length"] = "tool_calls" if call else "stop"
        told = 1 if call else 0
        if call:
            yield GenerateChunk(delta_tool_calls=[call])
        for word in _WORD.finditer(said):
            if told == opts.max_tokens:
                reason = "length"
                break
            told += 1
            if not told % _AT_ONCE:
                # A body may hold millions of them.
                await asyncio.sleep(0)
            yield GenerateChunk(delta_content=word[0])
        usage = TokenUsage(prompt_tokens=asked, completion_tokens=told)
        yield GenerateChunk(finish_reason=reason, usage=usage)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the words that end it."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def _tool_call(prompt: Prompt, opts: GenerateOpts) -> ToolCallDelta | None:
    """The call that the last user message or `tool_choice` asks for."""
    names = [tool.name for tool in prompt.tools]
    if not names or opts.tool_choice == "none" or prompt.messages[-1].role == "tool":
        return None
    asked = _CALL.fullmatch(prompt.text)
    name = asked["name"] if asked else None
    if opts.tool_choice in names:
        name = opts.tool_choice
    elif opts.tool_choice == "required" and name not in names:
        name = names[0]
    if name not in names:
        return None
    arguments = asked["arguments"] if asked else None
    digest = hashlib.sha256(prompt.text.encode()).hexdigest()
    return ToolCallDelta(index=0, id=f"call_{digest[:24]}", name=name, arguments=arguments or "{}")


def _vector(text: str, size: int) -> list[float]:
    sums = [0.0] * size
    for word in text.lower().split() or [text]:
        digest = hashlib.shake_128(word.encode()).digest(size)
        sums = [total + byte - 127.5 for total, byte in zip(sums, digest, strict=True)]
    length = math.sqrt(sum(number * number for number in sums)) or 1.0
    return [number / length for number in sums]
