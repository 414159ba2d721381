"""BERT's uncased tokenizer: text becomes words in one spelling, and words become WordPiece ids.

The ids are those of Hugging Face's `tokenizers` with all-MiniLM-L6-v2's settings. Its tables of
punctuation and accents are Unicode 8's; characters added since may be cut otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import islice

MOST_TOKENS = 256  # what all-MiniLM-L6-v2 reads of a text, [CLS] and [SEP] included

_LONGEST_WORD = 100
_SLICE = 1024
_SPECIAL = re.compile(r"\[(?:PAD|UNK|CLS|SEP|MASK)\]")
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),  # extension E begins at 2B820, but not in `tokenizers`
    (0x2F800, 0x2FA1F),
)


def load_vocabulary() -> dict[str, int]:
    """BERT's uncased vocabulary: an entry's id is the number of its line."""
    file = resources.files("harperpy.plugins") / "data" / "minilm-vocab.txt"
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {entry: number for number, entry in enumerate(lines)}


class WordPiece:
    """Cuts text into the entries of a vocabulary. Reads no further than it needs to."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._ids = vocabulary
        self._longest = max(map(len, vocabulary))
        self._spelling = _Spelling()
        self._unknown = vocabulary["[UNK]"]

    def encode(self, text: str) -> list[int]:
        """`[CLS]`, the text's ids, `[SEP]`: 256 at most, the rest of the text is left out."""
        ids = (number for word in self._words(text) for number in self._cut(word))
        return [self._ids["[CLS]"], *islice(ids, MOST_TOKENS - 2), self._ids["[SEP]"]]

    def _words(self, text: str) -> Iterator[str]:
        """Words, punctuation marks and ideographs; `[SEP]` and its like as they are."""
        start = 0
        for special in _SPECIAL.finditer(text):
            yield from self._spelled(text, start, special.start())
            yield special[0]
            start = special.end()
        yield from self._spelled(text, start, len(text))

    def _spelled(self, text: str, start: int, end: int) -> Iterator[str]:
        rest = ""
        for at in range(start, end, _SLICE):
            rest += text[at : min(at + _SLICE, end)].translate(self._spelling)
            *words, rest = rest.split(" ")
            yield from filter(None, words)
            rest = rest[: _LONGEST_WORD + 1]  # too long already, whatever follows
        if rest:
            yield rest

    def _cut(self, word: str) -> list[int]:
        """The longest entry that the word begins with, then the same for what is left of it."""
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        ids: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                number = self._ids.get(prefix + word[start:end])
                if number is not None:
                    break
            else:
                return [self._unknown]
            ids.append(number)
            start, prefix = end, "##"
        return ids


class _Spelling(dict[int, str]):
    """A table for `str.translate`, filled as characters are met; the rare ones are not kept."""

    def __missing__(self, code: int) -> str:
        spelled = _spell(chr(code))
        if code < 0x10000:
            self[code] = spelled
        return spelled


def _spell(char: str) -> str:
    """A character in lower case without its accents; spaces around what is a word by itself."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category.startswith("Z"):
        return " "
    if category in ("Cc", "Cf", "Co", "Cs") or char == "\N{REPLACEMENT CHARACTER}":
        return ""
    parts = unicodedata.normalize("NFD", char)
    plain = "".join(part.lower() for part in parts if unicodedata.category(part) != "Mn")
    if any(first <= ord(char) <= last for first, last in _IDEOGRAPHS):
        return f" {plain} "
    return "".join(f" {part} " if _is_punctuation(part) else part for part in plain)


def _is_punctuation(char: str) -> bool:
    return char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
