"""The decoder-only transformer (Llama / Qwen3 shape): Flax NNX modules behind pure functions on plain parameters.

`init_params` builds the module once; `hidden_states` merges plain parameters back into it inside a jitted function. Layer
parameters are stacked from initialisation (leading axis "layers") and the forward scans over them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.attention import attend, rotate
from zip_rc_jax.models.cache import Cache
from zip_rc_jax.sharding import Layout

Params = dict[str, Any]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [B, T, d_in] @ weight [d_in, ...] -> [B, T, ...]` as one two-dimensional matmul.

    XLA's CPU backend has no fast path for weight gradients that contract over two axes (they made
    the backward pass clearly slower here), so batch and sequence are merged first.
    """
    batch, steps, width = x.shape
    out = x.reshape(batch * steps, width) @ weight.reshape(width, -1)
    return out.reshape(batch, steps, *weight.shape[1:])


class Block(nnx.Module):
    """All layers, stacked: every parameter has a leading axis "layers". Called on one slice of it inside the scan."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        L, d, h, k, hd, f = c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff
        into, out = d**-0.5, (2 * L) ** -0.5
        self.config = c
        self.attn_norm = nnx.Param(jnp.ones((L, d)), axes=("layers", None))
        self.q = nnx.Param(_normal(rngs, (L, d, h, hd), into), axes=("layers", "embed", "heads", "head_dim"))
        self.k = nnx.Param(_normal(rngs, (L, d, k, hd), into), axes=("layers", "embed", "kv_heads", "head_dim"))
        self.v = nnx.Param(_normal(rngs, (L, d, k, hd), into), axes=("layers", "embed", "kv_heads", "head_dim"))
        self.o = nnx.Param(_normal(rngs, (L, h, hd, d), out * (h * hd) ** -0.5), axes=("layers", "heads", "head_dim", "embed"))
        if c.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((L, hd)), axes=("layers", None))
            self.k_norm = nnx.Param(jnp.ones((L, hd)), axes=("layers", None))
        self.mlp_norm = nnx.Param(jnp.ones((L, d)), axes=("layers", None))
        self.gate = nnx.Param(_normal(rngs, (L, d, f), into), axes=("layers", "embed", "mlp"))
        self.up = nnx.Param(_normal(rngs, (L, d, f), into), axes=("layers", "embed", "mlp"))
        self.down = nnx.Param(_normal(rngs, (L, f, d), out * f**-0.5), axes=("layers", "mlp", "embed"))

    def attention_inputs(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, H, D]`, keys and values `[B, T, K, D]` of hidden states `x [B, T, d]`."""
        c = self.config
        x = rms_norm(x, self.attn_norm[...], c.rms_eps)
        q = project(x, self.q[...])
        k = project(x, self.k[...])
        v = project(x, self.v[...])
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_eps)
        return rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta), v

    def attention_output(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        heads, dim, width = self.o[...].shape
        return x + project(attended.reshape(*attended.shape[:2], heads * dim), self.o[...].reshape(heads * dim, width))

    def mlp(self, x: jax.Array) -> jax.Array:
        y = rms_norm(x, self.mlp_norm[...], self.config.rms_eps)
        return x + project(jax.nn.silu(project(y, self.gate[...])) * project(y, self.up[...]), self.down[...])


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm and unembedding. Its parameters are used as plain nested dicts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        self.embed = nnx.Param(_normal(rngs, (c.vocab_size, c.d_model), 0.02), axes=("vocab", "embed"))
        self.blocks = Block(c, rngs)
        self.final_norm = nnx.Param(jnp.ones((c.d_model,)), axes=(None,))
        if not c.tied:
            self.unembed = nnx.Param(_normal(rngs, (c.vocab_size, c.d_model), 0.02), axes=("vocab", "embed"))


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters as nested dicts of arrays. Deterministic in `seed`."""
    return nnx.to_pure_dict(nnx.split(Transformer(config, nnx.Rngs(seed)))[1])


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def param_shapes(config: ModelConfig) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter, as `init_params` would make it."""
    return nnx.to_pure_dict(_abstract(config)[1])


def param_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter (tuples as leaves), for `sharding.Layout`."""
    state = _abstract(config)[1]
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.replace(p.axes), state, is_leaf=lambda p: isinstance(p, nnx.Param)))


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    layout: Layout,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    remat: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states (after the last norm) of a batch.

    Without a cache: causal attention inside each segment of a packed row. With a cache: the keys of `tokens` are written to slots
    `positions` and every query attends to all slots up to its own position, so prefill, chunked prefill and decoding are one path.

    Args:
      tokens: `[B, T]` int32.
      positions: `[B, T]` int32; consecutive within a row when a cache is given.
      segment_ids: `[B, T]` int32, equal ids attend to each other; required without a cache.
      cache: rows `B`, slots `S > max(positions)`.
      remat: recompute each layer in the backward pass.

    Returns:
      `[B, T, d_model]` in the dtype of the parameters, and the updated cache (None without one).
    """
    graphdef, abstract = _abstract(config)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    model = nnx.merge(graphdef, state)
    block_def, layers = nnx.split(model.blocks)
    new_cache: Cache | None = None
    x = layout.constrain(model.embed[...][tokens], "batch", "sequence", "embed_act")

    if cache is None:
        if segment_ids is None:
            raise ValueError("segment_ids are required when no cache is given")
        index = jnp.arange(tokens.shape[1])
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (index[:, None] >= index[None, :])

        def layer(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            block = nnx.merge(block_def, weights)
            q, k, v = block.attention_inputs(x, positions)
            x = block.mlp(block.attention_output(x, attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)))
            return layout.constrain(x, "batch", "sequence", "embed_act"), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, layers)
    else:
        mask = jnp.arange(cache.slots)[None, None, :] <= positions[:, :, None]

        # The cache is carried, not scanned over, so XLA updates it in place instead of stacking a copy per step.
        def cached_layer(carry: tuple[jax.Array, Cache], weights: tuple[jax.Array, nnx.State]) -> tuple[tuple[jax.Array, Cache], None]:
            (x, kv), (number, layer_weights) = carry, weights
            block = nnx.merge(block_def, layer_weights)
            q, k, v = block.attention_inputs(x, positions)
            kv = kv.append(number, positions, k, v)
            attended = attend(q, kv.k[number], kv.v[number], mask)
            return (layout.constrain(block.mlp(block.attention_output(x, attended)), "batch", "sequence", "embed_act"), kv), None

        (x, updated), _ = jax.lax.scan(cached_layer, (x, cache), (jnp.arange(config.n_layers), layers))
        new_cache = updated
    return rms_norm(x, model.final_norm[...], config.rms_eps), new_cache


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The `[vocab_size, d_model]` table whose product with a hidden state gives all logits."""
    return params["embed"] if config.tied else params["unembed"]
