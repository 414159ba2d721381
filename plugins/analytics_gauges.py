"""What a server measures of itself whenever it reports: processor, memory, loop, disk, tables."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path

import sqlalchemy as sa

from harperpy import Analytics, Scope

_TABLES_SECONDS = 3600.0
_UNIT = 1 if sys.platform == "darwin" else 1024


class Gauges:
    """Functions that the analytics call for each report, and what they count from."""

    def __init__(self, scope: Scope, analytics: Analytics) -> None:
        self._analytics = analytics
        self._database = scope.database
        self._logger = scope.logger
        self._root = scope.root
        self._tables_due = 0.0
        self.begin()
        record = analytics.record
        record(lambda: self._user() / self._wall(), "cpu-usage", "user")
        record(lambda: self._system() / self._wall(), "cpu-usage", "system")
        record(lambda: self._user() + self._system(), "resource-usage", "cpu")
        record(memory, "resource-usage", "rss")
        record(lambda: self._loop() / self._wall(), "utilization")
        if analytics.index == 0:
            record(self._database_size, "database-size", "system")
            record(lambda: shutil.disk_usage(self._root).total, "storage-volume", "size")
            record(lambda: shutil.disk_usage(self._root).free, "storage-volume", "free")

    def begin(self) -> None:
        """Count from now on; in the thread of the event loop, whose time it takes."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._began = time.perf_counter()
        self._thread_began = time.thread_time()
        self._user_began, self._system_began = usage.ru_utime, usage.ru_stime

    async def measure(self) -> None:
        """Measure what takes longer, when it is due: each table reads the whole file once."""
        if self._analytics.index != 0 or time.monotonic() < self._tables_due:
            return
        self._tables_due = time.monotonic() + _TABLES_SECONDS
        try:
            sizes = await self._database.read(_table_sizes)
        except Exception as error:  # noqa: BLE001  # not every SQLite can tell
            self._logger.info("the sizes of tables cannot be measured: %s", error)
            return
        for table, size in sizes.items():
            self._analytics.record(size, "table-size", table)

    def _wall(self) -> float:
        return max(time.perf_counter() - self._began, 1e-9)

    def _user(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - self._user_began

    def _system(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_stime - self._system_began

    def _loop(self) -> float:
        return time.thread_time() - self._thread_began

    def _database_size(self) -> int:
        """The file, and what is not yet merged into it."""
        path = self._database.path
        files = (path, path.with_name(f"{path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())


def memory() -> int:
    """The bytes that the process holds; the most it ever has where no system says more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def _table_sizes(connection: sa.Connection) -> dict[str, int]:
    """Bytes by table, its indexes included."""
    pages, schema = (
        sa.table("dbstat", sa.column("name"), sa.column("pgsize")),
        sa.table("sqlite_master", sa.column("name"), sa.column("tbl_name")),
    )
    size = sa.func.sum(pages.c.pgsize)
    select = (
        sa.select(schema.c.tbl_name, size)
        .join_from(pages, schema, pages.c.name == schema.c.name)
        .group_by(schema.c.tbl_name)
    )
    return {str(table): int(bytes_) for table, bytes_ in connection.execute(select)}
