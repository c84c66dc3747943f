"""The benchmark's server: a raw socket server that streams made-up answers.

    python benchmarks/server.py [--seconds 3600]

It prints its port, listens on loopback only, and stops after ``--seconds`` or as
soon as its standard input closes. The URL says what to send:
``/SHAPE/COUNT/PACE/...`` streams COUNT deltas in the form of SHAPE (see
``SHAPES``), each in a HTTP chunk of its own, as providers do. With PACE 0 the body
is rendered beforehand and written as fast as the client takes it; otherwise one
delta goes out each PACE milliseconds, and its text is the time of writing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BLOCK = 20_000  # deltas rendered beforehand; a longer body repeats them
WRITE = 256 * 1024  # bytes per write, so that the client never waits for us
STAMP = "%020.9f"  # the text of a paced delta, always 20 characters

_WORDS = [
    *[
        " the",
        " of",
        " and",
        " to",
        " a",
        " in",
        " is",
        " that",
        " for",
        " it",
        " was",
        " on",
        " are",
        " as",
        " with",
        " his",
    ],
    *[
        " they",
        " at",
        " be",
        " this",
        " have",
        " from",
        " or",
        " one",
        " had",
        " by",
        " but",
        " not",
        " what",
        " all",
    ],
    *[
        " connection",
        " resilient",
        " stream",
        " token",
        " would",
        " never",
        " server",
        " café",
        "’s",
    ],
    *["ing", "ly", "ed", "er", "s", ",", ",", ",", ".", ".", ".", ":", ";", "!", "?"],
    *[" 42", " 2025", " therefore", " consequently", " answer", "\n\n", '"', " \\("],
]
TEXTS = random.Random(5).choices(_WORDS, k=BLOCK)


class Shape(NamedTuple):
    """How one provider's body looks: what comes before, for each delta, and after."""

    head: Callable[[], list[bytes]]
    delta: Callable[[int, str], bytes]
    tail: Callable[[int], list[bytes]]


def expected(count: int, pace: float = 0) -> tuple[int, int]:
    """How many deltas and characters a client that lost nothing has seen."""
    if pace:
        return count, count * len(STAMP % 0)
    blocks, rest = divmod(count, BLOCK)
    return count, blocks * len("".join(TEXTS)) + len("".join(TEXTS[:rest]))


# The providers' formats, taken from recordings.

_DUMP = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
_random = random.Random(5)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _obfuscation(text: str) -> str:
    """OpenAI's padding: text and padding together are a multiple of 16 characters."""
    return "".join(_random.choices(_LETTERS, k=16 - len(text) % 16))


def _data(value: object) -> bytes:
    return b"data: " + _DUMP(value).encode() + b"\n\n"


def _event(value: dict[str, object], padding: int = 0) -> bytes:
    data = _DUMP(value)[:-1] + " " * padding + "}"
    return f"event: {value['type']}\ndata: {data}\n\n".encode()


def _chat(choices: list[object], usage: object = None, **more: object) -> bytes:
    return _data(
        {
            "id": "chatcmpl-CoDWyp2E1BNuDrOa4ZTIteBKS3LkS",
            "object": "chat.completion.chunk",
            "created": 1766084448,
            "model": "gpt-4o-2024-08-06",
            "service_tier": "default",
            "system_fingerprint": "fp_deacdd5f6f",
            "choices": choices,
            "usage": usage,
            **more,
        }
    )


def _choice(delta: dict[str, object], finish: str | None = None) -> list[object]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]


def _chat_head() -> list[bytes]:
    return [_chat(_choice({"role": "assistant", "content": "", "refusal": None}))]


def _chat_tail(count: int) -> list[bytes]:
    usage = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
    return [_chat(_choice({}, "stop")), _chat([], usage), b"data: [DONE]\n\n"]


def _chat_delta(number: int, text: str) -> bytes:
    return _chat(_choice({"content": text}))


def _padded_delta(number: int, text: str) -> bytes:
    return _chat(_choice({"content": text}), obfuscation=_obfuscation(text))


def _anthropic_head() -> list[bytes]:
    message: dict[str, object] = {
        "id": "msg_01KYPrEquKPrNtMWDUTETTip",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5-20251001",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 12, "output_tokens": 1},
    }
    block = {"type": "text", "text": ""}
    return [
        _event({"type": "message_start", "message": message}, 1),
        _event({"type": "content_block_start", "index": 0, "content_block": block}, 3),
        b'event: ping\ndata: {"type": "ping"}\n\n',
    ]


def _anthropic_delta(number: int, text: str) -> bytes:
    delta = {"type": "text_delta", "text": text}
    value = {"type": "content_block_delta", "index": 0, "delta": delta}
    return _event(value, _random.randrange(15))


def _anthropic_tail(count: int) -> list[bytes]:
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    usage = {"output_tokens": 12}
    return [
        _event({"type": "content_block_stop", "index": 0}, 3),
        _event({"type": "message_delta", "delta": delta, "usage": usage}, 12),
        _event({"type": "message_stop"}, 5),
    ]


_ITEM = "msg_0fabc13af1ee0049006a691dfebdc881a1ae18d027c313d8ce"
_PLACE = {"item_id": _ITEM, "output_index": 0, "content_index": 0}


def _response(status: str, **more: object) -> dict[str, object]:
    return {
        "id": "resp_0fabc13af1ee0049006a691dfdab8881a1a75f2db7ff78cb83",
        "object": "response",
        "created_at": 1785273853,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "model": "gpt-5.5-2026-04-23",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 0.98,
        "usage": None,
        "metadata": {},
        **more,
    }


def _message(status: str) -> dict[str, object]:
    return {
        "id": _ITEM,
        "type": "message",
        "status": status,
        "content": [],
        "role": "assistant",
    }


def _numbered(kind: str, number: int, **more: object) -> bytes:
    return _event({"type": kind, **more, "sequence_number": number})


def _responses_head() -> list[bytes]:
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    going, item = _response("in_progress"), _message("in_progress")
    return [
        _numbered("response.created", 0, response=going),
        _numbered("response.in_progress", 1, response=going),
        _numbered("response.output_item.added", 2, output_index=0, item=item),
        _numbered("response.content_part.added", 3, **_PLACE, part=part),
    ]


def _responses_delta(number: int, text: str) -> bytes:
    value = {
        "type": "response.output_text.delta",
        "content_index": 0,
        "delta": text,
        "item_id": _ITEM,
        "logprobs": [],
        "obfuscation": _obfuscation(text),
        "output_index": 0,
        "sequence_number": number + 4,
    }
    return _event(value)


def _responses_tail(count: int) -> list[bytes]:
    usage = {"input_tokens": 9, "output_tokens": 12, "total_tokens": 21}
    item, done = _message("completed"), _response("completed", usage=usage)
    return [
        _numbered("response.output_item.done", count + 4, output_index=0, item=item),
        _numbered("response.completed", count + 5, response=done),
    ]


SHAPES = {
    "openai": Shape(_chat_head, _chat_delta, _chat_tail),
    "openai-padded": Shape(_chat_head, _padded_delta, _chat_tail),
    "anthropic": Shape(_anthropic_head, _anthropic_delta, _anthropic_tail),
    "responses": Shape(_responses_head, _responses_delta, _responses_tail),
}


def events(shape: str, count: int) -> Iterator[bytes]:
    """The events of one whole answer, without any HTTP framing."""
    head, delta, tail = SHAPES[shape]
    texts = (delta(i, TEXTS[i % BLOCK]) for i in range(count))
    return itertools.chain(head(), texts, tail(count))


# HTTP

_HEADERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_END = b"0\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.lru_cache(maxsize=64)
def _block(shape: str, count: int, first: int) -> bytes:
    delta = SHAPES[shape].delta
    return b"".join(_chunk(delta(first + i, TEXTS[i])) for i in range(count))


def _whole(shape: str, count: int) -> Iterator[bytes]:
    """The chunked body at full speed, in large pieces; memory is bounded by BLOCK."""
    blocks, rest = divmod(count, BLOCK)
    sizes = [BLOCK] * blocks + [rest] * (rest > 0)
    yield _HEADERS + b"".join(map(_chunk, SHAPES[shape].head()))
    for number, size in enumerate(sizes):
        # Of Responses alone each block is another one: its events are numbered.
        first = number * BLOCK if shape == "responses" else 0
        block = _block(shape, size, first)
        yield from (block[i : i + WRITE] for i in range(0, len(block), WRITE))
    yield b"".join(map(_chunk, SHAPES[shape].tail(count))) + _END


_streams = itertools.count()


def _paced(shape: str, count: int, pace: float) -> Iterator[bytes]:
    """The chunked body at an even pace, each delta telling when it was written.

    Streams at the same time are spread out, so that their deltas do not collide.
    """
    head, delta, tail = SHAPES[shape]
    yield _HEADERS + b"".join(map(_chunk, head()))
    step = pace / 1000
    phase = next(_streams) * 0.618 % 1
    due = (time.monotonic() // step + phase) * step
    for number in range(count):
        due += step
        time.sleep(max(0.0, due - time.monotonic()))
        yield _chunk(delta(number, STAMP % time.monotonic()))
    time.sleep(step)  # the finish reason takes a step of its own, as a token does
    yield b"".join(map(_chunk, tail(count))) + _END


def _body(path: str) -> Iterable[bytes]:
    shape, count, pace = path.lstrip("/").split("/")[:3]
    if float(pace):
        return _paced(shape, int(count), float(pace))
    return _whole(shape, int(count))


def _request(reader: Iterator[bytes], read: Callable[[int], bytes]) -> str:
    """Read one request; return its path, or an empty string at the end."""
    line = next(reader, b"")
    length = 0
    for header in iter(lambda: next(reader, b""), b"\r\n"):
        if not header:
            return ""
        if header.lower().startswith(b"content-length:"):
            length = int(header[15:])
    read(length)
    return line.split(b" ")[1].decode() if line else ""


def _serve(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(120)
    try:
        with client, client.makefile("rb") as reader:
            path = _request(reader, reader.read)
            while path:
                for piece in _body(path):
                    client.sendall(piece)
                path = _request(reader, reader.read)
    except OSError:  # the client left, as several peers do after the last event
        pass


def _stop_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Print the port, then serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this")
    deadline = time.monotonic() + parser.parse_args().seconds
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        while time.monotonic() < deadline:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                client, _ = listener.accept()
            except TimeoutError:
                break
            threading.Thread(target=_serve, args=(client,), daemon=True).start()


if __name__ == "__main__":
    main()
