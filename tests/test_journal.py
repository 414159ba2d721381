"""The journal of model calls: what is on disk before a call is made, and becomes its one row."""

import asyncio
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from commands import ADMIN, FREE, Serving, serving
from databases import DAILY, ROLL_UP, busy, told
from harperpy import Journal, JournalReader, ModelCall
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer
from helpers import HELLO, ask, basic, error_of, events, operation, provider

CHAT = "/v1/chat/completions"
ROOT = basic("root", "s3cret-enough")


def lines(root: Path) -> list[str]:
    """What all processes have noted below a data folder."""
    segments = [file for file in (root / "journal").glob("*/*") if file.name != "lock"]
    noted = b"".join(file.read_bytes() for file in segments).replace(b"\0", b"")
    return noted.decode().splitlines()


def noted(root: Path, kind: str) -> list[Any]:
    """The calls that were begun (`I`), or that ended (`O`)."""
    return [msgspec.json.decode(line[1:]) for line in lines(root) if line.startswith(kind)]


def call(number: int, **fields: Any) -> ModelCall:
    """A call that ended well."""
    both = {"method": "generate", "model": "m", "backend": "echo", "success": True}
    return ModelCall(id=number, **{"created": 1.79e12 + number, **both, **fields})


# What is noted when


@pytest.mark.parametrize("durability", ["process", "fsync"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_noted_before_it_is_made_and_before_its_answer_is_whole(
    tmp_path: Path,
    upstream: ScriptedUpstream,
    durability: str,
    stream: bool,  # noqa: FBT001
) -> None:
    """While the provider thinks, the intent is on disk; with the last byte, the outcome is."""
    config = f"{provider(upstream.url)}accounting: {{durability: {durability}}}\n"
    async with running(config, root=tmp_path) as server, server.session() as session:
        with busy(tmp_path):
            upstream.script(Answer(hang="head"))
            waiting = asyncio.ensure_future(session.post(CHAT, json=HELLO))
            await upstream.asked.wait()
            (intent,) = noted(tmp_path, "I")
            assert [] == noted(tmp_path, "O")
            waiting.cancel()

            async with session.post(CHAT, json={**HELLO, "stream": stream}) as answer:
                assert 200 == answer.status
                await answer.read()
            outcomes = {one["id"]: one for one in noted(tmp_path, "O")}

    assert "gpt-4o-mini" == intent["model"]
    done = outcomes[int(answer.headers["x-harper-call-id"])]
    assert (True, 3) == (done["success"], done["prompt_tokens"])


async def test_the_provider_is_told_the_id_of_each_attempt(upstream: ScriptedUpstream) -> None:
    """Each request has its row's id in `X-Client-Request-Id`: a retry has another."""
    config = provider(upstream.url).replace("maxRetries: 0", "maxRetries: 1")
    upstream.script(Answer(status=500, body={"error": {"message": "no"}}))
    async with running(config) as server:
        answer = await ask(server, "POST", CHAT, json=HELLO)
        rows = await server.rows()

    assert 200 == answer.status
    sent = [int(one.headers["X-Client-Request-Id"]) for one in upstream.requests]
    assert sent == [row["id"] for row in reversed(rows)]
    assert [False, True] == [row["success"] for row in reversed(rows)]
    assert str(sent[1]) == answer.headers["x-harper-call-id"]


async def test_the_journal_holds_no_prompt_and_no_key(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """What was asked and answered, and who may ask, is not in it."""
    config = provider(upstream.url, "apiKey: sk-of-the-provider")
    async with running(config, root=tmp_path) as server:
        body = {**HELLO, "messages": [{"role": "user", "content": "my secret wish"}]}
        with busy(tmp_path):
            await ask(server, "POST", CHAT, json=body)
            text = "\n".join(lines(tmp_path))
        assert server.api_key not in text
    assert "gpt-4o-mini" in text
    for secret in ("my secret wish", "Hello world", "sk-of-the-provider"):
        assert secret not in text


# Receipts


async def test_every_answer_of_a_model_names_its_row(
    server: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Whole, streamed, embedded or refused: `x-harper-call-id` is the row's id."""
    asked: list[tuple[str, dict[str, Any], str | None]] = [
        (CHAT, {**HELLO, "model": "default"}, None),
        (CHAT, {**HELLO, "model": "default", "stream": True}, None),
        ("/v1/embeddings", {"model": "default", "input": "a"}, None),
        (CHAT, {**HELLO, "model": "nothing"}, "backend_not_found"),
        (CHAT, {**HELLO, "model": "nothing", "stream": True}, "backend_not_found"),
        ("/v1/embeddings", {"model": "nothing", "input": "a"}, "backend_not_found"),
        (CHAT, {**HELLO, "model": "default", "store": True}, "capability_unsupported"),
    ]
    for path, body, code in asked:
        answer = await ask(server, "POST", path, json=body)
        (row, *_) = await server.rows()
        named = str(row["id"]), row["error_code"]
        assert named == (answer.headers.get("x-harper-call-id"), code), body
    answer = await ask(server, "GET", "/v1/models")
    assert "x-harper-call-id" not in answer.headers

    upstream.script(Answer(status=400, body={"error": {"message": "no"}}))
    async with running(provider(upstream.url)) as other:
        answer = await ask(other, "POST", CHAT, json=HELLO)
        (row,) = await other.rows()
    assert (400, str(row["id"])) == (answer.status, answer.headers["x-harper-call-id"])


async def test_a_receipt_is_its_owners(server: RunningServer) -> None:
    """`get_model_call` gives the row to who made the call and to super users; others get 404."""
    mine, other = await server.key_for("ada"), await server.key_for("bob")
    answer = await ask(server, "POST", CHAT, key=mine, json={**HELLO, "model": "default"})
    receipt = {"operation": "get_model_call", "id": int(answer.headers["x-harper-call-id"])}
    status, row = await operation(server, receipt, f"Bearer {mine}")

    assert 200 == status
    assert ("ada", True, receipt["id"]) == (row["user"], row["success"], row["id"])
    assert (200, row) == await operation(server, receipt, f"Bearer {server.api_key}")
    refused = await operation(server, receipt, f"Bearer {other}")
    unknown = await operation(server, {**receipt, "id": 1}, f"Bearer {mine}")
    assert 404 == refused[0] == unknown[0]
    assert f"id: there is no model call {receipt['id']} of yours" == refused[1]["error"]
    assert 401 == (await operation(server, receipt))[0]
    for nonsense in ("x", 2**63):
        status, told = await operation(server, {**receipt, "id": nonsense}, f"Bearer {mine}")
        assert (400, True) == (status, "id" in str(told))


# What is left behind


@pytest.fixture
def project(tmp_path: Path, upstream: ScriptedUpstream) -> Path:
    """A project in front of the scripted provider."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text(FREE + provider(upstream.url))
    return folder


async def chat(server: Serving, **more: Any) -> tuple[int, str]:
    """One call; its status and its row's id."""
    async with (
        aiohttp.ClientSession(headers={"Authorization": ROOT}) as session,
        session.post(f"{server.url}{CHAT}", json={**HELLO, **more}) as answer,
    ):
        await answer.read()
        return answer.status, answer.headers["x-harper-call-id"]


async def selected(server: Serving, sql: str) -> list[dict[str, Any]]:
    """The rows of a SELECT that a running server makes."""
    async with (
        aiohttp.ClientSession(headers={"Authorization": ROOT}) as session,
        session.post(server.operations_url, json={"operation": "sql", "sql": sql}) as answer,
    ):
        found: list[dict[str, Any]] = await answer.json()
        return found


async def test_kill_9_loses_no_call(project: Path, upstream: ScriptedUpstream) -> None:
    """Who was answered has a row; a call that was under way has one that says `interrupted`."""
    async with serving(project, "run", environ=ADMIN) as server:
        answered = [await chat(server) for _ in range(3)]
        upstream.asked.clear()
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(chat(server))
        await upstream.asked.wait()
        assert -signal.SIGKILL == await server.end(signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await waiting
    select = "SELECT id, success, error_code, prompt_tokens FROM hdb_model_calls ORDER BY id"
    rows: list[dict[str, Any]] = []
    for _ in range(2):
        async with serving(project, "run", environ=ADMIN) as server:
            rows = await selected(server, select)
        told = [(row["success"], row["error_code"], row["prompt_tokens"]) for row in rows]
        assert [(True, None, 3)] * 3 + [(False, "interrupted", None)] == told
        assert [int(one) for _, one in answered] == [row["id"] for row in rows[:3]]
    sent = [int(one.headers["X-Client-Request-Id"]) for one in upstream.requests]
    assert sent == [row["id"] for row in rows]
    assert [] == [*(project / ".harperpy" / "journal").iterdir()]


def leave(folder: Path, *calls: ModelCall, begun: tuple[ModelCall, ...] = ()) -> Path:
    """What a process that died left behind; its folder."""
    journal = Journal(folder, most=1 << 24)
    for one in (*begun, *calls):
        journal.begin(one)
    for one in calls:
        journal.end(one)
    # Killed: it closed nothing, and its lock is gone.
    return lockless(journal)


def lockless(journal: Journal) -> Path:
    """The folder of a journal, as after the end of its process."""
    copy = journal.path.with_name(f"{journal.path.name}-left")
    shutil.copytree(journal.path, copy)
    for one in list(journal._promised):
        journal._promised.pop(one)
    journal.close(empty=True)
    return copy


async def test_the_last_call_of_a_journal_that_closes_is_synced(tmp_path: Path) -> None:
    """Who ends it waits for the disk as ever, and so do those who began to wait before."""
    journal = Journal(tmp_path / "journal", most=1 << 22, fsync=True)
    assert journal.synced is not None
    for number in (1, 2):
        journal.begin(call(number))
    await journal.synced()
    journal.close(empty=False)
    journal.end(call(1))
    waiting = [asyncio.ensure_future(journal.synced()) for _ in range(2)]
    await asyncio.sleep(0)
    journal.end(call(2))
    async with asyncio.timeout(20):
        await asyncio.gather(*waiting, journal.synced())

    assert [1, 2] == [one["id"] for one in noted(tmp_path, "O")]


def test_a_power_cut_takes_no_folder_of_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that was made is on the disk before the first call is: it is what names the next."""
    synced: list[Path] = []
    sync = os.fsync

    def note(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink())
        sync(file)

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(tmp_path / "journal", most=1 << 22, fsync=True)
    journal.begin(call(1))
    journal.end(call(1))
    journal.close(empty=False)

    assert {tmp_path, tmp_path / "journal", journal.path} <= set(synced)


async def test_what_is_left_behind_becomes_rows_once(tmp_path: Path) -> None:
    """A journal that is found twice, as after a kill in the midst of moving it, counts once."""
    async with running(root=tmp_path) as server:
        await server.rows()
    left = leave(tmp_path / "journal", call(1), call(2, prompt_tokens=7), begun=(call(3),))
    kept = tmp_path / "kept"
    shutil.copytree(left, kept)
    for _ in range(2):
        async with running(root=tmp_path) as server:
            rows = {row["id"]: row for row in await server.rows()}
        assert [1, 2, 3] == sorted(rows)
        assert [None, None, "interrupted"] == [rows[at]["error_code"] for at in (1, 2, 3)]
        path = tmp_path / "system.db"
        assert [(3, 1, 7)] == told(
            path, "SELECT sum(calls), sum(failures), sum(prompt_tokens) FROM hdb_model_calls_daily"
        )
        assert not left.exists()
        shutil.copytree(kept, left)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: text.rindex(b"O")] + text[text.rindex(b"O") : -20],
        lambda text: text.replace(b"\n", b"\n\0\0\0garbage\0\n", 1),
        lambda text: b"\0" * 9 + text,
        lambda text: text + b"O{}\nI{}\nO\nX{}\n\xff\xfe\n",
    ],
    ids=["torn", "a hole", "a hole first", "no sense"],
)
async def test_a_damaged_journal_gives_what_it_holds(tmp_path: Path, damage: Any) -> None:
    """After a power cut a page may be missing: the lines that are whole count, no other does."""
    left = leave(tmp_path / "journal", call(1), call(2))
    segment = left / "1"
    text = segment.read_bytes().rstrip(b"\0")
    segment.write_bytes(damage(text) + bytes(4096))
    async with running(root=tmp_path) as server:
        rows = await server.rows()

    assert [2, 1] == [row["id"] for row in rows]
    assert rows[1]["success"]


@pytest.mark.parametrize("length", [1 << 18, 600_000])
async def test_a_long_line_does_not_hide_those_behind_it(tmp_path: Path, length: int) -> None:
    """However long a name is that stands in a row, all calls of a killed process have theirs."""
    calls = [call(1), call(2, tenant="t" * length), *map(call, range(3, 1000))]
    left = leave(tmp_path / "journal", *calls)
    async with running(root=tmp_path) as server:
        rows = await server.rows()

    assert [one.id for one in reversed(calls)] == [row["id"] for row in rows]
    assert length == len(rows[-2]["tenant"])
    assert not left.exists()


@pytest.mark.parametrize("nonsense", [{"reserved_tokens": 10**25}, {"created": 1e300}])
async def test_a_call_left_behind_that_makes_no_row_stops_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nonsense: dict[str, Any]
) -> None:
    """It is in the log; those beside it have their rows, and the journal is gone."""
    left = leave(tmp_path / "journal", call(1), call(2, **nonsense), call(3))
    async with running(root=tmp_path) as server:
        assert [3, 1] == [row["id"] for row in await server.rows()]

    assert not left.exists()
    assert 1 == caplog.text.count("makes no row")


async def test_all_lines_that_make_no_sense_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those at the beginning of a journal that is read in several steps, too."""
    calls = [call(number, tenant="t" * 1000) for number in range(1, 201)]
    left = leave(tmp_path / "journal", *calls)
    first, *_, last = sorted(file for file in left.iterdir() if file.name != "lock")
    first.write_bytes(b"X{}\n" + first.read_bytes())
    last.write_bytes(last.read_bytes().replace(b'O{"id":200,', b'X{"id":200,'))
    async with running(root=tmp_path) as server:
        assert 200 == len(await server.rows())

    assert ["2 lines of the journal make no sense"] == [
        record.getMessage() for record in caplog.records if "no sense" in record.getMessage()
    ]


async def test_a_segment_goes_when_its_calls_have_rows(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """The journal does not grow with the calls; a long one keeps only what it needs."""
    config = f"{provider(upstream.url)}accounting: {{journalSize: 4000000}}\n"
    async with running(config, root=tmp_path) as server, server.session() as session:
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(session.post(CHAT, json=HELLO))
        await upstream.asked.wait()
        (part,) = (tmp_path / "journal").iterdir()
        opened = server.server.core.ledger.keeper
        assert isinstance(opened, Journal)
        for number in range(1, 9000):
            one = call(number, model="m" * 200)
            opened.begin(one)
            opened.end(one)
            if number % 250 == 0:
                await server.server.core.ledger.flush()
        kept = sorted(int(file.name) for file in part.iterdir() if file.name != "lock")
        assert 1 == kept[0]
        assert len(kept) <= 3 < kept[-1]
        waiting.cancel()
        while (part / "1").exists():
            await server.server.core.ledger.flush()


@pytest.mark.parametrize("fsync", [False, True])
def test_a_journal_that_never_comes_to_rest_keeps_what_waits_alone(
    tmp_path: Path,
    fsync: bool,  # noqa: FBT001
) -> None:
    """Segments of calls that have rows go, or are filled anew, while later calls always wait."""
    journal = Journal(tmp_path, most=1 << 26, fsync=fsync)
    for number in range(1, 20_001):
        one = call(number, model="m" * 200)
        journal.begin(one)
        journal.end(one)
        if journal.waits == 1500:
            journal.forget(journal.waiting(1000))
    (part,) = tmp_path.iterdir()
    assert 20 >= len([*part.iterdir()])

    (reader,) = JournalReader.all(tmp_path)
    step = reader.everything()
    left = range(20_001 - journal.waits, 20_001)
    assert 0 == step.spoilt
    assert [*left] == [one.id for one in step.ended][-journal.waits :]

    journal.forget(journal.waiting())
    assert {"lock", str(max(int(file.name) for file in part.iterdir() if file.name != "lock"))} == {
        file.name for file in part.iterdir()
    }
    journal.close(empty=True)
    assert not [*tmp_path.iterdir()]


def test_a_journal_whose_files_were_removed_goes_on(tmp_path: Path) -> None:
    """What is put aside for later may be gone by then."""
    journal = Journal(tmp_path, most=1 << 26)
    for number in range(1, 6001):
        one = call(number, model="m" * 200)
        journal.begin(one)
        journal.end(one)
    for file in tmp_path.glob("*/[0-9]*"):
        file.unlink()
    journal.forget(journal.waiting(3000))
    assert 3000 == journal.waits
    journal.begin(call(6001))
    journal.close(empty=False)


def test_a_journal_whose_spare_files_were_removed_goes_on(tmp_path: Path) -> None:
    """What was put aside for later and is gone refuses no call, and leaves nothing open."""

    def note(first: int, count: int) -> None:
        for number in range(first, first + count):
            one = call(number, model="m" * 200)
            journal.begin(one)
            journal.end(one)

    opened = len([*Path("/proc/self/fd").iterdir()])
    journal = Journal(tmp_path, most=1 << 26)
    for first in (1, 3001):
        note(first, 3000)
        journal.forget(journal.waiting(2900))
    spare = [*tmp_path.glob("*/spare-*")]
    assert spare
    for file in spare:
        file.unlink()
    note(6001, 3000)
    assert 3200 == journal.waits
    journal.forget(journal.waiting())
    journal.close(empty=True)
    assert not [*tmp_path.iterdir()]
    assert opened == len([*Path("/proc/self/fd").iterdir()])


async def test_thousands_of_calls_at_a_time_share_their_segments(tmp_path: Path) -> None:
    """What is set aside for the ends of those that run does not fill the journal by itself."""
    calls = [call(number) for number in range(1, 5001)]
    async with running(root=tmp_path) as server:
        ledger = server.server.core.ledger
        assert ledger.keeper is not None
        for one in calls:
            ledger.keeper.begin(one)
        (part,) = (tmp_path / "journal").iterdir()
        assert len([*part.iterdir()]) < 8
        for one in calls:
            ledger.keeper.end(one)
        await ledger.drain()
    assert [(5000,)] == told(tmp_path / "system.db", "SELECT count(*) FROM hdb_model_calls")


VARIED: dict[str, Callable[[int], dict[str, Any]]] = {
    "one caller": lambda number: {"user": "a", "prompt_tokens": number, "finish_reason": "stop"},
    "two users": lambda number: {"user": "ab"[number % 2], "latency_ms": number / 8},
    "one of them failed": lambda number: {
        "success": number != 77,
        "error_code": "timeout" if number == 77 else None,
        "user": "a",
    },
    "over midnight": lambda number: {"created": 20_717 * 86_400_000.0 + number - 5},
    "some without a name": lambda number: {"tenant": "t" if number % 3 else None, "cost": 0.25},
}


@pytest.mark.parametrize("varied", VARIED.values(), ids=VARIED)
@pytest.mark.parametrize("many", [1, 9, 263])
async def test_rows_that_are_written_together_are_those_of_their_calls(
    varied: Callable[[int], dict[str, Any]],
    many: int,
    tmp_path: Path,
) -> None:
    """Each row has what its call had, and nothing of its neighbours', however many there are."""
    calls = [call(number, **varied(number)) for number in range(1, many + 1)]
    async with running(root=tmp_path) as server:
        ledger = server.server.core.ledger
        assert ledger.keeper is not None
        for one in calls:
            ledger.keeper.begin(one)
            ledger.keeper.end(one)
        rows = {row["id"]: row for row in await server.rows()}

    for one in calls:
        row = rows.pop(one.id)
        assert one.created == row["__createdtime__"]
        for name in msgspec.structs.asdict(one).keys() & row.keys():
            assert getattr(one, name) == row[name], name
    assert not rows
    assert told(tmp_path / "system.db", ROLL_UP) == told(tmp_path / "system.db", DAILY)


async def test_a_segment_that_fills_while_its_calls_are_moved_is_read_to_its_end(
    tmp_path: Path,
) -> None:
    """However many calls end while others get their rows, each has one."""
    async with running(root=tmp_path) as server:
        ledger = server.server.core.ledger
        assert ledger.keeper is not None
        for number in range(1, 15_001):
            one = call(number, model="m" * 200)
            ledger.keeper.begin(one)
            ledger.keeper.end(one)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await ledger.drain()
    assert [(15_000,)] == told(tmp_path / "system.db", "SELECT count(*) FROM hdb_model_calls")


async def test_who_asks_sees_all_that_other_processes_noted(tmp_path: Path) -> None:
    """However much another process noted a moment ago, the next question is answered with it."""
    async with running(root=tmp_path) as server:
        other = Journal(tmp_path / "journal", most=1 << 26)
        for number in range(1, 3001):
            other.begin(call(number))
            other.end(call(number))
        assert 3000 == len(await server.rows())
        other.begin(call(3001))
        other.end(call(3001))
        assert 3001 == len(await server.rows())
        other.close(empty=True)


async def test_a_call_that_makes_no_row_keeps_no_other_from_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What no database takes is in the log; the calls before and after it have their rows."""
    nonsense: Any = ["m"]
    async with running(root=tmp_path) as server:
        ledger = server.server.core.ledger
        assert ledger.keeper is not None
        for number in range(1, 501):
            one = call(number, model=nonsense if number % 200 == 0 else "m")
            ledger.keeper.begin(one)
            ledger.keeper.end(one)
        async with asyncio.timeout(10):
            while len(rows := await server.rows()) < 498:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0)

    assert not {200, 400} & {row["id"] for row in rows}
    assert 2 == caplog.text.count("makes no row")


# The roll-up


async def test_the_days_equal_the_rows(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Calls, failures and tokens by day and by who and what are the sums of the rows."""
    async with running(provider(upstream.url), root=tmp_path) as server:
        keys = [await server.key_for("ada", tenant="acme"), await server.key_for("bob")]
        for at, key in enumerate(keys * 3):
            if at % 4 == 3:
                upstream.script(Answer(status=500))
            await ask(server, "POST", CHAT, key=key, json={**HELLO, "stream": bool(at % 2)})
            await ask(server, "POST", "/v1/embeddings", key=key, json={"input": "a"})
            await server.server.core.ledger.flush()
    path = tmp_path / "system.db"

    assert told(path, ROLL_UP) == told(path, DAILY)
    assert [(12, 1)] == told(path, "SELECT sum(calls), sum(failures) FROM hdb_model_calls_daily")


async def test_the_retention_takes_whole_days(tmp_path: Path) -> None:
    """Of the days that are kept no row is gone: they equal their roll-up, which stays."""
    day = 86_400_000
    async with running(root=tmp_path) as server:
        now = int((await server.operate("sql", sql="SELECT unixepoch() AS n"))[0]["n"]) * 1000
    late, early = now - 2 * day, now - 4 * day
    calls = [call(1, created=late - late % day + 1), call(2, created=early)]
    leave(tmp_path / "journal", *calls)
    config = f"{ECHO}\naccounting: {{retention: 2d}}"
    async with running(config, root=tmp_path) as server:
        async with asyncio.timeout(10):
            while [1] != [row["id"] for row in await server.rows()]:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0)
    assert [(2,)] == told(tmp_path / "system.db", "SELECT sum(calls) FROM hdb_model_calls_daily")


# When nothing can be written


async def test_no_call_is_made_that_cannot_be_noted(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """Where the journal's folder cannot be made, a call is 503 and the provider hears nothing."""
    async with (
        running(provider(upstream.url), root=tmp_path) as server,
        server.session() as session,
    ):
        (tmp_path / "journal").write_text("in the way")
        async with session.post(CHAT, json=HELLO) as answer:
            assert 503 == answer.status
            assert "1" == answer.headers["Retry-After"]
            error = await error_of(answer)
        assert "journal" not in error["message"]
        assert [] == upstream.requests
        (tmp_path / "journal").unlink()
        async with session.post(CHAT, json={**HELLO, "stream": True}) as answer:
            assert 200 == answer.status
            assert "[DONE]" == events(await answer.text())[-1]


async def test_a_journal_that_could_not_begin_begins_later(tmp_path: Path) -> None:
    """Where the first call finds no descriptor left it is 503, and the next is answered."""
    asked = {**HELLO, "model": "default"}
    async with running(root=tmp_path) as server, server.session() as session:
        async with session.get("/v1/models") as answer:
            await answer.read()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            async with session.post(CHAT, json=asked) as answer:
                assert 503 == answer.status
                await answer.read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with session.post(CHAT, json=asked) as answer:
            assert 200 == answer.status, await answer.text()
        assert [True] == [row["success"] for row in await server.rows()]


async def test_a_journal_that_never_began_is_closed_with_its_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no file can be as large as a journal's, calls are 503, and the server ends in order."""
    async with running(root=tmp_path) as server, server.session() as session:
        async with session.get("/v1/models") as answer:
            await answer.read()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
        try:
            async with session.post(CHAT, json={**HELLO, "model": "default"}) as answer:
                assert 503 == answer.status
                await answer.read()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "closing failed" not in caplog.text
