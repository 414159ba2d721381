"""Pace: how often a stream is read that comes fast."""

from __future__ import annotations

# So many reads in a row, each so soon after the one before, are those of a fast stream, ...
_READS = 2
_NEAR_SECONDS = 0.004
# ... or a little later where it brings as much as that, as a loop with much to do reads late.
_BYTES_PER_SECOND = 256 << 10
# One of so much, which is several events, is enough.
_MUCH_BYTES = 2 << 10
# All fast streams together are read so often in a second, ...
_READS_PER_SECOND = 1500
# ... and each so often at least that nobody who reads the text sees it stop.
_MOST_SECONDS = 0.03
# The timers of event loops know nothing shorter.
_LEAST_SECONDS = 0.001
# A read of so much is worth what it costs.
_ENOUGH_BYTES = 16 << 10
# What comes in a rest is there at its end, however slowly it came: each so often there is none.
_MEASURED = 16
# Who is read no more for so long takes no reads from the others.
_SILENT_SECONDS = 0.1


class Pace:
    """How fast one stream comes, beside the others that are `fast` now.

    To read and to write costs nearly as much for one event as for fifty. So the more streams come
    fast, the longer each of them rests after a read: what comes meanwhile comes together. Few rest
    not at all, and neither does what comes as slowly as most models speak. `last` is when it was
    read, or is to be; `fast` are in the order of their reads.
    """

    __slots__ = ("_fast", "_near", "last")

    def __init__(self, fast: dict[Pace, None]) -> None:
        self._fast = fast
        self._near = 0
        self.last = 0.0

    def rest(self, now: float, size: int) -> float:
        """How many seconds not to read after a read of `size` bytes at `now`, by the loop's time.

        The next read counts from the end of that.
        """
        soon = now - self.last < _NEAR_SECONDS + size / _BYTES_PER_SECOND
        self.last = now
        if not soon:
            self.end()
            return 0.0
        self._near += 1
        if self._near < _READS and size < _MUCH_BYTES:
            return 0.0
        self._join(now)
        seconds = len(self._fast) / _READS_PER_SECOND
        if seconds < _LEAST_SECONDS or size >= _ENOUGH_BYTES or not self._near % _MEASURED:
            return 0.0
        seconds = min(seconds, _MOST_SECONDS)
        self.last = now + seconds
        return seconds

    def end(self) -> None:
        """It is fast no more, or at its end."""
        self._near = 0
        self._fast.pop(self, None)

    def _join(self, now: float) -> None:
        """Be the last that was read, and let go of the first where it has fallen silent."""
        fast = self._fast
        fast.pop(self, None)
        fast[self] = None
        first = next(iter(fast))
        if now - first.last > _SILENT_SECONDS:
            first.end()
