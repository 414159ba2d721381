"""Framing: how a stream of items, and what goes wrong in it, becomes bytes of a type."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from typing_extensions import Buffer  # its own module knows it since Python 3.12

from .backend import aclose
from .content import ResponseError
from .context import Context
from .errors import (
    Aborted,
    ClientError,
    HarperError,
    ServerError,
    ServiceUnavailable,
    logged,
)
from .negotiation import EVENTS, JSON
from .resource import Resource
from .signal import REVOKED, SHUTDOWN, AbortSignal, is_ending
from .sse import encode_json, encode_sse

logger = logging.getLogger("harperpy.dispatch")

END = object()
_LARGE = 64 * 1024
# Why the server itself ends what goes on.
_OURS = (SHUTDOWN, REVOKED)
# What an error of a client library holds: it tells of an answer that we got, not of one to give.
_OF_A_CALL = ("request", "request_info", "response", "url")


def as_harper_error(error: BaseException) -> HarperError:
    """The error itself, or in place of an unforeseen one a `ServerError` that tells nothing."""
    if isinstance(error, Aborted):
        # Who asked is still there: the server stops, or a handler's own signal fired.
        if str(error) in _OURS:
            return _ending(str(error))
        return ServerError(status=504, code=error.code)
    if isinstance(error, HarperError):
        return error
    status = _status_of(error)
    return ServerError() if status is None else HarperError(_text_of(error), status=status)


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _status_of(error: BaseException) -> int | None:
    """The status that an error of the application's own carries; no other is one to answer with."""
    if any(hasattr(error, name) for name in _OF_A_CALL):
        return None
    for name in ("status_code", "status"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status <= 599:
            return status
    return None


def log_error(error: BaseException) -> None:
    """One line for a refusal; a trace for what nobody foresaw."""
    if isinstance(error, ResponseError):
        logger.info("%s", error)
    elif not isinstance(error, HarperError) and _status_of(error) is None:
        logger.error("unhandled %s", type(error).__name__, exc_info=error)
    else:
        status = as_harper_error(error).status
        level = logging.WARNING if status >= 500 else logging.INFO
        logger.log(level, "%d %s", status, logged(error))


class Framing(msgspec.Struct):
    """How a stream's items, its frame and its failure become bytes."""

    item: Callable[[Any], bytes]
    failure: Callable[[HarperError], bytes] | None
    start: bytes = b""
    between: bytes = b""
    end: bytes = b""

    def failed(self, error: BaseException) -> bytes | None:
        """The in-band form of a failure; None where the format has none."""
        log_error(error)
        return None if self.failure is None else self.failure(as_harper_error(error))


class _OfEvents(Framing, kw_only=True):
    """That of events, whose failure is as the resource words it, or else in the default wording."""

    resource: type[Resource]
    context: Context

    def failed(self, error: BaseException) -> bytes:
        """As `Framing`, and there always is one."""
        log_error(error)
        refusal, resource, context = as_harper_error(error), self.resource, self.context
        try:
            return encode_sse(resource.present_stream_error(refusal, context))
        except Exception:
            logger.exception("present_stream_error of %s failed", resource.__name__)
            return encode_sse(Resource.present_stream_error(refusal, context))


def _as_it_is(item: str | Buffer) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(memoryview(item))


RAW = Framing(_as_it_is, None)
"""Text and bytes as they are."""


def framing_of(media: str, resource: type[Resource], context: Context) -> Framing:
    """The framing of a media type, its failures worded by the resource."""
    item = context.types.item_serializer(media)
    if media == EVENTS:
        return _OfEvents(item, None, resource=resource, context=context)
    if media.endswith("ndjson"):
        return Framing(item, lambda error: item({"$harperStreamError": _told(error)}))
    if media == JSON:
        return Framing(item, lambda error: encode_json({"error": _told(error)}), b"[", b",", b"]")
    return Framing(item, None)


def _told(error: HarperError) -> dict[str, Any]:
    code = error.code or type(error).__name__
    return {"error": code, "message": error.public_message, "status": error.status}


def exited() -> RuntimeError:
    """What takes the place of a `SystemExit`, which would end the server."""
    return RuntimeError("sys.exit() was called in a request")


async def frames(
    source: AsyncIterator[Any], data: bytes | None, framing: Framing, signal: AbortSignal | None
) -> AsyncIterator[bytes]:
    """The stream's bytes, `data` those of its first item; it closes the source as it ends."""
    written = False
    try:
        while data is not None:
            if data:
                lead = framing.between if written else framing.start
                written = True
                if lead and len(data) > _LARGE:
                    # Put before it, it would copy all of it.
                    yield lead
                    lead = b""
                # Bytes that are also something else would be copied even to nothing.
                yield lead + data if lead else data
            # The next may take long to come: nothing of this one is kept meanwhile.
            data = item = None
            try:
                item = await anext(source)
            except StopAsyncIteration:
                break
            except SystemExit as error:
                raise exited() from error
            data = framing.item(item)
        tail = framing.end
    except (Exception, asyncio.CancelledError) as error:  # worded as the last item
        if (told := _told_last(error, framing, signal)) is None:
            raise
        tail = (framing.between if written else framing.start) + told + framing.end
    finally:
        await aclose(source)
    if not written and tail == framing.end:
        tail = framing.start + tail
    if tail:
        yield tail


def _told_last(error: BaseException, framing: Framing, signal: AbortSignal | None) -> bytes | None:
    """What tells of a failure, None where it is to be raised: by whom, must not hold it then."""
    told = _reported(error, signal)
    return None if told is None else framing.failed(told)


def _reported(error: BaseException, signal: AbortSignal | None) -> BaseException | None:
    """What to tell of a failure: of a cancellation of the stream only that it was ours.

    None where it was not, as the client has left then. What it waits for may be cancelled, too.
    """
    if isinstance(error, Exception) or not is_ending():
        return error
    task, reason = asyncio.current_task(), None if signal is None else signal.reason
    if reason not in _OURS or task is None:
        return None
    task.uncancel()
    return _ending(reason)


def _ending(reason: str) -> HarperError:
    """What is told of an end that the server has made."""
    if reason == SHUTDOWN:
        return ServiceUnavailable(SHUTDOWN)
    message = "This user may not go on here."
    return ClientError(message, status=403, code=REVOKED)
