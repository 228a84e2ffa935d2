"""Live rows stay at the beginning of their shard, whatever lies in the way, and no prefix is
lost."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from zip_rc_jax.inference.placement import Place, Shard, live_rows_first
from zip_rc_jax.inference.state import bucket, fine_bucket


@dataclasses.dataclass
class Record:
    row: int


@st.composite
def shards(draw):
    """(rows, live rows, paused rows, width)."""
    rows = draw(st.integers(1, 12))
    state = draw(
        st.lists(st.sampled_from(["live", "paused", "free"]), min_size=rows, max_size=rows)
    )
    live = [i for i, s in enumerate(state) if s == "live"]
    return (
        rows,
        live,
        [i for i, s in enumerate(state) if s == "paused"],
        draw(st.integers(max(len(live), 1), rows)),
    )


@given(shards())
def test_after_the_moves_the_live_rows_come_first_and_every_prefix_is_where_its_record_says(shard):
    rows, live, paused, width = shard
    # the last row is scratch
    contents = [f"prefix {i}" if i in live or i in paused else None for i in range(rows)] + [None]
    free = Shard([i for i in range(rows) if i not in live and i not in paused])
    records = {f"prefix {i}": Record(i) for i in live + paused}
    places = [[Place(records[f"prefix {i}"], "row") for i in group] for group in (live, paused)]

    moves = live_rows_first(*places, free, width, scratch=rows)

    for from_row, to_row, branch in moves:
        assert branch == -1, "a moved prefix keeps its identity"
        contents[to_row] = contents[from_row]
    assert all(contents[record.row] == name for name, record in records.items())
    assert all(records[f"prefix {i}"].row < width for i in live)
    taken = [record.row for record in records.values()]
    assert sorted(taken + free.free) == list(range(rows)), "every row is taken once or free"


@given(shards())
def test_no_more_is_moved_than_needed(shard):
    rows, live, paused, width = shard
    free = Shard([i for i in range(rows) if i not in live and i not in paused])
    room = sum(i < width for i in free.free)
    misplaced = sum(i >= width for i in live)
    moves = live_rows_first(
        [Place(Record(i), "row") for i in live],
        [Place(Record(i), "row") for i in paused],
        free,
        width,
        scratch=rows,
    )
    # Two copies where two rows must move, and a third only where there is no free row to begin
    # with.
    assert len(moves) == min(misplaced, room) + (2 if len(live) + len(paused) < rows else 3) * max(
        misplaced - room, 0
    )


def test_buckets_hold_what_they_must_and_are_few():
    for least in (16, 64):
        sizes = {fine_bucket(n, 1000, least) for n in range(1, 1001)}
        assert sizes == {
            x for x in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000) if x >= least
        }
        assert all(n <= fine_bucket(n, 1000, least) <= max(least, 1.5 * n) for n in range(1, 1001))
    assert [bucket(n, 100) for n in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 100]
