"""How sure the policy was at every token of finished samples: what DeepConf and self-certainty
need.

Both read all logits of a position, which no stored sample holds. So one forward over the sample
makes them, as long as that of its labels. A decode that kept them would not need it, so baselines
are not charged for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.config.checks import counts
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.rollout_predictions import rollout_batches
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import logits, unembedding
from zip_rc_jax.predictions import ScoringConfig, logit_chunks
from zip_rc_jax.runtime.distributed import gather

TOP_K = 20  # as in DeepConf's code


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Along one sample of `m` generated tokens, end token included.

    Attributes:
      confidence: float32 `[m]`, minus the mean log-probability of the k likeliest ids at each
        token. Source: the token confidence of DeepConf (arXiv 2508.15260). Large where one id
        stands out.
      certainty: float32 `[m]`, `-1/V sum_v log(V p_v)` over the V ids that the policy can emit.
        Source: self-certainty (arXiv 2502.18581).
    """

    confidence: np.ndarray
    certainty: np.ndarray

    @property
    def self_certainty(self) -> float:
        """Mean certainty over the tokens."""
        return float(self.certainty.mean(dtype=np.float64))


def token_statistics(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    settings: ScoringConfig,
    *,
    top_k: int = TOP_K,
    title: str = "",
) -> list[TokenStatistics]:
    """Statistics of every generated token of every rollout, in the given order.

    Probabilities are the policy's at temperature 1, before any filter of the sampler. Reserved ids
    and padding have none. No array of all logits of a batch exists: positions are cut into chunks.

    Args:
      lm: with or without a head.
      top_k: ids whose log-probabilities a token's confidence averages; all ids if there are fewer.
      title: of a progress bar; empty for none.

    Raises:
      UsageError: a top_k that is no whole number from 1 on.
    """
    counts("top_k", top_k)
    size = lm.config.vocab_size
    allowed: np.ndarray = (
        np.arange(size) < lm.tokenizer.size if lm.head is None else lm.head.sampleable(size)
    )
    kept = min(int(top_k), int(allowed.sum()))
    table = unembedding(lm.config, lm.params["body"])
    result: list[TokenStatistics | None] = [None] * len(rollouts)
    for hidden, spans in rollout_batches(lm, rollouts, settings, title):
        chunks = logit_chunks(lm, *hidden.shape[:2])
        found = _statistics(lm.config, chunks, kept, table, jnp.asarray(allowed), hidden)
        confidence, certainty = gather(found)
        for lane, (i, span) in enumerate(spans):
            result[i] = TokenStatistics(confidence[lane, span].copy(), certainty[lane, span].copy())
    return [s for s in result if s is not None]


@functools.partial(jax.jit, static_argnames=("model", "chunks", "top_k"))
def _statistics(
    model: ModelConfig,
    chunks: int,
    top_k: int,
    table: jax.Array,
    allowed: jax.Array,
    hidden: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Confidence and certainty of the token after every position, float32 `[rows, width]` each.

    Args:
      table: `[V, d]`, the unembedding.
      allowed: `[V]` bool, ids that the policy can emit.
      hidden: `[rows, width, d]`.
    """
    count = jnp.sum(allowed)

    def part(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = logits(model, hidden, table).astype(jnp.float32)
        masked = jnp.where(allowed, found, -jnp.inf)
        total = jax.nn.logsumexp(masked, axis=-1)
        confidence = total - jax.lax.top_k(masked, top_k)[0].mean(axis=-1)
        # Differences from the log-partition are summed, which are small where logits are not.
        gaps = jnp.where(allowed, total[..., None] - found, 0)
        return confidence, gaps.sum(axis=-1) / count - jnp.log(count.astype(jnp.float32))

    rows, width, size = hidden.shape
    # Rows stay on their devices: each is cut along its length.
    cut = jnp.moveaxis(hidden.reshape(rows, chunks, -1, size), 1, 0)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, width), jax.lax.map(part, cut)
    )
