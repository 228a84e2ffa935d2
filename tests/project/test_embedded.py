"""The models that ship with the package do what the README says of them: policy, head and search,
on held-out problems."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness.problem_sources import gym_problems
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.inference.engine import Engine
from zip_rc_jax.models.io.load import load
from zip_rc_jax.pipeline.evaluate import evaluate

pytestmark = pytest.mark.slow
# Held-out problems that no choice was made on.
OTHERS = (
    "problems.heldout=${problems.train}",
    "problems.heldout.seed=3000000000",
    "problems.heldout.span=3000000000",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """400 held-out problems that no choice was made on: sampled plainly, and searched at the
    headline prices."""
    directory = tmp_path_factory.mktemp("embedded")
    base = load_config("configs/chain_sum.yaml")
    betas = ",".join(map(str, sorted(set(base.evaluate.headline_beta))))
    overrides = [
        f"run_dir={directory}",
        "evaluate.prompts=400",
        f"evaluate.betas=[{betas}]",
        "evaluate.candidates=[published]",
    ]
    config = load_config(
        "configs/chain_sum.yaml",
        [*overrides, *OTHERS],
    )
    return evaluate(config, load("embedded:chain_sum_zip"), argv=["pytest"])


def test_the_policy_is_worth_deciding_about(found):
    pass_1 = [found.quality[f"policy/pass@1/level_{level}"] for level in range(4)]
    assert pass_1[-1] <= 0.6
    assert found.quality["policy/pass@8/level_3"] >= pass_1[-1] + 0.25
    assert found.quality["policy/longest_over_mean"] >= 1.4


def test_the_policy_solves_most_of_the_easiest_problems():
    """On 400 problems of that level: the 100 of `found` have a standard error of a point, and the
    bound is that near."""
    config = load_config(
        "configs/chain_sum.yaml",
        OTHERS,
    )
    easiest = [p for p in gym_problems(config.problems, "heldout", 1600) if p.level == 0]
    lm = load("embedded:chain_sum_zip")
    results = run_all(
        Engine(lm, dataclasses.replace(config.decode, strategy="fixed"), 0),
        prompt_texts(easiest, config, lm.tokenizer),
    )
    with Grader() as grader:
        scores = grader.grade_many(
            [(p, x.text) for p, r in zip(easiest, results, strict=True) for x in r.prefixes]
        )
    assert np.mean([correct(s) for s in scores]) > 0.9


def test_the_head_tells_good_from_bad_within_a_prompt(found):
    assert found.quality["within_prompt_auc"] >= 0.8
    assert found.quality["within_prompt_auc/mixed_prompts"] > 100


def test_the_search_beats_majority_vote_at_equal_or_lower_cost(found):
    for alpha in (0.1, 1.0):
        rows = [r for r in found.headline if np.isclose(r.run.alpha, alpha)]
        best = max(rows, key=lambda r: r.majority.difference)
        assert not best.majority.spends_less
        assert best.majority.low > 0
        assert best.majority_hardest.low > 0


def test_the_policy_stayed_where_it_was(found):
    assert found.drift["full/kl_start_trained_per_token"] < 0.01
    # Two points are the sampling error of the accuracy itself. The paired interval is narrower, as
    # both models draw with the same random numbers: -0.6 [-1.5, +0.3].
    assert abs(found.drift["full/sampling_accuracy_change/mean"]) < 0.02
