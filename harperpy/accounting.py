"""Who is billed for what: Caller, ModelCall, Ledger."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from .auth import User, extract_tenant_id
from .errors import WHATEVER, HarperError, RegistrationError
from .signal import AbortSignal, void

logger = logging.getLogger("harperpy.accounting")

Method: TypeAlias = Literal["embed", "generate", "generateStream"]

_LONGEST_TEXT = 256


class Caller(msgspec.Struct, eq=False, kw_only=True, weakref=True):
    """On whose behalf models are called.

    `asking` counts the model calls that are waited for, `writing` says that the caller holds the
    database's write lock: never both, so that no other writer ever waits for a model.
    """

    user: User | None = None
    """Who was recognised; None for anonymous callers."""
    app: str | None = None
    """The path of the resource that calls, without a leading slash."""
    source: str = "rest"
    """The way by which it came: `rest`, `ops`, or `system` for the server itself."""
    call_headers: dict[str, str] = {}
    """What an answer's head says of the model calls made for it."""
    writing: bool = False
    asking: int = 0

    @property
    def request_id(self) -> str | None:
        """As in `x-request-id`, the rows and the log; None where nobody has asked."""
        return None

    @property
    def signal(self) -> AbortSignal | None:
        """Fires when nobody waits for the answer any more; None where somebody always does."""
        return None

    @property
    def tenant(self) -> str | None:
        """The tenant the user's calls are billed to."""
        return extract_tenant_id(self.user)


current_caller: ContextVar[Caller | None] = ContextVar("harperpy_caller", default=None)
"""The one context variable: the caller whose request (or task) is running."""


class ModelCall(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """One attempt at one backend, as it lands in `system.hdb_model_calls`.

    `backend` is the kind that served (`openai`), `backend_name` its configured name, `model` the
    name asked for, `provider_model` what was sent. Times are in ms; `created` is ms since 1970.
    `api_key` is the id of the key that was shown. `cost` is by the price table's `price_version`,
    None where it has no price. `reserved_tokens` and `reserved_cost` are what was set aside for a
    call of which nobody knows how it ended.
    """

    id: int
    created: float
    method: Method
    model: str
    backend: str = "unknown"
    backend_name: str | None = None
    provider_model: str | None = None
    tenant: str | None = None
    user: str | None = None
    app: str | None = None
    request_id: str | None = None
    adapter: str | None = None
    conversation_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    embedding_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    usage_estimated: bool = False
    gpu_ms: float | None = None
    latency_ms: float = 0.0
    ttft_ms: float | None = None
    success: bool = False
    error_code: str | None = None
    finish_reason: str | None = None
    upstream_status: int | None = None
    api_key: str | None = None
    cost: float | None = None
    price_version: str | None = None
    reserved_tokens: int | None = None
    reserved_cost: float | None = None


def clipped(value: object) -> str | None:
    """Text as a row holds it, whoever sent it."""
    # A text that is also something else may call itself by another name.
    text = value if isinstance(value, str) else str(value or "")
    return text[:_LONGEST_TEXT] or None


CallRow: TypeAlias = tuple[Any, ...]
"""The values of a `ModelCall`, in the order of its fields."""


row_of: Callable[[ModelCall], CallRow] = msgspec.structs.astuple
"""A call as it stands now."""


Subscriber: TypeAlias = Callable[[ModelCall], None]


class Attempt(msgspec.Struct):
    """One attempt that is about to be made: `number` 0 is a call's first.

    `prompt_tokens` estimates what is asked, `prompt_most` bounds it; `most_tokens` is the limit
    that the caller set to each of `answers`. What an admission puts into `most_allowed` is one as
    well.
    """

    caller: Caller
    call: ModelCall
    number: int
    prompt_tokens: Callable[[], int]
    prompt_most: Callable[[], int]
    most_tokens: int | None = None
    answers: int = 1
    most_allowed: int | None = None


class Admission(Protocol):
    """Who decides whether an attempt may be made."""

    def concerns(self, call: ModelCall) -> bool:
        """Whether it has to be asked about this one."""
        ...

    async def admit(self, attempt: Attempt) -> None:
        """Set aside what the attempt may take at most. Raises what refuses it."""
        ...

    def settle(self, call: ModelCall) -> None:
        """Take what the call took, and give back the rest."""
        ...


class Keeper(Protocol):
    """Who writes down what must not be lost."""

    def begin(self, call: ModelCall) -> None:
        """Note that the call is made now. Raises `ServiceUnavailable` where it cannot."""
        ...

    def end(self, call: ModelCall) -> None:
        """Note how it ended; this may not fail."""
        ...

    @property
    def synced(self) -> Callable[[], Awaitable[None]] | None:
        """What returns when all that was noted outlives a power cut; None if nothing is to."""
        ...


class Ledger:
    """Numbers the model calls in order of time, and tells of each how it ended.

    `index` and `of`: which of how many ledgers of one database this is. A call is admitted, then
    kept by the keeper before it is made; when it has ended it is priced, kept, and told of.
    """

    admission: Admission | None = None
    keeper: Keeper | None = None
    price: Callable[[ModelCall], None] | None = None
    """Puts cost and version of the price into a finished call."""

    def __init__(self, index: int = 0, of: int = 1) -> None:
        self.begin: Callable[[ModelCall], None] = void
        """Note that an attempt is made now. Raises `ServiceUnavailable` where that cannot be."""
        self.synced: Callable[[], Awaitable[None]] | None = None
        """What returns when all that was noted outlives a power cut; None if nothing is to."""
        self._end: Callable[[ModelCall], None] = void
        self._flush: Callable[[], Awaitable[None]] | None = None
        self._subscribers: list[Subscriber] = []
        self._last_id = 0
        self.clock = 0
        """When the last number was given, in microseconds since 1970; it may be below that."""
        self._index, self._of = index, of

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every finished call; it must not block.

        What it raises is logged. Raises `RegistrationError` for what cannot be called so.
        """
        if not callable(subscriber) or inspect.iscoroutinefunction(subscriber):
            message = f"ledger.subscribe: expected a function that is not async, got {subscriber!r}"
            raise RegistrationError(message)
        self._subscribers.append(subscriber)

    def keep(self, keeper: Keeper, flush: Callable[[], Awaitable[None]]) -> None:
        """Have each call kept; `flush` brings all that is kept to where it is read, or raises."""
        self.keeper, self._flush = keeper, flush
        self.begin, self._end, self.synced = keeper.begin, keeper.end, keeper.synced

    async def flush(self) -> None:
        """Give each call that has ended its row, as far as the database takes them now."""
        try:
            await self.drain()
        except HarperError as error:
            logger.warning("model calls wait in the journal: %s", error)

    async def drain(self) -> None:
        """Give each call that has ended its row. Raises `ServiceUnavailable` where one has none."""
        if self._flush is not None:
            await self._flush()

    def record(self, call: ModelCall, admission: Admission | None = None) -> None:
        """Note how a call ended, settle it with who admitted it, and tell all subscribers."""
        try:
            if self.price is not None:
                self.price(call)
            if admission is not None:
                call.reserved_tokens = call.reserved_cost = None
            self._end(call)
        finally:
            # What it held would be held for good.
            if admission is not None:
                admission.settle(call)
            for subscriber in self._subscribers:
                # An answer that is paid for is not lost, or asked for again, over who is told.
                try:
                    subscriber(call)
                except WHATEVER:
                    logger.exception("a subscriber of the ledger failed")

    def number_above(self, number: int) -> None:
        """Give no call this number, or a lower one."""
        self._last_id = max(self._last_id, number)

    def next_id(self) -> int:
        """Microseconds since 1970, always above the last, and no other ledger's: it sorts by time.

        A number's remainder says whose it is.
        """
        self.clock = least = time.time_ns() // 1000
        if least <= self._last_id:
            least = self._last_id + 1
        self._last_id = least + (self._index - least) % self._of
        return self._last_id
