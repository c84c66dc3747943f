"""Measure resilient_sse against its peers: one command runs all of it.

    pip install -e .[bench]              # Python 3.10 or later for this folder
    python benchmarks/run.py             # about seven minutes
    python benchmarks/run.py --quick     # about one
    python benchmarks/run.py --only cpu --only decoder

The report goes to standard output and, with a picture for each measure, to ``--out``:
``report.rst`` (tables that a README can take as they are), ``results.json``, ``*.png``.
Peers that are not installed are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers
from harness import HERE, OURS, Bench, Chart, Goal, PeerError, Result, Table
from measures import MEASURES

PACKAGES = ["requests", "urllib3", "openai", "anthropic", "httpx", "httpx-sse"]
PACKAGES += ["sseclient-py", "requests-sse", "launchdarkly-eventsource"]


@contextmanager
def serving() -> Iterator[str]:
    """Run the server in its own process; give its base URL."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()  # it stops by itself when this closes


# The report


def simple_table(table: Table) -> str:
    """A table that is readable as it stands and valid reStructuredText."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows)]
    rule = "  ".join("=" * width for width in widths)

    def line(cells: list[str]) -> str:
        name, *numbers = map(str.rjust, cells, widths)
        return "  ".join([name.strip().ljust(widths[0]), *numbers])

    body = "\n".join(map(line, table.rows))
    return f"{table.title}\n\n{rule}\n{line(table.columns)}\n{rule}\n{body}\n{rule}\n"


def goals_table(goals: list[Goal]) -> Table:
    """All goals in one table: the first thing to read."""
    rows = [
        [
            goal.name,
            f"{goal.value:.2f}",
            f"{goal.limit:.4g}",
            "yes" if goal.met else "NO",
        ]
        for goal in goals
    ]
    return Table("Goals", ["what / against what", "measured", "at most", "met"], rows)


def machine() -> str:
    """When, where and with which versions this was measured."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{time.strftime('%Y-%m-%d')}, {python}, {platform.system()} "
        f"{platform.release()}, {_processors()}, loopback.\n{versions}."
    )


def _processors() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def report(results: dict[str, Result], notes: list[str]) -> str:
    """The whole report as text: goals first."""
    found = results.values()
    goals = [goal for result in found for goal in result.goals]
    tables = [goals_table(goals), *(t for result in found for t in result.tables)]
    notes = [note for result in found for note in result.notes] + notes
    pieces = [simple_table(table) for table in tables if table.rows]
    return "\n".join([*pieces, machine(), *map("\nNote: {}".format, notes)]) + "\n"


# Pictures


def draw(chart: Chart, title: str, path: Path) -> None:
    """One chart as a PNG."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(chart.series) / 2) if chart.kind == "bars" else 1
    figure = Figure(figsize=(11, 1.5 + 2.5 * rows if rows > 1 else 5))
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    if chart.kind == "bars":
        columns = min(2, len(chart.series))
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, bars) in zip(panels, chart.series.items()):
            _draw_bars(axes, bars)
            axes.set(title=name, xlabel=chart.y)
    else:
        _draw_lines(figure.subplots(), chart)
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Any, bars: list[tuple[str, float]]) -> None:
    names, values = zip(*bars)
    colours = ["tab:orange" if name == OURS else "tab:blue" for name in names]
    axes.bar_label(axes.barh(names, values, color=colours), fmt="%.2f", padding=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.margins(x=0.2)
    axes.invert_yaxis()


def _draw_lines(axes: Any, chart: Chart) -> None:
    for name, points in chart.series.items():
        axes.plot(*zip(*points), marker=".", label=name)
    axes.set_xscale("linear" if chart.kind == "lines" else "log")
    axes.set_yscale("log" if chart.kind == "log-log" else "linear")
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.legend()


def save(results: dict[str, Result], text: str, out: Path) -> None:
    """Write the report, the numbers and the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.rst").write_text(text, encoding="utf-8")
    numbers = {name: asdict(result) for name, result in results.items()}
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if not peers.installed("matplotlib"):
        print("matplotlib is not installed: no pictures", file=sys.stderr)
        return
    for name, result in results.items():
        if result.chart and any(result.chart.series.values()):
            draw(result.chart, MEASURES[name].__doc__ or name, out / f"{name}.png")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure resilient_sse and its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument(
        "--only",
        action="append",
        choices=MEASURES,
        metavar="NAME",
        help="one of %(choices)s; may be repeated",
    )
    args = parser.parse_args()
    missing = [n for n, p in peers.PEERS.items() if not peers.installed(p.package)]
    notes = [f"{name} is not installed, hence left out." for name in missing]
    results = {}
    with serving() as base:
        bench = Bench(base, args.quick, notes)
        for name in args.only or MEASURES:
            start = time.monotonic()
            try:
                results[name] = MEASURES[name](bench)
            except PeerError as error:  # the other measures still have their say
                notes.append(f"{name} was not measured: {error}")
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    text = report(results, bench.notes)
    print(text)
    save(results, text, args.out)


if __name__ == "__main__":
    main()
