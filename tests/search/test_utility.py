"""The closed-form utility equals exact enumeration over every outcome of every prefix, in every
corner."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import reference_search as reference
from zip_rc_jax.grid import Grid
from zip_rc_jax.search import utility

GRID = Grid((0.0, 0.4, 1.0), (0, 8, 16, 64, 100))
BINS = [-1, 1, 2, 3]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random_joints(rng, shape, grid=GRID, zeros=0.0):
    joint = rng.dirichlet(np.full(grid.n_cells, 0.5), shape)
    joint = np.where(rng.random(joint.shape) < zeros, 0, joint)
    joint[..., 0] += 1e-3
    return (joint / joint.sum(-1, keepdims=True)).reshape(*shape, grid.n_reward, grid.n_length)


def score(joint, multiplicity, unfinished, grid=GRID, alpha=0.3, beta=0.2, scale=50.0, skill=1.0):
    """[C, F] utilities of one prompt."""
    terms = utility.prefix_terms(jnp.asarray(joint)[None], grid)
    multiplicity = jnp.asarray(multiplicity, jnp.int32)[None]
    return np.asarray(
        utility.candidate_utility(
            terms,
            multiplicity,
            jnp.asarray(unfinished)[None],
            alpha,
            beta,
            jnp.asarray([scale]),
            skill,
            grid,
        )[0]
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    beta=st.sampled_from([0.0, 0.2, 3.0]),
    skill=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    zeros=st.sampled_from([0.0, 0.7]),
)
def test_utility_equals_enumeration_of_outcomes(seed, n, alpha, beta, skill, zeros):
    rng = np.random.default_rng(seed)
    joint = random_joints(rng, (n,), zeros=zeros)
    unfinished = rng.random(n) < 0.7
    multiplicity = rng.integers(0, 3, (2, n))
    multiplicity[:, ~unfinished] = 1
    got = score(joint, multiplicity, unfinished, alpha=alpha, beta=beta, skill=skill)
    prices = {
        "alpha": alpha,
        "beta": beta,
        "scale": 50.0,
        "centres": GRID.reward_centres,
        "edges": GRID.length_edges,
        "skill": skill,
    }
    for c, (f, bin_) in itertools.product(range(2), enumerate(BINS)):
        exact = reference.enumerated_utility(joint, unfinished, multiplicity[c], bin_, **prices)
        assert got[c, f] == pytest.approx(exact, abs=1e-12)
        assert reference.utility(
            joint, unfinished, multiplicity[c], bin_, **prices
        ) == pytest.approx(exact, abs=1e-12)


def test_planned_pause_bins_are_none_then_one_to_the_last_in_that_order():
    assert utility.planned_pause_bins(GRID).tolist() == BINS
    assert utility.planned_pause_bins(Grid((0, 1), (0, 64))).tolist() == [-1]


def test_marginals_move_the_mass_past_the_future_bin_to_no_reward_at_that_bin():
    joint = random_joints(np.random.default_rng(0), (2,))
    rewards, lengths = (
        utility.reward_marginals(jnp.asarray(joint), GRID),
        utility.length_marginals(jnp.asarray(joint), GRID),
    )
    for i, (f, bin_) in itertools.product(range(2), enumerate(BINS)):
        reward, length = reference.marginals(joint[i], bin_)
        np.testing.assert_allclose(rewards[i, :, f], reward, atol=1e-15)
        np.testing.assert_allclose(lengths[i, :, f], length, atol=1e-15)


def test_multiplicity_zero_is_a_factor_of_one_even_where_the_cdf_is_zero_and_positive_multiplicity_gives_exactly_zero():  # noqa: E501
    log_cdf = utility.log_cdf(jnp.asarray([[0.0, 0.0, 1.0]]).T).T
    group = jnp.exp(jnp.asarray([[0.0], [1.0], [8.0]]) @ log_cdf)
    np.testing.assert_array_equal(group, [[1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_certain_outcomes_give_exact_numbers(dtype):
    """A prefix sure to be right in bin 1 (midpoint 12) next to one sure to be wrong in bin 3
    (midpoint 82)."""
    joint = np.zeros((2, 3, 4))
    joint[0, 2, 1] = joint[1, 0, 3] = 1
    terms = utility.prefix_terms(jnp.asarray(joint, dtype)[None], GRID)
    multiplicity = jnp.asarray([[[0, 0], [1, 0], [0, 1], [1, 1], [2, 3]]])
    extended = multiplicity.astype(dtype)
    np.testing.assert_array_equal(
        utility.expected_max(terms.log_reward_cdf, extended, GRID)[0, :, 0], [0, 1, 0, 1, 1]
    )
    np.testing.assert_array_equal(
        utility.expected_latency(terms, extended)[0, :, 0], [0, 12, 82, 82, 82]
    )
    np.testing.assert_array_equal(
        utility.expected_compute(terms.length, extended)[0, :, 0], [0, 12, 82, 94, 270]
    )
    # Planned pause at bin 1: the right one would end in that bin, so its reward is cut as well.
    np.testing.assert_array_equal(
        utility.expected_max(terms.log_reward_cdf, extended, GRID)[0, :, 1], [0, 0, 0, 0, 0]
    )
    np.testing.assert_array_equal(
        utility.expected_latency(terms, extended)[0, :, 1], [0, 12, 12, 12, 12]
    )
    assert terms.value.dtype == dtype


def test_a_branch_equals_two_prefixes_with_the_same_joint():
    rng = np.random.default_rng(1)
    joint = random_joints(rng, (3,))
    doubled = np.concatenate([joint, joint[:1]])
    live = np.ones(4, bool)
    for skill in (1.0, 0.5):
        once = score(joint, [[2, 1, 0]], live[:3], skill=skill)
        twice = score(doubled, [[1, 1, 0, 1]], live, skill=skill)
        np.testing.assert_allclose(once, twice, rtol=1e-13)


def test_finished_prefixes_count_for_reward_and_cost_nothing():
    joint = random_joints(np.random.default_rng(2), (2,))
    terms = utility.prefix_terms(jnp.asarray(joint)[None], GRID)
    value = utility.expected_max(terms.log_reward_cdf, jnp.ones((1, 1, 2)), GRID)[0, 0]
    np.testing.assert_allclose(
        score(joint, [[1, 1]], [False, False], beta=5.0)[0], value, rtol=1e-14
    )


def test_extending_nothing_is_worth_the_lowest_reward_and_costs_nothing():
    grid = Grid((0.1, 0.9), (0, 8, 16))
    joint = random_joints(np.random.default_rng(3), (2,), grid)
    for skill in (1.0, 0.5):
        np.testing.assert_allclose(
            score(joint, [[0, 0]], [True, True], grid, skill=skill), 0.1, rtol=1e-14
        )


def test_skill_runs_from_the_mean_to_the_maximum_and_never_meets_a_power_of_zero():
    rng = np.random.default_rng(4)
    joint, live = random_joints(rng, (3,)), np.ones(3, bool)
    mean, half, maximum = (
        score(joint, [[1, 1, 1]], live, beta=0.0, skill=s)[0, 0] for s in (0.0, 0.5, 1.0)
    )
    assert mean == pytest.approx(
        np.mean([reference.expected_value(p, GRID.reward_centres) for p in joint])
    )
    assert half == pytest.approx(np.sqrt(mean * maximum))
    hopeless = np.zeros((1, 3, 4))
    hopeless[0, 0, 0] = 1
    for s in (0.0, 0.5, 2.0):
        np.testing.assert_array_equal(score(hopeless, [[1], [0]], [True], beta=0.0, skill=s), 0)


def test_utility_falls_with_beta_by_exactly_the_normalised_cost():
    joint, live = random_joints(np.random.default_rng(5), (3,)), np.ones(3, bool)
    u0, u1, u2 = (score(joint, [[1, 0, 2]], live, beta=b) for b in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(u0 - u1, u1 - u2, rtol=1e-12)
    assert (u0 > u1).all()
    np.testing.assert_allclose(
        u0 - score(joint, [[1, 0, 2]], live, beta=1.0, scale=100.0), (u0 - u1) / 2, rtol=1e-12
    )


def test_normaliser_is_the_mean_total_length_of_the_counted_prefixes():
    joint = random_joints(np.random.default_rng(6), (1, 3))
    tokens = np.array([[5.0, 7.0, 9.0]])
    expected = reference.normaliser(joint[0, :2], tokens[0, :2], GRID.length_edges)
    got = utility.normalizer(
        jnp.asarray(joint), jnp.asarray(tokens), jnp.asarray([[True, True, False]]), GRID
    )
    assert got[0] == pytest.approx(expected)
    assert (
        utility.normalizer(jnp.asarray(joint), jnp.asarray(tokens), jnp.zeros((1, 3), bool), GRID)[
            0
        ]
        == 1
    )


def test_sharpening_is_off_by_default_and_keeps_a_distribution_otherwise():
    joint = random_joints(np.random.default_rng(7), (5,))
    np.testing.assert_allclose(utility.sharpen(jnp.asarray(joint), 1.0, 1.0), joint, rtol=1e-14)
    for temperature, top_p in [(0.5, 1.0), (1.0, 0.6), (0.05, 0.9), (4.0, 1.0)]:
        got = np.asarray(utility.sharpen(jnp.asarray(joint), temperature, top_p))
        np.testing.assert_allclose(got.sum((-1, -2)), 1, rtol=1e-12)
        if top_p == 1:
            tempered = joint ** (1 / temperature)
            np.testing.assert_allclose(
                got, tempered / tempered.sum((-1, -2), keepdims=True), rtol=1e-9
            )


def test_top_p_keeps_the_fewest_likeliest_cells_that_hold_that_mass():
    joint = jnp.asarray([[[0.1, 0.4], [0.3, 0.2]]])
    np.testing.assert_allclose(utility.sharpen(joint, 1.0, 0.6)[0], [[0, 4 / 7], [3 / 7, 0]])
    np.testing.assert_allclose(utility.sharpen(joint, 1.0, 0.3)[0], [[0, 1], [0, 0]])


@pytest.mark.parametrize(
    "grid",
    [
        Grid((0, 1), (0, 64)),
        Grid((0, 1), (0, 8, 16)),
        Grid.authors("value"),
        Grid.authors("correct"),
    ],
)
def test_every_grid_shape_works(grid):
    joint = random_joints(np.random.default_rng(8), (2,), grid)
    got = score(joint, [[1, 1]], [True, True], grid)
    prices = {
        "alpha": 0.3,
        "beta": 0.2,
        "scale": 50.0,
        "centres": grid.reward_centres,
        "edges": grid.length_edges,
    }
    exact = [
        reference.enumerated_utility(joint, [True, True], [1, 1], b, **prices)
        for b in utility.planned_pause_bins(grid)
    ]
    np.testing.assert_allclose(got[0], exact, rtol=1e-9)
