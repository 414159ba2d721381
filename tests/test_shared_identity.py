"""Who may what, where two workers change it at the same time: one of them comes first."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from commands import ADMIN, ECHO, serving
from databases import busy

WORKERS = (
    "http: {port: 0, host: 127.0.0.1, workers: 2}\noperationsApi: {network: {port: 0}}\n"
    f"database: {{busyTimeout: 30s}}\n{ECHO}"
)
LOGIN = {"operation": "create_authentication_tokens", "username": "ada", "password": "pw"}


class Both:
    """Two workers, asked over the socket that they share: as a super user, as long as one is."""

    def __init__(self, data: Path) -> None:
        self._data = data

    async def ask(self, operation: str, **parameters: Any) -> tuple[int, Any]:
        """The answer of whichever of them takes the connection."""
        connector = aiohttp.UnixConnector(str(self._data / "operations.sock"))
        body = {"operation": operation, **parameters}
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post("http://localhost/", json=body) as response,
        ):
            return response.status, await response.json()

    async def get(self, operation: str, **parameters: Any) -> Any:
        """The result of what must succeed."""
        status, told = await self.ask(operation, **parameters)
        assert 200 == status, told
        return told

    async def at_once(self, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
        """The answers to what comes while nobody can write, so that all have read before."""
        with busy(self._data):
            asked = [asyncio.create_task(self.ask(**body)) for body in bodies]
            for _ in range(10):
                await self.get("user_info")
        return await asyncio.gather(*asked)


@asynccontextmanager
async def workers(folder: Path) -> AsyncIterator[Both]:
    """Two workers in a folder."""
    (folder / "config.yaml").write_text(WORKERS)
    async with serving(folder, "run", environ=ADMIN):
        yield Both(folder / ".harperpy")


async def test_a_refresh_token_that_both_are_shown_is_good_once(tmp_path: Path) -> None:
    """The other one ends the login: one of the two who have it has stolen it."""
    async with workers(tmp_path) as both:
        await both.get("add_user", username="ada", password="pw", role="model_user")
        token = (await both.get(**LOGIN))["refresh_token"]
        shown = {"operation": "refresh_operation_token", "refresh_token": token}

        answers = await both.at_once(*[shown] * 8)

        assert {200: 1, 401: 7} == Counter(status for status, _ in answers)
        (new,) = (told for status, told in answers if status == 200)
        assert 401 == (await both.ask(**{**shown, "refresh_token": new["refresh_token"]}))[0]


LEAVING: dict[str, dict[str, Any]] = {
    "drop": {"operation": "drop_user"},
    "demote": {"operation": "alter_user", "role": "model_user"},
    "deactivate": {"operation": "alter_user", "active": False},
    "alter their role": {"operation": "alter_role", "permission": {}},
}


@pytest.mark.parametrize("ways", [[way] * 4 for way in LEAVING] + [list(LEAVING)], ids=" ".join)
async def test_of_four_super_users_who_leave_at_once_one_stays(
    tmp_path: Path, ways: list[str]
) -> None:
    """Each is gone by a way of its own; whoever is left cannot go by any."""
    async with workers(tmp_path) as both:
        names = ["root", "ada", "bob", "eve"]
        for name in names:
            await both.get("add_role", role=f"of {name}", permission={"super_user": True})
        await both.get("alter_user", username="root", role="of root")
        for name in names[1:]:
            await both.get("add_user", username=name, password="pw", role=f"of {name}")
        leave = [leaving(it, way) for it, way in zip(names, ways, strict=True)]

        answers = await both.at_once(*leave)

        assert {200: 3, 409: 1} == Counter(status for status, _ in answers)
        (left,) = (it for it, (status, _) in zip(names, answers, strict=True) if status == 409)
        users = {user["username"]: user for user in await both.get("list_users")}
        (stays,) = (it for it in names if it in users and is_super(users[it]))
        assert left == stays
        for way in LEAVING:
            assert 409 == (await both.ask(**leaving(left, way)))[0]


def leaving(name: str, way: str) -> dict[str, Any]:
    """How somebody is no super user any more."""
    return {**LEAVING[way], **({"id": f"of {name}"} if "role" in way else {"username": name})}


def is_super(user: dict[str, Any]) -> bool:
    """Whether this is an active super user."""
    return user["active"] and user["role"]["permission"]["super_user"]


async def test_a_role_is_not_given_while_it_is_dropped(tmp_path: Path) -> None:
    """Either nobody has it and it is gone, or somebody has it and it stays."""
    async with workers(tmp_path) as both:
        given = {"operation": "add_user", "password": "pw", "role": "clerk"}
        for number in range(5):
            await both.get("add_role", role="clerk", permission={})
            dropped = {"operation": "drop_role", "id": "clerk"}
            names = [f"{number} {letter}" for letter in "abc"]

            answers = await both.at_once(
                *({**given, "username": name} for name in names[:2]),
                dropped,
                {**given, "username": names[2]},
            )

            gave = [status for status, _ in (*answers[:2], answers[3])]
            if answers[2][0] == 200:
                assert [404] * 3 == gave
            else:
                assert (409, [200] * 3) == (answers[2][0], gave)
                for name in names:
                    await both.get("drop_user", username=name)
                await both.get("drop_role", id="clerk")


async def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    """Users, roles, keys and tokens are as they were, and so is what the audit says of them."""
    lists = ("list_users", "list_roles", "list_api_keys", "read_audit_log")
    async with workers(tmp_path) as both:
        await both.get("add_user", username="ada", password="pw", role="model_user")
        await both.get("add_api_key", name="k", username="ada", grants={"models": ["echo"]})
        tokens = await both.get(**LOGIN)
        before = [await both.get(name) for name in lists]

    async with workers(tmp_path) as both:
        assert before == [await both.get(name) for name in lists]
        shown = tokens["refresh_token"]
        await both.get("refresh_operation_token", refresh_token=shown)
