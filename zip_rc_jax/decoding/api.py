"""Decoding for callers: `decode` returns results, `decode_stream` yields every decision as it is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.decoding.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.decoding.results import Result
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.language_model import LanguageModel

ALIASES = {"max_new_tokens": "max_tokens"}


def resolve(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    """`config` with `options` on top (`max_new_tokens` is an alias of `max_tokens`).

    Raises:
      UsageError: an option that no one reads, or an impossible value.
    """
    known = [f.name for f in dataclasses.fields(DecodeConfig)]
    renamed = {ALIASES.get(name, name): value for name, value in options.items()}
    for name in renamed:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            raise UsageError(f"decoding option {name!r}", "nothing reads it, and options are never ignored", fix)
    return dataclasses.replace(config or DecodeConfig(), **renamed)


def decode(lm: LanguageModel, prompts: Sequence[str], config: DecodeConfig | None = None, *, seed: int = 0, **options: Any) -> list[Result]:
    """Answers every prompt with the adaptive search (paper, section 4).

    The same seed and prompt give the same tokens whatever else is in the batch.

    Args:
      lm: a model with a ZIP head, from `load`.
      prompts: texts, already templated.
      config: the search and its limits; default `DecodeConfig()`.
      options: fields of `DecodeConfig` to override, e.g. `n=4, beta=0.02, max_new_tokens=512`.

    Returns:
      one `Result` per prompt, in order.

    Raises:
      UsageError: bad prompts or options, before any compilation.
    """
    results = {e.prompt_index: e.result for e in decode_stream(lm, prompts, config, seed=seed, **options) if isinstance(e, ResultEvent)}
    return [results[i] for i in range(len(prompts))]


def decode_stream(
    lm: LanguageModel, prompts: Sequence[str], config: DecodeConfig | None = None, *, seed: int = 0, **options: Any
) -> Iterator[StepEvent | ResultEvent]:
    """As `decode`, but yields a `StepEvent` at every decision of every prompt and a `ResultEvent` at each prompt's end.

    Results equal those of `decode`. A consumer that stops early frees everything.
    """
    engine = Engine(lm, resolve(config, options), seed)
    engine.check(prompts)
    return engine.run(prompts)
