"""What the answers of an OpenAI-compatible provider mean."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeVar

import msgspec

from harperpy import (
    BackendError,
    Choice,
    GenerateChunk,
    GenerateResult,
    TokenUsage,
)

from .openai_calls import Called, Calls, Function, whole_call
from .openai_logprobs import Logprobs
from .openai_pattern import Pattern, pattern_of
from .openai_refusals import says, told_refusal
from .openai_usage import Usage, understood

C = TypeVar("C", bound=Choice)


class _Struct(msgspec.Struct, gc=False):
    """A part of a provider's answer; what we do not know in it is passed over."""


class _Said(_Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[Called] | None = None
    # The old protocol's.
    function_call: Function | None = None
    reasoning_content: str | None = None
    # Another word for the same.
    reasoning: Any = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    # OpenRouter's: without them some models refuse the call's result.
    reasoning_details: list[Any] | None = None

    @property
    def calls(self) -> list[Called]:
        """The calls, or pieces of them."""
        if self.function_call is not None:
            return [Called(index=0, function=self.function_call)]
        return self.tool_calls or []

    @property
    def thought(self) -> str | None:
        """What the model thought before it answered."""
        told = self.reasoning_content or self.reasoning
        return told if isinstance(told, str) and told else None


class _Choice(_Struct):
    index: int = 0
    logprobs: Logprobs | None = None
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: str | None = None
    # OpenRouter's, of a provider that failed behind it.
    error: Any = None


class _Whole(_Struct):
    """What is said of an answer as a whole."""

    usage: Usage | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    moderation: dict[str, Any] | None = None

    def tell(self, news: GenerateChunk) -> None:
        """Add all of it that says something."""
        if self.usage is not None and (usage := self.usage.tokens()) is not None:
            news.usage = usage
        if self.system_fingerprint is not None:
            news.system_fingerprint = self.system_fingerprint
        if self.service_tier is not None:
            news.service_tier = self.service_tier
        if self.moderation is not None:
            news.moderation = self.moderation


class _Completion(_Whole):
    """A whole answer."""

    choices: list[_Choice] = []


class _Chunk(_Whole):
    choices: list[_Choice] | None = None
    error: Any = None


# What few answers have besides text.
_RARER = (
    *("refusal", "tool_calls", "function_call", "reasoning_content"),
    *("reasoning", "annotations", "audio", "reasoning_details"),
)
_rarer_of, _NOTHING_RARER = attrgetter(*_RARER), (None,) * len(_RARER)
_WHOLE = ("system_fingerprint", "service_tier", "moderation")
_whole_of, _NOTHING_WHOLE = attrgetter(*_WHOLE), (None,) * len(_WHOLE)
_completion = msgspec.json.Decoder(_Completion).decode
_event = msgspec.json.Decoder(_Chunk).decode
_SILENCE, _NO_NEWS = _Said(), GenerateChunk()
_NO_REASONS: frozenset[int] = frozenset()
# Words of Mistral, Gemini, GLM and DeepSeek for what OpenAI has two of its own, and none.
_REASONS = {
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "safety", "recitation", "sensitive"), "content_filter"),
}
_FAILED = frozenset({"error", "abort", "network_error", "insufficient_system_resource"})
# How often a pattern is looked for in a stream whose events have none in common.
_LOOKS = 3


def whole_answer(data: bytes, n: int | None = None) -> GenerateResult:
    """An answer's choices, as many as were asked for.

    Raises `DecodeError`, and `BackendError` where there is none.
    """
    told = understood(_completion, data)
    given = told.choices
    if not given:
        message = "an answer without a choice"
        raise _billed(BackendError(message), told)
    try:
        if len(given) > 1:
            given = sorted(given, key=lambda choice: choice.index)[: n or 1]
        result = GenerateResult(
            usage=None if told.usage is None else told.usage.tokens(),
            system_fingerprint=told.system_fingerprint,
            service_tier=told.service_tier,
            moderation=told.moderation,
        )
        _tell(given[0], result)
        if len(given) > 1:
            result.others = [_tell(choice, Choice()) for choice in given[1:]]
    except BackendError as error:
        _billed(error, told)
        raise
    return result


def _billed(error: BackendError, told: _Completion) -> BackendError:
    """The error of an answer with its usage: what has failed is billed all the same."""
    error.usage = None if told.usage is None else told.usage.tokens()
    return error


def _tell(choice: _Choice, result: C) -> C:
    said, likely, reason = choice.message, choice.logprobs, choice.finish_reason
    if said is None or (choice.error is not None and says(choice.error)):
        message = "a choice without a message"
        raise BackendError(message)
    result.content = said.content or ""
    calls: list[Called] = []
    if _rarer_of(said) != _NOTHING_RARER:
        calls = said.calls
        result.tool_calls = [whole_call(call) for call in calls] or None
        result.refusal = said.refusal
        result.reasoning_content = said.thought
        result.annotations = said.annotations
        result.audio = said.audio
        result.reasoning_details = said.reasoning_details
    # It is the reason of what says none.
    if calls or reason != "stop":
        result.finish_reason = finish_reason(reason or "stop", calls=bool(calls))
    if likely is not None:
        result.logprobs, result.refusal_logprobs = likely.content, likely.refusal
    return result


def finish_reason(given: str, *, calls: bool) -> Any:
    """The standard reason for a provider's own word, in agreement with what the answer holds.

    Raises `BackendError` for one that says that the answer failed.
    """
    # Gemini tells after a colon what it did not like.
    word = given.lower().partition(":")[0]
    if word in _FAILED:
        message = f"the provider's answer ended with {word!r}"
        raise BackendError(message)
    return _REASONS.get(word) or ("tool_calls" if calls else "stop")


class ChunkReader:
    """Turns a stream's events into chunks, and knows whether it came to its end.

    Of choices that nobody asked for it says nothing. `secret` is what no error may tell. `pattern`
    is that of the events that now bring text.
    """

    __slots__ = (
        *("_begun", "_calls", "_last", "_looks", "_n", "_news", "_secret"),
        *("ended", "pattern", "reasons"),
    )

    def __init__(self, n: int | None = None, secret: str | None = None) -> None:
        self._n = n or 1
        self._secret = secret
        # Most providers say in each event the same of the answer as a whole.
        self._last = _NOTHING_WHOLE
        self._news: GenerateChunk | None = None
        self.pattern: Pattern | None = None
        self._looks = _LOOKS
        self._begun: tuple[int, ...] = ()
        self._calls: dict[int, Calls] = {}
        self.reasons = _NO_REASONS
        self.ended = False

    def read_all(self, events: Sequence[str], batch: list[GenerateChunk]) -> None:
        """Put what `read` makes of each into a batch, until one raises.

        By a shorter way for those that bring text as one before did.
        """
        at = 0
        while at < len(events):
            if (pattern := self.pattern) is not None:
                texts, index = pattern.texts(events, at), pattern.index
                batch += [GenerateChunk(index=index, delta_content=text) for text in texts if text]
                at += len(texts)
            if at < len(events):
                batch += self.read(events[at])
                at += 1

    def read(self, data: str) -> Sequence[GenerateChunk]:
        """The chunks of one event, none for one that brings nothing. Raises what it tells of."""
        if self.ended or data == "[DONE]":
            self.ended, self.pattern = True, None
            return ()
        try:
            event = understood(_event, data)
        except msgspec.DecodeError as error:
            return self._read_odd(data.strip(), error)
        whole = _whole_of(event)
        if whole != self._last or event.usage is not None:
            self._take(event)
            self._last = whole
        if event.error is not None or event.choices is None:
            self._heed(data)
        chunks: list[GenerateChunk] = []
        for choice in event.choices or ():
            if choice.error is not None:
                self._heed(data)
            chunk = self._chunk(choice)
            if chunk is not None:
                chunks.append(chunk)
        if self._news is not None:
            return self._with_news(self._news, chunks)
        if self._looks and len(chunks) == 1:
            self._look(data, chunks[0])
        return chunks

    def _read_odd(self, told: str, error: Exception) -> Sequence[GenerateChunk]:
        """What is no JSON, or none that is understood, may be blank around what is."""
        if not told or told == "[DONE]":
            return self.read(told) if told else ()
        self._heed(told)
        message = "an event of the stream is not what it should be"
        raise BackendError(message) from error

    def _look(self, data: str, chunk: GenerateChunk) -> None:
        """Note the pattern of an event that has brought text alone."""
        text, known = chunk.delta_content, self.pattern
        if text is None or chunk != GenerateChunk(index=chunk.index, delta_content=text):
            return
        self._looks = _LOOKS if known is not None and known.used else self._looks - 1
        pattern, another = pattern_of(data, text, chunk.index), f"{text}."
        # The same text may stand elsewhere too.
        found = pattern is not None and _says(pattern.event(another), another)
        self.pattern = pattern if found else None

    def _heed(self, data: str) -> None:
        """Raise the error that an event tells, if it does."""
        self.pattern = None
        if (error := told_refusal(data, self._secret)) is not None:
            raise error

    def _take(self, event: _Chunk) -> None:
        """Note what is new of the answer as a whole."""
        self.pattern = None
        news = self._news or GenerateChunk()
        event.tell(news)
        if news != _NO_NEWS:
            self._news = news

    def _with_news(
        self, news: GenerateChunk, chunks: list[GenerateChunk]
    ) -> Sequence[GenerateChunk]:
        # Usage may be the last that is heard. The rest alone would pass for the answer's beginning.
        if not chunks:
            if news.usage is None:
                return chunks
            chunks = [GenerateChunk()]
        first = chunks[0]
        first.usage = news.usage
        first.system_fingerprint = news.system_fingerprint
        first.service_tier = news.service_tier
        first.moderation = news.moderation
        self._news = None
        return chunks

    @property
    def unheard(self) -> TokenUsage | None:
        """The usage that came with what has failed."""
        return None if self._news is None else self._news.usage

    @property
    def is_complete(self) -> bool:
        """Whether every choice that began has said why it ended."""
        return bool(self.reasons) and not self._silent

    @property
    def _silent(self) -> set[int]:
        return {*(self._begun or (0,))} - self.reasons

    def finish(self) -> Sequence[GenerateChunk]:
        """The reasons that a whole stream kept to itself. Raises `BackendError` for a cut one."""
        silent = self._silent
        if silent and not self.ended:
            message = "the stream ended before the answer did"
            raise BackendError(message)
        chunks = [self._ended(index) for index in sorted(silent)]
        return chunks if self._news is None else [*chunks, self._news]

    def _ended(self, index: int) -> GenerateChunk:
        calls = self._calls.get(index) or Calls()
        reason = finish_reason("stop", calls=bool(calls))
        held_back = calls.held_back(whole=True) or None
        return GenerateChunk(index=index, delta_tool_calls=held_back, finish_reason=reason)

    def _chunk(self, choice: _Choice) -> GenerateChunk | None:
        index, said = choice.index, choice.delta or choice.message or _Said()
        if index not in self._begun:
            if not 0 <= index < self._n:
                return None
            self._begun += (index,)
        text, said.content = said.content, None
        if said == _SILENCE and choice.finish_reason is None and choice.logprobs is None:
            return GenerateChunk(index=index, delta_content=text) if text else None
        return self._more_than_text(choice, said, text or None)

    def _more_than_text(
        self, choice: _Choice, said: _Said, text: str | None
    ) -> GenerateChunk | None:
        given = said.calls
        if (calls := self._calls.get(choice.index)) is None:
            calls = Calls()
            if given:
                self._calls[choice.index] = calls
        deltas = calls.read(given)
        thoughts = said.thought, said.reasoning_details
        pieces = (text, said.refusal, deltas, *thoughts, said.annotations, said.audio)
        likely = choice.logprobs and (choice.logprobs.content or choice.logprobs.refusal)
        reason = choice.finish_reason
        if reason:
            reason = finish_reason(reason, calls=bool(calls))
            self.reasons |= {choice.index}
            deltas += calls.held_back(whole=reason == "tool_calls")
        elif not (any(pieces) or likely):
            return None
        return GenerateChunk(
            index=choice.index,
            delta_content=text,
            delta_refusal=said.refusal or None,
            delta_tool_calls=deltas or None,
            delta_reasoning_content=said.thought,
            delta_annotations=said.annotations or None,
            delta_audio=said.audio or None,
            finish_reason=reason or None,
            logprobs=choice.logprobs.content if choice.logprobs else None,
            refusal_logprobs=choice.logprobs.refusal if choice.logprobs else None,
            delta_reasoning_details=said.reasoning_details or None,
        )


def _says(data: str, text: str) -> bool:
    """Whether this is the text that an event's choice brings."""
    try:
        event = understood(_event, data)
    except msgspec.DecodeError:
        return False
    said = [choice.delta or choice.message for choice in event.choices or ()]
    return [text] == [one and one.content for one in said]
