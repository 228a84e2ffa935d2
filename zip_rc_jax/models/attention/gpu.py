"""Attention of one new token per row over pages, as a GPU kernel (Pallas, through Triton).

XLA copies the part of the cache that is looked at before it multiplies with it, in every layer and
step. This kernel reads the pages where they lie, each row up to its length, and leaves out the rows
that are not live (docs/gpu.md has figures of one without pages).

A program of its grid takes one row, one key/value head and one part of the slots. It goes through
blocks of slots with an online softmax. The parts are combined afterwards (as in FlashDecoding), so
that a few long rows also keep the whole GPU busy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.models.paged_cache import PAGE_AXES, PagedCache
from zip_rc_jax.runtime.sharding import Layout

PAGE = 64  # slots: a block that is multiplied at once never needs two
# slots that are multiplied at once; a matrix product in Triton takes no fewer
BLOCK, LEAST_BLOCK = 64, 16
STAGES = 3  # blocks in flight: one is multiplied while the next are read
# of shared memory for keys and values; an A100 has 163 KiB of it, an RTX 4090 99
TILE_BYTES = 96 * 2**10
PART = 512  # slots of one program
# of a matrix product on tensor cores; those of one key/value head are padded to it
LEAST_QUERIES = 16


def takes(head_dim: int) -> bool:
    """Whether `attend_pages` takes heads of this size: a power of two."""
    return head_dim & (head_dim - 1) == 0 and head_dim >= 16


def block_and_stages(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Slots that are multiplied at once, and blocks in flight, so that keys and values of all
    stages fit `TILE_BYTES`.

    Heads of 64 channels in float32 and of 128 in bfloat16, which were measured (docs/gpu.md), just
    fit with `BLOCK` and `STAGES`; larger ones would ask for more shared memory than a GPU has, so
    their blocks shrink, and at `LEAST_BLOCK` the stages do.

    Args:
      head_dim: channels of a head, a power of two.
      itemsize: bytes of one.

    Returns:
      A power of two from `LEAST_BLOCK` to `BLOCK`, and 1 to `STAGES`.
    """
    slots = TILE_BYTES // (2 * head_dim * itemsize)  # over all stages
    stages = max(1, min(STAGES, slots // LEAST_BLOCK))
    block = BLOCK
    while block > LEAST_BLOCK and block * stages > slots:
        block //= 2
    return block, stages


def attend_pages(
    layout: Layout,
    q: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    table: jax.Array,
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
      table: `[X * W, N]` int32, the pages of these rows.
      length: `[X * W]` int32. A row of length 0 reads nothing, and its output is 0.
      scale: factor of the scores.
      window: the last slots that a sliding layer sees; 0 for all.
      interpret: run as plain JAX operations, on any platform (for tests).

    Returns:
      `[X * W, 1, H, D]` in the dtype of `q`.
    """
    queries = layout.spec(("batch", None, "heads", "head_dim"))
    rows, tables = layout.spec(("batch",)), layout.spec(("batch", None))
    local = functools.partial(_attend, scale=scale, window=window, interpret=interpret)
    specs = (queries, layout.spec(PAGE_AXES), jax.sharding.PartitionSpec(), tables, rows)
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False
    )(q, cache.kv, layer * cache.pages, table, length)


def _attend(
    q: jax.Array,
    kv: jax.Array,
    base: jax.Array,
    table: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    window: int,
    interpret: bool,
) -> jax.Array:
    """`attend_pages` on one device's rows and heads; `base` is the number of the layer's first
    page."""
    # a tenth of the time that JAX takes to import, and only GPUs need it
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    rows, _, heads, dim = q.shape
    _, _, kv_heads, page, _ = kv.shape
    groups, parts = heads // kv_heads, pl.cdiv(table.shape[1] * page, PART)
    block, stages = block_and_stages(dim, kv.dtype.itemsize)

    def whole(*shape: int | None) -> Any:
        """All of an array; the kernel loads what it wants. None leaves out an axis of size 1."""
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    queries, shape = (rows, kv_heads, groups, dim), (parts, rows, kv_heads, groups)
    out, log_sum = pl.pallas_call(
        functools.partial(
            _kernel, groups=groups, block=min(block, page), scale=scale, window=window
        ),
        grid=(rows, kv_heads, parts),
        in_specs=[
            whole(*queries),
            whole(None, *kv.shape[1:]),
            whole(1),
            whole(*table.shape),
            whole(rows),
        ],
        out_specs=[whole(*shape, dim), whole(*shape)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="attend_pages",
    )(q.reshape(queries), kv, base[None], table, length)
    if parts > 1:
        share = jnp.exp(log_sum - jnp.max(log_sum, axis=0))
        out = jnp.sum(out * (share / jnp.sum(share, axis=0))[..., None], axis=0)
    return out.reshape(rows, 1, heads, dim).astype(q.dtype)


def _kernel(
    q_ref: Any,
    kv_ref: Any,
    base_ref: Any,
    table_ref: Any,
    length_ref: Any,
    out_ref: Any,
    log_sum_ref: Any,
    *,
    groups: int,
    block: int,
    scale: float,
    window: int,
) -> None:
    """One row, one key/value head, one part of the slots: the part's own mean of the values, and
    the log of its softmax's denominator.

    `q_ref [W, K, G, D]`, `kv_ref [L * P, K, page, 2 D]`, `base_ref [1]`, `table_ref [W, N]`,
    `length_ref [W]`, `out_ref [parts, W, K, G, D]`, `log_sum_ref [parts, W, K, G]`. A page holds
    whole blocks.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    row, head, part = (pl.program_id(axis) for axis in range(3))
    base, length = base_ref[0], length_ref[row]
    dim, page = q_ref.shape[-1], kv_ref.shape[2]
    padded = max(LEAST_QUERIES, pl.next_power_of_2(groups))
    real = jnp.arange(padded) < groups
    # The mask leaves the padding out, but JAX 0.11 and later refuse a constant slice past the end.
    # So the start is a 0 that JAX does not know.
    heads = pl.ds(jnp.minimum(row, 0), padded)
    q = plgpu.load(q_ref.at[row, head, heads, :], mask=real[:, None], other=0)
    stop = jnp.minimum(length, (part + 1) * PART)
    first = jnp.maximum(part * PART, length - window if window else 0)
    # float32 is multiplied as such: the tensor cores' TF32 would round it.
    product = functools.partial(
        jnp.dot, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )

    def step(
        i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, top, total = carry
        slot = i * block + jnp.arange(block)
        visible = (slot >= first) & (slot < stop)
        # Where the block lies: in which page, and from where on.
        at = (base + table_ref[row, i * block // page], head, pl.ds(i * block % page, block))
        k = plgpu.load(kv_ref.at[*at, pl.ds(0, dim)], mask=visible[:, None], other=0)
        # finite: the difference of two of them is 0 and not NaN
        scores = jnp.where(visible[None, :], product(q, k.T) * scale, -1e30)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(visible[None, :], jnp.exp(scores - new[:, None]), 0)
        kept = jnp.exp(top - new)
        v = plgpu.load(kv_ref.at[*at, pl.ds(dim, dim)], mask=visible[:, None], other=0)
        return (
            kept[:, None] * acc + product(weights.astype(v.dtype), v),
            new,
            kept * total + jnp.sum(weights, axis=1),
        )

    none = jnp.full((padded,), -1e30, jnp.float32), jnp.zeros((padded,), jnp.float32)
    blocks = (first // block, pl.cdiv(stop, block))
    acc, top, total = jax.lax.fori_loop(
        *blocks, step, (jnp.zeros((padded, dim), jnp.float32), *none)
    )
    total = jnp.maximum(total, 1e-30)
    plgpu.store(out_ref.at[part, row, head, heads, :], acc / total[:, None], mask=real[:, None])
    plgpu.store(log_sum_ref.at[part, row, head, heads], top + jnp.log(total), mask=real)
