"""The examples of plug-ins run from another directory and print what they say."""

from __future__ import annotations

import ast
import pathlib
import re
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """What an example prints, line by line."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> list[str]:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_own_policy_solves_problems_with_fewer_tokens_than_all_four_samples(printed):
    lines = [
        re.fullmatch(r"(\w+) +(\d) of 6 solved with (\d+) tokens", line)
        for line in printed("own_policy.py")
    ]
    assert [line and line[1] for line in lines] == ["zip_rc", "best_two"]
    assert all(line and int(line[2]) >= 3 for line in lines)
    assert int(lines[1][3]) < int(lines[0][3])


def test_the_own_utility_leaves_the_long_answer_and_spends_less(printed):
    lines = printed("own_utility.py")
    assert "continues answers [0, 1, 2]" in lines[0]
    assert "continues answers [0, 1]" in lines[1]
    paper, own = (ast.literal_eval(re.search(r"\[.*\]", line)[0]) for line in lines[2:])
    assert sum(own) < sum(paper)


def test_the_own_answers_group_as_their_equivalence_says(printed):
    found = {line[:15].strip(): line[16:] for line in printed("own_answers.py")}
    answers = ast.literal_eval(found["answers"])
    for name, key in (("groups", int), ("parity groups", lambda answer: int(answer) % 2)):
        groups = ast.literal_eval(found[name])
        assert all(
            (a == b) == (key(x) == key(y))
            for a, x in zip(groups, answers, strict=True)
            for b, y in zip(groups, answers, strict=True)
        )
    assert found["by vote"] in answers
    assert found["the shortest"] in answers
