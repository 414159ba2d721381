"""A model file and the child that runs it: fetched, started, kept running, shared."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import threading
from functools import partial
from pathlib import Path

from harperpy import ModelEntry

from .llama_child import Child, ChildSettings, Endpoint, lacking_cpu_features, threads, unavailable
from .local_share import Share, Told
from .openai import timeouts
from .openai_transport import Transport
from .weights import SMOLLM2, Cache, FetchError, Source, user_cache

logger = logging.getLogger("harperpy.plugins.local")

SLOTS = 4
_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.25
_MISSING = "xllamacpp is not installed: pip install 'harperpy[local]'"
# The template inside the file introduces the model as SmolLM and answers measurably worse.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Runner:
    """One model file and the child that runs it: fetched, started, kept running.

    Of several processes on one data folder one does that; the others use its child.
    """

    def __init__(self, entry: ModelEntry) -> None:
        file = entry.settings.model_file
        self.file = (entry.directory / file).absolute() if file else None
        self.source: Source | None = None if file else SMOLLM2
        self.timeouts = timeouts(entry.settings)
        self.changed = asyncio.Event()
        self.transport: Transport | None = None
        self.waiting = 0
        self.slots = asyncio.Semaphore(SLOTS)
        self._offline = entry.offline
        self._processors = entry.processors
        self._share = Share(entry.root, str(self.file or self.name))
        self._told = Told()
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()

    @property
    def name(self) -> str:
        """The model's name, as it is listed and asked for."""
        return self.source.name if self.source else (self.file or Path()).stem.lower()

    @property
    def state(self) -> str:
        """`ready`, or what it is doing or lacks."""
        return self._told.state

    @property
    def is_hopeless(self) -> bool:
        """Whether waiting will not help."""
        return self._told.is_hopeless

    def open(self) -> None:
        """Begin, once, however many entries share this runner."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="local model")

    async def close(self) -> None:
        """End the child and any fetching."""
        self._stop.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._share.close()
        if self.transport is not None:
            await self.transport.close()

    async def ready(self) -> Transport:
        """The way to the running child. Raises `ModelUnavailable` if that takes too long."""
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while self.transport is None and not self.is_hopeless:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            pass
        if self.transport is None:
            message = f"The local model {self.name} {self.state}"
            raise unavailable(message)
        return self.transport

    def look(self) -> None:
        """See, if another process runs the child, where it is now; or that it is ours to run."""
        if self._share.runs_here or self._stop.is_set():
            return
        if self._share.take():
            self._be(Told())
        elif (told := self._share.read()) not in (None, self._told):
            self._be(told)

    async def _run(self) -> None:
        self.look()
        while not self._share.runs_here:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()
        path = await self._model_file()
        settings = ChildSettings(
            path=str(path),
            alias=self.name,
            slots=SLOTS,
            threads=threads(),
            chat_template=TEMPLATE if self.source else None,
            processors=self._processors,
        )
        self._be(Told())
        self._child = Child(settings, self._moved, logger)
        await self._child.run()

    async def _model_file(self) -> Path:
        """The file, waited for as long as it takes: whatever is missing may be mended meanwhile."""
        pause = 2.0
        while True:
            if not (lack := self._lack()):
                try:
                    return self.file or await self._fetched()
                except (FetchError, OSError) as error:
                    lack = f"is not there: {error}"
                    logger.error("the local model: %s", error)  # noqa: TRY400  # one sentence
                    pause = min(pause * 2, 60.0)
            self._be(Told(lack, is_hopeless=True))
            await asyncio.sleep(pause)

    def _lack(self) -> str:
        """What this machine lacks, and what mends it; nothing if all is there."""
        if lacking := lacking_cpu_features():
            return f"cannot run on this processor, which lacks {', '.join(lacking)}"
        if importlib.util.find_spec("xllamacpp") is None:
            return f"cannot run: {_MISSING}"
        if self.file is not None and not self.file.is_file():
            return f"cannot run: modelFile {self.file} does not exist"
        return ""

    async def _fetched(self) -> Path:
        cache = Cache(user_cache(os.environ))
        source = self.source or SMOLLM2
        if await asyncio.to_thread(cache.holds, source):
            return cache.path(source)
        if self._offline:
            message = "it is not fetched and the server is offline. Then: harperpy models pull"
            raise FetchError(message)
        logger.warning("%s", source.notice)
        progress = partial(self._progress, asyncio.get_running_loop())
        return await asyncio.to_thread(cache.fetch, source, progress, self._stop)

    def _progress(self, loop: asyncio.AbstractEventLoop, percent: int) -> None:
        loop.call_soon_threadsafe(self._be, Told(f"is being fetched ({percent} %)"))
        logger.warning("fetching %s: %d %%", self.name, percent)

    def _moved(self, child: Child, endpoint: Endpoint | None) -> None:
        """The child answers somewhere else now, or nowhere."""
        ended = endpoint is None and child.state == "ready"
        state = "is starting again" if ended else child.state
        self._be(Told(state, child.failed, endpoint))

    def _be(self, told: Told) -> None:
        """What is true from now on, for this process and for those that use its child."""
        before, self._told = self._told, told
        if told.endpoint != before.endpoint:
            self._turn_to(told.endpoint)
        self._share.tell(told)
        self.changed.set()

    def _turn_to(self, endpoint: Endpoint | None) -> None:
        before, self.transport = self.transport, None
        if before is not None:
            asyncio.get_running_loop().create_task(before.close())
        if endpoint is not None:
            # It closes kept-alive sockets after a stream, so none is kept.
            self.transport = Transport(
                endpoint.url, secret=endpoint.api_key, timeouts=self.timeouts, kept=False
            )
