"""Meters: what is counted of calls, how much of it there may be, and who holds a part of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

Kind: TypeAlias = Literal["requests", "tokens", "concurrent", "budget"]
"""The first two flow off, all of it in a minute; the others stay until they are given back."""

MINUTE = 60.0
# Nobody knows when a call ends that holds what another one waits for.
_MOMENT = 1.0
_TIDY_AT = 1024


class Spending(msgspec.Struct, frozen=True):
    """Which of the ledger's calls a budget counts: of whom, on what models, on which days."""

    per: str
    subject: str
    models: str | None
    unit: Literal["tokens", "cost"]
    first: str
    last: str
    until: float


class Meter(msgspec.Struct, frozen=True):
    """One thing that is counted. `name` is the same in every process and after every start."""

    name: str
    kind: Kind
    limit: int
    spending: Spending | None = None


class Claim(msgspec.Struct):
    """What a call wants of a meter: `fixed`, and `each` for every token it may be answered with.

    Both in parts of which `scale` make one of the meter's own. `taken` is what it got.
    """

    meter: Meter
    fixed: int = 1
    each: int = 0
    scale: int = 1
    taken: int = 0

    def amount(self, most: int) -> int:
        """How much it is, with so many tokens in the answer."""
        return -(-(self.fixed + self.each * most) // self.scale)


class Reading(msgspec.Struct):
    """How a meter stands: what is `used`, and what is `held` by those that are still at it."""

    used: float = 0
    held: int = 0
    at: float = 0.0

    def flow(self, meter: Meter, now: float) -> None:
        """Let what was used of a rate flow off until now."""
        if meter.kind in ("requests", "tokens"):
            if self.at > now + MINUTE:
                # The clock was set back: nobody waits until it is as late again.
                self.used, self.at = 0.0, now
            off = max(0.0, now - self.at) * meter.limit / MINUTE
            self.used = max(0.0, self.used - off)
            # What is given back late is given back for then.
            self.at = max(self.at, now)


class Refused(Exception):
    """A meter has not enough; in `seconds` it may have, None if never.

    `spent` says that it is used up, and not only held by others.
    """

    pairs: Sequence[tuple[Claim, Reading]] = ()

    def __init__(self, meter: Meter, seconds: float | None, *, spent: bool = False) -> None:
        super().__init__(meter.name)
        self.meter = meter
        self.seconds = seconds
        self.spent = spent


class Granted(msgspec.Struct):
    """What a call got: its claims, with how they stand, and the tokens it may be answered with."""

    pairs: Sequence[tuple[Claim, Reading]]
    most: int
    call: int

    @property
    def claims(self) -> list[Claim]:
        """What it got of each meter."""
        return [claim for claim, _ in self.pairs]


class Store(Protocol):
    """Where meters are kept."""

    async def begin(self, now: float) -> None:
        """Let go of what was held for calls before a crash, now that they have their rows."""
        ...

    async def reserve(self, claims: Sequence[Claim], wanted: int, now: float, call: int) -> Granted:
        """Take all of it for a call or, with `Refused`, nothing."""
        ...

    def settle(self, granted: Granted, actual: Sequence[int], now: float, *, written: bool) -> None:
        """Count what it was in the end, and give back the rest; `written` if it gets a row."""
        ...

    def forget(self) -> None:
        """Read anew what the ledger says was spent."""
        ...

    async def close(self) -> None:
        """Nothing is reserved from now on; what was settled is brought to its end."""
        ...


def grant(pairs: Sequence[tuple[Claim, Reading]], wanted: int, now: float) -> int:
    """Let the claims have what they want; how many tokens, of those wanted, may be the answer.

    Raises `Refused`, and then nothing has changed.
    """
    most = wanted
    for claim, reading in pairs:
        reading.flow(claim.meter, now)
    try:
        for claim, reading in pairs:
            if claim.meter.kind == "budget":
                most = _of_budget(claim, reading, most, now)
            else:
                _check(claim, reading)
    except Refused as refusal:
        refusal.pairs = pairs
        raise
    take(pairs, most)
    return most


def take(pairs: Sequence[tuple[Claim, Reading]], most: int) -> None:
    """Let the claims have what they want for so many tokens in the answer."""
    for claim, reading in pairs:
        claim.taken = claim.amount(most)
        if claim.meter.kind in ("requests", "tokens"):
            reading.used += claim.taken
        else:
            reading.held += claim.taken


def give_back(claim: Claim, reading: Reading, actual: int, now: float) -> None:
    """Count what a call took in the end in the place of what was taken for it."""
    if claim.meter.kind == "tokens":
        reading.flow(claim.meter, now)
        reading.used = max(0.0, reading.used + actual - claim.taken)
    elif claim.meter.kind != "requests":
        reading.held = max(0, reading.held - claim.taken)
        reading.used += actual if claim.meter.kind == "budget" else 0


def _check(claim: Claim, reading: Reading) -> None:
    meter = claim.meter
    over = reading.used + reading.held + claim.fixed - meter.limit
    # What has flowed off is reckoned in floats.
    if over <= 1e-6:
        return
    if meter.kind == "concurrent":
        raise Refused(meter, _MOMENT)
    if claim.fixed > meter.limit:
        raise Refused(meter, None)
    raise Refused(meter, over * MINUTE / meter.limit)


def _of_budget(claim: Claim, reading: Reading, wanted: int, now: float) -> int:
    """How many of the wanted tokens the budget has. Raises `Refused` for none of them."""
    meter = claim.meter
    if not claim.fixed and not claim.each:
        return wanted
    free = (meter.limit - int(reading.used)) * claim.scale - claim.fixed
    left = free - reading.held * claim.scale
    if left >= claim.each * wanted:
        return wanted
    if reading.held and free > 0:
        # A shorter answer, only because others may still give something back, serves nobody.
        raise Refused(meter, _MOMENT)
    most = left // claim.each if claim.each else 0
    if most < 1:
        end = meter.spending.until if meter.spending else now
        raise Refused(meter, max(_MOMENT, end - now), spent=True)
    return most


Spent: TypeAlias = Callable[[Spending], Awaitable[int]]
"""What the ledger says was spent, in tokens or in billionths."""


class Loading:
    """What is loaded of a meter, by one for all who wait for it."""

    def __init__(self, load: Callable[[Meter], Coroutine[Any, Any, None]]) -> None:
        self._load = load
        self._running: dict[str, asyncio.Task[None]] = {}

    async def of(self, meter: Meter) -> None:
        """Return when it is loaded. Raises what that raises."""
        running = self._running.get(meter.name)
        if running is None or running.done():
            running = self._running[meter.name] = asyncio.ensure_future(self._load(meter))
            running.add_done_callback(lambda done: self._done(meter.name, done))
        await asyncio.shield(running)

    def _done(self, name: str, done: asyncio.Task[None]) -> None:
        if self._running.get(name) is done:
            del self._running[name]


class Memory:
    """Meters of one process alone; what was spent already is read from the ledger, once."""

    def __init__(self, spent: Spent) -> None:
        self._spent = spent
        self._kept: dict[str, tuple[Meter, Reading]] = {}
        self._known: set[str] = set()
        self._loading = Loading(self._load)
        # Budgets being read of which no call has ended since.
        self._quiet: set[str] = set()
        self._tidy_at = _TIDY_AT

    async def begin(self, now: float) -> None:
        """Nothing is held yet."""

    async def reserve(self, claims: Sequence[Claim], wanted: int, now: float, call: int) -> Granted:
        """Take all of it for a call or, with `Refused`, nothing."""
        budgets = [claim.meter for claim in claims if claim.meter.spending]
        while unknown := [meter for meter in budgets if meter.name not in self._known]:
            await self._loading.of(unknown[0])
        # From here on nobody comes between.
        self._tidy(now)
        pairs = [(claim, self._reading(claim.meter)) for claim in claims]
        return Granted(pairs, grant(pairs, wanted, now), call)

    def settle(
        self,
        granted: Granted,
        actual: Sequence[int],
        now: float,
        *,
        written: bool,
    ) -> None:
        """Count what it was in the end, and give back the rest."""
        for claim, took in zip(granted.claims, actual, strict=True):
            self._quiet.discard(claim.meter.name)
            give_back(claim, self._reading(claim.meter), took, now)

    def forget(self) -> None:
        """Read anew what the ledger says was spent; what is held stays held."""
        self._known.clear()
        # What is being read just now may be old.
        self._quiet.clear()

    async def close(self) -> None:
        """It goes with the process."""

    def _reading(self, meter: Meter) -> Reading:
        found = self._kept.get(meter.name)
        if found is None:
            found = self._kept[meter.name] = (meter, Reading())
        return found[1]

    async def _load(self, meter: Meter) -> None:
        if meter.spending is None:
            return
        name, quiet = meter.name, self._quiet
        while name not in self._known:
            quiet.add(name)
            spent = await self._spent(meter.spending)
            # A call of it that ended meanwhile may be in that number or not. They are no more than
            # ran before: until it is known no other is admitted.
            if name in quiet:
                self._reading(meter).used = spent
                self._known.add(name)
        quiet.discard(name)

    def _tidy(self, now: float) -> None:
        """Let go of meters that stand as new ones do, and of budgets whose time is over."""
        if len(self._kept) < self._tidy_at:
            return
        for name, (meter, reading) in list(self._kept.items()):
            reading.flow(meter, now)
            over = meter.spending is not None and meter.spending.until <= now
            if not reading.held and (over or (not meter.spending and not reading.used)):
                del self._kept[name]
                self._known.discard(name)
        self._tidy_at = max(_TIDY_AT, 2 * len(self._kept))
