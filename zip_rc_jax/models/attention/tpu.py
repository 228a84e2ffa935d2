"""Attention of one new token per row over pages, as a TPU kernel (Pallas, through Mosaic).

XLA would gather the pages of every row, as many as the longest one has, into an array of their own.
This kernel goes through a list of the pages that exist. Each is read once, where it lies: the next
one is on its way while one is multiplied, for the list tells beforehand where it is.

A program of its grid takes one page of one row with all its heads. The softmax is online: maximum,
denominator and mean are kept in the vector memory until the row's last page.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.models.paged_cache import PAGE_AXES, LivePages, PagedCache
from zip_rc_jax.runtime.sharding import Layout

PAGE = 128  # slots: a tile of scores then has all 128 lanes
LANES = 128
LEAST = -1e30  # finite: the difference of two of them is 0 and not NaN


def attend_pages(
    layout: Layout,
    q: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    listed: LivePages,
    length: jax.Array,
    *,
    scale: float,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query attention of one token per row to the first `length` slots of its row.

    Scores and softmax in float32.

    Args:
      layout: rows and heads stay on the devices that hold them.
      q: `[X * W, 1, H, D]`: `W` rows of each of the cache's `X` shards.
      cache: of a stack of layers.
      layer: scalar int32, which of them.
      listed: of these lengths and this window.
      length: `[X * W]` int32. A row of length 0 reads nothing, and its output is 0.
      scale: factor of the scores.
      window: the last slots that a sliding layer sees; 0 for all.
      interpret: run as plain JAX operations, on any platform (for tests).

    Returns:
      `[X * W, 1, H, D]` in the dtype of `q`.
    """
    queries, rows = layout.spec(("batch", None, "heads", "head_dim")), layout.spec(("batch",))
    pool, table = layout.spec(PAGE_AXES), layout.spec(("batch", None))
    lists = LivePages(table, table, table, rows)  # type: ignore[arg-type]

    def local(
        q: jax.Array, kv: jax.Array, base: jax.Array, listed: LivePages, length: jax.Array
    ) -> jax.Array:
        own = jax.tree.map(lambda x: x[0], listed)
        out = _attend(q[:, 0], kv[0], base, own, length, scale, window, interpret)
        return jnp.where((length > 0)[:, None, None], out, 0)[:, None]

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(queries, pool, jax.sharding.PartitionSpec(), lists, rows),
        out_specs=queries,
        check_vma=False,
    )(q, cache.kv, layer * cache.pages, listed, length)


def _attend(
    q: jax.Array,
    kv: jax.Array,
    base: jax.Array,
    listed: LivePages,
    length: jax.Array,
    scale: float,
    window: int,
    interpret: bool,
) -> jax.Array:
    """`attend_pages` on one device: `q [W, H, D]`, `kv [L * P, K, page, 2 D]`; `base` is the number
    of the layer's first page. Rows of length 0 are not written."""
    # only TPUs need it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, dim = q.shape
    kv_heads = kv.shape[1]
    groups = heads // kv_heads
    # Queries of one key/value head fill whole tiles. Keys and values are cut apart where that is
    # free. Else queries have zeros where the values lie, and the means of the keys are dropped.
    apart = dim % LANES == 0
    width = dim if apart else 2 * dim
    tile = 8 * 4 // q.dtype.itemsize
    padded = -(-groups // tile) * tile
    queries = jnp.pad(
        q.reshape(rows, kv_heads, groups, dim),
        ((0, 0), (0, 0), (0, padded - groups), (0, width - dim)),
    )
    block = pl.BlockSpec(
        (1, kv_heads, padded, width), lambda j, row, number, page, length: (row[j], 0, 0, 0)
    )
    pages = pl.BlockSpec(
        (1, *kv.shape[1:]), lambda j, row, number, page, length: (page[j], 0, 0, 0)
    )
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale, window=window, dim=dim if apart else 0),
        out_shape=jax.ShapeDtypeStruct((rows, kv_heads, padded, width), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(jnp.maximum(listed.count, 1),),  # at least one program: it sees nothing
            in_specs=[block, pages],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((kv_heads, padded, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, padded, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, padded, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="attend_pages",
    )(listed.row, listed.number, base + listed.page, length, queries, kv)
    return out[:, :, :groups, width - dim :].reshape(rows, heads, dim)


def _kernel(
    row_ref: Any,
    number_ref: Any,
    page_ref: Any,
    length_ref: Any,
    q_ref: Any,
    kv_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    acc_ref: Any,
    *,
    scale: float,
    window: int,
    dim: int,
) -> None:
    """One page of one row, all heads.

    `q_ref`, `out_ref [1, K, G, width]`, `kv_ref [1, K, page, 2 D]`; `top_ref`, `total_ref [K, G,
    128]` hold one number per query in all lanes, `acc_ref [K, G, width]`.

    Args:
      dim: where the values begin if they are cut from the keys, else 0.
    """
    from jax.experimental import pallas as pl

    del page_ref  # it chose the block
    entry = pl.program_id(0)
    row, number = row_ref[entry], number_ref[entry]
    length, page = length_ref[row], kv_ref.shape[2]

    # A new row begins.
    @pl.when((entry == 0) | (row != row_ref[jnp.maximum(entry - 1, 0)]))
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def seen(shape: tuple[int, ...], axis: int) -> jax.Array:
        """Which slots of the page the query sees, along `axis`."""
        at = number * page + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (at < length) & (at >= length - window) if window else at < length

    # float32 is multiplied as such: by default a TPU rounds it to bfloat16
    exact = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    product = functools.partial(
        jax.lax.dot_general, preferred_element_type=jnp.float32, precision=exact
    )
    for head in range(kv_ref.shape[1]):
        kv = kv_ref[0, head]
        # What nobody may see may be NaN, which 0 times would not hide.
        kv = jnp.where(seen(kv.shape, 0), kv, 0)
        keys, values = (kv[:, :dim], kv[:, dim:]) if dim else (kv, kv)
        scores = product(q_ref[0, head], keys, (((1,), (1,)), ((), ()))) * scale
        visible = seen(scores.shape, 1)
        scores = jnp.where(visible, scores, LEAST)
        old = top_ref[head][:, :1]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new), 0)
        kept = jnp.exp(old - new)
        top_ref[head] = jnp.broadcast_to(new, top_ref.shape[1:])
        total = jnp.sum(weights, axis=1, keepdims=True)
        total_ref[head] = total_ref[head] * kept + jnp.broadcast_to(total, total_ref.shape[1:])
        mean = product(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
        acc_ref[head] = acc_ref[head] * kept + mean

    # The row's last page.
    @pl.when((number + 1) * page >= length)
    def _() -> None:
        total = jnp.maximum(total_ref[...][..., :1], 1e-30)
        out_ref[0] = (acc_ref[...] / total).astype(out_ref.dtype)
