"""Database: the `system` schema, behind one thread that writes and a few that read.

SQLAlchemy's synchronous core in threads of its own: what writes runs in the order it was given,
one piece of work at a time, what only reads waits for no writer, and the event loop never blocks.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc

from .accounting import current_caller
from .errors import (
    ClientError,
    ConfigError,
    Conflict,
    HarperError,
    ServiceUnavailable,
    TransactionError,
)
from .gate import Gate
from .migrations import migrate
from .processors import keep_to
from .system import hdb_analytics, hdb_audit, hdb_model_calls, hdb_model_calls_daily, metadata
from .tables import Tables

T = TypeVar("T")

_READERS = 4
_TOGETHER = 1000
_LOOK_SECONDS = 0.1
_STEPS_BETWEEN_LOOKS = 1000
_SECRET_BYTES = 32
_PASSING = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
)


class Database:
    """One SQLite file. `run` gives a function a connection inside a transaction of its own.

    Without `fsync` a power cut may take the last transactions; a killed process takes none.
    `busy_seconds` is how long a writer waits for its turn, `transaction_seconds` how long a
    request's transaction may keep the others from theirs. `tables` makes those of plugins.
    `writes_on` and `reads_on` are the processors that its threads keep to; all where none is named.

    The file is made by `open` or not at all. While it is away from its place nothing is written;
    another one that is there later is opened anew.
    """

    model_calls = hdb_model_calls
    model_calls_daily = hdb_model_calls_daily
    audit = hdb_audit
    analytics = hdb_analytics

    def __init__(
        self,
        path: Path,
        *,
        fsync: bool = False,
        busy_seconds: float = 5.0,
        transaction_seconds: float = 30.0,
        audited: bool = True,
        writes_on: Sequence[int] = (),
        reads_on: Sequence[int] = (),
    ) -> None:
        self.path = path
        self.busy_seconds = busy_seconds
        self.transaction_seconds = transaction_seconds
        self.audited = audited
        self.tables = Tables(self.run)
        self._thread = ThreadPoolExecutor(1, "harperpy-database", keep_to, (*writes_on,))
        self._readers = ThreadPoolExecutor(_READERS, "harperpy-reader", keep_to, (*reads_on,))
        # Who may call, and what, is not to wait for what others look for in their tables.
        self._searchers = ThreadPoolExecutor(_READERS, "harperpy-search", keep_to, (*reads_on,))
        self._engine = self._make_engine(_begin_by_hand, fsync=fsync)
        event.listen(self._engine, "begin", _begin_to_write)
        self._writer = self._make_engine(_guard, _begin_by_hand, fsync=fsync, cached_statements=0)
        self._reader = self._make_engine(_guard, _read_only, cached_statements=0)

    def _make_engine(
        self, *prepare: Callable[..., None], fsync: bool = False, **options: Any
    ) -> sa.Engine:
        # Nothing cached, where a gate stands: SQLite asks it when a statement is prepared.
        settings = {"timeout": self.busy_seconds, "check_same_thread": False, **options}
        # An error goes to the log, and what was written may be what someone asked a model.
        engine = sa.create_engine(
            sa.URL.create(
                "sqlite",
                database=self.path.absolute().as_uri(),
                # SQLite would make a file that is away, and what is written there would be lost.
                query={"mode": "rw", "uri": "true"},
            ),
            connect_args=settings,
            hide_parameters=True,
        )
        for listener in (_prepare, *prepare, *([_sync_each_commit] if fsync else [])):
            event.listen(engine, "connect", listener)
        event.listen(engine, "connect", self._remember_file)
        event.listen(engine, "checkout", self._leave_other_file)
        event.listen(engine, "commit", self._check_file)
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
    def system(self) -> Mapping[str, sa.Table]:
        """The tables of the `system` schema, by name."""
        return metadata.tables

    @property
    def system_tables(self) -> frozenset[str]:
        """The names of the `system` schema's tables."""
        return frozenset(metadata.tables)

    async def open(self, *, make: bool = True) -> None:
        """Make the file (readable by its owner alone) and bring its schema up to date.

        Without `make` it was there before, and is waited for as for a turn to write. Raises
        `ConfigError` for a file that cannot be used.
        """
        try:
            if make:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch(mode=0o600, exist_ok=True)
            else:
                await self._back()
            await self.run(migrate)
        except (OSError, exc.DatabaseError, ServiceUnavailable) as error:
            message = f"cannot use {self.path} as database: {_reason(error)}"
            raise ConfigError(message) from error

    async def _back(self) -> None:
        """Wait for the file a while. Raises `OSError`."""
        deadline = time.monotonic() + self.busy_seconds
        while time.monotonic() < deadline and _file_at(self.path) is None:  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(_LOOK_SECONDS)
        self.path.stat()

    async def run(
        self, work: Callable[[sa.Connection], T], then: Callable[[T], object] | None = None
    ) -> T:
        """`work(connection)` in one transaction: committed on return, rolled back on raise.

        What it reads stays so until its end: no other process writes meanwhile. Once it is
        committed the loop calls `then(result)`, also if nobody waits for it any more.
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
        future = self.submit(work)
        if then is not None:
            # Before who waits is told: what it does next finds that done.
            future.add_done_callback(partial(_tell, asyncio.get_running_loop(), then))
        return await asyncio.wrap_future(future)

    def submit(self, work: Callable[[sa.Connection], T]) -> Future[T]:
        """As `run`, for callers that do not wait; work is done in the order it is given."""
        return self._thread.submit(self._work, work)

    async def read(self, work: Callable[[sa.Connection], T], seconds: float | None = None) -> T:
        """`work(connection)` of what is committed: it may not write, and waits for no writer.

        It is stopped when nobody waits for it any more. Raises `ClientError` 408 for a statement
        that is not done within `seconds`, if they are given.
        """
        left = Event()
        threads = self._readers if seconds is None else self._searchers
        try:
            return await asyncio.wrap_future(threads.submit(self._read, work, seconds, left))
        finally:
            left.set()

    async def prune(self, table: sa.Table, old: sa.ColumnElement[bool]) -> None:
        """Remove the rows, some at a time: who else writes has turns between. Raises as `run`."""
        some = sa.select(table.c.id).where(old).limit(_TOGETHER)
        gone = sa.delete(table).where(table.c.id.in_(some))
        while await self.run(lambda connection: connection.execute(gone).rowcount):
            pass

    def occupy(self, work: Callable[[sa.Engine], None]) -> Future[None]:
        """Let `work(engine)` have the writing thread until it returns."""
        return self._thread.submit(work, self._writer)

    async def close(self) -> None:
        """Finish what was given, then close the file."""
        self._thread.submit(self._engine.dispose)
        for threads in (self._thread, self._readers, self._searchers):
            await asyncio.to_thread(threads.shutdown)
        self._writer.dispose()
        self._reader.dispose()

    def _remember_file(self, _: sqlite3.Connection, record: Any) -> None:
        record.info["file"] = _file_at(self.path)

    def _leave_other_file(self, _: sqlite3.Connection, record: Any, __: object) -> None:
        if (there := _file_at(self.path)) is not None and there != record.info["file"]:
            message = "another file is there"
            raise exc.DisconnectionError(message)

    def _check_file(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        there = _file_at(self.path)
        if driver.in_transaction and (there is None or there != connection.info["file"]):
            raise _away()

    def _work(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except exc.DBAPIError as error:
            if (refusal := plain_refusal(error)) is not None:
                raise refusal from error
            raise

    def _read(self, work: Callable[[sa.Connection], T], seconds: float | None, left: Event) -> T:
        end = inf if seconds is None else time.monotonic() + seconds
        try:
            with self._reader.connect() as connection:
                driver: Any = connection.connection.driver_connection
                driver.set_progress_handler(
                    lambda: left.is_set() or time.monotonic() > end, _STEPS_BETWEEN_LOOKS
                )
                try:
                    return work(connection)
                finally:
                    driver.set_progress_handler(None, 0)
        except exc.OperationalError as error:
            if (refusal := plain_refusal(error)) is not None:
                raise refusal from error
            raise


def _tell(loop: asyncio.AbstractEventLoop, then: Callable[[T], object], done: Future[T]) -> None:
    if not done.cancelled() and done.exception() is None:
        with suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(then, done.result())


def plain_refusal(error: BaseException) -> HarperError | None:
    """What a database's error means to who asked; None for one that only a developer can mend."""
    refusal = _meaning(error)
    if refusal is not None and refusal is not error:
        # A frame of SQLAlchemy's holds the error that holds it, and with it all that waits.
        error.__traceback__ = None
    return refusal


def _meaning(error: BaseException) -> HarperError | None:
    if isinstance(error, ServiceUnavailable):
        return error
    cause = error.orig if isinstance(error, exc.DBAPIError) else None
    if isinstance(cause, sqlite3.OperationalError) and _code(cause) == sqlite3.SQLITE_CANTOPEN:
        return _away()
    if isinstance(cause, sqlite3.OperationalError) and _code(cause) in _PASSING:
        message = f"the database is busy: {cause}"
        return ServiceUnavailable(message, headers={"Retry-After": "1"})
    if isinstance(cause, sqlite3.OperationalError) and _code(cause) == sqlite3.SQLITE_INTERRUPT:
        message = "it took too long and was stopped: ask for less by conditions on indexed fields"
        return ClientError(message, status=408)
    if isinstance(cause, sqlite3.IntegrityError) and _doubled(cause):
        return Conflict("There is a record with that key already.")
    return None


def _doubled(error: sqlite3.IntegrityError) -> bool:
    return error.sqlite_errorcode in (
        sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
        sqlite3.SQLITE_CONSTRAINT_ROWID,
        sqlite3.SQLITE_CONSTRAINT_UNIQUE,
    )


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _away() -> ServiceUnavailable:
    message = "the database is away"
    return ServiceUnavailable(message, headers={"Retry-After": "1"})


def _file_at(path: Path) -> tuple[int, int] | None:
    """Which file is there, whatever its name."""
    try:
        found = os.stat(path)  # noqa: PTH116  # before each commit
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> object:
    if isinstance(error, OSError):
        return error.strerror
    return error.orig if isinstance(error, exc.DBAPIError) else error


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    # The system has the file in memory as well; a connection, and there are many, needs little.
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;"
        "PRAGMA cache_size = -512;"
    )


def _sync_each_commit(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")


def _guard(connection: sqlite3.Connection, record: Any) -> None:
    gate = record.info["gate"] = Gate()
    connection.set_authorizer(gate)


def _begin_by_hand(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None


def _begin_to_write(connection: sa.Connection) -> None:
    # Else another process might write between what is read here and what is made of it.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _read_only(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only = ON")


def read_secret(root: Path, *, make: bool = True) -> bytes:
    """The server's own 32 random bytes in `ROOT/secret.key`, made on first use, mode 0600.

    Raises `ConfigError` for a file that cannot be used, or holds fewer: anybody could sign with
    what is in none.
    """
    path = root / "secret.key"
    try:
        if make and not path.exists():
            _make_secret(path)
        secret = path.read_bytes()
    except OSError as error:
        message = f"cannot use {path}: {error.strerror}"
        raise ConfigError(message) from error
    if len(secret) < _SECRET_BYTES:
        message = f"{path}: expected {_SECRET_BYTES} bytes, got {len(secret)}: restore or remove it"
        raise ConfigError(message)
    return secret


def _make_secret(path: Path) -> None:
    """All of it or nothing, wherever the process ends: one that is short is never mended."""
    new = path.with_suffix(".new")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(os.urandom(_SECRET_BYTES))
        file.flush()
        os.fsync(handle)
    new.replace(path)
