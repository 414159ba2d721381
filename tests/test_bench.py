"""The command that measures us next to others: its table comes out, and nothing is left running."""

import asyncio
import platform
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

import pytest

from commands import SECONDS, environment
from helpers import quiet_port

ROOT = Path(__file__).resolve().parents[1]
BENCH = (sys.executable, str(ROOT / "bench" / "run.py"))
SMALL = ("--only", "models", "--peers", "limit", "--rounds", "1")
CELL = re.compile(r"\| models \| ([\d.e-]+) \(≥ 0\.3\) (pass|short) \|")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


async def begin(port: int, *arguments: str) -> Process:
    """The command with its smallest load, on ports of its own."""
    command = (*BENCH, *SMALL, "--port", str(port), *arguments)
    return await asyncio.create_subprocess_exec(
        *command, env=environment(), cwd=ROOT, stdout=PIPE, stderr=PIPE
    )


def listening(port: int) -> bool:
    """Whether anybody answers at a port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


async def test_the_table_comes_out(tmp_path: Path) -> None:
    """A run of one scenario prints our ratio to the limit with its verdict, and writes the page."""
    page, before = tmp_path / "page.md", (ROOT / "bench" / "RESULTS.md").read_bytes()
    process = await begin(quiet_port(), "--seconds", "0.2", "--results", str(page))
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()

    assert process.returncode == 0, err.decode()
    found = CELL.search(out.decode())
    assert found
    assert found[2] == ("pass" if float(found[1]) >= 0.3 else "short")
    written = page.read_text()
    assert out.decode().strip() in written
    assert "harperpy 0." in written
    assert not {platform.node(), str(ROOT), str(tmp_path)} & {*re.split(r"[\s()]", written)}
    assert (ROOT / "bench" / "RESULTS.md").read_bytes() == before


async def test_ctrl_c_leaves_nothing_behind() -> None:
    """Who stops the command in the middle of a run finds none of its servers alive."""
    port = quiet_port()
    process = await begin(port, "--seconds", "60")
    assert process.stderr
    async with asyncio.timeout(SECONDS):
        while b"measured: harperpy, limit" not in await process.stderr.readline():
            pass
        assert listening(port)
        process.send_signal(signal.SIGINT)
        await process.communicate()

    assert process.returncode == 130
    assert [number for number in range(port, port + 4) if listening(number)] == []
