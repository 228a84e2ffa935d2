"""The decoding cache: an explicit pytree in and out, one row per prefix, for attention and short convolutions alike."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.stacks import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of a stack of layers. Slot `s` of a row holds position `s`; slots at or past the row's length are never read.

    Attributes:
      k, v: `[L, R, K, S, D]`. Layers lead because the forward scans over them; rows are axis 1, slots axis 3.
    """

    k: jax.Array
    v: jax.Array

    def take(self, index: jax.Array, slots: int) -> AttentionCache:
        return AttentionCache(self.k[:, index, :, :slots], self.v[:, index, :, :slots])

    def put(self, index: jax.Array, rows: AttentionCache) -> AttentionCache:
        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            return whole.at[:, index, :, : part.shape[3]].set(part, mode="drop")

        return AttentionCache(write(self.k, rows.k), write(self.v, rows.v))

    def append(self, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> AttentionCache:
        """Writes new keys and values `[R, T, K, D]` of one layer to slots `positions [R, T]`."""
        row = jnp.arange(positions.shape[0])[:, None, None]
        head = jnp.arange(k.shape[2])[None, :, None]
        slot = positions[:, None, :]
        return AttentionCache(
            self.k.at[layer, row, head, slot].set(k.swapaxes(1, 2).astype(self.k.dtype)),
            self.v.at[layer, row, head, slot].set(v.swapaxes(1, 2).astype(self.v.dtype)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvCache:
    """The last inputs of a stack of short convolutions, as a ring: the input at position `p` lies at `p % W`.

    A ring by position (and not a queue) makes feeding a position twice harmless, which is what a row that is done does.

    Attributes:
      inputs: `[L, R, W, d_model]`, `W` = taps of the kernel.
    """

    inputs: jax.Array

    def take(self, index: jax.Array, slots: int) -> ConvCache:
        return ConvCache(self.inputs[:, index])

    def put(self, index: jax.Array, rows: ConvCache) -> ConvCache:
        return ConvCache(self.inputs.at[:, index].set(rows.inputs, mode="drop"))

    def before(self, layer: jax.Array, first: jax.Array) -> jax.Array:
        """Inputs `[R, W - 1, d]` of one layer at the positions just before `first [R]`; zeros before the sequence."""
        width = self.inputs.shape[2]
        positions = first[:, None] + jnp.arange(1 - width, 0)
        found = jnp.take_along_axis(self.inputs[layer], (positions % width)[..., None], axis=1)
        return jnp.where((positions >= 0)[..., None], found, 0)

    def append(self, layer: jax.Array, first: jax.Array, last: jax.Array, inputs: jax.Array) -> ConvCache:
        """Stores what later tokens need.

        Args:
          first: `[R]` position of the first new token.
          last: `[R]` index of the last valid new token.
          inputs: `[R, W - 1 + T, d]`: what `before` returned, then the new inputs.
        """
        width = self.inputs.shape[2]
        newest = (first + last)[:, None]
        held = newest - (newest - jnp.arange(width)) % width  # the position that each ring slot holds afterwards
        index = held - first[:, None] + width - 1
        ring = jnp.take_along_axis(inputs, index[..., None], axis=1)
        return ConvCache(self.inputs.at[layer].set(ring.astype(self.inputs.dtype)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of every row in every layer.

    Attributes:
      stacks: per stack of layers (see `stacks.segments`) an `AttentionCache` or a `ConvCache`.
    """

    stacks: dict[str, AttentionCache | ConvCache]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        found: dict[str, AttentionCache | ConvCache] = {}
        for stack in (stack for segment in segments(config.kinds) for stack in segment.stacks):
            count = len(stack.layers)
            if stack.kind == "conv":
                found[stack.name] = ConvCache(jnp.zeros((count, rows, config.conv_kernel, config.d_model), dtype))
            else:
                shape = (count, rows, config.n_kv_heads, slots, config.head_dim)
                found[stack.name] = AttentionCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        return cls(found)

    @property
    def slots(self) -> int:
        return next(stack.k.shape[3] for stack in self.stacks.values() if isinstance(stack, AttentionCache))

    def take(self, index: jax.Array, slots: int) -> Cache:
        """First `slots` slots of rows `index [N]`, in that order: continue, branch and move are all this gather."""
        return Cache({name: stack.take(index, slots) for name, stack in self.stacks.items()})

    def put(self, index: jax.Array, rows: Cache) -> Cache:
        """Writes `rows` to rows `index [N]`; indices past the last row are dropped (padding)."""
        return Cache({name: stack.put(index, rows.stacks[name]) for name, stack in self.stacks.items()})  # type: ignore[arg-type]
