"""Session: requests to one provider over aiohttp's client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp

from harperpy import BackendError, BackendTimeout

from .openai_apart import apart
from .openai_exchange import Timeouts

_STALE = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class Answered:
    """An answer of aiohttp's."""

    def __init__(self, response: aiohttp.ClientResponse, idle: float) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._idle = idle

    async def read(self) -> bytes:
        """What has come since the last time."""
        with _as_ours():
            async with asyncio.timeout(self._idle):
                return await self._response.content.readany()

    def divert(self, sink: Callable[[bytes], bool], *, together: bool = False) -> None:
        """It is a task that reads here."""

    def close(self) -> None:
        """Not read to its end, a connection cannot be used again: closing it tells the provider."""
        self._response.close()


class Sent:
    """A request, and what it brings; `first_byte` and `idle` are the seconds that may take."""

    def __init__(
        self, asking: Coroutine[Any, Any, aiohttp.ClientResponse], first_byte: float, idle: float
    ) -> None:
        self._answered: Answered | None = None
        self.answer = self._answer(asking, first_byte, idle)

    async def _answer(
        self, asking: Coroutine[Any, Any, aiohttp.ClientResponse], first_byte: float, idle: float
    ) -> Answered:
        with _as_ours():
            async with asyncio.timeout(first_byte):
                response = await apart(asking)
        self._answered = answered = Answered(response, idle)
        return answered

    def finish(self) -> None:
        """Break off what has not come yet: nobody reads on for it."""
        self.close()

    def close(self) -> None:
        """Break off what has not come yet."""
        if self._answered is not None:
            self._answered.close()


class Session:
    """Sends requests; without `kept`, each over a connection of its own."""

    def __init__(
        self, base: str, headers: Mapping[str, str], timeouts: Timeouts, *, kept: bool = True
    ) -> None:
        self._base = base.rstrip("/")
        self._headers = headers
        self._timeouts = timeouts
        self._kept = kept
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._doubted = 0

    def send(
        self, path: str, body: bytes | None, first_byte: float | None, call_id: int | None
    ) -> Sent:
        """Post, or get what has no body."""
        times = self._timeouts
        return Sent(self._send(path, body, call_id), first_byte or times.total, times.idle)

    async def close(self) -> None:
        """Close the kept connections."""
        for session in self._sessions.values():
            await session.close()

    async def _send(
        self, path: str, body: bytes | None, call_id: int | None
    ) -> aiohttp.ClientResponse:
        used = SimpleNamespace(reused=False)
        anew = self._doubted > 0
        self._doubted -= anew
        named = {"X-Client-Request-Id": str(call_id)} if call_id is not None else None
        try:
            return await self._session(kept=not anew).request(
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

    def _session(self, *, kept: bool) -> aiohttp.ClientSession:
        """Made in the running loop, at first use."""
        if (known := self._sessions.get(kept)) is not None:
            return known
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            if kept and self._kept
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        times = self._timeouts
        self._sessions[kept] = aiohttp.ClientSession(
            headers=self._headers,
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=times.total, sock_connect=times.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
            # Whoever needs a proxy says so in the environment.
            trust_env=True,
        )
        return self._sessions[kept]


@contextmanager
def _as_ours() -> Generator[None]:
    """Aiohttp's failures as harperpy's."""
    try:
        yield
    except TimeoutError as error:
        late = BackendTimeout()
        late.retryable = isinstance(error, aiohttp.ConnectionTimeoutError)
        raise late from error
    except (aiohttp.ClientError, OSError) as error:
        failure = BackendError(f"{type(error).__name__}: {error}")
        failure.retryable = isinstance(error, aiohttp.ClientConnectorError)
        raise failure from error


async def _note_reuse(_: Any, context: SimpleNamespace, __: Any) -> None:
    context.trace_request_ctx.reused = True
