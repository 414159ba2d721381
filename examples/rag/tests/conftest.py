import openai
import pytest

from harperpy.testing import with_echo


@pytest.fixture
def harper_config(harper_config):
    """No model is loaded, and none is paid for: echo answers with the question."""
    return with_echo(harper_config)


@pytest.fixture
async def chat(harper_server):
    """An OpenAI client of the documents."""
    url = f"{harper_server.url}/rag"
    client = openai.AsyncOpenAI(base_url=url, api_key=harper_server.api_key, max_retries=0)
    async with client:
        yield client.chat.completions


@pytest.fixture
def add(harper_client):
    """Adds a document."""

    async def add(title, text):
        return await harper_client.post("/rag/documents", json={"title": title, "text": text})

    return add
