"""Meters that several machines share, on a Valkey server."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from .errors import HarperError, ServiceUnavailable
from .meters import Claim, Granted, Loading, Meter, Reading, Spending, grant, take
from .quotas import Quotas
from .valkey_line import ANSWER_SECONDS, Undone, ValkeyLine
from .valkey_scripts import BEAT, LOOK, PUBLISH, SETTLE, TAKE

logger = logging.getLogger("harperpy.limits")

_BEAT_SECONDS = 5.0
_LEASE_SECONDS = 30
_AGAIN_SECONDS = 1.0
# How long what ends is noted for who reads the ledger, and how long before a call may have begun.
_NOTED_SECONDS, _BEFORE_SECONDS = 60, 10
_DAY = 86_400
_KINDS = {"requests": "rate", "tokens": "rate", "concurrent": "place", "budget": "budget"}


class ValkeyMeters:
    """What a call holds stands on the server until it has ended, or its ledger has the call.

    What was spent of a budget is the sum of what each ledger says. Each says it anew when a process
    first meets the budget, so what a crash or the server forgets is right again. `ledger` names
    ours, `worker` which of its processes this is, `life` which one of those that were it.
    """

    def __init__(
        self, line: ValkeyLine, quotas: Quotas, *, ledger: str, worker: int, of: int, life: str
    ) -> None:
        self._line = line
        self._quotas = quotas
        self._ledger = ledger
        self._worker = worker
        self._of = of
        self._life = life
        self._lives = f"harperpy:lives:{ledger}"
        self._known: dict[str, Meter] = {}
        self._untold: dict[str, Meter] = {}
        self._forgotten = 0
        self._loading = Loading(self._publish)
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating: asyncio.Task[None] | None = None
        self._joined = False
        self._run = ""
        # Its clock is the one of all machines.
        self._ahead = 0.0

    async def begin(self, now: float) -> None:
        """Say that this process lives, and that the one before it does not."""
        await self._beat()
        self._beating = asyncio.ensure_future(self._beat_on())

    async def reserve(self, claims: Sequence[Claim], wanted: int, now: float, call: int) -> Granted:
        """Take all of it or, with `Refused`, nothing: in one step of the server."""
        taking = asyncio.ensure_future(self._reserve(claims, wanted, now, call))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            # It is taken all the same, for nobody.
            taking.add_done_callback(lambda done: self._unwanted(done, call))
            raise

    def settle(self, granted: Granted, actual: Sequence[int], now: float, *, written: bool) -> None:
        """Count what it was in the end, and give back the rest."""
        took = [
            (claim, count if written or claim.meter.kind == "tokens" else 0)
            for claim, count in zip(granted.claims, actual, strict=True)
            if claim.meter.kind != "requests"
        ]
        self._settle(took, granted.call, now, written=written)

    def forget(self) -> None:
        """Read anew what the ledger says was spent; what is held stays held."""
        self._known.clear()
        self._forgotten += 1

    async def close(self) -> None:
        """Send what was settled, and hang up. What cannot be sent now the next start finds."""
        if self._beating is not None:
            self._beating.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * ANSWER_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._line.close()

    async def _reserve(self, claims: Sequence[Claim], most: int, now: float, call: int) -> Granted:
        while True:
            for claim in claims:
                if claim.meter.spending and claim.meter.name not in self._known:
                    await self._loading.of(claim.meter)
            verdict, pairs = await self._take(claims, most, now, call)
            if verdict == "taken":
                take(pairs, most)
                return Granted(pairs, most, call)
            if verdict == "unknown":
                self.forget()
            else:
                # Says why there is not enough, or how many tokens there would be for a shorter one.
                most = grant(pairs, most, now)

    async def _take(
        self, claims: Sequence[Claim], most: int, now: float, call: int
    ) -> tuple[str, list[tuple[Claim, Reading]]]:
        keys = [key for claim in claims for key in _keys(claim.meter)]
        wants = [
            part
            for claim in claims
            for part in (
                *(_KINDS[claim.meter.kind], claim.meter.limit),
                *(claim.amount(most), _keep_seconds(claim.meter, now)),
            )
        ]
        deadline = time.time() + self._ahead + ANSWER_SECONDS
        who = (self._ledger, call, self._life, _LEASE_SECONDS)
        try:
            found = await self._line.run(TAKE, keys, [now + self._ahead, deadline, *who, *wants])
        except ServiceUnavailable as error:
            if not isinstance(error, Undone):
                self._release(claims, call)
            raise
        if found[0] == "late":
            message = "the Valkey server of the limits answers too late"
            raise ServiceUnavailable(message, headers={"Retry-After": "1"})
        numbers = [float(text) for text in found[1:]]
        readings = [
            Reading(used, int(held), now)
            for used, held in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        return found[0], list(zip(claims, readings, strict=True))

    def _unwanted(self, done: asyncio.Future[Granted], call: int) -> None:
        if not done.cancelled() and done.exception() is None:
            self._release(done.result().claims, call)

    def _release(self, claims: Sequence[Claim], call: int) -> None:
        """Give back what is held, if it is. What was counted of rates stays counted."""
        held = [(claim, 0) for claim in claims if _KINDS[claim.meter.kind] != "rate"]
        self._settle(held, call, 0.0, written=False)

    def _settle(
        self, took: Sequence[tuple[Claim, int]], call: int, now: float, *, written: bool
    ) -> None:
        if took:
            sent = self._send_settled(took, call, now)
            self._do(self._see_settled(sent, took, call, now, written=written))

    async def _see_settled(
        self,
        sent: asyncio.Future[list[int]],
        took: Sequence[tuple[Claim, int]],
        call: int,
        now: float,
        *,
        written: bool,
    ) -> None:
        """Try until it is done. What held nothing any more may be missing in what was spent."""
        while True:
            try:
                lost = await sent
                break
            except ServiceUnavailable:
                # It may have been done: what is held is given back once, and rates flow off anyway.
                took = [(claim, count) for claim, count in took if claim.meter.kind != "tokens"]
                await asyncio.sleep(_AGAIN_SECONDS)
                sent = self._send_settled(took, call, now)
        if written and lost:
            meters = (took[at - 1][0].meter for at in lost)
            self._untold.update((meter.name, meter) for meter in meters)
            await self._tell()

    def _send_settled(
        self, took: Sequence[tuple[Claim, int]], call: int, now: float
    ) -> asyncio.Future[list[int]]:
        keys = [key for claim, _ in took for key in _keys(claim.meter)]
        parts = [
            part
            for claim, count in took
            for part in (_KINDS[claim.meter.kind], claim.meter.limit, claim.taken, count)
        ]
        return self._line.run(SETTLE, keys, [now + self._ahead, self._ledger, call, *parts])

    async def _publish(self, meter: Meter) -> None:
        """Say what our ledger has spent, and let go of what is held for calls in that number."""
        if meter.spending is None or meter.spending.until + _DAY < time.time():
            return
        forgotten = -1
        while forgotten != self._forgotten:
            forgotten = self._forgotten
            while not await self._say(meter, meter.spending):
                pass
        self._known[meter.name] = meter

    async def _say(self, meter: Meter, spending: Spending) -> bool:
        """Say what the rows are, and what has ended since; False where others came between."""
        keys, looked = _keys(meter), [self._ledger, _NOTED_SECONDS]
        version, since, *rest = await self._line.run(LOOK, [*keys, self._lives], looked)
        lives = {int(call): bool(alive) for call, alive in zip(rest[::2], rest[1::2], strict=True)}
        # What ends from now on has mostly begun not long ago.
        first = int((time.time() - _BEFORE_SECONDS) * 1e6)
        spent, written = await self._quotas.counted(spending, lives, first)
        # Who was killed before its call was noted holds what nobody settles.
        over = [call for call, alive in lives.items() if call in written or not alive]
        keep, ended = _keep_seconds(meter, time.time()), dict[int, int]()
        while all(call >= first or call in lives for call in ended):
            total = spent + sum(took for call, took in ended.items() if call not in written)
            given = (self._ledger, version, since, len(ended), total, keep, *over)
            word, *row = await self._line.run(PUBLISH, keys, given)
            if word != "ended":
                return bool(word == "told")
            noted = zip(row[::2], row[1::2], strict=True)
            ended = {int(call): int(took) for call, took in noted if call != "since"}
        return False

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            await self._beat()

    async def _beat(self) -> None:
        try:
            before, run = await self._say_alive()
            if self._run not in ("", run):
                # Started anew, or another one, it may have missed how calls ended, and nobody would
                # let go of what they hold there: that goes with the life they were made in.
                self._life, before = uuid.uuid4().hex, ""
                await self._say_alive()
            if self._joined and before != self._life:
                self._come_back(before)
            self._joined, self._run = True, run
            await self._tell()
        except HarperError as error:
            logger.warning("calls under a limit are refused: %s", error)

    async def _say_alive(self) -> tuple[str, str]:
        """Which life this worker had by then, and which run of the server's this is, if it says."""
        given = (self._worker, self._of, self._life, _LEASE_SECONDS, 30 * _DAY)
        seconds, parts, before, run = await self._line.run(BEAT, [self._lives], given)
        self._ahead = int(seconds) + int(parts) / 1e6 - time.time()
        return before, run

    def _come_back(self, before: str) -> None:
        if before:
            logger.error(
                "two servers count as one by their limits: each needs a data folder of its own"
            )
        else:
            logger.warning(
                "the Valkey server of the limits was started anew, or has lost what it knew; "
                "it is told anew"
            )
        self._untold.update(self._known)
        self.forget()

    async def _tell(self) -> None:
        """Say anew what we have spent, wherever the server may be wrong about it."""
        while self._untold:
            name, meter = self._untold.popitem()
            try:
                await self._loading.of(meter)
            except BaseException:
                self._untold[name] = meter
                raise

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("what a call took of its limits is not settled: %s", error)


def _keys(meter: Meter) -> tuple[str, str]:
    return f"harperpy:stands:{meter.name}", f"harperpy:holds:{meter.name}"


def _keep_seconds(meter: Meter, now: float) -> int:
    """How long the server remembers it: no call takes longer than a day."""
    left = meter.spending.until - now if meter.spending else 0
    return max(0, round(left)) + _DAY
