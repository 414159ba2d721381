"""The command `harperpy` as people run it, in a process of its own, for the tests that need it."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import yaml

from helpers import basic

SECONDS = 60
FREE = "http: {port: 0}\noperationsApi: {network: {port: 0}}\n"
ECHO = "models: {generative: {default: {backend: echo}}, embedding: {default: {backend: echo}}}\n"
ADMIN = {"HDB_ADMIN_USERNAME": "root", "HDB_ADMIN_PASSWORD": "s3cret-enough"}
STRUCTURE = re.compile(r"- |\[|\{|[\w.-]+:\s")
SECRETS = re.compile(r"hk_|password|s3cret")
FIRST = "no super user exists yet: set HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD"
SLOW = """
import asyncio
from pathlib import Path
from harperpy import define_backend

async def answer():
    yield "one "
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    yield "two"

def handle_application(scope):
    backend = define_backend("slow", generate_stream=answer)
    scope.models.register_backend("generative", "slow", backend)
"""


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """Ours without what would change a command's mind, and with `harperpy` on the path."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HARPERPY_", "HDB_", "PYTEST_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"
    return {**ours, "PATH": path, **more}


async def execute(folder: Path, *command: str, stdin: str = "", **environ: str) -> Done:
    """Run a command in a folder to its end."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=environment(**environ), stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate(stdin.encode())
    except TimeoutError:
        process.kill()
        raise
    return Done(process.returncode or 0, out.decode(), err.decode())


async def harperpy(folder: Path, *arguments: str, stdin: str = "", **environ: str) -> Done:
    """Run `harperpy` in a folder to its end."""
    return await execute(folder, "harperpy", *arguments, stdin=stdin, **environ)


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(file.name for file in folder.iterdir())


async def said(folder: Path, *arguments: str, **environ: str) -> Any:
    """What a command that must succeed prints, decoded where it is YAML, or JSON."""
    done = await harperpy(folder, *arguments, **environ)
    assert (0, "") == (done.code, done.err), done
    return yaml.safe_load(done.out) if STRUCTURE.match(done.out) else done.out.strip()


async def refusal(folder: Path, *arguments: str, **environ: str) -> str:
    """The one sentence with which a command fails."""
    done = await harperpy(folder, *arguments, **environ)
    assert (1, "") == (done.code, done.out), done
    assert "Traceback" not in done.err
    (sentence,) = done.err.splitlines()
    assert sentence.startswith("harperpy: ")
    return sentence.removeprefix("harperpy: ")


class Serving:
    """A running `harperpy dev` or `harperpy run`, and what it printed until it was ready."""

    def __init__(self, process: asyncio.subprocess.Process, printed: str) -> None:
        self.process = process
        self.printed = printed
        self.url = self.found(r"REST +(\S+)")
        self.operations_url = self.found(r"Operations +(\S+)")

    def found(self, pattern: str) -> str:
        """The one place of what was printed that a pattern names."""
        (place,) = re.findall(pattern, self.printed)
        return place

    @property
    def key(self) -> str:
        """The API key of a first start."""
        return self.found(r"API key +(hk_\S+)")

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        # Not by the process object: before Python 3.13 it may take the exit code away from asyncio.
        os.kill(self.process.pid, number)
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()

    async def interrupt(self) -> int:
        """Press Ctrl-C until it has ended; the exit code."""
        ended = asyncio.ensure_future(self.process.wait())
        async with asyncio.timeout(SECONDS):
            while not ended.done():
                # Its exit code is taken by a thread, before the loop hears of it.
                with suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGINT)
                await asyncio.wait((ended,), timeout=0.05)
        return await ended


async def until(process: asyncio.subprocess.Process, start: str) -> str:
    """What a process prints up to the line that begins so."""
    assert process.stdout is not None
    printed = ""
    async with asyncio.timeout(SECONDS):
        while line := (await process.stdout.readline()).decode():
            printed += line
            if line.startswith(start):
                return printed
    pytest.fail(f"no line begins with {start!r}:\n{printed}")


@asynccontextmanager
async def started(
    folder: Path,
    *arguments: str,
    umask: int = -1,
    environ: Mapping[str, str] = {},
    within: Sequence[str] = (),
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A `harperpy` process, killed in the end if it still runs; its log is in `log`.

    `within` is the command that becomes it.
    """
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *within,
            "harperpy",
            *arguments,
            cwd=folder,
            env=environment(**environ),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            umask=umask,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def serving(
    folder: Path,
    *arguments: str,
    umask: int = -1,
    environ: Mapping[str, str] = {},
    within: Sequence[str] = (),
) -> AsyncIterator[Serving]:
    """A server that is ready, ended by SIGTERM unless the test ended it."""
    given = arguments or ("dev",)
    async with started(folder, *given, umask=umask, environ=environ, within=within) as process:
        server = Serving(process, await until(process, "Ready on"))
        yield server
        if process.returncode is None:
            assert 0 == await server.end(), (folder / "log").read_text()


def configured(folder: Path, more: str = "") -> Path:
    """A folder with such a config.yaml, and more in it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(FREE + ECHO + more)
    return folder


def mounting(script: str) -> tuple[str, ...]:
    """What a command is to run within, for mounts that it alone sees; skips where none can be."""
    within = ("unshare", "-rm", "bash", "-ec")
    try:
        possible = subprocess.call([*within, "mount --bind . ."], stderr=subprocess.DEVNULL) == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("nobody may mount here")
    return (*within, f'{script}\nexec "$@"', "bash")


async def operate(server: Serving, name: str, **given: Any) -> tuple[int, Any, Any]:
    """Status, body and headers of an operation."""
    login = basic(ADMIN["HDB_ADMIN_USERNAME"], ADMIN["HDB_ADMIN_PASSWORD"])
    body = {"operation": name, **given}
    async with (
        aiohttp.ClientSession(headers={"Authorization": login}) as session,
        session.post(server.operations_url, json=body) as response,
    ):
        return response.status, await response.json(), response.headers


async def get(url: str, credential: str = "") -> tuple[int, Any]:
    """What a GET is answered."""
    headers = {"Authorization": credential} if credential else {}
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers) as response,
    ):
        return response.status, await response.json()


def slowed(project: Path) -> Path:
    """A project whose model `slow` says one word, and the next when there is a file `go`."""
    (project / "slow.py").write_text(SLOW)
    with (project / "config.yaml").open("a") as config:
        config.write("plugins: {slow: {path: slow.py}}\n")
    return project


async def closed(url: str) -> None:
    """Return when nobody listens there any more."""
    port = int(url.rpartition(":")[2])
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                _, writer = await asyncio.open_connection("localhost", port)
            except OSError:
                return
            writer.close()


@asynccontextmanager
async def streaming(server: Serving) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream of the slow model, its first word read."""
    body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "go"}]}
    headers = {"Authorization": f"Bearer {server.key}"}
    url = f"{server.url}/v1/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=headers) as response,
    ):
        async with asyncio.timeout(SECONDS):
            while b"one" not in await response.content.readline():
                pass
        yield response


async def rows(folder: Path) -> list[dict[str, Any]]:
    """The model calls that a server which has ended left behind."""
    select = "SELECT model, success, error_code, finish_reason FROM system.hdb_model_calls"
    found: list[dict[str, Any]] = await said(folder, "sql", select)
    return found
