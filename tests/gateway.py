"""A gateway for the suites of real clients, run in the way that HARPERPY_CLIENTS names.

- `default`: in this process.
- `transport-aiohttp`: likewise, with `transport: aiohttp` at each model of a provider.
- `front-off`: likewise, with `http.front: off`.
- `two-workers`: `harperpy run`, with `http.workers: 2`.

`make clients` runs the suites in all of them.
"""

import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from msgspec.structs import replace

from commands import ADMIN, serving
from harperpy.config import parse_config
from harperpy.sections import Config, ModelConfig, ModelsConfig
from harperpy.testing import ECHO, RunningServer, running
from helpers import basic

WORKERS = """
http: {port: 0, host: 127.0.0.1, workers: 2}
operationsApi: {network: {port: 0}}
"""

Gateway: TypeAlias = AbstractAsyncContextManager[RunningServer]


def gateway(config: str = ECHO, directory: Path | None = None) -> Gateway:
    """A server with this config.yaml, and the project in this folder."""
    return WAYS[os.environ.get("HARPERPY_CLIENTS", "default")](config, directory)


class Processes(RunningServer):
    """Workers, which answer as one server; there is none to look into."""

    def __init__(self, url: str, operations_url: str) -> None:
        self.url = url
        self.operations_url = operations_url

    async def operate(self, operation: str, **parameters: Any) -> Any:
        """The result of an operation, from whichever worker is asked."""
        headers = {"Authorization": basic(*ADMIN.values())}
        body = {"operation": operation, **parameters}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(self.operations_url, json=body) as response,
        ):
            assert 200 == response.status, await response.text()
            return await response.json()


def _one_process(
    change: Callable[[Config], Config], config: str, directory: Path | None
) -> Gateway:
    read = parse_config(config, source="config.yaml", environ={})
    return running(change(read), directory=directory)


@asynccontextmanager
async def _two_workers(config: str, directory: Path | None) -> AsyncGenerator[RunningServer]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = directory or Path(temporary)
        (folder / "config.yaml").write_text(config + WORKERS)
        async with serving(folder, "run", environ=ADMIN) as process:
            server = Processes(process.url, process.operations_url)
            made = await server.operate("add_api_key", name="test")
            server.api_key = made["api_key"]
            yield server


def _unchanged(config: Config) -> Config:
    return config


def _over_aiohttp(config: Config) -> Config:
    def changed(models: Mapping[str, ModelConfig]) -> Mapping[str, ModelConfig]:
        return {name: replace(one, transport="aiohttp") for name, one in models.items()}

    both = changed(config.models.generative), changed(config.models.embedding)
    return replace(config, models=ModelsConfig(generative=both[0], embedding=both[1]))


def _without_front(config: Config) -> Config:
    return replace(config, http=replace(config.http, front=False))


WAYS: Mapping[str, Callable[[str, Path | None], Gateway]] = {
    "default": partial(_one_process, _unchanged),
    "transport-aiohttp": partial(_one_process, _over_aiohttp),
    "front-off": partial(_one_process, _without_front),
    "two-workers": _two_workers,
}
