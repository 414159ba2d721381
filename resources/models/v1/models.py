"""GET /v1/models and /v1/models/{id}: the names callers may use. Ids may contain slashes."""

from __future__ import annotations

from typing import Any

from harperpy import (
    Context,
    ModelInfo,
    ModelNotFound,
    RequestTarget,
    Response,
    json_response,
)

from .errors import OpenAIResource


class V1Models(OpenAIResource):
    """OpenAI's list of models, and one of it."""

    sub_paths = True

    @staticmethod
    def get(target: RequestTarget, context: Context) -> Response:
        """All models, or the one the path names. Raises `ModelNotFound`."""
        listed = context.models.list()
        if target.id is None:
            return json_response(200, {"object": "list", "data": [_model(info) for info in listed]})
        for info in listed:
            if info.id == target.id:
                return json_response(200, _model(info))
        message = f"The model `{target.id}` does not exist or you do not have access to it."
        raise ModelNotFound(message)


def _model(info: ModelInfo) -> dict[str, Any]:
    model: dict[str, Any] = {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "owned_by": info.owned_by,
    }
    if info.about:
        model["description"] = (
            f"{info.about}; for real work point models.{info.kind}.default at a provider"
        )
    if info.state != "ready":
        model["state"] = info.state
    return model
