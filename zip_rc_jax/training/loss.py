"""The training losses, per position (paper, section 3; recipe in the authors' code)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.models.transformer import logits
from zip_rc_jax.sharding import Layout


def joint_loss(log_joint: jax.Array, reward: jax.Array, remaining: jax.Array, censored: jax.Array, grid: Grid) -> jax.Array:
    """Cross-entropy of the joint with the observed (reward, remaining length).

    A truncated rollout has no true length, only a lower bound: its loss is the survival `-log sum_{l >= l_observed} p(b, l)`.

    Args:
      log_joint: `[..., B_V, B_T]` float32.
      reward: `[...]` in [0, 1].
      remaining: `[...]` tokens still to generate (observed so far where censored).
      censored: `[...]` bool.

    Returns:
      `[...]` float32.
    """
    reward_bin = jnp.sum(reward[..., None] >= jnp.asarray(grid.reward_edges, jnp.float32), axis=-1)
    length_bin = jnp.sum(remaining[..., None] >= jnp.asarray(grid.length_edges[1:-1], jnp.int32), axis=-1)
    at_reward = jnp.take_along_axis(log_joint, reward_bin[..., None, None], axis=-2)[..., 0, :]
    bins = jnp.arange(grid.n_length)
    possible = jnp.where(censored[..., None], bins >= length_bin[..., None], bins == length_bin[..., None])
    return -jax.nn.logsumexp(jnp.where(possible, at_reward, -jnp.inf), axis=-1)


class TokenLosses(NamedTuple):
    """`nll [B, S]`: -log p(next token). `kl [B, S]`: divergence from the teacher (0 without one). Both over ids the policy may emit."""

    nll: jax.Array
    kl: jax.Array


class Unembedding(NamedTuple):
    """A `[V, d]` table twice: laid out for the products of all chunks, and as the parameter that gets their gradient.

    Attributes:
      table: in the compute dtype, whole on every device but for the vocabulary axis.
      master: the parameter itself. Only its gradient matters: summed over the chunks in its own dtype, float32.
    """

    table: jax.Array
    master: jax.Array

    @classmethod
    def of(cls, master: jax.Array, dtype: Any, layout: Layout) -> Unembedding:
        # The gradient, too, is whole on every device while it is summed: laid out like the parameter, it would cross the network in
        # every chunk, instead of once.
        return cls(layout.constrain(jax.lax.stop_gradient(master).astype(dtype), "vocab", None), layout.constrain(master, "vocab", None))


class FullTeacher(NamedTuple):
    """A frozen policy as its final hidden states `[B, S, d]` and its unembedding."""

    hidden: jax.Array
    unembedding: Unembedding


class TopK(NamedTuple):
    """A frozen policy cut to its likeliest ids at every position: `ids [B, S, k]` int32, `log_probs [B, S, k]` float32, renormalised."""

    ids: Any
    log_probs: Any


def split_positions(rows: int, steps: int, chunk: int) -> tuple[int, int]:
    """How `rows` rows of `steps` positions go through in chunks of about `chunk` positions: (chunks, positions per row in each).

    Every chunk holds the same stretch of every row, so rows stay on their devices. At least one position per row, and stretches as
    even as they can be: fewer than one padded position per chunk and row.
    """
    chunks = -(-steps // max(1, min(steps, chunk // rows)))
    return chunks, -(-steps // chunks)


def _by_chunks(layout: Layout, chunk: int, function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function` of arrays `[B, S, ...]`, chunk by chunk, recomputed in the backward pass; its results too are `[B, S, ...]`."""
    rows, steps = arrays[0].shape[:2]
    chunks, width = split_positions(rows, steps, chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * width - steps)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(rows, chunks, width, *x.shape[2:]).swapaxes(0, 1)
        return layout.constrain(x, None, "batch", "sequence", *[None] * (x.ndim - 3))

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(rows, chunks * width, *x.shape[3:])[:, :steps]

    found = jax.lax.map(jax.checkpoint(lambda inputs: function(*inputs)), tuple(map(split, arrays)))
    return jax.tree.map(join, found)


def _policy_logits(model: ModelConfig, hidden: jax.Array, unembedding: Unembedding, sampleable: np.ndarray) -> jax.Array:
    """Logits `[..., V]` float32, of which only those of sampleable ids count."""
    # A large finite mask instead of -inf: 0 * -inf would poison the divergences.
    return jnp.where(sampleable, logits(model, hidden, *unembedding), -1e30)


def largest(x: jax.Array, k: int, group: int = 128) -> tuple[jax.Array, jax.Array]:
    """The `k` largest of `x [..., V]` with their indices, `[..., k]` each, as `jax.lax.top_k` up to the order of equal values.

    Compilers sort for it (TPU), and a vocabulary is long. The largest ones lie in the `k` groups with the largest maxima, so only
    the maxima and these groups are sorted.
    """
    size = x.shape[-1]
    if size <= 2 * k * group:
        return jax.lax.top_k(x, k)
    groups = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % group)], constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, group)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=-1), k)
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    ids = chosen[..., None] * group + jnp.arange(group)
    values, at = jax.lax.top_k(candidates.reshape(*x.shape[:-1], -1), k)
    return values, jnp.take_along_axis(ids.reshape(*x.shape[:-1], -1), at, axis=-1)


def teacher_top_k(model: ModelConfig, layout: Layout, teacher: FullTeacher, sampleable: np.ndarray, *, k: int, chunk: int) -> TopK:
    """The teacher's `k` likeliest ids (fewer if fewer are sampleable) at every position; see `token_losses` for the arguments."""

    def one(hidden: jax.Array) -> TopK:
        top, ids = largest(_policy_logits(model, hidden, teacher.unembedding, sampleable), min(k, int(np.sum(sampleable))))
        return TopK(ids, jax.nn.log_softmax(top, axis=-1))

    return jax.lax.stop_gradient(_by_chunks(layout, chunk, one, teacher.hidden))


def token_losses(
    model: ModelConfig,
    layout: Layout,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    sampleable: np.ndarray,
    *,
    teacher: FullTeacher | TopK | None,
    kl_kind: str,
    chunk: int,
) -> TokenLosses:
    """Next-token losses without a `[B, S, V]` array: positions go through in chunks that are recomputed in the backward pass.

    Args:
      model: of both; only how logits are made of hidden states is read.
      layout: chunks keep the rows on the devices that hold them.
      hidden: `[B, S, d]` final hidden states of the student.
      targets: `[B, S]` int32.
      sampleable: `[V]` bool; reserved and padding ids take no part in any softmax here.
      teacher: None gives no divergence; `TopK` for kl_kind "forward_topk", else `FullTeacher`.
      kl_kind: "forward_topk" (teacher cut to its likeliest ids and renormalised), "forward" or "reverse".
      chunk: positions of a chunk, over all rows (see `split_positions`); peak memory is a few times `chunk * V` floats.
    """

    def one(h: jax.Array, target: jax.Array, *given: jax.Array) -> TokenLosses:
        student = _policy_logits(model, h, unembedding, sampleable)
        total = jax.nn.logsumexp(student, axis=-1, keepdims=True)
        ids = jnp.concatenate([target[..., None], *given[:1]], axis=-1) if isinstance(teacher, TopK) else target[..., None]
        # Log-probabilities of few ids: the others need no array of their own.
        at = jnp.take_along_axis(student, ids, axis=-1) - total
        if teacher is None:
            return TokenLosses(-at[..., 0], jnp.zeros_like(at[..., 0]))
        if isinstance(teacher, TopK):
            return TokenLosses(-at[..., 0], jnp.sum(jnp.exp(given[1]) * (given[1] - at[..., 1:]), axis=-1))
        log_q = student - total
        # Like the student's, so that the divergence of equal models is exactly 0.
        reference = jax.lax.stop_gradient(_policy_logits(model, given[0], teacher.unembedding, sampleable))
        log_p = reference - jax.nn.logsumexp(reference, axis=-1, keepdims=True)
        weight, difference = (log_p, log_p - log_q) if kl_kind == "forward" else (log_q, log_q - log_p)
        return TokenLosses(-at[..., 0], jnp.sum(jnp.exp(weight) * difference, axis=-1))

    given = () if teacher is None else tuple(teacher) if isinstance(teacher, TopK) else (teacher.hidden,)
    return _by_chunks(layout, chunk, one, hidden, targets, *given)
