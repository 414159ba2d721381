"""A server in a process of its own, which its parent starts, hears from and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Sequence

import msgspec

from .ending import END_SECONDS, STOPS, WHERE, cut_off
from .held import Held
from .serving import ALIVE, CONFIG, HAND_OVER, READY, RESTART, TAKEN, Inherited

# A server that is still there so long after it was asked to hand over hangs.
_HANG_SECONDS = 3.0
# What it takes to write where all threads are.
_TELL_SECONDS = 1.0
_COMMAND = "from harperpy.cli import main; main(prog_name='harperpy')"


class Child:
    """One server process, and the line to it."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self.pid = process.pid
        self._line = line
        self.ended = asyncio.ensure_future(process.wait())
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.told = False
        self.wants_restart = False
        self._answer: asyncio.Future[bytes] | None = None
        self._hearing = asyncio.ensure_future(self._hear())
        self.began = time.monotonic()

    async def takes_over(self) -> bool:
        """Whether it uses the changed config.yaml as it is, without a new start."""
        return await self._ask(CONFIG, _HANG_SECONDS) == TAKEN

    async def moves(self, seconds: float) -> bool:
        """Whether its loop comes to answer within so many seconds."""
        # In two halves: where all were halted meanwhile, the first one ends before the answer.
        for _ in range(2):
            if await self._ask(ALIVE, seconds / 2) is not None:
                return True
        return self.ended.done()

    async def _ask(self, word: bytes, seconds: float) -> bytes | None:
        self._answer = asyncio.get_running_loop().create_future()
        with contextlib.suppress(OSError):
            self._line.send(word)
        either = (self._answer, self.ended)
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return self._answer.result() if self._answer.done() else None

    async def hand_over(self) -> None:
        """Have it answer whom it took, and end."""
        try:
            self._line.send(HAND_OVER)
            await asyncio.wait_for(asyncio.shield(self.ended), _HANG_SECONDS)
        except TimeoutError:
            self.kill()
        except OSError:
            # It has just ended by itself.
            pass
        await self._gone()

    async def stop(self) -> int:
        """Have it end as by the signal; its exit code."""
        self._send(signal.SIGTERM)
        return await self._gone()

    def kill(self) -> None:
        """Have it end now."""
        self._send(signal.SIGKILL)

    async def cut_off(self) -> None:
        """Have it end now, and say before where it is."""
        self._send(WHERE)
        await asyncio.wait((self.ended,), timeout=_TELL_SECONDS)
        self.kill()

    def _send(self, number: int) -> None:
        # Not by the process object: before Python 3.13 it may take the exit code away from asyncio.
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _hear(self) -> None:
        try:
            while word := await asyncio.get_running_loop().sock_recv(self._line, 1):
                if word == READY:
                    self.ready.set_result(True)
                elif self._answer is not None and not self._answer.done():
                    self._answer.set_result(word)
                elif word == RESTART:
                    self.wants_restart = True
        except OSError:
            # It has ended, and not by a word.
            pass
        finally:
            if not self.ready.done():
                self.ready.set_result(False)

    async def _gone(self) -> int:
        code = await asyncio.shield(self.ended)
        self._hearing.cancel()
        await asyncio.wait((self._hearing,))
        self._line.close()
        return code if code >= 0 else 128 - code


async def start(command: Sequence[str], held: Held, *, first: bool) -> Child:
    """Run a command of ours on what is held."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    numbers, worker = held.numbers, held.worker
    inherited = Inherited(theirs.fileno(), numbers, first, worker)
    given = ["--inherited", msgspec.json.encode(inherited).decode()]
    passed = [theirs.fileno(), *(one for many in numbers.values() for one in many)]
    if worker.memory >= 0:
        passed.append(worker.memory)
    # Until the child has its handlers, a signal waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _COMMAND, *command, *given, pass_fds=passed
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        theirs.close()
    return Child(process, ours)


async def end(children: Collection[Child], hurry: asyncio.Event) -> list[int]:
    """Have all end, at once where they do not in time or nobody waits; their exit codes."""
    ending = asyncio.gather(*(child.stop() for child in children))
    hurrying = asyncio.ensure_future(hurry.wait())
    waited = (ending, hurrying)
    await asyncio.wait(waited, timeout=END_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not ending.done():
        cut_off()
        for child in children:
            child.kill()
    return await ending
