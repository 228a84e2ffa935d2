"""A policy, a utility and an extractor as a user writes them: the settings name them."""

from __future__ import annotations

import numpy as np

from zip_rc_jax.search import MetaAction
from zip_rc_jax.search.utility import expected_max


def first_alone(inputs, *, grid, config):
    """Continues the first sample of each prompt until it ends."""
    first = np.zeros_like(inputs.live)
    first[:, 0] = True
    waiting = ~inputs.finished.any(axis=1, keepdims=True)
    return MetaAction.of((inputs.live & first & waiting) | inputs.finished)


def spendthrift(
    terms, multiplicity, unfinished, *, alpha, beta, normalizer, selection_exponent, grid
):
    """Expected reward, whatever it costs."""
    return expected_max(terms.log_reward_cdf, multiplicity.astype(terms.value.dtype), grid)


def last_word(text):
    """The last word is the answer."""
    return text.split()[-1] if text.split() else None
