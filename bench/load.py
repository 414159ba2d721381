"""Closed loops of cheap clients, and what one measured run of them says about a server.

What is not a stream is asked by `wrk` where it is installed, by a raw protocol otherwise; streams
are always read by one that only counts events. The server's processor time, in all threads and
processes, is the kernel's: it keeps its meaning when others use the machine, times by the clock do
not.
"""

import asyncio
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop
from machine import busy_ns, cpu_ns, family
from scenarios import Scenario
from servers import Target

STAMP = re.compile(rb'"content": ?"(\d{19})"')
TOKENS = re.compile(r"-t(\d+)")
LAST_CHUNK = b"\r\n0\r\n\r\n"
WRK_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
WRK_SCRIPT = (
    'wrk.method="POST"\nwrk.body=[==[{}]==]\nwrk.headers["Content-Type"]="application/json"\n'
)


@dataclass
class Tally:
    """What all clients of a run have seen."""

    open: int
    stop_at: float
    least_events: int = 0
    errors: int = 0
    units: int = 0
    seconds: list[float] = field(default_factory=list)
    added_ns: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One measured run; `late_ms` is what the median client waited beyond the backend's stamp."""

    units: int
    errors: int
    cpu_us: float
    per_second: float
    median_ms: float
    late_ms: float
    foreign_cores: float


class Calls(asyncio.Protocol):
    """One call after the other on a connection."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request, self._tally = request, tally
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        self._began = time.perf_counter()
        if self._began > self._tally.stop_at:
            self._transport.close()
        else:
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        self._buffer = buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = buffer[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            size = int(head[at + 15 : at + 27].split(b"\r\n", 1)[0])
            whole = len(buffer) >= end + 4 + size
        else:
            whole = buffer.endswith(LAST_CHUNK)
        if not whole:
            return
        self._buffer = b""
        self._tally.errors += head[9:12] != b"200"
        self._tally.units += 1
        self._tally.seconds.append(time.perf_counter() - self._began)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.open -= 1


class Streams(asyncio.Protocol):
    """One stream after the other on a connection: their events are counted, not read."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request, self._tally = request, tally

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        self._tail, self._events = b"", 0
        self._running = time.perf_counter() < self._tally.stop_at
        if self._running:
            self.transport.write(self._request)
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        if not self._events and data.startswith(b"HTTP/1.") and data[9:12] != b"200":
            tally.errors += 1
        events = data.count(b"data: ")
        self._events += events
        tally.units += events
        now = time.monotonic_ns()
        tally.added_ns += [now - int(stamp) for stamp in STAMP.findall(data)]
        self._tail = (self._tail + data)[-24:]
        if b"[DONE]" in self._tail and self._tail.endswith(LAST_CHUNK):
            tally.errors += self._events < tally.least_events
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running and time.perf_counter() < self._tally.stop_at:
            self._tally.errors += 1
        self._tally.open -= 1


def request(target: Target, scenario: Scenario) -> bytes:
    """The bytes of one request."""
    body = scenario.body()
    lines = [
        f"{'POST' if body else 'GET'} {scenario.path} HTTP/1.1",
        f"Host: 127.0.0.1:{target.port}",
    ]
    lines += [f"{name}: {value}" for name, value in target.headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def connect(
    port: int, client: Callable[[], asyncio.Protocol], tally: Tally, *, pause: float = 0.0
) -> list[asyncio.Protocol]:
    """As many clients as the tally is to have."""
    loop = asyncio.get_running_loop()
    clients: list[asyncio.Protocol] = []
    for _ in range(tally.open):
        try:
            clients.append((await loop.create_connection(client, "127.0.0.1", port))[1])
        except OSError:
            tally.errors += 1
            tally.open -= 1
        await asyncio.sleep(pause)
    return clients


def _by_protocol(target: Target, scenario: Scenario, seconds: float) -> Tally:
    found = TOKENS.search(scenario.model)
    least = int(found[1]) if found and scenario.stream else 0
    tally = Tally(scenario.connections, time.perf_counter() + seconds, least)
    asked = request(target, scenario)

    async def drive() -> None:
        kind = Streams if scenario.stream else Calls
        await connect(target.port, lambda: kind(asked, tally), tally)
        # Streams end by themselves; who does not answer is not waited for.
        while tally.open and time.perf_counter() < tally.stop_at + 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    run_async(drive())
    return tally


def _by_wrk(wrk: str, target: Target, scenario: Scenario, seconds: float) -> Tally:
    command = [
        wrk,
        "-t1",
        f"-c{scenario.connections}",
        f"-d{round(seconds)}s",
        "--latency",
        "--timeout",
        "10s",
    ]
    for name, value in target.headers.items():
        command += ["-H", f"{name}: {value}"]
    with tempfile.TemporaryDirectory() as folder:
        if body := scenario.body():
            script = Path(folder, "request.lua")
            script.write_text(WRK_SCRIPT.format(body.decode()))
            command += ["-s", str(script)]
        command.append(f"{target.url}{scenario.path}")
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    broken = re.search(
        r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said
    )
    done, median = (
        re.search(r"(\d+) requests in", said),
        re.search(r"50%\s+([\d.]+)(us|ms|s)", said),
    )
    if not done or not median:
        raise RuntimeError(said)
    tally = Tally(
        0, 0.0, units=int(done[1]), seconds=[float(median[1]) * WRK_UNITS[median[2]] / 1e3]
    )
    tally.errors = int(refused[1]) if refused else 0
    tally.errors += sum(map(int, broken.groups())) if broken else 0
    return tally


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """Run this to its end."""
    uvloop.run(work)


def settle(target: Target) -> None:
    """Wait until a server has done what was left of an earlier run, but not for ever."""
    pids = family(target.pid)
    for _ in range(200):
        before = cpu_ns(pids)
        time.sleep(0.05)
        if cpu_ns(pids) - before < 0.2 * 50e6:
            return


def measure(target: Target, scenario: Scenario, seconds: float) -> Run:
    """One run of a scenario against a server."""
    pids = family(target.pid)
    wrk = None if scenario.stream or seconds < 1 else shutil.which("wrk")
    cpu, ours, busy, began = cpu_ns(pids), _own_ns(), busy_ns(), time.perf_counter()
    upstream = cpu_ns([target.upstream])
    if wrk:
        tally = _by_wrk(wrk, target, scenario, seconds)
    else:
        tally = _by_protocol(target, scenario, seconds)
    wall = time.perf_counter() - began
    cpu, upstream = cpu_ns(pids) - cpu, cpu_ns([target.upstream]) - upstream
    known = _own_ns() - ours + cpu + (upstream if target.upstream not in pids else 0)
    return Run(
        units=tally.units,
        errors=tally.errors + (not tally.units),
        cpu_us=cpu / max(1, tally.units) / 1e3,
        per_second=tally.units / wall,
        median_ms=_median(tally.seconds) * 1e3,
        late_ms=_median(tally.added_ns) / 1e6,
        foreign_cores=max(0.0, busy_ns() - busy - known) / wall / 1e9,
    )


def _own_ns() -> int:
    return round(sum(os.times()[:4]) * 1e9)


def _median(values: list[float] | list[int]) -> float:
    return statistics.median(values) if values else 0.0
