"""Decoding with a policy that has no head: plain samples, and nothing that a head would predict."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError


def sampleable(lm: LanguageModel, config: DecodeConfig, streamed: bool) -> LanguageModel:
    """The model with a head that predicts nothing, for the engine, which samples with one.

    Raises:
      UsageError: what is asked for reads a head: the search, pruning by predictions, an answer by
        value among several samples, or a look at every decision.
    """
    if config.strategy != "fixed":
        raise UsageError(
            f"strategy={shown(config.strategy)} with a model without a ZIP head",
            "the search reads the joint from reserved logits; without a head there are plain "
            "samples alone",
            "add strategy=fixed (n full samples), or train a head with `zip-rc train`",
        )
    if config.n > 1 and config.answer == "value":
        raise UsageError(
            f"answer='value' with n={config.n} and a model without a ZIP head",
            "nothing says which sample is the best",
            "add answer=vote (the answer that most samples give), or n=1",
        )
    if streamed:
        raise UsageError(
            "--stream with a model without a ZIP head",
            "it shows what a head predicts at every decision",
            "leave it out",
        )
    return lm.with_head(Grid((0.0, 1.0), (0, config.max_tokens)), "correct")


def without_predictions(result: Result) -> Result:
    """The result without the numbers of a head that predicts nothing (they are NaN)."""
    unknown: dict[str, Any] = {"expected_reward": math.nan, "expected_remaining": math.nan}
    prefixes = tuple(dataclasses.replace(prefix, **unknown) for prefix in result.prefixes)
    return dataclasses.replace(result, prefixes=prefixes, trace=(), **unknown)
