"""Bodies in an encoding, without a type, and answers to who accepts little: row by row."""

import gzip
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from harperpy import SSE, Body, RequestTarget, Resource
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask

JSON = "application/json"
EVENTS = "text/event-stream"
BOMB = b'"' + b"a" * 20_000_000 + b'"'
VALUES: dict[str, Any] = {
    "bytes": b"raw",
    "map": {"a": 1},
    "text": "hello",
    "long": "x" * 5000,
    "odd": {
        "moment": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "day": date(2026, 1, 2),
        "bytes": b"\x00\xff",
        "set": {1},
        "none": float("nan"),
        "large": 1 << 70,
        "id": UUID(int=1),
    },
}


class Raw(Resource):
    """Gives the value that is asked for, and takes anything."""

    public = True

    @staticmethod
    async def get(target: RequestTarget) -> Any:
        """One of the values."""
        return VALUES[target.get("value") or "map"]

    @staticmethod
    async def post(target: RequestTarget, body: Body) -> Any:
        """What came, and whether it was bytes."""
        value = await body
        return ["bytes", value.decode()] if isinstance(value, bytes) else value


class Feed(Resource):
    """Events that are worth compressing."""

    public = True

    @staticmethod
    async def get() -> AsyncIterator[SSE]:
        """A large one."""
        yield SSE(data="x" * 5000)


@pytest.fixture
async def zipping() -> AsyncIterator[RunningServer]:
    """A server that compresses what is larger than a KiB."""
    config = f"{ECHO}\nhttp: {{compressionThreshold: 1KiB}}"
    async with running(config, resources={"raw": Raw, "feed": Feed}) as server:
        yield server


ENCODED: dict[str, tuple[str, bytes, int]] = {
    "gzip": ("gzip", gzip.compress(b'"a"'), 200),
    "deflate": ("deflate", zlib.compress(b'"a"'), 200),
    "as it is": ("identity", b'"a"', 200),
    "too much, deflated": ("deflate", zlib.compress(BOMB), 413),
    "no gzip at all": ("gzip", b'"a"', 400),
    "cut off": ("gzip", gzip.compress(b'"a"')[:-1], 400),
    "two in one": ("gzip", gzip.compress(b'"') + gzip.compress(b'a"'), 200),
    "a thousand in one": ("gzip", gzip.compress(b'"a"') + gzip.compress(b"") * 999, 200),
    "more in one than are read": ("gzip", gzip.compress(b'"a"') + gzip.compress(b"") * 1000, 400),
    "deflate without its head": ("deflate", zlib.compress(b'"a"', wbits=-15), 200),
    "in capitals": ("GZip", gzip.compress(b'"a"'), 200),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b'"a"')), 415),
    "unknown": ("foo", b'"a"', 415),
    "brotli": ("br", b'\x0b\x01\x80"a"\x03', 415),
    "zstandard": ("zstd", b'(\xb5/\xfd \x03\x19\x00\x00"a"', 415),
}


@pytest.mark.parametrize(("encoding", "body", "status"), ENCODED.values(), ids=ENCODED)
async def test_a_body_is_inflated_as_its_encoding_says(
    zipping: RunningServer, encoding: str, body: bytes, status: int
) -> None:
    """Up to the limit of `http.maxBodySize`; what is not what it says is 400."""
    headers = {"Content-Encoding": encoding, "Content-Type": JSON}
    answer = await ask(zipping, "POST", "/raw", key="", data=body, headers=headers)
    assert status == answer.status
    assert status != 200 or answer.json == "a"


@pytest.mark.parametrize("encoding", ["foo", "br", "zstd", "gzip, gzip"])
async def test_an_encoding_that_is_not_taken_is_named(server: RunningServer, encoding: str) -> None:
    """With those that are, in the words of the mount: here the gateway's, which are OpenAI's."""
    headers = {"Content-Encoding": encoding, "Content-Type": JSON}
    answer = await ask(server, "POST", "/v1/embeddings", data=b"{}", headers=headers)
    told = f"Content-Encoding: '{encoding}' cannot be read here; accepted: gzip, deflate."
    assert (415, "gzip, deflate") == (answer.status, answer.headers["Accept-Encoding"])
    assert {"error"} == set(answer.json)
    assert (told, "unsupported_encoding") == (
        answer.json["error"]["message"],
        answer.json["error"]["code"],
    )


UNTYPED: dict[str, tuple[bytes, int, Any]] = {
    "a map": (b'{"a":1}', 200, {"a": 1}),
    "a list, after white space": (b" \n[1]", 200, [1]),
    "a string": (b'"x"', 200, "x"),
    "a number": (b"12", 200, ["bytes", "12"]),
    "a word": (b"true", 200, ["bytes", "true"]),
    "what begins like JSON": (b"{bad", 400, None),
}


@pytest.mark.parametrize(("body", "status", "value"), UNTYPED.values(), ids=UNTYPED)
async def test_a_body_without_a_type_is_json_if_it_begins_like_it(
    zipping: RunningServer, body: bytes, status: int, value: Any
) -> None:
    """As a map, a list or a string does; else it is bytes."""
    bare = {"skip_auto_headers": ["Content-Type"]}
    answer = await ask(zipping, "POST", "/raw", key="", data=body, **bare)
    assert status == answer.status
    assert status != 200 or answer.json == value


ACCEPTED: dict[str, tuple[str, str, int, str]] = {
    "text of text": ("text", "text/plain", 200, "hello"),
    "text of a map": ("map", "text/plain", 200, '{"a":1}'),
    "JSON of text": ("text", JSON, 200, '"hello"'),
    "bytes of bytes": ("bytes", "application/octet-stream", 200, "raw"),
    "bytes of a map": ("map", "application/octet-stream", 406, "application/x-ndjson"),
    "a picture of a map": ("map", "image/png", 406, "text/csv"),
    "odd values": (
        "odd",
        JSON,
        200,
        (
            '{"moment":"2026-01-02T03:04:05Z","day":"2026-01-02","bytes":"AP8=","set":[1],'
            '"none":null,"large":1180591620717411303424,'
            '"id":"00000000-0000-0000-0000-000000000001"}'
        ),
    ),
}


@pytest.mark.parametrize(("value", "accept", "status", "text"), ACCEPTED.values(), ids=ACCEPTED)
async def test_a_value_is_what_the_client_accepts_or_406(
    zipping: RunningServer, value: str, accept: str, status: int, text: str
) -> None:
    """Bytes are themselves; a 406 lists what there is."""
    headers = {"Accept": accept}
    answer = await ask(zipping, "GET", f"/raw?value={value}", key="", headers=headers)
    assert status == answer.status
    assert text == answer.text if status == 200 else text in answer.json["detail"]


@pytest.mark.parametrize(
    ("path", "accept"),
    [("/feed", EVENTS), ("/feed", "*/*"), ("/raw?value=long", EVENTS)],
    ids=["asked for", "not asked for", "a value as an event"],
)
async def test_events_are_never_compressed(zipping: RunningServer, path: str, accept: str) -> None:
    """However large they are: they would wait in the compressor."""
    headers = {"Accept": accept, "Accept-Encoding": "gzip"}
    async with (
        aiohttp.ClientSession(zipping.url, auto_decompress=False) as client,
        client.get(path, headers=headers) as answer,
    ):
        assert EVENTS == answer.headers["Content-Type"]
        assert "Content-Encoding" not in answer.headers
        assert (await answer.read()).startswith(b"data: xxx")
