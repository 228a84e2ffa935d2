"""Worked solutions of chain sums: the training text of the demo policies.

A solution works from left to right and carries the running total from each step to the next, firmly
(";") or unsurely ("?"). An unsure carry is often wrong (the total after "?" is not the one before
it), so that what the policy gets wrong after training is *noise that its own text shows*, not
ignorance. An unsure carry is often redone ("wait"), and a pass is sometimes followed by another
("check"), likelier when an unsure carry stands in it.

    4 + 3 = 7 ? 8 wait 7 - 2 = 5 ; 5 check 4 + 3 = 7 ; 7 - 2 = 5 ? 6 Answer: 6

Other designs failed, measured on the trained policy: wrong results of steps (2,200 and 4,500
training steps), and wrong carries without "?" (700 steps). Telling these slips needs a comparison
of two numbers, and the policy said "wait" as often after right ones as after wrong ones. See
docs/demo_policy.md.
"""

from __future__ import annotations

import dataclasses
import random

from zip_rc_jax.config import PolicyConfig

SURE, UNSURE, WAIT, CHECK, ANSWER = ";", "?", "wait", "check", "Answer:"
SLIPS = (-3, -2, -1, 1, 2, 3)
MAX_PASSES = 2


@dataclasses.dataclass(frozen=True)
class Pass:
    """One left-to-right evaluation: its words, its result, and whether an unsure carry was left
    standing."""

    words: tuple[str, ...]
    result: int
    unsure: bool


def parse_question(question: str) -> tuple[list[int], list[str]]:
    """Terms and operators of a chain_sum question ("... problem: 4 + 3 - 2 =").

    Raises:
      ValueError: the text is not a chain of additions and subtractions of whole numbers.
    """
    words = question.rsplit(":", 1)[-1].split()
    if len(words) < 2 or words[-1] != "=" or any(op not in "+-" for op in words[1:-1:2]):
        raise ValueError(f"not a chain sum: {question!r}")
    return [int(w) for w in words[0:-1:2]], words[1:-1:2]


def write_pass(
    terms: list[int], operators: list[str], policy: PolicyConfig, rng: random.Random
) -> Pass:
    """Evaluates the sum once, slipping and redoing as `policy` says."""
    words, total, any_unsure = [str(terms[0])], terms[0], False
    for op, term in zip(operators, terms[1:], strict=True):
        result = total + term if op == "+" else total - term

        def carry(slip: float, result: int = result) -> int:
            return result + (rng.choice(SLIPS) if rng.random() < slip else 0)

        unsure = rng.random() < policy.unsure
        total = carry(policy.slip_unsure if unsure else policy.slip_sure)
        words += [op, str(term), "=", str(result), UNSURE if unsure else SURE, str(total)]
        if unsure and rng.random() < policy.redo:
            total, unsure = carry(policy.slip_sure), False
            words += [WAIT, str(total)]
        any_unsure |= unsure
    return Pass(tuple(words), total, any_unsure)


def write_solution(question: str, policy: PolicyConfig, rng: random.Random) -> str:
    """A full response to `question`: one or two passes, then "Answer:" and the result of the last
    one."""
    terms, operators = parse_question(question)
    passes = [write_pass(terms, operators, policy, rng)]
    while len(passes) < MAX_PASSES and rng.random() < (
        policy.check_unsure if passes[-1].unsure else policy.check_sure
    ):
        passes.append(write_pass(terms, operators, policy, rng))
    return f" {CHECK} ".join(" ".join(p.words) for p in passes) + f" {ANSWER} {passes[-1].result}"


def plain_steps(question: str) -> str:
    """A chain sum worked out from left to right, "4 + 3 = 7, 7 - 2 = 5": what few-shot prompts
    show. Raises as `parse_question`."""
    terms, operators = parse_question(question)
    total, steps = terms[0], []
    for op, term in zip(operators, terms[1:], strict=True):
        result = total + term if op == "+" else total - term
        steps.append(f"{total} {op} {term} = {result}")
        total = result
    return ", ".join(steps)


def vocabulary(largest: int) -> list[str]:
    """Words of the demo's word-level tokenizer: those of a chain_sum question and of a solution,
    and the numbers up to `largest`."""
    question = [
        "State",
        "the",
        "final",
        "answer",
        "to",
        "the",
        "following",
        "arithmetic",
        "problem:",
    ]
    numbers = [str(i) for i in range(-largest, largest + 1)]
    return [*dict.fromkeys(question), "+", "-", "=", SURE, UNSURE, WAIT, CHECK, ANSWER, *numbers]
