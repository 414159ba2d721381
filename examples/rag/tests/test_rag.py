import openai
import pytest

SEA = "The blue whale is the largest animal that has ever lived."
LAND = "Basil needs warm soil and a sunny window."


def asking(text, **options):
    return {"model": "default", "messages": [{"role": "user", "content": text}], **options}


async def test_an_answer_is_streamed_with_its_sources(chat, add):
    await add("Plants", LAND)
    whales = await add("Whales", SEA)
    usage = {"include_usage": True}
    question = "Which is the largest animal?"
    stream = await chat.create(**asking(question), stream=True, stream_options=usage)
    chunks = [chunk async for chunk in stream]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == question
    (cited,) = [delta.annotations for delta in deltas if hasattr(delta, "annotations")]
    # And not the one that has nothing to do with it.
    assert [one["url_citation"]["title"] for one in cited] == ["Whales"]
    assert cited[0]["url_citation"]["url"] == whales.headers["Location"]
    assert cited[0]["url_citation"]["end_index"] == len(question)
    assert chunks[-1].usage.total_tokens > 0


async def test_a_whole_answer_has_its_sources_too(chat, add, harper_server):
    await add("Whales", SEA)
    answer = await chat.create(**asking("the largest animal", max_tokens=2))
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("the largest", "length")
    (cited,) = choice.message.annotations
    assert cited.url_citation.title == "Whales"
    rows = await harper_server.rows()
    assert [row["method"] for row in rows] == ["generate", "embed", "embed"]


async def test_parts_of_text_are_a_question_too(chat, add):
    await add("Whales", SEA)
    parts = [{"type": "text", "text": "largest "}, {"type": "text", "text": "animal"}]
    answer = await chat.create(**asking(parts))
    assert answer.choices[0].message.content == "largest animal"


@pytest.mark.parametrize("stream", [False, True])
async def test_without_documents_there_is_no_answer(chat, stream):
    with pytest.raises(openai.NotFoundError) as refused:
        await chat.create(**asking("anything"), stream=stream)
    assert refused.value.code == "no_documents"


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "Be kind."}]])
async def test_without_a_question_there_is_no_answer(chat, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        await chat.create(model="default", messages=messages)


async def test_documents_are_listed_read_and_removed(harper_client, add, chat):
    added = await add("Whales", f"{SEA}\n\n{LAND}")
    place = added.headers["Location"]
    assert (added.status, await added.json()) == (201, {"id": 1, "passages": 1})
    listed = await harper_client.get("/rag/documents")
    assert await listed.json() == [{"id": 1, "title": "Whales"}]
    assert SEA in (await (await harper_client.get(place)).json())["text"]
    assert (await harper_client.delete(place)).status == 204
    for gone in (harper_client.get(place), harper_client.delete(place)):
        assert (await gone).status == 404
    with pytest.raises(openai.NotFoundError):
        await chat.create(**asking("anything"))


async def test_a_long_document_is_kept_in_passages(add, harper_client):
    text = f"{'warm soil ' * 500}\n\n{'blue whale ' * 50}\n\n{SEA}"
    added = await (await add("Both", text)).json()
    assert added["passages"] == 8
    kept = await (await harper_client.get("/rag/documents/1")).json()
    assert kept["text"].split() == text.split()


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"title": "Much", "text": "word " * 20_001}, "/text"),
        ({"title": "Nothing", "text": " \n "}, "/text"),
        ({"title": "", "text": SEA}, "/title"),
        ({"title": "No text"}, "/text"),
    ],
)
async def test_what_cannot_be_kept_is_a_400(harper_client, document, path):
    answer = await harper_client.post("/rag/documents", json=document)
    assert answer.status == 400
    assert (await answer.json())["errors"][0]["path"] == path
    assert await (await harper_client.get("/rag/documents")).json() == []
