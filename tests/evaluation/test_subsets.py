"""Averages over subsets: formulas and draws against enumerations of all subsets."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from zip_rc_jax.evaluation.baselines import METHODS, SamplePool, baseline_point
from zip_rc_jax.evaluation.replay import ReplayPool
from zip_rc_jax.evaluation.subsets import (
    choose_subsets,
    expected_largest,
    fixed_ns,
    largest_weights,
    reward_of_best,
    subset_error,
    subset_point,
)
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError

GRID = Grid((0.0, 1.0), (0, 8, 16))


def pools(prompts, samples, seed=0):
    """The same samples as a pool that replays and as one whose subsets are enumerated."""
    rng, shape = np.random.default_rng(seed), (prompts, samples)
    columns = {
        "correct": rng.integers(0, 3, shape) / 2,
        # Ties, and samples without an answer.
        "value": rng.integers(0, 5, shape) / 4,
        "answer_id": rng.integers(-1, 3, shape),
    }
    length, level = rng.integers(1, 30, shape), np.zeros(prompts, np.int64)
    mine = ReplayPool(
        grid=GRID, stride=1, window=1, max_tokens=64, stops=False, extractor="stated",
        equivalence="grader", length=length, computed=length, stopped=np.ones(shape, bool),
        **columns, level=level, texts={}, root=np.zeros((prompts, 4), np.float32),
        end=np.zeros((*shape, 4), np.float32), joints=np.zeros((0, 4), np.float32),
        first=np.zeros(shape, np.int64), kind="float32",
    )  # fmt: skip
    return mine, SamplePool(**columns, self_length=length, level=level)


@pytest.mark.parametrize("method", METHODS)
def test_up_to_ten_samples_every_method_is_what_the_baselines_enumerate(method):
    mine, theirs = pools(5, 7)
    for n in range(1, 8):
        expected, found = baseline_point(theirs, method, n), subset_point(mine, method, n, 1000, 0)
        for name in ("accuracy", "compute", "latency"):
            np.testing.assert_allclose(
                getattr(found.point, name), getattr(expected, name), rtol=1e-12
            )
        assert found.error == 0
        assert found.point.name == expected.name


def test_pass_at_k_is_the_estimator_of_the_codex_paper():
    """1 - C(wrong, k) / C(N, k), with 64 samples."""
    rng = np.random.default_rng(1)
    correct = (rng.random((4, 64)) < [[0.02], [0.2], [0.5], [0.9]]).astype(float)
    for k in (1, 5, 32, 64):
        expected = [1 - math.comb(64 - int(row.sum()), k) / math.comb(64, k) for row in correct]
        np.testing.assert_allclose(expected_largest(correct, k), expected, atol=1e-12)


def test_the_largest_of_a_subset_has_the_ranks_that_an_enumeration_counts():
    for total, n in ((6, 1), (6, 3), (6, 6)):
        tops = [max(chosen) for chosen in itertools.combinations(range(total), n)]
        counted = np.bincount(tops, minlength=total) / len(tops)
        np.testing.assert_allclose(largest_weights(total, n), counted, atol=1e-15)


def test_weights_of_hundreds_of_samples_are_probabilities():
    for n in (1, 128, 255):
        weights = largest_weights(256, n)
        assert np.isfinite(weights).all()
        assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_the_best_of_n_splits_ties_as_an_enumeration_does():
    rng = np.random.default_rng(2)
    score, reward = rng.integers(0, 3, (3, 7)) / 2, rng.random((3, 7))
    for n in (1, 2, 4, 7):
        expected = []
        for s, r in zip(score, reward, strict=True):
            each = []
            for chosen in map(list, itertools.combinations(range(7), n)):
                best = s[chosen] == s[chosen].max()
                each.append(r[chosen][best].mean())
            expected.append(np.mean(each))
        np.testing.assert_allclose(reward_of_best(score, reward, n), expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["majority", "weighted_best_of_n"])
def test_a_draw_of_subsets_lies_within_its_error_of_the_enumeration(method):
    mine, theirs = pools(40, 10, seed=3)
    expected = baseline_point(theirs, method, 4).accuracy.mean()
    off = []
    for seed in range(20):
        found = subset_point(mine, method, 4, 60, seed)
        assert found.error > 0
        off.append((found.point.accuracy.mean() - expected) / found.error)
    # Of a standard normal, the mean square of 20 lies below 2 in 99% of the cases; subsets that do
    # not overlap vary less.
    assert np.mean(np.square(off)) < 2
    assert np.mean(np.square(off)) > 0.05, "the stated error is far too large"


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


def test_an_unknown_method_is_refused():
    mine, _ = pools(1, 2)
    with pytest.raises(UsageError, match="method='best': known baselines are majority"):
        subset_point(dataclasses.replace(mine), "best", 1, 10, 0)
