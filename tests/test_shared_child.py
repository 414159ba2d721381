"""Several processes on one data folder: one child runs the local model for all of them."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harperpy.plugins.llama_child import Endpoint
from harperpy.plugins.local_share import Share, Told
from harperpy.plugins.weights import SMOLLM2

from harperpy.testing import running
from helpers import ask, until
from llama import weights

LOCAL = "models: {generative: {default: {backend: local}}}"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
MEMBER = """
import asyncio, sys
from pathlib import Path
from harperpy import GenerateOpts, HarperError, Message, ModelConfig, ModelEntry, Prompt
from harperpy.plugins import local

async def answer(backend):
    # Asked again as clients do: what a dying child has taken already is refused once.
    for _ in range(3):
        prompt = Prompt(messages=[Message(role="user", content="What is the capital of France?")])
        try:
            chunks = backend.generate_stream(prompt, GenerateOpts())
            return "".join([chunk.delta_content or "" async for chunk in chunks])
        except HarperError as error:
            told = str(error)
        await asyncio.sleep(0.2)
    return told

async def main():
    root, offline = Path(sys.argv[1]), sys.argv[2] == "offline"
    settings, kinds = ModelConfig(backend="local"), {}
    local.register_model_backends(kinds.__setitem__)
    entry = ModelEntry("generative", "default", settings, root, offline, root)
    backend = kinds["local"](entry)
    await backend.open()
    while asked := await asyncio.to_thread(sys.stdin.readline):
        said = backend.state if asked == "state\\n" else await answer(backend)
        print(said.replace("\\n", " "), flush=True)
    await backend.close()

asyncio.run(main())
"""


class Member:
    """A process with the `local` backend on a data folder, as a worker of a server has it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def tell(self, what: str) -> str:
        """What it says to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what.encode() + b"\n")
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().strip()

    async def ask(self) -> str:
        """What the model answers, or why it cannot."""
        return await self.tell("ask")

    async def says(self, expected: str) -> None:
        """Wait until its state says so."""
        await comes(expected, lambda: self.tell("state"))

    @property
    def children(self) -> list[int]:
        """The processes that it started and that run."""
        pid = self.process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in listed if lives(int(child))]


async def comes(expected: str, state: Callable[[], Awaitable[str]]) -> None:
    """Wait until a state says so; half a minute at most."""
    async with asyncio.timeout(30):
        while expected not in await state():  # noqa: ASYNC110  # it is another process's
            await asyncio.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def member(root: Path, mode: str = "online") -> AsyncIterator[Member]:
    """A process on this data folder; at the end it closes its backend, or is killed."""
    command = [sys.executable, "-P", "-c", MEMBER, str(root), mode]
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield Member(process)
        async with asyncio.timeout(20):
            await process.communicate(b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def leader_and_follower(root: Path) -> AsyncIterator[tuple[Member, Member, int]]:
    """Two processes on one data folder and the child that the first one started."""
    weights()
    async with member(root) as leader:
        await leader.says("ready")
        async with member(root) as follower:
            await follower.says("ready")
            (child,) = leader.children
            yield leader, follower, child


def files(root: Path) -> dict[str, int]:
    """The mode of each file by its suffix."""
    return {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in root.iterdir()}


async def test_two_processes_have_one_child(tmp_path: Path) -> None:
    """Both answer, one child serves both, and who may not read the data folder learns no key."""
    async with leader_and_follower(tmp_path) as (leader, follower, child):
        answers = await asyncio.gather(leader.ask(), follower.ask())
        assert ["Paris" in answer for answer in answers] == [True, True], answers
        assert ([child], []) == (leader.children, follower.children)
        assert {".lock": 0o600, ".json": 0o600} == files(tmp_path)


async def test_when_the_process_with_the_child_is_killed_another_takes_over(tmp_path: Path) -> None:
    """After kill -9 the next call of the other process is answered by one new child."""
    async with leader_and_follower(tmp_path) as (leader, follower, child):
        leader.process.kill()
        await until(lambda: not lives(child))
        assert "Paris" in await follower.ask()
        assert 1 == len(follower.children)


async def test_an_orderly_end_hands_over(tmp_path: Path) -> None:
    """A process that closes leaves its place to the other one, and no child."""
    async with leader_and_follower(tmp_path) as (leader, follower, child):
        await leader.process.communicate(b"")
        assert not lives(child)
        assert "Paris" in await follower.ask()
        assert 1 == len(follower.children)
    assert {".lock": 0o600} == files(tmp_path)


async def test_a_new_child_is_found(tmp_path: Path) -> None:
    """When the child dies, the process that runs it starts the next one, for the other too."""
    async with leader_and_follower(tmp_path) as (leader, follower, child):
        os.kill(child, signal.SIGKILL)
        await until(lambda: bool(leader.children) and leader.children != [child])
        await leader.says("ready")
        assert "Paris" in await follower.ask()
        assert (1, 0) == (len(leader.children), len(follower.children))


async def test_what_is_hopeless_is_known_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one process lacks, both say, and nobody waits for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    async with member(tmp_path, "offline") as leader:
        await leader.says("harperpy models pull")
        async with member(tmp_path) as follower:
            await follower.says("harperpy models pull")
            assert "the server is offline" in await follower.ask()


async def test_the_state_is_that_of_whoever_fetches(tmp_path: Path) -> None:
    """/v1/models says how far another process is; when that one is gone, this one begins."""
    weights()
    share = Share(tmp_path, SMOLLM2.name)
    assert share.take()
    share.tell(Told("is being fetched (40 %)"))
    async with running(LOCAL, root=tmp_path) as server:

        async def state() -> str:
            listed = await ask(server, "GET", "/v1/models")
            return str(listed.json["data"][0].get("state", "ready"))

        await comes("is being fetched (40 %)", state)
        share.tell(Told("does not run: status 1", is_hopeless=True))
        await comes("does not run: status 1", state)
        refused = await ask(server, "POST", "/v1/chat/completions", json=HELLO)
        assert 503 == refused.status
        assert "does not run: status 1" in refused.json["error"]["message"]
        share.close()
        await comes("ready", state)


def leave_behind(root: Path) -> Path:
    """Leave what a process that was killed leaves: its lock file, and where its child answered."""
    share = Share(root, SMOLLM2.name)
    assert share.take()
    share.tell(Told("ready", endpoint=Endpoint("http://127.0.0.1:9/v1", "old")))
    (file,) = root.glob("*.json")
    content = file.read_bytes()
    share.close()
    file.write_bytes(content)
    return file


async def test_what_a_killed_server_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """An old lock file and the address of a child that is gone do not keep a start from its own."""
    weights()
    leave_behind(tmp_path)
    async with running(LOCAL, root=tmp_path) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json=HELLO)
    assert 200 == answer.status


@pytest.mark.parametrize("in_the_way", [".lock", ".part"])
async def test_where_nothing_can_be_shared_each_has_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_the_way: str
) -> None:
    """A data folder that takes no lock or no file costs a child more, said once, and no answer."""
    weights()
    file = leave_behind(tmp_path)
    file.with_suffix(".lock").unlink()
    file.with_suffix(in_the_way).mkdir()
    async with running(LOCAL, root=tmp_path) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json=HELLO)
    assert 200 == answer.status
    (said,) = [one.message for one in caplog.records if "of its own" in one.message]
    assert str(tmp_path) in said


async def test_two_data_folders_have_two_children(tmp_path: Path) -> None:
    """Servers that share no data folder share no child either."""
    weights()
    before = set(own_children())
    async with (
        running(LOCAL, root=tmp_path / "one") as one,
        running(LOCAL, root=tmp_path / "two") as two,
    ):
        calls = (ask(each, "POST", "/v1/chat/completions", json=HELLO) for each in (one, two))
        assert [200, 200] == [answer.status for answer in await asyncio.gather(*calls)]
        assert 2 == len(set(own_children()) - before)


def own_children() -> list[int]:
    """The processes that this one started."""
    pid = os.getpid()
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
