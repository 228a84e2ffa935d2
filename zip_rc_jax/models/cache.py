"""The decoding cache: an explicit pytree in and out, one row per prefix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every row. Slot `s` of a row holds position `s`; slots at or past the row's length are never read.

    Attributes:
      k, v: `[L, R, K, S, D]`. Layers lead because the forward scans over them; rows are axis 1, slots axis 3.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        shape = (config.n_layers, rows, config.n_kv_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        return self.k.shape[3]

    def take(self, index: jax.Array, slots: int) -> Cache:
        """First `slots` slots of rows `index [N]`, in that order: continue, branch and move are all this gather."""
        return Cache(self.k[:, index, :, :slots], self.v[:, index, :, :slots])

    def put(self, index: jax.Array, rows: Cache) -> Cache:
        """Writes `rows` to rows `index [N]`; indices past the last row are dropped (padding)."""

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            return whole.at[:, index, :, : part.shape[3]].set(part, mode="drop")

        return Cache(write(self.k, rows.k), write(self.v, rows.v))

    def append(self, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        """Writes new keys and values `[R, T, K, D]` of one layer to slots `positions [R, T]`."""
        row = jnp.arange(positions.shape[0])[:, None, None]
        head = jnp.arange(k.shape[2])[None, :, None]
        slot = positions[:, None, :]
        return Cache(self.k.at[layer, row, head, slot].set(k.swapaxes(1, 2)), self.v.at[layer, row, head, slot].set(v.swapaxes(1, 2)))
