"""The OpenAI-compatible gateway's Resources."""

from .chat_completions import V1ChatCompletions
from .embeddings import V1Embeddings
from .models import V1Models
from .unknown import V1Unknown

__all__ = ["V1ChatCompletions", "V1Embeddings", "V1Models", "V1Unknown"]
