"""`scope.commands`: what plugins add to the command line, run as people run it."""

import asyncio
import fcntl
import json
import os
import signal
import struct
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click
import pytest

from commands import (
    SECONDS,
    configured,
    environment,
    execute,
    harperpy,
    names,
    refusal,
    said,
    serving,
)
from harperpy import RegistrationError, Scope
from harperpy.cli import main
from harperpy.operations import COMMAND_LINE
from harperpy.testing import running
from helpers import operation

PLUGIN = '''
import os
import msgspec
from harperpy import ClientError

class Reindex(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    batch: int
    dry_run: bool = False
    names: list[str] = []
    operation_id: str = ""

def reindex(request, context):
    """Build the index anew."""
    return [request.batch, request.dry_run, request.names, context.user.username]

async def quiet():
    pass

def refuses():
    raise ClientError("not now")

def fails():
    raise ValueError("secret text")

def pid():
    return os.getpid()

def handle_application(scope):
    scope.commands.add("reindex", reindex, Reindex)
    scope.commands.add("quiet", quiet, help="Say nothing.")
    scope.commands.add("re_fuse", refuses)
    scope.commands.add("fails", fails)
    scope.commands.add("pid", pid)
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose plugin adds commands."""
    folder = configured(tmp_path / "project", "plugins: {index: {path: index.py}}\n")
    (folder / "index.py").write_text(PLUGIN)
    return folder


WORDS: dict[str, list[Any]] = {
    "reindex batch=10": [10, False, []],
    "reindex --batch 10 --dryRun": [10, True, []],
    "reindex --batch=10 dryRun=true": [10, True, []],
    'reindex batch=10 names=["a","b=c"]': [10, False, ["a", "b=c"]],
    "reindex --dryRun --batch 3": [3, True, []],
}


async def test_a_command_runs_in_the_running_server(project: Path) -> None:
    """Its words are the fields of its Struct, JSON or text; what it returns is printed."""
    async with serving(project) as server:
        for words, expected in WORDS.items():
            assert [*expected, "HDB_ADMIN"] == await said(project, *words.split()), words
        assert "" == await said(project, "quiet")
        inside = await said(project, "pid")
        assert str(inside) != str(server.process.pid)
        assert inside == await said(project, "pid")
        remote = ("--url", server.operations_url, "--api-key", server.key)
        assert inside == await said(project, "pid", *remote)
        assert "ok" == (await said(project, "get-status"))["status"]


async def test_without_a_server_one_is_opened_for_it(project: Path) -> None:
    """Without ports, as super user; each time anew."""
    first = await said(project, "reindex", "batch=10")
    assert [10, False, []] == first[:3]
    assert "" == await said(project, "quiet")
    assert await said(project, "pid") != await said(project, "pid")
    assert [10, False, []] == (
        await said(project.parent, "reindex", "batch=10", "--dir", "project")
    )[:3]


async def test_the_commands_of_a_project_are_listed(project: Path) -> None:
    """Each with its line of help, given or of its docstring, and its parameters."""
    listed = {one["command"]: one for one in await said(project, "commands")}

    assert {"reindex", "quiet", "re_fuse", "fails", "pid"} == set(listed)
    assert "Build the index anew." == listed["reindex"]["help"]
    assert "batch=… [dryRun=…] [names=…] [operationId=…]" == listed["reindex"]["parameters"]
    assert ("Say nothing.", "") == (listed["quiet"]["help"], listed["quiet"]["parameters"])


REFUSED: dict[str, str] = {
    "reindx": "Operation 'reindx' not found; did you mean 'reindex'?",
    "re-fuse": "not now",
    "reindex": "Object missing required field `batch`",
    "reindex batch=many": "Expected `int`, got `str`",
    "reindex batch=1 bathc=2": "Object contains unknown field `bathc`; did you mean 'batch'?",
    "set_limits scope=team name=a concurrent=1": (
        "scope: Invalid enum value 'team'; expected key, user, tenant, model, backend"
    ),
    "set_limits scope=user name=a requestsPerMinute=1": (
        "Object contains unknown field `requestsPerMinute`; did you mean 'requests_per_minute'?"
    ),
    "list_users all=true": "Object contains unknown field `all`; there are no fields",
}


@pytest.mark.parametrize("words", REFUSED)
async def test_a_refusal_is_one_sentence(project: Path, words: str) -> None:
    """It is the operation's own, and an unknown word is told the nearest right one."""
    assert REFUSED[words] in await refusal(project, *words.split())


async def test_a_key_is_somebodys(project: Path) -> None:
    """Before there is a super user, whose it is has to be said: the socket itself is nobody."""
    told = await refusal(project, "key", "add", "laptop")

    assert "add_api_key: username: expected whose key it is, as who asks is no user" == told


async def test_what_fails_tells_nothing_of_its_inside(project: Path) -> None:
    """A running server answers with its general words, and without one the kind is told."""
    assert "fails: it failed with ValueError" == await refusal(project, "fails")
    async with serving(project):
        assert "secret text" not in await refusal(project, "fails")


USAGE: dict[str, str] = {
    "reindex ten": "expected key=value or --key value, got 'ten'",
    "reindex =1": "expected key=value or --key value, got '=1'",
    "reindex batch=1 batch=2": "batch is given twice",
}


@pytest.mark.parametrize("words", USAGE)
async def test_words_that_are_no_parameters(project: Path, words: str) -> None:
    """They are a wrong usage, and nothing was opened for it."""
    done = await harperpy(project, *words.split())

    assert (2, "") == (done.code, done.out)
    assert USAGE[words] in done.err
    assert ".harperpy" not in names(project)


async def test_where_there_is_no_project_nothing_is_made(tmp_path: Path) -> None:
    """A misspelt command is told the nearest one."""
    done = await harperpy(tmp_path, "chekc")

    assert (2, "") == (done.code, done.out)
    assert "no such command 'chekc'" in done.err
    assert "did you mean 'check'?" in done.err
    assert [] == names(tmp_path)


ELSEWHERE = (
    ("user", "add", "ada", "--password", "pw"),
    ("user", "list"),
    ("key", "add", "laptop"),
    ("sql", "SELECT 1"),
    ("commands",),
)


@pytest.mark.parametrize("words", ELSEWHERE, ids=" ".join)
async def test_in_the_wrong_folder_nobody_is_added(tmp_path: Path, words: Sequence[str]) -> None:
    """No database is made there: the command says how to name the project's folder."""
    done = await harperpy(tmp_path, *words)

    assert (2, "") == (done.code, done.out)
    assert f"no project is in {tmp_path}: name its folder by --dir" in done.err
    assert [] == names(tmp_path)


async def test_a_data_folder_alone_is_a_project(tmp_path: Path) -> None:
    """`harperpy dev` serves a folder without any files too: its operations are commands there."""
    assert [] == await said(tmp_path, "user", "list", "--root", ".harperpy")

    assert [] == await said(tmp_path, "list_users")
    assert [] == await said(tmp_path, "user", "list")


NUMBERS = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 10000)"
    " SELECT x FROM c"
)


async def test_rows_that_were_cut_off_are_told(project: Path) -> None:
    """On stderr, with and without a server; what comes out is the rows alone."""
    few, many = NUMBERS, NUMBERS.replace("10000", "10001")

    async def answered(select: str) -> tuple[int, str]:
        done = await harperpy(project, "sql", select, "--json")
        assert 0 == done.code
        return len(json.loads(done.out)), done.err

    cut = "harperpy: sql: cut off: there are more than 10000\n"
    assert [(10_000, ""), (10_000, cut)] == [await answered(few), await answered(many)]
    async with serving(project):
        assert [(10_000, ""), (10_000, cut)] == [await answered(few), await answered(many)]


PIPE_BYTES = 65_536


async def test_what_is_printed_is_whole_where_python_does_not_buffer(project: Path) -> None:
    """Also when a write to a pipe that is full is interrupted, as by stopping the process."""
    command = ("harperpy", "sql", NUMBERS, "--json")
    reading, writing = os.pipe()
    environ = environment(PYTHONUNBUFFERED="1")
    process = await asyncio.create_subprocess_exec(
        *command, cwd=project, env=environ, stdout=writing
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        async with asyncio.timeout(SECONDS):
            while waiting(pipe) < PIPE_BYTES:  # noqa: ASYNC110  # no event says that it is full
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        printed = await asyncio.to_thread(pipe.read)

    assert 0 == await process.wait()
    assert 10_000 == len(json.loads(printed))


NO_ANSWER = {
    "on a full disk": ("> /dev/full", 1, "the answer cannot be written: No space left on device"),
    "to who reads no more": ("| true", 0, ""),
    "without a stream": (">&-", 0, ""),
    "without any stream": ("<&- >&- 2>&-", 0, ""),
}


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("where", "code", "told"), NO_ANSWER.values(), ids=NO_ANSWER)
async def test_what_nobody_takes_is_told_in_a_sentence(
    project: Path, where: str, code: int, told: str, buffered: str
) -> None:
    """Where there is anybody to tell; and the command ends as it should."""
    line = f"harperpy sql 'SELECT 1' {where}"

    done = await execute(project, "sh", "-c", line, PYTHONUNBUFFERED=buffered)

    assert (code, "") == (done.code, done.out)
    assert (f"harperpy: {told}\n" if told else "") == done.err


def waiting(pipe: IO[bytes]) -> int:
    """How many bytes are in a pipe."""
    count: int = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]
    return count


WRONG_ROLES = {
    '{"resource": {"v1": []}}': "database 'resource' does not exist; did you mean resources?",
    '{"models": "gpt-*"}': "models: Expected `array`, got `str`",
    '{"operations": ["sqll"]}': "operations: no operation 'sqll'; did you mean 'sql'?",
}


async def test_a_role_that_cannot_be_is_told_why(project: Path) -> None:
    """With and without a server: what the report says is in the sentence."""

    async def refused() -> list[str]:
        given = [f"permission={document}" for document in WRONG_ROLES]
        return [await refusal(project, "add_role", "role=clerk", one) for one in given]

    start = "add_role: Errors in the role permissions JSON provided: "
    expected = [start + told for told in WRONG_ROLES.values()]
    assert expected == await refused()
    async with serving(project):
        assert expected == await refused()


async def test_a_command_is_for_super_users() -> None:
    """Also as an operation over HTTP."""
    async with running(handle_application=lambda scope: scope.commands.add("go", lambda: 7)) as own:
        admin, ada = f"Bearer {own.api_key}", f"Bearer {await own.key_for('ada')}"
        asked = [await operation(own, {"operation": "go"}, who) for who in (admin, ada, None)]

    assert [200, 403, 401] == [status for status, _ in asked]


MISUSE: dict[str, tuple[Any, Any, str]] = {
    "taken": ("sql", print, "the command line has one of its own by that name"),
    "no name": ("re-index", print, "expected small letters, digits and '_', a letter first"),
    "no function": ("go", "print", "expected a function, got str"),
}


@pytest.mark.parametrize(("name", "function", "told"), MISUSE.values(), ids=MISUSE)
async def test_what_cannot_be_a_command_is_refused(name: str, function: Any, told: str) -> None:
    """The error names the plugin, the command and what was expected."""
    errors: list[str] = []

    def apply(scope: Scope) -> None:
        with pytest.raises(RegistrationError) as refused:
            scope.commands.add(name, function)
        errors.append(str(refused.value))

    async with running(handle_application=apply):
        assert [f"plugins.test: command {name!r}: {told}"] == errors


def test_no_plugin_can_take_a_command_of_the_command_line() -> None:
    """The names that are refused are those that exist."""
    assert isinstance(main, click.Group)
    assert COMMAND_LINE == set(main.commands)
