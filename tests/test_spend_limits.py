"""Limits and budgets: what is set aside, what is settled, what is refused and in which words."""

import asyncio
import calendar
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from harperpy import ConfigError, Context, HarperError, RequestTarget, Resource
from harperpy.limits import duration
from harperpy.rules import period
from harperpy.testing import (
    Answer,
    RunningServer,
    ScriptedUpstream,
    chunk,
    running,
    streamed,
    whole,
)
from helpers import HELLO, Answered, ask, finished_calls, openai_client, provider

CHAT = "/v1/chat/completions"
# A token costs a thousandth; the upstream counts 3 for what is asked and 1 for the answer.
PRICES = "prices: [{model: gpt-4o-mini, input: 1000, output: 1000, embedding: 1000}]\n"
A_CALL = 4
STORES = pytest.mark.parametrize("store", ["memory", "database", "valkey"], indirect=True)


def limited(url: str, *rules: str, more: str = PRICES, store: str = "memory") -> str:
    """A config.yaml in front of an upstream, with these rules."""
    listed = ", ".join(rules)
    return f"{provider(url)}\n{more}limits: {{store: '{store}', rules: [{listed}]}}\n"


@asynccontextmanager
async def serving(
    upstream: ScriptedUpstream, *rules: str, more: str = PRICES, store: str = "memory"
) -> AsyncIterator[tuple[RunningServer, str]]:
    """A server with these rules, and the key of a user who is no super user."""
    config = limited(upstream.url, *rules, more=more, store=store)
    async with running(config) as server:
        yield server, await server.key_for("alice")


async def chat(server: RunningServer, key: str | None = None, **more: Any) -> Answered:
    """A short chat."""
    return await ask(server, "POST", CHAT, key=key, json={**HELLO, **more})


async def until_refused(server: RunningServer, key: str, **more: Any) -> Answered:
    """Ask until it is not admitted."""
    async with asyncio.timeout(20):
        while 200 == (answer := await chat(server, key, **more)).status:
            pass
    return answer


def code(answer: Answered) -> str:
    """The code of a refusal."""
    found: str = answer.json["error"]["code"]
    return found


@STORES
async def test_a_rate_of_requests_is_kept(upstream: ScriptedUpstream, store: str) -> None:
    """Three a minute: the fourth is a 429 in OpenAI's words, with a true time to come again."""
    rule = "{per: user, requestsPerMinute: 3}"
    async with serving(upstream, rule, store=store) as (server, key):
        answers = [await chat(server, key) for _ in range(4)]

        assert [200, 200, 200, 429] == [answer.status for answer in answers]
        remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert ["2", "1", "0", "0"] == remaining
        assert {"3"} == {answer.headers["x-ratelimit-limit-requests"] for answer in answers}
        assert "20s" == answers[0].headers["x-ratelimit-reset-requests"]
        error = answers[3].json["error"]
        assert ("requests", "rate_limit_exceeded") == (error["type"], error["code"])
        assert error["message"].startswith(
            "Rate limit reached for user alice on requests per min (RPM): Limit 3. Please try again"
        )
        wait = int(answers[3].headers["retry-after-ms"])
        assert 0 < wait <= 20_000
        assert -(-wait // 1000) == int(answers[3].headers["Retry-After"])
        # Neither a row nor a request upstream.
        assert (3, 3) == (len(await server.rows()), len(upstream.requests))


@asynccontextmanager
async def asked_once(
    upstream: ScriptedUpstream, store: str
) -> AsyncIterator[tuple[RunningServer, str, Callable[[float], None]]]:
    """A server with one request a minute, a key that has just made it, and what moves its clock."""
    rule = "{per: user, requestsPerMinute: 1}"
    async with serving(upstream, rule, store=store) as (server, key):
        limits = server.server.core.billing.limits
        now = limits.clock()
        limits.clock = lambda: now

        def move(seconds: float) -> None:
            nonlocal now
            now += seconds

        assert 200 == (await chat(server, key)).status
        yield server, key, move


@STORES
async def test_a_refused_caller_who_comes_again_in_time_is_answered(
    upstream: ScriptedUpstream, store: str
) -> None:
    """`retry-after-ms` is the truth: a moment before it is refused, then it is not."""
    async with asked_once(upstream, store) as (server, key, move):
        assert "60000" == (await chat(server, key)).headers["retry-after-ms"]
        move(59.9)
        assert "100" == (await chat(server, key)).headers["retry-after-ms"]
        move(0.1)
        assert 200 == (await chat(server, key)).status


@pytest.mark.parametrize("store", ["memory", "database"])
async def test_a_clock_that_is_set_back_lets_nobody_wait_for_its_old_time(
    upstream: ScriptedUpstream, store: str
) -> None:
    """A rate that was used up an hour later by the clock of before is used up no more."""
    async with asked_once(upstream, store) as (server, key, move):
        move(-3600)
        assert 200 == (await chat(server, key)).status
        assert "60000" == (await chat(server, key)).headers["retry-after-ms"]
        move(60)
        assert 200 == (await chat(server, key)).status


@STORES
async def test_a_rate_of_tokens_is_settled(upstream: ScriptedUpstream, store: str) -> None:
    """What is set aside is a guess; what counts in the end is what the call took."""
    rule = "{per: user, tokensPerMinute: 1000}"
    async with serving(upstream, rule, store=store) as (server, key):
        limits = server.server.core.billing.limits
        now = limits.clock()
        limits.clock = lambda: now
        first = await chat(server, key, max_tokens=900)
        # "hello" is guessed at five tokens.
        assert "95" == first.headers["x-ratelimit-remaining-tokens"]
        second = await chat(server, key, max_tokens=900)
        assert str(1000 - A_CALL - 905) == second.headers["x-ratelimit-remaining-tokens"]
        assert "1000" == second.headers["x-ratelimit-limit-tokens"]


async def test_a_rate_of_tokens_refuses(upstream: ScriptedUpstream) -> None:
    """More than there is waits; more than there ever will be is said to be too large."""
    rule = "{per: user, tokensPerMinute: 100}"
    async with serving(upstream, rule) as (server, key):
        usage = {"prompt_tokens": 3, "completion_tokens": 90}
        upstream.script(Answer(body={**whole("Hello"), "usage": usage}))
        assert 200 == (await chat(server, key, max_tokens=90)).status
        refused = await chat(server, key, max_tokens=90)
        assert (429, "tokens") == (refused.status, refused.json["error"]["type"])
        assert 40 < int(refused.headers["Retry-After"]) <= 60
        long = [{"role": "user", "content": "many words " * 100}]
        large = await chat(server, key, messages=long)
        assert "Request too large for user alice on tokens per min (TPM)" in large.text
        assert "false" == large.headers["x-should-retry"]
        assert "Retry-After" not in large.headers


async def test_what_a_caller_is_answered_is_learnt(upstream: ScriptedUpstream) -> None:
    """Without `max_tokens`, as much is set aside as this caller's answers usually have."""
    rule = "{per: user, tokensPerMinute: 100000}"
    async with serving(upstream, rule) as (server, key):
        limits = server.server.core.billing.limits
        now = limits.clock()
        limits.clock = lambda: now
        left = [int((await chat(server, key)).headers["x-ratelimit-remaining-tokens"])]
        left += [int((await chat(server, key)).headers["x-ratelimit-remaining-tokens"])]

        assert 100_000 - 5 - 256 == left[0]
        assert left[0] < left[1]


@STORES
async def test_so_many_at_a_time(upstream: ScriptedUpstream, store: str) -> None:
    """A place is free again when its call has ended, and not before."""
    rule = "{per: user, concurrent: 1}"
    async with serving(upstream, rule, store=store) as (server, key):
        upstream.script(Answer(events=streamed("one", done=False), hang="end"))
        async with (
            server.session(key) as client,
            client.post(CHAT, json={**HELLO, "stream": True}) as running_one,
        ):
            await running_one.content.readuntil(b"\n\n")
            refused = await chat(server, key)
            assert (429, "rate_limit_exceeded") == (refused.status, code(refused))
            assert "Too many calls of user alice at a time: Limit 1." in refused.text
            assert "1" == refused.headers["Retry-After"]
            assert 200 == (await chat(server)).status
        async with asyncio.timeout(10):
            while 200 != (await chat(server, key)).status:
                pass


@STORES
@pytest.mark.parametrize("budget", [f"tokens: {10 * A_CALL}", f"cost: {10 * A_CALL / 1000}"])
async def test_parallel_calls_never_overdraw_a_budget(
    upstream: ScriptedUpstream, store: str, budget: str
) -> None:
    """Fifty at once on a budget for ten: no more is spent than there is, the rest is 429."""
    rule = f"{{per: user, match: alice, budget: {{{budget}}}}}"
    async with serving(upstream, rule, store=store) as (server, key):
        answers = await asyncio.gather(*(chat(server, key, max_tokens=1) for _ in range(50)))

        assert {200, 429} == {answer.status for answer in answers}
        refused = {code(answer) for answer in answers if answer.status == 429}
        assert refused <= {"rate_limit_exceeded", "insufficient_quota"}
        last = await until_refused(server, key, max_tokens=1)
        assert await spent(server) <= 10 * A_CALL
        assert len(upstream.requests) == len(await server.rows())
        assert "held" in last.text or "insufficient_quota" == code(last)


async def spent(server: RunningServer) -> int:
    """All tokens of all rows."""
    rows = await server.rows()
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


@STORES
async def test_a_budget_is_one_of_the_ledger(
    upstream: ScriptedUpstream, tmp_path: Path, store: str
) -> None:
    """What is spent stays spent after a new start; the refusal is in OpenAI's words."""
    rule = "{per: user, match: alice, budget: {cost: 0.1}}"
    config = limited(upstream.url, rule, store=store)
    usage = {"prompt_tokens": 50, "completion_tokens": 46}
    upstream.script(Answer(body={**whole("Hello"), "usage": usage}))
    async with running(config, root=tmp_path) as server:
        key = await server.key_for("alice")
        assert 200 == (await chat(server, key)).status
    async with running(config, root=tmp_path) as server:
        refused = await chat(server, key)
        assert 200 == (await chat(server)).status

    error = refused.json["error"]
    assert (429, "insufficient_quota") == (refused.status, error["type"])
    assert "insufficient_quota" == error["code"]
    assert error["message"].startswith(
        "You exceeded your current quota, please check your plan and billing details"
    )
    assert "false" == refused.headers["x-should-retry"]
    today = datetime.now(UTC)
    days = calendar.monthrange(today.year, today.month)[1]
    end = datetime(today.year, today.month, days, 23, 59, 59, tzinfo=UTC)
    assert abs(int(refused.headers["Retry-After"]) - (end - today).total_seconds()) < 60


FAILURES: dict[str, dict[str, Any]] = {
    "refused": {"status": 400, "body": {"error": {"message": "no"}}},
    "broken": {"status": 500, "body": {"error": {"message": "no"}}},
    "cut off": {"cut": "head"},
    "no JSON": {"body": b"<html>"},
    "a stream without a piece": {"events": [], "cut": True},
}


@STORES
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_failed_call_gives_back_what_it_held(
    upstream: ScriptedUpstream, store: str, failure: dict[str, Any]
) -> None:
    """The whole budget and the place are there for the next one, and its answer has the headers."""
    rule = "{per: user, concurrent: 1, requestsPerMinute: 60, budget: {tokens: 40}}"
    async with serving(upstream, rule, store=store) as (server, key):
        upstream.script(Answer(**failure))
        failed = await chat(server, key, max_tokens=19, stream="events" in failure)
        assert failed.status >= 400
        assert "59" == failed.headers["x-ratelimit-remaining-requests"]
        assert 200 == (await chat(server, key, max_tokens=19)).status
        assert [19, 19] == [request.body["max_tokens"] for request in upstream.requests]


@STORES
async def test_a_stream_that_is_left_settles_what_it_brought(
    upstream: ScriptedUpstream, store: str
) -> None:
    """Not what it might have brought, and not nothing."""
    rule = "{per: user, budget: {tokens: 60}, concurrent: 5}"
    async with serving(upstream, rule, store=store) as (server, key):
        pieces = [chunk({"content": "word "}) for _ in range(20)]
        upstream.script(Answer(events=pieces, hang="end"))
        async with (
            server.session(key) as client,
            client.post(CHAT, json={**HELLO, "stream": True, "max_tokens": 35}) as response,
        ):
            for _ in pieces:
                await response.content.readuntil(b"\n\n")
        await upstream.left.wait()
        while not (rows := await server.rows()):
            pass
        assert ("aborted", 20) == (rows[0]["error_code"], rows[0]["completion_tokens"])
        # 25 of 60 are gone: there is room for 9 tokens after 21 for "hello", and for no 30.
        answers = [await chat(server, key, max_tokens=wanted) for wanted in (30, 2)]
        assert [14, 2] == [asked.body["max_tokens"] for asked in upstream.requests[1:]]
        assert [200, 200] == [answer.status for answer in answers]


@STORES
@pytest.mark.parametrize("stream", ["whole", "stream"])
async def test_who_leaves_before_the_first_token_has_spent_the_prompt(
    upstream: ScriptedUpstream, store: str, stream: str
) -> None:
    """Its provider has read it: otherwise a budget would be passed by leaving early."""
    rule = "{per: user, budget: {tokens: 60}, concurrent: 5}"
    async with serving(upstream, rule, store=store) as (server, key):
        upstream.script(Answer(hang="head"))
        body = {**HELLO, "stream": stream == "stream", "max_tokens": 35}
        async with server.session(key) as client:
            waiting = asyncio.create_task(client.post(CHAT, json=body))
            await upstream.asked.wait()
            waiting.cancel()
            await upstream.left.wait()
        while not (rows := await server.rows()):
            pass
        assert ("aborted", 5) == (rows[0]["error_code"], rows[0]["prompt_tokens"])
        # 55 are left: 34 after the 21 that "hello" may be.
        assert 200 == (await chat(server, key, max_tokens=40)).status
        assert 34 == upstream.requests[1].body["max_tokens"]


async def test_a_budget_bounds_the_answer(upstream: ScriptedUpstream) -> None:
    """`max_tokens` goes upstream: as asked, what is left, or what every model can answer."""
    rule = "{per: user, match: alice, budget: {tokens: 10000}}"
    async with serving(upstream, rule) as (server, key):
        for more in ({}, {"max_tokens": 7}, {"max_tokens": 99_999}):
            assert 200 == (await chat(server, key, **more)).status

        asked = [request.body["max_tokens"] for request in upstream.requests]
        assert [4096, 7] == asked[:2]
        assert 10_000 - 2 * A_CALL - 21 == asked[2]
        assert 200 == (await chat(server)).status
        assert "max_tokens" not in upstream.requests[3].body


async def test_a_model_whose_longest_answer_is_known_is_not_bounded(
    upstream: ScriptedUpstream,
) -> None:
    """`maxOutput` is set aside, and nothing is sent as long as that is left."""
    table = "prices: [{model: '*', maxOutput: 500}]\n"
    rule = "{per: user, budget: {tokens: 525}}"
    async with serving(upstream, rule, more=table) as (server, key):
        for _ in range(3):
            assert 200 == (await chat(server, key)).status

        first, second, third = (request.body for request in upstream.requests)
        assert "max_tokens" not in first
        assert "max_tokens" not in second
        assert 525 - 2 * A_CALL - 21 == third["max_tokens"]


@STORES
@pytest.mark.parametrize("kind", ["day", "month"])
async def test_a_new_period_has_a_new_budget(
    upstream: ScriptedUpstream, kind: str, store: str
) -> None:
    """Used up is used up until the day or month is over, as `Retry-After` says."""
    rule = f"{{per: user, budget: {{tokens: 25, period: {kind}}}}}"
    async with serving(upstream, rule, store=store) as (server, key):
        limits = server.server.core.billing.limits
        now = limits.clock()
        limits.clock = lambda: now
        assert 200 == (await chat(server, key)).status
        await server.rows()
        refused = await chat(server, key)
        assert "insufficient_quota" == code(refused)
        rest = int(refused.headers["retry-after-ms"]) / 1000
        assert period(kind, now)[2] == pytest.approx(now + rest, abs=0.01)
        now += rest - 0.1
        assert "insufficient_quota" == code(await chat(server, key))
        now += 0.2
        assert 200 == (await chat(server, key)).status


@pytest.mark.parametrize(
    ("kind", "now", "expected"),
    [
        ("day", "2027-01-31T23:59:00", ("2027-01-31", "2027-01-31", "2027-02-01")),
        ("day", "2027-02-01T00:00:00", ("2027-02-01", "2027-02-01", "2027-02-02")),
        ("month", "2027-02-28T12:00:00", ("2027-02-01", "2027-02-28", "2027-03-01")),
        ("month", "2028-02-28T12:00:00", ("2028-02-01", "2028-02-29", "2028-03-01")),
        ("month", "2027-12-31T23:59:59", ("2027-12-01", "2027-12-31", "2028-01-01")),
    ],
)
def test_days_and_months_are_those_of_the_calendar(
    kind: str, now: str, expected: tuple[str, str, str]
) -> None:
    """In UTC, whatever the machine's own zone is."""
    first, last, end = period(kind, datetime.fromisoformat(f"{now}+00:00").timestamp())

    assert (*expected[:2], datetime.fromisoformat(f"{expected[2]}T00:00+00:00").timestamp()) == (
        first,
        last,
        end,
    )


async def test_a_price_that_nobody_knows_is_said(upstream: ScriptedUpstream) -> None:
    """Neither free nor blocked in silence: the model and what is missing are named."""
    rule = "{per: user, match: alice, budget: {cost: 5}}"
    async with serving(upstream, rule, more="") as (server, key):
        refused = await chat(server, key)
        assert (403, "price_unknown") == (refused.status, code(refused))
        assert (
            "The budget of user alice is one of money, and nobody knows what the model "
            "'gpt-4o-mini' costs: the price table has no input and no output price for "
            "'gpt-4o-mini'."
        ) == refused.json["error"]["message"]
        body = {"model": "default", "input": "a"}
        embedding = await ask(server, "POST", "/v1/embeddings", key=key, json=body)
        assert "no embedding price" in embedding.text
        assert 200 == (await chat(server)).status
        assert 1 == len(upstream.requests)


async def test_a_rule_may_allow_what_has_no_price(upstream: ScriptedUpstream) -> None:
    """Then it costs the budget nothing, and its row has no cost."""
    rule = "{per: user, budget: {cost: 0, unknownPrice: allow}}"
    async with serving(upstream, rule, more="") as (server, key):
        assert 200 == (await chat(server, key)).status
        assert [None] == [row["cost"] for row in await server.rows()]


async def test_free_models_answer_who_has_nothing_left(upstream: ScriptedUpstream) -> None:
    """Asked for by name, or by falling back from one that costs."""
    models = provider(upstream.url, "fallback: [free]").replace(
        "generative:", "generative:\n    free: {backend: echo, model: free}", 1
    )
    models = models.replace("embedding:", "embedding:\n    free: {backend: echo}")
    table = (
        "prices: [{model: gpt-4o-mini, input: 1, output: 1}, {model: free, input: 0, output: 0}]"
    )
    rules = "limits: {rules: [{per: user, budget: {cost: 0}}]}"
    async with running(f"{models}\n{table}\n{rules}") as server:
        key = await server.key_for("alice")
        assert "hello" == (await chat(server, key)).json["choices"][0]["message"]["content"]
        assert 200 == (await chat(server, key, model="free")).status
        assert [("free", 0.0), ("free", 0.0)] == [
            (row["backend_name"], row["cost"]) for row in await server.rows()
        ]
        assert [] == upstream.requests


def spared(upstream: ScriptedUpstream) -> str:
    """The models of a provider that have a spare one to fall back to."""
    models = provider(upstream.url, "fallback: [spare]").replace(
        "generative:", "generative:\n    spare: {backend: echo}", 1
    )
    return models.replace("embedding:", "embedding:\n    spare: {backend: echo}")


async def test_a_limit_of_a_model_lets_another_answer(upstream: ScriptedUpstream) -> None:
    """It is as its provider's 429: what it falls back to is tried, and no row tells of it."""
    models = spared(upstream)
    rules = "limits: {rules: [{per: model, match: default, requestsPerMinute: 1}]}"
    async with running(f"{models}\n{rules}") as server:
        said = [(await chat(server)).json["choices"][0]["message"]["content"] for _ in range(2)]
        assert ["Hello world", "hello"] == said
        assert 2 == len(await server.rows())
        refused = await chat(server, model="gpt-4o-mini")
        assert 200 == refused.status


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ("{per: user, match: alice, requestsPerMinute: 1}", True),
        ("{per: user, match: 'a*', requestsPerMinute: 1}", True),
        ("{per: user, match: bob, requestsPerMinute: 1}", False),
        ("{per: tenant, match: default, requestsPerMinute: 1}", True),
        ("{per: tenant, match: acme, requestsPerMinute: 1}", False),
        ("{per: model, match: 'gpt-4o*', requestsPerMinute: 1}", True),
        ("{per: model, match: default, requestsPerMinute: 1}", True),
        ("{per: model, match: gpt-5, requestsPerMinute: 1}", False),
        ("{per: backend, match: openai, requestsPerMinute: 1}", True),
        ("{per: backend, match: local, requestsPerMinute: 1}", False),
        ("{per: user, model: gpt-4o-mini, requestsPerMinute: 1}", True),
        ("{per: user, model: gpt-5, requestsPerMinute: 1}", False),
    ],
)
async def test_whom_a_rule_is_about(upstream: ScriptedUpstream, rule: str, *, counts: bool) -> None:
    """A name or a pattern of users, tenants, models, kinds of backend; or some models only."""
    async with serving(upstream, rule) as (server, key):
        answers = [await chat(server, key) for _ in range(2)]

        assert [200, 429 if counts else 200] == [answer.status for answer in answers]
        assert counts == ("x-ratelimit-limit-requests" in answers[0].headers)


async def test_a_key_has_limits_of_its_own(upstream: ScriptedUpstream) -> None:
    """By its id: another key of the same user is another one."""
    async with serving(upstream) as (server, first):
        made = await server.operate("add_api_key", name="second", username="alice")
        limits = {"requests_per_minute": 1, "budget": {"tokens": 100}}
        await server.operate("set_limits", scope="key", name=made["id"], **limits)

        keys = (first, first, made["api_key"], made["api_key"])
        assert [200, 200, 200, 429] == [(await chat(server, key)).status for key in keys]


async def test_a_limit_by_the_name_of_a_key_is_refused(upstream: ScriptedUpstream) -> None:
    """A limit that would hold for no key is not stored, and the id that was meant is told."""
    async with serving(upstream) as (server, _):
        made = await server.operate("add_api_key", name="laptop", username="alice")
        limits = {"scope": "key", "requests_per_minute": 1}
        told: list[str] = []
        for name in ("laptop", "desktop"):
            with pytest.raises(HarperError) as refused:
                await server.operate("set_limits", name=name, **limits)
            told.append(str(refused.value))
        await server.operate("set_limits", name="*", **limits)

    expected = "name: expected the id of an API key (see list_api_keys)"
    assert f"{expected}: the id of laptop is {made['id']}" in told[0]
    assert expected in told[1]
    assert made["id"] not in told[1]


async def test_a_limit_of_the_configuration_that_holds_for_no_key_is_told(
    upstream: ScriptedUpstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names its place and the id that was meant; ids and patterns are fine."""
    async with running(root=tmp_path) as server:
        made = await server.operate("add_api_key", name="laptop")
    rates = [
        f"{{per: key, match: '{match}', requestsPerMinute: 1}}"
        for match in (made["id"], "hp*", "laptop")
    ]

    async with running(limited(upstream.url, *rates), root=tmp_path):
        pass

    [told] = [line for line in caplog.messages if "limits.rules" in line]
    expected = "config.yaml: limits.rules[2].match: expected the id of an API key"
    assert told.startswith(expected)
    assert made["id"] in told


@STORES
async def test_nothing_is_admitted_that_nobody_can_count(
    upstream: ScriptedUpstream, store: str
) -> None:
    """A budget that cannot be read is 503, and the provider hears nothing; others are answered."""
    rule = "{per: user, match: alice, budget: {tokens: 100}}"
    async with serving(upstream, rule, store=store) as (server, key):
        statement = text("ALTER TABLE hdb_model_calls_daily RENAME TO away")
        await server.server.core.database.run(lambda connection: connection.execute(statement))
        refused = await chat(server, key)
        assert (503, "1") == (refused.status, refused.headers["Retry-After"])
        assert "daily" not in refused.text
        assert [] == upstream.requests


@STORES
async def test_who_leaves_while_it_is_admitted_holds_nothing(
    upstream: ScriptedUpstream, store: str
) -> None:
    """What was taken for nobody is given back."""
    rule = "{per: model, concurrent: 1, budget: {tokens: 1000}}"
    async with serving(upstream, rule, store=store) as (server, _):
        core = server.server.core
        go_on = threading.Event()
        busy = core.database.submit(lambda _: go_on.wait(10))
        asking = asyncio.ensure_future(core.models.generate("hello"))
        for _ in range(5):
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go_on.set()
        await asyncio.wrap_future(busy)
        async with asyncio.timeout(10):
            while 200 != (await chat(server)).status:
                pass
        assert 1 == len(upstream.requests)


@STORES
async def test_embeddings_are_of_a_budget_too(upstream: ScriptedUpstream, store: str) -> None:
    """Texts are bounded by their bytes, arrays of tokens are what they are."""
    rule = "{per: user, budget: {tokens: 10}}"
    async with serving(upstream, rule, store=store) as (server, key):
        given: list[Any] = ["eleven byte", "ten bytes!", [[1, 2, 3], [4, 5, 6, 7]], [[1] * 9]]
        found = [
            (
                await ask(
                    server,
                    "POST",
                    "/v1/embeddings",
                    key=key,
                    json={"model": "default", "input": one},
                )
            ).status
            for one in given
        ]
        # The upstream counts one for each; three are gone before the last.
        assert [429, 200, 200, 429] == found


async def test_each_name_has_a_limit_for_itself(upstream: ScriptedUpstream) -> None:
    """What one user takes is not missing to another."""
    async with serving(upstream, "{per: user, requestsPerMinute: 1}") as (server, key):
        other = await server.key_for("bob")

        assert [200, 429, 200] == [(await chat(server, one)).status for one in (key, key, other)]


async def test_those_of_a_tenant_share_its_limit(upstream: ScriptedUpstream) -> None:
    """And take nothing of another tenant's."""
    async with serving(upstream, "{per: tenant, requestsPerMinute: 1}") as (server, key):
        mate = await server.key_for("bob")
        stranger = await server.key_for("carol", tenant="acme")

        assert [200, 429, 200] == [(await chat(server, k)).status for k in (key, mate, stranger)]


async def test_a_call_counts_once_however_many_are_asked(upstream: ScriptedUpstream) -> None:
    """What a provider fails at and another one answers is one of the caller's requests."""
    models = spared(upstream)
    rules = "limits: {rules: [{per: user, match: alice, requestsPerMinute: 9}]}"
    async with running(f"{models}\n{rules}") as server:
        key = await server.key_for("alice")
        upstream.script(Answer(status=500), Answer(status=500))
        answers = [await chat(server, key) for _ in range(2)]
        assert ["8", "7"] == [one.headers["x-ratelimit-remaining-requests"] for one in answers]
        assert 4 == len(await server.rows())


class Writer(Resource):
    """An application's own way to a model."""

    @staticmethod
    async def get(target: RequestTarget, context: Context) -> Any:
        """Ask as the path says."""
        if target.id == "embed":
            return await context.models.embed("hello")
        if target.id == "stream":
            return [one.delta_content async for one in context.models.generate_stream("hello")]
        return (await context.models.generate("hello")).content

    sub_paths = True


DOORS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "chat": ("POST", CHAT, HELLO),
    "streamed chat": ("POST", CHAT, {**HELLO, "stream": True}),
    "embeddings": ("POST", "/v1/embeddings", {"model": "default", "input": "hello"}),
    "a resource's": ("GET", "/writer/whole", None),
    "a resource's stream": ("GET", "/writer/stream", None),
    "a resource's embedding": ("GET", "/writer/embed", None),
}


@pytest.mark.parametrize(("method", "path", "body"), DOORS.values(), ids=DOORS)
async def test_no_door_leads_past_a_limit(
    upstream: ScriptedUpstream, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """Whoever asks a model by whichever path is counted, and told so in the headers."""
    rule = "{per: user, requestsPerMinute: 1, tokensPerMinute: 9000}"
    async with running(limited(upstream.url, rule), resources={"writer": Writer}) as server:
        began = time.monotonic()
        first, refused = [await ask(server, method, path, json=body) for _ in range(2)]
        least = 59 - (time.monotonic() - began)
        assert [200, 429] == [first.status, refused.status]
        assert "Rate limit reached for user HDB_ADMIN on requests per min" in refused.text
        assert least <= int(refused.headers["Retry-After"]) <= 60
        for answer in (first, refused):
            assert {
                f"x-ratelimit-{what}-{kind}"
                for what in ("limit", "remaining", "reset")
                for kind in ("requests", "tokens")
            } == {name.lower() for name in answer.headers if name.lower().startswith("x-ratelimit")}
            assert "0" == answer.headers["x-ratelimit-remaining-requests"]
            left = answer.headers["x-ratelimit-reset-requests"]
            told = re.fullmatch(r"1m0s|(\d+(?:\.\d+)?)s", left)
            assert told is not None
            assert least <= float(told[1] or 60) <= 60
        assert 1 == len(upstream.requests)


async def test_the_tightest_of_several_rules_is_told(upstream: ScriptedUpstream) -> None:
    """A refusal by any of them is one, and the headers are those of the one with least left."""
    rules = ("{per: user, requestsPerMinute: 5}", "{per: tenant, requestsPerMinute: 2}")
    async with serving(upstream, *rules) as (server, key):
        answers = [await chat(server, key) for _ in range(3)]

        assert [200, 200, 429] == [answer.status for answer in answers]
        assert ["1", "0", "0"] == [
            answer.headers["x-ratelimit-remaining-requests"] for answer in answers
        ]
        assert "tenant default" in answers[2].text


@pytest.mark.parametrize("loose_first", [True, False])
@pytest.mark.parametrize(
    ("tight", "loose"),
    [
        ("budget: {cost: 0.02}", "budget: {cost: 20}"),
        ("budget: {tokens: 20}", "budget: {tokens: 20000}"),
        ("concurrent: 1", "concurrent: 100"),
        ("budget: {cost: 20}", "budget: {cost: 0.02, unknownPrice: allow}"),
    ],
)
async def test_of_several_rules_for_one_name_the_tightest_holds(
    upstream: ScriptedUpstream, tight: str, loose: str, *, loose_first: bool
) -> None:
    """In whichever order they stand: the one for everybody is not lifted by one's own."""
    rules = [f"{{per: user, match: '*', {tight}}}", f"{{per: user, match: alice, {loose}}}"]
    unpriced = "allow" in loose
    prices = "prices: [{model: other, input: 1000}]\n" if unpriced else PRICES
    ordered = reversed(rules) if loose_first else rules
    async with serving(upstream, *ordered, more=prices) as (server, key):
        if "concurrent" in tight:
            upstream.script(Answer(hang="head"))
            first = asyncio.ensure_future(chat(server, key))
            await upstream.asked.wait()
            refused = await chat(server, key)
            upstream.released.set()
            await first
        else:
            *_, refused = [await chat(server, key, max_tokens=1) for _ in range(6)]

    assert (403 if unpriced else 429) == refused.status
    assert len(upstream.requests) < 6


async def test_streams_and_embeddings_carry_the_headers(upstream: ScriptedUpstream) -> None:
    """Before the first piece, as OpenAI's own client finds them."""
    rule = "{per: user, requestsPerMinute: 60, tokensPerMinute: 90000}"
    async with serving(upstream, rule) as (server, key), openai_client(server, key) as client:
        made = await client.chat.completions.with_raw_response.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        async for _ in made.parse():
            pass
        assert "59" == made.headers["x-ratelimit-remaining-requests"]
        vectors = await client.embeddings.with_raw_response.create(model="default", input="a")
        assert "90000" == vectors.headers["x-ratelimit-limit-tokens"]
        assert 6 == len([name for name in vectors.headers if name.startswith("x-ratelimit-")])


async def test_who_has_no_limit_is_told_of_none(server: RunningServer) -> None:
    """No header, and nothing is kept."""
    answer = await chat(server, model="echo")

    assert 200 == answer.status
    assert [] == [name for name in answer.headers if name.lower().startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.012, "12ms"),
        (0.017, "17ms"),
        (0.0004, "1ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90061.25, "25h1m1.25s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    """`6m0s`, `1s`, `12ms`."""
    assert text == duration(seconds)


async def test_limits_are_set_listed_and_dropped(upstream: ScriptedUpstream) -> None:
    """By operations, in force at once, beside config.yaml's, and each change is audited."""
    async with serving(upstream, "{per: tenant, requestsPerMinute: 100}") as (server, key):
        operate = server.operate
        await operate("set_limits", scope="user", name="alice", requests_per_minute=1)
        budget = {"cost": 2.5, "period": "day", "unknown_price": "allow"}
        await operate("set_limits", scope="user", name="*", model="gpt-5*", budget=budget)
        assert [200, 429] == [(await chat(server, key)).status for _ in range(2)]
        assert [
            {"scope": "tenant", "name": "*", "requests_per_minute": 100, "source": "config.yaml"},
            {"scope": "user", "name": "*", "model": "gpt-5*", "budget": budget, "source": "stored"},
            {"scope": "user", "name": "alice", "requests_per_minute": 1, "source": "stored"},
        ] == await operate("list_limits")
        await operate("set_limits", scope="user", name="alice", requests_per_minute=5)
        assert 200 == (await chat(server, key)).status
        await operate("drop_limits", scope="user", name="alice")
        answer = await chat(server, key)
        assert "100" == answer.headers["x-ratelimit-limit-requests"]
        with pytest.raises(HarperError, match="there are no stored limits for user 'alice'"):
            await operate("drop_limits", scope="user", name="alice")
        audit = await operate("read_audit_log", table="hdb_limit")
        assert ["delete", "upsert", "upsert", "upsert"] == [row["operation"] for row in audit]
        assert 1 == audit[1]["original_records"][0]["requestsPerMinute"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scope": "user", "name": "a"}, "expected requests_per_minute, tokens_per_minute"),
        ({"scope": "user", "name": "a", "budget": {}}, "budget: expected tokens or cost"),
        ({"scope": "planet", "name": "a", "concurrent": 1}, "Invalid enum value 'planet'"),
        (
            {"scope": "user", "name": "a", "budget": {"cost": 1, "period": "week"}},
            "budget.period: Invalid enum value 'week'; expected day, month",
        ),
        (
            {"scope": "user", "name": "a", "budget": {"costs": 1}},
            "unknown field `costs`; did you mean 'cost'?",
        ),
        ({"scope": "user", "name": "a", "concurrent": 0}, "concurrent"),
        ({"scope": "user", "name": "a", "rpm": 1}, "rpm"),
        ({"scope": "user", "name": "a", "tokens_per_minute": 10**310}, "tokens_per_minute"),
        ({"scope": "user", "name": "a", "budget": {"tokens": 2**63}}, "budget.tokens"),
    ],
)
async def test_limits_that_cannot_be_are_refused(
    server: RunningServer, given: dict[str, Any], said: str
) -> None:
    """With what was expected."""
    with pytest.raises(HarperError, match=said):
        await server.operate("set_limits", **given)
    assert [] == await server.operate("list_limits")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("{store: memory}\nhttp: {workers: 2}", "limits.store: memory is each process's own"),
        (
            "{rules: [{per: user}]}",
            "limits.rules[0]: it limits nothing; expected requests",
        ),
        ("{rules: [{per: user, budget: {}}]}", "limits.rules[0].budget: expected tokens or cost"),
    ],
)
async def test_a_configuration_that_cannot_be_is_refused(limits: str, said: str) -> None:
    """At the start, in one sentence."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        async with running(f"limits: {limits}"):
            pass


async def test_a_place_for_each_answer(upstream: ScriptedUpstream) -> None:
    """`n` answers are bounded by what is left for all of them."""
    rule = "{per: user, budget: {tokens: 121}}"
    async with serving(upstream, rule) as (server, key):
        await chat(server, key, n=4)

        assert [25] == [request.body["max_tokens"] for request in upstream.requests[:1]]


async def test_a_busy_server_reads_a_budget_once(upstream: ScriptedUpstream) -> None:
    """Calls under other limits that end while the ledger is read do not make it read again."""
    rules = ["{per: user, match: bob, requestsPerMinute: 1000, budget: {tokens: 10000}}"]
    rules += ["{per: user, match: alice, budget: {tokens: 100}}"]
    async with serving(upstream, *rules) as (server, key):
        bob = await server.key_for("bob")
        assert 200 == (await chat(server, bob)).status
        store: Any = server.server.core.billing.limits.store
        counted, reads = store._spent, 0

        async def busy(spending: Any) -> int:
            nonlocal reads
            reads += 1
            found: int = await counted(spending)
            assert 200 == (await chat(server, bob)).status
            return found

        store._spent = busy
        async with asyncio.timeout(20):
            assert 200 == (await chat(server, key, max_tokens=1)).status
        assert 1 == reads


async def test_calls_that_end_while_their_budget_is_read_count_once(
    upstream: ScriptedUpstream,
) -> None:
    """Whether the number held them or not; those that come meanwhile wait, so it is read soon."""
    rule = "{per: user, match: alice, budget: {tokens: 1000}}"
    async with serving(upstream, rule) as (server, key), server.session(key) as client:
        ended = finished_calls(server)
        upstream.script(*(Answer(events=streamed("one", done=False), hang="end"),) * 2)
        body = {**HELLO, "stream": True, "max_tokens": 30}
        running_ones = [await client.post(CHAT, json=body) for _ in range(2)]
        for one in running_ones:
            await one.content.readuntil(b"\n\n")
        store: Any = server.server.core.billing.limits.store
        counted, reads = store._spent, 0

        async def disturbed(spending: Any) -> int:
            nonlocal reads
            reads += 1
            found: int = await counted(spending)
            if running_ones:
                running_ones.pop().close()
                await ended.get()
            return found

        store._spent = disturbed
        store.forget()
        asking = [chat(server, key, max_tokens=1) for _ in range(4)]
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*asking)
        assert [200] * 4 == [answer.status for answer in answers]
        assert 3 == reads
        total = await spent(server)
        assert 200 == (await chat(server, key, max_tokens=1000)).status
        assert 1000 - 21 - total == upstream.requests[-1].body["max_tokens"]


async def test_a_reprice_is_a_new_reckoning(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """A budget that wrong prices used up is there again once they are right."""
    rule = "{per: user, budget: {cost: 0.03}}"
    table = "prices: [{model: gpt-4o-mini, input: %s, output: %s}]\n"
    dear, cheap = (limited(upstream.url, rule, more=table % (one, one)) for one in (1000, 10))
    async with running(dear, root=tmp_path) as server:
        key = await server.key_for("alice")
        refused = await until_refused(server, key)
        assert "insufficient_quota" == code(refused)
        spent_then = sum(row["cost"] for row in await server.rows())
    async with running(cheap, root=tmp_path) as server:
        day = datetime.now(UTC).date().isoformat()
        left = f"{0.03 - spent_then:.3f}"
        assert float(left) < 0.022
        done = await server.operate("reprice", **{"from": day, "to": day})
        assert done.changed == done.rows > 0
        assert 200 == (await chat(server, key, max_tokens=2000)).status
        assert 2000 == upstream.requests[-1].body["max_tokens"]


@pytest.mark.parametrize("column", ["tenant", "user", "api_key"])
async def test_what_was_spent_is_found_among_many(tmp_path: Path, column: str) -> None:
    """By an index, in a file of before too: other names' days are not read."""
    async with running(root=tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute(f"DROP INDEX hdb_model_calls_daily_{column}")
        database.execute("PRAGMA user_version = 10")
    async with running(root=tmp_path):
        pass

    with closing(sqlite3.connect(tmp_path / "system.db")) as database:
        sums = f"SELECT sum(cost) FROM hdb_model_calls_daily WHERE {column} = 'one'"  # noqa: S608
        asked = f"EXPLAIN QUERY PLAN {sums} AND day BETWEEN '2026-11-01' AND '2026-11-30'"
        plan = database.execute(asked).fetchall()
    assert f"hdb_model_calls_daily_{column} ({column}=? AND day>? AND day<?)" in plan[0][-1]
