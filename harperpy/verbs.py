"""Verbs: how those of a port's resources are called, and for how long."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Any

from .backend import is_awaitable
from .context import Context
from .contracts import Handler
from .deadlines import Deadline, Deadlines
from .errors import AnswerTimeout, BodyTimeout
from .handshake import check_handshake
from .registry import Entry
from .request import RequestTarget


class Verbs:
    """Calls them, for whom they are open. Each may take `seconds`, if its resource says no other.

    Nobody is asked here who may: that is done before.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines: dict[float, Deadlines] = {}

    def call(
        self, entry: Entry, verb: str, target: RequestTarget, given: Any, context: Context
    ) -> Any:
        """What a verb returns, to be awaited within its time if it wants to be."""
        if verb in entry.plain:
            context.check_accept()
        if context.request.websocket:
            check_handshake(context.headers)
        value = entry.handlers[verb](target, given, context)
        seconds = self._limit(entry)
        if seconds and is_awaitable(value):
            return self._in_time(value, seconds, entry, context)
        return value

    def work(self, entry: Entry, verb: str) -> Handler:
        """The same, for what is no WebSocket: the verb alone, where no more is to be done."""
        if verb in entry.plain or self._limit(entry):
            return partial(self.call, entry, verb)
        return entry.handlers[verb]

    def _limit(self, entry: Entry) -> float:
        own = entry.resource.time_limit
        return self._seconds if own is None else own

    async def _in_time(
        self, value: Awaitable[Any], seconds: float, entry: Entry, context: Context
    ) -> Any:
        """What a verb returns, within its time."""
        deadlines = self._deadlines.get(seconds)
        if deadlines is None:
            deadlines = self._deadlines[seconds] = Deadlines(seconds)
        deadline = Deadline(deadlines)
        try:
            with deadline:
                return await value
        except TimeoutError as error:
            if not deadline.expired:
                raise
            if context.request.body.arriving:
                raise BodyTimeout(seconds) from error
            context.abort("timeout")
            message = f"a verb of {entry.resource.__name__} took more than {seconds:g} s"
            raise AnswerTimeout(message) from error
