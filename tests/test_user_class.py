"""A plain user class that overrides `post`, with no line for all that it is given."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa

from harperpy import Resource, Scope, get_context
from harperpy.testing import RunningServer, running
from helpers import ask

metadata = sa.MetaData()
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String, nullable=False),
)


class Notes(Resource):
    """What a user writes: ask a model, keep what it said, and fail for the word `fail`."""

    @staticmethod
    async def post(target: Any, data: Any) -> Any:
        """Nothing here says who may, in what transaction, for whose account."""
        body = await data
        context = get_context()
        said = (await context.models.generate(body["text"])).content
        await context.transaction().execute(sa.insert(notes).values(text=said))
        if body["text"] == "fail":
            raise RuntimeError
        user = context.user
        return {"said": said, "user": user and user.username, "path": context.path}


class Place(NamedTuple):
    """The server with the class at `/notes`, a user whose role opens it, and its data."""

    server: RunningServer
    key: str
    data: Path

    async def post(self, text: str, key: str | None = None) -> Any:
        """The answer to a note, of the user by default."""
        body = {"text": text}
        headers = {"x-request-id": f"req-{text}"}
        key = self.key if key is None else key
        return await ask(self.server, "POST", "/notes", key=key, json=body, headers=headers)

    def kept(self) -> list[str]:
        """The notes in the file, as another program reads them."""
        with closing(sqlite3.connect(self.data / "system.db")) as connection:
            return [text for (text,) in connection.execute("SELECT text FROM notes ORDER BY id")]

    async def audited(self) -> list[dict[str, Any]]:
        """The audit's rows of the table."""
        sql = "SELECT * FROM system.hdb_audit WHERE database = 'data' ORDER BY id"
        rows: list[dict[str, Any]] = await self.server.operate("sql", sql=sql)
        return rows


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """A place to try it."""

    async def tables(scope: Scope) -> None:
        await scope.database.run(metadata.create_all)

    async with running(
        root=tmp_path, resources={"notes": Notes}, handle_application=tables
    ) as server:
        permission = {"resources": {"notes": ["create"]}}
        await server.operate("add_role", role="writer", permission=permission)
        key = await server.key_for("ada", "writer", tenant="acme")
        yield Place(server, key, tmp_path)


async def test_nobody_else_reaches_it(place: Place) -> None:
    """It runs for who was granted `create`: no key is 401, a role without the grant 403."""
    other = await place.server.key_for("bob")

    assert 401 == (await place.post("a", key="")).status
    assert 401 == (await place.post("a", key="hk_wrong")).status
    assert 403 == (await place.post("a", key=other)).status
    assert [] == place.kept()
    assert [] == await place.server.rows()
    assert 200 == (await place.post("a")).status


async def test_it_knows_who_asks_for_what(place: Place) -> None:
    """The context is the request's, without a parameter for it."""
    answer = await place.post("hello")

    assert {"said": "hello", "user": "ada", "path": "/notes"} == answer.json


async def test_what_it_wrote_is_undone_when_it_raises(place: Place) -> None:
    """Of two notes the one stays whose handler returned, and no audit tells of the other."""
    assert 200 == (await place.post("kept")).status
    assert 500 == (await place.post("fail")).status

    assert ["kept"] == place.kept()
    assert ["req-kept"] == [row["request_id"] for row in await place.audited()]


async def test_a_write_leaves_an_audit_row(place: Place) -> None:
    """Who wrote what where, by which request."""
    await place.post("hello")
    (row,) = await place.audited()

    told = {name: row[name] for name in ("user_name", "operation", "table", "source", "request_id")}
    assert {
        "user_name": "ada",
        "operation": "insert",
        "table": "notes",
        "source": "rest",
        "request_id": "req-hello",
    } == told


async def test_a_model_call_leaves_a_row(place: Place) -> None:
    """Billed to the user and tenant who asked, at the mount, also where the handler then fails."""
    await place.post("hello")
    await place.post("fail")
    rows = await place.server.rows()

    names = ("user", "tenant", "app", "request_id", "method")
    billed = [{name: row[name] for name in names} for row in reversed(rows)]
    own = {"user": "ada", "tenant": "acme", "app": "notes", "method": "generate"}
    assert [{**own, "request_id": "req-hello"}, {**own, "request_id": "req-fail"}] == billed
