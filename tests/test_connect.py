"""`connect`: what a GET is answered with whose `Accept` prefers an event stream."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from harperpy import (
    SSE,
    Context,
    Contract,
    RegistrationError,
    RequestTarget,
    Resource,
    Resources,
    Response,
    ResponseError,
    Scope,
)
from harperpy.testing import ECHO, running
from helpers import Answered, ask

EVENTS = "text/event-stream"
SSE_ONLY = {"Accept": EVENTS}


class Feed(Resource):
    """A value, and a stream of its changes."""

    public = True

    @staticmethod
    def get() -> str:
        """The value."""
        return "value"

    @staticmethod
    async def connect(target: RequestTarget, incoming: None, context: Context) -> Any:
        """Its changes."""
        yield f"{target.get('x')} {incoming} {context.method}"
        yield SSE(data="more", id="7")

    @staticmethod
    def post() -> str:
        """What is posted has nothing to do with it."""
        return "posted"


def only(connect: Callable[..., Any], **attributes: Any) -> type[Resource]:
    """A public resource that has nothing but this `connect`."""
    body = {"connect": staticmethod(connect), "public": True, **attributes}
    return type("Only", (Resource,), body)


async def one() -> AsyncIterator[str]:
    """A stream of one message."""
    yield "one"


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        (EVENTS, True),
        ("Text/Event-Stream", True),
        (f"{EVENTS}, */*;q=0.1", True),
        (f"application/json;q=0.5, {EVENTS}", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        (f"application/json, {EVENTS}", False),
        (f"{EVENTS};q=0, */*", False),
        (f"{EVENTS};q=0.1, application/json", False),
        ("text/*", False),
        ("image/png", False),
        (";;", False),
    ],
)
async def test_what_the_accept_header_prefers_decides(accept: str, *, streams: bool) -> None:
    """The client's quality and ours, as for any other answer; a stream alone is told by name."""
    headers = {"Accept": accept}
    async with running(resources={"feed": Feed, "only": only(one)}) as server:
        both = await ask(server, "GET", "/feed?x=y", headers=headers)
        alone = await ask(server, "GET", "/only", headers=headers)

    if streams:
        assert "data: y None GET\n\ndata: more\nid: 7\n\n" == both.text
        assert (200, "data: one\n\n") == (alone.status, alone.text)
        assert [EVENTS] * 2 == [each.headers["Content-Type"] for each in (both, alone)]
        assert "no-cache" == both.headers["Cache-Control"]
    else:
        assert "None GET" not in both.text
        assert (406, "not_acceptable") == (alone.status, alone.json["code"])
        told = f"Accept: this is a stream of events; expected {EVENTS}, got {accept!r}"
        assert told == alone.json["detail"]


async def test_the_method_decides_the_verb() -> None:
    """Only a GET connects: a POST that wants events is a POST, and one that nobody takes is 405."""
    async with running(resources={"feed": Feed, "only": only(one)}) as server:
        posted = await ask(server, "POST", "/feed", headers=SSE_ONLY)
        refused = await ask(server, "POST", "/only", headers=SSE_ONLY)

    assert "data: posted\n\n" == posted.text
    assert (405, "GET, HEAD, OPTIONS") == (refused.status, refused.headers["Allow"])


@pytest.mark.parametrize("path", ["/feed", "/only"])
async def test_head_and_options_know_it(path: str) -> None:
    """HEAD has the stream's head and runs nothing of it, OPTIONS names GET."""
    begun: list[str] = []

    async def connect() -> AsyncIterator[str]:
        begun.append("begun")
        yield "x"

    feed = type("Feed", (Feed,), {"connect": staticmethod(connect)})
    async with (
        asyncio.timeout(20),
        running(resources={"feed": feed, "only": only(connect)}) as server,
    ):
        head = await ask(server, "HEAD", path, headers=SSE_ONLY)
        options = await ask(server, "OPTIONS", path)

    assert (200, EVENTS, "") == (head.status, head.headers["Content-Type"], head.text)
    assert [] == begun
    assert {"GET", "HEAD", "OPTIONS"} <= set(options.headers["Allow"].split(", "))


async def test_allow_read_decides_and_comes_first() -> None:
    """Who may not read is refused before the 406 too, and nothing of it runs."""
    ran: list[str] = []

    def connect() -> AsyncIterator[str]:
        ran.append("ran")
        return one()

    class Asked(Resource):
        @staticmethod
        def allow_read(user: Any, target: RequestTarget, context: Context) -> bool:
            return user is not None and target.get("x") == "y"

    asked = type("Asked", (Asked,), {"connect": staticmethod(connect)})
    async with running(resources={"it": asked}) as server:
        statuses = [
            (await ask(server, "GET", path, key=key, headers=headers)).status
            for key, path, headers in (
                ("", "/it?x=y", SSE_ONLY),
                ("", "/it?x=y", {}),
                (None, "/it", SSE_ONLY),
            )
        ]
        assert [] == ran
        good = await ask(server, "GET", "/it?x=y", headers=SSE_ONLY)

    assert [401, 401, 403] == statuses
    assert "data: one\n\n" == good.text


@pytest.mark.parametrize(
    ("protocols", "plain", "streamed"),
    [({"rest"}, 200, 404), ({"sse"}, 404, 200), ({"mcp"}, 404, 404), ({"ws", "mcp"}, 426, 426)],
)
async def test_it_is_visible_as_sse(protocols: Any, plain: int, streamed: int) -> None:
    """What is hidden for `sse` has no stream, and what is hidden for `rest` nothing else."""
    feed = type("Feed", (Feed,), {"protocols": protocols})
    async with running(resources={"feed": feed}) as server:
        assert plain == (await ask(server, "GET", "/feed")).status
        assert streamed == (await ask(server, "GET", "/feed", headers=SSE_ONLY)).status
        described = (await ask(server, "GET", "/openapi")).json["paths"]

    assert ("/feed" in described) == (200 in (plain, streamed))
    if "/feed" not in described:
        return
    content = described["/feed"]["get"]["responses"]["200"]["content"]
    kinds = {"application/json": 200 == plain, EVENTS: 200 == streamed}
    assert {kind for kind, shown in kinds.items() if shown} == set(content)
    if 200 == streamed:
        assert "Its changes." == described["/feed"]["get"]["summary"]


async def test_openapi_describes_both_and_the_stream_alone() -> None:
    """One GET has the value and the stream; a contract says what the query is."""

    class Since(msgspec.Struct):
        start: int = 0

    async def connect(target: RequestTarget[Since]) -> AsyncIterator[int]:
        yield target.query.start

    connect.__annotations__["target"] = RequestTarget[Since]
    async with running(resources={"feed": Feed, "only": only(connect)}) as server:
        described = (await ask(server, "GET", "/openapi")).json["paths"]
        good = await ask(server, "GET", "/only?start=3", headers=SSE_ONLY)
        bad = await ask(server, "GET", "/only?start=x", headers=SSE_ONLY)

    assert {"application/json", EVENTS} == set(
        described["/feed"]["get"]["responses"]["200"]["content"]
    )
    assert {EVENTS: {}} == described["/only"]["get"]["responses"]["200"]["content"]
    assert ["start"] == [each["name"] for each in described["/only"]["get"]["parameters"]]
    assert "data: 3\n\n" == good.text
    assert (400, "/start") == (bad.status, bad.json["errors"][0]["path"])


async def test_a_returning_reader_says_what_it_had() -> None:
    """`Last-Event-ID`, or `?lastEventId=`, is on the context."""

    async def connect(_: Any, __: None, context: Context) -> AsyncIterator[str]:
        yield str(context.last_event_id)

    async with running(resources={"it": only(connect)}) as server:
        found = [
            (await ask(server, "GET", path, headers={**SSE_ONLY, **headers})).text
            for path, headers in (
                ("/it", {"Last-Event-ID": "7"}),
                ("/it?lastEventId=8", {}),
                ("/it", {}),
            )
        ]

    assert ["data: 7\n\n", "data: 8\n\n", "data: None\n\n"] == found


class Shapes:
    """`connect` in every shape."""

    @staticmethod
    async def none() -> AsyncIterator[str]:
        """Takes nothing."""
        yield "0"

    @staticmethod
    def one(target: RequestTarget) -> Any:
        """Sync, gives an iterator."""
        return iter([target.get("x")])

    @staticmethod
    async def two(target: RequestTarget, incoming: None) -> Any:
        """Returns a generator, once it is awaited."""
        await asyncio.sleep(0)
        return (text for text in (target.get("x"), str(incoming)))

    @classmethod
    async def three(cls, target: RequestTarget, incoming: None, context: Context) -> Any:
        """A class method."""
        yield f"{cls.__name__} {target.get('x')} {incoming} {context.method}"

    @staticmethod
    def any(*given: Any) -> Any:
        """Takes what comes."""
        yield str(len(given))


async def test_it_may_have_any_shape() -> None:
    """Static or class, sync or async or generator; it gets as many arguments as it takes."""
    shapes = {name: value for name, value in vars(Shapes).items() if not name.startswith("_")}
    mounts = {name: type("It", (Resource,), {"connect": value}) for name, value in shapes.items()}
    async with running(resources=mounts) as server:
        found = {
            name: (await ask(server, "GET", f"/{name}?x=y", headers=SSE_ONLY)).text
            for name in shapes
        }

    assert found == {
        "none": "data: 0\n\n",
        "one": "data: y\n\n",
        "two": "data: y\n\ndata: None\n\n",
        "three": "data: It y None GET\n\n",
        "any": "data: 3\n\n",
    }


def missing(target: Any, incoming: Any, context: Any, more: Any) -> Any:
    """Takes more than there is."""


def plain() -> dict[str, str]:
    """Is no stream."""
    return {}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"connect": one}, "It.connect must be static: write @staticmethod on the line above"),
        (
            {"connect": staticmethod(missing)},
            "takes what it is not given: it is given (target, incoming, context), by position",
        ),
        (
            {"connect": staticmethod(plain)},
            "It.connect says that it returns a plain value; expected messages one by one",
        ),
        (
            {"connect": staticmethod(one), "schemas": {"connect": Contract(body=int)}},
            "It.connect: a connect has no body, so its contract cannot name one",
        ),
    ],
)
def test_what_cannot_be_mounted_is_refused(body: Any, told: str) -> None:
    """The refusal names the class, the verb and the expectation."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set("it", type("It", (Resource,), body))

    assert told in str(refusal.value)


async def refused() -> AsyncIterator[str]:
    """Says at once that nobody need come back."""
    raise ResponseError(Response(204))
    yield ""


async def broken() -> AsyncIterator[str]:
    """Fails after the first message."""
    yield "one"
    raise RuntimeError


async def test_it_fails_as_any_stream_does() -> None:
    """Before the first message with a status of its own, after it in-band."""
    async with running(resources={"no": only(refused), "late": only(broken)}) as server:
        early = await ask(server, "GET", "/no", headers=SSE_ONLY)
        late = await ask(server, "GET", "/late", headers=SSE_ONLY)

    assert (204, "") == (early.status, early.text)
    assert late.text.startswith("data: one\n\nevent: harper-error\n")


async def test_a_plugin_that_did_not_start_has_no_stream() -> None:
    """Its mounts say so, whatever they are asked for."""

    def apply(scope: Scope) -> None:
        scope.resources.set("it", only(one))
        raise LookupError

    async with running(ECHO, handle_application=apply) as server:
        answers: list[Answered] = [
            await ask(server, "GET", "/it", headers=headers) for headers in ({}, SSE_ONLY)
        ]

    assert [500, 500] == [answer.status for answer in answers]
    assert all("plugin test did not start" in answer.text for answer in answers)
