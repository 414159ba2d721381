"""`restart`: `harperpy run` starts anew, with what config.yaml says by then."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from commands import ADMIN, ECHO, FREE, SECONDS, Serving, operate, said, serving, started, until

ONE = FREE + ECHO
TWO = ONE.replace("http: {port: 0}", "http: {port: 0, workers: 2}")


@pytest.fixture(params=[ONE, TWO], ids=["one process", "two workers"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Serving]:
    """`harperpy run`, ready."""
    (tmp_path / "config.yaml").write_text(request.param)
    async with serving(tmp_path, "run", environ=ADMIN) as served:
        yield served


async def ready(server: Serving) -> Serving:
    """The server that the same process is by then."""
    return Serving(server.process, await until(server.process, "Ready on"))


async def test_a_restart_brings_what_config_yaml_says_by_then(server: Serving) -> None:
    """All workers know that one is due, its answer still comes, and who asked is in the audit."""
    await operate(server, "set_configuration", http_compressionThreshold=9)
    assert 0 == (await operate(server, "get_configuration"))[1]["http"]["compressionThreshold"]

    for _ in range(8):
        assert (await operate(server, "get_status"))[1]["restart_required"]

    status, told, headers = await operate(server, "restart_service", service="http_workers")

    assert (200, {"message": "Restarting harperpy."}) == (status, told)
    assert "close" == headers["Connection"]
    again = await ready(server)
    assert 9 == (await operate(again, "get_configuration"))[1]["http"]["compressionThreshold"]
    assert "restart_required" not in (await operate(again, "get_status"))[1]
    _, (row, *_), _ = await operate(again, "read_audit_log", table="server")
    assert ("restart", ["http_workers"], "root") == (
        row["operation"],
        row["hash_values"],
        row["user_name"],
    )
    assert 0 == await again.end()


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ("http: {port: none}", "http.port: expected"),
        ("models: {generative: {default: {backend: ehco}}}", "did you mean 'echo'?"),
        ("models: {generative: {default: {backend: openai}}}", "default.apiKey: expected a key"),
        ("limits: {rules: [{per: user}]}", "it limits nothing"),
        ("limits: {store: memory}\nhttp: {workers: 3}", "limits.store: memory is each"),
        ("plugins: {mine: {timeout: -1}}", "plugins.mine.timeout: expected"),
    ],
)
async def test_a_config_that_nothing_starts_with_stops_no_server(
    server: Serving, tmp_path: Path, config: str, wrong: str
) -> None:
    """It is refused, what is wrong is said, and the server goes on."""
    (tmp_path / "config.yaml").write_text(config)

    status, told, _ = await operate(server, "restart")

    assert 409 == status
    assert "the server stays as it is: " in told["error"]
    assert wrong in told["error"]
    assert 200 == (await operate(server, "get_status"))[0]


@pytest.mark.parametrize("key", ["http_port", "operationsApi_network_port"])
async def test_a_port_that_is_taken_stops_no_server(server: Serving, key: str) -> None:
    """Nobody would be there to start it once more: it is refused, and the server goes on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        await operate(server, "set_configuration", **{key: port})

        status, told, _ = await operate(server, "restart")

    assert 409 == status
    assert f":{port} ({key.replace('_', '.')}): the port is in use" in told["error"]
    assert 200 == (await operate(server, "get_status"))[0]


async def test_who_is_told_to_end_does_not_come_back(server: Serving) -> None:
    """Neither by an order before nor by one after."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        server.process.send_signal(number)

    async with asyncio.timeout(SECONDS):
        assert 0 == await server.process.wait()


async def test_the_command_line_restarts_too(server: Serving, tmp_path: Path) -> None:
    """By the local socket."""
    assert "Restarting harperpy." == await said(tmp_path, "restart")
    again = await ready(server)
    assert 0 == await again.end()


@pytest.mark.slow
async def test_what_does_not_end_comes_back_all_the_same(tmp_path: Path) -> None:
    """A thread that never returns is cut off, and the server starts anew."""
    (tmp_path / "config.yaml").write_text(ONE)
    (tmp_path / "resources.py").write_text(
        "import asyncio\nimport time\n\n\ndef handle_application(scope):\n"
        "    scope.create_task(asyncio.to_thread(time.sleep, 3600))\n"
    )
    async with started(tmp_path, "run", environ=ADMIN) as process:
        server = Serving(process, await until(process, "Ready on"))
        await operate(server, "restart")
        assert 200 == (await operate(await ready(server), "get_status"))[0]
