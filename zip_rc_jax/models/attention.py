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
      k, v: `[B, S, K, D]`, `H` a multiple of `K`.
      mask: `[B, T, S]` bool, True where the query may look. Every query must see at least one key.

    Returns:
      `[B, T, H, D]`.
    """
    batch, steps, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, steps, heads, dim)
