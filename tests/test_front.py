"""Front and aiohttp answer alike, and what is left to aiohttp loses nothing on its way there."""

import asyncio
import contextlib
import gc
import json
import re
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote, unquote

import pytest

from harperpy import (
    Blob,
    Context,
    EventStream,
    NotFound,
    RequestTarget,
    Resource,
    Response,
    dispatch,
    get_context,
    lines,
)
from harperpy.meter import Meter
from harperpy.registry import Resources
from harperpy.rendering import Reply
from harperpy.testing import ECHO, RunningServer, running
from helpers import basic, later

SECONDS = 30
HUGE = 16 * 1024 * 1024
LAST = b"GET /last HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
MASKS = (
    (re.compile(rb"(req|call)_[0-9a-f]+"), rb"\1_"),
    (re.compile(rb"Date: [^\r]* GMT"), b"Date:"),
    (re.compile(rb'"id":"chatcmpl-[^"]*"'), b'"id":""'),
    (re.compile(rb'"created":\d+'), b'"created":0'),
    (re.compile(rb"x-harper-call-id: \d+"), b"x-harper-call-id: 0"),
    (re.compile(rb"(?mi)^(openai-processing-ms): \d+"), rb"\1: 0"),
)


def config(front: str, **more: Any) -> str:
    """A config.yaml by which front is on or off."""
    told = ", ".join(f"{key}: {value}" for key, value in {"front": front, **more}.items())
    return f"{ECHO}\nhttp: {{{told}}}"


async def exchanged(server: RunningServer, *pieces: bytes, end: bool = False) -> bytes:
    """All that comes back for these bytes until the connection ends; `end`: the client leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            for _ in range(5):
                # Seen by the server, which is in this very loop.
                await asyncio.sleep(0)
        if end:
            writer.write_eof()
        else:
            writer.write(LAST)
    told = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            told += piece
    writer.close()
    return told


def masked(told: bytes) -> list[bytes]:
    """The answers one by one, the lines of their heads in order, without what is never the same."""
    for mask, word in MASKS:
        told = mask.sub(word, told)
    parts = re.split(rb"(?=HTTP/1\.[01] \d{3} )", told)
    return [_sorted(part) for part in parts if part]


def _sorted(answer: bytes) -> bytes:
    head, end, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return b"\r\n".join([first, *sorted(lines)]) + end + body


def ask(line: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a request; its `Content-Length` where it has a body."""
    length = (f"Content-Length: {len(body)}",) if body else ()
    lines = [f"{line} HTTP/1.1", "Host: test", *headers, *length, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


# --- what is answered


async def late() -> AsyncIterator[str]:
    """A first item that the head does not wait for."""
    await asyncio.sleep(0.05)
    yield "late"


def answering(verb: Callable[..., Any], **attributes: Any) -> type[Resource]:
    """A public class each of whose verbs is this function."""
    verbs = dict.fromkeys(("get", "post", "put", "patch", "delete", "query"), staticmethod(verb))
    return type("Answering", (Resource,), {"public": True, **verbs, **attributes})


def cookies() -> str:
    """Two cookies at once."""
    context = get_context()
    context.response_headers.add("Set-Cookie", "a=1")
    context.response_headers.add("Set-Cookie", "b=2")
    return "with cookies"


def created() -> dict[str, str]:
    """A new thing."""
    get_context().created("7")
    return {"id": "7"}


def dated() -> str:
    """What has a version."""
    get_context().etag = "v1"
    return "dated"


async def told(target: RequestTarget) -> Any:
    """What was asked, as a handler sees it."""
    context = get_context()
    headers = sorted((name.lower(), value) for name, value in context.headers.items())
    body = await context.request.body.bytes()
    return [context.method, context.path, target.search, headers, len(body), body[:300].hex()]


def missing() -> str:
    """Nothing is there."""
    raise NotFound


def with_length(body: Any, length: int) -> Callable[[], Response]:
    """An answer that says its own length."""
    return lambda: Response(200, {"Content-Length": str(length)}, body=body())


def lengths(*told: str) -> Callable[[], Response]:
    """A stream of five bytes that says these lengths."""

    def get() -> Response:
        for length in told:
            get_context().response_headers.add("Content-Length", length)
        return Response(200, body=later(b"he", b"llo"))

    return get


NO_LENGTHS = ("-3", "+5", "5.0", "five", "\N{ARABIC-INDIC DIGIT FIVE}", "\N{SUPERSCRIPT TWO}", "")

VALUES: dict[str, Callable[[], Any]] = {
    "json": lambda: {"a": [1, 2.5, None, "ä"]},
    "nothing": lambda: None,
    "empty": lambda: "",
    "bytes": lambda: b"\x00\x01",
    "no-bytes": lambda: b"",
    "blob": lambda: Blob("text/html", "<p>hi</p>"),
    "table": lambda: [{"a": 1, "b": "x"}, {"a": 2, "b": "y,z"}],
    "long": lambda: "ab" * 5000,
    "huge": lambda: b"x" * HUGE,
    "large": lambda: "ab" * 100_000,
    "stream": lambda: later("a", "b"),
    "no-items": later,
    "fails-later": lambda: later("a", ValueError("secret")),
    "fails-at-once": lambda: later(ValueError("secret")),
    "events": lambda: EventStream(later("a", {"b": 1})),
    "late-events": lambda: EventStream(late()),
    "failing-events": lambda: EventStream(later("a", ValueError("secret"))),
    "raw": lambda: Response(200, body=later(b"a", "bc", b"")),
    "large-raw": lambda: Response(200, body=later(b"x" * 70_000, b"y" * 200_000)),
    "raw-fails": lambda: Response(200, body=later(b"a", ValueError("secret"))),
    "odd": lambda: Response(299, body="odd"),
    "odder": lambda: Response(799, body="odd"),
    "teapot": lambda: Response(418, data={"a": 1}),
    "204": lambda: Response(204, body="never seen"),
    "205": lambda: Response(205, body="seen"),
    "304": lambda: Response(304, body="never seen"),
    "stream-204": lambda: Response(204, body=later(b"never seen")),
    "stream-304": lambda: Response(304, body=later(b"never seen")),
    "typed": lambda: Response(200, {"content-type": "text/x-odd"}, body=b"odd"),
    "lower": lambda: Response(200, {"x-one": "ä", "X-TWO": ""}, body=b""),
    "closing": lambda: Response(200, {"Connection": "close"}, body=b"bye"),
    "staying": lambda: Response(200, {"Connection": "keep-alive"}, body=b"hi"),
    "their-date": lambda: Response(200, {"Date": "then", "Server": "me"}, body=b"hi"),
    "their-chunks": lambda: Response(200, {"Transfer-Encoding": "chunked"}, body=later(b"a")),
    "length": with_length(lambda: b"hello", 5),
    "stream-length": with_length(lambda: later(b"he", b"llo"), 5),
    "stream-short": with_length(lambda: later(b"he", b"llo"), 3),
    "stream-none": with_length(lambda: later(b"he", b"llo"), 0),
    "stream-long": with_length(lambda: later(b"he", b"llo"), 7),
    "long-length": with_length(lambda: b"hello", 7),
    "short-length": with_length(lambda: b"hello", 3),
    "length-of-none": with_length(lambda: b"", 3),
    "two-lengths": lengths("5", "3"),
    "two-lengths-of-one": lengths("5", "5"),
    **{f"length {told}": lengths(told) for told in NO_LENGTHS},
}

MOUNTS = {
    **{name: answering(value) for name, value in VALUES.items()},
    "told": answering(told),
    "cookies": answering(cookies),
    "created": answering(created),
    "dated": answering(dated),
    "missing": answering(missing),
    "closed": answering(VALUES["json"], public=False),
    "last": answering(lambda: "last"),
}

JSON = "Content-Type: application/json"
CHAT = b'{"model":"default","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"default","stream":true,"messages":[{"role":"user","content":"hi"}]}'

REQUESTS: dict[str, bytes] = {
    **{name: ask(f"GET /{quote(name)}") for name in MOUNTS if name != "huge"},
    **{f"{name}, HEAD": ask(f"HEAD /{quote(name)}") for name in MOUNTS},
    "query": ask("GET /told/a%20b/?a=1&b=%C3%A4#"),
    "empty query": ask("GET /told?"),
    "slashes": ask("GET //told//"),
    "brackets": ask("GET //[told"),
    "POST": ask("POST /told", JSON, body=b'{"a":1}'),
    "POST nothing": ask("POST /told", "Content-Length: 0"),
    "POST without a length": ask("POST /told"),
    "PUT": ask("PUT /told", "Content-Type: text/plain", body=b"text"),
    "PATCH": ask("PATCH /told", body=bytes(range(256))),
    "QUERY": ask("QUERY /told", JSON, body=b"{}"),
    "DELETE": ask("DELETE /nothing"),
    "GET with a body": ask("GET /told", body=b"body"),
    "not changed": ask("GET /dated", 'If-None-Match: "v1"'),
    "changed": ask("GET /dated", 'If-None-Match: "v0"'),
    "nowhere": ask("GET /nowhere"),
    "a wrong key": ask("GET /closed", "Authorization: Bearer nobody"),
    "no such verb": ask("TRACE /json"),
    "OPTIONS": ask("OPTIONS /json"),
    "preflight": ask("OPTIONS /json", "Origin: http://a", "Access-Control-Request-Method: PUT"),
    "of another origin": ask("GET /json", "Origin: http://a"),
    "bad JSON": ask("POST /v1/chat/completions", JSON, body=b"{"),
    "chat": ask("POST /v1/chat/completions", JSON, "Authorization: Bearer KEY", body=CHAT),
    "chat stream": ask("POST /v1/chat/completions", JSON, "Authorization: Bearer KEY", body=STREAM),
    "models": ask("GET /v1/models", "Authorization: Bearer KEY"),
    "msgpack": ask("GET /json", "Accept: application/x-msgpack"),
    "text": ask("GET /json", "Accept: text/plain"),
    "CSV": ask("GET /table", "Accept: text/csv"),
    "CSV by name": ask("GET /table.csv"),
    "ndjson": ask("GET /stream", "Accept: application/x-ndjson"),
    "failing ndjson": ask("GET /fails-later", "Accept: application/x-ndjson"),
    "no events": ask("GET /no-items", "Accept: text/event-stream"),
    "not acceptable": ask("GET /json", "Accept: image/png"),
    "gzip": ask("GET /long", "Accept-Encoding: gzip"),
    "large gzip": ask("GET /large", "Accept-Encoding: gzip"),
    "gzip for short": ask("GET /json", "Accept-Encoding: gzip"),
    "their id": ask("GET /json", "X-Request-Id: mine"),
    "health": ask("GET /health"),
}


async def differences(
    requests: dict[str, tuple[bytes, ...]],
    mounts: dict[str, type[Resource]] = MOUNTS,
    **more: Any,
) -> dict[str, Any]:
    """By name, what differs with front on and off: both answers."""
    found: dict[str, Any] = {}
    async with (
        asyncio.timeout(2 * SECONDS),
        running(config("on", **more), resources=mounts) as on,
        running(config("off", **more), resources=mounts) as off,
    ):
        assert b'"last"' in await exchanged(on)
        for name, pieces in requests.items():
            answers: list[Any] = []
            for server in (on, off):
                told = [piece.replace(b"KEY", server.api_key.encode()) for piece in pieces]
                answer = await exchanged(server, *told, end=name.endswith(", EOF"))
                answers.append(masked(answer.replace(server.api_key.encode(), b"KEY")))
            if answers[0] != answers[1]:
                found[name] = answers
    return found


async def test_both_ways_answer_alike() -> None:
    """Whatever a resource answers, its bytes are the same with `http.front` on and off."""
    requests = {name: (told,) for name, told in REQUESTS.items()}
    assert {} == await differences(requests, compressionThreshold=1000)


async def test_both_ways_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request once, with its status and the bytes of its bodies, and each stream's end."""
    counted: list[tuple[Any, ...]] = []

    def answered(
        _: Meter, context: Context, status: int, sent: int, received: int, *_ready: float
    ) -> None:
        counted.append((context.app, context.method, status, sent, received))

    monkeypatch.setattr(Meter, "answered", answered)
    monkeypatch.setattr(Meter, "transferred", lambda _, *told: counted.append(told[:2]))
    monkeypatch.setattr(Meter, "lost", lambda _, *told: counted.append(("lost", *told)))
    counts: list[list[tuple[Any, ...]]] = []
    for front in ("on", "off"):
        async with running(config(front), resources=MOUNTS) as server:
            for request in REQUESTS.values():
                await exchanged(server, request.replace(b"KEY", server.api_key.encode()))
        counts.append([*counted])
        counted.clear()

    assert counts[0] == counts[1]
    assert len(counts[0]) >= 2 * len(REQUESTS)


# --- what is not common, or wrong

HOST = b"Host: test\r\n"
HELLO = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(range(150))


def head(*lines: bytes, first: bytes = b"POST /told HTTP/1.1") -> bytes:
    """A head of these very lines, with a Host before them."""
    return b"\r\n".join([first, b"Host: test", *lines, b"", b""])


def first(line: bytes) -> bytes:
    """A request of this line and a Host."""
    return line + b"\r\n" + HOST + b"\r\n"


def bytewise(data: bytes) -> tuple[bytes, ...]:
    """One byte at a time."""
    return tuple(data[at : at + 1] for at in range(len(data)))


UNUSUAL: dict[str, bytes | tuple[bytes, ...]] = {
    "HTTP/1.0": first(b"GET /told HTTP/1.0"),
    "HTTP/1.0 that stays": head(b"Connection: keep-alive", first=b"GET /told HTTP/1.0"),
    "HTTP/1.0 that speaks of 1.1": head(b"X: a HTTP/1.1", first=b"GET /told HTTP/1.0"),
    "HTTP/1.0, a stream": first(b"GET /stream HTTP/1.0"),
    "HTTP/1.2": first(b"GET /told HTTP/1.2"),
    "HTTP/2.0": first(b"GET /told HTTP/2.0"),
    "HTTP/2's first words": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /told\r\n\r\n",
    "http/1.1": first(b"GET /told http/1.1"),
    "chunks": head(b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
    "chunks with a trailer": head(b"Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX: y\r\n\r\n",
    "wrong chunks": head(b"Transfer-Encoding: chunked") + b"x\r\nabc\r\n0\r\n\r\n",
    "chunks and a length": head(b"Transfer-Encoding: chunked", b"Content-Length: 4")
    + b"1\r\na\r\n0\r\n\r\n",
    "a length and chunks": head(b"Content-Length: 4", b"Transfer-Encoding: chunked")
    + b"1\r\na\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": head(b"Transfer-Encoding: chunked", first=b"POST /told HTTP/1.0")
    + b"1\r\na\r\n0\r\n\r\n",
    "another transfer": head(b"Transfer-Encoding: identity") + b"body",
    "hidden chunks": head(b"Transfer-Encoding: xchunked", b"Content-Length: 4") + b"body",
    "chunks twice": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")
    + b"1\r\na\r\n0\r\n\r\n",
    "100-continue": (head(b"Expect: 100-continue", b"Content-Length: 4"), b"body"),
    "another expectation": head(b"Expect: wonders", b"Content-Length: 4") + b"body",
    "gzip that is none": head(b"Content-Encoding: gzip", b"Content-Length: 4") + b"body",
    "Connection: close": head(b"Connection: close", first=b"GET /told HTTP/1.1"),
    "Connection: CLOSE": head(b"Connection: CLOSE", first=b"GET /told HTTP/1.1"),
    "Connection: Keep-Alive": head(b"Connection: Keep-Alive", first=b"GET /told HTTP/1.1"),
    "Connection twice": head(
        b"Connection: keep-alive", b"Connection: close", first=b"GET /told HTTP/1.1"
    ),
    "Connection of two words": head(b"Connection: keep-alive, close", first=b"GET /told HTTP/1.1"),
    "h2c": head(
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAAQAAP__",
        first=b"GET /told HTTP/1.1",
    ),
    "a WebSocket nobody opens": head(
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        first=b"GET /told HTTP/1.1",
    ),
    "Upgrade alone": head(b"Upgrade: websocket", first=b"GET /told HTTP/1.1"),
    "Connection: Upgrade alone": head(b"Connection: Upgrade", first=b"GET /told HTTP/1.1"),
    "absolute": first(b"GET http://test/told?a=1 HTTP/1.1"),
    "absolute of another": first(b"GET http://other/told HTTP/1.1"),
    "absolute and wrong": first(b"GET http://[/told HTTP/1.1"),
    "a star": first(b"OPTIONS * HTTP/1.1"),
    "GET a star": first(b"GET * HTTP/1.1"),
    "CONNECT": first(b"CONNECT test:80 HTTP/1.1"),
    "no slash": first(b"GET told HTTP/1.1"),
    "a fragment": first(b"GET /told#here HTTP/1.1"),
    "a fragment and a query": first(b"GET /told#here?a=1 HTTP/1.1"),
    "a wrong escape": first(b"GET /told/%zz%2 HTTP/1.1"),
    "dots": first(b"GET /x/../told HTTP/1.1"),
    "a NUL's escape": first(b"GET /told/%00 HTTP/1.1"),
    "two question marks": first(b"GET /told?a?b HTTP/1.1"),
    "a space in the target": first(b"GET /told a HTTP/1.1"),
    "a tab in the target": first(b"GET /told\ta HTTP/1.1"),
    "a NUL in the target": first(b"GET /told\x00 HTTP/1.1"),
    "a control in the target": first(b"GET /told\x01 HTTP/1.1"),
    "DEL in the target": first(b"GET /told\x7f HTTP/1.1"),
    "quotes in the target": first(b"GET /told/\"'<>\\^`{|} HTTP/1.1"),
    "UTF-8 in the target": first("GET /told/ä HTTP/1.1".encode()),
    "Latin-1 in the target": first("GET /told/ä HTTP/1.1".encode("latin-1")),
    "UTF-8 in a header": head("X-One: ä".encode(), b"Content-Length: 0"),
    "Latin-1 in a header": head("X-One: ä".encode("latin-1"), b"Content-Length: 0"),
    "UTF-8 in a header's name": head("X-ä: 1".encode(), b"Content-Length: 0"),
    "two Hosts": head(b"Host: other", b"Content-Length: 0"),
    "the same Host twice": head(b"Host: test", b"Content-Length: 0"),
    "no Host": b"GET /told HTTP/1.1\r\n\r\n",
    "an empty Host": b"GET /told HTTP/1.1\r\nHost:\r\n\r\n",
    "a wrong Host": b"GET /told HTTP/1.1\r\nHost: a b/c\r\n\r\n",
    "two types": head(b"Content-Type: a/b", b"Content-Type: c/d", b"Content-Length: 0"),
    "two keys": head(b"Authorization: Bearer a", b"Authorization: Bearer b", b"Content-Length: 0"),
    "two cookies": head(b"Cookie: a=1", b"Cookie: b=2", b"Content-Length: 0"),
    "two Accepts": head(b"Accept: text/csv", b"Accept: application/json", b"Content-Length: 0"),
    "a length twice": head(b"Content-Length: 4", b"Content-Length: 4") + b"body",
    "two lengths": head(b"Content-Length: 4", b"Content-Length: 5") + b"body",
    "two lengths in one": head(b"Content-Length: 4, 4") + b"body",
    "+4": head(b"Content-Length: +4") + b"body",
    "-4": head(b"Content-Length: -4") + b"body",
    "4 with spaces": head(b"Content-Length:   4  \t") + b"body",
    "4 without a space": head(b"Content-Length:4") + b"body",
    "a space in 44": head(b"Content-Length: 4 4") + b"body",
    "04": head(b"Content-Length: 04") + b"body",
    "0x4": head(b"Content-Length: 0x4") + b"body",
    "4_0": head(b"Content-Length: 4_0") + b"body",
    "4.0": head(b"Content-Length: 4.0") + b"body",
    "an Arabic 4": head("Content-Length: \u0664".encode()) + b"body",
    "no digits": head(b"Content-Length: four") + b"body",
    "an empty length": head(b"Content-Length:") + b"body",
    "10 digits": head(b"Content-Length: 0000000004") + b"body",
    "a length beyond 64 bits": head(b"Content-Length: 99999999999999999999999") + b"body",
    "5000 digits": head(b"Content-Length: " + b"9" * 5000) + b"body",
    "a length hidden by a NUL": head(b"Content-Length: 4\x00") + b"body",
    "a length with an underscore": head(b"Content_Length: 4", b"Content-Length: 0"),
    "obs-fold": head(b"X-One: a\r\n b", b"Content-Length: 0"),
    "obs-fold of a length": head(b"Content-Length:\r\n 4") + b"body",
    "obs-fold of a type": head(b"Content-Type: text/\r\n\tplain", b"Content-Length: 4") + b"body",
    "a folded first header": b"GET /told HTTP/1.1\r\n Host: test\r\n\r\n",
    "bare LF": b"GET /told HTTP/1.1\nHost: test\n\n",
    "one bare LF": b"GET /told HTTP/1.1\r\nHost: test\nX-One: 1\r\n\r\n",
    "bare LF after the line": b"GET /told HTTP/1.1\nHost: test\r\n\r\n",
    "two bare LF": b"GET /told HTTP/1.1\r\nHost: test\n\nGET /json HTTP/1.1\r\nHost: test\r\n\r\n",
    "LF, CR, LF": b"GET /told HTTP/1.1\r\nHost: test\n\r\n",
    "bare CR": b"GET /told HTTP/1.1\rHost: test\r\r",
    "CR in a value": head(b"X-One: a\rb", b"Content-Length: 0"),
    "CR at the end of a value": head(b"X-One: a\r", b"Content-Length: 0"),
    "CR, CR, LF": b"GET /told HTTP/1.1\r\nHost: test\r\r\n\r\n",
    "NUL in a value": head(b"X-One: a\x00b", b"Content-Length: 0"),
    "NUL in a name": head(b"X\x00One: ab", b"Content-Length: 0"),
    "a control in a value": head(b"X-One: a\x01b", b"Content-Length: 0"),
    "DEL in a value": head(b"X-One: a\x7fb", b"Content-Length: 0"),
    "a tab in a value": head(b"X-One: a\tb", b"Content-Length: 0"),
    "spaces around a value": head(b"X-One: \t a \t ", b"Content-Length: 0"),
    "an empty value": head(b"X-One:", b"X-Two:  ", b"Content-Length: 0"),
    "an empty name": head(b": a", b"Content-Length: 0"),
    "no colon": head(b"X-One", b"Content-Length: 0"),
    "a space before the colon": head(b"Content-Length : 4") + b"body",
    "a tab before the colon": head(b"X-One\t: 4", b"Content-Length: 0"),
    "a space before the name": head(b" Content-Length: 4") + b"body",
    "a bracket in a name": head(b"X(One): 4", b"Content-Length: 0"),
    "names in odd cases": head(b"x-oNE: 1", b"CONTENT-LENGTH: 4") + b"body",
    "an empty line before": b"\r\n" + first(b"GET /told HTTP/1.1"),
    "empty lines before": b"\r\n\r\n\r\n" + first(b"GET /told HTTP/1.1"),
    "LF before": b"\n" + first(b"GET /told HTTP/1.1"),
    "an empty line after a body": head(b"Content-Length: 4") + b"body\r\n",
    "a space before the method": first(b" GET /told HTTP/1.1"),
    "two spaces": first(b"GET  /told HTTP/1.1"),
    "two spaces later": first(b"GET /told  HTTP/1.1"),
    "a tab in the line": first(b"GET\t/told HTTP/1.1"),
    "a space after the line": first(b"GET /told HTTP/1.1 "),
    "get": first(b"get /told HTTP/1.1"),
    "Get": first(b"Get /told HTTP/1.1"),
    "an unknown method": first(b"BREW /told HTTP/1.1"),
    "a rare method": first(b"PURGE /told HTTP/1.1"),
    "no method": first(b" /told HTTP/1.1"),
    "QUERY": head(b"Content-Length: 4", first=b"QUERY /told HTTP/1.1") + b"body",
    "TLS": HELLO,
    "TLS, EOF": HELLO,
    "noise": bytes(range(256)),
    "a head in two pieces": (
        head(b"Content-Length: 4")[:20],
        head(b"Content-Length: 4")[20:] + b"body",
    ),
    "a head byte by byte": (*bytewise(head(b"Content-Length: 4")), b"body"),
    "a head but its last byte": (head(b"Content-Length: 4")[:-1], b"\nbody"),
    "a body later": (head(b"Content-Length: 4"), b"body"),
    "a body byte by byte": (head(b"Content-Length: 4"), b"b", b"o", b"d", b"y"),
    "a body and more": (head(b"Content-Length: 4") + b"bo", b"dy" + first(b"GET /told HTTP/1.1")),
    "a large body": head(b"Content-Length: 300000") + b"x" * 300_000,
    "a body at the limit": head(b"Content-Length: 262144") + b"x" * 262_144,
    "a body beyond its limit": head(b"Content-Length: 500000") + b"x" * 500_000,
    "101 headers": head(*(b"X-%d: 1" % at for at in range(99)), b"Content-Length: 0"),
    "120 headers": head(*(b"X-%d: 1" % at for at in range(118)), b"Content-Length: 0"),
    "200 headers": head(*(b"X-%d: 1" % at for at in range(198)), b"Content-Length: 0"),
    "a long header": head(b"X-One: " + b"a" * 17_000, b"Content-Length: 0"),
    "a header at the limit": head(b"X-One: " + b"a" * 16_377, b"Content-Length: 0"),
    "long headers": head(
        b"X-One: " + b"a" * 9_000, b"X-Two: " + b"b" * 9_000, b"Content-Length: 0"
    ),
    "a long target": first(b"GET /told/" + b"a" * 17_000 + b" HTTP/1.1"),
    "a long target that does not end": b"GET /told/" + b"a" * 70_000,
    "a head that does not end": head() * 0 + b"GET /told HTTP/1.1\r\n" + b"X: 1\r\n" * 12_000,
    "nothing, EOF": b"",
    "half a head, EOF": b"GET /told HTTP/1.1\r\nHost: te",
    "half a body, EOF": head(b"Content-Length: 8") + b"body",
    "a whole request, EOF": first(b"GET /told HTTP/1.1"),
    "a request in a body": head(b"Content-Length: 36")
    + b"GET /json HTTP/1.1\r\nHost: smuggled\r\n\r\n",
    "a request after no body": head(b"Content-Length: 0") + first(b"GET /json HTTP/1.1"),
    "a request after a GET's body": head(b"Content-Length: 4", first=b"GET /told HTTP/1.1")
    + b"body"
    + first(b"GET /json HTTP/1.1"),
}


async def test_both_ways_take_alike() -> None:
    """Whatever is sent, and in which pieces, both take the same of it and refuse the same."""
    requests = {
        name: told if isinstance(told, tuple) else (told,) for name, told in UNUSUAL.items()
    }
    assert {} == await differences(requests, maxBodySize=400_000)


PRESENTED: dict[str, dict[str, str]] = {
    "nothing": {},
    "one": {"X-One": "1"},
    "several": {"x-one": "1", "X-Two": "", "Set-Cookie": "a=1"},
    "type": {"content-type": "text/other"},
    "cache": {"cache-control": "public, max-age=3"},
    "varying": {"VARY": "Accept"},
    "id": {"X-Request-Id": "mine"},
    "twice": {"X-One": "1", "x-one": "2"},
    "closing": {"connection": "close"},
    "date": {"date": "then"},
    "name": {"server": "me"},
    "more than a line": {"X-One": "a\nsmuggled: b"},
}
ODD: dict[str, Callable[[], Response]] = {
    "lower": lambda: Response(200, {"content-type": "text/x"}, body=b"odd"),
    "more": lambda: Response(200, {"Content-Type": "text/x", "X-One": "0"}, body=b"odd"),
    "control": lambda: Response(200, {"Content-Type": "text/x\x07"}, body=b"odd"),
    "empty": lambda: Response(200, {"Content-Type": "text/x"}, body=b""),
    "204": lambda: Response(204, {"Content-Type": "text/x"}, body=b"never seen"),
    "799": lambda: Response(799, {"Content-Type": "text/x"}, body=b"odd"),
}


def odd_with(change: Callable[[Context], Any]) -> Callable[[], Response]:
    """What says its type alone, when something else is said by its context."""

    def get() -> Response:
        change(get_context())
        return Response(200, {"Content-Type": "text/x"}, body=b"odd")

    return get


CHANGES: dict[str, Callable[[Context], Any]] = {
    "header": lambda context: context.response_headers.add("X-One", "1"),
    "version": lambda context: setattr(context, "etag", "v1"),
    "time": lambda context: setattr(context, "last_modified", 1.0),
    "nobody": lambda context: setattr(context, "user", None),
    "call": lambda context: context.call_headers.update({"X-One": "2", "x-call": "3"}),
    "call-over": lambda context: context.call_headers.update({"x-one": "2"}),
    "call-varies": lambda context: context.call_headers.update({"vary": "x"}),
}


def briefly() -> dict[str, type[Resource]]:
    """Mounts whose answers say next to nothing of themselves."""
    plain = odd_with(lambda _: None)
    told = {"X-One": "1"}
    return {
        **{
            name: answering(plain, present_headers=staticmethod(lambda _, told=told: told))
            for name, told in PRESENTED.items()
        },
        **{
            f"odd-{name}": answering(verb, present_headers=staticmethod(lambda _: told))
            for name, verb in {**ODD, **{k: odd_with(v) for k, v in CHANGES.items()}}.items()
        },
    }


@pytest.mark.parametrize(
    "more",
    [{"cors": "false"}, {"cors": "true"}, {"cors": "false", "compressionThreshold": 2}],
    ids=["at once", "for other origins", "compressed"],
)
async def test_a_head_that_is_told_at_once_is_no_other(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Whatever else has something to say in it: then it is put together as any other."""
    found: dict[str, set[bool]] = {}

    def tell(reply: Reply, own: Any, context: Context) -> bool:
        told = lines.tell(reply, own, context)
        found.setdefault(unquote(context.path[1:]), set()).add(told)
        return told

    monkeypatch.setattr(dispatch, "tell", tell)
    mounts = briefly()
    key = "Authorization: Bearer KEY"
    asked = {name: (ask(f"GET /{quote(name)}", key) * 2,) for name in mounts}
    assert {} == await differences(asked, {**mounts, "last": MOUNTS["last"]}, **more)

    at_once = {name for name, told in found.items() if told == {True}}
    wanted = {"nothing", "one", "several", "odd-empty", "odd-204", "odd-799", "odd-call"}
    assert at_once == (wanted if more == {"cors": "false"} else set())


# --- one connection, many requests


class Reader:
    """A connection, and what comes over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> bytes:
        """The body of the next answer, of one that has a length."""
        told = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = int(told.partition("Content-Length: ")[2].split()[0])
        return await self.reader.readexactly(length)


@contextlib.asynccontextmanager
async def connected(server: RunningServer) -> AsyncIterator[Reader]:
    """A connection to a server."""
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        with contextlib.closing(writer):
            yield Reader(reader, writer)


@pytest.fixture(params=["on", "off"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[RunningServer]:
    """A server with all mounts, with front on and then off."""
    async with running(config(request.param), resources=MOUNTS) as server:
        yield server


HEADS = [
    [],
    ["Content-Length: 0"],
    ["Content-Length: 4"],
    ["Content-Length: 5"],
    ["Content-Length: 12"],
    ["Content-Length: 04"],
    ["Content-Length: 004"],
    ["Content-Length:4"],
    ["Content-Length:  4 "],
    ["content-length: 4"],
    ["CONTENT-LENGTH: 5"],
    ["Content-Length: 4", "X-One: 1"],
    ["X-One: 1", "Content-Length: 4"],
    ["X-One: 1", "Content-Length: 5", "X-Two: 2"],
    ["X-One: 2", "Content-Length: 4", "X-Two: 2"],
    ["X-One: content-length: 9", "Content-Length: 4"],
    ["X-Content-Length: 9", "Content-Length: 4"],
    ["Content-Length: 4", "X-Content-Length: 4"],
    ["Content-Type: text/plain", "Content-Length: 4"],
    ["Connection: keep-alive", "Content-Length: 4"],
    ["Transfer-Encoding: chunked"],
]


def one_of(method: str, lines: list[str]) -> tuple[bytes, list[Any]]:
    """A request with these headers, and what its handler is to be told."""
    pairs = [(name.lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)]
    length = int(dict(pairs).get("content-length", 0))
    body = sent = b"GET /x HTTP/1.1"[:length]
    if lines and lines[0].startswith("Transfer"):
        body, sent = b"chunk", b"5\r\nchunk\r\n0\r\n\r\n"
    lines = [f"{method} /told?{method} HTTP/1.1", "Host: test", *lines, "", ""]
    headers = [list(pair) for pair in sorted([("host", "test"), *pairs])]
    return (
        "\r\n".join(lines).encode() + sent,
        [method, "/told", method, headers, len(body), body.hex()],
    )


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
async def test_each_head_is_read_as_it_is(server: RunningServer, *, pipelined: bool) -> None:
    """However much two requests of a connection have in common, each has its own head and body."""
    kinds = [one_of(method, lines) for method in ("POST", "GET") for lines in HEADS]
    # A connection that was handed over stays so: those that may be come last.
    turns = [(a, b) for a in kinds for b in kinds if b"chunked" not in a[0] + b[0]]
    turns += [(kinds[0], kinds[len(HEADS) - 1]), (kinds[0], kinds[0])]
    requests = [request for turn in turns for request in turn]
    async with connected(server) as connection:
        if pipelined:
            connection.writer.write(b"".join(sent for sent, _ in requests))
        for sent, wanted in requests:
            if not pipelined:
                connection.writer.write(sent)
            assert wanted == json.loads(await connection.answer())


async def test_no_byte_is_lost_between_two_requests(server: RunningServer) -> None:
    """Whenever the bytes of the next ones arrive: each is answered once, and in its turn."""
    wanted = [one_of("POST", [f"X-At: {at}", "Content-Length: 9"]) for at in range(200)]
    sent = b"".join(sent for sent, _ in wanted)
    async with connected(server) as connection:
        answers = asyncio.create_task(_all(connection, len(wanted)))
        for at in range(0, len(sent), 61):
            connection.writer.write(sent[at : at + 61])
            for _ in range(at % 7):
                await asyncio.sleep(0)
        assert [body for _, body in wanted] == await answers


async def test_a_length_may_have_any_number_of_zeros(server: RunningServer) -> None:
    """More of them than Python reads as a number, too, and behind another request."""
    length = b"0" * 5000 + b"4"
    sent = ask("GET /last") + head(b"Content-Length: " + length) + b"body" + ask("GET /last")
    async with connected(server) as connection:
        connection.writer.write(sent)
        answers = await _all(connection, 3)

    assert ["last", "last"] == [answers[0], answers[2]]
    assert ["content-length", length.decode()] in answers[1][3]
    assert [4, b"body".hex()] == answers[1][4:]


async def _all(connection: Reader, count: int) -> list[Any]:
    return [json.loads(await connection.answer()) for _ in range(count)]


async def test_common_and_unusual_ones_are_answered_in_their_order(server: RunningServer) -> None:
    """Those of both kinds may come in one piece."""
    kinds = [one_of("POST", HEADS[at]) for at in (0, 2, 3, -1, 4, -1, 1)]
    async with connected(server) as connection:
        connection.writer.write(b"".join(sent for sent, _ in kinds))
        assert [body for _, body in kinds] == await _all(connection, len(kinds))


SEEN: ContextVar[str] = ContextVar("SEEN", default="nothing")


async def seen() -> list[str | None]:
    """What the request finds in its context, which it changes; and who asks."""
    before, user = SEEN.get(), get_context().user
    SEEN.set("a secret")
    await asyncio.sleep(0)
    return [before, user and user.username]


def seen_at_once() -> list[str | None]:
    """The same, of what waits for nothing."""
    before, user = SEEN.get(), get_context().user
    SEEN.set("a secret")
    return [before, user and user.username]


PLAIN = ask("GET /seen", "X-Long: " + "a" * 900)
CHUNKED = ask("POST /seen", "Transfer-Encoding: chunked") + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [PLAIN, PLAIN],
        [PLAIN * 5],
        [PLAIN, CHUNKED],
        [PLAIN + CHUNKED + PLAIN],
        [ask("POST /seen", body=b"body"), ask("POST /seen", body=b"longer"), CHUNKED],
    ],
    ids=["two", "pipelined", "handed over", "in one piece", "bodies"],
)
@pytest.mark.parametrize("front", ["on", "off"])
async def test_a_request_knows_nothing_of_the_one_before(front: str, pieces: list[bytes]) -> None:
    """Neither what it has set in its context nor who it was from."""
    mounts = {"seen": answering(seen)}
    async with running(config(front), resources=mounts) as server, connected(server) as connection:
        key = f"Authorization: Bearer {server.api_key}"
        connection.writer.write(ask("GET /seen", key))
        assert ["nothing", "HDB_ADMIN"] == json.loads(await connection.answer())
        for piece in pieces:
            connection.writer.write(piece)
            for _ in range(piece.count(b"\r\n\r\n") - piece.count(b"0\r\n\r\n")):
                assert ["nothing", None] == json.loads(await connection.answer())


@pytest.mark.parametrize("front", ["on", "off"])
@pytest.mark.parametrize("verb", [seen, seen_at_once])
async def test_nor_does_the_same_one_anew(front: str, verb: Callable[[], Any]) -> None:
    """By whichever way it goes: who asks is known from the first on."""
    mounts = {"seen": answering(verb)}
    async with running(config(front), resources=mounts) as server, connected(server) as connection:
        request = ask("GET /seen", f"Authorization: Bearer {server.api_key}")
        for piece in [request, request, request * 3]:
            connection.writer.write(piece)
            for _ in range(len(piece) // len(request)):
                assert ["nothing", "HDB_ADMIN"] == json.loads(await connection.answer())
        connection.writer.write(PLAIN)
        assert ["nothing", None] == json.loads(await connection.answer())


async def task() -> str:
    """Where it runs."""
    return task_at_once()


def task_at_once() -> str:
    """The same, of what waits for nothing."""
    mine = asyncio.current_task()
    assert mine is not None
    return mine.get_name()


@pytest.mark.parametrize("verb", [task, task_at_once])
async def test_each_request_has_a_task_of_its_own(verb: Callable[[], Any]) -> None:
    """It has the request's id as its name."""
    names: list[str] = []
    mounts = {"task": answering(verb)}
    async with running(config("on"), resources=mounts) as server, server.session() as client:
        for _ in range(3):
            async with client.get("/task") as answer:
                names.append(await answer.json())
                assert names[-1] == answer.headers["x-request-id"]
    assert 3 == len({*names})


@pytest.mark.parametrize("front", ["on", "off"])
async def test_nor_does_one_that_was_not_read_until_later(front: str) -> None:
    """What came while another was served is read from then on, and not on its behalf."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        SEEN.set("a secret")
        entered.set()
        await leave.wait()

    mounts = {"seen": answering(seen), "stay": answering(stay)}
    async with running(config(front), resources=mounts) as server, connected(server) as connection:
        connection.writer.write(ask("DELETE /stay"))
        await entered.wait()
        connection.writer.write(PLAIN * 200)
        for _ in range(20):
            await asyncio.sleep(0)
        leave.set()
        await connection.reader.readuntil(b"\r\n\r\n")
        for _ in range(200):
            assert ["nothing", None] == json.loads(await connection.answer())
        connection.writer.write(PLAIN)
        assert ["nothing", None] == json.loads(await connection.answer())


@pytest.mark.parametrize("front", ["on", "off"])
async def test_what_comes_as_another_ends_waits_for_its_turn(front: str) -> None:
    """However the loop puts the end of one request and the bytes of a later one in order."""
    began: list[str] = []

    async def wait(target: RequestTarget) -> str:
        began.append(target.search)
        if target.search == "1":
            # Seen by the loop in the very turn in which this one ends.
            connection.writer.write(ask("GET /wait?3"))
        for _ in range(10 if target.search == "2" else 1):
            await asyncio.sleep(0)
        began.append("end")
        return target.search

    mounts = {"wait": answering(wait)}
    async with running(config(front), resources=mounts) as server, connected(server) as connection:
        connection.writer.write(ask("GET /wait?1") + ask("GET /wait?2"))
        assert ["1", "2", "3"] == await _all(connection, 3)
    assert ["1", "end", "2", "end", "3", "end"] == began


@pytest.mark.parametrize("front", ["on", "off"])
@pytest.mark.parametrize(
    "headers",
    [
        {"X-One": "a\r\n\r\nHTTP/1.1 200 OK\r\nX-Two: smuggled"},
        {"X-One": "a\rsmuggled"},
        {"X-One": "a\nsmuggled"},
        {"X-One\r\nX-Two": "smuggled"},
        {"X-One: smuggled\n": ""},
    ],
    ids=["an answer", "CR", "LF", "a name", "a name that ends"],
)
@pytest.mark.parametrize("kind", ["json", "stream", "events", "late-events"])
async def test_nobody_splits_an_answer(front: str, headers: dict[str, str], kind: str) -> None:
    """A header that would be more than one line of a head is a 500 that tells nothing of it."""
    resource = answering(VALUES[kind], present_headers=staticmethod(lambda _: headers))
    async with running(config(front), resources={"it": resource}) as server:
        told = masked(await exchanged(server, ask("GET /it")))

    assert told[0].startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert b"smuggled" not in b"".join(told)
    assert b"X-One" not in b"".join(told)


@pytest.mark.parametrize("front", ["on", "off"])
async def test_nothing_comes_after_a_streams_end(front: str) -> None:
    """Not even the comment that was to break its silence at that very moment."""

    async def events() -> AsyncIterator[str]:
        yield "first"
        # Both are due at once: the end comes first.
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.1)
        await asyncio.sleep(0.045)

    resource = answering(lambda: EventStream(events()), keepalive=0.05)
    mounts = {"it": resource, "last": MOUNTS["last"]}
    async with running(config(front), resources=mounts) as server:
        told = masked(await exchanged(server, ask("GET /it")))

    assert 2 == len(told)
    assert told[0].endswith(b"\r\n\r\nd\r\ndata: first\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("name", [n for n in VALUES if "length" in n and "stream" not in n])
async def test_a_length_that_is_none_is_not_told(server: RunningServer, name: str) -> None:
    """Nor another than that of what is whole: an answer ends where its client thinks it does."""
    body = b"" if name == "length-of-none" else b"hello"
    async with connected(server) as connection:
        connection.writer.write(ask(f"GET /{quote(name)}"))
        told = await connection.reader.readuntil(b"\r\n\r\n")
        assert (b"Content-Length: %d\r\n" % len(body) in told) == (b"chunked" not in told)
        if b"chunked" in told:
            assert b"Content-Length" not in told
            body = b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
        assert body == await connection.reader.readexactly(len(body))
        connection.writer.write(ask("GET /last"))
        assert (await connection.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")


async def spoil(target: RequestTarget) -> list[Any]:
    """What the request finds in its target and its context, both of which it changes."""
    context, kept = get_context(), dict(target.params)
    before = [target.id, target.search, kept, context.accept, context.headers["content-length"]]
    target.id, target.search, context.user = "spoilt", "spoilt", None
    context.accept = "application/json"
    if isinstance(target.params, dict):
        target.params["id"] = "spoilt"
    return before


async def test_a_way_is_found_once_and_is_the_requests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next head says another length; what one does to its target stays with it."""
    matched: list[str] = []
    match = Resources.match

    def counted(self: Resources, path: str, *more: Any) -> Any:
        matched.append(path)
        return match(self, path, *more)

    monkeypatch.setattr(Resources, "match", counted)
    mounts = {"of/:id": answering(spoil, public=False)}
    async with running(config("on"), resources=mounts) as server, connected(server) as connection:
        key = f"Authorization: Bearer {server.api_key}"
        for length in (1, 2, 2, 10, 1, 300):
            connection.writer.write(ask("POST /of/7?a=b", key, "Accept: */*", body=b"x" * length))
            wanted = ["7", "a=b", {"id": "7"}, "*/*", str(length)]
            assert wanted == json.loads(await connection.answer())
        assert ["/of/7"] == matched
        connection.writer.write(ask("POST /of/8?a=b", key, "Accept: */*", body=b"x"))
        assert "8" == json.loads(await connection.answer())[0]


async def test_who_may_is_asked_for_each_request_of_a_connection() -> None:
    """Its way is known and its head the same: what was taken away meanwhile is gone.

    Also where another connection has heard of it before.
    """
    mounts = {"it": answering(VALUES["json"], public=False)}
    async with (
        running(config("on"), resources=mounts) as server,
        connected(server) as connection,
        connected(server) as other,
    ):
        key = await server.key_for("eve", "super_user")
        (made,) = [one for one in await server.operate("list_api_keys") if one.user == "eve"]
        request = ask("GET /it", f"Authorization: Bearer {key}")

        async def statuses() -> list[str]:
            found = [await asked(one) for one in (other, connection, connection, connection)]
            return sorted({*found})

        async def asked(where: Reader) -> str:
            where.writer.write(request)
            told = (await where.reader.readuntil(b"\r\n\r\n")).decode()
            length = int(told.partition("Content-Length: ")[2].split()[0])
            await where.reader.readexactly(length)
            return told.split()[1]

        assert ["200"] == await statuses()
        await server.operate("alter_user", username="eve", role="model_user")
        assert ["403"] == await statuses()
        await server.operate("alter_user", username="eve", role="super_user")
        assert ["200"] == await statuses()
        await server.operate("drop_api_key", id=made.id)
        assert ["401"] == await statuses()


@pytest.mark.parametrize("front", ["on", "off"])
async def test_a_page_may_not_ask_by_the_head_of_another_body(front: str) -> None:
    """What a page of another origin may ask depends on the body: what is known of one is not."""
    key = f"Authorization: {basic('eve', 'pw')}"
    mounts = {"it": answering(VALUES["json"], public=False)}
    async with running(config(front), resources=mounts) as server, connected(server) as connection:
        await server.key_for("eve", "super_user")
        statuses: list[int] = []
        for body in (b"{}", b"", b"{}", b"{ }", b"", b"[]"):
            length = f"Content-Length: {len(body)}"
            request = ask("POST /it", "Origin: http://a", key, JSON, length)
            connection.writer.write(request + body)
            told = (await connection.reader.readuntil(b"\r\n\r\n")).decode()
            length = told.partition("Content-Length: ")[2].split()[0]
            await connection.reader.readexactly(int(length))
            statuses.append(int(told.split()[1]))

    assert [200, 403, 200, 200, 403, 200] == statuses


@pytest.mark.parametrize("size", [10, 150])
async def test_a_connection_that_is_idle_holds_little(size: int) -> None:
    """Whatever its last head was: a few kilobytes."""
    count = 30
    request = ask("GET /json", *(f"X-Header-{at}: {'a' * size}" for at in range(size // 2)))
    loop = asyncio.get_running_loop()
    async with (
        asyncio.timeout(SECONDS),
        contextlib.AsyncExitStack() as stack,
        running(config("on"), resources=MOUNTS) as server,
    ):

        async def connect() -> None:
            address = "127.0.0.1", server.server.http_port
            one = stack.enter_context(socket.create_connection(address))
            one.setblocking(False)  # noqa: FBT003
            await loop.sock_sendall(one, request)
            assert (await loop.sock_recv(one, 65536)).startswith(b"HTTP/1.1 200 OK")

        # What the first of all brings is no connection's.
        await connect()
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for _ in range(count):
            await connect()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()

    assert held < count * 8 * 1024


# --- the end of the server


@contextlib.asynccontextmanager
async def stopping(front: str) -> AsyncIterator[tuple[Reader, Callable[[], asyncio.Task[None]]]]:
    """A connection, and what stops its server."""
    async with contextlib.AsyncExitStack() as life, asyncio.timeout(SECONDS):
        server = await life.enter_async_context(running(config(front), resources=MOUNTS))
        async with connected(server) as connection:
            yield connection, lambda: asyncio.create_task(life.aclose())


@pytest.mark.parametrize("front", ["on", "off"])
async def test_who_reads_slowly_gets_the_whole_answer_from_a_server_that_stops(front: str) -> None:
    """It waits for its readers as it does for its handlers."""
    async with stopping(front) as (connection, stop):
        connection.writer.write(ask("GET /huge"))
        await connection.reader.readuntil(b"\r\n\r\n")
        stopped = stop()
        for _ in range(20):
            await asyncio.sleep(0)
        assert HUGE == len(await connection.reader.read(-1))
        await stopped


async def test_who_has_begun_to_send_a_body_is_answered_by_a_server_that_stops() -> None:
    """It is told, and not cut off."""
    async with stopping("on") as (connection, stop):
        connection.writer.write(head(b"Content-Length: 4") + b"bo")
        for _ in range(5):
            await asyncio.sleep(0)
        stopped = stop()
        for _ in range(5):
            await asyncio.sleep(0)
        connection.writer.write(b"dy")
        assert 503 == json.loads(await connection.answer())["status"]
        await stopped
