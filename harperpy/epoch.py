"""Epoch: what each of several processes may move on, and all of them see at once."""

from __future__ import annotations

import mmap
from collections.abc import Callable

_SLOT_BYTES = 8


class Epoch:
    """Equal to an earlier one as long as no process has moved it on since.

    Each process writes a slot of its own, so no step is lost and nobody waits for a lock. `file` is
    the descriptor of a file of `size(slots)` bytes that they share; a process alone needs none.
    """

    def __init__(self, slots: int = 1, own: int = 0, file: int = -1) -> None:
        memory = memoryview(mmap.mmap(file, self.size(slots)))
        self._slots = memory.cast("Q")
        self._own = own
        self.now: Callable[[], bytes] = memory.tobytes
        """The epoch: all slots as they are. Asked for with each request, so no frame of ours."""

    @staticmethod
    def size(slots: int) -> int:
        """How many bytes so many slots take."""
        return slots * _SLOT_BYTES

    def move(self) -> None:
        """Let what was remembered in an earlier epoch count no more, anywhere."""
        self._slots[self._own] += 1
