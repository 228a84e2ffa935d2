"""Decoding for callers: `decode` returns results, `decode_stream` yields every decision as it is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.decoding.engine import Engine, ResultEvent, StepEvent
from zip_rc_jax.decoding.results import Result
from zip_rc_jax.errors import UsageError
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]
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


def decode(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Answers every prompt with the adaptive search (paper, section 4).

    The same seed and prompt give the same tokens whatever else is in the batch.

    Args:
      lm: a model with a ZIP head, from `load`.
      prompts: each a text that is already templated, or a chat (`[{"role": "user", "content": ...}]`) for the model's own template.
      config: the search and its limits; default `DecodeConfig()`.
      chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`.
      options: fields of `DecodeConfig` to override, e.g. `n=4, beta=0.02, max_new_tokens=512`.

    Returns:
      one `Result` per prompt, in order.

    Raises:
      UsageError: bad prompts or options, before any compilation.
    """
    events = decode_stream(lm, prompts, config, seed=seed, chat_template_kwargs=chat_template_kwargs, **options)
    results = {e.prompt_index: e.result for e in events if isinstance(e, ResultEvent)}
    return [results[i] for i in range(len(prompts))]


def decode_stream(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: DecodeConfig | None = None,
    *,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[StepEvent | ResultEvent]:
    """As `decode`, but yields a `StepEvent` at every decision of every prompt and a `ResultEvent` at each prompt's end.

    Results equal those of `decode`. A consumer that stops early frees everything.
    """
    config = resolve(config, options)
    texts = render(lm.tokenizer, prompts, chat_template_kwargs or {})
    engine = Engine(lm, config, seed)
    engine.check(texts)
    hashes = [None if isinstance(prompt, str) else lm.tokenizer.template_hash for prompt in prompts]
    return _with_template_hash(engine.run(texts), hashes)


def render(tokenizer: Tokenizer, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any]) -> Sequence[str]:
    """The texts of the prompts: a string is one already, a chat goes through the tokenizer's template.

    Raises:
      UsageError: one prompt instead of a list of them, something that is neither text nor chat, a chat that the template refuses, or
        `chat_template_kwargs` without any chat.
    """
    if isinstance(prompts, str):
        return prompts  # the engine says what is wrong
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise UsageError("prompts given as one chat", "a list of prompts is expected", "pass [messages]")
    if chat_template_kwargs and all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(
            f"chat_template_kwargs={chat_template_kwargs}",
            "every prompt is a string, which no template renders",
            'pass chats: [{"role": "user", "content": prompt}]',
        )
    return [prompt if isinstance(prompt, str) else tokenizer.chat(prompt, **chat_template_kwargs) for prompt in prompts]


def _with_template_hash(events: Iterator[StepEvent | ResultEvent], hashes: list[str | None]) -> Iterator[StepEvent | ResultEvent]:
    """`events` with `hashes[i]` in the result of prompt `i`."""
    for event in events:
        if isinstance(event, ResultEvent):
            event = dataclasses.replace(event, result=dataclasses.replace(event.result, template_hash=hashes[event.prompt_index]))
        yield event
