"""Limits on a Valkey server: shared by machines, refused without it, and right again after it."""

import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from commands import refusal
from harperpy import ConfigError
from harperpy.testing import Answer, RunningServer, ScriptedUpstream, running, streamed, whole
from helpers import HELLO, Answered, ask, finished_calls, provider
from raw_provider import certificate
from valkeys import PASSWORD, ValkeyServer, valkey_server

CHAT = "/v1/chat/completions"
# What the upstream counts for a call, and what "hello" is reckoned at before it.
A_CALL, ASKED = 4, 21
PRICES = "prices: [{model: gpt-4o-mini, input: %s, output: %s}]\n"


def limited(url: str, store: str, *rules: str, more: str = "") -> str:
    """A config.yaml in front of an upstream, with these rules on that store."""
    return f"{provider(url)}\n{more}limits: {{store: '{store}', rules: [{', '.join(rules)}]}}\n"


@asynccontextmanager
async def machines(
    config: str, *roots: Path | None
) -> AsyncIterator[list[tuple[RunningServer, str]]]:
    """Servers with data folders of their own, each with the key of its own user alice."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running(config, root=root)) for root in roots or (None,)
        ]
        yield [(server, await server.key_for("alice")) for server in servers]


async def chat(server: RunningServer, key: str | None = None, **more: Any) -> Answered:
    """A short chat."""
    return await ask(server, "POST", CHAT, key=key, json={**HELLO, **more})


async def until_answered(server: RunningServer, key: str) -> None:
    """Ask until it is admitted."""
    async with asyncio.timeout(20):
        while 200 != (await chat(server, key)).status:
            pass


async def until_refused(server: RunningServer, key: str, **more: Any) -> None:
    """Ask until it is not admitted."""
    async with asyncio.timeout(20):
        while 200 == (await chat(server, key, **more)).status:
            pass


async def spent(*servers: RunningServer) -> int:
    """All tokens of all rows of all ledgers."""
    rows = [row for server in servers for row in await server.rows()]
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


def usage(prompt: int, completion: int) -> Answer:
    """A whole answer that took so much."""
    counted = {"prompt_tokens": prompt, "completion_tokens": completion}
    return Answer(body={**whole("Hello"), "usage": counted})


def meters(server: RunningServer) -> Any:
    """Where its limits are counted."""
    return server.server.core.billing.limits.store


RULES = {
    "budget": f"{{per: user, match: alice, budget: {{tokens: {10 * A_CALL}}}}}",
    "rate": "{per: user, match: alice, requestsPerMinute: 10}",
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
async def test_two_machines_share_what_there_is(
    upstream: ScriptedUpstream, valkey: ValkeyServer, rule: str
) -> None:
    """Fifty at once on both of them: together they take no more than one alone might."""
    async with machines(limited(upstream.url, valkey.url, rule), None, None) as both:
        for one in both:
            assert 200 == (await chat(*one, max_tokens=1)).status
        asked = [chat(*one, max_tokens=1) for one in both for _ in range(25)]
        answers = await asyncio.gather(*asked)
        assert {200, 429} == {answer.status for answer in answers}
        for one in both:
            await until_refused(*one, max_tokens=1)
        ledgers = [server for server, _ in both]
        assert await spent(*ledgers) <= 10 * A_CALL
        assert len(upstream.requests) == sum([len(await server.rows()) for server in ledgers])
        # A budget refuses a call that might take more than is left.
        assert (10 if "requests" in rule else 5) <= len(upstream.requests) <= 10


async def test_a_place_is_one_of_all_machines(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Who is answered by one of them is too many for the other, and the headers are of both."""
    rules = ("{per: user, concurrent: 1}", "{per: user, requestsPerMinute: 60}")
    async with machines(limited(upstream.url, valkey.url, *rules), None, None) as (one, two):
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(chat(*one))
        await upstream.asked.wait()
        assert "Too many calls of user alice" in (await chat(*two)).text
        waiting.cancel()
        await upstream.left.wait()
        await until_answered(*two)
        answer = await chat(*one)
        # Three of them were admitted, on either machine.
        assert "57" == answer.headers["x-ratelimit-remaining-requests"]


async def test_each_machine_tells_what_its_ledger_has_spent(
    upstream: ScriptedUpstream, valkey: ValkeyServer, tmp_path: Path
) -> None:
    """What was spent before there was a Valkey server counts, and what a new price makes of it."""
    rule = "{per: user, match: alice, budget: {cost: 0.2}}"
    roots = (tmp_path / "a", tmp_path / "b")
    dear, cheap = (PRICES % (price, price) for price in (1000, 500))
    for root in roots:
        upstream.script(usage(50, 46))
        async with machines(limited(upstream.url, "memory", rule, more=dear), root) as ((a, key),):
            assert 200 == (await chat(a, key)).status
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                running(limited(upstream.url, valkey.url, rule, more=cheap), root=root)
            )
            for root in roots
        ]
        key = await first.operate("add_api_key", name="new", username="alice")
        # Its own 0.096 are known, those of the other not yet.
        assert 200 == (await chat(first, key["api_key"], max_tokens=1)).status
        other = await second.operate("add_api_key", name="new", username="alice")
        refused = await chat(second, other["api_key"], max_tokens=1)
        assert "insufficient_quota" == refused.json["error"]["code"]
        day = datetime.now(UTC).date().isoformat()
        await second.operate("reprice", **{"from": day, "to": day})
        assert 200 == (await chat(second, other["api_key"], max_tokens=1)).status


async def test_without_the_server_nothing_is_admitted(
    upstream: ScriptedUpstream, valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A 503 for who has a limit, until it is back; neither answer nor log has the URL's secret."""
    rule = "{per: user, match: alice, requestsPerMinute: 100, budget: {tokens: 1000}}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        assert 200 == (await chat(server, key)).status
        valkey.kill()
        refused = await chat(server, key)
        assert (503, "1") == (refused.status, refused.headers["Retry-After"])
        assert "alkey" not in refused.text
        assert 200 == (await chat(server)).status
        assert 2 == len(upstream.requests)
        with caplog.at_level(logging.WARNING):
            await meters(server)._beat()
        assert "calls under a limit are refused: the Valkey server of the limits is away" in (
            caplog.text
        )
        valkey.start()
        answer = await chat(server, key)
        assert 200 == answer.status
        configuration = await server.operate("get_configuration")
        assert "[redacted]" in str(configuration["limits"]["store"])
        assert PASSWORD not in f"{configuration}{caplog.text}{refused.text}"


async def test_a_server_starts_without_it(upstream: ScriptedUpstream, valkey: ValkeyServer) -> None:
    """It refuses until somebody is there to count."""
    valkey.kill()
    try:
        config = limited(upstream.url, valkey.url, "{per: user, match: alice, concurrent: 5}")
        async with machines(config) as ((server, key),):
            assert 503 == (await chat(server, key)).status
            valkey.start()
            assert 200 == (await chat(server, key)).status
    finally:
        if valkey.process.poll() is not None:
            valkey.start()


async def test_a_wrong_password_is_said_in_the_log(
    upstream: ScriptedUpstream, valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """In the server's words, without the password."""
    url = valkey.url.replace(PASSWORD, "wr0ng-s3cret")
    config = limited(upstream.url, url, "{per: user, match: alice, concurrent: 5}")
    async with machines(config) as ((server, key),):
        assert 503 == (await chat(server, key)).status
    assert "WRONGPASS" in caplog.text or "invalid username-password" in caplog.text
    assert "wr0ng-s3cret" not in caplog.text


async def test_what_the_server_forgets_is_told_anew(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """By who asks at once, by the others with their next sign of life."""
    rule = "{per: user, match: alice, budget: {tokens: 100}}"
    async with machines(limited(upstream.url, valkey.url, rule), None, None) as (one, two):
        upstream.script(usage(40, 20), usage(10, 10))
        assert 200 == (await chat(*one, max_tokens=20)).status
        await one[0].rows()
        assert 200 == (await chat(*two, max_tokens=10)).status
        await two[0].rows()
        valkey.clear()
        for server, _ in (one, two):
            await meters(server)._beat()
        # 80 are spent, 20 are left, and "hello" is reckoned at 21.
        for who in (one, two):
            refused = await chat(*who, max_tokens=1)
            assert "insufficient_quota" == refused.json["error"]["code"]
        valkey.clear()
        alone = await chat(*one, max_tokens=30)
        # It knows what it has spent itself, and sees no other.
        assert 200 == alone.status
        assert 100 - 60 - ASKED == upstream.requests[-1].body["max_tokens"]


async def told(valkey: ValkeyServer, server: RunningServer) -> None:
    """Wait until the Valkey server knows as spent what the rows of a ledger are, and no more."""
    async with asyncio.timeout(20):
        while valkey.budget() != (await spent(server), 0):
            pass


async def recorded(server: RunningServer, count: int) -> None:
    """Wait until so many calls have rows."""
    async with asyncio.timeout(20):
        while count != len(await server.rows()):
            pass


@pytest.mark.usefixtures("valkey")
async def test_a_server_that_knows_what_was_is_told_what_is(upstream: ScriptedUpstream) -> None:
    """Saved while a call ran, killed when more had ended: their costs count, the place is free."""
    rule = "{per: user, match: alice, concurrent: 1, budget: {tokens: 200}}"
    with valkey_server() as old:
        assert old is not None
        async with machines(limited(upstream.url, old.url, rule)) as ((server, key),):
            upstream.script(Answer(events=streamed("one", done=False), hang="end"))
            async with (
                server.session(key) as caller,
                caller.post(CHAT, json={**HELLO, "stream": True}) as response,
            ):
                await response.content.readuntil(b"\n\n")
                with closing(old.client()) as client:
                    client.save()
            await upstream.left.wait()
            await until_answered(server, key)
            assert 200 == (await chat(server, key)).status
            await recorded(server, 3)
            old.kill()
            old.start()
            await meters(server)._beat()
            await told(old, server)
            assert 200 == (await chat(server, key)).status


async def test_what_runs_while_the_server_forgets_counts_when_it_ends(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Nothing is held for it any more, so its ledger is read again."""
    rule = "{per: user, match: alice, budget: {tokens: 100}}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        upstream.script(Answer(events=streamed("one", done=False), hang="end"))
        async with (
            server.session(key) as client,
            client.post(CHAT, json={**HELLO, "stream": True, "max_tokens": 30}) as response,
        ):
            await response.content.readuntil(b"\n\n")
            meters(server)._beating.cancel()
            valkey.clear()
            assert 200 == (await chat(server, key, max_tokens=1)).status
        await upstream.left.wait()
        await recorded(server, 2)
        await told(valkey, server)


async def test_what_ends_while_the_ledger_is_read_counts(
    upstream: ScriptedUpstream, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that is old by then is not told."""
    rule = "{per: user, match: alice, budget: {tokens: 100}}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        quotas, read, go_on = meters(server)._quotas, asyncio.Event(), asyncio.Event()
        counted = quotas.counted

        async def late(*given: Any) -> Any:
            found = await counted(*given)
            read.set()
            await go_on.wait()
            return found

        upstream.script(Answer(events=streamed("one", done=False), hang="end"))
        async with (
            server.session(key) as client,
            client.post(CHAT, json={**HELLO, "stream": True, "max_tokens": 30}) as response,
        ):
            await response.content.readuntil(b"\n\n")
            meters(server).forget()
            monkeypatch.setattr(quotas, "counted", late)
            asking = asyncio.ensure_future(chat(server, key, max_tokens=1))
            await read.wait()
        await upstream.left.wait()
        await recorded(server, 1)
        await told(valkey, server)
        go_on.set()
        assert 200 == (await asking).status
        await recorded(server, 2)
        await told(valkey, server)


async def test_a_ledger_is_read_once_however_many_calls_end_meanwhile(
    upstream: ScriptedUpstream, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the number has them or not, each counts once; nobody waits until none ends."""
    rule = "{per: user, match: alice, budget: {tokens: 1000}}"
    config = limited(upstream.url, valkey.url, rule)
    async with machines(config) as ((server, key),), server.session(key) as client:
        ended, counted, reads = finished_calls(server), meters(server)._quotas.counted, 0
        upstream.script(*(Answer(events=streamed("one", done=False), hang="end"),) * 6)
        body = {**HELLO, "stream": True, "max_tokens": 30}
        running_ones = [await client.post(CHAT, json=body) for _ in range(6)]
        for one in running_ones:
            await one.content.readuntil(b"\n\n")

        async def end_one() -> None:
            if running_ones:
                running_ones.pop().close()
                await ended.get()

        async def busy(*given: Any) -> Any:
            nonlocal reads
            reads += 1
            await end_one()
            found = await counted(*given)
            await end_one()
            return found

        monkeypatch.setattr(meters(server)._quotas, "counted", busy)
        meters(server).forget()
        async with asyncio.timeout(20):
            assert 200 == (await chat(server, key, max_tokens=1)).status
        assert 1 == reads
        assert 4 == len(running_ones)
        for one in running_ones:
            one.close()
        await recorded(server, 7)
        await told(valkey, server)
        assert "harperpy:ended" not in f"{valkey.keys()}"


async def test_what_ends_while_the_server_is_away_is_settled(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """The place is free and the cost counts as soon as it answers again."""
    rule = "{per: user, match: alice, concurrent: 1, budget: {tokens: 60}}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        upstream.script(Answer(events=streamed("one", done=False), hang="end"))
        async with (
            server.session(key) as client,
            client.post(CHAT, json={**HELLO, "stream": True, "max_tokens": 30}) as response,
        ):
            await response.content.readuntil(b"\n\n")
            valkey.process.send_signal(signal.SIGSTOP)
        await upstream.left.wait()
        await recorded(server, 1)
        assert 503 == (await chat(server, key, max_tokens=1)).status
        valkey.process.send_signal(signal.SIGCONT)
        await until_answered(server, key)
        assert 2 == len(upstream.requests)
        await told(valkey, server)
        assert "harperpy:holds" not in f"{valkey.keys()}"


async def test_what_was_taken_and_never_told_is_given_back(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """A server that stands still for a while, and then does all that it was asked."""
    rule = "{per: user, match: alice, concurrent: 1}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        await until_answered(server, key)
        # Nothing is on the way, so that the next one is.
        await meters(server)._beat()
        # It is to believe that there is time enough.
        meters(server)._ahead += 1000
        valkey.process.send_signal(signal.SIGSTOP)
        try:
            assert 503 == (await chat(server, key)).status
        finally:
            valkey.process.send_signal(signal.SIGCONT)
        await until_answered(server, key)
        assert 200 == (await chat(server, key)).status


async def test_who_is_refused_leaves_nothing_to_do(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Of what was never asked nothing is given back, however long nobody answers."""
    config = limited(upstream.url, valkey.url, "{per: user, match: alice, concurrent: 1}")
    async with machines(config) as ((server, key),):
        assert 200 == (await chat(server, key)).status
        valkey.kill()
        try:
            assert {503} == {(await chat(server, key)).status for _ in range(20)}
            # Of the first one it is not known.
            assert len(meters(server)._tasks) <= 1
        finally:
            valkey.start()
        await until_answered(server, key)
        assert 200 == (await chat(server, key)).status


async def test_what_comes_too_late_takes_nothing(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Who asked has stopped waiting by then."""
    rule = "{per: user, match: alice, concurrent: 1}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        assert 200 == (await chat(server, key)).status
        meters(server)._ahead -= 10
        assert 503 == (await chat(server, key)).status
        assert 1 == len(upstream.requests)
        assert "harperpy:holds" not in f"{valkey.keys()}"
        meters(server)._ahead += 10
        assert 200 == (await chat(server, key)).status


async def test_the_places_of_a_dead_machine_lapse(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """When its lease is over; what it held of a budget stays held, as nobody knows what it took."""
    rule = "{per: user, match: alice, concurrent: 1, budget: {tokens: 60}}"
    async with machines(limited(upstream.url, valkey.url, rule), None, None) as (one, two):
        upstream.script(Answer(hang="head"))
        waiting = asyncio.ensure_future(chat(*one, max_tokens=5))
        await upstream.asked.wait()
        meters(one[0])._beating.cancel()
        assert 429 == (await chat(*two, max_tokens=1)).status
        with closing(valkey.client()) as client:
            life = f"harperpy:life:{meters(one[0])._life}"
            assert 0 < client.ttl(life) <= 30
            client.delete(life)
        # 60 less the 26 that are held: enough for 22, and then, with 4 spent, not for 41.
        assert 200 == (await chat(*two, max_tokens=1)).status
        refused = await chat(*two, max_tokens=20)
        assert "What is left of the budget of user alice is held" in refused.text
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await upstream.left.wait()


@pytest.mark.parametrize(
    "rest",
    ["h:no", "h:99999", "h:1/one", "h:1/0?wrong=1", "h:1/0?protocol=9", "h:1/0?socket_timeout=x"],
)
@pytest.mark.parametrize("secret", [":s3cret-word@", "user:s3cret-word/s3cret-word@"])
async def test_a_url_that_cannot_be_is_refused(rest: str, secret: str) -> None:
    """At the start, in one sentence without its secrets."""
    with pytest.raises(ConfigError, match=r"config.yaml: limits.store: expected ") as caught:
        async with running(f"limits: {{store: 'valkey://{secret}{rest}'}}"):
            pass
    assert "s3cret-word" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "no certificate"])
async def test_a_certificate_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str | None
) -> None:
    """At the start, and not with each call."""
    if text:
        (tmp_path / "ca.pem").write_text(text)
    url = f"valkeys://:s3cret-word@h:1/0?ssl_ca_certs={tmp_path}/ca.pem"
    with pytest.raises(ConfigError, match=r"limits.store: a file of its ssl_ options") as refused:
        async with running(limited("http://127.0.0.1:1", url)):
            pass
    assert "s3cret" not in f"{refused.value}"


async def test_the_library_is_asked_for(tmp_path: Path) -> None:
    """Without the extra, the start says what to install."""
    (tmp_path / "config.yaml").write_text("limits: {store: 'valkey://127.0.0.1:1/0'}\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['valkey'] = None\n")
    said = await refusal(tmp_path, "check", PYTHONPATH=str(tmp_path))
    assert said.endswith("pip install 'harperpy[valkey]'")


async def test_a_server_leaves_nothing_behind(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Each key goes by itself, and none has a caller's key or words."""
    rates = "requestsPerMinute: 9, tokensPerMinute: 900"
    rule = f"{{per: key, concurrent: 3, {rates}, budget: {{tokens: 500}}}}"
    async with machines(limited(upstream.url, valkey.url, rule)) as ((server, key),):
        assert 200 == (await chat(server, key)).status
    with closing(valkey.client()) as client:
        names = valkey.keys()
        assert names
        assert all(client.ttl(name) > 0 for name in names)
        everything = f"{names}{[client.hgetall(name) for name in names if 'life:' not in name]}"
    assert key not in everything
    assert "hello" not in everything


@asynccontextmanager
async def passing(ports: list[int], certified: Path | None = None) -> AsyncIterator[int]:
    """A port that passes on what it hears to the last of these; in TLS where it is certified."""
    context = None
    if certified:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certified)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError), closing(writer):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", ports[-1])
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as listener:
        yield listener.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("host", "known", "status"),
    [("localhost", True, 200), ("localhost", False, 503), ("127.0.0.1", True, 503)],
)
async def test_over_tls_it_shows_who_it_is(
    upstream: ScriptedUpstream,
    valkey: ValkeyServer,
    tmp_path: Path,
    *,
    host: str,
    known: bool,
    status: int,
) -> None:
    """By a certificate of that host, of the authority that the URL names; nobody else counts."""
    path = certificate(tmp_path)
    async with passing([valkey.port], path) as port:
        url = f"valkeys://:{PASSWORD}@{host}:{port}/0"
        url += f"?ssl_ca_certs={path}" if known else ""
        config = limited(upstream.url, url, "{per: user, match: alice, concurrent: 5}")
        async with machines(config) as ((server, key),):
            assert status == (await chat(server, key)).status


async def test_another_may_take_over(upstream: ScriptedUpstream, valkey: ValkeyServer) -> None:
    """Who only reads from now on is asked anew by name, and so by who writes."""
    ports = [valkey.port]
    with valkey_server() as other, closing(valkey.client()) as client:
        assert other is not None
        async with passing(ports) as port:
            url = valkey.url.replace(str(valkey.port), str(port))
            config = limited(upstream.url, url, "{per: user, match: alice, concurrent: 1}")
            async with machines(config) as ((server, key),):
                assert 200 == (await chat(server, key)).status
                client.config_set("masterauth", PASSWORD)
                client.replicaof("127.0.0.1", other.port)
                ports.append(other.port)
                try:
                    await until_answered(server, key)
                    assert 200 == (await chat(server, key)).status
                finally:
                    client.replicaof("NO", "ONE")


async def test_what_costs_nothing_is_settled_at_once(
    upstream: ScriptedUpstream, valkey: ValkeyServer
) -> None:
    """Under a budget of money too: the place is free for the next call."""
    rules = "{per: user, budget: {cost: 0}}", "{per: user, match: alice, concurrent: 1}"
    config = limited(upstream.url, valkey.url, *rules, more=PRICES % (0, 0))
    async with machines(config) as ((server, key),):
        assert [200] * 5 == [(await chat(server, key)).status for _ in range(5)]
