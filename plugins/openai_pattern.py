"""Pattern: what stands around the text in a stream's events, as long as nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harperpy import GenerateChunk, Texts

# As a number it is looked for much faster.
_LINE_END = ord("\n")
_BREAK = b"\n\n"
_text_in = msgspec.json.Decoder(str).decode


class Pattern:
    """An event's JSON but for the one string that is its text; `index` is the choice's.

    An event that differs from another in a string alone means the same but for that string. Most
    providers send hundreds of them. `used` says whether there was one.
    """

    __slots__ = ("_begin", "_end", "index", "used")

    def __init__(self, before: str, after: str, index: int) -> None:
        # What stands around a text and its quotes, as most send events.
        self._begin, self._end = f'data: {before}"'.encode(), f'"{after}\n\n'.encode()
        self.index = index
        self.used = False

    def texts(self, events: Sequence[str], begin: int) -> list[str]:
        """The texts of the events from there on, up to one that is not of this pattern."""
        before, after = self._around()
        within = slice(len(before), -len(after))
        texts: list[str] = []
        try:
            for at in range(begin, len(events)):
                data = events[at]
                if not (data.startswith(before) and data.endswith(after)):
                    break
                texts.append(_text_in(data[within]))
        except msgspec.DecodeError:
            # It is not of this pattern either.
            pass
        self.used = self.used or bool(texts)
        return texts

    def pieces(self, read: bytes) -> tuple[Sequence[GenerateChunk | str], bytes]:
        """The pieces of the events of this pattern that a read begins with, and what is left."""
        begin, end = self._begin, self._end
        stop = len(read) if read.endswith(end) else read.rfind(end) + len(end)
        if stop < len(end) or not read.startswith(begin):
            return (), read
        try:
            # No text holds the end of a line as it is.
            if read.find(_LINE_END, len(begin), stop - len(end)) < 0:
                text = _text_in(read[len(begin) - 1 : stop - len(end) + 1])
                texts = Texts((text,)) if text else Texts()
            else:
                texts = Texts(filter(None, self._split(read[: stop - len(_BREAK)])))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return (), read
        self.used = True
        if not self.index:
            return texts, read[stop:]
        chunks = [GenerateChunk(index=self.index, delta_content=text) for text in texts]
        return chunks, read[stop:]

    def event(self, text: str) -> str:
        """An event of this pattern."""
        before, after = self._around()
        return f"{before}{_written(text)}{after}"

    def _split(self, told: bytes) -> list[str]:
        """The texts of several events, without the break after the last."""
        begin, after = self._begin, self._end[: -len(_BREAK)]
        within = slice(len(begin) - 1, 1 - len(after))
        events = told.split(_BREAK)
        texts = [
            _text_in(event[within])
            for event in events
            if event.startswith(begin) and event.endswith(after)
        ]
        if len(texts) < len(events):
            raise msgspec.DecodeError
        return texts

    def _around(self) -> tuple[str, str]:
        """What stands around a text in an event's data: kept in one form, as streams are many."""
        return self._begin[len(b"data: ") : -1].decode(), self._end[1 : -len(_BREAK)].decode()


def pattern_of(data: str, text: str, index: int) -> Pattern | None:
    """What may be the pattern of an event with this text; its reader knows whether it is."""
    before, found, after = data.rpartition(_written(text))
    return Pattern(before, after, index) if found and after else None


def _written(text: str) -> str:
    return msgspec.json.encode(text).decode()
