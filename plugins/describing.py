"""Describing: `describe_all`, `describe_database`, `describe_table`: what the caller may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import sqlalchemy as sa

from harperpy import AccessViolation, Context, NotAuthorised, NotFound, Scope, User

from .places import DATA, SYSTEM, Place, Places, seen
from .searching import OF_A_TABLE, Text


class DescribeAll(msgspec.Struct, forbid_unknown_fields=True):
    """Every database but `system`."""


class DescribeDatabase(msgspec.Struct, forbid_unknown_fields=True):
    """One database."""

    synonyms: ClassVar[Mapping[str, str]] = OF_A_TABLE

    database: Text = DATA


class DescribeTable(msgspec.Struct, forbid_unknown_fields=True):
    """One table."""

    synonyms: ClassVar[Mapping[str, str]] = OF_A_TABLE

    table: Text
    database: Text = DATA


def add_operations(scope: Scope) -> None:
    """Offer the descriptions."""
    describing = Describing(scope)
    add = scope.operations.add
    add("describe_all", describing.all, DescribeAll, open_to="user", reads=True)
    for name in ("describe_database", "describe_schema"):
        add(name, describing.database, DescribeDatabase, open_to="user", reads=True)
    add("describe_table", describing.table, DescribeTable, open_to="user", reads=True)


class Describing:
    """The descriptions. What the caller has no right to is not in them."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._places = Places(scope.database)

    async def all(self, _: DescribeAll, context: Context) -> dict[str, Any]:
        """The tables of the database `data`, by database and name."""
        return {DATA: await self._tables(DATA, _user(context))}

    async def database(self, request: DescribeDatabase, context: Context) -> dict[str, Any]:
        """The tables of a database, by name."""
        user = _user(context)
        tables = await self._tables(request.database, user)
        if not tables and (request.database not in (DATA, SYSTEM) or not user.is_super_user):
            message = f"database '{request.database}' does not exist"
            if user.is_super_user:
                raise NotFound(message, param="database")
            raise NotAuthorised(user, [], [message])
        return tables

    async def table(self, request: DescribeTable, context: Context) -> dict[str, Any]:
        """A table: its key, its attributes, how many records it has."""
        user = _user(context)
        place = self._places.opened(user, request.database, request.table, _sight(user, request))
        return await self._described(place, user)

    async def _tables(self, database: str, user: User) -> dict[str, Any]:
        places = self._places.of(database, user)
        return {place.name: await self._described(place, user) for place in places}

    async def _described(self, place: Place, user: User) -> dict[str, Any]:
        counted = sa.select(sa.func.count()).select_from(place.sql)
        path = self._database.path

        def work(connection: sa.Connection) -> tuple[int, int]:
            return connection.execute(counted).scalar_one(), path.stat().st_size

        count, size = await self._database.read(work)
        indexed = {one.name for index in place.sql.indexes for one in index.columns}
        return {
            "schema": place.database,
            "name": place.name,
            "hash_attribute": place.key,
            "audit": place.database == DATA and self._database.audited,
            "attributes": [_attribute(place, name, indexed) for name in seen(user, place)],
            "record_count": count,
            "db_size": size,
        }


def _sight(user: User, request: DescribeTable) -> Mapping[Any, list[str]]:
    """What opens a description: any right at all, `read` of the system's tables."""
    return {"read": []} if request.database == SYSTEM or user.is_super_user else {}


def _attribute(place: Place, name: str, indexed: set[str]) -> dict[str, Any]:
    column = place.sql.c[name]
    shown: dict[str, Any] = {
        "attribute": name,
        "type": str(column.type),
        "nullable": column.nullable,
    }
    if name == place.key:
        shown["is_primary_key"] = True
    return {**shown, "indexed": True} if name in indexed else shown


def _user(context: Context) -> User:
    if context.user is None:
        raise AccessViolation(None)
    return context.user
