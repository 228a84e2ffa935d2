"""Attention and rotary positions, shared by full forward and cached decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split pairing (as in Llama and Qwen).

    Args:
      x: `[B, T, H, D]`.
      positions: `[B, T]` int32.
      theta: base of the frequencies.

    Returns:
      `[B, T, H, D]` in the dtype of `x`; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention that builds the `[T, S]` scores (for short sequences), softmax in float32.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, K, S, D]`, `H` a multiple of `K`. Heads lead, so both products are plain batched matmuls without a transpose.
      mask: `[B, T, S]` bool, True where the query may look. Every query must see at least one key.

    Returns:
      `[B, T, H, D]`.
    """
    batch, steps, heads, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    grouped = q.reshape(batch, steps, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * steps, dim)
    scores = jnp.matmul(grouped * dim**-0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores.reshape(batch, kv_heads, groups, steps, slots), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # Normalised after the product: the division then touches [T, D] numbers instead of [T, S].
    out = jnp.matmul(weights.reshape(batch, kv_heads, groups * steps, slots).astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, groups, steps, dim) / jnp.sum(weights, axis=-1, keepdims=True)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, heads, dim).astype(q.dtype)
