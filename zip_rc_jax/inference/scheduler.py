"""Which prompts are admitted, and which are stepped together.

Host code; only speed depends on it, no result does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from zip_rc_jax.inference.placement import Shard, safe
from zip_rc_jax.inference.requests import RejectedRequest, TokenizedRequest, shared_prefix
from zip_rc_jax.inference.state import bucket, fine_bucket
from zip_rc_jax.inference.tree import SearchTree

# A narrower program is worth it from this width on (below, a step costs much besides its rows), for
# this share of the live rows.
WIDE, MOST = 32, 0.875
# of the prompts of a shard that are prefilled together: enough to keep a device busy
PREFILL_TOKENS = 2**14
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


def members(groups: Sequence[SearchTree], shards: int) -> list[list[SearchTree]]:
    """The groups of every shard, in order."""
    return [[g for g in groups if g.shard == s] for s in range(shards)]


def together(most: int, tokens: int) -> int:
    """How many prompts of a shard, at most `most`, are prefilled together if they are padded to
    `tokens` tokens.

    Their number is padded to a power of two, and so counted here.
    """
    return min(most, 1 << max(1, PREFILL_TOKENS // tokens).bit_length() - 1)


def largest_prefills(most: int, longest: int) -> list[tuple[int, int]]:
    """Upper bounds on every prefill, as (prompts, tokens of each), if `together` lets at most
    `most` prompts in.

    Args:
      longest: tokens that the longest prompt is padded to.
    """
    counts = [1 << i for i in range(bucket(most, least=1).bit_length())]
    return [
        (count, longest if count == 1 else min(longest, PREFILL_TOKENS // count))
        for count in counts
    ]


def next_batch(
    queue: Queue, slots: int, shards: list[Shard], groups: list[SearchTree], most: int
) -> tuple[list[list[TokenizedRequest]], list[RejectedRequest]]:
    """Takes from the queue, per shard, the requests that its free rows can probably hold; and those
    that cannot be decoded at all.

    Nothing is read before there is a free row for it, and no more than `REFUSALS` that cannot be
    decoded. A request whose prefixes may become longer than the rows is left in the queue.

    Args:
      slots: of the rows.
      most: requests of a shard that may be prefilled at once.
    """
    batch: list[list[TokenizedRequest]] = [[] for _ in shards]
    refused: list[RejectedRequest] = []
    parts = members(groups, len(shards))
    accounts = [[g.account for g in part] for part in parts]
    free = [len(shard.free) for shard in shards]
    # Free rows, less those that the prompts of the batch will probably take; none where a prompt
    # waits for rows.
    room = [
        float(f) if all(g.ready for g in part) else 0.0 for f, part in zip(free, parts, strict=True)
    ]
    longest = 0
    while max(room) >= 1 and len(refused) < REFUSALS and (request := queue.peek()) is not None:
        if isinstance(request, RejectedRequest):
            refused.append(request)
        else:
            best = int(np.argmax(room))
            expected, account = shards[best].expected(request.config.n), (request.config.n - 1, 1)
            width, padded = (
                max(len(batch[best]) + 1, *map(len, batch)),
                fine_bucket(max(longest, len(request.ids)), slots, least=16),
            )
            full = request.slots > slots or room[best] < expected or width > together(most, padded)
            if full or not safe(free[best] - 1, [*accounts[best], account]):
                break
            accounts[best].append(account)
            free[best] -= 1
            room[best] -= expected
            batch[best].append(request)
            longest = max(longest, len(request.ids))
        queue.pop()
    return batch, refused


def fresh(jobs: list[TokenizedRequest], known: list[list[int]]) -> list[TokenizedRequest]:
    """Those that begin neither as one of the `known` prompts nor as one before them."""
    chosen: list[TokenizedRequest] = []
    for job in jobs:
        if not any(
            shared_prefix(job.ids, ids) for ids in [*known, *(other.ids for other in chosen)]
        ):
            chosen.append(job)
    return chosen


def next_to_step(groups: list[SearchTree], shards: int, rows: int) -> tuple[list[SearchTree], int]:
    """The groups to step, and the rows of every shard that are stepped for it: a rounded number, at
    most `rows`.

    All that are ready; but where most of them fill a narrower program, the youngest wait, as a row
    that is padding costs as much as one that is live. Those whose time is limited wait last.
    """
    ready = [g for g in groups if g.ready]
    size = {g.job.number: len(g.live()) for g in ready}

    def ladder(width: int) -> int:
        return fine_bucket(width, rows, least=8)

    def total(chosen: list[SearchTree]) -> int:
        return sum(size[g.job.number] for g in chosen)

    width = ladder(max(map(total, members(ready, shards))))
    narrower = max((w for w in map(ladder, range(1, width)) if w < width), default=0)
    if narrower < WIDE:
        return ready, width
    some: list[SearchTree] = []
    count = [0] * shards
    for group in sorted(ready, key=lambda g: not g.job.config.time_budget):
        if count[group.shard] + size[group.job.number] <= narrower:
            some.append(group)
            count[group.shard] += size[group.job.number]
    return (some, narrower) if total(some) >= MOST * total(ready) else (ready, width)
