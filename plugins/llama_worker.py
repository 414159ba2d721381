"""The child process that runs a GGUF file: llama.cpp's own HTTP server, on loopback.

Run as a file. One JSON line on stdin says what to serve, the key among it; one on stdout says
where. It ends with its parent: when stdin closes.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from typing import Any


def main() -> None:
    """Serve until stdin closes."""
    # Ctrl-C reaches every process of the terminal, but the parent still winds down with us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    config: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    watcher = threading.Thread(target=_exit_with_parent, daemon=True)
    watcher.start()
    server = _serve(config)
    os.write(1, json.dumps({"address": server.listening_address}).encode() + b"\n")
    watcher.join()


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
