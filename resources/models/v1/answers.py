"""harperpy's results in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec

from harperpy import (
    Choice,
    EmbedResult,
    GenerateResult,
    TokenUsage,
    Vector,
    base64_of,
    completion_id,
    openai_finish_reason,
    openai_logprobs,
    openai_tool_call,
    openai_usage,
)

from .schema import ChatRequest, EmbeddingRequest

# What few answers have besides text.
_RARER = (
    *("tool_calls", "refusal", "audio", "reasoning_content", "annotations"),
    *("reasoning_details", "logprobs", "refusal_logprobs"),
)
_rarer_of, _NOTHING_RARER = attrgetter(*_RARER), (None,) * len(_RARER)


class _Message(msgspec.Struct, omit_defaults=True, gc=False):
    """What was said. What has no default is always told, the rest where there is some."""

    role: str
    content: str | None
    refusal: str | None
    function_call: Any = None
    tool_calls: list[Any] | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    reasoning_details: list[Any] | None = None


class _Choice(msgspec.Struct, gc=False):
    """One answer."""

    index: int
    message: _Message
    logprobs: Any
    finish_reason: str


class _Completion(msgspec.Struct, omit_defaults=True, gc=False):
    """A whole completion; the last ones where a provider told them."""

    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: Any
    system_fingerprint: str | None = None
    service_tier: str | None = None
    moderation: dict[str, Any] | None = None


class _Embedding(msgspec.Struct, gc=False):
    """One vector."""

    object: str
    index: int
    embedding: Any


class _Embeddings(msgspec.Struct, gc=False):
    """All vectors, and what they cost."""

    object: str
    data: list[_Embedding]
    model: str
    usage: dict[str, int]


def completion(result: GenerateResult, request: ChatRequest) -> msgspec.Struct:
    """A `chat.completion` object."""
    choices = [_choice(0, result, request)]
    if result.others:
        choices += [_choice(at, other, request) for at, other in enumerate(result.others, 1)]
    return _Completion(
        completion_id(),
        "chat.completion",
        int(time.time()),
        request.model or "default",
        choices,
        openai_usage(result.usage or TokenUsage()),
        result.system_fingerprint,
        result.service_tier,
        result.moderation,
    )


def embedding_list(request: EmbeddingRequest, result: EmbedResult) -> msgspec.Struct:
    """OpenAI's list of embeddings, floats or base64 as asked."""
    encode = _base64 if request.encoding_format == "base64" else _floats
    tokens = result.usage.embedding_tokens or 0 if result.usage else 0
    return _Embeddings(
        "list",
        [
            _Embedding("embedding", index, encode(vector))
            for index, vector in enumerate(result.vectors)
        ],
        request.model or "default",
        {"prompt_tokens": tokens, "total_tokens": tokens},
    )


def _choice(index: int, choice: Choice, request: ChatRequest) -> _Choice:
    if _rarer_of(choice) == _NOTHING_RARER:
        reason = openai_finish_reason(choice.finish_reason, calls=False)
        return _Choice(index, _Message("assistant", choice.content or "", None), None, reason)
    calls, functions = choice.tool_calls, bool(request.functions)
    wordless = calls or choice.refusal or choice.audio
    message = _Message(
        "assistant",
        choice.content or (None if wordless else ""),
        choice.refusal,
        reasoning_content=choice.reasoning_content,
        annotations=choice.annotations,
        audio=choice.audio,
        reasoning_details=choice.reasoning_details,
    )
    if calls and functions:
        message.function_call = openai_tool_call(calls[0])["function"]
    elif calls:
        message.tool_calls = [openai_tool_call(call) for call in calls]
    reason = openai_finish_reason(choice.finish_reason, calls=bool(calls), functions=functions)
    return _Choice(index, message, openai_logprobs(choice), reason)


def _base64(vector: Sequence[float]) -> str:
    return vector.base64() if isinstance(vector, Vector) else base64_of(vector)


def _floats(vector: Sequence[float]) -> Any:
    """As they came, where they came so."""
    return msgspec.Raw(vector.json()) if isinstance(vector, Vector) else list(vector)
