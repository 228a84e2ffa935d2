"""Baselines that draw samples one wave after the other, until they have seen enough.

A wave is some samples that run in parallel. Latency is the sum over waves of the longest sample of
each, and compute is all tokens of the samples that were drawn. A pool of N samples stands for the
order in which samples come: the figures are averages over orders, all of them where they are few,
else drawn ones (see `Draws`). A method that never stops has drawn `most` samples.

Votes split ties evenly between answers. Samples without an answer (-1) cost their tokens. They are
no evidence, and win only where no drawn sample has an answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool, check_size, knob_points
from zip_rc_jax.evaluation.draws import Draws, mean_and_error
from zip_rc_jax.evaluation.selection import (
    HELD,
    TIE,
    running_best,
    running_sums,
    running_votes,
    winning_rewards,
)
from zip_rc_jax.runtime.errors import UsageError

CRITERIA = ("beta", "dirichlet")
_EDGE = 1e-6  # confidences of exactly 0 or 1 would end every doubt


class Drawn(NamedTuple):
    """K orders of samples of one prompt, `[K, M]` each: in column m what the m-th sample is.

    Attributes:
      prompt: its number in the pool.
      order: numbers of the samples.
      ids, value, correct, length: as in `SamplePool`.
    """

    prompt: int
    order: np.ndarray
    ids: np.ndarray
    value: np.ndarray
    correct: np.ndarray
    length: np.ndarray


class Outcome(NamedTuple):
    """What a method does with K orders, for one knob.

    Attributes:
      stop: `[K, W]` bool, whether to stop after each wave.
      reward: `[K, W]`, of the answer then.
      length: `[K, M]`, tokens of each sample where some are cut; None for the whole samples.
    """

    stop: np.ndarray
    reward: np.ndarray
    length: np.ndarray | None = None


Rule = Callable[[Drawn, np.ndarray], Sequence[Outcome]]


def drawn_samples(pool: SamplePool, prompt: int, order: np.ndarray) -> Drawn:
    """The samples of one prompt in the orders `[K, M]`."""
    arrays = (pool.answer_id, pool.value, pool.correct, pool.self_length)
    return Drawn(prompt, order, *(array[prompt][order] for array in arrays))


def orders_of(pool: SamplePool, prompt: int, most: int, draws: Draws) -> tuple[np.ndarray, bool]:
    """`[K, most]` orders of one prompt's samples, and whether these are all there are."""
    everything = draws.all_orders(pool.n_samples, most)
    if everything is not None:
        return everything, True
    return draws.drawn(prompt, pool.n_samples, most), False


def wave_ends(most: int, wave: int, first: int | None = None) -> np.ndarray:
    """`[W]`: how many samples have been drawn after each wave; the last may be smaller."""
    return np.append(np.arange(first or wave, most, wave), most)


def spent(length: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and serial steps `[K, W]` after every wave, of samples of `length [K, M]`."""
    starts = np.append(0, ends[:-1])
    steps = np.maximum.reduceat(length, starts, axis=1)
    return np.cumsum(length, axis=1)[:, ends - 1], np.cumsum(steps, axis=1)


def _parts(orders: np.ndarray, answers: int) -> Iterator[np.ndarray]:
    rows = max(1, HELD // (orders.shape[1] * (answers + 1)))
    for start in range(0, len(orders), rows):
        yield orders[start : start + rows]


def sequential_curve(
    pool: SamplePool,
    method: str,
    rule: Rule,
    knob_name: str,
    knobs: Sequence[float],
    *,
    most: int | None = None,
    wave: int = 1,
    first: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """One point for each knob of a method that stops as `rule` says.

    Args:
      rule: gets the drawn samples and the ends of the waves.
      most: samples after which it ends anyway; default all of the pool.
      wave: samples that run in parallel.
      first: samples of the first wave, if it is another number.

    Raises:
      UsageError: no knobs; or `most` or `wave` that the pool does not have.
    """
    most = pool.n_samples if most is None else most
    draws = draws or Draws()
    check_size(pool, most)
    _check_wave(wave, most)
    if not len(knobs):
        raise UsageError(f"{method} without a {knob_name}", "no point is left", "give at least one")
    ends = wave_ends(most, wave, first)
    accuracy, error, tokens, steps = measured = np.zeros((4, len(knobs), pool.n_prompts))
    for p in range(pool.n_prompts):
        orders, exact = orders_of(pool, p, most, draws)
        outcomes: list[list[tuple[np.ndarray, ...]]] = [[] for _ in knobs]
        for part in _parts(orders, len(np.unique(pool.answer_id[p]))):
            drawn = drawn_samples(pool, p, part)
            whole = spent(drawn.length, ends)
            for k, (stop, reward, length) in enumerate(rule(drawn, ends)):
                paid = whole if length is None else spent(length, ends)
                stop = stop.copy()
                stop[:, -1] = True  # there is no sample left
                at = stop.argmax(axis=1)[:, None]
                outcomes[k].append(
                    tuple(np.take_along_axis(x, at, axis=1)[:, 0] for x in (reward, *paid))
                )
        for k, rows in enumerate(outcomes):
            reward, token, step = (np.concatenate(column) for column in zip(*rows, strict=True))
            accuracy[k, p], error[k, p] = mean_and_error(reward, exact)
            tokens[k, p], steps[k, p] = token.mean(), step.mean()
    return knob_points(pool, method, most, knob_name, knobs, measured)


def _check_wave(wave: int, most: int) -> None:
    if isinstance(wave, bool) or not isinstance(wave, (int, np.integer)) or not 1 <= wave <= most:
        raise UsageError(
            f"wave={shown(wave)}",
            f"it counts samples that run in parallel, of {most}",
            f"use a number from 1 to {most}",
        )


def check_knobs(name: str, knobs: Sequence[float], low: float, high: float) -> None:
    """Raises UsageError for a knob outside [low, high]."""
    for knob in knobs:
        if not isinstance(knob, (int, float, np.number)) or not low <= knob <= high:
            raise UsageError(
                f"{name}={shown(knob)}",
                f"it is no number from {low:g} to {high:g}",
                "choose another one",
            )


# ---- adaptive-consistency


def leader_posterior(counts: np.ndarray, criterion: str = "beta") -> np.ndarray:
    """Probability `[...]` that the leading answer stays the most frequent one for ever.

    Args:
      counts: `[..., G]` votes of each answer.
      criterion: "beta" compares the two leading answers: P(p > 1/2) of a Beta with one more than
        their votes. "dirichlet" compares the leader with all others that have votes, and with one
        answer that has none: P(p_1 > all p_j) of a Dirichlet with one more than their votes.
    """
    padded = np.concatenate([counts, np.zeros((*counts.shape[:-1], 2))], axis=-1).astype(np.int64)
    if criterion == "beta":
        top = np.sort(padded, axis=-1)[..., -2:]
        most = int(top.max())
        table = np.array([[_beta(a, b) for b in range(most + 1)] for a in range(most + 1)])
        return table[top[..., 1], top[..., 0]]
    ranked = -np.sort(-padded, axis=-1)
    rows, which = np.unique(ranked.reshape(-1, ranked.shape[-1]), axis=0, return_inverse=True)
    found = np.empty(len(rows))
    for leader in np.unique(rows[:, 0]):
        mine = rows[:, 0] == leader
        found[mine] = _dirichlet(int(leader), rows[mine, 1:])
    return found[which.ravel()].reshape(counts.shape[:-1])


@functools.cache
def _beta(a: int, b: int) -> float:
    """P(p > 1/2) for p ~ Beta(a + 1, b + 1): at most a heads among a + b + 1 fair coins."""
    return sum(math.comb(a + b + 1, j) for j in range(a + 1)) / 2 ** (a + b + 1)


def _dirichlet(leader: int, others: np.ndarray) -> np.ndarray:
    """P(p_1 is the largest) `[R]` for p ~ Dirichlet(votes + 1), with one answer that nobody gave.

    A Dirichlet is independent Gamma variables, divided by their sum. So it is the mean, over the
    leader's Gamma variable, of the probability that all others lie below it.

    Args:
      leader: votes of the first answer.
      others: `[R, G]`, votes of the others, none larger; 0 where there is no further answer.
    """
    density, below = _leader(leader)
    mass = np.broadcast_to(density * below[0], (len(others), len(density)))
    for votes in others.T:
        mass = mass * np.where(votes[:, None] > 0, below[votes], 1.0)
    return mass.sum(axis=1)


@functools.cache
def _leader(votes: int) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature over a Gamma variable of shape `votes + 1`: its weights `[Q]`, and at each node
    the probabilities `[votes + 1, Q]` that Gamma variables of shape 1 to votes + 1 lie below."""
    # Gauss-Legendre over all but 1e-16 of its mass.
    spread = 12 * math.sqrt(votes + 1)
    low, high = max(0.0, votes + 1 - spread), votes + 1 + spread + 40
    x, weight = np.polynomial.legendre.leggauss(200)
    x = (high - low) / 2 * x + (high + low) / 2
    density = np.exp(votes * np.log(x) - x - math.lgamma(votes + 1)) * (high - low) / 2 * weight
    # P(Gamma(j + 1) > x) is P(Poisson(x) <= j).
    j = np.arange(votes + 1)[:, None]
    log_factorial = np.array([[math.lgamma(i + 1)] for i in range(votes + 1)])
    return density, 1 - np.cumsum(np.exp(j * np.log(x) - log_factorial - x), axis=0)


def adaptive_consistency(
    pool: SamplePool,
    thresholds: Sequence[float] = (0.95,),
    *,
    criterion: str = "beta",
    most: int | None = None,
    wave: int = 1,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Samples until the leading answer is likely to stay in the lead; then takes the majority.

    Source: Aggarwal et al., "Let's Sample Step by Step: Adaptive-Consistency" (arXiv 2305.11860).
    From the paper: one sample at a time, a uniform prior, the Beta criterion on the two leading
    answers as the default and the Dirichlet criterion as the general one, a threshold of 0.95, and
    the majority of what was drawn. Chosen here: where only one answer was seen, the Dirichlet has
    one more that nobody gave; samples without an answer count for none.

    Args:
      thresholds: probabilities at which to stop, one point for each.
      criterion: "beta" or "dirichlet", see `leader_posterior`.
      most, wave, draws: see `sequential_curve`.

    Raises:
      UsageError: a threshold outside [0, 1], or an unknown criterion.
    """
    check_knobs("threshold", thresholds, 0, 1)
    if criterion not in CRITERIA:
        raise UsageError(
            f"criterion={shown(criterion)}",
            f"known criteria are {', '.join(CRITERIA)}",
            "use one of them",
        )

    def rule(drawn: Drawn, ends: np.ndarray) -> list[Outcome]:
        ones, at = np.ones(drawn.ids.shape), ends - 1
        counts = running_sums(drawn.ids, ones, _numbers(drawn.ids))[:, at]
        posterior = leader_posterior(counts, criterion)
        reward = running_votes(drawn.ids, ones, drawn.correct)[:, at]
        return [Outcome(posterior >= threshold, reward) for threshold in thresholds]

    name = "adaptive_consistency" if criterion == "beta" else "adaptive_consistency_dirichlet"
    return sequential_curve(
        pool, name, rule, "threshold", thresholds, most=most, wave=wave, draws=draws
    )


def _numbers(ids: np.ndarray) -> np.ndarray:
    return np.unique(ids[ids >= 0])


# ---- early-stopping self-consistency


def early_stopping(
    pool: SamplePool,
    windows: Sequence[int] = (2, 3, 4, 5),
    *,
    most: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Samples windows of w until all samples of one window agree; then takes the majority.

    Source: Li et al., "Escape Sky-high Cost: Early-stopping Self-Consistency" (arXiv 2401.10480).
    From the paper: windows do not overlap, a window is drawn in parallel, and sampling stops when a
    window has a single answer. Chosen here: the answer is the majority of all that was drawn; a
    window with a sample without an answer does not agree; a last, smaller window ends the sampling
    in any case.

    Args:
      windows: samples of a window, one point for each. A window of 1 always agrees.
      most, draws: see `sequential_curve`.

    Raises:
      UsageError: a window that is larger than `most`.
    """
    most = pool.n_samples if most is None else most
    check_size(pool, most)

    def rule(drawn: Drawn, ends: np.ndarray) -> list[Outcome]:
        starts = np.append(0, ends[:-1])
        low = np.minimum.reduceat(drawn.ids, starts, axis=1)
        high = np.maximum.reduceat(drawn.ids, starts, axis=1)
        reward = running_votes(drawn.ids, np.ones(drawn.ids.shape), drawn.correct)[:, ends - 1]
        return [Outcome((low == high) & (low >= 0), reward)]

    return tuple(
        point
        for window in windows
        for point in sequential_curve(
            pool, "early_stopping", rule, "window", (window,), most=most, wave=window, draws=draws
        )
    )


# ---- a posterior over answers from confidences


def confidence_posterior(
    pool: SamplePool,
    thresholds: Sequence[float] = (0.95,),
    *,
    confidence: np.ndarray | None = None,
    most: int | None = None,
    wave: int = 1,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Samples until one answer has enough posterior probability; then takes the likeliest answer.

    Source: Aghazadeh et al., "CGES: Confidence-Guided Early Stopping" (arXiv 2511.02603). From the
    paper: calls come one after the other, the prior over K answers is uniform, and a response with
    confidence c is evidence of c for its own answer and of (1 - c) / (K - 1) for every other.
    Sampling stops when one answer has the threshold's mass. Chosen here: the confidence is the
    final value of the head; K counts the answers seen so far and one that nobody gave; confidences
    are kept 1e-6 away from 0 and 1.

    Args:
      thresholds: posterior masses at which to stop, one point for each.
      confidence: `[P, N]` in [0, 1]; default the pool's values.
      most, wave, draws: see `sequential_curve`.

    Raises:
      UsageError: a threshold or a confidence outside [0, 1].
    """
    check_knobs("threshold", thresholds, 0, 1)
    if confidence is not None:
        pool = _with_value(pool, confidence)
    outside = pool.value[(pool.value < 0) | (pool.value > 1)]
    if outside.size:
        raise UsageError(
            f"confidence {outside[0]:g}",
            "it is the probability that a sample is right",
            "pass confidences in [0, 1]",
        )

    def rule(drawn: Drawn, ends: np.ndarray) -> list[Outcome]:
        numbers, at = _numbers(drawn.ids), ends - 1
        kept = np.clip(drawn.value, _EDGE, 1 - _EDGE)
        votes = running_sums(drawn.ids, np.ones(drawn.ids.shape), numbers)[:, at]
        right = running_sums(drawn.ids, drawn.correct, numbers)[:, at]
        # Relative to the answer that nobody gave, an own sample counts c (K - 1) / (1 - c).
        odds = running_sums(drawn.ids, np.log(kept) - np.log1p(-kept), numbers)[:, at]
        others = np.maximum((votes > 0).sum(-1, keepdims=True), 1)
        score = np.where(votes > 0, odds + votes * np.log(others), -np.inf)
        alone = (np.cumsum(drawn.correct, axis=1) / np.arange(1, drawn.ids.shape[1] + 1))[:, at]
        if not len(numbers):
            return [Outcome(np.zeros(alone.shape, bool), alone) for _ in thresholds]
        highest = np.maximum(score.max(-1), 0)
        mass = np.exp(-highest) + np.exp(score - highest[..., None]).sum(-1)
        posterior = np.exp(score.max(-1) - highest) / mass
        reward = winning_rewards(score, votes, right, alone)
        return [Outcome(posterior >= threshold, reward) for threshold in thresholds]

    return sequential_curve(
        pool, "cges", rule, "threshold", thresholds, most=most, wave=wave, draws=draws
    )


def _with_value(pool: SamplePool, value: np.ndarray) -> SamplePool:
    return SamplePool(pool.correct, pool.answer_id, value, pool.self_length, pool.level)


# ---- Pandora's box


def reservation_value(
    values: np.ndarray, cost: float | np.ndarray, bonus: float | np.ndarray = 0.0
) -> np.ndarray:
    """Weitzman's index `[...]`: the t at which one more box gains as much as it costs.

    It solves `mean(max(v - t, 0)) + bonus * (1 - t) = cost`. The left side is the largest of m + 1
    falling lines, one for each number of values above t, so its root is the largest of theirs.

    Args:
      values: `[..., m]`, equally likely rewards of a box.
      cost: of opening one box, in units of the reward; above 0.
      bonus: an upper bound on how much the mean gain may be underestimated, for each unit of the
        range above t.
    """
    m = values.shape[-1]
    above = -np.sort(-np.asarray(values, np.float64), axis=-1)
    sums = np.cumsum(np.concatenate([np.zeros((*above.shape[:-1], 1)), above], -1), -1) / m
    share = np.arange(m + 1) / m
    bonus = np.asarray(bonus, np.float64)[..., None]
    slope = share + bonus
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = (sums + bonus - np.asarray(cost, np.float64)[..., None]) / slope
    return np.where(slope > 0, roots, -np.inf).max(-1)


def pandora(
    pool: SamplePool,
    costs: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    *,
    known: bool = False,
    delta: float = 0.1,
    most: int | None = None,
    wave: int = 1,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Samples while one more is worth its price; then takes the sample of the highest value.

    Source: Kalayci et al., "Optimal Stopping vs Best-of-N for Inference Time Optimization" (arXiv
    2510.01394). From the paper: a sample is a box of Pandora's with a cost and a random reward, the
    index solves E[max(v - t, 0)] = c, sampling stops when the best reward so far reaches it, and
    where the distribution is unknown an upper confidence bound of the index takes its place. Chosen
    here: rewards are the head's final values in [0, 1], so the bound is Hoeffding's for a bounded
    reward, (1 - t) sqrt(log(1 / delta) / 2m) after m samples, where the paper assumes an
    exponential tail; and no scaling of rewards, since values are probabilities.

    Args:
      costs: prices of one sample in units of the reward, above 0; one point for each.
      known: whether the index is that of the prompt's whole pool: Weitzman's optimal rule, which no
        real decode can follow. Else it is learned from the samples so far.
      delta: in (0, 1), how likely the bound may fail. Without any bound the first sample would
        always do, as its own reward lies above the index learned from it.
      most, wave, draws: see `sequential_curve`.

    Raises:
      UsageError: a cost or delta outside its range, or a value outside [0, 1].
    """
    check_knobs("cost", costs, 1e-12, math.inf)
    check_knobs("delta", (delta,), 1e-12, 1 - 1e-12)
    outside = pool.value[(pool.value < 0) | (pool.value > 1)]
    if outside.size and not known:
        raise UsageError(
            f"value {outside[0]:g}",
            "the bound on the index holds for rewards in [0, 1]",
            "pass such values, or known=True",
        )
    prices = np.array(costs, np.float64)[:, None]

    def rule(drawn: Drawn, ends: np.ndarray) -> list[Outcome]:
        at = ends - 1
        best = np.maximum.accumulate(drawn.value, axis=1)[:, at]
        reward = running_best(drawn.ids, drawn.value, drawn.correct)[:, at]
        if known:
            index = reservation_value(pool.value[drawn.prompt], prices[:, 0])[:, None, None]
        else:
            bonus = np.sqrt(math.log(1 / delta) / (2 * ends))
            index = np.stack(
                [
                    reservation_value(drawn.value[:, :end], prices, bound)
                    for end, bound in zip(ends, bonus, strict=True)
                ],
                axis=-1,
            )
        return [Outcome(stop, reward) for stop in best >= index - TIE]

    name = "pandora_known" if known else "pandora"
    return sequential_curve(pool, name, rule, "cost", costs, most=most, wave=wave, draws=draws)
