"""The token losses in as many words: all `[B, S, V]` probabilities at once.

What the chunked ones are compared with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def naive_losses(hidden, table, targets, teacher_hidden, teacher_table, kind, top_k):
    """(next-token loss, divergence), `[B, S]` each, for states `[B, S, d]` and tables of the
    sampleable ids `[V, d]`."""
    log_p = jax.nn.log_softmax(teacher_hidden @ teacher_table.T)
    log_q = jax.nn.log_softmax(hidden @ table.T)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    nll = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    if kind == "reverse":
        return nll, (q * (log_q - log_p)).sum(-1)
    if kind == "forward_topk":
        kept = p >= jnp.sort(p, axis=-1)[..., -top_k][..., None]
        p = jnp.where(kept, p, 0) / jnp.where(kept, p, 0).sum(-1, keepdims=True)
        log_p = jnp.log(jnp.where(kept, p, 1))
    return nll, (p * (log_p - log_q)).sum(-1)
