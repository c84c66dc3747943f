# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The resilient_sse authors
"""Read an LLM's stream from synchronous Python: the whole answer, once, or one error.

The loop of every tutorial (``requests.post(..., stream=True)``, ``iter_lines``,
``json.loads``) takes a cut answer for a whole one, hangs behind keep-alive pings,
prints a text twice when it tries again and sends your key along a redirect.  This
file is that loop done right.  Copy it beside your script; it needs only requests::

    from resilient_sse import stream_chat

    for tok in stream_chat("Tell me a story", model="gpt-4o-mini"):
        print(tok, end="", flush=True)

What the loop yields is the answer to its last character; otherwise it raises one
:exc:`StreamingError` that carries everything received (``.text``, ``.result``) and
what was tried (``.history``).

The map (each section needs only those above it; search for ``# N.``):

 1. Errors                       what can go wrong, as one tree
 2. Records and options          the values that flow, the knobs that exist
 3. Event stream decoder         bytes -> ServerSentEvent, as WHATWG wrote it
 4. Answer                       what a stream has said so far
 5. Provider errors              any error body -> APIError
 6. Dialects                     one small class a provider
 7. Intake                       bytes of a body -> pieces of the answer
 8. Recovery                     what to do after a failure, and when

 ------------------------------- I/O starts here -------------------------------

 9. Watchdog                     one thread that ends what outlives its time
10. Transport                    one request, its response, every byte at once
11. Chat streams                 stream_chat, complete_chat, ChatStream
12. Event streams                stream_events, for any SSE endpoint

 ------------------------ optional: may be cut off here ------------------------

13. Health monitor               many streams -> one report
14. Stream trace                 one stream -> a report for a bug tracker
15. Notebook display             live Markdown
16. Journal                      journal=PATH: what was received outlives the script
17. Command line                 python resilient_sse.py --help

Specification: https://html.spec.whatwg.org/multipage/server-sent-events.html
Upstream: the project resilient-sse on PyPI (the licence is the last block)
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import copy
import email.utils
import errno
import functools
import heapq
import http.client
import http.cookiejar
import itertools
import json as jsonlib
import logging
import math
import operator
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    TypeVar,
    cast,
)
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import requests
import urllib3.util.connection
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    NewConnectionError,
    ProxyError,
)
from urllib3.util import parse_url, wait_for_write

__version__ = "0.1.0"

__all__ = [
    "DIALECTS",
    "APIError",
    "Answer",
    "ChatResult",
    "ChatStream",
    "Delta",
    "Dialect",
    "EventStream",
    "IncompleteStreamError",
    "Limits",
    "MalformedStreamError",
    "Observer",
    "RequestRecord",
    "ResumeMismatchError",
    "Retry",
    "SSEDecoder",
    "ServerSentEvent",
    "StreamAbortedError",
    "StreamConnectionError",
    "StreamLimitError",
    "StreamRecord",
    "StreamStats",
    "StreamTimeoutError",
    "StreamingError",
    "Timeouts",
    "ToolCall",
    "Usage",
    "complete_chat",
    "stream_chat",
    "stream_events",
]

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())


# ---------------------------------------------------------------------------
# 1. Errors
# ---------------------------------------------------------------------------
# One tree.  Retrying changes how often something is tried, never which type the
# caller sees at the end.  Message texts are for people and are not API.
#
#   StreamingError
#     StreamConnectionError      could not connect, or the connection dropped
#     StreamTimeoutError         a time limit of Timeouts passed (a TimeoutError too)
#     IncompleteStreamError      ended cleanly without completing
#       ResumeMismatchError      the replay differs from what was handed out
#     APIError                   the provider said no: HTTP status or error event
#     MalformedStreamError       not an event stream, or too much malformed data
#     StreamLimitError           a limit of Limits was reached
#     StreamAbortedError         closed from another thread, or left before its end


def _revive(
    kind: type[StreamingError], args: tuple[Any, ...], facts: dict[str, Any]
) -> StreamingError:
    error = kind(*args)
    error.__dict__.update(facts)
    return error


class StreamingError(Exception):
    """A stream did not complete; what it had said is kept on the error.

    :param message: what happened, after how much, and what to do about it.
    :param facts: the attributes below, and those of the subclass.

    Every error can be pickled, with all of these:
    """

    #: The text that was handed out (for :func:`complete_chat`: received) so far.
    text: str = ""
    #: The :class:`ChatResult` of what was received; None for event streams.
    result: ChatResult | None = None
    #: One :class:`RequestRecord` for each request that was made.
    history: tuple[RequestRecord, ...] = ()
    #: Whether the same request may succeed when it is sent again.
    retryable: bool = False
    #: When it happened: ``connect``, ``request`` (sending, and waiting for the
    #: headers), ``first token``, ``stream`` or ``end`` (behind a finish reason).
    phase: str = ""

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self.args, dict(self.__dict__))


class StreamConnectionError(StreamingError):
    """The connection could not be made, or broke; ``.phase`` says when."""


class StreamTimeoutError(StreamingError, TimeoutError):
    """A limit of :class:`Timeouts` passed; ``.kind`` is the name of its field."""

    kind: str = ""


class IncompleteStreamError(StreamingError):
    """The body ended cleanly, but neither end marker nor finish reason was seen."""


class ResumeMismatchError(IncompleteStreamError):
    """The replay of a dropped answer differs from what was handed out before."""


class APIError(StreamingError):
    """The provider refused or failed: by an HTTP status, or inside the stream."""

    #: The HTTP status, or the status named by an error event; None if neither.
    status: int | None = None
    #: The provider's own error code and type, as sent; None if absent.
    code: str | int | None = None
    type: str | None = None
    #: The body of the error as text, at most 64 KiB of it.
    body: str = ""
    #: The provider's name for this request, for its support desk.
    request_id: str | None = None
    #: Seconds that the provider asked to wait; None if it did not.
    retry_after: float | None = None


class MalformedStreamError(StreamingError):
    """What came is not an event stream, or too much of it is malformed."""


class StreamLimitError(StreamingError):
    """A limit of :class:`Limits` was reached; ``.limit`` is the name of its field."""

    limit: str = ""


class StreamAbortedError(StreamingError):
    """The stream was closed before its end: by another thread, or left by its caller.

    A loop that its own thread has closed just ends; of that, only observers and
    :meth:`ChatStream.complete` get this error.
    """


# -- what may be shown
# One list of secret names, one search for secrets in a text, one way to show a URL.
# A secret is looked for in a text as it stands, and in what the text says once its
# escapes are undone.  What a server sends is cut by _clipped alone: its dots tell the
# search where a secret may have been cut, so that none survives in part.

#: Names of headers and of query parameters; the short words only as whole ones.
_SECRET_NAME = re.compile(
    r"^(?!.*rate-?limit).*(?:auth|key|token(?!s)|secret|cookie|passw|passphrase|bearer"
    r"|credential|signature|session|organization|project"
    r"|(?<![a-z])(?:jwt|pass|pwd|sid|sig)(?![a-z]))|^code$",
    re.IGNORECASE,
)
#: All but tab and line feed; what turns the direction of text counts, too.
_CONTROL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_LEAST_SECRET = 4  # bytes; anything shorter stands everywhere by chance
#: How URLs, JSON and HTML write a byte or character, be it escaped once more or twice.
#: (Each branch begins with a byte: such patterns are searched for at full speed.)
_ESCAPE = (
    rb"%(?:25){0,2}(?P<octet>[0-9A-Fa-f]{2})|\\u(?P<code>[0-9A-Fa-f]{4})"
    rb"|&(?:amp;){0,2}(?:#[xX]0{0,4}(?P<hex>[0-9A-Fa-f]{1,5})"
    rb"|#0{0,4}(?P<number>[0-9]{1,6})|(?P<name>amp|quot|apos|lt|gt));"
)
_ENTITIES = {b"amp": b"&", b"quot": b'"', b"apos": b"'", b"lt": b"<", b"gt": b">"}
#: What may be left of one at the end, or before dots, where a text was cut.
_CUT_ESCAPES = (rb"%[0-9A-Fa-f%]{0,5}", rb"\\(?:u[0-9A-Fa-f]{0,3})?", rb"&[#\w;]{0,19}")
_CUT_OR_ESCAPE = b"|".join([c + rb"(?=\.\.\.|\Z)" for c in _CUT_ESCAPES] + [_ESCAPE])
_CUT_AT_END = b"(?:%s)\\Z" % b"|".join(_CUT_ESCAPES)
_LONGEST_ESCAPE = 20  # bytes; it bounds what waits for more
_FILLING = b"\\+ \t"  # before a character, or in a blank's place; it says nothing


class _Secret(str):
    """A string that a traceback with local variables does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def _veiled(value: Any) -> Any:
    """A string, or the strings in a dict, as no traceback shows them."""
    if isinstance(value, Mapping):
        return {name: _veiled(item) for name, item in value.items()}
    return _Secret(value) if isinstance(value, str) else value


def _veiled_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same for those of them that may hold a secret."""
    return {
        name: _veiled(value)
        if name in ("base_url", "headers") or _SECRET_NAME.search(name)
        else value
        for name, value in arguments.items()
    }


def _clipped(text: object, size: int) -> str:
    """At most so many characters; dots say that some are missing."""
    whole = str(text)
    return whole if len(whole) <= size else whole[: size - 3] + "..."


def _one_line(text: str) -> str:
    """The text without control characters, in one line."""
    return " ".join(_CONTROL.sub(" ", text).split())


def _bare_url(url: str) -> str:
    """The URL as it may be shown: no query, no user."""
    return re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])


def _shown_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """The headers as they may be shown."""
    return {
        _one_line(str(name)): "***"
        if _SECRET_NAME.search(str(name))
        else _one_line(str(value))
        for name, value in headers.items()
    }


def _secrets_in(
    url: str, headers: Mapping[str, str], *more: str
) -> tuple[_Secret, ...]:
    """What a server may echo and nobody else may see, the longest first."""
    query = url.partition("#")[0].partition("?")[2]
    pairs = [pair.partition("=") for pair in query.split("&")]
    named = [*headers.items(), *((name, value) for name, _, value in pairs)]
    values = [value for name, value in named if _SECRET_NAME.search(name)]
    tokens = [value.partition(" ")[2].strip() for value in values]  # without "Bearer"
    parts = re.findall(r'=\s*"?([^\s",;]{8,})', "\n".join(values))  # of cookies, AWS
    user, at, _ = url.partition("//")[2].partition("/")[0].rpartition("@")
    if at:
        login = ":".join(map(unquote, user.partition(":")[::2]))
        tokens.append(base64.b64encode(login.encode("latin-1", "replace")).decode())
    for token in tokens:
        try:
            login = base64.b64decode(token).decode("latin-1")
        except ValueError:
            continue  # no credentials of Basic authentication (RFC 7617)
        name, colon, password = login.partition(":")
        values += [password or name] if colon else []
    values += [*more, *tokens, *parts]
    found = {_Secret(value) for value in values if len(value) >= _LEAST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def _meaning(escape: re.Match[bytes]) -> bytes:
    """The bytes that an escape stands for; one that was cut says nothing."""
    kind = escape.lastgroup
    if kind in (None, "byte"):
        return escape[0] if kind else b""
    if kind == "name":
        return _ENTITIES[escape[kind]]
    code = int(escape[kind], 10 if kind == "number" else 16)
    return bytes([code]) if kind == "octet" else chr(code).encode("utf-8", "replace")


@functools.lru_cache(maxsize=128)
def _spellings(secret: str) -> tuple[bytes, bytes]:
    """A secret as it stands, and as it reads where escapes are undone."""
    exact = secret.encode("utf-8", "surrogatepass")
    said = re.sub(_ESCAPE, _meaning, exact).translate(None, _FILLING)
    return exact, said if len(said) >= _LEAST_SECRET else exact


def _search(text: bytes, secret: bytes, least: int) -> Iterator[tuple[int, int, bool]]:
    """Where the secret or its beginning stands, how much of it, and whether it is all."""
    at = text.find(secret[:_LEAST_SECRET])
    while at >= 0:
        seen = text[at : at + len(secret) + 2]
        begun = seen.partition(b"...")[0]
        if seen.startswith(secret):
            yield at, len(secret), True
        elif secret.startswith(begun):  # it is cut before dots, or by the end
            yield at, len(begun), False
        at = text.find(secret[:_LEAST_SECRET], at + 1)
    for count in range(least, _LEAST_SECRET):
        if text.endswith(secret[:count]):
            yield len(text) - count, count, False


def _find_secrets(
    data: bytes, secrets: Iterable[str], least: int = _LEAST_SECRET
) -> Iterator[tuple[int, int, bool]]:
    """Where a secret stands, or its beginning at the end or before dots.

    :param least: how short a beginning at the very end counts.
    :returns: from where, to where, and whether it is whole.
    """
    spellings = list(map(_spellings, secrets))
    # As it stands, since a secret may stand behind what then looks like an escape: %2.
    for exact, _ in spellings:
        for at, count, is_whole in _search(data, exact, least):
            yield at, at + count, is_whole
    text = re.sub(_CUT_OR_ESCAPE, _meaning, data).translate(None, _FILLING)
    found = [hit for _, said in spellings for hit in _search(text, said, least)]
    if not found:
        return
    places = [  # of each byte of the text in the data
        escape.span()
        for escape in re.finditer(_CUT_OR_ESCAPE + rb"|(?P<byte>[\s\S])", data)
        for _ in _meaning(escape).translate(None, _FILLING)
    ]
    places.append((len(data), len(data)))
    for at, count, is_whole in found:
        # What was cut is so up to the dots, or the end, be it half an escape.
        stop = places[at + count - 1][1] if is_whole else places[at + count][0]
        yield places[at][0], stop, is_whole


def _hidden(text: str, secrets: Iterable[str]) -> str:
    """The text without secrets, be they whole or cut, at its end or before dots."""
    data = text.encode("utf-8", "surrogatepass")
    pieces, last = [], 0
    for start, stop, _ in sorted(_find_secrets(data, secrets)):
        if start >= last:
            pieces += [data[last:start], b"***"]
        last = max(last, stop)
    if not pieces:
        return text
    return b"".join([*pieces, data[last:]]).decode("utf-8", "surrogatepass")


def _hidden_in(value: Any, secrets: Iterable[str]) -> Any:
    """The same for the strings in a JSON value."""
    if isinstance(value, str):
        return _hidden(value, secrets)
    if isinstance(value, dict):
        return {
            _hidden(str(k), secrets): _hidden_in(v, secrets) for k, v in value.items()
        }
    return [_hidden_in(v, secrets) for v in value] if isinstance(value, list) else value


class _Stars(bytes):
    """Bytes of a body in which stars stand for a secret."""


def _masked(data: bytes, secrets: Sequence[str]) -> tuple[bytes, bytes]:
    """Bytes of a body as they may be kept: a secret becomes as many stars.

    :returns: those bytes, and the rest: what may be the beginning of a secret, which
        the next read ends.  Put the rest before the bytes of that read; behind the
        last one, see :func:`_masked_rest`.  It never ends an event (no secret has a
        line feed in it), so nothing of it was handed out.
    """
    size = end = len(data)
    is_open = bool(secrets) and not data.endswith(b"\n")
    found = list(_find_secrets(data, secrets, 1 if is_open else _LEAST_SECRET))
    if is_open:
        cut = re.compile(_CUT_AT_END).search(data, max(0, size - _LONGEST_ESCAPE))
        begun = [s for s, e, is_whole in found if e == size and not is_whole]
        end = min([cut.start() if cut else size, *begun])
        if end < size - _LONGEST_ESCAPE * max(map(len, secrets)):
            end = size
    # A whole one that reaches into the rest is part of it, or its end would be bare.
    end = min([end, *(start for start, stop, _ in found if start < end < stop)])
    masked = bytearray(data)
    for start, stop, is_whole in found:
        if is_whole:
            masked[start:stop] = b"*" * (stop - start)
    kind = _Stars if masked[:end] != data[:end] else bytes
    return kind(masked[:end]), data[end:]


def _masked_rest(rest: bytes) -> bytes:
    """What :func:`_masked` held back, where nothing follows."""
    return _Stars(b"*" * len(rest)) if len(rest) >= _LEAST_SECRET else rest


# ---------------------------------------------------------------------------
# 2. Records and options
# ---------------------------------------------------------------------------
# Records are values that flow: tuples, immutable, cheap.  Options are what a caller
# chooses: frozen, comparable, checked when they are made.  Times are seconds; None
# means "no limit", never 0.


def _words(text: str) -> tuple[str, ...]:
    """Words as they are easiest to read."""
    return tuple(text.split())


class ServerSentEvent(NamedTuple):
    """One event of an event stream, as the WHATWG specification dispatches it.

    :param event: the event type; ``message`` where the stream names none.
    :param data: its data lines, joined with line feeds.
    :param id: the last event ID at the time of its dispatch; "" if never set.
    """

    event: str
    data: str
    id: str


class Delta(NamedTuple):
    """One piece of an answer.

    :param kind: ``text``, ``reasoning``, ``refusal`` or ``tool_call``.
    :param text: the piece itself; for a tool call a fragment of its arguments.
    :param index: the choice it belongs to (0 unless ``n`` > 1 was asked for).
    :param data: for a tool call ``{"index", "id", "name"}`` of the call; else None.
    """

    kind: str
    text: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    data: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.text


class Usage(NamedTuple):
    """Tokens billed for the last request; a count that was not sent is None.

    :param input_tokens: tokens of the prompt.
    :param output_tokens: tokens of the answer, reasoning included, as billed.
    :param raw: the provider's own object.
    """

    input_tokens: int | None
    output_tokens: int | None
    raw: dict[str, Any]


class ToolCall(NamedTuple):
    """A tool call that was received whole.

    :param id: what the answer to the call must quote; None where there is none.
    :param name: the tool's name.
    :param arguments: JSON text (``{}`` for none); free text for custom tools.
    """

    id: str | None
    name: str
    arguments: str


class RequestRecord(NamedTuple):
    """One request of a call, and what ended it.

    :param attempt: its number, counted from 1.
    :param action: why it was made: ``start``, ``retry``, ``continue``, ``ask``,
        ``replay``, ``reattach`` or ``restart``.
    :param error: the name of the error type that ended it; "" for a good end.
    :param message: that error's message.
    :param wait: seconds waited after it; None if nothing followed.
    :param usage: the usage it reported, if it lived to do so.
    :param seconds: how long it took.
    """

    attempt: int
    action: str
    error: str
    message: str
    wait: float | None
    usage: Usage | None
    seconds: float


class StreamStats(NamedTuple):
    """Counts of one call over all its requests.

    :param malformed: pieces of malformed data that were ignored.
    :param bytes: of the bodies, decompressed.
    :param events: dispatched events.
    :param deltas: pieces received that were not empty.
    :param requests: requests made, the first included.
    :param retries: requests beyond the first.
    :param first_token_seconds: from the start of the call to its first delta; None
        before that.
    :param seconds: so far, or of the whole call once it is over.
    :param cut_tool_calls: tool calls that were not received whole.
    :param text_dropped: characters that ``Limits.text`` did not keep.
    """

    malformed: int = 0
    bytes: int = 0
    events: int = 0
    deltas: int = 0
    requests: int = 0
    retries: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    cut_tool_calls: int = 0
    text_dropped: int = 0


class ChatResult(NamedTuple):
    """Everything an answer brought.

    :param text: the visible text of choice 0.
    :param reasoning: its reasoning (thinking), as far as the provider shows it.
    :param refusal: the refusal, where the provider marks it as such.
    :param tool_calls: the calls of choice 0 that came whole.
    :param choices: text by choice, for ``n`` > 1.
    :param message: the assistant turn in the dialect's own form: append it to
        ``messages`` for the next turn.
    :param finish_reason: ``stop``, ``length``, ``tool_calls``, ``content_filter`` or
        ``other``; None if none was sent.
    :param raw_finish_reason: the provider's own word for it.
    :param usage: of the last request; None if never seen.
    :param model: the model that the provider says has answered.
    :param id: the provider's ID of the answer.
    :param headers: of the last response (request ID, rate limits).
    :param history: one record for each request.
    :param seams: offsets in ``text`` where another request took over.
    :param stats: counts.
    """

    text: str
    reasoning: str
    refusal: str
    tool_calls: tuple[ToolCall, ...]
    choices: dict[int, str]
    message: Any
    finish_reason: str | None
    raw_finish_reason: str | None
    usage: Usage | None
    model: str | None
    id: str | None
    headers: Mapping[str, str]
    history: tuple[RequestRecord, ...]
    seams: tuple[int, ...]
    stats: StreamStats


class StreamRecord(NamedTuple):
    """What an :class:`Observer` is told.

    :param what: ``start``, ``request``, ``response``, ``chunk``, ``event``,
        ``token``, ``retry``, ``restart``, ``error`` or ``complete``.
    :param stream: the number of the stream in this process.
    :param seconds: since the stream began.
    :param attempt: the request it belongs to, counted from 1; 0 before the first.
    :param why: one line for people; never a key, a prompt or a body.
    :param data: by ``what``, see :class:`Observer`.
    """

    what: str
    stream: int
    seconds: float
    attempt: int
    why: str
    data: Any

    def __str__(self) -> str:
        if self.what == "token":
            return str(self.data)
        place = f"stream {self.stream}, request {self.attempt}"
        return f"{self.seconds:8.3f} s  {place}  {self.what}: {self.why}"


if TYPE_CHECKING:  # type aliases are no code: 3.7 cannot run them
    Piece = str | Delta
    Messages = str | Sequence[Any]
    Body = dict[str, Any]
    Turns = Sequence[tuple[str, str]]
    Hook = Callable[[StreamRecord], Any]
    ResumeMode = str | Callable[[Body, str], Body]


class Observer:
    """Sees what a stream does, and never steers it.

    Subclass it, or pass plain functions: ``Observer(on_token=print)``.  Every method
    is given one :class:`StreamRecord`, on the caller's thread; an exception in it
    closes the stream and reaches the caller.  ``on_start`` comes first, and exactly
    one of ``on_complete`` and ``on_error`` last.

    ============ ===============================================================
    method       ``record.data``
    ============ ===============================================================
    on_start     dict: ``model dialect url`` (the URL without its query)
    on_request   dict: ``method url action headers body_bytes`` (secrets masked)
    on_response  dict: ``status headers``
    on_chunk     bytes of the body, decompressed; a secret in it is as many stars
    on_event     :class:`ServerSentEvent`
    on_token     :class:`Delta`; the record's ``str()`` is its text
    on_retry     dict: ``error wait action``, before the wait
    on_restart   the same: what was shown so far is void, the answer starts over
    on_error     the :class:`StreamingError` that ended the stream for good
                 (:exc:`StreamAbortedError` where the caller left early)
    on_complete  :class:`ChatResult`; for event streams :class:`StreamStats`
    ============ ===============================================================
    """

    def __init__(self, **hooks: Hook) -> None:
        for name, hook in hooks.items():
            if not (name.startswith("on_") and hasattr(Observer, name)):
                known = [n for n in vars(Observer) if n.startswith("on_")]
                raise TypeError("no hook {!r}: use {}".format(name, ", ".join(known)))
            if not callable(hook):
                raise TypeError(f"Observer({name}={hook!r}): needs a function")
            setattr(self, name, hook)

    def on_start(self, record: StreamRecord) -> None:
        """Called before the first request."""

    def on_request(self, record: StreamRecord) -> None:
        """Called before each request is sent."""

    def on_response(self, record: StreamRecord) -> None:
        """Called when the headers of a response are in."""

    def on_chunk(self, record: StreamRecord) -> None:
        """Called for each read of the body."""

    def on_event(self, record: StreamRecord) -> None:
        """Called for each event of the stream."""

    def on_token(self, record: StreamRecord) -> None:
        """Called for each delta, just before it is handed out."""

    def on_retry(self, record: StreamRecord) -> None:
        """Called when another request is decided on, before the wait."""

    def on_restart(self, record: StreamRecord) -> None:
        """Called when the answer starts over and what was shown is void."""

    def on_error(self, record: StreamRecord) -> None:
        """Called once, when the stream ends without having completed."""

    def on_complete(self, record: StreamRecord) -> None:
        """Called once, when the stream has completed."""


# What a field of the options may be, and what it needs otherwise: its types, the least
# and the most, and the words for both.  (Beyond 1e9 s, the clocks of some systems
# overflow.)
_SECONDS = ((int, float), 0, 1e9, "seconds", "0 to 1e+09 seconds")
_WHOLE = "a whole number, or None for no limit"
_LIMIT = (int, 1, math.inf, _WHOLE, "1 or more, or None for no limit")
_COUNT = (int, 0, math.inf, _WHOLE, "0 or more, or None for no limit")


class _Options:
    """Frozen, comparable and printable; dataclasses would cost a third of our import."""

    #: The kind of each field, by its name.
    _fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    _takes_none = True

    def __init__(self, given: Mapping[str, Any]) -> None:
        # Given are the locals() of a constructor: each field has its argument's name.
        for name, (types, least, most, needs, size) in self._fields.items():
            value = vars(self)[name] = given[name]
            where = f"{type(self).__name__}({name}={value!r})"
            if value is None and self._takes_none:
                continue
            if isinstance(value, bool) or not isinstance(value, types):
                raise TypeError(f"{where}: needs {needs}")
            if not least <= value <= most:
                raise ValueError(f"{where}: needs {size}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: make another one")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        values = (f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(values)})"


class Timeouts(_Options):
    """How long each part of a call may take, in seconds; None for no limit.

    :param connect: for TCP and TLS.  10 s: a healthy network needs less than one.
    :param first_token: from sending a request to its first delta.  600 s: providers
        let reasoning models think for more than five minutes, and pings must not make
        that endless.  Each request that is given up is billed whole, so that a chat
        makes only one more when this limit passes.
    :param read: silence on the socket once deltas have begun; any byte resets it.
        120 s: providers ping far more often.
    :param idle: time without progress.  A delta of any kind, a finish, new usage and
        the provider's typed events (search, code, item) are progress; comments,
        pings and empty deltas are not.  It counts before the first delta only where
        ``first_token`` is None.  300 s: providers report even long silent work, such
        as searches, more often.
    :param total: wall time of the whole call over all requests, waits and reads;
        every other bound is clamped to what is left of it.  None: only the caller
        knows how long an answer is worth waiting for.

    Time that the caller spends between two deltas counts for ``total`` only.  After a
    finish reason the rest is waited for at most ``min(read, 5)`` seconds.

    A look-up of a host name cannot be ended, by these or by ``close()``.  On a session
    of the caller's own, neither can anything before the headers: there ``connect`` is
    that of requests, for each address and for each piece of the prompt that the server
    is slow to take, and each piece of the headers has the time of ``first_token``.
    """

    _fields = dict.fromkeys(_words("connect first_token read idle total"), _SECONDS)
    connect: float | None
    first_token: float | None
    read: float | None
    idle: float | None
    total: float | None

    def __init__(
        self,
        connect: float | None = 10.0,
        first_token: float | None = 600.0,
        read: float | None = 120.0,
        idle: float | None = 300.0,
        total: float | None = None,
    ) -> None:
        super().__init__(locals())
        for name, value in vars(self).items():
            if value == 0:
                raise ValueError(f"Timeouts({name}=0): None means no limit")


class Retry(_Options):
    """How often, and how patiently, a failed request is made again.

    :param attempts: requests of one call, the first and those that resume included:
        each may be billed.  6 ride out a minute of trouble.  For event streams, and
        for reattaching, only requests in a row without a new event count.
    :param wait_initial: upper bound of the first wait in seconds; it doubles with
        every further one.  1 s, since most failures are brief.  The wait is drawn
        evenly between 0 and the bound ("full jitter"), so that many clients do not
        come back at once.
    :param wait_max: upper bound of every drawn wait in seconds.  30 s.
    :param retry_after_max: the longest wait in seconds that a server may ask for;
        beyond it the error is raised at once and says how long the server wanted.
        60 s: a script should hear of a longer wait rather than sit through it.
    :raises TypeError: a value is no number.
    :raises ValueError: a value is out of range.
    """

    _fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attempts": _LIMIT,
        **dict.fromkeys(_words("wait_initial wait_max retry_after_max"), _SECONDS),
    }
    _takes_none = False
    attempts: int
    wait_initial: float
    wait_max: float
    retry_after_max: float

    def __init__(
        self,
        attempts: int = 6,
        wait_initial: float = 1.0,
        wait_max: float = 30.0,
        retry_after_max: float = 60.0,
    ) -> None:
        if attempts is None:
            raise TypeError("Retry(attempts=None): needs a number, such as 6")
        super().__init__(locals())


class Limits(_Options):
    """What a stream may cost in memory; None for no limit.

    :param line: bytes of one line of the stream.  16 MiB: base64 images fit.
    :param event: bytes of one event (its comments included).  16 MiB, as ``line``.
    :param text: characters of text that are kept, for each of the visible text, the
        reasoning and all other choices together.  16 Mi, some thousand pages.  Past it
        deltas still flow, but resuming is off, ``stats.text_dropped`` counts and
        :func:`complete_chat` raises.  Tool arguments may be as long; and whatever else
        an answer brings, such as images and signatures, four times as long (1 Mi at
        least): they are kept whole, so past that the stream ends with an error.
    :param malformed: pieces of malformed data that are ignored before it is an error.
        10: a stray line is harmless, a stream of them is not; 0 allows none.
    :raises TypeError: a value is no whole number.
    :raises ValueError: a value is out of range.
    """

    _fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(_words("line event text"), _LIMIT),
        "malformed": _COUNT,
    }
    line: int | None
    event: int | None
    text: int | None
    malformed: int | None

    def __init__(
        self,
        line: int | None = 16 * 1024 * 1024,
        event: int | None = 16 * 1024 * 1024,
        text: int | None = 16 * 1024 * 1024,
        malformed: int | None = 10,
    ) -> None:
        super().__init__(locals())


_TIMEOUTS = Timeouts()
_FEED_TIMEOUTS = Timeouts(first_token=None, idle=None)  # a quiet feed is healthy
_RETRY = Retry()
_LIMITS = Limits()


# ---------------------------------------------------------------------------
# 3. Event stream decoder
# ---------------------------------------------------------------------------
# Bytes in, events out, no I/O.  The algorithm is that of the WHATWG HTML standard,
# section "Interpreting an event stream".  Two steps: _frame cuts off the complete
# blocks (lines up to a blank line), _parse turns blocks into events.  Every byte is
# looked at a bounded number of times, however the input is split.
#
# The intake (section 7) takes these steps one by one.  Its decoders share the framing
# and may differ in four methods alone: _frame, _parse, _stray and _finish.

_BOM = codecs.BOM_UTF8
_FIELDS = ("", "data", "event", "id", "retry")
_RETRY_LINE = re.compile(rb"^retry: ?([0-9]+)$", re.MULTILINE)

#: What nearly every event looks like; other blocks are read line by line.
#: (An empty alternative costs half of what a question mark does.  Without the caret,
#: a line full of "data: " would be searched once for each of them.)
_USUAL_EVENTS = re.compile(
    rb"^(?:id: ([^\n\0]+)\n|)(?:event: ([^\n]+)\n|)data: ([^\n]*)\n\n", re.MULTILINE
)


def _new_events(
    names: Iterable[str], data: list[bytes], ids: Iterable[str]
) -> list[ServerSentEvent]:
    """Make many events as fast as tuples can be made: no Python code for each."""
    rows = zip(names, _decoded_lines(data), ids)
    made: Iterator[Any] = map(tuple.__new__, itertools.repeat(ServerSentEvent), rows)
    return list(made)


def _decoded_lines(lines: list[bytes]) -> list[str]:
    # Nearly all text is valid, and to say how to mend it would double the cost.
    try:
        return list(map(bytes.decode, lines))
    except UnicodeDecodeError:
        return list(map(_decoded, lines))


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "replace")


class SSEDecoder:
    """Decode an event stream: feed it bytes as they come, get events as they end.

    :param last_event_id: the ID to begin with, when a stream is reconnected.
    :param limits: ``line`` and ``event`` bound what is held back.

    Each event is given with its last byte.  A limit passed in the middle of a chunk
    does not lose the events before it: they are returned, and the next call raises.

    >>> SSEDecoder().feed(b"data: hello\\n\\n")
    [ServerSentEvent(event='message', data='hello', id='')]
    """

    _terminator = b"\n\n"  # of a block, once every line end is a line feed

    def __init__(self, *, last_event_id: str = "", limits: Limits = _LIMITS) -> None:
        #: The last event ID, as a reconnecting client must send it.
        self.last_event_id = last_event_id
        #: The server's reconnection time in seconds; None if it never sent one.
        self.reconnection_time: float | None = None
        sizes = {"line": limits.line, "event": limits.event}
        self._most = {k: math.inf if v is None else v for k, v in sizes.items()}
        # What is not longer than the smaller limit passes neither: it is not measured.
        self._harmless = min(self._most.values())
        # The first bytes, while they may be half of a BOM; None once that is settled.
        self._head: bytes | None = b""
        # A CR ends its line at once, so that no event waits for one byte more; a line
        # feed at the beginning of the next chunk is then no second line end.
        self._after_cr = False
        # The unfinished block.  As bytes it would be copied for each byte that comes.
        self._pending = bytearray()
        # So many of its bytes belong to the unfinished line.  If none do, a line feed
        # is the blank line, although the one before it came in another chunk.
        self._line = 0
        # So many of its bytes were searched for a reconnection time: each line once.
        self._noted = 0
        # The limit that was passed, from then on.  Not raised at once, for the events
        # before it, in the same chunk, are handed out first.
        self._excess = ""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Decode the next bytes.

        :param chunk: any number of bytes, split anywhere.
        :returns: the events that they complete.
        :raises StreamLimitError: a line or an event is too large.
        """
        if self._excess:
            self._check()
        region = self._frame(chunk)
        events: list[ServerSentEvent] = []
        if region:
            events = self._parse(region)
            self._noted = 0  # what is pending now is another block
        # A reconnection time counts with its line, not with its event.
        lines = len(self._pending) - self._line
        if lines > self._noted:
            self._note_retry(self._pending[self._noted : lines])
            self._noted = lines
        if self._excess and not events:
            self._check()
        return events

    def close(self) -> int:
        """End the stream; an unfinished event is discarded, as the standard says.

        :returns: how many bytes were discarded; 0 for a clean end.
        :raises StreamLimitError: a limit was passed by the last chunk.
        """
        rest = self._finish()
        if self._head:  # half of a BOM: it is among what is discarded
            self._head = b""
        self._pending, self._line, self._noted = bytearray(), 0, 0
        return len(rest)

    def _check(self) -> None:
        name = self._excess
        if name:
            what = "a line" if name == "line" else "an event"
            raise StreamLimitError(
                f"the stream has {what} of more than {self._most[name]} bytes; "
                f"Limits({name}=...) allows more",
                limit=name,
            )

    def _frame(self, chunk: bytes) -> bytes:
        """Return all complete blocks; keep the rest."""
        # 13 is a CR.  Bytes that are asked for bytes raise, and catch, an error first.
        if self._head is not None or self._after_cr or 13 in chunk:
            chunk = self._normalise(chunk)
        end = self._terminator
        if not self._pending and len(chunk) < self._harmless and chunk.endswith(end):
            return chunk  # whole events, as a live stream brings them
        cut = chunk.rfind(end)
        if cut >= 0:
            cut += len(end)
        else:  # the blank line may have begun in the bytes kept, or be the first of all
            cut = 1 if not self._line and chunk.startswith(b"\n") else 0
        region = b""
        if cut:
            region = bytes(self._pending) + chunk[:cut]
            self._pending, self._line = bytearray(), 0
        if len(region) > self._harmless:
            region = self._bounded(region)
        if cut < len(chunk):
            self._keep(chunk[cut:])
        return region

    def _normalise(self, chunk: bytes) -> bytes:
        """Drop the BOM, and make every line end a line feed."""
        if self._head is not None:
            chunk = self._head + chunk
            if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._head = chunk
                return b""
            self._head = None
            chunk = chunk[len(_BOM) if chunk.startswith(_BOM) else 0 :]
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk[chunk.startswith(b"\n") :]
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk

    def _keep(self, chunk: bytes) -> None:
        """Keep bytes of an unfinished block; note a limit that they pass."""
        if self._excess:
            return  # an error is due: nothing more need be kept
        self._pending += chunk
        if len(self._pending) > self._harmless:
            first, *others = map(len, chunk.split(b"\n"))
            # The line feed at its end may be half of the terminator, which is no data.
            size = len(self._pending) - self._pending.endswith(b"\n")
            longest = max(self._line + first, *others, 0)
            self._excess = self._exceeded(line=longest, event=size)
        end = chunk.rfind(b"\n") + 1
        self._line = len(chunk) - end + (0 if end else self._line)

    def _bounded(self, region: bytes) -> bytes:
        """Cut the region off before the first block that is too large."""
        start = 0
        for block in region.split(self._terminator):
            longest = max(map(len, block.split(b"\n")))
            # An odd blank line stands before its block, and does not belong to it.
            size = len(block) - block.startswith(b"\n")
            self._excess = self._exceeded(line=longest, event=size)
            if self._excess:
                return region[:start]
            start += len(block) + len(self._terminator)
        return region

    def _exceeded(self, **sizes: int) -> str:
        return next((k for k, size in sizes.items() if size > self._most[k]), "")

    def _parse(self, region: bytes) -> list[ServerSentEvent]:
        """Turn complete blocks into events."""
        same = itertools.repeat
        if region.startswith(b"data: "):
            data = region[6:-2].split(b"\n\ndata: ")
            if b"\n" not in b"".join(data):
                return _new_events(same("message"), data, same(self.last_event_id))
        # What split() leaves between the matches is nothing if they fill the region.
        parts: list[Any] = _USUAL_EVENTS.split(region)
        if any(parts[::4]):
            blocks = _decoded(region).split("\n\n")
            return [event for block in blocks for event in self._dispatch(block)]
        ids, names, data = parts[1::4], parts[2::4], parts[3::4]
        all_names: Iterable[str] = same("message")
        if any(names):
            known = {name: _decoded(name or b"message") for name in set(names)}
            all_names = map(known.__getitem__, names)
        last = self.last_event_id
        all_ids: Iterable[str] = same(last)
        if any(ids):
            all_ids = texts = _decoded_lines([id or b"" for id in ids])
            if None in ids:  # the last event ID stays where none is given
                for place, text in enumerate(texts):
                    texts[place] = text or (texts[place - 1] if place else last)
            self.last_event_id = texts[-1]
        return _new_events(all_names, data, all_ids)

    def _dispatch(self, block: str) -> list[ServerSentEvent]:
        """Interpret the lines of one block."""
        event, data, stray = "", [], []
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            value = value[value.startswith(" ") :]
            if name == "data":
                data.append(value)
            elif name == "event":
                event = value
            elif name == "id" and "\0" not in value:
                self.last_event_id = value
            elif name == "retry":
                self._note_retry(line.encode())
            elif name not in _FIELDS:
                stray.append(line)
        events = self._stray(stray) if stray else []
        if data:
            text = data[0] if len(data) == 1 else "\n".join(data)
            made = ServerSentEvent(event or "message", text, self.last_event_id)
            events.insert(0, made)
        return events

    def _stray(self, lines: list[str]) -> list[ServerSentEvent]:
        """What lines of unknown fields bring: nothing, as the standard says."""
        return []

    def _note_retry(self, lines: bytes | bytearray) -> None:
        # Looked for first: the pattern tries each byte, and hardly ever finds a thing.
        if b"retry" in lines:
            for value in _RETRY_LINE.findall(lines):
                self.reconnection_time = float(value) / 1000

    def _finish(self) -> bytes:
        """The unfinished block.

        :raises StreamLimitError: a limit was passed by the last chunk.
        """
        self._check()
        return (self._head or b"") + bytes(self._pending)


# ---------------------------------------------------------------------------
# 4. Answer: what a stream has said so far
# ---------------------------------------------------------------------------
# A dialect writes into an Answer, the loop takes pieces out of it.  A piece is a str
# (visible text of choice 0, the case that must be fast) or a Delta (all else).  No
# JSON value of whatever type makes a method raise: odd ones are counted, not kept.
# What no server sends, such as a kind of text that there is not, is a TypeError.

_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_CALLS = 1024  # tool calls, or choices: far more than any provider allows
_LONGEST_WORD = 1000  # characters of a finish reason
_LARGEST_USAGE = 65536  # characters of usage, which is a few numbers
_EACH_KEPT = 100  # bytes that an object, array or other kept value takes by itself
_KINDS = ("text", "reasoning", "refusal")
_REASONS = ("stop", "length", "tool_calls", "content_filter", "other")
_VISIBLE = ("text", 0)  # the kind and choice of what most callers print


_SHORT = 640  # characters; an integer of fewer is as cheap as any


def _whole_number(digits: str) -> float:
    """An integer; int() takes quadratic time, or refuses, from some length on."""
    return int(digits) if len(digits) < _SHORT else float(digits)


_scan_short = jsonlib.JSONDecoder(strict=False).raw_decode
_scan_long = jsonlib.JSONDecoder(strict=False, parse_int=_whole_number).raw_decode


def parse_json(text: str) -> Any:
    """Parse JSON, with line feeds and tabs in strings allowed as some servers do.

    :raises ValueError: it is not JSON, or nested too deeply.
    """
    if text[:1].isspace():
        text = text.lstrip()
    try:
        value, end = (_scan_short if len(text) < _SHORT else _scan_long)(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if end < len(text) and not text[end:].isspace():
        raise ValueError("extra data after a JSON value")
    return value


def _json_or(text: str, default: Any) -> Any:
    """The value of a JSON text; the default if it is none."""
    try:
        return parse_json(text)
    except ValueError:
        return default


def _is_json(text: str) -> bool:
    return _json_or(text, _is_json) is not _is_json


class _Misuse(TypeError):
    """A dialect calls an answer as no server can make it: a mistake in its code."""


def _refuse(method: str, word: object, words: Iterable[str]) -> NoReturn:
    one_of = " ".join(words)
    raise _Misuse(
        f"Answer.{method}() takes one of {one_of}, not {_clipped(word, 80)!r}"
    )


class Room:
    """Space for so many characters; several buffers may share it.

    :param size: None for no limit.
    """

    def __init__(self, size: int | None = None) -> None:
        self.left = math.inf if size is None else size


class TextBuffer:
    """Text in few large blocks; without room for more it counts, but keeps no more."""

    def __init__(self, room: Room) -> None:
        self.kept = 0
        self.dropped = 0
        self._room = room
        self._blocks: list[bytes] = []  # UTF-8: one emoji does not widen the rest
        self._tail: list[str] = []

    def add(self, text: str) -> None:
        """Append text."""
        size = len(text)
        room = self._room
        if size > room.left:
            text = text[: int(room.left)]
            self.dropped += size - len(text)
            size = len(text)
        if not size:
            return
        room.left -= size
        self.kept += size
        self._tail.append(text)
        if len(self._tail) > 1000:
            self._blocks.append("".join(self._tail).encode())
            self._tail.clear()

    @property
    def text(self) -> str:
        """All that is kept."""
        return b"".join(self._blocks).decode() + "".join(self._tail)

    def last(self, size: int) -> str:
        """The last characters of it; what stands before them is not looked at."""
        pieces: list[str] = []
        blocks = (block.decode() for block in reversed(self._blocks))
        for piece in itertools.chain(reversed(self._tail), blocks):
            if size <= 0:
                break
            pieces.append(piece if len(piece) < size else piece[len(piece) - size :])
            size -= len(piece)
        return "".join(reversed(pieces))


class _OpenCall:
    """A tool call, as far as it was received."""

    def __init__(self, number: int, room: Room) -> None:
        self.number = number
        self.choice = 0
        self.id: str | None = None
        self.name = ""
        self.arguments = TextBuffer(room)
        self.closed = False
        self.is_json = True
        self.told: dict[str, Any] = {}  # the data of its last delta

    def whole(self) -> ToolCall | None:
        """The call, if it was closed and its arguments are what they should be."""
        if not (self.closed and self.name) or self.arguments.dropped:
            return None
        arguments = self.arguments.text
        if self.is_json:
            arguments = arguments or "{}"
            if not _is_json(arguments):
                return None
        return ToolCall(self.id, self.name, arguments)


if TYPE_CHECKING:
    _Runs = list[list[Any]]  # [start, end] of texts; what grows has no end yet


class _Part(NamedTuple):
    """A part of the assistant turn in the dialect's form, but for its texts.

    Text is kept once, in the buffers: a part knows only where its own stands there.
    """

    form: dict[str, Any]
    field: str  # what of the form these runs are
    kind: str
    runs: _Runs
    call: _OpenCall | None
    more: dict[str, TextBuffer]  # what else of it grows


class Answer:
    """What a stream has said so far.

    A dialect's ``read`` writes into it.  For most of them these are all there is to
    know: :meth:`text`, :meth:`reasoning` and :meth:`refusal`; :meth:`open_call`,
    :meth:`call_arguments` and :meth:`close_call`; :meth:`finish`, :meth:`end` and
    :meth:`fail`; :meth:`identify`, :meth:`count`, :meth:`advance` and :meth:`odd`;
    :meth:`add_part` and :meth:`keep`, with :attr:`memory`, for what the next turn needs.
    :meth:`lengthen`, :meth:`add`, :meth:`begin_part`, :meth:`complete_part`,
    :meth:`complete_parts`, :meth:`complete_call` and :meth:`follows` are for streams
    whose parts have texts of their own, come twice, or are numbered.

    What a server sends may be handed on as it is: a value of an odd type is counted,
    and never raises.  Only what the dialect itself must know is checked.

    :param limits: bounds what is kept.
    :param received: the visible text that earlier requests brought, if any.
    """

    def __init__(
        self, limits: Limits = _LIMITS, received: TextBuffer | None = None
    ) -> None:
        self.limits = limits
        self.received = received or TextBuffer(Room(limits.text))
        self.model: str | None = None
        self.id: str | None = None
        #: The parts of the assistant turn, without their texts; see :meth:`turn`.
        self.parts: list[_Part] = []
        #: The tool calls that were begun, by what the stream knows them as.
        self.calls: dict[Any, _OpenCall] = {}
        #: Whatever else a dialect must remember between two events; see keep().
        self.memory: dict[Any, Any] = {}
        self.malformed = 0
        self.deltas = 0
        self.out: list[Piece] = []
        self._noted = 0  # so many of these pieces are in ``received`` already
        self._side: dict[tuple[str, int], TextBuffer] = {}  # all but _VISIBLE
        self._for_choices = Room(limits.text)  # all but choice 0
        self._for_arguments = Room(limits.text)
        most = None if limits.text is None else max(4 * limits.text, 1 << 20)
        self._for_parts = Room(most)
        self._growing: dict[str, _Runs] = {}  # of the part that grows, by kind
        self.new_request()

    def new_request(self, seam: Seam | None = None) -> None:
        """Another generation begins; what was said stays.

        :param seam: what its first words are compared with.
        """
        self.seam = seam
        #: The number of the last event that was understood, where events are numbered;
        #: how many keepalives have taken the numbers behind it.
        self.cursor: int | None = None
        self.skipped = 0
        self._rises = False  # whether the numbers have ever risen
        # Half a surrogate pair, by kind and choice, until its other half comes.
        self._halves: dict[tuple[str, int], str] = {}
        # The runs of each part that begin_part() has named, by kind.
        self._begun: dict[str, dict[Any, _Runs]] = {}
        # A seam that trims makes the text another one than the provider's.
        self._is_verbatim = not isinstance(seam, (ContinueSeam, AskSeam))
        self.reattach()

    def reattach(self) -> None:
        """The same generation goes on in another response."""
        self.usage: Usage | None = None
        self.finishes: dict[int, tuple[str, str | None]] = {}
        self.expected = 1
        self.ended = False
        self.error: StreamingError | None = None
        self.started = False
        self.progress = 0
        self.last_kind = ""
        self._has_id = False
        self.hole = ""  # which events are missing behind the cursor
        self.resumed_at = self.cursor

    # -- what a dialect calls

    def text(self, text: Any, index: Any = 0) -> None:
        """Add visible text of a choice."""
        self.add("text", text, index)

    def reasoning(self, text: Any, index: Any = 0) -> None:
        """Add reasoning of a choice."""
        self.add("reasoning", text, index)

    def refusal(self, text: Any, index: Any = 0) -> None:
        """Add to the refusal of a choice."""
        self.add("refusal", text, index)

    def open_call(self, key: Any, id: Any = None, name: Any = None) -> None:
        """Begin, or name, the tool call that the stream knows as ``key``."""
        call = self.calls.get(key)
        if call is None:
            self._guard_count(len(self.calls))
            self.keep(key)
            call = self.calls[key] = _OpenCall(len(self.calls), self._for_arguments)
        if call.id is None and isinstance(id, str) and id:
            self.keep(id)
            call.id = id  # old vLLM makes up another one for each fragment
        if isinstance(name, str) and name not in ("", call.name):
            self.keep(name)
            call.name = name

    def call_arguments(self, key: Any, arguments: Any, index: Any = 0) -> None:
        """Add a fragment to the arguments of a tool call; "" announces the call."""
        self.open_call(key)
        call = self.calls[key]
        call.choice = _index(index)
        arguments = self._mended(("tool_call", call.number), _json_text(arguments))
        call.arguments.add(arguments)
        if call.arguments.dropped:
            self._fail_on_limit("the arguments of a tool call")
        data = {"index": call.number, "id": call.id, "name": call.name}
        self.last_kind = "tool_call"
        if arguments:
            self.progress += 1
            self.started = True
        if arguments or data != call.told:
            call.told = data
            self.out.append(Delta("tool_call", arguments, call.choice, data))

    def close_call(self, key: Any) -> None:
        """End a tool call: nothing more will come of it."""
        if key in self.calls:
            self.calls[key].closed = True

    def finish(self, reason: str, raw: Any, index: Any = 0) -> None:
        """Note that a choice has finished.

        :param reason: ``stop length tool_calls content_filter other``.
        :param raw: the provider's own word.
        :raises TypeError: the reason is another word; :meth:`Dialect.finish` translates
            a provider's.
        """
        if reason not in _REASONS:
            _refuse("finish", reason, _REASONS)
        index = _index(index)
        if index not in self.finishes:
            self.progress += 1
        if not isinstance(raw, str) or len(raw) > _LONGEST_WORD:
            raw = None
        self._guard_count(len(self.finishes))
        self.finishes[index] = (reason, raw)
        self._close_calls(index)

    def end(self) -> None:
        """Note the end marker: nothing behind it matters."""
        if self.error is None:
            self.ended = True
            self._close_calls()
            self._release_halves()

    def fail(self, error: StreamingError) -> None:
        """Note that the provider reports an error; the first one counts.

        :raises TypeError: it is another kind of error, or none.
        """
        if not isinstance(error, StreamingError):
            raise _Misuse(
                "Answer.fail() takes a StreamingError, such as Dialect.error(chunk) "
                f"makes, not {type(error).__name__}"
            )
        if self.error is None and not self.ended:
            self.error = error

    def identify(self, id: Any, model: Any) -> None:
        """Note the answer's ID and model; the first that is not empty counts.

        Each request has an ID of its own: what is resumed is the last one's.
        """
        if not self._has_id and isinstance(id, str) and id:
            self.id, self._has_id = id, True
        if self.model is None and isinstance(model, str) and model:
            self.model = model

    def count(self, input_tokens: Any, output_tokens: Any, raw: dict[str, Any]) -> None:
        """Note usage; the last word counts."""
        if len(repr(raw)) > _LARGEST_USAGE:
            self.odd(raw)
            return
        usage = Usage(_count(input_tokens), _count(output_tokens), raw)
        if self.usage is None or usage[:2] != self.usage[:2]:
            self.progress += 1
        self.usage = usage

    def advance(self) -> None:
        """Note progress that brings no delta, such as a search that has begun."""
        self.progress += 1

    def odd(self, value: Any) -> None:
        """Count a value that has an unexpected type; null is none."""
        if value is not None:
            self.malformed += 1

    def add_part(
        self, form: dict[str, Any], field: str = "", kind: str = "", key: Any = None
    ) -> _Part:
        """Add a part of the assistant turn, in the dialect's own form.

        :param field: which of its values the stream brings from now on, if any.
        :param kind: as text of this kind, in choice 0 ...
        :param key: ... or else as the arguments of this tool call.
        """
        self.keep(form)
        call = self.calls.get(key)
        part = _Part(
            form, field, kind, [], call, {field: call.arguments} if call else {}
        )
        self.parts.append(part)
        if kind:
            self._grow(kind, part.runs)
        return part

    def keep(self, value: Any) -> None:
        """Count a JSON value that is kept beside the text.

        :raises StreamLimitError: all of these together have become too large.
        """
        shown = repr(value)
        objects = 1 + shown.count("{") + shown.count("[")
        self._for_parts.left -= len(shown) + objects * _EACH_KEPT
        if self._for_parts.left < 0:
            self._fail_on_limit("the parts of the answer")

    # -- what a dialect calls where parts have texts, come twice, or are numbered

    def lengthen(self, part: _Part, field: str, text: Any) -> None:
        """Lengthen a text of a part that is no delta, such as a signature."""
        if not isinstance(text, str):
            self.odd(text)
            return
        self.keep(text)
        if field not in part.more:
            first = part.form.get(field)
            part.more[field] = TextBuffer(Room())
            part.more[field].add(first if isinstance(first, str) else "")
        part.more[field].add(text)

    def turn(self, text: str) -> list[dict[str, Any]]:
        """The parts of the assistant turn with their texts, but those of cut calls.

        :param text: the visible text, as far as it was handed out.
        """
        texts = {kind: self.side_text(kind) for kind in _KINDS}
        texts["text"] = text
        turn = []
        for form, field, kind, runs, call, more in self.parts:
            if call is not None and call.whole() is None:
                continue
            whole = dict(form)
            if kind:
                whole[field] = "".join(texts[kind][start:end] for start, end in runs)
            whole.update((name, buffer.text) for name, buffer in more.items())
            turn.append(whole)
        return turn

    def add(self, kind: str, text: Any, index: Any = 0) -> None:
        """Add a piece of any kind but of a tool call.

        :raises TypeError: there is no such kind.
        """
        if kind not in _KINDS:
            _refuse("add", kind, _KINDS)
        if not isinstance(text, str) or not text:
            self.odd(text or None)
            return
        key = (kind, _index(index))
        self.last_kind = kind
        self.progress += 1
        self.started = True
        text = self._mended(key, text)
        self._emit(key, self.seam.feed(text, key) if self.seam else text)

    def begin_part(self, kind: str, part: Any) -> None:
        """What comes of that kind from now on, in choice 0, belongs to this part.

        :param part: what the stream knows it as; parts may come in turns.
        """
        runs = self._begun.setdefault(kind, {}).setdefault(part, [])
        if not runs or runs is not self._growing.get(kind):
            self.keep(part)
            self._grow(kind, runs)

    def complete_part(self, kind: str, part: Any, text: Any) -> None:
        """Take a part once more, whole: hand out what its pieces lacked."""
        if not isinstance(text, str):
            self.odd(text)
            return
        said = self._said(kind, self._begun.get(kind, {}).get(part, []))
        if said is None:
            return  # it cannot be compared, and its pieces are there
        if said == "":  # no piece of it came: it stands behind all that did
            self.begin_part(kind, part)
        if self._begun[kind][part] is self._growing[kind]:
            self._add_rest(kind, said, text)
        elif not _is_same(said, text):
            self._contradict(kind)

    def complete_parts(self, kind: str, parts: Mapping[Any, str]) -> bool:
        """Take all text of that kind once more, whole: hand out what was missing.

        :param parts: the texts by part, in their order.
        :returns: whether it is known to say what the pieces said, and more.
        """
        whole, said = "".join(parts.values()), self._said(kind, [[0, None]])
        if not whole or said is None:
            return said == ""
        begun = self._begun.get(kind, {})
        # Parts that came in turns are joined in another order than their pieces.
        in_turns = len(parts) > 1 and not whole.startswith(said)
        if not in_turns or not all(
            _is_same(self._said(kind, begun.get(part, [])), parts[part])
            for part in parts
        ):
            self._add_rest(kind, said, whole)
        return True

    def complete_call(self, key: Any, arguments: Any) -> None:
        """Take a call's arguments once more, whole, and end it."""
        self.open_call(key)
        call, whole = self.calls[key], _json_text(arguments)
        said = call.arguments.text
        if whole.startswith(said):
            self.call_arguments(key, whole[len(said) :], call.choice)
        # NaN is equal to nothing, not even to itself.
        elif whole and not (
            call.is_json and _json_or(said, math.nan) == _json_or(whole, math.nan)
        ):
            self._contradict("arguments of a tool call")
        call.closed = True

    def follows(self, number: int) -> bool:
        """Keep count of numbered events: whether this one is the next.

        - The next number, or one behind a keepalive, which may have taken one or not:
          ``cursor`` moves there.
        - A larger one: a hole.  Behind it nothing has a place: ``cursor`` stays, and
          only what gives the answer whole can fill it.
        - A smaller one, just reattached: it was read before, and comes again.
        - A smaller one, and they never rose: this server gives each event the same.
        - A smaller one otherwise: a number came twice, which is a hole as well.
        """
        cursor = self.cursor
        expected = 0 if cursor is None else cursor + 1
        if cursor is None and number == self.skipped + 1:
            expected = 1  # the first event has the number 1 on some servers
        if expected <= number <= expected + self.skipped:
            self._rises = cursor is not None
            self.cursor, self.skipped, self.resumed_at = number, 0, None
            return True
        if number > expected:
            self.hole = self.hole or f"events {expected} to {number - 1} were lost"
            self.progress += 1
        elif self.resumed_at is None and not self._rises:
            return True
        elif self.resumed_at is None:
            self.hole = self.hole or f"two events have the number {number}"
        return False

    # -- what the loop calls

    def again(self) -> Answer:
        """The answer to the same request again, to be compared with this one."""
        answer = Answer(self.limits, self.received)
        answer._side, answer._for_choices = self._side, self._for_choices
        answer.seam = ReplaySeam(self.received.text, self.sides())
        return answer

    def take(self) -> list[Piece]:
        """Hand over the pieces that came since the last call."""
        pieces, self.out = self.out, []
        self.deltas += len(pieces)
        new = pieces
        if self._noted:
            new, self._noted = pieces[self._noted :], 0
        try:
            text = "".join(cast("list[str]", new))
        except TypeError:  # not all of them are visible text
            text = "".join(piece for piece in new if isinstance(piece, str))
        self.received.add(text)
        return pieces

    def add_texts(self, kind: str, texts: list[str]) -> None:
        """Add many pieces of choice 0 at once, known to need no mending."""
        if kind == "text":
            self.out += texts
        else:
            self.out += [Delta(kind, text) for text in texts]
            self._buffer((kind, 0)).add("".join(texts))
        self.progress += len(texts)
        self.started = True
        self.last_kind = kind

    @property
    def is_plain(self) -> bool:
        """Whether pieces may go straight out: nothing is held back or compared."""
        return self.seam is None and not self._halves and self.resumed_at is None

    @property
    def finished(self) -> bool:
        """Whether every choice that is known of has its finish reason."""
        choices = [index for _, index in self._side] + list(self.finishes)
        expected = max(self.expected, 1 + max(choices, default=0))
        return len(self.finishes) >= expected

    def settle(self) -> None:
        """The stream has completed: what was held back is final."""
        if self.seam is not None:
            self._emit(_VISIBLE, self.seam.close())
            self.seam = None
        self._close_calls()
        self._release_halves()

    def part(self, kind: str) -> Any:
        """The part that grows, see :meth:`begin_part`; None if there are none."""
        growing = self._growing.get(kind)
        begun = self._begun.get(kind, {})
        return next((part for part, runs in begun.items() if runs is growing), None)

    def forget_sides(self) -> None:
        """Drop all but the visible text: nobody was shown it."""
        self._side.clear()
        self._for_choices = Room(self.limits.text)

    def forget_calls(self) -> None:
        """Drop the tool calls; a continuation makes them anew."""
        self.calls.clear()
        self.parts = [part for part in self.parts if part.call is None]
        self.memory.clear()
        self._for_arguments = Room(self.limits.text)

    # -- what the result says

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls of choice 0 that came whole, in their order."""
        whole = [call.whole() for call in self.calls.values() if call.choice == 0]
        return tuple(call for call in whole if call is not None)

    @property
    def cut_calls(self) -> int:
        """How many tool calls, of any choice, did not come whole."""
        return sum(call.whole() is None for call in self.calls.values())

    @property
    def calls_begun(self) -> int:
        """How many tool calls were begun."""
        return len(self.calls)

    def side_text(self, kind: str, index: int = 0) -> str:
        """The reasoning, refusal, or text of another choice than 0."""
        buffer = self._side.get((kind, index))
        return buffer.text if buffer else ""

    def sides(self) -> dict[tuple[str, int], str]:
        """All but the visible text of choice 0: ``(kind, index) -> text``."""
        return {key: buffer.text for key, buffer in self._side.items()}

    def texts(self) -> dict[int, str]:
        """Text by choice, but for choice 0."""
        keys = sorted(key for key in self._side if key[0] == "text")
        return {index: self.side_text(kind, index) for kind, index in keys}

    @property
    def dropped(self) -> int:
        """Characters that were not kept."""
        buffers = [self.received, *self._side.values()]
        return sum(buffer.dropped for buffer in buffers)

    # -- inner steps

    def _emit(self, key: tuple[str, int], text: str) -> None:
        if text and key == _VISIBLE:
            self.out.append(text)  # take() keeps it, many pieces at a time
        elif text:
            self._buffer(key).add(text)
            self.out.append(Delta(key[0], text, key[1]))

    def _buffer(self, key: tuple[str, int]) -> TextBuffer:
        if key not in self._side:
            self._guard_count(len(self._side))
            room = self._for_choices if key[1] else Room(self.limits.text)
            self._side[key] = TextBuffer(room)
        return self._side[key]

    def _guard_count(self, count: int) -> None:
        if count >= _MOST_CALLS:
            message = f"the answer has more than {_MOST_CALLS} choices or tool calls"
            raise StreamLimitError(message, limit="text")

    def _fail_on_limit(self, what: str) -> NoReturn:
        message = f"{what} exceed what Limits(text={self.limits.text}) keeps"
        raise StreamLimitError(message, limit="text")

    def _close_calls(self, index: int | None = None) -> None:
        """End every tool call that was begun, or those of one choice.

        A call without arguments is whole, unless it is the last one of an answer that
        was cut or has no finish reason: there the arguments may be what is missing.
        """
        last = {}
        for call in self.calls.values():
            if index in (None, call.choice):
                call.closed = True
                last[call.choice] = call
        for choice, call in last.items():
            reason, _ = self.finishes.get(choice, ("length", None))
            if reason in ("length", "content_filter") and not call.arguments.kept:
                call.closed = False

    def _place(self, kind: str) -> tuple[TextBuffer, int]:
        """All text of that kind in choice 0, and where the next piece will stand."""
        if kind == "text":  # what waits to be taken is a part of it
            new, self._noted = self.out[self._noted :], len(self.out)
            self.received.add("".join(piece for piece in new if isinstance(piece, str)))
            buffer = self.received
        else:
            buffer = self._side.get((kind, 0)) or TextBuffer(Room())
        if isinstance(self.seam, ReplaySeam):
            return buffer, self.seam.seen.get((kind, 0), 0)
        return buffer, buffer.kept

    def _grow(self, kind: str, runs: _Runs) -> None:
        """What comes of that kind from now on belongs to the part with these runs."""
        _, position = self._place(kind)
        if kind in self._growing:
            self._growing[kind][-1][1] = position
        runs.append([position, None])
        self._growing[kind] = runs

    def _said(self, kind: str, runs: _Runs) -> str | None:
        """What this generation has said in these runs; None if that is not known."""
        buffer, position = self._place(kind)
        if not (runs and buffer.kept):
            return ""
        if buffer.dropped or not self._is_verbatim:
            return None if kind in self._begun else ""
        # Decoded once, from where the first run begins: there may be many in turns.
        first = runs[0][0]
        text = buffer.last(buffer.kept - first)
        bounds = ((start, position if end is None else end) for start, end in runs)
        return "".join(text[start - first : end - first] for start, end in bounds)

    def _add_rest(self, kind: str, said: str, whole: str) -> None:
        """Hand out what a whole text has beyond what its pieces said."""
        whole = _mend(whole) if _SURROGATE.search(whole) else whole
        if whole.startswith(said):
            self._halves.pop((kind, 0), None)  # the whole has that pair's other half
            self.add(kind, whole[len(said) :])
        elif not _is_same(said, whole):
            self._contradict(kind)

    def _contradict(self, kind: str) -> None:
        if kind == "reasoning":  # some services rewrite it; the answer is not touched
            logger.info("the reasoning is given once more in other words")
            return
        self.fail(
            MalformedStreamError(
                f"the {kind} that the stream gives once more as a whole differs from "
                "its pieces: one of the two is wrong, and the pieces were handed out"
            )
        )

    def _mended(self, key: tuple[str, int], text: str) -> str:
        """Join surrogate pairs that two deltas share; replace lone surrogates."""
        if self._halves:
            text = self._halves.pop(key, "") + text
        if text.isascii() or not _SURROGATE.search(text):
            return text
        if "\ud800" <= text[-1] <= "\udbff":
            self._guard_count(len(self._halves))
            self._halves[key] = text[-1]
            text = text[:-1]
        return _mend(text)

    def _release_halves(self) -> None:
        for kind, index in list(self._halves):
            del self._halves[kind, index]
            if kind != "tool_call":
                self.add(kind, "\ufffd", index)


def _is_same(said: str | None, whole: str) -> bool:
    """Whether two texts are the same, but for white space that somebody has trimmed."""
    return said is not None and (
        said == whole or "".join(said.split()) == "".join(whole.split())
    )


def _mend(text: str) -> str:
    utf16 = text.encode("utf-16-le", "surrogatepass")
    return utf16.decode("utf-16-le", "replace")


def _json_text(value: Any) -> str:
    """Arguments are JSON in a string; some servers send the JSON itself."""
    if isinstance(value, str):
        return value
    return "" if value is None else jsonlib.dumps(value)


def _index(value: Any) -> int:
    return value if _count(value) is not None and 0 <= value < 1 << 31 else 0


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count else None


# -- seams: where another request takes over, its first words are looked at.


class Seam:
    """Where another request takes over; this one lets everything pass."""

    #: Whether all that comes from now on is new.
    is_over = True

    def feed(self, text: str, key: tuple[str, int] = _VISIBLE) -> str:
        """Take text of the new request; return what may be handed out of it.

        :param key: its kind and choice.
        """
        return text

    def close(self) -> str:
        """The new request has completed: return what was held back."""
        return ""


class ReplaySeam(Seam):
    """The same request again: compare what was handed out, and hand out the rest.

    :param text: the visible text that was handed out.
    :param sides: other deltas that were: ``(kind, index) -> text``.
    """

    def __init__(self, text: str, sides: Mapping[tuple[str, int], str]) -> None:
        self._known = {**sides, _VISIBLE: text}
        self._left = sum(map(len, self._known.values()))
        self.is_over = not self._left
        #: How much the new request has said, of each kind and choice.
        self.seen = dict.fromkeys(self._known, 0)

    def feed(self, text: str, key: tuple[str, int] = _VISIBLE) -> str:
        start = self.seen.get(key, 0)
        known = self._known.get(key, "")[start : start + len(text)]
        if not text.startswith(known):
            same = _common_length(known, text) if key == _VISIBLE else 0
            self._differs(self.seen[_VISIBLE] + same)
        self.seen[key] = start + len(text)
        self._left -= len(known)
        self.is_over = not self._left
        return text[len(known) :]

    def close(self) -> str:
        if not self.is_over:
            self._differs(self.seen[_VISIBLE])
        return ""

    def _differs(self, offset: int) -> NoReturn:
        raise ResumeMismatchError(
            f"the replayed answer differs from the first one at character {offset}; "
            "the text that was handed out is the first one's"
        )


class ContinueSeam(Seam):
    """A continuation: drop a copy of the prefix, and whitespace that is there.

    A reply that begins with the whole prefix is a copy if the prefix is long and not
    periodic.  If it is not, copy and continuation cannot be told apart, and the only
    honest answer is an error.

    :param text: the prefix as it was handed out.
    :param sent: the prefix as it was sent (some providers want it stripped).
    :param copy: what the reply may begin with a copy of; "" if with none.
    """

    def __init__(self, text: str, sent: str, copy: str) -> None:
        self._copy = copy
        self._copied = 0  # so much of the copy has come, and is held back
        self._space = text[len(sent) :]
        self._skipped = 0  # so much of that space has come again
        self.is_over = not (copy or self._space)

    def feed(self, text: str, key: tuple[str, int] = _VISIBLE) -> str:
        if self.is_over or key != _VISIBLE:
            return text
        known = self._copy[self._copied : self._copied + len(text)]
        if not text.startswith(known):
            return self._settle(self._copy[: self._copied] + text)  # so it was no copy
        self._copied += len(known)
        if self._copied < len(self._copy):
            return ""
        if known and not _is_distinct(self._copy):
            raise IncompleteStreamError(
                "the continuation begins with the text received so far, which is too "
                "short or too regular to tell a copy of it from new text"
            )
        return self._settle(text[len(known) :])

    def close(self) -> str:
        held = self._copied < len(self._copy)
        return self._settle(self._copy[: self._copied]) if held else ""

    def _settle(self, text: str) -> str:
        """Leave out the whitespace that was stripped; it may come in pieces."""
        self._copied = len(self._copy)
        space = self._space[self._skipped : self._skipped + len(text)]
        known = _common_length(space, text)
        self._skipped += known if known == len(text) else len(self._space)
        self.is_over = self._skipped >= len(self._space)
        return text[known:]


class AskSeam(Seam):
    """A reply to "go on": trim what it repeats of the end of the text before it."""

    _window = 400
    _least = 8

    def __init__(self, text: str) -> None:
        self._before = text[-self._window :]
        self._reply = ""
        self.is_over = False

    def feed(self, text: str, key: tuple[str, int] = _VISIBLE) -> str:
        if self.is_over or key != _VISIBLE:
            return text
        self._reply += text
        return self.close() if len(self._reply) >= self._window else ""

    def close(self) -> str:
        if self.is_over:
            return ""
        self.is_over = True
        longest = min(len(self._reply), len(self._before))
        for size in range(longest, self._least - 1, -1):
            if self._before.endswith(self._reply[:size]):
                return self._reply[size:]
        return self._reply


def _common_length(one: str, other: str) -> int:
    return len(os.path.commonprefix([one, other]))


def _is_distinct(text: str) -> bool:
    """Whether a copy of text cannot be mistaken for a continuation of it."""
    half = len(text) // 2
    if len(text) < 32:
        return False
    first, known = text[:half], text[: min(half, 64)]
    place = 0
    # Not find(first), which takes quadratic time before Python 3.10.
    for _ in range(100):
        place = text.find(known, place + 1, half + len(known))
        if place < 0:
            return True
        if text.startswith(first, place):
            return False
    return False  # too regular to go on


# ---------------------------------------------------------------------------
# 5. Provider errors: any error body -> APIError
# ---------------------------------------------------------------------------
# Providers agree on nothing here but JSON.  One reader for all of them: it looks for
# the message, code and type in every place where one of them has been seen, and says
# whether trying again can help.

#: Statuses that pass with time (529 is Anthropic's "overloaded").
_RETRY_STATUSES = frozenset(
    [408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529]
)
#: Types and codes inside a stream that pass with time.
_TRANSIENT = frozenset(
    _words(
        "overloaded_error api_error rate_limit_error server_error rate_limit_exceeded "
        "internal_server_error internal_error service_unavailable overloaded timeout "
        "timeout_error engine_overloaded server_overloaded unavailable resource_exhausted "
        "internal deadline_exceeded internalservererror serviceunavailableerror"
    )
)
#: Quota, credit and spending limits: no wait of ours makes them pass.
_PERMANENT = frozenset(
    _words(
        "insufficient_quota credit_balance_exhausted billing_hard_limit_reached "
        "billing_not_active spend_limit_reached enforced_spend_limit_reached "
        "insufficient_credits insufficient_balance"
    )
)
_BODY_KEPT = 65536


def _api_error(
    document: Any, status: int | None = None, should_retry: str = ""
) -> APIError:
    """Make the error that a body, or an event, reports.

    :param document: the parsed JSON, or the text where it is not JSON.
    :param status: the HTTP status, for an error before the stream.
    :param should_retry: what the server says of that, ``true`` or ``false``.
    """
    outer = _first_object(document)
    inner = outer.get("error")
    inner = inner if isinstance(inner, dict) else outer
    code = _scalar(inner, "code", "status_code", "http_code")
    kind = _scalar(inner, "type", "status") or _scalar(outer, "error_type", "type")
    kind = kind if kind != "error" else None  # the event's type, not the error's
    words = [str(code), str(_scalar(inner, "status_code"))]
    named = next((int(w) for w in words if re.match("[45][0-9][0-9]\\Z", w)), None)
    # The message, wherever it stands.
    said = _scalar(inner, "message", "detail") or _scalar(
        outer, "message", "error", "detail", "msg", "error_description"
    )
    if said is None and isinstance(outer.get("detail"), list):  # FastAPI's
        said = "; ".join(str(_dict(d).get("msg")) for d in outer["detail"])
    said = " ".join(str(_as_text(document) if said is None else said).split())
    where = f"HTTP status {status}" if status else "an error inside the stream"
    label = f" ({_clipped(kind or code, 100)})" if kind or code else ""
    # Whether it passes with time; for some quotas only the details tell.
    names, details = {str(code).lower(), str(kind).lower()}, inner.get("details")
    retry_after, is_quota = None, bool(names & _PERMANENT)
    if isinstance(details, dict):
        is_quota = is_quota or str(details.get("error_code")) in _PERMANENT
    if isinstance(details, list):
        is_quota = is_quota or "PerDay" in _as_text(details)
        delays = [str(_dict(d).get("retryDelay")) for d in details]
        seconds = [d[:-1] for d in delays if re.match(r"[0-9]+(\.[0-9]+)?s\Z", d)]
        waits = [w for w in map(float, seconds) if 0 < w < math.inf]
        retry_after = waits[0] if waits else None  # Google's RetryInfo
    if is_quota:
        retryable = False
    elif should_retry in ("true", "false"):
        retryable = should_retry == "true" and status not in (401, 402, 403)
    elif status is not None:  # "rate_limit_exceeded" with 413 is a prompt too long
        retryable = status in _RETRY_STATUSES
    else:
        retryable = bool(names & _TRANSIENT) or named in _RETRY_STATUSES
    return APIError(
        f"the provider answered with {where}{label}: "
        + (_clipped(said, 500) or "(no message)"),
        status=status or named,
        code=code,
        type=str(kind) if kind is not None else None,
        body=_as_text(document)[:_BODY_KEPT],
        request_id=_scalar(outer, "request_id"),
        retry_after=retry_after,
        retryable=retryable,
    )


def _dict(value: Any, answer: Answer | None = None) -> dict[str, Any]:
    """A JSON object; anything else is odd, and empty."""
    if isinstance(value, dict):
        return value
    if answer is not None:
        answer.odd(value)
    return {}


def _first_object(document: Any) -> dict[str, Any]:
    return _dict(document[0] if isinstance(document, list) and document else document)


def _scalar(holder: dict[str, Any], *keys: str) -> Any:
    """The first value that is a non-empty string or a number."""
    for key in keys:
        value = holder.get(key)
        if isinstance(value, (str, int)) and value and not isinstance(value, bool):
            return value
    return None


def _as_text(document: Any) -> str:
    if isinstance(document, str):
        return document
    try:
        return jsonlib.dumps(document)
    except (ValueError, RecursionError):
        return "(nested too deeply)"


def http_error(
    status: int, headers: Mapping[str, str], body: str, now: float
) -> APIError:
    """Make the error for a response whose status says no.

    :param headers: its headers; looked up in lower case.
    :param now: the time of day, as a Unix time, for dates in ``Retry-After``.
    """
    try:
        document = parse_json(body)
    except ValueError:
        document = body
    error = _api_error(document, status, headers.get("x-should-retry", "").lower())
    error.body = body[:_BODY_KEPT]
    for name in _words("x-generation-id apim-request-id request-id x-request-id"):
        error.request_id = headers.get(name) or error.request_id
    for name in _words("llm_provider-retry-after retry-after retry-after-ms"):
        wait = _seconds_in(headers.get(name, ""), now)
        wait = wait / 1000 if name.endswith("-ms") else wait
        if 0 < wait < math.inf:  # the last one counts; zero and nonsense are no hint
            error.retry_after = wait
    return error


def _seconds_in(value: str, now: float) -> float:
    """Seconds until a date as HTTP writes it, or a number of them; 0 if it is neither."""
    try:
        date = email.utils.parsedate_tz(value)
        return email.utils.mktime_tz(date) - now if date else float(value)
    except (ValueError, OverflowError, IndexError):  # the latter before Python 3.10
        return 0.0


# ---------------------------------------------------------------------------
# 6. Dialects: one small class a provider
# ---------------------------------------------------------------------------
# A dialect knows a provider's names: where to send, what to send, what each event
# means, how an answer can be resumed.  It has no state; it writes into an Answer.
# Unknown events, blocks and keys are ignored on purpose: providers add new ones.


def _dicts(value: Any, answer: Answer) -> list[dict[str, Any]]:
    """The objects of a JSON array; anything else is odd."""
    if not isinstance(value, list):
        answer.odd(value)
        return []
    for item in value:
        if not isinstance(item, dict):
            answer.odd(item)
    return [item for item in value if isinstance(item, dict)]


class Dialect:
    """How one provider speaks; subclass it for another one.

    The smallest dialect sets ``base_url`` and ``path`` and defines :meth:`read`.
    """

    #: The name, for logs and for :data:`DIALECTS`.
    name = "custom"
    #: The provider's own URL; None where there is none.
    base_url: str | None = None
    #: Environment names of the base URL and of the key, first come first served.
    base_url_names: tuple[str, ...] = ()
    key_names: tuple[str, ...] = ()
    #: What is appended to the base URL.
    path = ""
    #: ``sse`` or ``ndjson`` (one JSON text a line).
    framing = "sse"
    #: The data that ends the stream; "" if there is none.
    end_marker = "[DONE]"
    #: Whether a finish reason is the last word (Gemini may send one on every chunk).
    finish_is_final = True
    #: Keys that may carry text, tool arguments, a finish reason or an error.
    vital_keys = _words("content text finish_reason error")
    #: Keys whose values :meth:`read` does not look at once an answer has begun, such
    #: as padding, or the ID that each chunk repeats.
    idle_keys: tuple[str, ...] = ()
    #: The key that numbers the events, if any; see ``Answer.cursor``.
    cursor_key = ""
    #: The provider's finish reasons in OpenAI's words; others become ``other``.
    finish_reasons: ClassVar[Mapping[str, str]] = {}
    #: Whether a last assistant message is continued, exactly, by every such server.
    continues_exactly = False
    #: Whether the reply may begin with a copy of the text that it continues.
    repeats_prefix = True
    #: Whether the text to be continued must not end in whitespace.
    strips_prefix = False
    #: Whether a request without a key is hopeless, whatever the base URL.
    needs_key = False
    #: Whether events are padded with spaces before their last brace.
    pads = False
    #: The key of the prompt, where the body has one text in place of ``messages``.
    prompt_key = ""

    def named_url(self, value: str) -> str:
        """The base URL that an environment variable names."""
        return value

    def url(self, base_url: str, model: str | None) -> str:
        """The address to POST to."""
        return _join_url(base_url, self.path)

    def resume_url(self, url: str) -> str:
        """The address to continue an answer at, where it is another one."""
        return url

    def auth(self, key: str) -> dict[str, str]:
        """The headers that carry the key."""
        return {"Authorization": "Bearer " + key}

    def headers(self) -> dict[str, str]:
        """Other headers that the provider needs."""
        return {}

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        """The request body."""
        body: Body = {"messages": _turns(messages), "stream": True}
        if self.prompt_key:
            body = {self.prompt_key: _prompt(messages), "stream": True}
        if model is not None:
            body["model"] = model
        return {**body, **params}

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        """Write what one event says into the answer.

        :param chunk: the JSON object of its data.
        :param answer: call ``text``, ``reasoning``, ``finish``, ``end``, ... on it.
        :param event: the event type.
        """
        raise NotImplementedError

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        """Write a whole answer, from a server that did not stream."""
        self.read(document, answer, "message")

    def message(self, answer: Answer, text: str) -> Any:
        """The assistant turn, ready to append to the messages of the next one."""
        return {"role": "assistant", "content": text}

    def error(self, document: Any) -> APIError:
        """The error that an event, or a whole body, reports."""
        return _api_error(document)

    def prefill(self, body: Body, text: str) -> Body | None:
        """The body whose reply continues text; None if there is no such thing."""
        if not self.prompt_key:
            return self.add_turns(body, [("assistant", text)])
        prompt = body.get(self.prompt_key)
        if not isinstance(prompt, str):
            return None
        return {**body, self.prompt_key: prompt + text}

    def exact(self, body: Body) -> bool:
        """Whether the reply to :meth:`prefill` surely continues the text."""
        return self.continues_exactly

    def add_reasoning(self, body: Body, reasoning: str) -> Body:
        """The body of :meth:`prefill`, with the reasoning that led to its text."""
        return body

    def add_turns(self, body: Body, turns: Turns) -> Body | None:
        """The body with turns ``(role, text)`` appended; None if it takes none."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        return {**body, "messages": _append_turns(messages, turns, "content")}

    def reattach_url(self, url: str, answer: Answer) -> str | None:
        """Where the same generation goes on after a drop; None if nowhere."""
        return None

    def finish(self, answer: Answer, raw: Any, index: Any = 0) -> None:
        """Note a finish reason in the provider's own word; null is none."""
        if not isinstance(raw, str) or not raw:
            answer.odd(raw or None)
        elif raw in self.finish_reasons:
            answer.finish(self.finish_reasons[raw], raw, index)
        elif raw.lower().replace("-", "_") in _INTERRUPTIONS:
            message = f"the provider broke the answer off, with finish reason {raw!r}"
            answer.fail(APIError(message, code=raw, retryable=True))
        else:
            logger.info("an unknown finish reason is taken for an end")
            answer.finish("other", raw, index)


def _turns(messages: Messages) -> list[Any]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return list(messages)


def _prompt(messages: Messages) -> str:
    """One prompt out of messages, for servers that take only that."""
    if isinstance(messages, str):
        return messages
    return "\n\n".join(_plain_text(_dict(m).get("content")) for m in messages)


def _plain_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(_dict(part).get("text") or "") for part in parts)


def _split_system(messages: Messages) -> tuple[str, list[Any]]:
    """Take the system messages out, for providers that want them apart."""
    turns = _turns(messages)
    system = [m for m in turns if _dict(m).get("role") in ("system", "developer")]
    rest = [m for m in turns if m not in system]
    return "\n\n".join(_plain_text(m.get("content")) for m in system), rest


def _append_turns(messages: list[Any], turns: Turns, key: str) -> list[Any]:
    """Append turns; a last assistant message of the caller's is continued."""
    (role, text), rest = turns[0], turns[1:]
    last = _dict(messages[-1])
    if last.get("role") == role == "assistant" and isinstance(last.get(key), str):
        messages, text = messages[:-1], last[key] + text
        first = {**last, key: text}
    else:
        first = {"role": role, key: text}
    return messages + [first] + [{"role": r, key: t} for r, t in rest]


def _join_url(base_url: str, path: str) -> str:
    """Append a path, and perhaps a query, to a URL; its own query is kept.

    Where the URL ends in the whole path, or in its version, that is not repeated.
    """
    parts = urlsplit(base_url)
    path, _, query = path.partition("?")
    queries = "&".join(filter(None, [query, parts.query]))
    base = parts.path.rstrip("/")
    version = re.match("/(?:v[0-9]+[a-z0-9]*|api)(?=/)", path)
    if path and base.endswith(path):
        path = ""
    elif version and base.endswith(version[0]):
        path = path[version.end() :]
    return urlunsplit((parts.scheme, parts.netloc, base + path, queries, ""))


#: Finish reasons that name an interruption: a drop, whatever marker follows it.  Of
#: vLLM (shutdown, scale-down), GLM, DeepSeek and gateways; other words are ends.
_INTERRUPTIONS = frozenset(
    _words(
        "abort aborted cancelled canceled error error_finish network_error "
        "insufficient_system_resource repetition_truncation"
    )
)


def _finishes(**words: str) -> Mapping[str, str]:
    """OpenAI's word for each of a provider's finish reasons, from its words for each."""
    return {word: ours for ours in words for word in words[ours].split()}


def _openai_turn(answer: Answer, text: str) -> dict[str, Any]:
    """The assistant turn as OpenAI takes it, and who copies that."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.tool_calls()
    ]
    content = text if text or not calls else None
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if answer.side_text("refusal"):
        turn["refusal"] = answer.side_text("refusal")
    if calls and answer.memory.get("legacy"):
        return {**turn, "function_call": calls[0]["function"]}
    return {**turn, "tool_calls": calls} if calls else turn


class OpenAI(Dialect):
    """OpenAI Chat Completions and its many look-alikes.

    https://platform.openai.com/docs/api-reference/chat-streaming
    """

    name = "openai"
    base_url: str | None = "https://api.openai.com/v1"
    base_url_names = _words("OPENAI_BASE_URL")
    key_names = _words("OPENAI_API_KEY")
    path = "/chat/completions"
    vital_keys = _words(
        "content text finish_reason error delta reasoning reasoning_content refusal "
        "arguments tool_calls"
    )
    idle_keys = _words("id obfuscation p created system_fingerprint")
    finish_reasons = _finishes(
        stop="stop",
        length="length model_length",
        tool_calls="tool_calls function_call",
        content_filter="content_filter",
    )
    #: Whether usage comes only if the request asks for it.
    asks_for_usage = True

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        body = super().body(messages, model, params)
        if self.asks_for_usage:
            body.setdefault("stream_options", {"include_usage": True})
        if body.get("stream_options", 0) is None:
            del body["stream_options"]
        return body

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        self._read_choices(chunk, "delta", answer)

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        self._read_choices(document, "message", answer)

    def _read_choices(self, chunk: dict[str, Any], key: str, answer: Answer) -> None:
        """Read a chunk, or a whole answer: they differ in where a choice's words are."""
        answer.identify(chunk.get("id"), chunk.get("model"))
        for choice in _dicts(chunk.get("choices"), answer):
            index = choice.get("index")
            self._read_delta(choice, key, _index(index), answer)
            if choice.get("error"):  # OpenRouter's, of the provider behind it
                error = self.error({"error": choice["error"]})
                error.retryable = error.retryable or error.status is None
                answer.fail(error)
            self.finish(answer, choice.get("finish_reason"), index)
        usage = chunk.get("usage") or _dict(chunk.get("x_groq")).get("usage")
        if isinstance(usage, dict) and usage:
            sent, received = usage.get("prompt_tokens"), usage.get("completion_tokens")
            answer.count(sent, received, usage)
        if chunk.get("object") == "error":  # vLLM before 0.6
            answer.fail(self.error(chunk))

    def _read_delta(
        self, choice: dict[str, Any], key: str, index: int, answer: Answer
    ) -> None:
        if choice.get(key) is None:
            return
        delta = _dict(choice[key], answer)
        answer.reasoning(_reasoning(delta), index)
        content = delta.get("content")
        if isinstance(content, list):
            self._read_parts(content, index, answer)
        else:
            answer.text(content, index)
        answer.refusal(delta.get("refusal"), index)
        for call in _dicts(delta.get("tool_calls"), answer):
            self._read_call(call, index, answer)
        if delta.get("function_call") is not None:
            call = {"index": 0, "function": delta["function_call"]}
            self._read_call(call, index, answer)
            answer.memory["legacy"] = True

    def _read_parts(self, parts: list[Any], index: int, answer: Answer) -> None:
        """Mistral's content in parts."""
        for part in _dicts(parts, answer):
            if part.get("type") == "thinking":
                for thought in _dicts(part.get("thinking"), answer):
                    answer.reasoning(thought.get("text"), index)
            elif part.get("type") == "text":
                answer.text(part.get("text"), index)

    def _read_call(self, call: dict[str, Any], index: int, answer: Answer) -> None:
        """A fragment of a tool call; servers disagree on how to number them."""
        function = _dict(call.get("function"), answer)
        id, name = call.get("id"), function.get("name")
        key = self._call_key(call, function, index, answer)
        last = answer.memory.get(("call", index))
        if key != last:
            known = answer.calls.get(last)
            if known is not None and known.arguments.kept:
                answer.close_call(last)  # without arguments, they may yet come
            answer.memory["call", index] = key
        answer.open_call(key, id, name)
        answer.call_arguments(key, function.get("arguments"), index)

    def _call_key(
        self, call: dict[str, Any], function: dict[str, Any], index: int, answer: Answer
    ) -> Any:
        number, id, name = call.get("index"), call.get("id"), function.get("name")
        number = number if isinstance(number, int) else None
        id = id if isinstance(id, str) and id else None
        last = answer.memory.get(("call", index))
        if number is None and id is None and not name:
            return last or (index, 0, "")
        base = (index, id if number is None else number)
        if number is None and id is None:  # a nameless shim's next call
            base = (index, answer.calls_begun)
        slot = answer.memory.setdefault(("slot", base), (*base, id or ""))
        known = answer.calls.get(slot)
        if known is None or not name:
            return slot
        if known.id and id:
            is_next = known.id != id
        else:  # a shim that numbers none: another name, or one more behind a whole call
            more = known.arguments.kept and function.get("arguments")
            is_next = known.name not in ("", name) or bool(
                more and _is_json(known.arguments.text)
            )
        if is_next:
            slot = answer.memory["slot", base] = (*base, id or answer.calls_begun)
        return slot

    def message(self, answer: Answer, text: str) -> Any:
        return _openai_turn(answer, text)


def _reasoning(delta: dict[str, Any]) -> Any:
    """Reasoning in any of its spellings; OpenRouter sends the same text twice."""
    text = delta.get("reasoning_content") or delta.get("reasoning")
    if text:
        return text
    details = delta.get("reasoning_details")
    if not isinstance(details, list):
        return None
    pieces = [_dict(d).get("text") or _dict(d).get("summary") for d in details]
    return "".join(piece for piece in pieces if isinstance(piece, str))


class Azure(OpenAI):
    """Azure OpenAI: the base URL is a deployment's, or the resource's /openai/v1."""

    name = "azure"
    base_url = None
    base_url_names = _words("AZURE_OPENAI_ENDPOINT")
    key_names = _words("AZURE_OPENAI_API_KEY AZURE_OPENAI_AD_TOKEN")
    needs_key = True

    def url(self, base_url: str, model: str | None) -> str:
        parts = urlsplit(base_url)
        version = os.environ.get("OPENAI_API_VERSION")
        if parts.path.strip("/"):
            return super().url(base_url, model)
        if model and version:  # as Azure's SDK composes it from its two variables
            path = "/openai/deployments/%s%s?api-version=%s"
            name = quote(model, safe="")
            return _join_url(base_url, path % (name, self.path, version))
        return _join_url(base_url, "/openai/v1" + self.path)

    def auth(self, key: str) -> dict[str, str]:
        if key.startswith("eyJ"):  # an Entra token is a JWT
            return super().auth(key)
        return {"api-key": key}


class VLLM(OpenAI):
    """vLLM and SGLang."""

    name = "vllm"
    base_url = "http://localhost:8000/v1"
    base_url_names = key_names = Dialect.key_names
    continues_exactly = True
    repeats_prefix = False

    def prefill(self, body: Body, text: str) -> Body | None:
        more = super().prefill(body, text)
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        return more and {**more, **flags, "echo": False}


class LlamaCpp(OpenAI):
    """The server of llama.cpp, which continues a last assistant message."""

    name = "llamacpp"
    base_url = "http://localhost:8080/v1"
    base_url_names = key_names = Dialect.key_names
    continues_exactly = True
    repeats_prefix = False
    idle_keys = (*OpenAI.idle_keys, "timings")


class Mistral(OpenAI):
    """Mistral, whose prefix is a flag, and which refuses unknown keys."""

    name = "mistral"
    base_url = "https://api.mistral.ai/v1"
    base_url_names = Dialect.base_url_names
    key_names = _words("MISTRAL_API_KEY")
    asks_for_usage = False
    continues_exactly = True

    def prefill(self, body: Body, text: str) -> Body | None:
        more = super().prefill(body, text)
        if more:
            more["messages"][-1] = {**more["messages"][-1], "prefix": True}
        return more


class DeepSeek(Mistral):
    """DeepSeek; its prefix completion lives under /beta.

    https://api-docs.deepseek.com/guides/chat_prefix_completion
    """

    name = "deepseek"
    base_url = "https://api.deepseek.com"
    key_names = _words("DEEPSEEK_API_KEY")
    asks_for_usage = True
    repeats_prefix = False

    def resume_url(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.hostname != "api.deepseek.com":
            return url
        return urlunsplit(parts._replace(path="/beta" + self.path))

    def add_reasoning(self, body: Body, reasoning: str) -> Body:
        *turns, last = body["messages"]
        return {**body, "messages": [*turns, {**last, "reasoning_content": reasoning}]}


class OpenRouter(OpenAI):
    """OpenRouter: whether an answer can be continued depends on the routed model."""

    name = "openrouter"
    base_url = "https://openrouter.ai/api/v1"
    base_url_names = _words("OPENROUTER_BASE_URL")
    key_names = _words("OPENROUTER_API_KEY")
    idle_keys = (*OpenAI.idle_keys, "provider")


class OpenAICompletions(OpenAI):
    """Raw completions: a prompt and its continuation."""

    name = "openai-completions"
    path = "/completions"
    prompt_key = "prompt"
    continues_exactly = True
    repeats_prefix = False

    def _read_delta(
        self, choice: dict[str, Any], key: str, index: int, answer: Answer
    ) -> None:
        answer.text(choice.get("text"), index)

    def message(self, answer: Answer, text: str) -> Any:
        return {"role": "assistant", "content": text}

    def prefill(self, body: Body, text: str) -> Body | None:
        if body.get("echo"):
            return None  # it has put the prompt into the text
        more = super().prefill(body, text)
        return more and {**more, "echo": False}


class OpenAIResponses(Dialect):
    """OpenAI Responses, the one API whose answers can be reattached.

    https://platform.openai.com/docs/guides/background
    """

    name = "openai-responses"
    base_url = "https://api.openai.com/v1"
    base_url_names = _words("OPENAI_BASE_URL")
    key_names = _words("OPENAI_API_KEY")
    path = "/responses"
    vital_keys = _words("delta text arguments refusal response error")
    end_marker = ""
    idle_keys = _words("obfuscation item_id")
    cursor_key = "sequence_number"
    #: The kinds of text, by the name of the events that bring it.
    _kinds: ClassVar[dict[str, str]] = {
        "output_text": "text",
        "refusal": "refusal",
        "reasoning_text": "reasoning",
        "reasoning_summary_text": "reasoning",
    }
    _ends = _words(
        "response.completed response.incomplete response.failed response.cancelled"
    )

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        body = super().body(messages, model, params)
        turns = body.pop("messages")
        lists = [turn if isinstance(turn, list) else [turn] for turn in turns]
        return {"input": list(itertools.chain.from_iterable(lists)), **body}

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        what, number = str(chunk.get("type")), _count(chunk.get(self.cursor_key))
        number = None if number is None or number < 0 else number
        if what == "keepalive":  # it is stored nowhere: it must not be the cursor
            expected = 0 if answer.cursor is None else answer.cursor + 1
            answer.skipped += number == expected + answer.skipped
            return
        is_next = number is None or answer.follows(number)
        if what == "error":
            answer.fail(self.error(chunk))
        elif what in self._ends:  # these count whatever was missing before them
            self._read_end(chunk, answer)
        elif is_next:
            name, _, step = what.partition("response.")[2].partition(".")
            self._read_step(chunk, answer, name, step)

    def _read_step(
        self, chunk: dict[str, Any], answer: Answer, name: str, step: str
    ) -> None:
        """An event such as ``response.NAME.STEP``; unknown ones count as progress."""
        # Gateways rewrite item IDs between events; llama.cpp sends nothing else.
        item = chunk.get("item_id") or _dict(chunk.get("item")).get("id")
        key = str(chunk.get("output_index", item))
        kind, place = self._kinds.get(name), self._place(name, chunk)
        is_call = name in ("function_call_arguments", "custom_tool_call_input")
        if kind and step == "delta":
            answer.begin_part(kind, place)
            answer.add(kind, chunk.get("delta"))
        elif kind and step == "done":
            text = chunk.get("text", chunk.get("refusal"))
            answer.complete_part(kind, place, text)
        elif is_call and step == "delta":
            answer.call_arguments(key, chunk.get("delta"))
        elif is_call and step == "done":
            answer.complete_call(key, chunk.get("arguments", chunk.get("input")))
        elif name == "output_item":
            item = _dict(chunk.get("item"), answer)
            self._read_item(item, key, step, answer)
            answer.advance()
        elif name in ("created", "queued", "in_progress"):
            response = _dict(chunk.get("response"), answer)
            answer.identify(response.get("id"), response.get("model"))
            answer.advance()
        else:
            answer.advance()

    def _place(self, name: str, place: dict[str, Any]) -> str:
        indexes = ("output_index", "content_index", "summary_index")
        return str([name, *map(place.get, indexes)])

    def _read_item(
        self, item: dict[str, Any], key: str, step: str, answer: Answer
    ) -> None:
        """An output item begins, or is repeated whole at its end: is it a call?"""
        if item.get("type") not in ("function_call", "custom_tool_call"):
            return
        answer.open_call(key, item.get("call_id") or item.get("id"), item.get("name"))
        answer.calls[key].is_json = item["type"] == "function_call"
        arguments = item.get("arguments", item.get("input"))
        if step == "added":
            answer.call_arguments(key, arguments)
        elif step == "done":
            answer.complete_call(key, arguments)

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        if document.get("status") in ("queued", "in_progress"):
            answer.fail(
                IncompleteStreamError(
                    "the server did not stream, and the response is not made yet"
                )
            )
        self._read_end({"response": document}, answer)

    def _read_end(self, chunk: dict[str, Any], answer: Answer) -> None:
        response = _dict(chunk.get("response"), answer)
        answer.identify(response.get("id"), response.get("model"))
        usage = response.get("usage")
        if isinstance(usage, dict):
            answer.count(usage.get("input_tokens"), usage.get("output_tokens"), usage)
        # The event's own type counts as much as the status in it, which may lack.
        status = response.get("status")
        words = (str(chunk.get("type")).rpartition(".")[2], status)
        if response.get("error") or "failed" in words or "cancelled" in words:
            what = "failed" if "failed" in words else "cancelled"
            answer.fail(self.error({"message": f"the response is {what}", **response}))
            return
        output = _dicts(response.get("output"), answer)
        is_proved = self._read_output(output, answer)
        if answer.hole and not (output and is_proved):
            answer.fail(
                IncompleteStreamError(
                    f"{answer.hole}, and the end of the stream does not say what was "
                    "in them",
                    retryable=True,
                )
            )
        answer.memory["output"] = output
        reason = "tool_calls" if answer.calls_begun else "stop"
        if "incomplete" in words:
            why = _dict(response.get("incomplete_details")).get("reason")
            known = {"max_output_tokens": "length", "content_filter": "content_filter"}
            reason, status = known.get(str(why), "other"), status or "incomplete"
        answer.finish(reason, status or "completed")
        answer.end()

    def _read_output(self, output: list[dict[str, Any]], answer: Answer) -> bool:
        """Take from the final object what no event has brought.

        :returns: whether it is known to say what the visible text says, and more.
        """
        texts: dict[str, dict[str, str]] = {"text": {}, "refusal": {}, "reasoning": {}}
        known = {call.id: key for key, call in answer.calls.items()}
        for number, item in enumerate(output):
            # Some gateways number the items here otherwise than in the events.
            id = str(item.get("call_id") or item.get("id"))
            self._read_item(item, known.get(id, str(number)), "done", answer)
            if item.get("type") not in ("message", "reasoning"):
                continue
            for field in ("summary", "content"):
                for index, part in enumerate(_dicts(item.get(field), answer)):
                    name = str(part.get("type")).replace("summary", "reasoning_summary")
                    text = part.get("text", part.get("refusal"))
                    if name in self._kinds and isinstance(text, str):
                        place = {"output_index": number, f"{field}_index": index}
                        texts[self._kinds[name]][self._place(name, place)] = text
        proved = {kind: answer.complete_parts(kind, texts[kind]) for kind in texts}
        return proved["text"]

    def message(self, answer: Answer, text: str) -> Any:
        """A list of output items; :meth:`body` takes such a list as one message."""
        output = answer.memory.get("output", [])
        said = [i.get("content") for i in output if i.get("type") == "message"]
        if output and "".join(map(_plain_text, said)) == text:
            return output  # or else it is only the end of a resumed answer
        items = [self._turn({"role": "assistant", "content": text})] if text else []
        for opened in answer.calls.values():
            call = opened.whole()
            if call is not None:
                kind = "function_call" if opened.is_json else "custom_tool_call"
                value = {"arguments" if opened.is_json else "input": call.arguments}
                about = {"type": kind, "call_id": call.id, "name": call.name}
                items.append({**about, **value})
        return items

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A message as everybody takes it; llama.cpp wants its parts."""
        if turn.get("role") != "assistant" or not isinstance(turn.get("content"), str):
            return turn
        content = [{"type": "output_text", "text": turn["content"]}]
        return {**turn, "type": "message", "content": content}

    def add_turns(self, body: Body, turns: Turns) -> Body | None:
        items = body.get("input")
        if not isinstance(items, list) or not items:
            return None
        items, old = _append_turns(items, turns, "content"), len(items) - 1
        return {**body, "input": items[:old] + list(map(self._turn, items[old:]))}

    def reattach_url(self, url: str, answer: Answer) -> str | None:
        if answer.id is None or answer.cursor is None:
            return None
        path = "/%s?stream=true&starting_after=%d"
        return _join_url(url, path % (quote(answer.id, safe=""), answer.cursor))


class Anthropic(Dialect):
    """Anthropic Messages.

    https://docs.anthropic.com/en/docs/build-with-claude/streaming
    """

    name = "anthropic"
    base_url = "https://api.anthropic.com"
    base_url_names = _words("ANTHROPIC_BASE_URL")
    key_names = _words("ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN")
    path = "/v1/messages"
    end_marker = ""
    vital_keys = _words("text thinking partial_json stop_reason error")
    repeats_prefix = False
    strips_prefix = True
    pads = True
    finish_reasons = _finishes(
        stop="end_turn stop_sequence",
        length="max_tokens model_context_window_exceeded",
        tool_calls="tool_use",
        content_filter="refusal",
    )
    #: The model names whose partial answers are continued by prefill.  (A string, as
    #: all patterns that few streams need: to compile them would slow the import.)
    _prefilled = (
        r"claude-(?:instant|v?[123]\b|(?:opus|sonnet|haiku)-4(?:-[015])?"
        r"(?:[-@]\d{8}|-latest|-v\d|$))"
    )

    def auth(self, key: str) -> dict[str, str]:
        if key.startswith("sk-ant-oat") or key == os.environ.get(
            "ANTHROPIC_AUTH_TOKEN"
        ):
            return super().auth(key)
        return {"x-api-key": key}

    def headers(self) -> dict[str, str]:
        return {"anthropic-version": "2023-06-01"}

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        system, turns = _split_system(messages)
        body = super().body(turns, model, {"max_tokens": 4096, **params})
        if system:
            body.setdefault("system", system)
        return body

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        what, key = chunk.get("type"), str(chunk.get("index"))[:20]
        if what == "message_start":
            self._read_message(_dict(chunk.get("message"), answer), answer)
        elif what == "content_block_start":
            self._read_start(_dict(chunk.get("content_block"), answer), key, answer)
        elif what == "content_block_delta":
            self._read_delta(_dict(chunk.get("delta"), answer), key, answer)
        elif what == "content_block_stop":
            answer.close_call(key)
            answer.advance()
        elif what == "message_delta":
            self._read_usage(chunk, answer)
            self.finish(answer, _dict(chunk.get("delta"), answer).get("stop_reason"))
        elif what == "message_stop":
            answer.end()

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        self._read_message(document, answer)
        for number, block in enumerate(_dicts(document.get("content"), answer)):
            is_call = block.get("type") == "tool_use"
            start = {**block, "input": {}} if is_call else block
            self._read_start(start, str(number), answer)
            if is_call:
                answer.call_arguments(str(number), block.get("input") or "{}")
        self.finish(answer, document.get("stop_reason"))

    def _read_message(self, message: dict[str, Any], answer: Answer) -> None:
        answer.identify(message.get("id"), message.get("model"))
        self._read_usage(message, answer)

    def _read_usage(self, holder: dict[str, Any], answer: Answer) -> None:
        usage = holder.get("usage")
        if not isinstance(usage, dict):
            answer.odd(usage)
            return
        news = {name: count for name, count in usage.items() if count is not None}
        known = {**(answer.usage.raw if answer.usage else {}), **news}
        answer.count(known.get("input_tokens"), known.get("output_tokens"), known)

    def _read_start(self, block: dict[str, Any], key: str, answer: Answer) -> None:
        what = block.get("type")
        answer.advance()
        if what in ("text", "thinking"):  # its text is called like the block
            kind = "text" if what == "text" else "reasoning"
            part = answer.add_part({**block, what: ""}, what, kind)
            answer.add(kind, block.get(what))
        elif what == "tool_use":
            answer.open_call(key, block.get("id"), block.get("name"))
            part = answer.add_part(block, "partial_json", key=key)
            first = block.get("input")
            answer.call_arguments(key, jsonlib.dumps(first) if first else "")
        else:
            part = answer.add_part(dict(block))
        answer.memory["block", key] = part

    def _read_delta(self, delta: dict[str, Any], key: str, answer: Answer) -> None:
        what, part = delta.get("type"), answer.memory.get(("block", key))
        form: dict[str, Any] = part.form if part else {}
        if what == "text_delta":
            answer.text(delta.get("text"))
        elif what == "thinking_delta":
            answer.reasoning(delta.get("thinking"))
        elif what == "input_json_delta" and form.get("type") in (None, "tool_use"):
            answer.call_arguments(key, delta.get("partial_json"))
        elif what == "input_json_delta" and part:  # of a tool that the provider runs
            answer.lengthen(part, "partial_json", delta.get("partial_json"))
            answer.advance()
        elif what == "signature_delta" and part:
            answer.lengthen(part, "signature", delta.get("signature"))
        elif what == "citations_delta":
            answer.keep(delta)
            form["citations"] = form.get("citations") or []
            form["citations"].append(delta.get("citation"))
        elif what == "compaction_delta":
            answer.keep(delta)
            form["content"] = delta.get("content")

    def message(self, answer: Answer, text: str) -> Any:
        blocks = answer.turn(text)
        for block in blocks:
            if "partial_json" in block:
                block["input"] = _json_or(block.pop("partial_json") or "{}", {})
        # The API refuses to be sent text that is nothing but white space.
        kept = [b for b in blocks if b.get("type") != "text" or b["text"].strip()]
        return {"role": "assistant", "content": kept}

    def prefill(self, body: Body, text: str) -> Body | None:
        thinking = _dict(body.get("thinking")).get("type", "disabled")
        if thinking != "disabled" or not text:
            return None
        return super().prefill(body, text)

    def exact(self, body: Body) -> bool:
        return bool(re.search(self._prefilled, str(body.get("model"))))


class Gemini(Dialect):
    """Gemini, of AI Studio and of Vertex.

    https://ai.google.dev/api/generate-content#method:-models.streamgeneratecontent
    """

    name = "gemini"
    base_url = "https://generativelanguage.googleapis.com"
    base_url_names = _words("GOOGLE_GEMINI_BASE_URL")
    key_names = _words("GOOGLE_API_KEY GEMINI_API_KEY")
    end_marker = ""
    finish_is_final = False
    vital_keys = _words("text functionCall finishReason error")
    idle_keys = _words("responseId modelVersion")
    finish_reasons = _finishes(
        stop="STOP",
        length="MAX_TOKENS",
        content_filter="SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY",
    )

    def url(self, base_url: str, model: str | None) -> str:
        if model is None:
            return _join_url(base_url, ":streamGenerateContent?alt=sse")
        known = "/v[0-9][a-z0-9]*(?:/projects/.*)?/?$"  # the latter is Vertex
        version = "" if re.search(known, urlsplit(base_url).path) else "/v1beta"
        name = model.partition("models/")[2] or model
        path = "%s/models/%s:streamGenerateContent?alt=sse"
        return _join_url(base_url, path % (version, quote(name)))

    def auth(self, key: str) -> dict[str, str]:
        if key.startswith("ya29."):  # Google's OAuth tokens, as Vertex wants them
            return super().auth(key)
        return {"x-goog-api-key": key}

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        system, turns = _split_system(messages)
        body: dict[str, Any] = {"contents": [self._content(turn) for turn in turns]}
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        return {**body, **params}

    def _content(self, turn: Any) -> Any:
        """A message in OpenAI's form becomes one of Gemini's; its own stay."""
        if not isinstance(turn, dict) or "content" not in turn:
            return turn
        role = "model" if turn.get("role") in ("assistant", "model") else "user"
        return {"role": role, "parts": [{"text": _plain_text(turn["content"])}]}

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        answer.identify(chunk.get("responseId"), chunk.get("modelVersion"))
        for candidate in _dicts(chunk.get("candidates"), answer):
            self._read_candidate(candidate, answer)
        blocked = _dict(chunk.get("promptFeedback")).get("blockReason")
        if blocked and not chunk.get("candidates"):
            answer.finish("content_filter", blocked)
        usage = chunk.get("usageMetadata")
        if isinstance(usage, dict):
            names = ("candidatesTokenCount", "thoughtsTokenCount")
            counts = [_count(usage.get(name)) for name in names]
            known = [count for count in counts if count is not None]
            output = sum(known) if known else None
            answer.count(usage.get("promptTokenCount"), output, usage)

    def _read_candidate(self, candidate: dict[str, Any], answer: Answer) -> None:
        index = _index(candidate.get("index"))
        content = _dict(candidate.get("content"), answer)
        for part in _dicts(content.get("parts"), answer):
            self._read_part(part, index, answer)
        raw = candidate.get("finishReason")
        if isinstance(raw, int) and not isinstance(raw, bool):
            raw = {1: "STOP", 2: "MAX_TOKENS", 3: "SAFETY"}.get(raw, str(raw))
        if raw == "STOP" and answer.calls_begun:  # there is no word for tools
            answer.finish("tool_calls", raw, index)
        elif raw is not None:
            self.finish(answer, raw, index)

    def _read_part(self, part: dict[str, Any], index: int, answer: Answer) -> None:
        call, text = part.get("functionCall"), part.get("text")
        if isinstance(call, dict):
            # A name begins another call; only a piece of one has none.
            is_piece = "partial" in answer.memory and not call.get("name")
            if is_piece or "partialArgs" in call or call.get("willContinue"):
                self._read_partial(part, call, index, answer)
            else:
                self._read_call(part, (index, answer.calls_begun), index, answer)
            return
        is_text = "text" in part and part.get("thought") is not True
        last = answer.parts[-1].form if answer.parts else None
        if index == 0 and not is_text:
            answer.add_part(dict(part))
        elif index == 0 and part.get("thoughtSignature"):
            answer.add_part({**part, "text": ""}, "text", "text")
        elif index == 0 and text and last != {"text": ""}:  # else it goes on
            answer.add_part({"text": ""}, "text", "text")
        answer.add("text" if is_text else "reasoning", text, index)

    def _read_call(
        self, part: dict[str, Any], key: Any, index: int, answer: Answer
    ) -> None:
        """A call that is whole."""
        call = part["functionCall"]
        if index == 0:
            answer.add_part(part)
        answer.open_call(key, call.get("id"), call.get("name"))
        answer.call_arguments(key, jsonlib.dumps(call.get("args") or {}), index)
        answer.close_call(key)

    def _read_partial(
        self, part: dict[str, Any], call: dict[str, Any], index: int, answer: Answer
    ) -> None:
        """Vertex streams arguments as values at JSON paths; {} ends the call."""
        if call.get("name") or "partial" not in answer.memory:
            first = {k: v for k, v in call.items() if k in ("name", "id")}
            whole = {**part, "functionCall": first}
            key = (index, answer.calls_begun)
            answer.keep(whole)
            answer.memory["partial"] = (key, whole, {})
            answer.open_call(key, call.get("id"), call.get("name"))
        key, whole, values = answer.memory["partial"]
        for piece in _dicts(call.get("partialArgs"), answer):
            path = str(piece.get("jsonPath") or "")
            name = next((name for name in piece if name.endswith("Value")), None)
            if name is not None:
                if path not in values:
                    for step in _steps_of(path):
                        answer.keep(step)
                value = None if name == "nullValue" else piece[name]
                answer.keep(value)
                values.setdefault(path, []).append(value)
        if call.get("willContinue"):
            answer.advance()
            return
        del answer.memory["partial"]
        whole["functionCall"]["args"] = _object_of(values)
        self._read_call(whole, key, index, answer)

    def message(self, answer: Answer, text: str) -> Any:
        return {"role": "model", "parts": answer.turn(text) or [{"text": text}]}

    def add_turns(self, body: Body, turns: Turns) -> Body | None:
        contents = body.get("contents")
        if not isinstance(contents, list) or not contents:
            return None
        new = [self._content({"role": r, "content": t}) for r, t in turns]
        last = _dict(contents[-1])
        if last.get("role") == new[0]["role"] and isinstance(last.get("parts"), list):
            new[0] = {**last, "parts": last["parts"] + new[0]["parts"]}
            contents = contents[:-1]
        return {**body, "contents": contents + new}


_PATH_STEP = r"""\[(\d{1,9})\]|\['([^']*)'\]|\["([^"]*)"\]|([^.\[\]$]+)"""


def _steps_of(path: str) -> Iterator[int | str]:
    for number, single, double, name in re.findall(_PATH_STEP, path):
        yield int(number) if number else single or double or name


def _object_of(pieces: dict[str, list[Any]]) -> dict[str, Any]:
    """One object out of values at paths such as ``$.days[0].name``.

    :param pieces: the values by path; strings come in pieces.
    """
    whole: dict[str, Any] = {}
    for path, values in pieces.items():
        value = values[-1]
        if isinstance(value, str):
            value = "".join(piece for piece in values if isinstance(piece, str))
        steps = list(_steps_of(path))
        inner: list[Any] = [[] if isinstance(step, int) else {} for step in steps[1:]]
        node: Any = whole
        for step, below in zip(steps, [*inner, value]):
            if isinstance(node, dict) and isinstance(step, str):
                node = node.setdefault(step, below)
            elif isinstance(node, list) and step in range(len(node) + 1):
                node[len(node) :] = [below] if step == len(node) else []  # in order
                node = node[cast(int, step)]
            else:
                break  # the paths contradict each other
    return whole


class Cohere(Dialect):
    """Cohere, version 2 of its chat API.

    https://docs.cohere.com/v2/docs/streaming
    """

    name = "cohere"
    base_url = "https://api.cohere.com"
    base_url_names = _words("CO_API_URL")
    key_names = _words("CO_API_KEY")
    path = "/v2/chat"
    vital_keys = _words("text thinking arguments finish_reason error")
    finish_reasons = _finishes(
        stop="COMPLETE STOP_SEQUENCE", length="MAX_TOKENS", tool_calls="TOOL_CALL"
    )

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        what, key = chunk.get("type") or event, str(chunk.get("index"))
        delta = _dict(chunk.get("delta"), answer)
        message = _dict(delta.get("message"), answer)
        if what == "message-start":
            answer.identify(chunk.get("id"), None)
            answer.advance()
        elif what in ("content-start", "content-delta"):
            self._read_content(_dict(message.get("content"), answer), answer)
        elif what in ("tool-call-start", "tool-call-delta"):
            self._read_call(key, _dict(message.get("tool_calls"), answer), answer)
        elif what == "tool-call-end":
            answer.close_call(key)
        elif what == "tool-plan-delta":
            self._read_plan(message, answer)
            answer.advance()
        elif what == "message-end":
            self._read_end(delta, answer)

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        answer.identify(document.get("id"), None)
        message = _dict(document.get("message"), answer)
        self._read_plan(message, answer)
        for part in _dicts(message.get("content"), answer):
            self._read_content(part, answer)
        for number, call in enumerate(_dicts(message.get("tool_calls"), answer)):
            self._read_call(str(number), call, answer)
        self._read_end(document, answer)

    def _read_plan(self, message: dict[str, Any], answer: Answer) -> None:
        """What it says before it calls tools: the next turn needs it, no reader."""
        plan = message.get("tool_plan")
        if isinstance(plan, str) and plan:
            answer.keep(plan)
            answer.memory.setdefault("plan", TextBuffer(Room())).add(plan)

    def _read_content(self, content: dict[str, Any], answer: Answer) -> None:
        answer.reasoning(content.get("thinking"))
        answer.text(content.get("text"))

    def _read_call(self, key: str, call: dict[str, Any], answer: Answer) -> None:
        function = _dict(call.get("function"), answer)
        answer.open_call(key, call.get("id"), function.get("name"))
        answer.call_arguments(key, function.get("arguments"))

    def _read_end(self, delta: dict[str, Any], answer: Answer) -> None:
        usage = _dict(delta.get("usage"))
        tokens = _dict(usage.get("tokens"))
        if usage:
            answer.count(tokens.get("input_tokens"), tokens.get("output_tokens"), usage)
        raw = delta.get("finish_reason")
        if raw in ("ERROR", "TIMEOUT") or delta.get("error"):
            kind = delta.get("error_type") or raw
            error = self.error({"error": delta.get("error") or raw, "type": kind})
            error.retryable = error.retryable or raw == "TIMEOUT"
            answer.fail(error)
        else:
            self.finish(answer, raw)

    def message(self, answer: Answer, text: str) -> Any:
        turn = _openai_turn(answer, text)
        if turn["content"] is None:
            del turn["content"]
        plan = answer.memory.get("plan")
        return {**turn, "tool_plan": plan.text} if plan else turn


class Ollama(Dialect):
    """Ollama's own chat API: one JSON text a line.

    https://docs.ollama.com/api/chat
    """

    name = "ollama"
    base_url = "http://localhost:11434"
    base_url_names = _words("OLLAMA_HOST")
    key_names = _words("OLLAMA_API_KEY")
    path = "/api/chat"
    framing = "ndjson"
    end_marker = ""
    vital_keys = _words("content thinking response tool_calls done error")
    idle_keys = _words("created_at")
    finish_reasons = _finishes(stop="stop", length="length")

    def named_url(self, value: str) -> str:
        """OLLAMA_HOST is the server's address to listen at, often without scheme."""
        parts = urlsplit(value if "://" in value else "//" + value)
        netloc = parts.netloc.replace("0.0.0.0", "127.0.0.1")
        if netloc.startswith(":"):
            netloc = "127.0.0.1" + netloc
        if not parts.scheme and parts.port is None:
            netloc += ":11434"
        return urlunsplit((parts.scheme or "http", netloc, parts.path, "", ""))

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        answer.identify(None, chunk.get("model"))
        message = _dict(chunk.get("message"), answer)
        answer.reasoning(message.get("thinking"))
        answer.text(message.get("content"))
        for call in _dicts(message.get("tool_calls"), answer):  # each comes whole
            function, key = _dict(call.get("function"), answer), answer.calls_begun
            answer.open_call(key, call.get("id"), function.get("name"))
            answer.call_arguments(key, jsonlib.dumps(function.get("arguments") or {}))
            answer.close_call(key)
        if chunk.get("done") is not True:
            return
        counts = {k: v for k, v in chunk.items() if k.endswith(("count", "duration"))}
        sent, received = chunk.get("prompt_eval_count"), chunk.get("eval_count")
        if "eval_count" in chunk or "prompt_eval_count" in chunk:
            answer.count(sent, received, counts)
        raw = chunk.get("done_reason")
        if raw == "stop" and answer.calls_begun:
            answer.finish("tool_calls", raw)
        elif raw:
            self.finish(answer, raw)
        answer.end()

    def message(self, answer: Answer, text: str) -> Any:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if answer.side_text("reasoning"):
            message["thinking"] = answer.side_text("reasoning")
        calls = [
            {
                **({"id": c.id} if c.id else {}),
                "function": {"name": c.name, "arguments": parse_json(c.arguments)},
            }
            for c in answer.tool_calls()
        ]
        return {**message, "tool_calls": calls} if calls else message


class OllamaGenerate(Ollama):
    """Ollama's completion of one prompt."""

    name = "ollama-generate"
    path = "/api/generate"
    prompt_key = "prompt"
    repeats_prefix = False

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        system, turns = _split_system(messages)
        body = super().body(turns, model, params)
        return {"system": system, **body} if system else body

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        message = {"content": chunk.get("response"), "thinking": chunk.get("thinking")}
        super().read({**chunk, "message": message}, answer, event)

    def prefill(self, body: Body, text: str) -> Body | None:
        # A template would be put around prompt and text, unless the body is raw.
        return super().prefill(body, text) if self.exact(body) else None

    def exact(self, body: Body) -> bool:
        return body.get("raw") is True


class TGI(Dialect):
    """The native API of Hugging Face's Text Generation Inference."""

    name = "tgi"
    path = "/generate_stream"
    end_marker = ""
    vital_keys = _words("token text generated_text error")
    prompt_key = "inputs"
    continues_exactly = True
    repeats_prefix = False
    finish_reasons = _finishes(stop="eos_token stop_sequence", length="length")

    def body(self, messages: Messages, model: str | None, params: Body) -> Body:
        parameters = {"details": True, **_dict(params.get("parameters"))}
        return {**params, "inputs": _prompt(messages), "parameters": parameters}

    def read(self, chunk: dict[str, Any], answer: Answer, event: str) -> None:
        token = _dict(chunk.get("token"), answer)
        if not token.get("special"):
            answer.text(token.get("text"))
        if chunk.get("generated_text") is not None:
            self._read_end(_dict(chunk.get("details"), answer), answer)

    def read_whole(self, document: dict[str, Any], answer: Answer) -> None:
        answer.text(document.get("generated_text"))
        self._read_end(_dict(document.get("details"), answer), answer)

    def _read_end(self, details: dict[str, Any], answer: Answer) -> None:
        if details:
            tokens = details.get("generated_tokens")
            answer.count(details.get("input_length"), tokens, details)
            self.finish(answer, details.get("finish_reason"))
        answer.end()


#: The dialects by name; add your own, or pass an instance as ``dialect=``.
DIALECTS: dict[str, Dialect] = {
    kind.name: kind()
    for kind in (
        *(OpenAI, Azure, VLLM, LlamaCpp, Mistral, DeepSeek, OpenRouter),
        *(OpenAIResponses, OpenAICompletions, Anthropic, Gemini),
        *(Cohere, Ollama, OllamaGenerate, TGI),
    )
}


# ---------------------------------------------------------------------------
# 7. Intake: bytes of a body -> pieces of the answer
# ---------------------------------------------------------------------------
# What a body is shows in its first byte, whatever its Content-Type says: an event
# stream, JSON lines, one JSON text from a server that did not stream, or HTML from a
# proxy.  The central path is short: bytes, a region of complete blocks, pieces.
# Where events differ in their text alone, they are not parsed one by one: see _Shape,
# which gives the same pieces or none.


class _EventDecoder(SSEDecoder):
    """An event stream; what two kinds of servers say outside of data is an event too."""

    def _stray(self, lines: list[str]) -> list[ServerSentEvent]:
        text = "\n".join(lines)
        field, _, value = text.partition(":")  # llama.cpp's "error: {...}"
        text = value if field == "error" else text  # or Google's JSON in many lines
        try:
            document = parse_json(text)
        except ValueError:
            return []  # an unknown field, which the standard ignores
        if field == "error" and not _dict(document).get("error"):
            document, text = {"error": document}, f'{{"error": {text}}}'
        is_error = _first_object(document).get("error")
        return [ServerSentEvent("error", text, "")] if is_error else []


class _LineDecoder(SSEDecoder):
    """JSON lines: each is a block of its own."""

    _terminator = b"\n"

    def _parse(self, region: bytes) -> list[ServerSentEvent]:
        lines = [line for line in region.split(b"\n") if line.strip()]
        return _new_events(itertools.repeat("message"), lines, itertools.repeat(""))


class _WholeDecoder(SSEDecoder):
    """One JSON text; it is read at its end."""

    def _frame(self, chunk: bytes) -> bytes:
        self._keep(chunk)
        return b""


#: A JSON string and, if it is a key, the string or the whole number behind it.  One
#: match takes up where the other ends, so that none begins inside of a string.
_STRING = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_MEMBER = re.compile(rf"{_STRING}(?:\s*:\s*(?:{_STRING}|(0|[1-9][0-9]*)(?![0-9.eE]))|)")
#: An event whose data is one line, with or without a type; or a JSON line.
_ONE_LINE = re.compile(r"(?:event: ?([^\n]*)\n)?(?:data: ?)?([^\n]*)\n\n?\Z")

#: What may stand in a hole, by its kind.  (Never a line feed: a match that runs on into
#: the next block would swallow it.)
_HOLES = {
    "text": rb'([^"\\\n]*(?:\\.[^"\\\n]*)*)',
    "idle": rb'[^"\\\n]*',
    "number": rb"(?:0|[1-9][0-9]{0,17})",
    "cursor": rb"(0|[1-9][0-9]{0,17})",
    "spaces": rb" *",
}
_MOST_HOLES = 16  # and strings tried for the text: each is read as often as the event
_LESSON = 8192  # bytes of an event to learn from


class _Shape:
    """What stays the same in events that differ in their text alone.

    A shape is learned from one event: the characters that stay (literals) and the
    holes between them.  One hole is the JSON string whose value :meth:`Dialect.read`
    delivered, proved by reading the event again with another string in its place.
    The others are values that the dialect does not read, its event number, or spaces
    at the end.  What consists of literals and valid holes would be parsed to the same
    thing with another text.

    :param block: the event, with its terminator.
    :raises ValueError: it does more than bring one text, and so it teaches nothing.
    """

    def __init__(self, dialect: Dialect, block: bytes) -> None:
        self._block = block.decode("utf-8", "replace")
        found = _ONE_LINE.match(self._block)
        if found is None or len(block) > _LESSON:
            raise ValueError("its data is not one short line")
        self._dialect = dialect
        self._event, self._start = found[1] or "message", found.start(2)
        answer = self._read(self._block)
        piece = answer.out[0] if len(answer.out) == 2 else None  # one, read twice
        is_side = isinstance(piece, Delta) and (piece.index, piece.kind) != (
            0,
            "reasoning",
        )
        if piece is None or is_side:
            raise ValueError("it brings no text, or more than one")
        #: ``text`` or ``reasoning``, and the part of the answer that it belongs to.
        self.kind = piece.kind if isinstance(piece, Delta) else "text"
        self.part = answer.part(self.kind)
        holes = list(self._holes(piece))
        edges = [edge for start, end, _ in holes for edge in (start, end)]
        bounds = [0, *edges, len(self._block)]
        literals = [self._block[a:b] for a, b in zip(bounds[::2], bounds[1::2])]
        kinds = [kind for *_, kind in holes]
        # Between two holes that touch, nothing would tell where the one ends.
        if kinds.count("text") != 1 or len(kinds) > _MOST_HOLES or not all(literals):
            raise ValueError("there is not one place where any text may stand")
        fixed = [re.escape(literal.encode()) for literal in literals]
        inner = [_HOLES[kind] + literal for kind, literal in zip(kinds, fixed[1:])]
        self._pattern = re.compile(fixed[0] + b"".join(inner))
        #: For one event, as a live stream brings them: its match, or None.
        self.match = self._pattern.fullmatch
        groups = [kind for kind in kinds if kind in ("text", "cursor")]
        #: The groups of a match that are the text, and the number; 0 for no number.
        self.text = groups.index("text") + 1
        self.cursor = groups.index("cursor") + 1 if "cursor" in groups else 0

    def split(self, region: bytes) -> tuple[list[bytes], list[str], list[int]]:
        """Split a region at the events of this shape.

        :returns: the gaps before, between and behind them; their texts; their
            numbers, if they have any.
        :raises ValueError: a text needs more than to be unquoted.
        """
        parts, step = self._pattern.split(region), self._pattern.groups + 1
        bodies = parts[self.text :: step]
        texts = list(map(bytes.decode, bodies))
        if b"\\" in b"".join(bodies):
            texts = [_unescaped(text) if "\\" in text else text for text in texts]
        numbers = parts[self.cursor :: step] if self.cursor else []
        return parts[::step], texts, list(map(int, numbers))

    def _read(self, block: str) -> Answer:
        """What an event says to an answer.

        It is read twice, for what it says the second time depends on the first: such
        an event (a part given once more as a whole, say) teaches nothing.

        :raises ValueError: it says more than pieces of the answer.
        """
        answer, dialect = Answer(), self._dialect
        chunk = parse_json(block[self._start :])
        number = _count(chunk.get(dialect.cursor_key))
        answer.cursor = before = None if number is None else number - 1
        dialect.read(chunk, answer, self._event)
        pieces, answer.cursor = list(answer.out), before
        dialect.read(chunk, answer, self._event)
        effects = (answer.error, answer.ended, answer.finishes, answer.usage)
        counts = (answer.malformed, answer.parts, answer.calls_begun)
        is_more = any(effects) or any(counts) or chunk.get("error")
        moves = answer.progress != len(answer.out) or not answer.is_plain
        if is_more or moves or answer.out != pieces * 2:
            raise ValueError("it says more than pieces of the answer")
        return answer

    def _with(self, member: re.Match[str], value: str) -> Answer:
        """What the event says with another string as the value of a member."""
        start, end = member.span(2)
        quoted = jsonlib.dumps(value)[1:-1]
        return self._read(self._block[:start] + quoted + self._block[end:])

    def _holes(self, piece: Piece) -> Iterator[tuple[int, int, str]]:
        """Where the event varies, in order: ``(start, end, kind)``."""
        dialect, text, tried = self._dialect, str(piece), 0
        other = (
            piece._replace(text=f"{text}?") if isinstance(piece, Delta) else f"{text}?"
        )
        for member in _MEMBER.finditer(self._block, self._start):
            key, value, number = member.groups()
            is_idle = key in dialect.idle_keys
            if number is not None and key == (dialect.cursor_key or None):
                yield (*member.span(3), "cursor")
            elif number is not None and is_idle:
                yield (*member.span(3), "number")
            elif value and is_idle:
                yield (*member.span(2), "idle")
            elif value == "" and is_idle:  # the first that is not empty may be noted
                said = self._with(member, "?")
                if "?" not in (said.id, said.model):
                    yield (*member.span(2), "idle")
            elif value and parse_json(f'"{value}"') == text:
                tried += 1
                if tried > _MOST_HOLES:
                    raise ValueError("too many strings may be the text")
                # Without it there is no text, and any other string would be the text.
                is_text = not self._with(member, "").out
                if is_text and self._with(member, str(other)).out == [other] * 2:
                    yield (*member.span(2), "text")
        if dialect.pads:
            end = len(self._block.rstrip()) - 1
            yield (len(self._block[:end].rstrip()), end, "spaces")


def _unescaped(body: str) -> str:
    """The value of a JSON string with escapes, given without its quotes.

    :raises ValueError: it is not one string, or needs mending.
    """
    text = parse_json(f'"{body}"')
    if not isinstance(text, str) or _SURROGATE.search(text):
        raise ValueError("not a plain JSON string")
    return text


def _hands_on_any_words(kind: type) -> bool:
    """Whether a dialect hands on all words as they are, as this module's do.

    A class from elsewhere may say other things of requests.  If it defines ``read``,
    or a private method that ``read`` may call, it may look at the words.
    """
    elsewhere = [base for base in kind.__mro__ if base.__module__ != __name__]
    names = [name for base in elsewhere for name in vars(base)]
    return not any(name == "read" or re.match("_[^_]", name) for name in names)


_HEAD = 4096  # bytes in which a body shows what it is
#: Nothing yet, or a brace that may begin a JSON line or a JSON text of many lines.
_UNDECIDED = re.compile(rb"(?:\{[ \t]*\r?)?\Z")
#: How no JSON line begins: an array, JSON of many lines, a field or a comment.
_NO_JSON_LINE = re.compile(rb"\[|\{[ \t]*\r?\n|[deir:]")

#: Fields that are no part of an event: a comment, or a blank line, is one without a name.
_IDLE_FIELDS = frozenset([b"", b"id", b"retry"])

_PATIENCE = 8  # events looked at in vain before it gives up
_LARGE = 262144  # patterns remember too much of a larger region

#: What a dialect may run into when JSON has an odd shape.
_ODDITIES = (AttributeError, LookupError, TypeError, ValueError, RecursionError)


class _Intake:
    """The body of one response: fed with bytes, it gives pieces of the answer.

    :param dialect: how to read an event.
    :param answer: what it is written into; ``answer.error`` must be looked at after
        each call, once the pieces are handed out.
    :param on_event: called with each event, where somebody wants to see them.
    """

    def __init__(
        self,
        dialect: Dialect,
        answer: Answer,
        limits: Limits,
        on_event: Callable[[ServerSentEvent], None] | None = None,
    ) -> None:
        self.events = 0  # so many were read
        self._dialect = dialect
        self._answer = answer
        self._limits = limits
        self._on_event = on_event
        # The first bytes, until they show what decoder is to have them; then None.
        self._first: bytes | None = b""
        self._decoder: SSEDecoder = _EventDecoder(limits=limits)
        # The shape of the last event that taught one, and how many more may try.
        self._shape: _Shape | None = None
        learns = on_event is None and _hands_on_any_words(type(dialect))
        self._patience = _PATIENCE if learns else 0

    def feed(self, chunk: bytes) -> list[Piece]:
        """Take the next bytes; return what they bring.

        :param chunk: b"" where the body has ended cleanly.
        """
        if not chunk:
            return self.end()
        try:
            if self._first is not None:
                chunk = self._choose_decoder(chunk)
            region = self._decoder._frame(chunk)
            if region and (self._shape is None or not self._read_alike(region)):
                self._read_region(region)
            if self._decoder._excess:
                self._decoder._check()
        except StreamingError as error:
            self._answer.fail(error)
        return self._answer.take()

    def end(self) -> list[Piece]:
        """The body has ended cleanly; return what that brings."""
        answer = self._answer
        try:
            self._read_end()
            if answer.error is None and (answer.ended or answer.finished):
                answer.settle()
        except StreamingError as error:
            answer.fail(error)
        return answer.take()

    def _choose_decoder(self, chunk: bytes) -> bytes:
        """Look at the first bytes that are not blank.

        :returns: what the decoder is to begin with; nothing, if more must be seen.
        """
        self._first = first = (self._first or b"") + chunk
        head = first[:_HEAD].lstrip(_BOM).lstrip()
        if len(first) < _HEAD and _UNDECIDED.match(head):
            return b""
        if head.startswith(b"<"):
            shown = " ".join(head.decode("ascii", "replace").split())
            raise MalformedStreamError(
                "the server sent HTML, not a stream: is the base URL right, or does a "
                f"proxy stand between? It begins with {_clipped(shown, 80)!r}"
            )
        if self._dialect.framing == "ndjson" and not _NO_JSON_LINE.match(head):
            self._decoder = _LineDecoder(limits=self._limits)
        elif head.startswith((b"{", b"[")):
            self._decoder = _WholeDecoder(limits=self._limits)
        self._first = None
        return first

    def _read_alike(self, region: bytes) -> bool:
        """Read a region by the known shape.

        :returns: False if nothing was read: it must be parsed event by event.
        """
        answer, shape = self._answer, self._shape
        if shape is None or len(region) > _LARGE or not answer.is_plain:
            return False
        try:
            found = shape.match(region)
            if found is None:
                gaps, texts, numbers = shape.split(region)
            else:
                text = found[shape.text].decode()
                if "\\" in text:
                    text = _unescaped(text)
        except ValueError:  # a text needs mending, which parsing does
            return False
        if found is not None:
            # One event: what _read_texts does for many, in as few calls as can be.
            self._patience = _PATIENCE
            self.events += 1
            if shape.cursor and not answer.follows(int(found[shape.cursor])):
                return True
            if text:
                if shape.part is not None:
                    answer.begin_part(shape.kind, shape.part)
                answer.add_texts(shape.kind, [text])
            return True
        # A match in the middle of a block is none.
        end = self._decoder._terminator
        if not texts or not all(gap.endswith(end) for gap in gaps if gap):
            return False
        self._patience = _PATIENCE
        start = 0
        for place, gap in enumerate(gaps):  # so many texts stand before this gap
            if gap or place == len(texts):
                self._read_texts(shape, texts[start:place], numbers[start:place])
                start = place
                if gap and not self._read_events(self._decoder._parse(gap)):
                    break
        return True

    def _read_texts(self, shape: _Shape, texts: list[str], numbers: list[int]) -> None:
        """Read what events of the shape bring, one behind the other."""
        answer, kind = self._answer, shape.kind
        self.events += len(texts)
        if numbers:
            first = numbers[0]
            told = answer.cursor == first - 1 and not answer.skipped
            if told and numbers == list(range(first, first + len(numbers))):
                answer.cursor = numbers[-1]  # no hole and no repetition among them
            else:
                pairs = zip(texts, numbers)
                texts = [text for text, number in pairs if answer.follows(number)]
        texts = list(filter(None, texts))
        if not texts:
            return
        if shape.part is not None:
            answer.begin_part(kind, shape.part)
        if answer.is_plain:  # a gap may have made it otherwise
            answer.add_texts(kind, texts)
        else:
            for text in texts:
                answer.add(kind, text, 0)

    def _read_region(self, region: bytes) -> None:
        """Read complete blocks, one at a time while a shape may be learned of them."""
        answer, decoder, start = self._answer, self._decoder, 0
        end = decoder._terminator
        while self._patience and answer.is_plain:
            place = region.find(end, start)
            if place < 0:
                break  # nothing is left, or one blank line more than a block needs
            block = region[start : place + len(end)]
            start += len(block)
            known = len(answer.out)
            if not self._read_events(decoder._parse(block)):
                return
            # Not from a first delta: that of a short answer may be the only one.
            if len(answer.out) == known or not (answer.deltas or known):
                continue
            self._patience -= 1
            try:
                self._shape = _Shape(self._dialect, block)
            except (StreamingError, *_ODDITIES):
                self._shape = None  # whatever it is, it is no plain text
            if start < len(region) and self._read_alike(region[start:]):
                return
        if start < len(region):
            self._read_events(decoder._parse(region[start:]))

    def _read_events(self, events: list[ServerSentEvent]) -> bool:
        """Read events one by one.

        :returns: whether the answer goes on.
        """
        answer = self._answer
        for event in events:
            self._read_event(event)
            if answer.ended or answer.error is not None:
                return False
        return True

    def _read_event(self, event: ServerSentEvent) -> None:
        self.events += 1
        if self._on_event:
            self._on_event(event)
        answer, dialect, data = self._answer, self._dialect, event.data.strip()
        if data and data == dialect.end_marker:
            answer.end()
            return
        if data == "[DONE]":
            return  # gateways append it where it proves nothing
        try:
            chunk = parse_json(event.data)
        except ValueError:
            self._read_malformed(event.event, data)
            return
        if event.event == "error":
            answer.fail(dialect.error(chunk))
        elif isinstance(chunk, dict):
            self._read_chunk(chunk, dialect.read, event.event)
        else:
            self._count_malformed("JSON that is not an object")

    def _read_chunk(
        self, chunk: dict[str, Any], read: Callable[..., None], *event: str
    ) -> None:
        answer = self._answer
        before = answer.malformed
        if chunk.get("error"):
            answer.fail(self._dialect.error(chunk))
        try:
            read(chunk, answer, *event)
        except _ODDITIES as error:
            if isinstance(error, _Misuse) or getattr(error, "obj", None) is answer:
                raise  # a mistake in the dialect, whatever the server sent
            answer.malformed += 1
            logger.debug("the dialect cannot read a chunk: %s", type(error).__name__)
        if answer.malformed > before:
            answer.malformed = before  # however much of it is odd
            self._count_malformed("JSON of an unexpected shape")

    def _read_malformed(self, event: str, data: str) -> None:
        """Data that is not JSON: may it have carried text?"""
        broke_off = data[:1] in ("{", "[") and data[-1:] not in ("}", "]")
        keys = (f'"{key}"' for key in self._dialect.vital_keys)
        if event == "error":
            self._answer.fail(self._dialect.error(data))
        elif broke_off or any(key in data for key in keys):
            self._answer.fail(
                MalformedStreamError(
                    f"an event of {len(data)} characters that may have carried text "
                    "is not valid JSON",
                    retryable=True,
                )
            )
        elif data:
            self._count_malformed("data that is not JSON")

    def _count_malformed(self, what: str) -> None:
        answer, most = self._answer, self._limits.malformed
        answer.malformed += 1
        logger.info("ignored %s", what)
        if most is not None and answer.malformed > most:
            answer.fail(
                MalformedStreamError(
                    f"more than {most} pieces of malformed data, the last one {what}; "
                    "Limits(malformed=...) allows more"
                )
            )

    def _read_end(self) -> None:
        if self._first is not None:
            message = "the server sent an empty body"
            raise MalformedStreamError(message, retryable=True)
        decoder = self._decoder
        rest = decoder._finish()
        if isinstance(decoder, _WholeDecoder):
            self._read_whole(_decoded(rest))
            return
        # The block that the end cuts off, read as if it had been complete.
        events = decoder._parse(rest + decoder._terminator)
        is_cut = False
        if isinstance(decoder, _EventDecoder):  # a JSON line needs no line feed
            # Data that came whole lacks nothing but the blank line.
            events = [event for event in events if _is_json(event.data)]
            fields = {line.partition(b":")[0] for line in rest.split(b"\n")}
            is_cut = not events and not fields <= _IDLE_FIELDS
        self._read_events(events)
        # A final finish reason makes up for what is missing, and without any finish the
        # loop sees the cut; one that may stand on every chunk tells nothing.
        if is_cut and not self._dialect.finish_is_final:
            message = "the body ended in the middle of an event: the answer is cut"
            self._answer.fail(IncompleteStreamError(message, retryable=True))

    def _read_whole(self, text: str) -> None:
        """A server that ignored ``stream``, or an error with status 200."""
        answer = self._answer
        try:
            document = parse_json(text.lstrip("\ufeff"))
        except ValueError:
            raise MalformedStreamError(
                "the server sent JSON that broke off, not a stream", retryable=True
            ) from None
        for part in document if isinstance(document, list) else [document]:
            self._read_chunk(_dict(part), self._dialect.read_whole)
            if answer.ended or answer.error is not None:
                break
        has_answer = answer.out or answer.finishes or answer.calls_begun
        if not has_answer and answer.error is None:
            keys = ", ".join(sorted(map(str, _dict(document)))[:8]) or "no keys"
            message = f"the server sent JSON that is not an answer; it has {keys}"
            raise MalformedStreamError(_clipped(message, 300))
        if isinstance(document, dict):
            answer.end()


# ---------------------------------------------------------------------------
# 8. Recovery: what to do after a failure, and when
# ---------------------------------------------------------------------------
# Pure decisions.  choose_action is the one table: (mode, what was handed out, cause)
# -> action.  A guess may cost a retry, never a text.

_MODES = ("auto", "reattach", "continue", "ask", "replay", "never")
_RESUMES = ("reattach", "continue", "ask", "replay")


class Situation(NamedTuple):
    """What a decision after a failed request depends on.

    :param handed: something of the answer is in the caller's hand.
    :param finished: a finish reason was seen: the text is whole.
    :param seen_by_nobody: the call only returns the result, so it may start over.
    :param has_text: visible text was received.
    :param kept: all of it is still known (``Limits.text``).
    :param only_text: nothing but visible text was handed out.
    :param verifiable: what was handed out can be compared with a replay.
    :param one_choice: ``n`` is 1.
    :param tool_call: a tool call was begun.
    :param reasoning: the last delta was reasoning.
    :param constrained: a grammar or schema rules the output.
    :param repeatable: the request asks for the same text each time.
    :param reattachable: the provider keeps this generation for us.
    :param reattaching: it was asked to go on with it, and answered by an HTTP status.
    :param exact: the dialect surely continues a prefix.
    :param slow_starts: how often ``first_token`` has passed, this time included.
    """

    handed: bool = False
    finished: bool = False
    seen_by_nobody: bool = False
    has_text: bool = False
    kept: bool = True
    only_text: bool = True
    verifiable: bool = True
    one_choice: bool = True
    tool_call: bool = False
    reasoning: bool = False
    constrained: bool = False
    repeatable: bool = False
    reattachable: bool = False
    reattaching: bool = False
    exact: bool = False
    slow_starts: int = 0


_SLOW_STARTS = 1  # that are made up for: each is billed whole, and none may ever start


def is_slow_start(cause: StreamingError) -> bool:
    """Whether a request was given up before its first delta."""
    return isinstance(cause, StreamTimeoutError) and cause.kind == "first_token"


def choose_action(mode: ResumeMode, cause: StreamingError, now: Situation) -> str:
    """Decide what follows a failed request.

    :param mode: the caller's ``resume``.
    :returns: ``retry continue ask replay reattach restart`` or ``raise``.
    """
    over_again = "restart" if now.seen_by_nobody and mode == "auto" else "raise"
    if now.finished:
        return "raise"
    if not cause.retryable:
        lost_its_place = isinstance(cause, IncompleteStreamError) and now.handed
        return over_again if lost_its_place else "raise"
    dropped = now.reattaching or not isinstance(cause, APIError)
    if dropped and now.reattachable and mode in ("auto", "reattach"):
        return "reattach"
    if now.slow_starts > _SLOW_STARTS and is_slow_start(cause):
        return "raise"
    if not now.handed:
        return "retry"
    if not now.kept:
        return over_again
    if mode == "auto":
        return _choose_safest(now)
    if mode in ("never", "reattach") or find_obstacle(mode, now):
        return "raise"
    return str(mode)


def find_obstacle(mode: ResumeMode, now: Situation) -> str:
    """What speaks against ``continue``, ``ask`` or ``replay``; "" if nothing does."""
    if not now.kept:
        return "Limits(text=...) kept too little of the text"
    if mode == "replay":
        return "" if now.verifiable else "a tool call cannot be compared"
    if not now.one_choice:
        return "there is more than one choice"
    if not now.only_text:
        return "more than text was handed out"
    if now.constrained:
        return "a schema or grammar rules the output"
    return "" if now.has_text else "no text was handed out"


def _choose_safest(now: Situation) -> str:
    """Only what leaves no doubtful seam."""
    closed = now.one_choice and not (now.tool_call or now.reasoning)
    if closed and now.exact and now.has_text and now.only_text and not now.constrained:
        return "continue"
    if now.seen_by_nobody:
        return "restart"
    if closed and now.repeatable and now.verifiable and not now.constrained:
        return "replay"
    return "raise"


def draw_wait(retry: Retry, failures: int, draw: float) -> float:
    """The wait before another request, by full jitter.

    :param failures: how many requests in a row have failed, from 1.
    :param draw: a random number from 0 to 1.
    """
    bound = retry.wait_initial * 2.0 ** min(failures - 1, 60)
    return draw * min(retry.wait_max, bound)


_CONSTRAINTS = _words(
    "response_format format grammar json_schema guided_json guided_regex guided_choice "
    "guided_grammar structured_outputs output_format regex ebnf"
)
_SETTINGS = ("options", "generationConfig", "parameters", "text", "output_config")


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    """The body with the sub-objects that providers keep their settings in."""
    flat = dict(body)
    for name in _SETTINGS:
        if isinstance(body.get(name), dict):
            flat.update(body[name])
    return flat


def _is_constrained(body: dict[str, Any]) -> bool:
    flat = _settings(body)
    values = [flat[name] for name in _CONSTRAINTS if flat.get(name)]
    plain = [v for v in values if _dict(v).get("type") != "text"]
    schemas = flat.get("responseSchema") or flat.get("responseJsonSchema")
    mime = flat.get("responseMimeType") not in (None, "text/plain")
    return bool(plain or schemas or mime)


def _is_repeatable(body: dict[str, Any]) -> bool:
    flat = _settings(body)
    return flat.get("seed") is not None or flat.get("temperature") == 0


def _choice_count(body: dict[str, Any]) -> int:
    flat = _settings(body)
    counts = [_count(flat.get(name)) or 1 for name in ("n", "candidateCount")]
    prompt = body.get("prompt")  # several texts, or lists of tokens: n choices of each
    is_list = isinstance(prompt, list) and isinstance((prompt or [0])[0], (str, list))
    return max(counts) * (len(cast("list[Any]", prompt)) if is_list else 1)


_ASK = (
    "Your previous response was interrupted and ended with the text above. Continue "
    "exactly where it ended: repeat nothing, and add no remark of your own."
)


# ===========================================================================
# ======================== I/O starts here ==================================
# ===========================================================================
# Above: no socket, no clock, no thread, no requests.  A test holds this line.


# ---------------------------------------------------------------------------
# 9. Watchdog: one thread that ends what outlives its time
# ---------------------------------------------------------------------------
# A read that blocks can be ended from outside in one way that works everywhere: shut
# down a duplicate of its socket.  (close() waits for the reader's lock, and
# SSLSocket.shutdown() lets ciphertext through.)  A Guard holds that duplicate for one
# request; the watchdog, one thread for the whole process, only looks at times.

_now = time.monotonic
_NEVER = math.inf
_LONGEST = 86400.0  # locks and sockets refuse to wait for ages; a day will do


def _let_go(close: Callable[[], object]) -> None:
    """Close, whatever the system says: an error there takes nothing back."""
    try:
        close()
    except OSError as error:
        logger.debug("closing failed: %s", error)


class _Guard:
    """The right to end one request from another thread, until it is over."""

    def __init__(self) -> None:
        self.due = _NEVER  # when to fire; the reader writes it, without a lock
        self.kind = ""  # which limit that is
        self.scheduled = _NEVER  # when the watchdog will look at it again
        self.verdict = ""  # why it was fired
        self.is_over = False
        #: How far its connection says to be, ``connect`` or ``request``; "" at first.
        self.phase = ""
        #: When each of the two takes too long, and which limit that is.
        self.limits: dict[str, tuple[float, str]] = {}
        #: Its connection has served before, and brought nothing yet: maybe it is closed.
        self.is_kept = False
        #: The duplicate; None where a transport shows no socket.
        self.socket: socket.socket | None = None
        # Reentrant: a finalizer may release a guard while its thread fires it.
        self._lock = threading.RLock()
        self._process = os.getpid()

    def attach(self, fileno: int) -> None:
        """Take a duplicate of the request's socket."""
        duplicate = socket.fromfd(fileno, socket.AF_INET, socket.SOCK_STREAM)
        with self._lock:
            if self.socket is not None:
                _let_go(self.socket.close)
            self.socket = duplicate
            if self.verdict or self.is_over:  # fired while there was none
                self._shut_down()

    def set(self, due: float, kind: str) -> None:
        """End the request at that time, unless it is set again."""
        self.kind = kind  # before the time, with which the watchdog reads it
        self.due = due
        if due < self.scheduled:
            _watchdog().watch(self)

    def fire(self, verdict: str) -> None:
        """End the request, and say why; once it is over, do nothing."""
        with self._lock:
            if not self.is_over:
                # First the word, then the deed: what the reader is woken by can look
                # like a clean end.
                self.verdict = self.verdict or verdict
                self._shut_down()

    def release(self) -> None:
        """The request is over: the socket may now serve another one."""
        with self._lock:
            self.is_over = True
            self.due = _NEVER
            if self.socket is not None:
                _let_go(self.socket.close)
                self.socket = None

    def _shut_down(self) -> None:
        # A forked child only has a copy: to shut that down would end the parent's.
        if self.socket is not None and self._process == os.getpid():
            with contextlib.suppress(OSError):  # the peer may have been faster
                self.socket.shutdown(socket.SHUT_RDWR)


class _Watchdog:
    """Fire guards when they are due.

    The reader writes ``guard.due`` without a lock.  What keeps that safe: a guard
    whose ``scheduled`` time is not later than its ``due`` time will be looked at.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, _Guard]] = []
        self._serial = itertools.count()  # guards of the same time have no order
        self._sweep_at = 64
        self._thread: threading.Thread | None = None

    def watch(self, guard: _Guard) -> None:
        """Look at the guard when it is due."""
        with self._changed:
            if len(self._heap) >= self._sweep_at:  # most of them may be over
                self._heap = [entry for entry in self._heap if not entry[2].is_over]
                heapq.heapify(self._heap)
                self._sweep_at = max(64, 2 * len(self._heap))
            self._push(guard)
            if self._thread is None and not sys.is_finalizing():
                thread = threading.Thread(
                    target=self._run, name="resilient_sse watchdog", daemon=True
                )
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError as error:
                    logger.debug("no watchdog: %s; socket timeouts must do", error)
            if self._heap[0][2] is guard:
                self._changed.notify()

    def _push(self, guard: _Guard) -> None:
        guard.scheduled = due = guard.due  # the reader may change it meanwhile
        heapq.heappush(self._heap, (due, next(self._serial), guard))

    def _run(self) -> None:
        while True:
            with self._changed:
                wait = self._heap[0][0] - _now() if self._heap else None
                if wait is None or wait > 0:
                    self._changed.wait(wait and min(wait, _LONGEST))
                    continue
                guard = heapq.heappop(self._heap)[2]
                # First this, then the look at due: a reader that sets due later sees
                # that nobody will look at it, and calls watch().
                guard.scheduled = _NEVER
                is_due = guard.due <= _now()
                if not is_due and guard.due < _NEVER:
                    self._push(guard)
            if is_due:
                guard.fire(guard.kind)  # without our lock, which its reader may want


_the_watchdog: _Watchdog | None = None
_creation = threading.Lock()


def _watchdog() -> _Watchdog:
    """The process's watchdog, made when it is first needed (gevent may patch)."""
    global _the_watchdog
    if _the_watchdog is None:
        with _creation:
            _the_watchdog = _the_watchdog or _Watchdog()
    return _the_watchdog


# ---------------------------------------------------------------------------
# 10. Transport: one request, its response, every byte at once
# ---------------------------------------------------------------------------
# requests does connections, TLS, proxies and certificates; its body readers are left
# out, since each of them either waits for more bytes than are there or costs a call a
# byte.  Exceptions of the libraries are translated here and nowhere else: by
# _Exchange._failure.

_READ = 65536
_USER_AGENT = "resilient-sse/" + __version__
_GLANCE = 0.5  # seconds between looks at a verdict, where nothing can wake a wait
_KEPT_IDLE = 5.0  # seconds; a network may forget a connection without a word
_ROUND_TRIP = 1.0  # seconds in which a closed connection is sure to say so
_END_WAIT = 5.0  # seconds for what follows a finish reason
_TIMED_OUT = socket.timeout  # an alias of TimeoutError since Python 3.10

# -- connections
# Ours tell the guard of their request how far they are, and show it their socket from
# before it is connected.


class _Sending(threading.local):
    guard: _Guard | None = None  # of the request that this thread is sending


_sending = _Sending()

#: No delay, and keep-alive after 60 s, every 60 s, 5 times: balancers and NATs forget
#: what is silent for some minutes, and a model may think for longer.
_SOCKET_OPTIONS = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
for _name, _value in (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", 60),
    ("TCP_KEEPINTVL", 60),
    ("TCP_KEEPCNT", 5),
):
    if hasattr(socket, _name):
        _SOCKET_OPTIONS.append((socket.IPPROTO_TCP, getattr(socket, _name), _value))


class _WatchedResponse(http.client.HTTPResponse):
    """A response that tells the guard whether anything of it came."""

    #: Its finalizer looks at it, also where a socket could not give a file.
    fp: Any = None

    def begin(self) -> None:
        asked, guard, came = _now(), _sending.guard, b""
        try:
            came = self.fp.peek(1)
        finally:
            if guard is not None and (came or _now() - asked > _ROUND_TRIP):
                guard.is_kept = False
        super().begin()


class _WatchedConnection:
    """A connection whose socket the guard knows from before it is connected."""

    sock: Any
    host: Any
    port: Any
    source_address: Any
    socket_options: Any
    response_class = _WatchedResponse
    #: When it was put back into its pool.
    kept_since = _NEVER
    #: Whether a connected socket needs a handshake before a request can be sent.
    shakes_hands = False

    def putrequest(self, *args: Any, **kwargs: Any) -> Any:
        guard = _sending.guard
        if self.sock is not None and guard is not None:
            guard.attach(self.sock.fileno())
            guard.is_kept = self.kept_since < _NEVER
            self._announce_ready(self.sock, guard)
        return super().putrequest(*args, **kwargs)  # type: ignore[misc]

    def _announce_ready(self, sock: Any, guard: _Guard) -> None:
        """The request can be sent: what is left for the headers is left for that too."""
        guard.phase = "request"
        guard.set(*guard.limits["request"])
        sock.settimeout(_finite(guard.due - _now()))

    def _new_conn(self) -> Any:
        """Try all addresses; they share the time, so that a dead one leaves some."""
        guard = _sending.guard
        if guard is None:  # a tracer may send in a thread of its own
            return super()._new_conn()  # type: ignore[misc]
        self.kept_since, guard.is_kept = _NEVER, False
        guard.phase = "connect"
        guard.set(*guard.limits["connect"])
        end, socks = guard.due, getattr(self, "_socks_options", None)
        host, port = getattr(self, "_dns_host", self.host), self.port
        if socks:
            host, port = socks["proxy_host"], socks["proxy_port"] or 1080
        family = urllib3.util.connection.allowed_gai_family()  # callers replace that
        try:
            places = socket.getaddrinfo(
                host.strip("[]"), port, family, socket.SOCK_STREAM
            )
            for left in range(len(places), 0, -1):
                until = _now() + max((end - _now()) / left, 0.001)
                try:
                    sock = self._connected(places[-left], until, guard, socks)
                    break
                except OSError:
                    if left == 1 or guard.verdict:
                        raise
            else:
                raise OSError(f"no address is known for {host}")
        except OSError as error:
            cause = getattr(error, "socket_err", None) or error  # that of PySocks
            kind: Any = ConnectTimeoutError if _is_late(cause) else NewConnectionError
            message = f"Failed to establish a new connection: {cause}"
            raise kind(self, message) from cause
        sock.settimeout(_finite(end - _now()))
        if not self.shakes_hands:
            self._announce_ready(sock, guard)
        return sock

    def _connected(self, place: Any, until: float, guard: _Guard, socks: Any) -> Any:
        """A socket connected to one address; close() and the watchdog can end that."""
        *kind, _, address = place
        sock: Any = (sys.modules["socks"].socksocket if socks else socket.socket)(*kind)
        try:
            for option in [*(self.socket_options or ()), *_SOCKET_OPTIONS]:
                with contextlib.suppress(OSError):  # some systems lack some of them
                    sock.setsockopt(*option)
            if self.source_address:
                sock.bind(self.source_address)
            if socks:  # PySocks connects and negotiates in one call
                login = [socks[name] for name in ("rdns", "username", "password")]
                sock.set_proxy(socks["socks_version"], *address[:2], *login)
                sock.settimeout(_finite(until - _now()))
                guard.attach(sock.fileno())
                sock.connect((self.host, self.port))
                return sock
            sock.setblocking(False)
            code = sock.connect_ex(address)
            guard.attach(sock.fileno())  # only now: before, a shutdown has no effect
            if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                while not wait_for_write(sock, min(_GLANCE, max(until - _now(), 0))):
                    if _now() >= until or guard.verdict:
                        raise _TIMED_OUT("timed out")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock


class _WatchedPool:
    """A pool that trusts a kept connection only for some seconds."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)  # type: ignore[misc]
        if not isinstance(connection, _WatchedConnection):
            return connection
        # Where one was found closed, the others may be as old.
        is_doubted = _sending.guard is not None and _sending.guard.is_kept
        if is_doubted or _now() - connection.kept_since > _KEPT_IDLE:
            connection.close()  # type: ignore[attr-defined]
            return self._new_conn()  # type: ignore[attr-defined]
        return connection

    def _put_conn(self, connection: Any) -> None:
        if isinstance(connection, _WatchedConnection):
            connection.kept_since = _now()
        super()._put_conn(connection)  # type: ignore[misc]


@functools.lru_cache(maxsize=8)
def _watched(pool: Any) -> Any:
    """A pool like that one, with connections that the guard knows."""
    plain = pool.ConnectionCls
    facts = {"shakes_hands": issubclass(pool, HTTPSConnectionPool)}
    watched = type("_Watched" + plain.__name__, (_WatchedConnection, plain), facts)

    def connection_class(self: Any) -> Any:
        known = pool.ConnectionCls  # a recorder may have replaced it
        return watched if known is plain else known

    name, bases = "_Watched" + pool.__name__, (_WatchedPool, pool)
    return type(name, bases, {"ConnectionCls": property(connection_class)})


# Made now, while no recorder has put its own class into the place of a connection's.
_POOLS = {"http": _watched(HTTPConnectionPool), "https": _watched(HTTPSConnectionPool)}


class _WatchedAdapter(HTTPAdapter):
    """The adapter of our own session; a caller's session keeps its own."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> Any:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        manager: Any = super().proxy_manager_for(proxy, **kwargs)
        pools = manager.pool_classes_by_scheme
        if not issubclass(pools["http"], _WatchedPool):  # else it is an old manager
            pools = {scheme: _watched(pool) for scheme, pool in pools.items()}
            manager.pool_classes_by_scheme = pools
        return manager


# -- our session
# Session.request() does anew for each call what comes out the same each time: it reads
# the whole environment twice, merges cookies and hooks, and looks for redirects.  Where
# nobody has put himself into that way, and no proxy is named, we go around it.

_the_session: requests.Session | None = None
_utils: Any = requests.utils
_seen_environment: tuple[Any, list[str], Any] = (None, [], True)


def _own_session() -> requests.Session:
    """The session that calls share, so that connections are used again."""
    global _the_session
    with _creation:
        if _the_session is None:
            session = requests.Session()
            adapter = _WatchedAdapter(pool_maxsize=256, max_retries=0)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            no_cookies = http.cookiejar.DefaultCookiePolicy(allowed_domains=[])
            session.cookies.set_policy(no_cookies)
            _the_session = session
    return _the_session


def _forget_parent() -> None:
    """In a forked child: the thread is gone, and the sockets are the parent's."""
    global _the_watchdog, _the_session, _creation
    _the_watchdog = None
    _the_session = None
    _creation = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


#: What a call passes on its way to the adapter, and mocks and tracers replace.
_STEPS = """
    Session.__init__ Session.request Session.prepare_request Session.get_adapter
    Session.merge_environment_settings Session.send PreparedRequest.prepare
    adapters.HTTPAdapter.send sessions.get_environ_proxies utils.getproxies
"""
_way = operator.attrgetter(*_STEPS.split())


def _is_original(step: Any) -> bool:
    """Whether nobody had wrapped it when we were imported.

    A function around it bears its name and module, but has other globals; an object
    around it shows those too, but is no function.
    """
    home = getattr(step, "__globals__", {}).get("__name__", "").partition(".")[0]
    return type(step) is type(_is_original) and home in ("requests", "urllib")


# On Windows and macOS, getproxies() asks the system's settings too.
_reads_environment = _utils.getproxies is _utils.getproxies_environment
_WAY = _way(requests)
_WAY = _WAY if _reads_environment and all(map(_is_original, _WAY)) else ()


def _proxy_settings() -> tuple[list[str], Any]:
    """The proxies that the environment names, and how it wants servers verified.

    To read it costs more than the rest of a request's preparation, and most
    environments stay as they are: it is compared with what it was at the last look.
    """
    global _seen_environment
    now: Any = getattr(os.environ, "_data", os.environ)
    before, proxies, verify = _seen_environment
    if now != before:
        before = dict(now)  # first of all: a change after it is seen at the next look
        named = _utils.getproxies_environment().items()
        proxies = [url for scheme, url in named if scheme != "no"]
        bundles = map(os.environ.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
        verify = next(filter(None, bundles), True)
        _seen_environment = before, proxies, verify
    return proxies, verify


@functools.lru_cache(maxsize=16)
def _prepared_url(url: str) -> str:
    sent = requests.PreparedRequest()
    sent.prepare_url(url, None)
    return str(sent.url)


def _send_around(session: Any, request: _Request, timeout: Any, verify: Any) -> Any:
    """What Session.request() comes to for ours, where the environment names no proxy."""
    pairs = [*session.headers.items(), *request.headers.items()]
    headers = {name.lower(): (name, str(value)) for name, value in pairs}
    sent = requests.PreparedRequest()
    sent.prepare_method(request.method)
    sent.url = _prepared_url(str(request.url))
    sent.prepare_headers(dict(headers.values()))
    sent.prepare_body(request.data, None)
    adapter = session.get_adapter(sent.url)
    return adapter.send(sent, stream=True, timeout=timeout, verify=verify)


def _send_through(session: Any, request: _Request, timeout: Any, hook: Any) -> Any:
    """The common way; what the session was told wins over the environment."""
    hooks: Any = session.hooks.get("response") or []
    settings: dict[str, Any] = {}
    if session.verify is not True:
        settings["verify"] = session.verify
    if session.proxies:
        settings["proxies"] = dict(session.proxies)
    return session.request(
        request.method,
        str(request.url),
        data=request.data,
        headers={name: str(value) for name, value in request.headers.items()},
        stream=True,
        timeout=timeout,
        allow_redirects=False,
        # Those of a request take the place of the session's.
        hooks={"response": [*([hooks] if callable(hooks) else hooks), hook]},
        # Any callable keeps .netrc from replacing the key.
        auth=None if session.auth else lambda sent: sent,
        **settings,
    )


# -- bodies
# read() returns what one read of the socket brings, as soon as it is there: nothing,
# where that is framing alone; is_clean says whether the body has come to its end.


class _CutBody(Exception):
    """The body ended before its end."""


class _PlainBody:
    """A body that http.client reads: of a known length, or up to the close.

    :param source: has ``read1``, which returns what is there.
    :param length: the announced bytes; None where the close ends the body.
    """

    def __init__(self, source: Any, length: int | None) -> None:
        self._source = source
        self._left = length
        self.is_clean = length == 0

    def read(self) -> bytes:
        if self.is_clean:
            return b""
        data: bytes = self._source.read1(_READ)
        if self._left is None:
            self.is_clean = not data
            return data
        self._left -= len(data)  # for http.client takes a short body for a whole one
        if not data and self._left > 0:
            raise _CutBody(f"{self._left} bytes are missing")
        self.is_clean = self._left <= 0
        return data


class _ChunkedBody:
    """A chunked body, read many chunks at a time (RFC 9112, section 7.1).

    :param source: the buffered socket file, behind the headers.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._receive: Callable[[int], bytes] = self._receive_first
        self._rest = b"\r\n"  # framing that is not whole; as if a chunk had just ended
        self._left = 0  # bytes of the present chunk that are still to come
        self._is_ending = False  # the last chunk was seen; the rest is of the trailer
        self._fault = ""  # raised by the next read: what came before it goes out first
        self.is_clean = False

    def read(self) -> bytes:
        if self._fault:
            raise _CutBody(self._fault)
        if self.is_clean:
            return b""
        data = self._receive(_READ)
        # A live stream brings one whole chunk a read; only where one can begin (the
        # rest of a trailer is never this, nor is there any within a chunk).
        if self._rest == b"\r\n" and data[-2:] == b"\r\n":
            start = data.find(b"\n") + 1
            try:
                size = int(data[:start], 16)
            except ValueError:
                size = 0  # extensions, or a fault
            if size > 0 and start + size + 2 == len(data):
                return data[start:-2]
        if self._is_ending:
            self._end(self._rest + data)
            self.is_clean = self.is_clean or not data  # the content was whole
            return b""
        if not data:
            raise _CutBody("the last chunk is missing")
        return self._strip(data)

    def _receive_first(self, size: int) -> bytes:
        """What came with the headers is in the file; all else is in the socket."""
        source = self._source
        data: bytes = source.read1(size)
        sock: Any = getattr(getattr(source, "raw", None), "_sock", None)
        # The file has no more if it gave less; and others than real sockets, such as
        # that of TLS within TLS, have their own ideas of an end.
        if len(data) < size:
            is_real = isinstance(sock, socket.socket)
            self._receive = sock.recv if is_real else source.read1
        return data

    def _strip(self, data: bytes) -> bytes:
        """Take the framing off."""
        raw = self._rest + data
        position, end = self._left, len(raw)
        pieces = [raw[:position]] if position else []
        # What stands at position is the line feed behind a chunk, and the next chunk's
        # length; int() skips the white space.
        while position + 2 < end:
            start = raw.find(b"\n", position + 2) + 1
            if not start:
                if end - position > _READ:
                    self._fault = "a chunk header has no end"
                break
            header = raw[position:start]
            try:
                size = int(header, 16)
            except ValueError:
                digits = header.partition(b";")[0].strip()  # before extensions
                is_number = re.match(rb"[0-9A-Fa-f]{1,15}\Z", digits)
                size = int(digits, 16) if is_number else -1
            if size < 0 or header[:2] != b"\r\n":
                self._fault = "a chunk header is garbled"
                break
            if size == 0:
                self._end(raw[start:])
                return b"".join(pieces)
            position = start + size
            pieces.append(raw[start:position])
        self._left = max(position - end, 0)
        self._rest = raw[position:]
        return b"".join(pieces)

    def _end(self, trailer: bytes) -> None:
        """Take the trailer section, so that the connection can be used again."""
        self._is_ending, self._rest = True, trailer
        self.is_clean = trailer.startswith(b"\r\n") or b"\r\n\r\n" in trailer
        if not self.is_clean and len(trailer) > _READ:
            self._fault = "the trailer section has no end"


class _SlowBody:
    """The way that always works, and inflates: for transports that hide their file.

    :param size: bytes that are waited for; 1 unless they are known to be there.
    """

    def __init__(self, response: requests.Response, size: int) -> None:
        self._pieces = response.iter_content(size)
        self.is_clean = False

    def read(self) -> bytes:
        data: bytes = next(self._pieces, b"")
        self.is_clean = not data
        return data


class _InflatedBody:
    """A compressed body, inflated in pieces of bounded size.

    We ask for none, but some proxies compress all the same.
    """

    def __init__(self, body: _Body, encoding: str) -> None:
        self._body = body
        self._encoding = encoding
        self._inflater: Any = None
        self._input = b""
        self._is_full = False  # the inflater may hold more, even without input
        self.is_clean = False

    def read(self) -> bytes:
        data, inflater = self._input, self._inflater
        if not data and not self._is_full:
            data = self._body.read()
            if not data:
                if self._body.is_clean and inflater is not None and not inflater.eof:
                    raise _CutBody("the compressed data broke off")
                self.is_clean = self._body.is_clean
                return b""
        if inflater is None or inflater.eof:  # gzip's members may be padded with zeros
            data = self._input = data.lstrip(b"\0") if inflater else data
            if not data:
                return b""
            # Raw deflate is sent under the name of zlib's format.  Its first byte tells:
            # zlib's ends in the digit 8, and gzip's is 1F; neither begins a block of it.
            is_wrapped = data[0] & 15 == 8 or data[0] == 0x1F
            is_raw = self._encoding == "deflate" and not is_wrapped
            window = -zlib.MAX_WBITS if is_raw else zlib.MAX_WBITS | 32
            self._inflater = inflater = zlib.decompressobj(window)
        piece: bytes = inflater.decompress(data, _READ)
        self._is_full = len(piece) == _READ and not inflater.eof
        self._input = inflater.unconsumed_tail or inflater.unused_data
        return piece


if TYPE_CHECKING:
    _Body = _PlainBody | _ChunkedBody | _SlowBody | _InflatedBody


def _body_of(response: requests.Response) -> _Body:
    """Choose the reader that hands over every byte at once."""
    source: Any = getattr(response.raw, "_fp", None)
    buffered = getattr(source, "fp", None)
    body: _Body
    if getattr(response, "_content_consumed", False):  # by a hook, or a mock
        return _SlowBody(response, _READ)
    if not hasattr(source, "read1"):
        return _SlowBody(response, 1)
    if not hasattr(source, "chunked"):  # a mock
        body = _PlainBody(source, None)
    elif source.chunked and hasattr(buffered, "read1"):
        body = _ChunkedBody(buffered)
    else:
        body = _PlainBody(source, source.length)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _InflatedBody(body, encoding)
    if response.status_code != 200:  # an error, of which the status is enough
        return body
    raise MalformedStreamError(
        f"the server compressed the stream as {_clipped(encoding, 40)!r}, though asked not to "
        "compress it"
    )


# -- the exchange


class _Request(NamedTuple):
    """What is sent."""

    method: str
    url: str
    headers: dict[str, str]
    data: bytes | None
    action: str
    secrets: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """The host, with its port if one is named."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def shown_url(self) -> str:
        """The URL as it may be logged."""
        return _hidden(_bare_url(self.url), self.secrets)


class _Deadlines:
    """When what has taken too long; time that the caller takes does not count.

    ========  ==========================================================
    connect   Timeouts.connect after the sending
    headers   first_token after it; else idle; for a feed, read
    stream    read after the last byte, and idle after the last progress
    end       read, but at most 5 s, after the finish reason
    ========  ==========================================================

    The headers' limit holds up to the first delta, and Timeouts.total for all.

    :param started: when the call began.
    """

    def __init__(self, timeouts: Timeouts, started: float) -> None:
        self._timeouts = timeouts
        self._silence, self._idle = self.seconds("read"), self.seconds("idle")
        self._end = started + self.seconds("total")
        self.send(started)

    def send(self, now: float) -> None:
        """A request is being sent."""
        self._sent = self._moved = now
        self.heard = 0  # bytes that this request had brought by the last progress
        #: Deltas have come, or none is waited for (a feed without first_token).
        self.has_begun = False
        self._has_finished = False

    def skip(self, seconds: float) -> None:
        """The caller took so long to come back for more."""
        self._sent += seconds
        self._moved += seconds

    def move(self, now: float, heard: int) -> None:
        """There was progress."""
        self._moved, self.heard = now, heard

    def expect_end(self, now: float) -> None:
        """All that matters is there; the rest must come soon."""
        self._moved = now
        self._has_finished = True

    def limits(self) -> dict[str, tuple[float, str]]:
        """When connecting, and all up to the headers, ends, and by which limit."""
        kind = "first_token"
        if self.has_begun:  # a feed without first_token: no event is due, but some byte
            kind = "read"
        elif self._timeouts.first_token is None:
            kind = "idle"
        total = (self._end, "total")
        return {
            "connect": min((self._sent + self.seconds("connect"), "connect"), total),
            "request": min((self._sent + self.seconds(kind), kind), total),
        }

    def read(self, now: float) -> tuple[float, str]:
        """The end of the read that begins now."""
        if self._has_finished:
            due, kind = self._moved + min(self._silence, _END_WAIT), "end"
        elif not self.has_begun:
            return self.limits()["request"]
        else:
            due, kind = now + self._silence, "read"
            if self._moved + self._idle < due:
                due, kind = self._moved + self._idle, "idle"
        return (due, kind) if due < self._end else (self._end, "total")

    def seconds(self, kind: str) -> float:
        """How long the limit of that name is."""
        seconds: float | None = getattr(self._timeouts, kind, _END_WAIT)
        return _NEVER if seconds is None else seconds

    def left(self, now: float) -> float:
        """Seconds that are left of the whole call."""
        return self._end - now


def _finite(seconds: float) -> float | None:
    return min(max(seconds, 0.001), _LONGEST) if seconds < _NEVER else None


_TIMEOUT_ADVICE = {
    "connect": "is the host right, and reachable? Timeouts(connect=...) allows more",
    "first_token": "a proxy that buffers the answer looks like this, and so does a "
    "long queue; Timeouts(first_token=...) allows more",
    "read": "the connection is up but silent; Timeouts(read=...) allows more",
    "idle": "only keep-alives came; Timeouts(idle=...) allows more",
    "silence": "nothing came at all; Timeouts(idle=...) allows more",
    "total": "the whole call took too long; Timeouts(total=...) allows more",
}


_CLOSED = "the stream was closed by another thread"
_DROPS = {
    "connect": "could not connect to {} ({}): is the network up, and the base URL right?",
    "request": "the connection to {} dropped before the response began ({})",
    "": "the connection to {} dropped in the middle of the response ({})",
}
#: All that sending may raise, in any version of any library below us.
_REQUEST_ERRORS = (OSError, http.client.HTTPException, HTTPError, ValueError)
#: All that a body's read may raise.
_BODY_ERRORS = (*_REQUEST_ERRORS, AttributeError, zlib.error, _CutBody)


class _Exchange:
    """One request and its response: open, check_status, read ..., drain, close.

    It knows sockets, and nothing of answers.  The guard's verdict is looked at before
    and behind whatever may block: a socket that was shut down can look like anything.

    :param session: the caller's; None for ours.
    :param guard: ends it from outside.
    """

    def __init__(
        self,
        session: requests.Session | None,
        request: _Request,
        deadlines: _Deadlines,
        guard: _Guard,
    ) -> None:
        self._session = session
        self._request = request
        self._deadlines = deadlines
        self._guard = guard
        self._response: requests.Response | None = None
        self._body: _Body = None  # type: ignore[assignment]  # until open() is through
        self._is_doubted = False  # it leads to a sick backend: a new one may not
        self._proxies, self._verify = _proxy_settings()
        self.secrets = request.secrets
        if session is not None or self._proxies:
            proxies = getattr(session, "proxies", None) or {}
            self._learn_secrets(session, [*self._proxies, *proxies.values()])
        self.headers: Mapping[str, str] = {}
        self.status = 0
        self.bytes = 0

    def open(self) -> None:
        """Send the request, wait for the headers, and choose how to read the body.

        :raises StreamingError: of whatever kind fits.
        :raises ValueError: it cannot be sent.
        """
        guard = self._guard
        if guard.verdict:
            raise self._failure()
        try:
            response = self._response = self._send_past_stale()
        except StreamingError:
            raise
        except _REQUEST_ERRORS as error:
            failure = self._failure(error)
            cause = _stripped(error, self.secrets)  # it stays as the context, too
            raise failure from (cause if isinstance(failure, StreamingError) else None)
        finally:
            guard.due = _NEVER
        if guard.verdict:
            raise self._failure()
        self.status = response.status_code
        if guard.socket is None:  # of a caller's session
            try:
                guard.attach(response.raw.fileno())
            except (AttributeError, OSError, ValueError) as error:
                logger.debug("no socket to watch: %s", error)  # a mock, or a short body
        if guard.socket is not None:
            # The timeout for the headers is not the one for the body; the guard has that.
            buffered = getattr(getattr(response.raw, "_fp", None), "fp", None)
            sock: Any = getattr(getattr(buffered, "raw", None), "_sock", None)
            if hasattr(sock, "settimeout"):
                with contextlib.suppress(OSError):  # a short body may be over already
                    sock.settimeout(None)
        self._body = _body_of(response)

    def _send_past_stale(self) -> Any:
        """Send it; and again, once, if a kept connection turns out to have been closed.

        No byte of a response came, and the end came at once: the server had closed it
        before it read the request, so that nothing is billed.  (One that reads it and
        closes as soon cannot be told apart; it is asked once more.)
        """
        began = _now()
        try:
            return self._send()
        except _REQUEST_ERRORS as error:
            signs = (ConnectionError, ssl.SSLError)
            causes = list(_chain(error))
            is_closed = any(isinstance(e, signs) for e in causes)
            if self._guard.verdict or not (self._guard.is_kept and is_closed):
                raise
            logger.debug("a kept connection had been closed: %s", _reason(causes))
        self._deadlines.skip(_now() - began)
        return self._send()

    def _send(self) -> Any:
        request, guard = self._request, self._guard
        guard.limits = self._deadlines.limits()
        # Of a session that shows us no connection, nothing else can be said.
        guard.set(*guard.limits["request"])
        now = _now()
        timeout = tuple(_finite(due - now) for due, _ in guard.limits.values())
        if self._session is not None:
            return _send_through(self._session, request, timeout, self._note_head)
        session = _own_session()
        _sending.guard = guard
        try:
            if self._proxies or _way(requests) != _WAY:
                return _send_through(session, request, timeout, self._note_head)
            response = _send_around(session, request, timeout, self._verify)
            self._note_head(response)
            return response
        finally:
            _sending.guard = None

    def _note_head(self, response: requests.Response, **settings: Any) -> None:
        if self._session is not None:  # some servers echo the request
            self._learn_secrets(response.request)
        secrets = self.secrets
        self.headers = CaseInsensitiveDict(
            (_hidden(name, secrets), _hidden(value, secrets))
            for name, value in response.headers.items()
        )
        # requests would read the whole body of a redirect, however long, to prepare
        # the next request; which is not sent.
        response.headers.pop("Location", None)

    def _learn_secrets(self, sent: Any, proxies: Iterable[Any] = ()) -> None:
        """Hide those of a session, or of a request as it has sent it, too."""
        headers = {
            name: value.decode("latin-1") if isinstance(value, bytes) else value
            for name, value in (getattr(sent, "headers", None) or {}).items()
            if isinstance(value, (str, bytes))
        }
        known = {*self.secrets, *_secrets_in(str(getattr(sent, "url", "")), headers)}
        for proxy in map(str, filter(None, proxies)):
            known.update(_secrets_in(proxy if "//" in proxy else "//" + proxy, {}))
        self.secrets = tuple(sorted(known, key=len, reverse=True))

    def check_status(self) -> None:
        """Raise for everything but 200.

        :raises APIError: with the body's message.
        """
        if self.status == 200:
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._deadlines.expect_end(_now())
        body = bytearray()
        try:
            while len(body) < _BODY_KEPT:
                piece = self.read(_now())
                if not piece:
                    break
                body += piece
        except StreamingError as error:
            if isinstance(error, StreamTimeoutError) and error.kind == "total":
                raise
            logger.debug("the error body broke off: %s", error)
        # Hidden before it is parsed: a message, code or type has no secret then.
        text = _hidden(body[:_BODY_KEPT].decode("utf-8", "replace"), self.secrets)
        failure = http_error(self.status, headers, text, time.time())
        if 300 <= self.status < 400:
            message = (
                f"the server answered with HTTP status {self.status}: a redirect, "
                "which is not followed, since the key and the prompt would go with "
                "it; correct the base URL"
            )
            failure.args = (message,)
        failure.phase = "request"
        self._is_doubted = failure.retryable
        raise failure

    def read(self, now: float) -> bytes:
        """Return the next bytes of the body; b"" at its clean end.

        :raises StreamTimeoutError: a limit passed.
        :raises StreamConnectionError: the body was cut.
        """
        # Each delta that comes alone passes here: few calls, and guard.set() by hand.
        body, guard = self._body, self._guard
        while True:
            due, guard.kind = self._deadlines.read(now)
            if guard.verdict or now >= due:
                raise self._failure(kind=guard.kind)
            guard.due = due
            if due < guard.scheduled:
                _watchdog().watch(guard)
            try:
                data = body.read()
            except _BODY_ERRORS as error:
                raise self._failure(error) from _stripped(error, self.secrets)
            finally:
                guard.due = _NEVER
            if data:
                self.bytes += len(data)
                return data
            if body.is_clean:
                break
            now = _now()  # framing alone is a sign of life: the read limit begins anew
        if guard.verdict:  # a socket that was shut down can look like a clean end
            raise self._failure()
        return data

    def drain(self) -> None:
        """Behind the end marker: read up to the body's end, if it comes soon."""
        limit = _now() + 0.2
        try:
            while not self._body.is_clean and _now() < limit:
                self._guard.set(limit, "end")
                self._body.read()
        except _BODY_ERRORS as error:
            logger.debug("the end of the body was cut: %s", type(error).__name__)
        finally:
            self._guard.due = _NEVER

    def close(self) -> None:
        """Let the connection serve again if the body was read to its end; or close."""
        guard, response, body = self._guard, self._response, self._body
        guard.release()
        self._response = None
        if response is None:
            return
        is_good = body is not None and body.is_clean and not guard.verdict
        if is_good and not self._is_doubted:
            source = getattr(response.raw, "_fp", None)
            if isinstance(source, http.client.HTTPResponse):
                _let_go(source.close)
            if hasattr(response.raw, "release_conn"):
                _let_go(response.raw.release_conn)
                return
        _let_go(response.close)

    def _failure(
        self, error: BaseException | None = None, kind: str = ""
    ) -> StreamingError | ValueError:
        """What it means for the caller: the one place where errors become ours.

        :param error: what a library raised; the guard's verdict explains it best.
        :param kind: the limit that has passed, where there is no error.
        """
        guard, limits, now = self._guard, self._deadlines, _now()
        causes = list(_chain(error)) if error else []
        # Behind the headers, the loop knows more.
        phase = "" if self._body is not None else guard.phase or "request"
        if guard.verdict == "closed":
            return StreamAbortedError(_CLOSED, phase=phase)
        is_sending = error is not None and self._body is None
        if is_sending and not guard.verdict and isinstance(error, ValueError):
            # The URL or a header is at fault, which no server has seen.  (TLS's errors
            # are ValueErrors too; and this InvalidHeader is the server's header.)
            others = (ssl.SSLError, InvalidHeader)
            if not any(isinstance(e, others) for e in causes):
                message = _hidden(str(error), self.secrets)
                return ValueError(f"cannot send the request: {message}")
        kind = guard.verdict or kind
        if not kind and any(map(_is_late, causes)):
            kind = limits.read(now)[1]
            if is_sending:
                (connect, _), (headers, kind) = guard.limits.values()
                is_connecting = guard.phase != "request"
                if not guard.phase and isinstance(error, requests.ReadTimeout):
                    # It may be that of a TLS handshake, which ends when connecting has to.
                    is_connecting = connect <= now < headers
                kind = "connect" if is_connecting else kind
        if kind:
            kind = "total" if limits.left(now) <= 0 else kind
            is_silence = kind == "idle" and self.bytes == limits.heard
            advice = _TIMEOUT_ADVICE.get("silence" if is_silence else kind, "")
            return StreamTimeoutError(
                f"the {kind} timeout of {limits.seconds(kind):g} s passed: {advice}",
                kind=kind,
                phase="connect" if kind == "connect" else phase,
                retryable=kind != "total",
            )
        signs = (NewConnectionError, ProxyError, ssl.SSLError)
        if phase and not guard.phase and any(isinstance(e, signs) for e in causes):
            phase = "connect"
        certificate = ssl.SSLCertVerificationError
        return StreamConnectionError(
            _DROPS[phase].format(self._request.host, _reason(causes)),
            phase=phase,
            retryable=not any(isinstance(e, certificate) for e in causes),
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it wraps as cause, context or argument."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < 20:
        error = waiting.pop(0)
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        inner = [*error.args, getattr(error, "reason", None)]
        waiting += [error.__cause__, error.__context__, *inner]


def _is_late(error: BaseException) -> bool:
    """Whether a timeout of ours passed; ETIMEDOUT of TCP's keep-alive is a drop."""
    is_timeout = isinstance(error, (requests.Timeout, _TIMED_OUT))
    return is_timeout and getattr(error, "errno", None) is None


def _reason(causes: Sequence[BaseException]) -> str:
    """The innermost error's name; texts of libraries may quote URLs and hosts."""
    if isinstance(causes[0], _CutBody):
        return str(causes[0])
    for inner in causes:
        if isinstance(inner, OSError) and inner.errno:
            return f"{type(inner).__name__}: {inner.strerror}"
    return type(causes[-1]).__name__


def _stripped(error: BaseException, secrets: Sequence[str]) -> BaseException:
    """The error as a cause: without request, response and frames, which hold the key."""

    def bare(value: Any) -> Any:
        if isinstance(value, str):
            return "" if "?" in value else _hidden(value, secrets)  # a query has keys
        if isinstance(value, bytes):
            return b""
        return value if isinstance(value, (int, float, BaseException)) else None

    for inner in list(_chain(error)):
        inner.__traceback__ = None
        inner.args = tuple(map(bare, inner.args))
        facts = vars(inner)
        facts.update({name: bare(value) for name, value in facts.items()})
    return error


#: The packages that a request goes through.
_BELOW = frozenset(
    ["requests", "urllib3", "http", "ssl", "socket", "socks", "gevent", "eventlet"]
)


def _clear_frames(error: BaseException) -> None:
    """Forget the local variables of the frames that the error has left.

    A tracker of errors sends them, and they hold headers and what a server echoed.
    The lines stay, and so do the variables of the caller's own functions.
    """
    for inner in _chain(error):
        trace = inner.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            if frame.f_globals is globals() or package in _BELOW:
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
            trace = trace.tb_next


# ---------------------------------------------------------------------------
# 11. Chat streams: stream_chat, complete_chat, ChatStream
# ---------------------------------------------------------------------------
# The caller's thread reads and yields; there is no other one, and nothing between the
# socket and the loop.  A delta passes _Exchange.read (bytes), _Intake.feed (pieces),
# _Call._exchange (a batch for each read) and _Call.hand_out (one by one).
#
# One object for each call.  Its states, which _Call alone changes:
#
#          next()           sent           complete, or failed for good
#    new ---------> waiting -----> reading -----------------------------> over
#                      ^              |                                     ^
#                      +---- drop ----+    closed or left by its reader ----+
#
# close() from another thread changes no state: it wakes the reader, who raises.  The
# loop of a reader that has closed the call itself just ends.

_NEW, _WAITING, _READING, _OVER = "new", "waiting", "reading", "over"
_HISTORY_KEPT = 1000
_stream_numbers = itertools.count(1)


class _Log:
    """What happened in a call: counts, times and history, told to observers at once.

    Whatever it shows has no secret of the present request in it.
    """

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self.number = next(_stream_numbers)
        self.started = self._request_started = _now()
        self.ended: float | None = None
        self.first_token: float | None = None
        self.request: _Request | None = None  # the present one, or the last
        self.requests = 0
        #: Of requests, and answers, that are over; the present ones count on.
        self.bytes = self.events = self.deltas = self.malformed = 0
        self.history: list[RequestRecord] = []
        self.observers: tuple[Observer, ...] = ()
        #: What any observer listens to: looked at for each read.
        self.wanted: set[str] = set()
        self._unsaid = b""  # the end of what was read: perhaps a secret's beginning
        self.add(observers)

    def add(self, observers: tuple[Observer, ...]) -> None:
        """Tell these observers too."""
        self.observers += observers
        self._note_hooks()

    def _note_hooks(self) -> None:
        """Find out what is listened to; hooks may be set on an observer at any time."""
        self.wanted = {
            name[3:]
            for observer in self.observers
            for name, unused in vars(Observer).items()
            if name.startswith("on_")
            and getattr(getattr(observer, name), "__func__", 0) is not unused
        }

    def tell(self, what: str, why: str, data: Any) -> None:
        """Call ``on_<what>`` of every observer."""
        if not self.observers:
            return
        seconds = _now() - self.started
        record = StreamRecord(what, self.number, seconds, self.requests, why, data)
        hooks = [getattr(observer, "on_" + what) for observer in self.observers]
        if what in ("error", "complete"):
            with contextlib.ExitStack() as stack:  # all are told, whichever raises
                for hook in reversed(hooks):
                    stack.callback(hook, record)
            return
        for hook in hooks:
            hook(record)

    def begin(self, request: _Request, facts: dict[str, Any]) -> None:
        """The call begins."""
        self.started = _now()
        url = request.shown_url
        self.tell("start", "to " + url, {**facts, "url": url})

    def begin_request(self, request: _Request) -> None:
        """A request is being sent."""
        self.request = request
        self.requests += 1
        self._request_started = _now()
        self._note_hooks()
        facts = {
            "method": request.method,
            "url": request.shown_url,
            "action": request.action,
            "headers": _shown_headers(request.headers),
            "body_bytes": len(request.data or b""),
        }
        self.tell("request", f"{request.action} by {request.method}", facts)

    def note_response(self, exchange: Any) -> None:
        """The headers are in; with a caller's session, they tell what was sent."""
        self.request = cast(_Request, self.request)._replace(secrets=exchange.secrets)
        headers = _shown_headers(exchange.headers)
        facts = {"status": exchange.status, "headers": headers}
        self.tell("response", f"HTTP status {exchange.status}", facts)

    def note_chunk(self, chunk: bytes) -> None:
        """Tell of bytes as they may be kept: observers write them into files."""
        chunk, self._unsaid = _masked(self._unsaid + chunk, self.secrets)
        if chunk:
            self.tell("chunk", f"{len(chunk)} bytes", chunk)

    def end_body(self) -> None:
        """Nothing follows what the last chunk held back."""
        rest, self._unsaid = _masked_rest(self._unsaid), b""
        if rest:
            self.tell("chunk", f"{len(rest)} bytes", rest)

    def note_event(self, event: ServerSentEvent) -> None:
        """Tell of an event: its type is shown, its data is not."""
        kind = _one_line(_hidden(event.event, self.secrets))
        why = f"{kind} of {len(event.data)} characters"
        self.tell("event", why, event._replace(event=kind))

    def end_request(
        self, error: StreamingError | None = None, usage: Usage | None = None
    ) -> None:
        """Note what ended the present request; None for a good end."""
        request = cast(_Request, self.request)
        kind = "" if error is None else type(error).__name__
        message = "" if error is None else self.redact(error)
        facts = (self.requests, request.action, kind, message)
        seconds = _now() - self._request_started
        self.history.append(RequestRecord(*facts, None, usage, seconds))
        del self.history[:-_HISTORY_KEPT]

    def note_wait(self, error: StreamingError, action: str, wait: float) -> None:
        """Another request follows the last one, after so many seconds."""
        self.history[-1] = last = self.history[-1]._replace(wait=wait)
        why = f"{action} in {wait:.1f} s after {last.message}"
        logger.warning("request %d: %s", self.requests, why)
        facts = {"error": error, "wait": wait, "action": action}
        self.tell("retry", why, facts)
        if action == "restart":
            self.tell("restart", why, facts)

    def note_first_token(self) -> None:
        """A delta came, the first one."""
        self.first_token = _now() - self.started

    def end(self) -> None:
        """The call is over."""
        self.ended = _now() if self.ended is None else self.ended

    @property
    def seconds(self) -> float:
        """How long the call has taken so far, or has taken."""
        return (_now() if self.ended is None else self.ended) - self.started

    @property
    def secrets(self) -> tuple[str, ...]:
        """Those of the present request."""
        return self.request.secrets if self.request else ()

    def redact(self, error: StreamingError) -> str:
        """Take out the secrets that a server has echoed; return the message."""
        _clear_frames(error)
        error.__traceback__ = None  # it begins anew where it is raised for good
        message = _one_line(_hidden(str(error), self.secrets))
        error.args = (message,)
        facts = vars(error)
        for name in set(facts) - {"text", "result"}:  # the answer is what it is
            facts[name] = _hidden_in(facts[name], self.secrets)
        return message


if TYPE_CHECKING:
    #: Makes the exchange for a request.
    Opener = Callable[[_Request, _Deadlines, _Guard], Any]


def _opener(session: requests.Session | None) -> Opener:
    return functools.partial(_Exchange, session)


def _pause(closing: threading.Lock, seconds: float) -> None:
    """Wait, unless the stream is closed meanwhile."""
    closing.acquire(timeout=min(seconds, _LONGEST))


class _Call:
    """A call, over all its requests: reading, handing out, closing, failing.

    A chat and a feed of events are two kinds of it.  They say what is asked, what the
    bytes of a body mean, and what follows a drop.

    :param request: the first one.
    :param facts: its model and dialect, for observers.
    :param opener: makes the exchange for a request.
    :param recall: gives batches that need no request, of an earlier run.
    """

    #: Which hook is told of each item that is handed out.
    item_hook = "token"
    #: Whether each response is expected to bring something within ``first_token``.
    needs_first_token = True
    complete_words = ""

    def __init__(
        self,
        request: _Request,
        facts: dict[str, Any],
        opener: Opener,
        timeouts: Timeouts,
        limits: Limits,
        observers: tuple[Observer, ...],
        recall: Callable[[Any], Iterator[list[Any]]] | None = None,
    ) -> None:
        self.request = request
        self.facts = facts
        self.timeouts = timeouts
        self.limits = limits
        self.log = _Log(observers)
        self.state = _NEW
        self.is_whole = False  # no further request is needed
        self.failure: Exception | None = (
            None  # what ended it: each later loop raises it
        )
        #: What the last read brought and was not handed out; all loops share it.
        self.items: Iterator[Any] = iter(())
        self.handed = 0  # characters of text
        #: The threads that called close(): the first one did it.  Not their numbers,
        #: which are used again.
        self.closers: list[threading.Thread] = []
        self.exchange: Any = None  # the present one
        self.deadlines = _Deadlines(timeouts, self.log.started)
        self._open = opener
        self._guard: _Guard | None = None  # of the present exchange
        # Released by close(): a lock, for a signal handler may call that while its
        # thread waits, and would find the inner lock of an Event taken.
        self._closing = threading.Lock()
        self._closing.acquire()
        self._reader = threading.current_thread()
        self._source: Any = self._batches(recall)

    # -- what a kind of call says

    def next_request(self) -> _Request:
        """What is to be sent now."""
        raise NotImplementedError

    def open_body(self, exchange: Any) -> Callable[[bytes], list[Any]] | None:
        """Look at the headers; return what reads the body, or None if there is none.

        :returns: takes what a read brings (b"" is the clean end), gives a batch.
        :raises StreamingError: they do not begin a stream.
        """
        raise NotImplementedError

    def settle(self, now: float) -> bool:
        """What a read has brought is handed out: note it; whether to read on.

        :raises StreamingError: it was more than pieces.
        """
        raise NotImplementedError

    def end_response(self) -> list[Any]:
        """Nothing more is read of it: return what that brings.

        :raises StreamingError: that is not the end of the stream.
        """
        raise NotImplementedError

    @property
    def has_finished(self) -> bool:
        """Whether all that matters came, so that a drop is none."""
        return False

    def decide(self, error: StreamingError) -> tuple[str, StreamingError]:
        """Return the next action, and the error to raise if it is ``raise``."""
        raise NotImplementedError

    def wait_for(self, error: StreamingError, left: float) -> float:
        """Seconds to wait before the next request.

        :param left: seconds that are left of the whole call.
        :returns: the wait; infinite if there is no time for it.
        """
        raise NotImplementedError

    def prepare(self, action: str, drop: StreamingError) -> None:
        """Make the next request, or fail with the drop."""
        raise NotImplementedError

    def close_body(self) -> None:
        """No more is read: let go of what reads it, and take over its counts."""
        raise NotImplementedError

    def phase(self) -> str:
        """Where the present response stands."""
        return "stream"

    def usage(self) -> Usage | None:
        """What the present request has reported."""
        return None

    def stats(self) -> StreamStats:
        """The counts so far."""
        log, exchange = self.log, self.exchange
        return StreamStats(
            malformed=log.malformed,
            bytes=log.bytes + (exchange.bytes if exchange else 0),
            events=log.events,
            deltas=log.deltas,
            requests=log.requests,
            retries=max(0, log.requests - 1),
            first_token_seconds=log.first_token,
            seconds=log.seconds,
        )

    def result(self) -> Any:
        """What the observers are told when all is complete."""
        return self.stats()

    def complete_error(self, error: StreamingError) -> None:
        """Put on the error what was received."""
        raise NotImplementedError

    def items_of(self, batch: list[Any]) -> Iterator[Any]:
        """The items of a batch; observers are told of each just before it is next."""
        log = self.log
        if log.first_token is None and batch:
            log.note_first_token()
        return self._told(batch) if self.item_hook in log.wanted else iter(batch)

    def tell_item(self, item: Any) -> None:
        """Tell the observers of an item."""
        raise NotImplementedError

    def _told(self, batch: list[Any]) -> Iterator[Any]:
        for item in batch:
            self.tell_item(item)
            yield item

    # -- handing out

    def hand_out(self, skipped: type | None = None) -> Iterator[Any]:
        """The loop below every public stream.

        It holds the call and not the public stream: so a for statement over an
        unnamed stream drops that, and the connection is closed, when it is left.

        :param skipped: a kind of items that this reader does not want.
        """
        try:
            while not (self.closers and self.check_closed()):
                items = self.items
                for item in items:
                    if item.__class__ is str:
                        self.handed += len(item)
                    elif item.__class__ is skipped:
                        continue
                    yield item
                    if self.closers and self.check_closed():
                        return
                item = None  # this frame is in the traceback of what follows
                if self.items is not items:
                    continue  # texts and deltas are read in turns: the other went on
                self._reader = threading.current_thread()
                if self.failure is not None:  # the other one has failed
                    raise self.failure
                batch = next(self._source, None)
                if batch is None:
                    return
                self.items = self.items_of(batch)
        except GeneratorExit:  # the caller left
            raise
        except BaseException as error:
            _clear_frames(error)
            # Of the caller's too: a key, an observer, Ctrl-C.  The call is over then,
            # and must not look complete; but a reader that came on top of another
            # one, and is refused, has ended nothing.
            if self.failure is None and not self._source.gi_running:
                self.failure = self._lasting(error)
            raise
        finally:
            self.leave()

    def _lasting(self, error: BaseException) -> Exception:
        """What later loops raise."""
        if isinstance(error, Exception):
            return error
        self.log.end()
        cut = StreamAbortedError(f"the loop was cut by {type(error).__name__}")
        cut.history = tuple(self.log.history)
        self.complete_error(cut)
        return cut

    def raise_again(self) -> None:
        """A stream that failed does not look like one that has ended."""
        if self.failure is not None:
            raise self.failure

    # -- closing

    def close(self) -> None:
        """Close it, from any thread."""
        if self.closers or self.state == _OVER:
            return
        thread = threading.current_thread()
        self.closers.append(thread)
        self.log.end()
        with contextlib.suppress(RuntimeError):  # two threads may close it at once
            self._closing.release()
        guard = self._guard
        if guard is not None:
            guard.fire("closed")
        if self.closers[0] is thread is self._reader and self.state != _NEW:
            self.leave()

    def leave(self) -> None:
        """The reader leaves: let go of the connection."""
        try:
            self._source.close()
        except ValueError as error:
            # A signal handler or an observer closes the stream inside of the loop,
            # which is going to see it.
            logger.debug("closed from within: %s", error)
            return
        if self.state != _OVER:
            self.closers.append(threading.current_thread())
            why = "the caller left before the end"
            self._end("error", why, StreamAbortedError(why))

    def check_closed(self) -> bool:
        """Whether it is closed; raises if another thread did that."""
        self.raise_again()
        if not self.closers or self._is_closed_by_reader or self.state == _OVER:
            return bool(self.closers)
        error = StreamAbortedError(_CLOSED)
        if self.state == _READING:  # it was closed between two reads
            self.log.end_request(error, self.usage())
        self.fail(error)

    @property
    def _is_closed_by_reader(self) -> bool:
        return self.closers[:1] == [threading.current_thread()]

    # -- the requests of a call

    def _batches(
        self, recall: Callable[[Any], Iterator[list[Any]]] | None
    ) -> Generator[list[Any]]:
        """Requests, one after the other; a batch for each read."""
        log = self.log
        self.state = _WAITING
        log.begin(self.request, self.facts)
        self.deadlines = _Deadlines(self.timeouts, log.started)
        if recall is not None:
            yield from recall(self)
        while not self.is_whole:
            if self.check_closed():  # in a wait, say: no request more
                return
            request = self.next_request()
            try:
                yield from self._exchange(request)
            except StreamingError as error:
                if self._is_closed_by_reader:
                    return
                self._recover(error)
            else:
                self.is_whole = True
                log.end_request(None, self.usage())
        log.end()
        data = self.result() if log.observers else None
        self._end("complete", self.complete_words, data)

    def _exchange(self, request: _Request) -> Iterator[list[Any]]:
        """One request, and what its response brings."""
        log, deadlines = self.log, self.deadlines
        self._guard = guard = _Guard()
        if self.closers:
            guard.verdict = "closed"
        deadlines.send(_now())
        deadlines.has_begun = not self.needs_first_token
        log.begin_request(request)
        self.exchange = exchange = self._open(request, deadlines, guard)
        self.state = _READING
        try:
            exchange.open()
            log.note_response(exchange)
            feed = self.open_body(exchange)
            now = _now()
            while feed is not None:
                try:
                    chunk = exchange.read(now)
                except (StreamConnectionError, StreamTimeoutError):
                    if not self.has_finished:
                        raise
                    break
                if "chunk" in log.wanted:
                    log.note_chunk(chunk)
                batch = feed(chunk)
                if batch:
                    came = _now()
                    yield batch
                    now = _now()
                    deadlines.skip(now - came)
                else:
                    now = _now()
                if not self.settle(now) or not chunk:
                    break
            rest = self.end_response()
            if rest:
                yield rest
        finally:
            self.state = _WAITING if self.state == _READING else self.state
            # Gone, too, from the tracebacks that this call is in: they hold the key,
            # and what the server sent.
            self._guard = self.exchange = None
            exchange.close()
            self.close_body()
            log.bytes += exchange.bytes
            log.end_body()

    def _recover(self, error: StreamingError) -> None:
        """Prepare the next request, and wait for its time; or raise."""
        error.phase = error.phase or self.phase()
        self.log.end_request(error, self.usage())
        if isinstance(error, StreamAbortedError):
            self.fail(error)
        self.check_closed()
        action, final = self.decide(error)
        if action == "raise":
            self.fail(final)
        wait = self.wait_for(error, self.deadlines.left(_now()))
        if wait == _NEVER:
            self.fail(error)
        self.prepare(action, final)
        self.log.note_wait(error, action, wait)
        _pause(self._closing, wait)

    def fail(self, error: StreamingError) -> NoReturn:
        """Complete the error with all that is known, and raise it for good."""
        self.log.end()
        self.complete_error(error)
        self.log.redact(error)
        error.history = tuple(self.log.history)
        self.failure = error
        self._end("error", str(error), error)
        raise error

    def _end(self, what: str, why: str, data: Any) -> None:
        has_begun, self.state = self.state != _NEW, _OVER
        self.log.end()
        if has_begun:
            self.log.tell(what, why, data)


#: What is sent with each request, unless the caller says otherwise.
_HEADERS = {
    "Accept": "text/event-stream, application/x-ndjson, application/json",
    "Accept-Encoding": "identity",
    "Cache-Control": "no-store",
    "User-Agent": _USER_AGENT,
}


def _merge_headers(headers: Any, more: Mapping[str, str | None]) -> None:
    """Put the caller's headers over ours; None takes one away."""
    for name, value in more.items():
        if value is None:
            headers.pop(name, None)
        else:
            headers[name] = value


class _Prompt(NamedTuple):
    """What is asked, and how to ask again."""

    dialect: Dialect
    url: str
    body: dict[str, Any]
    headers: dict[str, str]
    key: str | Callable[[], str] | None
    resume: ResumeMode
    model: str | None = None

    def request(self, action: str, answer: Answer) -> tuple[_Request, Seam | None]:
        """The request that carries out an action, and the seam that it makes.

        :raises IncompleteStreamError: there is no such request.
        """
        dialect, url = self.dialect, self.url
        body: dict[str, Any] | None = self.body
        seam: Seam | None = None
        if action == "reattach":
            url = str(dialect.reattach_url(url, answer))
            return _Request("GET", _Secret(url), {}, None, action), None
        if action in ("continue", "ask"):
            text = answer.received.text
            sent = text.rstrip() if dialect.strips_prefix else text
            body = None  # without text, whatever came would not continue it
            if sent and action == "ask":
                body = dialect.add_turns(
                    self.body, [("assistant", sent), ("user", _ASK)]
                )
            elif sent and callable(self.resume):
                body = self.resume(copy.deepcopy(self.body), sent)
            elif sent:
                body = dialect.prefill(self.body, sent)
                reasoning = answer.side_text("reasoning")
                if body is not None and reasoning:
                    body = dialect.add_reasoning(body, reasoning)
            if body is None:
                raise IncompleteStreamError(
                    f"the dialect {dialect.name!r} cannot {action} this answer"
                )
            if action == "ask":
                seam = AskSeam(text)
            else:
                url = dialect.resume_url(url)
                repeats = dialect.repeats_prefix or body.get("echo")
                seam = ContinueSeam(text, sent, sent if repeats else "")
        headers = {"Content-Type": "application/json"}
        data = jsonlib.dumps(body).encode("ascii")
        return _Request("POST", _Secret(url), headers, data, action), seam

    def can_continue(self, text: str) -> bool:
        """Whether the dialect surely continues this text."""
        text = text.rstrip() if self.dialect.strips_prefix else text
        if not (text and self.dialect.exact(self.body)):
            return False
        return self.dialect.prefill(self.body, text) is not None

    def with_key(self, request: _Request) -> _Request:
        """The request as it is sent, with a key that is fresh."""
        key = _checked_key(self.key()) if callable(self.key) else self.key
        headers = CaseInsensitiveDict(_HEADERS)
        headers.update(request.headers)
        headers.update(self.dialect.headers())
        if key is not None:
            headers.update(_veiled(self.dialect.auth(key)))
        _merge_headers(headers, self.headers)
        secrets = _secrets_in(request.url, headers, key or "")
        return request._replace(headers=dict(headers), secrets=secrets)


class _Chat(_Call):
    """A call that asks a model: the answer so far, and how it can go on.

    :param prompt: what is asked.
    """

    complete_words = "the answer is complete"

    def __init__(self, prompt: _Prompt, retry: Retry, *settings: Any) -> None:
        request, _ = prompt.request("start", Answer())
        facts = {"model": prompt.model, "dialect": prompt.dialect.name}
        super().__init__(request, facts, *settings)
        self.prompt = prompt
        self.retry = retry
        self.headers: Mapping[str, str] = {}
        self.answer = Answer(self.limits)
        self.sees_deltas = False  # the caller, and not text alone
        self.seen_by_nobody = False  # before it is whole
        self._intake: _Intake | None = None
        self._progress = 0  # of the answer, before the present read
        self._seams: list[int] = []
        self._spent = 0  # requests that count against Retry.attempts
        self._failures = 0  # in a row, without progress
        self._slow_starts = 0
        self._is_stuck = False  # no action would be right, however many are allowed
        self._lacks_time = False  # to wait for another request
        # What cut the answer: raised if its resumption is refused.
        self._drop: StreamingError | None = None

    # -- what was received

    @property
    def text(self) -> str:
        """The text that was handed out, as far as it is kept."""
        return self.answer.received.text[: self.handed]

    @property
    def has_finished(self) -> bool:
        """Whether a finish reason was seen that is the last word."""
        return self.prompt.dialect.finish_is_final and self.answer.finished

    def stats(self) -> StreamStats:
        stats, answer = super().stats(), self.answer
        return stats._replace(
            malformed=stats.malformed + answer.malformed,
            events=stats.events + (self._intake.events if self._intake else 0),
            deltas=stats.deltas + answer.deltas,
            cut_tool_calls=answer.cut_calls,
            text_dropped=answer.dropped,
        )

    def result(self) -> ChatResult:
        """What was received so far."""
        answer, text, secrets = self.answer, self.text, self.log.secrets
        usage = answer.usage
        reason, raw = answer.finishes.get(0, (None, None))
        return ChatResult(
            text=text,
            reasoning=answer.side_text("reasoning"),
            refusal=answer.side_text("refusal"),
            tool_calls=answer.tool_calls(),
            choices={0: text, **answer.texts()},
            message=self.prompt.dialect.message(answer, text),
            finish_reason=reason,
            raw_finish_reason=_hidden_in(raw, secrets),
            usage=usage and usage._replace(raw=_hidden_in(usage.raw, secrets)),
            model=_hidden_in(answer.model, secrets),
            id=_hidden_in(answer.id, secrets),
            headers=self.headers,
            history=tuple(self.log.history),
            seams=tuple(self._seams),
            stats=self.stats(),
        )

    # -- one request

    def next_request(self) -> _Request:
        self._spent += 1
        return self.prompt.with_key(self.request)

    def open_body(self, exchange: Any) -> Callable[[bytes], list[Piece]]:
        self.headers = exchange.headers
        exchange.check_status()
        watched = "event" in self.log.wanted
        self._progress = self.answer.progress
        self._intake = self.new_intake(self.log.note_event if watched else None)
        return self._intake.feed

    def new_intake(
        self, on_event: Callable[[ServerSentEvent], None] | None = None
    ) -> _Intake:
        """What reads the body of the next response into the answer."""
        self.answer.expected = _choice_count(self.prompt.body)
        return _Intake(self.prompt.dialect, self.answer, self.limits, on_event)

    def close_body(self) -> None:
        intake, self._intake = self._intake, None
        self.log.events += intake.events if intake else 0

    def settle(self, now: float) -> bool:
        answer = self.answer
        if answer.progress != self._progress:
            self._progress = answer.progress
            deadlines = self.deadlines
            deadlines.move(now, self.exchange.bytes)
            if answer.started:
                deadlines.has_begun = True
            if answer.finishes and self.has_finished:
                deadlines.expect_end(now)
            if answer.seam is not None and answer.seam.is_over:
                answer.seam = None
        if answer.error is not None:
            raise answer.error
        return not answer.ended

    def end_response(self) -> list[Piece]:
        answer = self.answer
        if answer.ended:
            self.exchange.drain()
        elif not answer.finished:
            raise IncompleteStreamError(
                "the stream ended without its end marker or a finish reason: the "
                "answer is cut",
                retryable=True,
            )
        answer.settle()
        return answer.take()

    def tell_item(self, item: Piece) -> None:
        delta = _as_delta(item)
        self.log.tell("token", delta.kind, delta)

    def phase(self) -> str:
        if self.has_finished:
            return "end"
        return "stream" if self.answer.started else "first token"

    def usage(self) -> Usage | None:
        return self.answer.usage

    # -- after a drop

    @property
    def _mode(self) -> ResumeMode:
        """The caller's ``resume``; a function is a way to continue."""
        return "continue" if callable(self.prompt.resume) else self.prompt.resume

    def decide(self, error: StreamingError) -> tuple[str, StreamingError]:
        answer, request = self.answer, self.log.request
        action = request.action if request else "start"
        self._slow_starts += is_slow_start(error)
        now = self.situation()
        if action == "reattach" and error.phase == "request":
            now = now._replace(reattaching=True)
        went_on = action == "reattach" and answer.resumed_at is None
        if went_on:
            self._spent = 1
        if went_on or answer.started:  # what has brought something ends the row
            self._failures = 0
        self._failures += 1
        is_fatal = isinstance(error, APIError) and not error.retryable
        is_refused = is_fatal and action in _RESUMES and not answer.started
        if is_refused and self._drop is not None:
            self._is_stuck, error = True, self._drop
            over_again = "restart" if now.seen_by_nobody else "raise"
            choice = over_again if now.handed else "retry"
        else:
            choice = choose_action(self._mode, error, now)
            if answer.started or self._drop is None:
                self._drop = error
            self._is_stuck = choice == "raise"
        return ("raise" if self._spent >= self.retry.attempts else choice), error

    def situation(self) -> Situation:
        """What a decision about this answer depends on."""
        prompt, body, answer = self.prompt, self.prompt.body, self.answer
        text = answer.received.text
        side = answer.sides() if self.sees_deltas else {}
        called = bool(answer.calls_begun)
        saw_call = called and self.sees_deltas
        return Situation(
            handed=bool(text or side or saw_call),
            finished=self.has_finished,
            seen_by_nobody=self.seen_by_nobody,
            has_text=bool(text),
            kept=not answer.received.dropped,
            only_text=not saw_call and all(kind == "reasoning" for kind, _ in side),
            verifiable=not saw_call,
            one_choice=_choice_count(body) == 1 and not answer.texts(),
            tool_call=called,
            reasoning=answer.last_kind == "reasoning",
            constrained=_is_constrained(body),
            repeatable=_is_repeatable(body),
            reattachable=body.get("background") is True
            and prompt.dialect.reattach_url(prompt.url, answer) is not None,
            exact=prompt.can_continue(text),
            slow_starts=self._slow_starts,
        )

    def wait_for(self, error: StreamingError, left: float) -> float:
        wait: float | None = getattr(error, "retry_after", None)
        if wait is None:
            wait = draw_wait(self.retry, self._failures, random.random())
            self._lacks_time = wait >= left
        elif wait > self.retry.retry_after_max:
            return _NEVER
        return wait if wait < left else _NEVER

    def prepare(self, action: str, drop: StreamingError) -> None:
        try:
            request, seam = self.prompt.request(action, self.answer)
        except IncompleteStreamError as error:
            drop.args = (f"{drop}; {error}",)
            self.fail(drop)
        self.go_on(action, request, seam)

    def go_on(self, action: str, request: _Request, seam: Seam | None) -> None:
        """Make it the next request; what it brings goes on at the seam."""
        answer, log, seams = self.answer, self.log, self._seams
        self.request = request
        if action in _RESUMES:
            if seams[-1:] != [answer.received.kept]:
                seams.append(answer.received.kept)
            del seams[:-_HISTORY_KEPT]
        if action == "reattach":
            answer.reattach()
        elif action in ("continue", "ask"):
            answer.forget_calls()
            answer.new_request(seam)
        else:
            log.deltas += answer.deltas
            log.malformed += answer.malformed
            if action == "replay":  # the text that is known stays
                if not self.sees_deltas:
                    answer.forget_sides()
                self.answer = answer.again()
            else:
                self.start_over()

    def start_over(self) -> None:
        """Begin an answer of which nothing is known yet."""
        self.answer = Answer(self.limits)
        self.handed = 0
        self._seams.clear()

    # -- errors

    def complete_error(self, error: StreamingError) -> None:
        log = self.log
        error.phase = error.phase or self.phase()
        where = (
            f"(after {self.handed} characters of text and {_now() - log.started:.1f} s, "
            f"request {log.requests} of {self.retry.attempts})"
        )
        error.args = (f"{error} {where}{self._advice(error)}",)
        error.text = self.text
        error.result = self.result()

    def _advice(self, error: StreamingError) -> str:
        """What the caller can do about it."""
        asked = getattr(error, "retry_after", None)
        if asked is not None and error.retryable:
            return f"; the server asks to wait {asked:.0f} s"
        if self._lacks_time:
            return "; Timeouts(total=...) leaves no time to wait for another request"
        if getattr(error, "status", None) in (401, 403) and self.prompt.key is None:
            return (
                "; no key was sent: a key from the environment goes only to the "
                "provider's own address, pass api_key=..."
            )
        if is_slow_start(error) and self._slow_starts > _SLOW_STARTS:
            return "; it is not asked once more, since each request is billed whole"
        is_cut = error.retryable and self.text and not self.has_finished
        if not (is_cut and self._is_stuck):
            return ""
        # Which resume= could go on from the answer, or why none can.
        now, mode = self.situation(), self._mode
        if not now.kept:
            return f"; {find_obstacle(mode, now)} to resume it"
        if mode in ("never", "reattach"):
            return ""
        obstacle = find_obstacle("continue" if mode == "auto" else mode, now)
        if mode != "auto":
            return (
                f"; resume={mode!r} cannot go on from it: {obstacle}"
                if obstacle
                else ""
            )
        advice = (
            "; this answer cannot be resumed without a doubtful seam: see resume="
            "'continue', 'ask' or 'replay', or use complete_chat"
        )
        if not obstacle:
            return advice
        return f"{advice} ('continue' and 'ask' cannot go on from it: {obstacle})"


def _as_delta(piece: Piece) -> Delta:
    return piece if isinstance(piece, Delta) else Delta("text", piece)


_Item = TypeVar("_Item")
_Self = TypeVar("_Self")


class _Stream(Generic[_Item]):  # noqa: RUF100, UP046  (for Python 3.12 on)
    """What the public streams share: they are iterators, and can be closed."""

    def __init__(self, call: Any, skipped: type | None) -> None:
        self._call = call
        self._items: Iterator[_Item] = call.hand_out(skipped)

    def __iter__(self) -> Iterator[_Item]:
        self._call.raise_again()
        return self._items

    def __next__(self) -> _Item:
        self._call.raise_again()
        return next(self._items)

    def __enter__(self: _Self) -> _Self:  # noqa: PYI019  (Self needs Python 3.11)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the stream: from any thread, any number of times.

        A reader that is blocked in another thread wakes at once and raises
        :exc:`StreamAbortedError`; a loop closed by its own thread just ends.
        """
        self._call.close()

    @property
    def stats(self) -> StreamStats:
        """Counts, live and after the end."""
        stats: StreamStats = self._call.stats()
        return stats


class ChatStream(_Stream[str]):
    """The answer of a model, as it comes: an iterator of ``str``.

    Made by :func:`stream_chat`.  Nothing is sent before the first ``next()``.  A loop
    over an unnamed stream closes the connection however it is left; a named stream is
    closed by ``with``, by :meth:`close`, or with its last reference.
    """

    def __init__(self, chat: _Chat) -> None:
        super().__init__(chat, Delta)
        self._deltas: Iterator[Delta] | None = None

    def __repr__(self) -> str:
        prompt = self._call.prompt
        return f"<ChatStream of {prompt.model}, dialect {prompt.dialect.name}>"

    def deltas(self) -> Iterator[Delta]:
        """Iterate :class:`Delta` instead of ``str``: reasoning, refusals and tool
        calls too, of every choice."""
        self._call.raise_again()
        if self._deltas is None:
            self._call.sees_deltas = True
            self._deltas = map(_as_delta, self._call.hand_out())
        return self._deltas

    def complete(self) -> ChatResult:
        """Drain the stream and return its result.

        As nobody has seen a part of it yet, the answer may start over after a drop
        (observers are told by ``on_restart``).  If some of it was handed out before,
        the rest is as strict as the loop.

        :raises StreamLimitError: the answer is longer than ``Limits.text`` keeps.
        :raises StreamingError: as the loop does.
        """
        chat: _Chat = self._call
        was_seen = chat.handed or (chat.sees_deltas and chat.state != _NEW)
        chat.seen_by_nobody = not was_seen
        for _ in self:
            pass
        result = chat.result()
        facts = {"text": result.text, "result": result, "history": result.history}
        if chat.closers:
            raise StreamAbortedError("the stream was closed before its end", **facts)
        if chat.answer.dropped:
            message = f"the answer is longer than Limits(text={chat.limits.text}) keeps"
            raise StreamLimitError(message, limit="text", phase="end", **facts)
        return result

    def observe(self, observer: Observer) -> None:
        """Add an observer; before the first ``next()``, or it misses the start."""
        self._call.log.add(_known_observers(observer))

    @property
    def text(self) -> str:
        """Exactly what ``next()`` has handed out."""
        text: str = self._call.text
        return text

    @property
    def result(self) -> ChatResult:
        """What was received, live and after any end."""
        result: ChatResult = self._call.result()
        return result

    @classmethod
    def replay(
        cls,
        raw: bytes | Iterable[bytes] | os.PathLike[str],
        dialect: str | Dialect = "openai",
        *,
        limits: Limits = _LIMITS,
        observe: Observer | Iterable[Observer] = (),
    ) -> ChatStream:
        """Stream saved bytes of a response body, without a network.

        :param raw: the body, whole or in pieces, or the path of a file that holds it.
        :param dialect: the dialect that it is in.
        :param limits: see :class:`Limits`.
        :param observe: an :class:`Observer`, or several.
        :returns: a stream that makes no request and never resumes.
        :raises TypeError: ``raw`` is a str.
        :raises ValueError: the dialect is unknown.
        :raises OSError: the file cannot be read (now, not in the loop).
        :raises StreamingError: (from the loop) the bytes are not a complete answer.
        """
        if isinstance(raw, str):
            raise TypeError("raw: needs bytes, pieces of them, or a pathlib.Path")
        if isinstance(raw, os.PathLike):
            with open(raw, "rb") as file:
                raw = file.read()
        is_one = isinstance(raw, (bytes, bytearray, memoryview))
        pieces: Any = [bytes(cast(bytes, raw))] if is_one else raw
        prompt = _Prompt(_known_dialect(dialect), "replay:", {}, {}, None, "never")
        never = Timeouts(None, None, None, None, None)
        opener = functools.partial(_Recording, pieces)
        observers = _known_observers(observe)
        retry = Retry(attempts=1)
        return cls(_Chat(prompt, retry, opener, never, limits, observers))

    if TYPE_CHECKING:  # the optional part adds these

        def show(self) -> ChatResult:
            """Stream as live Markdown in a notebook; see section 15."""


class _Recording:
    """Saved bytes in place of an exchange."""

    status = 200
    secrets: tuple[str, ...] = ()

    def __init__(
        self,
        pieces: Iterable[bytes],
        request: _Request,
        deadlines: _Deadlines,
        guard: _Guard,
    ) -> None:
        self._pieces = (
            piece[start : start + _READ]
            for piece in pieces
            for start in range(0, len(piece), _READ)
        )
        self._guard = guard
        self.headers: Mapping[str, str] = {}
        self.bytes = 0

    def open(self) -> None:
        """There is nothing to open."""

    check_status = drain = close = open

    def read(self, now: float) -> bytes:
        """The next piece that is not empty.

        :raises StreamAbortedError: the stream was closed meanwhile.
        """
        if self._guard.verdict:
            raise StreamAbortedError(_CLOSED)
        piece = next(self._pieces, b"")
        self.bytes += len(piece)
        return piece


# -- checking what the caller passed

_OTHER_NAMES = {
    "timeout": "timeouts=Timeouts(...)",
    "max_retries": "retry=Retry(attempts=...)",
    "retries": "retry=Retry(attempts=...)",
    "stream": "nothing: stream_chat always streams; complete_chat returns the whole",
    "proxies": "the environment (HTTPS_PROXY), or session=",
    "verify": "the environment (REQUESTS_CA_BUNDLE), or session=",
    "cert": "session=",
    "auth": "api_key=, headers= or session=",
    "on_token": "observe=Observer(on_token=...)",
    "on_error": "observe=Observer(on_error=...)",
    "on_complete": "observe=Observer(on_complete=...)",
    "on_retry": "observe=Observer(on_retry=...)",
    "callback": "observe=Observer(on_token=...)",
    "callbacks": "observe=...",
    "api_base": "base_url=",
    "url": "base_url=",
    "key": "api_key=",
    "extra_headers": "headers=",
    "default_headers": "headers=",
    "extra_query": "a query in base_url=",
    "http_client": "session=",
    "client": "session=",
    "observer": "observe=",
    "observers": "observe=",
    "monitor": "observe=StreamMonitor()",
    "limit": "limits=Limits(...)",
    "provider": "dialect=",
    "prompt": "the first argument, messages",
}

#: The types of arguments, and what is said of a value of another one.
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "model": (
        (str, type(None)),
        "={!r}: needs a string, or None where the URL or the server decides it",
    ),
    "timeouts": (Timeouts, "={!r}: needs Timeouts(...)"),
    "retry": ((Retry, type(None)), "={!r}: needs Retry(...)"),
    "limits": (Limits, "={!r}: needs Limits(...)"),
    "session": ((requests.Session, type(None)), "={!r}: needs Session(...)"),
    "last_event_id": (str, "={!r}: needs a string"),
    # These may hold a key, or a prompt: they are not shown.
    "headers": ((Mapping, type(None)), ": needs a dict, not {1}"),
    "extra_body": ((Mapping, type(None)), ": needs a dict, not {1}"),
    "base_url": ((str, type(None)), ": needs a string, not {1}"),
    "url": (str, ": needs a string, not {1}"),
}


def _check_types(**arguments: Any) -> None:
    for name, value in arguments.items():
        types, needs = _ARGUMENTS[name]
        if not isinstance(value, types):
            raise TypeError(name + needs.format(value, type(value).__name__))


def _refuse_other_names(params: dict[str, Any]) -> None:
    for name in params:
        if name in _OTHER_NAMES:
            raise TypeError(
                f"stream_chat() has no {name}=; use {_OTHER_NAMES[name]} (or "
                f"extra_body={{{name!r}: ...}} to send it to the server as it is)"
            )


def _known_dialect(dialect: str | Dialect) -> Dialect:
    if isinstance(dialect, Dialect):
        return dialect
    if isinstance(dialect, str) and dialect in DIALECTS:
        return DIALECTS[dialect]
    raise ValueError(
        "dialect={!r} is unknown: use an instance of Dialect, or one of {}".format(
            dialect, ", ".join(DIALECTS)
        )
    )


def _known_observers(
    observe: Observer | Iterable[Observer] | None,
) -> tuple[Observer, ...]:
    several = () if observe is None else observe
    observers = tuple(several) if isinstance(several, Iterable) else (several,)
    for observer in observers:
        if not isinstance(observer, Observer):
            raise TypeError(
                f"observe={observer!r}: needs an Observer or several; a function goes "
                "into Observer(on_token=function)"
            )
    return observers


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str):
        return
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(
            "messages: needs a string, or a list of the dialect's messages, not %s"
            % (type(messages).__name__ if messages else "an empty one")
        )
    for message in messages:
        if not isinstance(message, (dict, list)):
            raise TypeError(
                "messages: each one is a dict such as {'role': 'user', 'content': "
                f"'...'}}, not {type(message).__name__}"
            )


def _snapshot(
    body: dict[str, Any], what: str = "messages, parameters and extra_body"
) -> dict[str, Any]:
    """A copy that the caller cannot change any more; only JSON gets through."""
    try:
        return cast(
            "dict[str, Any]", jsonlib.loads(jsonlib.dumps(body, allow_nan=False))
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(f"{what} must be JSON: {error}") from None


def _checked_key(key: Any) -> str:
    key = _veiled(key)
    if not isinstance(key, str) or not key.strip():
        raise ValueError("api_key: needs a non-empty string, or a function giving one")
    key = _Secret(key.strip())  # keys read from files end in a line feed
    if not (key.isascii() and key.isprintable()):
        raise ValueError("api_key: has characters that cannot stand in a header")
    return cast(str, key)


def _checked_headers(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    checked: dict[str, Any] = dict(headers or {})
    for name, value in checked.items():
        if not isinstance(name, str):
            raise TypeError(f"headers: a name is a string, not {name!r}")
        if value is not None and not isinstance(value, str):
            raise TypeError(f"headers: {name!r} needs a string")
        if "\n" in (value or "") or "\r" in (value or ""):
            raise ValueError(f"headers: {name!r} has a line break in it")
        if not (value or "").encode("utf-8").isascii():
            raise ValueError(f"headers: {name!r} has characters outside of ASCII")
    return checked


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def _checked_url(name: str, url: str) -> str:
    url = _Secret(url.strip())
    fault = _fault_of(url)
    if fault:
        raise ValueError(f"{name}: {fault}")
    return url


def _fault_of(url: str) -> str:
    """Why a URL is not used; "" if it is.

    urlsplit decides whose address it is, and urllib3 connects: they must agree.
    """
    if "\\" in url or not url.isprintable() or " " in url:
        return "has a backslash, a control character or white space in it"
    try:
        scheme, host, port = _origin(url)
        seen = parse_url(url)
    except (ValueError, HTTPError):  # their texts quote the password
        return "its host or port cannot be read"
    if scheme not in ("http", "https"):
        return "needs a whole URL such as https://host/v1, not one without http(s)://"
    if not host:
        return "needs a whole URL such as https://host/v1, not one without a host"
    seen_host = str(seen.host).lower().strip("[]").partition("%")[0]
    seen_port = seen.port or (443 if scheme == "https" else 80)
    is_same = not host.isascii() or host.partition("%")[0] == seen_host
    if str(seen.scheme).lower() != scheme or seen_port != port or not is_same:
        return "can be read as the address of two different servers"
    return ""


def _environment(names: Iterable[str]) -> str | None:
    values = (os.environ.get(name, "").strip() for name in names)
    return next((value for value in values if value), None)


def _address(
    dialect: Dialect, base_url: str | None, api_key: Any, headers: Mapping[str, Any]
) -> tuple[str, Any]:
    """The base URL and the key, from the arguments or the environment.

    A key from the environment goes to the provider's own origin, or to a base URL
    that is from the environment too, and nowhere else.
    """
    url, name, trusted = base_url, "base_url", False
    if url is None:
        url = _environment(dialect.base_url_names)
        if url is not None:
            url, name = dialect.named_url(url), " or ".join(dialect.base_url_names)
            trusted = True
    if url is None:
        url = dialect.base_url
    if url is None:
        ways = " or ".join(["base_url=", *dialect.base_url_names])
        raise ValueError(f"dialect {dialect.name!r} needs {ways}")
    url = _checked_url(name, url)
    own = dialect.base_url
    trusted = trusted or (own is not None and _origin(url) == _origin(own))
    if api_key is not None:
        return url, api_key if callable(api_key) else _checked_key(api_key)
    brought = CaseInsensitiveDict(headers)  # the key may be among them
    if any(name in brought for name in [*dialect.auth("key"), "Authorization"]):
        return url, None
    key = _veiled(_environment(dialect.key_names)) if trusted else None
    is_remote = _origin(url)[0] == "https" and (own or "").startswith("https:")
    needed = dialect.needs_key or (trusted and is_remote)
    if key is None and needed and dialect.key_names:
        raise ValueError(
            "no key: pass api_key=..., or set {}{}".format(
                " or ".join(dialect.key_names),
                "" if trusted else " together with " + dialect.base_url_names[0],
            )
        )
    return url, key


def stream_chat(
    messages: Messages,
    model: str | None,
    *,
    dialect: str | Dialect = "openai",
    base_url: str | None = None,
    api_key: str | Callable[[], str] | None = None,
    headers: Mapping[str, str | None] | None = None,
    timeouts: Timeouts = _TIMEOUTS,
    retry: Retry | None = _RETRY,
    limits: Limits = _LIMITS,
    resume: ResumeMode = "auto",
    observe: Observer | Iterable[Observer] = (),
    journal: str | os.PathLike[str] | None = None,
    session: requests.Session | None = None,
    extra_body: Mapping[str, Any] | None = None,
    **params: Any,
) -> ChatStream:
    """Stream a model's answer: the whole text, exactly once, or one typed error.

    :param messages: a string (one user message, or the prompt where the API takes
        one), or the list of messages in the dialect's form.
    :param model: the model's name; None where the URL or the server decides it.
    :param dialect: a name of :data:`DIALECTS`, or an instance of :class:`Dialect`.
    :param base_url: what the provider's own SDK calls so; its path and query are
        kept.  Default: the environment, then the provider's own.
    :param api_key: a string, or a function for keys that expire.  Default: the
        environment, but only towards the provider's own origin, or a base URL that
        comes from the environment too.
    :param headers: more headers, over ours; None as a value takes one away.
    :param timeouts: see :class:`Timeouts`.
    :param retry: see :class:`Retry`; None makes one request only.
    :param limits: see :class:`Limits`.
    :param resume: what may be done when the stream drops after text was handed out:

        ``auto`` (default)
            only what leaves no doubtful seam: ``reattach``, or ``continue`` where
            the provider surely does it, or ``replay`` if the request has a ``seed``
            or temperature 0; else the drop is raised.
        ``reattach``
            the same generation goes on (OpenAI Responses in background mode).
        ``continue``
            a new request with the text so far as a prefix.
        ``ask``
            a user turn that asks to go on; what overlaps is trimmed.
        ``replay``
            the same request again, compared with what was handed out.
        ``never``
            the drop is raised.
        a function
            ``(original body, text) -> body``; the reply is treated as in ``continue``.
    :param observe: an :class:`Observer`, or several.
    :param journal: path of an SQLite file that keeps what is received.  The same
        request, made again by a later run, first yields what is there, and then goes
        on as ``resume`` allows; an answer that is whole there needs no request.  What
        cannot go on starts over.
    :param session: a :class:`requests.Session` to send with; nothing is mounted on
        it.  Default: one of our own, shared by all calls.
    :param extra_body: goes into the request body last, over everything else.
    :param params: go into the request body as they are (``temperature=0``).
    :returns: a :class:`ChatStream`; nothing is sent before the first ``next()``.
    :raises TypeError: an argument has the wrong type, or another client's name.
    :raises ValueError: an argument has no usable value, or the key is missing.

    The loop raises a :exc:`StreamingError` if the answer cannot be completed, and an
    :exc:`OSError` if the journal cannot be read.
    """
    api_key, base_url, headers = map(_veiled, (api_key, base_url, headers))
    params = _veiled_arguments(params)
    _refuse_other_names(params)
    _check_messages(messages)
    _check_types(model=model, base_url=base_url, headers=headers, extra_body=extra_body)
    _check_types(timeouts=timeouts, retry=retry, limits=limits, session=session)
    if not (callable(resume) or resume in _MODES):
        raise ValueError(f"resume={resume!r}: use {_MODES}, or a function")
    known = _known_dialect(dialect)
    more = _checked_headers(headers)
    url, key = _address(known, base_url, api_key, more)
    body = _snapshot({**known.body(messages, model, params), **(extra_body or {})})
    if resume == "reattach" and known.cursor_key:
        body.setdefault("background", True)
    prompt = _Prompt(
        known, _Secret(known.url(url, model)), body, more, key, resume, model
    )
    observers = _known_observers(observe)
    entry = _journal_entry(journal, prompt)
    recall = None if entry is None else entry.recall
    if entry is not None:
        observers = (entry, *observers)
    settings = (_opener(session), timeouts, limits, observers, recall)
    return ChatStream(_Chat(prompt, retry or Retry(attempts=1), *settings))


#: What stands in the optional part of the file and is asked for by an argument.
_OPTIONAL: dict[str, Callable[..., Any]] = {}


def _journal_entry(path: Any, prompt: _Prompt) -> Any:
    """The entry of what this prompt asks, in the journal at that path."""
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"journal={path!r}: needs the path of a file")
    if "journal" not in _OPTIONAL:
        raise TypeError("journal=: its part of resilient_sse.py was cut off")
    request, _ = prompt.request("start", Answer())
    return _OPTIONAL["journal"](path, prompt.dialect.name, request.url, prompt.body)


def complete_chat(
    messages: Messages, model: str | None, **arguments: Any
) -> ChatResult:
    """Return a model's whole answer, read as a stream.

    Takes the arguments of :func:`stream_chat`.  Since nobody saw a first part, a
    dropped answer may start over where nothing better is exact.

    :raises TypeError: as :func:`stream_chat` does.
    :raises ValueError: as :func:`stream_chat` does.
    :raises StreamLimitError: the answer is longer than ``Limits.text`` keeps.
    :raises StreamingError: the answer could not be completed.
    """
    arguments = _veiled_arguments(arguments)
    return stream_chat(messages, model, **arguments).complete()


# ---------------------------------------------------------------------------
# 12. Event streams: stream_events, for any SSE endpoint
# ---------------------------------------------------------------------------
# The same reads, limits and errors as above, for events as such.  Reconnecting is
# that of the WHATWG's EventSource, but for what a script needs: it is bounded, it
# POSTs, and it raises where a browser would be silent.


class _Feed(_Call):
    """A call that reads events as such, over all its connections.

    :param request: what is sent each time, but for ``Last-Event-ID``.
    :param retry: None if it never reconnects.
    """

    item_hook = "event"
    complete_words = "the stream has ended"

    def __init__(
        self, request: _Request, retry: Retry | None, last_event_id: str, *settings: Any
    ) -> None:
        super().__init__(request, {"model": None, "dialect": "events"}, *settings)
        self.needs_first_token = self.timeouts.first_token is not None
        self.decoder = SSEDecoder(last_event_id=last_event_id, limits=self.limits)
        self._retry = retry
        self._failures = 0  # in a row, for the waits
        self._barren = 0  # requests in a row without an event
        self._unfit: float | None = None  # a wait for which there is no time
        self._settled = 0  # events that are handed out
        #: The event that was handed out last, and the last one that came.
        self._handed = self._newest = ServerSentEvent("", "", last_event_id)

    @property
    def last_event_id(self) -> str:
        """The last event ID as of the event that was handed out last."""
        if self._handed is self._newest:  # an ID may come behind it, without an event
            return self.decoder.last_event_id
        return self._handed.id

    def next_request(self) -> _Request:
        self._barren += 1
        value = _sent_event_id(self.decoder.last_event_id)
        if not value:
            return self.request
        headers = {**self.request.headers, "Last-Event-ID": value}
        return self.request._replace(headers=headers)

    def open_body(
        self, exchange: Any
    ) -> Callable[[bytes], list[ServerSentEvent]] | None:
        if exchange.status == 204:
            return None
        exchange.check_status()
        kind = exchange.headers.get("Content-Type", "text/event-stream")
        kind = kind.partition(";")[0]
        if kind.strip().lower() != "text/event-stream":
            raise MalformedStreamError(
                f"the server sent {_clipped(kind, 80)!r}, not text/event-stream"
            )
        return self._feed

    def _feed(self, chunk: bytes) -> list[ServerSentEvent]:
        if not chunk:
            self.decoder.close()
            return []
        events = self.decoder.feed(chunk)
        if events:
            self._newest = events[-1]
            self.log.events += len(events)
            self._failures = self._barren = 0
            self.deadlines.has_begun = True
        return events

    def items_of(self, batch: list[ServerSentEvent]) -> Iterator[ServerSentEvent]:
        for event in super().items_of(batch):
            self._handed = event
            yield event

    def tell_item(self, item: ServerSentEvent) -> None:
        self.log.note_event(item)

    def settle(self, now: float) -> bool:
        if self.log.events != self._settled:
            self._settled = self.log.events
            self.deadlines.move(now, self.exchange.bytes)
        self.decoder._check()
        return True

    def end_response(self) -> list[ServerSentEvent]:
        """A clean end: the end of a POST, and a cause to reconnect for a GET."""
        reconnects = self.request.method == "GET" and self._retry is not None
        if reconnects and self.exchange.status != 204:
            raise IncompleteStreamError("the server ended the stream", retryable=True)
        return []

    def close_body(self) -> None:
        old = self.decoder
        self.decoder = SSEDecoder(last_event_id=old.last_event_id, limits=self.limits)
        self.decoder.reconnection_time = old.reconnection_time

    def decide(self, error: StreamingError) -> tuple[str, StreamingError]:
        self._failures += 1
        retry = self._retry
        if retry is None or not error.retryable or self._barren >= retry.attempts:
            return "raise", error
        try:
            _sent_event_id(self.decoder.last_event_id)
        except ValueError as problem:
            error.args = (f"{error}; it cannot go on from there: {problem}",)
            return "raise", error
        return "retry", error

    def wait_for(self, error: StreamingError, left: float) -> float:
        retry = cast(Retry, self._retry)
        asked: float | None = getattr(error, "retry_after", None)
        if asked is None:
            asked = self.decoder.reconnection_time
        drawn = draw_wait(retry, self._failures, random.random())
        if asked is None:
            wait = drawn
        elif asked > retry.retry_after_max:
            wait = _NEVER
        else:
            wait = asked if self._failures == 1 else max(drawn, asked)
        if wait < left:
            return wait
        self._unfit = asked or wait
        return _NEVER

    def prepare(self, action: str, drop: StreamingError) -> None:
        self.request = self.request._replace(action=action)

    def complete_error(self, error: StreamingError) -> None:
        log = self.log
        where = f"after {log.events} events and {_now() - log.started:.1f} s"
        advice = ""
        if self._unfit is not None:
            advice = f"; the next request would have to wait {self._unfit:.0f} s"
        error.args = (f"{error} ({where}, request {log.requests}){advice}",)


class EventStream(_Stream[ServerSentEvent]):
    """The events of an SSE endpoint: an iterator of :class:`ServerSentEvent`.

    Made by :func:`stream_events`; closes as :class:`ChatStream` does.
    """

    def __init__(self, feed: _Feed) -> None:
        super().__init__(feed, None)

    @property
    def last_event_id(self) -> str:
        """The last event ID of what ``next()`` has handed out: give it to a later
        :func:`stream_events` to go on behind that."""
        last: str = self._call.last_event_id
        return last

    @property
    def reconnection_time(self) -> float | None:
        """The server's reconnection time in seconds; None if it sent none."""
        seconds: float | None = self._call.decoder.reconnection_time
        return seconds


def _sent_event_id(event_id: str) -> str:
    """The ID as it is sent: in UTF-8, and without the blanks around it, which are no
    part of a header's value.

    :raises ValueError: it cannot be sent.
    """
    value = event_id.strip(" \t").encode("utf-8").decode("latin-1")
    if value[:1].isspace():  # requests takes it for an attempt to smuggle a header
        raise ValueError(f"the event ID {event_id!r} begins with a control character")
    return value


def stream_events(
    url: str,
    *,
    method: str = "GET",
    json: Any = None,
    headers: Mapping[str, str | None] | None = None,
    timeouts: Timeouts = _FEED_TIMEOUTS,
    retry: Retry | None = _RETRY,
    limits: Limits = _LIMITS,
    last_event_id: str = "",
    observe: Observer | Iterable[Observer] = (),
    session: requests.Session | None = None,
) -> EventStream:
    """Read any SSE endpoint, and reconnect when the connection is lost.

    It goes on where it was by ``Last-Event-ID``, after the server's reconnection
    time.  It stops on status 204, and on a clean end of a POST or where ``retry`` is
    None.  It never reconnects after :meth:`EventStream.close`, a status that no wait
    mends, or a wrong content type; nor from an event whose ID begins with a control
    character other than a tab, which cannot be sent: the loss of the connection is
    raised then.

    :param url: the endpoint.
    :param method: ``GET`` (default, as EventSource does) or ``POST``.
    :param json: the body of a POST, as an object.
    :param headers: more headers, such as ``Authorization``.
    :param timeouts: a quiet feed is healthy, so there is no ``first_token`` and no
        ``idle`` by default; ``read`` wants a ping within 120 s.
    :param retry: ``attempts`` bounds the requests in a row that bring no event; None
        never reconnects.
    :param limits: ``line`` and ``event`` bound what is held.
    :param last_event_id: sent as ``Last-Event-ID`` with the first request; "" (default)
        begins with what comes.
    :param observe: an :class:`Observer`, or several.
    :param session: a :class:`requests.Session` to send with.
    :returns: an :class:`EventStream`; nothing is sent before the first ``next()``.
    :raises TypeError: an argument has the wrong type.
    :raises ValueError: an argument has no usable value, or a GET has a body.
    :raises StreamingError: (from the loop) the stream is lost for good.
    """
    url, headers = _veiled(url), _veiled(headers)
    _check_types(url=url, headers=headers, last_event_id=last_event_id)
    _check_types(timeouts=timeouts, retry=retry, limits=limits, session=session)
    if any(character in last_event_id for character in "\0\r\n"):
        why = "has a line break or NUL in it"
        raise ValueError(f"last_event_id={last_event_id!r}: {why}")
    _sent_event_id(last_event_id)  # or else it cannot be sent
    if method not in ("GET", "POST"):
        raise ValueError(f"method={method!r}: needs 'GET' or 'POST'")
    if json is not None and method == "GET":
        raise ValueError("json=...: a GET has no body; use method='POST'")
    content = None if json is None else jsonlib.dumps(_snapshot(json, "json"))
    data = None if content is None else content.encode("ascii")
    sent = CaseInsensitiveDict(_HEADERS)
    sent["Accept"] = "text/event-stream"
    if data is not None:
        sent["Content-Type"] = "application/json"
    _merge_headers(sent, _checked_headers(headers))
    address = _checked_url("url", url)
    secrets = _secrets_in(address, sent)
    request = _Request(method, address, dict(sent), data, "start", secrets)
    settings = (_opener(session), timeouts, limits, _known_observers(observe))
    return EventStream(_Feed(request, retry, last_event_id, *settings))


# ===========================================================================
# ================== optional: may be cut off here ==========================
# ===========================================================================
# Below: built on observers and public names alone.  Who copies the file may cut it
# here, and loses nothing else.  A test does.

__all__ += ["StreamMonitor", "StreamTrace", "main"]

if TYPE_CHECKING:
    import argparse
    from typing import IO


# ---------------------------------------------------------------------------
# 13. Health monitor: records of many streams -> one report
# ---------------------------------------------------------------------------
# Promises exact counts, quantiles within 5 %, and a memory that grows with the
# streams that are active now and with nothing else.  One lock guards all figures: a
# delta holds it for about a microsecond, a report for less than one millisecond.
# Refuses to keep what was said: no prompt, key, body or text comes in here.

_MONITOR_ROWS = 50  # of active streams and of ended ones, in the table
_MONITOR_KINDS = 50  # distinct errors counted apart; the rest count as "other"
_COMMON_ERRORS = 10
_SLOT_SECONDS = 5.0  # of the series, which covers five minutes
_SLOTS = 60
_COUNTS = {  # each with its help for Prometheus
    "started": "Streams begun.",
    "completed": "",
    "failed": "",
    "closed": "",
    "retries": "Retries and resumes scheduled.",
    "tokens": "Deltas received.",
    "bytes": "Bytes of bodies received.",
}
_MEANS = {  # each with its name and its help for Prometheus
    "first_token_seconds": ("first_token_seconds", "Time from start to first delta."),
    "seconds": ("stream_seconds", "Duration of ended streams."),
    "gap_seconds": ("delta_gap_seconds", "Time between two deltas."),
}
_PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
#: Upper ends of Prometheus' buckets, as places of _LogHistogram.
_EDGES = range(-3 * 24, 3 * 24 + 1, 8)  # a millisecond to 1000 s, three a decade


class _LogHistogram:
    """Counts of positive numbers in buckets a 24th of a decade wide.

    At most 360 buckets whatever is added. A quantile is the geometric middle of its
    bucket, so it is at most 5 % off (``10 ** (1 / 48)``); count, sum, least and
    greatest are exact. What is below a millionth counts as zero.
    """

    PER_DECADE = 24
    LOWEST, HIGHEST = -6 * PER_DECADE, 9 * PER_DECADE

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.greatest = 0.0
        self.buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        if 1e-6 < value < 1e9:
            # Rounded up: a bucket holds its upper end, as Prometheus' "le" does.
            place = math.ceil(math.log10(value) * self.PER_DECADE)
        else:
            place = self.LOWEST if value < 1 else self.HIGHEST
        try:
            self.buckets[place] += 1
        except KeyError:
            self.buckets[place] = 1
        self.count += 1
        self.total += value
        if not self.least <= value <= self.greatest:  # rarely
            self.least = min(self.least, value)
            self.greatest = max(self.greatest, value)

    def mean(self) -> float | None:
        return _ratio(self.total, self.count)

    def up_to(self, place: int) -> int:
        """How many values were at most ``10 ** (place / 24)``."""
        return sum(n for bucket, n in self.buckets.items() if bucket <= place)

    def quantile(self, share: float) -> float | None:
        if not self.count:
            return None
        seen = 0
        for place in sorted(self.buckets):
            seen += self.buckets[place]
            if seen >= share * self.count:
                break
        middle = 10 ** ((place - 0.5) / self.PER_DECADE)
        if place == self.LOWEST:
            middle = 0.0
        return _rounded(min(max(middle, self.least), self.greatest))

    def percentiles(self) -> dict[str, float | None]:
        return {name: self.quantile(share) for name, share in _PERCENTILES}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _figure(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.4g}{unit}"


class _StreamFigures:
    """What one stream has done so far, by its records: for the monitor and the trace.

    :param start: its first record.
    :param began: when that was, by the clock of whoever asks for it later.
    """

    def __init__(self, start: StreamRecord, began: float = 0.0) -> None:
        self.stream = start.stream
        self.model = start.data.get("model")
        self.dialect = start.data.get("dialect")
        self.began = began
        self.seconds = 0.0
        self.state = "active"
        self.failure: str | None = None
        self.bytes = self.chunks = self.deltas = self.retries = 0
        self.first_byte: float | None = None
        self.first_token: float | None = None
        self.delta_at: float | None = None  # the last one of the present request

    def chunk(self, record: StreamRecord) -> None:
        self.chunks += 1
        self.bytes += len(record.data)
        if self.first_byte is None:
            self.first_byte = record.seconds

    def delta(self, record: StreamRecord) -> float | None:
        """Count a delta; the wait since the one before, if one request brought both."""
        seconds = record.seconds
        self.deltas += 1
        if self.first_token is None:
            self.first_token = seconds
        before, self.delta_at = self.delta_at, seconds
        return None if before is None else seconds - before

    def retry(self, record: StreamRecord) -> None:
        self.retries += 1
        self.delta_at = None  # the wait is no gap between deltas

    def row(self, now: float) -> dict[str, Any]:
        """Its line in the monitor's table."""
        seconds = self.seconds
        if self.state == "active":
            seconds = max(now - self.began, 0.0)
        return {
            "stream": self.stream,
            "model": _clipped(self.model or "", 80),
            "dialect": _clipped(self.dialect or "", 40),
            "state": self.state,
            "seconds": _rounded(seconds),
            "first_token_seconds": _rounded(self.first_token),
            "tokens": self.deltas,
            "bytes": self.bytes,
            "retries": self.retries,
            "error": self.failure,
        }


class StreamMonitor(Observer):
    """Health of many streams: give one monitor to all of them as ``observe=``.

    Counts are exact. A quantile is within 5 % of a true one and covers the monitor's
    life; ``series`` in the report covers the last five minutes. May be shared by any
    number of threads (a forked child should make its own). Streams whose start it
    did not see are not counted.

    :param on_change: called with :meth:`report`'s dict when a stream starts, retries
        or ends, on that stream's thread and outside the lock; None, the default,
        calls nobody. An exception in it reaches the caller of the stream.
    """

    _clock = staticmethod(time.monotonic)

    def __init__(
        self, on_change: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        from collections import deque

        super().__init__()
        self._on_change = on_change
        # Reentrant: a garbage collection inside the lock may close a forgotten
        # stream, whose end is then reported on this very thread.
        self._lock = threading.RLock()
        self._live: dict[int, _StreamFigures] = {}
        self._ended: deque[_StreamFigures] = deque(maxlen=_MONITOR_ROWS)
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._means = {name: _LogHistogram() for name in _MEANS}
        self._sizes = _LogHistogram()  # of ended streams
        self._errors: dict[str, int] = {}
        self._retried: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._began = self._clock()
        # The number of each slot in which anything happened, and the totals that it
        # began with: what happened in it is what they have grown by since.
        self._slots: deque[tuple[float, dict[str, float]]] = deque(maxlen=_SLOTS)
        self._slot_end = 0.0

    def on_start(self, record: StreamRecord) -> None:
        with self._lock:
            began = self._turn() - record.seconds
            self._live[record.stream] = _StreamFigures(record, began)
            self._counts["started"] += 1
        self._changed()

    def on_chunk(self, record: StreamRecord) -> None:
        with self._lock:
            self._turn()
            stream = self._live.get(record.stream)
            if stream is not None:
                stream.chunk(record)
                self._counts["bytes"] += len(record.data)

    def on_token(self, record: StreamRecord) -> None:
        with self._lock:
            if self._clock() >= self._slot_end:  # a call less for each delta
                self._turn()
            stream = self._live.get(record.stream)
            if stream is None:
                return
            self._counts["tokens"] += 1
            wait = stream.delta(record)
            if wait is not None:
                self._means["gap_seconds"].add(wait)
            elif stream.deltas == 1:
                self._means["first_token_seconds"].add(record.seconds)

    def on_retry(self, record: StreamRecord) -> None:
        with self._lock:
            self._turn()
            stream = self._live.get(record.stream)
            if stream is None:
                return
            stream.retry(record)
            self._counts["retries"] += 1
            self._blame(self._retried, record.data["error"])
        self._changed()

    def on_complete(self, record: StreamRecord) -> None:
        self._end(record, "completed")

    def on_error(self, record: StreamRecord) -> None:
        closed = isinstance(record.data, StreamAbortedError)
        self._end(record, "closed" if closed else "failed")

    def _end(self, record: StreamRecord, state: str) -> None:
        with self._lock:
            self._turn()
            stream = self._live.pop(record.stream, None)
            if stream is None:
                return
            stream.state, stream.seconds = state, record.seconds
            if state == "failed":
                kind = _error_kind(record.data)
                stream.failure = _clipped(f"{kind}: {record.why}", 300)
                self._blame(self._errors, record.data)
            self._counts[state] += 1
            self._means["seconds"].add(record.seconds)
            self._sizes.add(stream.bytes)
            self._ended.append(stream)
        self._changed()

    def _blame(self, types: dict[str, int], error: StreamingError) -> None:
        for counts, name in (
            (types, type(error).__name__),
            (self._kinds, _error_kind(error)),
        ):
            if name not in counts and len(counts) >= _MONITOR_KINDS:
                name = "other"
            counts[name] = counts.get(name, 0) + 1

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self.report())

    def _turn(self) -> float:
        """The time; if a slot of the series begins, note the totals it begins with.

        Called before a figure changes, or the change would count for the slot before.
        """
        now = self._clock()
        if now >= self._slot_end:
            number = now // _SLOT_SECONDS
            self._slot_end = (number + 1) * _SLOT_SECONDS
            self._slots.append((number, self._totals()))
        return now

    def _totals(self) -> dict[str, float]:
        """All figures of the series since the monitor began."""
        totals: dict[str, float] = dict(self._counts)
        for name, histogram in self._means.items():
            totals[name], totals[name + "#"] = histogram.total, histogram.count
        return totals

    def _series(self, now: float) -> list[dict[str, Any]]:
        begins, end, rows = dict(self._slots), self._totals(), []
        last = int(now // _SLOT_SECONDS)
        for number in range(last, last - _SLOTS, -1):
            begin = begins.get(number, end)  # nothing happened, nothing was noted
            grown = {name: end[name] - begin[name] for name in end}
            ended = end["completed"] + end["failed"] + end["closed"]
            row: dict[str, Any] = {"ago": _rounded(now - number * _SLOT_SECONDS)}
            row["active"] = end["started"] - ended
            row.update((name, grown[name]) for name in _COUNTS)
            for name in _MEANS:
                row[name] = _ratio(grown[name], grown[name + "#"])
            rows.append(row)
            end = begin
        return rows[::-1]

    def report(self) -> dict[str, Any]:
        """Everything as a plain dict that JSON can hold; times in seconds.

        :returns: these keys:

        - ``active started completed failed closed retries tokens bytes``: counts.
          ``tokens`` are deltas; ``closed`` were left early by their caller and count
          neither as success nor as failure.
        - ``success_rate``: completed of completed and failed; None before the first.
        - ``average_retries`` per started stream, ``average_seconds`` and
          ``average_bytes`` per ended one; None before the first.
        - ``errors_by_type`` (ended a stream), ``retries_by_type`` (were retried):
          counts by class name. ``common_errors``: list of ``{"error", "count"}`` of
          both, the most frequent first, ten at most.
        - ``seconds first_token_seconds gaps`` (between two deltas of one request):
          dicts of ``p50 p90 p99``; None where nothing was seen.
        - ``tokens_per_second bytes_per_second``: over the last ten to fifteen seconds.
        - ``streams``: the newest streams first, up to 50 active and 50 ended ones.
        - ``series``: 60 slots of ``series_step_seconds`` with counts and means, the
          oldest first; ``ago`` says how long ago a slot began.
        """
        with self._lock:
            now, counts, means = self._clock(), self._counts, self._means
            live = list(self._live.values())
            shown = live[-_MONITOR_ROWS:] + list(self._ended)
            shown.sort(key=lambda stream: stream.stream, reverse=True)
            common = sorted(self._kinds.items(), key=lambda item: -item[1])
            series = self._series(now)
            recent = series[-3:]
            seconds = max(min(recent[0]["ago"], now - self._began), 1.0)
            return {
                **counts,
                "active": len(live),
                "success_rate": _ratio(
                    counts["completed"], counts["completed"] + counts["failed"]
                ),
                "average_retries": _ratio(counts["retries"], counts["started"]),
                "average_seconds": means["seconds"].mean(),
                "average_bytes": self._sizes.mean(),
                "errors_by_type": dict(self._errors),
                "retries_by_type": dict(self._retried),
                "common_errors": [
                    {"error": kind, "count": n} for kind, n in common[:_COMMON_ERRORS]
                ],
                "seconds": means["seconds"].percentiles(),
                "first_token_seconds": means["first_token_seconds"].percentiles(),
                "gaps": means["gap_seconds"].percentiles(),
                **{
                    f"{name}_per_second": _ratio(sum(r[name] for r in recent), seconds)
                    for name in ("tokens", "bytes")
                },
                "streams": [stream.row(now) for stream in shown],
                "series_step_seconds": _SLOT_SECONDS,
                "series": series,
            }

    def prometheus(self) -> str:
        """The counts as Prometheus text (version 0.0.4), to be served as it is.

        :returns: counters, one gauge and three histograms, named
            ``resilient_sse_...``; labels are ``outcome`` and ``type``.
        """
        lines: list[str] = []

        def family(
            name: str, kind: str, text: str, samples: Mapping[str, float]
        ) -> None:
            name = "resilient_sse_" + name
            lines.append(f"# HELP {name} {text}")
            lines.append(f"# TYPE {name} {kind}")
            lines.extend(f"{name}{key} {value!r}" for key, value in samples.items())

        with self._lock:
            counts = self._counts
            ended = {name: counts[name] for name in ("completed", "failed", "closed")}
            active = {"": len(self._live)}
            family("active_streams", "gauge", "Streams now open.", active)
            for name in ("started", "retries", "tokens", "bytes"):
                family(name + "_total", "counter", _COUNTS[name], {"": counts[name]})
            for name, label, text, values in (
                ("ended", "outcome", "Streams ended.", ended),
                ("errors", "type", "Errors that ended a stream.", self._errors),
                ("retried_errors", "type", "Errors that were retried.", self._retried),
            ):
                # JSON escapes what the format does: quote, backslash, line feed.
                labels = (jsonlib.dumps(v, ensure_ascii=False) for v in values)
                samples = zip((f"{{{label}={v}}}" for v in labels), values.values())
                family(name + "_total", "counter", text, dict(samples))
            for key, (name, text) in _MEANS.items():
                histogram = self._means[key]
                buckets: dict[str, float] = {
                    f'_bucket{{le="{10 ** (place / 24):.6g}"}}': histogram.up_to(place)
                    for place in _EDGES
                }
                buckets['_bucket{le="+Inf"}'] = histogram.count
                buckets["_sum"], buckets["_count"] = histogram.total, histogram.count
                family(name, "histogram", text, buckets)
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        report = self.report()
        lines = [f"{label:>12}  {value}" for label, value in _shown_figures(report)]
        for common in report["common_errors"]:
            lines.append(f"{'error':>12}  {common['count']} x {common['error']}")
        return _CONTROL.sub("\ufffd", "\n".join(lines))

    def _repr_html_(self) -> str:
        import html

        def row(tag: str, cells: Iterable[object]) -> str:
            texts = ("-" if cell is None else html.escape(str(cell)) for cell in cells)
            marked = "".join(f"<{tag}>{text}</{tag}>" for text in texts)
            return f"<tr>{marked}</tr>"

        report = self.report()
        tables = ["".join(row("td", figure) for figure in _shown_figures(report))]
        errors = [row("td", (e["count"], e["error"])) for e in report["common_errors"]]
        if errors:
            tables.append(row("th", ("count", "error")) + "".join(errors))
        streams = report["streams"]
        names = streams[0] if streams else ("stream", "state")
        lines = [row("td", stream.values()) for stream in streams]
        tables.append(row("th", names) + "".join(lines))
        return "".join(f"<table>{table}</table>" for table in tables)


def _error_kind(error: BaseException) -> str:
    """Type and codes of an error, but not its message, which rarely repeats."""
    code = getattr(error, "code", None) or getattr(error, "type", None)
    facts = [getattr(error, name, None) for name in ("status", "kind", "limit")]
    words = [type(error).__name__] + [str(fact) for fact in facts if fact]
    if code and str(code) not in words:
        words.append(_one_line(str(code)))
    phase = getattr(error, "phase", "")
    return _clipped(" ".join(words) + (f" ({phase})" if phase else ""), 120)


def _shown_figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of a report, for people."""
    rate = report["success_rate"]
    names = ("active", "started", "completed", "failed", "closed", "retries")
    figures = [(name, str(report[name])) for name in names]
    figures.append(("success rate", "-" if rate is None else f"{rate:.1%}"))
    for label, name in (("deltas", "tokens"), ("bytes", "bytes")):
        figures.append((label, f"{report[name]} ({report[name + '_per_second']:g}/s)"))
    for label, name in (
        ("duration", "seconds"),
        ("first token", "first_token_seconds"),
        ("gap", "gaps"),
    ):
        marks = [f"{mark} {_figure(v, ' s')}" for mark, v in report[name].items()]
        figures.append((label, ", ".join(marks)))
    return figures


# ---------------------------------------------------------------------------
# 14. Stream trace: one stream -> a report that can be pasted into an issue
# ---------------------------------------------------------------------------
# Promises when what happened: requests, headers, first byte, gaps, pings, errors,
# waits, seams, end; and how the body came in. Memory is bounded: of a long stream
# the first and the last part are kept, and the report says what is missing.
# Refuses to hold text in report() and save(): sizes only, secrets masked by header
# name. save_raw() alone writes the body itself, and needs that to be replayed.

#: The records hold no secret of ours, but a report is for the public: a server may
#: quote somebody else's key, that of its own upstream, say.
_KEY_LIKE = re.compile(r"(?i)\b(?:bearer\s+|sk-|xox[a-z]-|AIza|hf_|gsk_)[^\s\"',;]{6,}")
_WHY_WIDTH = 300
_HEADER_WIDTH = 120
_BAR_WIDTH = 40
_SHOWN_FACTS = {  # in the report; the why of an entry tells the other ones
    "start": ("model", "dialect"),
    "request": ("url", "body_bytes"),
    "ping": ("form", "count", "until"),
    "retry": ("wait", "error", "phase", "kept_characters"),
    "restart": ("void_characters",),
    "error": ("error", "phase", "kept_characters"),
    "complete": ("finish_reason", "seams"),
}


class _TraceEntry(NamedTuple):
    """One line of a timeline; ``facts`` holds sizes and names, never text."""

    number: int
    seconds: float
    attempt: int
    what: str
    why: str
    facts: dict[str, Any]


class _Ring:
    """Keeps the first and the last entries added, and counts those between."""

    def __init__(self, first: int, last: int) -> None:
        from collections import deque

        self._size = first
        self._first: list[_TraceEntry] = []
        self._last: deque[_TraceEntry] = deque(maxlen=last)
        self._left_out = 0

    def add(self, entry: _TraceEntry) -> None:
        if len(self._first) < self._size:
            self._first.append(entry)
            return
        self._left_out += len(self._last) == self._last.maxlen
        self._last.append(entry)

    def entries(self) -> list[_TraceEntry]:
        """The kept ones in order, with an entry that says so where some are missing."""
        middle = []
        if self._left_out and self._first:
            why = f"{self._left_out} entries left out here"
            middle = [self._first[-1]._replace(what="left out", why=why, facts={})]
        return self._first + middle + list(self._last)


class _TraceLog(_StreamFigures):
    """What a trace has noted of one stream; the trace holds its lock around it.

    Its size is bounded, however long the stream.  A record goes to the method that is
    named as what it tells of.
    """

    def __init__(
        self, start: StreamRecord, first: int, last: int, gap: float, raw_limit: int
    ) -> None:
        super().__init__(start)
        self.url = _bare_url(str(start.data.get("url") or ""))
        self.gap = gap
        self.raw_limit = raw_limit
        self.timeline = _Ring(first, last)
        self.details = _Ring(first, last)
        self.end = "running"
        self.requests = self.events = self.pings = 0
        self.kinds: dict[str, int] = {}  # of deltas
        self.characters: dict[str, int] = {}
        self.usage: tuple[int | None, int | None] = (None, None)
        self.waits = _LogHistogram()
        self.sizes = _LogHistogram()
        self.raw = bytearray()
        self.raw_bytes = 0
        self._raw_is_stale = False
        self._number = 0
        self._handed = 0  # characters of text that still stand
        self._request_at = self._read_at = 0.0
        self._has_body = False  # the present request's response
        self._at_line_start = True
        self._gap_was_noted = False  # of the present silence
        self._ping: dict[str, Any] | None = None  # facts of the last entry, if a ping's

    def see(self, record: StreamRecord) -> None:
        self.seconds = max(self.seconds, record.seconds)
        getattr(self, record.what)(record)

    def _note(self, record: StreamRecord, what: str, why: str, **facts: Any) -> None:
        """A line of the timeline."""
        self._ping = facts if what == "ping" else None
        self.timeline.add(self._entry(record, what, _harmless(why), facts))

    def _detail(self, record: StreamRecord, **facts: Any) -> None:
        """What save() alone writes: there may be one for each read and delta."""
        self.details.add(self._entry(record, record.what, "", facts))

    def _entry(
        self, record: StreamRecord, what: str, why: str, facts: dict[str, Any]
    ) -> _TraceEntry:
        self._number += 1
        place = (self._number, record.seconds, record.attempt)
        return _TraceEntry(*place, what, why, facts)

    def start(self, record: StreamRecord) -> None:
        about = {"model": self.model, "dialect": self.dialect, "url": self.url}
        self._note(record, "start", record.why, **about)

    def request(self, record: StreamRecord) -> None:
        self.requests += 1
        self._request_at = self._read_at = record.seconds
        self._has_body, self._at_line_start, self.delta_at = False, True, None
        data = record.data
        facts = {name: data.get(name) for name in ("method", "action", "body_bytes")}
        facts["url"] = _bare_url(str(data.get("url") or ""))
        facts["headers"] = _short_headers(data.get("headers") or {})
        self._note(record, "request", record.why, **facts)

    def response(self, record: StreamRecord) -> None:
        status = record.data.get("status")
        self._read_at = record.seconds
        # A new body: the one before ends in a drop, and a decoder that read both as
        # one would see the same text twice or a broken event.
        self._raw_is_stale = self._raw_is_stale or status is None or status < 400
        headers = _short_headers(record.data.get("headers") or {})
        self._note(record, "response", record.why, status=status, headers=headers)

    def chunk(self, record: StreamRecord) -> None:
        super().chunk(record)
        data, wait = record.data, record.seconds - self._read_at
        self._read_at = record.seconds
        self.sizes.add(len(data))
        self.waits.add(wait)
        if self._raw_is_stale:
            self.raw, self.raw_bytes, self._raw_is_stale = bytearray(), 0, False
        self.raw_bytes += len(data)
        if self.raw_bytes <= self.raw_limit:
            self.raw += data
        else:
            self.raw = bytearray()  # never written, so not worth its memory
        facts = {"bytes": len(data), "wait": _rounded(wait)}
        self._detail(record, **facts)
        if not self._has_body:
            self._has_body = True
            why = f"{len(data)} bytes, {wait:.3f} s after the headers"
            self._note(record, "first byte", why, **facts)
        elif wait >= self.gap:
            self._gap_was_noted = True
            why = f"{wait:.3f} s without a byte"
            self._note(record, "gap", why, wait=_rounded(wait))
        comments = data.count(b"\n:") + (self._at_line_start and data[:1] == b":")
        self._at_line_start = data.endswith((b"\n", b"\r"))
        if comments:
            self._count_pings(record, comments, "comment")

    def _count_pings(self, record: StreamRecord, count: int, form: str) -> None:
        """Those in a row make one entry, which goes on counting where it stands."""
        self.pings += count
        if self._ping is None:
            self._note(record, "ping", "", form=form, count=0, until=0.0)
        ping = cast("dict[str, Any]", self._ping)
        ping["count"] += count
        ping["until"] = _rounded(record.seconds)

    def event(self, record: StreamRecord) -> None:
        event = record.data
        self.events += 1
        size = len(event.data)
        self._detail(record, event=_clipped(event.event, 60), characters=size)
        if event.event == "ping":
            self._count_pings(record, 1, "event")

    def token(self, record: StreamRecord) -> None:
        kind, text, index, _ = record.data
        size = len(text)
        self._detail(record, kind=kind, index=index, characters=size)
        wait, seam = self.delta(record), self._handed
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.characters[kind] = self.characters.get(kind, 0) + size
        if kind == "text" and index == 0:
            self._handed += size
        if wait is None and seam:
            self._note(record, "seam", f"goes on after character {seam}", offset=seam)
        elif wait is None:
            since = record.seconds - self._request_at
            why = f"{kind}, {since:.3f} s after the request"
            self._note(record, "first delta", why, kind=kind, wait=_rounded(since))
        elif wait >= self.gap and not self._gap_was_noted:
            why = f"{wait:.3f} s without a delta, though bytes came"
            self._note(record, "gap", why, wait=_rounded(wait))
        self._gap_was_noted = False

    def retry(self, record: StreamRecord) -> None:
        super().retry(record)
        facts = self._error_facts(record.data["error"])
        wait, action = _rounded(record.data["wait"]), record.data["action"]
        self._note(record, "retry", record.why, wait=wait, action=action, **facts)

    def restart(self, record: StreamRecord) -> None:
        self._note(record, "restart", record.why, void_characters=self._handed)
        self._handed = 0

    def error(self, record: StreamRecord) -> None:
        self.end = f"{type(record.data).__name__}: {record.why}"
        self._note(record, "error", record.why, **self._error_facts(record.data))

    def _error_facts(self, error: StreamingError) -> dict[str, Any]:
        return {**_error_facts(error), "kept_characters": self._handed}

    def complete(self, record: StreamRecord) -> None:
        reason = getattr(record.data, "finish_reason", None)
        seams = list(getattr(record.data, "seams", None) or ())
        usage = getattr(record.data, "usage", None)
        if usage is not None:
            self.usage = (usage.input_tokens, usage.output_tokens)
        self.end = f"complete ({reason})" if reason else "complete"
        self._note(record, "complete", record.why, finish_reason=reason, seams=seams)


class StreamTrace(Observer):
    """Debugger of one stream: give a new one as ``observe=``, then print its report.

    Given to several streams it follows the one that started last and forgets the one
    before. May be read from any thread, also while the stream runs.

    :param first: entries kept from the stream's beginning, once for the timeline and
        once for the chunks, events and deltas that :meth:`save` writes; 200 show how
        a stream came up.
    :param last: entries kept from its end, likewise; 800 show what led to the end.
    :param gap: seconds of silence from which on the timeline names a gap; 1.0 is
        what a reader notices.
    :param raw_limit: bytes of one body kept for :meth:`save_raw`; 8 MiB hold any
        usual answer.
    :raises ValueError: if a number is negative.
    """

    def __init__(
        self,
        *,
        first: int = 200,
        last: int = 800,
        gap: float = 1.0,
        raw_limit: int = 8 * 1024 * 1024,
    ) -> None:
        super().__init__()
        if min(first, last, gap, raw_limit) < 0:
            raise ValueError("first, last, gap and raw_limit must not be negative")
        # Reentrant for the reason given in StreamMonitor.
        self._lock = threading.RLock()
        self._sizes = (first, last, gap, raw_limit)
        nothing = StreamRecord("start", -1, 0.0, 0, "", {})
        self._log = _TraceLog(nothing, *self._sizes)

    def on_start(self, record: StreamRecord) -> None:
        with self._lock:
            self._log = _TraceLog(record, *self._sizes)
            self._log.start(record)

    def _see(self, record: StreamRecord) -> None:
        with self._lock:
            if record.stream == self._log.stream:
                self._log.see(record)

    on_request = on_response = on_chunk = on_event = on_token = _see
    on_retry = on_restart = on_error = on_complete = _see

    def summary(self) -> dict[str, Any]:
        """The figures of the stream.

        :returns: a plain dict that JSON can hold: sizes in bytes and characters, times
            in seconds; percentiles within 5 %.
        """
        import platform

        versions = (
            f"resilient_sse {__version__}",
            f"Python {platform.python_version()}",
            f"requests {vars(requests)['__version__']}",  # not exported, say its types
            f"urllib3 {sys.modules['urllib3'].__version__}",
            platform.system(),
        )
        with self._lock:
            log = self._log
            return {
                "model": log.model,
                "dialect": log.dialect,
                "url": log.url,
                "end": _harmless(log.end),
                "seconds": _rounded(log.seconds),
                "first_byte_seconds": _rounded(log.first_byte),
                "first_token_seconds": _rounded(log.first_token),
                "requests": log.requests,
                "retries": log.retries,
                "bytes": log.bytes,
                "chunks": log.chunks,
                "events": log.events,
                "pings": log.pings,
                "deltas": dict(log.kinds),
                "characters": dict(log.characters),
                "input_tokens": log.usage[0],
                "output_tokens": log.usage[1],
                "chunk_bytes": _spread(log.sizes),
                "chunk_waits": _spread(log.waits),
                "software": ", ".join(versions),
            }

    def report(self) -> str:
        """The trace, to be read and to be pasted.

        :returns: summary, timeline (its first and last entries) and chunk analysis.
        """
        with self._lock:
            facts, entries = self.summary(), self._log.timeline.entries()
            bars = _bars(self._log.waits)
        lines = ["Summary"]
        for name, value in facts.items():
            if name.startswith("chunk_") or value in (None, "", {}):
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {count}" for key, count in value.items())
            label = name.replace("_", " ").replace(" seconds", "")
            unit = " s" if name.endswith("seconds") else ""
            lines.append(f"  {label:<14} {value}{unit}")
        lines += ["", "Timeline"]
        for entry in entries:
            shown = {k: entry.facts.get(k) for k in _SHOWN_FACTS.get(entry.what, ())}
            named = [f"{k}={v}" for k, v in shown.items() if v not in (None, "", [])]
            text = "; ".join(part for part in (entry.why, " ".join(named)) if part)
            place = f"  {entry.seconds:10.3f} s  #{entry.attempt}"
            lines.append(f"{place}  {entry.what:<11}  {text}".rstrip())
            headers = entry.facts.get("headers", {})
            lines += [f"{'':22}{name}: {value}" for name, value in headers.items()]
        lines += ["", "Chunks"]
        for label, marks, unit in (
            ("sizes", facts["chunk_bytes"], " B"),
            ("read times", facts["chunk_waits"], " s"),
        ):
            texts = (f"{name} {_figure(mark, unit)}" for name, mark in marks.items())
            lines.append(f"  {label:<11} " + ", ".join(texts))
        lines += ["", "Gaps between reads", *bars]
        return _CONTROL.sub("\ufffd", "\n".join(lines)) + "\n"

    def __str__(self) -> str:
        return self.report()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write summary, timeline, chunks, events and deltas as ASCII JSON lines.

        :param path: the file, which is replaced.
        :raises OSError: if it cannot be written.
        """
        with self._lock:
            lines = [{"what": "summary", **self.summary()}]
            entries = self._log.timeline.entries() + self._log.details.entries()
        for _, seconds, attempt, what, why, facts in sorted(
            entries, key=operator.itemgetter(0)
        ):
            place = {"seconds": _rounded(seconds), "attempt": attempt}
            lines.append({**place, "what": what, "why": why, **facts})
        with open(path, "w", encoding="ascii") as file:
            file.writelines(jsonlib.dumps(line, default=str) + "\n" for line in lines)

    def save_raw(self, path: str | os.PathLike[str]) -> None:
        """Write the body as it came in, for ``ChatStream.replay`` to read.

        It is the body of the last request that was answered with one; the bodies of
        the requests before it ended in a drop. It contains the answer's text.

        :param path: the file, which is replaced.
        :raises ValueError: if the body was longer than ``raw_limit``: a cut copy
            would replay as a drop that never happened. Nothing is written then.
        :raises OSError: if it cannot be written.
        """
        with self._lock:
            size, limit = self._log.raw_bytes, self._log.raw_limit
            # A copy: a bytearray that is being written out cannot grow meanwhile.
            raw = bytes(self._log.raw)
        if size > limit:
            raise ValueError(
                f"the body has {size} bytes, more than the {limit} kept; "
                f"trace it with StreamTrace(raw_limit={size})"
            )
        with open(path, "wb") as file:
            file.write(raw)


def _harmless(why: str) -> str:
    """One line without control characters and without what looks like a key."""
    return _clipped(_KEY_LIKE.sub("***", _one_line(why)), _WHY_WIDTH)


def _short_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    shown = _shown_headers(headers)
    return {name: _clipped(value, _HEADER_WIDTH) for name, value in shown.items()}


def _error_facts(error: BaseException) -> dict[str, Any]:
    names = ("status", "code", "kind", "limit", "phase", "retryable")
    facts = ((name, getattr(error, name, None)) for name in names)
    known = {name: fact for name, fact in facts if fact is not None}
    if isinstance(known.get("code"), str):
        known["code"] = _clipped(_one_line(known["code"]), 100)
    return {"error": type(error).__name__, **known}


def _spread(histogram: _LogHistogram) -> dict[str, float | None]:
    some = histogram.count > 0
    return {
        "min": _rounded(histogram.least) if some else None,
        "mean": histogram.mean(),
        **histogram.percentiles(),
        "max": _rounded(histogram.greatest) if some else None,
    }


def _bars(waits: _LogHistogram) -> list[str]:
    """The gaps between reads as bars, from the shortest to the longest seen."""
    ends = [10 ** (place / waits.PER_DECADE) for place in _EDGES]
    names = [f"to {end:.3g} s" for end in ends] + [f"over {ends[-1]:g} s"]
    sums = [0, *map(waits.up_to, _EDGES), waits.count]
    counts = [sums[n + 1] - sums[n] for n in range(len(names))]
    used = [n for n, count in enumerate(counts) if count]
    if not used:
        return []
    scale = _BAR_WIDTH / max(counts)
    return [
        f"  {names[n]:>12}  {counts[n]:>7}  {'#' * math.ceil(counts[n] * scale)}".rstrip()
        for n in range(used[0], used[-1] + 1)
    ]


# ---------------------------------------------------------------------------
# 15. Notebook display: a stream as live Markdown
# ---------------------------------------------------------------------------
# Promises at most twenty updates a second, and that what stands in the cell is
# what was received: also after an interrupt, an error, or starting over.
# Refuses to swallow anything: an error and an interrupt go on to the cell.


class _TextOut:
    """Standard output: UTF-8 whatever the locale, every piece flushed at once."""

    interval = 0.0  # seconds that it likes to have between two pieces

    def __init__(self) -> None:
        self._text = sys.stdout
        self._text.flush()
        self._bytes = getattr(sys.stdout, "buffer", None)
        self.terminal = self._text.isatty()
        self.mid_line = False

    def write(self, text: str) -> None:
        if not text:
            return
        if self.terminal:
            # A model's words must not move the cursor or retitle the window.
            text = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))
        self.mid_line = not text.endswith("\n")
        if self._bytes is None:
            self._text.write(text)
            self._text.flush()
        else:
            self._bytes.write(text.encode("utf-8", "backslashreplace"))
            self._bytes.flush()

    def end_line(self) -> None:
        if self.mid_line:
            self.write("\n")

    def start_over(self) -> None:
        self.end_line()
        self.write("[again from the start]\n")


class _MarkdownCell:
    """The same for one output of a notebook cell, replaced by each update."""

    interval = 0.05

    def __init__(self, module: Any) -> None:
        self._text = ""
        self._markdown = module.Markdown
        self._handle = module.display(self._markdown(""), display_id=True)

    def write(self, text: str) -> None:
        self._text += text
        self._handle.update(self._markdown(self._text))

    def start_over(self) -> None:
        self._text = ""


def _painter() -> _MarkdownCell | _TextOut:
    """A notebook's cell where there is one; a terminal cannot replace Markdown."""
    import importlib

    try:
        module = importlib.import_module("IPython.display")
    except ImportError:
        return _TextOut()
    shell = getattr(sys.modules["IPython"], "get_ipython", lambda: module)()
    if shell is None or type(shell).__name__ == "TerminalInteractiveShell":
        return _TextOut()
    return _MarkdownCell(module)


class _Live(Observer):
    """Paints the visible text as it comes, not more often than the painter likes."""

    def __init__(self, painter: _MarkdownCell | _TextOut, text: str) -> None:
        super().__init__()
        self._painter = painter
        self._new = [text] if text else []  # not painted yet; [""] empties the cell
        self._count = len(text)
        self._painted_at = -painter.interval

    def on_token(self, record: StreamRecord) -> None:
        delta = record.data
        if delta.kind == "text" and delta.index == 0:
            self._new.append(delta.text)
            self._count += len(delta.text)
            self._paint_if_due(record)

    def on_restart(self, record: StreamRecord) -> None:
        self._start_over("")
        self._paint_if_due(record)

    def _paint_if_due(self, record: StreamRecord) -> None:
        due = record.seconds - self._painted_at >= self._painter.interval
        if due and self._new:
            self._painted_at = record.seconds
            self._paint()

    on_chunk = _paint_if_due  # a ping, too, shows words that came too soon before it

    def _paint(self) -> None:
        new, self._new = self._new, []
        self._painter.write("".join(new))

    def _start_over(self, text: str) -> None:
        self._painter.start_over()
        self._new = [text]
        self._count = len(text)

    def finish(self, text: str) -> None:
        """Paint what is left; all of it if this observer came too late for a part."""
        if self._count < len(text):
            self._start_over(text)
        if self._new:
            self._paint()


def _show_live(stream: ChatStream) -> ChatResult:
    """Show the answer as it comes, as live Markdown in a notebook's cell.

    Outside a notebook the text is printed as it comes. The stream may start over
    after a drop, as in :func:`complete_chat`; what that replaces is taken back. An
    interrupt closes the connection and goes on; the text so far stays in the cell.

    :returns: the complete result.
    :raises StreamingError: as the loop over the stream would, after the text so far
        has been shown.
    """
    live = _Live(_painter(), stream.text)
    stream.observe(live)
    try:
        return stream.complete()
    finally:
        live.finish(stream.text)
        stream.close()


def _show_as_value(stream: ChatStream) -> None:
    """What a cell does whose last value is a stream: the same as ``show()``."""
    try:
        _show_live(stream)
    except StreamingError as error:
        # IPython prints what a display method raises and goes on: Run All must stop.
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        result = getattr(getattr(shell, "displayhook", None), "exec_result", None)
        if shell is None or result is None:
            raise
        result.error_in_exec = error
        shell.showtraceback()


# The class stands above the line and must not know of this section.
for _name, _method in (("show", _show_live), ("_ipython_display_", _show_as_value)):
    setattr(ChatStream, _name, _method)


# ---------------------------------------------------------------------------
# 16. Journal: what was received outlives the script
# ---------------------------------------------------------------------------
# Promises that what was handed out is on disk before: killed at any byte and run
# again, a script goes on where it was. An entry belongs to one request (its hash); of
# two streams that ask the same at once the later one takes the entry over.
# Refuses prompts, keys and the headers that hold one: an entry is a hash and what
# the provider sent. Nothing is ever deleted but what an answer makes void.

_JOURNAL_ID = 0x72535345  # application_id, by which a file of ours is known
_JOURNAL_VERSION = 2
_JOURNAL_TABLES = (
    "CREATE TABLE streams (request TEXT PRIMARY KEY, owner TEXT)",
    """CREATE TABLE records (
        number INTEGER PRIMARY KEY, request TEXT, kind TEXT, value BLOB, sum BLOB
    )""",
    "CREATE INDEX records_of_request ON records (request)",
    f"PRAGMA application_id = {_JOURNAL_ID}",
    f"PRAGMA user_version = {_JOURNAL_VERSION}",
)
_PORTION = 64  # records that are read at once
_LOCK_SECONDS = 10.0  # that others may keep the file locked before the stream begins
_STALL_SECONDS = 1.0  # that a delta may wait for the file
_POLL_SECONDS = 0.05  # after which a stream that waits for it sees that it is closed
#: Owner of an entry -> the process and the file.  SQLite's locks do not survive a
#: fork: a child must not open what its parent had open then.
_open_journals: dict[str, tuple[int, str]] = {}
# Closing a file ends all locks that the process has on it, SQLite's too: none of our
# threads may have a new one open before the thread that made it has closed it.
_creating = threading.Lock()
# The name of a parameter that holds a secret, without - and _.  The whole name: a secret
# that is missed is hashed, but what is taken out in error gives one deployment's text
# to another.
_SECRET_PARAMETER = (
    "(?:x|xgoog|xamz|ocpapim)?(?:api|access|auth|client|functions|security|subscription)?"
    "(?:key|token|secret)|(?:xamz)?(?:sig|signature|credential)"
    "|auth|authorization|password|passwd|code"
)


class _JournalEntry(Observer):
    """What one request brought: the bodies of its responses, as they came in.

    Each record has a sum over it and all before it, so that one that is lost, moved or
    damaged is found; a missing tail is what a killed process leaves, and no harm.

    :param path: the SQLite file.
    :param url: what is asked, with its query.
    """

    def __init__(
        self, path: str | os.PathLike[str], dialect: str, url: str, body: dict[str, Any]
    ) -> None:
        super().__init__()
        import hashlib

        asked = [dialect, _address_asked(url), body]
        canonical = jsonlib.dumps(asked, sort_keys=True).encode("ascii")
        self._path = os.path.realpath(os.fspath(path))
        self._request = hashlib.sha256(canonical).hexdigest()
        self._sum = self._request.encode()  # of the last record
        self._owner = ""
        self._process = 0
        self._database: Any = None
        self._may_wait: Callable[[], bool] = bool
        self._status = 0  # of the last response
        #: Whether the entry holds a whole answer; known once it is open.
        self.is_whole = False

    # -- what the loop calls

    def open(self, may_wait: Callable[[], bool]) -> None:
        """Make the entry this stream's own.

        :param may_wait: whether the stream has time to wait for a lock.
        :raises OSError: it cannot be, or the file is no journal.
        """
        import sqlite3

        self._may_wait = may_wait
        self._process, self._owner = os.getpid(), os.urandom(8).hex()
        for process, path in list(_open_journals.values()):
            if path == self._path and process != self._process:
                raise self._refusal(
                    "this process was forked while a stream of its parent used the "
                    "file: use another file, or start it by 'spawn'"
                )
        _open_journals[self._owner] = self._process, self._path
        try:
            self._connect()
            self._claim()
            self._verify()
        except BaseException as error:
            self._close()
            # A ValueError: the text of SQLite's own message may be damaged, too.
            if isinstance(error, (sqlite3.Error, ValueError)):
                raise self._refusal(error) from error
            if isinstance(error, OSError) and error.errno is not None:  # no refusal
                raise self._refusal(f"could not open it: {error.strerror}") from error
            raise

    def records(self) -> Iterator[tuple[str, Any]]:
        """What the entry holds, in its order: ``(kind, value)``.

        ``request``: the action; ``response``: the headers; ``chunk``: bytes of the
        body, or b"" where it ended cleanly.

        :raises OSError: the file is damaged.
        """
        import sqlite3

        if self._database is None:
            return
        try:
            for kind, value, _ in self._rows():
                if kind == "complete":
                    yield "chunk", b""
                else:
                    yield kind, value if kind == "chunk" else jsonlib.loads(value)
        except (sqlite3.Error, ValueError) as error:
            self._close()
            raise self._refusal(error) from error

    def forget(self) -> None:
        """Delete what was received: the answer starts over."""
        self._sum = self._request.encode()
        self.is_whole = False
        self._write(
            "DELETE FROM records WHERE request IN (SELECT request FROM streams WHERE {})"
        )

    # -- how a chat goes on from it

    def recall(self, chat: _Chat) -> Iterator[list[Piece]]:
        """Hand out what an earlier run of the same request received.

        The chat is whole then, or its next request is made.  Nothing is handed out
        before it is known whether it can go on.
        """
        if not self._open_for(chat):
            return
        batches = self._relive(chat)
        if not self.is_whole:
            batches = iter([[piece for batch in batches for piece in batch]])
            answer = chat.answer
            # It came whole if that run was killed before it could note as much.
            came_whole = answer.ended or (answer.error is None and chat.has_finished)
            if not came_whole:
                yield from self._resume(chat, next(batches))
                return
        yield from batches
        answer = chat.answer
        if answer.error is not None or not (answer.ended or answer.finished):
            damage = MalformedStreamError("the answer in the journal is damaged")
            chat.fail(answer.error or damage)
        answer.settle()
        chat.is_whole = True
        yield answer.take()

    def _open_for(self, chat: _Chat) -> bool:
        """Open it; False if the reader closed the stream meanwhile."""

        def may_wait() -> bool:
            now = _now()
            return not chat.closers and now < chat.deadlines.read(now)[0]

        try:
            self.open(may_wait)
        except OSError:
            if chat.check_closed():
                return False
            now = _now()
            due, kind = chat.deadlines.read(now)
            if now < due:
                raise
            message = f"the {kind} timeout passed: others kept the journal locked"
            retryable = kind != "total"
            chat.fail(StreamTimeoutError(message, kind=kind, retryable=retryable))
        return True

    def _relive(self, chat: _Chat) -> Iterator[list[Piece]]:
        """Read again what was received; it brings the same pieces."""
        intake = None
        for kind, value in self.records():
            if chat.answer.error is not None and kind != "request":
                continue
            if kind == "request":
                try:
                    if value in _RESUMES:
                        chat.go_on(value, *chat.prompt.request(value, chat.answer))
                except IncompleteStreamError as error:  # resume= is another one now
                    chat.answer.fail(error)
                    return
                intake = chat.new_intake()
            elif kind == "response":
                chat.headers = CaseInsensitiveDict(value)
            elif intake is not None:
                yield intake.feed(value)

    def _resume(self, chat: _Chat, pieces: list[Piece]) -> Iterator[list[Piece]]:
        """Ask for the rest of the answer, if there is a way; or start over."""
        cut = chat.answer.error or StreamConnectionError(
            "the run that began this answer was cut off", phase="stream", retryable=True
        )
        action, _ = chat.decide(cut)
        request = None
        try:
            if action in _RESUMES:
                request, seam = chat.prompt.request(action, chat.answer)
        except IncompleteStreamError as error:
            logger.info("%s: it starts over", error)
        if request is None:
            self.forget()
            chat.request, _ = chat.prompt.request("start", chat.answer)
            chat.start_over()
            return
        yield pieces
        chat.go_on(action, request, seam)

    # -- what the stream tells it

    def on_request(self, record: StreamRecord) -> None:
        self._add("request", jsonlib.dumps(record.data["action"]).encode())

    def on_response(self, record: StreamRecord) -> None:
        self._status = record.data["status"]
        self._add("response", jsonlib.dumps(record.data["headers"]).encode())

    def on_chunk(self, record: StreamRecord) -> None:
        self._add("masked" if isinstance(record.data, _Stars) else "chunk", record.data)

    def on_retry(self, record: StreamRecord) -> None:
        if record.data["action"] in ("retry", "restart"):
            self.forget()
        elif type(record.data["error"]) is IncompleteStreamError:
            self._add("chunk", b"")

    def on_complete(self, record: StreamRecord) -> None:
        if not self.is_whole:
            self._add("complete", b"")
        self._close()

    def on_error(self, record: StreamRecord) -> None:
        error = record.data
        last = error.history[-1].error if error.history else ""
        if last == type(error).__name__:  # it ended the last request
            can_go_on = error.retryable or isinstance(error, TimeoutError)
        else:
            # It is an older drop, whose resumption was refused: the next run's would be
            # too, unless only the key was wrong.
            can_go_on = self._status in (401, 403)
        if not (can_go_on or isinstance(error, StreamAbortedError)):
            self.forget()
        self._close()

    # -- inner steps: opening

    def _refusal(self, why: object) -> OSError:
        return OSError(f"journal={self._path!r}: {why}")

    def _connect(self) -> None:
        """Make the file if there is none, and leave one that is not ours untouched."""
        import stat

        with _creating:
            with contextlib.suppress(FileExistsError):
                made = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                with open(made, "wb"):
                    if os.name == "posix":
                        os.fchmod(made, 0o600)  # whatever the umask left of it
            found = os.stat(self._path)
            if not stat.S_ISREG(found.st_mode):
                raise self._refusal("it is no file")
            if found.st_size:
                # Immutable, as far as SQLite knows: it takes no lock, leaves no trace.
                look = self._connection("mode=ro&immutable=1")
                with contextlib.closing(look):
                    self._check_marks(look)
            for path in (self._path, self._path + "-wal", self._path + "-shm"):
                shared = os.path.exists(path) and os.stat(path).st_mode & 0o077
                if shared and os.name == "posix":
                    os.chmod(path, 0o600)
            self._database = self._connection("mode=rw")

    def _connection(self, how: str) -> Any:
        import pathlib
        import sqlite3

        return sqlite3.connect(
            f"{pathlib.Path(self._path).as_uri()}?{how}",
            uri=True,
            timeout=_POLL_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )

    def _check_marks(self, database: Any) -> None:
        [(mark,)] = database.execute("PRAGMA application_id").fetchall()
        [(version,)] = database.execute("PRAGMA user_version").fetchall()
        if mark != _JOURNAL_ID:
            raise self._refusal("it is no journal of this resilient_sse: use another")
        if version != _JOURNAL_VERSION:
            raise self._refusal("written by another version of resilient_sse")

    def _claim(self) -> None:
        import sqlite3

        self._do("BEGIN IMMEDIATE")
        if self._do("SELECT count(*) FROM sqlite_master") == [(0,)]:
            for statement in _JOURNAL_TABLES:
                self._do(statement)
        self._check_marks(self._database)  # what was empty may have become another's
        claim = "INSERT OR REPLACE INTO streams VALUES (?, ?)"
        self._do(claim, [self._request, self._owner])
        self._do("COMMIT")
        try:  # a commit then outlives the process, and need not wait for the disk
            self._database.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as error:  # others are making the file too
            logger.debug("journal: it stays in the mode that it has: %s", error)
        self._database.execute("PRAGMA synchronous = NORMAL")

    def _verify(self) -> None:
        """Read it all before anything is handed out; what is damaged starts over."""
        import sqlite3

        try:
            for kind, _, total in self._rows():
                self._sum, self.is_whole = total, kind == "complete"
                if kind == "masked":  # stars for what was handed out: another text
                    raise ValueError("the server echoed a secret, which is not kept")
        except sqlite3.OperationalError:  # no damage to the entry, but locked, say
            raise
        except (sqlite3.DatabaseError, ValueError) as error:
            logger.warning("the answer in the journal starts over: %s", error)
            self.forget()

    # -- inner steps: reading and writing

    def _rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Kind, value and sum of each record, in portions: no lock outlives one.

        :raises ValueError: a record is not what was written there.
        """
        select = (
            "SELECT number, CAST(kind AS BLOB), CAST(value AS BLOB), CAST(sum AS BLOB) "
            "FROM records WHERE request = ? AND number > ? ORDER BY number LIMIT ?"
        )
        number, total = -1 << 63, self._request.encode()
        while True:
            rows = self._do(select, [self._request, number, _PORTION])
            for number, kind, value, written in rows:
                total = _sum_with(total, kind or b"", value or b"")
                if written != total:
                    raise ValueError("its sums are not those of its records")
                yield kind.decode("ascii"), value or b"", total
            if len(rows) < _PORTION:
                return

    def _add(self, kind: str, value: bytes) -> None:
        self._sum = _sum_with(self._sum, kind.encode(), value)
        self._write(
            "INSERT INTO records (request, kind, value, sum) "
            "SELECT request, :kind, :value, :sum FROM streams WHERE {}",
            kind=kind,
            value=value,
            sum=self._sum,
        )

    def _write(self, statement: str, **values: Any) -> None:
        """Write, unless a later stream or the parent of a fork owns the entry.

        The answer is worth more than its copy: if that fails, it is logged, and no
        record follows, so that the entry is one that was cut there.
        """
        if self._database is None or self._process != os.getpid():
            return
        import sqlite3

        values.update(request=self._request, owner=self._owner)
        own = "request = :request AND owner = :owner"
        try:
            self._do(statement.format(own), values, _STALL_SECONDS)
        except (sqlite3.Error, ValueError) as error:
            logger.warning("the stream goes on without its journal: %s", error)
            self._close()

    def _do(
        self, statement: str, values: Any = (), seconds: float | None = None
    ) -> list[Any]:
        """Rows of a statement; a lock is waited for, as long as the stream may."""
        import sqlite3

        end = _now() + (_LOCK_SECONDS if seconds is None else seconds)
        while True:
            try:
                rows: list[Any] = self._database.execute(statement, values).fetchall()
                return rows
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or _now() >= end or not self._may_wait():
                    raise

    def _close(self) -> None:
        _open_journals.pop(self._owner, None)
        database, self._database = self._database, None
        if database is None:
            return
        import sqlite3

        try:
            database.close()
        except sqlite3.Error as error:  # what was committed stays
            logger.debug("journal: %s", error)


def _address_asked(url: str) -> str:
    """The URL by which an entry is found: without user, secrets and fragment."""
    parts, kept = urlsplit(url), []
    for pair in parts.query.split("&"):
        name = re.sub("[-_]", "", unquote(pair.partition("=")[0])).lower()
        if not re.fullmatch(_SECRET_PARAMETER, name):
            kept.append(pair)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "&".join(kept), ""))


def _sum_with(before: bytes, kind: bytes, value: bytes) -> bytes:
    """The sum over a record and, by theirs, all before it."""
    import hashlib

    return hashlib.sha256(before + kind + b"\0" + value).digest()


_OPTIONAL["journal"] = _JournalEntry


# ---------------------------------------------------------------------------
# 17. Command line: one answer from a shell
# ---------------------------------------------------------------------------
# Promises the text on standard output and nothing else there, facts on standard
# error, and an exit status that says how the stream ended.
# Refuses keys as arguments: other users of the machine can read those.

_EXIT_STATUS = (
    (0, "the answer is complete", None),
    (1, "a file cannot be read or written, or anything not named here", None),
    (2, "the command line or an option is wrong", None),
    (3, "no connection, or it dropped", StreamConnectionError),
    (4, "a time limit passed", StreamTimeoutError),
    (5, "a repeated answer differs from what was printed", ResumeMismatchError),
    (6, "the stream ended before the answer did", IncompleteStreamError),
    (7, "the server reports an error", APIError),
    (8, "the reply is no event stream, or malformed", MalformedStreamError),
    (9, "a size limit was reached", StreamLimitError),
    (10, "the stream was closed from elsewhere", StreamAbortedError),
    (130, "interrupted by Ctrl-C", None),
    (141, "the reader of standard output went away", None),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: print one answer as it streams.

    :param argv: the arguments; None, the default, takes those of the process.
    :returns: the exit status, as listed by ``--help``.
    """
    if sys.stdout is None:  # closed before the start: as good as a closed pipe
        return 141
    if sys.stderr is None:  # argparse would fail on it
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return main(argv)
    try:
        return _run(_parser().parse_args(argv))
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except StreamingError as error:
        _complain(f"{type(error).__name__}: {error}")
        kinds = ((status, kind) for status, _, kind in _EXIT_STATUS if kind)
        return next((status for status, kind in kinds if isinstance(error, kind)), 1)
    except BrokenPipeError:
        _discard(sys.stdout)
        return 141
    except ValueError as error:
        _complain(str(error))
        return 2
    except (OSError, RecursionError) as error:
        _complain(str(error))
        try:
            sys.stdout.flush()
        except OSError:  # it is standard output that cannot be written
            _discard(sys.stdout)
        return 1


def _discard(stream: Any) -> None:
    """What is still in its buffer has no reader: without this, the interpreter would
    try again at its exit, complain, and replace the exit status by its own."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())  # a stand-in has no fileno


_TIMEOUT_NAMES = ("connect", "first_token", "read", "idle", "total")


def _parser() -> argparse.ArgumentParser:
    import argparse

    status = "\n".join(f"  {code:>3}  {text}" for code, text, _ in _EXIT_STATUS)
    parser = argparse.ArgumentParser(
        prog="resilient-sse",
        description="Print the answer of a language model as it streams, whole or "
        "with an exit status that says why not.",
        epilog=f"Keys come from the environment or --key-file.\n\nexit status:\n{status}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt; - or a pipe reads standard input")
    add("--model", help="name of the model")
    add("--base-url", metavar="URL", help="where the API is, as its SDK calls it")
    add("--dialect", choices=sorted(DIALECTS), default="openai", help="(openai)")
    add("--param", action="append", type=_parameter, default=[], metavar="K=V")
    add("--resume", choices=_MODES, default="auto", help="after a drop (auto)")
    most = "requests at most, the first included"
    add("--attempts", type=int, metavar="N", help=most)
    # Left out of the options unless given: None has its own meaning here.
    left_out, kind = argparse.SUPPRESS, _seconds_or_none
    for name in _TIMEOUT_NAMES:
        flag, text = "--" + name.replace("_", "-"), "seconds, or none"
        add(flag, type=kind, metavar="S", default=left_out, help=text)
    add("--key-file", metavar="FILE", help="read the API key from this file")
    add("--journal", metavar="FILE", help="go on where an earlier run was cut off")
    add("--trace", metavar="FILE", help="write a redacted report of the stream there")
    add("--save-raw", metavar="FILE", help="save the body there, for --replay")
    add("--replay", metavar="FILE", help="read a saved body; no request is made")
    add("--json", action="store_true", help="print the result as one line of JSON")
    talk = parser.add_mutually_exclusive_group()
    talk.add_argument("--quiet", action="store_true", help="no facts, only errors")
    talk.add_argument("--verbose", action="store_true", help="every fact, always")
    add("--version", action="store_true", help="version and SHA-256 of this file")
    return parser


def _parameter(argument: str) -> tuple[str, Any]:
    """``temperature=0`` as a name and a value: JSON if it parses, else a string."""
    import argparse

    name, equals, text = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument!r} is not of the form name=value")
    try:
        return name, jsonlib.loads(text)
    except RecursionError as error:
        raise argparse.ArgumentTypeError(f"{name}=... is nested too deeply") from error
    except ValueError:
        return name, text


def _seconds_or_none(argument: str) -> float | None:
    return None if argument.lower() == "none" else float(argument)


def _run(options: argparse.Namespace) -> int:
    out = _TextOut()
    if options.version:
        out.write(_version_line())
        return 0
    observers: list[Observer] = [_Facts(options, out)]
    try:
        stream = _open_stream(options)
    except TypeError as error:  # another client's name for a parameter
        raise ValueError(error) from error
    except RecursionError as error:
        raise ValueError("--param: a value is nested too deeply") from error
    with contextlib.ExitStack() as files:
        # Before the answer is paid for: a path that cannot be written ends it here.
        if options.trace:
            report = files.enter_context(open(options.trace, "w", encoding="utf-8"))
            trace = StreamTrace()
            # However the stream ends: it is closed first, since it is entered last.
            files.callback(lambda: report.write(trace.report()))
            observers.append(trace)
        if options.save_raw:
            raw = files.enter_context(open(options.save_raw, "wb"))
            observers.append(_RawFile(raw))
        for observer in observers:
            stream.observe(observer)
        files.enter_context(stream)
        _print_stream(stream, options, out)
    return 0


def _version_line() -> str:
    import hashlib

    loader = getattr(globals().get("__spec__"), "loader", None)
    if loader is None:  # run as a script
        with open(__file__, "rb") as file:
            source = file.read()
    else:  # it may be in an archive
        source = loader.get_data(__file__)
    return f"resilient_sse {__version__} sha256:{hashlib.sha256(source).hexdigest()}\n"


def _open_stream(options: argparse.Namespace) -> ChatStream:
    """The stream asked for; nothing is sent yet.

    :raises ValueError: if an option is wrong.
    """
    if options.replay:
        with open(options.replay, "rb") as file:
            return ChatStream.replay(file.read(), dialect=options.dialect)
    import inspect

    params, given = dict(options.param), vars(options)
    # Parameters are the body's: a key, say, must not come in this way.
    for name in set(params) & set(inspect.signature(stream_chat).parameters):
        raise ValueError(f"--param {name}=... is not a parameter of the request body")
    timeouts = Timeouts(**{n: given[n] for n in _TIMEOUT_NAMES if n in given})
    retry = Retry() if options.attempts is None else Retry(attempts=options.attempts)
    key = None
    if options.key_file is not None:
        with open(options.key_file, encoding="utf-8") as key_file:
            key = key_file.read().strip()
    return stream_chat(
        _read_prompt(options.prompt),
        options.model,
        dialect=options.dialect,
        base_url=options.base_url,
        api_key=key,
        timeouts=timeouts,
        retry=retry,
        resume=options.resume,
        journal=options.journal,
        **params,
    )


def _read_prompt(argument: str | None) -> str:
    if argument is not None and argument != "-":
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise ValueError("no prompt: give one, or - to read standard input")
    source = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if source is None else source.read().decode("utf-8")
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _print_stream(
    stream: ChatStream, options: argparse.Namespace, out: _TextOut
) -> None:
    try:
        if options.json:
            # Nobody reads the text before it is whole, so it may start over.
            result = _as_json(stream.complete())
            result["headers"] = _shown_headers(result["headers"])
            out.write(jsonlib.dumps(result) + "\n")
        else:
            for text in stream:
                out.write(text)
    except StreamingError as error:
        if options.json:
            facts = _as_json({**_error_facts(error), "message": str(error)})
            out.write(jsonlib.dumps({"error": facts, "text": error.text}) + "\n")
        raise
    finally:
        if out.terminal:
            out.end_line()


class _RawFile(Observer):
    """The last body, written as it comes in: a file may be larger than memory."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._stale = False

    def on_response(self, record: StreamRecord) -> None:
        self._stale = record.data["status"] < 400

    def on_chunk(self, record: StreamRecord) -> None:
        if self._stale:
            self._stale = False
            self._file.seek(0)
            self._file.truncate()
        self._file.write(record.data)


def _as_json(value: Any) -> Any:
    """The same as JSON can hold it: records become objects, other things text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return str(value)


class _Facts(Observer):
    """What happens to the stream, a line each on standard error."""

    def __init__(self, options: argparse.Namespace, out: _TextOut) -> None:
        super().__init__()
        self._out = out
        self._shown: tuple[str, ...] = ()
        if options.verbose or (sys.stderr.isatty() and not options.quiet):
            self._shown = ("retry", "restart", "complete")
        if options.verbose:
            self._shown += ("start", "request", "response")

    def _say(self, record: StreamRecord) -> None:
        if record.what in self._shown:
            if self._out.terminal:
                self._out.end_line()
            _complain(f"{record.seconds:.1f} s: {record.what}: {record.why}")

    on_retry = on_restart = on_complete = _say
    on_start = on_request = on_response = _say


def _complain(text: str) -> None:
    """A line on standard error, whatever its encoding can hold."""
    line = _CONTROL.sub("\ufffd", f"resilient-sse: {text}") + "\n"
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    try:
        sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding))
        sys.stderr.flush()
    except OSError:  # the exit status still tells
        _discard(sys.stderr)


if __name__ == "__main__":
    sys.exit(main())


# MIT License
#
# Copyright (c) 2026 The resilient_sse authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy
# of this software and associated documentation files (the "Software"), to deal
# in the Software without restriction, including without limitation the rights
# to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
# copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all
# copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
# IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
# FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
# AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
# LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
# SOFTWARE.
