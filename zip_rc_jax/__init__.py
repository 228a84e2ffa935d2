"""ZIP-RC in JAX: zero-overhead introspection for adaptive test-time compute (arXiv 2512.01457).

import zip_rc_jax
lm = zip_rc_jax.load("runs/demo/final")
question = "State the final answer to the following arithmetic problem: 4 + 3 - 2 ="
results = zip_rc_jax.decode(lm, [question], n=8, beta=0.05, interval=8, window=4, max_tokens=128)

The import is light: each name below, and each submodule, is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zip_rc_jax.config import DecodeConfig, TrainConfig
    from zip_rc_jax.data.rollouts import Rollout
    from zip_rc_jax.grid import Grid
    from zip_rc_jax.inference.api import Decoder, decode, decode_stream
    from zip_rc_jax.inference.engine import ResultEvent, StepEvent
    from zip_rc_jax.inference.outputs import Decision, Prefix, Result, Usage
    from zip_rc_jax.inference.requests import Request
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.models.io.reward_models import load_reward_model
    from zip_rc_jax.models.language_model import LanguageModel
    from zip_rc_jax.predictions import TokenPredictions, predict
    from zip_rc_jax.runtime.errors import UsageError
    from zip_rc_jax.search.meta_actions import MetaAction, choose_meta_action
    from zip_rc_jax.training.api import train_head

__version__ = "0.2.0"

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
    "Rollout",
    "StepEvent",
    "TokenPredictions",
    "TrainConfig",
    "Usage",
    "UsageError",
    "choose_meta_action",
    "decode",
    "decode_stream",
    "load",
    "load_reward_model",
    "predict",
    "train_head",
]

# Public name -> the module that defines it. A test compares this with the imports above.
_DEFINED_IN = {
    "Decision": "inference.outputs",
    "DecodeConfig": "config",
    "Decoder": "inference.api",
    "Grid": "grid",
    "LanguageModel": "models.language_model",
    "MetaAction": "search.meta_actions",
    "Prefix": "inference.outputs",
    "Request": "inference.requests",
    "Rollout": "data.rollouts",
    "TokenPredictions": "predictions",
    "TrainConfig": "config",
    "predict": "predictions",
    "train_head": "training.api",
    "Result": "inference.outputs",
    "ResultEvent": "inference.engine",
    "StepEvent": "inference.engine",
    "Usage": "inference.outputs",
    "UsageError": "runtime.errors",
    "choose_meta_action": "search.meta_actions",
    "decode": "inference.api",
    "decode_stream": "inference.api",
    "load": "models.io.load",
    "load_reward_model": "models.io.reward_models",
}
# Imported when they are first named, as in `zip_rc_jax.search.meta_actions`.
_SUBMODULES = (
    "config", "data", "evaluation", "grading", "grid", "head", "inference", "models", "pipeline",
    "runtime", "search", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name or submodule at its first use (PEP 562)."""
    if name in _DEFINED_IN:
        value = getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
