"""openai_stream(): an answer's chunks in, OpenAI's chunk events and `[DONE]` out."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any

from .backend import aclose
from .batches import EncodedEvents, batches_of
from .errors import HarperError, ServerError
from .messages import Choice, GenerateChunk, TokenUsage, ToolCall, ToolCallDelta, as_json_text
from .sse import SSE, encode_json

logger = logging.getLogger("harperpy.streaming")

# Pieces of an answer besides its text, and what is said of it as a whole.
_SAID = tuple(
    (name, f"delta_{name}") for name in ("refusal", "reasoning_content", "annotations", "audio")
)
_OF_THE_WHOLE = ("system_fingerprint", "service_tier", "moderation")
_TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
}


def completion_id() -> str:
    """A fresh id for one completion."""
    # No secret: the system's generator would let go of the interpreter at each call.
    return f"chatcmpl-{random.getrandbits(128):032x}"


def openai_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error body for any error; of an unforeseen one only that it happened."""
    if not isinstance(error, HarperError):
        error = ServerError()
    kind = error.type or _TYPES.get(error.status)
    if kind is None:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.public_message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def openai_usage(usage: TokenUsage) -> dict[str, Any]:
    """OpenAI's usage object for a completion."""
    asked, answered = usage.prompt_tokens or 0, usage.completion_tokens or 0
    body: dict[str, Any] = {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }
    of_prompt = dict(usage.prompt_details or {})
    if usage.cached_tokens is not None:
        of_prompt["cached_tokens"] = usage.cached_tokens
    of_completion = dict(usage.completion_details or {})
    if usage.reasoning_tokens is not None:
        of_completion["reasoning_tokens"] = usage.reasoning_tokens
    if of_prompt:
        body["prompt_tokens_details"] = of_prompt
    if of_completion:
        body["completion_tokens_details"] = of_completion
    return body


def openai_finish_reason(reason: str | None, *, calls: bool, functions: bool = False) -> str:
    """Why an answer ended, in agreement with whether it holds calls.

    Providers say `stop` after calls they were told to make, and clients then make none.
    """
    if calls and reason in (None, "stop", "tool_calls"):
        return "function_call" if functions else "tool_calls"
    return "stop" if reason in (None, "tool_calls") else reason


def openai_logprobs(given: Choice | GenerateChunk) -> dict[str, Any] | None:
    """OpenAI's logprobs object of a choice; null where none were asked for."""
    if given.logprobs is None and given.refusal_logprobs is None:
        return None
    return {"content": given.logprobs, "refusal": given.refusal_logprobs}


def openai_tool_call(call: ToolCall) -> dict[str, Any]:
    """A finished tool call as messages hold it, in requests and answers alike."""
    text = "input" if call.type == "custom" else "arguments"
    told = {"name": call.name, text: call.arguments_text()}
    body = {"id": call.id, "type": call.type, call.type: told}
    return body if call.extra_content is None else {**body, "extra_content": call.extra_content}


def openai_stream(
    tokens: AsyncIterable[GenerateChunk | str] | Iterable[GenerateChunk | str],
    *,
    model: str,
    id: str | None = None,  # noqa: A002
    include_usage: bool = False,
    functions: bool = False,
) -> AsyncIterator[SSE]:
    """`SSE` messages whose data are `chat.completion.chunk` objects, then `[DONE]`.

    An error before the first message is raised, so that it can still become a status. A later one
    ends the stream with an error message and no `[DONE]`. With `include_usage` the last chunk
    carries the usage and no choice. `functions` words calls in the old protocol, as the
    `function_call` of who sent `functions`.
    """
    encoder = _ChunkEncoder(
        model, id or completion_id(), include_usage=include_usage, functions=functions
    )
    return EncodedEvents(_events(batches_of(tokens), encoder, include_usage=include_usage))


async def _events(
    source: AsyncIterator[Sequence[GenerateChunk | str]],
    encoder: _ChunkEncoder,
    *,
    include_usage: bool,
) -> AsyncIterator[list[str]]:
    """The data of the events that one batch after the other makes."""
    try:
        async for batch in source:
            if deltas := [delta for token in batch for delta in encoder.deltas(token)]:
                yield deltas
        last = encoder.finish()
        if include_usage and encoder.usage is not None:
            last.append(encoder.usage_chunk(encoder.usage))
        yield [*last, "[DONE]"]
    except Exception as error:
        if not encoder.started:
            raise
        logger.warning("a stream failed after it had begun: %r", error)
        yield [encode_json(openai_error(error)).decode()]
    finally:
        await aclose(source)


class _Choice:
    """What has been said of one answer of a stream; `head` is what stands before its deltas."""

    __slots__ = ("calls", "head", "index", "reason", "started")

    def __init__(self, index: int, head: str) -> None:
        self.index = index
        self.head = head
        self.started = False
        self.reason: str | None = None
        self.calls: dict[str | int, int] = {}


class _ChunkEncoder:
    """What stands around the deltas is encoded once; each delta is spliced into it."""

    def __init__(
        self, model: str, completion: str, *, include_usage: bool, functions: bool
    ) -> None:
        self._envelope: dict[str, Any] = {
            "id": completion,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._head = encode_json(self._envelope).decode()[:-1]
        self._tail = '}],"usage":null}' if include_usage else "}]}"
        self._plain_tail = f'}},"logprobs":null,"finish_reason":null{self._tail}'
        self._functions = functions
        self._choices: dict[int, _Choice] = {}
        self._last = -1
        self.started = False
        self.usage: TokenUsage | None = None

    def deltas(self, token: GenerateChunk | str) -> list[str]:
        """The chunks for one token: one for each kind of piece that it holds."""
        if isinstance(token, str):
            return [self._text(0, token)]
        opened = self._opened(token.index) if token.index > self._last else []
        if _is_text(token):
            return [*opened, self._text(token.index, token.delta_content)]
        return opened + self._pieces(token)

    def _opened(self, index: int) -> list[str]:
        """A beginning for each choice before this one: clients count them as they come."""
        lower = range(self._last + 1, index)
        self._last = index
        return [self._chunk(self._choice(at), {"content": ""}) for at in lower]

    def _pieces(self, token: GenerateChunk) -> list[str]:
        if token.usage is not None:
            self.usage = token.usage
        self._tell(token)
        choice = self._choice(token.index)
        if token.finish_reason is not None:
            choice.reason = token.finish_reason
        parts: list[dict[str, Any]] = []
        if token.delta_content is not None:
            parts.append({"content": token.delta_content})
        pieces = ((name, getattr(token, field)) for name, field in _SAID)
        parts.extend({name: piece} for name, piece in pieces if piece is not None)
        if token.delta_tool_calls and (calls := self._calls(choice, token.delta_tool_calls)):
            parts.append(calls)
        likely = openai_logprobs(token)
        if likely is None:
            return [self._chunk(choice, part) for part in parts]
        first, *others = parts or [{"content": ""}]
        return [
            self._chunk(choice, first, logprobs=likely),
            *(self._chunk(choice, part) for part in others),
        ]

    def finish(self) -> list[str]:
        """The last chunk of each choice: nothing new, and why it ended."""
        choices = [self._choices[index] for index in sorted(self._choices)] or [self._choice(0)]
        return [
            self._chunk(
                one,
                {},
                openai_finish_reason(one.reason, calls=bool(one.calls), functions=self._functions),
            )
            for one in choices
        ]

    def usage_chunk(self, usage: TokenUsage) -> str:
        """The chunk with the usage and no choice."""
        tail = encode_json({"choices": [], "usage": openai_usage(usage)}).decode()
        return f"{self._head},{tail[1:]}"

    def _choice(self, index: int) -> _Choice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(index, self._choice_head(index))
        return choice

    def _tell(self, token: GenerateChunk) -> None:
        """Take into the envelope what a provider says of the whole answer."""
        for name in _OF_THE_WHOLE:
            told = getattr(token, name)
            if told is not None and told != self._envelope.get(name):
                self._envelope[name] = told
                self._head = encode_json(self._envelope).decode()[:-1]
                for choice in self._choices.values():
                    choice.head = self._choice_head(choice.index)

    def _choice_head(self, index: int) -> str:
        return f'{self._head},"choices":[{{"index":{index},"delta":'

    def _text(self, index: int, text: str | None) -> str:
        """As `_chunk`, by the shorter way that most chunks can go."""
        choice = self._choices.get(index)
        if choice is None or not choice.started:
            return self._chunk(self._choice(index), {"content": text})
        return f'{choice.head}{{"content":{encode_json(text).decode()}{self._plain_tail}'

    def _chunk(
        self,
        choice: _Choice,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        if not choice.started:
            choice.started = self.started = True
            delta = {"role": "assistant", **delta}
        body = encode_json(delta).decode()
        ended = f'"{reason}"' if reason else "null"
        likely = encode_json(logprobs).decode() if logprobs else "null"
        return f'{choice.head}{body},"logprobs":{likely},"finish_reason":{ended}{self._tail}'

    def _calls(self, choice: _Choice, deltas: Iterable[ToolCallDelta | ToolCall]) -> dict[str, Any]:
        calls = [_call(choice, delta) for delta in deltas]
        if not self._functions:
            return {"tool_calls": calls}
        # The old protocol has room for one call.
        first = (call["function"] for call in calls if call["index"] == 0)
        return {"function_call": call} if (call := next(first, None)) else {}


def _is_text(token: GenerateChunk) -> bool:
    """Whether a chunk is a piece of text and nothing else, as most are."""
    return (
        token.delta_content is not None
        and token.finish_reason is None
        and token.usage is None
        and token.delta_tool_calls is None
        and token.delta_refusal is None
        and token.delta_reasoning_content is None
        and token.delta_annotations is None
        and token.delta_audio is None
        and token.logprobs is None
        and token.refusal_logprobs is None
        and token.system_fingerprint is None
        and token.service_tier is None
        and token.moderation is None
    )


def _call(choice: _Choice, delta: ToolCallDelta | ToolCall) -> dict[str, Any]:
    """Index on every piece; id, type and name on the first of a call only."""
    index = delta.index if isinstance(delta, ToolCallDelta) else None
    key = delta.id if index is None else index
    if key is None:
        key = next(reversed(choice.calls), 0)
    known = key in choice.calls
    index = choice.calls.setdefault(key, len(choice.calls))
    text = "input" if delta.type == "custom" else "arguments"
    told: dict[str, Any] = {text: as_json_text(delta.arguments)}
    extra = {} if delta.extra_content is None else {"extra_content": delta.extra_content}
    if known:
        return {"index": index, delta.type: told, **extra}
    call_id = delta.id or f"call_{secrets.token_hex(12)}"
    told = {"name": delta.name or "", **told}
    return {"index": index, "id": call_id, "type": delta.type, delta.type: told, **extra}
