"""Heads: the first lines of a request, where they are of the common form."""

from __future__ import annotations

import httptools
from multidict import CIMultiDict, CIMultiDictProxy

_END = b"\r\n\r\n"
_MOST_HEADERS = 100
_MOST_DIGITS = 9
_ELSEWHERE = frozenset({"HEAD", "CONNECT"})
_ODD = ("transfer-encoding", "expect", "content-encoding", "upgrade")
# A repetition of these is refused by who is strict, and of others it is rare.
_ONCE = ("host", "content-type", "user-agent", "authorization")


class Head:
    """A request's first lines: HTTP/1.1, on a connection that stays, a body of known length if any.

    `size` and `length` are the bytes of head and body.
    """

    __slots__ = ("_parts", "headers", "length", "method", "path", "query", "size")

    def __init__(
        self, method: str, target: str, headers: CIMultiDict[str], parts: tuple[bytes, bytes]
    ) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = CIMultiDictProxy(headers)
        told = headers.get("content-length", "")
        self.length = int(told or 0)
        before, after = self._parts = parts
        self.size = len(before) + len(told) + len(after)

    def again(self, data: bytes) -> Head | None:
        """The head at the beginning of `data`, if it is this one but for the length of its body.

        A client sends the same head over and over.
        """
        before, after = self._parts
        if not data.startswith(before):
            return None
        if not after:
            return self
        begin = len(before)
        end = data.find(b"\r", begin, begin + _MOST_DIGITS)
        told = data[begin:end]
        if not told.isdigit() or not data.startswith(after, end):
            return None
        if int(told) == self.length:
            return self
        headers = CIMultiDict(self.headers)
        headers["Content-Length"] = told.decode()
        target = f"{self.path}?{self.query}" if self.query else self.path
        return Head(self.method, target, headers, self._parts)


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
    # The parser has seen that the version is the last word of the first line.
    plain = data.isascii() and target[:1] == "/" and "#" not in target
    if not plain or data.find(b" HTTP/1.1\r\n") < 0 or found.heads != 1 or method in _ELSEWHERE:
        return None
    headers = CIMultiDict(found.pairs)
    if not _are_common(headers):
        return None
    return Head(method, target, headers, _parted(data, headers.get("content-length")))


def _parted(data: bytes, length: str | None) -> tuple[bytes, bytes]:
    """What stands before and after the length of the body, if it is told."""
    if length is None:
        return data, b""
    begin = data.lower().index(b"\r\ncontent-length:") + len("\r\ncontent-length:")
    begin = data.index(length.encode(), begin)
    return data[:begin], data[begin + len(length) :]


def _are_common(headers: CIMultiDict[str]) -> bool:
    """Whether they say nothing unusual of the connection and the body."""
    if len(headers) > _MOST_HEADERS or "host" not in headers:
        return False
    if any(name in headers for name in _ODD):
        return False
    if any(len(headers.getall(name, ())) > 1 for name in _ONCE):
        return False
    stays = headers.get("connection", "keep-alive").lower() == "keep-alive"
    return stays and headers.get("content-length", "0").isdigit()


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
