"""Options: a plugin's block of config.yaml."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType, inspect

from .backend import fitted, positional, required
from .errors import ConfigError, RegistrationError
from .secret import decode_hook
from .spelling import nearest

T = TypeVar("T")

_BLOCK: Any = (dict, UnsetType)
_UNKNOWN = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)
_STEP = re.compile(r"\[(?:\d+|\.\.\.)\]|[^.\[\]]+")


class Change(msgspec.Struct, frozen=True):
    """One option that changed: its dotted path, and its new value, None if it is gone."""

    path: str
    value: Any


class Options:
    """A plugin's block of config.yaml."""

    def __init__(self, plugin: str, values: Mapping[str, Any]) -> None:
        self._plugin = plugin
        self._values = dict(values)
        self.listeners: list[Callable[[str, Any, dict[str, Any]], Any]] = []

    def on_change(self, listener: Callable[..., Any]) -> None:
        """Call `listener(key_path, value, whole)`, sync or async, for each option that changes.

        `key_path` is dotted (`colours.red`), `value` None for a key that is gone, `whole` a copy of
        all options; a listener may take fewer parameters. By then `get` and `decode` see the new
        values. Only a server that `harperpy dev` started hears of changes; without a listener it is
        started anew instead. Raises `RegistrationError` for what cannot be called so.
        """
        expected = "a function of (key_path, value, whole), or of the first of them"
        check_listener(listener, 3, f"plugins.{self._plugin}: options.on_change", expected)
        self.listeners.append(fitted(listener, 3))

    def changes(self, values: Mapping[str, Any]) -> list[Change]:
        """What these values would change."""
        return list(_differences(self._values, values))

    def replace(self, values: Mapping[str, Any]) -> None:
        """Have these values from now on."""
        self._values = dict(values)

    def whole(self) -> dict[str, Any]:
        """A copy of all values."""
        return copy.deepcopy(self._values)

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


def check_listener(listener: object, most: int, where: str, expected: str) -> None:
    """Raises `RegistrationError` for what cannot be called with `most` arguments, or the first."""
    if not callable(listener):
        message = f"{where}: expected {expected}, got {type(listener).__name__}"
        raise RegistrationError(message)
    if (needs := required(listener)) > positional(listener, most):
        message = f"{where}: expected {expected}, got one that needs {needs} arguments"
        raise RegistrationError(message)


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], inside: str = ""
) -> Iterator[Change]:
    """Leaf by leaf; a list is a leaf, and a block that comes or goes is all of its leaves."""
    for key in {**before, **after}:
        old: Any = before.get(key, UNSET)
        new: Any = after.get(key, UNSET)
        if isinstance(old, _BLOCK) and isinstance(new, _BLOCK):
            yield from _differences(old or {}, new or {}, f"{inside}{key}.")
        # `1` is not `true`, though they are equal.
        elif repr(old) != repr(new):
            yield Change(f"{inside}{key}", None if new is UNSET else new)


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
