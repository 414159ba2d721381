"""The way of a request: what a verb is handed, which refusal comes first, what pages may call."""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from harperpy import Body, ClientError, Context, RequestTarget, Resource, Server, get_context
from harperpy.config import parse_config
from harperpy.testing import ECHO, RunningServer, on_free_ports, running
from helpers import Answered, ask, ask_raw

# --- what a verb is handed

MEMBERS: dict[str, tuple[Callable[[Context], Any], Any]] = {
    "the user": (lambda it: it.user and it.user.username, "HDB_ADMIN"),
    "the user's role": (lambda it: it.user and it.user.role.role, "super_user"),
    "whether it is a super user": (lambda it: it.user and it.user.is_super_user, True),
    "the tenant": (lambda it: it.tenant, "default"),
    "the method": (lambda it: it.method, "POST"),
    "the path as it was sent": (lambda it: it.path, "/deep/it/a%20b"),
    "path and query": (lambda it: it.url, "/deep/it/a%20b?x=1&y"),
    "the query alone": (lambda it: it.request.query, "x=1&y"),
    "the mount": (lambda it: it.handler_path, "deep/it"),
    "the client's address": (lambda it: it.request.peer, "127.0.0.1"),
    "the host that was asked": (lambda it: it.headers["host"], "test.example:99"),
    "a header in another case": (lambda it: it.headers["x-OWN"], "1"),
    "a header that was not sent": (lambda it: it.headers.get("x-none"), None),
    "the request's id": (lambda it: it.request_id, "mine"),
    "the last event's id": (lambda it: it.last_event_id, "7"),
    "the signal, silent": (lambda it: it.signal and it.signal.aborted, False),
    "the end of the server, far": (lambda it: it.stopping.aborted, False),
    "when it began": (lambda it: 0 <= time.perf_counter() - it.started < 60, True),
    "no status of its own yet": (lambda it: it.status, None),
    "no headers of its own yet": (lambda it: list(it.response_headers), []),
    "no refused credential": (lambda it: it.rejection, None),
    "a transaction, always the same": (lambda it: it.transaction() is it.transaction(), True),
    "that no block is open": (lambda it: it.in_block, False),
    "the models": (lambda it: sorted(model.id for model in it.models.list()), ["default", "echo"]),
    "itself, from anywhere": (lambda it: get_context() is it, True),
}


@pytest.mark.parametrize(("member", "expected"), MEMBERS.values(), ids=MEMBERS)
async def test_the_context_knows(member: Callable[[Context], Any], expected: Any) -> None:
    """All that a verb may know besides its target is a member of the one object."""

    class Knows(Resource):
        sub_paths = True

        @staticmethod
        def post(target: RequestTarget, data: Body, context: Context) -> dict[str, Any]:
            del target, data
            return {"it": member(context)}

    headers = {
        "Host": "test.example:99",
        "X-Own": "1",
        "X-Request-Id": "mine",
        "Last-Event-ID": "7",
    }
    async with running(resources={"deep/it": Knows}) as server:
        answer = await ask(server, "POST", "/deep/it/a%20b?x=1&y", headers=headers)

    assert {"it": expected} == answer.json


def sets(context: Context) -> None:
    """In the three ways that there are."""
    headers = context.response_headers
    headers["X-Set"] = "first"
    headers["x-set"] = "second"
    headers.add("X-Added", "1")
    headers.add("X-Added", "2")
    headers.setdefault("X-Set", "never")
    headers.setdefault("X-Filled", "yes")


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
async def test_headers_are_set_added_or_filled_in(*, raises: bool) -> None:
    """What a verb has put into the answer's head stays there, also when it raises afterwards."""

    class Sets(Resource):
        @staticmethod
        def get(target: RequestTarget, context: Context) -> str:
            del target
            sets(context)
            context.status = 202
            if raises:
                raise ClientError
            return "done"

    async with (
        running(resources={"it": Sets}) as server,
        server.session() as client,
        client.get("/it") as answer,
    ):
        assert (400 if raises else 202) == answer.status
        assert ["second"] == answer.headers.getall("X-Set")
        assert ["1", "2"] == answer.headers.getall("X-Added")
        assert ["yes"] == answer.headers.getall("X-Filled")


# --- the body


async def pieces(data: Body) -> list[str]:
    """As it comes."""
    return [piece.decode() async for piece in data.stream() if piece]


async def twice(data: Body) -> list[Any]:
    """Read again, and in another way."""
    return [await data, await data, (await data.bytes()).decode(), await data.text()]


READ: dict[str, tuple[Callable[[Body], Any], Any, Any]] = {
    "awaited": (lambda data: data, {"a": 1}, None),
    "as bytes": (lambda data: data.bytes(), '{"a":1}', ""),
    "as text": (lambda data: data.text(), '{"a":1}', ""),
    "as a type": (lambda data: data.decode(dict[str, int]), {"a": 1}, 400),
    "as it comes": (pieces, ['{"a":1}'], []),
    "twice": (twice, [{"a": 1}, {"a": 1}, '{"a":1}', '{"a":1}'], [None, None, "", ""]),
}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "QUERY"])
@pytest.mark.parametrize(("read", "whole", "none"), READ.values(), ids=READ)
async def test_a_body_is_read_when_a_verb_asks_for_it(
    read: Callable[[Body], Any], whole: Any, none: Any, method: str
) -> None:
    """In the way that it asks; where none was sent, there is nothing, and no error unless typed."""

    async def verb(target: RequestTarget, data: Body) -> Any:
        del target
        value = await read(data)
        return {"it": value.decode() if isinstance(value, bytes) else value}

    resource = type("Reads", (Resource,), {method.lower(): staticmethod(verb), "public": True})
    async with running(resources={"it": resource}) as server:
        sent = await ask(
            server, method, "/it", data='{"a":1}', headers={"Content-Type": "application/json"}
        )
        head = f"{method} /it HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        absent = await ask_raw(server, head)

    assert {"it": whole} == sent.json
    assert (none == absent.status) if none == 400 else ({"it": none} == absent.json)


async def first_piece(data: Body) -> None:
    """Of what comes no more than that."""
    async with contextlib.aclosing(cast("AsyncGenerator[bytes]", data.stream())) as parts:
        await anext(parts)


async def pieces_at_last(data: Body) -> None:
    """After it was read as a whole, and twice."""
    assert await data.bytes() == await data.bytes()
    await pieces(data)


TAKES: dict[str, Callable[[Body], Any]] = {
    "as it comes": pieces,
    "its first piece": first_piece,
    "whole before": pieces_at_last,
}
AGAIN: dict[str, Callable[[Body], Any]] = {
    "awaited": lambda data: data,
    "as bytes": lambda data: data.bytes(),
    "as text": lambda data: data.text(),
    "as a type": lambda data: data.decode(str),
    "as it comes": pieces,
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
async def test_what_was_read_as_it_came_is_not_there_again(take: Callable[[Body], Any]) -> None:
    """A body that seems to be empty by then would be lost in silence: of a short one, too."""

    async def verb(target: RequestTarget, data: Body) -> list[str]:
        del target
        await take(data)
        for read in AGAIN.values():
            with pytest.raises(RuntimeError, match="have read this body"):
                await read(data)
        return [*AGAIN]

    resource = type("Takes", (Resource,), {"post": staticmethod(verb), "public": True})
    async with running(resources={"it": resource}) as server, server.session("") as client:
        for size in (2, 100_000, 400_000, 2):
            body = f'"{"x" * (size - 2)}"'
            async with client.post("/it", data=body, headers=JSON) as answer:
                assert [*AGAIN] == await answer.json()


@pytest.mark.usefixtures("way")
async def test_no_body_is_there_as_often_as_one_asks() -> None:
    """And for the next request of the connection, which has none, too."""

    async def verb(target: RequestTarget, data: Body) -> list[Any]:
        del target
        return [await pieces(data), await twice(data), await pieces(data)]

    resource = type("Takes", (Resource,), {"post": staticmethod(verb), "public": True})
    async with running(resources={"it": resource}) as server, server.session("") as client:
        for _ in range(3):
            async with client.post("/it") as answer:
                assert [[], [None, None, "", ""], []] == await answer.json()


# --- which refusal comes first

LIMITED = f"http: {{maxBodySize: 100, cors: true}}\n{ECHO}"
JSON = {"Content-Type": "application/json"}
PNG = {"Accept": "image/png"}
PREFLIGHT = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
LARGE = "x" * 101


class Typed(Resource):
    """Takes and answers dicts, and posts only."""

    @staticmethod
    async def post(target: RequestTarget, data: dict[str, int]) -> dict[str, int]:
        """What it was sent."""
        del target
        return data


ORDER: dict[str, tuple[str, str, Mapping[str, str], str | None, int]] = {
    "no login, nothing mounted": ("GET /none", "", {}, None, 404),
    "no login, nothing mounted, no method": ("PROPFIND /none", "", {}, None, 404),
    "wrong login, nothing mounted": ("GET /none", "wrong", {}, None, 401),
    "wrong login, a probe": ("GET /health", "wrong", {}, None, 200),
    "wrong login, a preflight": ("OPTIONS /it", "wrong", PREFLIGHT, None, 204),
    "no login, a preflight of nothing": ("OPTIONS /none", "", PREFLIGHT, None, 204),
    "no login, options": ("OPTIONS /it", "", {}, None, 204),
    "no login, options of nothing": ("OPTIONS /none", "", {}, None, 404),
    "wrong login, options": ("OPTIONS /it", "wrong", {}, None, 401),
    "no login, a verb that lacks": ("GET /it", "", {}, None, 401),
    "no login, no method": ("PROPFIND /it", "", {}, None, 401),
    "no right, a verb that lacks": ("GET /it", "plain", {}, None, 405),
    "no right, no method": ("PROPFIND /it", "plain", {}, None, 501),
    "no right, a body too large": ("POST /it", "plain", JSON, LARGE, 403),
    "no right, a body that is no JSON": ("POST /it", "plain", JSON, "{", 403),
    "no right, a type that nobody has": ("POST /it", "plain", JSON | PNG, "{}", 403),
    "no login, a body that is no JSON": ("POST /it", "", JSON, "{", 401),
    "a type that nobody has, a body too large": ("POST /it", "admin", JSON | PNG, LARGE, 406),
    "a body too large that is no JSON": ("POST /it", "admin", JSON, LARGE, 413),
    "a body that is no JSON": ("POST /it", "admin", JSON, "{", 400),
    "a body that does not fit": ("POST /it", "admin", JSON, '{"a":"b"}', 400),
    "nothing wrong": ("POST /it", "admin", JSON, '{"a":1}', 200),
}


@pytest.mark.parametrize(("line", "who", "headers", "body", "status"), ORDER.values(), ids=ORDER)
async def test_of_several_refusals_the_first_on_the_way_is_told(
    line: str, who: str, headers: Mapping[str, str], body: str | None, status: int
) -> None:
    """Who asks, then where, then whether they may, then the answer's type, then the body."""
    async with running(LIMITED, resources={"it": Typed}) as server:
        keys = {"admin": None, "plain": await server.key_for("ada")}
        key = keys.get(who, who)
        answer = await ask(server, *line.split(), key=key, headers=headers, data=body)

    assert status == answer.status, answer.text


@pytest.mark.parametrize("method", ["TRACE", "COPY", "MOVE", "LINK", "PROPFIND"])
async def test_a_method_that_no_verb_answers_is_501(method: str) -> None:
    """With the method in the sentence, and none of them in `Allow`."""
    resource = type("All", (Resource,), {"get": staticmethod(lambda: "done"), "public": True})

    async with running(resources={"it": resource}) as server:
        answer = await ask(server, method, "/it")
        allow = (await ask(server, "OPTIONS", "/it")).headers["Allow"]

    assert (501, f"Method {method} is not recognised.") == (answer.status, answer.json["detail"])
    assert method not in allow


@pytest.mark.parametrize("method", ["FROB", "BREW", "get me"])
async def test_what_is_no_method_of_any_protocol_is_400(method: str) -> None:
    """It is no HTTP that is understood here, so nobody is asked."""
    async with running() as server:
        answer = await ask_raw(server, f"{method} /v1/models HTTP/1.1\r\nHost: test\r\n\r\n")

    assert (400, "Bad Request") == (answer.status, answer.json["title"])


# --- pages of other origins

PAGE = "https://page.example"
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY", "OPTIONS"}
ALLOWED = "Access-Control-Allow-Origin"


class Open(Resource):
    """Values, streams, refusals and faults."""

    public = True
    sub_paths = True

    @staticmethod
    async def get(target: RequestTarget) -> Any:
        """By id."""
        if target.id == "fault":
            raise ZeroDivisionError
        if target.id == "refusal":
            raise ClientError
        return counted() if target.id == "stream" else "value"


async def counted() -> AsyncIterator[int]:
    """A stream."""
    yield 1


async def asked(server: RunningServer, method: str, path: str, **more: str) -> Answered:
    """A page's request, without a credential."""
    headers = {"Origin": PAGE, **{name.replace("_", "-"): text for name, text in more.items()}}
    return await ask(server, method, path, key="", headers=headers)


ANSWERS = {
    "a value": ("GET", "/it", 200),
    "a head": ("HEAD", "/it", 200),
    "a stream": ("GET", "/it/stream", 200),
    "a refusal": ("GET", "/it/refusal", 400),
    "a fault": ("GET", "/it/fault", 500),
    "a verb that lacks": ("POST", "/it", 405),
    "what must log in": ("GET", "/v1/models", 401),
    "nothing mounted": ("GET", "/none", 404),
    "a probe": ("GET", "/health", 200),
    "options that ask for nothing": ("OPTIONS", "/it", 204),
}


@pytest.mark.parametrize("listed", [True, False], ids=["any", "another alone"])
@pytest.mark.parametrize(("method", "path", "status"), ANSWERS.values(), ids=ANSWERS)
async def test_every_answer_says_whether_the_page_may_read_it(
    method: str, path: str, status: int, *, listed: bool
) -> None:
    """Its origin by name, never a star, never with credentials; all answers vary by it."""
    origins = "'*'" if listed else "'https://other.example'"
    config = f"http: {{cors: true, corsAccessList: [{origins}]}}\n{ECHO}"

    async with running(config, resources={"it": Open}) as server:
        answer = await asked(server, method, path)

    assert status == answer.status
    assert (PAGE if listed else None) == answer.headers.get(ALLOWED)
    assert "Origin" in answer.headers["Vary"].split(", ")
    assert "Access-Control-Allow-Credentials" not in answer.headers
    if method == "OPTIONS":
        assert "GET, HEAD, OPTIONS" == answer.headers["Allow"]


async def test_a_preflight_that_names_no_headers_is_told_the_usual_ones() -> None:
    """And all methods that a class may answer, for ten minutes; it runs nothing."""
    async with running(f"http: {{cors: true}}\n{ECHO}", resources={"it": Open}) as server:
        answer = await asked(server, "OPTIONS", "/it", Access_Control_Request_Method="PUT")

    told = answer.headers
    assert (204, "") == (answer.status, answer.text)
    assert "Accept, Content-Type, Authorization" == told["Access-Control-Allow-Headers"]
    assert set(told["Access-Control-Allow-Methods"].split(", ")) == METHODS
    assert ("600", PAGE) == (told["Access-Control-Max-Age"], told[ALLOWED])
    assert "Access-Control-Allow-Credentials" not in told


MODES: dict[str, tuple[bool, str, str | None, str | None]] = {
    "dev, nothing said": (True, "", PAGE, PAGE),
    "run, nothing said": (False, "", None, None),
    "dev, off": (True, "false", None, None),
    "run, on": (False, "true", PAGE, PAGE),
}


@pytest.mark.parametrize(("dev", "cors", "rest", "operations"), MODES.values(), ids=MODES)
async def test_pages_may_call_in_dev_unless_it_is_off_and_in_run_only_if_it_is_on(
    tmp_path: Path, cors: str, rest: str | None, operations: str | None, *, dev: bool
) -> None:
    """On both ports; where a list is missing, any page."""
    said = f"cors: {cors}, " if cors else ""
    config = (
        f"http: {{{said}host: 127.0.0.1}}\n"
        f"operationsApi: {{network: {{{said}host: 127.0.0.1}}}}\n{ECHO}"
    )
    admin = {"HDB_ADMIN_USERNAME": "root", "HDB_ADMIN_PASSWORD": "s3cret-enough"}
    parsed = on_free_ports(parse_config(config, source="config.yaml", environ={}))
    server = Server(parsed, directory=tmp_path, dev=dev, environ=admin)
    await server.start()
    try:
        found = RunningServer(server, "")
        answers = [
            await asked(found, "GET", f"{url}/health") for url in (found.url, found.operations_url)
        ]
    finally:
        await server.stop()

    assert [rest, operations] == [answer.headers.get(ALLOWED) for answer in answers]
