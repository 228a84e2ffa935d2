"""Guarantees from plain arrays, against enumerations, and against populations whose risk is
known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from zip_rc_jax.evaluation.guarantees import (
    betting_p_value,
    binomial_p_value,
    error_p_value,
    fallback,
    loss_p_value,
    needed_for_errors,
    needed_for_loss,
    start_weights,
    upper_bound,
)
from zip_rc_jax.runtime.errors import UsageError


@pytest.mark.parametrize("delta", [0.05, 0.3, 0.9])
def test_the_binomial_p_value_is_the_sum_of_its_probabilities(delta):
    for answered in (1, 2, 7, 20):
        for errors in range(answered + 1):
            slow = math.fsum(
                math.comb(answered, k) * delta**k * (1 - delta) ** (answered - k)
                for k in range(errors + 1)
            )
            assert binomial_p_value(errors, answered, delta) == pytest.approx(slow, rel=1e-9)
    assert binomial_p_value(0, 0, delta) == 1.0, "nothing answered proves nothing"


def probability_of_rejection(m, rate, error_rate, delta, level, p_value):
    """By all outcomes of `m` problems, each unanswered, right or wrong."""
    chance = {0: 1 - rate, 1: rate * (1 - error_rate), 2: rate * error_rate}
    total = 0.0
    for outcome in itertools.product(range(3), repeat=m):
        kind = np.array(outcome)
        if p_value((kind == 2) * 1.0, (kind > 0) * 1.0, delta, level) <= level:
            total += math.prod(chance[k] for k in outcome)
    return total


def by_betting(error, answered, delta, level):
    return betting_p_value(delta + error - delta * answered, delta, level)


@pytest.mark.parametrize("p_value", [error_p_value, by_betting])
@pytest.mark.parametrize("rate", [0.3, 0.8, 1.0])
def test_a_risk_just_above_delta_is_accepted_at_most_as_often_as_the_level_says(p_value, rate):
    """Exactly, by enumeration: the ratio of means is what is controlled, whatever is answered."""
    for level in (0.05, 0.2, 0.4):
        found = probability_of_rejection(7, rate, 0.4, 0.4, level, p_value)
        assert found <= level
    assert probability_of_rejection(7, rate, 0.0, 0.4, 0.4, p_value) > 0, "the test can accept"


def test_losses_of_any_shape_keep_the_level_of_the_betting_test():
    rng = np.random.default_rng(0)
    draws = {
        "rare large losses": lambda: rng.choice([-1.0, 0.0, 1.0], 80, p=[0.01, 0.93, 0.06]),
        "graded": lambda: 0.05 + rng.uniform(-0.3, 0.3, 80),
        "nearly constant": lambda: 0.05 + rng.choice([-1e-3, 1e-3], 80),
    }
    for name, draw in draws.items():  # the mean of each is 0.05
        rejected = np.mean([loss_p_value(draw(), 0.05, 0.1) <= 0.1 for _ in range(1000)])
        assert rejected <= 0.1 + 3 * math.sqrt(0.09 / 1000), name
    better = [loss_p_value(rng.choice([0.0, 1.0], 400, p=[0.99, 0.01]), 0.05, 0.1) for _ in "ab"]
    assert max(better) <= 0.1, "a small variance is used"


def test_any_false_rejection_of_a_path_is_at_most_as_likely_as_epsilon():
    """Independent p-values of true hypotheses among false ones, whose p-values are 0."""
    rng, epsilon = np.random.default_rng(1), 0.1
    for false in ([0, 1, 2], [3], [0, 3], []):
        for starts in (1, 2, 6):
            p = rng.random((4000, 6))
            p[:, false] = 0
            weights = start_weights(6, starts)
            wrong = 0
            for row in p:
                _, rejected = fallback(row, weights, epsilon)
                wrong += np.delete(rejected, false).any()
            assert wrong / 4000 <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / 4000)


def test_a_rejected_test_passes_its_level_on_and_the_next_start_adds_its_own():
    levels, rejected = fallback([0.01, 0.2, 0.04, 0.09], [0.5, 0, 0.5, 0], 0.1)
    np.testing.assert_allclose(levels, [0.05, 0.05, 0.05, 0.05])
    assert rejected.tolist() == [True, False, True, False]
    levels, rejected = fallback([0.01, 0.05, 0.09], [0.5, 0, 0.5], 0.1)
    np.testing.assert_allclose(levels, [0.05, 0.05, 0.1])
    assert rejected.all()
    assert not fallback([0.0], [0.0], 0.1)[1].any(), "a test without a level proves nothing"


def test_weights_stand_at_evenly_spaced_starts_and_add_up_to_one():
    assert start_weights(6, 3).tolist() == [1 / 3, 0, 1 / 3, 0, 1 / 3, 0]
    assert start_weights(2, 4).tolist() == [0.5, 0.5]
    assert start_weights(5, 1).tolist() == [1, 0, 0, 0, 0]


def test_the_upper_bound_is_that_of_clopper_and_pearson():
    # The known closed form: no error among m gives 1 - level^(1/m).
    bound = upper_bound(lambda delta: binomial_p_value(0, 50, delta), 0.1)
    assert bound == pytest.approx(1 - 0.1 ** (1 / 50), abs=1e-9)
    found = upper_bound(lambda delta: binomial_p_value(3, 50, delta), 0.1)
    assert binomial_p_value(3, 50, found) == pytest.approx(0.1, abs=1e-6)


def test_the_least_number_of_problems_is_the_first_that_can_pass():
    assert needed_for_errors(0.05, 0.1, exact=True) == math.ceil(math.log(0.1) / math.log(0.95))
    for needed, p_value in (
        (needed_for_errors(0.05, 0.1, exact=True), lambda m: binomial_p_value(0, m, 0.05)),
        (needed_for_errors(0.1, 0.1, exact=False), lambda m: betting_p_value(m * [0], 0.1, 0.1)),
        (needed_for_loss(0.02, 0.1), lambda m: loss_p_value(np.zeros(m), 0.02, 0.1)),
    ):
        assert p_value(needed) <= 0.1 < p_value(needed - 1)
    with pytest.raises(UsageError, match="the guarantee: more than 4,194,304 problems"):
        needed_for_loss(1e-9, 0.1)


def test_what_is_no_loss_is_refused():
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        betting_p_value(np.array([0.5, 1.5]), 0.1, 0.1)
    with pytest.raises(ValueError, match="only among its answers"):
        error_p_value(np.array([1.0]), np.array([0.0]), 0.1, 0.1)
    with pytest.raises(ValueError, match="3 errors among 2"):
        binomial_p_value(3, 2, 0.1)
