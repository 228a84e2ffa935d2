"""The table of methods and benchmarks: equal cost, unions, and the noise floor beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from harness.pools import small_pool
from zip_rc_jax.evaluation.baselines import baseline_curves
from zip_rc_jax.evaluation.benchmark_table import Measured, benchmark_table
from zip_rc_jax.evaluation.cost import OnlineRun
from zip_rc_jax.evaluation.metrics import total_variation_floor


def run_of(pool, share, *, strategy="zip_rc"):
    """A run that spends `share` mean samples of every prompt, and is right half the time."""
    right = np.arange(pool.n_prompts) % 2
    mean = pool.mean_length
    return OnlineRun(
        name=f"{strategy} run", alpha=0.5, beta=0.1, candidates="published", strategy=strategy,
        correct_by_value=right, correct_by_vote=1 - right, correct_by_majority=right,
        tokens=share * mean, serial_steps=share * mean, n_started=right, n_finished=right,
        seconds=1.0,
    )  # fmt: skip


def measured(name, pool, share=2.1):
    return Measured(name, name, pool, baseline_curves(pool), (run_of(pool, share),))


def table_of(*benchmarks, **options):
    settings = {"alphas": (0.5,), "headline_beta": (0.1,), "answer": "value", "resamples": 50}
    found = benchmark_table(benchmarks, **(settings | options))
    return {(c.method, c.benchmark): c for c in found.cells}


def test_a_method_stands_at_its_cheapest_setting_that_costs_at_least_as_much():
    pool = small_pool(0, prompts=6)
    curves = baseline_curves(pool)
    for share in (0.5, 1.7, 2.5, 100.0):
        cells = table_of(measured("a", pool, share))
        for method, points in curves.items():
            costs = [p.cost(0.5).mean() for p in points]
            enough = [i for i, cost in enumerate(costs) if cost >= share]
            expected = points[enough[0] if enough else -1]
            cell = cells[method, "a"]
            assert cell.setting == expected.name
            assert cell.accuracy == pytest.approx(expected.accuracy.mean())
            assert cell.spends_less == (not enough)


def test_the_answer_that_counts_is_the_one_asked_for():
    pool = small_pool(0, prompts=5)
    by_value = table_of(measured("a", pool))["zip_rc published", "a"]
    by_vote = table_of(measured("a", pool), answer="vote")["zip_rc published", "a"]
    assert by_value.accuracy == pytest.approx(2 / 5)
    assert by_vote.accuracy == pytest.approx(3 / 5)


def test_a_union_chooses_one_setting_for_all_its_problems():
    """At equal cost over all of them, and not on each part."""
    first, second = small_pool(0, prompts=2), small_pool(1, prompts=6)
    parts = measured("a", first, 1.2), measured("b", second, 3.5)
    cells = table_of(*parts, Measured("u", "U", parts=parts))
    union = cells["majority", "u"]
    target = (2 * 1.2 + 6 * 3.5) / 8
    costs = [
        np.concatenate([p.cost(0.5), q.cost(0.5)]).mean()
        for p, q in zip(parts[0].curves["majority"], parts[1].curves["majority"], strict=True)
    ]
    n = next(i for i, cost in enumerate(costs) if cost >= target)
    points = [part.curves["majority"][n] for part in parts]
    assert union.setting == points[0].name
    assert union.accuracy == pytest.approx(np.concatenate([p.accuracy for p in points]).mean())
    assert union.problems == 8


def test_every_problem_counting_alike_gives_the_mixed_figures_of_the_paper():
    """Accuracies in % on AIME24, AMC23, MATH-500, GSM8K and Mixed (arXiv 2512.01457, Qwen3-1.7B):
    this is why `mixed` is weighted by problems."""
    sizes = np.array([30, 40, 500, 1319])
    for parts, mixed in (
        ((65.8, 90.9, 94.1, 92.2), 92.2),
        ((53.1, 87.9, 93.0, 91.2), 91.0),
        ((25.1, 58.5, 84.7, 91.6), 88.0),
        ((43.3, 86.0, 90.3, 89.6), 88.9),
    ):
        assert sizes @ parts / sizes.sum() == pytest.approx(mixed, abs=0.15)
        assert abs(np.mean(parts) - mixed) > 3


def test_the_noise_floor_is_the_mean_distance_of_all_samples_that_could_be_drawn():
    joint = np.array([[0.5, 0.0, 0.125], [0.25, 0.125, 0.0]])
    cells = joint.ravel()
    for samples in (1, 2, 4):
        expected = 0.0
        for drawn in itertools.product(range(6), repeat=samples):
            share = np.bincount(drawn, minlength=6) / samples
            expected += np.prod(cells[list(drawn)]) * np.abs(share - cells).sum() / 2
        assert total_variation_floor(joint, samples) == pytest.approx(expected)
    certain = np.array([[1.0, 0.0]])
    assert total_variation_floor(certain, 3) == 0
    many = total_variation_floor(np.full((2, 2, 2), 0.25), 256)
    assert many.shape == (2,)
    assert many == pytest.approx(0.5 * 4 * np.sqrt(2 * 0.25 * 0.75 / (np.pi * 256)), rel=0.01)
    with pytest.raises(ValueError, match="at least one"):
        total_variation_floor(joint, 0)
