import openai
import pytest

from harperpy.testing import Answer, scripted_upstream, streamed

MODELS = """
models:
  generative: {{default: {{backend: openai, model: some, baseUrl: "{url}", maxRetries: 0}}}}
  embedding: {{default: {{backend: openai, model: some, baseUrl: "{url}", maxRetries: 0}}}}
plugins: {{rag: {{path: rag}}}}
"""
DOWN = Answer(status=500, body={"error": {"message": "no disk"}})
QUESTION = {"model": "default", "messages": [{"role": "user", "content": "Which one?"}]}


@pytest.fixture
async def provider():
    async with scripted_upstream() as provider:
        yield provider


@pytest.fixture
def harper_config(provider):
    return MODELS.format(url=provider.url)


async def test_the_model_reads_the_sources_before_the_question(chat, add, provider):
    await add("Whales", "The blue whale.")
    await chat.create(**QUESTION)
    system, user = provider.requests[-1].body["messages"]
    assert "[1] Whales\nThe blue whale." in system["content"]
    assert user["content"] == "Which one?"


async def test_a_document_that_cannot_be_embedded_is_not_kept(add, harper_client, provider):
    provider.script(DOWN)
    answer = await add("Whales", "The blue whale.")
    assert answer.status == 500
    assert "no disk" not in await answer.text()
    assert await (await harper_client.get("/rag/documents")).json() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_is_down_is_told_in_the_clients_words(chat, add, provider, stream):
    await add("Whales", "The blue whale.")
    embedded = provider.usual("/embeddings", {"input": ["Which one?"]})
    provider.script(embedded, DOWN)
    with pytest.raises(openai.InternalServerError, match="model provider failed"):
        await chat.create(**QUESTION, stream=stream)


async def test_a_model_that_fails_in_the_middle_ends_the_stream(chat, add, provider):
    await add("Whales", "The blue whale.")
    embedded = provider.usual("/embeddings", {"input": ["Which one?"]})
    provider.script(embedded, Answer(events=streamed("The", done=False), cut=True))
    stream = await chat.create(**QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="model provider failed"):
        async for _ in stream:
            pass
