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

import heapq
import math
from collections.abc import Sequence

from zip_rc_jax.inference.page_policy import PagedSequence, check_worst_case, predicted_peak
from zip_rc_jax.inference.page_table import Edits, PageError
from zip_rc_jax.inference.paged_sequences import ROOT, Claim, PagedSequences


class Pager(PagedSequences):
    """Admission and shortage. Every decision depends on the state of the sequences alone."""

    # Admission.

    def has_room(self) -> bool:
        """Whether any prompt may begin now: nobody waits, and there is a slot and a page."""
        late = any(s.due and (s.waited or not s.is_here) for s in self.sequences())
        return bool(not late and self._free_slots and self.pool.available)

    def check(self, prompt: int, max_tokens: int, n: int) -> None:
        """Raises UsageError for a prompt that could not finish even alone, see
        `check_worst_case`."""
        check_worst_case(self.pool, self.slots, self.host_pages, prompt, max_tokens, n)

    def can_admit(
        self,
        ids: Sequence[int],
        max_tokens: int,
        n: int,
        expected: float,
        begin: float | None = None,
    ) -> bool:
        """Whether a prompt that `check` let pass should begin now.

        Those that wait for pages come first. Then the pages that are predicted for all sequences
        in flight and for its own must be there. Where nothing is in flight, it always begins.

        Args:
          max_tokens, n: the most tokens of a sequence, and the most sequences.
          expected: tokens that a sequence will probably have.
          begin: sequences that will probably begin at once; None for all.
        """
        if not self.prompts:
            return True
        if not self.has_room():
            return False
        begin = n if begin is None else math.ceil(begin)
        undecided = [self._claims[root.prompt] for root in self._undecided()]
        slots = min(begin + 1, n) + sum(min(begin, claim.n - 1) for claim in undecided)
        needs = self.pool.open_needs(ids)
        if slots > len(self._free_slots) or needs > self.pool.available:
            return False
        claim = self._claim(ids, max_tokens, n)
        if needs > self._host_room([claim]):
            return False
        new = self._samples(claim, expected, begin)
        for root in self._undecided():
            new += self._samples(self._claims[root.prompt], root.remaining, begin)
        return self._peak(needs, new) <= self.fill * self.pool.num_pages

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
        `pool.publish`. To do that in chunks, it makes the root live, and a chunk of tokens due.

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
        self._claims[prompt] = self._claim(ids, max_tokens, n)
        return root, Edits(copies=copies)

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
            more = [(self._needs(s), self._growth(s, s.due)) for s in group]
            fits = needs <= self.pool.available and len(group) <= len(self._free_slots)
            if prompt != first:
                fits &= needs <= room
                for root in self._undecided():
                    claim = self._claims[root.prompt]
                    more += self._samples(claim, root.remaining, claim.n)
                fits &= self._peak(needs, more) <= self.fill * self.pool.num_pages
                room -= needs
            if not fits:
                return
            for sequence in group:
                self._run(sequence, edits)

    def _peak(self, new_pages: int, new: list[tuple[int, int]]) -> float:
        """`predicted_peak` of what is on the device, and of new sequences."""
        growing = [
            (self.pool.gives_back(s.table), self._growth(s))
            for s in self.sequences()
            if s.live and s.is_here
        ]
        held = self.pool.num_pages - self.pool.available + new_pages
        return predicted_peak(held, [*growing, *new])

    def _growth(self, s: PagedSequence, due: int = 0) -> int:
        """Pages that a sequence will still take, if its predicted length is right, besides those
        for `due` tokens."""
        length = s.table.length
        held = max(len(s.table.pages), self.pool.pages_for(length + due))
        return max(0, self.pool.pages_for(math.ceil(length + s.remaining)) - held)

    def _samples(self, claim: Claim, expected: float, begin: int) -> list[tuple[int, int]]:
        """The samples that a prompt begins with, as `predicted_peak` has them.

        Each has a last page of the prompt for itself once it writes. The root keeps its own, or the
        last sample takes it over.
        """
        size, count = self.pool.page_size, min(begin, claim.n)
        more = self.pool.pages_for(math.ceil(claim.tokens + expected)) - claim.tokens // size
        takes_over = count == claim.n and claim.tokens % size > 0
        return [(0, more)] * (count - takes_over) + [(0, more - 1)] * takes_over

    def _claim(self, ids: Sequence[int], max_tokens: int, n: int) -> Claim:
        return Claim(len(ids), n, self.pool.pages_for(len(ids) + max_tokens))

    def _undecided(self) -> list[PagedSequence]:
        """Roots of prompts whose sequences have not begun."""
        return [f[ROOT] for f in self.prompts.values() if len(f) == 1 and ROOT in f]
