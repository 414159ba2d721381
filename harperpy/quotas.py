"""Quotas: what the database knows of limits: the stored rules, and what was spent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.sqlite import insert

from .audit import Deed
from .database import Database
from .errors import NotFound, ServiceUnavailable
from .meters import Spending
from .pricing import UNIT
from .rules import about
from .secret import encode_hook
from .sections import LimitConfig
from .system import CREATED, UPDATED, hdb_limit, hdb_model_calls, hdb_model_calls_daily, now_ms

T = TypeVar("T")


class Quotas:
    """The rules in `system.hdb_limit`, and sums of the ledger.

    `drain` gives all calls that have ended their rows, `changed` lets every process know.
    """

    def __init__(
        self, database: Database, drain: Callable[[], Awaitable[None]], changed: Callable[[], None]
    ) -> None:
        self._database = database
        self._drain = drain
        self._changed = changed

    async def rules(self) -> list[LimitConfig]:
        """The stored rules, in the order of their names."""
        select = sa.select(hdb_limit.c.rule).order_by(hdb_limit.c.id)

        def work(connection: sa.Connection) -> list[LimitConfig]:
            return [msgspec.convert(rule, LimitConfig) for rule in connection.scalars(select)]

        return await self._database.read(work)

    async def put(self, rule: LimitConfig) -> None:
        """Store a rule in the place of the one about the same names and models."""
        key, plain = key_of(rule), msgspec.to_builtins(rule, enc_hook=encode_hook)
        into = insert(hdb_limit).values(
            {"id": key, "rule": plain, CREATED: now_ms(), UPDATED: now_ms()}
        )
        put = into.on_conflict_do_update(
            index_elements=["id"],
            set_={"rule": into.excluded.rule, UPDATED: into.excluded[UPDATED]},
        )
        before = sa.select(hdb_limit.c.rule).where(hdb_limit.c.id == key)
        deed = Deed(hdb_limit)

        def work(connection: sa.Connection) -> None:
            found = connection.scalar(before)
            connection.execute(put)
            deed.note(connection, "upsert", key, after=plain, before=found)

        await self._database.run(work)
        self._changed()

    async def drop(self, per: str, match: str, model: str | None) -> None:
        """Remove a stored rule. Raises `NotFound`."""
        key = _key(per, match, model)
        delete = sa.delete(hdb_limit).where(hdb_limit.c.id == key).returning(hdb_limit.c.rule)
        deed = Deed(hdb_limit)

        def work(connection: sa.Connection) -> None:
            if (found := connection.scalar(delete)) is None:
                message = f"there are no stored limits for {per} {match!r}"
                raise NotFound(message + (f" on models {model!r}" if model else ""))
            deed.note(connection, "delete", key, before=found)

        await self._database.run(work)
        self._changed()

    async def spent(self, spending: Spending) -> int:
        """What the ledger says was spent, all calls that have ended included.

        Raises `ServiceUnavailable` where nobody knows.
        """
        return await self._read(lambda connection: spent(connection, spending))

    async def counted(
        self, spending: Spending, calls: Collection[int], first: int
    ) -> tuple[int, set[int]]:
        """The same, and which it counts: of these calls, and of all whose id is not below `first`.

        Others' calls may be among the latter.
        """
        known = hdb_model_calls.c.id
        rows = sa.select(known).where(known.in_(calls) | (known >= first))

        def work(connection: sa.Connection) -> tuple[int, set[int]]:
            # As of one moment.
            connection.exec_driver_sql("BEGIN")
            return spent(connection, spending), {*connection.scalars(rows)}

        return await self._read(work)

    async def _read(self, work: Callable[[sa.Connection], T]) -> T:
        await self._drain()
        try:
            return await self._database.read(work)
        except exc.DBAPIError as error:
            raise away(error) from error


def away(error: Exception) -> ServiceUnavailable:
    """What a caller is told whose limits nobody can read: nothing is admitted unseen."""
    message = f"the database of the limits is away: {error}"
    return ServiceUnavailable(message, headers={"Retry-After": "1"})


def spent(connection: sa.Connection, spending: Spending) -> int:
    """What the rows say, in tokens or in billionths; what nobody knows the end of counts whole."""
    daily = hdb_model_calls_daily.c
    if spending.unit == "cost":
        # Each sum is rounded to a billionth: so many of them are as whole as one is.
        amount: sa.ColumnElement[float] = sa.func.round((daily.cost + daily.reserved_cost) * UNIT)
    else:
        asked, answered = daily.prompt_tokens, daily.completion_tokens
        amount = asked + answered + daily.embedding_tokens + daily.reserved_tokens
    select = (
        sa.select(daily.backend_name, daily.provider_model, sa.func.sum(amount))
        .where(daily.day.between(spending.first, spending.last))
        .where(daily[spending.per] == spending.subject)
        .group_by(daily.backend_name, daily.provider_model)
    )
    return sum(
        int(total)
        for backend_name, provider_model, total in connection.execute(select)
        if about(spending.models, backend_name, provider_model) or spending.models is None
    )


def key_of(rule: LimitConfig) -> str:
    """What a stored rule is known by: there is one about the same names and models."""
    return _key(rule.per, rule.match, rule.model)


def _key(per: str, match: str, model: str | None) -> str:
    return msgspec.json.encode([per, match, *([model] if model else [])]).decode()
