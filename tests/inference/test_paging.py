"""Shortage of pages delays sequences and changes nothing else: every prompt ends, decides as if it
were alone, and reads its own tokens from wherever they were moved."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.page_model import Device
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.inference.paging import ROOT, Edits, Pager
from zip_rc_jax.runtime.errors import UsageError

INTERVAL = 3


@dataclasses.dataclass(frozen=True)
class Script:
    """A prompt and what its search will do, which depends on nothing else."""

    seed: int
    prompt: int
    max_tokens: int
    n: int

    @property
    def ids(self):
        return [7, 7, 7, 7, *range(self.seed, self.seed + self.prompt)][-self.prompt :]

    def length(self, branch):
        return random.Random(f"{self.seed} {branch}").randint(1, self.max_tokens)

    def decide(self, step, unfinished, begun):
        """(branches to extend, branches to fork, new samples)."""
        rng = random.Random(f"{self.seed} at {step}")
        new = rng.randint(0, self.n - begun)
        samples = rng.randint(0, new) if unfinished else max(1, new) if begun < self.n else 0
        forks = rng.choices(unfinished, k=new - samples) if unfinished else []
        live = [b for b in unfinished if rng.random() < 0.7 or b in forks]
        return live or unfinished[:1] * (not samples), forks, samples


class Run:
    """Prompts through a pager, on the slow model of a device."""

    def __init__(self, pager, scripts):
        self.pager, self.scripts = pager, scripts
        pool = pager.pool
        self.device = Device(pool.num_pages, pool.page_size, pager.slots)
        self.tokens = {}  # of every sequence
        self.trace = {number: [] for number in range(len(scripts))}
        self.ended, self.plans = [], 0

    def run(self):
        waiting = list(range(len(self.scripts)))
        while waiting or self.pager.prompts:
            while waiting and self.begin(waiting[0]):
                waiting.pop(0)
            for number in list(self.pager.prompts):
                if self.pager.is_settled(number):
                    self.decide(number)
            self.step()
        return self

    def begin(self, number):
        script = self.scripts[number]
        self.pager.check(script.prompt, script.max_tokens, script.n)
        asked = (script.ids, script.max_tokens, script.n, script.max_tokens / 2)
        if not self.pager.can_admit(*asked):
            return False
        root, edits = self.pager.admit(number, *asked)
        self.device.carry_out(edits)
        self.write(root, script.ids[root.table.length :])
        self.tokens[root.key] = script.ids
        self.device.slots[root.slot] = script.ids
        self.pager.pool.publish(root.table, script.ids)
        return True

    def decide(self, number):
        script, family = self.scripts[number], self.pager.prompts[number]
        edits, begun = Edits(), len(self.trace[number]) and self.trace[number][-1][-1]
        for branch in [b for b in family if b != ROOT]:
            if len(self.tokens[number, branch]) >= script.prompt + script.length(branch):
                self.pager.stop(family[branch], edits)
        unfinished = [b for b in family if b != ROOT]
        step = len(self.trace[number])
        live, forks, samples = script.decide(step, unfinished, begun)
        parents = [*forks, *[ROOT] * samples]
        for branch, parent in enumerate(parents, begun):
            self.tokens[number, branch] = self.tokens[number, parent]
            if parent == ROOT and branch == script.n - 1:
                self.pager.rename(family[ROOT], branch, edits)
            else:
                self.pager.fork(family[parent], branch, edits)
        begun += len(parents)
        if begun == script.n and ROOT in family:
            self.pager.stop(family[ROOT], edits)
        for branch, sequence in family.items():
            written = len(self.tokens[number, branch]) - script.prompt
            sequence.live = branch in live or branch >= begun - len(parents)
            left = script.length(branch) - written if branch != ROOT else 0
            sequence.due = min(INTERVAL, max(left, 0)) * sequence.live
            sequence.remaining, sequence.utility = left, branch % 3
        lengths = {b: len(self.tokens[number, b]) for b in family}
        self.trace[number].append((lengths, live, parents, begun))
        if begun == script.n and not family:
            self.ended.append(number)
        self.device.carry_out(edits)

    def step(self):
        if not self.pager.prompts:
            return
        first = min((s.prompt for s in self.pager.sequences() if s.due), default=None)
        edits = self.pager.plan()
        self.device.carry_out(edits)
        self.plans += 1
        if first is not None:
            assert any(prompt == first for prompt, _ in edits.run), "the oldest makes progress"
        assert {key for key, _ in edits.slot_writes} <= set(edits.run), "fetched ones run at once"
        for prompt, branch in edits.run:
            sequence = self.pager.prompts[prompt][branch]
            before = self.tokens[prompt, branch]
            self.check(sequence)
            new = [hash((prompt, branch, len(before) + i)) for i in range(sequence.due)]
            self.write(sequence, new)
            self.tokens[prompt, branch] = [*before, *new]
            self.device.slots[sequence.slot] = self.tokens[prompt, branch]
        limit = self.pager.host_pages
        assert limit is None or len(self.device.host) <= limit
        assert self.device.host_slots.keys() == {
            s.key for s in self.pager.sequences() if not s.is_here
        }

    def write(self, sequence, new):
        table, size = sequence.table, self.pager.pool.page_size
        for i, token in enumerate(new, table.length):
            self.device.pages[table.pages[i // size]][i % size] = token
        self.pager.advance(sequence, len(new))

    def check(self, sequence):
        tokens, size = self.tokens[sequence.key], self.pager.pool.page_size
        assert self.device.slots[sequence.slot] == tokens
        pages = [self.device.pages[page] for page in sequence.table.pages]
        assert [pages[i // size][i % size] for i in range(len(tokens))] == tokens


SCRIPTS = st.lists(
    st.builds(Script, st.integers(0, 40), st.integers(1, 9), st.integers(1, 14), st.integers(1, 4)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    scripts=SCRIPTS,
    page_size=st.sampled_from([1, 4, 23]),
    spare=st.integers(0, 12),
    slots=st.integers(1, 8),
    host=st.sampled_from([None, None, 0, 30]),
    fill=st.sampled_from([0.7, 1.0, 2.0]),
)
def test_all_prompts_end_and_decide_as_they_do_alone(scripts, page_size, spare, slots, host, fill):
    pool = PageAllocator(-(-23 // page_size) + spare, page_size, least_copied=2)
    pager = Pager(pool, slots, host, fill)
    fitting = []
    for script in scripts:
        try:
            pager.check(script.prompt, script.max_tokens, script.n)
        except UsageError:
            continue
        fitting.append(script)
    run = Run(pager, fitting).run()
    assert sorted(run.ended) == list(range(len(fitting)))
    for number, script in enumerate(fitting):
        roomy = Pager(PageAllocator(500, page_size), 50)
        alone = Run(roomy, [script]).run()
        assert run.trace[number] == alone.trace[0]
    assert pool.available == pool.num_pages
    assert not run.device.host
