"""The ports of a server, as one plugin sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from .analytics import Analytics
from .auth import User
from .context import Context
from .errors import RegistrationError
from .middleware import Middleware, Middlewares
from .negotiation import ContentTypes
from .operations import Operations
from .people import SUPER_USER

M = TypeVar("M", bound=Middleware)
Operate: TypeAlias = Callable[[Mapping[str, Any], User], Awaitable[Any]]


class PluginServer:
    """The ports as one plugin sees them: `scope.server`; `content_types` are those of both."""

    def __init__(
        self,
        ports: Mapping[str, Middlewares],
        owner: str,
        content_types: ContentTypes,
        analytics: Analytics | None,
        *,
        operations: Operations,
        operate: Operate,
    ) -> None:
        self.content_types = content_types
        self._analytics = analytics
        self._ports = ports
        self._owner = owner
        self._operations = operations
        self._operate = operate

    def http(
        self,
        function: M,
        *,
        name: str | None = None,
        before: str | Iterable[str] = (),
        after: str | Iterable[str] = (),
        port: Literal["rest", "operations"] = "rest",
        url_path: str | None = None,
    ) -> M:
        """Wrap the requests of a port in `async def function(context, call_next)`.

        It returns what `await call_next(context)` gives, with another status or more headers if it
        likes, or answers by itself: with a `Response`, or by raising. A refusal of what stands
        after it is an answer like any other. `call_next` may be called once, and in no
        transaction's block. Headers that every
        answer is to have, even one whose head goes out while its stream is silent, are set in
        `context.response_headers` before.

        It stands after `authentication` and before `resources` unless `before` or `after` names
        others; after `resources` it is asked only where nothing is mounted. `url_path` keeps it to
        a path and all beneath. `name` is by default `plugin.function`.

        Raises `RegistrationError`: a name that is taken, an order that is a circle, a port that is
        none. A name that no middleware has stops the plugin when all plugins have started.
        """
        if port not in self._ports:
            message = f"port: expected one of {', '.join(self._ports)}, got {port!r}"
            raise RegistrationError(message)
        own: object = getattr(function, "__name__", type(function).__name__)
        name = name or f"{self._owner}.{own}"
        self._ports[port].add(
            function, name, self._owner, before=before, after=after, url_path=url_path
        )
        return function

    def record_action(
        self,
        value: float | Callable[[], float],
        metric: str,
        path: str | None = None,
        method: str | None = None,
        type: str | None = None,  # noqa: A002  # as the column is called
    ) -> None:
        """Measure: the value counts for a metric, and for what else tells its series from others.

        Of numbers the rows of `system.hdb_analytics` have the mean and percentiles, of `True` and
        `False` the ratio. A function is called for its number, or truth, whenever rows are made: it
        is sync, quick, and known by its metric and the rest, so another takes its place. Nothing
        happens where `analytics.aggregatePeriod` turns it off.

        Raises `TypeError` for a value of another type or a name that is no text, `ValueError` for a
        number that is none or beyond 1e24.
        """
        if self._analytics is not None:
            self._analytics.record(value, metric, path, method, type)

    async def operation(self, body: Mapping[str, Any], context: Context | None = None) -> Any:
        """Run `{"operation": name, …}` in this process, as the operations port does.

        It runs as the context's user, who must be allowed to, and in the context's transaction;
        without a context as the plugin itself, who may do all, and in a transaction of its own.
        Raises what the operation refuses with.
        """
        if context is None:
            return await self._operate(body, User(f"plugin:{self._owner}", SUPER_USER))
        app = context.app
        try:
            return await self._operations.call(body, context)
        finally:
            context.app = app

    def close(self) -> None:
        """Withdraw what the plugin has added."""
        for middlewares in self._ports.values():
            middlewares.fail(self._owner)
