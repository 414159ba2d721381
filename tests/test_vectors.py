"""Embeddings of a provider: sent on as they came, read when somebody asks, refused where odd."""

import base64
import struct
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import yaml

from harperpy import Context, Resource, Vector
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running
from helpers import ask, provider


def packed(*numbers: float) -> str:
    """Numbers as OpenAI packs them."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


class Embedded(Resource):
    """Answers with the vectors themselves."""

    @staticmethod
    async def post(target: Any, data: Any, context: Context) -> Any:
        """They are sequences of numbers."""
        given = await data
        encoding = given.get("encoding_format", "base64")
        vectors = await context.models.embed(given["input"], encoding_format=encoding)
        assert all(isinstance(vector, Vector) for vector in vectors)
        assert all(isinstance(vector.floats, array) for vector in vectors)  # type: ignore[attr-defined]
        return {"vectors": vectors, "first": [vector[0] for vector in vectors]}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream) -> AsyncIterator[RunningServer]:
    """A server in front of the scripted provider."""
    async with running(provider(upstream.url), resources={"embedded": Embedded}) as server:
        yield server


def sent(*embeddings: Any) -> Answer:
    """A provider's answer with these embeddings, which may be texts of JSON."""
    data = [
        {"index": at, "embedding": msgspec.Raw(one) if isinstance(one, bytes) else one}
        for at, one in enumerate(embeddings)
    ]
    return Answer(body=msgspec.json.encode({"data": data, "usage": {"prompt_tokens": 1}}))


async def embeddings(
    server: RunningServer, encoding: str | None = None, given: Any = "a"
) -> tuple[int, str]:
    """Status and text of the gateway's answer."""
    body = {"model": "default", "input": given, "encoding_format": encoding}
    answer = await ask(server, "POST", "/v1/embeddings", json=body)
    return answer.status, answer.text


AS_IT_CAME = b"[0.10, -2e-05 ,\n3]"


@pytest.mark.parametrize(
    ("encoding", "came", "goes"),
    [
        ("float", AS_IT_CAME, AS_IT_CAME.decode()),
        (None, AS_IT_CAME, AS_IT_CAME.decode()),
        ("float", packed(0.5, -2.0), "[0.5,-2.0]"),
        ("base64", packed(0.1, 2.0), f'"{packed(0.1, 2.0)}"'),
        ("base64", b"[0.1, 2]", f'"{packed(0.1, 2.0)}"'),
        ("float", b"[1e2, 1E-2]", "[1e2, 1E-2]"),
        ("float", b"[\n -1 ]", "[\n -1 ]"),
    ],
)
async def test_an_embedding_goes_out_as_it_came(
    gateway: RunningServer,
    upstream: ScriptedUpstream,
    encoding: str | None,
    came: Any,
    goes: str,
) -> None:
    """Where it was asked for so; else it is turned into what was. The provider is asked for it."""
    upstream.script(sent(came))

    status, text = await embeddings(gateway, encoding)

    assert 200 == status, text
    assert f'"embedding":{goes}}}' in text
    assert encoding == upstream.requests[0].body.get("encoding_format")


NAN, INFINITE = packed(float("nan")), packed(float("inf"))
ODD = [
    *(b"[ ]", b"[\n  ]"),
    *(b"[]", b'""', b"{}", b"null", b"7", b"[[1]]", b'["1"]', b"[null]", b"[true]", b"[1,false]"),
    *(b"[1e999]", b"[-1E400]", b"[1e40,1e-2]", b'"AAA"', b'"AAAAAAA="', b'"not base64!"'),
    *(f'"{one}"'.encode() for one in (NAN, INFINITE)),
    *(b"[NaN]", b"[1,nan]", b"[1,-Infinity]", b"[-inf]", b"[1", b"1]"),
    b'{"0":1}',
]


@pytest.mark.parametrize("came", ODD)
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_what_is_no_vector_is_no_answer(
    gateway: RunningServer, upstream: ScriptedUpstream, came: bytes, encoding: str
) -> None:
    """The provider has failed, whatever was asked for."""
    upstream.script(sent(came))

    status, text = await embeddings(gateway, encoding)
    row = (await gateway.rows())[-1]

    assert 502 == status, text
    assert (False, "backend_error") == (row["success"], row["error_code"])


PLACES = [
    b'{"data":[{"embedding" : [1],"index":0}]}',
    b'{"data": [{"embedding":\n [1], "index": 0}]}',
    b'{"model":"\\"embedding\\":[2]","data":[{"embedding":[1]}]}',
    b'{"\\"embedding":[2],"data":[{"embedding":[1]}]}',
    b'{"extra":{"embedding":[2]},"data":[{"embedding":[1]}],"more":[3]}',
    b'{"data":[{"embedding":[1]}],"extra":{"embedding":"none"}}',
]


@pytest.mark.parametrize("body", PLACES)
async def test_an_array_is_found_wherever_it_stands(
    gateway: RunningServer, upstream: ScriptedUpstream, body: bytes
) -> None:
    """And taken for nothing else that looks like it."""
    upstream.script(Answer(body=body))

    status, text = await embeddings(gateway, "float")

    assert 200 == status, text
    assert [[1]] == [one["embedding"] for one in msgspec.json.decode(text)["data"]]


@pytest.mark.parametrize("body", [b'{"data":[{"embedding":0}]}', b'{"data":[{"embedding":[1]}'])
async def test_a_number_in_the_place_of_an_array_is_none(
    gateway: RunningServer, upstream: ScriptedUpstream, body: bytes
) -> None:
    """Nor is an answer that breaks off behind it one."""
    upstream.script(Answer(body=body))
    assert 502 == (await embeddings(gateway, "float"))[0]


async def test_numbers_that_are_none_are_told_to_who_reads_them(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """As the provider's failure, also where they were asked for as they came."""
    upstream.script(sent(b"[1.2.3]"))
    async with gateway.session() as client:
        answer = await client.post("/embedded", json={"input": ["a"], "encoding_format": "float"})
        assert 502 == answer.status, await answer.text()


async def test_vectors_are_in_the_order_of_what_was_embedded(
    gateway: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Whatever order they come in."""
    data = [{"index": at, "embedding": [at]} for at in (1, 0)]
    upstream.script(Answer(body={"data": data}))

    _, text = await embeddings(gateway, given=["a", "b"])

    assert [[0], [1]] == [one["embedding"] for one in msgspec.json.decode(text)["data"]]


READERS: dict[str, Callable[[bytes], Any]] = {
    "application/json": msgspec.json.decode,
    "application/msgpack": msgspec.msgpack.decode,
    "application/yaml": yaml.safe_load,
}


@pytest.mark.parametrize("accept", READERS)
async def test_a_plugin_has_them_as_numbers(
    gateway: RunningServer, upstream: ScriptedUpstream, accept: str
) -> None:
    """They are asked for in base64, read as an array, and answered with as lists of any type."""
    upstream.script(sent(packed(0.5, 1.0), b"[0.25, 2]"))

    async with gateway.session() as client:
        given, headers = {"input": ["a", "b"]}, {"Accept": accept}
        answer = await client.post("/embedded", json=given, headers=headers)
        told = READERS[accept](await answer.read())

    assert (200, accept) == (answer.status, answer.content_type)
    assert "base64" == upstream.requests[0].body["encoding_format"]
    assert {"vectors": [[0.5, 1.0], [0.25, 2.0]], "first": [0.5, 0.25]} == told


def test_a_vector_is_a_sequence_of_its_numbers() -> None:
    """It is compared, counted, cut and shown as one."""
    vector = Vector.from_json(b"[0.5, 1, 2]")

    assert [0.5, 1.0, 2.0] == vector
    assert vector == Vector.from_base64(packed(0.5, 1, 2))
    assert vector != [0.5, 1.0]
    assert (3, 2.0, array("f", [1, 2])) == (len(vector), vector[-1], vector[1:])
    assert "Vector([0.5, 1.0, 2.0])" == repr(vector)
    assert packed(0.5, 1, 2) == vector.base64()
    assert b"[0.5, 1, 2]" == vector.json()
    assert b"[0.5]" == Vector(array("f", [0.5])).json()
