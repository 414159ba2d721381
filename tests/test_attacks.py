"""Ways in, each a row: what a stranger or a user with few rights tries, and that it does not work.

Every row says what is answered; that nothing was changed and no secret told is checked after each,
and of the log, the rows and the journal once more at the end.
"""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import jwt
import pytest
import pytest_asyncio

from attacked import Seen, Victim, attacked
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


GROUPS = {"objects": OBJECTS, "logins": LOGINS}
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


async def test_afterwards_all_is_as_before_and_no_secret_is_anywhere(victim: Victim) -> None:
    """What was theirs still works; the log, the rows and the journal hold no secret."""
    assert 200 == (await victim.rest("GET", "/v1/models", "ada")).status
    assert not victim.leaked(victim.log.getvalue())
    assert 0 == victim.trap.hits
    assert not victim.leaked(victim.stored())
