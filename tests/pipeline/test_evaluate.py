"""The bench of an evaluation on a tiny model: what it samples, what it keeps, and what it
refuses."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from zip_rc_jax.config import (
    DecodeConfig,
    EvaluateConfig,
    GradeConfig,
    PipelineConfig,
    RolloutConfig,
)
from zip_rc_jax.data.problems import Problem, ProblemSet
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.inference.collect import run_all
from zip_rc_jax.pipeline.evaluation import introspection, runner
from zip_rc_jax.pipeline.evaluation.introspection import introspected
from zip_rc_jax.pipeline.evaluation.pool import online_run, sample_pool
from zip_rc_jax.pipeline.evaluation.runner import Decoded, EvaluationRunner
from zip_rc_jax.pipeline.seeds import evaluation_seed, with_own_samples
from zip_rc_jax.runtime.errors import UsageError

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = ("1 + 2 =", "3 + 4 =", "1 + 2 =")
PROBLEMS = [Problem(i, 0, i, question, "3", "chain_sum") for i, question in enumerate(QUESTIONS)]
SET = ProblemSet(tuple(PROBLEMS), ("",), {})
FIXED = DecodeConfig(strategy="fixed", n=2, max_num_seqs=8, interval=4, window=2, max_tokens=12)
CONFIG = PipelineConfig(decode=FIXED, evaluate=EvaluateConfig(prompts=len(PROBLEMS), samples=2))


@pytest.fixture
def bench(tmp_path):
    with Grader() as grader:
        yield EvaluationRunner(CONFIG, SET, grader, tmp_path)


def samples(decoded):
    return [[x.token_ids for x in r.prefixes] for r in decoded.results]


def test_equal_problems_get_samples_of_their_own(lm, bench):
    first, other, second = samples(bench.decode(lm, FIXED, "fixed"))
    assert set(first).isdisjoint(second)
    assert set(first).isdisjoint(other)


def test_an_evaluation_shares_no_samples_with_rollouts_of_the_same_seed(lm, bench):
    config = dataclasses.replace(CONFIG, rollout=RolloutConfig(seed=CONFIG.evaluate.seed))
    rollouts = run_all(
        runner.Engine(lm, FIXED, config.rollout.seed),
        with_own_samples(QUESTIONS, config.rollout.seed),
    )
    mine = samples(bench.decode(lm, FIXED, "fixed"))
    for found, result in zip(mine, rollouts, strict=True):
        assert set(found).isdisjoint(x.token_ids for x in result.prefixes)
    assert (
        len(
            {
                evaluation_seed(CONFIG),
                evaluation_seed(dataclasses.replace(CONFIG, evaluate=EvaluateConfig(seed=1))),
                0,
                1,
            }
        )
        == 4
    )


def test_a_pool_of_samples_that_a_budget_cut_is_refused(lm, bench):
    cut = bench.decode(lm, dataclasses.replace(FIXED, token_budget=8), "cut")
    with pytest.raises(
        UsageError,
        match=r"samples \[0, 1\] of problem 0: they are not finished.*Fix: .*without a budget",
    ):
        sample_pool(PROBLEMS, cut)


def test_an_answer_that_a_budget_cut_off_counts_as_graded(lm, bench):
    """As in the file of graded results that `zip-rc decode` writes."""
    setting = dataclasses.replace(FIXED, strategy="zip_rc", token_budget=8)
    cut = bench.decode(lm, setting, "cut")
    assert [r.finish_reason for r in cut.results] == ["token_budget"] * 3
    assert not any(x.state == "finished" for r in cut.results for x in r.prefixes)
    right = [[float(x.text == r.text) for x in r.prefixes] for r in cut.results]
    run = online_run("cut", setting, Decoded(cut.results, right, cut.seconds))
    assert run.correct_by_value.tolist() == run.correct_by_vote.tolist() == [1, 1, 1]
    assert run.n_finished.tolist() == [0, 0, 0]


def test_a_cut_off_sample_is_worth_what_the_switch_says(lm, tmp_path, monkeypatch):
    """The tiny model states no right answer, so the grader here calls everything right."""
    monkeypatch.setattr(Grader, "grade_many", lambda _, items: [1.0 for _ in items])
    for unfinished in ("graded", "wrong"):
        with Grader() as grader:
            config = dataclasses.replace(CONFIG, grade=GradeConfig(unfinished))
            found = EvaluationRunner(config, SET, grader, tmp_path).decode(lm, FIXED, "fixed")
        reasons = [x.finish_reason for r in found.results for x in r.prefixes]
        assert set(reasons) == {"stop", "length"}
        assert [g for of_prompt in found.grades for g in of_prompt] == [
            float(unfinished == "graded" or r == "stop") for r in reasons
        ]


def test_a_model_that_fails_ends_the_evaluation_before_anything_is_kept(lm, bench, tmp_path):
    """Where it failed there is no answer, and a score of 0 would look like a wrong one."""
    broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * np.nan, lm.params))
    with pytest.raises(
        UsageError,
        match=r"problem 0 \(level 0, seed 0\): the model's logits after the prompt are not finite",
    ):
        bench.decode(broken, dataclasses.replace(FIXED, strategy="reward_threshold"), "broken")
    assert not list(tmp_path.iterdir())


def test_what_was_decoded_survives_a_failure_in_grading(lm, bench, monkeypatch):
    def failing(items):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.grader, "grade_many", failing)
        with pytest.raises(KeyboardInterrupt):
            bench.decode(lm, FIXED, "fixed")
    monkeypatch.setattr(runner, "run_all", lambda *_: pytest.fail("decoded again"))
    graded = bench.decode(lm, FIXED, "fixed")
    assert [len(row) for row in graded.grades] == [2, 2, 2]
    monkeypatch.setattr(bench.grader, "grade_many", lambda _: pytest.fail("graded again"))
    assert samples(bench.decode(lm, FIXED, "fixed")) == samples(graded)


IN_ASCII = """
import pathlib, sys, types
import zip_rc_jax.data.rollouts as records
import zip_rc_jax.models.io.huggingface as huggingface
from zip_rc_jax.config import DecodeConfig, PipelineConfig
from zip_rc_jax.data.problems import Problem, ProblemSet
from zip_rc_jax.inference.tree import ROOT
from zip_rc_jax.inference.outputs import Prefix, Result, Usage
from zip_rc_jax.pipeline.evaluation import introspection, runner

here, word = pathlib.Path(sys.argv[1]), "\\u00e9"
assert (here / "probe").open("w").encoding.lower() not in ("utf-8", "utf8")

(here / "config.json").write_bytes(('{"name": "' + word + '"}').encode())
assert huggingface.read_json(here / "config.json") == {"name": word}

for _ in range(2):
    records.PartialRollouts(here / "partial", fingerprint={"name": word})

prefix = Prefix(0, ROOT, 0, (1,), word, "finished", "stop", 0.5, 0.0)
result = Result(word, word, 0, "stop", 0.5, 0.0, word, word, (prefix,), (), Usage(1, 1, 1, 0.0))
found = ProblemSet((Problem(0, 0, 0, word, word, "math"),), ("",), {"name": word})
runner.Engine, runner.run_all = lambda *_: None, lambda *_: [result]
bench = runner.EvaluationRunner(PipelineConfig(), found, types.SimpleNamespace(grade_many=lambda items: [1.0 for _ in items]), here / "bench")
model = types.SimpleNamespace(digest=lambda: word, tokenizer=types.SimpleNamespace(added_ids=((), ())))
for _ in range(2):
    assert bench.decode(model, DecodeConfig(), "run").results == [result]
    runner.run_all = None
"""  # noqa: E501


def test_what_was_written_as_utf_8_is_read_as_utf_8_whatever_the_locale(tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", IN_ASCII, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | ascii_locale, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_what_other_code_decoded_is_decoded_anew(lm, bench, monkeypatch):
    """The report names one commit, and everything in it was made by that."""
    bench.decode(lm, FIXED, "fixed")
    decoded = []
    monkeypatch.setattr(
        runner, "run_all", lambda *arguments: decoded.append(1) or run_all(*arguments)
    )
    bench.decode(lm, FIXED, "fixed")
    assert not decoded
    for version in (
        {"version": "0.1.0", "commit": "an earlier one"},
        {"version": "another", "commit": None},
    ):
        decoded.clear()
        monkeypatch.setattr(runner, "code_version", lambda version=version: version)
        bench.decode(lm, FIXED, "fixed")
        assert decoded


ADAPTIVE = dataclasses.replace(FIXED, strategy="zip_rc", n=3, beta=0.1)


def explaining(tmp_path, most):
    config = dataclasses.replace(
        CONFIG, evaluate=dataclasses.replace(CONFIG.evaluate, introspect=most)
    )
    return EvaluationRunner(config, SET, Grader(), tmp_path)


def test_searches_are_explained_as_they_were_decoded_wrong_ones_first(lm, tmp_path):
    bench = explaining(tmp_path, 2)
    found = bench.decode(lm, ADAPTIVE, "search")
    right = [[float(i != 1)] * len(r.prefixes) for i, r in enumerate(found.results)]
    told = introspected(bench, lm, ADAPTIVE, Decoded(found.results, right, found.seconds), "search")
    assert next(iter(told)) == 1
    assert len(told) == 2
    for i, record in told.items():
        trace = found.results[i].trace
        assert [d["multiplicity"][0] for d in record["decisions"]] == [
            list(d.multiplicity) for d in trace
        ]
        lengths = [len(p.token_ids) - p.fork_position for p in found.results[i].prefixes]
        kept = [0 if p is None else len(p["pieces"]) for p in record["prefixes"]]
        assert kept == lengths
    # Equal problems have samples of their own, also when only one of them is decoded again.
    only = explaining(tmp_path, 3)
    assert introspected(only, lm, ADAPTIVE, found, "search").keys() == {0, 1, 2}


def test_searches_that_were_explained_before_are_not_decoded_again(lm, tmp_path, monkeypatch):
    bench = explaining(tmp_path, 3)
    found = bench.decode(lm, ADAPTIVE, "search")
    told = introspected(bench, lm, ADAPTIVE, found, "search")
    monkeypatch.setattr(introspection, "Engine", None)
    again = explaining(tmp_path, 3)
    found = again.decode(lm, ADAPTIVE, "search")
    assert introspected(again, lm, ADAPTIVE, found, "search") == told
    with pytest.raises(TypeError):
        introspected(explaining(tmp_path, 2), lm, ADAPTIVE, found, "search")


def test_a_search_that_comes_out_otherwise_is_not_explained(lm, tmp_path):
    bench = explaining(tmp_path, 3)
    found = bench.decode(lm, ADAPTIVE, "search")
    other = dataclasses.replace(found.results[1], trace=found.results[1].trace[:-1])
    results = [found.results[0], other, found.results[2]]
    told = introspected(bench, lm, ADAPTIVE, dataclasses.replace(found, results=results), "search")
    assert told.keys() == {0, 2}


def test_none_is_explained_where_none_is_asked_for_or_all_are_too_long(lm, tmp_path, monkeypatch):
    found = explaining(tmp_path, 0).decode(lm, ADAPTIVE, "search")
    assert introspected(explaining(tmp_path, 0), lm, ADAPTIVE, found, "search") == {}
    monkeypatch.setattr(introspection, "MOST_TOKENS", 3)
    assert introspected(explaining(tmp_path, 3), lm, ADAPTIVE, found, "search") == {}
    with pytest.raises(UsageError, match="evaluate.introspect=-1"):
        EvaluateConfig(introspect=-1)
