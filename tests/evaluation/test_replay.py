"""A replay decides as an online decode with the same random numbers does: which sample is kept at
every decision, every token, every serial step, and both answers."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import runpy
import sys

import numpy as np
import pytest

from harness import scripted
from harness.engines import MIXED, REAL, REAL_PROMPTS
from harness.stored_pools import assert_replay_is_online, make_pool, online
from zip_rc_jax.evaluation import replay as replay_module
from zip_rc_jax.evaluation.baselines import majority_reward
from zip_rc_jax.evaluation.replay import (
    ReplayPool,
    best_sample,
    load_pool,
    majority_rewards,
    replay,
    voted_sample,
)
from zip_rc_jax.grading.votes import answer_groups
from zip_rc_jax.pipeline.pool import separable

SEED = 1
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stored(lm, tmp_path_factory):
    """Six samples of each prompt, with a joint at every third token."""
    directory = tmp_path_factory.mktemp("replay") / "pool"
    files, rows = make_pool(directory, lm, REAL_PROMPTS, REAL, samples=6, stride=3, seed=SEED)
    return files, load_pool(files), rows


def assert_same(stored, lm, **options):
    files, pool, rows = stored
    decode = dataclasses.replace(REAL, **options)
    return assert_replay_is_online(files, pool, rows, lm, REAL_PROMPTS, decode, SEED)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.4])
def test_the_search_is_replayed_token_for_token(stored, lm, alpha, beta):
    assert_same(stored, lm, alpha=alpha, beta=beta)


def test_the_search_over_all_subsets_is_replayed_token_for_token(stored, lm):
    assert_same(stored, lm, candidates="exhaustive", beta=0.2)


@pytest.mark.parametrize(("beta", "wrong_answers"), [(0.01, 5.0), (0.2, 5.0), (0.1, 1.5)])
def test_shared_evidence_is_replayed_token_for_token(stored, lm, beta, wrong_answers):
    assert_same(stored, lm, evidence="answers", beta=beta, wrong_answers=wrong_answers)


def test_the_benchmark_of_shared_evidence_prints_both_comparisons(stored, monkeypatch, capsys):
    files, pool, _ = stored
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(files.directory), "--n", "3"])
    runpy.run_path(str(BENCHMARKS / "evidence.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    chose = -(-pool.n_prompts // 3)
    assert printed[0] == f"{chose} problems choose, {pool.n_prompts - chose} are reported"
    rows = [line for line in printed if re.match(r" *(0\.1|1) +0\.\d+ +[\d.]+ +[\d.]+ \|", line)]
    assert len(rows) == 2 * 2 * 11, "two rules, two alphas, eleven betas"


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_other_random_numbers_are_replayed_token_for_token(lm, tmp_path, seed):
    files, rows = make_pool(
        tmp_path / "pool", lm, REAL_PROMPTS, REAL, samples=6, stride=3, seed=seed
    )
    pool = load_pool(files)
    for options in (
        {"alpha": 0.0, "beta": 0.1},
        {"alpha": 1.0, "beta": 0.1},
        {"strategy": "reward_threshold", "reward_threshold": 0.5},
        {"strategy": "half_finished"},
        {"strategy": "length_budget", "length_budget": 6},
    ):
        decode = dataclasses.replace(REAL, **options)
        assert_replay_is_online(files, pool, rows, lm, REAL_PROMPTS, decode, seed)


def test_the_prices_above_decide_differently(stored, lm):
    """Else the comparisons above would show nothing."""
    costs = {
        beta: sum(r.usage.tokens for r in online(lm, REAL_PROMPTS, replaced(beta=beta), SEED))
        for beta in (0.01, 0.4)
    }
    assert costs[0.4] < costs[0.01]


def replaced(**options):
    return dataclasses.replace(REAL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "fixed"},
        {"strategy": "half_finished"},
        {"strategy": "reward_threshold", "reward_threshold": 0.45},
        {"strategy": "reward_threshold", "reward_threshold": 0.55},
        {"strategy": "length_budget", "length_budget": 9},
        {"n": 2, "beta": 0.1},
        {"n": 6, "beta": 0.1, "answer": "vote"},
        {"interval": 6, "beta": 0.1},
        {"selection_exponent": 0.3, "joint_temperature": 0.5, "joint_top_p": 0.9, "beta": 0.1},
        {"allow_no_answer": True, "beta": 20.0},
        {"abstain_below": 0.6, "beta": 0.1},
        {"add_back": False, "beta": 0.1},
    ],
    ids=str,
)
def test_every_strategy_and_option_is_replayed_token_for_token(stored, lm, options):
    assert_same(stored, lm, **options)


@pytest.mark.slow
def test_a_scripted_model_is_replayed_where_samples_end_paused(tmp_path):
    """The script's plans end after 6, 11 and 21 tokens, so the search pauses the long ones."""
    network, prompts = scripted.ScriptedNetwork(), ["x y", "y z", "z"]
    base = dataclasses.replace(REAL, interval=4, window=3, max_tokens=24, n=6, alpha=0.5)
    lm = MIXED.lm()
    files, rows = make_pool(
        tmp_path / "pool", lm, prompts, base, samples=6, stride=4, seed=3, network=network
    )
    pool = load_pool(files)
    paused = 0
    for beta in (0.05, 0.2):
        decode = dataclasses.replace(base, beta=beta)
        results, _ = assert_replay_is_online(files, pool, rows, lm, prompts, decode, 3, network)
        paused += sum(x.state == "paused" for r in results for x in r.prefixes)
    assert paused, "nothing was paused, so nothing was compared"


@pytest.mark.slow
def test_token_budgets_are_replayed_token_for_token_from_a_pool_of_every_token(lm, tmp_path):
    """A budget that runs short is shared, so samples rest at any token."""
    prompts = REAL_PROMPTS[:3]
    files, rows = make_pool(tmp_path / "pool", lm, prompts, REAL, samples=4, stride=1, seed=SEED)
    pool = load_pool(files)
    ended = 0
    for budget in (2, 17, 31):
        decode = dataclasses.replace(REAL, token_budget=budget)
        _, found = assert_replay_is_online(files, pool, rows, lm, prompts, decode, SEED)
        ended += int((found.reason == "token_budget").sum())
    assert ended >= 3


@pytest.mark.slow
def test_stop_strings_are_replayed_token_for_token_with_what_is_computed_past_them(lm, tmp_path):
    prompts, base = REAL_PROMPTS[:3], replaced(stop=("so", "4 5"))
    files, rows = make_pool(tmp_path / "pool", lm, prompts, base, samples=4, stride=3, seed=SEED)
    assert any(row.computed > len(row.token_ids) for row in rows), "no string ended a sample"
    pool = load_pool(files)
    for options in ({"strategy": "fixed"}, {"beta": 0.2}):
        decode = dataclasses.replace(base, **options)
        assert_replay_is_online(files, pool, rows, lm, prompts, decode, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, 6, 30])
def test_another_window_is_replayed_from_block_means(stored, lm, window):
    """Decoded online with that window; the pool was decoded with 4."""
    files, _, rows = stored
    pool = load_pool(files, window=window)
    decode = dataclasses.replace(REAL, window=window, beta=0.1)
    results, _ = assert_replay_is_online(files, pool, rows, lm, REAL_PROMPTS, decode, SEED)
    ended = [
        (p, k, x.expected_reward)
        for p, r in enumerate(results)
        for k, x in enumerate(r.prefixes)
        if x.state == "finished"
    ]
    assert ended
    for p, k, reward in ended:
        assert pool.value[p, k] == pytest.approx(reward, abs=1e-6)


def test_the_rewards_of_the_tokens_give_the_value_of_a_window(stored):
    """The pool was decoded with a window of 4, and the value is the decoder's."""
    for row in stored[2]:
        assert len(row.rewards) == len(row.token_ids)
        assert row.rewards[-REAL.window :].mean() == pytest.approx(row.value, abs=1e-6)


def test_a_pool_holds_the_samples_their_probabilities_and_their_grades(stored, lm):
    files, _, rows = stored
    results = online(lm, REAL_PROMPTS, dataclasses.replace(REAL, strategy="fixed", n=6), SEED)
    read = list(files)
    assert len(read) == len(rows) == 6 * len(REAL_PROMPTS)
    for row in read:
        prefix = results[row.prompt_index].prefixes[row.sample_index]
        assert tuple(row.token_ids.tolist()) == prefix.token_ids
        assert row.text == prefix.text
        assert row.stopped == (prefix.finish_reason == "stop")
        assert row.question == REAL_PROMPTS[row.prompt_index]
        np.testing.assert_allclose(row.logprobs, prefix.logprobs, atol=1e-5)
        assert row.correct == float(len(prefix.text) % 2 == 0)


def test_subsets_are_decodes_of_their_own_samples(stored, lm):
    """Each of them as if the pool held only these samples, in their order."""
    _, pool, _ = stored
    decode = dataclasses.replace(REAL, n=2, beta=0.1)
    members = np.array([[0, 1], [1, 4], [2, 5]])
    [found] = replay(pool, decode, members)
    for s, chosen in enumerate(members):
        mine = {
            name: getattr(pool, name)[:, chosen]
            for name in (
                "length", "computed", "stopped", "correct", "value", "answer_id", "end", "first",
            )
        }  # fmt: skip
        [alone] = replay(dataclasses.replace(pool, **mine), decode, np.array([[0, 1]]))
        for name in ("tokens", "serial_steps", "lengths", "correct_by_value", "correct_by_vote"):
            np.testing.assert_array_equal(getattr(found, name)[:, s], getattr(alone, name)[:, 0])
        by_value = alone.by_value[:, 0]
        np.testing.assert_array_equal(
            found.by_value[:, s], np.where(by_value < 0, -1, chosen[by_value])
        )


def test_prices_that_are_replayed_together_decide_as_each_alone(stored, monkeypatch):
    """Also where the joints of a pool are gathered in several parts."""
    _, pool, _ = stored
    prices = [(0.1, 0.01), (1.0, 0.1), (0.0, 0.4)]
    members = np.array([[0, 1, 2, 3], [1, 2, 4, 5]])
    together = replay(pool, REAL, members, prices)
    monkeypatch.setattr(replay_module, "NUMBERS_AT_ONCE", 200)
    for (alpha, beta), found in zip(prices, together, strict=True):
        [alone] = replay(pool, dataclasses.replace(REAL, alpha=alpha, beta=beta), members)
        for name in ("tokens", "serial_steps", "by_value", "by_vote", "lengths"):
            np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))


def test_votes_that_close_sums_decide_are_added_exactly_and_ties_go_to_the_first():
    """0.1 + 0.2 is a little more than 0.3 in floating point, and not as a sum of decimals."""
    value = np.array([[0.3, 0.1, 0.2, 0.05], [0.3, 0.1, 0.2, 0.9], [0.5, 0.25, 0.25, 0.1]])
    ids = np.array([[0, 1, 1, 2], [0, 1, 1, -1], [4, 7, 7, 1]])
    finished = np.array([[True] * 4, [True, True, True, False], [True] * 4])
    stopped = np.ones_like(finished)
    stopped[2, 0] = False
    expected = []
    for v, i, f, s in zip(value, ids, finished, stopped, strict=True):
        groups = {}
        for k in range(4):
            if f[k] and i[k] >= 0:
                groups.setdefault(i[k], []).append(k)
        best = max(groups.values(), key=lambda m: math.fsum(v[k] for k in m))
        whole = [k for k in best if s[k]] or best
        expected.append(max(whole, key=lambda k: v[k]))
    assert voted_sample(value, finished, stopped, ids).tolist() == expected


def test_without_any_answer_the_vote_is_the_most_valuable_that_ended_by_itself():
    value, ids = np.array([[0.9, 0.2, 0.4]]), np.full((1, 3), -1)
    finished, stopped = np.array([[True, True, True]]), np.array([[False, True, True]])
    assert voted_sample(value, finished, stopped, ids).tolist() == [2]
    assert best_sample(value, finished, stopped).tolist() == [2]
    assert best_sample(value, ~finished, stopped).tolist() == [-1]


def test_the_majority_of_what_finished_is_that_of_the_baselines():
    rng = np.random.default_rng(0)
    correct, ids = rng.integers(0, 2, (60, 5)) * 1.0, rng.integers(-1, 3, (60, 5))
    finished = rng.random((60, 5)) < 0.6
    expected = [majority_reward(c[f], i[f]) for c, i, f in zip(correct, ids, finished, strict=True)]
    np.testing.assert_allclose(majority_rewards(correct, ids, finished), expected, atol=1e-12)


def test_where_equality_is_not_transitive_subsets_are_grouped_one_by_one(lm, tmp_path):
    """ "5" equals "5 km" and "5 m", which differ: who votes together depends on who is there."""
    texts = ["The answer is 5 km.", "The answer is 5 m.", "The answer is 5."]
    ids = answer_groups(texts)
    assert not separable(texts, ids, REAL)
    assert separable(texts[:2], ids[:2], REAL)
    ended = np.ones((2, 3), bool)
    pool = ReplayPool(
        grid=lm.head.grid, stride=3, window=4, max_tokens=20, stops=False, extractor="stated",
        equivalence="grader", length=np.full((1, 3), 2), computed=np.full((1, 3), 2),
        stopped=ended[:1], correct=np.array([[1.0, 0.0, 0.0]]), value=np.array([[0.5, 0.6, 0.2]]),
        answer_id=np.array([ids]), level=np.zeros(1, np.int64), texts={0: texts},
        root=np.full((1, 9), 1 / 9, np.float32), end=np.full((1, 3, 9), 1 / 9, np.float32),
        joints=np.zeros((0, 9), np.float32), first=np.zeros((1, 3), np.int64), kind="float32",
    )  # fmt: skip
    decode = dataclasses.replace(REAL, strategy="fixed", n=2)
    [found] = replay(pool, decode, np.array([[0, 1], [0, 2], [1, 2]]))
    assert found.by_vote.tolist() == [[1, 0, 1]]
    # "5 km" and "5" are one answer without "5 m".
    assert found.correct_by_majority.tolist() == [[0.5, 0.5, 0.0]]
