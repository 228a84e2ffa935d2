"""Grading: the answer in a text, whether it is right, and which answers are the same.

grade, equivalent     one call each, with a worker process that all calls share
Grader                the same with a worker of its own; a context manager
extract_answer        the answer that a text states
answer_groups         equal numbers for texts that state the same answer, so that they vote together
"""

from zip_rc_jax.config.plugins import register_answer_equivalence, register_answer_extractor
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.grader import Grader, equivalent, grade
from zip_rc_jax.grading.votes import NO_ANSWER, AnswerEquivalence, AnswerExtractor, answer_groups

__all__ = [
    "NO_ANSWER",
    "AnswerEquivalence",
    "AnswerExtractor",
    "Grader",
    "answer_groups",
    "equivalent",
    "extract_answer",
    "grade",
    "register_answer_equivalence",
    "register_answer_extractor",
]
