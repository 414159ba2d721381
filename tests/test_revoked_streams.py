"""Streams end when those who read them may not any more."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jwt
import pytest

from harperpy import Context, EventStream, RequestTarget, Resource
from harperpy.testing import ECHO, RunningServer, running
from helpers import basic, operation

pytestmark = pytest.mark.usefixtures("way")

LENT = {"resources": {"*": ["read"]}}


class Feed(Resource):
    """Events as long as somebody reads them, which says how it ended."""

    keepalive = 0.02
    first_item_wait = 0.0
    begun: asyncio.Queue[str]
    ended: asyncio.Queue[tuple[str, str | None]]

    @classmethod
    def connect(cls, target: RequestTarget, _: object, context: Context) -> EventStream:
        """Silent from the beginning, silent after one, or never silent."""
        return EventStream(cls.events(target.get("which"), context))

    @classmethod
    async def events(cls, which: str | None, context: Context) -> AsyncIterator[str]:
        """The events."""
        name = "" if context.user is None else context.user.username
        cls.begun.put_nowait(name)
        try:
            if which != "none":
                yield "one"
            while which == "many":
                yield "more"
                await asyncio.sleep(0.001)
            await asyncio.Event().wait()
        finally:
            cls.ended.put_nowait((name, context.signal.reason))


class Items(Resource):
    """Items without an end, in the type that is asked for."""

    keepalive = 0.02

    @staticmethod
    async def get() -> AsyncIterator[dict[str, int]]:
        """One, and never another."""
        yield {"at": 1}
        await asyncio.Event().wait()

    query = get


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    """A server with the feed, and somebody who may read it."""
    Feed.begun, Feed.ended = asyncio.Queue(), asyncio.Queue()
    async with running(ECHO, resources={"feed": Feed, "items": Items}) as server:
        await server.operate("add_role", role="reader", permission=LENT)
        await server.operate("add_user", username="ada", password="pw", role="reader")
        yield server


async def heard(server: RunningServer, credential: str, which: str) -> str:
    """All that a reader gets until the end."""
    headers = {"Authorization": credential, "Accept": "text/event-stream"}
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.get(f"{server.url}/feed?which={which}") as response,
    ):
        assert 200 == response.status
        try:
            return await response.text()
        except aiohttp.ClientPayloadError:
            return "cut off"


WAYS: dict[str, dict[str, Any]] = {
    "the key is dropped": {"operation": "drop_api_key"},
    "the user is dropped": {"operation": "drop_user", "username": "ada"},
    "the user is inactive": {"operation": "alter_user", "username": "ada", "active": False},
    "the role has lost it": {"operation": "alter_role", "id": "reader", "permission": {}},
}


@pytest.mark.parametrize("which", ["none", "one", "many"])
@pytest.mark.parametrize("way", WAYS)
async def test_who_may_not_go_on_hears_no_more(server: RunningServer, way: str, which: str) -> None:
    """Soon, however much they hear; others go on, and the generator is told."""
    made = await server.operate("add_api_key", name="k", username="ada")
    other = await server.key_for("eve", "super_user")
    async with asyncio.timeout(30):
        goes_on = asyncio.create_task(heard(server, f"Bearer {other}", which))
        stops = asyncio.create_task(heard(server, f"Bearer {made['api_key']}", which))
        assert {"ada", "eve"} == {await Feed.begun.get(), await Feed.begun.get()}

        body = {**WAYS[way], **({"id": made["id"]} if "key" in way else {})}
        await server.operate(**body)

        said = await stops
        assert ("ada", "access_revoked") == await Feed.ended.get()
        assert not goes_on.done()
        goes_on.cancel()
        assert ("eve", "client_disconnected") == await Feed.ended.get()
    if which == "one":
        assert "data: one" in said
        assert '"code":"access_revoked"' in said
        assert '"status":403' in said


@pytest.mark.parametrize(
    ("method", "accept", "told"),
    [
        ("GET", "application/x-ndjson", '"error":"access_revoked"'),
        ("GET", "application/json", '"error":"access_revoked"'),
        ("GET", "application/yaml", "at: 1"),
        ("GET", "text/csv", "at"),
        ("QUERY", "application/x-ndjson", '"error":"access_revoked"'),
        ("QUERY", "text/event-stream", '"code":"access_revoked"'),
    ],
)
async def test_streams_of_other_types_end_as_well(
    server: RunningServer, method: str, accept: str, told: str
) -> None:
    """With a last item that says why, where the type has one, else broken off."""
    made = await server.operate("add_api_key", name="k", username="ada")
    headers = {"Authorization": f"Bearer {made['api_key']}", "Accept": accept}
    said = b""
    async with (
        asyncio.timeout(30),
        aiohttp.ClientSession(headers=headers) as client,
        client.request(method, f"{server.url}/items") as response,
    ):
        said += await response.content.readany()
        await server.operate("drop_api_key", id=made["id"])
        with contextlib.suppress(aiohttp.ClientPayloadError):
            while more := await response.content.readany():
                said += more

    assert told in said.decode()


async def test_a_stream_ends_with_its_token(server: RunningServer) -> None:
    """What was good for a second opens nothing for longer."""
    body = {"operation": "create_authentication_tokens", "expires_in": 1}
    _, tokens = await operation(server, body, basic("ada", "pw"))
    token = tokens["operation_token"]

    async with asyncio.timeout(30):
        said = await heard(server, f"Bearer {token}", "one")

    assert "access_revoked" in said
    assert time.time() >= jwt.decode(token, options={"verify_signature": False})["exp"]
