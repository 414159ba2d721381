"""Who is asking: what is stored, which credentials open which port, and when they end."""

import asyncio
import base64
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from databases import busy
from harperpy import ConfigError, InvalidBody, InvalidCredentials, Resource, Scope, User, Verified
from harperpy.auth import Bearer, Credential
from harperpy.database import Database, read_secret
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask, basic, error_of, operation, until

TABLES = {"hdb_role", "hdb_user", "hdb_token", "hdb_audit"}
TABLES |= {"hdb_analytics", "hdb_model_calls", "hdb_model_calls_daily"}
TABLES |= {"hdb_limit", "hdb_limit_hold", "hdb_limit_rate", "hdb_status"}


class Open(Resource):
    """Anyone may read it; it says who asks."""

    public = True

    @staticmethod
    def get(target: object, context: Any) -> dict[str, Any]:
        """The user's name, if there is a user."""
        return {"user": context.user and context.user.username}


class Every(Resource):
    """Answers all verbs."""

    @staticmethod
    def get() -> str:
        """Answer."""
        return "done"

    post = put = patch = delete = get


async def get(
    server: RunningServer, path: str, credential: str | None = None, **headers: str
) -> tuple[int, Any]:
    """What the REST port answers to a GET."""
    if credential is not None:
        headers["Authorization"] = credential
    url = f"{server.url}/{path}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers) as response,
    ):
        return response.status, await response.json()


async def statuses(server: RunningServer, credential: str) -> tuple[int, int]:
    """What a credential gets on the REST port and on the operations port."""
    rest, _ = await get(server, "v1/models", credential)
    operations, _ = await operation(server, {"operation": "user_info"}, credential)
    return rest, operations


async def credentials_of(server: RunningServer, username: str, **more: Any) -> dict[str, str]:
    """A new user, and a header of each kind that it may send."""
    key = await server.key_for(username, **more)
    body = {"operation": "create_authentication_tokens", "username": username, "password": "pw"}
    _, tokens = await operation(server, body)
    return {
        "key": f"Bearer {key}",
        "token": f"Bearer {tokens['operation_token']}",
        "refresh": f"Bearer {tokens['refresh_token']}",
        "basic": basic(username, "pw"),
    }


def tables(database: Path) -> set[str]:
    """The names of a database's tables."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in rows}


# What is stored


async def test_a_start_makes_the_system_database(tmp_path: Path) -> None:
    """The tables and the two roles that ship are there after the first start."""
    async with running(root=tmp_path) as server:
        roles = await server.operate("list_roles")

    assert TABLES == tables(tmp_path / "system.db")
    assert ["model_user", "super_user"] == [role["role"] for role in roles]
    assert {"v1/*": ["read", "create"]} == roles[0]["permission"]["resources"]


async def test_a_start_migrates_an_older_database_and_keeps_a_current_one(tmp_path: Path) -> None:
    """A file of version 0 gets the schema; users and keys outlive the server."""
    (tmp_path / "system.db").touch()
    async with running(root=tmp_path) as server:
        sent = await credentials_of(server, "ada")
    async with running(root=tmp_path) as server:
        assert server.server.first_start is None
        for kind in ("key", "token", "basic"):
            assert (200, 200) == await statuses(server, sent[kind])

    assert TABLES == tables(tmp_path / "system.db")


async def test_no_secret_is_stored_as_it_is(tmp_path: Path) -> None:
    """No file of the data folder holds a password, a key or a token in clear."""
    root = tmp_path / "data"
    async with running(root=root) as server:
        sent = await credentials_of(server, "ada")
        await server.operate("alter_user", username="ada", password="correct horse")
        secrets = [header.rpartition(" ")[2] for header in sent.values()]
        secrets += [server.api_key, "correct horse"]
        stored = b"".join(file.read_bytes() for file in root.iterdir() if not file.is_socket())

    assert b"ada" in stored
    assert [] == [secret for secret in secrets if secret.encode() in stored]


@pytest.mark.parametrize("left", [b"", b"x" * 31])
async def test_a_secret_that_is_not_whole_signs_nothing(tmp_path: Path, left: bytes) -> None:
    """What a full disk has left of it: anybody knows what is in an empty file."""
    (tmp_path / "secret.key").write_bytes(left)

    with pytest.raises(ConfigError, match=rf"secret\.key: expected 32 bytes, got {len(left)}"):
        async with running(root=tmp_path):
            pass


async def test_a_secret_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Whatever stands in its place."""
    (tmp_path / "secret.key").mkdir()

    with pytest.raises(ConfigError, match=r"cannot use .*secret\.key: Is a directory"):
        async with running(root=tmp_path):
            pass


async def test_a_secret_is_there_whole_or_not(tmp_path: Path) -> None:
    """What a start has left that was killed as it made one is no secret, and made anew."""
    (tmp_path / "secret.new").write_bytes(b"x")
    async with running(root=tmp_path):
        pass

    assert 32 == len((tmp_path / "secret.key").read_bytes())
    assert not (tmp_path / "secret.new").exists()


def test_who_joins_a_data_folder_makes_no_secret(tmp_path: Path) -> None:
    """A worker whose folder was moved away would sign with one of its own."""
    with pytest.raises(ConfigError, match=r"cannot use .*secret\.key: No such file"):
        read_secret(tmp_path, make=False)

    assert [] == [*tmp_path.iterdir()]


async def test_only_the_owner_may_open_the_data_folder(tmp_path: Path) -> None:
    """The folder is 0700, and each file with data in it 0600, also where the folder was open."""
    root = tmp_path / "data"
    root.mkdir(mode=0o755)
    async with running(root=root) as server:
        await server.key_for("ada")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in root.iterdir()}

    assert 0o700 == stat.S_IMODE(root.stat().st_mode)
    assert {"system.db", "system.db-wal", "secret.key", "operations.sock"} <= set(modes)
    assert {0o600} == set(modes.values())


async def test_sql_reads_hashes_as_null(server: RunningServer) -> None:
    """Not even a super user sees what passwords and tokens are checked against."""
    await credentials_of(server, "ada")

    users = await server.operate("sql", sql="SELECT password FROM system.hdb_user")
    tokens = await server.operate("sql", sql="SELECT hash, kind FROM hdb_token ORDER BY kind")
    found = await server.operate("sql", sql="SELECT 1 FROM hdb_user WHERE password LIKE '$argon%'")

    assert [{"password": None}] * 2 == users
    assert {None} == {token["hash"] for token in tokens}
    assert {"api_key", "refresh"} == {token["kind"] for token in tokens}
    assert [] == found


# Which credentials open which port


@pytest.mark.parametrize("kind", ["key", "token", "basic"])
async def test_each_kind_of_credential_opens_both_ports(server: RunningServer, kind: str) -> None:
    """API keys, operation tokens and Basic are the same user on REST and operations port."""
    sent = await credentials_of(server, "ada", tenant="acme")

    assert (200, 200) == await statuses(server, sent[kind])
    _, info = await operation(server, {"operation": "user_info"}, sent[kind])
    assert ("ada", "acme") == (info["username"], info["tenant"])


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
async def test_the_scheme_is_read_in_any_case(server: RunningServer, scheme: str) -> None:
    """`bearer` is `Bearer`."""
    assert (200, 200) == await statuses(server, f"{scheme} {server.api_key}")


def foreign_token(username: str = "HDB_ADMIN", **header: Any) -> str:
    """A token that says it is ours, signed with another key."""
    claims = {"sub": "operation", "username": username, "exp": time.time() + 999}
    return jwt.encode(claims, "x" * 32, algorithm="HS256", headers=header)


def unsigned_token() -> str:
    """A token of the algorithm `none`."""
    claims = {"sub": "operation", "username": "HDB_ADMIN", "exp": time.time() + 999}
    return jwt.encode(claims, "", algorithm="none")


def encoded(text: bytes) -> str:
    """A Basic header of these bytes."""
    return f"Basic {base64.b64encode(text).decode()}"


WRONG: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "scheme alone": lambda: "Bearer",
    "token without scheme": lambda: "hk_abc",
    "unknown scheme": lambda: "Digest username=HDB_ADMIN",
    "unknown key": lambda: "Bearer hk_" + "a" * 43,
    "no key": lambda: "Bearer hk_",
    "no token of ours": lambda: "Bearer sk-abc",
    "two dots": lambda: "Bearer a.b.c",
    "foreign token": lambda: f"Bearer {foreign_token()}",
    "foreign token with a key id": lambda: f"Bearer {foreign_token(kid='../secret.key')}",
    "unsigned token": lambda: f"Bearer {unsigned_token()}",
    "no ASCII": lambda: "Bearer hk_\u00e9\u4e2d",
    "no base64": lambda: "Basic !!!",
    "no ASCII in base64": lambda: "Basic \u00e9\u4e2d",
    "no colon": lambda: encoded(b"HDB_ADMIN"),
    "no username": lambda: encoded(b":pw"),
    "no UTF-8": lambda: encoded(b"HDB_ADMIN:\xff"),
    "wrong password": lambda: basic("HDB_ADMIN", "wrong"),
    "no password": lambda: basic("HDB_ADMIN", ""),
    "unknown user": lambda: basic("nobody", "pw"),
    "SQL": lambda: basic("' OR 1=1 --", "pw"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_credential_is_never_anonymous(name: str) -> None:
    """Each is 401 on the gateway, on a public resource, on no resource, and on operations."""
    credential = WRONG[name]()
    async with running(resources={"open": Open}) as server:
        refused = [await get(server, path, credential) for path in ("open", "v1/models", "none")]
        status, told = await operation(server, {"operation": "user_info"}, credential)

        assert (200, {"user": None}) == await get(server, "open")
    assert [401, 401, 401] == [status for status, _ in refused]
    assert "invalid_api_key" == refused[1][1]["error"]["code"]
    assert 401 == status
    assert {"error"} == set(told)


async def test_bytes_that_are_no_text_are_refused_too(server: RunningServer) -> None:
    """A header of any bytes is a wrong credential, not a fault of the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
    writer.write(b"Authorization: Bearer hk_\xff\xfe\r\n\r\n")

    async with asyncio.timeout(30):
        answer = await reader.read()

    writer.close()
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_an_expired_token_is_refused() -> None:
    """It is 401 and says why, on both ports."""
    config = "authentication: {operationTokenTimeout: 1ms, refreshTokenTimeout: 1ms}"
    async with running(f"{ECHO}\n{config}", resources={"open": Open}) as server:
        sent = await credentials_of(server, "ada")
        body = {"operation": "refresh_operation_token"}

        assert (401, {"error": "token expired"}) == await operation(server, body, sent["refresh"])
        assert (401, 401) == await statuses(server, sent["token"])
        status, told = await get(server, "open", sent["token"])
        assert (401, "token expired") == (status, told["detail"])


async def test_a_401_names_the_ways_in(server: RunningServer) -> None:
    """It offers Bearer and Basic; to a page's own calls not Basic, which opens a dialogue."""
    url = f"{server.url}/v1/models"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url) as plain,
        session.get(url, headers={"Origin": "http://example.org"}) as page,
    ):
        schemes = [
            [value.partition(" ")[0] for value in response.headers.getall("WWW-Authenticate")]
            for response in (plain, page)
        ]
        error = await error_of(plain)

    assert [["Bearer", "Basic"], ["Bearer"]] == schemes
    assert ("invalid_request_error", None) == (error["type"], error["code"])


# When they end


async def test_a_dropped_key_is_refused_at_once(server: RunningServer) -> None:
    """Although it was remembered on both ports a moment ago."""
    sent = await credentials_of(server, "ada")
    (key,) = [key for key in await server.operate("list_api_keys") if key.user == "ada"]
    assert (200, 200) == await statuses(server, sent["key"])

    await server.operate("drop_api_key", id=key.id)

    assert (401, 401) == await statuses(server, sent["key"])
    assert (200, 200) == await statuses(server, sent["basic"])


async def test_the_tokens_of_a_key_are_the_keys(server: RunningServer) -> None:
    """They call in its name, those that follow them too, and end with it; the user's own go on."""
    sent = await credentials_of(server, "ada")
    (key,) = [key for key in await server.operate("list_api_keys") if key.user == "ada"]
    _, made = await operation(server, {"operation": "create_authentication_tokens"}, sent["key"])
    body = {"operation": "refresh_operation_token", "refresh_token": made["refresh_token"]}
    _, next_ones = await operation(server, body)
    tokens = [f"Bearer {one['operation_token']}" for one in (made, next_ones)]

    for token in tokens:
        assert [200, 200] == [*await statuses(server, token)]
        hello = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
        said = await ask(server, "POST", "/v1/chat/completions", key=token[7:], json=hello)
        assert 200 == said.status
    assert [key.id] * 2 == [row["api_key"] for row in await server.rows()]

    await server.operate("drop_api_key", id=key.id)

    for token in tokens:
        assert (401, 401) == await statuses(server, token)
    body |= {"refresh_token": next_ones["refresh_token"]}
    assert 401 == (await operation(server, body))[0]
    assert (200, 200) == await statuses(server, sent["token"])


async def test_a_key_that_is_dropped_meanwhile_makes_no_tokens(server: RunningServer) -> None:
    """Who it was has been asked before; whether it is still there is asked with the writing."""
    await credentials_of(server, "ada")
    key_id, key = await server.server.core.keys.add("ada", "second")
    verified = await server.server.core.keys.authenticate(Bearer(key))
    assert verified is not None
    await server.operate("drop_api_key", id=key_id)

    with pytest.raises(InvalidCredentials):
        await server.server.core.tokens.create(verified.user)


async def test_an_inactive_user_is_refused_at_once_and_let_in_again(server: RunningServer) -> None:
    """What was remembered stops; key and password work when it is active again, tokens do not."""
    sent = await credentials_of(server, "ada")
    for kind in ("key", "token", "basic"):
        assert (200, 200) == await statuses(server, sent[kind])

    await server.operate("alter_user", username="ada", active=False)

    for kind in ("key", "token", "basic"):
        assert (401, 401) == await statuses(server, sent[kind])
    body = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw"}
    assert (401, {"error": "Login failed"}) == await operation(server, body)

    await server.operate("alter_user", username="ada", active=True)

    for kind in ("key", "basic"):
        assert (200, 200) == await statuses(server, sent[kind])
    assert (401, 401) == await statuses(server, sent["token"])


@pytest.mark.parametrize("field", ["username", "tenant"])
async def test_a_name_that_each_row_would_hold_is_no_longer_than_a_row_takes(
    server: RunningServer, field: str
) -> None:
    """Of a user who is made, and of the tenant that one is moved to."""
    ada = {"username": "ada", "password": "pw", "role": "model_user", "tenant": "acme"}
    await server.operate("add_user", **ada)
    with pytest.raises(InvalidBody, match="256"):
        await server.operate("add_user", **{**ada, field: "x" * 257})
    with pytest.raises(InvalidBody, match="256"):
        await server.operate("alter_user", username="ada", tenant="x" * 257)
    await server.operate("add_user", **{**ada, "username": "eve", field: "x" * 256})


@pytest.mark.parametrize("name", ["a:b", "ada\n", "a\tb", "\x00"])
async def test_a_name_by_which_nobody_can_log_in_is_refused(
    server: RunningServer, name: str
) -> None:
    """Basic ends a name at its first colon, and no header has a control character."""
    new = {"operation": "add_user", "username": name, "password": "pw", "role": "model_user"}

    status, told = await operation(server, new, f"Bearer {server.api_key}")

    assert (400, "username: expected printable characters, and no colon") == (status, told["error"])


@pytest.mark.parametrize("field", ["name", "tenant"])
async def test_what_a_key_is_called_has_an_end(server: RunningServer, field: str) -> None:
    """Its tenant, which each row would hold, and its name, which anybody gives."""
    key = {"name": "k", "tenant": "acme"}
    with pytest.raises(InvalidBody, match="256"):
        await server.operate("add_api_key", **{**key, field: "x" * 257})
    await server.operate("add_api_key", **{**key, field: "x" * 256})


async def test_a_dropped_user_is_refused_at_once(server: RunningServer) -> None:
    """Its keys and tokens end with it, and do not open the account of a namesake."""
    sent = await credentials_of(server, "ada")
    for kind in ("key", "token", "basic"):
        assert (200, 200) == await statuses(server, sent[kind])

    await server.operate("drop_user", username="ada")

    for kind in ("key", "token", "basic"):
        assert (401, 401) == await statuses(server, sent[kind])
    assert [] == [key for key in await server.operate("list_api_keys") if key.user == "ada"]

    await server.operate("add_user", username="ada", password="other", role="model_user")

    for kind in ("key", "token", "basic"):
        assert (401, 401) == await statuses(server, sent[kind])
    body = {"operation": "refresh_operation_token"}
    status, _ = await operation(server, body, sent["refresh"])
    assert 401 == status


async def test_a_new_password_ends_what_the_old_one_made(server: RunningServer) -> None:
    """The old password and its tokens are refused at once; keys are ended on their own."""
    sent = await credentials_of(server, "ada")
    for kind in ("key", "token", "basic"):
        assert (200, 200) == await statuses(server, sent[kind])

    await server.operate("alter_user", username="ada", password="new")

    assert (401, 401) == await statuses(server, sent["basic"])
    assert (401, 401) == await statuses(server, sent["token"])
    assert (200, 200) == await statuses(server, basic("ada", "new"))
    assert (200, 200) == await statuses(server, sent["key"])
    body = {"operation": "refresh_operation_token"}
    status, _ = await operation(server, body, sent["refresh"])
    assert 401 == status


INFO = {"operation": "user_info"}
TAKEN: dict[str, dict[str, Any]] = {
    "drop_api_key": {},
    "drop_user": {"username": "ada"},
    "alter_user": {"username": "ada", "active": False},
    "alter_role": {"id": "asker", "permission": {"operations": []}},
}


@pytest.mark.parametrize(("name", "parameters"), TAKEN.items(), ids=TAKEN)
async def test_a_right_is_taken_away_although_who_asked_for_it_has_left(
    server: RunningServer,
    name: str,
    parameters: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the database was busy: the change is made, and what was remembered is forgotten."""
    await server.operate("add_role", role="asker", permission={})
    await server.operate("add_user", username="ada", password="pw", role="asker")
    made = await server.operate("add_api_key", name="k", username="ada")
    assert 200 == (await operation(server, INFO, f"Bearer {made['api_key']}"))[0]
    submit, given = Database.submit, list[Future[Any]]()

    def watched(database: Database, work: Any) -> Future[Any]:
        given.append(submit(database, work))
        return given[-1]

    await server.operate("list_api_keys")  # When the key was used last is written then.
    monkeypatch.setattr(Database, "submit", watched)
    with busy(server.server.root):
        key = {"id": made["id"]} if name == "drop_api_key" else {}
        asked = asyncio.create_task(server.operate(name, **parameters, **key))
        await until(lambda: bool(given) and given[0].running())
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
    await asyncio.wrap_future(given[0])

    assert 200 != (await operation(server, INFO, f"Bearer {made['api_key']}"))[0]


async def test_a_new_role_counts_at_once(server: RunningServer) -> None:
    """A remembered credential gains and loses rights with its user's role."""
    sent = await credentials_of(server, "ada")
    body = {"operation": "list_users"}
    got = [(await operation(server, body, sent["key"]))[0]]
    for role in ("super_user", "model_user"):
        await server.operate("alter_user", username="ada", role=role)
        got.append((await operation(server, body, sent["key"]))[0])

    assert [403, 200, 403] == got


async def test_a_failure_is_not_remembered(server: RunningServer) -> None:
    """A credential that was refused works as soon as it is right."""
    credential = basic("ada", "pw")
    assert (401, 401) == await statuses(server, credential)
    await server.operate("add_user", username="ada", password="other", role="model_user")
    assert (401, 401) == await statuses(server, credential)

    await server.operate("alter_user", username="ada", password="pw")

    assert (200, 200) == await statuses(server, credential)


class Doorman:
    """A plugin's authenticator: vouches for one bearer token, when the test lets it."""

    def __init__(self, expires: float | None = None) -> None:
        self.expires = expires
        self.asked = 0
        self.arrived, self.open = asyncio.Event(), asyncio.Event()
        self.open.set()

    def handle_application(self, scope: Scope) -> None:
        """Stand behind those that are there."""
        self._people = scope.people
        scope.authenticators.append(self)

    async def __call__(self, credential: Credential) -> Verified | None:
        """The user `HDB_ADMIN` for `Bearer door`."""
        if not isinstance(credential, Bearer) or not credential.token.startswith("door"):
            return None
        self.asked += 1
        self.arrived.set()
        await self.open.wait()
        if credential.token != "door":
            message = "The door stays shut."
            raise InvalidCredentials(message)
        user: User | None = await self._people.user("HDB_ADMIN")
        return user and Verified(user, self.expires)


async def test_a_plugin_that_did_not_start_vouches_for_nobody() -> None:
    """What it would have checked before it vouches may be what it could not set up."""

    def fail(scope: Scope) -> None:
        Doorman().handle_application(scope)
        message = "no settings"
        raise ConfigError(message)

    async with running(handle_application=fail, resources={"open": Open}) as server:
        assert (401, 401) == await statuses(server, "Bearer door")
        assert (200, 200) == await statuses(server, f"Bearer {server.api_key}")


async def test_what_can_vouch_for_nobody_is_no_authenticator() -> None:
    """Its plugin does not start; a login is not what finds it out."""
    none: Any = 5
    async with running(
        handle_application=lambda scope: scope.authenticators.append(none)
    ) as server:
        told = server.server.health.plugins["test"].error

    assert "authenticators.append: expected an async function, got 5" == told


@pytest.mark.parametrize(("lives", "asked"), [(None, 1), (60.0, 1), (-1.0, 3)])
async def test_a_plugin_vouches_for_a_credential_of_its_own(
    lives: float | None, asked: int
) -> None:
    """It is asked after the built-in ones, once, unless what it vouched for has expired."""
    doorman = Doorman(lives and time.time() + lives)
    async with running(handle_application=doorman.handle_application) as server:
        for _ in range(3):
            assert 200 == (await get(server, "v1/models", "Bearer door"))[0]
        assert asked == doorman.asked
        assert 401 == (await get(server, "v1/models", "Bearer doorway"))[0]


async def test_what_is_verified_while_a_right_is_taken_away_is_not_remembered() -> None:
    """An answer that was under way when something changed is asked for anew the next time."""
    doorman = Doorman()
    doorman.open.clear()
    async with running(handle_application=doorman.handle_application) as server:
        async with asyncio.timeout(30):
            first = asyncio.create_task(get(server, "v1/models", "Bearer door"))
            await doorman.arrived.wait()
            await server.operate("add_user", username="ada", password="pw", role="model_user")
            doorman.open.set()
            await first
            for _ in range(2):
                await get(server, "v1/models", "Bearer door")

    assert 2 == doorman.asked


# Who may what


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "drop_user"},
        {"operation": "alter_user", "role": "model_user"},
        {"operation": "alter_user", "active": False},
    ],
    ids=["drop", "demote", "deactivate"],
)
async def test_the_last_super_user_stays(server: RunningServer, change: dict[str, Any]) -> None:
    """It cannot be dropped, demoted or deactivated until there is another active one."""
    admin = f"Bearer {server.api_key}"
    body = {**change, "username": "HDB_ADMIN"}

    assert 409 == (await operation(server, body, admin))[0]
    await server.operate("add_user", username="off", password="pw", role="super_user", active=False)
    assert 409 == (await operation(server, body, admin))[0]
    assert (200, 200) == await statuses(server, admin)

    await server.operate("add_user", username="eve", password="pw", role="super_user")
    assert 200 == (await operation(server, body, admin))[0]


GRANTS = {"notes": ["read"], "deep/*": ["create", "delete"], "deep/b": ["update"]}
OPENED = {
    "notes": {"GET", "HEAD"},
    "notes2": set[str](),
    "deep": {"POST", "DELETE"},
    "deep/a": {"POST", "DELETE"},
    "deep/b": {"POST", "DELETE", "PUT", "PATCH"},
    "deeper": set[str](),
    "v1/models": set[str](),
}


async def test_a_role_opens_its_paths_and_verbs_and_no_others() -> None:
    """Each method on each path is 200 where the role grants it and 403 where it does not."""
    mounts = {path: Every for path in OPENED if path != "v1/models"}
    async with running(resources=mounts) as server:
        await server.operate("add_role", role="clerk", permission={"resources": GRANTS})
        key = await server.key_for("ada", role="clerk")
        got: dict[str, set[str]] = {path: set() for path in OPENED}
        refused: set[int] = set()
        async with server.session(key) as session:
            for path in mounts:
                for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
                    async with session.request(method, f"/{path}") as response:
                        if response.status == 200:
                            got[path].add(method)
                        else:
                            refused.add(response.status)
            async with session.get("/v1/models") as response:
                error = await error_of(response)
                refused.add(response.status)

    assert OPENED == got
    assert {403} == refused
    assert ("permission_error", "insufficient_permissions") == (error["type"], error["code"])


async def test_nobody_is_trusted_for_being_near(server: RunningServer) -> None:
    """Without a credential the own machine is a stranger."""
    assert 401 == (await get(server, "v1/models"))[0]
    assert 401 == (await operation(server, {"operation": "user_info"}))[0]


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "Origin"])
async def test_authorize_local_ends_at_a_proxy_and_at_a_page(name: str) -> None:
    """Where it is on, this machine is super user, unless another speaks through it."""
    async with running(f"{ECHO}\nauthentication: {{authorizeLocal: true}}") as server:
        assert 200 == (await get(server, "v1/models"))[0]
        _, info = await operation(server, {"operation": "user_info"})
        assert "HDB_ADMIN" == info["username"]

        assert 401 == (await get(server, "v1/models", **{name: "192.0.2.1"}))[0]
        assert 401 == (await get(server, "v1/models", "Bearer hk_wrong"))[0]
