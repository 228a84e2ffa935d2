"""What the GPU kernel of pages does its own way: parts, blocks that fit the shared memory, and what
is compiled for a GPU. `test_page_attention` compares it with numpy in all else.

Without a GPU it is interpreted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from harness.page_attention import attended, reference
from zip_rc_jax.models.attention.gpu import PAGE, PART, attend_pages, block_and_stages, takes
from zip_rc_jax.models.paged_cache import PagedCache
from zip_rc_jax.runtime.sharding import single_device

LAYOUT = single_device()
ROWS = 5


def cache_and_queries(heads, kv_heads, slots, dim, dtype):
    """A pool of two layers, and tables of any pages that hold `slots` slots for each row."""
    pages = -(-slots // PAGE)
    keys = jax.random.split(jax.random.key(0))
    shape = (1, 2 * ROWS * pages, kv_heads, PAGE, 2 * dim)
    cache = PagedCache(jax.random.normal(keys[0], shape, dtype), 2)
    table = np.random.default_rng(0).permutation(ROWS * pages).reshape(ROWS, pages)
    return cache, jax.random.normal(keys[1], (ROWS, 1, heads, dim), dtype), table.astype(np.int32)


@pytest.mark.parametrize("window", [0, 1, 20, 900])
def test_a_long_row_is_put_together_from_its_parts(window):
    slots = 2 * PART + 40
    cache, q, table = cache_and_queries(4, 2, slots, 16, jnp.float32)
    length = [slots, PART, PART + 1, 3, 0]
    np.testing.assert_allclose(
        attended("gpu", q, cache, 0, table, length, window),
        reference(q, cache, 0, table, length, window),
        atol=5e-6,
    )


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "expected"),
    [
        (64, 4, (64, 3)), (128, 2, (64, 3)),  # as measured
        (16, 2, (64, 3)), (64, 2, (64, 3)), (128, 4, (32, 3)), (256, 2, (32, 3)), (256, 4, (16, 3)),
        (512, 2, (16, 3)), (512, 4, (16, 1)),
    ],
)  # fmt: skip
def test_keys_and_values_in_flight_fit_the_shared_memory(head_dim, itemsize, expected):
    block, stages = block_and_stages(head_dim, itemsize)
    assert (block, stages) == expected
    assert 2 * block * head_dim * itemsize * stages <= 96 * 1024
    assert PAGE % block == 0
    assert PART % PAGE == 0


# Scores of heads this large are sums of many products around 15: float32 rounds them, and so the
# weights, by some 5e-6.
@pytest.mark.parametrize(
    ("dim", "dtype", "atol"), [(256, jnp.float32, 2e-5), (256, jnp.bfloat16, 0.02)]
)
def test_large_heads_are_multiplied_in_smaller_blocks(dim, dtype, atol):
    cache, q, table = cache_and_queries(4, 2, PART + 40, dim, dtype)
    length = [PART + 40, 1, 16, 17, 33]
    np.testing.assert_allclose(
        attended("gpu", q, cache, 1, table, length, 20).astype(jnp.float32),
        reference(q, cache, 1, table, length, 20),
        atol=atol,
    )


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, jnp.float32), (128, jnp.bfloat16), (256, jnp.float32), (512, jnp.float32)],
)
def test_the_kernel_loads_as_many_slots_at_once_as_fit(dim, dtype):
    cache, q, table = cache_and_queries(4, 2, 128, dim, dtype)
    options = {"scale": 0.1, "window": 0}
    call = jax.make_jaxpr(
        lambda *arrays: attend_pages(LAYOUT, *arrays[:2], jnp.int32(0), *arrays[2:], **options)
    )
    text = str(call(q, cache, jnp.asarray(table), jnp.ones(ROWS, jnp.int32)))
    block, stages = block_and_stages(dim, jnp.dtype(dtype).itemsize)
    assert f"[{dim},{block}]" in text, "the keys of a block, transposed"
    assert f"num_stages={stages}" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_for_a_gpu_it_is_one_kernel_that_is_given_the_whole_pool(dtype):
    """What is compiled on a GPU can be lowered anywhere; this pool has more than 2^32 bytes."""
    shape = (1, 28 * 8192, 8, PAGE, 256)
    pool, scalar = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), jnp.int32)
    q = jax.ShapeDtypeStruct((64, 1, 16, 128), dtype)
    table, length = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((64, 128), (64,)))
    # JAX 0.11 and later ask the mesh which GPU it is compiled for.
    mesh, gpu = (
        LAYOUT.mesh,
        AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    )
    abstract = AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=gpu)
    layout = dataclasses.replace(LAYOUT, mesh=abstract)
    call = jax.jit(lambda *inputs: attend_pages(layout, *inputs, scale=0.1, window=0))
    with use_abstract_mesh(abstract):
        lowered = call.trace(q, PagedCache(pool, 28), scalar, table, length).lower(
            lowering_platforms=("cuda",)
        )
    text = lowered.as_text()
    (kernel,) = [
        line for line in text.splitlines() if "stablehlo.custom_call" in line and "triton" in line
    ]
    assert kernel.count("tensor<" + "x".join(map(str, shape))) == 1
    # Nothing else touches keys or values: no slice of a layer, of rows or of pages.
    others = [
        line
        for line in text.splitlines()
        if "stablehlo." in line and f"{PAGE}x256" in line and line != kernel
    ]
    assert not others


def test_only_heads_of_a_power_of_two_are_taken():
    assert [dim for dim in (8, 16, 24, 64, 80, 128, 256) if takes(dim)] == [16, 64, 128, 256]
