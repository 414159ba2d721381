"""The context and its signal: there in every verb, right for each request, told of leaving."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from harperpy import (
    AbortController,
    Aborted,
    AbortSignal,
    Body,
    Context,
    EventStream,
    GenerateChunk,
    Permission,
    RequestTarget,
    Resource,
    Role,
    Scope,
    User,
    Verified,
    define_backend,
    get_context,
)
from harperpy.testing import RunningServer, running
from helpers import ask

Work = Callable[[Context], Awaitable[Any]]

SECONDS = 20
VERBS = pytest.mark.parametrize("verb", ["get", "post"])


def overriding(verb: str, work: Work) -> type[Resource]:
    """A class that overrides get or post, and adds nothing else."""
    if verb == "get":

        class Gets(Resource):
            @staticmethod
            async def get(target: RequestTarget, context: Context) -> Any:
                del target
                return await work(context)

        return Gets

    class Posts(Resource):
        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> Any:
            del target, data
            return await work(context)

    return Posts


async def answers(context: Context) -> str:
    """The least a verb can do."""
    return context.method


async def leave(
    server: RunningServer, entered: asyncio.Event, method: str = "GET", path: str = "/it"
) -> None:
    """Ask for something, and go away as soon as it has been entered."""
    call = asyncio.create_task(ask(server, method, path))
    await entered.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def granted(server: RunningServer, path: str, **user: Any) -> str:
    """The key of a plain user whose role opens one path."""
    permission = {"resources": {path: ["read", "create"]}}
    await server.operate("add_role", role="one_path", permission=permission)
    return await server.key_for("ada", role="one_path", **user)


# --- a class that overrides a verb, and adds nothing else


@VERBS
async def test_overriding_a_verb_keeps_anonymous_callers_out(verb: str) -> None:
    """Nobody who has not logged in reaches the overridden verb."""
    async with running(resources={"it": overriding(verb, answers)}) as server:
        assert 401 == (await ask(server, verb, "/it", key="")).status


@VERBS
async def test_overriding_a_verb_keeps_plain_users_out(verb: str) -> None:
    """A user to whom nothing was granted does not reach it either."""
    async with running(resources={"it": overriding(verb, answers)}) as server:
        assert 403 == (await ask(server, verb, "/it", key=await server.key_for("ada"))).status
        assert 200 == (await ask(server, verb, "/it")).status


@VERBS
async def test_overriding_a_verb_keeps_the_context(verb: str) -> None:
    """The context is given, is the current one, and knows who asks for what."""

    async def shows(context: Context) -> dict[str, Any]:
        return {
            "current": get_context() is context,
            "user": context.user and context.user.username,
            "tenant": context.tenant,
            "method": context.method,
            "path": context.path,
            "handler_path": context.handler_path,
            "query": context.request.query,
            "peer": context.request.peer,
            "header": context.headers["x-own"],
            "request_id": context.request_id,
            "last_event_id": context.last_event_id,
            "aborted": context.signal is not None and context.signal.aborted,
        }

    headers = {"X-Own": "1", "X-Request-Id": "mine", "Last-Event-ID": "7"}
    async with running(resources={"deep/it": overriding(verb, shows)}) as server:
        key = await granted(server, "deep/it", tenant="acme")
        answer = await ask(server, verb, "/deep/it/?x=1", key=key, headers=headers)

    expected = {
        "current": True,
        "user": "ada",
        "tenant": "acme",
        "method": verb.upper(),
        "path": "/deep/it/",
        "handler_path": "deep/it",
        "query": "x=1",
        "peer": "127.0.0.1",
        "header": "1",
        "request_id": "mine",
        "last_event_id": "7",
        "aborted": False,
    }
    assert expected == answer.json


@VERBS
async def test_overriding_a_verb_keeps_cancellation(verb: str) -> None:
    """When the client leaves, the verb's task is cancelled, and its signal has fired by then."""
    entered, left = asyncio.Event(), asyncio.Event()
    seen: list[Any] = []

    async def waits(context: Context) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(context.signal and context.signal.reason)
            left.set()
            raise

    async with (
        asyncio.timeout(SECONDS),
        running(resources={"it": overriding(verb, waits)}) as server,
    ):
        await leave(server, entered, verb)
        await left.wait()

    assert ["client_disconnected"] == seen


@VERBS
async def test_overriding_a_verb_keeps_the_account_of_its_model_calls(verb: str) -> None:
    """A model called inside is billed to the user and tenant who asked, at the path asked for."""

    async def calls(context: Context) -> str:
        return (await context.models.generate("hello there")).content

    async with running(resources={"deep/it": overriding(verb, calls)}) as server:
        key = await granted(server, "deep/it", tenant="acme")
        headers = {"x-request-id": "mine"}
        answer = await ask(server, verb, "/deep/it", key=key, headers=headers)
        (row,) = await server.rows()

    assert "hello there" == answer.json
    billed = {name: row[name] for name in ("user", "tenant", "app", "request_id", "method")}
    assert {
        "user": "ada",
        "tenant": "acme",
        "app": "deep/it",
        "request_id": "mine",
        "method": "generate",
    } == billed
    assert row["success"] is True


@VERBS
async def test_overriding_a_verb_keeps_the_account_of_a_call_cut_short(verb: str) -> None:
    """A client that leaves in the middle of a model's answer is billed for it as aborted."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        yield "one "
        yield "two"
        entered.set()
        await asyncio.Event().wait()

    async def calls(context: Context) -> None:
        try:
            async for _ in context.models.generate_stream("hello", model="slow"):
                pass
        finally:
            left.set()

    def apply(scope: Scope) -> None:
        scope.resources.set("it", overriding(verb, calls))
        backend = define_backend("slow", generate_stream=slow)
        scope.models.register_backend("generative", "slow", backend)

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        await leave(server, entered, verb)
        await left.wait()
        (row,) = await server.rows()

    assert ("HDB_ADMIN", "it", "aborted") == (row["user"], row["app"], row["error_code"])
    assert row["success"] is False
    assert 2 == row["completion_tokens"]


# --- the one context variable


def test_there_is_no_context_outside_a_request() -> None:
    """Asking for it where nobody asked for anything is an error that says so."""
    with pytest.raises(LookupError, match="outside a request"):
        get_context()


def name() -> str:
    """The current user's name."""
    user = get_context().user
    return user.username if user else "nobody"


class Names(Resource):
    """Tells the current user's name from wherever it is asked."""

    @staticmethod
    def get() -> Iterator[str]:
        """From a generator, at each step."""
        yield name()
        yield name()

    @staticmethod
    async def post() -> AsyncIterator[str]:
        """From an async generator, a task it starts, and a thread."""
        yield name()
        yield await asyncio.create_task(asyncio.sleep(0, name()))
        yield await asyncio.create_task(names_later())
        yield await asyncio.to_thread(name)
        yield name()

    @staticmethod
    async def put() -> EventStream:
        """From what it returns."""
        return EventStream(name() for _ in range(2))


async def names_later() -> str:
    """The name, as a task of its own sees it."""
    await asyncio.sleep(0)
    return name()


async def test_the_context_is_there_in_generators_tasks_and_threads() -> None:
    """Wherever a handler's work goes on, `get_context()` finds the same request."""
    async with running(resources={"names": Names}) as server:
        assert ["HDB_ADMIN"] * 2 == (await ask(server, "GET", "/names")).json
        assert ["HDB_ADMIN"] * 5 == (await ask(server, "POST", "/names")).json
        assert "data: HDB_ADMIN\n\n" * 2 == (await ask(server, "PUT", "/names")).text


async def test_requests_on_one_connection_have_each_their_own() -> None:
    """The next request of a kept connection starts with nothing of the one before."""
    seen: list[Context] = []

    class Keeps(Resource):
        public = True

        @staticmethod
        def get(target: RequestTarget, context: Context) -> str:
            del target
            seen.append(get_context())
            seen.append(context)
            context.response_headers["X-Seen"] = "yes"
            return name()

    resources = {"keeps": Keeps, "names": Names}
    async with running(resources=resources) as server, server.session("") as client:
        bearer = {"Authorization": f"Bearer {server.api_key}"}
        async with client.get("/keeps", headers=bearer) as first:
            assert ("yes", "HDB_ADMIN") == (first.headers["X-Seen"], await first.json())
        async with client.get("/keeps") as second:
            assert "nobody" == await second.json()
        async with client.get("/names") as third:
            assert (401, None) == (third.status, third.headers.get("X-Seen"))

    assert seen[0] is seen[1] is not seen[2]
    assert seen[2] is seen[3]


USERS = 50


async def test_fifty_users_at_once_are_not_mistaken_for_one_another() -> None:
    """With all of them in the middle of a stream, each step of each sees its own user."""
    together = asyncio.Barrier(USERS)

    class Crowd(Resource):
        @staticmethod
        def allow_read(user: User | None, target: RequestTarget, context: Context) -> bool:
            del target
            return user is context.user is not None

        @staticmethod
        async def get() -> AsyncIterator[list[str | None]]:
            for _ in range(3):
                await together.wait()
                context = get_context()
                yield [name(), context.tenant, context.headers["x-mine"], context.request_id]

    async def authenticate(credential: Any) -> Verified | None:
        token = getattr(credential, "token", "")
        await asyncio.sleep(0)
        role = Role("crowd", "crowd", Permission())
        return Verified(User(token, role, tenant=f"{token}-inc")) if token[:4] == "user" else None

    def apply(scope: Scope) -> None:
        scope.authenticators.append(authenticate)
        scope.resources.set("crowd", Crowd)

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        users = [f"user{number}" for number in range(USERS)]
        calls = [
            ask(server, "GET", "/crowd", key=user, headers={"X-Mine": user, "X-Request-Id": user})
            for user in users
        ]
        answers = await asyncio.gather(*calls)

    assert [[[user, f"{user}-inc", user, user]] * 3 for user in users] == [
        answer.json for answer in answers
    ]


# --- the signal


class Watch:
    """A resource's signal, as a task of its own waits for it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.signals: list[AbortSignal] = []
        self.waiting: asyncio.Task[None] | None = None

    def enter(self) -> None:
        """Note the current request's signal, and wait for it beside the handler."""
        signal = get_context().signal
        assert signal is not None
        self.signals.append(signal)
        self.waiting = asyncio.create_task(signal.wait())
        self.entered.set()


@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_the_signal_fires_when_the_client_leaves_a_stream(steps: int) -> None:
    """Before the first item or after some, who waits for the signal learns that nobody listens."""
    watch = Watch()

    class Streams(Resource):
        first_item_wait = 0

        @staticmethod
        async def get() -> EventStream:
            async def events() -> AsyncIterator[int]:
                for step in range(steps):
                    yield step
                watch.enter()
                await asyncio.Event().wait()

            return EventStream(events())

    async with asyncio.timeout(SECONDS), running(resources={"it": Streams}) as server:
        await leave(server, watch.entered)
        assert watch.waiting is not None
        await watch.waiting

    assert ["client_disconnected"] == [signal.reason for signal in watch.signals]


async def test_the_signal_fires_although_the_client_never_reads() -> None:
    """A writer that waits for room to write learns it too."""
    watch = Watch()
    piece = b"x" * (1 << 20)

    class Floods(Resource):
        @staticmethod
        async def get() -> EventStream:
            async def events() -> AsyncIterator[bytes]:
                watch.enter()
                while True:
                    yield piece

            return EventStream(events())

    async with asyncio.timeout(SECONDS), running(resources={"it": Floods}) as server:
        async with server.session() as client:
            response = await client.get("/it")
            response.close()
        assert watch.waiting is not None
        await watch.waiting

    assert ["client_disconnected"] == [signal.reason for signal in watch.signals]


@pytest.mark.usefixtures("way")
async def test_a_stream_that_is_closed_as_its_reader_left_knows_it() -> None:
    """It never waits, so that it is a write that finds the client gone."""
    seen = asyncio.get_running_loop().create_future()

    class Floods(Resource):
        @staticmethod
        async def get() -> EventStream:
            async def events() -> AsyncIterator[str]:
                signal = get_context().signal
                try:
                    while True:
                        yield "piece"
                finally:
                    seen.set_result(signal and signal.reason)

            return EventStream(events())

    async with asyncio.timeout(SECONDS), running(resources={"it": Floods}) as server:
        async with server.session() as client:
            response = await client.get("/it")
            response.close()
        reason = await seen

    assert "client_disconnected" == reason


async def test_a_callback_that_fails_is_its_own_business(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others are called all the same, the verb is cancelled, and the server stops."""
    entered, told, cancelled, stopped = (asyncio.Event() for _ in range(4))

    def fail() -> None:
        raise ZeroDivisionError

    async def get() -> None:
        context = get_context()
        for signal, event in ((context.signal, told), (context.stopping, stopped)):
            signal.add_callback(fail)
            signal.add_callback(event.set)
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    mounts = {"it": type("It", (Resource,), {"get": staticmethod(get)})}
    async with asyncio.timeout(20):
        async with running(resources=mounts) as server:
            await leave(server, entered)
            await asyncio.gather(told.wait(), cancelled.wait())
        await stopped.wait()

    assert 2 == caplog.text.count("a callback of an AbortSignal failed")


async def test_the_signal_stays_silent_when_all_went_well() -> None:
    """Answers, streams and refusals that were complete never fire it, even as connections close."""
    watch = Watch()

    class Ends(Resource):
        sub_paths = True

        @staticmethod
        async def get(target: RequestTarget) -> Any:
            watch.enter()
            if target.id == "stream":
                return EventStream(iter("ab"))
            if target.id == "refusal":
                raise ZeroDivisionError
            return iter([1, 2]) if target.id == "items" else target.id

    async with asyncio.timeout(SECONDS), running(resources={"ends": Ends}) as server:
        for method in ("GET", "HEAD"):
            for path in ("/ends", "/ends/value", "/ends/items", "/ends/stream", "/ends/refusal"):
                await ask(server, method, path)

    assert [None] * 10 == [signal.reason for signal in watch.signals]


async def test_a_task_left_behind_is_not_told_of_a_normal_end() -> None:
    """What a handler started in the background goes on when the answer is complete."""
    watch, go_on = Watch(), asyncio.Event()
    background: list[asyncio.Task[str]] = []

    async def works() -> str:
        await go_on.wait()
        return f"{name()} {get_context().signal is watch.signals[0]}"

    class Leaves(Resource):
        @staticmethod
        async def get() -> str:
            watch.enter()
            background.append(asyncio.create_task(works()))
            return "soon"

    async with asyncio.timeout(SECONDS), running(resources={"it": Leaves}) as server:
        assert "soon" == (await ask(server, "GET", "/it")).json
        go_on.set()
        assert "HDB_ADMIN True" == await background[0]

    assert watch.signals[0].aborted is False


async def test_a_client_that_leaves_costs_the_others_nothing() -> None:
    """The signal of one request is not that of its neighbours, not even of the same user."""
    both, left, go_on = asyncio.Barrier(3), asyncio.Event(), asyncio.Event()
    reasons: dict[str | None, str | None] = {}

    class Two(Resource):
        @staticmethod
        async def get(target: RequestTarget, context: Context) -> str:
            who = target.get("who")
            await both.wait()
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                left.set()
                raise
            finally:
                reasons[who] = context.signal and context.signal.reason
            return "done"

    async with asyncio.timeout(SECONDS), running(resources={"two": Two}) as server:
        leaving = asyncio.create_task(ask(server, "GET", "/two?who=leaves"))
        staying = asyncio.create_task(ask(server, "GET", "/two?who=stays"))
        await both.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await left.wait()
        go_on.set()
        assert "done" == (await staying).json

    assert {"leaves": "client_disconnected", "stays": None} == reasons


async def test_a_signal_given_to_a_model_call_ends_it_too() -> None:
    """`signal=context.signal` is what the call listens to anyway, and no call outlives it."""
    entered, left = asyncio.Event(), asyncio.Event()
    fired: list[bool] = []

    async def slow(_: Any, opts: Any) -> AsyncIterator[GenerateChunk]:
        entered.set()
        try:
            await asyncio.Event().wait()
            yield GenerateChunk(delta_content="never")
        finally:
            fired.append(opts.signal.aborted)
            left.set()

    async def calls(context: Context) -> str:
        return (await context.models.generate("hi", model="slow", signal=context.signal)).content

    def apply(scope: Scope) -> None:
        scope.resources.set("it", overriding("get", calls))
        backend = define_backend("slow", generate_stream=slow)
        scope.models.register_backend("generative", "slow", backend)

    async with asyncio.timeout(SECONDS), running(handle_application=apply) as server:
        await leave(server, entered)
        await left.wait()

    assert [True] == fired


async def test_a_guard_ends_its_own_block_and_nothing_else() -> None:
    """Whom the signal ends learns why; whom someone else cancels as well sees that instead."""

    async def block(signal: AbortSignal, entered: asyncio.Event) -> str:
        try:
            with signal.guard():
                with signal.guard():
                    pass  # The inner one lets go of no other.
                entered.set()
                await asyncio.Event().wait()
        except Aborted as error:
            task = asyncio.current_task()
            assert task is not None
            return f"{error} {task.cancelling()}"
        return "left"

    told: list[str | BaseException] = []
    for others in (False, True):
        stop, entered = AbortController(), asyncio.Event()
        task = asyncio.create_task(block(stop.signal, entered))
        await entered.wait()
        if others:
            task.cancel()
        stop.abort("enough")
        told += await asyncio.gather(task, return_exceptions=True)

    assert "enough" in str(told[0])
    assert str(told[0]).endswith(" 0")
    assert isinstance(told[1], asyncio.CancelledError)


async def test_a_signal_that_fires_later_ends_no_block_that_was_left() -> None:
    """A task that has come out of a guard goes on."""
    stop = AbortController()
    with stop.signal.guard():
        await asyncio.sleep(0)
    stop.abort()
    await asyncio.sleep(0)
    with pytest.raises(Aborted), stop.signal.guard():
        pass
