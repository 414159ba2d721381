"""The audit: `read_audit_log`, and how long `system.hdb_audit` is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import sqlalchemy as sa

from harperpy import Deed, HarperError, InvalidBody, Scope

from .places import Int64

_CLEANING_SECONDS = 3600.0
_SYSTEM = "system"
# Who may do what, and since when, is asked for long after.
_SECURITY_MS = 30 * 86_400_000
_SHOWN = (
    "operation",
    "database",
    "table",
    "user_name",
    "key_id",
    "source",
    "request_id",
    "timestamp",
    "hash_values",
    "records",
    "original_records",
)


class ReadAuditLog(msgspec.Struct, forbid_unknown_fields=True):
    """What to look for: records' keys, names of users, or one or two times (ms since 1970)."""

    synonyms: ClassVar[Mapping[str, str]] = {"schema": "database"}

    database: str | None = None
    table: str | None = None
    search_type: Literal["hash_value", "timestamp", "username"] | None = None
    search_values: Annotated[list[str | Int64 | float], msgspec.Meta(max_length=10_000)] = []
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000


class DeleteAuditLogsBefore(msgspec.Struct, forbid_unknown_fields=True):
    """Until when (ms since 1970), and of which table alone."""

    synonyms: ClassVar[Mapping[str, str]] = {"schema": "database"}

    timestamp: float
    database: Literal["data"] = "data"
    table: str | None = None


def handle_application(scope: Scope) -> None:
    """Add the operations; remove what is too old, now and then once an hour."""
    audit = AuditLog(scope)
    scope.operations.add("read_audit_log", audit.read, ReadAuditLog, reads=True)
    scope.operations.add("delete_audit_logs_before", audit.delete, DeleteAuditLogsBefore)
    scope.create_task(_clean(scope), name="audit retention")


class AuditLog:
    """Reads the audit."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database

    async def read(self, request: ReadAuditLog) -> list[dict[str, Any]]:
        """The rows that fit, the newest first. Raises `InvalidBody` for values that do not."""
        audit = self._database.audit
        select = sa.select(*(audit.c[name] for name in _SHOWN))
        for column, value in ((audit.c.database, request.database), (audit.c.table, request.table)):
            select = select if value is None else select.where(column == value)
        if request.search_type is not None:
            select = select.where(_SEARCHES[request.search_type](audit, request.search_values))
        elif request.search_values:
            message = "search_type: expected hash_value, timestamp or username beside search_values"
            raise InvalidBody(message, param="search_type")
        newest = select.order_by(audit.c.id.desc()).limit(request.limit)

        def work(connection: sa.Connection) -> list[dict[str, Any]]:
            rows = connection.execute(newest).mappings()
            return [{name: row[name] for name in _SHOWN} for row in rows]

        return await self._database.read(work)

    async def delete(self, request: DeleteAuditLogsBefore) -> dict[str, Any]:
        """Forget what was written to plugins' tables before a moment; who may do what stays."""
        audit, deed = self._database.audit, Deed("hdb_audit")
        old = (audit.c.database == request.database) & (audit.c.timestamp < request.timestamp)
        if request.table is not None:
            old &= audit.c.table == request.table

        def work(connection: sa.Connection) -> int:
            count = connection.execute(sa.delete(audit).where(old)).rowcount
            deed.note(connection, "delete", before={**msgspec.to_builtins(request), "rows": count})
            return count

        count = await self._database.run(work)
        return {"message": f"{count} audit rows deleted", "deleted": count}


def _by_key(audit: sa.Table, values: list[Any]) -> sa.ColumnElement[bool]:
    each = sa.func.json_each(audit.c.hash_values).table_valued("value")
    return sa.exists(sa.select(1).select_from(each).where(each.c.value.in_(values)))


def _by_name(audit: sa.Table, values: list[Any]) -> sa.ColumnElement[bool]:
    return audit.c.user_name.in_(values)


def _by_time(audit: sa.Table, values: list[Any]) -> sa.ColumnElement[bool]:
    if not 1 <= len(values) <= 2 or any(isinstance(value, str) for value in values):
        message = "search_values: expected one or two times, in milliseconds since 1970"
        raise InvalidBody(message, param="search_values")
    since, *until = values
    found: sa.ColumnElement[bool] = audit.c.timestamp >= since
    return found & (audit.c.timestamp <= until[0]) if until else found


_SEARCHES: dict[str, Callable[[sa.Table, list[Any]], sa.ColumnElement[bool]]] = {
    "hash_value": _by_key,
    "timestamp": _by_time,
    "username": _by_name,
}


async def _clean(scope: Scope) -> None:
    audit, kept = scope.database.audit, scope.config.logging.audit_retention
    while True:
        now = time.time() * 1000
        of_plugins = (audit.c.database != _SYSTEM) & (audit.c.timestamp < now - kept)
        too_old = audit.c.timestamp < now - max(kept, _SECURITY_MS)
        try:
            await scope.database.prune(audit, of_plugins | too_old)
        except HarperError as error:
            scope.logger.warning("old audit rows stay for another hour: %s", error)
        await asyncio.sleep(_CLEANING_SECONDS)
