"""What one process has at a time: a data folder's lock, and the sockets of the ports."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import msgspec

from .epoch import Epoch
from .errors import ConfigError
from .processors import keep_to
from .sections import Config

_DEV_HOSTS = ("127.0.0.1", "::1")
_RUN_HOSTS = ("0.0.0.0", "::")  # noqa: S104  # 'run' serves all interfaces, by contract
_NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
BACKLOG = 1024
_BRIEFLY = "briefly"
_BRIEF_SECONDS, _LOOK_SECONDS = 10.0, 0.02
SOCKET_NAME = "operations.sock"
LOCAL = "local"
"""What the socket of that name is called among those of the ports."""


class Place(msgspec.Struct, frozen=True):
    """Where a port is served, and the key of config.yaml that says so."""

    hosts: tuple[str, ...]
    port: int
    key: str


def places(config: Config, *, dev: bool) -> dict[str, Place]:
    """Where each port of a server is to be."""
    http, network = config.http, config.operations_api.network
    return {
        "rest": Place(_hosts(http.host, dev=dev), http.port, "http.port"),
        "operations": Place(
            _hosts(network.host, dev=True), network.port, "operationsApi.network.port"
        ),
    }


def port_taken(error: OSError, host: str, port: int, key: str) -> ConfigError:
    """Why a port cannot be served, in one sentence."""
    reason = "is in use" if error.errno == errno.EADDRINUSE else f"fails: {error}"
    return ConfigError(f"cannot listen on {host}:{port} ({key}): the port {reason}")


def no_such_family(error: OSError) -> bool:
    """Whether the machine lacks the kind of address."""
    return error.errno in _NO_SUCH_FAMILY


def data_root(config: Config, directory: Path, root: Path | None) -> Path:
    """The data folder: as asked for, else as configured, else in the project's folder."""
    return root or directory / (config.root_path or ".harperpy")


def lock_root(root: Path, *, briefly: bool = False) -> TextIO:
    """Make the folder and hold it for this process; the lock ends with it, however it ends.

    Who holds it `briefly`, as a command does, is waited for. Raises `ConfigError`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _close_to_others(root)
    except OSError as error:
        message = f"cannot use {root} as data folder: {error.strerror}"
        raise ConfigError(message) from error
    file = root / "harperpy.lock"
    try:
        lock = file.open("a+", encoding="utf-8")
        os.fchmod(lock.fileno(), 0o600)
        _lock(lock, root)
        lock.truncate(0)
        lock.write(f"{os.getpid()} {_BRIEFLY}" if briefly else f"{os.getpid()}")
        lock.flush()
    except OSError as error:
        message = f"cannot use {file}: {error.strerror}"
        raise ConfigError(message) from error
    return lock


def _close_to_others(root: Path) -> None:
    """Have the folder be its owner's alone. Raises `ConfigError` for one that all share.

    A volume may be somebody else's: it keeps its mode, and what is made there is closed by itself.
    """
    found = root.stat()
    own = found.st_uid == os.geteuid()
    shared = found.st_mode & stat.S_ISVTX and any(root.iterdir())
    if found.st_mode & stat.S_IWOTH and (shared or not own):
        message = f"cannot use {root} as data folder: others write there too; name a folder in it"
        raise ConfigError(message)
    if own:
        root.chmod(0o700)


def _lock(lock: TextIO, root: Path) -> None:
    deadline = time.monotonic() + _BRIEF_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder, _, how = lock.read().strip().partition(" ")
            # Who has just taken it may not have said yet who it is.
            if (how == _BRIEFLY or not holder) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
                continue
            lock.close()
            who = f"another harperpy (process {holder or 'unknown'})"
            message = f"{who} already uses the data folder {root}"
            raise ConfigError(message) from error
        return


class Worker(msgspec.Struct, frozen=True):
    """Which of how many processes on the same ports; `memory` is the file of their epoch.

    `processors` are what all of them may use, where the loop of each keeps to one.
    """

    index: int = 0
    of: int = 1
    memory: int = -1
    processors: tuple[int, ...] = ()

    def share_out(self) -> None:
        """From now on what is given to a thread by the loop may run on all processors."""
        if self.processors:
            pool = ThreadPoolExecutor(
                thread_name_prefix="asyncio", initializer=keep_to, initargs=self.processors
            )
            asyncio.get_running_loop().set_default_executor(pool)

    @property
    def own(self) -> tuple[int, ...]:
        """The one that the loop of this process keeps to, if it does."""
        return self.processors[self.index : self.index + 1]

    def settle(self) -> None:
        """Have this thread, which is the loop's, keep to its processor."""
        keep_to(*self.own)

    def epoch(self) -> Epoch:
        """The epoch of them all; the slot after the last worker's is their parent's."""
        return Epoch() if self.memory < 0 else Epoch(self.of + 1, self.index, self.memory)


class Held:
    """The lock and the listening sockets that a parent keeps while its children come and go.

    `first` is whether the process may make what the data folder lacks.
    """

    def __init__(
        self,
        lock: TextIO,
        sockets: Mapping[str, list[socket.socket]],
        worker: Worker = Worker(),  # noqa: B008  # frozen
        *,
        first: bool = True,
    ) -> None:
        self.first = first
        self.lock = lock
        self.sockets = dict(sockets)
        self.worker = worker

    @property
    def numbers(self) -> dict[str, list[int]]:
        """The file descriptors, as `inherit` takes them."""
        found = {name: [one.fileno() for one in many] for name, many in self.sockets.items()}
        return {"lock": [self.lock.fileno()], **found}

    def close(self) -> None:
        """Let go of all."""
        self.close_sockets()
        self.lock.close()

    def leave_queues(self) -> None:
        """Nobody waits any more for a worker that cannot start, until it listens by itself."""
        if sys.platform != "linux":
            # The queue is everybody's.
            return
        for many in (many for name, many in self.sockets.items() if name != LOCAL):
            for at, one in enumerate(many):
                many[at] = _bound(one.family, one.getsockname(), socket.SO_REUSEPORT)
                one.close()

    def close_sockets(self) -> None:
        """From now on a new connection is refused."""
        for one in (one for many in self.sockets.values() for one in many):
            one.close()


class Holder:
    """Holds what a configuration asks for; what the next one asks for too is kept."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._places: dict[str, Place] = {}
        self._held: Held | None = None

    def hold(self, root: Path, wanted: Mapping[str, Place]) -> Held:
        """The lock and the sockets for this. Raises `ConfigError`, and then nothing changed."""
        before = self._held
        taken = [] if before and root == self._root else [lock_root(root)]
        lock = taken[0] if taken else before.lock if before else lock_root(root)
        kept = before.sockets if before else {}
        fresh: dict[str, list[socket.socket]] = {}
        try:
            for name, place in wanted.items():
                if name not in kept or self._places[name] != place:
                    fresh[name] = listen(place)
        except ConfigError:
            Held(lock, fresh).close() if taken else _close(fresh.values())
            raise
        _close(many for name, many in kept.items() if name in fresh)
        if before and taken:
            before.lock.close()
        self._root, self._places = root, dict(wanted)
        self._held = Held(lock, {**kept, **fresh})
        return self._held


def hold(root: Path, wanted: Mapping[str, Place], count: int) -> list[Held]:
    """The lock, and what each of so many workers listens on. Raises `ConfigError`."""
    held = [Held(lock, {}) for lock in [lock_root(root)] * count]
    try:
        for name, place in wanted.items():
            for one, sockets in zip(held, listen_apart(place, count), strict=True):
                one.sockets[name] = sockets
        local = local_socket(root)
    except ConfigError:
        for one in held:
            one.close()
        raise
    for one in held:
        one.sockets[LOCAL] = [local]
    return held


def inherit(numbers: Mapping[str, list[int]], worker: Worker, *, first: bool) -> Held:
    """What a parent holds, in its child; the child's own children get none of it."""
    memory = [worker.memory] if worker.memory >= 0 else []
    for number in (*memory, *(number for many in numbers.values() for number in many)):
        os.set_inheritable(number, False)  # noqa: FBT003  # takes no keyword
    (lock,) = numbers["lock"]
    sockets = {
        name: [socket.socket(fileno=number) for number in many]
        for name, many in numbers.items()
        if name != "lock"
    }
    return Held(os.fdopen(lock, "a+", encoding="utf-8"), sockets, worker, first=first)


def listen(place: Place) -> list[socket.socket]:
    """A socket for each host; a second one is left out where the machine lacks its family."""
    made: list[socket.socket] = []
    port = place.port
    for host in place.hosts:
        try:
            made.append(_listening(*_address(host, port)))
        except OSError as error:
            if no_such_family(error) and host != place.hosts[0]:
                continue
            _close([made])
            raise port_taken(error, host, port, place.key) from error
        port = made[0].getsockname()[1]
    return made


def try_places(wanted: Mapping[str, Place], taken: Collection[int]) -> None:
    """Raises `ConfigError` where one cannot be had; the ports `taken` are as good as had."""
    for place in wanted.values():
        if place.port not in taken:
            _close([listen(place)])


def listen_apart(place: Place, count: int) -> list[list[socket.socket]]:
    """As `listen`, for each of so many processes; a connection comes to one of them."""
    first = listen(place)
    if sys.platform != "linux":
        # SO_REUSEPORT spreads nothing there: they take from one queue.
        return [first] * count
    apart = [first, *([] for _ in range(1, count))]
    try:
        for one, twins in ((one, twins) for twins in apart[1:] for one in first):
            # Not before it was bound alone: who has the port already may have this set too.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            twins.append(_listening(one.family, one.getsockname(), socket.SO_REUSEPORT))
    except OSError as error:
        _close(apart)
        raise port_taken(error, place.hosts[0], place.port, place.key) from error
    return apart


def local_socket(root: Path) -> socket.socket:
    """The socket for who works on this machine in the owner's name. Raises `ConfigError`."""
    path = root / SOCKET_NAME
    if _answers(path):
        message = (
            f"another harperpy, whose harperpy.lock is gone, already uses the data folder {root}"
        )
        raise ConfigError(message)
    path.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX)
    # Nobody else may connect, from the moment it exists.
    before = os.umask(0o177)
    try:
        one.bind(str(path))
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        message = f"cannot listen on {path}: {error}"
        raise ConfigError(message) from error
    finally:
        os.umask(before)
    one.settimeout(0)
    return one


def _answers(path: Path) -> bool:
    """Whether somebody listens there; who was killed leaves the socket behind."""
    with socket.socket(socket.AF_UNIX) as one:
        # More may wait there than are let in.
        one.settimeout(0)
        try:
            one.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def _listening(family: int, address: Any, *options: int) -> socket.socket:
    one = _bound(family, address, *options)
    try:
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _bound(family: int, address: Any, *options: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            one.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.settimeout(0)
    except OSError:
        one.close()
        raise
    return one


def _address(host: str, port: int) -> tuple[int, Any]:
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    family, *_, address = socket.getaddrinfo(host, port, type=kind, flags=passive)[0]
    return family, address


def _close(sockets: Iterable[list[socket.socket]]) -> None:
    for one in (one for many in sockets for one in many):
        one.close()


def _hosts(given: str | None, *, dev: bool) -> tuple[str, ...]:
    default = _DEV_HOSTS if dev else _RUN_HOSTS
    return default if given is None else _DEV_HOSTS if given == "localhost" else (given,)
