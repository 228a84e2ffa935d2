"""What a trained head says about finished rollouts: value labels, validation, and the data of the prediction metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.data.rollouts import Rollout, read_items, summary_of
from zip_rc_jax.evaluation.metrics import LengthCalibration, empirical_joint, length_calibration, within_prompt_auc
from zip_rc_jax.grid import Grid
from zip_rc_jax.head import ZipHead, cell_log_probs
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, logits, unembedding
from zip_rc_jax.runtime.distributed import gather
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import Layout
from zip_rc_jax.training.loss import FullTeacher, TopK, VocabChunking, teacher_top_k
from zip_rc_jax.training.step import cast_teacher


@dataclasses.dataclass(frozen=True)
class ForwardSettings:
    """How a model goes over rollouts, without gradients. Hashable.

    Attributes:
      batch_tokens: most tokens of a batch, padding included; where one rollout (or one on each device) has more, it is that.
      dtype: what is computed in; empty for the dtype of the parameters.
      attention: see `TrainConfig`.
    """

    batch_tokens: int
    dtype: str = ""
    attention: str = "auto"

    @classmethod
    def of(cls, train: TrainConfig) -> ForwardSettings:
        """As a training step computes, and as many tokens at once."""
        return cls(train.batch_rows * train.row_tokens, train.compute_dtype, train.attention)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Predictions along one rollout of `m` generated tokens.

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
    """Predicted against observed (reward, remaining length), averaged over the same labelled positions of finished rollouts.

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
    """Named numbers for the record of a step, and the joints for its heat map (None if every rollout would be left out)."""

    metrics: dict[str, float]
    joints: MeanJoints | None


@functools.partial(jax.jit, static_argnames=("model", "layout", "settings"))
def _hidden(
    model: ModelConfig, layout: Layout, settings: ForwardSettings, body: dict[str, Any], tokens: jax.Array, valid: jax.Array
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    dtype = jnp.dtype(settings.dtype) if settings.dtype else None
    segments = valid.astype(jnp.int32)
    return forward_packed(model, body, tokens, positions, segments, layout=layout, dtype=dtype, attention=settings.attention)


@functools.partial(jax.jit, static_argnames=("model", "head"))
def _joints(model: ModelConfig, head: ZipHead, rows: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    joint = jnp.exp(cell_log_probs(logits(model, hidden, rows), head.grid))
    return head.grid.expected_reward(joint), head.grid.expected_length(joint), joint


def profiles(lm: LanguageModel, rollouts: Sequence[Rollout], settings: ForwardSettings, title: str = "") -> list[Profile]:
    """Predictions at every labelled position of every rollout, in the given order.

    Args:
      title: of a progress bar; empty for none.

    Raises:
      ValueError: the model has no head.
    """
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    rows = lm.params["zip_rows"]
    result: list[Profile | None] = [None] * len(rollouts)
    for hidden, spans in _batches(lm, rollouts, settings, title):
        reward, remaining, joint = gather(_joints(lm.config, lm.head, rows, hidden))
        for lane, (i, span) in enumerate(spans):
            result[i] = Profile(
                reward[lane, span].copy(), remaining[lane, span].copy(), joint[lane, span.start].copy(), joint[lane, span].mean(axis=0)
            )
    return [p for p in result if p is not None]


def labelled_features(lm: LanguageModel, rollouts: Sequence[Rollout], settings: ForwardSettings) -> np.ndarray:
    """Final hidden states at all labelled positions, rollout after rollout: float32 `[N, d_model]`."""
    result: list[np.ndarray] = [np.empty(0)] * len(rollouts)
    for hidden, spans in _batches(lm, rollouts, settings, "features"):
        found = gather(hidden.astype(jnp.float32))
        for lane, (i, span) in enumerate(spans):
            result[i] = found[lane, span].copy()
    return np.concatenate(result)


@functools.partial(jax.jit, static_argnames=("model", "head", "layout", "train"))
def _top_k(model: ModelConfig, head: ZipHead, layout: Layout, train: TrainConfig, teacher: FullTeacher, labelled: jax.Array) -> TopK:
    vocabulary = VocabChunking(model, layout, train.loss_chunk)
    return teacher_top_k(vocabulary, teacher, labelled, head.sampleable(model.vocab_size), train.kl_top_k)


def teacher_features(lm: LanguageModel, rollouts: Sequence[Rollout], train: TrainConfig) -> TopK:
    """What the policy of `lm`, frozen, says at all labelled positions, rollout after rollout: numpy arrays `[N, k]`.

    Raises:
      ValueError: the model has no head, so it is not known which ids the policy may emit.
    """
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    policy = dataclasses.replace(lm, params={**lm.params, "body": cast_teacher(lm.params["body"], train)})
    table = unembedding(lm.config, policy.params["body"])
    result: list[TopK | None] = [None] * len(rollouts)
    for hidden, spans in _batches(policy, rollouts, ForwardSettings.of(train), "teacher"):
        labelled = np.zeros(hidden.shape[:2], bool)
        for lane, (_, span) in enumerate(spans):
            labelled[lane, span] = True
        found = gather(_top_k(lm.config, lm.head, lm.layout, train, FullTeacher(hidden, table), labelled))
        for lane, (i, span) in enumerate(spans):
            result[i] = TopK(*(x[lane, span].copy() for x in found))
    return TopK(*(np.concatenate(arrays) for arrays in zip(*(r for r in result if r is not None), strict=True)))


@functools.partial(jax.jit, static_argnames=("model",))
def _some_logits(model: ModelConfig, table: jax.Array, hidden: jax.Array, at: jax.Array) -> jax.Array:
    return logits(model, jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0], table)


def first_logits(lm: LanguageModel, rollouts: Sequence[Rollout], ids: Sequence[int], settings: ForwardSettings, title: str) -> np.ndarray:
    """Logits of the tokens `ids [K]` right after every prompt: float32 `[N, K]`; with a progress bar of that title."""
    table = unembedding(lm.config, lm.params["body"])[np.asarray(ids)]
    result = np.empty((len(rollouts), len(ids)), np.float32)
    for hidden, spans in _batches(lm, rollouts, settings, title):
        at = np.zeros(len(hidden), np.int32)
        at[: len(spans)] = [span.start for _, span in spans]
        result[[i for i, _ in spans]] = gather(_some_logits(lm.config, table, hidden, at))[: len(spans)]
    return result


def padded_width(tokens: int) -> int:
    """The width of a batch whose longest rollout has `tokens`: 32s, then at most an eighth more, so that few shapes are compiled."""
    step = max(32, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _batches(
    lm: LanguageModel, rollouts: Sequence[Rollout], settings: ForwardSettings, title: str
) -> Iterator[tuple[jax.Array, list[tuple[int, slice]]]]:
    """Hidden states `[rows, width, d]` of batches of rollouts, and per lane the rollout's number and its labelled positions.

    The longest rollouts come first, those of like length together, so that little is padding. Rows are such that they divide over the mesh.

    Args:
      title: of a progress bar; empty for none.
    """
    ways = lm.layout.ways("batch")
    summary = summary_of(rollouts)
    lengths = summary.prompt + summary.output - 1
    order = np.argsort(-lengths, kind="stable")
    with progress(title, len(order)) if title else contextlib.nullcontext() as bar:
        start = 0
        while start < len(order):
            width = padded_width(int(lengths[order[start]]))
            rows = min(max(1, settings.batch_tokens // width // ways) * ways, lm.layout.padded(len(order), "batch"))
            members = order[start : start + rows]
            tokens = np.zeros((rows, width), np.int32)
            for lane, one in enumerate(read_items(rollouts, [int(i) for i in members])):
                tokens[lane, : lengths[members[lane]]] = np.concatenate([one.prompt_token_ids, one.output_token_ids])[:-1]
            valid = np.arange(width) < np.append(lengths[members], [0] * (rows - len(members)))[:, None]
            hidden = _hidden(lm.config, lm.layout, settings, lm.params["body"], tokens, valid)
            yield hidden, [(int(i), slice(int(summary.prompt[i]) - 1, int(lengths[i]))) for i in members]
            start += len(members)
            if bar is not None:
                bar(start, None)


def final_values(found: Sequence[Profile], last: int) -> np.ndarray:
    """`[n]` float32: mean expected reward over the last `last` labelled positions of each rollout (all of them if it has fewer)."""
    # Summed in float64: a mean of rewards up to 1 is then none above it.
    return np.array([p.reward[-last:].mean(dtype=np.float64) for p in found], np.float32)


def validate(lm: LanguageModel, rollouts: Sequence[Rollout], *, label: str, last: int, settings: ForwardSettings) -> Validation:
    """Predictions for held-back rollouts against what became of them.

    Args:
      rollouts: with `correct`.
      label: "correct" or "value": the reward that the head was trained on.
      last: labelled positions averaged for the final value.

    Raises:
      ValueError: the model has no head.
    """
    found = profiles(lm, rollouts, settings)
    assert lm.head is not None
    return Validation(validation_metrics(found, rollouts, last), mean_joints(found, rollouts, label, lm.head.grid))


def mean_joints(found: Sequence[Profile], rollouts: Sequence[Rollout], label: str, grid: Grid) -> MeanJoints | None:
    """See `MeanJoints`; None if no rollout has both a true length and a label.

    Args:
      found: the profile of each rollout.
    """
    used = [(p, r) for p, r in zip(found, rollouts, strict=True) if r.finished and not np.isnan(getattr(r, label))]
    if not used:
        return None
    lengths = [len(p.remaining) for p, _ in used]
    remaining = np.concatenate([np.arange(m, 0, -1) for m in lengths])
    rewards = np.repeat([getattr(r, label) for _, r in used], lengths)
    predicted = np.average(np.stack([p.mean_joint for p, _ in used]), axis=0, weights=lengths)
    return MeanJoints(predicted, empirical_joint(rewards, remaining, grid), len(remaining), len(used), len(rollouts) - len(used))


def validation_metrics(found: Sequence[Profile], rollouts: Sequence[Rollout], last: int) -> dict[str, float]:
    """Within-prompt AUC of the final value against `correct`, over prompts that have both outcomes, and the mean error of
    the remaining length in tokens, over finished rollouts (a truncated one has no true length; NaN if there are no others).

    This is the number the whole method stands on: a head that cannot tell good from bad within a prompt cannot select.
    """
    values = final_values(found, last)
    prompts, where = np.unique([r.prompt_index for r in rollouts], return_inverse=True)
    counts = np.bincount(where)
    slot = np.zeros(len(rollouts), int)
    for p in range(len(prompts)):
        slot[where == p] = np.arange(counts[p])
    score, outcome, mask = (np.zeros((len(prompts), counts.max()), kind) for kind in (np.float64, np.float64, bool))
    score[where, slot], outcome[where, slot], mask[where, slot] = values, [r.correct for r in rollouts], True
    auc, mixed = within_prompt_auc(score, outcome, mask)
    length = length_errors([p for p, r in zip(found, rollouts, strict=True) if r.finished])
    return {"eval/within_prompt_auc": auc, "eval/mixed_prompts": float(mixed), "eval/length_mae": length.mean_absolute_error}


def length_errors(found: Sequence[Profile]) -> LengthCalibration:
    """Calibration of the remaining length at all labelled positions of finished rollouts."""
    predicted = np.concatenate([np.empty(0), *(p.remaining for p in found)])
    return length_calibration(predicted, np.concatenate([np.empty(0), *(np.arange(len(p.remaining), 0, -1) for p in found)]))
