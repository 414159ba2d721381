"""A WebSocket's opening request: whether it is sound, and the credential that a page can send."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping

from .errors import ClientError, InvalidCredentials
from .names import AUTHORIZATION
from .request import Request

SUBPROTOCOL = "harperpy"
_VERSION = "13"
_KEY_BYTES = 16
_BEARER = "bearer."


def check_handshake(headers: Mapping[str, str]) -> None:
    """Raises `ClientError`, 400 or 426, for what cannot become a WebSocket."""
    if headers.get("sec-websocket-version") != _VERSION:
        told = {"Upgrade": "websocket", "Sec-WebSocket-Version": _VERSION}
        message = f"Sec-WebSocket-Version: expected {_VERSION}"
        raise ClientError(message, status=426, code="upgrade_required", headers=told)
    try:
        sound = len(base64.b64decode(headers.get("sec-websocket-key", ""))) == _KEY_BYTES
    except ValueError:
        sound = False
    if not sound:
        message = f"Sec-WebSocket-Key: expected {_KEY_BYTES} bytes in base64"
        raise ClientError(message)
    offered = _offered(headers)
    # The library would log what it does not know, and it may be a key.
    if offered and SUBPROTOCOL not in offered:
        message = f"Sec-WebSocket-Protocol: expected {SUBPROTOCOL!r} among them, or none"
        raise ClientError(message)


def credential_of(request: Request, headers: Collection[str] = ()) -> str | None:
    """The `Authorization` of a request; a key in one of these headers too.

    Raises `InvalidCredentials` where they do not agree: nobody guesses which one is meant.
    A page cannot set it for a WebSocket: it offers `harperpy` and `bearer.KEY` as subprotocols, of
    which the answer names the first.
    """
    header = request.headers.get(AUTHORIZATION)
    for name in headers:
        if name in request.headers:
            header = _agreed(request, header, headers)
            break
    if header is not None or not request.websocket:
        return header
    offered = (name for name in _offered(request.headers) if name.startswith(_BEARER))
    bearer = next(offered, None)
    return None if bearer is None else f"Bearer {bearer.removeprefix(_BEARER)}"


def _agreed(request: Request, header: str | None, headers: Collection[str]) -> str | None:
    """The credential that all of these headers hold."""
    keys = {f"Bearer {key}" for name in headers if (key := request.headers.get(name))}
    told = {_plain(one) for one in (*keys, *([] if header is None else [header]))}
    if len(told) > 1:
        message = f"Authorization, {', '.join(headers)}: expected one credential, got several."
        raise InvalidCredentials(message)
    return header or (keys.pop() if keys else None)


def _plain(header: str) -> str:
    scheme, _, value = header.strip().partition(" ")
    return f"{scheme.lower()} {value.strip()}"


def _offered(headers: Mapping[str, str]) -> list[str]:
    offered = headers.get("sec-websocket-protocol")
    return [] if offered is None else [name.strip() for name in offered.split(",")]
