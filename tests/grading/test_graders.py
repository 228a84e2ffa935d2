"""Grading: the task's own scorer on the extracted answer, whatever the text is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import time

import pytest
import reasoning_gym

from harness.problem_sources import gym_problems
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.grader import Grader, correct, grade
from zip_rc_jax.runtime.errors import UsageError

LIMIT = 2.0


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=LIMIT) as grader:
        yield grader


def maths(answer):
    return Problem(0, 0, 0, "?", answer, "math")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\nAnswer: 4", "4"),
        ("Answer: 3. wait, Answer:  4 \n", "4"),
        ("**Answer:** 4", "4"),
        ("**Answer**: 4", "4"),
        ("Final Answer: a b\nc d", "a b\nc d"),
        ("so \\boxed{3}, no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("Answer: \\boxed{4}.", "4"),
        ("\\boxed{3} Answer: 4", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("**Answer: 5**", "5"),
        ("**Answer:** **5**", "5"),
        ("**Answer**: *a b*\n", "a b"),
        ("**Answer: \\boxed{5}**", "5"),
        ("Answer: 2*x**3", "2*x**3"),
        ("Answer: **", None),
        ("Answer:", None),
        ("Answer: \n", None),
        ("so \\boxed{3} and \\boxed{}", "3"),
        ("\\boxed{ }", None),
        ("\\boxed{3} Answer: \\boxed{}", None),
        ("\\boxed{\\boxed{}}", None),
        ("the answer is 4", "4"),
        ("\\boxed{", None),
        ("", None),
    ],
)
def test_the_answer_is_found(text, answer):
    assert extract_answer(text) == answer


BOX = "\\boxed{"


@pytest.mark.parametrize(
    "text",
    [
        BOX * 100_000,
        BOX * 20_000 + "}" * 20_000,
        (BOX + " ") * 20_000,
        "{}" * 300_000,
        "Answer:" * 100_000,
        "Answer" + " " * 1_000_000,
    ],
)
def test_finding_the_answer_takes_linear_time(text):
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "name",
    [
        "chain_sum",
        "products",
        "letter_counting",
        "countdown",
        "polynomial_equations",
        "spiral_matrix",
    ],
)
def test_scores_are_reasoning_gyms_own(grader, name):
    """With levels' options, for right, wrong, partly right and unreadable answers; scorers in this
    process and in the worker."""
    found = gym_problems(name, "heldout", 3)
    dataset = reasoning_gym.create_dataset(name, seed=found[0].seed, size=3)
    for problem in found:
        for answer in (
            problem.answer,
            f"about {problem.answer} or so",
            "12",
            "+1,000.0",
            "x/0",
            "[[1,",
        ):
            assert grader.score(problem, f"Let us see.\nAnswer: {answer}") == pytest.approx(
                dataset.score_answer(answer, dataset[problem.index])
            )
    assert grader.score(found[0], f"Answer: {found[0].answer}") == 1.0


def test_only_a_full_score_is_correct():
    assert 0 < grade("chain_sum", "12", "Answer: it is 12") < 1
    assert [correct(score) for score in (0.0, 0.4, 0.999, 1.0)] == [0.0, 0.0, 0.0, 1.0]
    assert correct(grade("chain_sum", "1000", "Answer: +1,000.00")) == 1.0


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("\\frac{1}{2}", "Answer: 0.5", 1.0),
        ("0.5", "thus \\boxed{\\frac12}", 1.0),
        ("72", "Answer: $72.0$", 1.0),
        ("72", "Answer: \\(72\\)", 1.0),
        ("1,000", "Answer: 1000", 1.0),
        ("18", "Answer: 18 dollars.", 1.0),
        ("18", "Answer: $18", 1.0),
        ("5", "Answer: x = 5", 1.0),
        ("(x-1)(x+1)", "\\boxed{x^2 - 1}", 1.0),
        ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}", 1.0),
        ("72", "Answer: 73", 0.0),
        ("72", "it is 72", 0.0),
        ("18", "Answer: 17 or 19 or 20", 0.0),
        ("x", "Answer: y", 0.0),
    ],
)
def test_maths_is_compared_as_maths(grader, answer, response, score):
    assert grader.score(maths(answer), response) == score


EVIL = [
    "9**9**9**9", "9^{9^{9^{9}}}", "$10000000!!!!$", "\\frac{{{{", "\\sqrt" * 500, "(" * 3000,
    "9" * 1_000_000, "\\boxed{" * 50_000,
    "\ud800\0\u202e\U0001f600", "٣" * 100, "1e999999999", "\\begin{matrix}" * 100, "x^" * 1500,
    "\n" * 100_000,
]  # fmt: skip


@pytest.mark.slow
def test_no_text_crashes_or_hangs_it(grader):
    start = time.monotonic()
    for text in EVIL:
        for problem in (maths("5"), Problem(0, 0, 0, "?", "5", "chain_sum")):
            assert grader.score(problem, f"Answer: {text}") == 0.0
    # A hung answer costs its limit and the start of a new worker.
    assert time.monotonic() - start < 40
    assert grader.score(maths("5"), "Answer: 10/2") == 1.0


def test_text_is_never_run_as_code(grader, tmp_path):
    """Some reasoning-gym scorers call `eval`, others sympy's `parse_expr`."""
    target = tmp_path / "made"
    codes = [
        f"__import__('pathlib').Path({str(target)!r}).touch()",
        f"open({str(target)!r}, 'w')",
        f"eval('op' + 'en')({str(target)!r}, 'w')",
        f"S('op' + 'en({str(target)!r}, \"w\")')",
        f"().{'__class__'}",
    ]
    for name in (
        "string_insertion",
        "spiral_matrix",
        "n_queens",
        "countdown",
        "puzzle24",
        "simple_integration",
    ):
        for problem in gym_problems(name, "train", 1):
            assert [grader.score(problem, f"Answer: {code}") for code in codes] == [0.0] * len(
                codes
            )
    assert not target.exists()


def test_a_worker_that_dies_is_replaced(grader):
    assert grader.score(maths("5"), "Answer: 10/2") == 1.0
    grader._worker._process.kill()
    assert grader.score(maths("5"), "Answer: 10/2") == 1.0


def test_threads_share_a_grader_and_keep_their_own_scores(grader):
    items = [(maths(str(i)), f"Answer: {2 * (i + i % 2)}/2") for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda item: grader.score(*item), items))
    assert scores == [float(i % 2 == 0) for i in range(40)] == grader.grade_many(items)


def test_it_works_in_another_process():
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        assert pool.submit(grade, "math", "0.5", "Answer: 1/2").result(timeout=60) == 1.0


def test_a_scorer_never_sees_another_problem(grader):
    """For example after an update of reasoning-gym: an error, not a wrong grade."""
    problem = gym_problems("countdown", "train", 1)[0]
    with pytest.raises(UsageError, match="now generates another problem"):
        grader.score(dataclasses.replace(problem, question="another"), "Answer: 1 + 1")
    with pytest.raises(UsageError, match="pass the problem's entry_json"):
        grader.score(dataclasses.replace(problem, entry_json=""), "Answer: 1 + 1")
    with pytest.raises(UsageError, match="did you mean 'countdown'"):
        grader.score(dataclasses.replace(problem, task="count_down"), "Answer: 1 + 1")


@pytest.mark.parametrize(
    ("gold", "other"),
    [("0x3eb2", "0x5b993"), ("0b101", "0b111"), ("2020-01-02", "2019-01-01"), ("1/2/2020",
    "2/4/2020"), ("1 2\n3 4", "1 2\n4 3"),
     ("5\n6", "5\n7"), ("Move a\nMove b", "Move a\nMove c"), ("Move a\nMove b", "Move a"), ("1 2 3",
     "6")],
)  # fmt: skip
def test_grids_dates_and_literals_are_right_only_as_they_are_written(gold, other):
    with Grader() as grader:
        assert grader.equivalent(gold, gold)
        assert grader.equivalent(gold, f" {gold} ")
        for a, b in ((gold, other), (other, gold)):
            assert not grader.equivalent(a, b)
            assert grader.score(Problem(0, 0, 0, "?", a, "math"), f"Answer: {b}") == 0


def test_a_remark_below_a_number_is_no_part_of_it():
    with Grader() as grader:
        assert grader.equivalent("14", "14\n---\nmore text 15")
