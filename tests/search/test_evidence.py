"""Finished prefixes that agree share their evidence: an answer is worth its posterior."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search import choose_meta_action
from zip_rc_jax.search.evidence import agreement, answer_posterior, share_evidence

GRID = Grid((0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), (0, 8, 32, 128))
ANSWERS = dataclasses.replace(DecodeConfig(), evidence="answers", alpha=1.0, beta=0.05)


def enumerated_posterior(p, answer, wrong_answers):
    """P(each answer is right | what was given), by going through every world.

    A world says which of `wrong_answers + 1` answers is the right one. In it a prefix gives that
    one with its own probability, and each other one with an equal share of the rest.
    """
    possible = wrong_answers + 1
    chance = np.zeros(possible)
    for right in range(possible):
        chance[right] = np.prod(
            [q if a == right else (1 - q) / wrong_answers for q, a in zip(p, answer, strict=True)]
        )
    given_one = chance / chance.sum()
    return [given_one[a] for a in answer]


@settings(deadline=None)
@given(
    p=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6),
    data=st.data(),
    wrong_answers=st.integers(6, 9),
)
def test_the_posterior_is_that_of_all_worlds(p, data, wrong_answers):
    """The closed form counts all answers that nobody gave as one, of odds 1. In the enumeration
    they have `wrong_answers + 1 - given` worlds of odds 1 / wrong_answers each."""
    answer = data.draw(st.lists(st.integers(0, 5), min_size=len(p), max_size=len(p)))
    odds = enumerated_posterior(p, answer, wrong_answers)
    given_answers = len(set(answer))
    # The closed form's remainder is 1 where the enumeration's is smaller: compare odds between
    # answers, and the mass of the remainder.
    with jax.enable_x64(True):
        found = np.asarray(
            answer_posterior(
                np.array([p]),
                agreement(np.ones((1, len(p)), bool), np.array([answer])),
                wrong_answers,
            )
        )[0]
    ratio = found / np.array(odds)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    first = [answer.index(a) for a in set(answer)]
    rest_worlds = 1 - sum(np.array(odds)[first])
    rest = 1 - found[first].sum()
    seen = found[0] / odds[0]
    np.testing.assert_allclose(
        rest / seen, rest_worlds * wrong_answers / (wrong_answers + 1 - given_answers), rtol=1e-8
    )


def posterior(p, answer, wrong_answers=5.0, votes=None):
    votes = np.ones((1, len(p)), bool) if votes is None else np.array([votes])
    same = agreement(votes, np.array([answer]))
    return np.asarray(answer_posterior(np.array([p]), same, wrong_answers))[0]


def test_one_answer_alone_is_worth_its_own_probability():
    np.testing.assert_allclose(posterior([0.7], [0]), [0.7], rtol=1e-6)


def test_a_second_equal_answer_makes_it_surer_and_another_one_less_sure():
    alone, agreed = posterior([0.7], [0])[0], posterior([0.7, 0.6], [0, 0])
    differing = posterior([0.7, 0.6], [0, 1])
    assert agreed[0] == agreed[1] > alone > differing[0] > differing[1]
    assert differing.sum() < 1, "both may be wrong, and not both right"


def test_answers_that_few_could_give_by_chance_count_more():
    assert posterior([0.5, 0.5], [0, 0], 20.0)[0] > posterior([0.5, 0.5], [0, 0], 2.0)[0]
    # With one wrong answer, agreement says no more than two coins do.
    np.testing.assert_allclose(posterior([0.5, 0.5], [0, 0], 1.0), 0.5)


def test_certainty_of_the_head_is_bounded_so_that_others_are_heard():
    for p in ([0.0, 1.0], [1.0, 1.0]):
        found = posterior(p, [0, 1])
        assert np.isfinite(found).all()
        assert found.sum() <= 1 + 1e-6
    np.testing.assert_allclose(*posterior([1.0, 1.0], [0, 1]), rtol=1e-6)


def test_what_has_no_vote_has_no_share_and_changes_none():
    votes = [True, False, True]
    found = posterior([0.7, 0.99, 0.6], [0, 0, 1], votes=votes)
    assert found[1] == 0
    np.testing.assert_allclose(found[[0, 2]], posterior([0.7, 0.6], [0, 1]), rtol=1e-6)


def joints(p, unfinished):
    """Joints [1, n, B_V, B_T] whose expected reward is `p`, all in the first or the last bin."""
    table = np.zeros((1, len(p), GRID.n_reward, GRID.n_length), np.float32)
    for k, (q, live) in enumerate(zip(p, unfinished, strict=True)):
        bin_ = GRID.n_length - 1 if live else 0
        table[0, k, 0, bin_], table[0, k, -1, bin_] = 1 - q, q
    return table


@settings(deadline=None)
@given(
    p=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=5),
    data=st.data(),
)
def test_the_expected_reward_of_the_first_of_an_answer_is_its_posterior(p, data):
    n = len(p)
    answer = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    finished = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    before = joints(p, ~np.array(finished))
    after = np.asarray(share_evidence(before, np.array([finished]), np.array([answer]), GRID, 5.0))
    np.testing.assert_allclose(after.sum((-2, -1)), 1, rtol=1e-5)
    votes = [f and a >= 0 for f, a in zip(finished, answer, strict=True)]
    wanted = posterior(p, answer, votes=votes)
    seen = set()
    for k, vote in enumerate(votes):
        if not vote:
            np.testing.assert_array_equal(after[0, k], before[0, k])
            continue
        value = after[0, k].sum(-1) @ np.array(GRID.reward_centres)
        np.testing.assert_allclose(value, 0 if answer[k] in seen else wanted[k], atol=2e-6)
        seen.add(answer[k])


def decision(p, unfinished, answer, **options):
    config = dataclasses.replace(ANSWERS, n=len(p), **options)
    return choose_meta_action(
        joints(p, unfinished), [unfinished], [[0.0] * len(p)], grid=GRID, config=config,
        answer=[answer],
    )  # fmt: skip


def test_agreement_stops_a_search_that_disagreement_continues():
    p, unfinished = [0.8, 0.8, 0.6, 0.6], [False, False, True, True]
    agree = decision(p, unfinished, [0, 0, -1, -1])
    differ = decision(p, unfinished, [0, 1, -1, -1])
    assert not np.asarray(agree.keep[0])[2:].any(), "the answer is nearly sure"
    assert np.asarray(differ.keep[0])[2:].any(), "one of them is wrong"


def test_without_finished_prefixes_the_decision_is_the_published_one():
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.ones(GRID.n_cells), (16, 5)).reshape(16, 5, GRID.n_reward, -1)
    unfinished, tokens = np.ones((16, 5), bool), rng.integers(0, 50, (16, 5))
    for candidates in ("published", "exhaustive"):
        config = dataclasses.replace(ANSWERS, n=5, candidates=candidates)
        shared = choose_meta_action(
            joint, unfinished, tokens, grid=GRID, config=config, answer=np.full((16, 5), -1)
        )
        plain = choose_meta_action(
            joint, unfinished, tokens, grid=GRID,
            config=dataclasses.replace(config, evidence="samples"),
        )  # fmt: skip
        for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_the_order_of_the_finished_prefixes_does_not_matter(order):
    p, answer = [0.8, 0.55, 0.3], [0, 1, 0]
    one = decision([*p, 0.7], [False] * 3 + [True], [*answer, -1])
    other = decision(
        [*(p[i] for i in order), 0.7], [False] * 3 + [True], [*(answer[i] for i in order), -1]
    )
    assert np.asarray(one.keep[0])[3] == np.asarray(other.keep[0])[3]
    np.testing.assert_allclose(np.asarray(one.utility), np.asarray(other.utility), rtol=1e-5)


def test_answers_must_be_given():
    with pytest.raises(UsageError, match="evidence='answers' without answers"):
        choose_meta_action(joints([0.5], [True]), [[True]], [[0]], grid=GRID, config=ANSWERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evidence": "votes"}, "evidence='votes'"),
        ({"wrong_answers": 0.5}, "wrong_answers=0.5: it counts the wrong answers"),
        ({"wrong_answers": float("nan")}, "wrong_answers=nan"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(DecodeConfig(), **options)
