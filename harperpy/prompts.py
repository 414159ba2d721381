"""What callers ask with, read: a text, messages, or an OpenAI body as a dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, TypeVar

import msgspec

from .errors import InvalidBody
from .messages import (
    GenerateInput,
    JSONSchemaFormat,
    Message,
    Prompt,
    ResponseFormat,
    ToolDef,
)

T = TypeVar("T")


def to_prompt(given: GenerateInput) -> Prompt:
    """Read a str, a list of messages, or `{messages, tools?, system?}` (an OpenAI body will do).

    Raises `InvalidBody` with the path of what does not fit.
    """
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        return Prompt(messages=[Message(role="user", content=given)])
    if isinstance(given, Mapping):
        messages = [_message(item, at) for at, item in _numbered(given.get("messages"), "messages")]
        if system := given.get("system"):
            said = {"role": "system", "content": system}
            messages.insert(0, _convert(said, Message, "system"))
        tools = [_tool(item, f"tools[{at}]") for at, item in _numbered(given.get("tools"), "tools")]
        for at, item in _numbered(given.get("functions"), "functions"):
            tools.append(_tool(item, f"functions[{at}]"))
    else:
        messages, tools = [_message(item, at) for at, item in _numbered(given, "messages")], []
    if not messages:
        message = "messages: expected at least one message"
        raise InvalidBody(message, param="messages")
    return Prompt(messages=paired(messages), tools=tools)


def paired(messages: Iterable[Message]) -> list[Message]:
    """The messages with function calls of the old protocol, which have no id, as tool calls."""
    last = ""
    found: list[Message] = []
    for at, message in enumerate(messages):
        for call in message.tool_calls or ():
            if not call.id:
                call.id = last = f"call_{at}"
        if message.role == "function":
            message = msgspec.structs.replace(  # noqa: PLW2901
                message, role="tool", tool_call_id=last, name=None
            )
        found.append(message)
    return found


def _numbered(items: Any, path: str) -> Iterable[tuple[int, Any]]:
    if isinstance(items, str | Mapping) or not isinstance(items or (), Iterable):
        message = f"{path}: expected an array"
        raise InvalidBody(message, param=path)
    return enumerate(items or ())


def _message(item: Any, at: int) -> Message:
    if isinstance(item, Message):
        return item
    if not _is_object(item):
        message = f"messages[{at}]: expected an object with role and content"
        raise InvalidBody(message, param=f"messages[{at}]")
    fields: dict[str, Any] = {key: value for key, value in item.items() if value is not None}
    if calls := fields.get("tool_calls"):
        path = f"messages[{at}].tool_calls"
        fields["tool_calls"] = [_call(call) for _, call in _numbered(calls, path)]
    elif _is_object(call := fields.get("function_call")):
        fields["tool_calls"] = [{"id": "", **call}]
    return _convert(fields, Message, f"messages[{at}]")


def _call(call: Any) -> Any:
    """OpenAI nests name and arguments under `function` or `custom`; Harper does not."""
    if _is_object(call) and _is_object(function := call.get("function")):
        extra = {"extra_content": call.get("extra_content")}
        return {"id": call.get("id"), **function, **extra}
    if _is_object(call) and _is_object(custom := call.get("custom")):
        told = {"name": custom.get("name"), "arguments": custom.get("input")}
        return {"id": call.get("id"), "type": "custom", **told}
    return call


def _tool(item: Any, path: str) -> ToolDef:
    if isinstance(item, ToolDef):
        return item
    for kind in ("function", "custom"):
        if _is_object(item) and _is_object(inner := item.get(kind)):
            item = {"type": kind, **{key: one for key, one in inner.items() if one is not None}}
    return _convert(item, ToolDef, path)


def _is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _convert(value: Any, kind: type[T], path: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        path = (path + where.rstrip("`")).lstrip(".")
        message = f"{path}: {text}"
        raise InvalidBody(message, param=path) from error
    except UnicodeEncodeError as error:
        # It is looked up among the words that may stand there.
        message = f"{path}: half of a surrogate pair is no text".lstrip(": ")
        raise InvalidBody(message, param=path or None) from error


class _Named(msgspec.Struct):
    """A tool by its name."""

    name: str


class _Allowed(msgspec.Struct):
    """Some of the tools, and whether one of them has to be called."""

    mode: str
    tools: list[dict[str, Any]]


class _BodyOptions(msgspec.Struct, omit_defaults=True):
    """The options that an OpenAI body carries under the names that ours have too."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: list[str] | str | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: dict[str, Any] | str | None = None
    function_call: dict[str, Any] | str | None = None
    response_format: dict[str, Any] | None = None
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


def options_in(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an OpenAI body as fields of `GenerateOpts`. Raises `InvalidBody`."""
    asked = _convert(dict(body), _BodyOptions, "")
    found: dict[str, Any] = msgspec.to_builtins(asked)
    if (most := found.pop("max_completion_tokens", None)) is not None:
        found["max_tokens"] = most
    if isinstance(asked.stop, str):
        found["stop"] = [asked.stop]
    old = found.pop("function_call", None)
    choice = old if asked.tool_choice is None else asked.tool_choice
    if choice is not None:
        found.update(_choice_in(choice))
    if (wanted := found.pop("response_format", None)) is not None:
        found["response_format"] = _format_in(wanted)
    return found


def _choice_in(choice: dict[str, Any] | str) -> dict[str, Any]:
    """The choice as a word or a tool's name, and the tools that it leaves."""
    if isinstance(choice, str):
        return {"tool_choice": choice}
    if choice.get("type") != "allowed_tools":
        return {"tool_choice": _name_in(choice, "tool_choice")}
    path = "tool_choice.allowed_tools"
    allowed = _convert(choice.get("allowed_tools"), _Allowed, path)
    names = [_name_in(one, f"{path}.tools[{at}]") for at, one in enumerate(allowed.tools)]
    return {"tool_choice": allowed.mode, "allowed_tools": names}


def _name_in(choice: Mapping[str, Any], path: str) -> str:
    """The name of a tool, which stands under its kind, or in the old protocol alone."""
    kind = choice.get("type")
    inner = choice.get(kind, choice) if isinstance(kind, str) else choice
    return _convert(inner, _Named, path).name


def _format_in(wanted: dict[str, Any]) -> ResponseFormat | None:
    kind = wanted.get("type")
    if kind == "json_schema":
        return _convert(wanted.get(kind), JSONSchemaFormat, f"response_format.{kind}")
    return "json" if kind == "json_object" else None
