"""The operations port: what each operation answers, whom it refuses, and how that is worded."""

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from harperpy import ServiceUnavailable
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running
from helpers import HELLO, ask, basic, operation, provider

ACCEPTANCE = (
    "SELECT * FROM system.hdb_model_calls WHERE backend = 'openai' "
    "ORDER BY $createdtime DESC LIMIT 1"
)
MODEL_USER = {
    "id": "model_user",
    "role": "model_user",
    "permission": {
        "super_user": False,
        "resources": {"v1/*": ["read", "create"]},
    },
}
ADA = {"username": "ada", "active": True, "tenant": "acme", "role": MODEL_USER}


class Caller:
    """One who asks the operations port, known by a credential or by none."""

    def __init__(self, server: RunningServer, credential: str | None = None) -> None:
        self.server = server
        self.credential = credential

    async def ask(self, name: str, /, **parameters: Any) -> tuple[int, Any]:
        """Status and body of an answer."""
        body = {"operation": name, **parameters}
        return await operation(self.server, body, self.credential)

    async def get(self, name: str, /, **parameters: Any) -> Any:
        """The body of an answer that must be a good one."""
        status, body = await self.ask(name, **parameters)
        assert 200 == status, body
        return body


@pytest.fixture
def admin(server: RunningServer) -> Caller:
    """The first super user."""
    return Caller(server, f"Bearer {server.api_key}")


@pytest.fixture
async def ada(server: RunningServer) -> Caller:
    """A user with the role that ships for callers of models."""
    key = await server.key_for("ada", tenant="acme")
    return Caller(server, f"Bearer {key}")


@pytest.fixture
def nobody(server: RunningServer) -> Caller:
    """Someone without a credential."""
    return Caller(server)


# The port itself


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
async def test_only_post_runs_operations(server: RunningServer, method: str) -> None:
    """Any other method is 405, in the port's own words."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{server.operations_url}/") as response,
    ):
        told = await response.json()

    assert (405, "POST, OPTIONS") == (response.status, response.headers["Allow"])
    assert {"error": f"Method {method} is not allowed here; allowed: POST, OPTIONS."} == told


async def health(url: str, credential: str | None) -> tuple[int, Any]:
    """What `GET /health` says."""
    headers = {"Authorization": credential} if credential else {}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/health", headers=headers) as response,
    ):
        return response.status, await response.json()


async def test_health_tells_everyone_that_all_is_well(
    server: RunningServer, ada: Caller, admin: Caller
) -> None:
    """Both ports say ok to anyone, even with a wrong key, and the plugins to super users."""
    for url in (server.url, server.operations_url):
        for credential in (None, "Bearer hk_wrong", "nonsense", ada.credential):
            assert (200, {"status": "ok"}) == await health(url, credential)

        status, told = await health(url, admin.credential)
        assert (200, "ok", {"status", "plugins"}) == (status, told["status"], set(told))
        assert {"users", "operations_api", "model_calls"} <= set(told["plugins"])
        assert [{"status": "ok", "error": None}] * len(told["plugins"]) == [
            *told["plugins"].values()
        ]


BODIES: dict[str, tuple[Any, str]] = {
    "a list": ([1], "Invalid JSON."),
    "a text": ("user_info", "Invalid JSON."),
    "null": (None, "Invalid JSON."),
    "empty": ({}, "Request body must include an 'operation' property."),
    "a number": ({"operation": 1}, "Request body must include an 'operation' property."),
    "no name": ({"operation": ""}, "Request body must include an 'operation' property."),
    "misspelt": (
        {"operation": "ad_user"},
        "Operation 'ad_user' not found; did you mean 'add_user'?",
    ),
    "unknown": ({"operation": "zzz"}, "Operation 'zzz' not found"),
    "endless": ({"operation": "z" * 100_000}, f"Operation '{'z' * 100}' not found"),
}


@pytest.mark.parametrize(("body", "expected"), BODIES.values(), ids=BODIES)
async def test_a_body_that_names_no_operation(admin: Caller, body: Any, expected: str) -> None:
    """It is 400 and says what is wrong; an unknown name is answered with the nearest."""
    assert (400, {"error": expected}) == await operation(admin.server, body, admin.credential)


async def test_a_body_that_is_no_json(admin: Caller) -> None:
    """It is 400, and nothing of the parser's inside is told."""
    headers = {"Authorization": str(admin.credential), "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{admin.server.operations_url}/", data=b'{"operation": ') as response,
    ):
        told = await response.json()

    assert 400 == response.status
    assert told["error"].startswith("the body is not valid JSON")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("add_user", {"password": "pw", "role": "model_user"}, "username"),
    ("add_user", {"username": "", "password": "pw", "role": "model_user"}, "username"),
    ("add_user", {"username": 7, "password": "pw", "role": "model_user"}, "username"),
    ("add_user", {"username": "x", "password": "", "role": "model_user"}, "password"),
    ("add_user", {"username": "x", "password": "pw"}, "role"),
    ("add_user", {"username": "x", "password": "pw", "role": "model_user", "active": 1}, "active"),
    ("add_user", {"username": "x", "password": "pw", "role": "model_user", "tenant": ""}, "tenant"),
    ("add_user", {"username": "x", "password": "pw", "role": "model_user", "admin": True}, "admin"),
    ("alter_user", {"active": True}, "username"),
    ("alter_user", {"username": "x", "role": ""}, "role"),
    ("alter_user", {"username": "x", "active": "no"}, "active"),
    ("drop_user", {}, "username"),
    ("list_users", {"limit": 1}, "limit"),
    ("add_role", {"permission": {}}, "role"),
    ("add_role", {"role": "x"}, "permission"),
    ("add_api_key", {}, "name"),
    ("add_api_key", {"name": ""}, "name"),
    ("drop_api_key", {"id": None}, "id"),
    ("sql", {}, "sql"),
    ("sql", {"sql": 1}, "sql"),
    ("user_info", {"username": "ada"}, "username"),
    ("refresh_operation_token", {"refresh_token": 1}, "refresh_token"),
    ("create_authentication_tokens", {"username": "", "password": "pw"}, "username"),
]


@pytest.mark.parametrize(("name", "parameters", "field"), BAD)
async def test_bad_parameters_name_the_field(
    admin: Caller, name: str, parameters: dict[str, Any], field: str
) -> None:
    """A missing, empty, mistyped or unknown parameter is 400, and the sentence names it."""
    status, told = await admin.ask(name, **parameters)

    assert 400 == status
    assert {"error", "errors"} == set(told)
    assert field in told["error"]
    assert [{"path", "message"}] == [set(error) for error in told["errors"]]


CLOSED: dict[str, dict[str, Any]] = {
    "add_user": {"username": "eve", "password": "pw", "role": "super_user"},
    "alter_user": {"username": "ada", "role": "super_user"},
    "drop_user": {"username": "HDB_ADMIN"},
    "list_users": {},
    "add_role": {"role": "mine", "permission": {"super_user": True}},
    "list_roles": {},
    "get_configuration": {},
    "get_status": {},
    "list_commands": {},
}
OWN: dict[str, dict[str, Any]] = {
    "sql": {"sql": "SELECT * FROM hdb_user"},
    "user_info": {},
    "add_api_key": {"name": "mine"},
    "list_api_keys": {},
    "drop_api_key": {"id": "mine"},
    "create_authentication_tokens": {},
}


@pytest.mark.parametrize("name", CLOSED)
async def test_plain_users_run_no_operation_of_super_users(
    admin: Caller, ada: Caller, name: str
) -> None:
    """It is 403, says so, and changes nothing."""
    before = await admin.get("list_users"), await admin.get("list_roles")

    status, told = await ada.ask(name, **CLOSED[name])

    assert 403 == status
    assert {
        "error": "This operation is not authorized due to role restrictions and/or invalid "
        "database items",
        "unauthorized_access": [f"Operation '{name}' is restricted to 'super_user' roles"],
        "invalid_schema_items": [],
    } == told
    assert before == (await admin.get("list_users"), await admin.get("list_roles"))


@pytest.mark.parametrize("name", [*CLOSED, *OWN, "no_such_operation"])
async def test_strangers_run_nothing(nobody: Caller, name: str) -> None:
    """Without a credential it is 401, and not even told which operations there are."""
    parameters = {**CLOSED, **OWN}.get(name, {})

    status, told = await nobody.ask(name, **parameters)

    assert (401, {"error": "No credential was sent: must log in."}) == (status, told)


async def test_a_role_may_open_single_operations(admin: Caller) -> None:
    """`permission.operations` lists what else its users may run."""
    await admin.get("add_role", role="auditor", permission={"operations": ["list_users"]})
    key = await admin.server.key_for("eve", role="auditor")
    eve = Caller(admin.server, f"Bearer {key}")

    assert ["HDB_ADMIN", "eve"] == [user["username"] for user in await eve.get("list_users")]
    assert 403 == (await eve.ask("list_roles"))[0]
    assert 403 == (await eve.ask("sql", sql="SELECT count(*) AS n FROM system.hdb_user"))[0]


async def test_a_body_cannot_say_who_asks(ada: Caller, nobody: Caller) -> None:
    """Names of Harper's internals count for nothing; others are refused like any parameter."""
    for name in ("hdb_user", "hdb_auth_header", "bypass_auth", "user", "context"):
        internal = name not in ("user", "context")
        status, body = await ada.ask("user_info", **{name: {"username": "HDB_ADMIN"}})
        assert (200, ADA) == (status, body) if internal else 400 == status
        assert 403 == (await ada.ask("list_users", **{name: True}))[0]
        assert 401 == (await nobody.ask("list_users", **{name: True}))[0]


# Tokens


@pytest.mark.usefixtures("ada")
async def test_a_name_and_a_password_make_tokens(nobody: Caller) -> None:
    """No other credential is needed; both tokens say whose and what they are."""
    tokens = await nobody.get("create_authentication_tokens", username="ada", password="pw")

    assert {"operation_token", "refresh_token"} == set(tokens)
    for subject in ("operation", "refresh"):
        claims = jwt.decode(tokens[f"{subject}_token"], options={"verify_signature": False})
        assert (subject, "ada", False) == (claims["sub"], claims["username"], claims["super_user"])
    caller = Caller(nobody.server, f"Bearer {tokens['operation_token']}")
    assert ADA == await caller.get("user_info")


async def test_whoever_is_known_makes_tokens_of_its_own(ada: Caller, nobody: Caller) -> None:
    """A key, a Basic header and an operation token do; two logins live side by side."""
    first = await ada.get("create_authentication_tokens")
    second = await Caller(ada.server, basic("ada", "pw")).get("create_authentication_tokens")
    third = await Caller(ada.server, f"Bearer {first['operation_token']}").get(
        "create_authentication_tokens"
    )

    for tokens in (first, second, third):
        caller = Caller(ada.server, f"Bearer {tokens['operation_token']}")
        assert ADA == await caller.get("user_info")
        await nobody.get("refresh_operation_token", refresh_token=tokens["refresh_token"])


@pytest.mark.parametrize(
    "parameters",
    [
        {"username": "ada", "password": "wrong"},
        {"username": "nobody", "password": "pw"},
        {"username": "ada"},
        {"password": "pw"},
    ],
)
async def test_a_wrong_password_makes_no_tokens(
    ada: Caller, nobody: Caller, parameters: dict[str, str]
) -> None:
    """It is 401 with the same words whatever was wrong, for strangers and for known users."""
    for caller in (nobody, ada):
        told = await caller.ask("create_authentication_tokens", **parameters)
        assert (401, {"error": "Login failed"}) == told


async def test_a_refresh_token_makes_operation_tokens(ada: Caller, nobody: Caller) -> None:
    """In the body or as Bearer, each time with the one that follows it."""
    tokens = [await ada.get("create_authentication_tokens")]

    refresh = tokens[-1]["refresh_token"]
    tokens.append(await nobody.get("refresh_operation_token", refresh_token=refresh))
    bearer = Caller(ada.server, f"Bearer {tokens[-1]['refresh_token']}")
    tokens.append(await bearer.get("refresh_operation_token"))
    refresh = tokens[-1]["refresh_token"]
    tokens.append(await ada.get("refresh_operation_token", refresh_token=refresh))

    for answer in tokens:
        assert {"operation_token", "refresh_token"} == set(answer)
        caller = Caller(ada.server, f"Bearer {answer['operation_token']}")
        assert ADA == await caller.get("user_info")


async def test_the_two_kinds_of_token_do_not_stand_in_for_each_other(
    ada: Caller, nobody: Caller
) -> None:
    """An operation token refreshes nothing; a refresh token runs nothing else, on either port."""
    tokens = await ada.get("create_authentication_tokens")
    operation_token, refresh_token = tokens["operation_token"], tokens["refresh_token"]
    refused = (401, {"error": "invalid token"})

    assert refused == await nobody.ask("refresh_operation_token", refresh_token=operation_token)
    assert refused == await Caller(ada.server, f"Bearer {operation_token}").ask(
        "refresh_operation_token"
    )
    assert refused == await nobody.ask("refresh_operation_token", refresh_token="hk_wrong")
    assert refused == await ada.ask("refresh_operation_token")
    assert refused == await Caller(ada.server, f"Bearer {refresh_token}").ask("user_info")
    assert 401 == (await ask(ada.server, "GET", "/v1/models", key=refresh_token)).status
    status, told = await nobody.ask("refresh_operation_token")
    assert 400 == status
    assert "refresh_token" in told["error"]


# Users and roles


async def test_a_user_comes_changes_and_goes(admin: Caller) -> None:
    """add_user, list_users, alter_user and drop_user do what they say, and say what they did."""
    new = {"username": "ada", "password": "pw", "role": "model_user", "tenant": "acme"}

    assert {"message": "ada successfully added"} == await admin.get("add_user", **new)
    assert ["HDB_ADMIN", "ada"] == [user["username"] for user in await admin.get("list_users")]
    assert ADA == (await admin.get("list_users"))[1]

    changed = await admin.get("alter_user", username="ada", active=False, tenant="other")

    assert {"message": "updated 1 of 1 records", "update_hashes": ["ada"]} == changed
    assert {**ADA, "active": False, "tenant": "other"} == (await admin.get("list_users"))[1]
    assert {"message": "ada successfully deleted"} == await admin.get("drop_user", username="ada")
    assert ["HDB_ADMIN"] == [user["username"] for user in await admin.get("list_users")]


async def test_users_are_told_who_they_are(admin: Caller, ada: Caller) -> None:
    """user_info is the caller, with its role and without secrets."""
    assert ADA == await ada.get("user_info")
    info = await admin.get("user_info")
    assert ("HDB_ADMIN", True) == (info["username"], info["role"]["permission"]["super_user"])


REFUSED: list[tuple[str, dict[str, Any], tuple[int, str]]] = [
    (
        "add_user",
        {"username": "ada", "password": "x", "role": "model_user"},
        (409, "User ada already exists"),
    ),
    ("add_user", {"username": "x", "password": "x", "role": "boss"}, (404, "boss role not found")),
    ("alter_user", {"username": "x", "active": True}, (404, "User x does not exist")),
    ("alter_user", {"username": "ada", "role": "boss"}, (404, "boss role not found")),
    (
        "alter_user",
        {"username": "ada"},
        (400, "nothing to update: give one of password, role, active, tenant"),
    ),
    ("drop_user", {"username": "x"}, (404, "User x does not exist")),
    (
        "add_role",
        {"role": "model_user", "permission": {}},
        (409, "A role with name 'model_user' already exists"),
    ),
    (
        "add_role",
        {"id": "model_user", "role": "x", "permission": {}},
        (409, "A role with id 'model_user' already exists"),
    ),
    ("add_api_key", {"name": "x", "username": "x"}, (404, "User x does not exist")),
    ("drop_api_key", {"id": "x"}, (404, "API key x does not exist")),
]


@pytest.mark.parametrize(("name", "parameters", "refusal"), REFUSED)
async def test_what_cannot_be_is_refused_in_a_sentence(
    admin: Caller, ada: Caller, name: str, parameters: dict[str, Any], refusal: tuple[int, str]
) -> None:
    """What is taken is 409, what is missing 404; nothing has changed."""
    before = await admin.get("list_users")
    status, words = refusal

    assert (status, {"error": words}) == await admin.ask(name, **parameters)
    assert ADA == await ada.get("user_info")
    assert before == await admin.get("list_users")


async def test_a_role_is_added_and_listed(admin: Caller) -> None:
    """The answer is the role; its id is its name unless given."""
    given = {"resources": {"notes": ["read"]}, "operations": ["sql"]}

    clerk = await admin.get("add_role", role="clerk", permission=given)

    permission = {"super_user": False, **given}
    assert {"id": "clerk", "role": "clerk", "permission": permission} == clerk
    assert "r7" == (await admin.get("add_role", id="r7", role="boss", permission={}))["id"]
    roles = await admin.get("list_roles")
    assert ["boss", "clerk", "model_user", "super_user"] == [role["role"] for role in roles]
    assert MODEL_USER == roles[2]


# API keys


async def test_a_user_makes_sees_and_ends_its_own_keys(admin: Caller, ada: Caller) -> None:
    """A key is shown once, acts as its user, is listed by its first letters, and can be ended."""
    made = await ada.get("add_api_key", name="laptop")

    assert {"id", "name", "api_key"} == set(made)
    assert "laptop" == made["name"]
    assert re.fullmatch(r"hk_[\w-]{43}", made["api_key"])
    assert ADA == await Caller(ada.server, f"Bearer {made['api_key']}").get("user_info")

    listed = await ada.get("list_api_keys")

    assert ["test", "laptop"] == [key["name"] for key in listed]
    assert {"ada"} == {key["user"] for key in listed}
    shown = {"id", "name", "user", "prefix", "created", "last_used", "tenant", "grants", "expires"}
    assert shown == set(listed[1])
    assert made["id"] == listed[1]["id"]
    assert made["api_key"].startswith(listed[1]["prefix"])
    assert len(listed[1]["prefix"]) < 12
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(moment, listed[1]["created"])
    assert re.fullmatch(moment, listed[1]["last_used"])
    assert 3 == len(await admin.get("list_api_keys"))

    done = await ada.get("drop_api_key", id=made["id"])

    assert {"message": f"API key {made['id']} successfully deleted"} == done
    assert ["test"] == [key["name"] for key in await ada.get("list_api_keys")]
    assert 404 == (await ada.ask("drop_api_key", id=made["id"]))[0]


async def test_a_key_that_was_never_used_says_so(admin: Caller) -> None:
    """`last_used` is null until the first request."""
    await admin.get("add_api_key", name="spare")

    (spare,) = [key for key in await admin.get("list_api_keys") if key["name"] == "spare"]

    assert spare["last_used"] is None


async def test_keys_of_others_are_the_super_users_business(admin: Caller, ada: Caller) -> None:
    """A plain user neither makes, sees nor ends another's; for its own it may say its name."""
    (theirs,) = [key for key in await admin.get("list_api_keys") if key["user"] == "HDB_ADMIN"]

    refused = await ada.ask("add_api_key", name="x", username="HDB_ADMIN")
    assert (403, {"error": "username: only super users make keys for others"}) == refused
    assert 403 == (await ada.ask("add_api_key", name="x", username="no_such_user"))[0]
    assert 404 == (await ada.ask("drop_api_key", id=theirs["id"]))[0]
    assert {"ada"} == {key["user"] for key in await ada.get("list_api_keys")}
    await ada.get("add_api_key", name="x", username="ada")

    made = await admin.get("add_api_key", name="x", username="ada")

    assert ADA == await Caller(ada.server, f"Bearer {made['api_key']}").get("user_info")
    await admin.get("drop_api_key", id=made["id"])


# Configuration


async def test_the_configuration_is_shown_without_its_secrets() -> None:
    """All of it, camelCase, what the environment filled in and what plugins keep included."""
    config = """
models:
  generative:
    default: {backend: openai, model: m, apiKey: "${PROVIDER}"}
    proxied: {backend: openai, model: m, baseUrl: "http://u:hunter2@x/v1"}
plugins:
  echo: {password: hunter2, nested: {api_key: hunter2}, shown: this}
"""
    async with running(config, environ={"PROVIDER": "hunter2"}) as server:
        admin = Caller(server, f"Bearer {server.api_key}")
        shown = await admin.get("get_configuration")

    assert "hunter2" not in str(shown)
    assert "[redacted]" == shown["models"]["generative"]["default"]["apiKey"]
    assert "openai" == shown["models"]["generative"]["default"]["backend"]
    assert "this" == shown["plugins"]["echo"]["shown"]
    assert 10_000_000 == shown["http"]["maxBodySize"]
    assert shown["authentication"]["authorizeLocal"] is False


# SQL


@pytest.fixture
async def billed(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server whose models are a provider that counts tokens."""
    async with running(provider(upstream.url)) as server:
        yield server


async def test_the_acceptance_statement_shows_the_last_call(
    billed: RunningServer,
) -> None:
    """The newest row of the backend, with who was billed for what."""
    key = await billed.key_for("ada", tenant="acme")
    admin = Caller(billed, f"Bearer {billed.api_key}")
    assert [] == await admin.get("sql", sql=ACCEPTANCE)
    for stream in (False, True):
        body = {**HELLO, "stream": stream}
        answer = await ask(billed, "POST", "/v1/chat/completions", key=key, json=body)
        assert 200 == answer.status

        (row,) = await admin.get("sql", sql=ACCEPTANCE)

        assert "generateStream" if stream else "generate" == row["method"]
        assert ("openai", "ada", "acme") == (row["backend"], row["user"], row["tenant"])
        assert ("gpt-4o-mini", "v1/chat/completions") == (row["model"], row["app"])
        assert row["success"] is True
        assert answer.headers["x-request-id"] == row["request_id"]


async def test_a_row_is_there_for_the_very_next_statement(admin: Caller) -> None:
    """Whoever has the answer of a call finds its row."""
    async with admin.server.session() as session:
        for count in range(1, 21):
            async with session.post(
                "/v1/chat/completions", json=HELLO | {"model": "default"}
            ) as answer:
                assert 200 == answer.status
                await answer.read()
            counted = await admin.get("sql", sql="SELECT count(*) AS n FROM hdb_model_calls")
            assert [{"n": count}] == counted


SQL_REFUSALS: list[tuple[str, int, str]] = [
    ("DELETE FROM system.hdb_user", 403, "DELETE"),
    ("UPDATE system.hdb_user SET active = 0", 403, "UPDATE"),
    ("DROP TABLE hdb_user", 403, "DROP"),
    ("PRAGMA user_version", 400, "SELECT"),
    ("ATTACH 'x.db' AS x", 400, "SELECT"),
    ("SELECT 1; SELECT 2", 400, "One statement"),
    ("SELECT * FROM system.hdb_model_call", 404, "hdb_model_calls"),
    ("SELECT * FROM other.hdb_user", 404, "other"),
    ("SELECT * FROM sqlite_master", 404, "sqlite_master"),
    ("SELECT $updated FROM hdb_user", 400, "$updated"),
    ("SELECT nothing FROM hdb_user", 400, "nothing"),
    ("SELECT load_extension('x')", 403, "load_extension"),
    ("SELECT", 400, "SQL"),
    ("", 400, "SELECT"),
]


@pytest.mark.parametrize(("statement", "status", "word"), SQL_REFUSALS)
async def test_what_sql_does_not_do(
    admin: Caller, ada: Caller, statement: str, status: int, word: str
) -> None:
    """Anything but one SELECT over the system tables is refused, and says why."""
    got, told = await admin.ask("sql", sql=statement)

    assert status == got
    assert {"error"} == set(told)
    assert word in told["error"]
    assert ADA == await ada.get("user_info")


# The writer of model calls


class Heard(logging.Handler):
    """Sets an event when something is logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        """Told in the database's thread."""
        self._loop.call_soon_threadsafe(self.event.set)


async def chat(session: aiohttp.ClientSession) -> str:
    """One call; its request's id."""
    async with session.post("/v1/chat/completions", json=HELLO | {"model": "default"}) as answer:
        assert 200 == answer.status, await answer.text()
        return answer.headers["x-request-id"]


@pytest.fixture
async def heard() -> AsyncIterator[asyncio.Event]:
    """Set when the writer says that calls wait."""
    logger = logging.getLogger("harperpy.plugins.model_calls")
    heard = Heard()
    logger.addHandler(heard)
    yield heard.event
    logger.removeHandler(heard)


@asynccontextmanager
async def locked(server: RunningServer, root: Path) -> AsyncIterator[None]:
    """Another process writes to the database."""
    database = server.server.core.database
    # The server's own patience with a lock, which is five seconds, would make this slow.
    await database.run(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout = 1"))
    with closing(sqlite3.connect(root / "system.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        # What is on its way to the database fails there first, and this does after it.
        with pytest.raises(ServiceUnavailable):
            await database.run(lambda _: None)
        other.execute("COMMIT")


async def test_rows_wait_for_a_locked_database(tmp_path: Path, heard: asyncio.Event) -> None:
    """Calls go on while another process writes, through failed attempts, and each has one row."""
    async with (
        asyncio.timeout(30),
        running(root=tmp_path) as server,
        server.session() as session,
    ):
        sent = [await chat(session)]
        assert 1 == len(await server.rows())
        async with locked(server, tmp_path):
            sent += [await chat(session) for _ in range(5)]
            await heard.wait()
            sent += [await chat(session) for _ in range(5)]
            assert sent[:1] == [row["request_id"] for row in await server.rows()]
        while len(await server.rows()) < len(sent):
            pass
        sent.append(await chat(session))
        rows = await server.rows()

    assert sorted(sent) == sorted(row["request_id"] for row in rows)


async def test_rows_are_written_before_the_server_ends(
    tmp_path: Path, heard: asyncio.Event
) -> None:
    """What was answered in the last moment is there after the next start, also what had to wait."""
    async with running(root=tmp_path) as server, server.session() as session:
        sent = {await chat(session)}
        async with locked(server, tmp_path):
            sent |= {await chat(session) for _ in range(3)}
            async with asyncio.timeout(30):
                await heard.wait()
    async with running(root=tmp_path) as server:
        assert sent == {row["request_id"] for row in await server.rows()}


async def test_rows_older_than_the_retention_go(tmp_path: Path) -> None:
    """Calls older than `accounting.retention` are removed when a server starts; others stay."""
    async with running(root=tmp_path) as server, server.session() as session:
        for _ in range(2):
            await chat(session)
        newest, oldest = await server.rows()
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute(
            "UPDATE hdb_model_calls SET __createdtime__ = __createdtime__ - 2 * 86400000 "
            "WHERE id = ?",
            [oldest["id"]],
        )
    config = f"{ECHO}\naccounting: {{retention: 1d}}"
    async with running(config, root=tmp_path) as server:
        async with asyncio.timeout(30):
            while [newest["id"]] != [row["id"] for row in await server.rows()]:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0)


async def test_others_write_while_many_old_rows_go(tmp_path: Path) -> None:
    """A hundred thousand are removed a few at a time: nobody waits until all of them are."""
    async with running(root=tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute(
            "INSERT INTO hdb_model_calls (id, __createdtime__, backend, method, usage_estimated, "
            "latency_ms, success) WITH RECURSIVE n(id) AS (VALUES(1) UNION ALL "
            "SELECT id + 1 FROM n LIMIT 100000) SELECT id, 1, 'echo', 'embed', 0, 1, 1 FROM n"
        )
    writes = 0
    async with running(root=tmp_path) as server:
        while await server.rows("id = 100000"):
            await server.operate("set_status", id="primary", status="writing")
            writes += 1
    assert writes > 2
