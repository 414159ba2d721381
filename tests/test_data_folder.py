"""The data folder: where it is, and whose."""

import os
import shutil
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from commands import ADMIN, Serving, configured, get, names, refusal, said, serving
from helpers import basic

HOUR = 3_600_000_000
UNSHARE = shutil.which("unshare")
CAN_GIVE_AWAY = os.geteuid() == 0 and UNSHARE and not subprocess.call([UNSHARE, "-r", "true"])


async def called(server: Serving) -> int:
    """Ask a model; the number of the call."""
    headers = {"Authorization": basic(*ADMIN.values())}
    body = {"messages": [{"role": "user", "content": "hello"}]}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        return int(response.headers["x-harper-call-id"])


async def test_paths_of_the_configuration_begin_at_the_project(tmp_path: Path) -> None:
    """From whichever folder it is served and asked, there is one data folder and one database."""
    project = configured(
        tmp_path / "project", "rootPath: data\ndatabase: {url: 'sqlite:///kept/calls.db'}\n"
    )
    async with serving(tmp_path, "dev", "project"):
        within = await said(project, "user", "list")
        without = await said(tmp_path, "user", "list", "--dir", "project")

    assert ["HDB_ADMIN"] == [one["username"] for one in within]
    assert within == without == await said(project, "user", "list")
    assert ["log", "project"] == names(tmp_path)
    assert ["calls.db"] == names(project / "kept")
    assert "secret.key" in names(project / "data")


async def test_a_folder_that_all_share_is_no_data_folder(tmp_path: Path) -> None:
    """One such as /tmp is refused and keeps its mode, which others need; an empty one is taken."""
    project = configured(tmp_path / "project")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "others").touch()
    shared.chmod(0o1777)

    told = await refusal(project, "run", "--root", str(shared), **ADMIN)

    assert (
        f"cannot use {shared} as data folder: others write there too; name a folder in it" == told
    )
    assert (0o1777, ["others"]) == (stat.S_IMODE(shared.stat().st_mode), names(shared))
    (shared / "others").unlink()
    async with serving(project, "run", "--root", str(shared), environ=ADMIN):
        pass
    assert 0o700 == stat.S_IMODE(shared.stat().st_mode)


@pytest.mark.skipif(not CAN_GIVE_AWAY, reason="it takes root, and a name space of users")
async def test_a_volume_may_be_somebody_elses(tmp_path: Path) -> None:
    """Where the group may write, as Kubernetes has it; its mode stays, the files are ours alone."""
    project = configured(tmp_path / "project")
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 1, -1)
    volume.chmod(0o2775)

    async with serving(
        project, "run", "--root", str(volume), environ=ADMIN, within=("unshare", "-r")
    ) as server:
        assert 200 == (await get(f"{server.url}/health"))[0]

    assert 0o2775 == stat.S_IMODE(volume.stat().st_mode)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in volume.iterdir() if file.is_file()}
    assert {0o600} == modes


async def test_a_clock_that_was_set_back_numbers_no_call_anew(tmp_path: Path) -> None:
    """Its calls come after those that have rows, at the time that the clock tells now."""
    project = configured(tmp_path / "project")
    database = project / ".harperpy" / "system.db"
    async with serving(project, "run", environ=ADMIN) as server:
        await called(server)
    with closing(sqlite3.connect(database)) as ahead, ahead:
        ahead.execute("UPDATE hdb_model_calls SET id = id + ?", (HOUR,))
        ((last,),) = ahead.execute("SELECT id FROM hdb_model_calls")

    async with serving(project, "run", environ=ADMIN) as server:
        number = await called(server)

    with closing(sqlite3.connect(database)) as ahead:
        times = ahead.execute("SELECT __createdtime__ FROM hdb_model_calls ORDER BY id").fetchall()
    assert last < number
    assert 2 == len(times)
    assert times[1][0] - times[0][0] < HOUR / 1000 / 2


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_lock_that_was_removed_lets_no_second_server_in(
    tmp_path: Path, workers: int
) -> None:
    """People remove what they think was left behind; the first server goes on."""
    project = configured(tmp_path / "project")
    config = (project / "config.yaml").read_text()
    (project / "config.yaml").write_text(
        config.replace("http: {port: 0}", f"http: {{port: 0, workers: {workers}}}")
    )
    async with serving(project, "run", environ=ADMIN) as server:
        (project / ".harperpy" / "harperpy.lock").unlink()

        for command in ("run", "dev"):
            told = await refusal(project, command, **ADMIN)
            assert told.endswith("is gone, already uses the data folder .harperpy")
        assert ["root"] == [one["username"] for one in await said(project, "user", "list")]
        assert 200 == (await get(f"{server.url}/health"))[0]
