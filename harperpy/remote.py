"""Ask a running server's operations: over its local socket, or over HTTP with a key."""

from __future__ import annotations

import base64
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec

from .errors import ClientError
from .secret import mask

_SECONDS = 10.0
_CONNECT_SECONDS = 5.0
_LISTS = ("unauthorized_access", "invalid_schema_items", "main_permissions")


class Remote:
    """The operations of one running server, by its socket's path or its operations URL.

    Who asks is known by a name and a password, or else by an API key.

    An answer may take `seconds`, or any time if that is None. Raises `ClientError` for what can be
    no key.
    """

    def __init__(
        self,
        *,
        socket: Path | None = None,
        url: str | None = None,
        api_key: str | None = None,
        login: tuple[str, str] | None = None,
        seconds: float | None = _SECONDS,
    ) -> None:
        self._socket = socket
        self._url = url or "http://localhost/"
        self._seconds = seconds
        self._headers: dict[str, str] = {}
        if login is not None:
            pair = base64.b64encode(":".join(login).encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        elif api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                message = "the API key has a character that no key has: is it a newline?"
                raise ClientError(message)
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def operate(
        self, body: Mapping[str, Any], headers: MutableMapping[str, str] | None = None
    ) -> Any:
        """The result; its headers, in lower case, are put into `headers`.

        Raises `ClientError` with the server's refusal, or if nobody answers.
        """
        connector = aiohttp.UnixConnector(str(self._socket)) if self._socket else None
        timeout = aiohttp.ClientTimeout(total=self._seconds, sock_connect=_CONNECT_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.post(
                    self._url, json=dict(body), headers=self._headers, allow_redirects=False
                ) as response,
            ):
                if headers is not None:
                    headers.update((name.lower(), one) for name, one in response.headers.items())
                return _result(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            where = self._socket or self._url
            message = f"no harperpy answers at {where}: {error or type(error).__name__}"
            raise ClientError(mask(message)) from error


def _result(status: int, body: bytes) -> Any:
    if status < 400 and not body:
        return None
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        message = f"the server answered {status}, and not as an operations port does"
        raise ClientError(message) from error
    if status >= 400:
        refusal = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
        message = sentence(refusal.get("error"), refusal) or f"the server answered {status}"
        raise ClientError(message, status=status)
    return answer


def sentence(error: str | None, report: Mapping[str, Any]) -> str | None:
    """What a refusal says, and what its report says is lacking or wrong."""
    lists = [report.get(key, ()) for key in _LISTS]
    lists += report.get("schema_permissions", {}).values()
    parts = [one for each in lists for one in each]
    shown = [one if isinstance(one, str) else msgspec.json.encode(one).decode() for one in parts]
    return f"{error}: {'; '.join(shown)}" if error and shown else error
