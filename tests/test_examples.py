"""`examples/`, which `harperpy init --template` copies: each as whoever follows its README."""

import ast
import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import harperpy.testing
from harperpy.scaffold import TEMPLATES
from harperpy.testing import running
from helpers import ask

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = {str(file.relative_to(EXAMPLES)): file for file in sorted(EXAMPLES.rglob("*.py"))}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FREE = "http: {port: 0}\noperationsApi: {network: {port: 0}}\n"
SECONDS = 120


class Follower:
    """Follows a README in a new project, with one server running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"
        # Of pytest's plugins what `harperpy[testing]` brings, and not what else is installed here.
        plugins = "pytest_asyncio.plugin,pytest_aiohttp.plugin"
        only = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": plugins}
        self.environ = {**ours, **only, "PATH": path}
        self.url = ""
        self.printed = ""

    async def follow(self, language: str, text: str) -> None:
        """Do what a block says; compare what it says was printed."""
        text = text.replace("http://localhost:9926", self.url)
        # An isolated build would ask the network for setuptools.
        text = text.replace("python -m build", "python -m build --no-isolation")
        match language:
            case "sh":
                self.printed = await self.run("bash", "-ec", text)
            case "python":
                self.printed = await self.run(sys.executable, "-c", text)
            case "text":
                assert text.strip() in self.printed

    async def run(self, *command: str) -> str:
        """What a command prints; it must end well."""
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            env=self.environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(SECONDS):
                printed = (await process.communicate())[0].decode()
        except TimeoutError:
            process.kill()
            raise
        assert 0 == process.returncode, f"{command}\n{printed}"
        return printed

    @asynccontextmanager
    async def serving(self, command: str) -> AsyncIterator[None]:
        """The server of a README's first block, until the others are done."""
        for name, value in re.findall(r"^export (\w+)=(.*)$", command, re.MULTILINE):
            self.environ[name] = value
        command = command.replace("harperpy dev", "exec harperpy dev --no-reload")
        with (self.folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *("bash", "-ec", command),
                cwd=self.folder,
                env=self.environ,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        try:
            async with asyncio.timeout(SECONDS):
                await self.read(process)
            yield
        finally:
            process.terminate()
            await process.communicate()
        assert 0 == process.returncode, (self.folder / "log").read_text()

    async def read(self, process: asyncio.subprocess.Process) -> None:
        """Read the banner of a first start up to its last line."""
        assert process.stdout is not None
        told = ""
        while line := (await process.stdout.readline()).decode():
            told += line
            if line.startswith("Ready on"):
                break
        [self.url] = re.findall(r"REST +(\S+)", told)
        [self.environ["KEY"]] = re.findall(r"API key +(hk_\S+)", told)


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_template_does_what_its_readme_says(name: str, tmp_path: Path) -> None:
    """Written by `init` as it stands here, checked, served, called, and tested by its own tests."""
    follower = Follower(tmp_path)
    await follower.run("harperpy", "init", "demo", "--template", name)
    follower.folder = tmp_path / "demo"
    assert contents(EXAMPLES / name) == contents(follower.folder)
    config = follower.folder / "config.yaml"
    # On free ports, and without the weights of a model.
    config.write_text(FREE + config.read_text().replace("{backend: local}", "{backend: echo}"))
    (first, dev), *others = BLOCK.findall((follower.folder / "README.md").read_text())

    assert ("sh", True) == (first, "harperpy dev ." in dev)
    async with follower.serving(dev), asyncio.TaskGroup() as group:
        checked = group.create_task(follower.run("harperpy", "check"))
        for language, text in others:
            await follower.follow(language, text)
    assert "config.yaml and all plugins are fine.\n" == checked.result()
    languages = [language for language, _ in others]
    assert "sh" in languages
    assert "text" in languages
    assert ("sh", "pytest\n") in others


@pytest.mark.parametrize("name", TEMPLATES)
async def test_what_a_project_makes_stays_out_of_git(name: str, tmp_path: Path) -> None:
    """A new repository of it ignores the server's data, secrets and what Python leaves."""
    follower = Follower(tmp_path)
    await follower.run("harperpy", "init", "demo", "--template", name)
    follower.folder = tmp_path / "demo"
    await follower.run("git", "init", "--quiet")
    made = [".harperpy/system.db", ".env", "plugins/__pycache__/one.pyc"]

    assert made == (await follower.run("git", "check-ignore", *made)).split()


MEANT = {
    "When do I have to be at the station?": "Trains",
    "What do my kitchen herbs want?": "Plants",
    "How big do things get in the ocean?": "Whales",
}
DOCUMENTS = {
    "Trains": "The night train to Vienna leaves from platform seven at half past nine.",
    "Plants": "Basil needs warm soil and a sunny window.",
    "Whales": "The blue whale is the largest animal that has ever lived.",
}
LOCAL = "models: {generative: {default: {backend: echo}}, embedding: {default: {backend: local}}}"


async def test_the_local_embeddings_find_what_is_meant() -> None:
    """The answer's first source is the right one, though it shares no word with the question."""
    config = f"{LOCAL}\nplugins: {{rag: {{path: rag}}}}"
    async with running(config, directory=EXAMPLES / "rag") as server:
        for title, text in DOCUMENTS.items():
            added = await ask(server, "POST", "/rag/documents", json={"title": title, "text": text})
            assert 201 == added.status
        for question, title in MEANT.items():
            body = {"messages": [{"role": "user", "content": question}]}
            answer = await ask(server, "POST", "/rag/chat/completions", json=body)
            first = answer.json["choices"][0]["message"]["annotations"][0]
            assert title == first["url_citation"]["title"]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a project, but for what running it has left there."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(path): (folder / path).read_bytes()
        for path in found
        if path.name == ".gitignore"
        or not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    }


def test_every_example_is_a_template() -> None:
    """What stands in the folder is what `init` offers."""
    folders = {path.name for path in EXAMPLES.iterdir() if (path / "README.md").is_file()}

    assert set(TEMPLATES) == folders


@pytest.mark.parametrize("file", FILES)
def test_an_example_uses_the_face(file: str) -> None:
    """What people begin with imports only what they may use."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harperpy"):
            assert node.module in ("harperpy", "harperpy.testing")
            names = {alias.name for alias in node.names}
            public = harperpy if node.module == "harperpy" else harperpy.testing
            assert names <= set(public.__all__)
