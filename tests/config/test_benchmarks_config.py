"""The table of benchmarks, tables of a user's own, and what is refused in them."""

from __future__ import annotations

import pytest

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.config.benchmarks import asked_benchmarks
from zip_rc_jax.runtime.errors import LONGEST, UsageError

INSTRUCTION = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)


def test_the_shipped_table_has_the_benchmarks_of_the_paper():
    names = ("gsm8k", "math500", "amc23", "aime24", "aime25", "mixed")
    found = {b.name: b for b in asked_benchmarks(names)}
    assert set(found) == set(names)
    places = {
        "gsm8k": ("hf:openai/gsm8k/main", "test", "hash", 4),
        "math500": ("hf:HuggingFaceH4/MATH-500", "test", "text", 8),
        "amc23": ("hf:zwhe99/amc23", "test", "text", 32),
        "aime24": ("hf:HuggingFaceH4/aime_2024", "train", "text", 32),
        "aime25": ("hf:math-ai/aime25", "test", "text", 32),
    }
    for name, (source, split, rule, tries) in places.items():
        (problems,) = found[name].problems
        assert (problems.source, problems.split, problems.answer_from) == (source, split, rule)
        assert (found[name].samples, found[name].tries) == (8, tries)
        assert found[name].instruction == INSTRUCTION
    assert found["mixed"].union == ("aime24", "amc23", "math500", "gsm8k")


def test_the_parts_of_a_union_come_before_it():
    names = [b.name for b in asked_benchmarks(["mixed", "aime25"])]
    assert names == ["aime24", "amc23", "math500", "gsm8k", "mixed", "aime25"]


def test_an_object_changes_single_settings_of_an_entry():
    item = {"name": "gsm8k", "tries": 1, "problems": {"source": "hf:./copy/main", "count": 7}}
    (found,) = asked_benchmarks([item])
    assert found.tries == 1
    assert found.samples == 8
    assert found.problems == (
        SourceConfig(
            "hf:./copy/main", "test", question="question", answer="answer", answer_from="hash",
            count=7,
        ),
    )  # fmt: skip


def test_a_table_of_ones_own_adds_and_replaces(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "mine: {problems: 'jsonl:mine.jsonl', samples: 4}\n"
        "gsm8k: {problems: {source: 'jsonl:other.jsonl'}, title: Other}\n"
    )
    mine, other, amc = asked_benchmarks(["mine", "gsm8k", "amc23"], str(path))
    assert (mine.problems, mine.samples, mine.tries) == ((SourceConfig("jsonl:mine.jsonl"),), 4, 1)
    assert (other.title, other.problems[0].source, other.instruction) == (
        "Other",
        "jsonl:other.jsonl",
        "",
    )
    assert amc.title == "AMC23"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gsm9k"], r"benchmark 'gsm9k': no table names it\. Fix: did you mean 'gsm8k'"),
        (["gsm8k", "gsm8k"], "gsm8k twice"),
        ([7], "with 7: it is neither a name nor an object"),
        ([{"tries": 2}], "it is neither a name nor an object with a name"),
        ([{"name": "gsm8k", "tris": 2}], "'tris' of benchmark 'gsm8k'.*Fix: did you mean 'tries'"),
        ([{"name": "gsm8k", "tries": 0}], "tries of benchmark 'gsm8k'"),
        ([{"name": "gsm8k", "tries": 1.5}], "tries of benchmark 'gsm8k'.*no whole number"),
        ([{"name": "gsm8k", "samples": -1}], "samples of benchmark 'gsm8k'"),
        ([{"name": "gsm8k", "instruction": "Solve."}], r"it does not contain \{question\}"),
        ([{"name": "gsm8k", "union": ["amc23"]}], "with both problems and union"),
        ([{"name": "u", "union": ["mixed"]}], "'mixed': that is a union itself"),
        ([{"name": "u", "union": ["gsm"]}], "union of u: benchmark 'gsm': no table names it"),
        ([{"name": "u", "union": ["gsm8k"], "tries": 2}], "a union takes what its parts decoded"),
        ([{"name": "u/v", "problems": "gym:gcd"}], "benchmark 'u/v': its report is a directory"),
        ([{"name": "heldout", "problems": "gym:gcd"}], "benchmark 'heldout'"),
        ([{"name": "x", "problems": {"sauce": "gym:gcd"}}], r"problems of benchmark 'x'\.sauce"),
        ([{"name": "x", "problems": "gcd"}], "problem source 'gcd'"),
        ([{"name": "x" * 5000}], "no table names it"),
    ],
)
def test_what_is_no_benchmark_is_refused_by_name(given, said):
    with pytest.raises(UsageError, match=said) as error:
        asked_benchmarks(given)
    assert "Fix: " in str(error.value)
    assert len(str(error.value)) < LONGEST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {problems: [", "it is not YAML"),
        ("- gsm8k", "it is no table of benchmarks"),
        ("a: 3", "'a' in evaluate.benchmark_table"),
        ("3: {problems: 'gym:gcd'}", "3 in evaluate.benchmark_table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, said):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        asked_benchmarks(["a"], str(path))
    with pytest.raises(UsageError, match=r"it cannot be read \(FileNotFoundError"):
        asked_benchmarks(["a"], str(tmp_path / "none.yaml"))
