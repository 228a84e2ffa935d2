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
      k, v: `[L, R, S, K, D]`. Layers lead because the forward scans over them; rows are axis 1.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        shape = (config.n_layers, rows, slots, config.n_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def take(self, index: jax.Array) -> Cache:
        """Rows `index [N]`, in that order: continue, branch and move are all this gather."""
        return Cache(self.k[:, index], self.v[:, index])

    def put(self, index: jax.Array, rows: Cache) -> Cache:
        """Writes `rows` to positions `index [N]`; indices past the last row are dropped (padding)."""
        return Cache(self.k.at[:, index].set(rows.k, mode="drop"), self.v.at[:, index].set(rows.v, mode="drop"))
