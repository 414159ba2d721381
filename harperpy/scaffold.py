"""A new project: one of the repository's `examples/`, copied as it is."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from .errors import ConfigError

TEMPLATES = {
    "resource": "A resource with a typed contract, a chat route, a model.",
    "backend": "An OpenAI-compatible model made of a Python generator.",
    "plugin": "A package to publish, with options, a resource, an operation.",
    "rag": "Answers from your documents, streamed with citations.",
    "webhook": "Signed events from outside, kept once, worked off later.",
    "feed": "A live event feed whose readers lose nothing.",
}
"""Each template, and what it is in a few words; the first is the default."""
_IGNORED = ".gitignore"


def write_project(folder: Path, template: str) -> None:
    """Copy a template. Raises `ConfigError` if the folder holds anything already, or cannot.

    What is hidden, as a repository (.git) and an environment (.venv), may be there before.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(map(_is_in_the_way, folder.iterdir()))):
            message = f"{folder} exists and is not empty"
            raise ConfigError(message)
        # By its name, for its folder stands elsewhere in an editable installation.
        _copy(resources.files(f"{__package__}.templates") / template, folder)
    except OSError as error:
        message = f"cannot write into {folder}: {error.strerror}"
        raise ConfigError(message) from error


def _is_in_the_way(file: Path) -> bool:
    return file.name == _IGNORED or not file.name.startswith(".")


def _copy(source: Traversable, folder: Path) -> None:
    """All of it but what running the template where it stands has left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        hidden = item.name.startswith(".") and item.name != _IGNORED
        if hidden or item.name == "__pycache__":
            continue
        if item.is_dir():
            _copy(item, folder / item.name)
        else:
            (folder / item.name).write_bytes(item.read_bytes())
