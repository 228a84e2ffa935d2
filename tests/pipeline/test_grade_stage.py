"""What `zip-rc grade` tells and what a cut-off response is worth."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from zip_rc_jax.config import GradeConfig, PipelineConfig
from zip_rc_jax.data.parquet import GenerationInfo, write_parquet
from zip_rc_jax.data.rollouts import Rollout, read_rollouts, write_rollouts
from zip_rc_jax.grading.summary import GradeSummary, summarize
from zip_rc_jax.pipeline.grade import make_grades
from zip_rc_jax.runtime.errors import UsageError

RESPONSES = [
    ("So 42.\nAnswer: 42", True),
    ("Answer: 41", True),
    ("I do not know", True),
    ("Answer: 42", False),
    ("Well, then", False),
]


def rollout(number: int, response: str, finished: bool, level: int = 0) -> Rollout:
    return Rollout(
        prompt_index=number // 2, sample_index=number % 2, level=level, seed=0, task="math",
        prompt="p", question="q", answer="42",
        entry_json="", prompt_token_ids=np.array([1, 2], np.int32), output_token_ids=np.array([3,
        4], np.int32), response=response,
        finished=finished,
    )  # fmt: skip


def graded(tmp_path, responses, **grade):
    write_rollouts(
        tmp_path / "rollouts", [rollout(i, *r) for i, r in enumerate(responses)], metadata={}
    )
    config = PipelineConfig(run_dir=str(tmp_path), grade=GradeConfig(**grade))
    make_grades(config)
    return config


def test_the_shares_are_printed_and_kept(tmp_path, capsys):
    config = graded(tmp_path, RESPONSES)
    printed = capsys.readouterr().err
    assert "5 responses, 40.0% right, 40.0% without an answer, 40.0% cut off" in printed
    assert "warning: 2 of 5 responses state no answer and count as wrong" in printed
    kept = json.loads((tmp_path / "grades.json").read_text())
    assert kept["all"] == kept["math level 0"]
    assert kept["all"] == {
        "responses": 5,
        "right": 2,
        "without_answer": 2,
        "cut_off": 2,
        "cut_off_without_answer": 1,
    }
    make_grades(config)  # finished already
    assert "40.0% right" in capsys.readouterr().err


def test_there_is_no_warning_where_nearly_all_answer(tmp_path, capsys):
    graded(tmp_path, [RESPONSES[0]] * 20 + [RESPONSES[2]])
    assert "warning" not in capsys.readouterr().err


def test_the_warning_says_what_helps():
    cut = GradeSummary(responses=10, right=2, without_answer=5, cut_off=5, cut_off_without_answer=5)
    assert "raise rollout.max_tokens" in str(cut.warning())
    silent = dataclasses.replace(cut, cut_off=0, cut_off_without_answer=0)
    assert "tell the model in the prompt" in str(silent.warning())


def test_levels_are_counted_apart_and_add_up():
    found = summarize(
        [
            dataclasses.replace(rollout(i, *RESPONSES[i % 5], level=i % 3), correct=float(i % 2))
            for i in range(30)
        ]
    )
    everything = found.pop("")
    assert list(found) == ["math level 0", "math level 1", "math level 2"]
    assert sum(found.values(), GradeSummary()) == everything
    assert everything == GradeSummary(30, 15, 12, 12, 6)


@pytest.mark.parametrize(
    ("unfinished", "right"), [("graded", [1, 0, 0, 1, 0]), ("wrong", [1, 0, 0, 0, 0])]
)
def test_a_cut_off_response_is_worth_what_the_switch_says(tmp_path, unfinished, right):
    graded(tmp_path, RESPONSES, unfinished=unfinished)
    assert [r.correct for r in read_rollouts(tmp_path / "graded")] == right


def test_grades_of_another_switch_are_not_gone_on_with(tmp_path):
    config = graded(tmp_path, RESPONSES)
    with pytest.raises(UsageError, match="other settings"):
        make_grades(dataclasses.replace(config, grade=GradeConfig(unfinished="wrong")))


def test_an_unknown_switch_is_refused():
    with pytest.raises(UsageError, match=r"grade\.unfinished"):
        GradeConfig(unfinished="never")


def test_parquet_rollouts_are_graded_by_the_same_switch(tmp_path):
    rows = [dataclasses.replace(rollout(i, *r), task="") for i, r in enumerate(RESPONSES)]
    settings = GenerationInfo(
        model_id="m", temperature=1.0, min_p=0.0, max_model_len=64, reasoning_enabled=False
    )
    write_parquet(tmp_path / "theirs.parquet", rows, settings=settings, metadata={})
    config = PipelineConfig(
        run_dir=str(tmp_path / "run"),
        data=str(tmp_path / "theirs.parquet"),
        grade=GradeConfig("wrong"),
    )
    make_grades(config)
    assert [r.correct for r in read_rollouts(tmp_path / "run" / "graded")] == [1, 0, 0, 0, 0]
