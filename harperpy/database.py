"""Database: the `system` schema, behind one thread.

SQLAlchemy's synchronous core in one thread of its own: statements run in the order they were
given, no write waits for another, and the event loop never blocks.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc

from .errors import ConfigError, ServiceUnavailable

T = TypeVar("T")

CREATED, UPDATED = "__createdtime__", "__updatedtime__"

metadata = sa.MetaData()


def _times() -> list[sa.Column[Any]]:
    """When a row was made and last changed, in ms since 1970."""
    return [sa.Column(CREATED, sa.Float), sa.Column(UPDATED, sa.Float)]


hdb_role = sa.Table(
    "hdb_role",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("role", sa.String, nullable=False, unique=True),
    sa.Column("permission", sa.JSON, nullable=False),
    *_times(),
)

hdb_user = sa.Table(
    "hdb_user",
    metadata,
    sa.Column("username", sa.String, primary_key=True),
    sa.Column("password", sa.String, nullable=False),
    sa.Column("role", sa.String, sa.ForeignKey("hdb_role.id"), nullable=False),
    sa.Column("active", sa.Boolean, nullable=False, default=True),
    sa.Column("tenant", sa.String, nullable=False, default="default"),
    *_times(),
)

hdb_token = sa.Table(
    "hdb_token",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("user", sa.String, sa.ForeignKey("hdb_user.username"), nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("name", sa.String),
    sa.Column("prefix", sa.String),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("expires", sa.Float),
    sa.Column("last_used", sa.Float),
    *_times(),
)

hdb_model_calls = sa.Table(
    "hdb_model_calls",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column(CREATED, sa.Float, nullable=False),
    sa.Column("tenant", sa.String),
    sa.Column("user", sa.String),
    sa.Column("app", sa.String),
    sa.Column("request_id", sa.String),
    sa.Column("model", sa.String),
    sa.Column("backend", sa.String, nullable=False),
    sa.Column("backend_name", sa.String),
    sa.Column("provider_model", sa.String),
    sa.Column("method", sa.String, nullable=False),
    sa.Column("adapter", sa.String),
    sa.Column("conversation_id", sa.String),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("completion_tokens", sa.Integer),
    sa.Column("embedding_tokens", sa.Integer),
    sa.Column("cached_tokens", sa.Integer),
    sa.Column("reasoning_tokens", sa.Integer),
    sa.Column("usage_estimated", sa.Boolean, nullable=False),
    sa.Column("gpu_ms", sa.Float),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("ttft_ms", sa.Float),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("error_code", sa.String),
    sa.Column("finish_reason", sa.String),
    sa.Column("upstream_status", sa.Integer),
    sa.Index("hdb_model_calls_created", CREATED),
    sa.Index("hdb_model_calls_backend", "backend", CREATED),
    sa.Index("hdb_model_calls_tenant", "tenant", CREATED),
)

# One step per version of the schema: what to do, and the statement that notes it as done.
_MIGRATIONS: tuple[tuple[Callable[[sa.Connection], None], str], ...] = (
    (metadata.create_all, "PRAGMA user_version = 1"),
)


class Database:
    """One SQLite file. `run` gives a function a connection inside a transaction of its own.

    Without `fsync` a power cut may take the last transactions; a killed process takes none.
    """

    model_calls = hdb_model_calls

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harperpy-database")
        self._engine = sa.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": 5.0, "check_same_thread": False}
        )
        event.listen(self._engine, "connect", _prepare)
        if fsync:
            event.listen(self._engine, "connect", _sync_each_commit)

    @property
    def boolean_columns(self) -> frozenset[str]:
        """Names of the columns that hold 0 or 1 for false or true."""
        return frozenset(
            column.name
            for table in metadata.tables.values()
            for column in table.columns
            if isinstance(column.type, sa.Boolean)
        )

    @property
    def hidden_columns(self) -> frozenset[tuple[str, str]]:
        """Tables and columns that hold what even a super user never reads."""
        return frozenset({("hdb_user", "password"), ("hdb_token", "hash")})

    @property
    def tables(self) -> frozenset[str]:
        """The names of the `system` schema's tables."""
        return frozenset(metadata.tables)

    async def open(self) -> None:
        """Make the file (readable by its owner alone) and bring its schema up to date.

        Raises `ConfigError` for a file that cannot be used.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600, exist_ok=True)
            await self.run(_migrate)
        except (OSError, exc.DatabaseError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.orig
            message = f"cannot use {self.path} as database: {reason}"
            raise ConfigError(message) from error

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """`work(connection)` in one transaction: committed on return, rolled back on raise.

        Raises `ServiceUnavailable` while the file is locked by someone else or the disk is full.
        """
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[sa.Connection], T]) -> Future[T]:
        """As `run`, for callers that do not wait; work is done in the order it is given."""
        return self._thread.submit(self._work, work)

    async def close(self) -> None:
        """Finish what was given, then close the file."""
        self._thread.submit(self._engine.dispose)
        await asyncio.to_thread(self._thread.shutdown)

    def _work(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except exc.OperationalError as error:
            if isinstance(error.orig, sqlite3.OperationalError) and _passing(error.orig):
                message = f"the database is busy: {error.orig}"
                raise ServiceUnavailable(message, headers={"Retry-After": "1"}) from error
            raise


def _passing(error: sqlite3.OperationalError) -> bool:
    """Whether waiting may help: a lock, or a full disk."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;"
    )


def _sync_each_commit(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")


def _migrate(connection: sa.Connection) -> None:
    version = connection.execute(sa.text("PRAGMA user_version")).scalar_one()
    if version > len(_MIGRATIONS):
        message = f"the database is of a newer harperpy (version {version} of its schema)"
        raise ConfigError(message)
    for step, done in _MIGRATIONS[version:]:
        step(connection)
        connection.exec_driver_sql(done)


def now_ms() -> float:
    """Milliseconds since 1970."""
    return time.time_ns() / 1e6


def read_secret(root: Path) -> bytes:
    """The server's own 32 random bytes in `ROOT/secret.key`, made on first use, mode 0600."""
    path = root / "secret.key"
    root.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(32))
    return path.read_bytes()
