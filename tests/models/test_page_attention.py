"""Pages of keys and values: the kernels for TPU and GPU against a loop over rows and heads in
numpy, the cache against one that has a slot for each row.

On other platforms the kernels are interpreted.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.configs import EACH_MODEL, parameters
from harness.forwards import copied, fast_jit, gathered
from harness.page_attention import attended, reference
from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.kv_cache import Cache
from zip_rc_jax.models.paged_cache import (
    PAGE_AXES,
    PagedCache,
    identity_table,
    live_pages,
    pages_of,
)
from zip_rc_jax.models.transformer import forward_cached
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, single_device

LAYOUT = single_device()
# One that cannot run here and is not interpreted is left out.
KERNELS = [name for name in ("tpu", "gpu") if LAYOUT.platform in ("cpu", name)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
LAYERS = 2
# Slots, pages and rows of the kernel's tests.
PAGES, ROWS, MOST = 24, 5, 4
# Heads, key/value heads and channels of Qwen3, SmolLM2 and Gemma 3, with as few heads as show it;
# and more queries for each key than a product on a GPU takes at least.
SHAPES = [(4, 2, 128), (9, 3, 64), (4, 1, 256), (18, 1, 32)]
# Channels that are no power of two: the GPU leaves them to XLA.
ODD = (3, 3, 24)


def pool_and_queries(heads, kv_heads, dim, page, dtype=jnp.float32, shards=1, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    kv = jax.random.normal(keys[0], (shards, LAYERS * PAGES, kv_heads, page, 2 * dim), dtype)
    return PagedCache(kv, LAYERS), jax.random.normal(keys[1], (shards * ROWS, 1, heads, dim), dtype)


def tables(seed, shards=1):
    """Pages of every row in any order; all rows of a shard share the first one."""
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(PAGES)[:MOST] for _ in range(shards * ROWS)])
    table[:, 0] = 3
    return table.astype(np.int32)


@pytest.mark.parametrize(
    ("kernel", "heads", "kv_heads", "dim"),
    [
        (kernel, *shape)
        for kernel in KERNELS
        for shape in [*SHAPES, ODD]
        if kernel != "gpu" or shape != ODD
    ],
)
def test_every_row_sees_the_positions_of_its_own_pages(heads, kv_heads, dim, kernel):
    """Lengths at the borders of pages, no length at all, and a page that all rows share."""
    cache, q = pool_and_queries(heads, kv_heads, dim, 16)
    table, length = tables(0), [1, 16, 17, 64, 0]
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            attended(kernel, q, cache, layer, table, length),
            reference(q, cache, layer, table, length),
            atol=1e-5,
        )


@every_kernel
@pytest.mark.parametrize("page", [8, 16, 64, 128])
def test_any_tables_and_lengths_with_pages_of_any_size(page, kernel):
    cache, q = pool_and_queries(4, 2, 16, page)
    for seed in range(3):
        table = tables(seed)
        length = np.random.default_rng(seed).integers(0, MOST * page + 1, ROWS)
        np.testing.assert_allclose(
            attended(kernel, q, cache, 1, table, length),
            reference(q, cache, 1, table, length),
            atol=1e-5,
        )


@every_kernel
@pytest.mark.parametrize("window", [1, 10, 16, 17, 40, 200])
def test_a_sliding_layer_sees_the_last_positions_and_reads_only_their_pages(window, kernel):
    cache, q = pool_and_queries(2, 1, 16, 16)
    table, length = tables(1), [64, 33, 16, 5, 0]
    np.testing.assert_allclose(
        attended(kernel, q, cache, 0, table, length, window),
        reference(q, cache, 0, table, length, window),
        atol=1e-5,
    )
    listed = live_pages(jnp.asarray(length), jnp.asarray(table), 1, 16, window)
    read = {(row, at // 16) for row, size in enumerate(length) for at in range(size)[-window:]}
    count = int(listed.count[0])
    entries = jnp.stack([listed.row[0, :count], listed.number[0, :count]], axis=1)
    found = [tuple(entry) for entry in entries.tolist()]
    assert found == sorted(read)
    assert listed.page[0, :count].tolist() == [table[row, number] for row, number in found]


@every_kernel
def test_without_any_live_row_all_outputs_are_0(kernel):
    cache, q = pool_and_queries(2, 1, 16, 16)
    assert not attended(kernel, q, cache, 0, tables(0), [0] * ROWS).any()


@every_kernel
def test_what_no_row_sees_reaches_nobody_whatever_it_holds(kernel):
    """NaN in the pages of others, and behind the last position of a row's own."""
    cache, q = pool_and_queries(9, 3, 64, 16)
    table, length = tables(2), [5, 16, 33, 1, 64]
    seen = np.zeros((PAGES, 16), bool)
    for row, size in enumerate(length):
        for at in range(size):
            seen[table[row, at // 16], at % 16] = True
    hidden = jnp.asarray(np.tile(~seen, (LAYERS, 1))[None, :, None, :, None])
    assert hidden.any()
    spoilt = dataclasses.replace(cache, kv=jnp.where(hidden, jnp.nan, cache.kv))
    np.testing.assert_array_equal(
        attended(kernel, q, spoilt, 1, table, length), attended(kernel, q, cache, 1, table, length)
    )


@every_kernel
def test_bfloat16_differs_by_its_rounding_only(kernel):
    cache, q = pool_and_queries(9, 3, 64, 16, jnp.bfloat16)
    table, length = tables(3), [64, 17, 2, 1, 50]
    found = attended(kernel, q, cache, 1, table, length)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), reference(q, cache, 1, table, length), atol=0.02
    )


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@every_kernel
def test_pages_and_heads_stay_on_their_devices(kernel):
    layout = Layout(make_mesh(data=4, tensor=2), DECODE_RULES)
    cache, q = pool_and_queries(4, 2, 16, 16, shards=4)
    table, length = tables(4, shards=4), np.arange(4 * ROWS) * 3
    sharded = layout.shard(cache, PagedCache(PAGE_AXES, LAYERS))
    arguments = kernel, q, sharded, 1, table, length
    text = attended.lower(*arguments, layout=layout).compile().as_text()
    assert not [line for line in text.splitlines() if "all-gather" in line or "all-to-all" in line]
    np.testing.assert_allclose(
        attended(*arguments, layout=layout), reference(q, cache, 1, table, length), atol=1e-5
    )


# ---- the cache


@pytest.mark.parametrize(("slots", "pages"), [(1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_row_has_as_many_pages_as_hold_its_slots(slots, pages):
    assert pages_of(slots, 16) == pages
    assert (
        identity_table(2, 3, pages).tolist()
        == [np.arange(3 * pages).reshape(3, pages).tolist()] * 2
    )


LLAMA = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48
)
SLOTS, STEPS = 24, 3


@functools.partial(fast_jit, static_argnames=("config", "kernel"))
def _forward(config, params, tokens, positions, cache, last, kernel):
    return forward_cached(
        config, params, tokens, positions, cache, layout=LAYOUT, last=last, kernel=kernel
    )


def decoded(config, page, kernel="plain", shards=1, table=None):
    """Hidden states of a prefill with rows of several lengths, which then change their places, and
    of some steps."""
    params, rows = jax.tree.map(jnp.asarray, parameters(config)), 2 * shards
    tokens = jax.random.randint(jax.random.key(1), (rows, 15), 0, config.vocab_size)
    length = 8 + jnp.arange(rows) % 2 * 4
    source = Cache.empty(config, shards, 2, SLOTS, jnp.float32, page=page)
    positions = jnp.broadcast_to(jnp.arange(12), (rows, 12))
    found, pool = _forward(
        config, params, tokens[:, :12], positions, source, length - 1, kernel=kernel
    )
    states = [np.asarray(found)]
    if shards == 1:
        source, pool = pool, Cache.empty(config, 1, 4, SLOTS, jnp.float32, page=page)
        if table is not None:
            pool = dataclasses.replace(pool, table=table)
        pool = gathered(pool, source, jnp.asarray([0, 1]), jnp.asarray([1, 0]))
        for from_row, to_row in ((1, 3), (0, 1), (3, 0), (0, 2)):
            pool = copied(pool, from_row, to_row, 12)
    for step in range(STEPS):
        at = length + step
        token = jnp.take_along_axis(tokens, at[:, None], axis=1)
        last = jnp.zeros(rows, int)
        out, pool = _forward(config, params, token, at[:, None], pool, last, kernel=kernel)
        states.append(np.asarray(out))
    return states


def test_a_model_reads_from_pages_what_it_reads_from_slots():
    """Full and sliding attention, and convolutions, with pages in any order: by XLA bit for bit, by
    the kernel up to the order of sums."""
    config = dataclasses.replace(EACH_MODEL, head_dim=16)  # what the GPU's kernel takes
    assert set(config.kinds) == {"attention", "sliding", "conv"}
    expected = decoded(config, 0)
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(12).reshape(1, 4, 3), jnp.int32)
    for mine, theirs in zip(decoded(config, 8, table=shuffled), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for kernel in KERNELS:
        found = decoded(config, 8, kernel, table=shuffled)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize(("kernel", "dim"), [("triton", 16), ("gpu", 24)])
def test_a_kernel_that_is_asked_for_is_never_replaced_by_another(kernel, dim):
    with pytest.raises(ValueError, match=kernel):
        decoded(dataclasses.replace(LLAMA, head_dim=dim), 8, kernel)


def test_so_it_does_in_several_shards():
    expected = decoded(LLAMA, 0, shards=2)
    for mine, theirs in zip(decoded(LLAMA, 8, shards=2), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_row_that_is_not_live_writes_nothing_and_nothing_is_written_past_the_end():
    cache = Cache.empty(LLAMA, 1, 2, 16, jnp.float32, page=8)
    (name,) = cache.stacks
    stack, table = cache.stacks[name], cache.table[0]
    new = jnp.ones((2, 1, 2, 16))
    live = jnp.asarray([True, False])
    written = stack.append(jnp.int32(1), table, jnp.asarray([[9], [3]]), live, new, 2 * new).kv[0]
    # Layer 1 of four pages each: slot 9 of row 0 is slot 1 of its second page.
    assert np.argwhere(np.asarray(written)[:, 0, :, 0]).tolist() == [[4 + 1, 1]]
    assert (written[5, :, 1, :16] == 1).all()
    assert (written[5, :, 1, 16:] == 2).all()
    past = stack.append(jnp.int32(1), table, jnp.asarray([[16], [-0]]), live, new, new)
    assert not past.kv.any()
