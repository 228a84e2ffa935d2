"""Tiny copies of GSM8K, MATH-500, AMC23 and AIME24: twelve easy problems each, in the files and
columns of the real data sets, as `hf download` leaves them in the hub's cache.

    PYTHONPATH=tests python -m harness.tiny_benchmarks runs/hub
    HF_HOME=runs/hub HF_HUB_OFFLINE=1 zip-rc evaluate CONFIG --benchmarks gsm8k,math500,amc23,aime24

The problems are ours. Copies with other problems show that a table is made, and nothing about a
model.
"""

from __future__ import annotations

import argparse
import pathlib

from harness.datasets_on_disk import Rows, hub_cache, hub_directory

PROBLEMS = 12  # of each


def gsm8k(first: int = 1) -> Rows:
    """Columns `question` and `answer`, the worked solution with its answer behind `####`.

    Args:
      first: number of the first problem; the answer of problem n is 2 n + 1.
    """
    return [
        {
            "question": f"Ann has {n + 1} pears and buys {n} more. How many pears has she?",
            "answer": f"Ann has {n + 1} + {n} = <<{n + 1}+{n}={2 * n + 1}>>{2 * n + 1} pears.\n"
            f"#### {2 * n + 1}",
        }
        for n in range(first, first + PROBLEMS)
    ]


def math500() -> Rows:
    """Columns `problem`, `solution`, `answer`, `subject`, `level` (1 to 5) and `unique_id`."""
    fractions = ("\\frac{1}{2}", "\\frac{2}{3}", "\\frac{3}{4}", "\\frac{5}{6}")
    sums = [
        (f"Compute ${a} + {b}$.", str(a + b), "Prealgebra", 1 + a % 2)
        for a, b in ((3, 4), (2, 9), (7, 5), (8, 6))
    ]
    unknowns = [
        (f"If $x + {a} = {b}$, what is $x$?", str(b - a), "Algebra", 3)
        for a, b in ((2, 5), (4, 9), (6, 8), (1, 8))
    ]
    same = [(f"Simplify ${f}$.", f, "Prealgebra", 5) for f in fractions]
    return [
        {
            "problem": problem,
            "solution": f"The answer is $\\boxed{{{answer}}}$.",
            "answer": answer,
            "subject": subject,
            "level": level,
            "unique_id": f"test/{subject.lower()}/{i}.json",
        }
        for i, (problem, answer, subject, level) in enumerate([*sums, *unknowns, *same])
    ]


def amc23() -> Rows:
    """Columns `id`, `question`, `answer` (a floating-point number) and `url`."""
    return [
        {
            "id": i,
            "question": f"A square has sides of length ${i + 1}$. What is its area?",
            "answer": float((i + 1) ** 2),
            "url": "",
        }
        for i in range(PROBLEMS)
    ]


def aime24() -> Rows:
    """Columns `id`, `problem`, `solution`, `answer`, `url` and `year`. The real answers have three
    digits, and so have these: 007."""
    return [
        {
            "id": 60 + i,
            "problem": f"Find the remainder when ${10 + i}$ is divided by $9$.",
            "solution": f"The remainder is $\\boxed{{{(10 + i) % 9}}}$.",
            "answer": f"{(10 + i) % 9:03}",
            "url": "",
            "year": "2024",
        }
        for i in range(PROBLEMS)
    ]


def repositories() -> dict[str, dict[str, dict[str, Rows]]]:
    """Names on the hub -> configuration -> split -> rows."""
    splits = {"train": gsm8k(20), "test": gsm8k()}
    return {
        "openai/gsm8k": {"main": splits, "socratic": splits},
        "HuggingFaceH4/MATH-500": {"default": {"test": math500()}},
        "zwhe99/amc23": {"default": {"test": amc23()}},
        "HuggingFaceH4/aime_2024": {"default": {"train": aime24()}},
    }


def write_hub(home: pathlib.Path) -> None:
    """The four data sets in the cache of the hub, with `HF_HOME=home`."""
    for repository, configs in repositories().items():
        copy = home / "copies" / repository
        hub_directory(copy, configs)
        hub_cache(home, repository, copy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home", type=pathlib.Path, help="what HF_HOME will be")
    write_hub(parser.parse_args().home)
