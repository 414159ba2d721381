"""The README's blocks, run as a newcomer would."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [match.groups() for match in BLOCK.finditer((REPOSITORY / "README.md").read_text())]


class Newcomer:
    """Follows the README in a folder, with one server running at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path, "OPENAI_API_KEY": "made-up"}
        self.server: subprocess.Popen[str] | None = None
        self.data = folder
        self.printed: list[str] = []

    def follow(self, language: str, text: str) -> str:
        """Do what a block says; what it prints."""
        if language == "text":
            assert text.strip() in self.printed[-1]
            return text
        first = text.partition("\n")[0]
        if first.startswith("# ") and "." in first:
            return self.write(first[2:], text)
        if language == "python":
            return self.run([sys.executable, "-c", text])
        command = text.strip()
        if "make run" in command:
            # As it stands, but for where the data goes.
            data = self.folder / "here"
            return self.serve(f"cd {REPOSITORY} && HARPERPY_ROOT={data} {command}", data)
        if re.search(r"harperpy (dev|run) ", command):
            return self.serve(command, self.folder / "demo" / ".harperpy")
        return self.run(["bash", "-ec", command])

    def write(self, name: str, text: str) -> str:
        """Put a file where the README has it; a config must pass the check."""
        place = self.folder / ("configured" if name == "config.yaml" else "demo") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return self.run(["harperpy", "check", "configured"]) if "configured" in str(place) else name

    def run(self, command: list[str]) -> str:
        """Run to the end, which must be a good one."""
        done = subprocess.run(  # noqa: PLW1510  # the code is asserted with what was said
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=120
        )
        assert 0 == done.returncode, f"{command}\n{done.stdout}{done.stderr}"
        assert '"error"' not in done.stdout, done.stdout
        return done.stdout

    def serve(self, command: str, data: Path) -> str:
        """Start a server in place of the last one, and wait until it is ready."""
        self.leave()
        self.server = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.data = data
        assert self.server.stdout is not None
        printed = ""
        for line in self.server.stdout:
            printed += line
            if line.startswith("Ready on"):
                break
        else:
            pytest.fail(f"{command} did not become ready:\n{printed}")
        if key := re.search(r"API key\s+(hk_\S+)", printed):
            self.environ["KEY"] = key[1]
        return printed

    def leave(self) -> None:
        """Stop the server."""
        if self.server is not None:
            # To the server itself, whatever started it.
            os.kill(int((self.data / "harperpy.lock").read_text()), signal.SIGTERM)
            self.server.communicate(timeout=60)
            assert 0 == self.server.returncode
            self.server = None


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    """Someone who follows the README, and leaves nothing running."""
    newcomer = Newcomer(tmp_path)
    try:
        yield newcomer
    finally:
        newcomer.leave()


def test_every_block_of_the_readme_works_in_order(newcomer: Newcomer) -> None:
    """A newcomer who runs the blocks from top to bottom sees each of them work."""
    for language, text in BLOCKS:
        newcomer.printed.append(newcomer.follow(language, text))
    told = "\n".join(newcomer.printed)
    for expected in ("5", '{"hello":"Ada"}', "HELLO THERE", "acme", "completion_tokens"):
        assert expected in told
