"""`sql` over plugins' tables: each caller reads what its role opens, however it is worded."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from harperpy.plugins import select, select_wall

from harperpy import Scope
from harperpy.testing import RunningServer, running
from helpers import operation

SECRET = "chip-4711"
SYSTEM = "SELECT * FROM system.?"


class Dog(msgspec.Struct):
    """What most statements are about."""

    id: int
    name: str
    chip: str = SECRET
    good: bool = True
    tags: list[str] = []


class Owner(msgspec.Struct):
    """Whose a dog is."""

    chip: str
    owner: str
    good: int = 1


class Hidden(msgspec.Struct):
    """What no role of these tests opens."""

    id: int
    text: str = SECRET


READ = {"read": True}
LIMITED = {
    **READ,
    "update": True,
    "attribute_permissions": [
        {"attribute_name": "id", "read": True},
        {"attribute_name": "name", "read": True},
        {"attribute_name": "good", "update": True},
    ],
}
ROLES: dict[str, dict[str, Any]] = {
    "reader": {"Dog": READ, "owner": READ},
    "limited": {"Dog": LIMITED, "owner": {**READ, **LIMITED, "attribute_permissions": [
        {"attribute_name": "owner", "read": True},
    ]}},
    "writer": {"Dog": {"insert": True}},
    "none": {},
}  # fmt: skip


class Asks:
    """The operation `sql`, as the super user and as users of the roles."""

    def __init__(self, server: RunningServer, keys: dict[str, str]) -> None:
        self.server = server
        self._keys = keys

    async def __call__(self, role: str, sql: str) -> tuple[int, Any]:
        """Status and body."""
        body = {"operation": "sql", "sql": sql}
        return await operation(self.server, body, f"Bearer {self._keys[role]}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asks() -> AsyncIterator[Asks]:
    """A server with two dogs, an owner, and something hidden."""

    async def tables(scope: Scope) -> None:
        ensure = scope.database.tables.ensure
        await ensure("Dog", Dog, index=["chip"])
        await ensure("owner", Owner, key="chip")
        await ensure("hidden", Hidden)

    async with running(handle_application=tables) as server:
        keys = {"super": server.api_key}
        for role, tables_of_role in ROLES.items():
            permission = {"data": {"tables": tables_of_role}} if tables_of_role else {}
            await server.operate("add_role", role=role, permission=permission)
            keys[role] = await server.key_for(f"of-{role}", role=role)
        dogs = [{"id": 1, "name": "Rex", "tags": ["a"]}, {"id": 2, "name": "Ada", "chip": "x"}]
        await server.operate("insert", table="Dog", records=dogs)
        owners = [{"chip": SECRET, "owner": "Eve", "good": 1}]
        await server.operate("insert", table="owner", records=owners)
        await server.operate("insert", table="hidden", records=[{"id": 1}])
        yield Asks(server, keys)


pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWERED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "all of a row": (
        "SELECT * FROM data.Dog WHERE id = 1",
        [{"id": 1, "name": "Rex", "chip": SECRET, "good": True, "tags": ["a"]}],
    ),
    "another case": ("SELECT NAME FROM dog ORDER BY 1", [{"name": "Ada"}, {"name": "Rex"}]),
    "a join": (
        "SELECT d.name, o.owner FROM data.dog d JOIN data.owner o USING (chip)",
        [{"name": "Rex", "owner": "Eve"}],
    ),
    "a number that is called as a flag": ("SELECT good FROM owner", [{"good": 1}]),
    "groups": (
        "WITH c AS (SELECT chip FROM dog) SELECT count(*) AS n FROM c GROUP BY chip LIMIT 1",
        [{"n": 1}],
    ),
    "what WITH gives, by no column": (
        "WITH c AS (SELECT name FROM dog GROUP BY name) SELECT count(*) AS n FROM c",
        [{"n": 2}],
    ),
    "what WITH RECURSIVE gives, by no column": (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION SELECT 2 FROM c) SELECT count(*) AS n FROM c",
        [{"n": 2}],
    ),
    "JSON that nests too deeply": (
        f"SELECT '{'[' * 9000}' AS tags FROM dog WHERE id = 1",  # noqa: S608
        [{"tags": "[" * 9000}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("role", ["super", "reader"])
@pytest.mark.parametrize(("sql", "rows"), ANSWERED.values(), ids=ANSWERED)
async def test_who_may_read_a_table_asks_it_by_sql(
    asks: Asks, role: str, sql: str, rows: list[dict[str, Any]]
) -> None:
    """Flags are booleans and JSON is decoded, as the table has them."""
    assert (200, rows) == await asks(role, sql)


OPEN_TO_LIMITED: dict[str, list[dict[str, Any]]] = {
    "SELECT id, name FROM data.dog ORDER BY id": [
        {"id": 1, "name": "Rex"},
        {"id": 2, "name": "Ada"},
    ],
    "SELECT count(*) AS n FROM dog": [{"n": 2}],
    "SELECT count(name) AS n FROM dog d WHERE d.id > 1": [{"n": 1}],
    'SELECT "name" FROM dog WHERE "id" = 1': [{"name": "Rex"}],
    "SELECT 'chip' AS c FROM dog LIMIT 1": [{"c": "chip"}],
    "SELECT * FROM (SELECT name FROM dog WHERE id = 1)": [{"name": "Rex"}],
    "SELECT rowid FROM dog WHERE id = 2": [{"id": 2}],
    "SELECT 1 AS one": [{"one": 1}],
}


@pytest.mark.parametrize("sql", OPEN_TO_LIMITED)
async def test_a_role_with_some_attributes_reads_those(asks: Asks, sql: str) -> None:
    """As long as it names no others."""
    assert (200, OPEN_TO_LIMITED[sql]) == await asks("limited", sql)


NO_COLUMN = "SQLite does not take the statement: no such column: chip."
LEAKS = [
    "SELECT chip FROM dog",
    "SELECT d.chip FROM dog d",
    "SELECT data.dog.chip FROM data.dog",
    'SELECT "chip" FROM dog',
    "SELECT `chip`, [chip] FROM dog",
    "SELECT CHIP FROM dog",
    "SELECT id FROM dog WHERE chip LIKE 'c%'",
    "SELECT id FROM dog ORDER BY chip",
    "SELECT count(*) FROM dog GROUP BY chip",
    "SELECT count(*) FROM dog GROUP BY id HAVING max(chip) > 'a'",
    "SELECT max(chip) FROM dog",
    "SELECT id FROM dog WHERE id IN (SELECT id FROM dog WHERE chip > 'a')",
    "SELECT (SELECT chip FROM dog LIMIT 1)",
    "WITH c AS (SELECT chip FROM dog) SELECT * FROM c",
    "WITH c(x) AS (SELECT chip FROM dog) SELECT x FROM c",
    "SELECT 1 UNION SELECT chip FROM dog",
    "SELECT a.id FROM dog a JOIN dog b ON a.chip = b.chip",
    "SELECT chip FROM dog a, dog b",
    "SELECT id FROM dog LIMIT (SELECT length(chip) FROM dog)",
    "SELECT row_number() OVER (PARTITION BY chip) FROM dog",
    "SELECT json_object('a', chip) FROM dog",
    "SELECT CASE WHEN chip = 'x' THEN 1 END FROM dog",
]


@pytest.mark.parametrize("sql", LEAKS)
async def test_a_hidden_attribute_is_as_if_it_were_not_there(asks: Asks, sql: str) -> None:
    """The answer is that on a column that nobody has made, and holds no value."""
    closed = await asks("limited", sql)
    missing = await asks("limited", sql.replace("chip", "chap").replace("CHIP", "CHAP"))

    assert (400, {"error": NO_COLUMN}) == closed
    assert (400, {"error": NO_COLUMN.replace("chip", "chap")}) == missing


STARS = [
    "SELECT * FROM dog",
    "SELECT d.* FROM data.dog AS d",
    "SELECT * FROM (SELECT * FROM dog)",
    "SELECT id FROM dog WHERE EXISTS (SELECT * FROM dog)",
    "WITH c AS (SELECT * FROM dog) SELECT id FROM c",
    "SELECT id, name FROM dog UNION SELECT * FROM dog",
    "SELECT dog.*, count(*) FROM dog",
]


@pytest.mark.parametrize("sql", STARS)
async def test_a_star_is_for_whole_tables(asks: Asks, sql: str) -> None:
    """It is refused, and told which columns there are to name."""
    status, told = await asks("limited", sql)

    assert 403 == status
    assert {"error": "'*' is for whole tables: name the columns of data.Dog: id, name."} == told


JOINS = [
    "SELECT d.id FROM dog d NATURAL JOIN owner o",
    "SELECT * FROM dog FULL JOIN owner USING (chip)",
    "SELECT id FROM dog JOIN owner USING (chip)",
    'SELECT id FROM dog INDEXED BY "Dog.chip"',
]


@pytest.mark.parametrize("sql", JOINS)
async def test_joins_that_compare_unseen_columns_are_refused(asks: Asks, sql: str) -> None:
    """SQLite asks nobody about the columns of USING and NATURAL."""
    status, told = await asks("limited", sql)

    assert status in (400, 403)
    assert SECRET not in str(told)
    assert "Eve" not in str(told)


ELSEWHERE = [
    "SELECT * FROM {}",
    "SELECT 1 FROM data.{}",
    "SELECT count(*) FROM {} h",
    "SELECT name FROM dog WHERE id IN (SELECT id FROM {})",
    "SELECT (SELECT text FROM {})",
    "WITH c AS (SELECT * FROM {}) SELECT * FROM c",
    "SELECT id FROM dog UNION SELECT id FROM data.{}",
    "WITH dog AS (SELECT * FROM data.{}) SELECT * FROM dog",
]


@pytest.mark.parametrize("role", ["reader", "limited"])
@pytest.mark.parametrize("sql", ELSEWHERE)
async def test_other_tables_are_as_if_they_were_not_there(asks: Asks, role: str, sql: str) -> None:
    """A table without rights is answered as one that nobody has made, as are the server's."""
    for table in ("hidden", "hidden2", "hdb_user", "sqlite_master"):
        status, told = await asks(role, sql.format(table))

        name = f"data.{table}" if "data.{}" in sql else table
        assert 403 == status
        assert [f"table '{name}' does not exist"] == told["invalid_schema_items"]
        assert [] == told["unauthorized_access"]


@pytest.mark.parametrize("role", ["reader", "limited", "writer", "none"])
@pytest.mark.parametrize("table", ["hdb_user", "hdb_token", "hdb_model_calls", "dog", "nothing"])
async def test_the_systems_tables_are_for_super_users(asks: Asks, role: str, table: str) -> None:
    """To all others there is no such database."""
    status, told = await asks(role, SYSTEM.replace("?", table))

    assert 403 == status
    assert ["database 'system' does not exist"] == told["invalid_schema_items"]


async def test_the_report_names_what_is_lacking(asks: Asks) -> None:
    """A table that may only be written, and an attribute likewise."""
    item = {"schema": "data", "table": "Dog"}
    status, told = await asks("writer", "SELECT name FROM dog")
    lacking = {"required_table_permissions": ["read"], "required_attribute_permissions": []}
    assert (403, [{**item, **lacking}]) == (status, told["unauthorized_access"])

    status, told = await asks("limited", "SELECT good FROM dog")
    good = {"attribute_name": "good", "required_permissions": ["read"]}
    lacking = {"required_table_permissions": [], "required_attribute_permissions": [good]}
    assert (403, [{**item, **lacking}]) == (status, told["unauthorized_access"])


async def test_a_super_user_is_told_what_is_missing(asks: Asks) -> None:
    """404 with the nearest name; a hidden column of the system's reads as null."""
    status, told = await asks("super", "SELECT * FROM data.dgo")
    assert (404, "There is no table 'dgo' in the database 'data': did you mean 'dog'?") == (
        status,
        told["error"],
    )
    assert 404 == (await asks("super", "SELECT * FROM data.hdb_user"))[0]
    rows = (await asks("super", "SELECT password FROM system.hdb_user"))[1]
    assert {None} == {row["password"] for row in rows}


async def test_the_columns_of_json_are_decoded(asks: Asks) -> None:
    """A role's permission is an object, as it was given."""
    status, rows = await asks("super", "SELECT permission FROM hdb_role WHERE id = 'writer'")

    assert 200 == status
    assert {"tables": ROLES["writer"]} == rows[0]["permission"]["data"]


async def test_what_json_becomes_is_64_mib_at_most(asks: Asks) -> None:
    """Lists are counted as what they take, not as the two letters that they are written with."""
    many = MANY.format(300_000)
    lists = f"'[' || (SELECT group_concat('[]') FROM ({many})) || ']'"  # noqa: S608
    names = {"tags": 400, "written": 200}
    for name, status in names.items():
        asked = f"SELECT {lists} AS {name} FROM dog, (SELECT 1 UNION SELECT 2)"  # noqa: S608
        told, rows = await asks("reader", asked)
        assert status == told, rows
        assert 4 == len(rows) if status == 200 else "larger than 64 MiB" in rows["error"]


MANY = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c LIMIT {}) SELECT x FROM c"


@pytest.mark.parametrize(
    ("asked", "told", "cut"), [(10_000, 10_000, None), (10_001, 10_000, "10000")]
)
async def test_an_answer_has_at_most_ten_thousand_rows(
    asks: Asks, asked: int, told: int, cut: str | None
) -> None:
    """A header says so where there were more."""
    body = {"operation": "sql", "sql": MANY.format(asked)}
    async with (
        asks.server.session() as client,
        client.post(f"{asks.server.operations_url}/", json=body) as answer,
    ):
        assert told == len(await answer.json())
        assert cut == answer.headers.get("x-harper-truncated")


async def test_a_statement_has_a_time_limit(asks: Asks) -> None:
    """It is 408 after five seconds, for whoever asks."""
    status, told = await asks(
        "reader", MANY.format(10**12).replace("SELECT x FROM", "SELECT sum(x) FROM")
    )

    assert 408 == status
    assert "was stopped after 5 s" in told["error"]


async def test_others_are_served_while_a_statement_is_understood(
    asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one takes a second."""
    admin = f"Bearer {asks.server.api_key}"
    begun, others = threading.Event(), threading.Event()
    understand = select.understand

    def slowly(*given: Any, **more: Any) -> select.Statement:
        begun.set()
        assert others.wait(10)
        return understand(*given, **more)

    monkeypatch.setattr(select, "understand", slowly)
    statement = asyncio.create_task(asks("reader", "SELECT 1 AS one"))
    assert await asyncio.to_thread(begun.wait, 10)
    assert 200 == (await operation(asks.server, {"operation": "user_info"}, admin))[0]
    others.set()

    assert (200, [{"one": 1}]) == await statement


async def test_a_statement_ends_when_nobody_waits_for_it(
    asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its time is up: its thread is for others."""
    begun, ended = threading.Event(), threading.Event()
    run_select = select_wall.run_select

    def watched(*given: Any, **more: Any) -> Any:
        begun.set()
        try:
            return run_select(*given, **more, seconds=60.0)
        finally:
            ended.set()

    monkeypatch.setattr(select_wall, "run_select", watched)
    sql = MANY.format(10**12).replace("SELECT x FROM", "SELECT sum(x) FROM")
    statement = asyncio.create_task(asks("reader", sql))
    assert await asyncio.to_thread(begun.wait, 10)
    statement.cancel()

    assert await asyncio.to_thread(ended.wait, 10)
