"""In which form values travel: negotiation, bodies, versions, caches, compression."""

import asyncio
import gzip
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yaml

from harperpy import (
    Body,
    ContentType,
    Context,
    Parts,
    RegistrationError,
    RequestTarget,
    Resource,
    Response,
    Scope,
)
from harperpy.testing import ECHO, running
from helpers import Answered, ask

PAGE = Path(__file__).parent.parent / "docs" / "content-types.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
LONG = "x" * 5000


class Order(msgspec.Struct):
    """A typed body."""

    name: str
    count: int = 1
    tags: list[str] = []


class Typed(Resource):
    """Takes a Struct."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Order) -> Order:
        """What came."""
        return data


class Raw(Resource):
    """Takes anything."""

    public = True

    @staticmethod
    async def get(target: RequestTarget, context: Context) -> Any:
        """What it is asked for in the query."""
        context.etag = target.get("etag")
        if modified := target.get("modified"):
            context.last_modified = float(modified)
        return {"text": target.get("text", "ä")}

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> Any:
        """What came, or what the parts of it are."""
        value = await data
        if isinstance(value, Parts):
            return [
                [part.name, part.filename, part.content_type, len(await part.bytes())]
                async for part in value
            ]
        return {"got": value.hex() if isinstance(value, bytes) else value}

    @staticmethod
    async def put(target: RequestTarget, data: Body, context: Context) -> None:
        """A write of what has the version in the query, if anything."""
        context.check_version(target.get("etag"))


class Items(Resource):
    """A stream of records, and a file below."""

    public = True
    sub_paths = True

    @staticmethod
    async def get(target: RequestTarget) -> Any:
        """Two records; of a path, what it is called."""
        if target.id:
            yield {"id": target.id}
            return
        yield {"a": 1}
        yield {"a": 2}


class Answers(Items):
    """The same, whose names have no extensions of their own."""

    extensions = True


class Size(Resource):
    """Takes anything, and gives little."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """How much came."""
        return len(await data)


RESOURCES = {"typed": Typed, "raw": Raw, "size": Size, "items": Items, "answers": Answers}


async def get(path: str, config: str = ECHO, key: str | None = "", **headers: str) -> Answered:
    """What a GET is answered, anonymously unless a key is given."""
    async with running(config, resources=RESOURCES) as server:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await ask(server, "GET", path, key=key, headers=named)


async def post(path: str, body: Any, content_type: str | None, **headers: str) -> Answered:
    """What a POST of these bytes is answered."""
    async with running(resources=RESOURCES) as server:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if content_type:
            named["Content-Type"] = content_type
        # aiohttp's client would add a type of its own.
        options: Any = {} if content_type else {"skip_auto_headers": ["Content-Type"]}
        return await ask(server, "POST", path, key="", data=body, headers=named, **options)


@pytest.mark.parametrize(
    ("accept", "media", "text"),
    [
        ("application/yaml", "application/yaml", "text: ä\n"),
        ("application/x-yaml", "application/x-yaml", "text: ä\n"),
        ("text/yaml", "text/yaml", "text: ä\n"),
        ("application/yaml;q=0.5, application/json", "application/json", '{"text":"ä"}'),
        ("application/*", "application/json", '{"text":"ä"}'),
        ("text/*;q=0.1, */*;q=0.01", "text/event-stream", 'data: {"text":"ä"}\n\n'),
        ("application/json;q=0, application/yaml", "application/yaml", "text: ä\n"),
        (f"{'a/b,' * 99} application/yaml", "application/yaml", "text: ä\n"),
        (f"{'a/b,' * 99} */*;q=0.1, application/yaml", "application/json", '{"text":"ä"}'),
    ],
)
async def test_the_client_chooses_how_a_value_is_written(
    accept: str, media: str, text: str
) -> None:
    """Names, qualities and wildcards of `Accept` decide; a quality of 0 excludes.

    What comes after a hundred is not read.
    """
    answer = await get("/raw", accept=accept)
    assert (200, media, text) == (answer.status, answer.headers["Content-Type"], answer.text)
    assert "Accept" in answer.headers["Vary"].split(", ")


async def test_a_stream_of_yaml_is_a_document_for_each_item() -> None:
    """Each item begins with `---`."""
    answer = await get("/items", accept="application/yaml")
    assert (200, "---\na: 1\n---\na: 2\n") == (answer.status, answer.text)


async def test_a_long_answer_in_yaml_stops_nobody() -> None:
    """It is not laid out, which takes seconds, and says the same: JSON is YAML too."""
    numbers = [1, -1.5, 9e-6, 1e22, -2.5e-9, 2**70, None, True]
    value = [{"n": numbers, "text": f"{at}: 9e-6, [ä\n\\"} for at in range(600)]
    answer = await post("/raw", json.dumps(value), JSON, accept="application/yaml")
    assert (200, "application/yaml") == (answer.status, answer.headers["Content-Type"])
    assert 1 == answer.text.count("\n")
    assert {"got": value} == yaml.safe_load(answer.text)


async def test_an_integer_that_a_type_cannot_say_is_406() -> None:
    """MessagePack has 64 bits for one; JSON, which has no bounds, has the value."""
    value = json.dumps({"n": [2**70]})
    refused = await post("/raw", value, JSON, accept="application/x-msgpack")
    told = "Accept: application/x-msgpack: it holds an integer of more than 64 bits"
    assert (406, told) == (refused.status, refused.json["detail"])
    assert {"got": {"n": [2**70]}} == (await post("/raw", value, JSON, accept=JSON)).json


@pytest.mark.parametrize(
    ("path", "media", "text"),
    [
        ("/raw.yaml", "application/yaml", "text: ä\n"),
        ("/raw.json?text=b", "application/json", '{"text":"b"}'),
        ("/items.ndjson", "application/x-ndjson", '{"a":1}\n{"a":2}\n'),
        ("/items.csv", "text/csv; charset=utf-8", "a\r\n1\r\n2\r\n"),
        ("/items/report.csv", "application/json", '[{"id":"report.csv"}]'),
        ("/answers/report.csv", "text/csv; charset=utf-8", "id\r\nreport\r\n"),
        ("/answers/report.pdf", "application/json", '[{"id":"report.pdf"}]'),
        ("/answers/.csv", "application/json", '[{"id":".csv"}]'),
    ],
)
async def test_an_extension_asks_for_a_type(path: str, media: str, text: str) -> None:
    """It outweighs `Accept`; below a mount it is part of the name, unless the class says else."""
    answer = await get(path, accept="application/json")
    assert (200, media, text) == (answer.status, answer.headers["Content-Type"], answer.text)


async def test_a_mount_with_a_dot_is_itself() -> None:
    """`/notes.csv` that is mounted is found before `/notes` as CSV."""
    async with running(resources={"raw": Raw, "raw.csv": Items}) as server:
        answer = await ask(server, "GET", "/raw.csv", key="")
        unknown = await ask(server, "GET", "/nothing.csv", key="")
    assert [{"a": 1}, {"a": 2}] == answer.json
    assert 404 == unknown.status


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        ("application/json", b'{"a":1}', {"a": 1}),
        ("application/vnd.api+json", b'{"a":1}', {"a": 1}),
        (None, b' [1, "x"]', [1, "x"]),
        (None, b"plain", b"plain".hex()),
        ("application/msgpack", msgspec.msgpack.encode({"a": [1]}), {"a": [1]}),
        ("application/x-msgpack", msgspec.msgpack.encode("x"), "x"),
        ("application/x-ndjson", b'{"a":1}\n\n[2]\r\n', [{"a": 1}, [2]]),
        (FORM, b"a=1&b=%C3%A4+x&a=2&a=&c=", {"a": ["1", "2", ""], "b": "ä x", "c": ""}),
        ("text/markdown; charset=utf-8", "ä".encode(), "ä"),
        ("application/octet-stream", b"\xff\x00", "ff00"),
        ("image/png", b"\x89", "89"),
        ("application/json", b"", None),
    ],
)
async def test_a_body_is_what_its_type_says(
    content_type: str | None, body: bytes, value: Any
) -> None:
    """`await data` decodes what the server knows, and gives bytes for the rest."""
    answer = await post("/raw", body, content_type)
    assert (200, {"got": value}) == (answer.status, answer.json)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{"),
        ("application/msgpack", b"\xc1"),
        ("application/x-ndjson", b"{}\n{"),
        (FORM, b"%ff=1"),
        (FORM, b"&".join(b"a%d=" % at for at in range(1001))),
        ("text/plain", b"\xff"),
    ],
)
async def test_a_body_that_is_not_what_it_says_is_400(content_type: str, body: bytes) -> None:
    """The refusal names what it should have been."""
    answer = await post("/raw", body, content_type)
    assert 400 == answer.status
    assert "the body is not" in answer.json["detail"]


LISTS = b"\xdd" + (6_000_000).to_bytes(4, "big") + b"\x90" * 6_000_000
BYTES = hashlib.shake_128(b"").digest(9_000_000)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/msgpack", LISTS, 413),
        ("application/msgpack", msgspec.msgpack.encode(LISTS), 413),
        ("application/msgpack", msgspec.msgpack.encode(BYTES), 200),
        ("application/msgpack", msgspec.msgpack.encode("ひらがな" * 800_000), 200),
        ("application/x-ndjson", b"{}\n" * 3_000_000, 200),
    ],
    ids=["lists", "bytes like lists", "bytes", "text", "lines"],
)
async def test_what_takes_long_to_read_is_not_read(
    content_type: str, body: bytes, status: int
) -> None:
    """MessagePack that may hold millions of lists is refused; what else is as long is not."""
    answer = await post("/size", io.BytesIO(body), content_type)
    assert status == answer.status
    if status == 413:
        assert "5000000 bytes that begin a list" in answer.json["detail"]


@pytest.mark.parametrize(
    ("content_type", "body", "told"),
    [
        (FORM, b"name=a&count=3&tags=x&tags=y", {"name": "a", "count": 3, "tags": ["x", "y"]}),
        (
            "application/msgpack",
            msgspec.msgpack.encode({"name": "a"}),
            {"name": "a", "count": 1, "tags": []},
        ),
        (FORM, b"name=a&count=x", "count: Expected `int`, got `str`"),
        ("application/msgpack", msgspec.msgpack.encode({"name": 1}), "name: Expected `str`, got"),
        ("text/plain", b"name", "Content-Type: expected application/json, got text/plain"),
        ("image/png", b"\x89", "Content-Type: expected application/json, got image/png"),
    ],
)
async def test_a_typed_body_comes_in_any_form_that_holds_fields(
    content_type: str, body: bytes, told: Any
) -> None:
    """A Struct is made of a form or of MessagePack as of JSON, with the same refusals."""
    answer = await post("/typed", body, content_type)
    if isinstance(told, dict):
        assert (200, told) == (answer.status, answer.json)
    else:
        assert 400 == answer.status
        assert told in answer.json["detail"]


def upload(*parts: tuple[str, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    """A multipart body: of each part its head and its content."""
    return (
        b"".join(
            b"--edge\r\nContent-Disposition: form-data; "
            + head.encode()
            + b"\r\n\r\n"
            + data
            + b"\r\n"
            for head, data in parts
        )
        + end
    )


EDGE = "multipart/form-data; boundary=edge"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        pytest.param(
            upload(('name="a"', b"1"), ('name="f"; filename="\u00fc.bin"', b"\x00" * 300_000)),
            [["a", None, "", 1], ["f", "ü.bin", "", 300_000]],
            id="a field and a file",
        ),
        pytest.param(
            upload(('name="f"; filename="a"\r\nContent-Type: image/png', b"--edg")),
            [["f", "a", "image/png", 5]],
            id="a file with a type",
        ),
        pytest.param(upload(), [], id="none"),
    ],
)
async def test_uploads_are_read_part_by_part(body: bytes, told: list[Any]) -> None:
    """Each part has its name, its file's name and type, and all of its content."""
    answer = await post("/raw", body, EDGE)
    assert (200, told) == (answer.status, answer.json)


async def test_what_of_a_part_is_not_read_is_passed_over() -> None:
    """The next part is whole, and the connection serves the next request."""

    class Names(Resource):
        public = True

        @staticmethod
        async def post(target: RequestTarget, data: Body) -> list[str]:
            return [part.name async for part in data.parts()]

    body = upload(*((f'name="p{at}"', b"x" * 100_000) for at in range(4)))
    async with running(resources={"names": Names}) as server, server.session("") as client:
        for _ in range(2):
            async with client.post("/names", data=body, headers={"Content-Type": EDGE}) as answer:
                assert ["p0", "p1", "p2", "p3"] == await answer.json()


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        (EDGE, upload(('name="a"', b"1"), end=b""), "ends before its last boundary"),
        (EDGE, upload(*((f'name="{at}"', b"") for at in range(1001))), "at most 1000 parts"),
        (EDGE, b"no boundary", "the multipart body cannot be read"),
        (EDGE, b"--edge\r\nA" + b"a" * 5000, "the multipart body cannot be read"),
        ("multipart/form-data", b"", "Content-Type: expected multipart/form-data with a boundary"),
        (
            f"multipart/form-data; boundary={'b' * 300}",
            b"",
            "Content-Type: ",
        ),
    ],
)
async def test_an_upload_that_cannot_be_read_is_400(
    content_type: str, body: bytes, said: str
) -> None:
    """The refusal says what is wrong with it."""
    answer = await post("/raw", body or b"x", content_type)
    assert 400 == answer.status
    assert said in answer.json["detail"]


async def test_parts_of_what_is_no_upload_are_400() -> None:
    """`data.parts()` names the type that it expects."""
    async with running(resources={"up": _Upload}) as server:
        answer = await ask(server, "POST", "/up", key="", json={})
    expected = "Content-Type: expected multipart/form-data, got application/json"
    assert (400, expected) == (answer.status, answer.json["detail"])


class _Upload(Resource):
    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """How many parts there are."""
        return len([part async for part in data.parts()])


async def test_the_limit_counts_what_a_compressed_body_becomes() -> None:
    """A small body that inflates to too much is 413; one that does not is read."""
    bomb = gzip.compress(b'"' + b"a" * 20_000_000 + b'"')
    assert len(bomb) < 100_000
    refused = await post("/raw", bomb, "application/json", Content_Encoding="gzip")
    read = await post("/raw", gzip.compress(b'"a"'), "application/json", Content_Encoding="gzip")
    assert (413, "payload_too_large") == (refused.status, refused.json["code"])
    assert (200, {"got": "a"}) == (read.status, read.json)


async def test_a_form_is_no_upload() -> None:
    """Above 2 MB it is 413: each of its bytes may have to be decoded."""
    answer = await post("/raw", io.BytesIO(b"a=" + b"%41" * 700_000), FORM)
    assert 413 == answer.status
    assert "2000000 bytes" in answer.json["detail"]


async def test_a_plugin_adds_a_type() -> None:
    """It is sent to who asks for it by name or extension, never for a wildcard, and is read."""

    def shout(value: Any) -> bytes:
        return str(value).upper().encode()

    def apply(scope: Scope) -> None:
        for path, resource in RESOURCES.items():
            scope.resources.set(path, resource)
        scope.server.content_types.register(
            "application/x-shout",
            ContentType(serialize=shout, deserialize=int, quality=1.0, extension="shout"),
        )

    async with running(handle_application=apply) as server:

        async def got(path: str, accept: str) -> str:
            answer = await ask(server, "GET", path, key="", headers={"Accept": accept})
            assert 200 == answer.status
            return answer.text

        assert "{'TEXT': 'Ä'}" == await got("/raw", "application/x-shout")
        assert "{'TEXT': 'Ä'}" == await got("/raw.shout", "application/json")
        assert "{'A': 1}{'A': 2}" == await got("/items", "application/x-shout")
        assert '{"text":"ä"}' == await got("/raw", "application/*, */*;q=0.1")
        headers = {"Content-Type": "application/x-shout"}
        number = await ask(server, "POST", "/raw", key="", data=b"5", headers=headers)
        wrong = await ask(server, "POST", "/raw", key="", data=b"x", headers=headers)
    assert {"got": 5} == number.json
    expected = "the body is not valid application/x-shout"
    assert (400, expected) == (wrong.status, wrong.json["detail"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cbor", "'cbor': expected a media type in lower case, such as application/cbor"),
        ("application/CBOR", "expected a media type in lower case"),
        ("text/*", "expected a media type in lower case"),
        ("application/json", "application/json cannot be registered: it is the server's own"),
    ],
)
async def test_what_is_no_type_is_refused(name: str, said: str) -> None:
    """The plugin does not start, and the sentence says why."""

    def apply(scope: Scope) -> None:
        scope.server.content_types.register(name, ContentType())

    async with running(handle_application=apply) as server:
        failed = server.server.health.whole()["plugins"]["test"]
    assert said in failed["error"]


async def test_no_type_is_added_once_the_server_runs() -> None:
    """What clients may ask for does not change under them."""
    async with running() as server:
        types = server.server.core.content_types
        with pytest.raises(RegistrationError, match="the server has started"):
            types.register("application/x-late", ContentType())


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ('"v1"', 304),
        ('W/"v1"', 304),
        ('"v0", "v1"', 304),
        ("*", 304),
        ('"v2"', 200),
        ("v1", 200),
    ],
)
async def test_who_has_this_version_is_told_so(told: str, status: int) -> None:
    """304 has the version and no body; any other answer is whole."""
    answer = await get("/raw?etag=v1", if_none_match=told)
    assert (status, '"v1"') == (answer.status, answer.headers["ETag"])
    assert ("" if status == 304 else '{"text":"ä"}') == answer.text


async def test_a_version_may_be_any_text_and_time_any_moment() -> None:
    """What cannot stand in a header is encoded; `last_modified` is a date."""
    answer = await get("/raw?etag=a%22%0A%C3%A4&modified=0")
    assert '"a%22%0A%C3%A4"' == answer.headers["ETag"]
    assert "Thu, 01 Jan 1970 00:00:00 GMT" == answer.headers["Last-Modified"]
    again = await get("/raw?etag=a%22%0A%C3%A4", if_none_match=answer.headers["ETag"])
    assert 304 == again.status


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/raw?etag=v1", {"If-Match": '"v1"'}, 204),
        ("/raw?etag=v1", {"If-Match": '"v0", "v1"'}, 204),
        ("/raw?etag=v1", {"If-Match": "*"}, 204),
        ("/raw?etag=v1", {"If-Match": '"v2"'}, 412),
        ("/raw?etag=v1", {"If-Match": 'W/"v1"'}, 412),
        ("/raw", {"If-Match": "*"}, 412),
        ("/raw?etag=v1", {"If-None-Match": "*"}, 412),
        ("/raw?etag=v1", {"If-None-Match": '"v1"'}, 412),
        ("/raw?etag=v1", {"If-None-Match": '"v2"'}, 204),
        ("/raw", {"If-None-Match": "*"}, 204),
        ("/raw?etag=v1", {}, 204),
    ],
)
async def test_a_write_is_for_the_version_that_it_names(
    path: str, headers: dict[str, str], status: int
) -> None:
    """A write meant for another version, or for none, is 412."""
    async with running(resources=RESOURCES) as server:
        answer = await ask(server, "PUT", path, key="", data=b"x", headers=headers)
    assert status == answer.status
    assert status == 204 or "precondition_failed" == answer.json["code"]


class Cached(Resource):
    """Says itself who may keep it."""

    public = True

    @staticmethod
    async def get(target: RequestTarget) -> Response:
        """With the `Cache-Control` of the query."""
        return Response(200, {"Cache-Control": target.get("cache") or ""}, data=1)


class Varying(Resource):
    """Says itself what its answers vary by, and answers in one of several ways."""

    public = True
    sub_paths = True

    @staticmethod
    async def get(target: RequestTarget, context: Context) -> Any:
        """A record, a `Response` of one, or a stream of them."""
        for name in target.get_all("by"):
            context.response_headers.add("Vary", name)
        ways = {"plain": {"a": 1}, "response": Response(data={"a": 1}), "stream": iter([{"a": 1}])}
        return ways[target.id or "plain"]


@pytest.mark.parametrize("way", ["plain", "response", "stream"])
@pytest.mark.parametrize(
    ("query", "told"),
    [
        pytest.param("", {"accept"}, id="nothing else"),
        pytest.param("?by=Accept-Language", {"accept-language", "accept"}, id="a longer name"),
        pytest.param("?by=accept,%20X-A", {"accept", "x-a"}, id="said already"),
        pytest.param("?by=X-A&by=X-B", {"x-a", "x-b", "accept"}, id="on two lines"),
        pytest.param("?by=*", {"*"}, id="everything"),
    ],
)
async def test_no_cache_gives_one_clients_type_to_another(
    way: str, query: str, told: set[str]
) -> None:
    """What was negotiated says that it varies by `Accept`, beside what the handler says."""
    async with running(f"{ECHO}\nhttp: {{cors: false}}", resources={"it": Varying}) as server:
        yaml = {"Accept": "application/yaml"}
        answer = await ask(server, "GET", f"/it/{way}{query}", key="", headers=yaml)

    assert (200, "application/yaml") == (answer.status, answer.headers["Content-Type"])
    assert told == {name.strip().lower() for name in answer.headers["Vary"].split(",")}


@pytest.mark.parametrize(
    ("path", "authorization", "told"),
    [
        pytest.param("/raw", "", (None, False), id="anonymous"),
        pytest.param("/raw", "ours", ("private, no-cache", True), id="logged in"),
        pytest.param("/raw", "Bearer wrong", ("private, no-cache", True), id="refused"),
        pytest.param("/v1/models", "", ("private, no-cache", True), id="401"),
        pytest.param(
            "/cached?cache=public,max-age=9", "ours", ("public,max-age=9", False), id="public"
        ),
        pytest.param("/cached?cache=max-age=9", "ours", ("max-age=9", True), id="its own"),
    ],
)
async def test_no_cache_gives_one_callers_answer_to_another(
    path: str, authorization: str, told: tuple[str | None, bool]
) -> None:
    """What depends on who asks is private, unless the handler says otherwise."""
    async with running(resources={**RESOURCES, "cached": Cached}) as server:
        header = f"Bearer {server.api_key}" if authorization == "ours" else authorization
        headers = {"Authorization": header} if header else {}
        answer = await ask(server, "GET", path, key="", headers=headers)
    vary = answer.headers.get("Vary", "").split(", ")
    assert told == (answer.headers.get("Cache-Control"), "Authorization" in vary)


ZIPPED = f"{ECHO}\nhttp: {{compressionThreshold: 1KiB}}"


@pytest.mark.parametrize(
    ("config", "path", "accepts", "zipped"),
    [
        pytest.param(ZIPPED, f"/raw?text={LONG}", "br, gzip;q=0.5", True, id="large"),
        pytest.param(ZIPPED, f"/raw?text={LONG}", "gzip;q=0", False, id="refused by the client"),
        pytest.param(ZIPPED, f"/raw?text={LONG}", "identity", False, id="not asked for"),
        pytest.param(ZIPPED, "/raw", "gzip", False, id="small"),
        pytest.param(ZIPPED, "/items", "gzip", False, id="a stream"),
        pytest.param(ECHO, f"/raw?text={LONG}", "gzip", False, id="off"),
    ],
)
async def test_large_answers_are_compressed_where_that_is_on(
    config: str, path: str, accepts: str, *, zipped: bool
) -> None:
    """Whole answers above the threshold are gzip to who takes it; a stream never is."""
    async with (
        running(config, resources=RESOURCES) as server,
        aiohttp.ClientSession(server.url, auto_decompress=False) as client,
        client.get(path, headers={"Accept-Encoding": accepts}) as answer,
    ):
        body = await answer.read()
        told = answer.headers
    assert ("gzip" if zipped else None) == told.get("Content-Encoding")
    plain = gzip.decompress(body) if zipped else body
    assert plain[:1] in (b"{", b"[")
    large = config == ZIPPED and LONG in path
    assert large == ("Accept-Encoding" in told["Vary"].split(", "))


async def test_a_body_that_is_not_what_its_headers_say_ends_its_connection() -> None:
    """The client is told so, and does not send its next request into a closed one."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with (
        running(resources=RESOURCES) as server,
        aiohttp.ClientSession(server.url, headers=headers) as client,
    ):
        for _ in range(3):
            async with client.post("/raw", data=b"no gzip") as answer:
                assert (400, "close") == (answer.status, answer.headers.get("Connection"))


async def test_events_are_never_compressed() -> None:
    """Not even one that is a whole answer."""
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "gzip"}
    async with (
        running(ZIPPED, resources=RESOURCES) as server,
        aiohttp.ClientSession(server.url, headers=headers) as client,
        client.get(f"/raw?text={LONG}") as answer,
    ):
        assert "Content-Encoding" not in answer.headers
        assert "text/event-stream" == answer.headers["Content-Type"]


async def test_the_blocks_of_the_page_run(tmp_path: Path) -> None:
    """The page's resource and plugin start, and its commands print what it says."""
    (_, resources), (_, commands), (_, printed), (_, plugin), *more = BLOCK.findall(
        PAGE.read_text()
    )
    assert [] == more
    greeting = """
class Hi(Resource):
    public = True

    @staticmethod
    async def get(target):
        return {"hi": True}
"""
    (tmp_path / "resources.py").write_text(resources + greeting)
    (tmp_path / "own.py").write_text(plugin)
    config = f"{ECHO}\nplugins: {{own: {{path: own.py}}}}\n"
    async with running(config, directory=tmp_path) as server:
        shell = await asyncio.create_subprocess_exec(
            "bash",
            "-euc",
            commands,
            cwd=tmp_path,
            env={**os.environ, "URL": server.url},
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await shell.communicate()
        own = await ask(server, "GET", "/Hi.repr")
    assert (0, printed) == (shell.returncode, f"{told.decode()}\n")
    assert "{'hi': True}" == own.text
