"""What happens when a run is asked to stop: SIGINT (Ctrl-C), SIGTERM (schedulers, `kill`) and
SIGHUP (a terminal that is gone)."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal to stop arrived. The message says what is kept; the same call resumes."""


def _asks_to_stop() -> list[signal.Signals]:
    """SIGHUP only where it would end the process: under `nohup` a run goes on without its
    terminal."""
    hangup = getattr(signal, "SIGHUP", None)
    return [
        signal.SIGINT,
        signal.SIGTERM,
        *([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else []),
    ]


@contextlib.contextmanager
def _handled(numbers: list[signal.Signals], handler: Any) -> Iterator[None]:
    """Main thread only; elsewhere a no-op."""
    previous = {}
    with contextlib.suppress(ValueError):
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collects signals in the yielded list, so that a step or a chunk is never cut in half.

    Main thread only; elsewhere a no-op.
    """
    received: list[int] = []
    with _handled(_asks_to_stop(), lambda number, _: received.append(number)):
        yield received


@contextlib.contextmanager
def stops_with_a_word() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted`, as Ctrl-C raises KeyboardInterrupt; without it they
    end a process at once, in silence.

    Inside of `stop_signal` they are collected all the same. Main thread only; elsewhere a no-op.
    """

    def interrupt(number: int, _: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    with _handled([number for number in _asks_to_stop() if number != signal.SIGINT], interrupt):
        yield
