"""The way of a request, top to bottom, without a socket."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from functools import partial
from types import CoroutineType
from typing import Any, cast

from multidict import CIMultiDict

from .accounting import Caller, current_caller
from .auth import Authenticators, User
from .backend import settled
from .background import Background
from .caching import keep_private, vary
from .content import Body, EventStream, Response, ResponseError
from .context import Context
from .contracts import Handler
from .cors import Cors
from .doors import AuthLog, authorise, caller_address, challenge, is_local
from .errors import WHATEVER, ClientError, InvalidCredentials, ServiceUnavailable
from .framing import as_harper_error, log_error
from .handshake import credential_of
from .health import Health
from .incoming import Incoming
from .lines import tell
from .middleware import Middlewares
from .models import Models
from .names import CONTENT_TYPE, ORIGIN, REQUEST_ID, TRANSFER_ENCODING
from .negotiation import ContentTypes
from .permission import Verb
from .reach import Course, Found, course_of, find, nothing, verb_of
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
from .request import Request, own_target
from .resource import Resource
from .signal import is_ending
from .sse import encode_json
from .throttle import SAFE, Throttle
from .transactions import Transaction
from .verbs import Verbs

logger = logging.getLogger("harperpy.dispatch")

_HEALTH = "/health"
_NO_HEADERS: Mapping[str, str] = {}


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
        self._verbs = Verbs(time_limit)
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
            self._health.stopping,
            self.types,
            self._begin,
            self._background,
            source=self._source,
        )
        current_caller.set(context)
        return context

    def serve(self, context: Context, early: Early) -> Reply | Coroutine[Any, Any, Reply]:
        """The reply to a request where nothing is to be waited for, else what is to be awaited."""
        course: Course | None = context.request.shown.course
        if course is None or not self._admits(course, context):
            return self.answer(context, early)
        found = course.entry, own_target(course.target)
        value = context.begin(course.work, found[1], context.request.body)
        if not isinstance(value, CoroutineType):
            try:
                value = render(value, context)
            except Exception as error:  # noqa: BLE001  # every error becomes an answer
                value = self.refusal(error, found, context)
            if isinstance(value, Reply):
                self._mark(value, found, context)
                return value
        return self._finish(self._made(value, found, context, early), found, context)

    def _admits(self, course: Course, context: Context) -> bool:
        """Whether it is known who asks, and that they may: else it is found out on the long way."""
        if self._health.phase != "ready":
            return False
        entry = course.entry
        context.app, context.accept = entry.path, course.accept
        context.user = user = self._authenticators.recall(context.request.shown, course.address)
        if user is None or not (user is course.known or entry.opens(course.permission, context)):
            return False
        course.known = user
        return True

    async def answer(self, context: Context, early: Early = lambda _: None) -> Reply:
        """The reply to a request. `early` is told of a stream's head that cannot wait longer."""
        found = find(self._resources, self.types, context)
        if found is not None:
            context.app = found[0].path
        return await self._finish(self._way(context, found, early), found, context)

    async def _finish(
        self, coming: Awaitable[Reply], found: Found | None, context: Context
    ) -> Reply:
        try:
            reply = await coming
        except (*WHATEVER, CancelledError) as error:  # every one becomes an answer here
            if isinstance(error, CancelledError) and is_ending():
                raise
            reply = self.refusal(error, found, context)
        if not reply.committed:
            self._mark(reply, found, context)
        return reply

    def _mark(self, reply: Reply, found: Found | None, context: Context) -> None:
        """What every head carries: the resource's, the request's id, what other origins need."""
        request = context.request
        if found is not None:
            resource, own = found[0].resource, _NO_HEADERS
            try:
                own = resource.present_headers(context)
            except Exception:
                logger.exception("present_headers of %s failed", resource.__name__)
            if reply.lines and tell(reply, own, context):
                return
            for name, value in own.items():
                reply.headers.setdefault(name, value)
            if reply.keepalive is not None and request.method in ("GET", "QUERY"):
                reply.check = partial(self._check, context, found)
        if context.etag is not None or context.last_modified is not None:
            stamp(reply, context)
        headers = reply.headers
        # How an answer is framed is its connection's to say.
        headers.popall(TRANSFER_ENCODING, None)
        keep_private(headers, context, reply.status)
        if self._cors.lists and (told := self._cors.headers(request)):
            vary(headers, told.pop("Vary"))
            headers.update(told)
        headers[REQUEST_ID] = request.id
        if context.call_headers:
            headers.update(context.call_headers)

    async def _way(self, context: Context, found: Found | None, early: Early) -> Reply:
        if (own := self._own(context)) is not None:
            return await own
        if self._health.phase != "ready":
            message = f"the server is {self._health.phase}"
            raise ServiceUnavailable(message, headers={"Retry-After": "1"})
        if self._throttle is not None and context.request.method not in SAFE:
            return await self._in_turn(self._throttle, context, found, early)
        return await self._on(context, found, early)

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

    async def _on(self, context: Context, found: Found | None, early: Early) -> Reply:
        if (chain := self._middlewares.chain) is not None:
            # They may change each head.
            context.request.brief = False
            return await sound(chain(_Way(self, context, found, early)), context)
        await self.authenticate(context, found)
        if found is None:
            raise nothing(self._resources, context)
        shown = context.request.shown
        known = shown.header and context.user is not None and not self._auth_log.successful
        # Nothing is to come between a request and its verb then.
        if known and (self._throttle is None or context.method in SAFE):
            shown.course = course_of(found, self._verbs, context)
        return await self.call(context, found, early)

    async def call(self, context: Context, found: Found, early: Early) -> Reply:
        """Authorise and call the resource that was found."""
        request = context.request
        entry, target = found
        if request.method == "OPTIONS":
            return Reply(204, merged(context, {"Allow": ", ".join(entry.allow)}))
        verb, permission = verb_of(found, context)
        given: Body | Incoming | None = request.body
        if verb == "connect":
            given = Incoming(entry.read) if request.websocket else None
        work: Handler
        if entry.opens(permission, context):
            work = partial(self._verbs.call, entry, verb)
        else:
            work = partial(self._admit, entry, verb, permission)
        return await self._made(context.begin(work, target, given), found, context, early, given)

    async def _made(
        self,
        value: Any,
        found: Found,
        context: Context,
        early: Early,
        given: Body | Incoming | None = None,
    ) -> Reply:
        """The reply for what a verb gives: a coroutine of that, a stream, or the thing itself."""
        try:
            if isinstance(value, CoroutineType):
                value = cast("object", await value)
            if isinstance(given, Incoming):
                check = partial(self._check, context, found)
                return upgraded(value, given, check, found[0], context)
            reply = value if isinstance(value, Flow) else render(value, context)
            if isinstance(reply, Flow):
                reply = await self._primed(reply, context, found, early)
        except ResponseError as error:
            log_error(error)
            reply = await self.rendered(error.response, context, found, early)
        return reply

    async def _admit(  # noqa: PLR0917  # who may, and what they call with what
        self, entry: Entry, verb: str, permission: Verb, target: Any, given: Any, context: Context
    ) -> Any:
        await authorise(entry, permission, target, context)
        return await settled(self._verbs.call(entry, verb, target, given, context))

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

    def refusal(self, error: BaseException, found: Found | None, context: Context) -> Reply:
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

    def refused(self, error: BaseException) -> Reply:
        return self._dispatch.refusal(error, self._found, self.context)
