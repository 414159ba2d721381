"""Scope: all that a plugin is handed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .accounting import Ledger, current_caller
from .analytics import Analytics
from .auth import Authenticators
from .backend import settled
from .background import cancelled
from .billing import Billing
from .database import Database
from .entries import EVENTS, EntryHandler, FileEntry, Wanted, wanted
from .errors import WHATEVER, ConfigError, RegistrationError
from .health import Health
from .keys import Keys
from .middleware import Middlewares
from .models import Models
from .negotiation import ContentTypes
from .operations import Commands, Operations
from .options import Change, Options, check_listener
from .people import People
from .ports import Operate, PluginServer
from .registry import Entry, Resources
from .resource import Resource
from .secret import Secret
from .sections import Config
from .spelling import nearest
from .tokens import Tokens

T = TypeVar("T")

_CLOSE_SECONDS = 5.0
_LISTENER_SECONDS = 30.0
_LOOK_SECONDS = 0.5


class Secrets:
    """The secrets that the environment holds."""

    def __init__(self, plugin: str, environ: Mapping[str, str]) -> None:
        self._plugin = plugin
        self._environ = environ

    def get(self, name: str) -> Secret:
        """The secret in this environment variable. Raises `ConfigError` if it has none."""
        if value := self._environ.get(name):
            return Secret(value)
        state = "empty" if name in self._environ else "not set"
        message = f"plugins.{self._plugin}: the environment variable {name} is {state}"
        raise ConfigError(message)


class PluginResources:
    """The registry as one plugin sees it: what it mounts is known to be its own."""

    def __init__(self, resources: Resources, owner: str) -> None:
        self._resources = resources
        self._owner = owner

    def set(
        self, path: str, resource: type[Resource], *, force: bool = False, yields: bool = False
    ) -> None:
        """Mount a resource class: at `notes`, `users/:id`, `files/*path`, or `""` for the rest.

        `:name` stands for one segment, `*name` for all that is left: `target.params` holds them.
        One that `yields` gives way to any other that answers there. Raises `ResourceConflict` for a
        taken path unless `force`, `RegistrationError` for a class that cannot be mounted.
        """
        self._resources.set(path, resource, owner=self._owner, force=force, yields=yields)

    def __iter__(self) -> Iterator[Entry]:
        """All mounts of the port, other plugins' too."""
        return iter(self._resources)


class Core(msgspec.Struct):
    """The parts of a server that its plugins share."""

    config: Config
    directory: Path
    root: Path
    dev: bool
    resources: Resources
    operations_resources: Resources
    middlewares: Mapping[str, Middlewares]
    models: Models
    operations: Operations
    operate: Operate
    content_types: ContentTypes
    authenticators: Authenticators
    ledger: Ledger
    database: Database
    people: People
    keys: Keys
    tokens: Tokens
    billing: Billing
    health: Health
    environ: Mapping[str, str]
    analytics: Analytics | None


class Scope:
    """What a plugin is handed: the registries to fill, the services to use, its own options.

    What a plugin opens with `enter` is closed with it, as is what it gives to `on_close`; its tasks
    end with it.
    """

    plugin_name: str
    """Its name in config.yaml."""
    options: Options
    """Its block of config.yaml, without `path`, `package`, `timeout` and `required`."""
    secrets: Secrets
    """The environment's: `secrets.get("NAME")`."""
    directory: Path
    """The project's folder."""
    root: Path
    """The data folder."""
    resources: PluginResources
    """The mounts of the REST port: `resources.set("notes", Notes)`."""
    operations_resources: PluginResources
    """The mounts of the operations port."""
    server: PluginServer
    """The ports: `server.http(middleware)`, `server.operation(body)`, `server.record_action(…)`."""
    models: Models
    """To ask models, and to offer one: `models.register_backend(kind, name, backend)`."""
    operations: Operations
    """To offer an operation: `operations.add(name, function, RequestType)`."""
    authenticators: Authenticators
    """To vouch for credentials of a kind of one's own: `authenticators.append(authenticator)`."""
    ledger: Ledger
    """To be told of each model call: `ledger.subscribe(function)`."""
    analytics: Analytics | None
    """What is measured; None where it is turned off."""
    database: Database
    """To make one's tables: `await database.run(metadata.create_all)`."""
    people: People
    """Users and roles."""
    keys: Keys
    """API keys."""
    tokens: Tokens
    """Operation tokens and refresh tokens."""
    billing: Billing
    """What calls cost, and what callers may take."""
    logger: logging.Logger
    """`harperpy.plugins.NAME`."""

    def __init__(self, name: str, options: Mapping[str, Any], core: Core) -> None:
        self.plugin_name = name
        self.options = Options(name, options)
        self.secrets = Secrets(name, core.environ)
        self.directory = core.directory
        self.root = core.root
        self.resources = PluginResources(core.resources, name)
        self.operations_resources = PluginResources(core.operations_resources, name)
        self.server = PluginServer(
            core.middlewares,
            name,
            core.content_types,
            core.analytics,
            operations=core.operations,
            operate=core.operate,
        )
        self.models = core.models.of(name)
        self.operations = core.operations.of(name)
        self.commands = Commands(self.operations, name)
        self.authenticators = core.authenticators.of(name)
        self.ledger = core.ledger
        self.analytics = core.analytics
        self.database = core.database
        self.people = core.people
        self.keys = core.keys
        self.tokens = core.tokens
        self.billing = core.billing
        self.logger = logging.getLogger(f"harperpy.plugins.{name}")
        self.first_error: BaseException | None = None
        self._core = core
        self._health = core.health
        self._telling = asyncio.Lock()
        self._handlers: list[EntryHandler] = []
        self._has_loaded = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: list[Callable[[], Awaitable[None] | None]] = []

    @property
    def config(self) -> Config:
        """All of config.yaml."""
        return self._core.config

    @property
    def config_file_path(self) -> Path:
        """Where config.yaml is, or would be."""
        return self.directory / "config.yaml"

    @property
    def app_name(self) -> str:
        """The name of the application's folder."""
        return self.directory.resolve().name

    def request_restart(self, reason: str, *, ordered: bool = False) -> bool:
        """Only a new start helps: `harperpy dev` makes it, elsewhere `get_status` asks for it.

        One that is `ordered`, by who may, `harperpy run` makes as well. Whether it comes by itself.
        While the server starts it is noted, no more: a new start would come back to here.
        """
        self.logger.warning("a restart is required: %s", reason)
        return self._health.ask_restart(f"{self.plugin_name}: {reason}", ordered=ordered)

    def handle_entry(
        self,
        listener: Callable[..., Any],
        files: str | list[str] | Mapping[str, Any] | None = None,
        *,
        url_path: str | None = None,
        on: Collection[str] = EVENTS,
    ) -> None:
        """Call `listener(entry)`, sync or async, for each file and folder of these patterns.

        `entry` is a `FileEntry`. Those that are there come as `add` and `add_dir` before the plugin
        counts as started; in dev what changes later comes too. `on` are the events it takes: a file
        that changes in another way asks for a restart. Patterns are relative to the project's
        folder, `{"source": …, "ignore": …}` leaves some out. Without `files` the plugin's options
        `files` and `urlPath` say which. Raises `ConfigError` or `RegistrationError`.
        """
        where = f"plugins.{self.plugin_name}: handle_entry"
        check_listener(listener, 1, where, "a function of one entry")
        if strange := [event for event in on if event not in EVENTS]:
            message = f"{where}: no event {strange[0]!r}; {nearest(strange[0], EVENTS, 'events')}"
            raise RegistrationError(message)
        if self._has_loaded:
            message = f"{where}: expected to be called while the plugin starts, in its hook"
            raise RegistrationError(message)
        handler = EntryHandler(self._wanted(files, url_path), listener, on)
        handler.follows_options = files is None
        self._handlers.append(handler)

    async def load_entries(self) -> None:
        """Tell its listeners of the files that are there; in dev, of what happens to them later.

        Raises `RegistrationError` for the first that fails.
        """
        self._has_loaded = True
        for handler in self._handlers:
            for entry in await handler.look(self.directory, self.root):
                if handler.takes(entry) and (trouble := await self._handled(handler, entry)):
                    message = f"{self._place(entry)}: {trouble}"
                    raise RegistrationError(message)
        if self._core.dev and self._handlers:
            self.create_task(self._watch(), name="handle_entry")

    def create_task(
        self, work: Coroutine[Any, Any, T], *, name: str | None = None
    ) -> asyncio.Task[T]:
        """Run for no request, until done or the plugin closes; a failure is logged."""
        name, variables = name or getattr(work, "__qualname__", None), copy_context()
        variables.run(current_caller.set, None)
        task = asyncio.create_task(work, name=name, context=variables)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    @property
    def pending(self) -> list[str]:
        """The names of its tasks that still run."""
        return sorted(task.get_name() for task in self._tasks)

    def status(self) -> dict[str, Any]:
        """What state the server and its plugins are in, as super users read it in `/health`."""
        return self._health.whole()

    async def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter this now, and leave it when the server stops: last in, first left."""
        stack = AsyncExitStack()
        value = await stack.enter_async_context(manager)
        self.on_close(stack.aclose)
        return value

    def on_close(self, closer: Callable[[], Awaitable[None] | None]) -> None:
        """Call this when the server stops: last in, first called, each within five seconds."""
        self._closers.append(closer)

    def takes(self, changes: list[Change]) -> bool:
        """Whether the plugin handles these changes of its options."""
        follows = any(handler.follows_options for handler in self._handlers)
        own = ("files", "urlPath") if follows else ()
        rest = [change for change in changes if change.path.split(".")[0] not in own]
        return not rest or bool(self.options.listeners)

    def take(self, values: Mapping[str, Any], changes: list[Change]) -> None:
        """Have these options from now on, and tell who listens, in the background."""
        self.options.replace(values)
        self._aim()
        self.create_task(self._tell(changes), name="options.on_change")

    async def close(self) -> None:
        """Withdraw its middlewares, end its tasks, then call its closers, failing ones or not."""
        self.server.close()
        await cancelled(self._tasks, _CLOSE_SECONDS, self.logger)
        while self._closers:
            await self._call(self._closers.pop())

    async def _call(self, closer: Callable[[], Awaitable[None] | None]) -> None:
        before = _cancels()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await settled(closer())
        except WHATEVER:
            self.logger.exception("closing failed")
        except asyncio.CancelledError:
            # That of a task which it has cancelled, and waited for, is the closer's own.
            if _cancels() > before:
                raise

    def _aim(self) -> None:
        """Let the handlers of the option `files` follow it."""
        trouble = None
        for handler in self._handlers:
            if handler.follows_options:
                try:
                    handler.wanted = self._wanted(None, None)
                except ConfigError as error:
                    trouble = str(error)
        if trouble:
            self.logger.error("the old files stay: %s", trouble)
        self._health.trouble(self.plugin_name, "handle_entry", trouble)

    def _wanted(self, files: Any, url_path: str | None) -> Wanted:
        """What is given, else what the options say."""
        given = self.options.get("files") if files is None else files
        if given is None:
            message = (
                f"config.yaml: plugins.{self.plugin_name}.files: missing; handle_entry without "
                "files expects the patterns there"
            )
            raise ConfigError(message)
        base = self.options.get("urlPath") if url_path is None else url_path
        return wanted(given, base, self.plugin_name)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for handler in self._handlers:
                for entry in await handler.look(self.directory, self.root):
                    if handler.takes(entry):
                        trouble = await self._handled(handler, entry)
                        self._health.trouble(self.plugin_name, self._place(entry), trouble)
                    elif handler.misses(entry):
                        self.request_restart(f"{self._place(entry)}: {entry.event}")

    async def _handled(self, handler: EntryHandler, entry: FileEntry) -> str | None:
        """Tell a listener; if it fails, why."""
        try:
            async with asyncio.timeout(_LISTENER_SECONDS):
                await settled(handler.listener(entry))
        except Exception as error:
            self.logger.exception("the listener failed on %s", self._place(entry))
            return f"{type(error).__name__}: {error}"
        return None

    def _place(self, entry: FileEntry) -> str:
        return str(entry.path.relative_to(self.directory.resolve()))

    async def _tell(self, changes: list[Change]) -> None:
        """Tell each listener of each change; one that fails is a trouble of the plugin."""
        trouble = None
        async with self._telling:
            for change in changes:
                for listener in self.options.listeners:
                    try:
                        async with asyncio.timeout(_LISTENER_SECONDS):
                            told = listener(change.path, change.value, self.options.whole())
                            await settled(told)
                    except Exception as error:
                        self.logger.exception("a listener failed on the option %s", change.path)
                        trouble = trouble or f"{change.path}: {type(error).__name__}: {error}"
        self._health.trouble(self.plugin_name, "options.on_change", trouble)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.first_error = self.first_error or error
            self.logger.error("task %s failed", task.get_name(), exc_info=error)


def _cancels() -> int:
    """How often somebody has cancelled the running task."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
