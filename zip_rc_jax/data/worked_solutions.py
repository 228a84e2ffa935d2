"""Worked solutions of chain sums: the training text of the embedded demo policy.

A solution works from left to right and carries the running total from each step to the next. Carrying slips with a fixed
probability: the total written after ";" is not the one before it, so that what the policy gets wrong after training is *noise it can
see*, not ignorance. A slip is often noticed ("wait", and the total is carried again), and a pass is sometimes followed by another
("check", and the sum is done again). Both are much likelier after a slip, so next-token training itself teaches the policy to tell a
wrong carry from a right one: that is what the ZIP head later reads.

    4 + 3 = 7 ; 8 wait 7 - 2 = 5 ; 6 check 4 + 3 = 7 ; 7 - 2 = 5 ; 5 Answer: 5
"""

from __future__ import annotations

import dataclasses
import random

from zip_rc_jax.config import PolicyConfig

CARRY, WAIT, CHECK, ANSWER = ";", "wait", "check", "Answer:"
SLIPS = (-3, -2, -1, 1, 2, 3)
MAX_PASSES = 2


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
        result = total + term if op == "+" else total - term

        def carry(result: int = result) -> int:
            return result + (rng.choice(SLIPS) if rng.random() < policy.slip else 0)

        total = carry()
        words += [op, str(term), "=", str(result), CARRY, str(total)]
        if rng.random() < (policy.notice_slip if total != result else policy.notice_fine):
            total = carry()
            words += [WAIT, str(total)]
        slipped |= total != result
    return Pass(tuple(words), total, slipped)


def write_solution(question: str, policy: PolicyConfig, rng: random.Random) -> str:
    """A full response to `question`: one or two passes, then "Answer:" and the result of the last one."""
    terms, operators = parse_question(question)
    passes = [write_pass(terms, operators, policy, rng)]
    while len(passes) < MAX_PASSES and rng.random() < (policy.check_slip if passes[-1].slipped else policy.check_fine):
        passes.append(write_pass(terms, operators, policy, rng))
    return f" {CHECK} ".join(" ".join(p.words) for p in passes) + f" {ANSWER} {passes[-1].result}"


def vocabulary(largest: int) -> list[str]:
    """Words of the demo's word-level tokenizer: those of a chain_sum question and of a solution, and the numbers up to `largest`."""
    question = ["State", "the", "final", "answer", "to", "the", "following", "arithmetic", "problem:"]
    numbers = [str(i) for i in range(-largest, largest + 1)]
    return [*dict.fromkeys(question), "+", "-", "=", CARRY, WAIT, CHECK, ANSWER, *numbers]
