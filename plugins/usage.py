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
_DAY_MS = 86_400_000
# Of a cost, as in the roll-up.
_DIGITS = 9
_TOKENS = (
    *("prompt_tokens", "completion_tokens", "embedding_tokens"),
    *("cached_tokens", "reasoning_tokens"),
)
_CREATED = "__createdtime__"

Moment: TypeAlias = Annotated[str, Meta(min_length=1)] | int | float
Some: TypeAlias = (
    Annotated[str, Meta(min_length=1)] | Annotated[list[str], Meta(max_length=1000)] | None
)


class GetUsage(msgspec.Struct, forbid_unknown_fields=True):
    """What to group by (a list, or names with commas), from when, until when, and of whom or what.

    A moment is `2026-11-21`, `2026-11-21T12:00:00Z` or milliseconds since 1970; `to` is the first
    one that does not count any more. Whole days (UTC) are known longer than their rows are kept.
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
        """Calls, failures, tokens and cost of each group; `unpriced` ones have no price."""
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
    source = _source(database, *window(request.from_, request.to))
    groups = _groups(source, request.group_by)
    counts = ("calls", "failures", *_TOKENS, "unpriced")
    sums = [
        *(sa.func.coalesce(sa.func.sum(source.c[one]), 0).label(one) for one in counts),
        sa.func.round(sa.func.total(source.c.cost), _DIGITS).label("cost"),
    ]
    asked = sa.select(*groups.values(), *sums).where(*_conditions(source, request))
    if not user.is_super_user:
        asked = asked.where(source.c.user == user.username)
    if groups:
        asked = asked.group_by(*groups.values()).order_by(*groups.values())
    return asked.limit(MOST_ROWS + 1)


def _source(database: Database, start: float | None, end: float | None) -> sa.Subquery:
    """Whole days as the roll-up has them, which outlives the rows; of other days their rows."""
    first = None if start is None else -(-start // _DAY_MS) * _DAY_MS
    after = None if end is None else end // _DAY_MS * _DAY_MS
    if first is not None and after is not None and first >= after:
        return _calls(database, start, end).subquery()
    begun = [] if start == first else [_calls(database, start, first)]
    ending = [] if end == after else [_calls(database, after, end)]
    return sa.union_all(_days(database, start, end), *begun, *ending).subquery()


def _days(
    database: Database, start: float | None, end: float | None
) -> sa.Select[tuple[object, ...]]:
    """The roll-up of the whole ones; what a call has none of is null, as in its row."""
    days = database.model_calls_daily.c
    found = sa.select(
        days.day,
        *(sa.func.nullif(days[name], "").label(name) for name in DIMENSIONS),
        *(days[name] for name in (*_TOKENS, "calls", "failures", "unpriced", "cost")),
    )
    if start is not None:
        whole = start % _DAY_MS == 0
        found = found.where(days.day >= _day_of(start) if whole else days.day > _day_of(start))
    return found if end is None else found.where(days.day < _day_of(end))


def _day_of(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment / 1000, dt.UTC).date().isoformat()


def _calls(
    database: Database, start: float | None, end: float | None
) -> sa.Select[tuple[object, ...]]:
    """The rows of the calls, each with the columns of a day that has it alone."""
    calls = database.model_calls.c
    created = calls[_CREATED]
    return sa.select(
        sa.func.date(created / 1000, "unixepoch").label("day"),
        *(calls[name] for name in (*DIMENSIONS, *_TOKENS)),
        sa.literal(1).label("calls"),
        sa.case((calls.success, 0), else_=1).label("failures"),
        sa.case((calls.success & calls.cost.is_(None), 1), else_=0).label("unpriced"),
        calls.cost,
    ).where(*within(created, start, end))


def _groups(source: sa.Subquery, group_by: str | list[str]) -> dict[str, sa.ColumnElement[Any]]:
    names = group_by.split(",") if isinstance(group_by, str) else group_by
    groups: dict[str, sa.ColumnElement[Any]] = {}
    for name in filter(None, (name.strip() for name in names)):
        if name == "month":
            groups[name] = sa.func.substr(source.c.day, 1, len("2026-11")).label(name)
        elif name in (*DIMENSIONS, "day"):
            groups[name] = source.c[name]
        else:
            known = ", ".join((*DIMENSIONS, "day", "month"))
            message = f"group_by: expected some of {known}, got '{name}'"
            raise InvalidBody(message, param="group_by")
    return groups


def _conditions(source: sa.Subquery, request: GetUsage) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    given: Mapping[str, Any] = {name: getattr(request, name) for name in DIMENSIONS}
    for name, value in given.items():
        if value is not None:
            wanted = cast("list[str]", value) if isinstance(value, list) else [str(value)]
            found.append(source.c[name].in_(wanted))
    return found


def window(since: Moment | None, until: Moment | None) -> tuple[float | None, float | None]:
    """`from` and `to` in milliseconds since 1970, where they are given. Raises `InvalidBody`."""
    start = None if since is None else moment(since, "from")
    end = None if until is None else moment(until, "to")
    if start is not None and end is not None and end <= start:
        message = "to: expected a moment after 'from', the first one that does not count any more"
        raise InvalidBody(message, param="to")
    return start, end


def within(column: sa.ColumnElement[Any], start: Any, end: Any) -> list[sa.ColumnElement[bool]]:
    """From the start on, until before the end, where there are such."""
    return [
        *([] if start is None else [column >= start]),
        *([] if end is None else [column < end]),
    ]


def moment(given: str | float, param: str) -> float:
    """Milliseconds since 1970. Raises `InvalidBody`."""
    try:
        if not isinstance(given, str):
            dt.datetime.fromtimestamp(given / 1000, dt.UTC)
            return given
        found = dt.datetime.fromisoformat(given)
        aware = found if found.tzinfo else found.replace(tzinfo=dt.UTC)
        return aware.timestamp() * 1000
    except (ValueError, OverflowError, OSError) as error:
        message = f"{param}: expected a date such as 2026-11-21, a time, or milliseconds since 1970"
        raise InvalidBody(message, param=param) from error
