"""No room for model calls, on the disk or in the journal: none is made, and none is lost."""

import asyncio
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest

from commands import ADMIN, SECONDS, Serving, serving
from databases import busy
from harperpy import difference
from harperpy.testing import Answer, ScriptedUpstream, streamed, whole
from helpers import basic

HEADERS = {"Authorization": basic("root", "s3cret-enough")}
# Its name is long: so a journal is full after fewer calls.
CHAT: Any = {"model": "m" * 250, "messages": [{"role": "user", "content": "hello"}]}
CONFIG = """
http: {{port: 0}}
operationsApi: {{network: {{port: 0}}}}
database: {{busyTimeout: 100}}
accounting: {{journalSize: 1000000}}
models: {{generative: {{"m*": {{backend: openai, baseUrl: "{url}", maxRetries: 0}}}}}}
"""
UNDER_WAY = (
    (False, Answer(body=whole("Hello"), hang="head")),
    (True, Answer(events=streamed("Hello", " world"), hang="body")),
)
# A journal is full after some 1,500.
MANY = 5000
MOUNT = 'mount -t tmpfs -o size=8m,mode=700 tmpfs .harperpy && exec "$0" "$@"'
APART = ("unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT)

Full: TypeAlias = Callable[[Serving, Path], AbstractContextManager[None]]


def may_mount() -> bool:
    """Whether a process may have disks of its own here."""
    trial = [*APART[:-1], MOUNT.replace('"$0"', "true"), "true"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".harperpy").mkdir()
        try:
            return not subprocess.run(trial, cwd=folder, check=False).returncode
        except FileNotFoundError:
            return False


def seen_by(server: Serving, folder: Path) -> Path:
    """The data folder as the server has it."""
    return Path(f"/proc/{server.process.pid}/root{folder}/.harperpy")


def ended(root: Path) -> set[str]:
    """The calls whose end is in the journal."""
    segments = [file.read_bytes() for file in root.glob("journal/*/*")]
    return {found.decode() for found in re.findall(rb'O\{"id":(\d+)', b"".join(segments))}


@contextlib.contextmanager
def full_disk(server: Serving, folder: Path) -> Iterator[None]:
    """The server's own small disk, filled to the last byte."""
    ballast = seen_by(server, folder) / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def full_journal(_: Serving, folder: Path) -> AbstractContextManager[None]:
    """A database that takes no row."""
    return busy(folder / ".harperpy")


async def chat(session: aiohttp.ClientSession, **more: Any) -> int:
    """The status of a call."""
    async with session.post("/v1/chat/completions", json={**CHAT, **more}) as answer:
        text = await answer.text()
        if answer.status == 503:
            assert "1" == answer.headers["Retry-After"]
            assert "x-harper-call-id" not in answer.headers
            assert "journal" not in text
        return answer.status


async def rows_of(server: Serving) -> list[dict[str, Any]]:
    """All rows of calls."""
    select = {"operation": "sql", "sql": "SELECT * FROM system.hdb_model_calls"}
    async with (
        aiohttp.ClientSession(headers=HEADERS) as session,
        session.post(server.operations_url, json=select) as answer,
    ):
        found: list[dict[str, Any]] = await answer.json()
        return found


async def refused(session: aiohttp.ClientSession) -> int:
    """Call until there is no room for another; how many were answered."""
    answered = 0

    async def one_after_the_other() -> None:
        nonlocal answered
        while 200 == (status := await chat(session)):
            answered += 1
            assert answered < MANY
        assert 503 == status

    # At the same time they take more room, until they are answered.
    await asyncio.gather(*(one_after_the_other() for _ in range(8)))
    await one_after_the_other()
    return answered


@pytest.mark.parametrize(
    ("full", "within"),
    [
        pytest.param(
            full_disk, APART, marks=pytest.mark.skipif(not may_mount(), reason="no disk to fill")
        ),
        (full_journal, ()),
    ],
    ids=["disk", "journal"],
)
async def test_no_call_is_made_without_room_for_its_end(
    tmp_path: Path, upstream: ScriptedUpstream, full: Full, within: tuple[str, ...]
) -> None:
    """It is 503 and the provider hears nothing; those that were made have their rows in the end."""
    (tmp_path / "config.yaml").write_text(CONFIG.format(url=upstream.url))
    (tmp_path / ".harperpy").mkdir()
    async with (
        serving(tmp_path, "run", environ=ADMIN, within=within) as server,
        aiohttp.ClientSession(server.url, headers=HEADERS) as session,
    ):
        running: list[asyncio.Task[int]] = []
        for stream, answer in UNDER_WAY:
            upstream.script(answer)
            upstream.asked.clear()
            running.append(asyncio.create_task(chat(session, stream=stream)))
            await upstream.asked.wait()
        with full(server, tmp_path):
            answered = await refused(session)
            assert answered + 2 == len(upstream.requests)
            upstream.released.set()
            assert [200, 200] == await asyncio.gather(*running)
            made = {str(one.id) for one in upstream.served}
            assert made == ended(seen_by(server, tmp_path))
        async with asyncio.timeout(SECONDS):
            while 200 != await chat(session):
                pass
        rows = await rows_of(server)

    assert answered + 3 == len(upstream.requests) == len(rows)
    assert all(row["success"] for row in rows)
    assert not difference(rows, upstream.served)
