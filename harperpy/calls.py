"""One call to a model: its candidates, its attempts, and a recorded row for each."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import msgspec
from msgspec.structs import replace

from .accounting import Admission, Attempt, Caller, Ledger, Method, ModelCall, clipped
from .auth import extract_tenant_id
from .backend import Streams, aclose
from .batches import Batched, Divert, batches_of
from .errors import (
    WHATEVER,
    Aborted,
    BackendError,
    BackendTimeout,
    CapabilityError,
    HarperError,
    TransactionError,
)
from .messages import (
    EmbedOpts,
    GenerateChunk,
    GenerateOpts,
    Prompt,
    most_tokens,
)
from .recorder import Recorder, Source, asked_tokens
from .routing import Candidate, Planned, blank_row
from .signal import AbortSignal, Guard
from .vocabulary import EmbedInputs

logger = logging.getLogger("harperpy.models")

T = TypeVar("T")
Opts: TypeAlias = GenerateOpts | EmbedOpts
_Batch: TypeAlias = Sequence[GenerateChunk]
_Pieces: TypeAlias = Sequence[GenerateChunk | str]

_FALLS_BACK = frozenset({401, 403, 404, 408, 409, 429})
# Longer waits are the caller's to make: it learns of them by Retry-After.
_LONGEST_WAIT = 2.0
_NO_OPTS = GenerateOpts()
CALL_ID = "x-harper-call-id"
"""The header that names the row of the attempt that answered."""


class Call(msgspec.Struct, eq=False):
    """One call by one caller, over as many attempts as its plan has.

    `asked` is a `Prompt` or `EmbedInputs`, as what is planned says; `signal` ends it.
    """

    ledger: Ledger
    caller: Caller
    asked: Any
    opts: Opts
    signal: AbortSignal
    plan: Sequence[Planned]
    _at: int = 0
    _attempts: int = 0
    _anew: bool = False
    _flowing: Divert[_Pieces] | None = None
    # Of each of thousands of streams: a closure would take several times as much memory.
    _recorder: Recorder | None = None
    _sink: Callable[[_Pieces], bool] | None = None
    _passing: Exception | None = None

    def refuse(self, method: Method, error: HarperError) -> None:
        """Record that there is nobody to ask."""
        row = self._row(blank_row(method, self.opts.model))
        self.ledger.begin(row)
        self.caller.call_headers[CALL_ID] = f"{row.id}"
        Recorder(self.ledger, row).close(error)

    @property
    def gives_many(self) -> bool:
        """Whether whoever answers can give `n` answers at once."""
        return all("n" in candidate.backend.features for candidate in self.plan)

    async def first(
        self,
        ask: Callable[[Call, Candidate, Any, Recorder], Awaitable[T]],
        told: Callable[[Call, T, Recorder], None] | None = None,
    ) -> T:
        """What the first attempt that succeeds brings.

        `ask` is given options of the attempt's own: the model's name there, one signal. `told`
        counts what it brings, and the attempt has ended; without it more comes.
        """
        caller, ledger, guard = self.caller, self.ledger, Guard(self.signal)
        synced = ledger.synced
        if caller.writing:
            _refuse()
        caller.asking += 1
        try:
            while True:
                recorder = asked = None
                try:
                    candidate = self.plan[self._at]
                    row = self._row(candidate.row)
                    own = replace(
                        self.opts,
                        model=candidate.provider_model,
                        signal=self.signal,
                        call_id=row.id,
                    )
                    admission = ledger.admission
                    if admission is None or not admission.concerns(row):
                        admission = None
                        ledger.begin(row)
                    else:
                        await self._begin_admitted(admission, row, own)
                    recorder = Recorder(ledger, row, admission)
                    caller.call_headers[CALL_ID] = f"{row.id}"
                    with guard:
                        if synced is not None:
                            await synced()
                        try:
                            asked = self.asked
                            answer = await ask(self, candidate, own, recorder)
                            if told is None:
                                return answer
                            told(self, answer, recorder)
                        except WHATEVER as error:
                            self._blame(error)
                            raise
                    recorder.close(None)
                    break
                except BaseException as error:
                    await self._failed(recorder, error, asked)
                    if (pause := self._pause(error)) is None:
                        raise
                with guard:
                    await asyncio.sleep(pause)
            if synced is not None:
                await synced()
        finally:
            caller.asking -= 1
        return answer

    async def batches(self) -> AsyncIterator[_Batch]:
        """Run attempts until one brings its first chunks; then that one to its end."""
        batch, batches, recorder = await self.first(Call._opened)
        # Nothing is asked anew from here on, and a stream may last.
        self.opts = _NO_OPTS
        caller, guard, prompt = self.caller, Guard(self.signal), self.asked
        try:
            while batch is not None:
                recorder.observe(batch)
                yield batch
                # It may wait for long, and so hold it for long.
                batch = None
                if caller.writing:
                    _refuse()
                caller.asking += 1
                try:
                    with guard:
                        batch = await anext(batches)
                except StopAsyncIteration:
                    break
                except WHATEVER as error:
                    self._blame(error)
                    raise
                finally:
                    caller.asking -= 1
            if not recorder.counted:
                yield (GenerateChunk(usage=recorder.estimate(prompt)),)
        except BaseException as error:
            await self._failed(recorder, error, prompt)
            raise
        else:
            recorder.close(None)
            if (synced := self.ledger.synced) is not None:
                await synced()
        finally:
            # They lead back to here.
            self._sink = self._passing = None
            await aclose(batches)

    def divert(self, sink: Callable[[_Pieces], bool]) -> None:
        """What `batches` would bring; it brings all by itself where the source has no such way."""
        if self._flowing is not None:
            self._sink = sink
            self._flowing(self._pass_on)

    def _pass_on(self, batch: _Pieces) -> bool:
        if self._recorder is None or self._sink is None:
            return False
        if self.caller.writing:
            _refuse()
        self._recorder.observe(batch)
        try:
            return self._sink(batch)
        except Exception as error:
            # It passes through the backend, whose own it is not.
            self._passing = error
            raise

    async def _opened(
        self, candidate: Candidate, opts: GenerateOpts, recorder: Recorder
    ) -> tuple[_Batch | None, AsyncIterator[_Batch], Recorder]:
        """A stream with its first chunks, if it has any."""
        prompt = self.asked
        if opts.allowed_tools is not None:
            prompt = with_allowed_tools(prompt, candidate, opts)
        stream = cast("Streams", candidate.backend).generate_stream(prompt, opts)
        batches = batches_of(stream)
        recorder.source = Source(batches)
        # Those of an attempt that has failed lead nowhere.
        self._flowing = stream.divert if isinstance(stream, Batched) else None
        self._recorder = recorder
        return await anext(batches, None), batches, recorder

    def _blame(self, error: BaseException) -> None:
        """Raise, in the place of what a backend did not foresee, what a provider's failure is.

        Whatever status and words it has are of another call than the caller's.
        """
        if isinstance(error, HarperError) or error is self._passing:
            return
        name, kind = self.plan[self._at].registration.name, type(error).__name__
        logger.error("the backend of model %r raised %s", name, kind, exc_info=error)
        failure = BackendTimeout if isinstance(error, TimeoutError) else BackendError
        message = f"the backend of model {name!r} raised {kind}"
        raise failure(message) from error

    def _pause(self, error: BaseException) -> float | None:
        """Seconds before the next attempt, None where there is none."""
        if not isinstance(error, Exception):
            return None
        # A connection that was gone is no attempt of its own.
        self._anew = not self._anew and isinstance(error, BackendError) and error.stale
        if self._anew:
            return 0.0
        at, plan = self._at, self.plan
        self._at += 1
        if self._at == len(plan):
            return None
        if plan[at] is not plan[self._at]:
            return 0.0 if falls_back(error) else None
        pause = _pause(error, at)
        return pause if pause < _LONGEST_WAIT else None

    async def _begin_admitted(self, admission: Admission, row: ModelCall, opts: Opts) -> None:
        """Note that an attempt is made, once it is admitted."""
        await self._admit(admission, row, opts)
        try:
            self.ledger.begin(row)
        except BaseException:
            admission.settle(row)
            raise

    async def _admit(self, admission: Admission, row: ModelCall, opts: Opts) -> None:
        """Bound how many tokens an attempt may have, where it is. Raises what refuses it."""
        asked = self.asked
        if isinstance(asked, EmbedInputs):
            weights = asked.estimate, asked.most
        else:
            weights = partial(asked_tokens, asked), partial(most_tokens, asked)
        attempt = Attempt(self.caller, row, self._attempts, *weights)
        if not isinstance(opts, GenerateOpts):
            await admission.admit(attempt)
            return
        attempt.most_tokens = opts.max_tokens
        attempt.answers = opts.n or 1
        await admission.admit(attempt)
        if attempt.most_allowed is not None:
            opts.max_tokens = attempt.most_allowed

    async def _failed(
        self, recorder: Recorder | None, error: BaseException, asked: Prompt | EmbedInputs | None
    ) -> None:
        if recorder is None:
            return
        self._attempts += 1
        recorder.close(error, asked)
        # Who was cancelled tells nobody of it.
        if isinstance(error, Exception) and (synced := self.ledger.synced) is not None:
            await synced()
        if recorder.source is not None:
            await aclose(recorder.source.batches)

    def _row(self, blank: ModelCall) -> ModelCall:
        id_, caller, opts = self.ledger.next_id(), self.caller, self.opts
        user = caller.user
        row = replace(
            blank,
            id=id_,
            created=self.ledger.clock / 1000,
            app=caller.app,
            request_id=caller.request_id,
            tenant=extract_tenant_id(user),
            user=user and user.username,
            api_key=user and user.key_id,
        )
        if isinstance(opts, GenerateOpts):
            if opts.adapter is not None:
                row.adapter = clipped(opts.adapter)
            if opts.conversation_id is not None:
                row.conversation_id = clipped(opts.conversation_id)
        return row


def _refuse() -> NoReturn:
    message = (
        "this request's transaction has written and keeps all other writers waiting, so no "
        "model is asked now: ask it before the first write, or after `await tx.commit()`"
    )
    raise TransactionError(message)


def with_allowed_tools(prompt: Prompt, candidate: Candidate, opts: GenerateOpts) -> Prompt:
    """The prompt with only the tools that may be called, for who cannot be told which may."""
    if "allowed_tools" in candidate.backend.features:
        return prompt
    allowed, opts.allowed_tools = opts.allowed_tools or (), None
    return replace(prompt, tools=[tool for tool in prompt.tools if tool.name in allowed])


def falls_back(error: Exception) -> bool:
    """Whether another backend may do better: not for what is wrong with the call itself."""
    if isinstance(error, Aborted):
        return False
    if isinstance(error, CapabilityError) or not isinstance(error, HarperError):
        return True
    return error.status in _FALLS_BACK or error.status >= 500


def _pause(error: Exception, attempt: int) -> float:
    """Seconds before the same backend is asked again; endless where that is no use."""
    if not isinstance(error, HarperError) or not error.retryable:
        return float("inf")
    if error.retry_after is not None:
        return error.retry_after
    spread = random.uniform(0.5, 1)  # noqa: S311  # no secret
    return min(0.25 * 2.0**attempt * spread, _LONGEST_WAIT / 2)
