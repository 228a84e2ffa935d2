"""Baselines that read confidence off the policy's own next-token probabilities: DeepConf and
self-certainty.

`token_statistics` makes what they need from finished samples. Both need all log-probabilities of a
position, not that of the drawn token alone; neither needs training or a second model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.evaluation.baselines import (
    BaselinePoint,
    SamplePool,
    baseline_point,
    check_size,
    mean_longest,
)
from zip_rc_jax.evaluation.draws import Draws, mean_and_error
from zip_rc_jax.evaluation.selection import TIE, running_sums, running_votes, vote_rewards
from zip_rc_jax.evaluation.sequential import (
    Drawn,
    Outcome,
    check_knobs,
    drawn_samples,
    sequential_curve,
)
from zip_rc_jax.runtime.errors import UsageError

AGGREGATES = ("mean", "lowest_group", "bottom_groups", "tail")
Ragged = Sequence[Sequence[Any]]  # [P][N] arrays of one number per token

# ---- DeepConf


def group_confidences(tokens: Any, window: int) -> np.ndarray:
    """Means `[max(1, T - window + 1)]` of the token confidences `[T]` over a sliding window.

    A sample that is shorter than the window is one group. Source: arXiv 2508.15260, section 3.
    """
    tokens = np.asarray(tokens, np.float64)
    if len(tokens) <= window:
        return tokens.mean(keepdims=True)
    sums = np.cumsum(np.append(0.0, tokens))
    return (sums[window:] - sums[:-window]) / window


def trace_confidence(
    tokens: Any, aggregate: str = "lowest_group", window: int = 2048, share: float = 0.1
) -> float:
    """One confidence of a sample from its token confidences `[T]`.

    Source: Fu et al., "Deep Think with Confidence" (arXiv 2508.15260), section 3.

    Args:
      tokens: mean negative log-probability of the k likeliest tokens at each position. It is large
        where one token stands out.
      aggregate: "mean" of all tokens; "lowest_group", the least group; "bottom_groups", the mean of
        the lowest `share` of the groups; "tail", the mean of the last `window` tokens.
      window: tokens of a group.
    """
    check_window(window)
    if aggregate not in AGGREGATES:
        raise UsageError(
            f"aggregate={shown(aggregate)}",
            f"known ones are {', '.join(AGGREGATES)}",
            "use one of them",
        )
    tokens = np.asarray(tokens, np.float64)
    if aggregate == "mean":
        return float(tokens.mean())
    if aggregate == "tail":
        return float(tokens[-window:].mean())
    groups = np.sort(group_confidences(tokens, window))
    if aggregate == "lowest_group":
        return float(groups[0])
    return float(groups[: max(1, int(len(groups) * share))].mean())


def check_window(window: Any) -> None:
    if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
        raise UsageError(
            f"window={shown(window)}", "it counts tokens of a group", "use a whole number from 1 on"
        )


def trace_confidences(
    tokens: Ragged, aggregate: str = "lowest_group", window: int = 2048
) -> np.ndarray:
    """`[P, N]`: `trace_confidence` of every sample."""
    return np.array([[trace_confidence(t, aggregate, window) for t in row] for row in tokens])


def _thresholds(confidence: np.ndarray, keep: float) -> np.ndarray:
    """`[K]`: the percentile of confidences `[K, n]` above which lies a share `keep` of them."""
    return np.quantile(confidence, 1 - keep, axis=-1) - TIE


def deepconf_offline(
    pool: SamplePool,
    confidence: Any,
    keep: Sequence[float] = (0.1, 0.9),
    *,
    n: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Keeps the most confident samples of n; then a vote weighted by confidence.

    Source: Fu et al., "Deep Think with Confidence" (arXiv 2508.15260), the offline mode. From the
    paper: the top 10% (or 90%) of the samples vote, each with the weight of its confidence. From
    its code: the bound is the percentile with linear interpolation. Chosen here: samples without an
    answer take part in the percentile; if no kept sample has an answer, the mean of the kept ones
    counts.

    Args:
      confidence: `[P, N]`, see `trace_confidences`.
      keep: shares that are kept, in (0, 1]; one point for each.
      n: samples that are drawn; default all of the pool.
      draws: see `Draws`.

    Raises:
      UsageError: a share outside (0, 1], or confidences that do not fit the pool.
    """
    check_knobs("keep", keep, 1e-9, 1)
    confidence = _fitting(pool, confidence)

    def weigh(drawn: Drawn) -> list[tuple[np.ndarray, np.ndarray]]:
        mine = confidence[drawn.prompt][drawn.order]
        return [(mine, mine >= _thresholds(mine, share)[:, None]) for share in keep]

    return _weighted_votes(pool, "deepconf_offline", weigh, "keep", keep, n, draws)


def _weighted_votes(
    pool: SamplePool,
    method: str,
    weigh: Callable[[Drawn], Sequence[tuple[np.ndarray, np.ndarray]]],
    knob_name: str,
    knobs: Sequence[float],
    n: int | None,
    draws: Draws | None,
) -> tuple[BaselinePoint, ...]:
    """A vote among n full samples, whose weights and members depend on all of them.

    Args:
      weigh: of K subsets the weights `[K, n]` and who votes `[K, n]` bool, for each knob.
    """
    n = pool.n_samples if n is None else n
    draws = draws or Draws()
    check_size(pool, n)
    accuracy, error = np.zeros((2, len(knobs), pool.n_prompts))
    chosen = draws.all_subsets(pool.n_samples, n)
    for p in range(pool.n_prompts):
        order = draws.drawn(p, pool.n_samples, n) if chosen is None else chosen
        drawn = drawn_samples(pool, p, order)
        for k, (weights, member) in enumerate(weigh(drawn)):
            rewards = vote_rewards(drawn.ids, weights, drawn.correct, member)
            accuracy[k, p], error[k, p] = mean_and_error(rewards, chosen is not None)
    latency = mean_longest(pool.self_length, n, draws) / pool.mean_length
    compute = np.full(pool.n_prompts, float(n))
    return tuple(
        BaselinePoint(method, n, accuracy[k], compute, latency, error[k], knob_name, float(knob))
        for k, knob in enumerate(knobs)
    )


def deepconf_online(
    pool: SamplePool,
    token_confidence: Ragged,
    keep: Sequence[float] = (0.1, 0.9),
    *,
    window: int = 2048,
    warmup: int = 16,
    consensus: float | None = None,
    most: int | None = None,
    wave: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """Learns a threshold from full samples, then cuts the others where their confidence falls below
    it.

    Source: Fu et al., "Deep Think with Confidence" (arXiv 2508.15260), the online mode. From the
    paper and its code: `warmup` full samples; the threshold is the percentile of their lowest group
    confidences; every later sample ends at the token where a full group lies below it; samples
    above the threshold (those of the warm-up, too) vote with their lowest group confidence; with
    `consensus`, sampling also stops when one answer has that share of the votes' weight. Chosen
    here: the cut sample costs the tokens up to that token; a sample that is shorter than a group is
    never cut, and votes if its mean reaches the threshold; if no voter has an answer, their mean
    counts.

    Args:
      token_confidence: `[P][N]` arrays of one number for each generated token.
      keep: shares of the warm-up above the threshold, in (0, 1]; one point for each.
      window: tokens of a group.
      warmup: samples of the first wave.
      consensus: in (0, 1]; None draws all samples.
      most: samples with those of the warm-up; default all of the pool.
      wave: samples that run in parallel after the warm-up; default all of them without `consensus`,
        and one with it.
      draws: see `Draws`.

    Raises:
      UsageError: a share outside its range, a warm-up that the pool does not have, or a sample
        whose confidences are not one for each token.
    """
    check_knobs("keep", keep, 1e-9, 1)
    check_knobs("consensus", () if consensus is None else (consensus,), 1e-9, 1)
    check_window(window)
    most = pool.n_samples if most is None else most
    check_size(pool, most)
    if isinstance(warmup, bool) or not isinstance(warmup, int) or not 1 <= warmup <= most:
        raise UsageError(
            f"warmup={shown(warmup)}",
            f"it counts full samples, of {most} in all",
            f"use a number from 1 to {most}",
        )
    _check_tokens(pool, token_confidence)
    if wave is None:
        wave = max(1, most - warmup) if consensus is None else 1
    lowest = trace_confidences(token_confidence, "lowest_group", window)

    def rule(drawn: Drawn, ends: np.ndarray) -> list[Outcome]:
        tokens, least = token_confidence[drawn.prompt], lowest[drawn.prompt]
        mine = least[drawn.order]
        result = []
        for share in keep:
            bound = _thresholds(mine[:, :warmup], share)
            lengths = np.stack([cut_lengths(t, window, bound) for t in tokens], axis=1)
            length = np.take_along_axis(lengths, drawn.order, axis=1)
            length[:, :warmup] = drawn.length[:, :warmup]
            member = mine >= bound[:, None]
            reward = running_votes(drawn.ids, mine, drawn.correct, member)[:, ends - 1]
            stop = np.zeros(reward.shape, bool)
            if consensus is not None:
                voters = np.where(member, drawn.ids, -1)
                score = running_sums(voters, mine, np.unique(drawn.ids[drawn.ids >= 0]))
                score = score[:, ends - 1]
                if score.shape[-1]:
                    total = score.sum(-1)
                    stop = (total > 0) & (score.max(-1) >= consensus * total - TIE)
            result.append(Outcome(stop, reward, length))
        return result

    return sequential_curve(
        pool,
        "deepconf_online",
        rule,
        "keep",
        keep,
        most=most,
        wave=wave,
        first=warmup,
        draws=draws,
    )


def cut_lengths(tokens: Any, window: int, bounds: np.ndarray) -> np.ndarray:
    """`[K]` float64: tokens of a sample that is cut where a full group lies below each of the
    bounds `[K]`.

    Args:
      tokens: `[T]`, confidence of each token.
    """
    if len(tokens) < window:
        return np.full(len(bounds), float(len(tokens)))
    falling = np.minimum.accumulate(group_confidences(tokens, window))
    above = np.searchsorted(-falling, -bounds, side="right")  # groups before the first one below
    return np.minimum(above + window, len(tokens)).astype(np.float64)


def _check_tokens(pool: SamplePool, tokens: Ragged) -> None:
    for p in range(pool.n_prompts):
        for i in range(pool.n_samples):
            try:
                given = len(tokens[p][i])
            except (IndexError, TypeError):
                given = -1
            if given != pool.self_length[p, i]:
                raise UsageError(
                    f"token confidences of sample {i} of prompt {p}",
                    f"there are {max(given, 0)}, and the sample has "
                    f"{pool.self_length[p, i]:g} tokens",
                    "give one for each generated token, the end token included",
                )


def _fitting(pool: SamplePool, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape != pool.correct.shape or not np.isfinite(values).all():
        raise UsageError(
            f"confidences of shape {values.shape}",
            f"the pool has shape {pool.correct.shape}, and each sample a finite confidence",
            "give one for each sample",
        )
    return values


# ---- self-certainty


def self_certainty_curve(
    pool: SamplePool, certainty: Any, draws: Draws | None = None
) -> tuple[BaselinePoint, ...]:
    """Best-of-n at n = 1..N by self-certainty: ascending in n.

    Source: Kang et al., "Scalable Best-of-N Selection for Large Language Models via Self-Certainty"
    (arXiv 2502.18581). From the paper: the certainty of a sample is the mean over its tokens of
    `-1/V sum_v log(V p_v)`, the KL divergence of the uniform distribution from the next-token one.
    Chosen here: V counts the ids that the policy can emit; samples without an answer win last.

    Args:
      certainty: `[P, N]`, see `token_statistics`.
    """
    scored = _scored(pool, certainty)
    return tuple(
        _renamed(baseline_point(scored, "best_of_n", n, draws), "self_certainty")
        for n in range(1, pool.n_samples + 1)
    )


def borda_curve(
    pool: SamplePool,
    certainty: Any,
    power: Sequence[float] = (0.3, 0.7, 1.2),
    *,
    n: int | None = None,
    draws: Draws | None = None,
) -> tuple[BaselinePoint, ...]:
    """A vote among n samples whose weights are ranks by self-certainty, to a power.

    Source: Kang et al. (arXiv 2502.18581), as for `self_certainty_curve`. From the paper: the r-th
    most certain of n samples has the weight (n - r + 1)^p. Chosen here: samples without an answer
    keep their rank and do not vote; samples of equal certainty share the mean of their weights.

    Args:
      certainty: `[P, N]`.
      power: p; 0 is the majority, a large one best-of-n. One point for each.
      n: samples that are drawn; default all of the pool.
    """
    check_knobs("power", power, 0, math.inf)
    scored = _scored(pool, certainty)

    def weigh(drawn: Drawn) -> list[tuple[np.ndarray, np.ndarray]]:
        everyone = np.ones(drawn.ids.shape, bool)
        return [(rank_weights(drawn.value, p), everyone) for p in power]

    return _weighted_votes(scored, "self_certainty_borda", weigh, "power", power, n, draws)


def rank_weights(score: np.ndarray, power: float) -> np.ndarray:
    """`[K, n]`: the r-th largest of n scores `[K, n]` has the weight (n - r + 1)^power; equal ones
    share the mean."""
    count, n = score.shape
    by_rank = np.append(0.0, np.cumsum(np.arange(n, 0, -1, dtype=np.float64) ** power))
    weights = np.empty(score.shape)
    for start in range(0, count, max(1, 2**22 // n**2)):
        part = score[start : start + max(1, 2**22 // n**2)]
        above = (part[:, None, :] > part[:, :, None]).sum(-1)
        equal = (part[:, None, :] == part[:, :, None]).sum(-1)
        weights[start : start + len(part)] = (by_rank[above + equal] - by_rank[above]) / equal
    return weights


def _scored(pool: SamplePool, value: Any) -> SamplePool:
    return SamplePool(
        pool.correct, pool.answer_id, _fitting(pool, value), pool.self_length, pool.level
    )


def _renamed(point: BaselinePoint, method: str) -> BaselinePoint:
    return BaselinePoint(
        method, point.n, point.accuracy, point.compute, point.latency, point.standard_error
    )
