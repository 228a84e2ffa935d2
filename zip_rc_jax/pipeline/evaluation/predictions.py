"""How good policy and head are on the pool of samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from zip_rc_jax.data.problems import Problem
from zip_rc_jax.evaluation import drawing, metrics
from zip_rc_jax.evaluation.baselines import SamplePool
from zip_rc_jax.evaluation.rollout_predictions import RolloutPredictions, final_values
from zip_rc_jax.grading.votes import NO_ANSWER
from zip_rc_jax.grid import Grid

FEW_PROMPTS = 4


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
    grid: Grid,
    pool: SamplePool,
    found: Sequence[Sequence[RolloutPredictions]],
    whole: np.ndarray,
    known: np.ndarray | None = None,
) -> dict[str, float]:
    """Prediction quality of the head on the pool, whose predictions are `found[p][k]`.

    The empirical joint that TV is measured against has the final values of the prompt's own samples
    on its reward axis, as the head's labels have; with few samples per prompt it is noisy, which
    raises TV.

    Args:
      whole: `[P]` bool, prompts none of whose samples was truncated. The others have no true
        lengths, and are left out of what needs them.
      known: `[P]` bool, of `known_bins`; None takes `whole`. "tv/root" is over these prompts.
    """
    known = whole if known is None else known
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
        **root_variation(predicted[known], observed[known], pool.n_samples),
        "length/root_mean_error": root.mean_error,
        "length/root_mean_absolute_error": root.mean_absolute_error,
        "length/prompts_left_out": float((~whole).sum()),
    }


def root_variation(predicted: np.ndarray, observed: np.ndarray, samples: int) -> dict[str, float]:
    """Total variation between joints `[P, B_V, B_T]`, and its noise floor: what the predictions
    would show if each were exactly right (see `total_variation_floor`).

    Means over prompts, NaN without any.
    """
    if not len(predicted):
        return {"tv/root": math.nan, "tv/noise_floor": math.nan, "tv/prompts": 0.0}
    return {
        "tv/root": float(metrics.total_variation(predicted, observed).mean()),
        "tv/noise_floor": float(metrics.total_variation_floor(predicted, samples).mean()),
        "tv/prompts": float(len(predicted)),
    }


def known_bins(grid: Grid, finished: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Prompts `[P]` whose samples all have a known length bin: they ended, or were cut off when
    they had reached the last bin.

    Args:
      finished: `[P, N]` bool.
      length: `[P, N]`, tokens that were generated.
    """
    last = grid.length_edges[-2]
    return np.asarray((finished | (length >= last)).all(axis=1))


# What the prediction table shows, and the name of each in `prediction_metrics`.
TABLE = {
    "TV at the root": "tv/root",
    "TV, noise floor": "tv/noise_floor",
    "problems of TV": "tv/prompts",
    "F1": "binary/f1",
    "accuracy": "binary/accuracy",
    "recall of errors": "binary/error_recall",
    "ECE": "ece",
    "within-prompt AUC": "within_prompt_auc",
}


def with_values_of(
    pool: SamplePool, found: Sequence[Sequence[RolloutPredictions]], last: int
) -> SamplePool:
    """The pool with the final values of another head: means over the last `last` positions, as the
    decoder's window makes them."""
    values = [final_values(row, last).astype(np.float64) for row in found]
    return dataclasses.replace(pool, value=np.array(values))


def by_problem(pool: SamplePool) -> SamplePool:
    """All samples of a problem in one row, whatever their try.

    Answers were grouped within tries, so here no sample has one.
    """
    if pool.tries == 1:
        return pool
    problems = pool.n_problems

    def joined(x: np.ndarray) -> np.ndarray:
        return x.reshape(problems, -1)

    return dataclasses.replace(
        pool,
        correct=joined(pool.correct),
        answer_id=np.full((problems, pool.tries * pool.n_samples), NO_ANSWER),
        value=joined(pool.value),
        self_length=joined(pool.self_length),
        level=pool.level[:: pool.tries],
        tries=1,
    )


def chosen_prompts(
    problems: Sequence[Problem], pool: SamplePool, known: np.ndarray, asked: Sequence[str]
) -> list[int]:
    """Numbers of the problems whose joints are drawn.

    Those asked for by id; else, of the problems that `known_bins` has, the one with the lowest
    share of right samples, the one with the highest, and those at a third and two thirds of that
    order. Equal shares stay in the order of the problems.
    """
    if asked:
        return [i for i, p in enumerate(problems) if p.id in asked]
    order = sorted(np.flatnonzero(known).tolist(), key=lambda i: (pool.correct[i].mean(), i))
    if not order:
        return []
    places = np.linspace(0, len(order) - 1, min(FEW_PROMPTS, len(order)))
    return [order[round(place)] for place in places]


def prompt_joints_figure(
    grid: Grid,
    pool: SamplePool,
    found: Sequence[Sequence[RolloutPredictions]],
    problems: Sequence[Problem],
    chosen: Sequence[int],
) -> Figure | None:
    """The joint that the head predicts before the first token, beside that of all samples, for some
    problems."""
    if not chosen:
        return None
    at = list(chosen)
    predicted, observed = (x[at] for x in first_joints(grid, pool, found))
    floor = metrics.total_variation_floor(predicted, pool.n_samples)
    about = "; ".join(
        f"{number}: {problems[i].id or f'problem {i}'}, {100 * pool.correct[i].mean():.0f}% right, "
        f"noise floor {low:.2f}"
        for number, (i, low) in enumerate(zip(at, floor, strict=True), 1)
    )
    note = f"Single problems, {pool.n_samples} samples each. {about}"
    titles = [str(number) for number in range(1, len(at) + 1)]
    return drawing.joint_heatmaps(predicted, observed, grid, titles, note)


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
