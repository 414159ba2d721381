"""All that can go wrong at once: afterwards each call has its one row, as the provider has it."""

import asyncio
import os
import random
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from asking import children
from chaos import CALLERS, KINDS, Callers, Provider
from commands import ADMIN, SECONDS, Serving, get, serving
from databases import DAILY, FILES, ROLL_UP, away, busy, told
from harperpy import difference
from harperpy.testing import ScriptedUpstream
from helpers import basic

ROOT = basic("root", "s3cret-enough")
CONFIG = """
http: {{port: 0, host: 127.0.0.1, workers: 2}}
operationsApi: {{network: {{port: 0}}}}
database: {{busyTimeout: 250}}
models:
  generative:
    default: {{backend: openai, model: small, {target}, maxRetries: 1}}
    shaky: {{backend: openai, {target}, maxRetries: 0, fallback: [default]}}
  embedding:
    embed: {{backend: openai, {target}, maxRetries: 1}}
prices:
  - {{model: "*", input: 3, output: 7, embedding: 5}}
limits:
  rules:
    - {{per: user, match: ada, budget: {{tokens: {tokens}}}}}
    - {{per: user, match: bob, budget: {{cost: {cost}}}}}
    - {{per: user, match: cleo, concurrent: 3}}
"""
PID = """
import os

from harperpy import Resource


class Pid(Resource):
    public = True

    @staticmethod
    def get():
        return os.getpid()
"""
HELLO: Any = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
SPENT, HELD = "429 insufficient_quota", "429 rate_limit_exceeded"
FAILURES = {"aborted", "backend_error", "interrupted"}
CALLS, UNIT = 40, 1_000_000_000
# What goes wrong in the midst of as many calls, one after the other.
STEPS = (
    ("killed",),
    ("locked",),
    ("removed",),
    ("killed", "killed"),
    ("locked", "killed"),
    ("removed", "killed"),
)


class Scene:
    """A server with two workers, and what happens to it."""

    def __init__(self, server: Serving, root: Path, seed: int) -> None:
        self.server = server
        self._root = root
        self._random = random.Random(seed)  # noqa: S311  # no secret

    @contextmanager
    def wrong(self, *faults: str) -> Iterator[None]:
        """While the block runs, this is so."""
        with ExitStack() as stack:
            workers = children(self.server.process.pid)
            self._random.shuffle(workers)
            for fault in faults:
                if fault == "killed":
                    os.kill(int(workers.pop()), signal.SIGKILL)
                elif fault == "locked":
                    stack.enter_context(busy(self._root))
                else:
                    stack.enter_context(away(self._root, *FILES))
            yield

    async def both(self) -> None:
        """Return when each of two workers answers."""
        found = set[int]()
        async with asyncio.timeout(SECONDS):
            while len(found) < 2:
                found.add((await get(f"{self.server.url}/Pid"))[1])

    async def operate(self, operation: str, **parameters: Any) -> Any:
        """What an operation gives a super user."""
        body = {"operation": operation, **parameters}
        async with (
            aiohttp.ClientSession(headers={"Authorization": ROOT}) as session,
            session.post(self.server.operations_url, json=body) as answer,
        ):
            assert 200 == answer.status, await answer.text()
            return await answer.json()

    async def key_of(self, name: str) -> str:
        """A new user's key."""
        await self.operate("add_user", username=name, password="pw", role="model_user")
        made = await self.operate("add_api_key", name="chaos", username=name)
        return made["api_key"]


async def play(scene: Scene, callers: Callers) -> None:
    """Calls without a pause, so many in each step; from its quarter to its end all goes wrong."""
    for faults in STEPS:
        await scene.both()
        before = callers.heard.total()
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLS):
                group.create_task(callers.call())
            await callers.until(before + CALLS // 4)
            with scene.wrong(*faults):
                await callers.until(before + CALLS * 3 // 4)
    await scene.both()


def rows_of(root: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table."""
    with closing(sqlite3.connect(root / FILES[0])) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table}")]  # noqa: S608


def counted(row: dict[str, Any]) -> tuple[int, int | None]:
    """What a row says was asked and answered."""
    return row["prompt_tokens"] or row["embedding_tokens"], row["completion_tokens"]


def taken(row: dict[str, Any]) -> int:
    """What a call took of a budget of tokens."""
    names = ("prompt_tokens", "completion_tokens", "embedding_tokens", "reserved_tokens")
    return sum(row[name] or 0 for name in names)


def spent(row: dict[str, Any]) -> int:
    """What it took of one of money, in billionths."""
    return round((row["cost"] or row["reserved_cost"] or 0) * UNIT)


async def use_up(callers: Callers, name: str) -> None:
    """Take what is left of a budget: what its last calls held is given back in a moment."""
    async with asyncio.timeout(SECONDS):
        while (heard := await callers.ask(name, "whole", HELLO)) != SPENT:
            assert heard in ("whole", HELD)


@pytest.mark.parametrize(
    ("rounds", "pause"),
    [(1, 0.3), pytest.param(9, 1.5, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
async def test_the_ledger_is_exact_whatever_happens(
    tmp_path: Path, upstream: ScriptedUpstream, rounds: int, pause: float
) -> None:
    """Rows and provider agree call for call and token for token, and no budget is overdrawn.

    Though workers die, the provider fails, the database is locked or gone, and callers leave.
    """
    total = rounds * len(STEPS) * CALLS
    tokens, cost = total, total * 5e-6
    target = f'baseUrl: "{upstream.url}", firstByteTimeoutMs: 2000'
    (tmp_path / "config.yaml").write_text(CONFIG.format(target=target, tokens=tokens, cost=cost))
    (tmp_path / "resources.py").write_text(PID)
    upstream.usual = provider = Provider(total)
    root = tmp_path / ".harperpy"
    async with serving(tmp_path, "run", environ=ADMIN) as server:
        scene = Scene(server, root, total)
        keys = {name: await scene.key_of(name) for name in CALLERS}
        callers = Callers(server.url, keys, total, pause)
        for _ in range(rounds):
            await play(scene, callers)
        provider.cured = True
        for name in ("ada", "bob"):
            await use_up(callers, name)
        assert ["whole"] * 3 == await asyncio.gather(
            *(callers.ask("cleo", "whole", HELLO) for _ in range(3))
        )
        await scene.operate("sql", sql="SELECT count(*) AS calls FROM system.hdb_model_calls")
        await callers.close()
    rows = {row["id"]: row for row in rows_of(root, "hdb_model_calls")}
    of = {name: [row for row in rows.values() if row["user"] == name] for name in CALLERS}

    # The provider, the callers and the rows say the same.
    assert not difference(rows.values(), upstream.served)
    assert {*callers.named} <= {*rows}
    assert callers.counted == {number: counted(rows[number]) for number in callers.counted}
    assert told(root / FILES[0], ROLL_UP) == told(root / FILES[0], DAILY)
    assert sum(map(taken, of["ada"])) <= tokens
    assert sum(map(spent, of["bob"])) <= round(cost * UNIT)
    # Nothing is left over.
    assert [] == [*(root / "journal").iterdir()]
    assert {hold["call"] for hold in rows_of(root, "hdb_limit_hold")} <= {*rows}
    assert "Traceback" not in (tmp_path / "log").read_text()
    # It was as bad as it was meant to be, through both workers.
    assert total == callers.heard.total()
    assert {*KINDS, "left", "503 None", "APIConnectionError"} <= {*callers.heard}
    assert {None, *FAILURES} <= {row["error_code"] for row in rows.values()}
    assert {0, 1} == {number % 2 for number in rows}
