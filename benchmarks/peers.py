"""The clients that are compared, and the process that runs one of them.

    python benchmarks/peers.py PEER SHAPE URL [--warm URL] [--repeat N] [--threads N]

Every client reads the stream at a URL of ``server.py`` to its end and counts what it
saw, so that a client that loses text is found out. The process prints one line of
JSON: deltas, characters, CPU and wall seconds, peak memory, delays, threads.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import itertools
import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the module under test

Delays = list[float] | None  # seconds from the server's write to the caller's hand
PROMPT = [{"role": "user", "content": "Tell me a story"}]
BODY = {"model": "m", "messages": PROMPT, "stream": True}
READ = 65536


class Seen(NamedTuple):
    """What one client got out of one stream."""

    deltas: int
    characters: int


Consume = Callable[[str, str, Delays], Seen]  # URL, shape, delays


class Peer(NamedTuple):
    """A client, the package it needs (None: only Python), the shapes it can read."""

    consume: Consume
    package: str | None
    shapes: tuple[str, ...] = ("openai", "openai-padded", "anthropic", "responses")


# What the caller does with a delta. Every client goes through one of these two loops
# but the floor, which has the same lines within its own loop.


def _count(texts: Iterable[str], delays: Delays) -> Seen:
    """For clients that hand out text."""
    deltas = characters = 0
    for text in texts:
        deltas += 1
        characters += len(text)
        if delays is not None:
            delays.append(time.monotonic() - float(text))
    return Seen(deltas, characters)


def _parse(events: Iterable[str | bytes], shape: str, delays: Delays) -> Seen:
    """For clients that hand out the data of events: the caller parses the JSON."""
    text_of = _TEXT_OF[shape]
    deltas = characters = 0
    for data in events:
        if data in ("[DONE]", b"[DONE]"):
            break
        value = json.loads(data)
        text = text_of(value)
        if text:
            deltas += 1
            characters += len(text)
            if delays is not None:
                delays.append(time.monotonic() - float(text))
        elif value.get("type") in ("message_stop", "response.completed"):
            break
    return Seen(deltas, characters)


def _chat_text(value: dict[str, Any]) -> str | None:
    choices = value["choices"]
    return choices[0]["delta"].get("content") if choices else None


def _anthropic_text(value: dict[str, Any]) -> str | None:
    return value["delta"]["text"] if value["type"] == "content_block_delta" else None


def _responses_text(value: dict[str, Any]) -> str | None:
    return value["delta"] if value["type"] == "response.output_text.delta" else None


_TEXT_OF: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "openai": _chat_text,
    "openai-padded": _chat_text,
    "anthropic": _anthropic_text,
    "responses": _responses_text,
}


# The bare floor: no HTTP library, no framing, no check of anything.


def _request(url: str) -> socket.socket:
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port))
    head = f"POST {parts.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
    sock.sendall(head.encode() + b"{}")
    return sock


def floor(url: str, shape: str, delays: Delays) -> Seen:
    """A socket, ``recv``, ``split`` and ``json.loads``; chunk headers just drop out."""
    text_of = _TEXT_OF[shape]
    deltas = characters = 0
    rest = b""
    with _request(url) as sock:
        for read in iter(partial(sock.recv, READ), b""):
            *events, rest = (rest + read).split(b"\n\n")
            for event in events:
                data = event[event.index(b"data: ") + 6 :]
                if data == b"[DONE]":
                    return Seen(deltas, characters)
                value = json.loads(data)
                text = text_of(value)
                if text:
                    deltas += 1
                    characters += len(text)
                    if delays is not None:
                        delays.append(time.monotonic() - float(text))
                elif value.get("type") in ("message_stop", "response.completed"):
                    return Seen(deltas, characters)
    return Seen(deltas, characters)


def recv(url: str, shape: str, delays: Delays) -> Seen:
    """For delays alone: the time is taken as ``recv`` returns, before any parsing."""
    start = b'"content":"'
    deltas = characters = 0
    with _request(url) as sock:
        for read in iter(partial(sock.recv, READ), b""):
            now = time.monotonic()
            for piece in read.split(start)[1:]:
                text = piece[: piece.index(b'"')]
                if text:
                    deltas += 1
                    characters += len(text)
                    if delays is not None:
                        delays.append(now - float(text))
            if read.endswith(b"0\r\n\r\n"):
                break
    return Seen(deltas, characters)


# The loop from the tutorials, and libraries.


def _post(url: str) -> Any:
    import requests

    return requests.post(url, json=BODY, stream=True, timeout=60)


def iter_lines(url: str, shape: str, delays: Delays) -> Seen:
    """``requests`` with ``iter_lines`` and ``json.loads``."""
    with _post(url) as response:
        lines = response.iter_lines()
        data = (line[6:] for line in lines if line.startswith(b"data: "))
        return _parse(data, shape, delays)


def sseclient_py(url: str, shape: str, delays: Delays) -> Seen:
    """sseclient-py over ``requests``, with ``json.loads``."""
    from sseclient import SSEClient

    with _post(url) as response:
        events = SSEClient(response).events()
        return _parse((event.data for event in events), shape, delays)


def requests_sse(url: str, shape: str, delays: Delays) -> Seen:
    """requests-sse with ``json.loads``."""
    from requests_sse import EventSource

    with EventSource(url, method="POST", json=BODY, timeout=60) as events:
        return _parse((event.data for event in events), shape, delays)


def httpx_sse(url: str, shape: str, delays: Delays) -> Seen:
    """httpx-sse with ``json.loads``."""
    import httpx
    from httpx_sse import connect_sse

    client = httpx.Client(timeout=60)
    with client, connect_sse(client, "POST", url, json=BODY) as source:
        return _parse((event.data for event in source.iter_sse()), shape, delays)


def launchdarkly(url: str, shape: str, delays: Delays) -> Seen:
    """launchdarkly-eventsource (it can only GET) with ``json.loads``."""
    from ld_eventsource import SSEClient

    client = SSEClient(url)
    try:
        return _parse((event.data for event in client.events), shape, delays)
    finally:
        client.close()


def openai(url: str, shape: str, delays: Delays) -> Seen:
    """The OpenAI SDK."""
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        if shape == "responses":
            return _count(_openai_responses(client), delays)
        return _count(_openai_chat(client), delays)


def _openai_chat(client: Any) -> Iterator[str]:
    for chunk in client.chat.completions.create(**BODY):
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def _openai_responses(client: Any) -> Iterator[str]:
    for event in client.responses.create(model="m", input="hi", stream=True):
        if event.type == "response.output_text.delta":
            yield event.delta


def anthropic(url: str, shape: str, delays: Delays) -> Seen:
    """The Anthropic SDK (its events, cheaper than its ``text_stream``)."""
    from anthropic import Anthropic

    with Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        return _count(_anthropic_texts(client), delays)


def _anthropic_texts(client: Any) -> Iterator[str]:
    for event in client.messages.create(**BODY, max_tokens=1000):
        if event.type == "content_block_delta" and event.delta.type == "text_delta":
            yield event.delta.text


# The module under test, as it is and with parts of it switched off or added.

_DIALECTS = {"anthropic": "anthropic", "responses": "openai-responses"}


def _stream(url: str, shape: str, **options: Any) -> Any:
    from resilient_sse import stream_chat

    options.setdefault("dialect", _DIALECTS.get(shape, "openai"))
    if shape == "anthropic":
        options["max_tokens"] = 1000
    return stream_chat("Tell me a story", "m", base_url=url, api_key="k", **options)


def resilient(url: str, shape: str, delays: Delays, **options: Any) -> Seen:
    """``resilient_sse.stream_chat``."""
    return _count(_stream(url, shape, **options), delays)


def _no_timeouts(url: str, shape: str, delays: Delays) -> Seen:
    from resilient_sse import Timeouts

    names = ("connect", "first_token", "read", "idle", "total")
    return resilient(url, shape, delays, timeouts=Timeouts(**dict.fromkeys(names)))


def _no_limits(url: str, shape: str, delays: Delays) -> Seen:
    from resilient_sse import Limits

    return resilient(
        url, shape, delays, limits=Limits(line=None, event=None, text=None)
    )


def _no_text(url: str, shape: str, delays: Delays) -> Seen:
    from resilient_sse import Limits

    return resilient(url, shape, delays, limits=Limits(text=1000))


def _deltas(url: str, shape: str, delays: Delays) -> Seen:
    stream = _stream(url, shape)
    return _count((delta.text for delta in stream.deltas()), delays)


def _observed(observer: str, url: str, shape: str, delays: Delays) -> Seen:
    import resilient_sse

    made = {
        "nothing": lambda: resilient_sse.Observer(),
        "on_token": lambda: resilient_sse.Observer(on_token=lambda record: None),
        "on_event": lambda: resilient_sse.Observer(on_event=lambda record: None),
        "monitor": lambda: resilient_sse.StreamMonitor(),
        "trace": lambda: resilient_sse.StreamTrace(),
    }[observer]()
    return resilient(url, shape, delays, observe=made)


def _journaled(url: str, shape: str, delays: Delays) -> Seen:
    with tempfile.TemporaryDirectory() as folder:  # a new one, so nothing is recalled
        journal = os.path.join(folder, "journal.db")
        return resilient(url, shape, delays, journal=journal)


PEERS = {
    "floor": Peer(floor, None),
    "recv": Peer(recv, None, ()),
    "iter_lines": Peer(iter_lines, "requests"),
    "resilient_sse": Peer(resilient, "resilient_sse"),
    "launchdarkly-eventsource": Peer(launchdarkly, "ld_eventsource"),
    "sseclient-py": Peer(sseclient_py, "sseclient"),
    "requests-sse": Peer(requests_sse, "requests_sse"),
    "httpx-sse": Peer(httpx_sse, "httpx_sse"),
    "openai": Peer(openai, "openai", ("openai", "openai-padded", "responses")),
    "anthropic": Peer(anthropic, "anthropic", ("anthropic",)),
}

PARTS: dict[str, Consume] = {
    "no timeouts, hence no watchdog": _no_timeouts,
    "no limits": _no_limits,
    "text not kept": _no_text,
    "resume never": partial(resilient, resume="never"),
    "deltas() instead of text": _deltas,
    "an Observer without methods": partial(_observed, "nothing"),
    "Observer(on_token=...)": partial(_observed, "on_token"),
    "Observer(on_event=...)": partial(_observed, "on_event"),
    "StreamMonitor": partial(_observed, "monitor"),
    "StreamTrace": partial(_observed, "trace"),
    "journal": _journaled,
}


def installed(package: str | None) -> bool:
    """Whether a peer can run here."""
    return package is None or importlib.util.find_spec(package) is not None


# Decoders alone: an iterable of reads in, an iterator of events out.

Reads = Iterable[bytes]
Decode = Callable[[Reads], Iterator[Any]]


class _Split:
    """The floor for decoders: ``split``, a slice, ``decode``; for ``data`` lines alone."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, read: bytes) -> list[Any]:
        *events, self.rest = (self.rest + read).split(b"\n\n")
        return [event[6:].decode() for event in events]


class _SplitTwo(_Split):
    """The same floor where a line with another field comes before the data."""

    def __init__(self, field: bytes) -> None:
        super().__init__()
        self.start = len(field) + 2

    def feed(self, read: bytes) -> list[Any]:
        *events, self.rest = (self.rest + read).split(b"\n\n")
        start = self.start
        return [
            (first[start:].decode(), second[6:].decode())
            for first, second in [event.split(b"\n") for event in events]
        ]


def _feed_all(decoder: Any, reads: Reads) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(decoder.feed, reads))


FLOORS: dict[str, Decode] = {
    "data": lambda reads: _feed_all(_Split(), reads),
    "event + data": lambda reads: _feed_all(_SplitTwo(b"event"), reads),
    "id + data": lambda reads: _feed_all(_SplitTwo(b"id"), reads),
}


def _resilient_decoder(reads: Reads) -> Iterator[Any]:
    from resilient_sse import SSEDecoder

    return _feed_all(SSEDecoder(), reads)


def _launchdarkly_decoder(reads: Reads) -> Iterator[Any]:
    from ld_eventsource.reader import _BufferedLineReader, _SSEReader

    lines = _BufferedLineReader.lines_from(reads)
    events: Iterator[Any] = _SSEReader(lines).events_and_comments()
    return events


def _sseclient_decoder(reads: Reads) -> Iterator[Any]:
    from sseclient import SSEClient

    return SSEClient(iter(reads)).events()


def _httpx_sse_decoder(reads: Reads) -> Iterator[Any]:
    from httpx_sse._decoders import SSEDecoder, SSELineDecoder

    texts = codecs.iterdecode(reads, "utf-8")
    lines = itertools.chain.from_iterable(map(SSELineDecoder().decode, texts))
    return (event for event in map(SSEDecoder().decode, lines) if event is not None)


def _openai_decoder(reads: Reads) -> Iterator[Any]:
    from openai._streaming import SSEDecoder

    return SSEDecoder().iter_bytes(iter(reads))


def _anthropic_decoder(reads: Reads) -> Iterator[Any]:
    from anthropic._streaming import SSEDecoder

    return SSEDecoder().iter_bytes(iter(reads))


DECODERS: dict[str, tuple[Decode, str]] = {
    "resilient_sse": (_resilient_decoder, "resilient_sse"),
    "launchdarkly-eventsource": (_launchdarkly_decoder, "ld_eventsource"),
    "httpx-sse": (_httpx_sse_decoder, "httpx_sse"),
    "sseclient-py": (_sseclient_decoder, "sseclient"),
    "openai": (_openai_decoder, "openai"),
    "anthropic": (_anthropic_decoder, "anthropic"),
}


# One client in a process of its own.


def peak() -> int:
    """Peak resident bytes of this process.

    Not ``ru_maxrss`` where /proc is there: it starts with the parent's size.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _many(
    consume: Callable[[Delays], Seen], threads: int
) -> tuple[list[Seen], list[float], int]:
    """Consume in many threads at once; tell how many threads were not the callers'."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(hard, max(soft, 8 * threads)), hard)
    )
    results: list[Seen] = []
    delays: list[float] = []
    gate = threading.Barrier(threads + 1)

    def call() -> None:
        own: list[float] = []
        gate.wait()
        results.append(consume(own))
        delays.extend(own)

    callers = [threading.Thread(target=call) for _ in range(threads)]
    for caller in callers:
        caller.start()
    before = threading.active_count()
    gate.wait()
    extra = 0
    while any(caller.is_alive() for caller in callers):
        time.sleep(0.05)
        gone = sum(not caller.is_alive() for caller in callers)
        extra = max(extra, threading.active_count() - before + gone)
    return results, delays, extra


def main() -> None:
    """Run one peer as the command line says and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=[*PEERS, *PARTS])
    parser.add_argument("shape", choices=_TEXT_OF)
    parser.add_argument("url")
    parser.add_argument("--warm", metavar="URL", help="read this first, not counted")
    parser.add_argument("--repeat", type=int, default=1, help="streams, one by one")
    parser.add_argument("--threads", type=int, default=0, help="streams at once")
    parser.add_argument("--delays", action="store_true", help="the deltas are stamps")
    args = parser.parse_args()
    consume = PARTS.get(args.peer) or PEERS[args.peer].consume
    if args.warm:
        consume(args.warm, args.shape, None)
    delays: list[float] = []
    extra = 0
    wall, cpu = time.monotonic(), time.process_time()
    if args.threads:
        each = partial(consume, args.url, args.shape)
        seen, delays, extra = _many(each, args.threads)
    else:
        stamps = delays if args.delays else None
        seen = [consume(args.url, args.shape, stamps) for _ in range(args.repeat)]
    report = {
        "cpu": time.process_time() - cpu,
        "wall": time.monotonic() - wall,
        "seen": seen,
        "peak": peak(),
        "extra_threads": extra,
        "delays": delays,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
