"""Models as operations: `list_models`, and `test_model`, which asks one."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harperpy import HarperError, NoParameters, Scope, mask

_LONGEST = 500


class TestModel(msgspec.Struct, forbid_unknown_fields=True):
    """The model to ask, by the name that callers use; `default` if none is given."""

    model: str | None = None
    kind: Literal["generative", "embedding"] = "generative"
    prompt: Annotated[str, Meta(min_length=1, max_length=2000)] = "Say OK."
    max_tokens: Annotated[int, Meta(ge=1, le=256)] = 16


def add_operations(scope: Scope) -> None:
    """Offer them to super users."""
    models = ModelOperations(scope)
    scope.operations.add("list_models", models.list, NoParameters, reads=True)
    scope.operations.add("test_model", models.test, TestModel)


class ModelOperations:
    """Operations on models."""

    def __init__(self, scope: Scope) -> None:
        self._models = scope.models

    async def list(self) -> list[Any]:
        """The models by the names that callers use, with who answers."""
        return [*self._models.list()]

    async def test(self, request: TestModel) -> dict[str, Any]:
        """What a model answers to a short prompt, and in what time; a call like any other."""
        started = time.perf_counter()
        try:
            told = await self._asked(request)
        except HarperError as error:
            told = {
                "success": False,
                "status": error.status,
                "code": error.code,
                "error": _why(error),
            }
        return {**told, "latency_ms": round((time.perf_counter() - started) * 1000, 1)}

    async def _asked(self, request: TestModel) -> dict[str, Any]:
        if request.kind == "embedding":
            embedded = await self._models.embed_with_usage(request.prompt, model=request.model)
            return {
                "success": True,
                "dimensions": len(embedded.vectors[0]),
                "usage": embedded.usage,
            }
        answer = await self._models.generate(
            request.prompt, model=request.model, max_tokens=request.max_tokens
        )
        return {
            "success": True,
            "text": (answer.content or "")[:_LONGEST],
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
        }


def _why(error: HarperError) -> str:
    """What any caller is told, and of a failure what the log says: the operator may know it."""
    told, noted = error.public_message, error.logged
    return told if error.status < 500 or noted == told else f"{told} ({mask(noted)})"
