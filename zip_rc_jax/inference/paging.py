"""Sequences of one shard over pages and slots: admission, shortage, and the way to host memory.

Host code, without JAX. The search decides what a prompt does; the pager decides when. A sequence
that lacks pages is late, and its prompt's next decision waits for it. So no result changes.

An interval:

  1. For every decision, the caller sets `live`, `due`, `utility` and `remaining` of the sequences.
  2. `plan` says which of them run now, and which edits come first.
  3. The caller carries out the edits, runs the interval, and calls `advance` for each that ran.
  4. A prompt is decided again when `is_settled` says that none of its sequences is due.

**Nobody waits for ever.** Take the prompt that was admitted first, and of its due sequences the
first. It runs in every plan: `check_worst_case` made sure that it fits the device alone, and all
others can leave for host memory, which keeps room for them (`_host_room`). So each plan writes a
token of this prompt, its tokens are bounded, and it ends. Then the next prompt is the first.

**No preemption loop.** A sequence is fetched in the same plan in which it runs. So it makes
progress between any two times that it leaves.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

from zip_rc_jax.inference.page_policy import (
    PagedSequence,
    Value,
    check_worst_case,
    predicted_peak,
    utility_per_page,
)
from zip_rc_jax.inference.page_table import Edits, PageError
from zip_rc_jax.inference.pages import PageAllocator

ROOT = -1


@dataclasses.dataclass
class _Claim:
    """What a prompt may come to: sequences, those that have begun, and pages of a full one."""

    n: int
    full: int
    begun: int = 0


class Pager:
    """The sequences of one shard. Every decision depends on its state alone."""

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
        value: what a sequence is worth; the least leave first.
        """
        self.pool, self.slots, self.host_pages = pool, slots, host_pages
        self.fill, self.value = fill, value
        self.prompts: dict[int, dict[int, PagedSequence]] = {}  # by prompt and branch
        self._free_slots = list(range(slots))
        self._claims: dict[int, _Claim] = {}

    def sequences(self) -> Iterator[PagedSequence]:
        """All of them, the oldest prompt first."""
        return (s for family in self.prompts.values() for s in family.values())

    # Admission.

    def check(self, prompt: int, max_tokens: int, n: int) -> None:
        """Raises UsageError for a prompt that could not finish even alone, see
        `check_worst_case`."""
        check_worst_case(self.pool, self.slots, self.host_pages, prompt, max_tokens, n)

    def can_admit(self, ids: Sequence[int], max_tokens: int, n: int, expected: float) -> bool:
        """Whether a prompt that `check` let pass should begin now.

        Those that wait for pages come first. Then the pages that are predicted for all sequences
        in flight and for its own must be there. Where nothing is in flight, it always begins.

        Args:
          max_tokens, n: the most tokens of a sequence, and the most sequences.
          expected: tokens that a sequence will probably have.
        """
        if not self.prompts:
            return True
        if any(s.due and (s.waited or not s.is_here) for s in self.sequences()):
            return False
        needs = self.pool.open_needs(ids)
        new = [(0.0, expected / self.pool.page_size + 1)] * n
        unborn = sum(self._claims[root.prompt].n for root in self._undecided())
        has_room = len(self._free_slots) >= n + unborn and needs <= self.pool.available
        host = self._host_room([_Claim(n, self.pool.pages_for(len(ids) + max_tokens))])
        return (
            has_room and needs <= host and self._peak(needs, new) <= self.fill * self.pool.num_pages
        )

    def admit(
        self,
        prompt: int,
        ids: Sequence[int],
        max_tokens: int,
        n: int,
        expected: float,
        share: bool = True,
    ) -> tuple[PagedSequence, Edits] | None:
        """The root of a prompt, with pages for all its tokens; None if pages are missing.

        The caller computes the tokens behind `root.table.length`, and calls `advance` and
        `pool.publish`.

        Args:
          prompt: larger than those admitted before.
          max_tokens, n, expected: as in `can_admit`. The caller sets `root.remaining` to what the
            head predicts, as soon as it does.
          share: see `PageAllocator.open`.
        """
        if not self._free_slots:
            return None
        table, copies = self.pool.open(ids, share)
        if self.pool.extend(table, len(ids) - table.length) is None:
            self.pool.stop(table)
            return None
        root = PagedSequence(prompt, ROOT, table, heapq.heappop(self._free_slots))
        root.remaining = expected
        self.prompts[prompt] = {ROOT: root}
        self._claims[prompt] = _Claim(n, self.pool.pages_for(len(ids) + max_tokens))
        return root, Edits(copies=copies)

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

    def is_settled(self, prompt: int) -> bool:
        """Whether no sequence of a prompt is due, so that it can be decided."""
        return not any(s.due for s in self.prompts[prompt].values())

    # An interval.

    def plan(self) -> Edits:
        """Which due sequences run now, and what comes before that."""
        edits = Edits()
        due = [s for s in self.sequences() if s.due]
        if not due:
            return edits
        # Nearly always all are here, and there is room for all.
        needs, room = sum(map(self._needs, due)), self._host_room()
        if needs <= min(self.pool.available, room) and all(s.is_here for s in due):
            for sequence in due:
                self._run(sequence, edits)
            return edits
        first = min(s.prompt for s in due)
        stalled = {s.prompt for s in due if s.waited or not s.is_here}
        here = sorted((s for s in due if s.is_here), key=lambda s: self._rank(s, first, stalled))
        away = sorted((s for s in due if not s.is_here), key=lambda s: s.key)
        must = min((s for s in due if s.prompt == first), key=lambda s: (not s.is_here, s.key))
        # Make room, then give it out: to the one that must run, to those that are here in order of
        # value, and to those that come back in order of age.
        self._make_room(here, must, stalled, edits)
        if not self._run(must, edits):
            raise PageError("one sequence does not fit the device: it was admitted unchecked")
        late = 0
        for sequence in (s for s in here if s is not must and s.is_here):
            needs = self._needs(sequence)
            if (sequence.prompt == first or needs <= room) and self._run(sequence, edits):
                room -= needs
            else:
                sequence.waited += 1
                late += 1
        if not late:
            self._fetch([s for s in away if s is not must], first, room, edits)
        return edits

    def _rank(self, s: PagedSequence, first: int, stalled: set[int]) -> tuple:
        """Sorts due sequences: who runs first comes first. A prompt whose decision waits anyway
        gains nothing from its other sequences."""
        return s.prompt != first, s.prompt in stalled, -self.value(s, self.pool), s.key

    def _make_room(
        self, here: list[PagedSequence], must: PagedSequence, stalled: set[int], edits: Edits
    ) -> None:
        """Offloads sequences until those that are due here can run, and the one that must.

        First those that the search has paused, least utility per page first: nobody waits for them.
        Others leave only where waiting was not enough: someone waited before, or `must` lacks room.
        """

        def kind(s: PagedSequence) -> int:
            if not s.live:
                return 0
            return 3 if s.prompt == must.prompt else 1 if s.prompt in stalled else 2

        wanted = {s.key: s for s in [must, *here]}
        leaving = sorted(
            (s for s in self.sequences() if s.is_here and s is not must),
            key=lambda s: (kind(s), self.value(s, self.pool), -s.prompt, -s.branch),
        )
        for victim in leaving:
            needs_slot = not must.is_here and not self._free_slots
            shortage = sum(map(self._needs, wanted.values())) - self.pool.available
            if shortage <= 0 and not needs_slot:
                return
            if kind(victim) and not needs_slot and not self._is_urgent(list(wanted.values())):
                return
            gains = self.pool.gives_back(victim.table) or self._needs(victim)
            if (needs_slot or gains) and self._fits_host(victim):
                wanted.pop(victim.key, None)
                self._offload(victim, edits)
        # Pages that several sequences share come free with the last of them.
        for victim in leaving:
            fits = victim.is_here and self._fits_host(victim)
            if self._needs(must) > self.pool.available and fits:
                self._offload(victim, edits)

    def _is_urgent(self, wanted: list[PagedSequence]) -> bool:
        """Whether the pages that are there leave out the first one, or one that waited before."""
        left = self.pool.available
        for i, sequence in enumerate(wanted):
            needs = self._needs(sequence)
            if needs <= left:
                left -= needs
            elif i == 0 or sequence.waited:
                return True
        return False

    def _fetch(self, away: list[PagedSequence], first: int, room: float, edits: Edits) -> None:
        """Brings sequences back, the oldest prompt first and each prompt as a whole, as far as the
        pages that they are predicted to need are there. One that does not fit stops those behind.
        """
        for prompt in sorted({s.prompt for s in away}):
            group = [s for s in away if s.prompt == prompt]
            needs = sum(map(self._needs, group))
            more = [(float(self._needs(s)), s.remaining / self.pool.page_size) for s in group]
            fits = needs <= self.pool.available and len(group) <= len(self._free_slots)
            if prompt != first:
                fits &= needs <= room
                fits &= self._peak(needs, more) <= self.fill * self.pool.num_pages
                room -= needs
            if not fits:
                return
            for sequence in group:
                self._run(sequence, edits)

    # Inside.

    def _needs(self, s: PagedSequence) -> int:
        """Pages that are taken if a sequence runs now."""
        if s.is_here:
            return self.pool.needs(s.table, s.due)
        more = self.pool.pages_for(s.table.length + s.due) - len(s.table.pages)
        return self.pool.fetch_needs(s.table) + more

    def _peak(self, new_pages: int, new: list[tuple[float, float]]) -> float:
        """`predicted_peak` of what is on the device, and of new sequences."""
        size = self.pool.page_size
        growing = [
            (float(self.pool.gives_back(s.table)), s.remaining / size)
            for s in self.sequences()
            if s.live and s.is_here
        ]
        for root in self._undecided():
            growing += [(0.0, root.remaining / size + 1)] * self._claims[root.prompt].n
        held = self.pool.num_pages - self.pool.available + new_pages
        return predicted_peak(held, [*growing, *new])

    def _undecided(self) -> list[PagedSequence]:
        """Roots of prompts whose sequences have not begun."""
        return [f[ROOT] for f in self.prompts.values() if len(f) == 1 and ROOT in f]

    def _host_room(self, newcomers: Sequence[_Claim] = ()) -> float:
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
