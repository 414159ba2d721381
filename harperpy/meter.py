"""Meter: what a port measures of its requests and connections."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeAlias

from .analytics import Analytics, Ratio
from .context import Context
from .resource import METHOD_VERBS

_METHODS = frozenset({*METHOD_VERBS, "OPTIONS"})
_OTHER = "other"
# Counted together, answers take a part of the time; so many are soon counted.
_TOGETHER = 512
_Answer: TypeAlias = tuple[tuple[str | None, str], int, float, int, int]
"""Its path and method, its status, its milliseconds, its bytes, and those of its request."""


class Meter:
    """Counts into the analytics, under the name of a port and a `kind`, the column `type`."""

    def __init__(self, analytics: Analytics, port: str, kind: str | None = None) -> None:
        self._analytics = analytics
        self._port = port
        self._kind = kind
        self._answers: list[_Answer] = []
        self._requests: dict[tuple[str | None, str], _Requests] = {}
        analytics.on_read(self._count)
        analytics.on_turn(self._requests.clear)

    def watch(self, connections: Callable[[], int], sockets: Callable[[], int]) -> None:
        """Report how many connections, and how many WebSockets, there are."""
        self._analytics.record(connections, "connections", self._port)
        self._analytics.record(sockets, "ws-connections", self._port)

    def connected(self) -> None:
        """A client has connected."""
        self._analytics.record(True, "connection", self._port)  # noqa: FBT003

    def answered(
        self,
        context: Context,
        status: int,
        sent: int,
        received: int,
        ready: float | None = None,
    ) -> None:
        """An answer's head is ready, or was then; so many bytes of bodies in both directions."""
        ms = ((ready or perf_counter()) - context.started) * 1000
        answers = self._answers
        answers.append(((context.app, context.request.method), status, ms, sent, received))
        if len(answers) >= _TOGETHER:
            self._count()

    def transferred(self, path: str | None, method: str, ms: float) -> None:
        """A stream took so long from its head to its end."""
        method = self._series(path, method).method
        self._analytics.record(ms, "transfer", path, method, self._kind)

    def lost(self, path: str | None, method: str) -> None:
        """The client left before its answer was complete."""
        self._series(path, method).success.add(False)  # noqa: FBT003

    def _count(self) -> None:
        answers, self._answers = self._answers, []
        groups: dict[tuple[str | None, str], list[_Answer]] = defaultdict(list)
        for answer in answers:
            groups[answer[0]].append(answer)
        for key, group in groups.items():
            self._series(*key).add_all(group)

    def _series(self, path: str | None, method: str) -> _Requests:
        """Those of one mount and method. A method that nobody knows is no series of its own."""
        if method not in _METHODS:
            method = _OTHER
        key = (path, method)
        if key not in self._requests:
            self._requests[key] = _Requests(self._analytics, path, method, self._kind)
        return self._requests[key]


class _Requests:
    """The series of the requests by one method for one mount."""

    __slots__ = ("_analytics", "_duration", "_key", "_sent", "method", "success")

    def __init__(
        self, analytics: Analytics, path: str | None, method: str, kind: str | None
    ) -> None:
        self._analytics = analytics
        self._key = path, method, kind
        self.method = method
        self._duration = analytics.distribution("duration", *self._key)
        self.success: Ratio = analytics.ratio("success", *self._key)
        self._sent = analytics.distribution("bytes-sent", *self._key)

    def add_all(self, answers: Sequence[_Answer]) -> None:
        """Take in all of these."""
        analytics, key = self._analytics, self._key
        _, statuses, ms, sent, received = zip(*answers, strict=True)
        self._duration.add_all(ms)
        self._sent.add_all(sent)
        for status, count in Counter(statuses).items():
            self.success.add_many(count, count * (status < 400))
            analytics.ratio(f"response_{status}", *key).add_many(count, count)
        if any(received):
            analytics.distribution("bytes-received", *key).add_all([*filter(None, received)])
