"""A server that is worth breaking into, and what a stranger knows of it: for test_attacks.py."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import socket
import sqlite3
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import msgspec
from yarl import URL

from harperpy import Context, Resource, Scope, TableResource, get_context
from harperpy.serving import _Masked
from harperpy.testing import RunningServer, ScriptedUpstream, running, scripted_upstream
from harperpy.upstream import Answer
from helpers import basic

# What must be in no answer, no line of the log and no row, wherever else it is.
PROVIDER_KEY = "sk-planted-key-of-the-provider"
PASSWORD = "planted-password-of-ada"
PROMPT = "planted prompt of ada"
IN_AN_ERROR = "sk-planted-in-an-exception"
OTHERS_ROW = "planted row of ada"

CONFIG = """
models:
  generative:
    default: {{backend: openai, baseUrl: "{url}/v1", apiKey: "{key}", model: m, maxRetries: 0}}
    echo: {{backend: echo}}
  embedding:
    default: {{backend: openai, baseUrl: "{url}/v1", apiKey: "{key}", model: m, maxRetries: 0}}
http:
  {{maxBodySize: 100000, keepAliveTimeout: 1s, cors: true, corsAccessList: ["https://app.example"]}}
operationsApi:
  network: {{cors: true, corsAccessList: ["https://app.example"]}}
"""
HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


class Note(msgspec.Struct):
    """What the tables hold."""

    owner: str
    text: str
    id: int | None = None


class Own(Resource):
    """A plugin that trusts what the server says of who asks."""

    sub_paths = True

    @staticmethod
    def get(target: object, context: Context) -> dict[str, Any]:
        """Who the server says it is."""
        user = context.user
        return {"user": user and user.username, "tenant": user and user.tenant}


class Broken(Resource):
    """A plugin that fails with a secret in its mouth."""

    public = True

    @staticmethod
    def get() -> None:
        """Fail."""
        raise RuntimeError(IN_AN_ERROR)

    @staticmethod
    def post() -> Iterator[str]:
        """Fail in a stream."""
        yield "begun"
        raise RuntimeError(IN_AN_ERROR)


class Hall(Resource):
    """A WebSocket and a stream of events."""

    @staticmethod
    async def connect(incoming: Any) -> Any:
        """Say who is there."""
        user = get_context().user
        yield f"welcome {user and user.username}"


async def plugin(scope: Scope) -> None:
    """Tables, mounts, and an operation that fails."""
    await scope.database.tables.ensure("diary", Note)
    notes = await scope.database.tables.ensure("notes", Note)
    scope.resources.set("notes", TableResource.over(notes))
    for path, resource in (("own", Own), ("broken", Broken), ("hall", Hall)):
        scope.resources.set(path, resource)
    scope.operations.add("break_it", _break, msgspec.defstruct("Nothing", []), open_to="user")


def _break(_: object) -> None:
    raise RuntimeError(IN_AN_ERROR)


class Seen(NamedTuple):
    """An answer: its status, its head and its body."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The decoded body."""
        return msgspec.json.decode(self.text)


@dataclass
class Victim:
    """The server, `Authorization` headers by what they are worth, and ids of others' things."""

    server: RunningServer
    upstream: ScriptedUpstream
    trap: Trap
    log: io.StringIO
    who: dict[str, str] = field(default_factory=dict[str, str])
    ids: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens: dict[str, str] = field(default_factory=dict[str, str])
    secrets: set[str] = field(default_factory=set[str])
    first: dict[str, Any] = field(default_factory=dict[str, Any])

    async def rest(self, method: str, path: str, who: str = "", **options: Any) -> Seen:
        """A request of the REST port, its path as it is written."""
        return await self._ask(self.server.url, method, path, who, options)

    async def ops(self, method: str, path: str = "/", who: str = "", **options: Any) -> Seen:
        """A request of the operations port."""
        return await self._ask(self.server.operations_url, method, path, who, options)

    async def op(self, who: str, name: str, /, **parameters: Any) -> Seen:
        """An operation."""
        return await self.ops("POST", who=who, json={"operation": name, **parameters})

    async def sql(self, text: str, who: str = "root") -> Seen:
        """A statement."""
        return await self.op(who, "sql", sql=text)

    async def chat(self, who: str = "mallory", **more: Any) -> Seen:
        """A chat that asks for more than it should."""
        return await self.rest("POST", CHAT, who, json={"messages": HELLO, "model": "echo", **more})

    async def _ask(
        self, url: str, method: str, path: str, who: str, options: dict[str, Any]
    ) -> Seen:
        headers = dict(options.pop("headers", {}))
        if who:
            headers["Authorization"] = self.who[who]
        async with (
            asyncio.timeout(20),
            aiohttp.ClientSession() as client,
            client.request(
                method,
                URL(f"{url}{path}", encoded=True),
                headers=headers,
                allow_redirects=False,
                **options,
            ) as response,
        ):
            raw = await response.read()
            return Seen(response.status, response.headers, raw.decode("utf-8", "replace"))

    async def raw(self, text: str, port: str = "rest") -> Seen:
        """What comes back for these very bytes, until the server closes: maybe several answers."""
        ports = {"rest": self.server.server.http_port, "ops": self.server.server.operations_port}
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[port])
        return await _exchange(reader, writer, text)

    async def local(self, text: str) -> Seen:
        """The same by the local socket."""
        path = str(self.server.server.root / "operations.sock")
        reader, writer = await asyncio.open_unix_connection(path)
        return await _exchange(reader, writer, text)

    async def state(self) -> dict[str, Any]:
        """All that no attack may change, as it is on disk."""
        await self.server.server.core.ledger.flush()
        await self.server.server.core.database.run(lambda _: None)
        config = await self.server.operate("get_configuration")
        return {"config": config, **{name: self.rows(sql) for name, sql in _KEPT.items()}}

    def rows(self, sql: str) -> list[Any]:
        """What a statement finds, past all doors."""
        path = self.server.server.core.database.path
        with closing(sqlite3.connect(path)) as connection:
            return connection.execute(sql).fetchall()

    def stored(self) -> str:
        """All rows of the server's own tables but for hashes, and what waits in the journal."""
        core = self.server.server.core
        texts: list[str] = []
        for name, table in core.database.system.items():
            hidden = core.database.hidden_columns
            shown = [f'"{one.name}"' for one in table.columns if (name, one.name) not in hidden]
            texts += map(str, self.rows(f"SELECT {', '.join(shown)} FROM {name}"))  # noqa: S608
        files = [one for one in self.server.server.root.rglob("*") if one.is_file()]
        texts += [one.read_text("latin-1") for one in files if not one.name.startswith("system.db")]
        return "\n".join(texts)

    def claims(self, token: str) -> dict[str, Any]:
        """What a token says."""
        body = self.tokens[token].split(".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))

    def password(self, name: str) -> str:
        """A user's password."""
        return PASSWORD if name == "ada" else f"pw-{name}"

    def leaked(self, text: str) -> set[str]:
        """The secrets that stand in a text."""
        return {secret for secret in self.secrets if secret in text}


_KEPT = {
    "users": "SELECT * FROM hdb_user ORDER BY username",
    "roles": "SELECT * FROM hdb_role ORDER BY id",
    "tokens": "SELECT id, user, kind, name, hash, expires, tenant, grants FROM hdb_token ORDER BY id",  # noqa: E501
    "notes": "SELECT * FROM notes ORDER BY id",
    "diary": "SELECT * FROM diary ORDER BY id",
    "schema": "SELECT name, sql FROM sqlite_master ORDER BY name",
    "others' calls": "SELECT * FROM hdb_model_calls WHERE user = 'ada' ORDER BY id",
    "others' deeds": "SELECT * FROM hdb_audit WHERE id <= 20 ORDER BY id",
}


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> Seen:
    async with asyncio.timeout(20):
        writer.write(text.encode("latin-1"))
        answer = (await reader.read()).decode("latin-1")
        writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    lines = (line.partition(": ") for line in head.split("\r\n")[1:])
    status = int(head.split(" ", 2)[1]) if head else 0
    return Seen(status, {name.lower(): value for name, _, value in lines}, body)


class Trap:
    """A server that nobody should ask, and how often it was."""

    def __init__(self) -> None:
        self.hits = 0
        self.url = ""

    async def handle(self, _: object, writer: asyncio.StreamWriter) -> None:
        """Count it."""
        self.hits += 1
        writer.close()


@asynccontextmanager
async def trap() -> AsyncGenerator[Trap]:
    """One that listens."""
    one = Trap()
    server = await asyncio.start_server(one.handle, "127.0.0.1", 0, family=socket.AF_INET)
    async with server:
        one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield one


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that the server's log would hold, down to the least line."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(_Masked("%(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("harperpy")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)


CLERK = {
    "resources": {"v1/models": ["read"], "own": ["read"]},
    "data": {
        "tables": {
            "notes": {
                "read": True,
                "attribute_permissions": [
                    {"attribute_name": "id", "read": True},
                    {"attribute_name": "owner", "read": True},
                ],
            }
        }
    },
}
FULL = {"read": True, "insert": True, "update": True, "delete": True}


@asynccontextmanager
async def attacked(more: str = "") -> AsyncGenerator[Victim]:
    """The server: ada of one tenant, mallory of another, and what both have."""
    async with scripted_upstream() as upstream, trap() as trapped:
        config = CONFIG.format(url=upstream.url.removesuffix("/v1"), key=PROVIDER_KEY) + more
        with logged() as log:
            async with running(config, handle_application=plugin) as server:
                faults = [one.error for one in server.server.health.plugins.values() if one.error]
                assert not faults
                victim = Victim(server, upstream, trapped, log)
                await _people(victim)
                await _things(victim)
                victim.first = await victim.state()
                yield victim


async def _people(victim: Victim) -> None:
    server, who = victim.server, victim.who
    owner = {"resources": {"v1/*": ["read", "create"]}, "data": {"tables": {"diary": FULL}}}
    await server.operate("add_role", role="owner", permission=owner)
    await server.operate("add_role", role="clerk", permission=CLERK)
    await server.operate("add_role", role="nothing", permission={"operations": []})
    users = {
        "ada": ("owner", "acme"),
        "mallory": ("model_user", "evil"),
        "clerk": ("clerk", "evil"),
        "nobody": ("nothing", "evil"),
        "zoe": ("super_user", "acme"),
        "ivy": ("super_user", "acme"),
    }
    who["root"] = f"Bearer {server.api_key}"
    for name, (role, tenant) in users.items():
        password = PASSWORD if name == "ada" else f"pw-{name}"
        user = {"username": name, "password": password, "role": role, "tenant": tenant}
        await server.operate("add_user", **user)
        made = await server.operate("add_api_key", name="own", username=name)
        victim.ids[f"key of {name}"] = made["id"]
        who[name] = f"Bearer {made['api_key']}"
        login = {"username": name, "password": password}
        tokens = (await victim.op("", "create_authentication_tokens", **login)).json
        for kind in ("operation", "refresh"):
            victim.tokens[f"{kind} of {name}"] = tokens[f"{kind}_token"]
        who[f"{name}'s password"] = basic(name, password)
    dropped = await server.operate("add_api_key", name="dropped")
    who["dropped"] = f"Bearer {dropped['api_key']}"
    await server.operate("drop_api_key", id=dropped["id"])
    await server.operate("alter_user", username="zoe", active=False)
    await server.operate("alter_user", username="ivy", password="new")


async def _things(victim: Victim) -> None:
    server = victim.server
    victim.upstream.usual = _answer
    rows = [{"owner": "ada", "text": OTHERS_ROW}, {"owner": "mallory", "text": "mine"}]
    for table in ("notes", "diary"):
        await server.operate("insert", table=table, records=rows)
    asked = [{"role": "user", "content": PROMPT}]
    called = await victim.chat("ada", messages=asked, model="default")
    assert 200 == called.status, called.text
    victim.ids["call of ada"] = int(called.headers["x-harper-call-id"])
    await victim.state()
    victim.secrets |= {PROVIDER_KEY, PASSWORD, PROMPT, IN_AN_ERROR, OTHERS_ROW}
    hashes = victim.rows("SELECT password FROM hdb_user UNION ALL SELECT hash FROM hdb_token")
    victim.secrets |= {text for (text,) in hashes}
    for header in victim.who.values():
        victim.secrets.add(header.partition(" ")[2])
    victim.secrets |= set(victim.tokens.values())


def _answer(path: str, _: object) -> Answer:
    message = {"role": "assistant", "content": "fine"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    common = {"id": "1", "created": 1, "model": "m", "usage": usage}
    if path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        return Answer(body={**common, "object": "list", "data": data})
    return Answer(body={**common, "object": "chat.completion", "choices": [choice]})
