"""Middleware: its order, what it may do to a request and to the answer, and when it is gone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harperpy import (
    ClientError,
    Context,
    EventStream,
    HarperError,
    Next,
    Reply,
    RequestTarget,
    Resource,
    Response,
    Scope,
    User,
    get_context,
    json_response,
)
from harperpy.testing import (
    ECHO,
    Answer,
    RunningServer,
    ScriptedUpstream,
    running,
    streamed,
)
from helpers import HELLO, Answered, ask, ask_raw, operation, provider, until

SECONDS = 20


class Open(Resource):
    """A public resource that tells who asks, and has an error shape of its own."""

    public = True
    sub_paths = True

    @staticmethod
    def get(target: RequestTarget, context: Context) -> Any:
        """Who asks."""
        return {"user": context.user.username if context.user else None}

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """A shape of its own."""
        return json_response(error.status, {"mine": error.public_message}, error.headers)


class Closed(Resource):
    """A resource that only super users reach, as no line says otherwise."""

    reached = 0

    @staticmethod
    def get() -> str:
        """Count who gets here."""
        Closed.reached += 1
        return "closed"


def traced(name: str) -> Any:
    """A middleware that adds its name to the answer's `trace`, outermost last."""

    async def trace(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        reply.headers["trace"] = f"{reply.headers.get('trace', '')} {name}".strip()
        return reply

    return trace


def plugin(*hooks: tuple[Any, dict[str, Any]]) -> Callable[[Scope], None]:
    """A plugin that registers these middlewares."""

    def apply(scope: Scope) -> None:
        for function, options in hooks:
            scope.server.http(function, **options)

    return apply


async def answer_of(function: Any, resource: type[Resource] = Open, **options: Any) -> Answered:
    """What a server with this one middleware answers."""
    mounts = {"it": resource}
    async with running(handle_application=plugin((function, options)), resources=mounts) as server:
        return await ask(server, "GET", "/it", key="")


async def failure(*hooks: tuple[Any, dict[str, Any]]) -> str:
    """Why a plugin that registers these does not start."""
    async with running(handle_application=plugin(*hooks)) as server:
        return (await ask(server, "GET", "/health")).json["plugins"]["test"]["error"]


# --- order


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("a, b, c", "a b c"),
        ("a > b, b", "b a"),
        ("a, b < a", "b a"),
        ("a > c, b, c", "c a b"),
        ("a > c, b > a, c", "c a b"),
        ("a > b & c, b, c", "b c a"),
        ("a, b, c < a & b", "c a b"),
        ("a > authentication, b < resources", "a b"),
        ("a, b < authentication", "b a"),
        ("a, b < c, c < authentication", "b c a"),
        ("a > b, b < authentication, c", "b a c"),
    ],
)
async def test_the_order_is_what_the_names_say_and_else_that_of_registration(
    order: str, expected: str
) -> None:
    """`before` and `after` take one name or several; a circle apart, any of them can be had."""
    hooks = [(traced(name), {"name": name, **options}) for name, options in read(order)]

    async with running(handle_application=plugin(*hooks), resources={"it": Open}) as server:
        answer = await ask(server, "GET", "/it", key="")

    assert expected.split() == answer.headers["trace"].split()[::-1]


def read(order: str) -> list[tuple[str, dict[str, Any]]]:
    """`a > b & c, d < e`: a after b and c, d before e."""
    found: list[tuple[str, dict[str, Any]]] = []
    for part in order.split(", "):
        name, *rest = part.replace("&", " ").split()
        others = tuple(rest[1:])
        given = others[0] if len(others) == 1 else others
        found.append((name, {"after" if rest[0] == ">" else "before": given} if rest else {}))
    return found


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ("a > b, b > a", "'a' before 'b' before 'a'"),
        ("a < a", "'a' before 'a'"),
        ("a > c, b > a, c > b", "'a' before 'b' before 'c' before 'a'"),
    ],
)
async def test_a_circle_is_refused_when_it_is_closed(order: str, told: str) -> None:
    """The refusal names those that would stand before each other."""
    hooks = [(traced(name), {"name": name, **options}) for name, options in read(order)]

    assert told in await failure(*hooks)


async def test_no_place_can_be_before_authentication_and_after_resources() -> None:
    """The two built-in names have an order of their own."""
    told = await failure(
        (traced("a"), {"name": "a", "before": "authentication", "after": "resources"})
    )

    assert "circle" in told
    assert "'resources' before 'a' before 'authentication'" in told


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("authentification", "did you mean 'authentication'?"),
        ("limits", "did you mean 'limit'?"),
        ("nobody", "the known ones are authentication, limit, resources"),
    ],
)
async def test_a_name_that_no_middleware_has_is_refused(where: str, named: str, hint: str) -> None:
    """The refusal names both, and the nearest; it comes when all plugins have had their say."""
    told = await failure(
        (traced("a"), {"name": "a", where: named}), (traced("limit"), {"name": "limit"})
    )

    assert told == f"middleware 'a' stands by {named!r}, which is none; {hint}"


async def two_words(first: Any, second: Any, third: Any) -> Reply:
    """Takes one parameter too many."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        (lambda *_: None, {"name": "x"}, "'x' must be async: write 'async def'"),
        (two_words, {}, "'test.two_words' must take two parameters: it is given (context, call"),
        (traced("a"), {"name": "resources"}, "'resources' is taken by one of harperpy itself"),
        (traced("a"), {"name": "other"}, "'other' is taken by one of plugin 'test'"),
        (traced("a"), {"port": "REST"}, "port: expected one of rest, operations, got 'REST'"),
    ],
    ids=["sync", "three parameters", "a built-in name", "a taken name", "no such port"],
)
async def test_what_cannot_be_a_middleware_is_refused_when_registered(
    function: Any, options: dict[str, Any], told: str
) -> None:
    """The sentence says which one and what is expected."""
    assert told in await failure((traced("other"), {"name": "other"}), (function, options))


# --- what it may do


async def test_it_reads_and_changes_the_answer() -> None:
    """Status, headers and body of what it was given are its to change."""

    async def change(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        assert (200, b'{"user":null}') == (reply.status, reply.body)
        reply.status = 299
        reply.headers["Server-Timing"] = "db;dur=1"
        del reply.headers["Content-Type"]
        reply.headers["Content-Type"] = "text/x-mine"
        reply.body = b"mine"
        return reply

    answer = await answer_of(change)

    assert (299, "mine") == (answer.status, answer.text)
    assert "db;dur=1" == answer.headers["Server-Timing"]
    assert ["text/x-mine"] == answer.headers.getall("Content-Type")  # pyright: ignore[reportAttributeAccessIssue]
    assert answer.headers["x-request-id"]


async def test_headers_set_before_are_on_every_answer() -> None:
    """What it puts into `context.response_headers` is on answers and refusals alike."""

    async def limits(context: Context, call_next: Next) -> Reply:
        context.response_headers["x-ratelimit-remaining"] = "7"
        return await call_next(context)

    hooks = plugin((limits, {"before": "authentication"}))
    async with running(handle_application=hooks, resources={"it": Open, "shut": Closed}) as server:
        found = {
            (await ask(server, method, path, key=key)).status: (
                await ask(server, method, path, key=key)
            ).headers.get("x-ratelimit-remaining")
            for method, path, key in [
                ("GET", "/it", ""),
                ("GET", "/shut", ""),
                ("GET", "/none", None),
                ("DELETE", "/it", ""),
                ("OPTIONS", "/it", ""),
            ]
        }

    assert {200: "7", 401: "7", 404: "7", 405: "7", 204: "7"} == found


async def own_response(*_: Any) -> Response:
    """Answers by itself."""
    return Response(202, {"x-own": "yes"}, data={"own": True})


async def own_stream(*_: Any) -> EventStream:
    """Answers with events of its own."""
    return EventStream(["a", "b"], {"x-own": "yes"})


async def own_refusal(*_: Any) -> Reply:
    """Raises a refusal."""
    message = "Slow down."
    raise ClientError(message, status=429, headers={"Retry-After": "3", "x-own": "yes"})


async def replaced(context: Context, call_next: Next) -> Response:
    """Asks, and then answers something else."""
    await call_next(context)
    return Response(203, {"x-own": "yes"}, body="else")


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [
        (own_response, 202, '{"own":true}'),
        (own_stream, 200, "data: a\n\ndata: b\n\n"),
        (own_refusal, 429, '{"mine":"Slow down."}'),
        (replaced, 203, "else"),
    ],
    ids=["a response", "an event stream", "a refusal", "after asking"],
)
async def test_it_may_answer_by_itself(function: Any, status: int, text: str) -> None:
    """With a `Response`, or by raising: a refusal is worded as the matched resource words it."""
    answer = await answer_of(function)

    assert (status, text, "yes") == (answer.status, answer.text, answer.headers["x-own"])


async def test_an_answer_of_its_own_needs_no_resource() -> None:
    """Where nothing is mounted, it answers too, and its refusal has the default shape."""
    hooks = plugin((own_response, {"url_path": "a"}), (own_refusal, {"url_path": "b"}))

    async with running(handle_application=hooks) as server:
        own = await ask(server, "GET", "/a", key="")
        refusal = await ask(server, "GET", "/b", key="")

    assert (202, {"own": True}) == (own.status, own.json)
    assert (429, "Slow down.") == (refusal.status, refusal.json["detail"])


@pytest.mark.parametrize("outer", [True, False])
async def test_a_refusal_is_an_answer_like_any_other(*, outer: bool) -> None:
    """What the resource or an inner middleware raises arrives worded, status and all."""
    seen: list[tuple[int, Any]] = []

    async def watch(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        seen.append((reply.status, reply.body))
        reply.headers["x-watched"] = "yes"
        return reply

    hooks = plugin((watch, {}), *([(own_refusal, {})] if outer else []))
    async with running(handle_application=hooks, resources={"it": Open}) as server:
        answer = await ask(server, "DELETE", "/it", key="")

    assert (429 if outer else 405) == answer.status == seen[0][0]
    assert answer.text.encode() == seen[0][1]
    assert "yes" == answer.headers["x-watched"]


async def nothing(context: Context, call_next: Next) -> Any:
    """Forgets to return."""
    await call_next(context)


async def number(*_: Any) -> Any:
    """Returns what is no answer."""
    return 200


async def twice(context: Context, call_next: Next) -> Reply:
    """Asks twice."""
    await call_next(context)
    return await call_next(context)


async def other_context(context: Context, call_next: Next) -> Reply:
    """Asks with a context of its own making."""
    return await call_next(Context(context.request, context.models))


async def bad_header(context: Context, call_next: Next) -> Reply:
    """Sets a header that cannot be sent."""
    reply = await call_next(context)
    reply.headers["x-bad"] = "a\r\nb"
    return reply


async def bad_status(context: Context, call_next: Next) -> Reply:
    """Gives a status as text, which would be sent, and stop the analytics."""
    reply = await call_next(context)
    reply.status = "200"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    return reply


async def bad_body(context: Context, call_next: Next) -> Reply:
    """Gives a body that is no bytes."""
    reply = await call_next(context)
    reply.body = "text"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    return reply


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (nothing, "middleware 'test.nothing' returned NoneType: return what 'await call_next(con"),
        (number, "middleware 'test.number' returned int: return what"),
        (twice, "middleware 'test.twice' called call_next a second time"),
        (other_context, "'test.other_context' called call_next with a context that is not its own"),
        (bad_header, "the header 'x-bad' is not text that HTTP allows"),
        (bad_status, "a middleware gave the status '200'; expected 200 to 999"),
        (bad_body, "a middleware gave a body of str; expected bytes, or an async iterator"),
    ],
    ids=["nothing", "number", "twice", "another context", "header", "status", "body"],
)
async def test_a_faulty_middleware_is_named_in_the_log(
    function: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller reads a 500 that tells nothing, in the matched resource's own shape."""
    answer = await answer_of(function)

    assert (500, ["mine"]) == (answer.status, list(answer.json))
    assert told in caplog.text
    assert "test." not in answer.text


async def test_it_runs_inside_the_request() -> None:
    """`get_context()` is there, the mount is known, and the user between the two built-in names."""
    seen: dict[str, Any] = {}

    def look(name: str) -> Any:
        async def middleware(context: Context, call_next: Next) -> Reply:
            assert get_context() is context
            seen[name] = (context.handler_path, context.user and context.user.username)
            return await call_next(context)

        return middleware

    hooks = plugin(
        (look("early"), {"name": "early", "before": "authentication"}), (look("between"), {})
    )
    async with running(handle_application=hooks, resources={"it": Open}) as server:
        await ask(server, "GET", "/it/1")

    assert {"early": ("it", None), "between": ("it", "HDB_ADMIN")} == seen


# --- authorisation


@pytest.mark.parametrize("place", [{}, {"before": "authentication"}, {"after": "authentication"}])
async def test_calling_on_never_skips_authorisation(place: dict[str, Any]) -> None:
    """Whoever calls on reaches the resource only as someone whom it admits."""

    async def on(context: Context, call_next: Next) -> Reply:
        context.rejection = None
        context.app = "open"
        return await call_next(context)

    Closed.reached = 0
    async with running(
        handle_application=plugin((on, place)), resources={"open": Open, "shut": Closed}
    ) as server:
        plain = await server.key_for("someone")
        assert 401 == (await ask(server, "GET", "/shut", key="")).status
        assert 401 == (await ask(server, "GET", "/shut", key="wrong")).status
        assert 403 == (await ask(server, "GET", "/shut", key=plain)).status
        assert 0 == Closed.reached


async def test_it_may_say_who_asks() -> None:
    """A way to log in can be a middleware: the resource's own hooks judge whom it names."""

    async def by_cookie(context: Context, call_next: Next) -> Reply:
        if context.user is None and "cookie" in context.headers:
            context.user = User(context.headers["cookie"], (await admin()).role)
        return await call_next(context)

    async with running(handle_application=plugin((by_cookie, {})), resources={"it": Closed}) as own:
        admin = own.server.local_user
        assert 200 == (await ask(own, "GET", "/it", key="", headers={"Cookie": "ada"})).status
        assert 401 == (await ask(own, "GET", "/it", key="")).status


async def test_after_resources_it_is_asked_only_where_nothing_is_mounted() -> None:
    """It stands in for a 404, and may leave it at that; who asks is settled before."""

    async def fallback(context: Context, call_next: Next) -> Reply | Response:
        if context.path == "/page":
            return Response(200, body=f"for {context.user.username if context.user else None}")
        return await call_next(context)

    hooks = plugin((fallback, {"after": "resources"}))
    async with running(handle_application=hooks, resources={"it": Open}) as server:
        mounted = await ask(server, "GET", "/it", key="")
        page = await ask(server, "GET", "/page")
        none = await ask(server, "GET", "/other")

    assert '{"user":null}' == mounted.text
    assert (200, "for HDB_ADMIN") == (page.status, page.text)
    assert 404 == none.status


# --- where


@pytest.mark.parametrize(
    ("url_path", "path", "asked"),
    [
        (None, "/it", True),
        ("", "/it", True),
        ("/", "/it", True),
        ("it", "/it", True),
        ("/it/", "/it", True),
        ("it", "/it/", True),
        ("it", "/it/1", True),
        ("it", "/it?x=1", True),
        ("it", "/%69t", True),
        ("it", "/items", False),
        ("it", "/IT", False),
        ("it", "/x/it", False),
        ("it", "//it", False),
        ("it/a", "/it", False),
        ("it/a", "/it/a", True),
        ("it/a", "/it/%61/b", True),
        ("it/a", "/it%2Fa", False),
        ("it/a", "/it/ab", False),
        ("it", "/it.json", True),
        ("it", "/%69t.csv?x=1", True),
        ("it/a", "/it/a.yaml", True),
        ("it", "/it.txt", False),
        ("it", "/items.json", False),
    ],
)
async def test_a_url_path_keeps_it_to_a_path_and_all_beneath(
    url_path: str | None, path: str, *, asked: bool
) -> None:
    """Cut at slashes, and spelled in any way that leads to the same mount."""
    hooks = plugin((traced("a"), {"url_path": url_path}))
    head = f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"

    async with running(handle_application=hooks, resources={"it": Open, "": Open}) as server:
        assert asked is ("trace" in (await ask_raw(server, head)).headers)


async def test_each_port_has_middlewares_of_its_own() -> None:
    """One on the operations port sees no request of the REST port, nor the other way round."""
    seen: list[str] = []

    def note(port: str) -> Any:
        async def middleware(context: Context, call_next: Next) -> Reply:
            seen.append(f"{port} {context.path}")
            return await call_next(context)

        return middleware

    hooks = plugin(
        (note("rest"), {"name": "same", "port": "rest"}),
        (note("operations"), {"name": "same", "port": "operations"}),
    )
    async with running(handle_application=hooks, resources={"it": Open}) as server:
        await ask(server, "GET", "/it")
        status, _ = await operation(
            server, {"operation": "list_api_keys"}, f"Bearer {server.api_key}"
        )

    assert 200 == status
    assert ["rest /it", "operations /"] == seen


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_probes_and_preflights_are_answered_before_any_middleware(path: str) -> None:
    """/health and CORS preflights stand outside: no middleware can break them."""
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}

    async with running(handle_application=plugin((own_refusal, {}))) as server:
        preflight = await ask(server, "OPTIONS", path, headers=headers)
        plain = await ask(server, "GET", path)

    assert 204 == preflight.status
    assert (200 if path == "/health" else 429) == plain.status


# --- how long


async def test_it_is_gone_when_its_scope_closes() -> None:
    """The next request does not meet it; without any, nothing is walked."""
    scopes: list[Scope] = []

    def apply(scope: Scope) -> None:
        scopes.append(scope)
        scope.server.http(traced("a"))

    async with running(handle_application=apply, resources={"it": Open}) as server:
        before = await ask(server, "GET", "/it", key="")
        await scopes[0].close()
        after = await ask(server, "GET", "/it", key="")
        assert server.server.core.middlewares["rest"].chain is None

    assert "a" == before.headers["trace"]
    assert "trace" not in after.headers


FAILING = """
async def failed(context, call_next):
    raise NotImplementedError

def handle_application(scope):
    scope.server.http(failed, name="failed")
    raise RuntimeError("no")
"""


async def test_those_of_a_failed_plugin_are_withdrawn(tmp_path: Path) -> None:
    """Others may name them all the same, and stand where they would have stood."""
    (tmp_path / "failing.py").write_text(FAILING)
    config = f"{ECHO}\nplugins: {{failing: {{path: failing.py}}}}"
    hooks = plugin(
        (traced("b"), {"name": "b", "after": "failed"}),
        (traced("a"), {"name": "a", "before": "failed"}),
    )

    async with running(config, directory=tmp_path, handle_application=hooks) as server:
        health = (await ask(server, "GET", "/health")).json["plugins"]
        answer = await ask(server, "GET", "/v1/models")

    assert ("error", "ok") == (health["failing"]["status"], health["test"]["status"])
    assert (200, "b a") == (answer.status, answer.headers["trace"])


async def test_none_can_be_added_once_the_server_has_started() -> None:
    """What the chain is made of is settled at the start."""
    scopes: list[Scope] = []
    async with running(handle_application=scopes.append):
        with pytest.raises(HarperError, match="'late' cannot be added: the server has started"):
            scopes[0].server.http(traced("a"), name="late")


async def test_without_middleware_nothing_is_walked(server: RunningServer) -> None:
    """The default plugins register none, and then a request takes the short way."""
    assert {"rest", "operations"} == set(server.server.core.middlewares)
    assert all(chain.chain is None for chain in server.server.core.middlewares.values())


# --- streams


def streaming(make: Callable[[], Any], **attributes: Any) -> type[Resource]:
    """A public class whose get returns what this makes."""
    return type("Streaming", (Resource,), {"get": staticmethod(make), "public": True, **attributes})


async def test_it_gets_control_back_when_a_streams_head_is_ready() -> None:
    """Before the body is sent: the head can still be changed, and the rest is still to come."""
    gate = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        yield "a"
        await gate.wait()
        yield "b"

    async def timing(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        assert not gate.is_set()
        assert not isinstance(reply.body, bytes)
        reply.headers["Server-Timing"] = "head;dur=1"
        reply.status = 201
        return reply

    mounts = {"it": streaming(lambda: EventStream(items()))}
    async with (
        asyncio.timeout(SECONDS),
        running(handle_application=plugin((timing, {})), resources=mounts) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        assert (201, "head;dur=1") == (response.status, response.headers["Server-Timing"])
        gate.set()
        assert "data: a\n\ndata: b\n\n" == await response.text()


@pytest.mark.parametrize("front", ["on", "off"])
async def test_the_body_that_it_puts_in_place_of_a_streams_is_all_that_is_sent(
    upstream: ScriptedUpstream, front: str
) -> None:
    """However the stream comes: piece by piece, from a provider."""

    async def mask(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        given = reply.body
        assert not isinstance(given, bytes)

        async def masked() -> AsyncIterator[bytes]:
            async for data in given:
                yield data.replace(b"secret", b"******")

        reply.body = masked()
        return reply

    upstream.script(Answer(events=streamed(*["secret "] * 8), pause=0.02))
    configured = f"{provider(upstream.url)}\nhttp: {{front: {front}}}"
    hooks = plugin((mask, {"url_path": "v1"}))
    async with running(configured, handle_application=hooks) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "stream": True})

    assert (8, 0) == (answer.text.count("******"), answer.text.count("secret"))


async def test_into_a_body_of_its_own_no_comment_comes() -> None:
    """It may be anything, as compressed; whether who reads it may go on is asked all the same."""
    gate, seen = asyncio.Event(), asyncio.Event()

    async def items() -> AsyncIterator[str]:
        yield "a"
        await gate.wait()

    async def halve(context: Context, call_next: Next) -> Reply:
        reply = await call_next(context)
        given = reply.body
        assert not isinstance(given, bytes)

        async def halves() -> AsyncIterator[bytes]:
            async for data in given:
                yield data[:3]
                await gate.wait()
                yield data[3:]

        reply.body = halves()
        return reply

    def may_read(_user: User | None, _target: RequestTarget, context: Context) -> bool:
        if asked.count(context) == 2:
            seen.set()
        asked.append(context)
        return True

    asked: list[Context] = []
    own = {"keepalive": 0.01, "allow_read": staticmethod(may_read), "public": False}
    mounts = {"it": streaming(lambda: EventStream(items()), **own)}
    async with (
        asyncio.timeout(SECONDS),
        running(handle_application=plugin((halve, {})), resources=mounts) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        await seen.wait()
        gate.set()
        assert "data: a\n\n" == await response.text()


@pytest.mark.parametrize("how", ["another answer", "an error", "a bad header", "other bytes"])
async def test_a_stream_that_it_does_not_pass_on_is_closed(how: str) -> None:
    """The generator is closed at once, in the task that stepped it."""
    closed: list[Any] = []

    async def items() -> AsyncIterator[str]:
        mine = asyncio.current_task()
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(mine is asyncio.current_task())

    async def drop(context: Context, call_next: Next) -> Reply | Response:
        reply = await call_next(context)
        if how == "an error":
            raise ClientError
        if how == "other bytes":
            reply.body = b"others"
            return reply
        reply.headers["x-bad"] = "\n"
        return reply if how == "a bad header" else Response(200, body="no")

    mounts = {"it": streaming(lambda: EventStream(items()))}
    async with running(handle_application=plugin((drop, {})), resources=mounts) as server:
        answer = await ask(server, "GET", "/it")
        assert [True] == closed

    statuses = {"another answer": 200, "an error": 400, "a bad header": 500, "other bytes": 200}
    assert statuses[how] == answer.status


@pytest.mark.parametrize("how", ["pass on", "raise", "replace"])
async def test_a_head_that_could_not_wait_is_sent_without_it(how: str) -> None:
    """Then only what was set before is on it, and no middleware can take the stream back."""
    gate = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        await gate.wait()
        yield "a"

    async def late(context: Context, call_next: Next) -> Reply | Response:
        context.response_headers["x-before"] = "yes"
        reply = await call_next(context)
        assert reply.committed
        reply.headers["x-after"] = "yes"
        if how == "raise":
            raise ClientError
        return reply if how == "pass on" else Response(500)

    mounts = {"it": streaming(lambda: EventStream(items()), first_item_wait=0.0)}
    async with (
        asyncio.timeout(SECONDS),
        running(handle_application=plugin((late, {})), resources=mounts) as server,
        server.session() as client,
        client.get("/it") as response,
    ):
        assert (200, "yes") == (response.status, response.headers["x-before"])
        assert "x-after" not in response.headers
        gate.set()
        assert "data: a\n\n" == (await response.text()).removeprefix(": keepalive\n\n")


async def silent() -> AsyncIterator[str]:
    """A stream whose first item is never there."""
    await asyncio.Event().wait()
    yield "never"


async def quick(closed: list[str]) -> AsyncIterator[str]:
    """One whose first item is there at once."""
    try:
        yield "first"
        yield "second"
    finally:
        closed.append("closed")


OTHERS: dict[str, Callable[[list[str]], Any]] = {
    "whole": lambda _: Response(504, body="other"),
    "error": lambda _: ClientError("other"),
    "stream": lambda closed: EventStream(quick(closed)),
    "silent stream": lambda _: EventStream(silent()),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("other", OTHERS)
async def test_no_second_answer_comes_after_a_head_that_could_not_wait(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a middleware answers when it has waited long enough ends the connection."""
    seen, closed = asyncio.Event(), list[str]()

    async def limited(context: Context, call_next: Next) -> Any:
        beneath = asyncio.ensure_future(call_next(context))
        await seen.wait()
        beneath.cancel()
        with suppress(asyncio.CancelledError):
            await beneath
        answer = OTHERS[other](closed)
        if isinstance(answer, Exception):
            raise answer
        return answer

    mounts = {"it": streaming(lambda: EventStream(silent()), first_item_wait=0.0)}
    async with (
        asyncio.timeout(SECONDS),
        running(handle_application=plugin((limited, {})), resources=mounts) as server,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
        writer.write(b"GET /it HTTP/1.1\r\nHost: test\r\n\r\n")
        told = await reader.readuntil(b": keepalive\n\n\r\n")
        seen.set()
        told += await reader.read(-1)
        writer.close()

    assert told.startswith(b"HTTP/1.1 200 ")
    assert told.endswith(b": keepalive\n\n\r\n")
    assert 1 == told.count(b"HTTP/1.1")
    assert "an answer broke off" in caplog.text
    assert closed == (["closed"] if other == "stream" else [])


async def test_it_is_cancelled_when_the_client_leaves() -> None:
    """It unwinds like the verb beneath it, and the signal says why."""
    entered = asyncio.Event()
    seen: list[Any] = []

    async def wait() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def unwind(context: Context, call_next: Next) -> Reply:
        try:
            return await call_next(context)
        except asyncio.CancelledError:
            seen.append(context.signal and context.signal.reason)
            raise

    mounts = {"it": streaming(wait)}
    async with (
        asyncio.timeout(SECONDS),
        running(handle_application=plugin((unwind, {})), resources=mounts) as server,
    ):
        call = asyncio.create_task(ask(server, "GET", "/it"))
        await entered.wait()
        call.cancel()
        await until(lambda: bool(seen))

    assert ["client_disconnected"] == seen


async def test_the_gateway_streams_through_it() -> None:
    """A rate limit's headers are on a chat stream's head; what it refuses has OpenAI's shape."""

    async def limits(context: Context, call_next: Next) -> Reply:
        if context.headers.get("x-over") == "yes":
            message = "Slow down."
            raise ClientError(message, status=429, headers={"Retry-After": "1"})
        reply = await call_next(context)
        reply.headers["x-ratelimit-remaining-requests"] = "9"
        return reply

    asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    hooks = plugin((limits, {"url_path": "v1"}))
    async with running(ECHO, handle_application=hooks) as server:
        chat = "/v1/chat/completions"
        stream = await ask(server, "POST", chat, json=asked)
        over = await ask(server, "POST", chat, json=asked, headers={"x-over": "yes"})

    assert "9" == stream.headers["x-ratelimit-remaining-requests"]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert ("Slow down.", "rate_limit_error") == tuple(
        over.json["error"][field] for field in ("message", "type")
    )
