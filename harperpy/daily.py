"""The roll-up of the model calls: one row per day (UTC) and what the calls are told apart by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from .system import (
    COSTS,
    COUNTS,
    CREATED,
    DIMENSIONS,
    TOKENS,
    hdb_model_calls,
    hdb_model_calls_daily,
)

_DIGITS = 9
"""A cost is a whole number of billionths: sums of them are rounded to that, so none drifts."""


def day_of(created: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    """The day of a time in ms since 1970, as `2026-01-31`."""
    return sa.func.date(created / 1000, "unixepoch")


def count_calls(connection: sa.Connection, ids: Iterable[int]) -> None:
    """Add calls that were just written to their days. In the transaction that wrote them."""
    _add(connection, hdb_model_calls.c.id.in_(list(ids)))


def recount_days(connection: sa.Connection, days: Iterable[str]) -> None:
    """Count these days anew, after their rows changed. In the transaction that changed them."""
    known = list(days)
    daily = hdb_model_calls_daily
    connection.execute(sa.delete(daily).where(daily.c.day.in_(known)))
    _add(connection, day_of(hdb_model_calls.c[CREATED]).in_(known))


def _add(connection: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    calls, daily = hdb_model_calls.c, hdb_model_calls_daily.c
    keys = [day_of(calls[CREATED]), *(sa.func.coalesce(calls[one], "") for one in DIMENSIONS)]
    total = sa.func.total
    counts = [
        sa.func.count(),
        sa.func.sum(sa.case((calls.success, 0), else_=1)),
        sa.func.sum(sa.case((calls.success & calls.cost.is_(None), 1), else_=0)),
        *(sa.func.coalesce(sa.func.sum(calls[one]), 0) for one in TOKENS),
    ]
    costs = [sa.func.round(total(calls[one]), _DIGITS) for one in COSTS]
    added = sa.select(*keys, *counts, *costs).where(which).group_by(*keys)
    into = insert(hdb_model_calls_daily).from_select(["day", *DIMENSIONS, *COUNTS, *COSTS], added)
    grown: dict[str, Any] = {one: daily[one] + into.excluded[one] for one in COUNTS}
    grown |= {one: sa.func.round(daily[one] + into.excluded[one], _DIGITS) for one in COSTS}
    connection.execute(into.on_conflict_do_update(index_elements=["day", *DIMENSIONS], set_=grown))
