"""`grading.grade` and `grading.equivalent`: one line each, from anywhere, without reasoning-gym for
mathematics."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys

import pytest

from zip_rc_jax.grading import answer_groups, equivalent, grade
from zip_rc_jax.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("1/2", "So it is \\boxed{0.5}.", 1.0),
        ("1/2", "So it is \\boxed{0.6}.", 0.0),
        ("(x+1)^2", "Answer: x^2 + 2x + 1", 1.0),
        ("7", "I do not know", 0.0),
    ],
)
def test_a_response_has_the_score_of_the_answer_that_it_states(answer, response, score):
    assert grade("math", answer, response) == score


def test_answers_are_compared_as_mathematics_from_many_threads():
    pairs = [(f"(x+{i})^2", f"x^2+{2 * i}x+{j}") for i in range(1, 5) for j in (i * i, i * i + 1)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: equivalent(*pair), pairs))
    assert found == [True, False] * 4


WITHOUT = """
from zip_rc_jax.grading import equivalent, grade
assert grade("math", "\\\\sqrt{8}", "Answer: $2\\\\sqrt{2}$") == 1.0
assert not equivalent("x^2", "x^3")
try:
    import reasoning_gym
except ImportError:
    print("no reasoning-gym")
"""


def test_mathematics_is_graded_where_reasoning_gym_cannot_be_imported(tmp_path):
    """Formulas, so that the worker process takes part.

    The process ends by itself, so the worker ended with it.
    """
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not installed')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "no reasoning-gym\n"), done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: grade("math", 42, "Answer: 42"),
            r"answer=42: it is a int, and answers are texts.*str\(answer\)",
        ),  # type: ignore[arg-type]
        (lambda: grade("math", "42", None), r"response=None"),  # type: ignore[arg-type]
        (lambda: equivalent("1", 1), r"b=1: it is a int"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_text_is_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# ---- answers read and compared in another way

TEXTS = ["I take (b)", "I take (B)", "I take (a)", "I take none"]


def letter(text: str) -> str | None:
    return text.split("(")[1][0] if "(" in text else None


def same_letter(a: str, b: str) -> bool:
    return a.lower() == b.lower()


def test_answers_are_grouped_by_an_extractor_and_an_equivalence_of_ones_own():
    assert answer_groups(TEXTS, letter, same_letter) == [0, 0, 1, -1]
    assert answer_groups(TEXTS, letter, "text") == [0, 1, 2, -1]


def test_an_equivalence_of_ones_own_is_asked_about_numbers_too():
    """The grader's reading of numbers must not get ahead of it: here all even numbers are the same
    answer."""
    assert answer_groups(
        ["4", "7", "4.0", "12"], str, lambda a, b: float(a) % 2 == float(b) % 2
    ) == [0, 1, 0, 0]
    assert answer_groups(["4", "4.0"], str, "text") == [0, 1]


def test_a_wrong_extractor_or_equivalence_is_refused_by_name():
    with pytest.raises(
        UsageError, match=r"answer_extractor <function.*it returned 1, which is no text"
    ):
        answer_groups(TEXTS, lambda text: 1)
    with pytest.raises(
        UsageError,
        match=r"answer_equivalence <function.*it returned 'yes', which is no truth value",
    ):
        answer_groups(TEXTS, letter, lambda a, b: "yes")
    with pytest.raises(UsageError, match=r"answer_extractor='stted': .*did you mean 'stated'"):
        answer_groups(TEXTS, "stted")
