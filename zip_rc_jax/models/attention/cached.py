"""Attention of new tokens to the decoding cache: written first, then read. One function for every
platform, chosen once per forward.

- Slots on CPU: XLA reads a part of the cache.
- Pages on TPU and GPU, one token per row: the kernels of `tpu` and `gpu`.
- Pages elsewhere, and where several tokens come at once: XLA gathers them.
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

KERNELS = ("auto", "plain", "tpu", "gpu")


def attention_scale(config: ModelConfig) -> float:
    """Factor of the scores."""
    return config.attention_scale or config.head_dim**-0.5


def page_kernel(config: ModelConfig, layout: Layout, kernel: str) -> str:
    """The kernel that reads pages for one token per row; "" where XLA gathers them."""
    chosen = layout.platform if kernel == "auto" else kernel
    has_kernel = chosen == "tpu" or (chosen == "gpu" and gpu.takes(config.head_dim))
    return chosen if has_kernel else ""


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
      kernel: "auto" takes the platform's kernel of pages for single tokens; "plain" takes none.
        "tpu" and "gpu" take that of a platform; elsewhere it runs as plain JAX operations (for
        tests).

    Raises:
      ValueError: a kernel that is asked for by name does not exist, or does not take these heads.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is none of {', '.join(KERNELS)}")
    if kernel == "gpu" and not gpu.takes(config.head_dim):
        raise ValueError(f"kernel 'gpu' takes no heads of {config.head_dim} channels; use 'plain'")
    batch, steps = positions.shape
    shards, rows, width = cache.window(batch, slots, unrolled)
    if cache.table is None:
        return _plain_slots(config, positions, live, (shards, rows, width))
    table = first_rows(cache.table, batch // shards)
    if not cache.page:
        return _gathered_pages(config, positions, live, table, width)
    table = table[:, : pages_of(width, cache.page)]
    chosen = page_kernel(config, layout, kernel)
    if steps > 1 or not chosen:
        return _gathered_pages(config, positions, live, table, table.shape[1] * cache.page)
    # What a kernel needs besides queries, cache and layer.
    length = jnp.where(live, positions[:, 0] + 1, 0)
    options: dict[str, Any] = {
        "layout": layout,
        "length": length,
        "scale": attention_scale(config),
        "interpret": chosen != layout.platform,
    }
    kinds = {kind: _window(config, kind) for kind in config.kinds if kind != "conv"}
    kernels: dict[str, Callable[..., jax.Array]] = {}
    for kind, window in kinds.items():
        mine = options | {"window": window}
        if chosen == "gpu":
            kernels[kind] = functools.partial(gpu.attend_pages, table=table, **mine)
        else:
            # Made once a step, for all layers of a type.
            listed = live_pages(length, table, shards, cache.page, window)
            kernels[kind] = functools.partial(tpu.attend_pages, listed=listed, **mine)
    return _page_kernel(kernels, positions, live, table)


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
        stack = stack.append(layer, None, positions, live, k, v)
        read = stack.read_first(layer, rows, width)
        attended = attentions[kind](resize_rows(q, shards, rows), *read)
        return resize_rows(attended, shards, len(q) // shards), stack

    return run


def _page_kernel(
    kernels: dict[str, Callable[..., jax.Array]],
    positions: jax.Array,
    live: jax.Array,
    table: jax.Array,
) -> CachedAttention:
    """Of pages, by a kernel for each layer type, one token per row."""

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, table, positions, live, k, v)
        return kernels[kind](q=q, cache=stack, layer=layer), stack

    return run


def _gathered_pages(
    config: ModelConfig, positions: jax.Array, live: jax.Array, table: jax.Array, slots: int
) -> CachedAttention:
    """Of the first `slots` slots in pages, by XLA, for any number of tokens."""
    attentions = _masked(config, positions, slots)

    def run(
        kind: str, layer: jax.Array, stack: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        stack = stack.append(layer, table, positions, live, k, v)
        return attentions[kind](q, *stack.read(layer, table, slots)), stack

    return run
