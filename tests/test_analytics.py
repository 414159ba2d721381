"""Analytics: what is measured, what becomes rows of `system.hdb_analytics`, and who reads them."""

import asyncio
import math
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from commands import ADMIN, get, said, serving
from commands import ECHO as MODELS
from harperpy import (
    Analytics,
    Body,
    InvalidBody,
    ModelCall,
    NotFound,
    RequestTarget,
    Resource,
    Response,
    Scope,
)
from harperpy.testing import ECHO, RunningServer, ScriptedUpstream, running
from helpers import HELLO, ask, operation, provider, until

# So long that none ends while a test runs.
DAY = f"{ECHO}\nanalytics: {{aggregatePeriod: 86400}}"
SHORT = f"{ECHO}\nanalytics: {{aggregatePeriod: 0.1}}"
OFF = ["analytics: {aggregatePeriod: false}", "analytics: {aggregatePeriod: -1}",
       "analytics: {aggregatePeriod: 0}", "plugins: {analytics: false}"]  # fmt: skip
SHARES = {
    "p1": 0.01, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95,
    "p99": 0.99, "p999": 0.999,
}  # fmt: skip
COMMON = {"id", "metric", "path", "method", "type", "period", "time", "worker", "count", "total"}
ECHO_TWICE = "http: {port: 0, workers: 2}\noperationsApi: {network: {port: 0}}\n" + MODELS
PID = """
import os

from harperpy import Resource


class Pid(Resource):
    public = True

    @staticmethod
    def get():
        return os.getpid()
"""
Row = dict[str, Any]


class Plugin:
    """A plugin that keeps its scope, to measure by it."""

    scope: Scope

    def __call__(self, scope: Scope) -> None:
        """Start."""
        self.scope = scope

    def record(self, *given: Any) -> None:
        """As a plugin does it."""
        self.scope.server.record_action(*given)


async def found(server: RunningServer, metric: str, **search: Any) -> list[Row]:
    """The rows of a metric."""
    rows: list[Row] = await server.operate("get_analytics", metric=metric, **search)
    return rows


async def sums(server: RunningServer, metric: str) -> dict[Any, tuple[float, int]]:
    """By path and method, the total and the count of a metric."""
    rows = await found(server, metric)
    return {(one.get("path"), one.get("method")): (one["total"], one["count"]) for one in rows}


def left(root: Path, sql: str) -> list[Any]:
    """What a server that has ended left in its database."""
    with closing(sqlite3.connect(root / "system.db")) as database:
        return database.execute(sql).fetchall()


# Metrics of plugins

RANDOM = random.Random(7)  # noqa: S311  # no secret
DATA: dict[str, Sequence[float]] = {
    "one to ten thousand": [*range(1, 10_001)],
    "latencies": [RANDOM.lognormvariate(3, 1.5) for _ in range(20_000)],
    "twelve decades": [10 ** RANDOM.uniform(-6, 6) for _ in range(10_000)],
    "below and above zero": [RANDOM.uniform(-50, 100) for _ in range(10_000)],
    "mostly zeros": [0] * 900 + [5] * 100,
    "three": [1, 2, 1000],
    "one": [0.1],
    "the same": [123.456] * 1000,
    "the largest": [1e24, -1e24],
}


@pytest.mark.parametrize("values", DATA.values(), ids=DATA)
async def test_percentiles_are_within_a_percent(values: Sequence[float]) -> None:
    """Count, total and mean are exact, each percentile close to the value that has its rank."""
    plugin = Plugin()
    values = RANDOM.sample(values, len(values))
    async with running(DAY, handle_application=plugin) as server:
        for value in values:
            plugin.record(value, "size")
        (row,) = await found(server, "size")

    assert_measured(values, row)


@pytest.mark.parametrize("values", DATA.values(), ids=DATA)
async def test_percentiles_of_model_calls_are_as_good(values: Sequence[float]) -> None:
    """Calls count many at a time, and the row is the one that they would make one by one."""
    values = RANDOM.sample(values, len(values))
    async with running(DAY) as server:
        for number, value in enumerate(values):
            call = ModelCall(id=number, created=0, method="embed", model="m", latency_ms=value)
            server.server.core.ledger.record(call)
        (row,) = await found(server, "model-embed")

    assert_measured(values, row)


def assert_measured(values: Sequence[float], row: Row) -> None:
    """Check what a row says of these values."""
    ranked = sorted(values)
    assert len(values) == row["count"]
    assert sum(values) == pytest.approx(row["total"])
    assert sum(values) / len(values) == pytest.approx(row["mean"])
    for name, share in SHARES.items():
        exact = ranked[math.ceil(share * len(ranked)) - 1]
        assert exact == pytest.approx(row[name], rel=0.01, abs=1e-9), name


async def test_a_resource_measures() -> None:
    """Numbers become a distribution, truths a ratio, by path, method and type; all are custom."""
    plugin = Plugin()

    class Orders(Resource):
        public = True

        @staticmethod
        async def post(target: RequestTarget, data: Body) -> None:
            order = await data
            plugin.record(order["price"], "price", order["shop"], "buy", "retail")
            plugin.record(order["price"] > 100, "large", order["shop"])

    orders = [("berlin", 20), ("berlin", 900), ("rome", 7)]
    async with running(DAY, resources={"orders": Orders}, handle_application=plugin) as server:
        for shop, price in orders:
            assert (
                204
                == (
                    await ask(server, "POST", "/orders", json={"shop": shop, "price": price})
                ).status
            )
        prices, large = await found(server, "price"), await found(server, "large")
        custom = await server.operate("list_metrics", metric_types=["custom"])
        described = await server.operate("describe_metric", metric="price")
        ratio = await server.operate("describe_metric", metric="large")

    assert [("berlin", 2, 920), ("rome", 1, 7)] == [
        (one["path"], one["count"], one["total"]) for one in prices
    ]
    assert {("buy", "retail")} == {(one["method"], one["type"]) for one in prices}
    assert [("berlin", 2, 1, 0.5), ("rome", 1, 0, 0)] == [
        (one["path"], one["count"], one["total"], one["ratio"]) for one in large
    ]
    assert ["large", "price"] == custom
    types = {one["name"]: one["type"] for one in described["attributes"]}
    assert COMMON | {"mean", *SHARES} == {*types}
    assert {"metric", "path", "method", "type"} == {k for k, v in types.items() if v == "string"}
    assert COMMON | {"ratio"} == {one["name"] for one in ratio["attributes"]}


async def test_a_function_is_asked_when_rows_are_made(caplog: pytest.LogCaptureFixture) -> None:
    """Each time anew; one that fails is logged, and all others are there."""
    plugin, waiting = Plugin(), [1, 2, 3]
    async with running(DAY, handle_application=plugin) as server:
        plugin.record(lambda: len(waiting), "waiting")
        plugin.record(lambda: not waiting, "empty")
        plugin.record(lambda: 1 / 0, "broken")
        plugin.record(lambda: "many", "text")
        plugin.record(lambda: float("nan"), "none")
        before = await found(server, "waiting") + await found(server, "empty")
        waiting.clear()
        after = await found(server, "waiting") + await found(server, "empty")
        failed = [await found(server, name) for name in ("broken", "text", "none")]

    assert [(3, 1), (0, 1)] == [(one["total"], one["count"]) for one in before]
    assert [(0, 1), (1, 1)] == [(one["total"], one["count"]) for one in after]
    assert [[], [], []] == failed
    for name in ("broken", "text", "none"):
        assert f"the metric '{name}' cannot be measured" in caplog.messages


async def test_another_function_takes_its_place() -> None:
    """A series has one function at a time."""
    plugin = Plugin()
    async with running(DAY, handle_application=plugin) as server:
        plugin.record(lambda: 1, "it")
        plugin.record(lambda: 2, "it")

        assert [2] == [one["total"] for one in await found(server, "it")]


async def later() -> int:
    """A function that cannot be asked at once."""
    return 1


REFUSED: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (("1", "m"), TypeError, "Invalid metric value type str"),
    ((None, "m"), TypeError, "Invalid metric value type NoneType"),
    ((1j, "m"), TypeError, "Invalid metric value type complex"),
    ((later, "m"), TypeError, "Invalid metric value type function"),
    ((float("nan"), "m"), ValueError, "between -1e24 and 1e24, got nan"),
    ((float("inf"), "m"), ValueError, "between -1e24 and 1e24, got inf"),
    ((-(10**400), "m"), ValueError, "between -1e24 and 1e24"),
    ((1, None), TypeError, "metric: expected a string, got NoneType"),
    ((1, "m", 5), TypeError, "path: expected a string, got int"),
    ((True, "m", None, b"GET"), TypeError, "method: expected a string, got bytes"),
    ((lambda: 1, "m", None, None, 1), TypeError, "type: expected a string, got int"),
]


@pytest.mark.parametrize(("given", "error", "told"), REFUSED)
async def test_what_is_no_measure_is_refused(
    given: tuple[Any, ...], error: type[Exception], told: str
) -> None:
    """By a sentence that says what was expected; nothing of it is counted."""
    plugin = Plugin()
    async with running(DAY, handle_application=plugin) as server:
        with pytest.raises(error, match=told):
            plugin.record(*given)
        assert [] == await server.operate("list_metrics", metric_types=["custom"])


async def test_odd_names_are_written(tmp_path: Path) -> None:
    """What no database takes as text does not keep the other rows from it."""
    plugin = Plugin()
    async with running(DAY, root=tmp_path, handle_application=plugin):
        plugin.record(1, "\ud800", "\0")
        plugin.record(2, "fine")

    names = left(tmp_path, "SELECT metric FROM hdb_analytics WHERE metric IN ('?', 'fine')")
    assert {("?",), ("fine",)} == {*names}


NAMES: dict[str, Callable[[int], tuple[str, str | None]]] = {
    "paths": lambda at: ("visits", f"/{at}"),
    "metrics": lambda at: (f"visits-{at}", None),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_too_many_series_become_one(
    name: Callable[[int], tuple[str, str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    """What is new beyond the bound counts as `other`, nothing is lost, and one warning says it."""
    plugin = Plugin()
    async with running(DAY, handle_application=plugin) as server:
        for at in range(3000):
            plugin.record(1, *name(at))
        metrics = await server.operate("list_metrics", metric_types=["custom"])
        rows = [row for metric in metrics for row in await found(server, metric)]

    assert 1000 <= len(rows) <= 1101
    assert 3000 == sum(one["count"] for one in rows)
    (others,) = (one for one in rows if one["count"] > 1)
    assert "other" in (others.get("path"), others["metric"])
    assert 1 == sum("more than 1000 series" in one for one in caplog.messages)


async def test_too_many_functions_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Their number has a bound too."""
    analytics = Analytics(60)
    for at in range(1500):
        analytics.record(lambda: 1, "gauge", str(at))

    assert 1000 == len(analytics.live())
    assert 1 == sum("more than 1000 series" in one for one in caplog.messages)


@pytest.mark.parametrize("config", OFF)
async def test_it_can_be_turned_off(config: str, tmp_path: Path) -> None:
    """Nothing is measured and nothing written; to measure does nothing, and rows of old stay."""
    plugin = Plugin()
    async with running(DAY, root=tmp_path, handle_application=plugin):
        plugin.record(1, "old")
    before = left(tmp_path, "SELECT * FROM hdb_analytics")
    async with running(f"{ECHO}\n{config}", root=tmp_path, handle_application=plugin) as server:
        assert plugin.scope.analytics is None
        plugin.record(1, "new")
        plugin.record(lambda: 1, "gauge")
        assert 200 == (await ask(server, "GET", "/v1/models")).status
        if "plugins" not in config:
            assert [1] == [one["total"] for one in await found(server, "old")]
            assert [] == await found(server, "new") + await found(server, "duration")

    assert before == left(tmp_path, "SELECT * FROM hdb_analytics")


# What the server measures


class Thing(Resource):
    """Answers at a path with an id, and takes what is sent."""

    public = True
    sub_paths = True

    @staticmethod
    def get(target: RequestTarget) -> str:
        """Its id."""
        return target.id or "none"

    @staticmethod
    async def post(target: RequestTarget, data: Body) -> Response:
        """A status of the caller's choice."""
        return Response(status=int(await data), body=b"12345")


async def test_requests_count_by_mount_and_method() -> None:
    """Durations, statuses and bytes; never the URL, and no series for a method nobody knows."""
    async with running(DAY, resources={"things": Thing}) as server:
        for path in ("/things/1", "/things/2?secret=3", "/nowhere/4"):
            await ask(server, "GET", path)
        for status in (201, 404, 503):
            json = {"headers": {"Content-Type": "application/json"}, "data": str(status)}
            await ask(server, "POST", "/things/5", **json)
        for method in ("PURGE", "MKCOL"):
            assert (await ask(server, method, "/things")).status >= 400
        names = (
            "duration",
            "success",
            "bytes-sent",
            "bytes-received",
            "response_200",
            "response_503",
        )
        told = {name: await sums(server, name) for name in names}
        everything = str([await found(server, name) for name in names])

    get, post, other = ("things", "GET"), ("things", "POST"), ("things", "other")
    assert {get: 2, post: 3, other: 2, (None, "GET"): 1} == {
        key: count for key, (_, count) in told["duration"].items()
    }
    assert all(total > 0 for total, _ in told["duration"].values())
    assert {get: (2, 2), post: (1, 3), other: (0, 2), (None, "GET"): (0, 1)} == told["success"]
    assert {get: (2, 2)} == told["response_200"]
    assert {post: (1, 1)} == told["response_503"]
    assert (len('"1""2"'), 2) == told["bytes-sent"][get]
    assert (15, 3) == told["bytes-sent"][post]
    assert {post: (9, 3)} == told["bytes-received"]
    assert not any(text in everything for text in ("secret", "nowhere", "PURGE", "/"))


async def test_however_many_requests_each_counts_once() -> None:
    """They are counted many at a time, and none is missed or counted twice in between."""
    async with running(DAY, resources={"things": Thing}) as server:
        for number in range(1, 1201):
            await ask(server, "GET", f"/things/{number:04}")
            if number in (511, 512, 513, 1200):
                durations, sent = await sums(server, "duration"), await sums(server, "bytes-sent")
                assert number == durations["things", "GET"][1]
                assert (6 * number, number) == sent["things", "GET"]


async def test_a_stream_has_a_head_and_a_transfer() -> None:
    """Its duration ends where its transfer begins; all its bytes count, and its tokens' speed."""
    async with running(DAY) as server, server.session() as session:
        body = HELLO | {"model": "default", "stream": True}
        async with session.post("/v1/chat/completions", json=body) as response:
            size = len(await response.read())
        core = server.server.core
        await until(lambda: bool(core.analytics and core.analytics.live("transfer")))
        path = ("v1/chat/completions", "POST")
        (duration,), (transfer,) = await found(server, "duration"), await found(server, "transfer")

        assert (
            path == (transfer["path"], transfer["method"]) == (duration["path"], duration["method"])
        )
        assert {path: (size, 1)} == await sums(server, "bytes-sent")
        assert {path: (1, 1)} == await sums(server, "success")


async def test_who_leaves_early_is_no_success() -> None:
    """A client that is gone before its answer counts, and has no duration."""
    inside, ended = asyncio.Event(), asyncio.Event()

    class Slow(Resource):
        public = True

        @staticmethod
        async def get() -> None:
            inside.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    async with asyncio.timeout(20), running(DAY, resources={"slow": Slow}) as server:
        asking = asyncio.create_task(ask(server, "GET", "/slow"))
        await inside.wait()
        asking.cancel()
        await ended.wait()
        core = server.server.core
        await until(lambda: bool(core.analytics and core.analytics.live("success")))

        assert {("slow", "GET"): (0, 1)} == await sums(server, "success")
        assert {} == await sums(server, "duration")


async def test_operations_count_by_name() -> None:
    """Their type says so; a name that is none makes no series of its own."""
    async with running(DAY) as server:
        admin = f"Bearer {server.api_key}"
        for body in ({"operation": "user_info"}, {"operation": "no_such"}, {"operation": "sql"}):
            await operation(server, body, admin)
        rows = await found(server, "success")

    assert {("user_info", 1), ("", 0), ("sql", 0)} == {(one["path"], one["total"]) for one in rows}
    assert {("operation", "POST")} == {(one["type"], one["method"]) for one in rows}


async def test_connections_and_sockets_are_counted() -> None:
    """Those that were made, and those that are open."""

    class Talk(Resource):
        public = True

        @staticmethod
        async def connect(target: RequestTarget, incoming: Any) -> Any:
            async for item in incoming:
                yield item

    async with running(DAY, resources={"talk": Talk}) as server, server.session() as session:
        async with session.ws_connect("/talk") as socket:
            await socket.send_str("hello")
            await socket.receive_str()
            sockets, open_ = await sums(server, "ws-connections"), await sums(server, "connections")
        core = server.server.core

        def closed() -> bool:
            rows = core.analytics.live("ws-connections") if core.analytics else []
            return [0, 0, 0] == [row["total"] for row in rows]

        await until(closed)
        made = await sums(server, "connection")
        assert {} == await sums(server, "duration")

    assert {"rest": 1, "operations": 0, "local": 0} == {
        key[0]: one[0] for key, one in sockets.items()
    }
    assert {"rest": 1, "operations": 0, "local": 0} == {
        key[0]: one[0] for key, one in open_.items()
    }
    assert {("rest", None): (1, 1)} == made


async def test_requests_that_find_no_place_are_counted() -> None:
    """As `service-unavailable`."""
    inside, go = asyncio.Event(), asyncio.Event()

    class Slow(Resource):
        public = True

        @staticmethod
        async def post() -> None:
            inside.set()
            await go.wait()

    config = f"{DAY}\nhttp: {{maxConcurrentRequests: 1, requestQueueLimit: 0}}"
    async with asyncio.timeout(20), running(config, resources={"slow": Slow}) as server:
        first = asyncio.create_task(ask(server, "POST", "/slow"))
        await inside.wait()
        assert 503 == (await ask(server, "POST", "/slow")).status
        go.set()
        await first

        assert {("rest", None): (1, 1)} == await sums(server, "service-unavailable")


async def test_model_calls_count_by_backend_and_method(upstream: ScriptedUpstream) -> None:
    """Each attempt, its tokens and its success; streams with their first token and speed."""
    config = f"{provider(upstream.url)}\nanalytics: {{aggregatePeriod: 86400}}"
    async with running(config) as server:
        for more in ({}, {"stream": True}, {"model": "nobody-knows-it"}):
            await ask(server, "POST", "/v1/chat/completions", json=HELLO | more)
        await ask(server, "POST", "/v1/embeddings", json={"model": "default", "input": "hello"})
        rows = {(one["backend"], one["method"]): one for one in await server.rows()}
        calls = await sums(server, "model_call")
        tokens = {
            method: await sums(server, f"model-{method}-tokens")
            for method in ("generate", "generateStream", "embed")
        }
        times = {method: await sums(server, f"model-{method}") for method in tokens}
        first, speed = await sums(server, "ttft_ms"), await sums(server, "tokens_per_s")

    assert {
        ("openai", "generate"): (1, 1),
        ("openai", "generateStream"): (1, 1),
        ("unknown", "generate"): (0, 1),
        ("openai", "embed"): (1, 1),
    } == calls
    for method, counted in tokens.items():
        row = rows["openai", method]
        kinds = ("prompt_tokens", "completion_tokens", "embedding_tokens")
        spent = sum(row[kind] or 0 for kind in kinds)
        assert spent
        assert {("openai", None): (spent, 1)} == counted
        assert times[method]["openai", None] == (row["latency_ms"], 1)
    stream = rows["openai", "generateStream"]
    assert {("openai", "generateStream"): (stream["ttft_ms"], 1)} == first
    seconds = (stream["latency_ms"] - stream["ttft_ms"]) / 1000
    assert (stream["completion_tokens"] - 1) / seconds == pytest.approx(
        speed["openai", "generateStream"][0]
    )


async def test_a_server_measures_itself() -> None:
    """Processor, memory, loop, database, tables and disk, at the end of each period."""
    async with running(SHORT) as server:
        await until(lambda: bool(server.server.core.analytics))

        async def known() -> dict[str, set[Any]]:
            names = (
                "cpu-usage",
                "resource-usage",
                "utilization",
                "database-size",
                "storage-volume",
            )
            return {name: {row.get("path") for row in await found(server, name)} for name in names}

        sizes: list[Row] = []
        async with asyncio.timeout(20):
            while not sizes:
                sizes = await found(server, "table-size")
        paths = await known()
        (memory, *_) = await found(
            server, "resource-usage", conditions=[{"attribute": "path", "value": "rss"}]
        )

    assert {
        "cpu-usage": {"user", "system"},
        "resource-usage": {"cpu", "rss"},
        "utilization": {None},
        "database-size": {"system"},
        "storage-volume": {"size", "free"},
    } == paths
    assert {"hdb_user", "hdb_analytics"} <= {one["path"] for one in sizes}
    assert memory["total"] > 10_000_000


# Rows


async def test_a_server_that_stops_writes_what_it_has(tmp_path: Path) -> None:
    """The rows are there afterwards, for SQL and for the operations of the next server."""
    plugin = Plugin()
    async with running(DAY, root=tmp_path, handle_application=plugin):
        plugin.record(2, "price", "berlin")
        plugin.record(4, "price", "berlin")
        plugin.record(*(True, "large"))
    async with running(DAY, root=tmp_path) as server:
        sql = (
            "SELECT * FROM system.hdb_analytics WHERE metric IN ('price', 'large') ORDER BY metric"
        )
        large, price = await server.operate("sql", sql=sql)
        (row,) = await found(server, "price")
        custom = await server.operate("list_metrics", metric_types=["custom"])
        described = await server.operate("describe_metric", metric="large")

    assert (1, 1, 1.0, None) == tuple(large[one] for one in ("count", "total", "ratio", "mean"))
    assert (2, 6, 3, 4, None) == tuple(
        price[one] for one in ("count", "total", "mean", "p999", "ratio")
    )
    assert {name: value for name, value in price.items() if value is not None} == row
    assert ["large", "price"] == custom
    assert COMMON | {"ratio"} == {one["name"] for one in described["attributes"]}


async def test_each_period_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Its time is a multiple of the period's length, and what is counted is counted once."""
    plugin = Plugin()
    rows: list[Row] = []
    async with (
        asyncio.timeout(20),
        running(SHORT, root=tmp_path, handle_application=plugin) as server,
    ):
        for _ in range(2):
            count = len(rows)
            plugin.record(1, "turn")
            while len(rows) == count:
                rows = [one for one in await found(server, "turn") if "id" in one]

    stored = left(
        tmp_path, "SELECT count, time FROM hdb_analytics WHERE metric = 'turn' ORDER BY id"
    )
    assert [1, 1] == [count for count, _ in stored]
    assert (
        [one["time"] for one in rows]
        == [time for _, time in stored]
        == sorted({*(one["time"] for one in rows)})
    )
    assert all(time / 100 == pytest.approx(round(time / 100), abs=1e-3) for _, time in stored)


async def test_rows_wait_for_a_locked_database(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No request notices; the operations know the rows meanwhile, and each is written once."""
    plugin = Plugin()
    config = f"{SHORT}\ndatabase: {{busyTimeout: 10ms}}"
    async with running(config, root=tmp_path, handle_application=plugin) as server:
        with closing(sqlite3.connect(tmp_path / "system.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            plugin.record(5, "price")
            await until(lambda: sum("wait to be written" in one for one in caplog.messages) > 1)
            assert 200 == (await ask(server, "GET", "/v1/models")).status
            assert [5] == [one["total"] for one in await found(server, "price")]
            other.execute("COMMIT")
        await until(
            lambda: bool(left(tmp_path, "SELECT 1 FROM hdb_analytics WHERE metric = 'price'"))
        )
        assert [5] == [one["total"] for one in await found(server, "price")]

    assert [(1, 5)] == left(
        tmp_path, "SELECT count, total FROM hdb_analytics WHERE metric = 'price'"
    )
    assert [(1,)] == left(
        tmp_path,
        "SELECT count FROM hdb_analytics WHERE metric = 'duration' AND path = 'v1/models'",
    )


async def test_too_many_rows_that_wait_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest go, and the log says how many."""
    monkeypatch.setattr("harperpy.plugins.analytics._MOST_WAITING", 30)
    config = f"{SHORT}\ndatabase: {{busyTimeout: 10ms}}"
    async with running(config, root=tmp_path, handle_application=(plugin := Plugin())):
        with closing(sqlite3.connect(tmp_path / "system.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            plugin.record(5, "price")
            await until(lambda: any("rows of analytics are lost" in one for one in caplog.messages))
            await until(
                lambda: sum("30 rows of analytics wait" in one for one in caplog.messages) > 2
            )
            other.execute("COMMIT")

    assert [] == left(tmp_path, "SELECT 1 FROM hdb_analytics WHERE metric = 'price'")


async def test_rows_that_are_written_wait_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many periods end, the bound on what waits is for what is not written."""
    monkeypatch.setattr("harperpy.plugins.analytics._MOST_WAITING", 60)
    async with asyncio.timeout(20), running(SHORT) as server:
        while len(await found(server, "utilization")) < 12:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0)

    assert not any("rows of analytics" in one for one in caplog.messages)


async def test_each_worker_writes_its_own_rows(tmp_path: Path) -> None:
    """They say whose they are, and what two workers counted adds up."""
    config = ECHO_TWICE + "analytics: {aggregatePeriod: 86400}\n"
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "resources.py").write_text(PID)
    asked, answered = 0, set[int]()
    async with serving(tmp_path, "run", environ=ADMIN) as server:
        while len(answered) < 2:
            asked += 1
            answered.add((await get(f"{server.url}/Pid"))[1])

    select = "SELECT worker, SUM(count) AS n, COUNT(DISTINCT id) AS r FROM system.hdb_analytics"
    rows = await said(tmp_path, "sql", f"{select} WHERE path = 'Pid' GROUP BY worker")
    durations = await said(tmp_path, "get_analytics", "metric=duration")

    assert {0, 1} == {row["worker"] for row in rows} == {row["worker"] for row in durations}
    assert asked == sum(row["count"] for row in durations if row["path"] == "Pid")
    # One row each of duration, success, bytes-sent and response_200, in which each request counts.
    assert 4 * asked == sum(row["n"] for row in rows)
    assert [4, 4] == [row["r"] for row in rows]


async def test_old_rows_go(tmp_path: Path) -> None:
    """Those older than `analytics.retention` are removed when a server starts; others stay."""
    plugin = Plugin()
    async with running(DAY, root=tmp_path, handle_application=plugin):
        plugin.record(1, "old")
        plugin.record(1, "new")
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute("UPDATE hdb_analytics SET time = time - 2 * 86400000 WHERE metric = 'old'")
    config = f"{ECHO}\nanalytics: {{aggregatePeriod: 86400, retention: 1d}}"
    async with running(config, root=tmp_path):
        await until(lambda: not left(tmp_path, "SELECT 1 FROM hdb_analytics WHERE metric = 'old'"))

    assert [(1,)] == left(tmp_path, "SELECT count FROM hdb_analytics WHERE metric = 'new'")


async def test_a_database_of_before_gets_the_table(tmp_path: Path) -> None:
    """A file of the fifth version of the schema is brought up to date."""
    async with running(DAY, root=tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "system.db")) as database, database:
        database.execute("DROP TABLE hdb_analytics")
        database.execute("PRAGMA user_version = 5")
    async with running(DAY, root=tmp_path, handle_application=(plugin := Plugin())):
        plugin.record(1, "it")

    assert [("it",)] == left(tmp_path, "SELECT metric FROM hdb_analytics WHERE metric = 'it'")


# Operations

WANTED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["a", "b", "c"]),
    ({"conditions": [{"attribute": "path", "value": "b"}]}, ["b"]),
    ({"conditions": [{"attribute": "path", "comparator": "not_equal", "value": "b"}]}, ["a", "c"]),
    (
        {"conditions": [{"attribute": "total", "comparator": "greater_than", "value": 1}]},
        ["b", "c"],
    ),
    (
        {"conditions": [{"attribute": "total", "comparator": "greater_than_equal", "value": 2}]},
        ["b", "c"],
    ),
    ({"conditions": [{"attribute": "total", "comparator": "less_than", "value": 2}]}, ["a"]),
    ({"conditions": [{"attribute": "total", "comparator": "less_than_equal", "value": 1}]}, ["a"]),
    (
        {"conditions": [{"attribute": "metric", "comparator": "contains", "value": "ri"}]},
        ["a", "b", "c"],
    ),
    ({"conditions": [{"attribute": "path", "comparator": "starts_with", "value": "c"}]}, ["c"]),
    ({"conditions": [{"attribute": "path", "comparator": "ends_with", "value": "z"}]}, []),
    ({"conditions": [{"attribute": "path", "comparator": "less_than", "value": 5}]}, []),
    ({"conditions": [{"attribute": "total", "comparator": "contains", "value": "1"}]}, []),
    ({"conditions": [{"attribute": "type", "value": None}]}, ["a", "b", "c"]),
    ({"start_time": 4e12}, []),
    ({"end_time": 1}, []),
    ({"start_time": 1, "end_time": 4e12}, ["a", "b", "c"]),
]


@pytest.mark.parametrize("written", [False, True], ids=["live", "written"])
async def test_get_analytics_finds_what_is_asked(written: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Times and conditions mean the same for rows that are written and for those that are not."""
    plugin = Plugin()

    async def look(server: RunningServer) -> None:
        for search, paths in WANTED:
            rows = await found(server, "price", **search)
            assert paths == sorted(one["path"] for one in rows), search
        rows = await found(server, "price", get_attributes=["path", "total", "ratio"])
        assert [
            {"path": "a", "total": 1},
            {"path": "b", "total": 2},
            {"path": "c", "total": 3},
        ] == rows

    async with running(DAY, root=tmp_path, handle_application=plugin) as server:
        for total, path in enumerate("abc", 1):
            plugin.record(total, "price", path)
        if not written:
            await look(server)
    if written:
        async with running(DAY, root=tmp_path) as server:
            await look(server)


@pytest.mark.parametrize(
    ("operation_", "given", "told"),
    [
        ("get_analytics", {}, "metric"),
        (
            "get_analytics",
            {"metric": "m", "get_attributes": ["p42"]},
            "get_attributes: 'p42' is no",
        ),
        (
            "get_analytics",
            {"metric": "m", "start_time": 2, "end_time": 1},
            "end_time: expected a moment that is not before",
        ),
        (
            "get_analytics",
            {"metric": "m", "conditions": [{"attribute": "x", "value": 1}]},
            "conditions: 'x' is no attribute",
        ),
        (
            "get_analytics",
            {"metric": "m", "conditions": [{"attribute": "path", "value": 1, "comparator": "is"}]},
            "comparator",
        ),
        ("list_metrics", {"metric_types": ["all"]}, "metric_types"),
    ],
)
async def test_bad_questions_are_refused(
    server: RunningServer, operation_: str, given: dict[str, Any], told: str
) -> None:
    """With a 400 that names what is wrong."""
    with pytest.raises(InvalidBody) as refused:
        await server.operate(operation_, **given)

    assert told in f"{refused.value} {refused.value.errors}"


async def test_metrics_are_listed_and_described_before_they_have_rows(
    server: RunningServer,
) -> None:
    """The server's own are known; what nobody measures is 404."""
    listed = await server.operate("list_metrics")
    described = await server.operate("describe_metric", metric="ttft_ms")

    assert {"duration", "success", "model_call", "ttft_ms", "table-size"} <= {*listed}
    assert {"metric", "p99", "ratio"} <= {one["name"] for one in described["attributes"]}
    with pytest.raises(NotFound, match="Metric 'nothing' not found"):
        await server.operate("describe_metric", metric="nothing")


@pytest.mark.parametrize("name", ["get_analytics", "list_metrics", "describe_metric"])
async def test_only_super_users_read_it(server: RunningServer, name: str) -> None:
    """Anyone else is refused, by the operations and by SQL."""
    key = await server.key_for("ada")
    parameters = {} if name == "list_metrics" else {"metric": "duration"}
    for body in (
        {"operation": name, **parameters},
        {"operation": "sql", "sql": "SELECT * FROM system.hdb_analytics"},
    ):
        assert 403 == (await operation(server, body, f"Bearer {key}"))[0]
        assert 200 == (await operation(server, body, f"Bearer {server.api_key}"))[0]
        assert 401 == (await operation(server, body))[0]
