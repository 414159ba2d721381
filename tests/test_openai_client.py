"""OpenAI's own client for Python, as it is: both kinds, at a gateway and at a chain of two."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest

from clients import (
    EMBEDDING,
    ERRORS,
    FAILURES,
    HELLO,
    MODEL,
    SLOW,
    Live,
    asking,
    at_once,
    call,
    each,
    entered,
    settled,
    until_it_raises,
)
from provider import failure, vector

SUM: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Numbers(pydantic.BaseModel):
    """What an answer is parsed into."""

    title: str
    first: int
    second: int


@pytest.fixture(params=["direct", "chain"])
def live(request: pytest.FixtureRequest, gateways: dict[str, Live]) -> Live:
    """The gateway in front of the provider, then a second gateway in front of the first."""
    chosen = gateways[request.param]
    chosen.forget()
    return chosen


def make(kind: str, live: Live, **options: Any) -> Any:
    """A client of a kind that asks once, as super user unless told otherwise."""
    options = {
        "api_key": live.api_key,
        "base_url": live.base_url,
        "max_retries": 0,
        "timeout": 30,
        **options,
    }
    return openai.OpenAI(**options) if kind == "sync" else openai.AsyncOpenAI(**options)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Whether the client blocks."""
    return request.param


@pytest.fixture
async def client(kind: str, live: Live) -> AsyncIterator[Any]:
    """The client, of both kinds."""
    async with entered(make(kind, live)) as client:
        yield client


@pytest.fixture
async def local(kind: str, local_live: Live) -> AsyncIterator[Any]:
    """The client of a gateway to the local model."""
    async with entered(make(kind, local_live)) as client:
        yield client


async def text_of(stream: Any) -> str:
    """The text of a stream."""
    choices = [chunk.choices[0] async for chunk in each(stream) if chunk.choices]
    return "".join(choice.delta.content or "" for choice in choices)


async def refusal(error: type[Exception], answer: Any) -> Any:
    """The error that the client raises for a call."""
    with pytest.raises(error) as raised:
        await settled(answer())
    return raised.value


async def test_it_chats(client: Any) -> None:
    """A whole answer has its text, its reason, its usage and the model that was asked for."""
    create = client.chat.completions.create
    answer = await settled(create(model=MODEL, messages=HELLO, temperature=0.5, seed=3))

    assert answer.id.startswith("chatcmpl-")
    assert "chat.completion" == answer.object
    assert MODEL == answer.model
    (choice,) = answer.choices
    assert ("stop", "assistant") == (choice.finish_reason, choice.message.role)
    assert "You said: hello" == choice.message.content
    assert (1, 3, 4) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    )


async def test_what_is_asked_reaches_the_provider(client: Any, live: Live) -> None:
    """Every message and option of a call is what the provider is sent."""
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["END"], "max_tokens": 50}
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    await settled(client.chat.completions.create(model=MODEL, messages=messages, **options))

    assert messages == live.sent["messages"]
    assert MODEL == live.sent["model"]
    sent = {name: live.sent.get(name) for name in options}
    sent["max_tokens"] = sent["max_tokens"] or live.sent.get("max_completion_tokens")
    assert options == sent


async def test_it_streams(client: Any) -> None:
    """A stream comes in pieces of one id, tells its role first, its reason and its usage last."""
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await settled(client.chat.completions.create(model=MODEL, messages=HELLO, **options))
    chunks = [chunk async for chunk in each(stream)]

    assert 1 == len({(chunk.id, chunk.created) for chunk in chunks})
    assert {"chat.completion.chunk"} == {chunk.object for chunk in chunks}
    assert "assistant" == chunks[0].choices[0].delta.role
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "You said: hello" == "".join(piece or "" for piece in pieces)
    assert 3 == len([piece for piece in pieces if piece])
    assert "stop" == [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    assert [] == chunks[-1].choices
    assert 4 == chunks[-1].usage.total_tokens


async def test_a_stream_has_no_usage_unasked(client: Any) -> None:
    """Every chunk has a choice where nobody asked for the usage: old loops index it."""
    create = client.chat.completions.create
    stream = await settled(create(model=MODEL, messages=HELLO, stream=True))
    chunks = [chunk async for chunk in each(stream)]

    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert {None} == {chunk.usage for chunk in chunks}


async def test_the_stream_helper_gathers_an_answer(client: Any) -> None:
    """`.stream()` sees text as it comes and ends with the whole completion."""
    helper = client.chat.completions.stream(model=MODEL, messages=HELLO)
    async with entered(helper) as stream:
        events = [event async for event in each(stream)]
        final = await settled(stream.get_final_completion())

    assert ["You", " said:", " hello"] == [
        event.delta for event in events if event.type == "content.delta"
    ]
    assert "content.done" in [event.type for event in events]
    assert "You said: hello" == final.choices[0].message.content
    assert "stop" == final.choices[0].finish_reason


async def test_it_runs_a_tool(client: Any) -> None:
    """A call comes back with its arguments as JSON text, and its result leads to an answer."""
    messages = asking("add 3 and 4")
    create = client.chat.completions.create
    first = await settled(create(model=MODEL, messages=messages, tools=[SUM]))
    (choice,) = first.choices
    (asked,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": asked.id, "content": "7"}
    then = [*messages, choice.message, result]
    second = await settled(create(model=MODEL, messages=then, tools=[SUM]))

    assert "tool_calls" == choice.finish_reason
    assert choice.message.content is None
    assert call("add", '{"a": 3, "b": 4}', asked.id) == asked.model_dump(exclude_none=True)
    assert "The tool says: 7" == second.choices[0].message.content


async def test_a_tool_call_comes_in_pieces(client: Any) -> None:
    """A streamed call has its id and name once, and its arguments as they come."""
    create = client.chat.completions.create
    messages = asking("add 3 and 4, twice")
    stream = await settled(create(model=MODEL, messages=messages, tools=[SUM], stream=True))
    deltas = [chunk.choices[0] async for chunk in each(stream)]
    pieces = [piece for delta in deltas for piece in delta.delta.tool_calls or ()]

    assert "tool_calls" == deltas[-1].finish_reason
    for at in (0, 1):
        mine = [piece for piece in pieces if piece.index == at]
        assert ["add"] == [piece.function.name for piece in mine if piece.function.name]
        assert 1 == len([piece.id for piece in mine if piece.id])
        assert len(mine) > 2
        assert '{"a": 3, "b": 4}' == "".join(piece.function.arguments or "" for piece in mine)


async def test_the_stream_helper_parses_tool_arguments(client: Any) -> None:
    """`.stream()` with a tool made of a type ends in arguments of that type."""
    tool: Any = openai.pydantic_function_tool(Numbers)
    helper = client.chat.completions.stream(model=MODEL, messages=asking("5, 6"), tools=[tool])
    async with entered(helper) as stream:
        events = [event async for event in each(stream)]
        final = await settled(stream.get_final_completion())

    (asked,) = final.choices[0].message.tool_calls
    assert Numbers(title="text", first=5, second=6) == asked.function.parsed_arguments
    assert "tool_calls.function.arguments.done" in [event.type for event in events]


@pytest.mark.parametrize(
    "choice", ["none", "required", {"type": "function", "function": {"name": "add"}}]
)
async def test_the_choice_of_a_tool_is_kept(client: Any, live: Live, choice: Any) -> None:
    """A forced, required or forbidden tool is that at the provider too."""
    answer = await settled(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[SUM],
            tool_choice=choice,
            parallel_tool_calls=False,
        )
    )

    assert (choice == "none") is (answer.choices[0].message.tool_calls is None)
    assert choice == live.sent["tool_choice"]
    assert live.sent["parallel_tool_calls"] is False
    assert [SUM] == live.sent["tools"]


async def test_it_parses_an_answer_into_a_type(client: Any, live: Live) -> None:
    """`.parse()` sends the type's strict schema and hands back one of it."""
    parse = client.chat.completions.parse
    answer = await settled(
        parse(model=MODEL, messages=asking("8 and 9, 'sums'"), response_format=Numbers)
    )

    assert Numbers(title="sums", first=8, second=9) == answer.choices[0].message.parsed
    sent = live.sent["response_format"]["json_schema"]
    assert ("Numbers", True) == (sent["name"], sent["strict"])


async def test_the_stream_helper_parses_an_answer(client: Any) -> None:
    """`.stream()` with a type ends in one of it."""
    helper = client.chat.completions.stream(
        model=MODEL, messages=asking("8 and 9"), response_format=Numbers
    )
    async with entered(helper) as stream:
        final = await settled(stream.get_final_completion())

    assert Numbers(title="text", first=8, second=9) == final.choices[0].message.parsed


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_it_embeds(client: Any, encoding: str | None) -> None:
    """One vector a text, in order, the same whatever encoding is asked for or defaulted to."""
    given = ["the sea", "the ocean"]
    more: Any = {"encoding_format": encoding} if encoding else {}
    answer = await settled(client.embeddings.create(model=EMBEDDING, input=given, **more))

    floats = [item.embedding for item in answer.data]
    assert [0, 1] == [item.index for item in answer.data]
    assert "list" == answer.object
    assert 4 == answer.usage.prompt_tokens == answer.usage.total_tokens
    if encoding != "base64":
        assert [vector(text) for text in given] == floats
    else:
        assert all(isinstance(packed, str) for packed in floats)


async def test_an_embedding_has_the_dimensions_that_were_asked(client: Any) -> None:
    """`dimensions` reaches the provider, for one text."""
    create = client.embeddings.create
    answer = await settled(create(model=EMBEDDING, input="the sea", dimensions=4))

    assert vector("the sea", 4) == answer.data[0].embedding


async def test_it_embeds_tokens(client: Any, live: Live) -> None:
    """Arrays of token numbers reach the provider as they are."""
    tokens = [[1820, 9581], [1820, 18435]]
    answer = await settled(client.embeddings.create(model=EMBEDDING, input=tokens))

    assert tokens == live.sent["input"]
    assert [vector(one) for one in tokens] == [item.embedding for item in answer.data]


async def test_it_lists_models(client: Any) -> None:
    """The list iterates, and each of its models can be looked up."""
    listed = [model async for model in each(await settled(client.models.list()))]
    names = [model.id for model in listed]

    assert {"default", "echo", MODEL, EMBEDDING, SLOW} <= set(names)
    assert len(set(names)) == len(names)
    for model in listed:
        assert "model" == model.object
        assert model == await settled(client.models.retrieve(model.id))


async def test_the_echo_answers(client: Any) -> None:
    """A backend without a provider serves the same client: whole, streamed and embedded."""
    create = client.chat.completions.create
    whole = await settled(create(model="echo", messages=HELLO))
    stream = await settled(create(model="echo", messages=HELLO, stream=True))
    embedded = await settled(client.embeddings.create(model="echo", input=["a", "b"]))

    assert "hello" in whole.choices[0].message.content
    assert whole.choices[0].message.content == await text_of(stream)
    assert 2 == len(embedded.data)
    assert embedded.data[0].embedding != embedded.data[1].embedding


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "text", "code"), FAILURES)
async def test_a_providers_failure_is_its_class(
    client: Any, status: int, text: str, code: str | None, *, stream: bool
) -> None:
    """Each status raises its own class with its code, streamed or not, and says when to retry."""
    create = client.chat.completions.create
    messages = asking(text)
    error = await refusal(
        ERRORS[status], lambda: create(model=MODEL, messages=messages, stream=stream)
    )

    assert status == error.status_code
    assert isinstance(error.body, dict)
    assert code == error.code
    waits = "7" if text in ("fail 429", "fail 503") else None
    assert waits == error.response.headers.get("retry-after")
    assert error.request_id


async def test_a_wrong_parameter_is_named(client: Any) -> None:
    """A request that makes no sense is a 400 with the parameter's name, and asks nobody."""
    create = client.chat.completions.create
    error = await refusal(
        openai.BadRequestError, lambda: create(model=MODEL, messages=HELLO, temperature=3)
    )

    assert ("invalid_request_error", "temperature") == (error.type, error.param)


async def test_an_unknown_model_is_told(client: Any, live: Live) -> None:
    """404 `model_not_found`, and no provider was asked."""
    create = client.chat.completions.create
    error = await refusal(openai.NotFoundError, lambda: create(model="gone", messages=HELLO))

    assert "model_not_found" == error.code
    assert "gone" in error.message
    assert [] == live.upstream.requests


async def test_an_unknown_path_is_told(client: Any) -> None:
    """What the gateway does not have is a 404 the client understands."""
    error = await refusal(openai.NotFoundError, client.files.list)

    assert "unknown_url" == error.code


async def test_a_base_url_without_v1_is_told(kind: str, live: Live) -> None:
    """The commonest slip is told with the path that was meant; of any other path nothing is."""
    create = {"model": "default", "messages": HELLO}
    async with entered(make(kind, live, base_url=live.server.url)) as client:
        chat = client.chat.completions
        slip = await refusal(openai.NotFoundError, lambda: chat.create(**create))
        other = await refusal(openai.NotFoundError, client.files.list)

    assert "it is at /v1/chat/completions: OpenAI's clients need a base URL with /v1" in str(slip)
    assert "Not found." == other.response.json()["detail"]


async def test_a_wrong_key_is_told(kind: str, live: Live) -> None:
    """401 `invalid_api_key`."""
    async with entered(make(kind, live, api_key="hk_wrong")) as client:
        error = await refusal(openai.AuthenticationError, client.models.list)

    assert "invalid_api_key" == error.code


async def test_a_role_without_the_grant_may_not(kind: str, live: Live) -> None:
    """403 for a user who may list models and no more."""
    async with entered(make(kind, live, api_key=live.lister_key)) as client:
        await settled(client.models.list())
        create = client.chat.completions.create
        error = await refusal(
            openai.PermissionDeniedError, lambda: create(model=MODEL, messages=HELLO)
        )

    assert "insufficient_permissions" == error.code


@pytest.mark.parametrize("stream", [False, True])
async def test_a_silent_provider_is_a_timeout(client: Any, *, stream: bool) -> None:
    """A provider that does not answer in time is a 504, streamed or not."""
    create = client.chat.completions.create
    messages = asking("silence")
    error = await refusal(
        openai.InternalServerError, lambda: create(model=SLOW, messages=messages, stream=stream)
    )

    assert (504, "timeout") == (error.status_code, error.code)


@pytest.mark.parametrize("text", ["fail midway", "cut midway"])
async def test_a_failure_in_mid_stream_raises(client: Any, text: str) -> None:
    """What came before is there; the end is an error, never a whole answer."""
    create = client.chat.completions.create
    stream = await settled(create(model=MODEL, messages=asking(text), stream=True))
    got = await until_it_raises(openai.APIError, each(stream))

    assert "Once upon " == "".join(chunk.choices[0].delta.content or "" for chunk in got)


async def test_a_stream_that_is_left_ends_at_the_provider(client: Any, live: Live) -> None:
    """Closing a stream half way closes the connection to the provider."""
    create = client.chat.completions.create
    stream = await settled(create(model=MODEL, messages=asking("hang"), stream=True))
    async for chunk in each(stream):
        if chunk.choices[0].delta.content:
            break
    await settled(stream.close())

    await live.until_left()


async def test_twenty_calls_at_once(kind: str, client: Any) -> None:
    """Each of twenty calls, whole and streamed, gets its own answer."""
    create = client.chat.completions.create

    def blocking(at: int) -> str:
        messages = asking(f"call {at}")
        if at % 2:
            return create(model=MODEL, messages=messages).choices[0].message.content
        stream = create(model=MODEL, messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    async def awaited(at: int) -> str:
        messages = asking(f"call {at}")
        if at % 2:
            return (await create(model=MODEL, messages=messages)).choices[0].message.content
        return await text_of(await create(model=MODEL, messages=messages, stream=True))

    answers = await at_once(blocking if kind == "sync" else awaited)

    assert [f"You said: call {at}" for at in range(20)] == answers


async def test_it_tries_again_by_itself(kind: str, live: Live) -> None:
    """The client's own second attempt is answered, and nothing tells it not to try."""
    live.upstream.script(failure(500))
    async with entered(make(kind, live, max_retries=1)) as client:
        answer = await settled(client.chat.completions.create(model=MODEL, messages=HELLO))

    assert "You said: hello" == answer.choices[0].message.content
    assert 2 == len(live.upstream.requests)


async def test_the_local_model_answers(local: Any) -> None:
    """A real model serves the client: whole, streamed, parsed and embedded."""
    create = local.chat.completions.create
    question = asking("What is the capital of France?")
    whole = await settled(create(model="default", messages=question))
    stream = await settled(create(model="default", messages=question, stream=True, max_tokens=8))
    parse = local.chat.completions.parse
    parsed = await settled(
        parse(model="default", messages=asking("Say two numbers."), response_format=Numbers)
    )
    embedded = await settled(local.embeddings.create(model="default", input="the sea"))

    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.completion_tokens > 3
    assert await text_of(stream)
    assert isinstance(parsed.choices[0].message.parsed, Numbers)
    assert 384 == len(embedded.data[0].embedding)
