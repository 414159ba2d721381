"""Which mount answers a path as clients may write it, and which paths none can have."""

import asyncio
from typing import Any

import pytest

from harperpy import RegistrationError, RequestTarget, Resource, Resources, Scope
from harperpy.testing import running
from helpers import Answered, ask, ask_raw


def shown(name: str, **attributes: Any) -> type[Resource]:
    """A public resource that tells its name and what is left of the path."""

    def get(target: RequestTarget) -> list[str]:
        return [name, target.pathname]

    body = {"get": staticmethod(get), "post": staticmethod(get), "public": True, **attributes}
    return type("Shown", (Resource,), body)


async def got(server: Any, path: str, method: str = "GET") -> Answered:
    """What a path is answered exactly as it is written."""
    return await ask_raw(
        server, f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )


# --- the path as it is written

MOUNTS = {
    "a": shown("one letter", sub_paths=True),
    "a/b": shown("two letters"),
    "Foo": shown("Foo", sub_paths=True),
    "größe/ein wort": shown("decoded"),
    "file.json": shown("a dot"),
    "50+1": shown("a plus"),
    "~me": shown("a tilde"),
}
WRITTEN: dict[str, tuple[str, list[str] | None]] = {
    "a one-letter segment": ("/a", ["one letter", ""]),
    "below a one-letter segment": ("/a/x", ["one letter", "/x"]),
    "two one-letter segments": ("/a/b", ["two letters", ""]),
    "a prefix at a segment's end": ("/Foo/bar", ["Foo", "/bar"]),
    "a prefix within a segment": ("/Foobar", None),
    "a prefix at the query": ("/Foo?bar", ["Foo", ""]),
    "another case": ("/foo", None),
    "another case, coded": ("/%66oo", None),
    "coded letters": ("/%46%6F%6f/bar", ["Foo", "/bar"]),
    "coded twice": ("/%2546oo", None),
    "coded bytes of UTF-8": ("/gr%C3%B6%C3%9Fe/ein%20wort", ["decoded", ""]),
    "a plus for a space": ("/gr%C3%B6%C3%9Fe/ein+wort", None),
    "a coded slash between segments": ("/gr%C3%B6%C3%9Fe%2Fein%20wort", None),
    "a coded slash in an id": ("/Foo/a%2Fb", ["Foo", "/a%2Fb"]),
    "a slash at the end": ("/a/b/", ["two letters", "/"]),
    "two slashes at the end": ("/a/b//", ["one letter", "/b//"]),
    "two slashes at the start": ("//a", None),
    "a dot in the name": ("/file.json", ["a dot", ""]),
    "an extension that names a type": ("/Foo.json", ["Foo", ""]),
    "an extension that names none": ("/Foo.exe", None),
    "an extension on an id": ("/Foo/1.json", ["Foo", "/1.json"]),
    "a plus in the name": ("/50+1", ["a plus", ""]),
    "a coded plus": ("/50%2B1", ["a plus", ""]),
    "a tilde, coded": ("/%7Eme", ["a tilde", ""]),
    "a semicolon": ("/a/b;x=1", ["one letter", "/b;x=1"]),
    "a whole URL": ("http://test/Foo/bar?x", ["Foo", "/bar"]),
    "a query with slashes": ("/Foo?x=/a/b", ["Foo", ""]),
}


@pytest.mark.parametrize(("path", "found"), WRITTEN.values(), ids=WRITTEN)
async def test_a_path_finds_the_mount_of_its_decoded_segments(
    path: str, found: list[str] | None
) -> None:
    """Cut at slashes first and decoded then, case and all; what is left is as it was written."""
    async with running(resources=MOUNTS) as server:
        answer = await got(server, path)

    assert (200, found) == (answer.status, answer.json) if found else 404 == answer.status


@pytest.mark.parametrize("segment", ["/", "/a", "/%61"])
async def test_a_path_of_thousands_of_segments_keeps_nobody_waiting(segment: str) -> None:
    """A stranger who sends a few of them does not hold up the server, whatever they lead to."""
    path = segment * (16_000 // len(segment))
    async with running(resources=MOUNTS) as server, asyncio.timeout(20):
        for _ in range(5):
            assert (await got(server, path)).status in {200, 404}


async def test_the_root_takes_what_nothing_else_does() -> None:
    """A mount at `""` answers `/`, and with `sub_paths` all paths that no other mount has."""
    mounts = {"": shown("root", sub_paths=True), "a": shown("a"), ":x/y": shown("pattern")}
    expected = {
        "/": ["root", ""],
        "/?x=1": ["root", ""],
        "/a": ["a", ""],
        "/b/y": ["pattern", ""],
        "/b": ["root", "/b"],
        "/a/b": ["root", "/a/b"],
    }

    async with running(resources=mounts) as server:
        found = {path: (await got(server, path)).json for path in expected}
    async with running(resources={"": shown("root")}) as server:
        alone = [(await got(server, path)).status for path in ("/", "/b")]

    assert expected == found
    assert [200, 404] == alone


# --- what nobody can have


@pytest.mark.parametrize("path", ["a?b", "a#b", "a%62", "100%", "users/:id?", "users/{id}"])
def test_a_path_that_no_request_can_have_is_refused(path: str) -> None:
    """Mounts are written decoded: what could never be found is no mount."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set(path, shown("never"))

    told = "write it decoded, without any of %?#{}; ':name' is any one segment"
    assert f"{path!r} cannot be mounted: {told}" == str(refusal.value)


@pytest.mark.parametrize("mount", ["", ":any", "*rest"])
async def test_a_mount_for_all_paths_leaves_the_servers_own_alone(mount: str) -> None:
    """`/health` for GET and HEAD, and `/openapi`, stay what they are; other methods pass on."""
    taker = shown("taker", sub_paths=True)

    async with running(resources={mount: taker}) as server:
        health = await got(server, "/health")
        head = await got(server, "/health", "HEAD")
        posted = await got(server, "/health", "POST")
        openapi = await got(server, "/openapi")
        other = await got(server, "/health/more")

    assert {"status": "ok"} == health.json
    assert 200 == head.status
    assert "taker" == posted.json[0]
    assert "paths" in openapi.json
    assert "taker" == other.json[0]


@pytest.mark.parametrize("path", ["health", "/health/", "openapi", "/openapi"])
async def test_a_plugin_that_mounts_the_servers_own_path_has_failed(path: str) -> None:
    """It is never shadowed in silence: the plugin's state names the path."""

    def apply(scope: Scope) -> None:
        scope.resources.set(path, shown("shadowed"))

    async with running(handle_application=apply) as server:
        told = (await ask(server, "GET", "/health")).json["plugins"]["test"]

    assert "error" == told["status"]
    assert path.strip("/") in told["error"]
