"""What an upstream says that it served, and the rows of the calls: whether they are the same."""

import asyncio
import threading
from typing import Any

import aiohttp
import msgspec
import pytest
from harperpy.plugins import reconciliation

from harperpy import Difference, Served, Unequal, difference
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running, streamed, whole
from helpers import HELLO, ask, finished_calls, operation, provider


def row(number: int, prompt: int | None = 3, completion: int | None = 2, **more: Any) -> Any:
    """A row of a call that succeeded, or as told."""
    return {
        "id": number,
        "success": True,
        "error_code": None,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "embedding_tokens": None,
        "usage_estimated": False,
        **more,
    }


def failed(code: str, prompt: int | None = None, completion: int | None = None, **more: Any) -> Any:
    """A row of a call that failed."""
    return row(1, prompt, completion, success=False, error_code=code, **more)


def served(number: int | str | None, prompt: int | None = 3, completion: int | None = 2) -> Served:
    """What an upstream noted."""
    return Served(id=number, prompt_tokens=prompt, completion_tokens=completion)


EMBEDDED = {"embedding_tokens": 5}
GUESSED = {"usage_estimated": True}


@pytest.mark.parametrize(
    ("rows", "upstream"),
    [
        ([], []),
        ([row(1)], [served(1)]),
        ([row(1), row(2, 9, 9)], [served("2", 9, 9), served("1")]),
        ([row(1)], [served(1, None, None)]),
        ([row(1, **GUESSED)], [served(1, None, None)]),
        ([row(1, None, None, **EMBEDDED)], [served(1, 5, 0)]),
        ([row(1, None, None, **EMBEDDED)], [served(1, 5, None)]),
        ([failed("backend_error")], []),
        ([failed("timeout")], [served(1)]),
        ([failed("interrupted")], [served(1)]),
        ([failed("aborted", 7, 1, **GUESSED)], [served(1)]),
        ([failed("aborted", 3, 2)], [served(1)]),
    ],
)
def test_two_accounts_that_are_the_same_have_no_difference(
    rows: list[Any], upstream: list[Served]
) -> None:
    """Whatever the order; of what failed only the upstream may know more."""
    found = difference(rows, upstream)

    assert not found
    assert {"missing": [], "unknown": [], "different": []} == msgspec.to_builtins(found)


@pytest.mark.parametrize(
    ("rows", "upstream", "missing", "unknown", "different"),
    [
        ([], [served(1)], [1], [], []),
        ([row(1)], [served(1), served(None)], [None], [], []),
        ([row(1)], [served("x"), served(1)], ["x"], [], []),
        ([row(1)], [], [], [1], []),
        ([row(1), row(2)], [served(2)], [], [1], []),
        ([row(1), row(1)], [served(1)], [], [], [Unequal(1, "rows", 2, 1)]),
        ([row(1)], [served(1), served("1")], [], [], [Unequal(1, "rows", 1, 2)]),
        ([row(1)], [served(1, 4)], [], [], [Unequal(1, "prompt_tokens", 3, 4)]),
        ([row(1)], [served(1, 3, 0)], [], [], [Unequal(1, "completion_tokens", 2, 0)]),
        ([row(1, None)], [served(1)], [], [], [Unequal(1, "prompt_tokens", None, 3)]),
        ([row(1, 8, **GUESSED)], [served(1)], [], [], [Unequal(1, "prompt_tokens", 8, 3)]),
        (
            [row(1, None, None, **EMBEDDED)],
            [served(1, 6)],
            [],
            [],
            [Unequal(1, "embedding_tokens", 5, 6), Unequal(1, "completion_tokens", None, 2)],
        ),
        (
            [failed("aborted", 3, 9)],
            [served(1)],
            [],
            [],
            [Unequal(1, "completion_tokens", 9, 2)],
        ),
    ],
)
def test_each_difference_is_told(
    rows: list[Any],
    upstream: list[Served],
    missing: list[Any],
    unknown: list[int],
    different: list[Unequal],
) -> None:
    """A request without a row, a row without a request, a number that is not the same."""
    found = difference(rows, upstream)

    assert found
    assert missing == [one.id for one in found.missing]
    assert unknown == found.unknown
    assert different == found.different


COMPLETE = ("complete", 200, 3)
USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 9}}
NOTED: list[tuple[Answer, tuple[Any, ...]]] = [
    (Answer(body=whole("hi")), (*COMPLETE, 1)),
    (Answer(body=whole("hi"), cut="after"), (*COMPLETE, 1)),
    (Answer(events=streamed("a", "b")), (*COMPLETE, 2)),
    (Answer(events=streamed("a", "b"), pause=0.001), (*COMPLETE, 2)),
    (Answer(status=500, body={}), ("complete", 500, None, None)),
    (Answer(cut="head"), ("asked", None, None, None)),
    (Answer(events=streamed("a", done=False), cut=True), ("body", 200, None, None)),
    (Answer(events=[], cut=True), ("head", 200, None, None)),
    (Answer(body=b"{", cut=True), ("body", 200, None, None)),
    (Answer(events=[*streamed("a", done=False), USAGE], cut=True), ("body", 200, 7, 9)),
]


@pytest.mark.parametrize(("answer", "noted"), NOTED)
async def test_a_scripted_upstream_keeps_its_account(
    upstream: ScriptedUpstream, answer: Answer, noted: tuple[Any, ...]
) -> None:
    """How far it got and the tokens that it told, by the id of the row; the two are the same."""
    body = {**HELLO, "stream": answer.events is not None}
    async with running(provider(upstream.url)) as server:
        upstream.script(answer)
        calls = finished_calls(server)
        try:
            await ask(server, "POST", "/v1/chat/completions", json=body)
        except aiohttp.ClientPayloadError:
            assert answer.cut
        call = await calls.get()
        rows = await server.rows()

    (account,) = upstream.served
    assert str(call.id) == account.id
    assert ("/v1/chat/completions", "gpt-4o-mini") == (account.path, account.model)
    told = (account.prompt_tokens, account.completion_tokens)
    assert noted == (account.reached, account.status, *told)
    assert [call.id] == [one["id"] for one in rows]
    assert not difference(rows, upstream.served)


def account(upstream: ScriptedUpstream) -> list[dict[str, Any]]:
    """What it served, as it would send it."""
    kept = ("id", "prompt_tokens", "completion_tokens")
    return [{name: getattr(one, name) for name in kept} for one in upstream.served]


async def reconciled(server: RunningServer, **asked: Any) -> Any:
    """What the operation tells."""
    key = f"Bearer {server.api_key}"
    status, told = await operation(server, {"operation": "reconcile", **asked}, key)
    assert 200 == status, told
    return told


async def test_an_account_is_compared_by_an_operation(upstream: ScriptedUpstream) -> None:
    """Nothing differs; then what is left out, added or changed is told, and whose entry counts."""
    same = {"missing": [], "unknown": [], "different": []}
    async with running(provider(upstream.url)) as server:
        for _ in range(2):
            await ask(server, "POST", "/v1/chat/completions", json=HELLO)
        served = account(upstream)
        first, second = (int(one["id"]) for one in served)
        asked = {"backend_name": "default", "served": served}
        assert same == await reconciled(server, **asked)

        stranger = {"id": "1", "prompt_tokens": 1, "completion_tokens": None}
        wrong = {**served[0], "prompt_tokens": 99}
        told = await reconciled(server, **{**asked, "served": [stranger, wrong]})
        prompt = served[0]["prompt_tokens"]
        assert {
            "missing": [stranger],
            "unknown": [second],
            "different": [{"id": first, "field": "prompt_tokens", "row": prompt, "served": 99}],
        } == told

        asked["served"] = []
        assert [first, second] == (await reconciled(server, **asked))["unknown"]
        for other in ({"backend_name": ["other"]}, {"to": "2026-01-01"}, {"from": "2100-01-01"}):
            assert same == await reconciled(server, **{**asked, **other})


async def test_others_are_served_while_rows_are_compared(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be millions."""
    begun, others = threading.Event(), threading.Event()

    def slowly(*given: Any) -> Difference:
        begun.set()
        assert others.wait(10)
        return difference(*given)

    monkeypatch.setattr(reconciliation, "difference", slowly)
    async with running(provider(upstream.url)) as server:
        comparing = asyncio.create_task(reconciled(server, backend_name="default", served=[]))
        assert await asyncio.to_thread(begun.wait, 10)
        assert 200 == (await ask(server, "GET", "/v1/models")).status
        others.set()
        assert {"missing": [], "unknown": [], "different": []} == await comparing


async def test_who_is_no_super_user_compares_nothing(upstream: ScriptedUpstream) -> None:
    """Even with an empty account."""
    async with running(provider(upstream.url)) as server:
        key = await server.key_for("ada")
        body = {"operation": "reconcile", "served": [], "backend_name": "default"}
        status, _ = await operation(server, body, f"Bearer {key}")
    assert 403 == status
