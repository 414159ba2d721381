"""`http.workers: N`: one port, served by N processes that agree on who may do what."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from asking import asking, children, logged
from commands import (
    ADMIN,
    ECHO,
    FIRST,
    SECONDS,
    SLOW,
    Serving,
    closed,
    get,
    refusal,
    rows,
    said,
    serving,
    started,
    until,
)
from harperpy import Ledger
from harperpy.ending import HARD_STOP
from helpers import basic, events
from llama import weights

ROOT = basic("root", "s3cret-enough")
MANY = 200
CHAT: Any = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
PID = """
import os

from harperpy import Resource


class Pid(Resource):
    public = True

    @staticmethod
    def get():
        return os.getpid()
"""


def config(workers: int = 2, port: int = 0) -> str:
    """A config.yaml for so many workers, whose models echo."""
    http = f"http: {{port: {port}, host: 127.0.0.1, workers: {workers}}}\n"
    return f"{http}operationsApi: {{network: {{port: 0}}}}\n{ECHO}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two workers whose resource /Pid answers the number of its process."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text(config())
    (folder / "resources.py").write_text(PID)
    return folder


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Serving]:
    """`harperpy run`, ready."""
    async with serving(folder, "run", environ=ADMIN) as server:
        yield server


async def pid(session: aiohttp.ClientSession) -> int:
    """Who answers on this connection."""
    async with session.get("/Pid") as response:
        found: int = await response.json()
        return found


@asynccontextmanager
async def pinned(server: Serving, count: int = 2) -> AsyncIterator[dict[int, Any]]:
    """A client for each worker, whose one connection that worker has."""
    found: dict[int, Any] = {}
    async with AsyncExitStack() as stack:
        for _ in range(MANY):
            connector = aiohttp.TCPConnector(limit=1)
            session = aiohttp.ClientSession(server.url, connector=connector)
            await stack.enter_async_context(session)
            found.setdefault(await pid(session), session)
            if len(found) == count:
                break
        assert count == len(found)
        yield found


async def answering(server: Serving) -> set[int]:
    """Two workers, once both answer on connections of their own."""
    found = set[int]()
    async with asyncio.timeout(SECONDS):
        while len(found) < 2:
            found.add((await get(f"{server.url}/Pid"))[1])
    return found


async def operate(server: Serving, operation: str, **parameters: Any) -> Any:
    """The result of an operation that a super user asks of one of the workers."""
    body = {"operation": operation, **parameters}
    async with (
        aiohttp.ClientSession(headers={"Authorization": ROOT}) as session,
        session.post(server.operations_url, json=body) as response,
    ):
        assert 200 == response.status, await response.text()
        return await response.json()


async def statuses(sessions: Iterable[Any], credential: str) -> list[int]:
    """What each worker answers who shows this credential."""
    found: list[int] = []
    for session in sessions:
        headers = {"Authorization": credential}
        async with session.get("/v1/models", headers=headers) as response:
            await response.read()
            found.append(response.status)
    return found


# Who answers


async def test_each_worker_answers_on_the_one_port(project: Path) -> None:
    """The ready line counts them; each is a child of the process that was started."""
    (project / "config.yaml").write_text(config(3))
    async with running(project) as server, pinned(server, 3) as clients:
        assert f"Ready on {server.url} with 3 workers (Ctrl-C stops)" in server.printed
        assert {*children(server.process.pid)} == {str(pid) for pid in clients}
        assert 1 == server.printed.count("Ready on")
        assert (200, {"status": "ok"}) == await get(f"{server.url}/health")


async def test_one_worker_is_one_process(project: Path) -> None:
    """No parent, and the ready line counts none."""
    (project / "config.yaml").write_text(config(1))
    async with running(project) as server:
        assert (200, server.process.pid) == await get(f"{server.url}/Pid")
        assert f"Ready on {server.url} (Ctrl-C stops)" in server.printed


async def test_dev_has_one_worker_and_check_takes_any(project: Path) -> None:
    """What starts anew at each change is one process below its parent."""
    assert "config.yaml and all plugins are fine." == await said(project, "check")
    async with serving(project, "dev") as server:
        (child,) = children(server.process.pid)
        assert (200, int(child)) == await get(f"{server.url}/Pid")


# Who may do what

CREDENTIALS = {"key": 401, "inactive": 401, "dropped": 401, "password": 401, "token": 401}
CHANGES = {**CREDENTIALS, "role": 403}


async def credential_of(server: Serving, name: str) -> tuple[str, str]:
    """A new user's credential, and the id of its key if it is one."""
    await operate(server, "add_user", username=name, password="pw", role="model_user")
    if name in ("password", "inactive"):
        return basic(name, "pw"), ""
    if name == "token":
        made = await operate(server, "create_authentication_tokens", username=name, password="pw")
        return f"Bearer {made['operation_token']}", ""
    made = await operate(server, "add_api_key", name="test", username=name)
    return f"Bearer {made['api_key']}", made["id"]


async def change(server: Serving, name: str, key: str) -> None:
    """Take the right away, by one of the workers."""
    match name:
        case "key":
            await operate(server, "drop_api_key", id=key)
        case "dropped":
            await operate(server, "drop_user", username=name)
        case "inactive":
            await operate(server, "alter_user", username=name, active=False)
        case "role":
            await operate(server, "add_role", role="nobody", permission={})
            await operate(server, "alter_user", username=name, role="nobody")
        case _:
            await operate(server, "alter_user", username=name, password="another")


async def test_what_one_worker_takes_away_no_other_grants(project: Path) -> None:
    """A key, a user, a password, a token or a role: each worker knew it, and none does after."""
    before: dict[str, list[int]] = {}
    after: dict[str, list[int]] = {}
    async with running(project) as server, pinned(server) as clients:
        for name in CHANGES:
            credential, key = await credential_of(server, name)
            before[name] = await statuses(clients.values(), credential)
            await change(server, name, key)
            after[name] = await statuses(clients.values(), credential)

    assert {name: [200, 200] for name in CHANGES} == before
    assert {name: [status, status] for name, status in CHANGES.items()} == after


LOST = """

import signal

import sqlalchemy as sa


class Lost(Resource):
    public = True

    @staticmethod
    async def post():
        everything = sa.text("DELETE FROM hdb_token")
        await DATABASE.run(lambda connection: connection.execute(everything))
        os.kill(os.getpid(), signal.SIGKILL)


def handle_application(scope):
    global DATABASE
    DATABASE = scope.database
    scope.resources.set("Pid", Pid)
    scope.resources.set("Lost", Lost)
"""


async def test_what_a_worker_did_before_it_was_killed_counts(project: Path) -> None:
    """Also where it did not come to tell the others; they had the key for an hour."""
    (project / "resources.py").write_text(PID + LOST)
    with (project / "config.yaml").open("a") as file:
        file.write("authentication: {cacheTTL: 1h}\n")
    async with running(project) as server, pinned(server) as clients:
        credential, _ = await credential_of(server, "key")
        assert [200, 200] == await statuses(clients.values(), credential)
        lost, kept = clients.values()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await lost.post("/Lost")
        async with asyncio.timeout(SECONDS):
            while [401] != await statuses([kept], credential):
                pass


# Workers that die


async def test_a_killed_worker_is_there_again_and_nobody_is_refused(project: Path) -> None:
    """Its connections wait for it; the other one goes on."""
    async with running(project) as server, asking(f"{server.url}/Pid") as loop:
        first, other = (f"200 {pid}" for pid in children(server.process.pid))
        await loop.heard(first)
        await loop.heard(other)
        for victim in (first, other):
            known = {*loop.answers}
            os.kill(int(victim.removeprefix("200 ")), signal.SIGKILL)
            await loop.until(lambda answers, known=known: bool({*answers} - known - {"nothing"}))
        log = await logged(project, "is started again", 2)
        assert {f"200 {pid}" for pid in children(server.process.pid)} <= {*loop.answers}

    assert [] == [failure for failure in loop.failed if "Refused" in failure]
    for number, victim in enumerate((first, other)):
        process = victim.removeprefix("200 ")
        line = f"worker {number} (process {process}) was killed by signal 9 (Killed)"
        assert f"{line} and is started again" in log
    assert "Traceback" not in log


HANGS = """
import time


class Hangs(Resource):
    public = True

    @staticmethod
    def post():
        while True:
            time.sleep(0.01)
"""


async def test_a_worker_that_hangs_is_killed_and_there_again(project: Path) -> None:
    """Whoever waits for it does not wait for ever, and the log says where it was."""
    (project / "resources.py").write_text(PID + HANGS)
    (project / "config.yaml").write_text(
        config().replace("workers: 2", "workers: 2, workerTimeout: 500")
    )
    async with running(project) as server, pinned(server) as clients:
        victim, session = clients.popitem()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await session.post("/Hangs")
        log = await logged(project, "is started again", 1)
        assert clients.keys() < await answering(server)

    (line,) = (line for line in log.splitlines() if "has not moved for 0.5 s and is killed" in line)
    assert f"(process {victim})" in line
    assert 'resources.py", line 23 in post' in log


async def test_operations_work_whichever_worker_is_gone(project: Path) -> None:
    """The socket in the data folder is the parent's: it waits, and is gone when that ends."""
    local = project / ".harperpy" / "operations.sock"
    async with running(project) as server:
        for victim in children(server.process.pid):
            os.kill(int(victim), signal.SIGKILL)
            assert ["root"] == [user["username"] for user in await said(project, "user", "list")]
        assert 0o600 == local.stat().st_mode & 0o777
    assert not local.exists()


async def test_a_worker_that_always_dies_does_not_take_the_others_along(project: Path) -> None:
    """It is started again and again, with pauses that grow."""
    dies = "import os\nif os.path.exists('die'):\n    os._exit(3)\n"
    (project / "resources.py").write_text(dies + PID)
    async with running(project) as server:
        first, other = children(server.process.pid)
        (project / "die").touch()
        os.kill(int(other), signal.SIGKILL)
        log = await logged(project, "ended with exit code 3 and is started again", 3)
        assert first in children(server.process.pid)
        (project / "die").unlink()
        assert {int(first)} < await answering(server)
    assert "worker 0" not in log


async def test_a_log_that_takes_no_more_ends_no_server(project: Path) -> None:
    """Where the disk that it lies on is full nothing is said, and the worker comes back."""
    full = ("sh", "-c", 'exec "$@" 2> /dev/full', "sh")
    async with serving(project, "run", environ=ADMIN, within=full) as server:
        victim, other = map(int, children(server.process.pid))
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(SECONDS):
            while victim in (found := await answering(server)):
                pass
        assert other in found


@pytest.mark.skipif(sys.platform != "linux", reason="only there another's limits can be set")
async def test_a_machine_without_room_for_a_worker_keeps_the_others(project: Path) -> None:
    """Nobody waits for it, and it is started as soon as there is room."""
    async with running(project) as server:
        first, other = children(server.process.pid)
        parent, kind = server.process.pid, resource.RLIMIT_NOFILE
        before = resource.prlimit(parent, kind, (8, resource.getrlimit(kind)[1]))
        os.kill(int(other), signal.SIGKILL)
        await logged(project, "worker 1 cannot be started: Too many open files", 1)
        resource.prlimit(parent, kind, before)
        assert {int(first)} < await answering(server)


@pytest.mark.parametrize("place", [0, 1])
async def test_nobody_waits_for_a_worker_that_cannot_start(place: int, project: Path) -> None:
    """A config.yaml that is broken by now costs a worker its queue; mended, it has a new one."""
    async with running(project) as server:
        victim = children(server.process.pid)[place]
        (project / "config.yaml").write_text("nonsense: 1")
        os.kill(int(victim), signal.SIGKILL)
        log = await logged(project, "and is started again", 3)
        for _ in range(MANY // 8):
            assert 200 == (await get(f"{server.url}/Pid"))[0]
        assert ["root"] == [user["username"] for user in await said(project, "user", "list")]
        (project / "config.yaml").write_text(config())
        found = await answering(server)
    assert int(victim) not in found
    assert f"worker {place} (process {victim})" in log


async def test_workers_end_with_their_parent(project: Path) -> None:
    """A parent that was killed leaves nobody, and the next start is free to begin."""
    async with running(project) as server:
        assert -signal.SIGKILL == await server.end(signal.SIGKILL)
        await closed(server.url)
    async with running(project) as again:
        assert 200 == (await get(f"{again.url}/Pid"))[0]


# The end


def slow(folder: Path) -> None:
    """Give a project the model `slow`, which waits for a file `go`."""
    (folder / "slow.py").write_text(SLOW)
    with (folder / "config.yaml").open("a") as config:
        config.write("plugins: {slow: {path: slow.py}}\n")


@asynccontextmanager
async def streams(clients: Iterable[Any]) -> AsyncIterator[list[aiohttp.ClientResponse]]:
    """A stream of the slow model on each connection, its first word read."""
    body = {**CHAT, "model": "slow", "stream": True}
    async with AsyncExitStack() as stack:
        opened: list[aiohttp.ClientResponse] = []
        for client in clients:
            asked = client.post("/v1/chat/completions", json=body, headers={"Authorization": ROOT})
            response = await stack.enter_async_context(asked)
            while b"one" not in await response.content.readline():
                pass
            opened.append(response)
        yield opened


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_the_streams_of_all_workers_end(project: Path, number: int) -> None:
    """No more connections; what runs is finished and written down; the exit code is 0."""
    slow(project)
    async with (
        running(project) as server,
        pinned(server) as clients,
        streams(clients.values()) as opened,
    ):
        server.process.send_signal(number)
        await closed(server.url)
        (project / "go").touch()
        async with asyncio.timeout(SECONDS):
            ends = [events(await response.text())[-1] for response in opened]
            code = await server.process.wait()

    assert (0, ["[DONE]", "[DONE]"]) == (code, ends)
    assert [True, True] == [row["success"] for row in await rows(project)]
    assert "Traceback" not in (project / "log").read_text()


async def test_a_second_ctrl_c_waits_for_nobody(project: Path) -> None:
    """Streams are cut off, and the exit code says so."""
    slow(project)
    async with running(project) as server, pinned(server) as clients, streams(clients.values()):
        workers = children(server.process.pid)
        assert HARD_STOP == await server.interrupt()

    assert [] == [pid for pid in workers if os.path.exists(f"/proc/{pid}")]  # noqa: ASYNC240, PTH110  # no file


async def test_a_signal_ends_a_start_that_hangs(project: Path) -> None:
    """With exit code 0, as of one process."""
    (project / "resources.py").write_text(
        "import asyncio\n\nasync def handle_application(scope):\n"
        "    print('hanging', flush=True)\n    await asyncio.Event().wait()\n"
    )
    async with started(project, "run", environ=ADMIN) as process:
        await until(process, "hanging")
        process.terminate()
        async with asyncio.timeout(SECONDS):
            assert 0 == await process.wait()


# Starts that fail


async def test_a_start_that_fails_fails_as_that_of_one_process(project: Path) -> None:
    """In one sentence, with exit code 1: a taken port, a kind nobody knows, no administrator."""
    with socket.socket() as taken:
        # Who shares it with others must not get ours.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases: dict[str, tuple[str, dict[str, str]]] = {
            "(http.port): the port is in use": (config(2, port), ADMIN),
            "did you mean 'echo'?": (config().replace("echo", "ecoh"), ADMIN),
            FIRST: (config(), {}),
        }
        for sentence, (text, environ) in cases.items():
            told: set[str] = set()
            for number in (1, 2):
                one = text.replace("workers: 2", f"workers: {number}")
                (project / "config.yaml").write_text(one)
                told.add(await refusal(project, "run", **environ))
            (same,) = told
            assert sentence in same


async def test_a_plugin_that_fails_is_no_obstacle(project: Path) -> None:
    """As with one process: each worker serves the rest, and says so."""
    with (project / "config.yaml").open("a") as file:
        file.write("plugins: {gone: {path: gone.py}}\n")
    async with running(project) as server, pinned(server) as clients:
        assert 1 == server.printed.count("Plugins that did not start")
        for client in clients.values():
            async with client.get("/health") as response:
                assert {"status": "degraded"} == await response.json()


async def test_a_worker_that_never_was_ready_ends_the_start(project: Path) -> None:
    """All are stopped, and the exit code is that worker's."""
    (project / "resources.py").write_text(
        "import os\nif os.path.exists('second'):\n    os._exit(7)\nopen('second', 'w').close()\n"
    )
    async with started(project, "run", environ=ADMIN) as process:
        out, _ = await asyncio.wait_for(process.communicate(), SECONDS)

    assert 7 == process.returncode
    assert b"Ready on" not in out
    assert "Traceback" not in (project / "log").read_text()


async def test_one_data_folder_is_one_parents(project: Path) -> None:
    """A second start is refused and does not disturb the first."""
    async with running(project) as server:
        sentence = await refusal(project, "run", **ADMIN)
        assert f"another harperpy (process {server.process.pid}) already uses" in sentence
        assert ["root"] == [user["username"] for user in await said(project, "user", "list")]


# What is written down


async def test_each_call_of_each_worker_is_a_row(project: Path) -> None:
    """Calls of OpenAI's client, whole and streamed: a row each, whoever had it."""
    select = "SELECT id % 2 AS worker, request_id, success FROM system.hdb_model_calls"
    async with running(project) as server, pinned(server) as clients:
        key = (await operate(server, "add_api_key", name="test"))["api_key"]
        await asyncio.gather(*(chats(f"{server.url}/v1", key) for _ in range(20)))
        for number, process in enumerate(children(server.process.pid)):
            headers = {"Authorization": ROOT, "X-Request-Id": f"of-{number}"}
            asked = clients[int(process)].post("/v1/chat/completions", json=CHAT, headers=headers)
            async with asked as response:
                assert 200 == response.status
        async with asyncio.timeout(SECONDS):
            while len(found := await operate(server, "sql", sql=select)) < 42:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    counted = Counter(row["worker"] for row in found)
    named = {row["request_id"]: row["worker"] for row in found}
    assert (42, {0, 1}) == (counted.total(), {*counted})
    assert (0, 1) == (named["of-0"], named["of-1"])
    assert {True} == {bool(row["success"]) for row in found}


async def chats(url: str, key: str) -> None:
    """One whole answer and one streamed, on connections of their own."""
    async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0) as client:
        whole = await client.chat.completions.create(**CHAT)
        text = ""
        async for piece in await client.chat.completions.create(**CHAT, stream=True):
            text += piece.choices[0].delta.content or ""
    assert "hello" in text
    assert text == whole.choices[0].message.content


def test_two_ledgers_give_no_number_twice() -> None:
    """However fast they count: the database keeps one row for a number."""
    ledgers = [Ledger(index, 3) for index in range(3)]
    given = [[ledger.next_id() for ledger in ledgers] for _ in range(5000)]

    assert 15000 == len({number for numbers in given for number in numbers})
    for own in zip(*given, strict=True):
        assert list(own) == sorted(own)


async def test_one_child_runs_the_local_model_for_all_workers(project: Path) -> None:
    """Each worker answers with it, and one process has it loaded."""
    weights()
    text = (project / "config.yaml").read_text().replace("backend: echo", "backend: local", 1)
    (project / "config.yaml").write_text(text)
    async with running(project) as server, pinned(server) as clients:
        for session in clients.values():
            body = {**CHAT, "max_tokens": 3}
            headers = {"Authorization": ROOT}
            async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
                assert 200 == answer.status, await answer.text()
                assert (await answer.json())["choices"][0]["message"]["content"]
        loaded = [child for worker in clients for child in children(worker)]
    assert 1 == len(loaded)
