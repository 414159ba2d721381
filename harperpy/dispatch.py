"""The way of a request, top to bottom, without a socket."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeAlias

from multidict import CIMultiDict

from .accounting import Caller, current_caller
from .auth import Authenticators, User
from .backend import is_awaitable, settled
from .background import Background
from .caching import keep_private, vary
from .content import Body, EventStream, Response, ResponseError
from .context import Context
from .cors import Cors
from .deadlines import Deadline, Deadlines
from .doors import AuthLog, authorise, caller_address, challenge, is_local
from .errors import (
    AnswerTimeout,
    BodyTimeout,
    ClientError,
    InvalidCredentials,
    NotFound,
    ServiceUnavailable,
)
from .framing import as_harper_error, log_error
from .handshake import check_handshake, credential_of
from .health import Health
from .incoming import Incoming
from .lines import tell
from .middleware import Middlewares
from .models import Models
from .names import CONTENT_TYPE, ORIGIN, REQUEST_ID
from .negotiation import ContentTypes
from .permission import Verb
from .reach import Course, Found, course_of, find, verb_of
from .registry import Entry, Resources
from .rendering import (
    Early,
    Flow,
    Reply,
    after,
    error_body,
    merged,
    prime,
    ready,
    render,
    sound,
    stamp,
    upgraded,
)
from .request import Request, RequestTarget
from .resource import Resource
from .sse import encode_json
from .throttle import SAFE, Throttle
from .transactions import Transaction

logger = logging.getLogger("harperpy.dispatch")

_HEALTH = "/health"
_NO_HEADERS: Mapping[str, str] = {}
_Asked: TypeAlias = tuple[Entry, str, Verb, RequestTarget, Any, Context]
"""Who may, and what they call with what: a mount, its verb, the permission that it takes."""


class Dispatch:
    """CORS → authenticate → match → settle credentials → authorise → verb → reply."""

    def __init__(
        self,
        resources: Resources,
        authenticators: Authenticators,
        models: Models,
        health: Health,
        cors: Cors,
        *,
        middlewares: Middlewares,
        throttle: Throttle | None = None,
        time_limit: float = 0.0,
        authorize_local: bool = False,
        local_user: Callable[[], Awaitable[User | None]],
        begin: Callable[[Caller], Transaction],
        background: Background,
        source: str = "rest",
        types: ContentTypes,
        auth_log: AuthLog,
    ) -> None:
        self.types = types
        self._resources = resources
        self._authenticators = authenticators
        self._models = models
        self._health = health
        self._cors = cors
        self.brief = not cors.lists  # Where pages of other origins are told nothing by a head.
        self._middlewares = middlewares
        self._throttle = throttle
        self._time_limit = time_limit
        self._deadlines: dict[float, Deadlines] = {}
        self._nowhere = Entry("", Resource, "")
        self._authorize_local = authorize_local
        self._local_user = local_user
        self._begin = begin
        self._source = source
        self._background = background
        self._auth_log = auth_log

    def open(self, request: Request) -> Context:
        """The context of a request, current from now on in the running task."""
        context = Context(
            request,
            self._models,
            None,
            self._health.stopping,
            self._begin,
            self._source,
            self.types,
            self._background,
        )
        current_caller.set(context)
        return context

    async def answer(self, context: Context, early: Early = lambda _: None) -> Reply:
        """The reply to a request. `early` is told of a stream's head that cannot wait longer."""
        found = find(self._resources, self.types, context)
        if found is not None:
            context.app = found[0].path
        try:
            reply = await self._way(context, found, early)
        except Exception as error:  # noqa: BLE001  # every error becomes an answer here
            reply = self.refusal(error, found, context)
        if not reply.committed:
            self._mark(reply, found, context)
        return reply

    def _mark(self, reply: Reply, found: Found | None, context: Context) -> None:
        """What every head carries: the resource's, the request's id, what other origins need."""
        request, headers = context.request, reply.headers
        if found is not None:
            resource, own = found[0].resource, _NO_HEADERS
            try:
                own = resource.present_headers(context)
            except Exception:
                logger.exception("present_headers of %s failed", resource.__name__)
            if reply.lines and tell(reply, own, context):
                return
            for name, value in own.items():
                headers.setdefault(name, value)
            if reply.keepalive is not None and request.method == "GET":
                reply.check = partial(self._check, context, found)
        if context.etag is not None or context.last_modified is not None:
            stamp(reply, context)
        keep_private(headers, context, reply.status)
        if self._cors.lists and (told := self._cors.headers(request)):
            vary(headers, told.pop("Vary"))
            headers.update(told)
        headers[REQUEST_ID] = request.id
        if context.call_headers:
            headers.update(context.call_headers)

    def _way(self, context: Context, found: Found | None, early: Early) -> Awaitable[Reply]:
        """What is to be awaited for the reply. Raises what nobody has to be known for."""
        request = context.request
        if request.shown.course is None and (own := self._own(context)) is not None:
            return own
        if self._health.phase != "ready":
            message = f"the server is {self._health.phase}"
            raise ServiceUnavailable(message, headers={"Retry-After": "1"})
        if self._throttle is not None and request.method not in SAFE:
            return self._in_turn(self._throttle, context, found, early)
        return self._on(context, found, early)

    def _own(self, context: Context) -> Awaitable[Reply] | None:
        """What no resource answers. Raises what is not for pages of the request's origin."""
        request = context.request
        if ORIGIN in request.headers and not self._cors.admits(request):
            what = "open a WebSocket here" if request.websocket else "post this with a password"
            message = f"Origin: pages of this origin may not {what}"
            raise ClientError(message, status=403, code="origin_not_allowed")
        if request.method == "OPTIONS" and (preflight := self._cors.preflight(request)):
            return ready(Reply(204, CIMultiDict(preflight)))
        if request.path == _HEALTH and request.method in ("GET", "HEAD"):
            return self._report_health(context)
        return None

    async def _in_turn(
        self, throttle: Throttle, context: Context, found: Found | None, early: Early
    ) -> Reply:
        leave = await throttle.enter()
        try:
            return await self._on(context, found, after(leave, early))
        finally:
            leave()

    def _on(self, context: Context, found: Found | None, early: Early) -> Awaitable[Reply]:
        if (chain := self._middlewares.chain) is not None:
            # They may change each head.
            context.request.brief = False
            return sound(chain(_Way(self, context, found, early)), context)
        shown, course = context.request.shown, context.request.shown.course
        if found is not None and course is not None:
            context.user = self._authenticators.recall(shown.header, course.address, shown)
            if context.user is not None:
                return self.call(context, found, early)
        return self._identified(context, found, early)

    async def _identified(self, context: Context, found: Found | None, early: Early) -> Reply:
        await self.authenticate(context, found)
        if found is None:
            raise NotFound
        shown = context.request.shown
        if shown.header and context.user is not None and not self._auth_log.successful:
            shown.course = course_of(found, context)
        return await self.call(context, found, early)

    async def call(self, context: Context, found: Found, early: Early) -> Reply:
        """Authorise and call the resource that was found."""
        request = context.request
        entry, target = found
        if request.method == "OPTIONS":
            return Reply(204, merged(context, {"Allow": ", ".join(entry.allow)}))
        course: Course | None = request.shown.course
        verb, permission = verb_of(found, context) if course is None else course.asks
        given: Body | Incoming | None = request.body
        if verb == "connect":
            given = Incoming(entry.read) if request.websocket else None
        try:
            work: Callable[[_Asked], Any] = self._admit
            if entry.opens(permission, context):
                work = self._invoke
            asked = entry, verb, permission, target, given, context
            value = await context.settle(work, asked)
            if isinstance(given, Incoming):
                check = partial(self._check, context, found)
                return upgraded(value, given, check, entry, context)
            reply = render(value, context)
            if isinstance(reply, Flow):
                reply = await self._primed(reply, context, found, early)
        except ResponseError as error:
            log_error(error)
            reply = await self.rendered(error.response, context, found, early)
        return reply

    async def _admit(self, asked: _Asked) -> Any:
        entry, _, permission, target, _, context = asked
        await authorise(entry, permission, target, context)
        return await settled(self._invoke(asked))

    def _invoke(self, asked: _Asked) -> Any:
        """What a verb returns, to be awaited within its time if it wants to be."""
        entry, verb, _, target, given, context = asked
        if verb in entry.plain:
            context.check_accept()
        if context.request.websocket:
            check_handshake(context.headers)
        value = entry.handlers[verb](target, given, context)
        own = entry.resource.time_limit
        seconds = self._time_limit if own is None else own
        if seconds and is_awaitable(value):
            return self._in_time(value, seconds, entry, context)
        return value

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

    async def rendered(
        self, answer: Response | EventStream, context: Context, found: Found | None, early: Early
    ) -> Reply:
        """What a middleware, or an error of its own kind, answers."""
        reply = render(answer, context)
        if isinstance(reply, Reply):
            return reply
        return await self._primed(reply, context, found, early)

    async def _primed(
        self, flow: Flow, context: Context, found: Found | None, early: Early
    ) -> Reply:
        """A stream's reply; a head that goes out before it is marked as every other."""

        def begin(reply: Reply) -> None:
            self._mark(reply, found, context)
            early(reply)

        return await prime(flow, found[0] if found else self._nowhere, context, begin)

    async def authenticate(self, context: Context, found: Found | None) -> None:
        """Who is asking; a refused credential ends it here unless the resource settles it."""
        request = context.request
        try:
            header = credential_of(context.request, _key_headers(found))
            if header is not None:
                address, shown = caller_address(context), request.shown
                context.user = await self._authenticators.identify(header, address, shown)
                if self._auth_log.successful:
                    self._auth_log.succeeded(context)
            elif request.trusted or (self._authorize_local and is_local(request)):
                context.user = await self._local_user()
        except InvalidCredentials as error:
            if found is None or not found[0].resource.settles_credentials:
                raise
            context.rejection = error

    async def _check(self, context: Context, found: Found) -> None:
        """Ask anew whether what was allowed when it began still is. Raises what refuses it now."""
        header = credential_of(context.request, _key_headers(found))
        if header is not None and context.rejection is None:
            address, shown = caller_address(context), context.request.shown
            user = await self._authenticators.identify(header, address, shown)
            # A middleware may have put another in their place.
            if context.user is not None and user.username == context.user.username:
                context.user = user
        entry, target = found
        await authorise(entry, "read", target, context)

    async def _report_health(self, context: Context) -> Reply:
        try:
            await self.authenticate(context, None)
        except InvalidCredentials:
            # A probe with an old key still learns whether the server is up, and no more.
            context.user = None
        whole = context.user is not None and context.user.is_super_user
        status, body = self._health.report(whole=whole)
        headers = merged(context, {CONTENT_TYPE: "application/json"})
        return Reply(status, headers, encode_json(body))

    def refusal(self, error: Exception, found: Found | None, context: Context) -> Reply:
        """The error as its resource words it; the default wording if that fails too."""
        log_error(error)
        if isinstance(error, InvalidCredentials):
            self._auth_log.failed(error, context)
        refusal = as_harper_error(error)
        resource = found[0].resource if found else Resource
        try:
            if isinstance(error, ResponseError):
                response = error.response
            else:
                response = resource.present_error(refusal, context)
            headers = merged(context, response.headers)
        except Exception:
            logger.exception("present_error of %s failed", resource.__name__)
            response = Resource.present_error(refusal, context)
            headers = merged(context, response.headers)
        if refusal.status == 401:
            challenge(headers, context)
        return Reply(response.status, headers, error_body(response, headers))


def _key_headers(found: Found | None) -> Collection[str]:
    return found[0].resource.api_key_headers if found else ()


class _Way:
    """One request's way through the middlewares of a port."""

    __slots__ = ("_dispatch", "_early", "_found", "context")

    def __init__(
        self, dispatch: Dispatch, context: Context, found: Found | None, early: Early
    ) -> None:
        self._dispatch = dispatch
        self._found = found
        self._early = early
        self.context = context

    async def authenticate(self) -> None:
        await self._dispatch.authenticate(self.context, self._found)

    async def resources(self) -> Reply | None:
        if self._found is None:
            return None
        return await self._dispatch.call(self.context, self._found, self._early)

    async def rendered(self, answer: Response | EventStream) -> Reply:
        return await self._dispatch.rendered(answer, self.context, self._found, self._early)

    def refused(self, error: Exception) -> Reply:
        return self._dispatch.refusal(error, self._found, self.context)
