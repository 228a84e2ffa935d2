"""All results of an engine, in the order of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import Request
from zip_rc_jax.runtime.progress import progress


def run_all(engine: Engine, prompts: Sequence[str | Request], title: str = "") -> list[Result]:
    """Results of all prompts in order, with a progress bar if `title` is given."""
    results: dict[int, Result] = {}
    with progress(title or "decode", len(prompts)) as bar:
        tokens = 0
        for event in engine.run(prompts, stream=False):
            if isinstance(event, ResultEvent):
                results[event.prompt_index] = event.result
                tokens += event.result.usage.tokens
                if title:
                    bar(len(results), f"{tokens:,} tokens")
    return [results[i] for i in range(len(prompts))]
