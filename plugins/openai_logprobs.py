"""Logprobs: how likely a provider says that tokens were; what is odd of that, left out."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from harperpy import TokenLogprob

# OpenAI's number for what is hardly possible; who reckons with minus infinity writes null.
_UNLIKELY = -9999.0


class Logprobs(msgspec.Struct, gc=False):
    """Those of a choice."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


def likely(given: Any) -> Logprobs | None:
    """What a provider tells, in whatever form; None where nobody can understand it."""
    for token in _maps(given):
        _mend(token)
        for other in _maps({"content": token.get("top_logprobs")}):
            _mend(other)
    try:
        return msgspec.convert(given, Logprobs)
    except msgspec.ValidationError:
        return None


def _mend(token: dict[str, Any]) -> None:
    if token.get("logprob", 0) is None:
        token["logprob"] = _UNLIKELY
    if token.get("top_logprobs", ()) is None:
        del token["top_logprobs"]


def _maps(given: Any) -> list[dict[str, Any]]:
    """The tokens, as far as they are told in the form that they have to be."""
    told = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    lists = [told.get(kind) for kind in ("content", "refusal")]
    found = [cast("list[object]", one) for one in lists if isinstance(one, list)]
    return [cast("dict[str, Any]", it) for one in found for it in one if isinstance(it, dict)]
