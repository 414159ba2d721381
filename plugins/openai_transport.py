"""Pooled HTTP to a provider that speaks OpenAI's protocol; its failures as harperpy's errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import msgspec

from harperpy import BackendError, BackendTimeout, GenerateChunk, SSEDecoder

from .openai_answers import ChunkReader
from .openai_refusals import refusal

T = TypeVar("T")

_MOST_ANSWER = 256 << 20
_MOST_ERROR = 256 << 10
_STALE = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `first_byte` counts to the answer's head, `idle` between two reads of it.

    An answer that is not streamed begins when it is done: without `first_byte` it has `total`.
    """

    total: float
    connect: float
    first_byte: float | None
    stream_first_byte: float
    idle: float


class Transport:
    """One provider's pool of connections. `pooled=False` closes each after its answer."""

    def __init__(
        self,
        base: str,
        *,
        secret: str | None,
        timeouts: Timeouts,
        headers: dict[str, str] | None = None,
        pooled: bool = True,
    ) -> None:
        self._base = base.rstrip("/")
        self._secret = secret
        self._timeouts = timeouts
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if secret:
            self._headers["Authorization"] = f"Bearer {secret}"
        self._pooled = pooled
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._doubted = 0

    async def whole(self, path: str, body: bytes, kind: type[T], call_id: int | None = None) -> T:
        """The JSON answer to a post, as `kind`. Raises `BackendError` and what `refusal` makes."""
        first_byte = self._timeouts.first_byte or self._timeouts.total
        async with self._ask(path, body, first_byte, call_id) as response:
            return _decoded(await self._read_all(response, _MOST_ANSWER), kind, path)

    async def get(self, path: str, kind: type[T], *, most: int) -> T:
        """The JSON answer to a get, of at most so many bytes. Raises as `whole`."""
        first_byte = self._timeouts.first_byte or self._timeouts.total
        async with self._ask(path, None, first_byte) as response:
            return _decoded(await self._read_all(response, most), kind, path)

    async def chunks(
        self, path: str, body: bytes, n: int | None = None, call_id: int | None = None
    ) -> AsyncGenerator[GenerateChunk]:
        """The chunks of `n` streamed answers. Raises `BackendError` for one that is cut off."""
        reader = ChunkReader(n)
        events = self._events(path, body, reader, call_id)
        try:
            async with aclosing(events):
                async for data in events:
                    for chunk in reader.read(data):
                        yield chunk
        except BackendError:
            # What breaks off after the answer's end takes nothing from it.
            if not reader.is_complete:
                raise
        for chunk in reader.finish():
            yield chunk

    async def _events(
        self, path: str, body: bytes, reader: ChunkReader, call_id: int | None
    ) -> AsyncGenerator[str]:
        events = SSEDecoder()
        first_byte = self._timeouts.stream_first_byte
        async with self._ask(path, body, first_byte, call_id) as response:
            while not reader.ended and (read := await self._read(response)):
                for data in events.feed(read):
                    yield data
            for data in events.end():
                yield data

    async def close(self) -> None:
        """Close the pooled connections."""
        for session in self._sessions.values():
            await session.close()

    @asynccontextmanager
    async def _ask(
        self, path: str, body: bytes | None, first_byte: float, call_id: int | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A good answer's head, and its body to be read. Raises what `refusal` makes of others."""
        try:
            async with asyncio.timeout(first_byte):
                response = await self._send(path, body, call_id)
            try:
                if response.status != 200:
                    told = await self._read_all(response, _MOST_ERROR)
                    raise refusal(response.status, told, response.headers, self._secret)
                yield response
            finally:
                # Not read to its end, it cannot be used again: closing it tells the provider.
                response.close()
        except TimeoutError as error:
            late = BackendTimeout()
            late.retryable = isinstance(error, aiohttp.ConnectionTimeoutError)
            raise late from error
        except (aiohttp.ClientError, OSError) as error:
            failure = BackendError(f"{type(error).__name__}: {error}")
            failure.retryable = isinstance(error, aiohttp.ClientConnectorError)
            raise failure from error

    async def _send(
        self, path: str, body: bytes | None, call_id: int | None
    ) -> aiohttp.ClientResponse:
        """Post, or get what has no body. A pooled connection that is gone is one attempt.

        Whether the provider had read the request nobody knows: the next one is another attempt,
        with a row of its own, and on a connection of its own.
        """
        used = SimpleNamespace(reused=False)
        anew = self._doubted > 0
        self._doubted -= anew
        named = {"X-Client-Request-Id": str(call_id)} if call_id is not None else None
        try:
            return await self._session(pooled=not anew).request(
                "GET" if body is None else "POST",
                self._base + path,
                data=body,
                headers=named,
                allow_redirects=False,
                trace_request_ctx=used,
            )
        except _STALE as error:
            if not used.reused:
                raise
            self._doubted += 1
            gone = BackendError(f"{type(error).__name__}: {error}")
            gone.stale = True
            raise gone from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        async with asyncio.timeout(self._timeouts.idle):
            return await response.content.readany()

    async def _read_all(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while read := await self._read(response):
            size += len(read)
            if size > most:
                message = f"an answer of more than {most} bytes"
                raise BackendError(message)
            parts.append(read)
        return b"".join(parts)

    def _session(self, *, pooled: bool) -> aiohttp.ClientSession:
        """Made in the running loop, at first use."""
        if (known := self._sessions.get(pooled)) is not None:
            return known
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            if pooled and self._pooled
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        times = self._timeouts
        self._sessions[pooled] = aiohttp.ClientSession(
            headers=self._headers,
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=times.total, sock_connect=times.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            trace_configs=[trace],
        )
        return self._sessions[pooled]


def _decoded(data: bytes, kind: type[T], path: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"the answer from {path} is not what it should be"
        raise BackendError(message) from error


async def _note_reuse(_: Any, context: SimpleNamespace, __: Any) -> None:
    context.trace_request_ctx.reused = True
