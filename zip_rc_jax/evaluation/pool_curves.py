"""All baselines of a pool of full samples, as an evaluation and a replay make them.

What a method reads of a sample beside its answer, final value and length is a `Readings`. An
evaluation makes it with its models, and a replay reads it from the stored pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation.baselines import (
    SELF_EVALUATION,
    BaselinePoint,
    SamplePool,
    baseline_curves,
    self_evaluation_curve,
)
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.method_curves import Statistics, method_curves
from zip_rc_jax.evaluation.reward_model import reward_model_curves

GROUPS = 4  # groups of tokens in a mean sample, for DeepConf; the authors' group has 2,048
AUTHORS_GROUP = 2048

Curves = dict[str, tuple[BaselinePoint, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Readings:
    """What methods read of the samples of a pool of `R` rows of `N` samples. None is not there.

    Attributes:
      statistics: `[R][N]`, see `token_statistics`.
      rewards: `[R][N]` arrays `[T]`, the expected reward before every generated token.
      self_evaluation: `[2, R, N]` float64: values, and tokens of asking. See `SelfEvaluation`.
      reward_model: `[2, R, N]` float64: scores, and tokens of scoring. See `RewardModelScorer`.
      parameter_ratio: of that reward model.
    """

    statistics: Sequence[Sequence[Statistics]] | None = None
    rewards: Sequence[Sequence[np.ndarray]] | None = None
    self_evaluation: np.ndarray | None = None
    reward_model: np.ndarray | None = None
    parameter_ratio: float = 1.0


def pool_curves(
    pool: SamplePool,
    readings: Readings,
    *,
    window: int,
    interval: int,
    further: bool = True,
    ns: Sequence[int] | None = None,
    draws: Draws | None = None,
    orders: Draws | None = None,
) -> Curves:
    """Method -> its points, for all methods whose readings are there.

    Args:
      window, interval: of the decoder: tokens that its joint is the mean of, and between decisions.
      further: with the methods of `method_curves`, or the plain ones alone.
      ns: the n of methods that have no other knob; None for 1..N.
      draws: of plain votes, see `baseline_point`.
      orders: of the methods of `method_curves`.
    """
    curves = baseline_curves(pool, draws=draws, ns=ns)
    if readings.self_evaluation is not None:
        values, extra = readings.self_evaluation
        curves[SELF_EVALUATION] = self_evaluation_curve(pool, values, extra, draws, ns)
    if readings.reward_model is not None:
        scores, extra = readings.reward_model
        ratio = readings.parameter_ratio
        curves |= reward_model_curves(pool, scores, extra, serial_steps=ratio, draws=draws, ns=ns)
    if not further:
        return curves
    # A mean of rewards may lie a rounding error past 1.
    rounded = dataclasses.replace(pool, value=np.clip(pool.value, 0, 1))
    traces = None
    if readings.rewards is not None:
        traces = [[window_means(x, window) for x in row] for row in readings.rewards]
    found = method_curves(
        rounded,
        statistics=readings.statistics,
        window=min(AUTHORS_GROUP, max(1, round(pool.self_length.mean() / GROUPS))),
        traces=traces,
        interval=interval,
        draws=orders,
    )
    kept = range(1, pool.n_samples + 1) if ns is None else ns
    return curves | {
        name: tuple(point for point in points if point.knob_name or point.n in kept)
        for name, points in found.items()
    }


def in_rows(flat: Sequence[Any], each: int) -> list[list[Any]]:
    """A list of samples as rows of `each`."""
    return [list(flat[i : i + each]) for i in range(0, len(flat), each)]


def window_means(trace: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those before it, `window` in all: float64, as long as `trace`."""
    total = np.concatenate([[0.0], np.cumsum(trace, dtype=np.float64)])
    end = np.arange(1, len(trace) + 1)
    begin = np.maximum(0, end - window)
    return (total[end] - total[begin]) / (end - begin)
