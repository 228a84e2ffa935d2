"""What the command line shows: the demo from policy to report, and decoding live."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from zip_rc_jax.config import DecodeConfig, PipelineConfig, to_dict
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.overrides import from_dotlist
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.data.tasks import Problem, problems, problems_from_jsonl
from zip_rc_jax.evaluation.tables import full_table, headline_table, metric_table, print_table
from zip_rc_jax.grading.answers import extract_answer
from zip_rc_jax.grading.grader import Grader, correct
from zip_rc_jax.inference.api import decode_stream, resolve
from zip_rc_jax.inference.engine import ResultEvent, StepEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import TextOrChat, check_text, key_data
from zip_rc_jax.models.io.chat import check_variable, reads_clock, template_time
from zip_rc_jax.models.io.load import export, load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline import stages as pipeline
from zip_rc_jax.pipeline.evaluate import evaluate
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.locks import only_process
from zip_rc_jax.runtime.malloc import give_back_freed_memory
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes
from zip_rc_jax.runtime.storage import Journal, check_writable, run_metadata, same_fingerprint, write_json, write_jsonl

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
    layout = pipeline.sampling_layout(config.decode.max_num_seqs, max(config.evaluate.samples, config.decode.n))
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

    With an output directory, finished results there are never replaced: of the same settings there is nothing to do, and others are
    refused. It is one process at a time that works in it.

    Raises:
      UsageError: an output directory that another process works in, or that holds results of other settings;
        no prompts, both kinds of prompts, a bad option, mesh or file; before the model is loaded where possible.
    """
    started = time.time()
    options = from_dotlist(arguments.overrides, "option", "n=8")
    resolve(None, options)  # what is wrong with them shows before the model is loaded
    chat = from_dotlist(arguments.template_arg, "--template-arg", "enable_thinking=false")
    if bool(arguments.prompt) == bool(arguments.input):
        raise UsageError("prompts", "give either --prompt (once or more) or --input FILE", "add one of them")
    if arguments.output:
        check_writable(arguments.output, "--output")
    if chat and not arguments.chat:
        raise UsageError(
            f"--template-arg {shown(list(chat))}", "without --chat no template is used, which reads it", "add --chat, or leave it out"
        )
    for name in chat:
        check_variable(name)
    key_data(arguments.seed)
    found = problems_from_jsonl(arguments.input, answers=False) if arguments.input else []
    prompts: list[TextOrChat] = [p.question for p in found] or arguments.prompt
    with _lines_named(arguments.input, found):
        for number, text in enumerate(prompts):
            assert isinstance(text, str)
            check_text(number, text)
    if arguments.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    layout = Layout(make_mesh(**mesh_sizes(arguments.mesh, ("data", "tensor"))), DECODE_RULES)
    alone = only_process(arguments.output, "--output") if arguments.output else contextlib.nullcontext()
    with _lines_named(arguments.input, found), alone:
        lm = load(arguments.model, dtype=arguments.dtype, layout=layout, zip_label=arguments.zip_label, zip_first_id=arguments.zip_first_id)
        config = resolve(None, options, lm.head, lm.generation_config)
        if not arguments.output:
            results = decode_prompts(lm, prompts, config, arguments.seed, chat, live=arguments.stream)
            _graded(found, results)
            return print_answers(results)
        asked = {"decode": to_dict(config), "seed": arguments.seed, "dtype": arguments.dtype, "answers": _hash([p.answer for p in found])}
        output = DecodeOutput(arguments.output, lm, prompts, chat, asked)
        if output.finished:
            console.print(f"{output.results} holds the results of these settings already", markup=False)
            return
        with template_time(output.time):
            journal = Journal(output.partial, fingerprint=output.fingerprint)
            results = decode_prompts(lm, prompts, config, arguments.seed, chat, journal=journal, live=arguments.stream)
        rows = _graded(found, results)
        write_jsonl(output.results, rows)
        metadata = run_metadata({"decode": to_dict(config)}, argv, started)
        write_json(output.metadata, metadata | {"fingerprint": output.fingerprint})
        journal.finish()
        console.print(f"wrote {output.results}", markup=False)


@contextlib.contextmanager
def _lines_named(path: pathlib.Path | None, found: Sequence[Problem]) -> Iterator[None]:
    """An error about "prompt 3" inside names the line of the file `path` that the prompt `found[3]` comes from."""
    try:
        yield
    except UsageError as error:
        number = re.match(r"prompt ([0-9]+)\b", error.value)
        if number is None or int(number[1]) >= len(found):
            raise
        raise UsageError(f"{path}, line {found[int(number[1])].line}, {error.value}", error.reason, error.fix) from error


def _graded(found: Sequence[Problem], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as rows, with `answer` and `correct` where the input file has an answer; the accuracy is printed."""
    rows = [r.to_dict() for r in results]
    if answered := [i for i, p in enumerate(found) if p.answer]:
        with Grader() as grader:
            scores = grader.grade_many((found[i], results[i].text) for i in answered)
        for i, score in zip(answered, scores, strict=True):
            rows[i] |= {"answer": found[i].answer, "correct": correct(score)}
        console.print(f"accuracy {sum(correct(s) for s in scores) / len(scores):.3f} over {len(scores)} problems")
    return rows


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class DecodeOutput:
    """The files of `zip-rc decode --output`, and what they are of.

    Attributes:
      results, metadata, partial: paths.
      fingerprint: all that decides the results: model, settings, and the prompts as the template rendered them.
      time: what a template that writes the date sees: when the directory was begun. None if the template writes none.
      finished: whether the results are there, of the same fingerprint.
    """

    def __init__(
        self, directory: pathlib.Path, lm: LanguageModel, prompts: Sequence[TextOrChat], chat: dict[str, Any], asked: dict[str, Any]
    ):
        """Args: `asked` are the further parts of the fingerprint.

        Raises:
          UsageError: results of another fingerprint, or of one that is not known, are there; or a template refuses a prompt.
        """
        self.results, self.metadata = directory / "results.jsonl", directory / "metadata.json"
        self.partial = directory / "results.partial.jsonl"
        begun = self._begun()
        dated = any(not isinstance(prompt, str) for prompt in prompts) and reads_clock(lm.tokenizer.chat_template)
        self.time = _time(begun, directory) if dated else None
        with template_time(self.time):
            texts = [prompt if isinstance(prompt, str) else lm.tokenizer.chat(prompt, **chat) for prompt in prompts]
        self.fingerprint = {"model": lm.digest(), **asked, "prompts": _hash(texts)}
        if self.time:
            self.fingerprint["template_time"] = self.time.isoformat()
        # What was interrupted while its last files were written has both, and the journal decides.
        self.finished = self.results.exists() and not self.partial.exists()
        if self.finished:
            if begun is None:
                raise UsageError(
                    f"results in {self.results}",
                    f"{self.metadata.name} does not say with what settings they were made",
                    "choose another directory, or delete them to start again",
                )
            same_fingerprint(f"results in {self.results}", begun, self.fingerprint)

    def _begun(self) -> dict[str, Any] | None:
        """The fingerprint that the files there were made or begun with; None where none is known."""
        try:
            if self.partial.exists():
                with self.partial.open("rb") as lines:
                    found = json.loads(lines.readline())
            else:
                found = json.loads(self.metadata.read_bytes())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, dict) else None


def _time(begun: dict[str, Any] | None, directory: pathlib.Path) -> datetime.datetime:
    """The time that templates see: the recorded one, so that a run that is resumed on another day goes on with the same prompts; or now."""
    recorded = (begun or {}).get("template_time")
    if recorded is None:
        return datetime.datetime.now().replace(microsecond=0)
    try:
        return datetime.datetime.fromisoformat(recorded)
    except (TypeError, ValueError):
        raise UsageError(f"template_time={shown(recorded)} in {directory}", "it is no time", "delete the results to start again") from None


def print_answers(results: Sequence[Result]) -> None:
    """Each answer as the model wrote it, and what it cost."""
    for result in results:
        text = f"{_shown(result)}\n  P(correct) {result.expected_reward:.2f}, {result.usage.tokens} tokens"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def decode_prompts(
    lm: LanguageModel,
    prompts: Sequence[TextOrChat],
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
