"""Entries: the files of the project that a plugin handles, by pattern, and what happens to them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, Literal, TypeAlias, cast

import msgspec

from .errors import ConfigError

Event: TypeAlias = Literal["add", "change", "unlink", "add_dir", "unlink_dir"]
EVENTS: tuple[Event, ...] = ("add", "change", "unlink", "add_dir", "unlink_dir")
Segments: TypeAlias = tuple[str, ...]

_FILES = "a pattern, a list of patterns, or {source, ignore} with such"
# Not the project's own, unless a pattern names them.
_NO_PROJECT = ("__pycache__", "node_modules")


class FileEntry(msgspec.Struct, frozen=True):
    """What happened to a file or folder that a plugin handles.

    `path` is absolute; `stat` is None once it is gone.
    """

    event: Event
    kind: Literal["file", "directory"]
    path: Path
    url_path: str
    stat: os.stat_result | None

    @property
    def contents(self) -> bytes:
        """The file's bytes, read now."""
        return self.path.read_bytes()

    def differs(self, other: FileEntry) -> bool:
        """Whether the file was written between the two."""
        return self.kind == "file" and _version(self) != _version(other)


class Wanted(msgspec.Struct, frozen=True):
    """Which files: the patterns, what to leave out, and the URL path that all hang under."""

    source: tuple[Segments, ...]
    ignore: tuple[Segments, ...]
    base: str

    def scan(self, directory: Path, data: Path) -> dict[Path, FileEntry]:
        """What there is, folders before what they hold; the data folder is left out. Blocks."""
        found: dict[Path, FileEntry] = {}
        directory = directory.resolve()
        for pattern in self.source:
            for path in _walk(directory, pattern, data.resolve()):
                parts = path.relative_to(directory).parts
                ignored = any(matches(one, parts) for one in self.ignore)
                if path in found or ignored or not matches(pattern, parts):
                    continue
                # A link may lead out of the project, and so to what it keeps from others.
                if _is_within(path, directory):
                    inside = "/".join(parts[len(_prefix(pattern)) :])
                    _note(path, self.base + inside, found)
        return dict(sorted(found.items()))


class EntryHandler:
    """One listener, and the files that it was told of last."""

    def __init__(
        self, wanted: Wanted, listener: Callable[..., Any], events: Collection[str]
    ) -> None:
        self.wanted = wanted
        self.follows_options = False
        self.listener = listener
        self._events = events
        self._known: dict[Path, FileEntry] = {}

    async def look(self, directory: Path, data: Path) -> list[FileEntry]:
        """What happened since the last look; at the first one, what there is."""
        before = self._known
        self._known = await asyncio.to_thread(self.wanted.scan, directory, data)
        return list(happened(before, self._known))

    def takes(self, entry: FileEntry) -> bool:
        """Whether the listener is told of it."""
        return entry.event in self._events

    def misses(self, entry: FileEntry) -> bool:
        """Whether it should have been told; of folders only one that knows them."""
        folders = "add_dir" in self._events
        return not self.takes(entry) and (entry.kind == "file" or folders)


def wanted(files: object, url_path: object, plugin: str) -> Wanted:
    """The options `files` and `urlPath`. Raises `ConfigError` for what they cannot be."""
    where = f"plugins.{plugin}.files"
    source, ignore = files, ()
    if isinstance(files, dict):
        block = cast("dict[str, Any]", files)
        source, ignore = block.get("source"), block.get("ignore", ())
        if strange := block.keys() - {"source", "ignore"}:
            message = f"{where}.{min(strange)}: unknown key; the known keys are ignore, source"
            raise ConfigError(message)
    return Wanted(
        tuple(_patterns(source, where)),
        tuple(_patterns(ignore, f"{where}.ignore")) if ignore != () else (),
        url_base(url_path, plugin),
    )


def url_base(url_path: object, plugin: str) -> str:
    """What the URL paths begin with: `/` at both ends. Raises `ConfigError`."""
    if not isinstance(url_path, str | None) or ".." in (url_path or ""):
        message = f"plugins.{plugin}.urlPath: expected a URL path without '..', got {url_path!r}"
        raise ConfigError(message)
    path = url_path or "/"
    if path == "." or path.startswith("./"):
        path = f"{plugin}/{path[2:]}"
    inside = path.strip("/")
    return f"/{inside}/" if inside else "/"


def matches(pattern: Segments, parts: Segments) -> bool:
    """Whether a path is of a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(pattern[1:], parts[at:]) for at in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(pattern[1:], parts[1:])


def happened(before: dict[Path, FileEntry], after: dict[Path, FileEntry]) -> Iterator[FileEntry]:
    """What makes the one of the other; what is gone comes first, from the inside out."""
    kept = {
        path
        for path in before.keys() & after.keys()
        if (before[path].kind, before[path].url_path) == (after[path].kind, after[path].url_path)
    }
    for path, entry in reversed(before.items()):
        if path not in kept:
            gone: Event = "unlink" if entry.kind == "file" else "unlink_dir"
            yield msgspec.structs.replace(entry, event=gone, stat=None)
    for path, entry in after.items():
        if path not in kept:
            yield entry
        elif entry.differs(before[path]):
            yield msgspec.structs.replace(entry, event="change")


def _patterns(given: object, where: str) -> Iterator[Segments]:
    texts: Iterable[object] = cast("list[object]", given) if isinstance(given, list) else (given,)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            message = f"{where}: expected {_FILES}, got {text!r}"
            raise ConfigError(message)
        if text.startswith("/") or ".." in text:
            message = f"{where}: expected a pattern inside of the project, got {text!r}"
            raise ConfigError(message)
        if "{" in text:
            message = f"{where}: {text!r}: braces mean nothing here; write a list of patterns"
            raise ConfigError(message)
        segments = tuple(part for part in text.split("/") if part not in ("", "."))
        yield segments or ("**", "*")


def _prefix(pattern: Segments) -> Segments:
    """The folders that a pattern names before anything else."""
    folders = pattern[:-1]
    plain = (at for at, part in enumerate(folders) if any(sign in part for sign in "*?["))
    return folders[: next(plain, len(folders))]


def _walk(directory: Path, pattern: Segments, data: Path) -> Iterator[Path]:
    """What may be of a pattern: neither the data folder nor what is hidden, unless it is named."""
    top = directory.joinpath(*_prefix(pattern))
    for folder, names, files in os.walk(top):
        here = Path(folder)
        names[:] = [
            name
            for name in names
            if here / name != data and not (here / name / "pyvenv.cfg").exists()
            if _is_named(name, pattern) or not (name.startswith(".") or name in _NO_PROJECT)
        ]
        shown = (name for name in files if _is_named(name, pattern) or not name.startswith("."))
        yield from (here / name for name in (*names, *shown))
        if "**" not in pattern and len(here.relative_to(directory).parts) + 1 >= len(pattern):
            names.clear()


def _is_named(name: str, pattern: Segments) -> bool:
    dotted = (part for part in pattern if part.startswith("."))
    return name in pattern or any(fnmatchcase(name, part) for part in dotted)


def _is_within(path: Path, directory: Path) -> bool:
    try:
        return path.resolve().is_relative_to(directory)
    except (OSError, RuntimeError):
        # It leads to itself.
        return False


def _note(path: Path, url_path: str, found: dict[Path, FileEntry]) -> None:
    try:
        stat = path.stat()
    except OSError:
        # It has just gone, or it points nowhere.
        return
    if S_ISDIR(stat.st_mode):
        found[path] = FileEntry("add_dir", "directory", path, url_path, stat)
    elif S_ISREG(stat.st_mode):
        found[path] = FileEntry("add", "file", path, url_path, stat)


def _version(entry: FileEntry) -> tuple[int, int, int] | None:
    stat = entry.stat
    return None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino)
