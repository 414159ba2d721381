"""Usage: `get_usage`, the ledger's calls, tokens and cost, by whom and by what."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, cast

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from harperpy import AccessViolation, Context, Database, InvalidBody, Scope, User

from .searching import MOST_ROWS, TRUNCATED

DIMENSIONS = (
    *("tenant", "user", "api_key", "model", "backend", "backend_name", "provider_model"),
    *("method", "app"),
)
_TIMES = {"day": "%Y-%m-%d", "month": "%Y-%m"}
_TOKENS = (
    *("prompt_tokens", "completion_tokens", "embedding_tokens"),
    *("cached_tokens", "reasoning_tokens"),
)
_CREATED = "__createdtime__"

Moment: TypeAlias = Annotated[str, Meta(min_length=1)] | int | float
Some: TypeAlias = Annotated[str, Meta(min_length=1)] | list[str] | None


class GetUsage(msgspec.Struct, forbid_unknown_fields=True):
    """What to group by (a list, or names with commas), from when, until when, and of whom or what.

    A moment is `2026-11-21`, `2026-11-21T12:00:00Z` or milliseconds since 1970; `to` is the first
    one that does not count any more.
    """

    group_by: str | list[str] = []
    from_: Moment | None = msgspec.field(name="from", default=None)
    to: Moment | None = None
    tenant: Some = None
    user: Some = None
    api_key: Some = None
    model: Some = None
    backend: Some = None
    backend_name: Some = None
    provider_model: Some = None
    method: Some = None
    app: Some = None


def add_operations(scope: Scope) -> None:
    """Offer it to every user, of the user's own calls; to super users of all."""
    scope.operations.add("get_usage", Usage(scope).get, GetUsage, open_to="user", reads=True)


class Usage:
    """Adds up the ledger's rows."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._ledger = scope.ledger

    async def get(self, request: GetUsage, context: Context) -> list[dict[str, Any]]:
        """Calls, failures, tokens and cost of each group; `unpriced` calls have no cost at all."""
        if (user := context.user) is None:
            raise AccessViolation(None)
        asked = _statement(self._database, request, user)
        await self._ledger.flush()

        def work(connection: sa.Connection) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(asked).mappings()]

        rows = await self._database.read(work)
        if len(rows) > MOST_ROWS:
            context.response_headers[TRUNCATED] = str(MOST_ROWS)
        return rows[:MOST_ROWS]


def _statement(database: Database, request: GetUsage, user: User) -> sa.Select[Any]:
    calls = database.model_calls
    groups = _groups(calls, request.group_by)
    asked = sa.select(*groups.values(), *_sums(calls)).where(*_conditions(calls, request))
    if not user.is_super_user:
        asked = asked.where(calls.c.user == user.username)
    if groups:
        asked = asked.group_by(*groups.values()).order_by(*groups.values())
    return asked.limit(MOST_ROWS + 1)


def _groups(calls: sa.Table, group_by: str | list[str]) -> dict[str, sa.ColumnElement[Any]]:
    names = group_by.split(",") if isinstance(group_by, str) else group_by
    groups: dict[str, sa.ColumnElement[Any]] = {}
    for name in filter(None, (name.strip() for name in names)):
        if name in _TIMES:
            seconds = calls.c[_CREATED] / 1000
            groups[name] = sa.func.strftime(_TIMES[name], seconds, "unixepoch").label(name)
        elif name in DIMENSIONS:
            groups[name] = calls.c[name]
        else:
            known = ", ".join((*DIMENSIONS, *_TIMES))
            message = f"group_by: expected some of {known}, got '{name}'"
            raise InvalidBody(message, param="group_by")
    return groups


def _sums(calls: sa.Table) -> list[sa.ColumnElement[Any]]:
    def total(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.func.coalesce(sa.func.sum(column), 0)

    return [
        sa.func.count().label("calls"),
        total(sa.case((calls.c.success, 0), else_=1)).label("failures"),
        *(total(calls.c[name]).label(name) for name in _TOKENS),
        total(calls.c.cost).label("cost"),
        total(sa.case((calls.c.cost.is_(None), 1), else_=0)).label("unpriced"),
    ]


def _conditions(calls: sa.Table, request: GetUsage) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if request.from_ is not None:
        found.append(calls.c[_CREATED] >= moment(request.from_, "from"))
    if request.to is not None:
        found.append(calls.c[_CREATED] < moment(request.to, "to"))
    given: Mapping[str, Any] = {name: getattr(request, name) for name in DIMENSIONS}
    for name, value in given.items():
        if value is not None:
            wanted = cast("list[str]", value) if isinstance(value, list) else [str(value)]
            found.append(calls.c[name].in_(wanted))
    return found


def moment(given: str | float, param: str) -> float:
    """Milliseconds since 1970."""
    if not isinstance(given, str):
        return given
    try:
        moment = dt.datetime.fromisoformat(given)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
        return aware.timestamp() * 1000
    except (ValueError, OverflowError) as error:
        message = f"{param}: expected a date such as 2026-11-21, a time, or milliseconds since 1970"
        raise InvalidBody(message, param=param) from error
