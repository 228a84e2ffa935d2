"""Which answer wins among some samples, for many subsets or orders of one prompt at once."""

from __future__ import annotations

import functools

import numpy as np

from zip_rc_jax.evaluation.draws import Draws, mean_and_error

TIE = 1e-9  # sums of values in another order differ by rounding
HELD = 2**22  # numbers that a running vote holds at once


def winners(score: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which allowed entries reach the maximum, up to rounding: `[..., N]` bool."""
    score = np.where(allowed, score, -np.inf)
    return allowed & (score >= score.max(-1, keepdims=True) - TIE)


def winning_rewards(
    score: np.ndarray, votes: np.ndarray, right: np.ndarray, alone: np.ndarray
) -> np.ndarray:
    """Reward `[...]` of the answer with the largest score.

    Ties are split evenly between answers. An answer's reward is the mean over its samples.

    Args:
      score, votes, right: `[..., G]`, of each answer its score, its samples, and their summed
        reward.
      alone: `[...]`, the reward where no sample has an answer.
    """
    if not score.shape[-1]:
        return alone
    winner = winners(score, votes > 0)
    share = np.where(winner, right / np.maximum(votes, 1), 0.0).sum(-1)
    return np.where(winner.any(-1), share / np.maximum(winner.sum(-1), 1), alone)


def vote_rewards(
    ids: np.ndarray, weights: np.ndarray, correct: np.ndarray, member: np.ndarray | None = None
) -> np.ndarray:
    """Reward `[K]` of the answer with the largest sum of weights, in each of K draws.

    Draws without any answer have the mean reward of their samples.

    Args:
      ids: `[K, n]`, answers of one prompt; -1 for none.
      weights, correct: `[K, n]`.
      member: `[K, n]` bool, which samples vote; default all.
    """
    member = np.ones(ids.shape, bool) if member is None else member
    numbers = np.unique(ids[ids >= 0])
    score, votes, right = (np.zeros((len(ids), len(numbers))) for _ in range(3))
    for column, number in enumerate(numbers):  # one answer at a time keeps memory at [K, n]
        mine = member & (ids == number)
        votes[:, column] = mine.sum(1)
        score[:, column] = np.where(mine, weights, 0.0).sum(1)
        right[:, column] = np.where(mine, correct, 0.0).sum(1)
    alone = np.where(member, correct, 0.0).sum(1) / np.maximum(member.sum(1), 1)
    return winning_rewards(score, votes, right, alone)


def running_sums(ids: np.ndarray, weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`[K, n, G]`: the summed weight of every answer among the first 1..n samples of K orders.

    Args:
      ids, weights: `[K, n]`.
      numbers: `[G]`, the answers.
    """
    return np.cumsum(np.where(ids[..., None] == numbers, weights[..., None], 0.0), axis=1)


def running_votes(
    ids: np.ndarray, weights: np.ndarray, correct: np.ndarray, member: np.ndarray | None = None
) -> np.ndarray:
    """Reward `[K, n]` of a weighted vote among the first 1..n samples of K orders.

    Args:
      ids, weights, correct: `[K, n]`, in the order in which the samples come.
      member: `[K, n]` bool, which samples vote; default all.
    """
    if member is None:
        count = np.broadcast_to(np.arange(1.0, ids.shape[1] + 1), ids.shape)
    else:
        ids, correct = np.where(member, ids, -1), correct * member
        count = np.maximum(np.cumsum(member, axis=1), 1)
    alone = np.cumsum(correct, axis=1) / count
    # One answer at a time keeps memory at [K, n]: the highest score so far, how many answers reach
    # it, and their summed reward.
    best = np.full(ids.shape, -np.inf)
    tied, summed = np.zeros(ids.shape), np.zeros(ids.shape)
    for number in np.unique(ids[ids >= 0]):
        mine = ids == number
        votes = np.cumsum(mine, axis=1)
        score = np.where(votes > 0, np.cumsum(weights * mine, axis=1), -np.inf)
        reward = np.cumsum(correct * mine, axis=1) / np.maximum(votes, 1)
        higher = (votes > 0) & (score > best + TIE)
        equal = (votes > 0) & ~higher & (score >= best - TIE)
        tied = np.where(higher, 1.0, tied + equal)
        summed = np.where(higher, reward, summed + equal * reward)
        best = np.maximum(best, score)
    return np.where(tied > 0, summed / np.maximum(tied, 1), alone)


def running_best(ids: np.ndarray, value: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Reward `[K, n]` of the sample of the highest value among the first 1..n of K orders.

    Ties are split evenly between samples. Samples without an answer win only where no sample has
    one.
    """
    # A sample without an answer ranks below all others.
    span = np.ptp(value) + 1 if value.size else 1.0
    rank = np.where(ids >= 0, value, value - span)
    top = np.maximum.accumulate(rank, axis=1)
    result = np.empty(ids.shape)
    summed, tied = np.zeros(len(ids)), np.zeros(len(ids))
    for m in range(ids.shape[1]):
        higher = rank[:, m] > (top[:, m - 1] + TIE if m else -np.inf)
        equal = ~higher & (rank[:, m] >= top[:, m] - TIE)
        summed = np.where(higher, correct[:, m], summed + np.where(equal, correct[:, m], 0.0))
        tied = np.where(higher, 1.0, tied + equal)
        result[:, m] = summed / tied
    return result


def drawn_votes(
    ids: np.ndarray, weights: np.ndarray, correct: np.ndarray, prompt: int, draws: Draws
) -> np.ndarray:
    """Mean reward and standard error `[2, N]` of a weighted vote among 1..N samples of one prompt,
    over drawn subsets.

    Args:
      ids, weights, correct: `[N]`.
      prompt: number of the prompt, which chooses the draws.
    """
    return _drawn_votes(_Row(ids), _Row(weights), _Row(correct), prompt, draws)


class _Row:
    """An array that can be the key of a cache."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.key = (self.array.dtype.str, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=4096)  # a curve asks for every n of the same draws
def _drawn_votes(ids: _Row, weights: _Row, correct: _Row, prompt: int, draws: Draws) -> np.ndarray:
    total = len(ids.array)
    orders = draws.drawn(prompt, total, total)
    rewards = running_votes(ids.array[orders], weights.array[orders], correct.array[orders])
    return np.array([mean_and_error(column, exact=False) for column in rewards.T]).T
