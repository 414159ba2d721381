"""The way of a request: who may, what is read when, and how each refusal is worded."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from msgspec import Struct

from harperpy import (
    Body,
    ClientError,
    Conflict,
    Context,
    HarperError,
    InvalidBody,
    NotFound,
    RegistrationError,
    RequestTarget,
    Resource,
    Resources,
    Response,
    Scope,
    ServiceUnavailable,
    User,
    json_response,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import HELLO, ask, ask_raw, error_of

METHODS = {
    "GET": "read",
    "HEAD": "read",
    "QUERY": "read",
    "POST": "create",
    "PUT": "update",
    "PATCH": "update",
    "DELETE": "delete",
}
LIMITED = "http: {maxBodySize: 100}"


class Everything(Resource):
    """Answers every verb, and opens none."""

    @staticmethod
    def get() -> str:
        """Answer."""
        return "done"

    post = put = patch = delete = query = get


class Told(Resource):
    """Words its refusals in its own way."""

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """Status, sentence and id as a list."""
        told = [error.status, error.public_message, context.request_id]
        return json_response(error.status, {"told": told}, error.headers)


async def statuses(server: RunningServer, path: str, key: str) -> dict[str, int]:
    """What each method is answered there."""
    return {method: (await ask(server, method, path, key=key)).status for method in METHODS}


# --- who may


async def test_nobody_but_super_users_may_unless_it_is_said() -> None:
    """A class that says nothing is closed to anonymous callers and to plain users."""
    async with running(resources={"all": Everything}) as server:
        plain = await server.key_for("ada")

        assert dict.fromkeys(METHODS, 401) == await statuses(server, "/all", "")
        assert dict.fromkeys(METHODS, 403) == await statuses(server, "/all", plain)
        assert dict.fromkeys(METHODS, 200) == await statuses(server, "/all", server.api_key)


@pytest.mark.parametrize(
    "opened",
    [True, {"read"}, ["create", "update"], ("delete",), frozenset(), set(METHODS.values())],
)
async def test_public_opens_what_it_names(opened: Any) -> None:
    """`public` is True for everything, or the permissions that need no login."""
    resource = type("Open", (Everything,), {"public": opened})
    expected = {
        method: 200 if opened is True or permission in opened else 401
        for method, permission in METHODS.items()
    }

    async with running(resources={"open": resource}) as server:
        assert expected == await statuses(server, "/open", "")


@pytest.mark.parametrize("permission", ["read", "create", "update", "delete"])
async def test_each_method_asks_its_own_hook(permission: str) -> None:
    """A hook that admits opens the methods of its permission, and no other."""
    hook = {f"allow_{permission}": staticmethod(lambda: True)}
    resource = type("Hooked", (Everything,), hook)
    expected = {method: 200 if METHODS[method] == permission else 401 for method in METHODS}

    async with running(resources={"hooked": resource}) as server:
        assert expected == await statuses(server, "/hooked", "")


def says(*, verdict: object) -> Callable[[], object]:
    """A hook that says this."""

    def hook() -> object:
        return verdict

    hook.__name__ = f"says {verdict!r}"
    return hook


async def admits_later(user: User | None) -> bool:
    """An async hook."""
    await asyncio.sleep(0)
    return user is not None


def fails() -> bool:
    """A hook with a fault."""
    raise KeyError


async def fails_later() -> bool:
    """An async hook that is refused by something else."""
    raise NotFound


def admits_ada(user: User | None, target: RequestTarget, context: Context) -> bool:
    """A hook that looks at all it is given."""
    return f"{user and user.username} {target.id} {context.method}" == "ada 7 GET"


@pytest.mark.parametrize(
    ("hook", "anonymous", "plain"),
    [
        (says(verdict=True), 200, 200),
        (admits_later, 401, 200),
        (admits_ada, 401, 200),
        (says(verdict=False), 401, 403),
        (says(verdict=None), 401, 403),
        (says(verdict=1), 401, 403),
        (says(verdict="yes"), 401, 403),
        (fails, 401, 403),
        (fails_later, 401, 403),
    ],
)
async def test_only_true_admits(hook: Callable[..., Any], anonymous: int, plain: int) -> None:
    """Sync or async, a hook that says anything else, or fails, denies."""
    allow = {"allow_read": staticmethod(hook), "sub_paths": True}
    resource = type("Hooked", (Everything,), allow)

    async with running(resources={"hooked": resource}) as server:
        key = await server.key_for("ada")
        assert anonymous == (await ask(server, "GET", "/hooked/7", key="")).status
        assert plain == (await ask(server, "GET", "/hooked/7", key=key)).status


async def test_a_role_opens_paths_for_verbs() -> None:
    """What a role's permission lists is open to its users, at that mount and for those verbs."""
    resources = {"notes": Everything, "notes/old": Everything, "other": Everything}
    read = {method: 200 if METHODS[method] == "read" else 403 for method in METHODS}
    async with running(resources=resources) as server:
        permission = {"resources": {"notes/*": ["read"]}}
        await server.operate("add_role", role="reader", permission=permission)
        key = await server.key_for("ada", role="reader")

        assert read == await statuses(server, "/notes", key)
        assert read == await statuses(server, "/notes/old", key)
        assert dict.fromkeys(METHODS, 403) == await statuses(server, "/other", key)


@pytest.mark.parametrize("credential", ["Bearer nonsense", "Basic bm86Ym9keQ==", "Digest x", "x"])
async def test_a_wrong_credential_is_refused_even_where_none_is_needed(credential: str) -> None:
    """Whoever sends a credential means to be someone: a wrong one is 401, with a challenge."""
    resource = type("Open", (Everything,), {"public": True})
    headers = {"Authorization": credential}

    async with running(resources={"open": resource}) as server:
        answer = await ask(server, "GET", "/open", key="", headers=headers)

    assert 401 == answer.status
    assert "invalid_api_key" == answer.json["code"]
    assert 'Bearer realm="harperpy"' == answer.headers["WWW-Authenticate"]


# --- before the body


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "QUERY", "DELETE"])
async def test_who_may_not_is_told_before_the_body_is_sent(method: str) -> None:
    """With the head alone on the wire, anonymous callers get 401 and plain users 403."""
    head = f"{method} /all HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n"

    async with running(resources={"all": Everything}) as server:
        key = await server.key_for("ada")
        anonymous = await ask_raw(server, f"{head}\r\n")
        plain = await ask_raw(server, f"{head}Authorization: Bearer {key}\r\n\r\n")

    assert 401 == anonymous.status
    assert 403 == plain.status


async def test_a_body_that_nobody_wants_is_not_waited_for() -> None:
    """A verb that does not ask for the body answers before it has come."""
    resource = type("Open", (Everything,), {"public": True})

    async with running(resources={"open": resource}) as server:
        head = "POST /open HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n"
        assert 200 == (await ask_raw(server, head)).status


async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked() -> None:
    """`Expect: 100-continue` is answered once a verb reads the body, and else by the refusal."""
    head = "POST /all HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"

    async with asyncio.timeout(20), running(resources={"echo": Echo, "all": Everything}) as server:
        asked = await ask(server, "POST", "/echo", data="hello", expect100=True)
        refused = await ask_raw(server, head)

    assert ["str", "hello", True] == asked.json
    assert 401 == refused.status


# --- the body


class Echo(Resource):
    """Answers what its body was decoded to."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> list[Any]:
        """The body twice: it may be awaited again."""
        del target
        value = await data
        return [
            type(value).__name__,
            value.decode() if isinstance(value, bytes) else value,
            await data == value,
        ]


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/json", '{"a":[1]}', ["dict", {"a": [1]}]),
        ("application/json; charset=utf-8", "7", ["int", 7]),
        ("application/problem+json", "null", ["NoneType", None]),
        ("text/plain", "hello", ["str", "hello"]),
        ("text/csv", "a,b", ["str", "a,b"]),
        ("application/octet-stream", "hello", ["bytes", "hello"]),
        ("application/unheard-of", "{}", ["bytes", "{}"]),
        ("", ' {"a":1}', ["dict", {"a": 1}]),
        ("", "[1]", ["list", [1]]),
        ("", "hello", ["bytes", "hello"]),
        ("application/json", "", ["NoneType", None]),
    ],
)
async def test_a_body_is_decoded_by_its_content_type(
    content_type: str, body: str, expected: list[Any]
) -> None:
    """JSON, text and bytes as the client names them; without a name, JSON if it looks like it."""
    named = f"Content-Type: {content_type}\r\n" if content_type else ""
    head = f"POST /echo HTTP/1.1\r\nHost: test\r\n{named}Content-Length: {len(body)}\r\n\r\n"

    async with running(resources={"echo": Echo}) as server:
        assert [*expected, True] == (await ask_raw(server, head + body)).json


class Order(Struct):
    """What the typed resource takes."""

    items: list[int]


class Orders(Resource):
    """Decodes its body into a type."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """How much it comes to."""
        del target
        return sum((await data.decode(Order)).items)


async def test_a_body_that_does_not_fit_is_refused_with_its_path() -> None:
    """A body becomes the type that the verb names, or a 400 that says where it does not fit."""
    async with running(resources={"orders": Orders}) as server:
        good = await ask(server, "POST", "/orders", json={"items": [1, 2]})
        wrong = await ask(server, "POST", "/orders", json={"items": [1, "2"]})
        broken = await ask(
            server, "POST", "/orders", data="{", headers={"Content-Type": "application/json"}
        )

    assert 3 == good.json
    assert 400 == wrong.status
    assert [{"path": "/items/1", "message": "Expected `int`, got `str`"}] == wrong.json["errors"]
    assert 400 == broken.status
    assert "errors" not in broken.json


@pytest.mark.parametrize(
    ("content_type", "body", "told"),
    [
        ("application/json", b"", "expected a JSON body, got an empty one"),
        ("application/json", b'{"items": [1', "the body is not valid JSON"),
        ("application/json", b'{"x": ' + b"[" * 100_000, "the body is nested too deeply"),
        ("application/json", b"[]", "Expected `object`, got `array`"),
        ("text/plain", b'{"items": []}', "Content-Type: expected application/json, got text/plain"),
    ],
    ids=["empty", "cut off", "deep", "wrong", "no JSON by name"],
)
async def test_a_body_that_is_no_json_is_refused(content_type: str, body: bytes, told: str) -> None:
    """What cannot be decoded is a 400 that says why, never a 500."""
    headers = {"Content-Type": content_type}

    async with running(resources={"orders": Orders}) as server:
        answer = await ask(server, "POST", "/orders", data=body, headers=headers)

    assert 400 == answer.status
    assert answer.json["detail"].startswith(told)


@pytest.mark.parametrize(
    ("content_type", "body", "told"),
    [
        ("text/plain", b"a\xff", "the body is not UTF-8: invalid start byte at byte 1"),
        ("application/json", b'"\xff"', "the body is not valid JSON"),
    ],
)
async def test_text_that_is_not_utf_8_is_refused(content_type: str, body: bytes, told: str) -> None:
    """Text and JSON of other bytes are a 400."""
    async with running(resources={"echo": Echo}) as server:
        headers = {"Content-Type": content_type}
        answer = await ask(server, "POST", "/echo", data=body, headers=headers)

    assert 400 == answer.status
    assert answer.json["detail"].startswith(told)


async def test_a_body_that_does_not_come_is_408() -> None:
    """A verb that reads its body waits for it as long as `http.timeout`, and no longer."""
    head = "POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n"

    async with running("http: {timeout: 20}", resources={"echo": Echo}) as server:
        answer = await ask_raw(server, head)

    assert (408, "request_timeout") == (answer.status, answer.json["code"])


async def in_pieces(size: int) -> AsyncIterator[bytes]:
    """A body whose length is not told beforehand."""
    for _ in range(size):
        yield b"x"


class Limited(Told):
    """Reads its body, and has an error shape of its own."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> int:
        """How long the body was."""
        del target
        return len(await data.bytes())


async def test_a_body_beyond_the_limit_is_413_in_the_resources_own_shape() -> None:
    """Told beforehand or not, what exceeds `http.maxBodySize` is refused as the class words it."""
    sentence = "The request body is larger than the limit of 100 bytes."
    told = {"told": [413, sentence, "mine"]}
    headers = {"x-request-id": "mine"}

    async with running(LIMITED, resources={"limited": Limited}) as server:
        for size in (100, 101):
            whole = await ask(server, "POST", "/limited", data=b"x" * size, headers=headers)
            pieces = await ask(server, "POST", "/limited", data=in_pieces(size), headers=headers)

            assert whole.status == pieces.status == (200 if size == 100 else 413)
            assert whole.json == pieces.json == (size if size == 100 else told)


async def test_a_body_announced_as_too_large_is_not_read() -> None:
    """The 413 comes on the head's `Content-Length` alone."""
    async with running(LIMITED, resources={"limited": Limited}) as server:
        head = "POST /limited HTTP/1.1\r\nHost: test\r\nContent-Length: 101\r\n\r\n"
        assert 413 == (await ask_raw(server, head)).status


async def test_the_gateway_words_its_own_413() -> None:
    """A chat request that is too large is refused in OpenAI's error envelope."""
    large = {**HELLO, "user": "x" * 100}

    async with (
        running(LIMITED) as server,
        server.session() as client,
        client.post("/v1/chat/completions", json=large) as response,
    ):
        assert 413 == response.status
        error = await error_of(response)

    assert "payload_too_large" == error["code"]
    assert "invalid_request_error" == error["type"]


# --- what is answered


async def test_nothing_is_404_for_who_asks_and_204_for_who_acts() -> None:
    """A verb that returns None found nothing on GET and HEAD, and has nothing to say on others."""
    quiet = type("Quiet", (Everything,), {verb: staticmethod(lambda: None) for verb in VERBS})
    expected = {method: 404 if method in ("GET", "HEAD") else 204 for method in METHODS}

    async with running(resources={"quiet": quiet}) as server:
        assert expected == await statuses(server, "/quiet", server.api_key)
        assert "" == (await ask(server, "POST", "/quiet")).text


VERBS = ("get", "post", "put", "patch", "delete", "query")


@pytest.mark.parametrize(
    ("value", "media", "text"),
    [
        ({"a": 1}, "application/json", '{"a":1}'),
        ([], "application/json", "[]"),
        (0, "application/json", "0"),
        (False, "application/json", "false"),
        ("", "application/json", '""'),
        (b"raw", "application/octet-stream", "raw"),
        (Order([1]), "application/json", '{"items":[1]}'),
        (Response(200, data={"a": 1}), "application/json", '{"a":1}'),
        (Response(200, body="<p>"), "text/plain; charset=utf-8", "<p>"),
        (Response(200, {"Content-Type": "text/html"}, body=b"<p>"), "text/html", "<p>"),
    ],
)
async def test_a_value_is_answered_as_what_it_is(value: Any, media: str, text: str) -> None:
    """Values are serialised, falsy ones too; bytes and a Response's body go out as they are."""
    values = type("Values", (Resource,), {"get": staticmethod(lambda: value)})

    async with running(resources={"values": values}) as server:
        whole = await ask(server, "GET", "/values")
        head = await ask(server, "HEAD", "/values")

    assert (200, media, text) == (whole.status, whole.headers["Content-Type"], whole.text)
    assert (200, media, "") == (head.status, head.headers["Content-Type"], head.text)
    assert whole.headers["Content-Length"] == head.headers["Content-Length"] == str(len(text))


@pytest.mark.parametrize(
    ("accept", "media", "text"),
    [
        ("*/*", "application/json", '{"a":1}'),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/json", '{"a":1}'),
        ("application/json, text/event-stream", "application/json", '{"a":1}'),
        ("text/event-stream", "text/event-stream", 'data: {"a":1}\n\n'),
        ("application/x-ndjson", "application/x-ndjson", '{"a":1}\n'),
        ("application/json;q=0, */*;q=0.1", "text/event-stream", 'data: {"a":1}\n\n'),
        ("TEXT/*", "text/event-stream", 'data: {"a":1}\n\n'),
        ("application/json;q=x, application/x-ndjson;v=1", "application/x-ndjson", '{"a":1}\n'),
    ],
)
async def test_a_value_is_serialised_as_the_client_accepts(
    accept: str, media: str, text: str
) -> None:
    """The best of what both sides know is taken; ranges count, and q=0 excludes."""
    values = type("Values", (Resource,), {"get": staticmethod(lambda: {"a": 1})})

    async with running(resources={"values": values}) as server:
        answer = await ask(server, "GET", "/values", headers={"Accept": accept})

    assert (media, text) == (answer.headers["Content-Type"].partition(";")[0], answer.text)


async def test_what_the_client_cannot_read_is_406_in_json() -> None:
    """No common type is a refusal that lists ours, worded in JSON all the same."""
    values = type("Values", (Resource,), {"get": staticmethod(lambda: {"a": 1})})

    async with running(resources={"values": values}) as server:
        answer = await ask(server, "GET", "/values", headers={"Accept": "image/png"})

    assert 406 == answer.status
    assert "not_acceptable" == answer.json["code"]
    assert "application/json, text/event-stream" in answer.json["detail"]


async def test_a_verb_may_set_status_and_headers() -> None:
    """The context's apply to plain values, a Response's own win, and cookies add up."""

    class Setting(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> Any:
            context.status = 202
            context.response_headers["X-A"] = "context"
            context.response_headers["X-B"] = "context"
            context.response_headers.add("Set-Cookie", "a=1")
            if target.get("own") is None:
                return "plain"
            return Response(201, {"X-A": "own", "Set-Cookie": "b=2"}, data="own")

    async with running(resources={"set": Setting}) as server, server.session("") as client:
        async with client.get("/set") as plain:
            assert (202, "context") == (plain.status, plain.headers["X-A"])
        async with client.get("/set?own=1") as own:
            assert (201, "own") == (own.status, own.headers["X-A"])
            assert "context" == own.headers["X-B"]
            assert ["b=2", "a=1"] == own.headers.getall("Set-Cookie")


@pytest.mark.parametrize("bad", ["a\r\nX-Smuggled: b", "\n", 5], ids=repr)
async def test_a_header_that_cannot_be_sent_is_an_error(bad: Any) -> None:
    """A value that HTTP forbids, or that is no text, is the verb's fault: 500 in good form."""

    class Setting(Resource):
        @staticmethod
        def get(target: RequestTarget, context: Context) -> Any:
            if target.get("own") is None:
                context.response_headers["X-Bad"] = bad
                return "plain"
            return Response(200, {"X-Bad": bad}, data="own")

    async with running(resources={"set": Setting}) as server:
        answers = [await ask(server, "GET", path) for path in ("/set", "/set?own=1")]

    for answer in answers:
        assert (500, 500) == (answer.status, answer.json["status"])
        assert not {"X-Bad", "X-Smuggled"} & set(answer.headers)


# --- what is refused


@pytest.mark.parametrize(
    ("verbs", "allowed"),
    [
        (("get",), "GET, HEAD, OPTIONS"),
        (("post",), "POST, OPTIONS"),
        (("get", "put", "delete"), "GET, HEAD, PUT, DELETE, OPTIONS"),
        (("patch", "query"), "PATCH, QUERY, OPTIONS"),
        ((), "OPTIONS"),
    ],
)
async def test_what_is_not_defined_is_405_with_a_true_allow(
    verbs: tuple[str, ...], allowed: str
) -> None:
    """`Allow` lists exactly what is answered, on a 405 and on OPTIONS alike."""
    some = type("Some", (Resource,), {verb: staticmethod(lambda: "done") for verb in verbs})

    async with running(resources={"some": some}) as server:
        for method in METHODS:
            answer = await ask(server, method, "/some")
            assert (200 if method in allowed.split(", ") else 405) == answer.status, method
            assert answer.status == 200 or allowed == answer.headers["Allow"]
        options = await ask(server, "OPTIONS", "/some", key="")

    assert (204, allowed, "") == (options.status, options.headers["Allow"], options.text)


async def test_only_who_is_logged_in_learns_what_a_closed_class_answers() -> None:
    """What a closed class lacks is 401 for anonymous callers; an unknown method is 501."""
    some = type("Some", (Resource,), {"get": staticmethod(lambda: "done")})

    async with running(resources={"some": some}) as server:
        assert 401 == (await ask(server, "POST", "/some", key="")).status
        assert 401 == (await ask(server, "PROPFIND", "/some", key="")).status
        assert 501 == (await ask(server, "PROPFIND", "/some")).status


def raises(error: Exception) -> Callable[[], Any]:
    """A verb that fails so."""

    def fail() -> Any:
        raise error

    return fail


TEAPOT = HarperError("Short and stout.", status=418, code="teapot", headers={"X-Spout": "here"})
PROBLEMS: list[tuple[Exception, dict[str, Any]]] = [
    (ClientError("No."), {"status": 400, "title": "Bad Request", "detail": "No."}),
    (NotFound(), {"status": 404, "title": "Not Found", "detail": "Not found."}),
    (Conflict("Taken."), {"status": 409, "title": "Conflict", "detail": "Taken."}),
    (
        TEAPOT,
        {"status": 418, "title": "I'm a Teapot", "detail": "Short and stout.", "code": "teapot"},
    ),
    (
        InvalidBody("a: no", errors=[{"path": "/a", "message": "no"}]),
        {
            "status": 400,
            "title": "Bad Request",
            "detail": "a: no",
            "errors": [{"path": "/a", "message": "no"}],
        },
    ),
    (
        ClientError("Odd.", status=499),
        {"status": 499, "title": "Unknown Error", "detail": "Odd."},
    ),
    (
        ServiceUnavailable("swordfish", headers={"Retry-After": "7"}),
        {
            "status": 503,
            "title": "Service Unavailable",
            "detail": "The service is not available at the moment; try again later.",
        },
    ),
    (
        ZeroDivisionError("swordfish"),
        {
            "status": 500,
            "title": "Internal Server Error",
            "detail": "The server had an error while processing the request.",
        },
    ),
]


@pytest.mark.parametrize(("error", "expected"), PROBLEMS, ids=repr)
async def test_a_refusal_is_a_problem_by_default(
    error: Exception, expected: dict[str, Any]
) -> None:
    """RFC 9457 bodies with the request's id; of a 5xx only the class's own sentence is told."""
    failing = type("Failing", (Resource,), {"get": staticmethod(raises(error))})

    async with running(resources={"failing": failing}) as server:
        answer = await ask(server, "GET", "/failing", headers={"x-request-id": "mine"})

    frame = {"type": "about:blank", "instance": "/failing", "request_id": "mine"}
    assert expected["status"] == answer.status
    assert {**frame, **expected} == answer.json
    assert "application/json" == answer.headers["Content-Type"]
    for name, value in getattr(error, "headers", {}).items():
        assert value == answer.headers[name]


async def test_a_problem_may_be_asked_for_by_its_media_type() -> None:
    """Who accepts `application/problem+json` gets it under that name."""
    async with running() as server:
        accept = {"Accept": "application/problem+json"}
        answer = await ask(server, "GET", "/nowhere", headers=accept)

    assert (404, "application/problem+json") == (answer.status, answer.headers["Content-Type"])
    assert "/nowhere" == answer.json["instance"]


async def test_a_class_words_all_its_refusals() -> None:
    """`present_error` is asked from the 401 to the 500, whatever raised them."""

    class Shaped(Told):
        @staticmethod
        def get(target: RequestTarget) -> Any:
            match target.get("how"):
                case "nothing":
                    return None
                case "unforeseen":
                    raise ZeroDivisionError
                case _:
                    return {}

    async with running(resources={"shaped": Shaped}) as server:
        plain = await server.key_for("ada")
        answers = [
            await ask(server, "GET", "/shaped", key=""),
            await ask(server, "GET", "/shaped", key="wrong"),
            await ask(server, "GET", "/shaped", key=plain),
            await ask(server, "GET", "/shaped?how=nothing"),
            await ask(server, "POST", "/shaped"),
            await ask(server, "GET", "/shaped", headers={"Accept": "image/png"}),
            await ask(server, "GET", "/shaped?how=unforeseen"),
            await ask(server, "PROPFIND", "/shaped"),
        ]

    assert [401, 401, 403, 404, 405, 406, 500, 501] == [answer.status for answer in answers]
    for answer in answers:
        told = answer.json["told"]
        assert [answer.status, answer.headers["x-request-id"]] == [told[0], told[2]]


@pytest.mark.parametrize(
    "response",
    [Response(418, {"X-A": "1"}, data=["no"]), Response(418, {"X-A": "1"}, body='["no"]')],
)
async def test_a_refusal_may_be_any_response(response: Response) -> None:
    """`present_error` may choose status, headers, data or a body of its own."""
    shaped = type("Shaped", (Resource,), {"present_error": staticmethod(lambda *_: response)})

    async with running(resources={"shaped": shaped}) as server:
        answer = await ask(server, "GET", "/shaped")

    assert (418, ["no"], "1") == (answer.status, answer.json, answer.headers["X-A"])


async def test_a_faulty_wording_falls_back_to_the_default() -> None:
    """If `present_error` itself fails, the refusal keeps its status and becomes a problem."""
    failing = type("Failing", (Resource,), {"present_error": staticmethod(raises(KeyError()))})

    async with running(resources={"failing": failing}) as server:
        answer = await ask(server, "GET", "/failing", key="")

    assert (401, "Unauthorized") == (answer.status, answer.json["title"])


# --- the request's id


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("mine", True),
        ("A-z_0.9", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        ("a b", False),
        ("a/b", False),
        ("a\u00e9", False),
        ("a\t", True),  # the white space around a header's value is not its own
    ],
)
async def test_a_clients_request_id_is_kept_if_it_is_harmless(given: str, kept: bool) -> None:  # noqa: FBT001
    """`[A-Za-z0-9._-]{1,64}` comes back, in the body too; anything else is replaced by ours."""
    async with running() as server:
        head = f"GET /nowhere HTTP/1.1\r\nHost: test\r\nx-request-id: {given}\r\n\r\n"
        answer = await ask_raw(server, head)

    shown = answer.headers["x-request-id"]
    assert shown == answer.json["request_id"]
    assert kept is (given.strip() == shown)
    assert kept is not shown.startswith("req_")


async def test_every_answer_has_a_request_id_of_its_own() -> None:
    """Whatever is answered carries an id, and no two carry the same."""

    class Many(Resource):
        public = ("read",)

        @staticmethod
        def get(target: RequestTarget) -> Any:
            return iter([1, 2]) if target.get("stream") else b"" if target.get("empty") else None

    calls = [
        *(("GET", path) for path in ("/many", "/many?stream=1", "/many?empty=1", "/no", "/health")),
        *(("HEAD", "/many?stream=1"), ("OPTIONS", "/many"), ("POST", "/many"), ("BIND", "/many")),
    ]
    async with running(resources={"many": Many}) as server:
        answers = [await ask(server, method, path) for method, path in calls]

    assert [404, 200, 200, 404, 200, 200, 204, 405, 501] == [answer.status for answer in answers]
    assert len(calls) == len({answer.headers["x-request-id"] for answer in answers})
    assert {"harperpy"} == {answer.headers["Server"] for answer in answers}


# --- pages of other origins

CORS = "http: {cors: true, corsAccessList: ['https://page.example', 'https://two.example']}"
PREFLIGHT = {"Access-Control-Request-Method": "POST"}


async def test_a_listed_origin_may_ask_first() -> None:
    """A preflight is answered without credentials, on any path, with what it asked to send."""
    asked = {**PREFLIGHT, "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    headers = {**asked, "Origin": "https://page.example"}

    async with running(CORS) as server:
        answer = await ask(server, "OPTIONS", "/v1/models", key="", headers=headers)

    assert 204 == answer.status
    assert "https://page.example" == answer.headers["Access-Control-Allow-Origin"]
    assert "authorization, x-stainless-os" == answer.headers["Access-Control-Allow-Headers"]
    assert {"GET", "POST", "DELETE"} <= set(
        answer.headers["Access-Control-Allow-Methods"].split(", ")
    )
    assert "600" == answer.headers["Access-Control-Max-Age"]
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("key", ["", None], ids=["refused", "answered"])
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://page.example", "https://page.example"),
        ("https://two.example", "https://two.example"),
        ("https://page.example:444", None),
        ("http://page.example", None),
        ("null", None),
    ],
)
async def test_a_listed_origin_is_echoed_and_no_other(
    origin: str, allowed: str | None, key: str | None
) -> None:
    """Answers and refusals name the page's origin if it is listed; both vary by it."""
    async with running(CORS) as server:
        answer = await ask(server, "GET", "/v1/models", key=key, headers={"Origin": origin})

    assert (401 if key == "" else 200) == answer.status
    assert allowed == answer.headers.get("Access-Control-Allow-Origin")
    assert "Origin" in answer.headers["Vary"].split(", ")
    assert ("x-request-id" in answer.headers.get("Access-Control-Expose-Headers", "")) is bool(
        allowed
    )


async def test_a_page_sees_when_to_ask_again() -> None:
    """All that a refusal says of it, so that OpenAI's client heeds it in a browser too."""
    rule, hello = "{per: user, budget: {tokens: 0}}", {**HELLO, "model": "default"}
    headers = {"Origin": "https://page.example"}
    async with running(f"{ECHO}\n{CORS}\nlimits: {{rules: [{rule}]}}") as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json=hello, headers=headers)

    assert 429 == answer.status
    told = {name.lower() for name in answer.headers if "retry" in name.lower()}
    assert {"retry-after", "retry-after-ms", "x-should-retry"} == told
    assert told <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))


async def test_an_unlisted_preflight_gets_no_permission() -> None:
    """The browser finds no header that would let its page go on."""
    headers = {**PREFLIGHT, "Origin": "https://other.example"}

    async with running(CORS) as server:
        answer = await ask(server, "OPTIONS", "/v1/models", key="", headers=headers)

    assert [] == [name for name in answer.headers if name.lower().startswith("access-control")]


async def test_without_cors_no_origin_is_answered() -> None:
    """Switched off, there is no trace of it, in dev neither."""
    async with running("http: {cors: false}") as server:
        answer = await ask(server, "GET", "/v1/models", headers={"Origin": "https://page.example"})

    assert 200 == answer.status
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Origin" not in answer.headers["Vary"].split(", ")


async def test_what_a_verb_says_to_vary_by_stays() -> None:
    """CORS adds `Origin` to a resource's own `Vary`, and does not replace it."""
    varying = Response(200, {"Vary": "Accept-Language"}, data="hallo")
    resource = type("Varying", (Resource,), {"get": staticmethod(lambda: varying)})

    async with running(CORS, resources={"varying": resource}) as server:
        answer = await ask(server, "GET", "/varying", headers={"Origin": "https://page.example"})

    assert {"Accept-Language", "Origin"} <= set(answer.headers["Vary"].split(", "))


# --- health


async def test_health_needs_no_credential() -> None:
    """Both ports say that they are up, to anyone, even with an old key; only GET and HEAD do."""
    async with running() as server:
        for key in ("", "wrong"):
            answer = await ask(server, "GET", "/health", key=key)
            assert (200, {"status": "ok"}) == (answer.status, answer.json)
            operations = await ask(server, "GET", f"{server.operations_url}/health", key=key)
            assert (200, {"status": "ok"}) == (operations.status, operations.json)
        assert (200, "") == (await ask(server, "HEAD", "/health", key=""))[::2]
        assert 404 == (await ask(server, "POST", "/health")).status


async def test_only_super_users_see_the_plugins_state() -> None:
    """A failed plugin makes it `degraded` for all; which one, and why, is for super users."""

    def apply(_: Scope) -> None:
        message = "no luck"
        raise RuntimeError(message)

    async with running(handle_application=apply) as server:
        plain = await ask(server, "GET", "/health", key=await server.key_for("ada"))
        whole = await ask(server, "GET", "/health")

    assert (200, {"status": "degraded"}) == (plain.status, plain.json)
    assert 200 == whole.status
    failed = {"status": "error", "error": "RuntimeError: no luck"}
    assert failed == whole.json["plugins"].pop("test")
    assert {"ok"} == {
        plugin["status"] for plugin in whole.json["plugins"].values() if plugin != failed
    }


async def test_until_the_plugins_have_started_all_else_waits() -> None:
    """While it starts, /health says so with 503, and everything else is 503 with Retry-After."""
    found: list[tuple[int, Any, str | None]] = []

    async def apply(scope: Scope) -> None:
        connector = aiohttp.UnixConnector(str(scope.root / "operations.sock"))
        async with aiohttp.ClientSession("http://test", connector=connector) as client:
            for path in ("/health", "/"):
                async with client.get(path) as response:
                    retry = response.headers.get("Retry-After")
                    found.append((response.status, await response.json(), retry))

    async with running(handle_application=apply) as server:
        assert "ok" == (await ask(server, "GET", "/health")).json["status"]

    health, other = found
    assert (503, {"status": "starting"}, None) == health
    assert (503, "1") == other[::2]


# --- odd paths


def spellings(path: str) -> Iterator[str]:
    """A path in the ways that make routers and guards disagree."""
    first, *rest = path.removeprefix("/").split("/")
    tail = "".join(f"/{segment}" for segment in rest)
    yield from (path, f"{path}/", f"{path}//", f"/{path}", f"//{path}", f"/.{path}", f"/./{path}")
    yield from (f"{path}/.", f"{path}/..", f"{path}/%2e%2e", f"{path}/../{first}", f"{path}%2F")
    yield from (f"{path}?", f"{path}?x=/../", f"{path}#", f"{path};x=1", f"{path}%20", f"{path}%00")
    yield from (f"{path}.json", f"{path}%2ejson", f"{path}\\", f"{path}/..%2f{first}", f"{path}%0a")
    yield from (
        f"/x/..{path}",
        f"/x/%2e%2e{path}",
        f"/x/%2E%2E%2F{first}{tail}",
        f"/x/..%2f{first}",
    )
    yield from (f"/%2e{path}", f"/%2F{first}{tail}", f"/%5c{first}{tail}", f"/\\{first}{tail}")
    yield from (f"/%{ord(first[0]):02x}{first[1:]}{tail}", f"/%25{ord(first[0]):02x}{first[1:]}")
    yield from (
        f"/{first.upper()}{tail}",
        f"/{first}" + tail.replace("/", "%2F"),
        f"/{first}//{tail}",
    )
    yield from (f"/{first}" + tail.replace("/", "%2f"), f"/{first}" + tail.replace("/", "%252F"))
    yield from (f"http://test{path}", f"http://test/x/..{path}", f"//test{path}", "/", "//", "*")
    yield "/" + "".join(f"%{ord(letter):02x}" for letter in first) + tail


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_no_spelling_of_a_path_leads_past_the_guard(method: str) -> None:
    """However a path is written, nobody who is not logged in reaches a verb that is closed."""
    reached: list[str] = []

    class Closed(Resource):
        sub_paths = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> str:
            reached.append(context.path)
            return target.pathname

        @staticmethod
        def post(target: RequestTarget, data: Body, context: Context) -> str:
            del data
            return Closed.get(target, context)

    paths = [
        path
        for base in (
            "/secret",
            "/secret/deep",
            "/secret/deep/1",
            "/v1/models",
            "/v1/chat/completions",
        )
        for path in spellings(base)
    ]
    mounts = {"": Closed, "secret": Closed, "secret/deep": Closed}
    async with running(resources=mounts) as server:
        found = {
            path: (await ask_raw(server, f"{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n")).status
            for path in paths
        }
        assert [] == reached
        key = f"Authorization: Bearer {server.api_key}\r\n"
        head = f"{method} /%73ecret/deep//1 HTTP/1.1\r\nHost: test\r\n{key}\r\n"
        assert 200 == (await ask_raw(server, head)).status

    assert {} == {path: status for path, status in found.items() if status not in (400, 401)}
    assert ["/%73ecret/deep//1"] == reached


async def test_an_open_parent_does_not_open_what_is_mounted_below_it() -> None:
    """The parent answers only paths that are its own; no spelling brings it to the closed child."""
    reached: list[str] = []

    class Open(Resource):
        public = True
        sub_paths = True

        @staticmethod
        def get() -> str:
            return "open"

    class Closed(Resource):
        sub_paths = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> str:
            reached.append(context.path)
            return target.pathname

    async with running(resources={"": Open, "open": Open, "open/secret": Closed}) as server:
        found = {
            path: await ask_raw(server, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
            for base in ("/open/secret", "/open/secret/1")
            for path in spellings(base)
        }

    assert [] == reached
    assert {401} == {
        found[path].status for path in ("/open/secret", "/open/secret/1/", "/%6fpen/secret")
    }
    assert {'"open"'} == {answer.text for answer in found.values() if answer.status == 200}


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        ("GARBAGE\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nX-Long: {'a' * 20_000}\r\n\r\n", 431),
        (f"GET / HTTP/1.1\r\nX-{'a' * 20_000}: 1\r\n\r\n", 431),
        ("GET / HTTP/1.1\r\n" + "X-Many: 1\r\n" * 200 + "\r\n", 431),
        (f"GET /{'a' * 20_000} HTTP/1.1\r\nHost: test\r\n\r\n", 414),
    ],
    ids=["no http", "a long value", "a long name", "many headers", "a long path"],
)
async def test_what_is_no_http_is_refused_like_all_else(
    server: RunningServer, request_head: str, status: int
) -> None:
    """A malformed request has a problem body, a request id, and no word of the library beneath."""
    answer = await ask_raw(server, request_head)
    assert status == answer.status == answer.json["status"]
    assert "harperpy" == answer.headers["server"]
    assert answer.headers["x-request-id"] == answer.json["request_id"]


async def test_a_verb_that_asks_for_too_much_is_refused_when_mounted() -> None:
    """A verb with a parameter that nobody will give is refused with what it is given."""

    class Greedy(Resource):
        @staticmethod
        async def get(target: Any, data: Any, context: Any) -> None: ...

    with pytest.raises(RegistrationError, match=r"Greedy.get .*\(target, context\)"):
        Resources().set("greedy", Greedy)
