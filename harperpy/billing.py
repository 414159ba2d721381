"""Billing: what calls cost and what callers may take, put together for one server."""

from __future__ import annotations

import uuid
from datetime import date
from typing import Any

import msgspec
import sqlalchemy as sa

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
from .system import hdb_model_calls, purpose_key


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
        await self.database.read(self._number_on)
        await self.limits.open()

    def _number_on(self, connection: sa.Connection) -> None:
        # A clock that was set back would give a call the number of one that has its row.
        newest = connection.scalar(sa.select(sa.func.max(hdb_model_calls.c.id)))
        self.ledger.number_above(newest or 0)

    async def close(self) -> None:
        """Bring to its end what has been settled."""
        await self.limits.store.close()

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
        config: Config,
        database: Database,
        ledger: Ledger,
        epoch: Epoch,
        *,
        index: int,
        of: int,
        secret: bytes,
    ) -> Billing:
        """What a configuration asks for, tied to the ledger. Raises `ConfigError`."""
        check_rules(config.limits.rules, "config.yaml: limits.rules")
        prices = Prices(config.prices)
        quotas = Quotas(database, ledger.drain, epoch.move)
        store = _store(config, database, quotas, index=index, of=of, secret=secret)
        limits = Limits(config.limits.rules, prices, store, epoch=epoch, stored=quotas.rules)
        if config.prices:
            ledger.price = prices.price
        ledger.admission = limits
        return Billing(prices, limits, quotas, ledger, database)


def _store(
    config: Config, database: Database, quotas: Quotas, *, index: int, of: int, secret: bytes
) -> Store:
    kind = config.limits.store or ("memory" if of == 1 else "database")
    if kind == "memory":
        if config.http.workers != 1 and config.limits.store:
            message = (
                "config.yaml: limits.store: memory is each process's own, and http.workers is "
                f"{config.http.workers}: expected database"
            )
            raise ConfigError(message)
        return Memory(quotas.spent)
    life = uuid.uuid4().hex
    if kind == "database":
        return SharedMeters(database, worker=index, of=of, life=life)
    ledger = purpose_key(secret, "limits")[:8].hex()
    return _on_valkey(kind, quotas, ledger=ledger, worker=index, of=of, life=life)


def _on_valkey(url: str, quotas: Quotas, **who: Any) -> Store:
    try:
        from .valkey_line import ValkeyLine  # noqa: PLC0415  # it is an extra
        from .valkey_meters import ValkeyMeters  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "valkey":
            raise
        message = (
            "config.yaml: limits.store: its library is missing: pip install 'harperpy[valkey]'"
        )
        raise ConfigError(message) from None
    try:
        line = ValkeyLine(url)
    except OSError as error:
        message = f"config.yaml: limits.store: a file of its ssl_ options cannot be read: {error}"
        raise ConfigError(message) from error
    except ValueError:
        message = (
            "config.yaml: limits.store: expected a URL such as valkey://user:password@host:6379/0, "
            "with %2F for a / in the password, and after a ? options of valkey-py's connections"
        )
        raise ConfigError(message) from None
    return ValkeyMeters(line, quotas, **who)
