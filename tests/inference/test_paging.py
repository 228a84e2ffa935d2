"""Shortage of pages delays sequences and changes nothing else: every prompt ends, decides as if it
were alone, and reads its own tokens from wherever they were moved."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.page_model import Device
from zip_rc_jax.inference.page_policy import (
    PagedSequence,
    check_worst_case,
    predicted_peak,
    utility_per_page,
)
from zip_rc_jax.inference.page_table import Edits, PageError, PageTable
from zip_rc_jax.inference.paged_sequences import ROOT
from zip_rc_jax.inference.pages import PageAllocator
from zip_rc_jax.inference.paging import Pager
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
    max_size=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    scripts=SCRIPTS,
    page_size=st.sampled_from([1, 4, 23]),
    spare=st.integers(0, 12),
    slots=st.sampled_from([2, 5, 8, 30]),
    host=st.none() | st.integers(0, 90),
    fill=st.sampled_from([0.7, 1.35, 9.0]),
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


# ---- what is admitted


@given(
    prompt=st.integers(1, 60),
    max_tokens=st.integers(1, 60),
    n=st.integers(1, 9),
    num_pages=st.integers(1, 30),
    slots=st.integers(1, 9),
    host=st.sampled_from([None, 0, 10, 40]),
)
def test_what_a_refusal_advises_is_not_refused(prompt, max_tokens, n, num_pages, slots, host):
    pool = PageAllocator(num_pages, 4)

    def refusal(max_tokens, n):
        try:
            check_worst_case(pool, slots, host, prompt, max_tokens, n)
        except UsageError as error:
            return error
        return None

    if error := refusal(max_tokens, n):
        for name, value in re.findall(r"(max_tokens|n)=(\d+) or less", error.fix):
            advised = {"max_tokens": max_tokens, "n": n, name: int(value)}
            assert refusal(**advised) is None
            assert refusal(**{**advised, name: int(value) + 1}), "and not less than needed"
        assert pool.available == num_pages, "nothing was allocated"


def test_a_sequence_that_is_longer_than_the_device_is_refused_whatever_the_host_holds():
    check_worst_case(PageAllocator(10, 4), 1, None, 10, 30, 8)
    with pytest.raises(UsageError, match="use max_tokens=30 or less"):
        check_worst_case(PageAllocator(10, 4), 1, None, 10, 31, 8)


def test_a_refusal_names_the_prompt_the_pages_and_what_would_fit():
    with pytest.raises(UsageError) as refused:
        check_worst_case(PageAllocator(800, 128), 64, 1000, 300, 31744, 8)
    assert str(refused.value) == (
        "a prompt of 300 tokens with max_tokens=31744 and n=8: its sequences may take 1,994 pages "
        "of 128 tokens and 8 slots; one device has 800 pages and 64 slots and host memory 1,000. "
        "Fix: use max_tokens=17876 or less, or use n=4 or less."
    )


@given(
    growing=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    rest=st.integers(0, 5),
)
def test_the_predicted_peak_is_the_most_that_a_run_by_the_predictions_holds(growing, rest):
    held = rest + sum(own for own, _ in growing)
    at_each_time = [
        rest + sum(own + time for own, more in growing if time <= more) for time in range(10)
    ]
    assert predicted_peak(held, growing) == max(at_each_time)


def pager_of(num_pages, slots=20, **options):
    return Pager(PageAllocator(num_pages, 4), slots, **options)


def begun(pager, number, tokens, n=1, max_tokens=1000, **options):
    """A prompt of four ids (one page), and `n` sequences of it that have written `tokens` each."""
    root, _ = pager.admit(number, [number] * 4, max_tokens, n, tokens)
    pager.advance(root, 4)
    found = [pager.fork(root, branch, Edits()) for branch in range(n)]
    pager.stop(root, Edits())
    for sequence in found:
        assert pager.pool.extend(sequence.table, tokens) is not None
        pager.advance(sequence, tokens)
        sequence.live, sequence.due = True, 4
        for name, values in options.items():
            setattr(sequence, name, values[sequence.branch])
    return found


def test_a_prompt_is_admitted_when_the_pages_that_are_predicted_are_there():
    pager = pager_of(20, fill=1.0)
    assert pager.can_admit([9], 1000, 8, 1000), "nothing is in flight"
    (sequence,) = begun(pager, 0, 16)
    sequence.remaining = 32  # eight pages; it has five now
    assert pager.can_admit([9], 100, 1, 12)
    assert not pager.can_admit([9], 100, 1, 44), "after 32 tokens both would hold 22 pages"
    sequence.remaining = 0
    assert pager.can_admit([9], 100, 1, 44), "it will have ended by then"
    assert not pager.can_admit([9], 100, 21, 1), "slots are counted too"
    sequence.waited = 1
    assert not pager.can_admit([9], 100, 1, 1), "those that wait come first"


def test_prompts_that_were_admitted_a_moment_ago_count_with_all_their_sequences():
    pager = pager_of(20, fill=1.0)
    assert pager.admit(0, [1], 100, 4, 12)
    assert not pager.can_admit([9], 100, 4, 12)
    assert pager.can_admit([9], 100, 1, 4)


# ---- shortage


def test_the_one_with_the_least_utility_per_page_waits():
    pager = pager_of(8)
    begun(pager, 0, 4)
    begun(pager, 1, 4, utility=[3.0], remaining=[100])
    begun(pager, 2, 4, utility=[2.0], remaining=[8])
    edits = pager.plan()
    assert edits.run == [(0, 0), (2, 0)], "(1, 0) is worth more, but not for its pages"
    assert pager.prompts[1][0].live, "it waits; the search has not paused it"
    assert not edits.reads


def test_of_a_prompt_that_waits_anyway_more_sequences_wait_before_another_prompt_does():
    pager = pager_of(12, value=lambda sequence, pool: sequence.utility)
    begun(pager, 0, 4)
    begun(pager, 1, 4, n=3, utility=[7.0, 8.0, 9.0])
    begun(pager, 2, 4, utility=[2.0])
    taken = PageTable()
    pager.pool.extend(taken, 4 * (pager.pool.available - 3))
    pager.prompts[1][0].waited = 1
    pager._fits_host = lambda sequence: False  # nobody can leave
    assert pager.plan().run == [(0, 0), (2, 0), (1, 2)]


@pytest.mark.parametrize(("host_pages", "left"), [(None, [(1, 0)]), (2, [(1, 0)]), (1, [])])
def test_what_the_search_has_paused_leaves_before_a_live_one_waits(host_pages, left):
    """As far as host memory holds it: two pages."""
    pager = pager_of(8)
    begun(pager, 0, 4)
    (paused,) = begun(pager, 1, 4, utility=[9.0])
    begun(pager, 2, 4)
    paused.live, paused.due = False, 0
    taken = PageTable()
    pager.pool.extend(taken, 4 * (pager.pool.available - 1))
    pager.host_pages = host_pages
    edits = pager.plan()
    assert [key for _, key in edits.slot_reads] == left
    if host_pages is None:
        assert edits.run == [(0, 0), (2, 0)]


def test_nobody_grows_into_pages_that_the_first_prompt_needs_and_the_host_cannot_take():
    pager = pager_of(10, host_pages=2)
    sequences = [begun(pager, number, 4, max_tokens=20)[0] for number in (0, 1)]
    ended = []
    while pager.prompts:
        for prompt, branch in pager.plan().run:
            sequence = pager.prompts[prompt][branch]
            pager.advance(sequence, 4)
            sequence.due = 4
            if sequence.table.length == 24:
                pager.stop(sequence, Edits())
                ended.append(sequence)
    assert ended == sequences


def test_one_that_waits_twice_in_a_row_is_offloaded_and_comes_back_when_pages_are_free():
    pager = pager_of(7)
    (old,) = begun(pager, 0, 4)
    (young,) = begun(pager, 1, 4)
    history = []
    for next_due in (2, 2, 4, 4):
        edits = pager.plan()
        history.append((edits.run, [key for _, key in edits.slot_reads]))
        for prompt, branch in edits.run:
            pager.advance(pager.prompts[prompt][branch], pager.prompts[prompt][branch].due)
        old.due, young.due = next_due, 4
    assert history == [
        ([(0, 0), (1, 0)], []),
        ([(0, 0)], []),  # the last page
        ([(0, 0)], [(1, 0)]),
        ([(0, 0)], []),
    ]
    assert (young.live, young.due, young.is_here) == (True, 4, False)
    assert not pager.is_settled(1), "its prompt is not decided meanwhile"
    pager.stop(old, Edits())
    edits = pager.plan()
    assert edits.run == [(1, 0)]
    assert [key for key, _ in edits.slot_writes] == [(1, 0)]


def families_of_which_only_the_first_is_here(free, fill=1.0):
    """Four prompts of two sequences. The first needs two pages to go on. The others need seven to
    come back and go on, and are counted with eight: what they share is counted twice."""
    pager = pager_of(40, fill=fill)
    families = [begun(pager, number, 8, n=2, remaining=[8, 8]) for number in range(4)]
    for sequence in [s for family in families[1:] for s in family]:
        pager._offload(sequence, Edits())
    taken = PageTable()
    pager.pool.extend(taken, 4 * (pager.pool.available - free))
    return pager


@pytest.mark.parametrize(
    ("free", "back"), [(2, []), (9, []), (10, [1]), (16, [1]), (17, [1, 2]), (24, [1, 2, 3])]
)
def test_those_that_left_come_back_in_order_of_age_and_each_prompt_as_a_whole(free, back):
    pager = families_of_which_only_the_first_is_here(free, fill=9.0)
    assert pager.plan().run == [(number, branch) for number in [0, *back] for branch in (0, 1)]


def test_those_that_left_stay_while_the_pages_that_are_predicted_are_not_there():
    pager = families_of_which_only_the_first_is_here(free=10)
    assert pager.plan().run == [(0, 0), (0, 1)], "the predictions would fill more than the pool"


def test_none_comes_back_while_one_that_is_here_waits():
    pager = families_of_which_only_the_first_is_here(free=10, fill=9.0)
    pager.prompts[0][1].due = 40
    assert pager.plan().run == [(0, 0)]


def test_a_prompt_that_does_not_fit_stops_the_ones_behind_it():
    pager = families_of_which_only_the_first_is_here(free=10, fill=9.0)
    pager.prompts[1][0].due = 400
    assert pager.plan().run == [(0, 0), (0, 1)]


def test_a_fork_without_a_slot_begins_in_host_memory():
    pager = pager_of(20, slots=3)
    (parent,), (other,) = begun(pager, 0, 5), begun(pager, 1, 1)
    edits = Edits()
    assert pager.fork(parent, 1, edits).is_here
    child = pager.fork(parent, 2, edits)
    assert not child.is_here
    assert edits.slot_reads == [(parent.slot, (0, 2))]
    grandchild = pager.fork(child, 3, edits)
    assert edits.host_copies == [(child.key, grandchild.key)]
    pager.stop(other, edits)
    child.live, child.due = True, 2
    assert child.key in pager.plan().run
    assert child.slot not in (-1, parent.slot)
    with pytest.raises(PageError, match="exists"):
        pager.fork(parent, 1, Edits())


def test_utility_per_page_counts_the_pages_that_a_sequence_will_have():
    pool = PageAllocator(9, 4)
    table = PageTable([0, 1], 8)
    sequence = PagedSequence(0, 0, table, 0, utility=6.0, remaining=4.0)
    assert utility_per_page(sequence, pool) == 2.0
