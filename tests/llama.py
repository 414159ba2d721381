"""The real model our tests put behind the gateway: llama.cpp's own server with SmolLM2-135M."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
from harperpy.plugins import llama_worker
from harperpy.plugins.llama_child import ChildSettings, threads
from harperpy.plugins.local_runner import TEMPLATE
from harperpy.plugins.weights import SMOLLM2, Cache, user_cache

MODEL = "gpt-4o-mini"
START_LIMIT, STOP_LIMIT = 60, 5  # seconds


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A running model server: what an OpenAI client needs to call it."""

    url: str
    api_key: str
    model: str = MODEL


def weights() -> Path:
    """The verified model file in the user's cache, fetched when absent."""
    return Cache(user_cache(os.environ)).fetch(SMOLLM2, lambda _: None, threading.Event())


@contextmanager
def llama_server(*, embedding: bool = False) -> Generator[LlamaServer]:
    """Run the model server in a child process; `embedding` adds /v1/embeddings to chat."""
    settings = ChildSettings(
        path=str(weights()),
        alias=MODEL,
        api_key=secrets.token_urlsafe(24),
        context=4096,
        slots=2,
        # An embedding has to fit into one batch.
        batch=512 if embedding else 128,
        threads=threads(),
        chat_template=TEMPLATE,
        embedding=embedding,
    )
    command = [sys.executable, "-P", str(llama_worker.__file__)]
    # A file, because nobody reads a pipe while the server runs and a full one would block it.
    with tempfile.TemporaryFile() as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
        try:
            address = _start(process, settings, errors)
            yield LlamaServer(url=f"{address}/v1", api_key=settings.api_key)
        finally:
            _stop(process)


def _start(process: subprocess.Popen[bytes], settings: ChildSettings, errors: IO[bytes]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(START_LIMIT, process.kill)
    timer.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        status = process.wait()
        errors.seek(0)
        tail = errors.read()[-2000:].decode(errors="replace")
        message = f"the model server did not start in {START_LIMIT} s, status {status}:\n{tail}"
        raise RuntimeError(message)
    return str(json.loads(line)["address"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    with process:
        try:
            process.communicate(timeout=STOP_LIMIT)  # closes stdin, which ends the child
        except subprocess.TimeoutExpired:
            process.kill()
