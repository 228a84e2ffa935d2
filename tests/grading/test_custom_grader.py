"""A grader of the user's own: a dotted name in the settings, run in the worker process."""

from __future__ import annotations

import os
import pickle
import re
import warnings

import numpy as np
import pytest

from harness.documents import DOCS
from zip_rc_jax.config import DecodeConfig, GradeConfig, PipelineConfig
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.rollouts import Rollout, read_metadata, read_rollouts, write_rollouts
from zip_rc_jax.grading import answer_groups
from zip_rc_jax.grading.custom import CustomGrader, grader_of
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.pipeline.grade import make_grades
from zip_rc_jax.runtime.errors import UsageError


def name(function):
    return f"harness.user_graders:{function}"


def problem(answer, task="essay"):
    return Problem(0, 0, 0, "How long?", answer, task)


@pytest.fixture(scope="module")
def by_length():
    with CustomGrader(name("length")) as grader:
        yield grader


def test_a_function_by_name_scores_every_response(by_length):
    items = [(problem("4"), "ab"), (problem("2"), "ab"), (problem("8"), "ab")]
    assert by_length.grade_many(items) == [0.5, 1.0, 0.25]


def test_it_gets_the_fields_of_the_problem_and_runs_in_another_process():
    with CustomGrader(name("seen")) as grader:
        assert grader.score(problem("4"), "essay|How long?|4") == 1.0
        assert grader.score(problem("4"), "another") == 0.0
    with CustomGrader(name("elsewhere")) as grader:
        assert grader.score(problem(str(os.getpid())), "") == 1.0


def test_it_cannot_write_files(tmp_path):
    with CustomGrader(name("writing")) as grader, pytest.raises(UsageError, match="it fails"):
        grader.score(problem(str(tmp_path / "made")), "")
    assert not (tmp_path / "made").exists() or not (tmp_path / "made").read_text()


def test_a_response_that_takes_too_long_is_wrong_and_the_next_one_is_graded():
    with CustomGrader(name("slow"), timeout=1.0) as grader:
        with pytest.warns(UserWarning, match="slow' took more than 1 seconds"):
            assert grader.score(problem("4"), "slow") == 0.0
        assert grader.score(problem("4"), "fast") == 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it is told once
            assert grader.score(problem("4"), "slow") == 0.0


def test_a_function_that_ends_its_process_grades_nothing_right():
    with CustomGrader(name("killing")) as grader, pytest.warns(UserWarning, match="process died"):
        assert grader.score(problem("4"), "") == 0.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_much", r"too_much'.*it returned 1\.5, which is no number in \[0, 1\]"),
        ("a_word", r"a_word'.*it returned 'yes'"),
        ("failing", r"failing'.*it fails \(KeyError: 'How long\?'\), for the response 'mine'"),
    ],
)
def test_what_a_function_does_wrong_is_told_by_its_name(function, message):
    with CustomGrader(name(function)) as grader, pytest.raises(UsageError, match=message) as told:
        grader.score(problem("4"), "mine")
    assert len(str(told.value)) < 900


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (name("one_argument"), r"one_argument.*cannot be called with \(problem, response\)"),
        (name("not_callable"), "neither a name nor a function"),
        (name("absent"), "importing it fails.*absent"),
        ("no_such_module:f", "importing it fails.*no_such_module"),
        ("length", "must be one of judge, or package.module:function"),
    ],
)
def test_a_name_that_leads_to_no_grader_is_refused_with_the_settings(value, message):
    with pytest.raises(UsageError, match=message):
        GradeConfig(grader=value)


def test_only_names_are_settings_since_another_process_imports_them():
    with pytest.raises(UsageError, match='write "module:function"'):
        GradeConfig(grader=len)
    with pytest.raises(UsageError, match=r"grade\.timeout=0"):
        GradeConfig(timeout=0)


def test_the_settings_choose_the_grader(tmp_path):
    with grader_of(GradeConfig(timeout=3), tmp_path) as own:
        assert type(own) is Grader
        assert own.timeout == 3
    with grader_of(GradeConfig(grader=name("length"), timeout=2), tmp_path) as custom:
        assert isinstance(custom, CustomGrader)
        assert custom.timeout == 2
        with pickle.loads(pickle.dumps(custom)) as copy:
            assert copy.score(problem("4"), "abcd") == 1.0
    (tmp_path / "run.yaml").write_text(f"grade: {{grader: {name('length')}}}\n")
    assert load_config(tmp_path / "run.yaml").grade.grader == name("length")


def test_votes_are_grouped_by_an_extractor_and_an_equivalence_by_name():
    texts = ["I take (b)", "I take (B)", "I take (a)", "I take none"]
    decode = DecodeConfig(answer_extractor=name("letter"), answer_equivalence=name("same_letter"))
    found = answer_groups(texts, decode.answer_extractor, decode.answer_equivalence)
    assert found == [0, 0, 1, -1]


def rollout(number, response):
    return Rollout(
        prompt_index=number, sample_index=0, level=0, seed=0, task="essay", prompt="p",
        question="q", answer="4", entry_json="", prompt_token_ids=np.array([1]),
        output_token_ids=np.array([3]), response=response, finished=True,
    )  # fmt: skip


def test_the_grade_stage_uses_it_and_records_its_name(tmp_path, capsys):
    write_rollouts(
        tmp_path / "rollouts", [rollout(i, t) for i, t in enumerate(("abcd", "ab"))], metadata={}
    )
    config = PipelineConfig(run_dir=str(tmp_path), grade=GradeConfig(grader=name("length")))
    make_grades(config)
    graded = list(read_rollouts(tmp_path / "graded"))
    assert [r.correct for r in graded] == [1.0, 0.0]  # half of the marks are not all
    assert read_metadata(tmp_path / "graded")["grade"]["grader"] == name("length")
    assert "state no answer" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="grader"):
        make_grades(PipelineConfig(run_dir=str(tmp_path)))


def test_the_settings_of_the_page_are_settings(tmp_path, monkeypatch):
    (tmp_path / "my_graders.py").write_text("def mentions(problem, response):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "graders.md").read_text(), re.DOTALL)
    graders = []
    for block in blocks:
        (tmp_path / "run.yaml").write_text(block)
        graders.append(load_config(tmp_path / "run.yaml").grade)
    assert [grade.grader for grade in graders] == ["my_graders:mentions", "judge"]
    assert graders[1].judge.concurrency == 16
    with grader_of(graders[0], tmp_path) as grader:
        assert grader.score(problem("4"), "") == 1.0


def test_records_of_the_tasks_own_scorers_stay_as_they_were():
    assert GradeConfig().record() == {"unfinished": "graded"}
