"""Targets: mounts with parameters, what a target tells, and resources hidden for a protocol."""

from collections.abc import Mapping
from typing import Any

import pytest

from harperpy import (
    Body,
    EventStream,
    RegistrationError,
    RequestTarget,
    Resource,
    ResourceConflict,
    Resources,
)
from harperpy.testing import RunningServer, running
from helpers import Answered, ask, ask_raw


def shown(name: str, *, below: bool = False, **attributes: Any) -> type[Resource]:
    """A public resource that tells its name, the parameters and what is left of the path."""

    def get(target: RequestTarget) -> list[Any]:
        return [name, dict(target.params), target.pathname]

    body = {"get": staticmethod(get), "public": True, "sub_paths": below, **attributes}
    return type("Shown", (Resource,), body)


async def got(
    server: RunningServer, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> Answered:
    """What a path is answered exactly as it is written."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return await ask_raw(server, "\r\n".join([*lines, "", ""]))


# --- parameters

MOUNTS = {
    "": shown("root", below=True),
    "users": shown("users"),
    "users/me": shown("me"),
    "users/:id": shown("user"),
    "users/:id/posts": shown("posts"),
    "users/:id/posts/:post": shown("post", below=True),
    "users/:id/*rest": shown("rest"),
    ":tenant/notes": shown("notes"),
    "x/:a/c": shown("x-c"),
    "x/b/:c": shown("x-b"),
    "x/*": shown("x-wild"),
    "x/:a/:b/:c/*tail": shown("x-tail"),
    "files/*path": shown("files"),
    "deep/:a": shown("deep", below=True),
    "deep/:a/:b/end": shown("end"),
    "static": shown("static", below=True),
    "static/:id": shown("never"),
}

MATCHES: dict[str, list[Any]] = {
    "/users": ["users", {}, ""],
    "/users/": ["users", {}, "/"],
    "/users/me": ["me", {}, ""],
    "/users/7": ["user", {"id": "7"}, ""],
    "/users/7/": ["user", {"id": "7"}, "/"],
    "/users/7?x=1": ["user", {"id": "7"}, ""],
    "/users/:id": ["user", {"id": ":id"}, ""],
    "/%75sers/7": ["user", {"id": "7"}, ""],
    "/users/a%20b%2Fc%C3%9F": ["user", {"id": "a b/cß"}, ""],
    "/users/100%zz": ["user", {"id": "100%zz"}, ""],
    "/users/%ff": ["user", {"id": "%ff"}, ""],
    "/users/7/posts": ["posts", {"id": "7"}, ""],
    "/users/7/posts/9": ["post", {"id": "7", "post": "9"}, ""],
    "/users/7/posts/9/deep/1": ["post", {"id": "7", "post": "9"}, "/deep/1"],
    "/users/7/other": ["rest", {"id": "7", "rest": "other"}, ""],
    "/users/7/other/a%2Fb/": ["rest", {"id": "7", "rest": "other/a/b"}, "/"],
    "/users/me/x": ["rest", {"id": "me", "rest": "x"}, ""],
    "/users//x": ["root", {}, "/users//x"],
    "/acme/notes": ["notes", {"tenant": "acme"}, ""],
    "/users/notes": ["user", {"id": "notes"}, ""],
    "/acme/notes/1": ["root", {}, "/acme/notes/1"],
    "/acme%2Fx/notes": ["notes", {"tenant": "acme/x"}, ""],
    "/x/b/c": ["x-b", {"c": "c"}, ""],
    "/x/a/c": ["x-c", {"a": "a"}, ""],
    "/x/a/d": ["x-wild", {"wildcard": "a/d"}, ""],
    "/x/a/b/c/d": ["x-tail", {"a": "a", "b": "b", "c": "c", "tail": "d"}, ""],
    "/x/a/b/c": ["x-wild", {"wildcard": "a/b/c"}, ""],
    "/files/a/b.txt": ["files", {"path": "a/b.txt"}, ""],
    "/files": ["root", {}, "/files"],
    "/files/": ["root", {}, "/files/"],
    "/files//": ["root", {}, "/files//"],
    "/deep/1/2": ["deep", {"a": "1"}, "/2"],
    "/deep/1/2/end": ["end", {"a": "1", "b": "2"}, ""],
    "/deep/1/2/end/3": ["deep", {"a": "1"}, "/2/end/3"],
    "/static/7": ["static", {}, "/7"],
    "/": ["root", {}, ""],
    "/other": ["root", {}, "/other"],
}


async def test_fixed_paths_answer_first_then_parameters_then_wildcards_then_the_root() -> None:
    """Compared from the left, segment by segment; where all are equal the longer one answers."""
    async with running(resources=MOUNTS) as server:
        found = {path: (await got(server, path)).json for path in MATCHES}

    assert MATCHES == found


@pytest.mark.parametrize("turned", [False, True])
async def test_the_order_of_registration_does_not_matter(*, turned: bool) -> None:
    """Which mount answers is said by the paths alone."""
    mounts = dict(list(MOUNTS.items())[:: -1 if turned else 1])
    resources = Resources()
    for path, resource in mounts.items():
        resources.set(path, resource)

    for path, (name, *_) in MATCHES.items():
        found = resources.match(path.partition("?")[0])
        assert found is not None
        assert MOUNTS[found[0].path].__dict__["get"] is found[0].resource.__dict__["get"], name
        assert name == found[0].resource.__dict__["get"](found[1])[0]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("files/*rest/more", "'files/*rest/more': '*' takes all that is left of a path, so it can"),
        ("*/*", "'*/*': '*' takes all that is left"),
        ("users/:", "'users/:': expected a name after ':', such as ':name'"),
        ("users/:a-b", "'users/:a-b': expected a name after ':'"),
        ("files/*a.b", "'files/*a.b': expected a name after '*', such as '*name'"),
        (":a/x/:a", "':a/x/:a': the parameter 'a' is named twice"),
        (":wildcard/*", "':wildcard/*': the parameter 'wildcard' is named twice"),
    ],
)
def test_a_path_that_cannot_be_a_pattern_is_refused(path: str, told: str) -> None:
    """The refusal comes when it is mounted, and shows the path."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set(path, shown("x"))

    assert str(refusal.value).startswith(told)


def test_two_patterns_of_one_shape_are_one_path() -> None:
    """Names tell no requests apart: the second is refused, or takes the place if it is forced."""
    resources = Resources()
    resources.set("a/:x/*y", shown("first"), owner="one")
    with pytest.raises(ResourceConflict, match=r"'a/:z/\*' is taken by Shown of plugin 'one'"):
        resources.set("a/:z/*", shown("second"), owner="two")

    resources.set("a/:z/*", shown("third"), force=True)

    assert ["a/:z/*"] == [entry.path for entry in resources]


async def test_a_role_opens_a_pattern_by_its_path() -> None:
    """The mount's own path is what a role grants, and what no value can leave."""

    class Notes(Resource):
        @staticmethod
        def get(target: RequestTarget) -> str:
            return target.params["tenant"]

    async with running(resources={"t/:tenant/notes": Notes, "t/:tenant/keys": Notes}) as server:
        granted = {"resources": {"t/:tenant/notes": ["read"]}}
        await server.operate("add_role", role="reader", permission=granted)
        key = await server.key_for("someone", "reader")
        assert (200, '"acme"') == (await ask(server, "GET", "/t/acme/notes", key=key))[::2]
        assert 403 == (await ask(server, "GET", "/t/acme/keys", key=key)).status
        assert 401 == (await ask(server, "GET", "/t/acme/notes", key="")).status


async def test_the_patterns_of_a_failed_plugin_say_so() -> None:
    """They answer 500 like any mount of it."""

    def apply(scope: Any) -> None:
        scope.resources.set("half/:id", shown("half"))
        raise RuntimeError

    async with running(handle_application=apply) as server:
        answer = await ask(server, "GET", "/half/1", key="")

    assert (500, "plugin test did not start") == (answer.status, answer.json["detail"])


# --- what a target tells

TARGETS = {
    "the bare path": ("/Foo", None, False),
    "a slash": ("/Foo/", None, True),
    "an id": ("/Foo/123", "123", False),
    "an id of two segments": ("/Foo/a/b", "a/b", False),
    "children of a prefix": ("/Foo/a/", "a", True),
    "an id with a dot": ("/Foo/123.name", "123.name", False),
    "a query after a slash": ("/Foo/?x=1", None, True),
    "a query on the bare path": ("/Foo?x=1", None, True),
    "an id and a query": ("/Foo/123?x=1", "123", False),
    "an id with a coded slash": ("/Foo/a%2Fb", "a/b", False),
    "an id that is no UTF-8": ("/Foo/%fe", "%fe", False),
    "a parameter called id": ("/users/7", "7", False),
    "a parameter called id and a query": ("/users/7?x=1", "7", False),
    "a parameter called id and a slash": ("/users/7/", "7", True),
    "what is left after a parameter called id": ("/users/7/8", "8", False),
    "a parameter of another name": ("/things/7", None, False),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(("path", "id_", "many"), TARGETS.values(), ids=TARGETS)
async def test_a_target_is(path: str, id_: str | None, method: str, *, many: bool) -> None:
    """The id and whether many are meant, for a get as for a post, with and without the slash."""

    class Foo(Resource):
        public = True
        sub_paths = True

        @staticmethod
        def get(target: RequestTarget) -> list[Any]:
            return [target.id, target.is_collection]

        @staticmethod
        def post(target: RequestTarget, data: Body) -> list[Any]:
            del data
            return Foo.get(target)

    async with running(resources={"Foo": Foo, "users/:id": Foo, "things/:thing": Foo}) as server:
        assert [id_, many] == (await got(server, path, method)).json


QUERIES: dict[str, tuple[Any, list[str], list[list[str]]]] = {
    "": (None, [], []),
    "?x=1": ("1", ["1"], [["x", "1"]]),
    "?x=1&y=2&x=3": ("1", ["1", "3"], [["x", "1"], ["y", "2"], ["x", "3"]]),
    "?x=": ("", [""], [["x", ""]]),
    "?x": ("", [""], [["x", ""]]),
    "?y": (None, [], [["y", ""]]),
    "?x=a+b%20c%26": ("a b c&", ["a b c&"], [["x", "a b c&"]]),
    "?%78=1": ("1", ["1"], [["x", "1"]]),
    "?x=007&x=true": ("007", ["007", "true"], [["x", "007"], ["x", "true"]]),
    "?&&x=1&": ("1", ["1"], [["x", "1"]]),
    "?x=%zz%ff": ("%zz�", ["%zz�"], [["x", "%zz�"]]),
}


@pytest.mark.parametrize(("query", "expected"), QUERIES.items(), ids=list(QUERIES))
async def test_a_query_is_strings_until_it_is_typed(query: str, expected: Any) -> None:
    """`get` gives the first value, `get_all` all of them, `pairs` the query as it came."""

    class Query(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget) -> list[Any]:
            return [target.get("x"), target.get_all("x"), target.pairs]

    async with running(resources={"q": Query}) as server:
        assert list(expected) == (await got(server, f"/q{query}")).json


# --- protocols


def streamed(name: str, protocols: Any) -> type[Resource]:
    """A public resource for these protocols that yields its name."""

    def get() -> EventStream:
        return EventStream([name])

    body = {"get": staticmethod(get), "public": True, "protocols": protocols}
    return type("Streamed", (Resource,), body)


EVENTS = "text/event-stream"


@pytest.mark.parametrize(("short", "mount"), [("a", "a/b"), ("", "a/:x"), (":x", "a/b")])
@pytest.mark.parametrize(
    ("protocols", "rest", "sse"),
    [
        ({"rest", "sse", "ws", "mcp"}, "mine", "mine"),
        (["rest", "sse"], "mine", "mine"),
        ({"rest"}, "mine", "shorter"),
        (("sse",), "shorter", "mine"),
        ({"ws"}, "shorter", "shorter"),
        ((), "shorter", "shorter"),
    ],
)
async def test_what_is_hidden_for_a_protocol_lets_a_shorter_mount_answer(
    short: str, mount: str, protocols: Any, rest: str, sse: str
) -> None:
    """`sse` is a get, or head, whose `Accept` prefers an event stream; all else is `rest`."""
    mounts = {
        short: shown("shorter", below=True, post=staticmethod(lambda: "shorter")),
        mount: shown("mine", post=staticmethod(lambda: "mine"), protocols=protocols),
    }
    accepts = {
        None: rest,
        "*/*": rest,
        "application/json": rest,
        f"application/json, {EVENTS};q=0.5": rest,
        f"{EVENTS};q=0, */*": rest,
        EVENTS: sse,
        "Text/Event-Stream": sse,
        f"{EVENTS}, */*;q=0.1": sse,
    }

    async with running(resources=mounts) as server:
        for accept, expected in accepts.items():
            headers = {"Accept": accept} if accept else {}
            answer = await got(server, "/a/b", headers=headers)
            assert expected in answer.text, accept
            head = await got(server, "/a/b", "HEAD", headers)
            assert 200 == head.status
        posted = await got(server, "/a/b", "POST", {"Accept": EVENTS})
        assert rest in posted.text


async def test_what_is_hidden_and_has_nothing_shorter_is_404() -> None:
    """Nobody learns that it is there."""
    async with running(resources={"feed": streamed("feed", {"sse"})}) as server:
        assert 404 == (await got(server, "/feed")).status
        assert 404 == (await got(server, "/feed", "OPTIONS")).status
        assert (
            "data: feed\n\n" == (await ask(server, "GET", "/feed", headers={"Accept": EVENTS})).text
        )


@pytest.mark.parametrize(
    ("protocols", "told"),
    [
        (
            {"websocket"},
            "Streamed.protocols: expected a set of mcp, rest, sse, ws, got 'web",
        ),
        ({"rst"}, "got 'rst'; did you mean 'rest'?"),
        ("rest", "expected a set of mcp, rest, sse, ws, got 'rest'"),
    ],
)
def test_an_unknown_protocol_is_refused_when_mounted(protocols: Any, told: str) -> None:
    """The refusal names the class, the attribute, what is expected and the nearest."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set("x", streamed("x", protocols))

    assert told in str(refusal.value)
