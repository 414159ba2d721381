"""The error table: for every cause of failure what a client is told, and what is recorded."""

import asyncio
import itertools
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from harperpy import AccessViolation, ClientError, ModelCall, Scope, get_context
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running, scripted_upstream
from harperpy.upstream import Answer, chunk, streamed, whole
from helpers import (
    Answered,
    ask,
    basic,
    events,
    finished_calls,
    operation,
    provider,
)

pytestmark = pytest.mark.usefixtures("transport")

# Refusal after refusal on one server: none of them may spoil it for the next.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, EMBEDDINGS, MODELS = "/v1/chat/completions", "/v1/embeddings", "/v1/models"
USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "f"}}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (CHAT, {"model": "default", "messages": [USER]}),
    "stream": (CHAT, {"model": "default", "messages": [USER], "stream": True}),
    "embed": (EMBEDDINGS, {"model": "default", "input": "hi"}),
}
CHATS = ("whole", "stream")
METHODS = {"whole": "generate", "stream": "generateStream", "embed": "embed"}
INVALID, SERVER = "invalid_request_error", "server_error"
BAD_KEY = "invalid_api_key"
KEY = "made-up-key-of-the-provider"
NOT_FOR_YOU, SLOW_DOWN = "This model is not for you.", "Slow down."

every_call = pytest.mark.parametrize("call", CALLS)
numbers = itertools.count()


class Told(NamedTuple):
    """What a client is told: the status, and OpenAI's error object (any message if None)."""

    status: int
    type: str
    code: str | None = None
    param: str | None = None
    message: str | None = None


class Case(NamedTuple):
    """An answer to a call, and what was recorded of it, newest first."""

    answer: Answered
    rows: list[dict[str, Any]]


HEADERS = {
    "x-request-id": r"[A-Za-z0-9._-]{1,64}",
    "openai-version": r"\d{4}-\d\d-\d\d",
    "openai-processing-ms": r"\d+",
}


def check_headers(answer: Answered) -> None:
    """The head names the call, the version of the API, and how long it took."""
    for name, form in HEADERS.items():
        assert re.fullmatch(form, answer.headers.get(name, "")), name


def check(answer: Answered, told: Told, retry_after: str | None = None) -> dict[str, Any]:
    """The error object of a refusal that says just that, in the envelope and in the head."""
    body = answer.json
    assert {"error"} == set(body)
    error = body["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert told[:4] == (answer.status, error["type"], error["code"], error["param"])
    assert error["message"]
    if told.message is not None:
        assert told.message == error["message"]
    assert "application/json" == answer.headers["Content-Type"]
    assert retry_after == answer.headers.get("Retry-After")
    check_headers(answer)
    challenge = answer.headers.get("WWW-Authenticate", "")
    assert ("Bearer" in challenge) is bool(challenge) is (told.status == 401)
    return error


async def make(server: RunningServer, call: str, **options: Any) -> Case:
    """One of the three calls with fields of its own; its answer bears the id that it was given."""
    path, body = CALLS[call]
    number = f"case-{next(numbers)}"
    if "data" not in options:
        options["json"] = {**body, **options.pop("fields", {})}
    options["headers"] = {"x-request-id": number, **options.get("headers", {})}
    async with asyncio.timeout(20):
        answer = await ask(server, "POST", path, **options)
    assert number == answer.headers["x-request-id"]
    return Case(answer, await server.rows(f"request_id = '{number}'"))


def check_row(case: Case, call: str, code: str, upstream_status: int | None = None) -> None:
    """One attempt was recorded, as failed for this cause."""
    (row,) = case.rows
    assert (METHODS[call], False, code, upstream_status) == (
        row["method"],
        row["success"],
        row["error_code"],
        row["upstream_status"],
    )


# What our own server refuses.


def failing(scope: Scope) -> None:
    """Models of a plugin that refuse as plugins do, by name."""

    def forbid() -> None:
        raise AccessViolation(get_context().user, NOT_FOR_YOU)

    def limit() -> None:
        raise ClientError(SLOW_DOWN, status=429, headers={"Retry-After": "7"})

    def burst() -> None:
        raise RuntimeError(KEY)

    for name, fail in [("forbidden", forbid), ("limited", limit), ("broken", burst)]:
        register(scope, name, fail)

    async def silent() -> str:
        return "whole only"

    scope.models.register_backend(
        "generative", "whole-only", scope.models.define_backend("whole-only", generate=silent)
    )


def register(scope: Scope, name: str, fail: Any) -> None:
    """Generate, stream and embed, all of which fail so."""

    async def answers() -> Any:
        fail()

    async def streams() -> AsyncIterator[str]:
        fail()
        yield ""

    define = scope.models.define_backend
    generative = define(name, generate=answers, generate_stream=streams)
    scope.models.register_backend("generative", name, generative)
    scope.models.register_backend("embedding", name, define(name, embed=answers))


LIMITED = f"{ECHO}\nauthentication: {{operationTokenTimeout: 1}}\nhttp: {{maxBodySize: 20000}}"


class Ours(NamedTuple):
    """A server of echoes and failing models, and keys by what is wrong with them."""

    server: RunningServer
    keys: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ours() -> AsyncIterator[Ours]:
    """The server whose own refusals are proved."""
    async with running(LIMITED, handle_application=failing) as server:
        permission = {"resources": {"v1/models": ["read"]}}
        await server.operate("add_role", role="lister", permission=permission)
        lister = await server.key_for("ada", role="lister")
        login = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw"}
        _, tokens = await operation(server, login)
        made = await server.operate("add_api_key", name="short")
        await server.operate("drop_api_key", id=made["id"])
        keys = {"expired": tokens["operation_token"], "lister": lister, "dropped": made["api_key"]}
        yield Ours(server, keys)


def authorised(header: str) -> dict[str, Any]:
    """Options of a call with this `Authorization`."""
    return {"key": "", "headers": {"Authorization": header}}


def typed(content_type: str, body: Any) -> dict[str, Any]:
    """Options of a call with this body."""
    return {"data": body, "headers": {"Content-Type": content_type}}


def as_json(body: Any) -> dict[str, Any]:
    """Options of a call with these bytes as JSON."""
    return typed("application/json", body)


async def pieces() -> AsyncIterator[bytes]:
    """More than the server takes, of a length that is not announced."""
    for _ in range(30):
        yield b" " * 1000


NO_KEY, WRONG_KEY = Told(401, INVALID), Told(401, INVALID, BAD_KEY)
FORBIDDEN = Told(403, "permission_error", "insufficient_permissions")
NO_MODEL = Told(404, INVALID, "model_not_found", "model")
BAD_BODY, NO_OBJECT = Told(400, INVALID), Told(400, INVALID, "invalid_type")
TOO_LARGE = Told(413, INVALID, "payload_too_large")
GOOD = b'{"model": "echo", "messages": [{"role": "user", "content": "hi"}], "input": "hi"}'
DEEP = GOOD[:-1] + b', "x": ' + b"[" * 9000

OURS: dict[str, tuple[Told, dict[str, Any]]] = {
    "no credentials": (NO_KEY, {"key": ""}),
    "wrong key": (WRONG_KEY, {"key": "hk_wrong"}),
    "expired token": (WRONG_KEY, {"key": "expired"}),
    "dropped key": (WRONG_KEY, {"key": "dropped"}),
    "a provider's key": (WRONG_KEY, authorised("Bearer sk-of-openai")),
    "no token": (WRONG_KEY, authorised("Bearer aaa.bbb.ccc")),
    "Bearer without a key": (WRONG_KEY, authorised("Bearer")),
    "Basic without credentials": (WRONG_KEY, authorised("Basic")),
    "Basic that is not base64": (WRONG_KEY, authorised("Basic !!!")),
    "Basic without a colon": (WRONG_KEY, authorised("Basic bm9jb2xvbg==")),
    "wrong password": (WRONG_KEY, authorised(basic("HDB_ADMIN", "wrong"))),
    "unknown user": (WRONG_KEY, authorised(basic("nobody", "x"))),
    "another scheme": (WRONG_KEY, authorised("Digest username=x")),
    "no scheme": (WRONG_KEY, authorised("hk_without_a_scheme")),
    "forbidden path": (FORBIDDEN, {"key": "lister"}),
    "unknown model": (NO_MODEL, {"fields": {"model": "gpt-9"}}),
    "empty model": (
        Told(400, INVALID, "string_below_min_length", "model"),
        {"fields": {"model": ""}},
    ),
    "model that is no text": (NO_OBJECT._replace(param="model"), {"fields": {"model": 5}}),
    "no body": (BAD_BODY, as_json(b"")),
    "broken JSON": (BAD_BODY, as_json(b"{")),
    "two bodies": (BAD_BODY, as_json(GOOD + b" {}")),
    "no UTF-8": (BAD_BODY, as_json(b"\xff\xfe")),
    "nonsense with a charset": (BAD_BODY, typed("application/json; charset=utf-8", b"nonsense")),
    "null": (NO_OBJECT, as_json(b"null")),
    "a number": (NO_OBJECT, as_json(b"5")),
    "a text": (NO_OBJECT, as_json(b'"text"')),
    "an array": (NO_OBJECT, as_json(b"[]")),
    "nested too deeply": (BAD_BODY, as_json(DEEP)),
    "plain text": (BAD_BODY, typed("text/plain", GOOD)),
    "a form": (BAD_BODY, typed("application/x-www-form-urlencoded", b"input=hi&messages=hi")),
    "a multipart form": (BAD_BODY, typed("multipart/form-data; boundary=x", b"--x--")),
    "too large": (TOO_LARGE, as_json(b" " * 20001)),
    "too large, unannounced": (TOO_LARGE, {**as_json(None), "data": pieces}),
    "model forbidden by a plugin": (
        FORBIDDEN._replace(message=NOT_FOR_YOU),
        {"fields": {"model": "forbidden"}},
    ),
    "rate limit of a plugin": (
        Told(429, "rate_limit_error", None, None, SLOW_DOWN),
        {"fields": {"model": "limited"}},
    ),
    "what nobody foresaw": (
        Told(502, SERVER, None, None, "The model provider failed to answer."),
        {"fields": {"model": "broken"}},
    ),
}
SAYS = {"expired token": "expired", "unknown model": "`gpt-9`", "too large": "20000 bytes"}
ROWS_OF = {
    "unknown model": "backend_not_found",
    "model forbidden by a plugin": "backend_error",
    "rate limit of a plugin": "backend_error",
    "what nobody foresaw": "backend_error",
}


async def refused(ours: Ours, cause: str, call: str) -> Case:
    """A call that is refused for this cause."""
    options = dict(OURS[cause][1])
    if key := ours.keys.get(options.get("key", "")):
        options["key"] = key
    if options.get("data") is pieces:
        options["data"] = pieces()
    return await make(ours.server, call, **options)


@every_call
@pytest.mark.parametrize("cause", OURS)
async def test_what_we_refuse(ours: Ours, cause: str, call: str) -> None:
    """Whatever is wrong with a request has a status before the first byte, stream or not."""
    told, options = OURS[cause]
    case = await refused(ours, cause, call)

    error = check(case.answer, told, "7" if told.status == 429 else None)
    assert SAYS.get(cause, "") in error["message"]
    assert KEY not in case.answer.text
    if code := ROWS_OF.get(cause):
        check_row(case, call, code)
        assert options["fields"]["model"] == case.rows[0]["model"]
    else:
        assert [] == [row for row in case.rows if row["backend"] != "unknown"]


ASKED: Any = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", **TOOL, "function": {"name": "f", "arguments": "{}"}}],
}
RESULT: Any = {"role": "tool", "tool_call_id": "call_2", "content": "rain"}
BAD_PART: Any = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video"}]}
ROBOT: Any = {"role": "robot", "content": "hi"}
VALIDATION: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": None}, "invalid_type", "messages"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": [USER, ROBOT]}, "invalid_value", "messages[1].role"),
    ({"messages": [BAD_PART]}, "invalid_value", "messages[0].content[1].type"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [USER, RESULT]}, None, "messages[1].role"),
    ({"messages": [USER, ASKED, RESULT]}, None, "messages[2].tool_call_id"),
    ({"messages": [USER, ASKED]}, None, "messages[1].tool_calls"),
    ({"tools": [TOOL, TOOL]}, "invalid_value", "tools[1].function.name"),
    (
        {"tools": [{**TOOL, "function": {"name": "two words"}}]},
        "invalid_value",
        "tools[0].function.name",
    ),
    ({"tools": [TOOL] * 129}, "array_above_max_length", "tools"),
    ({"tool_choice": "required"}, None, "tool_choice"),
    ({"temperature": "1"}, "invalid_type", "temperature"),
    ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    ({"top_p": -0.1}, "decimal_below_min_value", "top_p"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"n": 129}, "integer_above_max_value", "n"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({"top_logprobs": 2}, None, "top_logprobs"),
    ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
    ({"seed": 2**63}, "integer_above_max_value", "seed"),
    ({"reasoning_effort": "super"}, "invalid_value", "reasoning_effort"),
    (
        {"response_format": {"type": "json_schema"}},
        "missing_required_parameter",
        "response_format.json_schema",
    ),
]


@pytest.mark.parametrize("call", CHATS)
@pytest.mark.parametrize(("fields", "code", "param"), VALIDATION)
async def test_a_chat_that_is_not_valid(
    ours: Ours, call: str, fields: dict[str, Any], code: str | None, param: str
) -> None:
    """OpenAI's code for what is wrong, and the path to where it stands; no model is asked."""
    case = await make(ours.server, call, fields=fields)

    check(case.answer, Told(400, INVALID, code, param))
    assert [] == case.rows


@pytest.mark.parametrize(
    ("call", "told", "fields"),
    [
        ("whole", "logprobs", {"logprobs": True}),
        ("stream", "logprobs", {"logprobs": True}),
        ("whole", "response_format", {"response_format": {"type": "json_object"}}),
        ("stream", "response_format", {"response_format": {"type": "json_object"}}),
        ("stream", "stream", {"model": "whole-only"}),
        ("whole", "tools", {"model": "whole-only", "tools": [TOOL]}),
    ],
)
async def test_what_a_model_cannot_do(
    ours: Ours, call: str, told: str, fields: dict[str, Any]
) -> None:
    """A capability that is missing is the client's to mend, and names the field that asked."""
    case = await make(ours.server, call, fields=fields)

    check(case.answer, Told(400, INVALID, "unsupported_parameter", told))
    assert ["capability_unsupported"] * len(case.rows) == [row["error_code"] for row in case.rows]


PATHS = [
    ("POST", CHAT),
    ("POST", EMBEDDINGS),
    ("GET", MODELS),
    ("GET", f"{MODELS}/echo"),
    ("GET", "/v1/nothing"),
    ("POST", "/v1/nothing/at/all"),
    ("POST", "/v1/responses"),
    ("POST", "/v1"),
    ("DELETE", CHAT),
    ("POST", MODELS),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(("key", "told"), [("", NO_KEY), ("hk_wrong", WRONG_KEY)])
async def test_a_stranger_learns_nothing(
    ours: Ours, method: str, path: str, key: str, told: Told
) -> None:
    """401 comes before 404, 405 and 400, on every path."""
    answer = await ask(ours.server, method, path, key=key, json={"broken": True})

    check(answer, told)


async def test_a_role_may_do_what_it_may(ours: Ours) -> None:
    """The key that is refused elsewhere lists the models."""
    answer = await ask(ours.server, "GET", MODELS, key=ours.keys["lister"])

    assert 200 == answer.status
    check_headers(answer)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat", f"{CHAT}/x", f"{EMBEDDINGS}/a/b"])
async def test_an_unknown_url(ours: Ours, method: str, path: str) -> None:
    """Everything below /v1 that the gateway does not have is its own 404, which names the path."""
    answer = await ask(ours.server, method, path)

    error = check(answer, Told(404, INVALID, "unknown_url"))
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1", "/v1/completions"])
async def test_an_endpoint_of_openais_that_does_not_exist_here(ours: Ours, path: str) -> None:
    """Clients that use it unasked are told by which setting they use chat completions."""
    answer = await ask(ours.server, "POST", path, json={"model": "echo", "input": "hi"})

    error = check(answer, Told(404, INVALID, "unknown_url"))
    assert f"POST {path}" in error["message"]
    for setting in ("chat completions", "openai.chat(model)", "use_responses_api=False"):
        assert setting in error["message"]


async def test_an_unlisted_model(ours: Ours) -> None:
    """A model that cannot be retrieved is like one that cannot be used."""
    check(await ask(ours.server, "GET", f"{MODELS}/org/nothing"), NO_MODEL)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST, OPTIONS"),
        ("PUT", CHAT, "POST, OPTIONS"),
        ("DELETE", EMBEDDINGS, "POST, OPTIONS"),
        ("POST", MODELS, "GET, HEAD, OPTIONS"),
        ("DELETE", f"{MODELS}/echo", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method(ours: Ours, method: str, path: str, allow: str) -> None:
    """405 says which methods there are."""
    answer = await ask(ours.server, method, path)

    check(answer, Told(405, INVALID, "method_not_supported"))
    assert allow == answer.headers["Allow"]


# What an upstream answers.


class Chain(NamedTuple):
    """A server whose models are a scripted upstream's."""

    server: RunningServer
    upstream: ScriptedUpstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_chain() -> AsyncIterator[Chain]:
    """The chain that all rows share; it asks once."""
    async with (
        scripted_upstream() as upstream,
        running(provider(upstream.url, f'apiKey: "{KEY}"')) as server,
    ):
        yield Chain(server, upstream)


@pytest.fixture
def chain(one_chain: Chain) -> Iterator[Chain]:
    """The chain, whose upstream has forgotten what it was asked and told."""
    one_chain.upstream.requests.clear()
    one_chain.upstream.left.clear()
    one_chain.upstream.asked.clear()
    yield one_chain
    one_chain.upstream._script.clear()


@every_call
async def test_a_good_answer_has_the_same_head(chain: Chain, call: str) -> None:
    """What the table asks of refusals holds for answers, whole or streamed."""
    case = await make(chain.server, call)

    assert 200 == case.answer.status
    check_headers(case.answer)
    assert "Retry-After" not in case.answer.headers


THEIRS = {"message": "They say no.", "type": "their_type", "param": "messages[0].content",
          "code": "their_code"}  # fmt: skip
QUOTED = ("their_type", "their_code", "messages[0].content", "They say no.")
FAILED = "The model provider failed to answer."
REFUSED_US = Told(
    502,
    SERVER,
    "upstream_auth_error",
    None,
    "The model provider refused this server's credentials.",
)
LATE = Told(504, SERVER, "timeout", None, "The model provider did not answer in time.")
BAD_GATEWAY = Told(502, SERVER, None, None, FAILED)


def wordless(status: int) -> Told:
    """A refusal that the provider did not word as OpenAI does."""
    kind = "rate_limit_error" if status == 429 else INVALID
    return Told(status, kind, None, None, f"The model provider answered {status}.")


# The provider's status, what is told of it with its own words, without them, whether the time to
# come back passes on, and the code in the row.
STATUSES: dict[int, tuple[Told, Told, bool, str]] = {
    **{status: (Told(status, *QUOTED), wordless(status), True, "backend_error")
       for status in (400, 404, 409, 413, 422, 429)},
    **dict.fromkeys((401, 403), (REFUSED_US, REFUSED_US, False, "backend_error")),
    408: (LATE, LATE, False, "timeout"),
    **{status: (told, told, True, "backend_error")
       for status in (500, 502, 503, 529)
       for told in [Told(status, SERVER, None, None, FAILED)]},
    **dict.fromkeys((204, 302, 402), (BAD_GATEWAY, BAD_GATEWAY, True, "backend_error")),
}  # fmt: skip


@every_call
@pytest.mark.parametrize("worded", [True, False])
@pytest.mark.parametrize("status", STATUSES)
async def test_what_an_upstream_refuses(
    chain: Chain, call: str, status: int, *, worded: bool
) -> None:
    """What is wrong with the call passes on; the provider's faults are told in our words."""
    with_words, without, comes_back, code = STATUSES[status]
    body: Any = {"error": THEIRS} if worded else b"<html>They say no.</html>"
    headers = {"Retry-After": "17"}
    answer = Answer(status=status, headers=headers, body=b"" if status == 204 else body)
    chain.upstream.script(answer)
    case = await make(chain.server, call)

    told = with_words if worded else without
    check(case.answer, told, "17" if comes_back else None)
    assert (told.message == "They say no.") is ("They say no." in case.answer.text)
    check_row(case, call, code, status)


# An upstream that cannot be reached, breaks off or talks nonsense.


@asynccontextmanager
async def blurting(sent: bytes) -> AsyncIterator[str]:
    """The URL of a server that answers whatever it is asked with these bytes, and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def asked_at(url: str, call: str, more: str = "") -> Case:
    """A call to a server whose provider is said to be there."""
    async with running(provider(url, more)) as server:
        return await make(server, call)


def check_unreached(case: Case, call: str) -> None:
    """A bad gateway, which tells neither address nor cause."""
    check(case.answer, BAD_GATEWAY)
    check_row(case, call, "backend_error")


@every_call
async def test_a_connection_that_is_refused(call: str, deaf_port: int) -> None:
    """Nobody listens at the provider's address."""
    check_unreached(await asked_at(f"http://127.0.0.1:{deaf_port}/v1", call), call)


@every_call
async def test_a_name_that_does_not_resolve(call: str) -> None:
    """The provider's name is none."""
    check_unreached(await asked_at("http://nobody.invalid/v1", call), call)


@every_call
async def test_tls_that_fails(chain: Chain, call: str) -> None:
    """The provider's port does not speak TLS."""
    url = chain.upstream.url.replace("http:", "https:")
    check_unreached(await asked_at(url, call), call)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BROKEN = {
    "nothing": b"",
    "cut in the head": b"HTTP/1.1 200 OK\r\nContent-",
    "no HTTP": b"this is no HTTP at all\r\n\r\n",
    "cut in the body": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "broken chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    "broken gzip": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
}


@every_call
@pytest.mark.parametrize("what", BROKEN)
async def test_a_connection_that_breaks(call: str, what: str) -> None:
    """Cut before the head, within it or within the body, or no HTTP."""
    async with blurting(BROKEN[what]) as url:
        check_unreached(await asked_at(url, call), call)


def vectors(*numbers: Any) -> dict[str, Any]:
    """An answer with these embeddings."""
    return {"data": [{"index": at, "embedding": one} for at, one in enumerate(numbers)]}


NONSENSE: list[tuple[str, Any]] = [
    ("whole", b"{"),
    ("whole", b""),
    ("whole", b"<html></html>"),
    ("whole", b"\xff"),
    ("whole", []),
    ("whole", {}),
    ("whole", {"choices": []}),
    ("whole", {"choices": None}),
    ("whole", {"choices": [{"index": 0}]}),
    ("whole", {"choices": [{"index": 0, "message": {"content": 5}}]}),
    ("whole", {"error": THEIRS}),
    ("stream", b"{"),
    ("stream", b""),
    ("embed", b"{"),
    ("embed", {}),
    ("embed", {"data": []}),
    ("embed", vectors([1], [1])),
    ("embed", vectors("AAAA")),
    ("embed", vectors([None])),
    ("embed", b'{"data": [{"index": 0, "embedding": [NaN]}]}'),
]


@pytest.mark.parametrize(("call", "body"), NONSENSE)
async def test_an_answer_that_is_none(chain: Chain, call: str, body: Any) -> None:
    """A 200 that does not hold what was asked for is a bad gateway, and none of it is quoted."""
    chain.upstream.script(Answer(body=body))
    check_unreached(await make(chain.server, call), call)


@pytest.mark.parametrize(
    "events",
    [
        [b"data: {broken\n\n"],
        [{"error": THEIRS}],
        [{"error": "No."}],
        [{"choices": "x"}],
        [],
    ],
)
async def test_a_stream_that_breaks_at_once(chain: Chain, events: list[Any]) -> None:
    """Before the first chunk our head is not sent yet: the error can be its status."""
    chain.upstream.script(Answer(events=events))
    check_unreached(await make(chain.server, "stream"), "stream")


# An upstream that is late.

STALLS: dict[str, tuple[str, str, Answer]] = {
    f"{option} in {call}, {answer.hang} hangs": (option, call, answer)
    for option, call, answer in [
        *(("firstByteTimeoutMs", call, Answer(hang="head")) for call in CALLS),
        ("idleTimeoutMs", "whole", Answer(body=whole("hi"), hang="body")),
        ("idleTimeoutMs", "stream", Answer(events=[], hang="body")),
        ("idleTimeoutMs", "embed", Answer(body={}, hang="end")),
        ("requestTimeoutMs", "whole", Answer(hang="head")),
        ("requestTimeoutMs", "stream", Answer(hang="head")),
        ("requestTimeoutMs", "embed", Answer(body={}, hang="body")),
    ]
}


@pytest.mark.parametrize("what", STALLS)
async def test_an_upstream_that_stalls(chain: Chain, what: str) -> None:
    """Each limit of the configuration ends the wait, and the provider is left."""
    option, call, answer = STALLS[what]
    chain.upstream.script(answer)
    case = await asked_at(chain.upstream.url, call, f"{option}: 100")
    async with asyncio.timeout(20):
        await chain.upstream.left.wait()

    check(case.answer, LATE)
    check_row(case, call, "timeout")


@every_call
async def test_an_upstream_that_takes_no_connection(call: str) -> None:
    """A connection that is neither taken nor refused ends with the limit for connecting."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filling in (first, second):
            filling.settimeout(0)
            filling.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        case = await asked_at(url, call, "connectTimeoutMs: 100")

    check(case.answer, LATE)
    check_row(case, call, "timeout")


# What fails after the first byte.

ONE = streamed("one", done=False)
BREAKS: dict[str, Answer] = {
    "malformed event": Answer(events=[*ONE, b"data: {broken\n\n"]),
    "event of another shape": Answer(events=[*ONE, {"choices": 5}]),
    "ends without reason and [DONE]": Answer(events=ONE),
    "is cut": Answer(events=ONE, cut=True),
    "tells of an error": Answer(events=[*ONE, {"error": THEIRS}]),
    "tells an error as text": Answer(events=[*ONE, {"error": "No."}]),
    "event beyond measure": Answer(events=[*ONE, b"data: " + b"x" * (2 << 20) + b"\n\n"]),
    "too many tool calls": Answer(
        events=[*ONE, *(chunk({"tool_calls": [{"index": at, "id": "x"}]}) for at in range(200))]
    ),
}


def check_in_band(case: Case, told: Told) -> None:
    """A good head, what was said until then, one frame with the error, and no `[DONE]`."""
    first, *_, last = events(case.answer.text)
    check_headers(case.answer)
    assert 200 == case.answer.status
    assert "one" == first["choices"][0]["delta"]["content"]
    error = {"type": told.type, "code": told.code, "param": told.param, "message": told.message}
    assert {"error": error} == last
    assert 1 == case.answer.text.count('"error"')


@pytest.mark.parametrize("what", BREAKS)
async def test_a_stream_that_breaks(chain: Chain, what: str) -> None:
    """The error is the last event, and what came before it is billed."""
    chain.upstream.script(BREAKS[what])
    case = await make(chain.server, "stream")

    check_in_band(case, BAD_GATEWAY)
    check_row(case, "stream", "backend_error")
    assert case.rows[0]["completion_tokens"] > 0


@pytest.mark.parametrize("option", ["idleTimeoutMs", "requestTimeoutMs"])
async def test_a_stream_that_stalls_in_the_middle(chain: Chain, option: str) -> None:
    """After the first chunk a time-out is an event, like any other error."""
    chain.upstream.script(Answer(events=ONE, hang="end"))
    case = await asked_at(chain.upstream.url, "stream", f"{option}: 200")

    check_in_band(case, LATE)
    check_row(case, "stream", "timeout")
    assert 1 == case.rows[0]["completion_tokens"]


async def test_a_status_told_in_the_stream_is_in_the_row(chain: Chain) -> None:
    """Some providers answer 200 and tell their 429 in an event: it is told as theirs."""
    told = {"error": {"message": "slow down", "code": 429}}
    chain.upstream.script(Answer(events=[*ONE, told]))
    case = await make(chain.server, "stream")

    check_in_band(case, Told(429, "rate_limit_error", "429", None, "slow down"))
    check_row(case, "stream", "backend_error", 429)


# A client that leaves.

LEAVERS: dict[str, tuple[str, Answer]] = {
    "before the first token": ("stream", Answer(events=[], hang="body")),
    "before the stream's head": ("stream", Answer(hang="head")),
    "during a whole chat": ("whole", Answer(hang="head")),
    "during a chat's body": ("whole", Answer(body=whole("hi"), hang="body")),
    "during an embedding": ("embed", Answer(hang="head")),
}


@pytest.mark.parametrize("when", LEAVERS)
async def test_a_client_that_leaves(chain: Chain, when: str) -> None:
    """Whatever a client waits for, leaving ends the upstream's work; one row says `aborted`."""
    call, answer = LEAVERS[when]
    chain.upstream.script(answer)
    finished = finished_calls(chain.server)
    async with asyncio.timeout(20):
        waiting = asyncio.create_task(make(chain.server, call))
        await chain.upstream.asked.wait()
        waiting.cancel()
        await chain.upstream.left.wait()
        left: ModelCall = await finished.get()
    after = await make(chain.server, call)
    rows = await chain.server.rows("error_code = 'aborted'")

    assert 200 == after.answer.status
    row = rows[0]
    assert (left.id, METHODS[call], False, None, None, True) == (
        row["id"],
        row["method"],
        row["success"],
        row["completion_tokens"],
        row["ttft_ms"],
        row["usage_estimated"],
    )
    assert row["embedding_tokens" if call == "embed" else "prompt_tokens"] > 0


# Asking again.

SOON = {"Retry-After": "0"}
PASSES = (408, 429, 500, 502, 503, 529)
STAYS = (400, 401, 403, 404, 409, 413, 422)


@asynccontextmanager
async def retrying(url: str, most: int | None) -> AsyncIterator[RunningServer]:
    """A server that may ask its provider again so often, or as often as it does by itself."""
    setting = "" if most is None else f", maxRetries: {most}"
    async with running(provider(url).replace(", maxRetries: 0", setting)) as server:
        yield server


@every_call
@pytest.mark.parametrize("status", PASSES)
async def test_what_passes_by_is_tried_again(chain: Chain, call: str, status: int) -> None:
    """A moment later it may work: the client sees the success, the rows all attempts."""
    chain.upstream.script(*[Answer(status=status, headers=SOON, body=b"")] * 2)
    async with retrying(chain.upstream.url, None) as server:
        case = await make(server, call)

    assert 200 == case.answer.status
    assert 3 == len(chain.upstream.requests)
    assert [(True, None), (False, status), (False, status)] == [
        (row["success"], row["upstream_status"]) for row in case.rows
    ]


@every_call
@pytest.mark.parametrize(
    ("most", "statuses"), [(None, (500, 429, 503)), (0, (503,)), (1, (500, 503)), (3, (503,) * 4)]
)
async def test_trying_again_has_an_end(
    chain: Chain, call: str, most: int | None, statuses: tuple[int, ...]
) -> None:
    """`maxRetries` counts further attempts, two by default; the last one's error is told."""
    told = [Answer(status=status, headers=SOON, body=b"") for status in statuses]
    chain.upstream.script(*told, Answer(status=418))
    async with retrying(chain.upstream.url, most) as server:
        case = await make(server, call)

    check(case.answer, Told(503, SERVER), "0")
    assert len(statuses) == len(chain.upstream.requests)
    assert [*reversed(statuses)] == [row["upstream_status"] for row in case.rows]


@every_call
@pytest.mark.parametrize("status", STAYS)
async def test_what_stays_is_not_tried_again(chain: Chain, call: str, status: int) -> None:
    """The same call would be refused in the same way."""
    chain.upstream.script(Answer(status=status, headers=SOON, body=b""))
    async with retrying(chain.upstream.url, 2) as server:
        case = await make(server, call)

    assert 1 == len(chain.upstream.requests) == len(case.rows)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        *(("stream", answer) for answer in BREAKS.values()),
        ("stream", Answer(events=[b"data: {broken\n\n"])),
        ("stream", Answer(events=[*ONE, {"error": {"message": "slow down", "code": 429}}])),
        ("whole", Answer(body=b"{")),
        ("whole", Answer(body=b"{", cut=True)),
        ("embed", Answer(body=b"{")),
    ],
)
async def test_an_answer_that_has_begun_is_not_asked_for_again(
    chain: Chain, call: str, answer: Answer
) -> None:
    """After the first byte nothing is tried again: it may have been billed, and shown."""
    chain.upstream.script(answer)
    async with retrying(chain.upstream.url, 2) as server:
        case = await make(server, call)

    assert 1 == len(chain.upstream.requests) == len(case.rows)
    assert not case.rows[0]["success"]


@pytest.mark.parametrize("wait", ["60", "Wed, 21 Oct 2065 07:28:00 GMT"])
async def test_a_long_wait_is_the_clients(chain: Chain, wait: str) -> None:
    """A provider that wants a minute is not tried again: the client is told how long."""
    chain.upstream.script(Answer(status=429, headers={"Retry-After": wait}, body=b""))
    async with retrying(chain.upstream.url, 2) as server:
        case = await make(server, "whole")

    check(case.answer, wordless(429), wait)
    assert 1 == len(chain.upstream.requests)


@every_call
async def test_a_refused_connection_is_tried_again(call: str, deaf_port: int) -> None:
    """A provider that restarts refuses for a moment; each attempt is a row."""
    async with retrying(f"http://127.0.0.1:{deaf_port}/v1", 1) as server:
        case = await make(server, call)

    check(case.answer, BAD_GATEWAY)
    assert 2 == len(case.rows)
