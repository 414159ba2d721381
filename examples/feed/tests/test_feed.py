import asyncio

import pytest


class Reader:
    """A reader of the feed that remembers the last event's id, as a browser does."""

    def __init__(self, client):
        self.client = client
        self.last = {}

    async def connect(self):
        self.answer = await self.client.get("/feed", headers=self.last)
        assert self.answer.status == 200
        assert await self.next() == {"retry": "1000"}

    def leave(self):
        self.answer.close()

    async def next(self):
        event = (await self.answer.content.readuntil(b"\n\n")).decode()
        fields = dict(line.split(": ", 1) for line in event.strip().splitlines())
        if "id" in fields:
            self.last = {"Last-Event-ID": fields["id"]}
        return fields


async def publish(client, text):
    answer = await client.post("/feed", json={"text": text})
    assert answer.status == 201
    return await answer.json()


async def test_a_reader_gets_what_is_published(harper_client):
    reader = Reader(harper_client)
    await reader.connect()
    told = await publish(harper_client, "one")
    assert await reader.next() == {"event": "news", "data": '{"text":"one"}', **told}


async def test_a_reader_that_comes_back_loses_nothing(harper_client):
    reader = Reader(harper_client)
    await reader.connect()
    await publish(harper_client, "0")
    read = [(await reader.next())["data"]]
    for number in range(1, 20):
        if number % 5 == 1:
            reader.leave()
        await publish(harper_client, str(number))
        if number % 5 == 0:
            await reader.connect()
            read += [(await reader.next())["data"] for _ in range(5)]
    await reader.connect()
    read += [(await reader.next())["data"] for _ in range(4)]
    assert read == [f'{{"text":"{number}"}}' for number in range(20)]


async def test_many_readers_get_the_same(harper_client):
    readers = [Reader(harper_client) for _ in range(10)]
    await asyncio.gather(*(reader.connect() for reader in readers))
    await publish(harper_client, "one")
    events = await asyncio.gather(*(reader.next() for reader in readers))
    assert all(event == events[0] for event in events)


async def test_a_reader_of_an_earlier_run_is_told_that_it_missed_some(harper_client):
    reader = Reader(harper_client)
    reader.last = {"Last-Event-ID": "of-another-run"}
    await reader.connect()
    gap = await reader.next()
    assert (gap["event"], gap["data"]) == ("replay-gap", '{"missed":null}')


async def test_everyone_reads_and_whoever_has_a_key_publishes(harper_server):
    async with harper_server.session("") as nobody:
        await Reader(nobody).connect()
        page = await nobody.get("/page")
        assert "EventSource" in await page.text()
        assert (await nobody.post("/feed", json={"text": "one"})).status == 401


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": 1}, {"text": "a", "more": 1}])
async def test_what_is_no_news_is_refused(harper_client, body):
    assert (await harper_client.post("/feed", json=body)).status == 400
