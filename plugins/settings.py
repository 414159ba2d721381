"""Settings: `set_configuration` changes config.yaml, for the next start."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO, cast

import msgspec
import sqlalchemy as sa

from harperpy import (
    ClientError,
    Config,
    ConfigError,
    Conflict,
    Deed,
    Scope,
    load_config,
    redacted,
)

from .trial import trouble
from .yaml_edit import edited

_SECRET = re.compile(r"key$|token$|secret$|password$", re.IGNORECASE)
_MOST_LEVELS = 32
# What stands there may be well written, and yet nothing to start with.
_TRIED = {"models", "plugins", "limits"}
_DONE = (
    "Configuration successfully set. You must restart harperpy for new config settings to take "
    "effect."
)


class SetConfiguration(msgspec.Struct):
    """Keys of config.yaml and their values: `logging_level`, `http.maxBodySize`."""

    rest: ClassVar[str] = "keys"

    keys: dict[str, Any]


def add_operations(scope: Scope) -> None:
    """Offer it to super users."""
    scope.operations.add("set_configuration", Settings(scope).set, SetConfiguration)


class Settings:
    """The file, one change at a time."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._path = scope.config_file_path
        self._turn = asyncio.Lock()

    async def set(self, request: SetConfiguration) -> str:
        """Write these keys to config.yaml, if a server could start with it."""
        if not request.keys:
            message = "keys: expected some of config.yaml, such as logging_level"
            raise ClientError(message)
        paths = {key: _path(key) for key in request.keys}
        for key, path in paths.items():
            _check(key, path, request.keys[key])
        changes = [(paths[key], value) for key, value in request.keys.items()]
        # Who waits for the file has a thread: more of them would leave none to who holds it.
        async with self._turn:
            with await asyncio.to_thread(self._lock):
                await self._change(changes)
        self._scope.request_restart("config.yaml has changed")
        return _DONE

    async def _change(self, changes: list[tuple[tuple[str, ...], Any]]) -> None:
        deed = Deed("config.yaml")
        try:
            change = await asyncio.to_thread(self._prepare, changes)
        except OSError as error:
            message = f"{self._path.name} cannot be written: {error.strerror}"
            raise Conflict(message) from error
        try:
            # First of all the audit's row: there is never a change without one.
            await self._scope.database.run(partial(change.note, deed))
            _put(change.file, self._path.resolve())
        finally:
            change.file.unlink(missing_ok=True)

    def _lock(self) -> TextIO:
        """One change at a time, whichever worker makes it; closing it lets the next one in."""
        lock = (self._scope.root / "config.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def _prepare(self, changes: list[tuple[tuple[str, ...], Any]]) -> _Change:
        """The new file, beside the old. Raises `ClientError` if no server could start with it."""
        path = self._path.resolve()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if path.exists():
            # Another could take its place where it may not be written itself.
            path.open("ab").close()
        before = redacted(load_config(path, os.environ))
        for keys, value in changes:
            text = edited(text, keys, value)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".config-", suffix=".yaml")
        file = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            after = redacted(_checked(file))
            if _TRIED & {keys[0] for keys, _ in changes}:
                self._try(file)
            if path.exists():
                file.chmod(path.stat().st_mode)
        except BaseException:
            file.unlink()
            raise
        names = [".".join(keys) for keys, _ in changes]
        old = {name: _at(before, name) for name in names}
        return _Change(file, old, {name: _at(after, name) for name in names})

    def _try(self, file: Path) -> None:
        """Raises `ClientError` if no server could start with what the file says."""
        if told := trouble(file, self._scope.directory):
            message = f"config file validation error: {told.removeprefix('config.yaml: ')}"
            raise ClientError(message)


class _Change(NamedTuple):
    """A file that is to take the place of config.yaml, and what is other in it."""

    file: Path
    before: dict[str, Any]
    after: dict[str, Any]

    def note(self, deed: Deed, connection: sa.Connection) -> None:
        deed.note(connection, "update", *self.after, before=self.before, after=self.after)


def _put(file: Path, path: Path) -> None:
    """Have a file take another's place; one that is mounted by itself is written where it is."""
    try:
        file.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        path.write_bytes(file.read_bytes())


def _checked(path: Path) -> Config:
    try:
        return load_config(path, os.environ)
    except ConfigError as error:
        told = str(error).replace(f"{path}: ", "")
        message = f"config file validation error: {told}"
        raise ClientError(message) from error


def _path(key: str) -> tuple[str, ...]:
    """The path of a key: as config.yaml has it, with dots, or in words of any case."""
    if "." in key:
        return tuple(key.split("."))
    known = {_letters("".join(path)): path for path in _paths(Config)}
    if (found := known.get(_letters(key))) is None:
        message = f"{key}: no key of config.yaml; expected one such as logging_level or http.port"
        raise ClientError(message, param=key)
    return found


def _paths(kind: type[msgspec.Struct], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field in msgspec.structs.fields(kind):
        path = (*above, field.encode_name)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _paths(field.type, path)
        else:
            yield path


def _letters(name: str) -> str:
    return re.sub("[-_.]", "", name).lower()


def _check(key: str, path: tuple[str, ...], value: Any) -> None:
    """Refuse what would let an operation run other code, or read the environment."""
    if not all(path):
        message = f"{key}: expected names with dots between them"
        raise ClientError(message, param=key)
    if not _is_plain(value):
        message = f"{key}: expected what JSON can say, in at most {_MOST_LEVELS} levels"
        raise ClientError(message, param=key)
    if path[0] == "plugins" and {"path", "package"} & {*path[2:], *_keys(value)}:
        message = f"{key}: where a plugin's code lives is said in the file alone"
        raise ClientError(message, status=403, param=key)
    given = (name for name, text in _texts(path[-1], value) if "${" in text)
    if any(_SECRET.search(name) is None for name in given):
        message = f"{key}: a variable of the environment is for keys that hold a secret"
        raise ClientError(message, status=403, param=key)


def _is_plain(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Whether it is of JSON's kinds, and not nested too deeply to be written."""
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value)
        return all(isinstance(key, str) for key in pairs) and _is_plain([*pairs.values()], levels)
    if isinstance(value, list):
        return levels > 0 and all(_is_plain(one, levels - 1) for one in cast("list[object]", value))
    return value is None or isinstance(value, str | int | float)


def _keys(value: Any) -> Iterator[str]:
    """All keys within a value."""
    if isinstance(value, Mapping):
        for key, one in cast("Mapping[str, Any]", value).items():
            yield key
            yield from _keys(one)


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """All texts within a value, each with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, one in cast("Mapping[str, Any]", value).items():
            yield from _texts(name, one)
    elif isinstance(value, list):
        for one in cast("list[object]", value):
            yield from _texts(key, one)


def _at(tree: Any, name: str) -> Any:
    for step in name.split("."):
        tree = cast("Mapping[str, Any]", tree).get(step) if isinstance(tree, Mapping) else None
    return tree
