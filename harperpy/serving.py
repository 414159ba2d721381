"""One process that serves a project until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from .accounting import current_caller
from .banner import banner, http_url, ready, say
from .config import load_config
from .ending import AGAIN, STOPS, WHERE, Ending, alone, heeded
from .errors import ConfigError
from .held import Worker, inherit
from .secret import mask_bare
from .sections import Config
from .server import Server

# A child's words, then its parent's.
READY, TAKEN, RESTART, ALIVE = b"r", b"t", b"n", b"a"
# What it is asked; ALIVE is its own answer.
HAND_OVER, CONFIG = b"h", b"c"
# A request makes few cycles, and a look for them takes as long as several requests.
_GARBAGE = 50_000
_LONGEST_LINE = 8000
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class Inherited(msgspec.Struct):
    """What a child is given: descriptors, whether its start is the first one, and its place."""

    control: int
    numbers: dict[str, list[int]]
    first: bool
    worker: Worker


class Serving(msgspec.Struct, frozen=True):
    """What is served: the command's own words."""

    directory: Path
    root: Path | None
    dev: bool
    offline: bool
    version: str

    def config(self) -> Config:
        """The project's config.yaml."""
        return load_config(self.directory / "config.yaml", os.environ)


async def serve(what: Serving, inherited: Inherited | None = None) -> bool:
    """Serve until a signal, or a parent, ends it; whether it is to be started again."""
    stop = asyncio.Event()
    ending = _listen(stop, by_itself=inherited is None)
    # A parent blocks them until somebody is there to hear.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    parent = _Parent(inherited.control, stop) if inherited else None
    config = what.config()
    _log(config, dev=what.dev)
    held = None
    if inherited is not None:
        # In dev a changed config.yaml may name another data folder.
        first = inherited.first or what.dev
        held = inherit(inherited.numbers, inherited.worker, first=first)
        held.worker.share_out()
    server = Server(
        config,
        directory=what.directory,
        root=what.root,
        dev=what.dev,
        offline=what.offline,
        held=held,
    )
    if not await _before(stop, server.start()):
        return ending.again
    try:
        # First of all: who reads the banner may change a file at once, and that is a restart.
        if parent and what.dev:
            parent.ready(lambda: _takes_over(server, what))
            server.health.on_restart = parent.restart
        else:
            serving = os.getppid() if parent else os.getpid()
            server.health.on_order = lambda: os.kill(serving, AGAIN)
        # A configuration that names another data folder may make its first start here.
        if inherited is None or inherited.first or server.first_start:
            say(banner(server, what.version))
            if not parent or what.dev:
                say(ready(http_url(server)))
        if held is not None:
            # Not before: threads that are there by now may run anywhere.
            held.worker.settle()
        if parent and not what.dev:
            parent.ready(lambda: False)
        _spare_the_collector()
        await stop.wait()
    finally:
        await server.stop(hand_over=parent is not None and parent.takes_over)
    return ending.again


def _spare_the_collector() -> None:
    """What the start has made stays for good: it is not looked through again and again."""
    gc.freeze()
    gc.set_threshold(_GARBAGE)


def _listen(stop: asyncio.Event, *, by_itself: bool) -> Ending:
    """Hear the signals. Who has a parent is ended by it, by force if it must be."""
    loop, stops = asyncio.get_running_loop(), heeded()
    for number in stops:
        loop.add_signal_handler(number, stop.set)
    ending = alone()
    if by_itself:
        loop.add_signal_handler(AGAIN, stop.set)
        for number in (*stops, AGAIN):
            # The loop still hears of them: it reads what Python writes for it.
            signal.signal(number, ending.heard)
    return ending


def _takes_over(server: Server, what: Serving) -> bool:
    """Whether the server uses the changed config.yaml without a new start."""
    try:
        changed = server.take_over(what.config())
    except ConfigError:
        # Whoever starts anew says what is wrong.
        return False
    if changed:
        say(f"taken over: {', '.join(changed)}")
    return bool(changed)


class _Parent:
    """The parent's end of a line.

    It says that config.yaml changed, or that it takes over; its silence means that it is dead.
    """

    def __init__(self, control: int, stop: asyncio.Event) -> None:
        self.takes_over = False
        self._line = socket.socket(fileno=control)
        self._line.set_inheritable(False)
        self._loop = asyncio.get_running_loop()
        self._heard: dict[bytes, Callable[[], object]] = {
            HAND_OVER: stop.set,
            CONFIG: self._config_changed,
            ALIVE: self._alive,
        }
        # For who hangs, and cannot say it otherwise.
        faulthandler.register(WHERE)
        # No task: it must hear while the project's code keeps the loop busy.
        threading.Thread(target=self._hear, daemon=True, name="harperpy-parent").start()

    def ready(self, takes_over: Callable[[], bool]) -> None:
        """Say that connections are taken; `takes_over` is asked when config.yaml changed."""
        self._takes_over = takes_over
        self._line.send(READY)

    def restart(self) -> None:
        """Ask for a new start."""
        self._line.send(RESTART)

    def _config_changed(self) -> None:
        self._line.send(TAKEN if self._takes_over() else RESTART)

    def _alive(self) -> None:
        self._line.send(ALIVE)

    def _hear(self) -> None:
        # A line whose other end had something left to read is reset, not ended.
        with contextlib.suppress(ConnectionResetError):
            while word := self._line.recv(1):
                self.takes_over = word == HAND_OVER
                self._loop.call_soon_threadsafe(self._heard[word])
        # The parent was killed, and so is its server: the signal goes no further than here.
        os.kill(os.getpid(), signal.SIGKILL)


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before the stop, which cancels it."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (working, stopping):
        task.cancel()
    await asyncio.wait((working, stopping))
    if working in done:
        working.result()
    return working in done


class _WithRequestId(logging.Filter):
    """Gives each line the id of the request it was written in."""

    def filter(self, record: logging.LogRecord) -> bool:
        caller = current_caller.get()
        record.request_id = (caller.request_id if caller else None) or "-"
        return True


class _Masked(logging.Formatter):
    """Keeps keys out of the log, whoever's exception they stand in, and a message on its line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        text = super().formatMessage(record)
        if len(text) > _LONGEST_LINE:
            # Half a word might be half of a secret.
            text = f"{text[:_LONGEST_LINE].rpartition(' ')[0]} [...]"
        # What a client sends stands in messages, too: it begins no line and moves no cursor.
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)

    def format(self, record: logging.LogRecord) -> str:
        return mask_bare(super().format(record))


def _log(config: Config, *, dev: bool) -> None:
    level = (config.logging.level or ("info" if dev else "warn")).upper()
    handler = logging.StreamHandler() if config.logging.std_streams else logging.NullHandler()
    handler.addFilter(_WithRequestId())
    line = "%(asctime)s %(levelname)s %(request_id)s %(name)s: %(message)s"
    handler.setFormatter(_Masked(line))
    logging.basicConfig(level={"WARN": "WARNING"}.get(level, level), handlers=[handler])
