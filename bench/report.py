"""The tables: each figure, the one that is wanted, and whether it passes."""

import datetime as dt
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import NamedTuple

from machine import described
from scenarios import SPEED

LIBRARIES = ("harperpy", "aiohttp", "uvloop", "httptools", "msgspec", "SQLAlchemy")


class Figure(NamedTuple):
    """One figure, measured once a round; the wanted one is its most, or else its least."""

    name: str
    values: Sequence[float]
    unit: str
    wanted: float
    at_least: bool = False

    def row(self) -> str:
        """Its line of the table."""
        value = statistics.median(self.values)
        short = value < self.wanted if self.at_least else value > self.wanted
        bound = f"{'≥' if self.at_least else '≤'} {self.wanted:g}"
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        verdict = "short" if short else "pass"
        return f"| {self.name} | {value:.3g} {self.unit} | {bound} | {verdict} | {spread} |"


class Ratios(NamedTuple):
    """The work per CPU-second as a multiple of each peer's, once a round, for one scenario."""

    name: str
    by_peer: Mapping[str, Sequence[float]]
    failed: Sequence[str] = ()

    def cell(self, peer: str) -> str:
        """The figure against one peer, the one that is wanted, and the verdict."""
        if peer in self.failed:
            return "fails"
        value = statistics.median(self.by_peer[peer])
        wanted = {scenario.name: scenario.wanted for scenario in SPEED}[self.name].get(peer)
        if wanted is None:
            return f"{value:.3g}"
        return f"{value:.3g} (≥ {wanted:.3g}) {'pass' if value >= wanted else 'short'}"


def tables(ratios: Sequence[Ratios], figures: Sequence[Figure], peers: Sequence[str]) -> str:
    """All that was measured, as Markdown."""
    parts: list[str] = []
    if ratios:
        lines = [f"| scenario | {' | '.join(f'vs {peer}' for peer in peers)} |"]
        lines.append("| --- |" + " --- |" * len(peers))
        lines += [
            f"| {row.name} | {' | '.join(row.cell(peer) for peer in peers)} |" for row in ratios
        ]
        parts.append("\n".join(lines))
    if figures:
        head = "| figure | median | wanted | | of all rounds |\n| --- | --- | --- | --- | --- |"
        parts.append("\n".join([head, *(figure.row() for figure in figures)]))
    return "\n\n".join(parts)


def results(
    shown: str, *, rounds: int, seconds: float, foreign: float, peers: Mapping[str, str]
) -> str:
    """The page that keeps a run: when, where and with what it was measured."""
    today = dt.datetime.now(tz=dt.UTC).date()
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    others = [f"{name} ({version})" for name, version in peers.items() if version]
    load = "wrk" if shutil.which("wrk") else "a client in Python"
    return f"""# Results

Written by `make bench`; [what it measures](README.md).

- {today}, commit {_commit()}
- {described()}; Python {platform.python_version()}
- {", ".join(versions)}
- {"peers: " + ", ".join(others) if others else "no peers but our own"}
- medians of {rounds} interleaved rounds of {seconds:g} s; calls by {load}
- other programs used {foreign:.2f} processors meanwhile (median of all runs)

{shown}
"""


def _commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
