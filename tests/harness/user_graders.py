"""Graders as a user writes them: the settings name them."""

from __future__ import annotations

import os
import pathlib
import time


def length(problem, response):
    """Full marks for a response as long as the answer says."""
    return min(len(response) / int(problem["answer"]), 1.0)


def even(problem, response):
    """Right where the response has an even number of words."""
    return float(len(response.split()) % 2 == 0)


def seen(problem, response):
    """What it was given, and where it runs."""
    assert sorted(problem) == ["answer", "entry_json", "question", "task"]
    assert all(isinstance(text, str) for text in problem.values())
    return float(response == f"{problem['task']}|{problem['question']}|{problem['answer']}")


def elsewhere(problem, response):
    """Right where the process is not the one of the tests."""
    return os.getpid() != int(problem["answer"])


def too_much(problem, response):
    return 1.5


def a_word(problem, response):
    return "yes"


def failing(problem, response):
    raise KeyError(problem["question"])


def slow(problem, response):
    if response == "slow":
        time.sleep(60)
    return 1


def killing(problem, response):
    os._exit(3)


def writing(problem, response):
    pathlib.Path(problem["answer"]).write_text("made")
    return 1


def one_argument(problem):
    return 1


def letter(text):
    """An extractor: the choice in brackets."""
    return text.split("(")[1][0] if "(" in text else None


def same_letter(a, b):
    """An equivalence: capitals do not count."""
    return a.lower() == b.lower()


not_callable = 3
