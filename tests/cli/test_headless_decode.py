"""`zip-rc decode` with a policy that has no head: plain samples, and a word about the rest."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zip_rc_jax.cli.main import main
from zip_rc_jax.models.io.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} wait {% endif %}{% endfor %}"
    "{% if closed %} so{% endif %}"
)

OPTIONS = ("interval=8", "window=2", "max_tokens=8")


@pytest.fixture
def policy(lm, tmp_path):
    lm.without_head().save(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_a_policy_without_a_head_is_sampled(policy, tmp_path, capsys):
    arguments = ["decode", policy, "--prompt", "1 + 2 =", *OPTIONS, "strategy=fixed", "n=3"]
    assert main([*arguments, "answer=vote", "--output", str(tmp_path / "out")]) == 0
    (row,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert len(row["prefixes"]) == 3
    assert row["expected_reward"] is None, "no head, no prediction"
    assert {prefix["expected_reward"] for prefix in row["prefixes"]} == {None}
    assert row["trace"] == []
    assert main([*arguments, "n=1"]) == 0
    said = capsys.readouterr().out
    assert "tokens" in said
    assert "P(correct)" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["n=2"], "strategy='zip_rc' with a model without a ZIP head"),
        (["strategy=fixed", "n=2"], "nothing says which sample is the best. Fix: add answer=vote"),
        (["strategy=fixed", "n=1", "--stream"], "--stream with a model without a ZIP head"),
    ],
)
def test_what_needs_a_head_is_named(policy, capsys, options, message):
    assert main(["decode", policy, "--prompt", "1 + 2 =", *OPTIONS, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_input_is_read_by_the_columns_of_sources(policy, tmp_path, capsys, name):
    text = "id,prompt,answer\n7,1 + 2 =,3\n" if name == "x.csv" else '{"prompt": "1 + 2 ="}\n'
    (tmp_path / name).write_text(text)
    arguments = ["decode", policy, "--input", str(tmp_path / name), *OPTIONS, "strategy=fixed"]
    assert main([*arguments, "n=1"]) == 0
    assert ("accuracy" in capsys.readouterr().out) == (name == "x.csv")


@pytest.fixture
def chatty(lm, tmp_path):
    """The same policy with a template that joins the turns by "wait"."""
    tokenizer = Tokenizer(lm.tokenizer.backend, lm.tokenizer.eos_tokens, TEMPLATE)
    dataclasses.replace(lm.without_head(), tokenizer=tokenizer).save(tmp_path / "chatty")
    return str(tmp_path / "chatty")


def decoded(policy, source, out, *more):
    arguments = ["decode", policy, "--input", str(source), "--output", str(out), *OPTIONS]
    assert main([*arguments, "strategy=fixed", "n=1", *more]) == 0
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


TURNS = [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"},
         {"role": "user", "content": "3 + 4 ="}]  # fmt: skip


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_list_of_turns_in_a_file_is_a_chat_for_the_models_template(chatty, tmp_path, name):
    """And a text beside it stays a text, unless --chat makes it a user turn."""
    if name == "in.jsonl":
        rows = [{"prompt": TURNS, "answer": "7"}, {"question": "5 + 6 ="}]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist([{"prompt": TURNS, "answer": "7"}]), tmp_path / name)
    rows = decoded(chatty, tmp_path / name, tmp_path / "out", "--template-arg", "closed=true")
    assert rows[0]["prompt"] == "1 + 2 = wait 3 wait 3 + 4 = so"
    assert rows[0]["template_hash"] is not None
    assert rows[0]["answer"] == "7", "graded as any other row"
    if name == "in.jsonl":
        assert rows[1]["prompt"] == "5 + 6 ="
        assert rows[1]["template_hash"] is None
        both = decoded(chatty, tmp_path / name, tmp_path / "chats", "--chat")
        assert [row["template_hash"] is not None for row in both] == [True, True]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([3], "line 2, `prompt`: it is an array, and not every entry has a role and a content"),
        ([{"role": "user"}], "line 2, `prompt`: it is an array, and not every entry has a role"),
        ([{"content": "1"}], "not every entry has a role and a content"),
        ([], "line 2: `question` or `prompt` is an array"),
    ],
)
def test_an_array_that_is_no_chat_is_named_by_its_line(tmp_path, capsys, turns, message):
    """Before a model is loaded: there is none."""
    rows = [{"question": "1 + 2 ="}, {"prompt": turns}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["decode", "no/model", "--input", str(tmp_path / "in.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_a_grader_of_ones_own_decides_what_is_right(policy, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"question": "1 + 2 =", "answer": "no answer"}\n' * 3)
    even = "grade.grader=harness.user_graders:even"
    rows = decoded(policy, tmp_path / "in.jsonl", tmp_path / "out", even)
    assert [row["correct"] for row in rows] == [
        float(len(row["text"].split()) % 2 == 0) for row in rows
    ]
    # What a response is worth that max_tokens cut off.
    strict = decoded(
        policy, tmp_path / "in.jsonl", tmp_path / "cut", even, "grade.unfinished=wrong"
    )
    assert [row["correct"] for row in strict] == [
        row["correct"] * (row["finish_reason"] == "stop") for row in rows
    ]
    # Another grader is another result.
    arguments = ["decode", policy, "--input", str(tmp_path / "in.jsonl"), *OPTIONS]
    again = [*arguments, "strategy=fixed", "n=1", "--output", str(tmp_path / "out")]
    assert main(again) == 2
    assert "grade" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("grade.grader=judge", "grade.judge.base_url=''"),
        ("grade.grade=x", "'grade.grade': there is no such setting. Fix: did you mean 'grader'"),
        ("grade=3", "grade=3: it has settings of its own"),
        ("grade.grader=no_such:module", "no_such"),
    ],
)
def test_impossible_graders_are_refused_before_a_model_is_loaded(capsys, option, message):
    assert main(["decode", "no/model", "--prompt", "1 + 2 =", option]) == 2
    assert message in capsys.readouterr().err


def test_a_judge_needs_a_place_for_its_replies(capsys):
    judge = ["grade.grader=judge", "grade.judge.base_url=http://localhost:1/v1"]
    arguments = ["decode", "no/model", "--prompt", "1 + 2 =", *judge, "grade.judge.model=m"]
    assert main(arguments) == 2
    assert "grade.grader=judge without --output" in capsys.readouterr().err
