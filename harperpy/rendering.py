"""Reply: what a handler returned, as bytes or as a primed stream of them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, cast

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from .backend import aclose, aiterate
from .batches import Divert, EncodedEvents
from .caching import tell_version, vary
from .content import Blob, EventStream, Response
from .context import Context
from .errors import ClientError, NotFound, ServerError
from .framing import END, RAW, frames, framing_of
from .incoming import Incoming, Socket
from .names import CACHE_CONTROL, CONTENT_TYPE
from .negotiation import CSV, EVENTS, JSON, OCTETS, TEXT
from .outgoing import sent
from .registry import Entry
from .resource import Resource
from .sse import SSE, encode_json

logger = logging.getLogger("harperpy.dispatch")

_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
NO_HEADERS = cast("CIMultiDict[str]", CIMultiDictProxy(CIMultiDict[str]()))
"""Those of a brief reply, and of one whose head is sent: who gave it any would raise."""
_PLAIN = (str, bytes, bytearray, memoryview)
# Bytes of these are not what they seem: no comment is to come among them.
_COUNTED = ("content-length", "content-encoding")
_STREAM_HEADERS = {CACHE_CONTROL: "no-cache", "X-Accel-Buffering": "no"}


class Reply(msgspec.Struct, eq=False):
    """A status, headers, and a body: bytes, or an iterator that one task steps and closes.

    `committed` says that the head was sent while the first item was still awaited; `socket` is
    what a 101 is followed by. `check` raises what refuses who reads events by now. `divert` brings
    what the body would, as long as that is what was `made`. Into a `quiet` one no comment is put. A
    brief one has no `headers`: `lines` are its type alone, and then all.
    """

    status: int
    headers: CIMultiDict[str]
    body: bytes | AsyncIterator[bytes] = b""
    keepalive: float | None = None
    committed: bool = False
    made: AsyncIterator[bytes] | None = None
    quiet: bool = False
    source: AsyncIterator[Any] | None = None
    socket: Socket | None = None
    check: Callable[[], Awaitable[None]] | None = None
    divert: Divert[bytes] | None = None
    lines: str = ""

    async def close(self) -> None:
        """Close the body's iterator and what it is made from, begun or not."""
        for part in (self.body, self.source):
            if isinstance(part, AsyncIterator):
                await aclose(part)


class Flow(msgspec.Struct, eq=False):
    """A stream that a handler returned, its type as far as that is certain, and its own headers.

    What is `raw` needs no framing, and what is `agreed` is of the type that the client would rather
    have. `divert` is for a source of bytes that go out as they are.
    """

    source: AsyncIterator[Any]
    media: str | None
    headers: dict[str, str]
    raw: bool = False
    agreed: bool = False
    divert: Divert[bytes] | None = None


Early = Callable[[Reply], None]


def after(first: Callable[[], None], early: Early) -> Early:
    """The same, told of a head only when something else was done."""

    def begin(reply: Reply) -> None:
        first()
        early(reply)

    return begin


async def ready(reply: Reply) -> Reply:
    """A reply that need not be waited for."""
    return reply


async def sound(coming: Awaitable[Reply], context: Context) -> Reply:
    """A reply whose headers and body, which middlewares may have changed, can be sent."""
    reply = await coming
    if reply.made is not None and reply.body is not reply.made:
        await _put_aside(reply, reply.made)
    try:
        if not reply.committed:
            checked(reply.headers, context)
        _check(reply)
    except ServerError:
        await reply.close()
        raise
    return reply


def _check(reply: Reply) -> None:
    """Raises `ServerError` for a status or a body that no answer has."""
    body, status = cast("object", reply.body), cast("object", reply.status)
    if not isinstance(status, int) or (reply.socket is None and not 200 <= status <= 999):
        message = f"a middleware gave the status {status!r}; expected 200 to 999"
        raise ServerError(message)
    if not isinstance(body, bytes | AsyncIterator):
        kind = type(body).__name__
        message = f"a middleware gave a body of {kind}; expected bytes, or an async iterator"
        raise ServerError(message)


async def _put_aside(reply: Reply, made: AsyncIterator[bytes]) -> None:
    """What a reply was made of goes by the body that a middleware has put in its place, or ends."""
    reply.divert, reply.quiet = None, True
    if isinstance(reply.body, bytes):
        await aclose(made)
        await reply.close()


def stamp(reply: Reply, context: Context) -> None:
    """Say which version a whole answer is, or that the client has it."""
    known = tell_version(reply.headers, context, reply.status)
    if known and isinstance(reply.body, bytes):
        reply.status, reply.body = 304, b""
        reply.headers.pop(CONTENT_TYPE, None)


def render(value: Any, context: Context) -> Reply | Flow:
    """The reply for what a handler returned, or the stream that is to be primed for one.

    Raises `NotFound` for a get that returned nothing.
    """
    if isinstance(value, dict) and "status" in value:
        value = _meant(cast("dict[object, object]", value))
    if isinstance(value, Response):
        return _render_response(value, context)
    if isinstance(value, EventStream):
        return _events(value)
    if isinstance(value, (AsyncIterable, Iterator)):
        source = aiterate(cast("AsyncIterable[Any] | Iterable[Any]", value))
        return Flow(source, _agreed(context), {}, agreed=True)
    if value is None:
        if context.method in ("GET", "HEAD"):
            raise NotFound
        return Reply(_final(context.status or 204), merged(context))
    if isinstance(value, (Blob, bytes, bytearray)):
        return _as_it_is(value, context)
    headers, media = merged(context), context.types.negotiate(context.accept)
    vary(headers, "Accept")
    return _whole(200, headers, media, context.types.serialize(value, media), context)


def upgraded(
    value: Any,
    incoming: Incoming,
    check: Callable[[], Awaitable[None]],
    entry: Entry,
    context: Context,
) -> Reply:
    """The reply that opens a WebSocket for the messages that `connect` returned."""
    reply = Reply(101, merged(context))
    reply.source = sent(value)
    reply.socket = Socket(reply.source, incoming, check, entry.resource.keepalive)
    return reply


def _events(stream: EventStream) -> Flow:
    told = stream.events
    if isinstance(told, EncodedEvents):
        return Flow(told.encoded(), EVENTS, stream.headers, divert=told.divert)
    return Flow(aiterate(told), EVENTS, stream.headers)


def _meant(value: dict[Any, Any]) -> Any:
    """The `Response` that a dict of `status`, `headers` and at most `data` or `body` stands for."""
    status, headers = value["status"], value.get("headers")
    if isinstance(status, int) and isinstance(headers, Mapping):
        if value.keys() <= {"status", "headers", "data", "body"}:
            return Response(**value)
    elif value.keys() == {"status", "data"}:
        logger.warning("a dict of status and data is sent as it stands, with 200; use Response")
    return value


def _as_it_is(value: Blob | bytes | bytearray, context: Context) -> Reply:
    if not isinstance(value, Blob):
        return _whole(200, merged(context), OCTETS, bytes(value), context)
    # Who wrote it says what it is; between us and the client it may still be compressed.
    headers = merged(context, {CONTENT_TYPE: value.content_type, "Vary": "Accept-Encoding"})
    data = value.data.encode() if isinstance(value.data, str) else value.data
    return _whole(200, headers, value.content_type, data, context)


def _render_response(response: Response, context: Context) -> Reply | Flow:
    body = response.body
    own = response.headers
    status = response.status
    if context.request.brief and isinstance(body, bytes) and len(own) == 1:
        # It says its type alone.
        media = own.get(CONTENT_TYPE)
        told = response.data is not msgspec.UNSET or context.own_headers
        plain = type(media) is str and media.isprintable() and 200 <= status <= 999
        if media and plain and not told:
            return Reply(status, NO_HEADERS, body, lines=media)
    headers, status = merged(context, own), _final(status)
    if response.data is not msgspec.UNSET:
        if not (media := headers.get(CONTENT_TYPE)):
            media = context.types.negotiate(context.accept)
            vary(headers, "Accept")
        data = context.types.serialize(response.data, media.partition(";")[0])
        return _whole(status, headers, media, data, context, keep_status=True)
    if body is None or isinstance(body, _PLAIN):
        if body and CONTENT_TYPE not in headers:
            is_text = isinstance(body, str)
            headers[CONTENT_TYPE] = f"{TEXT}; charset=utf-8" if is_text else OCTETS
        data = body.encode() if isinstance(body, str) else bytes(body or b"")
        return Reply(status, headers, data)
    context.status = status
    headers.setdefault(CONTENT_TYPE, OCTETS)
    media = headers[CONTENT_TYPE].partition(";")[0]
    return Flow(aiterate(body), media, response.headers, raw=True)


def error_body(response: Response, headers: CIMultiDict[str]) -> bytes:
    """The bytes of a worded refusal: `data` as JSON, text or bytes as they are."""
    if response.data is not msgspec.UNSET:
        headers.setdefault(CONTENT_TYPE, JSON)
        return encode_json(response.data)
    body = response.body
    if isinstance(body, str):
        headers.setdefault(CONTENT_TYPE, f"{TEXT}; charset=utf-8")
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
    if data or media == CSV:
        _name(f"{media}; charset=utf-8" if media == TEXT else media, headers)
    return Reply(status if keep_status else _final(context.status or status), headers, data)


def _final(status: int) -> int:
    """The status, if it is one that an answer can have. Raises `ServerError`."""
    if not 200 <= status <= 999:
        message = f"{status} is not the status of an answer; expected 200 to 999"
        raise ServerError(message)
    return status


def merged(context: Context, own: dict[str, str] | None = None) -> CIMultiDict[str]:
    """An answer's own headers, the context's where it has none of that name; cookies add up.

    Raises `ServerError` for a value that cannot be sent.
    """
    headers = CIMultiDict(own or {})
    if context.own_headers:
        taken = frozenset(map(str.lower, headers)) - {"set-cookie"}
        for name, value in context.own_headers.items():
            if name.lower() not in taken:
                headers.add(name, value)
        checked(headers, context)
    elif own:
        checked(own, context)
    return headers


def checked(headers: Mapping[str, str] | CIMultiDict[str], context: Context) -> None:
    """Raises `ServerError` for a value that cannot be sent."""
    for name, value in headers.items():
        # What can be printed holds nothing forbidden, and is seen faster.
        if isinstance(value, str) and (value.isprintable() or not _FORBIDDEN.search(value)):  # pyright: ignore[reportUnnecessaryIsInstance]
            continue
        # The refusal is merged with what else the handler set.
        context.response_headers.popall(name, None)
        message = f"the header {name!r} is not text that HTTP allows"
        raise ServerError(message)


def _agreed(context: Context) -> str | None:
    """The type negotiated for a stream; None where it can only be sent if it is of events."""
    try:
        return context.types.negotiate(context.accept)
    except ClientError:
        return None


async def prime(flow: Flow, entry: Entry, context: Context, early: Early) -> Reply:
    """The reply for a stream: its first item, or its first error, decides the head.

    Only where the type is certain before the first item may the head go out without it.
    """
    source, media, raw = flow.source, flow.media, flow.raw
    resource = entry.resource
    reply = Reply(200, CIMultiDict(), quiet=raw)
    if context.method == "HEAD":
        await aclose(source)
        _head(reply, media or context.types.negotiate(context.accept), flow, resource, context)
        return reply

    def commit() -> None:
        _head(reply, EVENTS, flow, resource, context)
        reply.committed = True
        early(reply)

    wait = resource.first_item_wait
    counted = raw and any(name.lower() in _COUNTED for name in flow.headers)
    begins = media == EVENTS and not counted
    late = asyncio.get_running_loop().call_later(wait, commit) if begins else None
    try:
        first = await anext(source, END)
        media = EVENTS if isinstance(first, SSE) and not raw else media
        media = media or context.types.negotiate(context.accept)
        framing = RAW if raw else framing_of(media, resource, context)
        ready = None if first is END else framing.item(first)
        if not reply.committed:
            _head(reply, media, flow, resource, context)
    except BaseException as error:
        await aclose(source)
        if not reply.committed or not isinstance(error, Exception):
            raise
        reply.body = _only(framing_of(EVENTS, resource, context).failed(error) or b"")
        return reply
    finally:
        if late is not None:
            late.cancel()
    reply.source, reply.divert = source, flow.divert
    reply.body = reply.made = frames(source, ready, framing, context.signal)
    return reply


def _head(reply: Reply, media: str, flow: Flow, resource: type[Resource], context: Context) -> None:
    """Settle the head by what the handler, or the stream's first step, has set until now."""
    reply.status = _final(context.status or 200)
    reply.headers = merged(context, flow.headers)
    if flow.agreed:
        vary(reply.headers, "Accept")
    _name(media, reply.headers)
    if media == EVENTS or not flow.raw:
        reply.keepalive = resource.keepalive
    if media != EVENTS:
        reply.quiet = True
    else:
        for name, value in _STREAM_HEADERS.items():
            reply.headers.setdefault(name, value)


def _name(media: str, headers: CIMultiDict[str]) -> None:
    """Say what type it is, unless the handler did; a browser is to keep our CSV as a file."""
    if CONTENT_TYPE in headers:
        return
    headers[CONTENT_TYPE] = f"{media}; charset=utf-8" if media == CSV else media
    if media == CSV:
        headers.setdefault("Content-Disposition", 'attachment; filename="data.csv"')


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data
