"""`read_log`: one log of all workers and starts, bounded, and without secrets."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from commands import ADMIN, ECHO, FREE, SECONDS, get, said, serving
from harperpy.testing import running

MARKS = """
import logging
import os

from harperpy import Resource

class Mark(Resource):
    public = True

    @staticmethod
    async def get(target, context):
        logging.getLogger("harperpy.mine").warning("marked by %d", os.getpid())
        return os.getpid()
"""


@pytest.fixture
def logger() -> logging.Logger:
    """What some part of the server would log with."""
    logger = logging.getLogger("harperpy.test")
    logger.setLevel(logging.INFO)
    return logger


async def test_all_workers_have_one_log(tmp_path: Path) -> None:
    """Whichever of them answers, it tells what each has logged."""
    (tmp_path / "config.yaml").write_text(
        FREE.replace("port: 0}\n", "port: 0, workers: 2}\n") + ECHO
    )
    (tmp_path / "resources.py").write_text(MARKS)
    async with serving(tmp_path, "run", environ=ADMIN) as server:
        workers = set[int]()
        async with asyncio.timeout(SECONDS):
            while len(workers) < 2:
                workers.add((await get(f"{server.url}/Mark"))[1])

        for _ in range(4):
            rows = await said(tmp_path, "read_log", "filter=marked", "level=warn")
            assert {f"marked by {pid}" for pid in workers} == {row["message"] for row in rows}
            assert workers == {int(row["thread"].split()[0]) for row in rows}


async def test_the_log_outlives_the_server(tmp_path: Path, logger: logging.Logger) -> None:
    """What led to a stop is read after the next start; a line that was cut off is left out."""
    async with running(root=tmp_path):
        logger.error("the end is near")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"level": "err')
    async with running(root=tmp_path) as server:
        rows = await server.operate("read_log", filter="the end")

    assert ["the end is near"] == [row["message"] for row in rows]
    assert 0o600 == (tmp_path / "log.jsonl").stat().st_mode & 0o777


async def test_the_log_is_bounded(tmp_path: Path, logger: logging.Logger) -> None:
    """Of much that is logged the newest is there, in two files of a megabyte."""
    async with running(root=tmp_path) as server:
        for at in range(4000):
            logger.info("%d %s", at, "x" * 1000)
        rows = await server.operate("read_log", filter="xxx", limit=10_000)
        sizes = [(tmp_path / name).stat().st_size for name in ("log.jsonl", "older-log.jsonl")]

    numbers = [int(row["message"].split()[0]) for row in rows]
    assert [*range(3999, 3999 - len(numbers), -1)] == numbers
    assert 800 < len(numbers) < 4000
    assert max(sizes) < 1_010_000


ODD: dict[str, tuple[Any, ...]] = {
    "half a character": ("odd \ud800",),
    "too few values": ("odd %d %d", 1),
    "a long one": ("odd %s", "x" * 100_000),
    "lines": ("odd\nand more",),
}


@pytest.mark.parametrize("given", ODD.values(), ids=ODD)
async def test_odd_records_are_kept(given: tuple[Any, ...], logger: logging.Logger) -> None:
    """As far as they can be, on one line each, and nobody who logs is failed."""
    logger.propagate = False
    parent = logging.getLogger("harperpy")
    async with running() as server:
        record = logger.makeRecord(logger.name, logging.INFO, "", 0, given[0], given[1:], None)
        for handler in parent.handlers:
            handler.handle(record)
        rows = await server.operate("read_log", filter="odd")

    logger.propagate = True
    assert [True] == [row["message"].startswith("odd") for row in rows]
    assert len(rows[0]["message"]) <= 4000


async def test_a_disk_that_takes_nothing_fails_nobody(
    tmp_path: Path, logger: logging.Logger
) -> None:
    """What cannot be written is not there, and what comes later is."""
    async with running(root=tmp_path) as server:
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        (tmp_path / "log.jsonl").mkdir()
        logger.error("lost")
        (tmp_path / "log.jsonl").rmdir()
        logger.error("found")
        rows = await server.operate("read_log", level="error")

    assert ["found"] == [row["message"] for row in rows]
