"""What a key of config.yaml changes in a running server, key by key."""

import re
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import jwt
import pytest

from commands import ADMIN, FREE, configured, get, refusal, serving
from harperpy import Scope
from harperpy.auth import Bearer, Credential, Verified
from harperpy.config import parse_config
from harperpy.server import Server
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, on_free_ports, running
from helpers import HELLO, ask, basic, operation, provider

MORE_THAN_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback"
)
PAGE = "https://page.example"


# Where it is served


@asynccontextmanager
async def started(tmp_path: Path, config: str, *, dev: bool) -> AsyncIterator[RunningServer]:
    """A server on free ports, as `dev` or `run` has it."""
    parsed = on_free_ports(parse_config(config, source="config.yaml", environ={}))
    server = Server(parsed, directory=tmp_path, dev=dev, environ=ADMIN)
    await server.start()
    try:
        yield RunningServer(server, "")
    finally:
        await server.stop()


HOSTS: dict[str, tuple[bool, str, bool, bool]] = {
    "dev, nothing said": (True, "", False, False),
    "run, nothing said": (False, "", True, False),
    "dev, all of REST": (True, "http: {host: 0.0.0.0}", True, False),
    "run, REST here alone": (False, "http: {host: localhost}", False, False),
    "run, one address of REST": (False, "http: {host: 127.0.0.1}", False, False),
    "run, all of both": (False, "operationsApi: {network: {host: 0.0.0.0}}", True, True),
}


@MORE_THAN_LINUX
@pytest.mark.parametrize(("dev", "said", "rest", "operations"), HOSTS.values(), ids=HOSTS)
async def test_a_port_is_open_to_whom_its_host_says(
    tmp_path: Path, said: str, *, dev: bool, rest: bool, operations: bool
) -> None:
    """Both ports on loopback, but REST on all interfaces of `run`."""
    async with started(tmp_path, f"{ECHO}\n{said}", dev=dev) as server:
        for here, elsewhere in ((server.url, rest), (server.operations_url, operations)):
            assert (200, {"status": "ok"}) == await get(f"{here}/health")
            # Another address of this machine stands for another interface.
            there = f"{here.replace('127.0.0.1', '127.0.0.2')}/health"
            if elsewhere:
                assert 200 == (await get(there))[0]
            else:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await get(there)


@pytest.mark.parametrize("key", ["http.port", "operationsApi.network.port"])
async def test_the_port_is_the_one_that_is_named(tmp_path: Path, deaf_port: int, key: str) -> None:
    """Where it cannot be had, the start is refused with the key that names it."""
    named = FREE.replace("port: 0", f"port: {deaf_port}", 1)
    if key != "http.port":
        named = f"http: {{port: 0}}\noperationsApi: {{network: {{port: {deaf_port}}}}}\n"
    (tmp_path / "config.yaml").write_text(f"{named}{ECHO}\n")

    told = await refusal(tmp_path, "run", **ADMIN)

    assert f":{deaf_port} ({key}): the port is in use" in told


async def test_both_ports_say_that_they_start_until_all_plugins_have(tmp_path: Path) -> None:
    """503 on /health, 503 and a time to come again on all else; 200 once they are loaded."""
    found: list[tuple[int, Any, bool]] = []

    async def apply(scope: Scope) -> None:
        del scope
        asked = RunningServer(server, "")
        for url in (asked.url, asked.operations_url):
            for path in ("/health", "/v1/models"):
                answer = await ask(asked, "GET", f"{url}{path}", key="")
                found.append((answer.status, answer.json, "Retry-After" in answer.headers))

    parsed = on_free_ports(parse_config(ECHO, source="config.yaml", environ={}))
    plugin = SimpleNamespace(handle_application=apply)
    server = Server(parsed, directory=tmp_path, environ=ADMIN, plugins={"test": plugin})
    await server.start()
    try:
        ready = RunningServer(server, "")
        for url in (ready.url, ready.operations_url):
            assert (200, {"status": "ok"}) == await get(f"{url}/health")
    finally:
        await server.stop()

    assert [(503, {"status": "starting"}, False)] * 2 == found[::2]
    assert [(503, True)] * 2 == [(status, again) for status, _, again in found[1::2]]


# Pages of other origins


@pytest.mark.parametrize("listed", ["", "corsAccessList: []", f"corsAccessList: ['{PAGE}']"])
async def test_only_pages_that_are_listed_may_call(listed: str) -> None:
    """A list that is not there is any page, an empty one none; on both ports."""
    section = f"cors: true, {listed}"
    config = f"{ECHO}\nhttp: {{{section}}}\noperationsApi: {{network: {{{section}}}}}"
    async with running(config) as server:
        for url in (server.url, server.operations_url):
            answer = await ask(server, "GET", f"{url}/health", headers={"Origin": PAGE})
            allowed = answer.headers.get("Access-Control-Allow-Origin")
            assert (None if listed.endswith("[]") else PAGE) == allowed


# Who is trusted, and for how long


@pytest.mark.parametrize(
    ("said", "asked"), [("{}", 1), ("{cacheTTL: 0}", 3), ("{cacheTTL: 1h}", 1)]
)
async def test_a_credential_is_remembered_as_long_as_the_cache_says(said: str, asked: int) -> None:
    """By default for three requests in a row; with 0 each of them is verified."""
    seen: list[str] = []

    def apply(scope: Scope) -> None:
        async def vouch(credential: Credential) -> Verified | None:
            if not isinstance(credential, Bearer) or credential.token != "door":
                return None
            seen.append(credential.token)
            user = await scope.people.user("HDB_ADMIN")
            return user and Verified(user, None)

        scope.authenticators.append(vouch)

    async with running(f"{ECHO}\nauthentication: {said}", handle_application=apply) as server:
        for _ in range(3):
            assert 200 == (await get(f"{server.url}/v1/models", "Bearer door"))[0]
    assert asked == len(seen)


LIVES: dict[str, tuple[str, int, int]] = {
    "nothing said": ("{}", 86_400, 30 * 86_400),
    "the operation token": ("{operationTokenTimeout: 2h}", 7_200, 30 * 86_400),
    "the refresh token": ("{refreshTokenTimeout: 3d}", 86_400, 3 * 86_400),
    "both, in milliseconds": (
        "{operationTokenTimeout: 60000, refreshTokenTimeout: 90000}",
        60,
        90,
    ),
}


@pytest.mark.parametrize(("said", "operating", "refreshing"), LIVES.values(), ids=LIVES)
async def test_each_kind_of_token_lives_as_long_as_its_key_says(
    said: str, operating: int, refreshing: int
) -> None:
    """The token itself says when it ends; one made by refreshing lives as long."""
    async with running(f"{ECHO}\nauthentication: {said}") as server:
        admin = f"Bearer {server.api_key}"
        _, made = await operation(server, {"operation": "create_authentication_tokens"}, admin)
        refresh = f"Bearer {made['refresh_token']}"
        _, again = await operation(server, {"operation": "refresh_operation_token"}, refresh)

    tokens = (made["operation_token"], again["operation_token"], made["refresh_token"])
    assert [operating, operating, refreshing] == [_life(token) for token in tokens]


def _life(token: str) -> int:
    claims: dict[str, float] = jwt.decode(token, options={"verify_signature": False})
    return int(claims["exp"]) - int(claims["iat"])


@pytest.mark.parametrize("said", ["{}", "{hashFunction: argon2id}"])
async def test_a_password_is_kept_as_the_hash_function_makes_it(tmp_path: Path, said: str) -> None:
    """Argon2id is the one that there is, and the default."""
    async with running(f"{ECHO}\nauthentication: {said}", root=tmp_path) as server:
        await server.key_for("ada")
    with closing(sqlite3.connect(tmp_path / "system.db")) as database:
        kept = [row[0] for row in database.execute("SELECT password FROM hdb_user")]
    assert 2 == len(kept)
    assert all(one.startswith("$argon2id$") for one in kept)


# What comes from the environment


async def test_a_variable_is_used_where_it_stands(upstream: ScriptedUpstream) -> None:
    """The provider is sent the key of the environment, and a limit of it holds."""
    config = """
http: {maxBodySize: "${LIMIT}"}
models:
  generative:
    default: {backend: openai, model: gpt-4o-mini, baseUrl: "${URL}", apiKey: "${KEY}"}
"""
    environ = {"LIMIT": "500", "URL": upstream.url, "KEY": "made-up-key"}
    async with running(config, environ=environ) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", json=HELLO)
        large = {**HELLO, "user": "x" * 500}
        refused = await ask(server, "POST", "/v1/chat/completions", json=large)

    assert (200, 413) == (answer.status, refused.status)
    assert ["Bearer made-up-key"] == [one.headers["Authorization"] for one in upstream.requests]


async def test_a_provider_may_take_a_user_and_password_of_its_url(
    upstream: ScriptedUpstream,
) -> None:
    """They are sent as the header that they stand for."""
    url = upstream.url.replace("://", "://ada:pw@")
    async with running(provider(url)) as server:
        assert 200 == (await ask(server, "POST", "/v1/chat/completions", json=HELLO)).status
    assert [basic("ada", "pw")] == [one.headers["Authorization"] for one in upstream.requests]


async def test_a_provider_takes_no_two_credentials(tmp_path: Path) -> None:
    """One header cannot say both: the start is refused, and neither is shown."""
    config = provider("http://ada:hunter2@127.0.0.1:1/v1", "apiKey: hunter2")
    (tmp_path / "config.yaml").write_text(config)

    told = await refusal(tmp_path, "check")

    expected = "models.generative.default.baseUrl: expected no user and password beside an apiKey"
    assert told.endswith(expected)
    assert "hunter2" not in told


# What is logged

LOUD = """
def handle_application(scope):
    for level in ("debug", "info", "warning", "error"):
        getattr(scope.logger, level)("this is %s", level)
"""
LEVELS: dict[str, tuple[str, str, list[str]]] = {
    "dev, nothing said": ("dev", "{}", ["info", "warning", "error"]),
    "run, nothing said": ("run", "{}", ["warning", "error"]),
    "run, debug": ("run", "{level: debug}", ["debug", "info", "warning", "error"]),
    "dev, error": ("dev", "{level: error}", ["error"]),
}


@pytest.mark.parametrize(("command", "said", "levels"), LEVELS.values(), ids=LEVELS)
async def test_the_log_begins_at_its_level(
    tmp_path: Path, command: str, said: str, levels: list[str]
) -> None:
    """`dev` says what happens, `run` what is wrong, unless `logging.level` says else."""
    more = f"plugins: {{loud: {{path: loud.py}}}}\nlogging: {said}\n"
    folder = configured(tmp_path / "project", more)
    (folder / "loud.py").write_text(LOUD)
    arguments = ["dev", "--no-reload"] if command == "dev" else ["run"]
    async with serving(folder, *arguments, environ=ADMIN):
        pass
    assert levels == re.findall(r"this is (\w+)", (folder / "log").read_text())


TALKS = """
def handle_application(scope):
    scope.logger.info("config %s", scope.config)
    scope.logger.info("models %r", scope.config.models.generative)
    scope.logger.info("secret %s", scope.secrets.get("MY_SECRET"))
    scope.logger.info("options %s", scope.options)
"""
TALKING = """
models:
  generative:
    default:
      backend: openai
      model: m
      apiKey: "${MY_SECRET}"
      baseUrl: "http://127.0.0.1:1/v1"
      maxRetries: 0
    proxied: {backend: openai, model: m, baseUrl: "http://u:hunter2@127.0.0.1:1", maxRetries: 0}
plugins: {talks: {path: talks.py, password: hunter2, nested: {api_key: hunter2}}}
logging: {level: debug}
"""


async def test_the_log_has_no_secret_even_where_it_says_all(tmp_path: Path) -> None:
    """Neither keys of the configuration, nor what callers send: credentials, bodies, queries."""
    (tmp_path / "config.yaml").write_text(FREE + TALKING)
    (tmp_path / "talks.py").write_text(TALKS)
    environ = {**ADMIN, "HDB_ADMIN_PASSWORD": "hunter2", "MY_SECRET": "sk-hunter2"}
    body = {"messages": [{"role": "user", "content": "hunter2"}]}
    admin = basic("root", "hunter2")
    async with serving(tmp_path, "run", environ=environ) as server:
        statuses = [
            (await get(f"{server.url}/v1/models", "Bearer hk_hunter2"))[0],
            (await get(f"{server.url}/v1/models", basic("root", "no hunter2")))[0],
            (await get(f"{server.url}/nothing?api_key=hunter2", admin))[0],
            await _post(f"{server.url}/v1/chat/completions", admin, body),
            await _post(f"{server.url}/v1/chat/completions", admin, {**body, "model": "proxied"}),
            await _post(server.operations_url, admin, _user("hunter2")),
        ]
    log = (tmp_path / "log").read_text()

    assert [401, 401, 404, 502, 502, 200] == statuses
    assert "hunter2" not in log
    assert 3 <= log.count("[redacted]")
    assert "404 NotFound" in log


def _user(password: str) -> dict[str, str]:
    return {"operation": "add_user", "username": "a", "password": password, "role": "model_user"}


async def _post(url: str, credential: str, body: Any) -> int:
    async with (
        aiohttp.ClientSession(headers={"Authorization": credential}) as session,
        session.post(url, json=body) as response,
    ):
        return response.status
