"""The hooks a plugin may implement: plain functions of these names in its module."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import pluggy

from .backend import ModelBackend
from .config import ModelConfig
from .routing import DEFAULT, Kind, is_pattern

if TYPE_CHECKING:
    from .scope import Scope

hookspec = pluggy.HookspecMarker("harperpy")
hookimpl = pluggy.HookimplMarker("harperpy")


class ModelEntry(msgspec.Struct, frozen=True):
    """One entry of `models:`: what a factory makes its backend from.

    `directory` is the application's, for relative paths; `offline` forbids all fetching.
    """

    kind: Kind
    name: str
    settings: ModelConfig
    directory: Path
    offline: bool = False

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


@hookspec
def register_model_backends(register: Callable[[str, BackendFactory], None]) -> None:
    """Called once on all plugins, before any model exists.

    Call `register(kind, factory)` for each `backend:` kind that `models:` in config.yaml may name.
    """


@hookspec
def handle_application(scope: Scope) -> Awaitable[None] | None:
    """Called once per plugin, in the order of config.yaml, each with a Scope of its own.

    Fill the registries here; they are frozen when all plugins are done. May be async. Must not
    serve requests, block, or reach for another plugin's scope.
    """
