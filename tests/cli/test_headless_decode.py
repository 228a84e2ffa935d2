"""`zip-rc decode` with a policy that has no head: plain samples, and a word about the rest."""

from __future__ import annotations

import json

import pytest

from zip_rc_jax.cli.main import main

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
