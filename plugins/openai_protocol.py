"""What is said to an OpenAI-compatible provider."""

from __future__ import annotations

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
    reasoning_details: list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Chat(msgspec.Struct, omit_defaults=True, gc=False):
    """A request for an answer. What has no default is always told, the rest where there is some."""

    messages: list[_Message]
    stream: bool
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: Any = msgspec.UNSET


def chat_body(
    prompt: Prompt,
    opts: GenerateOpts,
    limit_name: str,
    *,
    stream: bool = False,
    usage: bool = False,
) -> bytes:
    """The body of a chat request; `limit_name` is what the provider calls `max_tokens`.

    A stream is to tell its `usage`.
    """
    # By position: with names it takes twice as long as all of the rest.
    body = _Chat(
        [*map(_message, prompt.messages)],
        stream,
        opts.model or None,
        opts.temperature,
        opts.top_p,
        opts.max_tokens,
        opts.stop,
        opts.seed,
        opts.presence_penalty,
        opts.frequency_penalty,
        opts.logprobs,
        opts.top_logprobs,
        opts.n,
        opts.logit_bias,
        opts.reasoning_effort,
        opts.verbosity,
        opts.modalities,
        opts.audio,
        opts.prediction,
        opts.web_search_options,
        opts.moderation,
        opts.service_tier,
        opts.store,
    )
    if limit_name == "max_completion_tokens":
        body.max_tokens, body.max_completion_tokens = None, opts.max_tokens
    if opts.response_format is not None and opts.response_format != "text":
        body.response_format = _response_format(opts.response_format)
    if prompt.tools:
        _add_tools(body, prompt.tools, opts)
    if usage:
        body.stream_options = {"include_usage": True}
    if options := opts.provider_options:
        if len(options) > 1 or "user" not in options:
            return _with(options, body)
        # Many give nothing else.
        body.user = options["user"]
    return encoded(body)


def _with(options: dict[str, Any], body: _Chat) -> bytes:
    """The body with options of the provider's own, where it has none of that name."""
    told = msgspec.structs.asdict(body).items()
    own = {name: value for name, value in told if value is not None and name != "user"}
    return encoded({**options, **own})


def encoded(body: Any) -> bytes:
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
        message.reasoning_details,
    )
    if message.tool_calls:
        told.tool_calls = [openai_tool_call(call) for call in message.tool_calls]
    return told


def _add_tools(body: _Chat, tools: list[ToolDef], opts: GenerateOpts) -> None:
    body.tools = [_tool(tool) for tool in tools]
    kinds: dict[str, ToolType] = {tool.name: tool.type for tool in tools}
    if (choice := opts.tool_choice) is not None:
        body.tool_choice = _named(choice, kinds[choice]) if choice in kinds else choice
    if opts.allowed_tools is not None and opts.tool_choice in ("auto", "required"):
        allowed = [_named(name, kinds[name]) for name in opts.allowed_tools if name in kinds]
        told = {"mode": opts.tool_choice, "tools": allowed}
        body.tool_choice = {"type": "allowed_tools", "allowed_tools": told}
    body.parallel_tool_calls = opts.parallel_tool_calls


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
