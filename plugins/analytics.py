"""Reports what is measured: rows in `system.hdb_analytics` once a period, and the operations.

A period ends with the clock (at each full minute, if it is one), so that rows of all workers have
the same time. What the server measures of itself is in `analytics_gauges`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from operator import attrgetter, methodcaller
from typing import Any

from sqlalchemy.dialects.sqlite import insert

from harperpy import Analytics, HarperError, ModelCall, Scope

from .analytics_gauges import Gauges
from .analytics_operations import AnalyticsOperations, DescribeMetric, GetAnalytics, ListMetrics

# Rows that wait for a database that is away: at most so many.
_MOST_WAITING = 10_000
_CLEANING_SECONDS = 3600.0
# Counted together, calls take a part of the time; so many are soon counted.
_TOGETHER = 512
_succeeded, _latency = attrgetter("success"), attrgetter("latency_ms")
_tokens = attrgetter("prompt_tokens", "completion_tokens", "embedding_tokens")


def handle_application(scope: Scope) -> None:
    """Add the operations; measure, report and clean where it is not turned off."""
    waiting: list[dict[str, Any]] = []
    operations = AnalyticsOperations(scope, waiting)
    scope.operations.add("get_analytics", operations.get_analytics, GetAnalytics, reads=True)
    scope.operations.add("list_metrics", operations.list_metrics, ListMetrics, reads=True)
    scope.operations.add("describe_metric", operations.describe_metric, DescribeMetric, reads=True)
    analytics = scope.analytics
    if analytics is None:
        return
    reporter = Reporter(scope, analytics, waiting)
    scope.ledger.subscribe(CallMeter(analytics).add)
    scope.on_close(reporter.close)
    scope.create_task(reporter.run(), name="analytics")
    if analytics.index == 0:
        scope.create_task(_clean(scope), name="analytics retention")


class Reporter:
    """Ends the periods, and holds their rows until they are in the database."""

    def __init__(self, scope: Scope, analytics: Analytics, waiting: list[dict[str, Any]]) -> None:
        self._analytics = analytics
        self._database = scope.database
        self._logger = scope.logger
        self._waiting = waiting
        self._gauges = Gauges(scope, analytics)

    async def run(self) -> None:
        """Report at the end of each period, for ever."""
        period = self._analytics.period
        while True:
            now = time.time()
            end = (now // period + 1) * period
            await asyncio.sleep(end - now)
            await self._gauges.measure()
            await self.report(end * 1000)

    async def close(self) -> None:
        """Report what has been counted until now, if anything has."""
        if self._waiting or not self._analytics.idle:
            await self.report()

    async def report(self, at: float | None = None) -> None:
        """End the period now and write its rows; those that cannot be written wait for the next."""
        waiting = self._waiting
        waiting += self._analytics.turn(at)
        self._gauges.begin()
        if (surplus := len(waiting) - _MOST_WAITING) > 0:
            self._logger.error("%d rows of analytics are lost: too many wait", surplus)
            del waiting[:surplus]
        if not waiting:
            return
        # A row that is there already was written by an attempt whose commit went unheard.
        rows = insert(self._database.analytics).on_conflict_do_nothing()
        batch = list(waiting)
        try:
            await self._database.run(methodcaller("execute", rows, batch))
        except Exception as error:  # noqa: BLE001  # whatever it is, the next attempt may succeed
            self._logger.warning("%d rows of analytics wait to be written: %s", len(batch), error)
        else:
            del waiting[: len(batch)]


class CallMeter:
    """Counts finished model calls by their backend and method, many at a time."""

    def __init__(self, analytics: Analytics) -> None:
        self._analytics = analytics
        self._ended: list[ModelCall] = []
        analytics.on_read(self._count)

    def add(self, call: ModelCall) -> None:
        """Take one more in."""
        ended = self._ended
        ended.append(call)
        if len(ended) >= _TOGETHER:
            self._count()

    def _count(self) -> None:
        ended, self._ended = self._ended, []
        groups: dict[tuple[str, str], list[ModelCall]] = defaultdict(list)
        for call in ended:
            groups[call.backend, call.method].append(call)
        for (backend, method), calls in groups.items():
            truths, numbers = self._analytics.ratio, self._analytics.distribution
            succeeded = sum(map(_succeeded, calls))
            truths("model_call", backend, method).add_many(len(calls), succeeded)
            numbers(f"model-{method}", backend).add_all(list(map(_latency, calls)))
            told = map(_tokens, calls)
            if tokens := [some for each in told if (some := sum(filter(None, each)))]:
                numbers(f"model-{method}-tokens", backend).add_all(tokens)
            if method == "generateStream":
                self._count_streams(backend, method, calls)

    def _count_streams(self, backend: str, method: str, calls: list[ModelCall]) -> None:
        numbers = self._analytics.distribution
        if firsts := [call.ttft_ms for call in calls if call.ttft_ms is not None]:
            numbers("ttft_ms", backend, method).add_all(firsts)
        if speeds := [speed for call in calls if (speed := _speed(call))]:
            numbers("tokens_per_s", backend, method).add_all(speeds)


def _speed(call: ModelCall) -> float | None:
    """Tokens a second after the first, whose time is known by itself."""
    more = (call.completion_tokens or 0) - 1
    seconds = 0.0 if call.ttft_ms is None else (call.latency_ms - call.ttft_ms) / 1000
    return more / seconds if seconds > 0 and more > 0 else None


async def _clean(scope: Scope) -> None:
    """Once an hour, remove the rows older than the retention; a busy database is left be."""
    table, kept = scope.database.analytics, scope.config.analytics.retention
    while True:
        try:
            await scope.database.prune(table, table.c.time < time.time() * 1000 - kept)
        except HarperError as error:
            scope.logger.warning("old rows of analytics stay for another hour: %s", error)
        await asyncio.sleep(_CLEANING_SECONDS)
