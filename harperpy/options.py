"""Options: a plugin's block of config.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from .errors import ConfigError
from .secret import decode_hook
from .spelling import nearest

T = TypeVar("T")

_UNKNOWN = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)
_STEP = re.compile(r"\[(?:\d+|\.\.\.)\]|[^.\[\]]+")


class Options:
    """A plugin's block of config.yaml."""

    def __init__(self, plugin: str, values: Mapping[str, Any]) -> None:
        self._plugin = plugin
        self._values = dict(values)

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self._values
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = cast("Mapping[str, Any]", value)[name]
        return value

    def decode(self, kind: type[T]) -> T:
        """The block as a msgspec Struct. Raises `ConfigError` naming what does not fit.

        A Struct with `forbid_unknown_fields` refuses misspelt keys, and the nearest is named.
        """
        try:
            return msgspec.convert(self._values, kind, strict=False, dec_hook=decode_hook)
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$")
            path = path.rstrip("`")
            if unknown := _UNKNOWN.fullmatch(text):
                text = f"unknown key; {nearest(unknown[1], _keys(kind, path), 'keys')}"
                path = f"{path}.{unknown[1]}"
            message = f"config.yaml: plugins.{self._plugin}{path}: {text}"
            raise ConfigError(message) from error


def _keys(kind: Any, path: str) -> set[str]:
    """What a key may be called at a path of msgspec's (`.chapters[0]`) inside of a type."""
    found = [*_plain(inspect.type_info(kind))]
    for step in _STEP.findall(path):
        found = [
            plain for each in found for inner in _inside(each, step) for plain in _plain(inner)
        ]
    return {
        field.encode_name
        for each in found
        if isinstance(each, inspect.StructType)
        for field in each.fields
    }


def _plain(kind: inspect.Type) -> Iterator[inspect.Type]:
    """A type without its notes; of a union, each of its types."""
    match kind:
        case inspect.Metadata():
            yield from _plain(kind.type)
        case inspect.UnionType():
            for each in kind.types:
                yield from _plain(each)
        case _:
            yield kind


def _inside(kind: inspect.Type, step: str) -> Iterator[inspect.Type]:
    match kind:
        case inspect.StructType():
            yield from (field.type for field in kind.fields if field.encode_name == step)
        case inspect.DictType():
            yield kind.value_type
        case inspect.ListType() | inspect.VarTupleType():
            yield kind.item_type
        case _:
            return
