"""Cors: which pages of other origins may call a port."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Request

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, QUERY, OPTIONS"
_HEADERS = "Accept, Content-Type, Authorization"
_LIMITS = ("limit", "remaining", "reset")
_EXPOSED = ", ".join(
    (
        "x-request-id",
        "x-harper-call-id",
        "etag",
        "link",
        "location",
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        "x-harper-truncated",
        "openai-processing-ms",
        "openai-version",
        "server-timing",
        *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in _LIMITS),
    )
)
_PREFLIGHT_SECONDS = "600"
# What a page of any origin may post without a preflight.
_UNASKED = ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data")


class Cors:
    """Answers by a port's list of origins (`*` for any). Credentials are never allowed with it."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)
        self.lists = bool(origins)
        """Whether there are any."""

    def headers(self, request: Request) -> dict[str, str]:
        """What to add to an answer: where any page may call, that it depends on which asks."""
        if not self.lists:
            return {}
        origin = request.headers.get("origin")
        if not origin or not {"*", origin} & self._origins:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
            "Vary": "Origin",
        }

    def admits(self, request: Request) -> bool:
        """Whether the page that a request comes from, if any, may open a WebSocket or post this.

        Browsers ask nobody before they do. What a page cannot send by itself, a name and password
        that the browser remembers, counts for pages of this very host only; in a form, or a body
        without a type, for those too that the list names.
        """
        origin = request.headers.get("origin")
        if origin is None or not (request.websocket or request.method == "POST"):
            return True
        host = origin.partition("://")[2].lower()
        if host and host == request.headers.get("host", "").lower():
            return True
        basic = request.headers.get("authorization", "").lower().startswith("basic")
        if request.websocket:
            return not basic and bool({"*", origin} & self._origins)
        return not basic or origin in self._origins or request.body.content_type not in _UNASKED

    def preflight(self, request: Request) -> dict[str, str] | None:
        """The headers that answer a preflight; None if the request is not one, or not for us."""
        if request.method != "OPTIONS" or "access-control-request-method" not in request.headers:
            return None
        headers = self.headers(request)
        if "Access-Control-Allow-Origin" not in headers:
            return None
        # The OpenAI clients for browsers send x-stainless-* headers that no list can foresee.
        asked = request.headers.get("access-control-request-headers") or _HEADERS
        return {
            **headers,
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": asked,
            "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
        }
