"""Node's clients, unmodified: each runs its script of tests/node against a server that is live."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import gateway
from harperpy.testing import RunningServer, ScriptedUpstream
from helpers import one_at_a_time, until
from llama import weights
from provider import last_text, provider_upstream, vector

HERE = Path(__file__).resolve().parent / "node"
INSTALLED = HERE.parents[1] / ".node"
# The newest majors on the oldest Node that they run on, and the last majors that run on Node 20.
# After a change of package.json: `npm install --package-lock-only` in its folder.
VERSIONS = ("current", "node20")
CLIENTS = {
    "openai": ("openai.mjs", {}),
    "langchain": ("langchain.mjs", {}),
    "vercel-openai": ("ai.mjs", {"PROVIDER": "openai"}),
    "vercel-compatible": ("ai.mjs", {"PROVIDER": "compatible"}),
}
GATEWAY = """
models:
  generative:
    gpt-4o-mini: {{{provider}}}
    impatient: {{{provider}, firstByteTimeoutMs: 400, requestTimeoutMs: 400}}
  embedding:
    text-embedding-3-small: {{{provider}}}
"""
LOCAL = "models: {generative: {default: {backend: local}}, embedding: {default: {backend: local}}}"
RESOURCES = """
from harperpy import Resource, openai_stream


class MyChat(Resource):
    path = "MyChat/chat/completions"

    @staticmethod
    async def post(target, data, context):
        body = await data
        chunks = context.models.generate_stream(body, model=body["model"])
        async for message in openai_stream(chunks, model=body["model"]):
            yield message
"""


def installed(version: str) -> Path:
    """The folder that holds these packages and the scripts; filled again when the lock changes."""
    folder, lock = INSTALLED / version, HERE / version / "package-lock.json"
    stamp = folder / "installed"
    with one_at_a_time(INSTALLED / "lock"):
        if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
            install(folder, HERE / version)
            shutil.copy(lock, stamp)
        # A module finds its packages from where it stands, so the scripts stand beside them.
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, folder)
    return folder


def install(folder: Path, wanted: Path) -> None:
    """Put what a lock names into a folder, in place of what is there."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.fail("Node's clients need npm (on Debian or Ubuntu: apt install nodejs npm).")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(wanted, folder)
    command = [npm, "ci", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"npm ci failed:\n{done.stdout}{done.stderr}", pytrace=False)


async def run(version: str, script: str, **environ: str) -> None:
    """Run a script's tests; fails with what they said."""
    folder = await asyncio.to_thread(installed, version)
    # Not by way of .bin: npm 9 leaves optional packages out there.
    nodes = list(folder.glob("node_modules/node-*-*/bin/node"))
    assert nodes, f"{version}/package.json names no Node for this machine"
    process = await asyncio.create_subprocess_exec(
        nodes[0],
        *("--test", "--test-reporter=spec", "--test-timeout=60000", script),
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = output.decode()
    counts = {name: int(count) for name, count in re.findall(r"(?m)^\S (\w+) (\d+)$", said)}
    if process.returncode or not counts["pass"] or counts["pass"] != counts["tests"]:
        pytest.fail(said, pytrace=False)


@asynccontextmanager
async def gateway_to(url: str, key: str = "sk-of-the-provider") -> AsyncGenerator[RunningServer]:
    """A server in front of the provider at `url`."""
    entry = f'backend: openai, baseUrl: "{url}", apiKey: {key}, maxRetries: 0'
    async with gateway(GATEWAY.format(provider=entry)) as server:
        yield server


async def run_client(version: str, client: str, server: RunningServer, **more: str) -> None:
    """Run all that a client can do, as a user who may, and one who may not."""
    permission = {"resources": {"v1/models": ["read"]}}
    await server.operate("add_role", role="lister", permission=permission)
    script, environ = CLIENTS[client]
    await run(
        version,
        script,
        **environ,
        **more,
        BASE_URL=f"{server.url}/v1",
        API_KEY=await server.key_for("ada"),
        FORBIDDEN_KEY=await server.key_for("bob", role="lister"),
        VECTOR=json.dumps(vector("the sea")),
    )


async def expect_left(upstream: ScriptedUpstream) -> None:
    """The provider saw its connection close on every stream that the client aborted."""
    hung = [asked for asked in upstream.requests if asked.body and "messages" in asked.body]
    hung = [asked for asked in hung if last_text(asked.body) == "hang"]
    assert hung
    await until(lambda: all(asked.left for asked in hung))


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("version", VERSIONS)
async def test_an_unmodified_client_finds_everything_as_it_expects(
    version: str, client: str
) -> None:
    """Answers, streams, tools, structure, embeddings, every error, an abort, twenty at once."""
    async with provider_upstream() as upstream, gateway_to(upstream.url) as server:
        await run_client(version, client, server)

        await expect_left(upstream)


async def test_a_server_behind_a_server_cannot_be_told_from_a_provider() -> None:
    """OpenAI's client finds all the same with one harperpy as the provider of another."""
    async with (
        provider_upstream() as upstream,
        gateway_to(upstream.url) as inner,
        gateway_to(f"{inner.url}/v1", await inner.key_for("outer")) as outer,
    ):
        await run_client("current", "openai", outer)

        await expect_left(upstream)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_resource_of_ones_own_serves_unmodified_clients(
    version: str, tmp_path: Path
) -> None:
    """A `post` that yields `openai_stream(…)` is an endpoint that all of them stream from."""
    (tmp_path / "resources.py").write_text(RESOURCES)
    async with gateway(directory=tmp_path) as server:
        url = f"{server.url}/MyChat"
        said = {"MODEL": "echo", "TEXT": "hello there friend", "SAYS": "hello there friend"}
        await run(version, "short.mjs", BASE_URL=url, API_KEY=server.api_key, **said)


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_clients_speak_to_echo(version: str) -> None:
    """Whole answers, streams and embeddings come without any provider."""
    async with gateway() as server:
        url = f"{server.url}/v1"
        said = {"MODEL": "echo", "TEXT": "hello there friend", "SAYS": "hello there friend"}
        more = {"WHOLE": "yes", "DIMENSIONS": "16"}
        await run(version, "short.mjs", BASE_URL=url, API_KEY=server.api_key, **said, **more)


async def test_the_clients_speak_to_a_local_model() -> None:
    """Each hears of Paris from a real model, in pieces, and gets a unit vector of another."""
    weights()
    async with gateway(LOCAL) as server:
        url = f"{server.url}/v1"
        said = {"TEXT": "What is the capital of France?", "SAYS": "Paris"}
        more = {"MODEL": "default", "DIMENSIONS": "384"}
        await run("current", "short.mjs", BASE_URL=url, API_KEY=server.api_key, **said, **more)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lock_pins_by_digest_and_names_no_host(version: str) -> None:
    """What is installed is what was tested, from whatever registry a machine uses."""
    wanted = json.loads((HERE / version / "package.json").read_text())
    lock = json.loads((HERE / version / "package-lock.json").read_text())["packages"]
    packages = {name: package for name, package in lock.items() if name}

    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert not any("resolved" in package for package in packages.values())
    for kind in ("dependencies", "optionalDependencies"):
        for name, exact in wanted[kind].items():
            assert exact == packages[f"node_modules/{name}"]["version"]
