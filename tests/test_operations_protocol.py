"""The operations port as Harper's clients know it: its protocol, statuses, texts and synonyms."""

import csv
import gzip
import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
import yaml

from harperpy import Body, Context, RequestTarget, Resource, Scope
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask

NOT_AUTHORISED = (
    "This operation is not authorized due to role restrictions and/or invalid database items"
)


class Note(msgspec.Struct):
    """What the table of these tests holds."""

    id: int
    text: str = ""


async def _tables(scope: Scope) -> None:
    await scope.database.tables.ensure("note", Note)


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    """A server with a table `note` of one record, and a role `held` that `ada` has."""
    async with running(handle_application=_tables) as server:
        await server.operate("insert", table="note", records=[{"id": 1, "text": "one"}])
        await server.operate("add_role", role="held", permission={})
        await server.operate("add_user", username="ada", password="hunter2hunter2", role="held")
        yield server


async def send(
    server: RunningServer,
    body: Any,
    *,
    key: str | None = None,
    path: str = "/",
    method: str = "POST",
    **headers: str,
) -> tuple[int, bytes, Any]:
    """Status, bytes and headers of what the port answers to bytes, or to JSON."""
    given = {"Authorization": f"Bearer {key or server.api_key}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    url = f"{server.operations_url}{path}"
    async with aiohttp.ClientSession() as session:
        asked = session.request(method, url, data=data, headers=given)
        async with asked as response:
            return response.status, await response.read(), response.headers


# Statuses and texts


SAID: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "a user": (
        "add_user",
        {"username": "eve", "password": "hunter2hunter2", "role": "held", "active": True},
        200,
        {"message": "eve successfully added"},
    ),
    "a user that is": (
        "add_user",
        {"username": "ada", "password": "hunter2hunter2", "role": "held"},
        409,
        {"error": "User ada already exists"},
    ),
    "a user of no role": (
        "add_user",
        {"username": "eve", "password": "hunter2hunter2", "role": "boss"},
        404,
        {"error": "boss role not found"},
    ),
    "a changed user": (
        "alter_user",
        {"username": "ada", "active": False},
        200,
        {"message": "updated 1 of 1 records", "update_hashes": ["ada"]},
    ),
    "an empty role": (
        "alter_user",
        {"username": "ada", "role": ""},
        400,
        {"error": "If role is specified, it cannot be empty."},
    ),
    "another role": (
        "alter_user",
        {"username": "ada", "role": "boss"},
        404,
        {"error": "boss role not found"},
    ),
    "a user that goes": (
        "drop_user",
        {"username": "ada"},
        200,
        {"message": "ada successfully deleted"},
    ),
    "no user": ("drop_user", {"username": "eve"}, 404, {"error": "User eve does not exist"}),
    "a role that is": (
        "add_role",
        {"role": "held", "permission": {}},
        409,
        {"error": "A role with name 'held' already exists"},
    ),
    "a role's wrong permission": (
        "add_role",
        {"role": "x", "permission": {"super_user": 1, "data": {"tables": {"note": {"read": 1}}}}},
        400,
        {"error": "Errors in the role permissions JSON provided"},
    ),
    "a changed role": ("alter_role", {"id": "held", "permission": {}}, 200, {"id": "held"}),
    "no role to change": (
        "alter_role",
        {"id": "x", "permission": {}},
        400,
        {"error": "Invalid role id"},
    ),
    "no role to drop": ("drop_role", {"id": "x"}, 404, {"error": "Role not found"}),
    "a role that somebody has": (
        "drop_role",
        {"id": "held"},
        409,
        {"error": "Cannot drop role held as it has active user(s) tied to this role"},
    ),
    "an insert": (
        "insert",
        {"table": "note", "records": [{"id": 2}]},
        200,
        {"message": "inserted 1 of 1 records", "inserted_hashes": [2], "skipped_hashes": []},
    ),
    "an insert that is there": (
        "insert",
        {"table": "note", "records": [{"id": 1}]},
        200,
        {"message": "inserted 0 of 1 records", "inserted_hashes": [], "skipped_hashes": [1]},
    ),
    "an update": (
        "update",
        {"table": "note", "records": [{"id": 1, "text": "x"}]},
        200,
        {"message": "updated 1 of 1 records", "update_hashes": [1]},
    ),
    "an upsert": (
        "upsert",
        {"table": "note", "records": [{"id": 1}, {"id": 2}]},
        200,
        {"message": "upserted 2 of 2 records", "upserted_hashes": [1, 2]},
    ),
    "a delete": (
        "delete",
        {"table": "note", "ids": [1, 7]},
        200,
        {
            "message": "1 of 2 records successfully deleted",
            "deleted_hashes": [1],
            "skipped_hashes": [7],
        },
    ),
    "a write to the system": (
        "insert",
        {"database": "system", "table": "hdb_user", "records": [{"username": "x"}]},
        403,
        {
            "error": "The 'system' database, tables and records are used internally by harperpy "
            "and cannot be updated or removed."
        },
    ),
    "no database": (
        "describe_table",
        {"database": "x", "table": "note"},
        404,
        {"error": "database 'x' does not exist"},
    ),
    "no table": (
        "describe_table",
        {"table": "x"},
        404,
        {"error": "table 'data.x' does not exist"},
    ),
    "a write by SQL": ("sql", {"sql": "DELETE FROM data.note"}, 403, {}),
    "an empty password": (
        "add_user",
        {"username": "eve", "password": "", "role": "held"},
        400,
        {},
    ),
    "a limit that is none": ("read_log", {"limit": -1}, 400, {}),
}


@pytest.mark.parametrize(("name", "given", "status", "expected"), SAID.values(), ids=SAID)
async def test_each_case_has_its_status_and_its_text(
    server: RunningServer, name: str, given: dict[str, Any], status: int, expected: dict[str, Any]
) -> None:
    """As Harper's clients compare them; what they call 500 for a wrong parameter is 400 here."""
    told, body, _ = await send(server, {"operation": name, **given})

    answer = msgspec.json.decode(body)
    assert status == told, answer
    assert {**answer, **expected} == answer


async def test_a_wrong_permission_is_reported_by_its_parts(server: RunningServer) -> None:
    """What is wrong with the whole, and what with each database."""
    wrong = {"super_user": 1, "data": {"tables": {"note": {"read": 1}}}}
    _, body, _ = await send(server, {"operation": "add_role", "role": "x", "permission": wrong})

    told = msgspec.json.decode(body)
    assert {"error", "main_permissions", "schema_permissions"} <= set(told)
    assert any("super_user" in one for one in told["main_permissions"])
    assert ["data"] == [*told["schema_permissions"]]


async def test_who_may_not_is_told_what_is_lacking(server: RunningServer) -> None:
    """Always in the same three keys."""
    key = (await server.operate("add_api_key", name="k", username="ada"))["api_key"]
    for body, lacking, unknown in (
        (
            {"operation": "list_users"},
            ["Operation 'list_users' is restricted to 'super_user' roles"],
            [],
        ),
        (
            {"operation": "insert", "table": "note", "records": [{"id": 2}]},
            [],
            ["database 'data' does not exist"],
        ),
    ):
        status, told, _ = await send(server, body, key=key)
        report = {"unauthorized_access": lacking, "invalid_schema_items": unknown}
        assert (403, {"error": NOT_AUTHORISED, **report}) == (status, msgspec.json.decode(told))


# Synonyms


SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "keys": ("search_by_id", {"ids": [1]}, {"hash_values": [1]}),
    "the name of it": ("search_by_id", {"ids": [1]}, {"operation": "search_by_hash", "ids": [1]}),
    "a database": (
        "search_by_id",
        {"database": "data", "ids": [1]},
        {"schema": "data", "ids": [1]},
    ),
    "the default database": ("search_by_id", {"database": "data", "ids": [1]}, {"ids": [1]}),
    "a value": (
        "search_by_value",
        {"attribute": "text", "value": "one"},
        {"search_attribute": "text", "search_value": "one", "schema": "data"},
    ),
    "conditions": (
        "search_by_conditions",
        {"conditions": [{"attribute": "id", "comparator": "equals", "value": 1}]},
        {
            "schema": "data",
            "operator": "AND",
            "conditions": [{"search_attribute": "id", "search_type": "equals", "search_value": 1}],
        },
    ),
    "a described table": ("describe_table", {"database": "data"}, {"schema": "data"}),
    "the audit": ("read_audit_log", {"database": "data"}, {"schema": "data"}),
}


@pytest.mark.parametrize(("name", "ours", "theirs"), SAME.values(), ids=SAME)
async def test_a_parameter_has_the_names_that_harper_gave_it(
    server: RunningServer, name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """The older ones count as the newer ones."""
    table = {"table": "note"}
    status, told, _ = await send(server, {"operation": name, **table, **ours})
    other, same, _ = await send(server, {"operation": name, **table, **theirs})

    assert (200, 200) == (status, other), (told, same)
    assert msgspec.json.decode(told) == msgspec.json.decode(same) != []


async def test_a_parameter_given_by_two_names_is_refused(server: RunningServer) -> None:
    """Nobody knows which one counts."""
    body = {"operation": "search_by_id", "table": "note", "ids": [1], "hash_values": [2]}
    status, told, _ = await send(server, body)

    assert (400, True) == (status, b"is given already, by another of its names" in told)


# Content types, paths, connections


async def test_results_come_in_the_type_that_is_accepted(server: RunningServer) -> None:
    """JSON, MessagePack, YAML, and CSV for flat records."""
    body = {"operation": "search_by_id", "table": "note", "ids": [1]}
    rows = [{"id": 1, "text": "one"}]
    read = {
        "application/json": msgspec.json.decode,
        "application/x-msgpack": msgspec.msgpack.decode,
        "application/yaml": yaml.safe_load,
        "text/csv": lambda text: [
            {**row, "id": int(row["id"])} for row in csv.DictReader(io.StringIO(text.decode()))
        ],
    }

    for accepted, decode in read.items():
        status, told, headers = await send(server, body, Accept=accepted)
        assert (200, rows) == (status, decode(told)), accepted
        assert accepted in headers["Content-Type"]


@pytest.mark.parametrize("accepted", ["text/event-stream", "text/csv", "application/yaml"])
async def test_refusals_are_json_whatever_is_accepted(server: RunningServer, accepted: str) -> None:
    """No client looks for an error among events."""
    body = {"operation": "drop_user", "username": "eve"}
    status, told, headers = await send(server, body, Accept=accepted)

    assert (404, "application/json") == (status, headers["Content-Type"])
    assert {"error": "User eve does not exist"} == msgspec.json.decode(told)


NO_BODY = {
    "nothing": (b"", "application/json"),
    "half of it": (b'{"operation": "list_use', "application/json"),
    "no object": (b'["list_users"]', "application/json"),
    "another type": (b"operation: list_users", "application/yaml"),
    "no text": (b"\xff\xfe", "application/json"),
    "MessagePack that is none": (b'{"operation": 1}', "application/x-msgpack"),
    "CBOR": (b"\xa1", "application/cbor"),
}


@pytest.mark.parametrize(("body", "kind"), NO_BODY.values(), ids=NO_BODY)
async def test_a_body_that_cannot_be_read_is_400(
    server: RunningServer, body: bytes, kind: str
) -> None:
    """Whatever it says that it is; and 401 to strangers, as all that they send."""
    status, told, _ = await send(server, body, Content_Type=kind)
    assert (400, {"error"}) == (status, set(msgspec.json.decode(told)))

    for stranger in ("hk_wrong", "nonsense"):
        status, told, _ = await send(server, body, Content_Type=kind, key=stranger)
        assert (401, {"error"}) == (status, set(msgspec.json.decode(told)))


@pytest.mark.parametrize(
    ("more", "packed", "status"), [(0, False, 200), (70_000, False, 401), (70_000, True, 401)]
)
async def test_a_long_body_of_a_stranger_is_not_decoded(
    server: RunningServer, more: int, status: int, *, packed: bool
) -> None:
    """Not even for what anyone may: a little that is sent could become very much to read."""
    login = {"operation": "create_authentication_tokens", "username": "ada"}
    body = msgspec.json.encode({**login, "password": "hunter2hunter2"}) + b" " * more
    headers = {"Content-Encoding": "gzip"} if packed else {}
    data = gzip.compress(body) if packed else body

    assert 200 == (await send(server, data, **headers))[0]
    for stranger in ("", "Bearer hk_wrong"):
        sent = await send(server, data, Authorization=stranger, **headers)
        assert status == sent[0]


@pytest.mark.parametrize("path", ["/x", "/list_users", "/health/x", "/v1/models"])
async def test_other_paths_are_404(server: RunningServer, path: str) -> None:
    """Operations are on one path alone, and no resource of the other port is on this one."""
    assert 404 == (await send(server, {"operation": "list_users"}, path=path))[0]
    assert 404 == (await send(server, b"", path=path, method="GET"))[0]


async def test_a_restart_closes_the_connection(server: RunningServer) -> None:
    """Whose next request would meet a server that stops."""
    _, _, headers = await send(server, {"operation": "restart"})
    assert "close" == headers["Connection"]
    _, _, headers = await send(server, {"operation": "list_users"})
    assert "close" != headers.get("Connection")


# In this process


async def test_plugins_run_operations() -> None:
    """In a request as its user and in its transaction, else as themselves, who may do all."""
    scopes: list[Scope] = []

    async def start(scope: Scope) -> None:
        await _tables(scope)
        scopes.append(scope)

    class Noting(Resource):
        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> Any:
            record = {"operation": "insert", "table": "note", "records": [{"id": 1}]}
            done = await scopes[0].server.operation(record, context)
            if context.request.query:
                raise ValueError
            return {"message": done["message"], "app": context.handler_path}

    async with running(ECHO, resources={"noting": Noting}, handle_application=start) as server:
        key = await server.key_for("ada")
        may: dict[str, Any] = {"data": {"tables": {"note": {"read": True, "insert": True}}}}
        may["resources"] = {"noting": ["create"]}
        await server.operate("add_role", role="clerk", permission=may)
        clerk = await server.key_for("bob", role="clerk")

        assert 403 == (await ask(server, "POST", "/noting", key=key, json={})).status
        assert 500 == (await ask(server, "POST", "/noting?fail=1", key=clerk, json={})).status
        done = await ask(server, "POST", "/noting", key=clerk, json={})
        assert {"message": "inserted 1 of 1 records", "app": "noting"} == msgspec.json.decode(
            done.text
        )
        own = await scopes[0].server.operation({"operation": "set_status", "status": "all is well"})
        assert "all is well" == own["status"]
        rows = await server.operate("read_audit_log", limit=2)
        name = scopes[0].plugin_name
        assert [f"plugin:{name}", "bob"] == [row["user_name"] for row in rows]
