"""The names a provider lists, kept for whoever reads them: old ones at once, new ones soon."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Annotated, TypeAlias

import msgspec

from harperpy import BackendTimeout, HarperError

logger = logging.getLogger("harperpy.plugins.openai")

MOST_BYTES = 2 << 20
_MOST_NAMES = 5_000
_LONGEST_NAME = 256
_MAX_AGE = 60.0


class _Model(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=_LONGEST_NAME)]


class Listing(msgspec.Struct):
    """A provider's answer to GET /models; its entries may be anything."""

    data: list[msgspec.Raw]

    def names(self) -> list[str]:
        """What can be a model's name; of a list beyond all reason only its beginning."""
        return [name for name in map(_name, self.data[:_MOST_NAMES]) if name]


Fetch: TypeAlias = Callable[[], Awaitable[Listing]]


class ServedNames:
    """What `fetch` listed last. Reading never waits; reading what is old begins a new fetch.

    At most one fetch is under way. One that fails leaves the old names, is told once for each
    reason, and is as old as one that succeeds before it is tried again. `where` names the entry
    in the log; `clock` tells the seconds.
    """

    def __init__(
        self, fetch: Fetch, where: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._fetch = fetch
        self._where = where
        self._names: tuple[str, ...] = ()
        # When they are old; never while they are fetched.
        self._old_at = inf
        self._trouble: str | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin the first fetch, in the background."""
        self._begin()

    def read(self) -> Sequence[str]:
        """The names as far as they are known; none before it is opened."""
        if self.clock() > self._old_at:
            self._begin()
        return self._names

    async def close(self) -> None:
        """End a fetch that is under way, and begin no other."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._old_at = inf

    def _begin(self) -> None:
        self._old_at = inf
        self._task = asyncio.create_task(self._refresh(), name=f"names of {self._where}")

    async def _refresh(self) -> None:
        try:
            self._names = tuple((await self._fetch()).names())
        except Exception as error:  # noqa: BLE001  # nobody asked for this: whatever fails waits
            self._tell(_reason(error))
        else:
            self._trouble = None
        finally:
            self._old_at = self.clock() + _MAX_AGE

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            logger.warning(
                "%s: the provider's list of models cannot be had (%s)", self._where, trouble
            )
        self._trouble = trouble


def _name(entry: msgspec.Raw) -> str | None:
    """An entry's name; none where there is nothing to call a model by."""
    try:
        name = msgspec.json.decode(entry, type=_Model).id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return name if name.isprintable() else None


def _reason(error: Exception) -> str:
    """Why, in nothing but our own words: the provider's may repeat the key it was sent."""
    if status := getattr(error, "upstream_status", None):
        return f"it answered {status}"
    if isinstance(error, BackendTimeout) or isinstance(error.__cause__, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, HarperError) and error.__cause__ is None:
        return str(error)
    return type(error.__cause__ or error).__name__
