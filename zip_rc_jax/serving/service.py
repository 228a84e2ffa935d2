"""The engine thread: one loop with continuous batching, and what becomes of every request in it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.requests import RejectedRequest, TokenizedRequest
from zip_rc_jax.inference.sharing import SharedQueue
from zip_rc_jax.serving.errors import ApiError
from zip_rc_jax.serving.metrics import Metrics

log = logging.getLogger("uvicorn.error")

GATHER_SECONDS = 0.005  # that an idle engine waits for company of the first request
Value = TypeVar("Value")
Told = StepEvent | ResultEvent | ApiError


@dataclasses.dataclass(eq=False)
class Ticket:
    """One choice of a request, on its way through the engine.

    Attributes:
      number: as the engine knows it.
      index: of the choice.
      events: gets `(index, event)`, in the event loop's thread.
      entered: when it came, by the event loop's clock.
      admitted: it has left the queue and has slots.
    """

    number: int
    index: int
    job: TokenizedRequest
    events: asyncio.Queue[tuple[int, Told]]
    entered: float
    admitted: bool = False


class ServiceQueue(SharedQueue):
    """The requests that wait. Only the engine thread reads it."""

    def __init__(self, context: int, service: Service):
        super().__init__()
        self._context, self._service = context, service

    def longest(self) -> int:
        """Slots are always made for the longest request that is let in, so none waits for longer
        slots."""
        return self._context

    def pop(self) -> None:
        job = self._waiting[0]
        super().pop()
        self._service.admitted(job.number)

    def stepped(self, slots: int, tokens: int) -> None:
        self._service.metrics.stepped(slots, tokens)


class Service:
    """Runs one engine in a thread of its own, from `start` to `stop`.

    All methods but `admitted` are called in the event loop's thread.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        context: int,
        max_queue: int,
        max_seconds: float,
    ):
        """Args:
        context: most tokens of a request, prompt included.
        max_queue: requests that may wait for slots; more are refused.
        max_seconds: that a request may wait for slots.
        """
        self.engine, self.metrics = engine, metrics
        self.context, self.max_queue, self.max_seconds = context, max_queue, max_seconds
        self.draining = False
        self._queue = ServiceQueue(context, self)
        self._tickets: dict[int, Ticket] = {}
        self._count = 0
        self._durations = deque[float](maxlen=64)
        self._changed, self._stopped = threading.Event(), False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(self.waiting, self.running, engine.rows * engine.shards)

    # Called from the event loop.

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and hands back what it still runs."""
        self.fail_all("the server shuts down")
        self._stopped = True
        self._changed.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def waiting(self) -> int:
        return sum(not ticket.admitted for ticket in list(self._tickets.values()))

    def running(self) -> int:
        return sum(ticket.admitted for ticket in list(self._tickets.values()))

    @property
    def is_idle(self) -> bool:
        return not self._tickets

    def check_room(self, new: int) -> None:
        """Raises ApiError if `new` more requests are not taken now."""
        if self.draining:
            raise ApiError(503, "the server shuts down", code="shutting_down")
        if self.waiting() + new > self.max_queue:
            message = (
                f"{self.waiting()} requests wait already: at most {self.max_queue} may. "
                "Fix: try again later."
            )
            raise ApiError(429, message, code="queue_full", retry_after=self._retry_after())

    def submit(
        self, jobs: Sequence[TokenizedRequest], events: asyncio.Queue[tuple[int, Told]]
    ) -> list[Ticket]:
        """Lets requests in, behind those before them.

        Raises:
          ApiError: see `check_room`; or there are more than may ever wait.
        """
        if len(jobs) > self.max_queue:
            message = (
                f"{len(jobs)} choices: at most {self.max_queue} may wait for slots. Fix: ask for "
                "fewer at a time."
            )
            raise ApiError(400, message, param="n", code="too_many_choices")
        self.check_room(len(jobs))
        tickets = []
        for index, job in enumerate(jobs):
            mine = dataclasses.replace(job, number=self._count)
            self._count += 1
            ticket = Ticket(mine.number, index, mine, events, self._loop.time())
            tickets.append(ticket)
            with self._lock:
                self._tickets[ticket.number] = ticket
                self._queue.arrivals.append(mine)
            self._loop.call_later(self.max_seconds, self._expire, ticket)
        self._changed.set()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Gives back what these hold, before the next interval. They may have ended."""
        for ticket in tickets:
            with self._lock:
                if self._tickets.pop(ticket.number, None):
                    self._queue.departures.append(ticket.number)

    def fail_all(self, message: str) -> None:
        """Ends everything that waits or runs with status 503."""
        for ticket in list(self._tickets.values()):
            self._fail(ticket, ApiError(503, message, code="shutting_down"))

    def _expire(self, ticket: Ticket) -> None:
        if ticket.number in self._tickets and not ticket.admitted:
            message = f"no slot became free within {self.max_seconds:g} seconds"
            retry = self._retry_after()
            self._fail(ticket, ApiError(503, message, code="queue_timeout", retry_after=retry))

    def _fail(self, ticket: Ticket, error: ApiError) -> None:
        self.cancel([ticket])
        ticket.events.put_nowait((ticket.index, error))

    def _retry_after(self) -> int:
        """Seconds in which about one round of requests ends."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return min(60, max(1, math.ceil(mean)))

    def _deliver(self, event: StepEvent | ResultEvent) -> None:
        ticket = self._tickets.get(event.prompt_index)
        if ticket is None:
            return
        if isinstance(event, ResultEvent):
            del self._tickets[ticket.number]
            self._durations.append(self._loop.time() - ticket.entered)
            self.metrics.ended(event.result, ticket.job.config)
        ticket.events.put_nowait((ticket.index, event))

    def _broken(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if ticket := self._tickets.get(number):
                error = ApiError(500, "the engine failed on this batch", code="engine_failed")
                self._fail(ticket, error)

    # Called from the engine thread.

    def admitted(self, number: int) -> None:
        if ticket := self._tickets.get(number):
            ticket.admitted = True

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._stopped:
                return
            time.sleep(GATHER_SECONDS)  # those that come together start together
            try:
                for event in self.engine.decode(self._queue):
                    self._call(self._deliver, event)
                    if self._stopped:
                        return
            except Exception:
                log.exception("the engine failed; what it ran is answered with status 500")
                self._restart()
            self.metrics.stepped(0, 0)

    def _restart(self) -> None:
        """After a failure of the device: what ran has failed, and what waits still waits."""
        with self._lock:
            failed = [t.number for t in self._tickets.values() if t.admitted]
            waiting = [t.job for t in self._tickets.values() if not t.admitted]
            self._queue = ServiceQueue(self.context, self)
            kept: list[TokenizedRequest | RejectedRequest] = list(waiting)
            self._queue.arrivals.extend(kept)
        self._call(self._broken, failed)
        self._changed.set()

    def _call(self, function: Callable[[Value], None], argument: Value) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(function, argument)
