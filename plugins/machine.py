"""The machine: `system_information`, from what the system itself tells, as far as it does."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from harperpy import Database, Scope

_PROC = Path("/proc")
_KIB = 1024


class SystemInformation(msgspec.Struct, forbid_unknown_fields=True):
    """Which parts are asked for; all if none are. Unknown ones are ignored."""

    attributes: list[str] | Literal["*"] = []


def add_operations(scope: Scope) -> None:
    """Offer it to super users."""
    scope.operations.add(
        "system_information", Machine(scope).information, SystemInformation, reads=True
    )


class Machine:
    """What this process can tell of the machine and of itself."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._root = scope.root
        self._parts: Mapping[str, Callable[[], Any]] = {
            "system": _system,
            "time": _time,
            "cpu": _cpu,
            "memory": _memory,
            "disk": self._disk,
            "network": _network,
            "harperdb_processes": _processes,
            "metrics": self._metrics,
            "threads": _threads,
        }

    async def information(self, request: SystemInformation) -> dict[str, Any]:
        """The machine, its load, and what the server uses of it."""
        asked = [name for name in request.attributes if name != "*"]
        wanted = asked or [*self._parts, "table_size"]

        def work(connection: sa.Connection) -> dict[str, Any]:
            found = {name: part() for name, part in self._parts.items() if name in wanted}
            if "table_size" in wanted:
                found["table_size"] = _table_sizes(connection, self._database)
            return found

        return await self._database.read(work)

    def _disk(self) -> dict[str, Any]:
        total, used, free = shutil.disk_usage(self._root)
        return {"path": str(self._root), "size": total, "used": used, "available": free}

    def _metrics(self) -> dict[str, Any]:
        path = self._database.path
        files = {"database": path, "wal": path.with_name(f"{path.name}-wal")}
        sizes = {name: file.stat().st_size for name, file in files.items() if file.exists()}
        return {"database_bytes": sizes.get("database", 0), "wal_bytes": sizes.get("wal", 0)}


def _system() -> dict[str, Any]:
    return {
        "platform": platform.system().lower(),
        "release": platform.release(),
        "arch": platform.machine(),
        "hostname": socket.gethostname(),
        "python_version": platform.python_version(),
        "harperpy_version": importlib.metadata.version("harperpy"),
    }


def _time() -> dict[str, Any]:
    now = dt.datetime.now().astimezone()
    return {
        "current": int(now.timestamp() * 1000),
        "timezone": now.strftime("%z"),
        "timezone_name": now.tzname(),
        "uptime": _numbers("uptime").get("seconds"),
    }


def _cpu() -> dict[str, Any]:
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {"cores": os.cpu_count(), "load_average": [round(one, 2) for one in load]}


def _memory() -> dict[str, Any]:
    known = _numbers("meminfo")
    total, free = known.get("MemTotal", 0) * _KIB, known.get("MemAvailable", 0) * _KIB
    swap = {
        "swaptotal": known.get("SwapTotal", 0) * _KIB,
        "swapfree": known.get("SwapFree", 0) * _KIB,
    }
    return {"total": total, "available": free, "used": total - free, **swap, "rss": _resident()}


def _network() -> dict[str, Any]:
    lines = _lines("net/dev")[2:]
    parts = (line.replace(":", " ").split() for line in lines)
    shown = [
        {"iface": one[0], "rx_bytes": int(one[1]), "tx_bytes": int(one[9])}
        for one in parts
        if len(one) > 9
    ]
    return {"stats": shown}


def _processes() -> dict[str, Any]:
    times = os.times()
    own = {"pid": os.getpid(), "parent_pid": os.getppid(), "rss": _resident()}
    return {"core": [{**own, "cpu_seconds": round(times.user + times.system, 2)}]}


def _threads() -> list[dict[str, Any]]:
    return [{"name": one.name, "thread_id": one.native_id} for one in threading.enumerate()]


def _table_sizes(connection: sa.Connection, database: Database) -> list[dict[str, Any]]:
    tables = [("system", one) for one in database.system.values()]
    tables += [("data", one.sql) for one in database.tables]
    return [
        {
            "schema": schema,
            "table": str(table.name),
            "record_count": connection.scalar(sa.select(sa.func.count()).select_from(table)),
        }
        for schema, table in tables
    ]


def _resident() -> int:
    """The bytes of memory that this process has; 0 where the system does not tell."""
    parts = " ".join(_lines("self/statm")).split()
    return int(parts[1]) * os.sysconf("SC_PAGE_SIZE") if len(parts) > 1 else 0


def _numbers(name: str) -> dict[str, float]:
    lines = _lines(name)
    if name == "uptime":
        return {"seconds": float(lines[0].split()[0])} if lines else {}
    parts = (line.replace(":", " ").split() for line in lines)
    return {one[0]: float(one[1]) for one in parts if len(one) > 1 and one[1].isdigit()}


def _lines(name: str) -> list[str]:
    """What a file of /proc says; nothing where there is none."""
    try:
        return (_PROC / name).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
