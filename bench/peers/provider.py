"""A provider that speaks OpenAI's protocol, answers from memory, and is as cheap as Python allows.

What it does is in the model's name, which travels through any gateway:

    mock[-t<events>][-r<events a second>][-d<dimensions>][-s]

`mock-t200-r50` streams 200 events, 50 a second; without `-r` as fast as they are read. `-s` puts
the machine's monotonic clock into each event: a client here can tell how long it was on its way.
"""

import argparse
import asyncio
import json
import re
import struct
import time
from functools import lru_cache, partial
from typing import Any, cast

import uvloop

MODEL = re.compile(rb'"model"\s*:\s*"([^"]+)"')
STREAM = re.compile(rb'"stream"\s*:\s*true')
USAGE = re.compile(rb'"include_usage"\s*:\s*true')
FLAGS = re.compile(r"-([trd])(\d+)")
# Nineteen digits of nanoseconds.
STAMP = b"9" * 19
# So many events go out before other streams have their turn.
SLICE = 16
COMMON = {"id": "chatcmpl-mock0000000000000000000000", "created": 1700000000, "model": "mock-model"}


def whole(answer: Any, status: bytes = b"200 OK") -> bytes:
    """The bytes of an answer."""
    body = json.dumps(answer, separators=(",", ":")).encode()
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def event(delta: dict[str, str] | None, finish: str | None = None, **more: Any) -> bytes:
    """The bytes of an event, framed as one chunk."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    choices = [] if delta is None else [choice]
    fixed = {"object": "chat.completion.chunk", "service_tier": "default", **COMMON}
    said = {**fixed, "system_fingerprint": "fp_mock", "choices": choices, **more}
    return chunk(b"data: %b\n\n" % json.dumps(said, separators=(",", ":")).encode())


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP's."""
    return b"%x\r\n%b\r\n" % (len(data), data)


BEGIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
) + event({"role": "assistant", "content": ""})
TOKEN = event({"content": " token"})
BEFORE_STAMP, AFTER_STAMP = event({"content": STAMP.decode()}).split(STAMP)
STOP = event({}, "stop")
DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MODELS = whole({"object": "list", "data": [{**COMMON, "object": "model", "owned_by": "mock"}]})
UNKNOWN = whole({"error": {"message": "no such route", "code": "not_found"}}, b"404 Not Found")


class Spec:
    """What a model's name says."""

    def __init__(self, name: str) -> None:
        flags = {letter: int(number) for letter, number in FLAGS.findall(name)}
        self.events, self.rate = flags.get("t", 64), flags.get("r", 0)
        self.dimensions, self.stamped = flags.get("d", 1536), name.endswith("-s")
        usage = {"prompt_tokens": 12, "completion_tokens": self.events}
        usage["total_tokens"] = 12 + self.events
        self.usage = event(None, usage=usage)
        said = {"role": "assistant", "content": " token" * self.events, "refusal": None}
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
        answer = {"object": "chat.completion", "system_fingerprint": "fp_mock", "usage": usage}
        self.chat = whole({**COMMON, **answer, "choices": [choice]})
        self.embeddings = lru_cache(self._embeddings)

    def _embeddings(self, count: int) -> bytes:
        size = self.dimensions
        data: list[dict[str, Any]] = []
        for index in range(count):
            numbers = [((index * 7919 + at * 104729) % 20011) / 20011.0 - 0.5 for at in range(size)]
            single = struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *numbers))
            data.append({"object": "embedding", "index": index, "embedding": single})
        usage = {"prompt_tokens": 8 * count, "total_tokens": 8 * count}
        return whole({"object": "list", "data": data, "model": "mock-model", "usage": usage})


@lru_cache(1000)
def spec_of(name: bytes) -> Spec:
    """What a model's name says, read once."""
    return Spec(name.decode())


class Stream:
    """A streamed answer, paced or as fast as the client reads."""

    __slots__ = ("_connection", "_left", "_next", "_spec", "_timer", "_usage", "_write")

    def __init__(self, connection: "Connection", spec: Spec, *, usage: bool) -> None:
        self._connection, self._spec, self._left = connection, spec, spec.events
        self._usage = spec.usage if usage else b""
        self._write = connection.transport.write
        self._timer: asyncio.Handle | None = None
        self._next = connection.loop.time()

    def start(self) -> None:
        """Begin to write."""
        self._write(BEGIN)
        if self._spec.rate:
            self._tick()
        else:
            self.pump()

    def _token(self) -> bytes:
        if self._spec.stamped:
            return BEFORE_STAMP + b"%019d" % time.monotonic_ns() + AFTER_STAMP
        return TOKEN

    def _finish(self) -> None:
        self._connection.stream = None
        self._write(STOP + self._usage + DONE)

    def _tick(self) -> None:
        if not self._left:
            self._finish()
            return
        self._write(self._token())
        self._left -= 1
        self._next += 1 / self._spec.rate
        loop = self._connection.loop
        self._timer = loop.call_later(max(0.0, self._next - loop.time()), self._tick)

    def pump(self) -> None:
        """Write until the client does not read, or others are to have their turn."""
        if self._spec.rate:
            return
        connection = self._connection
        for _ in range(SLICE):
            if connection.paused:
                self._timer = None
                return
            if not self._left:
                self._finish()
                return
            self._write(self._token())
            self._left -= 1
        self._timer = connection.loop.call_soon(self.pump)

    def stop(self) -> None:
        """The client is gone."""
        if self._timer is not None:
            self._timer.cancel()


class Connection(asyncio.Protocol):
    """A client's connection."""

    __slots__ = ("_buffer", "loop", "paused", "stream", "transport")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.paused = loop, False
        self._buffer = b""
        self.stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stream is not None:
            self.stream.stop()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.stream is not None:
            self.stream.pump()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = buffer[:end].lower()
            begin = end + 4
            if b"transfer-encoding: chunked" in head:
                stop = buffer.find(b"\r\n0\r\n\r\n", end)
                if stop < 0:
                    break
                body, rest = buffer[begin:stop], buffer[stop + 7 :]
            else:
                at = head.find(b"content-length:")
                size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
                if len(buffer) < begin + size:
                    break
                body, rest = buffer[begin : begin + size], buffer[begin + size :]
            self._serve(head.split(b" ", 2)[1], body)
            buffer = rest
        self._buffer = buffer

    def _serve(self, path: bytes, body: bytes) -> None:
        found = MODEL.search(body)
        spec = spec_of(found[1] if found else b"mock")
        if path == b"/v1/chat/completions":
            if STREAM.search(body):
                self.stream = Stream(self, spec, usage=bool(USAGE.search(body)))
                self.stream.start()
            else:
                self.transport.write(spec.chat)
        elif path == b"/v1/embeddings":
            asked = json.loads(body)["input"]
            self.transport.write(spec.embeddings(len(asked) if isinstance(asked, list) else 1))
        else:
            self.transport.write(MODELS if path == b"/v1/models" else UNKNOWN)


async def main(port: int) -> None:
    """Serve until the end."""
    loop = asyncio.get_running_loop()
    make = partial(Connection, loop)
    server = await loop.create_server(make, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="An OpenAI-compatible provider for measurements.")
    options.add_argument("--port", type=int, required=True)
    uvloop.run(main(options.parse_args().port))
