"""What Prometheus reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.serving.answers import gen_cost_of

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
RATE_SECONDS = 10.0  # over which tokens per second are counted


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "zip_rc"}
        labels = ("path", "status")
        self.requests = Counter("requests", "HTTP requests that were answered", labels, **kept)
        self._waiting = Gauge("requests_waiting", "Requests that wait for slots", **kept)
        self._running = Gauge("requests_running", "Requests that have slots", **kept)
        self._slots = Gauge("slots", "Slots that the engine has", **kept)
        self._used = Gauge("slots_in_use", "Slots that prefixes hold", **kept)
        self._rate = Gauge(
            "tokens_per_second", f"Tokens generated in the last {RATE_SECONDS:g} s", **kept
        )
        self._generated = Counter("generated_tokens", "Tokens that were generated", **kept)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts that were answered", **kept)
        self._finished = Counter("answers", "Answers by their end", ("finish_reason",), **kept)
        tenths = tuple(i / 10 for i in range(1, 11))
        self._correct = Histogram(
            "p_correct", "P(correct) of answers, as predicted", buckets=tenths, **kept
        )
        costs = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8)
        self._cost = Histogram(
            "gen_cost", "Cost of answers, in expected single samples", buckets=costs, **kept
        )
        self.first = Histogram(
            "first_token_seconds", "Until the first text of a stream", buckets=SECONDS, **kept
        )
        self._recent = deque[tuple[float, int]]()
        self._rate.set_function(self._tokens_per_second)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int], slots: int) -> None:
        """What is asked for when the metrics are read."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
        self._slots.set(slots)

    def stepped(self, slots: int, tokens: int) -> None:
        """After every interval of the engine, in its thread."""
        self._used.set(slots)
        self._generated.inc(tokens)
        now = time.monotonic()
        self._recent.append((now, tokens))
        while self._recent and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()

    def ended(self, result: Result, config: DecodeConfig) -> None:
        """At the end of every answer."""
        self._prompt.inc(result.usage.prompt_tokens)
        self._finished.labels(result.finish_reason).inc()
        if result.expected_reward == result.expected_reward:
            self._correct.observe(result.expected_reward)
        if (cost := gen_cost_of(result, config.alpha)) is not None:
            self._cost.observe(cost)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _tokens_per_second(self) -> float:
        since = time.monotonic() - RATE_SECONDS
        return sum(n for when, n in list(self._recent) if when >= since) / RATE_SECONDS
