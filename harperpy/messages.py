"""What models are asked and what they answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from .errors import InvalidBody
from .parts import ContentPart, TextPart
from .signal import AbortSignal

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool", "function"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
"""Why an answer ended, in OpenAI's words."""
ToolType: TypeAlias = Literal["function", "custom"]
"""A function takes JSON, a custom tool text."""
Capability: TypeAlias = Literal[
    "embed",
    "generate",
    "stream",
    "tools",
    "structured_output",
    "logprobs",
    "custom_tools",
    "allowed_tools",
    "n",
    "image_url",
    "input_audio",
    "file",
    "audio",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    "moderation",
    "service_tier",
    "store",
]
"""What a backend may be able to do; those for an option or a part of a message bear its name."""

# What a template puts around each, and what an image, a sound or a file may be taken for.
_PER_MESSAGE, _PER_PART = 16, 2000
_PIECE = re.compile(r"[A-Za-z]{1,8}|\d{1,3}|[^\sA-Za-z\d]")


class ToolCall(msgspec.Struct, kw_only=True):
    """A finished call of a tool: `arguments` as an object, or as the model's own JSON text.

    A custom tool's `arguments` are its input: text in whatever form the tool takes. What a provider
    wants to see again with the call is in `extra_content`.
    """

    id: str
    name: str
    arguments: dict[str, Any] | str = ""
    type: ToolType = "function"
    extra_content: dict[str, Any] | None = None

    def arguments_text(self) -> str:
        """The arguments as JSON text; the model's own bytes where they were kept.

        Who calls a function with nothing calls it with an empty object: no text is no JSON.
        """
        return as_json_text(self.arguments) or ("{}" if self.type == "function" else "")

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
    """A piece of a tool call: `id` and `name` once, `arguments` text as it comes.

    It belongs to the call of its `index`, else of its `id`, else to the latest.
    """

    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: dict[str, Any] | str | None = None
    type: ToolType = "function"
    extra_content: dict[str, Any] | None = None


class Message(msgspec.Struct, kw_only=True, gc=False):
    """One turn. `content` is text, or parts where a turn holds more than text.

    `reasoning_details` are those of an answer, as its provider wants to see them again.
    """

    role: Role
    content: str | Sequence[ContentPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: dict[str, Any] | None = None
    reasoning_details: list[Any] | None = None

    @property
    def text(self) -> str:
        """The turn's text, that of its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


class ToolDef(msgspec.Struct, kw_only=True):
    """A tool a model may call: a function whose `parameters` are a JSON Schema.

    A custom tool takes text; `format` is the grammar it keeps to, as OpenAI writes it.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None
    type: ToolType = "function"
    format: dict[str, Any] | None = None


class Prompt(msgspec.Struct, kw_only=True, gc=False):
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
"""A user's text, messages, or OpenAI's body as a dict, whose options count too."""


class JSONSchemaFormat(msgspec.Struct, kw_only=True):
    """A response format: the answer obeys `schema`."""

    schema: dict[str, Any]
    name: str = "output"
    description: str | None = None
    strict: bool | None = None


ResponseFormat: TypeAlias = Literal["text", "json"] | JSONSchemaFormat
"""What the answer is to be: text, some JSON, or JSON that obeys a schema."""


class GenerateOpts(msgspec.Struct, kw_only=True):
    """How to generate. `model` is a logical name; it never reaches a backend.

    `tool_choice` is `auto`, `none`, `required` or a tool's name; `allowed_tools` names those that
    may be called, all if None. `n` answers are asked for at once. `provider_options` go upstream
    as they are. `call_id`, for backends, is the id of the attempt's row. The rest bears OpenAI's
    names and means what OpenAI says.
    """

    model: str | None = None
    requires: list[Capability] = []
    signal: AbortSignal | None = None
    call_id: int | None = None
    adapter: str | None = None
    conversation_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    tool_mode: Literal["return", "auto"] = "return"
    tool_choice: str | None = None
    allowed_tools: list[str] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    prediction: dict[str, Any] | None = None
    provider_options: dict[str, Any] = {}
    # From here on what not every backend is able to.
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    logprobs: bool | None = None
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    audio: dict[str, Any] | None = None


class EmbedOpts(msgspec.Struct, kw_only=True):
    """How to embed. `input_type` and `dimensions` are for the models that know them.

    `provider_options` go upstream as they are; `call_id`, for backends, is the id of the attempt's
    row. `encoding_format` is what the caller would rather have; both are vectors.
    """

    model: str | None = None
    requires: list[Capability] = []
    signal: AbortSignal | None = None
    call_id: int | None = None
    encoding_format: Literal["float", "base64"] = "base64"
    input_type: Literal["document", "query"] | None = None
    dimensions: int | None = None
    provider_options: dict[str, Any] = {}


class TokenUsage(msgspec.Struct, kw_only=True, gc=False):
    """Tokens as the provider counted them; absent where it did not say.

    The two `_details` hold its further counts, by OpenAI's names.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    embedding_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    gpu_ms: float | None = None
    prompt_details: dict[str, int] | None = None
    completion_details: dict[str, int] | None = None


class TopLogprob(msgspec.Struct, kw_only=True, gc=False):
    """A token that might have been, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob, kw_only=True, gc=False):
    """A token that was, with the likeliest in its place."""

    top_logprobs: list[TopLogprob] = []


class Choice(msgspec.Struct, kw_only=True, gc=False):
    """One whole answer; `reasoning_content` is what a model thought before it, where it tells.

    `reasoning_details` are the same in its provider's own form, signed or encrypted perhaps.
    """

    content: str = ""
    tool_calls: list[ToolCall] | None = None
    finish_reason: FinishReason = "stop"
    refusal: str | None = None
    logprobs: list[TokenLogprob] | None = None
    refusal_logprobs: list[TokenLogprob] | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    reasoning_details: list[Any] | None = None


class GenerateResult(Choice, kw_only=True, gc=False):
    """A whole answer and what it cost; `others` are the further ones where `n` asked for more."""

    usage: TokenUsage | None = None
    others: list[Choice] = []
    system_fingerprint: str | None = None
    service_tier: str | None = None
    moderation: dict[str, Any] | None = None


class GenerateChunk(msgspec.Struct, kw_only=True, gc=False):
    """A piece of the answer `index`; `finish_reason` and `usage` on the last ones only."""

    delta_content: str | None = None
    delta_tool_calls: list[ToolCallDelta] | list[ToolCall] | None = None
    finish_reason: FinishReason | None = None
    usage: TokenUsage | None = None
    delta_refusal: str | None = None
    logprobs: list[TokenLogprob] | None = None
    refusal_logprobs: list[TokenLogprob] | None = None
    index: int = 0
    delta_reasoning_content: str | None = None
    delta_annotations: list[Any] | None = None
    delta_audio: dict[str, Any] | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    moderation: dict[str, Any] | None = None
    delta_reasoning_details: list[Any] | None = None


EmbedInput: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, texts, an array of token numbers (cl100k_base), or several arrays."""


class EmbedResult(msgspec.Struct, kw_only=True, gc=False):
    """Vectors in the order of their texts, and what they cost."""

    vectors: list[Sequence[float]]
    usage: TokenUsage | None = None


def as_json_text(value: dict[str, Any] | str | None) -> str:
    """JSON text of an object; text stays as it is."""
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: words by eight letters, numbers by three digits, signs.

    Used only where a provider reports no usage; the row then says `usage_estimated`.
    """
    return len(_PIECE.findall(text))


def text_bytes(text: str) -> int:
    """How many bytes a text has: no model makes more tokens of it."""
    return len(text.encode(errors="replace"))


def most_tokens(prompt: Prompt) -> int:
    """How many tokens a prompt has at most; of parts that are no text nobody knows more exactly."""
    total = len(msgspec.json.encode(prompt.tools)) if prompt.tools else 0
    for message in prompt.messages:
        total += _PER_MESSAGE + text_bytes(message.text)
        if not isinstance(message.content, str):
            total += _PER_PART * sum(not isinstance(part, TextPart) for part in message.content)
        for call in message.tool_calls or ():
            total += _PER_MESSAGE + text_bytes(call.name) + text_bytes(call.arguments_text())
        for text in (message.name, message.refusal, message.reasoning_content):
            total += text_bytes(text) if text else 0
    return total
