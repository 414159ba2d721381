"""Searching: `search_by_id`, `search_by_value` and `search_by_conditions` over tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from harperpy import AccessViolation, ClientError, Context, InvalidBody, Scope, User, bounded

from .conditions import SYNONYMS, Conditions, Group, compared, has
from .places import DATA, Place, Places, Wanted, readable

MOST_ROWS = 10_000
TRUNCATED = "x-harper-truncated"
"""The header that says at how many rows an answer was cut off."""

_MOST_SORTS = 8

Text = Annotated[str, Meta(min_length=1)]
Limit = Annotated[int, Meta(ge=1, le=MOST_ROWS)]
Offset = Annotated[int, Meta(ge=0, le=2**31)]
OF_A_TABLE = {"schema": "database"}


class SearchById(msgspec.Struct, forbid_unknown_fields=True):
    """Records by their keys."""

    synonyms: ClassVar[Mapping[str, str]] = {**OF_A_TABLE, "hash_values": "ids"}

    table: Text
    ids: list[Any]
    database: Text = DATA
    get_attributes: list[str] | Text = "*"


class SearchByValue(msgspec.Struct, forbid_unknown_fields=True):
    """Records that have a value; a `*` at an end of a text stands for anything."""

    synonyms: ClassVar[Mapping[str, str]] = {**OF_A_TABLE, **SYNONYMS}

    table: Text
    attribute: Text
    value: Any
    database: Text = DATA
    get_attributes: list[str] | Text = "*"
    limit: Limit | None = None
    offset: Offset = 0


class Sort(msgspec.Struct, forbid_unknown_fields=True):
    """In which order; `next` for those that are equal."""

    attribute: Text
    descending: bool = False
    next: Sort | None = None


class SearchByConditions(msgspec.Struct, forbid_unknown_fields=True):
    """Records that fulfil all conditions, or with `or` any."""

    synonyms: ClassVar[Mapping[str, str]] = OF_A_TABLE

    table: Text
    conditions: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    database: Text = DATA
    operator: Literal["and", "or", "AND", "OR"] = "and"
    get_attributes: list[str] | Text = "*"
    sort: Sort | None = None
    limit: Limit | None = None
    offset: Offset = 0


def add_operations(scope: Scope) -> None:
    """Offer the searches, each to whoever may read what it touches."""
    search = Searching(scope)
    for name in ("search_by_id", "search_by_hash"):
        scope.operations.add(name, search.by_id, SearchById, open_to="user", reads=True)
    add = scope.operations.add
    add("search_by_value", search.by_value, SearchByValue, open_to="user", reads=True)
    add(
        "search_by_conditions",
        search.by_conditions,
        SearchByConditions,
        open_to="user",
        reads=True,
    )


class Searching:
    """The searches."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._ledger = scope.ledger
        self._places = Places(scope.database)

    async def by_id(self, request: SearchById, context: Context) -> list[dict[str, Any]]:
        """The records of these keys, those that there are, in the order of the keys."""
        known = self._places.find(request.database, request.table)
        # Whoever finds a record by its key learns the key.
        place, attributes = self._opened(request, [known.key] if known else [], context)
        if len(request.ids) > MOST_ROWS:
            message = f"ids: expected at most {MOST_ROWS}"
            raise InvalidBody(message, param="ids")
        keys = [place.value(place.key, key, f"ids[{at}]") for at, key in enumerate(request.ids)]
        wanted = dict.fromkeys(keys)
        column = place.sql.c[place.key]
        asked = sa.select(place.sql).where(column.in_([*wanted]))
        found = {row[place.key]: row for row in await self._rows(place, asked, context)}
        return [place.shown(found[key], attributes) for key in wanted if key in found]

    async def by_value(self, request: SearchByValue, context: Context) -> list[dict[str, Any]]:
        """The records whose attribute has the value."""
        place, attributes = self._opened(request, [request.attribute], context)
        null = request.value is None
        column = compared(place, request.attribute, "attribute", json=null)
        where = has(place, column, request.value)
        asked = sa.select(place.sql).where(where).order_by(place.sql.c[place.key])
        return await self._page(place, asked, request, attributes, context)

    async def by_conditions(
        self, request: SearchByConditions, context: Context
    ) -> list[dict[str, Any]]:
        """The records that fulfil the conditions."""
        conditions = Conditions()
        group = Group(request.conditions, request.operator)
        read = conditions.read(group, "")
        sorts = [*_sorts(request.sort)]
        named = [*conditions.attributes, *(sort.attribute for sort in sorts)]
        place, attributes = self._opened(request, named, context)
        order: list[sa.ColumnElement[Any]] = []
        for sort in sorts:
            column = compared(place, sort.attribute, "sort")
            order.append(column.desc() if sort.descending else column.asc())
        asked = sa.select(place.sql).where(read(place))
        asked = asked.order_by(*order, place.sql.c[place.key])
        return await self._page(place, asked, request, attributes, context)

    def _opened(
        self,
        request: SearchById | SearchByValue | SearchByConditions,
        named: list[str],
        context: Context,
    ) -> tuple[Place, tuple[str, ...]]:
        """The table, and the attributes to show of it: all that may be read, or those asked for."""
        asked = request.get_attributes
        shown = [*map(str.strip, asked.split(","))] if isinstance(asked, str) else asked
        wanted = [] if "*" in shown else [*shown]
        read: Wanted = {"read": [*wanted, *named]}
        place = self._places.opened(context.user, request.database, request.table, read)
        for name in wanted:
            compared(place, name, "get_attributes", json=True)
        return place, tuple(wanted) or readable(_user(context), place)

    async def _page(
        self,
        place: Place,
        asked: sa.Select[Any],
        request: SearchByValue | SearchByConditions,
        attributes: tuple[str, ...],
        context: Context,
    ) -> list[dict[str, Any]]:
        limit = request.limit or MOST_ROWS
        more = 0 if request.limit else 1
        page = asked.limit(limit + more).offset(request.offset)
        rows = await self._rows(place, page, context)
        if len(rows) > limit:
            context.response_headers[TRUNCATED] = str(MOST_ROWS)
        return [place.shown(row, attributes) for row in rows[:limit]]

    async def _rows(
        self, place: Place, asked: sa.Select[Any], context: Context
    ) -> list[dict[str, Any]]:
        if place.table is not None:
            return await context.transaction().execute(bounded(asked))
        # What is on its way to the database is there before it is asked.
        await self._ledger.flush()

        def work(connection: sa.Connection) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(asked).mappings()]

        return await self._database.read(work)


def _sorts(sort: Sort | None) -> Iterator[Sort]:
    count = 0
    while sort is not None:
        count += 1
        if count > _MOST_SORTS:
            message = f"sort: expected at most {_MOST_SORTS} attributes"
            raise ClientError(message, param="sort")
        yield sort
        sort = sort.next


def _user(context: Context) -> User:
    if context.user is None:
        raise AccessViolation(None)
    return context.user
