"""Receipts: what is told of one model call, to whoever made it."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, select

from harperpy import AccessViolation, Context, NotFound, Scope

from .places import Int64


class GetModelCall(msgspec.Struct, forbid_unknown_fields=True):
    """One call by the id that its answer's `x-harper-call-id` names."""

    id: Int64


class Receipts:
    """The operation on single rows of `hdb_model_calls`."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._ledger = scope.ledger

    async def get_model_call(self, request: GetModelCall, context: Context) -> dict[str, Any]:
        """The row of one model call: a user's own, anyone's for super users.

        Raises `NotFound` for another's, too: who may not see a row learns nothing of it.
        """
        if (user := context.user) is None:
            raise AccessViolation(None)
        await self._ledger.flush()
        calls = self._database.model_calls
        wanted = select(calls).where(calls.c.id == request.id)
        if not user.is_super_user:
            wanted = wanted.where(calls.c.user == user.username)

        def work(connection: Connection) -> dict[str, Any] | None:
            row = connection.execute(wanted).mappings().first()
            return None if row is None else dict(row)

        row = await self._database.read(work)
        if row is None:
            message = f"id: there is no model call {request.id} of yours"
            raise NotFound(message, param="id")
        return row
