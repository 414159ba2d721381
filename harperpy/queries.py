"""Query: what a URL asks of a table: `?topic=a&stars=gt=3&sort(-stars)&limit(20)&select(id,topic)`.

Harper's words for it. Names and values are percent-decoded after they are told apart.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn
from urllib.parse import unquote_plus

import msgspec
import sqlalchemy as sa

from .errors import ClientError
from .spelling import nearest
from .tables import Exact, Table

_COMPARISONS: dict[str, Callable[[Any, Any], sa.ColumnElement[bool]]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "=ne=": operator.ne,
    "=lt=": operator.lt,
    "=le=": operator.le,
    "=gt=": operator.gt,
    "=ge=": operator.ge,
}


def has_part(
    column: sa.Column[Any], how: Literal["contains", "starts_with", "ends_with"], text: str
) -> sa.ColumnElement[bool]:
    """Whether a column's texts contain, start or end with a text, which is not empty.

    Capitals count, which LIKE would not tell from small letters.
    """
    match how:
        case "contains":
            return sa.func.instr(column, text) > 0
        case "starts_with":
            # The first half is for the index.
            return (column >= text) & (sa.func.substr(column, 1, len(text)) == text)
        case "ends_with":
            return sa.func.substr(column, -len(text)) == text


def bounded(asked: sa.Select[Any]) -> sa.Select[Any]:
    """A select whose rows may be 64 MiB together, and that may take 5 seconds.

    A transaction refuses what is more with 400 or 408: rows are in memory several times before they
    are sent, and few can read at once.
    """
    return asked.execution_options(most_bytes=_MOST_BYTES, most_seconds=_MOST_SECONDS)


_PARTS: dict[str, Literal["contains", "starts_with", "ends_with"]] = {
    "=ct=": "contains",
    "=sw=": "starts_with",
    "=ew=": "ends_with",
}
# It is looked for at each place of each value, and no time limit counts within one record.
_LONGEST_PART = 200
_CONDITION = re.compile(r"([^=!]+)(!=|==|=[a-z]{2}=|=)(.*)", re.DOTALL)
# In Harper's queries it is an or; taken as part of the value it would find nothing, in silence.
_OR = re.compile(r"\|([^=!|]+)[=!]")
_CALL = re.compile(r"(select|sort|limit)(?:\((.*)\)|=(?!=)(.*))", re.DOTALL)
_OFFSET = "offset="
_MOST_CONDITIONS = 100
_MOST_BYTES = 64 * 2**20
_MOST_SECONDS = 5.0


class Query(msgspec.Struct):
    """What a URL asks of a table. `select` is empty for whole records; `bare` asks for values.

    `sought` is how many characters are looked for within texts.
    """

    where: list[sa.ColumnElement[bool]] = []
    order: list[sa.ColumnElement[Any]] = []
    select: list[str] = []
    bare: bool = False
    sought: int = 0
    limit: int | None = None
    offset: int = 0


def read_query(table: Table[Any], search: str) -> Query:
    """The query string, without its `?`. Raises `ClientError` that names what is wrong with it."""
    query = Query()
    for part in filter(None, search.split("&")):
        if call := _CALL.fullmatch(part):
            _CALLS[call[1]](query, table, call[2] if call[3] is None else call[3])
            query.bare |= call[1] == "select" and call[3] is None and len(query.select) == 1
        elif part.startswith(_OFFSET) and not part.startswith(f"{_OFFSET}="):
            query.offset = _count("offset", part.removeprefix(_OFFSET))
        elif len(query.where) == _MOST_CONDITIONS:
            message = f"query: expected at most {_MOST_CONDITIONS} conditions"
            raise ClientError(message)
        else:
            query.where.append(_condition(table, part, query))
    return query


def refuse_conditions(table: Table[Any], search: str) -> None:
    """Raises `ClientError` for a condition on a field: in silence, all would be done without it."""
    for part in search.split("&"):
        found = None if _CALL.fullmatch(part) else _CONDITION.fullmatch(part)
        if found and (name := unquote_plus(found[1])) in table.fields:
            _refuse(name, "conditions are for lists; for a version of one there is If-Match")


def _condition(table: Table[Any], part: str, query: Query) -> sa.ColumnElement[bool]:
    found = _CONDITION.fullmatch(part)
    if found is None:
        _refuse(unquote_plus(part), "expected FIELD=VALUE, or FIELD=gt=VALUE and the like")
    name, sign, text = unquote_plus(found[1]), found[2], unquote_plus(found[3])
    column = _column(table, name)
    if (other := _OR.search(found[3])) and other[1] in table.fields:
        _refuse(name, f"expected '&' before {other[1]}: '|' is none here (%7C is the sign itself)")
    if sign in _PARTS:
        query.sought += len(text) if sign == "=ct=" else 0
        return _part(column, sign, text, query.sought)
    if sign not in _COMPARISONS:
        known = ", ".join((*_COMPARISONS, *_PARTS))
        _refuse(name, f"unknown comparison {sign!r}; there are {known}")
    compare = _COMPARISONS[sign]
    is_null = text == "null" and column.nullable
    if isinstance(column.type, sa.JSON) and not is_null:
        _refuse(name, "what is kept as JSON cannot be compared, but with null")
    value = None if is_null else _value(table, name, text)
    if value is None:
        if compare not in (operator.eq, operator.ne):
            _refuse(name, f"null has no order: expected =null or !=null, got {sign}{text}")
        return compare(column, None)
    if isinstance(column.type, Exact):
        return compare(_ordered(column), sa.cast(value, sa.Float))
    # SQLAlchemy itself would refuse that anything is less than true.
    return compare(column, sa.literal(value, column.type))


def _part(column: sa.Column[Any], sign: str, text: str, sought: int) -> sa.ColumnElement[bool]:
    if type(column.type) is not sa.String:
        _refuse(column.name, f"{sign} is for texts alone")
    if not 0 < len(text) <= _LONGEST_PART:
        _refuse(column.name, f"{sign}: expected a text of 1 to {_LONGEST_PART} characters")
    if sought > _LONGEST_PART:
        _refuse(column.name, f"{sign}: expected at most {_LONGEST_PART} characters in all of them")
    return has_part(column, _PARTS[sign], text)


def _ordered(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """The column as what numbers are compared by, where it is text that stands for one."""
    return sa.cast(column, sa.Float) if isinstance(column.type, Exact) else column


def _value(table: Table[Any], name: str, text: str) -> Any:
    try:
        return table.value(name, text)
    except msgspec.ValidationError as error:
        _refuse(name, str(error))


def _sort(query: Query, table: Table[Any], text: str) -> None:
    for name in _names(text):
        column = _ordered(_column(table, name.lstrip("+- ")))
        if isinstance(column.type, sa.JSON):
            _refuse("sort", f"{name.lstrip('+- ')}: what is kept as JSON has no order")
        if len(query.order) == len(table.fields):
            _refuse("sort", "expected each field once")
        query.order.append(column.desc() if name.startswith("-") else column.asc())


def _limit(query: Query, _: Table[Any], text: str) -> None:
    """`limit(10)` is the first ten, `limit(20,30)` the ten from the twentieth on."""
    start, comma, end = text.partition(",")
    if comma:
        query.offset = _count("limit", start)
        query.limit = max(0, _count("limit", end) - query.offset)
    else:
        query.limit = _count("limit", start)


def _select(query: Query, table: Table[Any], text: str) -> None:
    query.select = [_column(table, name).name for name in _names(text)]


_CALLS: dict[str, Callable[[Query, Table[Any], str], None]] = {
    "sort": _sort,
    "limit": _limit,
    "select": _select,
}


def _names(text: str) -> Iterator[str]:
    # A `+` stands for itself here: sort(+stars).
    return (name.strip() for name in unquote_plus(text.replace("+", "%2B")).split(",") if name)


def _column(table: Table[Any], name: str) -> sa.Column[Any]:
    if name not in table.fields:
        _refuse(name, f"unknown field; {nearest(name, table.fields, 'fields')}")
    return table.sql.c[name]


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        _refuse(name, f"expected an integer of 0 or more, got {text!r}")
    return int(text)


def _refuse(name: str, why: str) -> NoReturn:
    message = f"query: {name}: {why}"
    raise ClientError(message, param=name)
