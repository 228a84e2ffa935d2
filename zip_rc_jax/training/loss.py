"""The training losses, per position (paper, section 3; recipe in the authors' code)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.transformer import logits


def joint_loss(log_joint: jax.Array, reward: jax.Array, remaining: jax.Array, censored: jax.Array, grid: Grid) -> jax.Array:
    """Cross-entropy of the joint with the observed (reward, remaining length).

    A truncated rollout has no true length, only a lower bound: its loss is the survival `-log sum_{l >= l_observed} p(b, l)`.

    Args:
      log_joint: `[N, B_V, B_T]` float32.
      reward: `[N]` in [0, 1].
      remaining: `[N]` tokens still to generate (observed so far where censored).
      censored: `[N]` bool.

    Returns:
      `[N]` float32.
    """
    reward_bin = jnp.sum(reward[:, None] >= jnp.asarray(grid.reward_edges, jnp.float32), axis=1)
    length_bin = jnp.sum(remaining[:, None] >= jnp.asarray(grid.length_edges[1:-1], jnp.int32), axis=1)
    at_reward = jnp.take_along_axis(log_joint, reward_bin[:, None, None], axis=1)[:, 0]
    bins = jnp.arange(grid.n_length)
    possible = jnp.where(censored[:, None], bins >= length_bin[:, None], bins == length_bin[:, None])
    return -jax.nn.logsumexp(jnp.where(possible, at_reward, -jnp.inf), axis=1)


class TokenLosses(NamedTuple):
    """`nll [N]`: -log p(next token). `kl [N]`: divergence from the teacher (0 without one). Both over ids the policy may emit."""

    nll: jax.Array
    kl: jax.Array


def token_losses(
    model: ModelConfig,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    sampleable: np.ndarray,
    *,
    teacher_hidden: jax.Array | None,
    teacher_table: jax.Array | None,
    kl_kind: str,
    kl_top_k: int,
    chunk: int,
) -> TokenLosses:
    """Next-token losses without a `[N, V]` array: positions go through in chunks that are recomputed in the backward pass.

    Args:
      model: of both; only how logits are made of hidden states is read.
      hidden, teacher_hidden: `[N, d]` final hidden states of student and frozen teacher.
      table, teacher_table: `[V, d]` unembeddings.
      targets: `[N]` int32.
      sampleable: `[V]` bool; reserved and padding ids take no part in any softmax here.
      kl_kind: "forward_topk" (teacher cut to its `kl_top_k` likeliest ids and renormalised), "forward" or "reverse".
      chunk: positions per chunk; peak memory is `chunk * V` floats.
    """
    count = hidden.shape[0]
    chunks = -(-count // chunk)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(chunks, chunk, *x.shape[1:])

    def log_policy(h: jax.Array, t: jax.Array) -> jax.Array:
        # A large finite mask instead of -inf: 0 * -inf would poison the divergences.
        return jax.nn.log_softmax(jnp.where(sampleable, logits(model, h, t), -1e30), axis=-1)

    @jax.checkpoint
    def one(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, *teacher = inputs
        student = log_policy(h, table)
        nll = -jnp.take_along_axis(student, target[:, None], axis=-1)[:, 0]
        if not teacher:
            return nll, jnp.zeros_like(nll)
        assert teacher_table is not None
        reference = jax.lax.stop_gradient(log_policy(teacher[0], teacher_table))
        if kl_kind == "forward_topk":
            top, ids = jax.lax.top_k(reference, min(kl_top_k, int(np.sum(sampleable))))
            top = jax.nn.log_softmax(top, axis=-1)
            return nll, jnp.sum(jnp.exp(top) * (top - jnp.take_along_axis(student, ids, axis=-1)), axis=-1)
        if kl_kind == "forward":
            return nll, jnp.sum(jnp.exp(reference) * (reference - student), axis=-1)
        return nll, jnp.sum(jnp.exp(student) * (student - reference), axis=-1)

    parts = [split(hidden), split(targets)] + ([] if teacher_hidden is None else [split(teacher_hidden)])
    nll, kl = jax.lax.map(one, tuple(parts))
    return TokenLosses(nll.reshape(-1)[:count], kl.reshape(-1)[:count])
