"""Reconciliation: whether the rows of an upstream's calls are what it says that it served."""

from __future__ import annotations

from typing import Annotated

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from harperpy import Context, Difference, Scope, Served, difference

from .usage import Moment, window, within

_COMPARED = (
    *("id", "success", "usage_estimated"),
    *("prompt_tokens", "completion_tokens", "embedding_tokens"),
)


class Reconcile(msgspec.Struct, forbid_unknown_fields=True):
    """What the provider of an entry of `models` says that it served, from when until when.

    `served` has an object for each request: its `id` is what came as `X-Client-Request-Id`, its
    `prompt_tokens` and `completion_tokens` are what was reported, or null. `to` is the first moment
    that does not count any more; without moments all rows are compared.
    """

    served: list[Served]
    backend_name: Annotated[str, Meta(min_length=1)] | list[str]
    from_: Moment | None = msgspec.field(name="from", default=None)
    to: Moment | None = None


def add_operation(scope: Scope) -> None:
    """Offer it to super users: `reconcile`."""
    scope.operations.add("reconcile", Reconciliation(scope).compare, Reconcile, reads=True)


class Reconciliation:
    """Compares the ledger's rows with another account of the same calls."""

    def __init__(self, scope: Scope) -> None:
        self._database = scope.database
        self._ledger = scope.ledger

    async def compare(self, request: Reconcile, context: Context) -> Difference:
        """What is `missing`, `unknown` or `different`; nothing where both are the same."""
        asked = self._statement(request)
        await self._ledger.flush()

        def work(connection: sa.Connection) -> Difference:
            # Here, and not where it would stop all others: there may be millions.
            rows = connection.execute(asked).mappings()
            return difference(({**row} for row in rows), request.served)

        return await self._database.read(work)

    def _statement(self, request: Reconcile) -> sa.Select[tuple[object, ...]]:
        calls = self._database.model_calls.c
        names = request.backend_name
        return sa.select(*(calls[name] for name in _COMPARED)).where(
            calls.backend_name.in_([names] if isinstance(names, str) else names),
            *within(calls["__createdtime__"], *window(request.from_, request.to)),
        )
