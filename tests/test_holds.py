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
import sqlalchemy as sa

from databases import FILES, busy, told
from harperpy import Journal, JournalReader, LimitReached, ModelCall, ServiceUnavailable
from harperpy.system import hdb_limit_hold
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


async def test_a_call_that_cannot_be_noted_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never made, so what was set aside for it is there for the next one."""

    def refuse(_: ModelCall) -> None:
        raise ServiceUnavailable

    async with running(config(ONE, "memory")) as server:
        with monkeypatch.context() as patched:
            patched.setattr(server.server.core.ledger, "begin", refuse)
            with pytest.raises(ServiceUnavailable):
                await ask(server)
        await ask(server)


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


async def test_what_was_spent_is_never_guessed(tmp_path: Path) -> None:
    """Read anew while rows wait in the journal, a budget is refused by 503, not taken for whole."""
    rule = f"budget: {{tokens: {20 * A_CALL}}}"
    async with running(config(rule, "memory"), root=tmp_path) as server:
        await ask(server)
        with busy(tmp_path):
            await ask(server)
            server.server.core.billing.limits.forget()
            with pytest.raises(ServiceUnavailable):
                await ask(server)
        await ask(server)
    assert [(3,)] == told(tmp_path / FILES[0], "SELECT count(*) FROM hdb_model_calls")


def leave(root: Path) -> int:
    """What a process that was killed in a call left behind; the call."""
    journal = Journal(root / "journal", most=1 << 22)
    call = ModelCall(
        id=7, created=1.79e12, method="generate", model="m", backend="echo", reserved_tokens=9
    )
    journal.begin(call)
    journal._let_go()
    return call.id


async def test_what_the_dead_held_is_kept_until_their_calls_have_rows(tmp_path: Path) -> None:
    """A worker that cannot write them down does not begin: both would be gone for a moment."""
    hold = {"meter": "m", "call": 7, "amount": 9, "worker": 0, "life": "before"}
    async with running(config(ONE), root=tmp_path) as server, somebody(tmp_path) as other:
        database, billing = server.server.core.database, server.server.core.billing
        await database.run(lambda one: one.execute(sa.insert(hdb_limit_hold), hold))
        leave(tmp_path)
        async with held_up(server):
            opening = asyncio.ensure_future(billing.open())
            await queued(server)
            # Free again just after the journal could not be read into it.
            lock(other)
            database.occupy(lambda _: unlock(other))
        with pytest.raises(ServiceUnavailable):
            await opening
        assert [(7,)] == told(tmp_path / FILES[0], "SELECT call FROM hdb_limit_hold")
        await billing.open()
        assert [] == told(tmp_path / FILES[0], "SELECT call FROM hdb_limit_hold")
        rows = [(7, "interrupted", 9)]
        select = "SELECT id, error_code, reserved_tokens FROM hdb_model_calls"
        assert rows == told(tmp_path / FILES[0], select)


async def test_nobody_waits_for_who_writes_down_what_the_dead_left(tmp_path: Path) -> None:
    """While one worker is at it, another that needs the rows writes them, too."""
    async with running(root=tmp_path) as server:
        leave(tmp_path)
        with JournalReader.orphans(tmp_path / "journal") as found:
            assert [7] == [row["id"] for row in await server.rows()]
            await server.server.core.database.run(lambda _: [one.remove() for one in found])
        assert [7] == [row["id"] for row in await server.rows()]
