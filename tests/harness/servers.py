"""A server in a thread of this process, and what its tests ask it with."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import openai

from zip_rc_jax.cli.serve import with_template
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.serving.server import ServeConfig, Server

NAME = "tiny"
CONFIG = DecodeConfig(n=4, interval=4, window=3, max_tokens=24, max_num_seqs=16, beta=0.05)
TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}"
    "{% if tools %}{{ tools | length }} {% endif %}="
)
SECONDS = 60  # what takes longer hangs


def chatty(lm):
    """The tiny model with a chat template."""
    return with_template(lm, TEMPLATE)


@contextlib.contextmanager
def running(lm, config=CONFIG, **options) -> Iterator[Server]:
    """Serves on a free port. Leaving it ends the server.

    Slots have the length that `decode` gives them for short prompts, so both share their programs.
    """
    options = {"name": NAME, "port": 0, "context": 32} | options
    server = Server(lm, config, ServeConfig(**options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.url)
        yield server
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "what was waited for does not happen"
        time.sleep(0.005)


def client(server, key="none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)


def post(server, body, path="/v1/completions", **options):
    """Sends what no client of OpenAI's would: `body` is JSON, or bytes."""
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx2.post(server.url + path, headers=headers, timeout=SECONDS, **given, **options)


def metric(server, line: str) -> float:
    """The value of a line of /metrics."""
    text = httpx2.get(f"{server.url}/metrics", timeout=SECONDS).text
    return float(next(x for x in text.splitlines() if x.startswith(f"{line} ")).split()[-1])


@dataclasses.dataclass
class Gate:
    """Lets the engine take one interval at a time.

    Attributes:
      passed: intervals that were taken.
    """

    passed: int = 0
    _open: threading.Event = dataclasses.field(default_factory=threading.Event)
    _permits: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.Semaphore(0)
    )

    def wait(self) -> None:
        while not self._open.is_set() and not self._permits.acquire(timeout=0.005):
            pass
        self.passed += 1

    def let(self, intervals: int) -> None:
        for _ in range(intervals):
            self._permits.release()

    def open(self) -> None:
        self._open.set()


@contextlib.contextmanager
def gated(monkeypatch) -> Iterator[Gate]:
    """Holds all engines before their next interval. Leaving it opens the gate."""
    gate, advance = Gate(), Engine._step
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", lambda *a: (gate.wait(), advance(*a))[1])
        try:
            yield gate
        finally:
            gate.open()
