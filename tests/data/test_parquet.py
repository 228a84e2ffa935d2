"""Parquet tables in the authors' schema: exact round trips, foreign tables, refusals by column and
row, and the stages on them."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reasoning_gym

from harness.rollouts import assert_same, make_rollouts
from zip_rc_jax.cli.main import main
from zip_rc_jax.config.files import load_config
from zip_rc_jax.data import parquet
from zip_rc_jax.data.batches import example
from zip_rc_jax.data.parquet import (
    GenerationInfo,
    open_rollouts,
    read_generation,
    read_parquet,
    read_parquet_metadata,
    write_parquet,
)
from zip_rc_jax.data.rollouts import NEWER, read_rollouts, write_rollouts
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.runtime.errors import UsageError

INFO = GenerationInfo("embedded:chain_sum_policy", 1.0, 0.1, 160, False)
THEIRS = {"prompt_idx", "prompt", "answer", "prompt_token_ids", "output_token_ids", "input_ids",
"label_positions", "response", "length",
          "finished", "reasoning_enabled", "model_id", "temperature", "min_p",
          "max_model_len"}  # fmt: skip


def make_rows(n, correct=math.nan, value=math.nan):
    """`n` rollouts with odd texts, none of them empty, all of them with the given labels (times a
    different factor each)."""
    return [
        dataclasses.replace(
            r,
            output_token_ids=np.append(r.output_token_ids, 7),
            question=["\ud83d \udca9 \U0001f4a9", "\uffff\ue000 \uffff", "$\\frac{1}{2}$ \0 é"][
                i % 3
            ],
            correct=correct * (i + 1) / n,
            value=value * (i + 1) / n,
        )
        for i, r in enumerate(make_rollouts(n))
    ]


def their_columns(n=6, **changes):
    """The columns that the authors' sampler writes for `n` rollouts of `n // 2` prompts, with their
    types; `changes` replaces some."""
    prompts = [[5, 6, 7][: 1 + i % 3] for i in range(n)]
    outputs = [list(range(10, 12 + i % 4)) for i in range(n)]
    columns = {
        "prompt_idx": pa.array([i // 2 for i in range(n)]),
        "prompt": pa.array([f"What is {i // 2} + 1?" for i in range(n)]),
        "answer": pa.array([str(i // 2 + 1) for i in range(n)]),
        "prompt_token_ids": pa.array(prompts),
        "output_token_ids": pa.array(outputs),
        "input_ids": pa.array([p + o for p, o in zip(prompts, outputs, strict=True)]),
        "label_positions": pa.array(
            [list(range(len(p), len(p) + len(o))) for p, o in zip(prompts, outputs, strict=True)]
        ),
        "response": pa.array([f"Answer: \\boxed{{{i // 2 + 1 + i % 2}}}" for i in range(n)]),
        "length": pa.array([len(o) for o in outputs]),
        "finished": pa.array([i % 3 > 0 for i in range(n)]),
        "reasoning_enabled": pa.array([i % 2 == 0 for i in range(n)]),
        "model_id": pa.array(["Qwen/Qwen3-1.7B"] * n),
        "temperature": pa.array([0.6] * n),
        "min_p": pa.array([0.05] * n),
        "max_model_len": pa.array([32768] * n),
    }
    assert set(columns) == THEIRS
    return columns | {name: pa.array(values) for name, values in changes.items()}


def write_theirs(path, **changes):
    columns = their_columns(**changes)
    pq.write_table(
        pa.table(
            {
                name: column
                for name, column in columns.items()
                if column.type != pa.null() or name == "answer"
            }
        ),
        path,
    )
    return path


# Our own tables.


@pytest.mark.parametrize(
    "labels", [{}, {"correct": 1.0}, {"correct": 1.0, "value": 0.7}, {"value": 0.3}]
)
def test_a_round_trip_is_exact(tmp_path, labels):
    rollouts = make_rows(11, **labels)
    write_parquet(
        tmp_path / "a/r.parquet", iter(rollouts), settings=INFO, metadata={"seed": 3, "text": "é"}
    )
    assert_same(read_parquet(tmp_path / "a/r.parquet"), rollouts)
    assert read_parquet_metadata(tmp_path / "a/r.parquet") == {"seed": 3, "text": "é"}
    assert read_generation(tmp_path / "a/r.parquet") == [INFO] * 11
    assert os.listdir(tmp_path / "a") == ["r.parquet"], "temporary files stayed behind"
    names = pq.read_schema(tmp_path / "a/r.parquet").names
    assert set(names[:15]) == THEIRS
    assert names[15:-10] == list(labels)


def test_a_table_of_an_earlier_version_has_no_names_of_levels_and_reads_as_ever(
    tmp_path, monkeypatch
):
    older = [dataclasses.replace(r, **NEWER) for r in make_rows(5)]
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_NEWER", {})
        write_parquet(tmp_path / "old.parquet", older, settings=INFO)
    assert not {*NEWER} & {*pq.read_schema(tmp_path / "old.parquet").names}
    assert_same(read_parquet(tmp_path / "old.parquet"), older)


def test_rows_are_written_in_groups(tmp_path):
    rollouts = make_rows(parquet.ROW_GROUP + 1)
    write_parquet(tmp_path / "r.parquet", rollouts, settings=INFO)
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 2
    assert_same(read_parquet(tmp_path / "r.parquet"), rollouts)


def test_writing_holds_one_group_of_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP", 3)
    written = []
    monkeypatch.setattr(
        parquet.pq.ParquetWriter, "write_table", lambda _, table: written.append(table.num_rows)
    )

    def lazily():
        for i, rollout in enumerate(make_rows(10)):
            assert i - sum(written) <= 3
            yield rollout

    write_parquet(tmp_path / "r.parquet", lazily(), settings=INFO)
    assert written == [3, 3, 3, 1]


def test_their_loader_labels_the_positions_that_we_train(tmp_path):
    """It subtracts one from `label_positions`, drops the last token, and counts what remains from
    there (`ziprc_dataset.py`)."""
    rollouts = make_rows(5, correct=1.0)
    write_parquet(tmp_path / "r.parquet", rollouts, settings=INFO)
    for row, rollout in zip(
        pq.read_table(tmp_path / "r.parquet").to_pylist(), rollouts, strict=True
    ):
        ours = example(rollout, "correct")
        ids = row["input_ids"][:-1]
        positions = [p - 1 for p in row["label_positions"] if 0 <= p - 1 < len(ids)]
        assert ids == ours["tokens"].tolist()
        assert positions == np.flatnonzero(ours["labelled"]).tolist()
        # They do not count the last token that was seen, and take a rollout that was cut off as one
        # that ended there. We count it, and know that at least one more follows.
        remaining = ours["remaining"] - ours["censored"]
        assert [len(ids) - p - 1 for p in positions] == (remaining - 1)[ours["labelled"]].tolist()
        assert row["length"] == len(positions)


def test_other_readers_find_valid_text(tmp_path):
    write_parquet(tmp_path / "r.parquet", make_rows(6), settings=INFO)
    table = pq.read_table(tmp_path / "r.parquet")
    table.validate(full=True)
    assert table["question"].to_pylist()[2] == "$\\frac{1}{2}$ \0 é"


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP", 2)

    def broken():
        yield from make_rows(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "r.parquet", broken(), settings=INFO)
    assert os.listdir(tmp_path) == []
    write_parquet(tmp_path / "r.parquet", make_rows(3), settings=INFO)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "r.parquet", broken(), settings=INFO)
    assert_same(read_parquet(tmp_path / "r.parquet"), make_rows(3))
    assert os.listdir(tmp_path) == ["r.parquet"]


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "r.parquet"
    graded = make_rows(3, correct=1.0)
    with pytest.raises(UsageError, match="there are none"):
        write_parquet(path, [], settings=INFO)
    for mixed in ([*graded, *make_rows(1)], [*make_rows(3), *graded[:1]]):
        with pytest.raises(UsageError, match=r"row 3: it has the labels .*complete or absent"):
            write_parquet(path, mixed, settings=INFO)
    for field in ("prompt_token_ids", "output_token_ids"):
        with pytest.raises(UsageError, match="row 1: a rollout without prompt or output tokens"):
            write_parquet(
                path, [graded[0], dataclasses.replace(graded[1], **{field: []})], settings=INFO
            )
    for infos in ([INFO] * 2, [INFO] * 4):
        with pytest.raises(ValueError, match="zip"):
            write_parquet(path, graded, settings=infos)
    assert os.listdir(tmp_path) == []


# Their tables.


def test_a_table_of_the_authors_is_read(tmp_path):
    found = read_parquet(
        write_theirs(
            tmp_path / "r.parquet", correct=[True, False] * 3, value=[0.5] * 6, group_id=["x"] * 6
        )
    )
    expected = their_columns()
    assert [(r.prompt_index, r.sample_index) for r in found] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    for i, r in enumerate(found):
        assert (r.prompt, r.question, r.answer, r.response) == (
            expected["prompt"][i].as_py(), expected["prompt"][i].as_py(),
            expected["answer"][i].as_py(), expected["response"][i].as_py()
        )  # fmt: skip
        assert (r.level, r.seed, r.task, r.entry_json) == (0, 0, "", "")
        assert r.prompt_token_ids.tolist() == expected["prompt_token_ids"][i].as_py()
        assert r.output_token_ids.tolist() == expected["output_token_ids"][i].as_py()
        assert r.output_token_ids.dtype == np.int32
        assert r.finished is (i % 3 > 0)
        assert (r.correct, r.value) == (float(i % 2 == 0), 0.5)
    assert read_parquet_metadata(tmp_path / "r.parquet") == {}
    assert read_generation(tmp_path / "r.parquet")[1] == GenerationInfo(
        "Qwen/Qwen3-1.7B", 0.6, 0.05, 32768, False
    )


def test_ungraded_tables_sparse_positions_missing_answers_and_other_encodings_are_read(tmp_path):
    categories = pa.array(["Qwen/Qwen3-1.7B"] * 6).dictionary_encode()
    path = write_theirs(
        tmp_path / "r.parquet", label_positions=[[0], [3], [], [2], [1], [2]], answer=[None] * 6,
        model_id=categories,
        prompt_token_ids=their_columns()["prompt_token_ids"].cast(pa.large_list(pa.int16())),
        response=["\uffff\ue000"] * 6,
    )  # fmt: skip
    found = read_parquet(path)
    assert all(math.isnan(r.correct) and math.isnan(r.value) for r in found)
    assert {r.answer for r in found} == {""}
    assert {r.response for r in found} == {"\uffff\ue000"}, "only our own tables are unescaped"
    assert found[2].prompt_token_ids.tolist() == [5, 6, 7]


def test_numbers_are_answers_and_nan_is_none(tmp_path):
    """As text nan would be the right answer of whoever writes it."""
    numbers = [0.5, 1e-7, 1e16, 42.0, -3.0, None]
    found = read_parquet(write_theirs(tmp_path / "r.parquet", answer=numbers))
    assert [float(r.answer) for r in found[:5]] == numbers[:5]
    assert found[5].answer == ""
    for wrong in (math.nan, math.inf, -math.inf):
        for answers in (
            pa.array([1.0, 2.0, None, wrong, 4.0, 5.0]),
            pa.array([1.0, 2.0, None, wrong, 4.0, 5.0]).dictionary_encode(),
        ):
            with pytest.raises(
                UsageError,
                match=rf"r\.parquet, row 3, column 'answer': it is {wrong}, which is no answer",
            ):
                read_parquet(write_theirs(tmp_path / "r.parquet", answer=answers))
    with pytest.raises(UsageError, match="column 'answer': it holds truth values"):
        read_parquet(write_theirs(tmp_path / "r.parquet", answer=[True, False] * 3))


def test_shards_are_read_in_order_as_one_table(tmp_path):
    (tmp_path / "shards").mkdir()
    for name, prompt in (("b", 1), ("a", 0), ("c", 0)):
        write_theirs(tmp_path / f"shards/{name}.parquet", prompt_idx=[prompt] * 6)
    found = read_parquet(tmp_path / "shards")
    assert [(r.prompt_index, r.sample_index) for r in found] == [(p, s) for p, s in
        [(0, i) for i in range(6)] + [(1, i) for i in range(6)] + [(0,
        6 + i) for i in range(6)]]  # fmt: skip
    write_theirs(tmp_path / "shards/d.parquet", correct=[True] * 6)
    with pytest.raises(
        UsageError, match=r"a\.parquet and d\.parquet differ in the columns correct"
    ):
        read_parquet(tmp_path / "shards")


def changed(name, row, value):
    values = their_columns()[name].to_pylist()
    values[row] = value
    return values


@pytest.mark.parametrize(
    ("name", "values", "parts"),
    [
        ("length", changed("length", 4, 99), ("row 4", "'length'", "it is 99, and "
                                                                   "output_token_ids has 2 "
                                                                   "tokens")),
        ("input_ids", changed("input_ids", 3, [5, 10, 11]), ("row 3", "'input_ids'",
        "not prompt_token_ids "
                                                                                     "followed by")),  # noqa: E501
        ("input_ids", changed("input_ids", 3, [5, 10, 11, 12, 9]), ("row 3", "'input_ids'",
        "not prompt_token_ids "
                                                                                            "followed by")),  # noqa: E501
        ("output_token_ids", changed("output_token_ids", 5, []), ("row 5", "'output_token_ids'",
        "no tokens")),
        ("prompt_token_ids", changed("prompt_token_ids", 0, []), ("row 0", "'prompt_token_ids'",
        "no tokens")),
        ("label_positions", changed("label_positions", 1, [2, 5]), ("row 1", "'label_positions'",
        "outside the "
                                                                                                  "sequence, 0 "  # noqa: E501
                                                                                                  ".. 4")),  # noqa: E501
        ("label_positions", changed("label_positions", 1, [-1]), ("row 1", "'label_positions'",
        "outside the sequence")),
        ("prompt", changed("prompt", 2, None), ("row 2", "'prompt'", "it is null")),
        ("model_id", changed("model_id", 2, None), ("row 2", "'model_id'", "it is null")),
        ("output_token_ids", changed("output_token_ids", 4, None), ("row 4", "'output_token_ids'",
        "it is null")),
        ("output_token_ids", changed("output_token_ids", 4, [1, None]), ("row 4",
        "'output_token_ids'", "it is null")),
        ("correct", [True, True, None, True, True, True], ("row 2", "'correct'", "it is null",
        "leave the row or")),
        ("correct", [1.0, 1.0, 1.0, math.nan, 1.0, 1.0], ("row 3", "'correct'",
        "nan is outside [0, 1]")),
        ("value", [1.0, 1.5, 1.0, 1.0, 1.0, 1.0], ("row 1", "'value'", "1.5 is outside [0, 1]")),
        ("prompt_idx", ["a"] * 6, ("rows from 0", "'prompt_idx'", "it is no int64")),
        ("input_ids", ["[1, 2]"] * 6, ("rows from 0", "'input_ids'", "it is no list")),
        ("response", [b"\xff"] * 6, ("rows from 0", "'response'", "it is no string")),
    ],
)  # fmt: skip
def test_wrong_values_are_named_by_column_and_row(tmp_path, monkeypatch, name, values, parts):
    monkeypatch.setattr(parquet, "ROW_GROUP", 4)  # so that rows 4 and 5 come in a later batch
    with pytest.raises(UsageError) as error:
        read_parquet(write_theirs(tmp_path / "r.parquet", **{name: values}))
    for part in ("r.parquet", "Fix: ", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("wrong", [2**31, -1])
def test_token_ids_out_of_range_are_refused(tmp_path, wrong):
    changes = {
        "output_token_ids": changed("output_token_ids", 4, [wrong, 3]),
        "input_ids": changed("input_ids", 4, [5, 6, wrong, 3]),
    }
    with pytest.raises(
        UsageError, match=r"row 4, column 'input_ids': it has a token id outside 0 \.\. 2147483647"
    ):
        read_parquet(write_theirs(tmp_path / "r.parquet", **changes))


def test_damaged_and_other_files_are_refused(tmp_path):
    path = tmp_path / "r.parquet"
    with pytest.raises(UsageError, match="no such file"):
        read_parquet(path)
    with pytest.raises(UsageError, match="there is no Parquet file"):
        read_parquet(tmp_path)
    path.write_text("prompt,answer\n")
    with pytest.raises(UsageError, match="not \\(completely\\) a Parquet file"):
        read_parquet(path)
    write_parquet(path, make_rows(40), settings=INFO)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="not \\(completely\\) a Parquet file"):
        read_parquet(path)
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(UsageError, match="not \\(completely\\) a Parquet file"):
        read_parquet(path)
    table = pa.table(their_columns())
    pq.write_table(table.drop_columns(["length", "min_p"]), path)
    with pytest.raises(UsageError, match="it lacks the columns length, min_p"):
        read_parquet(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(UsageError, match="it has no rows"):
        read_parquet(path)


# One way to open both.


def test_rollouts_open_alike_wherever_they_are(tmp_path):
    rollouts = make_rows(4)
    write_rollouts(tmp_path / "tfds", rollouts, metadata={"seed": 1})
    write_parquet(tmp_path / "one.parquet", rollouts, settings=INFO, metadata={"seed": 1})
    (tmp_path / "shards").mkdir()
    os.link(tmp_path / "one.parquet", tmp_path / "shards/0.parquet")
    os.link(tmp_path / "one.parquet", tmp_path / "no_suffix")
    found, metadata = open_rollouts(tmp_path / "tfds")
    assert metadata == {"seed": 1}
    assert_same(found, rollouts)
    identities = []
    for name in ("one.parquet", "shards", "no_suffix"):
        found, identity = open_rollouts(tmp_path / name)
        assert_same(found, rollouts)
        identities.append(identity)
    assert identities == [identities[0]] * 3, "it depends on the contents alone"
    assert identities[0]["metadata"] == {"seed": 1}
    write_parquet(tmp_path / "other.parquet", rollouts[:3], settings=INFO, metadata={"seed": 1})
    assert open_rollouts(tmp_path / "other.parquet")[1] != identities[0]
    with pytest.raises(UsageError, match="no such directory"):
        open_rollouts(tmp_path / "missing")
    with pytest.raises(UsageError, match="no such file"):
        open_rollouts(tmp_path / "missing.parquet")


# The stages.

CONFIG = "configs/chain_sum_demo.yaml"
SMALL = ["rollout.prompts=12", "rollout.rows=24", "rollout.max_tokens=64", "critic.steps=2",
"critic.log_every=1", "critic.batch_rows=4",
         "critic.eval_rollouts=8", "mesh.fsdp=1"]  # fmt: skip


def stage(*arguments):
    assert main([arguments[0], CONFIG, *SMALL, *arguments[1:]]) == 0


def refused(capsys, *arguments):
    assert main([arguments[0], CONFIG, *SMALL, *arguments[1:]]) == 2
    return capsys.readouterr().err


def metrics(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "train/tokens_per_second"}
        for line in lines
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory after rollout, grade and the critic's training, with Parquet tables beside
    the datasets."""
    directory = tmp_path_factory.mktemp("run")
    stage("rollout", f"run_dir={directory}")
    stage("rollout", f"run_dir={directory}", "--format", "parquet")
    stage("grade", f"run_dir={directory}", "--format", "parquet")
    stage("train", f"run_dir={directory}", "--stage", "critic")
    return directory


def test_grades_are_those_of_the_tasks_own_scorer(run):
    scorer = reasoning_gym.create_dataset("chain_sum", size=1)
    graded = read_rollouts(run / "graded")
    for r in graded:
        answer = extract_answer(r.response)
        assert r.correct == float(
            answer is not None and scorer.score_answer(answer, {"answer": r.answer}) >= 1
        )
    assert {r.correct for r in graded} == {0.0, 1.0}


@pytest.mark.parametrize("name", ["rollouts", "graded"])
def test_stages_write_their_dataset_as_parquet_too(run, name):
    rollouts = read_rollouts(run / name)
    assert_same(read_parquet(run / f"{name}.parquet"), rollouts)
    longest = (
        max(len(r.prompt_token_ids) for r in rollouts)
        + load_config(CONFIG, SMALL).rollout.max_tokens
    )
    info = GenerationInfo("embedded:chain_sum_policy", 1.0, 0.0, longest, False)
    assert read_generation(run / f"{name}.parquet") == [info] * len(rollouts)
    assert read_parquet_metadata(run / f"{name}.parquet") == json.loads(
        (run / name / "metadata.json").read_text()
    )


def test_training_on_parquet_is_training_on_the_dataset(run, tmp_path):
    stage("train", f"run_dir={tmp_path}", f"data={run / 'graded.parquet'}", "--stage", "critic")
    assert metrics(tmp_path / "critic") == metrics(run / "critic")
    assert len(metrics(tmp_path / "critic")) == 2
    stage("label", f"run_dir={tmp_path}", f"data={run / 'graded.parquet'}", "--format", "parquet")
    labelled = read_parquet(tmp_path / "labelled.parquet")
    assert all(0 <= r.value <= 1 for r in labelled)
    assert [r.correct for r in labelled] == [
        r.correct for r in read_parquet(run / "graded.parquet")
    ]
    assert read_generation(tmp_path / "labelled.parquet") == read_generation(run / "graded.parquet")


def test_a_table_that_misses_every_end_is_trained_and_labelled_as_one_that_knows_them(
    run, tmp_path
):
    ours = pq.read_table(run / "graded.parquet")
    theirs = ours.select([*THEIRS, "correct"]).replace_schema_metadata(None)
    missed = pa.array([False] * len(theirs))
    theirs = theirs.set_column(theirs.column_names.index("finished"), "finished", missed)
    pq.write_table(theirs, tmp_path / "theirs.parquet")
    assert any(ours["finished"].to_pylist())

    data = f"data={tmp_path / 'theirs.parquet'}"
    stage("train", f"run_dir={tmp_path}", data, "--stage", "critic")
    assert metrics(tmp_path / "critic") == metrics(run / "critic")
    stage("label", f"run_dir={tmp_path}", data)
    labelled = read_rollouts(tmp_path / "labelled")
    assert [r.finished for r in labelled] == ours["finished"].to_pylist()


def test_grading_parquet_is_grading_the_dataset_and_resumes_by_content(run, tmp_path, capsys):
    data = tmp_path / "moved.parquet"
    os.link(run / "rollouts.parquet", data)
    stage("grade", f"run_dir={tmp_path}", f"data={run / 'rollouts.parquet'}")
    assert_same(read_rollouts(tmp_path / "graded"), read_rollouts(run / "graded"))
    before = os.stat(tmp_path / "graded").st_mtime_ns
    stage("grade", f"run_dir={tmp_path}", f"data={data}", "--format", "parquet")
    assert os.stat(tmp_path / "graded").st_mtime_ns == before
    assert_same(read_parquet(tmp_path / "graded.parquet"), read_rollouts(run / "graded"))
    assert "other settings" in refused(
        capsys, "grade", f"run_dir={tmp_path}", f"data={run / 'graded.parquet'}"
    )


def test_a_table_of_the_authors_is_graded_by_its_answers(tmp_path):
    stage(
        "grade",
        f"run_dir={tmp_path}",
        f"data={write_theirs(tmp_path / 'theirs.parquet')}",
        "--format",
        "parquet",
    )
    graded = read_parquet(tmp_path / "graded.parquet")
    assert [r.correct for r in graded] == [1.0, 0.0] * 3
    assert [info.reasoning_enabled for info in read_generation(tmp_path / "graded.parquet")] == [
        True,
        False,
    ] * 3


def test_foreign_rollouts_that_do_not_fit_are_refused(run, tmp_path, capsys):
    data = write_theirs(tmp_path / "theirs.parquet", answer=[None] * 6)
    assert "rollout 0: it has no reference answer" in refused(
        capsys, "grade", f"run_dir={tmp_path}", f"data={data}"
    )
    assert "samples rollouts itself" in refused(
        capsys, "rollout", f"run_dir={tmp_path}", f"data={data}"
    )
    error = refused(
        capsys,
        "train",
        f"run_dir={tmp_path}",
        f"data={run / 'rollouts.parquet'}",
        "--stage",
        "critic",
    )
    assert "have no 'correct' label" in error
    assert "run `zip-rc grade`." in error
    values = write_theirs(tmp_path / "values.parquet", value=[0.5] * 6)
    overrides = [f"run_dir={tmp_path}", "final.eval_rollouts=2", "--stage", "final"]
    assert "final.eval_rollouts=0" in refused(capsys, "train", *overrides, f"data={values}")
    ids = pa.array(
        [[300 + i for i in row] for row in their_columns()["prompt_token_ids"].to_pylist()]
    )
    joined = [
        p + o
        for p, o in zip(
            ids.to_pylist(), their_columns()["output_token_ids"].to_pylist(), strict=True
        )
    ]
    qwen = write_theirs(
        tmp_path / "qwen.parquet", prompt_token_ids=ids, input_ids=joined, correct=[True] * 6
    )
    error = refused(capsys, "train", f"run_dir={tmp_path}", f"data={qwen}", "--stage", "critic")
    assert "rollout 0: it has token id 305" in error
    assert "another model sampled it" in error


def test_an_export_never_guesses_and_never_overwrites(run, tmp_path, capsys):
    theirs = write_theirs(tmp_path / "theirs.parquet", correct=[True, False] * 3)
    stage("grade", f"run_dir={tmp_path}", f"data={theirs}")
    # a dataset of foreign origin, whose table is not named
    os.rename(tmp_path / "graded", tmp_path / "rollouts")
    assert "stand only there" in refused(
        capsys, "grade", f"run_dir={tmp_path}", "--format", "parquet"
    )
    write_theirs(tmp_path / "graded.parquet")
    assert "rename or delete it" in refused(
        capsys, "grade", f"run_dir={tmp_path}", "--format", "parquet"
    )
    data = [
        f"run_dir={tmp_path / 'other'}",
        f"data={run / 'rollouts'}",
        f"policy.path={run / 'critic'}",
    ]
    assert "another policy sampled these rollouts" in refused(
        capsys, "grade", *data, "--format", "parquet"
    )
