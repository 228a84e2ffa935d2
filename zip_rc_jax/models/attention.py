"""Attention and rotary positions, shared by full forward and cached decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle per position of every channel pair, `[head_dim / 2]` float32."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "llama3":
        wavelength = 2 * np.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 1 where the wavelength is short (kept), 0 where it is long (divided).
        kept = np.clip((scaling.original_positions / wavelength - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotation(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, `[B, T, 1, D / 2]` float32, for positions `[B, T]` and frequencies `[D / 2]`."""
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding, half-split pairing (as in Llama and Qwen), computed in float32.

    Args:
      x: `[B, T, H, D]`.
      cos, sin: from `rotation`.

    Returns:
      `[B, T, H, D]` in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Grouped-query attention that builds the `[T, S]` scores (for short sequences), softmax in float32.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, K, S, D]`, `H` a multiple of `K`. Heads lead, so both products are plain batched matmuls without a transpose.
      mask: `[B, T, S]` bool, True where the query may look. Every query must see at least one key.
      scale: factor of the scores.

    Returns:
      `[B, T, H, D]`.
    """
    batch, steps, heads, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    grouped = q.reshape(batch, steps, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * steps, dim)
    if groups * steps < 8:
        # Few queries: on CPU the product with the keys in front takes half the time, and the barrier keeps XLA from turning it round.
        scores = jnp.matmul(k, (grouped * scale).swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
    else:
        scores = jnp.matmul(grouped * scale, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores.reshape(batch, kv_heads, groups, steps, slots), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # Normalised after the product: the division then touches [T, D] numbers instead of [T, S].
    out = jnp.matmul(weights.reshape(batch, kv_heads, groups * steps, slots).astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, groups, steps, dim) / jnp.sum(weights, axis=-1, keepdims=True)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, heads, dim).astype(q.dtype)
