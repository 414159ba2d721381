"""A running server and its client, for our tests and for plugin authors'.

Run pytest with `-p harperpy.testing` and `asyncio_mode = auto` for the fixtures `harper_server`
(the project in pytest's root folder, on free ports, with data of its own) and `harper_client`. To
run it in an environment of your own, or on models that cost nothing, override these in conftest.py:

    @pytest.fixture
    def harper_environ():
        return {"OPENAI_API_KEY": "none"}

    @pytest.fixture
    def harper_config(harper_config):
        return with_echo(harper_config)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from .config import load_config, parse_config
from .resource import Resource
from .scope import Scope
from .sections import Config, ModelConfig
from .server import Server
from .upstream import (
    Answer,
    ScriptedUpstream,
    ServedRequest,
    chunk,
    scripted_upstream,
    streamed,
    whole,
)

__all__ = [
    "ECHO",
    "Answer",
    "RunningServer",
    "ScriptedUpstream",
    "ServedRequest",
    "chunk",
    "harper_client",
    "harper_config",
    "harper_environ",
    "harper_server",
    "running",
    "scripted_upstream",
    "streamed",
    "whole",
    "with_echo",
]

ECHO = "models: {generative: {default: {backend: echo}}, embedding: {default: {backend: echo}}}"
"""A config.yaml whose models all answer with what they were asked."""


class RunningServer:
    """A server on free ports: where it is, and its first super user's key."""

    server: Server
    """The server itself."""
    api_key: str
    """A super user's."""
    url: str
    """Of the REST port, without a slash at its end."""
    operations_url: str
    """Of the operations port, likewise."""

    def __init__(self, server: Server, api_key: str) -> None:
        self.server = server
        self.api_key = api_key
        self.url = f"http://127.0.0.1:{server.http_port}"
        self.operations_url = f"http://127.0.0.1:{server.operations_port}"

    async def operate(self, operation: str, **parameters: Any) -> Any:
        """Run an operation as super user; raises what it refuses with."""
        return await self.server.operate({"operation": operation, **parameters})

    async def rows(self, where: str = "1 = 1") -> list[dict[str, Any]]:
        """The recorded model calls, newest first."""
        sql = f"SELECT * FROM system.hdb_model_calls WHERE {where} ORDER BY $createdtime DESC"  # noqa: S608
        rows: list[dict[str, Any]] = await self.operate("sql", sql=sql)
        return rows

    async def key_for(self, username: str, role: str = "model_user", **more: Any) -> str:
        """An API key for a new user."""
        user = {"username": username, "password": "pw", "role": role}
        await self.operate("add_user", **user, **more)
        made: dict[str, str] = await self.operate("add_api_key", name="test", username=username)
        return made["api_key"]

    def session(self, api_key: str | None = None) -> aiohttp.ClientSession:
        """An HTTP client of the REST port; without a key if that is empty."""
        key = self.api_key if api_key is None else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return aiohttp.ClientSession(self.url, headers=headers)


@asynccontextmanager
async def running(
    config: str | Config = ECHO,
    *,
    directory: Path | None = None,
    root: Path | None = None,
    resources: Mapping[str, type[Resource]] | None = None,
    handle_application: Callable[[Scope], Any] | None = None,
    environ: Mapping[str, str] | None = None,
    offline: bool = False,
) -> AsyncGenerator[RunningServer]:
    """A server in dev mode on free ports.

    `config` is the text of a config.yaml, by default one whose models are all `echo`; `resources`
    are mounted, `handle_application` is called, as a plugin named `test` would do it.
    """

    def apply(scope: Scope) -> Any:
        for path, resource in (resources or {}).items():
            scope.resources.set(path, resource)
        return handle_application(scope) if handle_application else None

    if isinstance(config, str):
        config = parse_config(config, source="config.yaml", environ=environ or {})
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            on_free_ports(config),
            directory=directory or Path(folder),
            root=root or Path(folder) / "data",
            dev=True,
            environ=environ or {},
            plugins={"test": SimpleNamespace(handle_application=apply)},
            offline=offline,
        )
        await server.start()
        try:
            first = server.first_start
            key = first.api_key if first else await _new_key(server)
            yield RunningServer(server, key)
        finally:
            await server.stop()


async def _new_key(server: Server) -> str:
    made: dict[str, str] = await server.operate({"operation": "add_api_key", "name": "test"})
    return made["api_key"]


def on_free_ports(config: Config) -> Config:
    """The same configuration on ports that the system picks."""
    replace = msgspec.structs.replace
    network = replace(config.operations_api.network, port=0)
    return replace(
        config,
        http=replace(config.http, port=0),
        operations_api=replace(config.operations_api, network=network),
    )


def with_echo(config: Config) -> Config:
    """The same configuration with `echo` in the place of each model, under the names it has."""

    def echoes(models: Mapping[str, ModelConfig]) -> Mapping[str, ModelConfig]:
        return {
            name: ModelConfig(backend="echo", model=one.model, fallback=one.fallback)
            for name, one in models.items()
        }

    replace = msgspec.structs.replace
    models = config.models
    both = (echoes(models.generative), echoes(models.embedding))
    return replace(config, models=replace(models, generative=both[0], embedding=both[1]))


@pytest.fixture
def harper_environ() -> Mapping[str, str]:
    """The environment of `harper_server`, for `${NAME}` in config.yaml and for secrets."""
    return os.environ


@pytest.fixture
def harper_config(
    request: pytest.FixtureRequest, harper_environ: Mapping[str, str]
) -> str | Config:
    """What `harper_server` runs with: config.yaml. An override may return one as text, too."""
    return load_config(request.config.rootpath / "config.yaml", harper_environ)


@pytest_asyncio.fixture
async def harper_server(
    request: pytest.FixtureRequest,
    harper_config: str | Config,
    harper_environ: Mapping[str, str],
) -> AsyncIterator[RunningServer]:
    """The project in pytest's root folder, running; a plugin that does not start fails the test."""
    directory = request.config.rootpath
    async with running(harper_config, directory=directory, environ=harper_environ) as server:
        for name, plugin in server.server.health.plugins.items():
            if plugin.status == "error":
                pytest.fail(f"plugin {name} did not start: {plugin.error}", pytrace=False)
        yield server


@pytest_asyncio.fixture
async def harper_client(harper_server: RunningServer) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of the running project, as its super user."""
    async with harper_server.session() as session:
        yield session
