"""Database: the `system` schema, behind one thread that writes and a few that read.

SQLAlchemy's synchronous core in threads of its own: what writes runs in the order it was given,
one piece of work at a time, what only reads waits for no writer, and the event loop never blocks.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc

from .accounting import current_caller
from .errors import ConfigError, Conflict, ServiceUnavailable, TransactionError
from .gate import Gate
from .tables import Tables

T = TypeVar("T")

_READERS = 4

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

hdb_audit = sa.Table(
    "hdb_audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("timestamp", sa.Float, nullable=False, index=True),
    sa.Column("operation", sa.String, nullable=False),
    sa.Column("database", sa.String, nullable=False),
    sa.Column("table", sa.String, nullable=False),
    sa.Column("user_name", sa.String),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("request_id", sa.String),
    sa.Column("hash_values", sa.JSON(none_as_null=True)),
    sa.Column("records", sa.JSON(none_as_null=True)),
    sa.Column("original_records", sa.JSON(none_as_null=True)),
)


def _add_original_records(connection: sa.Connection) -> None:
    known = [column["name"] for column in sa.inspect(connection).get_columns("hdb_audit")]
    if "original_records" not in known:
        connection.exec_driver_sql("ALTER TABLE hdb_audit ADD COLUMN original_records JSON")


# One step per version of the schema: what to do, and the statement that notes it as done.
_MIGRATIONS: tuple[tuple[Callable[[sa.Connection], None], str], ...] = (
    (metadata.create_all, "PRAGMA user_version = 1"),
    (partial(hdb_audit.create, checkfirst=True), "PRAGMA user_version = 2"),
    (_add_original_records, "PRAGMA user_version = 3"),
)


class Database:
    """One SQLite file. `run` gives a function a connection inside a transaction of its own.

    Without `fsync` a power cut may take the last transactions; a killed process takes none.
    `busy_seconds` is how long a writer waits for its turn, `transaction_seconds` how long a
    request's transaction may keep the others from theirs. `tables` makes those of plugins.
    """

    model_calls = hdb_model_calls
    audit = hdb_audit

    def __init__(
        self,
        path: Path,
        *,
        fsync: bool = False,
        busy_seconds: float = 5.0,
        transaction_seconds: float = 30.0,
        audited: bool = True,
    ) -> None:
        self.path = path
        self.busy_seconds = busy_seconds
        self.transaction_seconds = transaction_seconds
        self.audited = audited
        self.tables = Tables(self.run)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harperpy-database")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="harperpy-reader")
        self._engine = self._make_engine(fsync=fsync)
        self._writer = self._make_engine(_guard, _begin_by_hand, fsync=fsync, cached_statements=0)
        self._reader = self._make_engine(_guard, _read_only, cached_statements=0)

    def _make_engine(
        self, *prepare: Callable[..., None], fsync: bool = False, **options: Any
    ) -> sa.Engine:
        # Nothing cached, where a gate stands: SQLite asks it when a statement is prepared.
        settings = {"timeout": self.busy_seconds, "check_same_thread": False, **options}
        # An error goes to the log, and what was written may be what someone asked a model.
        engine = sa.create_engine(
            f"sqlite:///{self.path}", connect_args=settings, hide_parameters=True
        )
        for listener in (_prepare, *prepare, *([_sync_each_commit] if fsync else [])):
            event.listen(engine, "connect", listener)
        return engine

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
    def system_tables(self) -> frozenset[str]:
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

        Raises `ServiceUnavailable` while the file is locked by someone else or the disk is full,
        `Conflict` for a key that is there already, and `TransactionError` in a request whose own
        transaction this would wait for.
        """
        caller = current_caller.get()
        if caller is not None and caller.writing:
            message = (
                "this request's transaction has written, and other work on the database waits for "
                "its end: do it before the first write, or after `await tx.commit()`"
            )
            raise TransactionError(message)
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[sa.Connection], T]) -> Future[T]:
        """As `run`, for callers that do not wait; work is done in the order it is given."""
        return self._thread.submit(self._work, work)

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """`work(connection)` of what is committed: it may not write, and waits for no writer."""
        return await asyncio.wrap_future(self._readers.submit(self._read, work))

    def occupy(self, work: Callable[[sa.Engine], None]) -> Future[None]:
        """Let `work(engine)` have the writing thread until it returns."""
        return self._thread.submit(work, self._writer)

    async def close(self) -> None:
        """Finish what was given, then close the file."""
        self._thread.submit(self._engine.dispose)
        for threads in (self._thread, self._readers):
            await asyncio.to_thread(threads.shutdown)
        self._writer.dispose()
        self._reader.dispose()

    def _work(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except exc.DBAPIError as error:
            if (refusal := plain_refusal(error)) is not None:
                raise refusal from error
            raise

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            with self._reader.connect() as connection:
                return work(connection)
        except exc.OperationalError as error:
            if (refusal := plain_refusal(error)) is not None:
                raise refusal from error
            raise


def plain_refusal(error: BaseException) -> ServiceUnavailable | Conflict | None:
    """What a database's error means to who asked; None for one that only a developer can mend."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else None
    if isinstance(cause, sqlite3.OperationalError) and _passing(cause):
        message = f"the database is busy: {cause}"
        return ServiceUnavailable(message, headers={"Retry-After": "1"})
    if isinstance(cause, sqlite3.IntegrityError) and _doubled(cause):
        return Conflict("There is a record with that key already.")
    return None


def _doubled(error: sqlite3.IntegrityError) -> bool:
    return error.sqlite_errorcode in (
        sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
        sqlite3.SQLITE_CONSTRAINT_ROWID,
        sqlite3.SQLITE_CONSTRAINT_UNIQUE,
    )


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


def _guard(connection: sqlite3.Connection, record: Any) -> None:
    gate = record.info["gate"] = Gate()
    connection.set_authorizer(gate)


def _begin_by_hand(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None


def _read_only(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only = ON")


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
