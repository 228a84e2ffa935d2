"""Baselines from plain arrays equal loops over all subsets, and refuse arrays by their names."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from zip_rc_jax import evaluation
from zip_rc_jax.runtime.errors import UsageError

RNG = np.random.default_rng(0)
P, N = 7, 5
CORRECT = RNG.integers(0, 2, (P, N)).astype(float)
VALUE = RNG.integers(0, 4, (P, N)) / 4  # with ties
ANSWERS = RNG.choice(np.array(["3", "4", "x", None], object), (P, N))
TOKENS = RNG.integers(1, 30, (P, N))


def reward(subset, rule, p):
    """Expected reward of a rule on these samples of prompt p, ties between winners split evenly."""
    answered = [i for i in subset if ANSWERS[p, i] is not None]
    if rule == "best":
        pool = answered or list(subset)
        top = max(VALUE[p, i] for i in pool)
        return np.mean([CORRECT[p, i] for i in pool if VALUE[p, i] == top])
    if not answered:
        return np.mean([CORRECT[p, i] for i in subset])
    votes: dict = {}
    for i in answered:
        votes.setdefault(ANSWERS[p, i], []).append(i)
    weight = {
        a: len(m) if rule == "majority" else sum(VALUE[p, i] for i in m) for a, m in votes.items()
    }
    winners = [a for a in votes if weight[a] == max(weight.values())]
    return np.mean([np.mean([CORRECT[p, i] for i in votes[a]]) for a in winners])


def by_loops(rule, n):
    return [
        np.mean([reward(s, rule, p) for s in itertools.combinations(range(N), n)]) for p in range(P)
    ]


@pytest.mark.parametrize("n", [1, 2, 4, N, None])
def test_every_rule_equals_a_loop_over_all_subsets(n):
    size = n or N
    np.testing.assert_allclose(
        evaluation.majority_vote(CORRECT, ANSWERS, n), by_loops("majority", size)
    )
    np.testing.assert_allclose(
        evaluation.weighted_vote(CORRECT, VALUE, ANSWERS, n), by_loops("weighted", size)
    )
    np.testing.assert_allclose(
        evaluation.best_of_n(CORRECT, VALUE, ANSWERS, n), by_loops("best", size)
    )


@pytest.mark.parametrize("k", [1, 3, N])
def test_pass_at_k_equals_a_loop_over_all_subsets(k):
    loops = [
        np.mean([max(CORRECT[p, list(s)]) for s in itertools.combinations(range(N), k)])
        for p in range(P)
    ]
    np.testing.assert_allclose(evaluation.pass_at_k(CORRECT, k), loops)


def test_all_of_many_samples_vote_without_any_subset():
    correct = np.tile([1.0, 0.0, 0.0], (2, 20))
    assert evaluation.majority_vote(correct, np.tile(["a", "b", "b"], (2, 20))).tolist() == [0, 0]
    # 3 of 60 samples: "a" wins with two or three of the 20 that say so.
    found = evaluation.majority_vote(correct, np.tile(["a", "b", "b"], (2, 20)), 3)
    wins = math.comb(20, 2) * 40 + math.comb(20, 3)
    np.testing.assert_allclose(found, wins / math.comb(60, 3))


def test_within_prompt_auc_equals_a_loop_over_pairs_and_masked_samples_may_hold_anything():
    mask = RNG.random((P, N)) < 0.8
    expected = []
    for p in range(P):
        pairs = [
            (VALUE[p, i] > VALUE[p, j]) + (VALUE[p, i] == VALUE[p, j]) / 2
            for i in range(N)
            for j in range(N)
            if mask[p, i] and mask[p, j] and CORRECT[p, i] > CORRECT[p, j]
        ]
        expected += [np.mean(pairs)] if pairs else []
    value = np.where(mask, VALUE, np.nan)
    assert evaluation.within_prompt_auc(value, CORRECT, mask) == pytest.approx(np.mean(expected))
    assert math.isnan(evaluation.within_prompt_auc(VALUE, np.ones((P, N))))


def test_curves_hold_the_same_rewards_and_cost_one_unit_per_sample():
    found = evaluation.curves(CORRECT, VALUE, TOKENS, ANSWERS)
    for n in range(1, N + 1):
        np.testing.assert_allclose(found["majority"][n - 1].accuracy, by_loops("majority", n))
        longest = np.array(
            [
                np.mean([max(TOKENS[p, list(s)]) for s in itertools.combinations(range(N), n)])
                for p in range(P)
            ]
        )
        np.testing.assert_allclose(
            found["majority"][n - 1].cost(0.25), 0.25 * n + 0.75 * longest / TOKENS.mean(1)
        )


def test_cost_is_counted_in_mean_samples():
    found = evaluation.normalized_cost([30, 8], [10, 8], [10, 4], alpha=0.1)
    assert found.compute.tolist() == [3, 2]
    np.testing.assert_allclose(found.gen_cost, [0.1 * 3 + 0.9 * 1, 2])


def test_a_paired_comparison_is_the_mean_difference_with_a_bootstrap_interval():
    a, b = RNG.random(40), RNG.random(40)
    found = evaluation.paired_comparison(a, b, resamples=4000, seed=1)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    rng = np.random.default_rng(9)  # other resamples, so only nearly equal
    means = [np.mean((a - b)[rng.integers(0, 40, 40)]) for _ in range(4000)]
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.02
    )
    assert found == evaluation.paired_comparison(a, b, resamples=4000, seed=1)


def test_equal_answers_have_equal_numbers_and_none_is_no_answer():
    assert evaluation.answer_ids([["a", None, "b", "a"], [None, "a", "b", "b"]]).tolist() == [
        [0, -1, 1, 0],
        [-1, 0, 1, 1],
    ]
    assert evaluation.answer_ids([[7.0, math.nan, 7.0]]).tolist() == [[0, -1, 0]]
    assert evaluation.answer_ids([[-1, 4, 4]]).tolist() == [[-1, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluation.majority_vote(CORRECT[0], ANSWERS),
            r"correct of shape \(5,\).*pass \[prompts, samples\]",
        ),
        (
            lambda: evaluation.majority_vote(CORRECT, ANSWERS[:, :2]),
            r"answers of shape \(7, 2\): correct has shape \(7, 5\)",
        ),
        (
            lambda: evaluation.majority_vote(CORRECT, [["a"], ["b", "c"]]),
            r"answers=.*it is no matrix",
        ),
        (
            lambda: evaluation.majority_vote(CORRECT, ANSWERS, 6),
            r"n=6: it is no whole number from 1 to 5",
        ),
        (lambda: evaluation.best_of_n(CORRECT, VALUE * np.nan), r"value: it holds NaN"),
        (lambda: evaluation.best_of_n(CORRECT, "high"), r"value='high': it is no array of numbers"),
        (lambda: evaluation.weighted_vote([[math.nan]], [[1]], [["a"]]), r"correct: it holds NaN"),
        (lambda: evaluation.pass_at_k(CORRECT, 0), r"k=0: it is no whole number from 1 to 5"),
        (lambda: evaluation.within_prompt_auc(VALUE[:2], CORRECT), r"value of shape \(2, 5\)"),
        (
            lambda: evaluation.curves(CORRECT, VALUE, TOKENS[:, 0], ANSWERS),
            r"tokens of shape \(7,\)",
        ),
        (lambda: evaluation.curves(CORRECT, VALUE, TOKENS, ANSWERS, ("best",)), r"method='best'"),
        (
            lambda: evaluation.normalized_cost([1], [1, 2], [1], 0.1),
            r"serial_steps of shape \(2,\)",
        ),
        (lambda: evaluation.normalized_cost([1], [1], [1], 1.5), r"alpha=1\.5"),
        (
            lambda: evaluation.paired_comparison([1, 2], [1]),
            r"a of shape \(2,\) with b of shape \(1,\)",
        ),
        (lambda: evaluation.paired_comparison([1], [1], resamples=0), r"resamples=0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message) as refusal:
        call()
    assert len(str(refusal.value)) <= 900
