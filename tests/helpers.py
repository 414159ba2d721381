"""Small things several tests need."""

import asyncio
import base64
import fcntl
import gc
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import openai
from multidict import CIMultiDict

from harperpy import ModelCall
from harperpy.testing import RunningServer

PROVIDER = """
models:
  generative:
    default: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", maxRetries: 0{more}}}
  embedding:
    default: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", maxRetries: 0{more}}}
"""

HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}


def provider(url: str, more: str = "") -> str:
    """A config.yaml whose default models are an OpenAI-compatible provider at `url`."""
    return PROVIDER.format(url=url, more=f", {more}" if more else "")


def events(body: str) -> list[Any]:
    """The data of an event stream's events; JSON decoded."""
    data = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """OpenAI's error object of an answer, which holds nothing else."""
    body = await response.json()
    assert {"error"} == set(body)
    assert {"message", "type", "param", "code"} == set(body["error"])
    return body["error"]


class Answered(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.text)


async def ask(
    server: RunningServer, method: str, path: str, *, key: str | None = None, **options: Any
) -> Answered:
    """One request on a connection of its own; as super user unless a key (or `""`) is given."""
    async with server.session(key) as client, client.request(method, path, **options) as response:
        return Answered(response.status, response.headers, await response.text())


async def ask_raw(server: RunningServer, request: str) -> Answered:
    """What a server answers to these very bytes, as far as it goes: no client tidies them up."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        writer.write(request.encode("latin-1"))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.rstrip().split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        headers = CIMultiDict((name, value) for name, _, value in pairs)
        size = 0 if request.startswith("HEAD") else int(headers.get("content-length", 0))
        body = await reader.readexactly(size)
        writer.close()
        await writer.wait_closed()
    return Answered(int(status_line.split()[1]), headers, body.decode())


async def operation(
    server: RunningServer, body: Any, credential: str | None = None
) -> tuple[int, Any]:
    """What the operations port answers to a body, whose sender the `Authorization` header names."""
    headers = {} if credential is None else {"Authorization": credential}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.operations_url}/", json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


def basic(username: str, password: str) -> str:
    """The `Authorization` header of a name and a password."""
    return f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"


def openai_client(server: RunningServer, key: str | None = None) -> openai.AsyncOpenAI:
    """OpenAI's own client of a server, as super user unless a key is given; it asks once."""
    return openai.AsyncOpenAI(
        api_key=server.api_key if key is None else key,
        base_url=f"{server.url}/v1",
        max_retries=0,
    )


def finished_calls(server: RunningServer) -> asyncio.Queue[ModelCall]:
    """The model calls that finish from now on, as they do; their rows are on the way."""
    calls: asyncio.Queue[ModelCall] = asyncio.Queue()
    server.server.core.ledger.subscribe(calls.put_nowait)
    return calls


async def later(*items: Any) -> AsyncIterator[Any]:
    """The items, one a turn; an exception among them is raised."""
    for item in items:
        await asyncio.sleep(0)
        if isinstance(item, Exception):
            raise item
        yield item


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what tells nobody when it happens; half a minute at most."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file: what it made is there then."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def uncollected() -> Iterator[set[str]]:
    """The kinds of our own objects that were let go of meanwhile, and wait for the collector."""
    found: set[str] = set()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = {type(one) for one in gc.garbage}
        found |= {kind.__qualname__ for kind in kinds if kind.__module__.startswith("harperpy.")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def quiet_port() -> int:
    """A free port that stays so: the system gives none below 32768 to who asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
