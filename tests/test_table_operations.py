"""Operations on tables: what is found, written and described, and by whom."""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from harperpy import Scope
from harperpy.testing import RunningServer, running
from helpers import operation


class Dog(msgspec.Struct):
    """What the table of these tests holds."""

    name: str
    id: int | None = None
    breed: str | None = None
    age: int = 0
    good: bool = True
    price: Decimal | None = None
    born: dt.date | None = None
    tags: list[str] = []
    chip: str = "secret-chip"


class Cat(msgspec.Struct):
    """Another table, with a key of its own name and no text that is made."""

    tag: str
    lives: int = 9


NAMES = ("Rex", "Ada", "Bello", "Rexona", "Ida*")
FULL = {"read": True, "insert": True, "update": True, "delete": True}


def limited(**of_attributes: list[str]) -> dict[str, Any]:
    """Rights on a table whose attributes are listed, each with what may be done."""
    listed = [
        {"attribute_name": name, **{right: right in rights for right in FULL if right != "delete"}}
        for name, rights in of_attributes.items()
    ]
    return {**FULL, "attribute_permissions": listed}


ROLES: dict[str, dict[str, Any]] = {
    "all": {"dog": FULL},
    "reader": {"dog": {"read": True}},
    "writer": {"dog": {"insert": True, "update": True}},
    "partly": {
        "dog": limited(
            id=["read", "insert"],
            name=["read", "insert", "update"],
            age=["read"],
            breed=["update"],
        )
    },
    "cats": {"cat": FULL},
    "keyless": {"cat": limited(lives=["read"])},
    "none": {},
}


class Caller:
    """Who asks the operations port."""

    def __init__(self, server: RunningServer, key: str) -> None:
        self.server = server
        self._credential = f"Bearer {key}"

    async def ask(self, name: str, /, **parameters: Any) -> tuple[int, Any]:
        """Status and body."""
        return await operation(self.server, {"operation": name, **parameters}, self._credential)

    async def get(self, name: str, /, **parameters: Any) -> Any:
        """The body of an answer that must be a good one."""
        status, body = await self.ask(name, **parameters)
        assert 200 == status, body
        return body


@pytest.fixture
async def admin() -> AsyncIterator[Caller]:
    """The super user of a server with five dogs and a cat."""

    async def tables(scope: Scope) -> None:
        await scope.database.tables.ensure("dog", Dog, index=["breed"])
        await scope.database.tables.ensure("cat", Cat, key="tag")

    async with running(handle_application=tables) as server:
        admin = Caller(server, server.api_key)
        dogs = [{"name": name, "age": at, "price": at * 10} for at, name in enumerate(NAMES)]
        await admin.get("insert", table="dog", records=dogs)
        await admin.get("insert", table="cat", records=[{"tag": "tom"}])
        yield admin


async def as_role(admin: Caller, role: str) -> Caller:
    """A user who may do with tables what `ROLES` says."""
    permission = {"data": {"tables": ROLES[role]}} if ROLES[role] else {}
    await admin.get("add_role", role=role, permission=permission)
    return Caller(admin.server, await admin.server.key_for(f"of-{role}", role=role))


def names(rows: list[dict[str, Any]]) -> list[str]:
    """The dogs' names."""
    return [row["name"] for row in rows]


# Searching


async def test_records_are_found_by_their_keys(admin: Caller) -> None:
    """Those that there are, in the order of the keys, whole or with the attributes asked for."""
    (whole,) = await admin.get("search_by_id", table="dog", ids=[1])

    assert {
        "id": 1,
        "name": "Rex",
        "breed": None,
        "age": 0,
        "good": True,
        "price": 0,
        "born": None,
        "tags": [],
        "chip": "secret-chip",
    } == whole
    asked = {"schema": "data", "table": "dog", "hash_values": [3, 99, 1, "2"]}
    rows = await admin.get("search_by_hash", **asked, get_attributes=["name"])
    assert [{"name": "Bello"}, {"name": "Rex"}, {"name": "Ada"}] == rows
    (some,) = await admin.get("search_by_id", table="dog", ids=[1], get_attributes="id, name")
    assert {"id": 1, "name": "Rex"} == some


BY_VALUE: dict[str, tuple[str, Any, list[str]]] = {
    "a text": ("name", "Rex", ["Rex"]),
    "another case": ("name", "rex", []),
    "a beginning": ("name", "Rex*", ["Rex", "Rexona"]),
    "an end": ("name", "*a", ["Ada", "Rexona"]),
    "a middle": ("name", "*d*", ["Ada", "Ida*"]),
    "a star within": ("name", "I*a", []),
    "anything": ("name", "*", [*NAMES]),
    "an integer": ("age", 3, ["Rexona"]),
    "an integer as text": ("age", "3", ["Rexona"]),
    "true": ("good", True, [*NAMES]),
    "null": ("breed", None, [*NAMES]),
    "anything but null": ("breed", "*", []),
    "a price": ("price", 20, ["Bello"]),
    "a price as text": ("price", "20.00", ["Bello"]),
    "what SQL would take for more": ("name", "' OR 1=1 --", []),
}


@pytest.mark.parametrize(("attribute", "value", "expected"), BY_VALUE.values(), ids=BY_VALUE)
async def test_records_are_found_by_a_value(
    admin: Caller, attribute: str, value: Any, expected: list[str]
) -> None:
    """Equal to it, or like a text with a star at its ends; old names of parameters count."""
    rows = await admin.get("search_by_value", table="dog", attribute=attribute, value=value)

    assert expected == names(rows)
    old = {"search_attribute": attribute, "search_value": value, "limit": 2, "offset": 1}
    assert expected[1:3] == names(await admin.get("search_by_value", table="dog", **old))


BY_CONDITIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "equals": ({"attribute": "name", "value": "Ada"}, ["Ada"]),
    "old names": (
        {"search_attribute": "name", "search_type": "equals", "search_value": "Ada"},
        ["Ada"],
    ),
    "not equal": (
        {"attribute": "age", "comparator": "not_equal", "value": 2},
        ["Rex", "Ada", "Rexona", "Ida*"],
    ),
    "greater": ({"attribute": "age", "comparator": "greater_than", "value": 3}, ["Ida*"]),
    "gt": ({"attribute": "age", "comparator": "gt", "value": 3}, ["Ida*"]),
    "ge": ({"attribute": "age", "comparator": "greater_than_equal", "value": 4}, ["Ida*"]),
    "lt": ({"attribute": "age", "comparator": "less_than", "value": 1}, ["Rex"]),
    "le": ({"attribute": "age", "comparator": "less_than_equal", "value": 0}, ["Rex"]),
    "between": (
        {"attribute": "age", "comparator": "between", "value": [1, 2]},
        ["Ada", "Bello"],
    ),
    "a price between": (
        {"attribute": "price", "comparator": "between", "value": ["9.5", 30]},
        ["Ada", "Bello", "Rexona"],
    ),
    "less than true": ({"attribute": "good", "comparator": "lt", "value": True}, []),
    "false to false": (
        {"attribute": "good", "comparator": "between", "value": [False, False]},
        [],
    ),
    "contains": ({"attribute": "name", "comparator": "contains", "value": "ell"}, ["Bello"]),
    "starts with": (
        {"attribute": "name", "comparator": "starts_with", "value": "Rex"},
        ["Rex", "Rexona"],
    ),
    "ends with": ({"attribute": "name", "comparator": "ends_with", "value": "*"}, ["Ida*"]),
    "ends with nothing": (
        {"attribute": "name", "comparator": "ends_with", "value": ""},
        [*NAMES],
    ),
    "or within": (
        {
            "operator": "or",
            "conditions": [{"attribute": "age", "value": 0}, {"attribute": "age", "value": 4}],
        },
        ["Rex", "Ida*"],
    ),
}


@pytest.mark.parametrize(("condition", "expected"), BY_CONDITIONS.values(), ids=BY_CONDITIONS)
async def test_records_are_found_by_conditions(
    admin: Caller, condition: dict[str, Any], expected: list[str]
) -> None:
    """Each comparison, alone and beside one that is always true."""
    always = {"attribute": "good", "value": True}
    search = {"table": "dog", "conditions": [condition]}

    assert expected == names(await admin.get("search_by_conditions", **search))
    both = {**search, "operator": "and", "conditions": [always, condition]}
    assert expected == names(await admin.get("search_by_conditions", **both))
    either = {**search, "operator": "OR", "conditions": [always, condition]}
    assert [*NAMES] == names(await admin.get("search_by_conditions", **either))


async def test_what_is_found_is_sorted_and_cut(admin: Caller) -> None:
    """By one attribute, then the next; from an offset, up to a limit; some attributes alone."""
    await admin.get("update", table="dog", records=[{"id": 1, "breed": "x"}])
    found = await admin.get(
        "search_by_conditions",
        table="dog",
        conditions=[{"attribute": "id", "comparator": "gt", "value": 0}],
        sort={"attribute": "breed", "next": {"attribute": "name", "descending": True}},
        get_attributes=["name", "breed"],
        offset=1,
        limit=4,
    )

    others = [{"name": name, "breed": None} for name in ("Ida*", "Bello", "Ada")]
    assert [*others, {"name": "Rex", "breed": "x"}] == found


SOUGHT = {"attribute": "name", "comparator": "contains", "value": "x" * 70}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("search_by_id", {"ids": 1}, "ids"),
    ("search_by_id", {}, "ids"),
    ("search_by_id", {"ids": ["x"]}, "ids[0]"),
    ("search_by_id", {"ids": [1], "get_attributes": ["nmae"]}, "nmae"),
    ("search_by_id", {"ids": [1], "hash_values": [1]}, "hash_values"),
    ("search_by_value", {"attribute": "name"}, "value"),
    ("search_by_value", {"attribute": "nmae", "value": 1}, "nmae"),
    ("search_by_value", {"attribute": "age", "value": "old"}, "age"),
    ("search_by_value", {"attribute": "age", "value": "1*"}, "value"),
    ("search_by_value", {"attribute": "name", "value": f"*{'x' * 201}*"}, "200 characters"),
    ("search_by_value", {"attribute": "tags", "value": []}, "tags"),
    ("search_by_value", {"attribute": "name", "value": "x", "limit": 0}, "limit"),
    ("search_by_value", {"attribute": "name", "value": "x", "limit": 10_001}, "limit"),
    ("search_by_value", {"attribute": "name", "value": "x", "offset": -1}, "offset"),
    ("search_by_conditions", {"conditions": []}, "conditions"),
    (
        "search_by_conditions",
        {"operator": "or", "conditions": [SOUGHT] * 3},
        "conditions[2].value: expected at most 200 characters in all",
    ),
    ("search_by_conditions", {"conditions": [{}]}, "conditions[0]"),
    ("search_by_conditions", {"conditions": [{"attribute": "x", "value": 1}]}, "conditions[0]"),
    (
        "search_by_conditions",
        {"conditions": [{"attribute": "age", "comparator": "like", "value": 1}]},
        "conditions[0].comparator",
    ),
    (
        "search_by_conditions",
        {"conditions": [{"attribute": "age", "comparator": "between", "value": 1}]},
        "conditions[0].value",
    ),
    (
        "search_by_conditions",
        {"conditions": [{"attribute": "breed", "comparator": "gt", "value": None}]},
        "conditions[0].value: expected a value, got null",
    ),
    (
        "search_by_conditions",
        {"conditions": [{"attribute": "breed", "comparator": "between", "value": ["a", None]}]},
        "conditions[0].value: expected a value, got null",
    ),
    (
        "search_by_conditions",
        {"conditions": [{"attribute": "age", "value": 1}], "sort": {"attribute": "x"}},
        "sort",
    ),
    ("search_by_conditions", {"conditions": [{"attribute": "age", "value": 1}] * 101}, "100"),
    ("search_by_value", {"attribute": "nmae", "value": 1}, "did you mean 'name'?"),
    ("search_by_id", {"ids": [1], "get_attributes": "nmae"}, "did you mean 'name'?"),
    ("insert", {"records": []}, "records"),
    ("insert", {"records": [{}]}, "records[0]"),
    ("insert", {"records": [{"name": "x"}] * 10_001}, "records: Expected `array` of length <= 1"),
    ("upsert", {"records": [{"name": "x"}] * 10_001}, "records: Expected `array` of length <= 1"),
    ("delete", {"ids": [9] * 10_001}, "ids: Expected `array` of length <= 10000"),
    ("insert", {"records": [{"name": "x"}, {"name": 7}]}, "records[1]: name"),
    ("insert", {"records": [{"name": "x", "nmae": "y"}]}, "did you mean 'name'"),
    ("insert", {"records": [{"name": "x", "id": "y"}]}, "records[0]: id"),
    ("update", {"records": [{"name": "x"}]}, "records[0].id"),
    ("update", {"records": [{"id": 1, "name": None}]}, "records[0]: name"),
    ("upsert", {"records": [{"id": 1, "age": "x"}]}, "records[0]: age"),
    ("delete", {"ids": []}, "ids"),
    ("delete", {"ids": [1, {}]}, "ids[1]"),
    ("describe_table", {"databse": "data"}, "databse"),
]


def deep(levels: int) -> dict[str, Any]:
    """Conditions within conditions."""
    inner: dict[str, Any] = {"attribute": "age", "value": 1}
    for _ in range(levels):
        inner = {"conditions": [inner]}
    return inner


@pytest.mark.parametrize(("name", "parameters", "told"), WRONG)
async def test_what_does_not_fit_is_named(
    admin: Caller, name: str, parameters: dict[str, Any], told: str
) -> None:
    """It is 400, and nothing was written, not even the records before it."""
    before = await admin.get("search_by_value", table="dog", attribute="id", value="*")

    status, body = await admin.ask(name, table="dog", **parameters)

    assert 400 == status
    assert told in body["error"]
    assert before == await admin.get("search_by_value", table="dog", attribute="id", value="*")


async def test_a_long_search_ends_and_keeps_nobody_out(admin: Caller) -> None:
    """It is 408 after five seconds; meanwhile keys are looked up, and who leaves ends theirs."""
    for _ in range(30):
        await admin.get("insert", table="dog", records=[{"name": "x" * 1_000_000}])
    key = await admin.server.key_for("ann", role="super_user")
    ends = [f"x{chr(at)}" for at in range(200, 300)]
    conditions = [{"attribute": "name", "comparator": "ct", "value": end} for end in ends]
    search = {"table": "dog", "operator": "or", "conditions": conditions}
    left, *others = (
        asyncio.create_task(admin.ask("search_by_conditions", **search)) for _ in range(5)
    )
    assert 200 == (await Caller(admin.server, key).ask("user_info"))[0]
    assert not any(one.done() for one in others)
    left.cancel()
    for status, body in await asyncio.gather(*others):
        assert (408, True) == (status, "was stopped: ask for less" in body["error"])
    assert 1 == len(await admin.get("search_by_id", table="dog", ids=[1]))


async def test_conditions_have_a_depth(admin: Caller) -> None:
    """Eight levels of groups are taken, nine are not."""
    search = {"table": "dog", "conditions": [deep(7)]}
    assert ["Ada"] == names(await admin.get("search_by_conditions", **search))

    status, told = await admin.ask("search_by_conditions", table="dog", conditions=[deep(8)])

    assert 400 == status
    assert "levels" in told["error"]


# Writing


async def test_records_are_inserted_and_those_that_are_there_skipped(admin: Caller) -> None:
    """The answer lists the keys of both; a key that is not given is made."""
    new = [{"name": "New"}, {"name": "Taken", "id": 1}, {"name": "Own", "id": 50}]

    done = await admin.get("insert", database="data", table="dog", records=new)

    assert {
        "message": "inserted 2 of 3 records",
        "inserted_hashes": [6, 50],
        "skipped_hashes": [1],
    } == done
    rows = await admin.get("search_by_id", table="dog", ids=[1, 6, 50])
    assert ["Rex", "New", "Own"] == names(rows)


async def test_records_are_updated_by_the_attributes_given(admin: Caller) -> None:
    """All others stay; one that is not there is skipped."""
    changes = [{"id": 1, "age": 7}, {"id": 99, "age": 8}, {"id": 2}]

    done = await admin.get("update", table="dog", records=changes)

    assert {
        "message": "updated 2 of 3 records",
        "update_hashes": [1, 2],
        "skipped_hashes": [99],
    } == done
    (rex,) = await admin.get("search_by_id", table="dog", ids=[1])
    assert ("Rex", 7, "secret-chip") == (rex["name"], rex["age"], rex["chip"])


async def test_records_are_upserted(admin: Caller) -> None:
    """What is there keeps the attributes that are not given, what is not is added."""
    records = [{"id": 1, "name": "Rexi"}, {"id": 70, "name": "New"}, {"name": "Keyless"}]
    await admin.get("update", table="dog", records=[{"id": 1, "breed": "x"}])

    done = await admin.get("upsert", table="dog", records=records)

    hashes = [1, 70, 71]
    assert {"message": "upserted 3 of 3 records", "upserted_hashes": hashes} == done
    rows = await admin.get("search_by_id", table="dog", ids=hashes)
    assert [("Rexi", "x"), ("New", None), ("Keyless", None)] == [
        (row["name"], row["breed"]) for row in rows
    ]


async def test_records_are_deleted(admin: Caller) -> None:
    """Those that there are; the answer lists both."""
    one = await admin.get("delete", table="cat", hash_values=["tom"])
    two = await admin.get("delete", table="dog", ids=[1, 99])

    assert "1 of 1 record successfully deleted" == one["message"]
    assert {
        "message": "1 of 2 records successfully deleted",
        "deleted_hashes": [1],
        "skipped_hashes": [99],
    } == two
    assert [] == await admin.get("search_by_id", table="dog", ids=[1])


async def test_each_write_is_audited_with_its_author(admin: Caller) -> None:
    """Who, what, which records, and that it came as an operation."""
    ada = await as_role(admin, "all")
    await ada.get("insert", table="dog", records=[{"name": "New"}])
    await ada.get("update", table="dog", records=[{"id": 6, "age": 5}])
    await ada.get("delete", table="dog", ids=[6])

    rows = await admin.get(
        "read_audit_log", table="dog", search_type="username", search_values=["of-all"]
    )

    assert [("delete", [6]), ("update", [6]), ("insert", [6])] == [
        (row["operation"], row["hash_values"]) for row in rows
    ]
    assert {("data", "ops")} == {(row["database"], row["source"]) for row in rows}
    assert [{"age": 5}] == rows[1]["records"]


async def test_the_systems_own_tables_are_read_by_super_users_and_written_by_nobody(
    admin: Caller,
) -> None:
    """Without the columns that hold secrets; a write is 403 and says why."""
    search = {"database": "system", "table": "hdb_user", "ids": ["HDB_ADMIN"]}
    (user,) = await admin.get("search_by_id", **search)
    assert {"username", "role", "active"} < set(user)
    assert "password" not in user
    told = await admin.ask("search_by_id", **search, get_attributes=["password"])
    assert 400 == told[0]
    rows = {"database": "system", "table": "hdb_audit"}
    told = await admin.ask("search_by_id", **rows, ids=[1 << 63])
    assert (400, "ids[0]: id: Expected `int` <=") == (told[0], told[1]["error"][:29])
    for name in ("insert", "upsert", "update"):
        for schema in ("system", "data"):
            record = {"username": "HDB_ADMIN", "role": "x"}
            status, body = await admin.ask(name, schema=schema, table="hdb_user", records=[record])
            assert (403 if schema == "system" else 404) == status
    status, body = await admin.ask("delete", schema="system", table="hdb_user", ids=["x"])
    assert (403, "The 'system' database, tables") == (status, body["error"][:29])


# Describing


async def test_tables_are_described(admin: Caller) -> None:
    """Alone, by database, or all of them: key, attributes, how many records."""
    dog = await admin.get("describe_table", table="dog")

    assert ("data", "dog", "id", 5) == tuple(
        dog[key] for key in ("schema", "name", "hash_attribute", "record_count")
    )
    attributes = {one["attribute"]: one for one in dog["attributes"]}
    assert [field.name for field in msgspec.structs.fields(Dog)] == [*attributes]
    assert attributes["id"]["is_primary_key"]
    assert attributes["breed"]["indexed"]
    assert dog["db_size"] > 0
    assert {"cat", "dog"} == set(await admin.get("describe_database", schema="data"))
    assert {"data": {"cat", "dog"}} == {
        name: set(tables) for name, tables in (await admin.get("describe_all")).items()
    }
    system = await admin.get("describe_database", database="system")
    assert "password" not in str(system["hdb_user"]["attributes"])


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("describe_table", {"table": "dgo"}, "table 'data.dgo' does not exist"),
        ("describe_table", {"table": "dog", "schema": "x"}, "database 'x' does not exist"),
        ("describe_database", {"database": "x"}, "database 'x' does not exist"),
        ("search_by_id", {"table": "dgo", "ids": [1]}, "table 'data.dgo' does not exist"),
        ("delete", {"table": "DOG", "ids": [1]}, "table 'data.DOG' does not exist"),
    ],
)
async def test_what_is_not_there_is_404(
    admin: Caller, name: str, parameters: dict[str, Any], told: str
) -> None:
    """Said so to super users, who may know."""
    assert (404, {"error": told}) == await admin.ask(name, **parameters)


# Who may what

ATTEMPTS: dict[str, dict[str, Any]] = {
    "search_by_id": {"ids": [1]},
    "search_by_hash": {"hash_values": [1]},
    "search_by_value": {"attribute": "name", "value": "Rex"},
    "search_by_conditions": {"conditions": [{"attribute": "name", "value": "Rex"}]},
    "insert": {"records": [{"name": "x"}]},
    "upsert": {"records": [{"id": 1, "name": "x"}]},
    "update": {"records": [{"id": 1, "name": "x"}]},
    "delete": {"ids": [1]},
    "describe_table": {},
}
READS = {name for name in ATTEMPTS if name.startswith("search")}
MAY = {
    "all": {*ATTEMPTS},
    "reader": {*READS, "describe_table"},
    "writer": {"insert", "upsert", "update", "describe_table"},
    "partly": {*READS, "insert", "upsert", "update", "delete", "describe_table"},
    "cats": set[str](),
    "none": set[str](),
}


@pytest.mark.parametrize("role", MAY)
async def test_a_role_opens_what_it_says_and_no_more(admin: Caller, role: str) -> None:
    """All else is 403 with a report, and changes nothing."""
    caller = await as_role(admin, role)

    allowed = set[str]()
    for name, parameters in ATTEMPTS.items():
        before = await admin.get("search_by_value", table="dog", attribute="id", value="*")
        status, body = await caller.ask(name, table="dog", **parameters)
        if status == 200:
            allowed.add(name)
            continue
        assert 403 == status, body
        assert {"error", "unauthorized_access", "invalid_schema_items"} == set(body)
        assert before == await admin.get("search_by_value", table="dog", attribute="id", value="*")

    assert MAY[role] == allowed


ERROR = "This operation is not authorized due to role restrictions and/or invalid database items"


async def test_the_report_names_what_is_lacking(admin: Caller) -> None:
    """The actions on the table, and the attributes that are known to the role."""
    reader, partly = await as_role(admin, "reader"), await as_role(admin, "partly")

    status, told = await reader.ask("upsert", table="dog", records=[{"name": "x"}])

    item = {"schema": "data", "table": "dog"}
    lacking = {"required_table_permissions": ["insert", "update"]}
    assert 403 == status
    assert {
        "error": ERROR,
        "unauthorized_access": [{**item, **lacking, "required_attribute_permissions": []}],
        "invalid_schema_items": [],
    } == told

    record = {"id": 1, "age": 1, "chip": "x", "nothing": 1}
    status, told = await partly.ask("update", table="dog", records=[record])

    needed = {"attribute_name": "age", "required_permissions": ["update"]}
    lacking = {"required_table_permissions": [], "required_attribute_permissions": [needed]}
    assert 403 == status
    assert [{**item, **lacking}] == told["unauthorized_access"]
    assert [
        "attribute 'chip' does not exist on 'data.dog'",
        "attribute 'nothing' does not exist on 'data.dog'",
    ] == told["invalid_schema_items"]


@pytest.mark.parametrize("role", ["cats", "none"])
async def test_what_is_closed_is_as_if_it_were_not_there(admin: Caller, role: str) -> None:
    """The report on a table without any right is that on one that nobody has made."""
    caller = await as_role(admin, role)

    for name, parameters in ATTEMPTS.items():
        closed = await caller.ask(name, table="dog", **parameters)
        missing = await caller.ask(name, table="dgo", **parameters)

        assert 403 == closed[0] == missing[0]
        assert missing[1] == eval(str(closed[1]).replace("dog", "dgo"))  # noqa: S307
        assert [] == closed[1]["unauthorized_access"]
    tables = (await caller.get("describe_all"))["data"]
    assert ({"cat"} if role == "cats" else set[str]()) == set(tables)
    status, told = await caller.ask("describe_database", database="system")
    assert (403, ["database 'system' does not exist"]) == (status, told["invalid_schema_items"])
    status, told = await caller.ask("search_by_id", schema="system", table="hdb_user", ids=["x"])
    assert (403, ["database 'system' does not exist"]) == (status, told["invalid_schema_items"])


HIDDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "asked for": ("search_by_id", {"ids": [1], "get_attributes": ["chip"]}),
    "compared": ("search_by_value", {"attribute": "chip", "value": "*"}),
    "in a condition": (
        "search_by_conditions",
        {"conditions": [{"conditions": [{"attribute": "chip", "value": "x"}]}]},
    ),
    "sorted by": (
        "search_by_conditions",
        {
            "conditions": [{"attribute": "age", "value": 1}],
            "sort": {"attribute": "age", "next": {"attribute": "chip"}},
        },
    ),
    "written": ("insert", {"records": [{"name": "x"}, {"name": "x", "chip": "y"}]}),
    "changed": ("upsert", {"records": [{"id": 1, "name": "x", "chip": "y"}]}),
}


@pytest.mark.parametrize(("name", "parameters"), HIDDEN.values(), ids=HIDDEN)
async def test_a_hidden_attribute_is_neither_read_nor_compared_nor_written(
    admin: Caller, name: str, parameters: dict[str, Any]
) -> None:
    """It is as if it were not there."""
    caller = await as_role(admin, "partly")

    status, told = await caller.ask(name, table="dog", **parameters)

    assert 403 == status
    assert ["attribute 'chip' does not exist on 'data.dog'"] == told["invalid_schema_items"]
    assert "secret-chip" not in str(told)


async def test_a_hidden_key_finds_no_record(admin: Caller) -> None:
    """Who may not read the keys learns of none whether it is there, or whose it is."""
    caller = await as_role(admin, "keyless")

    for key in ("tom", "nobody"):
        status, told = await caller.ask("search_by_id", table="cat", ids=[key])
        assert 403 == status
        assert ["attribute 'tag' does not exist on 'data.cat'"] == told["invalid_schema_items"]
    everything = {"conditions": [{"attribute": "lives", "value": 9}]}
    assert [{"lives": 9}] == await caller.get("search_by_conditions", table="cat", **everything)


async def test_whole_records_are_without_what_is_hidden(admin: Caller) -> None:
    """Of a star only what may be read is shown; a description has what may be touched."""
    caller = await as_role(admin, "partly")

    for name in READS:
        (row,) = await caller.get(name, table="dog", **ATTEMPTS[name])
        assert {"id": 1, "name": "Rex", "age": 0} == row
        (row,) = await caller.get(name, table="dog", get_attributes=["*"], **ATTEMPTS[name])
        assert {"id": 1, "name": "Rex", "age": 0} == row
    described = await caller.get("describe_table", table="dog")
    assert ["name", "id", "breed", "age"] == [one["attribute"] for one in described["attributes"]]


async def test_an_upsert_leaves_what_is_hidden_as_it_is(admin: Caller) -> None:
    """Attributes that a role does not know keep their values."""
    caller = await as_role(admin, "partly")
    await admin.get("update", table="dog", records=[{"id": 1, "chip": "mine"}])

    await caller.get("upsert", table="dog", records=[{"id": 1, "name": "Rexi"}])

    (rex,) = await admin.get("search_by_id", table="dog", ids=[1])
    assert ("Rexi", "mine") == (rex["name"], rex["chip"])
