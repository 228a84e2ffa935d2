"""Problems of JSONL files: every value as the file spells it, every mistake by its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import pytest

from zip_rc_jax.data.problems import problems_from_jsonl
from zip_rc_jax.runtime.errors import UsageError


def test_maths_problems_come_from_jsonl(tmp_path):
    path = tmp_path / "maths.jsonl"
    lines = [
        {"question": "What is 1 + 1?", "answer": 2},
        {"problem": "Half?", "answer": "\\frac{1}{2}", "level": "Level 3"},
        {"question": "Sum?", "answer": "First 70, then 72.\n#### 72", "level": 1},
        {"question": "A pair?", "answer": "\U0001f600"},
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    found = problems_from_jsonl(path)
    assert [(p.index, p.level_name, p.question, p.answer) for p in found] == [
        (0, "", "What is 1 + 1?", "2"),
        (1, "Level 3", "Half?", "\\frac{1}{2}"),
        (2, "1", "Sum?", "72"),
        (3, "", "A pair?", "\U0001f600"),
    ]
    assert {p.task for p in found} == {"math"}


@pytest.mark.parametrize(
    "bad",
    [b'{"question": "q", '
     b'"answer": "1"', b"[1, 2]", b'{"question": "q"}', b'{"answer": "1"}', b'{"question": 3, '
                                                                            b'"answer": "1"}',
     b'{"question": "q", "answer": '
     b'true}', b'{"question": "q", "answer": " "}', b'{"question": "\xff", "answer": "1"}',
     rb'{"question": "q", "answer": "\ud800"}', rb'{"question": "\udc00", "answer": "1"}'],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(tmp_path, bad):
    path = tmp_path / "maths.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\n\n' + bad + b"\n")
    with pytest.raises(UsageError, match=r"maths\.jsonl, line 3: "):
        problems_from_jsonl(path)


def test_a_missing_or_empty_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        problems_from_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no problems"):
        problems_from_jsonl(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "spelling",
    [
        "0.00001",
        "1e-5",
        "1E+3",
        "10000000000000001",
        "1e16",
        "-0.0",
        "3.10",
        "7" * 5000,
        "1e400",
        "0.1000000000000000055511151",
    ],
)
def test_a_number_keeps_the_spelling_of_the_file(tmp_path, spelling):
    path = tmp_path / "maths.jsonl"
    path.write_text(f'{{"question": "q", "answer": {spelling}}}\n')
    assert problems_from_jsonl(path)[0].answer == spelling


@pytest.mark.parametrize(
    "line",
    [
        '{"question": null, "problem": "q", "answer": "1"}',
        '{"problem": "q", "answer": 1, "question": null}',
    ],
)
def test_null_is_absent(tmp_path, line):
    path = tmp_path / "maths.jsonl"
    path.write_text(f"\r\n{line}\r\n")
    assert [(p.question, p.answer, p.line) for p in problems_from_jsonl(path)] == [("q", "1", 2)]


NO_JSONL = [
    (b'{"question": "q", "answer": NaN}', "line 1: it holds NaN"),
    (b'\n{"question": "q", "answer": -Infinity}', "line 2: it holds -Infinity"),
    (
        b'{"question": "q", "answer": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 1: its JSON is nested too deeply",
    ),
    (b'{"question": "q", "answer": ' + b"[" * 3_000_000, "line 1: "),
    (b'[{"question": "q", "answer": "1"}]', "JSON array.*jq -c"),
    (b'[\n{"question": "q", "answer": "1"}\n]', "line 1: it begins a JSON array"),
    ('{"question": "q", "answer": "1"}'.encode("utf-16"), "UTF-16.*iconv"),
    ('{"question": "q", "answer": "1"}'.encode("utf-16-le"), "UTF-16.*iconv"),
    ('{"question": "q", "answer": "1"}'.encode("utf-32"), "UTF-32.*iconv"),
    (gzip.compress(b'{"question": "q", "answer": "1"}'), "line 1: the file is compressed"),
    ('{"question": "\u00e9", "answer": "1"}'.encode("latin-1"), "line 1: it is not UTF-8 text"),
    (b'{"question": "q", "answer": "1", "answer": "2"}', "line 1: it has the key 'answer' twice"),
    (
        b'{"question": "q", "answer": "1", "level": ' + b"9" * 5000 + b"}",
        "line 1: its level has 5000 characters",
    ),
    (
        b'{"question": "q", "answer": {"x": "' + b"y" * 3_000_000 + b'"}}',
        "no text or number under `answer`",
    ),
    (b'"' + b"y" * 3_000_000 + b'"', "line 1: it holds a string, not an object"),
    (b"y" * 3_000_000, "line 1: "),
    (b'{"question": "q", "answer": "72 ####"}', "line 1: its `answer` has nothing behind ####"),
    (b'{"question": "q", "answer": "1", "level": [7]}', "line 1: its level is an array"),
    (b'{\n"question": "q",\n"answer": "1"}', "line 1: its JSON goes on in the next line"),
    (
        b'{"question": "q", "answer": "1", '
        + b", ".join(b'"k%d": 1' % i for i in range(50_000))
        + b', "k49999": 2}',
        "'k49999' twice",
    ),
    (bz2.compress(b"{}"), "line 1: the file is compressed .bzip2"),
    (lzma.compress(b"{}"), "line 1: the file is compressed .xz"),
    (b"PK\x03\x04" + bytes(range(60)), "line 1: the file is compressed .zip"),
    (b"PAR1" + bytes(60), "line 1: the file is a Parquet table"),
    (b"17", "line 1: it holds a number"),
    (b"null", "line 1: it holds null"),
]


@pytest.mark.parametrize(("content", "message"), NO_JSONL, ids=range(len(NO_JSONL)))
def test_what_is_no_jsonl_is_named_in_one_short_paragraph(tmp_path, content, message):
    path = tmp_path / "maths.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        problems_from_jsonl(path)
    assert len(str(caught.value)) < 1000
    assert "maths.jsonl" in str(caught.value)


def test_what_is_no_regular_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="it is a directory"):
        problems_from_jsonl(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        problems_from_jsonl(tmp_path / "pipe")
    with pytest.raises(UsageError, match="File name too long") as caught:
        problems_from_jsonl(tmp_path / ("x" * 5000))
    assert len(str(caught.value)) < 1000


def test_a_file_that_was_joined_from_several_may_hold_marks_of_byte_order(tmp_path):
    path = tmp_path / "maths.jsonl"
    path.write_bytes(2 * b'\xef\xbb\xbf{"question": "q", "answer": 1, "level": 3.0}\n')
    assert [(p.answer, p.level_name, p.line) for p in problems_from_jsonl(path)] == [
        ("1", "3", 1),
        ("1", "3", 2),
    ]
