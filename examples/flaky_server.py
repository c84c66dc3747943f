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

``python flaky_server.py --list`` prints the table of faults, which stands below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.client import responses as REASONS
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["STORY", "Connection", "FlakyServer", "Request", "fault_table", "transcript"]

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
    FaultFunction = Callable[["Answer", Argument], "Steps | None"]
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
        self.method, self.target, self.version = method, target, version
        self.headers, self.body = headers, body
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
        wish = self.headers.get("connection", "").lower()
        return self.version == "HTTP/1.1" and wish != "close"

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
        modes = ("exact", "repeat", "ignore", "refuse")
        one_of("framing", self.framing, FRAMINGS)
        one_of("continuation", self.continuation, modes)
        one_of("eol", self.eol, (None, "\n", "\r\n", "\r"))
        if not isinstance(self.pieces, int):
            object.__setattr__(self, "text", "".join(self.pieces))


def one_of(name: str, value: object, known: Iterable[object]) -> None:
    """Raise :exc:`ValueError` unless *value* is a *known* one."""
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"unknown {name} {value!r}, known are: {names}")


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
    except UnicodeEncodeError:  # half of a surrogate pair: an escape can carry it
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
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(str(part.get("text") or "") for part in parts)
    return content if isinstance(content, str) else ""


def last_turn(messages: object, role: str, key: str) -> str:
    """Return the text of the last message if it is the model's own: the prefix to
    continue.
    """
    last = messages[-1] if isinstance(messages, list) and messages else None
    own = isinstance(last, dict) and last.get("role") == role
    return plain(last.get(key)) if own else ""


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


OVERLOADED, INVALID, QUOTA, *COMMON = (
    Trouble(int(status), *names)
    for status, *names in (
        line.split(None, 4)
        for line in """\
503 server_error          overloaded_error      UNAVAILABLE        The server is overloaded, try again.
400 invalid_request_error invalid_request_error INVALID_ARGUMENT   The request is invalid.
429 insufficient_quota    rate_limit_error      RESOURCE_EXHAUSTED You exceeded your quota.
401 authentication_error  authentication_error  UNAUTHENTICATED    The key is wrong.
403 permission_error      permission_error      PERMISSION_DENIED  Not with this key.
404 not_found_error       not_found_error       NOT_FOUND          There is no such thing.
429 rate_limit_exceeded   rate_limit_error      RESOURCE_EXHAUSTED Too many requests.
""".splitlines()
    )
)
TROUBLES = {trouble.status: trouble for trouble in COMMON}


def trouble_of(status: int) -> Trouble:
    """Return the error that goes with an HTTP status."""
    common = INVALID if status < 500 and status != 408 else OVERLOADED
    return TROUBLES.get(status, common)._replace(status=status)


class Refused(Exception):
    """The request gets a JSON body with a status instead of a stream."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class Tool(NamedTuple):
    """One call of a tool that an answer makes, its arguments in pieces."""

    number: int
    id: str
    name: str
    pieces: Sequence[str]

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    @property
    def parsed(self) -> Any:
        return json.loads(self.arguments or "{}")

    def function(self, arguments: str) -> JSON:
        """Return the call as OpenAI writes it, with these arguments."""
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


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
    def tools(self) -> list[Tool]:
        calls = enumerate(self.options.tool_calls)
        return [Tool(n, f"call_{n}", f, slices(text, 8)) for n, (f, text) in calls]

    @property
    def output_tokens(self) -> int:
        return len(self.pieces) + len(self.thoughts)

    @property
    def eol(self) -> str:
        return self.options.eol or self.protocol.eol

    def id(self, prefix: str) -> str:
        return f"{prefix}{self.request.number}"

    def sse(self, data: object, event: str = "", id: str = "") -> bytes:
        """Encode one server-sent event; *data* is text, or an object for JSON."""
        text = data if isinstance(data, str) else dumps(data)
        lines = ["event: " + event] if event else []
        lines += ["id: " + id] if id else []
        lines += ["data: " + line for line in text.split("\n")]
        return (self.eol.join(lines) + self.eol * 2).encode("utf-8")

    def event(self, type: str, kind: str = "other", **data: object) -> Event:
        """Return the event of a provider whose JSON names its type again."""
        return Event(self.sse({"type": type, **data}, type), kind)

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
    #: Where the request has what is to be continued: messages, or a prompt.
    turns_key, own_role, text_key = "messages", "assistant", "content"
    prompt_key = ""

    def prefix(self, body: JSON, text: str) -> str:
        """Return the part of the answer that the request already has and asks to
        continue: the end of its prompt, or a last message of the model's own.
        """
        if self.prompt_key:
            return overlap(str(body.get(self.prompt_key) or ""), text)
        return last_turn(body.get(self.turns_key), self.own_role, self.text_key)

    def refuses(self, call: Call, prefix: str) -> str:
        """Return why the provider would answer 400, if it would."""
        refused = prefix and call.options.continuation == "refuse"
        return "This model does not continue messages." if refused else ""

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
        kind = trouble.openai
        error = {"message": trouble.message, "type": kind, "param": None, "code": kind}
        return {"error": error}

    def error_event(self, call: Call, trouble: Trouble) -> Event:
        """Return the error as an event in the stream."""
        return Event(call.sse(self.error(trouble)))


class OpenAIChat(Protocol):
    """Chat Completions; the further choices of ``n`` get each piece backwards, so that
    none is taken for another.
    """

    name = "openai"
    path = "/chat/completions"
    id_prefix, chunk_object = "chatcmpl-", "chat.completion.chunk"
    whole_object = "chat.completion"

    def events(self, call: Call) -> Iterator[Event]:
        indices = range(int(call.request.fields.get("n") or 1))
        for index in indices:
            yield self.says(call, "start", index, role="assistant", content="")
        for thought in call.thoughts:
            yield self.says(call, reasoning_content=thought)
        for piece in call.pieces:
            for index in indices:
                yield self.says(call, index=index, content=piece[:: -1 if index else 1])
        for tool in call.tools:
            begun = {"index": tool.number, **tool.function("")}
            yield self.says(call, tool_calls=[begun])
            for piece in tool.pieces:
                more = {"index": tool.number, "function": {"arguments": piece}}
                yield self.says(call, tool_calls=[more])
        reason = "tool_calls" if call.tools else "stop"
        for index in indices:
            end = {"index": index, "delta": {}, "finish_reason": reason}
            yield self.chunk(call, "finish", **end)
        yield from self.last(call)

    def last(self, call: Call) -> Iterator[Event]:
        if self.counts(call):
            yield self.chunk(call, "usage")
        yield Event(call.sse("[DONE]"), "end")

    def says(
        self, call: Call, kind: str = "delta", index: int = 0, **delta: object
    ) -> Event:
        return self.chunk(call, kind, index=index, delta=delta, finish_reason=None)

    def chunk(self, call: Call, kind: str, **choice: object) -> Event:
        """Return a chunk with one choice, or the one with the usage, which has none."""
        chunk = self.body(call, self.chunk_object, [choice] if choice else [])
        if self.counts(call):
            chunk["usage"] = None if choice else self.usage(call)
        extra, number = call.options.extra, next(call.counter)
        chunk.update(extra(number) if callable(extra) else extra or {})
        return Event(call.sse(chunk), kind)

    def body(self, call: Call, object: str, choices: list[JSON]) -> JSON:
        body = {"id": call.id(self.id_prefix), "object": object, "created": CREATED}
        return {**body, "model": call.model, "choices": choices}

    def counts(self, call: Call) -> bool:
        options = call.request.fields.get("stream_options") or {}
        return bool(options.get("include_usage"))

    def usage(self, call: Call) -> JSON:
        count = call.output_tokens
        usage = {"prompt_tokens": 7, "completion_tokens": count}
        return {**usage, "total_tokens": 7 + count}

    def delta(self, call: Call, text: str) -> Event:
        return self.says(call, content=text)

    def whole(self, call: Call) -> JSON:
        choice = {"index": 0, **self.choice(call)}
        body = self.body(call, self.whole_object, [choice])
        return {**body, "usage": self.usage(call)}

    def choice(self, call: Call) -> JSON:
        message: JSON = {"role": "assistant", "content": call.text}
        if call.options.reasoning:
            message["reasoning_content"] = call.options.reasoning
        if call.tools:
            message["tool_calls"] = [t.function(t.arguments) for t in call.tools]
        reason = "tool_calls" if call.tools else "stop"
        return {"message": message, "finish_reason": reason}


class OpenAICompletions(OpenAIChat):
    """Legacy Completions: the prompt is continued where it ends with the beginning of
    the text.
    """

    name = "openai-completions"
    path, prompt_key = "/completions", "prompt"
    id_prefix, chunk_object = "cmpl-", "text_completion"
    whole_object = "text_completion"

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.pieces:
            yield self.delta(call, piece)
        yield self.chunk(call, "finish", index=0, text="", finish_reason="stop")
        yield from self.last(call)

    def delta(self, call: Call, text: str) -> Event:
        return self.chunk(call, "delta", index=0, text=text, finish_reason=None)

    def choice(self, call: Call) -> JSON:
        return {"text": call.text, "finish_reason": "stop"}


class OpenAIResponses(Protocol):
    """Responses; one that was created in the background can be read again from any
    sequence number.
    """

    name = "openai-responses"
    path = r"/responses|/responses/[^/]+(?:/cancel)?"
    methods = ("POST", "GET")
    turns_key = ""  # it continues nothing

    def wants_stream(self, request: Request) -> bool:
        asked = (request.query.get("stream"), dumps(request.fields.get("stream")))
        return "true" in asked

    def events(self, call: Call) -> Iterator[Event]:
        after = -1
        if not call.request.path.endswith("/responses"):
            after = int(call.request.query.get("starting_after") or -1)
            call = self.found(call)
        elif call.request.fields.get("background"):
            call.memory[call.id("resp_")] = call
        return self.after(call, after)

    def found(self, call: Call) -> Call:
        """Return the call that created the response that this one is about."""
        id = re.sub("/cancel$", "", call.request.path).rpartition("/")[2]
        if id not in call.memory:
            message = f"Response with id {id!r} not found."
            raise Refused(404, self.error(TROUBLES[404]._replace(message=message)))
        return call.memory[id]

    def after(self, call: Call, after: int) -> Iterator[Event]:
        for number, (kind, type, data) in enumerate(self.story(call)):
            if number > after:
                more = {**data, "sequence_number": number}
                yield call.event("response." + type, kind, **more)

    def story(self, call: Call) -> Iterator[tuple[str, str, JSON]]:
        """Yield the events without their numbers: kind, type and data."""
        begun = self.response(call, "in_progress")
        yield "start", "created", {"response": begun}
        yield "other", "in_progress", {"response": begun}
        output = self.output(call)
        for index, item in enumerate(output):
            item_type = item["type"]
            bare = {**item, "status": "in_progress"}
            for key in {"content", "summary", "arguments"} & set(item):
                bare[key] = type(item[key])()
            place = {"output_index": index}
            yield "other", "output_item.added", {**place, "item": bare}
            for kind, name, data in getattr(self, "tell_" + item_type)(call, item):
                yield kind, name, {**data, "item_id": item["id"], **place}
            yield "other", "output_item.done", {**place, "item": item}
        done = self.response(call, "completed", output)
        yield "last", "completed", {"response": done}

    def tell_reasoning(self, call: Call, item: JSON) -> Iterator[tuple[str, str, JSON]]:
        place, name = {"summary_index": 0}, "reasoning_summary_text"
        for piece in call.thoughts:
            yield "delta", name + ".delta", {**place, "delta": piece}
        yield "other", name + ".done", {**place, "text": call.options.reasoning}

    def tell_message(self, call: Call, item: JSON) -> Iterator[tuple[str, str, JSON]]:
        place = {"content_index": 0}
        part: JSON = {"type": "output_text", "text": "", "annotations": []}
        yield "other", "content_part.added", {**place, "part": part}
        for piece in call.pieces:
            yield "delta", "output_text.delta", {**place, "delta": piece}
        yield "other", "output_text.done", {**place, "text": call.text}
        part = {**part, "text": call.text}
        yield "other", "content_part.done", {**place, "part": part}

    def tell_function_call(
        self, call: Call, item: JSON
    ) -> Iterator[tuple[str, str, JSON]]:
        name, arguments = "function_call_arguments", item["arguments"]
        for piece in slices(arguments, 8):
            yield "delta", name + ".delta", {"delta": piece}
        yield "other", name + ".done", {"arguments": arguments}

    def output(self, call: Call) -> list[JSON]:
        items: list[JSON] = []
        if call.options.reasoning:
            summary = [{"type": "summary_text", "text": call.options.reasoning}]
            item = {"type": "reasoning", "id": call.id("rs_"), "summary": summary}
            items.append(item)
        content = [{"type": "output_text", "text": call.text, "annotations": []}]
        message = {"type": "message", "id": call.id("msg_"), "status": "completed"}
        items.append({**message, "role": "assistant", "content": content})
        for tool in call.tools:
            item = {"type": "function_call", "id": f"fc_{tool.number}"}
            item.update(status="completed", call_id=tool.id, name=tool.name)
            items.append({**item, "arguments": tool.arguments})
        return items

    def response(self, call: Call, status: str, output: Sequence[JSON] = ()) -> JSON:
        tokens = call.output_tokens
        usage = {"input_tokens": 7, "output_tokens": tokens, "total_tokens": 7 + tokens}
        return {
            "id": call.id("resp_"),
            "object": "response",
            "created_at": CREATED,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": call.model,
            "output": list(output),
            "usage": usage if output else None,
        }

    def delta(self, call: Call, text: str) -> Event:
        place = {"item_id": call.id("msg_"), "output_index": 0, "content_index": 0}
        return call.event("response.output_text.delta", "delta", **place, delta=text)

    def whole(self, call: Call) -> JSON:
        path = call.request.path
        creator = call if path.endswith("/responses") else self.found(call)
        if path.endswith("/cancel"):
            return self.response(creator, "cancelled")
        if creator is call and call.request.fields.get("background"):
            call.memory[call.id("resp_")] = call
        return self.response(creator, "completed", self.output(creator))

    def error_event(self, call: Call, trouble: Trouble) -> Event:
        code, message = trouble.openai, trouble.message
        return call.event("error", code=code, message=message, param=None)


class Anthropic(Protocol):
    """Messages; a trailing assistant message is prefill, and is refused if it ends in
    white space.
    """

    name = "anthropic"
    path = "/messages"

    def refuses(self, call: Call, prefix: str) -> str:
        if prefix and call.options.continuation == "refuse":
            return "Prefilling assistant messages is not supported for this model."
        if prefix != prefix.rstrip():
            where = "messages: final assistant content"
            return where + " cannot end with trailing whitespace"
        return ""

    def events(self, call: Call) -> Iterator[Event]:
        message = self.message(call, [])
        message.update(stop_reason=None, usage={"input_tokens": 7, "output_tokens": 1})
        yield call.event("message_start", "start", message=message)
        for index, (block, deltas) in enumerate(self.blocks(call)):
            yield call.event("content_block_start", index=index, content_block=block)
            if not index:
                yield call.event("ping")
            for delta in deltas:
                yield self.block_delta(call, index, **delta)
            yield call.event("content_block_stop", index=index)
        delta = {"stop_reason": self.stop_reason(call), "stop_sequence": None}
        usage = {"output_tokens": call.output_tokens}
        yield call.event("message_delta", "finish", delta=delta, usage=usage)
        yield call.event("message_stop", "end")

    def blocks(self, call: Call) -> Iterator[tuple[JSON, list[JSON]]]:
        """Yield the content blocks: how each starts, and its deltas."""
        if call.thoughts:
            deltas = [{"type": "thinking_delta", "thinking": t} for t in call.thoughts]
            deltas.append({"type": "signature_delta", "signature": "c2lnbmVk"})
            yield {"type": "thinking", "thinking": "", "signature": ""}, deltas
        if call.pieces:
            deltas = [{"type": "text_delta", "text": piece} for piece in call.pieces]
            yield {"type": "text", "text": ""}, deltas
        for _, id, name, pieces in call.tools:
            parts = ["", *pieces]
            deltas = [{"type": "input_json_delta", "partial_json": p} for p in parts]
            yield {"type": "tool_use", "id": id, "name": name, "input": {}}, deltas

    def block_delta(self, call: Call, index: int, **delta: object) -> Event:
        return call.event("content_block_delta", "delta", index=index, delta=delta)

    def stop_reason(self, call: Call) -> str:
        return "tool_use" if call.tools else "end_turn"

    def message(self, call: Call, content: list[JSON]) -> JSON:
        return {
            "id": call.id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": call.model,
            "content": content,
            "stop_reason": self.stop_reason(call),
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": call.output_tokens},
        }

    def whole(self, call: Call) -> JSON:
        content: list[JSON] = []
        if call.options.reasoning:
            thinking = {"type": "thinking", "thinking": call.options.reasoning}
            content.append({**thinking, "signature": "c2lnbmVk"})
        content.append({"type": "text", "text": call.text})
        for tool in call.tools:
            use = {"type": "tool_use", "id": tool.id, "name": tool.name}
            content.append({**use, "input": tool.parsed})
        return self.message(call, content)

    def delta(self, call: Call, text: str) -> Event:
        index = 1 if call.options.reasoning else 0
        return self.block_delta(call, index, type="text_delta", text=text)

    def error(self, trouble: Trouble) -> JSON:
        error = {"type": trouble.anthropic, "message": trouble.message, "details": None}
        return {"type": "error", "error": error, "request_id": "req_1"}

    def error_event(self, call: Call, trouble: Trouble) -> Event:
        return Event(call.sse(self.error(trouble), "error"))


class Ollama(Protocol):
    """Ollama's chat: NDJSON, streamed unless told otherwise; a trailing assistant
    message is continued.
    """

    name = "ollama"
    path = "/api/chat"
    media = "application/x-ndjson"

    def wants_stream(self, request: Request) -> bool:
        return request.fields.get("stream") is not False

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.thoughts:
            yield self.line(call, "delta", self.says("", piece))
        for piece in call.pieces:
            yield self.delta(call, piece)
        if call.tools:
            yield self.line(call, "delta", self.calls(call))
        yield self.line(call, "last", {**self.says(""), **self.end(call)})

    def says(self, text: str, thought: str = "") -> JSON:
        message = {"role": "assistant", "content": text}
        return {"message": {**message, "thinking": thought} if thought else message}

    def calls(self, call: Call) -> JSON:
        said = self.says("")
        said["message"]["tool_calls"] = [
            {"function": {"name": tool.name, "arguments": tool.parsed}}
            for tool in call.tools
        ]
        return said

    def end(self, call: Call) -> JSON:
        counts = {"prompt_eval_count": 7, "eval_count": call.output_tokens}
        return {"done": True, "done_reason": "stop", **counts}

    def first(self, call: Call) -> JSON:
        return {"model": call.model, "created_at": "2023-11-14T22:13:20Z"}

    def line(self, call: Call, kind: str, data: JSON) -> Event:
        text = dumps({**self.first(call), "done": False, **data})
        return Event((text + call.eol).encode("utf-8"), kind)

    def delta(self, call: Call, text: str) -> Event:
        return self.line(call, "delta", self.says(text))

    def whole(self, call: Call) -> JSON:
        said = self.says(call.text, call.options.reasoning)
        if call.tools and "message" in said:
            said["message"]["tool_calls"] = self.calls(call)["message"]["tool_calls"]
        return {**self.first(call), **said, **self.end(call)}

    def error(self, trouble: Trouble) -> JSON:
        return {"error": trouble.message}

    def error_event(self, call: Call, trouble: Trouble) -> Event:
        return Event((dumps(self.error(trouble)) + call.eol).encode("utf-8"))


class OllamaGenerate(Ollama):
    """Ollama's generate: a prompt that ends with the beginning of the text is
    continued.
    """

    name = "ollama-generate"
    path, prompt_key = "/api/generate", "prompt"

    def says(self, text: str, thought: str = "") -> JSON:
        return {"response": text, **({"thinking": thought} if thought else {})}

    def calls(self, call: Call) -> JSON:
        return {"response": ""}


class Gemini(Protocol):
    """Gemini: events with CRLF for ``alt=sse``, else one JSON array; the finish reason
    is the only end marker.
    """

    name = "gemini"
    path = "/models/[^/]+:(?:stream)?[gG]enerateContent"
    eol = "\r\n"
    turns_key, own_role, text_key = "contents", "model", "parts"

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
        tools = call.tools
        return [{"functionCall": {"name": t.name, "args": t.parsed}} for t in tools]

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
        usage = {"promptTokenCount": 7, "candidatesTokenCount": len(call.pieces)}
        usage["totalTokenCount"] = 7 + call.output_tokens
        answer = {"candidates": [candidate], "usageMetadata": usage}
        return {**answer, "modelVersion": "flaky-1", "responseId": call.id("answer-")}

    def delta(self, call: Call, text: str) -> Event:
        return self.chunk(call, [{"text": text}])

    def whole(self, call: Call) -> JSON:
        thought = call.options.reasoning
        parts: list[JSON] = [{"text": thought, "thought": True}] if thought else []
        parts += [{"text": call.text}, *self.calls(call)]
        return self.answer(call, parts, "STOP")

    def error(self, trouble: Trouble) -> JSON:
        error = {"code": trouble.status, "message": trouble.message}
        return {"error": {**error, "status": trouble.google}}


class Cohere(Protocol):
    """Cohere's chat, version 2; a trailing assistant message is continued, which the
    real one does not promise.
    """

    name = "cohere"
    path = "/v2/chat"

    def events(self, call: Call) -> Iterator[Event]:
        message: JSON = {"role": "assistant", "content": [], "tool_calls": []}
        message["citations"] = []
        begun = {"id": call.id("answer-"), "delta": {"message": message}}
        yield call.event("message-start", "start", **begun)
        blocks = [("thinking", call.thoughts), ("text", call.pieces)]
        for index, (key, pieces) in enumerate(block for block in blocks if block[1]):
            empty = {"type": key, key: ""}
            yield self.says(call, "content-start", index, content=empty)
            for piece in pieces:
                yield self.says(call, "content-delta", index, content={key: piece})
            yield call.event("content-end", index=index)
        for tool in call.tools:
            index, begun = tool.number, tool.function("")
            yield self.says(call, "tool-call-start", index, tool_calls=begun)
            for piece in tool.pieces:
                more = {"function": {"arguments": piece}}
                yield self.says(call, "tool-call-delta", index, tool_calls=more)
            yield call.event("tool-call-end", index=index)
        end = {"finish_reason": self.reason(call), "usage": self.usage(call)}
        yield call.event("message-end", "finish", delta=end)
        yield Event(call.sse("[DONE]"), "end")

    def says(self, call: Call, type: str, index: int, **message: object) -> Event:
        kind = "delta" if type.endswith("-delta") else "other"
        return call.event(type, kind, index=index, delta={"message": message})

    def reason(self, call: Call) -> str:
        return "TOOL_CALL" if call.tools else "COMPLETE"

    def usage(self, call: Call) -> JSON:
        count = {"output_tokens": call.output_tokens}
        return {
            "billed_units": {"input_tokens": 3, **count},
            "tokens": {"input_tokens": 7, **count},
        }

    def delta(self, call: Call, text: str) -> Event:
        return self.says(call, "content-delta", 0, content={"text": text})

    def whole(self, call: Call) -> JSON:
        content = [{"type": "text", "text": call.text}]
        message: JSON = {"role": "assistant", "content": content}
        if call.tools:
            message["tool_calls"] = [t.function(t.arguments) for t in call.tools]
        return {
            "id": call.id("answer-"),
            "finish_reason": self.reason(call),
            "message": message,
            "usage": self.usage(call),
        }

    def error(self, trouble: Trouble) -> JSON:
        return {"id": "error-1", "message": trouble.message}

    def error_event(self, call: Call, trouble: Trouble) -> Event:
        error = {"error": trouble.message, "error_type": trouble.openai, "usage": {}}
        end = call.event("message-end", delta={"finish_reason": "ERROR", **error})
        return Event(end.data + call.sse("[DONE]"))


class TextGeneration(Protocol):
    """TGI: the input is continued where it ends with the beginning of the text; no
    space after ``data:``.
    """

    name = "tgi"
    path, prompt_key = "/generate_stream|/generate", "inputs"

    def wants_stream(self, request: Request) -> bool:
        return request.path.endswith("_stream")

    def events(self, call: Call) -> Iterator[Event]:
        for piece in call.pieces:
            yield self.delta(call, piece)
        yield self.token(call, "</s>", "last", **self.whole(call))

    def token(self, call: Call, text: str, kind: str, **more: object) -> Event:
        number, special = next(call.counter), kind == "last"
        token = {"id": number, "text": text, "logprob": -0.5, "special": special}
        data = {"index": number + 1, "token": token}
        data.update({"generated_text": None, "details": None, **more})
        return Event(call.sse(data).replace(b"data: ", b"data:", 1), kind)

    def delta(self, call: Call, text: str) -> Event:
        return self.token(call, text, "delta")

    def whole(self, call: Call) -> JSON:
        details: JSON | None = None
        if (call.request.fields.get("parameters") or {}).get("details"):
            counts = {"generated_tokens": call.output_tokens, "input_length": 7}
            details = {"finish_reason": "eos_token", **counts, "seed": None}
        return {"generated_text": call.text, "details": details}

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
    turns_key = ""  # it continues nothing

    def wants_stream(self, request: Request) -> bool:
        return True

    def events(self, call: Call) -> Iterator[Event]:
        last = call.request.headers.get("last-event-id", "")
        seen = int(last) if last.isdigit() else 0
        if seen and seen >= len(call.pieces):
            raise Refused(204, None)
        return self.after(call, seen)

    def after(self, call: Call, seen: int) -> Iterator[Event]:
        wait = call.options.reconnection_ms
        if wait is not None:
            yield Event(f"retry: {wait}{call.eol * 2}".encode(), "start")
        for number, piece in enumerate(call.pieces[seen:], seen + 1):
            yield Event(call.sse(piece, id=str(number)), "delta")

    def whole(self, call: Call) -> JSON:
        return {"text": call.text}

    def delta(self, call: Call, text: str) -> Event:
        return Event(call.sse(text), "delta")


class Nothing(PlainEvents):
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
        self.status, self.framing = status, "length"
        self.steps = [Event(body)] if body else []
        self.headers["Content-Type"] = media

    def json(self, status: int, body: object) -> None:
        data = b"" if body is None else dumps(body).encode("utf-8")
        self.plain(status, data, "application/json")

    def flood(self, first: Steps, rest: Steps) -> None:
        """Become an answer that never ends: the *rest* again and again."""
        self.steps = itertools.chain(first, itertools.cycle(rest))
        self.endless = True

    def begin(self, head: Callable[[bytes], Steps]) -> None:
        """Begin with what *head* makes of the header block."""
        self.head = head

    def line(self, text: str) -> Event:
        """Return a line of the body as it is, with the line end of the protocol, and
        another one in an event stream.
        """
        eol = self.call.eol
        ending = eol * 2 if self.is_sse else eol
        return Event((text.replace("\n", eol) + ending).encode("utf-8"))

    def comment(self) -> Event:
        """Return a keep-alive: a comment, or an empty line where the protocol has no
        comments.
        """
        return self.line(": ping" if self.is_sse else "")

    def delta(self, text: str) -> bytes:
        return self.call.protocol.delta(self.call, text).data

    def error(self, trouble: Trouble) -> Event:
        return self.call.protocol.error_event(self.call, trouble)


TABLE = """
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
    return (s for s in steps if not (isinstance(s, Event) and s.kind in kinds))


def cut(answer: Answer, count: int, *steps: Step) -> Steps:
    """Return the first *count* bytes, then *steps*."""
    return itertools.chain(first_bytes(answer.steps, count), steps)


def cut_event(answer: Answer, count: int, *steps: Step) -> Steps:
    """Return the first *count* events, then *steps*."""
    return itertools.chain(first_events(answer.steps, count), steps)


def cut_finish(answer: Answer, *steps: Step) -> Steps:
    """Return all up to the finish reason, then *steps*."""
    return itertools.chain(to_finish(answer.steps), steps)


def inserted(answer: Answer, count: int, *steps: Step) -> Steps:
    """Return the body with *steps* after the first *count* events."""
    rest = iter(answer.steps)
    return itertools.chain(first_events(rest, count), steps, rest)


def for_ever(answer: Answer, count: int, data: bytes) -> None:
    """After *count* events, only these bytes again and again."""
    answer.flood(first_events(answer.steps, count), [Pause(TICK), Event(data)])


# Faults of more than a line


def drop_chunk(answer: Answer, count: int) -> Steps:
    torn = b"40\r\ndata: " if answer.framing == "chunked" else b"data: "
    return cut(answer, count, Raw(torn), DROP)


def dripped(steps: Steps, seconds: float) -> Iterator[Step]:
    for step in steps:
        if not isinstance(step, Event):
            yield step
            continue
        for byte in step.data:
            yield Event(bytes([byte]))
            yield Pause(seconds)


def pinged(steps: Steps, pings: list[Event]) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, Event):
            yield from pings
        yield step


def drip_forever(answer: Answer, count: int) -> None:
    start, byte = (b":", b"-") if answer.is_sse else (b"", b" ")
    answer.steps = inserted(answer, count, Event(start))
    for_ever(answer, count + 1, byte)


def error_event_done(answer: Answer, count: int) -> Steps:
    done = answer.line("data: [DONE]")
    return cut_event(answer, count, answer.error(OVERLOADED), done)


def named_error(answer: Answer, count: int) -> Steps:
    error = answer.call.protocol.error(OVERLOADED)
    return cut_event(answer, count, Event(answer.call.sse(error, "error")))


def stray_error(answer: Answer, count: int) -> Steps:
    error = {"code": 500, "message": OVERLOADED.message, "type": "server_error"}
    return cut_event(answer, count, answer.line("error: " + dumps(error)))


def bare_error(answer: Answer, count: int) -> Steps:
    error = {"code": 503, "message": "The model is overloaded."}
    body = {"error": {**error, "status": "UNAVAILABLE"}}
    return cut_event(answer, count, answer.line(json.dumps(body, indent=2)))


def malformed(answer: Answer, count: int) -> Steps:
    torn = answer.delta("lost in the noise").decode("utf-8").rstrip()[:-8]
    return inserted(answer, count, answer.line(torn))


def garbage(answer: Answer, count: int) -> Steps:
    return inserted(answer, count, answer.line("data: hello from the proxy"))


def different(answer: Answer, _: Argument) -> Steps:
    call = answer.call
    other = "Quite another story: " + call.options.text.swapcase()
    return call.protocol.events(call.restart(other))


def parse_status(text: str) -> tuple[int, dict[str, str]]:
    """Parse ``CODE:name=value:name=value``."""
    code, *headers = re.split(r":(?=[A-Za-z-]+=)", text)
    return int(code), dict(header.partition("=")[::2] for header in headers)


def status(answer: Answer, argument: tuple[int, dict[str, str]]) -> None:
    code, headers = argument
    answer.json(code, answer.call.protocol.error(trouble_of(code)))
    answer.headers.update(headers)


def html(answer: Answer, code: int) -> None:
    title = "{} {}".format(code, REASONS.get(code, "Unknown"))
    head = f"<html>\n<head><title>{title}</title></head>\n"
    page = head + f"<body><h1>{title}</h1><hr>proxy</body>\n</html>\n"
    answer.plain(code, page.encode("utf-8"), "text/html; charset=utf-8")


def redirect(answer: Answer, url: str) -> None:
    answer.plain(307, b"", "text/plain")
    answer.headers["Location"] = url


def half(head: bytes) -> Step:
    return Raw(head[: len(head) // 2])


def headers_drip(answer: Answer, seconds: float) -> None:
    def drops(head: bytes) -> Steps:
        for byte in head:
            yield Raw(bytes([byte]))
            yield Pause(seconds)

    answer.begin(drops)


def endless_event(answer: Answer, _: Argument) -> None:
    text = b"data: another line of the same event\n" if answer.is_sse else b"{}\n"
    answer.flood([], [Event(text * 1000)])


def endless_answer(answer: Answer, _: Argument) -> None:
    more = answer.delta("and so on, and so on, ") * 100
    answer.flood(first_events(answer.steps, 1), [Event(more)])


def bomb(answer: Answer, _: Argument) -> None:
    answer.framing = "gzip"
    answer.flood([LINE], [Event(b"a" * (1 << 20))])


# The table


class Fault(NamedTuple):
    """How a fault is made: by a function that changes the answer, or returns the steps
    of another body. An argument is needed where there is no default.
    """

    apply: FaultFunction
    default: Argument = None
    convert: Callable[[str], Argument] = int


DROP, RESET, STALL = Stop("drop"), Stop("reset"), Stop("stall")
LINE = Event(b"data: ")
MAIL = Raw(b"220 mail.example.org ESMTP ready\r\n")
NOTHINGS = b"\n\nevent: nothing\n\nid\n\n:\n\n" * 2000
FAULTS = {
    "ok": Fault(lambda a, _: None),
    # Cuts
    "drop": Fault(lambda a, n: cut(a, n, DROP), BYTES),
    "drop-event": Fault(lambda a, n: cut_event(a, n, DROP), EVENTS),
    "drop-chunk": Fault(drop_chunk, BYTES),
    "reset": Fault(lambda a, n: cut(a, n, RESET), BYTES),
    "reset-event": Fault(lambda a, n: cut_event(a, n, RESET), EVENTS),
    "end": Fault(lambda a, n: cut(a, n), BYTES),
    "end-event": Fault(lambda a, n: cut_event(a, n), EVENTS),
    "bad-chunk": Fault(lambda a, n: cut_event(a, n, Raw(b"what?\r\n"), DROP), EVENTS),
    # Silence and noise
    "stall": Fault(lambda a, n: cut(a, n, STALL), BYTES),
    "stall-event": Fault(lambda a, n: cut_event(a, n, STALL), EVENTS),
    "slow-first": Fault(
        lambda a, s: itertools.chain([Pause(s)], a.steps), convert=float
    ),
    "drip": Fault(lambda a, s: dripped(a.steps, s), 0.001, float),
    "pings": Fault(lambda a, n: pinged(a.steps, [a.comment()] * n), 1),
    "ping-forever": Fault(lambda a, n: for_ever(a, n, a.comment().data), EVENTS),
    "drip-forever": Fault(drip_forever, EVENTS),
    "empty-deltas": Fault(lambda a, n: for_ever(a, n, a.delta("")), EVENTS),
    # The end
    "no-done": Fault(lambda a, _: without(a.steps, "end", "last")),
    "no-finish": Fault(lambda a, _: without(a.steps, "finish", "last")),
    "finish-then-stall": Fault(lambda a, _: cut_finish(a, STALL)),
    "finish-then-reset": Fault(lambda a, _: cut_finish(a, RESET)),
    "finish-then-error": Fault(lambda a, _: cut_finish(a, a.error(OVERLOADED))),
    "done-then-open": Fault(lambda a, _: itertools.chain(a.steps, [STALL])),
    # Errors in the stream
    "error-event": Fault(lambda a, n: cut_event(a, n, a.error(OVERLOADED)), EVENTS),
    "error-event-done": Fault(error_event_done, EVENTS),
    "fatal-error": Fault(lambda a, n: cut_event(a, n, a.error(INVALID)), EVENTS),
    "named-error": Fault(named_error, EVENTS),
    "stray-error": Fault(stray_error, EVENTS),
    "bare-error": Fault(bare_error, EVENTS),
    "malformed": Fault(malformed, EVENTS),
    "garbage": Fault(garbage, EVENTS),
    "different": Fault(different),
    # Other answers than a stream
    "status": Fault(status, convert=parse_status),
    "quota": Fault(lambda a, _: a.json(429, a.call.protocol.error(QUOTA))),
    "html": Fault(html, 502),
    "json": Fault(lambda a, _: a.json(200, a.call.protocol.whole(a.call))),
    "json-error": Fault(lambda a, _: a.json(200, a.call.protocol.error(OVERLOADED))),
    "empty": Fault(lambda a, _: []),
    "redirect": Fault(redirect, convert=str),
    # No answer, or no HTTP
    "refuse": Fault(lambda a, _: a.begin(lambda head: [DROP])),
    "no-http": Fault(lambda a, _: a.begin(lambda head: [MAIL, DROP])),
    "header-cut": Fault(lambda a, _: a.begin(lambda head: [half(head), DROP])),
    "headers-stall": Fault(lambda a, _: a.begin(lambda head: [half(head), STALL])),
    "headers-drip": Fault(headers_drip, 0.05, float),
    # Without end
    "endless-line": Fault(lambda a, _: a.flood([LINE], [Event(b"a" * 65536)])),
    "endless-event": Fault(endless_event),
    "endless-answer": Fault(endless_answer),
    "empty-events": Fault(lambda a, _: a.flood([], [Event(NOTHINGS)])),
    "bomb": Fault(bomb),
}
USAGES = {text.partition(":")[0]: text for text in re.findall(r"(?m)^[a-z]\S*", TABLE)}


def fault_table() -> str:
    """Return the table of faults in reStructuredText."""
    return TABLE.strip()


def parse_fault(text: str) -> Callable[[Answer], None]:
    """Compile ``name:argument+name:argument`` to one function; unknown names and bad
    arguments are ValueErrors.
    """
    parts = [compile_fault(part) for part in re.split(r"\+(?=[a-z])", text)]

    def apply(answer: Answer) -> None:
        for function, argument in parts:
            steps = function(answer, argument)
            if steps is not None:
                answer.steps = steps

    return apply


def compile_fault(text: str) -> tuple[FaultFunction, Argument]:
    name, colon, argument = text.strip().partition(":")
    if name not in FAULTS:
        known = " ".join(FAULTS)
        raise ValueError(f"unknown fault {name!r}, known are: {known}")
    row, usage = FAULTS[name], USAGES[name]
    if colon and ":" not in usage:
        raise ValueError(f"fault {name!r} takes no argument")
    if not colon and ":" in usage and row.default is None:
        raise ValueError(f"fault {name!r} needs an argument: {usage}")
    try:
        return row.apply, row.convert(argument) if colon else row.default
    except ValueError:
        raise ValueError(f"bad argument in {text!r}, wanted is {usage}") from None


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
    steps = answer.steps
    if options.coalesce > 1:
        steps = grouped(steps, options.coalesce)
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
    try:  # not by the method of an SSLSocket, which forgets its encryption
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


def read_request(connection: Connection) -> Request:
    """Read one request with its body."""
    head = connection.read_until(b"\r\n\r\n").decode("latin-1")
    lines = head.lstrip("\r\n").split("\r\n")
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


AnyListener = TypeVar("AnyListener", bound="Listener")


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

    def __enter__(self: AnyListener) -> AnyListener:  # noqa: PYI019  (Self: 3.11)
        self.start()
        return self

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
        except (Closed, OSError, ValueError):
            pass  # or a handshake that failed, or a request that is none
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
        self.name = str(getattr(entry, "__name__", "a function"))
        if isinstance(entry, str):
            self.name = entry
        self.rewrite = parse_fault(entry if isinstance(entry, str) else "ok")


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

    def handle(self, connection: Connection) -> bool:
        request = read_request(connection)
        self.record(request)
        turn = self._turn(request.number - 1)
        if self._log:
            asked = f"{request.number:>4} {request.method} {request.target}"
            self._log(f"{asked} -> {turn.name}")
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
        is_there = re.search(f"(?:{protocol.path})$", request.path)
        if is_there and request.method in protocol.methods:
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
    texts = {"exact": rest, "repeat": prefix + rest}
    return replace(call, text=texts.get(mode, call.whole))


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
# Command line
# -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        description="A scripted, faulty LLM server on the loopback interface."
    )
    add = command.add_argument
    add("--port", type=int, default=8000, help="default 8000; 0 for any")
    faults = "faults, separated by commas: drop:200,stall,ok"
    add("--script", default="", help=faults)
    add("--loop", action="store_true", help="start the script again at its end")
    add("--text", default=STORY, help="what the server tells")
    pause = "seconds before each delta, default 0.02"
    add("--delay", type=float, default=0.02, help=pause)
    add("--framing", choices=list(FRAMINGS), default="chunked")
    life = "seconds until it stops, default 600"
    add("--lifetime", type=float, default=600, help=life)
    add("--list", action="store_true", help="print the table of faults")
    options = vars(command.parse_args(arguments))
    if options.pop("list"):
        print(fault_table())
        return 0
    script = [part for part in re.split(r",(?=[a-z])", options.pop("script")) if part]
    try:
        server = FlakyServer(script=script, log=say, **options)
    except ValueError as error:
        command.error(str(error))
    try:
        serve(server)
    except OSError as error:
        command.error("cannot listen on port {}: {}".format(options["port"], error))
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
