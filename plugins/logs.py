"""Logs: `read_log`, the last records that the processes of this server have logged."""

from __future__ import annotations

import asyncio
import datetime as dt
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harperpy import Scope, mask

from .usage import Moment, moment

_MOST_BYTES = 1_000_000
_MOST_SHOWN = 10_000
_LONGEST = 4000
_LEVELS = {"WARNING": "warn", "CRITICAL": "fatal"}

Level = Literal["debug", "info", "warn", "error", "fatal"]


class ReadLog(msgspec.Struct, forbid_unknown_fields=True):
    """Which records: of a level, of a time, with a text in them; how many, from which on."""

    level: Level | None = None
    from_: Moment | None = msgspec.field(name="from", default=None)
    until: Moment | None = None
    filter: str = ""
    order: Literal["asc", "desc"] = "desc"
    start: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=_MOST_SHOWN)] = 1000


def add_operations(scope: Scope) -> None:
    """Keep what is logged from now on, and offer it to super users."""
    log = LogFile(scope.root / "log.jsonl")
    logger = logging.getLogger("harperpy")
    logger.addHandler(log)
    scope.on_close(log.close)
    scope.operations.add("read_log", log.read, ReadLog, reads=True)


class LogFile(logging.Handler):
    """A file that all workers write to, their secrets hidden; a full one becomes the older one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._older = path.with_name(f"older-{path.name}")
        self._file = -1

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, as one line at once."""
        line = msgspec.json.encode(_shown(record)) + b"\n"
        try:
            if not self._is_current():
                self._open()
            os.write(self._file, line)
            if os.fstat(self._file).st_size > _MOST_BYTES:
                self._turn()
        except OSError:
            # A full disk: the record is on stderr, and logging fails nobody.
            return

    def close(self) -> None:
        """Write no more."""
        logging.getLogger("harperpy").removeHandler(self)
        super().close()
        with self.lock or nullcontext():
            self._shut()

    async def read(self, request: ReadLog) -> list[dict[str, Any]]:
        """The last records of all workers, the newest first; some thousands are kept."""
        since = None if request.from_ is None else moment(request.from_, "from")
        until = None if request.until is None else moment(request.until, "until")
        rows = await asyncio.to_thread(lambda: [*self._rows()])
        found = [
            row
            for row in sorted(rows, key=lambda row: row["timestamp"])
            if (since is None or moment(row["timestamp"], "from") >= since)
            and (until is None or moment(row["timestamp"], "until") < until)
            and request.level in (None, row["level"])
            and request.filter in row["message"]
        ]
        if request.order == "desc":
            found.reverse()
        return found[request.start : request.start + request.limit]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in (self._older, self._path):
            for line in path.read_bytes().splitlines() if path.exists() else ():
                try:
                    yield msgspec.json.decode(line)
                except msgspec.DecodeError:
                    # A process was killed, or the disk was full, in the middle of it.
                    continue

    def _open(self) -> None:
        self._shut()
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _shut(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_current(self) -> bool:
        """Whether it is open, and no other process has turned to a new file."""
        if self._file < 0:
            return False
        try:
            return self._path.stat().st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            return False

    def _turn(self) -> None:
        """Begin a new file, if no other process does."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if self._is_current():
                self._path.replace(self._older)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def _shown(record: logging.LogRecord) -> dict[str, Any]:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001  # as logging itself, which never fails its caller
        message = str(record.msg)
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        message = f"{message}: {type(error).__name__}: {error}"
    at = dt.datetime.fromtimestamp(record.created, dt.UTC)
    # Half a character, as a client may send one, is none that JSON can hold.
    message = mask(message[:_LONGEST]).encode(errors="replace").decode()
    return {
        "level": _LEVELS.get(record.levelname, record.levelname.lower()),
        "message": message,
        "timestamp": at.isoformat(timespec="microseconds"),
        "thread": f"{record.process} {record.threadName}",
        "tags": [record.name],
    }
