"""Middleware: named, ordered functions around the dispatch of a port."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec

from .backend import positional, required
from .content import EventStream, Response
from .context import Context
from .errors import WHATEVER, NotFound, RegistrationError, TransactionError
from .framing import log_error
from .patterns import decoded_segment
from .rendering import Reply
from .spelling import nearest

Next: TypeAlias = Callable[[Context], Awaitable[Reply]]
"""What a middleware awaits for the answer of all that stands after it."""
Middleware: TypeAlias = Callable[[Context, Next], Awaitable[Reply | Response | EventStream]]
"""Gives what `await call_next(context)` gives, or an answer of its own."""

AUTHENTICATION = "authentication"
RESOURCES = "resources"


class Way(Protocol):
    """One request's way through a port, as the dispatch makes it."""

    context: Context

    async def authenticate(self) -> None:
        """Find out who is asking. Raises what ends the request here."""
        ...

    async def resources(self) -> Reply | None:
        """Authorise and call the mounted resource; None where nothing is mounted."""
        ...

    async def rendered(self, answer: Response | EventStream) -> Reply:
        """A middleware's own answer as a reply."""
        ...

    def refused(self, error: BaseException) -> Reply:
        """The error as the matched resource words it."""
        ...


Stage: TypeAlias = Callable[[Way], Awaitable[Reply]]


class Link(msgspec.Struct):
    """A name in the chain: where it wants to stand, and how it wraps what follows."""

    name: str
    owner: str
    wrap: Callable[[Stage], Stage]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    live: bool = True


class Middlewares:
    """The middlewares of one port; open until the server starts, then one chain.

    The chain always holds two names: `authentication`, after which `context.user` is known, and
    `resources`, which authorises and calls what is mounted. A middleware stands between them, in
    the order of registration, unless it says otherwise. What stands after `resources` is reached
    only where nothing is mounted.
    """

    def __init__(self) -> None:
        self._links = {
            AUTHENTICATION: Link(AUTHENTICATION, "", _authenticating),
            RESOURCES: Link(RESOURCES, "", _answering, after=(AUTHENTICATION,)),
        }
        self._frozen = False
        self.chain: Stage | None = None
        """None while there is no middleware: then nothing is walked."""

    def add(
        self,
        function: Middleware,
        name: str,
        owner: str,
        *,
        before: Iterable[str] = (),
        after: Iterable[str] = (),
        url_path: str | None = None,
    ) -> None:
        """Take one in. Raises `RegistrationError` for a taken name or an order that is none."""
        if self._frozen:
            message = f"middleware {name!r} cannot be added: the server has started"
            raise RegistrationError(message)
        if known := self._links.get(name):
            whose = f"of plugin {known.owner!r}" if known.owner else "of harperpy itself"
            message = f"the middleware name {name!r} is taken by one {whose}: give another 'name='"
            raise RegistrationError(message)
        _check(function, name)
        wrap = _calling(function, name, url_path)
        self._links[name] = Link(name, owner, wrap, _names(before), _names(after))
        try:
            _ordered(self._links)
        except RegistrationError:
            del self._links[name]
            raise

    def strangers(self) -> Iterator[tuple[str, RegistrationError]]:
        """The owner of each middleware that names one that does not exist, and what to tell it."""
        for link in self._links.values():
            for other in (*link.before, *link.after):
                if link.live and other not in self._links:
                    known = [name for name in self._links if name != link.name]
                    hint = nearest(other, known, "ones")
                    message = f"middleware {link.name!r} stands by {other!r}, which is none; {hint}"
                    yield link.owner, RegistrationError(message)

    def fail(self, owner: str) -> None:
        """Withdraw a plugin's middlewares; others may go on to name them."""
        for link in self._links.values():
            if owner and link.owner == owner:
                link.live = False
        if self._frozen:
            self._compose()

    def freeze(self) -> None:
        """Take no more, and put the chain together."""
        self._frozen = True
        self._compose()

    def _compose(self) -> None:
        links = [link for link in _ordered(self._links) if link.live]
        stage: Stage = _nothing
        for link in reversed(links):
            stage = link.wrap(stage)
        self.chain = stage if len(links) > 2 else None


def _names(given: Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check(function: Any, name: str) -> None:
    call = getattr(function, "__call__", None)  # noqa: B004  # an instance with an async __call__
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)):
        message = f"middleware {name!r} must be async: write 'async def', and return what it awaits"
        raise RegistrationError(message)
    if positional(function, 2) < 2 or required(function) > 2:
        message = f"middleware {name!r} must take two parameters: it is given (context, call_next)"
        raise RegistrationError(message)


def _ordered(links: Mapping[str, Link]) -> list[Link]:
    """The links as they stand. Raises `RegistrationError` where two would stand before each other.

    Those that nothing tells apart stay in the order of registration.
    """
    ahead = _with_places(links, _told(links))
    at = {name: place for place, name in enumerate(links)}
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in path:
            circle = " before ".join(map(repr, [name, *reversed(path[path.index(name) :])]))
            message = f"the order of the middlewares is a circle: {circle}"
            raise RegistrationError(message)
        for other in sorted(ahead.get(name, ()), key=lambda one: at.get(one, len(at))):
            visit(other, (*path, name))
        done[name] = None

    for name in links:
        visit(name, ())
    return [links[name] for name in done if name in links]


def _told(links: Mapping[str, Link]) -> dict[str, set[str]]:
    """By name, what is said to stand ahead of it."""
    ahead = {link.name: set(link.after) for link in links.values()}
    for link in links.values():
        for other in link.before:
            ahead.setdefault(other, set()).add(link.name)
    return ahead


def _with_places(links: Mapping[str, Link], ahead: dict[str, set[str]]) -> dict[str, set[str]]:
    """What says nothing else stands before `resources`; `authentication` is looked at first."""
    early = _reached(AUTHENTICATION, ahead)
    free = [
        name
        for name in links
        if name not in {AUTHENTICATION, RESOURCES, *early}
        and RESOURCES not in _reached(name, ahead)
    ]
    ahead[RESOURCES].update(free)
    return ahead


def _reached(name: str, ahead: Mapping[str, set[str]]) -> set[str]:
    """All that stands ahead of a name, near or far."""
    found: set[str] = set()
    left = [name]
    while left:
        new = ahead.get(left.pop(), set()) - found
        found |= new
        left.extend(new)
    return found


async def _nothing(_: Way) -> Reply:
    raise NotFound


def _authenticating(following: Stage) -> Stage:
    async def stage(way: Way) -> Reply:
        await way.authenticate()
        return await following(way)

    return stage


def _answering(following: Stage) -> Stage:
    async def stage(way: Way) -> Reply:
        reply = await way.resources()
        return await following(way) if reply is None else reply

    return stage


def _calling(function: Middleware, name: str, url_path: str | None) -> Callable[[Stage], Stage]:
    prefix = [segment for segment in (url_path or "").split("/") if segment]

    def wrap(following: Stage) -> Stage:
        async def stage(way: Way) -> Reply:
            if prefix and not _reaches(way.context, prefix):
                return await following(way)
            return await _Turn(name, way, following).take(function)

        return stage

    return wrap


def _reaches(context: Context, prefix: list[str]) -> bool:
    """Whether a request may be for what is beneath these segments: `/it.csv` is for `/it`."""
    path = context.path
    if _beneath(path, prefix):
        return True
    asked = context.types.of_extension(path)
    return asked is not None and _beneath(asked[0], prefix)


def _beneath(path: str, prefix: list[str]) -> bool:
    """Whether a path begins with these segments, read as the registry reads them."""
    segments = path.removeprefix("/").split("/", len(prefix))[: len(prefix)]
    return list(map(decoded_segment, segments)) == prefix


class _Turn:
    """One middleware's turn at one request."""

    __slots__ = ("_asked", "_following", "_given", "_name", "_way")

    def __init__(self, name: str, way: Way, following: Stage) -> None:
        self._name = name
        self._way = way
        self._following = following
        self._asked = False
        self._given: Reply | None = None

    async def take(self, function: Middleware) -> Reply:
        """Call it; a stream that it was given and does not pass on is closed."""
        reply: Reply | None = None
        try:
            reply = await self._answered(function)
            return reply
        finally:
            if self._given is not None and reply is not self._given:
                await self._given.close()

    async def _proceed(self, context: Context) -> Reply:
        if self._asked or context is not self._way.context:
            how = "a second time" if self._asked else "with a context that is not its own"
            message = f"middleware {self._name!r} called call_next {how}"
            raise RuntimeError(message)
        if context.in_block:
            message = (
                f"middleware {self._name!r} called call_next in a transaction's block, but what "
                "the handler writes is kept or undone by itself: end the block before"
            )
            raise TransactionError(message)
        self._asked = True
        try:
            self._given = await self._following(self._way)
        except WHATEVER as error:  # a refusal is an answer too
            self._given = self._way.refused(error)
        return self._given

    async def _answered(self, function: Middleware) -> Reply:
        answer: Any = None
        try:
            answer = await function(self._way.context, self._proceed)
        except Exception as error:
            if self._given is None or not self._given.committed:
                raise
            log_error(error)
        if self._given is not None and self._given.committed:
            # Its head is on the way: nothing else can be answered any more.
            return self._given
        if isinstance(answer, Reply):
            return answer
        if isinstance(answer, Response | EventStream):
            return await self._way.rendered(answer)
        message = (
            f"middleware {self._name!r} returned {type(answer).__name__}: "
            "return what 'await call_next(context)' gives, or a Response"
        )
        raise TypeError(message)
