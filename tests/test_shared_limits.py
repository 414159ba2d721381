"""Limits that several workers share: one budget, whoever of them takes of it, whoever dies."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from asking import children
from commands import ADMIN, Serving, serving
from harperpy.testing import Answer, ScriptedUpstream
from helpers import HELLO, basic, provider

ROOT = basic("root", "s3cret-enough")
CHAT = "/v1/chat/completions"
# What a chat is reckoned at for "hello" before its answer, and what the upstream counts.
ASKED, A_CALL = 21, 4
STORES = pytest.mark.parametrize("store", ["database", "valkey"], indirect=True)


def project(tmp_path: Path, url: str, *rules: str, store: str) -> Path:
    """A folder with two workers in front of an upstream."""
    ports = "http: {port: 0, host: 127.0.0.1, workers: 2}\noperationsApi: {network: {port: 0}}\n"
    listed = ", ".join(rules)
    (tmp_path / "config.yaml").write_text(
        f"{ports}{provider(url)}\nlimits: {{store: '{store}', rules: [{listed}]}}\n"
    )
    return tmp_path


async def chat(server: Serving, **more: Any) -> tuple[int, Any]:
    """A chat on a connection of its own, so by whichever worker takes it."""
    async with (
        aiohttp.ClientSession(server.url, headers={"Authorization": ROOT}) as session,
        session.post(CHAT, json={**HELLO, **more}) as response,
    ):
        return response.status, await response.json()


async def sql(server: Serving, statement: str) -> Any:
    """What a super user reads."""
    body = {"operation": "sql", "sql": statement}
    async with (
        aiohttp.ClientSession(headers={"Authorization": ROOT}) as session,
        session.post(server.operations_url, json=body) as response,
    ):
        return await response.json()


async def spent(server: Serving) -> int:
    """All tokens of all rows."""
    select = "SELECT prompt_tokens, completion_tokens FROM system.hdb_model_calls"
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in await sql(server, select))


@STORES
@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (f"{{per: user, budget: {{tokens: {10 * A_CALL}}}}}", 10),
        ("{per: user, requestsPerMinute: 10}", 10),
    ],
    ids=["budget", "rate"],
)
async def test_two_workers_share_what_there_is(
    upstream: ScriptedUpstream, tmp_path: Path, store: str, rule: str, most: int
) -> None:
    """Fifty at once, on any of them: together they take no more than one alone might."""
    folder = project(tmp_path, upstream.url, rule, store=store)
    async with serving(folder, "run", environ=ADMIN) as server:
        assert 2 == len(children(server.process.pid))
        answers = await asyncio.gather(*(chat(server, max_tokens=1) for _ in range(50)))

        assert {200, 429} == {status for status, _ in answers}
        assert await spent(server) <= most * A_CALL
        assert len(upstream.requests) <= most
        if "requests" in rule:
            assert most == len(upstream.requests)


@STORES
async def test_a_place_is_one_of_all_workers(
    upstream: ScriptedUpstream, tmp_path: Path, store: str
) -> None:
    """Who is answered by one of them is too many for the other."""
    rule = "{per: user, concurrent: 1}"
    folder = project(tmp_path, upstream.url, rule, store=store)
    async with serving(folder, "run", environ=ADMIN) as server:
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(chat(server))
        await upstream.asked.wait()
        answers = await asyncio.gather(*(chat(server) for _ in range(8)))
        assert {429} == {status for status, _ in answers}
        waiting.cancel()
        await upstream.left.wait()
        async with asyncio.timeout(10):
            while 200 != (await chat(server))[0]:
                pass


@STORES
async def test_what_a_killed_worker_held_counts_once(
    upstream: ScriptedUpstream, tmp_path: Path, store: str
) -> None:
    """Nobody knows what its call took: all that was set aside counts, as its row says, for good."""
    rule = "{per: user, budget: {tokens: 70}, concurrent: 1}"
    folder = project(tmp_path, upstream.url, rule, store=store)
    async with serving(folder, "run", environ=ADMIN) as server:
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(chat(server, max_tokens=10))
        await upstream.asked.wait()
        before = children(server.process.pid)
        for worker in before:
            os.kill(int(worker), signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await waiting
        async with asyncio.timeout(30):
            while not await _interrupted(server):
                pass
            while (answer := await _tried(server, max_tokens=30))[0] != 200:
                pass
        [row] = await _interrupted(server)
        assert ASKED + 10 == row["reserved_tokens"]
        assert 70 - row["reserved_tokens"] - ASKED == upstream.requests[-1].body["max_tokens"]
        assert "Hello world" == answer[1]["choices"][0]["message"]["content"]


async def _interrupted(server: Serving) -> Any:
    statement = "SELECT * FROM system.hdb_model_calls WHERE error_code = 'interrupted'"
    try:
        return await sql(server, statement)
    except aiohttp.ClientError:
        return []


async def _tried(server: Serving, **more: Any) -> tuple[int, Any]:
    try:
        return await chat(server, **more)
    except aiohttp.ClientError:
        return 0, None
