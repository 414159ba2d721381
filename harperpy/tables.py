"""Tables: what a plugin keeps, in tables made from msgspec Structs."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from math import isfinite
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec
import sqlalchemy as sa
from msgspec import inspect
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles

from .content import refused
from .errors import Conflict, InvalidBody, RegistrationError
from .pointers import pointer
from .spelling import nearest

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")

_TOO_LARGE = 1 << 63
_OURS = ("hdb_", "sqlite_")
_AS_THEY_ARE = (bytes, dt.datetime)
_INTEGER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_JSON = sa.JSON(none_as_null=True)


class _Moment(sa.TypeDecorator[dt.datetime]):
    """A moment as text of one length in UTC, so that text sorts as time does."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: object) -> str | None:
        """What is kept; a moment without a zone is taken to be in UTC."""
        if value is None:
            return None
        aware = value if value.tzinfo else value.replace(tzinfo=dt.UTC)
        return str(aware.astimezone(dt.UTC).isoformat(timespec="microseconds"))

    def process_result_value(self, value: Any, dialect: object) -> Any:
        """What was given; a text that an earlier Struct has left, for `read` to name its record."""
        with suppress(ValueError, TypeError):
            return dt.datetime.fromisoformat(value)
        return value


class Exact(sa.String):
    """A Decimal as text, which keeps each of its digits."""


_COLUMN_TYPES: tuple[tuple[type[inspect.Type], sa.types.TypeEngine[Any]], ...] = (
    (inspect.BoolType, sa.Boolean()),
    (inspect.IntType, _INTEGER),
    (inspect.FloatType, sa.Double()),
    (inspect.BytesType, sa.LargeBinary()),
    (inspect.DateTimeType, _Moment()),
    (inspect.StrType, sa.String()),
    (inspect.UUIDType, sa.String()),
    (inspect.DateType, sa.String()),
    (inspect.TimeType, sa.String()),
    (inspect.DecimalType, Exact()),
)
_KEY_TYPES = (inspect.StrType, inspect.IntType, inspect.UUIDType)


class Executes(Protocol):
    """What a table does its work on: `context.transaction()`."""

    async def execute(self, statement: sa.Executable) -> list[dict[str, Any]]:
        """Run a statement and give its rows by column."""
        ...


class _Runs(Protocol):
    def __call__(self, work: Callable[[sa.Connection], R], /) -> Awaitable[R]: ...


class Table(Generic[T]):
    """Records of one Struct, found by their key.

    Column names are the Struct's names in JSON; `sql` is the table for statements of your own. A
    key whose default is None is made by the table: the next integer, or a random text.
    """

    def __init__(self, name: str, record: type[T], key: str, indexed: Collection[str]) -> None:
        self.name = name
        self.record = record
        self.key = key
        self.fields = {one.encode_name: one for one in msgspec.structs.fields(record)}
        self._kinds = {one.encode_name: one.type for one in _field_types(record)}
        self._check(indexed)
        columns = [self._column(column) for column in self.fields]
        marks = [sa.Index(f"{name}.{column}", column) for column in indexed]
        self.sql = sa.Table(name, sa.MetaData(), *columns, *marks)
        self._needed = {column.name for column in columns if not column.nullable}

    def read(self, row: Mapping[str, Any]) -> T:
        """A row as a record. Raises `msgspec.ValidationError`, which names one that is none."""
        given = {column: row[column] for column in self.fields if row[column] is not None}
        missing = self.fields.keys() - given.keys() - self._needed
        try:
            return msgspec.convert({**given, **dict.fromkeys(missing)}, self.record, str_keys=True)
        except msgspec.ValidationError as error:
            message = f"table {self.name!r}, record {row[self.key]!r}: {error}"
            raise msgspec.ValidationError(message) from error

    def record_of(self, fields: Mapping[str, Any]) -> T:
        """The record of these fields. Raises `InvalidBody`, which names what does not fit."""
        for name in fields.keys() - self.fields.keys() - {self.record.__struct_config__.tag_field}:
            why = f"unknown field; {nearest(name, self.fields, 'fields')}"
            errors = [{"path": pointer(name), "message": why}]
            message = f"{name}: {why}"
            raise InvalidBody(message, param=name, errors=errors)
        try:
            return msgspec.convert(fields, self.record, str_keys=True)
        except msgspec.ValidationError as error:
            raise refused(error) from error

    def row(self, record: T) -> dict[str, Any]:
        """A record as a row. Raises `InvalidBody` for what no column can hold."""
        return {
            column: self.kept(column, getattr(record, field.name))
            for column, field in self.fields.items()
        }

    async def get(self, on: Executes, key: Any, *, locked: bool = False) -> T | None:
        """The record with this key, if there is one; `locked` for who is about to change it."""
        row = await self.row_at(on, key, locked=locked)
        return None if row is None else self.read(row)

    async def row_at(
        self, on: Executes, key: Any, *, locked: bool = False
    ) -> dict[str, Any] | None:
        """As `get`, the record as it is kept: what is a set in it has the order it came in."""
        asked = sa.select(self.sql).where(self.at(key))
        found = await on.execute(asked.with_for_update() if locked else asked)
        return found[0] if found else None

    async def find(self, on: Executes, *where: sa.ColumnElement[bool]) -> list[T]:
        """The records that fulfil all conditions: `notes.sql.c.stars > 3`."""
        return [self.read(row) for row in await on.execute(sa.select(self.sql).where(*where))]

    async def insert(self, on: Executes, record: T) -> T:
        """Add a record: as it was kept, its key included. Raises `Conflict` for a taken key."""
        row = self.row(record)
        if row[self.key] is None and isinstance(_bare(self._kinds[self.key])[0], inspect.IntType):
            del row[self.key]
        elif row[self.key] is None:
            row[self.key] = uuid.uuid4().hex
        (kept,) = await on.execute(sa.insert(self.sql).values(row).returning(self.sql))
        return self.read(kept)

    async def put(self, on: Executes, record: T) -> None:
        """Add a record, or replace the one with its key. Raises `Conflict` if it has none."""
        row = self.row(record)
        if row[self.key] is None:
            message = f"{self.name}.{self.key}: expected a key, got None"
            raise Conflict(message)
        adding = sqlite.insert(self.sql).values(row)
        others = {column: adding.excluded[column] for column in row if column != self.key}
        known = [self.sql.c[self.key]]
        if others:
            await on.execute(adding.on_conflict_do_update(index_elements=known, set_=others))
        else:
            await on.execute(adding.on_conflict_do_nothing(index_elements=known))

    async def update(self, on: Executes, record: T) -> bool:
        """Replace the record with its key; whether there was one."""
        row = self.row(record)
        key = row.pop(self.key)
        changed = sa.update(self.sql).where(self.at(key)).values(row or {self.key: key})
        return bool(await on.execute(changed.returning(self.sql.c[self.key])))

    async def delete(self, on: Executes, key: Any) -> bool:
        """Remove a record; whether there was one."""
        column = self.sql.c[self.key]
        return bool(await on.execute(sa.delete(self.sql).where(self.at(key)).returning(column)))

    def at(self, key: Any) -> sa.ColumnElement[bool]:
        """The condition that finds the record with this key, for statements of your own."""
        column = self.sql.c[self.key]
        # SQLAlchemy would name it `id_1`, as a field may be called.
        named = sa.bindparam('"key"', _plain(key), column.type)
        same: sa.ColumnElement[bool] = column == named
        return same

    def value(self, column: str, text: str) -> Any:
        """A column's value, read from text. Raises `msgspec.ValidationError`."""
        kind = self.fields[column].type
        return self.kept(column, msgspec.convert(text, kind, strict=False))

    def kept(self, column: str, value: Any) -> Any:
        """What a column holds of a value. Raises `InvalidBody` for what it cannot hold."""
        expected: str | None = "what JSON can hold"
        plain: Any = None
        with suppress(TypeError, ValueError, RecursionError):
            plain = _as_json(value) if self._is_json(column) else _plain(value)
            expected = _expected(value if isinstance(value, Decimal) else plain)
        if expected is not None:
            message = f"{column}: expected {expected}"
            raise InvalidBody(message, param=column)
        return plain

    def _is_json(self, column: str) -> bool:
        return isinstance(self.sql.c[column].type, sa.JSON)

    def _column(self, name: str) -> sa.Column[Any]:
        kind, optional = _bare(self._kinds[name])
        if name == self.key:
            return sa.Column(name, _column_type(kind), primary_key=True)
        return sa.Column(name, _column_type(kind), nullable=optional)

    def _check(self, indexed: Collection[str]) -> None:
        where = f"table {self.name!r}"
        if self.record.__struct_config__.array_like:
            _refuse(f"{where}: {self.record.__name__} cannot be array_like: records have names")
        if not self.name.isidentifier() or self.name.lower().startswith(_OURS):
            _refuse(f"{where}: expected a name of letters, digits and _, not beginning with hdb_")
        for column in (self.key, *indexed):
            if column not in self.fields:
                help_ = nearest(column, self.fields, "fields")
                _refuse(f"{where}: {self.record.__name__} has no field {column!r}; {help_}")
        for column, field in self.fields.items():
            if field.default is msgspec.UNSET:
                _refuse(f"{where}: {column!r} cannot be UNSET by default; write | None = None")
        if len({column.lower() for column in self.fields}) < len(self.fields):
            _refuse(f"{where}: fields of {self.record.__name__} differ in nothing but their case")
        if not isinstance(_bare(self._kinds[self.key])[0], _KEY_TYPES):
            _refuse(f"{where}: {self.key!r} cannot be its key; expected a str, an int or a UUID")


class Tables:
    """The tables that plugins have asked for, by name."""

    def __init__(self, run: _Runs) -> None:
        self._run = run
        self._known: dict[str, Table[Any]] = {}
        self._there: dict[str, Table[Any]] = {}

    def __iter__(self) -> Iterator[Table[Any]]:
        """The tables that are there, in the order in which they were asked for."""
        return iter(self._there.values())

    def get(self, name: str) -> Table[Any] | None:
        """The table of this very name, if a plugin has asked for it."""
        return self._there.get(name)

    async def ensure(
        self, name: str, record: type[T], *, key: str = "id", index: Sequence[str] = ()
    ) -> Table[T]:
        """The table of this Struct, made if it is not there; new fields become new columns.

        `key` and `index` are names of fields. A list, a map or a Struct in a field is kept as JSON.

        Raises `RegistrationError` for what cannot be a table, or is not the table that is there.
        """
        table = Table(name, record, key, index)
        # To SQLite, names that differ in case are one.
        known = self._known.setdefault(name.lower(), table)
        if known.record is not record:
            _refuse(f"table {name!r} is made of {known.record.__name__}, not {record.__name__}")
        await self._run(lambda connection: _bring_about(connection, table))
        self._there.setdefault(known.name, known)
        return table


def _bring_about(connection: sa.Connection, table: Table[Any]) -> None:
    _in_the_file(table.name, *table.sql.columns.values()).create(connection, checkfirst=True)
    seen = sa.inspect(connection)
    keys = seen.get_pk_constraint(table.name)["constrained_columns"]
    if keys != [table.key]:
        was = ", ".join(keys) or "none"
        _refuse(f"table {table.name!r}: its key in the file is {was}, it cannot be {table.key}")
    there = {one["name"]: one for one in seen.get_columns(table.name)}
    for column in table.sql.columns.values():
        if column.name not in there:
            _add(connection, table, column)
            continue
        was, is_ = (_affinity(connection, one) for one in (there[column.name]["type"], column.type))
        if was != is_:
            _refuse(f"table {table.name!r}: {column.name!r} is kept as {was}, it cannot be {is_}")
    for mark in table.sql.indexes:
        mark.create(connection, checkfirst=True)


def _in_the_file(name: str, *columns: sa.Column[Any]) -> sa.Table:
    """A table whose columns may be empty: a later Struct may lack the field, or let it be None."""
    made = (sa.Column(one.name, one.type, primary_key=one.primary_key) for one in columns)
    return sa.Table(name, sa.MetaData(), *made)


def _affinity(connection: sa.Connection, kind: sa.types.TypeEngine[Any]) -> str:
    return kind.compile(connection.dialect)


def _add(connection: sa.Connection, table: Table[Any], column: sa.Column[Any]) -> None:
    """A new column; the records that are there get the field's default."""
    field = table.fields[column.name]
    if field.required and not column.nullable:
        _refuse(
            f"table {table.name!r}: the new field {column.name!r} needs a default, or | None, for "
            "the records that are there"
        )
    connection.execute(_AddColumn(_in_the_file(table.name, column).c[column.name]))
    if not field.required:
        made = table.kept(column.name, _default(field))
        connection.execute(sa.update(table.sql).values({column.name: made}))


class _AddColumn(sa.schema.ExecutableDDLElement):
    """ALTER TABLE ... ADD COLUMN, which SQLAlchemy leaves to others."""

    def __init__(self, column: sa.Column[Any]) -> None:
        self.column = column


@compiles(_AddColumn)
def _compile_add_column(element: _AddColumn, compiler: Any, **_: Any) -> str:
    table = compiler.preparer.format_table(element.column.table)
    return f"ALTER TABLE {table} ADD COLUMN {compiler.get_column_specification(element.column)}"


def _default(field: msgspec.structs.FieldInfo) -> Any:
    made = field.default_factory
    return field.default if made is msgspec.NODEFAULT else made()


def _field_types(record: type[msgspec.Struct]) -> Iterator[inspect.Field]:
    yield from cast("inspect.StructType", inspect.type_info(record)).fields


def _bare(kind: inspect.Type) -> tuple[inspect.Type, bool]:
    """A type without its notes and without None; whether it may be None."""
    if isinstance(kind, inspect.Metadata):
        return _bare(kind.type)
    if not isinstance(kind, inspect.UnionType):
        return kind, isinstance(kind, inspect.AnyType | inspect.NoneType) or _is_object(kind)
    others = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
    optional = len(others) < len(kind.types)
    return (_bare(others[0])[0] if len(others) == 1 else kind), optional


def _is_object(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.CustomType) and kind.cls is object


def _column_type(kind: inspect.Type) -> sa.types.TypeEngine[Any]:
    values = (
        [one.value for one in kind.cls]
        if isinstance(kind, inspect.EnumType)
        else kind.values
        if isinstance(kind, inspect.LiteralType)
        else ()
    )
    if values:
        if all(isinstance(value, int) for value in values):
            return _INTEGER
        return sa.String() if all(isinstance(value, str) for value in values) else _JSON
    found = (sort for known, sort in _COLUMN_TYPES if isinstance(kind, known))
    return next(found, _JSON)


def _expected(value: Any) -> str | None:
    """What a column takes in place of a value that it cannot hold."""
    if isinstance(value, int) and not -_TOO_LARGE <= value < _TOO_LARGE:
        return "an integer of 64 bits"
    if isinstance(value, Decimal | float):
        finite = value.is_finite() if isinstance(value, Decimal) else isfinite(value)
        return None if finite else "a finite number"
    if isinstance(value, dt.datetime):
        try:
            value.astimezone(dt.UTC)
        except OverflowError:
            return "a moment of the years 1 to 9999 in UTC"
    return None


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=_AS_THEY_ARE)


def _as_json(value: Any) -> Any:
    plain = msgspec.to_builtins(value, str_keys=True)
    # Raises for what is a number in Python but none in JSON, however deep it is.
    json.dumps(plain, allow_nan=False)
    return plain


def _refuse(message: str) -> None:
    raise RegistrationError(message)
