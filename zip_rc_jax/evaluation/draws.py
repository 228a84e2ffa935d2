"""Subsets and orders of the samples of a prompt: all of them where they are few, else seeded draws.

An average over all of them is exact. An average over draws has a standard error, which every
`BaselinePoint` states.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from zip_rc_jax.config.checks import shown
from zip_rc_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Draws:
    """How averages over subsets and orders are taken.

    Attributes:
      enumerated: up to so many subsets (or orders), all are averaged.
      sampled: of more than that, so many are drawn for each prompt.
      seed: of the draws. Prompt p has a stream of its own. A draw of n samples begins like the draw
        of n + 1, so that methods and sizes are compared on the same draws.
    """

    enumerated: int = 2000
    sampled: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("enumerated", 1), ("sampled", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise UsageError(
                    f"Draws.{name}={shown(value)}",
                    f"it is no whole number from {least} on",
                    "correct it",
                )

    def all_subsets(self, total: int, size: int) -> np.ndarray | None:
        """`[S, size]` int64, all subsets of `size` of `total` samples; None if there are too
        many."""
        return _subsets(total, size) if math.comb(total, size) <= self.enumerated else None

    def all_orders(self, total: int, size: int) -> np.ndarray | None:
        """`[S, size]` int64, all orders in which `size` of `total` samples can come; None if there
        are too many."""
        return _orders(total, size) if math.perm(total, size) <= self.enumerated else None

    def drawn(self, prompt: int, total: int, size: int) -> np.ndarray:
        """`[sampled, size]` int64, random orders of `size` of `total` samples for one prompt.

        As sets, they are random subsets.
        """
        keys = np.random.default_rng([self.seed, prompt]).random((self.sampled, total))
        return np.argsort(keys, axis=1)[:, :size]


@functools.lru_cache(maxsize=64)  # asked for each prompt
def _subsets(total: int, size: int) -> np.ndarray:
    return np.array(list(itertools.combinations(range(total), size)), np.int64)


@functools.lru_cache(maxsize=64)
def _orders(total: int, size: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(total), size)), np.int64)


def mean_and_error(values: np.ndarray, exact: bool) -> tuple[float, float]:
    """Mean of values `[K]` and its standard error, which is 0 where the values are all there are
    (`exact`)."""
    if exact:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
