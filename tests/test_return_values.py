"""What a verb may return or raise, and exactly what the client gets of it."""

import asyncio
import contextlib
import logging
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple, TypedDict

import aiohttp
import msgspec
import pytest

from harperpy import (
    SSE,
    AccessViolation,
    Blob,
    ClientError,
    Context,
    EventStream,
    HarperError,
    InvalidBody,
    Next,
    RegistrationError,
    Reply,
    RequestTarget,
    Resource,
    Resources,
    Response,
    ResponseError,
    Scope,
    ServerError,
    User,
    decode_json,
    define_backend,
    get_context,
    json_response,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask, ask_raw, later, until

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"
CSV = "text/csv; charset=utf-8"
NOTHING = ("", b"")
ACTING = ["POST", "PUT", "PATCH", "DELETE", "QUERY"]


class Got(NamedTuple):
    """A whole answer, its body as bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def told(self) -> tuple[int, str, bytes]:
        """Status, type and body."""
        return self.status, self.headers.get("Content-Type", ""), self.body


def answering(verb: Callable[..., Any], **attributes: Any) -> type[Resource]:
    """A class each of whose verbs is this function."""
    verbs = dict.fromkeys(("get", "post", "put", "patch", "delete", "query"), staticmethod(verb))
    return type("Answering", (Resource,), {**verbs, **attributes})


async def fetch(server: RunningServer, method: str, path: str, **options: Any) -> Got:
    """One request, as super user."""
    async with server.session() as client, client.request(method, path, **options) as response:
        return Got(response.status, response.headers, await response.read())


async def got(
    verb: Callable[..., Any], method: str = "GET", accept: str | None = None, **options: Any
) -> Got:
    """What the client gets of a verb."""
    headers = {"Accept": accept} if accept else {}
    async with running(resources={"it": answering(verb)}) as server:
        return await fetch(server, method, "/it", headers=headers, **options)


# --- the values


class Point(msgspec.Struct):
    """A record."""

    x: int
    y: str | None = None


@dataclass
class Pair:
    """A record as well."""

    left: int
    right: float


def returns(value: Any) -> Any:
    """A verb that returns this."""
    return lambda: value


RETURNED: dict[str, tuple[Callable[..., Any], int, str, bytes]] = {
    "dict": (returns({"a": 1}), 200, JSON, b'{"a":1}'),
    "list": (returns([1, "a", None]), 200, JSON, b'[1,"a",null]'),
    "text": (returns("hi"), 200, JSON, b'"hi"'),
    "number": (returns(1.5), 200, JSON, b"1.5"),
    "decimal": (returns(Decimal("1.10")), 200, JSON, b"1.10"),
    "float NaN": (returns([float("nan"), float("inf")]), 200, JSON, b"[null,null]"),
    "Decimal NaN": (returns(Decimal("NaN")), 200, JSON, b"null"),
    "Decimals that are no numbers": (
        returns({"a": [Decimal("sNaN"), Decimal("Infinity"), Decimal("-Infinity")], "b": "NaN"}),
        200,
        JSON,
        b'{"a":[null,null,null],"b":"NaN"}',
    ),
    "Decimal NaN in a dataclass": (
        returns(Pair(1, Decimal("NaN"))),  # type: ignore[arg-type]
        200,
        JSON,
        b'{"left":1,"right":null}',
    ),
    "bool": (returns(True), 200, JSON, b"true"),  # noqa: FBT003
    "Struct": (returns(Point(1)), 200, JSON, b'{"x":1,"y":null}'),
    "dataclass": (returns(Pair(1, 2)), 200, JSON, b'{"left":1,"right":2}'),
    "zero": (returns(0), 200, JSON, b"0"),
    "False": (returns(False), 200, JSON, b"false"),  # noqa: FBT003
    "empty text": (returns(""), 200, JSON, b'""'),
    "empty dict": (returns({}), 200, JSON, b"{}"),
    "Response with data": (returns(Response(202, data={"a": 1})), 202, JSON, b'{"a":1}'),
    "Response with data None": (returns(Response(data=None)), 200, JSON, b"null"),
    "Response with data and a type": (
        returns(Response(200, {"Content-Type": "application/x-ndjson"}, data=[1])),
        200,
        "application/x-ndjson",
        b"[1]\n",
    ),
    "Response with text": (returns(Response(body="<p>")), 200, TEXT, b"<p>"),
    "Response with bytes": (returns(Response(body=b"\xff")), 200, BYTES, b"\xff"),
    "Response with an async iterator": (
        lambda: Response(206, body=later("ß", b"\xff")),
        206,
        BYTES,
        "ß".encode() + b"\xff",
    ),
    "Response with an iterator": (lambda: Response(body=iter(["a", b"b"])), 200, BYTES, b"ab"),
    "Response with nothing": (returns(Response(204)), 204, *NOTHING),
    "Response of an error": (returns(Response(409, data="no")), 409, JSON, b'"no"'),
    "Blob of text": (returns(Blob("text/html", "<p>ß")), 200, "text/html", "<p>ß".encode()),
    "Blob of bytes": (returns(Blob("image/png", b"\x89P")), 200, "image/png", b"\x89P"),
    "bytes": (returns(b"\xff"), 200, BYTES, b"\xff"),
    "bytearray": (returns(bytearray(b"a")), 200, BYTES, b"a"),
    "async generator": (lambda: later(1, "a"), 200, JSON, b'[1,"a"]'),
    "iterator that is no list": (lambda: iter([1, 2]), 200, JSON, b"[1,2]"),
    "map": (lambda: map(str, range(2)), 200, JSON, b'["0","1"]'),
    "EventStream": (
        lambda: EventStream(later("a")),
        200,
        "text/event-stream",
        b"data: a\n\n",
    ),
    "dict of status and headers": (
        returns({"status": 418, "headers": {"Content-Type": "text/x"}, "body": "pot"}),
        418,
        "text/x",
        b"pot",
    ),
    "dict of status, headers and data": (
        returns({"status": 203, "headers": {}, "data": [1]}),
        203,
        JSON,
        b"[1]",
    ),
    "dict of status and data": (
        returns({"status": 400, "data": 1}),
        200,
        JSON,
        b'{"status":400,"data":1}',
    ),
    "dict with headers that is a record": (
        returns({"status": 1, "headers": {}, "name": "a"}),
        200,
        JSON,
        b'{"status":1,"headers":{},"name":"a"}',
    ),
    "dict with headers alone": (returns({"headers": {"a": 1}}), 200, JSON, b'{"headers":{"a":1}}'),
    "dict with a status that is no number": (
        returns({"status": "new", "headers": {}}),
        200,
        JSON,
        b'{"status":"new","headers":{}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("verb", "status", "media", "body"), RETURNED.values(), ids=RETURNED)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_is_returned_is_answered_so(
    verb: Callable[..., Any], status: int, media: str, body: bytes, method: str
) -> None:
    """Each kind of value has one status, one type and these very bytes, on whatever verb."""
    assert (status, media, body) == (await got(verb, method)).told


@pytest.mark.parametrize("method", ["GET", "HEAD", *ACTING])
async def test_nothing_is_404_to_who_asks_and_204_to_who_acts(method: str) -> None:
    """A verb that returns None found nothing, or has nothing to say."""
    answer = await got(returns(None), method)

    assert (404 if method in ("GET", "HEAD") else 204) == answer.status
    if method == "GET":
        assert 404 == decode_json(answer.body, dict[str, Any])["status"]
    else:
        assert b"" == answer.body


@pytest.mark.parametrize("name", [name for name, row in RETURNED.items() if row[1] != 204])
async def test_head_is_get_without_a_body(name: str) -> None:
    """Status and headers are those of GET; the length too where there is one."""
    whole, head = [await got(RETURNED[name][0], method) for method in ("GET", "HEAD")]
    varying = {"date", "x-request-id", "transfer-encoding"}

    assert (whole.status, b"") == (head.status, head.body)
    heads = [
        {name: value for name, value in answer.headers.items() if name.lower() not in varying}
        for answer in (whole, head)
    ]
    assert heads[0] == heads[1]


async def test_a_blob_is_sent_whatever_the_client_accepts() -> None:
    """It has the type it was given and no other; caches know that it may be compressed."""
    answer = await got(returns(Blob("image/png", b"\x89")), accept="image/png")

    assert (200, "image/png", b"\x89") == answer.told
    assert "Accept-Encoding" in answer.headers["Vary"].split(", ")


async def test_a_status_of_a_dict_without_headers_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who meant a Response learns from the log that a dict of status and data is none."""
    await got(returns({"status": 400, "data": 1}))
    assert "use Response" in caplog.text


# --- as the client accepts

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
ARRAY = b'[{"a":1,"b":"x"},{"a":2,"b":null}]'
TABLE = b"a,b\r\n1,x\r\n2,\r\n"
PACKED = msgspec.msgpack.encode
ACCEPTED: dict[str, tuple[str, str, bytes, bytes]] = {
    "JSON": (JSON, JSON, ARRAY, ARRAY),
    "anything": ("*/*", JSON, ARRAY, ARRAY),
    "any application": ("application/*", JSON, ARRAY, ARRAY),
    "NDJSON": (
        "application/x-ndjson",
        "application/x-ndjson",
        b'[{"a":1,"b":"x"},{"a":2,"b":null}]\n',
        b'{"a":1,"b":"x"}\n{"a":2,"b":null}\n',
    ),
    "NDJSON by its other name": (
        "application/ndjson",
        "application/ndjson",
        b'[{"a":1,"b":"x"},{"a":2,"b":null}]\n',
        b'{"a":1,"b":"x"}\n{"a":2,"b":null}\n',
    ),
    "events": (
        "text/event-stream",
        "text/event-stream",
        b'data: [{"a":1,"b":"x"},{"a":2,"b":null}]\n\n',
        b'data: {"a":1,"b":"x"}\n\ndata: {"a":2,"b":null}\n\n',
    ),
    "msgpack": (
        "application/x-msgpack",
        "application/x-msgpack",
        PACKED(ROWS),
        b"".join(map(PACKED, ROWS)),
    ),
    "msgpack by its other name": (
        "application/msgpack",
        "application/msgpack",
        PACKED(ROWS),
        b"".join(map(PACKED, ROWS)),
    ),
    "msgpack rather than JSON": (
        "application/json, application/x-msgpack",
        "application/x-msgpack",
        PACKED(ROWS),
        b"".join(map(PACKED, ROWS)),
    ),
    "JSON rather than msgpack": (
        "application/json, application/x-msgpack;q=0.5",
        JSON,
        ARRAY,
        ARRAY,
    ),
    "CSV": ("text/csv", CSV, TABLE, TABLE),
    "CSV rather than nothing": ("text/csv;q=0.1, image/png", CSV, TABLE, TABLE),
}


@pytest.mark.parametrize(("accept", "media", "whole", "streamed"), ACCEPTED.values(), ids=ACCEPTED)
async def test_a_value_and_an_iterator_are_sent_as_accepted(
    accept: str, media: str, whole: bytes, streamed: bytes
) -> None:
    """A list is one value of the type, an iterator its items in that type's own way."""
    assert (200, media, whole) == (await got(returns(ROWS), accept=accept)).told
    assert (200, media, streamed) == (await got(lambda: later(*ROWS), accept=accept)).told
    assert (200, media, streamed) == (await got(lambda: iter(ROWS), accept=accept)).told


RECORDS: dict[str, tuple[Any, bytes]] = {
    "none": ([], b""),
    "one alone": ({"a": 1}, b"a\r\n1\r\n"),
    "Structs": ([Point(1, "ß"), Point(2)], "x,y\r\n1,ß\r\n2,\r\n".encode()),
    "dataclasses": ([Pair(1, 2.5)], b"left,right\r\n1,2.5\r\n"),
    "quotes, commas and lines": ([{"a": 'x"y', "b,c": "1\n2"}], b'a,"b,c"\r\n"x""y","1\n2"\r\n'),
    "a lacking field": ([{"a": 1, "b": 2}, {"b": 3}], b"a,b\r\n1,2\r\n,3\r\n"),
    "truth": ([{"a": True, "b": False}], b"a,b\r\ntrue,false\r\n"),
    "decimals": ([{"a": Decimal("1.10")}], b"a\r\n1.10\r\n"),
}


@pytest.mark.parametrize(("records", "text"), RECORDS.values(), ids=RECORDS)
async def test_records_are_rows_under_the_first_ones_header(records: Any, text: bytes) -> None:
    """CSV is RFC 4180, and a file that a browser keeps."""
    answer = await got(returns(records), accept="text/csv")

    assert (200, CSV, text) == answer.told
    assert 'attachment; filename="data.csv"' == answer.headers["Content-Disposition"]


async def test_a_verb_may_name_its_csv() -> None:
    """Its own `Content-Disposition` stays, and a body of its own is no file unless it says so."""

    def named() -> Any:
        get_context().response_headers["Content-Disposition"] = "inline"
        return ROWS

    own = Response(200, {"Content-Type": "text/csv"}, body="a\r\n")

    assert "inline" == (await got(named, accept="text/csv")).headers["Content-Disposition"]
    assert "Content-Disposition" not in (await got(returns(own), accept="text/csv")).headers


NOT_FLAT: dict[str, tuple[list[Any], str]] = {
    "a number": ([1], "record 1: it is int, not a record with fields"),
    "text": (["a"], "record 1: it is str, not a record with fields"),
    "a record without fields": ([{}], "record 1: it is dict, not a record with fields"),
    "a list in a field": ([{"a": [1]}], "record 1: its field 'a' is not a plain value"),
    "a record in a field": ([{"a": {}}], "record 1: its field 'a' is not a plain value"),
}
LATE = {
    "a new field": ([{"a": 1}, {"b": 1}], "record 2: the first record has no field 'b'"),
    "a list in the second": ([{"a": 1}, {"a": []}], "record 2: its field 'a' is not a plain value"),
}


@pytest.mark.parametrize(("records", "told"), (NOT_FLAT | LATE).values(), ids=NOT_FLAT | LATE)
async def test_what_is_not_flat_is_no_csv(records: list[Any], told: str) -> None:
    """It is 406: there is an answer, but not in the type that was asked for."""
    answer = await got(returns(records), accept="text/csv")

    assert 406 == answer.status
    problem = decode_json(answer.body, dict[str, Any])
    assert "not_acceptable" == problem["code"]
    assert problem["detail"].endswith(told)


@pytest.mark.parametrize(("records", "told"), NOT_FLAT.values(), ids=NOT_FLAT)
async def test_a_stream_whose_first_record_is_not_flat_is_406(
    records: list[Any], told: str
) -> None:
    """The first record is tried before the head goes out."""
    answer = await got(lambda: later(*records), accept="text/csv")

    assert 406 == answer.status
    assert decode_json(answer.body, dict[str, Any])["detail"].endswith(told)


@pytest.mark.parametrize("accept", ["text/csv", "application/x-msgpack"])
@pytest.mark.parametrize("second", [ClientError("No more."), object()], ids=["refused", "no form"])
async def test_rows_and_msgpack_that_fail_later_are_cut(accept: str, second: Any) -> None:
    """Neither can tell an error from data: the client sees the connection break."""
    with pytest.raises(aiohttp.ClientPayloadError):
        await got(lambda: later({"a": 1}, second), accept=accept)


# --- what Accept may decide


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "QUERY"])
async def test_who_wants_events_still_has_method_and_body(method: str) -> None:
    """`Accept` decides how the answer is written, never which verb is called or what it gets."""

    async def verb() -> Any:
        context = get_context()
        return {"method": context.method, "sent": await context.request.body}

    answer = await got(verb, method, "text/event-stream", json=[1])

    sent = f'data: {{"method":"{method}","sent":[1]}}\n\n'
    assert (200, "text/event-stream", sent.encode()) == answer.told


class Fields(TypedDict):
    """A dict."""

    a: int


def gives(told: Any, value: Any = None) -> Callable[..., Any]:
    """A verb whose return type is told to be this."""

    def verb() -> Any:
        get_context().response_headers["X-Ran"] = "yes"
        return value

    verb.__annotations__["return"] = told
    return verb


PLAIN = [dict[str, Any], dict, list[int], str, int, float, bool, Point, Fields, Mapping[str, int]]
OTHER = [Any, object, Response, Blob, bytes, EventStream, Iterator[int], dict | Response, "Unknown"]


@pytest.mark.parametrize("told", [*PLAIN, dict[str, int] | list[int], str | None], ids=repr)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_what_no_answer_can_satisfy_is_refused_before_the_work(
    told: Any, method: str
) -> None:
    """Where a verb says that it gives plain values, 406 does not wait for one."""
    answer = await got(gives(told, {"a": 1}), method, "image/png")

    assert 406 == answer.status
    assert "X-Ran" not in answer.headers


@pytest.mark.parametrize("told", OTHER, ids=repr)
async def test_where_an_answer_may_fit_the_verb_is_asked(told: Any) -> None:
    """Without such a type there may be a Response, a Blob or a stream of events, of any type."""
    answer = await got(gives(told, Blob("image/png", b"\x89")), accept="image/png")

    assert (200, "image/png", b"\x89") == answer.told


@pytest.mark.parametrize("method", ACTING)
async def test_nothing_needs_no_type(method: str) -> None:
    """A verb that acts and may return None is not refused for what the client accepts."""
    assert 204 == (await got(gives(dict[str, Any] | None), method, "image/png")).status
    assert 406 == (await got(gives(dict[str, Any]), method, "image/png")).status


async def test_a_verb_may_ask_for_the_406_itself() -> None:
    """`context.check_accept()` raises what a plain value would meet after the work."""

    def verb() -> Any:
        get_context().check_accept()
        raise AssertionError

    assert 406 == (await got(verb, "POST", "image/png")).status


# --- status


@pytest.mark.parametrize("value", [None, {"id": 7}], ids=["nothing", "value"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_what_was_created_is_201_with_its_place(method: str, value: Any) -> None:
    """`context.created` says that a record is new, and where it is."""

    def verb() -> Any:
        get_context().created("/it/7")
        return value

    answer = await got(verb, method)

    assert (201, "/it/7") == (answer.status, answer.headers["Location"])
    assert (b'{"id":7}' if value else b"") == answer.body


PLACES: list[tuple[Any, str]] = [
    (7, "/deep/notes/7"),
    ("a b", "/deep/notes/a%20b"),
    ("a/ß?", "/deep/notes/a/%C3%9F%3F"),
    ("/other/7?x=ß", "/other/7?x=%C3%9F"),
    ("/a%20b", "/a%20b"),
    ("https://other.example/7", "https://other.example/7"),
    ("7\r\nX-Smuggled: 1", "/deep/notes/7%0D%0AX-Smuggled%3A%201"),
]


@pytest.mark.parametrize(("place", "location"), PLACES, ids=repr)
async def test_a_location_is_a_url_or_an_id_below_the_mount(place: Any, location: str) -> None:
    """An id is enough; what HTTP does not allow in a header is percent-encoded."""

    def verb() -> None:
        get_context().created(place)

    async with running(resources={"deep/notes": answering(verb)}) as server:
        answer = await fetch(server, "POST", "/deep/notes")

    assert (201, location) == (answer.status, answer.headers["Location"])
    assert "X-Smuggled" not in answer.headers


@pytest.mark.parametrize(
    ("mount", "path", "location"),
    [
        ("of/:tenant/notes", "/of/a%20b/notes", "/of/a%20b/notes/7"),
        ("of/:tenant/notes", "/of/a/notes/", "/of/a/notes/7"),
        ("files/*path", "/files/a/b", "/files/a/b/7"),
    ],
)
async def test_an_id_is_below_the_mount_that_was_asked(
    mount: str, path: str, location: str
) -> None:
    """Where a mount has parameters, the place has what the request had for them."""

    def verb() -> None:
        get_context().created(7)

    async with running(resources={mount: answering(verb)}) as server:
        assert location == (await fetch(server, "POST", path)).headers["Location"]


async def test_an_id_below_the_root_has_one_slash() -> None:
    """The root mount has no name to put before it."""

    def verb() -> None:
        get_context().created(7)

    async with running(resources={"": answering(verb)}) as server:
        assert "/7" == (await fetch(server, "POST", "/")).headers["Location"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_status_set_on_the_context_is_for_plain_values(method: str) -> None:
    """A `Response` has its own, and the context's headers where it has none of that name."""

    def plain(target: RequestTarget) -> Any:
        get_context().status = 202
        get_context().response_headers["X-A"] = "context"
        return {} if target.get("own") is None else Response(203, {"X-A": "own"}, data={})

    async with running(resources={"it": answering(plain)}) as server:
        told = await fetch(server, method, "/it")
        own = await fetch(server, method, "/it?own=1")

    assert [(202, "context"), (203, "own")] == [(a.status, a.headers["X-A"]) for a in (told, own)]


async def test_options_is_204_with_what_is_answered() -> None:
    """`Allow` is the real list, HEAD with GET, and nobody has to log in for it."""
    resource = type("Some", (Resource,), dict.fromkeys(("get", "patch"), staticmethod(returns(1))))

    async with running(resources={"it": resource}) as server:
        answer = await ask(server, "OPTIONS", "/it", key="")

    assert (204, "GET, HEAD, PATCH, OPTIONS") == (answer.status, answer.headers["Allow"])


@pytest.mark.parametrize("method", ["COPY", "MOVE", "TRACE", "SUBSCRIBE"])
async def test_an_unknown_method_is_501(method: str) -> None:
    """What has no verb here is not recognised."""
    async with running(resources={"it": answering(returns(1))}) as server:
        answer = await ask(server, method, "/it")

    if method == "BREW":
        assert answer.status in (400, 501)  # the parser may know no such method
    else:
        assert (501, f"Method {method} is not recognised.") == (
            answer.status,
            answer.json["detail"],
        )


# --- the errors


def raising(error: BaseException) -> Callable[..., Any]:
    """A verb that raises this."""

    def verb() -> Any:
        raise error

    return verb


THROWN: dict[str, tuple[Callable[[], Response], int, str, bytes]] = {
    "data": (lambda: Response(409, data={"no": 1}), 409, JSON, b'{"no":1}'),
    "text": (lambda: Response(402, body="pay"), 402, TEXT, b"pay"),
    "bytes": (lambda: Response(500, body=b"\xff"), 500, BYTES, b"\xff"),
    "a redirect": (lambda: Response(303, {"Location": "/else"}), 303, *NOTHING),
    "a stream": (lambda: Response(206, body=later("a", "b")), 206, BYTES, b"ab"),
    "success": (lambda: Response(200, data="fine"), 200, JSON, b'"fine"'),
}


@pytest.mark.parametrize(("make", "status", "media", "body"), THROWN.values(), ids=THROWN)
async def test_a_response_may_be_raised(
    make: Callable[[], Response], status: int, media: str, body: bytes
) -> None:
    """It is sent as it would be if it were returned, past the class's own wording."""

    async def verb() -> Any:
        raise ResponseError(make())

    shaped = {"present_error": staticmethod(lambda *_: Response(599))}
    resource = answering(verb, **shaped)
    async with running(resources={"it": resource}) as server:
        answer = await fetch(server, "GET", "/it", allow_redirects=False)

    assert (status, media, body) == answer.told
    assert "x-request-id" in answer.headers


async def test_a_raised_response_keeps_what_the_context_had() -> None:
    """Headers that were set before go with it, as with a returned one."""

    def verb() -> Any:
        get_context().response_headers["X-A"] = "set"
        raise ResponseError(Response(400, {"X-B": "own"}, data=1))

    answer = await got(verb)

    assert (400, "set", "own") == (answer.status, answer.headers["X-A"], answer.headers["X-B"])


async def test_a_raised_response_that_cannot_be_sent_is_refused_in_good_form() -> None:
    """No common type for its data, or no form at all, is worded like any other fault."""
    refused = await got(raising(ResponseError(Response(400, data=1))), accept="image/png")
    faulty = await got(raising(ResponseError(Response(400, data=object()))))

    assert [406, 500] == [refused.status, faulty.status]
    assert 500 == decode_json(faulty.body, dict[str, Any])["status"]


async def test_a_response_raised_by_a_streams_first_step_is_the_answer() -> None:
    """Until the first item is there, nothing has been sent; later it is an error in-band."""
    thrown = ResponseError(Response(410, data="gone"))

    assert (410, JSON, b'"gone"') == (await got(lambda: later(thrown))).told
    late = decode_json((await got(lambda: later(1, thrown))).body, list[Any])
    assert [1, 410] == [late[0], late[1]["error"]["status"]]


class OutOfStock(Exception):
    """An error of the application's own."""

    status_code = 409


class Paused(Exception):
    """Another, by the other name."""

    def __init__(self, status: Any) -> None:
        super().__init__("swordfish")
        self.status = status


class FromUpstream(Exception):
    """A client library's: it holds the answer it is about."""

    status_code = 401
    response = "an answer"


ERRORS: dict[str, tuple[Exception, int, str | None]] = {
    "a client's": (ClientError("No."), 400, "No."),
    "a client's with a status": (ClientError("No.", status=422), 422, "No."),
    "a server's": (ServerError("swordfish"), 500, None),
    "a server's with a status": (ServerError("swordfish", status=503), 503, None),
    "any refusal": (HarperError("No.", status=418), 418, "No."),
    "no access for nobody": (AccessViolation(None), 401, "No credential was sent: must log in."),
    "no access for somebody": (AccessViolation("ada"), 403, "This user may not do that here."),
    "a value that does not fit": (InvalidBody("a: no"), 400, "a: no"),
    "one's own with status_code": (OutOfStock("no pears"), 409, "no pears"),
    "one's own without words": (OutOfStock(), 409, "OutOfStock"),
    "one's own with status": (Paused(429), 429, "swordfish"),
    "one's own of the server": (Paused(503), 503, None),
    "a status that is none": (Paused(200), 500, None),
    "a status out of range": (Paused(600), 500, None),
    "a status that is no number": (Paused("404"), 500, None),
    "a client library's": (FromUpstream("swordfish"), 500, None),
    "unforeseen": (ZeroDivisionError("swordfish"), 500, None),
}


@pytest.mark.parametrize(("error", "status", "detail"), ERRORS.values(), ids=ERRORS)
async def test_an_error_becomes_a_problem_of_its_status(
    error: Exception, status: int, detail: str | None
) -> None:
    """Type, title, status, detail and instance are there; of a 5xx the text stays in the house."""
    async with running(resources={"it": answering(raising(error))}) as server:
        answer = await fetch(server, "GET", "/it?a=1")

    problem = decode_json(answer.body, dict[str, Any])
    assert (status, status, JSON) == (
        answer.status,
        problem["status"],
        answer.headers["Content-Type"],
    )
    assert ("about:blank", "/it?a=1") == (problem["type"], problem["instance"])
    assert {"title", "detail", "request_id"} <= set(problem)
    if detail is None:
        assert b"swordfish" not in answer.body
    else:
        assert detail == problem["detail"]


@pytest.mark.parametrize(
    ("error", "level", "traced"),
    [
        (ClientError("swordfish"), logging.INFO, False),
        (OutOfStock("swordfish"), logging.INFO, False),
        (ServerError("swordfish"), logging.WARNING, False),
        (ResponseError(Response(500)), logging.INFO, False),
        (ZeroDivisionError("swordfish"), logging.ERROR, True),
    ],
    ids=repr,
)
async def test_each_error_is_logged_at_its_level(
    error: Exception,
    level: int,
    traced: bool,  # noqa: FBT001
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A refusal is news, a fault a warning, and what nobody foresaw has its trace."""
    caplog.set_level(logging.INFO, logger="harperpy.dispatch")

    await got(raising(error))

    (record,) = [record for record in caplog.records if record.name == "harperpy.dispatch"]
    assert (level, traced) == (record.levelno, bool(record.exc_info))


async def test_a_refusal_of_what_can_be_read_is_readable() -> None:
    """Where negotiation fails, the 406 itself is JSON."""
    answer = await got(returns({}), accept="image/png")

    assert (406, JSON) == (answer.status, answer.headers["Content-Type"])
    assert "application/json" in decode_json(answer.body, dict[str, Any])["detail"]


# --- the server's own path


@pytest.mark.parametrize("path", ["health", "/health", "health/"])
def test_what_the_server_answers_itself_cannot_be_mounted(path: str) -> None:
    """A mount that nobody could reach is refused when it is asked for, by force too."""
    for force in (False, True):
        with pytest.raises(RegistrationError, match="'health' cannot be mounted"):
            Resources().set(path, answering(returns(1)), force=force)


async def test_below_the_servers_path_one_may_mount() -> None:
    """Only the very path is taken, on either port."""

    def apply(scope: Scope) -> None:
        scope.resources.set("health/checks", answering(returns("mine")))
        with pytest.raises(RegistrationError):
            scope.operations_resources.set("health", answering(returns(1)))

    async with running(handle_application=apply) as server:
        assert '"mine"' == (await ask(server, "GET", "/health/checks")).text


# --- pages of other origins, port by port

TWO_PORTS = """
http: {cors: true, corsAccessList: ['https://app.example']}
operationsApi: {network: {cors: true, corsAccessList: ['https://admin.example']}}
"""


@pytest.mark.parametrize("origin", ["https://app.example", "https://admin.example", None])
async def test_each_port_has_its_own_list_of_origins(origin: str | None) -> None:
    """A page that may call one port may not call the other; both answers vary by the origin."""
    headers = {"Origin": origin} if origin else {}
    async with running(TWO_PORTS) as server:
        rest = await ask(server, "GET", "/health", headers=headers)
        admin = await ask(server, "GET", f"{server.operations_url}/health", headers=headers)

    allowed = [a.headers.get("Access-Control-Allow-Origin") for a in (rest, admin)]
    mine = [origin if origin and name in origin else None for name in ("app", "admin")]
    assert mine == allowed
    assert all("Origin" in one.headers["Vary"].split(", ") for one in (rest, admin))


# --- a slow reader


@pytest.mark.parametrize("item", [1 << 10, 1 << 14, 1 << 18], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("keepalive", [0.001, 600])
async def test_a_reader_that_does_not_read_costs_a_bounded_number_of_bytes(
    item: int, keepalive: float
) -> None:
    """The producer rests once 128 KiB and an item wait in the server; no comment is added then."""
    made = most = 0

    async def flood() -> AsyncIterator[SSE]:
        nonlocal made, most
        while True:
            made, most = made + 1, max(most, unsent(server))
            yield SSE(data="x" * item)

    resource = answering(flood, keepalive=keepalive)
    async with running(resources={"it": resource}) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        head = f"GET /it HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {server.api_key}\r\n\r\n"
        writer.write(head.encode())
        await reader.readuntil(b"\r\n\r\n")
        # What it has read ahead is bounded as well: from now on nobody takes anything.
        writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
        looks: deque[tuple[int, int]] = deque(maxlen=10)

        def rests() -> bool:
            looks.append((made, unsent(server)))
            return len(looks) == 10 and len(set(looks)) == 1

        await until(rests)
        most = max(most, unsent(server))
        writer.close()

    assert made > 1
    assert 0 < most <= 2 * 64 * 1024 + item + 1024


def unsent(server: RunningServer) -> int:
    """How many bytes the server holds for its REST connections."""
    connections = server.server._listeners[0].connections.connections
    transports = [protocol.transport for protocol in connections]
    return sum(transport.get_write_buffer_size() for transport in transports if transport)


# --- the server's end


async def while_stopping(stream: Callable[[], AsyncIterator[SSE]]) -> str:
    """What a stream says after its first event `a`, and the server begins to stop."""
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(resources={"it": answering(stream)}))
        async with server.session() as client, client.get("/it") as response:
            assert b"data: a\n\n" == await response.content.readuntil(b"\n\n")
            stopping = asyncio.create_task(stack.pop_all().aclose())
            rest = await response.text()
            await stopping
    return rest


async def test_a_stream_that_the_server_cannot_wait_for_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last event is the 503; its signal says that it was the server, not the client."""
    monkeypatch.setattr("harperpy.server._DRAIN_SECONDS", 0.05)
    seen: list[str | None] = []

    async def endless() -> AsyncIterator[SSE]:
        signal = get_context().signal
        assert signal is not None
        try:
            yield SSE(data="a")
            await asyncio.Event().wait()
        finally:
            seen.append(signal.reason)

    rest = await while_stopping(endless)

    assert ["server_shutdown"] == seen
    assert rest.startswith("event: harper-error\ndata: {")
    assert '"status":503' in rest


async def test_nobody_is_told_of_a_stream_whose_client_has_left() -> None:
    """A cancellation that is not the server's end is no failure: nothing is worded for it."""
    ended = asyncio.Event()
    worded: list[HarperError] = []

    class Endless(Resource):
        @staticmethod
        async def get() -> AsyncIterator[SSE]:
            try:
                yield SSE(data="a")
                await asyncio.Event().wait()
            finally:
                ended.set()

        @staticmethod
        def present_stream_error(error: HarperError, context: Context) -> Any:
            worded.append(error)

    async with asyncio.timeout(20), running(resources={"it": Endless}) as server:
        async with server.session() as client:
            response = await client.get("/it")
            await response.content.readuntil(b"\n\n")
            response.close()
        await ended.wait()
        assert 200 == (await ask(server, "GET", "/health")).status

    assert [] == worded


async def test_a_signal_that_the_servers_end_fired_is_no_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that raises what its signal says is out of service, not out of time."""
    monkeypatch.setattr("harperpy.server._DRAIN_SECONDS", 0.05)

    async def polite() -> AsyncIterator[SSE]:
        signal = get_context().signal
        assert signal is not None
        yield SSE(data="a")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        signal.raise_if_aborted()

    rest = await while_stopping(polite)

    assert '"status":503' in rest


async def test_a_verb_that_the_server_cannot_wait_for_learns_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal's reason is there when the verb's task is cancelled."""
    monkeypatch.setattr("harperpy.server._DRAIN_SECONDS", 0.05)
    entered, seen = asyncio.Event(), list[str | None]()

    async def stuck() -> Any:
        signal = get_context().signal
        assert signal is not None
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(signal.reason)

    async with asyncio.timeout(20):
        async with running(resources={"it": answering(stuck)}) as server:
            call = asyncio.create_task(ask(server, "GET", "/it"))
            await entered.wait()
        with pytest.raises(aiohttp.ClientError):
            await call

    assert ["server_shutdown"] == seen


async def test_a_stream_without_end_may_end_as_the_server_stops() -> None:
    """`context.stopping` fires first, while what runs may still end in its own good time."""

    async def ticks() -> AsyncIterator[SSE]:
        yield SSE(data="a")
        await get_context().stopping.wait()
        yield SSE(data="bye")

    assert "data: bye\n\n" == await while_stopping(ticks)


async def test_json_refusals_stay_json_for_who_wants_events() -> None:
    """A refusal before a stream has begun is an answer like any other, whatever was accepted."""
    answer = await got(raising(ClientError("No.")), accept="text/event-stream")

    assert (400, JSON) == (answer.status, answer.headers["Content-Type"])
    assert json_response(400, 1).headers["Content-Type"] == answer.headers["Content-Type"]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("streamed", [False, True])
async def test_bytes_are_bytes_whatever_holds_them(kind: Any, streamed: bool) -> None:  # noqa: FBT001
    """In a body, and in each piece of one."""
    body = kind(b"\x03\x02")
    found = await got(lambda: Response(200, body=iter([body, body]) if streamed else body))

    assert (200, b"\x03\x02" * (1 + streamed)) == (found.status, found.body)


@pytest.mark.parametrize("status", [100, 101, 103, 199, 0, 1000])
@pytest.mark.parametrize("how", ["a response", "the context", "a stream"])
async def test_a_status_that_no_answer_has_is_ours_to_mend(status: int, how: str) -> None:
    """Its client would go on waiting for the answer, and take the body for that."""

    def odd() -> Any:
        if how == "a response":
            return Response(status, body=b"hi")
        get_context().status = status
        return iter("hi") if how == "a stream" else "hi"

    found = await got(odd)

    assert (500 if status or how == "a response" else 200) == found.status


@pytest.mark.parametrize("front", ["on", "off"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_how_an_answer_is_framed_is_not_the_handlers_to_say(
    streamed: bool,  # noqa: FBT001
    front: str,
) -> None:
    """Headers of another server's answer are passed on, and its `Transfer-Encoding` is not."""
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "text/plain"}
    if streamed:
        headers["Content-Length"] = "5"
    configured = f"{ECHO}\nhttp: {{front: {front}}}"
    make = lambda: Response(200, headers, body=iter(["he", "llo"]) if streamed else "hello")  # noqa: E731
    async with running(configured, resources={"it": answering(make, public=True)}) as server:
        request = "GET /it HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
        answer = await ask_raw(server, request)

    assert "transfer-encoding" not in {name.lower() for name in answer.headers}
    assert ("5", "hello") == (answer.headers["Content-Length"], answer.text)


async def test_what_a_handler_waits_for_may_be_cancelled() -> None:
    """The request is not: it gets an answer."""

    async def waits() -> str:
        coming: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        coming.cancel()
        return await coming

    assert 500 == (await got(waits)).status


@pytest.mark.parametrize(
    "make",
    [
        lambda: Response(201, body={"a": "b"}),  # type: ignore[dict-item]
        lambda: {"status": 201, "headers": {}, "body": {"a": "b"}},
    ],
    ids=["a response", "a dict"],
)
async def test_a_dict_is_no_body(make: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """Its keys are not sent for it: the answer is 500, and the log says where a dict goes."""
    assert 500 == (await got(make)).status
    assert "body takes text, bytes or an iterable of them; data takes a dict" in caplog.text


@pytest.mark.parametrize(
    ("accept", "told"),
    [
        ("application/json", b'"status":500'),
        ("application/x-ndjson", b"$harperStreamError"),
        ("text/event-stream", b"event: harper-error"),
    ],
)
async def test_what_a_stream_waits_for_may_be_cancelled(
    accept: str, told: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is not: it ends with an error in-band, and the log has its trace."""

    async def waits() -> AsyncIterator[str]:
        yield "first"
        coming: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        coming.cancel()
        yield await coming

    answer = await got(waits, accept=accept)

    assert b"first" in answer.body
    assert told in answer.body
    assert "unhandled CancelledError" in caplog.text


async def test_sys_exit_in_a_request_ends_no_server(caplog: pytest.LogCaptureFixture) -> None:
    """Not of a verb, a hook, a stream, a middleware or a model: each is a failure, and logged."""
    steps: dict[str, int] = {}

    def leave(place: str, *_: Any) -> Any:
        steps[place] = 1
        sys.exit(place)

    async def stream(place: str) -> AsyncIterator[str]:
        yield "first"
        leave(place)

    class Connected(Resource):
        public = True

        @staticmethod
        def connect() -> AsyncIterator[str]:
            return stream("connect")

    class Hidden(Resource):
        @staticmethod
        def allow_read(user: User | None, target: RequestTarget, context: Context) -> Any:
            leave("hook")

        @staticmethod
        def get() -> None:
            """Nobody comes here."""

    async def around(context: Context, call_next: Next) -> Reply:
        return leave("middleware") if context.path == "/around" else await call_next(context)

    def apply(scope: Scope) -> None:
        scope.server.http(around)
        model = define_backend("model", generate=partial(leave, "model"))
        scope.models.register_backend("generative", "model", model)

    resources = {
        "verb": answering(partial(leave, "verb"), public=True),
        "events": answering(lambda: EventStream(stream("events")), public=True),
        "raw": answering(lambda: Response(body=stream("raw")), public=True),
        "asks": answering(lambda: get_context().models.generate("hi", model="model"), public=True),
        "connected": Connected,
        "hidden": Hidden,
    }
    async with (
        running(handle_application=apply, resources=resources) as server,
        server.session() as client,
    ):
        for path, status in {"verb": 500, "hidden": 500, "around": 500, "asks": 502}.items():
            assert status == (await client.get(f"/{path}")).status
        told = await (await client.get("/events")).text()
        assert ["data: first", "event: harper-error"] == told.splitlines()[:3:2]
        with pytest.raises(aiohttp.ClientPayloadError):
            await (await client.get("/raw")).read()
        async with client.ws_connect("/connected") as socket:
            assert "first" == await socket.receive_str()
            assert 1011 == (await socket.receive()).data
        assert 200 == (await client.get("/health")).status
    assert {"verb", "hook", "middleware", "model", "events", "raw", "connect"} == steps.keys()
    assert all(f"SystemExit: {place}" in caplog.text for place in steps)
