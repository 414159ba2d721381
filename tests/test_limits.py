"""Limits: requests at once, time, and what a slow reader costs."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from harperpy import (
    Body,
    ClientError,
    Context,
    EventStream,
    HarperError,
    RequestTarget,
    Resource,
    Response,
    define_backend,
    get_context,
    json_response,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import HELLO, ask, events, operation

SECONDS = 20


def limited(count: int, wait: str = "0") -> str:
    """A config.yaml with room for so many requests at once."""
    return f"{ECHO}\nhttp: {{maxConcurrentRequests: {count}, requestQueueLimit: {wait}}}"


class Gate:
    """A public resource whose post stays until it is let go, and tells how many are in it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside: list[str] = []
        self.entered = asyncio.Event()
        gate = self

        class Gated(Resource):
            public = True
            sub_paths = True

            @staticmethod
            def get() -> str:
                return "got"

            @staticmethod
            async def post(target: RequestTarget) -> str:
                gate.inside.append(target.id or "")
                gate.entered.set()
                await gate.open.wait()
                return "posted"

            put = patch = delete = query = post

            @staticmethod
            def present_error(error: HarperError, context: Context) -> Response:
                told = {"mine": error.public_message, "code": error.code}
                return json_response(error.status, told, error.headers)

        self.resource = Gated

    async def occupied(self, server: RunningServer, path: str = "/gate/first") -> Any:
        """A post that is inside."""
        self.entered.clear()
        call = asyncio.create_task(ask(server, "POST", path))
        await self.entered.wait()
        return call


async def turns(server: RunningServer) -> None:
    """Let the server do what it can: several whole requests come and go."""
    for _ in range(5):
        assert 200 == (await ask(server, "GET", "/gate")).status


# --- requests at once


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "QUERY"])
async def test_a_request_too_many_is_503_in_the_mounts_own_shape(method: str) -> None:
    """It says when to come again; those that change nothing always have room."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(1), resources={"gate": gate.resource}) as server,
    ):
        first = await gate.occupied(server)
        refused = await ask(server, method, "/gate/second")
        for safe in ("GET", "HEAD", "OPTIONS"):
            assert (await ask(server, safe, "/gate")).status in (200, 204)
        gate.open.set()

        assert (503, "1") == (refused.status, refused.headers["Retry-After"])
        assert refused.json == {
            "mine": "The service is not available at the moment; try again later.",
            "code": "too_many_requests_at_once",
        }
        assert 200 == (await first).status
        assert 200 == (await ask(server, method, "/gate/third")).status
        assert ["first", "third"] == gate.inside


async def test_a_request_waits_for_its_turn() -> None:
    """It is called as soon as a place is free, within `http.requestQueueLimit`."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(1, "20s"), resources={"gate": gate.resource}) as server,
    ):
        first = await gate.occupied(server)
        second = asyncio.create_task(ask(server, "POST", "/gate/second"))
        await turns(server)
        assert ["first"] == gate.inside
        gate.open.set()

        assert [200, 200] == [(await first).status, (await second).status]
        assert ["first", "second"] == gate.inside


async def test_a_request_does_not_wait_longer_than_it_is_told_to() -> None:
    """After `http.requestQueueLimit` it is refused, although the place is still taken."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(1, "20ms"), resources={"gate": gate.resource}) as server,
    ):
        first = await gate.occupied(server)
        assert 503 == (await ask(server, "POST", "/gate/second")).status
        gate.open.set()
        assert 200 == (await first).status


async def test_as_many_as_are_allowed_run_at_once() -> None:
    """The limit is a number of requests, not one."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(3), resources={"gate": gate.resource}) as server,
    ):
        calls = [await gate.occupied(server, f"/gate/{name}") for name in "abc"]
        assert 503 == (await ask(server, "POST", "/gate/d")).status
        gate.open.set()
        assert [200] * 3 == [answer.status for answer in await asyncio.gather(*calls)]


@pytest.mark.parametrize("how", ["while it waits", "while it runs"])
async def test_who_leaves_takes_no_place(how: str) -> None:
    """The next one gets in, whether the other waited or was inside."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(1, "20s"), resources={"gate": gate.resource}) as server,
    ):
        first = await gate.occupied(server)
        leaving = first
        if how == "while it waits":
            leaving = asyncio.create_task(ask(server, "POST", "/gate/leaving"))
            await turns(server)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        gate.open.set()

        assert 200 == (await ask(server, "POST", "/gate/next")).status
        assert ["first", "next"] == gate.inside


@pytest.mark.parametrize("wait", [60.0, 0.0], ids=["after an item", "before any"])
async def test_a_stream_counts_only_until_its_head(wait: float) -> None:
    """As long as it may go on, others have the place, even while its first item is awaited."""
    gate = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        if wait:
            yield "a"
        await gate.wait()
        yield "b"

    class Stream(Resource):
        public = True
        first_item_wait = wait

        @staticmethod
        def post() -> EventStream:
            return EventStream(items())

    async with (
        asyncio.timeout(SECONDS),
        running(limited(1), resources={"it": Stream}) as server,
        server.session() as client,
    ):
        streams = [await client.post("/it") for _ in range(3)]
        assert [200] * 3 == [stream.status for stream in streams]
        gate.set()
        for stream in streams:
            assert ("data: b\n\n") in await stream.text()


async def test_a_failure_gives_its_place_back() -> None:
    """Whatever ends a request, and however often."""

    class Failing(Resource):
        public = True

        @staticmethod
        def post(target: RequestTarget, data: Body, context: Context) -> Any:
            del data
            if target.get("x"):
                raise ClientError
            raise RuntimeError(context.path)

    async with running(limited(1), resources={"it": Failing}) as server:
        found = [
            (await ask(server, "POST", path)).status
            for path in ("/it", "/it?x=1", "/none", "/it", "/it?x=1", "/v1/none", "/it")
        ]

    assert [500, 400, 404, 500, 400, 404, 500] == found


async def test_the_gateway_words_its_503_and_the_operations_port_knows_none() -> None:
    """OpenAI clients read their envelope and try again; an operator gets in at any time."""
    gate = Gate()
    async with (
        asyncio.timeout(SECONDS),
        running(limited(1), resources={"gate": gate.resource}) as server,
    ):
        first = await gate.occupied(server)
        refused = await ask(server, "POST", "/v1/chat/completions", json=HELLO)
        status, _ = await operation(
            server, {"operation": "list_api_keys"}, f"Bearer {server.api_key}"
        )
        gate.open.set()
        await first

    assert (503, "1") == (refused.status, refused.headers["Retry-After"])
    assert ("server_error", "too_many_requests_at_once") == tuple(
        refused.json["error"][field] for field in ("type", "code")
    )
    assert 200 == status


# --- time


async def forever() -> None:
    """Takes too long."""
    await asyncio.Event().wait()


def slow(make: Callable[..., Any], **attributes: Any) -> type[Resource]:
    """A public resource whose get is this."""
    return type("Slow", (Resource,), {"get": staticmethod(make), "public": True, **attributes})


@pytest.mark.parametrize(
    ("limit", "own"), [("20", None), ("20s", 0.02)], ids=["http.timeout", "the class's own"]
)
async def test_a_verb_that_takes_too_long_is_504(
    limit: str, own: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled, its signal fires, and the caller is told in the mount's shape."""
    contexts: list[Context] = []

    async def get() -> None:
        contexts.append(get_context())
        await forever()

    config = f"http: {{timeout: {limit}}}"
    async with (
        asyncio.timeout(SECONDS),
        running(config, resources={"it": slow(get, time_limit=own)}) as server,
    ):
        answer = await ask(server, "GET", "/it")

    assert (504, "timeout") == (answer.status, answer.json["code"])
    assert "The answer took longer than this server allows." == answer.json["detail"]
    assert contexts[0].signal is not None
    assert "timeout" == contexts[0].signal.reason
    assert "a verb of Slow took more than 0.02 s" in caplog.text


async def test_each_verb_has_its_own_time() -> None:
    """One after another, many at once, beside those that end in time: each is ended by itself."""

    async def get(target: RequestTarget) -> str:
        if target.get("quick"):
            return "done"
        await forever()
        return "never"

    config = f"{ECHO}\nhttp: {{timeout: 20}}"
    async with (
        asyncio.timeout(SECONDS),
        running(config, resources={"it": slow(get), "own": slow(get, time_limit=0.03)}) as server,
    ):
        for _ in range(3):
            paths = ["/it", "/it?quick=1", "/own", "/it", "/own?quick=1"]
            found = await asyncio.gather(*(ask(server, "GET", path) for path in paths))
            assert [504, 200, 504, 504, 200] == [answer.status for answer in found]
        assert 504 == (await ask(server, "GET", "/it")).status


async def test_a_client_that_leaves_ends_a_verb_as_before() -> None:
    """The limit is no obstacle to a cancellation that comes from elsewhere."""
    gate, seen = asyncio.Event(), asyncio.Event()

    async def get() -> None:
        gate.set()
        try:
            await forever()
        except asyncio.CancelledError:
            seen.set()
            raise

    async with asyncio.timeout(SECONDS), running(resources={"it": slow(get)}) as server:
        call = asyncio.create_task(ask(server, "GET", "/it"))
        await gate.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await seen.wait()


async def test_a_timeout_of_a_verbs_own_is_its_own_failure() -> None:
    """Only the server's limit is a 504."""

    async def get() -> None:
        raise TimeoutError

    async with running(resources={"it": slow(get)}) as server:
        assert 500 == (await ask(server, "GET", "/it")).status


async def later(seconds: float) -> None:
    """Outlast a limit by the loop's clock."""
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, passed.set)
    await passed.wait()


@pytest.mark.parametrize("when", ["before the first item", "after it"])
@pytest.mark.parametrize("wrap", [EventStream, lambda items: items], ids=["events", "json"])
async def test_no_time_limit_ever_applies_to_a_stream(when: str, wrap: Any) -> None:
    """It may take as long as it likes for its first item and for any other."""

    async def items() -> AsyncIterator[str]:
        if when == "after it":
            yield "a"
        await later(0.1)
        yield "b"

    config = f"{ECHO}\nhttp: {{timeout: 20}}"
    async with (
        asyncio.timeout(SECONDS),
        running(config, resources={"it": slow(lambda: wrap(items()))}) as server,
    ):
        answer = await ask(server, "GET", "/it")

    assert 200 == answer.status
    assert "b" in answer.text
    assert "error" not in answer.text


@pytest.mark.parametrize("own", [0.0, None])
async def test_a_class_may_take_its_time(own: float | None) -> None:
    """`time_limit = 0` is none at all, and neither is `http.timeout: 0`."""

    async def get() -> str:
        await later(0.1)
        return "done"

    config = f"{ECHO}\nhttp: {{timeout: {20 if own == 0 else 0}}}"
    async with running(config, resources={"it": slow(get, time_limit=own)}) as server:
        assert 200 == (await ask(server, "GET", "/it")).status


async def test_the_gateway_leaves_time_to_its_models() -> None:
    """`http.timeout` cuts no chat short: each model has its own `requestTimeoutMs`."""
    config = f"{ECHO}\nhttp: {{timeout: 20}}"

    def apply(scope: Any) -> None:
        async def answer(_: Any) -> AsyncIterator[str]:
            await later(0.1)
            yield "thought"

        backend = define_backend("thinker", generate_stream=answer)
        scope.models.register_backend("generative", "thinker", backend)

    body = {**HELLO, "model": "thinker"}
    async with running(config, handle_application=apply) as server:
        whole = await ask(server, "POST", "/v1/chat/completions", json=body)
        stream = await ask(server, "POST", "/v1/chat/completions", json={**body, "stream": True})

    assert "thought" == whole.json["choices"][0]["message"]["content"]
    assert "[DONE]" == events(stream.text)[-1]


# --- slow readers


@pytest.mark.parametrize("kind", ["events", "raw"])
async def test_a_reader_that_stalls_pauses_the_producer(kind: str) -> None:
    """No more is made than the buffers on the way hold; it goes on when the reader does."""
    size, made = 64 * 1024, [0]

    async def items() -> AsyncIterator[str]:
        for _ in range(2000):
            made[0] += 1
            yield "x" * size

    def get() -> Any:
        return EventStream(items()) if kind == "events" else Response(200, body=items())

    mounts = {"it": slow(get), "gate": Gate().resource}
    async with asyncio.timeout(SECONDS), running(resources=mounts) as server:
        reader, writer = await asyncio.open_connection(sock=small(server))
        writer.write(b"GET /it HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != made[0]:
            before = made[0]
            await turns(server)
        assert before * size < 16 * 1024 * 1024

        while made[0] == before:
            assert await reader.read(size)
        writer.close()
        await writer.wait_closed()


def small(server: RunningServer) -> socket.socket:
    """A connection whose own buffer is small."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", server.server.http_port))
    made.setblocking(False)  # noqa: FBT003
    return made
