"""Decoding for callers: `decode` returns results, `decode_stream` yields every decision as it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.inference.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import Prompt, Request
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.settings import nearest

ALIASES = {"max_new_tokens": "max_tokens"}


def resolve(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    """`config` with `options` on top (`max_new_tokens` is an alias of `max_tokens`).

    Raises:
      UsageError: an option that no one reads, one given under both its names, or an impossible value.
    """
    known = [f.name for f in dataclasses.fields(DecodeConfig)]
    renamed = {ALIASES.get(name, name): value for name, value in options.items()}
    if len(renamed) < len(options):
        raise UsageError(f"decoding options {', '.join(options)}", "two of them are the same one", f"leave out {', '.join(ALIASES)}")
    for name in renamed:
        if name not in known:
            fix = nearest(name, known, "the options are")
            raise UsageError(f"decoding option {name!r}", "nothing reads it, and options are never ignored", fix)
    return dataclasses.replace(config or DecodeConfig(), **renamed)


def decode(
    lm: LanguageModel,
    prompts: Iterable[Prompt | Request],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    on_error: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Answers every prompt with the adaptive search (paper, section 4).

    The same seed and prompt give the same tokens whatever else is in the batch (tested on CPU; a `time_budget` follows the clock). That
    holds for a prompt that occurs twice, too: give two `Request`s different seeds to get different samples.

    Args:
      lm: a model with a ZIP head, from `load`.
      prompts: each a text that is already templated, a chat (`[{"role": "user", "content": ...}]`) for the model's own template, or a
        `Request`, which has options of its own.
      config: the search and its limits; default `DecodeConfig()`.
      on_error: what happens to a prompt that cannot be decoded (empty, too long, reserved ids, ...): "raise", before anything is decoded
        if `prompts` is a sequence; or "result", a `Result` with the finish reason "error". Default: raise for a sequence, a result for
        any other iterable. A model that fails on a prompt gives such a result in any case.
      chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`.
      options: fields of `DecodeConfig` to override, e.g. `n=4, beta=0.02, max_new_tokens=512`.

    Returns:
      one `Result` per prompt, in order.

    Raises:
      UsageError: bad prompts (see `on_error`) or options, before any compilation.
    """
    engine = Engine(lm, resolve(config, options), seed, chat_template_kwargs=chat_template_kwargs)
    events = engine.decode(engine.intake.jobs(prompts, on_error), stream=False)
    results = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [results[i] for i in range(len(results))]


def decode_stream(
    lm: LanguageModel,
    prompts: Iterable[Prompt | Request],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    on_error: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[StepEvent | ResultEvent]:
    """As `decode`, but yields a `StepEvent` at every decision of every prompt and a `ResultEvent` at each prompt's end.

    Results equal those of `decode`. An iterator of prompts is read only as rows become free, so it may be endless; while it has no next
    prompt ready, nothing is decoded. A consumer that stops early (`close`, or leaving the loop) frees everything.
    """
    engine = Engine(lm, resolve(config, options), seed, chat_template_kwargs=chat_template_kwargs)
    return engine.decode(engine.intake.jobs(prompts, on_error))
