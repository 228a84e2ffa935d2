"""Sampling: exact probabilities of every filter against plain numpy, and draws that follow them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zip_rc_jax.config import SamplingConfig
from zip_rc_jax.inference.sampler import (
    ALL_FILTERS,
    Filters,
    Sampling,
    filter_logits,
    row_keys,
    sample,
)

# log of these probabilities, in an order that is not sorted; two never-drawn ids
PROBABILITIES = np.array([0.05, 0.3, 0.0, 0.02, 0.4, 0.1, 0.0, 0.13])
with np.errstate(divide="ignore"):
    LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3


def expected(logits, config):
    """Filters one after the other on a dict of probabilities, as Hugging Face applies them."""
    scaled = logits.astype(np.float64) / (config.temperature or 1)
    weights = {i: np.exp(x - scaled.max()) for i, x in enumerate(scaled)}
    if config.top_k:
        kth = sorted(weights.values(), reverse=True)[min(config.top_k, len(weights)) - 1]
        weights = {i: w for i, w in weights.items() if w >= kth}
    if config.top_p < 1:
        total, mass, kept = sum(weights.values()), 0.0, {}
        for i, w in sorted(weights.items(), key=lambda item: -item[1]):
            if mass >= config.top_p * total:
                break
            kept[i] = w
            mass += w
        weights = kept
    if config.min_p:
        weights = {i: w for i, w in weights.items() if w >= config.min_p * max(weights.values())}
    out = np.zeros(len(logits))
    for i, w in weights.items():
        out[i] = w / sum(weights.values())
    return out


CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=2.0),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=3),
    SamplingConfig(top_k=100),
    SamplingConfig(top_p=0.35),
    SamplingConfig(top_p=0.75),
    SamplingConfig(top_p=0.999),
    SamplingConfig(min_p=0.3),
    SamplingConfig(min_p=1.0),
    SamplingConfig(temperature=1.5, top_k=5, top_p=0.9, min_p=0.2),
    # The order matters: top_p after top_k renormalises (0.4 + 0.3 of 0.83 already exceed 0.8).
    SamplingConfig(top_k=3, top_p=0.8),
    SamplingConfig(temperature=3.0, top_p=0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_probabilities_are_exactly_those_of_the_definition(config):
    rng = np.random.default_rng(0)
    others = 3 * rng.standard_normal((20, 8)).astype(np.float32)
    batch = np.concatenate([LOGITS[None], others])
    found = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(batch), config), axis=-1))
    np.testing.assert_allclose(found, [expected(row, config) for row in batch], atol=2e-6)
    assert (found[0, [2, 6]] == 0).all()


def test_the_filters_by_hand():
    def kept(**options):
        return np.flatnonzero(
            np.isfinite(np.asarray(filter_logits(jnp.asarray(LOGITS), SamplingConfig(**options))))
        ).tolist()

    assert kept() == [0, 1, 3, 4, 5, 7]
    assert kept(top_k=2) == [1, 4]
    assert kept(top_p=0.35) == [4]
    assert kept(top_p=0.45) == [1, 4]
    assert kept(top_p=0.75) == [1, 4, 7]
    assert kept(min_p=0.3) == [1, 4, 7]
    assert kept(top_k=3, top_p=0.8) == [1, 4]


def test_the_temperature_acts_before_the_filters():
    """At temperature 3 the likeliest token has 0.27 of the mass instead of 0.4, so more tokens are
    needed for half of it."""
    cold, hot = (
        np.isfinite(
            np.asarray(filter_logits(jnp.asarray(LOGITS), SamplingConfig(temperature=t, top_p=0.5)))
        ).sum()
        for t in (1, 3)
    )
    assert (cold, hot) == (2, 3)


# Upper 1e-4 quantile of chi-square, df 1..7 (tables).
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88}


@pytest.mark.parametrize(
    "config", [CONFIGS[0], CONFIGS[1], CONFIGS[4], CONFIGS[7], CONFIGS[9], CONFIGS[11]], ids=repr
)
def test_draws_follow_the_probabilities(config):
    count = 20_000
    keys = row_keys(
        jax.random.key(3),
        jnp.full(count, 7, jnp.uint32),
        jnp.arange(count) % 100,
        jnp.arange(count) // 100,
    )
    drawn = np.asarray(sample(keys, jnp.broadcast_to(jnp.asarray(LOGITS), (count, 8)), config))
    observed, probs = np.bincount(drawn, minlength=8), expected(LOGITS, config)
    assert not observed[probs == 0].any()
    observed, probs = observed[probs > 0], probs[probs > 0]
    statistic = float(((observed - count * probs) ** 2 / (count * probs)).sum())
    assert statistic < CHI_SQUARE[len(probs) - 1]


def test_draws_follow_the_probabilities_across_blocks_of_a_large_vocabulary():
    """Allowed ids in the first, in middle and in the last, shorter block; whole blocks without any;
    all other ids are forbidden."""
    allowed, probs = (
        np.array([0, 127, 128, 300, 301, 302, 640, 999]),
        np.array([0.05, 0.2, 0.1, 0.3, 0.01, 0.14, 0.15, 0.05]),
    )
    logits = np.full(1000, -np.inf, np.float32)
    logits[allowed] = np.log(probs) + 40
    count = 20000
    keys = jax.random.split(jax.random.key(3), count)
    drawn = np.asarray(
        jax.jit(lambda k: sample(k, jnp.broadcast_to(logits, (count, 1000)), SamplingConfig()))(
            keys
        )
    )
    observed = np.bincount(drawn, minlength=1000)
    assert observed[allowed].sum() == count
    assert float(((observed[allowed] - count * probs) ** 2 / (count * probs)).sum()) < CHI_SQUARE[7]


def test_every_row_draws_by_its_own_settings():
    """All settings in one batch, greedy ones among them: each row as if all were like it."""
    each = 4000
    configs = [*CONFIGS, SamplingConfig(temperature=0)]
    count = each * len(configs)
    stacked = Sampling.stack([c for c in configs for _ in range(each)])
    keys = row_keys(
        jax.random.key(5),
        jnp.full(count, 7, jnp.uint32),
        jnp.arange(count) % 100,
        jnp.arange(count) // 100,
    )
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (count, 8))
    kept = np.asarray(jax.nn.softmax(filter_logits(logits, stacked), axis=-1)).reshape(-1, each, 8)
    drawn = np.asarray(sample(keys, logits, stacked)).reshape(-1, each)
    for config, found, ids in zip(configs, kept, drawn, strict=True):
        if config.temperature == 0:
            assert (ids == 4).all()
            continue
        probs = expected(LOGITS, config)
        np.testing.assert_allclose(found, np.broadcast_to(probs, found.shape), atol=2e-6)
        observed = np.bincount(ids, minlength=8)
        assert not observed[probs == 0].any()
        observed, probs = observed[probs > 0], probs[probs > 0]
        statistic = float(((observed - each * probs) ** 2 / (each * probs)).sum())
        assert len(probs) == 1 or statistic < CHI_SQUARE[len(probs) - 1]


@pytest.mark.parametrize("shape", ["peaked", "flat", "ties"])
def test_nothing_is_lost_in_a_large_vocabulary(shape):
    """However many tokens the nucleus holds, against sorting: no bounded set of candidates is too
    small."""
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((4, 20_000)) * {"peaked": 4.0, "flat": 0.05, "ties": 2.0}[shape]
    logits = np.round(logits) if shape == "ties" else logits
    logits[:, ::7] = -np.inf  # reserved ids
    logits = logits.astype(np.float32)
    for top_p in (0.01, 0.5, 0.9, 0.999):
        found = np.isfinite(
            np.asarray(filter_logits(jnp.asarray(logits), SamplingConfig(top_p=top_p)))
        )
        for row, kept in zip(logits, found, strict=True):
            probs = np.exp(row.astype(np.float64) - row.max())
            probs /= probs.sum()
            ordered = np.sort(probs)[::-1]
            cumulated = np.cumsum(ordered)
            # Within rounding of float32 sums, the least probability that is kept is the one at
            # which the sorted mass reaches top_p.
            low, high = (
                ordered[min(np.searchsorted(cumulated, top_p + d), len(ordered) - 1)]
                for d in (2e-5, -2e-5)
            )
            assert low * (1 - 1e-5) <= probs[kept].min() <= high * (1 + 1e-5)
            assert probs[~kept].max() < probs[kept].min()
            assert probs[kept].sum() >= top_p - 2e-5
    for top_k in (1, 40, 3000):
        found = np.isfinite(
            np.asarray(filter_logits(jnp.asarray(logits), SamplingConfig(top_k=top_k)))
        )
        kth = np.sort(logits, axis=-1)[:, ::-1][:, top_k - 1 : top_k]
        np.testing.assert_array_equal(found, logits >= kth)


def test_filters_that_no_row_uses_are_not_compiled_and_change_nothing():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((30, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 30)
    for configs, wanted in (
        ([SamplingConfig(), SamplingConfig(min_p=0.1)], Filters(True, False, False, False)),
        ([SamplingConfig(temperature=0, top_k=3)], Filters(False, True, False, False)),
        (
            [SamplingConfig(), SamplingConfig(temperature=0.5, top_p=0.8)],
            Filters(True, False, False, True),
        ),
        (
            [SamplingConfig(top_k=5), SamplingConfig(temperature=0)],
            Filters(True, True, True, False),
        ),
    ):
        assert Filters.of(configs) == wanted
        stacked = Sampling.stack([configs[i % len(configs)] for i in range(30)])
        np.testing.assert_array_equal(
            sample(keys, logits, stacked, wanted), sample(keys, logits, stacked, ALL_FILTERS)
        )


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_a_maximum_that_is_known_changes_nothing(temperature):
    logits = jnp.asarray(5 * np.random.default_rng(0).standard_normal((40, 300)), jnp.float32)
    keys, config = (
        jax.random.split(jax.random.key(0), 40),
        SamplingConfig(temperature, top_k=20, min_p=0.01),
    )
    np.testing.assert_array_equal(
        sample(keys, logits, config, top=logits.max(-1)), sample(keys, logits, config)
    )


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = jnp.asarray([[0.0, 2.0, 1.0], [5.0, 1.0, 5.0], [-jnp.inf, -3.0, -4.0]])
    keys = jax.random.split(jax.random.key(0), 3)
    assert sample(keys, logits, SamplingConfig(temperature=0)).tolist() == [1, 0, 1]
    assert sample(
        keys, logits, SamplingConfig(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    ).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(top_k=2), SamplingConfig(top_p=0.5), SamplingConfig(min_p=1.0)],
    ids=repr,
)
def test_tokens_as_likely_as_the_last_kept_one_stay(config):
    """Equal logits are treated alike: which of them has the smaller id must not matter."""
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray([0.0, 1.0, 1.0, 1.0, -2.0]), config)))
    assert kept.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("top_p", [1e-6, 1e-46])  # the second is 0 in float32
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_likeliest_token_always_stays(dtype, top_p):
    config = SamplingConfig(temperature=0.01, top_k=1, top_p=top_p, min_p=1.0)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 9)), dtype)
    kept = np.isfinite(np.asarray(filter_logits(logits, config)))
    assert kept.any(1).all()
    assert filter_logits(logits, config).dtype == jnp.float32


def test_a_row_draws_the_same_token_wherever_it_lies():
    rng = np.random.default_rng(0)
    count = 40
    logits = jnp.asarray(rng.standard_normal((count, 50)), jnp.float32)
    prompt, branch, position = (
        jnp.asarray(rng.integers(0, 2**32, count, np.uint32)),
        jnp.arange(count) % 4,
        jnp.arange(count) % 9,
    )
    config = SamplingConfig(temperature=1.3, top_p=0.95)

    def draw(rows):
        rows = jnp.asarray(rows)
        return np.asarray(
            sample(
                row_keys(jax.random.key(1), prompt[rows], branch[rows], position[rows]),
                logits[rows],
                config,
            )
        )

    together = draw(range(count))
    order = rng.permutation(count)
    np.testing.assert_array_equal(draw(order), together[order])
    for row in (0, 17, 39):
        assert draw([row])[0] == together[row]


def test_prompt_branch_position_and_seed_each_change_the_key():
    def key(seed=0, prompt=1, branch=2, position=3):
        keys = row_keys(
            jax.random.key(seed),
            *(
                jnp.asarray([x], t)
                for x, t in ((prompt, jnp.uint32), (branch, jnp.int32), (position, jnp.int32))
            ),
        )
        return tuple(np.asarray(jax.random.key_data(keys)).ravel().tolist())

    different = [
        key(),
        key(seed=1),
        key(prompt=2**32 - 1),
        key(branch=3),
        key(position=2),
        key(branch=3, position=2),
        key(prompt=2, branch=1),
    ]
    assert key() == key()
    assert len(set(different)) == len(different)
