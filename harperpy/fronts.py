"""Fronts: what the connections of one port share that speak HTTP/1.1 in its common form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from email.utils import formatdate
from time import time
from typing import Any, Protocol, cast

from multidict import CIMultiDict

from .deadlines import Deadlines, Waiter, Waits
from .names import CONTENT_LENGTH
from .outbox import Outbox
from .port import SERVER, Port

_MOST_BODY_BYTES = 256 * 1024
# What has to be seen as it arrives is not for who waits until it has arrived.
_BODY_SECONDS = 1.0


class Shared(Waiter, Protocol):
    """A connection that they look after. It is idle `since` then."""

    def close(self) -> None:
        """End it when it has answered what it was asked, or has begun to be asked."""
        ...

    def cut(self) -> None:
        """End what it does now."""
        ...

    def abort(self) -> None:
        """End it at once."""
        ...


class Fronts:
    """The connections of one port that speak the common form.

    `hand_over` lets another protocol go on with a transport and what came over it.
    """

    def __init__(self, port: Port, hand_over: Callable[[Any, bytes], None]) -> None:
        self.port = port
        self.hand_over = hand_over
        self.all: set[Shared] = set()
        self.fresh: set[Shared] = set()
        self.idle = Waits(port.http.keep_alive_timeout_seconds)
        self.bodies = Deadlines(_BODY_SECONDS)
        self.outbox = Outbox()
        self.loop = asyncio.get_running_loop()
        self.context = copy_context()
        http = port.http
        self.brief = port.dispatch.brief and not port.packs
        self.most_head = http.max_header_size
        self.most_body = min(http.max_body_size, _MOST_BODY_BYTES)
        self._empty: asyncio.Event | None = None
        self._second = 0.0
        self._stamp = ""

    def close(self) -> None:
        """End what is idle, and the rest after its answer."""
        self.outbox.flush()
        for front in [*self.all]:
            front.close()

    async def shutdown(self, seconds: float | None) -> None:
        """As `close`; cut off what takes longer than so many seconds, wait for as long again."""
        self.close()
        await self._emptied(seconds)
        for front in [*self.all]:
            front.cut()
        await self._emptied(seconds)
        for front in [*self.all]:
            front.abort()

    def came(self, front: Shared) -> None:
        """A connection that has asked nothing yet."""
        self.all.add(front)
        self.fresh.add(front)
        self.idle.add(front)

    def left(self, front: Shared) -> None:
        """A connection that is ours no more."""
        self.all.discard(front)
        self.fresh.discard(front)
        self.idle.remove(front)
        self.bodies.remove(front)
        if not self.all and self._empty is not None:
            self._empty.set()

    async def _emptied(self, seconds: float | None) -> None:
        self._empty = asyncio.Event()
        if self.all:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    def stamp(self) -> str:
        """The end of a head: who answers, and when."""
        now = time()
        if not 0.0 <= now - self._second < 1.0:
            self._second = now // 1.0
            date = formatdate(self._second, usegmt=True)
            self._stamp = f"Server: {SERVER}\r\nDate: {date}\r\n\r\n"
        return self._stamp


def address(transport: asyncio.BaseTransport) -> str:
    """A client's address; none for a socket in a folder."""
    name = transport.get_extra_info("peername")
    return str(cast("tuple[object, ...]", name)[0]) if isinstance(name, tuple) else ""


def promised(headers: CIMultiDict[str]) -> int | None:
    """How many bytes a stream's headers promise; what of them promises no such number is removed.

    Raises `ValueError` for a number with thousands of digits.
    """
    told = headers.getall(CONTENT_LENGTH, ())
    if len(told) == 1 and told[0].isascii() and told[0].isdigit():
        return int(told[0])
    headers.popall(CONTENT_LENGTH, None)
    return None
