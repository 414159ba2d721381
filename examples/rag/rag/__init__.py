"""Answers from documents: embeddings in a table, answers streamed with citations."""

from harperpy import Scope

from .chat import chat
from .documents import documents
from .store import Store


async def handle_application(scope: Scope) -> None:
    store = await Store.open(scope.database)
    scope.resources.set("rag/documents", documents(store))
    scope.resources.set("rag/chat/completions", chat(store))
