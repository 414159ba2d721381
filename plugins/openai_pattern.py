"""Pattern: what stands around the text in a stream's events, as long as nothing else changes."""

from __future__ import annotations

import msgspec

_text_in = msgspec.json.Decoder(str).decode


class Pattern:
    """An event's JSON but for the one string that is its text; `index` is the choice's.

    An event that differs from another in a string alone means the same but for that string. Most
    providers send hundreds of them. `used` says whether there was one.
    """

    __slots__ = ("_after", "_before", "index", "used")

    def __init__(self, before: str, after: str, index: int) -> None:
        self._before, self._after = before, after
        self.index = index
        self.used = False

    def text(self, data: str) -> str | None:
        """The text of an event, if it is of this pattern."""
        before, after = self._before, self._after
        if not (data.startswith(before) and data.endswith(after)):
            return None
        try:
            text = _text_in(data[len(before) : -len(after)])
        except msgspec.DecodeError:
            return None
        self.used = True
        return text

    def event(self, text: str) -> str:
        """An event of this pattern."""
        return f"{self._before}{_written(text)}{self._after}"


def pattern_of(data: str, text: str, index: int) -> Pattern | None:
    """What may be the pattern of an event with this text; its reader knows whether it is."""
    before, found, after = data.rpartition(_written(text))
    return Pattern(before, after, index) if found and after else None


def _written(text: str) -> str:
    return msgspec.json.encode(text).decode()
