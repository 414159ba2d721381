"""Limits: the operations on those that are stored beside config.yaml's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harperpy import BudgetConfig, InvalidBody, LimitConfig, NoParameters, Scope

Text = Annotated[str, Meta(min_length=1)]
# More no store could count.
_MOST = 2**53
Some = Annotated[int, Meta(ge=1, le=_MOST)]
Scoped = Literal["key", "user", "tenant", "model", "backend"]


class Budget(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens, or money, for each day or month in UTC."""

    tokens: Annotated[int, Meta(ge=0, le=_MOST)] | None = None
    cost: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    period: Literal["day", "month"] = "month"
    unknown_price: Literal["refuse", "allow"] = "refuse"


class SetLimits(msgspec.Struct, forbid_unknown_fields=True):
    """What each of those named (by a name or a pattern) may take, of all models or of some."""

    scope: Scoped
    name: Text
    model: Text | None = None
    requests_per_minute: Some | None = None
    tokens_per_minute: Some | None = None
    concurrent: Some | None = None
    budget: Budget | None = None


class DropLimits(msgspec.Struct, forbid_unknown_fields=True):
    """Which stored limits to remove."""

    scope: Scoped
    name: Text
    model: Text | None = None


async def handle_application(scope: Scope) -> None:
    """Add the operations, and say which of config.yaml's limits hold for nobody."""
    operations = LimitOperations(scope)
    scope.operations.add("set_limits", operations.set_limits, SetLimits)
    scope.operations.add("list_limits", operations.list_limits, NoParameters, reads=True)
    scope.operations.add("drop_limits", operations.drop_limits, DropLimits)
    for at, rule in enumerate(scope.config.limits.rules):
        if rule.per == "key" and (wrong := await operations.wrong_key(rule.match)):
            scope.logger.warning("config.yaml: limits.rules[%d].match: %s", at, wrong)


class LimitOperations:
    """Operations on limits."""

    def __init__(self, scope: Scope) -> None:
        self._limits = scope.billing.limits
        self._quotas = scope.billing.quotas
        self._keys = scope.keys

    async def set_limits(self, request: SetLimits) -> str:
        """Store limits, in the place of those of the same names and models."""
        budget = request.budget
        if budget is not None and budget.tokens is None and budget.cost is None:
            message = "budget: expected tokens or cost"
            raise InvalidBody(message, param="budget")
        given = (request.requests_per_minute, request.tokens_per_minute, request.concurrent)
        if budget is None and given == (None, None, None):
            message = (
                "set_limits: expected requests_per_minute, tokens_per_minute, concurrent or budget"
            )
            raise InvalidBody(message)
        if request.scope == "key" and (wrong := await self.wrong_key(request.name)):
            message = f"name: {wrong}"
            raise InvalidBody(message, param="name")
        await self._quotas.put(_rule(request))
        return f"limits of {request.scope} {request.name} successfully set"

    async def wrong_key(self, match: str) -> str | None:
        """What is wrong with what is no key's id and no pattern: it would hold for none."""
        if {*match} & {*"*?["}:
            return None
        keys = await self._keys.list()
        if any(match == key.id for key in keys):
            return None
        near = [key.id for key in keys if key.name == match]
        hint = f": the id of {match} is {', '.join(near)}" if near else ""
        return f"expected the id of an API key (see list_api_keys){hint}"

    async def list_limits(self) -> list[dict[str, Any]]:
        """All limits: config.yaml's, then those that are stored."""
        stored = await self._quotas.rules()
        return [
            *(_shown(rule, "config.yaml") for rule in self._limits.configured),
            *(_shown(rule, "stored") for rule in stored),
        ]

    async def drop_limits(self, request: DropLimits) -> str:
        """Remove stored limits."""
        await self._quotas.drop(request.scope, request.name, request.model)
        return f"limits of {request.scope} {request.name} successfully dropped"


def _rule(request: SetLimits) -> LimitConfig:
    budget = request.budget
    return LimitConfig(
        per=request.scope,
        match=request.name,
        model=request.model,
        requests_per_minute=request.requests_per_minute,
        tokens_per_minute=request.tokens_per_minute,
        concurrent=request.concurrent,
        budget=BudgetConfig(**msgspec.structs.asdict(budget)) if budget else None,
    )


def _shown(rule: LimitConfig, source: str) -> dict[str, Any]:
    """A rule by the names that `set_limits` takes, and where it comes from."""
    told = {"scope": rule.per, "name": rule.match, "model": rule.model}
    rates = {
        "requests_per_minute": rule.requests_per_minute,
        "tokens_per_minute": rule.tokens_per_minute,
        "concurrent": rule.concurrent,
    }
    budget = rule.budget and {
        name: value
        for name, value in msgspec.structs.asdict(rule.budget).items()
        if value is not None
    }
    shown = {**told, **rates, "budget": budget}
    return {name: value for name, value in shown.items() if value is not None} | {"source": source}
