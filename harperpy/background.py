"""Background: what goes on when the request that began it has been answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

from .accounting import Caller, current_caller
from .signal import SHUTDOWN

T = TypeVar("T")

logger = logging.getLogger("harperpy.background")


class Background:
    """The tasks of a server that outlive their requests."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], Callable[[str], None]] = {}

    def start(
        self,
        work: Coroutine[Any, Any, T],
        caller: Caller,
        abort: Callable[[str], None],
        name: str | None,
    ) -> asyncio.Task[T]:
        """Run `work` on behalf of `caller`; `abort` tells it that it has to end."""
        variables = copy_context()
        variables.run(current_caller.set, caller)
        name = name or getattr(work, "__qualname__", None)
        task = asyncio.create_task(work, name=name, context=variables)
        self._tasks[task] = abort
        task.add_done_callback(self._ended)
        return task

    async def close(self, seconds: float) -> None:
        """Let all of them end, and cut off what does not in time."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for abort in list(self._tasks.values()):
            abort(SHUTDOWN)
        await cancelled(self._tasks, seconds, logger)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("detached task %s failed", task.get_name(), exc_info=error)


async def cancelled(
    tasks: Collection[asyncio.Task[Any]], seconds: float, log: logging.Logger
) -> None:
    """Cancel them, and wait for them so long; those that go on all the same are named."""
    for task in list(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(list(tasks), timeout=seconds)
    if left := sorted(task.get_name() for task in tasks if not task.done()):
        log.error("tasks do not end when they are cancelled: %s", ", ".join(left))
