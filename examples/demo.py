"""Watch an answer survive a server that drops, stalls and garbles it.

No key and no network are needed: the server is ``flaky_server.py`` beside this file,
on loopback.  What the program prints is the answer; what happened underneath stands
between the lines, behind a bar::

    python examples/demo.py
    python examples/demo.py --fast        # without the pauses between tokens
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from flaky_server import FlakyServer

import resilient_sse as rs

STORY = (
    "A stream is a promise made one piece at a time. The first line of it came "
    "quickly, and the reader smiled.\nThen the line went dead in the middle of a w"
    "ord, as lines do.\nNobody had said that the story was over, so it was not: the "
    "reader asked again, from the very letter where it had stopped, and the story "
    "went on.\nSilence came next, which is worse than an error, for it looks like "
    "thinking. A clock was watching.\nAfter it, garbage. Caf\u00e9, na\u00efve, "
    "\u4f60\u597d, \U0001f600: even half a character is no excuse.\nAnd when the end "
    "came, it came with a mark that said so: this is all of it, once, and nothing "
    "else."
)

#: What the server does with one request after the other.
FAULTS = [
    ("status:503:retry-after=0.3", "answers 503 and asks to wait"),
    ("reset:1500", "resets the connection in the middle of a line"),
    ("stall:4200", "goes silent, with the connection open"),
    ("end:3000", "ends cleanly, as if the answer were whole"),
    ("malformed:9", "sends half of a JSON text"),
    ("ok", "at last does its job"),
]


class Narrator(rs.Observer):
    """Says on the terminal what happens underneath."""

    def __init__(self) -> None:
        super().__init__()
        self.is_plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))

    def say(self, text: str) -> None:
        """Print a line of its own."""
        line = f"  | {text}"
        print("\n" + (line if self.is_plain else f"\033[2m{line}\033[0m"), flush=True)

    def on_request(self, record: rs.StreamRecord) -> None:
        """A request is sent."""
        fault = FAULTS[min(record.attempt, len(FAULTS)) - 1][1]
        self.say(
            f"request {record.attempt} ({record.data['action']}): the server {fault}"
        )

    def on_retry(self, record: rs.StreamRecord) -> None:
        """Another request is going to be made."""
        error, wait = record.data["error"], record.data["wait"]
        self.say(f"{type(error).__name__}; {record.data['action']} in {wait:.2f} s")


def stream(server: FlakyServer, narrator: Narrator) -> rs.ChatStream:
    """The call, as anybody would write it."""
    return rs.stream_chat(
        "Tell me a story",
        model="demo",
        dialect="vllm",
        base_url=server.url + "/v1",
        timeouts=rs.Timeouts(read=1.0),
        retry=rs.Retry(wait_initial=0.2),
        observe=narrator,
    )


def report(tokens: rs.ChatStream, printed: str) -> bool:
    """Say how it went; return whether the text is exact."""
    stats = tokens.stats
    is_exact = printed == tokens.text == STORY
    print(f"\n\n{stats.requests} requests, {stats.bytes} bytes, {stats.seconds:.1f} s.")
    for record in tokens.result.history:
        outcome = record.error or "complete"
        print(f"  {record.attempt}. {record.action:8}  {outcome}")
    print(f"Seams at {list(tokens.result.seams)} of {len(STORY)} characters.")
    print("The text is exact." if is_exact else "THE TEXT IS NOT EXACT.")
    return is_exact


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status says whether the text is exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="no pauses between tokens")
    delay = 0.0 if parser.parse_args(argv).fast else 0.02
    options: dict[str, Any] = {"text": STORY, "pieces": 5, "delay": delay}
    script = [fault for fault, _ in FAULTS]
    printed = []
    with FlakyServer(script=script, **options) as server:
        tokens = stream(server, Narrator())
        for token in tokens:
            print(token, end="", flush=True)
            printed.append(token)
    return 0 if report(tokens, "".join(printed)) else 1


if __name__ == "__main__":
    sys.exit(main())
