"""Importing: a plugin's module, by its dotted name or from a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import ConfigError


def import_package(plugin: str, module_name: str) -> ModuleType:
    """A plugin's module. Raises `ConfigError` where there is none of that name."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name != error.name:
            raise
        message = f"config.yaml: plugins.{plugin}.package: no module is called '{error.name}'"
        raise ConfigError(message) from error


def import_file(name: str, path: Path) -> ModuleType:
    """A module from a file, or a package from a folder, under a name of its own."""
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        message = f"config.yaml: plugins.{name}.path: expected a Python file or package at {path}"
        raise ConfigError(message)
    unique = f"harperpy_plugin_{name}_{abs(hash(file))}"
    places = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(unique, file, submodule_search_locations=places)
    if spec is None or spec.loader is None:
        message = f"config.yaml: plugins.{name}.path: {path} is not a Python file"
        raise ConfigError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module
