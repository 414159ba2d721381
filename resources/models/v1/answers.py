"""harperpy's results in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
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

# Given only where a provider gave them.
_OF_THE_WHOLE = ("system_fingerprint", "service_tier", "moderation")
_OF_A_MESSAGE = ("reasoning_content", "annotations", "audio")


def completion(result: GenerateResult, request: ChatRequest) -> dict[str, Any]:
    """A `chat.completion` object."""
    functions = bool(request.functions)
    choices = [result, *result.others]
    body = {
        "id": completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model or "default",
        "choices": [_choice(at, one, functions=functions) for at, one in enumerate(choices)],
        "usage": openai_usage(result.usage or TokenUsage()),
    }
    return body | _told(result, _OF_THE_WHOLE)


def embedding_list(request: EmbeddingRequest, result: EmbedResult) -> dict[str, Any]:
    """OpenAI's list of embeddings, floats or base64 as asked."""
    encode = _base64 if request.encoding_format == "base64" else _floats
    tokens = result.usage.embedding_tokens or 0 if result.usage else 0
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result.vectors)
        ],
        "model": request.model or "default",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _choice(index: int, choice: Choice, *, functions: bool) -> dict[str, Any]:
    calls = choice.tool_calls or []
    silent = calls or choice.refusal or choice.audio
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.content or (None if silent else ""),
        "refusal": choice.refusal,
    }
    if calls and functions:
        message["function_call"] = openai_tool_call(calls[0])["function"]
    elif calls:
        message["tool_calls"] = [openai_tool_call(call) for call in calls]
    reason = openai_finish_reason(choice.finish_reason, calls=bool(calls), functions=functions)
    return {
        "index": index,
        "message": message | _told(choice, _OF_A_MESSAGE),
        "logprobs": openai_logprobs(choice),
        "finish_reason": reason,
    }


def _told(given: Choice, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(given, name)) is not None}


def _base64(vector: Sequence[float]) -> str:
    return vector.base64() if isinstance(vector, Vector) else base64_of(vector)


def _floats(vector: Sequence[float]) -> Any:
    """As they came, where they came so."""
    return msgspec.Raw(vector.json()) if isinstance(vector, Vector) else list(vector)
