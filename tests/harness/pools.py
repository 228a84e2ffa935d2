"""Small pools of samples, and slow averages over all orders and subsets of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from zip_rc_jax.evaluation.baselines import SamplePool


def small_pool(seed: int, prompts: int = 6, n: int = 5) -> SamplePool:
    """Few answers and few values, so that ties are frequent; answer 1 is right. Some samples have
    no answer, and prompt 0 has none at all."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(np.where(rng.random((prompts, 1)) < 0.5, -1, 0), 3, (prompts, n))
    answer[0] = -1
    return SamplePool(
        correct=(answer == 1).astype(float),
        answer_id=answer,
        value=rng.integers(0, 9, (prompts, n)) / 8,
        self_length=rng.integers(1, 30, (prompts, n)),
        level=np.zeros(prompts, int),
    )


def slow_vote(ids: Sequence[int], weights: Sequence[float], right: Sequence[float]) -> Fraction:
    """Reward of the answer with the largest sum of weights, ties split evenly between answers."""
    voters = [i for i, answer in enumerate(ids) if answer >= 0]
    if not voters:
        return sum((Fraction(float(r)) for r in right), Fraction(0)) / len(right)
    score: dict[int, Fraction] = {}
    for i in voters:
        score[ids[i]] = score.get(ids[i], Fraction(0)) + Fraction(float(weights[i]))
    top = max(score.values())
    best = [answer for answer, s in score.items() if abs(s - top) < Fraction(1, 10**9)]
    rewards = []
    for answer in best:
        mine = [Fraction(float(right[i])) for i in voters if ids[i] == answer]
        rewards.append(sum(mine, Fraction(0)) / len(mine))
    return sum(rewards, Fraction(0)) / len(rewards)


def slow_best(ids: Sequence[int], value: Sequence[float], right: Sequence[float]) -> Fraction:
    """Reward of the sample of the highest value, ties split evenly between samples."""
    voters = [i for i, answer in enumerate(ids) if answer >= 0] or list(range(len(ids)))
    top = max(value[i] for i in voters)
    best = [Fraction(float(right[i])) for i in voters if value[i] == top]
    return sum(best, Fraction(0)) / len(best)


def slow_sequential(
    pool: SamplePool,
    prompt: int,
    most: int,
    wave: int,
    stop: Callable[[list[int]], bool],
    reward: Callable[[list[int]], Fraction],
) -> tuple[float, float, float]:
    """Mean reward, tokens and serial steps over all orders, one sample after the other.

    Args:
      stop: of the samples that were drawn, by their numbers, whether to stop after this wave.
      reward: of the samples that were drawn, the reward of the answer.
    """
    rewards, tokens, steps = [], [], []
    length = pool.self_length[prompt]
    for order in itertools.permutations(range(pool.n_samples), most):
        drawn: list[int] = []
        serial = 0.0
        while len(drawn) < most:
            now = list(order[len(drawn) : len(drawn) + wave])
            drawn += now
            serial += max(length[i] for i in now)
            if stop(drawn):
                break
        rewards.append(float(reward(drawn)))
        tokens.append(sum(length[i] for i in drawn))
        steps.append(serial)
    return float(np.mean(rewards)), float(np.mean(tokens)), float(np.mean(steps))
