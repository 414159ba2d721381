"""Measures harperpy next to its peers, and says which of the wanted figures it reaches.

    python bench/run.py                          everything; writes bench/RESULTS.md
    python bench/run.py --only chat --rounds 3   some of it

Everything runs on this machine's loopback and is ended with the command.
"""

import argparse
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import memory
from load import Run, measure, settle
from machine import ALL_CPUS, LOAD_CPUS
from report import Figure, Ratios, results, tables
from scenarios import ALL, CHAT, ONE_CHAT, PACED, SPEED, STREAM, Scenario
from servers import FOUND, Servers, Target, harperpy, ready_seconds

RESULTS = Path(__file__).with_name("RESULTS.md")
FULL_ROUNDS = 5
OURS = "harperpy"
WARM_SECONDS = 0.7


@dataclass
class Bench:
    """One run of the command."""

    servers: Servers
    rounds: int
    seconds: float
    foreign: list[float] = field(default_factory=list)

    def interleaved(
        self, scenario: Scenario, targets: Mapping[str, Target]
    ) -> dict[str, list[Run]]:
        """A measured run of each target in each round; who begins moves on by one."""
        names = list(targets)
        for name in names:
            measure(targets[name], scenario, min(WARM_SECONDS, self.seconds))
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for number in range(self.rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                runs[name].append(self._one(name, targets[name], scenario))
        costs = (f"{name} {_median(runs[name], _cpu_us):.1f}" for name in names)
        tell(f"{scenario.name}: CPU us by {scenario.unit}: {', '.join(costs)}")
        return runs

    def _one(self, name: str, target: Target, scenario: Scenario) -> Run:
        settle(target)
        run = measure(target, scenario, self.seconds)
        self.foreign.append(run.foreign_cores)
        if name == OURS and run.errors:
            message = f"{scenario.name}: harperpy failed {run.errors} times"
            raise RuntimeError(message)
        return run

    def ratios(self, scenario: Scenario, targets: Mapping[str, Target]) -> Ratios:
        """Ours against each peer, round by round."""
        runs = self.interleaved(scenario, targets)
        failed = {name: sum(run.errors for run in runs[name]) for name in runs}
        by_peer = {
            name: [peer.cpu_us / mine.cpu_us for mine, peer in zip(runs[OURS], of, strict=True)]
            for name, of in runs.items()
            if name != OURS and not failed[name]
        }
        return Ratios(scenario.name, by_peer, [name for name, times in failed.items() if times])

    def memory(self, name: str) -> Iterator[Figure]:
        """Memory, of a new server each round: what it once had it may keep."""
        kind, _, count = name.partition(":")
        taken: list[memory.Taken] = []
        for _ in range(self.rounds):
            with Servers(self.servers.port()) as own:
                target = harperpy(own)
                # Streams leave behind what any later one uses again.
                measure(target, CHAT if kind == "idle" else STREAM, min(0.2, self.seconds))
                if kind == "idle":
                    taken.append(memory.idle(target, int(count)))
                elif kind == "slow":
                    taken.append(memory.slow(target, int(count), 3 * self.seconds))
                else:
                    taken.append(memory.stuck(target, int(count), 2 * self.seconds))
        each = [one.kib for one in taken]
        if kind == "idle":
            yield Figure("memory, idle", [one.before_mib for one in taken], "MiB", 60)
            yield Figure("memory by idle connection", each, "KiB", 8)
        elif kind == "slow":
            yield Figure("memory by slow stream", each, "KiB", 20)
        else:
            later = [one.later_kib for one in taken]
            yield Figure("memory by stream nobody reads", each, "KiB", 512)
            yield Figure("what it grows by after that", later, "KiB", 16)

    def workers(self) -> Iterator[Figure]:
        """Two processes against one, the load and the backend beside them."""
        with Servers(self.servers.port()) as own:
            backend = own.backend.pid
            targets = {OURS: harperpy(own), "two workers": harperpy(own, workers=2, on=ALL_CPUS)}
            for pid in (0, backend):
                os.sched_setaffinity(pid, ALL_CPUS)
            try:
                runs = self.interleaved(CHAT, targets)
            finally:
                os.sched_setaffinity(0, LOAD_CPUS)
        both = list(zip(runs["two workers"], runs[OURS], strict=True))
        cost = [two.cpu_us / one.cpu_us for two, one in both]
        speed = [two.per_second / one.per_second for two, one in both]
        yield Figure("CPU by call with two workers", cost, "of one's", 1.1)
        yield Figure("calls a second with two workers", speed, "of one's", 1.35, at_least=True)

    def ready(self) -> Iterator[Figure]:
        """The start, with a new data folder each time."""
        times: list[float] = []
        for _ in range(self.rounds):
            with Servers(self.servers.port()) as own:
                times.append(ready_seconds(own))
        yield Figure("ready after its start", times, "s", 0.7)

    def latency(self, ours: Target) -> Iterator[Figure]:
        """How much later than without the gateway an event, and a whole answer, is there."""
        targets = {OURS: ours, "direct": self.servers.backend}
        kinds: tuple[tuple[str, Scenario, Callable[[Run], float]], ...] = (
            ("event", PACED, lambda run: run.late_ms),
            ("call", ONE_CHAT, lambda run: run.median_ms),
        )
        for name, scenario, value in kinds:
            runs = self.interleaved(scenario, targets)
            both = zip(runs[OURS], runs["direct"], strict=True)
            added = [value(mine) - value(direct) for mine, direct in both]
            yield Figure(f"added latency by {name}", added, "ms", 0.3)


def tell(line: str) -> None:
    """How far it has come, for who waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure what was asked for; the exit code."""
    given = _options().parse_args()
    only = {*given.only.split(",")} if given.only else set[str]()
    names = [name for name in ALL if not only or {name, name.partition(":")[0]} & only]
    peers = [name for name in FOUND if not given.peers or name in given.peers.split(",")]
    os.sched_setaffinity(0, LOAD_CPUS)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Servers(given.port) as servers:
            bench = Bench(servers, given.rounds, given.seconds)
            shown, versions = _measured(bench, names, peers)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RuntimeError as error:
        tell(str(error))
        return 1
    print(shown)
    whole = len(names) == len(ALL) and len(peers) == len(FOUND) and given.rounds >= FULL_ROUNDS
    if whole or given.results:
        page = results(
            shown,
            rounds=given.rounds,
            seconds=given.seconds,
            foreign=statistics.median(bench.foreign or [0.0]),
            peers=versions,
        )
        (given.results or RESULTS).write_text(page, encoding="utf-8")
    return 0


def _measured(
    bench: Bench, names: Sequence[str], peers: Sequence[str]
) -> tuple[str, dict[str, str]]:
    speed = [scenario for scenario in SPEED if scenario.name in names]
    ratios: list[Ratios] = []
    figures: list[Figure] = []
    targets: dict[str, Target] = {}
    tell(f"This takes a while: {', '.join(names)}")
    if "ready" in names:
        figures += bench.ready()
    for name in names:
        if name.startswith(("idle", "slow", "stuck")):
            tell(name)
            figures += bench.memory(name)
    if "workers" in names:
        figures += bench.workers()
    if speed or "latency" in names:
        targets[OURS] = harperpy(bench.servers)
    if "latency" in names:
        figures += bench.latency(targets[OURS])
    if speed:
        started = {name: FOUND[name](bench.servers) for name in peers}
        targets |= {name: target for name, target in started.items() if target}
        tell(f"measured: {', '.join(targets)}")
        ratios = [bench.ratios(scenario, targets) for scenario in speed]
    there = [name for name in peers if name in targets]
    return tables(ratios, figures, there), {name: targets[name].version for name in there}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure harperpy next to its peers.")
    parser.add_argument("--only", help=f"some of, with commas: {', '.join(ALL)}")
    parser.add_argument("--peers", help=f"some of, with commas: {', '.join(FOUND)}")
    parser.add_argument("--rounds", type=int, default=FULL_ROUNDS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measured run")
    parser.add_argument("--port", type=int, default=29700, help="the first one; free ones follow")
    parser.add_argument("--results", type=Path, help="write the page here, whatever was measured")
    return parser


def _median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return statistics.median(value(run) for run in runs)


def _cpu_us(run: Run) -> float:
    return run.cpu_us


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End everything, as by Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
