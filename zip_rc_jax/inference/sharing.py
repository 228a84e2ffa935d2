"""Calls from several threads on one engine: they share its slots, and each gets its own events.

No thread of its own does the work. Whoever waits for an event drives the engine for all calls, one
event at a time, and hands the others theirs. So a call that nobody reads from costs nothing but its
slots, and when the last call ends everything is freed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.requests import RejectedRequest, TokenizedRequest
from zip_rc_jax.inference.scheduler import Queue

Event = StepEvent | ResultEvent


class Session(Protocol):
    """One call in progress. Both methods may be called from any thread."""

    def next(self) -> Event | None:
        """The next event of the call; None after the last one, and after `close`."""

    def close(self) -> None:
        """Gives back what the call holds. May be called twice, and while another thread waits in
        `next`.
        """


class OwnSession:
    """A call that has a loop of its own, because reading its prompts may block."""

    def __init__(self, events: Iterator[Event]):
        self._events: Iterator[Event] | None = events
        self._busy = threading.Lock()
        self._closed = False

    def next(self) -> Event | None:
        with self._busy:
            events, event = self._events, None
            try:
                if events is not None and not self._closed:
                    event = next(events, None)
            finally:
                if event is None or self._closed:
                    self._events = None
                    del events
            return None if self._closed else event

    def close(self) -> None:
        self._closed = True  # whoever is in `next` frees it
        if self._busy.acquire(blocking=False):
            self._events = None
            self._busy.release()


class SharedQueue(Queue):
    """Requests of several calls in the order in which they came.

    Only the thread that drives the engine reads it.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.arrivals = deque[TokenizedRequest | RejectedRequest]()  # other threads append here
        self.departures = deque[int]()  # numbers of requests whose call has gone
        self._waiting = deque[TokenizedRequest | RejectedRequest]()

    def _receive(self) -> None:
        while self.arrivals:
            self._waiting.append(self.arrivals.popleft())

    def peek(self) -> TokenizedRequest | RejectedRequest | None:
        self._receive()
        return self._waiting[0] if self._waiting else None

    def pop(self) -> None:
        self._waiting.popleft()

    def longest(self) -> int:
        self._receive()
        return max(
            (job.slots for job in self._waiting if isinstance(job, TokenizedRequest)), default=0
        )

    def abandoned(self) -> set[int]:
        self._receive()
        gone = set[int]()
        while self.departures:
            gone.add(self.departures.popleft())
        if gone:
            self._waiting = deque(job for job in self._waiting if job.number not in gone)
        return gone


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request of a call.

    Attributes:
      job: as the engine knows it, with a number of its own.
      number: place among the prompts of its call.
      told: decisions that the call was told of.
      repeated: decisions that an engine repeats after it was started again; they are not told
        twice.
    """

    call: SharedSession
    job: TokenizedRequest | RejectedRequest
    number: int
    told: int = 0
    repeated: int = 0


class SharedSession:
    """A call whose prompts share the slots of an engine with those of other calls."""

    def __init__(self, shared: SharedEngine, count: int):
        self._shared = shared
        self.inbox = deque[Event]()
        self.left = count  # results that are still to come
        self.open = True

    def next(self) -> Event | None:
        return self._shared.next(self)

    def close(self) -> None:
        self._shared.leave(self)


class SharedEngine:
    """An engine that several calls use at the same time, and its loop while any of them is open."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._queue = SharedQueue()
        self._loop: Iterator[Event] | None = None
        self._tickets: dict[int, Ticket] = {}
        self._open: set[SharedSession] = set()
        self._count = 0
        # Re-entrant, because the collector may close an abandoned call in the middle of anything.
        self._changed = threading.Condition(threading.RLock())
        self._driven = False  # a thread is in the loop

    def enter(self, jobs: Iterable[TokenizedRequest | RejectedRequest]) -> SharedSession:
        """A new call. Its requests wait behind those of the calls before it."""
        jobs = list(jobs)
        call = SharedSession(self, len(jobs))
        with self._changed:
            self._open.add(call)
            for job in jobs:
                mine = dataclasses.replace(job, number=self._count)
                self._count += 1
                self._tickets[mine.number] = Ticket(call, mine, job.number)
                self._queue.arrivals.append(mine)
        return call

    def next(self, call: SharedSession) -> Event | None:
        """See `Session.next`. Drives the loop where no other thread does."""
        while True:
            with self._changed:
                while call.open and not call.inbox and call.left and self._driven:
                    self._changed.wait()
                if call.inbox:
                    return call.inbox.popleft()
                if not call.left or not call.open:
                    return None
                self._driven = True
            try:
                self._drive(call)
            finally:
                with self._changed:
                    self._driven = False
                    self._tidy()
                    self._changed.notify_all()

    def leave(self, call: SharedSession) -> None:
        """See `Session.close`."""
        with self._changed:
            if not call.open:
                return
            call.open = False
            call.inbox.clear()
            self._open.discard(call)
            mine = [number for number, ticket in self._tickets.items() if ticket.call is call]
            for number in mine:
                del self._tickets[number]
            self._queue.departures.extend(mine)
            self._tidy()
            self._changed.notify_all()

    def _drive(self, call: SharedSession) -> None:
        """Runs the loop up to its next event, and hands that to its call.

        The thread that drives the loop gets what the loop raises. The requests of the other calls
        are then decoded again, with the same results.
        """
        if self._loop is None:
            self._loop = self.engine.decode(self._queue)
        try:
            event = next(self._loop, None)
        except BaseException:
            with self._changed:
                self._restart(call)
            raise
        with self._changed:
            if event is None:
                self._loop = None
            elif ticket := self._tickets.get(event.prompt_index):
                self._deliver(ticket, event)

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        mine = dataclasses.replace(event, prompt_index=ticket.number)
        if isinstance(event, ResultEvent):
            del self._tickets[event.prompt_index]
            ticket.call.left -= 1
        elif ticket.repeated:
            ticket.repeated -= 1
            return
        else:
            ticket.told += 1
        ticket.call.inbox.append(mine)

    def _restart(self, failed: SharedSession) -> None:
        """After a failure of the loop: all requests wait again, except those of `failed`."""
        self._loop, self._queue = None, SharedQueue()
        for ticket in self._tickets.values():
            if ticket.call is not failed:
                ticket.repeated = ticket.told
                self._queue.arrivals.append(ticket.job)

    def _tidy(self) -> None:
        """Ends the loop, which holds the slots, once no call is open."""
        if not self._open and not self._driven:
            self._loop, self._queue = None, SharedQueue()
