"""What planning and checking need to know of rollouts, in a file of its own.

The tokens are then read only where they are used."""

from __future__ import annotations

import array
import dataclasses
import pathlib
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import in_short

if TYPE_CHECKING:
    from zip_rc_jax.data.rollouts import Rollout


# of the columns below
_KINDS = (np.int64, np.int64, np.int64, np.int64, np.int64, np.bool_, np.float32, np.float32)


@dataclasses.dataclass(frozen=True)
class RolloutSummary:
    """What is known of `n` rollouts without their tokens and texts: a few bytes each, so every
    process may hold it of all.

    Attributes:
      prompt, output: int64 `[n]`, tokens of the prompt and of the response.
      prompt_index: int64 `[n]`.
      prompt_hash: int64 `[n]`, 32 bits of the prompt's tokens: equal prompts have equal ones,
        whatever their index.
      largest_id: int64 `[n]`, largest token id; -1 without any token.
      finished: bool `[n]`.
      correct, value: float32 `[n]`.
    """

    prompt: np.ndarray
    output: np.ndarray
    prompt_index: np.ndarray
    prompt_hash: np.ndarray
    largest_id: np.ndarray
    finished: np.ndarray
    correct: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> RolloutSummary:
        """Reads each of them once.

        `records.summary_of` is cheaper where the summary is known already.
        """
        rows = SummaryRows()
        for rollout in rollouts:
            rows.add(rollout)
        return rows.summary()

    def __len__(self) -> int:
        return len(self.prompt)

    def select(self, numbers: np.ndarray) -> RolloutSummary:
        """The summary of some of the rollouts."""
        return RolloutSummary(**{name: column[numbers] for name, column in vars(self).items()})


def prompt_hash(r: Rollout) -> int:
    """32 bits of the tokens of a prompt."""
    return zlib.crc32(r.prompt_token_ids.astype("<i4").tobytes())


class SummaryRows:
    """A summary that grows with every rollout."""

    def __init__(self) -> None:
        self._rows = array.array("d")  # holds every number below exactly

    def add(self, r: Rollout) -> Rollout:
        """Returns it again."""
        largest = max(int(ids.max(initial=-1)) for ids in (r.prompt_token_ids, r.output_token_ids))
        row = (
            len(r.prompt_token_ids),
            len(r.output_token_ids),
            r.prompt_index,
            prompt_hash(r),
            largest,
            r.finished,
            r.correct,
            r.value,
        )
        self._rows.extend(row)
        return r

    def summary(self) -> RolloutSummary:
        columns = np.array(self._rows).reshape(-1, len(_KINDS)).T
        return RolloutSummary(
            *(column.astype(kind) for column, kind in zip(columns, _KINDS, strict=True))
        )


def write_summary(path: pathlib.Path, summary: RolloutSummary) -> None:
    """Writes a summary as NumPy's `.npz`."""
    np.savez(path, **vars(summary))


def read_summary(path: pathlib.Path, count: int) -> RolloutSummary | None:
    """What `write_summary` wrote; None if that was an earlier version's, which had no
    `prompt_hash`.

    Raises:
      UsageError: it is damaged or not of `count` rollouts.
    """
    kinds = {
        field.name: kind
        for field, kind in zip(dataclasses.fields(RolloutSummary), _KINDS, strict=True)
    }
    try:
        with np.load(path) as columns:  # the CRC of a column is checked as it is read
            if {*columns.files, "prompt_hash"} == {*kinds} > {*columns.files}:
                return None
            summary = RolloutSummary(**columns)
    # a damaged archive or header makes zipfile and NumPy raise ten kinds
    except Exception as error:
        raise _foreign(path, f"it cannot be read ({in_short(error)})") from error
    if any(column.shape != (count,) for column in vars(summary).values()):
        raise _foreign(path, f"it does not describe {count} rollouts, as the shards beside it hold")
    if wrong := [name for name, column in vars(summary).items() if column.dtype != kinds[name]]:
        raise _foreign(path, f"its columns {', '.join(wrong)} are of other types")
    return summary


def _foreign(path: pathlib.Path, reason: str) -> UsageError:
    return UsageError(f"file {path}", reason, "delete it, and it is read from the shards instead")
