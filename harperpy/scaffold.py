"""A new project: config, a resource, a plugin with a model of its own, and their tests."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError

_FILES = {
    "config.yaml": """\
models:
  generative:
    default: {backend: echo}  # or: {backend: openai, model: gpt-4o-mini, apiKey: "${OPENAI_API_KEY}"}
plugins:
  shout: {path: plugins/shout.py}
""",  # noqa: E501  # as long as a reader needs it
    "resources.py": """\
from harperpy import Resource, get_context, openai_stream


class Greeting(Resource):
    public = {"read"}

    @staticmethod
    async def get(target):
        return {"hello": target.get("name", "world")}


class Ask(Resource):
    path = "ask/chat/completions"

    @staticmethod
    async def post(target, data):
        body = await data
        chunks = get_context().models.generate_stream(body, model=body["model"])
        async for message in openai_stream(chunks, model=body["model"]):
            yield message
""",
    "plugins/shout.py": """\
from harperpy import define_backend


async def answer(prompt):
    for word in prompt.text.split():
        yield word.upper() + " "


def handle_application(scope):
    scope.models.register_backend("generative", "shout", define_backend("shout", generate_stream=answer))
""",  # noqa: E501
    "tests/test_project.py": """\
async def test_greeting(harper_client):
    answer = await harper_client.get("/Greeting?name=Ada")
    assert await answer.json() == {"hello": "Ada"}


async def test_shout(harper_client):
    body = {"model": "shout", "messages": [{"role": "user", "content": "hello"}]}
    answer = await (await harper_client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "HELLO "
""",
    "pytest.ini": """\
[pytest]
addopts = -p harperpy.testing
pythonpath = .
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
""",
}


def write_project(folder: Path) -> None:
    """Write the files. Raises `ConfigError` if the folder holds anything already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message = f"{folder} exists and is not empty"
        raise ConfigError(message)
    for name, text in _FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
