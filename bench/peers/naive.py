"""What a first gateway looks like: FastAPI and OpenAI's client, pydantic on both sides.

UPSTREAM=http://127.0.0.1:29100 uvicorn naive:app
"""

import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from pydantic import BaseModel


class Message(BaseModel):
    """A turn of the chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """What a chat asks."""

    model: str
    messages: list[Message]
    temperature: float | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    user: str | None = None


class EmbeddingRequest(BaseModel):
    """What is to be embedded."""

    model: str
    input: str | list[str]
    encoding_format: str | None = None


client = AsyncOpenAI(base_url=f"{os.environ['UPSTREAM']}/v1", api_key="bench", max_retries=0)
app = FastAPI()
MODEL = {"id": "mock-model", "object": "model", "created": 1700000000, "owned_by": "bench"}


# A first one names no type of what it answers: FastAPI would then take a shorter way.
@app.get("/v1/models", response_model=None)
async def models() -> dict[str, Any]:
    """The models."""
    return {"object": "list", "data": [MODEL]}


@app.post("/v1/chat/completions")
async def chat(request: ChatRequest) -> Response:
    """A chat, streamed or not."""
    asked = request.model_dump(exclude_none=True)
    if not request.stream:
        del asked["stream"]
        answer = await client.chat.completions.create(**asked)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def events() -> AsyncIterator[str]:
        async for chunk in await client.chat.completions.create(**asked):
            yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/v1/embeddings")
async def embeddings(request: EmbeddingRequest) -> Response:
    """Embeddings."""
    answer = await client.embeddings.create(**request.model_dump(exclude_none=True))
    return Response(answer.model_dump_json(), media_type="application/json")
