"""AbortSignal: tells a running call that its caller is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import msgspec

from .errors import Aborted

logger = logging.getLogger("harperpy.signal")

DISCONNECTED = "client_disconnected"
SHUTDOWN = "server_shutdown"
REVOKED = "access_revoked"


class AbortSignal(msgspec.Struct, eq=False, weakref=True):
    """Fires once. `aborted` and `reason` say whether and why; many may wait for it."""

    reason: str | None = None
    # The tasks whose blocks it ends, and how often each was cancelled before.
    _guarded: dict[Guard, tuple[asyncio.Task[Any], int]] = {}
    _callbacks: dict[object, Callable[[], object]] = {}
    _dependents: WeakSet[AbortSignal] | None = None
    # What it depends on is held by it, and never looked at.
    _sources: tuple[AbortSignal, ...] = ()

    @property
    def aborted(self) -> bool:
        """True from the moment it fired."""
        return self.reason is not None

    def raise_if_aborted(self) -> None:
        """Raise `Aborted` once the signal has fired."""
        if self.reason is not None:
            raise Aborted(self.reason)

    def add_callback(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the signal fires (at once if it has); returns its remover."""
        if self.aborted:
            callback()
            return lambda: None
        key = object()
        self._callbacks[key] = callback
        return lambda: void(self._callbacks.pop(key, None))

    async def wait(self) -> None:
        """Return when the signal has fired."""
        fired = asyncio.get_running_loop().create_future()

        def end() -> None:
            if not fired.done():
                fired.set_result(None)

        remove = self.add_callback(end)
        try:
            await fired
        finally:
            remove()

    def guard(self) -> Guard:
        """A `with` block that the signal ends: its task is cancelled and `Aborted` raised."""
        return Guard(self)

    @classmethod
    def any_of(cls, *signals: AbortSignal | None) -> AbortSignal:
        """A signal that fires with the first of these; costs nothing when only one is given."""
        given = tuple({id(signal): signal for signal in signals if signal is not None}.values())
        if len(given) == 1:
            return given[0]
        combined = cls()
        # Held weakly by its sources: a long-lived signal must not keep each call it ever guarded.
        combined._sources = given
        for source in given:
            if source.reason is not None:
                combined._fire(source.reason)
                break
            source._depend(combined)  # noqa: SLF001  # its own class
        return combined

    @classmethod
    def timeout(cls, seconds: float) -> AbortSignal:
        """A signal that fires by itself after so many seconds of the running loop."""
        signal = cls()
        asyncio.get_running_loop().call_later(seconds, signal._fire, "timeout")
        return signal

    def _depend(self, signal: AbortSignal) -> None:
        if self._dependents is None:
            self._dependents = WeakSet()
        self._dependents.add(signal)

    def _fire(self, reason: str) -> None:
        if self.reason is not None:
            return
        self.reason = reason
        for task, _ in list(self._guarded.values()):
            task.cancel()
        callbacks = list(self._callbacks.values())
        self._callbacks.clear()
        for callback in callbacks:
            # Others are to learn of it too, and who fires it has more to do.
            try:
                callback()
            except Exception:
                logger.exception("a callback of an AbortSignal failed")
        for dependent in list(self._dependents or ()):
            dependent._fire(reason)  # noqa: SLF001  # its own class


class AbortController:
    """May fire its signal, a new one if none is given."""

    __slots__ = ("signal",)

    def __init__(self, signal: AbortSignal | None = None) -> None:
        self.signal = AbortSignal() if signal is None else signal

    def abort(self, reason: str = "aborted") -> None:
        """Fire the signal; the first reason stays."""
        self.signal._fire(reason)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # one unit


class Guard(msgspec.Struct, eq=False):
    """Ends its block when the signal fires, by the rules of `asyncio.timeout`.

    It may be entered many times, one after the other.
    """

    _signal: AbortSignal

    def __enter__(self) -> Self:
        signal = self._signal
        if signal.reason is not None:
            raise Aborted(signal.reason)
        task = asyncio.current_task()
        if task is None:
            message = "an AbortSignal guards a task; there is none here"
            raise RuntimeError(message)
        signal._guarded[self] = task, task.cancelling()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # one unit
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal = self._signal
        task, before = signal._guarded.pop(self)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # one unit
        if signal.reason is None:
            return
        # Someone else cancelled this task too: then the cancellation is theirs to see.
        if task.uncancel() <= before and kind is asyncio.CancelledError:
            raise Aborted(signal.reason) from error


def is_ending() -> bool:
    """Whether somebody has cancelled the running task, rather than what it waits for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def void(_: object) -> None:
    """Drop a value where a callback must return nothing."""
