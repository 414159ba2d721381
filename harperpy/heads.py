"""Heads: the first lines of a request, where they are of the common form."""

from __future__ import annotations

import httptools
from multidict import CIMultiDict

_MOST_HEADERS = 100
_ELSEWHERE = frozenset({"HEAD", "CONNECT"})
_ODD = ("transfer-encoding", "expect", "content-encoding", "upgrade")
# A repetition of these is refused by who is strict, and of others it is rare.
_ONCE = ("host", "content-type", "user-agent", "authorization")


class Head:
    """A request's head, if it is in the common form."""

    __slots__ = ("_heads", "_pairs", "headers", "length", "method", "target")

    def __init__(self) -> None:
        self._heads = 0
        self._pairs: list[tuple[str, str]] = []
        self.method = self.target = ""
        self.length = 0

    def on_url(self, url: bytes) -> None:
        """What is asked for."""
        self.target += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._pairs.append((name.decode(), value.decode().rstrip()))

    def on_headers_complete(self) -> None:
        """The end of a head; there is to be one."""
        self._heads += 1

    def is_common(self, data: bytes) -> bool:
        """Whether nothing in it is unusual; settles `headers` and `length`."""
        if self._heads != 1 or len(self._pairs) > _MOST_HEADERS or self.method in _ELSEWHERE:
            return False
        # The version is the line's last word: the parser has seen that it is one line.
        plain = self.target[:1] == "/" and "#" not in self.target
        if not plain or data.find(b" HTTP/1.1\r\n") < 0:
            return False
        headers = self.headers = CIMultiDict(self._pairs)
        if any(name in headers for name in _ODD) or "host" not in headers:
            return False
        if headers.get("connection", "keep-alive").lower() != "keep-alive":
            return False
        if any(len(headers.getall(name, ())) > 1 for name in _ONCE):
            return False
        length = headers.get("content-length", "0")
        self.length = int(length) if length.isdigit() else 0
        return length.isdigit()


def read_head(data: bytes) -> Head | None:
    """The head that these bytes are; None for one that is not of the common form.

    That is HTTP/1.1 on a connection that stays, with at most a body of known length.
    """
    head = Head()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    head.method = parser.get_method().decode()
    return head if head.is_common(data) else None
