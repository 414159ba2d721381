"""Ways in, each a row: what a stranger or a user with few rights tries, and that it does not work.

Every row says what is answered; that nothing was changed and no secret told is checked after each,
and of the log, the rows and the journal once more at the end.
"""

import base64
import gzip
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import jwt
import pytest
import pytest_asyncio

from attacked import CHAT, HELLO, PROVIDER_KEY, Seen, Victim, attacked
from harperpy.upstream import Answer, chunk
from helpers import basic

pytestmark = pytest.mark.asyncio(loop_scope="module")

Try: TypeAlias = Callable[[Victim], Awaitable[Seen]]
Row: TypeAlias = tuple[int | set[int], Try]
"""What is answered, and what is tried. Several statuses where it depends on the HTTP parser."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim() -> AsyncIterator[Victim]:
    """One server for all attacks."""
    async with attacked() as one:
        yield one


# --- what is another's


OBJECTS: dict[str, Row] = {
    "another's receipt": (
        404,
        lambda v: v.op("mallory", "get_model_call", id=v.ids["call of ada"]),
    ),
    "a receipt without a key": (401, lambda v: v.op("", "get_model_call", id=1)),
    "a receipt by a text": (
        400,
        lambda v: v.op("mallory", "get_model_call", id=f"{v.ids['call of ada']}"),
    ),
    "a receipt by a list": (
        400,
        lambda v: v.op("mallory", "get_model_call", id=[v.ids["call of ada"]]),
    ),
    "all receipts": (400, lambda v: v.op("mallory", "get_model_call", id=None)),
    "another's key ended": (404, lambda v: v.op("mallory", "drop_api_key", id=v.ids["key of ada"])),
    "another's refresh token ended as a key": (
        404,
        lambda v: v.op("mallory", "drop_api_key", id=v.claims("refresh of ada")["sid"]),
    ),
    "a key ended by a pattern": (404, lambda v: v.op("mallory", "drop_api_key", id="%")),
    "a key for another": (403, lambda v: v.op("mallory", "add_api_key", name="x", username="ada")),
    "a key for the super user": (
        403,
        lambda v: v.op("mallory", "add_api_key", name="x", username="HDB_ADMIN"),
    ),
    "a key for nobody": (403, lambda v: v.op("mallory", "add_api_key", name="x", username="no")),
    "another's table": (
        403,
        lambda v: v.op("mallory", "search_by_value", table="diary", attribute="id", value="*"),
    ),
    "another's rows by id": (
        403,
        lambda v: v.op("mallory", "search_by_id", table="diary", ids=[1, 2]),
    ),
    "another's rows over REST": (403, lambda v: v.rest("GET", "/notes/", "mallory")),
    "another's row over REST": (403, lambda v: v.rest("GET", "/notes/1", "mallory")),
    "another's row as CSV": (403, lambda v: v.rest("GET", "/notes/1.csv", "mallory")),
    "another's row changed": (
        403,
        lambda v: v.rest("PATCH", "/notes/1", "mallory", json={"text": "x"}),
    ),
    "another's row replaced": (
        403,
        lambda v: v.op("clerk", "upsert", table="notes", records=[{"id": 1, "owner": "clerk"}]),
    ),
    "another's row removed": (403, lambda v: v.op("mallory", "delete", table="diary", ids=[1])),
    "a hidden attribute": (
        403,
        lambda v: v.op("clerk", "search_by_id", table="notes", ids=[1], get_attributes=["text"]),
    ),
    "a hidden attribute by a condition": (
        403,
        lambda v: v.op("clerk", "search_by_value", table="notes", attribute="text", value="p*"),
    ),
    "a hidden attribute by sorting": (
        403,
        lambda v: v.op(
            "clerk",
            "search_by_conditions",
            table="notes",
            conditions=[{"attribute": "id", "comparator": "gt", "value": 0}],
            sort={"attribute": "text"},
        ),
    ),
    "a hidden attribute within conditions": (
        403,
        lambda v: v.op(
            "clerk",
            "search_by_conditions",
            table="notes",
            operator="or",
            conditions=[
                {"conditions": [{"attribute": "text", "comparator": "sw", "value": "planted"}]}
            ],
        ),
    ),
    "users read as a table": (
        403,
        lambda v: v.op("mallory", "search_by_id", database="system", table="hdb_user", ids=["ada"]),
    ),
    "calls read as a table": (
        403,
        lambda v: v.op(
            "clerk",
            "search_by_value",
            schema="system",
            table="hdb_model_calls",
            attribute="user",
            value="ada",
        ),
    ),
    "the server's tables described": (
        403,
        lambda v: v.op("mallory", "describe_database", database="system"),
    ),
    "another's table described": (403, lambda v: v.op("mallory", "describe_table", table="diary")),
    "the super user writes a user's row": (
        403,
        lambda v: v.op(
            "root",
            "upsert",
            database="system",
            table="hdb_user",
            records=[{"username": "x", "role": "super_user"}],
        ),
    ),
    "the super user writes a key's row": (
        403,
        lambda v: v.op("root", "delete", schema="system", table="hdb_token", ids=["x"]),
    ),
    "the audit is deleted": (
        403,
        lambda v: v.op("root", "delete", database="system", table="hdb_audit", ids=[1]),
    ),
}


# --- who one is


def unsigned(claims: dict[str, Any], **head: Any) -> str:
    """A token that says who it is for, and is signed by nobody."""
    parts = ({"typ": "JWT", **head}, claims)
    return ".".join(_encoded(json.dumps(part).encode()) for part in parts) + "."


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(claims: dict[str, Any], secret: bytes, **head: Any) -> str:
    """A token signed with a secret that the server does not have."""
    text = unsigned(claims, **{"alg": "HS256", **head}).removesuffix(".")
    digest = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return f"{text}.{_encoded(digest)}"


def changed(victim: Victim, token: str, **claims: Any) -> str:
    """A good token with other claims, and the signature that it had."""
    head, _, signature = victim.tokens[token].split(".")
    body = _encoded(json.dumps({**victim.claims(token), **claims}).encode())
    return f"{head}.{body}.{signature}"


def resigned(victim: Victim, **claims: Any) -> str:
    """A token with other claims that a server signed with this one's own key: a second lock."""
    all_claims = {**victim.claims("operation of mallory"), **claims}
    key = victim.server.server.core.tokens._sign_key
    return jwt.encode(all_claims, key, algorithm="HS256")


async def bearing(victim: Victim, header: str, door: str = "rest") -> Seen:
    """A request with this `Authorization`."""
    headers = {"Authorization": header}
    if door == "rest":
        return await victim.rest("GET", "/v1/models", headers=headers)
    return await victim.ops("POST", headers=headers, json={"operation": "user_info"})


async def bytes_bearing(victim: Victim, header: bytes) -> Seen:
    """The same with bytes that no client would send."""
    head = f"GET /v1/models HTTP/1.1\r\nHost: a\r\n{header.decode('latin-1')}\r\n"
    return await victim.raw(f"{head}Connection: close\r\n\r\n")


def key(victim: Victim, who: str = "ada") -> str:
    """A key itself."""
    return victim.who[who].partition(" ")[2]


LOGINS: dict[str, Row] = {
    "a refresh token as an operation token": (
        401,
        lambda v: bearing(v, f"Bearer {v.tokens['refresh of ada']}"),
    ),
    "a refresh token as an operation token, operations": (
        401,
        lambda v: bearing(v, f"Bearer {v.tokens['refresh of ada']}", "ops"),
    ),
    "an operation token as a refresh token": (
        401,
        lambda v: v.op("", "refresh_operation_token", refresh_token=v.tokens["operation of ada"]),
    ),
    "a key as a refresh token": (
        401,
        lambda v: v.op("", "refresh_operation_token", refresh_token=key(v)),
    ),
    "a refresh token of none": (
        401,
        lambda v: v.op("", "refresh_operation_token", refresh_token=unsigned({}, alg="none")),
    ),
    **{
        f"alg {alg}": (
            401,
            lambda v, alg=alg: bearing(
                v, f"Bearer {unsigned(v.claims('operation of ada'), alg=alg)}"
            ),
        )
        for alg in ("none", "None", "nOnE", "")
    },
    "alg none with the old signature": (
        401,
        lambda v: bearing(
            v,
            "Bearer "
            + unsigned(v.claims("operation of ada"), alg="none")
            + v.tokens["operation of ada"].rpartition(".")[2],
        ),
    ),
    **{
        f"signed with {name}": (
            401,
            lambda v, secret=secret: bearing(
                v, f"Bearer {signed(v.claims('operation of ada'), secret)}"
            ),
        )
        for name, secret in {
            "nothing": b"",
            "the name of the server": b"harperpy",
            "a public purpose": b"token signatures",
            "zeros": bytes(32),
        }.items()
    },
    "RS256 with an HMAC": (
        401,
        lambda v: bearing(
            v, f"Bearer {signed(v.claims('operation of ada'), b'public', alg='RS256')}"
        ),
    ),
    "a key of its own in the head": (
        401,
        lambda v: bearing(
            v,
            "Bearer "
            + signed(
                v.claims("operation of ada"),
                b"mine",
                jwk={"kty": "oct", "k": _encoded(b"mine")},
                kid="../../../dev/null",
            ),
        ),
    ),
    "another user's name in a good token": (
        401,
        lambda v: bearing(v, f"Bearer {changed(v, 'operation of mallory', username='ada')}"),
    ),
    "a later end in a good token": (
        401,
        lambda v: bearing(v, f"Bearer {changed(v, 'operation of mallory', exp=2**40)}"),
    ),
    "a token cut short": (401, lambda v: bearing(v, f"Bearer {v.tokens['operation of ada'][:-2]}")),
    "another's session under one's name": (
        401,
        lambda v: bearing(v, f"Bearer {resigned(v, sid=v.claims('operation of ada')['sid'])}"),
    ),
    "another's name over one's session": (
        401,
        lambda v: bearing(v, f"Bearer {resigned(v, username='ada')}"),
    ),
    "a signed token that has ended": (
        401,
        lambda v: bearing(v, f"Bearer {resigned(v, exp=time.time() - 1)}"),
    ),
    "a signed token of another kind": (
        401,
        lambda v: bearing(v, f"Bearer {resigned(v, sub='refresh')}"),
    ),
    "a kind that is a list": (
        401,
        lambda v: bearing(v, f"Bearer {resigned(v, sub=['operation'])}"),
    ),
    "a token from before the new password": (
        401,
        lambda v: bearing(v, f"Bearer {v.tokens['operation of ivy']}"),
    ),
    "a refresh token from before the new password": (
        401,
        lambda v: v.op("", "refresh_operation_token", refresh_token=v.tokens["refresh of ivy"]),
    ),
    "the old password": (401, lambda v: v.op("ivy's password", "user_info")),
    "the key of an inactive user": (401, lambda v: v.rest("GET", "/v1/models", "zoe")),
    "the token of an inactive user": (
        401,
        lambda v: bearing(v, f"Bearer {v.tokens['operation of zoe']}"),
    ),
    "the refresh token of an inactive user": (
        401,
        lambda v: v.op("", "refresh_operation_token", refresh_token=v.tokens["refresh of zoe"]),
    ),
    "the password of an inactive user": (401, lambda v: v.op("zoe's password", "list_users")),
    "an inactive user logs in": (
        401,
        lambda v: v.op("", "create_authentication_tokens", username="zoe", password="pw-zoe"),
    ),
    "a key that was ended": (401, lambda v: v.rest("GET", "/v1/models", "dropped")),
    "the beginning of a key, as it is listed": (401, lambda v: bearing(v, f"Bearer {key(v)[:8]}")),
    "half a key": (401, lambda v: bearing(v, f"Bearer {key(v)[:20]}")),
    "a key in capitals": (401, lambda v: bearing(v, f"Bearer {key(v).upper()}")),
    "a key and more": (401, lambda v: bearing(v, f"Bearer {key(v)}=")),
    "a key and a word": (401, lambda v: bearing(v, f"Bearer {key(v)} x")),
    "a key and a null": (
        400,
        lambda v: bytes_bearing(v, f"Authorization: Bearer {key(v)}\0".encode()),
    ),
    "a key with a null within": (401, lambda v: bearing(v, f"Bearer {key(v)}%00")),
    "a key and a bare line feed": (
        {400, 401},  # a lenient parser would end the line there
        lambda v: bytes_bearing(v, f"Authorization: Bearer {key(v)[:-1]}\n{key(v)[-1]}".encode()),
    ),
    "a key on a folded line": (
        400,
        lambda v: bytes_bearing(v, f"Authorization: Bearer\r\n {key(v)}".encode()),
    ),
    "a key and an umlaut": (
        401,
        lambda v: bytes_bearing(v, f"Authorization: Bearer {key(v)}\u00fc".encode()),
    ),
    "a pattern as a key": (401, lambda v: bearing(v, "Bearer hk_%")),
    "a quote as a key": (401, lambda v: bearing(v, "Bearer hk_' OR 1=1 --")),
    "an empty Bearer": (401, lambda v: bearing(v, "Bearer ")),
    "Bearer and nothing else": (401, lambda v: bearing(v, "Bearer")),
    "Bearer undefined": (401, lambda v: bearing(v, "Bearer undefined")),
    "Bearer null": (401, lambda v: bearing(v, "Bearer null")),
    "an empty header": (401, lambda v: bytes_bearing(v, b"Authorization: ")),
    "no scheme": (401, lambda v: bearing(v, key(v))),
    "another scheme": (401, lambda v: bearing(v, f"Token {key(v)}")),
    "a scheme that begins so": (401, lambda v: bearing(v, f"Bearers {key(v)}")),
    "a tab after the scheme": (
        401,
        lambda v: bytes_bearing(v, f"Authorization: Bearer\t{key(v)}".encode()),
    ),
    "a key as a password": (401, lambda v: bearing(v, basic("ada", key(v)))),
    "a key as a name": (401, lambda v: bearing(v, basic(key(v), "x"))),
    "an empty password": (401, lambda v: bearing(v, basic("ada", ""))),
    "an empty name": (401, lambda v: bearing(v, basic("", ""))),
    "no colon": (401, lambda v: bearing(v, f"Basic {base64.b64encode(b'ada').decode()}")),
    "a hash as a password": (
        401,
        lambda v: bearing(
            v,
            basic("ada", v.rows("SELECT password FROM hdb_user WHERE username = 'ada'")[0][0]),
        ),
    ),
    "a name in capitals": (401, lambda v: bearing(v, basic("ADA", v.password("ada")))),
    "a name with a null": (401, lambda v: bearing(v, basic("ada\0", v.password("ada")))),
    "a password with a space": (401, lambda v: bearing(v, basic("clerk", "pw-clerk "))),
    "a quote as a name": (401, lambda v: bearing(v, basic("' OR '1'='1", "x"))),
    "a wrong key, then a good one": (
        {400, 401},
        lambda v: bytes_bearing(
            v, f"Authorization: Bearer x\r\nAuthorization: Bearer {key(v)}".encode()
        ),
    ),
    "two keys in one header": (401, lambda v: bearing(v, f"Bearer {key(v)}, Bearer {key(v)}")),
    "a key in the query": (
        401,
        lambda v: v.rest("GET", f"/v1/models?api_key={key(v)}&key={key(v)}&access_token={key(v)}"),
    ),
    "a key in a cookie": (
        401,
        lambda v: v.rest("GET", "/v1/models", headers={"Cookie": f"hdb-session={key(v)}"}),
    ),
    "a key for a proxy": (
        401,
        lambda v: v.rest("GET", "/v1/models", headers={"Proxy-Authorization": f"Bearer {key(v)}"}),
    ),
    "a name in a header": (
        401,
        lambda v: v.rest(
            "GET",
            "/v1/models",
            headers={"X-Forwarded-User": "ada", "Remote-User": "ada", "X-User": "ada"},
        ),
    ),
    "name and password in the query": (
        401,
        lambda v: v.ops("POST", "/?username=clerk&password=pw-clerk", json={"operation": "sql"}),
    ),
    "a password that is a map": (
        400,
        lambda v: v.op("", "create_authentication_tokens", username="ada", password={"$ne": ""}),
    ),
    "a password that is not there": (
        401,
        lambda v: v.op("", "create_authentication_tokens", username="ada"),
    ),
    "tokens for nobody": (401, lambda v: v.op("", "create_authentication_tokens")),
    "tokens for a wrong key": (401, lambda v: v.op("dropped", "create_authentication_tokens")),
}


# --- what one may do


REFUSED_NAMES = (
    "list_users ",
    " list_users",
    "LIST_USERS",
    "list_users\0",
    "list\u200b_users",
    "list_us\u0435rs",
    "list_users;",
    ["list_users"],
    {"list_users": True},
    "__class__",
    "",
    None,
)


async def every_operation(victim: Victim, who: str, *, but: Iterable[str] = ()) -> Seen:
    """Each operation that is not for such a caller, and one whose status is not that of all."""
    core = victim.server.server.core
    closed = ("super_user", "user") if who in ("", "nobody", "dropped") else ("super_user",)
    names = [one.name for one in core.operations if one.open_to in closed and one.name not in but]
    answers = [await victim.op(who, name) for name in names]
    assert len(names) > 10
    statuses = [seen.status for seen in answers]
    text = " ".join(seen.text for seen in answers)
    odd = next((one for one in statuses if one not in (401, 403)), statuses[0])
    return Seen(odd, {}, text)


async def every_mount(victim: Victim, who: str, method: str) -> Seen:
    """A verb of each mount that is not open to all: the most open of the answers."""
    core = victim.server.server.core
    paths = [one.path for one in core.resources if not one.public]
    answers = [await victim.rest(method, f"/{path}", who) for path in paths]
    assert len(paths) > 3
    # Who is logged in may learn that there is no such verb.
    kind = 401 if who in ("", "dropped") else 403
    status = min(one.status for one in answers if one.status not in (404, 405, 406) or kind == 401)
    return Seen(status, {}, " ".join(one.text for one in answers))


async def operation_by(victim: Victim, data: Any, kind: str, who: str = "mallory") -> Seen:
    """An operation in a body of another type."""
    return await victim.ops("POST", who=who, data=data, headers={"Content-Type": kind})


FUNCTIONS: dict[str, Row] = {
    "every operation without a key": (401, lambda v: every_operation(v, "")),
    "every operation with an ended key": (401, lambda v: every_operation(v, "dropped")),
    "every operation for super users, as a user of models": (
        403,
        lambda v: every_operation(v, "mallory"),
    ),
    "every operation for super users, by a password": (
        403,
        lambda v: every_operation(v, "mallory's password"),
    ),
    "every operation for super users, as a clerk": (403, lambda v: every_operation(v, "clerk")),
    "every operation, as a role without any": (403, lambda v: every_operation(v, "nobody")),
    **{
        f"every mount by {method} without a key": (
            401,
            lambda v, method=method: every_mount(v, "", method),
        )
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "QUERY", "PROPFIND")
    },
    "every mount with an ended key": (401, lambda v: every_mount(v, "dropped", "GET")),
    "every mount as a role without any": (403, lambda v: every_mount(v, "nobody", "GET")),
    **{
        f"an operation by {method}": (
            status,
            lambda v, method=method: v.ops(
                method, "/?operation=list_users", "root", json={"operation": "list_users"}
            ),
        )
        for method, status in {
            "GET": 405,
            "HEAD": 405,
            "PUT": 405,
            "DELETE": 405,
            "QUERY": 405,
            "TRACE": 501,
            "post": 403,
        }.items()
        if method != "post"
    },
    "GET that says it is POST": (
        405,
        lambda v: v.ops(
            "GET",
            "/?operation=list_users",
            "root",
            headers={"X-HTTP-Method-Override": "POST", "X-HTTP-Method": "POST"},
        ),
    ),
    "POST that says it is DELETE": (
        403,
        lambda v: v.rest(
            "POST",
            "/notes/1",
            "mallory",
            headers={"X-HTTP-Method-Override": "DELETE", "X-Method-Override": "DELETE"},
        ),
    ),
    **{
        f"an operation called {name!r}": (
            400,
            lambda v, name=name: v.ops("POST", who="mallory", json={"operation": name}),
        )
        for name in REFUSED_NAMES
    },
    "an operation named twice": (
        403,
        lambda v: operation_by(
            v, '{"operation": "user_info", "operation": "list_users"}', "application/json"
        ),
    ),
    "an operation in a form": (
        403,
        lambda v: operation_by(v, "operation=list_users", "application/x-www-form-urlencoded"),
    ),
    "an operation as text": (
        400,
        lambda v: operation_by(v, '{"operation": "list_users"}', "text/plain"),
    ),
    "operations in a list": (
        400,
        lambda v: v.ops("POST", who="mallory", json=[{"operation": "list_users"}]),
    ),
    "an operation on the REST port": (
        405,
        lambda v: v.rest("POST", "/", "root", json={"operation": "list_users"}),
    ),
    "an operation at another path": (
        404,
        lambda v: v.ops("POST", "/operations", "root", json={"operation": "list_users"}),
    ),
    "a chat as a clerk": (403, lambda v: v.chat("clerk")),
    "embeddings as a clerk": (
        403,
        lambda v: v.rest("POST", "/v1/embeddings", "clerk", json={"input": "a"}),
    ),
    "a stream of events without a key": (
        401,
        lambda v: v.rest("GET", "/hall", headers={"Accept": "text/event-stream"}),
    ),
    "a stream of events as another": (
        403,
        lambda v: v.rest("GET", "/hall", "mallory", headers={"Accept": "text/event-stream"}),
    ),
    "a WebSocket without a key": (401, lambda v: socket_(v, "")),
    "a WebSocket as another": (403, lambda v: socket_(v, f"Authorization: {v.who['mallory']}\r\n")),
    "a WebSocket with an ended key as its protocol": (
        401,
        lambda v: socket_(v, f"Sec-WebSocket-Protocol: harperpy, bearer.{key(v, 'dropped')}\r\n"),
    ),
    "a WebSocket to a table": (
        400,
        lambda v: socket_(v, f"Authorization: {v.who['mallory']}\r\n", "/notes/1"),
    ),
    "a wrong key by the local socket": (
        401,
        lambda v: v.local(
            "POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nContent-Length: 26\r\n"
            'Connection: close\r\n\r\n{"operation":"list_users"}'
        ),
    ),
    "few rights by the local socket": (
        403,
        lambda v: v.local(
            f"POST / HTTP/1.1\r\nHost: a\r\nAuthorization: {v.who['mallory']}\r\n"
            "Content-Length: 26\r\nConnection: close\r\n\r\n"
            '{"operation":"list_users"}'
        ),
    ),
}


async def socket_(victim: Victim, more: str, path: str = "/hall") -> Seen:
    """A WebSocket's opening."""
    return await victim.raw(
        f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n{more}\r\n"
    )


# --- what one is not asked for


async def unchanged(victim: Victim, who: str = "mallory", **more: Any) -> Seen:
    """Who one is said to be where the body says another."""
    seen = await victim.op(who, "user_info", **more)
    assert ("mallory", "evil", "model_user") == (
        seen.json["username"],
        seen.json["tenant"],
        seen.json["role"]["role"],
    )
    return seen


async def no_more(victim: Victim, **claims: Any) -> Seen:
    """What a token says of its user beside the name counts for nothing."""
    header = {"Authorization": f"Bearer {resigned(victim, **claims)}"}
    return await victim.ops("POST", headers=header, json={"operation": "list_users"})


async def asked_upstream(victim: Victim, **more: Any) -> Seen:
    """A chat with fields of a configuration: the provider and its key stay as they are."""
    before = len(victim.upstream.requests)
    seen = await victim.chat(model="default", **more)
    (asked,) = victim.upstream.requests[before:]
    assert f"Bearer {PROVIDER_KEY}" == asked.headers["Authorization"]
    assert "/v1/chat/completions" == asked.path
    assert not {"x-evil", "cookie", "x-forwarded-for"} & {one.lower() for one in asked.headers}
    return seen


ROLES = (
    {"super_user": 1},
    {"super_user": "true"},
    {"SUPER_USER": True},
    {"super_user ": True},
    {"operations": "*"},
    {"resources": {"*": "*"}},
    {"limited_to": ["sql"]},
    {"system": {"tables": {"hdb_user": {"read": True}}}},
    {"*": {"tables": {"*": {"read": True}}}},
    {"data": {"tables": {"notes": {"read": True, "all": True}}}},
)
ASSIGNED: dict[str, Row] = {
    **{
        f"an operation that says {name}": (
            403,
            lambda v, name=name, value=value: v.op("mallory", "list_users", **{name: value}),
        )
        for name, value in {
            "hdb_user": {"role": {"permission": {"super_user": True}}},
            "bypass_auth": True,
            "hdb_auth_header": "Basic x",
            "user": "HDB_ADMIN",
            "super_user": True,
            "impersonate": {"username": "HDB_ADMIN"},
            "authorize": False,
            "trusted": True,
        }.items()
    },
    "user_info with another user": (
        200,
        lambda v: unchanged(v, hdb_user={"username": "ada", "role": {"role": "super_user"}}),
    ),
    "user_info that skips authentication": (200, lambda v: unchanged(v, bypass_auth=True)),
    **{
        f"user_info that sets {name}": (
            400,
            lambda v, name=name, value=value: v.op("mallory", "user_info", **{name: value}),
        )
        for name, value in {"tenant": "acme", "role": "super_user", "active": True}.items()
    },
    "a token that says it is a super user's": (403, lambda v: no_more(v, super_user=True)),
    "a token that brings a role": (
        401,
        lambda v: no_more(v, role={"permission": {"super_user": True}}),
    ),
    "a token that brings the name of a role": (401, lambda v: no_more(v, role="super_user")),
    "one's own role changed": (
        403,
        lambda v: v.op("mallory", "alter_user", username="mallory", role="super_user"),
    ),
    "one's own tenant changed": (
        403,
        lambda v: v.op("mallory", "alter_user", username="mallory", tenant="acme"),
    ),
    **{
        f"a user with {name}": (
            400,
            lambda v, name=name, value=value: v.op(
                "root", "add_user", username="x", password="p", role="clerk", **{name: value}
            ),
        )
        for name, value in {
            "password_hash": "x",
            "__createdtime__": 1,
            "super_user": True,
            "permission": {"super_user": True},
        }.items()
    },
    "a user whose role is an object": (
        400,
        lambda v: v.op(
            "root",
            "add_user",
            username="x",
            password="p",
            role={"permission": {"super_user": True}},
        ),
    ),
    "a key with an id of one's own": (
        400,
        lambda v: v.op("mallory", "add_api_key", name="x", id="known"),
    ),
    "a key with a hash of one's own": (
        400,
        lambda v: v.op("mallory", "add_api_key", name="x", hash="known", kind="refresh"),
    ),
    "tokens with a role": (
        400,
        lambda v: v.op("mallory", "create_authentication_tokens", role="super_user"),
    ),
    **{
        f"a role of {permission}": (
            400,
            lambda v, permission=permission: v.op(
                "root", "add_role", role="x", permission=permission
            ),
        )
        for permission in ROLES
    },
    "a record with more than its table": (
        {400, 403},
        lambda v: v.op(
            "ada", "insert", table="diary", records=[{"owner": "x", "text": "t", "tenant": "acme"}]
        ),
    ),
    "a record with times of one's own": (
        {400, 403},
        lambda v: v.op(
            "ada",
            "upsert",
            table="diary",
            records=[{"id": 1, "owner": "x", "text": "t", "__createdtime__": 1}],
        ),
    ),
    **{
        f"a chat that sets {name}": (
            200,  # what a provider does not know it says itself; none of it is ours
            lambda v, name=name: asked_upstream(
                v, **{name: {"x-evil": "1", "url": v.trap.url} if "header" in name else v.trap.url}
            ),
        )
        for name in (
            "base_url",
            "baseUrl",
            "api_base",
            "api_key",
            "apiKey",
            "provider_options",
            "extra_headers",
            "headers",
            "proxy",
            "organization",
            "fallbacks",
        )
    },
}


# --- what is asked of the database


async def hidden(victim: Victim, text: str, *expected: Any, who: str = "root") -> Seen:
    """A statement that is run, and finds just this: what is hidden is null wherever it stands."""
    seen = await victim.sql(text, who)
    assert 200 == seen.status, seen.text
    assert [*expected] == [*{json.dumps(row): row for row in seen.json}.values()]
    return seen


FORBIDDEN = {
    "two statements": (400, "SELECT 1; DROP TABLE hdb_user"),
    "a statement behind a comment": (400, "SELECT 1; -- x\nDELETE FROM hdb_user"),
    "a comment that hides a write": (403, "/*!*/ DELETE FROM hdb_user"),
    "a comment without an end": (400, "SELECT 1 /*"),
    "ATTACH": (400, "ATTACH '/etc/passwd' AS x"),
    "PRAGMA": (400, "PRAGMA writable_schema = 1"),
    "VACUUM INTO": (400, "VACUUM INTO '/tmp/attack.db'"),
    "BEGIN": (400, "BEGIN EXCLUSIVE"),
    "EXPLAIN": (400, "EXPLAIN SELECT * FROM hdb_user"),
    "VALUES": (400, "VALUES (1)"),
    "SELECT INTO": (403, "SELECT * INTO x FROM hdb_user"),
    "OUTFILE": (400, "SELECT 1 INTO OUTFILE '/tmp/x'"),
    "INSERT": (403, "INSERT INTO hdb_user SELECT * FROM hdb_user"),
    "REPLACE": (403, "REPLACE INTO hdb_role VALUES ('a', 'a', '{}', 1, 1)"),
    "a write in WITH": (403, "WITH a AS (DELETE FROM hdb_user RETURNING *) SELECT * FROM a"),
    "load_extension": (403, "SELECT load_extension('x')"),
    "readfile": (400, "SELECT readfile('/etc/passwd')"),
    "writefile": (400, "SELECT writefile('/tmp/x', 'y')"),
    "fts3_tokenizer": (403, "SELECT fts3_tokenizer('x')"),
    "a gigabyte of chance": (403, "SELECT randomblob(1000000000)"),
    "a gigabyte of nothing": (403, "SELECT zeroblob(1000000000)"),
    "a gigabyte of blanks": (403, "SELECT printf('%1000000000d', 1)"),
    "text that grows": (403, "SELECT replace(hex('aaaaaaaa'), '6', 'aaaaaaaa')"),
    "a join of the same seventeen times": (
        400,
        f"SELECT count(*) FROM hdb_role a{', hdb_role' * 16}",  # noqa: S608
    ),
    "parentheses without end": (400, "SELECT " + "(" * 900 + "1" + ")" * 900),
    "a text of a hundred thousand letters": (400, f"SELECT '{'a' * 90_000}'"),
    "the schema": (404, "SELECT * FROM sqlite_master"),
    "the schema by its other name": (404, "SELECT * FROM system.sqlite_schema"),
    "a table's pages": (404, "SELECT * FROM dbstat"),
    "columns by a function": (400, "SELECT * FROM pragma_table_info('hdb_user')"),
    "another database": (404, "SELECT * FROM main.hdb_user"),
    "the database of temporary things": (404, "SELECT * FROM temp.sqlite_schema"),
    "USING over a hidden column": (400, "SELECT * FROM hdb_token a JOIN hdb_token b USING (hash)"),
    "NATURAL over hidden columns": (400, "SELECT * FROM hdb_user NATURAL JOIN hdb_user b"),
    "FULL JOIN over a hidden column": (
        400,
        "SELECT * FROM hdb_user a FULL JOIN hdb_user b USING (password)",
    ),
    "USING behind a comment": (
        400,
        'SELECT * FROM hdb_user a JOIN hdb_user b /**/ using/**/("password")',
    ),
    "a pseudo column": (400, "SELECT $password FROM hdb_user"),
    "all of a record": (400, "SELECT $record FROM hdb_user"),
    "a bind parameter": (400, "SELECT * FROM hdb_user WHERE username = :a"),
    "a name with a Cyrillic letter": (400, "SELECT p\u0430ssword FROM hdb_user"),
    "a name with a long s": (400, "SELECT pa\u017f\u017fword FROM hdb_user"),
    "a name with a wide letter": (400, "SELECT \uff50assword FROM hdb_user"),
    "a null in a name": (404, "SELECT password FROM hdb_user\0"),
    "a null in a text": (400, "SELECT '\0' || password FROM hdb_user"),
    "an index of a hidden column": (
        404,
        "SELECT hash FROM hdb_token INDEXED BY sqlite_autoindex_hdb_token_2",
    ),
    "IN a table": (400, "SELECT * FROM hdb_user WHERE username IN hdb_token"),
    "a lone surrogate": (400, "SELECT '\ud800'"),
}
PROBES: dict[str, tuple[str, list[Any]]] = {
    "the column itself": ("SELECT password AS x FROM hdb_user", [{"x": None}]),
    "in capitals": ("SELECT PASSWORD AS x FROM HDB_USER", [{"x": None}]),
    "in quotes": ('SELECT "password" AS x FROM hdb_user', [{"x": None}]),
    "in brackets": ("SELECT [password] AS x FROM hdb_user", [{"x": None}]),
    "in full": ("SELECT system.hdb_user.password AS x FROM system.hdb_user", [{"x": None}]),
    "by an alias": ("SELECT u.password AS x FROM hdb_user AS u", [{"x": None}]),
    "from a subquery": ("SELECT x FROM (SELECT password x FROM hdb_user)", [{"x": None}]),
    "from a subquery of all": (
        "SELECT password AS x FROM (SELECT * FROM hdb_user)",
        [{"x": None}],
    ),
    "from WITH": ("WITH a(x) AS (SELECT hash FROM hdb_token) SELECT x FROM a", [{"x": None}]),
    "from a recursion": (
        "WITH RECURSIVE r(x) AS (SELECT hash FROM hdb_token UNION SELECT x FROM r) SELECT x FROM r",
        [{"x": None}],
    ),
    "by UNION": (
        "SELECT hash AS x FROM hdb_token UNION SELECT password FROM hdb_user",
        [{"x": None}],
    ),
    "by EXCEPT": (
        "SELECT hash AS x FROM hdb_token EXCEPT SELECT NULL",
        [],
    ),
    "as an aggregate": (
        "SELECT max(password) AS x, group_concat(password) AS y FROM hdb_user",
        [{"x": None, "y": None}],
    ),
    "by its differences": ("SELECT count(DISTINCT password) AS x FROM hdb_user", [{"x": 0}]),
    "by its length": (
        "SELECT length(password) AS x, hex(password) AS y, typeof(password) AS z FROM hdb_user",
        [{"x": None, "y": "", "z": "null"}],
    ),
    "cast": ("SELECT CAST(password AS BLOB) AS x FROM hdb_user", [{"x": None}]),
    "in JSON": ("SELECT json_array(hash) AS x FROM hdb_token", [{"x": "[null]"}]),
    "in a window": (
        "SELECT lag(password) OVER (ORDER BY username) AS x FROM hdb_user",
        [{"x": None}],
    ),
    "by LIKE": ("SELECT username FROM hdb_user WHERE password LIKE '$argon%'", []),
    "by comparing": ("SELECT username FROM hdb_user WHERE password >= ''", []),
    "by CASE": (
        "SELECT CASE WHEN hash GLOB '*' THEN 1 ELSE 0 END AS x FROM hdb_token",
        [{"x": 0}],
    ),
    "by a join with ON": (
        "SELECT a.username FROM hdb_user a JOIN hdb_user b ON a.password = b.password",
        [],
    ),
    "by EXISTS": (
        "SELECT EXISTS (SELECT 1 FROM hdb_token WHERE hash IS NOT NULL) AS x",
        [{"x": 0}],
    ),
}
CLERKS = {
    "a hidden attribute": "SELECT text FROM notes",
    "a hidden attribute in quotes": 'SELECT "text" FROM notes',
    "a hidden attribute by a condition": "SELECT id FROM notes WHERE text LIKE 'p%'",
    "a hidden attribute by order": "SELECT id FROM notes ORDER BY text",
    "a hidden attribute by USING": "SELECT 1 FROM notes a JOIN notes b USING (text)",
    "hidden attributes by NATURAL": "SELECT 1 FROM notes NATURAL JOIN notes b",
    "another's table": "SELECT * FROM diary",
    "another's table in a subquery": "SELECT (SELECT text FROM diary LIMIT 1)",
    "another's table in WITH": "WITH a AS (SELECT * FROM data.diary) SELECT * FROM a",
    "the users": "SELECT username FROM hdb_user",
    "the users, in full": "SELECT username FROM system.hdb_user",
    "the calls": "SELECT * FROM system.hdb_model_calls",
    "the schema": "SELECT * FROM sqlite_master",
}
CONDITION = {"attribute": "id", "comparator": "equals", "value": 1}
SQL: dict[str, Row] = {
    **{
        name: (status, lambda v, text=text: v.sql(text))
        for name, (status, text) in FORBIDDEN.items()
    },
    **{
        f"a hidden column {name}": (
            200,
            lambda v, text=text, rows=rows: hidden(v, text, *rows),
        )
        for name, (text, rows) in PROBES.items()
    },
    **{
        f"a clerk asks for {name}": ({400, 403}, lambda v, text=text: v.sql(text, "clerk"))
        for name, text in CLERKS.items()
    },
    "a statement that never ends": (
        408,
        lambda v: v.sql(
            "WITH RECURSIVE a(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM a) SELECT max(n) FROM a"
        ),
    ),
    "a statement that is no text": (400, lambda v: v.op("root", "sql", sql=["SELECT 1"])),
    **{
        f"a search in the table {name!r}": (
            403,
            lambda v, name=name: v.op("clerk", "search_by_id", table=name, ids=[1]),
        )
        for name in ("notes; DROP TABLE notes", 'notes"', "notes--", "hdb_user", "../notes", "N\0")
    },
    **{
        f"a search by the attribute {name!r}": (
            403,
            lambda v, name=name: v.op(
                "clerk", "search_by_value", table="notes", attribute=name, value="1"
            ),
        )
        for name in ("id = 1 OR 1=1 --", 'id" OR "1"="1', "rowid", "text", "__class__")
    },
    "a comparator that is SQL": (
        400,
        lambda v: v.op(
            "clerk",
            "search_by_conditions",
            table="notes",
            conditions=[{**CONDITION, "comparator": "= 1 OR 1 ="}],
        ),
    ),
    "an operator that is SQL": (
        400,
        lambda v: v.op(
            "clerk",
            "search_by_conditions",
            table="notes",
            operator="or 1=1 or",
            conditions=[CONDITION],
        ),
    ),
    "a value that is SQL": (
        400,
        lambda v: v.op("clerk", "search_by_value", table="notes", attribute="id", value="1 OR 1=1"),
    ),
    "a limit that is SQL": (
        400,
        lambda v: v.op(
            "clerk",
            "search_by_value",
            table="notes",
            attribute="owner",
            value="*",
            limit="1 UNION SELECT password FROM hdb_user",
        ),
    ),
    "a record's name that is SQL": (
        400,
        lambda v: v.op(
            "ada", "insert", table="diary", records=[{"id) VALUES (9); --": 1, "owner": "x"}]
        ),
    ),
    "a filter over REST that is SQL": (
        400,
        lambda v: v.rest("GET", "/notes/?id=1%20OR%201=1;--", "root"),
    ),
    "a receipt that is SQL": (
        400,
        lambda v: v.op("mallory", "get_model_call", id="1 OR 1=1"),
    ),
    "a name that is SQL": (404, lambda v: v.op("root", "drop_user", username="' OR '1'='1")),
    "a role that is SQL": (
        404,
        lambda v: v.op(
            "root", "add_user", username="x", password="p", role="' UNION SELECT 'super_user"
        ),
    ),
}


# --- what is hardly a request


def bytes_of(head: str, body: str = "", line: str = "GET /v1/models HTTP/1.1") -> str:
    """A request as it goes over the wire; the server is to close after it."""
    return f"{line}\r\nHost: a\r\n{head}Connection: close\r\n\r\n{body}"


POSTED = "POST / HTTP/1.1"
HIDDEN = "GET /notes/1 HTTP/1.1\r\nHost: a\r\n\r\n"
WIRE: dict[str, tuple[int, str, str]] = {
    "length and chunks": (
        400,
        "rest",
        bytes_of("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n", POSTED),
    ),
    "two lengths": (
        400,
        "rest",
        bytes_of("Content-Length: 0\r\nContent-Length: 36\r\n", HIDDEN, POSTED),
    ),
    "a list of lengths": (400, "rest", bytes_of("Content-Length: 2, 2\r\n", "{}", POSTED)),
    "a length with a sign": (400, "rest", bytes_of("Content-Length: +2\r\n", "{}", POSTED)),
    "a negative length": (400, "rest", bytes_of("Content-Length: -2\r\n", "{}", POSTED)),
    "a length in base 16": (400, "rest", bytes_of("Content-Length: 0x2\r\n", "{}", POSTED)),
    "a length with an underscore": (400, "rest", bytes_of("Content-Length: 0_2\r\n", "{}", POSTED)),
    "no length": (400, "rest", bytes_of("Content-Length: \r\n", "{}", POSTED)),
    "chunks of another name": (
        400,
        "rest",
        bytes_of("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n", POSTED),
    ),
    "chunks, then not": (
        400,
        "rest",
        bytes_of("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n", POSTED),
    ),
    "two encodings": (
        400,
        "rest",
        bytes_of(
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n", POSTED
        ),
    ),
    "an encoding on a folded line": (
        400,
        "rest",
        bytes_of("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n", POSTED),
    ),
    "an encoding with a blank before its colon": (
        400,
        "rest",
        bytes_of("Transfer-Encoding : chunked\r\n", "0\r\n\r\n", POSTED),
    ),
    "an encoding after a vertical tab": (
        400,
        "rest",
        bytes_of("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n", POSTED),
    ),
    "a chunk without a size": (
        400,
        "ops",
        bytes_of("Transfer-Encoding: chunked\r\n", "zz\r\n\r\n", POSTED),
    ),
    "a chunk of less than nothing": (
        400,
        "ops",
        bytes_of("Transfer-Encoding: chunked\r\n", "-1\r\n\r\n", POSTED),
    ),
    "a chunk larger than all": (
        400,
        "ops",
        bytes_of("Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\n{}\r\n0\r\n\r\n", POSTED),
    ),
    "a line feed in a chunk's extension": (
        400,
        "ops",
        bytes_of("Transfer-Encoding: chunked\r\n", "2;\n{}\r\n0\r\n\r\n", POSTED),
    ),
    "an extension of a chunk": (
        401,
        "ops",
        bytes_of("Transfer-Encoding: chunked\r\n", "2;a=b\r\n{}\r\n0\r\n\r\n", POSTED),
    ),
    "a key in the trailer": (
        401,
        "ops",
        bytes_of(
            "Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n",
            "2\r\n{}\r\n0\r\nAuthorization: KEY\r\n\r\n",
            POSTED,
        ),
    ),
    "bare line feeds": (400, "rest", bytes_of("").replace("\r\n", "\n")),
    "bare carriage returns": (400, "rest", bytes_of("").replace("\r\n", "\r") + "\r\n\r\n"),
    "a blank before a colon": (400, "rest", bytes_of("Authorization : KEY\r\n")),
    "a header of no name": (400, "rest", bytes_of(": KEY\r\n")),
    "a header without a colon": (400, "rest", bytes_of("Authorization\r\n")),
    "a header that begins with a blank": (400, "rest", bytes_of("X: a\r\n Authorization: KEY\r\n")),
    "a null in a header": (400, "rest", bytes_of("X: a\0b\r\n")),
    "a line within a request's id": (
        400,
        "rest",
        bytes_of("x-request-id: a\r\n Set-Cookie: stolen=1\r\n"),
    ),
    "a carriage return within a request's id": (
        400,
        "rest",
        bytes_of("x-request-id: a\rSet-Cookie: stolen=1\r\n"),
    ),
    "a key for the connection alone": (
        401,
        "rest",
        bytes_of("Authorization: Bearer x\r\n").replace(
            "Connection: ", "Connection: Authorization, "
        ),
    ),
    "an absolute target": (
        401,
        "rest",
        bytes_of("", line="GET http://127.0.0.1/v1/models HTTP/1.1"),
    ),
    "an absolute target with a name and password": (
        401,
        "rest",
        bytes_of("", line="GET http://clerk:pw-clerk@a/v1/models HTTP/1.1"),
    ),
    "a file as the target": (400, "rest", bytes_of("", line="GET file:///etc/passwd HTTP/1.1")),
    "a target without a slash": (400, "rest", bytes_of("", line="GET v1/models HTTP/1.1")),
    "a tunnel": (501, "rest", bytes_of("", line="CONNECT 127.0.0.1:22 HTTP/1.1")),
    "all of the server": (404, "rest", bytes_of("", line="OPTIONS * HTTP/1.1")),
    "two hosts": (400, "rest", bytes_of("Host: b\r\n")),
    "a version that is not": (400, "rest", bytes_of("", line="GET /v1/models HTTP/9.9")),
    "HTTP/2 at once": (400, "rest", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2 by upgrade": (
        401,
        "rest",
        bytes_of("Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n").replace(
            "Connection: ", "Connection: Upgrade, HTTP2-Settings, "
        ),
    ),
    "an upgrade with a request behind it": (
        401,
        "rest",
        (
            "GET /hall HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 7\r\n\r\n{bytes_of('', line='GET /notes/1 HTTP/1.1')}"
        ),
    ),
    "another path in a header": (
        200,  # of /health, which is open to all
        "rest",
        bytes_of(
            "X-Original-URL: /notes/1\r\nX-Rewrite-URL: /notes/1\r\n", line="GET /health HTTP/1.1"
        ),
    ),
    "a request after one with a key": (
        200,  # of the first; the second is refused
        "rest",
        "GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: KEY\r\n\r\n"
        + bytes_of("", line="GET /notes/1 HTTP/1.1"),
    ),
    "a request in a body": (
        401,
        "rest",
        bytes_of(f"Content-Length: {len(HIDDEN)}\r\n", HIDDEN, "POST /notes/ HTTP/1.1"),
    ),
    "a line without end": (414, "rest", bytes_of("", line=f"GET /{'a' * 70_000} HTTP/1.1")),
    "a header without end": (431, "rest", bytes_of(f"X: {'a' * 70_000}\r\n")),
    "ten thousand headers": (
        431,
        "rest",
        bytes_of("".join(f"X{at}: 1\r\n" for at in range(10_000))),
    ),
}


async def over_the_wire(victim: Victim, port: str, text: str) -> Seen:
    """What is answered to these bytes: at most one of the answers is a good one."""
    seen = await victim.raw(text.replace("KEY", victim.who["root"]), port)
    assert "HTTP/1.1 200" not in seen.text
    assert "stolen" not in f"{seen.headers}"
    return seen


# --- where it is


PATHS: dict[str, int] = {
    "//v1/models": 404,
    "/v1//models": 401,
    "/v1/%2e%2e/notes/1": 401,
    "/v1/../notes/1": 401,
    "/health/../notes/1": 404,
    "/health%2f..%2fnotes/1": 404,
    "/openapi/..;/notes/1": 404,
    "/%252e%252e/notes/1": 404,
    "/./notes/1": 404,
    "/notes%2f1": 404,
    "/notes%252f1": 404,
    "/%6eotes/1": 401,
    "/notes/%31": 401,
    "/notes/..%2fnotes%2f1": 401,
    "/notes;x=1/1": 404,
    "/notes/1;x=1": 401,
    "/notes/1/": 401,
    "/notes//1": 401,
    "/notes.json": 401,
    "/notes/1.csv": 401,
    "/notes.": 404,
    "/notes/1%00": 401,
    "/notes%00/1": 404,
    "/notes/1%0d%0aX:%20y": 401,
    "/NOTES/1": 404,
    "/V1/models": 404,
    "/%EF%BD%8Eotes/1": 404,
    "/note%73/1": 401,
    "/note%c5%bf/1": 404,
    "/notes\\1": 404,
    "/notes%5c1": 404,
    "/own/x.css": 401,
    "/own;.css": 404,
    "/own%3f": 404,
    "/own%23": 404,
    "/hall/": 401,
    "/.env": 404,
    "/config.yaml": 404,
    "/system.db": 404,
    "/..%2f..%2f..%2fetc%2fpasswd": 404,
    "/.harperpy/secret.key": 404,
}


async def walked(victim: Victim, path: str) -> Seen:
    """A path without a key, which is neither more open to who has one of no use."""
    seen = await victim.rest("GET", path)
    other = await victim.rest("GET", path, "nobody")
    # Whoever is known is told how a stream is asked for, and gets none.
    assert other.status in (403, 404, 406)
    return seen


# --- how much


def compressed(size: int) -> bytes:
    """A chat of so many bytes, in few."""
    return gzip.compress(json.dumps({"model": "echo", "messages": HELLO, "x": "a" * size}).encode())


def parts(count: int) -> bytes:
    """A form of so many parts."""
    one = '--x\r\nContent-Disposition: form-data; name="operation"\r\n\r\nlist_users\r\n'
    return (one * count + "--x--\r\n").encode()


JSON = "application/json"


async def bodied(
    victim: Victim, data: Any, kind: str = JSON, port: str = "rest", **headers: str
) -> Seen:
    """A body that is meant to cost much."""
    headers["Content-Type"] = kind
    ask = victim.rest if port == "rest" else victim.ops
    return await ask("POST", CHAT if port == "rest" else "/", "mallory", data=data, headers=headers)


def chat_with(text: str) -> str:
    """A chat's body, one value of which is this text."""
    return f'{{"model": "echo", "messages": [{{"role": "user", "content": "a"}}], "seed": {text}}}'


RESOURCES: dict[str, Row] = {
    "a body that is too large": (413, lambda v: bodied(v, b" " * 200_000)),
    "a body that is too large for an operation": (
        413,
        lambda v: bodied(v, b" " * 200_000, port="ops"),
    ),
    "a body that grows as it is unpacked": (
        {413, 415},
        lambda v: bodied(v, compressed(5_000_000), **{"Content-Encoding": "gzip"}),
    ),
    "a body that is packed twice": (
        415,
        lambda v: bodied(
            v, gzip.compress(compressed(5_000_000)), **{"Content-Encoding": "gzip, gzip"}
        ),
    ),
    "a body packed by another name": (
        415,
        lambda v: bodied(v, b"x", **{"Content-Encoding": "br, zstd"}),
    ),
    "JSON without an end": (400, lambda v: bodied(v, chat_with("[" * 40_000))),
    "an operation without an end": (400, lambda v: bodied(v, "[" * 40_000, port="ops")),
    "conditions without an end": (
        400,
        lambda v: bodied(
            v,
            '{"operation": "search_by_conditions", "table": "notes", "conditions": ['
            + '{"conditions": [' * 300
            + "]}" * 300
            + "]}",
            port="ops",
        ),
    ),
    "an order without an end": (
        {400, 403},
        lambda v: v.op(
            "clerk",
            "search_by_conditions",
            table="notes",
            conditions=[CONDITION],
            sort=nested({"attribute": "id"}, "next", 300),
        ),
    ),
    "a number without an end": (400, lambda v: bodied(v, chat_with("9" * 50_000))),
    "a number that is none": (400, lambda v: bodied(v, chat_with("NaN"))),
    "a number beyond all": (400, lambda v: bodied(v, chat_with("1e999999"))),
    "keys that collide": (
        400,
        lambda v: bodied(
            v,
            json.dumps({"operation": "user_info", **{f"{n}": 1 for n in range(6000)}}),
            port="ops",
        ),
    ),
    "a form of a thousand parts": (
        {400, 403},
        lambda v: bodied(v, parts(1000), "multipart/form-data; boundary=x", port="ops"),
    ),
    "ids without an end": (
        403,
        lambda v: v.op("mallory", "search_by_id", table="notes", ids=[*range(15_000)]),
    ),
    "choices without an end": (400, lambda v: v.chat(n=10_000_000)),
    "messages of no end": (400, lambda v: v.chat(messages=[])),
    "a text that is half a letter": (
        400,
        lambda v: bodied(
            v, b'{"model": "echo", "messages": [{"role": "user", "content": "\xed"}]}'
        ),
    ),
    "a type with a null": (
        {400, 415},
        lambda v: v.raw(
            bytes_of(
                f"Authorization: {v.who['mallory']}\r\nContent-Type: application/json\0\r\n"
                "Content-Length: 2\r\n",
                "{}",
                POSTED,
            ),
            "ops",
        ),
    ),
}


def nested(inner: dict[str, Any], name: str, levels: int) -> dict[str, Any]:
    """A map in itself, so many times."""
    made = inner
    for _ in range(levels):
        made = {**inner, name: made}
    return made


# --- whom the server asks


async def pictured(victim: Victim, url: str) -> Seen:
    """A picture by its address, which the provider is told and the server never looks at."""
    content = [{"type": "image_url", "image_url": {"url": url.replace("TRAP", victim.trap.url)}}]
    seen = await victim.chat(model="default", messages=[{"role": "user", "content": content}])
    assert 0 == victim.trap.hits
    return seen


async def sent_on(victim: Victim, status: int) -> Seen:
    """A provider that sends the request, and the key with it, elsewhere."""
    victim.upstream.script(Answer(status=status, headers={"Location": f"{victim.trap.url}/v1"}))
    seen = await victim.chat(model="default")
    assert 0 == victim.trap.hits
    return seen


REQUESTS: dict[str, Row] = {
    **{
        f"a picture at {url}": (200, lambda v, url=url: pictured(v, url))
        for url in ("TRAP/meta-data", "http://169.254.169.254/latest", "file:///etc/passwd")
    },
    **{
        f"a provider that answers {status}": (502, lambda v, status=status: sent_on(v, status))
        for status in (301, 302, 307, 308)
    },
    "a model that is an address": (404, lambda v: v.chat(model=v.trap.url)),
    "a model that is a file": (404, lambda v: v.chat(model="../../secret.key")),
    "a model that is a pattern": (404, lambda v: v.chat(model="*")),
    "a model with a null": (404, lambda v: v.chat(model="echo\0")),
    "a model that is a list": (400, lambda v: v.chat(model=["echo"])),
    "a model file from elsewhere": (
        403,
        lambda v: v.op("mallory", "pull_model_file", name=v.trap.url),
    ),
}


# --- what is told


async def failing(victim: Victim, answer: Answer, **more: Any) -> Seen:
    """A provider that says what it should not."""
    victim.upstream.script(answer)
    return await victim.chat(model="default", **more)


def told(**error: Any) -> dict[str, Any]:
    """A provider's refusal that repeats the key."""
    return {"error": {"message": f"Incorrect API key provided: {PROVIDER_KEY}", **error}}


async def described(victim: Victim, who: str) -> Seen:
    """The document of what is open to such a caller: nothing that is not."""
    seen = await victim.rest("GET", "/openapi.json", who)
    assert not {"/notes", "/own", CHAT} & {*seen.json["paths"]}
    return seen


async def healthy(victim: Victim, who: str) -> Seen:
    """The state of the server, and no more."""
    seen = await victim.rest("GET", "/health", who)
    assert {"status"} == {*seen.json}
    return seen


async def undescribed(victim: Victim) -> Seen:
    """A description without what is hidden."""
    seen = await victim.op("root", "describe_table", database="system", table="hdb_user")
    assert "password" not in {one["attribute"] for one in seen.json["attributes"]}
    return seen


SECRETS: dict[str, Row] = {
    "a provider that repeats the key, 400": (
        400,
        lambda v: failing(v, Answer(status=400, body=told())),
    ),
    "a provider that repeats the key in every field": (
        400,
        lambda v: failing(
            v,
            Answer(
                status=400,
                body=told(type=PROVIDER_KEY, param=PROVIDER_KEY, code=f"bad_{PROVIDER_KEY}"),
            ),
        ),
    ),
    "a provider that repeats the key, 401": (
        502,
        lambda v: failing(v, Answer(status=401, body=told())),
    ),
    "a provider that repeats the key, 429": (
        429,
        lambda v: failing(v, Answer(status=429, body=told(), headers={"x-key": PROVIDER_KEY})),
    ),
    "a provider that repeats the key, 500": (
        500,
        lambda v: failing(v, Answer(status=500, body=told())),
    ),
    "a provider that repeats the key as text": (
        429,
        lambda v: failing(v, Answer(status=429, body=PROVIDER_KEY.encode())),
    ),
    "a provider that repeats the key in a stream": (
        200,
        lambda v: failing(
            v, Answer(events=[chunk({"content": "a"}), told(code=PROVIDER_KEY)]), stream=True
        ),
    ),
    "a plugin that fails": (500, lambda v: v.rest("GET", "/broken")),
    "a plugin that fails in a stream": (200, lambda v: v.rest("POST", "/broken")),
    "an operation that fails": (500, lambda v: v.op("mallory", "break_it")),
    "the document without a key": (200, lambda v: described(v, "")),
    "the document for who may little": (200, lambda v: described(v, "nobody")),
    "the health without a key": (200, lambda v: healthy(v, "")),
    "the health with an ended key": (200, lambda v: healthy(v, "dropped")),
    "the health with few rights": (200, lambda v: healthy(v, "mallory")),
    **{
        f"{name} for the super user": (200, lambda v, name=name: v.op("root", name))
        for name in ("get_configuration", "get_status", "list_users", "list_api_keys", "list_roles")
    },
    "the audit for the super user": (200, lambda v: v.op("root", "read_audit_log")),
    "the users as a table": (
        200,
        lambda v: v.op(
            "root",
            "search_by_value",
            schema="system",
            table="hdb_user",
            attribute="active",
            value="*",
        ),
    ),
    "the hash of a key as an attribute": (
        400,
        lambda v: v.op(
            "root",
            "search_by_value",
            schema="system",
            table="hdb_token",
            attribute="hash",
            value="*",
        ),
    ),
    "the hash of a password by a condition": (
        400,
        lambda v: v.op(
            "root",
            "search_by_conditions",
            schema="system",
            table="hdb_user",
            conditions=[{"attribute": "password", "comparator": "starts_with", "value": "$"}],
        ),
    ),
    "the hash of a password by order": (
        400,
        lambda v: v.op(
            "root",
            "search_by_conditions",
            schema="system",
            table="hdb_user",
            conditions=[{"attribute": "active", "comparator": "equals", "value": True}],
            sort={"attribute": "password"},
        ),
    ),
    "the hash of a password among those asked for": (
        400,
        lambda v: v.op(
            "root",
            "search_by_id",
            schema="system",
            table="hdb_user",
            ids=["ada"],
            get_attributes=["password"],
        ),
    ),
    "the description of the users": (200, undescribed),
    "a name that writes lines into the log": (
        401,
        lambda v: bearing(v, basic("x\nERROR harperpy: forged line", "y")),
    ),
    "a path that writes lines into the log": (
        404,
        lambda v: v.rest("GET", "/x%0aERROR%20harperpy:%20forged%20line"),
    ),
    "an operation that writes lines into the log": (
        400,
        lambda v: v.op("mallory", "x\nERROR harperpy: forged line"),
    ),
    "a model that writes lines into the log": (
        404,
        lambda v: v.chat(model="x\nERROR harperpy: forged line"),
    ),
    "a table that writes lines into the log": (
        403,
        lambda v: v.op("clerk", "search_by_id", table="x\nERROR harperpy: forged line", ids=[1]),
    ),
}


# --- what a page of another's may


EVIL, FORM = "https://evil.example", "application/x-www-form-urlencoded"


async def paged(
    victim: Victim, origin: str, kind: str, who: str = "clerk's password", method: str = "POST"
) -> Seen:
    """A page of another origin that has the browser send what it remembers."""
    data = "operation=user_info" if kind == FORM else '{"operation": "user_info"}'
    headers = {"Origin": origin, **({"Content-Type": kind} if kind else {})}
    skip = None if kind else ["Content-Type"]
    seen = await victim.ops(
        method, who=who, data=data.encode(), headers=headers, skip_auto_headers=skip
    )
    assert not [name for name in seen.headers if name.lower().startswith("access-control")]
    return seen


async def asked_first(victim: Victim, origin: str, port: str) -> Seen:
    """A preflight, whose answer allows nothing."""
    ask = victim.rest if port == "rest" else victim.ops
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    seen = await ask("OPTIONS", "/", headers=headers)
    assert not [name for name in seen.headers if name.lower().startswith("access-control")]
    return seen


BROWSER: dict[str, Row] = {
    **{
        f"a {kind or 'body without a type'} from {origin}": (
            403,
            lambda v, origin=origin, kind=kind: paged(v, origin, kind),
        )
        for origin in (EVIL, "null", "https://app.example.evil.example", "https://APP.example")
        for kind in (FORM, "text/plain", "")
    },
    "JSON from elsewhere, unasked": (200, lambda v: paged(v, EVIL, JSON)),
    **{
        f"a preflight from {origin} to {port}": (
            {204, 401, 404},
            lambda v, origin=origin, port=port: asked_first(v, origin, port),
        )
        for origin in (EVIL, "null")
        for port in ("rest", "ops")
    },
    **{
        f"a WebSocket from {origin}": (
            403,
            lambda v, origin=origin: socket_(
                v, f"Origin: {origin}\r\nAuthorization: {v.who['clerk']}\r\n"
            ),
        )
        for origin in (EVIL, "null", "https://app.example:444", "http://app.example")
    },
    "a WebSocket of a listed page with a remembered password": (
        403,
        lambda v: socket_(
            v, f"Origin: https://app.example\r\nAuthorization: {basic('clerk', 'pw-clerk')}\r\n"
        ),
    ),
}
# By a server that trusts who calls from this machine.
TRUSTED: dict[str, tuple[int, str]] = {
    **{
        f"{name}: {value}": (401, f"Host: localhost\r\n{name}: {value}\r\n")
        for name, value in (
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Forwarded-For", ""),
            ("Forwarded", "for=127.0.0.1"),
            ("X-Real-IP", "::1"),
            ("Via", "1.1 proxy"),
            ("X-Forwarded-Host", "localhost"),
            ("Origin", "null"),
            ("Origin", "http://localhost:9926"),
            ("Authorization", "Bearer x"),
            ("Authorization", ""),
        )
    },
    **{
        f"a page's own name that leads here: {host}": (401, f"Host: {host}\r\n")
        for host in (
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "",
        )
    },
    **{
        f"a picture or a link of a page that is {site}": (
            401,
            f"Host: localhost:9926\r\nSec-Fetch-Site: {site}\r\n",
        )
        for site in ("cross-site", "same-site")
    },
    **{
        f"a browser whose user asks: {site}": (
            200,
            f"Host: localhost:9926\r\nSec-Fetch-Site: {site}\r\n",
        )
        for site in ("none", "same-origin")
    },
    "this very machine": (200, "Host: localhost:9926\r\n"),
    "this very machine by number": (200, "Host: 127.0.0.1\r\n"),
}


GROUPS: dict[str, dict[str, Row]] = {
    "objects": OBJECTS,
    "logins": LOGINS,
    "functions": FUNCTIONS,
    "assigned": ASSIGNED,
    "sql": SQL,
    "wire": {
        name: (status, lambda v, port=port, text=text: over_the_wire(v, port, text))
        for name, (status, port, text) in WIRE.items()
    },
    "paths": {
        path: (status, lambda v, path=path: walked(v, path)) for path, status in PATHS.items()
    },
    "resources": RESOURCES,
    "requests": REQUESTS,
    "secrets": SECRETS,
    "browser": BROWSER,
}
ALL = {f"{group}: {name}": row for group, rows in GROUPS.items() for name, row in rows.items()}


@pytest.mark.parametrize("row", ALL.values(), ids=ALL)
async def test_no_way_in(victim: Victim, row: Row) -> None:
    """It is refused just so, tells no secret and changes nothing."""
    expected, attempt = row
    before = await victim.state()

    seen = await attempt(victim)

    assert seen.status in ({expected} if isinstance(expected, int) else expected), seen.text
    assert not victim.leaked(f"{seen.headers} {seen.text}")
    assert before == await victim.state()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trusting() -> AsyncIterator[Victim]:
    """A server that needs no credential of who calls from this machine."""
    async with attacked("authentication: {authorizeLocal: true}") as one:
        yield one


@pytest.mark.parametrize(("status", "head"), TRUSTED.values(), ids=TRUSTED)
async def test_nobody_else_is_local(trusting: Victim, status: int, head: str) -> None:
    """Behind a proxy, in a browser or with a wrong key nobody is taken for who sits here."""
    for port, line in (("rest", "GET /own HTTP/1.1"), ("ops", POSTED)):
        body = '{"operation":"list_users"}' if line == POSTED else ""
        length = f"Content-Length: {len(body)}\r\n"
        text = f"{line}\r\n{head}{length}Connection: close\r\n\r\n{body}"

        assert status == (await trusting.raw(text, port)).status


async def test_what_a_stranger_sends_makes_no_long_line_of_the_log(victim: Victim) -> None:
    """Nor a short one with half of a secret at its end: the last word goes as a whole."""
    login = {"username": "you " * 1000 + "https://me:hunter2" + "2" * 9000, "password": "x"}

    assert 401 == (await victim.op("", "create_authentication_tokens", **login)).status

    (line,) = [line for line in victim.log.getvalue().splitlines() if "you you" in line]
    assert "login failed" in line
    assert len(line) < 10_000
    assert "hunter2" not in line


async def test_afterwards_all_is_as_before_and_no_secret_is_anywhere(victim: Victim) -> None:
    """What was theirs still works; the log, the rows and the journal hold no secret."""
    for who in ("ada", "mallory", "clerk"):
        assert 200 == (await victim.rest("GET", "/v1/models", who)).status
    assert victim.first == await victim.state()
    assert 0 == victim.trap.hits
    log = victim.log.getvalue()
    assert not victim.leaked(log)
    assert not [line for line in log.splitlines() if line.startswith("ERROR harperpy: forged")]
    assert not victim.leaked(victim.stored())
