"""POST /v1/embeddings: vectors as floats, or as base64, which OpenAI's own clients ask for."""

from __future__ import annotations

from typing import cast

from harperpy import (
    Body,
    Context,
    Contract,
    EmbedInput,
    InvalidBody,
    RequestTarget,
    Response,
    json_response,
)

from .answers import embedding_list
from .errors import OpenAIResource
from .reading import Reader
from .schema import EmbeddingRequest

_MOST_INPUTS = 2048
_read = Reader(EmbeddingRequest).read


class V1Embeddings(OpenAIResource):
    """OpenAI's embeddings, on any model."""

    schemas = {"post": Contract(body=EmbeddingRequest)}  # noqa: RUF012  # nobody changes it

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> Response:
        """A list of embeddings, in the order of the inputs."""
        request, options = await _read(data)
        if request.user is not None:
            options["user"] = request.user
        if request.encoding_format == "float":
            # A provider is asked for what its client asks for, and for floats by nobody else.
            options["encoding_format"] = "float"
        result = await context.models.embed_with_usage(
            _input(request),
            model=request.model,
            dimensions=request.dimensions,
            encoding_format=request.encoding_format or "float",
            provider_options=options,
        )
        return json_response(200, embedding_list(request, result))


def _input(request: EmbeddingRequest) -> EmbedInput:
    """What to embed. Raises `InvalidBody` for more than OpenAI takes; an array alone is one."""
    given = request.input
    if len(given) > _MOST_INPUTS and isinstance(given, list) and not isinstance(given[0], int):
        message = (
            "Invalid 'input': array too long. "
            f"Expected an array with maximum length {_MOST_INPUTS}."
        )
        raise InvalidBody(message, param="input", code="array_above_max_length")
    return cast("EmbedInput", given)
