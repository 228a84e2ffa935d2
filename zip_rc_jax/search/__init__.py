"""The search of ZIP-RC: pure JAX, no model, no files. Usable alone, on joints from anywhere.

choose_meta_action   arrays in, the best `MetaAction` of each prompt out
SearchInputs         what a policy sees; `search_inputs` makes one from arrays, checked
Policy, Utility      the signatures of what can be replaced
register_policy, register_utility      give names to your own
"""

from zip_rc_jax.config.plugins import register_policy, register_utility
from zip_rc_jax.search.inputs import MetaAction, SearchInputs, search_inputs
from zip_rc_jax.search.meta_actions import choose_meta_action, search
from zip_rc_jax.search.policies import Policy, decide
from zip_rc_jax.search.utility import PrefixTerms, Utility, candidate_utility

__all__ = [
    "MetaAction",
    "Policy",
    "PrefixTerms",
    "SearchInputs",
    "Utility",
    "candidate_utility",
    "choose_meta_action",
    "decide",
    "register_policy",
    "register_utility",
    "search",
    "search_inputs",
]
