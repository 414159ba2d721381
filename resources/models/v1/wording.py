"""What is wrong with a body, in OpenAI's words and with its codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard, cast

from msgspec import inspect

from harperpy import InvalidBody

_NAMES = {
    "int": "an integer",
    "float": "a decimal number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_STEP = re.compile(r"[^.\[\]]+|\[\d*\]")


def reworded(error: InvalidBody, kind: Any, body: Any) -> InvalidBody:
    """The refusal of a JSON body as one of a kind, as OpenAI would word it."""
    if not error.errors:
        return error
    told = str(error.errors[0]["message"])
    path = (error.param or "").replace("[...]", "")
    for pattern, word in _WORDS:
        if found := pattern.fullmatch(told):
            code, message = word(found, path)
            values = dict.fromkeys(_supported(inspect.type_info(kind), _STEP.findall(path), body))
            if values and code == "invalid_value":
                message += f" Supported values are: {', '.join(map(repr, values))}."
            return InvalidBody(message, param=path or None, code=code, errors=error.errors)
    return InvalidBody(f"Invalid body: {told}.", param=path or None, errors=error.errors)


def _missing(_: re.Match[str], path: str) -> tuple[str, str]:
    return "missing_required_parameter", f"Missing required parameter: '{path}'."


def _wrong_type(found: re.Match[str], path: str) -> tuple[str, str]:
    names = [name for name in found[1].split(" | ") if name != "null"] or ["null"]
    expected = " or ".join(_NAMES.get(name, name) for name in names)
    got = f", but got {_NAMES.get(found[2], found[2])} instead" if found[2] else ""
    where = f" for '{path}'" if path else ": the body of the request"
    return "invalid_type", f"Invalid type{where}: expected {expected}{got}."


def _out_of_range(found: re.Match[str], path: str) -> tuple[str, str]:
    name = "integer" if found[1] == "int" else "decimal"
    above = found[2].startswith("<")
    side, word = ("above maximum", "above_max") if above else ("below minimum", "below_min")
    limit = found[3].removesuffix(".0")
    message = f"Invalid '{path}': {name} {side} value. Expected a value {found[2]} {limit}."
    return f"{name}_{word}_value", message


def _wrong_length(found: re.Match[str], path: str) -> tuple[str, str]:
    name = {"str": "string"}.get(found[1], found[1])
    most = found[2] == "<="
    if name == "array" and not most and found[3] == "1":
        message = f"Invalid '{path}': empty array. Expected an array with minimum length 1."
        return "empty_array", message
    side, word = ("too long", "above_max") if most else ("too short", "below_min")
    limit = f"{'maximum' if most else 'minimum'} length {found[3]}"
    article = "an" if name[0] in "ao" else "a"
    message = f"Invalid '{path}': {name} {side}. Expected {article} {name} with {limit}."
    return f"{name}_{word}_length", message


def _wrong_pattern(found: re.Match[str], path: str) -> tuple[str, str]:
    # JSON Schema's way to write the end, and OpenAI's.
    pattern = re.sub(r"\\+Z$", "$", found[1])
    message = (
        f"Invalid '{path}': string does not match pattern. "
        f"Expected a string that matches the pattern '{pattern}'."
    )
    return "invalid_value", message


def _wrong_value(found: re.Match[str], path: str) -> tuple[str, str]:
    return "invalid_value", f"Invalid value for '{path}': {found[1]}."


def _supported(node: inspect.Type, path: list[str], value: Any) -> Iterator[Any]:
    """The values that may stand at the end of a path into a JSON value."""
    if isinstance(node, inspect.UnionType):
        for one in _meant(node, value):
            yield from _supported(one, path, value)
    elif not path:
        yield from node.values if isinstance(node, inspect.LiteralType) else ()
    elif isinstance(node, inspect.StructType):
        step, *rest = path
        if step == node.tag_field and not rest:
            yield node.tag
        inner = _field(value, step)
        for field in node.fields:
            if field.encode_name == step:
                yield from _supported(field.type, rest, inner)
    elif isinstance(node, inspect.ListType):
        at = int(path[0][1:-1] or 0)
        item = value[at] if _is_list(value) and at < len(value) else None
        yield from _supported(node.item_type, path[1:], item)


def _meant(node: inspect.UnionType, value: Any) -> Sequence[inspect.Type]:
    """Of several types the one that the value's tag names, else all."""
    structs = [one for one in node.types if isinstance(one, inspect.StructType)]
    tagged = [one for one in structs if one.tag == _field(value, one.tag_field)]
    return tagged if tagged and tagged[0].tag is not None else node.types


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _field(value: Any, name: str | None) -> Any:
    return cast("dict[str | None, Any]", value).get(name) if isinstance(value, dict) else None


_WORDS: tuple[tuple[re.Pattern[str], Callable[..., tuple[str, str]]], ...] = (
    (re.compile(r"Object missing required field `.+`"), _missing),
    (re.compile(r"Expected `([^`]+)`(?:, got `(.+)`)?"), _wrong_type),
    (re.compile(r"Expected `(int|float)` ([<>]=?) (.+)"), _out_of_range),
    (re.compile(r"Expected `(\w+)` of length ([<>]=) (\d+)"), _wrong_length),
    (re.compile(r"Expected `str` matching regex '(.+)'"), _wrong_pattern),
    (re.compile(r"Invalid (?:enum )?value (.+)", re.DOTALL), _wrong_value),
)
