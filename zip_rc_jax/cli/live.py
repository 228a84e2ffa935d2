"""Decoding as a command shows it: a progress bar, every decision as it is made, or the answers at
the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from zip_rc_jax.cli.console import console
from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.inference.api import decode_stream
from zip_rc_jax.inference.engine import ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import TextOrChat
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.storage import Journal


def decode_prompts(
    lm: LanguageModel,
    prompts: Sequence[TextOrChat],
    config: DecodeConfig,
    seed: int,
    chat: dict[str, Any] | None = None,
    *,
    journal: Journal | None = None,
    live: bool = False,
    joints: bool = False,
) -> list[Result]:
    """Results of all prompts, in order: those that the journal holds, and the others, which it gets
    as they come.

    Args:
      chat: variables of the chat template.
      live: print every decision (per prefix P(correct), tokens left, the action, and what it has
        written since), not a progress bar.
      joints: decisions carry what they were made on, also in the journal.
    """
    results = {x["index"]: Result.from_dict(x["result"]) for x in journal.values} if journal else {}
    if results:
        console.print(f"{len(results)} of {len(prompts)} prompts were decoded by an earlier call")
    rest = [i for i in range(len(prompts)) if i not in results]
    for i in rest if live else []:
        prompt = prompts[i]
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        console.print(f"prompt {i}: {shown}", highlight=False, markup=False)
    tokens = sum(r.usage.tokens for r in results.values())
    if not rest:  # the call before was interrupted after its last prompt
        return [results[i] for i in range(len(prompts))]
    with (
        contextlib.nullcontext() if live else progress("decode", len(prompts), len(results)) as bar
    ):
        # What a prompt gives does not depend on the others, so nothing shows that some were decoded
        # before.
        for event in decode_stream(
            lm,
            [prompts[i] for i in rest],
            config,
            seed=seed,
            chat_template_kwargs=chat,
            return_joints=joints,
        ):
            event = dataclasses.replace(event, prompt_index=rest[event.prompt_index])
            if live:
                _print_event(event)
            if isinstance(event, ResultEvent):
                results[event.prompt_index] = event.result
                tokens += event.result.usage.tokens
                if journal:
                    kept = event.result.to_dict(joints=joints)
                    journal.add({"index": event.prompt_index, "result": kept})
                if bar:
                    bar(len(results), f"{tokens:,} tokens")
    return [results[i] for i in range(len(prompts))]


def print_answers(results: Sequence[Result]) -> None:
    """Each answer as the model wrote it, and what it cost."""
    for result in results:
        known = not math.isnan(result.expected_reward)  # it is NaN without a head
        value = f"P(correct) {result.expected_reward:.2f}, " if known else ""
        text = f"{_shown(result)}\n  {value}{result.usage.tokens} tokens"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _print_event(event: StepEvent | ResultEvent) -> None:
    if isinstance(event, StepEvent):
        return _print_step(event)
    r = event.result
    answer = extract_answer(r.text) or _shown(r).strip()
    console.print(
        f"prompt {event.prompt_index}: prefix {r.prefix_id} answers [bold]{escape(answer)}[/bold] "
        f"with P(correct) {r.expected_reward:.2f}; {r.usage.tokens} tokens in "
        f"{r.usage.serial_steps} serial steps"
    )


def _print_step(event: StepEvent) -> None:
    d = event.decision
    plan = (
        "" if d.planned_pause_bin < 0 else f", plans to pause at length bin {d.planned_pause_bin}"
    )
    table = RichTable(
        title=f"prompt {event.prompt_index}, step {d.step}, utility {d.utility:.3f}{plan}",
        title_justify="left",
        box=None,
    )
    for column, justify in (
        ("prefix", "right"),
        ("P(correct)", "right"),
        ("tokens left", "right"),
        ("action", "left"),
        ("new text", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for i, prefix in enumerate(d.prefix_ids):
        action = _action(prefix, d.multiplicity[i], d.finished[i])
        name = "root" if prefix < 0 else str(prefix)
        left = f"{d.expected_remaining[i]:.0f}"
        table.add_row(
            name, f"{d.expected_reward[i]:.2f}", left, action, Text(event.new_text.get(prefix, ""))
        )
    console.print(table)


def _action(prefix: int, copies: int, finished: bool) -> str:
    if finished:
        return "finished"
    if prefix < 0:
        return f"start {copies}" if copies else "-"
    return {0: "pause", 1: "continue"}.get(copies, f"branch x{copies}")


def _shown(result: Result) -> str:
    return result.text or f"({result.error or 'abstains'})"
