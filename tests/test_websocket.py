"""`connect` over a WebSocket: who may open one, what goes over it, and how it ends."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import websockets
from aiohttp import ClientWebSocketResponse, WSMsgType, WSServerHandshakeError

from harperpy import (
    SSE,
    AccessViolation,
    ClientError,
    Context,
    EventStream,
    HarperError,
    InvalidBody,
    InvalidCredentials,
    Next,
    Prompt,
    RegistrationError,
    Reply,
    RequestTarget,
    Resource,
    Resources,
    Response,
    ResponseError,
    Scope,
    define_backend,
    get_context,
)
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask, basic, finished_calls, until

SECONDS = 30
Socket = ClientWebSocketResponse


class Stoppable:
    """A running server that a test may stop while a client is connected."""

    def __init__(self, *, hand_over: bool, **resources: type[Resource]) -> None:
        self._running = running(resources=resources)
        self._hand_over = hand_over
        self._stopping: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Any:
        self.server = await self._running.__aenter__()
        return self

    def stop(self) -> None:
        """Begin to stop."""
        stop = partial(self.server.server.stop, hand_over=self._hand_over)
        setattr(self.server.server, "stop", stop)  # noqa: B010  # what its context calls
        self._stopping = asyncio.create_task(self._running.__aexit__(None, None, None))

    async def __aexit__(self, *_: object) -> None:
        if self._stopping is None:
            self.stop()
        assert self._stopping is not None
        await self._stopping


def talk(connect: Any, **attributes: Any) -> type[Resource]:
    """A public resource with this `connect`."""
    body = {"connect": staticmethod(connect), "public": True, **attributes}
    return type("Talk", (Resource,), body)


async def echo(_: RequestTarget, incoming: Any) -> AsyncIterator[Any]:
    """Gives back what comes."""
    async for message in incoming:
        yield message


@asynccontextmanager
async def opened(
    server: RunningServer, path: str = "/it", key: str | None = None, **options: Any
) -> AsyncIterator[Socket]:
    """A WebSocket, as super user unless a key (or `""`) is given."""
    async with (
        asyncio.timeout(SECONDS),
        server.session(key) as client,
        client.ws_connect(path, **options) as talking,
    ):
        yield talking


async def refused(server: RunningServer, path: str = "/it", **options: Any) -> Any:
    """The refusal of an opening request."""
    with pytest.raises(WSServerHandshakeError) as refusal:
        async with opened(server, path, **options):
            pass
    return refusal.value


async def ended(talking: Socket) -> tuple[int | None, str]:
    """The code and the reason that the server closes with."""
    message = await talking.receive()
    assert message.type is WSMsgType.CLOSE, message
    return message.data, message.extra or ""


HANDSHAKE = {
    "Host": "test",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


def written(path: str = "/it", start: str = "GET {} HTTP/1.1", **headers: str | None) -> bytes:
    """An opening request, byte by byte; underscores stand for dashes."""
    told: dict[str, str | None] = {**HANDSHAKE}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in told.items() if value is not None]
    return "\r\n".join([start.format(path), *lines, "", ""]).encode()


async def raw(
    server: RunningServer, request: bytes
) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    """The head of the answer to these bytes, and the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.http_port)
    writer.write(request)
    return (await reader.readuntil(b"\r\n\r\n")).decode(), reader, writer


# --- messages


class Note(msgspec.Struct):
    """A message."""

    text: str


@pytest.mark.parametrize(
    ("item", "kind", "data"),
    [
        ("text", WSMsgType.TEXT, "text"),
        ("", WSMsgType.TEXT, ""),
        (b"\x00\xff", WSMsgType.BINARY, b"\x00\xff"),
        (bytearray(b"a"), WSMsgType.BINARY, b"a"),
        ({"a": 1}, WSMsgType.TEXT, '{"a":1}'),
        ([1, "ü"], WSMsgType.TEXT, '[1,"ü"]'),
        (Note("a"), WSMsgType.TEXT, '{"text":"a"}'),
        (None, WSMsgType.TEXT, "null"),
        (SSE(data={"a": 1}, id="7"), WSMsgType.TEXT, '{"data":{"a":1},"id":"7"}'),
    ],
)
async def test_what_is_given_is_sent_by_its_kind(item: Any, kind: WSMsgType, data: Any) -> None:
    """Text is text, bytes are binary, all else is JSON."""

    async def connect() -> AsyncIterator[Any]:
        yield item

    async with running(resources={"it": talk(connect)}) as server, opened(server) as talking:
        message = await talking.receive()
        code = await ended(talking)

    assert (kind, data) == (message.type, message.data)
    assert (1000, "") == code


async def test_what_comes_is_text_or_bytes() -> None:
    """Nothing is guessed: text that is JSON is text, too."""
    kinds: list[type] = []

    async def connect(_: Any, incoming: Any) -> AsyncIterator[Any]:
        async for message in incoming:
            kinds.append(type(message))
            yield message

    async with running(resources={"it": talk(connect)}) as server, opened(server) as talking:
        for text in ("hello", "7", ""):
            await talking.send_str(text)
            assert text == await talking.receive_str()
        await talking.send_bytes(b"\xff")
        assert b"\xff" == await talking.receive_bytes()

    assert [str, str, str, bytes] == kinds


async def test_another_client_can_talk_to_it() -> None:
    """The `websockets` package, compression and fragments offered, speaks with it."""
    async with running(resources={"it": talk(echo)}) as server:
        url = server.url.replace("http", "ws")
        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with (
            asyncio.timeout(SECONDS),
            websockets.connect(f"{url}/it", additional_headers=headers) as talking,
        ):
            await talking.send("one")
            assert "one" == await talking.recv()
            await talking.send(["t", "w", "o"])
            assert "two" == await talking.recv()
            await talking.send(b"three")
            assert b"three" == await talking.recv()
            await (await talking.ping())
            await talking.close()
        assert 1000 == talking.close_code
        assert [] == list(talking.protocol.extensions)


class Shapes:
    """`connect` in every shape."""

    @staticmethod
    async def nothing() -> AsyncIterator[str]:
        """Takes nothing."""
        yield "0"

    @staticmethod
    def iterator(target: RequestTarget) -> Any:
        """Sync, gives an iterator."""
        return iter([target.get("x")])

    @staticmethod
    async def later(target: RequestTarget, incoming: Any) -> Any:
        """Returns a generator, once it is awaited."""
        return (text for text in (target.get("x"), await anext(incoming)))

    @classmethod
    async def whole(cls, target: RequestTarget, incoming: Any, context: Context) -> Any:
        """A class method."""
        yield f"{cls.__name__} {await anext(incoming)} {context.method}"
        yield str(get_context() is context)

    @staticmethod
    def events() -> EventStream:
        """Events."""
        return EventStream([{"event": "a", "data": 1}])

    @staticmethod
    async def silent() -> None:
        """Has nothing to say."""


async def test_it_may_have_any_shape() -> None:
    """Static or class, sync or async or generator; what is awaited may wait for a message."""
    shapes = {name: value for name, value in vars(Shapes).items() if not name.startswith("_")}
    mounts = {
        name: type("It", (Resource,), {"connect": value, "public": True})
        for name, value in shapes.items()
    }
    found: dict[str, list[str]] = {}
    async with running(resources=mounts) as server:
        for name in shapes:
            async with opened(server, f"/{name}?x=y") as talking:
                await talking.send_str("sent")
                found[name] = [message.data async for message in talking]
                assert 1000 == talking.close_code

    assert found == {
        "nothing": ["0"],
        "iterator": ["y"],
        "later": ["y", "sent"],
        "whole": ["It sent GET", "True"],
        "events": ['{"event":"a","data":1}'],
        "silent": [],
    }


def taking(kind: Any) -> type[Resource]:
    """A resource that reads messages of a type, and says what it read."""

    async def connect(_: Any, incoming: Any) -> AsyncIterator[str]:
        async for message in incoming:
            yield repr(message)

    connect.__annotations__["incoming"] = kind
    return talk(connect)


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        (AsyncIterator[Note], '{"text": "a"}', "Note(text='a')"),
        (AsyncIterator[Note] | None, b'{"text": "a"}', "Note(text='a')"),
        (AsyncIterator[dict[str, Any]], '{"a": [1]}', "{'a': [1]}"),
        (AsyncIterator[int], "7", "7"),
        (AsyncIterator[str], "7", "'7'"),
        (AsyncIterator[bytes], b"8", "b'8'"),
        (AsyncIterator[str | bytes], b"9", "b'9'"),
        (AsyncIterator[Any], "6", "'6'"),
        (AsyncIterator[Note], '{"text": 1}', (1007, "text: Expected `str`, got `int`")),
        (AsyncIterator[Note], "{", (1007, "a message is not valid JSON: Input data was trun")),
        (AsyncIterator[Note], b"\xff", (1007, "a message is not valid JSON: ")),
        (AsyncIterator[list[Any]], "[" * 9999, (1007, "a message is nested too deeply")),
        (AsyncIterator[str], b"7", (1003, "a message is not what is read here: expected text")),
        (AsyncIterator[bytes], "7", (1003, "a message is not what is read here: expected bytes")),
    ],
)
async def test_a_type_says_what_messages_are(kind: Any, data: Any, told: Any) -> None:
    """They are decoded and checked as the handler reads them; what does not fit closes it."""
    async with running(resources={"it": taking(kind)}) as server, opened(server) as talking:
        await (talking.send_str(data) if isinstance(data, str) else talking.send_bytes(data))
        if isinstance(told, str):
            assert told == await talking.receive_str()
            return
        code, reason = await ended(talking)

    assert told[0] == code
    assert reason.startswith(told[1])


async def test_a_handler_may_bear_with_what_does_not_fit() -> None:
    """It can say so, and read the next message."""

    async def connect(_: Any, incoming: AsyncIterator[Note]) -> AsyncIterator[Any]:
        try:
            await anext(incoming)
        except InvalidBody as error:
            yield {"error": str(error), "where": error.errors}
        yield await anext(incoming)

    async with running(resources={"it": talk(connect)}) as server, opened(server) as talking:
        await talking.send_str("{}")
        await talking.send_str('{"text": "good"}')
        first, second = await talking.receive_json(), await talking.receive_json()

    assert "text: Object missing required field `text`" == first["error"]
    assert {"text": "good"} == second


def test_messages_have_a_type_that_json_can_be() -> None:
    """Another one is refused as the class is mounted."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set("it", taking(AsyncIterator[Callable]))

    assert "Talk.connect: " in str(refusal.value)
    assert "cannot be its messages: expected types that msgspec knows" in str(refusal.value)


# --- who may


ran: list[str] = []


class Guarded(Resource):
    """Notes that it runs."""

    @staticmethod
    def connect(target: RequestTarget, incoming: Any) -> Any:
        """Notes it."""
        ran.append("connect")
        return iter(["in"])


class Value(Resource):
    """Has a value and no messages."""

    public = True

    @staticmethod
    def get() -> str:
        """The value."""
        ran.append("get")
        return "value"


class Posted(Value):
    """Takes what is posted, and no more."""

    get = None  # type: ignore[assignment]


class Since(msgspec.Struct):
    """A query."""

    start: int


async def since(target: RequestTarget[Since]) -> AsyncIterator[int]:
    """Counts from somewhere."""
    ran.append("since")
    yield target.query.start


def failing(error: Exception) -> type[Resource]:
    """Refuses before it is open."""

    def connect() -> Any:
        raise error

    return talk(connect)


MOUNTS = {
    "it": Guarded,
    "value": Value,
    "plain": type("Plain", (Guarded,), {"protocols": {"rest", "sse"}}),
    "posted": type("Posted", (Resource,), {"post": staticmethod(lambda: 1), "public": True}),
    "since": talk(since),
    "gone": failing(ClientError("all gone", status=410)),
    "worded": failing(ResponseError(Response(429, {"Retry-After": "7"}))),
    "broken": failing(LookupError("secret")),
    "odd": talk(lambda: 7),
}


@pytest.mark.parametrize(
    ("path", "key", "changes", "status"),
    [
        ("/it", "", {}, 401),
        ("/it", "hk_no", {}, 401),
        ("/it", "reader", {}, 403),
        ("/nowhere", None, {}, 404),
        ("/plain", None, {}, 404),
        ("/value", None, {}, 400),
        ("/posted", None, {}, 405),
        ("/it", None, {"Sec_WebSocket_Version": "8"}, 426),
        ("/it", None, {"Sec_WebSocket_Version": None}, 426),
        ("/it", None, {"Sec_WebSocket_Key": None}, 400),
        ("/it", None, {"Sec_WebSocket_Key": "AAAA"}, 400),
        ("/it", None, {"Sec_WebSocket_Key": "a"}, 400),
        ("/it", None, {"Sec_WebSocket_Protocol": "mqtt, bearer.x"}, 400),
        ("/it", "", {"Sec_WebSocket_Key": "a"}, 401),
        ("/since?start=x", None, {}, 400),
        ("/gone", None, {}, 410),
        ("/worded", None, {}, 429),
        ("/broken", None, {}, 500),
        ("/odd", None, {}, 500),
    ],
)
async def test_a_refusal_is_a_plain_answer(path: str, key: Any, changes: Any, status: int) -> None:
    """Whatever speaks against it is told before it is open, as for any request, and nothing ran."""
    ran.clear()
    async with asyncio.timeout(SECONDS), running(resources=MOUNTS) as server:
        if key == "reader":
            key = await server.key_for("ada")
        bearer = server.api_key if key is None else key
        credential = f"Bearer {bearer}" if bearer else None
        head, reader, writer = await raw(server, written(path, Authorization=credential, **changes))
        length = int(head.lower().partition("content-length: ")[2].split()[0])
        body = (await reader.readexactly(length)).decode()
        writer.close()

    assert head.startswith(f"HTTP/1.1 {status} ")
    assert "x-request-id: req_" in head.lower()
    assert [] == ran
    assert "secret" not in body
    if status == 426:
        assert "upgrade: websocket\r\nsec-websocket-version: 13\r\n" in head.lower()
    if body:
        assert status == msgspec.json.decode(body)["status"]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (written(Upgrade="h2c"), "HTTP/1.1 406 "),
        (written(Connection="keep-alive"), "HTTP/1.1 406 "),
        (written(start="GET {} HTTP/1.0"), "HTTP/1.0 406 "),
        (written(start="GET {} HTTP/2.0"), "HTTP/2.0 406 "),
        (written(start="HEAD {} HTTP/1.1"), "HTTP/1.1 406 "),
        (written(start="POST {} HTTP/1.1", Content_Length="0"), "HTTP/1.1 405 "),
        (written(Content_Length="2") + b"{}", "HTTP/1.1 406 "),
        (written(Connection="keep-alive, upgrade", Upgrade="WebSocket"), "HTTP/1.1 101 "),
    ],
)
async def test_what_does_not_ask_for_a_websocket_gets_none(request_: bytes, answer: str) -> None:
    """It is the request that it would be without the header."""
    async with asyncio.timeout(SECONDS), running(resources={"it": talk(echo)}) as server:
        head, _, writer = await raw(server, request_)
        writer.close()

    assert head.startswith(answer)


@pytest.mark.parametrize(
    ("protocols", "path", "accept", "status"),
    [
        ({"ws"}, "/it", "*/*", 426),
        ({"ws"}, "/it", "text/event-stream", 426),
        ({"ws"}, "/it/1", "*/*", 404),
        ({"ws", "rest"}, "/it", "*/*", 426),
        ({"ws", "rest"}, "/it", "text/event-stream", 426),
        ({"ws", "sse"}, "/it", "text/event-stream", 200),
        ({"ws", "sse", "rest"}, "/it", "*/*", 406),
    ],
)
async def test_a_plain_get_is_told_what_it_takes(
    protocols: Any, path: str, accept: str, status: int
) -> None:
    """What is a WebSocket only says so to those who may know; a stream is one as ever."""
    it = talk(lambda: iter(["in"]), protocols=protocols)
    closed = type("Closed", (it,), {"public": ()})
    async with running(resources={"it": it, "closed": closed}) as server:
        headers = {"Accept": accept}
        answer = await ask(server, "GET", path, headers=headers)
        shut = await ask(server, "GET", path.replace("it", "closed"), key="", headers=headers)
        posted = await ask(server, "POST", path)
        async with opened(server) as talking:
            assert "in" == await talking.receive_str()

    assert status == answer.status
    assert (404 if status == 404 else 401) == shut.status
    assert posted.status in (404, 405)
    if status == 426:
        assert ("websocket", "upgrade_required") == (
            answer.headers["Upgrade"],
            answer.json["code"],
        )


OWN = "own"


@pytest.mark.parametrize(
    ("http", "origin", "more", "status"),
    [
        ("", None, {}, 101),
        ("", "http://other.test", {}, 101),  # dev: any origin
        ("cors: false", None, {}, 101),
        ("cors: false", "http://other.test", {}, 403),
        ("cors: false", OWN, {}, 101),
        ("cors: false", "https://TEST:80", {"Host": "test:80"}, 101),
        ("cors: false", "http://test:81", {"Host": "test:80"}, 403),
        ("cors: false", "http://test.evil", {"Host": "test"}, 403),
        ("cors: false", "null", {}, 403),
        ("cors: false", "", {"Host": ""}, 403),
        ("cors: true, corsAccessList: ['http://good.test']", "http://good.test", {}, 101),
        ("cors: true, corsAccessList: ['http://good.test']", "http://bad.test", {}, 403),
        ("", "http://other.test", {"Authorization": "basic"}, 403),
        ("", OWN, {"Authorization": "basic"}, 101),
    ],
)
async def test_the_origin_of_a_page_decides(
    http: str, origin: str | None, more: dict[str, str], status: int
) -> None:
    """A page's WebSocket asks nobody before it is sent: the server itself refuses strangers."""
    config = f"{ECHO}\nhttp: {{{http}}}"
    async with asyncio.timeout(SECONDS), running(config, resources={"it": talk(echo)}) as server:
        if more.get("Authorization"):
            await server.operate("add_user", username="ada", password="pw", role="super_user")
            more = {"Authorization": basic("ada", "pw")}
        told = {"Origin": "http://test" if origin == OWN else origin, **more}
        head, _, writer = await raw(server, written(**told))
        writer.close()

    assert head.startswith(f"HTTP/1.1 {status} ")


async def test_a_page_sends_its_key_as_a_subprotocol(caplog: pytest.LogCaptureFixture) -> None:
    """Beside `harperpy`, which alone is named in the answer; no key is ever logged."""
    caplog.set_level(logging.DEBUG)

    async def connect(_: Any, __: Any, context: Context) -> AsyncIterator[str]:
        yield context.user.username if context.user else ""

    it = type("It", (Resource,), {"connect": staticmethod(connect)})
    async with running(resources={"it": it}) as server:
        key = server.api_key
        async with opened(server, key="", protocols=("harperpy", f"bearer.{key}")) as talking:
            assert "HDB_ADMIN" == await talking.receive_str()
            assert "harperpy" == talking.protocol
            assert key not in str(talking._response.headers)
        assert 401 == (await refused(server, key="", protocols=("harperpy", "bearer.no"))).status
        assert 401 == (await refused(server, key="", protocols=("harperpy",))).status
        both = await refused(server, key="no", protocols=("harperpy", f"bearer.{key}"))
        assert 401 == both.status
        alone = await refused(server, key="", protocols=(f"bearer.{key}",))
        assert 400 == alone.status
        header = {"Sec-WebSocket-Protocol": f"harperpy, bearer.{key}"}
        assert 401 == (await ask(server, "GET", "/it", key="", headers=header)).status

    assert key not in caplog.text


async def test_middlewares_stand_around_it() -> None:
    """One may refuse it, and another change the head that opens it."""

    async def gate(context: Context, call_next: Next) -> Reply | Response:
        if "closed" in context.url:
            return Response(418)
        reply = await call_next(context)
        if "late" in context.url:
            return Response(419)
        reply.headers["X-Status"] = str(reply.status)
        return reply

    def apply(scope: Scope) -> None:
        scope.server.http(gate)

    it = talk(echo, present_headers=staticmethod(lambda _: {"X-Own": "own"}))
    async with running(ECHO, resources={"it": it}, handle_application=apply) as server:
        assert 418 == (await refused(server, "/it?closed")).status
        assert 419 == (await refused(server, "/it?late")).status
        async with opened(server, headers={"X-Request-Id": "mine"}) as talking:
            headers = talking._response.headers
            await talking.send_str("a")
            assert "a" == await talking.receive_str()

    assert ["101", "own", "mine"] == [
        headers[name] for name in ("X-Status", "X-Own", "X-Request-Id")
    ]


# --- the end


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (None, 1000, ""),
        (InvalidCredentials("no more"), 3000, "no more"),
        (AccessViolation(None), 3000, "No credential was sent: must log in."),
        (AccessViolation("ada"), 3003, "This user may not do that here."),
        (ClientError("too odd"), 1011, "too odd"),
        (ClientError("ü" * 100), 1011, "ü" * 61),
        (InvalidBody("not this"), 1007, "not this"),
        (HarperError("inner secret"), 1011, HarperError.title),
        (LookupError("inner secret"), 1011, HarperError.title),
        (asyncio.CancelledError("what it waited for"), 1011, HarperError.title),
        (ResponseError(Response(404)), 1011, "answered 404"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_an_error_is_a_code_and_a_reason(
    error: BaseException | None, code: int, reason: str, *, begun: bool
) -> None:
    """What may be told of it, in as many bytes as the protocol allows."""

    async def connect() -> AsyncIterator[str]:
        if begun:
            yield "begun"
        if error:
            raise error

    async with running(resources={"it": talk(connect)}) as server, opened(server) as talking:
        if begun:
            assert "begun" == await talking.receive_str()
        assert (code, reason) == await ended(talking)


async def test_what_cannot_be_sent_closes_it() -> None:
    """As any failure does; nothing of it is told."""

    async def connect() -> AsyncIterator[Any]:
        yield object()

    async with running(resources={"it": talk(connect)}) as server, opened(server) as talking:
        assert (1011, HarperError.title) == await ended(talking)


class Watched:
    """A handler, and what has become of it."""

    def __init__(self) -> None:
        self.context: Context | None = None
        self.told: list[Any] = []
        self.done = asyncio.Event()

    async def listens(self, _: Any, incoming: Any, context: Context) -> AsyncIterator[str]:
        """Reads to the end, and has something to do then."""
        self.context = context
        yield "open"
        try:
            async for message in incoming:
                self.told.append(message)
            await asyncio.sleep(0)
            self.told.append("after")
        finally:
            self.told.append(context.signal.reason)
            self.done.set()

    async def pushes(self, _: Any, incoming: Any, context: Context) -> AsyncIterator[str]:
        """Waits for what never happens."""
        self.context = context
        yield "open"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.told.append("cancelled")
            raise
        finally:
            self.told.append(context.signal.reason)
            self.done.set()


def leave_in_form(talking: Socket) -> Any:
    """Close."""
    return talking.close()


async def leave_abruptly(talking: Socket) -> None:
    """Cut the connection."""
    connection = talking._response.connection
    assert connection is not None
    assert connection.transport is not None
    connection.transport.abort()


LEAVING = pytest.mark.parametrize("leave", [leave_in_form, leave_abruptly])


@LEAVING
async def test_who_listens_is_told_the_end(leave: Any) -> None:
    """What was sent before is read, the signal has fired, and what is left to do is done."""
    watched = Watched()
    async with (
        running(resources={"it": talk(watched.listens)}) as server,
        opened(server) as talking,
    ):
        assert "open" == await talking.receive_str()
        await talking.send_str("a")
        await until(lambda: bool(watched.told))
        await leave(talking)
        await watched.done.wait()

    assert ["a", "after", "client_disconnected"] == watched.told


@LEAVING
async def test_who_does_not_listen_is_cancelled(leave: Any) -> None:
    """At once, and closed once."""
    watched = Watched()
    async with (
        running(resources={"it": talk(watched.pushes)}) as server,
        opened(server) as talking,
    ):
        assert "open" == await talking.receive_str()
        await leave(talking)
        await watched.done.wait()

    assert ["cancelled", "client_disconnected"] == watched.told


class Counted:
    """An iterator without end, and how often it was asked for and closed."""

    def __init__(self, item: Any = b"x" * 65536) -> None:
        self.item = item
        self.made = self.closed = 0

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        self.made += 1
        await asyncio.sleep(0)
        return self.item

    async def aclose(self) -> None:
        """Called once."""
        self.closed += 1


@pytest.mark.parametrize("how", ["client", "lost", "unsendable", "stop", "refused"])
async def test_the_messages_are_closed_once(how: str) -> None:
    """Whichever way it ends."""
    counted = Counted(object() if how == "unsendable" else "a")
    # Long enough for a client that has all these messages to read to answer a ping.
    it = type("It", (Resource,), {"connect": staticmethod(lambda: counted), "keepalive": 0.5})
    async with asyncio.timeout(SECONDS), Stoppable(hand_over=True, it=it) as running_:
        server = running_.server
        key = await server.key_for("ada", "super_user")
        async with opened(server, key=key) as connection:
            if how != "unsendable":
                assert "a" == await connection.receive_str()
            if how == "client":
                await leave_in_form(connection)
            elif how == "lost":
                await leave_abruptly(connection)
            elif how == "refused":
                await server.operate("alter_user", username="ada", active=False)
            elif how == "stop":
                running_.stop()
            async for _ in connection:
                pass
            await until(lambda: bool(counted.closed))
            codes = {"unsendable": 1011, "refused": 3000, "stop": 1001}
            assert how not in codes or codes[how] == connection.close_code

    assert 1 == counted.closed


# --- how much


async def still(count: Callable[[], int], server: RunningServer) -> int:
    """What a count comes to once it rises no more."""
    before = -1
    while before != count():
        before = count()
        for _ in range(5):
            assert 200 == (await ask(server, "GET", "/v1/models")).status
    return before


async def test_a_slow_reader_pauses_the_producer() -> None:
    """What is not read is not made, but for what the buffers hold; reading goes on with it."""
    counted = Counted()
    loop = asyncio.get_running_loop()
    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": talk(lambda: counted)}) as server,
    ):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.server.http_port))
            connection.setblocking(False)  # noqa: FBT003
            await loop.sock_sendall(connection, written())
            made = await still(lambda: counted.made, server)
            left = made * len(counted.item)
            while left > 0:
                left -= len(await loop.sock_recv(connection, 65536))
            more = await still(lambda: counted.made, server)
        await until(lambda: bool(counted.closed))

    # The system's own buffers hold some megabytes of it.
    assert 0 < made < 200
    assert made < more < 2 * made + 200


def frame(data: bytes, opcode: int = 2) -> bytes:
    """A client's frame, masked with nothing."""
    assert len(data) < 65536
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + size + bytes(4) + data


async def flooding(
    writer: asyncio.StreamWriter, server: RunningServer
) -> tuple[asyncio.Task[None], Callable[[], int]]:
    """A client that sends on and on, once it has to wait, and how many messages it has sent."""
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            writer.write(frame(b"x" * 32768))
            sent += 1
            await writer.drain()

    task = asyncio.create_task(flood())
    await still(lambda: sent, server)
    return task, lambda: sent


async def test_a_flood_pauses_the_client() -> None:
    """What the handler does not take is not read, but for what the buffers hold."""
    take, taken = asyncio.Event(), 0

    async def connect(_: Any, incoming: Any) -> AsyncIterator[str]:
        nonlocal taken
        async for _message in incoming:
            taken += 1
            await take.wait()
        yield ""

    async with asyncio.timeout(SECONDS), running(resources={"it": talk(connect)}) as server:
        head, _, writer = await raw(server, written())
        client, sent = await flooding(writer, server)
        before = sent()
        assert (1, True) == (taken, before < 1000)
        take.set()
        await until(lambda: sent() > before + 100)
        client.cancel()
        writer.close()

    assert " 101 " in head


async def test_a_flood_of_pongs_stops_nobody() -> None:
    """Others have a turn after each of them, however many one read of the connection brings."""
    pongs, turns = 5000, 0

    async with asyncio.timeout(SECONDS), running(resources={"it": talk(echo)}) as server:
        _, reader, writer = await raw(server, written())
        writer.write(b"\x8a\x80\0\0\0\0" * pongs + frame(b"x"))
        answer = asyncio.create_task(reader.readexactly(3))
        while not answer.done():
            turns += 1
            await asyncio.sleep(0)
        writer.close()

    assert b"\x82\x01x" == answer.result()
    assert turns > pongs


@pytest.mark.parametrize(("size", "code"), [(1000, None), (1001, 1009)])
async def test_a_message_has_a_size(size: int, code: int | None) -> None:
    """`http.maxBodySize` bounds what comes, and not what goes."""
    config = f"{ECHO}\nhttp: {{maxBodySize: 1000}}"
    async with (
        running(config, resources={"it": talk(echo)}) as server,
        opened(server) as talking,
    ):
        await talking.send_bytes(b"x" * size)
        if code:
            assert code == (await ended(talking))[0]
        else:
            assert size == len(await talking.receive_bytes())


# --- the server's side of it


@pytest.mark.parametrize("hand_over", [False, True])
async def test_a_stop_ends_it_in_good_form(*, hand_over: bool) -> None:
    """Who listens is told that nothing more comes, finishes, and the client that it goes away."""
    watched = Watched()
    it = talk(watched.listens)
    async with (
        asyncio.timeout(SECONDS),
        Stoppable(hand_over=hand_over, it=it) as running_,
        opened(running_.server) as connection,
    ):
        assert "open" == await connection.receive_str()
        running_.stop()
        assert (1001, "server_shutdown") == await ended(connection)

    assert ["after", None] == watched.told
    assert watched.context is not None
    assert watched.context.stopping.aborted


async def one_by_one(_: RequestTarget, incoming: Any) -> AsyncIterator[Any]:
    """Asks for each message by itself, in a generator."""
    yield "open"
    yield await anext(incoming)


async def then_all(_: RequestTarget, incoming: Any) -> AsyncIterator[Any]:
    """Asks for one before it gives anything."""
    await anext(incoming)
    return one_by_one(_, incoming)


@pytest.mark.parametrize("connect", [one_by_one, then_all])
async def test_who_waits_for_one_message_may_be_left_too(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """`await anext(incoming)` that has no next one ends the handler, and is no failure of it."""
    async with (
        asyncio.timeout(SECONDS),
        Stoppable(hand_over=False, it=talk(connect)) as running_,
        opened(running_.server) as connection,
        opened(running_.server) as leaving,
    ):
        for one in (connection, leaving):
            if connect is then_all:
                await one.send_str("first")
            assert "open" == await one.receive_str()
        await leaving.close()
        running_.stop()
        assert (1001, "server_shutdown") == await ended(connection)

    assert [] == [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_who_does_not_hear_of_the_stop_is_cut_off() -> None:
    """When another process takes over, after a moment; its client is told the same."""
    watched = Watched()
    it = talk(watched.pushes)
    async with (
        asyncio.timeout(SECONDS),
        Stoppable(hand_over=True, it=it) as running_,
        opened(running_.server) as connection,
    ):
        assert "open" == await connection.receive_str()
        running_.stop()
        assert (1001, "server_shutdown") == await ended(connection)

    assert ["cancelled", "server_shutdown"] == watched.told


class Held(Resource):
    """Waits, and looks often whether it may."""

    keepalive = 0.25

    @staticmethod
    async def connect(_: Any, incoming: Any, context: Context) -> AsyncIterator[Any]:
        """Says when the signal fires."""
        yield "open"
        async for message in incoming:
            yield message


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        ({"operation": "alter_user", "username": "ada", "active": False}, 3000),
        ({"operation": "drop_user", "username": "ada"}, 3000),
        ({"operation": "alter_user", "username": "ada", "role": "other"}, 3003),
    ],
)
async def test_who_may_not_go_on_is_told(operation: dict[str, Any], code: int) -> None:
    """A user who is gone, or a role that opens it no more, ends what was open."""
    async with running(resources={"it": Held}) as server:
        lent = {"resources": {"it": ["read"]}}
        await server.operate("add_role", role="lent", permission=lent)
        await server.operate("add_role", role="other", permission={})
        key = await server.key_for("ada", "lent")
        async with opened(server, key=key) as talking, opened(server) as another:
            for one in (talking, another):
                assert "open" == await one.receive_str()
            # They answer pings while they wait, and only then.
            told = asyncio.create_task(ended(talking))
            heard = asyncio.create_task(another.receive_str())
            await server.operate(**operation)
            assert code == (await told)[0]
            await another.send_str("still here")
            assert "still here" == await heard


async def test_a_silent_client_is_dead() -> None:
    """Who does not answer a ping is gone; who does may be silent for as long as they like."""
    watched, alive = Watched(), Watched()
    mounts = {
        "it": talk(watched.listens, keepalive=0.05),
        "alive": talk(alive.listens, keepalive=0.05),
    }
    async with (
        asyncio.timeout(SECONDS),
        running(resources=mounts) as server,
        opened(server, "/alive") as talking,
    ):
        assert "open" == await talking.receive_str()
        quiet = asyncio.create_task(talking.receive())
        _, reader, writer = await raw(server, written())
        await watched.done.wait()
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        assert not alive.told
        quiet.cancel()

    assert ["after", "client_disconnected"] == watched.told


async def test_who_leaves_after_a_flood_is_noticed() -> None:
    """A client that is not read any more and goes away is noticed, whatever the handler does."""
    watched = Watched()
    resources = {"it": talk(watched.pushes, keepalive=0.05)}
    async with asyncio.timeout(SECONDS), running(resources=resources) as server:
        _, _, writer = await raw(server, written())
        client, _ = await flooding(writer, server)
        client.cancel()
        writer.transport.abort()
        await watched.done.wait()

    assert ["cancelled", "client_disconnected"] == watched.told


async def test_model_calls_are_recorded_and_end_with_the_client() -> None:
    """One answer goes out whole, the next is aborted as its reader leaves; both have a row."""

    async def generate(prompt: Prompt) -> AsyncIterator[str]:
        yield "one "
        yield "two"
        if "wait" in str(prompt):
            await asyncio.Event().wait()

    async def connect(_: Any, incoming: Any, context: Context) -> AsyncIterator[Any]:
        async for prompt in incoming:
            async for chunk in context.models.generate_stream(prompt, model="slow"):
                yield chunk.delta_content or ""

    def apply(scope: Scope) -> None:
        scope.resources.set("it", talk(connect))
        backend = define_backend("slow", generate_stream=generate)
        scope.models.register_backend("generative", "slow", backend)

    async with running(handle_application=apply) as server:
        calls = finished_calls(server)
        async with opened(server) as connection:
            await connection.send_str("hello")
            assert (await calls.get()).success
            await connection.send_str("wait")
            while "two" not in await connection.receive_str():
                pass
            while "two" not in await connection.receive_str():
                pass
        call = await calls.get()
        rows = await server.rows()

    assert (False, "aborted") == (call.success, call.error_code)
    assert {None, "aborted"} == {row["error_code"] for row in rows}
    assert {("HDB_ADMIN", "it", "slow")} == {
        (row["user"], row["app"], row["backend_name"]) for row in rows
    }
