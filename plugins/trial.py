"""A trial: whether a server could start with a config.yaml, found out in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from harperpy import Config, ConfigError, Server, load_config

_SECONDS = 60.0
_REFUSED = 3


def trouble(config: Path, directory: Path, running: Config | None = None) -> str | None:
    """Why no server of this folder could start with the file, in one sentence; None if one could.

    All but the plugins' own hooks is done as in a start, which takes a second. Not on the loop.
    The ports are tried where it is to take the place of a `running` one, whose own may stay.
    """
    given = [str(path.resolve()) for path in (config, directory)]
    if running is not None:
        given += map(str, (running.http.port, running.operations_api.network.port))
    # Without -P the folder that it runs in would come before all packages.
    command = [sys.executable, "-P", "-m", "harperpy.plugins.trial", *given]
    try:
        ended = subprocess.run(  # noqa: S603  # of our own words, paths and numbers
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"a trial start took more than {_SECONDS:g} s"
    if ended.returncode == _REFUSED:
        return ended.stdout.strip()
    return f"a trial start ended with exit code {ended.returncode}" if ended.returncode else None


async def _rehearse(config: Path, directory: Path, taken: list[int]) -> None:
    with tempfile.TemporaryDirectory() as root:
        tried = load_config(config, os.environ)
        # The real one is in use.
        tried = msgspec.structs.replace(tried, database=type(tried.database)())
        server = Server(tried, directory=directory, root=Path(root), offline=True)
        await server.rehearse(taken or None)


def main(config: str, directory: str, *taken: str) -> None:
    """Exit with a code of its own, and the sentence on stdout, where the file is refused."""
    logging.disable(logging.CRITICAL)
    # As the command line does, whose project's modules plugins import.
    sys.path.insert(0, directory)
    try:
        # What plugins print is no part of the sentence.
        with contextlib.redirect_stdout(sys.stderr):
            asyncio.run(_rehearse(Path(config), Path(directory), [*map(int, taken)]))
    except ConfigError as error:
        print(error)  # noqa: T201  # what who started it reads
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
