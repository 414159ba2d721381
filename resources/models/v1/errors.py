"""How the gateway words a refusal: OpenAI's error envelope, on every path of its mounts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from multidict import istr

from harperpy import SSE, Context, HarperError, Resource, Response, json_response, openai_error

# The version of the API that OpenAI's answers have named since its beginning.
_VERSION = "2020-10-01"
_TOLD_VERSION, _TOLD_MS = istr("openai-version"), istr("openai-processing-ms")


class OpenAIErrorDetail(msgspec.Struct):
    """What went wrong, and which parameter is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(msgspec.Struct):
    """A refusal as OpenAI words it."""

    error: OpenAIErrorDetail


class OpenAIResource(Resource):
    """A Resource whose refusals OpenAI clients understand."""

    # Anthropic's clients and Azure's.
    api_key_headers = ("x-api-key", "api-key")
    # Longer than a provider may take for its first byte, so that its silence is still a status.
    first_item_wait = 70.0
    error_type = OpenAIError
    # Each model has a time limit of its own, and reasoning takes long.
    time_limit = 0.0

    @staticmethod
    def present_headers(context: Context) -> Mapping[str, str]:
        """The API's version, and the milliseconds until the head of this answer."""
        taken = (time.perf_counter() - context.started) * 1000
        return {_TOLD_VERSION: _VERSION, _TOLD_MS: str(round(taken))}

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """`{"error": {message, type, param, code}}` with the error's own status."""
        if error.status == 405:
            error.code = "method_not_supported"
        return json_response(error.status, openai_error(error), error.headers)

    @staticmethod
    def present_stream_error(error: HarperError, context: Context) -> Any:
        """The same envelope as the last event of a stream; no `[DONE]` follows it."""
        return SSE(data=openai_error(error))
