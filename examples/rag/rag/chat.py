"""Questions: a chat route that any OpenAI client can use, whose answers cite their sources."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import msgspec

from harperpy import (
    Body,
    Context,
    EventStream,
    GenerateChunk,
    HarperError,
    InvalidBody,
    NotFound,
    RequestTarget,
    Resource,
    Response,
    TextPart,
    TokenUsage,
    completion_id,
    json_response,
    openai_error,
    openai_stream,
    openai_usage,
)

from .store import Passage, Store

PASSAGES = 4


class Turn(msgspec.Struct):
    """One message; `content` is text, or parts of text."""

    role: str
    content: str | list[TextPart] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Question(msgspec.Struct):
    """What is read of OpenAI's body here; all of it goes to the model."""

    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    model: str = "default"
    stream: bool = False
    stream_options: StreamOptions | None = None


def chat(store: Store) -> type[Resource]:
    class Chat(Resource):
        """Answers from the documents."""

        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> Any:
            """A `chat.completion`, or a stream of its chunks, with `annotations`."""
            asked = await data.decode(Question)
            (vector,) = await context.models.embed([text_of(asked)], input_type="query")
            sources = await store.nearest(vector, PASSAGES)
            if not sources:
                message = "there is nothing to answer from: POST a document to /rag/documents"
                raise NotFound(message, code="no_documents")
            body = {**await data, "system": instructions(sources)}
            if not asked.stream:
                return await whole(body, asked.model, sources, context)
            chunks = context.models.generate_stream(body, model=asked.model)
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            cited = with_citations(chunks, sources)
            return EventStream(openai_stream(cited, model=asked.model, include_usage=usage))

        @staticmethod
        def present_error(error: HarperError, context: Context) -> Response:
            """As OpenAI's clients expect it."""
            return json_response(error.status, openai_error(error), error.headers)

    return Chat


def text_of(asked: Question) -> str:
    """The last thing the user said."""
    for turn in reversed(asked.messages):
        if turn.role == "user" and turn.content:
            if isinstance(turn.content, str):
                return turn.content
            return "".join(part.text for part in turn.content)
    message = "messages: expected one of the user's, with text"
    raise InvalidBody(message, param="messages")


def instructions(sources: Sequence[Passage]) -> str:
    listed = "\n\n".join(
        f"[{at}] {source.title}\n{source.text}" for at, source in enumerate(sources, 1)
    )
    return (
        "Answer the user's question from these sources alone, and name those that you use by "
        f"their numbers, as in [1]. Say so if the answer is not in them.\n\n{listed}"
    )


def citations(sources: Sequence[Passage], length: int) -> list[dict[str, Any]]:
    """OpenAI's annotations, the nth for [n]: each stands for the whole answer."""
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "url": f"/rag/documents/{source.document}",
                "title": source.title,
                "start_index": 0,
                "end_index": length,
            },
        }
        for source in sources
    ]


async def with_citations(
    chunks: AsyncIterator[GenerateChunk], sources: Sequence[Passage]
) -> AsyncIterator[GenerateChunk]:
    """The chunks, and then the sources."""
    length = 0
    async for chunk in chunks:
        length += len(chunk.delta_content or "")
        yield chunk
    yield GenerateChunk(delta_annotations=citations(sources, length))


async def whole(
    body: dict[str, Any], model: str, sources: Sequence[Passage], context: Context
) -> dict[str, Any]:
    result = await context.models.generate(body, model=model)
    message = {
        "role": "assistant",
        "content": result.content,
        "annotations": citations(sources, len(result.content)),
    }
    return {
        "id": completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": result.finish_reason}],
        "usage": openai_usage(result.usage or TokenUsage()),
    }
