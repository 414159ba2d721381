"""Heads: what a provider's whole answers begin with, which is mostly what the one before did."""

from __future__ import annotations

_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_MOST_DIGITS = 9


class Heads:
    """Where the connections to one provider read to, and the head that was understood last.

    One that differs in the body's length alone means the same but for that length.
    """

    __slots__ = ("_after", "_before", "_bytes", "room")

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)
        self.room = memoryview(self._bytes)
        self._before = self._after = b""

    def body(self, size: int) -> bytes | None:
        """The body, where the first `size` bytes are that head and a body of the length it says."""
        data, before, after = self._bytes, self._before, self._after
        if not before or not data.startswith(before):
            return None
        begin = len(before)
        end = data.find(b"\r", begin, begin + _MOST_DIGITS + 1)
        told = data[begin:end]
        if not told.isdigit() or not data.startswith(after, end):
            return None
        end += len(after)
        return bytes(self.room[end:size]) if end + int(told) == size else None

    def note(self, size: int, length: int) -> None:
        """The first `size` bytes are a good answer that leaves its connection open.

        Its body has `length` bytes, as its one Content-Length says if that is what it has.
        """
        end = self._bytes.find(_END, 0, size) + len(_END)
        head = bytes(self.room[:end])
        before, found, after = head.lower().partition(_LENGTH)
        told, _, rest = after.partition(b"\r")
        digits = told.strip(b" ")
        plain = found and digits.isdigit() and _LENGTH not in b"\r" + rest
        if not plain or len(digits) > _MOST_DIGITS or int(digits) != length:
            return
        if end + length == size:
            begin = len(before) + len(found) + told.index(digits)
            self._before, self._after = head[:begin], head[begin + len(digits) :]
