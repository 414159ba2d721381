"""One call to a model: its candidates, its attempts, and a recorded row for each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import msgspec

from .accounting import Attempt, Caller, Ledger, Method, ModelCall
from .backend import Streams, aclose
from .batches import batches_of
from .errors import (
    Aborted,
    BackendError,
    CapabilityError,
    HarperError,
    TransactionError,
)
from .messages import (
    EmbedOpts,
    GenerateChunk,
    GenerateOpts,
    Prompt,
)
from .recorder import Recorder, clipped
from .routing import DEFAULT, Candidate
from .signal import AbortSignal

T = TypeVar("T")
Given = TypeVar("Given")
Opts: TypeAlias = GenerateOpts | EmbedOpts
_Batch: TypeAlias = Sequence[GenerateChunk]
Weigh: TypeAlias = tuple[Callable[[Any], int], Callable[[Any], int], Any]
"""About how many tokens are asked, and how many at most, of what."""

_FALLS_BACK = frozenset({401, 403, 404, 408, 409, 429})
# Longer waits are the caller's to make: it learns of them by Retry-After.
_LONGEST_WAIT = 2.0
CALL_ID = "x-harper-call-id"
"""The header that names the row of the attempt that answered."""


class Call:
    """One call by one caller, over as many attempts as its plan has."""

    __slots__ = (
        "_attempts",
        "_caller",
        "_ledger",
        "_method",
        "_opts",
        "_synced",
        "_weigh",
        "plan",
        "signal",
    )

    def __init__(
        self,
        ledger: Ledger,
        method: Method,
        opts: Opts,
        caller: Caller,
        weigh: Weigh = (int, int, 0),
    ) -> None:
        self._ledger = ledger
        self._weigh = weigh
        self._attempts = 0
        self._method: Method = method
        self._opts = opts
        self._caller = caller
        self.plan: Sequence[Candidate] = ()
        keeper = ledger.keeper
        self._synced = None if keeper is None else keeper.synced
        signal = caller.signal
        if signal is None or opts.signal is not None:
            signal = AbortSignal.any_of(signal, opts.signal)
        self.signal = signal

    def refuse(self, error: HarperError) -> None:
        """Record that there is nobody to ask."""
        Recorder(self._ledger, self._row()).close(error)

    def opts_for(self, candidate: Candidate, recorder: Recorder) -> Any:
        """The options as this candidate's backend sees them: its own model's name, one signal."""
        opts = msgspec.structs.replace(
            self._opts,
            model=candidate.provider_model,
            signal=self.signal,
            call_id=recorder.call.id,
        )
        if isinstance(opts, GenerateOpts):
            if opts.allowed_tools is not None and not _knows_allowed(candidate):
                opts.allowed_tools = None
            if recorder.most_tokens is not None:
                opts.max_tokens = recorder.most_tokens
        return opts

    def prompt_for(self, candidate: Candidate, prompt: Prompt) -> Prompt:
        """The prompt with the tools that may be called, where a backend cannot be told which."""
        allowed = self._opts.allowed_tools if isinstance(self._opts, GenerateOpts) else None
        if allowed is None or _knows_allowed(candidate):
            return prompt
        tools = [tool for tool in prompt.tools if tool.name in allowed]
        return msgspec.structs.replace(prompt, tools=tools)

    @property
    def gives_many(self) -> bool:
        """Whether whoever answers can give `n` answers at once."""
        return all("n" in candidate.backend.features for candidate in self.plan)

    def whole(
        self, attempt: Callable[[Candidate, Recorder], Awaitable[T]]
    ) -> Coroutine[Any, Any, T]:
        """Run attempts until one answers."""
        return self._first_success(self._recorded, attempt)

    async def batches(self, prompt: Prompt) -> AsyncIterator[Sequence[GenerateChunk]]:
        """Run attempts until one brings its first chunks; then that one to its end."""
        batch, batches, recorder = await self._first_success(self._open, prompt)
        caller, guard = self._caller, self.signal.guard()
        try:
            while batch is not None:
                recorder.observe(batch)
                yield batch
                if caller.writing:
                    _refuse()
                caller.asking += 1
                try:
                    with guard:
                        batch = await anext(batches)
                except StopAsyncIteration:
                    break
                finally:
                    caller.asking -= 1
            if recorder.call.completion_tokens is None:
                usage = recorder.estimate(prompt)
                recorder.count(usage)
                yield (GenerateChunk(usage=usage),)
        except BaseException as error:
            await self._failed(recorder, error, prompt)
            raise
        else:
            recorder.close(None)
            if self._synced is not None:
                await self._synced()
        finally:
            await aclose(batches)

    async def _recorded(
        self, candidate: Candidate, attempt: Callable[[Candidate, Recorder], Awaitable[T]]
    ) -> T:
        recorder = await self._begin(candidate)
        try:
            with self.signal.guard():
                if self._synced is not None:
                    await self._synced()
                answer = await attempt(candidate, recorder)
        except BaseException as error:
            await self._failed(recorder, error)
            raise
        recorder.close(None)
        if self._synced is not None:
            await self._synced()
        return answer

    async def _open(
        self, candidate: Candidate, prompt: Prompt
    ) -> tuple[_Batch | None, AsyncIterator[_Batch], Recorder]:
        recorder = await self._begin(candidate)
        backend = cast("Streams", candidate.backend)
        batches: AsyncIterator[_Batch] | None = None
        try:
            asked = self.prompt_for(candidate, prompt)
            batches = batches_of(backend.generate_stream(asked, self.opts_for(candidate, recorder)))
            with self.signal.guard():
                if self._synced is not None:
                    await self._synced()
                first = await anext(batches, None)
        except BaseException as error:
            await self._failed(recorder, error)
            if batches is not None:
                await aclose(batches)
            raise
        return first, batches, recorder

    async def _first_success(
        self, attempt: Callable[[Candidate, Given], Awaitable[T]], given: Given
    ) -> T:
        """What the first attempt that succeeds brings."""
        self._ask()
        at, anew = 0, False
        try:
            while True:
                try:
                    return await attempt(self.plan[at], given)
                except Exception as error:
                    # A connection that was gone is no attempt of its own.
                    anew = not anew and isinstance(error, BackendError) and error.stale
                    pause = 0.0 if anew else self._pause(error, at)
                    if pause is None:
                        raise
                if not anew:
                    at += 1
                    with self.signal.guard():
                        await asyncio.sleep(pause)
        finally:
            self._caller.asking -= 1

    def _ask(self) -> None:
        """A model is waited for from now on. Raises `TransactionError`."""
        if self._caller.writing:
            _refuse()
        self._caller.asking += 1

    def _pause(self, error: Exception, at: int) -> float | None:
        """Seconds before the attempt after that one, None where there is none."""
        if at + 1 == len(self.plan):
            return None
        if self.plan[at + 1] is not self.plan[at]:
            return 0.0 if falls_back(error) else None
        pause = _pause(error, at)
        return pause if pause < _LONGEST_WAIT else None

    async def _begin(self, candidate: Candidate) -> Recorder:
        """Have one more attempt admitted and noted. Raises what refuses it."""
        row = self._row(candidate)
        admission, most = self._ledger.admission, None
        if admission is not None and admission.concerns(row):
            attempt = self._attempt(row)
            await admission.admit(attempt)
            most = attempt.most_allowed
        self._attempts += 1
        recorder = Recorder(self._ledger, row, most)
        self._caller.call_headers[CALL_ID] = str(row.id)
        return recorder

    def _attempt(self, row: ModelCall) -> Attempt:
        about, most, given = self._weigh
        asked = partial(about, given), partial(most, given)
        attempt = Attempt(self._caller, row, self._attempts, *asked)
        if isinstance(self._opts, GenerateOpts):
            attempt.most_tokens = self._opts.max_tokens
            attempt.answers = self._opts.n or 1
        return attempt

    async def _failed(
        self, recorder: Recorder, error: BaseException, prompt: Prompt | None = None
    ) -> None:
        recorder.close(error, prompt)
        # Who was cancelled tells nobody of it.
        if isinstance(error, Exception) and self._synced is not None:
            await self._synced()

    def _row(self, candidate: Candidate | None = None) -> ModelCall:
        id_, caller, opts = self._ledger.next_id(), self._caller, self._opts
        call = ModelCall(
            id=id_,
            created=id_ / 1000,
            method=self._method,
            model=clipped(opts.model) or DEFAULT,
        )
        call.app = caller.app
        call.request_id = caller.request_id
        if (user := caller.user) is not None:
            call.tenant = caller.tenant
            call.user = user.username
            call.api_key = user.key_id
        if isinstance(opts, GenerateOpts):
            if opts.adapter is not None:
                call.adapter = clipped(opts.adapter)
            if opts.conversation_id is not None:
                call.conversation_id = clipped(opts.conversation_id)
        if candidate is not None:
            call.backend = candidate.backend.name
            call.backend_name = candidate.registration.name
            call.provider_model = clipped(candidate.provider_model)
        return call


def _refuse() -> NoReturn:
    message = (
        "this request's transaction has written and keeps all other writers waiting, so no "
        "model is asked now: ask it before the first write, or after `await tx.commit()`"
    )
    raise TransactionError(message)


def _knows_allowed(candidate: Candidate) -> bool:
    """Whether the backend can be told which of the tools may be called."""
    return "allowed_tools" in candidate.backend.features


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
