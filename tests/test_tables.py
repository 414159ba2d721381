"""Tables made of Structs, over REST and from code."""

import asyncio
import datetime as dt
import enum
import os
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import msgspec
import pytest
import sqlalchemy as sa

from commands import ADMIN, FREE, serving
from harperpy import (
    ClientError,
    Context,
    RegistrationError,
    RequestTarget,
    Resource,
    Scope,
    Table,
    TableResource,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import Answered, ask, ask_raw

PAGE = Path(__file__).parent.parent / "docs" / "tables.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Note(msgspec.Struct, rename="camel"):
    """What the tests keep."""

    text: Annotated[str, msgspec.Meta(max_length=9)]
    id: int | None = None
    num_stars: int = 0
    topic: str | None = None
    tags: list[str] = []


class Notes(TableResource):
    """The notes over REST."""

    record = Note
    index = ("topic",)
    page = 3
    most = 5


async def mount(scope: Scope) -> None:
    """A plugin that serves notes, and records with a field of each kind."""
    scope.resources.set("notes", await Notes.of(scope.database.tables))
    everything = await scope.database.tables.ensure("everything", Everything)
    scope.resources.set("all", TableResource.over(everything))


async def fill(server: RunningServer, count: int) -> None:
    """So many notes: n0, n1 ... with as many stars, every other one of the topic `odd`."""
    for at in range(count):
        note = {"text": f"n{at}", "numStars": at, "topic": "odd" if at % 2 else None}
        assert 201 == (await ask(server, "POST", "/notes", json=note)).status


async def test_a_record_is_made_read_replaced_changed_and_removed() -> None:
    """Each verb answers with its own status, and the record is what the verbs made of it."""
    async with running(handle_application=mount) as server:
        made = await ask(server, "POST", "/notes", json={"text": "one", "tags": ["a"]})
        whole = {"text": "one", "id": 1, "numStars": 0, "topic": None, "tags": ["a"]}
        assert (201, "/notes/1", whole) == (made.status, made.headers["Location"], made.json)
        assert whole == (await ask(server, "GET", "/notes/1")).json

        put = await ask(server, "PUT", "/notes/1", json={"text": "two", "topic": "t"})
        assert (204, "") == (put.status, put.text)
        patched = await ask(server, "PATCH", "/notes/1", json={"numStars": 7})
        assert (204, "") == (patched.status, patched.text)
        now = (await ask(server, "GET", "/notes/1")).json
        assert {"text": "two", "id": 1, "numStars": 7, "topic": "t", "tags": []} == now

        assert 204 == (await ask(server, "PUT", "/notes/40", json={"text": "new"})).status
        assert 204 == (await ask(server, "DELETE", "/notes/1")).status
        left = await ask(server, "GET", "/notes/")
        assert [40] == [note["id"] for note in left.json]
        assert [404, 404] == [
            (await ask(server, method, "/notes/1")).status for method in ("GET", "DELETE")
        ]


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        pytest.param("topic=odd", ["n1", "n3", "n5"], id="equal"),
        pytest.param("topic==odd", ["n1", "n3", "n5"], id="equal, as FIQL says it"),
        pytest.param("topic=null", ["n0", "n2", "n4"], id="empty"),
        pytest.param("topic!=null", ["n1", "n3", "n5"], id="not empty"),
        pytest.param("text!=n0&numStars=lt=3", ["n1", "n2"], id="not equal and less"),
        pytest.param("numStars=ge=1&numStars=le=2", ["n1", "n2"], id="from to"),
        pytest.param("numStars=gt=3&sort(-numStars)", ["n5", "n4"], id="more, downwards"),
        pytest.param("sort(+topic,-numStars)&limit=2", ["n4", "n2"], id="by two fields"),
        pytest.param("sort=-num%53tars&limit(1)", ["n5"], id="encoded name"),
        pytest.param("text=n%31", ["n1"], id="encoded value"),
        pytest.param("text=ct=%31", ["n1"], id="contains"),
        pytest.param("text=sw=n&topic=sw=od&limit(2)", ["n1", "n3"], id="starts with"),
        pytest.param("text=ew=4&topic=null", ["n4"], id="ends with"),
        pytest.param("topic=ct=ODD", [], id="capitals count"),
        pytest.param("text=sw=%25", [], id="no pattern"),
        pytest.param("limit(4,6)", ["n4", "n5"], id="a slice"),
        pytest.param("limit=2&offset=1", ["n1", "n2"], id="limit and offset"),
        pytest.param("limit=0", [], id="none"),
        pytest.param("", ["n0", "n1", "n2"], id="a page"),
    ],
)
async def test_a_list_is_what_the_query_asks_for(query: str, texts: list[str]) -> None:
    """Conditions, order and limits hold together."""
    async with running(handle_application=mount) as server:
        await fill(server, 6)
        found = await ask(server, "GET", f"/notes?{query}")
    assert (200, texts) == (found.status, [note["text"] for note in found.json])


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        pytest.param("/notes?select(id,text)", [{"id": 1, "text": "n0"}], id="fields"),
        pytest.param("/notes?select=id,text", [{"id": 1, "text": "n0"}], id="fields, plainly"),
        pytest.param("/notes?select(text)", ["n0"], id="values"),
        pytest.param("/notes?select=text", [{"text": "n0"}], id="one field"),
        pytest.param("/notes/1?select(numStars)", 0, id="a value of one record"),
    ],
)
async def test_only_what_is_selected_is_sent(path: str, answer: Any) -> None:
    """`select` names the fields; in brackets a single one gives bare values."""
    async with running(handle_application=mount) as server:
        await fill(server, 1)
        assert answer == (await ask(server, "GET", path)).json


async def pages(server: RunningServer, path: str) -> list[Any]:
    """The records of a list and of those that each `Link` leads to."""
    records = list[Any]()
    while path:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\n\r\n"
        found = await ask_raw(server, head)
        records += found.json
        link = re.fullmatch(r'<([^>]+)>; rel="next"', found.headers.get("Link", ""))
        path = link[1] if link else ""
    return records


async def test_a_link_leads_through_all_pages() -> None:
    """Whoever follows `rel="next"` gets each record once, by the same conditions."""
    async with running(handle_application=mount) as server:
        await fill(server, 8)
        notes = await pages(server, "/notes?text!=n0&text!=a>b&sort(-numStars)")
    assert ["n7", "n6", "n5", "n4", "n3", "n2", "n1"] == [note["text"] for note in notes]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("query", ["topic=other", "to%70ic!=null", "select(id)&numStars=gt=9"])
async def test_a_condition_on_one_record_is_refused(method: str, query: str) -> None:
    """It would be done without it; what names no field is left to whoever wrote the class."""
    async with running(handle_application=mount) as server:
        await fill(server, 1)
        body = None if method in ("GET", "DELETE") else {"text": "new"}
        refused = await ask(server, method, f"/notes/1?{query}", json=body)
        left = (await ask(server, "GET", "/notes/1?limit=1&select(text)")).json
        other = await ask(server, "DELETE", "/notes/1?why=old")
    assert 400 == refused.status
    assert "conditions are for lists; for a version of one there is If-Match" in refused.text
    assert ("n0", 204) == (left, other.status)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tpic=a", "tpic: unknown field; did you mean 'topic'?"),
        ("numStars=x", "numStars: Expected `int`, got `str`"),
        ("numStars=99999999999999999999", "numStars: expected an integer of 64 bits"),
        ("tags=a", "query: tags: what is kept as JSON cannot be compared, but with null"),
        ("sort(-tags)", "query: sort: tags: what is kept as JSON has no order"),
        ("topic=gt=null", "query: topic: null has no order: expected =null or !=null"),
        ("text=zz=1", "query: text: unknown comparison '=zz='; there are =, ==, !=, "),
        ("text", "query: text: expected FIELD=VALUE"),
        ("numStars=ct=1", "query: numStars: =ct= is for texts alone"),
        ("text=ew=", "query: text: =ew=: expected a text of 1 to 200 characters"),
        (f"text=sw={'a' * 201}", "query: text: =sw=: expected a text of 1 to 200 characters"),
        ("sort(x)", "query: x: unknown field"),
        ("select(x)", "query: x: unknown field"),
        ("limit=x", "query: limit: expected an integer of 0 or more, got 'x'"),
        ("offset=-1", "query: offset: expected an integer of 0 or more, got '-1'"),
        ("limit=6", "query: limit: expected at most 5, got 6"),
        ("&".join(["topic=a"] * 101), "query: expected at most 100 conditions"),
        ("&".join([f"text=ct={'a' * 70}"] * 3), "query: text: =ct=: expected at most 200 char"),
        (f"sort={'id,' * 3000}", "query: sort: expected each field once"),
    ],
)
async def test_a_query_that_cannot_be_is_400(query: str, said: str) -> None:
    """The refusal names the field and what was expected."""
    async with running(handle_application=mount) as server:
        found = await ask(server, "GET", f"/notes?{query}")
    assert 400 == found.status
    assert said in found.json["detail"]


BARS: dict[str, str | None] = {
    "text=a|topic=b": "query: text: expected '&' before topic: '|' is none here",
    "text=gt=a|numStars!=1": "query: text: expected '&' before numStars: '|' is none here",
    "text=a%7Ctopic=b": None,
    "text=a|b": None,
    "text=a|b=c": None,
    "text=a||": None,
}


@pytest.mark.parametrize(("query", "said"), BARS.items(), ids=BARS)
async def test_a_bar_between_conditions_is_refused(query: str, said: str | None) -> None:
    """It is Harper's or; where no condition follows, and as `%7C`, it is the sign itself."""
    async with running(handle_application=mount) as server:
        line = f"GET /notes?{query} HTTP/1.1\r\nHost: x\r\n"
        found = await ask_raw(server, f"{line}Authorization: Bearer {server.api_key}\r\n\r\n")
    if said is None:
        assert (200, []) == (found.status, found.json)
    else:
        assert 400 == found.status
        assert said in found.json["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/notes", {"text": "long enough"}, 400, "text: Expected `str` of length <= 9"),
        ("POST", "/notes", {}, 400, "Object missing required field `text`"),
        ("POST", "/notes", {"txt": "a"}, 400, "txt: unknown field; did you mean 'text'?"),
        (
            "POST",
            "/notes",
            {"text": "a", "numStars": 1 << 63},
            400,
            "numStars: expected an integer",
        ),
        ("POST", "/notes", ["a"], 400, "expected a JSON object"),
        ("POST", "/notes", {"text": "a", "id": 1}, 409, "a record with that key already"),
        ("POST", "/notes/1", {"text": "a"}, 405, "Method POST is not allowed here"),
        ("PUT", "/notes", {"text": "a"}, 405, "Method PUT is not allowed here"),
        ("PUT", "/notes/1", {"text": "a", "id": 2}, 400, "id: expected 1 as in the path, got 2"),
        ("PUT", "/notes/x", {"text": "a"}, 404, "Not found"),
        ("PUT", "/notes/null", {"text": "a"}, 404, "Not found"),
        ("PATCH", "/notes/1", {"id": 2}, 400, "id: expected 1 as in the path, got 2"),
        ("PUT", f"/notes/{1 << 64}", {"text": "a"}, 404, "Not found"),
        ("PATCH", "/notes/1", {"numStars": "a"}, 400, "numStars: Expected `int`, got `str`"),
        ("PATCH", "/notes/1", {"text": None}, 400, "text: Expected `str`, got `null`"),
        ("PATCH", "/notes/7", {"text": "a"}, 404, "Not found"),
        ("POST", "/all", {"moment": "0001-01-01T00:00:00+01:00"}, 400, "moment: expected a moment"),
        ("POST", "/all", {"price": "NaN"}, 400, "price: expected a finite number"),
        ("POST", "/all", {"any": 1 << 64}, 400, "any: expected an integer of 64 bits"),
        ("POST", "/all", {"id": "x.csv"}, 400, "'x.csv' cannot be at the end of a path"),
        ("POST", "/all", {"id": "a/../x"}, 400, "'a/../x' cannot be at the end of a path"),
        ("POST", "/all", {"id": "/x"}, 400, "'/x' cannot be at the end of a path"),
        ("POST", "/all", {"id": ""}, 400, "'' cannot be at the end of a path"),
        ("DELETE", "/notes", None, 405, "Method DELETE is not allowed here"),
    ],
)
async def test_a_write_that_cannot_be_changes_nothing(
    method: str, path: str, body: Any, status: int, said: str
) -> None:
    """The refusal says what does not fit, and the records are as they were."""
    async with running(handle_application=mount) as server:
        await fill(server, 1)
        before = (await ask(server, "GET", "/notes")).json
        refused = await ask(server, method, path, json=body)
        assert before == (await ask(server, "GET", "/notes")).json
    assert status == refused.status
    assert said in refused.json["detail"]


async def test_a_role_opens_a_table_as_it_opens_any_mount() -> None:
    """Who may read and create gets 403 for the rest, and a stranger 401; each write is audited."""
    permission = {"resources": {"notes": ["read", "create"]}}
    async with running(handle_application=mount) as server:
        await server.operate("add_role", role="writer", permission=permission)
        key = await server.key_for("ada", "writer")

        async def status(method: str, path: str, who: str, body: Any = None) -> int:
            return (await ask(server, method, path, key=who, json=body)).status

        note = {"text": "hers"}
        assert 401 == await status("POST", "/notes", "", note)
        assert 201 == await status("POST", "/notes", key, note)
        assert 200 == await status("GET", "/notes/1", key)
        for method in ("PUT", "PATCH", "DELETE"):
            assert 403 == await status(method, "/notes/1", key, note)
        assert 204 == await status("PATCH", "/notes/1", server.api_key, {"numStars": 1})
        sql = "SELECT * FROM system.hdb_audit WHERE \"table\" = 'Notes'"
        rows = await server.operate("sql", sql=sql)
    assert [("insert", "ada", [1]), ("update", "HDB_ADMIN", [1])] == [
        (row["operation"], row["user_name"], row["hash_values"]) for row in rows
    ]
    assert "hers" not in str(rows)


async def test_the_document_says_what_a_table_takes() -> None:
    """`/openapi` has the record's schema for each verb."""
    async with running(handle_application=mount) as server:
        paths = (await ask(server, "GET", "/openapi")).json["paths"]
    (verbs,) = [verbs for path, verbs in paths.items() if path == "/notes"]
    assert {"get", "post"} <= verbs.keys()
    posted = verbs["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "#/components/schemas/Note" == posted["$ref"]


async def test_a_field_may_have_a_word_of_the_query_as_its_name() -> None:
    """`==` compares the field, `=` is the word."""

    class Odd(msgspec.Struct):
        id: int | None = None
        limit: int = 0
        offset: int = 0
        sort: str = ""

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("odd", Odd, index=["limit"])
        scope.resources.set("odd", TableResource.over(table))

    async with running(handle_application=apply) as server:
        for odd in ({"limit": 1, "offset": 1, "sort": "a"}, {"limit": 2, "offset": 2, "sort": "b"}):
            await ask(server, "POST", "/odd", json=odd)
        for query in ("limit==2", "offset==2", "sort==b", "limit==2&limit=5"):
            assert [2] == [odd["id"] for odd in (await ask(server, "GET", f"/odd?{query}")).json]
        await ask(server, "POST", "/odd", json={"limit": 2})
        assert [2, 3] == [odd["id"] for odd in await pages(server, "/odd?limit==2&limit=1")]
        assert [2] == [odd["id"] for odd in await pages(server, "/odd?offset==2&limit(0,1)")]


class Hue(enum.Enum):
    """One of two."""

    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct):
    """A Struct in a field."""

    a: int
    at: dt.datetime | None = None


class Everything(msgspec.Struct):
    """A field of each kind."""

    id: str | None = None
    flag: bool = False
    ratio: float = 0.5
    blob: bytes = b""
    moment: dt.datetime | None = None
    day: dt.date | None = None
    key: uuid.UUID | None = None
    price: Decimal | None = None
    hue: Hue = Hue.RED
    word: Literal["a", "b"] = "a"
    mixed: Literal["a", 1] = "a"
    inner: Inner | None = None
    many: dict[str, list[int]] = {}
    numbered: dict[int, str] = {}
    blobs: list[bytes] = []
    moments: list[dt.datetime] = []
    any: Any = None


async def test_null_is_none_in_any_case_where_it_is_no_text() -> None:
    """What has a moment is told from what has none, by `NULL` as well; it has no order."""
    async with running(handle_application=mount) as server:
        for given in ({"id": "a"}, {"id": "b", "moment": "2026-01-02T03:04:05Z"}):
            assert 201 == (await ask(server, "POST", "/all", json=given)).status
        for word in ("null", "NULL", "Null"):
            for sign, known in (("=", "a"), ("==", "a"), ("!=", "b")):
                found = await ask(server, "GET", f"/all?moment{sign}{word}&select(id)")
                assert [known] == found.json
            refused = await ask(server, "GET", f"/all?moment=gt={word}")
            assert (400, True) == (refused.status, "null has no order" in refused.text)


async def test_what_is_kept_as_json_is_told_from_what_is_null() -> None:
    """By a query and by operations, and in no other way."""
    async with running(handle_application=mount) as server:
        for given in ({"id": "a"}, {"id": "b", "any": [None]}, {"id": "c", "any": {}}):
            assert 201 == (await ask(server, "POST", "/all", json=given)).status
        assert ["a"] == (await ask(server, "GET", "/all?any=null&select(id)")).json
        assert ["b", "c"] == (await ask(server, "GET", "/all?any!=null&select(id)")).json
        asked: dict[str, Any] = {"table": "everything", "get_attributes": "id"}
        null = {"attribute": "any", "value": None}
        assert [{"id": "a"}] == await server.operate("search_by_value", **asked, **null)
        other = {**null, "comparator": "not_equal"}
        for condition, ids in ((null, "a"), (other, "bc")):
            found = await server.operate("search_by_conditions", **asked, conditions=[condition])
            assert [{"id": id_} for id_ in ids] == found
        with pytest.raises(ClientError, match="what is kept as JSON cannot be compared"):
            await server.operate("search_by_value", **asked, attribute="any", value="[null]")


class Named(msgspec.Struct):
    """A record with a key that can be written in several ways."""

    id: uuid.UUID
    text: str = ""


async def test_a_uuid_in_capitals_names_the_same_record() -> None:
    """In the path, in the body and in a condition."""

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("named", Named)
        scope.resources.set("named", TableResource.over(table))

    key = str(uuid.UUID(int=0xABC))
    async with running(handle_application=apply) as server:
        path = f"/named/{key.upper()}"
        put = await ask(server, "PUT", path, json={"id": key.upper(), "text": "a"})
        patched = await ask(server, "PATCH", path, json={"id": key.upper(), "text": "b"})
        found = (await ask(server, "GET", f"/named?id={key.upper()}")).json
        other = await ask(server, "PUT", path, json={"id": str(uuid.UUID(int=1))})
    assert [204, 204, 400] == [put.status, patched.status, other.status]
    assert [{"id": key, "text": "b"}] == found


class Numbered(msgspec.Struct):
    """Fields that are called as SQLAlchemy calls parameters."""

    id: int | None = None
    id_1: str = ""
    param_1: str | None = None


async def test_a_field_may_be_called_as_a_parameter_is() -> None:
    """Records with `id_1` and `param_1` are replaced, changed and found, and audited."""

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("numbered", Numbered)
        scope.resources.set("numbered", TableResource.over(table))

    async with running(handle_application=apply) as server:
        for verb in ("PUT", "PUT", "PATCH"):
            written = await ask(server, verb, "/numbered/7", json={"id_1": verb, "param_1": "p"})
            assert 204 == written.status
        for name in ("update", "upsert"):
            await server.operate(name, table="numbered", records=[{"id": 7, "param_1": name}])
            found = await ask(server, "GET", f"/numbered?id_1=PATCH&param_1={name}")
            assert [{"id": 7, "id_1": "PATCH", "param_1": name}] == found.json
        audited = await server.operate("read_audit_log", table="numbered")
    assert 5 * [[7]] == [row["hash_values"] for row in audited]
    assert [{"param_1": "[6 characters]"}] == audited[0]["records"]


async def test_every_kind_of_field_comes_back_as_it_was() -> None:
    """What a Struct holds goes through JSON and the table unchanged, but moments are in UTC."""
    sent = {
        "id": "ä/b c",
        "flag": True,
        "ratio": 1.25,
        "blob": "/wA=",
        "moment": "2026-01-02T03:04:05.060000+01:00",
        "day": "2026-01-02",
        "key": str(uuid.UUID(int=7)),
        "price": "1.10",
        "hue": "blue",
        "word": "b",
        "mixed": 1,
        "inner": {"a": 1, "at": "2026-01-02T03:04:05Z"},
        "many": {"x": [1, 2]},
        "numbered": {"1": "one"},
        "blobs": ["/wA="],
        "moments": ["2026-01-02T03:04:05Z"],
        "any": {"y": None},
    }

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("everything", Everything)
        scope.resources.set("all", TableResource.over(table))

    async with running(handle_application=apply) as server:
        made = await ask(server, "POST", "/all", json=sent)
        again = await ask(server, "GET", made.headers["Location"])
        other = await ask(server, "POST", "/all", json={})
        early = await ask(server, "GET", "/all?moment=lt=2026-01-02T02:04:06Z&select(id)")
    kept = sent | {"moment": "2026-01-02T02:04:05.060000Z", "price": 1.1}
    assert kept == again.json == made.json
    assert '"price":1.10,' in again.text
    assert re.fullmatch(r"[0-9a-f]{32}", other.json["id"])
    assert ["ä/b c"] == early.json


async def ensured(record: type[Any], root: Path, name: str = "t", **more: Any) -> list[Any]:
    """What a server on this data finds in the table, after the plugin has started or not."""
    found: list[Any] = []

    async def apply(scope: Scope) -> None:
        table: Table[Any] = await scope.database.tables.ensure(name, record, **more)

        class Find(Resource):
            public = True

            @staticmethod
            async def get(target: RequestTarget, context: Context) -> list[Any]:
                found.extend(await table.find(context.transaction()))
                return []

            @staticmethod
            async def post(target: RequestTarget, data: Any, context: Context) -> None:
                await table.put(context.transaction(), msgspec.convert(await data, record))

        scope.resources.set("find", Find)

    async with running(handle_application=apply, root=root) as server:
        failed = server.server.health.whole()["plugins"]["test"]
        if failed["status"] == "error":
            raise RegistrationError(failed["error"])
        await ask(server, "POST", "/find", json={"id": len(str(record)), "text": "new"})
        await ask(server, "GET", "/find")
    return found


def struct(*fields: tuple[Any, ...], name: str = "T") -> type[msgspec.Struct]:
    """A Struct of these fields, with an id and a text."""
    return msgspec.defstruct(name, [("id", int), ("text", str), *fields])


async def test_a_new_field_becomes_a_column_with_its_default(tmp_path: Path) -> None:
    """A later version of a Struct finds the earlier one's records, and needs no migration."""
    await ensured(struct(name="First"), tmp_path)
    grown = struct(
        ("more", int, 7),
        ("note", str | None, None),
        ("tags", list[str], msgspec.field(default_factory=lambda: ["it's"])),
        name="Larger",
    )
    old, _ = await ensured(grown, tmp_path, index=["more"])
    assert (7, None, ["it's"]) == (old.more, old.note, old.tags)
    assert 3 == len(await ensured(struct(name="Small again"), tmp_path))


async def test_a_field_may_go_or_be_empty_later(tmp_path: Path) -> None:
    """Records are written by a later Struct too that lacks a field, or lets it be None."""
    await ensured(struct(("gone", str, "x"), ("empty", int, 1), name="First"), tmp_path)
    later = struct(("empty", int | None, None), name="Later one")
    old, new = await ensured(later, tmp_path)
    assert (1, None) == (old.empty, new.empty)


@pytest.mark.parametrize("kind", [dt.date, dt.datetime, Decimal])
async def test_a_record_that_a_later_struct_does_not_take_is_named(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A type that became narrower: the log says which one to mend."""
    await ensured(struct(("day", str, "today")), tmp_path)
    later = struct(("day", kind | None, None), name="Later one")
    assert [] == await ensured(later, tmp_path)
    assert re.search(r"table 't', record \d+: Invalid .* - at `\$\.day`", caplog.text)


@pytest.mark.parametrize(
    ("record", "more", "said"),
    [
        (struct(("a", str)), {}, "table 't': the new field 'a' needs a default, or | None"),
        (
            msgspec.defstruct("T", [("id", int), ("text", int)]),
            {},
            "table 't': 'text' is kept as VARCHAR, it cannot be INTEGER",
        ),
        (
            msgspec.defstruct("T", [("id", int)], array_like=True),
            {},
            "table 't': T cannot be array_like: records have names",
        ),
        (struct(), {"key": "text"}, "table 't': its key in the file is id, it cannot be text"),
        (struct(), {"key": "ids"}, "table 't': T has no field 'ids'; did you mean 'id'?"),
        (struct(), {"index": ["txt"]}, "T has no field 'txt'; did you mean 'text'?"),
        (struct(("f", float, 0.0)), {"key": "f"}, "'f' cannot be its key; expected a str, an int"),
        (
            struct(("u", str | msgspec.UnsetType, msgspec.UNSET)),
            {},
            "table 't': 'u' cannot be UNSET by default; write | None = None",
        ),
        (struct(("Text", str, "")), {}, "table 't': fields of T differ in nothing but their case"),
        (struct(), {"name": "hdb_mine"}, "expected a name of letters, digits and _, not beginning"),
        (struct(), {"name": "a b"}, "table 'a b': expected a name of letters, digits and _"),
    ],
)
async def test_what_cannot_be_the_table_is_refused_at_the_start(
    record: type[Any], more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """The plugin does not start, and a sentence says why."""
    await ensured(struct(), tmp_path)
    with pytest.raises(RegistrationError, match=re.escape(said)):
        await ensured(record, tmp_path, **more)


@pytest.mark.parametrize("name", ["t", "T"])
async def test_two_structs_cannot_be_one_table(name: str) -> None:
    """A name that is taken by another Struct is refused; in a database, case makes no other."""

    async def apply(scope: Scope) -> None:
        await scope.database.tables.ensure("t", struct(name="One"))
        await scope.database.tables.ensure(name, struct(name="Two"))

    async with running(handle_application=apply) as server:
        failed = server.server.health.whole()["plugins"]["test"]
    assert f"table {name!r} is made of One, not Two" == failed["error"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Notes(TableResource): pass", "Notes.record: expected the Struct that its records"),
        (
            "class Note: pass\nclass Notes(TableResource): record = Note",
            "Notes.record: expected the Struct that its records",
        ),
        (
            "class Notes(TableResource): pass\n"  # noqa: ISC004
            "def handle_application(scope): scope.resources.set('notes', Notes)",
            "Notes has no table yet: mount await Notes.of(scope.database.tables)",
        ),
    ],
)
async def test_a_resource_without_a_table_is_not_mounted(
    source: str, said: str, tmp_path: Path
) -> None:
    """The mistake is named at the start, not at the first request."""
    (tmp_path / "resources.py").write_text(f"from harperpy import TableResource\n{source}\n")
    async with running(directory=tmp_path) as server:
        failed = server.server.health.whole()["plugins"]["app_resources"]
    assert said in failed["error"]


class Kept(TableResource):
    """A table with a verb of its own."""

    record = Note

    @classmethod
    async def delete(cls, target: RequestTarget, context: Context) -> None:
        """Never."""
        message = "Notes are kept for ever."
        raise ClientError(message, status=403)


async def test_a_subclass_keeps_the_verbs_that_it_does_not_override() -> None:
    """Its own verb answers, and the table's other ones."""

    async def apply(scope: Scope) -> None:
        scope.resources.set("notes", await Kept.of(scope.database.tables))

    async with running(handle_application=apply) as server:
        await fill(server, 1)
        refused = await ask(server, "DELETE", "/notes/1")
        found = await ask(server, "GET", "/notes/1")
    assert (403, "Notes are kept for ever.") == (refused.status, refused.json["detail"])
    assert 200 == found.status


async def test_a_list_has_64_mib_at_most() -> None:
    """What is larger is refused before it is all in memory, and fewer of its records are sent."""
    many = [["x" * 1000] * 9_900]
    told = "the records are larger than 64 MiB together: ask for fewer by limit"

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("everything", Everything)
        scope.resources.set("all", TableResource.over(table))

    async with running(handle_application=apply) as server:
        for at in range(7):
            records = [{"id": str(at), "any": many}]
            await server.operate("insert", table="everything", records=records)
        refused = await ask(server, "GET", "/all?limit=1000")
        assert (400, told) == (refused.status, refused.json["detail"])
        searched = {"table": "everything", "attribute": "flag", "value": False}
        with pytest.raises(ClientError, match=told):
            await server.operate("search_by_value", **searched)
        assert 2 == len(await server.operate("search_by_value", **searched, limit=2))
        assert 2 == len(
            await server.operate("search_by_id", table="everything", ids=["0"] * 50 + ["1"])
        )
        assert 200 == (await ask(server, "GET", "/all?limit=2&select(id)")).status


async def test_lists_in_a_record_count_as_what_they_take() -> None:
    """Not as the two letters that they are written with."""

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("everything", Everything)
        scope.resources.set("all", TableResource.over(table))

    async with running(handle_application=apply) as server:
        for at in range(3):
            records = [{"id": str(at), "any": [[]] * 400_000}]
            await server.operate("insert", table="everything", records=records)
        assert 400 == (await ask(server, "GET", "/all")).status
        assert 200 == (await ask(server, "GET", "/all?limit=1")).status


async def test_two_writers_of_one_record_follow_one_another() -> None:
    """No change of one field is lost to a change of another at the same time."""
    async with running(handle_application=mount) as server:
        await fill(server, 1)

        async def patch(field: dict[str, Any]) -> Answered:
            return await ask(server, "PATCH", "/notes/1", json=field)

        changes = [{"topic": "t"}, {"numStars": 5}, {"tags": ["x"]}, {"text": "n"}] * 5
        answers = await asyncio.gather(*map(patch, changes))
        now = (await ask(server, "GET", "/notes/1")).json
    assert {204} == {answer.status for answer in answers}
    assert {"id": 1, "topic": "t", "numStars": 5, "tags": ["x"], "text": "n"} == now


async def test_the_blocks_of_the_page_run(tmp_path: Path) -> None:
    """The page's resources.py and plugin start, and its commands print what it says."""
    (_, resources), (_, commands), (_, printed), (_, plugin), (_, subclass), *more = BLOCK.findall(
        PAGE.read_text()
    )
    assert [] == more
    assert "class Notes(TableResource)" in subclass
    (tmp_path / "resources.py").write_text(resources)
    (tmp_path / "board.py").write_text(plugin)
    config = f"{ECHO}\nplugins: {{board: {{path: board.py}}}}\n"
    async with running(config, directory=tmp_path) as server:
        shell = await asyncio.create_subprocess_exec(
            "bash",
            "-euc",
            commands.replace("\ncurl", "\necho; curl"),
            env={**os.environ, "URL": server.url, "KEY": server.api_key},
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await shell.communicate()
        for player, points in (("ada", 12), ("bob", 3)):
            score = {"points": points}
            assert 204 == (await ask(server, "PUT", f"/scores/{player}", json=score)).status
        winners = await ask(server, "GET", "/winners")
    assert (0, printed) == (shell.returncode, f"{told.decode()}\n")
    assert [{"player": "ada", "points": 12}] == winners.json


async def test_decimals_are_compared_as_numbers() -> None:
    """A price of 10 is above one of 9, and 9 is 9.0; each keeps the digits that it came with."""
    async with running(handle_application=mount) as server:
        for price in ("100", "9", "10.00", None):
            assert 201 == (await ask(server, "POST", "/all", json={"price": price})).status
        for query, prices in (
            ("price=gt=9.5&sort(price)", "[10.00,100]"),
            ("sort=-price", "[100,10.00,9,null]"),
            ("price=9.0", "[9]"),
            ("price=null", "[null]"),
        ):
            found = await ask(server, "GET", f"/all?{query}&select(price)")
            assert prices == found.text


async def test_false_is_less_than_true() -> None:
    """A flag can be asked for as a range, too."""
    async with running(handle_application=mount) as server:
        for flag in (True, False):
            assert 201 == (await ask(server, "POST", "/all", json={"flag": flag})).status
        for query, flags in (
            ("flag=lt=true", [False]),
            ("flag=ge=false&sort(flag)", [False, True]),
            ("flag=gt=true", []),
            ("flag=true", [True]),
        ):
            found = await ask(server, "GET", f"/all?{query}&select(flag)")
            assert (200, flags) == (found.status, found.json)


BAGS = """
import msgspec
from harperpy import TableResource

class Bag(msgspec.Struct):
    id: str
    things: set[str] = set()

class Bags(TableResource):
    record = Bag
    public = {"read", "update"}
"""


async def test_a_version_is_the_same_in_each_process(tmp_path: Path) -> None:
    """A write for the version that one process told is taken by another, with sets in it too."""
    (tmp_path / "config.yaml").write_text(FREE + ECHO)
    (tmp_path / "resources.py").write_text(BAGS)
    things = [*"abcdefgh"]
    told = None
    for seed in ("1", "2"):
        environ = {**ADMIN, "PYTHONHASHSEED": seed}
        async with (
            serving(tmp_path, "run", environ=environ) as server,
            aiohttp.ClientSession(server.url) as client,
        ):
            headers = {"If-Match": told} if told else {}
            async with client.put("/Bags/1", json={"things": things}, headers=headers) as put:
                assert 204 == put.status
            async with client.get("/Bags/1") as found:
                assert {*things} == {*(await found.json())["things"]}
                told = found.headers["ETag"]


class Tagged(msgspec.Struct, tag="note", tag_field="type"):
    """A record that says in JSON what it is."""

    text: str
    id: int | None = None


async def test_a_tagged_record_is_written_as_it_is_read() -> None:
    """Its tag comes with each answer and may come with each write; another one is 400."""

    async def apply(scope: Scope) -> None:
        table = await scope.database.tables.ensure("tagged", Tagged)
        scope.resources.set("tagged", TableResource.over(table))

    async with running(handle_application=apply) as server:
        made = await ask(server, "POST", "/tagged", json={"type": "note", "text": "a"})
        assert {"type": "note", "text": "a", "id": 1} == made.json
        assert 204 == (await ask(server, "PUT", "/tagged/1", json=made.json)).status
        assert 204 == (await ask(server, "PATCH", "/tagged/1", json={"text": "b"})).status
        assert made.json | {"text": "b"} == (await ask(server, "GET", "/tagged/1")).json
        assert 400 == (await ask(server, "PATCH", "/tagged/1", json={"type": "other"})).status


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"ratio": float("nan")}, "ratio: expected a finite number"),
        ({"any": msgspec.msgpack.Ext(5, b"a")}, "any: expected what JSON can hold"),
        ({"any": {"a": [float("inf")]}}, "any: expected what JSON can hold"),
        ({1: 2}, "expected a JSON object of fields"),
    ],
)
async def test_what_only_msgpack_can_say_is_400(body: Any, said: str) -> None:
    """A value that no column can hold is refused as one in JSON is."""
    headers = {"Content-Type": "application/x-msgpack"}
    async with running(handle_application=mount) as server:
        data = msgspec.msgpack.encode(body)
        refused = await ask(server, "POST", "/all", data=data, headers=headers)
    assert 400 == refused.status
    assert said in refused.json["detail"]


async def test_a_value_of_any_depth_is_kept_or_refused() -> None:
    """What is too deep for one of its ways is refused, and what is kept is read in each form."""
    async with running(handle_application=mount) as server:
        for depth in (*range(300, 960, 60), *range(960, 1000)):
            body = f'{{"id": "x{depth}", "any": {"[" * depth}{"]" * depth}}}'
            headers = {"Content-Type": "application/json"}
            made = await ask(server, "POST", "/all", data=body, headers=headers)
            assert made.status in (201, 400), depth
            if made.status == 201:
                for form, statuses in (("json", (200,)), ("yaml", (200, 406))):
                    found = await ask(server, "GET", f"/all/x{depth}.{form}")
                    assert found.status in statuses, (depth, form)


async def test_a_statement_that_fails_is_logged_without_its_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What SQLite refuses is a 500, and neither the answer nor the log has what was written."""

    class Refused(Resource):
        @staticmethod
        async def post(target: RequestTarget, data: Any, context: Context) -> None:
            await context.transaction().execute(
                sa.text("INSERT INTO notes VALUES (:a)"), await data
            )

    async def apply(scope: Scope) -> None:
        await mount(scope)
        scope.resources.set("refused", Refused)

    async with running(handle_application=apply) as server:
        answer = await ask(server, "POST", "/refused", json={"a": "a prompt"})
        assert 500 == answer.status
        assert "OperationalError" in caplog.text
        assert "a prompt" not in answer.text + caplog.text
