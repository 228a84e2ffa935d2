"""Worked solutions of chain sums: the training text of the embedded demo policy.

A solution writes the running total step by step, and it slips: a written step is wrong with a fixed probability, so that what the
policy gets wrong after training is *noise it can see*, not ignorance. A slip is often noticed ("wait", and the step is redone), and a
pass is sometimes followed by another ("check", and the sum is done again). Both are much likelier after a slip, so next-token
training itself teaches the policy to tell a wrong step from a right one: that is what the ZIP head later reads. With rare
noticing (a quarter of the slips) the signal is too weak: trained so, the policy said "wait" as often after right steps as after
wrong ones.

    4 + 3 = 8 wait 4 + 3 = 7 - 2 = 5 check 4 + 3 = 7 - 2 = 5 Answer: 5
"""

from __future__ import annotations

import dataclasses
import random

from zip_rc_jax.config import PolicyConfig

WAIT, CHECK, ANSWER = "wait", "check", "Answer:"
SLIPS = (-3, -2, -1, 1, 2, 3)
MAX_PASSES = 3


@dataclasses.dataclass(frozen=True)
class Pass:
    """One left-to-right evaluation: its words, its result, and whether an unnoticed slip remains."""

    words: tuple[str, ...]
    result: int
    slipped: bool


def parse_question(question: str) -> tuple[list[int], list[str]]:
    """Terms and operators of a chain_sum question ("... problem: 4 + 3 - 2 =").

    Raises:
      ValueError: the text is not a chain of additions and subtractions of whole numbers.
    """
    words = question.rsplit(":", 1)[-1].split()
    if len(words) < 2 or words[-1] != "=" or any(op not in "+-" for op in words[1:-1:2]):
        raise ValueError(f"not a chain sum: {question!r}")
    return [int(w) for w in words[0:-1:2]], words[1:-1:2]


def write_pass(terms: list[int], operators: list[str], policy: PolicyConfig, rng: random.Random) -> Pass:
    """Evaluates the sum once, slipping and noticing as `policy` says."""
    words, total, slipped = [str(terms[0])], terms[0], False
    for op, term in zip(operators, terms[1:], strict=True):
        truth = total + term if op == "+" else total - term

        def attempt(truth: int = truth) -> int:
            return truth + (rng.choice(SLIPS) if rng.random() < policy.slip else 0)

        written = attempt()
        words += [op, str(term), "=", str(written)]
        if rng.random() < (policy.notice_slip if written != truth else policy.notice_fine):
            written = attempt()
            words += [WAIT, str(total), op, str(term), "=", str(written)]
        slipped |= written != truth
        total = written
    return Pass(tuple(words), total, slipped)


def write_solution(question: str, policy: PolicyConfig, rng: random.Random) -> str:
    """A full response to `question`: one to three passes, then "Answer:" and the result of the last one."""
    terms, operators = parse_question(question)
    passes = [write_pass(terms, operators, policy, rng)]
    while len(passes) < MAX_PASSES and rng.random() < (policy.check_slip if passes[-1].slipped else policy.check_fine):
        passes.append(write_pass(terms, operators, policy, rng))
    return f" {CHECK} ".join(" ".join(p.words) for p in passes) + f" {ANSWER} {passes[-1].result}"


def vocabulary(largest: int) -> list[str]:
    """Words of the demo's word-level tokenizer: those of a chain_sum question and of a solution, and the numbers up to `largest`."""
    question = ["State", "the", "final", "answer", "to", "the", "following", "arithmetic", "problem:"]
    numbers = [str(i) for i in range(-largest, largest + 1)]
    return [*dict.fromkeys(question), "+", "-", "=", WAIT, CHECK, ANSWER, *numbers]
