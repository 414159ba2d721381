"""The database's file, away from its place: nothing makes another, and nothing is lost."""

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from asking import children, logged
from commands import ADMIN, ECHO, get, serving
from databases import FILES, away
from harperpy import ConfigError, Database, Resource, ServiceUnavailable, get_context
from harperpy.testing import RunningServer, running
from helpers import HELLO, ask, until

AWAY = (503, "1", "the database is away")


class Noted(Resource):
    """Writes to a table of its own, which is not audited."""

    public = True

    @staticmethod
    async def post() -> str:
        """One row more."""
        statement = sa.text("INSERT INTO notes VALUES (1)")
        await get_context().transaction().execute(statement)
        return "noted"


async def chat(server: RunningServer) -> str:
    """The id of a call that is answered."""
    answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "model": "default"})
    assert 200 == answer.status, answer.text
    return answer.headers["x-harper-call-id"]


async def refused(server: RunningServer, operation: str, **parameters: Any) -> tuple[Any, ...]:
    """How an operation is refused that would write."""
    with pytest.raises(ServiceUnavailable) as caught:
        await server.operate(operation, **parameters)
    return caught.value.status, caught.value.headers["Retry-After"], str(caught.value)


@pytest.mark.parametrize("names", [FILES[:1], FILES])
async def test_calls_go_on_while_the_file_is_away(names: tuple[str, ...], tmp_path: Path) -> None:
    """They are answered, and have their rows when it is back; nobody makes a new file."""
    async with running(root=tmp_path) as server:
        before = await chat(server)
        assert [before] == [str(row["id"]) for row in await server.rows()]
        with away(tmp_path, *names):
            calls = [await chat(server) for _ in range(3)]
            user = {"username": "new", "password": "pw", "role": "model_user"}
            assert AWAY == await refused(server, "add_user", **user)
            assert AWAY[:2] == (await refused(server, "sql", sql="SELECT id FROM hdb_role"))[:2]
            await server.server.core.ledger.flush()
            assert not (tmp_path / "system.db").exists()
        rows = [str(row["id"]) for row in await server.rows()]
        users = [user["username"] for user in await server.operate("list_users")]

    assert [before, *calls] == sorted(rows)
    assert "new" not in users


async def test_a_transaction_is_refused_while_the_file_is_away(tmp_path: Path) -> None:
    """Its handler's answer is 503; what it wrote is undone."""
    async with running(root=tmp_path, resources={"Noted": Noted}) as server:
        create = sa.text("CREATE TABLE notes (number)")
        await server.server.core.database.run(lambda one: one.execute(create))
        with away(tmp_path):
            answer = await ask(server, "POST", "/Noted")
            assert (503, "1") == (answer.status, answer.headers["Retry-After"])
        assert "noted" == (await ask(server, "POST", "/Noted")).json
    with closing(sqlite3.connect(tmp_path / "system.db")) as database:
        assert [(1,)] == database.execute("SELECT * FROM notes").fetchall()


async def test_another_file_that_is_there_is_opened_anew(tmp_path: Path) -> None:
    """A copy that was put back is read and written from then on, not the one that is gone."""
    async with running(root=tmp_path) as server:
        await server.key_for("early")
        copy(tmp_path / "system.db", tmp_path / "copy")
        await server.key_for("late")
        assert 3 == len(await server.operate("list_users"))
        with away(tmp_path, *FILES):
            (tmp_path / "copy").rename(tmp_path / "system.db")
            assert 2 == len(await server.operate("list_users"))
            await server.key_for("later")
            call = await chat(server)
            assert [call] == [str(row["id"]) for row in await server.rows()]
            names = [user["username"] for user in await server.operate("list_users")]
            for name in FILES:
                (tmp_path / name).unlink(missing_ok=True)

    assert {"HDB_ADMIN", "early", "later"} == {*names}


def copy(source: Path, target: Path) -> None:
    """A database as it is now, in a file of its own."""
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


async def test_only_a_first_start_makes_the_file(tmp_path: Path) -> None:
    """Any other says in a sentence that it is not there."""
    database = Database(tmp_path / "system.db", busy_seconds=0.2)
    with pytest.raises(ConfigError, match=r"cannot use .*system\.db as database: No such file"):
        await database.open(make=False)
    assert not (tmp_path / "system.db").exists()
    await database.open()
    await database.close()
    again = Database(tmp_path / "system.db")
    await again.open(make=False)
    await again.close()


CONFIG = f"""
http: {{port: 0, host: 127.0.0.1, workers: 2}}
operationsApi: {{network: {{port: 0}}}}
database: {{busyTimeout: 200}}
{ECHO}
"""


def lives(number: int, of: int) -> Callable[[], bool]:
    """Whether a worker has been started in the place of another."""
    return lambda: len(children(of)) == 2 and str(number) not in children(of)


async def test_a_worker_that_is_started_again_waits_for_the_file(tmp_path: Path) -> None:
    """It refuses to begin with an empty one, as often as it takes."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    root = tmp_path / ".harperpy"
    async with serving(tmp_path, "run", environ=ADMIN) as server:
        victim, other = children(server.process.pid)
        with away(root):
            os.kill(int(victim), signal.SIGKILL)
            log = await logged(tmp_path, "ended with exit code 1 and is started again")
            assert "system.db as database: No such file or directory" in log
            assert not (root / "system.db").exists()
            assert (200, {"status": "ok"}) == await get(f"{server.url}/health")
        await until(lives(int(victim), server.process.pid))
        assert other in children(server.process.pid)
        os.kill(int(other), signal.SIGKILL)
        assert (200, {"status": "ok"}) == await get(f"{server.url}/health")
