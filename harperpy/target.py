"""Where an operation of the command line goes, and how its refusals are said."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import click
import msgspec

from .config import load_config
from .errors import ClientError, ConfigError, HarperError, SetupError
from .held import SOCKET_NAME
from .remote import Remote, sentence
from .sections import Config
from .server import Server
from .words import AIM, answer

T = TypeVar("T")

logger = logging.getLogger("harperpy.target")

_TRUNCATED = "x-harper-truncated"


class Target(msgspec.Struct):
    """The server an operation goes to, how it is answered, and how many seconds that may take.

    `seconds` of None is any time.
    """

    directory: Path
    root: Path | None
    url: str | None
    api_key: str | None
    seconds: float | None = 10.0
    login: tuple[str, str] | None = None
    as_json: bool = False

    def operate(self, operation: str, /, **parameters: Any) -> None:
        """Run one operation where the options say, and print what it answers."""
        given = {name: value for name, value in parameters.items() if value is not None}
        body = {**given, "operation": operation}
        headers: dict[str, str] = {}
        result = told(lambda: run_to_end(self._operate(body, headers)), operation)
        show(result, as_json=self.as_json)
        if most := headers.get(_TRUNCATED):
            click.echo(f"harperpy: {operation}: cut off: there are more than {most}", err=True)

    def aimed(self, parameters: dict[str, Any]) -> Target:
        """The server that `target` names, as who `auth_username` and `auth_password` say.

        They are taken out of the parameters. A URL may hold the name and password too. Raises
        `ValueError`.
        """
        url, name, password = (parameters.pop(one, None) for one in AIM)
        if (name is None) != (password is None):
            message = "auth_username and auth_password: expected both, or neither"
            raise ValueError(message)
        if url is None and name is not None and not self.url:
            message = "auth_username: expected a target=URL too"
            raise ValueError(message)
        parts = urlsplit(str(url or self.url or ""))
        option = "--url" if url is None else "target"
        aimed = url is not None or self.url
        if aimed and (parts.scheme not in ("http", "https") or not parts.hostname):
            message = f"{option}: expected an http:// or https:// URL"
            raise ValueError(message)
        if name is None and parts.username:
            name, password = unquote(parts.username), unquote(parts.password or "")
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        login = None if name is None else (str(name), str(password))
        return msgspec.structs.replace(self, url=bare or None, login=login)

    @property
    def is_project(self) -> bool:
        """Whether there is anything to ask."""
        here = ("config.yaml", "resources.py", ".harperpy")
        return bool(self.url or self.root) or any((self.directory / one).exists() for one in here)

    async def _operate(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """Over HTTP, else by the socket, else, where no server runs, on the database itself.

        What the answer's headers say is put into `headers`.
        """
        if self.url:
            known = {"api_key": self.api_key, "login": self.login}
            return await self._remote(url=self.url, **known).operate(body, headers)
        try:
            config = config_of(self.directory)
        except ConfigError:
            # A running server has the variables that this shell may lack.
            root = self.root or self.directory / ".harperpy"
            if await _is_dead(root / SOCKET_NAME):
                raise
            return await self._remote(socket=root / SOCKET_NAME).operate(body, headers)
        server = Server(config, directory=self.directory, root=self.root)
        socket = server.root / SOCKET_NAME
        if not await _is_dead(socket):
            return await self._remote(socket=socket).operate(body, headers)
        import_from(self.directory)
        await server.open()
        try:
            return await server.operate(body, headers=headers)
        except HarperError:
            raise
        except Exception as error:
            logger.debug("the operation %s failed", body["operation"], exc_info=True)
            message = f"it failed with {type(error).__name__}"
            raise SetupError(message) from error
        finally:
            await server.stop()

    def _remote(self, **where: Any) -> Remote:
        return Remote(**where, seconds=self.seconds)


def told(work: Callable[[], T], operation: str = "") -> T:
    """A refusal is one sentence on stderr, which names the operation, and exit code 1."""
    name = f"harperpy: {operation}" if operation else "harperpy"
    try:
        return work()
    except ConfigError as error:
        # It is about this folder, whatever was to be done in it.
        click.echo(f"harperpy: {error}", err=True)
    except ClientError as error:
        click.echo(f"{name}: {sentence(str(error), error.report or {})}", err=True)
    except SetupError as error:
        click.echo(f"{name}: {error}", err=True)
    except HarperError as error:
        click.echo(f"{name}: {type(error).__name__}: {error}", err=True)
    sys.exit(1)


def show(result: Any, *, as_json: bool) -> None:
    """Print what an operation answers, if it answers anything; exit code 1 where it cannot be."""
    if not (text := answer(result, as_json=as_json)):
        return
    try:
        _print(text)
    except BrokenPipeError:
        # Who read it has enough, as `head` does.
        raise
    except (OSError, UnicodeEncodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        click.echo(f"harperpy: the answer cannot be written: {reason}", err=True)
        # Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print(text: str) -> None:
    # It is None where it was closed.
    if not isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        click.echo(text)
        return
    # With PYTHONUNBUFFERED the rest of what a pipe does not take at once would be dropped.
    with open(sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, closefd=False) as buffered:
        click.echo(text, file=buffered)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop where there is one."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def open_streams() -> None:
    """Give the standard streams that were closed (`>&-`) a file.

    Else the loop's own would get their numbers, and uvloop ends the process.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def scratch() -> Generator[Path]:
    """A folder for now. Raises `ConfigError` where there can be none."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        message = "there is no folder for temporary files that can be written: TMPDIR names one"
        raise ConfigError(message) from error
    with folder as path:
        yield Path(path)


def config_of(directory: Path) -> Config:
    """The config.yaml of a project."""
    return load_config(directory / "config.yaml", os.environ)


def import_from(directory: Path) -> None:
    """Let the project's resources and plugins import its other modules."""
    sys.path.insert(0, str(directory.resolve()))


async def _is_dead(socket: Path) -> bool:
    """Whether nobody listens there; a server that was killed leaves its socket behind."""
    try:
        _, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return True
    writer.close()
    return False
