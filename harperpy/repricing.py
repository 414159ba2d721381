"""Repricing: past calls by the present price table, with the days that they are counted in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from typing import Any

import msgspec
import sqlalchemy as sa

from .accounting import ModelCall
from .audit import Deed
from .daily import DAY_MS, day_of
from .database import Database
from .pricing import UNIT, Prices
from .rules import about
from .system import CREATED, DIMENSIONS, hdb_model_calls, hdb_model_calls_daily

_BATCH = 500


class Repriced(msgspec.Struct):
    """What became of a run: calls that were looked at and changed, and what they cost in all."""

    rows: int = 0
    changed: int = 0
    before: float = 0.0
    after: float = 0.0
    difference: float = 0.0


class Repricing:
    """One run over the calls of some days (UTC, the last included), and of some models.

    What the table has no price for stays as it is. Each batch of calls is one transaction, so that
    writers get their turn; a run that is broken off has done the batches before, and may be made
    again.
    """

    def __init__(
        self, database: Database, prices: Prices, first: date, last: date, model: str | None
    ) -> None:
        self._database = database
        self._prices = prices
        self._model = model
        self._span = {"from": first.isoformat(), "to": last.isoformat(), "model": model}
        self._since = _ms(first)
        self._until = _ms(last) + DAY_MS
        self._deed = Deed(hdb_model_calls)
        self._done = 0
        self._rows = self._changed = self._before = self._after = 0

    async def run(self) -> Repriced:
        """Reprice them all. Raises `ServiceUnavailable` where the database is away."""
        while await self._database.run(self._batch):
            pass
        return Repriced(
            rows=self._rows,
            changed=self._changed,
            before=self._before / UNIT,
            after=self._after / UNIT,
            difference=(self._after - self._before) / UNIT,
        )

    def _batch(self, connection: sa.Connection) -> bool:
        calls = hdb_model_calls.c
        select = (
            sa.select(hdb_model_calls, day_of(calls[CREATED]).label("day"))
            .where(calls.id > self._done, calls[CREATED] >= self._since)
            .where(calls[CREATED] < self._until)
            .order_by(calls.id)
            .limit(_BATCH)
        )
        rows: list[dict[str, Any]] = [
            {str(name): value for name, value in row.items()}
            for row in connection.execute(select).mappings()
        ]
        found = list(self._repriced(rows))
        changed = [(row, call) for row, call in found if _differs(row, call)]
        if changed:
            _update(connection, changed)
            before, after = (
                _sum(row["cost"] for row, _ in changed),
                _sum(one.cost for _, one in changed),
            )
            told = {"changed": len(changed), "difference": (after - before) / UNIT}
            self._deed.note(connection, "reprice", after={**self._span, **told})
        self._rows += len(found)
        self._changed += len(changed)
        self._before += _sum(row["cost"] for row, _ in found)
        self._after += _sum(call.cost for _, call in found)
        self._done = rows[-1]["id"] if rows else self._done
        return len(rows) == _BATCH

    def _repriced(self, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], ModelCall]]:
        for row in rows:
            if self._model is None or about(
                self._model, row["backend_name"], row["provider_model"]
            ):
                call = msgspec.convert({**row, "created": row[CREATED]}, ModelCall)
                if (known := self._prices.cost(call)) is not None:
                    call.cost, call.price_version = known
                yield row, call


def _update(connection: sa.Connection, changed: list[tuple[dict[str, Any], ModelCall]]) -> None:
    """Put the new costs into the rows, and the differences into their days."""
    calls, daily = hdb_model_calls, hdb_model_calls_daily
    row_of = sa.update(calls).where(calls.c.id == sa.bindparam("of_id"))
    values = [
        {"of_id": call.id, "cost": call.cost, "price_version": call.price_version}
        for _, call in changed
    ]
    connection.execute(row_of, values)
    grown: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for row, call in changed:
        sums = grown[row["day"], *((row[name] or "") for name in DIMENSIONS)]
        sums[0] += _units(call.cost) - _units(row["cost"])
        sums[1] -= bool(row["success"] and row["cost"] is None)
    keys = ("day", *DIMENSIONS)
    of_day = sa.and_(*(daily.c[name] == sa.bindparam(f"of_{name}") for name in keys))
    cost = sa.func.round(daily.c.cost + sa.bindparam("more"), 9)
    unpriced = daily.c.unpriced + sa.bindparam("unpriced_more")
    sums_of = [
        {
            **{f"of_{name}": value for name, value in zip(keys, key, strict=True)},
            "more": units / UNIT,
            "unpriced_more": count,
        }
        for key, (units, count) in grown.items()
    ]
    connection.execute(sa.update(daily).where(of_day).values(cost=cost, unpriced=unpriced), sums_of)


def _differs(row: dict[str, Any], call: ModelCall) -> bool:
    return (row["cost"], row["price_version"]) != (call.cost, call.price_version)


def _sum(costs: Iterator[float | None]) -> int:
    return sum(map(_units, costs))


def _units(cost: float | None) -> int:
    return round((cost or 0.0) * UNIT)


def _ms(day: date) -> float:
    return datetime.combine(day, time(), UTC).timestamp() * 1000
