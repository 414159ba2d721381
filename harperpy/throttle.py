"""Throttle: how many requests that change something run at once, and how long the rest wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .errors import ServiceUnavailable

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that are never held back."""


class Throttle:
    """So many at once; the next ones wait in line, at most so long. `refused` is told of others."""

    def __init__(self, limit: int, seconds: float, refused: Callable[[], None]) -> None:
        self._places = asyncio.Semaphore(limit)
        self._seconds = seconds
        self._refused = refused

    async def enter(self) -> Callable[[], None]:
        """Take a place, to be given back by calling what is returned (once or more often).

        Raises `ServiceUnavailable` with `Retry-After` when none has come free in time.
        """
        try:
            async with asyncio.timeout(self._seconds if self._places.locked() else None):
                await self._places.acquire()
        except TimeoutError as error:
            self._refused()
            message = f"no place for the request has come free within {self._seconds:g} s"
            raise ServiceUnavailable(
                message, code="too_many_requests_at_once", headers={"Retry-After": "1"}
            ) from error
        return _once(self._places.release)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    left = [function]

    def call() -> None:
        while left:
            left.pop()()

    return call
