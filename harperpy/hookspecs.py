"""The hooks a plugin may implement: plain functions of these names in its module.

A plugin that needs others says so beside them: `requires = ["users"]`, by their names in
config.yaml. It starts after them, and not at all if one of them did not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import pluggy

from .backend import ModelBackend
from .errors import RegistrationError
from .routing import DEFAULT, Kind, is_pattern
from .sections import ModelConfig
from .spelling import closest

if TYPE_CHECKING:
    from .scope import Scope

hookspec = pluggy.HookspecMarker("harperpy")
hookimpl = pluggy.HookimplMarker("harperpy")
"""Marks a hook for readers and checkers; a function of a hook's name needs it not."""

HOOKS = ("handle_application", "register_model_backends")
# Only a slip of the keys is meant for a hook: `register_backends` may be a function of one's own.
_MISSPELT = 0.9


class ModelEntry(msgspec.Struct, frozen=True):
    """One entry of `models:`: what a factory makes its backend from.

    `directory` is the application's, for relative paths; `offline` forbids all fetching. `root` is
    the data folder, which several processes may serve at once. `processors` are what they may all
    use where each keeps to one, as do the threads and processes that it starts: a backend gives
    its own `os.sched_setaffinity(pid, processors)`.
    """

    kind: Kind
    name: str
    settings: ModelConfig
    directory: Path
    offline: bool = False
    root: Path | None = None
    processors: tuple[int, ...] = ()

    @property
    def is_general(self) -> bool:
        """Whether the name is no model's own: `default`, or a pattern."""
        return self.name == DEFAULT or self.is_pattern

    @property
    def is_pattern(self) -> bool:
        """Whether the name stands for many (`gpt-*`)."""
        return is_pattern(self.name)

    @property
    def where(self) -> str:
        """The entry's place in config.yaml, for messages."""
        return f"config.yaml: models.{self.kind}.{self.name}"


BackendFactory: TypeAlias = Callable[[ModelEntry], ModelBackend]
"""Makes the backend of an entry; raises `ConfigError` for one that it cannot serve."""


@hookspec
def register_model_backends(register: Callable[[str, BackendFactory], None]) -> None:
    """Called once on all plugins, before any model exists.

    Call `register(kind, factory)` for each `backend:` kind that `models:` in config.yaml may name.
    """


@hookspec
def handle_application(scope: Scope) -> Awaitable[None] | None:
    """Called once per plugin, each with a Scope of its own, in the order of config.yaml.

    Fill the registries here; they are frozen when all plugins are done. May be async. Must not
    serve requests, block, or reach for another plugin's scope.
    """


def check_hooks(plugin: object, implemented: Collection[str]) -> None:
    """Raises `RegistrationError` for a plugin with a misspelt hook, or with none."""
    has_hook = any(hook in implemented for hook in HOOKS)
    free = [hook for hook in HOOKS if hook not in implemented]
    for name in dir(plugin):
        if name.startswith("_") or name in HOOKS:
            continue
        near = closest(name, free, _MISSPELT if has_hook else 0.6)
        if near and callable(getattr(plugin, name, None)):
            message = f"'{name}' is no hook; did you mean '{near}'?"
            raise RegistrationError(message)
    if not has_hook:
        message = f"it defines neither '{HOOKS[0]}' nor '{HOOKS[1]}': there is nothing to call"
        raise RegistrationError(message)


def check_began(given: object) -> None:
    """Raises `RegistrationError` for a hook that gave what nobody steps: it has done nothing."""
    # A function that `contextlib` makes a context manager of gives its generator in one.
    if isinstance(getattr(given, "gen", given), AsyncGenerator | Generator):
        message = (
            f"'{HOOKS[0]}' yields, and so nothing of it has run: what is to be done at the end "
            "goes to scope.on_close, or `await scope.enter(manager)` enters and leaves it"
        )
        raise RegistrationError(message)
