"""OpenAI's shapes into harperpy's and back."""

from __future__ import annotations

import sys
import time
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from harperpy import (
    CapabilityError,
    ContentPart,
    EmbedResult,
    GenerateOpts,
    GenerateResult,
    InvalidBody,
    JSONSchemaFormat,
    Message,
    Prompt,
    TokenUsage,
    ToolCall,
    ToolDef,
    completion_id,
    openai_logprobs,
    openai_usage,
)

from .schema import (
    ChatRequest,
    ContentPartIn,
    EmbeddingRequest,
    MessageIn,
    NamedToolChoice,
    ResponseFormatIn,
    ToolIn,
)

_REFUSED = ("audio", "functions", "function_call", "web_search_options")


def to_prompt(request: ChatRequest) -> Prompt:
    """The messages and tools of a request."""
    return Prompt(
        messages=[_message(message) for message in request.messages],
        tools=[_tool(tool) for tool in request.tools or ()],
    )


def to_opts(request: ChatRequest, extra: Mapping[str, Any]) -> GenerateOpts:
    """The options of a request; `extra` fields go to the provider as they are.

    Raises `CapabilityError` for parameters that nothing here honours yet, `InvalidBody` for
    combinations that make no sense.
    """
    _refuse_unsupported(request)
    if request.stream_options and not request.stream:
        message = "stream_options: only allowed when 'stream' is true"
        raise InvalidBody(message, param="stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        message = "top_logprobs: only allowed when 'logprobs' is true"
        raise InvalidBody(message, param="top_logprobs")
    return GenerateOpts(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop,
        seed=request.seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        response_format=_response_format(request.response_format),
        tool_mode="return",
        tool_choice=_tool_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        provider_options=dict(extra),
    )


def completion(result: GenerateResult, model: str | None) -> dict[str, Any]:
    """A `chat.completion` object."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": result.content or (None if result.tool_calls or result.refusal else ""),
        "refusal": result.refusal,
    }
    if result.tool_calls:
        message["tool_calls"] = [_call(call) for call in result.tool_calls]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": openai_logprobs(result.logprobs),
        "finish_reason": result.finish_reason,
    }
    return {
        "id": completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model or "default",
        "choices": [choice],
        "usage": openai_usage(result.usage or TokenUsage()),
    }


def texts(request: EmbeddingRequest) -> list[str]:
    """The texts to embed. Raises `CapabilityError` for arrays of token numbers."""
    given = [request.input] if isinstance(request.input, str) else request.input
    found = [text for text in given if isinstance(text, str)]
    if len(found) != len(given):
        message = "input: arrays of token numbers are not supported, send text"
        raise CapabilityError(message, param="input")
    return found


def embedding_list(request: EmbeddingRequest, result: EmbedResult) -> dict[str, Any]:
    """OpenAI's list of embeddings, floats or base64 as asked."""
    encode = _base64 if request.encoding_format == "base64" else list
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


def _message(message: MessageIn) -> Message:
    content = message.content or ""
    return Message(
        role=message.role,
        content=content if isinstance(content, str) else [_part(part) for part in content],
        name=message.name,
        tool_calls=[
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ]
        or None,
        tool_call_id=message.tool_call_id,
        refusal=message.refusal,
    )


def _part(part: ContentPartIn) -> ContentPart:
    return ContentPart(type=part.type, text=part.text, data=msgspec.to_builtins(part))


def _tool(tool: ToolIn) -> ToolDef:
    function = tool.function
    return ToolDef(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or {},
        strict=function.strict,
    )


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_text()}
    return {"id": call.id, "type": "function", "function": function}


def _tool_choice(request: ChatRequest) -> str | None:
    """The choice as a word or a tool's name. Raises `InvalidBody` for a tool that is not there."""
    choice = request.tool_choice
    names = {tool.function.name for tool in request.tools or ()}
    if choice == "required" and not names:
        message = "tool_choice: 'required' is only allowed with tools"
        raise InvalidBody(message, param="tool_choice")
    if not isinstance(choice, NamedToolChoice):
        return choice
    name = choice.function.name
    if name not in names:
        message = f"tool_choice: {name!r} is not the name of one of the tools"
        raise InvalidBody(message, param="tool_choice")
    return name


def _response_format(given: ResponseFormatIn | None) -> Any:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return "json"
    if given.json_schema is None:
        message = "response_format.json_schema: required when type is 'json_schema'"
        raise InvalidBody(message, param="response_format.json_schema")
    wanted = given.json_schema
    return JSONSchemaFormat(
        schema=wanted.schema or {},
        name=wanted.name,
        description=wanted.description,
        strict=wanted.strict,
    )


def _refuse_unsupported(request: ChatRequest) -> None:
    """A parameter that would change the answer is honoured or refused, never ignored."""
    asked = [name for name in _REFUSED if getattr(request, name) is not None]
    if request.n not in (None, 1):
        asked.append("n")
    if request.modalities and "audio" in request.modalities:
        asked.append("modalities")
    if asked:
        message = f"Unsupported parameter: '{asked[0]}' is not supported with this model."
        raise CapabilityError(message, param=asked[0])


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32s, as OpenAI's clients read them."""
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()
