"""Resource: static verbs, who may call them, and how a refusal is worded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Literal, TypeAlias

from .auth import User
from .content import Response, json_response
from .context import Context
from .contracts import Contract, Problem
from .errors import HarperError
from .names import CONTENT_TYPE
from .permission import Verb
from .request import RequestTarget

METHOD_VERBS: dict[str, tuple[str, Verb]] = {
    "GET": ("get", "read"),
    "HEAD": ("get", "read"),
    "POST": ("post", "create"),
    "PUT": ("put", "update"),
    "PATCH": ("patch", "update"),
    "DELETE": ("delete", "delete"),
    "QUERY": ("query", "read"),
}
"""HTTP method → the verb a resource defines, and the permission it takes."""
VERBS = (*dict.fromkeys(verb for verb, _ in METHOD_VERBS.values()), "search", "connect")
"""All that a resource may define; `connect` is a GET that prefers an event stream, or upgrades."""

PERMISSIONS: frozenset[Verb] = frozenset(permission for _, permission in METHOD_VERBS.values())
"""All permissions that a verb may take."""

ProtocolName: TypeAlias = Literal["rest", "sse", "ws", "mcp"]
"""By what a resource is reached; `sse` is a GET whose `Accept` asks for an event stream."""
PROTOCOLS: frozenset[ProtocolName] = frozenset({"rest", "sse", "ws", "mcp"})

_NO_HEADERS: Mapping[str, str] = {}
WITHOUT_BODY = frozenset({"get", "search", "delete", "connect"})


class Resource:
    """Base of all resources. Define the verbs you answer, as static or class methods.

    - `get(target, context)`, `delete(target, context)`
    - `post(target, data, context)`, `put`, `patch`, `query` likewise
    - `search(target, context)`, in place of `get` for a collection: `/notes/`, `/notes?topic=a`
    - `connect(target, incoming, context)`, in place of `get` for who prefers an event stream or
      opens a WebSocket: gives the messages one by one; `incoming` gives those of a WebSocket's
      client, and is None for a stream, as nothing comes in that way

    They may be sync or async, return a value or be generators, and take fewer parameters. A verb
    that is not defined is answered 405. Each is called only for those whom `allow_read`,
    `allow_create`, `allow_update` or `allow_delete` admits: by default super users and the roles
    that grant the mount's path.
    """

    path: ClassVar[str | None] = None
    """Where `resources.py` mounts it; its class name if None."""
    public: ClassVar[bool | Collection[Verb]] = False
    """True, or the permissions that need no login."""
    sub_paths: ClassVar[bool] = False
    """Whether it answers below its mount too (`/notes/1`)."""
    extensions: ClassVar[bool] = False
    """Whether `/notes/1.csv` is its `/notes/1` as CSV; `/notes.csv` is at any rate `/notes`."""
    protocols: ClassVar[Collection[ProtocolName]] = PROTOCOLS
    """What reaches it; for any other protocol a shorter mount answers, or nothing."""
    first_item_wait: ClassVar[float] = 60.0
    """Seconds a stream's status waits for its first item; later errors come in-band."""
    time_limit: ClassVar[float | None] = None
    """Seconds a verb may take before it returns, 0 for no limit; None for `http.timeout`. A stream
    that it has returned goes on for as long as it likes."""
    keepalive: ClassVar[float] = 15.0
    """Seconds of silence after which an event stream sends a comment; how often it is asked whether
    who gets the items of a stream, or has a WebSocket, may go on, and a WebSocket's client whether
    it is there."""
    settles_credentials: ClassVar[bool] = False
    """Whether a refused credential reaches the verb, as `context.rejection`."""
    api_key_headers: ClassVar[Collection[str]] = ()
    """Headers that may hold an API key too, as other clients than OpenAI's send it."""
    schemas: ClassVar[Mapping[str, Contract]] = {}
    """By verb, what it takes and answers, where its annotations do not say it."""
    error_type: ClassVar[Any] = Problem
    """What the JSON of its refusals looks like; for a `present_error` of its own, that."""
    hidden: ClassVar[bool] = False
    """Whether `/openapi` leaves it out; it answers all the same."""

    @staticmethod
    def allow_read(user: User | None, target: RequestTarget, context: Context) -> Any:
        """Whether this user may get, head, search, query or connect; may be async."""
        return granted(user, context, "read")

    @staticmethod
    def allow_create(user: User | None, target: RequestTarget, context: Context) -> Any:
        """Whether this user may post; may be async."""
        return granted(user, context, "create")

    @staticmethod
    def allow_update(user: User | None, target: RequestTarget, context: Context) -> Any:
        """Whether this user may put or patch; may be async."""
        return granted(user, context, "update")

    @staticmethod
    def allow_delete(user: User | None, target: RequestTarget, context: Context) -> Any:
        """Whether this user may delete; may be async."""
        return granted(user, context, "delete")

    @staticmethod
    def present_headers(context: Context) -> Mapping[str, str]:
        """Headers of each answer, refusals too, unless it has them; asked as the head is sent."""
        return _NO_HEADERS

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """Word a refusal: an RFC 9457 problem, unless a resource has a shape of its own."""
        return problem(error, context)

    @staticmethod
    def present_stream_error(error: HarperError, context: Context) -> Any:
        """Word a failure after the stream has begun: its last message."""
        return {"event": "harper-error", "data": _problem_body(error, context)}


_BY_ROLE: dict[Verb, object] = {
    "read": Resource.allow_read,
    "create": Resource.allow_create,
    "update": Resource.allow_update,
    "delete": Resource.allow_delete,
}


def granted(user: User | None, context: Context, verb: Verb) -> bool:
    """Whether the user's role opens the matched mount for the verb."""
    return user is not None and user.role.permission.allows(context.app or "", verb)


def left_to_roles(resource: type[Resource]) -> frozenset[Verb]:
    """The permissions about which a class has nothing to say of its own: the role decides."""
    return frozenset(
        permission
        for permission, hook in _BY_ROLE.items()
        if getattr(resource, f"allow_{permission}") is hook
    )


def problem(error: HarperError, context: Context) -> Response:
    """RFC 9457 problem details."""
    asked = context.accept or ""
    media = "application/problem+json" if "problem+json" in asked else "application/json"
    response = json_response(error.status, _problem_body(error, context), error.headers)
    response.headers[CONTENT_TYPE] = media
    return response


def _problem_body(error: HarperError, context: Context) -> dict[str, Any]:
    try:
        title = HTTPStatus(error.status).phrase
    except ValueError:
        title = "Unknown Error"
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": error.status,
        "detail": error.public_message,
        "instance": context.url,
        "request_id": context.request_id,
    }
    if error.code:
        body["code"] = error.code
    if error.errors:
        body["errors"] = error.errors
    return body
