"""`zip-rc decode`: prompts in, answers out."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zip_rc_jax.cli.common import add_model
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.data.problems import Problem
    from zip_rc_jax.inference.outputs import Result
    from zip_rc_jax.inference.requests import TextOrChat


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "decode",
        help="answer prompts with the adaptive search",
        description="Prompts come from --prompt (repeatable) or from a JSONL, CSV or Parquet file "
        "with `question`, `problem` or `prompt`\n(and `answer`, to grade).\n"
        "Without --output the answers are printed; with it, results.jsonl and metadata.json are "
        "written there, and after an\n"
        "interruption the same command decodes only what is missing.\n"
        "A model without a head is sampled with strategy=fixed.\n\n"
        "example: zip-rc decode runs/demo/final --prompt 'State the final answer to the following "
        "arithmetic problem: 4 + 3 - 2 ='\n"
        "         --stream n=8 interval=8 window=4 max_tokens=128 beta=0.05",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="option=value",
        help="fields of DecodeConfig, e.g. n=8 alpha=0.1 beta=0.02",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; give the option again for more"
    )
    parser.add_argument(
        "--input",
        type=pathlib.Path,
        help="JSONL, CSV or Parquet file with `question`, `problem` or `prompt`, and optionally "
        "`answer`",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user turn for the model's own chat template",
    )
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the template, e.g. enable_thinking=false",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="directory for results.jsonl and metadata.json"
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXES",
        help="several devices: rows over data, heads over tensor, e.g. data=4,tensor=2 (default "
        "one)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of parameters and cache (default float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--stream", action="store_true", help="show every decision as it is made")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Decodes the prompts, and prints or writes the answers.

    With an output directory, finished results there are never replaced: of the same settings there
    is nothing to do, and others are refused. It is one process at a time that works in it.

    Raises:
      UsageError: an output directory that another process works in, or that holds results of other
        settings; no prompts, both kinds of prompts, a bad option, mesh or file; before the model is
        loaded where possible.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.cli.decode_output import DecodeOutput, hash_of
    from zip_rc_jax.cli.headless import sampleable, without_predictions
    from zip_rc_jax.cli.live import decode_prompts, print_answers
    from zip_rc_jax.config import to_dict
    from zip_rc_jax.config.checks import shown
    from zip_rc_jax.config.overrides import from_dotlist
    from zip_rc_jax.data.problems import problems_from_file
    from zip_rc_jax.inference.api import resolve
    from zip_rc_jax.inference.requests import check_text, key_data
    from zip_rc_jax.models.io.chat import check_variable, template_time
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.runtime.locks import only_process
    from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes
    from zip_rc_jax.runtime.storage import (
        Journal,
        check_writable,
        run_metadata,
        write_json,
        write_jsonl,
    )

    # Arguments: what can be checked without a model is checked before one is loaded.
    started = time.time()
    options = from_dotlist(arguments.overrides, "option", "n=8")
    resolve(None, options)  # what is wrong with them shows before the model is loaded
    chat = from_dotlist(arguments.template_arg, "--template-arg", "enable_thinking=false")
    if bool(arguments.prompt) == bool(arguments.input):
        raise UsageError(
            "prompts", "give either --prompt (once or more) or --input FILE", "add one of them"
        )
    if arguments.output:
        check_writable(arguments.output, "--output")
    if chat and not arguments.chat:
        raise UsageError(
            f"--template-arg {shown(list(chat))}",
            "without --chat no template is used, which reads it",
            "add --chat, or leave it out",
        )
    for name in chat:
        check_variable(name)
    key_data(arguments.seed)

    # Prompts.
    found = problems_from_file(arguments.input, answers=False) if arguments.input else []
    prompts: list[TextOrChat] = [p.question for p in found] or arguments.prompt
    with _lines_named(arguments.input, found):
        for number, text in enumerate(prompts):
            assert isinstance(text, str)
            check_text(number, text)
    if arguments.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]

    # Model, and the answers on the screen.
    layout = Layout(make_mesh(**mesh_sizes(arguments.mesh, ("data", "tensor"))), DECODE_RULES)
    alone = (
        only_process(arguments.output, "--output") if arguments.output else contextlib.nullcontext()
    )
    with _lines_named(arguments.input, found), alone:
        lm = load(
            arguments.model,
            dtype=arguments.dtype,
            layout=layout,
            zip_label=arguments.zip_label,
            zip_first_id=arguments.zip_first_id,
        )
        config = resolve(None, options, lm.head, lm.generation_config)
        headless = lm.head is None
        if headless:
            lm = sampleable(lm, config, arguments.stream)
        if not arguments.output:
            results = decode_prompts(
                lm, prompts, config, arguments.seed, chat, live=arguments.stream
            )
            if headless:
                results = [without_predictions(result) for result in results]
            _graded(found, results)
            return print_answers(results)

        # Or in a directory, whose journal holds what an earlier call finished.
        asked = {
            "decode": to_dict(config),
            "seed": arguments.seed,
            "dtype": arguments.dtype,
            "answers": hash_of([p.answer for p in found]),
        }
        output = DecodeOutput(arguments.output, lm, prompts, chat, asked)
        if output.finished:
            console.print(
                f"{output.results} holds the results of these settings already", markup=False
            )
            return
        with template_time(output.time):
            journal = Journal(output.partial, fingerprint=output.fingerprint)
            results = decode_prompts(
                lm, prompts, config, arguments.seed, chat, journal=journal, live=arguments.stream
            )

        if headless:
            results = [without_predictions(result) for result in results]

        # The files, complete at once; the journal goes last.
        rows = _graded(found, results)
        write_jsonl(output.results, rows)
        metadata = run_metadata({"decode": to_dict(config)}, argv, started)
        write_json(output.metadata, metadata | {"fingerprint": output.fingerprint})
        journal.finish()
        console.print(f"wrote {output.results}", markup=False)


@contextlib.contextmanager
def _lines_named(path: pathlib.Path | None, found: Sequence[Problem]) -> Iterator[None]:
    """An error about "prompt 3" inside names the line of the file `path` that the prompt `found[3]`
    comes from.
    """
    try:
        yield
    except UsageError as error:
        number = re.match(r"prompt ([0-9]+)\b", error.value)
        if number is None or int(number[1]) >= len(found):
            raise
        raise UsageError(
            f"{path}, line {found[int(number[1])].line}, {error.value}", error.reason, error.fix
        ) from error


def _graded(found: Sequence[Problem], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as rows, with `answer` and `correct` where the input file has an answer; the accuracy
    is printed.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.grading.grader import Grader, correct

    rows = [r.to_dict() for r in results]
    if answered := [i for i, p in enumerate(found) if p.answer]:
        with Grader() as grader:
            scores = grader.grade_many((found[i], results[i].text) for i in answered)
        for i, score in zip(answered, scores, strict=True):
            rows[i] |= {"answer": found[i].answer, "correct": correct(score)}
        console.print(
            f"accuracy {sum(correct(s) for s in scores) / len(scores):.3f} over {len(scores)} "
            "problems"
        )
    return rows
