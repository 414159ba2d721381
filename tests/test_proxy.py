"""A provider behind a proxy, as the environment says it."""

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import openai
import pytest

from commands import FREE, serving
from helpers import until
from raw_provider import Provider, certificate

ENTRY = (
    '{{backend: openai, model: m, baseUrl: "{scheme}://localhost:{port}/v1", maxRetries: 0, '
    "transport: {transport}}}"
)


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[int]:
    """The port of a proxy that lets nobody pass but `someone`."""
    told = tmp_path / "port"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "--hostname", "127.0.0.1", "--port", "0"),
        *("--num-workers", "1", "--num-acceptors", "1", "--basic-auth", "someone:made-up"),
        *("--port-file", str(told), "--log-level", "ERROR"),
    )
    try:
        await until(lambda: told.exists() and bool(told.read_text()))
        yield int(told.read_text())
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    ("who", "without", "transport", "reached"),
    [
        ("someone:made-up@", "", "aiohttp", True),
        ("", "", "aiohttp", False),
        ("", "localhost", "aiohttp", True),
        ("", "", "own", True),
    ],
)
async def test_a_proxy_is_heeded_where_an_entry_says_so(  # the table's columns
    who: str, without: str, transport: str, *, reached: bool, proxy: int, tmp_path: Path
) -> None:
    """By `transport: aiohttp`, over TLS too, but for who is in NO_PROXY; else nobody asks it."""
    path = certificate(tmp_path)
    secure = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    secure.load_cert_chain(path)
    told = f"http://{who}127.0.0.1:{proxy}"
    environ = {"HTTP_PROXY": told, "HTTPS_PROXY": told, "NO_PROXY": without}
    them = Provider()
    config = f"{FREE}models:\n  generative:\n"
    async with AsyncExitStack() as stack:
        for scheme, context in (("http", None), ("https", secure)):
            listener = await asyncio.start_server(them.serve, "127.0.0.1", 0, ssl=context)
            await stack.enter_async_context(listener)
            port = listener.sockets[0].getsockname()[1]
            entry = ENTRY.format(scheme=scheme, port=port, transport=transport)
            config += f"    {scheme}: {entry}\n"
        (tmp_path / "config.yaml").write_text(config)
        server = await stack.enter_async_context(
            serving(tmp_path, environ={**environ, "SSL_CERT_FILE": str(path)})
        )
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(api_key=server.key, base_url=f"{server.url}/v1", max_retries=0)
        )
        said = [await ask(client, scheme) for scheme in ("http", "https")]

    assert ["again" if reached else "502"] * 2 == said
    assert [1, 1] * reached == them.asked
    assert "made-up" not in (tmp_path / "log").read_text()


async def ask(client: openai.AsyncOpenAI, model: str) -> str:
    """What a model says, or the status that refuses it."""
    try:
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}]
        )
    except openai.APIStatusError as error:
        return str(error.status_code)
    return answer.choices[0].message.content or ""
