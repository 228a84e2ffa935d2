"""How many sequences a chip holds with pages, and with a dense slot each: a simulation.

    python benchmarks/paged.py [--prompts 10000] [--mean-length 4096] [--chip v5e v5p h200] [--n 8]
                               [--forks 0] [--seed 0] [--config configs/qwen3_1.7b.yaml]

The allocator and the pager are those of the engine (`inference.pages`, `inference.paging`).
The model and the search are scripted:

- Prompts have 300 tokens. The lengths of their samples are log-normal (sigma 0.6 between prompts,
  0.5 within one), cut at `decode.max_tokens`.
- The head predicts what is left up to a log-normal factor (sigma 0.3).
- All `--n` samples begin at once, as in the published search; with `--forks 0.5` half of them begin
  as a fork of another one, at a decision of its first half. A decision every 64 tokens pauses a
  live prefix with probability 0.4% before one of its prompt has finished, and 4% after that; it
  resumes a paused one with 1%. A prompt ends when nothing is live and one has finished.

The pool is 90% of what the weights leave. Steps are bound by bandwidth: the weights once, and the
keys and values of every stepped sequence. Pages to and from host memory take the time of the link.
Prefill takes none. Dense: every slot has the greatest possible length and one slot is scratch; all
slots are always busy; a TPU reads all rows to the bucket of the longest one, as before version 0.2.

The means are over the intervals in which prompts wait for room. A sequence that is offloaded twice
without a token between would be a loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import random
import statistics
from collections import deque

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.config.model import ModelConfig
from zip_rc_jax.inference.page_policy import PagedSequence
from zip_rc_jax.inference.page_table import Edits
from zip_rc_jax.inference.paged_sequences import ROOT
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.inference.paging import Pager
from zip_rc_jax.inference.state import fine_bucket
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "qwen3_1.7b.yaml")
PROMPT, INTERVAL, BYTES = 300, 64, 2  # bfloat16
PAUSES, PAUSES_LATE, RESUMES = 0.004, 0.04, 0.01


@dataclasses.dataclass(frozen=True)
class Chip:
    """GiB that a program may use, GB/s of its memory and of the link to the host, GiB of host
    memory for each chip, tokens of a page."""

    memory: float
    bandwidth: float
    link: float
    host: float
    page: int
    reads_to_longest: bool


CHIPS = {
    "v5e": Chip(16, 819, 16, 48, 128, True),
    "v5p": Chip(95, 2765, 16, 100, 128, True),
    "h200": Chip(139, 4800, 50, 200, 64, False),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes: weights that are held, those that a step reads, keys and values of a token, and the
    other state of a slot."""

    held: int
    read: int
    token: int
    slot: int

    @classmethod
    def of(cls, model: ModelConfig, decode: DecodeConfig, cells: int) -> Sizes:
        heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim
        layers = model.n_layers * model.d_model * (heads + 3 * model.d_ff)
        table = model.vocab_size * model.d_model  # the embedding, and its folded copy to read
        token = 2 * model.n_layers * model.n_kv_heads * model.head_dim
        slot = 4 * (model.vocab_size + decode.window * cells + 2 * (PROMPT + decode.max_tokens))
        return cls(BYTES * (layers + 2 * table), BYTES * (layers + table), BYTES * token, slot)

    def pool(self, chip: Chip) -> float:
        """Bytes of the pool: 90% of what the weights leave."""
        return 0.9 * (chip.memory * 2**30 - self.held)


@dataclasses.dataclass
class Prompt:
    """A prompt with the lengths of its samples, and what its search does with them."""

    number: int
    lengths: list[int]
    forked: set[int]  # samples that begin as a fork
    rng: random.Random
    finished: int = 0
    begun: int = 0

    @property
    def ids(self) -> list[int]:
        return [self.number] * PROMPT  # no two prompts begin alike


@dataclasses.dataclass
class Counts:
    """Sums over a run; `loaded` ones over the intervals in which prompts waited."""

    seconds: float = 0.0
    tokens: int = 0
    starts: int = 0
    copies: int = 0
    pauses: int = 0
    offloads: int = 0
    loops: int = 0
    refused: int = 0
    loaded: int = 0
    on_device: int = 0
    stepped: int = 0
    used: float = 0.0
    late: int = 0


def prompts_of(count: int, n: int, mean: float, most: int, forks: float, seed: int):
    """Prompts with log-normal lengths of this mean, before they are cut at `most`."""
    rng = random.Random(seed)
    center = math.log(mean) - (0.6**2 + 0.5**2) / 2
    for number in range(count):
        hard = rng.gauss(0, 0.6)
        lengths = [
            max(1, min(most, round(math.exp(center + hard + rng.gauss(0, 0.5))))) for _ in range(n)
        ]
        forked = {i for i in range(1, n) if rng.random() < forks}
        yield Prompt(number, lengths, forked, random.Random(rng.random()))


class Simulation:
    """One chip, its pager, and the prompts in flight."""

    def __init__(
        self, chip: Chip, sizes: Sizes, decode: DecodeConfig, n: int, mean: float, fill: float
    ):
        self.chip, self.sizes, self.decode, self.n, self.mean = chip, sizes, decode, n, mean
        page = chip.page * sizes.token
        pool = PageAllocator(int(sizes.pool(chip) / page), chip.page)
        # Slots get half of what the pool leaves free.
        slots = min(1024, int(sizes.pool(chip) / 18 / sizes.slot))
        self.pager = Pager(pool, slots, int(chip.host * 2**30 / page), fill)
        self.flying: dict[int, Prompt] = {}
        self.counts = Counts()
        self.fresh: set[tuple[int, int]] = set()  # fetched, and no token since

    def run(self, prompts, update) -> Counts:
        waiting = deque(itertools.islice(prompts, 1))
        done = 0
        while waiting or self.flying:
            while waiting and self.begin(waiting[0]):
                waiting.popleft()
                waiting.extend(itertools.islice(prompts, 1))
            for prompt in list(self.flying.values()):
                if self.pager.is_settled(prompt.number):
                    done += self.decide(prompt)
            update(done, f"{len(self.flying)} in flight")
            self.step(loaded=bool(waiting))
        return self.counts

    def begin(self, prompt: Prompt) -> bool:
        """Whether a prompt has left the queue: it is in flight now, or refused."""
        ids, most = prompt.ids, self.decode.max_tokens
        try:
            self.pager.check(len(ids), most, self.n)
        except UsageError:
            self.counts.refused += 1
            return True
        if not self.pager.can_admit(ids, most, self.n, self.mean):
            return False
        admitted = self.pager.admit(prompt.number, ids, most, self.n, self.mean)
        if admitted is None:
            return False
        root, edits = admitted
        self.counts.copies += len(edits.copies)
        self.pager.advance(root, len(ids) - root.table.length)
        self.pager.pool.publish(root.table, ids)
        self.flying[prompt.number] = prompt
        return True

    def decide(self, prompt: Prompt) -> int:
        """Carries out one decision of the scripted search. Whether the prompt has ended."""
        family, edits = self.pager.prompts[prompt.number], Edits()
        for s in [s for b, s in family.items() if b != ROOT]:
            if s.table.length - PROMPT >= prompt.lengths[s.branch]:
                prompt.finished += 1
                self.pager.stop(s, edits)
            elif s.live:
                s.live = prompt.rng.random() >= (PAUSES_LATE if prompt.finished else PAUSES)
                self.counts.pauses += not s.live
            else:
                s.live = prompt.rng.random() < RESUMES
        self.start(prompt, family, edits)
        live = [s for s in family.values() if s.live]
        if not live and not prompt.finished:
            live = [s for s in family.values() if s.branch != ROOT][:1]  # one goes on at least
        if not live:
            for s in list(family.values()):
                self.pager.stop(s, edits)
            del self.flying[prompt.number]
        for s in live:
            self.give_due(prompt, s)
        self.count(edits)
        return not live

    def start(self, prompt: Prompt, family: dict[int, PagedSequence], edits: Edits) -> None:
        """Samples that begin now: at first those of the root, later forks of live ones."""
        first = not prompt.begun
        for branch in range(self.n):
            parent = family.get(ROOT) if first and branch not in prompt.forked else None
            if not first and branch in prompt.forked and prompt.rng.random() < 0.05:
                live = [s for b, s in family.items() if b != ROOT and s.live]
                early = [s for s in live if 2 * s.table.length < prompt.lengths[s.branch]]
                parent = prompt.rng.choice(early) if early else family.get(ROOT)
                prompt.forked.discard(branch)
            if parent is None:
                continue
            prompt.begun += 1
            self.counts.starts += 1
            if parent.branch == ROOT and prompt.begun == self.n:
                self.pager.rename(parent, branch, edits)
                parent.live = True
            else:
                self.pager.fork(parent, branch, edits).live = True
        if prompt.begun == self.n and ROOT in family:
            self.pager.stop(family[ROOT], edits)

    def give_due(self, prompt: Prompt, s: PagedSequence) -> None:
        s.live = True
        left = max(1, prompt.lengths[s.branch] - (s.table.length - PROMPT))
        s.due = min(INTERVAL, left)
        s.remaining = left * math.exp(prompt.rng.gauss(0, 0.3))
        s.utility = prompt.rng.random()

    def step(self, loaded: bool) -> None:
        """One interval: edits, then steps as fast as the memory is read."""
        edits, counts, pool = self.pager.plan(), self.counts, self.pager.pool
        self.count(edits)
        if loaded:
            here = [s for s in self.pager.sequences() if s.is_here and s.branch != ROOT]
            counts.loaded += 1
            counts.on_device += len(here)
            counts.stepped += len(edits.run)
            counts.late += sum(s.waited > 0 for s in here)
            counts.used += 1 - pool.available / pool.num_pages
        read = steps = 0
        for prompt, branch in edits.run:
            s = self.pager.prompts[prompt][branch]
            read += s.due * (s.table.length + s.due // 2)
            steps = max(steps, s.due)
            counts.tokens += s.due
            self.pager.advance(s, s.due)
        moved = steps * self.sizes.read + read * self.sizes.token
        counts.seconds += moved / self.chip.bandwidth / 1e9
        self.fresh -= set(edits.run)

    def count(self, edits: Edits) -> None:
        """Counts edits and the time that they take."""
        page, counts = self.chip.page * self.sizes.token, self.counts
        counts.copies += len(edits.copies)
        counts.offloads += len(edits.slot_reads)
        counts.loops += len(self.fresh & {key for _, key in edits.slot_reads})
        self.fresh |= {key for key, _ in edits.slot_writes}
        moved = len(edits.reads) + len(edits.writes)
        counts.seconds += moved * page / self.chip.link / 1e9
        counts.seconds += 2 * len(edits.copies) * page / self.chip.bandwidth / 1e9


def dense(chip: Chip, sizes: Sizes, decode: DecodeConfig, prompts, intervals: int):
    """(slots, tokens per second) of a pool of dense slots that are always busy."""
    longest = PROMPT + decode.max_tokens
    slots = max(1, int(sizes.pool(chip) / sizes.token / longest) - 1)
    lengths = (length for prompt in prompts for length in prompt.lengths)
    rows = [(0, length) for length in itertools.islice(lengths, slots)]
    tokens = seconds = 0.0
    for _ in range(intervals):
        most = max(PROMPT + done for done, _ in rows) + INTERVAL
        each = [fine_bucket(most, longest)] * slots if chip.reads_to_longest else [
            PROMPT + done + INTERVAL // 2 for done, _ in rows
        ]  # fmt: skip
        moved = INTERVAL * (sizes.read + sum(each) * sizes.token)
        seconds += moved / chip.bandwidth / 1e9
        tokens += sum(min(INTERVAL, length - done) for done, length in rows)
        rows = [
            (done + INTERVAL, length) if done + INTERVAL < length else (0, next(lengths))
            for done, length in rows
        ]
    return slots, tokens / seconds


def row(simulation: Simulation, prompts: int, slots: int, rate: float) -> list[str]:
    """The cells of the table; `slots` and `rate` are those of `dense`."""
    c, pages = simulation.counts, simulation.pager.pool.num_pages
    many = max(1, c.loaded)
    flight, ours = c.on_device / many, c.tokens / max(c.seconds, 1e-9)
    return [
        f"{pages:,}", f"{slots}", f"{flight:.1f}", f"{flight / slots:.1f}",
        f"{c.stepped / many:.1f}", f"{c.late / many:.2f}", f"{c.used / many:.1%}",
        f"{c.starts:,}", f"{c.copies:,}", f"{c.pauses:,}", f"{c.offloads:,}", f"{c.loops}",
        f"{c.refused}", f"{c.tokens / prompts:,.0f}", f"{ours:,.0f}", f"{rate:,.0f}",
        f"{ours / rate:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--mean-length", type=float, default=4096, help="tokens of a sample")
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--n", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--forks", type=float, default=0.0, help="share of samples that are forks")
    parser.add_argument("--fill", type=float, default=1.35, help="see `Pager`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--config", default=CONFIG, help="YAML file with a model and decode section"
    )
    args = parser.parse_args()
    config = load_config(args.config, [])
    sizes = Sizes.of(config.model, config.decode, config.grid.grid("value").n_cells)
    most, mean = config.decode.max_tokens, args.mean_length

    def prompts(seed: int, count: int):
        return prompts_of(count, args.n, mean, most, args.forks, seed)

    sample = [length for p in prompts(args.seed, 1000) for length in p.lengths]
    print(
        f"{pathlib.Path(args.config).stem}: {sizes.held / 2**30:.2f} GiB of weights, "
        f"{sizes.token / 2**10:.0f} KiB of keys and values a token; {args.prompts:,} prompts of "
        f"{PROMPT} tokens, n={args.n}, up to {most:,} tokens, {statistics.mean(sample):,.0f} on "
        f"average\n"
    )
    print(
        "| chip | pages | dense slots | in flight | ratio | stepped | late | pages in use | starts "
        "and forks | copies | paused | offloads | loops | refused | tokens a prompt | tokens/s | "
        "dense tokens/s | ratio |"
    )
    print("|---" * 18 + "|")
    for name in args.chip:
        simulation = Simulation(CHIPS[name], sizes, config.decode, args.n, mean, args.fill)
        with progress(name, args.prompts) as update:
            simulation.run(prompts(args.seed, args.prompts), update)
        others = prompts(args.seed + 1, 10**9)
        intervals = min(20_000, 50 * args.prompts)
        compared = dense(CHIPS[name], sizes, config.decode, others, intervals)
        print(f"| {name} | {' | '.join(row(simulation, args.prompts, *compared))} |", flush=True)


if __name__ == "__main__":
    main()
