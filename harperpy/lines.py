"""Lines: the head of an answer, as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from multidict import CIMultiDict

from .caching import PRIVATE
from .context import Context
from .names import CONTENT_TYPE
from .rendering import Reply

_FIRST_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}
_FOR_ONE = f"Cache-Control: {PRIVATE}\r\nVary: Authorization\r\n"
# What else than a type each answer says, or what somebody would have to look at.
_OTHERS = frozenset(
    {
        *("cache-control", "connection", "content-encoding", "content-length", "content-type"),
        *("date", "server", "transfer-encoding", "vary", "x-request-id"),
    }
)


def first_line(status: int) -> str:
    """The line that an answer begins with."""
    return _FIRST_LINES.get(status) or f"HTTP/1.1 {status} \r\n"


def told_lines(headers: Mapping[str, str]) -> str:
    """An answer's headers as lines. Raises `ValueError` where one would be more than a line."""
    lines = [*map(": ".join, headers.items())]
    text = "".join(lines)
    if "\n" in text or "\r" in text:
        message = "a header of the answer holds the end of a line"
        raise ValueError(message)
    return "\r\n".join(lines)


def tell(reply: Reply, own: Mapping[str, str], context: Context) -> bool:
    """Tell the lines of a brief reply to who was recognised; `own` are its resource's headers.

    False where there is more to look at: then it has `headers`, and nothing is told yet. Raises
    `ValueError` as `told_lines`.
    """
    media, asked = reply.lines, context.request.id
    more = {**own, **context.call_headers} if context.call_headers else own
    if (
        context.user is None
        or context.etag is not None
        or context.last_modified is not None
        or not asked.isprintable()
        or not _are_plain(tuple(more))
    ):
        reply.headers, reply.lines = CIMultiDict({CONTENT_TYPE: media}), ""
        return False
    first, lines = first_line(reply.status), f"{told_lines(more)}\r\n" if more else ""
    reply.lines = f"{first}Content-Type: {media}\r\n{lines}x-request-id: {asked}\r\n{_FOR_ONE}"
    return True


@lru_cache(maxsize=64)
def _are_plain(names: tuple[str, ...]) -> bool:
    """Whether these are of different headers, none of which has to do with another."""
    lowered = {name.lower() for name in names}
    return len(lowered) == len(names) and lowered.isdisjoint(_OTHERS)
