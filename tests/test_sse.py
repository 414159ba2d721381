"""Server-sent events: the bytes of a message, and what is read back from any other's bytes."""

import datetime as dt
from collections import OrderedDict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from harperpy import SSE, BackendError, EventStream, Resource, SSEDecoder, encode_sse
from harperpy.testing import running
from helpers import ask

MESSAGES: list[tuple[Any, str]] = [
    # Harper's table
    ("hi", "data: hi\n\n"),
    ({"a": 1}, 'data: {"a":1}\n\n'),
    ({"data": {"a": 1}}, 'data: {"a":1}\n\n'),
    ({"data": "[DONE]"}, "data: [DONE]\n\n"),
    ({"event": "tick"}, "event: tick\n\n"),
    (
        {"event": "u", "data": "x", "id": 7, "retry": 1000},
        "event: u\ndata: x\nid: 7\nretry: 1000\n\n",
    ),
    ({"data": "a\nb"}, "data: a\ndata: b\n\n"),
    ({"data": "a\r\nb\rc"}, "data: a\ndata: b\ndata: c\n\n"),
    ({"data": "a\n"}, "data: a\ndata: \n\n"),
    ({"data": "a\rb"}, "data: a\ndata: b\n\n"),
    ({"event": "x\ny", "data": "1"}, "event: xy\ndata: 1\n\n"),
    ({"data": "x", "retry": "1s"}, "data: x\n\n"),
    ({"id": 5}, 'data: {"id":5}\n\n'),
    ({"data": "", "event": "e"}, "event: e\ndata: \n\n"),
    (0, "data: 0\n\n"),
    # only None means that there is no data
    ({"data": 0}, "data: 0\n\n"),
    ({"data": False}, "data: false\n\n"),
    ({"data": ""}, "data: \n\n"),
    ({"data": None, "event": "e"}, "event: e\n\n"),
    ("", "data: \n\n"),
    (False, "data: false\n\n"),
    (None, ""),
    # other values
    (b"raw", "data: raw\n\n"),
    ([1, "a"], 'data: [1,"a"]\n\n'),
    (1.5, "data: 1.5\n\n"),
    ("größer ☃", "data: größer ☃\n\n"),
    ({"a": "x\ny"}, 'data: {"a":"x\\ny"}\n\n'),
    (Decimal("1.10"), "data: 1.10\n\n"),
    ({"at": dt.date(2026, 1, 2)}, 'data: {"at":"2026-01-02"}\n\n'),
    (OrderedDict(data="x"), "data: x\n\n"),
    ({"data": "x", "event": 7}, "event: 7\ndata: x\n\n"),
    ({"data": "x", "id": "a\r\nb\0c"}, "data: x\nid: abc\n\n"),
    ({"data": "x", "retry": "250"}, "data: x\nretry: 250\n\n"),
    ({"data": "x", "retry": -1}, "data: x\n\n"),
    # the typed form
    (SSE(data="hi"), "data: hi\n\n"),
    (SSE(data={"event": "not one"}), 'data: {"event":"not one"}\n\n'),
    (SSE(data="a\nb", event="e", id="1"), "event: e\ndata: a\ndata: b\nid: 1\n\n"),
    (SSE(data="x", retry=5), "data: x\nretry: 5\n\n"),
    (SSE(data=0, id=0), "data: 0\nid: 0\n\n"),
    (SSE(comment="still here"), ": still here\n\n"),
    (SSE(comment="a\nb", data="x"), ": a\n: b\ndata: x\n\n"),
]  # fmt: skip

LINE_ENDS = ["\n", "\r", "\r\n"]

# What stands in a stream, and the data of its events.
STREAMS: list[tuple[str, list[str]]] = [
    ("data: a\n\ndata: b\n\n", ["a", "b"]),
    ("data: a\ndata: b\n\n", ["a\nb"]),
    ("data:a\n\ndata:  b\n\n", ["a", " b"]),
    ("data\n\ndata:\n\n", ["", ""]),
    ("data: a\ndata\ndata: \n\n", ["a\n\n"]),
    (": comment\n\ndata: a\n\n:\n\n", ["a"]),
    (": in it\ndata: a\n: too\n\n", ["a"]),
    ("event: e\ndata: a\nid: 1\nretry: 2\n\n", ["a"]),
    ("id: 1\n\nevent: e\n\ndata: a\n\n", ["a"]),
    ("\n\n\ndata: a\n\n\n\ndata: b\n\n", ["a", "b"]),
    ("datax: no\nxdata: no\ndata: a:b\n\n", ["a:b"]),
    ('data: {"t":"größer ☃"}\n\ndata: [DONE]\n\n', ['{"t":"größer ☃"}', "[DONE]"]),
    ("\ufeffdata: a\n\n", ["a"]),
    ("data: \ufeffa\n\n", ["\ufeffa"]),
]


def read(pieces: list[bytes], *, limit: int = 1 << 20) -> list[str]:
    """The data of all events of a stream that arrives in these pieces."""
    decoder = SSEDecoder(limit)
    return [data for piece in pieces for data in decoder.feed(piece)]


@pytest.mark.parametrize(("message", "expected"), MESSAGES, ids=repr)
def test_a_message_becomes_exactly_these_bytes(message: Any, expected: str) -> None:
    """Each form of message is framed as Harper frames it, and falsy data is still data."""
    assert expected.encode() == encode_sse(message)


async def test_a_stream_is_its_messages_bytes_in_order() -> None:
    """What a resource yields reaches the client byte for byte as the encoder writes it."""

    class Table(Resource):
        public = True

        @staticmethod
        def get() -> Iterator[Any]:
            yield from (message for message, _ in MESSAGES)

    async with running(resources={"table": Table}) as server:
        answer = await ask(server, "GET", "/table", headers={"Accept": "text/event-stream"})

    assert 200 == answer.status
    assert "".join(expected for _, expected in MESSAGES) == answer.text


HARPERS: dict[str, tuple[Any, str]] = {
    "text": ("hi", "data: hi\n\n"),
    "an object": ({"a": 1}, 'data: {"a":1}\n\n'),
    "an object as data": ({"data": {"a": 1}}, 'data: {"a":1}\n\n'),
    "text as data": ({"data": "[DONE]"}, "data: [DONE]\n\n"),
    "an event without data": ({"event": "tick"}, "event: tick\n\n"),
    "all four parts": (
        {"event": "u", "data": "x", "id": 7, "retry": 1000},
        "event: u\ndata: x\nid: 7\nretry: 1000\n\n",
    ),
    "two lines": ({"data": "a\nb"}, "data: a\ndata: b\n\n"),
    "any line end": ({"data": "a\r\nb\rc"}, "data: a\ndata: b\ndata: c\n\n"),
    "a line end at the end": ({"data": "a\n"}, "data: a\ndata: \n\n"),
    "a line end in the event's name": ({"event": "x\ny", "data": "1"}, "event: xy\ndata: 1\n\n"),
    "a retry that is no number": ({"data": "x", "retry": "1s"}, "data: x\n\n"),
    "an id alone": ({"id": 5}, 'data: {"id":5}\n\n'),
    "empty data": ({"data": "", "event": "e"}, "event: e\ndata: \n\n"),
    "zero": (0, "data: 0\n\n"),
    "nothing": (None, ""),
}


@pytest.mark.parametrize(("message", "expected"), HARPERS.values(), ids=HARPERS)
@pytest.mark.parametrize("wrapped", [EventStream, iter], ids=["as events", "as accepted"])
async def test_each_row_of_harpers_table_reaches_the_client_so(
    message: Any, expected: str, wrapped: Any
) -> None:
    """What a verb yields is on the wire byte for byte, between two others and alone."""

    class Row(Resource):
        @staticmethod
        def get() -> Any:
            return wrapped(["a", message, "b"])

        @staticmethod
        def post() -> Any:
            return wrapped([message])

    accept = {"Accept": "text/event-stream"}
    async with running(resources={"row": Row}) as server:
        amid = await ask(server, "GET", "/row", headers=accept)
        alone = await ask(server, "POST", "/row", headers=accept)

    assert f"data: a\n\n{expected}data: b\n\n" == amid.text
    assert expected == alone.text
    assert "text/event-stream" == amid.headers["Content-Type"]


@pytest.mark.parametrize("end", LINE_ENDS, ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize(("text", "expected"), STREAMS)
def test_a_stream_may_be_cut_at_any_byte(text: str, expected: list[str], end: str) -> None:
    """Wherever a read ends, inside a character or a line end too, the same events come out."""
    data = text.replace("\n", end).encode()

    assert expected == read([data])
    assert expected == read([bytes([byte]) for byte in data])
    for cut in range(len(data) + 1):
        assert expected == read([data[:cut], data[cut:]]), f"cut after byte {cut}"


@pytest.mark.parametrize("first", LINE_ENDS, ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("second", LINE_ENDS, ids=["LF", "CR", "CRLF"])
def test_line_ends_may_be_mixed(first: str, second: str) -> None:
    """An event may end with two line ends of different kinds; CR LF alone is but one."""
    data = f"data: a{first}{second}data: b{second}{second}".encode()
    expected = ["a\nb"] if first + second == "\r\n" else ["a", "b"]

    for cut in range(len(data) + 1):
        assert expected == read([data[:cut], data[cut:]]), f"cut after byte {cut}"


def test_an_event_is_told_as_soon_as_its_last_byte_is_there() -> None:
    """No event waits for the byte after it, even where its last CR may be half of a CRLF."""
    decoder = SSEDecoder()

    assert ["a"] == list(decoder.feed(b"data: a\r\n\r"))
    assert ["b"] == list(decoder.feed(b"\ndata: b\r\r"))
    assert [] == list(decoder.feed(b"data: c\n"))
    assert ["c"] == list(decoder.feed(b"\n"))


def test_what_is_encoded_is_decoded() -> None:
    """The decoder reads the encoder's own bytes, several lines of data included."""
    texts = ["a", "a\nb", "", "\n", " padded ", "größer ☃"]
    data = b"".join(encode_sse(SSE(data=text, event="e", id=1, comment="c")) for text in texts)

    assert texts == read([data])


def test_an_unfinished_event_is_told_at_the_end_only() -> None:
    """A sender that forgets the last blank line loses nothing, and nothing is told twice."""
    decoder = SSEDecoder()

    assert ["a"] == list(decoder.feed(b"data: a\n\ndata: b\ndata: c"))
    assert ["b\nc"] == list(decoder.end())
    assert [] == list(decoder.end())


def test_an_event_without_end_is_refused_at_the_limit() -> None:
    """What never ends is not kept beyond the limit; events within it may add up to more."""
    event = b"data: 12345678\n\n"

    assert ["12345678"] * 3 == read([event] * 3, limit=len(event))
    assert [] == read([b"data: 12", b"345678"], limit=14)
    with pytest.raises(BackendError, match="more than 14 bytes"):
        read([b"data: 12", b"3456789"], limit=14)
