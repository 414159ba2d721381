"""What a machine, a container or a shell may lack, and what a server makes of it."""

import os
from pathlib import Path

import pytest

from commands import ADMIN, ECHO, FREE, configured, execute, get, harperpy, refusal, serving

KEYED = """
models: {generative: {default: {backend: openai, apiKey: "${MY_KEY}"}}}
"""
UNWRITTEN = ("secret\n", os.fsdecode(b"caf\xe9"))
NAMELESS = ("unshare", "--map-user=54321", "env", "-u", "HOME", "-u", "XDG_CACHE_HOME")


async def test_a_key_that_ends_in_a_newline_is_named(tmp_path: Path) -> None:
    """By file, key and variable: a secret that comes out of a file often has one."""
    (tmp_path / "config.yaml").write_text(FREE + KEYED)

    told = await refusal(tmp_path, "check", MY_KEY="sk-0123456789abcdef\n")

    where = "config.yaml: models.generative.default.apiKey: expected a key of one line"
    assert told.startswith(where)
    assert told.endswith(", got a value that is not shown from ${MY_KEY}")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        *((variable, value, "one line of text") for variable in ADMIN for value in UNWRITTEN),
        ("HDB_ADMIN_USERNAME", "ro:ot", "a name without a colon"),
    ],
)
async def test_an_administrator_whom_nobody_can_be_is_not_made(
    tmp_path: Path, variable: str, value: str, expected: str
) -> None:
    """The variable is named, and the next start makes who was meant."""
    project = configured(tmp_path / "project")

    told = await refusal(project, "run", **{**ADMIN, variable: value})

    assert told.startswith(f"{variable}: expected {expected}")
    async with serving(project, "run", environ=ADMIN):
        pass


async def test_a_user_without_a_name_or_a_home_serves(tmp_path: Path) -> None:
    """As in a container: all plugins start, and the model files can be asked for."""
    if (await execute(tmp_path, *NAMELESS, "true")).code:
        pytest.skip("there is no name space of users")
    project = configured(tmp_path / "project")

    async with serving(project, "run", environ=ADMIN, within=NAMELESS) as server:
        assert (200, {"status": "ok"}) == await get(f"{server.url}/health")
    done = await execute(project, *NAMELESS, "harperpy", "models", "list")

    assert (0, "") == (done.code, done.err)


@pytest.mark.parametrize("command", ["dev", "run"])
async def test_a_name_that_cannot_be_printed_stops_no_server(tmp_path: Path, command: str) -> None:
    """It is shown by its numbers: of a model, or of a folder that is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    configured(folder)
    (folder / "config.yaml").write_text(
        FREE + ECHO.replace("default:", "日本: {backend: echo}, default:", 1)
    )
    environ = {**ADMIN, "PYTHONIOENCODING": "latin-1:strict"}

    async with serving(tmp_path, command, folder.name, environ=environ) as server:
        assert "\\u65e5\\u672c" in server.printed
        assert "caf\\udce9" in server.printed
        assert 200 == (await get(f"{server.url}/health"))[0]


async def test_a_project_whose_name_cannot_be_printed_is_written(tmp_path: Path) -> None:
    """And said to be."""
    done = await harperpy(tmp_path, "init", "日本", PYTHONIOENCODING="latin-1:strict")

    assert (0, "") == (done.code, done.err)
    assert done.out.startswith("Wrote \\u65e5\\u672c. Next: ")


@pytest.mark.parametrize("command", ["check", "models list"])
async def test_where_no_file_can_be_made_the_reason_is_one_sentence(
    tmp_path: Path, command: str
) -> None:
    """As in a container that is read-only altogether."""
    project = configured(tmp_path / "project")
    # Where no file may be longer than nothing, no folder is fit for one, nor for what is covered.
    limited = "unset COVERAGE_PROCESS_CONFIG; trap '' XFSZ; ulimit -f 0"
    done = await execute(project, "bash", "-c", f"{limited}; exec harperpy {command}")

    told = "there is no folder for temporary files that can be written: TMPDIR names one"
    assert (1, f"harperpy: {told}") == (done.code, done.err.strip().replace("models list: ", ""))
