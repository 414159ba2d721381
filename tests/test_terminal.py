"""What `harperpy` says in a terminal, and the code that it ends with."""

from importlib import metadata
from pathlib import Path

import pytest

from commands import ADMIN, ECHO, serving

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
