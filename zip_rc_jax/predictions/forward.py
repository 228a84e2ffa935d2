"""One forward over whole sequences, shared with training, labelling and evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig, TrainConfig
from zip_rc_jax.head import ZipHead, cell_log_probs
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, logits
from zip_rc_jax.runtime.progress import progress as progress_bar
from zip_rc_jax.runtime.sharding import Layout


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How a model goes over whole sequences, without gradients. Hashable.

    Attributes:
      batch_tokens: most tokens of a batch, padding included. Where one sequence (or one on each
        device) has more, it is that.
      dtype: what is computed in; empty for the dtype of the parameters.
      attention: see `TrainConfig`.
    """

    batch_tokens: int
    dtype: str = ""
    attention: str = "auto"

    @classmethod
    def of(cls, train: TrainConfig) -> ScoringConfig:
        """As a training step computes, and as many tokens at once."""
        return cls(train.batch_rows * train.row_tokens, train.compute_dtype, train.attention)


class HasBody(Protocol):
    """A transformer with its parameters: a `LanguageModel` or a `RewardModel`."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def layout(self) -> Layout: ...


class HiddenBatch(NamedTuple):
    """Final hidden states of some sequences, one in each row.

    Attributes:
      members: numbers of the sequences in the first rows; rows after them are padding.
      tokens: int32 `[rows, width]`, 0 where there is no token.
      hidden: `[rows, width, d_model]`, on the devices.
    """

    members: list[int]
    tokens: np.ndarray
    hidden: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "layout", "settings"))
def _hidden(
    model: ModelConfig,
    layout: Layout,
    settings: ScoringConfig,
    body: dict[str, Any],
    tokens: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    dtype = jnp.dtype(settings.dtype) if settings.dtype else None
    segments = valid.astype(jnp.int32)
    return forward_packed(
        model,
        body,
        tokens,
        positions,
        segments,
        layout=layout,
        dtype=dtype,
        attention=settings.attention,
    )


@functools.partial(jax.jit, static_argnames=("model", "head"))
def _joints(
    model: ModelConfig,
    head: ZipHead,
    rows: jax.Array,
    hidden: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    joint = jnp.exp(cell_log_probs(logits(model, hidden, rows), head.grid))
    return head.grid.expected_reward(joint), head.grid.expected_length(joint), joint


def require_head(lm: LanguageModel) -> ZipHead:
    if lm.head is None:
        raise ValueError("the model has no ZIP head")
    return lm.head


def joints_of(lm: LanguageModel, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the head reads off final hidden states `[rows, width, d_model]`.

    Returns:
      expected reward `[rows, width]`, expected remaining tokens `[rows, width]`, and the joint
      `[rows, width, B_V, B_T]`, all float32.

    Raises:
      ValueError: the model has no head.
    """
    return _joints(lm.config, require_head(lm), lm.params["zip_rows"], hidden)


def padded_width(tokens: int) -> int:
    """The width of a batch whose longest sequence has `tokens`.

    Multiples of 32, then at most an eighth more than needed, so that few shapes are compiled.
    """
    step = max(32, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def hidden_batches(
    lm: HasBody,
    lengths: np.ndarray,
    read: Callable[[list[int]], Sequence[np.ndarray]],
    settings: ScoringConfig,
    title: str = "",
    *,
    few_shapes: bool = False,
) -> Iterator[HiddenBatch]:
    """Final hidden states of whole sequences, in batches over all devices of `lm.layout`.

    The longest sequences come first, those of like length together, so that little is padding.

    Args:
      lengths: int `[N]`, tokens of every sequence.
      read: the ids of the sequences with these numbers. It is called once for each batch.
      title: of a progress bar; empty for none.
      few_shapes: a batch that is not full has a power of two of rows on each device. Calls with
        other numbers of sequences then find compiled programs.
    """
    ways = lm.layout.ways("batch")
    order = np.argsort(-lengths, kind="stable")
    with progress_bar(title, len(order)) if title else contextlib.nullcontext() as bar:
        start = 0
        while start < len(order):
            # Shape: as wide as the longest sequence that is left, and as many rows as fit.
            width = padded_width(int(lengths[order[start]]))
            most = max(1, settings.batch_tokens // width // ways) * ways
            if few_shapes:
                each = -(-(len(order) - start) // ways)
                rows = min(most, (1 << (each - 1).bit_length()) * ways)
            else:
                rows = min(most, lm.layout.padded(len(order), "batch"))
            # The next sequences, one in a row; the rest is padding.
            members = [int(i) for i in order[start : start + rows]]
            tokens = np.zeros((rows, width), np.int32)
            for lane, ids in enumerate(read(members)):
                tokens[lane, : len(ids)] = ids
            used = np.append(lengths[members], [0] * (rows - len(members)))
            valid = np.arange(width) < used[:, None]
            body = lm.params["body"]
            hidden = _hidden(lm.config, lm.layout, settings, body, tokens, valid)
            yield HiddenBatch(members, tokens, hidden)
            start += len(members)
            if bar is not None:
                bar(start, None)
