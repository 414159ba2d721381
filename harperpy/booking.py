"""Booking: model calls become rows, and are added to their days."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from operator import itemgetter
from typing import Any, TypeAlias

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from .accounting import CallRow, ModelCall
from .daily import DAY_MS, DIGITS, growing
from .system import COSTS, CREATED, DIMENSIONS, TOKENS, hdb_model_calls, hdb_model_calls_daily

_Columns: TypeAlias = list[tuple[Any, ...]]

# What SQLite runs as one statement waits for the interpreter once, and not once a row.
_TOGETHER, _A_FEW = 100, 10
# More values than these not every SQLite takes in one.
_MOST_VALUES = 999
_SLICE = 500
_MOST_SHAPES = 128
_AT = {name: at for at, name in enumerate(ModelCall.__struct_fields__)}
_ID, _CREATED, _SUCCESS, _COST = (_AT[name] for name in ("id", "created", "success", "cost"))
_FLAGS = [_AT[name] for name in ("success", "usage_estimated")]
_COLUMNS = [
    (column.name, _AT["created" if column.name == CREATED else column.name])
    for column in hdb_model_calls.columns
]
_SUMS = [_AT[name] for name in TOKENS], [_AT[name] for name in COSTS]
# In these the calls of one caller mostly do not differ.
_ALIKE = frozenset(
    _AT[name]
    for name in (
        *(*DIMENSIONS, "api_key", "adapter", "success", "error_code", "upstream_status"),
        *("finish_reason", "usage_estimated", "price_version"),
    )
)
_who_and_what = itemgetter(*(_AT[name] for name in DIMENSIONS))


class Booking:
    """Writes calls to `system.hdb_model_calls`, and adds them to their days.

    The statements are compiled once, and run by the driver on plain tuples. A column in which none
    of the rows at hand has a value is left out: to bind nothing takes longer than to bind a text.
    Who and what the calls are is bound once for many of them, where it is the same for all.
    """

    def __init__(self) -> None:
        ids = sa.func.json_each(sa.bindparam("ids")).table_valued("value")
        among = hdb_model_calls.c.id.in_(sa.select(ids.c.value))
        self._known = _text(sa.select(hdb_model_calls.c.id).where(among))
        self._grow = _text(growing(sqlite.insert(hdb_model_calls_daily)))
        self._inserts: dict[tuple[tuple[str, ...], tuple[str, ...], int], str] = {}

    def add(self, connection: sa.Connection, rows: Sequence[CallRow]) -> None:
        """Write these; one whose id is there already is left as it is."""
        for at in range(0, len(rows), _SLICE):
            fresh = self._unknown(connection, rows[at : at + _SLICE])
            if fresh:
                columns: _Columns = list(zip(*fresh, strict=True))
                alike = all(_is_one(columns[at]) for at in _ALIKE)
                self._insert(connection, columns, alike=alike)
                of_one_day = alike and not _spans_days(columns)
                groups = [columns] if of_one_day else _groups(fresh)
                connection.exec_driver_sql(self._grow, [_day(group) for group in groups])

    def _unknown(self, connection: sa.Connection, rows: Sequence[CallRow]) -> list[CallRow]:
        by_id = {row[_ID]: row for row in rows}
        ids = msgspec.json.encode(list(by_id)).decode()
        for (known,) in connection.exec_driver_sql(self._known, (ids,)).fetchall():
            del by_id[known]
        return list(by_id.values())

    def _insert(self, connection: sa.Connection, columns: _Columns, *, alike: bool) -> None:
        for at in _FLAGS:
            # The driver takes an integer as it is, and for anything else looks for an adapter.
            columns[at] = tuple(map(int, columns[at]))
        used = [one for one in _COLUMNS if _has_some(columns[one[1]])]
        common = [one for one in used if alike and one[1] in _ALIKE]
        own = [one for one in used if one not in common]
        values = list(zip(*(columns[at] for _, at in own), strict=True))
        once = tuple(columns[at][0] for _, at in common)
        names = tuple(name for name, _ in own), tuple(name for name, _ in common)
        begin, most = 0, (_MOST_VALUES - len(common)) // len(own)
        for size in (min(_TOGETHER, most), _A_FEW, 1):
            end = len(values) - (len(values) - begin) % size
            if begin < end:
                parts = (values[at : at + size] for at in range(begin, end, size))
                batches = [(*chain.from_iterable(part), *once) for part in parts]
                connection.exec_driver_sql(self._statement(*names, size), batches)
            begin = end

    def _statement(self, own: tuple[str, ...], common: tuple[str, ...], size: int) -> str:
        """What inserts so many rows, whose common columns are the same in all, and bound last."""
        shape = own, common, size
        found = self._inserts.get(shape)
        if found is None:
            if len(self._inserts) >= _MOST_SHAPES:
                self._inserts.clear()
            cells: list[sa.ColumnClause[Any]] = [sa.column(name) for name in own]
            rows = sa.values(*cells, name="rows").data([(0,) * len(own)]).cte()
            values: list[sa.ColumnElement[Any]] = [rows.c[name] for name in own]
            values += [sa.bindparam(name, 0) for name in common]
            # A failure undoes the whole transaction: SQLite need not note how to undo a part.
            into = sa.insert(hdb_model_calls).prefix_with("OR FAIL")
            one = _text(into.from_select([*own, *common], sa.select(*values)))
            # Compiled with all rows it would take half a megabyte, and give it back to nobody.
            row = f"({', '.join('?' * len(own))})"
            self._inserts[shape] = found = one.replace(row, ", ".join([row] * size), 1)
        return found


def _text(statement: sa.sql.expression.ClauseElement) -> str:
    return str(statement.compile(dialect=sqlite.dialect()))


def _has_some(column: Sequence[Any]) -> bool:
    return column[0] is not None or column.count(None) < len(column)


def _is_one(column: Sequence[Any]) -> bool:
    return column.count(column[0]) == len(column)


def _day_of(created: float) -> int:
    return int(created / DAY_MS)


def _spans_days(columns: _Columns) -> bool:
    created = columns[_CREATED]
    return _day_of(min(created)) != _day_of(max(created))


def _groups(rows: Sequence[CallRow]) -> Iterator[_Columns]:
    """The columns of the rows of each day and who and what."""
    groups: dict[tuple[int, CallRow], list[CallRow]] = {}
    for row in rows:
        key = _day_of(row[_CREATED]), _who_and_what(row)
        groups.setdefault(key, []).append(row)
    return (list(zip(*group, strict=True)) for group in groups.values())


def _day(columns: _Columns) -> CallRow:
    """What calls of one day add, of which it is the same who and what they are."""
    tokens, costs = _SUMS
    succeeded = columns[_SUCCESS]
    day = _day_of(columns[_CREATED][0]) * DAY_MS / 1000
    return (
        datetime.fromtimestamp(day, UTC).date().isoformat(),
        *(column[0] or "" for column in _who_and_what(columns)),
        len(succeeded),
        len(succeeded) - sum(succeeded),
        list(zip(succeeded, columns[_COST], strict=True)).count((True, None)),
        *(_total(columns[at]) for at in tokens),
        *(round(_total(columns[at]), DIGITS) for at in costs),
    )


def _total(column: CallRow) -> Any:
    return sum(filter(None, column))
