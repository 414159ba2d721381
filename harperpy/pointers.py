"""Where in a JSON document something does not fit: msgspec's own path, as a JSON pointer.

msgspec names the fields and positions on the way, but `[...]` for any key of a mapping: which one
it was is found by asking again with ever fewer of the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Literal, cast, get_args, get_origin

import msgspec

from .spelling import nearest

_PLACE = re.compile(r" - at (`key` in )?`\$(.*)`$", re.DOTALL)
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.+)`", re.DOTALL)
_STEP = re.compile(r"\[(\d+|\.\.\.)\]|\.?([^.\[\]]+)")
_KEY = "..."
_NAME = re.compile(r"[^.\[\]]+")
# A client may call a field whatever it likes, and is told it several times.
_LONGEST = 1000


def told(message: str) -> tuple[str, str]:
    """A message of msgspec's, and the path that it names: `a[0].b`, `""` for the whole document."""
    path = ""
    if place := _PLACE.search(message):
        message = message[: place.start()]
        path = place[2].removeprefix(".") + ("[...]" if place[1] else "")
    if field := _FIELD.fullmatch(message):
        path = f"{path}.{field[1]}" if path else field[1]
    return message[:_LONGEST], path[:_LONGEST]


def pointer(path: str) -> str:
    """The path as a JSON pointer (RFC 6901)."""
    return _joined(_steps(path))


def hint(message: str, path: str, kind: Any) -> str:
    """The half-sentence that helps with a field of a Struct: its nearest name, or its words.

    It may be one of a Struct within, as far as names alone lead to it.
    """
    names = path.split(".")
    for outer in names[:-1]:
        kind = _struct((_fields(kind) or {}).get(outer))
    fields, path = _fields(kind), names[-1]
    if fields is None or not _NAME.fullmatch(path):
        return ""
    if message.startswith("Object contains unknown"):
        return f"; {nearest(path, fields, 'fields')}"
    if message.startswith("Invalid enum value") and (words := [*_words(fields.get(path))]):
        return f"; expected {', '.join(words)}"
    return ""


def _fields(kind: Any) -> dict[str, Any] | None:
    """The types of a Struct's fields; None for what is no Struct."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return None
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _struct(hinted: Any) -> Any:
    """The Struct that a field may hold, alone or beside others; None for none."""
    return next((one for one in (hinted, *get_args(hinted)) if _fields(one) is not None), None)


def _words(hinted: Any) -> Iterator[str]:
    """The words of a `Literal` or an `Enum`, within a union and a list too."""
    if isinstance(hinted, type) and issubclass(hinted, Enum):
        yield from (str(one.value) for one in hinted)
    for one in get_args(hinted):
        if get_origin(hinted) is Literal:
            yield str(one)
        else:
            yield from _words(one)


def exact(path: str, document: Any, complaint: Callable[[Any], str]) -> str:
    """The pointer, with the keys that msgspec leaves out.

    `complaint` says what msgspec holds against a document; the given one is left as it was.
    """
    steps = _steps(path)
    expected = complaint(document)
    here = document
    for at, step in enumerate(steps):
        if step == _KEY and isinstance(here, dict):
            fields = cast("dict[str, Any]", here)
            steps[at] = _guilty(fields, lambda: complaint(document) == expected)
        here = _inside(here, steps[at])
    return _joined(steps)


def _steps(path: str) -> list[str]:
    return [index or name for index, name in _STEP.findall(path)]


def _joined(steps: list[str]) -> str:
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)


def _inside(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get(step)
    if isinstance(value, list) and step.isdecimal():
        items = cast("list[object]", value)
        return items[int(step)] if int(step) < len(items) else None
    return None


def _guilty(fields: dict[str, Any], still: Callable[[], bool]) -> str:
    """The first key that the complaint is about: the keys are halved until one is left."""
    whole = dict(fields)
    names = list(whole)
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        fields.clear()
        fields.update((name, whole[name]) for name in names[: middle + 1])
        low, high = (low, middle) if still() else (middle + 1, high)
    fields.clear()
    fields.update(whole)
    return names[low] if names else _KEY
