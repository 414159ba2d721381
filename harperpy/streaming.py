"""openai_stream(): an answer's chunks in, OpenAI's chunk events and `[DONE]` out."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from .backend import aclose, call_key, check_answer
from .batches import Batched, Divert, EncodedEvents, Texts, batches_of
from .errors import HarperError, ServerError, logged
from .messages import Choice, GenerateChunk, TokenUsage, ToolCall, ToolCallDelta, as_json_text
from .sse import SSE, Encoded, encode_json, encode_text

logger = logging.getLogger("harperpy.streaming")

# Pieces of an answer besides its text, and what is said of it as a whole.
_SAID = ("refusal", "reasoning_content", "annotations", "audio", "reasoning_details")
_OF_THE_WHOLE = ("system_fingerprint", "service_tier", "moderation")
_said_in = attrgetter(*(f"delta_{name}" for name in _SAID))
_told_in = attrgetter(*_OF_THE_WHOLE)
_NOTHING_SAID, _NOTHING_TOLD = (None,) * len(_SAID), (None,) * len(_OF_THE_WHOLE)
_CONTENT = b'{"content":'
# What an event ends with, by whether the stream tells usage, and one of text alone.
_TAILS = {True: b'}],"usage":null}\n\n', False: b"}]}\n\n"}
_TEXT_TAILS = {
    usage: b'},"logprobs":null,"finish_reason":null' + tail for usage, tail in _TAILS.items()
}
_TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
}


def completion_id() -> str:
    """A fresh id for one completion."""
    # No secret: the system's generator would let go of the interpreter at each call.
    return f"chatcmpl-{random.getrandbits(128).to_bytes(16).hex()}"


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
    if usage.prompt_details or usage.cached_tokens is not None:
        body["prompt_tokens_details"] = of_prompt = dict(usage.prompt_details or {})
        if usage.cached_tokens is not None:
            of_prompt["cached_tokens"] = usage.cached_tokens
    if usage.completion_details or usage.reasoning_tokens is not None:
        body["completion_tokens_details"] = of_completion = dict(usage.completion_details or {})
        if usage.reasoning_tokens is not None:
            of_completion["reasoning_tokens"] = usage.reasoning_tokens
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
    events = _Events(batches_of(tokens), encoder, include_usage=include_usage)
    encoder.source = tokens.divert if isinstance(tokens, Batched) else None
    return EncodedEvents(events, encoder.divert if encoder.source else None)


class _Events(AsyncIterator[Encoded]):
    """The events that one batch after the other makes."""

    __slots__ = ("_closed", "_ended", "_source", "_usage", "encoder")

    def __init__(
        self,
        source: AsyncIterator[Sequence[GenerateChunk | str]],
        encoder: _ChunkEncoder,
        *,
        include_usage: bool,
    ) -> None:
        self._source = source
        self._usage = include_usage
        self._closed = self._ended = False
        self.encoder = encoder

    async def __anext__(self) -> Encoded:
        if self._ended:
            raise StopAsyncIteration
        try:
            while True:
                if events := self.encoder.events(await anext(self._source)):
                    return Encoded(events)
        except StopAsyncIteration:
            await self.aclose()
            return self.encoder.last(include_usage=self._usage)
        except Exception as error:
            await self.aclose()
            if not self.encoder.started:
                raise
            logger.warning("a stream failed after it had begun: %s", logged(error))
            return Encoded(b"data: %b\n\n" % encode_json(openai_error(error)))
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the source."""
        self._ended = True
        if not self._closed:
            await aclose(self._source)
            self._closed = True


class _Choice:
    """What has been said of one answer of a stream.

    `text_head` is what stands before its deltas that are text, `head` before any other.
    """

    __slots__ = ("calls", "index", "reason", "started", "text_head")

    def __init__(self, index: int, envelope: bytes) -> None:
        self.index = index
        self.put_in(envelope)
        self.started = False
        self.reason: str | None = None
        self.calls: dict[str | int, int] = {}

    def put_in(self, envelope: bytes) -> None:
        """Take the envelope's beginning for that of each event."""
        head = b'%b,"choices":[{"index":%d,"delta":%b'
        self.text_head = head % (envelope, self.index, _CONTENT)

    @property
    def head(self) -> bytes:
        """Made when it is needed: few events are no text, and streams are many."""
        return self.text_head[: -len(_CONTENT)]


class _ChunkEncoder:
    """What stands around the deltas is encoded once; each delta is spliced into it."""

    __slots__ = (
        *("_choices", "_envelope", "_functions", "_last", "_of_the_whole", "_plain", "_tail"),
        *("_text_head", "_text_tail", "sink", "source", "started", "usage"),
    )

    sink: Callable[[bytes], bool]
    source: Divert[Sequence[GenerateChunk | str]] | None

    def __init__(
        self, model: str, completion: str, *, include_usage: bool, functions: bool
    ) -> None:
        envelope = {
            "id": completion,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._envelope = encode_json(envelope)[:-1]
        self._of_the_whole = _NOTHING_TOLD
        self._tail, self._text_tail = _TAILS[include_usage], _TEXT_TAILS[include_usage]
        # What stands before the first answer's text, once that has begun.
        self._text_head = b""
        self._functions = functions
        self._choices: dict[int, _Choice] = {}
        self._last = -1
        # What each chunk is compared with: it is changed more quickly than made anew.
        self._plain = GenerateChunk()
        self.started = False
        self.usage: TokenUsage | None = None

    def events(self, batch: Sequence[GenerateChunk | str]) -> bytes:
        """The events of a batch: of each token one for each kind of piece that it holds."""
        if type(batch) is Texts and batch and (head := self._text_head):
            tail = self._text_tail
            return b"%b%b%b" % (head, (tail + head).join(map(encode_text, batch)), tail)
        told: list[bytes] = []
        text: str | None
        choices, last, tail, plain = self._choices, self._last, self._text_tail, self._plain
        for token in batch:
            if isinstance(token, str):
                if self._text_head:
                    told += (self._text_head, encode_text(token), tail)
                    continue
                index, text = 0, token
            else:
                index, text = token.index, token.delta_content
                if index > last:
                    last = self._open(index, told)
                # Most are a piece of text and nothing else.
                plain.index, plain.delta_content = index, text
                if text is None or token != plain:
                    self._add_pieces(token, told)
                    continue
            if (choice := choices.get(index)) is None or not choice.started:
                self._add(self._choice(index), {"content": text}, told)
            else:
                told += (choice.text_head, encode_text(text), tail)
        return b"".join(told)

    def divert(self, sink: Callable[[bytes], bool]) -> None:
        """The way past the source's iterators, further on as events."""
        if self.source is not None:
            self.sink = sink
            self.source(self.pass_on)

    def pass_on(self, batch: Sequence[GenerateChunk | str]) -> bool:
        """Give the `sink` a batch's events, if there are any; whether it takes more."""
        events = self.events(batch)
        return not events or self.sink(events)

    def last(self, *, include_usage: bool) -> Encoded:
        """The last chunk of each choice: nothing new, and why it ended. Then the usage, the end."""
        told: list[bytes] = []
        for at in sorted(self._choices) or [0]:
            one = self._choice(at)
            reason = openai_finish_reason(
                one.reason, calls=bool(one.calls), functions=self._functions
            )
            self._add(one, {}, told, reason)
        if include_usage and self.usage is not None:
            tail = encode_json({"choices": [], "usage": openai_usage(self.usage)})
            told.append(b"%b,%b\n\n" % (self._opening(), tail[1:]))
        return Encoded(b"".join([*told, b"data: [DONE]\n\n"]))

    def _open(self, index: int, told: list[bytes]) -> int:
        """A beginning for each choice before this one: clients count them as they come."""
        check_answer(index)
        lower = range(self._last + 1, index)
        self._last = index
        for at in lower:
            self._add(self._choice(at), {"content": ""}, told)
        return index

    def _add_pieces(self, token: GenerateChunk, told: list[bytes]) -> None:
        if token.usage is not None:
            self.usage = token.usage
        if (told_of := _told_in(token)) != _NOTHING_TOLD:
            self._tell(told_of)
        choice = self._choice(token.index)
        if token.finish_reason is not None:
            choice.reason = token.finish_reason
        parts: list[dict[str, Any]] = []
        if token.delta_content is not None:
            parts.append({"content": token.delta_content})
        if (said := _said_in(token)) != _NOTHING_SAID:
            pieces = zip(_SAID, said, strict=True)
            parts.extend({name: piece} for name, piece in pieces if piece is not None)
        if token.delta_tool_calls and (calls := self._calls(choice, token.delta_tool_calls)):
            parts.append(calls)
        likely = openai_logprobs(token)
        if likely is not None and not parts:
            parts.append({"content": ""})
        for part in parts:
            self._add(choice, part, told, logprobs=likely)
            likely = None

    def _choice(self, index: int) -> _Choice:
        choice = self._choices.get(index)
        if choice is None:
            check_answer(index)
            choice = self._choices[index] = _Choice(index, self._opening())
        return choice

    def _opening(self) -> bytes:
        """What each event begins with: made when it is needed, which is seldom."""
        told = {
            name: value
            for name, value in zip(_OF_THE_WHOLE, self._of_the_whole, strict=True)
            if value is not None
        }
        more = b",%b" % encode_json(told)[1:-1] if told else b""
        return b"data: %b%b" % (self._envelope, more)

    def _tell(self, of_the_whole: tuple[Any, ...]) -> None:
        """Take into the envelope what a provider says of the whole answer."""
        known = self._of_the_whole
        told = zip(of_the_whole, known, strict=True)
        self._of_the_whole = tuple(old if new is None else new for new, old in told)
        if self._of_the_whole != known:
            for choice in self._choices.values():
                choice.put_in(self._opening())
                self._note_first(choice)

    def _note_first(self, choice: _Choice) -> None:
        if choice.started and not choice.index:
            self._text_head = choice.text_head

    def _add(
        self,
        choice: _Choice,
        delta: dict[str, Any],
        told: list[bytes],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> None:
        if not choice.started:
            choice.started = self.started = True
            self._note_first(choice)
            delta = {"role": "assistant", **delta}
        ended = b'"%b"' % reason.encode() if reason else b"null"
        likely = encode_json(logprobs) if logprobs else b"null"
        body = encode_json(delta)
        told += (choice.head, body, b',"logprobs":', likely, b',"finish_reason":', ended)
        told.append(self._tail)

    def _calls(self, choice: _Choice, deltas: Iterable[ToolCallDelta | ToolCall]) -> dict[str, Any]:
        calls = [_call(choice, delta) for delta in deltas]
        if not self._functions:
            return {"tool_calls": calls}
        # The old protocol has room for one call.
        first = (call["function"] for call in calls if call["index"] == 0)
        return {"function_call": call} if (call := next(first, None)) else {}


def _call(choice: _Choice, delta: ToolCallDelta | ToolCall) -> dict[str, Any]:
    """Index on every piece; id, type and name on the first of a call only."""
    key = call_key(choice.calls, delta)
    known = key in choice.calls
    index = choice.calls.setdefault(key, len(choice.calls))
    text = "input" if delta.type == "custom" else "arguments"
    if isinstance(delta, ToolCall) and not known:
        told: dict[str, Any] = {text: delta.arguments_text()}
    else:
        told = {text: as_json_text(delta.arguments)}
    extra = {} if delta.extra_content is None else {"extra_content": delta.extra_content}
    if known:
        return {"index": index, delta.type: told, **extra}
    call_id = delta.id or f"call_{secrets.token_hex(12)}"
    told = {"name": delta.name or "", **told}
    return {"index": index, "id": call_id, "type": delta.type, delta.type: told, **extra}
