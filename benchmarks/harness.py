"""Records of the report, the way to run clients, and the few statistics needed."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import peers
import server

HERE = Path(__file__).resolve().parent
OURS = "resilient_sse"
K = TypeVar("K")
T = TypeVar("T")


class Table(NamedTuple):
    """A table of the report."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Goal(NamedTuple):
    """One goal of the project: a measured number and the most that it may be."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the number is within its limit, as printed with two decimals."""
        return round(self.value, 2) <= self.limit


class Chart(NamedTuple):
    """A picture of the report: named series of points; bars have names for x."""

    kind: str  # "bars", "lines", "log x" or "log-log"
    x: str
    y: str
    series: dict[str, list[tuple[Any, float]]]


@dataclass
class Result:
    """What one measure found."""

    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chart: Chart | None = None


class PeerError(Exception):
    """A client failed, or lost text."""


@dataclass
class Bench:
    """The server's address, how much to measure, and the way to start clients."""

    base: str
    quick: bool
    notes: list[str] = field(default_factory=list)

    def amount(self, full: int, quick: int) -> int:
        """A number of rounds, deltas or so: less of it in a quick run."""
        return quick if self.quick else full

    def url(self, shape: str, count: int, pace: float = 0) -> str:
        """Where the server streams ``count`` deltas."""
        return f"{self.base}/{shape}/{count}/{pace:g}/v1"

    def client(
        self,
        peer: str,
        shape: str,
        count: int,
        *options: str,
        pace: float = 0,
        before: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Run one client in a fresh process and check that it lost nothing."""
        command = [*before, sys.executable, str(HERE / "peers.py"), peer, shape]
        command += [self.url(shape, count, pace), *options]
        done = run(command)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            status = f"exit status {done.returncode}"
            raise PeerError(f"{peer} failed on {shape}, {status}: {last}")
        report: dict[str, Any] = json.loads(done.stdout)
        wanted = list(server.expected(count, pace))
        if any(seen != wanted for seen in report["seen"]):
            raise PeerError(f"{peer} lost text: {report['seen'][:3]}, not {wanted}")
        return {**report, "stderr": done.stderr}

    def cpu_per_delta(
        self, shape: str, count: int, peer: str, pace: float = 0
    ) -> float:
        """CPU seconds per delta of one whole stream, the client warmed up before."""
        warm = ("--warm", self.url(shape, 100))
        report = self.client(peer, shape, count, *warm, pace=pace)
        return float(report["cpu"]) / count

    def interleave(
        self, jobs: Mapping[K, Callable[[], T]], rounds: int
    ) -> dict[K, list[T]]:
        """Run all jobs in each of several rounds; one that fails is noted and dropped."""
        found: dict[K, list[T]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name in list(found):
                try:
                    found[name].append(jobs[name]())
                except PeerError as error:
                    self.notes.append(str(error))
                    del found[name]
        return found

    def more_for(
        self,
        found: dict[K, list[T]],
        jobs: Mapping[K, Callable[[], T]],
        rounds: int,
    ) -> None:
        """Further rounds for some of the jobs, the ones that the goals speak of."""
        wanted = {name: job for name, job in jobs.items() if name in found}
        for name, more in self.interleave(wanted, rounds).items():
            found[name] += more


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command, bounded in time, with what must not vary held still."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "NO_PROXY": "*"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody compiles at each import
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def clients(shape: str) -> list[str]:
    """The clients that can read a shape and are installed."""
    return [
        name
        for name, peer in peers.PEERS.items()
        if shape in peer.shapes and peers.installed(peer.package)
    ]


def jobs_for(
    names: Iterable[Any], job: Callable[..., Any], *args: Any
) -> dict[Any, Callable[[], Any]]:
    """The same job for several clients: ``job(*args, name)``."""
    return {name: partial(job, *args, name) for name in names}


def ratio(values: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round, so that drift cancels out."""
    return statistics.median(a / b for a, b in zip(values, base))


def ratio_rows(
    times: Mapping[str, list[float]], base: str, scale: float
) -> tuple[dict[str, float], list[list[str]]]:
    """Ratios to ``base``, smallest first, and rows of name, ratio and scaled median."""
    found = {name: ratio(values, times[base]) for name, values in times.items()}
    ratios = dict(sorted(found.items(), key=lambda item: item[1]))
    rows = [
        [name, f"{value:.2f}", f"{statistics.median(times[name]) * scale:.2f}"]
        for name, value in ratios.items()
    ]
    return ratios, rows


def percentile(values: Iterable[float], percent: int) -> float:
    """A percentile of many values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def slope(points: Iterable[tuple[float, float]]) -> float:
    """The slope on log-log paper: 1 is linear, 2 is quadratic."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points))
    return statistics.linear_regression(xs, ys).slope


def padded(row: list[str], width: int) -> list[str]:
    """A row filled up to the table's width."""
    return row + ["-"] * (width - len(row))
