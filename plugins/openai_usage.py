"""Usage: what a provider says that an answer took; what in it is odd, and beside it, left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from harperpy import TokenUsage

from .openai_odd import drop, mended, rewritten

T = TypeVar("T")

_TEXTS = ("text_tokens", "audio_tokens", "image_tokens")
_OF_PROMPT = (*_TEXTS, "cache_write_tokens")
_OF_COMPLETION = (*_TEXTS, "accepted_prediction_tokens", "rejected_prediction_tokens")
_MOST_TOKENS = 2**53
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=_MOST_TOKENS)]
_decode = msgspec.json.decode
_encode = msgspec.json.encode


class Usage(msgspec.Struct, gc=False):
    """A provider's usage; whatever in the details is no count of tokens is passed over.

    Some send zeros where they count nothing, or nothing yet: no call is so short.
    """

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    prompt_tokens_details: dict[str, Any] | None = None
    completion_tokens_details: dict[str, Any] | None = None
    # What DeepSeek and Kimi call the tokens that the details should count.
    prompt_cache_hit_tokens: Any = None
    cached_tokens: Any = None

    @property
    def asked(self) -> int | None:
        """What was asked, where nothing else is counted."""
        return self.prompt_tokens or self.total_tokens or None

    def tokens(self) -> TokenUsage | None:
        """As harperpy counts; None where it says neither what was asked nor what was answered."""
        asked, answered = self.prompt_tokens or None, self.completion_tokens or None
        if asked is None and answered is None:
            return None
        # xAI and Gemini count thoughts in the total alone: what is beyond the prompt was answered.
        if asked is not None and (total := self.total_tokens) and total > asked + (answered or 0):
            answered = total - asked
        usage = TokenUsage(prompt_tokens=asked, completion_tokens=answered)
        if details := self.prompt_tokens_details:
            usage.cached_tokens = _count(details.get("cached_tokens"))
            usage.prompt_details = _counts(details, _OF_PROMPT)
        if usage.cached_tokens is None:
            usage.cached_tokens = _count(self.prompt_cache_hit_tokens or self.cached_tokens)
        if details := self.completion_tokens_details:
            usage.reasoning_tokens = _count(details.get("reasoning_tokens"))
            usage.completion_details = _counts(details, _OF_COMPLETION)
        return usage


def understood(decode: Callable[[Any], T], data: bytes | str) -> T:
    """What an answer says; without what in it is odd, where that is nothing that matters.

    Raises `DecodeError`.
    """
    try:
        return decode(data)
    except msgspec.ValidationError:
        return decode(_mended(data))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return understood(decode, rewritten(data))


def _mended(data: bytes | str) -> bytes:
    """An answer without what is odd of what it says beside the answer itself."""
    given = _decode(data, type=dict[str, msgspec.Raw])
    drop(given, system_fingerprint=str, service_tier=str, moderation=dict, usage=dict)
    if "usage" in given:
        told = _decode(given["usage"], type=dict[str, msgspec.Raw])
        drop(told, prompt_tokens_details=dict, completion_tokens_details=dict)
        for name in {"prompt_tokens", "completion_tokens", "total_tokens"} & told.keys():
            told[name] = msgspec.Raw(_encode(_count(_decode(told[name]))))
        given["usage"] = msgspec.Raw(_encode(told))
    if "choices" in given:
        given["choices"] = mended(given["choices"])
    return _encode(given)


def _counts(details: dict[str, Any], names: tuple[str, ...]) -> dict[str, int] | None:
    found = ((name, _count(details.get(name))) for name in names)
    return {name: count for name, count in found if count is not None} or None


def _count(value: Any) -> int | None:
    if type(value) is int:
        return value if 0 <= value < _MOST_TOKENS else None
    return _count(int(value)) if type(value) is float and value.is_integer() else None
