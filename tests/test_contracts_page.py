"""The blocks of docs/contracts.md, run from top to bottom."""

import asyncio
import os
import re
from contextlib import AsyncExitStack
from pathlib import Path

from harperpy.testing import ECHO, RunningServer, running

PAGE = Path(__file__).parent.parent / "docs" / "contracts.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


async def shell(command: str, server: RunningServer) -> str:
    """What a command prints, sent to this server."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-ec", command.replace("http://localhost:9926", server.url)),
        env={**os.environ, "KEY": server.api_key},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert 0 == process.returncode, command
    return output.decode()


async def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """Each file starts a server, each command prints what stands below it."""
    printed, compared = "", 0
    async with AsyncExitStack() as stack:
        server: RunningServer | None = None
        for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            if language == "text":
                assert text.strip() in printed
                compared += 1
            elif language == "sh":
                assert server is not None
                printed = await shell(text, server)
            else:
                folder = tmp_path / str(compared)
                folder.mkdir()
                if language == "python":
                    (folder / "resources.py").write_text(text)
                config = f"{ECHO}\n{text if language == 'yaml' else ''}"
                server = await stack.enter_async_context(running(config, directory=folder))
                states = server.server.health.plugins
                assert {"ok"} == {one.status for one in states.values()}
    assert 5 == compared
