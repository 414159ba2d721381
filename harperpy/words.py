"""The words after a command's name, as the parameters of an operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """`key=value`, `--key=value` and `--key value`; a `--key` alone is true.

    A value is JSON, or else the text it is. Raises `ValueError` for a word that is none of these,
    or a key that comes twice.
    """
    found: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if key and not equals and word.startswith("--"):
            value = "true" if not waiting or waiting[0].startswith("--") else waiting.pop(0)
        elif not (key and equals):
            message = f"expected key=value or --key value, got {word!r}"
            raise ValueError(message)
        key = key.replace("-", "_")
        if key in found:
            message = f"{key} is given twice"
            raise ValueError(message)
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
