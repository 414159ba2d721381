"""What calls hold of limits, and what was spent, while the database does not take or tell it."""

import asyncio
import gc
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from databases import FILES
from harperpy import LimitReached
from harperpy.testing import ECHO, RunningServer, running
from helpers import until

# By echo's count.
A_CALL = 4
ONE = "concurrent: 1"


def config(rule: str, store: str = "database") -> str:
    """A config.yaml with one limit of all calls, and a database that nobody waits long for."""
    limits = f"limits: {{store: {store}, rules: [{{per: backend, match: echo, {rule}}}]}}"
    quiet = "plugins: {analytics: false}"
    return f"database: {{busyTimeout: 50}}\n{ECHO}\n{limits}\n{quiet}\n"


def ask(server: RunningServer) -> asyncio.Future[Any]:
    """A call of a model."""
    return asyncio.ensure_future(server.server.core.models.generate("one two", max_tokens=2))


async def left(call: asyncio.Future[Any]) -> None:
    """Return when nobody waits for a call any more."""
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@asynccontextmanager
async def held_up(server: RunningServer) -> AsyncIterator[None]:
    """While the block runs the database's thread has something else to do."""
    began, free = threading.Event(), threading.Event()

    def work(_: object) -> None:
        began.set()
        free.wait()

    server.server.core.database.occupy(work)
    await until(began.is_set)
    try:
        yield
    finally:
        free.set()


async def queued(server: RunningServer, count: int = 1) -> None:
    """Return when so much waits for the database's thread."""
    queue = server.server.core.database._thread._work_queue
    await until(lambda: queue.qsize() >= count)


@asynccontextmanager
async def somebody(root: Path) -> AsyncIterator[sqlite3.Connection]:
    """Another process's connection, which may be used by any thread."""
    with closing(
        sqlite3.connect(root / FILES[0], isolation_level=None, check_same_thread=False)
    ) as other:
        yield other


def lock(other: sqlite3.Connection) -> None:
    """Nobody else writes."""
    other.execute("BEGIN IMMEDIATE")


def unlock(other: sqlite3.Connection) -> None:
    """All may."""
    other.execute("ROLLBACK")


async def test_who_leaves_before_a_refusal_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that is cancelled while it waits for its place, and would have had none."""
    async with running(config("budget: {tokens: 5}"), root=tmp_path) as server:
        async with held_up(server):
            call = ask(server)
            await queued(server)
            await left(call)
        await server.rows()
        gc.collect()

    assert [] == [record.message for record in caplog.records if record.name == "asyncio"]


async def test_a_place_that_is_given_back_to_a_locked_database_is_free_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody's place, taken for a call that was cancelled, is given back as soon as it can be."""
    async with running(config(ONE), root=tmp_path) as server, somebody(tmp_path) as other:
        async with held_up(server):
            call = ask(server)
            await queued(server)
            server.server.core.database.occupy(lambda _: lock(other))
            await left(call)
        await until(lambda: "is not settled" in caplog.text)
        unlock(other)
        async with asyncio.timeout(20):
            while True:
                try:
                    await ask(server)
                    break
                except LimitReached:
                    await asyncio.sleep(0.05)
