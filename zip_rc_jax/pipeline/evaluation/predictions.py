"""How good policy and head are on the pool of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from zip_rc_jax.evaluation import drawing, metrics
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.rollout_predictions import RolloutPredictions
from zip_rc_jax.grid import Grid


def policy_metrics(pool: SamplePool) -> dict[str, float]:
    """Whether the policy is worth deciding about: accuracy and reach by level, and how much longer
    the longest sample is."""
    n = pool.n_samples
    found: dict[str, float] = {}
    for level in np.unique(pool.level):
        rows = pool.level == level
        name = pool.level_title(int(level)).replace(" ", "_")
        found[f"policy/pass@1/{name}"] = float(pool.correct[rows].mean())
        found[f"policy/pass@{n}/{name}"] = float(pool.correct[rows].max(1).mean())
    found["policy/longest_over_mean"] = float(
        (pool.self_length.max(1) / pool.self_length.mean(1)).mean()
    )
    return found


def prediction_metrics(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]], whole: np.ndarray
) -> dict[str, float]:
    """Prediction quality of the head on the pool, whose predictions are `found[p][k]`.

    The empirical joint that TV is measured against has the final values of the prompt's own samples
    on its reward axis, as the head's labels have; with few samples per prompt it is noisy, which
    raises TV.

    Args:
      whole: `[P]` bool, prompts none of whose samples was truncated. The others have no true
        lengths, and are left out of what needs them.
    """
    auc, mixed = metrics.within_prompt_auc(pool.value, pool.correct)
    weighted, _ = metrics.within_prompt_auc(pool.value, pool.correct, pair_weighted=True)
    predicted, observed = first_joints(grid, pool, found)
    root = metrics.length_calibration(
        np.array([row[0].remaining[0] for row in found])[whole], pool.self_length.mean(1)[whole]
    )
    return {
        "within_prompt_auc": auc,
        "within_prompt_auc/pair_weighted": weighted,
        "within_prompt_auc/mixed_prompts": float(mixed),
        "pooled_auc": metrics.auc(pool.value.ravel(), pool.correct.ravel()),
        **metrics.binary_metrics(pool.value.ravel(), pool.correct.ravel()),
        "ece": metrics.ece(pool.value.ravel(), pool.correct.ravel()),
        "brier": metrics.brier(pool.value.ravel(), pool.correct.ravel()),
        "tv/first_position": float(metrics.total_variation(predicted, observed)[whole].mean())
        if whole.any()
        else math.nan,
        "length/root_mean_error": root.mean_error,
        "length/root_mean_absolute_error": root.mean_absolute_error,
        "length/prompts_left_out": float((~whole).sum()),
    }


def first_joints(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]]
) -> tuple[np.ndarray, np.ndarray]:
    """`[P, B_V, B_T]` predicted and empirical joint at the root of each prompt."""
    return np.stack([row[0].first_joint for row in found]), metrics.empirical_joint(
        pool.value, pool.self_length, grid
    )


def joint_figure(
    grid: Grid, pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]], whole: np.ndarray
) -> Figure | None:
    """Predicted against empirical joint at the root, mean over the prompts of each level; `whole`
    as in `prediction_metrics`."""
    levels = np.unique(pool.level[whole])
    if not len(levels):
        return None
    predicted, observed = (
        np.stack([x[whole & (pool.level == level)].mean(0) for level in levels])
        for x in first_joints(grid, pool, found)
    )
    return drawing.joint_heatmaps(
        predicted, observed, grid, [pool.level_title(int(level)) for level in levels]
    )
