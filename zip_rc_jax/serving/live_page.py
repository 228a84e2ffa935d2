"""The page at `/`: the explorer, which asks the server that it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from zip_rc_jax.explorer.page import page_data, page_text
from zip_rc_jax.search.policies import starts_from_root
from zip_rc_jax.serving.translation import Translator

STRATEGIES = {"zip": "zip_rc", "fixed": "fixed", "half_finished": "half_finished"}
DEFAULT = "default"  # the engine's, which no name asks for


def live_page(translator: Translator, has_key: bool, calibration: Mapping[str, Any] | None) -> str:
    """The page.

    Args:
      has_key: whether requests must bring an API key, which the page then asks for and never keeps.
      calibration: what was promised of the model.
    """
    config, model = translator.engine.config, translator.name

    def mixes(strategy: str) -> bool:
        mine = dataclasses.replace(config, strategy=strategy)
        return starts_from_root(mine) == starts_from_root(config)

    names = [name for name, strategy in STRATEGIES.items() if mixes(strategy)]
    own = next((name for name in names if STRATEGIES[name] == config.strategy), DEFAULT)
    live = {
        "model": model,
        "chat": translator.engine.lm.tokenizer.chat_template is not None,
        "key": has_key,
        "calibration": "" if calibration is None else str(calibration["says"]),
        "options": {
            "n": config.n,
            "alpha": config.alpha,
            "beta": config.beta,
            "max_tokens": config.max_tokens,
            "strategies": list(dict.fromkeys([own, *names])),
        },
    }
    return page_text(page_data(f"ZIP-RC: {model}", live=live), live=True)
