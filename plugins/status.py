"""Status: how the server and its plugins are, and what operators note of it for one another."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from sqlalchemy.dialects.sqlite import insert

from harperpy import Database, Deed, HarperError, InvalidBody, NotFound, Scope

_AVAILABILITY = ("Available", "Unavailable")

Noted = Literal["primary", "maintenance", "availability"]


class GetStatus(msgspec.Struct, forbid_unknown_fields=True):
    """The note that is asked for; all there is to say without one."""

    id: Noted | None = None


class SetStatus(msgspec.Struct, forbid_unknown_fields=True):
    """What to note, and under which name; `availability` is `Available` or `Unavailable`."""

    status: Annotated[str, Meta(min_length=1, max_length=1000)]
    id: Noted = "primary"


class ClearStatus(msgspec.Struct, forbid_unknown_fields=True):
    """The note to remove."""

    id: Noted


def add_operations(scope: Scope) -> None:
    """Offer them to super users."""
    status = Status(scope)
    scope.operations.add("get_status", status.get, GetStatus, reads=True)
    scope.operations.add("set_status", status.set, SetStatus)
    scope.operations.add("clear_status", status.clear, ClearStatus)


class Status:
    """What is noted in `system.hdb_status`, and how the server is."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._database: Database = scope.database
        self._table = scope.database.system["hdb_status"]
        self._began = time.time() * 1000

    async def get(self, request: GetStatus) -> dict[str, Any]:
        """The state of the server and of each plugin, what runs, and what is noted; or one note."""
        if request.id is None:
            status = {**self._scope.status(), "version": version("harperpy")}
            # Why this process wants a restart says more than that another does.
            return {**status, **await self._told(), **status}
        found = next((note for note in await self._notes() if note["id"] == request.id), None)
        if found is None:
            message = f"id: nothing is noted under '{request.id}'"
            raise NotFound(message, param="id")
        return found

    async def set(self, request: SetStatus) -> dict[str, Any]:
        """Note it, in the place of what was noted under that name."""
        if request.id == "availability" and request.status not in _AVAILABILITY:
            message = f"status: expected one of {', '.join(_AVAILABILITY)}"
            raise InvalidBody(message, param="status")
        table, now, deed = self._table, time.time() * 1000, Deed(self._table)
        times = {"__createdtime__": now, "__updatedtime__": now}
        new = insert(table).values(id=request.id, status=request.status, **times)
        upsert = new.on_conflict_do_update(
            index_elements=["id"], set_={"status": request.status, "__updatedtime__": now}
        ).returning(table)

        def work(connection: sa.Connection) -> dict[str, Any]:
            row = connection.execute(upsert).mappings().one()
            deed.note(connection, "upsert", request.id, after={"status": request.status})
            return dict(row)

        return await self._database.run(work)

    async def clear(self, request: ClearStatus) -> str:
        """Remove what is noted under that name, if anything is."""
        table, deed = self._table, Deed(self._table)
        removed = sa.delete(table).where(table.c.id == request.id).returning(table.c.status)

        def work(connection: sa.Connection) -> bool:
            if (status := connection.scalar(removed)) is None:
                return False
            deed.note(connection, "delete", request.id, before={"status": status})
            return True

        done = await self._database.run(work)
        return f"status {request.id} {'successfully cleared' if done else 'is clear'}"

    async def _told(self) -> dict[str, Any]:
        """The notes, if there are any, and whether config.yaml was changed by another worker."""
        try:
            notes, changed = await self._notes(), await self._is_changed()
        except HarperError as error:
            # A database that is away keeps nobody from the rest.
            return {"notes_error": error.public_message}
        restart = {"restart_required": True, "restart_reason": "config.yaml has changed"}
        return {**({"notes": notes} if notes else {}), **(restart if changed else {})}

    async def _notes(self) -> list[dict[str, Any]]:
        asked = sa.select(self._table).order_by(self._table.c.id)
        return await self._database.read(
            lambda connection: [dict(row) for row in connection.execute(asked).mappings()]
        )

    async def _is_changed(self) -> bool:
        """Whether `set_configuration` has written since this process began."""
        audit = self._database.audit.c
        since = sa.select(sa.func.count()).where(
            audit.timestamp > self._began, audit.database == "system", audit.table == "config.yaml"
        )
        return await self._database.read(lambda connection: connection.scalar(since) != 0)
