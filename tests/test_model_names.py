"""Which model a name means, and which names are listed: exact ones, and what patterns stand for."""

import asyncio
import gc
import tracemalloc
from collections.abc import Sequence
from typing import Any, cast

import openai
import pytest
from harperpy.plugins.openai import OpenAI
from harperpy.plugins.openai_names import ServedNames

from harperpy import (
    ConfigError,
    GenerateOpts,
    GenerateResult,
    ModelBackend,
    Prompt,
    Scope,
    define_backend,
)
from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer, listing
from helpers import HELLO, ask, error_of, openai_client, until

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
KEY = "made-up-key-of-the-provider"
CONFIG = """
models:
  generative:
    default: {{backend: openai, model: base, baseUrl: "{url}"}}
    gpt-*: {{backend: openai, apiKey: made-up-key-of-the-provider, baseUrl: "{url}"{more}}}
    gpt-4o: {{backend: openai, model: exact, baseUrl: "{url}"}}
    o?-mini: {{backend: openai, model: renamed, baseUrl: "{url}"}}
"""
EXACT = ["default", "base", "gpt-4o", "exact", "renamed"]


def config(url: str, more: str = "") -> str:
    """A provider at `url` under names of every sort."""
    return CONFIG.format(url=url, more=more)


def names_of(server: RunningServer, name: str = "gpt-*") -> ServedNames:
    """What the backend of a pattern knows of its provider."""
    [backend] = [one.backend for one in server.server.routes if one.name == name]
    return cast("OpenAI", backend).names


async def fetched(server: RunningServer) -> None:
    """Wait for the fetch that is under way, however it ends."""
    async with asyncio.timeout(30):
        task = names_of(server)._task
        assert task
        await asyncio.wait([task])


def grow_old(server: RunningServer) -> None:
    """Let a minute and a second pass since the last fetch, without waiting."""
    names = names_of(server)
    now = names._old_at + 1
    names.clock = lambda: now


def under_way() -> int:
    """How many fetches of names there are."""
    return sum(task.get_name().startswith("names of ") for task in asyncio.all_tasks())


async def listed(server: RunningServer) -> list[str]:
    """The ids that GET /v1/models answers with."""
    async with asyncio.timeout(30):
        return [model["id"] for model in (await ask(server, "GET", MODELS)).json["data"]]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"model": "gpt-4o"}, "exact"),
        ({"model": "exact"}, "exact"),
        ({"model": "gpt-4o-mini"}, "gpt-4o-mini"),
        ({"model": "gpt-oss/20b"}, "gpt-oss/20b"),
        ({"model": "o3-mini"}, "renamed"),
        ({"model": "default"}, "base"),
        ({"model": None}, "base"),
        ({}, "base"),
    ],
)
async def test_a_name_goes_where_it_fits_best(
    upstream: ScriptedUpstream, asked: dict[str, Any], sent: str
) -> None:
    """Exact names come before patterns; a pattern passes the asked name on, or its `model:`."""
    async with running(config(upstream.url)) as server:
        body = {"messages": HELLO["messages"], **asked}
        answer = await ask(server, "POST", CHAT, json=body)

    assert 200 == answer.status
    assert [sent] == [request.body["model"] for request in upstream.requests]


@pytest.mark.parametrize("name", ["GPT-5", "o33-mini", "claude", "defaul"])
async def test_an_unknown_name_is_not_the_default(upstream: ScriptedUpstream, name: str) -> None:
    """`default` stands for an absent name only: another one is 404 and goes nowhere."""
    async with (
        running(config(upstream.url)) as server,
        server.session() as client,
        client.post(CHAT, json={**HELLO, "model": name}) as response,
    ):
        error = await error_of(response)

    assert (404, "model_not_found", "model") == (response.status, error["code"], error["param"])
    assert [] == upstream.requests


async def test_a_name_as_long_as_a_body_is_not_kept() -> None:
    """A pattern stands for any name, but for none of that length; what asks for it is let go."""
    long = 200_000
    async with running("models: {generative: {'*': {backend: echo}}}") as server:
        await ask(server, "POST", CHAT, json={**HELLO, "model": "short"})
        tracemalloc.start()
        try:
            for at in range(20):
                answer = await ask(server, "POST", CHAT, json={**HELLO, "model": "x" * (long + at)})
                assert 404 == answer.status
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert held < 5 * long


@pytest.mark.parametrize(
    ("entry", "asked", "sent"),
    [
        ("default: {{{first}, model: gpt-5, fallback: [gpt-*]}}", None, "gpt-5"),
        ("mine: {{{first}, model: gpt-5, fallback: [gpt-*]}}", "mine", "gpt-5"),
        ("'*': {{{first}, fallback: [gpt-*]}}", "claude", "claude"),
    ],
)
async def test_a_pattern_as_fallback_is_asked_for_the_same_model(
    upstream: ScriptedUpstream, entry: str, asked: str | None, sent: str
) -> None:
    """What the first provider was asked for is what the second one is: never the pattern itself."""
    upstream.script(Answer(status=500))
    provider = f'backend: openai, maxRetries: 0, baseUrl: "{upstream.url}"'
    first = entry.format(first=provider)
    async with running(f"models: {{generative: {{{first}, gpt-*: {{{provider}}}}}}}") as server:
        answer = await ask(server, "POST", CHAT, json={**HELLO, "model": asked})

    assert 200 == answer.status
    assert [sent, sent] == [request.body["model"] for request in upstream.requests]


async def test_a_pattern_is_listed_by_what_its_upstream_lists(upstream: ScriptedUpstream) -> None:
    """Those names that fit it and are no exact ones, as ours: owner and time do not change."""
    upstream.models = listing("gpt-5", "gpt-4o", "claude", "gpt-oss/20b", "o3-mini", "gpt-5")
    async with running(config(upstream.url)) as server:
        await fetched(server)
        first = (await ask(server, "GET", MODELS)).json["data"]
        again = (await ask(server, "GET", MODELS)).json["data"]

    assert [*EXACT, "gpt-5", "gpt-oss/20b"] == [model["id"] for model in first]
    assert first == again
    assert {("openai", first[0]["created"])} == {
        (model["owned_by"], model["created"]) for model in first
    }
    assert [f"Bearer {KEY}"] == [request.headers["Authorization"] for request in upstream.listed]


async def test_what_a_pattern_is_listed_by_can_be_retrieved(upstream: ScriptedUpstream) -> None:
    """Every listed id can be asked for, with slashes too; one that is not listed is 404."""
    upstream.models = listing("gpt-5", "gpt-oss/20b:free")
    async with running(config(upstream.url)) as server, openai_client(server) as client:
        await fetched(server)
        models = [model async for model in client.models.list()]
        retrieved = [await client.models.retrieve(model.id) for model in models]
        plain = await ask(server, "GET", f"{MODELS}/gpt-oss/20b:free")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-6")

    assert [*EXACT, "gpt-5", "gpt-oss/20b:free"] == [model.id for model in models]
    assert models == retrieved
    assert "gpt-oss/20b:free" == plain.json["id"]


GOOD = {"id": "gpt-good"}


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ([], []),
        ([GOOD, GOOD], ["gpt-good"]),
        ([None, 5, "gpt-text", [], ["gpt-list"], {}, GOOD], ["gpt-good"]),
        ([{"id": None}, {"id": 5}, {"id": ""}, {"id": ["gpt-list"]}, GOOD], ["gpt-good"]),
        ([{"id": "gpt-" + "x" * 252}, {"id": "gpt-" + "x" * 253}], ["gpt-" + "x" * 252]),
        ([{"id": "gpt-a\nb"}, {"id": "gpt-\x00"}, {"id": "gpt-\u202e"}, GOOD], ["gpt-good"]),
        ([{"id": "gpt-\u00e9 x", "owned_by": 5}], ["gpt-\u00e9 x"]),
        ([{"id": f"gpt-{at}"} for at in range(6_000)], [f"gpt-{at}" for at in range(5_000)]),
        (b'{"data": [{"id": "gpt-\xff"}, {"id": "gpt-good"}], "x": "\xff"}', ["gpt-good"]),
    ],
)
async def test_what_can_be_no_name_is_passed_over(
    upstream: ScriptedUpstream, data: Any, names: list[str]
) -> None:
    """A provider may list anything: only short printable names are shown, and not endlessly."""
    upstream.models = Answer(body=data if isinstance(data, bytes) else {"data": data})
    async with running(config(upstream.url)) as server:
        await fetched(server)

        assert [*EXACT, *names] == await listed(server)


@pytest.mark.parametrize("hang", ["head", "body", "end"])
async def test_nobody_waits_for_an_upstream_that_hangs(
    upstream: ScriptedUpstream, hang: Any
) -> None:
    """The list answers while the upstream still does not; stopping hangs up on it."""
    upstream.models = listing("gpt-5")
    upstream.models.hang = hang
    async with running(config(upstream.url)) as server:
        assert EXACT == await listed(server)
        assert 1 == under_way()
        await until(lambda: upstream.listed != [])
    async with asyncio.timeout(30):
        await upstream.left.wait()

    assert 0 == under_way()


TROUBLES: dict[str, tuple[Answer, str]] = {
    "refused": (Answer(status=401, body={"error": {"message": KEY}}), "it answered 401"),
    "unknown": (Answer(status=404, body={"error": {"message": KEY}}), "it answered 404"),
    "broken": (Answer(status=500, body=b"no"), "it answered 500"),
    "moved": (Answer(status=302, headers={"Location": "/v2"}, body=b""), "it answered 302"),
    "late": (Answer(hang="head"), "it did not answer in time"),
    "stalled": (Answer(hang="body"), "it did not answer in time"),
    "no JSON": (Answer(body=b"<html>"), "DecodeError"),
    "no text": (Answer(body=b'{"data": [{"id": "gpt-\\ud800"}]}'), "DecodeError"),
    "no object": (Answer(body=["gpt-5"]), "ValidationError"),
    "no data": (Answer(body={"models": []}), "ValidationError"),
    "no list": (Answer(body={"data": {"id": "gpt-5"}}), "ValidationError"),
    "deep": (Answer(body=b'{"data": ' + b"[" * 100_000), "RecursionError"),
    "large": (Answer(body=b" " * (2 << 20) + b'{"data": []}'), "an answer of more than 2097152"),
    "cut off": (Answer(headers={"Content-Length": "99"}, body=b"{", cut=True), "the connection"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_an_upstream_without_a_list_leaves_the_exact_names(
    upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """Whatever it answers, the rest is listed; the reason is logged without what it said."""
    upstream.models, reason = TROUBLES[trouble]
    limits = ", firstByteTimeoutMs: 50, idleTimeoutMs: 50" if upstream.models.hang else ""
    async with running(config(upstream.url, limits)) as server:
        await fetched(server)
        assert EXACT == await listed(server)

    [record] = [one for one in caplog.records if one.name == "harperpy.plugins.openai"]
    assert f"models.generative.gpt-*: the provider's list of models cannot be had ({reason}" in (
        record.getMessage()
    )
    assert KEY not in caplog.text


async def test_an_upstream_that_is_down_leaves_the_exact_names(
    deaf_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing needs to run behind a pattern for the list to answer."""
    async with running(config(f"http://127.0.0.1:{deaf_port}/v1")) as server:
        await fetched(server)
        assert EXACT == await listed(server)

    assert "ConnectionRefusedError" in caplog.text


async def test_old_names_are_shown_while_new_ones_are_fetched(upstream: ScriptedUpstream) -> None:
    """Whoever reads a list older than a minute gets it, and has begun one new fetch by that."""
    upstream.models = listing("gpt-old")
    async with running(config(upstream.url)) as server:
        await fetched(server)
        upstream.models = listing("gpt-new")
        assert [*EXACT, "gpt-old"] == await listed(server)
        assert 0 == under_way()

        grow_old(server)
        assert [*EXACT, "gpt-old"] == await listed(server)
        await fetched(server)
        assert [*EXACT, "gpt-new"] == await listed(server)
        assert 0 == under_way()

    assert 2 == len(upstream.listed)


async def test_one_fetch_at_a_time(upstream: ScriptedUpstream) -> None:
    """However many read an old list while the upstream hangs, it is asked once."""
    upstream.models = listing("gpt-old")
    async with running(config(upstream.url)) as server:
        await fetched(server)
        upstream.models = Answer(hang="head")
        grow_old(server)
        lists = await asyncio.gather(*(listed(server) for _ in range(5)))

        assert [[*EXACT, "gpt-old"]] * 5 == lists
        assert 1 == under_way()


async def test_a_failed_fetch_keeps_the_names_and_is_told_once_a_reason(
    upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again when it has grown old; only a new reason is a new warning."""
    upstream.models = listing("gpt-old")
    async with running(config(upstream.url)) as server:
        await fetched(server)
        for answer in (500, 500, 401, 200, 401):
            upstream.models = listing("gpt-old") if answer == 200 else Answer(status=answer)
            grow_old(server)
            await listed(server)
            await fetched(server)
            assert [*EXACT, "gpt-old"] == await listed(server)
            assert 0 == under_way()

    told = [one.getMessage() for one in caplog.records if one.name == "harperpy.plugins.openai"]
    assert ["500", "401", "401"] == [message[-4:-1] for message in told]
    assert 6 == len(upstream.listed)


async def test_offline_nothing_is_fetched(upstream: ScriptedUpstream) -> None:
    """A server that may fetch nothing lists exact names and still asks for what callers ask."""
    async with running(config(upstream.url), offline=True) as server:
        assert 0 == under_way()
        assert EXACT == await listed(server)
        answer = await ask(server, "POST", CHAT, json={**HELLO, "model": "gpt-5"})

    assert 200 == answer.status
    assert [] == upstream.listed


async def test_only_a_pattern_that_renames_nothing_is_asked(upstream: ScriptedUpstream) -> None:
    """Exact names, patterns with a `model:` and a `default` without one need no list."""
    general = f'  embedding: {{default: {{backend: openai, baseUrl: "{upstream.url}"}}}}'
    async with running(config(upstream.url) + general) as server:
        await fetched(server)

    assert ["/v1/models"] == [request.path for request in upstream.listed]


class Shelf(ModelBackend):
    """A backend of one's own that knows what it serves."""

    def __init__(self, name: str, *names: str) -> None:
        self.name = name
        self._names = names

    def served(self) -> Sequence[str]:
        """The names it was made with."""
        return self._names

    async def generate(self, prompt: Any, opts: Any) -> GenerateResult:
        """Who answers, as what."""
        return GenerateResult(content=f"{self.name} {opts.model}")


async def test_a_name_is_listed_where_a_call_would_find_it() -> None:
    """A name that two patterns fit is the first one's; one that is exact anywhere stays so."""

    def register(scope: Scope) -> None:
        shelves = {
            "a-*": Shelf("first", "a-1", "b-1"),
            "*": Shelf("second", "a-1", "a-2", "b-2", "vector"),
        }
        for pattern, shelf in shelves.items():
            scope.models.register_backend("generative", pattern, shelf)
        scope.models.register_backend("generative", "plain", Shelf("third", "c-1"))
        vector = define_backend("fourth", embed=lambda texts: [[0.5] for _ in texts])
        scope.models.register_backend("embedding", "vector", vector)

    async with running("models: {}", handle_application=register) as server:
        models = (await ask(server, "GET", MODELS)).json["data"]
        answers = [
            (await ask(server, "POST", CHAT, json={**HELLO, "model": model["id"]})).json
            for model in models
        ]

    expected = [("plain", "third"), ("vector", "fourth"), ("a-1", "first"), ("b-2", "second")]
    assert expected == [(model["id"], model["owned_by"]) for model in models]
    assert ["third None", "second vector", "first a-1", "second b-2"] == [
        answer["choices"][0]["message"]["content"] for answer in answers
    ]


class Learner(ModelBackend):
    """Learns in `open` what its model is called and what it can do."""

    name = "learner"

    async def open(self) -> None:
        """Learn."""
        self.provider_model = "learnt"
        self.features = frozenset({"logit_bias"})

    async def generate(self, prompt: Prompt, opts: GenerateOpts) -> GenerateResult:
        """What it was asked for."""
        return GenerateResult(content=f"{opts.model} {opts.logit_bias}")


async def test_a_backend_may_learn_what_it_is_before_the_first_call() -> None:
    """What `open` settles is listed, found by its name, and asked for what it can do."""

    def register(scope: Scope) -> None:
        scope.models.register_backend("generative", "mine", Learner())
        # What is listed as long as it is not known is not what is listed then.
        assert "learnt" not in [one.id for one in scope.models.list()]

    async with running(handle_application=register) as server:
        names = await listed(server)
        body = {**HELLO, "model": "learnt", "logit_bias": {"1": 2}}
        answer = await ask(server, "POST", CHAT, json=body)

    assert {"mine", "learnt"} <= set(names)
    assert "learnt {'1': 2.0}" == answer.json["choices"][0]["message"]["content"]


async def test_a_backend_that_does_not_open_is_named() -> None:
    """The start is refused in one sentence."""

    class Broken(Learner):
        """Has nobody to learn from."""

        async def open(self) -> None:
            """Fail."""
            raise LookupError(self.name)

    def register(scope: Scope) -> None:
        scope.models.register_backend("generative", "mine", Broken())

    message = "models: generative 'mine' does not open: LookupError: learner"
    with pytest.raises(ConfigError, match=message):
        async with running(handle_application=register):
            pass


async def test_a_listing_tells_what_a_backend_says_now() -> None:
    """Its state, what people should know of it, and each name it serves; not what it said once."""
    served = ["my-first"]

    class Changing(Learner):
        """Says something new in between."""

        def served(self) -> Sequence[str]:
            """The same list, whatever is in it."""
            return served

        async def open(self) -> None:
            """Learn nothing."""

    backend = Changing()

    def register(scope: Scope) -> None:
        scope.models.register_backend("generative", "my-*", backend)

    async with running(handle_application=register) as server:
        first = await listed(server)
        served.append("my-second")
        before = (await ask(server, "GET", MODELS)).json["data"]
        backend.state, backend.about = "is tired", "It yawns"
        after = (await ask(server, "GET", MODELS)).json["data"]

    assert ["my-first"] == [name for name in first if name.startswith("my-")]
    told = [[model for model in each if model["id"].startswith("my-")] for each in (before, after)]
    for each in told:
        assert ["my-first", "my-second"] == [one["id"] for one in each]
    assert not any("state" in one or "description" in one for one in told[0])
    assert {"is tired"} == {one["state"] for one in told[1]}
    assert all(one["description"].startswith("It yawns") for one in told[1])
