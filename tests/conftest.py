"""What all tests share: a server of their own, and the real model behind the slow ones."""

import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from clients import Live, live_gateways, live_local_gateway
from harperpy.testing import RunningServer, ScriptedUpstream, running, scripted_upstream
from llama import LlamaServer, llama_server


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    """A server with the default configuration: every model is echo."""
    async with running() as server:
        yield server


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
