"""Operations on the server: usage, models, settings, logs, the machine, restarts, the audit."""

import asyncio
import datetime as dt
import functools
import logging
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yaml
from harperpy.plugins.usage import DIMENSIONS
from harperpy.plugins.yaml_edit import edited
from sqlalchemy import delete, update

from harperpy import ClientError, HarperError, Scope
from harperpy.testing import ECHO, Answer, RunningServer, ScriptedUpstream, running
from helpers import HELLO, ask, operation, provider, quiet_port


class Note(msgspec.Struct):
    """What a table of these tests holds."""

    id: int | None = None
    text: str = ""


async def asked(
    server: RunningServer, key: str, name: str, /, **parameters: Any
) -> tuple[int, Any]:
    """Status and body of an operation."""
    return await operation(server, {"operation": name, **parameters}, f"Bearer {key}")


async def got(server: RunningServer, name: str, /, **parameters: Any) -> Any:
    """What a super user is answered, who must be answered well."""
    status, body = await asked(server, server.api_key, name, **parameters)
    assert 200 == status, body
    return body


# Usage


@pytest.fixture
async def billed(upstream: ScriptedUpstream) -> AsyncIterator[tuple[RunningServer, dict[str, str]]]:
    """A server whose calls are counted: two of ada's, one of bob's; and their keys."""
    async with running(provider(upstream.url)) as server:
        keys = {
            "ada": await server.key_for("ada", tenant="acme"),
            "bob": await server.key_for("bob", tenant="other"),
        }
        for name in ("ada", "ada", "bob"):
            answer = await ask(server, "POST", "/v1/chat/completions", key=keys[name], json=HELLO)
            assert 200 == answer.status
        yield server, keys


async def test_usage_is_the_sum_of_the_rows(billed: tuple[RunningServer, dict[str, str]]) -> None:
    """By none, one or several names, a list or a text; what has no price is counted as such."""
    server, _ = billed
    rows = await server.rows()
    total = {
        name: sum(row[name] or 0 for row in rows)
        for name in ("prompt_tokens", "completion_tokens", "embedding_tokens", "cached_tokens")
    }

    (whole,) = await got(server, "get_usage")

    assert {"calls": 3, "failures": 0, **total, "cost": 0, "unpriced": 3} == {
        name: value for name, value in whole.items() if name != "reasoning_tokens"
    }
    assert total["prompt_tokens"] > 0
    by_user = await got(server, "get_usage", group_by="user, tenant")
    assert [("ada", "acme", 2), ("bob", "other", 1)] == [
        (row["user"], row["tenant"], row["calls"]) for row in by_user
    ]
    assert by_user == await got(server, "get_usage", group_by=["user", "tenant"])
    assert total["prompt_tokens"] == sum(row["prompt_tokens"] for row in by_user)
    (day,) = await got(server, "get_usage", group_by="day,month", user=["ada", "eve"])
    assert (2, 10, 7) == (day["calls"], len(day["day"]), len(day["month"]))
    keys = await got(server, "get_usage", group_by="api_key", tenant="acme")
    assert [2] == [row["calls"] for row in keys]


async def test_usage_has_a_beginning_and_an_end(
    billed: tuple[RunningServer, dict[str, str]],
) -> None:
    """The first moment counts, the last one does not; days and milliseconds are moments."""
    server, _ = billed
    newest, *_, oldest = [row["__createdtime__"] for row in await server.rows()]

    async def calls(**when: Any) -> int:
        return (await got(server, "get_usage", **when))[0]["calls"]

    assert 3 == await calls(**{"from": oldest})
    assert 2 == await calls(**{"from": oldest, "to": newest})
    assert 3 == await calls(**{"from": "2020-01-01", "to": "2999-01-01T00:00:00Z"})
    assert 0 == await calls(to="2020-01-01")


@pytest.mark.parametrize("operation", ["get_usage", "reconcile"])
@pytest.mark.parametrize("end", ["2026-11-21", "2026-11-20", 0])
async def test_a_time_that_holds_no_moment_is_refused(
    server: RunningServer, operation: str, end: Any
) -> None:
    """Whoever means a whole day by its date twice is told so, and reads no zeros."""
    more: dict[str, Any] = {"served": [], "backend_name": "default"}
    with pytest.raises(HarperError, match="expected a moment after 'from'") as refused:
        await server.operate(
            operation,
            **{"from": "2026-11-21", "to": end, **(more if operation == "reconcile" else {})},
        )

    assert (400, "to") == (refused.value.status, refused.value.param)


async def test_whole_days_are_told_as_their_rows_are_and_when_those_are_gone(
    billed: tuple[RunningServer, dict[str, str]],
) -> None:
    """The roll-up says the same of a day, of whomever; and it outlives the rows."""
    server, _ = billed
    calls = server.server.core.database.model_calls
    now, *_, first = [row["__createdtime__"] for row in await server.rows()]
    groups = ("", "user,api_key,app", "day,month,method", [*DIMENSIONS])
    of_days = [await got(server, "get_usage", group_by=one, **{"from": 0}) for one in groups]
    of_rows = [await got(server, "get_usage", group_by=one, **{"from": first}) for one in groups]
    assert of_days == of_rows

    await server.server.core.database.run(lambda connection: connection.execute(delete(calls)))

    assert of_days == [await got(server, "get_usage", group_by=one) for one in groups]
    assert 0 == (await got(server, "get_usage", **{"from": 1, "to": now + 1}))[0]["calls"]
    assert [] == await got(server, "get_usage", group_by="day", **{"from": "2100-01-01"})


async def test_whole_days_count_that_outlived_their_rows_whatever_the_times(
    billed: tuple[RunningServer, dict[str, str]],
) -> None:
    """From or until the middle of a day: only of that day the rows are asked."""
    server, _ = billed
    calls, days = (
        getattr(server.server.core.database, name) for name in ("model_calls", "model_calls_daily")
    )
    await server.rows()
    for change in (update(days).values(day="2020-01-05"), delete(calls)):
        await server.server.core.database.run(lambda one, change=change: one.execute(change))

    async def counted(start: str | None, end: str | None) -> int:
        return (await got(server, "get_usage", **{"from": start, "to": end}))[0]["calls"]

    assert 3 == await counted("2020-01-01", "2020-01-09T12:00:00Z")
    assert 3 == await counted("2020-01-04T23:59:59Z", None)
    assert 3 == await counted("2020-01-04T12:00:00Z", "2020-01-06T12:00:00Z")
    assert 3 == await counted(None, "2020-01-06T00:00:01Z")
    assert 0 == await counted("2020-01-05T00:00:01Z", "2020-01-09T12:00:00Z")
    assert 0 == await counted("2020-01-04T12:00:00Z", "2020-01-05T12:00:00Z")
    assert 0 == await counted("0001-01-01T00:00:01Z", "2020-01-05")
    assert 0 == await counted("9999-12-31T12:00:00Z", None)


async def test_a_user_sees_its_own_usage_alone(
    billed: tuple[RunningServer, dict[str, str]],
) -> None:
    """Whatever it groups by or asks for."""
    server, keys = billed

    status, rows = await asked(server, keys["bob"], "get_usage", group_by="user")
    assert (200, ["bob"], [1]) == (
        status,
        [row["user"] for row in rows],
        [row["calls"] for row in rows],
    )
    for other in ({"user": "ada"}, {"tenant": "acme"}):
        assert [] == (await asked(server, keys["bob"], "get_usage", group_by="user", **other))[1]


CALLS = {"database": "system", "table": "hdb_model_calls"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("get_usage", {"group_by": "colour"}, "group_by"),
    ("get_usage", {"from": "yesterday"}, "from"),
    ("get_usage", {"to": "2026-13-01"}, "to"),
    ("get_usage", {"to": 1e30}, "to"),
    ("get_usage", {"model": ["m"] * 1001}, "model"),
    ("get_usage", {"model": 7}, "model"),
    ("test_model", {"max_tokens": 0}, "max_tokens"),
    ("test_model", {"kind": "x"}, "kind"),
    ("read_log", {"level": "loud"}, "level"),
    ("read_log", {"limit": 0}, "limit"),
    ("read_log", {"from": "x"}, "from"),
    ("read_log", {"order": "up"}, "order"),
    ("system_information", {"attributes": 7}, "attributes"),
    ("restart_service", {}, "service"),
    ("restart_service", {"service": "x"}, "service"),
    ("set_status", {}, "status"),
    ("set_status", {"status": ""}, "status"),
    ("set_status", {"status": "x", "id": "mood"}, "id"),
    ("set_status", {"status": "Away", "id": "availability"}, "status"),
    ("clear_status", {}, "id"),
    ("get_status", {"id": "mood"}, "id"),
    ("delete_audit_logs_before", {}, "timestamp"),
    ("get_model_call", {"id": 2**63}, "int"),
    ("read_audit_log", {"search_type": "username", "search_values": [2**64]}, "int"),
    ("search_by_id", {**CALLS, "ids": [2**63]}, "ids[0]: id"),
    (
        "search_by_value",
        {**CALLS, "attribute": "prompt_tokens", "value": -(2**70)},
        "value: prompt",
    ),
    ("delete_audit_logs_before", {"timestamp": 1, "database": "system"}, "database"),
    ("set_configuration", {}, "keys"),
    ("set_configuration", {"logging_levl": "warn"}, "logging_levl"),
    ("set_configuration", {"logging..level": "warn"}, "logging..level"),
    ("set_configuration", {"logging_level": "loud"}, "logging.level: expected"),
    ("set_configuration", {"http.prt": 1}, "http.prt"),
    ("set_configuration", {"http": 1}, "http"),
    ("set_configuration", {"http_port": True}, "http.port"),
]


@pytest.mark.parametrize(("name", "parameters", "told"), BAD)
async def test_bad_parameters_are_named(
    server: RunningServer, name: str, parameters: dict[str, Any], told: str
) -> None:
    """They are 400."""
    status, body = await asked(server, server.api_key, name, **parameters)

    assert 400 == status, body
    assert told in body["error"]


CLOSED = (
    *("list_models", "test_model", "set_configuration", "system_information", "read_log"),
    *("restart", "restart_service", "get_components", "delete_audit_logs_before"),
    *("get_status", "set_status", "clear_status"),
)


async def test_the_server_is_the_super_users_affair(server: RunningServer) -> None:
    """All others are refused."""
    key = await server.key_for("ada")

    for name in CLOSED:
        status, told = await asked(server, key, name)
        assert (403, [f"Operation '{name}' is restricted to 'super_user' roles"]) == (
            status,
            told["unauthorized_access"],
        )


# Models


async def test_models_are_listed_and_tried(upstream: ScriptedUpstream) -> None:
    """A try says what was answered and how long it took, or why not; it is a call like any."""
    async with running(provider(upstream.url)) as server:
        listed = await got(server, "list_models")
        good = await got(server, "test_model")
        embedded = await got(server, "test_model", kind="embedding")
        upstream.script(Answer(status=500, body={"error": {"message": "secret"}}))
        bad = await got(server, "test_model")
        unknown = await got(server, "test_model", model="nothing")

        assert {"default", "gpt-4o-mini"} <= {one["id"] for one in listed}
        assert (True, True) == (good["success"], embedded["success"])
        assert good["text"]
        assert embedded["dimensions"] > 0
        assert good["latency_ms"] >= 0
        assert (False, 500) == (bad["success"], bad["status"])
        assert (False, "model_not_found") == (unknown["success"], unknown["code"])
        assert [False, False, True, True] == [row["success"] for row in await server.rows()]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=400, body={"error": {"message": "too warm"}}), "too warm"),
        (Answer(status=401), "this server's credentials. (the provider answered 401)"),
        (Answer(status=500, body={"error": {"message": "no"}}), "(the provider answered 500)"),
        (Answer(body={}), "failed to answer. (an answer without a choice)"),
        (None, "(no connection to the provider: ConnectionRefusedError: "),
    ],
    ids=["refused", "key", "failed", "odd", "away"],
)
async def test_a_try_tells_the_operator_why_it_failed(
    upstream: ScriptedUpstream, answer: Answer | None, told: str
) -> None:
    """Who runs the server is told what is wrong with a provider, and not only that it is."""
    url = upstream.url if answer else f"http://127.0.0.1:{quiet_port()}/v1"
    upstream.script(*filter(None, [answer]))
    async with running(provider(url)) as server:
        tried = await got(server, "test_model")

    assert not tried["success"]
    assert told in tried["error"]


# Settings

CONFIG = f"""\
# My server.
logging: {{level: info}}  # quiet
http:
  # the port is free
  port: 0
  cors: true
operationsApi: {{network: {{port: 0}}}}
{ECHO}
"""


@pytest.fixture
async def configured(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A server with a config.yaml of its own."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    async with running(CONFIG, directory=tmp_path, root=tmp_path / "data") as server:
        yield server


async def test_settings_are_written_where_they_stand(configured: RunningServer) -> None:
    """Comments stay, keys have several spellings, and the next start has them."""
    path = configured.server.directory / "config.yaml"
    path.chmod(0o640)

    done = await got(
        configured,
        "set_configuration",
        **{"logging_level": "error", "http.maxBodySize": "20MB", "HTTP_COMPRESSION_THRESHOLD": 9},
    )

    assert done["message"].startswith("Configuration successfully set. You must restart")
    text = path.read_text()
    assert 'logging: {level: "error"}  # quiet' in text
    assert "# My server." in text
    assert "  # the port is free\n  port: 0\n" in text
    read = yaml.safe_load(text)
    assert {"port": 0, "cors": True, "maxBodySize": "20MB", "compressionThreshold": 9} == read[
        "http"
    ]
    assert 0o640 == path.stat().st_mode & 0o777
    assert ["config.yaml", "data"] == sorted(file.name for file in path.parent.iterdir())
    status = await got(configured, "get_status")
    assert status["restart_required"]


async def test_a_server_without_a_config_gets_one(tmp_path: Path) -> None:
    """It holds what was set."""
    async with running(directory=tmp_path, root=tmp_path / "data") as server:
        await got(server, "set_configuration", logging_level="debug")

    assert {"logging": {"level": "debug"}} == yaml.safe_load((tmp_path / "config.yaml").read_text())


async def test_settings_are_audited_without_secrets(configured: RunningServer) -> None:
    """Who changed what from what; of a secret that it was changed."""
    key = "sk-very-secret-1234"
    model = {"backend": "openai", "model": "m", "apiKey": key}
    await got(configured, "set_configuration", **{"models.generative.new": model})
    await got(configured, "set_configuration", logging_level="error")

    rows = await got(configured, "read_audit_log", database="system", table="config.yaml")

    assert [["logging.level"], ["models.generative.new"]] == [row["hash_values"] for row in rows]
    assert {"HDB_ADMIN"} == {row["user_name"] for row in rows}
    assert [{"logging.level": "info"}] == rows[0]["original_records"]
    assert [{"logging.level": "error"}] == rows[0]["records"]
    assert key not in str(rows)
    assert key in (configured.server.directory / "config.yaml").read_text()


NESTED: Any = functools.reduce(lambda inner, _: [inner], range(900), 1)
REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "code": (403, {"plugins.mine": {"path": "evil.py"}}),
    "code by its key": (403, {"plugins.mine.package": "evil"}),
    "the environment": (403, {"rootPath": "${HOME}"}),
    "the environment of a model that is called key": (
        403,
        {"models.generative.key": {"backend": "openai", "baseUrl": "http://x/${HOME}"}},
    ),
    "the environment in a list": (403, {"http.corsAccessList": ["${HOME}"]}),
    "half of it wrong": (400, {"logging_level": "error", "http_port": 99_999}),
    "what nests too deeply": (400, {"plugins.x": {"a": NESTED}}),
    "below a value": (400, {"logging.level.x": 1}),
    "a backend that is none": (400, {"models.generative.default": {"backend": "ehco"}}),
    "a rule that limits nothing": (400, {"limits.rules": [{"per": "user"}]}),
    "a plugin without time": (400, {"plugins.mine.timeout": -1}),
}


@pytest.mark.parametrize(("status", "keys"), REFUSED.values(), ids=REFUSED)
async def test_what_is_refused_changes_nothing(
    configured: RunningServer, status: int, keys: dict[str, Any]
) -> None:
    """The file and the audit stay as they were."""
    told = await asked(configured, configured.api_key, "set_configuration", **keys)

    assert told[0] in (status, 409), told
    folder = configured.server.directory
    assert CONFIG == (folder / "config.yaml").read_text()
    assert ["config.yaml", "data"] == sorted(file.name for file in folder.iterdir())
    assert [] == await got(configured, "read_audit_log", table="config.yaml")


UNAUDITED = """
CREATE TABLE never (role TEXT REFERENCES hdb_role (id) DEFERRABLE INITIALLY DEFERRED);
CREATE TRIGGER refuses AFTER INSERT ON hdb_audit BEGIN INSERT INTO never VALUES ('no role'); END;
"""


async def test_what_cannot_be_audited_changes_nothing(configured: RunningServer) -> None:
    """Not even if the database refuses in the last moment, when all is written."""
    folder = configured.server.directory
    with closing(sqlite3.connect(configured.server.root / "system.db")) as other:
        other.executescript(UNAUDITED)

    status, _ = await asked(
        configured, configured.api_key, "set_configuration", logging_level="error"
    )

    assert 500 <= status < 600
    assert CONFIG == (folder / "config.yaml").read_text()
    assert ["config.yaml", "data"] == sorted(file.name for file in folder.iterdir())


async def test_changes_at_once_are_all_there(configured: RunningServer) -> None:
    """One waits for the other."""
    names = ("http.timeout", "http.keepAliveTimeout", "http.headersTimeout", "http.maxBodySize")
    await asyncio.gather(*(got(configured, "set_configuration", **{name: 77}) for name in names))

    http = yaml.safe_load((configured.server.directory / "config.yaml").read_text())["http"]
    assert [77, 77, 77, 77] == [http[name.partition(".")[2]] for name in names]


async def test_however_many_changes_come_at_once_each_has_its_turn(
    configured: RunningServer,
) -> None:
    """They leave a thread to the one whose turn it is: there are 32 of them at most."""
    async with asyncio.timeout(30):
        told = await asyncio.gather(
            *(got(configured, "set_configuration", **{"http.timeout": 77}) for _ in range(40))
        )

    assert 40 == len(told)


async def test_what_json_cannot_say_is_no_value(configured: RunningServer) -> None:
    """Bytes and moments, as MessagePack has them."""
    url, key = f"{configured.operations_url}/", f"Bearer {configured.api_key}"
    headers = {"Authorization": key, "Content-Type": "application/msgpack"}
    for value in (b"x", dt.datetime.now(dt.UTC), {1: "x"}):
        body = {"operation": "set_configuration", "plugins.x": {"a": value}}
        sent = msgspec.msgpack.encode(body)
        async with (
            aiohttp.ClientSession() as client,
            client.post(url, data=sent, headers=headers) as answer,
        ):
            assert 400 == answer.status
            assert "plugins.x: expected what JSON can say" in await answer.text()


EDITS: dict[str, tuple[str, str, Any, str]] = {
    "empty": ("", "a.b", 1, 'a: {"b": 1}\n'),
    "a comment alone": ("# x", "a", "y", '# x\na: "y"\n'),
    "null": ("a:\nb: 1\n", "a.c", 2, 'a: {"c": 2}\nb: 1\n'),
    "a list": ("a:\n  - 1\n  - 2\nb: 1\n", "a", [3], "a: [3]\nb: 1\n"),
    "flow": ("{a: 1}\n", "b", 2, "{b: 2, a: 1}\n"),
    "empty flow": ("a: {}\n", "a.b", None, "a: {b: null}\n"),
    "quoted": ('"a": "x" # c\n', "a", "y", '"a": "y" # c\n'),
    "block text": ("a: |\n  x\n  y\nb: 1\n", "a", "z", 'a: "z"\nb: 1\n'),
    "deep": ("a:\n  b:\n    c: 1\n", "a.b.d", True, "a:\n  b:\n    c: 1\n    d: true\n"),
    "before a block": ("a:\n  b:\n    - 1\n", "a.c", 2, "a:\n  c: 2\n  b:\n    - 1\n"),
    "a comment at the end": ("a: 1 # x\n# y\n", "b", 2, "a: 1 # x\nb: 2\n# y\n"),
    "odd names": ("a:\n  gpt-4: 1\n", "a.x y", 2, 'a:\n  gpt-4: 1\n  "x y": 2\n'),
}


@pytest.mark.parametrize(("text", "path", "value", "expected"), EDITS.values(), ids=EDITS)
def test_yaml_is_edited_in_place(text: str, path: str, value: Any, expected: str) -> None:
    """One value changes, all else stays letter for letter."""
    assert expected == edited(text, path.split("."), value)


@pytest.mark.parametrize("text", ["a: &x {b: 1}\nc: *x\n", "a: 1\n", "- a\n", "a: [\n"])
def test_yaml_that_cannot_be_edited_is_refused(text: str) -> None:
    """An alias would change too, a value or a list holds no keys."""
    with pytest.raises(ClientError, match="only you can change") as refused:
        edited(text, ["a", "b"], 2)

    assert 409 == refused.value.status


# The log


async def test_the_last_records_are_read(server: RunningServer) -> None:
    """By level, time and text, the newest first or last; secrets are hidden."""
    logger = logging.getLogger("harperpy.test")
    logger.setLevel(logging.INFO)
    for at in range(3):
        logger.info("marked %d", at)
    logger.error("marked password=hunter2hunter2 and Bearer hk_abcdefghijklmnop")

    rows = await got(server, "read_log", filter="marked")

    assert ["error", "info", "info", "info"] == [row["level"] for row in rows]
    assert {"level", "message", "timestamp", "thread", "tags"} == set(rows[0])
    assert ["harperpy.test"] == rows[0]["tags"]
    assert "hunter2" not in str(rows)
    assert "hk_abc" not in str(rows)
    asc = await got(
        server, "read_log", filter="marked", order="asc", level="info", start=1, limit=1
    )
    assert ["marked 1"] == [row["message"] for row in asc]
    assert [] == await got(server, "read_log", until="2020-01-01")
    assert rows == await got(server, "read_log", filter="marked", **{"from": rows[-1]["timestamp"]})


async def test_no_password_of_an_operation_is_logged(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of one that works nor of one that fails."""
    caplog.set_level(logging.DEBUG)
    user = {"username": "eve", "password": "hunter2hunter2", "role": "model_user"}
    await got(server, "add_user", **user)
    assert 409 == (await asked(server, server.api_key, "add_user", **user))[0]
    assert (
        404
        == (
            await asked(
                server, server.api_key, "add_user", **{**user, "role": "x", "username": "y"}
            )
        )[0]
    )
    wrong = {"username": "eve", "password": "hunter2hunter3"}
    assert 401 == (await asked(server, "hk_wrong", "create_authentication_tokens", **wrong))[0]

    assert "hunter2" not in caplog.text
    assert "hunter2" not in str(await got(server, "read_log"))
    assert "hunter2" not in str(await got(server, "read_audit_log"))


# The machine


async def test_the_machine_is_described(server: RunningServer) -> None:
    """All of it, or the parts that are asked for; unknown ones are ignored."""
    whole = await got(server, "system_information")

    parts = {
        *("system", "time", "cpu", "memory", "disk", "network", "harperdb_processes"),
        *("table_size", "metrics", "threads"),
    }
    assert parts == set(whole)
    assert os.getpid() == whole["harperdb_processes"]["core"][0]["pid"]
    assert os.cpu_count() == whole["cpu"]["cores"]
    assert 0 < whole["memory"]["rss"] < whole["memory"]["total"]
    assert whole["disk"]["available"] <= whole["disk"]["size"]
    assert whole["metrics"]["database_bytes"] > 0
    counts = {row["table"]: row["record_count"] for row in whole["table_size"]}
    assert 1 == counts["hdb_user"]
    some = await got(server, "system_information", attributes=["cpu", "nothing", "time"])
    assert {"cpu", "time"} == set(some)


# Restarts and components


async def test_a_restart_is_made_by_who_can(server: RunningServer) -> None:
    """Where nobody watches over the server it is noted, and says so."""
    told = await got(server, "restart")
    assert "noted" in told["message"]
    status = await got(server, "get_status")
    assert status["restart_required"]
    wanted: list[str] = []
    server.server.health.on_restart = lambda: wanted.append("restart")

    assert {"message": "Restarting harperpy."} == await got(
        server, "restart_service", service="http_workers"
    )
    assert ["restart"] == wanted


async def test_components_are_the_plugins() -> None:
    """How each is, and its options without secrets."""
    async with running(ECHO + "\nplugins: {echo: {password: hunter2, word: x}}") as server:
        listed = {one["name"]: one for one in await got(server, "get_components")}

    assert {"name": "echo", "status": "ok", "error": None} == {
        key: listed["echo"][key] for key in ("name", "status", "error")
    }
    assert {"password": "[redacted]", "word": "x"} == listed["echo"]["options"]
    assert {"users", "operations_api"} <= set(listed)


# Status


async def test_operators_leave_notes(server: RunningServer) -> None:
    """Of what is going on; each is read by its id or with all the rest, replaced and cleared."""
    assert "notes" not in await got(server, "get_status")

    made = await got(server, "set_status", id="maintenance", status="backup")
    assert ("maintenance", "backup") == (made["id"], made["status"])
    changed = await got(server, "set_status", id="maintenance", status="over soon")
    assert made["__createdtime__"] == changed["__createdtime__"] < changed["__updatedtime__"]
    await got(server, "set_status", id="availability", status="Unavailable")
    await got(server, "set_status", status="fine")

    assert changed == await got(server, "get_status", id="maintenance")
    noted = {one["id"]: one["status"] for one in (await got(server, "get_status"))["notes"]}
    assert {"availability": "Unavailable", "maintenance": "over soon", "primary": "fine"} == noted
    for told in ("status primary successfully cleared", "status primary is clear"):
        assert {"message": told} == await got(server, "clear_status", id="primary")
    status, told = await asked(server, server.api_key, "get_status", id="primary")
    assert (404, {"error": "id: nothing is noted under 'primary'"}) == (status, told)
    rows = await got(server, "read_audit_log", table="hdb_status")
    assert ["delete", *["upsert"] * 4] == [row["operation"] for row in rows]
    assert ["primary"] == rows[0]["hash_values"]


# The audit


async def test_old_audit_rows_of_plugins_tables_are_deleted() -> None:
    """Those of who may do what stay, and the deletion is one of them."""

    async def tables(scope: Scope) -> None:
        await scope.database.tables.ensure("note", Note)
        await scope.database.tables.ensure("other", Note)

    async with running(handle_application=tables) as server:
        for table in ("note", "note", "other"):
            await got(server, "insert", table=table, records=[{"text": "x"}])
        security = await got(server, "read_audit_log", database="system")
        (newest,) = await got(server, "read_audit_log", database="data", table="note", limit=1)

        first = await got(server, "delete_audit_logs_before", timestamp=newest["timestamp"])
        assert {"message": "1 audit rows deleted", "deleted": 1} == first
        later = newest["timestamp"] + 3_600_000
        assert (
            1
            == (
                await got(
                    server, "delete_audit_logs_before", timestamp=later, schema="data", table="note"
                )
            )["deleted"]
        )
        left = await got(server, "read_audit_log", database="data")
        assert ["other"] == [row["table"] for row in left]
        now = await got(server, "read_audit_log", database="system")
        assert security == now[2:]
        assert ["hdb_audit", "hdb_audit"] == [row["table"] for row in now[:2]]
