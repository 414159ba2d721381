"""A parent that holds the ports and starts its server anew when a file of the project changes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from .banner import say
from .child import Child, end, start
from .ending import HARD_STOP, STOPS, Ending, heeded
from .errors import ConfigError
from .held import Held, Holder, data_root, places
from .sections import Config
from .serving import Serving

_LOOK_SECONDS = 0.3
_SETTLED_SECONDS = 0.05
_NO_PROJECT = {"__pycache__", "node_modules", "site-packages"}

Files = dict[Path, tuple[int, int, int]]


def look(directory: Path, root: Path) -> Files:
    """config.yaml and the Python files of a project, and what tells their versions apart."""
    data = root.resolve()
    found: Files = {}
    for folder, names, files in os.walk(directory):
        here = Path(folder)
        names[:] = [name for name in names if _is_project(here / name, data)]
        for name in files:
            if name.endswith(".py") or (here == directory and name == "config.yaml"):
                _note(here / name, found)
    return found


def _is_project(folder: Path, data: Path) -> bool:
    name = folder.name
    if name.startswith(".") or name in _NO_PROJECT or folder.resolve() == data:
        return False
    return not (folder / "pyvenv.cfg").exists()


def _note(file: Path, found: Files) -> None:
    try:
        stat = file.stat()
    except OSError:
        # It has just gone, or it points nowhere.
        return
    found[file] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def differing(before: Files, after: Files) -> list[Path]:
    """The files that changed, came or went."""
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


class Parent:
    """Keeps the ports and the data folder, and one child at a time."""

    def __init__(self, what: Serving, arguments: list[str]) -> None:
        self._what = what
        self._arguments = arguments
        self._holder = Holder()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._child: Child | None = None
        self._was_ready = False

    async def run(self) -> int:
        """Serve until a signal; the exit code. Raises `ConfigError` if the start is refused."""
        ending = Ending(self._stop.set, self._hurry.set)
        for number in heeded():
            asyncio.get_running_loop().add_signal_handler(number, ending.heard, number)
        self._stopping = asyncio.ensure_future(self._stop.wait())
        config = self._what.config()
        self._root = data_root(config, self._what.directory, self._what.root)
        self._seen = self._running = await self._look()
        self._held = self._hold(config)
        self._child = await self._start()
        code = None
        while code is None:
            code = await self._next()
        self._stopping.cancel()
        return code

    async def _next(self) -> int | None:
        """See to what happens first; an exit code if that is the end."""
        child = self._child
        waited: set[asyncio.Future[Any]] = {self._stopping}
        if child is not None:
            waited |= {child.ended, *(() if child.told else (child.ready,))}
        done, _ = await asyncio.wait(
            waited, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if self._stop.is_set():
            self._held.close_sockets()
            (code,) = await end([child], self._hurry) if child else [0]
            # All is done: one more of them would only spoil the exit code.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            return HARD_STOP if self._hurry.is_set() else code
        if child is not None and child.ended in done:
            return await self._lost(child)
        if child is not None and child.ready in done:
            await self._told(child)
            return None
        seen = await self._look()
        if seen != self._seen:
            await self._changed(child, seen)
        elif child is not None and child.told and child.wants_restart:
            child.wants_restart = False
            await self._restart("a plugin asked for it")
        return None

    async def _changed(self, child: Child | None, seen: Files) -> None:
        """Let the server take it over if it can, or start anew."""
        await self._settle(seen)
        if self._stop.is_set():
            return
        if child is not None and child.ready.done() and not child.told:
            await self._told(child)
        changed = differing(self._running, self._seen)
        only_config = changed == [self._what.directory / "config.yaml"]
        if only_config and child is not None and child.told and await child.takes_over():
            self._running = self._seen
        else:
            await self._restart(f"{self._names(changed)} changed")

    async def _told(self, child: Child) -> None:
        """A child is ready, unless it is about to have ended."""
        child.told = True
        if not child.ready.result():
            await child.ended
        elif self._was_ready:
            seconds = time.monotonic() - self._began
            say(f"restarted: {self._why} ({seconds:.1f} s)")
        else:
            self._was_ready = True

    async def _lost(self, child: Child) -> int | None:
        """A child ended by itself: for good, or until what is wrong with it is mended."""
        code = await child.stop()
        if code == 0 or not self._was_ready:
            return code
        self._child = None
        down = f"the server is down (exit code {code})"
        say(f"harperpy: {down} and waits for a file to change", err=True)
        return None

    async def _restart(self, why: str) -> None:
        """Start anew on the files as they are; if they cannot be read, all stays as it is."""
        self._began = time.monotonic()
        self._why = why
        try:
            config = self._what.config()
            _compile(differing(self._running, self._seen))
            self._held = self._hold(config)
        except ConfigError as error:
            say(f"harperpy: {error}", err=True)
            return
        self._running = self._seen
        if self._child is not None:
            await self._child.hand_over()
        self._child = None if self._stop.is_set() else await self._start()

    async def _start(self) -> Child:
        return await start(["dev", *self._arguments], self._held, first=not self._was_ready)

    def _hold(self, config: Config) -> Held:
        root = data_root(config, self._what.directory, self._what.root)
        held = self._holder.hold(root, places(config, dev=True))
        self._root = root
        return held

    async def _look(self) -> Files:
        return await asyncio.to_thread(look, self._what.directory, self._root)

    async def _settle(self, seen: Files) -> None:
        """Wait while more files are being written, unless a signal comes."""
        before: Files = {}
        while seen != before and not self._stop.is_set():
            before = seen
            await asyncio.sleep(_SETTLED_SECONDS)
            seen = await self._look()
        self._seen = seen

    def _names(self, changed: list[Path]) -> str:
        if not changed:
            return "a file"
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        return f"{changed[0].relative_to(self._what.directory)}{more}"


def _compile(files: list[Path]) -> None:
    """Raises `ConfigError` for a file that is no Python."""
    for file in files:
        if file.suffix != ".py" or not file.exists():
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        except SyntaxError as error:
            where = file if error.lineno is None else f"{file}:{error.lineno}"
            message = f"{where}: {error.msg}"
            raise ConfigError(message) from error
        except OSError as error:
            message = f"{file}: cannot be read: {error.strerror}"
            raise ConfigError(message) from error
        except (ValueError, RecursionError, MemoryError) as error:
            message = f"{file}: {str(error) or 'it is nested too deeply'}"
            raise ConfigError(message) from error
