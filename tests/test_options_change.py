"""Options that change while the server runs: who hears of it, and what needs a new start."""

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import pytest

from asking import logged, put, restarted
from commands import ECHO as ECHOING
from commands import FREE, configured, get, serving, until
from harperpy import Scope
from harperpy.config import parse_config
from harperpy.testing import ECHO, RunningServer, on_free_ports, running
from helpers import ask, operation

PLUGIN = "from harperpy_test_hook import apply as handle_application\n"

Apply = Callable[[Scope], Any]
Change = tuple[str, Any, dict[str, Any]]


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """What `plugin.py` calls: set `apply` on it."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    hook = SimpleNamespace()
    sys.modules["harperpy_test_hook"] = hook  # type: ignore[assignment]
    yield hook
    del sys.modules["harperpy_test_hook"]


def plugins(options: str, more: str = "") -> str:
    """A config.yaml with these options for the plugin `greeter`."""
    return f"{ECHO}\nplugins: {{greeter: {{path: plugin.py, {options}}}}}\n{more}"


def take(server: RunningServer, text: str, **environ: str) -> list[str]:
    """Let a running server have a changed config.yaml."""
    config = parse_config(text, source="config.yaml", environ=environ)
    return server.server.take_over(on_free_ports(config))


def hears(scope: Scope) -> "asyncio.Queue[Change]":
    """What a listener of all three parameters is told."""
    changes: asyncio.Queue[Change] = asyncio.Queue()
    scope.options.on_change(lambda path, value, whole: changes.put_nowait((path, value, whole)))
    return changes


async def soon(told: "asyncio.Queue[Any]") -> Any:
    """What comes next, within half a minute."""
    async with asyncio.timeout(30):
        return await told.get()


EVENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a value": ("word: hi", "word: ho", {"word": "ho"}),
    "two values": ("a: 1, b: 2, c: 3", "a: 1, b: 3, c: 4", {"b": 3, "c": 4}),
    "a new key": ("a: 1", "a: 1, b: 2", {"b": 2}),
    "a key that is gone": ("a: 1, b: 2", "b: 2", {"a": None}),
    "a leaf in a block": ("in: {a: 1, b: 2}", "in: {a: 1, b: 3}", {"in.b": 3}),
    "a block that is gone": ("in: {a: 1, b: {c: 2}}", "", {"in.a": None, "in.b.c": None}),
    "a new block": ("", "in: {a: 1, b: {c: 2}}", {"in.a": 1, "in.b.c": 2}),
    "a list": ("a: [1, 2, 3]", "a: [1, 4]", {"a": [1, 4]}),
    "maps in a list": ("a: [{b: 1}]", "a: [{b: 2}]", {"a": [{"b": 2}]}),
    "a block becomes a value": ("a: {b: 1}", "a: 7", {"a": 7}),
    "a value becomes a block": ("a: 7", "a: {b: 1}", {"a": {"b": 1}}),
    "a type": ("a: 1", "a: true", {"a": True}),
    "nothing at all": ("a: 1", "a: null", {"a": None}),
}


@pytest.mark.parametrize(("before", "after", "events"), EVENTS.values(), ids=EVENTS)
async def test_a_listener_is_told_of_each_leaf(
    tmp_path: Path, hook: SimpleNamespace, before: str, after: str, events: dict[str, Any]
) -> None:
    """Its dotted path, its new value, and all options; a list or another type is one event."""
    heard: list[asyncio.Queue[Change]] = []
    hook.apply = lambda scope: heard.append(hears(scope))
    async with running(plugins(before), directory=tmp_path) as server:
        changed = take(server, plugins(after))
        told = [await soon(heard[0]) for _ in events]

    assert events == {path: value for path, value, _ in told}
    assert [f"plugins.greeter.{path}" for path in events] == changed
    whole = parse_config(plugins(after), source="", environ={}).plugins["greeter"]
    assert isinstance(whole, dict)
    assert [{key: whole[key] for key in whole if key != "path"}] * len(told) == [
        each for _, _, each in told
    ]
    assert heard[0].empty()


class Options(msgspec.Struct):
    """Typed options."""

    word: str
    times: int = 1


async def test_options_are_the_new_ones_by_then(tmp_path: Path, hook: SimpleNamespace) -> None:
    """For `get`, `decode`, `scope.config` and `get_configuration`, with `${VAR}` filled in.

    What a listener does to its copy of all options stays its own.
    """
    seen: asyncio.Queue[Any] = asyncio.Queue()

    def apply(scope: Scope) -> None:
        async def listener(path: str, value: str, whole: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            whole.clear()
            options = scope.options
            configured = scope.config.plugins["greeter"]
            seen.put_nowait((path, value, options.get("word"), options.decode(Options), configured))

        scope.options.on_change(listener)

    hook.apply = apply
    async with running(plugins("word: hi"), directory=tmp_path) as server:
        assert ["plugins.greeter.word"] == take(server, plugins('word: "${WORD}!"'), WORD="ho")
        path, value, got, decoded, whole = await soon(seen)
        told = await server.operate("get_configuration")

    assert ("word", "ho!", "ho!", Options("ho!")) == (path, value, got, decoded)
    assert {"path": "plugin.py", "word": "ho!"} == whole == told["plugins"]["greeter"]


async def test_listeners_take_what_they_want(tmp_path: Path, hook: SimpleNamespace) -> None:
    """Of the three parameters the first ones; several are called in order, change by change."""
    told: asyncio.Queue[Any] = asyncio.Queue()

    def apply(scope: Scope) -> None:
        scope.options.on_change(lambda: told.put_nowait("none"))
        scope.options.on_change(told.put_nowait)
        scope.options.on_change(lambda *all_of: told.put_nowait(len(all_of)))

    hook.apply = apply
    async with running(plugins("a: 1, b: 1"), directory=tmp_path) as server:
        take(server, plugins("a: 2, b: 2"))
        assert ["none", "a", 3, "none", "b", 3] == [await soon(told) for _ in range(6)]


async def test_a_listener_that_fails_takes_nobody_down(
    tmp_path: Path, hook: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, the plugin's status says so until the next change is taken, the next is told.

    All else is served as before, the plugin's own mounts included.
    """
    told: asyncio.Queue[str] = asyncio.Queue()

    def apply(scope: Scope) -> None:
        def strict(path: str, value: str) -> None:
            if value == "bad":
                message = f"no such {path}"
                raise ValueError(message)

        scope.options.on_change(strict)
        scope.options.on_change(told.put_nowait)

    async def state(server: RunningServer) -> tuple[str, Any]:
        health = (await ask(server, "GET", "/health")).json
        return health["status"], health["plugins"]["greeter"]

    hook.apply = apply
    async with running(plugins("word: hi"), directory=tmp_path) as server:
        assert ("ok", {"status": "ok", "error": None}) == await state(server)
        with caplog.at_level(logging.ERROR):
            take(server, plugins("word: bad"))
            assert "word" == await soon(told)
        error = "options.on_change: word: ValueError: no such word"
        assert ("degraded", {"status": "error", "error": error}) == await state(server)
        assert {"status": "degraded"} == (await ask(server, "GET", "/health", key="")).json

        take(server, plugins("word: good"))
        assert "word" == await soon(told)
        assert ("ok", {"status": "ok", "error": None}) == await state(server)

    (record,) = caplog.records
    assert ("harperpy.plugins.greeter", True) == (record.name, record.exc_info is not None)
    assert "a listener failed on the option word" == record.getMessage()


@pytest.mark.parametrize(
    "after", ["{greeter: {path: plugin.py}}", "{app_resources: true, greeter}"]
)
async def test_a_block_that_is_gone_leaves_the_defaults(
    tmp_path: Path, hook: SimpleNamespace, after: str
) -> None:
    """A built-in plugin goes on without options, and hears that each is gone."""
    heard: list[asyncio.Queue[Change]] = []
    hook.apply = lambda scope: heard.append(hears(scope))
    (tmp_path / "resources.py").write_text(PLUGIN)
    before = f"{ECHO}\nplugins: {{app_resources: {{word: hi}}, greeter: {{path: plugin.py}}}}"
    plugins = after.replace("greeter}", "greeter: {path: plugin.py}}")
    async with running(before, directory=tmp_path) as server:
        assert ["plugins.app_resources.word"] == take(server, f"{ECHO}\nplugins: {plugins}")
        assert ("word", None, {}) == await soon(heard[0])


RESTARTS: dict[str, tuple[str, str]] = {
    "nothing": ("word: hi", plugins("word: hi")),
    "no listener": ("deaf: true, word: hi", plugins("deaf: true, word: ho")),
    "did not start": ("fails: true, word: hi", plugins("fails: true, word: ho")),
    "another section": ("word: hi", plugins("word: ho", "http: {timeout: 1s}")),
    "where it lives": ("word: hi", plugins("word: ho").replace("plugin.py", "./plugin.py")),
    "its time limit": ("word: hi", plugins("word: ho, timeout: 7000")),
    "turned off": ("word: hi", f"{ECHO}\nplugins: {{greeter: false}}"),
    "gone": ("word: hi", ECHO),
    "one more": ("word: hi", plugins("word: ho").replace("{greeter", "{audit: false, greeter")),
    "one that cannot": (
        "word: hi",
        plugins("word: ho").replace("{greeter", "{echo: {a: 1}, greeter"),
    ),
}


@pytest.mark.parametrize(("before", "after"), RESTARTS.values(), ids=RESTARTS)
async def test_what_is_not_handled_changes_nothing_here(
    tmp_path: Path, hook: SimpleNamespace, before: str, after: str
) -> None:
    """A change of anything else, or of more than a listener handles, is left to a new start."""
    scopes: list[Scope] = []

    def apply(scope: Scope) -> None:
        scopes.append(scope)
        if not scope.options.get("deaf"):
            scope.options.on_change(lambda: pytest.fail("it was told"))
        if scope.options.get("fails"):
            raise ValueError

    hook.apply = apply
    async with running(plugins(before), directory=tmp_path) as server:
        assert [] == take(server, after)
        assert "hi" == scopes[0].options.get("word")


async def test_the_order_of_the_plugins_is_no_option(tmp_path: Path, hook: SimpleNamespace) -> None:
    """It is the order in which they start, so it takes a new start."""
    hook.apply = lambda scope: scope.options.on_change(lambda: None)
    blocks = ("a: {path: plugin.py}", "b: {path: plugin.py, word: hi}")
    async with running(f"{ECHO}\nplugins: {{{', '.join(blocks)}}}", directory=tmp_path) as server:
        turned = f"{ECHO}\nplugins: {{{', '.join(reversed(blocks))}}}"
        assert [] == take(server, turned.replace("hi", "ho"))


EXPECTED = "expected a function of (key_path, value, whole), or of the first of them"
MISUSE: dict[str, tuple[Any, str]] = {
    "no function": ("word", "got str"),
    "four parameters": (lambda a, b, c, d: None, "got one that needs 4 arguments"),  # noqa: ARG005
    "a named one": (lambda a, *, b: None, "got one that needs 2 arguments"),  # noqa: ARG005
}


@pytest.mark.parametrize(("listener", "got"), MISUSE.values(), ids=MISUSE)
async def test_a_listener_that_cannot_be_called_is_refused(
    tmp_path: Path, hook: SimpleNamespace, listener: Any, got: str
) -> None:
    """The plugin's status names the plugin, what was expected and what came."""
    hook.apply = lambda scope: scope.options.on_change(listener)
    async with running(plugins("a: 1"), directory=tmp_path) as server:
        error = server.server.health.plugins["greeter"].error

    assert f"plugins.greeter: options.on_change: {EXPECTED}, {got}" == error


async def test_a_plugin_may_ask_for_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    """`get_status` and a super user's /health say so, with the first reason; each is logged."""
    scopes: list[Scope] = []
    async with running(handle_application=scopes.append) as server:
        assert "restart_required" not in await server.operate("get_status")
        with caplog.at_level(logging.WARNING):
            scopes[0].request_restart("the index is of an older format")
            scopes[0].request_restart("again")
        admin = f"Bearer {server.api_key}"
        _, told = await operation(server, {"operation": "get_status"}, admin)
        health = (await ask(server, "GET", "/health")).json
        assert {"status": "ok"} == (await ask(server, "GET", "/health", key="")).json

    reason = "test: the index is of an older format"
    assert (True, reason) == (told["restart_required"], told["restart_reason"])
    assert (True, reason) == (health["restart_required"], health["restart_reason"])
    assert [
        "a restart is required: the index is of an older format",
        "a restart is required: again",
    ] == [record.getMessage() for record in caplog.records]


async def test_a_scope_knows_its_application(tmp_path: Path) -> None:
    """The folder's name, and where config.yaml is."""
    scopes: list[Scope] = []
    async with running(directory=tmp_path, handle_application=scopes.append):
        (scope,) = scopes
        assert (tmp_path.name, "test") == (scope.app_name, scope.plugin_name)
        assert tmp_path / "config.yaml" == scope.config_file_path


# The real `harperpy dev`

GREETER = """
from harperpy import Resource

class Word(Resource):
    public = True
    said = ""

    @classmethod
    def get(cls):
        return cls.said

    @classmethod
    def post(cls):
        cls.scope.request_restart("somebody asked")
        return "asked"

def handle_application(scope):
    Word.scope, Word.said = scope, scope.options.get("word")
    scope.resources.set("Word", Word)
    if scope.options.get("listens", True):
        scope.options.on_change(changed)

def changed(path, value):
    if path == "word":
        if value == "bad":
            raise ValueError("not this word")
        Word.said = value
"""


def greeting(folder: Path, options: str, more: str = "") -> None:
    """Write a config.yaml with these options of the plugin."""
    block = f"plugins: {{greeter: {{path: greeter.py, {options}}}}}\n"
    put(folder / "config.yaml", f"{FREE}{ECHOING}{block}{more}")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose plugin says its option `word` at /Word."""
    folder = configured(tmp_path / "project")
    (folder / "greeter.py").write_text(GREETER)
    greeting(folder, "word: one")
    return folder


async def test_dev_takes_options_over(project: Path) -> None:
    """One line says which, and the same server goes on; every other change starts it anew."""
    async with serving(project) as server:
        assert (200, "one") == await get(f"{server.url}/Word")
        greeting(project, "word: two")
        assert "taken over: plugins.greeter.word\n" == await until(server.process, "taken over: ")
        assert (200, "two") == await get(f"{server.url}/Word")

        greeting(project, "word: three, listens: false")
        line = "taken over: plugins.greeter.word, plugins.greeter.listens\n"
        assert line == await until(server.process, "taken over: ")
        (project / "more.py").write_text("")
        assert (await restarted(server)).startswith("restarted: more.py changed (")
        assert (200, "three") == await get(f"{server.url}/Word")

        greeting(project, "word: four, listens: false")
        assert (await restarted(server)).startswith("restarted: config.yaml changed (")
        assert (200, "four") == await get(f"{server.url}/Word")
    assert "Traceback" not in (project / "log").read_text()


async def test_dev_restarts_for_more_than_options(project: Path) -> None:
    """A section of the server's own, or a Python file that changed with them."""
    async with serving(project) as server:
        greeting(project, "word: two", "logging: {level: info}\n")
        assert (await restarted(server)).startswith("restarted: config.yaml changed (")
        assert (200, "two") == await get(f"{server.url}/Word")
        (project / "more.py").write_text("")
        greeting(project, "word: three", "logging: {level: info}\n")
        assert (await restarted(server)).startswith("restarted: config.yaml and 1 more changed (")
        assert (200, "three") == await get(f"{server.url}/Word")


async def test_dev_keeps_the_old_options_while_the_file_is_wrong(project: Path) -> None:
    """One line names the place; the mended file is taken over as if nothing had been."""
    async with serving(project) as server:
        put(project / "config.yaml", f"{FREE}{ECHOING}plugins: {{greeter: {{path: greeter.py")
        log = await logged(project, "config.yaml: line ")
        assert (200, "one") == await get(f"{server.url}/Word")
        assert 1 == log.count("not valid YAML")
        greeting(project, "word: '${NO_SUCH_WORD}'")
        log = await logged(project, "plugins.greeter.word: the environment variable NO_SUCH_WORD")
        assert (200, "one") == await get(f"{server.url}/Word")
        greeting(project, "word: two")
        assert "taken over: plugins.greeter.word\n" == await until(server.process, "taken over: ")
        assert (200, "two") == await get(f"{server.url}/Word")
    assert "Traceback" not in (project / "log").read_text()


async def test_dev_goes_on_after_a_listener_that_fails(project: Path) -> None:
    """The log and the status say so, and the next change is heard again."""
    async with serving(project) as server:
        greeting(project, "word: bad")
        await until(server.process, "taken over: ")
        await logged(project, "ValueError: not this word")
        assert (200, "one") == await get(f"{server.url}/Word")
        told = (await get(f"{server.url}/health", f"Bearer {server.key}"))[1]["plugins"]
        error = "options.on_change: word: ValueError: not this word"
        assert {"status": "error", "error": error} == told["greeter"]
        greeting(project, "word: two")
        await until(server.process, "taken over: ")
        assert (200, "two") == await get(f"{server.url}/Word")


async def test_dev_restarts_when_a_plugin_asks(project: Path) -> None:
    """It says why, and the new server takes changes over as the old one did."""
    async with serving(project) as server:
        for word in ("two", "three"):
            async with (
                aiohttp.ClientSession(server.url) as client,
                client.post("/Word") as answer,
            ):
                assert "asked" == await answer.json()
            line = await restarted(server)
            assert line.startswith("restarted: a plugin asked for it (")
            greeting(project, f"word: {word}")
            await until(server.process, "taken over: ")
            assert (200, word) == await get(f"{server.url}/Word")
    assert 2 == (project / "log").read_text().count("a restart is required: somebody asked")
