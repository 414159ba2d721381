"""The user's `resources.py` beside config.yaml, loaded as it is.

A module with `handle_application(scope)` speaks for itself. Of any other, each public Resource
class defined in it is mounted at its `path`, or at its name; a `TableResource` gets its table.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from harperpy import RegistrationError, Resource, Scope, TableResource, closest

_FILE = "resources.py"


async def handle_application(scope: Scope) -> None:
    """Load the file, if there is one."""
    file = scope.directory / _FILE
    if not file.is_file():
        return
    # Of its own for each server, as two may serve one folder.
    name = f"harperpy_app_{id(scope):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    scope.on_close(lambda: _forget(name))
    spec.loader.exec_module(module)
    if (own := getattr(module, "handle_application", None)) is not None:
        waiting = own(scope)
        if waiting is not None:
            await waiting
        return
    functions = [name for name, value in vars(module).items() if callable(value)]
    if near := closest("handle_application", functions, 0.9):
        message = f"{_FILE}: '{near}' is no hook; did you mean 'handle_application'?"
        raise RegistrationError(message)
    for resource in _resources(module):
        if issubclass(resource, TableResource):
            resource = await resource.of(scope.database.tables)  # noqa: PLW2901  # the same, with its table
        scope.resources.set(resource.path or resource.__name__, resource)


def _forget(name: str) -> None:
    sys.modules.pop(name, None)


def _resources(module: ModuleType) -> list[type[Resource]]:
    public = getattr(module, "__all__", None)
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Resource)
        and value.__module__ == module.__name__
        and (name in public if public is not None else not name.startswith("_"))
    ]
    return list(dict.fromkeys(found))
