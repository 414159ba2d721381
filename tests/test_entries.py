"""`scope.handle_entry`: the files a plugin handles, and what happens to them."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asking import put, restarted
from commands import ECHO as ECHOING
from commands import FREE, configured, get, serving
from harperpy import FileEntry, Scope, Server
from harperpy.config import parse_config
from harperpy.testing import ECHO, RunningServer, on_free_ports, running
from helpers import ask

Told = tuple[str, str]


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """What `pages.py` calls: set `apply` on it."""
    put(tmp_path / "pages.py", "from harperpy_test_hook import apply as handle_application\n")
    hook = SimpleNamespace()
    sys.modules["harperpy_test_hook"] = hook  # type: ignore[assignment]
    yield hook
    del sys.modules["harperpy_test_hook"]


def pages(options: str) -> str:
    """A config.yaml with these options for the plugin `pages`."""
    return f"{ECHO}\nplugins: {{pages: {{path: pages.py, {options}}}}}"


def lay(folder: Path, *names: str) -> None:
    """Write files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


async def soon(told: "asyncio.Queue[FileEntry]") -> Told:
    """What happens next, within half a minute, and the URL path of the file."""
    async with asyncio.timeout(30):
        entry = await told.get()
    return entry.event, entry.url_path


def cause(server: RunningServer) -> str | None:
    """Why the plugin did not start."""
    return server.server.health.plugins["pages"].error


# Which files


async def handled(folder: Path, hook: SimpleNamespace, options: str) -> dict[str, str]:
    """The files that these options choose, by their URL paths."""
    seen: dict[str, str] = {}

    def see(entry: FileEntry) -> None:
        if entry.kind == "file":
            seen[entry.url_path] = str(entry.path.relative_to(folder.resolve()))

    hook.apply = lambda scope: scope.handle_entry(see)
    async with running(pages(options), directory=folder) as server:
        assert cause(server) is None
    return seen


URL_BASES: list[tuple[str, str]] = [
    ("", "/"),
    ("urlPath: /", "/"),
    ("urlPath: static", "/static/"),
    ("urlPath: /static", "/static/"),
    ("urlPath: static/", "/static/"),
    ("urlPath: /static/", "/static/"),
    ("urlPath: a/b", "/a/b/"),
    ("urlPath: ./static", "/pages/static/"),
    ("urlPath: .", "/pages/"),
    ("urlPath: ./", "/pages/"),
]


@pytest.mark.parametrize(("option", "base"), URL_BASES)
async def test_the_url_path_begins_with_the_base(
    tmp_path: Path, hook: SimpleNamespace, option: str, base: str
) -> None:
    """Slashes at its ends are all the same; what begins with `.` hangs under the plugin's name."""
    lay(tmp_path, "web/a.html", "web/img/b.png")
    found = await handled(tmp_path, hook, f"files: web/**/*, {option}")
    assert {f"{base}a.html": "web/a.html", f"{base}img/b.png": "web/img/b.png"} == found


TREE = (
    "top.md",
    "web/a.html",
    "web/img/b.png",
    "web/img/raw/c.png",
    "web/.hidden/d.html",
    "web/.dot",
    "node_modules/e.md",
    "env/pyvenv.cfg",
    "env/f.md",
)
PATTERNS: dict[str, dict[str, str]] = {
    "top.md": {"/top.md": "top.md"},
    "web/a.html": {"/a.html": "web/a.html"},
    "'*.md'": {"/top.md": "top.md"},
    "web/*": {"/a.html": "web/a.html"},
    "web/**": {
        "/a.html": "web/a.html",
        "/img/b.png": "web/img/b.png",
        "/img/raw/c.png": "web/img/raw/c.png",
    },
    "web/**/*.png": {"/img/b.png": "web/img/b.png", "/img/raw/c.png": "web/img/raw/c.png"},
    "web/*/*.png": {"/img/b.png": "web/img/b.png"},
    "'web/img/*.[pj]?g'": {"/b.png": "web/img/b.png"},
    "web/.*": {"/.dot": "web/.dot"},
    "web/.hidden/*": {"/d.html": "web/.hidden/d.html"},
    "node_modules/*": {"/e.md": "node_modules/e.md"},
    "'**/*.md'": {"/top.md": "top.md"},
    "['*.md', 'web/img/*']": {"/top.md": "top.md", "/b.png": "web/img/b.png"},
    "{source: [web/**/*], ignore: web/img/**}": {"/a.html": "web/a.html"},
    "{source: web/**/*, ignore: ['**/raw/*', '**/*.html']}": {"/img/b.png": "web/img/b.png"},
    "nothing/*": {},
}
ALL = {
    "/top.md": "top.md",
    "/pages.py": "pages.py",
    "/web/a.html": "web/a.html",
    "/web/img/b.png": "web/img/b.png",
    "/web/img/raw/c.png": "web/img/raw/c.png",
}


@pytest.mark.parametrize(
    ("files", "expected"), [*PATTERNS.items(), (".", ALL), ("./", ALL), ("'**/*'", ALL)]
)
async def test_patterns_choose_files(
    tmp_path: Path, hook: SimpleNamespace, files: str, expected: dict[str, str]
) -> None:
    """What a pattern names before its first sign is not part of the URL path.

    Hidden files, virtual environments and packages are left out unless they are named.
    """
    lay(tmp_path, *TREE)
    assert expected == await handled(tmp_path, hook, f"files: {files}")


WRONG: dict[str, tuple[str, str]] = {
    "missing": (
        "a: 1",
        "config.yaml: plugins.pages.files: missing; handle_entry without files expects the pattern",
    ),
    "above": ("files: ../*", "plugins.pages.files: expected a pattern inside of the project, "),
    "absolute": ("files: /etc/*", "plugins.pages.files: expected a pattern inside of the project,"),
    "number": ("files: 7", "plugins.pages.files: expected a pattern, a list of patterns, or "),
    "empty": ("files: ''", "plugins.pages.files: expected a pattern, a list of patterns, or "),
    "in a list": ("files: [a, 7]", "plugins.pages.files: expected a pattern, a list of patterns"),
    "no source": ("files: {ignore: a}", "plugins.pages.files: expected a pattern, a list of "),
    "ignore": ("files: {source: a, ignore: ../*}", "plugins.pages.files.ignore: expected a "),
    "unknown key": ("files: {source: a, ignored: b}", "plugins.pages.files.ignored: unknown key;"),
    "braces": ("files: '*.{a,b}'", "plugins.pages.files: '*.{a,b}': braces mean nothing here;"),
    "base": ("files: a, urlPath: a/../b", "plugins.pages.urlPath: expected a URL path without "),
    "base's type": ("files: a, urlPath: 7", "plugins.pages.urlPath: expected a URL path without "),
}


@pytest.mark.parametrize(("options", "told"), WRONG.values(), ids=WRONG)
async def test_options_that_choose_no_files(
    tmp_path: Path, hook: SimpleNamespace, options: str, told: str
) -> None:
    """The plugin does not start, and its status names the option and what was expected."""
    hook.apply = lambda scope: scope.handle_entry(print)
    async with running(pages(options), directory=tmp_path) as server:
        assert (cause(server) or "").startswith(told)


MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"listener": "see"}, "expected a function of one entry, got str"),
    "two parameters": (
        {"listener": lambda a, b: None},  # noqa: ARG005
        "expected a function of one entry, got one that needs 2 arguments",
    ),
    "an event": (
        {"listener": print, "on": ["added"]},
        "no event 'added'; did you mean 'add'?",
    ),
}


@pytest.mark.parametrize(("given", "told"), MISUSE.values(), ids=MISUSE)
async def test_what_cannot_handle_is_refused(
    tmp_path: Path, hook: SimpleNamespace, given: dict[str, Any], told: str
) -> None:
    """By the plugin's name, with what was expected and what came."""
    hook.apply = lambda scope: scope.handle_entry(files="*", **given)
    async with running(pages(""), directory=tmp_path) as server:
        assert f"plugins.pages: handle_entry: {told}" == cause(server)


# What there is


async def test_no_link_leads_out_of_the_project(tmp_path: Path, hook: SimpleNamespace) -> None:
    """Neither to a file nor to a folder; one that stays inside is followed, a pipe is no file.

    Nor is what leads to itself: before Python 3.13 it has no end.
    """
    project = tmp_path / "project"
    lay(tmp_path, "secret.txt", "outside/a.txt", "project/web/b.txt")
    put(project / "pages.py", "from harperpy_test_hook import apply as handle_application\n")
    (project / "web" / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (project / "out").symlink_to(tmp_path / "outside")
    (project / "web" / "same.txt").symlink_to("b.txt")
    (project / "web" / "itself.txt").symlink_to("itself.txt")
    os.mkfifo(project / "web" / "pipe")
    seen = await handled(project, hook, "files: ['web/*', 'out/*']")
    assert {"/b.txt": "web/b.txt", "/same.txt": "web/same.txt"} == seen


async def test_a_plugin_starts_with_its_files(tmp_path: Path, hook: SimpleNamespace) -> None:
    """Each is awaited before anything is served: absolute path, state, and bytes read late."""
    lay(tmp_path, "web/a.txt", "web/deep/b.txt")
    seen: list[FileEntry] = []

    async def see(entry: FileEntry) -> None:
        await asyncio.sleep(0)
        seen.append(entry)

    hook.apply = lambda scope: scope.handle_entry(see, "web/**/*", url_path="w")
    async with running(pages(""), directory=tmp_path):
        (file, folder, deep) = seen

    assert ("add", "file", "/w/a.txt") == (file.event, file.kind, file.url_path)
    assert ("add_dir", "directory", "/w/deep") == (folder.event, folder.kind, folder.url_path)
    assert ("add", tmp_path / "web/deep/b.txt") == (deep.event, deep.path)
    assert b"web/a.txt" == file.contents
    assert file.stat is not None
    assert 9 == file.stat.st_size
    (tmp_path / "web/a.txt").write_text("new")
    assert b"new" == file.contents


async def test_a_plugin_whose_listener_fails_has_not_started(
    tmp_path: Path, hook: SimpleNamespace
) -> None:
    """Its status names the file and the cause."""
    lay(tmp_path, "web/a.txt", "web/b.txt")

    def see(entry: FileEntry) -> None:
        if entry.url_path == "/b.txt":
            message = "no such page"
            raise ValueError(message)

    hook.apply = lambda scope: scope.handle_entry(see, "web/*")
    async with running(pages(""), directory=tmp_path) as server:
        assert "web/b.txt: ValueError: no such page" == cause(server)


async def test_files_are_chosen_while_the_plugin_starts(tmp_path: Path) -> None:
    """Later it is too late, and said so."""
    scopes: list[Scope] = []
    async with running(directory=tmp_path, handle_application=scopes.append):
        with pytest.raises(Exception, match="handle_entry: expected to be called while the plugin"):
            scopes[0].handle_entry(print, "*")


async def test_the_data_folder_is_not_the_projects(tmp_path: Path, hook: SimpleNamespace) -> None:
    """Wherever it is."""
    lay(tmp_path, "a.txt")
    seen: list[str] = []
    hook.apply = lambda scope: scope.handle_entry(lambda one: seen.append(one.url_path), ".")
    async with running(pages(""), directory=tmp_path, root=tmp_path / "data"):
        assert ["/a.txt", "/pages.py"] == seen


# What happens to them


async def test_dev_tells_what_happens(tmp_path: Path, hook: SimpleNamespace) -> None:
    """A file that is new, changed or gone, a folder that comes and goes, each once."""
    lay(tmp_path, "web/a.txt")
    told: asyncio.Queue[FileEntry] = asyncio.Queue()
    hook.apply = lambda scope: scope.handle_entry(told.put_nowait, "web/**/*")
    async with running(pages(""), directory=tmp_path) as server:
        assert ("add", "/a.txt") == await soon(told)
        put(tmp_path / "web/a.txt", "longer than it was")
        assert ("change", "/a.txt") == await soon(told)
        lay(tmp_path, "web/new/b.txt")
        assert ("add_dir", "/new") == await soon(told)
        assert ("add", "/new/b.txt") == await soon(told)
        (tmp_path / "web/new/b.txt").unlink()
        assert ("unlink", "/new/b.txt") == await soon(told)
        (tmp_path / "web/new").rmdir()
        assert ("unlink_dir", "/new") == await soon(told)
        assert "restart_required" not in await server.operate("get_status")
    assert told.empty()


async def test_other_options_choose_other_files(tmp_path: Path, hook: SimpleNamespace) -> None:
    """`files` and `urlPath` need no listener: what is no longer chosen goes, what is comes.

    Options that cannot be leave the files as they were, and the plugin's status says so.
    """
    lay(tmp_path, "web/a.txt", "www/b.txt")
    told: asyncio.Queue[FileEntry] = asyncio.Queue()
    hook.apply = lambda scope: scope.handle_entry(told.put_nowait)

    def take(options: str) -> list[str]:
        config = parse_config(pages(options), source="config.yaml", environ={})
        return server.server.take_over(on_free_ports(config))

    async with running(pages("files: web/*"), directory=tmp_path) as server:
        assert ("add", "/a.txt") == await soon(told)
        assert ["plugins.pages.files"] == take("files: www/*")
        assert [("unlink", "/a.txt"), ("add", "/b.txt")] == [await soon(told) for _ in range(2)]
        assert ["plugins.pages.urlPath"] == take("files: www/*, urlPath: w")
        assert [("unlink", "/b.txt"), ("add", "/w/b.txt")] == [await soon(told) for _ in range(2)]

        assert ["plugins.pages.files"] == take("files: ../*, urlPath: w")
        health = (await ask(server, "GET", "/health")).json["plugins"]["pages"]
        assert "handle_entry: plugins.pages.files: expected a pattern inside" in health["error"]
        lay(tmp_path, "www/c.txt")
        assert ("add", "/w/c.txt") == await soon(told)
        take("files: www/*, urlPath: w")
        health = (await ask(server, "GET", "/health")).json["plugins"]["pages"]
        assert {"status": "ok", "error": None} == health
        assert [] == take("files: www/*, urlPath: w, other: 1")


async def test_a_listener_that_fails_later_takes_nobody_down(
    tmp_path: Path, hook: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the plugin's status name the file until it is handled."""
    lay(tmp_path, "a.txt")
    told: asyncio.Queue[FileEntry] = asyncio.Queue()

    def see(entry: FileEntry) -> None:
        told.put_nowait(entry)
        if entry.contents == b"bad":
            message = "not this"
            raise ValueError(message)

    async def state(server: RunningServer) -> Any:
        return (await ask(server, "GET", "/health")).json["plugins"]["pages"]["error"]

    hook.apply = lambda scope: scope.handle_entry(see, "*.txt")
    async with running(pages(""), directory=tmp_path) as server:
        assert ("add", "/a.txt") == await soon(told)
        with caplog.at_level(logging.ERROR):
            put(tmp_path / "a.txt", "bad")
            assert ("change", "/a.txt") == await soon(told)
            assert "a.txt: ValueError: not this" == await state(server)
        put(tmp_path / "a.txt", "good")
        assert ("change", "/a.txt") == await soon(told)
        assert await state(server) is None
    assert ["the listener failed on a.txt"] == [one.getMessage() for one in caplog.records]


async def test_in_production_files_are_as_they_were(tmp_path: Path, hook: SimpleNamespace) -> None:
    """Nothing watches them: the scope has no task of its own."""
    lay(tmp_path, "a.txt")
    scopes: list[Scope] = []
    seen: list[FileEntry] = []

    def apply(scope: Scope) -> None:
        scopes.append(scope)
        scope.handle_entry(seen.append, "*.txt")

    hook.apply = apply
    config = on_free_ports(parse_config(pages(""), source="config.yaml", environ={}))
    environ = {"HDB_ADMIN_USERNAME": "root", "HDB_ADMIN_PASSWORD": "s3cret-enough"}
    server = Server(config, directory=tmp_path, root=tmp_path / "data", environ=environ)
    await server.start()
    try:
        assert ["add"] == [entry.event for entry in seen]
        assert [] == scopes[0].pending
    finally:
        await server.stop()


# The real `harperpy dev`

PAGES = """
from harperpy import Resource

class Pages(Resource):
    public = True
    texts = {}

    @classmethod
    def get(cls):
        return cls.texts

def handle_application(scope):
    scope.resources.set("Pages", Pages)
    scope.handle_entry(see, "web/*.txt")
    scope.handle_entry(see, "fixed/*.txt", on=["add"])

def see(entry):
    if entry.event == "unlink":
        del Pages.texts[entry.url_path]
    else:
        Pages.texts[entry.url_path] = entry.contents.decode()
"""


async def test_dev_restarts_only_for_what_nobody_takes(tmp_path: Path) -> None:
    """A changed page is seen by the running server; of one that is only added a new one is made."""
    project = configured(tmp_path / "project")
    (project / "pages.py").write_text(PAGES)
    put(project / "config.yaml", f"{FREE}{ECHOING}plugins: {{pages: {{path: pages.py}}}}\n")
    lay(project, "web/a.txt", "fixed/b.txt")

    async def until(texts: dict[str, str]) -> None:
        async with asyncio.timeout(20):
            while (200, texts) != await get(f"{server.url}/Pages"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async with serving(project) as server:
        await until({"/a.txt": "web/a.txt", "/b.txt": "fixed/b.txt"})
        put(project / "web/a.txt", "changed")
        await until({"/a.txt": "changed", "/b.txt": "fixed/b.txt"})
        (project / "web/a.txt").unlink()
        await until({"/b.txt": "fixed/b.txt"})
        assert "a restart is required" not in (project / "log").read_text()

        put(project / "fixed/b.txt", "changed")
        assert (await restarted(server)).startswith("restarted: a plugin asked for it (")
        await until({"/b.txt": "changed"})
    assert "a restart is required: fixed/b.txt: change" in (project / "log").read_text()
