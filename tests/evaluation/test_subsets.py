"""Which subsets a decode is replayed on, and the error that a draw of them leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zip_rc_jax.evaluation.subsets import choose_subsets, fixed_ns, subset_error
from zip_rc_jax.runtime.errors import UsageError


def test_all_subsets_are_taken_where_they_are_few_and_the_first_is_an_online_decode():
    every = choose_subsets(6, 3, 20, 0)
    assert every.exact
    assert len(every.members) == 20
    some = choose_subsets(64, 8, 20, 0)
    assert not some.exact
    assert some.members.shape == (20, 8)
    assert every.members[0].tolist() == [0, 1, 2]
    assert some.members[0].tolist() == list(range(8))
    assert all(len(set(row)) == 8 and sorted(row) == list(row) for row in some.members.tolist())
    assert sorted(some.members[:8].ravel().tolist()) == list(range(64)), "the first do not overlap"
    np.testing.assert_array_equal(some.members, choose_subsets(64, 8, 20, 0).members)
    assert (some.members != choose_subsets(64, 8, 20, 1).members).any()


def test_more_samples_than_the_pool_has_are_refused():
    with pytest.raises(UsageError, match=r"n=9: the pool has 8 samples.*Fix: .*replay.samples"):
        choose_subsets(8, 9, 10, 0)


def test_the_error_of_a_mean_over_subsets_is_that_of_repeated_draws():
    rng = np.random.default_rng(4)
    draws = rng.normal(rng.normal(0, 5, (1, 30, 1)), 1.0, (4000, 30, 5))
    stated = np.mean([subset_error(values, False) for values in draws[:200]])
    assert stated == pytest.approx(draws.mean((1, 2)).std(), rel=0.1)
    assert subset_error(draws[0], True) == 0
    assert math.isnan(subset_error(draws[0, :, :1], False))


def test_a_curve_of_many_samples_has_few_points_and_ends_with_all():
    assert fixed_ns(8) == [1, 2, 3, 4, 6, 8]
    assert fixed_ns(10)[-2:] == [8, 10]
    assert fixed_ns(64)[-3:] == [32, 48, 64]
