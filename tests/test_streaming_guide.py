"""The blocks of docs/streaming.md, run from top to bottom."""

import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "streaming.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_block_of_the_guide_works_in_order(tmp_path: Path) -> None:
    """Commands end well, files go where they say, and the project's tests pass."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path}
    printed = ""
    for language, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if language == "python":
            (tmp_path / "demo" / text.partition("\n")[0].removeprefix("# ")).write_text(text)
            continue
        assert "bash" == language
        done = subprocess.run(
            ["bash", "-ec", text],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert 0 == done.returncode, f"{text}\n{done.stdout}{done.stderr}"
        printed += done.stdout

    assert "2 passed" in printed
    assert "1 passed" in printed
