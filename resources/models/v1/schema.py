"""The bodies that OpenAI clients send, as types. null is the same as absent throughout.

No body holds itself, so none of them has to be looked through for what only holds itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from harperpy import (
    AudioPart,
    FilePart,
    ImagePart,
    RefusalPart,
    TextPart,
)

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
Given: TypeAlias = Annotated[str, Meta(min_length=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
Count: TypeAlias = Annotated[int, Meta(ge=1)]
Seed: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Text: TypeAlias = str | Annotated[list[TextPart], Meta(min_length=1)]
Shown: TypeAlias = (
    str | Annotated[list[TextPart | ImagePart | AudioPart | FilePart], Meta(min_length=1)]
)
Label: TypeAlias = Annotated[str, Meta(max_length=512)]


class FunctionCallIn(msgspec.Struct, gc=False):
    """The function that was called; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class CustomCallIn(msgspec.Struct, gc=False):
    """The custom tool that was called, and the text it was given."""

    name: str
    input: str


class FunctionToolCallIn(msgspec.Struct, tag_field="type", tag="function", gc=False):
    """A call of a function that an assistant message repeats."""

    id: Given
    function: FunctionCallIn
    # Signatures of thoughts, which some providers want back.
    extra_content: dict[str, Any] | None = None


class CustomToolCallIn(msgspec.Struct, tag_field="type", tag="custom", gc=False):
    """A call of a custom tool that an assistant message repeats."""

    id: Given
    custom: CustomCallIn


class DeveloperMessageIn(msgspec.Struct, tag_field="role", tag="developer", gc=False):
    """What the model is to keep to, from whoever built the application."""

    content: Text
    name: str | None = None


class SystemMessageIn(msgspec.Struct, tag_field="role", tag="system", gc=False):
    """The same by its older name."""

    content: Text
    name: str | None = None


class UserMessageIn(msgspec.Struct, tag_field="role", tag="user", gc=False):
    """What the user says, shows or plays."""

    content: str | Annotated[list[TextPart | ImagePart | AudioPart | FilePart], Meta(min_length=1)]
    name: str | None = None


class AssistantMessageIn(msgspec.Struct, tag_field="role", tag="assistant", gc=False):
    """What the model said, called or refused before."""

    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[FunctionToolCallIn | CustomToolCallIn] | None = None
    function_call: FunctionCallIn | None = None
    audio: dict[str, Any] | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Any] | None = None


class ToolMessageIn(msgspec.Struct, tag_field="role", tag="tool", gc=False):
    """What a tool returned. OpenAI takes text; others take images and files too."""

    tool_call_id: str
    content: Shown


class FunctionMessageIn(msgspec.Struct, tag_field="role", tag="function", gc=False):
    """What a function of the old protocol returned."""

    name: str
    content: str | None = None


MessageIn: TypeAlias = (
    DeveloperMessageIn
    | SystemMessageIn
    | UserMessageIn
    | AssistantMessageIn
    | ToolMessageIn
    | FunctionMessageIn
)


class FunctionIn(msgspec.Struct, gc=False):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomIn(msgspec.Struct, gc=False):
    """A tool that takes text; `format` says which text."""

    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None


class FunctionToolIn(msgspec.Struct, tag_field="type", tag="function", gc=False):
    """A function as a tool."""

    function: FunctionIn


class CustomToolIn(msgspec.Struct, tag_field="type", tag="custom", gc=False):
    """A custom tool."""

    custom: CustomIn


ToolIn: TypeAlias = FunctionToolIn | CustomToolIn


class Named(msgspec.Struct, gc=False):
    """A tool's name."""

    name: str


class FunctionChoice(msgspec.Struct, tag_field="type", tag="function", gc=False):
    """The one function that the model must call."""

    function: Named


class CustomChoice(msgspec.Struct, tag_field="type", tag="custom", gc=False):
    """The one custom tool that the model must call."""

    custom: Named


class AllowedTools(msgspec.Struct, gc=False):
    """The tools that the model may or must choose from."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice | CustomChoice], Meta(min_length=1)]


class AllowedToolsChoice(msgspec.Struct, tag_field="type", tag="allowed_tools", gc=False):
    """A choice among some of the tools."""

    allowed_tools: AllowedTools


ToolChoice: TypeAlias = FunctionChoice | CustomChoice | AllowedToolsChoice


class JSONSchemaIn(msgspec.Struct, gc=False):
    """The schema an answer must obey."""

    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormatIn(msgspec.Struct, gc=False):
    """text, json_object, or json_schema with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaIn | None = None


class StreamOptions(msgspec.Struct, gc=False):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class AudioOut(msgspec.Struct, gc=False):
    """How a spoken answer sounds; `voice` is a name or `{id}`."""

    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"]
    voice: str | dict[str, Any]


class Prediction(msgspec.Struct, gc=False):
    """What most of the answer is likely to be."""

    type: Literal["content"]
    content: str | list[TextPart]


class ChatRequest(msgspec.Struct, gc=False):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[MessageIn], Meta(min_length=1)]
    model: Annotated[str, Meta(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: Seed | None = None
    user: str | None = None
    # From here on what few requests have.
    tools: Annotated[list[ToolIn], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionIn], Meta(min_length=1, max_length=128)] | None = None
    function_call: Literal["none", "auto"] | Named | None = None
    response_format: ResponseFormatIn | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOut | None = None
    prediction: Prediction | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, Label], Meta(max_length=16)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=64)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None


class EmbeddingRequest(msgspec.Struct, gc=False):
    """The body of POST /v1/embeddings."""

    input: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[
            list[
                Annotated[str, Meta(min_length=1)] | int | Annotated[list[int], Meta(min_length=1)]
            ],
            Meta(min_length=1),
        ]
    )
    model: Annotated[str, Meta(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
