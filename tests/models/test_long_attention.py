"""Attention that never holds `[T, T]` scores: equal to plain attention in values and gradients,
also packed, sliding and on a mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask,
    splash_attention_mask_info,
)
from jax.extend.core import jaxprs_in_params

from harness.forwards import fast_jit
from harness.tiny import TINY_GRID, TINY_MODEL, randomised
from zip_rc_jax.aot import programs
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.models.attention import full as attention
from zip_rc_jax.models.attention.full import (
    choose_attention,
    packed_attention,
    packed_mask,
    visible_blocks,
)
from zip_rc_jax.models.transformer import forward_packed, init_params
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.training.step import TrainSpec, train_step

ONE = Layout(make_mesh(), TRAIN_RULES)
MESH = Layout(make_mesh(data=2, fsdp=2, tensor=2), TRAIN_RULES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short row."""
    monkeypatch.setattr(attention, "CHUNK_BLOCK", 8)
    monkeypatch.setattr(attention, "CPU_CHUNK_BLOCK", 8)
    monkeypatch.setattr(attention, "SPLASH_BLOCKS", (128,))


def packed_rows(rows, steps, seed=0):
    """Segments of random lengths, the last of each row padding (0)."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, steps), np.int32)
    for row in ids:
        cuts = np.sort(rng.choice(np.arange(1, steps), 4, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            row[start:end] = number
    return jnp.asarray(ids)


def inputs(rows, steps, heads, kv_heads, dim, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    shapes = [(rows, steps, heads, dim), (rows, kv_heads, steps, dim), (rows, kv_heads, steps, dim)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def naive(q, k, v, ids, scale, window):
    """One query at a time, over the keys that it may see."""
    q, k, v, ids = (np.asarray(x, np.float64) for x in (q, k, v, ids))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        first = max(0, t - window + 1) if window else 0
        seen = [s for s in range(first, t + 1) if ids[b, s] == ids[b, t]]
        keys, values = (x[b, h // (q.shape[2] // k.shape[1])][seen] for x in (k, v))
        scores = scale * keys @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ values / weights.sum()
    return out


def value_and_gradients(name, layout, arrays, ids, window, scale=0.3):
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(arrays[0].shape), jnp.float32)

    def total(q, k, v, ids):
        out = packed_attention(name, layout, ids, scale, window)(q, k, v)
        return jnp.sum(weights * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(
        *arrays, ids
    )
    return out, gradients


@pytest.mark.parametrize("window", [0, 2, 5, 8, 19], ids=lambda w: f"window{w}")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 2, 10), (3, 3, 8), (4, 1, 6)],
    ids=["grouped", "full", "single"],
)
def test_chunked_attention_equals_every_query_on_its_own(heads, kv_heads, dim, window):
    """Rows of 37 tokens in blocks of 8: the last block is padded."""
    ids, arrays = packed_rows(2, 37), inputs(2, 37, heads, kv_heads, dim)
    out, gradients = value_and_gradients("chunked", ONE, arrays, ids, window)
    np.testing.assert_allclose(out, naive(*arrays, ids, 0.3, window), atol=1e-5)
    plain, plain_gradients = value_and_gradients("plain", ONE, arrays, ids, window)
    np.testing.assert_allclose(out, plain, atol=1e-5)
    for found, expected in zip(gradients, plain_gradients, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    ids, arrays = packed_rows(2, 37), inputs(2, 37, 4, 2, 10)
    arrays[0] = arrays[0] * 300
    out, gradients = value_and_gradients("chunked", ONE, arrays, ids, 0)
    np.testing.assert_allclose(out, naive(*arrays, ids, 0.3, 0), atol=1e-4)
    assert all(np.isfinite(g).all() for g in gradients)


def test_chunked_attention_in_bfloat16_is_as_close_as_plain_attention():
    ids, arrays = packed_rows(2, 40), inputs(2, 40, 4, 2, 16)
    exact, exact_gradients = value_and_gradients("plain", ONE, arrays, ids, 0)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    errors = []
    for name in ("plain", "chunked"):
        out, gradients = value_and_gradients(name, ONE, half, ids, 0)
        assert out.dtype == jnp.bfloat16
        assert all(g.dtype == jnp.bfloat16 for g in gradients)
        errors.append(
            [
                float(jnp.abs(a - b).max())
                for a, b in zip((out, *gradients), (exact, *exact_gradients), strict=True)
            ]
        )
    assert np.all(np.array(errors[1]) < 1.5 * np.array(errors[0]) + 1e-3), errors


@pytest.mark.parametrize("name", ["chunked", "splash"])
def test_rows_and_heads_on_eight_devices_equal_one(name):
    steps, dim = (40, 8) if name == "chunked" else (128, 128)
    ids, arrays = packed_rows(4, steps), inputs(4, steps, 4, 2, dim)
    one, eight = (value_and_gradients(name, layout, arrays, ids, 0) for layout in (ONE, MESH))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("dim", "window"), [(128, 0), (64, 0), (128, 150)])
def test_the_tpu_kernel_equals_plain_attention(dim, window):
    """Interpreted; two blocks of 128 tokens."""
    ids, arrays = packed_rows(1, 256), inputs(1, 256, 4, 2, dim)
    found, expected = (
        value_and_gradients(name, ONE, arrays, ids, window, scale=dim**-0.5)
        for name in ("splash", "plain")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_whole_model_with_sliding_layers_and_convolutions_trains_the_same():
    config = dataclasses.replace(
        TINY_MODEL, layer_types=("sliding", "conv", "attention"), sliding_window=11, conv_kernel=3
    )
    params = randomised(init_params(config, 0), 1)
    ids = packed_rows(2, 37)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, config.vocab_size, ids.shape))
    first = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in np.asarray(ids)])
    positions = jnp.arange(37) - first

    @functools.partial(fast_jit, static_argnames=("name",))
    def gradient(params, name):
        def loss(params):
            hidden = forward_packed(
                config, params, tokens, positions, ids, layout=ONE, remat=True, attention=name
            )
            return jnp.square(hidden @ jnp.arange(1.0, config.d_model + 1)).mean()

        return jax.grad(loss)(params)

    plain, chunked = gradient(params, "plain"), gradient(params, "chunked")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max()), plain, chunked
    )


# ---- which blocks


@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("steps", [8, 40, 43])
def test_the_blocks_are_those_in_which_anything_is_visible(steps, window):
    mask = np.asarray(packed_mask(jnp.ones((1, steps), jnp.int32), window))[0]
    count = -(-steps // 8)
    wanted = [
        (i, j)
        for i in range(count)
        for j in range(count)
        if mask[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].any()
    ]
    assert visible_blocks(steps, 8, window).tolist() == [list(pair) for pair in wanted]


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("seed", range(4))
def test_of_packed_rows_only_blocks_with_a_segment_in_common_are_looked_at(seed, window):
    ids = packed_rows(2, 64, seed)
    mask = np.asarray(packed_mask(ids, window)).any(axis=0)
    wanted = [
        (i, j)
        for i in range(8)
        for j in range(8)
        if mask[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].any()
    ]
    (queries, keys, starts), count = attention._pairs(8, window, ids)
    found = list(zip(queries[:count].tolist(), keys[:count].tolist(), strict=True))
    assert found == sorted(found)
    assert found == wanted
    assert [pair for pair, start in zip(found, starts.tolist(), strict=False) if start] == [
        min(pair for pair in found if pair[0] == i) for i in range(8)
    ]


@pytest.mark.parametrize("window", [0, 100, 128, 200])
def test_the_tpu_kernel_runs_exactly_these_blocks(window):
    shape = (1024, 1024)
    mask = (
        splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
        if window
        else splash_attention_mask.CausalMask(shape)
    )
    heads = splash_attention_mask.MultiHeadMask([mask])
    for process in (
        splash_attention_mask_info.process_mask,
        splash_attention_mask_info.process_mask_dkv,
    ):
        found, _ = process(heads, (128, 128), head_shards=1, q_seq_shards=1)
        assert np.sum(np.asarray(found.block_mask) > 0) == len(visible_blocks(1024, 128, window))


def test_the_implementation_fits_platform_and_length(monkeypatch):
    monkeypatch.undo()
    assert [choose_attention("auto", p, 256) for p in ("cpu", "gpu", "tpu")] == ["plain"] * 3
    assert [choose_attention("auto", p, 512) for p in ("cpu", "gpu", "tpu")] == [
        "chunked",
        "plain",
        "plain",
    ]
    assert [choose_attention("auto", p, 32768) for p in ("cpu", "gpu", "tpu")] == [
        "chunked",
        "chunked",
        "splash",
    ]
    assert choose_attention("auto", "tpu", 1000) == "chunked"
    assert choose_attention("plain", "tpu", 32768) == "plain"
    with pytest.raises(
        UsageError,
        match=r"attention='splash' with rows of 1000 tokens: .*blocks of 128.*Fix: make "
        r"row_tokens a multiple",
    ):
        choose_attention("splash", "tpu", 1000)


# ---- 32,768 tokens

LONG = 32768


def array_sizes(jaxpr):
    """Elements of everything computed in a program, loops and kernels included."""
    for equation in jaxpr.eqns:
        yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def largest_array(name, layer_types):
    """Of a whole training step with KL on one row of 32,768 tokens."""
    model = dataclasses.replace(
        TINY_MODEL, n_layers=len(layer_types), layer_types=layer_types,
        sliding_window=1024 * ("sliding" in layer_types), n_heads=2,
        n_kv_heads=1, head_dim=8, max_positions=LONG,
    )  # fmt: skip
    train = TrainConfig(label="value", batch_rows=1, row_tokens=LONG, kl_weight=1.0, attention=name)
    head = programs.head_for(model, TINY_GRID, "value")
    state = programs.abstract_state(ONE, model, head, train)
    batch = programs.abstract_batch(ONE, model, train)
    traced = train_step.trace(
        TrainSpec(model, head, ONE, train), state, state.params["body"], batch
    )
    return max(array_sizes(traced.jaxpr.jaxpr))


@pytest.mark.parametrize(
    ("name", "layer_types"), [("auto", ("sliding", "attention")), ("splash", ("attention",))]
)
def test_a_training_step_on_32768_tokens_has_no_array_of_their_square(
    monkeypatch, name, layer_types
):
    monkeypatch.undo()  # blocks as they are
    assert LONG * 16 < largest_array(name, layer_types) < LONG**2 / 100


def test_plain_attention_would_have_one():
    assert largest_array("plain", ("attention",)) >= LONG**2
