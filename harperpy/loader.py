"""Find the plugins that config.yaml names; apply them one by one."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import pluggy

from . import hookspecs
from .auth import Authenticators
from .backend import ModelBackend, positional, settled
from .errors import WHATEVER, ConfigError, HarperError, RegistrationError
from .health import Health, PluginStatus, cause
from .hookspecs import BackendFactory, ModelEntry, check_began, check_hooks
from .importing import import_file, import_package
from .middleware import Middlewares
from .operations import Operations
from .options import Change
from .ordering import missing, ordered, required
from .registry import Resources
from .routing import Kind, Registration, Routes
from .scope import Scope
from .sections import Config, ModelConfig
from .signal import is_ending
from .spelling import closest

logger = logging.getLogger("harperpy.loader")

BUILT_IN = (
    "users",
    "operations_api",
    "openapi",
    "listing",
    "model_calls",
    "audit",
    "limits",
    "prices",
    "analytics",
    "echo",
    "openai",
    "local",
    "models_gateway",
    "app_resources",
)
"""On unless `plugins:` says false; plugins of `harperpy.plugins` like any other."""

_START_SECONDS = 30.0
_OWN_OPTIONS = ("path", "package", "timeout", "required")


class Plugin(msgspec.Struct):
    """A plugin by name: where it lives, its options, and how long its start may take (seconds).

    Without one that is `required` no server starts.
    """

    name: str
    options: Mapping[str, Any]
    seconds: float = _START_SECONDS
    required: bool = False

    @property
    def module_name(self) -> str:
        """The dotted name of its module, unless a path says otherwise."""
        return str(self.options.get("package") or f"harperpy.plugins.{self.name}")

    @property
    def given(self) -> dict[str, Any]:
        """The options that are for the plugin itself."""
        return {key: value for key, value in self.options.items() if key not in _OWN_OPTIONS}

    @property
    def own(self) -> dict[str, Any]:
        """The options that are the loader's."""
        return {key: value for key, value in self.options.items() if key in _OWN_OPTIONS}


class Manager(pluggy.PluginManager):
    """pluggy's manager, for which a plain function with a hook's name is an implementation."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """A hook's options; none are needed when the name is a hook's."""
        opts = super().parse_hookimpl_opts(plugin, name)
        function = getattr(plugin, name, None)
        if opts is None and name in vars(self.hook) and callable(function):
            return {}
        return opts


class Loader:
    """The plugins of one server. A failed one is reported and leaves the rest up."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        health: Health,
        given: Mapping[str, object] | None = None,
        *,
        offline: bool = False,
        root: Path | None = None,
        processors: tuple[int, ...] = (),
    ) -> None:
        self._manager = Manager("harperpy")
        self._manager.add_hookspecs(hookspecs)
        self._config = config
        self._directory = directory
        self._health = health
        self._kinds: dict[str, BackendFactory] = {}
        self._given = given or {}
        self._offline = offline
        self._root = root
        self._processors = processors
        self.plugins = [*_named(config.plugins), *(Plugin(name, {}) for name in self._given)]
        self._off = [name for name, options in config.plugins.items() if options is False]
        self._requires: dict[str, tuple[str, ...]] = {}
        self.scopes: list[Scope] = []

    def find(self) -> None:
        """Import every plugin, and put them in order; one that cannot be is reported."""
        found: dict[str, object] = {}
        for plugin in self.plugins:
            self._health.plugins[plugin.name] = PluginStatus()
            try:
                found[plugin.name] = self._import(plugin)
                self._requires[plugin.name] = required(found[plugin.name])
            except WHATEVER as error:  # it ends the plugin alone
                self.failed(plugin.name, error)
        self._put_in_order()
        for plugin in self.plugins:
            if not self._is_down(plugin.name):
                self._register(plugin.name, found[plugin.name])
        self.insist()

    def insist(self) -> None:
        """Raises `ConfigError` where a plugin has failed that config.yaml calls `required`."""
        for plugin in self.plugins:
            status = self._health.plugins[plugin.name]
            if plugin.required and status.status == "error":
                where = f"config.yaml: plugins.{plugin.name}"
                message = f"{where}: it is required, and did not start: {status.error}"
                raise ConfigError(message)

    def _put_in_order(self) -> None:
        """Each plugin after those that it requires; else the order of config.yaml stays."""
        names = [plugin.name for plugin in self.plugins]
        order, wrong = ordered({name: self._requires.get(name, ()) for name in names})
        self.plugins.sort(key=lambda plugin: order.index(plugin.name))
        for name in names:
            needs = self._requires.get(name, ())
            if message := missing(needs, names, self._off) or wrong.get(name):
                self.failed(name, RegistrationError(message))

    def _is_down(self, name: str) -> bool:
        """Whether a plugin failed; without one that it requires, it fails here and now."""
        for need in self._requires.get(name, ()):
            if (known := self._health.plugins.get(need)) and known.status == "error":
                self.failed(name, RegistrationError(f"it requires {need}, which did not start"))
        return self._health.plugins[name].status == "error"

    def _register(self, name: str, plugin: object) -> None:
        try:
            self._manager.register(plugin, name)
            callers = self._manager.get_hookcallers(plugin) or []
            check_hooks(plugin, [caller.name for caller in callers])
        except WHATEVER as error:  # it ends the plugin alone
            self.failed(name, error)
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)

    def make_models(self, config: Config, routes: Routes) -> None:
        """Make the backends of `models:`. Raises `ConfigError` for a kind that no plugin knows."""
        for impl in self._manager.hook.register_model_backends.get_hookimpls():
            if not self._is_down(impl.plugin_name):
                self._take_kinds(impl)
        kinds: tuple[tuple[Kind, Mapping[str, ModelConfig]], ...] = (
            ("generative", config.models.generative),
            ("embedding", config.models.embedding),
        )
        for kind, entries in kinds:
            for name, entry in entries.items():
                made_from = ModelEntry(
                    kind,
                    name,
                    entry,
                    self._directory,
                    self._offline,
                    self._root,
                    self._processors,
                )
                backend = _made(self._factory(made_from), made_from)
                routes.add(Registration(kind, name, backend, tuple(entry.fallback)))

    def _take_kinds(self, impl: pluggy.HookImpl) -> None:
        own: dict[str, BackendFactory] = {}
        try:
            impl.function(*(own.__setitem__ for name in impl.argnames if name == "register"))
        except WHATEVER as error:  # it ends the plugin alone
            self.failed(impl.plugin_name, error)
            return
        if taken := sorted(own.keys() & self._kinds.keys()):
            message = f"the backend {taken[0]!r} belongs to another plugin already"
            self.failed(impl.plugin_name, RegistrationError(message))
        else:
            self._kinds |= own

    async def apply(self, make_scope: Callable[[str, Mapping[str, Any]], Scope]) -> None:
        """Call each plugin's `handle_application` with its own scope, within its time."""
        hooks = self._manager.hook.handle_application.get_hookimpls()
        functions = {impl.plugin_name: impl for impl in hooks}
        for plugin in self.plugins:
            status = self._health.plugins[plugin.name]
            if self._is_down(plugin.name):
                continue
            scope = make_scope(plugin.name, plugin.given)
            self.scopes.append(scope)
            if impl := functions.get(plugin.name):
                await self._start(plugin, impl, scope)
            if status.status == "loading":
                status.status = "ok"

    def take_over(self, config: Config) -> list[str] | None:
        """Give the plugins their new options; the keys that changed.

        None, and nothing happens, if anything else changed, or a plugin does not listen.
        """
        found = self._new_options(config)
        if found is None or not all(scope.takes(changes) for scope, _, changes in found):
            return None
        self._config = config
        for scope, values, changes in found:
            scope.take(values, changes)
        return [
            f"plugins.{scope.plugin_name}.{change.path}"
            for scope, _, changes in found
            for change in changes
        ]

    def _new_options(
        self, config: Config
    ) -> list[tuple[Scope, dict[str, Any], list[Change]]] | None:
        """Whose options changed, the new ones, and how; None if there is more to a change."""
        before = self._config
        same = msgspec.structs.replace(config, plugins=before.plugins)
        if same != before or _order(config, before) != _order(before, config):
            return None
        was, now = ({one.name: one for one in _named(each.plugins)} for each in (before, config))
        if {name: one.own for name, one in was.items()} != {n: one.own for n, one in now.items()}:
            return None
        running = {scope.plugin_name: scope for scope in self.scopes}
        changed = [name for name in now if repr(was[name].given) != repr(now[name].given)]
        if any(name not in running or self._is_down(name) for name in changed):
            return None
        return [
            (running[name], now[name].given, running[name].options.changes(now[name].given))
            for name in changed
        ]

    async def close(self) -> None:
        """Close the scopes, the last one opened first."""
        while self.scopes:
            await self.scopes.pop().close()

    async def _start(self, plugin: Plugin, impl: pluggy.HookImpl, scope: Scope) -> None:
        # One that is optional, or among others, is no argument to pluggy.
        given = [scope][: positional(impl.function, 1)]
        limit = asyncio.timeout(plugin.seconds)
        try:
            async with limit:
                check_began(await settled(impl.function(*given)))
                await scope.load_entries()
        except (*WHATEVER, asyncio.CancelledError) as error:  # it ends the plugin alone
            if isinstance(error, asyncio.CancelledError) and is_ending():
                raise
            cause = _too_slow(plugin, scope) if limit.expired() else error
            self.failed(plugin.name, scope.first_error or cause)

    def failed(self, name: str, error: BaseException) -> None:
        """Note that a plugin did not start, and why; the first cause stays."""
        status = self._health.plugins[name]
        if status.status == "error":
            return
        status.status = "error"
        told = cause(error, self._directory)
        status.error = told
        trace = None if isinstance(error, HarperError) else error
        logger.error("plugin %s did not start: %s", name, told, exc_info=trace)

    async def withdraw(
        self, *registries: Resources | Operations | Middlewares | Authenticators | Routes
    ) -> None:
        """Let what failed plugins offer say so, take away what else they asked for, close them."""
        failed = {name for name, one in self._health.plugins.items() if one.status == "error"}
        for name in failed:
            for registry in registries:
                registry.fail(name)
        for scope in [one for one in reversed(self.scopes) if one.plugin_name in failed]:
            self.scopes.remove(scope)
            await scope.close()

    def _factory(self, entry: ModelEntry) -> BackendFactory:
        kind = entry.settings.backend
        if factory := self._kinds.get(kind):
            return factory
        failed = [name for name, status in self._health.plugins.items() if status.status == "error"]
        hint = f"; the plugins {', '.join(failed)} did not start" if failed else ""
        near = closest(kind, self._kinds)
        other = "; 'openai', with a baseUrl, is for all that speak OpenAI's protocol"
        hint = hint or (f"; did you mean '{near}'?" if near else other * ("openai" in self._kinds))
        known = ", ".join(sorted(self._kinds))
        message = f"{entry.where}.backend: expected one of {known}, got '{kind}'{hint}"
        raise ConfigError(message)

    def _import(self, plugin: Plugin) -> object:
        if plugin.name in self._given:
            return self._given[plugin.name]
        if path := plugin.options.get("path"):
            return import_file(plugin.name, (self._directory / str(path)).resolve())
        if plugin.name in BUILT_IN or plugin.options.get("package"):
            return import_package(plugin.name, plugin.module_name)
        for entry_point in importlib.metadata.entry_points(group="harperpy", name=plugin.name):
            found = entry_point.load()
            return found if isinstance(found, ModuleType) else sys.modules[found.__module__]
        near = closest(plugin.name, BUILT_IN)
        hint = f"; did you mean '{near}'?" if near else ""
        message = (
            f"config.yaml: plugins.{plugin.name}: expected the name of a built-in or installed "
            f"plugin, or 'path:' or 'package:' to say where it lives{hint}"
        )
        raise ConfigError(message)


def _named(plugins: Mapping[str, Any]) -> Iterator[Plugin]:
    """The plugins in order: the built-ins that are not named, then as config.yaml has them."""
    named = {name: True for name in BUILT_IN if name not in plugins} | dict(plugins)
    for name, options in named.items():
        if options is False:
            if name not in BUILT_IN and (near := closest(name, BUILT_IN, 0.75)):
                logger.warning("plugins.%s: false turns nothing off; did you mean %r?", name, near)
            continue
        given = cast("Mapping[str, Any]", options) if isinstance(options, Mapping) else None
        values: Mapping[str, Any] = given or {}
        timeout = values.get("timeout", _START_SECONDS * 1000)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            message = f"config.yaml: plugins.{name}.timeout: expected a positive number of ms"
            raise ConfigError(message)
        needed = values.get("required", False)
        if not isinstance(needed, bool):
            message = f"config.yaml: plugins.{name}.required: expected true or false"
            raise ConfigError(message)
        yield Plugin(name, values, timeout / 1000, needed)


def _order(config: Config, other: Config) -> list[str]:
    """In which order the one names the plugins that the other names too."""
    return [name for name in config.plugins if name in other.plugins]


def _made(factory: BackendFactory, entry: ModelEntry) -> ModelBackend:
    try:
        return factory(entry)
    except HarperError:
        raise
    except Exception as error:
        message = f"{entry.where}: {cause(error, entry.directory)}"
        raise ConfigError(message) from error


def _too_slow(plugin: Plugin, scope: Scope) -> TimeoutError:
    """What to say of a plugin that is out of time, and what of it still runs."""
    tasks = ", ".join(scope.pending)
    still = f"; its tasks that still run: {tasks}" if tasks else ""
    return TimeoutError(f"handle_application took more than {plugin.seconds:g} s{still}")
