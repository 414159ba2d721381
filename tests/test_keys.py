"""API keys: what they may, never more than their owner, for whom and until when."""

import datetime as dt
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import argon2
import pytest

from databases import busy
from harperpy import Resource
from harperpy.testing import ECHO, RunningServer, running
from helpers import HELLO, ask, basic, operation

PAST = "2020-01-01T00:00:00Z"
ROLE = {
    "resources": {"v1/*": ["read", "create"], "notes": ["read", "update"]},
    "models": ["echo", "gpt-*"],
    "operations": ["standard_user", "list_users"],
}


class Notes(Resource):
    """Says that it ran."""

    @staticmethod
    def get() -> str:
        """Read."""
        return "read"

    @staticmethod
    def put() -> str:
        """Update."""
        return "updated"


async def made(server: RunningServer, credential: str | None = None, **more: Any) -> Any:
    """What `add_api_key` answers: status and body."""
    body = {"operation": "add_api_key", "name": "k", **more}
    return await operation(server, body, credential or f"Bearer {server.api_key}")


async def key_of(server: RunningServer, credential: str | None = None, **more: Any) -> str:
    """A key with these properties, as a header."""
    status, told = await made(server, credential, **more)
    assert 200 == status, told
    return f"Bearer {told['api_key']}"


async def runs(server: RunningServer, credential: str, name: str, /, **parameters: Any) -> int:
    """The status of an operation."""
    return (await operation(server, {"operation": name, **parameters}, credential))[0]


@pytest.fixture
async def ada(server: RunningServer) -> str:
    """A user with a role of many parts, by name and password."""
    await server.operate("add_role", role="many", permission=ROLE)
    await server.operate("add_user", username="ada", password="pw", role="many", tenant="acme")
    return basic("ada", "pw")


# What grants leave


async def test_grants_on_paths_leave_those_and_no_others() -> None:
    """What the owner may besides, the key may not."""
    async with running(resources={"notes": Notes}) as server:
        await server.operate("add_role", role="many", permission=ROLE)
        await server.operate("add_user", username="ada", password="pw", role="many")
        grants = {"resources": {"notes": ["read"]}}
        told = await server.operate("add_api_key", name="k", username="ada", grants=grants)
        wide = await server.operate("add_api_key", name="w", username="ada", grants={})
        got = {
            (method, path): [
                (await ask(server, method, path, key=key)).status
                for key in (told["api_key"], wide["api_key"])
            ]
            for method, path in (("GET", "/notes"), ("PUT", "/notes"), ("GET", "/v1/models"))
        }

    assert got == {
        ("GET", "/notes"): [200, 200],
        ("PUT", "/notes"): [403, 200],
        ("GET", "/v1/models"): [403, 200],
    }


async def test_grants_on_models_leave_those_and_no_others(server: RunningServer, ada: str) -> None:
    """Others do not exist for it."""
    key = (await key_of(server, ada, grants={"models": ["gpt-4*"]})).removeprefix("Bearer ")

    said = await ask(
        server, "POST", "/v1/chat/completions", key=key, json={**HELLO, "model": "echo"}
    )
    listed = await ask(server, "GET", "/v1/models", key=key)

    assert (404, []) == (said.status, listed.json["data"])


async def test_a_key_with_grants_runs_the_operations_that_they_name(
    server: RunningServer, ada: str
) -> None:
    """Without any it runs none; a key without grants is its owner."""
    none, some, whole = [
        await key_of(server, ada, **more)
        for more in ({"grants": {}}, {"grants": {"operations": ["list_users"]}}, {})
    ]
    names = ("user_info", "list_users", "list_roles")

    assert [403, 403, 403] == [await runs(server, none, name) for name in names]
    assert [403, 200, 403] == [await runs(server, some, name) for name in names]
    assert [200, 200, 403] == [await runs(server, whole, name) for name in names]


async def test_a_super_users_key_with_grants_is_no_super_user(server: RunningServer) -> None:
    """Neither for what no role grants, nor in `/health`, nor for the server's own tables."""
    key = await key_of(server, grants={"operations": ["list_users", "read_only"]})

    assert 200 == await runs(server, key, "list_users")
    assert 403 == await runs(server, key, "add_user", username="x", password="x", role="super_user")
    user = await server.server.core.authenticators.identify(key)
    assert not user.is_super_user
    assert not user.role.permission.table("system", "hdb_user").read
    assert user.role.permission.table("data", "notes").read
    health = await ask(server, "GET", "/health", key=key.removeprefix("Bearer "))
    assert {"status": "ok"} == health.json
    listed = await ask(server, "GET", "/v1/models", key=key.removeprefix("Bearer "))
    assert {"default", "echo"} == {model["id"] for model in listed.json["data"]}


async def test_what_the_role_loses_its_keys_lose(server: RunningServer, ada: str) -> None:
    """At once, and what it gains only as far as the grants go."""
    grants = {"resources": {"v1/models": ["read"]}, "operations": ["list_users"]}
    key = await key_of(server, ada, grants=grants)

    async def statuses() -> list[int]:
        models = await ask(server, "GET", "/v1/models", key=key.removeprefix("Bearer "))
        return [
            models.status,
            *[await runs(server, key, it) for it in ("list_users", "list_roles")],
        ]

    before = await statuses()
    less = {"operations": ["list_roles"]}
    await server.operate("alter_role", id="many", permission=less)
    after = await statuses()
    await server.operate("alter_role", id="many", permission={"super_user": True})
    again = await statuses()

    assert [[200, 200, 403], [403, 403, 403], [200, 200, 403]] == [before, after, again]


EXCESS = [
    ({"resources": {"notes": ["delete"]}}, "resources"),
    ({"resources": {"*": ["read"]}}, "resources"),
    ({"resources": {"notes/*": ["read"]}}, "resources"),
    ({"models": ["*"]}, "models"),
    ({"models": ["gpt*"]}, "models"),
    ({"models": ["local"]}, "models"),
    ({"operations": ["add_user"]}, "operations"),
    ({"operations": ["standard_user", "add_role"]}, "operations"),
]


@pytest.mark.parametrize(("grants", "what"), EXCESS)
async def test_a_key_is_not_made_with_more_than_its_owner_has(
    server: RunningServer, ada: str, grants: dict[str, Any], what: str
) -> None:
    """It is 400 and names the grant, for a super user who makes it for another too."""
    for credential, more in ((ada, {}), (None, {"username": "ada"})):
        status, told = await made(server, credential, grants=grants, **more)
        assert 400 == status
        assert f"grants.{what}: a key has no more than its owner" in told["error"]


WRONG = [
    ({"grants": {"models": ["*-mini"]}}, "grants.models"),
    ({"grants": {"operations": ["lst_users"]}}, "did you mean 'list_users'?"),
    ({"grants": {"resources": {"a": ["raed"]}}}, "raed"),
    ({"grants": {"super_user": True}}, "super_user"),
    ({"grants": {"resources": {"/v1/*": ["read"]}}}, "grants.resources: '/v1/*': expected a mount"),
    ({"expires": PAST}, "expires"),
    ({"expires": "9999-01-01T00:00:00Z"}, "before the year 9999"),
    ({"expires_in": 1e12}, "before the year 9999"),
    ({"expires_in": "999999999d"}, "before the year 9999"),
    ({"expires": "soon"}, "expires"),
    ({"expires_in": "1y"}, "expires_in"),
    ({"expires_in": 0}, "expires_in"),
    ({"expires_in": -1}, "expires_in"),
    ({"expires_in": "1h", "expires": "2999-01-01T00:00:00Z"}, "either"),
    ({"tenant": ""}, "tenant"),
]


@pytest.mark.parametrize(("more", "word"), WRONG)
async def test_a_key_that_cannot_be_is_refused(
    server: RunningServer, more: dict[str, Any], word: str
) -> None:
    """It is 400 and says what is wrong."""
    status, told = await made(server, **more)

    assert 400 == status
    assert word in str(told)


# What a key cannot make of itself


MAKER = {
    "operations": [
        *("add_api_key", "create_authentication_tokens", "user_info", "add_user", "alter_user"),
        *("add_role", "alter_role", "drop_role", "drop_user"),
    ]
}
CLIMBS: list[tuple[str, dict[str, Any], int]] = [
    ("add_api_key", {"name": "x"}, 400),
    ("add_api_key", {"name": "x", "grants": {"operations": ["sql"]}}, 400),
    ("add_api_key", {"name": "x", "grants": {"operations": []}, "username": "eve"}, 403),
    ("add_api_key", {"name": "x", "grants": {"operations": []}, "tenant": "other"}, 403),
    ("create_authentication_tokens", {}, 403),
    ("add_user", {"username": "x", "password": "x", "role": "super_user"}, 403),
    ("add_user", {"username": "x", "password": "x", "role": "model_user", "tenant": "t"}, 403),
    ("alter_user", {"username": "HDB_ADMIN", "password": "mine"}, 403),
    ("alter_user", {"username": "eve", "role": "super_user"}, 403),
    ("alter_user", {"username": "eve", "tenant": "other"}, 403),
    ("drop_user", {"username": "HDB_ADMIN"}, 403),
    ("add_role", {"role": "x", "permission": {"super_user": True}}, 403),
    ("add_role", {"role": "x", "permission": {"operations": ["sql"]}}, 403),
    ("alter_role", {"id": "model_user", "permission": {"super_user": True}}, 403),
    ("alter_role", {"id": "super_user", "permission": {}}, 403),
    ("drop_role", {"id": "super_user"}, 403),
]


@pytest.mark.parametrize(("name", "parameters", "status"), CLIMBS)
async def test_a_key_makes_nothing_that_has_more_than_it_has(
    server: RunningServer, name: str, parameters: dict[str, Any], status: int
) -> None:
    """Although its grants name the operation, and its owner is a super user."""
    await server.operate("add_user", username="eve", password="pw", role="model_user")
    key = await key_of(server, grants=MAKER)

    assert status == await runs(server, key, name, **parameters)


@pytest.mark.usefixtures("ada")
async def test_who_is_lent_the_operations_on_users_has_a_tenants(server: RunningServer) -> None:
    """Users of another one are neither shown nor changed, and new ones are of the same."""
    lent = {"operations": ["list_users", "add_user", "alter_user", "drop_user", "add_role"]}
    await server.operate("add_role", role="keeper", permission=lent)
    await server.operate("add_role", role="nothing", permission={"operations": []})
    key = f"Bearer {await server.key_for('kim', 'keeper', tenant='acme')}"
    await server.operate("add_user", username="eve", password="pw", role="nothing", tenant="other")

    assert 200 == await runs(server, key, "add_user", username="x", password="x", role="nothing")
    _, listed = await operation(server, {"operation": "list_users"}, key)

    assert {"ada": "acme", "kim": "acme", "x": "acme"} == {
        user["username"]: user["tenant"] for user in listed
    }
    assert 403 == await runs(server, key, "alter_user", username="eve", password="mine")
    assert 403 == await runs(server, key, "drop_user", username="eve")
    assert 403 == await runs(server, key, "drop_user", username="ada")
    assert 200 == await runs(server, key, "drop_user", username="x")


async def test_what_is_lent_is_judged_when_it_is_done(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it was asked for: meanwhile someone else makes the user a super user."""
    await server.operate("add_role", role="keeper", permission={"operations": ["alter_user"]})
    await server.operate("add_role", role="nothing", permission={"operations": []})
    await server.operate("add_user", username="eve", password="pw", role="nothing")
    key = f"Bearer {await server.key_for('kim', 'keeper')}"
    hashed = argon2.PasswordHasher.hash

    def meanwhile(hasher: argon2.PasswordHasher, password: str) -> str:
        with closing(sqlite3.connect(server.server.root / "system.db")) as other, other:
            other.execute("UPDATE hdb_user SET role = 'super_user' WHERE username = 'eve'")
        return hashed(hasher, password)

    monkeypatch.setattr(argon2.PasswordHasher, "hash", meanwhile)

    assert 403 == await runs(server, key, "alter_user", username="eve", password="mine")
    assert 401 == await runs(server, basic("eve", "mine"), "user_info")


async def test_a_role_of_another_tenants_users_is_not_among_what_is_lent(
    server: RunningServer,
) -> None:
    """Although it has no more than whoever would change it."""
    lent = {"operations": ["alter_role", "drop_role"]}
    await server.operate("add_role", role="keeper", permission=lent)
    key = f"Bearer {await server.key_for('kim', 'keeper', tenant='acme')}"
    for tenant in ("acme", "other"):
        await server.operate("add_role", role=tenant, permission={"operations": []})
        user = {"username": tenant, "password": "pw", "role": tenant, "tenant": tenant}
        await server.operate("add_user", **user)
    nothing = {"operations": [], "resources": {}}

    assert 200 == await runs(server, key, "alter_role", id="acme", permission=nothing)
    assert 403 == await runs(server, key, "alter_role", id="other", permission=nothing)
    assert 403 == await runs(server, key, "drop_role", id="other")


async def test_a_table_that_is_kept_from_a_role_is_kept_from_those_it_makes(
    server: RunningServer,
) -> None:
    """`*` stands for all tables but those that are named beside it."""
    all_but_one: dict[str, Any] = {"*": {"read": True}, "hidden": {}}
    lent = {"operations": ["add_role"], "data": {"tables": all_but_one}}
    await server.operate("add_role", role="keeper", permission=lent)
    key = f"Bearer {await server.key_for('kim', 'keeper')}"

    def role(**tables: Any) -> dict[str, Any]:
        return {"role": "new", "permission": {"operations": [], "data": {"tables": tables}}}

    assert 403 == await runs(server, key, "add_role", **role(**{"*": {"read": True}}))
    assert 403 == await runs(server, key, "add_role", **role(hidden={"read": True}))
    assert 200 == await runs(server, key, "add_role", **role(**all_but_one))


async def test_user_info_of_a_key_is_what_its_grants_leave(server: RunningServer, ada: str) -> None:
    """Not what its owner may besides."""
    grants = {"resources": {"v1/models": ["read"]}, "models": ["gpt-4*"]}
    key = await key_of(server, ada, grants={**grants, "operations": ["user_info", "list_users"]})

    _, info = await operation(server, {"operation": "user_info"}, key)

    assert ("ada", "acme") == (info["username"], info["tenant"])
    assert info["role"]["permission"] == {
        **grants,
        "operations": ["user_info", "list_users"],
        "super_user": False,
    }


@pytest.mark.usefixtures("ada")
async def test_a_key_makes_keys_of_its_own_kind(server: RunningServer) -> None:
    """No wider, of the same tenant, and ending no later."""
    grants = {"operations": ["add_api_key", "user_info"]}
    admin = f"Bearer {server.api_key}"
    first = await key_of(
        server, admin, username="ada", tenant="lent", grants=grants, expires_in="1h"
    )
    second = await key_of(server, first, grants={"operations": ["user_info"]}, expires_in="30d")

    _, info = await operation(server, {"operation": "user_info"}, second)
    keys = [key for key in await server.operate("list_api_keys") if key.user == "ada"]
    assert ("ada", "lent") == (info["username"], info["tenant"])
    assert [("lent", keys[0].expires)] * 2 == [(key.tenant, key.expires) for key in keys]
    assert 403 == await runs(server, second, "add_api_key", name="third", grants={})


# For whom, and until when


async def test_a_keys_tenant_stands_in_the_rows_and_is_the_super_users_to_set(
    server: RunningServer, ada: str
) -> None:
    """The owner's is used where a key has none of its own."""
    admin = f"Bearer {server.api_key}"
    own = await key_of(server, ada)
    lent = await key_of(server, admin, username="ada", tenant="lent")
    assert 403 == (await made(server, ada, tenant="lent"))[0]
    assert 200 == (await made(server, ada, tenant="acme"))[0]

    for key in (own, lent):
        said = await ask(
            server,
            "POST",
            "/v1/chat/completions",
            key=key.removeprefix("Bearer "),
            json={**HELLO, "model": "echo"},
        )
        assert 200 == said.status

    assert ["lent", "acme"] == [row["tenant"] for row in await server.rows()]


async def test_an_expired_key_is_refused_although_it_was_remembered(
    server: RunningServer, ada: str
) -> None:
    """It is 401 `invalid_api_key`, and is still listed."""
    status, told = await made(server, ada, expires_in=1)
    assert 200 == status
    key = told["api_key"]
    ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)

    answers = [await ask(server, "GET", "/v1/models", key=key)]
    while dt.datetime.now(dt.UTC) < ends:
        answers.append(await ask(server, "GET", "/v1/models", key=key))
    last = await ask(server, "GET", "/v1/models", key=key)

    assert 200 == answers[0].status
    assert (401, "invalid_api_key") == (last.status, last.json["error"]["code"])
    listed = [one.id for one in await server.operate("list_api_keys")]
    assert told["id"] in listed


async def test_keys_are_listed_with_all_but_the_secret(server: RunningServer, ada: str) -> None:
    """Name, owner, tenant, grants, expiry; the key itself was shown once."""
    grants = {"models": ["gpt-4*"], "operations": ["list_users"]}
    admin = f"Bearer {server.api_key}"
    _, told = await made(
        server, admin, username="ada", tenant="t", grants=grants, expires="2999-01-01T00:00:00Z"
    )

    _, listed = await operation(server, {"operation": "list_api_keys"}, ada)

    (key,) = listed
    assert told["api_key"] not in str(listed)
    assert told["api_key"].startswith(key.pop("prefix"))
    assert key.pop("created")
    assert key == {
        "id": told["id"],
        "name": "k",
        "user": "ada",
        "tenant": "t",
        "grants": grants,
        "expires": "2999-01-01T00:00:00Z",
        "last_used": None,
    }


async def test_the_last_use_is_written_by_the_stop_at_the_latest(tmp_path: Any) -> None:
    """A second use within a minute waits for it."""
    async with running(ECHO, root=tmp_path) as server:
        key = await server.key_for("ada")
        await ask(server, "GET", "/v1/models", key=key)
        core = server.server.core
        (first,) = [
            one.last_used for one in await server.operate("list_api_keys") if one.user == "ada"
        ]
        core.authenticators.revoke()
        later = dt.datetime.now(dt.UTC).replace(microsecond=0)
        while dt.datetime.now(dt.UTC) < later + dt.timedelta(seconds=1):
            await ask(server, "GET", "/v1/models", key="")
        await ask(server, "GET", "/v1/models", key=key)
    async with running(ECHO, root=tmp_path) as server:
        (last,) = [
            one.last_used for one in await server.operate("list_api_keys") if one.user == "ada"
        ]

    assert first is not None
    assert last is not None
    assert first < last


async def test_keys_are_used_and_listed_while_the_database_is_busy(tmp_path: Path) -> None:
    """When they were used is written when it can be."""
    patience = "database: {busyTimeout: 10ms}"
    async with running(f"{ECHO}\n{patience}", root=tmp_path) as server:
        key = await server.key_for("ada")

        async def used() -> str | None:
            listed = await server.operate("list_api_keys")
            return next(one.last_used for one in listed if one.user == "ada")

        with busy(tmp_path):
            assert 200 == (await ask(server, "GET", "/v1/models", key=key)).status
            assert await used() is None
        server.server.core.authenticators.revoke()
        await ask(server, "GET", "/v1/models", key=key)

        assert await used() is not None


# In which header


HEADERS = [
    ({"x-api-key": "KEY"}, 200),
    ({"api-key": "KEY"}, 200),
    ({"X-API-Key": "wrong"}, 401),
    ({"x-api-key": "KEY", "api-key": "KEY"}, 200),
    ({"x-api-key": "KEY", "api-key": "other"}, 401),
    ({"x-api-key": "KEY", "Authorization": "Bearer KEY"}, 200),
    ({"x-api-key": "KEY", "Authorization": "bearer  KEY"}, 200),
    ({"x-api-key": "KEY", "Authorization": "Bearer other"}, 401),
    ({"x-api-key": "other", "Authorization": "Bearer KEY"}, 401),
    ({"x-api-key": ""}, 401),
]


@pytest.mark.parametrize(("headers", "status"), HEADERS)
async def test_the_gateway_takes_keys_in_other_clients_headers(
    server: RunningServer, headers: dict[str, str], status: int
) -> None:
    """Where several are sent and differ, nobody guesses which one is meant."""
    sent = {name: value.replace("KEY", server.api_key) for name, value in headers.items()}
    for path in ("/v1/models", "/v1/nothing"):
        answer = await ask(server, "GET", path, key="", headers=sent)
        expected = 404 if status == 200 and path == "/v1/nothing" else status
        assert expected == answer.status


async def test_other_mounts_know_the_standard_header_alone() -> None:
    """A key in another header is nobody's there, on the operations port neither."""
    async with running(resources={"notes": Notes}) as server:
        sent = {"x-api-key": server.api_key}
        answer = await ask(server, "GET", "/notes", key="", headers=sent)
        both = await ask(server, "GET", "/notes", headers={"x-api-key": "another"})
        async with server.session("") as client:
            url = f"{server.operations_url}/"
            async with client.post(url, json={"operation": "user_info"}, headers=sent) as told:
                assert 401 == told.status

    assert (401, 200) == (answer.status, both.status)


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
async def test_a_key_that_is_gone_opens_nothing_on_the_connection_that_showed_it(
    server: RunningServer, header: str
) -> None:
    """However often it sends the same, it is asked each time whether that still counts."""
    key = await server.key_for("ada")
    sent = {header: f"Bearer {key}" if header == "Authorization" else key}
    statuses: list[int] = []
    async with server.session("") as client:
        for number in range(6):
            if number == 3:
                await server.operate("drop_user", username="ada")
            async with client.get(f"{server.url}/v1/models", headers=sent) as response:
                statuses.append(response.status)

    assert [200, 200, 200, 401, 401, 401] == statuses
