"""Journal: model calls on disk before they are made, until the database has their rows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from .accounting import CallRow, ModelCall, row_of
from .errors import ServiceUnavailable
from .segment import Segment

logger = logging.getLogger("harperpy.accounting")

INTENT, OUTCOME = b"I", b"O"
"""What a line begins with: a call that is made, and how it ended. The rest is the call as JSON."""

LOCK = "lock"
_SEGMENT = 1 << 18
# So many that nothing needs any more are kept while there is much to note.
_MOST_SPARE = 16
# What an outcome adds to its intent's JSON: what stands around it, numbers, and why it ended.
_MOST_ADDED = 1024
_encode = msgspec.json.Encoder().encode_into


class Waiting(msgspec.Struct):
    """Calls that have ended, as rows, and the segments that nothing needs when they are booked."""

    rows: list[CallRow]
    full: list[int]


class Journal:
    """One process's part of the journal, a folder below `folder` that others see whole or not.

    Its files (segments) are filled one after the other. The room that each call's outcome takes is
    set aside on disk before the call is made, so a full disk refuses new calls and loses none.
    `most` bounds, in bytes, what waits for the database; this process has it in memory as well, and
    reads nothing back. With `fsync` what was noted is safe from a power cut when `synced` returns;
    without, only from the end of the process, however it ends.
    """

    def __init__(self, folder: Path, *, most: int, fsync: bool = False) -> None:
        self.path = folder / f"{time.time_ns() // 1000}-{os.getpid()}-{id(self)}"
        self.synced: Callable[[], Awaitable[None]] | None = self._synced if fsync else None
        self.told: Callable[[], None] = lambda: None
        """Called after an outcome that is the first to wait."""
        self._most = most
        self._closing = False
        self._lock = -1
        self._number = 0
        self._segment: Segment | None = None
        # What is left of the segment, without what was promised of it.
        self._room = 0
        # As long as the last call's were: what is encoded into them rarely makes them grow.
        self._intent, self._outcome = bytearray(INTENT), bytearray(OUTCOME)
        self._promised: dict[int, tuple[int, int]] = {}
        self._segments: dict[int, Segment] = {}
        self._spare: list[Segment] = []
        # Whether calls end while others get their rows.
        self._busy = False
        self._ended: list[CallRow] = []
        # The segments where those began.
        self._begun: list[int] = []
        self.forgotten = 0
        """How many calls that ended do not wait any more."""
        self._safe = 0, 0
        self._syncing: asyncio.Future[None] | None = None

    def begin(self, call: ModelCall) -> None:
        """Note that a call is made. Raises `ServiceUnavailable` where its end has no room."""
        if self._closing:
            message = "the server is stopping"
            raise ServiceUnavailable(message)
        try:
            length = self._note(self._intent, call)
        except OSError as error:
            message = f"the journal of model calls cannot be written: {error.strerror or error}"
            raise ServiceUnavailable(message, headers={"Retry-After": "1"}) from error
        self._promised[call.id] = length + _MOST_ADDED, self._number

    def end(self, call: ModelCall) -> None:
        """Note how a call ended, in the room set aside for it."""
        if self._lock < 0:
            return
        promise, begun = self._promised.pop(call.id, (0, self._number))
        self._room += promise
        try:
            self._note(self._outcome, call)
        except OSError as error:
            _make_plain(call)
            logger.warning("the end of model call %d is in memory alone: %s", call.id, error)
        self._begun.append(begun)
        ended = self._ended
        ended.append(row_of(call))
        if len(ended) == 1:
            self.told()
        if self._closing and not self._promised:
            self._let_go()

    @property
    def waits(self) -> int:
        """How many calls that ended do."""
        return len(self._ended)

    def waiting(self, most: int | None = None) -> Waiting:
        """The first of the calls that have ended, at most so many. In any thread."""
        # In this order: what comes between is kept for the next time.
        below = self._number
        needed = {segment for _, segment in list(self._promised.values())}
        rows = self._ended[:most]
        # Those left ended where they began, or later.
        below = min([below, *self._begun[len(rows) :]])
        full = [one for one in list(self._segments) if one < below and one not in needed]
        return Waiting(rows, full)

    def forget(self, waiting: Waiting) -> None:
        """These are in the database, or never will be; they were the first. In any one thread."""
        del self._ended[: len(waiting.rows)]
        del self._begun[: len(waiting.rows)]
        self.forgotten += len(waiting.rows)
        for number in waiting.full:
            if (segment := self._segments.pop(number, None)) is not None:
                self._put_aside(segment)
        # What is synced is to be on the disk as it is in memory, also under its name.
        self._busy = bool(self._ended) and self.synced is None
        if not self._busy:
            self._rest()

    def _put_aside(self, segment: Segment) -> None:
        """Keep it for what comes, if that is much."""
        if self._busy and segment.is_open and len(self._spare) < _MOST_SPARE:
            try:
                segment.clear(self.path / f"spare-{segment.path.name}")
            except (OSError, ValueError):  # its file is gone, or it was just closed
                segment.remove()
            else:
                self._spare.append(segment)
        else:
            segment.remove()

    def _rest(self) -> None:
        """Hold no more than is needed."""
        while self._spare:
            with contextlib.suppress(IndexError):  # it was just taken
                self._spare.pop().remove()
        if (segment := self._segment) is not None:
            segment.rest()

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
        segment, self._segment = self._segment, None
        if segment is not None and self.synced is not None:
            try:
                os.fdatasync(segment.file)
            except OSError as error:
                logger.warning("the last model calls may not outlive a power cut: %s", error)
        for one in (*self._segments.values(), *self._spare):
            one.close()
        os.close(self._lock)
        self._lock = -1

    def _note(self, line: bytearray, call: ModelCall) -> int:
        """Write a call's line of the kind that it begins with, and how long it is.

        The room of one that begins holds as much again, and what its end adds to it.
        """
        try:
            _encode(call, line, 1)
        except (UnicodeEncodeError, TypeError, OverflowError):
            _make_plain(call)
            _encode(call, line, 1)
        line += b"\n"
        length = len(line)
        taken = length if line is self._outcome else 2 * length + _MOST_ADDED
        segment = self._segment
        if segment is None or self._room < taken:
            segment = self._new_segment(taken)
        segment.note(line)
        self._room -= taken
        return length

    def _new_segment(self, needed: int) -> Segment:
        if self._lock < 0:
            self._lock = _own(self.path)
        promised = sum(promise for promise, _ in self._promised.values())
        # As much again for the next ones: where many run at a time, they share it, too.
        size = max(_SEGMENT, 2 * (needed + promised))
        old = self._segment
        # One beside the one that is full there always is, or nothing would ever go on.
        held = sum(one.size for one in list(self._segments.values()))
        if held + size > max(self._most, (old.size if old else 0) + size):
            message = f"{self._most} bytes wait for the database"
            raise OSError(message)
        segment = self._empty(self.path / str(self._number + 1), size)
        try:
            if self.synced is not None:
                self._sync_before(old)
        except OSError:
            segment.remove()
            raise
        if old is not None and not (self._busy and len(self._segments) < _MOST_SPARE):
            old.close()
        self._segment, self._room = segment, size - promised
        self._number += 1
        self._segments[self._number] = segment
        return segment

    def _empty(self, path: Path, size: int) -> Segment:
        """A segment in which nothing is noted."""
        with contextlib.suppress(IndexError):
            while size == _SEGMENT:
                segment = self._spare.pop()
                try:
                    segment.name(path)
                except OSError:  # its file is gone
                    segment.remove()
                else:
                    return segment
        return Segment(path, size)

    def _sync_before(self, old: Segment | None) -> None:
        """From now on only the new one is synced.

        After a power cut a file is there only if each folder on the way to it is.
        """
        for folder in (self.path, *self.path.parents[: 0 if self._number else 2]):
            _sync_folder(folder)
        if old is not None:
            os.fdatasync(old.file)

    def _noted(self) -> tuple[int, int]:
        """How much there is: the segment, and where it goes on."""
        return self._number, 0 if self._segment is None else self._segment.at

    async def _synced(self) -> None:
        noted = self._noted()
        # What is closed was synced then.
        while self._segment is not None and self._safe < noted:
            if self._syncing is None:
                self._syncing = asyncio.ensure_future(self._sync())
            await asyncio.shield(self._syncing)

    async def _sync(self) -> None:
        if self._segment is None:
            self._syncing = None
            return
        noted = self._noted()
        file = os.dup(self._segment.file)
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
    # An earlier try may have come this far.
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(made / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(path)
    except OSError:
        os.close(lock)
        raise
    return lock


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _make_plain(call: ModelCall) -> None:
    """Leave out of a call's texts what no row can hold as text."""
    for name, value in msgspec.structs.asdict(call).items():
        if isinstance(value, str):
            setattr(call, name, value.encode(errors="replace").decode())
