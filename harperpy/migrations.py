"""How the `system` schema of an older file is brought up to date."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sqlalchemy as sa
from sqlalchemy.schema import CreateColumn

from .daily import day_of, recount_days
from .errors import ConfigError
from .system import (
    CREATED,
    hdb_analytics,
    hdb_audit,
    hdb_limit,
    hdb_limit_hold,
    hdb_limit_rate,
    hdb_model_calls,
    hdb_model_calls_daily,
    hdb_role,
    hdb_status,
    hdb_token,
    metadata,
)


def _add_columns(connection: sa.Connection, table: sa.Table) -> None:
    """The columns that the table of an older file lacks; they may be null."""
    known = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in known:
            defined = str(CreateColumn(column).compile(dialect=connection.dialect))
            added = sa.DDL("ALTER TABLE %(table)s ADD COLUMN " + defined)  # type: ignore[no-untyped-call]  # the library's
            connection.execute(added.against(table))


def _add_indexes(connection: sa.Connection, table: sa.Table) -> None:
    """Those that the table of an older file lacks."""
    for index in table.indexes:
        index.create(connection, checkfirst=True)


def _add_costs(connection: sa.Connection) -> None:
    """What calls cost, and the days of the calls that are there."""
    _add_columns(connection, hdb_model_calls)
    hdb_model_calls_daily.create(connection, checkfirst=True)
    days = sa.select(day_of(hdb_model_calls.c[CREATED])).distinct()
    recount_days(connection, connection.scalars(days))


def _add_grants_and_families(connection: sa.Connection) -> None:
    """What keys are granted, and which refresh tokens come from one log-in."""
    _add_columns(connection, hdb_token)
    _add_indexes(connection, hdb_token)
    of_refresh = sa.update(hdb_token).where(hdb_token.c.kind == "refresh")
    connection.execute(of_refresh.values(family=hdb_token.c.id))
    for row in connection.execute(sa.select(hdb_role.c.id, hdb_role.c.permission)).all():
        # It used to say nothing, and now says that there are none.
        if row.permission.get("operations") == []:
            left = {key: value for key, value in row.permission.items() if key != "operations"}
            of_role = sa.update(hdb_role).where(hdb_role.c.id == row.id)
            connection.execute(of_role.values(permission=left))


def _add_limits(connection: sa.Connection) -> None:
    for table in (hdb_limit, hdb_limit_rate, hdb_limit_hold):
        table.create(connection, checkfirst=True)


# One step per version of the schema: what to do, and the statement that notes it as done.
_MIGRATIONS: tuple[tuple[Callable[[sa.Connection], None], str], ...] = (
    (metadata.create_all, "PRAGMA user_version = 1"),
    (partial(hdb_audit.create, checkfirst=True), "PRAGMA user_version = 2"),
    (partial(_add_columns, table=hdb_audit), "PRAGMA user_version = 3"),
    (_add_costs, "PRAGMA user_version = 4"),
    (_add_grants_and_families, "PRAGMA user_version = 5"),
    (_add_limits, "PRAGMA user_version = 6"),
    (partial(hdb_analytics.create, checkfirst=True), "PRAGMA user_version = 7"),
    (partial(_add_columns, table=hdb_audit), "PRAGMA user_version = 8"),
    (partial(hdb_status.create, checkfirst=True), "PRAGMA user_version = 9"),
    (partial(_add_columns, table=hdb_token), "PRAGMA user_version = 10"),
    (partial(_add_indexes, table=hdb_model_calls_daily), "PRAGMA user_version = 11"),
)


def migrate(connection: sa.Connection) -> None:
    """Bring the file's tables up to date. Raises `ConfigError` for a newer file."""
    version = connection.execute(sa.text("PRAGMA user_version")).scalar_one()
    if version > len(_MIGRATIONS):
        message = f"the database is of a newer harperpy (version {version} of its schema)"
        raise ConfigError(message)
    for step, done in _MIGRATIONS[version:]:
        step(connection)
        connection.exec_driver_sql(done)
