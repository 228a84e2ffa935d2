"""A transformer whose last hidden state gives one score for a whole conversation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.models.transformer import param_shapes
from zip_rc_jax.runtime.sharding import Layout, single_device


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """A sequence-classification model of `transformers` with one label.

    Attributes:
      config: sizes of the body. It has no unembedding, so `tied` is True whatever the file says.
      tokenizer: its own, with its own chat template.
      params: `{"body": transformer parameters, "score": [d_model]}`.
      pad_id: id that counts as padding at the end of a sequence (`pad_token_id` of config.json);
        None if there is none.
      layout: mesh and sharding rules of its forwards.
      info: where it came from (JSON-able).
    """

    config: ModelConfig
    tokenizer: Tokenizer
    params: dict[str, Any]
    pad_id: int | None = None
    layout: Layout = dataclasses.field(default_factory=single_device)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


def up_to_pooled(ids: Sequence[int], pad_id: int | None) -> list[int]:
    """`ids` up to the token whose hidden state is scored: the last one that is no padding.

    This is the rule of `GenericForSequenceClassification` in transformers. A template may end with
    the padding token; the token before it is then scored. A sequence of padding alone is scored at
    its first token. Attention is causal, so what follows the scored token changes nothing.
    """
    last = next((i for i in reversed(range(len(ids))) if ids[i] != pad_id), 0)
    return list(ids[: last + 1])


def forward_parameters(config: ModelConfig) -> int:
    """How many parameters one token passes through: those of all layers and of the last norm.

    Embedding and unembedding are left out. A token reads one row of the embedding, and a policy's
    forward over a known text needs no unembedding.
    """
    shapes = {
        name: leaves
        for name, leaves in param_shapes(config).items()
        if name not in ("embed", "unembed")
    }
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
