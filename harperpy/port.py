"""Port: what all connections of one port have in common."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus

from multidict import CIMultiDict

from .caching import vary
from .context import Context
from .deadlines import AllWaits
from .delivery import Delivery
from .dispatch import Dispatch
from .meter import Meter
from .names import CONTENT_TYPE, REQUEST_ID
from .negotiation import EVENTS, JSON
from .rendering import Reply
from .sections import HttpConfig
from .sse import encode_json

SERVER = "harperpy"
# What a connection may hold for a slow reader before its producer has to wait.
UNSENT_BYTES = 64 * 1024
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ZERO = re.compile(r"\s*q=0(\.0*)?\s*")
_GZIP = zlib.MAX_WBITS | 16
# More than this is compressed where it keeps nobody waiting.
_MUCH = 64 * 1024

logger = logging.getLogger("harperpy.wire")


class Port:
    """A dispatch, how it is reached, and who counts. `trusted` marks the local socket."""

    def __init__(
        self,
        dispatch: Dispatch,
        http: HttpConfig,
        *,
        trusted: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self.dispatch = dispatch
        self.http = http
        self.packs = http.compression_threshold > 0
        """Whether large answers are made smaller."""
        self.trusted = trusted
        self.meter = meter
        self.answered: Callable[[Context, int, int, int], None] = (
            _uncounted if meter is None else meter.answered
        )
        """Counts a whole answer: its status, and the bytes of both bodies."""
        self.silences = AllWaits()
        """Look after streams that say nothing for long."""
        self._prefix = new_id("req_")
        self._count = itertools.count(1)

    def request_id(self, headers: Mapping[str, str]) -> str:
        """The client's own id of a request, else one of ours."""
        return client_id(headers) or self.next_id()

    def next_id(self) -> str:
        """An id of ours."""
        return f"{self._prefix}{next(self._count)}"

    def streamed(self, context: Context, delivery: Delivery, received: int) -> None:
        """Count a streamed answer that has come to its end."""
        if self.meter is not None:
            self.meter.answered(context, delivery.status, delivery.sent, received, delivery.begun)
            ms = (time.perf_counter() - delivery.begun) * 1000
            self.meter.transferred(context.app, context.method, ms)

    def lost(self, context: Context) -> None:
        """Count an answer that its client did not wait for."""
        if self.meter is not None:
            self.meter.lost(context.app, context.method)

    async def pack(self, reply: Reply, context: Context) -> None:
        """Make a whole answer smaller where that is wanted, and its client takes it."""
        threshold, headers, body = self.http.compression_threshold, reply.headers, reply.body
        if not self.packs or not isinstance(body, bytes) or len(body) <= threshold:
            return
        if "Content-Encoding" in headers or headers.get(CONTENT_TYPE) == EVENTS:
            return
        vary(headers, "Accept-Encoding")
        if _takes_gzip(context.headers.get("accept-encoding", "")):
            headers["Content-Encoding"] = "gzip"
            large = len(body) > _MUCH
            packed = partial(zlib.compress, body, wbits=_GZIP)
            reply.body = await asyncio.to_thread(packed) if large else packed()


def client_id(headers: Mapping[str, str]) -> str:
    """The client's own id of a request; empty where it gives none that can be told."""
    told = headers.get(REQUEST_ID)
    return told if told is not None and _CLIENT_ID.fullmatch(told) else ""


def _uncounted(*_: object) -> None:
    """Nobody wants to know."""


def new_id(kind: str) -> str:
    """An id that nobody else makes."""
    return f"{kind}{secrets.token_hex(6)}"


def refusal(
    status: int, level: int, reason: BaseException | str | None
) -> tuple[CIMultiDict[str], bytes]:
    """Headers and body of a refusal that no resource can word, noted in the log."""
    refused = new_id("req_")
    error = reason if isinstance(reason, BaseException) else None
    logger.log(
        level,
        "%s answered %d before it was a request: %s",
        refused,
        status,
        reason if error is None else type(error).__name__,
        exc_info=error if status >= 500 else None,
    )
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    headers = CIMultiDict({"Content-Type": JSON, "Server": SERVER, "x-request-id": refused})
    return headers, encode_json({**body, "request_id": refused})


def _takes_gzip(accept_encoding: str) -> bool:
    """Whether a client asks for gzip by name, and not with a quality of 0."""
    wanted = (part.partition(";") for part in accept_encoding.lower().split(","))
    return any(
        name.strip() == "gzip" and not _ZERO.fullmatch(quality) for name, _, quality in wanted
    )
