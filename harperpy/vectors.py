"""Vector: an embedding as its provider sent it; its numbers once somebody reads them."""

from __future__ import annotations

import math
import re
import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import msgspec

from .errors import BackendError

# A text, an object, true, false, null and what others call infinite or no number have at least one
# of these; no number has. As numbers: whether a byte is in bytes is asked much faster than whether
# bytes are.
_NO_NUMBERS = tuple(b'"{lunN')
_begins = re.compile(rb"\[\s*[-\d]").match
_MINUS, _RAISED = ord("-"), ord("E")
# A vector has few numbers so small that they are written with an exponent.
_FEW = 100
_decode = msgspec.json.Decoder(list[float]).decode


class Vector(Sequence[float]):
    """Numbers of 32 bits, which are read from JSON or base64 when one of them is asked for.

    `floats` are all of them, as an `array("f")`.
    """

    __slots__ = ("_base64", "_floats", "_json")

    def __init__(self, floats: array[float] | None = None) -> None:
        self._floats = floats
        self._json: bytes | None = None
        self._base64: str | None = None

    @classmethod
    def from_json(cls, text: bytes) -> Vector:
        """Of an array. Raises `ValueError` where it is none of finite numbers, or empty.

        It is parsed when its numbers are asked for: `BackendError` is raised then where it cannot.
        """
        flat = _begins(text) is not None and text.find(b"[", 1) < 0
        vector = cls()
        vector._json = text
        if not flat or any(map(text.__contains__, _NO_NUMBERS)):
            message = "no array of numbers"
            raise ValueError(message)
        if _may_be_large(text):
            _check(vector.floats)
        return vector

    @classmethod
    def from_base64(cls, text: str) -> Vector:
        """Of little-endian numbers. Raises `ValueError` where they are none, or not finite."""
        floats = array("f")
        # Raises a ValueError of its own for half a number.
        floats.frombytes(b64decode(text, validate=True))
        if sys.byteorder == "big":
            floats.byteswap()
        vector = cls(floats)
        vector._base64 = text
        _check(floats)
        return vector

    @property
    def floats(self) -> array[float]:
        """All numbers."""
        if self._floats is None:
            self._floats = array("f", _numbers(self._json or b"[]"))
        return self._floats

    def json(self) -> bytes:
        """As an array in JSON: the provider's own text where that was JSON."""
        return self._json or msgspec.json.encode(self.floats.tolist())

    def base64(self) -> str:
        """As OpenAI's clients read them: little-endian, in base64."""
        return self._base64 or base64_of(self.floats)

    def __len__(self) -> int:
        return len(self.floats)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> array[float]: ...

    def __getitem__(self, index: Any) -> Any:
        floats: Any = self.floats
        return floats[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self.floats)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*cast("Sequence[object]", other)]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vector({self.floats.tolist()})"


def base64_of(numbers: Sequence[float]) -> str:
    """Numbers as little-endian ones of 32 bits, in base64."""
    floats = array("f", numbers)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()


def _numbers(text: bytes) -> list[float]:
    try:
        return _decode(text)
    except msgspec.DecodeError as error:
        message = "a vector holds what is no number"
        raise BackendError(message) from error


def _may_be_large(text: bytes) -> bool:
    """Whether a number has an exponent above nothing, or so many have one that it is not clear."""
    if _RAISED in text:
        return True
    at = -1
    for _ in range(_FEW):
        at = text.find(b"e", at + 1)
        if at < 0 or text[at + 1] != _MINUS:
            return at >= 0
    return True


def _check(floats: array[float]) -> None:
    if not floats or not math.isfinite(sum(floats)):
        message = "a vector holds what is no number"
        raise ValueError(message)
