"""Attention of new tokens to the decoding cache: written first, then read. One function for every
platform, chosen once per forward.

- Slots on CPU, and wherever several tokens come at once: XLA reads a part of the cache.
- Slots on GPU: the kernel of `gpu`.
- Pages on TPU: the kernel of `tpu`.
- Pages elsewhere: XLA gathers them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.attention import gpu, tpu
from zip_rc_jax.models.attention.full import Attention, attend
from zip_rc_jax.models.kv_cache import Cache, first_rows, resize_rows
from zip_rc_jax.models.paged_cache import live_pages, pages_of
from zip_rc_jax.runtime.sharding import Layout

# (layer type, number of the layer in its stack, the stack's cache, queries [B, T, H, D], keys and
# values [B, T, K, D]) -> (the heads' outputs [B, T, H, D], the updated cache).
CachedAttention = Callable[
    [str, jax.Array, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]
]

KERNELS = ("auto", "plain", "interpreted")


def attention_scale(config: ModelConfig) -> float:
    """Factor of the scores."""
    return config.attention_scale or config.head_dim**-0.5


def cached_attention(
    config: ModelConfig,
    layout: Layout,
    cache: Cache,
    positions: jax.Array,
    live: jax.Array,
    *,
    slots: int | None,
    unrolled: bool,
    kernel: str = "auto",
) -> CachedAttention:
    """What a forward of tokens at `positions [X * W, T]` does in every attention layer.

    Args:
      live: `[X * W]` bool, rows that are written.
      slots: slots of the cache to attend to, more than `max(positions)`; None for all.
      unrolled: see `stacks.unstack`.
      kernel: "auto" takes the platform's kernel for single tokens; "plain" takes none;
        "interpreted" runs that of slots or pages as plain JAX operations, on any platform (for
        tests).
    """
    batch, steps = positions.shape
    shards, rows, width = cache.window(batch, slots, unrolled)
    interpret = steps == 1 and kernel == "interpreted"
    options = {"layout": layout, "scale": attention_scale(config), "interpret": interpret}
    if cache.table is not None:
        table = first_rows(cache.table, batch // shards)[:, : pages_of(width, cache.page)]
        on_tpu = kernel == "auto" and layout.platform == "tpu" and steps == 1
        if on_tpu or interpret:
            return _page_kernel(config, cache, positions, live, table, options)
        return _gathered_pages(config, cache, positions, live, table)
    on_gpu = kernel == "auto" and gpu.reads_in_place(layout, steps, config.head_dim)
    if on_gpu or interpret:
        return _slot_kernel(config, positions, live, options | {"slots": width})
    return _plain_slots(config, positions, live, (shards, rows, width))


def _masked(config: ModelConfig, positions: jax.Array, slots: int) -> dict[str, Attention]:
    """Per layer type, what queries at `positions [B, T]` do with the first `slots` slots."""
    distance = positions[:, :, None] - jnp.arange(slots)
    masks = {"attention": distance >= 0}
    if config.sliding_window:
        masks["sliding"] = masks["attention"] & (distance < config.sliding_window)
    scale = attention_scale(config)
    return {kind: functools.partial(attend, mask=mask, scale=scale) for kind, mask in masks.items()}


def _window(config: ModelConfig, kind: str) -> int:
    return config.sliding_window if kind == "sliding" else 0


def _plain_slots(
    config: ModelConfig,
    positions: jax.Array,
    live: jax.Array,
    window: tuple[int, int, int],
) -> CachedAttention:
    """Of slots, by XLA; `window` as `Cache.window` gives it."""
    shards, rows, width = window
    attentions = _masked(config, resize_rows(positions, shards, rows), width)

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, positions, live, k, v)
        read = stack.read(layer, rows, width)
        attended = attentions[kind](resize_rows(q, shards, rows), *read)
        return resize_rows(attended, shards, len(q) // shards), stack

    return run


def _slot_kernel(
    config: ModelConfig, positions: jax.Array, live: jax.Array, options: dict[str, Any]
) -> CachedAttention:
    """Of slots, by the GPU kernel, one token per row."""

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, positions, live, k, v)
        length = jnp.where(live, positions[:, 0] + 1, 0)
        window = _window(config, kind)
        attended = gpu.attend_in_place(
            q=q, cache=stack, layer=layer, length=length, window=window, **options
        )
        return attended, stack

    return run


def _page_kernel(
    config: ModelConfig,
    cache: Cache,
    positions: jax.Array,
    live: jax.Array,
    table: jax.Array,
    options: dict[str, Any],
) -> CachedAttention:
    """Of pages, by the TPU kernel, one token per row."""
    length = jnp.where(live, positions[:, 0] + 1, 0)
    assert cache.table is not None
    shards, page = len(cache.table), cache.page
    kinds = {kind for kind in config.kinds if kind != "conv"}
    # Made once a step, for all layers of a type.
    listed = {
        kind: live_pages(length, table, shards, page, _window(config, kind)) for kind in kinds
    }

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, table, positions, live, k, v)
        attended = tpu.attend_pages(
            q=q,
            cache=stack,
            layer=layer,
            listed=listed[kind],
            length=length,
            window=_window(config, kind),
            **options,
        )
        return attended, stack

    return run


def _gathered_pages(
    config: ModelConfig, cache: Cache, positions: jax.Array, live: jax.Array, table: jax.Array
) -> CachedAttention:
    """Of pages, by XLA, for any number of tokens."""
    slots = table.shape[1] * cache.page
    attentions = _masked(config, positions, slots)

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, table, positions, live, k, v)
        return attentions[kind](q, *stack.read(layer, table, slots)), stack

    return run
