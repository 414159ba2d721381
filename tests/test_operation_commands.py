"""Every operation is a command: `harperpy NAME key=value`, answered in YAML or JSON."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner

from harperpy import Scope
from harperpy.cli import main
from harperpy.operations import COMMAND_LINE
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask


class Note(msgspec.Struct):
    """What the table of these tests holds."""

    id: int
    text: str = ""


SAID = {"messages": [{"role": "user", "content": "hello"}]}

# What each operation is given, in an order in which it can be done. `$call` is the id of a call.
GIVEN: dict[str, str] = {
    "user_info": "",
    "add_role": 'role=clerk permission={"operations":["sql"]}',
    "alter_role": 'id=clerk permission={"operations":["list_users"]}',
    "list_roles": "",
    "add_user": "username=ada password=hunter2hunter2 role=clerk --active true",
    "alter_user": "username=ada active=false",
    "list_users": "",
    "drop_user": "username=ada",
    "drop_role": "id=clerk",
    "add_api_key": "name=laptop expires_in=30d",
    "list_api_keys": "",
    "create_authentication_tokens": "",
    "refresh_operation_token": "refresh_token=$refresh",
    "drop_api_key": "id=$key",
    "insert": 'table=note records=[{"id":1,"text":"one"}]',
    "upsert": 'table=note records=[{"id":2,"text":"1e3:#"}]',
    "update": 'table=note records=[{"id":1,"text":"yes"}]',
    "search_by_id": "table=note ids=[1,2]",
    "search_by_hash": "schema=data table=note hash_values=[1,2]",
    "search_by_value": "table=note attribute=text value=*",
    "search_by_conditions": (
        'table=note conditions=[{"attribute":"id","comparator":"equals","value":1}]'
    ),
    "delete": "table=note ids=[1]",
    "describe_all": "",
    "describe_database": "",
    "describe_schema": "schema=data",
    "describe_table": "table=note",
    "sql": "SELECT",
    "get_model_call": "id=$call",
    "get_usage": "group_by=user,day",
    "reconcile": "served=[] backend_name=nobody",
    "list_prices": "",
    "reprice": "from=2026-01-01 to=2026-01-02",
    "set_limits": "scope=user name=ada requests_per_minute=5",
    "list_limits": "",
    "drop_limits": "scope=user name=ada",
    "get_analytics": "metric=duration",
    "list_metrics": "",
    "describe_metric": "metric=duration",
    "list_models": "",
    "test_model": "prompt=hello",
    "list_model_files": "",
    "pull_model_file": "name=no-such-file",
    "remove_model_file": "name=no-such-file",
    "get_configuration": "",
    "set_configuration": "logging_level=error",
    "set_status": "id=maintenance status=backup",
    "get_status": "id=maintenance",
    "clear_status": "id=maintenance",
    "get_components": "",
    "system_information": 'attributes=["cpu"]',
    "read_log": "level=fatal",
    "read_audit_log": "table=hdb_role",
    "delete_audit_logs_before": "timestamp=1",
    "list_commands": "",
    "restart_service": "service=http",
    "restart": "",
}
# These would need a file that there is not.
REFUSED = ("pull_model_file", "remove_model_file")
# Their row is the model call's own; what changes no price is not written down.
UNAUDITED = (*REFUSED, "test_model", "reprice")


async def _tables(scope: Scope) -> None:
    await scope.database.tables.ensure("note", Note)


@pytest.fixture
async def server(tmp_path: Any) -> AsyncIterator[RunningServer]:
    """A server with a table, a user's call, and a config.yaml that it may change."""
    async with running(
        ECHO, directory=tmp_path, root=tmp_path / "data", handle_application=_tables
    ) as server:
        answer = await ask(server, "POST", "/v1/chat/completions", key=server.api_key, json=SAID)
        assert 200 == answer.status
        yield server


async def command(server: RunningServer, *words: str) -> tuple[int, str]:
    """The exit code of `harperpy` and what it prints, run in this process to save its start."""
    where = {"HARPERPY_API_KEY": server.api_key}
    done = await asyncio.to_thread(CliRunner().invoke, main, words, env=where)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def words_of(name: str, server: RunningServer, known: dict[str, str]) -> list[str]:
    """What follows the name of an operation on the command line."""
    if name == "sql":
        return ["SELECT * FROM data.note", "--url", server.operations_url]
    given = GIVEN[name].split()
    for word, value in known.items():
        given = [one.replace(word, value) for one in given]
    return [*given, f"target={server.operations_url}"]


def made(name: str, told: str) -> dict[str, str]:
    """What later operations need of an answer."""
    if name == "add_api_key":
        return {"$key": yaml.safe_load(told)["id"]}
    if name == "create_authentication_tokens":
        return {"$refresh": yaml.safe_load(told)["refresh_token"]}
    return {}


async def test_every_operation_is_a_command(server: RunningServer) -> None:
    """All of the registry run, and what they answer is YAML, or with `--json` JSON."""
    names = {one.name for one in server.server.core.operations}
    known = {"$call": str((await server.rows())[0]["id"])}
    answers: dict[str, Any] = {}
    assert names == set(GIVEN)

    for name in GIVEN:
        words = words_of(name, server, known)
        code, told = await command(server, name, *words)
        if name in REFUSED:
            assert (1, True) == (code, told.startswith(f"harperpy: {name}: ")), told
            continue
        assert 0 == code, f"{name}: {told}"
        answers[name] = yaml.safe_load(told) if told.count("\n") > 1 else told
        known |= made(name, told)

    assert "ada successfully added\n" == answers["add_user"]
    assert [{"id": 1, "text": "yes"}, {"id": 2, "text": "1e3:#"}] == answers["search_by_id"]
    assert known["$call"] == str(answers["get_model_call"]["id"])
    assert ["cpu"] == [*answers["system_information"]]


async def test_every_change_is_audited(server: RunningServer) -> None:
    """What does not only read leaves a row that names who asked, and what was changed."""
    only_read = {one.name for one in server.server.core.operations if one.reads}
    known, count = {"$call": "1"}, 0

    for name in GIVEN:
        _, told = await command(server, name, *words_of(name, server, known))
        known |= made(name, told)
        rows = await server.operate(
            "read_audit_log", search_type="username", search_values=["HDB_ADMIN"]
        )
        new, count = rows[: len(rows) - count], len(rows)
        if name in only_read or name in UNAUDITED:
            assert [] == new, name
        else:
            assert 1 == len(new), name
            assert new[0]["hash_values"] or name == "delete_audit_logs_before"


READS = (
    *("list_users", "get_usage", "describe_all", "list_models", "get_configuration"),
    *("read_audit_log", "sql"),
)


@pytest.mark.parametrize("name", READS)
async def test_json_says_the_same_as_yaml(server: RunningServer, name: str) -> None:
    """By `--json`, or by `json=true` among the words."""
    words = words_of(name, server, {})
    _, in_yaml = await command(server, name, *words)
    _, in_json = await command(server, name, "--json", *words)

    assert json.loads(in_json) == yaml.safe_load(in_yaml)
    if name not in COMMAND_LINE:
        assert in_json == (await command(server, name, *words, "json=true"))[1]


async def test_a_message_alone_is_text_in_yaml_and_a_map_in_json(server: RunningServer) -> None:
    """A sentence is for people, `--json` for programs."""
    user = ["username=ada", "password=hunter2hunter2", "role=model_user"]
    target = f"target={server.operations_url}"

    assert (0, "ada successfully added\n") == await command(server, "add_user", *user, target)
    code, told = await command(server, "drop_user", "username=ada", target, "--json")
    assert (0, {"message": "ada successfully deleted"}) == (code, json.loads(told))
