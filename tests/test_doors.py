"""Whatever a request looks like: no handler runs for those who may not call it."""

import ast
import asyncio
import inspect
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harperpy
from harperpy import (
    Context,
    EventStream,
    Next,
    NoParameters,
    Reply,
    RequestTarget,
    Resource,
    Scope,
)
from harperpy.dispatch import Dispatch
from harperpy.testing import ECHO, RunningServer, running
from helpers import basic

pytestmark = pytest.mark.usefixtures("way")

SECRET = "told to those who may"
ran: list[tuple[str, str]] = []
"""What ran, by mount and verb."""


def tell(mount: str, verb: str) -> str:
    """Note that a verb of a mount has run; what only it can answer."""
    ran.append((mount, verb))
    return SECRET


# --- the mounts: a verb of each kind, all of which note that they run


def room(mount: str, **attributes: Any) -> type[Resource]:
    """A resource that defines every verb, and says nothing of who may call them."""

    def verb(name: str) -> Any:
        def run() -> str:
            return tell(mount, name)

        return staticmethod(run)

    verbs = {name: verb(name) for name in ("get", "post", "put", "patch", "delete", "query")}
    return hall(mount, **verbs, **attributes)


def hall(mount: str, **attributes: Any) -> type[Resource]:
    """A resource that has a stream, if nothing else is said."""

    def connect() -> EventStream:
        return EventStream([tell(mount, "connect")])

    return type("Room", (Resource,), {"connect": staticmethod(connect), **attributes})


class Letter(msgspec.Struct):
    """A body whose decoding is noted too."""

    text: str = ""

    def __post_init__(self) -> None:
        tell("typed", "decode")


class Typed(Resource):
    """A typed body and a typed query, which are not even read for those who may not."""

    @staticmethod
    def get(target: RequestTarget[Letter]) -> str:
        """Takes a query."""
        return tell("typed", "get")

    @staticmethod
    def post(target: RequestTarget, data: Letter) -> str:
        """Takes a body."""
        return tell("typed", "post")


class Stream(Resource):
    """Streams of every kind: what is never begun has not run."""

    sub_paths = True

    @staticmethod
    async def get() -> AsyncIterator[str]:
        """An async generator."""
        yield tell("stream", "get")

    @staticmethod
    def post() -> Iterator[str]:
        """A generator."""
        yield tell("stream", "post")

    @staticmethod
    async def query() -> EventStream:
        """Events."""
        return EventStream([tell("stream", "query")])


def never(*_: Any) -> bool:
    """A hook that denies everybody."""
    return False


async def breaks(*_: Any) -> bool:
    """A hook that fails."""
    raise LookupError


def truthy(*_: Any) -> Any:
    """A hook that forgot to compare: a word is no permission."""
    return "yes"


def hooks(function: Any) -> dict[str, Any]:
    """The same hook for every permission."""
    permissions = ("read", "create", "update", "delete")
    return {f"allow_{permission}": staticmethod(function) for permission in permissions}


LOCKED = {"denied": hooks(never), "broken": hooks(breaks), "sloppy": hooks(truthy)}
MOUNTS: dict[str, type[Resource]] = {
    "closed": room("closed"),
    "Deep/closed": room("Deep/closed", sub_paths=True),
    "lent": room("lent", sub_paths=True),
    "lent/inner": room("lent/inner"),
    "board": room("board", sub_paths=True, public={"read"}),
    "board/inner": room("board/inner"),
    "user/:id": room("user/:id"),
    "user/:id/keys": room("user/:id/keys", sub_paths=True),
    "files/*rest": room("files/*rest"),
    "feed": room("feed", protocols={"sse"}),
    "line": hall("line", protocols={"ws"}, sub_paths=True),
    "hall": hall("hall", sub_paths=True),
    "tool": room("tool", protocols={"mcp"}),
    "shelf": room("shelf", sub_paths=True, search=staticmethod(lambda: tell("shelf", "search"))),
    "typed": Typed,
    "stream": Stream,
    **{name: room(name, sub_paths=True, **hook) for name, hook in LOCKED.items()},
}
ANYONE = {("board", "get"), ("board", "query"), ("board", "connect")}
READER = ANYONE | {("lent", "get"), ("lent", "query"), ("lent", "connect")}
# Who may read what is lent: by their role, by the grants of their key.
LENT = ("reader", "key with grants")


async def through(context: Context, call_next: Next) -> Reply:
    """A middleware that lets all pass."""
    return await call_next(context)


def plugin(scope: Scope, *, wrapped: bool) -> None:
    """An operation for super users; where all is wrapped, a root too, and middlewares."""
    scope.operations.add("open_door", lambda _: tell("operations", "open_door"), NoParameters)
    if wrapped:
        scope.resources.set("", room("", sub_paths=True))
        for port in ("rest", "operations"):
            scope.server.http(through, name="first", before="authentication", port=port)
            scope.server.http(through, name="second", port=port)
            scope.server.http(through, name="third", after="resources", port=port)
            scope.server.http(through, name="own", url_path="/closed", port=port)


class House(NamedTuple):
    """A running server, and what strangers may try to open it with."""

    ports: tuple[int, int]
    api_key: str
    keys: dict[str, str]


async def serve(ready: Future[Any], *, wrapped: bool) -> None:
    """Run the house until it is told to stop."""
    config = f"{ECHO}\nauthentication: {{operationTokenTimeout: 1ms, refreshTokenTimeout: 1ms}}"

    def apply(scope: Scope) -> None:
        plugin(scope, wrapped=wrapped)

    try:
        async with running(config, resources=MOUNTS, handle_application=apply) as server:
            ports = (server.server.http_port, server.server.operations_port)
            house = House(ports, server.api_key, await credentials(server))
            stop = asyncio.Event()
            ready.set_result((house, asyncio.get_running_loop(), stop))
            await stop.wait()
    except Exception as error:
        if not ready.done():
            ready.set_exception(error)
        raise


async def credentials(server: RunningServer) -> dict[str, str]:
    """`Authorization` headers by what they are worth."""

    async def made(**more: Any) -> str:
        told = await server.operate("add_api_key", name="k", **more)
        return f"Bearer {told['api_key']}"

    lent = {"resources": {"lent": ["read"]}}
    await server.operate("add_role", role="nothing", permission={})
    await server.operate("add_role", role="reader", permission=lent)
    key = await server.key_for("gone")
    tokens = await server.operate("create_authentication_tokens", username="gone", password="pw")
    granted: dict[str, Any] = {"resources": lent["resources"]}
    opens: dict[str, Any] = {"resources": {}, "operations": ["open_door"]}
    bare: dict[str, Any] = {"resources": {}, "models": []}
    gone = await server.key_for("dismissed", "super_user")
    await server.operate("alter_user", username="dismissed", active=False)
    return {
        "none": "",
        "wrong key": "Bearer hk_0123456789abcdef",
        "cut key": f"Bearer {server.api_key[:-1]}",
        "key and more": f"Bearer {server.api_key}x",
        "key of another scheme": f"Token {server.api_key}",
        "two keys": f"Bearer {server.api_key} {key}",
        "expired token": f"Bearer {tokens['operation_token']}",
        "expired refresh token": f"Bearer {tokens['refresh_token']}",
        "key of a user who left": f"Bearer {gone}",
        "unsigned token": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJIREJfQURNSU4ifQ.",
        "no Basic": "Basic !!!",
        "wrong password": basic("HDB_ADMIN", "pw"),
        "no scheme": server.api_key[:12],
        "nothing after the scheme": "Bearer ",
        "key with grants": await made(grants=granted),
        "key with empty grants": await made(grants=bare),
        "key of the operation": await made(grants=opens),
        "key that has expired": await made(expires_in=0.001),
        "role without grants": f"Bearer {await server.key_for('ada', 'nothing')}",
        "reader": f"Bearer {await server.key_for('bob', 'reader')}",
    }


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "wrapped"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """One server for all examples, in a thread of its own: hypothesis calls plain functions."""
    ready: Future[Any] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(serve(ready, wrapped=request.param)))
    thread.start()
    house, loop, stop = ready.result(timeout=30)
    yield house
    loop.call_soon_threadsafe(stop.set)
    thread.join(timeout=30)
    assert not thread.is_alive()


# --- requests


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY", "OPTIONS"]
ODD_METHODS = ["get", "Get", "TRACE", "CONNECT", "PROPFIND", "X-Y", "QUERY", "GE\tT", "", "HEAD"]
PLACES = [
    "/closed", "/Deep/closed", "/Deep/closed/1", "/lent", "/lent/1", "/lent/inner", "/board",
    "/board/1", "/board/inner", "/user/7", "/user/7/keys", "/user/7/keys/1", "/files/a/b", "/feed",
    "/line", "/hall", "/tool", "/typed", "/stream", "/stream/1", "/denied", "/broken", "/sloppy",
    "/", "/openapi", "/health", "/v1/chat/completions", "/v1/models", "/nowhere",
]  # fmt: skip
SUFFIXES = [
    "/", "//", "/.", "/..", "/../closed", "/%2e%2e/closed", "/..%2fclosed", "/%2E", "%2f", "%00",
    "%20", ".json", ";x=1", "?", "?text=a", "?x=%zz", "#", "%3fx", "%", "%ff", "/*", "/:id",
    "\\", "/%252e%252e/closed", "?_method=DELETE", "/inner", "%2finner", "/./inner",
]  # fmt: skip
PREFIXES = [
    "/", "/.", "/..", "/board/..", "/board/%2e%2e", "/lent/..", "/lent//..", "/health/..",
    "/openapi/..", "http://test", "http://test/board/..", "//test", "/%2f", "/board;", "\\", "*",
    "/%20", "test:80", "HTTP://TEST", "/v1/..",
]  # fmt: skip
HEADERS = [
    "Accept: text/event-stream", "Accept: application/json", "Accept: image/png", "Accept: ;;",
    "X-HTTP-Method-Override: GET", "X-HTTP-Method-Override: DELETE", "X-Original-URL: /board",
    "X-Rewrite-URL: /board", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-User: HDB_ADMIN",
    "X-Forwarded-Prefix: /board", "Forwarded: for=127.0.0.1", "Origin: http://localhost",
    "Access-Control-Request-Method: POST", "Upgrade: websocket", "Last-Event-ID: 1",
    "Cookie: session=HDB_ADMIN", "Authorization:", "Proxy-Authorization: Basic YTpi",
    "Range: bytes=0-1", "If-None-Match: *", "X-Request-Id: ../../x", "Content-Encoding: gzip",
]  # fmt: skip
BODIES = [
    "", "{}", '{"text": "a"}', "[", '{"text": 1}', '{"operation": "open_door"}', '"x"',
    '{"operation": "list_users"}', '{"operation": "OPEN_DOOR"}',
    '{"messages": [{"role": "user", "content": "a"}]}',
]  # fmt: skip
VERSIONS = ["HTTP/1.1"] * 30 + ["HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/0.9", ""]
WAYS = ["as it is", "as it is", "as it is", "case", "code", "code all", "double"]


def spelled(place: str, way: str) -> str:
    """Another spelling of a path, which may or may not be the same one."""
    match way:
        case "case":
            return place.swapcase()
        case "code":
            return re.sub("[eo]", lambda found: f"%{ord(found[0]):02x}", place)
        case "code all":
            return "/" + "".join(f"%{ord(letter):02X}" for letter in place[1:])
        case "double":
            return place.replace("/", "//")
        case _:
            return place


@st.composite
def paths(draw: st.DrawFn, places: list[str]) -> str:
    """A mount's path, spelled in some way, something before it and something after it."""
    prefix = draw(st.sampled_from([""] * 4 * len(PREFIXES) + PREFIXES))
    suffix = draw(st.sampled_from([""] * 2 * len(SUFFIXES) + SUFFIXES))
    place = spelled(draw(st.sampled_from(places)), draw(st.sampled_from(WAYS)))
    return prefix + place + suffix


class Asked(NamedTuple):
    """A request but for its credential."""

    method: str
    path: str
    version: str
    headers: list[str]
    body: str

    def written(self, credential: str) -> bytes:
        """What is sent; nobody tidies it up."""
        lines = [f"{self.method} {self.path} {self.version}".rstrip(), "Host: test"]
        lines += ["Connection: close", *self.headers]
        lines += [f"Authorization: {credential}"] if credential else []
        if self.body:
            lines += [f"Content-Length: {len(self.body)}", "Content-Type: application/json"]
        return "\r\n".join([*lines, "", self.body]).encode("latin-1")

    def without_body(self) -> "Asked":
        """The same; what has a body cannot become anything else."""
        return self._replace(body="")

    def opening(self, credential: str) -> bytes:
        """The same, asking to become a WebSocket; a key of a page's goes as a subprotocol."""
        headers = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        headers.append("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
        scheme, _, key = credential.partition(" ")
        if scheme == "Bearer" and key and not set(key) & set(" ,"):
            headers.append(f"Sec-WebSocket-Protocol: harperpy, bearer.{key}")
            credential = ""
        return self._replace(headers=[*headers, *self.headers]).written(credential)


def requests(methods: list[str], places: list[str]) -> st.SearchStrategy[Asked]:
    """Requests that are right but for a few odd parts."""
    return st.builds(
        Asked,
        st.sampled_from(methods * 6 + ODD_METHODS),
        paths(places),
        st.sampled_from(VERSIONS),
        st.lists(st.sampled_from(HEADERS), max_size=2, unique=True),
        st.sampled_from(BODIES),
    )


CLOSE = b"\x88\x80\0\0\0\0"
"""The frame that ends a WebSocket."""


def answer(port: int, request: bytes) -> tuple[int, str]:
    """The status, and all of the answer."""
    received: list[bytes] = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        while data := connection.recv(65536):
            received.append(data)
            if len(received) == 1 and data.startswith(b"HTTP/1.1 101 "):
                connection.sendall(CLOSE)
    text = b"".join(received).decode("latin-1")
    return int(text.split(" ", 2)[1]), text


REFUSED = {400, 401, 403, 404, 405, 406, 426, 501}
SHUT = {
    "closed",
    "Deep",
    "user",
    "files",
    "feed",
    "line",
    "hall",
    "tool",
    "typed",
    "stream",
    *LOCKED,
}


def allowed(who: str) -> set[tuple[str, str]]:
    """What may run for them."""
    return READER if who in LENT else ANYONE


def check(asked: Asked, who: str, status: int, text: str, may: set[tuple[str, str]]) -> None:
    """Nothing ran that may not, and where nothing ran nothing was told."""
    assert may.issuperset(ran), ran
    if ran:
        return
    head, _, body = text.partition("\r\n\r\n")
    assert SECRET not in text
    if status == 204:
        assert (asked.method, body) == ("OPTIONS", "")
    elif status == 200:
        # The server's own, which tell each caller what they may know.
        path = unquote(asked.path.partition("?")[0])
        assert re.search("/(health|openapi)", path) or not path.strip("/"), head
        assert not any(f'"/{name}' in body for name in SHUT), body
    elif status == 429:
        # Who guesses passwords has to wait, and nobody else.
        assert who == "wrong password"
        assert "Retry-After:" in head
    else:
        assert status in REFUSED, text


def opened_by(house: House, asked: Asked) -> set[tuple[str, str]]:
    """What runs for a super user."""
    ran.clear()
    status, text = answer(house.ports[0], asked.written(f"Bearer {house.api_key}"))
    assert status < 500 or status == 501, text
    return set(ran)


MANY = settings(derandomize=True, database=None, deadline=None, max_examples=1000)


def test_no_spelling_of_a_request_opens_a_door(house: House) -> None:
    """Of the same requests many run a handler for a super user, and none for anybody else."""
    statuses: Counter[int] = Counter()
    opened: Counter[str] = Counter()

    @MANY
    @given(asked=requests(METHODS, PLACES), who=st.sampled_from([*house.keys]))
    def tried(asked: Asked, who: str) -> None:
        ran.clear()
        status, text = answer(house.ports[0], asked.written(house.keys[who]))
        statuses[status] += 1
        check(asked, who, status, text, allowed(who))
        opened.update(mount for mount, _ in opened_by(house, asked))

    tried()
    assert {400, 401, 403} <= set(statuses)
    assert opened.total() > 100
    assert {"closed", "lent", "user/:id/keys", "files/*rest", "typed", "stream"} <= set(opened)
    assert not {"tool", *LOCKED} & set(opened)


def test_no_spelling_opens_the_operations(house: House) -> None:
    """Nor does the other port run an operation, or know the mounts of this one."""
    statuses: Counter[int] = Counter()

    @settings(MANY, max_examples=300)
    @given(
        asked=requests(["POST", "POST", "GET"], ["/", "/", "/closed"]),
        who=st.sampled_from([who for who in house.keys if who != "key of the operation"]),
    )
    def tried(asked: Asked, who: str) -> None:
        ran.clear()
        status, text = answer(house.ports[1], asked.written(house.keys[who]))
        statuses[status] += 1
        check(asked, who, status, text, set())

    tried()
    assert {400, 401, 404} <= set(statuses)
    ran.clear()
    asked = Asked("POST", "/", "HTTP/1.1", [], '{"operation": "open_door"}')
    for who in (*LENT, "key with empty grants"):
        assert 403 == answer(house.ports[1], asked.written(house.keys[who]))[0]
    assert [] == ran
    assert 200 == answer(house.ports[1], asked.written(house.keys["key of the operation"]))[0]
    assert [("operations", "open_door")] == ran
    ran.clear()
    assert 200 == answer(house.ports[1], asked.written(f"Bearer {house.api_key}"))[0]
    assert [("operations", "open_door")] == ran


STRANGERS = [
    *("none", "wrong key", "expired token", "role without grants", "reader"),
    *("key with grants", "key with empty grants", "key of the operation"),
]


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_every_method_of_every_mount_is_shut(house: House, accept: str) -> None:
    """Each mount by its plain path: for super users its verbs run, for strangers none."""
    opened: set[tuple[str, str]] = set()
    for method, place in product(METHODS, [*PLACES, "/shelf", "/shelf/"]):
        body = '{"text": "a"}' if method not in ("GET", "HEAD") else ""
        asked = Asked(method, place, "HTTP/1.1", [f"Accept: {accept}"], body)
        opened |= opened_by(house, asked)
        for who in STRANGERS:
            ran.clear()
            status, text = answer(house.ports[0], asked.written(house.keys[who]))
            check(asked, who, status, text, allowed(who))

    reading = ("get", "search") if accept == "*/*" else ("connect",)
    reads = {mount for mount, verb in opened if verb in reading}
    only_gets = {"typed", "stream"} if accept != "*/*" else set()
    shut = {"tool", *LOCKED, *only_gets} | ({"feed", "hall"} if accept == "*/*" else set())
    assert set(MOUNTS) - shut - {"line"} == reads - {""}
    assert only_gets <= {mount for mount, verb in opened if verb == "get"}
    assert {"post", "put", "patch", "delete", "query"} <= {
        verb for mount, verb in opened if mount == "closed"
    }


def test_no_spelling_opens_a_websocket(house: House) -> None:
    """Of the same requests many open one for a super user, and none for anybody else."""
    statuses: Counter[int] = Counter()
    opened: Counter[str] = Counter()

    @settings(MANY, max_examples=500)
    @given(
        asked=requests(["GET"] * 8, PLACES).map(Asked.without_body),
        who=st.sampled_from([*house.keys]),
    )
    def tried(asked: Asked, who: str) -> None:
        ran.clear()
        status, text = answer(house.ports[0], asked.opening(house.keys[who]))
        statuses[status] += 1
        if status == 101:
            assert ran
        check(asked, who, status, text, allowed(who))
        ran.clear()
        status, text = answer(house.ports[0], asked.opening(f"Bearer {house.api_key}"))
        assert status < 500 or status == 501, text
        opened.update(mount for mount, verb in ran if verb == "connect")

    tried()
    assert {101, 400, 401, 403} <= set(statuses)
    assert opened.total() > 50
    assert {"closed", "lent", "line", "hall", "user/:id/keys", "files/*rest"} <= set(opened)
    assert not {"tool", "feed", *LOCKED} & set(opened)


def test_every_mount_is_shut_to_websockets(house: House) -> None:
    """Each mount by its plain path: it opens for super users, and for no stranger."""
    opened: set[str] = set()
    for place in (*PLACES, "/shelf"):
        asked = Asked("GET", place, "HTTP/1.1", [], "")
        ran.clear()
        _, text = answer(house.ports[0], asked.opening(f"Bearer {house.api_key}"))
        assert not ran or text.startswith("HTTP/1.1 101 ")
        assert not ran or SECRET in text
        opened |= {mount for mount, _ in ran}
        for who in STRANGERS:
            ran.clear()
            status, text = answer(house.ports[0], asked.opening(house.keys[who]))
            check(asked, who, status, text, allowed(who))

    assert set(MOUNTS) - {"tool", "feed", "typed", "stream", *LOCKED} == opened - {""}


HANDLERS = re.compile(
    r"entry\.handlers\[\w+\]|verbs\.(call|work)\b|course\.work\b|operation\.function\("
)
"""How verbs and operations are called."""
DOORS = ("await authorise(", "if entry.opens(", "or not self._admits(")
"""What lets somebody pass."""


def test_whatever_calls_a_handler_has_asked_authorise_before() -> None:
    """There are two such ways for the verbs, and one for the operations."""
    folder = Path(harperpy.__file__).parent
    found: dict[str, bool] = {}
    for file in [*folder.glob("*.py"), *folder.parent.glob("plugins/*.py")]:
        for one in ast.walk(ast.parse(file.read_text())):
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                code = ast.unparse(one)
                if called := HANDLERS.search(code):
                    asked = any(door in code[: called.start()] for door in DOORS)
                    found[f"{file.stem}.{one.name}"] = asked

    # They are called by the two before them alone, or kept for the last.
    alone = dict.fromkeys(("verbs.call", "verbs.work", "reach.course_of"), False)
    ways = ("dispatch.call", "dispatch._admit", "dispatch.serve", "operations.call")
    assert dict.fromkeys(ways, True) | alone == found
    # Who is known has been let in by the same line.
    admits = inspect.getsource(Dispatch._admits)
    asked = "not (user is course.known or entry.opens(course.permission, context))"
    refused = f"if user is None or {asked}:\n            return False\n"
    assert admits.endswith(f"        {refused}        course.known = user\n        return True\n")


RAW = {
    "bare line feeds": "GET /closed HTTP/1.1\nHost: test\nConnection: close\n\n",
    "no version": "GET /closed\r\n\r\n",
    "two blanks": "GET  /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
    "a blank line first": "\r\nGET /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
    "a folded header": "GET /closed HTTP/1.1\r\nHost: test\r\nX: a\r\n b\r\n\r\n",
    "a null": "GET /closed\0 HTTP/1.1\r\nHost: test\r\n\r\n",
    "two lengths": (
        "POST /closed HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nContent-Length: 2\r\n\r\n{}"
    ),
    "length and chunks": (
        "POST /closed HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n"
        "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n"
    ),
    "a request in a body": (
        "POST /board HTTP/1.1\r\nHost: test\r\nContent-Length: 54\r\n\r\n"
        "GET /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        "GET /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    ),
    "no host": "GET /closed HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": "GET /closed HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
    "two wrong keys": (
        "GET /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        "Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n"
    ),
}


@pytest.mark.parametrize("request_", RAW.values(), ids=RAW)
def test_odd_bytes_open_no_door(house: House, request_: str) -> None:
    """What is hardly HTTP is refused, and runs nothing."""
    ran.clear()
    status, text = answer(house.ports[0], request_.encode("latin-1"))

    assert [] == ran
    assert SECRET not in text
    assert status in REFUSED


def test_the_next_request_of_a_connection_has_to_say_who_asks(house: House) -> None:
    """A connection that a super user used opens nothing for whoever comes after."""
    ran.clear()
    first = f"GET /closed HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {house.api_key}\r\n\r\n"
    then = "GET /closed HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    _, text = answer(house.ports[0], (first + then).encode())

    assert [("closed", "get")] == ran
    assert ["200", "401"] == re.findall(r"HTTP/1.1 (\d+)", text)
