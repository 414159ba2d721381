"""Apart: what outlives a request is made apart from it."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any, TypeVar

T = TypeVar("T")


@coroutine
def apart(work: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
    """What this work makes, done by the task that waits for it, but in a context of its own.

    A transport or a timer keeps the context it was made in, and a request's leads to all of it.
    """
    context = Context()
    try:
        waits = context.run(work.send, None)
        while True:
            try:
                yield waits
            except BaseException as error:  # noqa: BLE001  # the work's to see
                waits = context.run(work.throw, error)
            else:
                waits = context.run(work.send, None)
    except StopIteration as done:
        made: T = done.value
        return made
