"""What counts as the answer in a response: every way to state one, where it ends, and in linear
time."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from harness.problem_sources import gym_problems
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading.answers import MAX_RESPONSE_CHARS, canonical, extract_answer
from zip_rc_jax.grading.grader import Grader, equivalent, grade


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # The last statement counts; a sentence counts only without any other.
        ("Answer: 1\n#### 2\n\\boxed{3}\n<answer>4</answer>", "4"),
        ("<answer>1</answer>\nAnswer: 2\n#### 3\n\\boxed{4}", "4"),
        ("\\boxed{1}\n<answer>2</answer>\nAnswer: 3\n#### 4", "4"),
        ("#### 1\n\\boxed{2}\n<answer>3</answer>\nAnswer: 4", "4"),
        ("Answer: 4\nThus the answer is 5.", "4"),
        ("\\boxed{4}. So the answer is 5 apples.", "4"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is 4. It would be wrong if the answer was 5.", "4"),
        ("The answer is 4. The answer is not 5.", "4"),
        ("Suppose the answer is 3. Then we are done.", None),
        # Headings and lists are no answers.
        ("Answer: 4\n#### Check the sum", "4"),
        ("#### Step 1: add\n4", None),
        ("### Answer\n\n4", "4"),
        ("**Answer**\n4", "4"),
        ("Answers: 3 and 4", "3 and 4"),
        ("Answer (in km): 4", "4"),
        ("What is the answer?", None),
        ("My answer follows.", None),
        # Boxes.
        ("\\boxed{3} and \\boxed{4}", "3, 4"),
        ("\\boxed{3}, \\boxed{4}, or \\boxed{5}", "3, 4, 5"),
        ("\\boxed{3} is wrong, it is \\boxed{4}", "4"),
        ("Answer: \\boxed{3}, \\boxed{4}", "3, 4"),
        ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("Answer: x = \\boxed{4}", "4"),
        # Thoughts.
        ("<think>\\boxed{3}</think>", "3"),
        ("<think>Answer: 3</think>It is 4.", None),
        ("<think>Answer: 3", "3"),
        ("Answer: 3</think>\nAnswer: 4", "4"),
        # Where it ends.
        ("Answer: 4\n\nBye", "4"),
        ("Answer:\n\n4\n\nBye", "4"),
        ("Answer: a b c\nd e f", "a b c\nd e f"),
        ("Answer: 1 2\n3 4\n\nConfidence: 9", "1 2\n3 4"),
        ("Answer: 1 2\n \n3 4", "1 2\n \n3 4"),
        ("Answer:\n```\n1 2\n3 4\n```\nDone", "1 2\n3 4"),
        ("Answer: [[1, 2],\n [3, 4]]\nDone", "[[1, 2],\n [3, 4]]"),
        ('Answer: {\n  "a": 1\n}\nThis is why.', '{\n  "a": 1\n}'),
        ("Answer: $$\n\\frac{1}{2}\n$$\nas we said", "$$\n\\frac{1}{2}\n$$"),
        ("Answer: "
         "\\begin{pmatrix}\n1\\\\\n2\n\\end{pmatrix}\nDone now",
         "\\begin{pmatrix}\n1\\\\\n2\n\\end{pmatrix}"),
        ("Answer: Move disk 1 from Peg 1 to 2\nMove disk 2 from Peg 1 "
         "to 3", "Move disk 1 from Peg 1 to 2\nMove disk 2 from Peg 1 to 3"),
        ("Answer: Tom is a knave, and Ann is a knight.", "Tom is a knave, and Ann is a knight."),
        ("Answer: 2 - sin x", "2 - sin x"),
        ("Answer: exp(x)*sin(x)/2 - exp(x)*cos(x)/2 + C", "exp(x)*sin(x)/2 - exp(x)*cos(x)/2 + C"),
        ("Answer: 1 \u2013 cos x", "1 \u2013 cos x"),
        ("Answer: 2x - alpha beta", "2x - alpha beta"),
        ("Answer: 4 - that is all", "4"),
        ("Answer: \\boxed{1   2\n \n3   4}", "1   2\n \n3   4"),
        ("Answer: [0, 1)\n\nBye", "[0, 1)"),
        ("Answer: (0, 1]\nBye now", "(0, 1]"),
        ("Answer: f(x\n\nBye now", "f(x"),
        ("Answer: 4\r\nConfidence: 90%", "4"),
        ("Answer: Note: 4", "Note: 4"),
        # A next question.
        ("Answer: 4\n\nQuestion: 3 + 4?", "4"),
        ("Answer:\n\nQuestion: 3 + 4?\nAnswer: 7", None),
        ("Question: 2 + 2?\nLet me see.\nAnswer: 4", "4"),
        ("Problem 1: easy. Problem 2: hard. Answer: 4", "4"),
    ],
)  # fmt: skip
def test_what_counts_as_the_answer(text, answer):
    assert extract_answer(text) == answer


MEGA = 199_000  # all of it is read
HOSTILE = {
    "open remarks": "Answer: 4(" + ". Aaa 4 " * (MEGA // 8 - 2),
    "digits": "9" * MEGA,
    "spaces": "Answer:" + " " * MEGA,
    "newlines": "Answer: 4" + "\n" * MEGA,
    "markers": "Answer: 4\n" * (MEGA // 10),
    "answer words": "answer " * (MEGA // 7),
    "phrases": "the answer is " * (MEGA // 14),
    "to": "the answer to " * (MEGA // 14),
    "stars": "Answer: " + "*" * MEGA,
    "hashes": "####" * (MEGA // 4),
    "hash lines": "#### 4\n" * (MEGA // 7),
    "boxes": "\\boxed{4}" * (MEGA // 9),
    "nested": "\\boxed{" * (MEGA // 7),
    "nested closed": "\\boxed{" * (MEGA // 14) + "}" * (MEGA // 14),
    "nested full": "\\boxed{4" * (MEGA // 14) + "}" * (MEGA // 14),
    "and boxes": "\\boxed{4} and " * (MEGA // 14),
    "tags": "<answer>" * (MEGA // 8),
    "tag pairs": "<answer>4</answer>" * (MEGA // 18),
    "thoughts": "</think>" * (MEGA // 8),
    "questions": "Answer: 4\nQuestion: " * (MEGA // 21),
    "parentheses": "Answer: " + "(" * MEGA,
    "closed": "Answer: 4 " + "()" * (MEGA // 2),
    "remarks": "Answer: 4 (" + "a" * MEGA,
    "many remarks": "Answer: 4 " + "(aaa " * (MEGA // 5),
    "sentences": "Answer: 4. " + "A b. " * (MEGA // 5),
    "dots": "Answer: 4" + "." * MEGA,
    "dot spaces": "Answer: 4" + ". " * (MEGA // 2),
    "words": "Answer: " + "word " * (MEGA // 5),
    "lines": "Answer: " + "a b\n" * (MEGA // 4),
    "grid": "Answer: " + "1 2 3\n" * (MEGA // 6),
    "open braces": "Answer: [" + "1,\n" * (MEGA // 3),
    "dollars": "Answer: " + "$" * MEGA,
    "labels": "Answer: 4\n" + "Note " * (MEGA // 5),
    "emphasis": "Answer: **" + "a**" * (MEGA // 3),
    "figures": "Answer: The sum is " + "4 " * (MEGA // 2),
    "backslashes": "Answer: " + "\\" * MEGA,
    "text": "Answer: " + "\\text{" * (MEGA // 6),
    "unicode": "Answer: " + "½" * MEGA,
    "superscripts": "Answer: x" + "²" * MEGA,
    "roots": "Answer: " + "√(" * (MEGA // 2),
    "tabs": "answer\t" * (MEGA // 7),
    "underscores": "answer" + "_" * MEGA + ":",
    "if": "if the answer is 4 " * (MEGA // 19),
    "prose": "Answer: " + "It is so and so. " * (MEGA // 17),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_response_takes_more_than_linear_time(name):
    """The time for the last 200,000 characters bounds that of any response: a second response of
    twice the length costs the same."""
    begin = time.process_time()
    answer = extract_answer(HOSTILE[name])
    assert time.process_time() - begin < 5
    assert answer is None or len(answer) <= MAX_RESPONSE_CHARS


LONG = 3_900  # answers longer than 4,000 characters are not read
BITS = [
    "9", "(", ")", "[", "{", "}", "\\{", "$", "\\", "1,", "1/", "-", "+", "2^", "^", "\\frac{",
    "\\frac{1}{2}", "1 ", " ", "a", "a ",
    "ab, ", "1 and ", "=", "x=", "x=1, ", "\\text{", "\\text{a}", "√", "√(", "²", "½",
    "\\begin{pmatrix}", "&", "\\\\ ", ".", "0.",
    "...", "1e9", "e", "!", "%", "°", "$5 ", "km ", "1:", "\\pm ", "\\cup ", "(1,2) \\cup ",
    "\\boxed{", "*", "**", "1*", "sqrt(",
    "abs(", "exp(", "per ", "million ", "3 1/2 ", "(A) ", "A. ", "nan ", "inf ", "é", "\U0001f600",
    "\u202e", "٣", "four ", "forty-",
]  # fmt: skip


@pytest.mark.parametrize("bit", BITS)
def test_no_answer_takes_long_to_read(bit):
    text = (bit * LONG)[:LONG]
    begin = time.process_time()
    for answer in (text, "5 " + text, text + "}", "(" + text + ")", "x=" + text):
        assert isinstance(canonical(answer), str)
    assert time.process_time() - begin < 10


def test_a_long_answer_equals_only_itself():
    long = "1, " * 3_000
    assert equivalent(long, long)
    assert not equivalent(long, long + "2")
    assert grade("math", "42", "Answer: " + "4" * 5_000) == 0.0


def test_tasks_get_the_same_answer_as_before_and_no_full_stop():
    chain = Problem(0, 0, 0, "?", "42", "chain_sum")
    with Grader() as grader:
        scores = [
            grader.score(chain, text)
            for text in (
                "Answer: 42",
                "Answer: 42.",
                "Answer: 42!",
                "Answer: 42\n\nCheck: 40 + 2 = 42",
                "Answer: +42.0",
            )
        ]
        assert scores == [1.0] * 5
        assert all(
            grader.score(chain, text) < 1
            for text in (
                "Answer: 41\n\nCheck: 42",
                "42",
                "Answer: nan",
                "Answer: -42",
                "Answer: 42 or 43",
            )
        )
        short = Problem(0, 0, 0, "?", "8 or 1.", "caesar_cipher")
        assert [
            grader.score(short, text) for text in ("Answer: 8 or 1.", "**Answer: 8 or 1.**")
        ] == [1.0, 1.0]
        number = gym_problems("complex_arithmetic", "train", 1)[0]
        assert [
            grader.score(number, f"Answer: {text}")
            for text in (number.answer, "nan", "NaN", "nan+nanj", "inf")
        ] == [
            1.0,
            0.0,
            0.0,
            0.0,
            0.0,
        ]
        sentence = gym_problems("sentence_reordering", "train", 1)[0]
        assert sentence.answer[-1] in ".!"
        assert grader.score(sentence, f"Answer: {sentence.answer}") == 1.0


@pytest.mark.slow
def test_no_junk_has_full_marks_in_any_dataset_and_every_reference_answer_has():
    """nan, infinities, booleans, empty lists, long numbers, changed reference answers: in all
    datasets of reasoning-gym."""
    script = pathlib.Path(__file__).parents[1] / "harness" / "junk_answers.py"
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONHASHSEED": "0",  # some datasets depend on it
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=1500,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] > 100
    assert found["wrong"] == found["lost"] == []


@pytest.mark.parametrize(
    ("task", "gold", "answer"),
    [
        ("gsm_symbolic", "279", "-279"),
        ("gsm_symbolic", "279", "279 or 7"),
        ("gsm_symbolic", "279", "not 279"),
        ("chain_sum", "5", "nan"),
        ("aiw", "5", "inf"),
    ],
)
def test_marks_that_a_scorer_gives_to_a_wrong_answer_do_not_count(task, gold, answer):
    from zip_rc_jax.grading.overrated import overrated

    assert overrated(task, gold, answer)
    assert not overrated(task, gold, gold)


@pytest.mark.parametrize(
    ("task", "gold", "right", "wrong"),
    [
        ("complex_arithmetic", "-5.0 + 20.0i", "-5 + 20i", ["nan", "nan+nanj", "1e999"]),
        ("coin_flip", "3.051757812e-05", "3.0517578125e-05", ["0", "-3.051757812e-05", "4.05e-05",
        "3.051757812e-06"]),
        ("game_of_life_halting", "True", "true", ["False", "nan", "no", "0"]),
        ("game_of_life", "[[0,1],[1,0]]", "[[0, 1], [1, 0]]", ["[[0,1],[1,0],[0]]",
        "[[0,true],[1,0]]", "[[0,1,1],[1,0]]"]),
        ("polynomial_equations", "", '""', ["banana", "nan", "x"]),
        ("fraction_simplification", "$\\frac{131}{319}$", "\\frac{131}{319}",
        ["$\\frac{131}{319}$, 7", "$\\frac{131}{320}$"]),
    ],
)  # fmt: skip
def test_the_scorers_known_faults_are_caught(task, gold, right, wrong):
    from zip_rc_jax.grading.overrated import overrated

    assert not overrated(task, gold, right)
    assert all(overrated(task, gold, answer) for answer in wrong)
