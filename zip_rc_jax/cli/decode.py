"""`zip-rc decode`: prompts in, answers out."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zip_rc_jax.cli.common import add_model, zip_options
from zip_rc_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from zip_rc_jax.config import DecodeConfig, GradeConfig
    from zip_rc_jax.data.problems import Problem
    from zip_rc_jax.inference.outputs import Result
    from zip_rc_jax.inference.requests import TextOrChat
    from zip_rc_jax.models.language_model import LanguageModel
    from zip_rc_jax.runtime.storage import Journal


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "decode",
        help="answer prompts with the adaptive search",
        description="Prompts come from --prompt (repeatable) or from a JSONL, CSV or Parquet file "
        "with `question`, `problem` or `prompt`\n(and `answer`, to grade). A list of turns there, "
        "with `role` and `content`, is a chat for the model's own template.\n"
        "Votes group answers by answer_extractor and answer_equivalence; grade.grader=module:"
        "function (or judge) decides what is right.\n"
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
        help="fields of DecodeConfig, e.g. n=8 alpha=0.1 beta=0.02, and of the section `grade`, "
        "e.g. grade.grader=mine:function",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; give the option again for more"
    )
    parser.add_argument(
        "--input",
        type=pathlib.Path,
        help="JSONL, CSV or Parquet file with `question`, `problem` or `prompt` (a text or a "
        "chat), and optionally `answer`",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each text is a user turn for the model's own chat template",
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
    parser.add_argument(
        "--introspect",
        action="store_true",
        help="results.jsonl also holds what `zip-rc explore` shows of a decision and of a token: "
        "the utility of every action that was weighed, and the joint (about 110 bytes a token)",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Decodes the prompts, and prints or writes the answers.

    With an output directory, finished results there are never replaced. With the same settings
    there is nothing to do; with others the directory is refused. One process at a time works in it.

    Raises:
      UsageError: an output directory that another process works in, or that holds results of other
        settings; no prompts, both kinds of prompts, a bad option, mesh or file; before the model is
        loaded where possible.
    """
    from zip_rc_jax.cli.headless import sampleable
    from zip_rc_jax.cli.live import print_answers
    from zip_rc_jax.inference.api import resolve
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.runtime.locks import only_process
    from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes

    # What can be checked without a model is checked before one is loaded.
    started = time.time()
    options, template, grade = _checked_options(arguments)
    problems, prompts = _read_prompts(arguments)
    _check_template(template, prompts)
    layout = Layout(make_mesh(**mesh_sizes(arguments.mesh, ("data", "tensor"))), DECODE_RULES)
    alone = (
        only_process(arguments.output, "--output") if arguments.output else contextlib.nullcontext()
    )
    with _lines_named(arguments.input, problems), alone:
        lm = load(
            arguments.model,
            dtype=arguments.dtype,
            layout=layout,
            **zip_options(arguments),
        )
        config = resolve(None, options, lm.head, lm.generation_config)
        decode = _decode
        if lm.head is None and arguments.introspect:
            reason = "what is recorded is what the head says"
            raise UsageError("--introspect of a model without a head", reason, "leave it out")
        if lm.head is None:
            lm, decode = sampleable(lm, config, arguments.stream), _decode_headless
        if arguments.output:
            _decode_into_directory(
                arguments, argv, started, decode, lm, config, template, grade, problems, prompts
            )
        else:
            results = decode(lm, prompts, config, template, arguments)
            _graded(problems, results, grade)
            print_answers(results)


def _decode(
    lm: LanguageModel,
    prompts: Sequence[TextOrChat],
    config: DecodeConfig,
    template: dict[str, Any],
    arguments: argparse.Namespace,
    journal: Journal | None = None,
) -> list[Result]:
    from zip_rc_jax.cli.live import decode_prompts

    return decode_prompts(
        lm,
        prompts,
        config,
        arguments.seed,
        template,
        journal=journal,
        live=arguments.stream,
        joints=arguments.introspect,
    )


def _decode_headless(*given: Any, **options: Any) -> list[Result]:
    """As `_decode`, with a head that predicts nothing, whose numbers are left out."""
    from zip_rc_jax.cli.headless import without_predictions

    return [without_predictions(result) for result in _decode(*given, **options)]


def _checked_options(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any], GradeConfig]:
    """Options of the decode, variables of the chat template, and how answers are graded.

    Raises:
      UsageError: an argument that cannot work, as far as no model is needed to see it.
    """
    from zip_rc_jax.config.grade import JUDGE, made_grade
    from zip_rc_jax.config.overrides import from_dotlist
    from zip_rc_jax.inference.api import resolve
    from zip_rc_jax.inference.requests import key_data
    from zip_rc_jax.models.io.chat import check_variable
    from zip_rc_jax.runtime.storage import check_writable

    options = from_dotlist(arguments.overrides, "option", "n=8")
    grade = made_grade(options.pop("grade", {}))
    if grade.grader == JUDGE and not arguments.output:
        raise UsageError(
            "grade.grader=judge without --output",
            "its prompts and replies are kept, and there is no place for them",
            "add --output DIRECTORY",
        )
    resolve(None, options)
    template = from_dotlist(arguments.template_arg, "--template-arg", "enable_thinking=false")
    if bool(arguments.prompt) == bool(arguments.input):
        raise UsageError(
            "prompts", "give either --prompt (once or more) or --input FILE", "add one of them"
        )
    if arguments.introspect and not arguments.output:
        reason = "it records into results.jsonl, and there is no place for it"
        raise UsageError("--introspect without --output", reason, "add --output DIRECTORY")
    if arguments.output:
        check_writable(arguments.output, "--output")
    for name in template:
        check_variable(name)
    key_data(arguments.seed)
    return options, template, grade


def _check_template(template: dict[str, Any], prompts: Sequence[TextOrChat]) -> None:
    """Raises UsageError for variables of a template that nobody reads."""
    from zip_rc_jax.config.checks import shown

    if template and all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(
            f"--template-arg {shown(list(template))}",
            "without --chat no template is used, which reads it",
            "add --chat, or leave it out",
        )


def _read_prompts(
    arguments: argparse.Namespace,
) -> tuple[Sequence[Problem], Sequence[TextOrChat]]:
    """The problems of the input file (none for --prompt), and the prompts, as texts or chats.

    Raises:
      UsageError: a file that cannot be read, or a text that no tokenizer can encode.
    """
    from zip_rc_jax.data.problems import prompts_from_file
    from zip_rc_jax.inference.requests import check_text

    problems: Sequence[Problem] = []
    prompts: Sequence[TextOrChat] = arguments.prompt
    if arguments.input:
        problems, prompts = prompts_from_file(arguments.input)
    with _lines_named(arguments.input, problems):
        for number, prompt in enumerate(prompts):
            text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
            check_text(number, text)
    if not arguments.chat:
        return problems, prompts
    return problems, [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _decode_into_directory(
    arguments: argparse.Namespace,
    argv: Sequence[str],
    started: float,
    decode: Callable[..., list[Result]],
    lm: LanguageModel,
    config: DecodeConfig,
    template: dict[str, Any],
    grade: GradeConfig,
    problems: Sequence[Problem],
    prompts: Sequence[TextOrChat],
) -> None:
    """Writes results.jsonl and metadata.json; a journal there holds what an earlier call finished.

    Args:
      started: when the command began, in seconds since the epoch.
      decode: `_decode` or `_decode_headless`.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.cli.decode_output import DecodeOutput, hash_of
    from zip_rc_jax.config import GradeConfig, to_dict
    from zip_rc_jax.models.io.chat import template_time
    from zip_rc_jax.runtime.storage import Journal, run_metadata, write_json, write_jsonl

    asked = {
        "decode": to_dict(config),
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "answers": hash_of([p.answer for p in problems]),
    }
    if grade != GradeConfig():
        asked["grade"] = grade.record()
    if arguments.introspect:
        asked["introspect"] = True
    output = DecodeOutput(arguments.output, lm, prompts, template, asked)
    if output.finished:
        console.print(f"{output.results} holds the results of these settings already", markup=False)
        return
    with template_time(output.time):
        journal = Journal(output.partial, fingerprint=output.fingerprint)
        results = decode(lm, prompts, config, template, arguments, journal)
    # The files, complete at once; the journal goes last.
    rows = _graded(problems, results, grade, arguments.output)
    if arguments.introspect:
        from zip_rc_jax.explorer.record import introspections
        from zip_rc_jax.models.io.calibrations import calibration_line, stored_calibration

        record = stored_calibration(lm, arguments.model, arguments.head)
        said = "" if record is None else calibration_line(record)
        told = introspections(lm, results, config, said)
        rows = [row | {"introspection": one} for row, one in zip(rows, told, strict=True)]
    write_jsonl(output.results, rows)
    metadata = run_metadata({"decode": to_dict(config)}, argv, started)
    write_json(output.metadata, metadata | {"fingerprint": output.fingerprint})
    journal.finish()
    console.print(f"wrote {output.results}", markup=False)


@contextlib.contextmanager
def _lines_named(path: pathlib.Path | None, problems: Sequence[Problem]) -> Iterator[None]:
    """An error about "prompt 3" inside names the line of `path` that `problems[3]`
    comes from.
    """
    try:
        yield
    except UsageError as error:
        number = re.match(r"prompt ([0-9]+)\b", error.value)
        if number is None or int(number[1]) >= len(problems):
            raise
        raise UsageError(
            f"{path}, line {problems[int(number[1])].line}, {error.value}", error.reason, error.fix
        ) from error


def _graded(
    problems: Sequence[Problem],
    results: Sequence[Result],
    grade: GradeConfig,
    directory: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Results as rows, with `answer` and `correct` where the input file has an answer; the accuracy
    is printed.

    Args:
      directory: where a judge keeps its prompts and replies.
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.grading.custom import grader_of
    from zip_rc_jax.grading.grader import correct

    rows = [r.to_dict() for r in results]
    if answered := [i for i, p in enumerate(problems) if p.answer]:
        with grader_of(grade, directory or pathlib.Path()) as grader:
            scores = grader.grade_many((problems[i], results[i].text) for i in answered)
        right = [correct(score) for score in scores]
        if grade.unfinished == "wrong":
            ended = [results[i].finish_reason == "stop" for i in answered]
            right = [x if whole else 0.0 for x, whole in zip(right, ended, strict=True)]
        for i, x in zip(answered, right, strict=True):
            rows[i] |= {"answer": problems[i].answer, "correct": x}
        console.print(f"accuracy {sum(right) / len(right):.3f} over {len(right)} problems")
    return rows
