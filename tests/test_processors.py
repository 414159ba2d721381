"""Workers and processors: as many of the one as of the other, and each on its own."""

import os
import signal
import sys
from pathlib import Path

import pytest

from asking import children
from commands import ADMIN, ECHO, FREE, serving
from harperpy import ConfigError
from harperpy.processors import quota
from harperpy.testing import running
from helpers import until
from llama import weights

AUTO = FREE.replace("port: 0}", "port: 0, workers: auto}", 1) + ECHO
KEEP = """
import os, sys

os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execvp(sys.argv[2], sys.argv[2:])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that pins")


def kept_to(count: int) -> tuple[str, ...]:
    """What has a command use so many processors; skips the test where there are fewer."""
    given = sorted(os.sched_getaffinity(0))[:count]
    if len(given) < count:
        pytest.skip(f"needs {count} processors")
    return (sys.executable, "-c", KEEP, ",".join(map(str, given)))


async def test_auto_with_one_processor_is_one_process(tmp_path: Path) -> None:
    """It has no parent."""
    (tmp_path / "config.yaml").write_text(AUTO)
    async with serving(tmp_path, "run", environ=ADMIN, within=kept_to(1)) as server:
        assert f"Ready on {server.url} (Ctrl-C stops)" in server.printed
        assert [] == children(server.process.pid)


async def test_auto_may_be_several() -> None:
    """What each process would count by itself is refused, however many processors there are."""
    with pytest.raises(ConfigError, match="workers is auto: expected database"):
        async with running(config=AUTO + "limits: {store: memory}\n"):
            pytest.fail("it started")


# Who runs where


def where(*pids: str) -> list[set[int]]:
    """The processors that the main threads of these may run on."""
    return [os.sched_getaffinity(int(pid)) for pid in pids]


def threads(pid: str) -> list[set[int]]:
    """The processors that each thread of a process may run on."""
    return where(*(task.name for task in Path(f"/proc/{pid}/task").iterdir()))


async def test_auto_is_a_worker_for_each_processor_that_keeps_to_it(tmp_path: Path) -> None:
    """Also one that is started again; its parent, and what runs beside its loop, may use all."""
    if quota() < 2:
        pytest.skip("the time is limited")
    weights()
    (tmp_path / "config.yaml").write_text(AUTO.replace("backend: echo", "backend: local", 1))
    async with serving(tmp_path, "run", environ=ADMIN, within=kept_to(2)) as server:
        parent = str(server.process.pid)
        both = sorted(where(parent)[0])
        first, other = children(server.process.pid)
        assert f"Ready on {server.url} with 2 workers" in server.printed
        assert [{one} for one in both] == where(first, other)
        assert {*both} in threads(other)
        # Its loop, and what writes to the database.
        assert 2 == threads(other).count({both[1]})

        os.kill(int(first), signal.SIGKILL)
        await until(lambda: {other} < {*children(server.process.pid)} - {first})
        (again,) = {*children(server.process.pid)} - {other}
        await until(lambda: [{both[0]}] == where(again))

        # Whichever of them has the local model by now, and whenever it started it.
        await until(lambda: [{*both}] == where(*children(int(again)), *children(int(other))))


@pytest.mark.parametrize("http", ["workers: 2, pinWorkers: false", "workers: 3"])
async def test_nobody_is_pinned_who_is_not_to_be(http: str, tmp_path: Path) -> None:
    """By `pinWorkers: false`, or as there are more workers than processors."""
    (tmp_path / "config.yaml").write_text(AUTO.replace("workers: auto", http))
    async with serving(tmp_path, "run", environ=ADMIN, within=kept_to(2)) as server:
        (parent,) = where(str(server.process.pid))
        assert 2 == len(parent)
        assert all(parent == one for one in where(*children(server.process.pid)))


# How much of a processor's time a container has


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a", {"cpu.max": "200000 100000", "a/cpu.max": "400000 100000"}, 2.0),
        (
            "3:cpu,cpuacct:/a\n0::/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "3:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("2:cpuset:/a\n0::/a", {"a/cpu.max": "max 100000", "cpuset/cpu.max": "1 1"}, None),
        ("", {}, None),
    ],
)
def test_the_least_quota_of_the_groups_around_a_process_holds(
    cgroup: str, files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    """By either version of the kernel's groups; without one it is all processors."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(cgroup + "\n" if cgroup else "")

    found = quota(tmp_path / "cgroup", tmp_path)

    assert (expected or len(os.sched_getaffinity(0))) == found
