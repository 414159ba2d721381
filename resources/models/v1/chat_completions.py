"""POST /v1/chat/completions: whole, or as an event stream where the body says `stream`."""

from __future__ import annotations

from typing import Any

import msgspec

from harperpy import Body, Context, EventStream, RequestTarget, decode_json, openai_stream

from .answers import completion
from .errors import OpenAIResource
from .schema import ChatRequest
from .translation import to_opts, to_prompt
from .wording import read

_REQUEST = msgspec.json.Decoder(ChatRequest)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VALUE = msgspec.json.Decoder()


class V1ChatCompletions(OpenAIResource):
    """OpenAI's chat completions, on any model."""

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> Any:
        """A `chat.completion`, or a stream of its chunks."""
        request = await read(data, _REQUEST)
        opts = to_opts(request, _extra(await data.bytes()))
        prompt = to_prompt(request)
        if not request.stream:
            return completion(await context.models.generate(prompt, opts=opts), request)
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


def _extra(body: bytes) -> dict[str, Any]:
    """The fields that OpenAI's schema does not know: options of the provider's own."""
    fields = decode_json(body, _FIELDS)
    unknown = fields.keys() - set(ChatRequest.__struct_fields__)
    return {name: decode_json(fields[name], _VALUE) for name in unknown}
