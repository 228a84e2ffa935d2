"""The GPU kernel of decoding, against a loop over rows and heads in numpy.

Without a GPU it is interpreted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from zip_rc_jax.config import ModelConfig
from zip_rc_jax.models.attention.gpu import (
    BLOCK,
    PART,
    attend_in_place,
    block_and_stages,
    reads_in_place,
)
from zip_rc_jax.models.kv_cache import KEY_AXES, AttentionCache, Cache
from zip_rc_jax.models.transformer import forward_cached, init_params
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, single_device

LAYOUT = single_device()
INTERPRET = LAYOUT.platform != "gpu"


def cache_and_queries(rows, pool, heads, kv_heads, slots, dim, dtype, layers=2):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (layers, 1, pool, kv_heads, slots, dim)
    k, v = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    return AttentionCache(k, v), jax.random.normal(keys[2], (rows, 1, heads, dim), dtype)


def reference(q, cache, layer, length, window):
    """Row by row and head by head, in float64; 0 for rows of length 0."""
    q = np.asarray(q, np.float64)
    k, v = (np.asarray(x[layer, 0], np.float64) for x in (cache.k, cache.v))
    out = np.zeros_like(q)
    groups = q.shape[2] // k.shape[1]
    for row, size in enumerate(length):
        seen = slice(max(0, size - window) if window else 0, size)
        for head in range(q.shape[2] if size else 0):
            keys, values = k[row, head // groups, seen], v[row, head // groups, seen]
            scores = keys @ q[row, 0, head] * 0.3
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = weights / weights.sum() @ values
    return out


def run(q, cache, layer, length, slots, window=0, layout=LAYOUT):
    return attend_in_place(
        layout,
        q,
        cache,
        jnp.int32(layer),
        jnp.asarray(length, jnp.int32),
        slots=slots,
        scale=0.3,
        window=window,
        interpret=INTERPRET,
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3), (8, 1), (18, 1)])
def test_every_row_sees_its_own_slots(heads, kv_heads):
    cache, q = cache_and_queries(5, 7, heads, kv_heads, 96, 32, jnp.float32)
    length = [96, 1, BLOCK, BLOCK + 1, 33]
    np.testing.assert_allclose(
        run(q, cache, 1, length, 96), reference(q, cache, 1, length, 0), atol=2e-6
    )


def test_a_long_row_is_put_together_from_its_parts():
    slots = 2 * PART + 40
    cache, q = cache_and_queries(4, 4, 4, 2, slots, 16, jnp.float32)
    length = [slots, PART, PART + 1, 3]
    np.testing.assert_allclose(
        run(q, cache, 0, length, slots), reference(q, cache, 0, length, 0), atol=2e-6
    )


@pytest.mark.parametrize("window", [1, 10, BLOCK + 3, 900])
def test_a_sliding_layer_sees_the_last_slots(window):
    slots = PART + 100
    cache, q = cache_and_queries(3, 3, 2, 1, slots, 16, jnp.float32)
    length = [slots, 70, 5]
    np.testing.assert_allclose(
        run(q, cache, 0, length, slots, window), reference(q, cache, 0, length, window), atol=2e-6
    )


def test_bfloat16_differs_by_its_rounding_only():
    cache, q = cache_and_queries(3, 3, 4, 2, 128, 64, jnp.bfloat16)
    length = [128, 77, 2]
    found = run(q, cache, 1, length, 128)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), reference(q, cache, 1, length, 0), atol=0.02
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
    assert PART % block == 0


# Scores of heads this large are sums of many products around 15: float32 rounds them, and so the
# weights, by some 5e-6.
@pytest.mark.parametrize(
    ("dim", "dtype", "atol"),
    [(256, jnp.float32, 2e-5), (256, jnp.bfloat16, 0.02), (128, jnp.float32, 2e-5)],
)
@pytest.mark.parametrize("window", [0, 20])
def test_large_heads_are_multiplied_in_smaller_blocks(dim, dtype, atol, window):
    slots = PART + 40
    cache, q = cache_and_queries(5, 5, 4, 2, slots, dim, dtype)
    length = [slots, 1, 16, 17, 33]
    np.testing.assert_allclose(
        run(q, cache, 1, length, slots, window).astype(jnp.float32),
        reference(q, cache, 1, length, window),
        atol=atol,
    )


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, jnp.float32), (128, jnp.bfloat16), (256, jnp.float32), (512, jnp.float32)],
)
def test_the_kernel_loads_as_many_slots_at_once_as_fit(dim, dtype):
    cache, q = cache_and_queries(2, 2, 4, 2, 128, dim, dtype)
    length = jnp.asarray([128, 3], jnp.int32)
    call = jax.make_jaxpr(
        lambda q, cache: attend_in_place(
            LAYOUT, q, cache, jnp.int32(0), length, slots=128, scale=0.1, window=0
        )
    )
    text = str(call(q, cache))
    block, stages = block_and_stages(dim, jnp.dtype(dtype).itemsize)
    assert f"[{dim},{block}]" in text, "the keys of a block, transposed"
    assert f"num_stages={stages}" in text


def test_what_lies_past_a_row_or_belongs_to_no_live_row_is_never_read():
    cache, q = cache_and_queries(3, 4, 4, 2, 96, 32, jnp.float32)
    length = [40, 0, 96]
    clean = run(q, cache, 0, length, 96)
    hidden = np.ones(cache.k.shape, bool)
    for row, size in enumerate(length):
        hidden[0, 0, row, :, :size] = False
    spoilt = AttentionCache(*(jnp.where(hidden, jnp.nan, x) for x in (cache.k, cache.v)))
    found = np.asarray(run(q, spoilt, 0, length, 96))
    assert np.array_equal(found, clean)
    assert not found[1].any()


def test_slots_that_no_row_reaches_are_not_needed():
    cache, q = cache_and_queries(3, 3, 4, 2, 256, 32, jnp.float32)
    length = [64, 20, 1]
    np.testing.assert_allclose(
        run(q, cache, 0, length, 64), run(q, cache, 0, length, 256), atol=1e-6
    )


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_rows_and_heads_stay_on_their_devices():
    layout = Layout(make_mesh(data=4, tensor=2), DECODE_RULES)
    _, q = cache_and_queries(8, 3, 4, 2, 96, 16, jnp.float32)
    shape = (2, 4, 3, 2, 96, 16)  # four shards of three rows; two rows of each are stepped
    sharded = AttentionCache(*(jax.random.normal(jax.random.key(i), shape) for i in (1, 2)))
    flat = AttentionCache(
        *(x[:, :, :2].reshape(2, 1, 8, 2, 96, 16) for x in (sharded.k, sharded.v))
    )
    length = [96, 5, 64, 65, 1, 40, 0, 17]
    text = (
        jax.jit(lambda q, cache: run(q, cache, 1, length, 96, layout=layout))
        .lower(q, layout.shard(sharded, AttentionCache(KEY_AXES, KEY_AXES)))
        .compile()
        .as_text()
    )
    assert not [line for line in text.splitlines() if "all-gather" in line or "all-to-all" in line]
    np.testing.assert_allclose(
        run(q, sharded, 1, length, 96, layout=layout), reference(q, flat, 1, length, 0), atol=2e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_for_a_gpu_it_is_one_kernel_that_is_given_the_whole_cache(dtype):
    """What is compiled on a GPU can be lowered anywhere, for a cache of more than 2^32 bytes
    here."""
    shape = (28, 1, 65, 8, 8192, 128)
    keys, scalar = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), jnp.int32)
    q, length = (
        jax.ShapeDtypeStruct((64, 1, 16, 128), dtype),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    )
    # JAX 0.11 and later ask the mesh which GPU it is compiled for.
    mesh, gpu = (
        LAYOUT.mesh,
        AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    )
    abstract = AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=gpu)
    layout = dataclasses.replace(LAYOUT, mesh=abstract)
    call = jax.jit(
        lambda *inputs: attend_in_place(layout, *inputs, slots=8192, scale=0.1, window=0)
    )
    with use_abstract_mesh(abstract):
        lowered = call.trace(q, AttentionCache(keys, keys), scalar, length).lower(
            lowering_platforms=("cuda",)
        )
    text = lowered.as_text()
    (kernel,) = [
        line for line in text.splitlines() if "stablehlo.custom_call" in line and "triton" in line
    ]
    assert kernel.count("tensor<" + "x".join(map(str, shape))) == 2
    # Nothing else touches keys or values: no slice of a layer, of rows or of slots.
    others = [
        line
        for line in text.splitlines()
        if "stablehlo." in line and "8192x128" in line and line != kernel
    ]
    assert not others


def test_only_single_tokens_on_gpu_with_heads_of_a_power_of_two_are_read_in_place():
    assert reads_in_place(LAYOUT, 1, 64) == (not INTERPRET)
    assert not reads_in_place(LAYOUT, 2, 64)
    assert not reads_in_place(LAYOUT, 1, 80)


@pytest.mark.parametrize(
    "kinds",
    [("attention",) * 3, ("sliding", "sliding", "attention"), ("attention", "conv", "attention")],
)
def test_a_model_that_reads_in_place_gives_the_same_hidden_states(kinds):
    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "d_ff": 48,
    }
    config = ModelConfig(
        **sizes,
        layer_types=kinds,
        sliding_window=5 * ("sliding" in kinds),
        conv_kernel=3 * ("conv" in kinds),
    )
    params, rows, slots = init_params(config, 0), 2, 16
    tokens = jax.random.randint(jax.random.key(1), (rows, 10), 0, 64)

    def decoded(kernel):
        cache = Cache.empty(config, 1, rows + 1, slots, jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(8), (rows, 8))
        hidden, cache = forward_cached(
            config, params, tokens[:, :8], positions, cache, layout=LAYOUT, kernel=kernel
        )
        found = [hidden[:, -1:]]
        for at in range(8, 10):
            out, cache = forward_cached(
                config,
                params,
                tokens[:, at : at + 1],
                jnp.full((rows, 1), at),
                cache,
                layout=LAYOUT,
                kernel=kernel,
            )
            found.append(out)
        return np.asarray(jnp.concatenate(found, 1))

    np.testing.assert_allclose(
        decoded("interpreted" if INTERPRET else "auto"), decoded("plain"), atol=2e-5
    )
