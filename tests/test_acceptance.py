"""The mission, once, with nothing replaced: real clients, real ports, a real model, SQL."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from harperpy import Server
from harperpy.config import parse_config
from harperpy.testing import RunningServer
from llama import LlamaServer

CHAT = """
import openai
client = openai.OpenAI(api_key="{key}", base_url="http://localhost:9926/v1")
r = client.chat.completions.create(model="gpt-4o-mini", messages=[{{"role": "user", "content": "say hello in three words"}}])
print(r.choices[0].message.content)
"""

STREAM = """
import openai
client = openai.OpenAI(api_key="{key}", base_url="http://localhost:9926/v1")
stream = client.chat.completions.create(model="gpt-4o-mini", messages=[{{"role": "user", "content": "count to five"}}], stream=True)
for chunk in stream: print(chunk.choices[0].delta.content or "", end="")
"""

EMBED = """
import openai
client = openai.OpenAI(api_key="{key}", base_url="http://localhost:9926/v1")
r = client.embeddings.create(model="gpt-4o-mini", input=["the sea", "the ocean"])
print(len(r.data), len(r.data[0].embedding), r.usage.prompt_tokens)
"""

SQL = (
    "SELECT * FROM system.hdb_model_calls WHERE backend = 'openai' "
    "ORDER BY $createdtime DESC LIMIT 1"
)

CONFIG = """
models:
  generative:
    default: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", apiKey: "{key}"}}
  embedding:
    default: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", apiKey: "{key}"}}
"""


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return False
    return True


@pytest.fixture
async def served(llama: LlamaServer, tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A server on the standard ports, in front of the real model."""
    for port in (9926, 9925):
        assert not _taken(port), f"port {port} must be free for this test"
    text = CONFIG.format(url=llama.url, key=llama.api_key)
    config = parse_config(text, source="config.yaml", environ={})
    server = Server(config, directory=tmp_path, dev=True, environ={})
    await server.start()
    assert server.first_start is not None
    try:
        yield RunningServer(server, server.first_start.api_key)
    finally:
        await server.stop()


async def _script(text: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", text, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert 0 == process.returncode, err.decode()
    return out.decode()


async def _operate(credential: str, **body: str) -> object:
    headers = {"Authorization": credential}
    async with (
        aiohttp.ClientSession() as session,
        session.post("http://localhost:9925/", json=body, headers=headers) as response,
    ):
        assert 200 == response.status, await response.text()
        return await response.json()


async def test_an_unmodified_client_calls_a_real_model_and_sql_shows_the_call(
    served: RunningServer,
) -> None:
    """Chat, stream and embedding work as written, by key and by token, and each leaves its row."""
    bearer = f"Bearer {served.api_key}"
    await _operate(
        bearer,
        operation="add_user",
        username="ada",
        password="pw",
        role="model_user",
        tenant="acme",
    )
    made = await _operate(bearer, operation="add_api_key", name="laptop", username="ada")
    tokens = await _tokens("ada", "pw")
    assert isinstance(made, dict)
    for credential in (made["api_key"], tokens["operation_token"]):
        said = await _script(CHAT.format(key=credential))
        assert "hello" in said.lower()
        await _expect_row(bearer, "generate")

        counted = await _script(STREAM.format(key=credential))
        assert len(counted.split()) > 3
        await _expect_row(bearer, "generateStream")

        embedded = await _script(EMBED.format(key=credential))
        assert "2 576" in embedded
        await _expect_row(bearer, "embed")


async def _tokens(username: str, password: str) -> dict[str, str]:
    body = {
        "operation": "create_authentication_tokens",
        "username": username,
        "password": password,
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post("http://localhost:9925/", json=body) as response,
    ):
        assert 200 == response.status
        return await response.json()


async def _expect_row(bearer: str, method: str) -> None:
    rows = await _operate(bearer, operation="sql", sql=SQL)
    assert isinstance(rows, list)
    (row,) = rows
    assert method == row["method"]
    assert row["success"] is True
    assert "acme" == row["tenant"]
    assert "ada" == row["user"]
    assert "gpt-4o-mini" == row["model"] == row["provider_model"]
    counted = row["embedding_tokens" if method == "embed" else "completion_tokens"]
    assert counted > 0
    assert row["usage_estimated"] is False
