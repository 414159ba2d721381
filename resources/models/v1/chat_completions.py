"""POST /v1/chat/completions: whole, or as an event stream where the body says `stream`."""

from __future__ import annotations

from typing import Any

from harperpy import (
    Body,
    Context,
    Contract,
    EventStream,
    RequestTarget,
    json_response,
    openai_stream,
)

from .answers import completion
from .errors import OpenAIResource
from .reading import Reader
from .schema import ChatRequest
from .translation import to_opts, to_prompt

_read = Reader(ChatRequest).read


class V1ChatCompletions(OpenAIResource):
    """OpenAI's chat completions, on any model."""

    schemas = {"post": Contract(body=ChatRequest)}  # noqa: RUF012  # nobody changes it

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> Any:
        """A `chat.completion`, or a stream of its chunks."""
        request, extra = await _read(data)
        opts = to_opts(request, extra)
        prompt = to_prompt(request)
        if not request.stream:
            result = await context.models.generate(prompt, opts=opts)
            return json_response(200, completion(result, request))
        data.release()
        chunks = context.models.generate_stream(prompt, opts=opts)
        options = request.stream_options
        usage = bool(options and options.include_usage)
        events = openai_stream(
            chunks,
            model=request.model or "default",
            include_usage=usage,
            functions=bool(request.functions),
        )
        return EventStream(events)
