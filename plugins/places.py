"""Places: the tables as operations name them, and what a caller may do with each.

The database `data` holds the tables of plugins, `system` the server's own. What a caller has no
right to at all is to them as if it were not there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
import sqlalchemy as sa

from harperpy import (
    AccessViolation,
    ClientError,
    Database,
    InvalidBody,
    NotAuthorised,
    NotFound,
    Table,
    TableRights,
    User,
)

DATA, SYSTEM = "data", "system"
ACTIONS: tuple[Action, ...] = ("read", "insert", "update", "delete")

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""What a column of numbers takes."""
Action: TypeAlias = Literal["read", "insert", "update", "delete"]
Wanted: TypeAlias = Mapping[Action, Collection[str]]
"""What is to be done, and the attributes that it touches."""


class Place(msgspec.Struct, frozen=True):
    """One table. `table` is a plugin's; the server's own have none, and are only read."""

    database: str
    name: str
    sql: sa.Table
    key: str
    attributes: tuple[str, ...]
    table: Table[Any] | None = None

    @property
    def full_name(self) -> str:
        """As SQL says it."""
        return f"{self.database}.{self.name}"

    def shown(self, row: Mapping[str, Any], attributes: Iterable[str]) -> dict[str, Any]:
        """These attributes of a row, as the record's own types have them."""
        if self.table is None:
            return {name: row[name] for name in attributes}
        record = self.table.read(row)
        return {name: getattr(record, self.table.fields[name].name) for name in attributes}

    def value(self, attribute: str, value: Any, param: str) -> Any:
        """What the attribute's column holds for a value of JSON. Raises `InvalidBody`."""
        column = self.sql.c[attribute]
        if value is None and column.nullable:
            return None
        try:
            if self.table is not None:
                kind = self.table.fields[attribute].type
                return self.table.kept(attribute, msgspec.convert(value, kind, strict=False))
            kind = column.type.python_type
            return msgspec.convert(value, Int64 if kind is int else kind)
        except (msgspec.ValidationError, InvalidBody) as error:
            message = f"{param}: {attribute}: {error}"
            raise InvalidBody(message, param=param) from error


class _Lack(NamedTuple):
    attribute: str
    action: Action


class Places:
    """The tables of a server."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, database: str, name: str) -> Place | None:
        """The table of that name."""
        if database == DATA and (table := self._database.tables.get(name)) is not None:
            return Place(DATA, name, table.sql, table.key, tuple(table.fields), table)
        if database == SYSTEM and name in self._database.system:
            sql = self._database.system[name]
            hidden = self._database.hidden_columns
            # SQLAlchemy has texts of its own kind for names like __createdtime__.
            names = (str(one.name) for one in sql.columns)
            shown = tuple(one for one in names if (name, one) not in hidden)
            return Place(SYSTEM, name, sql, str(sql.primary_key.columns[0].name), shown)
        return None

    def of(self, database: str, user: User) -> Iterator[Place]:
        """The tables of a database that a user has a right to, by name."""
        names = (
            [table.name for table in self._database.tables]
            if database == DATA
            else self._database.system
            if database == SYSTEM
            else ()
        )
        for name in sorted(map(str, names)):
            if _any(rights(user, database, name)) and (place := self.find(database, name)):
                yield place

    def opened(self, user: User | None, database: str, name: str, wanted: Wanted) -> Place:
        """The table, if the user may do all that with it.

        Raises `NotAuthorised` with a report, and for who may see everything `NotFound`.
        """
        if user is None:
            raise AccessViolation(None)
        if database == SYSTEM and any(action != "read" for action in wanted):
            message = (
                "The 'system' database, tables and records are used internally by harperpy and "
                "cannot be updated or removed."
            )
            raise AccessViolation(user, message)
        place = self.find(database, name)
        of_user = rights(user, database, name)
        if place is None or not _any(of_user):
            raise self._missing(user, database, name)
        lacks: list[Action] = [one for one in wanted if not of_user.allows(one)]
        attributes = [
            _Lack(attribute, action)
            for action, named in wanted.items()
            if action not in lacks and (known := of_user.attributes(action)) is not None
            for attribute in named
            if attribute not in known
        ]
        if lacks or attributes:
            raise refusal(user, place, lacks, attributes)
        return place

    def _missing(self, user: User, database: str, name: str) -> ClientError:
        known = next(self.of(database, user), None) is not None
        known = known or (user.is_super_user and database in (DATA, SYSTEM))
        what = f"table '{database}.{name}'" if known else f"database '{database}'"
        message = f"{what} does not exist"
        if user.is_super_user:
            return NotFound(message, param="table" if known else "database")
        return NotAuthorised(user, [], [message])


def rights(user: User, database: str, table: str) -> TableRights:
    """What a user may do with a table's records."""
    return user.role.permission.table(database, table)


def readable(user: User, place: Place) -> tuple[str, ...]:
    """The attributes of a table that a user may read."""
    known = rights(user, place.database, place.name).attributes("read")
    return tuple(name for name in place.attributes if known is None or name in known)


def seen(user: User, place: Place) -> tuple[str, ...]:
    """The attributes of a table that a user has any right to."""
    return tuple(name for name in place.attributes if _sees(user, place, name))


def refusal(
    user: User, place: Place, lacks: Iterable[Action], attributes: Iterable[tuple[str, Action]]
) -> NotAuthorised:
    """The report: actions on the table, and on attributes, that a user lacks."""
    needed: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name, action in attributes:
        if name in place.attributes and _sees(user, place, name):
            needed.setdefault(name, []).append(action)
        else:
            unknown.append(f"attribute '{name}' does not exist on '{place.full_name}'")
    item = {
        "schema": place.database,
        "table": place.name,
        "required_table_permissions": list(lacks),
        "required_attribute_permissions": [
            {"attribute_name": name, "required_permissions": actions}
            for name, actions in needed.items()
        ],
    }
    there = needed or item["required_table_permissions"]
    return NotAuthorised(user, [item] if there else [], list(dict.fromkeys(unknown)))


def _sees(user: User, place: Place, attribute: str) -> bool:
    of_user = rights(user, place.database, place.name)
    return any(_touches(of_user, action, attribute) for action in ACTIONS[:3])


def _touches(of_user: TableRights, action: Action, attribute: str) -> bool:
    known = of_user.attributes(action)
    return of_user.allows(action) and (known is None or attribute in known)


def _any(of_user: TableRights) -> bool:
    return any(of_user.allows(action) for action in ACTIONS)
