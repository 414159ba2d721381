"""MCP sampling, with the SDK as it is: a server asks, and its client answers through a gateway."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import openai
import pytest
from mcp import Client, MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.resolve import Resolve, Sample
from mcp_types import (
    INTERNAL_ERROR,
    CreateMessageRequestParams,
    CreateMessageResult,
    CreateMessageResultWithTools,
    ErrorData,
    SamplingCapability,
    SamplingMessage,
    SamplingToolsCapability,
    TextContent,
    Tool,
    ToolResultContent,
    ToolUseContent,
)

from clients import FAILURES, MODEL, Live

ADD = Tool(
    name="add",
    description="Adds two numbers",
    input_schema={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
)
REASONS = {"stop": "endTurn", "length": "maxTokens", "tool_calls": "toolUse"}


class Sampler:
    """What an MCP client does that lends its model: it asks `/v1/chat/completions`."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model

    async def __call__(self, context: Any, params: CreateMessageRequestParams) -> Any:
        """The model's answer, or what the gateway said instead of one."""
        try:
            answer = await self._client.chat.completions.create(**self._request(params))
        except openai.APIStatusError as error:
            return ErrorData(
                code=INTERNAL_ERROR, message=str(error), data={"status": error.status_code}
            )
        (choice,) = answer.choices
        kind = CreateMessageResultWithTools if params.tools else CreateMessageResult
        return kind(
            role="assistant",
            content=_content(choice.message),
            model=answer.model,
            stop_reason=REASONS[choice.finish_reason],
        )

    def _request(self, params: CreateMessageRequestParams) -> dict[str, Any]:
        system = [{"role": "system", "content": params.system_prompt}]
        messages = [said for message in params.messages for said in _messages(message)]
        return {
            "model": self._model,
            "messages": [*(system if params.system_prompt else []), *messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stop": params.stop_sequences,
            "tools": [_tool(tool) for tool in params.tools or ()] or openai.omit,
        }


def _messages(message: SamplingMessage) -> list[dict[str, Any]]:
    (block,) = message.content_as_list
    if isinstance(block, ToolUseContent):
        function = {"name": block.name, "arguments": json.dumps(block.input)}
        call = {"id": block.id, "type": "function", "function": function}
        return [{"role": "assistant", "tool_calls": [call]}]
    if isinstance(block, ToolResultContent):
        (text,) = block.content
        assert isinstance(text, TextContent)
        return [{"role": "tool", "tool_call_id": block.tool_use_id, "content": text.text}]
    assert isinstance(block, TextContent)
    return [{"role": message.role, "content": block.text}]


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _content(message: Any) -> Any:
    if not message.tool_calls:
        return TextContent(text=message.content)
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    return ToolUseContent(name=call.function.name, id=call.id, input=arguments)


def text(said: str) -> SamplingMessage:
    """What a user says."""
    return SamplingMessage(role="user", content=TextContent(text=said))


def said(answer: CreateMessageResult | CreateMessageResultWithTools) -> str:
    """The text of a sample."""
    assert isinstance(answer.content, TextContent)
    return answer.content.text


def server() -> MCPServer:
    """An MCP server whose tools ask their client's model."""
    server = MCPServer("asks")

    def ask(question: str, temperature: float = 0.5) -> Sample:
        return Sample(
            [text(question)], max_tokens=64, system_prompt="Be brief.", temperature=temperature
        )

    @server.tool()
    async def answer(
        question: str,  # noqa: ARG001 (what a resolver takes is a tool's parameter too)
        sample: Annotated[CreateMessageResult, Resolve(ask)],
        temperature: float = 0.5,  # noqa: ARG001
    ) -> str:
        """What the client's model says."""
        return f"{sample.model} ({sample.stop_reason}): {said(sample)}"

    def call(question: str) -> Sample:
        return Sample([text(question)], max_tokens=64, tools=[ADD])

    def conclude(
        question: str, called: Annotated[CreateMessageResultWithTools, Resolve(call)]
    ) -> Sample:
        use = called.content
        assert isinstance(use, ToolUseContent)
        total = str(use.input["a"] + use.input["b"])
        result = ToolResultContent(tool_use_id=use.id, content=[TextContent(text=total)])
        messages = [
            text(question),
            SamplingMessage(role="assistant", content=use),
            SamplingMessage(role="user", content=result),
        ]
        return Sample(messages, max_tokens=64, tools=[ADD])

    @server.tool()
    async def add(
        question: str,  # noqa: ARG001
        sample: Annotated[CreateMessageResultWithTools, Resolve(conclude)],
    ) -> str:
        """What the client's model says of a sum that it had this server add."""
        return said(sample)

    @server.tool()
    async def answer_at_once(question: str, context: Context) -> str:
        """What the client's model says, asked in the middle of the call."""
        sample = await context.session.create_message([text(question)], max_tokens=64)  # pyright: ignore[reportDeprecated]
        return said(sample)

    return server


@asynccontextmanager
async def connected(
    live: Live, mode: str, model: str = MODEL, key: str | None = None
) -> AsyncIterator[Client]:
    """An MCP client of such a server, which lends the gateway's model."""
    asked = openai.AsyncOpenAI(base_url=live.base_url, api_key=key or live.api_key, max_retries=0)
    async with (
        asked,
        Client(
            server(),
            mode=mode,
            sampling_callback=Sampler(asked, model),
            sampling_capabilities=SamplingCapability(tools=SamplingToolsCapability()),
        ) as client,
    ):
        yield client


@pytest.fixture(params=["legacy", "auto"])
def mode(request: pytest.FixtureRequest) -> str:
    """In the older protocol the server calls its client, in the newer it answers by asking."""
    return request.param


async def result_of(client: Client, name: str, question: str, **more: Any) -> str:
    """The text of a tool's result."""
    result = await client.call_tool(name, {"question": question, **more})
    (block,) = result.content
    assert isinstance(block, TextContent)
    assert not result.is_error, block.text
    return block.text


async def test_a_server_asks_and_the_gateway_answers(live: Live, mode: str) -> None:
    """What the server wants of the model reaches the provider, and its tool gets the answer."""
    async with connected(live, mode) as client:
        answer = await result_of(client, "answer", "hello")

    assert f"{MODEL} (endTurn): You said: hello" == answer

    assert ["system", "user"] == [message["role"] for message in live.sent["messages"]]
    assert 0.5 == live.sent["temperature"]
    assert 64 == (live.sent.get("max_tokens") or live.sent.get("max_completion_tokens"))


async def test_a_server_has_its_tool_called(live: Live, mode: str) -> None:
    """The model calls the server's tool, and says what came of it."""
    async with connected(live, mode) as client:
        assert "The tool says: 7" == await result_of(client, "add", "add 3 and 4")


@pytest.mark.filterwarnings("ignore:The sampling capability is deprecated")  # yet in wide use
async def test_a_server_asks_in_the_middle_of_a_call(live: Live) -> None:
    """The call that most servers in use make is answered."""
    async with connected(live, "legacy") as client:
        assert "You said: hello" == await result_of(client, "answer_at_once", "hello")


@pytest.mark.parametrize(("status", "question"), [failure[:2] for failure in FAILURES])
async def test_a_providers_failure_reaches_the_server(
    live: Live, mode: str, status: int, question: str
) -> None:
    """The status comes to the one who called the tool."""
    async with connected(live, mode) as client:
        assert f"Error code: {status}" in await _failure(client, question)


async def _failure(client: Client, question: str, **more: Any) -> str:
    """What a failed call says: as an error, or as the result of a tool that failed."""
    try:
        result = await client.call_tool("answer", {"question": question, **more})
    except MCPError as error:
        return error.message
    assert result.is_error
    (block,) = result.content
    assert isinstance(block, TextContent)
    return block.text


async def test_a_wrong_parameter_reaches_the_server(live: Live, mode: str) -> None:
    """A 400 of the gateway's own names the parameter."""
    async with connected(live, mode) as client:
        assert "temperature" in await _failure(client, "hello", temperature=3.0)


@pytest.mark.parametrize(
    ("status", "model", "key"),
    [(401, MODEL, "hk_wrong"), (403, MODEL, "LISTER"), (404, "gone", None), (504, "slow", None)],
)
async def test_a_refusal_reaches_the_server(
    live: Live, mode: str, status: int, model: str, key: str | None
) -> None:
    """So does what the gateway refuses or waits too long for."""
    key = live.lister_key if key == "LISTER" else key
    async with connected(live, mode, model, key) as client:
        failure = await _failure(client, "silence" if status == 504 else "hello")

    assert f"Error code: {status}" in failure


async def test_a_call_that_is_cancelled_ends_at_the_provider(live: Live, mode: str) -> None:
    """Giving up on a tool closes the connection to the provider."""
    async with connected(live, mode) as client:
        task = asyncio.create_task(client.call_tool("answer", {"question": "silence"}))
        await live.until_asked()
        task.cancel()

        await live.until_left()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_twenty_calls_at_once(live: Live, mode: str) -> None:
    """Each of twenty tool calls gets its own sample."""
    asked = [f"call {at}" for at in range(20)]
    async with connected(live, mode) as client:
        answers = await asyncio.gather(*(result_of(client, "answer", one) for one in asked))

    assert [f"{MODEL} (endTurn): You said: {one}" for one in asked] == answers


async def test_the_local_model_answers(local_live: Live) -> None:
    """A real model answers a server."""
    async with connected(local_live, "auto", "default") as client:
        # At no temperature: what a small model draws by chance is often wrong.
        question = "What is the capital of France?"
        answer = await result_of(client, "answer", question, temperature=0)

    assert "Paris" in answer
