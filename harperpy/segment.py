"""Segment: one file of the journal, all of whose room is on the disk already, and in memory."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path


class Segment:
    """A new file of `size` bytes at `path`; what is noted in it takes no system call.

    Full disks take nothing away from below it. Raises `OSError`.
    """

    __slots__ = ("_map", "at", "file", "path", "size")

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(self.file, size)
            self._map = mmap.mmap(self.file, size)
        except OSError:
            os.close(self.file)
            path.unlink()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it can be noted in."""
        return self.file >= 0

    def note(self, line: bytes | bytearray) -> None:
        """Put a line behind the last one; there is to be room for it."""
        at = self.at
        self.at = end = at + len(line)
        self._map[at:end] = line

    def rest(self) -> None:
        """Nobody reads it again, so it need not be in memory; the disk keeps it. In any thread."""
        with contextlib.suppress(ValueError):  # it is closed
            self._map.madvise(mmap.MADV_DONTNEED)

    def clear(self, path: Path) -> None:
        """Empty it, under another name: to put its pages into memory anew would take longer."""
        self.name(path)
        self._map[: self.at] = bytes(self.at)
        self.at = 0

    def name(self, path: Path) -> None:
        """Give it another name."""
        self.path.rename(path)
        self.path = path

    def close(self) -> None:
        """Let go of it; the file stays."""
        if self.is_open:
            self._map.close()
            os.close(self.file)
            self.file = -1

    def remove(self) -> None:
        """Remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.pwrite(file, bytes(size), 0)
        os.fsync(file)
