"""Methods that stop early, against the papers' rules in plain Python, order by order."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from harness.pools import slow_best, slow_sequential, slow_vote, small_pool
from zip_rc_jax.evaluation import sequential
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.runtime.errors import UsageError

POOL = small_pool(0)


def assert_equals_the_slow_way(point, pool, wave, stop, reward):
    """`stop(prompt, drawn)` and `reward(prompt, drawn)` are the method."""
    for p in range(pool.n_prompts):
        accuracy, tokens, steps = slow_sequential(
            pool, p, point.n, wave, lambda d, p=p: stop(p, d), lambda d, p=p: reward(p, d)
        )
        mean = pool.self_length[p].mean()
        assert point.accuracy[p] == pytest.approx(accuracy, abs=1e-9), (point.name, p)
        assert point.compute[p] == pytest.approx(tokens / mean), (point.name, p)
        assert point.latency[p] == pytest.approx(steps / mean), (point.name, p)
    assert not point.standard_error.any()


def majority(p, drawn, pool=POOL):
    ids = [pool.answer_id[p, i] for i in drawn]
    return slow_vote(ids, [1] * len(ids), [pool.correct[p, i] for i in drawn])


def votes(p, drawn, pool=POOL):
    return sorted(
        Counter(pool.answer_id[p, i] for i in drawn if pool.answer_id[p, i] >= 0).values()
    )


# ---- adaptive-consistency


def beta_tail(a, b):
    """P(p > 1/2) of Beta(a + 1, b + 1), by integrating the polynomial p^a (1 - p)^b exactly."""

    def integral(low, high):
        return sum(
            Fraction((-1) ** j * math.comb(b, j), a + j + 1)
            * (Fraction(high) ** (a + j + 1) - Fraction(low) ** (a + j + 1))
            for j in range(b + 1)
        )

    return integral(Fraction(1, 2), 1) / integral(0, 1)


@pytest.mark.parametrize(("wave", "most"), [(1, 5), (2, 5), (1, 3), (3, 4)])
def test_adaptive_consistency_stops_when_the_two_leaders_are_far_apart(wave, most):
    thresholds = (0.6, 0.8, 0.9)
    points = sequential.adaptive_consistency(POOL, thresholds, most=most, wave=wave)
    for threshold, point in zip(thresholds, points, strict=True):

        def stop(p, drawn, threshold=threshold):
            counts = [0, 0, *votes(p, drawn)]
            return beta_tail(counts[-1], counts[-2]) >= threshold

        assert_equals_the_slow_way(point, POOL, wave, stop, majority)


@functools.cache
def dirichlet_lead(leader, others):
    """P(X > all Y_j) of Gamma variables with whole shapes, by integrating exactly: the product of
    1 - exp(-x) sum(x^i / i!) is a sum of polynomials times exp(-m x)."""
    terms = {0: {leader: Fraction(1, math.factorial(leader))}}  # m -> degree -> coefficient
    for count in others:
        more: dict = {}
        for m, polynomial in terms.items():
            for degree, c in polynomial.items():
                kept = more.setdefault(m, {})
                kept[degree] = kept.get(degree, Fraction(0)) + c
                lost = more.setdefault(m + 1, {})
                for i in range(count + 1):
                    lost[degree + i] = lost.get(degree + i, Fraction(0)) - c / math.factorial(i)
        terms = more
    return sum(
        c * math.factorial(degree) / Fraction(m + 1) ** (degree + 1)
        for m, polynomial in terms.items()
        for degree, c in polynomial.items()
    )


@pytest.mark.parametrize(
    "counts", [(0,), (3,), (4, 1), (5, 3, 3), (2, 2, 2, 1), (14, 9, 2), (9, 0)]
)
def test_the_dirichlet_criterion_is_the_exact_integral(counts):
    seen = sorted((c for c in counts if c), reverse=True) or [0]
    exact = float(dirichlet_lead(seen[0], (*seen[1:], 0)))
    found = sequential.leader_posterior(np.array(counts), "dirichlet")
    assert found == pytest.approx(exact, abs=1e-9)
    if len(seen) == 1:  # one answer, and one that nobody gave: the Beta
        assert found == pytest.approx(float(beta_tail(seen[0], 0)), abs=1e-9)


def test_adaptive_consistency_by_the_dirichlet_criterion():
    (point,) = sequential.adaptive_consistency(POOL, (0.7,), criterion="dirichlet")

    def stop(p, drawn):
        leader, *others = reversed([*votes(p, drawn)] or [0])
        return dirichlet_lead(leader, (*others, 0)) >= 0.7

    assert_equals_the_slow_way(point, POOL, 1, stop, majority)


def test_a_threshold_that_is_never_reached_is_the_plain_majority_of_all():
    (point,) = sequential.adaptive_consistency(POOL, (1.0,), wave=5)
    plain = baseline_point(POOL, "majority", 5)
    np.testing.assert_allclose(point.accuracy, plain.accuracy)
    np.testing.assert_allclose(point.cost(0.3), plain.cost(0.3))
    (one,) = sequential.adaptive_consistency(POOL, (0.0,))
    np.testing.assert_allclose(one.cost(0.3), 1)


# ---- early-stopping self-consistency


@pytest.mark.parametrize("window", [1, 2, 3])
def test_early_stopping_ends_at_the_first_window_that_agrees(window):
    (point,) = sequential.early_stopping(POOL, (window,))
    assert point.name == f"early_stopping@5 window={window}"

    def stop(p, drawn):
        last = drawn[-window:] if len(drawn) % window == 0 else drawn[-(len(drawn) % window) :]
        answers = {int(POOL.answer_id[p, i]) for i in last}
        return len(answers) == 1 and answers != {-1}

    assert_equals_the_slow_way(point, POOL, window, stop, majority)


# ---- a posterior over answers


def posterior(p, drawn, confidence):
    """Of every answer that was seen, its posterior mass, over these and one more answer."""
    seen = sorted({int(POOL.answer_id[p, i]) for i in drawn if POOL.answer_id[p, i] >= 0})
    answers = [*seen, None]
    mass = []
    for answer in answers:
        likelihood = 1.0
        for i in drawn:
            given = int(POOL.answer_id[p, i])
            c = min(max(confidence[p, i], 1e-6), 1 - 1e-6)
            if given >= 0:
                likelihood *= c if given == answer else (1 - c) / (len(answers) - 1)
        mass.append(likelihood)
    return {a: m / sum(mass) for a, m in zip(seen, mass, strict=False)}


@pytest.mark.parametrize("wave", [1, 2])
def test_the_posterior_is_the_product_of_the_evidence_of_every_sample(wave):
    rng = np.random.default_rng(3)
    given = np.where(rng.random((6, 5)) < 0.2, 1.0, rng.random((6, 5)))
    points = sequential.confidence_posterior(POOL, (0.7, 0.95), confidence=given, wave=wave)
    for threshold, point in zip((0.7, 0.95), points, strict=True):

        def stop(p, drawn, threshold=threshold):
            return max(posterior(p, drawn, given).values(), default=0) >= threshold

        def reward(p, drawn):
            mass = posterior(p, drawn, given)
            return (
                majority(p, drawn)
                if not mass
                else Fraction(
                    float(
                        np.mean(
                            [a == 1 for a in mass if mass[a] >= max(mass.values()) * (1 - 1e-9)]
                        )
                    )
                )
            )

        assert_equals_the_slow_way(point, POOL, wave, stop, reward)


# ---- Pandora's box


@functools.cache
def slow_index(values, cost, bonus):
    """The index by bisection of its defining equation."""
    low, high = -10.0, 1.0 + 1e-12
    for _ in range(60):
        t = (low + high) / 2
        gain = np.mean([max(v - t, 0) for v in values]) + bonus * (1 - t)
        low, high = (t, high) if gain > cost else (low, t)
    return low


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_the_reservation_value_makes_one_more_sample_worth_its_price(bonus):
    rng = np.random.default_rng(0)
    for m in (1, 2, 7):
        for cost in (0.01, 0.2, 0.9):
            values = rng.integers(0, 9, m) / 8
            found = sequential.reservation_value(values, cost, bonus)
            assert found == pytest.approx(slow_index(tuple(values), cost, bonus), abs=1e-9)


@pytest.mark.parametrize(("known", "wave"), [(False, 1), (False, 2), (True, 1)])
def test_pandora_opens_boxes_while_the_best_lies_below_the_index(known, wave):
    costs = (0.05, 0.3, 0.8)
    points = sequential.pandora(POOL, costs, known=known, wave=wave, delta=0.5)
    for cost, point in zip(costs, points, strict=True):

        def stop(p, drawn, cost=cost):
            mine = [POOL.value[p, i] for i in drawn]
            bound = 0 if known else math.sqrt(math.log(1 / 0.5) / (2 * len(drawn)))
            values = POOL.value[p] if known else mine
            return max(mine) >= slow_index(tuple(sorted(values)), cost, bound) - 1e-9

        def reward(p, drawn):
            rows = [[x[p, i] for i in drawn] for x in (POOL.answer_id, POOL.value, POOL.correct)]
            return slow_best(*rows)

        assert_equals_the_slow_way(point, POOL, wave, stop, reward)


# ---- drawn orders, and what is refused


def test_drawn_orders_agree_with_all_orders_within_the_stated_error():
    pool = small_pool(4, prompts=40)
    drawn = Draws(enumerated=1, sampled=300, seed=1)
    for method in (sequential.adaptive_consistency, sequential.confidence_posterior):
        (exact,), (found,) = method(pool, (0.8,)), method(pool, (0.8,), draws=drawn)
        error = found.standard_error
        off = np.abs(found.accuracy - exact.accuracy)[error > 0] / error[error > 0]
        assert len(off) > 5
        assert off.max() < 4.5
        assert off.mean() < 1.4
        np.testing.assert_allclose(found.compute, exact.compute, rtol=0.15)
        np.testing.assert_allclose(found.latency, exact.latency, rtol=0.15)


def test_many_samples_are_no_limit():
    pool = small_pool(5, prompts=3, n=70)
    (point,) = sequential.adaptive_consistency(pool, draws=Draws(sampled=50))
    assert point.n == 70
    assert (point.compute[1:] < 70).all()
    assert np.isfinite(point.accuracy).all()


def test_costs_fall_with_the_threshold():
    curve = sequential.adaptive_consistency(POOL, (0.5, 0.7, 0.8, 0.95, 1.0))
    compute = [point.compute.mean() for point in curve]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(compute))
    assert compute[0] < compute[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequential.adaptive_consistency(POOL, (1.2,)), r"threshold=1\.2: it is no number"),
        (lambda: sequential.adaptive_consistency(POOL, ()), "without a threshold"),
        (lambda: sequential.adaptive_consistency(POOL, most=6), "n=6: the pool has 5 samples"),
        (lambda: sequential.adaptive_consistency(POOL, wave=0), "wave=0"),
        (lambda: sequential.adaptive_consistency(POOL, criterion="b"), "criterion='b'"),
        (lambda: sequential.early_stopping(POOL, (6,)), "wave=6.*from 1 to 5"),
        (lambda: sequential.pandora(POOL, (0.0,)), "cost=0.0"),
        (lambda: sequential.pandora(POOL, delta=1), "delta=1"),
        (
            lambda: sequential.confidence_posterior(POOL, confidence=POOL.value + 1),
            r"confidence 1\.125.*pass confidences in \[0, 1\]",
        ),
        (
            lambda: sequential.pandora(
                SamplePool(
                    POOL.correct, POOL.answer_id, POOL.value - 2, POOL.self_length, POOL.level
                )
            ),
            "holds for rewards in",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message) as refusal:
        call()
    assert len(str(refusal.value)) < 900
