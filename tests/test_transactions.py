"""Transactions: all that a request writes or nothing, and who is kept waiting for it."""

import asyncio
import inspect
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite import insert as upsert

from harperpy import (
    ClientError,
    Conflict,
    Context,
    EventStream,
    HarperError,
    Middleware,
    Next,
    Reply,
    RequestTarget,
    Resource,
    Response,
    Scope,
    TransactionError,
    User,
    define_backend,
    get_context,
    json_response,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import Answered, ask, operation, uncollected, until

metadata = sa.MetaData()
notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String, nullable=False),
    sa.Column("stars", sa.Integer, nullable=False, default=0),
    sa.Column("api_key", sa.String),
)
names = sa.Table("names", metadata, sa.Column("name", sa.String, primary_key=True))
ADD = sa.insert(notes)
ALL = sa.select(notes.c.text).order_by(notes.c.id)

Work = Callable[..., Awaitable[Any]]


async def write(text: str = "kept") -> None:
    """A helper that knows nothing of who calls it."""
    await get_context().transaction().execute(ADD.values(text=text))


def refuse() -> NoReturn:
    """What a handler may do at any point."""
    raise ClientError


def handler(work: Work) -> type[Resource]:
    """A user's class that overrides `post` and says nothing of transactions."""

    class Does(Resource):
        @staticmethod
        async def post(target: RequestTarget, data: Any, context: Context) -> Any:
            del target, data
            return await (work(context) if inspect.signature(work).parameters else work())

    return Does


@asynccontextmanager
async def serving(
    *works: Work,
    config: str = "",
    root: Path | None = None,
    also: Callable[[Scope], None] = lambda _: None,
) -> AsyncIterator[RunningServer]:
    """A server that does each of these at `/0`, `/1`, …, with the tables made."""

    async def apply(scope: Scope) -> None:
        await scope.database.run(metadata.create_all)
        also(scope)

    resources = {str(at): handler(work) for at, work in enumerate(works)}
    async with (
        asyncio.timeout(60),
        running(
            f"{ECHO}\n{config}", root=root, resources=resources, handle_application=apply
        ) as server,
    ):
        yield server


async def post(server: RunningServer, path: str = "/0", **options: Any) -> Answered:
    """A handler's answer."""
    return await ask(server, "POST", path, **options)


async def texts(server: RunningServer) -> list[str]:
    """What the notes hold, as anybody else sees it."""
    database = server.server.core.database
    # Whatever is on its way to the file is there, or undone, before it is read.
    await asyncio.wrap_future(database.submit(lambda _: None))
    return await database.read(lambda connection: list(connection.scalars(ALL)))


async def audited(server: RunningServer) -> list[dict[str, Any]]:
    """The audit's rows, oldest first, as a super user reads them."""
    rows: list[dict[str, Any]] = await server.operate(
        "sql", sql="SELECT * FROM system.hdb_audit WHERE database = 'data' ORDER BY id"
    )
    return rows


@contextmanager
def statements(server: RunningServer) -> Iterator[list[str]]:
    """What reaches the database file from now on, BEGIN and COMMIT included."""
    heard: list[str] = []
    database = server.server.core.database
    engines = (database._engine, database._writer, database._reader)

    def hear(*given: Any) -> None:
        heard.append(given[2])

    def end(_: sa.Connection) -> None:
        heard.append("COMMIT")

    for engine in engines:
        event.listen(engine, "before_cursor_execute", hear)
        event.listen(engine, "commit", end)
    yield heard
    for engine in engines:
        event.remove(engine, "before_cursor_execute", hear)
        event.remove(engine, "commit", end)


# --- when it is committed ---


async def returns() -> Any:
    """A value."""
    await write()
    return {"n": 1}


async def returns_nothing() -> None:
    """Nothing."""
    await write()


async def returns_an_error() -> Response:
    """A refusal that is not raised."""
    await write()
    return json_response(422, {"detail": "no"})


async def returns_a_stream() -> AsyncIterator[int]:
    """A stream, not begun."""
    await write()

    async def numbers() -> AsyncIterator[int]:
        yield 1

    return numbers()


async def raises() -> NoReturn:
    """What nobody foresaw."""
    await write()
    raise RuntimeError


async def refuses() -> NoReturn:
    """A refusal."""
    await write()
    message = "no"
    raise ClientError(message, status=418)


async def raises_in_a_block(context: Context) -> None:
    """Out of an explicit block."""
    async with context.transaction() as tx:
        await tx.execute(ADD.values(text="kept"))
        raise HarperError(status=502)


async def raises_after_a_block(context: Context) -> NoReturn:
    """When an explicit block has ended well."""
    async with context.transaction():
        await write()
    raise HarperError(status=503)


async def is_cancelled() -> None:
    """By a time limit of its own."""
    await write()
    async with asyncio.timeout(0):
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("work", "status", "kept"),
    [
        (returns, 200, ["kept"]),
        (returns_nothing, 204, ["kept"]),
        (returns_an_error, 422, ["kept"]),
        (returns_a_stream, 200, ["kept"]),
        (raises, 500, []),
        (refuses, 418, []),
        (raises_in_a_block, 502, []),
        (raises_after_a_block, 503, []),
        (is_cancelled, 500, []),
    ],
)
async def test_a_handler_that_returns_commits_and_one_that_raises_undoes(
    work: Work, status: int, kept: list[str]
) -> None:
    """What is returned decides, an error `Response` too; a raise takes the writes and the audit."""
    async with serving(work) as server:
        assert status == (await post(server)).status
        assert kept == await texts(server)
        assert len(kept) == len(await audited(server))


async def test_a_client_who_leaves_undoes_what_was_written() -> None:
    """A cancelled handler is one that raised, and the next writer need not wait."""
    wrote, ended = asyncio.Event(), asyncio.Event()

    async def hangs() -> None:
        await write("lost")
        wrote.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serving(hangs, returns) as server:
        asking = asyncio.create_task(post(server))
        await wrote.wait()
        asking.cancel()
        await ended.wait()

        assert 200 == (await post(server, "/1")).status
        assert ["kept"] == await texts(server)


async def test_a_denied_user_leaves_nothing_behind() -> None:
    """What `allow_create` wrote before it said no is undone."""

    class Guarded(handler(returns)):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        @staticmethod
        async def allow_create(user: User | None, target: RequestTarget, context: Context) -> bool:
            del user, target, context
            await write("asked")
            return False

    async with serving(also=lambda scope: scope.resources.set("guarded", Guarded)) as server:
        assert 403 == (await post(server, "/guarded")).status
        assert [] == await texts(server)


async def test_an_operation_is_in_a_transaction_too() -> None:
    """On the operations port and its socket, a raise undoes what was written."""

    async def fails() -> None:
        await write("lost")
        message = "no"
        raise ClientError(message)

    async def works() -> str:
        await write()
        return "done"

    class Nothing(msgspec.Struct):
        pass

    def also(scope: Scope) -> None:
        scope.operations.add("fails", fails, Nothing)
        scope.operations.add("works", works, Nothing)

    async with serving(also=also) as server:
        with pytest.raises(ClientError):
            await server.operate("fails")
        key = f"Bearer {server.api_key}"
        assert 400 == (await operation(server, {"operation": "fails"}, key))[0]
        assert 200 == (await operation(server, {"operation": "works"}, key))[0]
        await server.operate("works")
        assert ["kept", "kept"] == await texts(server)
        assert ["ops", "ops"] == [row["source"] for row in await audited(server)]


# --- around the handler ---


async def writes_before(context: Context, call_next: Next) -> Reply:
    """At once."""
    await write("before")
    return await call_next(context)


async def writes_after(context: Context, call_next: Next) -> Reply:
    """When the handler has ended."""
    reply = await call_next(context)
    await write("after")
    return reply


async def writes_in_blocks(context: Context, call_next: Next) -> Reply:
    """In a block on each side, one of which raises."""
    with suppress(ClientError):
        async with context.transaction():
            await write("lost")
            refuse()
    reply = await call_next(context)
    async with context.transaction():
        await write("after")
    return reply


async def writes_and_refuses(context: Context, call_next: Next) -> Reply:
    """And the handler is not even called."""
    del context, call_next
    await write("before")
    refuse()


AROUND: dict[str, tuple[Middleware, int, list[str], int, list[str]]] = {
    "before": (writes_before, 200, ["before", "kept"], 500, ["before"]),
    "after": (writes_after, 200, ["kept", "after"], 500, ["after"]),
    "in blocks": (writes_in_blocks, 200, ["kept", "after"], 500, ["after"]),
    "and refuses": (writes_and_refuses, 400, ["before"], 400, ["before"]),
}


@pytest.mark.parametrize(
    ("function", "status", "kept", "failed", "left"), AROUND.values(), ids=AROUND
)
async def test_what_a_middleware_writes_is_its_own(
    function: Middleware, status: int, kept: list[str], failed: int, left: list[str]
) -> None:
    """It is kept at once or at its block's end, whatever becomes of the handler's writes."""

    def also(scope: Scope) -> None:
        scope.server.http(function)

    async with serving(returns, also=also) as server:
        assert (status, kept) == ((await post(server)).status, await texts(server))
    async with serving(raises, also=also) as server:
        assert (failed, left) == ((await post(server)).status, await texts(server))


@pytest.mark.parametrize("first", [True, False], ids=["after a write", "nothing written"])
async def test_no_block_may_be_open_around_the_handler(
    caplog: pytest.LogCaptureFixture, *, first: bool
) -> None:
    """The handler's writes could be neither kept nor undone with it: 500, and nothing is kept."""

    async def around(context: Context, call_next: Next) -> Reply:
        async with context.transaction():
            if first:
                await write("before")
            return await call_next(context)

    def also(scope: Scope) -> None:
        scope.server.http(around, name="around")

    async with serving(returns, also=also) as server:
        assert 500 == (await post(server)).status
        assert [] == await texts(server)

    assert "middleware 'around' called call_next in a transaction's block" in caplog.text


# --- lazy, joined, one commit ---


async def test_what_is_not_used_costs_no_statement() -> None:
    """A transaction that is opened and left reaches the database with nothing."""

    async def idle(context: Context) -> str:
        async with context.transaction(), get_context().transaction():
            pass
        return "done"

    async with serving(idle) as server, server.session() as session:
        # The key is looked up for the first request.
        async with session.post("/0"):
            await texts(server)
        with statements(server) as heard:
            async with session.post("/0") as answer:
                assert "done" == await answer.json()
        assert [] == heard


async def conflicts() -> None:
    """A key that is taken."""
    tx = get_context().transaction()
    await tx.execute(ADD.values(id=1, text="a"))
    await tx.execute(ADD.values(id=1, text="b"))


async def reads() -> Any:
    """What is there."""
    return await get_context().transaction().execute(ALL)


async def writes_in_a_stream(context: Context) -> Any:
    """A block in the generator of a stream."""

    async def rows() -> AsyncIterator[int]:
        async with context.transaction():
            await write()
        yield 1

    return rows()


async def test_a_request_that_has_ended_keeps_nothing_in_memory() -> None:
    """Its body is let go of at once, however it used the transaction: nobody has to collect it."""
    works = (returns, reads, conflicts, raises_in_a_block, writes_in_a_stream)
    async with serving(*works) as server:
        for at in range(len(works)):
            await post(server, f"/{at}")
        for at, work in enumerate(works):
            with uncollected() as found:
                await post(server, f"/{at}", json={"text": "a body"})
            assert not {"Context", "Body", "Transaction"} & found, work


async def test_who_only_reads_takes_no_lock() -> None:
    """Reads go on while another process writes, and say what is committed."""

    async def reads(context: Context) -> Any:
        async with context.transaction() as tx:
            return await tx.execute(ALL)

    async with serving(returns, reads) as server:
        await post(server)
        with locked(server):
            assert [{"text": "kept"}] == (await post(server, "/1")).json


async def test_blocks_and_helpers_join_and_commit_once() -> None:
    """Three blocks within one another and a helper are one transaction, with one commit."""

    async def nests(context: Context) -> Any:
        await write("a")
        async with context.transaction() as outer:
            await outer.execute(ADD.values(text="b"))
            async with context.transaction() as inner:
                assert inner is outer
                await write("c")
            return [row["text"] for row in await outer.execute(ALL)]

    async with serving(nests) as server, server.session() as session:
        await post(server)
        with statements(server) as heard:
            async with session.post("/0") as answer:
                assert [*"abcabc"] == await answer.json()
        assert ["BEGIN IMMEDIATE"] == [one for one in heard if one.startswith("BEGIN")]
        assert [*"abcabc"] == await texts(server)
        assert heard[-1] == "COMMIT"
        assert 1 == heard[heard.index("BEGIN IMMEDIATE") :].count("COMMIT")


async def test_a_block_that_raises_undoes_itself_alone() -> None:
    """Whoever catches what a block raised keeps what came before it and goes on."""

    async def catches(context: Context) -> None:
        await write("before")
        try:
            async with context.transaction():
                await write("in a block")
                try:
                    async with context.transaction():
                        await write("deeper")
                        refuse()
                except ClientError:
                    await write("after the deeper")
                refuse()
        except ClientError:
            await write("after")

    async with serving(catches) as server:
        assert 204 == (await post(server)).status
        assert ["before", "after"] == await texts(server)
        assert 2 == len(await audited(server))


async def test_a_taken_key_is_a_conflict_and_undoes_one_statement() -> None:
    """A key that is there already is 409, which a handler may catch."""

    async def doubles(context: Context) -> str:
        tx = context.transaction()
        await tx.execute(sa.insert(names).values(name="ada"))
        with pytest.raises(Conflict):
            await tx.execute(sa.insert(names).values(name="ada"))
        await tx.execute(sa.insert(names).values(name="bob"))
        return "done"

    async with serving(doubles) as server:
        assert [200, 409] == [(await post(server)).status for _ in range(2)]


async def test_blocks_side_by_side_are_kept_or_undone_together() -> None:
    """Where two tasks have blocks open in one transaction, one that raises takes all of it."""
    both = asyncio.Barrier(2)

    async def one(text: str) -> None:
        async with get_context().transaction():
            await write(text)
            await both.wait()
            if text == "bad":
                refuse()

    async def beside(context: Context) -> str:
        await asyncio.gather(one("good"), one(context.headers["x-other"]), return_exceptions=True)
        return "done"

    async with serving(beside) as server:
        assert 500 == (await post(server, headers={"x-other": "bad"})).status
        assert [] == await texts(server)
        assert 200 == (await post(server, headers={"x-other": "fine"})).status
        assert ["fine", "good"] == sorted(await texts(server))


async def test_commit_by_hand_is_final_and_rollback_starts_anew() -> None:
    """What was committed stays when the handler raises; what was rolled back is gone."""

    async def by_hand(context: Context) -> NoReturn:
        async with context.transaction() as tx:
            await write("kept")
            await tx.commit()
            await write("undone by hand")
            await tx.rollback()
            await write("undone by the raise")
            refuse()

    async with serving(by_hand) as server:
        assert 400 == (await post(server)).status
        assert ["kept"] == await texts(server)


# --- many at once ---


async def test_writers_at_once_lose_no_update() -> None:
    """What is read under the lock and written back is right, however many do it at once."""

    async def star(context: Context) -> None:
        tx = context.transaction()
        (row,) = await tx.execute(sa.select(notes.c.stars).with_for_update())
        await asyncio.sleep(0)
        await tx.execute(sa.update(notes).values(stars=row["stars"] + 1))

    async with serving(star, returns) as server:
        await post(server, "/1")
        answers = await asyncio.gather(*(post(server) for _ in range(20)))
        assert {204} == {answer.status for answer in answers}
        (row,) = await server.server.core.database.read(
            lambda connection: connection.execute(sa.select(notes.c.stars)).all()
        )
        assert row.stars == 20


async def test_who_waits_too_long_for_a_writer_is_told_to_come_back() -> None:
    """While one writes, another's write is 503; reads and log-ins of others go on."""
    wrote, finish = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        await write("slow")
        wrote.set()
        await finish.wait()
        return "done"

    async def reads(context: Context) -> Any:
        return await context.transaction().execute(ALL)

    async with serving(slow, returns, reads, config="database: {busyTimeout: 50}") as server:
        key = await server.key_for("bob", role="super_user")
        first = asyncio.create_task(post(server))
        await wrote.wait()
        busy = await post(server, "/1")
        assert [] == (await post(server, "/2", key=key)).json
        finish.set()

        assert 200 == (await first).status
        assert (503, "1") == (busy.status, busy.headers["retry-after"])
        assert ["slow"] == await texts(server)


async def test_who_keeps_the_lock_too_long_loses_it(caplog: pytest.LogCaptureFixture) -> None:
    """After `database.transactionTimeout` the others go on, and the slow one gets an error."""

    async def slow(context: Context) -> str:
        await write("slow")
        session = context.transaction()._session
        assert session is not None
        await until(lambda: session.over)
        return "done"

    config = "database: {transactionTimeout: 50}"
    async with serving(slow, returns, config=config) as server:
        assert 500 == (await post(server)).status
        assert "kept the write lock for 0.05 s" in caplog.text
        assert 200 == (await post(server, "/1")).status
        assert ["kept"] == await texts(server)


async def test_other_work_of_a_writing_request_does_not_wait_for_itself() -> None:
    """`database.run` in a request that has written is refused at once: it would wait for it."""

    async def waits() -> str:
        await write()
        with pytest.raises(TransactionError, match="other work"):
            await server.server.core.database.run(lambda _: None)
        return "done"

    async with serving(waits) as server:
        assert 200 == (await post(server)).status
        assert ["kept"] == await texts(server)


@contextmanager
def locked(server: RunningServer) -> Iterator[sqlite3.Connection]:
    """Another process writes to the file, until it is told to commit or the block ends."""
    path = server.server.core.database.path
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


async def test_a_busy_database_is_503_in_the_resource_s_own_shape() -> None:
    """While another process writes for long, a write is 503 with `Retry-After`, as worded there."""

    class Shaped(handler(returns)):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        @staticmethod
        def present_error(error: HarperError, context: Context) -> Response:
            return json_response(error.status, {"mine": error.public_message}, error.headers)

    config = "database: {busyTimeout: 50}"
    async with serving(
        config=config, also=lambda scope: scope.resources.set("mine", Shaped)
    ) as server:
        with locked(server):
            busy = await post(server, "/mine")
        assert (503, "1") == (busy.status, busy.headers["retry-after"])
        assert ["mine"] == list(busy.json)
        assert [] == await texts(server)
        assert 200 == (await post(server, "/mine")).status


async def test_others_are_answered_while_a_write_waits() -> None:
    """The event loop never waits for the file; when it is free, the write goes through."""
    async with serving(returns, config="database: {busyTimeout: 30s}") as server:
        with locked(server) as other:
            writing = asyncio.create_task(post(server))
            await until(lambda: server.server.core.database._thread._work_queue.qsize() == 0)
            for _ in range(3):
                assert 200 == (await ask(server, "GET", "/health")).status
            assert not writing.done()
            other.execute("COMMIT")
        assert 200 == (await writing).status
        assert ["kept"] == await texts(server)


# --- models ---


async def generates(context: Context) -> Any:
    """A whole answer."""
    return (await context.models.generate("hi")).content


async def embeds(context: Context) -> Any:
    """A vector."""
    return await context.models.embed("hi")


async def streams(context: Context) -> Any:
    """An answer piece by piece."""
    return [chunk.delta_content async for chunk in context.models.generate_stream("hi")]


@pytest.mark.parametrize("call", [generates, embeds, streams])
async def test_no_model_is_asked_while_the_write_lock_is_held(
    call: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """A call after a write is an error that says what to do; nobody is asked, nothing is kept."""

    async def asks(context: Context) -> Any:
        await write("lost")
        return await call(context)

    async with serving(asks) as server:
        assert 500 == (await post(server)).status
        assert "await tx.commit()" in caplog.text
        assert [] == await texts(server)
        assert [] == await server.rows()


@pytest.mark.parametrize("call", [generates, embeds, streams])
async def test_a_model_may_be_asked_before_the_write_and_after_a_commit(call: Work) -> None:
    """The two ways that the error names work, reads and open blocks notwithstanding."""

    async def asks(context: Context) -> Any:
        async with context.transaction() as tx:
            await tx.execute(ALL)
            await call(context)
            await write("first")
            await tx.commit()
            told = await call(context)
            await write("second")
            return told

    async with serving(asks) as server:
        assert 200 == (await post(server)).status
        assert ["first", "second"] == await texts(server)
        assert 2 == len(await server.rows())


async def test_a_stream_is_not_stepped_while_the_write_lock_is_held() -> None:
    """A write between two chunks of a model's stream ends the stream at its next step."""

    async def writes_each_chunk(context: Context) -> None:
        async for chunk in context.models.generate_stream("one two three"):
            await write(chunk.delta_content or "")

    async with serving(writes_each_chunk) as server:
        assert 500 == (await post(server)).status
        assert [] == await texts(server)
        (row,) = await server.rows()
        assert (0, "aborted") == (int(row["success"]), row["error_code"])


async def test_no_write_begins_while_a_model_is_asked() -> None:
    """Nor may a task beside the call take the lock, which would be held until the model answers."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(*_: Any) -> AsyncIterator[str]:
        asked.set()
        await answer.wait()
        yield "hello"

    def also(scope: Scope) -> None:
        backend = define_backend("slow", generate_stream=slow)
        scope.models.register_backend("generative", "slow", backend)

    async def beside(context: Context) -> str:
        asking = asyncio.create_task(context.models.generate("hi", model="slow"))
        await asked.wait()
        with pytest.raises(TransactionError):
            await write("lost")
        answer.set()
        await asking
        await write("kept")
        return "done"

    async with serving(beside, also=also) as server:
        assert 200 == (await post(server)).status
        assert ["kept"] == await texts(server)


# --- streams ---


async def test_a_stream_begins_when_its_handler_has_committed() -> None:
    """Before the first element the writes are final; what the stream then asks is free to wait."""

    async def saves_and_streams(context: Context) -> EventStream:
        await write("question")

        async def events() -> AsyncIterator[Any]:
            yield {"seen": await texts(server)}
            tokens = [one.delta_content or "" async for one in context.models.generate_stream("hi")]
            async with context.transaction():
                await write("".join(tokens))
                await write("a second")
            try:
                async with context.transaction():
                    await write("lost")
                    refuse()
            except ClientError:
                await write("at once")
            refuse()

        return EventStream(events())

    async with serving(saves_and_streams) as server:
        answer = await post(server)
        assert '{"seen":["question"]}' in answer.text
        question, told, *more = await texts(server)
        assert question == "question"
        assert "hi" in told
        assert ["a second", "at once"] == more
        assert 1 == len(await server.rows())


# --- what is not for a plugin ---


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (sa.text("SELECT * FROM hdb_user"), "hdb_user"),
        (sa.select(sa.table("hdb_user", sa.column("password"))), "hdb_user"),
        (sa.delete(sa.table("HDB_token")), "hdb_token"),
        (sa.text("INSERT INTO notes (text) SELECT password FROM hdb_user"), "hdb_user"),
        (sa.text("UPDATE hdb_role SET permission = '{}'"), "hdb_role"),
        (sa.text("DROP TABLE hdb_audit"), "hdb_audit"),
        (sa.text("CREATE TABLE hdb_mine (id)"), "hdb_mine"),
        (sa.text("COMMIT"), "COMMIT"),
        (sa.text("SAVEPOINT a"), "SAVEPOINT"),
        (sa.text("PRAGMA foreign_keys = OFF"), "PRAGMA"),
        (sa.text("ATTACH ':memory:' AS other"), "ATTACH"),
    ],
)
async def test_the_server_s_own_tables_are_out_of_reach(
    statement: sa.Executable, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement that names what is the server's own is refused; the log says what it named."""

    async def reaches(context: Context) -> Any:
        await write("lost")
        return await context.transaction().execute(statement)

    async def only_reaches(context: Context) -> Any:
        return await context.transaction().execute(statement)

    async with serving(reaches, only_reaches) as server:
        assert [500, 500] == [(await post(server, path)).status for path in ("/0", "/1")]
        assert 2 == sum("TransactionError" in one and named in one for one in caplog.messages)
        assert [] == await texts(server)
        assert 1 == len(await server.operate("list_users"))


# --- the audit ---


def change(operation: str, hash_values: Any, records: Any, table: str = "notes") -> dict[str, Any]:
    """What a row of the audit says of the change itself."""
    return {
        "operation": operation,
        "table": table,
        "hash_values": hash_values,
        "records": records,
    }


NOTE = {"text": "[3 characters]", "stars": 0}
SECRET = {"api_key": "hk_0123456789abcdef", "text": "hk_0123456789abcdef"}
CHANGES: list[tuple[str, sa.Executable, Any, dict[str, Any]]] = [
    ("one", ADD.values(text="two"), None, change("insert", [2], [NOTE])),
    (
        "returning",
        ADD.values(text="two").returning(notes.c.id),
        None,
        change("insert", [2], [NOTE]),
    ),
    (
        "several values",
        ADD.values([{"id": 5, "text": "abc"}, {"id": 6, "text": "abcd"}]),
        None,
        change(
            "insert",
            [5, 6],
            [
                {"id": 5, "text": "[3 characters]", "stars": 0},
                {"id": 6, "text": "[4 characters]", "stars": 0},
            ],
        ),
    ),
    (
        "several parameters",
        ADD,
        [{"id": 5, "text": "abc"}, {"id": 6, "text": "abc"}],
        change("insert", [5, 6], [{"id": 5, **NOTE}, {"id": 6, **NOTE}]),
    ),
    (
        "a secret",
        ADD.values(**SECRET),
        None,
        change(
            "insert",
            [2],
            [
                {"api_key": "[redacted]", "text": "[19 characters]", "stars": 0},
            ],
        ),
    ),
    (
        "a key in a key",
        sa.insert(names).values(name=SECRET["text"]),
        None,
        change("insert", ["[redacted]"], [{"name": "[redacted]"}], "names"),
    ),
    (
        "upsert",
        upsert(notes).values(id=1, text="new").on_conflict_do_update(["id"], set_={"text": "new"}),
        None,
        change("upsert", [1], [{"id": 1, **NOTE}]),
    ),
    (
        "update by key",
        sa.update(notes).where(notes.c.id == 1, notes.c.stars < 3).values(stars=2),
        None,
        change("update", [1], [{"stars": 2}]),
    ),
    (
        "update of all",
        sa.update(notes).values(stars=notes.c.stars + 1, text="new").returning(notes.c.id),
        None,
        change("update", [1], [{"text": "[3 characters]"}]),
    ),
    (
        "delete",
        sa.delete(notes).where(notes.c.id.in_([1, 2])),
        None,
        change("delete", [1, 2], None),
    ),
    ("text", sa.text("DELETE FROM notes WHERE id = :id"), {"id": 1}, change("delete", None, None)),
    (
        "table",
        sa.schema.CreateTable(sa.Table("made", sa.MetaData(), sa.Column("id", sa.Integer))),
        None,
        change("create_table", None, None, "made"),
    ),
]


@pytest.mark.parametrize(
    ("statement", "parameters", "expected"),
    [row[1:] for row in CHANGES],
    ids=[row[0] for row in CHANGES],
)
async def test_each_write_is_audited(
    statement: sa.Executable, parameters: Any, expected: dict[str, Any]
) -> None:
    """Who, by which key and request, when, which records; numbers as they are, text never."""

    async def changes(context: Context) -> None:
        await context.transaction().execute(statement, parameters)

    async with serving(changes, returns) as server:
        await post(server, "/1")
        key = await server.key_for("bob", role="super_user")
        answer = await post(server, key=key)
        assert 204 == answer.status, answer.text
        used = (await server.operate("list_api_keys"))[-1]
        first, row = await audited(server)

    assert first["timestamp"] < row.pop("timestamp")
    # Between them are the rows of the user and its key.
    assert first["id"] + 3 == row.pop("id")
    assert {
        "original_records": None,
        "database": "data",
        "user_name": "bob",
        "key_id": used.id,
        "source": "rest",
        "request_id": answer.headers["x-request-id"],
        **expected,
    } == row


async def test_each_run_of_a_statement_is_audited_with_its_own_keys() -> None:
    """A statement like an earlier one tells which records it changed, as the first did."""
    by_name = sa.update(notes).where(notes.c.id == sa.bindparam("which")).values(stars=7)

    async def changes(context: Context) -> None:
        tx = context.transaction()
        await tx.execute(ADD, [{"id": at, "text": "abc"} for at in (1, 2, 3)])
        for at in (1, 2, 3):
            await tx.execute(sa.update(notes).where(notes.c.id == at).values(stars=at))
            await tx.execute(by_name, {"which": at})
            await tx.execute(sa.delete(notes).where(notes.c.id.in_([at, at + 10])))

    async with serving(changes) as server:
        assert 204 == (await post(server)).status
        _, *rows = await audited(server)
    expected = [
        one
        for at in (1, 2, 3)
        for one in (("update", [at]), ("update", [at]), ("delete", [at, at + 10]))
    ]
    assert expected == [(row["operation"], row["hash_values"]) for row in rows]


async def test_what_changes_nothing_is_not_audited() -> None:
    """A read, and an update that met no record, leave no row."""

    async def touches_nothing(context: Context) -> None:
        tx = context.transaction()
        await tx.execute(sa.update(notes).where(notes.c.id == 7).values(stars=1))
        await tx.execute(ALL)

    async with serving(touches_nothing) as server:
        assert 204 == (await post(server)).status
        assert [] == await audited(server)


async def test_the_audit_can_be_off() -> None:
    """With `logging.auditLog: false` a write leaves no row."""
    async with serving(returns, config="logging: {auditLog: false}") as server:
        assert 200 == (await post(server)).status
        assert [] == await audited(server)


async def test_audit_rows_older_than_the_retention_go(tmp_path: Path) -> None:
    """Rows older than `logging.auditRetention` are removed when a server starts; others stay.

    Those on users, roles and tokens stay for 30 days at least.
    """
    async with serving(returns, root=tmp_path) as server:
        for _ in range(2):
            await post(server)
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        ours = "SELECT max(id), min(id) FROM hdb_audit WHERE database = 'data'"
        kept, old = database.execute(ours).fetchone()
        before = "UPDATE hdb_audit SET timestamp = timestamp - ? * 86400000 WHERE id = ?"
        database.executemany(before, [(2, old), (29, 1), (31, 2)])
    async with serving(root=tmp_path, config="logging: {auditRetention: 1d}") as server:
        while [kept] != [row["id"] for row in await audited(server)]:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0)
        ids = await server.operate("sql", sql="SELECT id FROM system.hdb_audit WHERE id < 4")
        assert [1, 3] == [row["id"] for row in ids]


async def test_a_database_of_before_the_audit_gets_its_table(tmp_path: Path) -> None:
    """A file of the first version of the schema is brought up to date."""
    async with serving(returns, root=tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute("DROP TABLE hdb_audit")
        database.execute("PRAGMA user_version = 1")
    async with serving(returns, root=tmp_path) as server:
        await post(server)
        assert 1 == len(await audited(server))


# --- the page ---


async def test_the_page_s_example_works(tmp_path: Path) -> None:
    """What docs/transactions.md shows as a whole `resources.py` is one."""
    page = Path(__file__).parents[1] / "docs" / "transactions.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "resources.py").write_text(code)

    async with running(directory=tmp_path) as server:
        for at in (1, 2):
            assert {"id": at} == (await post(server, "/notes", json={"text": "a long one"})).json
        assert 204 == (await ask(server, "DELETE", "/notes/1")).status
        assert 404 == (await ask(server, "DELETE", "/notes/1")).status
        (note,) = (await ask(server, "GET", "/notes")).json
        assert {"id": 2, "text": "a long one", "summary": note["summary"]} == note
        assert "a long one" in note["summary"]
        assert ["insert", "insert", "delete"] == [row["operation"] for row in await audited(server)]
