"""How far the trained models moved from the starting policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation import metrics
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.transformer import forward_packed, unembedding
from zip_rc_jax.predictions import padded_width
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.training.loss import (
    FullTeacher,
    PolicyLoss,
    VocabChunking,
    max_logit_difference,
    policy_loss,
)


def drift_metrics(
    start: LanguageModel, trained: LanguageModel, rollouts: Sequence[Rollout], batch_tokens: int
) -> dict[str, float]:
    """KL(start || trained) per response token on samples of the starting policy, and the largest
    difference of a next-token logit.

    Args:
      batch_tokens: see `LabelConfig`.
    """
    assert trained.head is not None
    start = start.with_head(trained.head.grid, trained.head.label, trained.head.first_id)
    width = padded_width(
        max(len(r.prompt_token_ids) + len(r.output_token_ids) - 1 for r in rollouts)
    )
    sampleable = trained.head.sampleable(trained.config.vocab_size)
    vocabulary = VocabChunking(trained.config, trained.layout, chunk=min(2048, batch_tokens))
    divergence = PolicyLoss(vocabulary, "forward", kl_weight=1, nll_weight=0)

    @jax.jit
    def compare(a: Any, b: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        ones = jnp.ones_like(tokens)

        def forward(body: Any) -> tuple[jax.Array, jax.Array]:
            hidden = forward_packed(
                trained.config, body, tokens, positions, ones, layout=trained.layout
            )
            return hidden, unembedding(trained.config, body)

        (ha, ta), (hb, tb) = forward(a), forward(b)
        kl, _ = policy_loss(
            divergence, hb, tb, tokens, mask.astype(jnp.float32), sampleable, FullTeacher(ha, ta)
        )
        return kl, max_logit_difference(
            vocabulary, FullTeacher(ha, ta), FullTeacher(hb, tb), mask, sampleable
        )

    total, count, largest = 0.0, 0, 0.0
    rows = trained.layout.padded(max(1, batch_tokens // width), "batch")
    with progress("drift", len(rollouts)) as bar:
        for begin in range(0, len(rollouts), rows):
            batch = rollouts[begin : begin + rows]
            tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
            for lane, r in enumerate(batch):
                ids = np.concatenate([r.prompt_token_ids, r.output_token_ids])[:-1]
                tokens[lane, : len(ids)] = ids
                mask[lane, len(r.prompt_token_ids) - 1 : len(ids)] = True
            kl, gap = compare(
                start.params["body"], trained.params["body"], jnp.asarray(tokens), jnp.asarray(mask)
            )
            total, count, largest = (
                total + float(kl),
                count + int(mask.sum()),
                max(largest, float(gap)),
            )
            bar(begin + len(batch), None)
    return {"kl_start_trained_per_token": total / count, "largest_logit_difference": largest}


def drift(
    start: LanguageModel,
    lm: LanguageModel,
    lite: LanguageModel | None,
    rollouts: Sequence[Rollout],
    change: np.ndarray,
    config: PipelineConfig,
) -> dict[str, float]:
    """KL of the full (and Lite) model from the starting policy, and how the accuracy of plain
    sampling changed.

    Args:
      change: `[P]`, of every prompt.
    """
    settings, tokens = config.evaluate, config.label.batch_tokens
    interval = metrics.paired_bootstrap(change, settings.bootstrap, settings.seed)
    drift = {f"full/{k}": v for k, v in drift_metrics(start, lm, rollouts, tokens).items()}
    drift |= {
        f"full/sampling_accuracy_change/{k}": v
        for k, v in zip(("mean", "low", "high"), interval, strict=True)
    }
    return drift | (
        {}
        if lite is None
        else {f"lite/{k}": v for k, v in drift_metrics(start, lite, rollouts, tokens).items()}
    )
