"""Journal: model calls on disk before they are made, until the database has their rows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from .accounting import ModelCall
from .errors import ServiceUnavailable

INTENT, OUTCOME = b"I", b"O"
"""What a line begins with: a call that is made, and how it ended. The rest is the call as JSON."""

LOCK = "lock"
_SEGMENT = 1 << 20
# What an outcome adds to its intent: numbers, and the reason it ended for.
_MOST_ADDED = 1024
_encode = msgspec.json.Encoder().encode


class Journal:
    """One process's part of the journal, a folder below `folder` that others see whole or not.

    Its files (segments) are filled one after the other. The room that each call's outcome takes is
    set aside on disk before the call is made, so a full disk refuses new calls and loses none.
    `most` bounds, in bytes, what waits for the database. With `fsync` what was noted is safe from
    a power cut when `synced` returns; without, only from the end of the process, however it ends.
    """

    def __init__(self, folder: Path, *, most: int, fsync: bool = False) -> None:
        self.path = folder / f"{time.time_ns() // 1000}-{os.getpid()}-{id(self)}"
        self.synced: Callable[[], Awaitable[None]] | None = self._synced if fsync else None
        self.told: Callable[[], None] = lambda: None
        """Called after each outcome."""
        self._most = most
        self._closing = False
        self._lock = self._file = -1
        self._number = 0
        self._position = self._size = 0
        self._promised: dict[int, int] = {}
        self._sum = 0
        self._sizes: dict[int, int] = {}
        self._late: list[ModelCall] = []
        self._noted = self._safe = 0
        self._syncing: asyncio.Future[None] | None = None

    def begin(self, call: ModelCall) -> None:
        """Note that a call is made. Raises `ServiceUnavailable` where its end has no room."""
        if self._closing:
            message = "the server is stopping"
            raise ServiceUnavailable(message)
        line = _line(INTENT, call)
        promise = len(line) + _MOST_ADDED
        needed = len(line) + self._sum + promise
        try:
            if self._position + needed > self._size:
                self._new_segment(needed)
            self._write(line)
        except OSError as error:
            message = f"the journal of model calls cannot be written: {error.strerror or error}"
            raise ServiceUnavailable(message, headers={"Retry-After": "1"}) from error
        self._promised[call.id] = promise
        self._sum += promise

    def end(self, call: ModelCall) -> None:
        """Note how a call ended, in the room set aside for it."""
        if self._lock < 0:
            return
        line = _line(OUTCOME, call)
        try:
            self._write(line)
        except OSError:
            # A disk that fails: what reads the journal takes it from here.
            self._late.append(call)
        self._sum -= self._promised.pop(call.id, 0)
        self.told()
        if self._closing and not self._promised:
            self._let_go()

    def late(self) -> list[ModelCall]:
        """Calls whose end a broken disk refused."""
        return list(self._late)

    def forget_late(self, count: int) -> None:
        """So many of them are safe elsewhere."""
        del self._late[:count]

    @property
    def position(self) -> tuple[int, int]:
        """The number of the segment that is written, and how far; those below it are full."""
        while True:
            number, position = self._number, self._position
            # Another thread asks, and one that is full may have been followed meanwhile.
            if number == self._number:
                return number, position

    def drop(self, number: int) -> None:
        """Remove a full segment: all that it holds is in the database."""
        (self.path / str(number)).unlink(missing_ok=True)
        self._sizes.pop(number, None)

    def close(self, *, empty: bool) -> None:
        """Take no more calls. Remove the folder if all that it holds is in the database.

        Calls that are still being made note their end: the next process to start has their rows.
        """
        self._closing = True
        if self._lock < 0 or self._promised:
            return
        if empty:
            remove(self.path)
        self._let_go()

    def _let_go(self) -> None:
        os.close(self._file)
        os.close(self._lock)
        self._lock = self._file = -1

    def _write(self, line: bytes) -> None:
        if os.pwrite(self._file, line, self._position) != len(line):
            message = "only a part was written"
            raise OSError(message)
        self._position += len(line)
        self._noted += 1

    def _new_segment(self, needed: int) -> None:
        if self._lock < 0:
            self._lock = _own(self.path)
        size = max(_SEGMENT, needed)
        # One beside the one that is full there always is, or nothing would ever go on.
        if sum(list(self._sizes.values())) + size > max(self._most, self._size + size):
            message = f"{self._most} bytes wait for the database"
            raise OSError(message)
        path = self.path / str(self._number + 1)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(file, size)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        if self.synced is not None:
            # From now on only the new one is synced.
            _sync_folder(self.path)
            if self._file >= 0:
                os.fdatasync(self._file)
        if self._file >= 0:
            os.close(self._file)
        # The number first: with it, an earlier one's position is too high, but never too low.
        self._number += 1
        self._file, self._size, self._position = file, size, 0
        self._sizes[self._number] = size

    async def _synced(self) -> None:
        noted = self._noted
        while self._safe < noted:
            if self._syncing is None:
                self._syncing = asyncio.ensure_future(self._sync())
            await asyncio.shield(self._syncing)

    async def _sync(self) -> None:
        noted = self._noted
        file = os.dup(self._file)
        try:
            await asyncio.to_thread(os.fdatasync, file)
        except OSError as error:
            message = f"the journal of model calls cannot be written: {error.strerror}"
            raise ServiceUnavailable(message) from error
        finally:
            os.close(file)
            self._syncing = None
        self._safe = noted


def remove(path: Path) -> None:
    """Remove a process's folder; the lock last, so that who dies here leaves one that is found."""
    with contextlib.suppress(FileNotFoundError):  # others are at it, too
        for file in sorted(path.iterdir(), key=lambda file: file.name == LOCK):
            file.unlink(missing_ok=True)
        path.rmdir()


def _own(path: Path) -> int:
    """Make the folder, locked before anyone can see it; the lock ends with the process."""
    made = path.with_name(f".{path.name}")
    made.mkdir(mode=0o700, parents=True)
    lock = os.open(made / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(path)
    return lock


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.pwrite(file, bytes(size), 0)
        os.fsync(file)


def _line(kind: bytes, call: ModelCall) -> bytes:
    try:
        return b"%b%b\n" % (kind, _encode(call))
    except (UnicodeEncodeError, TypeError, OverflowError):
        return b"%b%b\n" % (kind, _encode(_plain(call)))


def _plain(call: ModelCall) -> ModelCall:
    """The call with what no row can hold as text left out of its texts."""
    return msgspec.structs.replace(
        call,
        **{
            name: value.encode(errors="replace").decode()
            for name, value in msgspec.structs.asdict(call).items()
            if isinstance(value, str)
        },
    )
