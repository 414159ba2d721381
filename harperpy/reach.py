"""What a request reaches: by which protocol, at which mount, which verb of it."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from .auth import User
from .content import ResponseError
from .context import Context
from .contracts import Handler
from .doors import caller_address
from .errors import (
    AccessViolation,
    ClientError,
    HarperError,
    MethodNotAllowed,
    NotFound,
    NotImplementedYet,
)
from .names import ACCEPT
from .negotiation import EVENTS, ContentTypes
from .permission import Verb
from .registry import Entry, Resources
from .request import RequestTarget, own_target
from .resource import METHOD_VERBS, ProtocolName
from .verbs import Verbs

Found: TypeAlias = tuple[Entry, RequestTarget]

_READS = ("GET", "HEAD")


class Course(msgspec.Struct, eq=False):
    """What a head and the frozen mounts alone decide, so that it is worked out once.

    `work` is the verb, `permission` what it takes, `address` where it came from. Who asks is found
    out anew for each request, and whether they may, unless they are `known`: who asked last, and
    did. A user whose rights have changed is another one.
    """

    entry: Entry
    work: Handler
    permission: Verb
    accept: str | None
    address: str
    target: RequestTarget
    known: User | None = None


def find(resources: Resources, types: ContentTypes, context: Context) -> Found | None:
    """The resource that answers; the context's `accept` is what an extension of the path says."""
    request = context.request
    context.accept = request.headers.get(ACCEPT)
    path, search = request.path, request.query
    protocol = _protocol(context) if resources.selective else "rest"
    found = resources.match(path, search, protocol)
    if found is None and resources.selective and request.method in _READS:
        found = _socket_at(resources, path, search)
    if "." not in path or (asked := types.of_extension(path)) is None:
        return found
    stem, media = asked
    without = resources.match(stem, search, protocol)
    if without is None or not _means_extension(without, found):
        return found
    context.accept = media
    return without


def nothing(resources: Resources, context: Context) -> HarperError:
    """The refusal of a path that leads nowhere: often that of a base URL without its `/v1`.

    That one is worded as its mount words all, for clients that read nothing else.
    """
    path = f"v1/{context.path.strip('/')}"
    near = resources.match(path)
    if near is None or near[0].path != path:
        return NotFound()
    told = NotFound(f"Not found; it is at /{path}: OpenAI's clients need a base URL with /v1.")
    return ResponseError(near[0].resource.present_error(told, context))


def course_of(found: Found, verbs: Verbs, context: Context) -> Course | None:
    """The course of all requests with this head; None where more than that decides."""
    entry, target = found
    known = entry.direct.get(context.method)
    if known is None or context.request.websocket:
        return None
    verb, permission = known
    return Course(
        entry,
        verbs.work(entry, verb),
        permission,
        context.accept,
        caller_address(context),
        own_target(target),
    )


def verb_of(found: Found, context: Context) -> tuple[str, Verb]:
    """The verb and the permission for a request; who is not logged in learns no more than that."""
    entry, target = found
    method = context.request.method
    if (known := entry.direct.get(method)) is not None and not context.request.websocket:
        return known
    protocol = _protocol(context)
    verb, permission = METHOD_VERBS.get(method, ("", "read"))
    connects = verb == "get" and "connect" in entry.handlers
    reached = protocol in entry.protocols
    if reached and connects and protocol != "rest":
        return "connect", permission
    if verb == "get" and "search" in entry.handlers and _is_search(entry, target):
        verb = "search"
    if reached and verb in entry.handlers and protocol != "ws":
        return verb, permission
    if context.user is None and not entry.public:
        raise AccessViolation(None)
    if connects:
        raise _only_connects(entry, context)
    if protocol == "ws" and verb in entry.handlers:
        message = f"Upgrade: {entry.resource.__name__} speaks no WebSocket; send none"
        raise ClientError(message, code="no_websocket")
    if not verb:
        message = f"Method {method} is not recognised."
        raise NotImplementedYet(message)
    raise MethodNotAllowed(method, entry.allow)


def _protocol(context: Context) -> ProtocolName:
    """By what a resource is reached: a get that agrees on an event stream is of a kind."""
    if context.request.websocket:
        return "ws"
    if context.method not in _READS or EVENTS not in (context.accept or "").lower():
        return "rest"
    try:
        return "sse" if context.types.negotiate(context.accept) == EVENTS else "rest"
    except ClientError:
        return "rest"


def _is_search(entry: Entry, target: RequestTarget) -> bool:
    """Whether a GET is for what a mount holds, rather than for the mount or one of its things."""
    return target.is_collection or (target.id is None and "get" not in entry.handlers)


def _socket_at(resources: Resources, path: str, search: str) -> Found | None:
    """A WebSocket and nothing else, which can still say that it is one."""
    found = resources.match(path, search, "ws")
    return found if found and "connect" in found[0].handlers else None


def _means_extension(without: Found, found: Found | None) -> bool:
    """Whether the end of a path is an extension, rather than of the name of what is found."""
    if found is not None and not found[1].pathname:
        return False
    if found is None or found[0] is not without[0]:
        return not without[1].pathname
    return without[0].resource.extensions


def _only_connects(entry: Entry, context: Context) -> ClientError:
    """The refusal of a plain request for what is a stream, or a WebSocket, and nothing else."""
    if "ws" in entry.protocols and "sse" not in entry.protocols:
        message = "this is a WebSocket; expected Upgrade: websocket"
        headers = {"Upgrade": "websocket"}
        return ClientError(message, status=426, code="upgrade_required", headers=headers)
    told = context.accept or ""
    message = f"Accept: this is a stream of events; expected {EVENTS}, got {told!r}"
    return ClientError(message, status=406, code="not_acceptable")
