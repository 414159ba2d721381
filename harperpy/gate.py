"""Gate: what a plugin's own statement may do to the database file, asked access by access."""

from __future__ import annotations

import sqlite3
from typing import Self

import sqlalchemy as sa

_OURS = "hdb_"
_WRITES = {
    sqlite3.SQLITE_INSERT: "insert",
    sqlite3.SQLITE_UPDATE: "update",
    sqlite3.SQLITE_DELETE: "delete",
    sqlite3.SQLITE_CREATE_TABLE: "create_table",
    sqlite3.SQLITE_ALTER_TABLE: "alter_table",
    sqlite3.SQLITE_DROP_TABLE: "drop_table",
}
_TABLE_IN_FIRST = frozenset(
    {
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_UPDATE,
        sqlite3.SQLITE_DELETE,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_DROP_VIEW,
    }
)
_TABLE_IN_SECOND = frozenset(
    {
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_DROP_TRIGGER,
    }
)
_NOT_A_PLUGINS = {
    sqlite3.SQLITE_TRANSACTION: "BEGIN, COMMIT or ROLLBACK",
    sqlite3.SQLITE_SAVEPOINT: "SAVEPOINT",
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
}


class Gate:
    """SQLite's authorizer of a plugin's statements: keeps them off the `hdb_` tables.

    It is shut while a plugin's own statement runs. `written` are the (operation, table) pairs of
    that statement, `refusal` is the sentence for what was not allowed.
    """

    def __init__(self) -> None:
        self._shut = False
        self.written: dict[tuple[str, str], None] = {}
        self.refusal: str | None = None

    def __enter__(self) -> Self:
        self._shut = True
        self.written, self.refusal = {}, None
        return self

    def __exit__(self, *_: object) -> None:
        self._shut = False

    def __call__(
        self, action: int, first: str | None, second: str | None, _: str | None, trigger: str | None
    ) -> int:
        """SQLite's question about one access, while it prepares a statement."""
        if not self._shut:
            return sqlite3.SQLITE_OK
        if action in _NOT_A_PLUGINS:
            return self._deny(f"{_NOT_A_PLUGINS[action]} is not for a plugin's statement")
        if action not in _TABLE_IN_FIRST | _TABLE_IN_SECOND:
            return sqlite3.SQLITE_OK
        table = (first if action in _TABLE_IN_FIRST else second) or ""
        if table.lower().startswith(_OURS):
            return self._deny(f"{table} is the server's own, as are all tables called {_OURS}…")
        if action in _WRITES and trigger is None and not table.startswith("sqlite_"):
            self.written[_WRITES[action], table] = None
        return sqlite3.SQLITE_OK

    def _deny(self, sentence: str) -> int:
        self.refusal = self.refusal or sentence
        return sqlite3.SQLITE_DENY


def gate_of(connection: sa.Connection) -> Gate:
    """The gate of a connection that plugins' statements run on."""
    gate: Gate = connection.info["gate"]
    return gate
