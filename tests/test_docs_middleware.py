"""The blocks of docs/middleware.md, run in order."""

import asyncio
import os
import re
from pathlib import Path

from harperpy.testing import ECHO, running
from helpers import ask

PAGE = Path(__file__).parent.parent / "docs" / "middleware.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


async def test_every_block_of_the_page_works_in_order(tmp_path: Path) -> None:
    """The program starts, and the commands print what the page says."""
    (_, program), (_, commands), (_, expected), *more = BLOCK.findall(PAGE.read_text())
    (tmp_path / "resources.py").write_text(program)

    async with running(ECHO, directory=tmp_path) as server:
        shell = await asyncio.create_subprocess_exec(
            "bash",
            "-euc",
            commands,
            env={**os.environ, "URL": server.url},
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await shell.communicate()
        last = await ask(server, "GET", "/hello", key="")

    assert [] == more
    assert (0, expected) == (shell.returncode, printed.decode())
    assert "Slow down." == last.json["detail"]
    assert re.fullmatch(r"total;dur=\d+\.\d\d", last.headers["Server-Timing"])
