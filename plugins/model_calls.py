"""Keeps each model call in the journal, and moves it from there to `system.hdb_model_calls`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, exc

from harperpy import (
    Booking,
    CallRow,
    HarperError,
    Journal,
    JournalReader,
    JournalStep,
    Scope,
    Waiting,
    row_of,
)

from . import reconciliation
from .receipts import GetModelCall, Receipts

_MOVE_SECONDS = 0.25
_RETRY_SECONDS = 1.0
_CLEANING_SECONDS = 3600.0
_DAY_MS = 86_400_000
# What is wrong with a row, and not with the database.
_UNFIT = (exc.InterfaceError, exc.ProgrammingError, exc.IntegrityError, OverflowError)
# More would keep other writers from their turn.
_MOST_ROWS = 1000
_PAUSE_SECONDS = 0.002


async def handle_application(scope: Scope) -> None:
    """Keep the calls from now on; those that an earlier process left behind get their rows."""
    accounting = scope.config.accounting
    folder = scope.root / "journal"
    fsync = accounting.durability == "fsync"
    mover = Mover(scope, folder, Journal(folder, most=accounting.journal_size, fsync=fsync))
    scope.ledger.keep(mover.journal, mover.flush)
    own = Receipts(scope)
    scope.operations.add(
        "get_model_call", own.get_model_call, GetModelCall, open_to="user", reads=True
    )
    reconciliation.add_operation(scope)
    scope.on_close(mover.close)
    scope.create_task(mover.begin(), name="journal")
    scope.create_task(mover.clean(accounting.retention_seconds), name="retention")


class Mover:
    """Moves calls from the journal to the database, each once, and tries again until it can.

    An id that is there already is left as it is: a step may be made twice, and several processes
    may move the same call. All of it runs in the database's thread.
    """

    def __init__(self, scope: Scope, folder: Path, journal: Journal) -> None:
        self.journal = journal
        self._folder = folder
        self._database = scope.database
        self._logger = scope.logger
        self._loop = asyncio.get_running_loop()
        self._booking = Booking()
        self._most = _MOST_ROWS
        self._taken = Waiting([], [])
        self._others: dict[Path, JournalReader] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        journal.told = self._tell

    async def flush(self) -> None:
        """Give each call that has ended its row, other processes' included.

        Raises `ServiceUnavailable` where the database does not take them.
        """
        await self._move_own()
        left = True
        while left:
            steps = await self._database.run(self._move_others)
            for reader, step in steps:
                reader.commit(step)
            left = any(step.left for _, step in steps)
        await self.adopt()

    async def adopt(self) -> None:
        """Give rows to what processes noted that are no more, and remove what they left."""
        with JournalReader.orphans(self._folder) as orphans:
            for one in orphans:
                burying = self._database.submit(partial(self._bury, one))
                # Before the database's next work: what that deletes is not found here again.
                burying.add_done_callback(partial(_remove, one))
                await asyncio.wrap_future(burying)

    async def begin(self) -> None:
        """Adopt what earlier processes left behind, as soon as the database takes it."""
        while True:
            try:
                return await self.adopt()
            except HarperError as error:
                self._logger.error("model calls wait in the journal: %s", error)  # noqa: TRY400  # its text says all
            await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        """Move what is there. What the database cannot take now waits for the next start."""
        self._closed = True
        self.journal.told = lambda: None
        moved = False
        try:
            await self._move_own()
            moved = True
        except HarperError as error:
            self._logger.error("model calls wait in the journal: %s", error)  # noqa: TRY400  # its text says all
        self._stop_timer()
        self.journal.close(empty=moved)

    async def clean(self, retention_seconds: float) -> None:
        """Once an hour, remove the days older than the retention; a busy database is left be."""
        while True:
            try:
                await self._forget((time.time() - retention_seconds) * 1000)
            except HarperError as error:
                self._logger.warning("old model calls stay for another hour: %s", error)
            await asyncio.sleep(_CLEANING_SECONDS)

    async def _forget(self, oldest: float) -> None:
        calls = self._database.model_calls
        # Whole days, so that those that are left are equal to their roll-up.
        old = calls.c["__createdtime__"] < oldest - oldest % _DAY_MS
        await self._database.prune(calls, old)

    def _tell(self) -> None:
        """A call has ended: in a moment it is moved, with all that end meanwhile."""
        if self._timer is None:
            self._timer = self._loop.call_later(_MOVE_SECONDS, self._submit)

    async def _move_own(self) -> None:
        journal = self.journal
        target = journal.forgotten + journal.waits
        while journal.forgotten < target:
            with contextlib.suppress(*_UNFIT):
                await asyncio.wrap_future(self._submit())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _submit(self) -> Future[Waiting]:
        self._stop_timer()
        future = self._database.submit(self._move)
        future.add_done_callback(self._moved)
        return future

    def _move(self, connection: Connection) -> Waiting:
        self._taken = self.journal.waiting(self._most)
        self._booking.add(connection, self._taken.rows)
        return self._taken

    def _moved(self, future: Future[Waiting]) -> None:
        """In the database's thread, before its next work: forget what is safe, or try again."""
        if (error := future.exception()) is None:
            self.journal.forget(future.result())
            self._most = min(2 * self._most, _MOST_ROWS)
            # A few are worth no transaction of their own: the next ones are with them soon.
            pause = _PAUSE_SECONDS if self.journal.waits >= self._most else _MOVE_SECONDS
        else:
            pause = self._failed(error)
        if self.journal.waits:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._again, pause)

    def _failed(self, error: BaseException) -> float:
        """When to try again; a row that no try will ever bring into the database is let go."""
        if not isinstance(error, _UNFIT):
            self._logger.error("model calls wait in the journal: %s", error)
            return _RETRY_SECONDS
        if len(self._taken.rows) == 1:
            self._logger.error("model call %s makes no row: %s", self._taken.rows[0], error)
            self.journal.forget(self._taken)
        self._most = 1
        return 0.0

    def _again(self, seconds: float) -> None:
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(seconds, self._submit)

    def _move_others(self, connection: Connection) -> list[tuple[JournalReader, JournalStep]]:
        """The next step of each other process that lives; they move it themselves soon."""
        found = {one.path: one for one in JournalReader.all(self._folder)}
        found.pop(self.journal.path, None)
        self._others = {path: self._others.get(path, one) for path, one in found.items()}
        steps = [(reader, reader.step()) for reader in self._others.values()]
        for _, step in steps:
            self._book(connection, [row_of(call) for call in step.ended])
        return [(reader, step) for reader, step in steps if not step.spoilt]

    def _bury(self, orphan: JournalReader, connection: Connection) -> None:
        step = orphan.everything()
        if step.spoilt:
            self._logger.error("%d lines of the journal make no sense", step.spoilt)
        self._book(connection, [row_of(call) for call in step.ended])

    def _book(self, connection: Connection, rows: list[CallRow]) -> None:
        """Write these; a row that no try will ever bring into the database is let go."""
        try:
            with connection.begin_nested():
                self._booking.add(connection, rows)
        except _UNFIT as error:
            if len(rows) == 1:
                self._logger.error("model call %s makes no row: %s", rows[0], error)  # noqa: TRY400  # its text says all
                return
            for row in rows:
                self._book(connection, [row])


def _remove(buried: JournalReader, burying: Future[None]) -> None:
    if not burying.cancelled() and burying.exception() is None:
        buried.remove()
