"""Prices: what the table says, and past calls by it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec

from harperpy import InvalidBody, NoParameters, Scope


class Reprice(msgspec.Struct, forbid_unknown_fields=True):
    """Whose calls: from a day to a day (UTC, both included), of models by name or pattern."""

    since: dt.date = msgspec.field(name="from")
    until: dt.date = msgspec.field(name="to")
    model: str | None = None


def handle_application(scope: Scope) -> None:
    """Add the operations."""
    operations = PriceOperations(scope)
    scope.operations.add("list_prices", operations.list_prices, NoParameters, reads=True)
    scope.operations.add("reprice", operations.reprice, Reprice)


class PriceOperations:
    """Operations on what calls cost."""

    def __init__(self, scope: Scope) -> None:
        self._billing = scope.billing

    async def list_prices(self) -> list[dict[str, Any]]:
        """The price table, in the order in which its entries are looked at."""
        return self._billing.prices.listing()

    async def reprice(self, request: Reprice) -> Any:
        """Price past calls by the present table; how many that changed, and by how much."""
        if request.since > request.until:
            message = "to: expected a day that is not before 'from'"
            raise InvalidBody(message, param="to")
        return await self._billing.reprice(request.since, request.until, request.model)
