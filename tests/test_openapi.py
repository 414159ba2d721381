"""`/openapi`: what a server answers, told to each caller, in a form that others' tools believe."""

import asyncio
import base64
import decimal
import hashlib
import re
import sys
from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from msgspec import Meta
from openapi_spec_validator import OpenAPIV31SpecValidator

from harperpy import (
    SSE,
    Context,
    Contract,
    HarperError,
    RequestTarget,
    Resource,
    ResourceConflict,
    Response,
    Scope,
    User,
    json_response,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask

MORE = "x-oai-additionalOperations"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
# TRACE is answered 501, as any method that nobody here knows; the tool wants 405 from all.
SETTINGS = '[phases.coverage]\nunexpected-methods = ["PUT", "POST", "DELETE", "PATCH", "OPTIONS"]\n'

# What is meant to differ: OpenAI's rules for messages go beyond any schema, its bodies are taken
# where a `type` that can only be one is missing; `Allow` names what others may do, and QUERY.
OBJECTIONS = (
    "positive_data_acceptance",
    "negative_data_rejection",
    "allow_header_conformance",
)


class Words(msgspec.Struct, tag="words"):
    """Text in a note."""

    text: Annotated[str, Meta(min_length=1, max_length=20)]


class Picture(msgspec.Struct, tag="picture"):
    """A picture in a note."""

    url: str


class Note(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept."""

    title: str
    parts: list[Words | Picture] = []
    tags: dict[str, bool] = {}


class Search(msgspec.Struct, forbid_unknown_fields=True):
    """Which notes."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 10
    tags: list[str] = []
    order: Literal["new", "old"] = "new"


class Notes(Resource):
    """Notes of all kinds.

    They stay where they are put.
    """

    sub_paths = True

    @staticmethod
    async def get(target: RequestTarget[Search], context: Context) -> list[Note]:
        """Some notes.

        The newest first, unless `order` says otherwise.
        """
        return [Note(tag) for tag in target.query.tags][: target.query.limit]

    @staticmethod
    def post(target: RequestTarget, data: Note, context: Context) -> Note:
        """Keep a note."""
        context.status = 201
        return data

    @staticmethod
    def put(target: RequestTarget, data: Note | None) -> Note | None:
        """Replace a note."""
        return data

    @staticmethod
    def delete(target: RequestTarget) -> None:
        """Forget a note."""

    @staticmethod
    def query(target: RequestTarget, data: Search) -> list[Note]:
        """Search notes."""
        return []


class Board(Resource):
    """Open to read."""

    public: ClassVar = {"read"}

    @staticmethod
    async def get(target: RequestTarget) -> AsyncIterator[Note]:
        """Notes as they come."""
        yield Note("a")

    @staticmethod
    def post(target: RequestTarget, data: Note) -> Note:
        """Not open."""
        return data


class Feed(Resource):
    """Open to anyone; refusals in a shape that is not declared."""

    public = True

    @staticmethod
    async def get(target: RequestTarget) -> AsyncIterator[SSE]:
        """Events."""
        yield SSE(data="a")

    @staticmethod
    def post(target: Any, data: Any) -> Any:
        """Anything for anything."""
        return {"got": data is not None}

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """One word."""
        return json_response(error.status, "no", error.headers)


class Hidden(Resource):
    """Not described."""

    public = True
    hidden = True

    @staticmethod
    def get(target: RequestTarget) -> str:
        """Answers all the same."""
        return "here"


class Broken(Resource):
    """Its hook fails."""

    @staticmethod
    def get(target: RequestTarget) -> str:
        """Nobody's."""
        return "never"

    @staticmethod
    def allow_read(user: User | None, target: RequestTarget, context: Context) -> bool:
        """Fails."""
        raise LookupError(target.id)


class ByPath(Resource):
    """Its hook asks for what it would be asked for."""

    @staticmethod
    def get(target: RequestTarget) -> str:
        """For those who are logged in."""
        return "a"

    @staticmethod
    def put(target: RequestTarget, data: str) -> str:
        """Not for them."""
        return data

    @staticmethod
    async def allow_read(user: User | None, target: RequestTarget, context: Context) -> bool:
        """Whoever asks for this very mount, without a body yet."""
        asked = (context.method, context.path, context.handler_path, target.id)
        return user is not None and asked == ("GET", "/by/path", "by/path", None)

    @staticmethod
    def allow_update(user: User | None, target: RequestTarget, context: Context) -> bool:
        """Nobody."""
        return context.method != "PUT"


MOUNTS: dict[str, type[Resource]] = {
    "notes": Notes,
    "board": Board,
    "feed": Feed,
    "hidden": Hidden,
    "broken": Broken,
    "by/path": ByPath,
}


@pytest.fixture
async def described() -> AsyncIterator[RunningServer]:
    """A server with the mounts above, at which many wrong passwords may come."""
    config = f"{ECHO}\nauthentication: {{slowGuesses: false}}"
    async with running(config, resources=MOUNTS) as server:
        yield server


async def document(server: RunningServer, key: str | None = None) -> dict[str, Any]:
    """The document as this caller sees it."""
    answer = await ask(server, "GET", "/openapi", key=key)
    assert 200 == answer.status
    return answer.json


def operations(described: dict[str, Any]) -> dict[str, set[str]]:
    """The methods by path, the one for which OpenAPI 3.1 has no place of its own too."""
    return {
        path: set(item) - {"parameters", MORE} | {name.lower() for name in item.get(MORE, {})}
        for path, item in described["paths"].items()
    }


ANYONE = {"/board": {"get"}, "/feed": {"get", "post"}}
GATEWAY = {
    "/v1/chat/completions": {"post"},
    "/v1/embeddings": {"post"},
    "/v1/models": {"get"},
    "/v1/models/{id}": {"get"},
}
ASKED = {"/by/path": {"get"}}
EVERYTHING = {"get", "post", "put", "delete", "query"}
ALL = {
    **ANYONE,
    **GATEWAY,
    **ASKED,
    "/notes": EVERYTHING,
    "/notes/{id}": EVERYTHING,
    "/board": {"get", "post"},
}


async def test_each_caller_is_told_what_they_may_use(described: RunningServer) -> None:
    """By `public`, roles and hooks, one as the other; a hook that fails shows nothing."""
    permission = {"resources": {"notes": ["read"]}}
    await described.operate("add_role", role="reader", permission=permission)
    reader = await described.key_for("ada", "reader")
    model_user = await described.key_for("bob")

    for _ in range(2):  # what is remembered is remembered for whom it is
        assert ANYONE == operations(await document(described, ""))
        assert ALL == operations(await document(described))
        assert {**ANYONE, **GATEWAY, **ASKED} == operations(await document(described, model_user))
        notes = {"/notes": {"get", "query"}, "/notes/{id}": {"get", "query"}}
        assert {**ANYONE, **ASKED, **notes} == operations(await document(described, reader))


async def test_a_wrong_key_is_refused(described: RunningServer) -> None:
    """It does not count as nobody."""
    assert 401 == (await ask(described, "GET", "/openapi", key="hk_wrong")).status


async def test_types_that_the_caller_does_not_see_are_left_out(described: RunningServer) -> None:
    """Neither their names nor their fields are told."""
    schemas = (await document(described, ""))["components"]["schemas"]

    assert {"Note", "Words", "Picture", "Problem", "FieldError"} == set(schemas)


@pytest.mark.parametrize("key", [None, ""])
async def test_the_document_is_valid(described: RunningServer, key: str | None) -> None:
    """By the schema of OpenAPI 3.1, for all and for few."""
    OpenAPIV31SpecValidator(await document(described, key)).validate()


async def test_an_operation_is_told_by_its_contract_and_docstrings(
    described: RunningServer,
) -> None:
    """Summary, description, parameters with their limits, body, answers and refusals."""
    whole = await document(described)
    item = whole["paths"]["/notes/{id}"]
    get, post, put = item["get"], item["post"], item["put"]
    note = {"application/json": {"schema": {"$ref": "#/components/schemas/Note"}}}
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}

    assert "Some notes." == get["summary"]
    assert "The newest first, unless `order` says otherwise." == get["description"]
    about = "Notes of all kinds.\n\nThey stay where they are put."
    assert {"name": "Notes", "description": about} in whole["tags"]
    assert [{"name": "id", "in": "path", "required": True}] == [
        {key: one[key] for key in ("name", "in", "required")} for one in item["parameters"]
    ]
    limit = {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}
    assert {"name": "limit", "in": "query", "required": False, "schema": limit} in get["parameters"]
    assert {"required": True, "content": note} == post["requestBody"]
    assert put["requestBody"]["required"] is False
    assert [note, note] == [post["responses"][status]["content"] for status in ("200", "201")]
    assert {"204", "401", "403", "4XX", "5XX"} == set(item["delete"]["responses"])
    assert problem == post["responses"]["400"]["content"]
    assert [{"bearer": []}, {"basic": []}] == post["security"]
    assert [] == whole["paths"]["/board"]["get"]["security"]


async def test_a_query_is_described_where_openapi_has_it_registered(
    described: RunningServer,
) -> None:
    """With its body, its answers and a name of its own; 3.1 itself has no place for it."""
    item = (await document(described))["paths"]["/notes"]
    query = item[MORE]["QUERY"]
    search = {"application/json": {"schema": {"$ref": "#/components/schemas/Search"}}}

    assert {"QUERY"} == set(item[MORE])
    assert ("Search notes.", "query_notes") == (query["summary"], query["operationId"])
    assert {"required": True, "content": search} == query["requestBody"]
    assert {"200", "400", "401", "403", "4XX", "5XX"} == set(query["responses"])
    assert MORE not in (await document(described))["paths"]["/board"]


async def test_every_operation_has_a_name_of_its_own(described: RunningServer) -> None:
    """Generators of clients name functions by it."""
    whole = await document(described)
    names = [
        told["operationId"]
        for item in whole["paths"].values()
        for method, told in (item | item.get(MORE, {})).items()
        if method not in ("parameters", MORE)
    ]

    assert len(names) == len(set(names))
    assert "get_notes_id" in names


async def test_operations_of_paths_that_differ_in_signs_have_names_of_their_own() -> None:
    """A hyphen, a slash and a name's own underscore all become one."""
    async with running(resources=dict.fromkeys(("a-b", "a_b", "a/b"), Notes)) as server:
        paths = (await document(server))["paths"]
    names = [paths[path]["get"]["operationId"] for path in ("/a-b", "/a_b", "/a/b")]

    assert ["get_a_b", "get_a_b_2", "get_a_b_3"] == sorted(names)


async def test_a_stream_is_described_as_what_it_sends(described: RunningServer) -> None:
    """Events as events, other items as a list."""
    paths = (await document(described))["paths"]
    feed = paths["/feed"]["get"]["responses"]["200"]["content"]
    board = paths["/board"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]

    assert {"text/event-stream"} == set(feed)
    assert {"type": "array", "items": {"$ref": "#/components/schemas/Note"}} == board


async def test_a_decimal_is_described_as_it_is_sent() -> None:
    """As a number, and taken as a number or text."""

    class Price(Resource):
        @staticmethod
        def get(target: Any) -> decimal.Decimal:
            return decimal.Decimal("1.50")

    async with running(resources={"price": Price}) as server:
        whole = await document(server)
        answer = await ask(server, "GET", "/price")

    response = whole["paths"]["/price"]["get"]["responses"]["200"]
    assert "1.50" == answer.text
    assert ["number", "string"] == response["content"]["application/json"]["schema"]["type"]


def of_a(kind: type) -> type[Resource]:
    """What a function makes more than once: a resource, and a Struct by the same name."""

    class Item(msgspec.Struct):
        value: kind  # type: ignore[valid-type]

    class Items(Resource):
        public = True

        @staticmethod
        async def post(target: RequestTarget, data: Item) -> Item:
            return data

    return Items


async def test_types_of_one_name_are_told_apart() -> None:
    """Where two types differ in nothing that they are called, each has a schema of its own."""
    async with running(resources={"number": of_a(int), "text": of_a(str)}) as server:
        document = (await ask(server, "GET", "/openapi")).json
    OpenAPIV31SpecValidator(document).validate()
    for path, kind in (("/number", "integer"), ("/text", "string")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rpartition("/")[2]
        described = document["components"]["schemas"][name]["properties"]
        assert {"value": {"type": kind}} == described


async def test_a_shape_of_refusals_is_told_only_if_it_is_known(described: RunningServer) -> None:
    """A `present_error` without its own `error_type` promises nothing; OpenAI's mounts do."""
    paths = (await document(described))["paths"]
    chat = paths["/v1/chat/completions"]["post"]["responses"]["4XX"]["content"]

    assert "content" not in paths["/feed"]["post"]["responses"]["4XX"]
    assert {"$ref": "#/components/schemas/OpenAIError"} == chat["application/json"]["schema"]


async def test_the_gateway_says_what_it_takes(described: RunningServer) -> None:
    """OpenAI's bodies, as the gateway's own types have them; it goes on reading for itself."""
    whole = await document(described)
    schemas = whole["components"]["schemas"]
    refused = await ask(described, "POST", "/v1/chat/completions", json={"model": "default"})

    assert ["messages"] == schemas["ChatRequest"]["required"]
    assert ["input"] == schemas["EmbeddingRequest"]["required"]
    assert "Missing required parameter: 'messages'." == refused.json["error"]["message"]


async def test_a_plugin_that_did_not_start_is_left_out() -> None:
    """What answers nothing but its failure is no offer."""

    def fails(_: Scope) -> None:
        message = "no"
        raise RuntimeError(message)

    async with running(resources={"notes": Notes}, handle_application=fails) as server:
        assert GATEWAY == operations(await document(server))
        assert 500 == (await ask(server, "GET", "/notes")).status


async def test_a_mount_is_described_at_the_root_too() -> None:
    """`""` is `/`, and below it `/{id}`."""
    async with running(f"{ECHO}\nplugins: {{models_gateway: false}}", resources={"": Notes}) as s:
        whole = await document(s)

    OpenAPIV31SpecValidator(whole).validate()
    assert {"/", "/{id}"} == set(whole["paths"])


def mounted(name: str, **attributes: Any) -> type[Resource]:
    """A resource of that name, with one verb."""

    def get(target: RequestTarget) -> str:
        return target.pathname

    return type(name, (Resource,), {"get": staticmethod(get), **attributes})


@pytest.mark.parametrize(
    ("protocols", "shown"),
    [
        ({"rest", "sse", "ws", "mcp"}, True),
        ({"rest"}, True),
        ({"rest", "mcp"}, True),
        ({"sse"}, False),
        ({"ws", "mcp"}, False),
        ((), False),
    ],
)
async def test_what_is_hidden_for_rest_is_left_out(protocols: Any, *, shown: bool) -> None:
    """A plain request would not find it; no tag and no schema tells of it either."""
    mounts = {"it": mounted("Secret", protocols=protocols)}
    async with running(resources=mounts) as server:
        answer = await ask(server, "GET", "/openapi")
        asked = await ask(server, "GET", "/it")

    assert shown == (200 == asked.status)
    assert shown == ("/it" in answer.json["paths"])
    assert shown == ("Secret" in answer.text)


PLACES = {
    "users/:id": (False, {"/users/{id}": ["id"]}),
    "users/:id/posts/:post": (False, {"/users/{id}/posts/{post}": ["id", "post"]}),
    "files/*rest": (False, {"/files/{rest}": ["rest"]}),
    "wild/*": (False, {"/wild/{wildcard}": ["wildcard"]}),
    ":tenant/notes": (False, {"/{tenant}/notes": ["tenant"]}),
    "a/:x": (True, {"/a/{x}": ["x"], "/a/{x}/{id}": ["x", "id"]}),
    "a/:id": (True, {"/a/{id}": ["id"], "/a/{id}/{rest}": ["id", "rest"]}),
}


@pytest.mark.parametrize("mount", PLACES)
async def test_parameters_of_a_mount_are_parameters_of_the_path(mount: str) -> None:
    """`:id` is `{id}`, `*rest` is `{rest}`, each required text; what is written there is found."""
    below, expected = PLACES[mount]
    async with running(resources={mount: mounted("It", sub_paths=below)}) as server:
        whole = await document(server)
        found = [
            (await ask(server, "GET", path.replace("{", "").replace("}", ""))).status
            for path in expected
        ]

    OpenAPIV31SpecValidator(whole).validate()
    described = {path: item for path, item in whole["paths"].items() if path not in GATEWAY}
    schema = {"type": "string", "minLength": 1}
    assert {
        path: [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
        for path, names in expected.items()
    } == {path: item["parameters"] for path, item in described.items()}
    assert {200} == set(found)


@pytest.mark.parametrize(
    ("mounts", "path", "expected"),
    [
        ({"a": True, "a/:name": False}, "/a/{id}", "First"),
        ({"a/:name": False, "a": True}, "/a/{id}", "Second"),
        ({"a/:x": True, "a/:x/:y": False}, "/a/{x}/{y}", "Second"),
        ({"a/:x/*y": False, "a/:x/:z": False}, "/a/{x}/{z}", "Second"),
    ],
)
async def test_of_two_mounts_at_one_place_the_one_that_answers_is_described(
    mounts: dict[str, bool], path: str, expected: str
) -> None:
    """OpenAPI knows no two paths that differ in their parameters' names only."""

    def get(target: RequestTarget, context: Context) -> str:
        del target
        return context.handler_path

    names = dict(zip(mounts, ("First", "Second"), strict=True))
    resources = {
        mount: mounted(names[mount], sub_paths=below, get=staticmethod(get))
        for mount, below in mounts.items()
    }
    async with running(resources=resources) as server:
        whole = await document(server)
        answer = await ask(server, "GET", path.replace("{", "").replace("}", ""))

    OpenAPIV31SpecValidator(whole).validate()
    places = [one for one in whole["paths"] if one not in GATEWAY]
    shapes = [re.sub(r"{\w+}", "{}", one) for one in places]
    assert len(shapes) == len(set(shapes))
    assert expected == names[answer.json]
    assert [expected] == whole["paths"][path]["get"]["tags"]


@pytest.mark.parametrize(
    ("options", "info"),
    [
        ("true", {"title": "harperpy", "version": metadata.version("harperpy")}),
        ("{title: Acme, version: '7'}", {"title": "Acme", "version": "7"}),
    ],
)
async def test_the_configuration_names_the_server(options: str, info: dict[str, str]) -> None:
    """`plugins: {openapi: {title, version}}`."""
    async with running(f"{ECHO}\nplugins: {{openapi: {options}}}") as server:
        assert info == (await document(server))["info"]


async def test_an_unknown_option_fails_the_plugin_alone() -> None:
    """With a sentence that names it, and the nearest right one."""
    async with running(f"{ECHO}\nplugins: {{openapi: {{titel: a}}}}") as server:
        health = (await ask(server, "GET", "/health")).json

    told = "config.yaml: plugins.openapi.titel: unknown key; did you mean 'title'?"
    assert told == health["plugins"]["openapi"]["error"]


async def test_it_is_a_plugin_that_can_be_turned_off() -> None:
    """`openapi: false`: the path is anyone's."""
    config = f"{ECHO}\nplugins: {{openapi: false}}"
    async with running(config) as without, running(config, resources={"openapi": Feed}) as other:
        assert 404 == (await ask(without, "GET", "/openapi")).status
        assert "data: a\n\n" == (await ask(other, "GET", "/openapi")).text


async def test_its_path_is_reserved() -> None:
    """Another's mount is refused there, unless forced."""
    refused: list[str] = []

    def mount(scope: Scope) -> None:
        with pytest.raises(ResourceConflict) as conflict:
            scope.resources.set("openapi", Feed)
        refused.append(str(conflict.value))
        scope.resources.set("openapi", Feed, force=True)

    async with running(handle_application=mount) as server:
        assert "data: a\n\n" == (await ask(server, "GET", "/openapi")).text

    told = "'openapi' is taken by OpenAPI of plugin 'openapi'; Feed of 'test' cannot have it"
    assert [told] == refused


async def test_a_browser_gets_a_page_that_needs_nothing_else(described: RunningServer) -> None:
    """The policy admits the page's own script and style by their hashes, and this server only."""
    answer = await ask(described, "GET", "/openapi", key="", headers={"Accept": BROWSER})
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )

    assert (200, "text/html; charset=utf-8") == (answer.status, answer.headers["Content-Type"])
    assert "'none'" == policy["default-src"]
    assert "'self'" == policy["connect-src"]
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" == policy[f"{kind}-src"]
    assert [] == re.findall(r"https?:|//[a-z]+\.| on\w+=|style=|innerHTML", answer.text)


async def test_document_and_page_are_not_mixed_up_on_the_way(described: RunningServer) -> None:
    """Caches are told that both `Accept` and the caller decide; HEAD has the same head."""
    for accept in ("application/json", BROWSER):
        answer = await ask(described, "HEAD", "/openapi", headers={"Accept": accept})
        asked = {name.strip() for name in answer.headers["Vary"].split(",")}

        assert 200 == answer.status
        assert {"Accept", "Authorization"} <= asked
    assert "no-store" == (await ask(described, "GET", "/openapi")).headers["Cache-Control"]


async def schemathesis(server: RunningServer, folder: Path, *more: str) -> str:
    """Run Schemathesis against a server; what it said, which must be good."""
    settings = folder / "schemathesis.toml"
    settings.write_text(SETTINGS)
    process = await asyncio.create_subprocess_exec(
        *(SCHEMATHESIS, "--config-file", settings, "run", f"{server.url}/openapi"),
        *("--header", f"Authorization: Bearer {server.api_key}"),
        *("--seed", "1", "--max-examples", "12", "--generation-database", "none"),
        *("--phases", "examples,coverage,fuzzing", *more),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    text = output.decode()
    assert 0 == process.returncode, text
    return text


async def test_schemathesis_finds_nothing_to_object_to(
    described: RunningServer, tmp_path: Path
) -> None:
    """Whatever it sends, statuses, media types and bodies are as described, and nothing fails."""
    told = await schemathesis(described, tmp_path, "--exclude-checks", ",".join(OBJECTIONS))

    assert re.search(r"Tested: 17\b", told), told


async def test_schemathesis_agrees_on_what_fits(described: RunningServer, tmp_path: Path) -> None:
    """A typed mount takes all that its schema admits, and nothing else."""
    told = await schemathesis(
        *(described, tmp_path, "--include-path-regex", "^/(notes|board)"),
        *("--checks", "positive_data_acceptance,negative_data_rejection"),
    )

    assert re.search(r"Tested: 10\b", told), told


async def test_schemathesis_would_find_a_lie(tmp_path: Path) -> None:
    """A verb that answers other than it says is found: the run above can fail."""

    class Liar(Resource):
        schemas: ClassVar = {"get": Contract(response=int)}

        @staticmethod
        def get(target: Any) -> Any:
            return "text"

    config = f"{ECHO}\nplugins: {{models_gateway: false}}"
    async with running(config, resources={"liar": Liar}) as server:
        with pytest.raises(AssertionError, match="Response violates schema"):
            await schemathesis(server, tmp_path)
