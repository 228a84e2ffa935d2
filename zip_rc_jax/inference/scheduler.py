"""Which prompts are admitted, and which are stepped together.

Host code; only speed depends on it, no result does.
"""

from __future__ import annotations

from collections.abc import Iterable

from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.prefill import together
from zip_rc_jax.inference.requests import RejectedRequest, TokenizedRequest, shared_prefix
from zip_rc_jax.inference.running_batch import Admitted, RunningBatch
from zip_rc_jax.inference.state import fine_bucket

# A narrower program is worth it from this width on (below, a step costs much besides its rows), for
# this share of the live rows.
WIDE, MOST = 32, 0.875
# that are read before the prompts in flight are stepped again; there may be any number in a row
REFUSALS = 64


class Queue:
    """Requests in order, read one at a time and no earlier than asked for.

    Attributes:
      failure: what the source raised. It ends the queue, but not the prompts in flight.
    """

    def __init__(self, jobs: Iterable[TokenizedRequest | RejectedRequest]):
        # A list tells how long the rows must be; otherwise they grow with what is read.
        listed = jobs if isinstance(jobs, list) else []
        self._longest = max(
            (job.slots for job in listed if isinstance(job, TokenizedRequest)), default=0
        )
        self._source = iter(jobs)
        self._next: TokenizedRequest | RejectedRequest | None = None
        self.failure: Exception | None = None

    def peek(self) -> TokenizedRequest | RejectedRequest | None:
        """The next request; None at the end. Reading it blocks as long as the source does."""
        if self._next is None and self.failure is None:
            try:
                self._next = next(self._source, None)
            except Exception as error:
                self.failure = error
        return self._next

    def pop(self) -> None:
        """Goes on to the request after the one that `peek` returned."""
        self._next = None

    def longest(self) -> int:
        """Tokens of the longest prefix of all requests, where all are known; else 0."""
        return self._longest

    def abandoned(self) -> set[int]:
        """Numbers of requests, in flight or waiting, whose results nobody wants any more."""
        return set()

    def stepped(self, slots: int, tokens: int) -> None:
        """Is told after every interval: slots in use, and tokens that the interval generated."""


def next_batch(
    queue: Queue, running: RunningBatch | None, most: int
) -> tuple[list[Admitted], list[RejectedRequest]]:
    """Takes from the queue the requests that have room now, and those that cannot be decoded at
    all.

    Nothing is read before there is room for a prompt, and no more than `REFUSALS` that cannot be
    decoded. Three kinds of request are left in the queue: one whose sequences may become longer
    than those of `running`, one that has to wait, and one that shares more of its beginning with a
    request of this batch, or one that is not computed yet, than with those before. The last one
    continues from what is computed now.

    Args:
      running: None where only requests that cannot be decoded are taken.
      most: requests of a shard that may be prefilled at once.
    """
    batch: list[Admitted] = []
    refused: list[RejectedRequest] = []
    longest = 0
    while len(refused) < REFUSALS:
        if running is not None and not running.has_room():
            break
        if (request := queue.peek()) is None:
            break
        if isinstance(request, RejectedRequest):
            refused.append(request)
            queue.pop()
            continue
        if running is None or request.slots > running.sizes.tokens:
            break
        longest = max(longest, len(request.ids))
        padded = fine_bucket(longest, running.sizes.tokens, least=16)
        shards = [running.next_shard(), *(a.shard for a in batch)]
        width = max(map(shards.count, shards))
        if width > together(most, padded) or _continues(request, batch, running):
            break
        admitted = running.admit(request)
        if admitted is None:
            break
        batch.append(admitted)
        queue.pop()
    return batch, refused


def _continues(request: TokenizedRequest, batch: list[Admitted], running: RunningBatch) -> bool:
    """Whether a prompt can take over more from one of this batch than from those before."""
    shard = running.next_shard()
    incomplete = [*batch, *running.incomplete]
    beside = [a.job.ids for a in incomplete if a.shard == shard] if running.share else []
    shared = max((shared_prefix(request.ids, ids) for ids in beside), default=0)
    return shared > 0 and shared > running.known_tokens(request)


def next_to_step(
    planned: list[list[PagedSequence]], hurried: set[int], rows: int
) -> tuple[list[list[PagedSequence]], int]:
    """Of the sequences that can run, those to step, and the lanes of every shard that are stepped
    for it: a rounded number, at most `rows`.

    All of them; but where most fill a narrower program, the youngest prompts wait, as a lane that
    is padding costs as much as one that is live.

    Args:
      hurried: prompts whose time is limited. They wait last.
    """

    def ladder(width: int) -> int:
        return fine_bucket(width, rows, least=8)

    width = ladder(max(map(len, planned)))
    narrower = max((w for w in map(ladder, range(1, width)) if w < width), default=0)
    if narrower < WIDE:
        return planned, width
    some = [_oldest(part, hurried, narrower) for part in planned]
    chosen, total = sum(map(len, some)), sum(map(len, planned))
    return (some, narrower) if chosen >= MOST * total else (planned, width)


def _oldest(planned: list[PagedSequence], hurried: set[int], most: int) -> list[PagedSequence]:
    """The sequences of as many prompts as `most` lanes hold, in order."""
    by_prompt: dict[int, list[PagedSequence]] = {}
    for sequence in planned:
        by_prompt.setdefault(sequence.prompt, []).append(sequence)
    chosen: list[PagedSequence] = []
    for prompt in sorted(by_prompt, key=lambda p: (p not in hurried, p)):
        if len(chosen) + len(by_prompt[prompt]) <= most:
            chosen += by_prompt[prompt]
    return chosen
