"""Conditions: what a search compares, from JSON to SQL."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from harperpy import InvalidBody, has_part, nearest

from .places import Place

SYNONYMS = {
    "search_attribute": "attribute",
    "search_value": "value",
    "search_type": "comparator",
}

_MOST_CONDITIONS = 100
_MOST_LEVELS = 8
_LONGEST_PART = 200

Compared: TypeAlias = sa.ColumnElement[bool]


class Condition(msgspec.Struct, forbid_unknown_fields=True):
    """One comparison."""

    attribute: Annotated[str, Meta(min_length=1)]
    value: Any
    comparator: str = "equals"


class Group(msgspec.Struct, forbid_unknown_fields=True):
    """Conditions within conditions."""

    conditions: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    operator: Literal["and", "or", "AND", "OR"] = "and"


class Conditions:
    """Conditions as they are read; `attributes` are those that they compare."""

    def __init__(self) -> None:
        self.attributes: list[str] = []
        self._sought = 0

    def read(self, group: Group, param: str, level: int = 1) -> Callable[[Place], Compared]:
        """What makes SQL of a group, once the table is known. Raises `InvalidBody`."""
        if level > _MOST_LEVELS:
            message = f"{param}: expected at most {_MOST_LEVELS} levels of conditions"
            raise InvalidBody(message, param=param)
        prefix = f"{param}.conditions" if param else "conditions"
        parts: list[Callable[[Place], Compared]] = []
        for at, given in enumerate(group.conditions):
            where = f"{prefix}[{at}]"
            if "conditions" in given:
                parts.append(self.read(_converted(given, Group, where), where, level + 1))
            else:
                parts.append(self._one(_converted(given, Condition, where), where))
        join = sa.and_ if group.operator.lower() == "and" else sa.or_
        return lambda place: join(*(part(place) for part in parts))

    def _one(self, condition: Condition, param: str) -> Callable[[Place], Compared]:
        name = condition.comparator.lower()
        name = _SHORT.get(name, name)
        compare = _COMPARATORS.get(name)
        if compare is None:
            message = f"{param}.comparator: expected one of {', '.join(_COMPARATORS)}"
            raise InvalidBody(message, param=f"{param}.comparator")
        self.attributes.append(condition.attribute)
        if len(self.attributes) > _MOST_CONDITIONS:
            message = f"conditions: expected at most {_MOST_CONDITIONS}"
            raise InvalidBody(message, param="conditions")
        if name == "contains" and isinstance(condition.value, str):
            self._seek(condition.value, f"{param}.value")

        def made(place: Place) -> Compared:
            named, null = condition.attribute, condition.value is None
            column = compared(place, named, f"{param}.attribute", json=null)
            return compare(place, column, condition.value, f"{param}.value")

        return made

    def _seek(self, text: str, param: str) -> None:
        """Count what is looked for at each place of each value, whatever the time limit is."""
        self._sought += len(text)
        if self._sought > _LONGEST_PART:
            message = f"{param}: expected at most {_LONGEST_PART} characters in all that contain"
            raise InvalidBody(message, param=param)


Compare: TypeAlias = Callable[[Place, sa.Column[Any], Any, str], Compared]


def compared(place: Place, name: str, param: str, *, json: bool = False) -> sa.Column[Any]:
    """The column of an attribute. Raises `InvalidBody` for one that is not there."""
    if name not in place.attributes:
        help_ = nearest(name, place.attributes, "attributes")
        message = f"{param}: unknown attribute '{name}' of '{place.full_name}'; {help_}"
        raise InvalidBody(message, param=param)
    column: sa.Column[Any] = place.sql.c[name]
    if isinstance(column.type, sa.JSON) and not json:
        message = f"{param}: {name}: what is kept as JSON cannot be compared, but with null"
        raise InvalidBody(message, param=param)
    return column


def _simple(compare: Callable[[Any, Any], Compared], *, ranged: bool = False) -> Compare:
    read = _end if ranged else _value

    def made(place: Place, column: sa.Column[Any], value: Any, param: str) -> Compared:
        return compare(*_numbers(column, read(place, column, value, param)))

    return made


def _value(place: Place, column: sa.Column[Any], value: Any, param: str) -> Any:
    return place.value(column.name, value, param)


def _end(place: Place, column: sa.Column[Any], value: Any, param: str) -> Any:
    """The end of a range. Raises `InvalidBody` for null, which has no order."""
    if value is None:
        message = f"{param}: expected a value, got null, which is only equal or not equal"
        raise InvalidBody(message, param=param)
    return _value(place, column, value, param)


def _numbers(column: sa.Column[Any], *values: Any) -> tuple[Any, ...]:
    """A column and values to compare it with; numbers that are kept as text count as numbers."""
    exact = _is_exact(column)
    # SQLAlchemy itself would refuse that anything is less than true.
    told = (
        None if one is None else sa.cast(one, sa.Float) if exact else sa.literal(one, column.type)
        for one in values
    )
    return (sa.cast(column, sa.Float) if exact else column, *told)


def _is_exact(column: sa.Column[Any]) -> bool:
    return type(column.type).__name__ == "Exact"


def _between(place: Place, column: sa.Column[Any], value: Any, param: str) -> Compared:
    ends = cast("list[object]", value) if isinstance(value, list) else []
    if len(ends) != 2:
        message = f"{param}: expected a list of two values"
        raise InvalidBody(message, param=param)
    made = [_end(place, column, end, param) for end in ends]
    of, low, high = _numbers(column, *made)
    within: Compared = (of >= low) & (of <= high)
    return within


def _text(column: sa.Column[Any], value: Any, param: str) -> str:
    if isinstance(value, str) and isinstance(column.type, sa.String) and not _is_exact(column):
        return value
    message = f"{param}: expected a text, and an attribute that is one"
    raise InvalidBody(message, param=param)


def _contains(_: Place, column: sa.Column[Any], value: Any, param: str) -> Compared:
    if len(_text(column, value, param)) > _LONGEST_PART:
        # It is looked for at each place of each value.
        message = f"{param}: expected at most {_LONGEST_PART} characters"
        raise InvalidBody(message, param=param)
    return has_part(column, "contains", _text(column, value, param))


def _starts(_: Place, column: sa.Column[Any], value: Any, param: str) -> Compared:
    return has_part(column, "starts_with", _text(column, value, param))


def _ends(_: Place, column: sa.Column[Any], value: Any, param: str) -> Compared:
    text = _text(column, value, param)
    return has_part(column, "ends_with", text) if text else column.is_not(None)


_COMPARATORS: dict[str, Compare] = {
    "equals": _simple(operator.eq),
    "not_equal": _simple(operator.ne),
    "greater_than": _simple(operator.gt, ranged=True),
    "greater_than_equal": _simple(operator.ge, ranged=True),
    "less_than": _simple(operator.lt, ranged=True),
    "less_than_equal": _simple(operator.le, ranged=True),
    "between": _between,
    "contains": _contains,
    "starts_with": _starts,
    "ends_with": _ends,
}
_SHORT = {
    "eq": "equals",
    "equal": "equals",
    "ne": "not_equal",
    "not_equals": "not_equal",
    "gt": "greater_than",
    "ge": "greater_than_equal",
    "gte": "greater_than_equal",
    "lt": "less_than",
    "le": "less_than_equal",
    "lte": "less_than_equal",
    "ct": "contains",
    "sw": "starts_with",
    "ew": "ends_with",
}


def has(place: Place, column: sa.Column[Any], value: Any) -> Compared:
    """Whether it is equal to a value, or like a text with `*` at its ends."""
    if value == "*":
        return column.is_not(None)
    if not isinstance(value, str) or "*" not in (value[:1], value[-1:]):
        return _COMPARATORS["equals"](place, column, value, "value")
    kind = {(True, True): _contains, (False, True): _starts, (True, False): _ends}
    ends = value.startswith("*"), value.endswith("*")
    return kind[ends](place, column, value[ends[0] : len(value) - ends[1]], "value")


def _converted(given: Mapping[str, Any], kind: type[Any], param: str) -> Any:
    named = {SYNONYMS.get(key, key): value for key, value in given.items()}
    try:
        return msgspec.convert(named, kind)
    except msgspec.ValidationError as error:
        message = f"{param}: {error}"
        raise InvalidBody(message, param=param) from error
