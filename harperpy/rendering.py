"""Reply: what a handler returned, as bytes or as a primed stream of them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any, cast

import msgspec
from multidict import CIMultiDict

from .backend import aclose, aiterate
from .content import EventStream, Response
from .context import Context
from .errors import Aborted, ClientError, HarperError, NotFound, ServerError
from .negotiation import EVENTS, JSON, TEXT, item_serializer, negotiate, serialize
from .registry import Entry
from .resource import Resource
from .sse import SSE, encode_json, encode_sse

logger = logging.getLogger("harperpy.dispatch")

_END = object()
_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Reply:
    """A status, headers, and a body: bytes, or an iterator that one task steps and closes.

    `committed` says that the head was sent while the first item was still awaited.
    """

    __slots__ = ("body", "committed", "headers", "keepalive", "source", "status")

    def __init__(
        self,
        status: int,
        headers: CIMultiDict[str],
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        keepalive: float | None = None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.keepalive = keepalive
        self.committed = False
        self.source: AsyncIterator[Any] | None = None

    async def close(self) -> None:
        """Close the body's iterator and what it is made from, begun or not."""
        for part in (self.body, self.source):
            if isinstance(part, AsyncIterator):
                await aclose(part)


Early = Callable[[Reply], None]


def as_harper_error(error: Exception) -> HarperError:
    """The error itself, or in place of an unforeseen one a `ServerError` that tells nothing."""
    if isinstance(error, Aborted):
        # A handler's own signal: who asked is still there, and is told that it took too long.
        return ServerError(status=504, code=error.code)
    return error if isinstance(error, HarperError) else ServerError()


def log_error(error: Exception) -> None:
    """One line for a refusal; a trace for what nobody foresaw."""
    if not isinstance(error, HarperError):
        logger.error("unhandled %s", type(error).__name__, exc_info=error)
    elif error.status >= 500:
        logger.warning("%d %s: %s", error.status, type(error).__name__, error)
    else:
        logger.info("%d %s: %s", error.status, type(error).__name__, error)


async def render(value: Any, entry: Entry, context: Context, early: Early) -> Reply:
    """The reply for what a handler returned. Raises `NotFound` for a get that returned nothing."""
    if isinstance(value, Response):
        return await _render_response(value, entry, context, early)
    if isinstance(value, EventStream):
        events = aiterate(value.events)
        return await _stream(events, EVENTS, value.headers, entry, context, early)
    if isinstance(value, (AsyncIterable, Iterator)):
        source = aiterate(cast("AsyncIterable[Any] | Iterable[Any]", value))
        return await _stream(source, _agreed(context), {}, entry, context, early)
    if value is None:
        if context.method in ("GET", "HEAD"):
            raise NotFound
        return Reply(context.status or 204, merged(context))
    if isinstance(value, (bytes, bytearray)):
        return _whole(200, merged(context), "application/octet-stream", bytes(value), context)
    media = negotiate(context.headers.get("accept"))
    return _whole(200, merged(context), media, serialize(value, media), context)


async def _render_response(
    response: Response, entry: Entry, context: Context, early: Early
) -> Reply:
    headers = merged(context, response.headers)
    body = response.body
    if response.data is not msgspec.UNSET:
        media = headers.get("Content-Type") or negotiate(context.headers.get("accept"))
        data = serialize(response.data, media.partition(";")[0])
        return _whole(response.status, headers, media, data, context, keep_status=True)
    if body is None or isinstance(body, (str, bytes)):
        data = body.encode() if isinstance(body, str) else body or b""
        media = TEXT if isinstance(body, str) else "application/octet-stream"
        return _whole(response.status, headers, media, data, context, keep_status=True)
    context.status = response.status
    headers.setdefault("Content-Type", "application/octet-stream")
    media = headers["Content-Type"].partition(";")[0]
    source, own = aiterate(body), response.headers
    return await _stream(source, media, own, entry, context, early, raw=True)


def error_body(response: Response, headers: CIMultiDict[str]) -> bytes:
    """The bytes of a worded refusal: `data` as JSON, text or bytes as they are."""
    if response.data is not msgspec.UNSET:
        headers.setdefault("Content-Type", JSON)
        return encode_json(response.data)
    body = response.body
    if isinstance(body, str):
        headers.setdefault("Content-Type", f"{TEXT}; charset=utf-8")
        return body.encode()
    return body if isinstance(body, bytes) else b""


def _whole(
    status: int,
    headers: CIMultiDict[str],
    media: str,
    data: bytes,
    context: Context,
    *,
    keep_status: bool = False,
) -> Reply:
    if data:
        headers.setdefault("Content-Type", f"{media}; charset=utf-8" if media == TEXT else media)
    return Reply(status if keep_status else context.status or status, headers, data)


def merged(context: Context, own: dict[str, str] | None = None) -> CIMultiDict[str]:
    """An answer's own headers, the context's where it has none of that name; cookies add up.

    Raises `ServerError` for a value that cannot be sent.
    """
    headers = CIMultiDict(own or {})
    taken = frozenset(map(str.lower, headers)) - {"set-cookie"}
    for name, value in context.response_headers.items():
        if name.lower() not in taken:
            headers.add(name, value)
    for name, value in headers.items():
        if not isinstance(value, str) or _FORBIDDEN.search(value):  # pyright: ignore[reportUnnecessaryIsInstance]
            # The refusal is merged with what else the handler set.
            context.response_headers.popall(name, None)
            message = f"the header {name!r} is not text that HTTP allows"
            raise ServerError(message)
    return headers


def _agreed(context: Context) -> str | None:
    """The type negotiated for a stream; None where it can only be sent if it is of events."""
    try:
        return negotiate(context.headers.get("accept"))
    except ClientError:
        return None


async def _stream(  # noqa: PLR0917  # all that it takes to write a head
    source: AsyncIterator[Any],
    media: str | None,
    own: dict[str, str],
    entry: Entry,
    context: Context,
    early: Early,
    *,
    raw: bool = False,
) -> Reply:
    """Prime the stream: its first item, or its first error, decides the head.

    Only where the type is certain before the first item may the head go out without it.
    """
    resource = entry.resource
    accept = context.headers.get("accept")
    reply = Reply(200, CIMultiDict())
    if context.method == "HEAD":
        await aclose(source)
        _head(reply, media or negotiate(accept), own, resource, context)
        return reply

    def commit() -> None:
        _head(reply, EVENTS, own, resource, context)
        reply.committed = True
        early(reply)

    wait = resource.first_item_wait
    late = asyncio.get_running_loop().call_later(wait, commit) if media == EVENTS else None
    try:
        first = await anext(source, _END)
        media = EVENTS if isinstance(first, SSE) and not raw else media or negotiate(accept)
        if not reply.committed:
            _head(reply, media, own, resource, context)
    except BaseException as error:
        await aclose(source)
        if not reply.committed or not isinstance(error, Exception):
            raise
        reply.body = _only(_framing(EVENTS, resource, context).failed(error))
        return reply
    finally:
        if late is not None:
            late.cancel()
    framing = _raw_framing() if raw else _framing(media, resource, context)
    reply.source = source
    reply.body = _frames(source, first, framing)
    return reply


def _head(
    reply: Reply, media: str, own: dict[str, str], resource: type[Resource], context: Context
) -> None:
    """Settle the head by what the handler, or the stream's first step, has set until now."""
    reply.status = context.status or 200
    reply.headers = merged(context, own)
    reply.headers.setdefault("Content-Type", media)
    if media == EVENTS:
        reply.keepalive = resource.keepalive
        for name, value in _STREAM_HEADERS.items():
            reply.headers.setdefault(name, value)


class Framing(msgspec.Struct):
    """How a stream's items, its frame and its failure become bytes."""

    item: Callable[[Any], bytes]
    failure: Callable[[HarperError], bytes] | None
    start: bytes = b""
    between: bytes = b""
    end: bytes = b""

    def failed(self, error: Exception) -> bytes:
        """The in-band form of a failure; raised where the format has none."""
        log_error(error)
        if self.failure is None:
            raise error
        return self.failure(as_harper_error(error))


def _raw_framing() -> Framing:
    return Framing(lambda item: item.encode() if isinstance(item, str) else bytes(item), None)


def _framing(media: str, resource: type[Resource], context: Context) -> Framing:
    item = item_serializer(media)
    if media == EVENTS:
        return Framing(item, lambda error: _last_event(error, resource, context))
    if media.endswith("ndjson"):
        return Framing(item, lambda error: item({"$harperStreamError": _told(error)}))
    if media == JSON:
        return Framing(item, lambda error: encode_json({"error": _told(error)}), b"[", b",", b"]")
    return Framing(item, None)


def _last_event(error: HarperError, resource: type[Resource], context: Context) -> bytes:
    """The failure as its resource words it; the default wording if that fails too."""
    try:
        return encode_sse(resource.present_stream_error(error, context))
    except Exception:
        logger.exception("present_stream_error of %s failed", resource.__name__)
        return encode_sse(Resource.present_stream_error(error, context))


def _told(error: HarperError) -> dict[str, Any]:
    code = error.code or type(error).__name__
    return {"error": code, "message": error.public_message, "status": error.status}


async def _frames(source: AsyncIterator[Any], first: Any, framing: Framing) -> AsyncIterator[bytes]:
    """The stream's bytes; whoever steps this closes the source with it."""
    written = False
    try:
        item, head = first, framing.start
        while item is not _END:
            if data := framing.item(item):
                yield (framing.between if written else head) + data
                written = True
            item = await anext(source, _END)
        tail = framing.end
    except Exception as error:  # noqa: BLE001  # worded as the stream's last item
        tail = (framing.between if written else framing.start) + framing.failed(error)
        tail += framing.end
    finally:
        await aclose(source)
    if not written and tail == framing.end:
        tail = framing.start + tail
    if tail:
        yield tail


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data
