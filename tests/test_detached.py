"""Work that goes on when the request that began it has been answered, or given up."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from harperpy import Context, Resource, Scope, define_backend, get_context
from harperpy.testing import RunningServer, running
from helpers import ask, finished_calls, until

SECONDS = 20
metadata = sa.MetaData()
notes = sa.Table("notes", metadata, sa.Column("text", sa.String, primary_key=True))


def doing(work: Callable[[Context], Awaitable[Any]]) -> type[Resource]:
    """A class whose post does this."""

    async def post(target: Any, data: Any, context: Context) -> Any:
        del target, data
        return await work(context)

    return type("Doing", (Resource,), {"post": staticmethod(post)})


async def leave(server: RunningServer, entered: asyncio.Event) -> None:
    """Ask, and go away as soon as the verb has been entered."""
    call = asyncio.create_task(ask(server, "POST", "/it"))
    await entered.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_it_goes_on_when_the_answer_is_there() -> None:
    """On behalf of the same user, at the same mount, with the request's id, in its own context."""
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[dict[str, Any]]] = []

    async def later() -> dict[str, Any]:
        await go_on.wait()
        own = get_context()
        said = await own.models.generate("hello there")
        return {
            "user": own.user and own.user.username,
            "tenant": own.tenant,
            "handler_path": own.handler_path,
            "request_id": own.request_id,
            "header": own.headers["x-own"],
            "said": said.content,
        }

    async def begins(context: Context) -> str:
        tasks.append(context.detach(later(), name="later"))
        return "soon"

    async with asyncio.timeout(SECONDS), running(resources={"it": doing(begins)}) as server:
        granted = {"resources": {"it": ["create"]}}
        await server.operate("add_role", role="one_path", permission=granted)
        key = await server.key_for("ada", role="one_path", tenant="acme")
        headers = {"X-Own": "1", "X-Request-Id": "mine"}
        assert "soon" == (await ask(server, "POST", "/it", key=key, headers=headers)).json
        go_on.set()
        found = await tasks[0]
        (row,) = await server.rows()

    assert "later" == tasks[0].get_name()
    assert {
        "user": "ada",
        "tenant": "acme",
        "handler_path": "it",
        "request_id": "mine",
        "header": "1",
        "said": "hello there",
    } == found
    assert ("ada", "acme", "it", "mine", True) == (
        *(row[name] for name in ("user", "tenant", "app", "request_id")),
        row["success"],
    )


async def test_it_goes_on_when_the_client_has_left() -> None:
    """The request's signal fires and its verb is cancelled; the detached call is completed."""
    entered, left, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[str]] = []
    signals: list[Any] = []

    async def slow() -> AsyncIterator[str]:
        yield "all "
        await go_on.wait()
        yield "of it"

    async def later() -> str:
        signals.append(get_context().signal)
        entered.set()
        return (await get_context().models.generate("hi", model="slow")).content

    async def begins(context: Context) -> None:
        signals.append(context.signal)
        tasks.append(context.detach(later()))
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    def apply(scope: Scope) -> None:
        scope.resources.set("it", doing(begins))
        backend = define_backend("slow", generate_stream=slow)
        scope.models.register_backend("generative", "slow", backend)

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        await leave(server, entered)
        await left.wait()
        go_on.set()
        assert "all of it" == await tasks[0]
        (row,) = await server.rows()

    assert ["client_disconnected", None] == [signal.reason for signal in signals]
    assert row["success"] is True


async def test_a_plugins_task_belongs_to_no_request() -> None:
    """Whoever's request began it: its calls are nobody's, and go on when that client has left."""
    entered, left, callers = asyncio.Event(), asyncio.Event(), list[str]()

    def apply(scope: Scope) -> None:
        async def later() -> str:
            try:
                callers.append(f"{get_context().user}")
            except LookupError:
                callers.append("nobody")
            entered.set()
            await left.wait()
            return (await scope.models.generate("hi")).content

        async def begins(_: Context) -> None:
            tasks.append(scope.create_task(later()))
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

        scope.resources.set("it", doing(begins))

    tasks: list[asyncio.Task[str]] = []
    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        await leave(server, entered)
        await left.wait()
        assert "hi" == await tasks[0]
        (row,) = await server.rows()

    assert ["nobody"] == callers
    assert (True, None, None) == (row["success"], row["user"], row["app"])


@pytest.mark.parametrize("fails", [False, True], ids=["goes well", "fails"])
async def test_its_writes_are_its_own(*, fails: bool) -> None:
    """What the handler wrote is undone when it raises; each block of the detached work is kept."""
    tasks: list[asyncio.Task[None]] = []

    async def add(text: str) -> None:
        await get_context().transaction().execute(sa.insert(notes).values(text=text))

    async def later() -> None:
        async with get_context().transaction():
            await add("later")

    async def begins(context: Context) -> str:
        tasks.append(context.detach(later()))
        await add("handler")
        if fails:
            raise ZeroDivisionError
        return "done"

    async def apply(scope: Scope) -> None:
        await scope.database.run(metadata.create_all)
        scope.resources.set("it", doing(begins))

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        assert (500 if fails else 200) == (await ask(server, "POST", "/it")).status
        await tasks[0]
        database = server.server.core.database
        kept = await database.read(lambda one: set(one.scalars(sa.select(notes.c.text))))

    assert ({"later"} if fails else {"handler", "later"}) == kept


async def test_a_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The answer is long gone: the log names the task and holds the trace."""
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        message = "lost the queue"
        raise ConnectionError(message)

    async def begins(context: Context) -> str:
        tasks.append(context.detach(later(), name="mailer"))
        return "soon"

    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(SECONDS), running(resources={"it": doing(begins)}) as server:
            assert 200 == (await ask(server, "POST", "/it")).status
            await asyncio.wait(tasks)

    (record,) = [one for one in caplog.records if one.name == "harperpy.background"]
    assert "detached task mailer failed" == record.getMessage()
    assert record.exc_info is not None
    assert "lost the queue" == str(record.exc_info[1])


async def test_a_server_that_stops_waits_for_it() -> None:
    """What it does is done before plugins and database are closed."""
    done: list[str] = []

    async def later() -> None:
        own = get_context()
        await own.stopping.wait()
        # No request runs any more, and nothing else is left to wait for.
        await until(lambda: not server.server._listeners)
        done.append(f"work {own.signal and own.signal.reason}")

    async def begins(context: Context) -> str:
        context.detach(later())
        return "soon"

    def apply(scope: Scope) -> None:
        scope.resources.set("it", doing(begins))
        scope.on_close(lambda: done.append("closed"))

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        assert 200 == (await ask(server, "POST", "/it")).status

    assert ["work None", "closed"] == done


async def test_what_does_not_end_is_cut_off_and_accounted_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its signal says that it was the server, and a model call that it waits for has its row."""
    monkeypatch.setattr("harperpy.server._DETACHED_SECONDS", 0.05)
    entered = asyncio.Event()
    seen: list[str | None] = []

    async def endless() -> AsyncIterator[str]:
        yield "a"
        entered.set()
        await asyncio.Event().wait()

    async def later() -> None:
        signal = get_context().signal
        try:
            await get_context().models.generate("hi", model="endless")
        finally:
            seen.append(signal and signal.reason)

    async def begins(context: Context) -> str:
        context.detach(later())
        return "soon"

    def apply(scope: Scope) -> None:
        scope.resources.set("it", doing(begins))
        backend = define_backend("endless", generate_stream=endless)
        scope.models.register_backend("generative", "endless", backend)

    async with asyncio.timeout(SECONDS):
        async with running(handle_application=apply) as server:
            calls = finished_calls(server)
            assert 200 == (await ask(server, "POST", "/it")).status
            await entered.wait()
        call = calls.get_nowait()

    assert ["server_shutdown"] == seen
    assert (False, "aborted") == (call.success, call.error_code)
