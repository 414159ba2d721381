"""The registry: which class answers a path, what it may look like, and what is refused when."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from harperpy import (
    Body,
    Context,
    HarperError,
    RegistrationError,
    RequestTarget,
    Resource,
    Resources,
    Response,
    Scope,
    json_response,
)
from harperpy.testing import running
from helpers import ask, ask_raw


def shown(name: str, *, below: bool = False) -> type[Resource]:
    """A public resource that tells its name and what is left of the path."""

    class Shown(Resource):
        public = True
        sub_paths = below

        @staticmethod
        def get(target: RequestTarget) -> list[str]:
            return [name, target.pathname]

    return Shown


async def failure(apply: Callable[[Scope], Any]) -> str:
    """Why a plugin that does this does not start, as a super user reads it."""
    async with running(handle_application=apply) as server:
        health = (await ask(server, "GET", "/health")).json
    assert "degraded" == health["status"]
    assert "error" == health["plugins"]["test"]["status"]
    return health["plugins"]["test"]["error"]


MOUNTS = {
    "": shown("root", below=True),
    "notes": shown("notes", below=True),
    "notes/archive": shown("archive", below=True),
    "notes/archive/exact": shown("exact"),
    "plain": shown("plain"),
}

MATCHES = {
    "/": ["root", ""],
    "/notes": ["notes", ""],
    "/notes/": ["notes", "/"],
    "/notes/1": ["notes", "/1"],
    "/notes/1/2/": ["notes", "/1/2/"],
    "/notes?x=/archive": ["notes", ""],
    "/notesbook": ["root", "/notesbook"],
    "/Notes": ["root", "/Notes"],
    "/notes/archive": ["archive", ""],
    "/notes/archives": ["notes", "/archives"],
    "/notes/archive/1": ["archive", "/1"],
    "/notes/archive/exact": ["exact", ""],
    "/notes/archive/exact/": ["exact", "/"],
    "/notes/archive/exact/1": ["archive", "/exact/1"],
    "/plain/": ["plain", "/"],
    "/plain/1": ["root", "/plain/1"],
    "/%6eotes/%61rchive/1": ["archive", "/1"],
    "/notes%2Farchive": ["root", "/notes%2Farchive"],
    "/notes/archive%2F1": ["notes", "/archive%2F1"],
    "/notes/%2561rchive": ["notes", "/%2561rchive"],
    "//notes": ["root", "/notes"],
    "/notes//archive": ["notes", "//archive"],
    "/plain//": ["root", "/plain//"],
    "/notes/../plain": ["notes", "/../plain"],
    "/notes/%2e%2e/plain": ["notes", "/%2e%2e/plain"],
}


async def test_the_longest_mount_at_a_segments_end_answers() -> None:
    """A path goes to the longest mount it begins with, cut at slashes only, and case counts."""
    async with running(resources=MOUNTS) as server:
        found = {path: (await ask_raw(server, get(path))).json for path in MATCHES}

    assert MATCHES == found


def get(path: str) -> str:
    """A GET as it goes over the wire."""
    return f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/only", 200), ("/only/", 200), ("/only?x=1", 200), ("/only/1", 404), ("/only//", 404)],
)
async def test_a_class_answers_below_its_mount_only_if_it_says_so(path: str, status: int) -> None:
    """Without `sub_paths = True` a mount is one path, with or without a slash at its end."""
    async with running(resources={"only": shown("only")}) as server:
        assert status == (await ask_raw(server, get(path))).status


TARGETS = {
    "/t": [None, False, None],
    "/t/": [None, True, None],
    "/t?x=1": [None, True, "1"],
    "/t/?x=1&x=2": [None, True, "1"],
    "/t/123": ["123", False, None],
    "/t/123?x=": ["123", False, ""],
    "/t/a/b": ["a/b", False, None],
    "/t/a/": ["a", True, None],
    "/t/a%2Fb": ["a/b", False, None],
    "/t/gr%C3%B6%C3%9Fer%20x?x=%26+%C3%9F": ["größer x", False, "& ß"],
}


async def test_a_target_is_what_is_left_of_the_path() -> None:
    """The id is decoded after the path is cut, query values after that; a slash means many."""

    class Target(Resource):
        public = True
        sub_paths = True

        @staticmethod
        def get(target: RequestTarget) -> list[Any]:
            return [target.id, target.is_collection, target.get("x")]

    async with running(resources={"t": Target}) as server:
        found = {path: (await ask_raw(server, get(path))).json for path in TARGETS}

    assert TARGETS == found


async def test_a_query_may_name_a_value_twice() -> None:
    """All values of a name are there, in order, and a default where there is none."""

    class Query(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget) -> list[Any]:
            return [target.search, target.get_all("x"), target.get("y", "none")]

    async with running(resources={"q": Query}) as server:
        answer = await ask(server, "GET", "/q?x=1&z=3&x=2")

    assert ["x=1&z=3&x=2", ["1", "2"], "none"] == answer.json


@pytest.mark.parametrize("path", ["taken", "/taken", "taken/", "/taken/"])
async def test_a_taken_path_is_refused_when_it_is_asked_for(path: str) -> None:
    """Two classes cannot have one path, however it is written; the refusal names both."""

    class First(Resource):
        pass

    class Second(Resource):
        pass

    def apply(scope: Scope) -> None:
        scope.resources.set("taken", First)
        scope.resources.set(path, Second)

    told = await failure(apply)

    assert "'taken' is taken by First of plugin 'test'; Second of 'test' cannot have it" == told


async def test_a_plugin_cannot_take_what_another_has() -> None:
    """The path stays with who came first, and the other plugin is said to have failed."""

    class Mine(Resource):
        public = True

        @staticmethod
        def get() -> str:
            return "mine"

    async with running(resources={"v1/models": Mine}) as server:
        models = await ask(server, "GET", "/v1/models")
        health = (await ask(server, "GET", "/health")).json

    assert "list" == models.json["object"]
    assert "'v1/models' is taken by V1Models" in health["plugins"]["test"]["error"]
    assert "ok" == health["plugins"]["models_gateway"]["status"]


async def test_force_takes_a_path_and_the_same_class_may_come_again() -> None:
    """A path changes hands only where that is said; a repetition is no conflict."""
    first, second = shown("first"), shown("second")

    def apply(scope: Scope) -> None:
        scope.resources.set("taken", first)
        scope.resources.set("taken", first)
        scope.resources.set("taken", second, force=True)

    async with running(handle_application=apply) as server:
        assert ["second", ""] == (await ask(server, "GET", "/taken")).json
        assert "ok" == (await ask(server, "GET", "/health")).json["status"]


VERBS = ("get", "post", "put", "patch", "delete", "query")
HOOKS = (
    *("allow_read", "allow_create", "allow_update", "allow_delete"),
    *("present_error", "present_stream_error"),
)


@pytest.mark.parametrize("name", [*VERBS, *HOOKS])
def test_a_verb_without_decorator_is_refused_with_the_line_to_add(name: str) -> None:
    """What forgot `@staticmethod` is found when it is mounted, not when it is called."""
    forgot = type("Forgot", (Resource,), {name: lambda *_: None})
    line = f"write @staticmethod on the line above 'def {name}'"

    with pytest.raises(RegistrationError) as caught:
        Resources().set("forgot", forgot)

    assert f"Forgot.{name} must be static: {line}" == str(caught.value)


async def test_an_inherited_verb_without_decorator_is_refused_too() -> None:
    """A mixin's verbs are looked at like the class's own, and the operator reads the line."""

    class Mixin:
        def get(self) -> str:
            return "never"

    class Mixed(Mixin, Resource):
        pass

    told = await failure(lambda scope: scope.resources.set("mixed", Mixed))

    line = "write @staticmethod on the line above 'def get'"
    assert f"Mixed.get must be static: {line}" == told


@pytest.mark.parametrize("given", [object, "Resource", Resource(), None])
def test_only_resource_classes_are_mounted(given: Any) -> None:
    """Anything but a class of Resource's kind is refused by what it is."""
    with pytest.raises(RegistrationError) as caught:
        Resources().set("thing", given)

    assert f"{given!r} is not a Resource class" == str(caught.value)


async def test_nothing_is_mounted_once_the_server_has_started() -> None:
    """The registry is open to plugins while they start, and closed from then on."""
    scopes: list[Scope] = []
    async with running(handle_application=scopes.append) as server:
        with pytest.raises(RegistrationError, match="'late' cannot be mounted"):
            scopes[0].resources.set("late", shown("late"))

        assert 404 == (await ask(server, "GET", "/late")).status


async def test_the_mounts_of_a_failed_plugin_say_so() -> None:
    """They answer 500 with the plugin's name, never the cause, in their own error's shape."""

    class Half(Resource):
        public = True

        @staticmethod
        def get() -> str:
            return "never"

        @staticmethod
        def present_error(error: HarperError, context: Context) -> Response:
            return json_response(error.status, [error.public_message, context.request_id])

    def apply(scope: Scope) -> None:
        scope.resources.set("half", Half)
        message = "the password is swordfish"
        raise RuntimeError(message)

    async with running(handle_application=apply) as server:
        answer = await ask(server, "GET", "/half", headers={"x-request-id": "mine"})
        other = await ask(server, "GET", "/v1/models")

    assert 500 == answer.status
    assert ["plugin test did not start", "mine"] == answer.json
    assert 200 == other.status


class Shapes:
    """Verbs of every shape: each answers what it was given."""

    @staticmethod
    def plain_0() -> str:
        """Sync, takes nothing."""
        return "0"

    @staticmethod
    def plain_1(target: RequestTarget) -> str:
        """Sync, takes the target."""
        return f"1 {target.get('x')}"

    @staticmethod
    async def async_0() -> str:
        """Async, takes nothing."""
        return "0"

    @staticmethod
    async def async_1(target: RequestTarget) -> str:
        """Async, takes the target."""
        return f"1 {target.get('x')}"

    @classmethod
    def class_1(cls, target: RequestTarget) -> str:
        """A class method."""
        return f"1 {target.get('x')} {cls.__name__}"

    @classmethod
    async def async_class_0(cls) -> str:
        """An async class method."""
        return f"0 {cls.__name__}"

    @staticmethod
    def generator_1(target: RequestTarget) -> Iterator[str]:
        """A generator."""
        yield from ("1", f" {target.get('x')}")

    @staticmethod
    async def async_generator_1(target: RequestTarget) -> AsyncIterator[str]:
        """An async generator."""
        yield "1"
        await asyncio.sleep(0)
        yield f" {target.get('x')}"

    @classmethod
    async def async_class_generator_0(cls) -> AsyncIterator[str]:
        """An async generator as class method."""
        yield "0"
        yield f" {cls.__name__}"

    @staticmethod
    async def returned_generator_1(target: RequestTarget) -> AsyncIterator[str]:
        """Async, returns a generator."""
        return Shapes.async_generator_1(target)

    @staticmethod
    def get_2(target: RequestTarget, context: Context) -> str:
        """All that get and delete may take."""
        return f"2 {target.get('x')} {context.method}"

    @staticmethod
    async def get_all(*given: Any) -> str:
        """As many as there are."""
        target, context = given
        return f"* {target.get('x')} {context.method}"

    @staticmethod
    async def post_2(target: RequestTarget, data: Body) -> str:
        """The target and the body."""
        return f"2 {target.get('x')} {await data}"

    @staticmethod
    async def post_3(target: RequestTarget, data: Body, request: Context) -> str:
        """All that post and its like may take; the third may be called request."""
        return f"3 {target.get('x')} {await data} {request.method}"

    @staticmethod
    async def post_all(*given: Any) -> str:
        """As many as there are."""
        target, data, context = given
        return f"* {target.get('x')} {await data} {context.method}"

    @classmethod
    async def class_post_3(cls, target: RequestTarget, data: Body, context: Context) -> str:
        """A class method with all."""
        return f"3 {target.get('x')} {await data} {context.method} {cls.__name__}"


ANY_VERB = {
    "plain_0": "0",
    "plain_1": "1 y",
    "async_0": "0",
    "async_1": "1 y",
    "class_1": "1 y Shaped",
    "async_class_0": "0 Shaped",
    "generator_1": "1 y",
    "async_generator_1": "1 y",
    "async_class_generator_0": "0 Shaped",
    "returned_generator_1": "1 y",
}
WITHOUT_BODY = {"get_2": "2 y {method}", "get_all": "* y {method}"}
WITH_BODY = {
    "post_2": "2 y sent",
    "post_3": "3 y sent {method}",
    "post_all": "* y sent {method}",
    "class_post_3": "3 y sent {method} Shaped",
}


@pytest.mark.parametrize(
    ("verb", "shapes"),
    [(verb, {**ANY_VERB, **WITHOUT_BODY}) for verb in ("get", "delete")]
    + [(verb, {**ANY_VERB, **WITH_BODY}) for verb in ("post", "put", "patch", "query")],
)
async def test_a_verb_may_have_any_shape(verb: str, shapes: dict[str, str]) -> None:
    """Static or class, sync or async or generator; it gets as many arguments as it takes."""
    resources = {
        shape: type("Shaped", (Resource,), {verb: vars(Shapes)[shape]}) for shape in shapes
    }
    sent = {"data": "sent"} if "post_3" in shapes else {}
    headers = {"Accept": "text/plain", "Content-Type": "text/plain"}
    found: dict[str, str] = {}
    async with running(resources=resources) as server:
        for shape in shapes:
            path = f"/{shape}?x=y"
            answer = await ask(server, verb.upper(), path, headers=headers, **sent)
            found[shape] = answer.text

    method = verb.upper()
    assert {name: text.format(method=method) for name, text in shapes.items()} == found
