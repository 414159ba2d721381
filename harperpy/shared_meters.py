"""Meters that several processes of one machine share, in the database of them all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.sqlite import insert

from .database import Database
from .errors import ServiceUnavailable
from .meters import MINUTE, Claim, Granted, Reading, give_back, grant
from .quotas import away, spent
from .system import hdb_limit_hold, hdb_limit_rate, hdb_model_calls

logger = logging.getLogger("harperpy.limits")

_RETRY_SECONDS = 1.0


class SharedMeters:
    """What a call holds is a row, until the ledger has one of that call.

    So none who dies takes it along, and nothing counts twice: what was spent the ledger says.

    `worker` says which of the processes this is, `life` which one of those that were it.
    """

    def __init__(self, database: Database, *, worker: int, of: int, life: str) -> None:
        self._database = database
        self._worker = worker
        self._of = of
        self._life = life

    async def begin(self, now: float) -> None:
        """Drop what those held that were this worker before, or are no more of them.

        All calls that they began have their rows by now.
        """
        hold = hdb_limit_hold.c
        of_ours = (hold.worker == self._worker) & (hold.life != self._life)
        dead = sa.delete(hdb_limit_hold).where(of_ours | (hold.worker >= self._of))
        old = sa.delete(hdb_limit_rate).where(hdb_limit_rate.c.at < now - MINUTE)

        def work(connection: sa.Connection) -> None:
            connection.execute(dead)
            connection.execute(old)

        await self._database.run(work)

    async def reserve(self, claims: Sequence[Claim], wanted: int, now: float, call: int) -> Granted:
        """Take all of it or, with `Refused`, nothing: in one transaction."""

        def work(connection: sa.Connection) -> Granted:
            _drop_written(connection, claims)
            pairs = [(claim, _reading(connection, claim)) for claim in claims]
            most = grant(pairs, wanted, now)
            self._write(connection, pairs, call)
            return Granted(pairs, most, call)

        taking = asyncio.wrap_future(self._database.submit(work))
        try:
            return await asyncio.shield(taking)
        except exc.DBAPIError as error:
            raise away(error) from error
        except asyncio.CancelledError:
            # It is taken all the same, for nobody.
            taking.add_done_callback(partial(self._give_back, call))
            raise

    def settle(self, granted: Granted, actual: Sequence[int], now: float, *, written: bool) -> None:
        """Hold what it was in the end, until the ledger has the row; nothing where it has none."""
        call = granted.call
        took = list(zip(granted.claims, actual, strict=True))

        def work(connection: sa.Connection) -> None:
            for claim, tokens in took:
                if claim.meter.kind == "tokens":
                    reading = _reading(connection, claim)
                    give_back(claim, reading, tokens, now)
                    _keep_rate(connection, claim, reading)
                elif claim.meter.kind == "budget" and written:
                    _hold_only(connection, claim, call, tokens)
                elif claim.meter.kind != "requests":
                    _release(connection, call, claim.meter.name)

        self._submit(work)

    def forget(self) -> None:
        """Nothing is remembered here."""

    async def close(self) -> None:
        """The database brings it to its end."""

    def _give_back(self, call: int, taken: asyncio.Future[Granted]) -> None:
        if not taken.cancelled() and taken.exception() is None:
            self._submit(lambda connection: _release(connection, call))

    def _submit(self, work: Callable[[sa.Connection], None]) -> None:
        """Have it done, as often as it takes: what nobody gives back is held for good."""
        loop = asyncio.get_running_loop()

        def told(done: Future[None]) -> None:
            if (error := done.exception()) is None:
                return
            logger.warning("what a call took of its limits is not settled: %s", error)
            if isinstance(error, ServiceUnavailable):
                with contextlib.suppress(RuntimeError):  # it is closed
                    loop.call_soon_threadsafe(loop.call_later, _RETRY_SECONDS, self._submit, work)

        with contextlib.suppress(RuntimeError):  # it is closed
            self._database.submit(work).add_done_callback(told)

    def _write(
        self, connection: sa.Connection, pairs: Sequence[tuple[Claim, Reading]], call: int
    ) -> None:
        who = {"call": call, "worker": self._worker, "life": self._life}
        holds = [
            {"meter": claim.meter.name, "amount": claim.taken, **who}
            for claim, _ in pairs
            if claim.meter.kind in ("concurrent", "budget")
        ]
        if holds:
            connection.execute(sa.insert(hdb_limit_hold), holds)
        for claim, reading in pairs:
            if claim.meter.kind in ("requests", "tokens"):
                _keep_rate(connection, claim, reading)


def _drop_written(connection: sa.Connection, claims: Sequence[Claim]) -> None:
    """Drop what is held for calls that have their rows; as a write it waits for its turn."""
    hold = hdb_limit_hold.c
    names = [claim.meter.name for claim in claims]
    written = sa.exists().where(hdb_model_calls.c.id == hold.call)
    connection.execute(sa.delete(hdb_limit_hold).where(hold.meter.in_(names), written))


def _reading(connection: sa.Connection, claim: Claim) -> Reading:
    meter, hold, rate = claim.meter, hdb_limit_hold.c, hdb_limit_rate.c
    if meter.kind in ("requests", "tokens"):
        select = sa.select(rate.used, rate.at).where(rate.meter == meter.name)
        row = connection.execute(select).first()
        return Reading() if row is None else Reading(used=row.used, at=row.at)
    held = connection.scalar(sa.select(sa.func.sum(hold.amount)).where(hold.meter == meter.name))
    used = spent(connection, meter.spending) if meter.spending else 0
    return Reading(used=used, held=held or 0)


def _keep_rate(connection: sa.Connection, claim: Claim, reading: Reading) -> None:
    row = {"meter": claim.meter.name, "used": reading.used, "at": reading.at}
    into = insert(hdb_limit_rate).values(row)
    changed = {"used": into.excluded.used, "at": into.excluded.at}
    connection.execute(into.on_conflict_do_update(index_elements=["meter"], set_=changed))


def _hold_only(connection: sa.Connection, claim: Claim, call: int, amount: int) -> None:
    hold = hdb_limit_hold.c
    of_call = (hold.meter == claim.meter.name) & (hold.call == call)
    connection.execute(sa.update(hdb_limit_hold).where(of_call).values(amount=amount))


def _release(connection: sa.Connection, call: int, meter: str | None = None) -> None:
    hold = hdb_limit_hold.c
    drop = sa.delete(hdb_limit_hold).where(hold.call == call)
    connection.execute(drop if meter is None else drop.where(hold.meter == meter))
