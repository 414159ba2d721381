import openai
import pytest


@pytest.fixture
async def client(harper_server):
    url = f"{harper_server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=harper_server.api_key) as client:
        yield client.chat.completions


def asking(text, **options):
    return {"model": "countdown", "messages": [{"role": "user", "content": text}], **options}


async def test_it_streams(client):
    usage = {"include_usage": True}
    stream = await client.create(**asking("from 3"), stream=True, stream_options=usage)
    chunks = [chunk async for chunk in stream]
    said = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert [text for text in said if text] == ["3 ", "2 ", "1 "]
    assert chunks[-1].usage.completion_tokens == 3


async def test_it_answers_whole_and_keeps_to_max_tokens(client, harper_server):
    answer = await client.create(**asking("from 10", max_tokens=2))
    assert answer.choices[0].message.content == "10 9 "
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    (row,) = await harper_server.rows()
    assert (row["backend"], row["completion_tokens"]) == ("countdown", 2)


@pytest.mark.parametrize(
    ("text", "code"), [("from ten", "no_number"), ("from 101", "number_too_large")]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_it_cannot_do_is_a_400(client, text, code, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.create(**asking(text), stream=stream)
    assert (refused.value.param, refused.value.code) == ("messages", code)
