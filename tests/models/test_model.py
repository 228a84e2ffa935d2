"""The transformer: cached decoding equals the full forward, parts equal slow numpy, and no setting
is unread."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.configs import (
    CONFIGS,
    EACH_MODEL,
    MIXED_MODEL,
    OTHER_MODEL,
    compiled_init,
    initialised,
    parameters,
)
from harness.forwards import (
    LAYOUT,
    SLOTS,
    cached,
    continued,
    copied,
    empty,
    extend,
    fast_jit,
    full,
    gather,
    padded,
    place,
    prefill,
    step,
    uncached,
)
from harness.tiny import TINY_MODEL
from zip_rc_jax.config import LAYER_TYPES, ModelConfig, RopeScaling
from zip_rc_jax.models.attention.full import attend, rope_frequencies, rotate, rotation
from zip_rc_jax.models.kv_cache import AttentionCache, Cache, ConvCache
from zip_rc_jax.models.stacks import segments, unstack
from zip_rc_jax.models.transformer import (
    forward_cached,
    forward_packed,
    init_params,
    logits,
    param_axes,
    param_shapes,
    unembedding,
)

every_config = pytest.mark.parametrize("config", CONFIGS, ids=["tiny", "other", "mixed"])
ROWS, WIDTH = 5, 16
TOKENS = np.random.default_rng(0).integers(0, TINY_MODEL.vocab_size, (ROWS, WIDTH)).astype(np.int32)


@functools.cache
def expected(config):
    return full(config, parameters(config), TOKENS)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


# ---- cached decoding


@every_config
def test_cached_decoding_equals_the_full_forward_for_every_split_point(config):
    """The prefill is always as wide as the longest prompt; what lies behind the split is other
    tokens, which nobody may see."""
    for split in range(1, WIDTH):
        out, cache = prefill(
            config, parameters(config), padded(TOKENS, np.full(ROWS, split)), np.full(ROWS, split)
        )
        close(out[:, :split], expected(config)[:, :split])
        for t in range(split, WIDTH):
            out, cache = step(config, parameters(config), cache, TOKENS[:, t], np.full(ROWS, t))
            close(out, expected(config)[:, t])


@every_config
def test_rows_of_different_lengths_decode_side_by_side(config):
    """The prefill is padded on the right; then every row goes on at its own position."""
    lengths, params = np.array([5, 12, 1, 9, 16]), parameters(config)
    continuation = (
        np.random.default_rng(1).integers(0, config.vocab_size, (ROWS, 7)).astype(np.int32)
    )
    whole = full(config, params, continued(TOKENS, lengths, continuation))
    out, cache = prefill(config, params, padded(TOKENS, lengths), lengths)
    for row, length in enumerate(lengths):
        close(out[row, :length], whole[row, :length])
    for t in range(7):
        out, cache = step(config, params, cache, continuation[:, t], lengths + t)
        close(out, whole[np.arange(ROWS), lengths + t])


@every_config
def test_chunked_prefill_with_other_chunks_in_every_row_is_the_same_path(config):
    """Chunks of one to four tokens, padded to four; a row that has no more feeds its last token
    again."""
    rng, cache, done, width = np.random.default_rng(2), empty(config, ROWS), np.zeros(ROWS, int), 4
    tokens = np.concatenate([TOKENS, TOKENS[:, :width]], axis=1)
    while (done < WIDTH).any():
        counts = np.minimum(rng.integers(1, width + 1, ROWS), np.maximum(WIDTH - done, 1))
        first = np.minimum(done, WIDTH - 1)
        chunk = np.stack([tokens[row, start : start + width] for row, start in enumerate(first)])
        out, cache = extend(
            config, parameters(config), cache, padded(chunk, counts, seed=done[0]), first, counts
        )
        for row, (start, count) in enumerate(zip(first, counts, strict=True)):
            close(out[row, :count], expected(config)[row, start : start + count])
        done = first + counts


def test_a_copy_in_place_takes_the_slots_that_are_asked_for():
    config = CONFIGS[0]
    pool = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.arange(3.0).reshape(3, 1, 1, 1), x.shape), empty(config, 3)
    )
    for stack in copied(pool, 2, 0, 12).stacks.values():
        for leaf in jax.tree.leaves(stack):
            assert (leaf[:, :, 0, :, :12] == 2).all()
            assert (leaf[:, :, 0, :, 12:] == 0).all()
            assert (leaf[:, :, 1] == 1).all()


@every_config
def test_gathered_and_branched_rows_decode_as_if_they_had_never_moved(config):
    """Rows are permuted, one is branched twice, one dropped, and all move into another pool."""
    params, lengths = parameters(config), np.array([10, 7, 10, 3, 9])
    _, cache = prefill(config, params, padded(TOKENS, lengths), lengths)
    index, at, pool_rows = np.array([4, 1, 1, 1, 0]), np.array([2, 0, 5, 3, 1]), 7
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty(config, pool_rows))
    pool = gather(pool, cache, index, at)
    for stack in pool.stacks.values():
        for leaf in jax.tree.leaves(stack):
            assert np.isnan(leaf[:, :, [4, 6]]).all(), "rows that are not targets stay as they are"
            assert not np.isnan(leaf[:, :, at]).any()
    pool = place(jax.tree.map(jnp.nan_to_num, pool))

    continuation = (
        np.random.default_rng(2).integers(0, config.vocab_size, (pool_rows, 6)).astype(np.int32)
    )
    position, source = np.zeros(pool_rows, int), np.zeros((pool_rows, WIDTH), np.int32)
    position[at], source[at] = lengths[index], TOKENS[index]
    whole = full(config, params, continued(source, position, continuation))
    for t in range(6):
        out, pool = step(config, params, pool, continuation[:, t], position + t)
        close(out[at], whole[at, position[at] + t])
    assert not np.allclose(out[0], out[5], atol=1e-2), "branches of one row go different ways"


@every_config
def test_feeding_the_last_token_again_changes_nothing(config):
    """What a finished row does while its batch mates go on."""
    params, at = parameters(config), np.full(ROWS, 8)
    _, cache = prefill(config, params, padded(TOKENS, at), at)
    once, cache = step(config, params, cache, TOKENS[:, 8], at)
    close(once, expected(config)[:, 8])
    again, after = step(config, params, cache, TOKENS[:, 8], at)
    np.testing.assert_array_equal(once, again)
    jax.tree.map(np.testing.assert_array_equal, cache, after)
    close(step(config, params, after, TOKENS[:, 9], at + 1)[0], expected(config)[:, 9])


@every_config
def test_rows_that_are_not_live_keep_their_state(config):
    """What a paused row does while its neighbours go on: it is fed something, and nothing of that
    is kept."""
    params, at, live = parameters(config), np.full(ROWS, 8), np.arange(ROWS) % 2 == 0
    _, before = prefill(config, params, padded(TOKENS, at), at)
    out, after = step(config, params, before, np.where(live, TOKENS[:, 8], 3), at, live)
    close(out[live], expected(config)[live, 8])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[:, :, ~live], new[:, :, ~live])
    close(step(config, params, after, TOKENS[:, 8], at)[0], expected(config)[:, 8])


@functools.partial(fast_jit, static_argnames=("config", "slots"))
def cached_unrolled(config, params, tokens, positions, cache, slots):
    hidden, cache = forward_cached(
        config, params, tokens, positions, cache, layout=LAYOUT, slots=slots, unrolled=True
    )
    return logits(config, hidden, unembedding(config, params)), cache


@pytest.mark.parametrize(
    ("rows", "slots"),
    [(3, 10), (3, 24), (4, 15), (9, 15)],
    ids=["all rows", "all", "most", "a part"],
)
@every_config
def test_layers_with_arrays_of_their_own_compute_the_same(config, rows, slots):
    """Three rows of each of two shards are fed; the cache may have more rows and slots than are
    looked at."""
    params = unstack(config, parameters(config))
    which, split = np.arange(6) % ROWS, 7
    tokens, wanted = TOKENS[which], expected(config)[which]
    cache = jax.tree.map(
        lambda x: x + 7, Cache.empty(config, 2, rows, SLOTS, jnp.float32, unrolled=True)
    )
    positions = jnp.broadcast_to(jnp.arange(split), (6, split))
    before, cache = cached_unrolled(
        config, params, jnp.asarray(tokens[:, :split]), positions, cache, slots
    )
    close(before, wanted[:, :split])
    for at in range(split, 9):
        out, cache = cached_unrolled(
            config, params, jnp.asarray(tokens[:, at : at + 1]), jnp.full((6, 1), at), cache, slots
        )
        close(out[:, 0], wanted[:, at])


def test_rotations_are_not_computed_anew_in_every_layer():
    config = dataclasses.replace(TINY_MODEL, n_layers=4)
    ids = jnp.ones(TOKENS.shape, jnp.int32)

    @jax.jit
    def forward(params, positions):
        return forward_packed(config, params, TOKENS, positions, ids, layout=LAYOUT, unrolled=True)

    params = unstack(config, init_params(config, 0))
    text = (
        forward.lower(params, jnp.broadcast_to(jnp.arange(WIDTH), TOKENS.shape)).compile().as_text()
    )
    assert text.count(" cosine(") == text.count(" sine(") == 1


@every_config
def test_a_forward_of_the_first_rows_of_every_shard_leaves_the_others_alone(config):
    """Two shards of four rows each; the first two rows of each are fed: four lanes."""
    params = parameters(config)
    lanes = np.array([0, 1, 4, 5])
    cache = place(jax.tree.map(lambda x: x + 7, Cache.empty(config, 2, 4, SLOTS, jnp.float32)))
    out, cache = extend(config, params, cache, TOKENS[:4], np.zeros(4), np.full(4, WIDTH))
    close(out, expected(config)[:4])
    rows = np.delete(np.arange(8), lanes)
    for leaf in jax.tree.leaves(cache):
        merged = np.asarray(leaf).reshape(leaf.shape[0], 8, *leaf.shape[3:])
        assert (merged[:, rows] == 7).all()
        assert (merged[:, lanes] != 7).any()


def test_the_cache_holds_what_each_layer_type_needs():
    """Keys and values per slot for attention, and only the last inputs for convolutions, however
    long the row."""
    stacks = Cache.empty(MIXED_MODEL, 2, 3, 50, jnp.bfloat16).stacks
    layers = [stack for segment in segments(MIXED_MODEL.kinds) for stack in segment.stacks]
    assert [stack.name for stack in layers] == list(stacks)
    for stack in layers:
        held = stacks[stack.name]
        if stack.kind == "conv":
            assert isinstance(held, ConvCache)
            assert held.inputs.shape == (
                len(stack.layers),
                2,
                3,
                MIXED_MODEL.conv_kernel,
                MIXED_MODEL.d_model,
            )
        else:
            assert isinstance(held, AttentionCache)
            assert (
                held.k.shape
                == held.v.shape
                == (len(stack.layers), 2, 3, MIXED_MODEL.n_kv_heads, 50, MIXED_MODEL.head_dim)
            )
        assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype("bfloat16")}


# ---- parts against slow references


@pytest.mark.parametrize(("heads", "kv_heads", "scale"), [(6, 2, 0.5), (4, 4, 0.3), (5, 1, 2.0)])
def test_attention_equals_loops(heads, kv_heads, scale):
    rng = np.random.default_rng(heads)
    batch, steps, slots, dim = 2, 3, 7, 4
    q = rng.standard_normal((batch, steps, heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, dim)).astype(np.float32)
    mask = rng.random((batch, steps, slots)) < 0.5
    mask[..., 2] = True
    out = np.zeros_like(q)
    for b, t, h in itertools.product(range(batch), range(steps), range(heads)):
        group = h // (heads // kv_heads)
        scores = np.array([scale * (q[b, t, h] @ k[b, group, s]) for s in range(slots)])
        weights = np.exp(scores) * mask[b, t]
        out[b, t, h] = sum(w * v[b, group, s] for s, w in enumerate(weights / weights.sum()))
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask), scale), out, atol=1e-5)


def test_attention_survives_large_scores_and_ignores_what_is_masked():
    rng = np.random.default_rng(0)
    q = 100 * rng.standard_normal((1, 2, 2, 4)).astype(np.float32)
    k, v = 100 * rng.standard_normal((2, 1, 2, 5, 4)).astype(np.float32)
    mask = jnp.asarray([[[True, True, False, False, False], [True, True, True, False, False]]])
    out = np.asarray(attend(q, k, v, mask, 0.5))
    assert np.isfinite(out).all()
    k2, v2 = k.copy(), v.copy()
    k2[:, :, 3:], v2[:, :, 3:] = 1e4, -1e4
    np.testing.assert_array_equal(out, attend(q, k2, v2, mask, 0.5))


def turned(x, positions, theta):
    """`x [B, T, H, D]` rotated, unscaled frequencies."""
    return rotate(
        x, *rotation(jnp.asarray(positions), rope_frequencies(x.shape[-1], theta, RopeScaling()))
    )


def test_rope_equals_multiplication_by_unit_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 90, (2, 5))
    pairs = x[..., :4] + 1j * x[..., 4:]  # channel i pairs with channel i + D/2
    frequency = np.array([1 / 50.0 ** (2 * i / 8) for i in range(4)])
    z = pairs * np.exp(1j * positions[:, :, None, None] * frequency)
    np.testing.assert_allclose(
        turned(x, positions, 50.0), np.concatenate([z.real, z.imag], -1), atol=2e-5
    )


def test_rope_products_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, 10)).astype(np.float32)

    def product(m, n):
        return float(jnp.vdot(turned(q, [[m]], 100.0), turned(k, [[n]], 100.0)))

    for m, n, shift in [(5, 2, 11), (0, 9, 30), (4, 4, 50)]:
        assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_rope_scaling_stretches_the_long_wavelengths():
    plain = rope_frequencies(64, 10000.0, RopeScaling())
    np.testing.assert_allclose(
        rope_frequencies(64, 10000.0, RopeScaling("linear", 8.0)), plain / 8, rtol=1e-6
    )
    scaled = rope_frequencies(64, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    assert ((plain / 8 < scaled) & (scaled < plain))[between].all()


@pytest.mark.parametrize("config", [TINY_MODEL, OTHER_MODEL], ids=["tiny", "other"])
def test_the_whole_forward_equals_plain_numpy(config):
    """Layers written out once more, with loops over layers and heads; no shared code.
    (test_families has the other features.)"""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(config))
    tokens = TOKENS[0]

    def norm(x, scale, eps=config.rms_eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def turn(x, theta=config.rope_theta):
        half = x.shape[-1] // 2
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
        )
        return np.concatenate([z.real, z.imag], -1)

    x = p["embed"][tokens]
    for layer in range(config.n_layers):
        w = {name: value[layer] for name, value in p["blocks"]["0_attention"].items()}
        y, attended = norm(x, w["mixer_norm"]), 0
        for h in range(config.n_heads):
            group = h * config.n_kv_heads // config.n_heads
            q, k, v = y @ w["q"][:, h], y @ w["k"][:, group], y @ w["v"][:, group]
            if config.qk_norm:
                q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
            scores = turn(q) @ turn(k).T / np.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(len(tokens))
            attended = attended + weights / weights.sum(-1, keepdims=True) @ v @ w["o"][h]
        x = x + attended
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    close(
        expected(config)[0], norm(x, p["final_norm"]) @ p["embed" if config.tied else "unembed"].T
    )


# ---- packing


@every_config
def test_two_segments_in_a_row_equal_each_alone(config):
    params, a, b = parameters(config), TOKENS[0, :7], TOKENS[1, :6]
    row = jnp.asarray(np.concatenate([a, b, [0, 0, 0]]))[None]
    ids = jnp.asarray([[1] * 7 + [2] * 6 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(6), 0, 0, 0]])
    packed = np.asarray(uncached(config, params, row, positions, ids))[0]
    close(packed[:7], expected(config)[0, :7])
    close(packed[7:13], expected(config)[1, :6])


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient():
    tokens, positions = jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(WIDTH), TOKENS.shape)

    def loss(params, remat):
        ones = jnp.ones_like(tokens)
        hidden = forward_packed(
            EACH_MODEL, params, tokens, positions, ones, layout=LAYOUT, remat=remat
        )
        return jnp.square(hidden @ jnp.arange(1.0, EACH_MODEL.d_model + 1)).mean()

    for remat in (False, True):
        assert (
            "remat"
            in str(jax.make_jaxpr(functools.partial(loss, remat=remat))(parameters(EACH_MODEL)))
        ) == remat
    plain, recomputed = (
        fast_jit(jax.grad(functools.partial(loss, remat=remat)))(parameters(EACH_MODEL))
        for remat in (False, True)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max()),
        plain,
        recomputed,
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain)), (
        "every parameter has a gradient"
    )


@every_config
def test_no_position_sees_the_future(config):
    changed = full(config, parameters(config), padded(TOKENS, np.full(ROWS, 9)))
    np.testing.assert_array_equal(changed[:, :9], expected(config)[:, :9])
    assert (np.abs(changed - expected(config))[:, 9:].max(-1) > 1e-2).all()


def test_a_model_of_short_sight_sees_as_far_as_its_layers_reach():
    """Two sliding layers of window 3 and a convolution of 3 taps reach 2 tokens back each, so
    position t depends on t - 6 to t."""
    config = dataclasses.replace(
        TINY_MODEL, layer_types=("sliding", "conv", "sliding"), sliding_window=3, conv_kernel=3
    )
    params, changed = parameters(config), TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % config.vocab_size
    seen = np.abs(full(config, params, changed) - full(config, params, TOKENS)).max((0, 2))
    assert (seen[2:9] > 1e-5).all()
    assert (seen[:2] == 0).all()
    assert (seen[9:] == 0).all()


# ---- no unread setting

# A change of every setting of EACH_MODEL. `max_positions` is the decoder's.
SHAPES = {  # those that change the parameters' shapes, or which there are
    "vocab_size": 77, "d_model": 48, "n_layers": 2, "n_heads": 3, "n_kv_heads": 2, "head_dim": 8,
    "d_ff": 56,
    "layer_types": ("sliding", "attention", "conv"), "conv_kernel": 3, "conv_bias": False,
    "qk_norm": False, "post_norms": False, "attention_bias": False,
    "attention_output_bias": False, "mlp_bias": False,
    "tied": False,
}  # fmt: skip
VALUES = {  # those that change what the same parameters compute
    "sliding_window": [4], "rope_theta": [500.0], "sliding_rope_theta": [70.0, 0.0],
    "rms_eps": [2e-2], "norm_plus_one": [False],
    "attention_scale": [0.4, 0.0], "logit_softcap": [1.0, 0.0], "activation": ["silu", "gelu",
    "relu"],
    "scale_embedding": [False], "rope_scaling": [
        RopeScaling(), RopeScaling("linear", 4.0), RopeScaling("llama3", 2.0, 1.5, 3.0, 150),
        RopeScaling("llama3", 4.0, 0.5, 3.0, 150),
        RopeScaling("llama3", 4.0, 1.5, 2.5, 150), RopeScaling("llama3", 4.0, 1.5, 3.0, 120),
    ],
}  # fmt: skip


def test_every_setting_is_changed_below():
    assert {*SHAPES, *VALUES, "max_positions"} == {
        field.name for field in dataclasses.fields(ModelConfig)
    }


@pytest.mark.parametrize("name", SHAPES)
def test_every_size_and_switch_is_read(name):
    before = (
        dataclasses.replace(EACH_MODEL, layer_types=(), sliding_window=0, conv_kernel=0)
        if name == "n_layers"
        else EACH_MODEL
    )
    after = dataclasses.replace(before, **{name: SHAPES[name]})
    assert jax.tree.map(lambda s: s.shape, param_shapes(after)) != jax.tree.map(
        lambda s: s.shape, param_shapes(before)
    )


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
def test_every_value_is_read(name, value):
    changed = full(dataclasses.replace(EACH_MODEL, **{name: value}), parameters(EACH_MODEL), TOKENS)
    assert np.abs(changed - expected(EACH_MODEL)).max() > 1e-4


def test_switches_decide_which_parameters_exist():
    shapes = param_shapes(TINY_MODEL)
    assert "unembed" not in shapes
    assert set(shapes["blocks"]["0_attention"]) == {
        "mixer_norm",
        "q",
        "k",
        "v",
        "o",
        "mlp_norm",
        "gate",
        "up",
        "down",
    }
    other = param_shapes(dataclasses.replace(TINY_MODEL, qk_norm=True, tied=False, vocab_size=77))
    assert other["unembed"].shape == other["embed"].shape == (77, 32)
    assert (
        other["blocks"]["0_attention"]["q_norm"].shape
        == other["blocks"]["0_attention"]["k_norm"].shape
        == (3, 10)
    )
    mixed = param_shapes(MIXED_MODEL)["blocks"]
    common = {
        "mixer_norm",
        "mixer_post_norm",
        "mlp_norm",
        "mlp_post_norm",
        "gate",
        "up",
        "down",
        "gate_bias",
        "up_bias",
        "down_bias",
    }
    for stack in (stack for segment in segments(MIXED_MODEL.kinds) for stack in segment.stacks):
        conv = {"conv_in", "conv_in_bias", "conv", "conv_bias", "conv_out", "conv_out_bias"}
        attention = {"q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"}
        assert set(mixed[stack.name]) == common | (conv if stack.kind == "conv" else attention)


def test_logits_are_products_with_the_table_soft_capped():
    tied, untied = parameters(TINY_MODEL), parameters(OTHER_MODEL)
    assert unembedding(TINY_MODEL, tied) is tied["embed"]
    assert unembedding(OTHER_MODEL, untied) is untied["unembed"]
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((2, 3, 8)), rng.standard_normal((5, 8))
    products = np.einsum("bth,nh->btn", hidden, table)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, table)]
    assert logits(TINY_MODEL, *half).dtype == jnp.float32
    single = [jnp.asarray(x, jnp.float32) for x in (hidden, table)]
    np.testing.assert_allclose(logits(TINY_MODEL, *single), products, atol=1e-5)
    np.testing.assert_allclose(logits(MIXED_MODEL, *single), 2 * np.tanh(products / 2), atol=1e-5)


# ---- parameters


@every_config
def test_abstract_parameters_are_those_of_initialisation_and_every_axis_has_a_name(config):
    params = initialised(config)
    described = jax.tree.map(lambda s: (s.shape, s.dtype), param_shapes(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == described
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda x, axes: len(axes) == x.ndim, params, param_axes(config))
        )
    )
    assert list(params["blocks"]) == [
        stack.name for segment in segments(config.kinds) for stack in segment.stacks
    ]


@every_config
def test_norms_start_as_multiplication_by_one_and_biases_at_zero(config):
    for block in initialised(config)["blocks"].values():
        for name, leaf in block.items():
            if name.endswith("_bias"):
                assert (np.asarray(leaf) == 0).all(), name
            elif name.endswith("_norm"):
                assert (np.asarray(leaf) + config.norm_plus_one == 1).all(), name
            else:
                assert 0.01 < np.asarray(leaf).std() < 1, name


def test_parameters_are_a_function_of_the_seed():
    again, other = compiled_init(TINY_MODEL, 3), compiled_init(TINY_MODEL, 4)
    jax.tree.map(np.testing.assert_array_equal, initialised(TINY_MODEL), again)
    assert np.abs(again["embed"] - other["embed"]).max() > 1e-3


@every_config
def test_bfloat16_parameters_give_finite_bfloat16_hidden_states_near_float32(config):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(config))
    tokens = jnp.asarray(TOKENS)
    hidden = jax.eval_shape(
        lambda: forward_packed(config, params, tokens, tokens, tokens, layout=LAYOUT)
    )
    assert hidden.dtype == jnp.bfloat16
    half = full(config, params, TOKENS)
    assert np.abs(half - expected(config)).mean() < 0.05 * np.abs(expected(config)).mean()
    out, cache = cached(
        config,
        params,
        tokens,
        jnp.broadcast_to(jnp.arange(WIDTH), TOKENS.shape),
        empty(config, ROWS, jnp.bfloat16),
        None,
        None,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert np.abs(np.asarray(out) - half).mean() < 0.02 * np.abs(half).mean()


# ---- stacks

LFM2_350M = tuple({"c": "conv", "a": "attention"}[letter] for letter in "ccaccaccacacacac")
GEMMA_1B = tuple("attention" if layer % 6 == 5 else "sliding" for layer in range(26))


def unrolled(kinds):
    """(layer, type) in the order in which the forward applies them."""
    return [
        (stack.layers[repeat], stack.kind)
        for segment in segments(kinds)
        for repeat in range(segment.repeats)
        for stack in segment.stacks
    ]  # fmt: skip


def fewest_stacks(kinds):
    """By trying every cut into consecutive pieces; a piece costs the shortest pattern that it
    repeats."""

    def cost(piece):
        return next(
            n
            for n in range(1, len(piece) + 1)
            if len(piece) % n == 0 and piece[:n] * (len(piece) // n) == piece
        )

    found = []
    for cuts in itertools.product([False, True], repeat=len(kinds) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(kinds)]
        found.append((sum(cost(kinds[a:b]) for a, b in itertools.pairwise(ends)), len(ends) - 1))
    return min(found)


@given(st.lists(st.sampled_from(LAYER_TYPES), min_size=1, max_size=30).map(tuple))
def test_segments_apply_every_layer_once_and_in_order(kinds):
    assert unrolled(kinds) == list(enumerate(kinds))
    stacks = [stack for segment in segments(kinds) for stack in segment.stacks]
    assert [stack.name for stack in stacks] == [
        f"{number}_{stack.kind}" for number, stack in enumerate(stacks)
    ]


@given(st.lists(st.sampled_from(LAYER_TYPES), min_size=1, max_size=9).map(tuple))
def test_segments_have_the_fewest_stacks_and_then_the_fewest_segments(kinds):
    found = segments(kinds)
    assert (sum(len(segment.stacks) for segment in found), len(found)) == fewest_stacks(kinds)


@pytest.mark.parametrize(
    ("kinds", "lengths_and_repeats"),
    [
        (("attention",) * 28, [(1, 28)]),
        (LFM2_350M, [(3, 3), (2, 3), (1, 1)]),
        (GEMMA_1B, [(6, 4), (1, 2)]),
        (("sliding",) * 5, [(1, 5)]),
        (("conv",), [(1, 1)]),
    ],
    ids=["28 equal layers", "LFM2 350M", "Gemma 3 1B", "5 equal layers", "one layer"],
)
def test_segments_of_known_models(kinds, lengths_and_repeats):
    assert [
        (len(segment.stacks), segment.repeats) for segment in segments(kinds)
    ] == lengths_and_repeats


def test_stacks_of_a_repeated_pattern_take_every_pattern_length_th_layer():
    first, last = segments(GEMMA_1B)
    assert [stack.layers for stack in first.stacks] == [
        tuple(range(offset, 24, 6)) for offset in range(6)
    ]
    assert [stack.kind for stack in first.stacks] == ["sliding"] * 5 + ["attention"]
    assert last.stacks[0].layers == (24, 25)
