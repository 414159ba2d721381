"""`harperpy dev` starts anew when a file changes, and nobody is refused meanwhile."""

import asyncio
import os
import signal
from itertools import count
from pathlib import Path

import pytest

from asking import asking, children, exchange, logged, put, restarted
from commands import (
    ECHO,
    FREE,
    SECRETS,
    Serving,
    closed,
    configured,
    get,
    harperpy,
    said,
    serving,
    slowed,
    started,
    streaming,
    until,
)
from helpers import events

# More than a look at the files takes, and the pause before it.
OFTEN = 100


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose resource /Word answers `one`."""
    folder = configured(tmp_path / "project")
    say(folder, "one")
    return folder


@pytest.fixture
def slow(project: Path) -> Path:
    """A project with a model that waits to be told to go on."""
    return slowed(project)


def say(folder: Path, word: str, more: str = "") -> None:
    """Write a resource that answers this word."""
    put(
        folder / "resources.py",
        "from harperpy import Resource\n\n\nclass Word(Resource):\n    public = True\n\n"
        f"    @staticmethod\n    def get():\n        return {word!r}\n{more}",
    )


async def test_no_request_is_refused_while_it_restarts(project: Path) -> None:
    """Under a loop of new connections every request is answered, by the old code or the new."""
    words = [f"word{number}" for number in range(10)]
    async with serving(project) as server, asking(f"{server.url}/Word") as loop:
        await loop.heard('200 "one"')
        lines: list[str] = []
        for word in words:
            say(project, word)
            lines.append(await restarted(server))
            await loop.heard(f'200 "{word}"')
    measured = (*lines, f"{sum(loop.answers.values())} answers, longest {loop.longest:.2f} s")
    print(*measured, sep="\n")  # noqa: T201  # how long it took is shown, and never judged

    assert [] == loop.failed
    assert {f'200 "{word}"' for word in ("one", *words)} == set(loop.answers)
    assert all(line.startswith("restarted: resources.py changed (") for line in lines)


async def test_the_banner_and_its_secrets_are_printed_once(project: Path) -> None:
    """After a restart one line is all, the key still works, and the process is the same."""
    async with serving(project) as server:
        say(project, "two")
        printed = await until(server.process, "restarted: ")
        assert 1 == len(printed.splitlines())
        assert SECRETS.search(printed) is None
        assert (200, "two") == await get(f"{server.url}/Word")
        assert 200 == (await get(f"{server.url}/v1/models", f"Bearer {server.key}"))[0]
        assert str(server.process.pid) == (project / ".harperpy" / "harperpy.lock").read_text()
        assert "HDB_ADMIN" == (await said(project, "user", "list"))[0]["username"]


BROKEN = {
    "a file that is no text": ("resources.py", "\0", "resources.py: source code string"),
    "a file that is no Python": ("resources.py", "class Word(:\n", "resources.py:1: "),
    "a file that no parser takes": ("resources.py", f"x = {'-' * 100_000}1\n", "resources.py: "),
    "a config.yaml with an unknown key": ("config.yaml", "htpp: {}\n", "did you mean 'http'?"),
}


@pytest.mark.parametrize(("name", "text", "told"), BROKEN.values(), ids=BROKEN)
async def test_the_old_server_stays_until_the_file_is_mended(
    project: Path, name: str, text: str, told: str
) -> None:
    """What is wrong is said in a sentence, and the old code goes on answering."""
    good = (project / name).read_text()
    async with serving(project) as server, asking(f"{server.url}/Word", 1) as loop:
        put(project / name, text)
        assert "Traceback" not in await logged(project, told)
        assert (200, "one") == await get(f"{server.url}/Word")
        put(project / name, good.replace("one", "two") + "\n")
        assert name in await restarted(server)
        assert loop.failed == []


async def test_a_server_that_cannot_start_again_waits_for_a_change(project: Path) -> None:
    """Its sentence is printed, and who connects in the meantime waits for the mended one."""
    good = (project / "config.yaml").read_text()
    async with serving(project) as server:
        wrong = "models: {generative: {default: {backend: ecoh}}}\n"
        put(project / "config.yaml", FREE + wrong)
        log = await logged(project, "waits for a file to change")
        assert "did you mean 'echo'?" in log
        assert "Traceback" not in log
        asked = asyncio.create_task(get(f"{server.url}/Word"))
        put(project / "config.yaml", good)
        await restarted(server)
        assert (200, "one") == await asked


async def test_how_a_server_ended_by_itself_is_told(project: Path) -> None:
    """Its code says nothing when it ends the process, nor does a library that crashes."""
    good = (project / "resources.py").read_text()
    async with serving(project) as server:
        put(project / "resources.py", "import os\n\nos._exit(4)\n")
        await logged(project, "the server is down (exit code 4) and waits for a file to change")
        put(project / "resources.py", good)
        await restarted(server)


async def test_a_changed_config_is_used(project: Path) -> None:
    """A model of a new config.yaml is there, on the same ports."""
    async with serving(project) as server:
        put(project / "config.yaml", FREE + ECHO.replace("default", "fresh"))
        assert (await restarted(server)).startswith("restarted: config.yaml changed")
        status, found = await get(f"{server.url}/v1/models", f"Bearer {server.key}")
        assert 200 == status
        assert {"fresh"} <= {model["id"] for model in found["data"]}
        assert 200 == (await get(f"{server.operations_url}/health"))[0]


async def test_only_the_projects_own_files_matter(project: Path) -> None:
    """Neither the data, nor caches, nor packages start it anew; a new module of its own does."""
    others = [".venv/a.py", "node_modules/a.py", "__pycache__/a.py", ".git/a.py", "env/a.py"]
    for name in others:
        (project / name).parent.mkdir()
    (project / "env" / "pyvenv.cfg").write_text("")
    async with serving(project, "dev", "--root", "data") as server:
        for name in [*others, "data/a.py", "notes.txt"]:
            (project / name).write_text("new")
        (project / "lib").mkdir()
        (project / "lib" / "own.py").write_text("NEW = 1\n")
        assert (await restarted(server)).startswith("restarted: lib/own.py changed (")


async def test_a_link_that_leads_to_itself_is_no_file(project: Path) -> None:
    """What looks like a file of the project and is none ends nothing: the next change is taken."""
    async with serving(project) as server:
        (project / "loop.py").symlink_to("loop.py")
        (project / "memory.py").symlink_to("/proc/self/mem")
        assert "Traceback" not in await logged(project, "memory.py: cannot be read: ")
        (project / "memory.py").unlink()
        say(project, "two")
        assert "resources.py changed" in await restarted(server)
        assert (200, "two") == await get(f"{server.url}/Word")


async def test_a_stream_is_told_that_the_server_restarts(slow: Path) -> None:
    """One that does not end by itself ends in its own words, and is not waited for."""
    async with serving(slow) as server, streaming(server) as response:
        (slow / "more.py").write_text("")
        *_, last = events(await response.text())
        assert "restarted: more.py changed" in await restarted(server)
    assert "server_error" == last["error"]["type"]


async def test_a_start_that_hangs_is_given_up_for_the_next_change(project: Path) -> None:
    """Also where the project's own code keeps the server from hearing."""
    async with serving(project) as server:
        say(project, "two", "\nimport time\nprint('hanging', flush=True)\ntime.sleep(3600)\n")
        await until(server.process, "hanging")
        say(project, "three")
        await restarted(server)
        assert (200, "three") == await get(f"{server.url}/Word")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_both_after_a_restart(project: Path, number: int) -> None:
    """With exit code 0 and no trace; nobody listens any more, and the folder is free."""
    async with serving(project) as server:
        say(project, "two")
        await restarted(server)
        assert 0 == await server.end(number)
        await closed(server.url)
    assert "Traceback" not in (project / "log").read_text()
    async with serving(project) as again:
        assert (200, "two") == await get(f"{again.url}/Word")


async def test_a_server_ends_with_its_killed_parent(project: Path) -> None:
    """Also where that had not heard yet what the server said last."""
    async with serving(project) as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        await said(project, "restart")
        assert -signal.SIGKILL == await server.end(signal.SIGKILL)
        await closed(server.url)


async def test_a_signal_ends_it_while_files_are_written_without_end(project: Path) -> None:
    """It waits until they are whole before it starts anew, and hears the signal meanwhile."""

    async def write() -> None:
        for number in count():
            put(project / "made.py", "#" * number)
            await asyncio.sleep(0.01)
            if number == OFTEN:
                seen.set()

    seen = asyncio.Event()
    async with serving(project) as server:
        writing = asyncio.create_task(write())
        await seen.wait()
        assert 0 == await server.end(signal.SIGINT)
        writing.cancel()


async def test_a_server_that_crashes_is_started_by_the_next_change(project: Path) -> None:
    """The parent says so, and keeps the ports."""
    crash = "\n\nclass Crash(Word):\n    @staticmethod\n    def get():\n        import os\n"
    async with serving(project) as server:
        say(project, "two", f"{crash}        os._exit(3)\n")
        await restarted(server)
        assert "nothing" == await exchange(f"{server.url}/Crash")
        await logged(project, "waits for a file to change")
        say(project, "three")
        await restarted(server)
        assert (200, "three") == await get(f"{server.url}/Word")


async def test_no_reload_leaves_it_as_it_is(project: Path) -> None:
    """One process serves what there was when it started."""
    async with started(project, "dev", "--no-reload") as process:
        server = Serving(process, await until(process, "Ready on"))
        assert [] == children(process.pid)
        say(project, "two")
        assert (200, "one") == await get(f"{server.url}/Word")
        assert 0 == await server.end()


async def test_a_first_start_that_fails_is_the_end(project: Path) -> None:
    """With the same sentence and status as ever: nothing waits for a mended file."""
    put(project / "config.yaml", "models: {generative: {default: {backend: ecoh}}}\n" + FREE)

    done = await harperpy(project, "dev")

    assert (1, "") == (done.code, done.out)
    (line,) = done.err.splitlines()
    assert "did you mean 'echo'?" in line
