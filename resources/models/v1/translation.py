"""OpenAI's chat request as harperpy's prompt and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from harperpy import (
    GenerateOpts,
    InvalidBody,
    JSONSchemaFormat,
    Message,
    Prompt,
    ToolCall,
    ToolDef,
    paired,
)

from .schema import (
    AllowedToolsChoice,
    AssistantMessageIn,
    ChatRequest,
    CustomChoice,
    CustomToolCallIn,
    DeveloperMessageIn,
    FunctionChoice,
    FunctionIn,
    FunctionMessageIn,
    FunctionToolCallIn,
    FunctionToolIn,
    MessageIn,
    Named,
    ResponseFormatIn,
    SystemMessageIn,
    ToolIn,
    ToolMessageIn,
    UserMessageIn,
)

# Without effect on the answer, by their own contract, as is `user`: a provider may want them for
# its books.
_RARE_LABELS = (
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
)
# Options that few requests have, and are told as they are.
_AS_THEY_ARE = (
    "presence_penalty",
    "frequency_penalty",
    "parallel_tool_calls",
    "logprobs",
    "top_logprobs",
    "n",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "modalities",
    "web_search_options",
    "moderation",
    "service_tier",
    "store",
)
_COMMON = ChatRequest.__struct_fields__.index("tools")
_NOTHING_RARE = (None,) * len(ChatRequest.__struct_fields__[_COMMON:])
# Who says text, and parts of messages, and nothing else.
_SPEAKERS: dict[type, Any] = {
    SystemMessageIn: "system",
    DeveloperMessageIn: "developer",
    UserMessageIn: "user",
}


def to_prompt(request: ChatRequest) -> Prompt:
    """The messages and tools of a request. Raises `InvalidBody` for calls without their results."""
    messages = request.messages
    if not (request.tools or request.functions) and (spoken := _spoken(messages)):
        return Prompt(messages=spoken)
    _check_calls(messages)
    tools = [_tool(tool) for tool in request.tools or ()]
    tools += [_function(function) for function in request.functions or ()]
    return Prompt(messages=paired(map(_message, messages)), tools=tools)


def to_opts(request: ChatRequest, extra: Mapping[str, Any]) -> GenerateOpts:
    """The options of a request; `extra` fields go to the provider as they are.

    Raises `InvalidBody` for combinations that make no sense.
    """
    opts = GenerateOpts(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop,
        seed=request.seed,
    )
    if request.stream_options and not request.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise InvalidBody(message, param="stream_options")
    if request.user is not None:
        opts.provider_options["user"] = request.user
    if msgspec.structs.astuple(request)[_COMMON:] != _NOTHING_RARE:
        _add_rare(opts, request)
    if extra:
        opts.provider_options = {**extra, **opts.provider_options}
    return opts


def _add_rare(opts: GenerateOpts, request: ChatRequest) -> None:
    _check_together(request)
    for name in _AS_THEY_ARE:
        setattr(opts, name, getattr(request, name))
    for name in _RARE_LABELS:
        if (label := getattr(request, name)) is not None:
            opts.provider_options[name] = label
    opts.response_format = _response_format(request.response_format)
    if request.audio is not None:
        opts.audio = msgspec.to_builtins(request.audio)
    if request.prediction is not None:
        opts.prediction = msgspec.to_builtins(request.prediction)
    if request.tools or request.functions or request.tool_choice or request.function_call:
        _choose(opts, request)


def _spoken(messages: Sequence[Any]) -> list[Message]:
    """As `_message` of each, where all of them are nothing but said; none otherwise."""
    told: list[Message] = []
    for message in messages:
        role = _SPEAKERS.get(message.__class__)
        if role is None:
            return []
        told.append(Message(role=role, content=message.content or "", name=message.name))
    return told


def _message(message: MessageIn) -> Message:
    role: Any = message.__struct_config__.tag
    told = Message(role=role, content=message.content or "")
    if isinstance(message, ToolMessageIn):
        told.tool_call_id = message.tool_call_id
        return told
    if message.name is not None:
        told.name = message.name
    if isinstance(message, AssistantMessageIn):
        calls = [_call(call) for call in message.tool_calls or ()]
        if message.function_call is not None:
            # Without an id: the old protocol had none.
            old = message.function_call
            calls.append(ToolCall(id="", name=old.name, arguments=old.arguments))
        told.tool_calls = calls or None
        for field in ("refusal", "audio", "reasoning_content", "reasoning_details"):
            setattr(told, field, getattr(message, field))
    return told


def _call(call: FunctionToolCallIn | CustomToolCallIn) -> ToolCall:
    if isinstance(call, CustomToolCallIn):
        custom = call.custom
        return ToolCall(id=call.id, type="custom", name=custom.name, arguments=custom.input)
    return ToolCall(
        id=call.id,
        name=call.function.name,
        arguments=call.function.arguments,
        extra_content=call.extra_content,
    )


def _tool(tool: ToolIn) -> ToolDef:
    if isinstance(tool, FunctionToolIn):
        return _function(tool.function)
    custom = tool.custom
    description = custom.description or ""
    return ToolDef(type="custom", name=custom.name, description=description, format=custom.format)


def _function(function: FunctionIn) -> ToolDef:
    return ToolDef(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or {},
        strict=function.strict,
    )


def _choose(opts: GenerateOpts, request: ChatRequest) -> None:
    """Set the choice of tools. Raises `InvalidBody` for a tool that is not there."""
    old = request.tool_choice is None
    choice = request.function_call if old else request.tool_choice
    path = "function_call" if old else "tool_choice"
    names = _names(request)
    if choice is not None and not names:
        tools = "functions" if old else "tools"
        message = f"The '{path}' parameter is only allowed when '{tools}' are specified."
        raise InvalidBody(message, param=path)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        for at, tool in enumerate(allowed.tools):
            _check_known(tool, names, f"tool_choice.allowed_tools.tools[{at}]")
        opts.tool_choice = allowed.mode
        opts.allowed_tools = [_chosen(tool) for tool in allowed.tools]
    elif choice is None or isinstance(choice, str):
        opts.tool_choice = choice
    else:
        _check_known(choice, names, path)
        opts.tool_choice = _chosen(choice)


def _chosen(choice: FunctionChoice | CustomChoice | Named) -> str:
    if isinstance(choice, Named):
        return choice.name
    return choice.function.name if isinstance(choice, FunctionChoice) else choice.custom.name


def _check_known(
    choice: FunctionChoice | CustomChoice | Named, names: dict[str, str], path: str
) -> None:
    name = _chosen(choice)
    if name not in names:
        message = f"Invalid value for '{path}': {name!r} is not the name of one of the tools."
        raise InvalidBody(message, param=path)


def _names(request: ChatRequest) -> dict[str, str]:
    """The names of all tools, and where each stands. Raises `InvalidBody` for one given twice."""
    names: dict[str, str] = {}
    for at, tool in enumerate(request.tools or ()):
        kind = "function" if isinstance(tool, FunctionToolIn) else "custom"
        _add_name(names, getattr(tool, kind).name, f"tools[{at}].{kind}.name")
    for at, function in enumerate(request.functions or ()):
        _add_name(names, function.name, f"functions[{at}].name")
    return names


def _add_name(names: dict[str, str], name: str, path: str) -> None:
    if name in names:
        message = f"Invalid '{path}': {name!r} is the name of another tool too, {names[name]}."
        raise InvalidBody(message, param=path, code="invalid_value")
    names[name] = path


def _response_format(given: ResponseFormatIn | None) -> Any:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return "json"
    if given.json_schema is None:
        path = "response_format.json_schema"
        message = f"Missing required parameter: '{path}'."
        raise InvalidBody(message, param=path, code="missing_required_parameter")
    wanted = given.json_schema
    return JSONSchemaFormat(
        schema=wanted.schema or {},
        name=wanted.name,
        description=wanted.description,
        strict=wanted.strict,
    )


def _check_together(request: ChatRequest) -> None:
    """Parameters that are only allowed beside others, or instead of them."""
    if request.top_logprobs is not None and not request.logprobs:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise InvalidBody(message, param="top_logprobs")
    if request.parallel_tool_calls is not None and not request.tools:
        message = "The 'parallel_tool_calls' parameter is only allowed when 'tools' are specified."
        raise InvalidBody(message, param="parallel_tool_calls")
    if request.tools and request.functions:
        message = "The 'functions' parameter is not allowed beside 'tools', which replaced it."
        raise InvalidBody(message, param="functions")
    if request.modalities and "audio" in request.modalities and request.audio is None:
        message = "The 'audio' parameter is required when 'modalities' asks for audio."
        raise InvalidBody(message, param="audio", code="missing_required_parameter")


def _check_calls(messages: list[MessageIn]) -> None:
    """Each result of a tool answers a call right before it, and each call is answered."""
    waiting: dict[str, str] = {}
    called: set[str] = set()
    has_function_call = False
    for at, message in enumerate(messages):
        if isinstance(message, ToolMessageIn):
            _check_result(message, f"messages[{at}]", called)
            waiting.pop(message.tool_call_id, None)
            continue
        if waiting:
            raise _not_answered(waiting)
        called.clear()
        if isinstance(message, AssistantMessageIn):
            called.update(call.id for call in message.tool_calls or ())
            waiting = dict.fromkeys(called, f"messages[{at}]")
            has_function_call = has_function_call or message.function_call is not None
        elif isinstance(message, FunctionMessageIn) and not has_function_call:
            raise _no_response(message, f"messages[{at}]")
    if waiting:
        raise _not_answered(waiting)


def _check_result(message: ToolMessageIn, path: str, called: set[str]) -> None:
    if not called:
        raise _no_response(message, path)
    if message.tool_call_id not in called:
        told = (
            f"Invalid parameter: 'tool_call_id' of {message.tool_call_id!r} not found in "
            "'tool_calls' of the preceding message."
        )
        raise InvalidBody(told, param=f"{path}.tool_call_id")


def _no_response(message: ToolMessageIn | FunctionMessageIn, path: str) -> InvalidBody:
    role = message.__struct_config__.tag
    calls = "tool_calls" if role == "tool" else "function_call"
    told = (
        f"Invalid parameter: messages with role '{role}' must be a response to a preceding "
        f"message with '{calls}'."
    )
    return InvalidBody(told, param=f"{path}.role")


def _not_answered(waiting: dict[str, str]) -> InvalidBody:
    call, path = next(iter(waiting.items()))
    told = (
        "An assistant message with 'tool_calls' must be followed by tool messages responding "
        f"to each 'tool_call_id'. {call!r} has no response."
    )
    return InvalidBody(told, param=f"{path}.tool_calls")
