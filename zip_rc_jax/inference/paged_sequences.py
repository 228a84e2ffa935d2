"""Sequences over pages and slots, and what the edits of one decision or plan are. Host code.

`paging.Pager` decides with it who is admitted, and who runs.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

from zip_rc_jax.inference.page_policy import PagedSequence, Value, utility_per_page
from zip_rc_jax.inference.page_table import Copy, Edits, PageError
from zip_rc_jax.inference.pages import PageAllocator

ROOT = -1


@dataclasses.dataclass
class Claim:
    """What a prompt may come to.

    Attributes:
      tokens: of the prompt.
      n: sequences, and `begun`: those that have begun.
      full: pages of a full one.
    """

    tokens: int
    n: int
    full: int
    begun: int = 0


class PagedSequences:
    """The sequences of one shard: where they are, and what they may come to."""

    def __init__(
        self,
        pool: PageAllocator,
        slots: int,
        host_pages: int | None = None,
        fill: float = 1.35,
        value: Value = utility_per_page,
    ):
        """Args:
        slots: sequences that can be on the device.
        host_pages: pages that host memory may hold; None for any number.
        fill: share of the pages that predictions may fill when a prompt is admitted or fetched.
          More than 1, because the search ends many sequences before the end that is predicted.
        value: what a sequence is worth; the least leave first.
        """
        self.pool, self.slots, self.host_pages = pool, slots, host_pages
        self.fill, self.value = fill, value
        self.prompts: dict[int, dict[int, PagedSequence]] = {}  # by prompt and branch
        self._free_slots = list(range(slots))
        self._claims: dict[int, Claim] = {}

    def sequences(self) -> Iterator[PagedSequence]:
        """All of them, the oldest prompt first."""
        return (s for family in self.prompts.values() for s in family.values())

    @property
    def slots_in_use(self) -> int:
        return self.slots - len(self._free_slots)

    # What a decision does.

    def fork(self, parent: PagedSequence, branch: int, edits: Edits) -> PagedSequence:
        """A new sequence that begins as `parent`. Without a free slot it begins in host memory."""
        table, slot = self.pool.fork(parent.table), -1
        new = PagedSequence(parent.prompt, branch, table, slot)
        if branch in self.prompts[parent.prompt]:
            raise PageError(f"sequence {new.key} exists already")
        self.prompts[parent.prompt][branch] = new
        self._claims[parent.prompt].begun += 1
        if not parent.is_here:
            edits.host_copies.append((parent.key, new.key))
        elif self._free_slots:
            new.slot = heapq.heappop(self._free_slots)
            edits.slot_copies.append((parent.slot, new.slot))
        else:
            edits.slot_reads.append((parent.slot, new.key))
            edits.reads += self.pool.offload(table)
        return new

    def rename(self, sequence: PagedSequence, branch: int, edits: Edits) -> None:
        """The root becomes its last sample: nothing moves on the device."""
        old, family = sequence.key, self.prompts[sequence.prompt]
        del family[sequence.branch]
        sequence.branch = branch
        family[branch] = sequence
        self._claims[sequence.prompt].begun += 1
        if not sequence.is_here:
            edits.host_copies.append((old, sequence.key))
            edits.dropped_keys.append(old)

    def stop(self, sequence: PagedSequence, edits: Edits, discard: bool = False) -> None:
        """Ends a sequence; `discard` as in `PageAllocator.stop`."""
        family = self.prompts[sequence.prompt]
        del family[sequence.branch]
        if not family:
            del self.prompts[sequence.prompt], self._claims[sequence.prompt]
        if sequence.is_here:
            heapq.heappush(self._free_slots, sequence.slot)
        else:
            edits.dropped_keys.append(sequence.key)
        released = self.pool.stop(sequence.table, discard)
        edits.dropped_pages += released.host_pages
        edits.cleared += released.pages if discard else ()

    def advance(self, sequence: PagedSequence, tokens: int) -> None:
        """An interval, or a prefill, wrote `tokens` tokens."""
        self.pool.advance(sequence.table, tokens)
        sequence.due = 0

    def gather_first(
        self, running: Sequence[PagedSequence], width: int, scratch: int
    ) -> list[Copy]:
        """Where a page is a whole sequence: moves the pages of `running` below `width`.

        Each takes the place of a free page if there is one, else of one that is not stepped now.

        Args:
          width: at least as many as there are.
          scratch: a page that nobody ever holds.

        Returns:
          the copies, one after the other.
        """
        mine = {s.table.pages[0] for s in running}
        left = [page for page in range(width) if page not in mine]
        places = iter(sorted(left, key=lambda page: not self.pool.is_free(page)))
        copies = list[Copy]()
        for page in sorted(page for page in mine if page >= width):
            other = next(places)
            tables = [s.table for s in self.sequences() if s.is_here]
            for table in tables:
                swapped = {page: other, other: page}
                table.pages = [swapped.get(p, p) for p in table.pages]
            if self.pool.swap(page, other):
                copies += [(page, scratch), (other, page), (scratch, other)]
            else:
                copies.append((page, other))
        return copies

    def is_settled(self, prompt: int) -> bool:
        """Whether no sequence of a prompt is due, so that it can be decided."""
        return not any(s.due for s in self.prompts[prompt].values())

    # Inside.

    def _needs(self, s: PagedSequence) -> int:
        """Pages that are taken if a sequence runs now."""
        if s.is_here:
            return self.pool.needs(s.table, s.due)
        more = self.pool.pages_for(s.table.length + s.due) - len(s.table.pages)
        return self.pool.fetch_needs(s.table) + more

    def _host_room(self, newcomers: Sequence[Claim] = ()) -> float:
        """Pages that may be taken while enough can leave for any prompt to finish first.

        Either host memory holds everything but one sequence; a fork may add one page, the last one.
        Or slots are no matter, and device and host together hold all tables, without counting on
        sharing. Then two sequences are set aside: the one that runs, and one that does not fit
        host memory as a whole.
        """
        if self.host_pages is None:
            return math.inf
        claims = [*self._claims.values(), *newcomers]
        reserve = max((claim.n - 1) * claim.full for claim in claims)
        held = self.pool.num_pages - self.pool.available + len(self.pool.host)
        room = self.host_pages - reserve - held - sum(claim.n for claim in claims)
        unborn = sum(claim.n - claim.begun for claim in claims)
        if sum(map(len, self.prompts.values())) + unborn > self.slots:
            return room
        both = self.host_pages + self.pool.num_pages - 2 * max(claim.full for claim in claims)
        for prompt, family in self.prompts.items():
            tables = [len(s.table.pages) for s in family.values()]
            claim = self._claims[prompt]
            both -= sum(tables) + (claim.n - claim.begun) * max(tables)
        return max(room, both - reserve)

    def _fits_host(self, s: PagedSequence) -> bool:
        pages = len(self.pool.host) + len(s.table.pages)
        return self.host_pages is None or pages <= self.host_pages

    def _run(self, s: PagedSequence, edits: Edits) -> bool:
        """Fetches a sequence if it is away, and gives it pages for what is due."""
        if self._needs(s) > self.pool.available or not (s.is_here or self._free_slots):
            return False
        if not s.is_here:
            fetched = self.pool.fetch(s.table)
            assert fetched is not None
            s.slot = heapq.heappop(self._free_slots)
            edits.writes += fetched[0]
            edits.slot_writes.append((s.key, s.slot))
            edits.dropped_pages += fetched[1].host_pages
            edits.dropped_keys.append(s.key)
        copies = self.pool.extend(s.table, s.due)
        assert copies is not None
        edits.copies += copies
        edits.run.append(s.key)
        s.waited = 0
        return True

    def _offload(self, s: PagedSequence, edits: Edits) -> None:
        edits.reads += self.pool.offload(s.table)
        edits.slot_reads.append((s.slot, s.key))
        heapq.heappush(self._free_slots, s.slot)
        s.slot, s.waited = -1, 0
