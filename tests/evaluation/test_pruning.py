"""Samples that are ended early, against plain Python that runs them token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from harness.pools import slow_vote, small_pool
from zip_rc_jax.evaluation import pruning
from zip_rc_jax.evaluation.baselines import baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.runtime.errors import UsageError

POOL = small_pool(2)
RNG = np.random.default_rng(5)
TRACES = [
    [np.round(np.clip(RNG.random(int(n)) + RNG.normal(0, 0.2), 0, 1), 1) for n in row]
    for row in POOL.self_length
]


def assert_equals_the_slow_way(point, run):
    """`run(p, subset)` is (reward, tokens, steps) of one subset."""
    for p in range(POOL.n_prompts):
        subsets = itertools.combinations(range(POOL.n_samples), point.n)
        reward, tokens, steps = np.mean([run(p, s) for s in subsets], axis=0)
        mean = POOL.self_length[p].mean()
        assert point.accuracy[p] == pytest.approx(reward), (point.name, p)
        assert point.compute[p] == pytest.approx(tokens / mean), (point.name, p)
        assert point.latency[p] == pytest.approx(steps / mean), (point.name, p)
    assert not point.standard_error.any()


def vote(p, samples, weights=None):
    ids = [POOL.answer_id[p, i] for i in samples]
    weights = [1] * len(ids) if weights is None else weights
    return float(slow_vote(ids, weights, [POOL.correct[p, i] for i in samples]))


def test_the_shortest_sample_ends_the_others():
    for point in pruning.shortest_curve(POOL):

        def run(p, subset):
            shortest = min(POOL.self_length[p, i] for i in subset)
            first = [POOL.correct[p, i] for i in subset if POOL.self_length[p, i] == shortest]
            return np.mean(first), shortest * len(subset), shortest

        assert_equals_the_slow_way(point, run)


@pytest.mark.parametrize("n", [3, 5])
def test_the_first_to_finish_vote_and_the_rest_ends_with_them(n):
    counts = tuple(range(1, n + 1))
    for m, point in zip(counts, pruning.first_finished(POOL, counts, n=n), strict=True):

        def run(p, subset, m=m):
            now, finished = 0, []
            while len(finished) < m:
                now += 1
                finished = [i for i in subset if POOL.self_length[p, i] <= now]
            tokens = sum(min(POOL.self_length[p, i], now) for i in subset)
            return vote(p, finished), tokens, now

        assert_equals_the_slow_way(point, run)
    whole = baseline_point(POOL, "majority", n)  # all of them finish
    np.testing.assert_allclose(point.accuracy, whole.accuracy)
    np.testing.assert_allclose(point.cost(0.4), whole.cost(0.4))


def token_by_token(p, subset, interval, keep):
    """`keep(live, at, finished)` names the samples that go on."""
    at = dict.fromkeys(subset, 0)
    length = {i: int(POOL.self_length[p, i]) for i in subset}
    going, steps = set(subset), 0
    while going:
        for _ in range(interval):
            moved = [i for i in going if at[i] < length[i]]
            for i in moved:
                at[i] += 1
            steps += bool(moved)
        live = [i for i in subset if at[i] < length[i]]
        going = set(keep(live, at, len(live) < len(subset)))
    return [i for i in subset if at[i] == length[i]], sum(at.values()), steps


@pytest.mark.parametrize(("interval", "n", "by"), [(1, 3, "value"), (4, 5, "majority")])
def test_reward_pruning_ends_what_lies_below_the_threshold(interval, n, by):
    thresholds = (0.0, 0.3, 0.6, 1.0)
    points = pruning.reward_pruning(POOL, TRACES, thresholds, interval=interval, n=n, vote=by)
    for threshold, point in zip(thresholds, points, strict=True):

        def run(p, subset, threshold=threshold):
            def keep(live, at, any_finished):
                above = [i for i in live if TRACES[p][i][at[i]] >= threshold]
                if not above and live and not any_finished:
                    above = [max(live, key=lambda i: TRACES[p][i][at[i]])]
                return above

            finished, tokens, steps = token_by_token(p, subset, interval, keep)
            weights = [POOL.value[p, i] for i in finished] if by == "value" else None
            return vote(p, finished, weights), tokens, steps

        assert_equals_the_slow_way(point, run)
    compute = [point.compute.mean() for point in points]
    assert compute[0] == pytest.approx(n)
    assert compute[-1] < compute[1] < n


@pytest.mark.parametrize("interval", [1, 5])
def test_length_pruning_ends_what_has_its_budget(interval):
    budgets = (3, 12, 40)
    points = pruning.length_pruning(POOL, budgets, interval=interval, n=4)
    for budget, point in zip(budgets, points, strict=True):

        def run(p, subset, budget=budget):
            def keep(live, at, any_finished):
                below = [i for i in live if at[i] < budget]
                return below if below or any_finished else live

            finished, tokens, steps = token_by_token(p, subset, interval, keep)
            return vote(p, finished), tokens, steps

        assert_equals_the_slow_way(point, run)
    np.testing.assert_allclose(points[-1].compute, 4)


def test_drawn_subsets_state_their_error():
    pool, drawn = small_pool(3, prompts=30), Draws(enumerated=1, sampled=300)
    (exact,) = pruning.first_finished(pool, (2,), n=3)
    (found,) = pruning.first_finished(pool, (2,), n=3, draws=drawn)
    error = found.standard_error
    off = np.abs(found.accuracy - exact.accuracy)[error > 0] / error[error > 0]
    assert len(off) > 5
    assert off.max() < 4.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pruning.first_finished(POOL, (6,)), "finished=6.*from 1 to 5"),
        (lambda: pruning.reward_pruning(POOL, TRACES, interval=0), "interval=0"),
        (lambda: pruning.reward_pruning(POOL, TRACES, (2,), interval=1), "threshold=2"),
        (lambda: pruning.length_pruning(POOL, (5,), interval=1, vote="best"), "vote='best'"),
        (lambda: pruning.length_pruning(POOL, (0,), interval=1), "budget=0"),
        (
            lambda: pruning.reward_pruning(
                POOL, [[t[1:] for t in row] for row in TRACES], interval=1
            ),
            r"trace of sample 0 of prompt 0: it has \d+ values",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message) as refusal:
        call()
    assert len(str(refusal.value)) < 900
