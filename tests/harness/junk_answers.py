"""Answers to every dataset of reasoning-gym that has a scorer.

Run with PYTHONHASHSEED=0; prints one JSON object.

`wrong`: [task, answer, reference answer] of junk with full marks. `lost`: [task, answer] of a
  reference answer without them.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from fractions import Fraction

from reasoning_gym.factory import DATASETS

from harness.problem_sources import gym_problems
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.runtime.errors import UsageError

JUNK = [
    *["nan", "NaN", "-nan", "nan+nanj", "nanj", "nani", "nan,nan", "[nan,nan]", "[[nan]]",
    "(nan,nan)", "nan°", "nan/nan", "nan%", "$nan"],
    *["inf", "-inf", "Infinity", "-Infinity", "infj", "1e999", "-1e999", "1e400j", "inf,inf",
    "[Infinity]"],
    *["1e308", "1e-308", "4e-324", "-1e-400"],
    *["True", "False", "None", "true", "false", "null", "[true]", "[false]", "yes", "no", "none",
    "Yes", "No"],
    *["[]", "{}", "()", "''", '""', "[[]]", "[{}]", "[null]", '[""]', "[None]", '{"a":1}',
    '{"0":0}', "[[0]]", "[[1]]", "[0]", "[1]"],
    *["0", "1", "-1", "0.0", "-0", "+0", "00", "0/1", "1/1", "1_0", "٣", "½", "0x10", "1e5", "1j",
    "0j", "1+0j"],
    *["x", "y", "C", "I", "E", "pi", "oo", "zoo", "S.NaN", "*", "+", "-", "/", "=", "->", "...",
    ".", ",", ";", "|"],
    *["_", "$", "^", "\\", "#", "!"],
    *["A", "B", "a", "not", "impossible", "empty", "banana", "x==x", "U", "R", "LRUD"],
    "No solution", "lambda: 0", "[i for i in range(3)]", "the answer", "A" * 3000, "9" * 400,
    "1" * 400, "0 " * 500,
]  # fmt: skip

SLOW = {"knight_swap"}  # making one of its problems takes longer than an answer may


def changed(gold: str) -> list[str]:
    """Answers next to the reference answer that are other ones."""
    figures = [m.start() for m in re.finditer(r"\d", gold)][:1]
    found = [gold[:i] + str((int(gold[i]) + 3) % 10) + gold[i + 1 :] for i in figures]
    if re.fullmatch(r"-?\d+(\.\d+)?", gold):
        found += [
            "-" + gold if float(gold) else "7",
            gold + "7",
            f"{gold} or 7",
            f"not {gold}",
            f"{gold}, 7",
            gold + "e1" if float(gold) else "8",
        ]
    if gold.startswith("[["):
        found += [
            gold.replace("]]", "],[0]]"),
            re.sub(r"\b1\b", "true", gold)
            if re.search(r"\b1\b", gold) and '"' not in gold
            else "[[7]]",
        ]
    return found


def equal_or_close(answer: str, gold: str) -> bool:
    """The same text or number.

    Scorers of decimals round, so a number is the same up to a part in 1,000 (in 10,000 for a
    probability).
    """
    try:
        a, b = Fraction(answer), Fraction(gold)
    except (ValueError, ZeroDivisionError):
        return answer.strip().lower() == gold.strip().lower()
    return abs(a - b) * 1000 <= abs(b)


FORMS = [
    "Let me see.\nAnswer: {}",
    "**Answer:** {}\n",
    "Answer:\n{}\n\nExplanation: that is 1 2 3",
    "<answer>{}</answer>",
    "Answer: {}\nConfidence: 9%",
]


def arrives(grader: Grader, p: Problem, form: str) -> bool:
    """Whether the scorer gets the reference answer as it is, or finds what it gets right."""
    response = form.format(p.answer)
    return (
        p.answer in ("", "None")
        or (extract_answer(response) or "") == p.answer.strip()
        or grader.score(p, response) >= 1.0
    )


def main() -> None:
    warnings.simplefilter("ignore")
    wrong, lost, seen = [], [], 0
    with Grader(timeout=5.0) as grader:
        for name in sorted(set(DATASETS) - SLOW):
            try:
                several = gym_problems(name, "train", 10)
            # one of several datasets, or none of its problems has a reference answer
            except UsageError:
                continue
            seen += 1
            begin = time.time()
            found = several[:2]
            lost += [
                [name, p.answer, form]
                for p in several
                for form in FORMS
                if not arrives(grader, p, form)
            ]
            for p in found:
                full = grader.score(p, f"Let us see.\nAnswer: {p.answer}")
                if full < 1.0 and p.answer.strip() not in ("", "None"):
                    lost.append([name, p.answer, full])
                others = changed(p.answer) if name not in ("codeio", "number_sorting") else []
                for answer in [*(JUNK if p is found[0] else []), *others]:
                    if equal_or_close(answer, p.answer):
                        continue
                    if grader.score(p, f"Answer: {answer}") >= 1.0:
                        wrong.append([name, answer, p.answer])
            if time.time() - begin > 3:
                print(name, round(time.time() - begin), file=sys.stderr)
    print()
    print(json.dumps({"seen": seen, "wrong": wrong, "lost": lost}))


if __name__ == "__main__":
    main()
