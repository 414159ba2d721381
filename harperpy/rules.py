"""Rules: which limits a call meets, and the meters that they are counted by."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase

from .accounting import ModelCall
from .errors import ConfigError
from .meters import Meter, Spending
from .pricing import UNIT
from .routing import is_pattern
from .sections import BudgetConfig, LimitConfig

_ROW_COLUMNS = {"key": "api_key", "user": "user", "tenant": "tenant", "backend": "backend"}


class Bound:
    """A rule as it meets one name: `column` and `subject` say whose calls they are."""

    __slots__ = ("_budgets", "_until", "column", "follows_call", "rates", "rule", "subject")

    def __init__(self, rule: LimitConfig, column: str, subject: str) -> None:
        self.rule = rule
        self.column = column
        self.subject = subject
        # Who calls is the same in all attempts of a call; what is called is not.
        self.follows_call = rule.per in ("key", "user", "tenant") and rule.model is None
        self.rates = tuple(self._rates())
        self._budgets: tuple[Meter, ...] = ()
        self._until = 0.0

    def meters(self, now: float) -> tuple[Meter, ...]:
        """What is counted by this rule now: a budget's meter is one of its day or month."""
        if now >= self._until:
            self._budgets = tuple(self._of_period(self.rule.budget, now))
        return self.rates + self._budgets

    @property
    def place(self) -> str:
        """Whom it is about, for people."""
        models = f" on models {self.rule.model}" if self.rule.model else ""
        return f"{self.rule.per} {self.subject}{models}"

    def _name(self, *what: object) -> str:
        return "|".join(map(str, (*what, self.column, self.subject, self.rule.model or "")))

    def _rates(self) -> Iterator[Meter]:
        rule = self.rule
        if limit := rule.requests_per_minute:
            yield Meter(self._name("requests", limit), "requests", limit)
        if limit := rule.tokens_per_minute:
            yield Meter(self._name("tokens", limit), "tokens", limit)
        if limit := rule.concurrent:
            yield Meter(self._name("concurrent"), "concurrent", limit)

    def _of_period(self, budget: BudgetConfig | None, now: float) -> Iterator[Meter]:
        if budget is None:
            self._until = float("inf")
            return
        first, last, self._until = period(budget.period, now)
        for unit, limit in (("tokens", budget.tokens), ("cost", budget.cost)):
            if limit is not None:
                # What is fixed by a float has at most nine digits behind its point.
                most = round(limit * UNIT) if unit == "cost" else int(limit)
                spending = Spending(
                    per=self.column,
                    subject=self.subject,
                    models=self.rule.model,
                    unit="cost" if unit == "cost" else "tokens",
                    first=first,
                    last=last,
                    until=self._until,
                )
                yield Meter(self._name(unit, budget.period, first), "budget", most, spending)


def bind(rules: Sequence[LimitConfig], call: ModelCall) -> tuple[Bound, ...]:
    """The rules that a call meets, each as it meets it."""
    return tuple(filter(None, (_bound(rule, call) for rule in rules)))


def about(pattern: str | None, backend_name: str | None, provider_model: str | None) -> str | None:
    """The column by whose name a pattern is about a model; None if it is not.

    A model is known by the name it stands under in config.yaml, unless that is a pattern itself,
    and by the provider's: what a caller may ask for is one of them.
    """
    for column, name in (("backend_name", backend_name), ("provider_model", provider_model)):
        usable = name and not (column == "backend_name" and is_pattern(name))
        if usable and name and fnmatchcase(name, pattern or "*"):
            return column
    return None


def period(kind: str, now: float) -> tuple[str, str, float]:
    """The first and the last day of a period in UTC, and the moment it is over."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first, days = today, 1
    if kind == "month":
        first = today.replace(day=1)
        days = monthrange(today.year, today.month)[1]
    last = first + timedelta(days=days - 1)
    end = (last + timedelta(days=1)).timestamp()
    return first.date().isoformat(), last.date().isoformat(), end


def check_rules(rules: Sequence[LimitConfig], place: str) -> None:
    """Raise `ConfigError` for a rule that limits nothing, or one that can never be met."""
    for at, rule in enumerate(rules):
        budget = rule.budget
        if budget is not None and budget.tokens is None and budget.cost is None:
            message = f"{place}[{at}].budget: expected tokens or cost"
            raise ConfigError(message)
        limits = (rule.requests_per_minute, rule.tokens_per_minute, rule.concurrent, budget)
        if all(limit is None for limit in limits):
            message = (
                f"{place}[{at}]: it limits nothing; expected requestsPerMinute, tokensPerMinute, "
                "concurrent or budget"
            )
            raise ConfigError(message)


def _bound(rule: LimitConfig, call: ModelCall) -> Bound | None:
    if rule.model and about(rule.model, call.backend_name, call.provider_model) is None:
        return None
    if rule.per == "model":
        column = about(rule.match, call.backend_name, call.provider_model)
        return Bound(rule, column, getattr(call, column)) if column else None
    column = _ROW_COLUMNS[rule.per]
    subject: str | None = getattr(call, column)
    if subject is None or not fnmatchcase(subject, rule.match):
        return None
    return Bound(rule, column, subject)
