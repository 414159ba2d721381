"""Writes each finished model call to `system.hdb_model_calls`.

A call goes to the database's thread at once, together with all that came meanwhile; the thread
works in order, so whoever asks it later sees the row.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import msgspec
from sqlalchemy import Connection, delete
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import OperationalError

from harperpy import HarperError, ModelCall, Scope

_RETRY_SECONDS = 1.0
_CLEANING_SECONDS = 3600.0
_MOST = 2**63


def handle_application(scope: Scope) -> None:
    """Subscribe to the ledger; when the server stops, what is left is written first."""
    writer = CallWriter(scope)
    scope.ledger.subscribe(writer.add)
    scope.on_close(writer.flush)
    scope.create_task(writer.clean(scope.config.accounting.retention_seconds), name="retention")


class CallWriter:
    """Holds calls until they are in the database; one that is away for a while loses none."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._logger = scope.logger
        self._loop = asyncio.get_running_loop()
        self._pending: deque[ModelCall] = deque()
        self._submitted = False

    def add(self, call: ModelCall) -> None:
        """Take a finished call; the first of a batch has the thread called."""
        self._pending.append(call)
        if not self._submitted:
            self._submit()

    async def flush(self) -> None:
        """Return when every call taken so far is written. Raises what the database raises."""
        await asyncio.wrap_future(self._submit())

    async def clean(self, retention_seconds: float) -> None:
        """Once an hour, remove the rows older than the retention; a busy database is left be."""
        while True:
            try:
                await self._forget((time.time() - retention_seconds) * 1000)
            except HarperError as error:
                self._logger.warning("old model calls stay for another hour: %s", error)
            await asyncio.sleep(_CLEANING_SECONDS)

    async def _forget(self, oldest: float) -> None:
        calls = self._database.model_calls
        old = delete(calls).where(calls.c["__createdtime__"] < oldest)
        await self._database.run(lambda connection: connection.execute(old))

    def _submit(self) -> Future[int]:
        self._submitted = True
        future = self._database.submit(self._write)
        future.add_done_callback(self._written)
        return future

    def _write(self, connection: Connection) -> int:
        self._submitted = False
        batch = [_row(self._pending[at]) for at in range(len(self._pending))]
        try:
            self._insert(connection, batch)
        except OperationalError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, the other rows must not wait
            self._logger.warning("a model call holds what no column can: %s", error)
            self._insert(connection, [_storable(row) for row in batch])
        return len(batch)

    def _insert(self, connection: Connection, rows: list[dict[str, Any]]) -> None:
        if rows:
            # An id that is there already was written by an attempt whose commit went unheard.
            connection.execute(insert(self._database.model_calls).on_conflict_do_nothing(), rows)

    def _written(self, future: Future[int]) -> None:
        """In the database's thread, before its next work: forget what is safe, or try again."""
        if (error := future.exception()) is None:
            for _ in range(future.result()):
                self._pending.popleft()
            return
        self._logger.error("%d model calls wait to be written: %s", len(self._pending), error)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.call_later, _RETRY_SECONDS, self._submit)


def _row(call: ModelCall) -> dict[str, Any]:
    row = msgspec.structs.asdict(call)
    row["__createdtime__"] = row.pop("created")
    return row


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what no column can hold as text, or left out."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < _MOST else None
    return str(value).encode(errors="replace").decode()
