"""`http.workers: auto`: as many processes as the server may use processors."""

import os
import sys
from pathlib import Path

import pytest

from asking import children
from commands import ADMIN, ECHO, FREE, refusal, serving
from harperpy.processors import quota

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


@pytest.mark.parametrize("count", [1, 2])
async def test_auto_is_a_worker_for_each_processor(count: int, tmp_path: Path) -> None:
    """Of those that the process may use; one alone is a process without a parent."""
    if quota() < count:
        pytest.skip("its time is limited")
    (tmp_path / "config.yaml").write_text(AUTO)
    async with serving(tmp_path, "run", environ=ADMIN, within=kept_to(count)) as server:
        by = "" if count == 1 else " with 2 workers"
        assert f"Ready on {server.url}{by} (Ctrl-C stops)" in server.printed
        assert (0 if count == 1 else count) == len(children(server.process.pid))


async def test_auto_may_be_several(tmp_path: Path) -> None:
    """What each process would count by itself is refused, however many processors there are."""
    (tmp_path / "config.yaml").write_text(AUTO + "limits: {store: memory}\n")

    told = await refusal(tmp_path, "run", **ADMIN)

    assert "http.workers is auto: expected database" in told


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
