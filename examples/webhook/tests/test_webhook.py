import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import time

import pytest

from harperpy.testing import running

PAID = json.dumps({"type": "order.paid", "order": 7})


def signed(secret, body=PAID, *, name="evt_1", at=None):
    key = base64.b64decode(secret.removeprefix("whsec_"))
    timestamp = str(int(time.time() if at is None else at))
    digest = hmac.new(key, f"{name}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "webhook-id": name,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


@pytest.fixture
def secret(harper_environ):
    return harper_environ["WEBHOOK_SECRET"]


@pytest.fixture
async def sender(harper_server):
    async with harper_server.session("") as session:

        async def send(headers, body=PAID):
            async with session.post("/webhook", data=body.encode(), headers=headers) as answer:
                return answer.status, await answer.json()

        yield send


async def worked_off(client):
    """The events, once none of them waits."""
    async with asyncio.timeout(10):
        while True:
            events = await (await client.get("/webhook/events")).json()
            if all(event["state"] != "received" for event in events):
                return events
            await asyncio.sleep(0.01)


async def test_an_event_is_kept_and_worked_off(sender, secret, harper_client):
    assert await sender(signed(secret)) == (202, {"id": "evt_1"})
    (event,) = await worked_off(harper_client)
    assert event["event"] == json.loads(PAID)
    assert (event["state"], event["result"]) == ("done", {"shipped": 7})


async def test_one_that_fails_stops_no_other(sender, secret, harper_client):
    for name, body in (("bad", {"type": "order.paid"}), ("new", {"type": "order.sent"})):
        text = json.dumps(body)
        await sender(signed(secret, text, name=name), text)
    ended = {event["id"]: event for event in await worked_off(harper_client)}
    assert (ended["bad"]["state"], ended["new"]["state"]) == ("failed", "done")
    assert ended["new"]["result"] == {"ignored": "order.sent"}


async def test_an_event_that_comes_again_is_kept_once(sender, secret, harper_client):
    sent = [await sender(signed(secret, at=time.time() - late)) for late in (60, 0, 0)]
    assert sent == [(202, {"id": "evt_1"})] * 3
    assert len(await worked_off(harper_client)) == 1


async def test_an_id_with_another_body_is_a_409(sender, secret):
    await sender(signed(secret))
    other = json.dumps({"type": "order.paid", "order": 8})
    status, told = await sender(signed(secret, other), other)
    assert (status, told["detail"]) == (409, "webhook-id: evt_1 came before, with another body")


async def test_one_right_signature_of_several_is_enough(sender, secret):
    headers = signed(secret)
    headers["webhook-signature"] = f"v1,b3RoZXI= v2,new {headers['webhook-signature']}"
    assert (await sender(headers))[0] == 202


def changed(**headers):
    return lambda right: right | {f"webhook-{name}": value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (changed(signature=""), (401, "webhook-signature: expected one")),
        (changed(signature="v1,b3RoZXI="), (401, "webhook-signature: does not fit this body")),
        (changed(id="evt_2"), (401, "webhook-signature: does not fit this body")),
        (changed(timestamp="1"), (401, "webhook-signature: does not fit this body")),
        (changed(timestamp="now"), (400, "webhook-timestamp: expected seconds since 1970")),
        (changed(id=""), (400, "webhook-id: expected one of at most 256 ASCII characters")),
    ],
)
async def test_wrong_headers_are_refused(sender, secret, harper_client, change, refusal):
    status, problem = await sender(change(signed(secret)))
    assert (status, problem["detail"]) == refusal
    assert await worked_off(harper_client) == []


@pytest.mark.parametrize(("name", "status"), [("webhook-signature", 401), ("webhook-id", 400)])
async def test_bytes_that_are_no_text_are_refused(harper_server, secret, name, status):
    headers = signed(secret) | {name: "v1,\xff"}

    def send():
        connection = http.client.HTTPConnection(harper_server.url.removeprefix("http://"))
        connection.request("POST", "/webhook", PAID, headers)
        with connection.getresponse() as answer:
            return answer.status

    assert await asyncio.to_thread(send) == status


async def test_a_changed_body_is_refused(sender, secret):
    assert (await sender(signed(secret), PAID.replace("7", "8")))[0] == 401


@pytest.mark.parametrize("seconds", [-301, 302])
async def test_a_recorded_event_is_refused_when_it_is_old(sender, secret, seconds):
    status, problem = await sender(signed(secret, at=time.time() + seconds))
    assert (status, problem["code"]) == (400, "too_old")


@pytest.mark.parametrize("body", ["", "no JSON", "[]", '{"order": 7}'])
async def test_what_is_no_event_is_a_400(sender, secret, harper_client, body):
    assert (await sender(signed(secret, body), body))[0] == 400
    assert await worked_off(harper_client) == []


async def test_only_super_users_see_what_came(harper_server):
    key = await harper_server.key_for("ada")
    for credential, status in (("", 401), (key, 403)):
        async with harper_server.session(credential) as session:
            assert (await session.get("/webhook/events")).status == status


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "the environment variable WEBHOOK_SECRET is not set"),
        ({"WEBHOOK_SECRET": "whsec_?"}, "expected 'whsec_' and a key in base64"),
    ],
)
async def test_it_does_not_start_without_its_secret(pytestconfig, harper_config, environ, told):
    folder = pytestconfig.rootpath
    async with running(harper_config, directory=folder, environ=environ) as server:
        health = await server.operate("get_status")
    assert told in health["plugins"]["webhook"]["error"]
