"""Billing: what calls cost and what callers may take, put together for one server."""

from __future__ import annotations

import uuid
from datetime import date

import msgspec

from .accounting import Ledger
from .database import Database
from .epoch import Epoch
from .errors import ConfigError
from .limits import Limits
from .meters import Memory, Store
from .pricing import Prices
from .quotas import Quotas
from .repricing import Repriced, Repricing
from .rules import check_rules
from .sections import Config
from .shared_meters import SharedMeters


class Billing(msgspec.Struct):
    """The price table, the limits, and what the database knows of them."""

    prices: Prices
    limits: Limits
    quotas: Quotas
    ledger: Ledger
    database: Database

    async def open(self) -> None:
        """Admit and price calls from now on. Raises `ServiceUnavailable`."""
        # What processes that are no more held is dropped only after their calls have rows.
        await self.ledger.drain()
        await self.limits.open()

    async def reprice(self, first: date, last: date, model: str | None = None) -> Repriced:
        """Price the calls of these days (UTC, the last included) by the present table.

        `model` is a name or a pattern of them. What was spent of budgets is read anew. Raises
        `ServiceUnavailable` where the database is away.
        """
        await self.ledger.drain()
        try:
            return await Repricing(self.database, self.prices, first, last, model).run()
        finally:
            self.limits.forget()

    @staticmethod
    def of(
        config: Config, database: Database, ledger: Ledger, epoch: Epoch, *, index: int, of: int
    ) -> Billing:
        """What a configuration asks for, tied to the ledger. Raises `ConfigError`."""
        check_rules(config.limits.rules, "config.yaml: limits.rules")
        prices = Prices(config.prices)
        quotas = Quotas(database, ledger.drain, epoch.move)
        store = _store(config, database, quotas, index, of)
        limits = Limits(config.limits.rules, prices, store, epoch=epoch, stored=quotas.rules)
        if config.prices:
            ledger.price = prices.price
        ledger.admission = limits
        return Billing(prices, limits, quotas, ledger, database)


def _store(config: Config, database: Database, quotas: Quotas, index: int, of: int) -> Store:
    kind = config.limits.store or ("memory" if of == 1 else "database")
    if kind == "memory":
        if of > 1:
            message = (
                "config.yaml: limits.store: memory is each process's own, and http.workers is "
                f"{of}: expected database"
            )
            raise ConfigError(message)
        return Memory(quotas.spent)
    if kind == "database":
        return SharedMeters(database, worker=index, of=of, life=uuid.uuid4().hex)
    message = "config.yaml: limits.store: this version counts in memory or database"
    raise ConfigError(message)
