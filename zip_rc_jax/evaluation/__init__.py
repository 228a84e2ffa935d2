"""Evaluation: baselines under one cost meter, comparison at equal cost, prediction quality, figures
and tables.

From plain arrays (see `evaluation.arrays` for their shapes):

majority_vote, weighted_vote, best_of_n   what a rule that chooses among n samples reaches
pass_at_k                                 whether any of k samples is right
curves                                    all of these at 1 to n samples, with their cost
adaptive_consistency, early_stopping, confidence_posterior, pandora
                                          methods that stop when they have seen enough
deepconf_offline, deepconf_online, self_certainty, self_certainty_borda
                                          methods that read the policy's own probabilities
shortest_response, first_finished, reward_pruning, length_pruning
                                          parallel samples that end early
normalized_cost                           compute and latency in mean samples
within_prompt_auc                         whether values tell right from wrong within a prompt
paired_comparison                         a difference of two methods and its bootstrap interval
answer_ids                                equal numbers for equal answers
sample_pool, Draws                        all samples as one pool; how averages are taken
METHOD_TABLE                              what each method needs

Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zip_rc_jax.evaluation.array_methods import (
        adaptive_consistency,
        confidence_posterior,
        deepconf_offline,
        deepconf_online,
        early_stopping,
        first_finished,
        length_pruning,
        pandora,
        reward_pruning,
        sample_pool,
        self_certainty,
        self_certainty_borda,
        shortest_response,
    )
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
    from zip_rc_jax.evaluation.baselines import BaselinePoint
    from zip_rc_jax.evaluation.draws import Draws
    from zip_rc_jax.evaluation.method_table import METHOD_TABLE

__all__ = [
    "METHOD_TABLE",
    "BaselinePoint",
    "Draws",
    "PairedComparison",
    "adaptive_consistency",
    "answer_ids",
    "best_of_n",
    "confidence_posterior",
    "curves",
    "deepconf_offline",
    "deepconf_online",
    "early_stopping",
    "first_finished",
    "length_pruning",
    "majority_vote",
    "normalized_cost",
    "paired_comparison",
    "pandora",
    "pass_at_k",
    "reward_pruning",
    "sample_pool",
    "self_certainty",
    "self_certainty_borda",
    "shortest_response",
    "weighted_vote",
    "within_prompt_auc",
]

_PLACES = {
    "arrays": (
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
    ),
    "baselines": ("BaselinePoint",),
    "draws": ("Draws",),
    "method_table": ("METHOD_TABLE",),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACE.get(name, "array_methods")
    return getattr(importlib.import_module(f"zip_rc_jax.evaluation.{place}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
