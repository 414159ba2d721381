"""A server's database file, from outside: read, kept busy, or put somewhere else."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

FILES = ("system.db", "system.db-wal", "system.db-shm")

ROLL_UP = """
SELECT date("__createdtime__" / 1000, 'unixepoch') AS day, coalesce(tenant, '') AS tenant,
  coalesce(user, '') AS user, coalesce(model, '') AS model, method, count(*) AS calls,
  sum(NOT success) AS failures, coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
  coalesce(sum(completion_tokens), 0) AS completion_tokens
FROM hdb_model_calls GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""
DAILY = """
SELECT day, tenant, user, model, method, sum(calls) AS calls, sum(failures) AS failures,
  sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens
FROM hdb_model_calls_daily GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""


def told(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a SELECT on a database file."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute(sql).fetchall()


@contextmanager
def busy(root: Path) -> Iterator[None]:
    """Another process writes to the database, and keeps everyone from it."""
    with closing(sqlite3.connect(root / FILES[0], isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def away(root: Path, *names: str) -> Iterator[None]:
    """Files of a data folder, somewhere else while the block runs; the database's, if not said."""
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for name in names or FILES[:1]:
        (root / name).rename(elsewhere / name)
    yield
    # The database last: who opens it without its log would make a new one.
    for name in reversed(names or FILES[:1]):
        (elsewhere / name).rename(root / name)
