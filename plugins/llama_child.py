"""The supervised child that runs the local model: started, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from logging import Logger
from pathlib import Path
from typing import IO

import msgspec

from harperpy import ModelUnavailable

_WORKER = Path(__file__).with_name("llama_worker.py")
_START_SECONDS = 120.0
_STOP_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0
_STEADY_SECONDS = 10.0


class ChildSettings(msgspec.Struct, kw_only=True):
    """What the worker is told; `context` is in tokens and shared by the `slots`.

    Without `processors` it may run on those of its parent.

    llama.cpp notices that a caller has left once per batch of a prompt: with 32 tokens within half
    a second on one slow thread, for which a prompt is read a third slower than with 64.
    """

    path: str
    alias: str
    api_key: str = ""
    context: int = 8192
    slots: int = 4
    batch: int = 32
    threads: int = 1
    most_tokens: int = 1024
    chat_template: str | None = None
    embedding: bool = False
    processors: tuple[int, ...] = ()


class Endpoint(msgspec.Struct, frozen=True):
    """Where the child answers, and the key it asks for."""

    url: str
    api_key: str


class Child:
    """Keeps one worker running. `changed` is told itself and each new endpoint, and None."""

    def __init__(
        self,
        settings: ChildSettings,
        changed: Callable[[Child, Endpoint | None], None],
        logger: Logger,
    ) -> None:
        self._settings = settings
        self._changed = changed
        self._logger = logger
        self._process: Process | None = None
        self.state = "is loading"
        self.failed = False

    async def run(self) -> None:
        """Start the worker, and start it again whenever it ends, ever more slowly if it must."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            try:
                reason = await self._life()
            except OSError as error:
                # No process, file or memory is left for it now; there may be later.
                reason = f"it cannot be started ({error.strerror})"
            if loop.time() - started > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            self.failed = self.state != "ready"
            self.state = f"does not run: {reason}" if self.failed else "is starting again"
            self._changed(self, None)
            self._logger.error("the local model's process ended: %s", reason)
            await asyncio.sleep(pause)
            pause = min(pause * 3, _LONGEST_PAUSE)

    async def close(self) -> None:
        """End the worker: its stdin closes, and if that is not enough it is killed."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def _life(self) -> str:
        """One life of the worker; why it ended."""
        with tempfile.TemporaryFile() as errors:
            status = await self._once(errors)
            return _tail(errors) or f"status {status}"

    async def _once(self, errors: IO[bytes]) -> int:
        """One life of the worker, from its start to its end; its exit status."""
        key = secrets.token_urlsafe(24)
        settings = msgspec.structs.replace(self._settings, api_key=key)
        # -P: the worker's folder holds modules that could stand in for a library's.
        command = (sys.executable, "-P", str(_WORKER))
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=errors or DEVNULL
        )
        self._process = process
        try:
            if url := await _address(process, settings):
                self.state, self.failed = "ready", False
                self._changed(self, Endpoint(f"{url}/v1", key))
            elif process.returncode is None:
                process.kill()
            return await process.wait()
        finally:
            self._changed(self, None)
            await self.close()


async def _address(process: Process, settings: ChildSettings) -> str | None:
    """Tell the worker what to serve, and read where it does; None if it ends without a word."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        async with asyncio.timeout(_START_SECONDS):
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
    except (TimeoutError, ConnectionError):
        return None
    return str(msgspec.json.decode(line)["turns"]) if line else None


def _tail(errors: IO[bytes]) -> str:
    """The last line that says something: a Python error's, or llama.cpp's own."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read()[-4000:].decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]


def threads() -> int:
    """One less than the cores: llama.cpp's threads spin, and the gateway needs one too."""
    return max(1, (os.cpu_count() or 1) - 1)


def lacking_cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the prebuilt llama.cpp needs of an x86 processor and this one has not."""
    try:
        flags = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return []
    line = next((line for line in flags.splitlines() if line.startswith("flags")), None)
    if line is None:
        return []
    return [name for name in ("avx2", "fma", "f16c", "bmi2") if name not in line.split()]


def unavailable(reason: str) -> ModelUnavailable:
    """The refusal while the model cannot answer."""
    return ModelUnavailable(reason, headers={"Retry-After": "2"})
