"""Intervals over problems and tries, against a bootstrap that draws one index after the other."""

from __future__ import annotations

import numpy as np
import pytest

from zip_rc_jax.evaluation.intervals import (
    interval,
    mean_weights,
    resampled_weights,
    two_level_intervals,
)
from zip_rc_jax.evaluation.metrics import paired_bootstrap

BLOCKS = [(3, 4), (5, 1)]
ROWS = 3 * 4 + 5


def one_by_one(values, blocks, resamples, seed):
    """Means of resamples: a problem, then as many of its tries as it has, each with replacement."""
    rng = np.random.default_rng(seed)
    problems, row = [], 0
    for count, tries in blocks:
        for _ in range(count):
            problems.append(values[row : row + tries])
            row += tries
    means = []
    for _ in range(resamples):
        drawn = [problems[i] for i in rng.integers(0, len(problems), len(problems))]
        means.append(np.mean([rng.choice(tries, len(tries)).mean() for tries in drawn]))
    return np.array(means)


def test_the_mean_is_over_problems_of_the_mean_over_tries():
    values = np.arange(ROWS, dtype=float)
    tries = [values[0:4].mean(), values[4:8].mean(), values[8:12].mean(), *values[12:]]
    assert mean_weights(BLOCKS) @ values == pytest.approx(np.mean(tries))


def test_resamples_are_spread_as_those_drawn_one_by_one():
    values = np.random.default_rng(1).normal(size=(ROWS, 1))
    mine = np.concatenate([w @ values for w in resampled_weights(BLOCKS, 20_000, 0)])[:, 0]
    slow = one_by_one(values[:, 0], BLOCKS, 1_500, 1)
    error = slow.std() / np.sqrt(len(slow))
    assert abs(mine.mean() - slow.mean()) < 4 * error
    assert mine.std() == pytest.approx(slow.std(), rel=0.05)
    for quantile in (0.025, 0.25, 0.75, 0.975):
        near = np.mean(mine < np.quantile(slow, quantile))
        assert near == pytest.approx(quantile, abs=0.03)


def test_every_resample_weighs_one():
    for weights in resampled_weights(BLOCKS, 50, 3):
        np.testing.assert_allclose(weights.sum(1), 1)
        assert weights.shape[1] == ROWS


def test_tries_that_differ_widen_the_interval_and_equal_tries_do_not():
    level = np.repeat(np.random.default_rng(0).random(30), 4)
    noise = np.tile([0.5, -0.5, 0.5, -0.5], 30)
    (_, low, high), (_, wide_low, wide_high) = (
        interval(x, 4, 2000, 0) for x in (level, level + noise)
    )
    assert wide_high - wide_low > 1.2 * (high - low)
    _, plain_low, plain_high = paired_bootstrap(level[::4], 2000, 0)
    assert high - low == pytest.approx(plain_high - plain_low, rel=0.1)


def test_one_try_has_the_interval_of_the_bootstrap_over_problems():
    values = np.random.default_rng(2).random(40)
    assert interval(values, 1, 500, 7) == paired_bootstrap(values, 500, 7)


def test_columns_share_their_resamples():
    values = np.random.default_rng(0).random((ROWS, 1))
    mean, low, high = two_level_intervals(np.hstack([values, values]), BLOCKS, 100, 0)
    assert (mean[0], low[0], high[0]) == (mean[1], low[1], high[1])
    _, low, high = two_level_intervals(np.hstack([values - values]), BLOCKS, 100, 0)
    assert low[0] == high[0] == 0


def test_rows_that_are_not_the_blocks_are_refused():
    with pytest.raises(ValueError, match="need 17 rows"):
        two_level_intervals(np.zeros((16, 1)), BLOCKS)
    with pytest.raises(ValueError, match="without NaN"):
        two_level_intervals(np.full((ROWS, 1), np.nan), BLOCKS)
