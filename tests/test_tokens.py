"""Tokens: how they follow each other, what ends them, and what is no token of ours."""

import asyncio
import base64
import hmac
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jwt
import pytest

from harperpy import Context, Next, Reply, Scope
from harperpy.system import purpose_key
from harperpy.testing import ECHO, RunningServer, running
from helpers import basic, operation

REFUSED = (401, {"error": "invalid token"})


@pytest.fixture
async def ada(server: RunningServer) -> str:
    """A user's name and password, as a header."""
    await server.operate("add_user", username="ada", password="pw", role="model_user")
    return basic("ada", "pw")


async def login(server: RunningServer, **more: Any) -> dict[str, str]:
    """Both tokens of a new login."""
    body = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw"}
    status, tokens = await operation(server, {**body, **more})
    assert 200 == status, tokens
    return tokens


async def refresh(server: RunningServer, token: str) -> tuple[int, Any]:
    """What a refresh token gets."""
    body = {"operation": "refresh_operation_token", "refresh_token": token}
    return await operation(server, body)


async def status(server: RunningServer, tokens: dict[str, str]) -> int:
    """What an operation token gets."""
    credential = f"Bearer {tokens['operation_token']}"
    return (await operation(server, {"operation": "user_info"}, credential))[0]


@pytest.mark.usefixtures("ada")
async def test_a_refresh_token_is_good_once(server: RunningServer) -> None:
    """The second time it ends all that came from its login, and nothing of another login."""
    first, other = await login(server), await login(server)
    _, second = await refresh(server, first["refresh_token"])
    _, third = await refresh(server, second["refresh_token"])
    family = (first, second, third)
    assert [200, 200, 200] == [await status(server, one) for one in family]

    assert REFUSED == await refresh(server, first["refresh_token"])

    assert [401, 401, 401] == [await status(server, one) for one in family]
    assert REFUSED == await refresh(server, third["refresh_token"])
    assert 200 == await status(server, other)
    assert 200 == (await refresh(server, other["refresh_token"]))[0]
    ended = (await server.operate("read_audit_log", table="hdb_token"))[1]
    assert ("delete", "ada", 3) == (
        ended["operation"],
        ended["user_name"],
        len(ended["hash_values"]),
    )


ENDS: list[tuple[str, dict[str, Any]]] = [
    ("alter_user", {"password": "new"}),
    ("alter_user", {"active": False}),
    ("drop_user", {}),
]


@pytest.mark.parametrize(("name", "change"), ENDS)
@pytest.mark.usefixtures("ada")
async def test_what_ends_a_login_ends_all_of_the_users_tokens(
    server: RunningServer, name: str, change: dict[str, Any]
) -> None:
    """Of every login, and those that were remembered a moment ago too."""
    logins = [await login(server), await login(server)]
    assert [200, 200] == [await status(server, one) for one in logins]

    await server.operate(name, username="ada", **change)

    assert [401, 401] == [await status(server, one) for one in logins]
    assert [401, 401] == [(await refresh(server, one["refresh_token"]))[0] for one in logins]


@pytest.mark.parametrize(
    ("given", "seconds"), [(90, 90), ("90s", 90), ("12h", 43_200), (None, 86_400)]
)
@pytest.mark.usefixtures("ada")
async def test_an_operation_token_lives_as_long_as_is_asked(
    server: RunningServer, given: Any, seconds: int
) -> None:
    """In seconds or as a text; by default as the configuration says."""
    tokens = await login(server, **({} if given is None else {"expires_in": given}))

    claims = jwt.decode(tokens["operation_token"], options={"verify_signature": False})

    assert (
        seconds == round(claims["exp"] - claims["iat"], -1)
        or claims["exp"] - claims["iat"] < seconds + 1
    )
    assert claims["exp"] - claims["iat"] >= seconds


@pytest.mark.parametrize("given", ["1y", "", 0, -5, "60d", 31 * 86_400, "1 h"])
@pytest.mark.usefixtures("ada")
async def test_a_life_that_cannot_be_is_refused(server: RunningServer, given: Any) -> None:
    """A token does not outlive what it is refreshed with."""
    body = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw"}

    code, told = await operation(server, {**body, "expires_in": given})

    assert 400 == code
    assert "expires_in" in str(told)


def forged(server: RunningServer, claims: dict[str, Any], **options: Any) -> str:
    """A token that is signed with the server's own key."""
    secret = (server.server.root / "secret.key").read_bytes()
    key = purpose_key(secret, "token signatures")
    return jwt.encode(claims, options.pop("key", key), **{"algorithm": "HS256", **options})


def relabelled(server: RunningServer, claims: dict[str, Any], algorithm: str) -> str:
    """A token with an HMAC of the server's own key, that names another algorithm."""
    payload = forged(server, claims).split(".")[1]
    head = json.dumps({"alg": algorithm, "typ": "JWT"}).encode()
    signed = f"{base64.urlsafe_b64encode(head).decode().rstrip('=')}.{payload}"
    secret = purpose_key((server.server.root / "secret.key").read_bytes(), "token signatures")
    digest = {"HS512": "sha512"}.get(algorithm, "sha256")
    signature = hmac.new(secret, signed.encode(), digest).digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


FORGED: dict[str, Callable[[RunningServer, dict[str, Any]], str]] = {
    "another subject": lambda server, claims: forged(server, {**claims, "sub": "scoped-operation"}),
    "no subject": lambda server, claims: forged(server, {**claims, "sub": ""}),
    "a refresh token": lambda server, claims: forged(server, {**claims, "sub": "refresh"}),
    "a role": lambda server, claims: forged(server, {**claims, "role": "super_user"}),
    "no text as name": lambda server, claims: forged(server, {**claims, "username": ["HDB_ADMIN"]}),
    "no text as family": lambda server, claims: forged(server, {**claims, "sid": {"like": "%"}}),
    "another's name": lambda server, claims: forged(server, {**claims, "username": "HDB_ADMIN"}),
    "another family": lambda server, claims: forged(server, {**claims, "sid": "0" * 16}),
    "no expiry": lambda server, claims: forged(
        server, {name: value for name, value in claims.items() if name != "exp"}
    ),
    "over": lambda server, claims: forged(server, {**claims, "exp": time.time() - 1}),
    "HS512": lambda server, claims: relabelled(server, claims, "HS512"),
    "none": lambda server, claims: forged(server, claims, algorithm="none", key=""),
    "RS256 in the head": lambda server, claims: relabelled(server, claims, "RS256"),
    "None": lambda server, claims: relabelled(server, claims, "None"),
    "no key": lambda server, claims: forged(server, claims, key="0" * 32),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.usefixtures("ada")
async def test_what_is_no_operation_token_is_refused(server: RunningServer, name: str) -> None:
    """Whatever its claims and its algorithm say, and though most are signed with our key."""
    tokens = await login(server)
    claims = jwt.decode(tokens["operation_token"], options={"verify_signature": False})
    assert 200 == await status(server, {"operation_token": forged(server, claims)})

    token = FORGED[name](server, claims)

    assert 401 == await status(server, {"operation_token": token})


async def test_a_login_that_a_new_password_overtakes_is_none() -> None:
    """What began with the old one ends with it, also where it has been let in already."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def wait(context: Context, call_next: Next) -> Reply:
        if context.user is not None and context.user.username == "ada":
            arrived.set()
            await go.wait()
        return await call_next(context)

    def apply(scope: Scope) -> None:
        scope.server.http(wait, name="wait", port="operations")

    async with running(handle_application=apply) as server, asyncio.timeout(30):
        await server.operate("add_user", username="ada", password="pw", role="model_user")
        body = {"operation": "create_authentication_tokens"}
        begun = asyncio.create_task(operation(server, body, basic("ada", "pw")))
        await arrived.wait()
        await server.operate("alter_user", username="ada", password="new")
        go.set()

        assert (401, {"error": "Login failed"}) == await begun
        assert 200 == (await operation(server, body, basic("ada", "new")))[0]
        kept = "SELECT id FROM system.hdb_token WHERE kind = 'refresh'"
        assert 1 == len(await server.operate("sql", sql=kept))


async def test_what_has_expired_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    """Refresh tokens at once, keys a month later: until then the list says why they are refused."""
    config = f"{ECHO}\nauthentication: {{refreshTokenTimeout: 1ms, operationTokenTimeout: 1ms}}"
    async with running(config, root=tmp_path) as server:
        await server.key_for("ada")
        await login(server)
        day = 86_400_000
        for name, days in (("recent", 29), ("old", 31)):
            made = await server.operate("add_api_key", name=name, expires_in="1d")
            ended = time.time() * 1000 - days * day
            with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
                change = "UPDATE hdb_token SET expires = ? WHERE id = ?"
                database.execute(change, (ended, made["id"]))
        select = "SELECT id, kind, name FROM system.hdb_token ORDER BY kind"
        before = {row["id"]: row for row in await server.operate("sql", sql=select)}

        await server.server.core.tokens.forget_expired()
        await server.server.core.tokens.forget_expired()

        after = {row["id"]: row for row in await server.operate("sql", sql=select)}
        told = await server.operate("read_audit_log", table="hdb_token", limit=2)
    assert ["api_key"] * 4 + ["refresh"] == [row["kind"] for row in before.values()]
    assert {"first", "test", "recent"} == {row["name"] for row in after.values()}
    gone = {row["kind"]: [key] for key, row in before.items() if key not in after}
    assert [("system", "delete", gone[kind], [{"kind": kind}]) for kind in sorted(gone)] == [
        (row["user_name"], row["operation"], row["hash_values"], row["original_records"])
        for row in told
    ]
