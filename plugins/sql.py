"""`sql`: one SELECT over the tables that the caller may read, and the columns of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from threading import Event
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from harperpy import AccessViolation, ClientError, Context, HarperError, NotAuthorised, Scope, User

from .places import DATA, SYSTEM, Place, Places, readable, refusal, rights
from .searching import MOST_ROWS, TRUNCATED

if TYPE_CHECKING:
    from .select import Statement
    from .select_wall import NotReadable, Readable

_AT_ONCE = 4
_NO_COLUMN = re.compile(r"(no such column|ambiguous column name): (\S+?)\.?$")


class Sql(msgspec.Struct, forbid_unknown_fields=True):
    """One SELECT, over `data.TABLE` and for super users `system.TABLE`."""

    sql: str


def add_operations(scope: Scope) -> None:
    """Offer SQL to whoever may read a table."""
    scope.operations.add("sql", SqlReader(scope).sql, Sql, open_to="user", reads=True)


class SqlReader:
    """Runs statements, a few at once."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._ledger = scope.ledger
        self._places = Places(scope.database)
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def sql(self, request: Sql, context: Context) -> list[dict[str, Any]]:
        """The rows of one SELECT over the tables that the caller may read."""
        if (user := context.user) is None:
            raise AccessViolation(None)
        async with self._turns:
            rows = await self._rows(request.sql, user)
        if len(rows) > MOST_ROWS:
            context.response_headers[TRUNCATED] = str(MOST_ROWS)
        return rows[:MOST_ROWS]

    async def _rows(self, sql: str, user: User) -> list[dict[str, Any]]:
        """The rows, one more than are shown if there are too many."""
        # sqlglot costs 0.1 s to import: only who uses it pays.
        from .select import UnknownTable, understand  # noqa: PLC0415

        known = {
            one: {place.name.lower(): place for place in self._places.of(one, user)}
            for one in (SYSTEM, DATA)
        }
        names = not user.is_super_user
        try:
            # A long one takes its time, and the loop has others to serve.
            statement = await asyncio.to_thread(understand, sql, known, quoted_are_names=names)
        except UnknownTable as error:
            if user.is_super_user:
                raise
            raise NotAuthorised(user, [], [error.item]) from error
        places = [known[database][name] for database, name in sorted(statement.tables)]
        for place in places:
            if not rights(user, place.database, place.name).allows("read"):
                raise refusal(user, place, ["read"], [])
        return await self._read(statement, places, user)

    async def _read(
        self, statement: Statement, places: list[Place], user: User
    ) -> list[dict[str, Any]]:
        from .select_wall import NotReadable, run_select  # noqa: PLC0415

        if any(place.database == SYSTEM for place in places):
            # What is on its way to the database is there before it is asked.
            await self._ledger.flush()
        left = Event()
        try:
            return await asyncio.to_thread(
                run_select,
                self._database.path,
                statement.text,
                boolean_columns=_columns(places, sa.Boolean),
                json_columns=_columns(places, sa.JSON),
                hidden_columns=self._database.hidden_columns,
                readable=_readable(places, user),
                max_rows=MOST_ROWS + 1,
                left=left,
            )
        except NotReadable as error:
            raise _unreadable(error, statement, places, user) from error
        except ClientError as error:
            if user.is_super_user or (told := _as_if_missing(error, places, user)) is None:
                raise
            raise told from error
        finally:
            left.set()


def _readable(places: Iterable[Place], user: User) -> Readable:
    """Which columns of which tables a user may read, in lower case; None for all."""
    found: dict[str, frozenset[str] | None] = {}
    for place in places:
        known = rights(user, place.database, place.name).attributes("read")
        found[place.name.lower()] = (
            None if known is None else frozenset(one.lower() for one in readable(user, place))
        )
    return found


def _columns(places: Iterable[Place], kind: type[sa.types.TypeEngine[Any]]) -> frozenset[str]:
    """The columns that are of a kind in each of the tables that have one of that name."""
    columns = [column for place in places for column in place.sql.columns]
    of_another = {str(one.name) for one in columns if not isinstance(one.type, kind)}
    return frozenset({str(one.name) for one in columns} - of_another)


def _unreadable(
    error: NotReadable, statement: Statement, places: Iterable[Place], user: User
) -> HarperError:
    """What a user is told who asked for a column that is closed: of a hidden one, nothing."""
    place = next(one for one in places if one.name.lower() == error.table)
    if statement.has_star and error.column not in statement.words:
        open_ones = ", ".join(readable(user, place))
        message = f"'*' is for whole tables: name the columns of {place.full_name}: {open_ones}."
        return ClientError(message, status=403, code="insufficient_permissions")
    names = {name.lower(): name for name in place.attributes}
    report = refusal(user, place, [], [(names.get(error.column, error.column), "read")])
    needed = (report.report or {}).get("unauthorized_access")
    return report if needed else _no_column(error.column)


def _as_if_missing(error: ClientError, places: Iterable[Place], user: User) -> ClientError | None:
    """SQLite's words on a column, if it is not one that the user may read, as on one not there."""
    if (found := _NO_COLUMN.search(str(error))) is None:
        return None
    column = found[2].rpartition(".")[2].lower()
    open_ones = {name.lower() for place in places for name in readable(user, place)}
    return None if column in open_ones else _no_column(column)


def _no_column(column: str) -> ClientError:
    return ClientError(f"SQLite does not take the statement: no such column: {column}.")
