"""Prices: what a call costs, by which version of the table, and past calls priced anew."""

from typing import Any

import pytest

from harperpy import ConfigError, ModelCall
from harperpy.config import parse_config
from harperpy.pricing import Prices
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running, whole
from helpers import HELLO, ask, provider

CHAT = "/v1/chat/completions"


def answered(**usage: Any) -> Answer:
    """A whole answer with this usage."""
    return Answer(body={**whole("Hello"), "usage": usage})


def prices(text: str) -> Prices:
    """The table that a config.yaml says."""
    return Prices(parse_config(f"prices: {text}", source="config.yaml", environ={}).prices)


def a_call(**more: Any) -> ModelCall:
    """A call of a thousand tokens that were asked."""
    known: dict[str, Any] = {
        "id": 1,
        "created": 1_800_000_000_000,
        "method": "generate",
        "model": "default",
        "backend": "openai",
        "backend_name": "default",
        "provider_model": "gpt-4o-mini",
        "prompt_tokens": 1000,
    }
    return ModelCall(**(known | more))


async def daily(server: RunningServer) -> list[dict[str, Any]]:
    """The roll-up's sums."""
    sql = "SELECT day, calls, unpriced, cost FROM system.hdb_model_calls_daily"
    rows: list[dict[str, Any]] = await server.operate("sql", sql=sql)
    return rows


COSTS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "input and output": (
        "{model: gpt-4o-mini, input: 0.15, output: 0.6}",
        {"prompt_tokens": 1000, "completion_tokens": 100},
        0.00021,
    ),
    "the cached part of a prompt": (
        "{model: gpt-4o-mini, input: 2.5, cachedInput: 1.25, output: 10}",
        {
            "prompt_tokens": 1000,
            "completion_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 400},
        },
        0.0021,
    ),
    "cached without a price of its own": (
        "{model: gpt-4o-mini, input: 2.5, output: 10}",
        {
            "prompt_tokens": 1000,
            "completion_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 400},
        },
        0.0026,
    ),
    "reasoning is output already": (
        "{model: gpt-4o-mini, input: 1, output: 1}",
        {
            "prompt_tokens": 1,
            "completion_tokens": 10,
            "completion_tokens_details": {"reasoning_tokens": 8},
        },
        0.000011,
    ),
    "a fraction of a billionth is rounded once": (
        "{model: gpt-4o-mini, input: 0.0005, output: 0}",
        {"prompt_tokens": 3, "completion_tokens": 5},
        2e-9,
    ),
    "no sum of floats": (
        "{model: gpt-4o-mini, input: 0.1, output: 0.2}",
        {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000},
        0.3,
    ),
    "free because it says so": (
        "{model: gpt-4o-mini, input: 0, output: 0}",
        {"prompt_tokens": 1000, "completion_tokens": 100},
        0.0,
    ),
    "another model's price": (
        "{model: gpt-4o, input: 1, output: 1}",
        {"prompt_tokens": 1000, "completion_tokens": 100},
        None,
    ),
    "no price of what it answered": (
        "{model: gpt-4o-mini, input: 1}",
        {"prompt_tokens": 1000, "completion_tokens": 100},
        None,
    ),
}


@pytest.mark.parametrize(("entry", "usage", "cost"), COSTS.values(), ids=COSTS)
async def test_a_row_says_what_the_call_cost(
    upstream: ScriptedUpstream, entry: str, usage: dict[str, Any], cost: float | None
) -> None:
    """To the billionth, with the version of the price; where no price is known, both are null."""
    async with running(f"{provider(upstream.url)}\nprices: [{entry}]") as server:
        upstream.script(answered(**usage))
        assert 200 == (await ask(server, "POST", CHAT, json=HELLO)).status

        [row] = await server.rows()
        (listed,) = await server.operate("list_prices")
        assert cost == row["cost"]
        assert (None if cost is None else listed["version"]) == row["price_version"]


async def test_embeddings_have_a_price_of_their_own(upstream: ScriptedUpstream) -> None:
    """What is embedded is priced by `embedding`, and by nothing else."""
    table = "prices: [{model: gpt-4o-mini, embedding: 0.02}, {model: '*', input: 1, output: 1}]"
    async with running(f"{provider(upstream.url)}\n{table}") as server:
        await ask(server, "POST", "/v1/embeddings", json={"model": "default", "input": ["a", "b"]})

        assert [4e-8] == [row["cost"] for row in await server.rows()]


async def test_a_call_without_tokens_has_no_cost(upstream: ScriptedUpstream) -> None:
    """Of a call that failed before anything was counted, nobody says what it cost."""
    table = "prices: [{model: '*', input: 1, output: 1}]"
    async with running(f"{provider(upstream.url)}\n{table}") as server:
        upstream.script(Answer(status=400, body={"error": {"message": "no"}}))
        await ask(server, "POST", CHAT, json=HELLO)

        assert [(None, None)] == [
            (row["cost"], row["price_version"]) for row in await server.rows()
        ]


WINNERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "a name before a pattern": (
        "[{model: 'gpt-*', input: 1, version: many}, {model: gpt-4o-mini, input: 1, version: one}]",
        {},
        "one",
    ),
    "a longer pattern": (
        "[{model: 'gpt-*', input: 1, version: a}, {model: 'gpt-4o-*', input: 1, version: b}]",
        {},
        "b",
    ),
    "who names the backend": (
        (
            "[{model: gpt-4o-mini, input: 1, version: any},"
            " {model: gpt-4o-mini, backend: openai, input: 1, version: ours}]"
        ),
        {},
        "ours",
    ),
    "a backend by its name in models:": (
        (
            "[{model: gpt-4o-mini, backend: azure, input: 1, version: azure},"
            " {model: gpt-4o-mini, backend: local, input: 1, version: local}]"
        ),
        {"backend_name": "azure"},
        "azure",
    ),
    "the latest that is in force": (
        (
            "[{model: '*', input: 1, from: 2026-01-01, version: a},"
            " {model: '*', input: 1, from: 2026-12-01, version: b},"
            " {model: '*', input: 1, from: 2099-01-01, version: c}]"
        ),
        {},
        "b",
    ),
    "an older call": (
        "[{model: '*', input: 1, version: first}, {model: '*', input: 1, from: 2026-12-01}]",
        {"created": 1_700_000_000_000},
        "first",
    ),
    "before the first": ("[{model: '*', input: 1, from: 2099-01-01}]", {}, None),
    "a model without a provider's name": (
        "[{model: my-rag, input: 1, version: mine}]",
        {"provider_model": None, "backend_name": "my-rag"},
        "mine",
    ),
    "a name is no pattern's part": ("[{model: gpt-4o, input: 1}]", {}, None),
}


@pytest.mark.parametrize(("table", "call", "version"), WINNERS.values(), ids=WINNERS)
def test_which_price_is_in_force(table: str, call: dict[str, Any], version: str | None) -> None:
    """The most particular entry, and of several such the latest."""
    priced = a_call(**call)
    prices(table).price(priced)

    assert version == priced.price_version


def test_a_changed_price_is_another_version() -> None:
    """Unless it has a name of its own: its day, and a hash of all that it says."""
    versions = {
        prices(f"[{{model: a, input: {price}, from: 2026-01-01}}]").listing()[0]["version"]
        for price in ("1", "1.0", "2")
    }

    assert 2 == len(versions)
    assert all(version.startswith("2026-01-01-") for version in versions)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{input: 1}]", "prices[0].model: missing; expected a string that is not empty"),
        ("[{model: a, input: -1}]", "prices[0].input: expected an amount of money (0 is free)"),
        ("[{model: a, input: .nan}]", "prices[0].input: expected an amount of money (0 is free)"),
        ("[{model: a, input: cheap}]", "prices[0].input: expected an amount of money (0 is free)"),
        ("[{model: a, from: soon}]", "prices[0].from: expected a day such as 2026-01-31"),
        ("[{model: a, prompt: 1}]", "prices[0].prompt: unknown key"),
        ("gpt-4o", "prices: expected a list of maps"),
    ],
)
def test_a_price_that_cannot_be_is_refused(text: str, said: str) -> None:
    """With the key and what it takes."""
    with pytest.raises(ConfigError) as caught:
        prices(text)

    assert said in str(caught.value)


async def test_old_rows_are_priced_anew(upstream: ScriptedUpstream, tmp_path: Any) -> None:
    """By the present table, with their days; what it has no price for stays, and it is audited."""
    old, new = (f"{{model: gpt-4o-mini, input: {one}, output: {one}}}" for one in (1, 2))
    usual = provider(upstream.url).replace("generative:", "generative:\n    other: {backend: echo}")
    first = "{model: echo, input: 1, output: 1}"
    async with running(f"{usual}\nprices: [{first}]", root=tmp_path) as s:
        for model in ("default", "default", "other"):
            await ask(s, "POST", CHAT, json={**HELLO, "model": model})
        before = await daily(s)
    assert {(1, 0), (2, 2)} == {(row["calls"], row["unpriced"]) for row in before}

    async with running(f"{usual}\nprices: [{old}]", root=tmp_path) as server:
        day = {"from": before[0]["day"], "to": before[0]["day"]}
        done = await server.operate("reprice", **day)
        assert {"rows": 3, "changed": 2, "difference": 8e-6} == {
            name: getattr(done, name) for name in ("rows", "changed", "difference")
        }
        assert [4e-6, 4e-6] == [row["cost"] for row in await server.rows("model = 'default'")]
        assert (2, 0, 8e-6) in [
            (row["calls"], row["unpriced"], row["cost"]) for row in await daily(server)
        ]
        assert 0 == (await server.operate("reprice", **day)).changed

    async with running(f"{usual}\nprices: [{new}]", root=tmp_path) as server:
        assert 0 == (await server.operate("reprice", **day, model="gpt-5*")).rows
        done = await server.operate("reprice", **day, model="gpt-4o*")
        assert (2, 2, 8e-6, 16e-6) == (done.rows, done.changed, done.before, done.after)
        rows = await daily(server)
        total = sum(row["cost"] for row in await server.rows())
        assert total == pytest.approx(sum(row["cost"] for row in rows), abs=1e-12)
        audit = await server.operate("read_audit_log", table="hdb_model_calls")
        assert ["reprice", "reprice"] == [row["operation"] for row in audit]
        assert 8e-6 == audit[0]["records"][0]["difference"]


async def test_days_the_wrong_way_round_are_refused(server: RunningServer) -> None:
    """The last day is not before the first."""
    with pytest.raises(Exception, match="to: expected a day that is not before 'from'"):
        await server.operate("reprice", **{"from": "2026-02-01", "to": "2026-01-01"})


async def test_all_days_may_be_repriced(server: RunningServer) -> None:
    """From the first day there is to the last."""
    await ask(server, "POST", CHAT, json={**HELLO, "model": "default"})
    done = await server.operate("reprice", **{"from": "0001-01-01", "to": "9999-12-31"})
    assert 1 == done.rows
