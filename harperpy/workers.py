"""A parent that holds the ports and keeps several processes serving them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from tempfile import TemporaryFile

from .banner import local_url, ready, say
from .child import Child, end, start
from .ending import AGAIN, HARD_STOP, STOPS, Ending, heeded
from .epoch import Epoch
from .held import SOCKET_NAME, Worker, data_root, hold, places
from .processors import shared
from .sections import Config
from .serving import Serving

# Who lived so long is started again at once when it dies.
_QUICK_SECONDS = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LOOK_SECONDS = 5.0


class Workers:
    """Keeps the ports and the data folder, and all workers at work."""

    def __init__(self, what: Serving, config: Config, count: int) -> None:
        self._what = what
        self._config = config
        self._count = count
        self._root = data_root(config, what.directory, what.root)
        self._children: dict[int, Child] = {}
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._ending = Ending(self._stop.set, self._hurry.set)

    @property
    def again(self) -> bool:
        """Whether all are to be started again."""
        return self._ending.again

    async def run(self) -> int:
        """Serve until a signal; the exit code. Raises `ConfigError` if the start is refused."""
        for number in (*heeded(), AGAIN):
            asyncio.get_running_loop().add_signal_handler(number, self._ending.heard, number)
        count = self._count
        processors = shared(count) if self._config.http.pin_workers else ()
        self._held = hold(self._root, places(self._config, dev=False), count)
        with TemporaryFile(dir=self._root, buffering=0) as memory:
            # Not a hole, which a full disk could not fill when it is needed.
            memory.write(bytes(Epoch.size(count + 1)))
            for index, held in enumerate(self._held):
                held.worker = Worker(index, count, memory.fileno(), processors)
            self._epoch = Worker(count, count, memory.fileno()).epoch()
            try:
                return await self._until_stopped()
            finally:
                (self._root / SOCKET_NAME).unlink(missing_ok=True)
                self._held[0].lock.close()

    async def _until_stopped(self) -> int:
        serving = asyncio.ensure_future(self._serve())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, stopping):
            task.cancel()
        await asyncio.wait((serving, stopping))
        for held in self._held:
            held.close_sockets()
        await end(self._children.values(), self._hurry)
        # All is done: one more of them would only spoil the exit code.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        if self._hurry.is_set():
            return HARD_STOP
        return 0 if serving.cancelled() else serving.result()

    async def _serve(self) -> int:
        """Start all, and keep them; the exit code of one that was never ready."""
        # The first one makes what all need: the schema, and the first administrator.
        for indices in (range(1), range(1, len(self._held))):
            for index in indices:
                await self._start(index, first=index == 0)
            for index in indices:
                if not await asyncio.shield(self._children[index].ready):
                    return await self._children[index].stop()
        port = self._held[0].sockets["rest"][0].getsockname()[1]
        say(ready(local_url(self._config.http.host, port), len(self._held)))
        await asyncio.gather(*(self._keep(index) for index in range(len(self._held))))
        return 0

    async def _start(self, index: int, *, first: bool = False) -> None:
        what = self._what
        offline = ["--offline"] if what.offline else []
        # A worker that is started again reads a config.yaml that may name another folder by now.
        command = ["run", str(what.directory), "--root", str(self._root), *offline]
        self._children[index] = await start(command, self._held[index], first=first)

    async def _keep(self, index: int) -> None:
        """Start a worker again whenever it ends."""
        quick = 0
        while True:
            child = self._children[index]
            code = await self._end_of(index, child)
            if not await asyncio.shield(child.ready):
                self._leave_queues(index)
            # It may have changed who may do what, and not have come to say so.
            self._epoch.move()
            how = f"ended with exit code {code}" if code >= 0 else _killed(-code)
            told = f"harperpy: worker {index} (process {child.pid}) {how} and is started again"
            say(told, err=True)
            await child.stop()
            quick = quick + 1 if time.monotonic() - child.began < _QUICK_SECONDS else 0
            await asyncio.sleep(_pause(quick))
            while not await self._start_again(index):
                pass

    async def _end_of(self, index: int, child: Child) -> int:
        """A worker's exit code; one whose loop does not come to answer in time is killed."""
        seconds = self._config.http.worker_timeout_seconds
        if seconds and await asyncio.shield(child.ready):
            while await child.moves(seconds):
                if (await asyncio.wait((child.ended,), timeout=_LOOK_SECONDS))[0]:
                    break
            else:
                what = f"worker {index} (process {child.pid}) has not moved for {seconds:g} s"
                say(f"harperpy: {what} and is killed; it was here:", err=True)
                await child.cut_off()
        return await asyncio.shield(child.ended)

    async def _start_again(self, index: int) -> bool:
        """Start a worker anew; False, after a pause, where the machine has no room for it."""
        try:
            await self._start(index)
        except OSError as error:
            say(f"harperpy: worker {index} cannot be started: {error.strerror}", err=True)
            self._leave_queues(index)
            await asyncio.sleep(_LONGEST_PAUSE)
            return False
        return True

    def _leave_queues(self, index: int) -> None:
        # Where there is no room for a socket either, they wait.
        with contextlib.suppress(OSError):
            self._held[index].leave_queues()


def _pause(quick: int) -> float:
    """How long to wait after so many quick deaths in a row, in seconds; not after the first."""
    return min(_SHORTEST_PAUSE * 2 ** (quick - 2), _LONGEST_PAUSE) if quick > 1 else 0.0


def _killed(number: int) -> str:
    return f"was killed by signal {number} ({signal.strsignal(number)})"
