"""ZIP-RC in JAX: zero-overhead introspection for adaptive test-time compute (arXiv 2512.01457).

import zip_rc_jax
lm = zip_rc_jax.load("runs/demo/final")
question = "State the final answer to the following arithmetic problem: 4 + 3 - 2 ="
results = zip_rc_jax.decode(lm, [question], n=8, beta=0.05, interval=8, window=4, max_tokens=128)
"""

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grid import Grid
from zip_rc_jax.inference.api import Decoder, decode, decode_stream
from zip_rc_jax.inference.engine import ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Decision, Prefix, Result, Usage
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.search.meta_actions import MetaAction, choose_meta_action

__version__ = "0.2.0.dev0"

__all__ = [
    "Decision",
    "DecodeConfig",
    "Decoder",
    "Grid",
    "LanguageModel",
    "MetaAction",
    "Prefix",
    "Request",
    "Result",
    "ResultEvent",
    "StepEvent",
    "Usage",
    "UsageError",
    "choose_meta_action",
    "decode",
    "decode_stream",
    "load",
]
