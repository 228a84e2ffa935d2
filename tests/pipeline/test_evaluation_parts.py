"""The small parts of an evaluation: which problems are drawn, whose lengths are known, how tries
and heads are put side by side."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness.pools import small_pool
from harness.tiny import TINY_GRID
from zip_rc_jax.config import (
    DecodeConfig,
    EvaluateConfig,
    PipelineConfig,
    PromptConfig,
    RewardModelConfig,
)
from zip_rc_jax.data.problems import Problem, ProblemSet
from zip_rc_jax.evaluation.pool_curves import window_means
from zip_rc_jax.evaluation.rollout_predictions import predict_rollouts
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.pipeline.evaluation.benchmarks import evaluation_benchmarks, with_instruction
from zip_rc_jax.pipeline.evaluation.pool import joined_pools, sample_pool
from zip_rc_jax.pipeline.evaluation.predictions import (
    by_problem,
    chosen_prompts,
    known_bins,
    with_values_of,
)
from zip_rc_jax.pipeline.evaluation.runner import EvaluationRunner
from zip_rc_jax.pipeline.rollouts import as_rollouts
from zip_rc_jax.pipeline.seeds import evaluation_seed, try_seed
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.errors import UsageError


def test_problems_are_drawn_from_the_hardest_to_the_easiest():
    shares = np.array([0.5, 0.0, 1.0, 0.25, 0.75, 0.5, 0.0])
    pool = dataclasses.replace(
        small_pool(0, prompts=7, n=4),
        correct=np.array([[share > k / 4 for k in range(4)] for share in shares], float),
    )
    found = [Problem(i, 0, 0, "?", "1", "math", id=f"p{i}") for i in range(7)]
    whole: np.ndarray = np.ones(7, bool)
    assert chosen_prompts(found, pool, whole, ()) == [1, 3, 5, 2]
    whole[[1, 2]] = False
    assert chosen_prompts(found, pool, whole, ()) == [6, 3, 5, 4]
    assert chosen_prompts(found, pool, whole & False, ()) == []
    assert chosen_prompts(found, pool, whole, ("p2", "p0")) == [0, 2]


def test_a_sample_that_was_cut_off_in_the_last_bin_has_a_known_bin():
    """The last bin of the tiny grid begins at 7 tokens."""
    finished = np.array([[True, True], [True, False], [True, False]])
    length = np.array([[3, 2], [3, 7], [3, 6]])
    assert known_bins(TINY_GRID, finished, length).tolist() == [True, True, False]


def test_a_window_mean_is_that_of_the_last_values():
    trace = np.random.default_rng(0).random(9).astype(np.float32)
    for window in (1, 3, 50):
        expected = [trace[max(0, t - window + 1) : t + 1].mean() for t in range(9)]
        np.testing.assert_allclose(window_means(trace, window), expected, rtol=1e-6)


def test_tries_of_a_problem_follow_each_other_and_share_its_unit_of_cost():
    pools = [small_pool(seed, prompts=3) for seed in (0, 1)]
    pools = [dataclasses.replace(pool, level=pools[0].level) for pool in pools]
    joined = joined_pools(pools)
    assert (joined.tries, joined.n_problems, joined.n_prompts) == (2, 3, 6)
    for p in range(3):
        lengths = np.concatenate([pool.self_length[p] for pool in pools])
        for t in range(2):
            np.testing.assert_array_equal(joined.correct[2 * p + t], pools[t].correct[p])
            assert joined.mean_length[2 * p + t] == pytest.approx(lengths.mean())
    together = by_problem(joined)
    np.testing.assert_array_equal(
        together.value, np.concatenate([pool.value for pool in pools], axis=1)
    )
    assert joined_pools(pools[:1]) is pools[0]


def test_the_first_try_is_an_evaluation_in_one_try():
    config = PipelineConfig()
    seeds = [try_seed(config, number) for number in range(64)]
    assert seeds[0] == evaluation_seed(config)
    assert len(set(seeds)) == 64


def test_values_from_predictions_are_those_of_the_decoder(lm, tmp_path):
    """So the columns of the full model and of Lite are made alike."""
    decode = DecodeConfig(strategy="fixed", n=2, max_num_seqs=4, interval=4, window=3, max_tokens=9)
    config = PipelineConfig(decode=decode, evaluate=EvaluateConfig(samples=2))
    found = [Problem(i, 0, i, q, "3", "math") for i, q in enumerate(("1 + 2 =", "wait so"))]
    with Grader() as grader:
        bench = EvaluationRunner(config, ProblemSet(tuple(found), ("",), {}), grader, tmp_path)
        decoded = bench.decode(lm, decode, "fixed")
    pool = sample_pool(found, decoded)
    rows = [as_rollouts(p, r, lm, True) for p, r in zip(found, decoded.results, strict=True)]
    flat = predict_rollouts(lm, [x for row in rows for x in row], ScoringConfig(64))
    again = with_values_of(pool, [flat[:2], flat[2:]], decode.window)
    np.testing.assert_allclose(again.value, pool.value, atol=1e-5)


def test_the_instruction_of_a_benchmark_is_the_user_turn_of_every_variant():
    prompt = PromptConfig(
        "chat",
        instruction="Mine: {question}",
        variants=({"share": 1.0, "instruction": "{question}?"}, {"system": "Be brief."}),
    )
    found = with_instruction(prompt, "{question}\n\nBox it.")
    for number in range(2):
        assert found.variant(number).instruction == "{question}\n\nBox it."
    assert found.variant(1).system == "Be brief."
    assert with_instruction(prompt, "") is prompt
    raw = PromptConfig()
    assert with_instruction(raw, "{question}\n\nBox it.") is raw


def test_settings_of_an_evaluation_that_nothing_would_read_are_refused():
    with pytest.raises(UsageError, match=r"benchmark_table='t\.yaml' without benchmarks"):
        EvaluateConfig(benchmark_table="t.yaml")
    with pytest.raises(UsageError, match=r"evaluate\.baselines='none'"):
        EvaluateConfig(baselines="none")
    with pytest.raises(UsageError, match="without a path"):
        EvaluateConfig(reward_model=RewardModelConfig(system="s"))


def test_an_answer_choice_that_no_table_shows_is_refused_in_an_evaluation():
    own = PipelineConfig(decode=DecodeConfig(answer="zip_rc_jax.inference.tree:best_prefix"))
    with pytest.raises(UsageError, match=r"decode\.answer=.*compare the answers by value and by"):
        evaluation_benchmarks(own)


def test_the_sweep_has_what_the_config_decodes():
    """An own policy at the predeclared prices, an own utility at all of them, and a budget of
    one's own beside the quantile."""
    own = "harness.user_plugins"
    e = EvaluateConfig(alphas=(0.1, 1.0), betas=(0.1, 0.05), headline_beta=(0.05, 0.1))
    plain = [name for name, _ in PipelineConfig(evaluate=e).sweep(9)]
    policy = PipelineConfig(decode=DecodeConfig(strategy=f"{own}:first_alone"), evaluate=e)
    added = [name for name, _ in policy.sweep(9) if name not in plain]
    assert added == [f"{own}:first_alone alpha={a} beta={b}" for a, b in ((0.1, 0.05), (1, 0.1))]
    utility = PipelineConfig(decode=DecodeConfig(utility=f"{own}:spendthrift"), evaluate=e)
    found = {name: setting.utility for name, setting in utility.sweep(9)}
    assert [name for name in found if name not in plain] == [
        f"{own}:spendthrift {name}" for name in plain if name.startswith("published")
    ]
    assert {found[name] for name in plain if name.startswith("published")} == {"sampling"}
    budget = PipelineConfig(
        decode=DecodeConfig(strategy="length_budget", length_budget=7), evaluate=e
    )
    assert [name for name, _ in budget.sweep(9) if name not in plain] == ["length budget 7"]
