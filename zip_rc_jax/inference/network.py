"""The model as the decoder sees it: an empty cache, and a function from new tokens to logits.

Tests put a scripted model here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.attention import gpu, tpu
from zip_rc_jax.models.attention.cached import page_kernel
from zip_rc_jax.models.kv_cache import Cache
from zip_rc_jax.models.transformer import forward_cached, logits
from zip_rc_jax.runtime.sharding import Layout


class Network(Protocol):
    """Hashable, so that the decoder's programs are compiled once per network.

    Attributes:
      layout: mesh and rules; its data axis has `X` devices.
      page: positions of a page of the cache; 0 where a page holds a whole sequence.
    """

    @property
    def layout(self) -> Layout: ...

    @property
    def page(self) -> int: ...

    def empty_cache(self, shards: int, rows: int, slots: int, pages: int) -> Any:
        """A pytree with the methods of `models.kv_cache.Cache` that move pages and what is kept of
        a sequence besides: `axes`, `lanes`, `with_lanes`, and those that end in `_pages`, `_slot`
        and `_slots`.

        Args:
          rows: sequences of a shard.
          slots: positions of each.
          pages: of a shard.
        """

    def logits(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        live: jax.Array,
        cache: Any,
        slots: int,
    ) -> tuple[jax.Array, Any]:
        """Feeds tokens to `N / X` sequences of each of the `X` shards.

        One function for prefill (`T` = prompt length) and step (`T` = 1). Reserved ids carry the
        joint.

        Args:
          tokens, positions: `[N, T]` int32.
          last: `[N]` int32, index of each row's last token that is not padding.
          live: `[N]` bool, rows whose cache is written. The logits of the others mean nothing.
          cache: what `lanes` gave for these sequences. Without a table, lane `i` of a shard has
            page `i`.
          slots: slots to look at, more than any position of a row; a token past them is padding,
            and is not written.

        Returns:
          logits `[N, V]` float32 after token `last`, and the cache.
        """

    def temporary_bytes(self, rows: int, tokens: int, slots: int) -> int:
        """Most bytes that `logits` holds per device besides its arguments and results, for `rows`
        rows of each shard."""


def page_size(platform: str) -> int:
    """Slots of a page of the cache on a platform ("cpu", "gpu" or "tpu"); 0 for one slot that holds
    a whole row, which XLA reads faster on CPU."""
    return {"tpu": tpu.PAGE, "gpu": gpu.PAGE}.get(platform, 0)


@dataclasses.dataclass(frozen=True)
class TransformerNetwork:
    """`models.transformer` with params `{"body": ..., "table": [V, d] unembedding with the reserved
    rows folded in}`.

    Attributes:
      config, layout: of the model.
      dtype: of the cache, the parameters' own.
      unrolled: see `models.stacks.unstack`.
      page: slots of a page of the cache; 0 for one slot that holds a whole row.
      kernel: see `models.attention.cached.cached_attention`.
    """

    config: ModelConfig
    layout: Layout
    dtype: str
    unrolled: bool = False
    page: int = 0
    kernel: str = "auto"

    def empty_cache(self, shards: int, rows: int, slots: int, pages: int) -> Cache:
        dtype = jnp.dtype(self.dtype)
        return Cache.empty(self.config, shards, rows, slots, dtype, self.unrolled, self.page, pages)

    def logits(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        live: jax.Array,
        cache: Cache,
        slots: int,
    ) -> tuple[jax.Array, Any]:
        hidden, cache_out = forward_cached(
            self.config,
            params["body"],
            tokens,
            positions,
            cache,
            layout=self.layout,
            slots=slots,
            last=last,
            live=live,
            unrolled=self.unrolled,
            kernel=self.kernel,
        )
        at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return logits(self.config, at_last, params["table"]), cache_out

    def temporary_bytes(self, rows: int, tokens: int, slots: int) -> int:
        c, ways = self.config, self.layout.mesh.shape["tensor"]
        heads, kv, hidden = (
            c.n_heads * c.head_dim // ways,
            c.n_kv_heads * c.head_dim // ways,
            c.d_ff // ways,
        )
        size = jnp.dtype(self.dtype).itemsize
        activations = 4 * rows * tokens * (4 * c.d_model + 2 * hidden + 2 * heads)
        # One layer is worked on at a time: its weights may be copied, and its cache.
        weights = 4 * c.d_model * (3 * hidden + 2 * heads + 2 * kv)
        if tokens == 1 and self.page and page_kernel(c, self.layout, self.kernel):
            # A kernel reads a page at a time. XLA lays these weights out anew once an interval.
            return activations + weights + size * c.n_layers * c.d_model * (heads + 2 * kv)
        scores = 2 * 4 * rows * (c.n_heads // ways) * tokens * slots
        return activations + weights + scores + 2 * 2 * size * rows * slots * kv
