"""Watch the streams of a program on a live page, on this machine alone.

Copy this file beside yours; it needs only the standard library and a ``StreamMonitor``::

    from dashboard import serve
    from resilient_sse import StreamMonitor, stream_chat

    monitor = StreamMonitor()  # give it to each stream: observe=monitor
    with serve(monitor, port=8100) as dashboard:
        print(dashboard.url)
        ...

``/`` is the page, ``/report.json`` what it shows, ``/metrics`` the same for Prometheus.
Run as a program, it watches a demonstration: many streams through ``flaky_server.py``,
which drops, stalls and refuses some of them::

    python examples/dashboard.py --port 8100
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import random
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient_sse import StreamMonitor

__all__ = ["Dashboard", "serve"]


# ---------------------------------------------------------------------------
# 1. The page
# ---------------------------------------------------------------------------
# Text goes in by textContent and nothing goes in as HTML (the policy below has the
# browser refuse it), so an error message cannot become markup.

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f8; --card: #ffffff; --ink: #16191d; --soft: #59626d;
  --line: #e1e4e8; --accent: #2563c4; --good: #197446; --bad: #bd2c24;
  --mild: #9a5b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1215; --card: #171b20; --ink: #e9ecef; --soft: #9ba5b0;
    --line: #2a3038; --accent: #74aaff; --good: #5fc592; --bad: #ff8b83;
    --mild: #e3b05c;
  }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%;
}
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header {
  display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 16px;
  padding-top: 24px; padding-bottom: 16px;
}
h1 { font-size: 21px; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 15px; font-weight: 650; }
p, .soft, footer { color: var(--soft); font-size: 13px; }
#status { margin-left: auto; }
#status::before, .state::before {
  content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px;
  border-radius: 50%; background: currentColor;
}
#status::before { background: var(--good); }
.stale #status { color: var(--bad); }
.stale #status::before { background: var(--bad); }
.stale main { opacity: .55; }

.cards { display: grid; gap: 14px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.card, section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.card { padding: 14px 16px 10px; display: flex; flex-direction: column; }
.card h2 { font-size: 13px; font-weight: 550; color: var(--soft); }
.big { font-size: 29px; line-height: 1.25; font-weight: 620; letter-spacing: -.02em; }
.big small { font-size: 14px; font-weight: 450; color: var(--soft);
  letter-spacing: 0; margin-left: 5px; }
.card p { min-height: 1.45em; display: flex; flex-wrap: wrap; gap: 0 12px; }
.card p span { white-space: nowrap; }
.plot { position: relative; margin-top: auto; padding-top: 10px; }
.plot span { position: absolute; right: 0; top: 9px; font-size: 11px; line-height: 1;
  color: var(--soft); background: var(--card); padding: 0 0 3px 5px; }
svg { display: block; width: 100%; height: 64px; overflow: hidden; }
svg path { vector-effect: non-scaling-stroke; fill: none; stroke-width: 1.6;
  stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; }
svg .area { stroke: none; fill: var(--accent); opacity: .13; }
svg .good { stroke: none; fill: var(--good); opacity: .75; }
svg .bad { stroke: none; fill: var(--bad); }
.axis { display: flex; justify-content: space-between; font-size: 11px;
  color: var(--soft); padding-top: 4px; }

section { margin-top: 14px; padding: 14px 16px; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px;
  padding-bottom: 8px; }
ul { list-style: none; padding: 0; }
#errors { columns: 2; column-gap: 32px; }
#errors li { display: grid; grid-template-columns: 3em 1fr; gap: 0 10px;
  padding: 3px 0; align-items: center; break-inside: avoid; font-size: 14px; }
#errors li > b { text-align: right; font-weight: 600; }
#errors li > div { min-width: 0; position: relative; padding: 1px 8px; }
#errors i { position: absolute; inset: 0 auto 0 0; border-radius: 4px;
  background: var(--bad); opacity: .13; }
#errors span, .error, .model { overflow-wrap: anywhere; unicode-bidi: isolate; }
#errors span { position: relative; }
.filter { margin-left: auto; display: flex; gap: 2px; border: 0; padding: 0; }
.filter label { position: relative; font-size: 13px; color: var(--soft);
  padding: 3px 10px; border-radius: 6px; cursor: pointer; }
.filter input { position: absolute; inset: 0; opacity: 0; cursor: pointer; }
.filter label:has(:checked) { color: var(--ink); background: var(--line); }
.filter label:has(:focus-visible) { outline: 2px solid var(--accent); }

table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-size: 12px; font-weight: 550; color: var(--soft);
  white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
.model small { color: var(--soft); font-size: 12px; margin-left: 2px; }
.state { white-space: nowrap; }
.active { color: var(--accent); }
.completed { color: var(--good); }
.failed, .error { color: var(--bad); }
.closed { color: var(--soft); }
.some { color: var(--mild); font-weight: 600; }
.error { font-size: 13px; width: 34%; }
.empty { padding: 6px 0 2px; }
footer { padding-top: 14px; padding-bottom: 32px; }
a { color: var(--accent); }

@media (max-width: 760px) {
  main, header, footer { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 14px; padding-bottom: 12px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .card { padding: 10px 12px 8px; }
  .big { font-size: 23px; }
  .big small { display: block; margin: -3px 0 0; font-size: 12px; }
  section { margin-top: 8px; padding: 12px; }
  #errors { columns: 1; }
  #errors li { grid-template-columns: 2.5em 1fr; gap: 0 8px; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  table, tbody, td { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: 1px 12px; padding: 8px 0;
    border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; }
  td { border: 0; padding: 0; }
  .model { flex: 1; }
  .wide { flex-basis: 100%; height: 0; }
  .n { font-size: 13px; }
  td[data-label]::after { content: " " attr(data-label); color: var(--soft);
    font-size: 12px; font-weight: 400; }
  .number { color: var(--soft); }
  .error { width: auto; flex-basis: 100%; }
  .none, .error:empty { display: none; }
}
@media (min-width: 761px) { .wide { display: none; } }
"""

BODY = """
<header>
  <h1>Streams</h1>
  <p id="status" role="status">waiting for the first report</p>
</header>
<main>
  <noscript><p>This page is drawn by a script. The same figures without one:
  <a href="/report.json">/report.json</a>, <a href="/metrics">/metrics</a>.</p></noscript>
  <div class="cards" id="cards"></div>
  <section>
    <div class="head"><h2>Common errors</h2>
      <p>what ended a stream or was retried</p></div>
    <ul id="errors"></ul>
    <p class="empty" id="no-errors">None so far.</p>
  </section>
  <section>
    <div class="head"><h2>Recent streams</h2>
      <p>the newest active and the last that ended</p>
      <fieldset class="filter" id="filter" aria-label="which streams">
        <label><input type="radio" name="show" value="" checked>All</label>
        <label><input type="radio" name="show" value="active">Active</label>
        <label><input type="radio" name="show" value="failed">Failed</label>
      </fieldset></div>
    <table>
      <thead><tr><th class="n" scope="col">No.</th><th scope="col">Model</th>
        <th scope="col">State</th><th class="n" scope="col">First token</th>
        <th class="n" scope="col">Duration</th><th class="n" scope="col">Deltas</th>
        <th class="n" scope="col">Bytes</th><th class="n" scope="col">Retries</th>
        <th scope="col">Error</th></tr></thead>
      <tbody id="streams"></tbody>
    </table>
    <p class="empty" id="no-streams">None yet.</p>
  </section>
</main>
<footer>Figures cover the program's whole life, charts its last five minutes.
  The same as <a href="/report.json">JSON</a> and for
  <a href="/metrics">Prometheus</a>.</footer>
"""

SCRIPT = """
"use strict";

// -- figures, as people read them
const NONE = "\\u2013";
const known = write => value => value === null ? NONE : write(value);
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en",
  { notation: "compact", maximumSignificantDigits: 3 });
const digits = value => value >= 100 ? 0 : value >= 10 ? 1 : 2;
const count = known(n => n < 1e5 ? grouped.format(n) : short.format(n));
const rate = known(n => n < 10 ? String(+n.toFixed(1)) : count(n));
const percent = known(share => {
  const text = share === 0 || share === 1 ? share * 100 : (share * 100).toFixed(1);
  return `${text === "100.0" ? "99.9" : text}\\u202f%`;
});
const seconds = known(s => {
  if (s >= 120) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return s >= 1 ? `${s.toFixed(digits(s))} s` : s >= .01 || s === 0 ?
    `${Math.round(s * 1e3)} ms` : `${(s * 1e3).toFixed(s < 1e-3 ? 2 : 1)} ms`;
});
const bytes = known(n => {
  const power = Math.min(Math.floor(Math.log10(Math.max(n, 1)) / 3), 4);
  const value = n / 1000 ** power;
  return `${power ? value.toFixed(digits(value)) : n} ${"B kB MB GB TB".split(" ")[power]}`;
});

// -- elements: a tree is changed only where it differs, so that a selection stays
const element = (tag, classes = "", text = "") => {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.textContent = text;
  return made;
};
const write = (place, text) => {
  if (place.textContent !== text) place.textContent = text;
};
const shape = (svg, classes) => {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("class", classes);
  svg.append(path);
  return path;
};
function list(parent, items, key, make, update) {
  const old = parent.made || new Map();
  parent.made = new Map(items.map(item => [key(item), old.get(key(item)) || make(item)]));
  for (const [name, node] of old) if (!parent.made.has(name)) node.remove();
  let place = 0;
  for (const item of items) {
    const node = parent.made.get(key(item));
    if (parent.children[place] !== node)
      parent.insertBefore(node, parent.children[place] || null);
    update(node, item);
    place += 1;
  }
}

// -- charts: the last five minutes, 300 wide and 64 high, whatever the screen
const WIDTH = 300, HEIGHT = 64, TOP = 6;
function roundUp(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * unit >= value * .9999) * unit;
}
const height = (value, most) =>
  (HEIGHT - 1 - value / most * (HEIGHT - 1 - TOP)).toFixed(1);

function lineChart(svg) {
  const area = shape(svg, "area"), line = shape(svg, "line");
  return (points, most) => {
    let path = "", fill = "", run = [];
    const close = () => {
      if (run.length) {
        const marks = run.map(p => `${p.x.toFixed(1)} ${height(p.values[0], most)}`);
        path += `M${marks.join("L")}` + (run.length === 1 ? "h0" : "");
        fill += `M${run[0].x.toFixed(1)} ${HEIGHT}L${marks.join("L")}` +
          `L${run[run.length - 1].x.toFixed(1)} ${HEIGHT}Z`;
      }
      run = [];
    };
    for (const point of points) point.values[0] === null ? close() : run.push(point);
    close();
    line.setAttribute("d", path);
    area.setAttribute("d", fill);
  };
}
function barChart(svg) {
  const good = shape(svg, "good"), bad = shape(svg, "bad");
  return (points, most, step) => {
    let lower = "", upper = "";
    const width = WIDTH * step / 300 * .72;
    for (const { x, values: [done, failed] } of points) {
      const bar = (from, to) => from === to ? "" :
        `M${(x - width / 2).toFixed(1)} ${height(from, most)}` +
        `V${height(to, most)}h${width.toFixed(1)}V${height(from, most)}Z`;
      lower += bar(0, done);
      upper += bar(done, done + failed);
    }
    good.setAttribute("d", lower);
    bad.setAttribute("d", upper);
  };
}

// -- cards: [title, figure, its unit, what stands below, values of a slot, how they
// are written, kind of chart]
const spread = name => report => {
  const { p90, p99 } = report[name];
  return p90 === null ? ["none yet"] : [`p90 ${seconds(p90)}`, `p99 ${seconds(p99)}`];
};
const perSecond = (row, step) => // of a slot that has just begun, nothing is known
  row.ago < 1 ? null : row.tokens / Math.min(row.ago, step);
const CARDS = [
  ["Active", r => count(r.active), "streams",
    r => [`${count(r.started)} started`, `${rate(r.average_retries)} retries each`],
    row => [row.active], values => count(values[0]), lineChart],
  ["Success rate", r => percent(r.success_rate), "",
    r => [`${count(r.completed)} completed`, `${count(r.failed)} failed`]
      .concat(r.closed ? [`${count(r.closed)} left early`] : []),
    row => [row.completed, row.failed],
    values => `${count(values[0])} completed, ${count(values[1])} failed`, barChart],
  ["Throughput", r => rate(r.tokens_per_second), "deltas/s",
    r => [`${count(r.tokens)} in all`, `${bytes(Math.round(r.bytes_per_second))}/s`],
    (row, step) => [perSecond(row, step)], values => `${rate(values[0])}/s`, lineChart],
  ["First token", r => seconds(r.first_token_seconds.p50), "median",
    spread("first_token_seconds"), row => [row.first_token_seconds],
    values => seconds(values[0]), lineChart],
  ["Duration", r => seconds(r.seconds.p50), "median", spread("seconds"),
    row => [row.seconds], values => seconds(values[0]), lineChart],
  ["Delta gap", r => seconds(r.gaps.p50), "median", spread("gaps"),
    row => [row.gap_seconds], values => seconds(values[0]), lineChart],
];

class Card {
  constructor([title, figure, unit, below, values, written, chart]) {
    Object.assign(this, { title, figure, below, values, written });
    const card = element("div", "card");
    const big = element("div", "big");
    this.number = element("span");
    big.append(this.number, element("small", "", unit));
    this.facts = element("p");
    this.most = element("span");
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    shape(this.svg, "grid").setAttribute(
      "d", `M0 ${HEIGHT - .5}H${WIDTH}M0 ${TOP}H${WIDTH}`);
    this.draw = chart(this.svg);
    this.mark = shape(this.svg, "mark");
    this.left = element("span", "", "5 min ago");
    this.right = element("span", "", "now");
    const plot = element("div", "plot"), axis = element("div", "axis");
    plot.append(this.svg, this.most);
    axis.append(this.left, this.right);
    card.append(element("h2", "", title), big, this.facts, plot, axis);
    card.dataset.card = title;
    plot.addEventListener("pointermove", event => this.point(event));
    plot.addEventListener("pointerleave", () => { this.at = null; this.readOut(); });
    $("cards").append(card);
  }
  show(report) {
    const step = report.series_step_seconds, span = step * report.series.length;
    write(this.number, this.figure(report));
    list(this.facts, this.below(report).map((text, place) => ({ text, place })),
      fact => fact.place, () => element("span"), (node, fact) => write(node, fact.text));
    this.points = report.series.map(row => ({
      x: WIDTH * (1 - Math.max(row.ago - step / 2, 0) / span),
      ago: Math.max(row.ago - step / 2, 0), values: this.values(row, step),
    }));
    const sums = this.points.map(p => p.values.reduce((a, b) => a + b, 0));
    const most = roundUp(Math.max(...sums));
    this.draw(this.points, most, step);
    const highest = this.written([most, 0]).split(" completed")[0];
    write(this.most, Math.max(...sums) > 0 ? highest : "");
    this.svg.setAttribute("aria-label",
      `${this.title}: ${this.figure(report)}; chart of the last five minutes`);
    this.readOut();
  }
  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.at = (event.clientX - box.left) / box.width * WIDTH;
    this.readOut();
  }
  readOut() {
    const isOut = this.at == null || !this.points;
    const near = isOut ? null : this.points.reduce((best, point) =>
      Math.abs(point.x - this.at) < Math.abs(best.x - this.at) ? point : best);
    this.mark.setAttribute("d", near ? `M${near.x.toFixed(1)} 0V${HEIGHT}` : "");
    write(this.left, near ? `${Math.round(near.ago)} s ago` : "5 min ago");
    write(this.right, near ? this.written(near.values) : "now");
  }
}

// -- lists
function newError() {
  const item = element("li"), cell = element("div");
  cell.append(element("i"), element("span"));
  item.append(element("b"), cell);
  return item;
}
function showErrors(errors) {
  const most = Math.max(1, ...errors.map(error => error.count));
  list($("errors"), errors, error => error.error, newError, (item, error) => {
    write(item.querySelector("b"), count(error.count));
    write(item.querySelector("span"), error.error);
    item.querySelector("i").style.width = `${100 * error.count / most}%`;
  });
  $("no-errors").hidden = errors.length > 0;
}
function newStream(stream) {
  const row = element("tr"), model = element("td", "model", stream.model || NONE);
  const cell = (name, label) => {
    const made = element("td", name);
    if (label) made.dataset.label = label;
    row.append(made);
    return made;
  };
  write(cell("n number"), String(stream.stream));
  model.append(" ", element("small", "", stream.dialect));
  row.append(model);
  row.cells_ = [cell("state")];
  row.append(element("td", "wide"));
  row.cells_.push(cell("n", "first"), cell("n", "in all"), cell("n", "deltas"),
    cell("n", ""), cell("n", "retries"), cell("error"));
  return row;
}
function updateStream(row, stream) {
  const figures = [stream.state, seconds(stream.first_token_seconds),
    seconds(stream.seconds), count(stream.tokens), bytes(stream.bytes),
    count(stream.retries), stream.error || ""];
  row.cells_.forEach((cell, place) => write(cell, figures[place]));
  row.cells_[0].className = `state ${stream.state}`;
  row.cells_[5].className = stream.retries ? "n some" : "n none";
}
function showStreams(streams) {
  const wanted = document.querySelector("#filter :checked").value;
  const shown = streams.filter(stream => !wanted || stream.state === wanted);
  list($("streams"), shown, stream => stream.stream, newStream, updateStream);
  $("no-streams").hidden = shown.length > 0;
}

// -- once a second, if anybody looks
const $ = name => document.getElementById(name);
const cards = CARDS.map(card => new Card(card));
let report = null, answered = Date.now();

function show() {
  cards.forEach(card => card.show(report));
  showErrors(report.common_errors);
  showStreams(report.streams);
  document.title = `${count(report.active)} active \\u00b7 Streams`;
}
async function poll() {
  try {
    const response = await fetch("/report.json", { cache: "no-store" });
    if (!response.ok) throw new Error(response.status);
    report = await response.json();
    answered = Date.now();
  } catch (error) {
    return `no answer for ${Math.round((Date.now() - answered) / 1000)} s`;
  }
  show();
  return "";
}
async function run() {
  const trouble = document.hidden ? "" : await poll();
  document.body.classList.toggle("stale", Boolean(trouble));
  write($("status"), trouble || "live");
  setTimeout(run, 1000);
}
$("filter").addEventListener("change", () => report && showStreams(report.streams));
run();
"""

ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'"
    "%3E%3Cpath d='M1 9h3l2-6 3 11 2-5h4' fill='none' stroke='%232f7ae5' "
    "stroke-width='2' stroke-linejoin='round' stroke-linecap='round'/%3E%3C/svg%3E"
)
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Streams</title>
<link rel="icon" href="{ICON}">
<style>{STYLE}</style>
</head>
<body>{BODY}<script>{SCRIPT}</script></body>
</html>
"""


def _source_hash(text: str) -> str:
    """What a Content-Security-Policy calls one inline style or script."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "'sha256-" + base64.b64encode(digest).decode("ascii") + "'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "style-src " + _source_hash(STYLE),
            "script-src " + _source_hash(SCRIPT),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Allow": "GET",
}


# ---------------------------------------------------------------------------
# 2. The server
# ---------------------------------------------------------------------------
# Each report has the same bounded size however many streams there are, so it is made
# anew for each request and nothing is kept.

#: Names under which this machine may be asked.  A page from elsewhere whose own name
#: was made to point here (DNS rebinding) comes with another.
HOSTS = ("localhost", "127.0.0.1")


class _Server(ThreadingHTTPServer):
    """Serves one monitor on the loopback interface."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, monitor: StreamMonitor, port: int) -> None:
        self.routes: dict[str, tuple[str, Callable[[], str]]] = {
            "/": ("text/html; charset=utf-8", lambda: PAGE),
            "/report.json": ("application/json", lambda: json.dumps(monitor.report())),
            "/metrics": (
                "text/plain; version=0.0.4; charset=utf-8",
                monitor.prometheus,
            ),
        }
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for this machine's name, which can take seconds."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that left in the middle is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes, as HTTP/1.0 does."""

    server: _Server
    timeout = 10  # seconds for a request to come in
    server_version, sys_version = "dashboard", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def parse_request(self) -> bool:
        """Let pass only what comes from this machine, and only GET."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", "").rsplit(":", 1)[0].lower() not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "ask for localhost or 127.0.0.1")
            return False
        if self.command != "GET":
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            return False
        return True

    def do_GET(self) -> None:
        """Answer with the page, the report or the metrics."""
        path = self.path.split("?", 1)[0]
        if path == "/favicon.ico":  # the page has its own
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
        elif path in self.server.routes:
            kind, make = self.server.routes[path]
            self._send(kind, make().encode("utf-8"))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Add to every answer, errors too, what keeps a browser strict."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a line a second would bury the program's own output."""


class Dashboard:
    """A running dashboard; a context manager.

    :param monitor: whose streams are shown.
    :param port: where to listen on 127.0.0.1; 0 lets the operating system choose.
    :raises OSError: if the port is taken.

    :attr:`url` is the page's address, without a slash at its end.
    """

    def __init__(self, monitor: StreamMonitor, port: int = 0) -> None:
        self._server = _Server(monitor, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="dashboard",
            daemon=True,
        ).start()

    def close(self) -> None:
        """Stop serving; may be called more than once."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Dashboard:  # noqa: PYI034  (Self needs Python 3.11)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve(monitor: StreamMonitor, port: int = 0) -> Dashboard:
    """Serve a live page over a monitor, in the background, on this machine alone.

    :param monitor: the :class:`StreamMonitor` whose streams are shown.
    :param port: where to listen on 127.0.0.1; 0 lets the operating system choose.
    :returns: the running :class:`Dashboard`: ``with`` or ``close()`` ends it, and so
        does the end of the program.
    :raises OSError: if the port is taken.
    """
    return Dashboard(monitor, port)


# ---------------------------------------------------------------------------
# 3. The demonstration
# ---------------------------------------------------------------------------
# Storytellers that do not exist, on a server that fails now and then.

TELLERS = [
    ("grimm-8b", "vllm"),
    ("aesop-mini", "openai"),
    ("homer-large", "anthropic"),
    ("andersen-flash", "mistral"),
    ("basho-3b", "ollama"),
]

#: What the server does, in how many of 100 requests.
FAULTS = {
    "ok": 71,
    "slow-first:1.2": 7,
    "pings:2": 3,
    "drop:2500": 3,
    "reset:4000": 2,
    "stall:2000": 2,
    "malformed:20": 1,
    "error-event:12": 1,
    "fatal-error:20": 1,
    "status:503": 5,
    "status:429:retry-after=0.4": 3,
    "quota": 1,
}


class Demonstration:
    """Threads that stream one story after the other, in waves of a minute."""

    THREADS = 24
    WAVE = 60.0

    def __init__(self, rs: Any, monitor: StreamMonitor, server_url: str) -> None:
        self._rs, self._monitor, self._server_url = rs, monitor, server_url
        self._stopping = threading.Event()
        self._began = time.monotonic()
        for number in range(self.THREADS):
            threading.Thread(target=self._work, args=(number,), daemon=True).start()

    def stop(self) -> None:
        """Let each thread end with its present stream."""
        self._stopping.set()

    def _work(self, number: int) -> None:
        while not self._stopping.wait(random.uniform(0.1, 1.0)):
            if number < self._wanted():
                with contextlib.suppress(self._rs.StreamingError):
                    self._stream(*random.choice(TELLERS))

    def _wanted(self) -> float:
        """How many threads shall stream now."""
        phase = (time.monotonic() - self._began) / self.WAVE * 2 * math.pi
        return self.THREADS * (0.65 - 0.35 * math.cos(phase))

    def _stream(self, model: str, dialect: str) -> None:
        is_bare = dialect in ("anthropic", "ollama")
        base_url = self._server_url + ("" if is_bare else "/v1")
        stream = self._rs.stream_chat(
            "Tell me a story",
            model=model,
            dialect=dialect,
            base_url=base_url,
            api_key="demonstration",
            timeouts=self._rs.Timeouts(read=1.0),
            retry=self._rs.Retry(attempts=3, wait_initial=0.3),
            resume="continue",
            observe=self._monitor,
        )
        patience = random.choice([None] * 19 + [25])  # some readers leave early
        with stream:
            for place, _ in enumerate(stream):
                if place == patience:
                    break


def _script(length: int = 400) -> list[str]:
    """Faults in random order, as many of each as the table says."""
    return random.choices(list(FAULTS), weights=list(FAULTS.values()), k=length)


def main(argv: list[str] | None = None) -> int:
    """Show the dashboard over a demonstration, until Ctrl-C or the end of its life."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0, the default: any")
    parser.add_argument(
        "--lifetime", type=float, default=3600.0, help="seconds until it ends by itself"
    )
    options = parser.parse_args(argv)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [here, os.path.dirname(here)]
    from flaky_server import FlakyServer

    import resilient_sse

    monitor = resilient_sse.StreamMonitor()
    settings: dict[str, Any] = {"loop": True, "pieces": 5, "delay": 0.05}
    settings["lifetime"] = options.lifetime + 60
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(FlakyServer(script=_script(), **settings))
        dashboard = stack.enter_context(serve(monitor, options.port))
        demonstration = Demonstration(resilient_sse, monitor, server.url)
        stack.callback(demonstration.stop)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        print(f"Open {dashboard.url} (Ctrl-C ends it)", flush=True)
        time.sleep(options.lifetime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
