"""The blocks of docs/deployment.md, run in order."""

import re
from pathlib import Path

from commands import execute
from helpers import quiet_port

PAGE = Path(__file__).parent.parent / "docs" / "deployment.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


async def test_every_block_of_the_page_works_in_order(tmp_path: Path) -> None:
    """Two workers start, answer, and end; the commands print what the page says."""
    ports = {usual: str(quiet_port()) for usual in ("9926", "9925")}
    page = re.sub("9926|9925", lambda found: ports[found[0]], PAGE.read_text())
    (_, config), (_, commands), (_, expected), *more = BLOCK.findall(page)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text(config)

    done = await execute(tmp_path, "bash", "-euc", commands)

    assert [] == more
    assert (0, "") == (done.code, done.err), done
    assert expected == done.out
