"""Exact averages over all subsets of n of N samples, for any N, without listing the subsets."""

from __future__ import annotations

import functools
import math

import numpy as np

from zip_rc_jax.evaluation import metrics
from zip_rc_jax.evaluation.selection import TIE

MOST_COUNTED = 1000  # binomials of more samples do not fit into float64


def _share_below(total: int, n: int) -> np.ndarray:
    """`[total + 1]`: probability that all of n samples are among the first j = 0..total."""
    # A product of n ratios instead of binomials, which overflow for many samples.
    j = np.arange(total + 1, dtype=np.float64)
    share = np.ones(total + 1)
    for i in range(n):
        share *= np.clip(j - i, 0, None) / (total - i)
    return share


def expected_maximum(values: np.ndarray, n: int) -> np.ndarray:
    """Expected maximum `[P]` of n of the values `[P, N]`.

    The sum over the ascending order statistics. The j-th is the largest of n with the probability
    `C(j - 1, n - 1) / C(N, n)`.
    """
    return np.sort(values, axis=1) @ np.diff(_share_below(values.shape[1], n))


def exact_pass(correct: np.ndarray, n: int) -> np.ndarray:
    """Expected largest reward `[P]` of n of the samples `[P, N]`.

    For rewards of 0 and 1 it is the unbiased pass@k (Chen et al., arXiv 2107.03374).
    """
    if np.isin(correct, (0.0, 1.0)).all():
        return metrics.pass_at_k(correct, n)
    return expected_maximum(correct, n)


def exact_best(correct: np.ndarray, answer_id: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Expected reward `[P]` of the sample of the highest value among n of the samples `[P, N]`.

    Samples of equal value (up to rounding) form a class. The best of n lies in a class if no sample
    of n lies above it and not all lie below it. Within a class all samples are alike, so its reward
    is the mean of its members. Samples without an answer (-1) form classes below all others.
    """
    total = correct.shape[1]
    share = _share_below(total, n)
    result = np.empty(len(correct))
    for p in range(len(correct)):
        order = np.lexsort((value[p], answer_id[p] >= 0))
        v, answered = value[p][order], answer_id[p][order] >= 0
        new = np.append(True, (np.diff(v) > TIE) | (np.diff(answered.astype(int)) > 0))
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], total)
        sums = np.add.reduceat(correct[p][order], starts)
        result[p] = ((share[ends] - share[starts]) * sums / (ends - starts)).sum()
    return result


def exact_majority(correct: np.ndarray, answer_id: np.ndarray) -> np.ndarray:
    """Expected reward `[N]` of the majority of n = 1..N of the samples of one prompt `[N]`.

    It counts subsets instead of listing them. Take the subsets in which t answers have k votes and
    no answer has more. Their number is a coefficient of a product with one factor for each answer:
    its ways to have fewer than k votes, or exactly k. An answer's reward is the mean over its
    samples, since all subsets of them are alike. Ties are split evenly between answers. Samples
    without an answer (-1) win only where no sample has one.
    """
    numbers = np.unique(answer_id[answer_id >= 0])
    absent = answer_id < 0
    return _counted(
        tuple(int((answer_id == g).sum()) for g in numbers),
        tuple(float(correct[answer_id == g].mean()) for g in numbers),
        int(absent.sum()),
        float(correct[absent].mean()) if absent.any() else 0.0,
    )


@functools.lru_cache(maxsize=4096)  # a curve asks for every n of the same prompt
def _counted(
    sizes: tuple[int, ...], rewards: tuple[float, ...], absent: int, absent_reward: float
) -> np.ndarray:
    """See `exact_majority`.

    Args:
      sizes, rewards: of each answer its samples, and their mean reward.
      absent, absent_reward: samples without an answer, and their mean reward.
    """
    total = sum(sizes) + absent
    gained = np.zeros(total + 1)
    gained[: absent + 1] = _ways(absent) * absent_reward
    for k in range(1, max(sizes, default=0) + 1):
        # [2, t, n]: subsets of n samples in which t answers have k votes, and the summed reward of
        # these answers over the same subsets
        most = min(sum(size >= k for size in sizes), total // k)
        state = np.zeros((2, most + 1, total + 1))
        state[0, 0, : absent + 1] = _ways(absent)
        for size, reward in zip(sizes, rewards, strict=True):
            ways = _ways(size)
            following = np.zeros_like(state)
            for j in range(min(k, size + 1)):
                following[..., j:] += ways[j] * state[..., : total + 1 - j]
            if size >= k:
                joined = state[:, :-1, : total + 1 - k].copy()
                joined[1] += reward * joined[0]
                following[:, 1:, k:] += ways[k] * joined
            state = following
        gained += (state[1, 1:] / np.arange(1, most + 1)[:, None]).sum(0)
    return gained[1:] / _ways(total)[1:]


def _ways(total: int) -> np.ndarray:
    """`[total + 1]` float64: subsets of each size."""
    return np.array([math.comb(total, n) for n in range(total + 1)], np.float64)
