"""The rules between plugins, and how a plugin that breaks one is told."""

import logging
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import aiohttp
import msgspec
import pytest

from commands import FREE, Serving, harperpy, serving
from harperpy import ConfigError, Scope, Secret
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask, operation

STARTING = """
requires = {requires}

def handle_application(scope):
    told = scope.directory / "told"
    with told.open("a") as file:
        file.write("+" + scope.plugin_name + " ")
    scope.on_close(lambda: told.write_text(told.read_text() + "-" + scope.plugin_name + " "))
    {more}
"""


def write(folder: Path, **texts: str) -> str:
    """Put plugins into a folder; the block of config.yaml that names them, in this order."""
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    blocks = ", ".join(f"{name}: {{path: {name}.py}}" for name in texts)
    return f"plugins: {{{blocks}}}"


def starting(*requires: str, more: str = "pass") -> str:
    """A plugin that requires these, and tells when it starts and ends."""
    return STARTING.format(requires=[*requires], more=more)


async def causes(server: RunningServer) -> dict[str, str]:
    """The plugins that failed, and why, as a super user reads it."""
    told = (await ask(server, "GET", "/health")).json["plugins"]
    return {name: each["error"] for name, each in told.items() if each["status"] != "ok"}


# Their order

ORDERS: dict[str, tuple[dict[str, list[str]], str]] = {
    "nothing required": ({"a": [], "b": [], "c": []}, "+a +b +c -c -b -a"),
    "required already there": ({"a": [], "b": ["a"], "c": []}, "+a +b +c -c -b -a"),
    "required later": ({"a": ["c"], "b": [], "c": []}, "+b +c +a -a -c -b"),
    "a chain turned round": ({"a": ["b"], "b": ["c"], "c": []}, "+c +b +a -a -b -c"),
    "two of one": ({"a": ["c"], "b": ["c"], "c": []}, "+c +a +b -b -a -c"),
    "one of two": ({"a": ["c", "b"], "b": [], "c": []}, "+b +c +a -a -c -b"),
    "a built-in one": ({"a": ["users", "echo"], "b": []}, "+a +b -b -a"),
}


@pytest.mark.parametrize(("requires", "order"), ORDERS.values(), ids=ORDERS)
async def test_plugins_start_after_what_they_require(
    tmp_path: Path, requires: dict[str, list[str]], order: str
) -> None:
    """Else in the order of config.yaml; and they end in reverse."""
    block = write(tmp_path, **{name: starting(*needs) for name, needs in requires.items()})
    async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
        assert {} == await causes(server)

    assert order == (tmp_path / "told").read_text().strip()


async def test_a_built_in_plugin_may_be_required_by_one_before_it(tmp_path: Path) -> None:
    """A built-in that config.yaml names later starts before it is needed."""
    text = starting("echo", more="assert not scope.options.get('x')")
    (tmp_path / "a.py").write_text(text)
    config = f"{ECHO}\nplugins: {{a: {{path: a.py}}, echo: true}}"
    async with running(config, directory=tmp_path) as server:
        names = [scope.plugin_name for scope in server.server.loader.scopes]
        assert {} == await causes(server)

    assert names.index("echo") + 1 == names.index("a")


RAISES = "raise ValueError('no disk')"
MAKES = "def register_model_backends(register):\n    register('made', lambda entry: None)\n"
WRONG_ORDERS: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "unknown": (
        {"notes": starting(), "a": starting("nots")},
        "",
        {"a": "it requires 'nots', which is no plugin of config.yaml; did you mean 'notes'?"},
    ),
    "switched off": (
        {"a": starting("audit")},
        "audit: false",
        {"a": "it requires 'audit', which config.yaml turns off (plugins.audit: false)"},
    ),
    "itself": (
        {"a": starting("a"), "b": starting()},
        "",
        {"a": "it requires itself: take 'a' out of its 'requires'"},
    ),
    "two in a circle, one behind": (
        {"c": starting("a"), "a": starting("b"), "b": starting("a"), "d": starting()},
        "",
        {
            "a": "it requires 'b', which requires 'a': none of them can start first",
            "b": "it requires 'a', which requires 'b': none of them can start first",
            "c": "it requires a, which did not start",
        },
    ),
    "three in a circle": (
        {"a": starting("b"), "b": starting("c"), "c": starting("d", "a"), "d": starting()},
        "",
        {
            "a": "it requires 'b', which requires 'c', which requires 'a': "
            "none of them can start first",
            "b": "it requires 'c', which requires 'a', which requires 'b': "
            "none of them can start first",
            "c": "it requires 'a', which requires 'b', which requires 'c': "
            "none of them can start first",
        },
    ),
    "what is required raises": (
        {"a": starting("b"), "b": starting("c"), "c": starting(more=RAISES), "d": starting()},
        "",
        {
            "c": "ValueError: no disk (c.py, line 9)",
            "b": "it requires c, which did not start",
            "a": "it requires b, which did not start",
        },
    ),
    "what is required cannot be imported": (
        {"a": starting("b"), "b": RAISES},
        "",
        {"b": "ValueError: no disk (b.py, line 1)", "a": "it requires b, which did not start"},
    ),
    "the backends of what is required fail": (
        {
            "b": f"def register_model_backends(register):\n    {RAISES}\n",
            "a": f"requires = ['b']\n{MAKES}",
            "c": MAKES,
        },
        "",
        {"b": "ValueError: no disk (b.py, line 2)", "a": "it requires b, which did not start"},
    ),
    "a text": (
        {"a": "requires = 'users'\ndef handle_application(scope): ...\n"},
        "",
        {"a": "requires: expected a list of plugins such as ['users'], got 'users'"},
    ),
    "no texts": (
        {"a": "requires = [1]\ndef handle_application(scope): ...\n"},
        "",
        {"a": "requires: expected a list of plugins such as ['users'], got [1]"},
    ),
}


@pytest.mark.parametrize(("plugins", "more", "told"), WRONG_ORDERS.values(), ids=WRONG_ORDERS)
async def test_a_plugin_without_what_it_requires_does_not_start(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plugins: dict[str, str],
    more: str,
    told: dict[str, str],
) -> None:
    """It says which plugin it lacks, in the log too; those that need neither are up."""
    block = write(tmp_path, **plugins).replace("{", f"{{{more}, " if more else "{", 1)
    with caplog.at_level(logging.ERROR):
        async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
            assert told == await causes(server)
            started = {scope.plugin_name for scope in server.server.loader.scopes}

    assert set(plugins) - set(told) <= started
    for name, cause in told.items():
        assert f"plugin {name} did not start: {cause}" in caplog.messages
    written = tmp_path / "told"
    tried = {f"+{name}" for name, cause in told.items() if "no disk" not in cause}
    assert not tried & set(written.read_text().split() if written.exists() else [])


# Their hooks

NOTHING = "it defines neither 'handle_application' nor 'register_model_backends': "
SLIPS: dict[str, tuple[str, str]] = {
    "a letter less": (
        "def handle_aplication(scope): ...",
        "'handle_aplication' is no hook; did you mean 'handle_application'?",
    ),
    "as in JavaScript": (
        "async def handleApplication(scope): ...",
        "'handleApplication' is no hook; did you mean 'handle_application'?",
    ),
    "one for many": (
        "def register_model_backend(register): ...",
        "'register_model_backend' is no hook; did you mean 'register_model_backends'?",
    ),
    "beside a right one": (
        "def handle_application(scope): ...\ndef register_model_backend(register): ...",
        "'register_model_backend' is no hook; did you mean 'register_model_backends'?",
    ),
    "far off, but the only one": (
        "def handle_app(scope): ...",
        "'handle_app' is no hook; did you mean 'handle_application'?",
    ),
    "none": ("def setup(scope): ...", f"{NOTHING}there is nothing to call"),
    "not a function": ("handle_aplication = 1", f"{NOTHING}there is nothing to call"),
    "another argument": ("def handle_application(app): ...", "hookimpl definition"),
}


@pytest.mark.parametrize(("text", "words"), SLIPS.values(), ids=SLIPS)
async def test_a_misspelt_hook_is_told_the_nearest(tmp_path: Path, text: str, words: str) -> None:
    """The plugin has failed instead of doing nothing in silence."""
    block = write(tmp_path, slip=text)
    async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
        told = await causes(server)

    assert {"slip"} == set(told)
    assert words in told["slip"]


YIELDS = "'handle_application' yields, and so nothing of it has run"
SILENT: dict[str, tuple[str, str]] = {
    "yields": ("def handle_application(scope):\n    yield", YIELDS),
    "yields, async": ("async def handle_application(scope):\n    yield", YIELDS),
    "is a context manager": (
        (
            "import contextlib\n@contextlib.asynccontextmanager\n"
            "async def handle_application(scope):\n    yield"
        ),
        YIELDS,
    ),
    "takes an optional scope": (
        "def handle_application(scope=None):\n    raise ValueError(scope.plugin_name)",
        "ValueError: slip",
    ),
    "takes anything": (
        "def handle_application(*given):\n    raise ValueError(given[0].plugin_name)",
        "ValueError: slip",
    ),
}


@pytest.mark.parametrize(("text", "words"), SILENT.values(), ids=SILENT)
async def test_no_hook_does_nothing_in_silence(tmp_path: Path, text: str, words: str) -> None:
    """It is called with its scope, however it takes it; one that would have to be stepped fails."""
    block = write(tmp_path, slip=text)
    async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
        assert words in (await causes(server))["slip"]


FINE: dict[str, str] = {
    "a helper": "def register_backends(scope): ...\ndef handle_application(scope): ...",
    "a longer one": "def handle_applications(): ...\ndef handle_application(scope): ...",
    "a private one": "def _handle_aplication(): ...\ndef register_model_backends(register): ...",
    "under another name": (
        "from harperpy import hookimpl\n"
        "@hookimpl(specname='handle_application')\ndef start(scope): ..."
    ),
}


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
async def test_functions_of_its_own_are_no_misspelt_hooks(tmp_path: Path, text: str) -> None:
    """What only resembles a hook is let be."""
    block = write(tmp_path, fine=text)
    async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
        assert {} == await causes(server)


# Their options


class Shelf(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """An inner block."""

    max_books: int = 1


class Library(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A plugin's options."""

    opening_hours: str = ""
    shelves: Annotated[list[Shelf], msgspec.Meta(description="in rows")] = []
    rooms: dict[str, Shelf | None] = {}
    main: Shelf = Shelf()


UNKNOWN: dict[str, tuple[str, str]] = {
    "misspelt": ("openingHour: x", "openingHour: unknown key; did you mean 'openingHours'?"),
    "as in Python": ("opening_hours: x", "opening_hours: unknown key; did you mean 'openingHours'"),
    "far off": ("z: 1", "z: unknown key; the known keys are main, openingHours, rooms, shelves"),
    "in a block": ("main: {maxBook: 1}", "main.maxBook: unknown key; did you mean 'maxBooks'?"),
    "in a list": (
        "shelves: [{}, {books: 2}]",
        "shelves[1].books: unknown key; did you mean 'maxBooks'?",
    ),
    "in a map": (
        "rooms: {red: null, blue: {maxBoks: 2}}",
        "rooms[...].maxBoks: unknown key; did you mean 'maxBooks'?",
    ),
}


@pytest.mark.parametrize(("options", "words"), UNKNOWN.values(), ids=UNKNOWN)
async def test_an_unknown_option_is_told_the_nearest(options: str, words: str) -> None:
    """The error names file, plugin and key, and what the key may be called there."""

    def apply(scope: Scope) -> None:
        scope.options.decode(Library)

    config = f"{ECHO}\nplugins: {{library: {{package: harperpy_test_library, {options}}}}}"
    sys.modules["harperpy_test_library"] = SimpleNamespace(handle_application=apply)  # type: ignore[assignment]
    try:
        async with running(config) as server:
            told = await causes(server)
    finally:
        del sys.modules["harperpy_test_library"]

    assert {"library"} == set(told)
    assert told["library"].startswith(f"config.yaml: plugins.library.{words}")


# Their scope


@asynccontextmanager
async def opened(name: str, told: list[str]) -> AsyncGenerator[str]:
    """Something that tells when it is entered and left."""
    told.append(f"enter {name}")
    yield name
    told.append(f"leave {name}")


async def test_what_a_scope_enters_it_leaves_in_reverse() -> None:
    """It is entered now and hands its value on; a closer between two has its turn between them."""
    told: list[str] = []

    async def apply(scope: Scope) -> None:
        told.append(await scope.enter(opened("a", told)))
        scope.on_close(lambda: told.append("closer"))
        told.append(await scope.enter(opened("b", told)))

    async with running(handle_application=apply) as server:
        assert {} == await causes(server)
        assert ["enter a", "a", "enter b", "b"] == told

    assert ["leave b", "closer", "leave a"] == told[4:]


async def test_what_cannot_be_entered_stops_its_plugin() -> None:
    """What was entered before is left, and what failed is not left again."""
    told: list[str] = []

    @asynccontextmanager
    async def shut() -> AsyncGenerator[None]:
        message = "shut"
        raise OSError(message)
        yield

    async def apply(scope: Scope) -> None:
        await scope.enter(opened("a", told))
        await scope.enter(shut())

    async with running(handle_application=apply) as server:
        assert {"test": "OSError: shut"} == await causes(server)

    assert ["enter a", "leave a"] == told


async def test_secrets_come_from_the_environment() -> None:
    """As secrets, that no listing gives away."""
    got: list[Secret] = []

    def apply(scope: Scope) -> None:
        got.append(scope.secrets.get("VAULT_KEY"))

    async with running(handle_application=apply, environ={"VAULT_KEY": "hunter2"}) as server:
        assert {} == await causes(server)

    (secret,) = got
    assert "hunter2" == secret.reveal()
    assert "hunter2" not in f"{secret} {secret!r}"


@pytest.mark.parametrize(
    ("environ", "state"), [({}, "not set"), ({"VAULT_KEY": ""}, "empty")], ids=["none", "empty"]
)
async def test_a_secret_that_is_missing_is_named(environ: dict[str, str], state: str) -> None:
    """The plugin fails with the name of the variable to set."""

    def apply(scope: Scope) -> None:
        with pytest.raises(ConfigError):
            scope.secrets.get("VAULT_KEY")
        scope.secrets.get("VAULT_KEY")

    async with running(handle_application=apply, environ=environ) as server:
        told = await causes(server)

    assert {"test": f"plugins.test: the environment variable VAULT_KEY is {state}"} == told


SLOW = """
import asyncio

async def forever():
    await asyncio.Event().wait()

async def at_once():
    pass

async def handle_application(scope):
    scope.create_task(forever(), name="warm the cache")
    scope.create_task(forever())
    await scope.create_task(at_once(), name="done already")
    await asyncio.Event().wait()
"""


async def test_a_plugin_out_of_time_tells_what_of_it_still_runs(tmp_path: Path) -> None:
    """Tasks go by their names, or by their functions'; those that are done are left out."""
    (tmp_path / "slow.py").write_text(SLOW)
    config = f"{ECHO}\nplugins: {{slow: {{path: slow.py, timeout: 50}}}}"
    async with running(config, directory=tmp_path) as server:
        told = await causes(server)

    slow = "TimeoutError: handle_application took more than 0.05 s"
    assert {"slow": f"{slow}; its tasks that still run: forever, warm the cache"} == told


# What an operator sees


async def test_get_status_tells_what_health_tells_super_users() -> None:
    """With the version; plain users are refused, and so is a plugin's cause for them."""

    def apply(scope: Scope) -> None:
        del scope
        message = "no disk"
        raise OSError(message)

    async with running(handle_application=apply) as server:
        health = (await ask(server, "GET", "/health")).json
        admin, ada = f"Bearer {server.api_key}", f"Bearer {await server.key_for('ada')}"
        status, told = await operation(server, {"operation": "get_status"}, admin)
        refused = [
            (await operation(server, {"operation": "get_status"}, who))[0] for who in (ada, None)
        ]

    assert ([403, 401], 200) == (refused, status)
    assert {**health, "version": told["version"]} == told
    assert "degraded" == told["status"]
    assert {"status": "error", "error": "OSError: no disk"} == told["plugins"]["test"]
    assert {"status": "ok", "error": None} == told["plugins"]["users"]


# A published one

# What `harperpy init --template plugin` writes.
PROJECT = Path(__file__).resolve().parents[1] / "examples" / "plugin"


def run(folder: Path, module: str, *arguments: str | Path) -> None:
    """Run a module of ours in a folder; when it fails, what it printed is the reason."""
    done = subprocess.run(
        (sys.executable, "-m", module, *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, f"{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a plugin's own package is installed, from a wheel built without network."""
    tree, place = tmp_path_factory.mktemp("greeter"), tmp_path_factory.mktemp("site")
    shutil.copytree(PROJECT, tree, dirs_exist_ok=True)
    run(tree, "build", "--wheel", "--no-isolation", "--outdir", "dist", ".")
    [wheel] = (tree / "dist").glob("*.whl")
    run(tree, "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", place, wheel)
    return place


async def greeting(server: Serving) -> tuple[int, str]:
    """What a running server says to everyone under the plugin's path."""
    async with aiohttp.ClientSession() as client, client.get(f"{server.url}/greeting") as answer:
        return answer.status, await answer.text()


async def test_a_published_plugin_is_on_when_it_is_named(installed: Path, tmp_path: Path) -> None:
    """Built, installed, named in config.yaml: checked as fine, and it serves, with its options."""
    more = {"PYTHONPATH": str(installed)}
    (tmp_path / "config.yaml").write_text(f"{FREE}{ECHO}\nplugins: {{greeter: {{word: moin}}}}")

    checked = await harperpy(tmp_path, "check", **more)
    assert (0, "config.yaml and all plugins are fine.\n") == (checked.code, checked.out)
    async with serving(tmp_path, environ=more) as server:
        assert (200, '{"moin":"world"}') == await greeting(server)


PUBLISHED: dict[str, tuple[str, str]] = {
    "misspelt": ("greter: true", "plugin greter does not start: config.yaml: plugins.greter"),
    "its option misspelt": (
        "greeter: {wrod: x}",
        "plugins.greeter.wrod: unknown key; did you mean 'word'?",
    ),
    "without what it requires": (
        "{operations_api: false, greeter: true}",
        "plugin greeter does not start: it requires 'operations_api', which config.yaml turns off",
    ),
}


@pytest.mark.parametrize(("block", "words"), PUBLISHED.values(), ids=PUBLISHED)
async def test_a_published_plugin_that_is_named_wrongly(
    installed: Path, tmp_path: Path, block: str, words: str
) -> None:
    """`harperpy check` says what to mend."""
    block = block if block.startswith("{") else f"{{{block}}}"
    (tmp_path / "config.yaml").write_text(f"{FREE}{ECHO}\nplugins: {block}")

    checked = await harperpy(tmp_path, "check", PYTHONPATH=str(installed))

    assert 1 == checked.code
    assert words in checked.err


NEEDY = """
def handle_application(scope):
    scope.secrets.get("VAULT_KEY")
"""


async def test_check_reads_secrets_where_a_server_would(tmp_path: Path) -> None:
    """From the environment: a plugin that needs one is fine if it is set."""
    block = write(tmp_path, needy=NEEDY)
    (tmp_path / "config.yaml").write_text(f"{FREE}{ECHO}\n{block}")

    with_it = await harperpy(tmp_path, "check", VAULT_KEY="hunter2")
    without = await harperpy(tmp_path, "check")

    assert (0, 1) == (with_it.code, without.code)
    assert "the environment variable VAULT_KEY is not set" in without.err


async def test_nothing_installed_is_on_unless_it_is_named(installed: Path, tmp_path: Path) -> None:
    """An entry point alone starts nothing."""
    (tmp_path / "config.yaml").write_text(f"{FREE}{ECHO}")
    async with serving(tmp_path, environ={"PYTHONPATH": str(installed)}) as server:
        status, _ = await greeting(server)

    assert 404 == status
