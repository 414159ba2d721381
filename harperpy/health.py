"""Health: what state the server and its plugins are in."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .signal import SHUTDOWN, AbortController


class PluginStatus(msgspec.Struct):
    """How a plugin started: `ok`, or `error` with the cause in one line."""

    status: Literal["loading", "ok", "error"] = "loading"
    error: str | None = None


class Health:
    """`starting` → `ready` → `stopping`, and the state of each plugin.

    `stopping` is the signal that fires with the last of them.
    """

    def __init__(self) -> None:
        self.phase: Literal["starting", "ready", "stopping"] = "starting"
        self._stop = AbortController()
        self.stopping = self._stop.signal
        self.plugins: dict[str, PluginStatus] = {}

    def stop(self) -> None:
        """Take no more requests; tell streams without end to end."""
        self.phase = "stopping"
        self._stop.abort(SHUTDOWN)

    @property
    def degraded(self) -> bool:
        """Whether a plugin failed."""
        return any(plugin.status == "error" for plugin in self.plugins.values())

    def report(self, *, whole: bool) -> tuple[int, dict[str, Any]]:
        """An HTTP status and a body; with the plugins if `whole`."""
        if self.phase != "ready":
            return 503, {"status": self.phase}
        body = self.whole()
        return 200, body if whole else {"status": body["status"]}

    def whole(self) -> dict[str, Any]:
        """The state of the server, and of each plugin."""
        phase = "degraded" if self.degraded else "ok"
        return {
            "status": phase if self.phase == "ready" else self.phase,
            "plugins": msgspec.to_builtins(self.plugins),
        }
