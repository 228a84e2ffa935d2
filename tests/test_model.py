"""The transformer: cached decoding equals the full forward, parts equal slow numpy, and no setting is unread."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_MODEL, randomised

from zip_rc_jax.models.attention import attend, rotate
from zip_rc_jax.models.cache import Cache
from zip_rc_jax.models.transformer import hidden_states, init_params, param_axes, param_shapes, unembedding
from zip_rc_jax.sharding import single_device

# The two shapes differ in every switch.
OTHER_MODEL = dataclasses.replace(TINY_MODEL, n_layers=2, n_heads=3, n_kv_heads=3, head_dim=6, qk_norm=True, tied=False, rope_theta=77.0)
CONFIGS = [TINY_MODEL, OTHER_MODEL]
SLOTS = 24
LENGTHS = np.array([5, 12, 1, 9, 16])
LAYOUT = single_device()
TOKENS = np.random.default_rng(0).integers(0, TINY_MODEL.vocab_size, (5, 16)).astype(np.int32)

cached = functools.partial(jax.jit, static_argnames=("config",))(
    lambda config, params, tokens, positions, cache: hidden_states(config, params, tokens, positions, layout=LAYOUT, cache=cache)
)
uncached = functools.partial(jax.jit, static_argnames=("config", "remat"))(
    lambda config, params, tokens, positions, segments, remat=False: hidden_states(
        config, params, tokens, positions, layout=LAYOUT, segment_ids=segments, remat=remat
    )[0]
)


@functools.cache
def parameters(config):
    return randomised(init_params(config, 3), 7)


def full(config, tokens, params=None):
    """All hidden states `[B, T, d]` by one forward without a cache."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(uncached(config, parameters(config) if params is None else params, tokens, positions, jnp.ones_like(tokens)))


def prefilled(config, tokens, width):
    """Right-padded prefill of the first `width` tokens: padding writes garbage to the slots behind, which nobody may read."""
    positions = jnp.broadcast_to(jnp.arange(width), (len(tokens), width))
    return cached(
        config, parameters(config), jnp.asarray(tokens[:, :width]), positions, Cache.empty(config, len(tokens), SLOTS, jnp.float32)
    )


def step(config, cache, tokens, positions):
    hidden, cache = cached(config, parameters(config), jnp.asarray(tokens)[:, None], jnp.asarray(positions, jnp.int32)[:, None], cache)
    return np.asarray(hidden[:, 0]), cache


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


# ---- cached decoding


@pytest.mark.parametrize("config", CONFIGS)
def test_cached_decoding_equals_the_full_forward_for_every_split_point(config):
    """The prefill is as wide as the longest prompt; what lies behind the split is replaced by other tokens, which nobody may see."""
    expected = full(config, TOKENS)
    for split in range(1, TOKENS.shape[1]):
        padded = np.concatenate([TOKENS[:, :split], (TOKENS[:, split:] + 50) % config.vocab_size], axis=1)
        hidden, cache = prefilled(config, padded, TOKENS.shape[1])
        close(hidden[:, :split], expected[:, :split])
        for t in range(split, TOKENS.shape[1]):
            hidden, cache = step(config, cache, TOKENS[:, t], np.full(len(TOKENS), t))
            close(hidden, expected[:, t])


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_different_lengths_decode_side_by_side(config):
    """The prefill is padded on the right; then every row goes on at its own position."""
    rng = np.random.default_rng(1)
    continuation = rng.integers(0, config.vocab_size, (len(LENGTHS), 7)).astype(np.int32)
    padded = TOKENS.copy()
    for row, length in enumerate(LENGTHS):
        padded[row, length:] = rng.integers(0, config.vocab_size, 16 - length)  # the worst padding: real ids
    hidden, cache = prefilled(config, padded, 16)
    wholes = [full(config, np.concatenate([TOKENS[r, :n], continuation[r]])[None])[0] for r, n in enumerate(LENGTHS)]
    for row, length in enumerate(LENGTHS):
        close(hidden[row, :length], wholes[row][:length])
    for t in range(7):
        hidden, cache = step(config, cache, continuation[:, t], LENGTHS + t)
        for row, length in enumerate(LENGTHS):
            close(hidden[row], wholes[row][length + t])


def test_chunked_prefill_is_the_same_path():
    expected = full(TINY_MODEL, TOKENS)
    cache = Cache.empty(TINY_MODEL, len(TOKENS), SLOTS, jnp.float32)
    for start, stop in [(0, 4), (4, 5), (5, 16)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (len(TOKENS), stop - start))
        hidden, cache = cached(TINY_MODEL, parameters(TINY_MODEL), jnp.asarray(TOKENS[:, start:stop]), positions, cache)
        close(hidden, expected[:, start:stop])


@pytest.mark.parametrize("config", CONFIGS)
def test_gathered_and_branched_rows_decode_as_if_they_had_never_moved(config):
    """Rows are permuted, one is branched twice, one dropped, the slots shrink to what is needed, and all move into another pool."""
    hidden, cache = prefilled(config, TOKENS, 10)
    lengths = np.array([10, 7, 10, 3, 9])
    index, at = np.array([4, 1, 1, 1, 0]), np.array([2, 0, 5, 3, 1])
    pool = Cache(*(jnp.full((config.n_layers, 7, config.n_kv_heads, SLOTS, config.head_dim), np.nan) for _ in range(2)))
    small = cache.take(jnp.asarray(index), 12)
    assert small.slots == 12
    # A target past the pool is padding.
    pool = pool.put(jnp.asarray([*at, 99]), Cache(*(jnp.concatenate([x, x[:, :1] * 0], axis=1) for x in (small.k, small.v))))
    assert np.isnan(np.asarray(pool.k[:, [4, 6]])).all(), "rows that are not targets stay as they are"
    assert np.isnan(np.asarray(pool.k[:, :, :, 12:])).all(), "slots past the written ones stay as they are"
    pool = jax.tree.map(jnp.nan_to_num, pool)
    continuation = np.random.default_rng(2).integers(0, config.vocab_size, (7, 6)).astype(np.int32)
    position = np.zeros(7, int)
    position[at] = lengths[index]
    whole = {
        row: full(config, np.concatenate([TOKENS[source, : lengths[source]], continuation[row]])[None])[0]
        for row, source in zip(at, index, strict=True)
    }
    for t in range(6):
        hidden, pool = step(config, pool, continuation[:, t], position + t)
        for row in at:
            close(hidden[row], whole[row][position[row] + t])
    assert not np.allclose(hidden[0], hidden[5], atol=1e-2), "branches of one row go different ways"


def test_rewriting_the_last_token_in_place_changes_nothing():
    """What a finished row does while its batch mates go on."""
    _, cache = prefilled(TINY_MODEL, TOKENS, 9)
    once, cache = step(TINY_MODEL, cache, TOKENS[:, 8], np.full(5, 8))
    close(once, full(TINY_MODEL, TOKENS)[:, 8])
    again, after = step(TINY_MODEL, cache, TOKENS[:, 8], np.full(5, 8))
    np.testing.assert_array_equal(once, again)
    jax.tree.map(np.testing.assert_array_equal, cache, after)


# ---- parts against slow references


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
def test_attention_equals_loops(heads, kv_heads):
    rng = np.random.default_rng(heads)
    batch, steps, slots, dim = 2, 3, 7, 4
    q = rng.standard_normal((batch, steps, heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, dim)).astype(np.float32)
    mask = rng.random((batch, steps, slots)) < 0.5
    mask[..., 2] = True
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(steps):
            for h in range(heads):
                group = h // (heads // kv_heads)
                weights = np.array([np.exp(q[b, t, h] @ k[b, group, s] / np.sqrt(dim)) if mask[b, t, s] else 0.0 for s in range(slots)])
                out[b, t, h] = sum(w * v[b, group, s] for s, w in enumerate(weights / weights.sum()))
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask)), out, atol=1e-5)


def test_attention_survives_large_scores_and_ignores_what_is_masked():
    rng = np.random.default_rng(0)
    q = 100 * rng.standard_normal((1, 2, 2, 4)).astype(np.float32)
    k, v = 100 * rng.standard_normal((2, 1, 2, 5, 4)).astype(np.float32)
    mask = jnp.asarray([[[True, True, False, False, False], [True, True, True, False, False]]])
    out = np.asarray(attend(q, k, v, mask))
    assert np.isfinite(out).all()
    k2, v2 = k.copy(), v.copy()
    k2[:, :, 3:], v2[:, :, 3:] = 1e4, -1e4
    np.testing.assert_array_equal(out, attend(q, k2, v2, mask))


def test_rope_equals_multiplication_by_unit_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 90, (2, 5))
    pairs = x[..., :4] + 1j * x[..., 4:]  # channel i pairs with channel i + D/2
    frequency = np.array([1 / 50.0 ** (2 * i / 8) for i in range(4)])
    turned = pairs * np.exp(1j * positions[:, :, None, None] * frequency)
    np.testing.assert_allclose(rotate(x, jnp.asarray(positions), 50.0), np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


def test_rope_products_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, 10)).astype(np.float32)

    def product(m, n):
        return float(jnp.vdot(rotate(q, jnp.asarray([[m]]), 100.0), rotate(k, jnp.asarray([[n]]), 100.0)))

    for m, n, shift in [(5, 2, 11), (0, 9, 30), (4, 4, 50)]:
        assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_the_whole_forward_equals_plain_numpy():
    """One layer written out once more, with loops over layers and heads; no shared code."""
    for config in CONFIGS:
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(config))
        tokens = TOKENS[0, :9]

        def norm(x, scale, eps=config.rms_eps):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

        def turn(x, theta=config.rope_theta):
            half = x.shape[-1] // 2
            z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half))
            return np.concatenate([z.real, z.imag], -1)

        x = p["embed"][tokens]
        for layer in range(config.n_layers):
            w = {name: value[layer] for name, value in p["blocks"].items()}
            y, attended = norm(x, w["attn_norm"]), 0
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
        close(full(config, tokens[None])[0], norm(x, p["final_norm"]))


# ---- packing


def test_two_segments_in_a_row_equal_each_alone():
    a, b = TOKENS[0, :7], TOKENS[1, :6]
    row = jnp.asarray(np.concatenate([a, b, [0, 0, 0]]))[None]
    segments = jnp.asarray([[1] * 7 + [2] * 6 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(6), 0, 0, 0]])
    packed = np.asarray(uncached(TINY_MODEL, parameters(TINY_MODEL), row, positions, segments))[0]
    close(packed[:7], full(TINY_MODEL, a[None])[0])
    close(packed[7:13], full(TINY_MODEL, b[None])[0])
    recomputed = uncached(TINY_MODEL, parameters(TINY_MODEL), row, positions, segments, remat=True)
    close(recomputed[0], packed)


def test_no_position_sees_the_future():
    changed = TOKENS.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY_MODEL.vocab_size
    a, b = full(TINY_MODEL, TOKENS), full(TINY_MODEL, changed)
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.abs(a[:, 9:] - b[:, 9:]).max() > 0.1


def test_a_forward_without_cache_needs_segments():
    with pytest.raises(ValueError, match="segment_ids"):
        hidden_states(TINY_MODEL, parameters(TINY_MODEL), jnp.asarray(TOKENS), jnp.asarray(TOKENS), layout=LAYOUT)


# ---- no unread setting


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.0},
        {"rms_eps": 1e-6},
        {"n_heads": 2},
        {"head_dim": 8},
        {"d_ff": 56},
        {"n_layers": 2},
        {"n_kv_heads": 1},
        {"d_model": 48},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_config_value_is_read(change):
    other = dataclasses.replace(TINY_MODEL, **change)
    before, after = init_params(TINY_MODEL, 3), init_params(other, 3)
    if next(iter(change)) in ("rope_theta", "rms_eps"):
        assert np.abs(full(TINY_MODEL, TOKENS, before) - full(other, TOKENS, before)).max() > 1e-3
    else:
        assert jax.tree.map(jnp.shape, before) != jax.tree.map(jnp.shape, after)
        assert np.isfinite(full(other, TOKENS, after)).all()


def test_qk_norm_tied_and_vocab_size_decide_which_parameters_exist():
    shapes = param_shapes(TINY_MODEL)
    assert "unembed" not in shapes
    assert "q_norm" not in shapes["blocks"]
    other = param_shapes(dataclasses.replace(TINY_MODEL, qk_norm=True, tied=False, vocab_size=77))
    assert other["unembed"].shape == other["embed"].shape == (77, 32)
    assert other["blocks"]["q_norm"].shape == other["blocks"]["k_norm"].shape == (3, 10)
    normed = dataclasses.replace(TINY_MODEL, qk_norm=True)
    assert np.abs(full(normed, TOKENS, init_params(normed, 3)) - full(TINY_MODEL, TOKENS, init_params(TINY_MODEL, 3))).max() > 1e-2
    tied, untied = parameters(TINY_MODEL), parameters(OTHER_MODEL)
    assert unembedding(TINY_MODEL, tied) is tied["embed"]
    assert unembedding(OTHER_MODEL, untied) is untied["unembed"]


@pytest.mark.parametrize("config", CONFIGS)
def test_abstract_parameters_are_those_of_initialisation_and_every_axis_has_a_name(config):
    params = init_params(config, 0)
    described = jax.tree.map(lambda s: (s.shape, s.dtype), param_shapes(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == described
    assert all(jax.tree.leaves(jax.tree.map(lambda x, axes: len(axes) == x.ndim, params, param_axes(config))))


def test_parameters_are_a_function_of_the_seed():
    a, b, c = (init_params(TINY_MODEL, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.abs(a["embed"] - c["embed"]).max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16_parameters_give_finite_bfloat16_output_near_float32(config):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(config))
    half = full(config, TOKENS, params)
    assert half.dtype == jnp.bfloat16
    whole = full(config, TOKENS)
    assert np.abs(half.astype(np.float32) - whole).mean() < 0.05 * np.abs(whole).mean()
