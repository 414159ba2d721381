"""Audit: what `system.hdb_audit` keeps of a write: who, when, where, which records.

Of the values that a plugin writes it keeps numbers, true, false and null, and of text only how long
it was: it may be what someone asked a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import BinaryExpression
from sqlalchemy.sql.operators import eq, in_op

from .accounting import Caller, current_caller
from .secret import REDACTED, mask, names_secret
from .system import hdb_audit, now_ms

_DATABASE = "data"
_SYSTEM = "system"
_OF_A_ROW = re.compile(r"(.+)_m(\d+)")

Row = Mapping[str, Any]


class Author:
    """On whose behalf a transaction writes."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def record(
        self,
        connection: sa.Connection,
        statement: sa.Executable,
        written: Iterable[tuple[str, str]],
        result: sa.CursorResult[Any],
        returned: Sequence[Row],
    ) -> None:
        """One row for each table that a statement has written, and what it returned."""
        who = {"timestamp": now_ms(), "database": _DATABASE, **_by(self._caller)}
        for table, operation in _operations(written).items():
            what = _described(statement, table, result, returned)
            values = {**who, "operation": operation, "table": table, **what}
            connection.execute(sa.insert(hdb_audit), [values])


class Deed:
    """A change of who may do what, on behalf of whoever makes it. It is always audited.

    `table` is where, or the name of what else is changed. `subject` is who asks where nobody is
    logged in: who has shown a password or a token.
    """

    def __init__(self, table: sa.Table | str, subject: str | None = None) -> None:
        self._table = table if isinstance(table, str) else table.name
        self._by = _by(current_caller.get() or Caller(source="system"))
        if self._by["source"] == _SYSTEM:
            subject = _SYSTEM
        self._by["user_name"] = self._by["user_name"] or subject

    def note(
        self,
        connection: sa.Connection,
        operation: str,
        *keys: str,
        after: Row | None = None,
        before: Row | None = None,
    ) -> None:
        """One row in the transaction of the change itself; `after` and `before` hold no secrets."""
        what = {
            "operation": operation,
            "table": self._table,
            "hash_values": list(keys),
            "records": None if after is None else [dict(after)],
            "original_records": None if before is None else [dict(before)],
        }
        values = {"timestamp": now_ms(), "database": _SYSTEM, **self._by, **what}
        connection.execute(sa.insert(hdb_audit), [values])


def _by(caller: Caller) -> dict[str, str | None]:
    return {
        "user_name": caller.user.username if caller.user else None,
        "key_id": caller.user.key_id if caller.user else None,
        "source": caller.source,
        "request_id": caller.request_id,
    }


def _operations(written: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Table → what was done to it: an insert that may update is an upsert, as a rule of SQL's."""
    done: dict[str, set[str]] = {}
    for operation, table in written:
        done.setdefault(table, set()).add(operation)
    named: dict[str, str] = {}
    for table, operations in done.items():
        of_the_table = [each for each in operations if each.endswith("_table")]
        if {"insert", "update"} <= operations:
            named[table] = "upsert"
        else:
            named[table] = min(of_the_table or operations)
    return named


def _described(
    statement: sa.Executable,
    name: str,
    result: sa.CursorResult[Any],
    returned: Sequence[Row],
) -> dict[str, list[Any] | None]:
    """The keys and the values of the records, as far as the statement itself tells them."""
    nothing: dict[str, list[Any] | None] = {"hash_values": None, "records": None}
    table: Any = getattr(statement, "table", None)
    if not isinstance(table, sa.Table) or table.name != name:
        return nothing
    columns: list[sa.Column[Any]] = list(table.columns)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    keys = [column.name for column in columns if column.primary_key]
    rows = list(_rows({column.name for column in columns}, result))
    told = returned if returned and set(keys) <= set(returned[0]) else rows
    found = [row[key] for row in told for key in keys if row.get(key) is not None]
    if isinstance(statement, sa.Insert):
        found = found or _made(result)
    elif told is rows:
        found = list(_compared(statement, keys, result))
    secret = any(map(names_secret, keys))
    hashes = [REDACTED if secret else _key(value) for value in found]
    records = [{column: _value(column, row[column], keys) for column in row} for row in rows if row]
    return {"hash_values": hashes or None, "records": records or None}


def _rows(columns: Collection[str], result: sa.CursorResult[Any]) -> Iterator[dict[str, Any]]:
    """The values by column of each record that the statement sets."""
    for given in _given(result):
        rows: dict[int, dict[str, Any]] = {0: {}}
        numbered = {name: one for name in given if (one := _OF_A_ROW.fullmatch(name))}
        # A column may be called as that of one of many rows is: `size_m2`.
        many = any(name not in columns and one[1] in columns for name, one in numbered.items())
        for name, value in given.items():
            one_of_many = numbered.get(name) if many else None
            column, at = (one_of_many[1], int(one_of_many[2])) if one_of_many else (name, 0)
            if column in columns:
                rows.setdefault(at, {})[column] = value
        yield from rows.values()


def _given(result: sa.CursorResult[Any]) -> list[Row]:
    """The parameters by name, once for each time that the statement was run."""
    context: Any = result.context
    given: list[Row] = context.compiled_parameters
    return given


def _made(result: sa.CursorResult[Any]) -> list[Any]:
    """The keys that the database made for the new records, where it told them."""
    context: Any = result.context
    rows: Any = () if context.executemany else context.inserted_primary_key_rows
    return [value for row in rows or () for value in row if value is not None]


def _compared(
    statement: sa.Executable, keys: Collection[str], result: sa.CursorResult[Any]
) -> Iterator[Any]:
    """The values that the statement's condition compares the primary key with."""
    where: Any = getattr(statement, "whereclause", None)
    for node in visitors.iterate(where) if where is not None else ():
        if not isinstance(node, BinaryExpression) or node.operator not in (eq, in_op):
            continue
        column: Any = node.left
        value: Any = node.right
        of_a_key = isinstance(column, sa.Column) and column.name in keys
        if of_a_key and isinstance(value, sa.BindParameter):
            yield from _bound(value, _given(result))


def _bound(value: Any, given: list[Row]) -> Iterator[Any]:
    """What stands for a parameter: what was given by its name, or else the value that it has.

    A statement like one that was run before has the names of that one, but values of its own.
    """
    named = [row[value.key] for row in given if value.key in row] or [value.effective_value]
    for one in named:
        yield from cast("list[Any]", one) if value.expanding else [one]


def _key(value: Any) -> Any:
    return value if isinstance(value, int | float) else mask(str(value))


def _value(column: str, value: Any, keys: Collection[str]) -> Any:
    if value is not None and not isinstance(value, bool) and names_secret(column):
        return REDACTED
    return _key(value) if column in keys and value is not None else _plain(value)


def _plain(value: Any) -> Any:
    """What may be kept of a value."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return f"[{len(value)} characters]"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(cast('bytes', value))} bytes]"
    return f"[{type(value).__name__}]"
