"""Reports what is measured: rows in `system.hdb_analytics` once a period, and the operations.

A period ends with the clock (at each full minute, if it is one), so that rows of all workers have
the same time. What the server measures of itself is in `analytics_gauges`.
"""

from __future__ import annotations

import asyncio
import time
from operator import methodcaller
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from harperpy import Analytics, HarperError, ModelCall, Scope

from .analytics_gauges import Gauges
from .analytics_operations import AnalyticsOperations, DescribeMetric, GetAnalytics, ListMetrics

# Rows that wait for a database that is away: at most so many.
_MOST_WAITING = 10_000
_CLEANING_SECONDS = 3600.0


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
    scope.ledger.subscribe(lambda call: measure_call(analytics, call))
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


def measure_call(analytics: Analytics, call: ModelCall) -> None:
    """Count a finished model call, by its backend and method."""
    backend, method = call.backend, call.method
    record = analytics.record
    record(call.success, "model_call", backend, method)
    record(call.latency_ms, f"model-{method}", backend)
    tokens = (call.prompt_tokens, call.completion_tokens, call.embedding_tokens)
    if any(tokens):
        record(sum(filter(None, tokens)), f"model-{method}-tokens", backend)
    if method != "generateStream" or call.ttft_ms is None:
        return
    record(call.ttft_ms, "ttft_ms", backend, method)
    # The first token's time is known by itself.
    seconds, more = (call.latency_ms - call.ttft_ms) / 1000, (call.completion_tokens or 0) - 1
    if seconds > 0 and more > 0:
        record(more / seconds, "tokens_per_s", backend, method)


async def _clean(scope: Scope) -> None:
    """Once an hour, remove the rows older than the retention; a busy database is left be."""
    table, kept = scope.database.analytics, scope.config.analytics.retention
    while True:
        old = sa.delete(table).where(table.c.time < time.time() * 1000 - kept)
        try:
            await scope.database.run(methodcaller("execute", old))
        except HarperError as error:
            scope.logger.warning("old rows of analytics stay for another hour: %s", error)
        await asyncio.sleep(_CLEANING_SECONDS)
