"""Forms: bodies as browsers and uploading clients send them, fields and files."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast
from urllib.parse import parse_qsl

from .errors import InvalidBody, PayloadTooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartParser

_MOST_FIELDS = 1000
# Reading a megabyte of percent signs takes a third of a second.
_LARGEST_FORM = 2_000_000


def decode_form(data: bytes) -> dict[str, str | list[str]]:
    """The fields of `application/x-www-form-urlencoded` by name, in a list where one repeats.

    Raises `PayloadTooLarge` above 2 MB, which an upload may have, and `ValueError` for what is no
    form.
    """
    if len(data) > _LARGEST_FORM:
        raise PayloadTooLarge(_LARGEST_FORM)
    fields: dict[str, str | list[str]] = {}
    pairs = parse_qsl(
        data.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS
    )
    for name, value in pairs:
        known = fields.get(name)
        if isinstance(known, list):
            known.append(value)
        else:
            fields[name] = value if known is None else [known, value]
    return fields


class Part:
    """A field or a file of a `multipart/form-data` body, to be read before the next one.

    `name` is the field's, `filename` is None unless it is a file; header names are in lower case.
    """

    def __init__(self, headers: Mapping[str, str], parts: Parts) -> None:
        self.headers = headers
        self._parts = parts
        kind, _ = _with_options(headers.get("content-type"))
        self.content_type = kind.decode("latin-1")
        _, options = _with_options(headers.get("content-disposition"))
        self.name = _text(options.get(b"name", b""))
        filename = options.get(b"filename")
        self.filename = None if filename is None else _text(filename)

    async def stream(self) -> AsyncIterator[bytes]:
        """The content as it arrives; empty once the next part was asked for."""
        while (data := await self._parts.content(self)) is not None:
            yield data

    async def bytes(self) -> bytes:
        """The content as a whole."""
        return b"".join([data async for data in self.stream()])

    async def text(self) -> str:
        """The content as UTF-8. Raises `InvalidBody` where it is not."""
        try:
            return (await self.bytes()).decode()
        except UnicodeDecodeError as error:
            message = f"{self.name}: expected UTF-8 text"
            raise InvalidBody(message, param=self.name) from error


_Event: TypeAlias = Part | bytes | None


class Parts:
    """The parts of a `multipart/form-data` body, one by one as they arrive; none is kept.

    What of a part was not read is passed over when the next one is asked for.
    """

    def __init__(self, chunks: AsyncIterator[bytes], content_type: str) -> None:
        _, options = _with_options(content_type)
        self._chunks = chunks
        self._events: deque[_Event] = deque()
        self._reader = _Reader(self, self._events)
        self._parser = self._reader.parser(options.get(b"boundary", b""))
        self._part: Part | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        while not self._reader.ended or self._events:
            if isinstance(event := await self._event(), Part):
                self._part = event
                return event
        # What comes after the last part is read, so that the connection can be used again.
        async for _ in self._chunks:
            pass
        raise StopAsyncIteration

    async def content(self, part: Part) -> bytes | None:
        """More of the part's content, None after its end."""
        if part is not self._part:
            return None
        event = await self._event()
        if isinstance(event, bytes):
            return event
        self._part = None
        return None

    async def _event(self) -> _Event:
        while not self._events:
            if self._reader.ended:
                return None
            chunk = await anext(self._chunks, None)
            if chunk is None:
                message = "the multipart body ends before its last boundary"
                raise InvalidBody(message)
            try:
                self._parser.write(chunk)
            except ValueError as error:
                message = f"the multipart body cannot be read: {error}"
                raise InvalidBody(message) from error
        return self._events.popleft()


class _Reader:
    """What the parser tells of one part after another."""

    def __init__(self, parts: Parts, events: deque[_Event]) -> None:
        self.ended = False
        self._parts = parts
        self._events = events
        self._headers: dict[str, str] = {}
        self._name = self._value = b""
        self._count = 0

    def parser(self, boundary: bytes) -> MultipartParser:
        """Raises `InvalidBody` for a boundary that is none."""
        from python_multipart.multipart import MultipartParser  # noqa: PLC0415  # as below

        told: dict[str, Any] = {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._more_name,
            "on_header_value": self._more_value,
            "on_header_end": self._header,
            "on_headers_finished": self._begin,
            "on_part_data": self._data,
            "on_part_end": lambda: self._events.append(None),
            "on_end": self._end,
        }
        if not boundary:
            message = "Content-Type: expected multipart/form-data with a boundary"
            raise InvalidBody(message)
        try:
            return MultipartParser(boundary, cast("Any", told))
        except ValueError as error:
            message = f"Content-Type: {error}"
            raise InvalidBody(message) from error

    def _more_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _more_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _begin(self) -> None:
        self._count += 1
        if self._count > _MOST_FIELDS:
            message = f"expected at most {_MOST_FIELDS} parts"
            raise InvalidBody(message)
        self._events.append(Part(dict(self._headers), self._parts))

    def _end(self) -> None:
        self.ended = True


def _text(value: bytes) -> str:
    """What browsers send is UTF-8."""
    return value.decode(errors="replace")


def _with_options(header: str | None) -> tuple[bytes, dict[bytes, bytes]]:
    """A header's value and its options."""
    # Most servers take no uploads, and need none of it.
    from python_multipart.multipart import parse_options_header  # noqa: PLC0415

    return parse_options_header(header)
