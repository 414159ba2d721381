"""What is odd in a provider's choices: mended, or left out where the answer does without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from .openai_logprobs import likely

Raws = dict[str, msgspec.Raw]

# Reading anew takes long: what is longer is cut, and none.
_MOST_REWRITTEN = 1 << 20
_decode = msgspec.json.decode
_encode = msgspec.json.encode


def mended(choices: msgspec.Raw) -> msgspec.Raw:
    """The choices as OpenAI would tell them. Raises `DecodeError` for what are none."""
    given = _decode(choices, type=list[Raws] | None)
    for choice in given or ():
        if "logprobs" in choice:
            choice["logprobs"] = _told(likely(_decode(choice["logprobs"])))
        for name in {"message", "delta"} & choice.keys():
            choice[name] = _said(choice[name])
        drop(choice, index=int)
    return _told(given)


def rewritten(data: bytes | str) -> str:
    """What Python and JavaScript write as JSON, as JSON. Raises `DecodeError` for what is none.

    Numbers that are none are null; half of a surrogate pair, and bytes that are no text, U+FFFD.
    """
    text = data if isinstance(data, str) else data.decode(errors="replace")
    try:
        given = json.loads(text[:_MOST_REWRITTEN], parse_constant=_nothing)
        told = json.dumps(given, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        message = "no JSON"
        raise msgspec.DecodeError(message) from error
    return told.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _nothing(_: str) -> None:
    """A number that is none."""


def drop(given: Raws, **kinds: type) -> None:
    """Leave out what is not of its kind."""
    for name, kind in kinds.items():
        if name in given and not isinstance(_decode(given[name]), kind):
            del given[name]


def _said(message: msgspec.Raw) -> msgspec.Raw:
    given: Raws = _decode(message, type=Raws | None) or {}
    drop(given, refusal=str, annotations=list, audio=dict)
    drop(given, reasoning_content=str, reasoning_details=list)
    if "content" in given and isinstance(parts := _decode(given["content"]), list):
        # Mistral's thoughts stand in parts of their own, beside those of text.
        given["content"] = _told("".join(_texts(parts, "text")))
        if thoughts := "".join(_texts(parts, "thinking")):
            given.setdefault("reasoning_content", _told(thoughts))
    return _told(given)


def _texts(parts: Any, kind: str) -> Iterator[str]:
    """The texts of all parts of a kind, which may be parts themselves."""
    for part in cast("list[object]", parts):
        if isinstance(part, dict):
            inner = cast("dict[str, Any]", part)
            if inner.get("type") == kind:
                found = inner.get(kind)
                yield from _texts(found, "text") if isinstance(found, list) else [str(found or "")]


def _told(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))
