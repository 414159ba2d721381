"""Operations of the command line that go to a remote server: as whom, and how they end."""

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from commands import harperpy, names, refusal, said
from harperpy.testing import RunningServer, running


@pytest.fixture
async def remote() -> AsyncIterator[RunningServer]:
    """A server with a super user whose password is known."""
    async with running() as server:
        user = {"username": "boss", "password": "p@ss:word", "role": "super_user"}
        await server.operate("add_user", **user)
        yield server


async def test_an_operation_goes_to_the_server_that_it_names(
    remote: RunningServer, tmp_path: Path
) -> None:
    """By an API key of the environment, by a name and a password, or by those in the URL."""
    target = f"target={remote.operations_url}"
    login = ("auth_username=boss", "auth_password=p@ss:word")
    place = urlsplit(remote.operations_url).netloc
    within = f"target=http://boss:p%40ss%3Aword@{place}"

    for words in ([target, *login], [within]):
        users = await said(tmp_path, "list_users", *words)
        assert ["HDB_ADMIN", "boss"] == [user["username"] for user in users]
    url = within.removeprefix("target=")
    users = await said(tmp_path, "user", "list", "--url", url, HARPERPY_API_KEY="not-asked-for")
    assert ["HDB_ADMIN", "boss"] == [user["username"] for user in users]
    own = await said(tmp_path, "user_info", target, HARPERPY_API_KEY=remote.api_key)
    assert "HDB_ADMIN" == own["username"]
    own = await said(tmp_path, "user_info", target, *login, HARPERPY_API_KEY=remote.api_key)
    assert "boss" == own["username"]
    role = {"operations": ["list_users"]}
    given = ("role=x", 'permission={"operations":["list_users"]}')
    assert (
        role["operations"]
        == (await said(tmp_path, "add_role", *given, target, *login))["permission"]["operations"]
    )
    assert [] == names(tmp_path)


@pytest.mark.parametrize("word", ["1e3", "0.10", "12345678901234567890.0", "true", "null", "[1]"])
async def test_a_name_and_a_password_are_text(
    remote: RunningServer, tmp_path: Path, word: str
) -> None:
    """Who is called as JSON has it, or whose password is, logs in as anyone."""
    user = {"username": word, "password": word, "role": "super_user"}
    await remote.operate("add_user", **user)

    login = (f"auth_username={word}", f"auth_password={word}")
    own = await said(tmp_path, "user_info", f"target={remote.operations_url}", *login)

    assert word == str(own["username"])


async def test_what_fails_names_the_operation(
    remote: RunningServer, deaf_port: int, tmp_path: Path
) -> None:
    """The exit code is 1, the password is told nobody, and a deaf port ends it soon."""
    wrong = ("auth_username=boss", "auth_password=wrong-one")
    target = f"target={remote.operations_url}"
    place = urlsplit(remote.operations_url).netloc
    told = {
        await refusal(tmp_path, "list_users", target, *wrong),
        await refusal(tmp_path, "list_users", f"target=http://boss:wrong-one@{place}"),
    }
    told |= {
        await refusal(tmp_path, "list_users", target),
        await refusal(tmp_path, "drop_user", "username=x", target, HARPERPY_API_KEY=remote.api_key),
        await refusal(tmp_path, "add_user", "username=x", target, HARPERPY_API_KEY=remote.api_key),
        await refusal(tmp_path, "list_users", f"target=http://127.0.0.1:{deaf_port}", *wrong),
        await refusal(tmp_path, "list_users", target, HARPERPY_API_KEY="wrong-one\n"),
    }

    assert all(one.startswith(("list_users: ", "drop_user: ", "add_user: ")) for one in told)
    assert "wrong-one" not in str(told)
    assert any("drop_user: User x does not exist" in one for one in told)
    assert any("missing required field `password`" in one for one in told)
    assert any("no harperpy answers at" in one for one in told)
    assert any("has a character that no key has" in one for one in told)


USAGE = {
    "target=localhost:9925": "target: expected an http:// or https:// URL",
    "target=ftp://localhost": "target: expected an http:// or https:// URL",
    "--url localhost:9925": "--url: expected an http:// or https:// URL",
    "auth_username=boss": "auth_username and auth_password: expected both, or neither",
    "auth_username=boss auth_password=x": "auth_username: expected a target=URL too",
}


@pytest.mark.parametrize("words", USAGE)
async def test_a_target_that_is_none(tmp_path: Path, words: str) -> None:
    """It is a wrong usage, and the sentence names the word."""
    done = await harperpy(tmp_path, "list_users", *words.split())

    assert (2, "") == (done.code, done.out)
    assert USAGE[words] in done.err


async def test_a_url_that_is_none(tmp_path: Path) -> None:
    """So it is for the commands that have a page of their own."""
    done = await harperpy(tmp_path, "user", "list", "--url", "localhost:9925")

    assert (2, "") == (done.code, done.out)
    assert "--url: expected an http:// or https:// URL" in done.err
