"""Server: everything put together, once; start, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Collection, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec

from .accounting import current_caller
from .auth import User
from .background import Background
from .context import Context
from .cors import Cors
from .database import read_secret
from .dispatch import Dispatch
from .doors import AuthLog
from .founding import lacks_first, make_first, put_together
from .health import Health
from .held import (
    LOCAL,
    SOCKET_NAME,
    Held,
    Place,
    Worker,
    data_root,
    local_socket,
    lock_root,
    no_such_family,
    places,
    port_taken,
    try_places,
)
from .listener import Listener
from .loader import Loader
from .meter import Meter
from .people import SUPER_USER
from .port import Port
from .request import Request
from .routing import Routes
from .scope import Scope
from .sections import Config
from .throttle import Throttle
from .transactions import Transaction
from .wire import Wire

_DRAIN_SECONDS = 10.0
_DETACHED_SECONDS = 5.0
# When another process takes over the ports: for running requests, and for a first one to come.
_HAND_OVER_SECONDS = 0.5
_FIRST_REQUEST_SECONDS = 0.25
_TAKEN_SECONDS = 0.02


class FirstStart(msgspec.Struct, frozen=True):
    """What a first start in dev made up, to be shown once."""

    username: str
    password: str
    api_key: str


class Server:
    """One server on one data folder. Two may live in one process.

    `directory` holds the application, `root` the data. `plugins` are modules (or any objects with
    `handle_application`) to apply after those that the configuration names. `offline` servers
    fetch nothing. `held` is what a parent process keeps for it: such a server takes connections
    when it is ready, as they wait until then.
    """

    def __init__(
        self,
        config: Config,
        *,
        directory: Path,
        root: Path | None = None,
        dev: bool = False,
        environ: Mapping[str, str] | None = None,
        plugins: Mapping[str, object] | None = None,
        offline: bool = False,
        held: Held | None = None,
    ) -> None:
        self._offline = offline
        self._held = held
        self._worker = held.worker if held else Worker()
        # A parent of several keeps the socket for local operations too.
        self._given = held.sockets.get(LOCAL, []) if held else []
        self._made_socket = False
        self._plugins = plugins or {}
        self.config = config
        self.directory = directory
        self.root = data_root(config, directory, root)
        self.dev = dev
        self.health = Health()
        self.first_start: FirstStart | None = None
        self.http_port = self.operations_port = 0
        self._environ = os.environ if environ is None else environ
        self._lock: TextIO | None = None
        self._listeners: list[Listener] = []
        self._background = Background()
        self._wires: list[Wire] = []

    async def start(self) -> None:
        """Listen, start the plugins, and be ready. Raises `ConfigError` in one sentence."""
        try:
            await self._open()
            if self._held is None:
                await self._listen()
            if not self._given:
                own = local_socket(self.root)
                self._made_socket = True
                await self._serve_socket(own)
            await self._apply()
            people, environ = self.core.people, self._environ
            lacks_first_user = await lacks_first(people, environ, dev=self.dev)
            await self.core.billing.open()
            await self.core.models.open()
            if lacks_first_user:
                # After all that may fail, or take long: what is made up here is shown once.
                await self._meet_the_first()
        except BaseException:
            await self.stop()
            raise
        self.health.phase = "ready"
        if self._held is not None:
            await self._listen()
        for one in self._given:
            await self._serve_socket(one)

    async def open(self) -> None:
        """Start without ports, for the command line while no server runs."""
        try:
            await self._open(briefly=True)
            await self._apply()
        except BaseException:
            await self.stop()
            raise

    async def rehearse(self, taken: Collection[int] | None = None) -> None:
        """Do what a start does before the plugins' own hooks, and close. Raises `ConfigError`.

        With `taken`, the ports of the server whose place it is to take, all others are tried too.
        """
        try:
            if taken is not None:
                try_places(places(self.config, dev=self.dev), taken)
            await self._open()
            self.loader.find()
            self.loader.make_models(self.config, self.routes)
        finally:
            await self.stop()

    def take_over(self, config: Config) -> list[str]:
        """Use a changed configuration where only options of plugins that listen changed.

        The keys that changed, such as `plugins.greeter.word`. Without any, nothing has happened:
        what changed needs a new start.
        """
        changed = self.loader.take_over(config)
        if not changed:
            return []
        self.config = self.core.config = config
        return changed

    async def stop(self, *, hand_over: bool = False) -> None:
        """Take no more requests, let the running ones end within ten seconds, and close all.

        With `hand_over` another process takes the next requests: who is connected is answered, but
        nothing is waited for longer than a moment.
        """
        if hand_over:
            await self._hand_over()
        self.health.stop()
        seconds = _HAND_OVER_SECONDS if hand_over else _DRAIN_SECONDS
        await asyncio.gather(*(one.close(seconds) for one in self._listeners))
        self._listeners.clear()
        await self._background.close(_HAND_OVER_SECONDS if hand_over else _DETACHED_SECONDS)
        if hasattr(self, "loader"):
            await self.loader.close()
            await self.core.models.close()
            await self.core.billing.close()
            await self.core.database.close()
        if self._lock is not None:
            if self._made_socket:
                (self.root / SOCKET_NAME).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    async def operate(
        self,
        body: Mapping[str, Any],
        user: User | None = None,
        headers: MutableMapping[str, str] | None = None,
    ) -> Any:
        """Run an operation as this user, or else as the local super user.

        What an answer over HTTP would have as headers is put into `headers`.
        """
        request = Request("POST", "/", headers={}, trusted=True)
        begin = partial(Transaction, self.core.database)
        context = Context(
            request,
            self.core.models,
            self.core.health.stopping,
            self.core.content_types,
            begin,
            self._background,
            source="ops",
            user=user or await self.local_user(),
        )
        before = current_caller.set(context)
        try:
            return await context.settle(self.core.operations.call(body, context))
        finally:
            current_caller.reset(before)
            if headers is not None:
                headers.update(context.response_headers)

    async def local_user(self) -> User:
        """Whom the local socket speaks for: the first super user."""
        user = await self.core.people.first_super_user()
        return user or User("operations.sock", SUPER_USER)

    async def _open(self, *, briefly: bool = False) -> None:
        self._lock = self._held.lock if self._held else lock_root(self.root, briefly=briefly)
        first = self._held is None or self._held.first
        secret = read_secret(self.root, make=first)
        self.routes = Routes(int((self.root / "secret.key").stat().st_mtime))
        core = put_together(
            self.config,
            self.routes,
            secret,
            directory=self.directory,
            root=self.root,
            dev=self.dev,
            health=self.health,
            environ=self._environ,
            worker=self._worker,
            operate=self.operate,
        )
        await core.database.open(make=first)
        await core.people.open()
        self.core = core
        self.loader = Loader(
            self.config,
            self.directory,
            self.health,
            self._plugins,
            offline=self._offline,
            root=self.root,
            processors=self._worker.processors,
        )

    async def _meet_the_first(self) -> None:
        """Make the administrator."""
        core = self.core
        password = await make_first(core.people, self._environ)
        if password is not None:
            _, key = await core.keys.add("HDB_ADMIN", "first")
            self.first_start = FirstStart("HDB_ADMIN", password, key)

    async def _apply(self) -> None:
        """Find and start the plugins, then freeze what they filled."""
        loader, core = self.loader, self.core
        loader.find()
        loader.make_models(self.config, self.routes)
        await loader.apply(self._scope)
        chains = tuple(core.middlewares.values())
        strangers = [*self.routes.strangers()]
        for chain in chains:
            strangers += chain.strangers()
        for owner, error in strangers:
            loader.failed(owner, error)
        mounts = (core.resources, core.operations_resources)
        await loader.withdraw(*mounts, *chains, core.operations, core.authenticators, self.routes)
        loader.insist()
        frozen = (core.resources, core.operations_resources, core.operations, core.content_types)
        for part in (*frozen, self.routes):
            part.freeze()
        for chain in chains:
            chain.freeze()

    def _scope(self, name: str, options: Mapping[str, Any]) -> Scope:
        return Scope(name, options, self.core)

    async def _listen(self) -> None:
        network = self.config.operations_api.network
        where = places(self.config, dev=self.dev)
        rest = self._wire("rest", _origins(self.config.http, dev=self.dev))
        self.http_port = await self._serve(rest, "rest", where["rest"])
        operations = self._wire("operations", _origins(network, dev=self.dev))
        self.operations_port = await self._serve(operations, "operations", where["operations"])

    async def _hand_over(self) -> None:
        """Take no more connections, and answer the first request of each that was taken."""
        await asyncio.gather(*(listener.stop() for listener in self._listeners))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_REQUEST_SECONDS):
                # What was taken in this turn of the loop is seen in the next ones.
                await asyncio.sleep(_TAKEN_SECONDS)
                while any(wire.awaits_first for wire in self._wires):  # noqa: ASYNC110  # once, at the end
                    await asyncio.sleep(_TAKEN_SECONDS)

    def _wire(self, port: str, origins: tuple[str, ...], *, trusted: bool = False) -> Wire:
        core, events = self.core, self.config.logging.audit_auth_events
        dispatch = Dispatch(
            core.resources if port == "rest" else core.operations_resources,
            core.authenticators,
            core.models,
            self.health,
            Cors(origins),
            middlewares=core.middlewares[port],
            throttle=self._throttle() if port == "rest" else None,
            time_limit=self.config.http.timeout_seconds if port == "rest" else 0.0,
            authorize_local=self.config.authentication.authorize_local,
            local_user=self.local_user,
            begin=partial(Transaction, core.database),
            source="rest" if port == "rest" else "ops",
            types=core.content_types,
            background=self._background,
            auth_log=AuthLog(failed=events.log_failed, successful=events.log_successful),
        )
        name, kind = (port, None) if port == "rest" else ("local" if trusted else port, "operation")
        meter = None if core.analytics is None else Meter(core.analytics, name, kind)
        return Wire(Port(dispatch, self.config.http, trusted=trusted, meter=meter))

    def _throttle(self) -> Throttle | None:
        http = self.config.http
        limit = http.max_concurrent_requests
        if limit is None:
            return None
        return Throttle(limit, http.request_queue_limit / 1000, self._refused)

    def _refused(self) -> None:
        if self.core.analytics is not None:
            self.core.analytics.record(True, "service-unavailable", "rest")  # noqa: FBT003

    def _listener(self, wire: Wire) -> Listener:
        self._wires.append(wire)
        listener = Listener(wire.server())
        self._listeners.append(listener)
        return listener

    async def _serve(self, wire: Wire, name: str, place: Place) -> int:
        """Listen on each host; a second one is left out where the machine lacks its family."""
        listener = self._listener(wire)
        if self._held is not None:
            for one in self._held.sockets[name]:
                await listener.take(one)
            return listener.port
        port = place.port
        for host in place.hosts:
            try:
                await listener.bind(host, port)
            except OSError as error:
                if no_such_family(error) and host != place.hosts[0]:
                    continue
                raise port_taken(error, host, port, place.key) from error
            port = listener.port
        return port

    async def _serve_socket(self, one: socket.socket) -> None:
        await self._listener(self._wire("operations", (), trusted=True)).take(one)


def _origins(section: Any, *, dev: bool) -> tuple[str, ...]:
    """The origins a port allows: its list where `cors` is on, any in dev unless it is off."""
    enabled = dev if section.cors is None else section.cors
    return tuple(section.cors_access_list) if enabled else ()
