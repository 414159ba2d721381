"""What is said to an OpenAI-compatible provider, and what its answers mean."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import msgspec

from harperpy import (
    BackendError,
    BackendTimeout,
    ContentPart,
    GenerateChunk,
    GenerateOpts,
    GenerateResult,
    HarperError,
    JSONSchemaFormat,
    Message,
    Prompt,
    TokenLogprob,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
    ToolDef,
    UpstreamAuthError,
    UpstreamRejected,
)

_PASSED_ON = frozenset({400, 404, 409, 413, 422, 429})
_LONGEST_MESSAGE = 500
_KEY = re.compile(r"\b(?:sk|hk|pk|gsk|xai)[-_][\w-]{6,}|(?i:bearer)\s+\S+")
_PLAIN = (
    "temperature",
    "top_p",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
)
_MOST_CALLS = 128
_MOST_TOKENS = 2**53
_MOST_ARGUMENTS = 8 << 20


class _Struct(msgspec.Struct, gc=False):
    """A part of a provider's answer; what we do not know in it is passed over."""


class Usage(_Struct):
    """A provider's usage; whatever in it is no count of tokens is passed over."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    prompt_tokens_details: dict[str, Any] | None = None
    completion_tokens_details: dict[str, Any] | None = None

    def tokens(self) -> TokenUsage | None:
        """As harperpy counts; None where it says neither what was asked nor what was answered."""
        asked, answered = _count(self.prompt_tokens), _count(self.completion_tokens)
        if asked is None and answered is None:
            return None
        return TokenUsage(
            prompt_tokens=asked,
            completion_tokens=answered,
            cached_tokens=_count((self.prompt_tokens_details or {}).get("cached_tokens")),
            reasoning_tokens=_count((self.completion_tokens_details or {}).get("reasoning_tokens")),
        )


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


class _Function(_Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(_Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Said(_Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprobs(_Struct):
    content: list[TokenLogprob] | None = None


class _Choice(_Struct):
    index: int = 0
    logprobs: _Logprobs | None = None
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: str | None = None


class Completion(_Struct):
    """A whole answer."""

    choices: list[_Choice]
    usage: Usage | None = None


class _Chunk(_Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class _Vector(_Struct):
    embedding: list[float]
    index: int = 0


class Embeddings(_Struct):
    """A provider's embeddings."""

    data: list[_Vector]
    usage: Usage | None = None


class _Error(_Struct):
    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _Envelope(_Struct):
    error: _Error | str | None = None


Headers: TypeAlias = Mapping[str, str]

_CHUNK = msgspec.json.Decoder(_Chunk)
_ENVELOPE = msgspec.json.Decoder(_Envelope)


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
    for name in _PLAIN:
        if (value := getattr(opts, name)) is not None:
            body[name] = value
    if opts.max_tokens is not None:
        body[limit_name] = opts.max_tokens
    if opts.response_format not in (None, "text"):
        body["response_format"] = _response_format(opts.response_format)
    if prompt.tools:
        _add_tools(body, prompt.tools, opts)
    if stream:
        body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)


def whole_answer(completion: Completion) -> GenerateResult:
    """The first choice of an answer. Raises `BackendError` where there is none."""
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message is None:
        message = "an answer without a choice"
        raise BackendError(message)
    said = choice.message
    calls = [
        ToolCall(
            id=call.id or f"call_{secrets.token_hex(12)}",
            name=(call.function.name if call.function else None) or "",
            arguments=(call.function.arguments if call.function else None) or "{}",
        )
        for call in said.tool_calls or ()
    ]
    return GenerateResult(
        content=said.content or "",
        refusal=said.refusal,
        tool_calls=calls or None,
        finish_reason=finish_reason(choice.finish_reason or ("tool_calls" if calls else "stop")),
        usage=completion.usage.tokens() if completion.usage else None,
        logprobs=choice.logprobs.content if choice.logprobs else None,
    )


def finish_reason(given: str) -> Any:
    """The standard reason for a provider's own word."""
    if given == "function_call":
        return "tool_calls"
    return given if given in ("stop", "length", "tool_calls", "content_filter") else "stop"


class ChunkReader:
    """Turns a stream's events into chunks, and knows whether it came to its end."""

    __slots__ = ("_arguments", "_calls", "ended", "reason")

    def __init__(self) -> None:
        self._calls: set[int] = set()
        self._arguments = 0
        self.reason: str | None = None
        self.ended = False

    def read(self, data: str) -> GenerateChunk | None:
        """The chunk of one event; None for one that brings nothing. Raises `BackendError`."""
        if self.ended or data == "[DONE]":
            self.ended = True
            return None
        try:
            chunk = _CHUNK.decode(data)
        except msgspec.DecodeError as error:
            message = "an event of the stream is not what it should be"
            raise BackendError(message) from error
        if chunk.error is not None:
            raise _stream_error(chunk.error)
        usage = chunk.usage.tokens() if chunk.usage else None
        choice = chunk.choices[0] if chunk.choices else None
        if choice is None or choice.index != 0:
            return GenerateChunk(usage=usage) if usage else None
        if choice.finish_reason:
            self.reason = finish_reason(choice.finish_reason)
        said = choice.delta or _Said()
        if not (said.content or said.refusal or said.tool_calls or choice.finish_reason or usage):
            return None
        return GenerateChunk(
            delta_content=said.content or None,
            delta_refusal=said.refusal or None,
            delta_tool_calls=self._deltas(said.tool_calls) if said.tool_calls else None,
            finish_reason=finish_reason(choice.finish_reason) if choice.finish_reason else None,
            usage=usage,
            logprobs=choice.logprobs.content if choice.logprobs else None,
        )

    def finish(self) -> GenerateChunk | None:
        """The reason that a complete stream kept to itself. Raises `BackendError` for a cut one."""
        if self.reason is not None:
            return None
        if not self.ended:
            message = "the stream ended before the answer did"
            raise BackendError(message)
        return GenerateChunk(finish_reason="tool_calls" if self._calls else "stop")

    def _deltas(self, calls: list[_Call]) -> list[ToolCallDelta]:
        deltas: list[ToolCallDelta] = []
        for call in calls:
            index = call.index
            if index is None:
                # Some leave it out: a piece without an id then goes on with the last call.
                index = len(self._calls) - (not call.id and bool(self._calls))
            function = call.function or _Function()
            self._calls.add(index)
            self._arguments += len(function.arguments or "")
            if len(self._calls) > _MOST_CALLS or self._arguments > _MOST_ARGUMENTS:
                message = "the stream holds more tool calls than anyone can use"
                raise BackendError(message)
            deltas.append(
                ToolCallDelta(
                    index=index,
                    id=call.id,
                    name=function.name,
                    arguments=function.arguments,
                )
            )
        return deltas


def refusal(status: int, body: bytes, headers: Headers, secret: str | None) -> HarperError:
    """The error for a provider's error answer; what may pass on does, our key never."""
    retry_after = headers.get("retry-after")
    passing = {"Retry-After": retry_after} if retry_after else {}
    if status in (401, 403):
        return UpstreamAuthError(f"the provider answered {status}", upstream_status=status)
    if status in _PASSED_ON:
        told = _told(body)
        message = _masked(told.message or f"The model provider answered {status}.", secret)
        error: HarperError = UpstreamRejected(
            message[:_LONGEST_MESSAGE],
            upstream_status=status,
            type=told.type,
            param=told.param,
            code=None if told.code is None else str(told.code),
            headers=passing,
        )
    elif status == 408:
        error = BackendTimeout("the provider answered 408", upstream_status=status)
    else:
        ours = status if 500 <= status <= 599 else 502
        said = f"the provider answered {status}"
        error = BackendError(said, status=ours, upstream_status=status, headers=passing)
    error.retryable = status in (408, 429) or status >= 500
    error.retry_after = _seconds(retry_after)
    return error


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, str):
        body["content"] = message.content or (None if message.tool_calls else "")
    else:
        body["content"] = [_part(part) for part in message.content]
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_text()},
            }
            for call in message.tool_calls
        ]
    for name in ("name", "tool_call_id", "refusal"):
        if (value := getattr(message, name)) is not None:
            body[name] = value
    return body


def _part(part: ContentPart) -> dict[str, Any]:
    return part.data or {"type": part.type, "text": part.text}


def _add_tools(body: dict[str, Any], tools: list[ToolDef], opts: GenerateOpts) -> None:
    body["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
    choice = opts.tool_choice
    if choice in (None, "auto", "none", "required"):
        if choice:
            body["tool_choice"] = choice
    else:
        body["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if opts.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = opts.parallel_tool_calls


def _function(tool: ToolDef) -> dict[str, Any]:
    body: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        body["description"] = tool.description
    if tool.strict is not None:
        body["strict"] = tool.strict
    return body


def _response_format(wanted: Any) -> dict[str, Any]:
    if not isinstance(wanted, JSONSchemaFormat):
        return {"type": "json_object"}
    schema: dict[str, Any] = {"name": wanted.name, "schema": wanted.schema}
    if wanted.description:
        schema["description"] = wanted.description
    if wanted.strict is not None:
        schema["strict"] = wanted.strict
    return {"type": "json_schema", "json_schema": schema}


def _told(body: bytes) -> _Error:
    try:
        told = _ENVELOPE.decode(body).error
    except msgspec.DecodeError:
        return _Error()
    return told if isinstance(told, _Error) else _Error(message=told)


def _masked(message: str, secret: str | None) -> str:
    if secret:
        message = message.replace(secret, "[redacted]")
    return _KEY.sub("[redacted]", message)


def _stream_error(told: Any) -> BackendError:
    code = cast("dict[str, Any]", told).get("code") if isinstance(told, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else None
    message = "the provider reported an error in its stream"
    return BackendError(message, upstream_status=status)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        # An HTTP date: too far off to wait here; it passes on as it is.
        return float("inf")
