"""One call to a model: its candidates, its attempts, and a recorded row for each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import msgspec

from .accounting import Asking, Attempt, Caller, Ledger, Method, ModelCall
from .backend import Streams, aclose
from .batches import batches_of
from .errors import (
    Aborted,
    BackendError,
    BackendTimeout,
    CapabilityError,
    HarperError,
    ModelNotFound,
    TransactionError,
)
from .messages import (
    EmbedOpts,
    GenerateChunk,
    GenerateOpts,
    Prompt,
    TokenUsage,
    estimate_tokens,
)
from .routing import DEFAULT, Candidate
from .signal import AbortSignal

T = TypeVar("T")
Opts: TypeAlias = GenerateOpts | EmbedOpts
_Batch: TypeAlias = Sequence[GenerateChunk]
Weigh: TypeAlias = tuple[Callable[[], int], Callable[[], int]]
"""About how many tokens are asked, and how many at most."""

_FALLS_BACK = frozenset({401, 403, 404, 408, 409, 429})
# Longer waits are the caller's to make: it learns of them by Retry-After.
_LONGEST_WAIT = 2.0
_MOST_COUNTED = 2**53
_LONGEST_TEXT = 256
CALL_ID = "x-harper-call-id"
"""The header that names the row of the attempt that answered."""
_COUNTED = (
    "prompt_tokens",
    "completion_tokens",
    "embedding_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "gpu_ms",
)


class Recorder:
    """Times one attempt and writes its row when it is closed, once.

    `most_tokens` is how much it may answer at most, where an admission says so.
    """

    __slots__ = ("_closed", "_deltas", "_ledger", "_letters", "_started", "call", "most_tokens")

    def __init__(self, ledger: Ledger, call: ModelCall, most_tokens: int | None = None) -> None:
        ledger.begin(call)
        self._ledger = ledger
        self.most_tokens = most_tokens
        self._started = time.perf_counter()
        self._closed = False
        self._deltas = self._letters = 0
        self.call = call

    def observe(self, batch: Sequence[GenerateChunk]) -> None:
        """Note what has come, and when the first of it did."""
        if self.call.ttft_ms is None:
            self.call.ttft_ms = self._elapsed()
        for chunk in batch:
            self._observe(chunk)

    def _observe(self, chunk: GenerateChunk) -> None:
        """Note what a chunk tells: usage, the reason for the end, how much was said."""
        if chunk.delta_content:
            self._deltas += 1
            self._letters += len(chunk.delta_content)
        elif chunk.delta_tool_calls:
            self._deltas += 1
        if chunk.finish_reason:
            self.call.finish_reason = _clipped(chunk.finish_reason)
        if chunk.usage:
            self.count(chunk.usage)

    def count(self, usage: TokenUsage) -> None:
        """Note the tokens a provider reported; what no database could hold is left out."""
        for field in _COUNTED:
            value = getattr(usage, field)
            if isinstance(value, int | float) and 0 <= value < _MOST_COUNTED:
                setattr(self.call, field, value)

    def estimate(self, prompt: Prompt, completion_tokens: int | None = None) -> TokenUsage:
        """Tokens for a provider that reported none; the row says so.

        A streamed delta is a token for most providers; some send more text at once.
        """
        self.call.usage_estimated = True
        if completion_tokens is None:
            completion_tokens = max(self._deltas, self._letters // 5)
        asked = asked_tokens(prompt)
        return TokenUsage(prompt_tokens=asked, completion_tokens=completion_tokens)

    def close(self, error: BaseException | None, prompt: Prompt | None = None) -> None:
        """Write the row. A stream left early is billed for what it had produced."""
        if self._closed:
            return
        self._closed = True
        call = self.call
        call.latency_ms = self._elapsed()
        call.success = error is None
        if error is not None:
            call.error_code = error_code(error)
            call.upstream_status = getattr(error, "upstream_status", None)
        if prompt is not None and self._deltas and call.completion_tokens is None:
            self.count(self.estimate(prompt))
        self._ledger.record(call)

    def _elapsed(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)


class Call:
    """One call by one caller, over as many attempts as its plan has."""

    __slots__ = (
        "_asking",
        "_attempts",
        "_caller",
        "_ledger",
        "_method",
        "_opts",
        "_plan",
        "_weigh",
        "signal",
    )

    def __init__(
        self,
        ledger: Ledger,
        method: Method,
        opts: Opts,
        caller: Caller,
        weigh: Weigh = (int, int),
    ) -> None:
        self._ledger = ledger
        self._weigh = weigh
        self._attempts = 0
        self._method: Method = method
        self._opts = opts
        self._caller = caller
        self._asking = Asking(caller)
        self._plan: list[Candidate] = []
        self.signal = AbortSignal.any_of(caller.signal, opts.signal)

    def resolve(self, find: Callable[[], list[Candidate]]) -> None:
        """Find the candidates now; a refusal is raised from the call itself, and recorded."""
        try:
            self._plan = find()
        except HarperError as error:
            Recorder(self._ledger, self._row(None)).close(error)
            raise
        # Another candidate is the better retry: only the last one is asked again.
        last = self._plan[-1]
        self._plan += [last] * last.backend.max_retries

    def opts_for(self, candidate: Candidate, recorder: Recorder) -> Any:
        """The options as this candidate's backend sees them: its own model's name, one signal."""
        opts = msgspec.structs.replace(
            self._opts,
            model=candidate.provider_model,
            signal=self.signal,
            call_id=recorder.call.id,
        )
        if isinstance(opts, GenerateOpts):
            if self._narrows(candidate):
                opts.allowed_tools = None
            if recorder.most_tokens is not None:
                opts.max_tokens = recorder.most_tokens
        return opts

    def prompt_for(self, candidate: Candidate, prompt: Prompt) -> Prompt:
        """The prompt with the tools that may be called, where a backend cannot be told which."""
        if not isinstance(self._opts, GenerateOpts) or not self._narrows(candidate):
            return prompt
        allowed = self._opts.allowed_tools or ()
        tools = [tool for tool in prompt.tools if tool.name in allowed]
        return msgspec.structs.replace(prompt, tools=tools)

    def _narrows(self, candidate: Candidate) -> bool:
        opts = self._opts
        allowed = opts.allowed_tools if isinstance(opts, GenerateOpts) else None
        return allowed is not None and "allowed_tools" not in candidate.backend.features

    @property
    def gives_many(self) -> bool:
        """Whether whoever answers can give `n` answers at once."""
        return all("n" in candidate.backend.features for candidate in self._plan)

    async def whole(self, attempt: Callable[[Candidate, Recorder], Awaitable[T]]) -> T:
        """Run attempts until one answers."""

        async def recorded(candidate: Candidate) -> T:
            recorder = await self._begin(candidate)
            try:
                with self.signal.guard():
                    await self._synced()
                    answer = await attempt(candidate, recorder)
            except BaseException as error:
                await self._failed(recorder, error)
                raise
            recorder.close(None)
            await self._synced()
            return answer

        return await self._first_success(recorded)

    async def batches(self, prompt: Prompt) -> AsyncIterator[Sequence[GenerateChunk]]:
        """Run attempts until one brings its first chunks; then that one to its end."""
        batch, batches, recorder = await self._first_success(lambda one: self._open(one, prompt))
        try:
            while batch is not None:
                recorder.observe(batch)
                yield batch
                with self._asking, self.signal.guard():
                    batch = await anext(batches, None)
            if recorder.call.completion_tokens is None:
                usage = recorder.estimate(prompt)
                recorder.count(usage)
                yield (GenerateChunk(usage=usage),)
        except BaseException as error:
            await self._failed(recorder, error, prompt)
            raise
        else:
            recorder.close(None)
            await self._synced()
        finally:
            await aclose(batches)

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
                await self._synced()
                first = await anext(batches, None)
        except BaseException as error:
            await self._failed(recorder, error)
            if batches is not None:
                await aclose(batches)
            raise
        return first, batches, recorder

    async def _first_success(self, attempt: Callable[[Candidate], Awaitable[T]]) -> T:
        with self._asking:
            return await self._try_all(attempt)

    async def _try_all(self, attempt: Callable[[Candidate], Awaitable[T]]) -> T:
        for at, candidate in enumerate(self._plan[:-1]):
            try:
                return await _anew(attempt, candidate)
            except Exception as error:
                again = self._plan[at + 1] is candidate
                pause = _pause(error, at) if again else 0.0
                if not (pause < _LONGEST_WAIT if again else falls_back(error)):
                    raise
            with self.signal.guard():
                await asyncio.sleep(pause)
        return await _anew(attempt, self._plan[-1])

    async def _begin(self, candidate: Candidate) -> Recorder:
        """Have one more attempt admitted and noted. Raises what refuses it."""
        row = self._row(candidate)
        most = None
        if self._ledger.admission is not None:
            attempt = self._attempt(row)
            await self._ledger.admission.admit(attempt)
            most = attempt.most_allowed
        self._attempts += 1
        recorder = Recorder(self._ledger, row, most)
        self._caller.call_headers[CALL_ID] = str(row.id)
        return recorder

    def _attempt(self, row: ModelCall) -> Attempt:
        attempt = Attempt(self._caller, row, self._attempts, *self._weigh)
        if isinstance(self._opts, GenerateOpts):
            attempt.most_tokens = self._opts.max_tokens
            attempt.answers = self._opts.n or 1
        return attempt

    async def _failed(
        self, recorder: Recorder, error: BaseException, prompt: Prompt | None = None
    ) -> None:
        recorder.close(error, prompt)
        # Who was cancelled tells nobody of it.
        if isinstance(error, Exception):
            await self._synced()

    async def _synced(self) -> None:
        keeper = self._ledger.keeper
        if keeper is not None and keeper.synced is not None:
            await keeper.synced()

    def _row(self, candidate: Candidate | None) -> ModelCall:
        ids, caller = self._ledger.next_id(), self._caller
        call = ModelCall(
            id=ids,
            created=ids / 1000,
            method=self._method,
            model=_clipped(self._opts.model) or DEFAULT,
            tenant=caller.tenant,
            user=caller.user.username if caller.user else None,
            app=caller.app,
            request_id=caller.request_id,
            api_key=caller.user.key_id if caller.user else None,
        )
        if isinstance(self._opts, GenerateOpts):
            call.adapter = _clipped(self._opts.adapter)
            call.conversation_id = _clipped(self._opts.conversation_id)
        if candidate is not None:
            call.backend = candidate.backend.name
            call.backend_name = candidate.registration.name
            call.provider_model = _clipped(candidate.provider_model)
        return call


def asked_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt is."""
    return sum(estimate_tokens(message.text) + 4 for message in prompt.messages)


def _clipped(value: object) -> str | None:
    """Text as a row holds it, whoever sent it."""
    return str(value)[:_LONGEST_TEXT] if value else None


async def _anew(attempt: Callable[[Candidate], Awaitable[T]], candidate: Candidate) -> T:
    """The attempt, and one more where it met a connection that was gone."""
    try:
        return await attempt(candidate)
    except BackendError as error:
        if not error.stale:
            raise
    return await attempt(candidate)


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


def error_code(error: BaseException) -> str:
    """The code a failed attempt's row carries."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit, Aborted, TransactionError)):
        return "aborted"
    if isinstance(error, (BackendTimeout, TimeoutError)):
        return "timeout"
    if isinstance(error, CapabilityError):
        return "capability_unsupported"
    if isinstance(error, ModelNotFound):
        return "backend_not_found"
    if isinstance(error, BackendError) and error.stale:
        return "connection_lost"
    return "backend_error"
