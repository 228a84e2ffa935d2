"""The replay stage on a tiny model: what it makes once, what it reads again, and what it refuses
before a model is loaded."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from harness.small_tokenizers import chatml
from harness.tiny import tiny_chat_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import (
    DecodeConfig,
    EvaluateConfig,
    PipelineConfig,
    PromptConfig,
    SelfEvaluationConfig,
)
from zip_rc_jax.config.replay import ReplayConfig
from zip_rc_jax.data.problems import Problem, ProblemSet
from zip_rc_jax.data.sample_pool import PoolFiles
from zip_rc_jax.evaluation.method_table import METHOD_TABLE
from zip_rc_jax.evaluation.pool_curves import Readings
from zip_rc_jax.evaluation.pool_readings import load_readings, stored_readings
from zip_rc_jax.evaluation.replay_report import ReplayRow
from zip_rc_jax.evaluation.self_evaluation import SelfEvaluation
from zip_rc_jax.evaluation.token_statistics import TokenStatistics, token_statistics
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.pipeline import pool, replay
from zip_rc_jax.pipeline.evaluation.runner import EvaluationRunner
from zip_rc_jax.pipeline.replay import ReplayReport, left_out, run_replay
from zip_rc_jax.pipeline.rollouts import as_rollouts
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.signals import Interrupted

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = ("1 + 2 =", "3 + 4 =", "1 + 2 =", "wait so check", "5 + 6 =")
PROBLEMS = [
    Problem(i, i % 2, i, question, "3", "chain_sum") for i, question in enumerate(QUESTIONS)
]
DECODE = DecodeConfig(n=2, max_num_seqs=8, interval=4, window=2, max_tokens=12)
ALPHAS = (0.1, 1.0)
CONFIG = PipelineConfig(
    decode=DECODE,
    evaluate=EvaluateConfig(
        prompts=len(PROBLEMS), samples=2, alphas=ALPHAS, betas=(0.1,), headline_beta=(0.1, 0.1),
        bootstrap=50,
    ),
    replay=ReplayConfig(
        samples=4, reward_thresholds=(0.5,), length_budgets=(6,), selection_exponents=(0.5,),
        windows=(4,), intervals=(8,), subsets=3,
    ),
)  # fmt: skip


@pytest.fixture
def run_dir(lm, tmp_path, monkeypatch):
    """A run directory whose final model is the tiny one; `loaded` in it counts the loads."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("w")
    monkeypatch.setattr(replay, "held_out", lambda _: PROBLEMS)
    monkeypatch.setattr(replay, "load", lambda *_, **__: lm)
    return tmp_path


def run(run_dir, **replayed):
    config = dataclasses.replace(
        CONFIG, run_dir=str(run_dir), replay=dataclasses.replace(CONFIG.replay, **replayed)
    )
    return run_replay(config, argv=["zip-rc", "replay"])


def no_loading(monkeypatch):
    monkeypatch.setattr(replay, "load", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.slow
def test_one_command_makes_the_pool_and_the_curves_and_the_next_needs_no_model(
    run_dir, lm, monkeypatch
):
    found = run(run_dir)
    names = [row.name for row in found.rows]
    assert (found.prompts, found.samples) == (5, 4)
    for name in (
        "majority@1", "pass@4", "published n=2 alpha=0.1 beta=0.1", "half finished n=2",
        "reward threshold 0.5 n=2", "length budget 6 n=2", "window=4 n=2 alpha=1 beta=0.1",
        "interval=8 n=2 alpha=0.1 beta=0.1", "selection_exponent=0.5 n=2 alpha=1 beta=0.1",
    ):  # fmt: skip
        assert name in names
    assert sorted(p.name for p in (run_dir / "replay").iterdir()) == [
        "replay.png", "results.csv", "results.json",
    ]  # fmt: skip
    written = json.loads((run_dir / "replay" / "results.json").read_text())
    assert [row["name"] for row in written["rows"]] == names
    assert written["pool"]["stride"] == 4
    with (run_dir / "replay" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    for row, mine in zip(rows, found.rows, strict=True):
        assert float(row["accuracy"]) == mine.accuracy
        assert float(row["gen_cost_alpha_0.1"]) == mine.costs[0]
        assert mine.low <= mine.accuracy <= mine.high
        assert mine.costs[1] == pytest.approx(mine.compute)

    no_loading(monkeypatch)
    again = run(run_dir)
    assert repr(again.rows) == repr(found.rows)
    wider = run(run_dir, ns=(1, 3), reward_thresholds=(0.1, 0.9))
    assert len(wider.rows) > len(found.rows)

    # The samples are those of an evaluation.
    with Grader() as grader:
        config = dataclasses.replace(CONFIG, run_dir=str(run_dir))
        bench = EvaluationRunner(
            config, ProblemSet(tuple(PROBLEMS), ("0", "1"), {}), grader, run_dir / "bench"
        )
        decoded = bench.decode(lm, dataclasses.replace(config.fixed_decode), "fixed")
    rows = list(PoolFiles(run_dir / "pool"))
    for p, result in enumerate(decoded.results):
        for k, prefix in enumerate(result.prefixes):
            assert tuple(rows[4 * p + k].token_ids.tolist()) == prefix.token_ids
            assert rows[4 * p + k].correct == decoded.grades[p][k]

    # Another model, other settings, more samples: refused by name.
    (run_dir / "final" / "weights").write_text("other")
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1.5, lm.params))
    monkeypatch.setattr(replay, "load", lambda *_, **__: other)
    with pytest.raises(UsageError, match=r"pool .*: it was drawn from another model than the one"):
        run(run_dir)
    monkeypatch.setattr(replay, "load", lambda *_, **__: lm)
    run(run_dir)  # the same weights at another time
    no_loading(monkeypatch)
    run(run_dir)  # and now that is known

    warmer = dataclasses.replace(
        CONFIG, run_dir=str(run_dir), decode=dataclasses.replace(DECODE, temperature=0.5)
    )
    with pytest.raises(UsageError, match=r"decode.temperature was 1.0, now 0.5.*Fix: restore"):
        run_replay(warmer, argv=[])
    refused = {
        r"replay.samples=8: .*has 4 samples of every problem": {"samples": 8},
        r"joints was 'float32', now 'uint8'": {"joints": "uint8"},
        r"interval=6.*every 4 tokens": {"intervals": (6,)},
        r"stride was 4, now 2": {"stride": 2},
        r"replay of window=3.*: window=3: .*every 4 tokens": {"windows": (3,)},
    }
    for message, options in refused.items():
        with pytest.raises(UsageError, match=message):
            run(run_dir, **options)


def test_a_signal_ends_it_after_the_file_in_hand_and_the_same_command_goes_on(run_dir, monkeypatch):
    graded = Grader.grade_many

    def signalled(self, items):
        os.kill(os.getpid(), signal.SIGTERM)
        return graded(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Grader, "grade_many", signalled)
        with pytest.raises(Interrupted, match="pool: stopped after 1 of 2 files"):
            run(run_dir)
    assert not (run_dir / "pool").exists()
    decoded = []
    decode = pool.decode_with_joints
    monkeypatch.setattr(
        pool,
        "decode_with_joints",
        lambda engine, requests, *rest: (
            decoded.append(len(requests)) or decode(engine, requests, *rest)
        ),
    )
    found = run(run_dir)
    assert decoded == [1], "only what was missing is decoded"
    assert [row.prompt_index for row in PoolFiles(run_dir / "pool")] == sorted([0, 1, 2, 3, 4] * 4)
    assert np.isfinite([row.accuracy for row in found.rows]).all()


def test_what_no_pool_can_give_is_refused_before_a_model_is_loaded(run_dir, monkeypatch):
    no_loading(monkeypatch)

    def refused(message, decode=None, **options):
        config = dataclasses.replace(
            CONFIG,
            run_dir=str(run_dir),
            decode=dataclasses.replace(DECODE, **decode or {}),
            replay=dataclasses.replace(CONFIG.replay, **options),
        )
        with pytest.raises(UsageError, match=message):
            run_replay(config, argv=[])

    refused(r"n=5 in a replay: the pool has 4 samples.*replay.samples", {"n": 5})
    refused(r"token_budget=9 with a pool of stride 4: .*replay.stride=1", {"token_budget": 9})
    refused(r"time_budget=2 in a replay: a replay has no clock", {"time_budget": 2.0})
    refused(r"window=3: the pool has the mean joint of every 4", windows=(3,))
    refused(r"interval=6 with replay.stride=4: .*replay.stride=2", intervals=(6,), stride=4)
    refused(
        r"interval=8 with stop strings and a pool of stride 4", {"stop": ("so",)}, intervals=(8,)
    )
    refused(r"replay of published n=11.*: all 2\^11|exhaustive", ns=(11,), samples=11,
            candidates=("exhaustive",))  # fmt: skip
    refused(r"replay: .*they occur twice", reward_thresholds=(0.5, 0.5))
    assert not (run_dir / "pool").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ("branching",)}, "'branching': it starts prefixes in the middle.*evaluate"),
        ({"candidates": ("all",)}, "replay.candidates='all': it must be one of published"),
        ({"ns": (8,), "samples": 4}, r"replay.ns=\[8\] with replay.samples=4.*replay.samples=8"),
        ({"joints": "int4"}, "replay.joints='int4': it must be one of float32, bfloat16, uint8"),
        ({"samples": 0}, "replay.samples=0: it counts at least one"),
        ({"windows": (0,)}, "replay.windows=0: it counts at least one"),
        ({"stride": -1}, "replay.stride=-1: it counts tokens"),
        ({"seed": -1}, "replay.seed=-1: it is not a whole number of 32 bits"),
    ],
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        ReplayConfig(**options)


def test_the_stride_is_the_largest_that_all_intervals_are_multiples_of():
    assert ReplayConfig().stride_for(64) == 64
    assert ReplayConfig(intervals=(96, 32)).stride_for(64) == 32
    assert ReplayConfig(stride=8, intervals=(96, 32)).stride_for(64) == 8


def test_the_command_refuses_branching_by_name_and_with_a_fix(capsys):
    arguments = ["replay", str(ROOT / "configs" / "chain_sum_demo.yaml")]
    assert main([*arguments, "replay.candidates=[branching]"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("zip-rc replay: replay.candidates with 'branching'")
    assert "Fix: leave it out, and decode it online" in told


def test_the_command_prints_the_table(monkeypatch, capsys):
    nan = float("nan")
    row = ReplayRow(
        "published n=2", "search", "zip_rc", 2, "published", 0.1, 0.05, nan, 0.625, 0.5, 0.75,
        0.625, 0.5, 0.5, 0.01, 1.5, 1.25, (1.275, 1.5),
    )  # fmt: skip
    report = ReplayReport((row,), (0.1, 1.0), prompts=8, samples=4, seconds=0.1)
    monkeypatch.setattr(replay, "replay_benchmarks", lambda *_, **__: {"heldout": report})
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["replay", str(ROOT / "configs" / "chain_sum_demo.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "Replay of 4 samples of each of 8 problems" in printed
    for cell in ("published n=2", "62.5", "[50.0, 75.0]", "1.50", "GenCost, alpha 0.1"):
        assert cell in printed


@pytest.mark.slow
def test_what_the_policy_says_of_its_samples_is_made_with_the_pool(run_dir, monkeypatch):
    """As an evaluation would ask it, with the samples of its own decode."""
    lm = tiny_chat_lm(chatml())
    monkeypatch.setattr(replay, "load", lambda *_, **__: lm)
    asked = SelfEvaluationConfig(question="Is that right?", yes="Yes", no="No")
    evaluate = dataclasses.replace(CONFIG.evaluate, self_evaluation=asked, samples=4)
    config = dataclasses.replace(
        CONFIG,
        run_dir=str(run_dir),
        prompt=PromptConfig(style="chat"),
        evaluate=evaluate,
        decode=dataclasses.replace(DECODE, max_num_seqs=16),
    )
    found = run_replay(config, argv=[])
    assert "self_evaluation@4" in {row.name for row in found.rows}
    assert "self_evaluation" not in found.left_out
    with Grader() as grader:
        bench = EvaluationRunner(
            config, ProblemSet(tuple(PROBLEMS), ("0", "1"), {}), grader, run_dir / "bench"
        )
        decoded = bench.decode(lm, config.fixed_decode, "fixed")
    samples = [as_rollouts(p, r, lm, True) for p, r in zip(PROBLEMS, decoded.results, strict=True)]
    values, extra = SelfEvaluation(lm, PROBLEMS, config)(samples)
    readings = load_readings(PoolFiles(run_dir / "pool"))
    np.testing.assert_allclose(readings.self_evaluation[0], values, rtol=1e-6)
    np.testing.assert_array_equal(readings.self_evaluation[1], extra)
    statistics = token_statistics(lm, [x for row in samples for x in row], ScoringConfig(64))
    mine = [x for row in readings.statistics for x in row]
    for one, other in zip(mine, statistics, strict=True):
        np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-5)
        assert one.self_certainty == pytest.approx(other.self_certainty, rel=1e-5)

    # Another question is another opinion: the pool's is not shown as the answer to it.
    other = dataclasses.replace(asked, question="Are you sure?")
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(evaluate, self_evaluation=other)
    )
    again = run_replay(config, argv=[])
    assert "self_evaluation@4" not in {row.name for row in again.rows}
    assert "by other settings of evaluate.self_evaluation" in again.left_out["self_evaluation"]


def test_readings_come_back_as_they_were_stored(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [[2, 5], [1, 3], [4, 4]]
    statistics = [
        [TokenStatistics(*(rng.random(n).astype(np.float32) for _ in range(2))) for n in row]
        for row in lengths
    ]
    judged = {name: rng.random((2, 3, 2)) for name in ("self_evaluation", "reward_model")}
    arrays = stored_readings(Readings(statistics=statistics, **judged))
    rewards = [rng.random(n).astype(np.float32) for row in lengths for n in row]
    files = SimpleNamespace(
        metadata={"samples": 2, "readings": {"parameter_ratio": 0.25}},
        records=lambda _: [{"rewards": x} for x in rewards],
        readings=lambda: arrays,
    )
    found = load_readings(files)
    for p, row in enumerate(lengths):
        for k, _ in enumerate(row):
            mine, given = found.statistics[p][k], statistics[p][k]
            np.testing.assert_array_equal(mine.confidence, given.confidence)
            assert mine.self_certainty == given.self_certainty
            np.testing.assert_array_equal(found.rewards[p][k], rewards[2 * p + k])
    for name, values in judged.items():
        np.testing.assert_array_equal(getattr(found, name), values)
    assert found.parameter_ratio == 0.25
    first = load_readings(files, 1)
    np.testing.assert_array_equal(first.reward_model, judged["reward_model"][:, :, :1])
    assert [len(row) for row in first.statistics] == [len(row) for row in first.rewards] == [1] * 3
    assert load_readings(files, along=False).statistics is None


def test_what_a_pool_does_not_hold_is_named_with_the_reason():
    """Pools of version 0.2 have no readings; one made with evaluate.baselines=plain has none."""
    old = SimpleNamespace(metadata={})
    found = left_out(CONFIG, old)
    needs = {"self_certainty", "self_certainty_borda", "deepconf_offline", "deepconf_online"}
    for name in needs:
        assert "made without probabilities of all tokens: delete the pool" in found[name]
    assert set(found) == needs | {
        "self_evaluation", "reward_model_weighted", "reward_model_best_of_n",
    }  # fmt: skip
    whole = SimpleNamespace(metadata={"readings": {"statistics": True}})
    assert not needs & set(left_out(CONFIG, whole))
    evaluate = dataclasses.replace(
        CONFIG.evaluate, baselines="plain", candidates=("published", "branching")
    )
    plain = left_out(dataclasses.replace(CONFIG, evaluate=evaluate), whole)
    votes = {"pass", "majority", "best_of_n", "weighted_best_of_n"}
    assert set(plain) == {m.name for m in METHOD_TABLE} - votes | {
        "search with candidates=branching"
    }
