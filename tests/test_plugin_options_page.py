"""The blocks of docs/plugin-options.md, run from top to bottom."""

import re
from pathlib import Path

from asking import put
from commands import ECHO, FREE, execute, serving, until

PAGE = Path(__file__).parent.parent / "docs" / "plugin-options.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


async def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """Its plugins start, changed options are taken over, and commands print what it says."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    project = tmp_path / "project"
    (project / "plugins").mkdir(parents=True)
    (project / "pages" / "de").mkdir(parents=True)
    (project / "pages" / "de" / "hello.txt").write_text("Hallo")
    for language, text in blocks:
        if language == "python":
            (project / text.split("\n", 1)[0].removeprefix("# ")).write_text(text)
    first, second = (f"{FREE}{ECHO}{text}" for language, text in blocks if language == "yaml")
    put(project / "config.yaml", first)

    printed, compared = "", 0
    async with serving(project) as server:
        put(project / "config.yaml", second)
        printed = await until(server.process, "taken over: ")
        for language, text in blocks:
            if language == "sh":
                done = await execute(project, "bash", "-ec", text, URL=server.url)
                assert (0, "") == (done.code, done.err), text
                printed = done.out
            elif language == "text":
                assert text.strip() == printed.strip()
                compared += 1
    assert 5 == compared
