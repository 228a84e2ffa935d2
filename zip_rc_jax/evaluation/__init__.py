"""Evaluation: baselines under one cost meter, comparison at equal cost, prediction quality, figures
and tables.

From plain arrays (see `evaluation.arrays` for their shapes):

majority_vote, weighted_vote, best_of_n what a rule that chooses among n samples reaches on each
prompt pass_at_k                                 whether any of k samples is right
curves                                    all of these at 1 to n samples, with their cost
normalized_cost                           compute and latency in mean samples
within_prompt_auc whether values tell right from wrong among samples of one prompt
 paired_comparison                         a difference of two methods and its bootstrap interval
answer_ids                                equal numbers for equal answers

Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zip_rc_jax.evaluation.arrays import (
        PairedComparison,
        answer_ids,
        best_of_n,
        curves,
        majority_vote,
        normalized_cost,
        paired_comparison,
        pass_at_k,
        weighted_vote,
        within_prompt_auc,
    )

__all__ = [
    "PairedComparison",
    "answer_ids",
    "best_of_n",
    "curves",
    "majority_vote",
    "normalized_cost",
    "paired_comparison",
    "pass_at_k",
    "weighted_vote",
    "within_prompt_auc",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("zip_rc_jax.evaluation.arrays"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
