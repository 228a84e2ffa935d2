"""Intervals over problems and tries: the two-level bootstrap.

A resample draws problems with replacement, and for each drawn problem its tries with replacement.
So an interval holds both how problems differ and how a decode of one problem does. Where every
problem has one try, it is the plain bootstrap over problems. With several, the second level adds a
little to a spread that the first shows already, so these intervals are rather too wide than too
narrow.

All columns of a call share the resamples, so their differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation.metrics import paired_bootstrap

QUANTILES = (0.025, 0.975)
_CHUNK = 4_000_000  # weights held at once
Blocks = Sequence[tuple[int, int]]


def mean_weights(blocks: Blocks) -> np.ndarray:
    """Weight of every row in the mean over problems of the mean over tries, `[rows]` float64.

    Args:
      blocks: (problems, tries) of each part; its rows are the tries of its first problem, then
        those of the next.
    """
    total = sum(problems for problems, _ in blocks)
    return np.concatenate([np.full(p * t, 1 / (total * t)) for p, t in blocks])


def resampled_weights(blocks: Blocks, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights of every row in resamples, `[some, rows]` float64; each resample adds up to 1.

    Tries of one problem are alike, so those of all its copies in a resample are one multinomial
    draw.
    """
    rng = np.random.default_rng(seed)
    total = sum(problems for problems, _ in blocks)
    step = max(1, _CHUNK // sum(p * t for p, t in blocks))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, total, (size, total))
        offset = np.arange(size)[:, None] * total
        copies = np.bincount((drawn + offset).ravel(), minlength=size * total).reshape(size, total)
        parts, first = list[np.ndarray](), 0
        for problems, tries in blocks:
            mine = copies[:, first : first + problems]
            first += problems
            counts = mine[..., None]
            if tries > 1:
                counts = rng.multinomial(mine * tries, np.full(tries, 1 / tries))
            parts.append(counts.reshape(size, -1) / (total * tries))
        yield np.concatenate(parts, axis=1)


def two_level_intervals(
    columns: Any, blocks: Blocks, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95% percentile interval of each column.

    Args:
      columns: `[rows, K]`, see `mean_weights`.
      blocks: (problems, tries) of each part.

    Returns:
      mean, low, high: `[K]` float64.

    Raises:
      ValueError: NaN, other rows than the blocks have, or resamples < 1.
    """
    values = np.asarray(columns, np.float64)
    rows = sum(problems * tries for problems, tries in blocks)
    if values.ndim != 2 or len(values) != rows or np.isnan(values).any() or resamples < 1:
        raise ValueError(
            f"need {rows} rows without NaN and at least one resample; got shape {values.shape}, "
            f"resamples={resamples}"
        )
    means = np.concatenate([w @ values for w in resampled_weights(blocks, resamples, seed)])
    low, high = np.quantile(means, QUANTILES, axis=0)
    return mean_weights(blocks) @ values, low, high


def interval(
    difference: np.ndarray, tries: int, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean and 95% interval of one column whose problems have `tries` rows each."""
    if tries == 1:
        return paired_bootstrap(difference, resamples, seed)
    blocks = [(len(difference) // tries, tries)]
    mean, low, high = two_level_intervals(difference[:, None], blocks, resamples, seed)
    return float(mean[0]), float(low[0]), float(high[0])
