"""Full marks that reasoning-gym's scorers give to wrong answers.

Every dataset was tried with nan, infinities, booleans, empty lists, overlong numbers and changed
reference answers. The faults found:
  complex_arithmetic     nan has full marks, since min(1.0, nan) is 1.0.
  coin_flip              an absolute tolerance of 1e-4 accepts 0 for small probabilities.
  game_of_life_halting   any text has the truth value True.
  game_of_life           further rows and cells are not looked at, and true counts as 1.
  gsm_symbolic, fraction_simplification
                         the first number of a longer text counts, without its sign.
  polynomial_equations   without real solutions, any text that holds no number is right.
  kakurasu, survo, quantum_lock, sokoban, tower_of_hanoi
                         words between the moves or figures are not looked at; harmless, and left.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction

from zip_rc_jax.grading import plain

# How far, relative to it, an answer may be from a number; the scorers' own tolerances are absolute
# or wider.
TOLERANCE = {"power_function": Fraction(5, 1000), "coin_flip": Fraction(1, 10_000)}
DEFAULT_TOLERANCE = Fraction(1, 1000)
_NOT_FINITE = re.compile(
    r"(?<![A-Za-z])(?:nan|inf|infinity)[ij]?(?![A-Za-z])|[0-9]e\+?[0-9]{3,}", re.IGNORECASE
)
_NO_SOLUTION = (
    "",
    "none",
    "no real solutions",
    "no real solution",
    "no solution",
    "no solutions",
    "empty string",
)


def overrated(task: str, gold: str, answer: str) -> bool:
    """Whether an answer with full marks cannot be the right one, the reference answer being
    `gold`."""
    if answer.strip() == gold.strip():
        return False
    if any(m.lower() not in gold.lower() for m in _NOT_FINITE.findall(answer)):
        return True
    if task == "game_of_life_halting":
        return answer.strip().lower() != gold.strip().lower()
    if task == "game_of_life":
        return _grid(answer) != _grid(gold)
    if task == "polynomial_equations" and not gold.strip():
        return answer.strip("\"'`. \n").lower() not in _NO_SOLUTION
    expected = plain.read(gold)
    if expected[0] != "num":
        return False
    given = plain.read(answer)
    if given[0] != "num":
        return True
    tolerance = TOLERANCE.get(task, DEFAULT_TOLERANCE)
    return abs(given[1] - expected[1]) > tolerance * abs(expected[1])


def _grid(text: str) -> str:
    """JSON in one form. Here 1, 1.0 and true are three values."""
    try:
        return json.dumps(json.loads(text))
    except (ValueError, RecursionError):
        return text
