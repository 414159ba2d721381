"""Keeps `system.hdb_audit` as long as `logging.auditRetention` says."""

from __future__ import annotations

import asyncio
import time
from operator import methodcaller

from sqlalchemy import delete

from harperpy import HarperError, Scope

_CLEANING_SECONDS = 3600.0


def handle_application(scope: Scope) -> None:
    """Remove what is too old, now and then once an hour."""
    scope.create_task(_clean(scope), name="audit retention")


async def _clean(scope: Scope) -> None:
    audit, kept = scope.database.audit, scope.config.logging.audit_retention
    while True:
        old = delete(audit).where(audit.c.timestamp < time.time() * 1000 - kept)
        try:
            await scope.database.run(methodcaller("execute", old))
        except HarperError as error:
            scope.logger.warning("old audit rows stay for another hour: %s", error)
        await asyncio.sleep(_CLEANING_SECONDS)
