"""The fixed-n baselines against plain enumeration of subsets and of tie-breaking."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from zip_rc_jax.evaluation import baselines, metrics
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_curves, baseline_point
from zip_rc_jax.evaluation.cost import OnlineRun, gen_cost, normalised_cost
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.runtime.errors import UsageError


def random_pool(seed, prompts=12, n=6):
    """Few answers and few distinct values, so that ties are frequent; a third of the prompts has
    samples without an answer."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(np.where(rng.random((prompts, 1)) < 0.34, -1, 0), 3, (prompts, n))
    answer[0] = -1  # one prompt without any answer
    return SamplePool(
        correct=(answer == 1).astype(float),
        answer_id=answer,
        value=rng.integers(0, 5, (prompts, n)) / 4,
        self_length=rng.integers(1, 40, (prompts, n)),
        level=np.arange(prompts) % 3,
    )


def slow_accuracy(pool, p, method, subset):
    """Exact accuracy on one subset, in fractions, over all ways to break ties."""
    samples = [i for i in subset if pool.answer_id[p, i] >= 0] or list(subset)
    if method == "pass":
        return Fraction(int(max(pool.correct[p, i] for i in subset)))
    if method == "best_of_n":
        top = max(pool.value[p, i] for i in samples)
        best = [i for i in samples if pool.value[p, i] == top]
        return Fraction(int(sum(pool.correct[p, i] for i in best)), len(best))
    score: dict[int, Fraction] = {}
    for i in samples:
        weight = Fraction(1) if method == "majority" else Fraction(pool.value[p, i])
        score[pool.answer_id[p, i]] = score.get(pool.answer_id[p, i], Fraction(0)) + weight
    tied = [a for a, s in score.items() if s == max(score.values())]
    return Fraction(sum(int(a == 1) for a in tied), len(tied))


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_expectation_over_all_subsets_and_ties(method, seed):
    pool = random_pool(seed)
    for n in range(1, 7):
        point = baseline_point(pool, method, n)
        subsets = list(itertools.combinations(range(6), n))
        for p in range(pool.n_prompts):
            expected = sum((slow_accuracy(pool, p, method, s) for s in subsets), Fraction(0)) / len(
                subsets
            )
            assert point.accuracy[p] == pytest.approx(float(expected), abs=1e-12), (n, p)
            lengths = [[pool.self_length[p, i] for i in s] for s in subsets]
            mean = pool.self_length[p].mean()
            assert point.compute[p] == pytest.approx(np.mean([sum(x) for x in lengths]) / mean)
            assert point.latency[p] == pytest.approx(np.mean([max(x) for x in lengths]) / mean)


def test_identities():
    pool = random_pool(3)
    curves = baseline_curves(pool)
    assert [p.name for p in curves["majority"][:2]] == ["majority@1", "majority@2"]
    for method, curve in curves.items():
        # one sample: nothing to choose
        np.testing.assert_allclose(curve[0].accuracy, pool.correct.mean(1), err_msg=method)
        np.testing.assert_allclose(curve[0].cost(0.3), 1)  # the unit of cost
        assert all(np.all(a.cost(0.3) <= b.cost(0.3) + 1e-12) for a, b in itertools.pairwise(curve))
    answered = np.all(pool.answer_id >= 0, axis=1)
    # two samples: a coin
    np.testing.assert_allclose(
        curves["majority"][0].accuracy[answered], curves["majority"][1].accuracy[answered]
    )
    for n, point in enumerate(curves["pass"], 1):
        np.testing.assert_allclose(point.accuracy, metrics.pass_at_k(pool.correct, n))


def test_the_majority_of_one_prompts_samples_is_the_baseline_of_all_of_them():
    pool = random_pool(4)
    found = [
        baselines.majority_reward(c, a) for c, a in zip(pool.correct, pool.answer_id, strict=True)
    ]
    np.testing.assert_allclose(found, baseline_point(pool, "majority", 6).accuracy)
    assert baselines.majority_reward(np.array([]), np.array([])) == 0


def test_self_evaluation_chooses_by_what_was_said_and_pays_for_asking():
    pool, rng = random_pool(6), np.random.default_rng(6)
    values, extra = rng.random((12, 6)), rng.integers(5, 20, (12, 6))
    curve = baselines.self_evaluation_curve(pool, values, extra)
    asked = SamplePool(pool.correct, pool.answer_id, values, pool.self_length, pool.level)
    assert [p.name for p in curve] == [f"self_evaluation@{n}" for n in range(1, 7)]
    np.testing.assert_allclose(curve[0].cost(0.3), 1)  # one sample: nobody asks
    for point in curve[1:]:
        plain = baseline_point(asked, "weighted_best_of_n", point.n)
        np.testing.assert_array_equal(point.accuracy, plain.accuracy)
        # Over all subsets of n, the mean of what asking takes is n times its mean.
        subsets = list(itertools.combinations(range(6), point.n))
        tokens = [
            [pool.self_length[p, list(s)].sum() + extra[p, list(s)].sum() for s in subsets]
            for p in range(12)
        ]
        np.testing.assert_allclose(point.compute, np.mean(tokens, axis=1) / pool.mean_length)
        np.testing.assert_allclose(point.latency, plain.latency + 1 / pool.mean_length)


def test_missing_answers_never_win():
    def accuracy(method, answer, correct, value):
        pool = SamplePool([correct], [answer], [value], np.ones((1, len(answer))), [0])
        return baseline_point(pool, method, len(answer)).accuracy[0]

    for method in ("majority", "best_of_n", "weighted_best_of_n"):
        assert accuracy(method, [-1, -1, 4], [0, 0, 1], [1, 1, 0.1]) == 1
        assert accuracy(method, [-1, -1, -1], [0, 0, 0], [1, 1, 1]) == 0


def test_rounding_does_not_break_a_tie():
    # 0.1 + 0.2 + 0.3 differs from 0.3 + 0.3 in the last bit: still a tie of two answers.
    pool = SamplePool(
        [[1, 1, 1, 0, 0]], [[0, 0, 0, 1, 1]], [[0.1, 0.2, 0.3, 0.3, 0.3]], np.ones((1, 5)), [0]
    )
    assert baseline_point(pool, "weighted_best_of_n", 5).accuracy[0] == pytest.approx(0.5)


COUNTED = Draws(enumerated=1)  # nothing is enumerated but all samples at once


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_formulas_equal_the_enumeration_of_all_subsets(seed):
    pool = random_pool(seed, n=7)
    for method in ("majority", "best_of_n", "pass"):
        for n in range(1, 8):
            enumerated, counted = (baseline_point(pool, method, n, d) for d in (None, COUNTED))
            np.testing.assert_allclose(counted.accuracy, enumerated.accuracy, err_msg=(method, n))
            np.testing.assert_allclose(counted.latency, enumerated.latency)
            assert not counted.standard_error.any()


def test_exact_formulas_hold_for_rewards_between_0_and_1():
    """Samples of one answer may differ in reward, and a reward may be a part of the score."""
    pool = random_pool(2, n=7)
    rewards = np.random.default_rng(2).random((12, 7))
    pool = SamplePool(rewards, pool.answer_id, pool.value, pool.self_length, pool.level)
    for method in ("majority", "best_of_n", "pass"):
        for n in (1, 3, 6):
            enumerated, counted = (baseline_point(pool, method, n, d) for d in (None, COUNTED))
            np.testing.assert_allclose(counted.accuracy, enumerated.accuracy, err_msg=(method, n))


def test_drawn_subsets_agree_with_all_subsets_within_the_stated_error():
    pool = random_pool(7, prompts=40, n=7)
    drawn = Draws(enumerated=1, sampled=400, seed=3)
    for n in (2, 4):
        whole = baseline_point(pool, "weighted_best_of_n", n)
        found = baseline_point(pool, "weighted_best_of_n", n, drawn)
        error = found.standard_error
        assert (error[:1] == 0).all()  # a prompt without any answer
        assert error[1:].max() < 0.5 / np.sqrt(399)
        # In 40 prompts two thirds lie within one error, and none beyond 4.5.
        off = np.abs(found.accuracy - whole.accuracy)[error > 0] / error[error > 0]
        assert off.max() < 4.5
        assert 0.5 < (off < 1).mean() < 0.9
        np.testing.assert_allclose(found.compute, n)
        assert not whole.standard_error.any()
        assert found.mean_error == pytest.approx(np.sqrt((error**2).sum()) / 40)
    same = baseline_point(pool, "weighted_best_of_n", 2, drawn)
    np.testing.assert_array_equal(
        same.accuracy, baseline_point(pool, "weighted_best_of_n", 2, drawn).accuracy
    )
    other = baseline_point(pool, "weighted_best_of_n", 2, Draws(enumerated=1, sampled=400, seed=4))
    assert (other.accuracy != same.accuracy).any()


def test_few_subsets_of_many_samples_are_all_averaged():
    pool = random_pool(8, prompts=4, n=20)
    for n in (1, 2, 19, 20):
        for method in ("weighted_best_of_n", "best_of_n", "majority"):
            point = baseline_point(pool, method, n)
            for p in range(4):
                subsets = list(itertools.combinations(range(20), n))
                exact = sum((slow_accuracy(pool, p, method, s) for s in subsets), Fraction(0))
                assert point.accuracy[p] == pytest.approx(float(exact / len(subsets))), (method, n)
            assert not point.standard_error.any()


def test_pools_of_hundreds_of_samples_have_curves():
    rng = np.random.default_rng(0)
    answer = rng.integers(-1, 4, (2, 300))
    pool = SamplePool(
        answer == 1, answer, rng.random((2, 300)), rng.integers(1, 99, (2, 300)), [0, 0]
    )
    majority, best = (baseline_point(pool, m, 100) for m in ("majority", "best_of_n"))
    drawn = np.stack([rng.permutation(300)[:100] for _ in range(4000)])
    for p in range(2):
        votes = np.stack([(answer[p][drawn] == g).sum(1) for g in range(4)], 1)
        top = votes == votes.max(1, keepdims=True)
        assert majority.accuracy[p] == pytest.approx((top[:, 1] / top.sum(1)).mean(), abs=0.03)
        value = np.where(answer[p] >= 0, pool.value[p], -1)
        chosen = np.take_along_axis(drawn, value[drawn].argmax(1)[:, None], 1)[:, 0]
        assert best.accuracy[p] == pytest.approx((answer[p][chosen] == 1).mean(), abs=0.03)
    longest = baseline_point(pool, "pass", 100).latency * pool.mean_length
    np.testing.assert_allclose(longest, pool.self_length[:, drawn].max(2).mean(1), rtol=0.01)


def test_chunks_of_prompts_do_not_matter(monkeypatch):
    pool = random_pool(5, prompts=7)
    whole = baseline_point(pool, "majority", 3)
    monkeypatch.setattr(baselines, "CHUNK", 2)
    np.testing.assert_array_equal(whole.accuracy, baseline_point(pool, "majority", 3).accuracy)
    np.testing.assert_array_equal(whole.latency, baseline_point(pool, "majority", 3).latency)


def test_bad_pools_and_points_are_named():
    pool = random_pool(0)
    with pytest.raises(UsageError, match="n=7"):
        baseline_point(pool, "majority", 7)
    with pytest.raises(UsageError, match="self_consistency"):
        baseline_point(pool, "self_consistency", 1)
    with pytest.raises(UsageError, match=r"Draws\.sampled=1"):
        Draws(sampled=1)
    with pytest.raises(UsageError, match="end token"):
        SamplePool([[1.0]], [[0]], [[0.5]], [[0]], [0])
    with pytest.raises(UsageError, match="NaN"):
        SamplePool([[1.0]], [[0]], [[np.nan]], [[3]], [0])
    with pytest.raises(UsageError, match=r"pool\.value"):
        SamplePool([[1.0]], [[0]], [[0.5, 0.5]], [[3]], [0])
    with pytest.raises(UsageError, match=r"pool\.level"):
        SamplePool([[1.0]], [[0]], [[0.5]], [[3]], [0, 1])


def test_cost_meter():
    cost = normalised_cost([30, 5], [10, 5], [10, 5], 0.25)
    np.testing.assert_allclose(cost.compute, [3, 1])
    np.testing.assert_allclose(cost.latency, [1, 1])
    np.testing.assert_allclose(cost.gen_cost, [0.25 * 3 + 0.75, 1])
    with pytest.raises(UsageError, match=r"alpha=1\.5"):
        gen_cost(1, 1, 1.5)
    with pytest.raises(UsageError, match="mean_length"):
        normalised_cost([1], [1], [0], 0.5)
    with pytest.raises(ValueError, match="one entry per prompt"):
        normalised_cost([1], [1, 2], [1], 0.5)


def test_fixed_baseline_and_online_run_share_the_meter():
    """All N samples of the pool, metered as an online run, cost what the baseline at n = N says."""
    pool = random_pool(2)
    zeros = np.zeros(pool.n_prompts)
    run = OnlineRun(
        name="fixed",
        alpha=np.nan,
        beta=np.nan,
        candidates="",
        strategy="fixed",
        correct_by_value=zeros,
        correct_by_vote=zeros,
        correct_by_majority=zeros,
        tokens=pool.self_length.sum(1),
        serial_steps=pool.self_length.max(1),
        n_started=zeros + 6,
        n_finished=zeros + 6,
        seconds=1.0,
    )
    np.testing.assert_allclose(
        run.cost(pool.mean_length, 0.1).gen_cost, baseline_point(pool, "majority", 6).cost(0.1)
    )
    assert not run.adaptive
    with pytest.raises(UsageError, match="answer='best'"):
        run.correct("best")
