"""Equal answers vote together, however they are written: in `decode` and in every baseline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
from reasoning_gym.factory import DATASETS

from harness.problem_sources import gym_problems
from zip_rc_jax.data.problems.gym import HASH_DEPENDENT
from zip_rc_jax.evaluation.baselines import SamplePool, baseline_point, majority_reward
from zip_rc_jax.grading import votes
from zip_rc_jax.grading.grader import Grader, equivalent
from zip_rc_jax.grading.votes import NO_ANSWER, group_answers
from zip_rc_jax.inference.outputs import Prefix
from zip_rc_jax.inference.tree import voted_prefix
from zip_rc_jax.pipeline.evaluation.pool import answer_ids

SPELLINGS = {
    "42": ["42", "42.", "$42$", "\\(42\\)"],
    "1/2": ["0.5", "\\frac{1}{2}", "\\dfrac{1}{2}", "1/2."],
    "root": ["\\sqrt{8}", "2\\sqrt{2}", "2*sqrt(2)"],
    "polynomial": ["x^2+2x+1", "(x+1)^2", "1 + 2x + x^2"],
}
# Without those whose answers are formulas of one value (countdown: 3 + 4 and 4 + 3), or slow to
# make or to compare.
TASKS = sorted(
    set(DATASETS) - {*HASH_DEPENDENT, "composite", "countdown", "intermediate_integration"}
)
FAMILIES = pytest.mark.parametrize("spellings", SPELLINGS.values(), ids=SPELLINGS)


def prefix(number: int, answer: str, value: float) -> Prefix:
    return Prefix(
        number, -1, 0, (1, 2), f"So it is.\nAnswer: {answer}", "finished", "stop", value, 0.0
    )


@FAMILIES
def test_spellings_of_one_answer_are_one_group(spellings):
    assert group_answers([*spellings, "17", *spellings]) == [
        *[0] * len(spellings),
        1,
        *[0] * len(spellings),
    ]


@FAMILIES
def test_equal_answers_win_over_two_equal_wrong_ones_in_a_decode(spellings):
    answers = ["17", *spellings[:3], "17"]
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 13):
        chosen = voted_prefix([prefix(i, answers[k], 0.5) for i, k in enumerate(order)])
        assert chosen is not None
        assert not chosen.text.endswith("17")


def test_the_most_valuable_sample_of_the_group_is_shown():
    found = voted_prefix(
        [
            prefix(0, "0.5", 0.3),
            prefix(1, "1/2", 0.6),
            prefix(2, "7", 0.8),
            prefix(3, "$\\frac12$", 0.2),
        ]
    )
    assert found is not None
    assert found.id == 1


@FAMILIES
@pytest.mark.parametrize("method", ["majority", "weighted_best_of_n"])
def test_equal_answers_win_over_two_equal_wrong_ones_in_every_baseline(spellings, method):
    texts = [f"Answer: {a}" for a in ["17", *spellings[:3], "17"]]
    ids = answer_ids(texts)
    pool = SamplePool([[0, 1, 1, 1, 0]], [ids], np.full((1, 5), 0.5), np.ones((1, 5)), [0])
    assert baseline_point(pool, method, 5).accuracy[0] == 1
    assert majority_reward(np.array([0, 1, 1, 1, 0]), np.array(ids)) == 1


def test_no_answer_is_no_group():
    assert group_answers([None, "3", None, "3.0"]) == [NO_ANSWER, 0, NO_ANSWER, 0]
    assert answer_ids(["I do not know", "Answer: 3"]) == [NO_ANSWER, 0]


def partition(
    answers: Sequence[str], same: votes.AnswerEquivalence | None = None
) -> list[list[str]]:
    found: dict[int, set[str]] = {}
    for answer, number in zip(
        answers, group_answers(answers, same) if same else group_answers(answers), strict=True
    ):
        found.setdefault(number, set()).add(answer)
    return sorted(map(sorted, found.values()))


def test_groups_do_not_depend_on_the_order_though_same_is_no_equivalence():
    def neighbors(a: str, b: str) -> bool:
        return abs(int(a) - int(b)) == 1

    answers = ["4", "1", "9", "2", "3", "8", "2"]
    # 2 is the most frequent; 3 equals it, but not 1
    expected = [["1", "2"], ["3", "4"], ["8", "9"]]
    assert all(
        partition(order, neighbors) == expected
        for order in itertools.islice(itertools.permutations(answers), 0, None, 11)
    )


AMBIGUOUS = [
    ["5 km", "5 m", "5"],
    ["x = 5", "y = 5", "5"],
    ["(A) 5", "(B) 5", "A", "B", "5"],
    ["50%", "50", "0.5"],
    ["$5", "5 cents", "5"],
]


@pytest.mark.parametrize("answers", AMBIGUOUS)
def test_answers_that_the_grader_calls_different_never_vote_together(answers):
    """However many others are equal to both of them."""
    for order in itertools.permutations(answers):
        found = partition(order)
        assert found == partition(answers)
        assert all(equivalent(a, b) for group in found for a, b in itertools.combinations(group, 2))
        assert len(found) >= 2


def test_an_ambiguous_answer_votes_with_the_most_frequent_of_its_readings():
    assert group_answers(["5", "5 km", "5 m", "5 m"]) == [0, 1, 0, 0]
    assert group_answers(["5", "5 km", "5 km", "5 m"]) == [0, 0, 0, 1]


TEXTS = [
    ["1 2\n3 4", "1 2\n4 3", "1 2"],
    ["Move disk 1\nMove disk 2", "Move disk 1\nMove disk 3"],
    ["0x3eb2", "0x5b993", "0", "0b101"],
    ["2020-01-02", "2019-01-01", "2017", "01/02/2020", "2/4/2020"],
    ["12 3 4", "1 23 4", "1234", "1 2 3 4"],
]


@pytest.mark.parametrize("answers", TEXTS)
def test_lines_dates_and_literals_are_no_formulas(answers):
    """As arithmetic 2020-01-02 is 2019-01-01, and any two hexadecimal literals are 0."""
    assert group_answers(answers) == list(range(len(answers)))
    assert group_answers([f" {a}  " for a in answers] + answers) == 2 * list(range(len(answers)))


def test_thousands_and_formulas_of_several_lines_are_mathematics():
    assert group_answers(["1 000 000", "1000000", "$\\frac{1}\n{2}$", "0.5"]) == [0, 0, 1, 1]


@pytest.mark.slow
def test_answers_to_other_problems_of_a_task_are_other_answers():
    """Whatever the task's answers look like. Answers that both problems accept may be one."""
    with Grader(3.0) as grader:
        for name in TASKS:
            found = gym_problems(name, "train", 8)
            groups = group_answers([p.answer for p in found])
            for (i, p), (j, q) in itertools.combinations(enumerate(found), 2):
                if groups[i] == groups[j] and p.answer != q.answer:
                    assert [
                        grader.score(p, f"Answer: {q.answer}"),
                        grader.score(q, f"Answer: {p.answer}"),
                    ] == [1, 1], (name, i, j)


def test_the_vote_does_not_depend_on_how_sums_are_rounded():
    values = [0.1, 0.2, 0.3, 0.7]  # (0.1 + 0.2) + 0.3 > 0.6 in floating point
    for order in itertools.permutations(values):
        samples = [
            prefix(9, "7", 0.6),
            *(prefix(i, "3", v) for i, v in enumerate(order) if v < 0.7),
        ]
        chosen = voted_prefix(samples)
        assert chosen is not None
        assert chosen.id == 9, "0.6 against 0.6: the first wins"


def test_groups_equal_a_slow_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    values = [(int(a), int(b)) for a, b in rng.integers(1, 9, (40, 2))]
    spell = [
        lambda a, b: f"{a}/{b}",
        lambda a, b: f"\\frac{{{a}}}{{{b}}}",
        lambda a, b: f"${2 * a}/{2 * b}$.",
    ]
    found = group_answers([spell[i % 3](a, b) for i, (a, b) in enumerate(values)])
    for (i, (a, b)), (j, (c, d)) in itertools.combinations(enumerate(values), 2):
        assert (found[i] == found[j]) == (a * d == b * c), (values[i], values[j])


def test_numbers_and_words_need_no_process(monkeypatch):
    def started(*_: object) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr("zip_rc_jax.grading.grader.Grader._ask", started)
    assert group_answers(["41", "42", "4.2e1", "Paris", "paris", "London"]) == [0, 1, 1, 2, 2, 3]


def test_comparisons_that_take_too_long_leave_answers_apart_and_say_so(monkeypatch):
    monkeypatch.setattr(votes, "SECONDS", 0.0)

    def slow(a: str, b: str) -> bool:
        time.sleep(0.01)
        return True

    with pytest.warns(UserWarning, match="not compared in time"):
        assert len(set(group_answers(["x", "y", "z", "x"], slow))) >= 2


def test_very_many_answers_are_compared_by_their_form_only_and_say_so():
    answers = [str(i) for i in range(votes.MOST_FORMS + 1)] + ["7.0"]
    with pytest.warns(UserWarning, match="normal form"):
        found = group_answers(answers, lambda a, b: True)
    assert found[-1] == found[7]
    assert len(set(found)) == votes.MOST_FORMS + 1
