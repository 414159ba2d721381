"""Limits: what a call may take is set aside before it is made, and settled when it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from .accounting import Attempt, ModelCall
from .epoch import Epoch
from .errors import LimitReached, PriceUnknown
from .meters import MINUTE, Claim, Granted, Meter, Reading, Refused, Store
from .pricing import PER, UNIT, Price, Prices
from .rules import Bound, bind
from .sections import LimitConfig

logger = logging.getLogger("harperpy.limits")

DEFAULT_ANSWER = 4096
"""How many tokens an answer may have under a budget, where neither caller nor prices say it."""

_FIRST_GUESS = 256.0
_LEARNT = 0.2
_KEPT = 4096
_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details: the budget of "
    "{place} is used up; it begins anew in {time}."
)
_RATES = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


class Limits:
    """Admits the attempts at models by rules: those of the configuration, and stored ones.

    `stored` reads the latter, anew whenever the `epoch` moves. Where no rule meets a call it costs
    a look-up. `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        configured: Sequence[LimitConfig],
        prices: Prices,
        store: Store,
        *,
        epoch: Epoch,
        stored: Callable[[], Awaitable[Sequence[LimitConfig]]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.configured = tuple(configured)
        self.prices = prices
        self.store = store
        self.clock = clock
        self._epoch = epoch
        self._stored = stored
        self._seen: bytes | None = None
        self._rules = self.configured
        self._found: dict[tuple[str | None, ...], tuple[Bound, ...]] = {}
        self._open: dict[int, Granted] = {}
        self._typical: dict[str, float] = {}

    async def open(self) -> None:
        """Read the stored rules, and let go of what was held before a crash."""
        await self.store.begin(self.clock())
        await self._refresh()

    def concerns(self, call: ModelCall) -> bool:
        """Whether there are rules, of which one may meet a call."""
        return bool(self._rules) or self._epoch.now() != self._seen

    async def admit(self, attempt: Attempt) -> None:
        """Set aside what the attempt may take at most; `attempt.most_allowed` says what that is.

        Raises `LimitReached`, `PriceUnknown`, and `ServiceUnavailable` where nobody can tell.
        """
        if self._epoch.now() != self._seen:
            await self._refresh()
        if not self._rules:
            return
        call = attempt.call
        if bounds := self._bounds(call):
            await self._admit(attempt, bounds)

    def settle(self, call: ModelCall) -> None:
        """Take what the call took, and give back the rest."""
        granted = self._open.pop(call.id, None)
        if granted is None:
            return
        tokens = spent_tokens(call)
        units = round((call.cost or 0.0) * UNIT)
        actual = [units if _is_money(claim.meter) else tokens for claim in granted.claims]
        if call.success and call.completion_tokens is not None:
            for claim in granted.claims:
                self._learn(claim.meter, call.completion_tokens)
        # A call that could not be noted was never made, and has no row to wait for.
        written = call.success or call.error_code is not None
        self.store.settle(granted, actual, self.clock(), written=written)

    def forget(self) -> None:
        """Read anew what was spent, after rows of the ledger were changed; in every process."""
        self._epoch.move()

    async def _refresh(self) -> None:
        seen = self._epoch.now()
        try:
            stored = await self._stored()
        except Exception as error:
            if self._seen is None:
                raise
            # While nobody can read them, nobody can have changed them either.
            logger.warning("the stored limits cannot be read, those known stay: %s", error)
            return
        self._rules = (*self.configured, *stored)
        self._found.clear()
        self.store.forget()
        self._seen = seen

    def _bounds(self, call: ModelCall) -> tuple[Bound, ...]:
        key = (
            *(call.api_key, call.user, call.tenant),
            *(call.backend, call.backend_name, call.provider_model),
        )
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            found = self._found[key] = bind(self._rules, call)
        return found

    async def _admit(self, attempt: Attempt, bounds: Sequence[Bound]) -> None:
        now = self.clock()
        price = self.prices.find(attempt.call)
        meters: dict[str, tuple[Meter, Bound]] = {}
        for bound in bounds:
            _check_price(bound, price, attempt)
            again = attempt.number > 0 and bound.follows_call
            for meter in bound.meters(now):
                if again and meter.kind == "requests":
                    continue
                # Several rules may count the same: each holds, so the tightest does.
                other = meters.get(meter.name)
                if other is None or meter.limit < other[0].limit:
                    meters[meter.name] = meter, bound
        wanted = _wanted(attempt, price)
        claims = [*self._claims((meter for meter, _ in meters.values()), attempt, price)]
        try:
            granted = await self.store.reserve(claims, wanted, now, attempt.call.id)
        except Refused as refused:
            attempt.caller.call_headers.update(rate_headers(refused.pairs))
            raise _refusal(refused, meters[refused.meter.name][1]) from None
        attempt.caller.call_headers.update(rate_headers(granted.pairs))
        _allow(attempt, price, granted, wanted)
        self._open[attempt.call.id] = granted

    def _claims(
        self, meters: Iterable[Meter], attempt: Attempt, price: Price | None
    ) -> Iterator[Claim]:
        for meter in meters:
            if meter.kind == "tokens":
                asked = attempt.prompt_tokens()
                likely = asked + self._likely_answer(meter, attempt)
                yield Claim(meter, likely if asked > meter.limit else min(likely, meter.limit))
            elif meter.kind == "budget":
                yield _budgeted(meter, attempt, price)
            else:
                yield Claim(meter)

    def _likely_answer(self, meter: Meter, attempt: Attempt) -> int:
        if attempt.call.method == "embed":
            return 0
        if attempt.most_tokens is not None:
            return attempt.most_tokens * attempt.answers
        return round(self._typical.get(meter.name, _FIRST_GUESS)) * attempt.answers

    def _learn(self, meter: Meter, answered: int) -> None:
        """How long this caller's answers are, the latest ones above all."""
        if meter.kind == "tokens":
            if len(self._typical) >= _KEPT:
                self._typical.clear()
            known = self._typical.get(meter.name, _FIRST_GUESS)
            self._typical[meter.name] = min(DEFAULT_ANSWER, known + _LEARNT * (answered - known))


def spent_tokens(call: ModelCall) -> int:
    """All tokens of a call."""
    asked, embedded = call.prompt_tokens or 0, call.embedding_tokens or 0
    return asked + (call.completion_tokens or 0) + embedded


def rate_headers(pairs: Iterable[tuple[Claim, Reading]]) -> dict[str, str]:
    """OpenAI's headers for the tightest rate of each kind."""
    left: dict[str, tuple[int, Meter, Reading]] = {}
    for claim, reading in pairs:
        kind, limit = claim.meter.kind, claim.meter.limit
        if kind in _RATES:
            remaining = max(0, int(limit - reading.used + 1e-6))
            if kind not in left or remaining < left[kind][0]:
                left[kind] = (remaining, claim.meter, reading)
    found: dict[str, str] = {}
    for rate, (remaining, meter, reading) in left.items():
        found[f"x-ratelimit-limit-{rate}"] = str(meter.limit)
        found[f"x-ratelimit-remaining-{rate}"] = str(remaining)
        found[f"x-ratelimit-reset-{rate}"] = duration(reading.used * MINUTE / meter.limit)
    return found


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `12ms`, `1s`, `6m0s`, `1h0m0s`; never less than it is."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"


def _is_money(meter: Meter) -> bool:
    return meter.spending is not None and meter.spending.unit == "cost"


def _check_price(bound: Bound, price: Price | None, attempt: Attempt) -> None:
    budget = bound.rule.budget
    if budget is None or budget.cost is None or budget.unknown_price == "allow":
        return
    call = attempt.call
    kinds = ("embedding",) if call.method == "embed" else ("input", "output")
    missing = [kind for kind in kinds if price is None or getattr(price, kind) is None]
    if missing:
        name = call.provider_model or call.backend_name
        message = (
            f"The budget of {bound.place} is one of money, and nobody knows what the model "
            f"{call.model!r} costs: the price table has no {' and no '.join(missing)} price for "
            f"{name!r}."
        )
        raise PriceUnknown(message)


def _wanted(attempt: Attempt, price: Price | None) -> int:
    """How many tokens each answer may have at most, as far as anyone says."""
    if attempt.call.method == "embed":
        return 0
    if attempt.most_tokens is not None:
        return max(1, attempt.most_tokens)
    return (price and price.most_output) or DEFAULT_ANSWER


def _budgeted(meter: Meter, attempt: Attempt, price: Price | None) -> Claim:
    """What a call takes of a budget at most."""
    embeds = attempt.call.method == "embed"
    asked, answers = attempt.prompt_most(), 0 if embeds else attempt.answers
    if not _is_money(meter):
        return Claim(meter, asked, answers)
    # What has no price here is allowed to cost nothing.
    dear = (price.embedding if embeds else _dearest_input(price)) if price else 0
    output = price.output if price else 0
    return Claim(meter, asked * (dear or 0), answers * (output or 0), PER)


def _dearest_input(price: Price) -> int:
    return max(price.input or 0, price.cached or 0)


def _allow(attempt: Attempt, price: Price | None, granted: Granted, wanted: int) -> None:
    """Tell the attempt what it may take, and its row what was set aside."""
    budgets = [claim for claim in granted.claims if claim.meter.kind == "budget"]
    if any(claim.each for claim in budgets):
        said = attempt.most_tokens or (price and price.most_output)
        if not said or granted.most < wanted:
            attempt.most_allowed = granted.most
    for claim in budgets:
        if _is_money(claim.meter):
            attempt.call.reserved_cost = claim.taken / UNIT
        else:
            attempt.call.reserved_tokens = claim.taken


def _refusal(refused: Refused, bound: Bound) -> LimitReached:
    meter, seconds = refused.meter, refused.seconds
    if refused.spent:
        message = _QUOTA.format(place=bound.place, time=duration(seconds or 0.0))
        return _without_retry(message, seconds, "insufficient_quota", "insufficient_quota")
    again = "" if seconds is None else f" Please try again in {duration(seconds)}."
    if meter.kind == "budget":
        message = f"What is left of the budget of {bound.place} is held by calls that run.{again}"
        return LimitReached(message, seconds=seconds, type="tokens")
    if meter.kind == "concurrent":
        message = f"Too many calls of {bound.place} at a time: Limit {meter.limit}.{again}"
        return LimitReached(message, seconds=seconds, type="requests")
    rate = f"{bound.place} on {_RATES[meter.kind]}: Limit {meter.limit}"
    if seconds is None:
        message = f"Request too large for {rate}. The input must be shorter to be answered."
        return _without_retry(message, None, meter.kind)
    return LimitReached(f"Rate limit reached for {rate}.{again}", seconds=seconds, type=meter.kind)


def _without_retry(
    message: str, seconds: float | None, kind: str, code: str | None = None
) -> LimitReached:
    error = LimitReached(message, seconds=seconds, type=kind, code=code)
    error.headers["x-should-retry"] = "false"
    return error
