"""Which settings keep a promise, and which price spends a budget: against populations whose risk
is known, and against replays with the threshold itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from harness.stored_pools import make_pool
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.evaluation.calibration import (
    THRESHOLDS,
    Outcomes,
    Promise,
    beta_that_spends,
    check_enough,
    chosen,
    full_samples,
    replayed_outcomes,
    try_settings,
)
from zip_rc_jax.evaluation.replay import load_pool, replay
from zip_rc_jax.runtime.errors import UsageError

PROMPTS = ["1 + 2 =", "3 + 4 =", "wait so check", "5 + 6 =", "a b", "7 + 8 = wait"]
DECODE = DecodeConfig(n=3, interval=2, window=2, max_tokens=12, beta=0.05, max_num_seqs=8)


def outcomes(correct, value, cost=1.0, **options):
    correct, value = np.asarray(correct, float), np.asarray(value, float)
    return Outcomes(DecodeConfig(**options), correct, value, np.full(correct.shape, cost))


# ---- promises


def population(rng, problems, tries, risks):
    """Problems of which a share of 1/4 has a value of each of 0.2, 0.5, 0.7, 0.9, and is wrong with
    the probability of `risks` there, as graded by every try alike or not."""
    kind = rng.integers(0, 4, problems)
    wrong = rng.random((problems, tries)) < np.asarray(risks)[kind][:, None]
    value = np.repeat(np.array([0.2, 0.5, 0.7, 0.9])[kind][:, None], tries, 1)
    return outcomes(~wrong, value, beta=0.05)


@pytest.mark.parametrize("tries", [1, 2])
def test_errors_among_answered_exceed_the_promise_at_most_as_often_as_epsilon(tries):
    """The true risk above a threshold is the mean of what lies above it. Above 0.9 it is just too
    high, so whatever passes is a failure."""
    rng, delta, epsilon, runs = np.random.default_rng(0), 0.2, 0.2, 300
    for risks, may_pass in (((0.5, 0.4, 0.3, 0.201), False), ((0.9, 0.5, 0.1, 0.05), True)):
        true = {x: np.mean(risks[i:]) for i, x in enumerate((0.2, 0.5, 0.7, 0.9))}
        failed = passed = 0
        for _ in range(runs):
            mine = population(rng, 60, tries, risks)
            promise = Promise("errors", delta, epsilon, starts=1)
            settings = try_settings(promise, [mine], (0.9, 0.7, 0.5, 0.2), details=False)
            one = chosen(promise, settings)
            if one is not None:
                passed += 1
                failed += true[one.decode.abstain_below] > delta
        assert failed / runs <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / runs)
        assert (passed > 0.5 * runs) == may_pass
        if not may_pass and tries == 1:
            assert failed > 0, "the test is not idle"


def test_the_loss_exceeds_the_promise_at_most_as_often_as_epsilon():
    rng, epsilon, runs = np.random.default_rng(1), 0.2, 400
    losses, failed, passed = (0.0, 0.02, 0.11, 0.3), 0, 0
    promise = Promise("loss", 0.1, epsilon, starts=2, prefer="cost")
    for _ in range(runs):
        luck = rng.random((200, 1))
        full = outcomes(luck > 0.1, np.ones((200, 1)))
        prices = [
            outcomes(luck > 0.1 + loss, np.ones((200, 1)), cost=2 - i / 4, beta=0.01 * (i + 1))
            for i, loss in enumerate(losses)
        ]
        one = chosen(promise, try_settings(promise, prices, (0.0,), full, details=False))
        if one is not None:
            passed += 1
            failed += losses[round(one.decode.beta / 0.01) - 1] > 0.1
    assert 0 < failed / runs <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / runs)
    assert passed > 0.9 * runs


def test_the_choice_answers_most_or_costs_least_among_what_passed():
    value = np.linspace(0, 1, 100)[:, None]
    right = value > 0.3
    prices = [outcomes(right, value, 2.0, beta=0.01), outcomes(value > 0.5, value, 1.0, beta=0.1)]
    for prefer, beta, threshold in (("answered", 0.01, 0.3), ("cost", 0.1, 0.5)):
        promise = Promise("errors", 0.1, prefer=prefer)
        settings = try_settings(promise, prices, THRESHOLDS)
        one = chosen(promise, settings)
        assert one.decode.beta == beta
        assert one.decode.abstain_below <= threshold, "some errors are allowed"
        assert one.risk <= one.bound <= 0.1
        assert one.cost_low <= one.cost <= one.cost_high
        answered = (value >= one.decode.abstain_below).mean()
        assert one.answered == pytest.approx(answered)
        failed = [x for x in settings if not x.passed and not math.isnan(x.risk)]
        assert any(x.risk > 0.1 for x in failed)
    assert chosen(Promise("errors", 0.1), []) is None


def test_a_problem_without_an_answer_is_no_error_and_loses_all():
    value = np.full((60, 1), -np.inf)
    value[:40] = 0.9
    mine = outcomes(value > 0, value)
    [found] = try_settings(Promise("errors", 0.2, starts=1), [mine], (0.0,))
    assert (found.risk, found.answered, found.accuracy) == (0.0, 2 / 3, 2 / 3)
    full = outcomes(np.ones((60, 1)), np.ones((60, 1)))
    [found] = try_settings(Promise("loss", 0.2, starts=1), [mine], (0.0,), full)
    assert found.risk == pytest.approx(1 / 3)
    assert not found.passed


def test_too_few_problems_are_refused_with_how_many_are_needed():
    promise = Promise("errors", 0.05, 0.1, starts=1)
    with pytest.raises(UsageError, match=r"44 calibration problems: .* needs 45 of them, even if"):
        check_enough(promise, 44, [1])
    check_enough(promise, 45, [1])
    with pytest.raises(UsageError, match="needs 72 of them"):
        check_enough(dataclasses.replace(promise, starts=4), 45, [22])
    with pytest.raises(
        UsageError, match=r"error rate .* at least 59 problems, fewer betas and starts"
    ):
        check_enough(promise, 45, [22, 22])
    with pytest.raises(
        UsageError, match="a loss of .* needs 249 .*for a setting that loses nothing"
    ):
        check_enough(Promise("loss", 0.02), 100, [7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"risk": "error"}, "risk='error': it must be one of errors, loss"),
        ({"delta": 0.0}, "max-error-rate=0.0: it bounds a mean"),
        ({"delta": 1.5, "risk": "loss"}, "max-loss=1.5"),
        ({"delta": math.nan}, "max-error-rate=nan"),
        ({"epsilon": 0.0}, "confidence=1: .* no finite set of problems"),
        ({"starts": 0}, "starts=0: a path begins somewhere"),
        ({"prefer": "all"}, "prefer='all': it must be one of answered, cost"),
    ],
)
def test_impossible_promises_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        Promise(**{"risk": "errors", "delta": 0.1} | options)


# ---- the price of a budget


def falling(betas):
    """A cost in steps, as decisions give it."""
    return [round(2 / (1 + 20 * beta), 2) + 0.5 for beta in betas]


def test_the_price_is_the_least_beta_that_spends_no_more():
    fine = np.geomspace(1e-4, 10, 200_000)
    costs = np.array(falling(fine))
    before = 0.0
    for target in (2.2, 1.9, 1.5, 1.1, 0.8, 0.52):
        beta, tried = beta_that_spends(falling, target)
        assert falling([beta])[0] <= target
        best = fine[costs <= target][0]
        assert best * 0.999 <= beta <= best * 1.02
        assert all(cost > target for b, cost in tried.items() if b < beta)
        assert beta >= before, "a smaller budget has a higher price"
        before = beta
        assert len(tried) <= 27


def test_a_cost_that_rises_again_at_absurd_prices_does_not_mislead():
    def cost(betas):
        return [2 / (1 + 20 * b) + 0.5 + 0.3 * (b > 1) for b in betas]

    beta, _ = beta_that_spends(cost, 1.0)
    assert beta == pytest.approx(0.15, rel=0.02)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0.0, "average-cost=0.0: it is what a prompt may cost"),
        (math.nan, "average-cost=nan"),
        (0.4, r"spends at least 0.5\d0 on these problems.*use a number from 0.5"),
        (3.0, "spends at most 2.500 on these problems"),
    ],
)
def test_a_budget_that_no_price_spends_is_refused_with_the_range(target, message):
    with pytest.raises(UsageError, match=message):
        beta_that_spends(falling, target)


# ---- outcomes of a pool


@pytest.fixture(scope="module")
def pool(lm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pools") / "pool"
    files, _ = make_pool(directory, lm, PROMPTS, DECODE, samples=3, stride=1, seed=3)
    return load_pool(files)


@pytest.mark.parametrize(
    "options", [{}, {"answer": "vote"}, {"token_budget": 9}, {"allow_no_answer": True, "beta": 0.5}]
)
def test_a_threshold_applied_afterwards_is_a_replay_with_that_threshold(pool, options):
    decode = dataclasses.replace(DECODE, **options)
    [found] = replayed_outcomes(pool, [decode])
    values = np.append(found.value[np.isfinite(found.value)], 0.4)
    for threshold in (0.0, float(np.median(values)) + 1e-6, float(values.max()) + 1e-6):
        own = dataclasses.replace(decode, abstain_below=min(1.0, threshold))
        [slow] = replay(pool, own, np.arange(3)[None])
        by_vote = decode.answer == "vote"
        answer = (slow.by_vote if by_vote else slow.by_value)[:, 0]
        right = (slow.correct_by_vote if by_vote else slow.correct_by_value)[:, 0]
        kept = found.value[:, 0] >= own.abstain_below
        np.testing.assert_array_equal(kept & np.isfinite(found.value[:, 0]), answer >= 0)
        np.testing.assert_array_equal(kept * found.correct[:, 0], right)
        cost = (0.1 * slow.tokens + 0.9 * slow.serial_steps)[:, 0] / pool.mean_length
        np.testing.assert_allclose(found.gen_cost[:, 0], cost)


def test_full_samples_are_the_best_of_all(pool):
    found = full_samples(pool, dataclasses.replace(DECODE, token_budget=5))
    ended = np.where(pool.stopped.any(1, keepdims=True), pool.stopped, True)
    best = np.where(ended, pool.value, -1).argmax(1)
    np.testing.assert_array_equal(found.value[:, 0], pool.value[np.arange(len(best)), best])
    latency = pool.length.max(1) / pool.mean_length
    np.testing.assert_allclose(found.gen_cost[:, 0], 0.1 * 3 + 0.9 * latency)


def test_prices_come_back_in_their_order(pool):
    decodes = [dataclasses.replace(DECODE, beta=b, alpha=a) for b, a in ((5, 1), (0, 0), (0.1, 1))]
    for decode, found in zip(decodes, replayed_outcomes(pool, decodes), strict=True):
        [alone] = replayed_outcomes(pool, [decode])
        assert found.decode == decode
        np.testing.assert_array_equal(found.gen_cost, alone.gen_cost)
