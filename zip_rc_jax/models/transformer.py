"""The decoder-only transformer of all families: Flax NNX modules behind pure functions on plain
parameters.

`init_params` builds the module once; `forward_packed` and `forward_cached` merge plain parameters
back into it inside a jitted function. Layer parameters are stacked from initialisation (leading
axis "layers", see `stacks`) and a forward scans over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zip_rc_jax.config import ModelConfig, RopeScaling
from zip_rc_jax.models.attention.cached import attention_scale, cached_attention
from zip_rc_jax.models.attention.full import (
    Attention,
    packed_attention,
    rope_frequencies,
    rotate,
    rotation,
)
from zip_rc_jax.models.kv_cache import Cache, ConvCache
from zip_rc_jax.models.stacks import segments
from zip_rc_jax.runtime.sharding import Layout

Params = dict[str, Any]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, plus_one: bool) -> jax.Array:
    """`x / rms(x) * scale` over the last axis, computed in float32; times `1 + scale` with
    `plus_one`.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (scale.astype(jnp.float32) + plus_one)).astype(x.dtype)


def _norm_scale(config: ModelConfig, shape: tuple[int, ...]) -> jax.Array:
    """Initial norm scales: every norm starts as multiplication by 1."""
    return jnp.zeros(shape) if config.norm_plus_one else jnp.ones(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: jax.Array, weight: jax.Array, master: jax.Array, dtype: Any) -> jax.Array:
    """`x [..., m] @ weight [m, n]` as `dtype`, where `weight` stands for the parameter `master` in
    another dtype or layout.

    The gradient goes to `master` alone, summed in its own dtype: a float32 parameter that is used
    in bfloat16 gets a float32 gradient, over all positions, all chunks of a loop and all devices.
    """
    del master
    return jnp.matmul(x, weight, preferred_element_type=dtype)


def _product_forward(
    x: jax.Array, weight: jax.Array, master: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(x, weight, master, dtype), (x, weight, jnp.zeros((), master.dtype))


def _product_backward(
    dtype: Any, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    x, weight, like_master = saved
    cotangent = cotangent.astype(x.dtype)
    # XLA's CPU backend has no fast path for weight gradients that contract over two axes: all
    # positions become one axis.
    flat = x.reshape(-1, x.shape[-1]).T
    gradient = jnp.matmul(
        flat, cotangent.reshape(-1, cotangent.shape[-1]), preferred_element_type=like_master.dtype
    )
    return jnp.matmul(cotangent, weight.T), None, gradient


product.defvjp(_product_forward, _product_backward)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [B, T, d_in] @ weight [d_in, ...] -> [B, T, ...]` in the dtype of `x`, as one
    two-dimensional matmul.

    Batch and sequence are merged first. XLA's CPU backend has no fast path for weight gradients
    that contract over two axes: they made the backward pass clearly slower.
    """
    batch, steps, width = x.shape
    flat, matrix = x.reshape(batch * steps, width), weight.reshape(width, -1)
    out = (
        flat @ matrix
        if matrix.dtype == x.dtype
        else product(flat, matrix.astype(x.dtype), matrix, x.dtype)
    )
    return out.reshape(batch, steps, *weight.shape[1:])


def add_bias(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """`x + bias` in the dtype of `x`."""
    return x + bias[...].astype(x.dtype)


# Rows up to which XLA's CPU matmuls are faster with the output features in front.
FEW_ROWS = 256


def project_output_major(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [B, T, d_in]` times `weight [..., d_in] -> [B, T, ...]`, for decoding on CPU."""
    batch, steps, width = x.shape
    x, flat = x.reshape(batch * steps, width), weight.reshape(-1, width)
    # The barrier keeps XLA from turning the product round.
    out = (
        jax.lax.optimization_barrier(jnp.matmul(flat, x.T)).T if len(x) <= FEW_ROWS else x @ flat.T
    )
    return out.reshape(batch, steps, *weight.shape[:-1])


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Block(nnx.Module):
    """A stack of layers of one type: every parameter has a leading axis "layers". Called on one
    slice of it inside the scan.

    `unrolled`: a single layer whose kernels are those of `stacks.unstack`, with their input axes
    last.
    """

    def __init__(
        self, config: ModelConfig, kind: str, count: int, rngs: nnx.Rngs, unrolled: bool = False
    ):
        self.config, self.kind, self.count, self.unrolled = config, kind, count, unrolled
        c, L, d, f = config, count, config.d_model, config.d_ff
        into, out = d**-0.5, (2 * c.n_layers) ** -0.5
        self.mixer_norm = self._norm(d)
        if kind == "conv":
            self.conv_in = nnx.Param(
                _normal(rngs, (L, d, 3, d), into), axes=("layers", "embed", None, "channels")
            )
            self.conv = nnx.Param(
                _normal(rngs, (L, c.conv_kernel, d), c.conv_kernel**-0.5),
                axes=("layers", None, "channels"),
            )
            self.conv_out = nnx.Param(
                _normal(rngs, (L, d, d), out * into), axes=("layers", "channels", "embed")
            )
            if c.conv_bias:
                self.conv_in_bias = self._bias((3, d), (None, "channels"))
                self.conv_bias = self._bias((d,), ("channels",))
                self.conv_out_bias = self._bias((d,), (None,))
        else:
            h, k, hd = c.n_heads, c.n_kv_heads, c.head_dim
            self.q = nnx.Param(
                _normal(rngs, (L, d, h, hd), into), axes=("layers", "embed", "heads", "head_dim")
            )
            self.k = nnx.Param(
                _normal(rngs, (L, d, k, hd), into), axes=("layers", "embed", "kv_heads", "head_dim")
            )
            self.v = nnx.Param(
                _normal(rngs, (L, d, k, hd), into), axes=("layers", "embed", "kv_heads", "head_dim")
            )
            self.o = nnx.Param(
                _normal(rngs, (L, h, hd, d), out * (h * hd) ** -0.5),
                axes=("layers", "heads", "head_dim", "embed"),
            )
            if c.attention_bias:
                self.q_bias = self._bias((h, hd), ("heads", "head_dim"))
                self.k_bias = self._bias((k, hd), ("kv_heads", "head_dim"))
                self.v_bias = self._bias((k, hd), ("kv_heads", "head_dim"))
            if c.has_output_bias:
                self.o_bias = self._bias((d,), (None,))
            if c.qk_norm:
                self.q_norm, self.k_norm = self._norm(hd), self._norm(hd)
        self.mlp_norm = self._norm(d)
        self.gate = nnx.Param(_normal(rngs, (L, d, f), into), axes=("layers", "embed", "mlp"))
        self.up = nnx.Param(_normal(rngs, (L, d, f), into), axes=("layers", "embed", "mlp"))
        self.down = nnx.Param(
            _normal(rngs, (L, f, d), out * f**-0.5), axes=("layers", "mlp", "embed")
        )
        if c.mlp_bias:
            self.gate_bias, self.up_bias = self._bias((f,), ("mlp",)), self._bias((f,), ("mlp",))
            self.down_bias = self._bias((d,), (None,))
        if c.post_norms:
            self.mixer_post_norm, self.mlp_post_norm = self._norm(d), self._norm(d)

    def _norm(self, width: int) -> nnx.Param:
        return nnx.Param(_norm_scale(self.config, (self.count, width)), axes=("layers", None))

    def _bias(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(jnp.zeros((self.count, *shape)), axes=("layers", *axes))

    def project(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """`[B, T, *out]` from `x [B, T, *in]` and a kernel `[*in, *out]`, or `[*out, *in]` if
        unrolled.
        """
        inputs = x.ndim - 2
        x = x.reshape(*x.shape[:2], -1)
        if self.unrolled:
            return project_output_major(x, weight.reshape(*weight.shape[:-inputs], -1))
        return project(x, weight.reshape(-1, *weight.shape[inputs:]))

    def norm(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
        return rms_norm(x, scale[...], self.config.rms_eps, self.config.norm_plus_one)

    def attention_inputs(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, H, D]`, keys and values `[B, T, K, D]` of hidden states `x [B, T, d]`."""
        c = self.config
        x = self.norm(x, self.mixer_norm)
        q, k, v = (
            self.project(x, self.q[...]),
            self.project(x, self.k[...]),
            self.project(x, self.v[...]),
        )
        if c.attention_bias:
            q, k, v = add_bias(q, self.q_bias), add_bias(k, self.k_bias), add_bias(v, self.v_bias)
        if c.qk_norm:
            q, k = self.norm(q, self.q_norm), self.norm(k, self.k_norm)
        return rotate(q, *rope), rotate(k, *rope), v

    def attention_output(self, attended: jax.Array) -> jax.Array:
        """`[B, T, d]` from the heads' outputs `[B, T, H, D]`."""
        out = self.project(attended, self.o[...])
        return add_bias(out, self.o_bias) if self.config.has_output_bias else out

    def conv_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is convolved, and the gate of the result, both `[B, T, d]` (LFM2)."""
        x = self.norm(x, self.mixer_norm)
        # Three products: in one, the channels would be merged with the part's number and lose their
        # place on the mesh.
        kernels = [
            self.conv_in[...][part] if self.unrolled else self.conv_in[...][:, part]
            for part in range(3)
        ]
        parts = [self.project(x, kernel) for kernel in kernels]
        if self.config.conv_bias:
            parts = [
                y + bias.astype(y.dtype)
                for y, bias in zip(parts, self.conv_in_bias[...], strict=True)
            ]
        return parts[0] * parts[2], parts[1]

    def conv_output(self, before: jax.Array, gate: jax.Array, positions: jax.Array) -> jax.Array:
        """The causal depthwise convolution and its output projection.

        Args:
          before: `[B, W - 1 + T, d]`, inputs with those of the `W - 1` earlier positions in front.
          gate: `[B, T, d]`.
          positions: `[B, T]` within the sequence: taps that would reach before its start (into the
            segment packed before it) are 0.
        """
        taps, steps, kernel = (
            self.config.conv_kernel,
            gate.shape[1],
            self.conv[...].astype(gate.dtype),
        )
        y = jnp.zeros_like(gate)
        for offset in range(taps):
            shifted = jax.lax.slice_in_dim(
                before, taps - 1 - offset, taps - 1 - offset + steps, axis=1
            )
            y = (
                y
                + jnp.where((positions >= offset)[..., None], shifted, 0)
                * kernel[taps - 1 - offset]
            )
        y = add_bias(y, self.conv_bias) if self.config.conv_bias else y
        out = self.project(gate * y, self.conv_out[...])
        return add_bias(out, self.conv_out_bias) if self.config.conv_bias else out

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Residual of the mixer's output, then the MLP with its own."""
        c = self.config
        x = x + (self.norm(mixed, self.mixer_post_norm) if c.post_norms else mixed)
        y = self.norm(x, self.mlp_norm)
        gate, up = self.project(y, self.gate[...]), self.project(y, self.up[...])
        if c.mlp_bias:
            gate, up = add_bias(gate, self.gate_bias), add_bias(up, self.up_bias)
        y = self.project(ACTIVATION_FUNCTIONS[c.activation](gate) * up, self.down[...])
        y = add_bias(y, self.down_bias) if c.mlp_bias else y
        return x + (self.norm(y, self.mlp_post_norm) if c.post_norms else y)


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm and unembedding. Its parameters are used as plain
    nested dicts.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, unrolled: bool = False):
        c = config
        self.embed = nnx.Param(
            _normal(rngs, (c.vocab_size, c.d_model), 0.02), axes=("vocab", "embed")
        )
        self.blocks = nnx.Dict(
            {
                s.name: Block(c, s.kind, len(s.layers), rngs, unrolled)
                for g in segments(c.kinds, unrolled)
                for s in g.stacks
            }
        )
        self.final_norm = nnx.Param(_norm_scale(c, (c.d_model,)), axes=(None,))
        if not c.tied:
            self.unembed = nnx.Param(
                _normal(rngs, (c.vocab_size, c.d_model), 0.02), axes=("vocab", "embed")
            )


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters as nested dicts of arrays. Deterministic in `seed`."""
    return nnx.to_pure_dict(nnx.split(Transformer(config, nnx.Rngs(seed)))[1])


@functools.cache
def _abstract(config: ModelConfig, unrolled: bool = False) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), unrolled)))


def param_shapes(config: ModelConfig) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter, as `init_params` would make it."""
    return nnx.to_pure_dict(_abstract(config)[1])


def param_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter (tuples as leaves), for `sharding.Layout`."""
    state = _abstract(config)[1]
    return nnx.to_pure_dict(
        jax.tree.map(lambda p: p.replace(p.axes), state, is_leaf=lambda p: isinstance(p, nnx.Param))
    )


# What stands between the two norms of a layer: (block, hidden states, number of the layer in its
# stack, the stack's cache or None) -> (the mixer's output, the updated cache or None).
Mixer = Callable[[Block, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def forward_packed(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    layout: Layout,
    remat: bool = False,
    dtype: Any = None,
    attention: str = "auto",
    unrolled: bool = False,
) -> jax.Array:
    """Final hidden states (after the last norm) of packed rows, without a cache.

    Attention is causal inside each segment of a row.

    Args:
      tokens: `[B, T]` int32.
      positions: `[B, T]` int32, starting at 0 in every segment.
      segment_ids: `[B, T]` int32. Equal ids of a row attend to each other.
      remat: compute each layer again in the backward pass.
      dtype: what is computed in (default: the dtype of the parameters). Norms, softmax and the
        gradients of the parameters stay in float32 where the parameters are.
      attention: see `packed_attention`.
      unrolled: parameters have arrays for every layer, see `stacks.unstack`.

    Returns:
      `[B, T, d_model]` in `dtype`.
    """
    model = _with_params(config, params, unrolled)
    x = _embed(config, model, tokens, layout, dtype)
    ropes = _ropes_once(config, positions, unrolled)
    attentions = _packed_attentions(config, layout, segment_ids, attention)

    def mix(block: Block, x: jax.Array, layer: jax.Array, old: None) -> tuple[jax.Array, None]:
        if block.kind == "conv":
            new, gate = block.conv_inputs(x)
            before = jnp.zeros((new.shape[0], config.conv_kernel - 1, new.shape[2]), new.dtype)
            return block.conv_output(jnp.concatenate([before, new], axis=1), gate, positions), None
        q, k, v = block.attention_inputs(x, ropes[block.kind])
        return block.attention_output(
            attentions[block.kind](q, k.swapaxes(1, 2), v.swapaxes(1, 2))
        ), None

    x, _ = _run_layers(config, model, layout, x, mix, {}, remat=remat, unrolled=unrolled)
    return _final_norm(config, model, x)


def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    *,
    layout: Layout,
    slots: int | None = None,
    last: jax.Array | None = None,
    live: jax.Array | None = None,
    unrolled: bool = False,
    kernel: str = "auto",
) -> tuple[jax.Array, Cache]:
    """Final hidden states (after the last norm) of the next tokens of every row, and the updated
    cache.

    The keys of `tokens` are written to slots `positions`. Every query attends to all slots up to
    its own position. So prefill, chunked prefill and decoding are one path.

    Args:
      tokens: `[B, T]` int32. With a cache of `X` shards, the first `B / X` rows of every shard.
      positions: `[B, T]` int32, consecutive within a row.
      cache: see `Cache`; updated in place where the caller donates it.
      slots: slots of the cache to attend to, more than `max(positions)` (default all).
      last: `[B]` int32, index of the last token of each row that is not padding (default `T - 1`).
      live: `[B]` bool, rows whose state in the cache is written (default all). The output of the
        others means nothing.
      unrolled: parameters and cache have arrays for every layer, see `stacks.unstack`.
      kernel: see `cached_attention`.

    Returns:
      `[B, T, d_model]` in the dtype of the parameters, and the cache.
    """
    # What all layers share: positions, and which slots they read.
    model = _with_params(config, params, unrolled)
    x = _embed(config, model, tokens, layout, None)
    batch, steps = tokens.shape
    last = jnp.full(batch, steps - 1) if last is None else last
    live = jnp.ones(batch, bool) if live is None else live
    ropes = _ropes_once(config, positions, unrolled)
    attention = cached_attention(
        config, layout, cache, positions, live, slots=slots, unrolled=unrolled, kernel=kernel
    )

    def convolve(
        block: Block, x: jax.Array, layer: jax.Array, old: ConvCache
    ) -> tuple[jax.Array, ConvCache]:
        new, gate = block.conv_inputs(x)
        first = positions[:, 0]
        inputs = jnp.concatenate([old.before(layer, first).astype(new.dtype), new], axis=1)
        return block.conv_output(inputs, gate, positions), old.append(
            layer, first, last, live, inputs
        )

    def mix(block: Block, x: jax.Array, layer: jax.Array, old: Any) -> tuple[jax.Array, Any]:
        if block.kind == "conv":
            return convolve(block, x, layer, old)
        attended, new = attention(
            block.kind, layer, old, *block.attention_inputs(x, ropes[block.kind])
        )
        return block.attention_output(attended), new

    # On GPU a decode step is faster without the loop (by 2 to 9% on an H200, see docs/gpu.md).
    straight = layout.platform == "gpu" and steps == 1
    x, stacks = _run_layers(
        config, model, layout, x, mix, cache.stacks, unrolled=unrolled, straight=straight
    )
    return _final_norm(config, model, x), Cache(stacks, cache.table)


def _with_params(config: ModelConfig, params: Params, unrolled: bool) -> Transformer:
    """The module of the config with these parameters."""
    graphdef, abstract = _abstract(config, unrolled)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def _embed(
    config: ModelConfig, model: Transformer, tokens: jax.Array, layout: Layout, dtype: Any
) -> jax.Array:
    """What the first layer sees: `[B, T, d_model]` in `dtype`, or in that of the parameters if it
    is None.
    """
    x = model.embed[...][tokens].astype(dtype or model.embed[...].dtype)
    if config.scale_embedding:
        x = x * jnp.asarray(config.d_model**0.5, x.dtype)
    return layout.constrain(x, "batch", "sequence", "embed_act")


def _final_norm(config: ModelConfig, model: Transformer, x: jax.Array) -> jax.Array:
    return rms_norm(x, model.final_norm[...], config.rms_eps, config.norm_plus_one)


def _run_layers(
    config: ModelConfig,
    model: Transformer,
    layout: Layout,
    x: jax.Array,
    mix: Mixer,
    stacks: Mapping[str, Any],
    *,
    unrolled: bool,
    remat: bool = False,
    straight: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """All layers, a scan for each segment of them.

    Args:
      stacks: the cache of every stack; empty without one.
      straight: compile the scans without loops.

    Returns:
      the hidden states before the last norm, and the updated caches.
    """

    def run(
        definition: nnx.GraphDef, weights: nnx.State, x: jax.Array, layer: jax.Array, old: Any
    ) -> tuple[jax.Array, Any]:
        """One layer: its output, and its stack's updated cache."""
        block = nnx.merge(definition, weights)
        mixed, new = mix(block, x, layer, old)
        return layout.constrain(block.finish(x, mixed), "batch", "sequence", "embed_act"), new

    caches: dict[str, Any] = {}
    for segment in segments(config.kinds, unrolled):
        parts = {s.name: nnx.split(model.blocks[s.name]) for s in segment.stacks}

        # The cache is carried, not scanned over, so XLA updates it in place instead of stacking a
        # copy per step.
        def layers(
            carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, Any], parts: Any = parts
        ) -> tuple[tuple[jax.Array, Any], None]:
            (x, caches), (layer, weights) = carry, inputs
            for name, (definition, _) in parts.items():
                # Layer by layer, also where the scan takes several at once: the backward pass then
                # holds the inside of one.
                one = functools.partial(run, definition)
                x, new = (jax.checkpoint(one) if remat else one)(
                    weights[name], x, layer, caches.get(name)
                )
                caches = caches if new is None else {**caches, name: new}
            return (x, caches), None

        held = {name: stacks[name] for name in parts if name in stacks}
        weights = {name: weights for name, (_, weights) in parts.items()}
        scanned = (jnp.arange(segment.repeats), weights)
        (x, held), _ = jax.lax.scan(layers, (x, held), scanned, unroll=straight)
        caches |= held
    return x, caches


def _packed_attentions(
    config: ModelConfig, layout: Layout, segment_ids: jax.Array, name: str
) -> dict[str, Attention]:
    """Per attention type, what queries do with the keys of their own packed row."""
    windows = (
        {"attention": 0, "sliding": config.sliding_window}
        if config.sliding_window
        else {"attention": 0}
    )
    return {
        kind: packed_attention(name, layout, segment_ids, attention_scale(config), window)
        for kind, window in windows.items()
    }


def _once(function: Callable[[], Any], positions: jax.Array) -> Any:
    """`function()`, computed before the layers.

    Without a branch, XLA on CPU fuses it into every unrolled layer and computes it each time.
    """
    shapes = jax.eval_shape(function)
    return jax.lax.cond(
        positions[0, 0] >= 0,
        function,
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    )


def _ropes_once(
    config: ModelConfig, positions: jax.Array, unrolled: bool
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """See `_ropes`; computed before the layers, also where they are unrolled."""
    return (
        _once(functools.partial(_ropes, config, positions), positions)
        if unrolled
        else _ropes(config, positions)
    )


def _ropes(config: ModelConfig, positions: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Per attention type the rotation of its queries and keys."""
    full = rotation(
        positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    )
    if not config.sliding_rope_theta:
        return {"attention": full, "sliding": full}
    return {
        "attention": full,
        "sliding": rotation(
            positions, rope_frequencies(config.head_dim, config.sliding_rope_theta, RopeScaling())
        ),
    }


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The `[vocab_size, d_model]` table whose product with a hidden state gives all logits."""
    return params["embed"] if config.tied else params["unembed"]


def logits(
    config: ModelConfig, hidden: jax.Array, table: jax.Array, master: jax.Array | None = None
) -> jax.Array:
    """Logits `[..., N]` float32 of hidden states `[..., d_model]` for the rows of `table [N,
    d_model]`, soft-capped if the model is.

    Args:
      master: the parameter that `table` stands for, see `product`; None if it is `table` itself.
    """
    if master is None:
        scores = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    else:
        scores = product(hidden, table.T, master.T, jnp.float32)
    cap = config.logit_softcap
    return cap * jnp.tanh(scores / cap) if cap else scores
