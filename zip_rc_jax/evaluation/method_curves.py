"""The curves of all methods that a pool of full samples allows, each over its own knob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from zip_rc_jax.evaluation.baselines import BaselinePoint, SamplePool
from zip_rc_jax.evaluation.confidence import (
    borda_curve,
    deepconf_offline,
    deepconf_online,
    self_certainty_curve,
    trace_confidences,
)
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.pruning import (
    first_finished,
    length_pruning,
    reward_pruning,
    shortest_curve,
)
from zip_rc_jax.evaluation.sequential import (
    adaptive_consistency,
    confidence_posterior,
    early_stopping,
    pandora,
)

THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
WINDOWS = (2, 3, 4, 5, 8)
COSTS = (0.2, 0.1, 0.05, 0.02, 0.01)
KEEP = (0.1, 0.5, 0.9)
POWERS = (0.3, 0.7, 1.2)
REWARDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
QUANTILES = (0.25, 0.5, 0.75, 0.9)
WARMUP = 16  # samples, as in DeepConf's code; half of a smaller pool


class Statistics(Protocol):
    """What confidence methods read of a sample, see `token_statistics`."""

    @property
    def confidence(self) -> np.ndarray: ...
    @property
    def self_certainty(self) -> float: ...


def method_curves(
    pool: SamplePool,
    *,
    statistics: Sequence[Sequence[Statistics]] | None = None,
    window: int = 2048,
    traces: Sequence[Sequence[Any]] | None = None,
    interval: int = 1,
    draws: Draws | None = None,
) -> dict[str, tuple[BaselinePoint, ...]]:
    """Method -> points over its knob, for all methods of the table but the plain ones of
    `baseline_curves`.

    Args:
      pool: with values in [0, 1].
      statistics: `[P][N]`, of every sample; None leaves DeepConf and self-certainty out.
      window: tokens of a group of DeepConf. The default is the authors', for answers of thousands
        of tokens; take a fraction of a sample's length.
      traces: `[P][N]` arrays, the expected reward before every generated token; None leaves the
        curve over reward thresholds out.
      interval: tokens between decisions of the pruning rules.
      draws: see `Draws`.

    Raises:
      UsageError: values outside [0, 1], or arrays that do not fit the pool.
    """
    total = pool.n_samples
    finished = sorted({1, max(1, total // 2), max(1, total - 1)})
    budgets = np.unique(np.ceil(np.quantile(pool.self_length, QUANTILES)))
    curves = {
        "adaptive_consistency": adaptive_consistency(pool, THRESHOLDS, draws=draws),
        "adaptive_consistency_dirichlet": adaptive_consistency(
            pool, THRESHOLDS, criterion="dirichlet", draws=draws
        ),
        "early_stopping": early_stopping(
            pool, [w for w in WINDOWS if w <= total] or [1], draws=draws
        ),
        "cges": confidence_posterior(pool, THRESHOLDS, draws=draws),
        "pandora": pandora(pool, COSTS, draws=draws),
        "pandora_known": pandora(pool, COSTS, known=True, draws=draws),
        "shortest": shortest_curve(pool),
        "first_finished": first_finished(pool, finished, draws=draws),
        "length_pruning": length_pruning(pool, budgets.tolist(), interval=interval, draws=draws),
    }
    if traces is not None:
        curves["reward_pruning"] = reward_pruning(
            pool, traces, REWARDS, interval=interval, draws=draws
        )
    if statistics is not None:
        certainty = np.array([[s.self_certainty for s in row] for row in statistics])
        tokens = [[s.confidence for s in row] for row in statistics]
        lowest = trace_confidences(tokens, "lowest_group", window)
        curves |= {
            "self_certainty": self_certainty_curve(pool, certainty, draws),
            "self_certainty_borda": borda_curve(pool, certainty, POWERS, draws=draws),
            "deepconf_offline": deepconf_offline(pool, lowest, KEEP, draws=draws),
            "deepconf_online": deepconf_online(
                pool,
                tokens,
                KEEP,
                window=window,
                warmup=min(WARMUP, max(1, total // 2)),
                draws=draws,
            ),
        }
    return curves
