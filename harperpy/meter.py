"""Meter: what a port measures of its requests and connections."""

from __future__ import annotations

from collections.abc import Callable

from .analytics import Analytics, Distribution, Ratio
from .resource import METHOD_VERBS

_METHODS = frozenset({*METHOD_VERBS, "OPTIONS"})
_OTHER = "other"


class Meter:
    """Counts into the analytics, under the name of a port and a `kind`, the column `type`."""

    def __init__(self, analytics: Analytics, port: str, kind: str | None = None) -> None:
        self._analytics = analytics
        self._port = port
        self._kind = kind
        self._requests: dict[tuple[str | None, str], _Requests] = {}
        analytics.on_turn(self._requests.clear)

    def watch(self, connections: Callable[[], int], sockets: Callable[[], int]) -> None:
        """Report how many connections, and how many WebSockets, there are."""
        self._analytics.record(connections, "connections", self._port)
        self._analytics.record(sockets, "ws-connections", self._port)

    def connected(self) -> None:
        """A client has connected."""
        self._analytics.record(True, "connection", self._port)  # noqa: FBT003

    def answered(  # noqa: PLR0917  # all that is known of an answer
        self, path: str | None, method: str, status: int, ms: float, sent: int, received: int
    ) -> None:
        """An answer's head was ready after so long; so many bytes of bodies in both directions."""
        requests = self._requests.get((path, method)) or self._series(path, method)
        requests.duration.add(ms)
        requests.success.add(status < 400)
        (requests.statuses.get(status) or requests.status(status)).add(True)  # noqa: FBT003
        requests.sent.add(sent)
        if received:
            self._analytics.record(received, "bytes-received", path, requests.method, self._kind)

    def transferred(self, path: str | None, method: str, ms: float) -> None:
        """A stream took so long from its head to its end."""
        requests = self._requests.get((path, method)) or self._series(path, method)
        self._analytics.record(ms, "transfer", path, requests.method, self._kind)

    def lost(self, path: str | None, method: str) -> None:
        """The client left before its answer was complete."""
        requests = self._requests.get((path, method)) or self._series(path, method)
        requests.success.add(False)  # noqa: FBT003

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

    __slots__ = (
        "_analytics",
        "_kind",
        "_path",
        "duration",
        "method",
        "sent",
        "statuses",
        "success",
    )

    def __init__(
        self, analytics: Analytics, path: str | None, method: str, kind: str | None
    ) -> None:
        self._analytics, self._path, self._kind = analytics, path, kind
        self.method = method
        self.duration: Distribution = analytics.distribution("duration", path, method, kind)
        self.success: Ratio = analytics.ratio("success", path, method, kind)
        self.sent: Distribution = analytics.distribution("bytes-sent", path, method, kind)
        self.statuses: dict[int, Ratio] = {}

    def status(self, status: int) -> Ratio:
        """The series of the answers with this status."""
        metric = f"response_{status}"
        made = self._analytics.ratio(metric, self._path, self.method, self._kind)
        self.statuses[status] = made
        return made
