"""What is said to an OpenAI-compatible provider."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import msgspec

from harperpy import (
    GenerateOpts,
    InvalidBody,
    JSONSchemaFormat,
    Message,
    Prompt,
    ToolDef,
    ToolType,
    openai_tool_call,
)

# Options that are told as they are, and those of them that few calls have.
_RARE = (
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
    "n",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "modalities",
    "audio",
    "prediction",
    "web_search_options",
    "moderation",
    "service_tier",
    "store",
)
_rare_of = attrgetter(*_RARE, "response_format")
_NOTHING_RARE = (None,) * (len(_RARE) + 1)
_encode = msgspec.json.Encoder().encode


class _Message(msgspec.Struct, omit_defaults=True, gc=False):
    """One turn as it is told."""

    role: str
    content: Any
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: dict[str, Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None


def chat_body(
    prompt: Prompt, opts: GenerateOpts, *, model: str | None, limit_name: str, stream: bool
) -> bytes:
    """The body of a chat request; `limit_name` is what the provider calls `max_tokens`."""
    body: dict[str, Any] = {
        **opts.provider_options,
        "messages": [_message(message) for message in prompt.messages],
        "stream": stream,
    }
    if model:
        body["model"] = model
    if opts.temperature is not None:
        body["temperature"] = opts.temperature
    if opts.top_p is not None:
        body["top_p"] = opts.top_p
    if opts.stop is not None:
        body["stop"] = opts.stop
    if opts.seed is not None:
        body["seed"] = opts.seed
    if opts.max_tokens is not None:
        body[limit_name] = opts.max_tokens
    if _rare_of(opts) != _NOTHING_RARE:
        _add_rare(body, opts)
    if prompt.tools:
        _add_tools(body, prompt.tools, opts)
    if stream:
        body["stream_options"] = {"include_usage": True}
    return encoded(body)


def encoded(body: dict[str, Any]) -> bytes:
    """A body's JSON. Raises `InvalidBody` for one that is nested beyond what can be written."""
    try:
        return _encode(body)
    except RecursionError as error:
        message = "the body is nested too deeply"
        raise InvalidBody(message) from error


def _message(message: Message) -> _Message:
    content: Any = message.content
    if content == "" and (message.tool_calls or message.refusal or message.audio):
        content = None
    told = _Message(
        message.role,
        content,
        message.name,
        message.tool_call_id,
        message.refusal,
        message.reasoning_content,
        message.audio,
    )
    if message.tool_calls:
        told.tool_calls = [openai_tool_call(call) for call in message.tool_calls]
    return told


def _add_rare(body: dict[str, Any], opts: GenerateOpts) -> None:
    for name in _RARE:
        if (value := getattr(opts, name)) is not None:
            body[name] = value
    if opts.response_format not in (None, "text"):
        body["response_format"] = _response_format(opts.response_format)


def _add_tools(body: dict[str, Any], tools: list[ToolDef], opts: GenerateOpts) -> None:
    body["tools"] = [_tool(tool) for tool in tools]
    kinds: dict[str, ToolType] = {tool.name: tool.type for tool in tools}
    if (choice := opts.tool_choice) is not None:
        body["tool_choice"] = _named(choice, kinds[choice]) if choice in kinds else choice
    if opts.allowed_tools is not None and opts.tool_choice in ("auto", "required"):
        allowed = [_named(name, kinds[name]) for name in opts.allowed_tools if name in kinds]
        told = {"mode": opts.tool_choice, "tools": allowed}
        body["tool_choice"] = {"type": "allowed_tools", "allowed_tools": told}
    if opts.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = opts.parallel_tool_calls


def _named(name: str, kind: ToolType) -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


def _tool(tool: ToolDef) -> dict[str, Any]:
    told: dict[str, Any] = {"name": tool.name}
    if tool.parameters:
        told["parameters"] = tool.parameters
    if tool.description:
        told["description"] = tool.description
    for name in ("strict", "format"):
        if (value := getattr(tool, name)) is not None:
            told[name] = value
    return {"type": tool.type, tool.type: told}


def _response_format(wanted: Any) -> dict[str, Any]:
    if not isinstance(wanted, JSONSchemaFormat):
        return {"type": "json_object"}
    schema: dict[str, Any] = {"name": wanted.name}
    if wanted.schema:
        schema["schema"] = wanted.schema
    if wanted.description:
        schema["description"] = wanted.description
    if wanted.strict is not None:
        schema["strict"] = wanted.strict
    return {"type": "json_schema", "json_schema": schema}
