"""DeepConf and self-certainty, against the papers' rules in plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from harness.pools import slow_best, slow_vote, small_pool
from zip_rc_jax.evaluation import confidence
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.runtime.errors import UsageError

POOL = small_pool(0)
RNG = np.random.default_rng(1)
TOKENS = [[RNG.random(int(n)) * 9 for n in row] for row in POOL.self_length]
SCORE = RNG.integers(0, 6, POOL.correct.shape) / 3  # with ties
WINDOW = 4


def slow_groups(tokens, window):
    """Mean of every window, one after the other; a short sample is one group."""
    if len(tokens) < window:
        return [sum(tokens) / len(tokens)]
    return [sum(tokens[i : i + window]) / window for i in range(len(tokens) - window + 1)]


def slow_percentile(values, share):
    """The value below which lies this share, by linear interpolation between sorted values."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = min(int(place + 1e-9), len(ranked) - 1)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + max(place - low, 0) * (ranked[high] - ranked[low])


def rows(p, chosen, *arrays):
    return [[array[p, i] for i in chosen] for array in arrays]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 41])
def test_groups_are_the_means_of_all_windows(length):
    tokens = list(np.random.default_rng(length).random(length))
    groups = slow_groups(tokens, WINDOW)
    np.testing.assert_allclose(confidence.group_confidences(tokens, WINDOW), groups)
    lowest = sorted(groups)[: max(1, len(groups) // 10)]
    expected = {
        "mean": np.mean(tokens),
        "lowest_group": min(groups),
        "bottom_groups": np.mean(lowest),
        "tail": np.mean(tokens[-WINDOW:]),
    }
    for aggregate, value in expected.items():
        assert confidence.trace_confidence(tokens, aggregate, WINDOW) == pytest.approx(value)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_deepconf_offline_keeps_the_confident_samples_of_every_subset(n):
    shares = (0.2, 0.5, 0.9, 1.0)
    points = confidence.deepconf_offline(POOL, SCORE, shares, n=n)
    for share, point in zip(shares, points, strict=True):
        for p in range(POOL.n_prompts):
            rewards, longest = [], []
            for subset in itertools.combinations(range(5), n):
                bound = slow_percentile([SCORE[p, i] for i in subset], 1 - share)
                kept = [i for i in subset if SCORE[p, i] >= bound - 1e-9]
                rewards.append(
                    float(slow_vote(*rows(p, kept, POOL.answer_id, SCORE, POOL.correct)))
                )
                longest.append(max(POOL.self_length[p, i] for i in subset))
            assert point.accuracy[p] == pytest.approx(np.mean(rewards)), (share, p)
            assert point.compute[p] == n
            mean = POOL.self_length[p].mean()
            assert point.latency[p] == pytest.approx(np.mean(longest) / mean)


def slow_online(p, order, warmup, wave, share, consensus):
    """One order, sample by sample and token by token: reward, tokens, serial steps."""
    lowest = [min(slow_groups(list(t), WINDOW)) for t in TOKENS[p]]
    first, rest = order[:warmup], order[warmup:]
    bound = slow_percentile([lowest[i] for i in first], 1 - share) - 1e-9
    voters = [i for i in first if lowest[i] >= bound]
    tokens = sum(len(TOKENS[p][i]) for i in first)
    steps = max(len(TOKENS[p][i]) for i in first)
    while True:
        weight: dict = {}
        for i in voters:
            if POOL.answer_id[p, i] >= 0:
                answer = POOL.answer_id[p, i]
                weight[answer] = weight.get(answer, 0) + lowest[i]
        agreed = weight and max(weight.values()) >= (consensus or 9) * sum(weight.values()) - 1e-9
        if not rest or agreed:
            break
        now, rest = rest[:wave], rest[wave:]
        took = []
        for i in now:
            sample, generated = list(TOKENS[p][i]), 0
            cut = False
            while generated < len(sample) and not cut:
                generated += 1
                window = sample[max(0, generated - WINDOW) : generated]
                cut = len(window) == WINDOW and sum(window) / WINDOW < bound
            took.append(generated)
            short = len(sample) < WINDOW and sum(sample) / len(sample) < bound
            if not cut and not short:
                voters.append(i)
        tokens, steps = tokens + sum(took), steps + max(took)
    table = np.broadcast_to(lowest, (POOL.n_prompts, 5))
    reward = slow_vote(*rows(p, voters, POOL.answer_id, table, POOL.correct))
    return float(reward), tokens, steps


@pytest.mark.parametrize(
    ("warmup", "wave", "consensus", "most"),
    [(2, None, None, 5), (3, 1, None, 4), (1, None, 0.8, 5), (2, 2, 0.6, 5), (5, None, None, 5)],
)
def test_deepconf_online_cuts_samples_at_the_token_where_a_group_is_unsure(
    warmup, wave, consensus, most
):
    shares = (0.1, 0.6, 0.9)
    points = confidence.deepconf_online(
        POOL,
        TOKENS,
        shares,
        window=WINDOW,
        warmup=warmup,
        wave=wave,
        consensus=consensus,
        most=most,
    )
    size = wave or (1 if consensus else max(1, most - warmup))
    saved = 0.0
    for share, point in zip(shares, points, strict=True):
        for p in range(POOL.n_prompts):
            found = [
                slow_online(p, order, warmup, size, share, consensus)
                for order in itertools.permutations(range(5), most)
            ]
            reward, tokens, steps = np.mean(found, axis=0)
            mean = POOL.self_length[p].mean()
            assert point.accuracy[p] == pytest.approx(reward), (share, p)
            assert point.compute[p] == pytest.approx(tokens / mean), (share, p)
            assert point.latency[p] == pytest.approx(steps / mean), (share, p)
            saved += most - point.compute[p]
    assert saved > 1 or warmup == most


@pytest.mark.parametrize("n", [2, 5])
def test_borda_votes_weigh_ranks(n):
    powers = (0.0, 0.5, 1.2)
    points = confidence.borda_curve(POOL, SCORE, powers, n=n)
    for power, point in zip(powers, points, strict=True):
        for p in range(POOL.n_prompts):
            rewards = []
            for subset in itertools.combinations(range(5), n):
                ranked = sorted((SCORE[p, i] for i in subset), reverse=True)
                weight = [
                    np.mean([(n - r) ** power for r, s in enumerate(ranked) if s == SCORE[p, i]])
                    for i in subset
                ]
                ids, right = rows(p, subset, POOL.answer_id, POOL.correct)
                rewards.append(float(slow_vote(ids, weight, right)))
            assert point.accuracy[p] == pytest.approx(np.mean(rewards)), (power, p)
    np.testing.assert_allclose(
        points[0].accuracy, baseline_point(POOL, "majority", n).accuracy, atol=1e-12
    )


def test_self_certainty_takes_the_most_certain_of_every_subset():
    curve = confidence.self_certainty_curve(POOL, SCORE)
    assert [point.name for point in curve] == [f"self_certainty@{n}" for n in range(1, 6)]
    for point in curve:
        for p in range(POOL.n_prompts):
            found = [
                float(slow_best(*rows(p, s, POOL.answer_id, SCORE, POOL.correct)))
                for s in itertools.combinations(range(5), point.n)
            ]
            assert point.accuracy[p] == pytest.approx(np.mean(found))


def test_drawn_subsets_state_their_error():
    pool, drawn = small_pool(3, prompts=30), Draws(enumerated=1, sampled=300)
    score = np.random.default_rng(0).random(pool.correct.shape)
    (exact,) = confidence.deepconf_offline(pool, score, (0.5,), n=3)
    (found,) = confidence.deepconf_offline(pool, score, (0.5,), n=3, draws=drawn)
    error = found.standard_error
    off = np.abs(found.accuracy - exact.accuracy)[error > 0] / error[error > 0]
    assert len(off) > 5
    assert off.max() < 4.5
    assert not exact.standard_error.any()
    np.testing.assert_allclose(found.cost(0.5), exact.cost(0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence.deepconf_offline(POOL, SCORE, (0.0,)), r"keep=0\.0"),
        (lambda: confidence.deepconf_offline(POOL, SCORE[:2]), r"confidences of shape \(2, 5\)"),
        (lambda: confidence.deepconf_online(POOL, TOKENS, warmup=6), r"warmup=6.*from 1 to 5"),
        (lambda: confidence.deepconf_online(POOL, TOKENS, warmup=2, window=0), "window=0"),
        (lambda: confidence.deepconf_online(POOL, TOKENS, warmup=2, consensus=2), "consensus=2"),
        (
            lambda: confidence.deepconf_online(
                POOL, [[t[:-1] for t in row] for row in TOKENS], warmup=2
            ),
            "token confidences of sample 0 of prompt 0: there are",
        ),
        (lambda: confidence.trace_confidence([1.0], "best"), "aggregate='best'"),
        (lambda: confidence.borda_curve(POOL, SCORE, (-1,)), "power=-1"),
        (
            lambda: confidence.self_certainty_curve(
                SamplePool(*(np.ones((1, 2)),) * 4, [0]), [[1.0, np.inf]]
            ),
            "each sample a finite confidence",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message) as refusal:
        call()
    assert len(str(refusal.value)) < 900
