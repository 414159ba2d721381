"""The operations on what is measured: `get_analytics`, `list_metrics`, `describe_metric`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import msgspec
import sqlalchemy as sa

from harperpy import InvalidBody, NotFound, Scope

Row: TypeAlias = dict[str, Any]

_MOST_ROWS = 10_000
# What the server measures itself; all else is custom.
BUILT_IN = (
    "bytes-received",
    "bytes-sent",
    "connection",
    "connections",
    "cpu-usage",
    "database-size",
    "duration",
    "model-embed",
    "model-embed-tokens",
    "model-generate",
    "model-generate-tokens",
    "model-generateStream",
    "model-generateStream-tokens",
    "model_call",
    "resource-usage",
    "service-unavailable",
    "storage-volume",
    "success",
    "table-size",
    "tokens_per_s",
    "transfer",
    "ttft_ms",
    "utilization",
    "ws-connections",
)
_BUILT_IN = re.compile(rf"{'|'.join(map(re.escape, BUILT_IN))}|response_\d+")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "equals": operator.eq,
    "not_equal": operator.ne,
    "greater_than": operator.gt,
    "greater_than_equal": operator.ge,
    "less_than": operator.lt,
    "less_than_equal": operator.le,
    "contains": operator.contains,
    "starts_with": str.startswith,
    "ends_with": str.endswith,
}
Comparator = Literal[
    "equals",
    "not_equal",
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "contains",
    "starts_with",
    "ends_with",
]


class Condition(msgspec.Struct, forbid_unknown_fields=True):
    """What an attribute is compared with."""

    attribute: str
    value: str | float | int | None
    comparator: Comparator = "equals"

    def holds(self, row: Row) -> bool:
        """Whether a row is wanted. What cannot be compared is not."""
        try:
            return _COMPARISONS[self.comparator](row[self.attribute], self.value)
        except TypeError:
            return False


class GetAnalytics(msgspec.Struct, forbid_unknown_fields=True):
    """One metric; times are in ms since 1970, `get_attributes` of none means all."""

    metric: str
    start_time: float | None = None
    end_time: float | None = None
    get_attributes: list[str] = []
    conditions: list[Condition] = []


class ListMetrics(msgspec.Struct, forbid_unknown_fields=True):
    """Which kinds of metrics."""

    metric_types: tuple[Literal["builtin", "custom"], ...] = ("builtin",)


class DescribeMetric(msgspec.Struct, forbid_unknown_fields=True):
    """One metric."""

    metric: str


class AnalyticsOperations:
    """Reads what is reported, what `waiting` to be, and the period that has not ended."""

    def __init__(self, scope: Scope, waiting: list[Row]) -> None:
        self._database = scope.database
        self._table = scope.database.analytics
        self._types = {str(column.name): _type(column) for column in self._table.c}
        self._analytics = scope.analytics
        self._waiting = waiting

    async def get_analytics(self, request: GetAnalytics) -> list[Row]:
        """A metric's rows, the newest 10,000 at most; last the unfinished period of this worker."""
        self._check("get_attributes", request.get_attributes)
        self._check("conditions", (one.attribute for one in request.conditions))
        start, end = request.start_time, request.end_time
        if start is not None and end is not None and end < start:
            message = "end_time: expected a moment that is not before 'start_time'"
            raise InvalidBody(message, param="end_time")
        found = await self._stored(request)
        known = {row["id"] for row in found}
        fresh = (row for row in self._fresh(request.metric) if row["id"] not in known)
        found += [row for row in fresh if _fits(row, request)]
        names = request.get_attributes or self._types
        return [_shown(row, names) for row in found[-_MOST_ROWS:]]

    async def list_metrics(self, request: ListMetrics) -> list[str]:
        """The names of metrics: by default those that the server measures itself."""
        found = {*await self._database.read(self._names), *(row["metric"] for row in self._fresh())}
        both = {
            "builtin": {*BUILT_IN, *filter(_is_built_in, found)},
            "custom": {name for name in found if not _is_built_in(name)},
        }
        return sorted(set[str]().union(*(both[kind] for kind in request.metric_types)))

    async def describe_metric(self, request: DescribeMetric) -> dict[str, Any]:
        """The attributes that a metric's rows have."""
        rows = self._fresh(request.metric) or await self._stored(GetAnalytics(request.metric), 1)
        if not rows and not _is_built_in(request.metric):
            message = f"Metric '{request.metric}' not found"
            raise NotFound(message)
        # A metric that has no rows yet may have any.
        names = [name for name in self._types if not rows or name in _has(rows[-1])]
        return {"attributes": [{"name": name, "type": self._types[name]} for name in names]}

    def _check(self, param: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._types:
                known = ", ".join(self._types)
                message = f"{param}: '{name}' is no attribute: there are {known}"
                raise InvalidBody(message, param=param)

    def _fresh(self, metric: str | None = None) -> list[Row]:
        """The rows that are in no database yet."""
        live = self._analytics.live(metric) if self._analytics else []
        return [row for row in self._waiting if metric in (None, row["metric"])] + live

    async def _stored(self, request: GetAnalytics, most: int = _MOST_ROWS) -> list[Row]:
        """A metric's rows that fit, in the order of time; the newest, if there are too many."""
        table = self._table
        select = sa.select(table).where(table.c.metric == request.metric)
        if request.start_time is not None:
            select = select.where(table.c.time >= request.start_time)
        if request.end_time is not None:
            select = select.where(table.c.time <= request.end_time)
        newest = select.order_by(table.c.time.desc(), table.c.id.desc())

        def work(connection: sa.Connection) -> list[Row]:
            found: list[Row] = []
            with connection.execution_options(yield_per=1000).execute(newest) as result:
                for one in result.mappings():
                    row = dict(one)
                    if _fits(row, request):
                        found.append(row)
                    if len(found) == most:
                        break
            return found[::-1]

        return await self._database.read(work)

    def _names(self, connection: sa.Connection) -> list[str]:
        """The metrics that have rows: from one to the next, as there are many rows of each."""
        found: list[str] = []
        column = self._table.c.metric
        name = connection.execute(sa.select(sa.func.min(column))).scalar()
        while name is not None:
            found.append(name)
            following = sa.select(sa.func.min(column)).where(column > name)
            name = connection.execute(following).scalar()
        return found


def _is_built_in(metric: str) -> bool:
    return _BUILT_IN.fullmatch(metric) is not None


def _fits(row: Row, request: GetAnalytics) -> bool:
    start, end = request.start_time, request.end_time
    in_time = (start is None or row["time"] >= start) and (end is None or row["time"] <= end)
    return in_time and all(condition.holds(row) for condition in request.conditions)


def _shown(row: Row, names: Iterable[str]) -> Row:
    """Those of these attributes that a row has."""
    return {name: row[name] for name in names if row[name] is not None}


def _has(row: Row) -> set[str]:
    """The attributes that a metric's rows may have, as one of them has them."""
    return {"id", "path", "method", "type", *_shown(row, row)}


def _type(column: sa.Column[Any]) -> str:
    return "string" if isinstance(column.type, sa.String) else "number"
