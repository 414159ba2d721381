"""What the machine says of processes (Linux's /proc), and what it is itself."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
# The servers have the first processor, load and provider the others; one alone is shared.
ALL_CPUS = os.sched_getaffinity(0)
SERVER_CPUS = {min(ALL_CPUS)}
LOAD_CPUS = ALL_CPUS - SERVER_CPUS or ALL_CPUS


def family(pid: int) -> list[int]:
    """A process and all that come of it."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_ns(pids: Iterable[int]) -> int:
    """The processor time that these processes have had in all their threads."""
    total = 0
    for pid in pids:
        for task in PROC.glob(f"{pid}/task/*/schedstat"):
            with suppress(OSError):
                total += int(task.read_text().split()[0])
    return total


def memory_kib(pids: Iterable[int]) -> int:
    """The memory of these processes, what they share with others by its share (PSS)."""
    total = 0
    for pid in pids:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def busy_ns() -> int:
    """How long all processors have worked, in steps of ten milliseconds."""
    with (PROC / "stat").open() as file:
        user, nice, system, _idle, _waits, *rest = map(int, file.readline().split()[1:9])
    return (user + nice + system + sum(rest)) * 10_000_000


def described() -> str:
    """The machine in a few words, without its name."""
    lines = (PROC / "cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processors = f"{len(ALL_CPUS)} processors"
    kind = models[0] if models else platform.machine()
    return f"{processors} ({kind}), {gib:.0f} GiB of memory, {platform.system()}"
