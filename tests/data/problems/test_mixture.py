"""The order of a mixture: shares, prefixes, and what is too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zip_rc_jax.data.problems.mixture import interleaved
from zip_rc_jax.runtime.errors import UsageError

WEIGHTS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=4)


@given(WEIGHTS, st.integers(0, 60), st.integers(0, 60))
def test_the_first_problems_do_not_depend_on_how_many_are_asked_for(weights, few, more):
    names, sizes = [str(i) for i in range(len(weights))], [None] * len(weights)
    few, more = 1 + min(few, more), 1 + max(few, more)
    assert interleaved(names, weights, sizes, more)[:few] == interleaved(names, weights, sizes, few)


@given(WEIGHTS, st.integers(1, 200))
def test_every_source_has_its_share_to_within_a_problem_at_every_moment(weights, count):
    names, sizes = [str(i) for i in range(len(weights))], [None] * len(weights)
    order = interleaved(names, weights, sizes, count)
    for k in range(1, count + 1):
        for i, weight in enumerate(weights):
            assert abs(order[:k].count(i) - k * weight / sum(weights)) <= len(weights) - 1 + 1e-6


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_equal_weights_take_all_of_every_source(sizes):
    names, weights = [str(i) for i in range(len(sizes))], [1.0] * len(sizes)
    order = interleaved(names, weights, sizes, 0)
    assert [order.count(i) for i in range(len(sizes))] == sizes
    assert order[: len(sizes)] == [i for i in range(len(sizes)) if sizes[i]][: len(sizes)] or any(
        size == 0 for size in sizes
    )


@pytest.mark.parametrize(
    ("weights", "sizes", "count", "message"),
    [
        ([1, 1], [3, None], 0, r"all problems of b: a generator has no end.*count of the source"),
        ([1, 3], [3, 5], 0, r"shares of them contradict.*at most 6 keep the shares"),
        ([1, 3], [3, 5], 8, r"the share of b is 6, and it has 5.*ask for 6 or fewer"),
        ([1, 1], [3, 5], 9, r"9 problems: a, b have 8.*ask for 8 or fewer, or 0 for all"),
    ],
)
def test_more_than_there_is_names_what_there_is(weights, sizes, count, message):
    with pytest.raises(UsageError, match=message):
        interleaved(["a", "b"], [float(w) for w in weights], sizes, count)
