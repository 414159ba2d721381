"""What `harperpy` says in a terminal, and the code that it ends with."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from commands import ADMIN, ECHO, harperpy, names, refusal, serving

ANY = ".cors: pages of any origin may call; name those that may in corsAccessList"
LOCAL = "authentication.authorizeLocal: who calls from this machine needs no credential"
LISTED = "cors: true, corsAccessList: ['https://page.example']"
CLOSED = ("", "", "{}")
WIDE = (
    "cors: true",
    "cors: true, corsAccessList: ['https://page.example', '*']",
    "{authorizeLocal: true}",
)
OPEN: dict[str, tuple[str, tuple[str, str, str], list[str]]] = {
    "dev, nothing said": ("dev", CLOSED, []),
    "run, nothing said": ("run", CLOSED, []),
    "run, all": ("run", WIDE, [LOCAL, f"http{ANY}", f"operationsApi.network{ANY}"]),
    "dev, one port": ("dev", (LISTED, "cors: true", "{}"), [f"operationsApi.network{ANY}"]),
}


@pytest.mark.parametrize(("command", "said", "warnings"), OPEN.values(), ids=OPEN)
async def test_the_banner_warns_of_what_the_configuration_opens(
    tmp_path: Path, command: str, said: tuple[str, str, str], warnings: list[str]
) -> None:
    """Each by its key; what `dev` opens by itself is no news."""
    rest, operations, trust = said
    (tmp_path / "config.yaml").write_text(
        f"http: {{port: 0, {rest}}}\n"
        f"operationsApi: {{network: {{port: 0, {operations}}}}}\n"
        f"authentication: {trust}\n{ECHO}"
    )
    arguments = ["dev", "--no-reload"] if command == "dev" else ["run"]

    async with serving(tmp_path, *arguments, environ=ADMIN) as server:
        _, _, after = server.printed.partition("\nWarnings\n")
        assert warnings == [line.strip() for line in after.partition("\n\n")[0].splitlines()]
        assert f"harperpy {metadata.version('harperpy')}" == server.printed.splitlines()[0]
        assert ".harperpy" == server.found(r"Data +(\S+)")


@pytest.mark.parametrize("command", ["dev", "run", "check", "user list", "plugin-made word=1"])
async def test_a_config_that_is_no_yaml_is_one_sentence(tmp_path: Path, command: str) -> None:
    """File and line, exit code 1, no trace, whatever was asked for."""
    (tmp_path / "config.yaml").write_text("http:\n  port: [1\n")

    told = await refusal(tmp_path, *command.split())

    assert re.fullmatch(r"config\.yaml: line \d+, column \d+: .+", told)


@pytest.mark.parametrize(
    "words",
    ["run --port 1", "init", "key", "sql"],
)
async def test_a_wrong_usage_is_exit_code_2(tmp_path: Path, words: str) -> None:
    """The reason is on stderr, and nothing was made."""
    done = await harperpy(tmp_path, *words.split())

    assert (2, "") == (done.code, done.out)
    assert "Traceback" not in done.err
    assert "Usage: harperpy" in done.err
    assert [] == names(tmp_path)


@pytest.mark.parametrize("command", ["dev", "run"])
async def test_an_address_that_is_not_here_is_one_sentence(tmp_path: Path, command: str) -> None:
    """It names the address and the key, as a port that is taken does."""
    # The net of documentation: no machine has it.
    config = "http: {port: 0, host: 192.0.2.1}\noperationsApi: {network: {port: 0}}\n"
    (tmp_path / "config.yaml").write_text(config)

    told = await refusal(tmp_path, command, **ADMIN)

    assert told.startswith("cannot listen on 192.0.2.1:0 (http.port): the port fails: ")
