"""The command line: dev, run, init, check, version, and the operations on users, keys and SQL."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from .config import Config, DatabaseConfig, load_config
from .errors import ClientError, ConfigError, HarperError, SetupError
from .health import Health
from .reload import Parent
from .remote import Remote
from .scaffold import TEMPLATES, write_project
from .server import SOCKET_NAME, Server
from .serving import Inherited, Serving, serve

T = TypeVar("T")

_DIRECTORY = click.argument(
    "directory",
    metavar="[DIR]",
    default=".",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
_ROOT = click.option(
    "--root",
    envvar="HARPERPY_ROOT",
    type=click.Path(path_type=Path),
    help="Data folder. Default: $HARPERPY_ROOT, else rootPath of config.yaml, else DIR/.harperpy.",
)
_OFFLINE = click.option(
    "--offline",
    is_flag=True,
    envvar="HARPERPY_OFFLINE",
    show_envvar=True,
    help="Fetch nothing, ever.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A programmable AI server.

    Start with 'harperpy init demo', then 'harperpy dev demo'.
    """


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(_version())


@main.command(short_help="Serve DIR on this machine only.")
@_DIRECTORY
@_ROOT
@_OFFLINE
@click.option("--no-reload", is_flag=True, help="Do not start anew when a file changes.")
@click.option("--inherited", hidden=True)
def dev(
    directory: Path, root: Path | None, *, offline: bool, no_reload: bool, inherited: str | None
) -> None:
    """Serve DIR on this machine only; on the first start make an administrator and print its key.

    DIR holds config.yaml, resources.py and plugins/; all of them may be missing. When config.yaml
    or a Python file changes, the server starts anew, and no connection is refused meanwhile.
    """
    what = Serving(directory, root, dev=True, offline=offline, version=_version())
    if no_reload or inherited:
        _serve(what, msgspec.json.decode(inherited, type=Inherited) if inherited else None)
        return
    given = [str(directory), *(["--root", str(root)] if root else [])]
    parent = Parent(what, [*given, *(["--offline"] if offline else [])])
    sys.exit(_told(lambda: asyncio.run(parent.run())))


@main.command()
@_DIRECTORY
@_ROOT
@_OFFLINE
def run(directory: Path, root: Path | None, *, offline: bool) -> None:
    """Serve DIR on all interfaces.

    The first start needs HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD in the environment.
    """
    _serve(Serving(directory, root, dev=False, offline=offline, version=_version()))


_TEMPLATES = "\n".join(f"{name:<10}{about}" for name, about in TEMPLATES.items())


@main.command(
    short_help="Write a new project into the folder NAME.",
    epilog=f"\b\nTemplates:\n{_TEMPLATES}",
)
@click.argument("name", type=click.Path(path_type=Path))
@click.option(
    "--template",
    type=click.Choice(list(TEMPLATES)),
    default=next(iter(TEMPLATES)),
    show_default=True,
    help="What to begin with.",
)
def init(name: Path, template: str) -> None:
    """Write a new project into the folder NAME: its config, its code, and tests that pass."""
    _told(lambda: write_project(name, template))
    click.echo(f"Wrote {name}. Next: harperpy dev {name}")


@main.command(short_help="Load DIR, and say what is wrong with it.")
@_DIRECTORY
def check(directory: Path) -> None:
    """Load DIR as a server would, without serving it, and say what is wrong."""
    health = _told(lambda: _run(_check(directory)))
    for name, plugin in health.plugins.items():
        if plugin.status == "error":
            click.echo(f"plugin {name} does not start: {plugin.error}", err=True)
    if health.degraded:
        sys.exit(1)
    click.echo("config.yaml and all plugins are fine.")


class Target(msgspec.Struct):
    """The server an operation goes to, and how its result is shown."""

    directory: Path
    root: Path | None
    url: str | None
    api_key: str | None

    def operate(self, operation: str, **parameters: Any) -> Any:
        """Run one operation where the options say."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return _told(lambda: _run(self._operate({"operation": operation, **given})))

    async def _operate(self, body: dict[str, Any]) -> Any:
        """Over HTTP, else by the socket, else, where no server runs, on the database itself."""
        if self.url:
            return await Remote(url=self.url, api_key=self.api_key).operate(body)
        try:
            config = _config(self.directory)
        except ConfigError:
            # A running server has the variables that this shell may lack.
            root = self.root or self.directory / ".harperpy"
            if await _is_dead(root / SOCKET_NAME):
                raise
            return await Remote(socket=root / SOCKET_NAME).operate(body)
        server = Server(config, directory=self.directory, root=self.root)
        socket = server.root / SOCKET_NAME
        if not await _is_dead(socket):
            return await Remote(socket=socket).operate(body)
        _import_from(self.directory)
        await server.open()
        try:
            return await server.operate(body)
        finally:
            await server.stop()


def _targeted(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which server an operation goes to."""
    options = (
        click.option(
            "--api-key", envvar="HARPERPY_API_KEY", show_envvar=True, help="API key for --url."
        ),
        click.option("--url", help="Operations URL of a remote server, with --api-key."),
        _ROOT,
        click.option(
            "--dir",
            "directory",
            default=".",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder of the project.",
        ),
    )
    for option in options:
        command = option(command)
    return command


@main.group()
def user() -> None:
    """Add, list, change and remove users."""


@user.command("add")
@click.argument("username")
@click.option("--role", default="model_user", show_default=True, help="Name of the user's role.")
@click.option("--tenant", help="Whom the user's calls are billed to.")
@click.password_option(help="Asked for if not given.")
@_targeted
def user_add(username: str, role: str, tenant: str | None, password: str, **where: Any) -> None:
    """Add a user."""
    _show(
        Target(**where).operate(
            "add_user", username=username, password=password, role=role, tenant=tenant
        )
    )


@user.command("list")
@_targeted
def user_list(**where: Any) -> None:
    """List all users."""
    _show(Target(**where).operate("list_users"))


@user.command("drop")
@click.argument("username")
@_targeted
def user_drop(username: str, **where: Any) -> None:
    """Remove a user with its keys and tokens."""
    _show(Target(**where).operate("drop_user", username=username))


@main.group()
def key() -> None:
    """Make, list and end API keys."""


@key.command("add")
@click.argument("name")
@click.option("--user", "username", help="Whose key it is; the first super user's if not given.")
@_targeted
def key_add(name: str, username: str | None, **where: Any) -> None:
    """Make an API key; it is shown this once."""
    _show(Target(**where).operate("add_api_key", name=name, username=username))


@key.command("list")
@_targeted
def key_list(**where: Any) -> None:
    """List API keys by their first letters."""
    _show(Target(**where).operate("list_api_keys"))


@key.command("drop")
@click.argument("id")
@_targeted
def key_drop(id: str, **where: Any) -> None:  # noqa: A002
    """End an API key at once."""
    _show(Target(**where).operate("drop_api_key", id=id))


@main.group()
def models() -> None:
    """Fetch, list and remove the demo model's file in your cache."""


@models.command("pull")
@click.argument("name", required=False)
def models_pull(name: str | None) -> None:
    """Fetch a model file now, so that no server has to."""
    _on_files("pull_model_file", name)


@models.command("list")
def models_list() -> None:
    """List the model files that can be fetched."""
    _on_files("list_model_files", None)


@models.command("rm")
@click.argument("name", required=False)
def models_rm(name: str | None) -> None:
    """Delete a model file."""
    _on_files("remove_model_file", name)


@main.command(short_help="Run one SELECT over the system tables.")
@click.argument("select")
@_targeted
def sql(select: str, **where: Any) -> None:
    """Run one SELECT over the system tables, e.g. "SELECT * FROM system.hdb_model_calls"."""
    _show(Target(**where).operate("sql", sql=select))


def _serve(what: Serving, inherited: Inherited | None = None) -> None:
    _import_from(what.directory)
    _told(lambda: _run(serve(what, inherited)))


async def _check(directory: Path) -> Health:
    with tempfile.TemporaryDirectory() as root:
        config = _config(directory)
        # A database outside of the data folder is in use: the check leaves it alone.
        config = msgspec.structs.replace(config, database=DatabaseConfig())
        _import_from(directory)
        server = Server(config, directory=directory, root=Path(root), dev=True)
        logging.disable(logging.CRITICAL)
        await server.open()
        await server.stop()
        return server.health


def _on_files(operation: str, name: str | None) -> None:
    """An operation on the user's cache: no project and no running server has a part in it."""

    async def operate() -> Any:
        with tempfile.TemporaryDirectory() as root:
            server = Server(Config(), directory=Path(root), root=Path(root))
            await server.open()
            try:
                given = {"operation": operation, "name": name}
                return await server.operate({key: value for key, value in given.items() if value})
            finally:
                await server.stop()

    _show(_told(lambda: _run(operate())))


async def _is_dead(socket: Path) -> bool:
    """Whether nobody listens there; a server that was killed leaves its socket behind."""
    try:
        _, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return True
    writer.close()
    return False


def _import_from(directory: Path) -> None:
    """Let the project's resources and plugins import its other modules."""
    sys.path.insert(0, str(directory.resolve()))


def _config(directory: Path) -> Config:
    return load_config(directory / "config.yaml", os.environ)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop where there is one."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _told(work: Callable[[], T]) -> T:
    """A refusal is one sentence on stderr and exit code 1."""
    try:
        return work()
    except (SetupError, ClientError) as error:
        click.echo(f"harperpy: {error}", err=True)
    except HarperError as error:
        click.echo(f"harperpy: {type(error).__name__}: {error}", err=True)
    sys.exit(1)


def _show(result: Any) -> None:
    match result:
        # Over HTTP a sentence comes as a message.
        case str(text) | {"message": str(text)}:
            click.echo(text)
        case _:
            click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())


def _version() -> str:
    return importlib.metadata.version("harperpy")
