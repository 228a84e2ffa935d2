"""Which subsets of n of the N samples a decode is replayed on: all if they are few, else a seeded
draw, the same for every prompt and setting.

Fixed methods need no replay: `baselines.baseline_point` averages them, exactly where it can.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from zip_rc_jax.runtime.errors import UsageError


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


def fixed_ns(total: int) -> list[int]:
    """The n of a curve: 1, 2, 3, 4, 6, 8, 12, 16, ... up to `total`, which is the last one."""
    found = {total}
    power = 1
    while power <= total:
        found |= {power, *([power + power // 2] if power > 1 else [])}
        power *= 2
    return sorted(n for n in found if n <= total)
