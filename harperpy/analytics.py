"""Analytics: what is measured, in series of bounded size, until somebody reports it."""

from __future__ import annotations

import inspect
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import exp, log
from typing import Any, TypeAlias, TypeVar

Key: TypeAlias = tuple[str, str | None, str | None, str | None]
"""Metric, path, method and type: what tells one series from another."""
Row: TypeAlias = dict[str, Any]
"""A row of `system.hdb_analytics`."""

# Neighbouring buckets are 2 % apart: what stands for all in one is within 1 % of each.
_STEP = log(1.02)
_PER_STEP = 1 / _STEP
_MIDDLE = log(2 * 1.02 / 2.02)
_SMALLEST, _LARGEST = 1e-9, 1e24
_LEAST = -_LARGEST
_ZERO = 1.0 - log(_SMALLEST) * _PER_STEP
_NUMBERS = (float, int)
_PERCENTILES = {
    "p1": 0.01,
    "p10": 0.1,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p95": 0.95,
    "p99": 0.99,
    "p999": 0.999,
}
_OTHER = "other"
MOST_SERIES = 1000
"""So many series a period; what is new then counts as `other`."""
# For each metric's `other`, before they too become one.
_SPARE_SERIES = 100

logger = logging.getLogger("harperpy.analytics")


class Distribution:
    """Numbers. Each percentile is within 1 % of the least value that so many of them do not exceed.

    What is nearer to 0 than 1e-9 counts as 0. Equal numbers have exact percentiles.
    """

    __slots__ = ("_buckets", "_largest", "_smallest", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._smallest, self._largest = _LARGEST, -_LARGEST
        self._buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Take one more in; between -1e24 and 1e24."""
        self.count += 1
        self.total += value
        if value < self._smallest:  # noqa: PLR1730  # a third of the time
            self._smallest = value
        if value > self._largest:  # noqa: PLR1730
            self._largest = value
        bucket = _bucket(value)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def add_all(self, values: Sequence[float]) -> None:
        """Take in all of these, of which there is one at least, in a part of the time."""
        ranked = sorted(values)
        self.count += len(ranked)
        self.total += sum(ranked)
        self._smallest = min(self._smallest, ranked[0])
        self._largest = max(self._largest, ranked[-1])
        end = 0
        while end < len(ranked):
            begin, value = end, ranked[end]
            bucket = _bucket(value)
            most = exp((bucket + 1 - _ZERO) * _STEP) if bucket > 0 else value
            end = bisect_right(ranked, most, begin + 1)
            self._buckets[bucket] = self._buckets.get(bucket, 0) + end - begin

    def columns(self) -> Row:
        """What its row says."""
        row: Row = {"count": self.count, "total": self.total, "mean": self.total / self.count}
        # One copy: a plugin's thread may add while this runs.
        buckets = sorted(list(self._buckets.items()))  # noqa: C414
        among = sum(count for _, count in buckets)
        at, seen, bucket = iter(buckets), 0, 0
        for name, share in _PERCENTILES.items():
            while seen < share * among:
                bucket, count = next(at)
                seen += count
            row[name] = min(max(_value(bucket), self._smallest), self._largest)
        return row


class Ratio:
    """How many of so many were true."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.count = self.total = 0

    def add(self, value: bool) -> None:  # noqa: FBT001  # the one thing it takes
        """Take one more in."""
        self.count += 1
        self.total += value

    def add_many(self, count: int, total: int) -> None:
        """Take in so many more, of which so many were true."""
        self.count += count
        self.total += total

    def columns(self) -> Row:
        """What its row says."""
        return {"count": self.count, "total": self.total, "ratio": self.total / self.count}


Series: TypeAlias = Distribution | Ratio
S = TypeVar("S", Distribution, Ratio)


class Analytics:
    """What one process measures. A series costs bounded memory, and a value less than 1 µs.

    `index` and `of`: which of how many processes this is; it stands in the rows as `worker`.
    `record` may be called in any thread; two that do so at the same instant may count as one.
    """

    def __init__(self, period: float, index: int = 0, of: int = 1) -> None:
        self.period = period
        self.index, self._of = index, of
        self._numbers: dict[Key, Distribution] = {}
        self._ratios: dict[Key, Ratio] = {}
        self._gauges: dict[Key, Callable[[], Any]] = {}
        self._read: list[Callable[[], None]] = []
        self._turned: list[Callable[[], None]] = []
        self._began = time.perf_counter()
        self._last_id = 0
        self._warned = False

    def record(
        self,
        value: float | Callable[[], float],
        metric: str,
        path: str | None = None,
        method: str | None = None,
        type: str | None = None,  # noqa: A002  # as the column is called
    ) -> None:
        """Take a value of a metric, as `PluginServer.record_action` says."""
        key = (metric, path, method, type)
        if value is True or value is False:
            (self._ratios.get(key) or self.ratio(*key)).add(value)
        elif isinstance(value, _NUMBERS):
            if not _LEAST <= value <= _LARGEST:
                raise _out_of_range(value)
            (self._numbers.get(key) or self.distribution(*key)).add(value)
        elif callable(value) and not inspect.iscoroutinefunction(value):
            self._watch(_checked(key), value)
        else:
            raise _no_metric(value)

    def distribution(
        self,
        metric: str,
        path: str | None = None,
        method: str | None = None,
        kind: str | None = None,
    ) -> Distribution:
        """The series of a metric's numbers, until the period ends."""
        return self._series(self._numbers, (metric, path, method, kind), Distribution)

    def ratio(
        self,
        metric: str,
        path: str | None = None,
        method: str | None = None,
        kind: str | None = None,
    ) -> Ratio:
        """The series of a metric's truths, until the period ends."""
        return self._series(self._ratios, (metric, path, method, kind), Ratio)

    def on_read(self, function: Callable[[], None]) -> None:
        """Call this before anything is read: who adds many values at a time is to add the rest."""
        self._read.append(function)

    def on_turn(self, function: Callable[[], None]) -> None:
        """Call this when a period ends: who keeps series is to let go of them."""
        self._turned.append(function)

    def live(self, metric: str | None = None) -> list[Row]:
        """The rows of the period that has not ended, of all metrics or one; their id is None."""
        now, began = time.time_ns() / 1e6, self._began
        common = {"period": (time.perf_counter() - began) * 1000, "time": now, "worker": self.index}
        return [
            {**_EMPTY, **common, **_named(key), **series.columns()}
            for key, series in self._measured(metric)
        ]

    def turn(self, at: float | None = None) -> list[Row]:
        """End the period: its rows, whose time is `at` (ms since 1970) or now. A new one begins."""
        rows = self.live()
        self._numbers, self._ratios = {}, {}
        self._began = time.perf_counter()
        for function in self._turned:
            function()
        for row in rows:
            row["id"] = self._next_id()
            row["time"] = row["time"] if at is None else at
        return rows

    def _gather(self) -> None:
        for function in self._read:
            function()

    def _measured(self, metric: str | None) -> Iterator[tuple[Key, Series]]:
        self._gather()
        counted: list[tuple[Key, Series]] = [*self._numbers.items(), *self._ratios.items()]
        for key, series in counted:
            if series.count and metric in (None, key[0]):
                yield key, series
        for key, function in list(self._gauges.items()):
            if metric in (None, key[0]):
                try:
                    yield key, _read(function())
                except Exception:
                    logger.exception("the metric %r cannot be measured", key[0])

    def _series(self, series: dict[Key, S], key: Key, make: Callable[[], S]) -> S:
        """The series of this key; where there are too many, the one that stands for the rest."""
        _checked(key)
        others: tuple[tuple[Key, int], ...] = (
            (key, MOST_SERIES),
            ((key[0], _OTHER, None, None), MOST_SERIES + _SPARE_SERIES),
        )
        for one, most in others:
            if one in series:
                return series[one]
            if self._held < most:
                return series.setdefault(one, make())
            self._warn()
        return series.setdefault((_OTHER, None, None, None), make())

    @property
    def idle(self) -> bool:
        """Whether nothing has been counted in this period."""
        self._gather()
        return not self._held

    @property
    def _held(self) -> int:
        return len(self._numbers) + len(self._ratios)

    def _watch(self, key: Key, function: Callable[[], Any]) -> None:
        if key in self._gauges or len(self._gauges) < MOST_SERIES:
            self._gauges[key] = function
        else:
            self._warn()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            message = "more than %d series are measured: what is new counts as %r"
            logger.warning(message, MOST_SERIES, _OTHER)

    def _next_id(self) -> int:
        """Microseconds since 1970, always above the last, and no other process's."""
        least = max(self._last_id + 1, time.time_ns() // 1000)
        self._last_id = least + (self.index - least) % self._of
        return self._last_id


_EMPTY: Row = dict.fromkeys(("id", "count", "total", "mean", *_PERCENTILES, "ratio"))


def _bucket(value: float) -> int:
    if value > _SMALLEST:
        return int(log(value) * _PER_STEP + _ZERO)
    return -int(log(-value) * _PER_STEP + _ZERO) if value < -_SMALLEST else 0


def _value(bucket: int) -> float:
    """What stands for all that is in a bucket."""
    if bucket == 0:
        return 0.0
    size = exp((abs(bucket) - _ZERO) * _STEP + _MIDDLE)
    return size if bucket > 0 else -size


def _checked(key: Key) -> Key:
    """The key. Raises `TypeError` for a part that is no text."""
    for name, part in zip(("metric", "path", "method", "type"), key, strict=True):
        if not isinstance(part, str) and (part is not None or name == "metric"):
            message = f"{name}: expected a string, got {part.__class__.__name__}"
            raise TypeError(message)
    return key


def _named(key: Key) -> Row:
    """The columns of a key, as text that a database takes."""
    names = ("metric", "path", "method", "type")
    parts = (part and part.encode(errors="replace").decode() for part in key)
    return dict(zip(names, parts, strict=True))


def _read(value: Any) -> Series:
    """What a function has measured, as a series of its own."""
    if isinstance(value, bool):
        ratio = Ratio()
        ratio.add(value)
        return ratio
    if not isinstance(value, int | float):
        raise _no_metric(value)
    if not -_LARGEST <= value <= _LARGEST:
        raise _out_of_range(value)
    distribution = Distribution()
    distribution.add(value)
    return distribution


def _no_metric(value: object) -> TypeError:
    kind = value.__class__.__name__
    return TypeError(f"Invalid metric value type {kind}: expected a number, a bool or a function")


def _out_of_range(value: float) -> ValueError:
    return ValueError(f"value: expected a number between -1e24 and 1e24, got {value}")
