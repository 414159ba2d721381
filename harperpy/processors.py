"""The processors that this process may use, and how many processes are worth to be started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def processes(asked: int | Literal["auto"]) -> int:
    """As many as are asked for, or one for each processor that this process may use."""
    return asked if asked != "auto" else max(1, min(len(allowed()), int(quota())))


def allowed() -> list[int]:
    """The processors that this thread may run on."""
    if sys.platform != "linux":
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def shared(count: int) -> tuple[int, ...]:
    """The processors of so many processes, one for each; none where there are too few."""
    found = tuple(allowed())
    return found if sys.platform == "linux" and len(found) >= count else ()


def keep_to(*processors: int) -> None:
    """Run on these only: this thread, and the threads and processes that it starts from now on."""
    if sys.platform == "linux" and processors:
        os.sched_setaffinity(0, processors)


def quota(cgroup: Path = _CGROUP, cgroups: Path = _CGROUPS) -> float:
    """How many processors' time a container, or a service, leaves to this process."""
    return min(_quotas(cgroup, cgroups), default=float(len(allowed())))


def _quotas(cgroup: Path, cgroups: Path) -> Iterator[float]:
    """Each limit that holds for this process: of its own group, and of those around it."""
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        # In a container the groups around it are not there to be seen, or are its own.
        for folder in (Path(path), *Path(path).parents):
            place = cgroups / controllers / folder.relative_to("/")
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            yield from _parts(" ".join(_read(place / name) for name in files))


def _parts(text: str) -> Iterator[float]:
    """The quota in what a group's files say, unless they say none."""
    match text.split():
        case [part, whole] if part.isdecimal() and int(part) and int(whole):
            yield int(part) / int(whole)
        case _:
            pass


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
