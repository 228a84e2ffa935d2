"""Problems with reference answers, from every source that the config names.

`problem_set` is the one entry: it reads the sources of a split, mixes them, and leaves out what is
held out.
"""

from zip_rc_jax.data.problems.examples import worked_examples
from zip_rc_jax.data.problems.files import (
    problems_from_file,
    problems_from_jsonl,
    prompts_from_file,
)
from zip_rc_jax.data.problems.problem import (
    MATH,
    Problem,
    ProblemSet,
    level_title,
    natural_order,
)
from zip_rc_jax.data.problems.sets import problem_set, with_seeds

__all__ = [
    "MATH",
    "Problem",
    "ProblemSet",
    "level_title",
    "natural_order",
    "problem_set",
    "problems_from_file",
    "problems_from_jsonl",
    "prompts_from_file",
    "with_seeds",
    "worked_examples",
]
