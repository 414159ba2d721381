"""Prices: what a model call costs, to the billionth, and by which version of the price table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, time
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from msgspec import to_builtins

from .accounting import ModelCall
from .secret import encode_hook
from .sections import PriceConfig

UNIT = 1_000_000_000
"""How many of the whole numbers that are reckoned with make one of the currency."""
PER = 1_000_000
"""Prices are for so many tokens."""

_KEPT = 4096


class Price(msgspec.Struct, frozen=True):
    """One entry of the table: billionths per million tokens, None where it says nothing."""

    version: str
    since: float
    input: int | None
    cached: int | None
    output: int | None
    embedding: int | None
    most_output: int | None

    def of(self, call: ModelCall) -> int | None:
        """What the tokens of a call cost, in billionths; None if a price is missing for any."""
        asked = call.prompt_tokens or 0
        cached = min(call.cached_tokens or 0, asked)
        total = 0
        for tokens, price in (
            (asked - cached, self.input),
            (cached, self.cached),
            (call.completion_tokens or 0, self.output),
            (call.embedding_tokens or 0, self.embedding),
        ):
            if tokens:
                if price is None:
                    return None
                total += tokens * price
        # Half a billionth is rounded up: once, at the end.
        return (total + PER // 2) // PER


class Prices:
    """The price table. Which of its entries a model has is found once for each of them.

    An entry for the very name wins over one for a pattern, one that names the backend over one that
    does not, a longer pattern over a shorter one, and then the latest that is in force.
    """

    def __init__(self, entries: Sequence[PriceConfig] = ()) -> None:
        self.entries = sorted(entries, key=_rank, reverse=True)
        self._prices = [_price(entry) for entry in self.entries]
        self._found: dict[tuple[str, str | None, str | None], list[Price]] = {}

    def listing(self) -> list[dict[str, Any]]:
        """The entries in the order in which they are looked at, each with its version."""
        return [
            {
                **{name: value for name, value in to_builtins(entry).items() if value is not None},
                "version": version_of(entry),
            }
            for entry in self.entries
        ]

    def price(self, call: ModelCall) -> None:
        """Put `cost` and `price_version` into a call; None where the price is not known.

        A call of which no token was counted has no cost either.
        """
        known = self.cost(call)
        call.cost, call.price_version = known or (None, None)

    def cost(self, call: ModelCall) -> tuple[float, str] | None:
        """What a call costs, and by which version; None where that is not known."""
        if call.prompt_tokens is call.completion_tokens is call.embedding_tokens is None:
            return None
        price = self.find(call)
        units = None if price is None else price.of(call)
        return None if price is None or units is None else (units / UNIT, price.version)

    def find(self, call: ModelCall) -> Price | None:
        """The entry that is in force for a call's model at its time."""
        key = (call.backend, call.backend_name, call.provider_model)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            found = self._found[key] = self._all(*key)
        for price in found:
            if price.since <= call.created:
                return price
        return None

    def _all(self, backend: str, name: str | None, model: str | None) -> list[Price]:
        # A backend without a model's name is known by the name it stands under.
        asked = model or name or ""
        return [
            price
            for entry, price in zip(self.entries, self._prices, strict=True)
            if entry.backend in (None, backend, name) and fnmatchcase(asked, entry.model)
        ]


def version_of(entry: PriceConfig) -> str:
    """What rows name an entry by: its day and a hash of it, unless it has a name."""
    if entry.version is not None:
        return entry.version
    text = msgspec.json.encode(entry, enc_hook=encode_hook, order="deterministic")
    digest = hashlib.sha256(text).hexdigest()[:8]
    return f"{entry.since}-{digest}" if entry.since else digest


def _price(entry: PriceConfig) -> Price:
    cached = entry.input if entry.cached_input is None else entry.cached_input
    since = entry.since and datetime.combine(entry.since, time(), UTC).timestamp() * 1000
    return Price(
        version=version_of(entry),
        since=since or 0.0,
        input=_units(entry.input),
        cached=_units(cached),
        output=_units(entry.output),
        embedding=_units(entry.embedding),
        most_output=entry.max_output,
    )


def _units(amount: float | None) -> int | None:
    """Billionths of an amount, which is the decimal number that was written, not the float."""
    return None if amount is None else int((Decimal(repr(amount)) * UNIT).to_integral_value())


def _rank(entry: PriceConfig) -> tuple[bool, bool, int, str]:
    exact = not any(sign in entry.model for sign in "*?[")
    since = "" if entry.since is None else entry.since.isoformat()
    return exact, entry.backend is not None, len(entry.model), since
