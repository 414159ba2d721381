"""Doors: the one place where who may is decided, and what the log says of who logs in."""

from __future__ import annotations

import logging
import re
from typing import Protocol

from multidict import CIMultiDict

from .auth import Basic, User, read_credential
from .context import Context
from .errors import AccessViolation, InvalidCredentials
from .handshake import credential_of
from .permission import Verb
from .request import Request, RequestTarget

_LOOPBACK = ("127.0.0.1", "::1")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")
_PROXY_HEADERS = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)

# What a browser says of who asks: its user, or a page that came from here.
_OWN_SITES = ("none", "same-origin")

logger = logging.getLogger("harperpy.auth")


class Door(Protocol):
    """What leads to a handler: a mounted resource, an operation."""

    def refused(self, user: User) -> AccessViolation:
        """What is said to a user who may not pass."""
        ...

    async def permits(self, permission: Verb, target: RequestTarget, context: Context) -> bool:
        """Whether it is open to the context's user; a door that fails is shut."""
        ...


async def authorise(door: Door, permission: Verb, target: RequestTarget, context: Context) -> None:
    """Let the context's user pass. Raises `AccessViolation`, or what was wrong with a credential.

    Every way to a handler leads through here: verbs, event streams, WebSockets, the operations of
    the port, of the local socket and of the command line.
    """
    if await door.permits(permission, target, context) is not True:
        if context.user is None:
            raise context.rejection or AccessViolation(None)
        raise context.rejection or door.refused(context.user)


def caller_address(context: Context) -> str:
    """Where a request came from; empty for the local socket, which is trusted."""
    request = context.request
    return "" if request.trusted else request.peer or "unknown"


def is_local(request: Request) -> bool:
    """From this machine, not through a proxy on it, and not by a page in a browser on it.

    A page's own name may lead here too: only names that are always this machine's count.
    """
    for_others = any(name in request.headers for name in (*_PROXY_HEADERS, "origin"))
    name = _PORT.sub("", request.headers.get("host", "").lower())
    named = name in _LOCAL_NAMES or name.endswith(".localhost")
    # Pictures and links of pages elsewhere are asked for without an origin.
    own = request.headers.get("sec-fetch-site", "none") in _OWN_SITES
    return request.peer in _LOOPBACK and named and own and not for_others


def challenge(headers: CIMultiDict[str], context: Context) -> None:
    """Ask who was refused for a credential."""
    headers.add("WWW-Authenticate", 'Bearer realm="harperpy"')
    # Basic makes a browser ask for a password: not for calls that a page makes.
    if not {"origin", "x-requested-with"} & {name.lower() for name in context.headers}:
        headers.add("WWW-Authenticate", 'Basic realm="harperpy", charset="UTF-8"')


class AuthLog:
    """A line in the log for each failed login, and for each successful one; never a secret."""

    def __init__(self, *, failed: bool = True, successful: bool = False) -> None:
        self._failed = failed
        self.successful = successful
        """Whether those are told of too."""

    def failed(self, error: InvalidCredentials, context: Context) -> None:
        """A credential was refused."""
        if self._failed:
            self._write(logging.WARNING, "failed", error.status, error.username, context)

    def succeeded(self, context: Context) -> None:
        """A credential was accepted, where `successful` says that it is to be told."""
        if context.user is not None:
            self._write(logging.INFO, "succeeded", 200, context.user.username, context)

    def _write(
        self, level: int, what: str, status: int, username: str | None, context: Context
    ) -> None:
        kind, named = _told(context)
        logger.log(
            level,
            "login %s: username=%r status=%d type=%s address=%r method=%r path=%r request_id=%s",
            what,
            username or named,
            status,
            kind,
            caller_address(context) or "local socket",
            context.method,
            context.path,
            context.request_id,
        )


def _told(context: Context) -> tuple[str, str | None]:
    """The kind of the credential that was sent, and whom it names."""
    try:
        header = credential_of(context.request)
        credential = None if header is None else read_credential(header)
    except InvalidCredentials:
        return "malformed", None
    if isinstance(credential, Basic):
        return "Basic", credential.username
    return "body" if credential is None else "Bearer", None
