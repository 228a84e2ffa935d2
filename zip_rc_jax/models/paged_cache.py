"""Keys and values in pages: one pool for all layers of a stack, and a table that says which pages a
row has.

A page holds the keys and values of `page` consecutive positions side by side, for all heads of one
layer. Page number `p` of layer `l` lies at `l * pages + p`, so one table serves all layers. A row
is as long as its table says, and a forward reads no more of it than there is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# Logical axes of a pool of pages and of the tables, for `sharding.Layout`.
PAGE_AXES = ("batch", None, "kv_heads", "sequence", "head_dim")
TABLE_AXES = ("batch", None, None)


def pages_of(slots: Any, page: int) -> Any:
    """Pages that hold `slots` slots, a number or an array."""
    return -(-slots // page)


def identity_table(shards: int, rows: int, pages: int) -> jax.Array:
    """`[X, R, N]` int32: row `r` of every shard has the `N` pages from `r * N` on."""
    table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    return jnp.broadcast_to(table, (shards, rows, pages))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of a stack of layers. Slots at or past a row's length are never read.

    Attributes:
      kv: `[X, L * P, K, page, 2 D]`: `P` pages of each of `L` layers, keys before values.
      layers: `L`.
    """

    kv: jax.Array
    layers: int = dataclasses.field(metadata={"static": True})

    @property
    def page(self) -> int:
        """Slots of a page."""
        return self.kv.shape[3]

    @property
    def pages(self) -> int:
        """`P`, of one layer in one shard."""
        return self.kv.shape[1] // self.layers

    def append(
        self,
        layer: jax.Array,
        table: jax.Array,
        positions: jax.Array,
        live: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> PagedCache:
        """Writes new keys and values `[X * W, T, K, D]` of one layer to slots `positions [X * W,
        T]` of the rows that are `live`.

        Args:
          table: `[X * W, N]` int32, the pages of these rows. What has no page there is dropped.
        """
        shards, total, heads, page, _ = self.kv.shape
        number = jnp.take_along_axis(
            table, jnp.minimum(positions // page, table.shape[1] - 1), axis=1
        )
        inside = live[:, None] & (positions < table.shape[1] * page)
        # past the end: dropped
        number = jnp.where(inside, layer * self.pages + number, total)
        new = jnp.concatenate([k, v], axis=-1).swapaxes(1, 2).astype(self.kv.dtype)

        def one(kv: jax.Array, number: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
            head = jnp.arange(heads)[None, :, None]
            return kv.at[number[:, None], head, slot[:, None]].set(new, mode="drop")

        def lanes(x: jax.Array) -> jax.Array:
            return x.reshape(shards, -1, *x.shape[1:])

        arguments = lanes(number), lanes(positions % page), lanes(new)
        if shards == 1:  # without a batch axis, see `AttentionCache.append`
            return self._with(one(self.kv[0], *(x[0] for x in arguments))[None])
        return self._with(jax.vmap(one)(self.kv, *arguments))

    def read(self, layer: jax.Array, table: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[X * W, K, S, D]` of one layer for rows with the pages `table [X * W,
        N]`; `S` is `slots`, rounded up to whole pages.

        A copy, for prefill and for platforms without a kernel.
        """
        shards, _, heads, page, width = self.kv.shape
        count = pages_of(slots, page)
        number = layer * self.pages + table[:, :count].reshape(shards, -1, count)
        kv = jax.vmap(lambda kv, number: kv[number])(self.kv, number)  # [X, W, N, K, page, 2 D]
        kv = kv.swapaxes(2, 3).reshape(-1, heads, count * page, width)
        return kv[..., : width // 2], kv[..., width // 2 :]

    def take(self, pages: jax.Array) -> jax.Array:
        """`[L, X, N, K, page, 2 D]`: the pages `[X, N]` of every layer."""
        taken = jax.vmap(lambda kv, at: kv.at[at].get(mode="clip"))(self.kv, self._places(pages))
        return taken.reshape(len(taken), self.layers, -1, *taken.shape[2:]).swapaxes(0, 1)

    def put(self, pages: jax.Array, content: jax.Array) -> PagedCache:
        """`take` undone; pages past the end are dropped."""
        content = content.swapaxes(0, 1)
        content = content.reshape(len(content), -1, *content.shape[3:])
        put = jax.vmap(lambda kv, at, new: kv.at[at].set(new, mode="drop"))
        return self._with(put(self.kv, self._places(pages), content))

    def clear(self, pages: jax.Array) -> PagedCache:
        """Zeros in the pages `[X, N]` of every layer; those past the end are dropped."""
        zero = jax.vmap(lambda kv, at: kv.at[at].set(0, mode="drop"))
        return self._with(zero(self.kv, self._places(pages)))

    def _places(self, pages: jax.Array) -> jax.Array:
        """`[X, L * N]`: where the pages `[X, N]` of every layer lie; past the end where they do."""
        places = jnp.arange(self.layers)[:, None] * self.pages + pages[:, None]
        places = jnp.where(pages[:, None] < self.pages, places, self.kv.shape[1])
        return places.reshape(len(pages), -1)

    def copy_pages(
        self, source: PagedCache, from_pages: jax.Array, to_pages: jax.Array, count: jax.Array
    ) -> PagedCache:
        """The first `count` of `to_pages [N]` become those of `source`, which may be this very
        cache, in place; arrays of one shard."""

        def copy(i: jax.Array, pool: PagedCache) -> PagedCache:
            other = pool if source is self else source
            layer, n = i % self.layers, i // self.layers
            zero = jnp.zeros((), jnp.int32)
            start = (zero, layer * other.pages + from_pages[n], zero, zero, zero)
            sizes = (1, 1, *self.kv.shape[2:])
            copied = jax.lax.dynamic_slice(other.kv, start, sizes)
            at = (zero, layer * self.pages + to_pages[n], zero, zero, zero)
            return self._with(jax.lax.dynamic_update_slice(pool.kv, copied, at))

        return jax.lax.fori_loop(0, count * self.layers, copy, self)

    def _with(self, kv: jax.Array) -> PagedCache:
        return PagedCache(kv, self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LivePages:
    """The pages that one step reads, in the order of rows and positions: made once a step, for all
    layers.

    Attributes:
      row: `[X, M]` int32, lane within the shard.
      number: `[X, M]` int32, of the page within its row.
      page: `[X, M]` int32, of the page in the pool.
      count: `[X]` int32, entries that count.
    """

    row: jax.Array
    number: jax.Array
    page: jax.Array
    count: jax.Array


def live_pages(
    length: jax.Array, table: jax.Array, shards: int, page: int, window: int = 0
) -> LivePages:
    """The list for rows of `length [X * W]` int32 tokens with the pages `table [X * W, N]`.

    Args:
      window: the last positions that a sliding layer sees; 0 for all.
    """

    def one(length: jax.Array, table: jax.Array) -> LivePages:
        rows, most = table.shape
        first = jnp.maximum(length - window, 0) // page if window else jnp.zeros_like(length)
        pages = pages_of(length, page) - first
        ends = jnp.cumsum(pages)
        entry = jnp.arange(rows * most, dtype=jnp.int32)
        row = jnp.searchsorted(ends, entry, side="right").astype(jnp.int32)
        row = jnp.minimum(row, rows - 1)
        number = entry - (ends - pages)[row] + first[row]
        # entries past the last one repeat it
        number = jnp.clip(number, 0, most - 1)
        return LivePages(row, number, table[row, number], ends[-1])

    return jax.vmap(one)(length.reshape(shards, -1), table.reshape(shards, -1, table.shape[1]))
