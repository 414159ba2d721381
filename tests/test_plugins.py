"""Plugins: where they are found, what they are handed, and what happens when one fails."""

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import aiohttp
import msgspec
import pytest

from harperpy import (
    ConfigError,
    Context,
    RegistrationError,
    Resource,
    Scope,
    Server,
    define_backend,
    json_response,
)
from harperpy.config import parse_config
from harperpy.testing import ECHO, RunningServer, on_free_ports, running
from helpers import HELLO, Answered, ask, operation

BUILT_IN = {
    "users",
    "operations_api",
    "openapi",
    "model_calls",
    "analytics",
    "audit",
    "limits",
    "prices",
    "echo",
    "openai",
    "local",
    "listing",
    "models_gateway",
    "app_resources",
}

GREETING = """
from harperpy import Resource
{more}

class Greeting(Resource):
    public = True

    @staticmethod
    def get():
        return "{said}"


def handle_application(scope):
    scope.resources.set("{path}", Greeting)
"""


def greeting(said: str, path: str = "greeting", more: str = "") -> str:
    """A plugin's module that says this under that path."""
    return GREETING.format(said=said, path=path, more=more)


def write(folder: Path, **files: str) -> Path:
    """Put Python files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def echoing(
    plugins: str, directory: Path | None = None
) -> AbstractAsyncContextManager[RunningServer]:
    """A server whose models echo, with these plugins in its config.yaml."""
    return running(f"{ECHO}\n{plugins}", directory=directory)


async def states(server: RunningServer) -> dict[str, str]:
    """Each plugin's state, as a super user reads it."""
    told = (await ask(server, "GET", "/health")).json
    return {name: plugin["status"] for name, plugin in told["plugins"].items()}


async def cause(server: RunningServer, plugin: str) -> str:
    """Why a plugin did not start; everything else did, and the server is up but degraded."""
    told = (await ask(server, "GET", "/health")).json
    assert "degraded" == told["status"]
    found = {name for name, state in (await states(server)).items() if state != "ok"}
    assert {plugin} == found
    assert "error" == told["plugins"][plugin]["status"]
    answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "model": "default"})
    assert 200 == answer.status
    return told["plugins"][plugin]["error"]


async def said(server: RunningServer, path: str) -> Any:
    """What a public resource answers."""
    answer = await ask(server, "GET", path, key="")
    assert 200 == answer.status, answer.text
    return answer.json


# Where they are found


async def test_the_built_in_plugins_are_on_unless_turned_off() -> None:
    """`false` leaves one out, `true` or options keep it; without `plugins:` all are there."""
    async with running() as server:
        assert BUILT_IN | {"test"} == set(await states(server))
    async with echoing("plugins: {models_gateway: false, openai: true, echo: {a: 1}}") as server:
        assert (BUILT_IN | {"test"}) - {"models_gateway"} == set(await states(server))
        assert 404 == (await ask(server, "GET", "/v1/models")).status


async def test_what_turns_nothing_off_is_told_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt built-in that is to be off is still on, and the log says so."""
    async with echoing("plugins: {audti: false, somebody_elses: false}") as server:
        assert "audit" in await states(server)
    told = [record.message for record in caplog.records if "turns nothing off" in record.message]
    assert ["plugins.audti: false turns nothing off; did you mean 'audit'?"] == told


@pytest.fixture
def on_path(tmp_path: Path) -> Iterator[Path]:
    """A folder whose modules can be imported."""
    folder = tmp_path / "path"
    folder.mkdir()
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("harperpy_test_")]:
        del sys.modules[name]


async def test_a_plugin_is_a_file_a_folder_or_a_module(tmp_path: Path, on_path: Path) -> None:
    """`path:` takes a Python file or a package with neighbours, `package:` an importable name."""
    write(tmp_path, single=greeting("a file", "single"))
    more = "from .words import WORDS"
    package = greeting("x", "whole", more).replace('"x"', "WORDS")
    write(tmp_path / "package", __init__=package, words='WORDS = "a folder"')
    write(on_path, harperpy_test_module=greeting("a module", "module"))
    config = """
plugins:
  single: {path: single.py}
  whole: {path: package}
  other: {package: harperpy_test_module}
"""
    async with echoing(config, directory=tmp_path) as server:
        assert "a file" == await said(server, "/single")
        assert "a folder" == await said(server, "/whole")
        assert "a module" == await said(server, "/module")
        assert {"ok"} == set((await states(server)).values())


async def test_an_installed_plugin_is_found_by_its_entry_point(on_path: Path) -> None:
    """A distribution with an entry point in the group `harperpy` is on when it is named."""
    write(on_path, harperpy_test_installed=greeting("installed"))
    info = on_path / "harperpy_test_installed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harperpy-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[harperpy]\ngreeter = harperpy_test_installed\n")

    async with echoing("plugins: {greeter: true}") as server:
        assert "installed" == await said(server, "/greeting")
    async with running() as server:
        assert 404 == (await ask(server, "GET", "/greeting")).status


async def test_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    """A module is known by its place, not by its file's name."""
    write(tmp_path / "a", same=greeting("one", "one"))
    write(tmp_path / "b", same=greeting("two", "two"))
    config = "plugins: {first: {path: a/same.py}, second: {path: b/same.py}}"
    async with echoing(config, directory=tmp_path) as server:
        assert "one" == await said(server, "/one")
        assert "two" == await said(server, "/two")


NOT_FOUND: dict[str, tuple[str, str, str]] = {
    "misspelt": ("opnai: true", "opnai", "did you mean 'openai'?"),
    "unknown": ("zzz: {a: 1}", "zzz", "'path:' or 'package:' to say where it lives"),
    "no such file": ("gone: {path: gone.py}", "gone", "expected a Python file or package at"),
    "no package": ("gone: {path: empty}", "gone", "expected a Python file or package at"),
    "no Python": ("text: {path: notes.txt}", "text", "is not a Python file"),
    "no such module": (
        "gone: {package: harperpy_gone}",
        "gone",
        "config.yaml: plugins.gone.package: no module is called 'harperpy_gone'",
    ),
    "no Python syntax": ("bad: {path: bad.py}", "bad", "SyntaxError"),
    "raises": ("raises: {path: raises.py}", "raises", "ValueError: no good (raises.py, line 1)"),
    "exits": ("exits: {path: exits.py}", "exits", "SystemExit: 3"),
    "exits as it starts": (
        "leaves: {path: leaves.py}",
        "leaves",
        "SystemExit: 4 (leaves.py, line 2)",
    ),
    "awaits what it cancelled": ("lost: {path: lost.py}", "lost", "CancelledError"),
    "no name": ("'': {path: gone.py}", "", "expected a Python file or package at"),
}


@pytest.mark.parametrize(("block", "name", "words"), NOT_FOUND.values(), ids=NOT_FOUND)
async def test_a_plugin_that_cannot_be_loaded(
    tmp_path: Path, block: str, name: str, words: str
) -> None:
    """It is reported under its name with what to mend, and everything else is up."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    write(tmp_path, bad="def handle_application(scope:", raises="raise ValueError('no good')")
    leaves = "def handle_application(scope):\n    raise SystemExit(4)\n"
    lost = (
        "import asyncio\nasync def handle_application(scope):\n    task = "
        "asyncio.ensure_future(asyncio.sleep(9))\n    task.cancel()\n    await task\n"
    )
    write(tmp_path, exits="import sys\nsys.exit(3)\n", leaves=leaves, lost=lost)
    async with echoing(f"plugins: {{{block}}}", directory=tmp_path) as server:
        assert words in await cause(server, name)


# What they are handed


class Chapter(msgspec.Struct, forbid_unknown_fields=True):
    """An inner block."""

    pages: Annotated[int, msgspec.Meta(ge=1)]


class Book(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A plugin's options."""

    book_title: str
    chapters: list[Chapter] = []


class Reader:
    """A plugin that keeps what it was handed."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.book: Book | None = None

    def handle_application(self, scope: Scope) -> None:
        """Decode the options."""
        self.scopes.append(scope)
        self.book = scope.options.decode(Book)


READER = """
from harperpy_test_reader import reader

def handle_application(scope):
    reader.handle_application(scope)
"""


@pytest.fixture
def reader(on_path: Path, tmp_path: Path) -> Iterator[Reader]:
    """A reader that the plugin in `reader.py` hands its scopes to."""
    del on_path
    reader = Reader()
    sys.modules["harperpy_test_reader"] = SimpleNamespace(reader=reader)  # type: ignore[assignment]
    write(tmp_path, reader=READER)
    yield reader
    del sys.modules["harperpy_test_reader"]


async def test_options_are_decoded_into_a_struct(reader: Reader, tmp_path: Path) -> None:
    """The block is typed, without the keys that are the loader's own; `get` takes a path."""
    config = """
plugins:
  reader: {path: reader.py, timeout: 5000, bookTitle: Sea, chapters: [{pages: 3}]}
"""
    async with echoing(config, directory=tmp_path) as server:
        assert "ok" == (await states(server))["reader"]

    assert Book("Sea", [Chapter(3)]) == reader.book
    (scope,) = reader.scopes
    assert "reader" == scope.plugin_name
    assert tmp_path == scope.directory
    assert "Sea" == scope.options.get("bookTitle")
    assert scope.options.get("path") is None
    assert "none" == scope.options.get("bookTitle.x.y", "none")


OPTIONS: list[tuple[str, str]] = [
    ("", "config.yaml: plugins.reader: Object missing required field `bookTitle`"),
    ("bookTitle: 7", "config.yaml: plugins.reader.bookTitle: Expected `str`, got `int`"),
    (
        "bookTitle: Sea, chapters: [{pages: 3}, {pages: 0}]",
        "config.yaml: plugins.reader.chapters[1].pages: Expected `int` >= 1",
    ),
    (
        "bookTitle: Sea, colour: red",
        "config.yaml: plugins.reader.colour: unknown key; the known keys are bookTitle, chapters",
    ),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS)
@pytest.mark.usefixtures("reader")
async def test_options_that_do_not_fit_are_named(tmp_path: Path, options: str, words: str) -> None:
    """The error says file, path and expectation."""
    config = f"plugins: {{reader: {{path: reader.py, {options}}}}}"
    async with echoing(config, directory=tmp_path) as server:
        assert words == await cause(server, "reader")


async def test_each_plugin_has_a_scope_of_its_own(reader: Reader, tmp_path: Path) -> None:
    """Two blocks of one plugin are two plugins, in the order of config.yaml."""
    config = """
plugins:
  second: {path: reader.py, bookTitle: B}
  first: {path: reader.py, bookTitle: A}
"""
    async with echoing(config, directory=tmp_path) as server:
        assert {"ok"} == set((await states(server)).values())

    assert [("second", "B"), ("first", "A")] == [
        (scope.plugin_name, scope.options.get("bookTitle")) for scope in reader.scopes
    ]
    assert ["harperpy.plugins.second", "harperpy.plugins.first"] == [
        scope.logger.name for scope in reader.scopes
    ]


class Rotate(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of a plugin's operation."""

    every: int = 1


async def test_a_plugin_adds_operations() -> None:
    """Each is open to whom it says; without a word, to super users."""

    def apply(scope: Scope) -> None:
        add = scope.operations.add
        add("rotate", lambda request, context: [request.every, context.user.username], Rotate)
        add("whisper", lambda: "a word", Rotate, open_to="user")
        add("shout", lambda request: {"every": request.every}, Rotate, open_to="anyone")

    async with running(handle_application=apply) as server:
        admin, ada = f"Bearer {server.api_key}", f"Bearer {await server.key_for('ada')}"
        got = {
            name: [
                (await operation(server, {"operation": name}, caller))[0]
                for caller in (admin, ada, None)
            ]
            for name in ("rotate", "whisper", "shout")
        }
        told = await operation(server, {"operation": "rotate", "every": 7}, admin)
        word = await operation(server, {"operation": "whisper"}, ada)

    assert (200, {"message": "a word"}) == word
    assert {"rotate": [200, 403, 401], "whisper": [200, 200, 401], "shout": [200, 200, 200]} == got
    assert (200, [7, "HDB_ADMIN"]) == told


# When one fails


class Notes(Resource):
    """A mount of a plugin that may fail."""

    @staticmethod
    def get() -> str:
        """Answer."""
        return "noted"


class OpenNotes(Notes):
    """The same for everyone."""

    public = True


async def test_the_mounts_of_a_failed_plugin_say_so() -> None:
    """500, its name and the request's id, for whom the mount is open; the cause stays inside."""

    def apply(scope: Scope) -> None:
        scope.resources.set("open", OpenNotes)
        scope.resources.set("closed", Notes)
        message = "the vault at 10.0.0.7 is shut"
        raise RuntimeError(message)

    async with running(handle_application=apply) as server:
        assert "RuntimeError: the vault at 10.0.0.7 is shut" == await cause(server, "test")
        assert {"status": "degraded"} == (await ask(server, "GET", "/health", key="")).json
        plain = await server.key_for("ada")
        assert {"status": "degraded"} == (await ask(server, "GET", "/health", key=plain)).json

        answers = [
            await ask(server, "GET", "/open", key=""),
            await ask(server, "POST", "/open", key=plain),
            await ask(server, "GET", "/closed"),
        ]
        refused = [(await ask(server, "GET", "/closed", key=key)).status for key in ("", plain)]

    for answer in answers:
        assert (500, "plugin test did not start") == (answer.status, answer.json["detail"])
        assert answer.headers["x-request-id"] == answer.json["request_id"]
        assert "10.0.0.7" not in answer.text
    assert [401, 403] == refused


@pytest.mark.parametrize("stream", ["whole", "stream"])
async def test_the_models_of_a_failed_plugin_say_so(stream: str) -> None:
    """Nothing of them is asked; who may fall back does, and a name they took is nobody else's."""

    def generate() -> str:
        pytest.fail("it was asked")

    def apply(scope: Scope) -> None:
        own, register = define_backend("own", generate=generate), scope.models.register_backend
        register("generative", "mine", own)
        register("generative", "safe", own, fallback=["spare"])
        register("generative", "default", own, replace=True)
        raise ValueError

    config = "models: {generative: {default: {backend: echo}, spare: {backend: echo}}}"
    async with running(config, handle_application=apply) as server:
        answers = [
            await ask(
                server,
                "POST",
                "/v1/chat/completions",
                json={**HELLO, "model": model, "stream": stream == "stream"},
            )
            for model in ("mine", "default", "safe")
        ]

    assert [500, 500, 200] == [answer.status for answer in answers]
    for answer in answers[:2]:
        assert "plugin test did not start" == answer.json["error"]["message"]


async def test_the_operations_of_a_failed_plugin_say_so() -> None:
    """They do nothing, the names stay its own, and who may not run them is told only that."""

    class Wipe(msgspec.Struct):
        drive: str

    def wipe(request: Wipe) -> None:
        pytest.fail(f"it wiped {request.drive}")

    def apply(scope: Scope) -> None:
        scope.operations.add("wipe", wipe, Wipe, open_to="user")
        scope.commands.add("wipe_all", wipe, Wipe)
        raise ValueError

    async with running(handle_application=apply) as server:
        plain = await server.key_for("ada")
        asked = [("wipe", None), ("wipe", plain), ("wipe_all", None), ("wipe_all", plain)]
        answers = [
            await operation(
                server,
                {"operation": name, "drive": "a"},
                f"Bearer {key or server.api_key}",
            )
            for name, key in asked
        ]

    assert [500, 500, 500, 403] == [status for status, _ in answers]
    for _, told in answers[:3]:
        assert "plugin test did not start" == told["error"]


async def test_a_plugin_whose_model_falls_back_to_nothing_fails_alone() -> None:
    """A typo in a registration is told at the start, not by the first failing call."""

    def apply(scope: Scope) -> None:
        backend = define_backend("own", generate=lambda: "hello")
        scope.models.register_backend("generative", "mine", backend, fallback=["defualt"])

    async with running(handle_application=apply) as server:
        failed = server.server.health.plugins["test"]
        answer = await ask(
            server, "POST", "/v1/chat/completions", json={**HELLO, "model": "default"}
        )

    told = "falls back to 'defualt', which does not exist; did you mean 'default'?"
    assert f"models: generative 'mine' {told}" == failed.error
    assert 200 == answer.status


async def test_a_failed_mount_keeps_its_own_way_of_refusing() -> None:
    """What clients of that mount parse, they still find."""

    class Own(OpenNotes):
        @staticmethod
        def present_error(error: Any, context: Context) -> Any:
            return json_response(error.status, {"oops": [error.public_message, context.request_id]})

    def apply(scope: Scope) -> None:
        scope.resources.set("own", Own)
        raise ValueError

    async with running(handle_application=apply) as server:
        answer = await ask(server, "GET", "/own", key="", headers={"x-request-id": "mine-1"})

    assert (500, {"oops": ["plugin test did not start", "mine-1"]}) == (answer.status, answer.json)


async def test_the_gateway_itself_may_fail(tmp_path: Path) -> None:
    """A path that a plugin took before it is refused; its other mounts say so in OpenAI's shape."""
    write(tmp_path, early=greeting("mine", "v1/models"))
    config = "plugins: {early: {path: early.py}, models_gateway: true}"
    async with echoing(config, directory=tmp_path) as server:
        told = (await ask(server, "GET", "/health")).json["plugins"]["models_gateway"]
        answer = await ask(server, "POST", "/v1/chat/completions", json=HELLO)

        assert "mine" == await said(server, "/v1/models")
    assert "error" == told["status"]
    assert "'v1/models' is taken by Greeting of plugin 'early'" in told["error"]
    assert 500 == answer.status
    assert "plugin models_gateway did not start" == answer.json["error"]["message"]
    assert "server_error" == answer.json["error"]["type"]


async def test_two_plugins_may_not_have_one_path(tmp_path: Path) -> None:
    """The first keeps it; the second fails, names both, and loses its other mounts."""
    second = greeting("two", "greeting") + '    scope.resources.set("late", Greeting)\n'
    second = second.replace("    scope", '    scope.resources.set("other", Greeting)\n    scope', 1)
    write(tmp_path, first=greeting("one"), second=second)
    config = "plugins: {first: {path: first.py}, second: {path: second.py}}"
    async with echoing(config, directory=tmp_path) as server:
        told = await cause(server, "second")
        assert "one" == await said(server, "/greeting")
        other = await ask(server, "GET", "/other", key="")
        late = await ask(server, "GET", "/late", key="")

    assert "'greeting' is taken by Greeting of plugin 'first'; Greeting of 'second'" in told
    assert (500, "plugin second did not start") == (other.status, other.json["detail"])
    assert 404 == late.status


HANGING = """
import asyncio
from harperpy import Resource

class Slow(Resource):
    public = True

    @staticmethod
    def get():
        return "slow"

async def broken():
    raise ValueError("the real reason")

async def handle_application(scope):
    scope.resources.set("slow", Slow)
    {more}
    await asyncio.Event().wait()
"""
HANGS: dict[str, tuple[str, str]] = {
    "nothing else": ("pass", "TimeoutError: handle_application took more than 0.05 s"),
    "a task fails": (
        "scope.create_task(broken())",
        "ValueError: the real reason (slow.py, line 13)",
    ),
    "its own limit": (
        "await asyncio.wait_for(asyncio.Event().wait(), 0.001)",
        "TimeoutError (slow.py, line 17)",
    ),
}


@pytest.mark.parametrize(("more", "words"), HANGS.values(), ids=HANGS)
async def test_a_plugin_that_hangs_is_left_behind(tmp_path: Path, more: str, words: str) -> None:
    """After its `timeout` it has failed, for the first real reason there was."""
    write(tmp_path, slow=HANGING.format(more=more))
    config = "plugins: {slow: {path: slow.py, timeout: 50}}"
    async with echoing(config, directory=tmp_path) as server:
        assert words == await cause(server, "slow")
        assert 500 == (await ask(server, "GET", "/slow", key="")).status


@pytest.mark.parametrize("value", ["0", "-1", "soon", "true"])
async def test_a_timeout_is_a_positive_number(value: str) -> None:
    """Anything else stops the start, and is named."""
    with pytest.raises(ConfigError) as refused:
        async with echoing(f"plugins: {{echo: {{timeout: {value}}}}}"):
            pass

    assert "config.yaml: plugins.echo.timeout: expected a positive number of ms" == str(
        refused.value
    )


FALLEN = {
    "at its import": ("raise LookupError('gone')", "LookupError: gone (guard.py, line 1)"),
    "at its start": (
        "def handle_application(scope):\n    raise LookupError('gone')",
        "LookupError: gone (guard.py, line 2)",
    ),
    "of another's fault": ("requires = ['nobody']\ndef handle_application(scope): ...", "nobody"),
}


@pytest.mark.parametrize(("code", "reason"), FALLEN.values(), ids=FALLEN)
async def test_without_a_plugin_that_is_required_no_server_starts(
    tmp_path: Path, code: str, reason: str
) -> None:
    """A guard that fell leaves no door open; without `required` the server starts, degraded."""
    write(tmp_path, guard=code)
    config = "plugins: {guard: {path: guard.py, required: %s}}"
    async with echoing(config % "false", directory=tmp_path) as server:
        assert reason in await cause(server, "guard")

    with pytest.raises(ConfigError) as refused:
        async with echoing(config % "true", directory=tmp_path):
            pass

    told = str(refused.value)
    assert told.startswith("config.yaml: plugins.guard: it is required, and did not start: ")
    assert reason in told


async def test_a_plugin_is_required_or_not() -> None:
    """Anything else stops the start, and is named."""
    with pytest.raises(ConfigError, match=r"plugins\.echo\.required: expected true or false"):
        async with echoing("plugins: {echo: {required: maybe}}"):
            pass


TOLD_OF_JSON = (
    "TypeError: the JSON object must be str, bytes or bytearray, not int (resources.py, line 3)"
)
WRONG_CLASSES: dict[str, tuple[str, str]] = {
    "not static": (
        "class X(Resource):\n    def get(self): ...",
        "X.get must be static: write @staticmethod on the line above 'def get'",
    ),
    "static, with self": (
        "class X(Resource):\n    @staticmethod\n    def get(self, target): ...",
        "X.get is static, and is given no 'self': write 'def get(target, ...)'",
    ),
    "a verb in capitals": (
        "class X(Resource):\n    @staticmethod\n    def GET(): ...",
        "X.GET is no verb; did you mean 'get'?",
    ),
    "a hook by a verb's name": (
        "class X(Resource):\n    @staticmethod\n    def allow_post(user): ...",
        "X.allow_post is never asked; did you mean 'allow_create'?",
    ),
    "a hook of a class, misspelt": (
        "class X(Resource):\n    @staticmethod\n    def allow_raed(user): ...",
        "X.allow_raed is never asked; did you mean 'allow_read'?",
    ),
    "a hook in Harper's spelling": (
        "class X(Resource):\n    @staticmethod\n    def allowRead(user): ...",
        "X.allowRead is never asked; did you mean 'allow_read'?",
    ),
    "a hook that is not awaited": (
        "class X(Resource):\n    @staticmethod\n    async def present_error(error): ...",
        "X.present_error is not awaited: write 'def present_error', without async",
    ),
    "a misspelt hook": (
        "def handle_aplication(scope): ...",
        "resources.py: 'handle_aplication' is no hook; did you mean 'handle_application'?",
    ),
    "raises": ("raise LookupError('gone')", "LookupError: gone (resources.py, line 2)"),
    "raises further in": ("import json\njson.loads(1)", TOLD_OF_JSON),
    "twice": (
        "class A(Resource):\n    path = 'x'\nclass B(Resource):\n    path = 'x'",
        "'x' is taken by A of plugin 'app_resources'; B of 'app_resources' cannot have it",
    ),
}


@pytest.mark.parametrize(("text", "words"), WRONG_CLASSES.values(), ids=WRONG_CLASSES)
async def test_resources_py_that_fails_is_a_plugin_that_fails(
    tmp_path: Path, text: str, words: str
) -> None:
    """The gateway is up, and the cause says what to mend."""
    write(tmp_path, resources=f"from harperpy import Resource\n{text}\n")
    async with running(directory=tmp_path) as server:
        assert words == await cause(server, "app_resources")


async def test_a_plugin_whose_backends_fail_is_left_behind(tmp_path: Path) -> None:
    """An error in `register_model_backends` is that plugin's own."""
    text = "def register_model_backends(register):\n    raise ValueError('no GPU')\n"
    write(tmp_path, gpu=text)
    async with echoing("plugins: {gpu: {path: gpu.py}}", directory=tmp_path) as server:
        assert "ValueError: no GPU (gpu.py, line 2)" == await cause(server, "gpu")


async def test_a_kind_of_backend_belongs_to_one_plugin(tmp_path: Path) -> None:
    """A second plugin that wants a taken kind has failed; the first one's stays."""
    text = "def register_model_backends(register):\n    register('echo', None)\n"
    write(tmp_path, copy=text)
    async with echoing("plugins: {copy: {path: copy.py}}", directory=tmp_path) as server:
        told = await cause(server, "copy")

    assert "backend 'echo'" in told


KINDS: dict[str, tuple[str, str, str]] = {
    "misspelt": (
        "models: {generative: {default: {backend: ecoh}}}",
        "config.yaml: models.generative.default.backend: expected one of echo, ",
        ", got 'ecoh'; did you mean 'echo'?",
    ),
    "another's name": (
        "models: {generative: {default: {backend: ollama}}}",
        "config.yaml: models.generative.default.backend: expected one of echo, ",
        ", got 'ollama'; 'openai', with a baseUrl, is for all that speak OpenAI's protocol",
    ),
    "off": (
        "models: {embedding: {small: {backend: openai}}}\nplugins: {openai: false}",
        "config.yaml: models.embedding.small.backend: expected one of ",
        ", got 'openai'",
    ),
    "failed": (
        "models: {generative: {default: {backend: gpu}}}\nplugins: {gpu: {path: gone.py}}",
        "config.yaml: models.generative.default.backend: ",
        ", got 'gpu'; the plugins gpu did not start",
    ),
    "its maker fails": (
        "models: {generative: {x: {backend: bad}}}\nplugins: {maker: {path: maker.py}}",
        "config.yaml: models.generative.x: ",
        "ZeroDivisionError: division by zero (maker.py, line 2)",
    ),
}


@pytest.mark.parametrize(("config", "start", "end"), KINDS.values(), ids=KINDS)
async def test_a_backend_that_cannot_be_made_stops_the_start(
    tmp_path: Path, config: str, start: str, end: str
) -> None:
    """No plugin knows the kind, or its factory fails: one sentence names the place."""
    text = "def register_model_backends(register):\n    register('bad', lambda entry: 1 / 0)\n"
    write(tmp_path, maker=text)
    with pytest.raises(ConfigError) as refused:
        async with running(config, directory=tmp_path):
            pass

    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith(end)


async def test_a_plugins_kind_serves_a_configured_model(tmp_path: Path) -> None:
    """`models:` may name what a plugin of config.yaml registers, with the entry's settings."""
    text = """
from harperpy import define_backend

def make(entry):
    said = f"{entry.kind} {entry.name} {entry.settings.model}"
    return define_backend("parrot", generate=lambda: said)

def register_model_backends(register):
    register("parrot", make)
"""
    write(tmp_path, parrot=text)
    config = """
models: {generative: {bird: {backend: parrot, model: ara}}}
plugins: {parrot: {path: parrot.py}}
"""
    async with running(config, directory=tmp_path) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json={**HELLO, "model": "bird"})

    assert "generative bird ara" == answer.json["choices"][0]["message"]["content"]


# resources.py

CLASSES = """
from harperpy import Resource
from harperpy_test_base import Imported

class Named(Resource):
    public = True

    @staticmethod
    def get():
        return "named"

class Placed(Named):
    path = "/some/where/"

    @staticmethod
    def get():
        return "placed"

class _Hidden(Named):
    pass

Alias = Named
number = 7
"""


async def mounted(server: RunningServer, *paths: str) -> dict[str, Answered]:
    """What these paths answer to everyone."""
    return {path: await ask(server, "GET", f"/{path}", key="") for path in paths}


async def test_resources_py_mounts_its_own_public_classes(tmp_path: Path, on_path: Path) -> None:
    """At their `path`, else at their name; not what is imported, private or no class."""
    base = "from harperpy import Resource\nclass Imported(Resource):\n    public = True\n"
    write(on_path, harperpy_test_base=base)
    write(tmp_path, resources=CLASSES)
    async with running(directory=tmp_path) as server:
        got = await mounted(
            server, "Named", "some/where", "Placed", "_Hidden", "Imported", "Alias", "named"
        )

    assert [200, 200, 404, 404, 404, 404, 404] == [answer.status for answer in got.values()]
    assert ("named", "placed") == (got["Named"].json, got["some/where"].json)


@pytest.mark.usefixtures("on_path")
async def test_resources_py_may_say_what_is_public(tmp_path: Path, on_path: Path) -> None:
    """With `__all__` those classes are mounted and no others."""
    write(on_path, harperpy_test_base="Imported = None")
    write(tmp_path, resources=f"{CLASSES}\n__all__ = ['Placed', '_Hidden', 'number']\n")
    async with running(directory=tmp_path) as server:
        got = await mounted(server, "some/where", "_Hidden", "Named")

    assert [200, 200, 404] == [answer.status for answer in got.values()]


@pytest.mark.parametrize("prefix", ["", "async "])
async def test_resources_py_may_speak_for_itself(tmp_path: Path, prefix: str) -> None:
    """With `handle_application`, sync or async, it mounts what it wants, and nothing else is."""
    text = greeting("mine", "chosen").replace("def handle", f"{prefix}def handle")
    write(tmp_path, resources=text)
    async with running(directory=tmp_path) as server:
        got = await mounted(server, "chosen", "Greeting")

    assert [200, 404] == [answer.status for answer in got.values()]


# The start and the end


async def test_nothing_is_served_before_all_plugins_are_up(tmp_path: Path) -> None:
    """Until then /health says `starting` on both ports, and all else is 503 for a moment."""
    waiting, ready = asyncio.Event(), asyncio.Event()

    async def apply(scope: Scope) -> None:
        scope.resources.set("open", OpenNotes)
        waiting.set()
        await ready.wait()

    config = on_free_ports(parse_config(ECHO, source="config.yaml", environ={}))
    plugins = {"test": SimpleNamespace(handle_application=apply)}
    server = Server(config, directory=tmp_path, dev=True, environ={}, plugins=plugins)
    starting = asyncio.create_task(server.start())
    try:
        async with asyncio.timeout(30):
            await waiting.wait()
            early = RunningServer(server, "")
            for url in (early.url, early.operations_url):
                async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as told:
                    assert (503, {"status": "starting"}) == (told.status, await told.json())
            answer = await ask(early, "GET", "/open")
            assert (503, "1") == (answer.status, answer.headers["Retry-After"])

            ready.set()
            await starting
        assert "noted" == await said(early, "/open")
    finally:
        await server.stop()


async def test_what_was_opened_last_is_closed_first() -> None:
    """Closers run in reverse, awaited, and one that fails does not stop the next; tasks end."""
    told: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            told.append("task")

    async def slowly() -> None:
        await asyncio.to_thread(told.append, "async closer")

    def fails() -> None:
        told.append("failing closer")
        raise ValueError

    def apply(scope: Scope) -> None:
        task = scope.create_task(work(), name="work")
        scope.on_close(lambda: told.append(f"first, task ended: {task.done()}"))
        scope.on_close(slowly)
        scope.on_close(fails)
        scope.on_close(lambda: told.append("last"))

    async with running(handle_application=apply):
        await asyncio.sleep(0)
        assert [] == told

    assert ["task", "last", "failing closer", "async closer", "first, task ended: True"] == told


CLOSER = """
from harperpy_test_closed import closed

def handle_application(scope):
    closed.append("open " + scope.plugin_name)
    scope.on_close(lambda: closed.append("close " + scope.plugin_name))
"""


async def test_plugins_close_in_reverse(tmp_path: Path, on_path: Path) -> None:
    """The last plugin of config.yaml is closed first; those that failed once all have started."""
    write(on_path, harperpy_test_closed="closed = []")
    write(tmp_path, closer=CLOSER, failing=f"{CLOSER}    raise ValueError")
    config = """
plugins:
  a: {path: closer.py}
  b: {path: failing.py}
  c: {path: closer.py}
"""
    async with echoing(config, directory=tmp_path):
        closed = sys.modules["harperpy_test_closed"].closed
        assert ["open a", "open b", "open c", "close b"] == closed

    assert ["close c", "close a"] == closed[4:]


async def test_a_failed_plugin_does_nothing_more() -> None:
    """Its tasks end before the server is ready, though it is up for others."""
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def apply(scope: Scope) -> None:
        scope.create_task(work(), name="work")
        await asyncio.sleep(0)
        raise ValueError

    async with running(handle_application=apply) as server:
        assert ended.is_set()
        assert "ValueError" in await cause(server, "test")


async def test_a_background_task_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The plugin is up, and the log names the task and holds the trace."""
    done = asyncio.Event()

    async def broken() -> None:
        done.set()
        message = "lost the queue"
        raise ConnectionError(message)

    def apply(scope: Scope) -> None:
        scope.create_task(broken(), name="consumer")

    with caplog.at_level(logging.ERROR):
        async with running(handle_application=apply) as server:
            await done.wait()
            assert "ok" == (await states(server))["test"]

    (record,) = [record for record in caplog.records if "consumer" in record.getMessage()]
    assert "harperpy.plugins.test" == record.name
    assert record.exc_info is not None
    assert "lost the queue" == str(record.exc_info[1])


async def test_what_is_filled_at_the_start_is_frozen_afterwards() -> None:
    """Mounts, operations and models cannot be added to a running server."""
    scopes: list[Scope] = []
    async with running(handle_application=scopes.append):
        (scope,) = scopes
        with pytest.raises(RegistrationError):
            scope.resources.set("late", Notes)
        with pytest.raises(RegistrationError):
            scope.operations.add("late", lambda: None, Rotate)
        with pytest.raises(RegistrationError):
            scope.models.register_backend(
                "generative", "late", define_backend("late", generate=lambda: "x")
            )


async def test_two_servers_live_in_one_process(tmp_path: Path) -> None:
    """Each has its own mounts, users, keys, rows and modules, also from files of one name."""
    for name in ("one", "two"):
        write(tmp_path / name, resources=greeting(name), plugin=greeting(name, "plugin"))
    config = "plugins: {plugin: {path: plugin.py}}"
    async with echoing(config, directory=tmp_path / "two") as two:
        async with echoing(config, directory=tmp_path / "one") as one:
            for server, name in ((one, "one"), (two, "two")):
                assert name == await said(server, "/greeting")
                assert name == await said(server, "/plugin")
            key = await one.key_for("ada")
            assert 200 == (await ask(one, "GET", "/v1/models", key=key)).status
            assert 401 == (await ask(two, "GET", "/v1/models", key=key)).status
            await ask(one, "POST", "/v1/chat/completions", json={**HELLO, "model": "default"})
            assert (1, 0) == (len(await one.rows()), len(await two.rows()))

        assert "two" == await said(two, "/greeting")


SELF = """
import sys
from harperpy import Resource

class Self(Resource):
    public = True

    @staticmethod
    def get():
        return vars(sys.modules[__name__])["Self"] is Self
"""


async def test_two_servers_live_on_one_folder(tmp_path: Path) -> None:
    """Each has modules of its own; the end of one does not take the other's away."""
    write(tmp_path, resources=SELF)
    async with running(directory=tmp_path) as one:
        async with running(directory=tmp_path) as two:
            assert [True, True] == [await said(one, "/Self"), await said(two, "/Self")]

        assert await said(one, "/Self") is True
