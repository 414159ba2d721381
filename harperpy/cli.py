"""The command line: dev, run, init, check, version, and the operations on users, keys and SQL."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from .banner import say
from .ending import start_again
from .health import Health
from .processors import processes
from .reload import Parent
from .scaffold import TEMPLATES, write_project
from .sections import Config, DatabaseConfig
from .server import Server
from .serving import Inherited, Serving, serve
from .spelling import nearest
from .target import Target, config_of, import_from, open_streams, run_to_end, scratch, show, told
from .words import parameters
from .workers import Workers

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


_JSON = click.option("--json", "as_json", is_flag=True, help="Answer in JSON instead of YAML.")


class _Commands(click.Group):
    """The commands; any other word is an operation's name, such as a plugin's command."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or _operation(cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="harperpy", message="%(version)s")
def main() -> None:
    """A programmable AI server.

    Start with 'harperpy init demo', then 'harperpy dev demo'.

    Any other word is an operation of the server: 'harperpy list_users', 'harperpy drop_user
    username=ada'. Those of plugins are listed by 'harperpy commands'.
    """
    open_streams()


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
    or a Python file changes, the server starts anew, and no connection is refused meanwhile. The
    ports are http.port (9926) and operationsApi.network.port (9925) of config.yaml.
    """
    what = Serving(directory, root, dev=True, offline=offline, version=_version())
    if no_reload or inherited:
        _serve(what, inherited)
        return
    given = [str(directory), *(["--root", str(root)] if root else [])]
    parent = Parent(what, [*given, *(["--offline"] if offline else [])])
    sys.exit(told(lambda: asyncio.run(parent.run())))


@main.command(short_help="Serve DIR on all interfaces, for others.")
@_DIRECTORY
@_ROOT
@_OFFLINE
@click.option("--inherited", hidden=True)
def run(directory: Path, root: Path | None, *, offline: bool, inherited: str | None) -> None:
    """Serve DIR on all interfaces, in as many processes as http.workers of config.yaml says.

    The first start needs HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD in the environment.
    """
    what = Serving(directory, root, dev=False, offline=offline, version=_version())
    config = None if inherited else told(what.config)
    count = processes(config.http.workers) if config else 1
    if config is None or count == 1:
        _serve(what, inherited)
        return
    workers = Workers(what, config, count)
    code = told(lambda: asyncio.run(workers.run()))
    if workers.again:
        start_again()
    sys.exit(code)


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
    told(lambda: write_project(name, template))
    say(f"Wrote {name}. Next: harperpy dev {shlex.quote(str(name))}")


@main.command(short_help="Load DIR, and say what is wrong with it.")
@_DIRECTORY
def check(directory: Path) -> None:
    """Load DIR as a server would, without serving it, and say what is wrong."""
    health = told(lambda: run_to_end(_check(directory)))
    for name, plugin in health.plugins.items():
        if plugin.status == "error":
            click.echo(f"plugin {name} does not start: {plugin.error}", err=True)
    if health.degraded:
        sys.exit(1)
    has_file = (directory / "config.yaml").exists()
    what = "config.yaml" if has_file else "There is no config.yaml: the defaults"
    click.echo(f"{what} and all plugins are fine.")


def _targeted(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which server an operation goes to."""
    options = (
        _JSON,
        click.option(
            "--api-key", envvar="HARPERPY_API_KEY", show_envvar=True, help="API key for --url."
        ),
        click.option(
            "--url", "--target", "url", help="Operations URL of a remote server, with --api-key."
        ),
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


@main.group(short_help="Add, list and remove users.")
def user() -> None:
    """Add, list and remove users; 'harperpy alter_user username=NAME ...' changes one."""


@user.command("add")
@click.argument("username")
@click.option("--role", default="model_user", show_default=True, help="Name of the user's role.")
@click.option("--tenant", help="Whom the user's calls are billed to.")
@click.password_option(help="Asked for if not given.")
@_targeted
def user_add(username: str, role: str, tenant: str | None, password: str, **where: Any) -> None:
    """Add a user."""
    _asked(where).operate(
        "add_user", username=username, password=password, role=role, tenant=tenant
    )


@user.command("list")
@_targeted
def user_list(**where: Any) -> None:
    """List all users."""
    _asked(where).operate("list_users")


@user.command("drop")
@click.argument("username")
@_targeted
def user_drop(username: str, **where: Any) -> None:
    """Remove a user with its keys and tokens."""
    _asked(where).operate("drop_user", username=username)


@main.group()
def key() -> None:
    """Make, list and end API keys."""


@key.command("add")
@click.argument("name")
@click.option("--user", "username", help="Whose key it is; the first super user's if not given.")
@click.option("--tenant", help="Whom its calls are billed to; its owner's if not given.")
@click.option("--expires-in", help="How long it lives, such as 30d; for ever if not given.")
@click.option(
    "--grants", help='What it may of its owner\'s rights, such as \'{"models": ["gpt-*"]}\'.'
)
@_targeted
def key_add(
    name: str,
    username: str | None,
    tenant: str | None,
    expires_in: str | None,
    grants: str | None,
    **where: Any,
) -> None:
    """Make an API key; it is shown this once."""
    limits = parameters([f"grants={grants}"] if grants else [])
    limits |= {"tenant": tenant, "expires_in": expires_in}
    _asked(where).operate("add_api_key", name=name, username=username, **limits)


@key.command("list")
@_targeted
def key_list(**where: Any) -> None:
    """List API keys by their first letters."""
    _asked(where).operate("list_api_keys")


@key.command("drop")
@click.argument("id")
@_targeted
def key_drop(id: str, **where: Any) -> None:  # noqa: A002
    """End an API key at once."""
    _asked(where).operate("drop_api_key", id=id)


@main.group()
def models() -> None:
    """Fetch, list and remove the demo model's file in your cache."""


@models.command("pull")
@click.argument("name", required=False)
def models_pull(name: str | None) -> None:
    """Fetch a model file now, so that no server has to."""
    _on_files("pull_model_file", name)


@models.command("list")
@_JSON
def models_list(*, as_json: bool) -> None:
    """List the model files that can be fetched."""
    _on_files("list_model_files", None, as_json=as_json)


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
    _asked(where).operate("sql", sql=select)


@main.command(short_help="List what the project's plugins add to these commands.")
@_targeted
def commands(**where: Any) -> None:
    """List what the project's plugins add to these commands.

    Run one as 'harperpy NAME key=value ...', like any operation.
    """
    _asked(where).operate("list_commands")


def _operation(name: str) -> click.Command:
    """The command that runs an operation with the words after its name."""

    @click.command(name, context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1, metavar="[KEY=VALUE]...", type=click.UNPROCESSED)
    @_targeted
    @click.pass_context
    def command(ctx: click.Context, /, words: tuple[str, ...], **where: Any) -> None:
        """Run an operation of the server; a VALUE is JSON, or else text.

        target=URL asks a remote server, as auth_username=NAME with auth_password=PASSWORD.
        json=true answers in JSON instead of YAML.
        """
        try:
            given = parameters(words)
        except ValueError as error:
            ctx.fail(str(error))
        where["as_json"] |= given.pop("json", False) is True
        target = _aimed({**where, "seconds": None}, given)
        if not target.is_project:
            near = nearest(name, main.commands, "commands")
            ctx.fail(
                f"no such command '{name}', and no project here that may add it; {near}"
                " (--dir names a project's folder)"
            )
        target.operate(name.replace("-", "_"), **given)

    return command


def _aimed(where: Mapping[str, Any], given: dict[str, Any] | None = None) -> Target:
    """The server that the options name, or else a command's words. Raises `UsageError`."""
    try:
        return Target(**where).aimed({} if given is None else given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _asked(where: Mapping[str, Any]) -> Target:
    """The server that the options name. Raises `UsageError`, also where there is none to ask."""
    target = _aimed(where)
    if not target.is_project:
        message = (
            f"no project is in {target.directory.resolve()}: name its folder by --dir,"
            " or a server by --url"
        )
        raise click.UsageError(message)
    return target


def _serve(what: Serving, inherited: str | None) -> None:
    given = msgspec.json.decode(inherited, type=Inherited) if inherited else None
    import_from(what.directory)
    if told(lambda: run_to_end(serve(what, given))):
        start_again()


async def _check(directory: Path) -> Health:
    with scratch() as root:
        config = config_of(directory)
        # A database outside of the data folder is in use: the check leaves it alone.
        config = msgspec.structs.replace(config, database=DatabaseConfig())
        import_from(directory)
        server = Server(config, directory=directory, root=root, dev=True)
        logging.disable(logging.CRITICAL)
        await server.open()
        await server.stop()
        return server.health


def _on_files(operation: str, name: str | None, *, as_json: bool = False) -> None:
    """An operation on the user's cache: no project and no running server has a part in it."""

    async def operate() -> Any:
        with scratch() as root:
            server = Server(Config(), directory=root, root=root)
            await server.open()
            try:
                given = {"operation": operation, "name": name}
                return await server.operate({key: value for key, value in given.items() if value})
            finally:
                await server.stop()

    show(told(lambda: run_to_end(operate()), operation), as_json=as_json)


def _version() -> str:
    return importlib.metadata.version("harperpy")
