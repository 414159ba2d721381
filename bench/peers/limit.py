"""The physical limit: raw protocols with httptools' parsers on both sides, on uvloop.

No router, no authentication, no accounting: a chat is decoded, encoded again and written, and
embeddings are handed through as they are.

    UPSTREAM=http://127.0.0.1:29100 python limit.py --port 29301
"""

import argparse
import asyncio
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop
import wire

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BAD = b"HTTP/1.1 %d Error\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
EVENTS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
HEAD = (
    "POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    "Authorization: Bearer bench\r\nContent-Length: "
)


class Upstream(asyncio.Protocol):
    """A connection to the provider, with one request at a time."""

    __slots__ = ("_parts", "done", "parser", "pool", "sink", "transport")

    def __init__(self, pool: "Pool") -> None:
        self.pool, self.sink = pool, cast("Call | None", None)
        self._parts: list[bytes] = []
        self.done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def start(self, request: bytes, sink: "Call") -> None:
        self.sink, self._parts, self.done = sink, [], False
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self.done = True

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        sink = self.sink
        if sink is None:
            return
        if self.done:
            body = b"".join(self._parts)
            self.sink, self._parts = None, []
            self.pool.free.append(self)
            sink.ended(body)
        elif sink.streaming and self._parts:
            body = b"".join(self._parts) if len(self._parts) > 1 else self._parts[0]
            self._parts = []
            sink.came(body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.pool.free:
            self.pool.free.remove(self)
        if self.sink is not None:
            sink, self.sink = self.sink, None
            sink.failed()


class Pool:
    """The connections to the provider; the last one used is the next."""

    def __init__(self, loop: asyncio.AbstractEventLoop, url: str) -> None:
        parts = urlsplit(url)
        self.loop, self.host, self.port = loop, parts.hostname or "", parts.port or 80
        self.free: deque[Upstream] = deque()
        self.connecting: set[asyncio.Task[None]] = set()
        self.heads = {
            path: HEAD.format(path=path, host=self.host, port=self.port).encode()
            for path in (CHAT, EMBEDDINGS)
        }

    def send(self, path: str, body: bytes, sink: "Call") -> None:
        request = b"%b%d\r\n\r\n%b" % (self.heads[path], len(body), body)
        if self.free:
            sink.upstream = connection = self.free.pop()
            connection.start(request, sink)
        else:
            task = self.loop.create_task(self._connect(request, sink))
            self.connecting.add(task)
            task.add_done_callback(self.connecting.discard)

    async def _connect(self, request: bytes, sink: "Call") -> None:
        try:
            make = partial(Upstream, self)
            _, connection = await self.loop.create_connection(make, self.host, self.port)
        except OSError:
            sink.failed()
            return
        if sink.gone:
            self.free.append(connection)
            return
        sink.upstream = connection
        connection.start(request, sink)


class Call:
    """A call on its way; a whole answer comes at its end."""

    __slots__ = ("client", "convert", "gone", "upstream")
    streaming = False

    def __init__(self, client: "Client", convert: Callable[[bytes], bytes]) -> None:
        self.client, self.convert = client, convert
        self.upstream: Upstream | None = None
        self.gone = False

    def came(self, body: bytes) -> None:
        """A whole answer is wanted whole."""

    def ended(self, body: bytes) -> None:
        out = self.convert(body)
        self.client.reply(OK % len(out) + out)

    def failed(self) -> None:
        self.client.fail(502, b'{"error":{"message":"upstream unavailable","type":"api_error"}}')

    def cancel(self) -> None:
        self.gone = True
        if self.upstream is not None and self.upstream.sink is self:
            self.upstream.sink = None
            self.upstream.transport.abort()


class Stream(Call):
    """What each read brings is converted and written at once."""

    __slots__ = ()
    streaming = True

    def came(self, body: bytes) -> None:
        out = self.convert(body)
        if out:
            self.client.transport.write(wire.frame(out))

    def ended(self, body: bytes) -> None:
        if body:
            self.came(body)
        self.client.reply(END)


class Client(asyncio.Protocol):
    """A connection from a client."""

    __slots__ = ("_body", "_call", "_parser", "_pool", "_queue", "_url", "transport")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._url, self._body = b"", b""
        self._call: Call | None = None
        self._queue: deque[tuple[bytes, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def pause_writing(self) -> None:
        if self._call is not None and self._call.upstream is not None:
            self._call.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._call is not None and self._call.upstream is not None:
            self._call.upstream.transport.resume_reading()

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body = self._body + body if self._body else body

    def on_message_complete(self) -> None:
        url, body, self._body = self._url, self._body, b""
        if self._call is None:
            self._serve(url, body)
        else:
            self._queue.append((url, body))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def reply(self, data: bytes) -> None:
        self._call = None
        self.transport.write(data)
        if self._queue:
            self._serve(*self._queue.popleft())

    def fail(self, status: int, body: bytes) -> None:
        self._call = None
        self.transport.write(BAD % (status, len(body)) + body)

    def _serve(self, url: bytes, body: bytes) -> None:
        if url == b"/v1/models":
            out = wire.encode(wire.MODELS)
            self.transport.write(OK % len(out) + out)
        elif url == b"/v1/chat/completions":
            try:
                self._chat(body)
            except msgspec.ValidationError as error:
                told = {"error": {"message": str(error), "type": "invalid_request_error"}}
                self.fail(400, wire.encode(told))
        elif url == b"/v1/embeddings":
            asked = wire.encode(wire.decode_embedding_request(body))
            self._call = Call(self, bytes)
            self._pool.send(EMBEDDINGS, asked, self._call)
        else:
            self.fail(404, b'{"error":{"message":"not found"}}')

    def _chat(self, body: bytes) -> None:
        request = wire.decode_chat_request(body)
        name = f"chatcmpl-{os.urandom(12).hex()}"
        if request.stream:
            call = self._call = Stream(self, wire.Rewriter(name, request.model).feed)
            self.transport.write(EVENTS)
        else:
            call = self._call = Call(self, partial(wire.chat_again, name, request.model))
        self._pool.send(CHAT, wire.encode(request), call)


async def main() -> None:
    """Serve until the end."""
    options = argparse.ArgumentParser(description="The physical limit of a gateway in Python.")
    options.add_argument("--port", type=int, required=True)
    port = options.parse_args().port
    loop = asyncio.get_running_loop()
    pool = Pool(loop, os.environ["UPSTREAM"])
    server = await loop.create_server(partial(Client, pool), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
