"""Heads: the first lines of a request, where they are of the common form."""

from __future__ import annotations

import httptools
from msgspec.structs import replace
from multidict import CIMultiDict, CIMultiDictProxy

from .content import Body
from .request import Request, Shown

_END = b"\r\n\r\n"
_MOST_HEADERS = 100
_MOST_DIGITS = 9
_ELSEWHERE = frozenset({"HEAD", "CONNECT"})
_ODD = frozenset({"transfer-encoding", "expect", "content-encoding", "upgrade"})
# A repetition of these is refused by who is strict, and of others it is rare.
_ONCE = ("connection", "host", "content-type", "user-agent", "authorization")


class Head:
    """A request's first lines: HTTP/1.1, on a connection that stays, a body of known length if any.

    `told` is the head itself; `length` are the bytes of its body, `whole` of both. Each `request`
    that has it is like this one, but for its id and its body; and that like `body`, but for its
    bytes.
    """

    __slots__ = ("_at", "body", "length", "request", "told", "whole")

    def __init__(self, request: Request, told: bytes, at: int, body: Body) -> None:
        self.request = request
        self.body = body
        self.told = told
        self.length = int(request.headers.get("content-length", "0"))
        self.whole = len(told) + self.length
        # Where the length stands; nowhere is 0.
        self._at = at

    def again(self, data: bytes) -> Head | None:
        """The head at the beginning of `data`, if it is this one but for the length of its body.

        A client sends the same head over and over.
        """
        begin = self._at
        if not begin or not data.startswith(self.told[:begin]):
            return None
        after = self.told[begin + len(self.request.headers["content-length"]) :]
        end = data.find(b"\r", begin, begin + _MOST_DIGITS)
        told = data[begin:end]
        if not told.isdigit() or not data.startswith(after, end):
            return None
        headers = CIMultiDict(self.request.headers)
        headers["Content-Length"] = told.decode()
        # Where there is a body, or none any more, who asks may ask for something else.
        shown = self.request.shown if self.length and int(told) else Shown()
        request = replace(self.request, headers=CIMultiDictProxy(headers), shown=shown)
        return Head(request, data[: end + len(after)], begin, self.body)


def read_head(data: bytes, most: int) -> Head | None:
    """The head at the beginning of `data`; None for one that is not whole, or not common.

    `most` is how many bytes it may have.
    """
    size = data.find(_END) + len(_END)
    if not len(_END) <= size <= most:
        return None
    data = data[:size]
    found = _Found()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    method, target = parser.get_method().decode(), found.target
    plain = data.isascii() and target[:1] == "/" and "#" not in target
    current = parser.get_http_version() == "1.1" and method not in _ELSEWHERE
    if not plain or not current or found.heads != 1:
        return None
    headers = CIMultiDict(found.pairs)
    if not _are_common(headers):
        return None
    path, _, query = target.partition("?")
    request = Request(method, path, CIMultiDictProxy(headers), query)
    return Head(request, data, _place_of(headers.get("content-length"), data), request.body)


def _place_of(length: str | None, data: bytes) -> int:
    """Where the length of the body stands, if it is told."""
    if length is None:
        return 0
    begin = data.lower().index(b"\r\ncontent-length:") + len("\r\ncontent-length:")
    return data.index(length.encode(), begin)


def _are_common(headers: CIMultiDict[str]) -> bool:
    """Whether they say nothing unusual of the connection and the body."""
    names = {name.lower() for name in headers}
    if len(headers) > _MOST_HEADERS or "host" not in names or not _ODD.isdisjoint(names):
        return False
    repeats = len(names) < len(headers)
    if repeats and any(len(headers.getall(name, ())) > 1 for name in _ONCE):
        return False
    stays = headers.get("connection", "keep-alive").lower() == "keep-alive"
    length = headers.get("content-length", "0")
    return stays and length.isdigit() and len(length) <= _MOST_DIGITS


class _Found:
    """What httptools finds in a head."""

    def __init__(self) -> None:
        self.heads = 0
        self.pairs: list[tuple[str, str]] = []
        self.target = ""

    def on_url(self, url: bytes) -> None:
        self.target += url.decode(errors="replace")

    def on_header(self, name: bytes, value: bytes) -> None:
        text = value.decode(errors="replace").rstrip()
        self.pairs.append((name.decode(), text))

    def on_headers_complete(self) -> None:
        self.heads += 1
