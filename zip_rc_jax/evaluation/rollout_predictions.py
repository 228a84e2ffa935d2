"""What a trained head says about finished rollouts: value labels, validation, prediction
metrics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.data.rollouts import Rollout, read_items, summary_of
from zip_rc_jax.evaluation.metrics import (
    LengthCalibration,
    empirical_joint,
    length_calibration,
    within_prompt_auc,
)
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import logits, unembedding
from zip_rc_jax.predictions import ScoringConfig, hidden_batches, joints_of
from zip_rc_jax.runtime.distributed import gather


@dataclasses.dataclass(frozen=True)
class RolloutPredictions:
    """Predictions along one rollout of `m` generated tokens, without the joint of every token.

    Attributes:
      reward: float32 `[m]`, expected reward at every labelled position (root first).
      remaining: float32 `[m]`, expected remaining tokens there.
      first_joint: float32 `[B_V, B_T]`, the joint at the root.
      mean_joint: float32 `[B_V, B_T]`, mean over the labelled positions.
    """

    reward: np.ndarray
    remaining: np.ndarray
    first_joint: np.ndarray
    mean_joint: np.ndarray


@dataclasses.dataclass(frozen=True)
class MeanJoints:
    """Predicted against observed (reward, remaining length), averaged over the same labelled
    positions of finished rollouts.

    A truncated rollout has no true length, so it is left out on both sides.

    Attributes:
      predicted: float64 `[B_V, B_T]`, mean joint.
      observed: float64 `[B_V, B_T]`, share of the positions whose rollout ended in each cell.
      positions, rollouts: how many were averaged.
      left_out: rollouts that are truncated or have no label.
    """

    predicted: np.ndarray
    observed: np.ndarray
    positions: int
    rollouts: int
    left_out: int


@dataclasses.dataclass(frozen=True)
class Validation:
    """Named numbers for the record of a step, and the joints for its heat map (None if every
    rollout would be left out)."""

    metrics: dict[str, float]
    joints: MeanJoints | None


class RolloutBatch(NamedTuple):
    """Some rollouts in a batch.

    Attributes:
      hidden: `[rows, width, d_model]`, final hidden states.
      spans: for each of the first rows, the rollout's number and its labelled positions.
    """

    hidden: jax.Array
    spans: list[tuple[int, slice]]


def rollout_batches(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    settings: ScoringConfig,
    title: str = "",
) -> Iterator[RolloutBatch]:
    """Batches of rollouts, see `hidden_batches`. No position follows the last token of a rollout.

    Args:
      title: of a progress bar; empty for none.
    """
    summary = summary_of(rollouts)
    lengths = summary.prompt + summary.output - 1

    def read(numbers: list[int]) -> list[np.ndarray]:
        read = read_items(rollouts, numbers)
        return [np.concatenate([r.prompt_token_ids, r.output_token_ids])[:-1] for r in read]

    for batch in hidden_batches(lm, lengths, read, settings, title):
        starts = summary.prompt - 1
        spans = [(i, slice(int(starts[i]), int(lengths[i]))) for i in batch.members]
        yield RolloutBatch(batch.hidden, spans)


def predict_rollouts(
    lm: LanguageModel, rollouts: Sequence[Rollout], settings: ScoringConfig, title: str = ""
) -> list[RolloutPredictions]:
    """Predictions at every labelled position of every rollout, in the given order.

    Args:
      title: of a progress bar; empty for none.

    Raises:
      ValueError: the model has no head.
    """
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    result: list[RolloutPredictions | None] = [None] * len(rollouts)
    for hidden, spans in rollout_batches(lm, rollouts, settings, title):
        reward, remaining, joint = gather(joints_of(lm, hidden))
        for lane, (i, span) in enumerate(spans):
            result[i] = RolloutPredictions(
                reward[lane, span].copy(),
                remaining[lane, span].copy(),
                joint[lane, span.start].copy(),
                joint[lane, span].mean(axis=0),
            )
    return [p for p in result if p is not None]


@functools.partial(jax.jit, static_argnames=("model",))
def _some_logits(
    model: ModelConfig, table: jax.Array, hidden: jax.Array, at: jax.Array
) -> jax.Array:
    return logits(model, jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0], table)


def first_logits(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    ids: Sequence[int],
    settings: ScoringConfig,
    title: str,
) -> np.ndarray:
    """Logits of the tokens `ids [K]` right after every prompt: float32 `[N, K]`; with a progress
    bar of that title."""
    table = unembedding(lm.config, lm.params["body"])[np.asarray(ids)]
    result = np.empty((len(rollouts), len(ids)), np.float32)
    for hidden, spans in rollout_batches(lm, rollouts, settings, title):
        at = np.zeros(len(hidden), np.int32)
        at[: len(spans)] = [span.start for _, span in spans]
        result[[i for i, _ in spans]] = gather(_some_logits(lm.config, table, hidden, at))[
            : len(spans)
        ]
    return result


def final_values(found: Sequence[RolloutPredictions], last: int) -> np.ndarray:
    """`[n]` float32: mean expected reward over the last `last` labelled positions of each rollout
    (all of them if it has fewer)."""
    # Summed in float64: a mean of rewards up to 1 is then none above it.
    return np.array([p.reward[-last:].mean(dtype=np.float64) for p in found], np.float32)


def validate(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    *,
    label: str,
    last: int,
    settings: ScoringConfig,
) -> Validation:
    """Predictions for held-back rollouts against what became of them.

    Args:
      rollouts: with `correct`.
      label: "correct" or "value": the reward that the head was trained on.
      last: labelled positions averaged for the final value.

    Raises:
      ValueError: the model has no head.
    """
    found = predict_rollouts(lm, rollouts, settings)
    assert lm.head is not None
    return Validation(
        validation_metrics(found, rollouts, last), mean_joints(found, rollouts, label, lm.head.grid)
    )


def mean_joints(
    found: Sequence[RolloutPredictions], rollouts: Sequence[Rollout], label: str, grid: Grid
) -> MeanJoints | None:
    """See `MeanJoints`; None if no rollout has both a true length and a label.

    Args:
      found: the predictions of each rollout.
    """
    used = [
        (p, r)
        for p, r in zip(found, rollouts, strict=True)
        if r.finished and not np.isnan(getattr(r, label))
    ]
    if not used:
        return None
    lengths = [len(p.remaining) for p, _ in used]
    remaining = np.concatenate([np.arange(m, 0, -1) for m in lengths])
    rewards = np.repeat([getattr(r, label) for _, r in used], lengths)
    predicted = np.average(np.stack([p.mean_joint for p, _ in used]), axis=0, weights=lengths)
    return MeanJoints(
        predicted,
        empirical_joint(rewards, remaining, grid),
        len(remaining),
        len(used),
        len(rollouts) - len(used),
    )


def validation_metrics(
    found: Sequence[RolloutPredictions], rollouts: Sequence[Rollout], last: int
) -> dict[str, float]:
    """Within-prompt AUC of the final value against `correct`, over prompts that have both outcomes,
    and the mean error of
    the remaining length in tokens, over finished rollouts (a truncated one has no true length; NaN
    if there are no others).

    This is the number the whole method stands on: a head that cannot tell good from bad within a
    prompt cannot select.
    """
    values = final_values(found, last)
    prompts, where = np.unique([r.prompt_index for r in rollouts], return_inverse=True)
    counts = np.bincount(where)
    slot = np.zeros(len(rollouts), int)
    for p in range(len(prompts)):
        slot[where == p] = np.arange(counts[p])
    score, outcome, mask = (
        np.zeros((len(prompts), counts.max()), kind) for kind in (np.float64, np.float64, bool)
    )
    score[where, slot], outcome[where, slot], mask[where, slot] = (
        values,
        [r.correct for r in rollouts],
        True,
    )
    auc, mixed = within_prompt_auc(score, outcome, mask)
    length = length_errors([p for p, r in zip(found, rollouts, strict=True) if r.finished])
    return {
        "eval/within_prompt_auc": auc,
        "eval/mixed_prompts": float(mixed),
        "eval/length_mae": length.mean_absolute_error,
    }


def length_errors(found: Sequence[RolloutPredictions]) -> LengthCalibration:
    """Calibration of the remaining length at all labelled positions of finished rollouts."""
    predicted = np.concatenate([np.empty(0), *(p.remaining for p in found)])
    return length_calibration(
        predicted,
        np.concatenate([np.empty(0), *(np.arange(len(p.remaining), 0, -1) for p in found)]),
    )
