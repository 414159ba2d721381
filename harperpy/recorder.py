"""Recorder: one attempt at a model, timed and counted until its row is written."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from .accounting import Admission, Ledger, ModelCall, clipped
from .batches import Texts
from .errors import (
    Aborted,
    BackendError,
    BackendTimeout,
    CapabilityError,
    HarperError,
    ModelNotFound,
    TransactionError,
)
from .messages import (
    Choice,
    GenerateChunk,
    GenerateResult,
    Message,
    Prompt,
    TokenUsage,
    estimate_tokens,
)
from .vocabulary import EmbedInputs

_MOST = 2**53
# What few providers count.
_RARER = ("cached_tokens", "reasoning_tokens", "gpu_ms")
_NOTHING_RARER = (None,) * len(_RARER)


class Source:
    """Where a streamed answer comes from, and how much of it has come."""

    __slots__ = ("batches", "deltas", "letters")

    def __init__(self, batches: AsyncIterator[Any]) -> None:
        self.batches = batches
        self.deltas = self.letters = 0


class Recorder(msgspec.Struct, eq=False):
    """Times one attempt that has begun, and writes its row when it is closed, once.

    `admission` is who has admitted it, where someone was asked; `source` is closed when the attempt
    has failed; a whole answer has none.
    """

    ledger: Ledger
    call: ModelCall
    admission: Admission | None = None
    source: Source | None = None
    _closed: bool = False
    _started: int = msgspec.field(default_factory=time.perf_counter_ns)

    def observe(self, batch: Sequence[GenerateChunk | str]) -> None:
        """Note what has come: when the first of it did, usage, how much was said, why it ended."""
        source = self.source
        if source is None:
            return
        if not source.deltas and self.call.ttft_ms is None:
            self.call.ttft_ms = self._elapsed()
        if type(batch) is Texts:
            source.deltas += len(batch)
            source.letters += sum(map(len, batch))
        else:
            self._heed(batch, source)

    def _heed(self, batch: Sequence[GenerateChunk | str], source: Source) -> None:
        call, deltas, letters = self.call, source.deltas, source.letters
        for chunk in batch:
            if isinstance(chunk, str):
                deltas += 1
                letters += len(chunk)
                continue
            if text := chunk.delta_content:
                deltas += 1
                letters += len(text)
            elif thought := chunk.delta_reasoning_content:
                deltas += 1
                letters += len(thought)
            elif chunk.delta_tool_calls or chunk.delta_refusal:
                deltas += 1
            if chunk.finish_reason:
                call.finish_reason = clipped(chunk.finish_reason)
            if chunk.usage:
                self.count(chunk.usage)
        source.deltas, source.letters = deltas, letters

    def count(self, usage: TokenUsage) -> None:
        """Note the tokens a provider reported, which are plain numbers from then on.

        What is none, or no database could hold, is left out.
        """
        call = self.call
        asked, answered = usage.prompt_tokens, usage.completion_tokens
        embedded = usage.embedding_tokens
        if asked is not None and (type(asked) is not int or not 0 <= asked < _MOST):
            asked = usage.prompt_tokens = _whole(asked)
        if asked is not None:
            call.prompt_tokens = asked
        if answered is not None and (type(answered) is not int or not 0 <= answered < _MOST):
            answered = usage.completion_tokens = _whole(answered)
        if answered is not None:
            call.completion_tokens = answered
        if embedded is not None and (type(embedded) is not int or not 0 <= embedded < _MOST):
            embedded = usage.embedding_tokens = _whole(embedded)
        if embedded is not None:
            call.embedding_tokens = embedded
        # Spelt out: to read them by `_RARER` takes five times as long.
        rarer = usage.cached_tokens, usage.reasoning_tokens, usage.gpu_ms
        if rarer != _NOTHING_RARER:
            self._count_rarer(usage)

    def _count_rarer(self, usage: TokenUsage) -> None:
        for field in _RARER:
            if (value := getattr(usage, field)) is not None:
                number = _time(value) if field == "gpu_ms" else _whole(value)
                setattr(usage, field, number)
                if number is not None:
                    setattr(self.call, field, number)

    @property
    def counted(self) -> bool:
        """Whether it is known what was asked, and what was answered."""
        return self.call.prompt_tokens is not None and self.call.completion_tokens is not None

    def estimate(self, prompt: Prompt, completion_tokens: int | None = None) -> TokenUsage:
        """All tokens, those estimated that a provider did not report; the row says so.

        A streamed delta is a token for most providers; some send more text at once.
        """
        call = self.call
        call.usage_estimated = True
        if call.prompt_tokens is None:
            call.prompt_tokens = asked_tokens(prompt)
        if call.completion_tokens is None:
            if completion_tokens is None:
                source = self.source
                completion_tokens = max(source.deltas, source.letters // 5) if source else 0
            call.completion_tokens = completion_tokens
        return TokenUsage(
            prompt_tokens=call.prompt_tokens,
            completion_tokens=call.completion_tokens,
            cached_tokens=call.cached_tokens,
            reasoning_tokens=call.reasoning_tokens,
        )

    def close(self, error: BaseException | None, asked: Prompt | EmbedInputs | None = None) -> None:
        """Write the row. `asked` is what a provider had been asked when it failed or was left."""
        if self._closed:
            return
        self._closed = True
        call = self.call
        call.latency_ms = self._elapsed()
        if error is None:
            call.success = True
        else:
            call.error_code = error_code(error)
            call.upstream_status = _whole(getattr(error, "upstream_status", None))
            if isinstance(error, HarperError) and isinstance(error.usage, TokenUsage):
                self.count(error.usage)
        if asked is not None:
            self._bill(asked)
        self.ledger.record(call, self.admission)

    def _bill(self, asked: Prompt | EmbedInputs) -> None:
        """Count what a provider bills of who leaves: what a stream had brought, or the prompt."""
        call = self.call
        if isinstance(asked, Prompt) and self.source is not None and self.source.deltas:
            if not self.counted:
                self.estimate(asked)
        elif call.error_code == "aborted" and call.prompt_tokens is call.embedding_tokens is None:
            call.usage_estimated = True
            if isinstance(asked, Prompt):
                call.prompt_tokens = asked_tokens(asked)
            else:
                call.embedding_tokens = asked.estimate()

    def _elapsed(self) -> float:
        return (time.perf_counter_ns() - self._started) // 1000 / 1000


def asked_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt is."""
    tools = estimate_tokens(msgspec.json.encode(prompt.tools).decode()) if prompt.tools else 0
    return tools + sum(_written(message, message.text) + 4 for message in prompt.messages)


def answered_tokens(result: GenerateResult) -> int:
    """About how many tokens a whole answer is."""
    return sum(_written(choice, choice.content) for choice in (result, *result.others))


def _written(told: Message | Choice, text: str) -> int:
    """About how many tokens somebody said, thought or refused, and called with."""
    tokens = 0
    # Who only calls a tool may say None.
    for said in (text, told.reasoning_content, told.refusal):
        if said:
            tokens += estimate_tokens(said)
    for call in told.tool_calls or ():
        tokens += estimate_tokens(call.name) + estimate_tokens(call.arguments_text())
    return tokens


def _whole(value: Any) -> int | None:
    """As a plain number, whatever kind of number a backend reckons in; None for what is none."""
    try:
        count = math.ceil(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return count if 0 <= count < _MOST else None


def _time(value: Any) -> float | None:
    """The same of a time in ms."""
    try:
        time_ms = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return time_ms if 0 <= time_ms < _MOST else None


def error_code(error: BaseException) -> str:
    """The code a failed attempt's row carries."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit, Aborted, TransactionError)):
        return "aborted"
    if isinstance(error, (BackendTimeout, TimeoutError)):
        return "timeout"
    if isinstance(error, CapabilityError):
        return "capability_unsupported"
    if isinstance(error, ModelNotFound):
        return "backend_not_found"
    if isinstance(error, BackendError) and error.stale:
        return "connection_lost"
    return "backend_error"
