"""Outgoing: what a `connect` gives for a WebSocket, and how each item of it becomes a message."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, cast

from .backend import aclose, aiterate
from .content import EventStream
from .errors import ServerError
from .sse import SSE, encode_json


def sent(value: Any) -> AsyncIterator[Any]:
    """The messages of what a `connect` returned; None has none.

    Raises `ServerError` for what gives no messages one by one.
    """
    if value is None:
        return aiterate(())
    if isinstance(value, EventStream):
        return aiterate(value.events)
    if isinstance(value, (AsyncIterable, Iterator)):
        return aiterate(cast("AsyncIterable[Any] | Iterable[Any]", value))
    message = f"connect returned {type(value).__name__}: expected messages one by one"
    raise ServerError(message)


async def awaited(call: Callable[[], Awaitable[Any]]) -> AsyncIterator[Any]:
    """The messages of a `connect` that is awaited for them."""
    source = sent(await call())
    try:
        async for item in source:
            yield item
    finally:
        await aclose(source)


def framed(item: Any) -> tuple[bytes, bool]:
    """An item's bytes, and whether they are text: bytes are none, all else is, as JSON if need be.

    An event is the JSON of what it says.
    """
    if isinstance(item, str):
        return item.encode(), True
    if isinstance(item, (bytes, bytearray)):
        return bytes(item), False
    if isinstance(item, SSE):
        told = {"event": item.event, "data": item.data, "id": item.id, "retry": item.retry}
        item = {name: value for name, value in told.items() if value is not None}
    return encode_json(item), True
