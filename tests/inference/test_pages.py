"""Pages are never leaked, freed twice, or written while two sequences hold them; and every sequence
reads its own tokens, through forks, offloads and the prefix cache.

The allocator only counts. A slow model beside it keeps what every page holds, and carries out what
the allocator returns.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from harness.page_model import Device
from zip_rc_jax.inference.page_table import GONE, PageError, PageTable
from zip_rc_jax.inference.pages import PageAllocator

# Most begin alike, and part ways at some position.
PROMPTS = st.builds(
    lambda common, rest: [*[0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0][:common], *rest],
    st.integers(0, 16),
    st.lists(st.integers(0, 1), min_size=1, max_size=5),
)


class Pages(RuleBasedStateMachine):
    """Edits in any order. A sequence is (table, the tokens that it must read)."""

    sequences = Bundle("sequences")

    @initialize(
        num_pages=st.integers(1, 12),
        page_size=st.sampled_from([1, 2, 4, 16]),
        window=st.sampled_from([0, 0, 3, 5]),
        least_copied=st.integers(1, 4),
    )
    def start(self, num_pages, page_size, window, least_copied):
        self.pool = PageAllocator(num_pages, page_size, window, least_copied)
        self.device = Device(num_pages, page_size)
        self.tables = {}

    # ---- edits

    @rule(
        target=sequences,
        ids=PROMPTS,
        chunk=st.integers(1, 20),
        publish=st.booleans(),
        share=st.booleans(),
    )
    def open(self, ids, chunk, publish, share):
        """A prompt, prefilled in chunks."""
        fits = self.pool.open_needs(ids) <= self.pool.available
        table, copies = self.pool.open(ids, share)
        assert len(copies) <= 1
        self.device.copy(copies)
        assert table.length < len(ids), "the last token is always computed"
        self.tables[table] = ids[: table.length]
        self.check_reads(table)
        while table.length < len(ids):
            if not self.write(table, ids[table.length :][:chunk]):
                assert not (share and fits), "it was said to fit"
                self.device.release(self.pool.stop(table))
                del self.tables[table]
                return multiple()
            if publish:
                self.pool.publish(table, ids)
        return table

    @rule(
        table=sequences,
        tokens=st.lists(st.integers(0, 1), max_size=9),
        unused=st.integers(0, 5),
    )
    def go_on(self, table, tokens, unused):
        if table.place == "device":
            self.write(table, tokens, unused)

    def write(self, table, tokens, unused=0):
        """An interval that writes `tokens`, though `unused` more were asked for."""
        needs, before = self.pool.needs(table, len(tokens) + unused), self.pool.available
        copies = self.pool.extend(table, len(tokens) + unused)
        assert (copies is None) == (needs > before), "None means that pages are missing"
        if copies is None:
            return False
        assert len(copies) <= 1
        assert self.pool.available == before - needs
        self.device.copy(copies)
        for i, token in enumerate(tokens, table.length):
            page, place = divmod(i, self.pool.page_size)
            number = table.pages[page]
            assert sum(number in t.pages for t in self.on_device()) == 1, "it is nobody else's"
            self.device.pages[number][place] = token
        self.pool.advance(table, len(tokens))
        self.tables[table] = [*self.tables[table], *tokens]
        return True

    @rule(target=sequences, table=sequences)
    def fork(self, table):
        before = self.pool.available
        new = self.pool.fork(table)
        assert self.pool.available == before, "a fork takes no page"
        self.tables[new] = self.tables[table]
        return new

    @rule(table=consumes(sequences), discard=st.booleans())
    def stop(self, table, discard):
        gain = self.pool.gives_back(table) if table.place == "device" else 0
        before = self.pool.available
        self.device.release(self.pool.stop(table, discard))
        assert self.pool.available == before + gain
        del self.tables[table]

    @rule(table=sequences)
    def offload(self, table):
        if table.place == "device":
            gain, before = self.pool.gives_back(table), self.pool.available
            self.device.read(self.pool.offload(table))
            assert self.pool.available == before + gain

    @rule(table=sequences)
    def fetch(self, table):
        if table.place == "host":
            needs, before = self.pool.fetch_needs(table), self.pool.available
            fetched = self.pool.fetch(table)
            assert (fetched is None) == (needs > before)
            if fetched is not None:
                assert self.pool.available == before - needs
                self.device.write(fetched[0])
                self.device.release(fetched[1])

    # ---- what holds after each of them

    def on_device(self):
        return [table for table in self.tables if table.place == "device"]

    def check_reads(self, table):
        """The sequence finds its tokens, as far as the next one sees them."""
        tokens, size = self.tables[table], self.pool.page_size
        assert table.length == len(tokens)
        first = max(0, len(tokens) - self.pool.window + 1) if self.pool.window else 0
        store = self.device.pages if table.place == "device" else self.device.host
        for i in range(first, len(tokens)):
            assert table.pages[i // size] != GONE
            assert store[table.pages[i // size]][i % size] == tokens[i]

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for table in self.tables:
            self.check_reads(table)

    @invariant()
    def every_page_is_held_or_available(self):
        held = [page for t in self.on_device() for page in t.pages if page != GONE]
        counts = [held.count(page) for page in range(self.pool.num_pages)]
        assert counts == self.pool.refs
        assert self.pool.available == counts.count(0)

    @invariant()
    def the_host_keeps_what_offloaded_sequences_hold(self):
        held = {h for t in self.tables if t.place == "host" for h in t.pages if h != GONE}
        assert held == self.device.host.keys()
        assert len(self.pool.host) == len(held)

    def teardown(self):
        if hasattr(self, "tables"):
            for table in self.tables:
                self.pool.stop(table)
            assert self.pool.available == self.pool.num_pages
            assert len(self.pool.host) == 0
            taken = PageTable()
            assert self.pool.extend(taken, self.pool.num_pages * self.pool.page_size) == []
            assert sorted(taken.pages) == list(range(self.pool.num_pages))


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)


# ---- by example


def opened(pool, ids, chunk=1000):
    """The table of a prompt that was prefilled in chunks."""
    table, _ = pool.open(ids)
    while table.length < len(ids):
        tokens = min(chunk, len(ids) - table.length)
        assert pool.extend(table, tokens) is not None
        pool.advance(table, tokens)
        pool.publish(table, ids)
    return table


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_prompt_that_comes_again_shares_all_full_pages_and_copies_the_last_one(chunk):
    pool = PageAllocator(num_pages=10, page_size=4, least_copied=1)
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    first = opened(pool, ids, chunk)
    assert pool.open_needs(ids) == 1
    second, copies = pool.open(ids)
    assert second.pages[:2] == first.pages[:2]
    assert copies == [(first.pages[2], second.pages[2])]
    assert second.length == len(ids) - 1, "all but the last token, for its logits"


def test_a_prompt_finds_its_pages_after_all_its_sequences_have_ended():
    pool = PageAllocator(num_pages=10, page_size=4)
    ids = list(range(9))
    pages = list(opened(pool, ids).pages)
    pool.stop(opened(pool, list(range(100, 104))))
    for table in [opened(pool, ids), opened(pool, ids)]:
        assert table.pages[:2] == pages[:2]
    assert pool.open([1, *ids])[0].pages == [], "other ids before them make other pages"


def test_cached_pages_are_reclaimed_least_recently_used_first_and_from_their_ends():
    pool = PageAllocator(num_pages=6, page_size=2)
    old, used, new = ([i, i, i, i] for i in (1, 2, 3))
    tables = [opened(pool, ids) for ids in (old, used, new)]
    for table in tables:
        pool.stop(table)
    assert pool.available == 6
    pool.stop(pool.open([*used, 0])[0])  # is now the one used last
    taken = PageTable()
    found = []
    for _ in range(6):
        assert pool.extend(taken, 2) == []
        pool.advance(taken, 2)
        found.append([len(pool.cache.match([*ids, 0]).pages) for ids in (old, new, used)])
    assert found == [[1, 2, 2], [0, 2, 2], [0, 1, 2], [0, 0, 2], [0, 0, 1], [0, 0, 0]]
    assert pool.extend(taken, 1) is None


def test_where_a_page_is_a_whole_slot_prompts_that_begin_alike_copy_it():
    """Also the slot of a prompt that has ended; the last slot that is left is taken over."""
    pool = PageAllocator(num_pages=2, page_size=64, least_copied=8)
    system = list(range(10))
    pool.stop(opened(pool, [*system, 50]))
    first, copies = pool.open([*system, 60, 61])
    assert first.length == 10
    assert copies == [(0, first.pages[0])]
    second, copies = pool.open([*system, 70])
    assert (second.length, copies, second.pages) == (10, [], [0])
    assert pool.open([*system, 80])[0].pages == [], "no slot is left"


def test_a_page_that_is_taken_over_is_no_copy_of_an_offloaded_one_any_more():
    pool = PageAllocator(num_pages=1, page_size=4, least_copied=2)
    table = opened(pool, [1, 1, 0, 0])
    pool.offload(table)
    other, copies = pool.open([1, 1, 5])
    assert (other.pages, copies) == ([0], [])
    assert pool.fetch(table) is None, "its page was overwritten"
    pool.stop(other)
    writes, _ = pool.fetch(table)
    assert len(writes) == 1


def test_siblings_are_offloaded_with_one_read_of_what_they_share_and_share_it_again():
    pool = PageAllocator(num_pages=8, page_size=4)
    root = PageTable()
    assert pool.extend(root, 6) == []
    pool.advance(root, 6)
    family = [root, pool.fork(root), pool.fork(root)]
    reads = [pool.offload(table) for table in family]
    assert [len(r) for r in reads] == [2, 1, 1], "the full page once, each one's last page"
    assert pool.available == 8
    writes = [pool.fetch(table)[0] for table in family]
    assert [len(w) for w in writes] == [2, 1, 1]
    assert len({table.pages[0] for table in family}) == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "n"), [(6, 9, 3), (8, 4, 2), (3, 1, 4), (1, 40, 2)]
)
def test_the_worst_case_is_what_a_prompt_takes_whose_sequences_all_reach_their_limit(
    prompt, max_tokens, n
):
    pool = PageAllocator(num_pages=100, page_size=4)
    root = opened(pool, list(range(prompt)))
    sequences = []
    for _ in range(n):
        sequences.append(pool.fork(root))
        if len(sequences) == n:
            pool.stop(root)
        assert pool.extend(sequences[-1], max_tokens) is not None
        assert 100 - pool.available <= pool.worst_case(prompt, max_tokens, n)
    assert 100 - pool.available == pool.worst_case(prompt, max_tokens, n)


def test_what_was_not_finite_leaves_the_prefix_cache_and_is_named_for_clearing():
    pool = PageAllocator(num_pages=8, page_size=4, least_copied=1)
    root = opened(pool, list(range(6)))
    sequence = pool.fork(root)
    pool.stop(root)
    shared, own = sequence.pages
    other = opened(pool, [*range(4), 9])
    assert pool.extend(sequence, 4) == []
    new = sequence.pages[2]
    assert set(pool.stop(sequence, discard=True).pages) == {own, new}
    assert pool.cache.match([*range(6), 7]).pages == (shared,)
    assert other.pages[0] == shared


def test_wrong_calls_are_errors():
    pool = PageAllocator(num_pages=4, page_size=4)
    table = opened(pool, [1, 2, 3])
    with pytest.raises(PageError, match="none were asked for"):
        pool.advance(table, 2)
    fork = pool.fork(table)
    with pytest.raises(PageError, match="others hold"):
        pool.advance(fork, 1)
    pool.offload(table)
    with pytest.raises(PageError, match="on the device"):
        pool.extend(table, 1)
    pool.stop(table)
    for call in (pool.stop, pool.fork, pool.fetch, pool.offload):
        with pytest.raises(PageError, match="ended"):
            call(table)
