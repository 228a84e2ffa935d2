"""A replay decides as an online decode with the same random numbers does: which sample is kept at
every decision, every token, every serial step, and both answers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import scripted
from harness.engines import MIXED, REAL, REAL_PROMPTS
from harness.pools import assert_replay_is_online, make_pool, online
from zip_rc_jax.evaluation.replay import load_pool

SEED = 1


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
        {"skill": 0.3, "joint_temperature": 0.5, "joint_top_p": 0.9, "beta": 0.1},
        {"abstain": True, "beta": 20.0},
        {"abstain_below": 0.6, "beta": 0.1},
        {"no_harm": False, "beta": 0.1},
    ],
    ids=str,
)
def test_every_strategy_and_option_is_replayed_token_for_token(stored, lm, options):
    assert_same(stored, lm, **options)


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


def test_the_reward_of_every_token_gives_the_value_of_any_window(stored, lm):
    _, _, rows = stored
    window = 5
    results = online(lm, REAL_PROMPTS, dataclasses.replace(REAL, strategy="fixed", window=5), SEED)
    for p, result in enumerate(results):
        mine = [row for row in rows if row.prompt_index == p]
        for prefix, row in zip(result.prefixes, mine, strict=False):
            assert row.rewards[-window:].mean() == pytest.approx(prefix.expected_reward, abs=1e-6)


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
