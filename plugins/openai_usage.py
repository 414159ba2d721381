"""Usage: what a provider says that an answer took."""

from __future__ import annotations

from typing import Any

import msgspec

from harperpy import TokenUsage

_TEXTS = ("text_tokens", "audio_tokens", "image_tokens")
_OF_PROMPT = (*_TEXTS, "cache_write_tokens")
_OF_COMPLETION = (*_TEXTS, "accepted_prediction_tokens", "rejected_prediction_tokens")
_MOST_TOKENS = 2**53


class Usage(msgspec.Struct, gc=False):
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
        usage = TokenUsage(prompt_tokens=asked, completion_tokens=answered)
        if details := self.prompt_tokens_details:
            usage.cached_tokens = _count(details.get("cached_tokens"))
            usage.prompt_details = _counts(details, _OF_PROMPT)
        if details := self.completion_tokens_details:
            usage.reasoning_tokens = _count(details.get("reasoning_tokens"))
            usage.completion_details = _counts(details, _OF_COMPLETION)
        return usage


def _counts(details: dict[str, Any], names: tuple[str, ...]) -> dict[str, int] | None:
    found = ((name, _count(details.get(name))) for name in names)
    return {name: count for name, count in found if count is not None} or None


def _count(value: Any) -> int | None:
    if type(value) is int:
        return value if 0 <= value < _MOST_TOKENS else None
    return _count(int(value)) if type(value) is float and value.is_integer() else None
