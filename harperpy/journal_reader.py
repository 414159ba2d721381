"""What processes noted in the journal, read and understood."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Generator
from pathlib import Path

import msgspec

from .accounting import ModelCall
from .journal import INTENT, LOCK, OUTCOME, remove

_READ = 1 << 18
_INTERRUPTED = "interrupted"
_LINES = re.compile(rb"[^\n\0]+")


class _Named(msgspec.Struct):
    id: int


_decode = msgspec.json.Decoder(ModelCall).decode
_id_of = msgspec.json.Decoder(_Named).decode


class JournalStep(msgspec.Struct):
    """What one read brought: calls that ended, calls that have not, and where the next one goes on.

    `left` is whether there may be more, `spoilt` how many lines made no sense.
    """

    ended: list[ModelCall]
    at: dict[int, int]
    open: dict[int, tuple[int, bytes]]
    left: bool = False
    spoilt: int = 0


class JournalReader:
    """One process's folder, as far as its calls are in the database.

    What was read counts when `commit` says so: a step whose rows were not written is read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at: dict[int, int] = {}
        self._open: dict[int, tuple[int, bytes]] = {}

    def step(self) -> JournalStep:
        """Read on to a bound."""
        step = JournalStep([], dict(self._at), dict(self._open))
        for number in self._segments():
            step.left = self._read(number, step)
            if step.left:
                break
        return step

    def commit(self, step: JournalStep) -> None:
        """All that the step brought is in the database."""
        self._at, self._open = step.at, step.open

    @classmethod
    @contextlib.contextmanager
    def orphans(cls, folder: Path) -> Generator[list[JournalReader]]:
        """What processes noted that are no more. Others may take it at the same time."""
        held = [(cls(path), lock) for path in _parts(folder) if (lock := _abandoned(path)) >= 0]
        try:
            yield [reader for reader, _ in held]
        finally:
            for _, lock in held:
                os.close(lock)

    @classmethod
    def all(cls, folder: Path) -> list[JournalReader]:
        """What each process noted."""
        return [cls(path) for path in _parts(folder)]

    def remove(self) -> None:
        """Remove all of it."""
        remove(self.path)

    def everything(self) -> JournalStep:
        """All that a process noted which is no more; what it had not ended was interrupted."""
        step = self.step()
        while step.left:
            self.commit(step)
            more = self.step()
            more.ended[:0] = step.ended
            more.spoilt += step.spoilt
            step = more
        for _, line in step.open.values():
            with contextlib.suppress(msgspec.DecodeError):
                call = _decode(line)
                call.success, call.error_code = False, _INTERRUPTED
                step.ended.append(call)
        return step

    def _segments(self) -> list[int]:
        try:
            names = [file.name for file in self.path.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _read(self, number: int, step: JournalStep) -> bool:
        """Read on in a segment; whether it holds more."""
        at = step.at.setdefault(number, 0)
        try:
            with (self.path / str(number)).open("rb") as file:
                read = _lines_at(file.fileno(), at)
        except FileNotFoundError:
            return False
        # A line that is not whole yet is left for the next time; beyond it there is nothing.
        whole = read[: read.rfind(b"\n") + 1]
        step.at[number] = at + len(whole)
        for line in _LINES.findall(whole):
            self._understand(line, number, step)
        return len(read) % _READ == 0 and bool(whole)

    def _understand(self, line: bytes, number: int, step: JournalStep) -> None:
        kind, text = line[:1], line[1:]
        try:
            if kind == OUTCOME:
                call = _decode(text)
                step.open.pop(call.id, None)
                step.ended.append(call)
            elif kind == INTENT:
                step.open[_id_of(text).id] = (number, text)
            else:
                step.spoilt += 1
        except msgspec.DecodeError:
            step.spoilt += 1


def _lines_at(file: int, at: int) -> bytes:
    """What stands there to a bound, or beyond it to the end of one line."""
    read = more = os.pread(file, _READ, at)
    # Behind the last line there are zeros to the segment's end.
    while len(more) == _READ and more[-1] and b"\n" not in more:
        more = os.pread(file, _READ, at + len(read))
        read += more
    return read


def _parts(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return []


def _abandoned(path: Path) -> int:
    """The lock of the folder of a process that is no more, now ours as well; -1 for any other."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR)
    except OSError:
        return -1
    try:
        # Shared: who needs all rows waits for nobody who may be about to write them.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return -1
    # Whoever had it before may have removed it meanwhile.
    if (path / LOCK).exists():
        return lock
    os.close(lock)
    return -1
