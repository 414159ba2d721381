"""The roll-up of the model calls: one row per day (UTC) and what the calls are told apart by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import Insert, insert

from .system import (
    COSTS,
    COUNTS,
    CREATED,
    DIMENSIONS,
    TOKENS,
    hdb_model_calls,
    hdb_model_calls_daily,
)

DIGITS = 9
"""A cost is a whole number of billionths: sums of them are rounded to that, so none drifts."""
DAY_MS = 86_400_000


def day_of(created: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    """The day of a time in ms since 1970, as `2026-01-31`."""
    # As Python reckons it: no time near midnight has two days.
    day = sa.cast(created / DAY_MS, sa.Integer)
    return sa.func.date(day * (DAY_MS // 1000), "unixepoch")


def growing(into: Insert) -> Insert:
    """What is inserted is added to the sums of its day, where there are some."""
    # No parameter: the text of the statement is all that there is of it.
    digits: sa.ColumnElement[int] = sa.literal_column(str(DIGITS))
    daily = hdb_model_calls_daily.c
    grown: dict[str, Any] = {one: daily[one] + into.excluded[one] for one in COUNTS}
    grown |= {one: sa.func.round(daily[one] + into.excluded[one], digits) for one in COSTS}
    return into.on_conflict_do_update(index_elements=["day", *DIMENSIONS], set_=grown)


def recount_days(connection: sa.Connection, days: Iterable[str]) -> None:
    """Count these days anew, after their rows changed. In the transaction that changed them."""
    known = list(days)
    daily = hdb_model_calls_daily
    connection.execute(sa.delete(daily).where(daily.c.day.in_(known)))
    _add(connection, day_of(hdb_model_calls.c[CREATED]).in_(known))


def _add(connection: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    calls = hdb_model_calls.c
    keys = [day_of(calls[CREATED]), *(sa.func.coalesce(calls[one], "") for one in DIMENSIONS)]
    total = sa.func.total
    counts = [
        sa.func.count(),
        sa.func.sum(sa.case((calls.success, 0), else_=1)),
        sa.func.sum(sa.case((calls.success & calls.cost.is_(None), 1), else_=0)),
        *(sa.func.coalesce(sa.func.sum(calls[one]), 0) for one in TOKENS),
    ]
    costs = [sa.func.round(total(calls[one]), DIGITS) for one in COSTS]
    added = sa.select(*keys, *counts, *costs).where(which).group_by(*keys)
    names = ["day", *DIMENSIONS, *COUNTS, *COSTS]
    connection.execute(growing(insert(hdb_model_calls_daily).from_select(names, added)))
