"""Comparison at equal cost: the matching rule on hand-made numbers, and the statistics on simulated
runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool, baseline_curves
from zip_rc_jax.evaluation.compare import compare, headline, restrict
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.metrics import paired_bootstrap
from zip_rc_jax.runtime.errors import UsageError

# Four prompts of two levels, all of mean length 10. The baseline's GenCost at alpha 1 is n on level
# 1 and 2n on level 2.
LEVEL = np.array([1, 1, 2, 2])
SCALE = np.array([1.0, 1.0, 2.0, 2.0])
ACCURACY = {1: [0.5, 0.5, 0.0, 0.0], 2: [0.75, 0.75, 0.25, 0.25], 3: [1.0, 1.0, 0.5, 0.0]}
CURVE = tuple(
    BaselinePoint("majority", n, np.array(a), n * SCALE, np.ones(4)) for n, a in ACCURACY.items()
)
POOL = SamplePool(np.ones((4, 2)), np.zeros((4, 2)), np.ones((4, 2)), np.full((4, 2), 10), LEVEL)


def run_of(compute, value=(1, 1, 1, 0), vote=(1, 0, 0, 0), **changes):
    """A run that spends `compute` mean samples on each prompt."""
    fields = {
        "name": "zip",
        "alpha": 1.0,
        "beta": 0.05,
        "candidates": "published",
        "strategy": "zip_rc",
        "seconds": 1.0,
    }
    tokens = 10 * np.broadcast_to(np.asarray(compute, float), 4)
    arrays = {
        "correct_by_value": value,
        "correct_by_vote": vote,
        "correct_by_majority": vote,
        "tokens": tokens,
        "serial_steps": tokens,
        "n_started": tokens,
    }
    return OnlineRun(**{**fields, **arrays, "n_finished": tokens, **changes})


@pytest.mark.parametrize(
    ("compute", "n", "spent"),
    [(0.5, 1, 1.5), (1.5, 1, 1.5), (1.6, 2, 3.0), (3.0, 2, 3.0), (3.01, 3, 4.5), (4.5, 3, 4.5)],
)
def test_strict_takes_the_smallest_n_that_spends_at_least_as_much(compute, n, spent):
    found = compare(run_of(compute), CURVE, POOL, alpha=1.0)
    assert (found.n, found.baseline_cost, found.run_cost) == (n, spent, pytest.approx(compute))
    assert found.baseline_accuracy == pytest.approx(np.mean(ACCURACY[n]))
    assert found.difference == pytest.approx(0.75 - np.mean(ACCURACY[n]))
    assert found.baseline_cost >= found.run_cost - 1e-9
    assert not found.spends_less


def test_a_baseline_that_cannot_spend_as_much_is_flagged():
    for kind in ("strict", "interpolated"):
        found = compare(run_of(6.0), CURVE, POOL, alpha=1.0, kind=kind)
        assert (found.n, found.baseline_cost, found.spends_less) == (3, 4.5, True)


def test_interpolated_spends_exactly_as_much():
    # a third of the way from 1.5 to 3
    found = compare(run_of(2.0), CURVE, POOL, alpha=1.0, kind="interpolated")
    assert found.n == pytest.approx(1 + 1 / 3)
    assert found.baseline_cost == pytest.approx(2.0)
    assert found.baseline_accuracy == pytest.approx(
        2 / 3 * np.mean(ACCURACY[1]) + 1 / 3 * np.mean(ACCURACY[2])
    )
    below = compare(run_of(0.5), CURVE, POOL, alpha=1.0, kind="interpolated")
    assert (below.n, below.baseline_cost) == (1, 1.5)  # no fraction of a sample exists


def test_costs_are_equalised_on_the_level_itself():
    # mean 3: n = 2 on the mixture, but on level 2 it spends more than n = 2 does there
    run = run_of([1.0, 1.0, 5.0, 5.0])
    assert compare(run, CURVE, POOL, alpha=1.0).n == 2
    hard = compare(run, CURVE, POOL, alpha=1.0, level=2)
    assert (hard.n, hard.prompts, hard.run_cost, hard.baseline_cost) == (3, 2, 5.0, 6.0)
    assert (hard.run_accuracy, hard.baseline_accuracy) == (0.5, 0.25)
    assert compare(run, CURVE, POOL, alpha=1.0, level=1).n == 1


def test_alpha_prices_compute_against_latency():
    run = run_of(2.0)  # compute 2, latency 2; the baseline's latency is 1 at every n
    found = compare(run, CURVE, POOL, alpha=0.5)
    assert found.run_cost == pytest.approx(2.0)
    assert (found.n, found.baseline_cost) == (2, pytest.approx(0.5 * 3 + 0.5))


def test_both_answers_are_compared():
    assert compare(run_of(1.0), CURVE, POOL, alpha=1.0, answer="value").run_accuracy == 0.75
    assert compare(run_of(1.0), CURVE, POOL, alpha=1.0, answer="vote").run_accuracy == 0.25


def test_interval_is_the_paired_bootstrap_of_the_differences():
    run = run_of(3.0)
    found = compare(run, CURVE, POOL, alpha=1.0, resamples=500, seed=4)
    difference = run.correct_by_value - np.array(ACCURACY[2])
    assert (found.difference, found.low, found.high) == paired_bootstrap(difference, 500, 4)


def test_restrict_keeps_prompts_of_the_level():
    curves, (run,), pool = restrict({"majority": CURVE}, (run_of([1, 2, 3, 4]),), POOL, 2)
    np.testing.assert_array_equal(run.tokens, [30, 40])
    np.testing.assert_array_equal(curves["majority"][2].accuracy, [0.5, 0.0])
    assert pool.n_prompts == 2
    assert (run.name, run.seconds, curves["majority"][2].n) == ("zip", 1.0, 3)


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="level=7"):
        compare(run_of(1.0), CURVE, POOL, alpha=1.0, level=7)
    with pytest.raises(UsageError, match="kind='fair'"):
        compare(run_of(1.0), CURVE, POOL, alpha=1.0, kind="fair")
    with pytest.raises(UsageError, match="answer='best'"):
        compare(run_of(1.0), CURVE, POOL, alpha=1.0, answer="best")
    other = dataclasses.replace(
        POOL,
        **{
            f: getattr(POOL, f)[:3]
            for f in ("correct", "answer_id", "value", "self_length", "level")
        },
    )
    with pytest.raises(UsageError, match="4 prompts and the pool 3"):
        compare(run_of(1.0), CURVE, other, alpha=1.0)
    with pytest.raises(ValueError, match="n_started"):
        run_of(1.0, n_started=np.ones(3))


def simulated(seed, gain, prompts=200):
    """A pool and a run of the same success rates plus `gain`, at the cost of two samples."""
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.2, 0.7, prompts)
    correct = (rng.random((prompts, 4)) < rate[:, None]).astype(float)
    pool = SamplePool(
        correct,
        1 - correct,
        rng.random((prompts, 4)),
        np.full((prompts, 4), 20),
        np.arange(prompts) % 2,
    )
    right = rng.random(prompts) < rate + gain
    tokens = np.full(prompts, 40)
    voted = right & (np.arange(prompts) % 8 > 0)
    run = OnlineRun(
        "zip",
        1.0,
        0.05,
        "published",
        "zip_rc",
        right,
        voted,
        voted,
        tokens,
        tokens,
        tokens,
        tokens,
        1.0,
    )
    return pool, run


def test_a_run_without_gain_is_rarely_called_better():
    """Majority of two is a coin between two samples, so a run that draws one more sample has a true
    difference of 0."""
    covered = 0
    for seed in range(120):
        pool, run = simulated(seed, 0.0)
        found = compare(
            run,
            baseline_curves(pool, ("majority",))["majority"],
            pool,
            alpha=1.0,
            resamples=300,
            seed=seed,
        )
        assert found.n == 2
        covered += found.low <= 0 <= found.high
    assert covered >= 0.88 * 120


def test_headline_has_one_row_per_alpha_candidates_and_answer():
    pool, run = simulated(0, 0.25)
    curves = baseline_curves(pool)
    runs = [
        dataclasses.replace(
            run, name=f"{candidates}/{alpha}/{beta}", alpha=alpha, beta=beta, candidates=candidates
        )
        for alpha in (0.1, 1.0)
        for candidates in ("published", "branching")
        for beta in (0.1, 0.05, 0.02)
    ]
    runs.append(
        dataclasses.replace(run, name="half", alpha=0.1, beta=0.05, strategy="half_finished")
    )
    rows = headline(
        runs, curves, pool, alphas=(0.1, 1.0), headline_beta=(0.05, 0.02), resamples=200
    )
    expected = [
        (f"{candidates}/{alpha}/{beta}", answer)
        for alpha, beta in ((0.1, 0.05), (1.0, 0.02))
        for candidates in ("published", "branching")
        for answer in ("value", "vote")
    ]
    assert [(row.run.name, row.answer) for row in rows] == expected
    for row in rows:
        assert row.majority.low > 0
        assert (row.majority.method, row.weighted.method, row.weighted.kind) == (
            "majority",
            "weighted_best_of_n",
            "strict",
        )
        assert (row.majority.level, row.majority_hardest.level, row.weighted_hardest.level) == (
            None,
            1,
            1,
        )
        assert row.cost == pytest.approx(row.majority.run_cost)
        assert row.majority.alpha == row.run.alpha
        answered = {"value": row.run.correct_by_value, "vote": row.run.correct_by_vote}[row.answer]
        assert (
            row.accuracy
            == row.majority.run_accuracy
            == row.weighted.run_accuracy
            == answered.mean()
        )
        assert (
            row.majority_hardest.run_accuracy
            == row.weighted_hardest.run_accuracy
            == answered[pool.level == 1].mean()
        )
    with pytest.raises(UsageError, match=r"beta=0\.3"):
        headline(runs, curves, pool, alphas=(0.1,), headline_beta=(0.3,))
