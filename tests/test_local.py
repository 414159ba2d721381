"""The local model on its real weights: sense, not just shape."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from harperpy.plugins.local import LocalChat
from harperpy.plugins.local_runner import Runner

from harperpy.testing import RunningServer, running
from helpers import until
from llama import weights

LOCAL = "models: {generative: {default: {backend: local}}, embedding: {default: {backend: local}}}"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
PAIRS = [
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("The cat sleeps on the sofa.", "A kitten naps on the couch."),
    ("How do I reset my password?", "I forgot my login credentials."),
]
STRANGERS = ["The stock market fell.", "Bake the bread for an hour.", "Rain is expected."]


@pytest.fixture
async def local() -> AsyncIterator[RunningServer]:
    """A server with the local models, their weights fetched."""
    weights()
    async with running(LOCAL) as server:
        yield server


@pytest.fixture
async def client(local: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The unmodified client of it, which does not try again by itself."""
    async with openai.AsyncOpenAI(
        api_key=local.api_key, base_url=f"{local.url}/v1", max_retries=0
    ) as client:
        yield client


def runner(server: RunningServer) -> Runner:
    """What keeps the model's process running."""
    backends: list[Any] = [one.backend for one in server.server.routes]
    return next(one._runner for one in backends if isinstance(one, LocalChat))


async def ask(client: openai.AsyncOpenAI, text: str, **options: Any) -> Any:
    """The first choice of an answer to one message."""
    messages: Any = [{"role": "user", "content": text}]
    answer = await client.chat.completions.create(model="default", messages=messages, **options)
    return answer.choices[0]


async def test_it_knows_the_capital_of_france(client: openai.AsyncOpenAI) -> None:
    """An ordinary question has a right answer, with its tokens counted."""
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = await client.chat.completions.create(model="default", messages=messages)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.completion_tokens > 3
    assert "stop" == answer.choices[0].finish_reason


async def test_it_counts_to_five_in_pieces(client: openai.AsyncOpenAI) -> None:
    """A stream comes in more than three pieces, holds the five, and tells its usage if asked."""
    stream = await client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "Count to five."}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "5" in "".join(piece or "" for piece in pieces)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


async def test_it_stops_where_it_is_told(client: openai.AsyncOpenAI) -> None:
    """`stop` and `max_tokens` end an answer, each with its reason."""
    stopped = await ask(client, "Count to five.", stop=["3"])
    assert "2" in stopped.message.content
    assert "3" not in stopped.message.content
    assert "stop" == stopped.finish_reason
    cut = await ask(client, "Count to five.", max_tokens=2)
    assert "length" == cut.finish_reason


async def test_an_answer_is_no_longer_by_another_name(client: openai.AsyncOpenAI) -> None:
    """What llama.cpp calls `max_tokens` among its own parameters changes nothing."""
    own = {"n_predict": 200}
    cut = await ask(client, "Count to five.", logprobs=True, max_tokens=2, extra_body=own)
    assert 2 == len(cut.logprobs.content)


@pytest.mark.parametrize(
    "own",
    [
        {"n_probs": 100_000},
        {"reasoning_format": "none of them"},
        {"grammar": f"root ::= {'(' * 50_000}"},
    ],
    ids=lambda own: next(iter(own)),
)
async def test_no_caller_ends_the_model_for_the_others(
    client: openai.AsyncOpenAI, own: dict[str, Any]
) -> None:
    """What llama.cpp's process would end by does not reach it; ways to pick a token do."""
    plain = await ask(client, "Hello", max_tokens=4)
    told = await ask(client, "Hello", max_tokens=4, extra_body=own)
    assert plain.message.content == told.message.content


async def test_an_answer_is_picked_as_its_caller_wants(client: openai.AsyncOpenAI) -> None:
    """`top_k` reaches the model: of one token to choose from, no temperature makes another."""
    sure = await ask(client, "Tell me a story.", max_tokens=12)
    one = {"temperature": 2.0, "max_tokens": 12, "extra_body": {"top_k": 1}}
    assert sure.message.content == (await ask(client, "Tell me a story.", **one)).message.content


async def test_a_seed_makes_an_answer_repeatable(client: openai.AsyncOpenAI) -> None:
    """The same seed at a high temperature gives the same answer."""
    options = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
    first = await ask(client, "Tell me a story.", **options)
    second = await ask(client, "Tell me a story.", **options)
    assert first.message.content == second.message.content


async def test_it_tells_how_likely_its_tokens_were(client: openai.AsyncOpenAI) -> None:
    """`logprobs` has an entry per token, with as many others as asked."""
    choice = await ask(client, "Hello", logprobs=True, top_logprobs=2, max_tokens=3)
    assert 3 == len(choice.logprobs.content)
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert 2 == len(token.top_logprobs)


async def test_it_obeys_a_schema(client: openai.AsyncOpenAI) -> None:
    """An answer with a JSON schema has exactly its fields; a JSON object is one."""
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    person = await ask(client, "Alice Smith is 30.", response_format=schema)
    assert {"name": "Alice Smith", "age": 30} == json.loads(person.message.content)
    anything = await ask(
        client, "A red shirt. Answer in JSON.", response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(anything.message.content), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}, "auto"]
)
async def test_it_calls_a_tool(client: openai.AsyncOpenAI, choice: Any) -> None:
    """A tool is called with arguments that obey its schema, and its result is used."""
    question = "What is the weather in Paris?"
    tools: Any = [WEATHER]
    called = await ask(client, question, tools=tools, tool_choice=choice)
    assert "tool_calls" == called.finish_reason
    (call,) = called.message.tool_calls
    assert "get_weather" == call.function.name
    assert {"city": "Paris"} == json.loads(call.function.arguments)
    messages: Any = [
        {"role": "user", "content": question},
        called.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 C, cloudy"},
    ]
    answer = await client.chat.completions.create(model="default", messages=messages, tools=tools)
    assert "cloudy" in (answer.choices[0].message.content or "")


async def test_too_long_a_prompt_is_the_callers_to_mend(client: openai.AsyncOpenAI) -> None:
    """A prompt beyond the context is a 400 with OpenAI's code."""
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(client, "word " * 9000)
    assert "context_length_exceeded" == refused.value.code
    assert "messages" == refused.value.param


async def test_two_clients_are_served_together(client: openai.AsyncOpenAI) -> None:
    """A short answer comes although a long one is under way."""
    first = asyncio.Event()

    async def long() -> int:
        count = 0
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Write a long story about the sea."}],
            stream=True,
            max_tokens=300,
        )
        async for _ in stream:
            count += 1
            first.set()
        return count

    story = asyncio.create_task(long())
    await first.wait()
    await ask(client, "Hello", max_tokens=2)
    assert not story.done()
    assert await story > 3


async def test_beyond_its_queue_it_says_so(client: openai.AsyncOpenAI) -> None:
    """Of more calls than can be served or wait, some are told 429 and when to come back."""
    calls = [ask(client, f"Count to {n}.", max_tokens=8) for n in range(40)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert refused
    assert all("2" == one.response.headers["retry-after"] for one in refused)
    assert len(answers) == len(refused) + sum(not isinstance(a, Exception) for a in answers)


@pytest.mark.parametrize("text", ["The cat sat on the mat. " * 600, "Write a very long story."])
async def test_who_leaves_frees_the_slot(
    local: RunningServer, client: openai.AsyncOpenAI, text: str
) -> None:
    """After four callers leave, in the prompt or in the answer, the four slots are free again."""
    left = [asyncio.create_task(ask(client, f"{n} {text}", max_tokens=900)) for n in range(4)]
    await until(lambda: runner(local).slots.locked() and runner(local).transport is not None)
    for call in left:
        call.cancel()
    async with asyncio.timeout(15):
        await asyncio.gather(*(ask(client, "Hello", max_tokens=2) for _ in range(4)))
    rows = await local.rows("error_code = 'aborted'")
    assert 4 == len(rows)


async def test_a_crash_is_told_and_mended(local: RunningServer, client: openai.AsyncOpenAI) -> None:
    """A call in flight is a 503 when the model's process dies, and the next one is answered."""
    await ask(client, "Hello", max_tokens=2)
    first = asyncio.Event()

    async def story() -> None:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Write a long story."}],
            stream=True,
            max_tokens=500,
        )
        async for _ in stream:
            first.set()

    running_story = asyncio.create_task(story())
    whole = asyncio.create_task(ask(client, "Write a long story.", max_tokens=500))
    await first.wait()
    os.kill(runner(local)._child._process.pid, signal.SIGKILL)
    with pytest.raises(openai.InternalServerError) as gone:
        await whole
    assert 503 == gone.value.status_code
    with pytest.raises(openai.APIError):
        await running_story
    patient = client.with_options(max_retries=2)
    assert (await ask(patient, "Hello", max_tokens=2)).message.content


async def test_what_cannot_be_started_is_tried_again(
    local: RunningServer,
    client: openai.AsyncOpenAI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a machine has no room for the model's process, callers are told, until it has."""
    await ask(client, "Hello", max_tokens=2)
    with monkeypatch.context() as place:
        place.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
        os.kill(runner(local)._child._process.pid, signal.SIGKILL)
        await until(lambda: "cannot be started" in runner(local).state)
        with pytest.raises(openai.InternalServerError, match="No such file") as refused:
            await ask(client, "Hello", max_tokens=2)
        assert 503 == refused.value.status_code
    await until(lambda: "ready" == runner(local).state)
    assert (await ask(client, "Hello", max_tokens=2)).message.content


async def test_related_sentences_are_nearer(client: openai.AsyncOpenAI) -> None:
    """Each sentence is nearer to its pair than to any stranger, by 0.15 at least."""
    texts = [text for pair in PAIRS for text in pair] + STRANGERS
    answer = await client.embeddings.create(model="all-minilm-l6-v2", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert {384} == {len(vector) for vector in vectors}

    def near(one: int, other: int) -> float:
        return sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))

    for at in range(len(PAIRS)):
        related = near(2 * at, 2 * at + 1)
        strange = max(near(2 * at, 2 * len(PAIRS) + n) for n in range(len(STRANGERS)))
        assert related - strange >= 0.15


async def _refusal(config: str, tmp_path: Path, **options: Any) -> tuple[int, str]:
    async with running(config, directory=tmp_path, **options) as server:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        async with (
            server.session() as session,
            session.post("/v1/chat/completions", json=body) as response,
        ):
            told = await response.json()
            listed = await (await session.get("/v1/models")).json()
            assert listed["data"][0]["state"] in told["error"]["message"]
            return response.status, told["error"]["message"]


async def test_offline_without_the_file_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server starts, and chat is a 503 that names the command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, message = await _refusal(LOCAL, tmp_path, offline=True)
    assert (503, True) == (status, "harperpy models pull" in message)


@pytest.mark.parametrize(("content", "expected"), [(None, "does not exist"), (b"no", "not run")])
async def test_a_bad_model_file_is_named(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    """A `modelFile` that is missing or is no model is a 503 that says so; the server is up."""
    if content is not None:
        (tmp_path / "my.gguf").write_bytes(content)
    config = "models: {generative: {default: {backend: local, modelFile: my.gguf}}}"
    status, message = await _refusal(config, tmp_path)
    assert (503, True) == (status, expected in message)


async def test_ones_own_model_file_is_served(tmp_path: Path) -> None:
    """A `modelFile` is a model by its own name."""
    (tmp_path / "My-Model.gguf").symlink_to(weights())
    config = "models: {generative: {default: {backend: local, modelFile: My-Model.gguf}}}"
    async with (
        running(config, directory=tmp_path) as server,
        openai.AsyncOpenAI(api_key=server.api_key, base_url=f"{server.url}/v1") as client,
    ):
        assert "my-model" in {model.id async for model in client.models.list()}
        assert (await ask(client, "Hello", max_tokens=3)).message.content


async def test_a_killed_server_leaves_no_child(tmp_path: Path) -> None:
    """After kill -9 of the server its model's process ends too."""
    weights()
    (tmp_path / "config.yaml").write_text(
        "http: {port: 0}\noperationsApi: {network: {port: 0}}\n" + LOCAL
    )
    command = [Path(sys.executable).with_name("harperpy"), "dev", tmp_path]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        printed = (await process.stdout.readuntil(b"Ready on")).decode()
        url = re.search(r"http://localhost:\d+/v1", printed)
        key = re.search(r"hk_\S+", printed)
        assert url is not None
        assert key is not None
        async with aiohttp.ClientSession() as session:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
            headers = {"Authorization": f"Bearer {key[0]}"}
            answer = await session.post(f"{url[0]}/chat/completions", json=body, headers=headers)
            assert 200 == answer.status
        (served,) = _children(process.pid)
        (child,) = _children(served)
    finally:
        process.kill()
        await process.communicate()
    await until(lambda: not _lives(child))


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def _lives(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_file_can_be_pulled_listed_and_removed(tmp_path: Path) -> None:
    """`models pull`, `list` and `rm` work on the user's cache, without a project or a server."""
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def models(*words: str) -> str:
        command = [Path(sys.executable).with_name("harperpy"), "models", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert 0 == done.returncode, done.stderr
        return done.stdout

    assert [False] == [one["fetched"] for one in json.loads(models("list", "--json"))]
    assert "smollm2-135m-instruct is fetched" in models("pull")
    assert [True] == [one["fetched"] for one in json.loads(models("list", "--json"))]
    assert "is there already" in models("pull", "smollm2-135m-instruct")
    assert "is removed" in models("rm")
    assert "was not there" in models("rm")
