"""Logins: who guesses has to wait, whoever they guess for, and the log says who came."""

import logging
from collections.abc import Iterator

import argon2
import pytest

from harperpy.attempts import Attempts
from harperpy.errors import TooManyAttempts
from harperpy.testing import ECHO, RunningServer, running
from helpers import ask, basic, operation

LOGIN = {"operation": "create_authentication_tokens"}
INFO = {"operation": "user_info"}


@pytest.fixture
async def ada(server: RunningServer) -> RunningServer:
    """A server with a user `ada`."""
    await server.operate("add_user", username="ada", password="pw", role="model_user")
    return server


async def guess(server: RunningServer, username: str, password: str = "no") -> int:  # noqa: S107
    """The status of a login."""
    return (await operation(server, {**LOGIN, "username": username, "password": password}))[0]


@pytest.mark.parametrize("username", ["ada", "nobody"])
async def test_after_five_wrong_passwords_the_next_one_has_to_wait(
    ada: RunningServer, username: str
) -> None:
    """A right one too, by each way in; that the user is not there shows in nothing."""
    assert [401] * 5 == [await guess(ada, username) for _ in range(5)]

    assert 429 == await guess(ada, username)
    assert 429 == await guess(ada, username, "pw")
    status, told = await operation(ada, INFO, basic(username, "pw"))
    assert (429, {"error": "Too many wrong passwords; try again later."}) == (status, told)
    answer = await ask(
        ada, "GET", "/v1/models", key="", headers={"Authorization": basic(username, "pw")}
    )
    assert (429, "too_many_attempts") == (answer.status, answer.json["error"]["code"])
    assert "1" == answer.headers["Retry-After"]


async def test_both_ways_to_send_a_password_count_together(ada: RunningServer) -> None:
    """Basic, and the operation that makes tokens."""
    for _ in range(2):
        assert 401 == await guess(ada, "ada")
        assert 401 == (await operation(ada, INFO, basic("ada", "no")))[0]
    assert 401 == await guess(ada, "ada")

    assert 429 == (await operation(ada, INFO, basic("ada", "pw")))[0]


async def test_a_right_password_clears_what_was_counted(ada: RunningServer) -> None:
    """Whoever mistypes now and then never waits."""
    for _ in range(3):
        assert [401] * 4 == [await guess(ada, "ada") for _ in range(4)]
        assert 200 == await guess(ada, "ada", "pw")


async def test_what_was_verified_before_is_no_oracle_while_others_wait(ada: RunningServer) -> None:
    """A remembered password is forgotten when guessing begins; keys and tokens go on."""
    key = f"Bearer {(await ada.operate('add_api_key', name='k', username='ada'))['api_key']}"
    assert 200 == (await operation(ada, INFO, basic("ada", "pw")))[0]
    for _ in range(5):
        await guess(ada, "ada")

    assert 429 == (await operation(ada, INFO, basic("ada", "pw")))[0]
    assert 200 == (await operation(ada, INFO, key))[0]


async def test_an_inactive_users_password_is_a_wrong_one(ada: RunningServer) -> None:
    """The same words, and it counts as one."""
    await ada.operate("alter_user", username="ada", active=False)
    body = {**LOGIN, "username": "ada", "password": "pw"}

    told = [await operation(ada, body) for _ in range(5)]

    assert [(401, {"error": "Login failed"})] * 5 == told
    assert 429 == await guess(ada, "ada", "pw")


async def test_where_something_before_the_server_slows_guesses_the_server_need_not() -> None:
    """With `slowGuesses: false` nobody waits."""
    async with running(f"{ECHO}\nauthentication: {{slowGuesses: false}}") as server:
        await server.operate("add_user", username="ada", password="pw", role="model_user")
        assert [401] * 25 == [await guess(server, "ada") for _ in range(25)]
        assert 200 == await guess(server, "ada", "pw")


@pytest.mark.parametrize("way", ["Basic", "body"])
async def test_whoever_it_is_for_a_password_costs_the_same(
    ada: RunningServer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hashed once, with the same effort, so that no clock tells who there is."""
    await ada.operate("add_user", username="off", password="pw", role="model_user", active=False)
    efforts: list[tuple[int, int, int]] = []
    verify = argon2.PasswordHasher.verify

    def watched(hasher: argon2.PasswordHasher, kept: str, given: str) -> bool:
        asked = argon2.extract_parameters(kept)
        efforts.append((asked.memory_cost, asked.time_cost, asked.parallelism))
        return verify(hasher, kept, given)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", watched)
    costs: list[list[tuple[int, int, int]]] = []
    for name, password in (("ada", "pw"), ("ada", "no"), ("nobody", "no"), ("off", "pw")):
        efforts.clear()
        if way == "body":
            await guess(ada, name, password)
        else:
            await operation(ada, INFO, basic(name, password))
        costs.append([*efforts])

    assert [[(19 * 1024, 2, 1)]] * 4 == costs


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


def wait(attempts: Attempts, username: str = "ada", address: str = "192.0.2.1") -> int:
    """How long whoever comes has to wait, in seconds."""
    try:
        attempts.check(username, address)
    except TooManyAttempts as error:
        return int(error.headers["Retry-After"])
    return 0


def failures(attempts: Attempts, count: int, username: str = "ada", address: str = "") -> None:
    """So many wrong passwords."""
    for _ in range(count):
        attempts.failed(username, address or "192.0.2.1")


def test_each_failure_doubles_the_wait_up_to_a_minute(clock: Clock) -> None:
    """And a quarter of an hour without one ends it."""
    attempts = Attempts(clock=clock)
    failures(attempts, 4)
    waits = [wait(attempts)]
    for _ in range(9):
        failures(attempts, 1)
        waits.append(wait(attempts))
        clock.now += waits[-1]
        assert 0 == wait(attempts)

    assert [0, 1, 2, 4, 8, 16, 32, 60, 60, 60] == waits
    clock.now += 901
    failures(attempts, 4)
    assert 0 == wait(attempts)


def test_an_address_that_guesses_for_many_users_waits_too(clock: Clock) -> None:
    """Twenty wrong ones, whoever they are for; other addresses are free."""
    attempts = Attempts(clock=clock)
    for number in range(19):
        failures(attempts, 1, username=f"user {number}")
    assert 0 == wait(attempts)

    failures(attempts, 1, username="user 19")

    assert 1 == wait(attempts)
    assert 0 == wait(attempts, address="192.0.2.2")


def test_the_addresses_of_one_network_are_one(clock: Clock) -> None:
    """Of IPv6 whoever has one address has millions; neighbours beyond them are free."""
    attempts = Attempts(clock=clock)
    for number in range(20):
        failures(attempts, 1, username=f"user {number}", address=f"2001:db8:0:1::{number:x}%en0")

    assert 1 == wait(attempts, address="2001:db8:0:1:ffff::1")
    assert 0 == wait(attempts, address="2001:db8:0:2::1")
    attempts.succeeded("bob", "2001:db8:0:1::1")
    assert 0 == wait(attempts, "bob", address="2001:db8:0:1::2")


def test_a_strangers_guesses_lock_nobody_out_where_they_have_logged_in(clock: Clock) -> None:
    """Neither for the same user from elsewhere, nor for another user from the same address."""
    attempts = Attempts(clock=clock)
    attempts.succeeded("ada", "192.0.2.7")
    failures(attempts, 30, address="192.0.2.1")
    for number in range(20):
        failures(attempts, 1, username=f"user {number}", address="192.0.2.7")

    assert 60 == wait(attempts, address="192.0.2.9")
    assert 0 == wait(attempts, address="192.0.2.7")
    failures(attempts, 5, address="192.0.2.7")
    assert 1 == wait(attempts, address="192.0.2.7")


def test_the_local_socket_never_waits_and_what_is_remembered_is_bounded(clock: Clock) -> None:
    """However many names and addresses are tried."""
    attempts = Attempts(clock=clock)
    for _ in range(9):
        attempts.failed("ada", "")
    for number in range(5000):
        attempts.failed("x" * 10_000 + str(number), f"192.0.2.{number}")
        attempts.succeeded(f"user {number}", "192.0.2.1")

    assert 0 == wait(attempts, address="")
    kept = [vars(attempts)[name] for name in ("_failures", "_known")]
    assert all(len(one) <= 4096 for one in kept)
    assert all(len(name) <= 256 for one in kept for _, name, _ in one)


# What the log says


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines that logins leave in the log, from now on."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("harperpy.auth")
    caplog.set_level(logging.INFO, logger="harperpy.auth")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


async def test_each_failed_login_leaves_a_line_without_the_secret(lines: list[str]) -> None:
    """Whose, of which kind, from where and at what; successful ones leave none."""
    async with running(ECHO) as server:
        await operation(server, INFO, f"Bearer {server.api_key}")
        assert [] == lines
        await ask(server, "GET", "/v1/models", key="hk_0123456789")
        await operation(server, INFO, basic("a\nb", "secret-word"))
        await operation(server, {**LOGIN, "username": "eve", "password": "secret-word"})
        await operation(server, INFO)

    told = [line.partition(" request_id=")[0] for line in lines]
    assert told == [
        f"WARNING login failed: {what} address='127.0.0.1' {where}"
        for what, where in (
            ("username=None status=401 type=Bearer", "method='GET' path='/v1/models'"),
            (r"username='a\nb' status=401 type=Basic", "method='POST' path='/'"),
            ("username='eve' status=401 type=body", "method='POST' path='/'"),
        )
    ]


async def test_the_configuration_says_which_logins_leave_a_line(lines: list[str]) -> None:
    """`logFailed: false` and `logSuccessful: true`."""
    events = "logging: {auditAuthEvents: {logFailed: false, logSuccessful: true}}"
    async with running(f"{ECHO}\n{events}") as server:
        await operation(server, INFO, f"Bearer {server.api_key}")
        await operation(server, INFO, "Bearer hk_0123456789")

    assert ["INFO login succeeded: username='HDB_ADMIN' status=200 type=Bearer"] == [
        line.partition(" address=")[0] for line in lines
    ]
