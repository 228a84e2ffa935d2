"""Averages over subsets of n of the N samples of a prompt: exact where a formula exists or the
subsets are few, else over a seeded draw of them, with its standard error.

What is decided by an order (the longest sample, any correct one, the most valuable one) needs no
subsets: the item of rank r is the largest of a random subset with a known probability.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from zip_rc_jax.evaluation.baselines import METHODS, BaselinePoint
from zip_rc_jax.evaluation.replay import ReplayPool
from zip_rc_jax.runtime.errors import UsageError

_TIE = 1e-9  # as in `baselines`


@dataclasses.dataclass(frozen=True, eq=False)
class Subsets:
    """Subsets of n of N samples.

    Attributes:
      members: int64 `[S, n]`, ascending within each. The first one is `0 .. n - 1`.
      exact: whether these are all of them.
    """

    members: np.ndarray
    exact: bool


def choose_subsets(total: int, n: int, most: int, seed: int) -> Subsets:
    """All subsets if they are at most `most`; else `most` of them, drawn by `seed`.

    Drawn ones come from shuffled samples cut into n and n, so that few overlap. The first cut is
    without a shuffle.

    Raises:
      UsageError: n outside 1..total.
    """
    if not 1 <= n <= total:
        raise UsageError(
            f"n={n}",
            f"the pool has {total} samples of every prompt",
            f"use n from 1 to {total}, or make a pool with more replay.samples",
        )
    if math.comb(total, n) <= most:
        return Subsets(np.array(list(itertools.combinations(range(total), n))), True)
    rng = np.random.default_rng(seed)
    order, found = np.arange(total), list[np.ndarray]()
    while len(found) < most:
        found += [np.sort(order[i : i + n]) for i in range(0, total - n + 1, n)]
        order = rng.permutation(total)
    return Subsets(np.stack(found[:most]), False)


def subset_error(values: np.ndarray, exact: bool) -> float:
    """Standard error of the mean of `values` `[P, S]` that comes from having drawn S subsets only;
    0 for all of them, NaN for one.

    Prompts are kept as they are, and their samples are independent. Subsets that do not overlap
    vary less than this assumes.
    """
    prompts, subsets = values.shape
    if exact:
        return 0.0
    if subsets == 1:
        return math.nan
    return float(math.sqrt(values.var(1, ddof=1).sum() / subsets) / prompts)


def largest_weights(total: int, n: int) -> np.ndarray:
    """`[total]` float64: probability that the item of each rank, ascending, is the largest of a
    random subset of n."""
    ways = [math.comb(rank, n - 1) for rank in range(total)]
    every = math.comb(total, n)
    return np.array([way / every for way in ways])


def expected_largest(values: np.ndarray, n: int) -> np.ndarray:
    """`[P]`: mean over all subsets of n of the largest of `values` `[P, N]`."""
    return np.sort(values, axis=1) @ largest_weights(values.shape[1], n)


def reward_of_best(score: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """`[P]`: mean over all subsets of n of the `reward` `[P, N]` of the sample with the largest
    `score`; ties are split evenly."""
    order = np.argsort(score, axis=1, kind="stable")
    score, reward = (np.take_along_axis(x, order, 1) for x in (score, reward))
    # Those that tie are chosen equally often, so each gets the mean of their rewards.
    apart = np.diff(score, axis=1, prepend=-np.inf) > _TIE
    group = np.cumsum(apart, axis=1) - 1
    rows = np.arange(len(score))[:, None]
    total, count = np.zeros_like(reward), np.zeros_like(reward)
    np.add.at(total, (rows, group), reward)
    np.add.at(count, (rows, group), 1)
    shared = np.take_along_axis(total / np.maximum(count, 1), group, 1)
    return shared @ largest_weights(score.shape[1], n)


@dataclasses.dataclass(frozen=True, eq=False)
class SubsetPoint:
    """A fixed method at one n, averaged over subsets of a pool.

    Attributes:
      point: expectations per prompt.
      error: standard error of the mean accuracy that comes from drawing subsets; 0 where exact.
    """

    point: BaselinePoint
    error: float


def subset_point(pool: ReplayPool, method: str, n: int, most: int, seed: int) -> SubsetPoint:
    """As `baselines.baseline_point`, for any number of samples.

    "pass" and "best_of_n" are exact. So are votes if there are at most `most` subsets.

    Raises:
      UsageError: an unknown method, or n outside 1..N.
    """
    if method not in METHODS:
        raise UsageError(
            f"method={method!r}", f"known baselines are {', '.join(METHODS)}", "use one of them"
        )
    total, error = pool.n_samples, 0.0
    chosen = choose_subsets(total, n, most, seed)
    if method == "pass":
        accuracy = expected_largest(pool.correct, n)
    elif method == "best_of_n":
        # A sample without an answer wins only where no sample has one.
        answered = np.where(pool.answer_id >= 0, 10.0, 0.0)
        accuracy = reward_of_best(answered + pool.value, pool.correct, n)
    else:
        accuracy, error = _by_vote(pool, method, chosen)
    latency = expected_largest(pool.length.astype(np.float64), n) / pool.mean_length
    compute = np.full(pool.n_prompts, float(n))
    return SubsetPoint(BaselinePoint(method, n, accuracy, compute, latency), error)


def _by_vote(pool: ReplayPool, method: str, chosen: Subsets) -> tuple[np.ndarray, float]:
    """Expected reward `[P]` of a vote, and the standard error of its mean."""
    member = np.zeros((len(chosen.members), pool.n_samples))
    np.put_along_axis(member, chosen.members, 1.0, axis=1)
    columns = (pool.correct, pool.answer_id, pool.value)
    rewards = np.stack(
        [vote_rewards(method, member, *of_prompt) for of_prompt in zip(*columns, strict=True)]
    )
    return rewards.mean(1), subset_error(rewards, chosen.exact)


def vote_rewards(
    method: str, member: np.ndarray, correct: np.ndarray, ids: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Expected reward `[S]` of a vote in each subset of one prompt, as `baselines.expected_reward`
    means it over them.

    Args:
      method: "majority" or "weighted_best_of_n".
      member: float64 `[S, N]`, 1 for the samples of each subset.
      correct, ids, value: `[N]`, as in `SamplePool`.
    """
    # Votes are counted by answer and not by sample: one small product instead of N x N numbers.
    answers, place = np.unique(ids, return_inverse=True)
    each = (place[:, None] == np.arange(len(answers))).astype(np.float64)
    votes = member @ each
    right = member @ (each * correct[:, None]) / np.maximum(votes, 1)
    score = votes if method == "majority" else member @ (each * value[:, None])
    # A sample without an answer counts only where none has one.
    allowed = votes > 0
    stated = allowed & (answers >= 0)
    allowed = np.where(stated.any(1, keepdims=True), stated, allowed)
    score = np.where(allowed, score, -np.inf)
    winner = allowed & (score >= score.max(1, keepdims=True) - _TIE)
    return np.where(winner, right, 0).sum(1) / winner.sum(1)


def fixed_ns(total: int) -> list[int]:
    """The n of a curve: 1, 2, 3, 4, 6, 8, 12, 16, ... up to `total`, which is the last one."""
    found = {total}
    power = 1
    while power <= total:
        found |= {power, *([power + power // 2] if power > 1 else [])}
        power *= 2
    return sorted(n for n in found if n <= total)
