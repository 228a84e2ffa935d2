"""What the command line shows: the demo from policy to report, and decoding live."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from zip_rc_jax import pipeline
from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.data.tasks import problems, problems_from_jsonl
from zip_rc_jax.decoding.api import decode_stream, resolve
from zip_rc_jax.decoding.engine import ResultEvent, StepEvent
from zip_rc_jax.decoding.requests import Prompt
from zip_rc_jax.decoding.results import Result
from zip_rc_jax.errors import UsageError
from zip_rc_jax.evaluation.evaluate import evaluate
from zip_rc_jax.evaluation.tables import full_table, headline_table, metric_table, print_table
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.host_memory import give_back_freed_memory
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.loading import export, load
from zip_rc_jax.progress import progress
from zip_rc_jax.run_files import Journal, check_writable, run_metadata, write_json, write_jsonl
from zip_rc_jax.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes

# Tables are wide; a pipe or a log file has no width of its own.
console = Console() if Console().is_terminal else Console(width=170)


def run_demo(config: PipelineConfig, argv: Sequence[str]) -> None:
    """All stages from the policy to the report, each timed; then one problem is solved live."""
    stages = [
        *([] if config.policy.path else [("train the policy", lambda: pipeline.train_head(config, "policy"))]),
        ("sample rollouts", lambda: pipeline.make_rollouts(config)),
        ("grade", lambda: pipeline.make_grades(config)),
        ("train critic", lambda: pipeline.train_head(config, "critic")),
        ("label values", lambda: pipeline.make_labels(config)),
        ("train ZIP-RC-Lite", lambda: pipeline.train_head(config, "lite")),
        ("train final model", lambda: pipeline.train_head(config, "final")),
        ("decode and compare", lambda: run_evaluation(config, argv)),
    ]
    for number, (title, stage) in enumerate(stages, 1):
        started = time.monotonic()
        console.rule(f"[{number}/{len(stages)}] {title}", align="left")
        stage()
        give_back_freed_memory()
        console.print(f"{title}: {time.monotonic() - started:.0f} s", style="dim")
    console.rule("one held-out problem, live", align="left")
    hard = problems(config.task, "heldout", 4 * max(1, len(config.task.levels)) + config.evaluate.prompts)[-1]
    final = load(pipeline.run_directory(config) / "final", dtype=config.dtype)
    decode_prompts(final, prompt_texts([hard], config, final.tokenizer), config.decode, config.evaluate.seed, live=True)
    console.print(f"answer: {hard.answer}", markup=False)
    console.print(f"report: {pipeline.run_directory(config) / 'report' / 'report.html'}")


def run_evaluation(config: PipelineConfig, argv: Sequence[str]) -> None:
    """Evaluates `run_dir/final` on all accelerators, and prints the tables (the long one by level is in the report)."""
    directory = pipeline.run_directory(config)
    pipeline.check_output(config, "report", ".partial")
    layout = pipeline.sampling_layout(config.decode.rows, max(config.evaluate.samples, config.decode.n))
    lite = load(directory / "lite", layout=layout, dtype=config.dtype) if (directory / "lite" / "model").is_dir() else None
    found = evaluate(config, load(directory / "final", layout=layout, dtype=config.dtype), argv=argv, lite=lite)
    for table in (
        full_table(found.runs, found.curves, found.pool, found.alphas),
        metric_table("Policy and prediction quality", found.quality),
        metric_table("Policy drift", found.drift),
        headline_table(found.headline),
    ):
        print_table(table, console)


def run_decode(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """`zip-rc decode`: prompts in, answers out.

    Raises:
      UsageError: no prompts, both kinds of prompts, a bad option, mesh or file; before the model is loaded where possible.
    """
    started = time.time()
    options = OmegaConf.to_container(OmegaConf.from_dotlist(arguments.overrides))
    assert isinstance(options, dict)
    config = resolve(None, {str(k): v for k, v in options.items()})
    if bool(arguments.prompt) == bool(arguments.input):
        raise UsageError("prompts", "give either --prompt (once or more) or --input FILE", "add one of them")
    if arguments.output:
        check_writable(arguments.output, "--output")
    found = problems_from_jsonl(arguments.input, answers=False) if arguments.input else []
    layout = Layout(make_mesh(**mesh_sizes(arguments.mesh, ("data", "tensor"))), DECODE_RULES)
    lm = load(arguments.model, dtype=arguments.dtype, layout=layout, zip_label=arguments.zip_label, zip_first_id=arguments.zip_first_id)
    prompts: list[Prompt] = [p.question for p in found] or arguments.prompt
    if arguments.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    template = OmegaConf.to_container(OmegaConf.from_dotlist(arguments.template_arg))
    assert isinstance(template, dict)
    chat = {str(k): v for k, v in template.items()}
    journal = None
    if arguments.output:
        asked = hashlib.sha256(json.dumps([prompts, chat]).encode()).hexdigest()
        fingerprint = {"model": lm.digest(), "decode": to_dict(config), "seed": arguments.seed, "prompts": asked}
        journal = Journal(arguments.output / "results.partial.jsonl", fingerprint=fingerprint)
    results = decode_prompts(lm, prompts, config, arguments.seed, chat, journal=journal, live=arguments.stream)
    rows = [r.to_dict() for r in results]
    if answered := [i for i, p in enumerate(found) if p.answer]:
        with Grader() as grader:
            scores = grader.grade_many((found[i], results[i].text) for i in answered)
        for i, score in zip(answered, scores, strict=True):
            rows[i] |= {"answer": found[i].answer, "correct": correct(score)}
        console.print(f"accuracy {sum(correct(s) for s in scores) / len(scores):.3f} over {len(scores)} problems")
    if journal:
        write_jsonl(arguments.output / "results.jsonl", rows)
        write_json(arguments.output / "metadata.json", run_metadata({"decode": to_dict(config)}, argv, started))
        journal.finish()
        console.print(f"wrote {arguments.output / 'results.jsonl'}")
    else:
        print_answers(results)


def print_answers(results: Sequence[Result]) -> None:
    """Each answer as the model wrote it, and what it cost."""
    for result in results:
        text = f"{_shown(result)}\n  P(correct) {result.expected_reward:.2f}, {result.usage.tokens} tokens"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def decode_prompts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    seed: int,
    chat: dict[str, Any] | None = None,
    *,
    journal: Journal | None = None,
    live: bool = False,
) -> list[Result]:
    """Results of all prompts, in order: those that the journal holds, and the others, which it gets as they come.

    Args:
      chat: variables of the chat template.
      live: print every decision (per prefix P(correct), tokens left, the action, and what it has written since), not a progress bar.
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
    with contextlib.nullcontext() if live else progress("decode", len(prompts), len(results)) as bar:
        # What a prompt gives does not depend on the others, so nothing shows that some were decoded before.
        for event in decode_stream(lm, [prompts[i] for i in rest], config, seed=seed, chat_template_kwargs=chat):
            event = dataclasses.replace(event, prompt_index=rest[event.prompt_index])
            if live:
                _print_event(event)
            if isinstance(event, ResultEvent):
                results[event.prompt_index] = event.result
                tokens += event.result.usage.tokens
                if journal:
                    journal.add({"index": event.prompt_index, "result": event.result.to_dict()})
                if bar:
                    bar(len(results), f"{tokens:,} tokens")
    return [results[i] for i in range(len(prompts))]


def run_export(arguments: argparse.Namespace) -> None:
    """`zip-rc export`: any model that `load` takes, as a Hugging Face directory."""
    if arguments.output.exists():
        raise UsageError(f"directory {arguments.output}", "it exists and is not overwritten", "choose another path")
    check_writable(arguments.output, "directory")
    lm = load(arguments.model, zip_label=arguments.zip_label, zip_first_id=arguments.zip_first_id)
    note = export(lm, arguments.output, dtype=jnp.dtype(arguments.dtype))
    console.print(f"wrote {arguments.output}. {note}", highlight=False)


def _print_event(event: StepEvent | ResultEvent) -> None:
    if isinstance(event, StepEvent):
        return _print_step(event)
    r = event.result
    answer = extract_answer(r.text) or _shown(r).strip()
    console.print(
        f"prompt {event.prompt_index}: prefix {r.prefix_id} answers [bold]{escape(answer)}[/bold] "
        f"with P(correct) {r.expected_reward:.2f}; {r.usage.tokens} tokens in {r.usage.serial_steps} serial steps"
    )


def _shown(result: Result) -> str:
    return result.text or f"({result.error or 'abstains'})"


def _print_step(event: StepEvent) -> None:
    d = event.decision
    plan = "" if d.future_bin < 0 else f", plans to pause at length bin {d.future_bin}"
    table = RichTable(title=f"prompt {event.prompt_index}, step {d.step}, utility {d.utility:.3f}{plan}", title_justify="left", box=None)
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
        table.add_row(name, f"{d.expected_reward[i]:.2f}", left, action, Text(event.new_text.get(prefix, "")))
    console.print(table)


def _action(prefix: int, copies: int, finished: bool) -> str:
    if finished:
        return "finished"
    if prefix < 0:
        return f"start {copies}" if copies else "-"
    return {0: "pause", 1: "continue"}.get(copies, f"branch x{copies}")
