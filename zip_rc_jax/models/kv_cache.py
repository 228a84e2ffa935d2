"""The decoding cache: an explicit pytree in and out, one row per prefix, for attention and short
convolutions alike.

Rows are laid out `[X, R]`: `X` shards of the mesh's data axis with `R` rows each, so that
everything that moves rows stays inside a shard. A forward steps the first `W` rows of every shard,
in place; its batch is `X * W` lanes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.paged_cache import (
    PAGE_AXES,
    TABLE_AXES,
    PagedCache,
    identity_table,
    pages_of,
)
from zip_rc_jax.models.stacks import segments

# Logical axes of the keys and values of a stack of layers, for `sharding.Layout`.
KEY_AXES = ("layers", "batch", None, "kv_heads", "sequence", "head_dim")


def first_rows(x: jax.Array, width: int) -> jax.Array:
    """The first `width` rows of every shard of `[X, R, ...]`, as lanes `[X * width, ...]`."""
    return x[:, :width].reshape(-1, *x.shape[2:])


def taken_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows `rows [X, W]` of every shard of `[X, R, ...]`, as lanes `[X * W, ...]`.

    Past the end it is the last one. As a batched gather it stays on the shard's devices.
    """
    taken = jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(x, rows)
    return taken.reshape(-1, *x.shape[2:])


def put_rows(x: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
    """`x [X, R, ...]` with lanes `new [X * W, ...]` in the rows `rows [X, W]`; those past the end
    are dropped."""
    new = new.reshape(*rows.shape, *x.shape[2:])
    return jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))(x, rows, new)


def resize_rows(x: jax.Array, shards: int, rows: int) -> jax.Array:
    """Lanes `[X * W, ...]` as `[X * rows, ...]`: the first rows of every shard, or more of them,
    that repeat its last."""
    if len(x) == shards * rows:
        return x
    x = x.reshape(shards, -1, *x.shape[1:])[:, :rows]
    x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), mode="edge")
    return x.reshape(-1, *x.shape[2:])


def copy_row(
    pool: jax.Array,
    source: jax.Array,
    from_row: jax.Array,
    to_row: jax.Array,
    axis: int,
    part: tuple[int, int] | None = None,
) -> jax.Array:
    """One row of `source` into `pool`, in place, where both have their rows on `axis`; a shorter
    row overwrites the beginning.

    Args:
      part: (axis, size): only the first `size` entries of that axis.
    """
    sizes = list(source.shape)
    sizes[axis] = 1
    if part is not None:
        sizes[part[0]] = min(part[1], sizes[part[0]])

    def at(row: jax.Array) -> list[jax.Array]:
        return [row if i == axis else jnp.int32(0) for i in range(pool.ndim)]

    # Cut and picked in one slice: of the whole pool cut first, XLA makes a copy for every row.
    return jax.lax.dynamic_update_slice(
        pool, jax.lax.dynamic_slice(source, at(from_row), sizes), at(to_row)
    )


def _copy_layer(
    pool: jax.Array,
    source: jax.Array,
    layer: jax.Array,
    from_row: jax.Array,
    to_row: jax.Array,
    slots: int,
) -> jax.Array:
    """The first `slots` slots of one layer of one row of `source` into `pool`, both `[L, X, R, K,
    S, D]`, in place."""
    zero = jnp.zeros_like(layer)
    _, _, _, heads, _, dim = source.shape
    copied = jax.lax.dynamic_slice(
        source,
        (layer, zero, from_row, zero, zero, zero),
        (1, 1, 1, heads, min(slots, source.shape[4]), dim),
    )
    return jax.lax.dynamic_update_slice(pool, copied, (layer, zero, to_row, zero, zero, zero))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of a stack of layers.

    Slot `s` of a row holds position `s`; slots at or past the row's length are never read.

    Attributes:
      k, v: `[L, X, R, K, S, D]`. Layers lead because the forward scans over them.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        return self.k.shape[4]

    def copy_row(
        self, source: AttentionCache, from_row: jax.Array, to_row: jax.Array, slots: int
    ) -> AttentionCache:
        """Copies the first `slots` slots of a row of `source`, which may be this very cache; arrays
        of one shard.

        Layer by layer: of a whole row XLA makes an array in HBM and reads it again, and a layer of
          it stays in a TPU's vector memory.
        """

        def layer(i: jax.Array, pool: AttentionCache) -> AttentionCache:
            other = pool if source is self else source
            pairs = ((pool.k, other.k), (pool.v, other.v))
            return AttentionCache(
                *(_copy_layer(mine, theirs, i, from_row, to_row, slots) for mine, theirs in pairs)
            )

        return jax.lax.fori_loop(0, self.k.shape[0], layer, self)

    def append(
        self,
        layer: jax.Array,
        table: jax.Array | None,
        positions: jax.Array,
        live: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> AttentionCache:
        """Writes new keys and values `[X * W, T, K, D]` of one layer to slots `positions [X * W,
        T]` of the rows that are `live`.

        Args:
          table: `[X * W, 1]` int32, the row of every lane; None: lane `i` of a shard has row `i`.
        """
        shards, steps = self.k.shape[1], positions.shape[1]
        # past the end: dropped
        slot = jnp.where(live[:, None], positions, self.slots).reshape(shards, -1, steps)
        width, head = slot.shape[1], jnp.arange(k.shape[2])[None, :, None]
        if table is None:
            rows = jnp.broadcast_to(jnp.arange(width), (shards, width))
        else:
            rows = table[:, 0].reshape(shards, width)

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(shards, -1, *new.shape[1:]).swapaxes(2, 3).astype(cache.dtype)

            def one(cache: jax.Array, row: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
                at = (layer, row[:, None, None], head, slot[:, None, :])
                return cache.at[at].set(new, mode="drop")

            # without a batch axis; a reshape of the cache instead would make XLA copy all of it
            if shards == 1:
                at = (layer, 0, rows[0][:, None, None], head, slot[0, :, None, :])
                return cache.at[at].set(new[0], mode="drop")
            return jax.vmap(one, in_axes=(1, 0, 0, 0), out_axes=1)(cache, rows, slot, new)

        return AttentionCache(write(self.k, k), write(self.v, v))

    def take(self, pages: jax.Array) -> AttentionCache:
        """The rows `[X, N]` alone."""
        taken = jax.vmap(lambda x, at: x.at[:, at].get(mode="clip"), in_axes=(1, 0), out_axes=1)
        return AttentionCache(taken(self.k, pages), taken(self.v, pages))

    def put(self, pages: jax.Array, content: Any) -> AttentionCache:
        """With `content`, an `AttentionCache` of as many rows or a number, in the rows `[X, N]`;
        those past the end are dropped."""
        put = jax.vmap(
            lambda x, at, new: x.at[:, at].set(new, mode="drop"), in_axes=(1, 0, 1), out_axes=1
        )
        return AttentionCache(put(self.k, pages, content.k), put(self.v, pages, content.v))

    def clear(self, pages: jax.Array) -> AttentionCache:
        """Zeros in the rows `[X, N]`."""
        zero = jax.vmap(lambda x, at: x.at[:, at].set(0, mode="drop"), in_axes=(1, 0), out_axes=1)
        return AttentionCache(zero(self.k, pages), zero(self.v, pages))

    def read_first(self, layer: jax.Array, width: int, slots: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[X * width, K, slots, D]` of one layer: the first `slots` slots of the
        first `width` rows of each shard."""

        def part(cache: jax.Array) -> jax.Array:
            _, shards, _, heads, _, dim = cache.shape
            start = (layer, *[jnp.zeros((), layer.dtype)] * 5)
            return jax.lax.dynamic_slice(
                cache, start, (1, shards, width, heads, slots, dim)
            ).reshape(-1, heads, slots, dim)

        return part(self.k), part(self.v)

    def read(self, layer: jax.Array, table: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
        """The same of any rows `table [X * W, 1]`. A copy, for prefill."""
        _, shards, _, heads, _, dim = self.k.shape

        def part(cache: jax.Array) -> jax.Array:
            zero = jnp.zeros((), layer.dtype)

            def one(cache: jax.Array, row: jax.Array) -> jax.Array:
                start = (layer, row.astype(layer.dtype), zero, zero, zero)
                return jax.lax.dynamic_slice(cache, start, (1, 1, heads, slots, dim))

            rows = jax.vmap(one, in_axes=(None, 0))
            picked = jax.vmap(rows, in_axes=(1, 0))(cache, table[:, 0].reshape(shards, -1))
            return picked.reshape(-1, heads, slots, dim)

        return part(self.k), part(self.v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvCache:
    """The last inputs of a stack of short convolutions, as a ring: the input at position `p` lies
    at `p % taps`.

    Attributes:
      inputs: `[L, X, R, taps, d_model]`.
    """

    inputs: jax.Array

    def copy_row(self, source: ConvCache, from_row: jax.Array, to_row: jax.Array) -> ConvCache:
        return ConvCache(copy_row(self.inputs, source.inputs, from_row, to_row, 2))

    def lanes(self, rows: jax.Array) -> ConvCache:
        """Of the rows `[X, W]` alone, in this order; past the end, the last one."""
        picked = jax.vmap(lambda x, at: x.at[:, at].get(mode="clip"), in_axes=(1, 0), out_axes=1)
        return ConvCache(picked(self.inputs, rows))

    def with_lanes(self, lanes: ConvCache, rows: jax.Array) -> ConvCache:
        """With what `lanes` has in place of the rows `[X, W]`; those past the end are dropped."""
        put = jax.vmap(
            lambda x, at, new: x.at[:, at].set(new, mode="drop"), in_axes=(1, 0, 1), out_axes=1
        )
        return ConvCache(put(self.inputs, rows, lanes.inputs))

    def before(self, layer: jax.Array, first: jax.Array) -> jax.Array:
        """Inputs `[X * W, taps - 1, d]` of one layer at the positions just before `first [X * W]`;
        zeros before the sequence."""
        taps, shards = self.inputs.shape[3], self.inputs.shape[1]
        positions = first[:, None] + jnp.arange(1 - taps, 0)
        ring = first_rows(self.inputs[layer], first.shape[0] // shards)
        taken = jnp.take_along_axis(ring, (positions % taps)[..., None], axis=1)
        return jnp.where((positions >= 0)[..., None], taken, 0)

    def append(
        self,
        layer: jax.Array,
        first: jax.Array,
        last: jax.Array,
        live: jax.Array,
        inputs: jax.Array,
    ) -> ConvCache:
        """Stores what later tokens need.

        Args:
          first: `[X * W]` position of the first new token.
          last: `[X * W]` index of the last valid new token.
          live: `[X * W]` bool, rows to write.
          inputs: `[X * W, taps - 1 + T, d]`: what `before` returned, then the new inputs.
        """
        taps, shards = self.inputs.shape[3], self.inputs.shape[1]
        newest = (first + last)[:, None]
        # the position that each ring slot holds afterwards
        held = newest - (newest - jnp.arange(taps)) % taps
        index = held - first[:, None] + taps - 1
        ring = jnp.take_along_axis(inputs, index[..., None], axis=1).astype(self.inputs.dtype)
        width = first.shape[0] // shards
        ring = jnp.where(live[:, None, None], ring, first_rows(self.inputs[layer], width))
        start = (layer, *[jnp.zeros((), layer.dtype)] * 4)
        return ConvCache(
            jax.lax.dynamic_update_slice(
                self.inputs, ring.reshape(1, shards, width, *ring.shape[1:]), start
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of every row in every layer.

    Attributes:
      stacks: per stack of layers (see `stacks.segments`) what it keeps. Attention keeps its keys
        and values in one slot for each row, or in pages.
      table: `[X, W, N]` int32, the pages of every lane that is fed; where a page is a row of slots,
        its number. None: lane `i` of a shard has row `i`.
    """

    stacks: dict[str, AttentionCache | PagedCache | ConvCache]
    table: jax.Array | None = None

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        shards: int,
        rows: int,
        slots: int,
        dtype: jnp.dtype,
        unrolled: bool = False,
        page: int = 0,
        pages: int | None = None,
    ) -> Cache:
        """For `rows` rows in each of `shards` shards; `unrolled` as in `stacks.segments`.

        Args:
          page: slots of a page; 0 for arrays in which a page is a row of `slots` slots.
          pages: of a shard. None: every row has pages of its own, and the table says which.
        """
        caches: dict[str, AttentionCache | PagedCache | ConvCache] = {}
        each = pages_of(slots, page) if page else 1
        total = rows * each if pages is None else pages
        for stack in (
            stack for segment in segments(config.kinds, unrolled) for stack in segment.stacks
        ):
            count = len(stack.layers)
            if stack.kind == "conv":
                caches[stack.name] = ConvCache(
                    jnp.zeros((count, shards, rows, config.conv_kernel, config.d_model), dtype)
                )
            elif page:
                paged = (config.n_kv_heads, page, 2 * config.head_dim)
                kv = jnp.zeros((shards, count * total, *paged), dtype)
                caches[stack.name] = PagedCache(kv, count)
            else:
                shape = (count, shards, total, config.n_kv_heads, slots, config.head_dim)
                caches[stack.name] = AttentionCache(
                    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
                )
        has_table = page and pages is None
        return cls(caches, identity_table(shards, rows, each) if has_table else None)

    @property
    def page(self) -> int:
        """Slots of a page; 0 where it is a whole row."""
        pages = (stack.page for stack in self.stacks.values() if isinstance(stack, PagedCache))
        return next(pages, 0)

    def window(self, lanes: int, slots: int | None, unrolled: bool) -> tuple[int, int, int]:
        """What a forward of `lanes` lanes looks at: shards `X`, rows of each (at least `lanes /
        X`), and slots (at least `slots`).

        That is no more than asked for, unless the layers have arrays of their own and it is most of
        the cache: looking at all of it then costs less than the copy that XLA makes of a part on
          CPU.
        """
        if self.table is not None and self.page:
            shards, _, pages = self.table.shape
            return shards, lanes // shards, slots or pages * self.page
        _, shards, rows, _, total, _ = next(
            stack.k.shape for stack in self.stacks.values() if isinstance(stack, AttentionCache)
        )
        width, slots = lanes // shards, slots or total
        if self.table is not None:
            return shards, width, slots
        return (
            (shards, rows, total)
            if unrolled and 10 * width * slots >= 7 * rows * total
            else (shards, width, slots)
        )

    def axes(self) -> Cache:
        """Logical axis names of every leaf, for `sharding.Layout`."""
        attention = AttentionCache(KEY_AXES, KEY_AXES)  # type: ignore[arg-type]
        conv = ConvCache(("layers", "batch", None, None, "channels"))  # type: ignore[arg-type]

        def of(stack: AttentionCache | PagedCache | ConvCache) -> Any:
            if isinstance(stack, PagedCache):
                return PagedCache(PAGE_AXES, stack.layers)  # type: ignore[arg-type]
            return attention if isinstance(stack, AttentionCache) else conv

        table: Any = None if self.table is None else TABLE_AXES
        return Cache({name: of(stack) for name, stack in self.stacks.items()}, table)

    def lanes(self, rows: jax.Array, table: jax.Array | None) -> Cache:
        """What a forward of lanes with the small state of rows `rows [X, W]` and the pages `table
        [X, W, N]` reads and writes."""
        stacks = {
            name: stack.lanes(rows) if isinstance(stack, ConvCache) else stack
            for name, stack in self.stacks.items()
        }
        return Cache(stacks, table)

    def with_lanes(self, lanes: Cache, rows: jax.Array) -> Cache:
        """What is kept of `lanes` after it."""
        stacks = {
            name: stack.with_lanes(lanes.stacks[name], rows)  # type: ignore[arg-type]
            if isinstance(stack, ConvCache)
            else lanes.stacks[name]
            for name, stack in self.stacks.items()
        }
        return Cache(stacks, None)

    def copy_pages(
        self, from_pages: jax.Array, to_pages: jax.Array, count: jax.Array, slots: int
    ) -> Cache:
        """The first `count` of the pages `to_pages [N]` become those of `from_pages [N]`, one after
        the other, in place; arrays of one shard.

        Args:
          slots: to copy of a page that is a whole row.
        """

        def copied(stack: AttentionCache | PagedCache | ConvCache) -> Any:
            if isinstance(stack, ConvCache):
                return stack
            if isinstance(stack, PagedCache):
                return stack.copy_pages(stack, from_pages, to_pages, count)

            def one(i: jax.Array, stack: AttentionCache) -> AttentionCache:
                return stack.copy_row(stack, from_pages[i], to_pages[i], slots)

            return jax.lax.fori_loop(0, count, one, stack)

        return Cache({name: copied(stack) for name, stack in self.stacks.items()}, self.table)

    def copy_slot(self, source: jax.Array, target: jax.Array) -> Cache:
        """What is kept of a sequence besides its pages, in place; arrays of one shard."""
        stacks = {
            name: stack.copy_row(stack, source, target) if isinstance(stack, ConvCache) else stack
            for name, stack in self.stacks.items()
        }
        return Cache(stacks, self.table)

    def take_pages(self, pages: jax.Array) -> dict[str, Any]:
        """What lies in the pages `[X, N]`, to be put back by `put_pages`."""
        return {
            name: stack.take(pages)
            for name, stack in self.stacks.items()
            if not isinstance(stack, ConvCache)
        }

    def put_pages(self, pages: jax.Array, content: dict[str, Any]) -> Cache:
        """`take_pages` undone; pages past the end are dropped."""
        stacks = {
            name: stack if isinstance(stack, ConvCache) else stack.put(pages, content[name])
            for name, stack in self.stacks.items()
        }
        return Cache(stacks, self.table)

    def take_slots(self, slots: jax.Array) -> dict[str, Any]:
        """What is kept of the sequences in slots `[X, N]` besides their pages."""
        return {
            name: stack.lanes(slots)
            for name, stack in self.stacks.items()
            if isinstance(stack, ConvCache)
        }

    def put_slots(self, slots: jax.Array, content: dict[str, Any]) -> Cache:
        """`take_slots` undone; slots past the end are dropped."""
        stacks = {
            name: stack.with_lanes(content[name], slots) if isinstance(stack, ConvCache) else stack
            for name, stack in self.stacks.items()
        }
        return Cache(stacks, self.table)

    def clear_pages(self, pages: jax.Array) -> Cache:
        """Zeros in the pages `[X, N]`; those past the end are dropped."""

        def cleared(stack: AttentionCache | PagedCache | ConvCache) -> Any:
            return stack if isinstance(stack, ConvCache) else stack.clear(pages)

        return Cache({name: cleared(stack) for name, stack in self.stacks.items()}, self.table)
