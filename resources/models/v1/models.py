"""GET /v1/models and /v1/models/{id}: the names callers may use. Ids may contain slashes."""

from __future__ import annotations

from functools import lru_cache

import msgspec
from multidict import istr

from harperpy import (
    Context,
    ModelInfo,
    ModelNotFound,
    RequestTarget,
    Response,
    json_response,
)

from .errors import OpenAIResource

_JSON: dict[str, str] = {istr("Content-Type"): "application/json"}


class _Model(msgspec.Struct, omit_defaults=True, gc=False):
    """A model as OpenAI tells of it; a description and a state where there is something to say."""

    id: str
    object: str
    created: int
    owned_by: str
    description: str | None = None
    state: str = "ready"


class _Models(msgspec.Struct, gc=False):
    """A list of them."""

    object: str
    data: list[_Model]


class V1Models(OpenAIResource):
    """OpenAI's list of models, and one of it."""

    sub_paths = True

    @staticmethod
    def get(target: RequestTarget, context: Context) -> Response:
        """All models, or the one the path names. Raises `ModelNotFound`."""
        listed = context.models.list()
        if target.id is None:
            response = Response(200, _JSON)
            response.body = _encoded(tuple(listed))
            return response
        for info in listed:
            if info.id == target.id:
                return json_response(200, _model(info))
        message = f"The model `{target.id}` does not exist or you do not have access to it."
        raise ModelNotFound(message)


@lru_cache(maxsize=8)
def _encoded(listed: tuple[ModelInfo, ...]) -> bytes:
    """A list in JSON: the same for all who may use the same models, until one changes."""
    return msgspec.json.encode(_Models("list", [_model(info) for info in listed]))


def _model(info: ModelInfo) -> _Model:
    about = info.about
    if about:
        about += f"; for real work point models.{info.kind}.default at a provider"
    return _Model(info.id, "model", info.created, info.owned_by, about or None, info.state)
