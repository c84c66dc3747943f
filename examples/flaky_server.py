"""A scripted, faulty LLM server, to test a streaming client against what goes wrong.

It speaks the streaming protocols of the usual providers on the loopback interface,
tells one known text, and breaks on request: at a byte, at an event, in the HTTP
framing, in the headers, in the protocol. It is made of raw sockets, because an HTTP
library would not let it misbehave, and of the standard library alone::

    import requests
    from flaky_server import FlakyServer

    with FlakyServer(text="Once upon a time ...", script=["drop:200", "ok"]) as server:
        url = server.url + "/v1/chat/completions"
        body = {"model": "m", "messages": [], "stream": True}
        try:
            print(requests.post(url, json=body).text)
        except requests.exceptions.ChunkedEncodingError as error:
            print(error)  # cut after 200 bytes of the body
        print(requests.post(url, json=body).text)  # the whole answer
        print(server.requests[0].json)  # what the client had asked

    $ python flaky_server.py --port 8000 --script drop:200,stall,ok --loop
    $ python flaky_server.py --list

Each request takes the next fault of the script, in order of arrival; past its end all
goes well. A fault is written ``name`` or ``name:argument``; several are joined with
``+`` and applied from left to right, as in ``"pings+drop:120"``; a function
``(connection, request) -> None`` answers by itself. Bytes are those of the body before
HTTP framing or compression; an event is what the protocol ends with a blank line (or a
line, in NDJSON). A count of bytes that is left out is 400, a count of events is 3, and
a cut beyond the end of the answer happens at its end.

The paths, below any prefix: ``/chat/completions``, ``/completions``, ``/responses``
(with background reattachment), ``/messages`` (Anthropic), ``/api/chat`` and
``/api/generate`` (Ollama), ``/models/M:streamGenerateContent`` (Gemini), ``/v2/chat``
(Cohere), ``/generate_stream`` (TGI) and ``/events`` (server-sent events with IDs).

==================== ===================================================================
ok                   The good answer.
drop:N               FIN after N bytes of the body, at the end of a chunk.
drop-event:N         FIN after N events.
drop-chunk:N         FIN after N bytes, within a chunk that announced more.
reset:N              RST after N bytes of the body.
reset-event:N        RST after N events.
end:N                The framing ends properly after N bytes: a truncation that HTTP
                     does not show.
end-event:N          The framing ends properly after N events.
bad-chunk:N          After N events the length of a chunk is no number; then FIN.
stall:N              N bytes of the body, then silence until the client leaves.
stall-event:N        N events, then silence until the client leaves.
slow-first:SECONDS   Headers at once, the body after SECONDS.
drip:SECONDS         One byte per write, SECONDS apart.
pings:N              N comments before each event (empty lines in NDJSON).
ping-forever:N       After N events only comments, every 20 ms, without end.
drip-forever:N       After N events one byte of an unfinished comment line every 20 ms
                     (of white space in NDJSON).
empty-deltas:N       After N events deltas with an empty text every 20 ms, without end.
no-done              All but the end marker.
no-finish            All but the finish reason.
finish-then-stall    Silence right after the finish reason.
finish-then-reset    RST right after the finish reason.
finish-then-error    An error event right after the finish reason, then the end.
done-then-open       The whole answer, but neither the framing nor the connection ends.
error-event:N        After N events the protocol's error event (overloaded), then the
                     end.
error-event-done:N   The same, then ``data: [DONE]`` and the end.
fatal-error:N        After N events the same for an invalid request, then the end.
named-error:N        After N events an ``event: error`` with the error, as Groq sends
                     it, then the end.
stray-error:N        After N events a field ``error: {...}`` (old llama.cpp), then the
                     end.
bare-error:N         After N events a JSON error over several lines without ``data:``,
                     as Google sends it, then the end.
malformed:N          After N events a delta whose JSON is broken off, and the good
                     answer goes on.
garbage:N            After N events a harmless line of data that is no JSON, and the
                     good answer goes on.
different            Quite another text; to be written before other faults.
status:CODE          An HTTP error, with headers: ``status:429:retry-after=2``.
quota                A 429 that no waiting cures: ``insufficient_quota``.
html:CODE            The error page of a proxy with this status.
json                 200 with the whole answer as ``application/json``, as from a server
                     that ignores ``stream``.
json-error           200 with an error as ``application/json``.
empty                200 and a stream without a byte.
redirect:URL         307 to this URL.
refuse               The connection is closed without a byte.
no-http              Something that is not HTTP, then FIN.
header-cut           FIN within the header block.
headers-stall        Half of the header block, then silence until the client leaves.
headers-drip:SECONDS The header block byte by byte, SECONDS apart; then the good answer.
endless-line         One line of data that never ends, as fast as it is read.
endless-event        One event without end: lines, never a blank one (empty NDJSON
                     objects).
endless-answer       Good deltas of text that never end, as fast as they are read.
empty-events         A flood of blank lines and of events without data.
bomb                 An endless line, a thousand times larger than what is sent, by
                     gzip.
==================== ===================================================================
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.client import responses as REASONS
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = [
    "STORY",
    "ConnectProxy",
    "Connection",
    "FlakyServer",
    "Request",
    "fault_table",
    "self_signed",
    "transcript",
]

STORY = (
    "Once upon a time a stream ran down to the sea. “Will I arrive?” it asked the "
    "stones. “In pieces,” said the stones, “but every drop of you.” So it went on: "
    "past the naïve frog 🐸, under the café bridge, through dry summers and broken "
    "pipes.\n\nAnd whenever it was cut, it remembered where it had been, and went on "
    "from there, and never said anything twice. 海に着いた。 The end."
)
CREATED = 1700000000  # the time in every answer, so that answers can be compared
TICK = 0.02  # seconds between the bytes, comments and deltas that never end
BYTES, EVENTS = 400, 3
TIMED_OUT = socket.timeout  # an alias of TimeoutError since Python 3.10
LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
ENDLESS = 1 << 40  # the length announced for a body that does not end

if TYPE_CHECKING:
    JSON = dict[str, Any]
    Steps = Iterable["Step"]
    Argument = Any  # what the converter of a fault made of the text after the colon
    FaultFunction = Callable[["Answer", Argument], None]
    Scripted = Callable[["Connection", "Request"], None]


# -----------------------------------------------------------------------------
# Records
# -----------------------------------------------------------------------------


class Request:
    """One request as it was received; ``query`` and ``headers`` are dicts, with the
    last value of a repeated name.
    """

    def __init__(
        self,
        method: str,
        target: str,
        version: str,
        headers: dict[str, str],
        body: bytes = b"",
    ) -> None:
        self.method, self.target, self.version, self.headers, self.body = (
            method,
            target,
            version,
            headers,
            body,
        )
        parts = urlsplit(target)
        self.path = unquote(parts.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.number = 0
        self.time = time.monotonic()

    @property
    def json(self) -> Any:
        """The body as JSON, or None if it is none."""
        try:
            return json.loads(self.body.decode("utf-8"))
        except ValueError:
            return None

    @property
    def fields(self) -> JSON:
        """The JSON object of the body, empty if there is none."""
        found = self.json
        return found if isinstance(found, dict) else {}

    @property
    def persistent(self) -> bool:
        return (
            self.version == "HTTP/1.1"
            and self.headers.get("connection", "").lower() != "close"
        )

    def __repr__(self) -> str:
        return f"<Request {self.number} {self.method} {self.target}>"


@dataclass(frozen=True)
class Options:
    """What the server says, and how; see :class:`FlakyServer`."""

    text: str = STORY
    pieces: int | Sequence[str] = 4
    delay: float = 0.0
    framing: str = "chunked"
    coalesce: int = 1
    reasoning: str = ""
    tool_calls: Sequence[tuple[str, str]] = ()
    extra: JSON | Callable[[int], JSON] | None = None
    eol: str | None = None
    continuation: str = "exact"
    reconnection_ms: int | None = None

    def __post_init__(self) -> None:
        one_of("framing", self.framing, FRAMINGS)
        one_of(
            "continuation", self.continuation, ("exact", "repeat", "ignore", "refuse")
        )
        one_of("eol", self.eol, (None, "\n", "\r\n", "\r"))
        if not isinstance(self.pieces, int):
            object.__setattr__(self, "text", "".join(self.pieces))


def one_of(name: str, value: object, known: Iterable[object]) -> None:
    """Raise :exc:`ValueError` unless *value* is a *known* one."""
    if value not in known:
        raise ValueError(
            "unknown {} {!r}, known are: {}".format(
                name, value, ", ".join(map(repr, known))
            )
        )


class Step:
    """One thing that happens in an answer."""

    def play(self, sender: Sender) -> None:
        """Let it happen."""
        raise NotImplementedError


@dataclass
class Event(Step):
    """Some bytes of the body.

    The kind says what they mean: start, delta, finish, usage, end, last (finish and end
    in one), or other.
    """

    data: bytes
    kind: str = "other"

    def play(self, sender: Sender) -> None:
        sender.write(self.data)


@dataclass
class Raw(Step):
    """Bytes that bypass the framing of the body."""

    data: bytes

    def play(self, sender: Sender) -> None:
        sender.connection.send(self.data)


@dataclass
class Pause(Step):
    """Silence; ends early, and the connection with it, if the client leaves."""

    seconds: float

    def play(self, sender: Sender) -> None:
        sender.connection.wait(self.seconds)


@dataclass
class Stop(Step):
    """The end of the connection: drop (FIN), reset (RST), or stall (silence until the
    client leaves).
    """

    how: str

    def play(self, sender: Sender) -> None:
        getattr(sender.connection, self.how)()


class Closed(Exception):
    """The connection has ended, by whichever side; unwinds its thread."""


# -----------------------------------------------------------------------------
# Text and encoding
# -----------------------------------------------------------------------------


def dumps(value: object) -> str:
    """Return compact JSON, in plain UTF-8 where the text can be encoded so."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode("utf-8")
    except (
        UnicodeEncodeError
    ):  # half of a surrogate pair, which only an escape can carry
        return json.dumps(value, separators=(",", ":"))
    return text


def slices(text: str, size: int) -> list[str]:
    """Cut *text* in strings of *size* characters."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def skip(pieces: Iterable[str], count: int) -> Iterator[str]:
    """Leave out the first *count* characters of the *pieces*."""
    for piece in pieces:
        if len(piece) > count:
            yield piece[count:]
        count = max(0, count - len(piece))


def overlap(prompt: str, text: str) -> str:
    """Return the longest prefix of *text* that *prompt* ends with."""
    sizes = range(min(len(prompt), len(text)), 0, -1)
    return next((text[:size] for size in sizes if prompt.endswith(text[:size])), "")


def plain(content: object) -> str:
    """Return the text of a message's content: a string, or a list of parts of which
    some have a text.
    """
    if isinstance(content, list):
        return "".join(
            str(part.get("text") or "") for part in content if isinstance(part, dict)
        )
    return content if isinstance(content, str) else ""


def last_turn(messages: object, role: str = "assistant", key: str = "content") -> str:
    """Return the text of the last message if it is the model's own: the prefix to
    continue.
    """
    last = messages[-1] if isinstance(messages, list) and messages else None
    return (
        plain(last.get(key))
        if isinstance(last, dict) and last.get("role") == role
        else ""
    )


# -----------------------------------------------------------------------------
# Protocols
# -----------------------------------------------------------------------------


class Trouble(NamedTuple):
    """An error as the protocols need it: an HTTP status, and the names that OpenAI,
    Anthropic and Google give it.
    """

    status: int
    openai: str
    anthropic: str
    google: str
    message: str


OVERLOADED = Trouble(
    503,
    "server_error",
    "overloaded_error",
    "UNAVAILABLE",
    "The server is overloaded, try again.",
)
INVALID = Trouble(
    400,
    "invalid_request_error",
    "invalid_request_error",
    "INVALID_ARGUMENT",
    "The request is invalid.",
)
QUOTA = Trouble(
    429,
    "insufficient_quota",
    "rate_limit_error",
    "RESOURCE_EXHAUSTED",
    "You exceeded your quota.",
)
TROUBLES = {
    401: Trouble(
        401,
        "authentication_error",
        "authentication_error",
        "UNAUTHENTICATED",
        "The key is wrong.",
    ),
    403: Trouble(
        403,
        "permission_error",
        "permission_error",
        "PERMISSION_DENIED",
        "Not with this key.",
    ),
    404: Trouble(
        404,
        "not_found_error",
        "not_found_error",
        "NOT_FOUND",
        "There is no such thing.",
    ),
    429: Trouble(
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
        "RESOURCE_EXHAUSTED",
        "Too many requests.",
    ),
    529: OVERLOADED._replace(status=529),
}


def trouble_of(status: int) -> Trouble:
    """Return the error that goes with an HTTP status."""
    common = INVALID if status < 500 and status != 408 else OVERLOADED
    return TROUBLES.get(status) or common._replace(status=status)


class Refused(Exception):
    """The request gets a JSON body with a status instead of a stream."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(status)
        self.status, self.body = status, body


@dataclass(frozen=True)
class Call:
    """One request, and what is said to it: *text* is what remains to be said, *whole*
    all of it.
    """

    request: Request
    options: Options
    protocol: Protocol
    whole: str
    text: str
    memory: dict[str, Call] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    @property
    def model(self) -> str:
        return str(self.request.fields.get("model") or "flaky-1")

    @property
    def pieces(self) -> list[str]:
        """The text in the pieces of its deltas."""
        size = self.options.pieces
        if isinstance(size, int):
            return slices(self.text, size)
        if self.whole.endswith(self.text) and self.whole == self.options.text:
            return list(skip(size, len(self.whole) - len(self.text)))
        return slices(self.text, 4)

    @property
    def thoughts(self) -> list[str]:
        """The reasoning in the pieces of its deltas."""
        size = self.options.pieces
        return slices(self.options.reasoning, size if isinstance(size, int) else 4)

    @property
    def tools(self) -> list[tuple[int, str, str, list[str]]]:
        """The tool calls: number, ID, name, and the arguments in pieces."""
        return [
            (number, f"call_{number}", name, slices(arguments, 8))
            for number, (name, arguments) in enumerate(self.options.tool_calls)
        ]

    @property
    def output_tokens(self) -> int:
        return len(self.pieces) + len(self.thoughts)

    def id(self, prefix: str) -> str:
        return f"{prefix}{self.request.number}"

    def sse(self, data: object, event: str = "", id: str = "") -> bytes:
        """Encode one server-sent event; *data* is text, or an object for JSON."""
        eol = self.options.eol or self.protocol.eol
        text = data if isinstance(data, str) else dumps(data)
        lines = ["event: " + event] if event else []
        lines += ["id: " + id] if id else []
        lines += ["data: " + line for line in text.split("\n")]
        return (eol.join(lines) + eol + eol).encode("utf-8")

    def restart(self, text: str) -> Call:
        """Return the call that tells quite another *text*."""
        return replace(self, whole=text, text=text, counter=itertools.count())


class Protocol:
    """One provider's streaming format: the good answer as events, and how it says that
    something went wrong.
    """

    name = ""
    path = ""  # a regular expression, matched at the end of the path
    methods: Sequence[str] = ("POST",)
    media = "text/event-stream"
    eol = "\n"

    def prefix(self, body: JSON, text: str) -> str:
        """Return the part of the answer that the request already has and asks to
        continue.
        """
        return ""

    def refuses(self, call: Call, prefix: str) -> str:
        """Return why the provider would answer 400, if it would."""
        return (
            "This model does not continue messages."
            if prefix and call.options.continuation == "refuse"
            else ""
        )

    def content_type(self, request: Request) -> str:
        return self.media

    def wants_stream(self, request: Request) -> bool:
        return request.fields.get("stream") is True

    def events(self, call: Call) -> Iterator[Event]:
        """Yield the events of the good answer."""
        raise NotImplementedError

    def whole(self, call: Call) -> JSON:
        """Return the good answer as one object, for who asks for no stream."""
        raise NotImplementedError

    def delta(self, call: Call, text: str) -> Event:
        """Return one delta of text."""
        raise NotImplementedError

    def error(self, trouble: Trouble) -> JSON:
        """Return the body of an HTTP error."""
        return {
            "error": {
                "message": trouble.message,
                "type": trouble.openai,
                "param": None,
                "code": trouble.openai,
            }
        }

    def error_event(self, call: Call, trouble: Trouble, name: str = "") -> Event:
        """Return the error as an event in the stream."""
        return Event(call.sse(self.error(trouble), name))


class OpenAIChat(Protocol):
    """Chat Completions; the further choices of ``n`` get each piece backwards, so that
    none is taken for another.
    """

    name = "openai"
    path = "/chat/completions"
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"

    def prefix(self, body: JSON, text: str) -> str:
        return last_turn(body.get("messages"))

    def events(self, call: Call) -> Iterator[Event]:
        indices = range(int(call.request.fields.get("n") or 1))
        for index in indices:
            yield self.choice(
                call, {"role": "assistant", "content": ""}, index, kind="start"
            )
        for thought in call.thoughts:
            yield self.choice(call, {"reasoning_content": thought})
        for piece in call.pieces:
            for index in indices:
                yield self.choice(
                    call, {"content": piece[::-1] if index else piece}, index
                )
        yield from self.tools(call)
        for index in indices:
            yield self.choice(
                call, {}, index, "tool_calls" if call.tools else "stop", "finish"
            )
        if self.counts(call):
            yield self.chunk(call, [], "usage", usage=self.usage(call))
        yield Event(call.sse("[DONE]"), "end")

    def tools(self, call: Call) -> Iterator[Event]:
        for number, id, name, pieces in call.tools:
            start = {
                "index": number,
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
            yield self.choice(call, {"tool_calls": [start]})
            for piece in pieces:
                yield self.choice(
                    call,
                    {
                        "tool_calls": [
                            {"index": number, "function": {"arguments": piece}}
                        ]
                    },
                )

    def choice(
        self,
        call: Call,
        delta: JSON,
        index: int = 0,
        finish: str | None = None,
        kind: str = "delta",
    ) -> Event:
        return self.chunk(
            call, [{"index": index, "delta": delta, "finish_reason": finish}], kind
        )

    def chunk(
        self, call: Call, choices: list[JSON], kind: str, **fields: object
    ) -> Event:
        chunk: JSON = {
            "id": call.id(self.id_prefix),
            "object": self.chunk_object,
            "created": CREATED,
            "model": call.model,
            "choices": choices,
        }
        if self.counts(call):
            chunk["usage"] = None
        chunk.update(fields)
        chunk.update(self.extra(call))
        return Event(call.sse(chunk), kind)

    def extra(self, call: Call) -> JSON:
        extra, number = call.options.extra, next(call.counter)
        return extra(number) if callable(extra) else extra or {}

    def counts(self, call: Call) -> bool:
        return bool(
            (call.request.fields.get("stream_options") or {}).get("include_usage")
        )

    def usage(self, call: Call) -> JSON:
        return {
            "prompt_tokens": 7,
            "completion_tokens": call.output_tokens,
            "total_tokens": 7 + call.output_tokens,
        }

    def delta(self, call: Call, text: str) -> Event:
        return self.choice(call, {"content": text})

    def whole(self, call: Call) -> JSON:
        message: JSON = {"role": "assistant", "content": call.text}
        if call.options.reasoning:
            message["reasoning_content"] = call.options.reasoning
        if call.tools:
            message["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": "".join(p)},
                }
                for _, id, name, p in call.tools
            ]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if call.tools else "stop",
        }
        return {
            "id": call.id(self.id_prefix),
            "object": "chat.completion",
            "created": CREATED,
            "model": call.model,
            "choices": [choice],
            "usage": self.usage(call),
        }


class OpenAICompletions(OpenAIChat):
    """Legacy Completions: the prompt is continued where it ends with the beginning of
    the text.
    """

    name = "openai-completions"
    path = "/completions"
    id_prefix = "cmpl-"
    chunk_object = "text_completion"

    def prefix(self, body: JSON, text: str) -> str:
        return overlap(str(body.get("prompt") or ""), text)

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.pieces:
            yield self.delta(call, piece)
        yield self.chunk(
            call, [{"index": 0, "text": "", "finish_reason": "stop"}], "finish"
        )
        if self.counts(call):
            yield self.chunk(call, [], "usage", usage=self.usage(call))
        yield Event(call.sse("[DONE]"), "end")

    def delta(self, call: Call, text: str) -> Event:
        return self.chunk(
            call, [{"index": 0, "text": text, "finish_reason": None}], "delta"
        )

    def whole(self, call: Call) -> JSON:
        return {
            "id": call.id(self.id_prefix),
            "object": "text_completion",
            "created": CREATED,
            "model": call.model,
            "choices": [{"index": 0, "text": call.text, "finish_reason": "stop"}],
            "usage": self.usage(call),
        }


class OpenAIResponses(Protocol):
    """Responses; one that was created in the background can be read again from any
    sequence number.
    """

    name = "openai-responses"
    path = r"/responses|/responses/[^/]+(?:/cancel)?"
    methods = ("POST", "GET")

    def wants_stream(self, request: Request) -> bool:
        return "true" in (
            request.query.get("stream"),
            dumps(request.fields.get("stream")),
        )

    def events(self, call: Call) -> Iterator[Event]:
        if not call.request.path.endswith("/responses"):
            return self.again(
                self.found(call), int(call.request.query.get("starting_after") or -1)
            )
        if call.request.fields.get("background"):
            call.memory[call.id("resp_")] = call
        return (
            self.event(call, number, data, kind)
            for number, (kind, data) in enumerate(self.story(call))
        )

    def found(self, call: Call) -> Call:
        """Return the call that created the response that this one is about."""
        id = re.sub("/cancel$", "", call.request.path).rpartition("/")[2]
        if id not in call.memory:
            message = f"Response with id {id!r} not found."
            raise Refused(404, self.error(TROUBLES[404]._replace(message=message)))
        return call.memory[id]

    def again(self, call: Call, after: int) -> Iterator[Event]:
        for number, (kind, data) in enumerate(self.story(call)):
            if number > after:
                yield self.event(call, number, data, kind)

    def event(self, call: Call, number: int, data: JSON, kind: str) -> Event:
        return Event(call.sse(dict(data, sequence_number=number), data["type"]), kind)

    def story(self, call: Call) -> Iterator[tuple[str, JSON]]:
        """Yield the events without their numbers: kind and data."""
        yield (
            "start",
            {
                "type": "response.created",
                "response": self.response(call, "in_progress"),
            },
        )
        yield (
            "other",
            {
                "type": "response.in_progress",
                "response": self.response(call, "in_progress"),
            },
        )
        output = self.output(call)
        for index, item in enumerate(output):
            yield (
                "other",
                {
                    "type": "response.output_item.added",
                    "output_index": index,
                    "item": self.bare(item),
                },
            )
            for kind, data in getattr(self, "tell_" + item["type"])(call, item):
                yield kind, dict(data, item_id=item["id"], output_index=index)
            yield (
                "other",
                {
                    "type": "response.output_item.done",
                    "output_index": index,
                    "item": item,
                },
            )
        yield (
            "last",
            {
                "type": "response.completed",
                "response": self.response(call, "completed", output),
            },
        )

    def bare(self, item: JSON) -> JSON:
        """Return an item of the output as it is before its contents have come."""
        return dict(
            item,
            status="in_progress",
            **{
                key: type(item[key])()
                for key in ("content", "summary", "arguments")
                if key in item
            },
        )

    def tell_reasoning(self, call: Call, item: JSON) -> Iterator[tuple[str, JSON]]:
        for piece in call.thoughts:
            yield (
                "delta",
                {
                    "type": "response.reasoning_summary_text.delta",
                    "summary_index": 0,
                    "delta": piece,
                },
            )
        text = call.options.reasoning
        yield (
            "other",
            {
                "type": "response.reasoning_summary_text.done",
                "summary_index": 0,
                "text": text,
            },
        )

    def tell_message(self, call: Call, item: JSON) -> Iterator[tuple[str, JSON]]:
        part: JSON = {"type": "output_text", "text": "", "annotations": []}
        yield (
            "other",
            {"type": "response.content_part.added", "content_index": 0, "part": part},
        )
        for piece in call.pieces:
            yield (
                "delta",
                {
                    "type": "response.output_text.delta",
                    "content_index": 0,
                    "delta": piece,
                },
            )
        yield (
            "other",
            {
                "type": "response.output_text.done",
                "content_index": 0,
                "text": call.text,
            },
        )
        done = dict(part, text=call.text)
        yield (
            "other",
            {"type": "response.content_part.done", "content_index": 0, "part": done},
        )

    def tell_function_call(self, call: Call, item: JSON) -> Iterator[tuple[str, JSON]]:
        for piece in slices(item["arguments"], 8):
            yield (
                "delta",
                {"type": "response.function_call_arguments.delta", "delta": piece},
            )
        yield (
            "other",
            {
                "type": "response.function_call_arguments.done",
                "arguments": item["arguments"],
            },
        )

    def output(self, call: Call) -> list[JSON]:
        items: list[JSON] = []
        if call.options.reasoning:
            summary = [{"type": "summary_text", "text": call.options.reasoning}]
            items.append(
                {"type": "reasoning", "id": call.id("rs_"), "summary": summary}
            )
        content = [{"type": "output_text", "text": call.text, "annotations": []}]
        items.append(
            {
                "type": "message",
                "id": call.id("msg_"),
                "status": "completed",
                "role": "assistant",
                "content": content,
            }
        )
        items += [
            {
                "type": "function_call",
                "id": f"fc_{number}",
                "status": "completed",
                "call_id": id,
                "name": name,
                "arguments": "".join(pieces),
            }
            for number, id, name, pieces in call.tools
        ]
        return items

    def response(self, call: Call, status: str, output: Sequence[JSON] = ()) -> JSON:
        tokens = call.output_tokens
        usage = (
            {"input_tokens": 7, "output_tokens": tokens, "total_tokens": 7 + tokens}
            if output
            else None
        )
        return {
            "id": call.id("resp_"),
            "object": "response",
            "created_at": CREATED,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": call.model,
            "output": list(output),
            "usage": usage,
        }

    def delta(self, call: Call, text: str) -> Event:
        data: JSON = {
            "type": "response.output_text.delta",
            "item_id": call.id("msg_"),
            "output_index": 0,
            "content_index": 0,
            "delta": text,
        }
        return Event(call.sse(data, data["type"]), "delta")

    def whole(self, call: Call) -> JSON:
        path = call.request.path
        creator = call if path.endswith("/responses") else self.found(call)
        if path.endswith("/cancel"):
            return self.response(creator, "cancelled")
        if creator is call and call.request.fields.get("background"):
            call.memory[call.id("resp_")] = call
        return self.response(creator, "completed", self.output(creator))

    def error_event(self, call: Call, trouble: Trouble, name: str = "") -> Event:
        error = {
            "type": "error",
            "code": trouble.openai,
            "message": trouble.message,
            "param": None,
        }
        return Event(call.sse(error, "error"))


class Anthropic(Protocol):
    """Messages; a trailing assistant message is prefill, and is refused if it ends in
    white space.
    """

    name = "anthropic"
    path = "/messages"

    def prefix(self, body: JSON, text: str) -> str:
        return last_turn(body.get("messages"))

    def refuses(self, call: Call, prefix: str) -> str:
        if prefix and call.options.continuation == "refuse":
            return "Prefilling assistant messages is not supported for this model."
        if prefix != prefix.rstrip():
            return (
                "messages: final assistant content cannot end with trailing whitespace"
            )
        return ""

    def events(self, call: Call) -> Iterator[Event]:
        message = dict(
            self.message(call),
            content=[],
            stop_reason=None,
            usage={"input_tokens": 7, "output_tokens": 1},
        )
        yield self.event(call, {"type": "message_start", "message": message}, "start")
        for index, (start, deltas) in enumerate(self.blocks(call)):
            yield self.event(
                call,
                {"type": "content_block_start", "index": index, "content_block": start},
            )
            if not index:
                yield self.event(call, {"type": "ping"})
            for delta in deltas:
                yield self.event(
                    call,
                    {"type": "content_block_delta", "index": index, "delta": delta},
                    "delta",
                )
            yield self.event(call, {"type": "content_block_stop", "index": index})
        delta = {"stop_reason": self.stop_reason(call), "stop_sequence": None}
        usage = {"output_tokens": call.output_tokens}
        yield self.event(
            call, {"type": "message_delta", "delta": delta, "usage": usage}, "finish"
        )
        yield self.event(call, {"type": "message_stop"}, "end")

    def event(self, call: Call, data: JSON, kind: str = "other") -> Event:
        return Event(call.sse(data, data["type"]), kind)

    def blocks(self, call: Call) -> Iterator[tuple[JSON, Iterator[JSON]]]:
        """Yield the content blocks: how each starts, and its deltas."""
        if call.thoughts:
            deltas: list[JSON] = [
                {"type": "thinking_delta", "thinking": piece} for piece in call.thoughts
            ]
            signature = {"type": "signature_delta", "signature": "c2lnbmVk"}
            yield (
                {"type": "thinking", "thinking": "", "signature": ""},
                iter([*deltas, signature]),
            )
        if call.pieces:
            yield (
                {"type": "text", "text": ""},
                ({"type": "text_delta", "text": piece} for piece in call.pieces),
            )
        for _, id, name, pieces in call.tools:
            start = {"type": "tool_use", "id": id, "name": name, "input": {}}
            yield (
                start,
                (
                    {"type": "input_json_delta", "partial_json": piece}
                    for piece in ["", *pieces]
                ),
            )

    def stop_reason(self, call: Call) -> str:
        return "tool_use" if call.tools else "end_turn"

    def message(self, call: Call) -> JSON:
        return {
            "id": call.id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": call.model,
            "content": [],
            "stop_reason": self.stop_reason(call),
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": call.output_tokens},
        }

    def whole(self, call: Call) -> JSON:
        content: list[JSON] = [{"type": "text", "text": call.text}]
        if call.options.reasoning:
            content.insert(
                0,
                {
                    "type": "thinking",
                    "thinking": call.options.reasoning,
                    "signature": "c2lnbmVk",
                },
            )
        content += [
            {
                "type": "tool_use",
                "id": id,
                "name": name,
                "input": json.loads("".join(pieces) or "{}"),
            }
            for _, id, name, pieces in call.tools
        ]
        return dict(self.message(call), content=content)

    def delta(self, call: Call, text: str) -> Event:
        delta = {"type": "text_delta", "text": text}
        index = 1 if call.options.reasoning else 0
        return self.event(
            call,
            {"type": "content_block_delta", "index": index, "delta": delta},
            "delta",
        )

    def error(self, trouble: Trouble) -> JSON:
        error = {"type": trouble.anthropic, "message": trouble.message, "details": None}
        return {"type": "error", "error": error, "request_id": "req_1"}

    def error_event(self, call: Call, trouble: Trouble, name: str = "") -> Event:
        return Event(call.sse(self.error(trouble), "error"))


class Ollama(Protocol):
    """Ollama's chat: NDJSON, streamed unless told otherwise; a trailing assistant
    message is continued.
    """

    name = "ollama"
    path = "/api/chat"
    media = "application/x-ndjson"

    def prefix(self, body: JSON, text: str) -> str:
        return last_turn(body.get("messages"))

    def wants_stream(self, request: Request) -> bool:
        return request.fields.get("stream") is not False

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.thoughts:
            yield self.line(call, self.says("", piece), "delta")
        for piece in call.pieces:
            yield self.delta(call, piece)
        if call.tools:
            yield self.line(call, self.calls(call), "delta")
        yield self.line(call, dict(self.says(""), **self.end(call)), "last")

    def says(self, text: str, thought: str = "") -> JSON:
        thinking = {"thinking": thought} if thought else {}
        return {"message": dict({"role": "assistant", "content": text}, **thinking)}

    def calls(self, call: Call) -> JSON:
        calls = [
            {
                "function": {
                    "name": name,
                    "arguments": json.loads("".join(pieces) or "{}"),
                }
            }
            for _, _, name, pieces in call.tools
        ]
        return {"message": {"role": "assistant", "content": "", "tool_calls": calls}}

    def end(self, call: Call) -> JSON:
        return {
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": 7,
            "eval_count": call.output_tokens,
        }

    def line(self, call: Call, data: JSON, kind: str) -> Event:
        first = {"model": call.model, "created_at": "2023-11-14T22:13:20Z"}
        eol = call.options.eol or self.eol
        return Event(
            (dumps({**first, "done": False, **data}) + eol).encode("utf-8"), kind
        )

    def delta(self, call: Call, text: str) -> Event:
        return self.line(call, self.says(text), "delta")

    def whole(self, call: Call) -> JSON:
        parts: JSON = {"model": call.model, "created_at": "2023-11-14T22:13:20Z"}
        parts.update(self.says(call.text, call.options.reasoning))
        if call.tools and "message" in parts:
            parts["message"]["tool_calls"] = self.calls(call)["message"]["tool_calls"]
        return dict(parts, **self.end(call))

    def error(self, trouble: Trouble) -> JSON:
        return {"error": trouble.message}

    def error_event(self, call: Call, trouble: Trouble, name: str = "") -> Event:
        return Event(
            (dumps(self.error(trouble)) + (call.options.eol or self.eol)).encode(
                "utf-8"
            )
        )


class OllamaGenerate(Ollama):
    """Ollama's generate: a prompt that ends with the beginning of the text is
    continued.
    """

    name = "ollama-generate"
    path = "/api/generate"

    def prefix(self, body: JSON, text: str) -> str:
        return overlap(str(body.get("prompt") or ""), text)

    def says(self, text: str, thought: str = "") -> JSON:
        return (
            {"response": text, "thinking": thought} if thought else {"response": text}
        )

    def calls(self, call: Call) -> JSON:
        return {"response": ""}


class Gemini(Protocol):
    """Gemini: events with CRLF for ``alt=sse``, else one JSON array; the finish reason
    is the only end marker.
    """

    name = "gemini"
    path = "/models/[^/]+:(?:stream)?[gG]enerateContent"
    eol = "\r\n"

    def prefix(self, body: JSON, text: str) -> str:
        return last_turn(body.get("contents"), "model", "parts")

    def wants_stream(self, request: Request) -> bool:
        return request.path.endswith(":streamGenerateContent")

    def events(self, call: Call) -> Iterator[Event]:
        array = self.is_array(call.request)
        if array:
            yield Event(b"[", "start")
        for thought in call.thoughts:
            yield self.chunk(call, [{"text": thought, "thought": True}])
        for piece in call.pieces:
            yield self.delta(call, piece)
        if call.tools:
            yield self.chunk(call, self.calls(call))
        yield self.chunk(call, [{"text": ""}], "STOP", "finish")
        if array:
            yield Event(b"]", "end")

    def is_array(self, request: Request) -> bool:
        return request.query.get("alt") != "sse"

    def content_type(self, request: Request) -> str:
        return "application/json" if self.is_array(request) else self.media

    def calls(self, call: Call) -> list[JSON]:
        return [
            {
                "functionCall": {
                    "name": name,
                    "args": json.loads("".join(pieces) or "{}"),
                }
            }
            for _, _, name, pieces in call.tools
        ]

    def chunk(
        self, call: Call, parts: list[JSON], finish: str = "", kind: str = "delta"
    ) -> Event:
        data = self.answer(call, parts, finish)
        if not self.is_array(call.request):
            return Event(call.sse(data), kind)
        text = json.dumps(data, indent=2) + ("\n" if finish else "\n,\r\n")
        return Event(text.encode("utf-8"), kind)

    def answer(self, call: Call, parts: list[JSON], finish: str) -> JSON:
        candidate: JSON = {"content": {"parts": parts, "role": "model"}, "index": 0}
        if finish:
            candidate["finishReason"] = finish
        usage = {
            "promptTokenCount": 7,
            "candidatesTokenCount": len(call.pieces),
            "totalTokenCount": 7 + call.output_tokens,
        }
        return {
            "candidates": [candidate],
            "usageMetadata": usage,
            "modelVersion": "flaky-1",
            "responseId": call.id("answer-"),
        }

    def delta(self, call: Call, text: str) -> Event:
        return self.chunk(call, [{"text": text}])

    def whole(self, call: Call) -> JSON:
        thoughts = (
            [{"text": call.options.reasoning, "thought": True}]
            if call.options.reasoning
            else []
        )
        return self.answer(
            call, [*thoughts, {"text": call.text}, *self.calls(call)], "STOP"
        )

    def error(self, trouble: Trouble) -> JSON:
        return {
            "error": {
                "code": trouble.status,
                "message": trouble.message,
                "status": trouble.google,
            }
        }


class Cohere(Protocol):
    """Cohere's chat, version 2; a trailing assistant message is continued, which the
    real one does not promise.
    """

    name = "cohere"
    path = "/v2/chat"

    def prefix(self, body: JSON, text: str) -> str:
        return last_turn(body.get("messages"))

    def events(self, call: Call) -> Iterator[Event]:
        start = {
            "message": {
                "role": "assistant",
                "content": [],
                "tool_calls": [],
                "citations": [],
            }
        }
        yield self.event(
            call, "message-start", {"id": call.id("answer-"), "delta": start}, "start"
        )
        yield from self.content(call, 0, "thinking", call.thoughts)
        yield from self.content(call, 1 if call.thoughts else 0, "text", call.pieces)
        for number, id, name, pieces in call.tools:
            yield from self.tool(call, number, id, name, pieces)
        reason = "TOOL_CALL" if call.tools else "COMPLETE"
        yield self.event(
            call,
            "message-end",
            {"delta": {"finish_reason": reason, "usage": self.usage(call)}},
            "finish",
        )
        yield Event(call.sse("[DONE]"), "end")

    def content(
        self, call: Call, index: int, key: str, pieces: Sequence[str]
    ) -> Iterator[Event]:
        """Yield one block of content: thinking or text."""
        if pieces:
            start = {"message": {"content": {"type": key, key: ""}}}
            yield self.event(call, "content-start", {"index": index, "delta": start})
            for piece in pieces:
                delta = {"message": {"content": {key: piece}}}
                yield self.event(
                    call, "content-delta", {"index": index, "delta": delta}, "delta"
                )
            yield self.event(call, "content-end", {"index": index})

    def tool(
        self, call: Call, index: int, id: str, name: str, pieces: Sequence[str]
    ) -> Iterator[Event]:
        start = {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        yield self.event(
            call,
            "tool-call-start",
            {"index": index, "delta": {"message": {"tool_calls": start}}},
        )
        for piece in pieces:
            delta = {"message": {"tool_calls": {"function": {"arguments": piece}}}}
            yield self.event(
                call, "tool-call-delta", {"index": index, "delta": delta}, "delta"
            )
        yield self.event(call, "tool-call-end", {"index": index})

    def event(self, call: Call, type: str, data: JSON, kind: str = "other") -> Event:
        return Event(call.sse({"type": type, **data}, type), kind)

    def usage(self, call: Call) -> JSON:
        return {
            "billed_units": {"input_tokens": 3, "output_tokens": call.output_tokens},
            "tokens": {"input_tokens": 7, "output_tokens": call.output_tokens},
        }

    def delta(self, call: Call, text: str) -> Event:
        data = {"index": 0, "delta": {"message": {"content": {"text": text}}}}
        return self.event(call, "content-delta", data, "delta")

    def whole(self, call: Call) -> JSON:
        message: JSON = {
            "role": "assistant",
            "content": [{"type": "text", "text": call.text}],
        }
        if call.tools:
            message["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": "".join(p)},
                }
                for _, id, name, p in call.tools
            ]
        return {
            "id": call.id("answer-"),
            "finish_reason": "TOOL_CALL" if call.tools else "COMPLETE",
            "message": message,
            "usage": self.usage(call),
        }

    def error(self, trouble: Trouble) -> JSON:
        return {"id": "error-1", "message": trouble.message}

    def error_event(self, call: Call, trouble: Trouble, name: str = "") -> Event:
        delta = {
            "finish_reason": "ERROR",
            "error": trouble.message,
            "error_type": trouble.openai,
            "usage": {},
        }
        error = self.event(call, "message-end", {"delta": delta})
        return Event(error.data + call.sse("[DONE]"))


class TextGeneration(Protocol):
    """TGI: the input is continued where it ends with the beginning of the text; no
    space after ``data:``.
    """

    name = "tgi"
    path = "/generate_stream|/generate"

    def prefix(self, body: JSON, text: str) -> str:
        return overlap(str(body.get("inputs") or ""), text)

    def wants_stream(self, request: Request) -> bool:
        return request.path.endswith("_stream")

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.pieces:
            yield self.delta(call, piece)
        yield self.token(
            call,
            "</s>",
            "last",
            special=True,
            generated_text=call.text,
            details=self.details(call),
        )

    def token(
        self, call: Call, text: str, kind: str, special: bool = False, **more: object
    ) -> Event:
        number = next(call.counter)
        token = {"id": number, "text": text, "logprob": -0.5, "special": special}
        data = {
            "index": number + 1,
            "token": token,
            "generated_text": None,
            "details": None,
            **more,
        }
        return Event(call.sse(data).replace(b"data: ", b"data:", 1), kind)

    def details(self, call: Call) -> JSON | None:
        if not (call.request.fields.get("parameters") or {}).get("details"):
            return None
        return {
            "finish_reason": "eos_token",
            "generated_tokens": call.output_tokens,
            "input_length": 7,
            "seed": None,
        }

    def delta(self, call: Call, text: str) -> Event:
        return self.token(call, text, "delta")

    def whole(self, call: Call) -> JSON:
        return {"generated_text": call.text, "details": self.details(call)}

    def error(self, trouble: Trouble) -> JSON:
        kind = "overloaded" if trouble.status >= 429 else "validation"
        return {"error": trouble.message, "error_type": kind}


class PlainEvents(Protocol):
    """Server-sent events whose data are the pieces of the text.

    They are numbered from 1, and resumed after ``Last-Event-ID``. A client that comes
    again after the last one gets 204, which means: come no more.
    """

    name = "events"
    path = "/events"
    methods = ("GET", "POST")

    def wants_stream(self, request: Request) -> bool:
        return True

    def events(self, call: Call) -> Iterator[Event]:
        last = call.request.headers.get("last-event-id", "")
        seen = int(last) if last.isdigit() else 0
        if seen and seen >= len(call.pieces):
            raise Refused(204, None)
        return self.after(call, seen)

    def after(self, call: Call, seen: int) -> Iterator[Event]:
        eol = call.options.eol or self.eol
        if call.options.reconnection_ms is not None:
            yield Event(
                f"retry: {call.options.reconnection_ms}{eol}{eol}".encode(), "start"
            )
        for number, piece in enumerate(call.pieces[seen:], seen + 1):
            yield Event(call.sse(piece, id=str(number)), "delta")

    def whole(self, call: Call) -> JSON:
        return {"text": call.text}

    def delta(self, call: Call, text: str) -> Event:
        return Event(call.sse(text), "delta")


class Nothing(Protocol):
    """What is found at any other path."""

    def wants_stream(self, request: Request) -> bool:
        raise Refused(404, self.error(TROUBLES[404]))


PROTOCOLS: Sequence[Protocol] = (
    OpenAIChat(),
    OpenAICompletions(),
    OpenAIResponses(),
    Anthropic(),
    Ollama(),
    OllamaGenerate(),
    Gemini(),
    Cohere(),
    TextGeneration(),
    PlainEvents(),
)


# -----------------------------------------------------------------------------
# Faults
# -----------------------------------------------------------------------------


class Answer:
    """What goes over the wire in reply to one call: a head, and the steps that make the
    body. Faults rewrite it.
    """

    def __init__(self, call: Call) -> None:
        media = call.protocol.content_type(call.request)
        self.call, self.status = call, 200
        self.steps: Steps = []
        self.headers = {"Content-Type": media, "Cache-Control": "no-cache"}
        self.is_sse = "event-stream" in media
        self.framing = call.options.framing
        self.endless = False
        self.head: Callable[[bytes], Steps] = lambda head: [Raw(head)]

    def plain(self, status: int, body: bytes, media: str) -> None:
        """Become an ordinary answer with a length."""
        self.status, self.steps, self.framing = (
            status,
            [Event(body)] if body else [],
            "length",
        )
        self.headers["Content-Type"] = media

    def json(self, status: int, body: object) -> None:
        data = b"" if body is None else dumps(body).encode("utf-8")
        self.plain(status, data, "application/json")

    def flood(self, steps: Steps) -> None:
        """Become an answer of *steps* that never end."""
        self.steps, self.endless = steps, True


class Fault(NamedTuple):
    """One row of the table of faults."""

    usage: str
    apply: FaultFunction
    convert: Callable[[str], Argument]
    default: Argument


FAULTS: dict[str, Fault] = {}


def fault(
    usage: str,
    convert: Callable[[str], Argument] = int,
    default: Argument = None,
) -> Callable[[FaultFunction], FaultFunction]:
    """Enter a function in the table of faults under ``name`` or ``name:ARGUMENT``;
    without *default*, it is needed.
    """

    def enter(function: FaultFunction) -> FaultFunction:
        FAULTS[usage.partition(":")[0]] = Fault(usage, function, convert, default)
        return function

    return enter


def fault_table() -> str:
    """Return the table of faults in reStructuredText."""
    first = max(len(row.usage) for row in FAULTS.values())
    second = 87 - first
    rule = "=" * first + " " + "=" * second
    lines = [rule]
    for row in FAULTS.values():
        text = textwrap.wrap(" ".join((row.apply.__doc__ or "").split()), second)
        names = [row.usage, *[""] * (len(text) - 1)]
        lines += [f"{name:{first}} {part}" for name, part in zip(names, text)]
    return "\n".join([*lines, rule])


def parse_fault(text: str) -> Callable[[Answer], None]:
    """Compile ``name:argument+name:argument`` to one function; unknown names and bad
    arguments are ValueErrors.
    """
    parts = [compile_fault(part) for part in re.split(r"\+(?=[a-z])", text)]

    def apply(answer: Answer) -> None:
        for function, argument in parts:
            function(answer, argument)

    return apply


def compile_fault(text: str) -> tuple[FaultFunction, Argument]:
    name, colon, argument = text.strip().partition(":")
    if name not in FAULTS:
        raise ValueError(
            "unknown fault {!r}, known are: {}".format(name, " ".join(FAULTS))
        )
    row = FAULTS[name]
    if colon and ":" not in row.usage:
        raise ValueError(f"fault {name!r} takes no argument")
    if not colon and ":" in row.usage and row.default is None:
        raise ValueError(f"fault {name!r} needs an argument: {row.usage}")
    try:
        return row.apply, row.convert(argument) if colon else row.default
    except ValueError:
        raise ValueError(f"bad argument in {text!r}, wanted is {row.usage}") from None


# Parts of a body


def first_bytes(steps: Steps, count: int) -> Iterator[Step]:
    """Yield the steps of the first *count* bytes of the body."""
    for step in steps:
        if not isinstance(step, Event):
            yield step
        elif len(step.data) < count:
            yield step
            count -= len(step.data)
        else:
            if count:
                yield Event(step.data[:count], step.kind)
            return


def first_events(steps: Steps, count: int) -> Iterator[Step]:
    """Yield the steps of the first *count* events, and take no more from *steps*, so
    that the rest can follow.
    """
    if count < 1:
        return
    for step in steps:
        yield step
        count -= isinstance(step, Event)
        if not count:
            return


def to_finish(steps: Steps) -> Iterator[Step]:
    """Yield the steps up to the event with the finish reason."""
    for step in steps:
        yield step
        if isinstance(step, Event) and step.kind in ("finish", "last"):
            return


def without(steps: Steps, *kinds: str) -> Iterator[Step]:
    """Leave out the events of some *kinds*."""
    return (
        step for step in steps if not (isinstance(step, Event) and step.kind in kinds)
    )


def inserted(answer: Answer, count: int, *steps: Step) -> None:
    """Put *steps* after the first *count* events."""
    rest = iter(answer.steps)
    answer.steps = itertools.chain(first_events(rest, count), steps, rest)


def cut(answer: Answer, count: int, *steps: Step) -> None:
    """Put *steps* in the place of all that follows the first *count* events."""
    answer.steps = itertools.chain(first_events(answer.steps, count), steps)


def for_ever(answer: Answer, count: int, event: Event) -> None:
    """After *count* events, only this *event* again and again."""
    answer.flood(
        itertools.chain(
            first_events(answer.steps, count), itertools.cycle([Pause(TICK), event])
        )
    )


def line(answer: Answer, text: str) -> Event:
    """Return a line of the body as it is, with the line end of the protocol, and
    another one in an event stream.
    """
    call = answer.call
    eol = call.options.eol or call.protocol.eol
    ending = eol + eol if answer.is_sse else eol
    return Event((text.replace("\n", eol) + ending).encode("utf-8"))


def comment(answer: Answer, text: str = ": ping") -> Event:
    """Return a keep-alive: a comment, or an empty line where the protocol has no
    comments.
    """
    return line(answer, text if answer.is_sse else "")


# Cuts


@fault("ok")
def ok(answer: Answer, _: Argument) -> None:
    """The good answer."""


@fault("drop:N", default=BYTES)
def drop(answer: Answer, count: int) -> None:
    """FIN after N bytes of the body, at the end of a chunk."""
    answer.steps = itertools.chain(first_bytes(answer.steps, count), [Stop("drop")])


@fault("drop-event:N", default=EVENTS)
def drop_event(answer: Answer, count: int) -> None:
    """FIN after N events."""
    cut(answer, count, Stop("drop"))


@fault("drop-chunk:N", default=BYTES)
def drop_chunk(answer: Answer, count: int) -> None:
    """FIN after N bytes, within a chunk that announced more."""
    torn = Raw(b"40\r\ndata: ") if answer.framing == "chunked" else Raw(b"data: ")
    answer.steps = itertools.chain(
        first_bytes(answer.steps, count), [torn, Stop("drop")]
    )


@fault("reset:N", default=BYTES)
def reset(answer: Answer, count: int) -> None:
    """RST after N bytes of the body."""
    answer.steps = itertools.chain(first_bytes(answer.steps, count), [Stop("reset")])


@fault("reset-event:N", default=EVENTS)
def reset_event(answer: Answer, count: int) -> None:
    """RST after N events."""
    cut(answer, count, Stop("reset"))


@fault("end:N", default=BYTES)
def end(answer: Answer, count: int) -> None:
    """The framing ends properly after N bytes: a truncation that HTTP does not show."""
    answer.steps = first_bytes(answer.steps, count)


@fault("end-event:N", default=EVENTS)
def end_event(answer: Answer, count: int) -> None:
    """The framing ends properly after N events."""
    cut(answer, count)


@fault("bad-chunk:N", default=EVENTS)
def bad_chunk(answer: Answer, count: int) -> None:
    """After N events the length of a chunk is no number; then FIN."""
    cut(answer, count, Raw(b"what?\r\n"), Stop("drop"))


# Silence and noise


@fault("stall:N", default=BYTES)
def stall(answer: Answer, count: int) -> None:
    """N bytes of the body, then silence until the client leaves."""
    answer.steps = itertools.chain(first_bytes(answer.steps, count), [Stop("stall")])


@fault("stall-event:N", default=EVENTS)
def stall_event(answer: Answer, count: int) -> None:
    """N events, then silence until the client leaves."""
    cut(answer, count, Stop("stall"))


@fault("slow-first:SECONDS", float)
def slow_first(answer: Answer, seconds: float) -> None:
    """Headers at once, the body after SECONDS."""
    answer.steps = itertools.chain([Pause(seconds)], answer.steps)


@fault("drip:SECONDS", float, 0.001)
def drip(answer: Answer, seconds: float) -> None:
    """One byte per write, SECONDS apart."""

    def drops(steps: Steps) -> Iterator[Step]:
        for step in steps:
            if not isinstance(step, Event):
                yield step
                continue
            for byte in step.data:
                yield Event(bytes([byte]))
                yield Pause(seconds)

    answer.steps = drops(answer.steps)


@fault("pings:N", default=1)
def pings(answer: Answer, count: int) -> None:
    """N comments before each event (empty lines in NDJSON)."""
    pair = [comment(answer)] * count
    answer.steps = (
        part
        for step in answer.steps
        for part in ([*pair, step] if isinstance(step, Event) else [step])
    )


@fault("ping-forever:N", default=EVENTS)
def ping_forever(answer: Answer, count: int) -> None:
    """After N events only comments, every 20 ms, without end."""
    for_ever(answer, count, comment(answer))


@fault("drip-forever:N", default=EVENTS)
def drip_forever(answer: Answer, count: int) -> None:
    """After N events one byte of an unfinished comment line every 20 ms (of white space
    in NDJSON).
    """
    start, byte = (b":", b"-") if answer.is_sse else (b"", b" ")
    inserted(answer, count, Event(start))
    for_ever(answer, count + 1, Event(byte))


@fault("empty-deltas:N", default=EVENTS)
def empty_deltas(answer: Answer, count: int) -> None:
    """After N events deltas with an empty text every 20 ms, without end."""
    for_ever(
        answer,
        count,
        Event(answer.call.protocol.delta(answer.call, "").data),
    )


# The end


@fault("no-done")
def no_done(answer: Answer, _: Argument) -> None:
    """All but the end marker."""
    answer.steps = without(answer.steps, "end", "last")


@fault("no-finish")
def no_finish(answer: Answer, _: Argument) -> None:
    """All but the finish reason."""
    answer.steps = without(answer.steps, "finish", "last")


@fault("finish-then-stall")
def finish_then_stall(answer: Answer, _: Argument) -> None:
    """Silence right after the finish reason."""
    answer.steps = itertools.chain(to_finish(answer.steps), [Stop("stall")])


@fault("finish-then-reset")
def finish_then_reset(answer: Answer, _: Argument) -> None:
    """RST right after the finish reason."""
    answer.steps = itertools.chain(to_finish(answer.steps), [Stop("reset")])


@fault("finish-then-error")
def finish_then_error(answer: Answer, _: Argument) -> None:
    """An error event right after the finish reason, then the end."""
    error = answer.call.protocol.error_event(answer.call, OVERLOADED)
    answer.steps = itertools.chain(to_finish(answer.steps), [error])


@fault("done-then-open")
def done_then_open(answer: Answer, _: Argument) -> None:
    """The whole answer, but neither the framing nor the connection ends."""
    answer.steps = itertools.chain(answer.steps, [Stop("stall")])


# Errors in the stream


@fault("error-event:N", default=EVENTS)
def error_event(answer: Answer, count: int) -> None:
    """After N events the protocol's error event (overloaded), then the end."""
    cut(answer, count, answer.call.protocol.error_event(answer.call, OVERLOADED))


@fault("error-event-done:N", default=EVENTS)
def error_event_done(answer: Answer, count: int) -> None:
    """The same, then ``data: [DONE]`` and the end."""
    cut(
        answer,
        count,
        answer.call.protocol.error_event(answer.call, OVERLOADED),
        line(answer, "data: [DONE]"),
    )


@fault("fatal-error:N", default=EVENTS)
def fatal_error(answer: Answer, count: int) -> None:
    """After N events the same for an invalid request, then the end."""
    cut(answer, count, answer.call.protocol.error_event(answer.call, INVALID))


@fault("named-error:N", default=EVENTS)
def named_error(answer: Answer, count: int) -> None:
    """After N events an ``event: error`` with the error, as Groq sends it, then the
    end.
    """
    cut(
        answer,
        count,
        Event(answer.call.sse(answer.call.protocol.error(OVERLOADED), "error")),
    )


@fault("stray-error:N", default=EVENTS)
def stray_error(answer: Answer, count: int) -> None:
    """After N events a field ``error: {...}`` (old llama.cpp), then the end."""
    error = {
        "code": 500,
        "message": "The server is overloaded, try again.",
        "type": "server_error",
    }
    cut(answer, count, line(answer, "error: " + dumps(error)))


@fault("bare-error:N", default=EVENTS)
def bare_error(answer: Answer, count: int) -> None:
    """After N events a JSON error over several lines without ``data:``, as Google sends
    it, then the end.
    """
    error = {
        "error": {
            "code": 503,
            "message": "The model is overloaded.",
            "status": "UNAVAILABLE",
        }
    }
    cut(answer, count, line(answer, json.dumps(error, indent=2)))


@fault("malformed:N", default=EVENTS)
def malformed(answer: Answer, count: int) -> None:
    """After N events a delta whose JSON is broken off, and the good answer goes on."""
    torn = answer.call.protocol.delta(answer.call, "lost in the noise").data
    inserted(answer, count, line(answer, torn.decode("utf-8").rstrip()[:-8]))


@fault("garbage:N", default=EVENTS)
def garbage(answer: Answer, count: int) -> None:
    """After N events a harmless line of data that is no JSON, and the good answer goes
    on.
    """
    inserted(answer, count, line(answer, "data: hello from the proxy"))


@fault("different")
def different(answer: Answer, _: Argument) -> None:
    """Quite another text; to be written before other faults."""
    call = answer.call
    answer.steps = call.protocol.events(
        call.restart("Quite another story: " + call.options.text.swapcase())
    )


# Other answers than a stream


def parse_status(text: str) -> tuple[int, dict[str, str]]:
    """Parse ``CODE:name=value:name=value``."""
    code, *headers = re.split(r":(?=[A-Za-z-]+=)", text)
    return int(code), dict(header.partition("=")[::2] for header in headers)


@fault("status:CODE", parse_status)
def status(answer: Answer, argument: tuple[int, dict[str, str]]) -> None:
    """An HTTP error, with headers: ``status:429:retry-after=2``."""
    code, headers = argument
    answer.json(code, answer.call.protocol.error(trouble_of(code)))
    answer.headers.update(headers)


@fault("quota")
def quota(answer: Answer, _: Argument) -> None:
    """A 429 that no waiting cures: ``insufficient_quota``."""
    answer.json(429, answer.call.protocol.error(QUOTA))


@fault("html:CODE", default=502)
def html(answer: Answer, code: int) -> None:
    """The error page of a proxy with this status."""
    title = "{} {}".format(code, REASONS.get(code, "Unknown"))
    head = f"<html>\n<head><title>{title}</title></head>\n"
    page = head + f"<body><h1>{title}</h1><hr>proxy</body>\n</html>\n"
    answer.plain(code, page.encode("utf-8"), "text/html; charset=utf-8")


@fault("json")
def whole_json(answer: Answer, _: Argument) -> None:
    """200 with the whole answer as ``application/json``, as from a server that ignores
    ``stream``.
    """
    answer.json(200, answer.call.protocol.whole(answer.call))


@fault("json-error")
def json_error(answer: Answer, _: Argument) -> None:
    """200 with an error as ``application/json``."""
    answer.json(200, answer.call.protocol.error(OVERLOADED))


@fault("empty")
def empty(answer: Answer, _: Argument) -> None:
    """200 and a stream without a byte."""
    answer.steps = []


@fault("redirect:URL", str)
def redirect(answer: Answer, url: str) -> None:
    """307 to this URL."""
    answer.plain(307, b"", "text/plain")
    answer.headers["Location"] = url


# No answer, or no HTTP


@fault("refuse")
def refuse(answer: Answer, _: Argument) -> None:
    """The connection is closed without a byte."""
    answer.head = lambda head: [Stop("drop")]


@fault("no-http")
def no_http(answer: Answer, _: Argument) -> None:
    """Something that is not HTTP, then FIN."""
    answer.head = lambda head: [
        Raw(b"220 mail.example.org ESMTP ready\r\n"),
        Stop("drop"),
    ]


@fault("header-cut")
def header_cut(answer: Answer, _: Argument) -> None:
    """FIN within the header block."""
    answer.head = lambda head: [Raw(head[: len(head) // 2]), Stop("drop")]


@fault("headers-stall")
def headers_stall(answer: Answer, _: Argument) -> None:
    """Half of the header block, then silence until the client leaves."""
    answer.head = lambda head: [Raw(head[: len(head) // 2]), Stop("stall")]


@fault("headers-drip:SECONDS", float, 0.05)
def headers_drip(answer: Answer, seconds: float) -> None:
    """The header block byte by byte, SECONDS apart; then the good answer."""
    answer.head = lambda head: (
        step for byte in head for step in (Raw(bytes([byte])), Pause(seconds))
    )


# Without end


@fault("endless-line")
def endless_line(answer: Answer, _: Argument) -> None:
    """One line of data that never ends, as fast as it is read."""
    answer.flood(
        itertools.chain([Event(b"data: ")], itertools.repeat(Event(b"a" * 65536)))
    )


@fault("endless-event")
def endless_event(answer: Answer, _: Argument) -> None:
    """One event without end: lines, never a blank one (empty NDJSON objects)."""
    text = b"data: another line of the same event\n" if answer.is_sse else b"{}\n"
    answer.flood(itertools.repeat(Event(text * 1000)))


@fault("endless-answer")
def endless_answer(answer: Answer, _: Argument) -> None:
    """Good deltas of text that never end, as fast as they are read."""
    delta = answer.call.protocol.delta(answer.call, "and so on, and so on, ").data
    start = first_events(answer.steps, 1)
    answer.flood(itertools.chain(start, itertools.repeat(Event(delta * 100))))


@fault("empty-events")
def empty_events(answer: Answer, _: Argument) -> None:
    """A flood of blank lines and of events without data."""
    answer.flood(itertools.repeat(Event(b"\n\nevent: nothing\n\nid\n\n:\n\n" * 2000)))


@fault("bomb")
def bomb(answer: Answer, _: Argument) -> None:
    """An endless line, a thousand times larger than what is sent, by gzip."""
    answer.framing = "gzip"
    answer.flood(
        itertools.chain([Event(b"data: ")], itertools.repeat(Event(b"a" * (1 << 20))))
    )


# -----------------------------------------------------------------------------
# HTTP framing
# -----------------------------------------------------------------------------


class Sender:
    """Sends body bytes as they are: for a length, or an end by closing."""

    def __init__(self, connection: Connection, total: int) -> None:
        self.connection, self.total = connection, total

    def write(self, data: bytes) -> None:
        self.connection.send(data)

    def finish(self) -> None:
        """End the framing properly."""


class ChunkedSender(Sender):
    """Each write is an HTTP chunk."""

    def write(self, data: bytes) -> None:
        if data:
            self.connection.send(b"%X\r\n%b\r\n" % (len(data), data))

    def finish(self) -> None:
        self.connection.send(b"0\r\n\r\n")


class OneChunkSender(Sender):
    """The whole body is one chunk, announced at once and sent slowly."""

    announced = False

    def write(self, data: bytes) -> None:
        if not self.announced:
            self.connection.send(b"%X\r\n" % self.total)
            self.announced = True
        self.connection.send(data)
        self.connection.wait(0.002)

    def finish(self) -> None:
        self.connection.send(b"\r\n0\r\n\r\n" if self.announced else b"0\r\n\r\n")


class GzipSender(ChunkedSender):
    """Each write is compressed, flushed and sent as a chunk."""

    window = 31

    def __init__(self, connection: Connection, total: int) -> None:
        super().__init__(connection, total)
        self.compressor = zlib.compressobj(9, zlib.DEFLATED, self.window)

    def write(self, data: bytes) -> None:
        super().write(
            self.compressor.compress(data) + self.compressor.flush(zlib.Z_SYNC_FLUSH)
        )

    def finish(self) -> None:
        super().write(self.compressor.flush())
        super().finish()


class DeflateSender(GzipSender):
    """The same with zlib's own header."""

    window = 15


CHUNKED = {"Transfer-Encoding": "chunked"}
FRAMINGS: dict[str, tuple[type[Sender], dict[str, str]]] = {
    "chunked": (ChunkedSender, CHUNKED),
    "length": (Sender, {}),
    "close": (Sender, {"Connection": "close"}),
    "http10": (Sender, {"Connection": "close"}),
    "one-chunk": (OneChunkSender, CHUNKED),
    "gzip": (GzipSender, dict(CHUNKED, **{"Content-Encoding": "gzip"})),
    "deflate": (DeflateSender, dict(CHUNKED, **{"Content-Encoding": "deflate"})),
}


def measure(answer: Answer) -> int:
    """Return the length to announce: that of the steps, or more than they are if they
    do not end well.
    """
    if answer.endless:
        return ENDLESS
    answer.steps = steps = list(answer.steps)
    total = sum(len(step.data) for step in steps if isinstance(step, Event))
    broken = any(isinstance(step, (Stop, Raw)) for step in steps)
    return total + 1000 if broken else total


def grouped(steps: Steps, size: int) -> Iterator[Step]:
    """Join *size* events in one; any other step sends what has been joined."""
    waiting: list[bytes] = []
    for step in steps:
        if isinstance(step, Event):
            waiting.append(step.data)
        if waiting and (len(waiting) == size or not isinstance(step, Event)):
            yield Event(b"".join(waiting), "delta")
            waiting = []
        if not isinstance(step, Event):
            yield step
    if waiting:
        yield Event(b"".join(waiting), "delta")


def paced(steps: Steps, delay: float) -> Iterator[Step]:
    """Put a pause before each delta."""
    for step in steps:
        if isinstance(step, Event) and step.kind == "delta":
            yield Pause(delay)
        yield step


def header_block(answer: Answer, headers: dict[str, str], version: str) -> bytes:
    reason = REASONS.get(answer.status, "Unknown")
    lines = [f"HTTP/{version} {answer.status} {reason}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def send_answer(connection: Connection, answer: Answer) -> bool:
    """Play the whole answer; true if the connection can take another request."""
    options, request = answer.call.options, answer.call.request
    framing = answer.framing
    if framing not in ("length", "close", "http10") and request.version != "HTTP/1.1":
        framing = "close"
    sender_class, extra = FRAMINGS[framing]
    total = measure(answer) if framing in ("length", "one-chunk") else 0
    headers = dict(answer.headers, **extra)
    if framing == "length" and answer.status != 204:
        headers["Content-Length"] = str(total)
    persistent = request.persistent and headers.get("Connection") != "close"
    if not persistent:
        headers["Connection"] = "close"
    sender = sender_class(connection, total)
    steps = (
        grouped(answer.steps, options.coalesce)
        if options.coalesce > 1
        else answer.steps
    )
    steps = paced(steps, options.delay) if options.delay else steps
    head = header_block(answer, headers, "1.0" if framing == "http10" else "1.1")
    for step in itertools.chain(answer.head(head), steps):
        step.play(sender)
    sender.finish()
    return persistent


# -----------------------------------------------------------------------------
# Connections
# -----------------------------------------------------------------------------


class Connection:
    """One accepted TCP connection. Its methods raise :exc:`Closed` once either side has
    ended it.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self.deadline = sock, deadline
        self.received = b""

    def encrypt(self, tls: ssl.SSLContext) -> None:
        encrypted = tls.wrap_socket(
            self.sock, server_side=True, do_handshake_on_connect=False
        )
        self.sock = encrypted
        encrypted.settimeout(self.remaining())
        encrypted.do_handshake()

    def send(self, data: bytes) -> None:
        """Send all of *data*, for as long as the client takes."""
        try:
            self.sock.settimeout(self.remaining())
            self.sock.sendall(data)
        except (OSError, ValueError):
            self.drop()

    def wait(self, seconds: float) -> None:
        """Sleep, unless the client leaves or the server stops."""
        end = min(time.monotonic() + seconds, self.deadline)
        while True:
            rest = end - time.monotonic()
            if rest <= 0:
                return
            self.receive(rest)

    def receive(self, timeout: float) -> None:
        """Add to :attr:`received` what comes within *timeout* seconds."""
        try:
            self.sock.settimeout(max(timeout, 0.001))
            data = self.sock.recv(65536)
        except TIMED_OUT:
            return
        except (OSError, ValueError):
            data = b""
        if not data:
            self.drop()
        self.received += data

    def remaining(self) -> float:
        """Return the seconds until the server stops; if it has, end here."""
        rest = self.deadline - time.monotonic()
        if rest <= 0:
            self.drop()
        return rest

    def read_until(self, mark: bytes, limit: int = 1 << 20) -> bytes:
        """Return what comes before *mark*, and drop the mark."""
        while mark not in self.received:
            if len(self.received) > limit:
                self.drop()
            self.receive(self.remaining())
        data, _, self.received = self.received.partition(mark)
        return data

    def read(self, size: int) -> bytes:
        while len(self.received) < size:
            self.receive(self.remaining())
        data, self.received = self.received[:size], self.received[size:]
        return data

    def drop(self) -> NoReturn:
        """Close with FIN (without the farewell of TLS)."""
        self.sock.close()
        raise Closed

    def reset(self) -> None:
        """Close with RST, once what was sent has had the time to arrive."""
        self.wait(TICK)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        self.drop()

    def stall(self) -> None:
        """Be silent until the client leaves or the server stops."""
        while True:
            self.receive(self.remaining())

    def close(self) -> None:
        """Close with all the ceremony that TLS asks for."""
        if isinstance(self.sock, ssl.SSLSocket):
            try:
                self.sock.settimeout(0.2)
                self.sock.unwrap()
            except (OSError, ValueError):
                pass
        self.drop()


def wake(sock: socket.socket) -> None:
    """End *sock*, so that a thread that is blocked in it wakes up."""
    try:
        socket.socket.shutdown(
            sock, socket.SHUT_RDWR
        )  # not that of an SSLSocket, which forgets its encryption
    except OSError:
        pass


def read_request(connection: Connection) -> Request:
    """Read one request with its body."""
    lines = (
        connection.read_until(b"\r\n\r\n")
        .decode("latin-1")
        .lstrip("\r\n")
        .split("\r\n")
    )
    method, _, rest = lines[0].partition(" ")
    target, _, version = rest.rpartition(" ")
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Request(method, target, version, headers, read_body(connection, headers))


def read_body(connection: Connection, headers: dict[str, str]) -> bytes:
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        return connection.read(int(headers.get("content-length") or 0))
    body = b""
    while True:
        size = int(connection.read_until(b"\r\n").split(b";")[0], 16)
        body += connection.read(size)
        connection.read_until(b"\r\n")
        if not size:
            return body


class Listener:
    """A loopback server with a thread for each connection; a context manager that
    leaves nothing behind.
    """

    def __init__(
        self, port: int = 0, tls: ssl.SSLContext | None = None, lifetime: float = 60
    ) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self._port, self._tls, self._lifetime = port, tls, lifetime
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._deadline = 0.0

    def start(self) -> None:
        """Listen, in threads of its own."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self._port))
        self._socket.listen(1024)
        self._socket.settimeout(0.1)
        self._port = self._socket.getsockname()[1]
        self._deadline = time.monotonic() + self._lifetime
        self._acceptor = threading.Thread(
            target=self._accept, name="flaky-accept", daemon=True
        )
        self._acceptor.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return "{}://127.0.0.1:{}".format("https" if self._tls else "http", self._port)

    @property
    def port(self) -> int:
        return self._port

    @property
    def running(self) -> bool:
        return time.monotonic() < self._deadline

    @property
    def open_connections(self) -> int:
        """The connections that neither side has ended yet."""
        with self._lock:
            return len(self._open)

    def stop(self) -> None:
        """End all connections and threads."""
        self._deadline = 0.0
        wake(self._socket)
        self._acceptor.join(5)
        with self._lock:
            threads = list(self._threads)
            for connection in self._open:
                connection.deadline = 0.0
                wake(connection.sock)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(5)

    def _accept(self) -> None:
        with self._socket:
            while self.running:
                try:
                    sock, _ = self._socket.accept()
                except OSError:  # the timeout, or the end
                    continue
                self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, self._deadline)
        thread = threading.Thread(
            target=self._run, args=(connection,), name="flaky-connection", daemon=True
        )
        with self._lock:
            self.connections += 1
            self._open.add(connection)
            self._threads.add(thread)
        thread.start()

    def _run(self, connection: Connection) -> None:
        try:
            if self._tls:
                connection.encrypt(self._tls)
            while self.handle(connection):
                pass
            connection.close()
        except (
            Closed,
            OSError,
            ValueError,
        ):  # or a handshake that failed, or a request that is none
            pass
        finally:
            connection.sock.close()
            with self._lock:
                self._open.discard(connection)
                self._threads.discard(threading.current_thread())

    def record(self, request: Request) -> None:
        """Number the request and add it to :attr:`requests`."""
        with self._lock:
            request.number = len(self.requests) + 1
            self.requests.append(request)

    def handle(self, connection: Connection) -> bool:
        """Read and answer one request; true if another one may follow."""
        raise NotImplementedError


# -----------------------------------------------------------------------------
# The server
# -----------------------------------------------------------------------------


class Turn:
    """One entry of a script: a function that answers by itself, or the faults that
    rewrite the good answer.
    """

    def __init__(self, entry: str | Scripted) -> None:
        self.function = None if isinstance(entry, str) else entry
        self.name = (
            entry
            if isinstance(entry, str)
            else getattr(entry, "__name__", "a function")
        )
        self.rewrite = parse_fault(self.name if isinstance(entry, str) else "ok")


class FlakyServer(Listener):
    """A loopback server that tells *text* by *script*; a context manager.

    :param text: what it tells.
    :param script: the faults, one for each request, as at the top of this file.
    :param port: 0 lets the operating system choose.
    :param tls: an :class:`ssl.SSLContext` for https.
    :param lifetime: seconds after which everything stops by itself.
    :param loop: start the script again at its end.
    :param log: a function that is given a line for each request.

    Options of what is told:

    - ``pieces``: how the text is cut in deltas: a number of characters, or a list of
      strings (which is the text then);
    - ``reasoning``, ``tool_calls`` (pairs of a name and JSON arguments): more to tell;
    - ``continuation``: what a trailing assistant message does, or a prompt that ends
      with the beginning of the text: ``exact`` tells the rest (all, if it is not the
      beginning of the text), ``repeat`` says it again before the rest, ``ignore``
      starts over, ``refuse`` answers 400;
    - ``extra``: a dict, or a function of the chunk's number that returns one, merged in
      each chunk of the OpenAI kind;
    - ``eol``: the line end of event streams, by default that of the provider;
    - ``reconnection_ms``: the ``retry:`` field of ``/events``.

    Options of how:

    - ``delay``: seconds before each delta;
    - ``framing``: ``chunked``, ``length``, ``close`` (ends by closing), ``http10``,
      ``one-chunk`` (a single HTTP chunk, announced at once and sent slowly), ``gzip``
      or ``deflate``;
    - ``coalesce``: how many events share a write, and an HTTP chunk.

    :attr:`url` is where it listens, :attr:`requests` what it was asked,
    :attr:`connections` how many connections it has accepted, :attr:`open_connections`
    how many are open now.
    """

    def __init__(
        self,
        text: str = STORY,
        script: Sequence[str | Scripted] = (),
        *,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        lifetime: float = 60,
        loop: bool = False,
        log: Callable[[str], object] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(port, tls, lifetime)
        self.options = Options(text, **options)
        self._log = log
        self._script = [Turn(entry) for entry in script]
        self._loop = loop
        self._memory: dict[str, Call] = {}

    def __enter__(self) -> FlakyServer:  # noqa: PYI034  (Self needs Python 3.11)
        self.start()
        return self

    def handle(self, connection: Connection) -> bool:
        request = read_request(connection)
        self.record(request)
        turn = self._turn(request.number - 1)
        if self._log:
            self._log(
                f"{request.number:>4} {request.method} {request.target} -> {turn.name}"
            )
        if turn.function:
            turn.function(connection, request)
            return False
        answer = reply(request, self.options, self._memory)
        turn.rewrite(answer)
        return send_answer(connection, answer)

    def _turn(self, number: int) -> Turn:
        """Return what the script has for the request with this *number* (from 0)."""
        if self._loop and self._script:
            number %= len(self._script)
        return self._script[number] if number < len(self._script) else Turn("ok")


def reply(request: Request, options: Options, memory: dict[str, Call]) -> Answer:
    """Return the good answer to *request*, or the refusal that it deserves."""
    protocol = find_protocol(request)
    call = Call(request, options, protocol, options.text, options.text, memory)
    answer = Answer(call)
    try:
        call = answer.call = continued(call)
        if protocol.wants_stream(request):
            answer.steps = protocol.events(call)
        else:
            answer.json(200, protocol.whole(call))
    except Refused as refusal:
        answer.json(refusal.status, refusal.body)
    return answer


def find_protocol(request: Request) -> Protocol:
    for protocol in PROTOCOLS:
        if request.method in protocol.methods and re.search(
            f"(?:{protocol.path})$", request.path
        ):
            return protocol
    return Nothing()


def continued(call: Call) -> Call:
    """Return the call that tells what the request does not have yet."""
    prefix = call.protocol.prefix(call.request.fields, call.whole)
    reason = call.protocol.refuses(call, prefix)
    if reason:
        raise Refused(400, call.protocol.error(INVALID._replace(message=reason)))
    mode = call.options.continuation
    known = len(prefix) if call.whole.startswith(prefix) else 0
    rest = call.whole[known:]
    return replace(
        call, text={"exact": rest, "repeat": prefix + rest}.get(mode, call.whole)
    )


def transcript(
    path: str,
    text: str = STORY,
    body: JSON | None = None,
    method: str = "POST",
    **options: Any,
) -> bytes:
    """Return the whole body that the server would send to a first request for *path*.

    :param body: the JSON of the request, by default one that asks for a stream.
    """
    content = {"stream": True} if body is None else body
    request = Request(method, path, "HTTP/1.1", {}, dumps(content).encode("utf-8"))
    request.number = 1
    answer = reply(request, Options(text, **options), {})
    return b"".join(step.data for step in answer.steps if isinstance(step, Event))


# -----------------------------------------------------------------------------
# Beside the server
# -----------------------------------------------------------------------------


class ConnectProxy(Listener):
    """An HTTP proxy for loopback targets: CONNECT tunnels, and plain requests.

    :attr:`requests` has what it was asked; the path of a CONNECT is ``host:port``.
    """

    def __enter__(self) -> ConnectProxy:  # noqa: PYI034  (Self needs Python 3.11)
        self.start()
        return self

    def handle(self, connection: Connection) -> bool:
        request = read_request(connection)
        self.record(request)
        tunnel = request.method == "CONNECT"
        target = urlsplit("//" + request.target if tunnel else request.target)
        if target.hostname not in ("localhost", "127.0.0.1", "::1"):
            refuse_tunnel(connection, "403 Loopback Only")
            return False
        try:
            upstream = socket.create_connection(
                (target.hostname, target.port or 80), timeout=10
            )
        except OSError:
            refuse_tunnel(connection, "502 No Such Target")
            return False
        if tunnel:
            connection.send(b"HTTP/1.1 200 Connection Established\r\n\r\n")
            upstream.sendall(connection.received)
        else:
            upstream.sendall(
                forwarded(
                    request, target.path + ("?" + target.query if target.query else "")
                )
            )
        self.relay(connection, upstream)
        return False

    def relay(self, connection: Connection, upstream: socket.socket) -> None:
        """Carry bytes both ways until one side ends."""
        back = threading.Thread(
            target=pump,
            args=(upstream, connection.sock, connection.deadline),
            daemon=True,
        )
        back.start()
        pump(connection.sock, upstream, connection.deadline)
        back.join(5)
        upstream.close()


def refuse_tunnel(connection: Connection, status: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    connection.send(head.encode("latin-1"))


def pump(source: socket.socket, target: socket.socket, deadline: float) -> None:
    """Carry bytes from *source* to *target* until either ends, then end both."""
    try:
        source.settimeout(max(0.001, deadline - time.monotonic()))
        for data in iter(lambda: source.recv(65536), b""):
            target.sendall(data)
    except (OSError, ValueError):
        pass
    wake(source)
    wake(target)


def forwarded(request: Request, target: str) -> bytes:
    """Return the request as the origin server wants it, with an end of the connection
    after the answer.
    """
    headers = {
        name: value
        for name, value in request.headers.items()
        if not name.startswith("proxy-")
        and name not in ("connection", "transfer-encoding", "content-length")
    }
    headers.update({"connection": "close", "content-length": str(len(request.body))})
    lines = ["{} {} HTTP/1.1".format(request.method, target or "/")]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + request.body


def self_signed(folder: str | Path) -> tuple[str, str]:
    """Make a certificate for localhost and 127.0.0.1 by the ``openssl`` command; return
    the paths of it and its key.
    """
    cert, key = str(Path(folder) / "cert.pem"), str(Path(folder) / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "30",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout",
        key,
        "-out",
        cert,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise RuntimeError(
            "self_signed() needs the openssl command, which is not installed"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            "openssl failed: " + error.stderr.decode("utf-8", "replace")
        ) from None
    return cert, key


# -----------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description="A scripted, faulty LLM server on the loopback interface."
    )
    command.add_argument(
        "--port", type=int, default=8000, help="default 8000; 0 for any"
    )
    command.add_argument(
        "--script", default="", help="faults, separated by commas: drop:200,stall,ok"
    )
    command.add_argument(
        "--loop", action="store_true", help="start the script again at its end"
    )
    command.add_argument("--text", default=STORY, help="what the server tells")
    command.add_argument(
        "--delay",
        type=float,
        default=0.02,
        help="seconds before each delta, default 0.02",
    )
    command.add_argument("--framing", choices=list(FRAMINGS), default="chunked")
    command.add_argument(
        "--lifetime",
        type=float,
        default=600,
        help="seconds until it stops, default 600",
    )
    command.add_argument(
        "--list", action="store_true", help="print the table of faults"
    )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    if options.list:
        print(fault_table())
        return 0
    script = [part for part in re.split(r",(?=[a-z])", options.script) if part]
    try:
        server = FlakyServer(
            options.text,
            script,
            port=options.port,
            loop=options.loop,
            log=say,
            delay=options.delay,
            framing=options.framing,
            lifetime=options.lifetime,
        )
    except ValueError as error:
        command.error(str(error))
    try:
        serve(server)
    except OSError as error:
        command.error(f"cannot listen on port {options.port}: {error}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def serve(server: FlakyServer) -> None:
    """Run until Ctrl-C or the end of the lifetime."""
    messages = '[{"role":"user","content":"Tell me a story"}]'
    body = f'{{"model":"m","stream":true,"messages":{messages}}}'
    try:
        with server:
            say(server.url)
            say(f"curl -N {server.url}/v1/chat/completions -d '{body}'")
            while server.running:
                time.sleep(0.1)
    except KeyboardInterrupt:
        say("")


if __name__ == "__main__":
    sys.exit(main())
