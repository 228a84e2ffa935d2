"""Problems of files: JSONL, CSV and Parquet, by the same columns and with the same mistakes."""

from __future__ import annotations

import csv
import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.data.problems import problem_set, problems_from_file
from zip_rc_jax.data.problems.columns import Row, last_boxed, read_answer, read_rows
from zip_rc_jax.runtime.errors import UsageError

ROWS = [
    {"question": "1 + 1?", "answer": "2", "level": "Level 10", "id": "a"},
    {"question": "2 + 2?", "answer": "4", "level": "Level 2", "id": "b"},
    {"question": "3 + 3,\nexactly?", "answer": '6 "six"', "level": "Algebra", "id": "c"},
]


def write(path, rows):
    """A file of the kind that its name says."""
    opener = gzip.open if path.suffix == ".gz" else open
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".csv" in path.name:
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path, kind="jsonl", **settings):
    return problem_set(ProblemsConfig(SourceConfig(f"{kind}:{path}", **settings)), "train")


KINDS = [
    ("jsonl", "x.jsonl"),
    ("jsonl", "x.jsonl.gz"),
    ("csv", "x.csv"),
    ("csv", "x.csv.gz"),
    ("parquet", "x.parquet"),
]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_every_kind_of_file_holds_the_same_problems(tmp_path, kind, name):
    found = read(write(tmp_path / name, ROWS), kind)
    assert [(p.id, p.question, p.answer, p.level_name) for p in found.problems] == [
        (row["id"], row["question"], row["answer"], row["level"]) for row in ROWS
    ]
    assert found.level_names == ("Algebra", "Level 2", "Level 10"), "numbers count as numbers"
    assert [p.level for p in found.problems] == [2, 1, 0]
    assert {p.source for p in found.problems} == {f"{kind}:{tmp_path / name}"}
    if kind != "jsonl":
        assert [p.answer for p in problems_from_file(tmp_path / name)] == ["2", "4", '6 "six"']


def test_a_record_names_content_columns_and_counts(tmp_path):
    (one,) = read(write(tmp_path / "a.jsonl", ROWS)).record["sources"]
    (same,) = read(write(tmp_path / "b.parquet", ROWS), "parquet").record["sources"]
    (other,) = read(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1] | {"answer": "5"}])).record[
        "sources"
    ]
    assert one["digest"] == same["digest"] != other["digest"]
    assert one["columns"] == {name: [name] for name in ("question", "answer", "level", "id")}
    assert (one["rows"], one["problems"]) == (3, 3)


def test_a_directory_or_a_pattern_is_all_its_shards_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        write(tmp_path / f"part-{number}.jsonl", [ROWS[number]])
    (tmp_path / "notes.txt").write_text("not a shard")
    for place in (tmp_path, tmp_path / "part-*.jsonl"):
        found = read(place)
        assert [p.id for p in found.problems] == ["a", "b", "c"]
        assert found.record["sources"][0]["files"] == [f"part-{i}.jsonl" for i in range(3)]
    with pytest.raises(UsageError, match=r"holds no \.csv or \.csv\.gz file"):
        read(tmp_path, "csv")
    with pytest.raises(UsageError, match="no file fits the pattern"):
        read(tmp_path / "none-*.jsonl")


def test_named_columns_and_fields_inside_columns_are_read(tmp_path):
    rows = [{"text": "1 + 1?", "reward": {"truth": 2}, "extra": {"topic": "sums"}}]
    for kind, name in (("jsonl", "x.jsonl"), ("parquet", "x.parquet")):
        path = write(tmp_path / name, rows)
        found = read(path, kind, question="text", answer="reward.truth", level="extra.topic")
        (p,) = found.problems
        assert (p.question, p.answer, p.level_name) == ("1 + 1?", "2", "sums")


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_missing_column_names_those_that_are_there(tmp_path, kind, name):
    path = write(tmp_path / name, [{"text": "q", "target": "1"}])
    with pytest.raises(
        UsageError,
        match=r"no column `question` or `problem` or `prompt`; the columns are text, target",
    ):
        read(path, kind)
    with pytest.raises(UsageError, match=r"answer of .*no column `gold`; the columns are text"):
        read(path, kind, question="text", answer="gold")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": 5, "answer": "1"}, {}, r"`question` is a number"),
        ({"question": ["a", "b"], "answer": "1"}, {}, r"`question` is an array"),
        ({"question": " ", "answer": "1"}, {}, r"no text under `question`"),
        ({"question": "q", "answer": ["1", "2"]}, {}, r"under `answer` \(an array\)"),
        ({"question": "q", "answer": True}, {}, r"under `answer` \(true or false\)"),
        ({"question": "q", "answer": "1", "level": [1]}, {}, r"its level is an array"),
        ({"question": "q", "answer": "1", "id": [1]}, {"id": "id"}, r"its id is an array"),
        ({"question": "q", "solution": "no box"}, {}, r"`solution` has no \\boxed{}"),
        ({"question": "q", "answer": "1"}, {"answer_from": "hash"}, r"`answer` has no ####"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [("jsonl", "x.jsonl"), ("parquet", "x.parquet")])
def test_a_value_of_a_wrong_type_names_its_row(tmp_path, kind, name, row, settings, message):
    path = write(tmp_path / name, [row])
    where = re.escape(f"{path}, {'line 1' if kind == 'jsonl' else 'row 0'}")
    with pytest.raises(UsageError, match=f"{where}: .*{message}.* Fix: "):
        read(path, kind, **settings)


def test_unreadable_answers_are_counted_and_named_or_left_out_on_purpose(tmp_path):
    rows = [{"question": f"q{i}", "answer": "#### 7" if i % 3 else "#### "} for i in range(9)]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(UsageError) as caught:
        read(path)
    said = str(caught.value)
    assert "x.jsonl, line 1: its `answer` has nothing behind ####" in said
    assert "3 of 9 rows have no answer that can be read" in said
    assert "unreadable: drop" in said
    found = read(path, unreadable="drop")
    assert len(found) == 6
    assert found.record["sources"][0]["unreadable"] == 3
    with pytest.raises(UsageError, match="nothing behind ####"):
        read(write(tmp_path / "y.jsonl", rows[:1]), unreadable="drop")


def test_repeated_ids_are_refused_where_they_are_named_and_counted_where_not(tmp_path):
    path = write(tmp_path / "x.jsonl", [row | {"id": "same"} for row in ROWS])
    with pytest.raises(UsageError, match=r"2 rows have an id that an earlier.*'same' \(3 times\)"):
        read(path, id="id")
    found = read(path)
    assert len({p.id for p in found.problems}) == 3
    assert found.problems[0].id.endswith("x.jsonl#1")
    assert found.record["sources"][0]["repeated_ids"] == 2


def test_repeated_questions_are_counted(tmp_path):
    found = read(write(tmp_path / "x.jsonl", [row | {"id": i} for i, row in enumerate(ROWS * 2)]))
    assert found.record["repeated_questions"] == 3


def test_filter_shuffle_and_count_come_in_this_order(tmp_path):
    rows = [{"question": f"q{i}", "answer": i, "level": i % 4} for i in range(40)]
    path = write(tmp_path / "x.jsonl", rows)
    found = read(path, filter="level >= 2", shuffle=3, count=5)
    kept = [row["question"] for row in rows if row["level"] >= 2]
    order = np.random.default_rng(3).permutation(len(kept))
    assert [p.question for p in found.problems] == [kept[i] for i in order[:5]]
    assert found.record["sources"][0]["filtered"] == 20
    assert read(path, shuffle=3, count=30).problems[:9] == read(path, shuffle=3, count=9).problems
    for settings, message in (
        ({"filter": "level > 9"}, r"it leaves none of 40 rows"),
        ({"filter": "levl > 1"}, r"no row has 'levl'; the columns are question, answer, level"),
        ({"filter": "question > 1"}, r"cannot be compared in .*line 1: question is a text"),
        ({"count": 41}, r"count=41 of .*it has 40 problems.*Fix: use 40 or fewer"),
    ):
        with pytest.raises(UsageError, match=message):
            read(path, **settings)


def test_more_problems_than_there_are_names_how_many_there_are(tmp_path):
    path = write(tmp_path / "x.jsonl", ROWS)
    assert len(read(path)) == 3
    with pytest.raises(UsageError, match=r"4 problems: .*x\.jsonl has 3.*or 0 for all"):
        problem_set(ProblemsConfig(f"jsonl:{path}"), "train", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line names no columns"),
        (b"question,answer,answer\na,1,2\n", "names 'answer' twice"),
        (b"question,answer\na\n", "line 2: it has 1 cells, and the first line names 2"),
        (b'question,answer\n"a,1\n', "it is no CSV"),
        (b"question,answer\n\xff,1\n", "not UTF-8 text"),
        (b"question,answer\n", "there are none"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "x.csv", "csv")


def test_a_damaged_or_missing_table_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="cannot be read as a Parquet table"):
        read(tmp_path / "x.parquet", "parquet")
    for kind in ("csv", "parquet", "jsonl"):
        with pytest.raises(UsageError, match=r"no such file|No such file"):
            read(tmp_path / f"none.{kind}", kind)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"question": "q"}')[:-5])
    with pytest.raises(UsageError, match="no complete gzip file"):
        read(tmp_path / "x.jsonl.gz")


# Answers.


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed {x_{1}}", "x_{1}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and an open \boxed{2", "1"),
        (r"\fbox{a}", "a"),
        ("none", None),
    ],
)
def test_the_last_whole_box_holds_the_answer(text, wanted):
    assert last_boxed(text) == wanted


@pytest.mark.parametrize(
    ("value", "column", "how", "wanted"),
    [
        ("First 70.\n#### 72", "answer", "auto", "72"),
        ("First 70.\n#### 72", "solution", "auto", "72"),
        (r"It is \boxed{5}", "solution", "auto", "5"),
        (r"It is \boxed{5}", "answer", "auto", r"It is \boxed{5}"),
        (r"It is \boxed{5}", "answer", "boxed", "5"),
        ("a #### b", "answer", "text", "a #### b"),
        (27.0, "answer", "auto", "27"),
        (0.5, "answer", "auto", "0.5"),
        (["72"], "final_answer", "auto", "72"),
    ],
)
def test_a_reference_answer_is_read_as_asked(value, column, how, wanted):
    assert read_answer(value, column, how) == wanted


CELLS = st.one_of(
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(max_size=4),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(["#### 5", r"\boxed{7}", "q?", "\ud800"]),
)
COLUMN_NAMES = st.sampled_from(["question", "problem", "answer", "solution", "level", "id", "x"])
TABLES = st.lists(st.dictionaries(COLUMN_NAMES, CELLS, max_size=5), max_size=4)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "question": COLUMN_NAMES,
        "answer": COLUMN_NAMES,
        "answer_from": st.sampled_from(["auto", "text", "hash", "boxed"]),
        "unreadable": st.sampled_from(["refuse", "drop"]),
    },
)


@given(TABLES, SETTINGS)
def test_any_table_is_read_or_refused_in_one_short_paragraph(table, settings):
    source = SourceConfig("jsonl:any.jsonl", **settings)
    rows = [Row(values, f"any.jsonl, line {i}", i) for i, values in enumerate(table, 1)]
    refused = None
    try:
        found = read_rows(rows, source)
    except UsageError as error:
        refused = str(error)
    if refused is not None:
        assert len(refused) <= 900
        assert "Fix: " in refused
        return
    assert len(found.problems) + len(found.unreadable) == len(rows)
    for p in found.problems:
        assert p.question.strip()
        assert p.answer.strip()
        f"{p.question}{p.answer}{p.level_name}{p.id}".encode()
    assert len({p.id for p in found.problems}) == len(found.problems)
