"""The audit of who may do what: a row for each change, none for what did not happen, no secrets."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import sqlalchemy as sa

from harperpy import Context, Resource, Scope
from harperpy.config import parse_config
from harperpy.server import Server
from harperpy.testing import ECHO, RunningServer, on_free_ports, running
from helpers import ask, operation

FIELDS = {
    "operation", "database", "table", "user_name", "key_id", "source", "request_id", "timestamp",
    "hash_values", "records", "original_records",
}  # fmt: skip


async def log(server: RunningServer, **search: Any) -> list[dict[str, Any]]:
    """What `read_audit_log` finds, the oldest first."""
    rows: list[dict[str, Any]] = await server.operate("read_audit_log", **search)
    return rows[::-1]


async def asked(server: RunningServer, body: dict[str, Any], key: str | None = None) -> Any:
    """An operation's answer on the operations port, in a request of a known id."""
    key = server.api_key if key is None else key
    headers = {"x-request-id": "asked"} | ({"Authorization": f"Bearer {key}"} if key else {})
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.operations_url, json=body, headers=headers) as response,
    ):
        return await response.json()


def told(row: dict[str, Any]) -> tuple[Any, ...]:
    """What was done, to what, and what changed."""
    fields = ("operation", "table", "hash_values", "records", "original_records")
    return tuple(row[field] for field in fields)


ADA = {"username": "ada", "role": "model_user", "active": True, "tenant": "t"}


async def test_each_change_leaves_a_row_that_says_who_and_what(server: RunningServer) -> None:
    """Users, roles, keys and tokens: from what, to what, by whom, and by which request."""
    before = len(await log(server))

    async def done(**body: Any) -> Any:
        return await asked(server, body)

    await done(operation="add_role", role="r", permission={"operations": ["sql"]})
    await done(operation="add_user", **ADA, password="pw1")
    await done(operation="alter_user", username="ada", role="r", password="pw2")
    key = await done(operation="add_api_key", name="k", username="ada")
    body = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw2"}
    tokens = await asked(server, body, "")
    body = {"operation": "refresh_operation_token", "refresh_token": tokens["refresh_token"]}
    await asked(server, body, "")
    await done(operation="alter_user", username="ada", active=False)
    await done(operation="drop_api_key", id=key["id"])
    await done(operation="drop_user", username="ada")

    rows = (await log(server))[before:]
    session, expires = rows[4]["hash_values"], rows[4]["records"][0].pop("expires")
    assert all(set(row) == FIELDS for row in rows)
    assert {("system", "ops", "asked")} == {
        (row["database"], row["source"], row["request_id"]) for row in rows
    }
    admin, ada = "HDB_ADMIN", "ada"
    by = [admin, admin, admin, admin, ada, ada, admin, admin, admin, admin]
    assert by == [row["user_name"] for row in rows]
    new_role = rows[0]["records"][0]
    assert ["sql"] == new_role["permission"]["operations"]
    changed = {"role": "r", "password": "changed"}
    token = {"user": ada, "kind": "refresh"}
    api_key = {"user": ada, "kind": "api_key", "name": "k"}
    left = {**ADA, "role": "r", "active": False}
    assert expires > rows[4]["timestamp"]
    family = [*session, rows[5]["hash_values"][1]]
    rows[7]["hash_values"].sort()
    assert [told(row) for row in rows] == [
        ("insert", "hdb_role", ["r"], [new_role], None),
        ("insert", "hdb_user", [ada], [{**ADA, "password": "changed"}], None),
        ("update", "hdb_user", [ada], [changed], [{"role": "model_user"}]),
        ("insert", "hdb_token", [key["id"]], [api_key], None),
        ("insert", "hdb_token", session, [token], None),
        ("refresh", "hdb_token", family, [token], None),
        ("update", "hdb_user", [ada], [{"active": False}], [{"active": True}]),
        ("delete", "hdb_token", sorted(family), None, [{"user": ada}]),
        ("delete", "hdb_token", [key["id"]], None, [api_key]),
        ("delete", "hdb_user", [ada], None, [left]),
    ]


async def test_no_row_holds_a_secret(tmp_path: Path) -> None:
    """Neither passwords nor keys nor tokens, nor what is stored in their place."""
    async with running(root=tmp_path) as server:
        secrets = ["pw-of-ada", await server.key_for("bob"), server.api_key]
        await server.operate("add_user", **ADA, password="pw-of-ada")
        body = {"username": "ada", "password": "pw-of-ada"}
        tokens = await server.operate("create_authentication_tokens", **body)
        await server.operate("refresh_operation_token", refresh_token=tokens["refresh_token"])
        with closing(sqlite3.connect(tmp_path / "system.db")) as database:
            rows = database.execute(
                "SELECT password FROM hdb_user UNION SELECT hash FROM hdb_token"
            )
            secrets += [*tokens.values(), *(each for (each,) in rows)]
        await server.operate("drop_user", username="ada")
        kept = json.dumps(await log(server))

    assert len(secrets) > 7
    assert [] == [secret for secret in secrets if secret in kept]


async def test_what_is_refused_leaves_no_row(server: RunningServer) -> None:
    """What was rolled back has not happened, a part that was done before the refusal neither."""
    await server.operate("add_user", **ADA, password="pw")
    before = await log(server)
    refused: list[dict[str, Any]] = [
        {"operation": "add_user", **ADA, "password": "pw"},
        {"operation": "add_user", **ADA, "username": "eve", "password": "pw", "role": "none"},
        {"operation": "alter_user", "username": "eve", "active": False},
        {"operation": "alter_user", "username": "HDB_ADMIN", "active": False},
        {"operation": "drop_user", "username": "HDB_ADMIN"},
        {"operation": "drop_user", "username": "eve"},
        {"operation": "drop_api_key", "id": "none"},
        {"operation": "add_role", "role": "model_user", "permission": {}},
        {"operation": "create_authentication_tokens", "username": "ada", "password": "no"},
        {"operation": "refresh_operation_token", "refresh_token": "no"},
    ]
    for body in refused:
        assert "error" in await asked(server, body), body

    assert before == await log(server)


CHANGES: dict[str, dict[str, Any]] = {
    "add_user": {"username": "eve", "password": "pw", "role": "model_user"},
    "alter_user": {"username": "ada", "password": "new", "active": False},
    "drop_user": {"username": "ada"},
    "add_role": {"role": "new", "permission": {}},
    "alter_role": {"id": "r", "permission": {"operations": ["sql"]}},
    "drop_role": {"id": "r"},
    "add_api_key": {"name": "new"},
    "drop_api_key": {"id": "KEY"},
    "create_authentication_tokens": {"username": "ada", "password": "pw"},
    "refresh_operation_token": {"refresh_token": "TOKEN"},
}
KEPT = [
    *("SELECT username, password, role, active, tenant FROM hdb_user ORDER BY 1",),
    *("SELECT id, role, permission FROM hdb_role ORDER BY 1",),
    *("SELECT id, user, spent FROM hdb_token ORDER BY 1", "SELECT id FROM hdb_audit ORDER BY 1"),
]


@pytest.mark.parametrize("name", CHANGES)
async def test_what_cannot_be_audited_does_not_happen(name: str, tmp_path: Path) -> None:
    """A change and its row are written together, or neither is."""
    async with running(root=tmp_path) as server:
        await server.operate("add_role", role="r", permission={})
        await server.operate("add_user", **ADA, password="pw")
        key = await server.operate("add_api_key", name="k", username="ada")
        login = {"username": "ada", "password": "pw"}
        tokens = await server.operate("create_authentication_tokens", **login)
        known = {"KEY": key["id"], "TOKEN": tokens["refresh_token"]}
        body = {what: known.get(str(value), value) for what, value in CHANGES[name].items()}
        body["operation"] = name
        with closing(sqlite3.connect(tmp_path / "system.db")) as database:
            database.execute(
                "CREATE TRIGGER full BEFORE INSERT ON hdb_audit "
                "BEGIN SELECT RAISE(ABORT, 'no more rows'); END"
            )
            before = [database.execute(select).fetchall() for select in KEPT]

            status, told = await operation(server, body, f"Bearer {server.api_key}")

            assert before == [database.execute(select).fetchall() for select in KEPT]
            database.execute("DROP TRIGGER full")
        assert 500 == status
        assert "rows" not in str(told)
        assert 200 == (await operation(server, body, f"Bearer {server.api_key}"))[0]


@pytest.mark.parametrize("config", [ECHO, f"{ECHO}\nlogging: {{auditLog: false}}"])
async def test_the_first_start_is_the_systems(config: str) -> None:
    """Roles, administrator and key that a first start makes; `auditLog: false` changes nothing."""
    async with running(config) as server:
        rows = await log(server)

    assert [
        ("insert", "hdb_role", ["super_user"]),
        ("insert", "hdb_role", ["model_user"]),
        ("insert", "hdb_user", ["HDB_ADMIN"]),
    ] == [told(row)[:3] for row in rows[:3]]
    assert ["hdb_token"] == [row["table"] for row in rows[3:]]
    assert {("system", "system", None)} == {
        (row["user_name"], row["source"], row["request_id"]) for row in rows
    }


async def test_the_command_line_without_a_server_is_audited(tmp_path: Path) -> None:
    """It acts as the longest-standing super user."""
    async with running(root=tmp_path):
        pass
    config = on_free_ports(parse_config(ECHO, source="config.yaml", environ={}))
    server = Server(config, directory=tmp_path, root=tmp_path, environ={})
    await server.open()
    try:
        await server.operate({"operation": "add_user", **ADA, "password": "pw"})
        row = (await server.operate({"operation": "read_audit_log"}))[0]
    finally:
        await server.stop()

    assert ("insert", "hdb_user", ["ada"]) == told(row)[:3]
    assert ("HDB_ADMIN", "ops") == (row["user_name"], row["source"])


async def test_a_plugins_change_is_its_requests() -> None:
    """A handler on the REST port that adds a user does it on its caller's behalf."""

    def apply(scope: Scope) -> None:
        class Join(Resource):
            @staticmethod
            async def post(target: Any, data: Any, context: Context) -> None:
                await scope.people.add_user("ada", "pw", "model_user")

        scope.resources.set("join", Join)

    async with running(ECHO, handle_application=apply) as server:
        key = await server.key_for("boss", "super_user")
        answer = await ask(server, "POST", "/join", key=key)
        row = (await log(server))[-1]

    assert 204 == answer.status
    assert ("boss", "rest") == (row["user_name"], row["source"])
    assert answer.headers["x-request-id"] == row["request_id"]


class Room(msgspec.Struct):
    """A column of it is called as one of many rows' `size` is."""

    id: int
    size: float = 0.0
    size_m2: float = 0.0


async def test_a_columns_name_is_its_own() -> None:
    """Of one record and of several, written at once."""
    one = {"id": 1, "size": 1.0, "size_m2": 2.0}
    several = [{**one, "id": at} for at in (2, 3)]

    async def apply(scope: Scope) -> None:
        room = await scope.database.tables.ensure("room", Room)

        class Several(Resource):
            @staticmethod
            async def post(target: Any, data: Any, context: Context) -> None:
                await context.transaction().execute(sa.insert(room.sql).values(several))

        scope.resources.set("several", Several)

    async with running(ECHO, handle_application=apply) as server:
        await server.operate("insert", table="room", records=[one])
        assert 204 == (await ask(server, "POST", "/several")).status
        rows = await log(server, table="room")

    assert [[one], several] == [row["records"] for row in rows]


async def test_it_is_searched_by_key_name_and_time(server: RunningServer) -> None:
    """By one or several values, within a database and a table; the newest come first."""
    await server.operate("add_user", **ADA, password="pw")
    await server.operate("alter_user", username="ada", tenant="u")
    key = await server.key_for("eve", "super_user")
    await asked(server, {"operation": "alter_user", "username": "ada", "tenant": "v"}, key)
    every = await log(server)
    times = [row["timestamp"] for row in every]

    async def found(**search: Any) -> list[int]:
        return [every.index(row) for row in await log(server, **search)]

    last = len(every) - 1
    assert [4, 5, last] == await found(search_type="hash_value", search_values=["ada"])
    assert [2, 4, 5, last] == await found(
        search_type="hash_value", search_values=["ada", "HDB_ADMIN"]
    )
    assert [last] == await found(search_type="username", search_values=["eve"])
    assert [] == await found(search_type="username", search_values=["ada"])
    assert [5, 6, 7, last] == await found(search_type="timestamp", search_values=[times[5]])
    assert [4, 5] == await found(search_type="timestamp", search_values=[times[4], times[5]])
    assert [0, 1] == await found(database="system", table="hdb_role")
    assert [] == await found(database="data")
    assert [last] == await found(limit=1)


@pytest.mark.parametrize(
    ("search", "told"),
    [
        ({"search_type": "name"}, "search_type"),
        ({"search_values": ["ada"]}, "search_type: expected hash_value, timestamp or username"),
        ({"search_type": "timestamp", "search_values": ["now"]}, "search_values: expected one or"),
        ({"search_type": "timestamp"}, "search_values: expected one or two times"),
        ({"limit": 0}, "limit"),
        ({"search_values": ["a"] * 10_001, "search_type": "username"}, "search_values: Expected"),
    ],
)
async def test_a_search_that_makes_no_sense_is_refused(
    server: RunningServer, search: dict[str, Any], told: str
) -> None:
    """The refusal names the field and what is expected."""
    body = {"operation": "read_audit_log", **search}
    status, answer = await operation(server, body, f"Bearer {server.api_key}")

    assert 400 == status
    assert told in json.dumps(answer)


async def test_only_super_users_read_it(server: RunningServer) -> None:
    """To others it is closed."""
    key = await server.key_for("ada")
    body = {"operation": "read_audit_log"}

    assert 403 == (await operation(server, body, f"Bearer {key}"))[0]
    assert 401 == (await operation(server, body))[0]


async def test_a_database_of_before_gets_the_column(tmp_path: Path) -> None:
    """A file of the second version of the schema is brought up to date."""
    async with running(root=tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute("ALTER TABLE hdb_audit DROP COLUMN original_records")
        database.execute("PRAGMA user_version = 2")
    async with running(root=tmp_path) as server:
        await server.operate("add_user", **ADA, password="pw")
        await server.operate("alter_user", username="ada", tenant="u")
        row = (await log(server))[-1]

    assert [{"tenant": "t"}] == row["original_records"]
