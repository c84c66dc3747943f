"""What is measured, and how. Each measure takes a ``Bench`` and returns a ``Result``.

Rules for all: clients run in fresh processes against a server in a process of its own
on loopback; rounds are interleaved (A B C A B C), so that drift hits all alike; a
ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import itertools
import re
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import peers
import server
from harness import (
    HERE,
    OURS,
    Bench,
    Chart,
    Goal,
    Result,
    Table,
    clients,
    jobs_for,
    padded,
    percentile,
    ratio,
    ratio_rows,
    run,
    slope,
)

MAIN = ("floor", "iter_lines", OURS)  # measured most often: the goals speak of them
SMALLEST = "launchdarkly-eventsource"  # of the peers that are libraries: it needs urllib3 alone


def _clients(bench: Bench, shape: str) -> list[str]:
    """The clients for a shape; in a quick run only those that the goals speak of."""
    return [name for name in clients(shape) if name in MAIN or not bench.quick]


# 1. CPU of whole streams

_CPU_GOALS = {"openai": 0.6, "openai-padded": 1.1, "anthropic": 1.1, "responses": 1.1}


def cpu(bench: Bench) -> Result:
    """CPU per delta of whole streams, everything at its default"""
    bars: dict[str, list[tuple[str, float]]] = {}
    result = Result(chart=Chart("bars", "", "ratio to the bare floor", bars))
    count = bench.amount(20_000, 6_000)
    few = bench.amount(2, 1)
    for shape, limit in _CPU_GOALS.items():
        names = clients(shape) if shape == "openai" else _clients(bench, shape)
        jobs = jobs_for(names, bench.cpu_per_delta, shape, count)
        jobs["floor"]()  # the server renders this body now, and then keeps it
        times = bench.interleave(jobs, few)
        main = {name: jobs[name] for name in MAIN if name in jobs}
        bench.more_for(times, main, bench.amount(9, 3) - few)
        ratios, rows = ratio_rows(times, "floor", 1e6)
        columns = ["client", "ratio to floor", "µs"]
        result.tables.append(Table(f"CPU per delta, {shape}", columns, rows))
        bars[shape] = [bar for bar in ratios.items() if bar[1] < 8]
        if OURS in ratios:
            goal = f"CPU per delta, {shape} / floor"
            result.goals.append(Goal(goal, ratios[OURS], limit))
    return result


def live(bench: Bench) -> Result:
    """CPU per delta of a live stream: each delta comes alone, in a read of its own"""
    count, pace = bench.amount(1500, 400), 2
    names = [n for n in (*MAIN, SMALLEST) if n in clients("openai")]
    jobs = {
        name: partial(bench.cpu_per_delta, "openai", count, name, pace)
        for name in names
    }
    times = bench.interleave(jobs, bench.amount(7, 3))
    ratios, rows = ratio_rows(times, "floor", 1e6)
    columns = ["client", "ratio to floor", "µs"]
    table = Table("CPU per delta, one delta a read", columns, rows)
    if OURS not in ratios:
        return Result([table])
    goal = Goal("CPU per delta, one delta a read / floor", ratios[OURS], 1.1)
    return Result([table], [goal])


#: What a call of one delta may cost, against whom.
_SHORT_CALL = {"iter_lines": 0.8, SMALLEST: 1.35}


def call(bench: Bench) -> Result:
    """CPU of a whole call: request, answer, end"""
    result = Result()
    for shape, count in (("openai", 1), ("openai", 500), ("anthropic", 500)):
        repeat = bench.amount(10, 3) * (10 if count == 1 else 1)
        names = dict.fromkeys(_clients(bench, shape))
        if shape == "openai" and SMALLEST in clients(shape):
            names[SMALLEST] = None
        jobs = jobs_for(names, _call_cpu, bench, shape, count, repeat)
        times = bench.interleave(jobs, bench.amount(3, 1))
        ratios, rows = ratio_rows(times, "iter_lines", 1e3)
        columns = ["client", "ratio to iter_lines", "ms"]
        title = f"CPU of a whole call, {shape}, {count} deltas"
        result.tables.append(Table(title, columns, rows))
        if OURS in ratios and count > 1:
            goal = f"CPU of a whole call, {shape}, {count} deltas / iter_lines"
            result.goals.append(Goal(goal, ratios[OURS], 1))
        for peer, limit in _SHORT_CALL.items():
            if count == 1 and {OURS, peer} <= set(times):
                goal = f"CPU of a whole call, one delta / {peer}"
                found = ratio(times[OURS], times[peer])
                result.goals.append(Goal(goal, found, limit))
    return result


def _call_cpu(bench: Bench, shape: str, count: int, repeat: int, peer: str) -> float:
    """CPU seconds of one call."""
    options = ("--warm", bench.url(shape, count), "--repeat", str(repeat))
    return float(bench.client(peer, shape, count, *options)["cpu"]) / repeat


# 2. Decoder alone


def decoder(bench: Bench) -> Result:
    """Decoder alone: bytes to events in one process, garbage collector off"""
    bars: dict[str, list[tuple[str, float]]] = {}
    result = Result(chart=Chart("bars", "", "ratio to split and decode", bars))
    for kind, events in _events(bench.amount(20_000, 5_000)).items():
        decoders = {"split, slice, decode": peers.FLOORS[kind], **_right(bench, events)}
        for size in (4, 64):
            reads = _reads(events, size * 1024)
            jobs = {name: partial(_drain, d, reads) for name, d in decoders.items()}
            times = bench.interleave(jobs, bench.amount(7, 3))
            per_event = {n: [t / len(events) for t in ts] for n, ts in times.items()}
            ratios = _report_decoders(result, f"{kind}, {size} KiB reads", per_event)
            bars[f"{kind}, {size} KiB reads"] = list(ratios.items())
    return result


def _events(count: int) -> dict[str, list[bytes]]:
    data = list(itertools.islice(server.events("openai", count), 1, 1 + count))
    named = list(itertools.islice(server.events("anthropic", count), 3, 3 + count))
    numbered = [b"id: %d\n%b" % pair for pair in enumerate(data)]
    return {"data": data, "event + data": named, "id + data": numbered}


def _reads(events: Iterable[bytes], size: int) -> list[bytes]:
    body = b"".join(events)
    return [body[i : i + size] for i in range(0, len(body), size)]


def _right(bench: Bench, events: list[bytes]) -> dict[str, peers.Decode]:
    """The decoders that are installed and get the data of every event right."""
    wanted = [event.partition(b"data: ")[2][:-2].decode() for event in events]
    right = {}
    for name, decode in _installed_decoders().items():
        if [event.data for event in decode(_reads(events, 1000))] == wanted:
            right[name] = decode
        else:
            bench.notes.append(f"decoder {name} got events wrong")
    return right


def _installed_decoders() -> dict[str, peers.Decode]:
    every = peers.DECODERS.items()
    return {n: decode for n, (decode, package) in every if peers.installed(package)}


def _drain(decode: Callable[[Any], Iterable[Any]], source: Any) -> float:
    """CPU seconds until all is decoded."""
    gc.disable()
    try:
        start = time.process_time()
        deque(decode(source), maxlen=0)
        return time.process_time() - start
    finally:
        gc.enable()


def _report_decoders(
    result: Result, kind: str, times: dict[str, list[float]]
) -> dict[str, float]:
    floor = next(iter(times))
    ratios, rows = ratio_rows(times, floor, 1e6)
    columns = ["decoder", "ratio to split", "µs"]
    result.tables.append(Table(f"Decoder alone, {kind}", columns, rows))
    if OURS not in ratios:
        return ratios
    limit = {"data, 4 KiB reads": 1.3, "data, 64 KiB reads": 1.15}.get(kind)
    if limit:
        result.goals.append(Goal(f"decoder, {kind} / split", ratios[OURS], limit))
    for fastest in [name for name in ratios if name not in (floor, OURS)][:1]:
        value = ratio(times[OURS], times[fastest])
        result.goals.append(Goal(f"decoder, {kind} / {fastest}", value, 0.7))
    return ratios


# 3. Added delay

Run = tuple[list[float], float]  # delays, CPU per delta
Group = dict[str, Run]  # clients that ran at the same time


def delay(bench: Bench) -> Result:
    """Delay from the server's write to the caller's hand, one delta each 5 ms"""
    # "recv" stops the clock before parsing: what the kernel and the wake-up cost.
    main = ("recv", *(name for name in MAIN if name in clients("openai")))
    others = [("floor", n) for n in _clients(bench, "openai") if n not in main]
    jobs = jobs_for([main, *others], _together, bench)
    groups = bench.interleave(jobs, 1)
    bench.more_for(groups, {main: jobs[main]}, bench.amount(29, 5))
    runs: dict[str, list[tuple[Run, Run]]] = {}
    for group in itertools.chain(*groups.values()):
        for name, found in group.items():
            runs.setdefault(name, []).append((found, group["floor"]))
    late = {name: percentile(_pooled(pairs), 99) for name, pairs in runs.items()}
    ratios = {name: _delay_ratio(pairs) for name, pairs in runs.items()}
    rows = [
        [
            name,
            f"{ratios[name]:.2f}",
            f"{statistics.median(_pooled(runs[name])) * 1e6:.0f}",
            f"{late[name] / late['iter_lines']:.2f}",
            f"{late[name] * 1e6:.0f}",
            f"{statistics.median(run[1] for run, _ in runs[name]) * 1e6:.0f}",
        ]
        for name in sorted(ratios, key=ratios.__getitem__)
    ]
    columns = ["client", "median / floor", "median µs"]
    columns += ["p99 / iter_lines", "p99 µs", "CPU µs a delta"]
    table = Table("Added delay, one delta each 5 ms", columns, rows)
    curves = {
        name: [
            (percentile(_pooled(runs[name]), p) * 1e6, p / 100) for p in range(1, 100)
        ]
        for name in main
    }
    chart = Chart("lines", "delay, µs", "share of deltas within it", curves)
    if OURS not in ratios:
        return Result([table], chart=chart)
    goals = [
        Goal("delay, median / floor", ratios[OURS], 1.05),
        Goal("delay, p99 / floor", late[OURS] / late["floor"], 1.05),
        Goal("delay, p99 / iter_lines", late[OURS] / late["iter_lines"], 1.0),
    ]
    return Result([table], goals, chart=chart)


def _together(bench: Bench, names: Iterable[str]) -> Group:
    """Several clients at the same time, each in its process and with its own stream.

    So the machine's state is the same for all; the server writes at other moments to
    each. The first deltas are left out: there the processes still start.
    """
    count, warm = bench.amount(560, 160), bench.url("openai", 10)

    def one(name: str) -> Run:
        report = bench.client(name, "openai", count, "--delays", "--warm", warm, pace=5)
        return report["delays"][60:], report["cpu"] / count

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(one, names)))


def _pooled(pairs: list[tuple[Run, Run]]) -> list[float]:
    return [delay for (delays, _), _ in pairs for delay in delays]


def _delay_ratio(pairs: list[tuple[Run, Run]]) -> float:
    """The median delay against that of the floor that ran beside it."""
    middle = [[statistics.median(run[0]) for run in pair] for pair in pairs]
    return statistics.median(own / floor for own, floor in middle)


# 4. Memory


_LONG_DELTA = """import sys
sys.path[:0] = sys.argv[1:]
import peers, server
from resilient_sse import ChatStream
head, delta, tail = server.SHAPES["openai"]
body = b"".join([*head(), delta(0, "x" * 2**23), *tail(1)])
before = peers.peak()
assert sum(map(len, ChatStream.replay(body))) == 2**23
print((peers.peak() - before) / 2**23)"""


def memory(bench: Bench) -> Result:
    """Peak memory of a fresh process against the number of deltas"""
    counts = [10_000, 100_000, 1_000_000]
    if not bench.quick:
        counts += [5_000_000, 10_000_000]  # both beyond the default Limits(text=...)
    modes = {"floor": "floor"}
    if peers.installed(OURS):
        modes |= {OURS: OURS, f"{OURS}, Limits(text=1000)": "text not kept"}

    def peaks(name: str) -> list[tuple[int, float]]:
        bench.client(modes[name], "openai", 10)  # whoever compiles bytecode needs more
        those = counts[: 3 if name == "floor" else None]
        reports = [bench.client(modes[name], "openai", count) for count in those]
        return [(n, report["peak"] / 2**20) for n, report in zip(those, reports)]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(modes, pool.map(peaks, modes)))
    columns = ["client", *(f"{count:,}" for count in counts)]
    rows = [
        padded([name, *(f"{peak:.1f}" for _, peak in values)], len(columns))
        for name, values in found.items()
    ]
    table = Table("Peak memory by number of deltas, MiB", columns, rows)
    kept = min(16 * 2**20, server.expected(counts[-1])[1]) / 2**20
    grown = {name: values[-1][1] - values[0][1] for name, values in found.items()}
    goals = [
        Goal(f"MiB grown to {counts[-1]:,} deltas, {name}", grown[name], limit)
        for name, limit in zip(list(modes)[1:], (kept + 5, 1))
    ]
    if OURS in found and not bench.quick:
        more = found[OURS][-1][1] - found[OURS][-2][1]
        goals.append(Goal("MiB grown once Limits(text=...) is reached", more, 1))
    if peers.installed(OURS):
        long = [sys.executable, "-c", _LONG_DELTA, str(HERE), str(HERE.parent)]
        goals.append(
            Goal("memory for one delta of 8 MiB / 8 MiB", float(run(long).stdout), 8)
        )
    note = f"By default the text is kept: {kept:.1f} Mi characters of {counts[-1]:,} deltas."
    return Result([table], goals, [note], Chart("log x", "deltas", "MiB", found))


# 5. Import time

_IMPORT = """import sys, time
sys.path.insert(0, sys.argv[2])
start = time.perf_counter()
__import__(sys.argv[1])
print(time.perf_counter() - start)"""


def imports(bench: Bench) -> Result:
    """Time of the import statement in a fresh process"""
    names = ["requests", OURS, "ld_eventsource", "requests_sse", "httpx_sse", "openai"]
    jobs = jobs_for(filter(peers.installed, [*names, "anthropic"]), _import_time)
    bench.interleave(jobs, 1)  # writes the bytecode
    times = bench.interleave(jobs, bench.amount(3, 1))
    main = {name: jobs[name] for name in ("requests", OURS) if name in jobs}
    bench.more_for(times, main, bench.amount(20, 8))
    ratios, rows = ratio_rows(times, "requests", 1e3)
    table = Table("Import time", ["import", "ratio to requests", "ms"], rows)
    if OURS not in ratios:
        return Result([table])
    return Result([table], [Goal("import / import requests", ratios[OURS], 1.15)])


def _import_time(name: str) -> float:
    return float(run([sys.executable, "-c", _IMPORT, name, str(HERE.parent)]).stdout)


# 6. Many streams at once


def crowd(bench: Bench) -> Result:
    """500 streams in 500 threads of one process, one delta each 100 ms in each"""
    streams, count = 500, bench.amount(40, 20)
    options = ("--threads", str(streams))

    def job(peer: str) -> dict[str, Any]:
        return bench.client(peer, "openai", count, *options, pace=100)

    names = filter(clients("openai").__contains__, (*MAIN, SMALLEST))
    found = bench.interleave(jobs_for(names, job), bench.amount(3, 1))
    cpu = {
        peer: [report["cpu"] / len(report["delays"]) for report in reports]
        for peer, reports in found.items()
    }
    columns = ["client", "whole answers", "extra threads", "CPU µs per delta"]
    columns += ["CPU / floor", "median delay ms", "p99 ms", "peak MiB"]
    rows = [
        [
            peer,
            f"{len(report['seen'])}",
            f"{report['extra_threads']}",
            f"{statistics.median(cpu[peer]) * 1e6:.0f}",
            f"{ratio(cpu[peer], cpu['floor']):.2f}",
            f"{statistics.median(report['delays']) * 1e3:.1f}",
            f"{percentile(report['delays'], 99) * 1e3:.1f}",
            f"{report['peak'] / 2**20:.0f}",
        ]
        for peer, (*_, report) in found.items()
    ]
    table = Table(f"{streams} streams in one process", columns, rows)
    if OURS not in found:
        return Result([table])
    extra = found[OURS][0]["extra_threads"]
    goals = [Goal(f"extra threads at {streams} streams", extra, 1)]
    for peer, limit in (("floor", 1.25), ("iter_lines", 0.9)):
        what = f"CPU per delta, {streams} streams / {peer}"
        goals.append(Goal(what, ratio(cpu[OURS], cpu[peer]), limit))
    return Result([table], goals)


# 7. Linearity

Growth = list[tuple[float, float]]  # size, CPU seconds


def linear(bench: Bench) -> Result:
    """Cost against size: the slope on log-log paper is 1 if linear, 2 if quadratic"""
    decoders = _installed_decoders()
    if bench.quick:
        decoders = dict(itertools.islice(decoders.items(), 1))
    found = {
        case: {name: _growth(decode, make, sizes) for name, decode in decoders.items()}
        for case, (make, sizes) in _decoder_cases().items()
    }
    if peers.installed(OURS):
        for case, (body, sizes) in _stream_cases().items():
            found[case] = {OURS: _growth(_replay, body, sizes)}
    rows, goals, curves = [], [], {}
    for case, grown in found.items():
        slopes = {name: slope(points) for name, points in grown.items() if points[1:]}
        rows.append(
            [case, *(f"{slopes[n]:.2f}" if n in slopes else "-" for n in decoders)]
        )
        if OURS in slopes:
            goals.append(Goal(f"slope, {case}", slopes[OURS], 1.1))
            curves[case] = grown[OURS]
    table = Table("Slope of cost against size", ["size", *decoders], rows)
    return Result([table], goals, chart=Chart("log-log", "size", "CPU s", curves))


def _decoder_cases() -> dict[str, tuple[Callable[[int], Any], list[int]]]:
    def line(n: int) -> list[bytes]:
        return [b"data: ", b"x" * n, b"\n\n"]

    def lines(n: int) -> list[bytes]:
        return [b"data: x\n" * n, b"\n"]

    def events(n: int) -> list[bytes]:
        return [server.SHAPES["openai"].delta(0, " of") * n]

    def cut(
        make: Callable[[int], list[bytes]], size: int
    ) -> Callable[[int], list[bytes]]:
        return lambda n: _reads(make(n), size)

    return {
        "bytes of a line, 512 byte reads": (cut(line, 512), _sizes(15)),
        "bytes of a line, byte by byte": (cut(line, 1), _sizes(14)),
        "lines of an event, 4 KiB reads": (cut(lines, 4096), _sizes(13)),
        "lines of an event, byte by byte": (cut(lines, 1), _sizes(10)),
        "events, 4 KiB reads": (cut(events, 4096), _sizes(10)),
        "events, byte by byte": (cut(events, 1), _sizes(5)),
    }


def _stream_cases() -> dict[str, tuple[Callable[[int], Any], list[int]]]:
    head, delta, tail = server.SHAPES["openai"]

    def deltas(n: int) -> bytes:
        return b"".join(server.events("openai", n))

    def characters(n: int) -> bytes:
        return b"".join([*head(), delta(0, "x" * n), *tail(1)])

    return {
        "deltas of a whole stream": (deltas, _sizes(12)),
        "characters of one delta": (characters, _sizes(14)),
    }


def _sizes(power: int) -> list[int]:
    """Five sizes that fit the caches: beyond them, any copy costs twice as much."""
    return [2**p for p in range(power, power + 5)]


def _replay(raw: bytes) -> Iterable[str]:
    from resilient_sse import ChatStream

    stream: Iterable[str] = ChatStream.replay(raw)
    return stream


def _growth(
    decode: Callable[[Any], Iterable[Any]], make: Callable[[int], Any], sizes: list[int]
) -> Growth:
    """Cost at each size; what gets slow is not given the larger ones."""
    found: Growth = []
    for size in sizes:
        source = make(size)
        found.append((size, min(_drain(decode, source) for _ in range(5))))
        if found[-1][1] > 0.1:
            break
    return found


# 8. What each part costs


def parts(bench: Bench) -> Result:
    """CPU per delta with one part of the module switched off or added"""
    if not peers.installed(OURS):
        return Result()
    names = [OURS, *peers.PARTS, "floor"]
    slow = partial(bench.cpu_per_delta, pace=0.3)
    fast_jobs = jobs_for(
        names, bench.cpu_per_delta, "openai", bench.amount(20_000, 6_000)
    )
    slow_jobs = jobs_for(names, slow, "openai", bench.amount(1000, 500))
    fast = bench.interleave(fast_jobs, bench.amount(5, 2))
    single = bench.interleave(slow_jobs, bench.amount(3, 1))
    ratios, rows = ratio_rows(fast, OURS, 1e6)
    for row in rows:
        row.append(_more(fast, row[0]))
        row.append(f"{statistics.median(single[row[0]]) * 1e6:.0f}")
        row.append(_more(single, row[0]))
    columns = ["stream_chat with", "ratio to default", "µs per delta", "more µs"]
    columns += ["one delta a read: µs", "more µs"]
    chart = Chart("bars", "", "ratio to the default", {"openai": list(ratios.items())})
    return Result([Table("What each part costs", columns, rows)], chart=chart)


def _more(times: dict[str, list[float]], name: str) -> str:
    """What it costs more than the default, in microseconds."""
    more = (own - default for own, default in zip(times[name], times[OURS]))
    return f"{statistics.median(more) * 1e6:+.2f}"


# 9. Instructions


def instructions(bench: Bench) -> Result:
    """Instructions per delta: two lengths of a stream, subtracted"""
    tool, read = _counter()
    if not tool:
        return Result(
            notes=["Neither perf's instruction counter nor valgrind is here."]
        )
    shapes = list(_CPU_GOALS)[: bench.amount(4, 1)]
    pairs = [(shape, name) for shape in shapes for name in ("floor", OURS)]
    pairs += [("openai", "iter_lines")][: bench.amount(1, 0)]
    pairs = [(shape, name) for shape, name in pairs if name in clients(shape)]

    def count(shape: str, peer: str, deltas: int) -> int:
        return read(bench.client(peer, shape, deltas, before=tool)["stderr"])

    with ThreadPoolExecutor(2) as pool:  # what else runs does not disturb the count
        short, long = (
            [pool.submit(count, *pair, deltas) for pair in pairs]
            for deltas in (200, 1200)
        )
        each = {
            pair: (more.result() - less.result()) / 1000
            for pair, less, more in zip(pairs, short, long)
        }
    rows = [
        [f"{shape}, {peer}", f"{number / each[shape, 'floor']:.2f}", f"{number:,.0f}"]
        for (shape, peer), number in each.items()
    ]
    goals = [
        Goal(
            f"instructions, {shape} / floor",
            each[shape, OURS] / each[shape, "floor"],
            limit,
        )
        for shape, limit in _CPU_GOALS.items()
        if each.get((shape, OURS))
    ]
    columns = ["client", "ratio to floor", "instructions"]
    note = f"Instructions: counted by {tool[0]}; those of the kernel are not in it."
    return Result([Table("Instructions per delta", columns, rows)], goals, [note])


def _counter() -> tuple[list[str], Callable[[str], int]]:
    """The command to put before, and how to read its number; perf is the faster."""
    perf = ["perf", "stat", "-x,", "-e", "instructions:u"]
    if shutil.which("perf") and re.search(r"(?m)^\d+,", run([*perf, "true"]).stderr):
        return perf, lambda text: int(re.findall(r"(?m)^(\d+),", text)[-1])
    if shutil.which("valgrind"):
        callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        return callgrind, lambda text: int(re.findall(r"Collected : (\d+)", text)[-1])
    return [], int


MEASURES: dict[str, Callable[[Bench], Result]] = {
    "cpu": cpu,
    "live": live,
    "call": call,
    "decoder": decoder,
    "delay": delay,
    "memory": memory,
    "import": imports,
    "crowd": crowd,
    "linear": linear,
    "parts": parts,
    "instructions": instructions,
}
