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

_PLAIN = (
    "temperature",
    "top_p",
    "stop",
    "seed",
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
_SAID = ("name", "tool_call_id", "refusal", "reasoning_content", "audio")
_said_of = attrgetter(*_SAID)
_NOTHING = (None,) * len(_SAID)


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
    body |= {name: value for name in _PLAIN if (value := getattr(opts, name)) is not None}
    if opts.max_tokens is not None:
        body[limit_name] = opts.max_tokens
    if opts.response_format not in (None, "text"):
        body["response_format"] = _response_format(opts.response_format)
    if prompt.tools:
        _add_tools(body, prompt.tools, opts)
    if stream:
        body["stream_options"] = {"include_usage": True}
    return encoded(body)


def encoded(body: dict[str, Any]) -> bytes:
    """A body's JSON. Raises `InvalidBody` for one that is nested beyond what can be written."""
    try:
        return msgspec.json.encode(body)
    except RecursionError as error:
        message = "the body is nested too deeply"
        raise InvalidBody(message) from error


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.content == "" and (message.tool_calls or message.refusal or message.audio):
        body["content"] = None
    if message.tool_calls:
        body["tool_calls"] = [openai_tool_call(call) for call in message.tool_calls]
    if (said := _said_of(message)) != _NOTHING:
        given = zip(_SAID, said, strict=True)
        body.update((name, value) for name, value in given if value is not None)
    return body


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
