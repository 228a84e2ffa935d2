"""The sequences in flight: their tables on the host, their pages and slots on the device, and
whatever moves between the two.

`Pager` decides, one for each shard. Here its edits are carried out, by the programs of `state`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from zip_rc_jax.inference import state
from zip_rc_jax.inference.host_memory import HostMemory
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.page_table import Copy, Edits
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.inference.paging import Pager
from zip_rc_jax.inference.prefill import chunk_tokens
from zip_rc_jax.inference.requests import WORTH_SHARING, TokenizedRequest
from zip_rc_jax.inference.state import EDITS, DecodeSpec, PoolSizes, bucket, fine_bucket

RECENT = 64


@dataclasses.dataclass(frozen=True)
class Admitted:
    """A prompt that has a root, whose tokens are not all computed yet.

    Attributes:
      since: when it was admitted, in seconds of the engine's clock.
    """

    job: TokenizedRequest
    shard: int
    root: PagedSequence
    since: float


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A prompt that is computed.

    Attributes:
      joint: `[C]`, after its last token.
      fault: the model failed on it, and its root has ended.
    """

    admitted: Admitted
    joint: np.ndarray
    fault: bool


class RunningBatch:
    """Sequences of all shards.

    Attributes:
      sizes: of each shard.
      pagers: one for each shard.
      pool: the arrays on the device.
    """

    def __init__(
        self,
        settings: DecodeSpec,
        sizes: PoolSizes,
        host_pages: int | None,
        *,
        share: bool,
        clock: Callable[[], float],
        window: int = 0,
    ):
        """Args:
        host_pages: pages that host memory may hold, per shard; None for any number.
        share: whether prompts that begin alike share pages; not where a model keeps more of a
          sequence than its pages.
        window: see `PageAllocator`.
        """
        self.settings, self.sizes, self.share, self.clock = settings, sizes, share, clock
        network = settings.network
        self.shards = network.layout.mesh.shape["data"]
        # A page that holds a whole sequence: lanes are in the order of pages, and the last page is
        # for swaps.
        self.whole = not network.page
        page = network.page or sizes.tokens
        pages = sizes.pages - self.whole
        self.pagers = [
            Pager(PageAllocator(pages, page, window, WORTH_SHARING), sizes.slots, host_pages)
            for _ in range(self.shards)
        ]
        self.pool = state.empty_pool(settings, sizes)
        self._host = HostMemory()
        self._pending = [Edits() for _ in range(self.shards)]
        self._admitted = 0
        self._incomplete: dict[int, Admitted] = {}  # by number of the prompt
        # What prompts took lately: a guess, on which only speed depends.
        self._begun = deque[int](maxlen=RECENT)
        self._lengths = deque[int](maxlen=RECENT)

    @property
    def slots_in_use(self) -> int:
        return sum(pager.slots_in_use for pager in self.pagers)

    # Admission.

    def admit(self, job: TokenizedRequest) -> Admitted | None:
        """Gives a prompt a root in `next_shard`; None if it has to wait."""
        best = self.next_shard()
        pager, config = self.pagers[best], job.config
        tokens = _mean(self._lengths, config.max_tokens)
        begin = _mean(self._begun, config.n)
        if not pager.can_admit(job.ids, config.max_tokens, config.n, tokens, begin):
            return None
        admitted = pager.admit(
            self._admitted, job.ids, config.max_tokens, config.n, tokens, self.share
        )
        if admitted is None:
            return None
        self._admitted += 1
        root, edits = admitted
        self._pending[best].add(edits)
        return Admitted(job, best, root, self.clock())

    def has_room(self) -> bool:
        """Whether any prompt could be admitted."""
        return any(pager.has_room() for pager in self.pagers)

    def next_shard(self) -> int:
        """The shard with the most room: there the next prompt is admitted."""
        return max(range(self.shards), key=self._room)

    def known_tokens(self, job: TokenizedRequest) -> int:
        """First tokens of a prompt whose pages are there already, in `next_shard`."""
        return self.pagers[self.next_shard()].pool.known_tokens(job.ids) if self.share else 0

    @property
    def incomplete(self) -> list[Admitted]:
        """Prompts of which chunks are missing, the oldest first."""
        return list(self._incomplete.values())

    def abandon(self, numbers: set[int]) -> None:
        """Ends those of the incomplete prompts that have these numbers of requests."""
        for prompt, admitted in list(self._incomplete.items()):
            if admitted.job.number in numbers:
                self.stop(admitted.shard, admitted.root)
                del self._incomplete[prompt]

    def prefill_next(
        self, params: Any, planned: Sequence[Sequence[PagedSequence]]
    ) -> list[Prefilled]:
        """A chunk of the oldest incomplete prompt of every shard, of those in `planned`."""
        roots = {s.prompt for part in planned for s in part if s.prompt in self._incomplete}
        oldest: dict[int, Admitted] = {}
        for admitted in self.incomplete:
            if admitted.root.prompt in roots:
                oldest.setdefault(admitted.shard, admitted)
        return self.prefill(params, list(oldest.values())) if oldest else []

    def prefill(self, params: Any, admitted: Sequence[Admitted]) -> list[Prefilled]:
        """Computes prompts that were admitted, or a chunk of each if they are long.

        Returns:
          those that are complete now.
        """
        self.carry_out()
        # The batch as arrays. The width is tight: a padded prompt costs as much as a real one.
        parts = [[a for a in admitted if a.shard == s] for s in range(self.shards)]
        width = bucket(max(map(len, parts)), self.sizes.slots, least=1)
        longest = max(len(a.job.ids) for a in admitted)
        padded = fine_bucket(longest, self.sizes.tokens, least=16)
        shape = (self.shards, width)
        slot = np.full(shape, self.sizes.slots, np.int32)
        table = np.zeros((*shape, self.table_width(padded)), np.int32)
        tokens = np.zeros((*shape, padded), np.int32)
        start, length = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        lane, chunk = {}, chunk_tokens(padded)
        for s, part in enumerate(parts):
            for i, a in enumerate(part):
                lane[a.root.prompt] = at = s, i
                slot[at], start[at] = a.root.slot, a.root.table.length
                length[at] = end = min(start[at] + chunk, len(a.job.ids))
                tokens[s, i, :end] = a.job.ids[:end]
                table[at] = table_row(a.root, table.shape[2])
        steps = chunk
        if start.any():
            steps = bucket(int((length - start).max()), chunk, least=16)
        prompts = state.PrefillInputs(slot, table, tokens, start, length)
        self.pool, joints, fault = state.prefill(self.settings, params, self.pool, prompts, steps)
        joints, fault = np.asarray(joints), np.asarray(fault)
        complete = list[Prefilled]()
        for a in admitted:
            pager, at = self.pagers[a.shard], lane[a.root.prompt]
            pager.advance(a.root, int(length[at] - start[at]))
            rest = len(a.job.ids) - a.root.table.length
            if rest and not fault[at]:
                a.root.live, a.root.due = True, min(chunk, rest)
                self._incomplete[a.root.prompt] = a
                continue
            self._incomplete.pop(a.root.prompt, None)
            a.root.live = False
            complete.append(Prefilled(a, joints[at], bool(fault[at])))
            if fault[at]:
                pager.stop(a.root, self._pending[a.shard], discard=True)
            elif self.share:
                pager.pool.publish(a.root.table, a.job.ids)
        return complete

    def table_width(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens."""
        return -(-tokens // (self.settings.network.page or self.sizes.tokens))

    # What decisions do.

    def fork(self, shard: int, parent: PagedSequence, branch: int) -> PagedSequence:
        """A sequence that begins as `parent`."""
        return self.pagers[shard].fork(parent, branch, self._pending[shard])

    def rename(self, shard: int, root: PagedSequence, branch: int) -> PagedSequence:
        """The root becomes its last sample."""
        self.pagers[shard].rename(root, branch, self._pending[shard])
        return root

    def stop(self, shard: int, sequence: PagedSequence, discard: bool = False) -> None:
        """Ends a sequence; `discard`: what it wrote is not finite."""
        self.pagers[shard].stop(sequence, self._pending[shard], discard)

    def advance(self, shard: int, sequence: PagedSequence, tokens: int) -> None:
        """An interval wrote so many tokens."""
        self.pagers[shard].advance(sequence, tokens)

    def began(self, sequences: int) -> None:
        """A prompt's first decision began so many."""
        self._begun.append(sequences)

    def ended(self, tokens: int) -> None:
        """A sequence of so many generated tokens has ended."""
        self._lengths.append(tokens)

    # An interval.

    def plan(self) -> list[list[PagedSequence]]:
        """The sequences of every shard that run now. They are where they must be, and have their
        pages."""
        plans = [pager.plan() for pager in self.pagers]
        if any(e.reads or e.slot_reads or e.slot_writes for e in plans):
            self.carry_out()
        for pending, plan in zip(self._pending, plans, strict=True):
            pending.add(plan)
        return [
            [pager.prompts[prompt][branch] for prompt, branch in plan.run]
            for pager, plan in zip(self.pagers, plans, strict=True)
        ]

    def arrange(self, running: Sequence[Sequence[PagedSequence]], width: int) -> list[list[int]]:
        """The lane of every sequence in its shard, below `width`, once the edits are carried
        out."""
        if not self.whole:
            return [list(range(len(part))) for part in running]
        for s, (pager, part) in enumerate(zip(self.pagers, running, strict=True)):
            scratch = self.sizes.pages - 1
            self._pending[s].copies += pager.gather_first(part, width, scratch)
        return [[s.table.pages[0] for s in part] for part in running]

    def step(
        self, settings: DecodeSpec, params: Any, lanes: state.StepInputs, steps: int, longest: int
    ) -> state.Stepped:
        """Up to `steps` decode steps of the sequences in the lanes, read back.

        Args:
          longest: tokens that none of them exceeds.
        """
        self.carry_out()
        tokens = fine_bucket(longest, self.sizes.tokens)
        self.pool, after = state.advance(
            settings, params, self.pool, lanes, np.int32(steps), tokens
        )
        return jax.tree.map(np.asarray, after)

    # Carrying out.

    def carry_out(self) -> None:
        """All edits that are pending, on the device."""
        edits, self._pending = self._pending, [Edits() for _ in range(self.shards)]
        # Nobody holds what is to be cleared, and what comes next may take it.
        if any(e.cleared for e in edits):
            pages = self._numbers([e.cleared for e in edits], self.sizes.pages)
            self.pool = state.clear(self.settings, self.pool, pages)
        if any(e.reads or e.slot_reads for e in edits):
            pages = self._numbers([[page for page, _ in e.reads] for e in edits], 0)
            slots = self._numbers([[slot for slot, _ in e.slot_reads] for e in edits], 0)
            self._host.keep(edits, *state.read_out(self.settings, self.pool, pages, slots))
        if any(e.writes or e.slot_writes for e in edits):
            self._write_in(edits)
        if any(e.copies or e.slot_copies for e in edits):
            self._copy(edits)
        self._host.copy_and_drop(edits)

    def _write_in(self, edits: Sequence[Edits]) -> None:
        pages = self._numbers([[page for _, page in e.writes] for e in edits], self.sizes.pages)
        slots = self._numbers(
            [[slot for _, slot in e.slot_writes] for e in edits], self.sizes.slots
        )
        page_like, slot_like = jax.eval_shape(
            lambda pool: state.read_out(self.settings, pool, pages, slots), self.pool
        )
        self.pool = state.write_in(
            self.settings,
            self.pool,
            pages,
            self._host.filled_pages(edits, page_like),
            slots,
            self._host.filled_slots(edits, slot_like),
        )

    def _copy(self, edits: Sequence[Edits]) -> None:
        copies = state.PoolEdits(
            *self._pairs([e.copies for e in edits]), *self._pairs([e.slot_copies for e in edits])
        )
        longest = self._longest_copied(edits) if self.whole else 0
        self.pool = state.edit(self.settings, self.pool, copies, longest)

    def _longest_copied(self, edits: Sequence[Edits]) -> int:
        """Where a page is a whole sequence: how much of it must be copied, rounded."""
        longest = 1
        for pager, mine in zip(self.pagers, edits, strict=True):
            held = {s.table.pages[0]: s.table.length for s in pager.sequences() if s.is_here}
            needed = dict[int, int]()
            # What a page has at the end, or what a later copy takes out of it.
            for source, target in reversed(mine.copies):
                at_the_end = max(held.get(target, 1), pager.pool.cache.tokens_in(target))
                tokens = needed.pop(target, at_the_end)
                needed[source] = max(needed.get(source, 1), tokens)
                longest = max(longest, tokens)
        return fine_bucket(longest, self.sizes.tokens)

    def _pairs(self, pairs: Sequence[Sequence[Copy]]) -> tuple[np.ndarray, np.ndarray]:
        count = np.asarray([len(part) for part in pairs], np.int32)
        table = np.zeros((self.shards, bucket(int(count.max()), least=EDITS), 2), np.int32)
        for row, part in zip(table, pairs, strict=True):
            row[: len(part)] = np.reshape(part, (-1, 2))
        return table, count

    def _numbers(self, numbers: Sequence[Sequence[int]], padding: int) -> np.ndarray:
        size = bucket(max(map(len, numbers)), least=8)
        return np.asarray([[*part, *[padding] * (size - len(part))] for part in numbers], np.int32)

    def _room(self, shard: int) -> tuple[int, int]:
        pager = self.pagers[shard]
        return pager.pool.available, -pager.slots_in_use


def table_row(sequence: PagedSequence, width: int) -> list[int]:
    """The pages of a sequence, cut or filled up to `width`.

    What it has no page for is one of its own, so that nothing of another sequence is ever read.
    """
    held = [page for page in sequence.table.pages if page >= 0]
    pages = [page if page >= 0 else held[0] for page in sequence.table.pages[:width]]
    return [*pages, *held[:1] * (width - len(pages))]


def _mean(recent: deque[int], otherwise: int) -> float:
    """The mean of what was seen, at most `otherwise`."""
    return min(otherwise, sum(recent) / len(recent)) if recent else otherwise
