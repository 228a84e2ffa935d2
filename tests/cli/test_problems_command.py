"""`zip-rc problems`: what the stages would work on, without a model."""

from __future__ import annotations

import json

import pytest

from zip_rc_jax.cli.main import main


@pytest.fixture
def config(tmp_path):
    rows = [
        {"problem": f"{i} + 1?", "solution": rf"So \boxed{{{i + 1}}}", "level": f"Level {i % 2}"}
        for i in range(6)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.csv").write_text("question,answer\n5 + 1,6\n9 + 9,18\n")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"problems: {{train: 'jsonl:{tmp_path}/mine.jsonl', heldout: 'csv:{tmp_path}/held.csv'}}\n"
    )
    return str(path)


def test_it_shows_sources_levels_answers_and_overlaps(config, capsys):
    assert main(["problems", config, "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert "train: 5 problems" in said
    assert "5 problems, of 6 rows, question from `problem`, answer from `solution`" in said
    assert "levels: Level 0 (3), Level 1 (2)" in said
    assert "question: 0 + 1?" in said
    assert "answer:   1\n" in said
    assert "question: 1 + 1?" in said
    assert "2 + 1" not in said
    assert "1 training problems are held-out ones (1 have the same question, 0 contain one)" in said
    assert main(["problems", config, "--split", "heldout", "run_dir=none"]) == 0
    assert "heldout: 2 problems" in capsys.readouterr().out


def test_it_refuses_what_the_stages_would_refuse(config, capsys):
    for override, message in (
        ("problems.train.answer=gold", "there is no column `gold`; the columns are problem"),
        ("rollout.prompts=6", "(without 1 held-out ones) has 5"),
        ("problems.overlap=refuse", "1 of 6 training problems: they are held-out ones"),
    ):
        assert main(["problems", config, override]) == 2
        assert message in capsys.readouterr().err
