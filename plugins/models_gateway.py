"""The OpenAI-compatible gateway, mounted as any plugin mounts its resources."""

from harperpy import Scope

from ..resources.models.v1 import V1ChatCompletions, V1Embeddings, V1Models, V1Unknown


def handle_application(scope: Scope) -> None:
    """Mount the three endpoints, and what answers for all other paths beneath /v1."""
    scope.resources.set("v1/embeddings", V1Embeddings)
    scope.resources.set("v1/chat/completions", V1ChatCompletions)
    scope.resources.set("v1/models", V1Models)
    scope.resources.set("v1", V1Unknown)
