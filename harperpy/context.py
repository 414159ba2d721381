"""Context: all that a verb may know besides its target."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, quote

import msgspec
from multidict import CIMultiDict

from .accounting import Caller, current_caller
from .backend import is_awaitable, settled
from .background import Background
from .errors import HarperError
from .negotiation import ContentTypes
from .patterns import has_parameters
from .preconditions import check_version
from .request import Request
from .signal import AbortController, AbortSignal
from .transactions import Transaction

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from .models import Models

_URL = "/:?#[]@!$&'()*+,;=%~"

S = TypeVar("S")
T = TypeVar("T")


class Context(Caller, eq=False):
    """One request's context: who asks, from where, and what the answer's head will carry.

    `signal` fires when the client leaves before the answer is complete, never when it is; its
    `reason` is `client_disconnected`, `timeout` if the verb took too long, `access_revoked` if a
    WebSocket's user may not go on, or `server_shutdown` if the server could not wait.
    """

    request: Request
    """What arrived."""
    models: Models
    """All models: `await models.generate("...")`."""
    stopping: AbortSignal = msgspec.field(default_factory=AbortSignal)
    """Fires as the server begins to stop: streams without end are to end then."""
    types: ContentTypes = msgspec.field(default_factory=ContentTypes)
    """The media types that are known here."""
    _begin: Callable[[Caller], Transaction] | None = None
    _background: Background | None = None
    status: int | None = None
    """The status of a plain answer or a stream, until the head is sent; 200 or 204 if None."""
    accept: str | None = None
    """What the client takes: its `Accept`, or the type that the path's extension says."""
    etag: str | None = None
    """The version of what is read: a GET whose `If-None-Match` names it is answered 304."""
    last_modified: float | None = None
    """When what is read was changed last, in seconds since 1970."""
    started: float = msgspec.field(default_factory=time.perf_counter)
    """When the request began, by `time.perf_counter()`."""
    rejection: HarperError | None = None
    """The refused credential, where the class says `settles_credentials`."""
    # Most answers say no more than their type.
    own_headers: CIMultiDict[str] | None = None
    _signal: AbortSignal | None = None
    _handled: bool = False
    _transaction: Transaction | None = None

    # What it holds is no log's business.
    __repr__ = object.__repr__

    @property
    def request_id(self) -> str:
        """As in `x-request-id`, the rows and the log."""
        return self.request.id

    @property
    def signal(self) -> AbortSignal:
        """Fires when nobody waits for the answer any more."""
        if self._signal is None:
            self._signal = AbortSignal()
        return self._signal

    @property
    def response_headers(self) -> CIMultiDict[str]:
        """Headers of the answer, until the head is sent."""
        if self.own_headers is None:
            self.own_headers = CIMultiDict()
        return self.own_headers

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, looked up in any case."""
        return self.request.headers

    @property
    def method(self) -> str:
        """The request's method."""
        return self.request.method

    @property
    def path(self) -> str:
        """The request's path as the client sent it."""
        return self.request.path

    @property
    def url(self) -> str:
        """The request's path and query as the client sent them."""
        query = self.request.query
        return f"{self.request.path}?{query}" if query else self.request.path

    @property
    def handler_path(self) -> str:
        """The path the answering resource is mounted at, without a leading slash."""
        return self.app or ""

    @property
    def last_event_id(self) -> str | None:
        """Where a returning reader of events wants to go on: `Last-Event-ID`, or `?lastEventId=`.

        The query is for readers that cannot set a header, as browsers' on their first visit.
        """
        if told := self.request.headers.get("last-event-id"):
            return told
        if "lastEventId=" not in self.request.query:
            return None
        return parse_qs(self.request.query).get("lastEventId", [None])[0]

    def created(self, location: object) -> None:
        """Answer 201 with a `Location`: a path or URL, or the new thing's id below this mount."""
        text = str(location)
        if not text.startswith("/") and "://" not in text:
            text = "/".join(("", *filter(None, [self._mount]), quote(text)))
        self.status = 201
        self.response_headers["Location"] = quote(text, safe=_URL)

    @property
    def _mount(self) -> str:
        """The mount's path, with what the request has in the place of its parameters."""
        path = self.handler_path
        if not has_parameters(path):
            return path
        asked = self.path.strip("/").split("/")
        wild = path.rpartition("/")[2].startswith("*")
        return "/".join(asked if wild else asked[: path.count("/") + 1])

    def check_accept(self) -> None:
        """Raise the 406 now that a plain value would meet after all the work for it was done.

        For verbs that may answer otherwise too; of a verb whose annotated return type holds plain
        values only the server asks by itself.
        """
        self.types.negotiate(self.accept)

    def check_version(self, etag: str | None) -> None:
        """Raise `PreconditionFailed` if the request is for another version of what it changes.

        `etag` is the version that is there, None if nothing is. Ask where no other writer can come
        between: under the transaction's lock.
        """
        check_version(self.headers, etag)

    def detach(self, work: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Let `work` go on whatever becomes of this request, on behalf of the same user.

        It has a context of its own, whose signal the client's leaving does not fire and whose
        transaction is its own. A failure is logged. A server that stops waits for it for a moment,
        and then cancels it. What it needs of the request's body is to be read before.
        """
        if self._background is None:
            work.close()
            message = "this context has no server to go on in"
            raise LookupError(message)
        own = Context(
            self.request,
            self.models,
            self.stopping,
            self.types,
            self._begin,
            self._background,
            source=self.source,
            user=self.user,
            app=self.app,
            accept=self.accept,
        )
        return self._background.start(work, own, own.abort, name)

    def transaction(self) -> Transaction:
        """The request's transaction, to use as it is or in an `async with` block."""
        if self._transaction is None:
            if self._begin is None:
                message = "this context has no database"
                raise LookupError(message)
            self._transaction = self._begin(self)
            self._transaction.of_handler = self._handled
        return self._transaction

    @property
    def in_block(self) -> bool:
        """Whether an `async with context.transaction()` block is open."""
        return self._transaction is not None and self._transaction.in_block

    def begin(self, work: Callable[[S, T, Context], Any], target: S, given: T) -> Any:
        """Begin the handler's work: what it returns, or a coroutine that settles what it began."""
        self._handled = True
        if self._transaction is not None:
            self._transaction.of_handler = True
        try:
            value = work(target, given, self)
        except BaseException as error:  # noqa: BLE001  # raised when all that it wrote is undone
            return self.settle(_raised(error))
        if is_awaitable(value):
            return self.settle(value)
        if self._transaction is not None:
            return self.settle(settled(value))
        self._handled = False
        return value

    async def settle(self, work: Awaitable[S]) -> S:
        """The handler's work; commit what it wrote when it returns, undo it when it raises.

        Cancellation is a raise.
        """
        self._handled = True
        if self._transaction is not None:
            self._transaction.of_handler = True
        try:
            value = await work
        except BaseException:
            self._handled = False
            if self._transaction is not None:
                await self._transaction.settle(commit=False)
            raise
        self._handled = False
        if self._transaction is not None:
            await self._transaction.settle(commit=True)
        return value

    def abort(self, reason: str) -> None:
        """Fire the signal: the server calls this when the client has left."""
        AbortController(self.signal).abort(reason)


async def _raised(error: BaseException) -> Any:
    try:
        raise error
    finally:
        # Its traceback holds this frame, and so itself.
        del error


def get_context() -> Context:
    """The running request's context, in handlers, generators and the tasks they start.

    Raises `LookupError` outside a request.
    """
    context = current_caller.get()
    if not isinstance(context, Context):
        message = "get_context() was called outside a request"
        raise LookupError(message)  # noqa: TRY004  # there is no request to look up
    return context
