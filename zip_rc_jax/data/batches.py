"""Packed training batches through Grain: which positions are trained, on what, and in which order.

A rollout of `p` prompt and `m` generated tokens is fed without its last token (nothing follows it): input positions `0 .. p+m-2`.
The prefix ending at position `t` holds tokens `0..t`. Its joint is trained for `t` from `p-1` (the root: nothing generated yet,
`m` tokens remain) to `p+m-2` (one token remains): `m` labelled positions. The same positions predict the response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from zip_rc_jax.config import LABELS
from zip_rc_jax.data.records import Rollout
from zip_rc_jax.errors import UsageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """`B` packed rows of `S` tokens. All arrays are `[B, S]`; padding is 0 or False everywhere.

    Attributes:
      tokens: int32 input ids.
      segment_ids: int32, 1, 2, ... for the rollouts of a row; 0 = padding.
      positions: int32, position within the segment.
      labelled: bool, positions whose prefix has a trained joint.
      reward: float32 label of the rollout, in [0, 1]; the same at all its labelled positions.
      remaining: int32 tokens still to generate after the prefix ending here, end token included; 0 where not labelled.
      censored: bool, the rollout was cut off, so `remaining` is a lower bound; False where not labelled.
      targets: int32 next token of the same rollout.
      lm_weight: float32, 1 where `targets` is a response token, else 0.
      hidden: float32 `[B, S, d_model]`, final hidden states of a frozen body; None if the step runs the body itself.
      teacher: likeliest ids of the frozen policy, int32 `[B, S, k]`, and their log-probabilities, float32 `[B, S, k]`; of no meaning
        where not labelled. None if the step runs the policy itself, or has none.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    labelled: Any
    reward: Any
    remaining: Any
    censored: Any
    targets: Any
    lm_weight: Any
    hidden: Any = None
    teacher: Any = None


@dataclasses.dataclass(frozen=True)
class _Columns:
    """`n` rollouts as a few arrays: Python objects per token or per rollout would cost more than the training step.

    Attributes:
      tokens: int32 `[sum of p + m]`, all rollouts one after the other.
      start, prompt, end: int64 `[n]`, first token, prompt length `p`, and one past the last token.
      reward: float32 `[n]`.
      censored: bool `[n]`.
    """

    tokens: np.ndarray
    start: np.ndarray
    prompt: np.ndarray
    end: np.ndarray
    reward: np.ndarray
    censored: np.ndarray

    @classmethod
    def of(cls, rollouts: Iterable[Rollout], label: str) -> _Columns:
        """Raises `UsageError` for an unknown label, a rollout without it, an empty prompt or response, or no rollouts."""
        if label not in LABELS:
            raise UsageError(f"label={label!r}", f"it must be one of {', '.join(LABELS)}", "choose one of them")
        parts: list[np.ndarray] = []
        rows: list[tuple[int, int, float, bool]] = []
        for rollout in rollouts:
            parts += (rollout.prompt_token_ids, rollout.output_token_ids)
            rows.append((len(parts[-2]), len(parts[-1]), getattr(rollout, label), not rollout.finished))
        if not rows:
            raise UsageError("rollouts", "there are none to train on", "generate at least one rollout")
        prompt, output, reward, censored = (np.array(column) for column in zip(*rows, strict=True))
        _refuse(np.isnan(reward), f"have no {label!r} label", "run `zip-rc grade`" if label == "correct" else "run `zip-rc label`")
        _refuse((reward < 0) | (reward > 1), f"have a {label!r} label outside [0, 1]", "rescale the labels")
        _refuse((prompt < 1) | (output < 1), "have an empty prompt or response, so no prefix to train", "leave them out")
        end = np.cumsum(prompt + output)
        return cls(np.concatenate(parts), end - prompt - output, prompt, end, reward.astype(np.float32), censored.astype(bool))

    def labelled_number(self, at: np.ndarray) -> np.ndarray:
        """For indices `at` into `tokens`: the how many-th labelled position each is, counted over all rollouts; 0 where it is none."""
        before = np.cumsum(self.end - self.start - self.prompt) - (self.end - self.start - self.prompt)
        rollout = np.searchsorted(self.start, np.maximum(at, 0), side="right") - 1
        first = self.start[rollout] + self.prompt[rollout] - 1
        return np.where(at >= first, before[rollout] + at - first, 0)

    def fields(self, at: np.ndarray) -> dict[str, np.ndarray]:
        """The label fields of `TrainBatch` at indices `at` into `tokens` (any shape; -1 = padding, all zero)."""
        real = at >= 0
        at = np.where(real, at, 0)
        rollout = np.searchsorted(self.start, at, side="right") - 1
        labelled = real & (at >= self.start[rollout] + self.prompt[rollout] - 1)
        return {
            "tokens": np.where(real, self.tokens[at], 0),
            "labelled": labelled,
            "reward": np.where(labelled, self.reward[rollout], np.float32(0)),
            "remaining": np.where(labelled, self.end[rollout] - at - 1, 0).astype(np.int32),
            "censored": labelled & self.censored[rollout],
            "targets": np.where(real, self.tokens[at + 1], 0),  # the last token of a rollout is never an input
            "lm_weight": labelled.astype(np.float32),
        }


def _refuse(bad: np.ndarray, reason: str, fix: str) -> None:
    if bad.any():
        raise UsageError(f"rollouts {np.flatnonzero(bad)[:5].tolist()}", f"{bad.sum()} of {bad.size} {reason}", fix)


def example(rollout: Rollout, label: str) -> dict[str, np.ndarray]:
    """The fields of `TrainBatch` for one rollout alone, each `[p + m - 1]`. Raises `UsageError` as `train_batches`."""
    columns = _Columns.of([rollout], label)
    positions = np.arange(len(columns.tokens) - 1)
    return columns.fields(positions) | {"positions": positions.astype(np.int32), "segment_ids": np.ones(len(positions), np.int32)}


class _Spans:
    """What Grain shuffles and packs: for each rollout, the indices of its input positions, or of its labelled positions only."""

    def __init__(self, columns: _Columns, labelled_only: bool):
        self._start, self._end = columns.start + (columns.prompt - 1 if labelled_only else 0), columns.end

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"at": np.arange(self._start[index], self._end[index] - 1)}


def train_batches(
    source: Iterable[Rollout],
    *,
    label: str,
    batch_rows: int,
    row_tokens: int,
    seed: int,
    epochs: int | None = None,
    pack_batches: int = 1,
    features: np.ndarray | None = None,
    teacher: tuple[Any, Any] | None = None,
) -> grain.IterDataset:
    """A Grain dataset of `TrainBatch` with numpy arrays `[batch_rows, row_tokens]`.

    Rollouts are shuffled anew in every epoch (from `seed` alone) and packed first-fit into the rows of `pack_batches` batches, which
    end at the first rollout that fits into no row. `iter(...)` gives an iterator with `get_state` (a JSON-able dict) and `set_state`, after
    which it continues exactly. The tokens and labels are held in RAM, about 4 bytes a token.

    Args:
      source: rollouts; read once.
      label: "correct" or "value": the reward.
      epochs: passes over the rollouts; None repeats for ever. The last batch is padded with empty rows. A batch may hold the end
        of one epoch and the beginning of the next.
      pack_batches: batches that are packed together. If more than one, their rows are shuffled: first-fit fills the early ones with
        what is short.
      features: float32 `[N, d_model]`, hidden states at all `N` labelled positions, rollout after rollout. Rows are then packed with
        labelled positions only, and batches have `hidden`.
      teacher: `[N, k]` arrays for the same positions; batches then have `teacher`.

    Raises:
      UsageError: a rollout lacks the label, is empty or is longer than `row_tokens`; there are none; or the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}", "Grain shuffles with 32-bit seeds", "use a number from 0 to 4294967295")
    columns = _Columns.of(source, label)
    lengths = columns.end - columns.start - 1 if features is None else columns.end - columns.start - columns.prompt
    longest = int(np.argmax(lengths))
    needed = int(lengths[longest])
    if needed > row_tokens:
        raise UsageError(
            f"row_tokens={row_tokens}",
            f"rollout {longest} has {needed} input tokens, and rollouts are never truncated silently",
            f"set row_tokens to at least {needed}, or leave out the longer rollouts",
        )

    def batch(rows: dict[str, np.ndarray]) -> TrainBatch:
        rows = {name: np.pad(array, ((0, batch_rows - len(array)), (0, 0)), constant_values=pad[name]) for name, array in rows.items()}
        found = TrainBatch(**columns.fields(rows["at"]), segment_ids=rows["at_segment_ids"], positions=rows["at_positions"])
        if features is None and teacher is None:
            return found
        number = columns.labelled_number(rows["at"])
        hidden, top = (None if arrays is None else jax.tree.map(lambda x: x[number], arrays) for arrays in (features, teacher))
        return dataclasses.replace(found, hidden=hidden, teacher=top)

    pad = {"at": -1, "at_segment_ids": 0, "at_positions": 0}
    dataset = grain.MapDataset.source(_Spans(columns, features is not None)).shuffle(seed=seed).repeat(epochs)
    packed = FirstFitPackIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"at": row_tokens},
        padding_struct={"at": -1},
        num_packing_bins=batch_rows * pack_batches,
        seed=seed,
        shuffle_bins=pack_batches > 1,
    )
    # The packer emits the rows of its batches one by one, only the last batch of all with fewer than `batch_rows`.
    return packed.batch(batch_rows, drop_remainder=False).map(batch)


def fill_rate(batch: TrainBatch) -> float:
    """Fraction of the positions that hold a token."""
    return float(np.mean(np.asarray(batch.segment_ids) > 0))
