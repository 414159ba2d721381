"""The child process that runs a GGUF file: llama.cpp's own HTTP server, on loopback.

Run as a file. One JSON line on stdin says what to serve, the key among it; one on stdout says
where, and where each has to wait for a slot. It ends with its parent: when stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

_CHUNK, _MOST_CHUNKS = 1 << 16, 256
# A long prompt on a slow machine takes its time, too.
_STUCK_SECONDS, _LOOKS = 120.0, 10
# Its server sends this to who waits, whatever the model does.
_PING = b":\n\n"


def main() -> None:
    """Serve until stdin closes."""
    # Ctrl-C and a closed terminal reach all of its processes; the parent still winds down with us.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    config: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    if config["processors"]:
        # The loop of its parent keeps to one.
        os.sched_setaffinity(0, config["processors"])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    server = _serve(config)
    asyncio.run(_tell_and_serve(server.listening_address, config["slots"]))


async def _tell_and_serve(address: str, slots: int) -> None:
    turns = Turns(address, slots)
    async with await asyncio.start_server(turns.take, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        told = {"address": address, "turns": f"http://127.0.0.1:{port}"}
        os.write(1, json.dumps(told).encode() + b"\n")
        await turns.stuck(_STUCK_SECONDS)
        os.write(2, f"llama.cpp answered nobody for {_STUCK_SECONDS:g} s\n".encode())
        # Its threads would not end. Whoever started this process starts another.
        os._exit(1)


class Turns:
    """Passes connections of one request each on to llama.cpp, never more than it has slots.

    Several processes may ask at once. In llama.cpp's own queue who has left is noticed only after
    a part of the prompt is read; here at once.
    """

    def __init__(self, address: str, slots: int) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._place = (host, int(port))
        self._slots = asyncio.Semaphore(slots)
        self._waiting = 0
        self._heard = False

    async def stuck(self, seconds: float) -> None:
        """Return once llama.cpp has said nothing at all in so long while somebody waited.

        One schema may be more than it can ever work out, and nobody else is answered meanwhile.
        """
        silent = 0
        while silent < _LOOKS:
            await asyncio.sleep(seconds / _LOOKS)
            silent = 0 if self._heard else silent + bool(self._waiting)
            self._heard = False

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read on while it waits: whoever leaves, leaves the queue, or frees the slot."""
        asked = asyncio.Queue[bytes](_MOST_CHUNKS)
        answer = asyncio.create_task(self._answer(asked, writer))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                await asked.put(data)
        answer.cancel()
        writer.close()

    async def _answer(self, asked: asyncio.Queue[bytes], writer: asyncio.StreamWriter) -> None:
        try:
            # Who says nothing waits for nothing.
            first = await asked.get()
            async with self._slots:
                reader, onward = await asyncio.open_connection(*self._place)
                onward.write(first)
                sending = asyncio.create_task(_send(asked, onward))
                self._waiting += 1
                try:
                    while data := await reader.read(_CHUNK):
                        self._heard |= _PING not in data
                        writer.write(data)
                        await writer.drain()
                finally:
                    self._waiting -= 1
                    sending.cancel()
                    onward.close()
        except OSError:
            # The connection closes with no answer: its caller is told that this one is gone.
            pass
        finally:
            writer.close()


async def _send(asked: asyncio.Queue[bytes], onward: asyncio.StreamWriter) -> None:
    while True:
        onward.write(await asked.get())
        await onward.drain()


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _serve(config: dict[str, Any]) -> Any:
    # By name: it has no types, and nobody else may load it, as a native crash takes all along.
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = config["path"]
    params.model_alias = {config["alias"]}
    params.api_keys, params.ui, params.endpoint_props = [config["api_key"]], False, False
    params.n_ctx, params.n_parallel, params.kv_unified = config["context"], config["slots"], True
    # Small batches notice a disconnect sooner: a prompt is read in one go per batch.
    params.n_batch = params.n_ubatch = config["batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config["threads"]
    params.cache_ram_mib, params.verbosity = 0, -1
    params.n_predict = config["most_tokens"]
    params.sampling.temp = 0.0
    if config["chat_template"]:
        params.chat_template = config["chat_template"]
    if config["embedding"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
