"""What a decision is said to have been weighed against, compared with the search itself and with
enumeration."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from harness import reference_search as reference
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.search import MetaAction, search, search_inputs
from zip_rc_jax.search.explain import explain

GRID = Grid((0.0, 0.4, 1.0), (0, 8, 16, 64, 100))
PROMPTS, SLOTS = 5, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inputs_of(candidates, seed=0, must_extend=False, **options):
    """Random prefixes of some prompts, and their decisions."""
    rng = np.random.default_rng(seed)
    config = DecodeConfig(n=SLOTS, candidates=candidates, alpha=0.3, beta=0.15, **options)
    slots = SLOTS + (candidates == "branching")
    joint = rng.dirichlet(np.full(GRID.n_cells, 0.4), (PROMPTS, slots))
    unfinished = rng.random((PROMPTS, slots)) < 0.7
    exists = np.ones((PROMPTS, slots), bool)
    if candidates == "branching":
        unfinished[:, -1] = True
        exists[:, 2:-1] = rng.random((PROMPTS, slots - 3)) < 0.4
    inputs = search_inputs(
        joint.reshape(PROMPTS, slots, GRID.n_reward, GRID.n_length),
        unfinished,
        rng.integers(0, 60, (PROMPTS, slots)),
        grid=GRID,
        config=config,
        exists=exists,
        must_extend=np.full(PROMPTS, must_extend),
    )
    return inputs, config, search(inputs, grid=GRID, config=config)


def explained(candidates, **options):
    inputs, config, action = inputs_of(candidates, **options)
    return inputs, config, action, explain(inputs, action, grid=GRID, config=config)


CANDIDATES = ("published", "exhaustive", "branching")


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_the_first_action_is_the_one_that_was_taken_with_its_utility(candidates):
    _, _, action, found = explained(candidates)
    for p, one in enumerate(found):
        assert one.multiplicity[0].tolist() == np.asarray(action.multiplicity)[p].tolist()
        assert one.planned_pause_bin[0] == np.asarray(action.planned_pause_bin)[p]
        assert one.utility[0] == pytest.approx(float(action.utility[p]), abs=1e-12)


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_no_action_that_was_compared_is_better_than_the_one_that_was_taken(candidates):
    for _, _, _, found in (explained(candidates, seed=seed) for seed in range(4)):
        for one in found:
            best = one.utility[one.compared].max() if one.compared.any() else -np.inf
            assert best <= one.utility[0] + 1e-12
            # A climb ends where no change of one prefix helps, and all subsets hold every change.
            if candidates != "published":
                assert one.utility.max() <= one.utility[0] + 1e-12
            assert (np.diff(one.utility[1:]) <= 0).all(), "the best first"


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_every_term_equals_the_enumeration_of_all_outcomes(candidates, exponent):
    inputs, config, _, found = explained(candidates, selection_exponent=exponent)
    for p in range(2):
        one, here = found[p], np.flatnonzero(inputs.exists[p])
        joints = [inputs.joint[p, slot] for slot in here]
        live = [bool(inputs.unfinished[p, slot]) for slot in here]
        prices = {"scale": one.normalizer, "edges": GRID.length_edges, "skill": exponent}
        prices["centres"] = GRID.reward_centres
        assert one.normalizer == pytest.approx(scale_of(inputs, p), rel=1e-12)
        for c in range(min(6, len(one.utility))):
            copies, pause = one.multiplicity[c][here].tolist(), int(one.planned_pause_bin[c])
            if sum(copies) > 5:
                continue  # too many outcomes

            group = (joints, live, copies, pause)

            def utility(alpha, beta, group=group, prices=prices):
                return reference.enumerated_utility(*group, alpha=alpha, beta=beta, **prices)

            value = utility(1.0, 0.0)
            assert one.value[c] == pytest.approx(value, abs=1e-10)
            assert one.compute[c] == pytest.approx(
                (value - utility(1.0, 1.0)) * one.normalizer, abs=1e-8
            )
            assert one.latency[c] == pytest.approx(
                (value - utility(0.0, 1.0)) * one.normalizer, abs=1e-8
            )
            assert one.utility[c] == pytest.approx(utility(config.alpha, config.beta), abs=1e-10)


def scale_of(inputs, p):
    """The unit of cost by the text: without the root, unless it is alone."""
    counted = inputs.exists[p] & ~inputs.is_root
    counted = counted if counted.any() else inputs.exists[p]
    where = np.flatnonzero(counted)
    joints, tokens = (
        [inputs.joint[p, i] for i in where],
        [inputs.tokens_so_far[p, i] for i in where],
    )
    return reference.normaliser(joints, tokens, GRID.length_edges)


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_every_live_prefix_has_an_action_that_differs_in_it_alone(candidates):
    inputs, _, _, found = explained(candidates)
    for p, one in enumerate(found):
        changed = {
            int(np.flatnonzero(row != one.multiplicity[0])[0])
            for row in one.multiplicity
            if (row != one.multiplicity[0]).sum() == 1
        }
        live = set(np.flatnonzero(inputs.live[p]).tolist())
        if candidates == "branching" and not new_ones_fit(inputs, p, one):
            live -= {SLOTS}
        assert live <= changed


def new_ones_fit(inputs, p, one):
    """Whether the root could have another multiplicity."""
    samples = (inputs.exists[p] & ~inputs.is_root).sum()
    live = inputs.live[p] & ~inputs.is_root
    forks = np.maximum(one.multiplicity[0][live] - 1, 0).sum()
    return one.multiplicity[0][-1] > 0 or samples + forks < SLOTS


def test_ending_without_an_answer_is_an_action_that_is_not_allowed():
    inputs, config, action = inputs_of("published", must_extend=True)
    idle = dataclasses.replace(inputs, unfinished=np.ones_like(inputs.unfinished))
    action = search(idle, grid=GRID, config=config)
    found = explain(idle, action, grid=GRID, config=config)
    ends = [row for one in found for row in zip(one.multiplicity, one.utility, strict=True)]
    assert all(np.isneginf(u) == (not m.any()) for m, u in ends)
    assert any(not m.any() for m, _ in ends)


def test_all_subsets_are_counted_and_equal_candidates_once():
    inputs, _, _, found = explained("exhaustive")
    assert [one.count for one in found] == [2 ** int(row.sum()) for row in inputs.live]
    _, _, _, found = explained("published")
    assert all(0 < one.count <= SLOTS**2 + 1 for one in found)
    _, _, _, found = explained("branching")
    assert all(one.count == 0 and not one.compared.any() for one in found)


@pytest.mark.parametrize("strategy", ["fixed", "half_finished"])
def test_a_strategy_that_compares_nothing_is_told_what_the_utility_would_say(strategy):
    inputs, config, _ = inputs_of("published")
    action = MetaAction.of(inputs.live | inputs.finished)
    found = explain(
        inputs, action, grid=GRID, config=dataclasses.replace(config, strategy=strategy)
    )
    assert all(one.count == 0 and not one.compared.any() for one in found)
    assert all(np.isfinite(one.utility[0]) and len(one.utility) > 1 for one in found)


def test_answers_that_agree_are_weighed_as_the_search_weighs_them():
    rng = np.random.default_rng(3)
    config = DecodeConfig(n=SLOTS, alpha=0.3, beta=0.1, evidence="answers")
    joint = rng.dirichlet(np.full(GRID.n_cells, 0.4), (PROMPTS, SLOTS))
    unfinished = np.array([[False, False, True, True]] * PROMPTS)
    answer = np.array(
        [[0, 0, -1, -1], [0, 1, -1, -1], [0, -1, -1, -1], [2, 2, -1, -1], [1, 0, -1, -1]]
    )
    inputs = search_inputs(
        joint.reshape(PROMPTS, SLOTS, GRID.n_reward, GRID.n_length),
        unfinished,
        np.full((PROMPTS, SLOTS), 9),
        grid=GRID,
        config=config,
        answer=answer,
    )
    action = search(inputs, grid=GRID, config=config)
    for p, one in enumerate(explain(inputs, action, grid=GRID, config=config)):
        assert one.utility[0] == pytest.approx(float(action.utility[p]), abs=1e-12)
