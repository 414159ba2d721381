"""Which models a caller may ask: those of the role, wherever in a call they stand."""

from typing import Any

import pytest

from harperpy import Body, Context, RequestTarget, Resource
from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer
from helpers import HELLO, ask, error_of

MODELS = """
models:
  generative:
    default: {{backend: openai, model: gpt-4o-mini, baseUrl: "{url}", maxRetries: 0}}
    large: {{backend: openai, model: gpt-5, baseUrl: "{url}", maxRetries: 0, fallback: [echo]}}
    any-*: {{backend: openai, baseUrl: "{url}", maxRetries: 0}}
    echo: {{backend: echo}}
  embedding:
    default: {{backend: openai, model: embed-1, baseUrl: "{url}", maxRetries: 0}}
    echo: {{backend: echo}}
"""
NOT_YOURS = "The model `{}` does not exist or you do not have access to it."


async def key_with(server: RunningServer, models: list[str] | None) -> str:
    """The key of a user whose role has these models."""
    permission: dict[str, Any] = {"resources": {"v1/*": ["read", "create"], "lab": ["create"]}}
    if models is not None:
        permission["models"] = models
    await server.operate("add_role", role="asker", permission=permission)
    return await server.key_for("ada", role="asker")


GRANTED = [
    (None, "gpt-5", 200),
    ([], "large", 404),
    (["large"], "large", 200),
    (["large"], "gpt-5", 200),
    (["large"], "default", 404),
    (["large"], None, 404),
    (["large"], "echo", 404),
    (["large"], "any-thing", 404),
    (["gpt-*"], None, 200),
    (["gpt-*"], "gpt-4o-mini", 200),
    (["gpt-*"], "large", 200),
    (["gpt-*"], "gpt-unheard-of", 404),
    (["any-one"], "any-one", 200),
    (["any-one"], "any-other", 404),
    (["any-*"], "any-other", 200),
    (["*"], "echo", 200),
]


@pytest.mark.parametrize(("models", "asked", "status"), GRANTED)
async def test_a_role_asks_its_models_by_each_of_their_names(
    upstream: ScriptedUpstream, models: list[str] | None, asked: str | None, status: int
) -> None:
    """Any other does not exist for it, in OpenAI's words, whether there is one or not.

    Nor does it for having been asked by someone who may.
    """
    body = {"messages": HELLO["messages"], **({"model": asked} if asked else {})}
    async with running(MODELS.format(url=upstream.url)) as server:
        await ask(server, "POST", "/v1/chat/completions", json=body)
        key = await key_with(server, models)
        async with (
            server.session(key) as client,
            client.post("/v1/chat/completions", json=body) as response,
        ):
            assert status == response.status
            if status == 404:
                error = await error_of(response)
                assert NOT_YOURS.format(asked or "default") == error["message"]
                assert ("model_not_found", "model") == (error["code"], error["param"])


WAYS: list[tuple[list[str], dict[str, int]]] = [
    (["large"], {"whole": 200, "stream": 200, "embedding": 404}),
    (["embed-*"], {"whole": 404, "stream": 404, "embedding": 200}),
    ([], {"whole": 404, "stream": 404, "embedding": 404}),
]


@pytest.mark.parametrize(("models", "expected"), WAYS)
async def test_streams_and_embeddings_are_asked_by_the_same_grants(
    upstream: ScriptedUpstream, models: list[str], expected: dict[str, int]
) -> None:
    """Nothing is streamed that is refused whole."""
    chat = {"messages": HELLO["messages"], "model": "large"}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "whole": ("chat/completions", chat),
        "stream": ("chat/completions", {**chat, "stream": True}),
        "embedding": ("embeddings", {"model": "embed-1", "input": "hello"}),
    }
    async with running(MODELS.format(url=upstream.url)) as server:
        key = await key_with(server, models)
        got = {
            way: (await ask(server, "POST", f"/v1/{path}", key=key, json=body)).status
            for way, (path, body) in bodies.items()
        }

    assert expected == got


LISTED = [
    (None, {"default", "large", "echo", "gpt-4o-mini", "gpt-5", "embed-1"}),
    (["large"], {"large", "gpt-5"}),
    (["gpt-*"], {"default", "gpt-4o-mini", "large", "gpt-5"}),
    (["echo"], {"echo"}),
    ([], set[str]()),
]


@pytest.mark.parametrize(("models", "expected"), LISTED)
async def test_the_listing_holds_what_the_caller_may_use(
    upstream: ScriptedUpstream, models: list[str] | None, expected: set[str]
) -> None:
    """One that is not listed is 404 by its name too, as one that is not there."""
    async with running(MODELS.format(url=upstream.url)) as server:
        key = await key_with(server, models)
        listed = (await ask(server, "GET", "/v1/models", key=key)).json["data"]
        everything = (await ask(server, "GET", "/v1/models")).json["data"]
        alone = {
            model["id"]: (await ask(server, "GET", f"/v1/models/{model['id']}", key=key))
            for model in everything
        }

    assert expected == {model["id"] for model in listed}
    assert expected == {name for name, answer in alone.items() if answer.status == 200}
    for name, answer in alone.items():
        if name not in expected:
            assert (404, NOT_YOURS.format(name)) == (answer.status, answer.json["error"]["message"])


@pytest.mark.parametrize(("models", "status"), [(["large"], 503), (["large", "echo"], 200)])
async def test_a_fallback_that_the_role_does_not_have_is_skipped(
    upstream: ScriptedUpstream, models: list[str], status: int
) -> None:
    """The failure of the model that was asked for is told instead."""
    upstream.script(Answer(status=503))
    async with running(MODELS.format(url=upstream.url)) as server:
        key = await key_with(server, models)
        answer = await ask(
            server, "POST", "/v1/chat/completions", key=key, json={**HELLO, "model": "large"}
        )

    assert status == answer.status


class Lab(Resource):
    """Asks a model for whoever calls."""

    public = True

    @staticmethod
    async def post(target: RequestTarget, data: Body, context: Context) -> dict[str, Any]:
        """What the model says, and which there are."""
        await context.models.embed("one", model="echo")
        result = await context.models.generate("hello", model="echo")
        return {"said": result.content, "models": [one.id for one in context.models.list()]}


async def test_a_plugins_handler_asks_with_the_rights_of_its_caller(
    upstream: ScriptedUpstream,
) -> None:
    """Whoever is not known, on what is open to anyone, asks as the server itself does."""
    async with running(MODELS.format(url=upstream.url), resources={"lab": Lab}) as server:
        key = await key_with(server, ["large"])
        mine = await ask(server, "POST", "/lab", key=key)
        anyones = await ask(server, "POST", "/lab", key="")
        admins = await ask(server, "POST", "/lab")

    assert (404, NOT_YOURS.format("echo")) == (mine.status, mine.json["detail"])
    assert 200 == anyones.status
    assert admins.json == anyones.json
