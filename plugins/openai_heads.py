"""Heads: what a provider's whole answers begin with, which is mostly what the one before did."""

from __future__ import annotations

_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_MOST_DIGITS = 9


class Heads:
    """Where the connections to one provider read to, and the head that was understood last.

    One that differs in the body's length alone means the same but for that length.
    """

    __slots__ = ("_after", "_before", "_begin", "_bytes", "_head", "_size", "room")

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)
        self.room = memoryview(self._bytes)
        self._before = self._after = self._head = b""
        self._begin = self._size = 0

    def body(self, size: int) -> bytes | None:
        """The body, where the first `size` bytes are that head and a body of the length it says."""
        if size != self._size:
            self._expect(size)
        begin = self._begin
        if begin and self._bytes.startswith(self._head):
            return self.room[begin:size].tobytes()
        return None

    def _expect(self, size: int) -> None:
        """Work out what head so many bytes begin with, if they are a whole answer."""
        self._size, self._begin = size, 0
        rest = size - len(self._before) - len(self._after)
        # A length has as many digits as it and them together, or one less.
        for digits in (len(str(rest)), len(str(rest)) - 1):
            told = b"%d" % (rest - digits)
            if self._before and rest >= digits == len(told):
                self._head = self._before + told + self._after
                self._begin = len(self._head)

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
            self._size = 0
