"""Which responses of the authors' tables ended: their column `finished` knows one end token of
several."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from harness.rollouts import make_rollouts
from harness.small_tokenizers import chatml
from zip_rc_jax.config import GradeConfig, PipelineConfig, PolicyConfig
from zip_rc_jax.data.ends import finish_at_ends
from zip_rc_jax.data.parquet import GenerationInfo, write_parquet
from zip_rc_jax.data.rollouts import read_metadata, read_rollouts
from zip_rc_jax.models.io.load import load_tokenizer
from zip_rc_jax.pipeline.ends import with_all_ends
from zip_rc_jax.pipeline.grade import make_grades
from zip_rc_jax.runtime.errors import UsageError

INFO = GenerationInfo("Qwen/Qwen3-1.7B", 1.0, 0.1, 32768, False)
TURN_END, TEXT_END = chatml().eos_ids  # <|im_end|>, and <|endoftext|> of generation_config.json
# The last token of each response, and what their sampler's column says.
LAST = [TURN_END, TEXT_END, 7, TEXT_END]
THEIRS = [True, False, False, False]


def table(directory):
    """A table with those four responses, all of them with the right answer."""
    rollouts = [
        dataclasses.replace(
            one,
            prompt_token_ids=[5, 6],
            output_token_ids=[10, 11, last],
            response="Answer: 4",
            answer="4",
            entry_json="",
            task="",
            finished=finished,
            correct=math.nan,
            value=math.nan,
        )
        for one, last, finished in zip(make_rollouts(4), LAST, THEIRS, strict=True)
    ]
    write_parquet(directory / "theirs.parquet", rollouts, settings=INFO)
    return directory / "theirs.parquet"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """What the hub has beside the weights of a model with two end tokens."""
    directory = tmp_path_factory.mktemp("policy")
    chatml().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": TURN_END}))
    both = {"eos_token_id": [TURN_END, TEXT_END]}
    (directory / "generation_config.json").write_text(json.dumps(both))
    return directory


def config(tmp_path, policy="", **settings):
    data = {"run_dir": str(tmp_path / "run"), "data": str(table(tmp_path))}
    return PipelineConfig(**data, policy=PolicyConfig(path=str(policy)), **settings)


def test_a_response_that_ends_with_any_end_token_is_finished():
    rollouts = [
        dataclasses.replace(one, output_token_ids=np.array(output), finished=finished)
        for one, output, finished in zip(
            make_rollouts(5),
            ([1, 2], [1, 9], [9, 1], [8], [1, 1]),
            (False, False, False, False, True),
            strict=True,
        )
    ]
    found, changed = finish_at_ends(iter(rollouts), (8, 9))
    assert [one.finished for one in found] == [False, True, False, True, True]
    assert changed == 2
    assert [one.finished for one in rollouts] == [False] * 4 + [True], "the callers' stay"


def test_every_end_token_of_the_policy_counts_and_a_grade_of_wrong_follows_it(tmp_path, policy):
    settings = config(tmp_path, policy, grade=GradeConfig(unfinished="wrong"))
    graded = read_rollouts(make_grades(settings))
    assert [one.finished for one in graded] == [True, True, False, True]
    assert [one.correct for one in graded] == [1, 1, 0, 1]
    assert read_metadata(tmp_path / "run/graded")["ends"] == [TURN_END, TEXT_END]
    make_grades(settings)  # made already, of the same table and ends
    with pytest.raises(UsageError, match="ends was"):
        make_grades(dataclasses.replace(settings, data_ends="table"))


def test_the_column_of_the_table_counts_where_that_is_asked_for(tmp_path, policy):
    settings = config(
        tmp_path, policy, data_ends="table", grade=GradeConfig(unfinished="wrong")
    )  # fmt: skip
    graded = read_rollouts(make_grades(settings))
    assert [one.finished for one in graded] == THEIRS
    assert [one.correct for one in graded] == [1, 0, 0, 0], "as the authors' code has them"
    assert "ends" not in read_metadata(tmp_path / "run/graded")


def test_without_a_policy_the_column_counts_and_that_is_said(tmp_path, capsys):
    graded = read_rollouts(make_grades(config(tmp_path)))
    assert [one.finished for one in graded] == THEIRS
    assert "3 of 4 rollouts are unfinished, says the table" in capsys.readouterr().err


def test_a_policy_that_is_not_there_is_named_and_the_column_is_offered(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: there is no such.*or set data_ends=table"):
        make_grades(config(tmp_path, tmp_path / "nowhere"))


def test_datasets_of_ours_are_taken_as_they_are(tmp_path, policy):
    settings = config(tmp_path, policy)
    make_grades(settings)
    again = dataclasses.replace(settings, data=str(tmp_path / "run/graded"))
    rollouts, record = with_all_ends(again, read_rollouts(tmp_path / "run/graded"))
    assert record == {}
    assert len(rollouts) == 4


def test_an_unknown_word_is_refused():
    with pytest.raises(UsageError, match=r"data_ends='both'.*model, table"):
        PipelineConfig(data_ends="both")


@pytest.mark.parametrize("name", ["embedded:chain_sum_policy"])
def test_a_tokenizer_is_read_without_the_weights(name, policy):
    assert load_tokenizer(name).eos_ids
    assert load_tokenizer(policy).eos_ids == (TURN_END, TEXT_END)
    with pytest.raises(UsageError, match="no such directory"):
        load_tokenizer(policy / "nowhere")
