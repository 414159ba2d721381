"""What models are asked and what they answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar, cast

import msgspec

from .errors import InvalidBody
from .signal import AbortSignal

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool", "function"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
Capability: TypeAlias = Literal[
    "embed", "generate", "stream", "tools", "structured_output", "logprobs"
]

T = TypeVar("T")

_PIECE = re.compile(r"[A-Za-z]{1,8}|\d{1,3}|[^\sA-Za-z\d]")


class ToolCall(msgspec.Struct, kw_only=True):
    """A finished call of a tool: `arguments` as an object, or as the model's own JSON text."""

    id: str
    name: str
    arguments: dict[str, Any] | str = ""

    def arguments_text(self) -> str:
        """The arguments as JSON text; the model's own bytes where they were kept."""
        return as_json_text(self.arguments)

    def arguments_object(self) -> dict[str, Any]:
        """The arguments as an object. Raises `InvalidBody` when the model wrote no JSON object."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            message = f"the arguments of tool call {self.name!r} are not a JSON object: {error}"
            raise InvalidBody(message) from error


class ToolCallDelta(msgspec.Struct, kw_only=True, gc=False):
    """A piece of a tool call: `id` and `name` once, `arguments` text as it comes."""

    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: dict[str, Any] | str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message that is more than text; `data` is the part as the client sent it."""

    type: str
    text: str | None = None
    data: dict[str, Any] | None = None


class Message(msgspec.Struct, kw_only=True):
    """One turn. `content` is text, or parts where a turn holds more than text."""

    role: Role
    content: str | list[ContentPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The turn's text, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class ToolDef(msgspec.Struct, kw_only=True):
    """A tool a model may call; `parameters` is a JSON Schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Prompt(msgspec.Struct, kw_only=True):
    """What a backend is asked, whatever form the caller used."""

    messages: list[Message]
    tools: list[ToolDef] = []

    @property
    def text(self) -> str:
        """The last user turn's text: all that a simple generator needs."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return ""


GenerateInput: TypeAlias = str | Sequence[Message | Mapping[str, Any]] | Mapping[str, Any] | Prompt


class JSONSchemaFormat(msgspec.Struct, kw_only=True):
    """A response format: the answer obeys `schema`."""

    schema: dict[str, Any]
    name: str = "output"
    description: str | None = None
    strict: bool | None = None


ResponseFormat: TypeAlias = Literal["text", "json"] | JSONSchemaFormat


class GenerateOpts(msgspec.Struct, kw_only=True):
    """How to generate. `model` is a logical name; it never reaches a backend.

    `tool_choice` is `auto`, `none`, `required` or a tool's name. `provider_options` go upstream
    as they are.
    """

    model: str | None = None
    requires: list[Capability] = []
    signal: AbortSignal | None = None
    adapter: str | None = None
    conversation_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: ResponseFormat | None = None
    tool_mode: Literal["return", "auto"] = "return"
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    provider_options: dict[str, Any] = {}


class EmbedOpts(msgspec.Struct, kw_only=True):
    """How to embed. `input_type` and `dimensions` are for the models that know them."""

    model: str | None = None
    requires: list[Capability] = []
    signal: AbortSignal | None = None
    input_type: Literal["document", "query"] | None = None
    dimensions: int | None = None


class TokenUsage(msgspec.Struct, kw_only=True, gc=False):
    """Tokens as the provider counted them; absent where it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    embedding_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    gpu_ms: float | None = None


class TopLogprob(msgspec.Struct, kw_only=True, gc=False):
    """A token that might have been, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob, kw_only=True, gc=False):
    """A token that was, with the likeliest in its place."""

    top_logprobs: list[TopLogprob] = []


class GenerateResult(msgspec.Struct, kw_only=True):
    """A whole answer."""

    content: str = ""
    tool_calls: list[ToolCall] | None = None
    finish_reason: FinishReason = "stop"
    usage: TokenUsage | None = None
    refusal: str | None = None
    logprobs: list[TokenLogprob] | None = None


class GenerateChunk(msgspec.Struct, kw_only=True, gc=False):
    """A piece of an answer; `finish_reason` and `usage` on the last ones only."""

    delta_content: str | None = None
    delta_tool_calls: list[ToolCallDelta] | list[ToolCall] | None = None
    finish_reason: FinishReason | None = None
    usage: TokenUsage | None = None
    delta_refusal: str | None = None
    logprobs: list[TokenLogprob] | None = None


class EmbedResult(msgspec.Struct, kw_only=True):
    """Vectors in the order of their texts, and what they cost."""

    vectors: list[Sequence[float]]
    usage: TokenUsage | None = None


def as_json_text(value: dict[str, Any] | str | None) -> str:
    """JSON text of an object; text stays as it is."""
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def to_prompt(given: GenerateInput) -> Prompt:
    """Read a str, a list of messages, or `{messages, tools?, system?}` (an OpenAI body will do).

    Raises `InvalidBody` with the path of what does not fit.
    """
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        return Prompt(messages=[Message(role="user", content=given)])
    if isinstance(given, Mapping):
        messages = [_message(item, at) for at, item in enumerate(given.get("messages") or ())]
        if system := given.get("system"):
            messages.insert(0, Message(role="system", content=system))
        tools = [_tool(item, at) for at, item in enumerate(given.get("tools") or ())]
    else:
        messages, tools = [_message(item, at) for at, item in enumerate(given)], []
    if not messages:
        message = "messages: expected at least one message"
        raise InvalidBody(message, param="messages")
    return Prompt(messages=messages, tools=tools)


def _message(item: Any, at: int) -> Message:
    if isinstance(item, Message):
        return item
    if not _is_object(item):
        message = f"messages[{at}]: expected an object with role and content"
        raise InvalidBody(message, param=f"messages[{at}]")
    fields: dict[str, Any] = {key: value for key, value in item.items() if value is not None}
    if isinstance(parts := fields.get("content"), list):
        fields["content"] = [_part(part) for part in cast("Sequence[Any]", parts)]
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = [_call(call) for call in calls]
    return _convert(fields, Message, f"messages[{at}]")


def _part(part: Any) -> Any:
    if _is_object(part) and "data" not in part:
        return {"type": part.get("type"), "text": part.get("text"), "data": dict(part)}
    return part


def _call(call: Any) -> Any:
    """OpenAI nests name and arguments under `function`; Harper does not."""
    if _is_object(call) and _is_object(function := call.get("function")):
        return {"id": call.get("id"), **function}
    return call


def _tool(item: Any, at: int) -> ToolDef:
    if isinstance(item, ToolDef):
        return item
    if _is_object(item) and _is_object(function := item.get("function")):
        item = {key: value for key, value in function.items() if value is not None}
    return _convert(item, ToolDef, f"tools[{at}]")


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
    response_format: dict[str, Any] | None = None


def options_in(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an OpenAI body as fields of `GenerateOpts`. Raises `InvalidBody`."""
    asked = _convert(dict(body), _BodyOptions, "")
    found: dict[str, Any] = msgspec.to_builtins(asked)
    if (most := found.pop("max_completion_tokens", None)) is not None:
        found["max_tokens"] = most
    if isinstance(asked.stop, str):
        found["stop"] = [asked.stop]
    if isinstance(choice := asked.tool_choice, dict):
        found["tool_choice"] = choice.get("function", {}).get("name")
    if (wanted := found.pop("response_format", None)) is not None:
        found["response_format"] = _format_in(wanted)
    return found


def _format_in(wanted: dict[str, Any]) -> ResponseFormat | None:
    kind = wanted.get("type")
    if kind == "json_schema":
        return _convert(wanted.get(kind), JSONSchemaFormat, f"response_format.{kind}")
    return "json" if kind == "json_object" else None


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: words by eight letters, numbers by three digits, signs.

    Used only where a provider reports no usage; the row then says `usage_estimated`.
    """
    return len(_PIECE.findall(text))
