"""The grid: half-open bins, an open last bin, reward-major cells, and errors that say what to
do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.tree import expectations
from zip_rc_jax.runtime.errors import UsageError

GRID = Grid((0.0, 0.25, 1.0), (0, 4, 10, 11))


def slow_reward_bin(centres, reward):
    """Bin edges are the midpoints; the upper bin takes the edge."""
    edges = [0.0, *[(a + b) / 2 for a, b in itertools.pairwise(centres)], np.inf]
    return next(b for b in range(len(centres)) if edges[b] <= reward < edges[b + 1])


def slow_length_bin(edges, remaining):
    """Bins are `[t_l, t_{l+1})` and the last one has no end."""
    ends = [*edges[1:-1], np.inf]
    return next(i for i, end in enumerate(ends) if edges[i] <= remaining < end)


@pytest.mark.parametrize(
    "grid", [GRID, Grid.authors("value"), Grid.authors("correct"), Grid((0.1, 0.9), (0, 5))]
)
def test_every_length_and_reward_falls_into_the_bin_of_the_definition(grid):
    last = grid.length_edges[-1]
    lengths = sorted(
        {0, 1, *[max(t + d, 0) for t in grid.length_edges for d in (-1, 0, 1)], 3 * last}
    )
    rewards = [
        0.0,
        1.0,
        *np.linspace(0, 1, 41),
        *grid.reward_centres,
        *grid.reward_edges,
        *np.nextafter(grid.reward_edges, 0),
    ]
    assert grid.length_bin(lengths).tolist() == [
        slow_length_bin(grid.length_edges, t) for t in lengths
    ]
    assert grid.reward_bin(rewards).tolist() == [
        slow_reward_bin(grid.reward_centres, v) for v in rewards
    ]
    for reward, length in itertools.product(rewards, lengths):
        expected = slow_reward_bin(grid.reward_centres, reward) * grid.n_length + slow_length_bin(
            grid.length_edges, length
        )
        assert grid.cell(reward, length) == expected, "cells are reward-major"


def test_bins_keep_the_shape_of_their_input():
    assert GRID.length_bin(np.arange(6).reshape(2, 3)).tolist() == [[0, 0, 0], [0, 1, 1]]
    assert GRID.cell(np.array([[0.0, 1.0]]), np.array([[10], [3]])).tolist() == [[2, 8], [0, 6]]


def test_the_boundaries_by_hand():
    assert [int(GRID.length_bin(t)) for t in (3, 4, 9, 10, 11, 1000)] == [0, 1, 1, 2, 2, 2]
    assert GRID.reward_edges == (0.125, 0.625)
    assert [int(GRID.reward_bin(v)) for v in (0.1249, 0.125, 0.6249, 0.625, 1.0)] == [0, 1, 1, 2, 2]


def test_the_authors_grids():
    edges = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert Grid.authors("correct") == Grid((0, 1), edges)
    value = Grid.authors("value")
    assert value.length_edges == edges
    np.testing.assert_allclose(value.reward_centres, np.linspace(0, 1, 7))
    assert (value.n_reward, value.n_length, value.n_cells) == (7, 8, 56)
    np.testing.assert_allclose(value.reward_edges, np.arange(1, 12, 2) / 12)
    with pytest.raises(UsageError, match=r"label='length'.*correct.*value"):
        Grid.authors("length")


def test_expectations_are_sums_over_centres_and_midpoints():
    joint = np.random.default_rng(0).dirichlet(np.ones(GRID.n_cells), 5).reshape(5, 3, 3)
    reward = [
        sum(j[b, t] * GRID.reward_centres[b] for b in range(3) for t in range(3)) for j in joint
    ]
    length = [
        sum(
            j[b, t] * (GRID.length_edges[t] + GRID.length_edges[t + 1]) / 2
            for b in range(3)
            for t in range(3)
        )
        for j in joint
    ]
    np.testing.assert_allclose(GRID.expected_reward(joint.astype(np.float32)), reward, rtol=1e-5)
    np.testing.assert_allclose(GRID.expected_length(joint.astype(np.float32)), length, rtol=1e-5)


def test_a_grid_survives_its_dict_and_is_hashable():
    assert Grid.from_dict(GRID.to_dict()) == GRID
    assert len({GRID, Grid.from_dict(GRID.to_dict()), Grid.authors("value")}) == 2


@pytest.mark.parametrize(
    ("centres", "edges", "message"),
    [
        ((0.5,), (0, 1), r"reward_centres=\[0.5\].*at least two.*Fix: "),
        ((), (0, 1), r"reward_centres=\[\].*at least two.*Fix: "),
        ((0, 1, 0.5), (0, 1), r"reward_centres=\[0.0, 1.0, 0.5\].*ascend.*Fix: sort"),
        ((0, 0, 1), (0, 1), r"reward_centres=.*ascend strictly.*Fix: "),
        ((-0.1, 1), (0, 1), r"reward_centres=\[-0.1, 1.0\].*\[0, 1\].*Fix: "),
        ((0, 1.1), (0, 1), r"reward_centres=\[0.0, 1.1\].*\[0, 1\].*Fix: "),
        ((0, float("nan")), (0, 1), r"reward_centres=\[0.0, nan\].*Fix: "),
        ((0, 1), (0,), r"length_edges=\[0\].*two edges.*Fix: "),
        ((0, 1), (1, 2), r"length_edges=\[1, 2\].*start at 0.*Fix: "),
        ((0, 1), (0, 5, 5), r"length_edges=\[0, 5, 5\].*ascend strictly.*Fix: "),
        ((0, 1), (0, 5, 3), r"length_edges=\[0, 5, 3\].*ascend strictly.*Fix: "),
        ((0, 1), (0, 2.5), r"length_edges=\[0, 2.5\].*whole numbers.*Fix: round"),
    ],
)
def test_impossible_grids_name_value_reason_and_fix(centres, edges, message):
    with pytest.raises(UsageError, match=message):
        Grid(centres, edges)


@pytest.mark.parametrize("reward", [-0.01, 1.01, float("nan")])
def test_rewards_outside_the_unit_interval_are_refused(reward):
    with pytest.raises(ValueError, match="rewards must lie in"):
        GRID.reward_bin([0.5, reward])


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match=r"remaining lengths must be >= 0; got \[-1\]"):
        GRID.length_bin([3, -1])


@pytest.mark.parametrize(
    ("centres", "sure", "expected"), [((0.0, 1.0), 1, 1.0), ((0.25, 1.0), 0, 0.25)]
)
def test_the_reward_of_a_sure_head_is_one_of_the_grid_however_its_joint_is_rounded(
    centres, sure, expected
):
    """A mean of float32 joints may sum to a little more or less than 1, and a reward outside the
    grid is one that no label can have."""
    grid = Grid(centres, (0, 4, 8))
    for total in (
        np.nextafter(np.float32(1), np.float32(2)),
        np.nextafter(np.float32(1), np.float32(0)),
    ):
        joint = np.zeros((2, 2), np.float32)
        joint[sure, 0] = total
        found = expectations(joint.ravel(), grid)[0], float(grid.expected_reward(joint))
        assert all(centres[0] <= reward <= centres[1] for reward in found)
        assert found == pytest.approx((expected, expected))


NO_NUMBERS = [
    None,
    "x",
    "0.5",
    True,
    False,
    [0],
    (),
    {},
    {0: 1},
    {0, 1},
    b"01",
    object(),
    1j,
    np.array([0, 1]),
    float("nan"),
    2**200,
    -(2**200),
    10**5000,
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(type(value).__name__))
def test_what_is_no_number_is_in_no_grid(value):
    for centres, edges in (
        ((0, value), (0, 1)),
        ((0, 1), (0, value)),
        ((value, 1), (0, 1)),
        ((0, 1), (value, 1)),
    ):
        with pytest.raises(UsageError) as error:
            Grid(centres, edges)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "values",
    [
        None,
        3,
        0.5,
        "01",
        b"01",
        {0: 1, 1: 2},
        {0, 1},
        (),
        [],
        np.zeros((2, 2)),
        np.array(3),
        object(),
    ],
    ids=str,
)
def test_what_is_no_list_of_numbers_is_no_grid(values):
    for centres, edges in ((values, (0, 1)), ((0, 1), values)):
        with pytest.raises(UsageError, match=r"reward_centres=|length_edges="):
            Grid(centres, edges)


def test_truth_values_are_no_numbers_even_where_they_equal_them():
    for centres, edges in (
        ((False, True), (0, 1)),
        ((0, 1), (False, True)),
        ((np.False_, 1), (0, 1)),
    ):
        with pytest.raises(UsageError, match="it must be a list of numbers"):
            Grid(centres, edges)


def test_a_grid_is_the_same_whatever_kind_of_numbers_it_is_given():
    same = [
        ([0, 1], [0, 4]),
        (np.array([0.0, 1.0]), np.array([0, 4])),
        (iter((0, 1)), iter((0, 4.0))),
        ((np.float32(0), np.int8(1)), (0, np.int64(4))),
    ]
    assert {Grid(*given) for given in same} == {Grid((0, 1), (0, 4))}
    for grid in (Grid(*given) for given in [(np.array([0.0, 1.0]), np.array([0, 4]))]):
        assert [type(v) for v in (*grid.reward_centres, *grid.length_edges)] == [
            float,
            float,
            int,
            int,
        ], "JSON holds it"


NO_GRIDS = [
    None, [], "x", {}, {"reward_centres": [0, 1]}, {"reward_centres": None, "length_edges": [0, 1]},
    {"reward_centres": [0, 1], "length_edges": [0, 1], "more": 1}, {"x": "y" * 3_000_000},
]  # fmt: skip


@pytest.mark.parametrize("data", NO_GRIDS, ids=range(len(NO_GRIDS)))
def test_a_stored_grid_that_is_none_is_refused(data):
    with pytest.raises(UsageError) as error:
        Grid.from_dict(data)
    assert len(str(error.value)) < 1000


def test_a_sequence_is_never_longer_than_its_positions_count():
    assert Grid((0, 1), (0, 2**31 - 1)).n_length == 1
    with pytest.raises(
        UsageError,
        match=r"length_edges=\[0, 2147483648\]: no sequence has more than 2,147,483,647 tokens",
    ):
        Grid((0, 1), (0, 2**31))


@pytest.mark.parametrize("value", ["x", None, float("nan"), [None], "2020", 10**400, object()])
def test_bins_of_what_is_no_number_are_refused(value):
    with pytest.raises(ValueError, match=r"rewards must"):
        GRID.reward_bin(value)
    with pytest.raises(ValueError, match=r"remaining lengths must"):
        GRID.length_bin(value)
