"""POST /v1/embeddings: vectors as floats, or as base64, which OpenAI's own clients ask for."""

from __future__ import annotations

from typing import Any

import msgspec

from harperpy import Body, Context, RequestTarget

from .answers import embedding_list, texts
from .errors import OpenAIResource
from .schema import EmbeddingRequest
from .wording import read

_REQUEST = msgspec.json.Decoder(EmbeddingRequest)


class V1Embeddings(OpenAIResource):
    """OpenAI's embeddings, on any model."""

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> dict[str, Any]:
        """A list of embeddings, in the order of the inputs."""
        request = await read(data, _REQUEST)
        result = await context.models.embed_with_usage(
            texts(request), model=request.model, dimensions=request.dimensions
        )
        return embedding_list(request, result)
