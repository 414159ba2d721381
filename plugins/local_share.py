"""Which of the processes on one data folder runs a model's child, and where it answers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from pathlib import Path

import msgspec

from .llama_child import Endpoint

logger = logging.getLogger("harperpy.plugins.local")


class Told(msgspec.Struct, frozen=True):
    """How the model is, as the process that runs the child lets the others know."""

    state: str = "is loading"
    is_hopeless: bool = False
    endpoint: Endpoint | None = None


class Share:
    """A lock that one process holds, and a file beside it that says how its child is.

    Where the folder is missing or cannot be written nothing is shared, and each process runs a
    child of its own: that costs memory, where waiting for a folder would cost the answers.
    """

    def __init__(self, root: Path | None, model: str) -> None:
        name = f"local-{hashlib.sha256(model.encode()).hexdigest()[:16]}"
        self._file = (root or Path()).absolute() / f"{name}.json"
        self._lock: int | None = None
        self._is_alone = root is None
        self._leads = False

    @property
    def runs_here(self) -> bool:
        """Whether the child is this process's to run."""
        return self._leads or self._is_alone

    def take(self) -> bool:
        """Take over what nobody runs. False while another process does."""
        try:
            if self._lock is None:
                path = self._file.with_suffix(".lock")
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self._be_alone(error)
            return True
        self._leads = True
        return True

    def read(self) -> Told | None:
        """What was told last; None while nothing is."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Told)
        except (OSError, msgspec.DecodeError):
            return None

    def tell(self, told: Told) -> None:
        """Let the others know, if this process is the one to do so."""
        if not self._leads:
            return
        part = self._file.with_suffix(".part")
        try:
            number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(number, "wb") as file:  # noqa: PTH123  # a Path is opened with no mode
                file.write(msgspec.json.encode(told))
            part.replace(self._file)
        except OSError as error:
            self._be_alone(error)

    def close(self) -> None:
        """Withdraw what was told, and let another process take over."""
        if self._leads:
            with contextlib.suppress(OSError):
                self._file.unlink()
        self._leads = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _be_alone(self, error: OSError) -> None:
        logger.warning(
            "%s cannot be used (%s): this process runs a local model of its own",
            self._file.parent,
            error.strerror,
        )
        self.close()
        self._is_alone = True
