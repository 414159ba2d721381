"""A plugin's life: what its scope holds, what is left of one that never ran, and how it ends."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harperpy import Context, Resource, Scope, get_context
from harperpy.testing import ECHO, running
from helpers import HELLO, ask, operation, until

SECONDS = 20

# --- what a scope holds

MEMBERS: dict[str, tuple[Callable[[Scope], Any], Any]] = {
    "the plugin's name": (lambda it: it.plugin_name, "test"),
    "the application's folder": (lambda it: it.directory.is_dir(), True),
    "the data folder": (lambda it: (it.root / "system.db").is_file(), True),
    "a logger of its own": (lambda it: it.logger is logging.getLogger("harperpy.plugins.test"), 1),
    "its options": (lambda it: it.options.get("a.b", "none"), "none"),
    "the whole configuration": (lambda it: it.config.http.max_body_size, 10_000_000),
    "all mounts": (lambda it: "v1/models" in {entry.path for entry in it.resources}, True),
    "the operations port's mounts": (
        lambda it: [one.path for one in it.operations_resources],
        [""],
    ),
    "the models": (lambda it: [one.id for one in it.models.list()], ["default", "echo"]),
    "the operations": (lambda it: "add_user" in {one.name for one in it.operations}, True),
    "the database": (lambda it: it.database.path == it.root / "system.db", True),
    "the state of all plugins": (lambda it: it.status()["plugins"]["test"]["status"], "ok"),
    "a secret": (lambda it: it.secrets.get("VAULT").reveal(), "hunter2"),
    "no tasks": (lambda it: it.pending, []),
}


@pytest.mark.parametrize(("member", "expected"), MEMBERS.values(), ids=MEMBERS)
async def test_a_scope_holds(member: Callable[[Scope], Any], expected: Any) -> None:
    """All that a plugin may know and use is a member of the one object that it is handed."""
    scopes: list[Scope] = []
    async with running(handle_application=scopes.append, environ={"VAULT": "hunter2"}):
        assert expected == member(scopes[0])


async def test_a_plugin_may_run_operations_as_whoever_asks() -> None:
    """`scope.operations.call` asks the same of the caller as the operations port does."""
    scopes: list[Scope] = []

    class Lists(Resource):
        public = True

        @staticmethod
        async def get() -> Any:
            return await scopes[0].operations.call({"operation": "list_users"}, get_context())

    def apply(scope: Scope) -> None:
        scopes.append(scope)
        scope.resources.set("users", Lists)

    async with running(handle_application=apply) as server:
        plain = await server.key_for("ada")
        found = [await ask(server, "GET", "/users", key=key) for key in (None, plain, "")]
        direct = await operation(server, {"operation": "list_users"}, f"Bearer {plain}")

    assert [200, 403, 401] == [answer.status for answer in found]
    assert {"HDB_ADMIN", "ada"} == {user["username"] for user in found[0].json}
    assert 403 == direct[0]


# --- one that never ran

BROKEN = """
from harperpy import Resource

class Notes(Resource):
    public = True

    @staticmethod
    def get():
        return "never"

raise RuntimeError("the vault is shut")

def handle_application(scope):
    scope.resources.set("notes", Notes)
"""


@pytest.mark.parametrize("file", ["notes.py", "resources.py"])
async def test_what_a_plugin_never_mounted_is_404(tmp_path: Path, file: str) -> None:
    """Nobody knows where it would have answered; that it did not start is told by its state."""
    (tmp_path / file).write_text(BROKEN)
    block = "plugins: {notes: {path: notes.py}}" if file == "notes.py" else ""
    name = "notes" if block else "app_resources"

    async with running(f"{ECHO}\n{block}", directory=tmp_path) as server:
        answers = [await ask(server, "GET", path, key="") for path in ("/notes", "/Notes")]
        told = (await ask(server, "GET", "/health")).json
        asked = {**HELLO, "model": "default"}
        other = await ask(server, "POST", "/v1/chat/completions", json=asked)

    assert [404, 404] == [answer.status for answer in answers]
    assert all("vault" not in answer.text for answer in answers)
    assert "degraded" == told["status"]
    cause = f"RuntimeError: the vault is shut ({file}, line 11)"
    failed = {"status": "error", "error": cause}
    assert failed == told["plugins"][name]
    assert 200 == other.status


# --- the end


@pytest.mark.parametrize("ends", ["returns", "raises"])
async def test_a_request_that_runs_is_answered_before_its_plugin_is_closed(ends: str) -> None:
    """Stopping waits for it: its answer is whole, and what its plugin holds is still open."""
    entered = asyncio.Event()
    done: list[str] = []

    class Slow(Resource):
        @staticmethod
        async def get(target: Any, context: Context) -> str:
            del target
            entered.set()
            await context.stopping.wait()
            # Nothing new is taken by now.
            await until(lambda: not server.server._listeners[0].listens)
            done.append("verb")
            if ends == "raises":
                raise ZeroDivisionError
            return "all of it"

    def apply(scope: Scope) -> None:
        scope.resources.set("slow", Slow)
        scope.on_close(lambda: done.append("closed"))

    async with asyncio.timeout(SECONDS):
        async with running(handle_application=apply) as server:
            call = asyncio.create_task(ask(server, "GET", "/slow"))
            await entered.wait()
        answer = await call

    assert ["verb", "closed"] == done
    expected = (200, '"all of it"') if ends == "returns" else (500, answer.text)
    assert expected == (answer.status, answer.text)
    assert answer.text


async def test_who_asks_while_the_server_stops_is_told_to_come_back() -> None:
    """On a connection that is kept: 503, `Retry-After`, and `/health` says `stopping`."""
    entered, asked = asyncio.Event(), asyncio.Event()

    class Slow(Resource):
        @staticmethod
        async def get() -> str:
            entered.set()
            await asked.wait()
            return "done"

    async with asyncio.timeout(SECONDS), running(resources={"slow": Slow}) as server:
        call = asyncio.create_task(ask(server, "GET", "/slow"))
        await entered.wait()
        server.server.health.stop()
        health = await ask(server, "GET", "/health")
        other = await ask(server, "GET", "/v1/models")
        asked.set()
        assert 200 == (await call).status

    assert (503, {"status": "stopping"}) == (health.status, health.json)
    assert (503, "1") == (other.status, other.headers["Retry-After"])


async def its_own_cancel() -> None:
    """What a closer does that cancels its task and waits for it."""
    task = asyncio.ensure_future(asyncio.Event().wait())
    task.cancel()
    await task


async def exits() -> None:
    """What a closer does that thinks the process is its own."""
    raise SystemExit(3)


@pytest.mark.parametrize("closer", [its_own_cancel, exits])
async def test_a_closer_takes_no_other_along(closer: Callable[[], Any], tmp_path: Path) -> None:
    """Whatever it raises: what stands after it is closed, and the next server has the folder."""
    done: list[str] = []

    def apply(scope: Scope) -> None:
        scope.on_close(lambda: done.append("closed"))
        scope.on_close(closer)

    for _ in range(2):
        async with asyncio.timeout(SECONDS), running(handle_application=apply, root=tmp_path):
            pass

    assert ["closed", "closed"] == done


@pytest.mark.parametrize("whose", ["plugin", "request"])
async def test_who_is_deaf_to_its_cancel_keeps_nothing_open(
    whose: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named, waited for a while, and then left: what stands after it is closed."""
    monkeypatch.setattr("harperpy.scope._CLOSE_SECONDS", 0.05)
    monkeypatch.setattr("harperpy.server._DETACHED_SECONDS", 0.05)
    released = asyncio.Event()
    done: list[str] = []

    async def deaf() -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    class Begins(Resource):
        @staticmethod
        async def post(target: Any, data: Any, context: Context) -> None:
            del target, data
            context.detach(deaf(), name="deaf")

    def apply(scope: Scope) -> None:
        scope.resources.set("it", Begins)
        scope.on_close(lambda: done.append("closed"))
        if whose == "plugin":
            scope.create_task(deaf(), name="deaf")

    async with asyncio.timeout(SECONDS):
        async with running(handle_application=apply) as server:
            if whose == "request":
                assert 204 == (await ask(server, "POST", "/it")).status
        released.set()

    assert ["closed"] == done
    assert "tasks do not end when they are cancelled: deaf" in caplog.text
