"""Server-sent events: one message, its bytes, and the parser for what others send.

Framing follows the WHATWG HTML standard, section 9.2 "Server-sent events".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

import msgspec

from .errors import BackendError
from .vectors import Vector

_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_AS_THEY_ARE = (Decimal, msgspec.Raw)
_DATA = "data: "
_BOM = b"\xef\xbb\xbf"
# As numbers: whether a byte is in bytes is asked much faster than whether bytes are.
_CR, _N, _I = b"\rNI"


def plain(value: object) -> Any:
    """What a serializer makes of a value that it does not know. Raises `TypeError`."""
    if isinstance(value, Vector):
        return list(value.floats)
    # A kind of text of its own, as LangChain's.
    if isinstance(value, str):
        return str.__str__(value)
    # An array or a number of its own kind, as NumPy's.
    if (tolist := getattr(value, "tolist", None)) is not None and not isinstance(value, type):
        return tolist()
    message = f"Encoding objects of type {type(value).__qualname__} is unsupported"
    raise TypeError(message)


_encode = msgspec.json.Encoder(decimal_format="number", enc_hook=plain).encode

encode_text = _encode
"""As `encode_json`, of text alone: no number that is none need be looked for."""


def encode_json(value: Any) -> bytes:
    """JSON; what is a number in Python but none in JSON (NaN, Infinity) is null."""
    data = _encode(value)
    # msgspec writes such a Decimal as Python calls it.
    if (_N in data and b"NaN" in data) or (_I in data and b"Infinity" in data):
        return _encode(
            _finite(msgspec.to_builtins(value, builtin_types=_AS_THEY_ARE, enc_hook=plain))
        )
    return data


def _finite(value: Any) -> Any:
    match value:
        case Decimal() if not value.is_finite():
            return None
        case dict():
            plain = cast("dict[object, object]", value)
            return {key: _finite(item) for key, item in plain.items()}
        case list() | tuple():
            return [_finite(item) for item in cast("list[object]", value)]
        case _:
            return value


class SSE(msgspec.Struct, kw_only=True, gc=False):
    """One event. Text in `data` goes out as it is, anything else as JSON; `retry` is in ms."""

    data: Any = None
    event: str | None = None
    id: str | int | None = None
    retry: int | None = None
    comment: str | None = None


def encode_sse(message: Any) -> bytes:
    """The bytes of one event; nothing for None.

    A mapping with `data` or `event` is an event, any other value is the data of one.
    """
    if type(message) is Encoded:
        return message
    if isinstance(message, SSE):
        named = message.event is not None or message.id is not None
        framed = named or message.retry is not None or message.comment is not None
        return _frame(message) if framed else _data_lines(message.data)
    if message is None:
        return b""
    if not isinstance(message, Mapping):
        return _data_lines(message)
    fields = cast("Mapping[str, Any]", message)
    if fields.get("data") is None and not fields.get("event"):
        return _data_lines(fields)
    retry = str(fields.get("retry", ""))
    return _frame(
        SSE(
            data=fields.get("data"),
            event=fields.get("event"),
            id=fields.get("id"),
            retry=int(retry) if retry.isdecimal() else None,
        )
    )


def _frame(message: SSE) -> bytes:
    head: list[str] = []
    if message.comment is not None:
        head += [f": {line}\n" for line in _LINE_ENDS.split(message.comment)]
    if message.event:
        head.append(f"event: {_one_line(str(message.event))}\n")
    tail: list[str] = []
    if message.id is not None:
        tail.append(f"id: {_one_line(str(message.id))}\n")
    if message.retry is not None:
        tail.append(f"retry: {message.retry}\n")
    data = b"" if message.data is None else _data_lines(message.data)[:-1]
    return "".join(head).encode() + data + "".join(tail).encode() + b"\n"


def _data_lines(data: Any) -> bytes:
    if isinstance(data, (bytes, bytearray)):
        data = data.decode(errors="replace")
    if not isinstance(data, str):
        return b"data: " + encode_json(data) + b"\n\n"
    if "\n" not in data and "\r" not in data:
        return b"data: " + data.encode() + b"\n\n"
    return "".join(f"data: {line}\n" for line in _LINE_ENDS.split(data)).encode() + b"\n"


def _one_line(text: str) -> str:
    return text.replace("\r", "").replace("\n", "").replace("\0", "")


class Encoded(bytes):
    """Events as they go out."""

    __slots__ = ()


class SSEDecoder:
    """Turns the bytes of an event stream into the `data` of its events.

    Line ends may be LF, CR or CRLF and may fall anywhere between reads. More than `limit` bytes
    without the end of an event raise `BackendError`. `pending` is what has come of an event that is
    not complete.
    """

    __slots__ = ("_limit", "_started", "pending")

    def __init__(self, limit: int = 1 << 20) -> None:
        self.pending = b""
        self._limit = limit
        self._started = False

    def feed(self, read: bytes) -> Sequence[str]:
        """The data of each event that this read completes.

        Raises for what is beyond the limit when no event before it is left to be told.
        """
        pending = self.pending + read if self.pending else read
        if not self._started:
            if _BOM.startswith(pending) and pending != _BOM:
                self.pending = pending
                return ()
            pending = pending.removeprefix(_BOM)
            self._started = True
        if _CR in pending:
            *events, self.pending = _EVENT_END.split(pending)
            told = [data for event in events if (data := _data_of(event)) is not None]
        else:
            # Nearly all write LF alone.
            whole, _, self.pending = pending.rpartition(b"\n\n")
            told = _plain_data(whole) if whole else []
        if len(self.pending) > self._limit and not told:
            message = f"an event of more than {self._limit} bytes"
            raise BackendError(message)
        return told

    def end(self) -> Iterator[str]:
        """The data of an event that the stream ended in the middle of, for senders that forget."""
        rest, self.pending = self.pending, b""
        if (data := _data_of(rest)) is not None:
            yield data


def _plain_data(events: bytes) -> list[str]:
    """The data of events whose lines end in LF alone."""
    text = events.decode("utf-8", "replace")
    # In most streams each event is one line of data.
    if text.startswith(_DATA):
        if "\n" not in text:
            return [text[len(_DATA) :]]
        told = text[len(_DATA) :].split("\n\n" + _DATA)
        if "\n" not in "".join(told):
            return told
    told = list[str]()
    for event in text.split("\n\n"):
        if (data := _data_in(event)) is not None:
            told.append(data)
    return told


def _data_of(event: bytes) -> str | None:
    return _data_in(event.decode(errors="replace"))


def _data_in(event: str) -> str | None:
    """The joined data lines of one event; None where it has none (a comment, a bare id)."""
    lines: list[str] = []
    for line in _LINE_ENDS.split(event):
        field, _, value = line.partition(":")
        if field == "data":
            lines.append(value.removeprefix(" "))
    return "\n".join(lines) if lines else None
