"""What all parts of a server share, put together from its configuration; its first super user."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from .accounting import Ledger
from .analytics import Analytics
from .attempts import Attempts
from .auth import Authenticators
from .billing import Billing
from .database import Database
from .errors import ConfigError
from .health import Health
from .held import Worker
from .keys import Keys
from .middleware import Middlewares
from .models import Models
from .negotiation import ContentTypes
from .operations import Operations
from .people import SUPER_USER, People
from .ports import Operate
from .registry import Resources
from .routing import Routes
from .scope import Core
from .sections import Config
from .tokens import Tokens

_ADMIN = ("HDB_ADMIN_USERNAME", "HDB_ADMIN_PASSWORD")


def put_together(
    config: Config,
    routes: Routes,
    secret: bytes,
    *,
    directory: Path,
    root: Path,
    dev: bool,
    health: Health,
    environ: Mapping[str, str],
    worker: Worker,
    operate: Operate,
) -> Core:
    """A server's core, nothing of it open yet."""
    authentication = config.authentication
    epoch = worker.epoch()
    authenticators = Authenticators(authentication.cache_seconds, epoch)
    database = _database(config, directory, root, worker)
    attempts = Attempts(authenticators.forget, slow=authentication.slow_guesses)

    def changed(_: object) -> None:
        authenticators.revoke()

    people = People(database, changed, attempts)
    ledger = Ledger(worker.index, worker.of)
    return Core(
        config=config,
        directory=directory,
        root=root,
        dev=dev,
        resources=Resources(),
        operations_resources=Resources(),
        content_types=ContentTypes(),
        middlewares={"rest": Middlewares(), "operations": Middlewares()},
        models=Models(routes, ledger),
        operations=Operations(),
        operate=operate,
        authenticators=authenticators,
        ledger=ledger,
        health=health,
        environ=environ,
        billing=Billing.of(
            config, database, ledger, epoch, index=worker.index, of=worker.of, secret=secret
        ),
        analytics=_analytics(config, worker),
        database=database,
        people=people,
        keys=Keys(database, people, secret, changed),
        tokens=Tokens(
            database,
            people,
            secret,
            changed,
            operation_seconds=authentication.operation_token_seconds,
            refresh_seconds=authentication.refresh_token_seconds,
        ),
    )


async def lacks_first(people: People, environ: Mapping[str, str], *, dev: bool) -> bool:
    """Whether the first super user is to be made.

    Raises `ConfigError` when there is none and the environment names none either.
    """
    name, password = _named(environ)
    if bool(name) != bool(password):
        message = "set HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD both, or neither"
        raise ConfigError(message)
    if await people.first_super_user() is not None:
        return False
    if not (name or dev):
        message = (
            "no super user exists yet: set HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD "
            "for the first start, or use 'harperpy dev'"
        )
        raise ConfigError(message)
    for variable in _ADMIN:
        # Nobody could ever log in by what a file's newline has made of it.
        if not environ.get(variable, "").isprintable():
            message = f"{variable}: expected one line of text; it ends in a newline, or is no UTF-8"
            raise ConfigError(message)
    if name and ":" in name:
        message = "HDB_ADMIN_USERNAME: expected a name without a colon"
        raise ConfigError(message)
    return True


async def make_first(people: People, environ: Mapping[str, str]) -> str | None:
    """Make the first super user. Returns its password if it was made up here."""
    name, password = _named(environ)
    if name and password:
        await people.add_user(name, password, SUPER_USER.role)
        return None
    made_up = secrets.token_urlsafe(15)
    await people.add_user("HDB_ADMIN", made_up, SUPER_USER.role)
    return made_up


def _named(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    name, password = (environ.get(variable) for variable in _ADMIN)
    return name, password


def _database(config: Config, directory: Path, root: Path, worker: Worker) -> Database:
    url = config.database.url
    return Database(
        directory / url.removeprefix("sqlite:///") if url else root / "system.db",
        fsync=config.accounting.durability == "fsync",
        busy_seconds=config.database.busy_timeout / 1000,
        transaction_seconds=config.database.transaction_timeout / 1000,
        audited=config.logging.audit_log,
        # Beside its loop: on another's processor they wake each other for the interpreter's lock.
        writes_on=worker.own,
        reads_on=worker.processors,
    )


def _analytics(config: Config, worker: Worker) -> Analytics | None:
    """What is measured, where somebody reports it."""
    period = config.analytics.aggregate_period
    reported = period > 0 and config.plugins.get("analytics") is not False
    return Analytics(period, worker.index, worker.of) if reported else None
