"""What becomes of an event, after its sender has got the answer."""

import asyncio
import logging
from typing import Any

from .store import Store


async def work_off(event: Any) -> Any:
    """Put your own work here. What it returns is kept with the event."""
    match event["type"]:
        case "order.paid":
            return {"shipped": event["order"]}
        case kind:
            return {"ignored": kind}


class Worker:
    """One event after the other, in the order they came; those of an earlier run first."""

    def __init__(self, store: Store, logger: logging.Logger) -> None:
        self._store = store
        self._logger = logger
        self._more = asyncio.Event()

    def wake(self) -> None:
        self._more.set()

    async def run(self) -> None:
        while True:
            self._more.clear()
            while waiting := await self._store.next():
                await self._end(*waiting)
            await self._more.wait()

    async def _end(self, number: int, event: Any) -> None:
        try:
            result = await work_off(event)
        except Exception:
            self._logger.exception("event %d failed", number)
            await self._store.end(number, "failed", None)
        else:
            await self._store.end(number, "done", result)
