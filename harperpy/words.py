"""The words of the command line: the parameters of an operation, and how it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import yaml

AIM = ("target", "auth_username", "auth_password")
"""What says where an operation goes, and who asks: text, whatever it looks like."""


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
        read = _value(value)
        found[key] = value if key in AIM and not isinstance(read, str) else read
    return found


def answer(result: Any, *, as_json: bool) -> str:
    """What an operation answers, as YAML or JSON; a message alone is the text that it is."""
    # Over HTTP a sentence comes as a message.
    result = {"message": result} if isinstance(result, str) else result
    encoded = msgspec.json.encode(result)
    if as_json:
        return msgspec.json.format(encoded, indent=2).decode()
    match plain := msgspec.json.decode(encoded):
        case None:
            return ""
        case {"message": str(text)} if len(plain) == 1:
            return text
        case _:
            return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip("\n")


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
