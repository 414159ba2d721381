"""Health: what state the server and its plugins are in."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import HarperError
from .signal import SHUTDOWN, AbortController


class PluginStatus(msgspec.Struct):
    """How a plugin is: `ok`, or `error` with the cause in one line."""

    status: Literal["loading", "ok", "error"] = "loading"
    error: str | None = None


class Health:
    """`starting` → `ready` → `stopping`, and the state of each plugin.

    `stopping` is the signal that fires with the last of them. `on_restart` is set by who starts the
    server anew as soon as that is needed, `on_order` by who does it when an operator says so.
    """

    def __init__(self) -> None:
        self.phase: Literal["starting", "ready", "stopping"] = "starting"
        self._stop = AbortController()
        self.stopping = self._stop.signal
        self.plugins: dict[str, PluginStatus] = {}
        self.restart_reason: str | None = None
        self.on_restart: Callable[[], None] | None = None
        self.on_order: Callable[[], None] | None = None
        self._troubles: dict[str, dict[str, str]] = {}

    def trouble(self, plugin: str, place: str, error: str | None) -> None:
        """What is wrong with a plugin that started, at a place; None once that is over."""
        troubles = self._troubles.setdefault(plugin, {})
        troubles.pop(place, None)
        if error is not None:
            troubles[place] = f"{place}: {error}"

    def ask_restart(self, reason: str, *, ordered: bool = False) -> bool:
        """Only a new start helps: note the first reason, and tell whoever can do it, if any."""
        self.restart_reason = self.restart_reason or reason
        starter = self.on_restart or (self.on_order if ordered else None)
        if starter is not None:
            starter()
        return starter is not None

    def stop(self) -> None:
        """Take no more requests; tell streams without end to end."""
        self.phase = "stopping"
        self._stop.abort(SHUTDOWN)

    @property
    def degraded(self) -> bool:
        """Whether a plugin failed."""
        return any(plugin.status == "error" for plugin in self._now().values())

    def report(self, *, whole: bool) -> tuple[int, dict[str, Any]]:
        """An HTTP status and a body; with the plugins if `whole`."""
        if self.phase != "ready":
            return 503, {"status": self.phase}
        body = self.whole()
        return 200, body if whole else {"status": body["status"]}

    def whole(self) -> dict[str, Any]:
        """The state of the server, and of each plugin."""
        phase = "degraded" if self.degraded else "ok"
        restart = {"restart_required": True, "restart_reason": self.restart_reason}
        return {
            "status": phase if self.phase == "ready" else self.phase,
            "plugins": msgspec.to_builtins(self._now()),
            **(restart if self.restart_reason else {}),
        }

    def _now(self) -> dict[str, PluginStatus]:
        """How each plugin started, and what went wrong with it since."""
        since = {
            name: PluginStatus("error", next(iter(troubles.values())))
            for name, troubles in self._troubles.items()
            if troubles and self.plugins[name].status == "ok"
        }
        return {**self.plugins, **since}


def cause(error: BaseException, directory: Path) -> str:
    """A refusal's own sentence; of any other error also what it is, and where in the project."""
    if isinstance(error, HarperError):
        return str(error)
    # What is no Python says its place itself.
    place = "" if isinstance(error, SyntaxError) else _place(error, directory.resolve())
    return f"{type(error).__name__}: {error}".removesuffix(": ") + place


def _place(error: BaseException, directory: Path) -> str:
    """The last line of the project's own files that it came through."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename).resolve()
        own = file.is_relative_to(directory) and "site-packages" not in file.parts
        # Python's own code says `<frozen importlib>`, which is no file.
        if own and file.is_file():
            place = f" ({file.relative_to(directory)}, line {line})"
    return place
