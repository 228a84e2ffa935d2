"""ZIP: reserved vocabulary logits as a head without extra cost (paper, section 3).

The unembedding that gives the next-token logits also gives, at the reserved ids, the logits of the
joint over the grid's cells. The reserved rows are their own parameter while training and are folded
into the unembedding table for decoding and export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError

PAD_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class HeadDefaults:
    """How to decode with a head where the caller does not say: on the scale of its task.

    Attributes:
      interval: decode steps between decisions, in tokens.
      window: joints averaged per prefix.
      max_tokens: most generated tokens per prefix.
    """

    interval: int
    window: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                reason = "it counts tokens from 1 to 2147483647"
                raise UsageError(f"{name}={value!r:.50} of a head's defaults", reason, "correct it")

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclasses.dataclass(frozen=True)
class ZipHead:
    """Where the joint lives in the vocabulary, and what it means. Hashable; stored with every
    checkpoint.

    Attributes:
      grid: reward x length grid.
      label: "correct" or "value": what the reward axis was trained on.
      first_id: first reserved vocabulary id; cell `(b, l)` is id `first_id + b * B_T + l`. The
        range may lie below `used_ids` where the tokenizer has placeholders that it never emits.
      used_ids: ids below this belong to the tokenizer; the rest is padding and is never sampled
        either.
      defaults: how to decode where the caller does not say. None in checkpoints from before 0.2,
        and in those of other tools: then the defaults of `DecodeConfig` hold. They are no part of
        the head's identity. Heads that differ here alone are equal, and their models have one
        digest.
    """

    grid: Grid
    label: str
    first_id: int
    used_ids: int
    defaults: HeadDefaults | None = dataclasses.field(default=None, compare=False)

    @property
    def last_id(self) -> int:
        """One past the last reserved id."""
        return self.first_id + self.grid.n_cells

    def check(self, vocab_size: int, unused: np.ndarray | None = None) -> None:
        """Checks the reserved range against a vocabulary of `vocab_size` rows.

        Args:
          unused: `[vocab_size]` bool, ids that the tokenizer never emits (`Tokenizer.unused_ids`);
            None checks the size alone.

        Raises:
          UsageError: the range holds ids that the tokenizer really uses, or leaves the vocabulary.
        """
        name = f"reserved range {self.first_id}..{self.last_id - 1}"
        if self.first_id < 0 or self.last_id > vocab_size:
            raise UsageError(
                name,
                f"the vocabulary ends at {vocab_size - 1}, so {self.grid.n_cells} cells do not fit",
                f"pad the vocabulary to {padded_vocab_size(max(self.first_id, 0), self.grid)} or "
                "use a smaller grid",
            )
        if unused is None:
            return
        used = [
            self.first_id + int(i) for i in np.flatnonzero(~unused[self.first_id : self.last_id])
        ]
        if used:
            free = reserve(unused, self.grid, self.used_ids)
            shown = ", ".join(map(str, used[:5])) + (", ..." if len(used) > 5 else "")
            fix = "pad the vocabulary" if free is None else f"start it at {free}"
            raise UsageError(name, f"the tokenizer really uses ids {shown} of it", fix)

    def sampleable(self, vocab_size: int) -> np.ndarray:
        """`[vocab_size]` bool: ids that the policy may emit (neither reserved nor padding)."""
        return (np.arange(vocab_size) < self.used_ids) & self.outside_cells(vocab_size)

    def outside_cells(self, vocab_size: int) -> np.ndarray:
        """`[vocab_size]` bool: every id but the reserved ones, so padding too."""
        ids = np.arange(vocab_size)
        return (ids < self.first_id) | (ids >= self.last_id)

    def identity(self) -> dict:
        """Where the joint lies and what it means, without `defaults`."""
        ids = {"first_id": self.first_id, "used_ids": self.used_ids}
        return {"grid": self.grid.to_dict(), "label": self.label, **ids}

    def to_dict(self) -> dict:
        return self.identity() | ({"defaults": self.defaults.to_dict()} if self.defaults else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ZipHead:
        if not isinstance(data, Mapping):
            raise TypeError(f"a {type(data).__name__} stands where a mapping is expected")
        defaults = data.get("defaults")
        return cls(
            Grid.from_dict(data["grid"]),
            data["label"],
            int(data["first_id"]),
            int(data["used_ids"]),
            None if defaults is None else HeadDefaults(**defaults),
        )


def reserve(unused: np.ndarray, grid: Grid, used_ids: int = 0) -> int | None:
    """Where to put the cells of `grid`: the first id of the first run of unused ids that holds them
    all.

    Args:
      unused: `[V]` bool, ids that the tokenizer never emits.
      used_ids: ids below this belong to the tokenizer; the rows from there on are tried before its
        placeholders.

    Returns:
      None if no run is long enough; the vocabulary must then be padded.
    """
    beyond = np.arange(len(unused)) >= used_ids
    for free in (unused & beyond, unused):
        # Edges of the runs: +1 where one starts, -1 one past its end.
        edges = np.diff(free.astype(np.int8), prepend=0, append=0)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        long_enough = starts[ends - starts >= grid.n_cells]
        if long_enough.size:
            return int(long_enough[0])
    return None


def padded_vocab_size(used_ids: int, grid: Grid) -> int:
    """Smallest multiple of 128 (which sharding wants anyway) that holds the tokenizer's ids and the
    reserved range."""
    return -(-(used_ids + grid.n_cells) // PAD_MULTIPLE) * PAD_MULTIPLE


def fit_vocabulary(table: jax.Array, vocab_size: int) -> jax.Array:
    """Appends zero rows to a `[V, d_model]` table until it has `vocab_size` rows.

    Raises ValueError if it is larger.
    """
    if table.shape[0] > vocab_size:
        raise ValueError(f"the table has {table.shape[0]} rows, more than {vocab_size}")
    return jnp.pad(table, ((0, vocab_size - table.shape[0]), (0, 0)))


def fold(table: jax.Array, rows: jax.Array, head: ZipHead) -> jax.Array:
    """Writes the reserved rows `[cells, d_model]` into the unembedding `[V, d_model]`: one matmul
    then gives both."""
    head.check(table.shape[0])
    return table.at[head.first_id : head.last_id].set(rows.astype(table.dtype))


def policy_logits(logits: jax.Array, head: ZipHead) -> jax.Array:
    """Masks reserved and padding ids of `[..., V]` logits with -inf.

    Softmax of the result is the policy.
    """
    return jnp.where(jnp.asarray(head.sampleable(logits.shape[-1])), logits, -jnp.inf)


def joint_log_probs(logits: jax.Array, head: ZipHead) -> jax.Array:
    """Log of the joint, `[..., B_V, B_T]` float32, from all logits `[..., V]`."""
    return cell_log_probs(logits[..., head.first_id : head.last_id], head.grid)


def cell_log_probs(cell_logits: jax.Array, grid: Grid) -> jax.Array:
    """Log of the joint, `[..., B_V, B_T]` float32, from the reserved logits `[..., cells]`
    alone."""
    log_probs = jax.nn.log_softmax(cell_logits.astype(jnp.float32), axis=-1)
    return log_probs.reshape(*cell_logits.shape[:-1], grid.n_reward, grid.n_length)
