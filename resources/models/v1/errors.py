"""How the gateway words a refusal: OpenAI's error envelope, on every path of its mounts."""

from __future__ import annotations

from typing import Any

from harperpy import SSE, Context, HarperError, Resource, Response, json_response, openai_error


class OpenAIResource(Resource):
    """A Resource whose refusals OpenAI clients understand."""

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """`{"error": {message, type, param, code}}` with the error's own status."""
        return json_response(error.status, openai_error(error), error.headers)

    @staticmethod
    def present_stream_error(error: HarperError, context: Context) -> Any:
        """The same envelope as the last event of a stream; no `[DONE]` follows it."""
        return SSE(data=openai_error(error))
