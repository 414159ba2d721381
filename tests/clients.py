"""What the suites of real clients share: a gateway and its provider, live in a thread of their own.

Clients that block can so be called as their users call them.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import openai
import pytest

from gateway import gateway
from harperpy.testing import RunningServer, ScriptedUpstream
from llama import weights
from provider import provider_upstream

Answer = TypeVar("Answer")

MODEL, EMBEDDING, SLOW = "gpt-4o-mini", "text-embedding-3-small", "slow"
HELLO: Any = [{"role": "user", "content": "hello"}]

CONFIG = """
models:
  generative:
    default: {{backend: openai, model: gpt-4o-mini, {target}, maxRetries: 0}}
    slow: {{backend: openai, model: slow, {target}, maxRetries: 0{limit}}}
    echo: {echo}
  embedding:
    default: {{backend: openai, model: text-embedding-3-small, {target}, maxRetries: 0}}
    echo: {echo}
"""
LOCAL = "models: {generative: {default: {backend: local}}, embedding: {default: {backend: local}}}"

# A status, what makes the provider fail so, and the code that the client is told.
FAILURES = [
    (400, "fail 400", "failed_400"),
    (404, "fail 404", "failed_404"),
    (409, "fail 409", "failed_409"),
    (413, "fail 413", "failed_413"),
    (422, "fail 422", "failed_422"),
    (429, "fail 429", "failed_429"),
    (500, "fail 500", None),
    (502, "fail 502", None),
    (503, "fail 503", None),
    (502, "fail 401", "upstream_auth_error"),
]

# What OpenAI's client, and all on it, raises for a status.
ERRORS: Any = {
    400: openai.BadRequestError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    413: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
}


def asking(text: str) -> Any:
    """A conversation that is this one question."""
    return [{"role": "user", "content": text}]


def call(name: str, arguments: str, identity: str = "call_0") -> dict[str, Any]:
    """A tool call as the wire has it."""
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


@dataclass(frozen=True)
class Live:
    """A running gateway, the provider behind it, and the loop both live in."""

    server: RunningServer
    upstream: ScriptedUpstream
    loop: asyncio.AbstractEventLoop
    lister_key: str

    @property
    def base_url(self) -> str:
        """What a client is pointed at."""
        return f"{self.server.url}/v1"

    @property
    def api_key(self) -> str:
        """The super user's key."""
        return self.server.api_key

    @property
    def sent(self) -> Any:
        """The body that reached the provider last."""
        return self.upstream.requests[-1].body

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """What a coroutine answers that belongs to the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def until_left(self) -> None:
        """Return once the provider has seen its client leave before the end of an answer.

        The caller's loop goes on meanwhile: a client may need it to take its leave.
        """
        await self._until(self.upstream.left)

    async def until_asked(self) -> None:
        """Return once a request has reached the provider."""
        await self._until(self.upstream.asked)

    async def _until(self, event: asyncio.Event) -> None:
        waiting = asyncio.run_coroutine_threadsafe(_bounded(event), self.loop)
        await asyncio.wrap_future(waiting)

    def forget(self) -> None:
        """The provider's memory of earlier tests is gone."""
        self.run(_forgotten(self.upstream))


async def _bounded(event: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        await event.wait()


async def _forgotten(upstream: ScriptedUpstream) -> None:
    upstream.requests.clear()
    upstream.asked.clear()
    upstream.left.clear()


@asynccontextmanager
async def gateways() -> AsyncGenerator[dict[str, Live]]:
    """A gateway in front of the provider (`direct`), and one in front of that one (`chain`)."""
    async with provider_upstream() as upstream:
        target = f'baseUrl: "{upstream.url}"'
        limit, echo = ", firstByteTimeoutMs: 300", "{backend: echo}"
        async with gateway(CONFIG.format(target=target, limit=limit, echo=echo)) as first:
            target = f'baseUrl: "{first.url}/v1", apiKey: {first.api_key}'
            echo = f"{{backend: openai, model: echo, {target}}}"
            async with gateway(CONFIG.format(target=target, limit="", echo=echo)) as second:
                yield {
                    "direct": await _live(first, upstream),
                    "chain": await _live(second, upstream),
                }


@asynccontextmanager
async def local_gateway() -> AsyncGenerator[Live]:
    """A gateway whose models are the local ones, on their real weights."""
    async with gateway(LOCAL) as server, provider_upstream() as upstream:
        yield await _live(server, upstream)


async def _live(server: RunningServer, upstream: ScriptedUpstream) -> Live:
    permission = {"resources": {"v1/models": ["read"]}}
    await server.operate("add_role", role="lister", permission=permission)
    key = await server.key_for("ada", role="lister")
    return Live(server, upstream, asyncio.get_running_loop(), key)


@contextmanager
def in_a_thread(make: Callable[[], Any]) -> Generator[Any]:
    """What an asynchronous context manager gives, living in a loop of a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()
    manager = make()
    try:
        value = asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result(60)
        try:
            yield value
        finally:
            leaving = manager.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(leaving, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def live_gateways() -> Generator[dict[str, Live]]:
    """`gateways` in a thread of their own."""
    with in_a_thread(gateways) as lives:
        yield lives


@contextmanager
def live_local_gateway() -> Generator[Live]:
    """`local_gateway` in a thread of its own, its weights fetched."""
    weights()
    with in_a_thread(local_gateway) as live:
        yield live


async def settled(value: Any) -> Any:
    """What a call answers, of a client that blocks or of one that is awaited."""
    return await value if inspect.isawaitable(value) else value


async def each(source: Any) -> AsyncIterator[Any]:
    """The items of an iterator of either kind."""
    if hasattr(source, "__aiter__"):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


@asynccontextmanager
async def entered(manager: Any) -> AsyncGenerator[Any]:
    """A context manager of either kind."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def at_once(work: Callable[[int], Any], times: int = 20) -> list[Any]:
    """The answers of many calls that run at the same time, in threads where they block."""
    if inspect.iscoroutinefunction(work):
        return await asyncio.gather(*(work(at) for at in range(times)))
    return await asyncio.gather(*(asyncio.to_thread(work, at) for at in range(times)))


async def until_it_raises(
    error: type[Exception] | tuple[type[Exception], ...], source: AsyncIterator[Any]
) -> list[Any]:
    """What came of a stream before it failed with such an error, as it must."""
    got: list[Any] = []
    with pytest.raises(error):
        await _gather(source, got)
    return got


async def _gather(source: AsyncIterator[Any], got: list[Any]) -> None:
    async for item in source:
        got.append(item)  # noqa: PERF401
