"""Logs: `read_log`, the last records that this process has logged."""

from __future__ import annotations

import datetime as dt
import logging
from collections import deque
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harperpy import Scope, mask

from .usage import Moment, moment

_KEPT = 2000
_LONGEST = 4000
_LEVELS = {"WARNING": "warn", "CRITICAL": "fatal"}

Level = Literal["debug", "info", "warn", "error", "fatal"]


class ReadLog(msgspec.Struct, forbid_unknown_fields=True):
    """Which records: of a level, of a time, with a text in them; how many, from which on."""

    level: Level | None = None
    from_: Moment | None = msgspec.field(name="from", default=None)
    until: Moment | None = None
    filter: str = ""
    order: Literal["asc", "desc"] = "desc"
    start: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=_KEPT)] = 1000


def add_operations(scope: Scope) -> None:
    """Keep what is logged from now on, and offer it to super users."""
    ring = Ring()
    logger = logging.getLogger("harperpy")
    logger.addHandler(ring)
    scope.on_close(lambda: logger.removeHandler(ring))
    scope.operations.add("read_log", ring.read, ReadLog, reads=True)


class Ring(logging.Handler):
    """The last records, their secrets hidden."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[tuple[float, dict[str, Any]]] = deque(maxlen=_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  # as logging itself, which never fails its caller
            message = str(record.msg)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            message = f"{message}: {type(error).__name__}: {error}"
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        shown = {
            "level": _LEVELS.get(record.levelname, record.levelname.lower()),
            "message": mask(message[:_LONGEST]),
            "timestamp": at.isoformat(),
            "thread": record.threadName,
            "tags": [record.name],
        }
        self._kept.append((at.timestamp() * 1000, shown))

    def read(self, request: ReadLog) -> list[dict[str, Any]]:
        """The last records of this process, the newest first."""
        since = None if request.from_ is None else moment(request.from_, "from")
        until = None if request.until is None else moment(request.until, "until")
        found = [
            shown
            for at, shown in [*self._kept]
            if (since is None or at >= since)
            and (until is None or at < until)
            and request.level in (None, shown["level"])
            and request.filter in shown["message"]
        ]
        if request.order == "desc":
            found.reverse()
        return found[request.start : request.start + request.limit]
