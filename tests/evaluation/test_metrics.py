"""Every metric against a slow, independent statement of its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zip_rc_jax.evaluation import metrics
from zip_rc_jax.grid import Grid

GRID = Grid((0.0, 0.5, 1.0), (0, 4, 16, 64))


def slow_auc(score, outcome):
    pairs = [
        (a, b)
        for a, x in zip(score, outcome, strict=True)
        for b, y in zip(score, outcome, strict=True)
        if x and not y
    ]
    return (
        sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        if pairs
        else math.nan
    )


def items(seed, n=200):
    rng = np.random.default_rng(seed)
    prob = rng.integers(0, 21, n) / 20  # repeated values and bin edges
    return prob, (rng.random(n) < prob**2).astype(float)


def test_total_variation():
    p = np.array([[[0.5, 0.5], [0, 0]], [[1, 0], [0, 0]]])
    q = np.array([[[0.25, 0.25], [0.25, 0.25]], [[0, 0], [0, 1]]])
    np.testing.assert_allclose(metrics.total_variation(p, q), [0.5, 1.0])
    np.testing.assert_array_equal(metrics.total_variation(p, p), 0)
    with pytest.raises(ValueError, match="one shape"):
        metrics.total_variation(p, q[0])


def test_empirical_joint_counts_rollouts_per_cell():
    rng = np.random.default_rng(0)
    rewards, lengths = rng.random((2, 3, 50)), rng.integers(1, 100, (2, 3, 50))
    joint = metrics.empirical_joint(rewards, lengths, GRID)
    assert joint.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(joint.sum((-2, -1)), 1)
    for i, j, b, cell in np.ndindex(joint.shape):
        count = 0
        for reward, length in zip(rewards[i, j], lengths[i, j], strict=True):
            nearest = [abs(reward - v) for v in GRID.reward_centres]
            inside = GRID.length_edges[cell] <= length and (
                cell == 2 or length < GRID.length_edges[cell + 1]
            )
            count += inside and nearest.index(min(nearest)) == b
        assert joint[i, j, b, cell] == pytest.approx(count / 50)
    with pytest.raises(ValueError, match="there must be one"):
        metrics.empirical_joint(np.zeros((2, 0)), np.zeros((2, 0)), GRID)


def test_binary_metrics_by_hand():
    prob = [0.9, 0.8, 0.5, 0.2, 0.7, 0.1]
    outcome = [1, 0, 1, 0, 1, 0]
    # said correct: 0.9 0.8 0.7; of these two are; 0.5 counts as incorrect
    found = metrics.binary_metrics(prob, outcome)
    expected = {
        "binary/accuracy": 4 / 6,
        "binary/f1": 2 * 2 / (3 + 3),
        "binary/error_recall": 2 / 3,
        "binary/error_precision": 2 / 3,
    }
    assert found == pytest.approx(expected)


def test_absent_measurements_are_nan():
    found = metrics.binary_metrics([0.9, 0.8], [1, 1])
    assert found["binary/accuracy"] == 1
    assert math.isnan(found["binary/error_recall"])
    assert math.isnan(found["binary/error_precision"])
    assert all(math.isnan(x) for x in metrics.binary_metrics([], []).values())
    assert math.isnan(metrics.auc([0.1, 0.2], [1, 1]))
    assert math.isnan(metrics.ece([], []))
    assert math.isnan(metrics.brier([], []))
    assert math.isnan(metrics.length_calibration([], []).mean_error)
    assert all(math.isnan(x) for x in metrics.paired_bootstrap([]))
    assert metrics.within_prompt_auc(np.zeros((3, 4)), np.ones((3, 4)))[1] == 0


def test_nan_items_raise():
    for function in (
        metrics.auc,
        metrics.brier,
        metrics.ece,
        metrics.binary_metrics,
        metrics.length_calibration,
    ):
        with pytest.raises(ValueError, match="NaN"):
            function([0.5, math.nan], [1, 0])
    with pytest.raises(ValueError, match="NaN"):
        metrics.within_prompt_auc([[0.5, math.nan]], [[1, 0]])
    with pytest.raises(ValueError, match="NaN"):
        metrics.paired_bootstrap([1.0, math.nan])


@pytest.mark.parametrize("seed", range(3))
def test_ece_and_brier_by_hand(seed):
    prob, outcome = items(seed)
    bins: dict[int, list[int]] = {}
    for i, p in enumerate(prob):
        bins.setdefault(min(round(p * 20) // 2, 9), []).append(i)
    expected = sum(
        abs(sum(prob[i] - outcome[i] for i in members)) for members in bins.values()
    ) / len(prob)
    assert metrics.ece(prob, outcome) == pytest.approx(expected)
    assert metrics.brier(prob, outcome) == pytest.approx(
        sum((p - y) ** 2 for p, y in zip(prob, outcome, strict=True)) / len(prob)
    )
    assert sum(b.count for b in metrics.reliability(prob, outcome)) == len(prob)


def test_ece_rejects_what_is_no_probability():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metrics.ece([1.2], [1])


def test_length_calibration():
    rng = np.random.default_rng(1)
    observed = rng.integers(1, 500, 400).astype(float)
    predicted = observed + rng.normal(7, 3, 400)
    found = metrics.length_calibration(predicted, observed, bins=8)
    assert found.mean_error == pytest.approx((predicted - observed).mean())
    assert found.mean_absolute_error == pytest.approx(np.abs(predicted - observed).mean())
    assert [b.count for b in found.table] == [50] * 8
    order = np.argsort(predicted)
    for b, members in zip(found.table, np.split(order, 8), strict=True):
        assert b.predicted == pytest.approx(predicted[members].mean())
        assert b.observed == pytest.approx(observed[members].mean())
    constant = metrics.length_calibration(np.full(5, 3.0), np.arange(5.0))
    assert [(b.count, b.observed) for b in constant.table] == [(5, 2.0)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_auc_is_the_share_of_ordered_pairs(data):
    score, outcome = zip(*data, strict=True)
    assert metrics.auc(score, outcome) == pytest.approx(slow_auc(score, outcome), nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_within_prompt_auc_averages_over_mixed_prompts(seed):
    rng = np.random.default_rng(seed)
    score, outcome = (
        rng.integers(0, 4, (30, 5)).astype(float),
        rng.random((30, 5)) < rng.random((30, 1)) ** 2,
    )
    mask = rng.random((30, 5)) < 0.8
    score[~mask] = math.nan  # masked samples may hold anything
    rows = [(score[i, mask[i]], outcome[i, mask[i]]) for i in range(30)]
    mixed = [(s, y) for s, y in rows if y.any() and not y.all()]
    assert 0 < len(mixed) < 30
    found, count = metrics.within_prompt_auc(score, outcome, mask)
    assert (found, count) == (
        pytest.approx(np.mean([slow_auc(s, y) for s, y in mixed])),
        len(mixed),
    )
    pairs = [y.sum() * (~y).sum() for _, y in mixed]
    weighted, _ = metrics.within_prompt_auc(score, outcome, mask, pair_weighted=True)
    assert weighted == pytest.approx(np.average([slow_auc(s, y) for s, y in mixed], weights=pairs))


def test_pooled_auc_can_be_high_where_selection_is_impossible():
    difficulty = np.repeat(np.arange(10) / 10, 8).reshape(10, 8)
    outcome = np.random.default_rng(0).random((10, 8)) < difficulty
    assert metrics.auc(difficulty, outcome) > 0.7
    assert metrics.within_prompt_auc(difficulty, outcome)[0] == 0.5


def test_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        mean, low, high = metrics.paired_bootstrap(rng.normal(0.1, 1, 80), 500, seed=trial)
        assert low < mean < high
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_bootstrap_is_reproducible_and_matches_the_normal_width():
    difference = np.random.default_rng(3).normal(0, 1, 400)
    first = metrics.paired_bootstrap(difference, 4000, seed=5)
    assert first == metrics.paired_bootstrap(difference, 4000, seed=5)
    assert first != metrics.paired_bootstrap(difference, 4000, seed=6)
    assert first[2] - first[1] == pytest.approx(2 * 1.96 * difference.std() / 20, rel=0.05)
    assert metrics.paired_bootstrap([0.25, 0.25], 10) == (0.25, 0.25, 0.25)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    correct = (
        np.random.default_rng(0).random((6, 7)) < np.array([0, 0.1, 0.3, 0.5, 0.9, 1])[:, None]
    )
    for k in range(1, 8):
        expected = [
            np.mean([row[list(subset)].any() for subset in itertools.combinations(range(7), k)])
            for row in correct
        ]
        np.testing.assert_allclose(metrics.pass_at_k(correct, k), expected)
    with pytest.raises(ValueError, match="k=8"):
        metrics.pass_at_k(correct, 8)
