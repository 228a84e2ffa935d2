"""Prediction quality and uncertainty: pure functions of host arrays.

An *outcome* is 0/1 (or a reward in [0, 1], correct when above 0.5). Where a number does not exist
(no items, only one class, no predicted errors) the result is NaN, never 0: an absent measurement
must not look like a bad one. NaN inputs raise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from zip_rc_jax.grid import Grid

THRESHOLD = 0.5
_CHUNK = 4_000_000  # resampled indices held at once by the bootstrap


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Items whose prediction lies in `[low, high)` (the last bin includes `high`); never empty.

    Attributes:
      low, high: bin edges, in the unit of the prediction (probability, or tokens).
      predicted, observed: means over the items.
      count: number of items.
    """

    low: float
    high: float
    predicted: float
    observed: float
    count: int


@dataclasses.dataclass(frozen=True)
class LengthCalibration:
    """Predicted against observed remaining length.

    Attributes:
      mean_error: mean of predicted - observed in tokens; positive means that the head expects too
        much.
      mean_absolute_error: mean of |predicted - observed| in tokens.
      table: bins with about equally many items, ascending in the prediction.
    """

    mean_error: float
    mean_absolute_error: float
    table: tuple[CalibrationBin, ...]


def _flat_pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 vectors of one length. Raises `ValueError` for different shapes or NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arrays must pair up item by item; got shapes {a.shape} and {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("NaN among the items; drop or repair them first")
    return a.ravel(), b.ravel()


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if x.size else float("nan")


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def total_variation(p: Any, q: Any) -> np.ndarray:
    """Total variation `sum |p - q| / 2` in [0, 1] of joints `[..., B_V, B_T]` -> `[...]` float64.

    Raises:
      ValueError: the shapes differ.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"joints must have one shape; got {p.shape} and {q.shape}")
    return np.abs(p - q).sum((-2, -1)) / 2


def total_variation_floor(p: Any, samples: int) -> np.ndarray:
    """Expected total variation between a joint and the empirical joint of that many samples of it.

    So much a head that is exactly right would show. It is exact: a cell's count is binomial, and
    the mean of |count - n p| is `2 (1 - p) (m + 1) P(count = m + 1)` with `m = floor(n p)` (De
    Moivre).

    Args:
      p: `[..., B_V, B_T]`, each summing to 1.
      samples: n, at least 1.

    Returns:
      `[...]` float64.

    Raises:
      ValueError: samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: an empirical joint has at least one")
    p = np.clip(np.asarray(p, np.float64), 0, 1)
    inside = np.where((p > 0) & (p < 1), p, 0.5)
    above = np.floor(samples * inside) + 1  # at most n, as p < 1
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1)))])
    rank = above.astype(int)
    chance = np.exp(
        factorials[samples] - factorials[rank] - factorials[samples - rank]
        + above * np.log(inside) + (samples - above) * np.log1p(-inside)
    )  # fmt: skip
    deviation = np.where(inside == p, 2 * (1 - inside) * above * chance, 0.0)
    return deviation.sum((-2, -1)) / (2 * samples)


def empirical_joint(rewards: Any, lengths: Any, grid: Grid) -> np.ndarray:
    """Share of rollouts per cell.

    Args:
      rewards: `[..., n]` final rewards in [0, 1] of the n rollouts of each prefix.
      lengths: `[..., n]` remaining tokens, end token included.
      grid: bins.

    Returns:
      `[..., B_V, B_T]` float64, each joint summing to 1.

    Raises:
      ValueError: the shapes differ, there are no rollouts, or a value lies off the grid's domain.
    """
    rewards, lengths = np.asarray(rewards), np.asarray(lengths)
    if rewards.shape != lengths.shape or not rewards.ndim or not rewards.shape[-1]:
        raise ValueError(
            "every rollout needs a reward and a length, and there must be one; got "
            f"{rewards.shape} and {lengths.shape}"
        )
    cell = grid.cell(rewards, lengths)
    lead, n = cell.shape[:-1], cell.shape[-1]
    groups = int(np.prod(lead, dtype=np.int64))
    offset = np.arange(groups)[:, None] * grid.n_cells
    counts = np.bincount(
        (cell.reshape(groups, n) + offset).ravel(), minlength=groups * grid.n_cells
    )
    return counts.reshape(*lead, grid.n_reward, grid.n_length) / n


def binary_metrics(prob: Any, outcome: Any) -> dict[str, float]:
    """Classification at threshold 0.5 (a probability of exactly 0.5 counts as "incorrect").

    Args:
      prob: predicted probability of being correct, any shape.
      outcome: same shape.

    Returns:
      `binary/accuracy`, `binary/f1` (of the class correct), `binary/error_recall` (share of
      incorrect answers that were called incorrect), `binary/error_precision` (share of answers
      called incorrect that are). NaN where the denominator is empty.
    """
    prob, outcome = _flat_pair(prob, outcome)
    said, true = prob > THRESHOLD, outcome > THRESHOLD
    return {
        "binary/accuracy": _mean((said == true).astype(np.float64)),
        "binary/f1": _ratio(2 * (said & true).sum(), said.sum() + true.sum()),
        "binary/error_recall": _ratio((~said & ~true).sum(), (~true).sum()),
        "binary/error_precision": _ratio((~said & ~true).sum(), (~said).sum()),
    }


def brier(prob: Any, outcome: Any) -> float:
    """Mean squared error of the predicted probability; NaN without items."""
    prob, outcome = _flat_pair(prob, outcome)
    return _mean((prob - outcome) ** 2)


def _table(
    predicted: np.ndarray, observed: np.ndarray, edges: np.ndarray
) -> tuple[CalibrationBin, ...]:
    which = np.searchsorted(edges[1:-1], predicted, side="right")
    bins = []
    for i in range(len(edges) - 1):
        inside = which == i
        if inside.any():
            means = float(predicted[inside].mean()), float(observed[inside].mean())
            bins.append(
                CalibrationBin(float(edges[i]), float(edges[i + 1]), *means, int(inside.sum()))
            )
    return tuple(bins)


def reliability(prob: Any, outcome: Any, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Predicted against observed frequency in `bins` equal-width bins of [0, 1]; empty bins are
    left out.

    Raises:
      ValueError: a probability outside [0, 1], NaN, or shapes that differ.
    """
    prob, outcome = _flat_pair(prob, outcome)
    if ((prob < 0) | (prob > 1)).any():
        raise ValueError(
            f"probabilities must lie in [0, 1]; got {prob[(prob < 0) | (prob > 1)][:5]}"
        )
    return _table(prob, outcome, np.linspace(0, 1, bins + 1))


def ece(prob: Any, outcome: Any, bins: int = 10) -> float:
    """Expected calibration error: mean over items of |predicted - observed| of their equal-width
    bin; NaN without items."""
    table = reliability(prob, outcome, bins)
    return _ratio(
        sum(b.count * abs(b.predicted - b.observed) for b in table), sum(b.count for b in table)
    )


def length_calibration(predicted: Any, observed: Any, bins: int = 8) -> LengthCalibration:
    """Calibration of the remaining length in tokens (any shape; both the same).

    Bins are quantiles of the prediction, because lengths spread over orders of magnitude; equal
    predictions share a bin, so there may be fewer than `bins`. Without items: NaN errors and an
    empty table.
    """
    predicted, observed = _flat_pair(predicted, observed)
    if not predicted.size:
        return LengthCalibration(float("nan"), float("nan"), ())
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)))
    edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    error = predicted - observed
    return LengthCalibration(_mean(error), _mean(np.abs(error)), _table(predicted, observed, edges))


def auc(score: Any, outcome: Any) -> float:
    """Probability that a correct item scores above an incorrect one, ties counting 1/2 (exact rank
    formula).

    Returns NaN when there are not items of both outcomes. Any shape; both the same.
    """
    score, outcome = _flat_pair(score, outcome)
    positive = outcome > THRESHOLD
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean 1-based rank of each distinct score
    return float((rank[inverse][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def within_prompt_auc(
    score: Any, outcome: Any, mask: Any = None, pair_weighted: bool = False
) -> tuple[float, int]:
    """AUC among the samples of one prompt: whether the score can select at all.

    A pooled AUC mostly measures that some prompts are easy; this one compares only samples of the
    same prompt.

    Args:
      score: `[P, n]`.
      outcome: `[P, n]`.
      mask: `[P, n]` bool, which samples exist (all if None); the others may hold anything.
      pair_weighted: weigh every (correct, incorrect) pair alike instead of every mixed prompt
        alike.

    Returns:
      (AUC, number of mixed prompts). Prompts without samples of both outcomes say nothing and are
      left out; the AUC is NaN if none is left.

    Raises:
      ValueError: shapes that differ, or a NaN that is not masked.
    """
    mask = np.ones(np.shape(score), bool) if mask is None else np.asarray(mask, bool)
    _flat_pair(np.where(mask, score, 0), np.where(mask, outcome, 0))
    score, positive = np.asarray(score, np.float64), np.asarray(outcome, np.float64) > THRESHOLD
    right, wrong = positive & mask, ~positive & mask
    wins = np.zeros(len(score))
    for j in range(score.shape[1]):  # one column at a time keeps memory at [P, n]
        other = score[:, j : j + 1]
        wins += np.where(
            wrong[:, j : j + 1] & right, (score > other) + (score == other) / 2, 0.0
        ).sum(1)
    pairs = right.sum(1) * wrong.sum(1)
    mixed = pairs > 0
    if pair_weighted:
        return _ratio(wins.sum(), pairs.sum()), int(mixed.sum())
    return _mean(wins[mixed] / pairs[mixed]), int(mixed.sum())


def paired_bootstrap(
    difference: Any, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over prompts and its 95% percentile interval.

    Args:
      difference: `[P]` difference of two methods on each prompt (pairing removes the variance of
        prompt difficulty).
      resamples: bootstrap resamples of the P prompts.
      seed: seed of the resampling; the same seed gives the same interval.

    Returns:
      (mean, low, high); three NaN without prompts.

    Raises:
      ValueError: NaN among the differences, not a vector, or resamples < 1.
    """
    difference = np.asarray(difference, np.float64)
    if difference.ndim != 1 or np.isnan(difference).any() or resamples < 1:
        raise ValueError(
            f"need a vector without NaN and at least one resample; got shape {difference.shape}, "
            f"resamples={resamples}"
        )
    n = len(difference)
    if not n:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([difference[rng.integers(0, n, (size, n))].mean(1) for size in sizes])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def pass_at_k(correct: Any, k: int) -> np.ndarray:
    """Unbiased pass@k per prompt, `1 - C(n - c, k) / C(n, k)` with c correct of n samples: `[P, n]`
    -> `[P]` float64.

    Raises:
      ValueError: k outside 1..n, or not a matrix.
    """
    right = np.asarray(correct, np.float64) > THRESHOLD
    if right.ndim != 2 or not 1 <= k <= right.shape[1]:
        raise ValueError(
            f"k={k} of samples {right.shape}: pass@k needs a [P, n] matrix and 1 <= k <= n"
        )
    n, wrong = right.shape[1], (~right).sum(1)
    # A product of k ratios instead of binomials, which overflow for large n.
    factors = [np.clip(wrong - i, 0, None) / (n - i) for i in range(k)]
    return 1 - np.prod(factors, axis=0)
