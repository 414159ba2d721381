"""Pydantic AI, as it is, with its OpenAI chat model pointed at a gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
from pydantic_ai import (
    Agent,
    Embedder,
    ModelAPIError,
    ModelHTTPError,
    NativeOutput,
    ToolOutput,
)
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from clients import EMBEDDING, FAILURES, MODEL, SLOW, Live, until_it_raises
from provider import vector


class Sum(pydantic.BaseModel):
    """An addition."""

    a: int
    b: int


@pytest.fixture
async def provider(live: Live) -> AsyncIterator[OpenAIProvider]:
    """The gateway as a provider that asks once."""
    async with provider_of(live) as client:
        yield OpenAIProvider(openai_client=client)


def provider_of(live: Live, key: str | None = None) -> openai.AsyncOpenAI:
    """The client below, which the library does not close by itself."""
    key = key or live.api_key
    return openai.AsyncOpenAI(base_url=live.base_url, api_key=key, max_retries=0)


def agent(provider: OpenAIProvider, model: str = MODEL, **options: Any) -> Agent[Any, Any]:
    """An agent on a model of the gateway."""
    return Agent(OpenAIChatModel(model, provider=provider), **options)


async def test_it_takes_an_address_and_a_key(live: Live) -> None:
    """Made as its users make it, by base URL and key, it chats and tells the usage."""
    provider = OpenAIProvider(base_url=live.base_url, api_key=live.api_key)
    async with provider:
        answer = await agent(provider, instructions="Be brief.").run("hello")

    assert "You said: hello" == answer.output
    assert (3, 3) == (answer.usage.input_tokens, answer.usage.output_tokens)
    assert ["system", "user"] == [message["role"] for message in live.sent["messages"]]


async def test_it_streams(provider: OpenAIProvider) -> None:
    """Text comes in pieces, and the usage with the last."""
    async with agent(provider).run_stream("hello") as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
        usage = answer.usage

    assert ["You", " said:", " hello"] == pieces
    assert 3 == usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_it_runs_a_tool(provider: OpenAIProvider, *, stream: bool) -> None:
    """The model calls a function, which runs, and answers with what came of it."""
    calls = []

    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        calls.append((a, b))
        return a + b

    adder = agent(provider, tools=[add])
    if stream:
        async with adder.run_stream("add 3 and 4") as answer:
            output = await answer.get_output()
    else:
        output = (await adder.run("add 3 and 4")).output

    assert "The tool says: 7" == output
    assert [(3, 4)] == calls


@pytest.mark.parametrize("mode", [NativeOutput, ToolOutput])
async def test_an_answer_becomes_a_type(provider: OpenAIProvider, live: Live, mode: Any) -> None:
    """By its schema or as a tool's arguments, whole and streamed, one of the type comes back."""
    adder = agent(provider, output_type=mode(Sum))
    whole = await adder.run("add 3 and 4")
    async with adder.run_stream("add 5 and 6") as answer:
        streamed = await answer.get_output()

    assert (Sum(a=3, b=4), Sum(a=5, b=6)) == (whole.output, streamed)
    assert ("response_format" in live.sent) is (mode is NativeOutput)
    assert bool(live.sent.get("tools")) is (mode is ToolOutput)


async def test_texts_become_vectors(provider: OpenAIProvider) -> None:
    """Each text has its vector, and the tokens are counted."""
    embedder = Embedder(OpenAIEmbeddingModel(EMBEDDING, provider=provider))
    answer = await embedder.embed_documents(["the sea", "the ocean"])

    assert [vector("the sea"), vector("the ocean")] == [list(one) for one in answer.embeddings]
    assert 4 == answer.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "text", "code"), FAILURES)
async def test_a_providers_failure_keeps_its_status(
    provider: OpenAIProvider, status: int, text: str, code: str | None, *, stream: bool
) -> None:
    """Each status is told, with the error object of the answer."""
    with pytest.raises(ModelHTTPError) as raised:
        await _run(agent(provider), text, stream=stream)

    assert status == raised.value.status_code
    assert isinstance(raised.value.body, dict)
    assert code == raised.value.body["code"]


async def _run(asked: Agent[Any, Any], text: str, *, stream: bool) -> None:
    if not stream:
        await asked.run(text)
        return
    async with asked.run_stream(text) as answer:
        await answer.get_output()


REFUSED: Any = [
    (400, "temperature", MODEL, {"temperature": 3.0}),
    (404, "model_not_found", "gone", {}),
    (504, "timeout", SLOW, {}),
]


@pytest.mark.parametrize(("status", "kind", "model", "settings"), REFUSED)
async def test_the_gateways_refusal_keeps_its_status(
    provider: OpenAIProvider, status: int, kind: str, model: str, settings: Any
) -> None:
    """What the gateway refuses or waits too long for is told with its parameter or code."""
    asked = agent(provider, model, model_settings=settings)
    with pytest.raises(ModelHTTPError) as raised:
        await asked.run("silence" if status == 504 else "hello")

    assert status == raised.value.status_code
    assert isinstance(raised.value.body, dict)
    assert kind in (raised.value.body["param"], raised.value.body["code"])


@pytest.mark.parametrize(
    ("status", "key", "code"),
    [(401, "hk_wrong", "invalid_api_key"), (403, "", "insufficient_permissions")],
)
async def test_a_wrong_or_weak_key_is_told(live: Live, status: int, key: str, code: str) -> None:
    """A key that is not ours is 401, one whose user may not is 403."""
    async with provider_of(live, key or live.lister_key) as client:
        with pytest.raises(ModelHTTPError) as raised:
            await agent(OpenAIProvider(openai_client=client)).run("hello")

    assert status == raised.value.status_code
    assert isinstance(raised.value.body, dict)
    assert code == raised.value.body["code"]


@pytest.mark.parametrize("text", ["fail midway", "cut midway"])
async def test_a_failure_in_mid_stream_raises(provider: OpenAIProvider, text: str) -> None:
    """What came before is there; the end is an error, never a whole answer."""
    got = await until_it_raises((ModelAPIError, openai.APIError), _pieces(agent(provider), text))

    assert "Once upon " == "".join(got)


async def _pieces(asked: Agent[Any, Any], text: str) -> AsyncIterator[str]:
    async with asked.run_stream(text) as answer:
        async for piece in answer.stream_text(delta=True, debounce_by=None):
            yield piece


async def test_a_stream_that_is_left_ends_at_the_provider(
    provider: OpenAIProvider, live: Live
) -> None:
    """Leaving a run half way closes the connection to the provider."""
    async with agent(provider).run_stream("hang") as answer:
        async for _ in answer.stream_text(delta=True, debounce_by=None):
            break
        await answer.cancel()

    await live.until_left()


async def test_a_run_that_is_cancelled_ends_at_the_provider(
    provider: OpenAIProvider, live: Live
) -> None:
    """Cancelling a run that waits for its first word closes the connection to the provider."""
    task = asyncio.create_task(agent(provider).run("silence"))
    await live.until_asked()
    task.cancel()

    await live.until_left()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_twenty_runs_at_once(provider: OpenAIProvider) -> None:
    """Each of twenty runs gets its own answer."""
    asked = agent(provider)
    answers = await asyncio.gather(*(asked.run(f"call {at}") for at in range(20)))

    assert [f"You said: call {at}" for at in range(20)] == [one.output for one in answers]


async def test_the_echo_answers(provider: OpenAIProvider) -> None:
    """A backend without a provider serves the same client, whole and streamed."""
    asked = agent(provider, "echo")
    whole = await asked.run("hello")
    async with asked.run_stream("hello") as answer:
        streamed = await answer.get_output()

    assert "hello" in whole.output
    assert whole.output == streamed


async def test_the_local_model_answers(local_live: Live) -> None:
    """A real model serves the client: whole, streamed and structured."""
    async with provider_of(local_live) as client:
        provider = OpenAIProvider(openai_client=client)
        whole = await agent(provider, "default").run("What is the capital of France?")
        async with agent(provider, "default").run_stream("Count to five.") as answer:
            streamed = await answer.get_output()
        shaped = agent(provider, "default", output_type=NativeOutput(Sum))
        parsed = await shaped.run("add 3 and 4")

    assert "Paris" in whole.output
    assert "5" in streamed
    assert isinstance(parsed.output, Sum)
