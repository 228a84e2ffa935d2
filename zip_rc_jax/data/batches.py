"""Packed training batches through Grain: which positions are trained, on what, and in which order.

A rollout of `p` prompt and `m` generated tokens is fed without its last token (nothing follows it):
input positions `0 .. p+m-2`. The prefix ending at position `t` holds tokens `0..t`. Its joint is
trained for `t` from `p-1` (the root: nothing generated yet, `m` tokens remain) to `p+m-2` (one
token remains): `m` labelled positions. The same positions predict the response tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from zip_rc_jax.config import LABELS
from zip_rc_jax.data.rollouts import Rollout, read_items, summary_of
from zip_rc_jax.data.summary import RolloutSummary
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

if TYPE_CHECKING:
    import grain


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
      remaining: int32 tokens still to generate after the prefix ending here, end token included; 0
        where not labelled.
      censored: bool, the rollout was cut off: `remaining` is the least that it can be, one more
        than were seen, as none of these ended it. False where not labelled.
      targets: int32 next token of the same rollout.
      hidden: float32 `[B, S, d_model]`, final hidden states of a frozen body; None if the step runs
        the body itself.
      teacher: likeliest ids of the frozen policy, int32 `[B, S, k]`, and their log-probabilities,
        float32 `[B, S, k]`; of no meaning where not labelled. None if the step runs the policy
        itself, or has none.
      weight: float32 `[B, S]`, of each position in the losses of the step; they sum to 1. None
        weighs all labelled positions alike.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    labelled: Any
    reward: Any
    remaining: Any
    censored: Any
    targets: Any
    hidden: Any = None
    teacher: Any = None
    weight: Any = None


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Turns the plan of a batch into its arrays.

    Attributes:
      source: the rollouts, for their tokens.
      summary: everything else about them.
      reward: float32 `[n]`.
      labelled_only: rows hold the labelled positions alone.
      censors: lengths of unfinished rollouts are censored; False takes them as ended.
      by_rollout: a position counts as one of its rollout, and all rollouts of a batch alike.
    """

    source: Sequence[Rollout]
    summary: RolloutSummary
    reward: np.ndarray
    labelled_only: bool = False
    censors: bool = True
    by_rollout: bool = False

    @classmethod
    def of(
        cls,
        source: Sequence[Rollout],
        label: str,
        labelled_only: bool = False,
        unfinished_length: str = "censored",
        mean_over: str = "positions",
    ) -> _Fields:
        """Raises `UsageError` for an unknown label, a rollout without it, an empty prompt or
        response, or no rollouts."""
        if label not in LABELS:
            raise UsageError(
                f"label={label!r}", f"it must be one of {', '.join(LABELS)}", "choose one of them"
            )
        if not len(source):
            raise UsageError(
                "rollouts", "there are none to train on", "generate at least one rollout"
            )
        summary = summary_of(source)
        reward: np.ndarray = getattr(summary, label)
        _refuse(
            np.isnan(reward),
            f"have no {label!r} label",
            f"set it, or run `zip-rc {'grade' if label == 'correct' else 'label'}`",
        )
        _refuse(
            (reward < 0) | (reward > 1),
            f"have a {label!r} label outside [0, 1]",
            "rescale the labels",
        )
        empty = (summary.prompt < 1) | (summary.output < 1)
        _refuse(empty, "have an empty prompt or response, so no prefix to train", "leave them out")
        censors, by_rollout = unfinished_length == "censored", mean_over == "rollouts"
        return cls(source, summary, reward, labelled_only, censors, by_rollout)

    def lengths(self) -> np.ndarray:
        """int64 `[n]`, positions that each rollout takes in a row."""
        return self.summary.output + (0 if self.labelled_only else self.summary.prompt - 1)

    def arrays(
        self, rows: Sequence[np.ndarray], shape: tuple[int, int], local_rows: Sequence[bool]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The label fields of `TrainBatch`, and int64 `[B, S]`, the how many-th labelled position
        each is, over all rollouts (0 at others).

        Args:
          rows: numbers of the rollouts of each row.
          shape: `(B, S)`; `B` may be more than there are rows.
          local_rows: for each row, whether its tokens are wanted; otherwise they are 0, and its
            rollouts are not read.
        """
        s = self.summary
        # of what every slot holds
        rollout, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        segment, tokens, targets = (np.zeros(shape, np.int32) for _ in range(3))
        wanted = [
            int(number)
            for row, is_local in zip(rows, local_rows, strict=False)
            if is_local
            for number in row
        ]
        read = iter(read_items(self.source, wanted))
        lengths = self.lengths()
        for row, numbers in enumerate(rows):
            end = 0
            for count, number in enumerate(numbers, 1):
                first = int(s.prompt[number]) - 1 if self.labelled_only else 0
                span = slice(end, end := end + int(lengths[number]))
                rollout[row, span], segment[row, span] = number, count
                position[row, span] = np.arange(span.stop - span.start)
                if local_rows[row]:
                    one = next(read)
                    ids = np.concatenate([one.prompt_token_ids, one.output_token_ids])[first:]
                    tokens[row, span], targets[row, span] = ids[:-1], ids[1:]
        prompt, output = s.prompt[rollout], s.output[rollout]
        # response tokens in the prefix that ends here
        generated = position if self.labelled_only else position - prompt + 1
        labelled = (segment > 0) & (generated >= 0)
        cut = ~s.finished[rollout] & self.censors
        number = np.where(labelled, (np.cumsum(s.output) - s.output)[rollout] + generated, 0)
        found = {
            "tokens": tokens,
            "segment_ids": segment,
            "positions": position.astype(np.int32),
            "labelled": labelled,
            "reward": np.where(labelled, self.reward[rollout], np.float32(0)),
            "remaining": np.where(labelled, output - generated + cut, 0).astype(np.int32),
            "censored": labelled & cut,
            "targets": targets,
        }
        if self.by_rollout:
            count = max(1, sum(len(numbers) for numbers in rows))
            found["weight"] = (labelled / (count * np.maximum(output, 1))).astype(np.float32)
        return found, number


def _refuse(bad: np.ndarray, reason: str, fix: str) -> None:
    if bad.any():
        raise UsageError(
            f"rollouts {np.flatnonzero(bad)[:5].tolist()}",
            f"{bad.sum()} of {bad.size} {reason}",
            fix,
        )


def example(
    rollout: Rollout, label: str, unfinished_length: str = "censored"
) -> dict[str, np.ndarray]:
    """The fields of `TrainBatch` for one rollout alone, each `[p + m - 1]`.

    Raises `UsageError` as `train_batches`.
    """
    fields = _Fields.of([rollout], label, unfinished_length=unfinished_length)
    arrays, _ = fields.arrays([np.array([0])], (1, int(fields.lengths()[0])), [True])
    return {name: array[0] for name, array in arrays.items()}


def train_batches(
    source: Sequence[Rollout],
    *,
    label: str,
    batch_rows: int,
    row_tokens: int,
    seed: int,
    epochs: int | None = None,
    pack_batches: int = 1,
    features: np.ndarray | None = None,
    teacher: tuple[Any, Any] | None = None,
    local_rows: Sequence[bool] | None = None,
    unfinished_length: str = "censored",
    mean_over: str = "positions",
) -> grain.IterDataset:
    """A Grain dataset of `TrainBatch` with numpy arrays `[batch_rows, row_tokens]`.

    Every epoch shuffles the rollouts (from `seed` alone) and packs them best-fit into the rows of
    `pack_batches` batches at a time. `iter(...)` gives an iterator with `get_state` (a JSON-able
    dict) and `set_state`, after which it continues exactly.

    Only the summary of the rollouts is held in memory. Those of a batch are read when it is asked
    for: `source` may be a `RolloutSource`.

    Args:
      label: "correct" or "value": the reward.
      epochs: passes over the rollouts; None repeats for ever. The last batch is padded with empty
        rows. A batch may hold the end of one epoch and the beginning of the next.
      pack_batches: batches that are packed together, and whose rows are shuffled.
      features: float32 `[N, d_model]`, hidden states at all `N` labelled positions, rollout after
        rollout. Rows are then packed with labelled positions only, and batches have `hidden`.
      teacher: `[N, k]` arrays for the same positions; batches then have `teacher`.
      local_rows: `[batch_rows]`, the rows that this process feeds; None = all. Rollouts of other
        rows are not read. These rows hold what is planned (labels, positions, segments), and their
        `tokens` and `targets` are 0.
      unfinished_length, mean_over: see `TrainConfig`.

    Raises:
      UsageError: a rollout lacks the label, is empty or is longer than `row_tokens`; there are
        none; or the seed is out of range.
    """
    with optional_import():
        from zip_rc_jax.data.packing import PackedBatches
    if not 0 <= seed < 2**32:
        raise UsageError(
            f"seed={seed}", "Grain shuffles with 32-bit seeds", "use a number from 0 to 4294967295"
        )
    fields = _Fields.of(source, label, features is not None, unfinished_length, mean_over)
    lengths = fields.lengths()
    _check_fit(lengths, row_tokens)
    shape = batch_rows, row_tokens
    read_here = [True] * batch_rows if local_rows is None else local_rows

    def batch(rows: list[np.ndarray]) -> TrainBatch:
        arrays, number = fields.arrays(rows, shape, read_here)
        hidden, top = (
            None if kept is None else jax.tree.map(lambda x: x[number], kept)
            for kept in (features, teacher)
        )
        return TrainBatch(**arrays, hidden=hidden, teacher=top)

    return PackedBatches(
        lengths,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        pack_batches=pack_batches,
        seed=seed,
        epochs=epochs,
    ).map(batch)


def _check_fit(lengths: np.ndarray, row_tokens: int) -> None:
    longest = int(np.argmax(lengths))
    needed = int(lengths[longest])
    if needed > row_tokens:
        raise UsageError(
            f"row_tokens={row_tokens}",
            f"rollout {longest} has {needed} input tokens, and rollouts are never truncated "
            "silently",
            f"set row_tokens to at least {needed}, or leave out the longer rollouts",
        )


def steps_of_epochs(
    source: Sequence[Rollout],
    epochs: float,
    *,
    label: str,
    labelled_only: bool,
    batch_rows: int,
    row_tokens: int,
    pack_batches: int,
    seed: int,
) -> int:
    """How many batches of `train_batches` with these arguments hold `epochs` passes over the
    rollouts.

    The plan of the packing is walked through, so rows that are not full count as they are. A window
    of packed batches counts in proportion where the passes end inside it.

    Raises:
      UsageError: see `train_batches`.
    """
    with optional_import():
        from zip_rc_jax.data.packing import PackedBatches
    lengths = _Fields.of(source, label, labelled_only=labelled_only).lengths()
    _check_fit(lengths, row_tokens)
    packed = PackedBatches(
        lengths,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        pack_batches=pack_batches,
        seed=seed,
        epochs=None,
    )
    wanted, start, steps = epochs * len(lengths), 0, 0
    while True:
        batches, following = packed.window(start)
        if following >= wanted:
            part = (wanted - start) / (following - start)
            return max(1, steps + math.ceil(part * len(batches) - 1e-9))
        start, steps = following, steps + len(batches)


def advice(
    source: Sequence[Rollout],
    *,
    steps: int,
    labelled_only: bool,
    batch_rows: int,
    row_tokens: int,
    pack_batches: int,
    seed: int,
) -> list[str]:
    """What to know before `steps` steps on `train_batches` with these arguments: passes over the
    data, and see `packing_advice`."""
    with optional_import():
        from zip_rc_jax.data.packing import packing_advice
    summary = summary_of(source)
    lengths = summary.output + (0 if labelled_only else summary.prompt - 1)
    passes = steps * batch_rows * row_tokens / lengths.sum()
    packing = packing_advice(
        lengths, batch_rows=batch_rows, row_tokens=row_tokens, pack_batches=pack_batches, seed=seed
    )
    return [
        f"{steps} steps are at most {passes:.2g} passes over {len(source):,} rollouts",
        *([packing] if packing else []),
    ]


def fill_rate(batch: TrainBatch) -> float:
    """Fraction of the positions that hold a token."""
    return float(np.mean(np.asarray(batch.segment_ids) > 0))
