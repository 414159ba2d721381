"""Transaction: what a request reads and writes, all of it or nothing.

It costs nothing until it is used. Reads see what is committed; the first write takes the write
lock, and from then on the transaction is one job in the database's writing thread, which takes its
statements one by one: whoever else writes, the server itself included, comes before or after it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar
from weakref import ref

import sqlalchemy as sa
from sqlalchemy import exc

from .accounting import Caller
from .audit import Author
from .database import Database, plain_refusal
from .errors import ClientError, ServiceUnavailable, TransactionError
from .gate import gate_of
from .sse import encode_json

T = TypeVar("T")

Parameters: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
Rows: TypeAlias = list[dict[str, Any]]

_ENDED = "the transaction has ended"
_LIST_BYTES = 64


class _Block(NamedTuple):
    """An open `async with`. One in a task beside the others' has no savepoint to go back to."""

    task: asyncio.Task[Any] | None
    saved: bool


class Transaction:
    """A request's transaction: `rows = await tx.execute(statement)`.

    Inside a handler it is committed when the handler returns, an error `Response` or a stream as
    well, and rolled back when it raises. An `async with` block that raises undoes what was done in
    it. Before and after the handler (in a stream's generator) the outermost block commits at its
    end, and a write outside any block at once.
    """

    def __init__(self, database: Database, caller: Caller) -> None:
        self._database = database
        # It holds its transaction: each would keep the other, and a large body, in memory.
        self._of = ref(caller)
        self._starting = asyncio.Lock()
        self._session: _Session | None = None
        self._blocks: list[_Block] = []
        self._failed: str | None = None
        self.of_handler = False

    @property
    def in_block(self) -> bool:
        """Whether an `async with` block is open."""
        return bool(self._blocks)

    async def execute(self, statement: sa.Executable, parameters: Parameters = None) -> Rows:
        """Run a statement on tables of your own: the rows it returns, by column.

        Raises `ServiceUnavailable` if other writers do not end in time, `Conflict` for a key that
        is there already, and `TransactionError` for what a transaction cannot do.
        """
        if self._failed is not None:
            raise TransactionError(self._failed)
        if self._session is None and _only_reads(statement):
            seconds = statement.get_execution_options().get("most_seconds")
            return await self._database.read(
                lambda one: _run(one, statement, parameters, None),
                seconds or self._database.transaction_seconds,
            )
        if not self.of_handler and not self._blocks:
            async with self:
                return await self._write(statement, parameters)
        return await self._write(statement, parameters)

    async def commit(self) -> None:
        """Make what was written so far final, whatever comes later, and let others write."""
        if self._failed is not None:
            raise TransactionError(self._failed)
        await self._end(_Session.commit)

    async def rollback(self) -> None:
        """Undo what was written since the last commit, and let others write."""
        await self._end(_Session.rollback)

    async def settle(self, *, commit: bool) -> None:
        """The handler's end. From now on each outermost block is on its own."""
        self.of_handler = False
        try:
            await (self.commit() if commit else self.rollback())
        finally:
            self._failed = None

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        alone = all(block.task is task for block in self._blocks)
        self._blocks.append(_Block(task, saved=alone))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        block = self._leave()
        if not self._blocks and not self.of_handler:
            await self.settle(commit=error is None)
        elif error is None:
            self._release(block)
        else:
            await self._undo(block)

    def _leave(self) -> _Block:
        """Take the running task's innermost block off the list."""
        task = asyncio.current_task()
        for at in range(len(self._blocks) - 1, -1, -1):
            if self._blocks[at].task is task:
                return self._blocks.pop(at)
        return self._blocks.pop()

    @property
    def _caller(self) -> Caller:
        if (caller := self._of()) is None:
            message = "the request of this transaction is over"
            raise TransactionError(message)
        return caller

    @property
    def _depth(self) -> int:
        return sum(block.saved for block in self._blocks)

    def _release(self, block: _Block) -> None:
        depth = self._depth
        session = self._session
        if block.saved and session is not None and not session.over:
            session.ask(lambda one: session.release(one, depth))

    async def _undo(self, block: _Block) -> None:
        """Back to where the block began; of blocks that ran side by side, nothing can be kept."""
        depth, session = self._depth, self._session
        if not block.saved or len(self._blocks) > depth:
            self._failed = (
                "a block raised while another task had one open in the same transaction, so all of "
                "it was rolled back: let blocks of one request follow one another"
            )
            await self.rollback()
        elif session is not None and not session.over:
            undone = session.ask(lambda one: session.go_back(one, depth))
            await asyncio.shield(asyncio.wrap_future(undone))

    async def _write(self, statement: sa.Executable, parameters: Parameters) -> Rows:
        session = await self._begun()
        author = Author(self._caller) if self._database.audited else None
        depth = self._depth

        def work(connection: sa.Connection) -> Rows:
            session.save(connection, depth)
            return _run(connection, statement, parameters, author)

        return await asyncio.wrap_future(session.ask(work))

    async def _begun(self) -> _Session:
        """The session that holds the write lock."""
        async with self._starting:
            if self._session is None:
                if (caller := self._caller).asking:
                    message = (
                        "this request is waiting for a model, and no other writer may wait for it "
                        "too: write when the model has answered"
                    )
                    raise TransactionError(message)
                caller.writing = True
                try:
                    self._session = await _begin(self._database)
                except BaseException:
                    caller.writing = False
                    raise
            return self._session

    async def _end(self, end: Callable[[_Session], Future[None]]) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        try:
            # Whoever is cancelled here stops waiting, but what was begun is done.
            await asyncio.shield(asyncio.wrap_future(end(session)))
        finally:
            if (caller := self._of()) is not None:
                caller.writing = False


async def _begin(database: Database) -> _Session:
    """A session with the write lock. Raises `ServiceUnavailable` when its turn does not come."""
    session = _Session(database.transaction_seconds)
    waiting = database.occupy(session.serve)
    try:
        async with asyncio.timeout(database.busy_seconds):
            await asyncio.wrap_future(session.begun)
    except TimeoutError as error:
        session.abandon(waiting)
        message = f"no turn to write came within {database.busy_seconds:g} s"
        raise ServiceUnavailable(message, headers={"Retry-After": "1"}) from error
    except BaseException:
        session.abandon(waiting)
        raise
    return session


def _only_reads(statement: sa.Executable) -> bool:
    """Whether a statement needs no lock: a select that does not say `with_for_update()`."""
    locks = getattr(statement, "_for_update_arg", None) is not None
    return statement.is_select and not locks


def _run(
    connection: sa.Connection,
    statement: sa.Executable,
    parameters: Parameters,
    author: Author | None,
) -> Rows:
    """The statement's rows; the audit's, if it wrote."""
    gate = gate_of(connection)
    try:
        with gate:
            result = connection.execute(statement, parameters)
            most = statement.get_execution_options().get("most_bytes")
            rows = list(_rows(result, most)) if result.returns_rows else []
    except exc.DBAPIError as error:
        if gate.refusal is not None:
            raise TransactionError(gate.refusal) from error
        raise
    touched = bool(rows) or result.rowcount != 0
    if author is not None and gate.written and touched:
        author.record(connection, statement, gate.written, result, rows)
    return rows


def _rows(result: sa.CursorResult[Any], most: int | None) -> Iterator[dict[str, Any]]:
    """The rows by column. Raises `ClientError` if they take more than `most` bytes together."""
    size = 0
    for row in result.mappings():
        yield dict(row)
        size += 0 if most is None else sum(map(_size, row.values()))
        if most is not None and size > most:
            mib = most // 2**20
            message = f"the records are larger than {mib} MiB together: ask for fewer by limit"
            raise ClientError(message, param="limit")


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | dict):
        return 0
    data = encode_json(value)
    # Two bytes of it may be a list, which takes thirty times as much.
    return len(data) + _LIST_BYTES * (data.count(b"[") + data.count(b"{"))


class _Session:
    """The time from BEGIN IMMEDIATE to COMMIT or ROLLBACK, in the database's writing thread."""

    def __init__(self, seconds: float) -> None:
        self.begun: Future[None] = Future()
        self._seconds = seconds
        self._guard = threading.Lock()
        self._orders: queue.SimpleQueue[tuple[Callable[[sa.Connection], Any], Future[Any], bool]]
        self._orders = queue.SimpleQueue()
        self._saved: list[sa.NestedTransaction] = []
        self._over: str | None = None

    @property
    def over(self) -> bool:
        """Whether it takes no more orders."""
        return self._over is not None

    # --- for the event loop ---

    def ask(self, work: Callable[[sa.Connection], T], *, last: bool = False) -> Future[T]:
        """Have `work(connection)` done in the thread. Raises `TransactionError` if it is over."""
        future: Future[T] = Future()
        with self._guard:
            if self._over is not None:
                raise TransactionError(self._over)
            self._orders.put((work, future, last))
            self._over = _ENDED if last else None
        return future

    def commit(self) -> Future[None]:
        """The last order. Raises `TransactionError` if there is nothing left to commit."""
        return self.ask(lambda connection: connection.commit(), last=True)

    def rollback(self) -> Future[None]:
        """The last order; done already if it is over."""
        try:
            return self.ask(lambda connection: connection.rollback(), last=True)
        except TransactionError:
            done: Future[None] = Future()
            done.set_result(None)
            return done

    def abandon(self, waiting: Future[None]) -> None:
        """Nobody waits for it any more."""
        if not waiting.cancel():
            self.rollback()

    # --- in the thread ---

    def serve(self, engine: sa.Engine) -> None:
        """Begin, obey, and leave nothing open."""
        reason = _ENDED
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                self.begun.set_result(None)
                reason = self._obey(connection)
        except BaseException as error:
            if self.begun.done():
                raise
            self.begun.set_exception(plain_refusal(error) or error)
        finally:
            self._close(reason)

    def _obey(self, connection: sa.Connection) -> str:
        """Work until the last order; says why there will be no more."""
        deadline = time.monotonic() + self._seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                work, future, last = self._orders.get(timeout=left)
            except queue.Empty:
                limit = f"{self._seconds:g} s"
                return f"the transaction kept the write lock for {limit} and was rolled back"
            if last or future.set_running_or_notify_cancel():
                _fulfil(future, work, connection)
            if last:
                return _ENDED
            driver: Any = connection.connection.driver_connection
            if not driver.in_transaction:
                return "the database has rolled the transaction back"

    def _close(self, reason: str) -> None:
        with self._guard:
            self._over = reason
            while not self._orders.empty():
                _, future, _ = self._orders.get()
                if future.set_running_or_notify_cancel():
                    future.set_exception(TransactionError(reason))

    def save(self, connection: sa.Connection, depth: int) -> None:
        """Note where each open block begins."""
        while len(self._saved) < depth:
            self._saved.append(connection.begin_nested())

    def release(self, connection: sa.Connection, depth: int) -> None:
        """The blocks deeper than this have ended well."""
        while len(self._saved) > depth:
            self._saved.pop().commit()

    def go_back(self, connection: sa.Connection, depth: int) -> None:
        """Undo the blocks deeper than this."""
        while len(self._saved) > depth:
            self._saved.pop().rollback()


def _fulfil(
    future: Future[Any], work: Callable[[sa.Connection], Any], connection: sa.Connection
) -> None:
    try:
        result = work(connection)
    except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
        future.set_exception(plain_refusal(error) or error)
    else:
        future.set_result(result)
