"""What `zip-rc predict` reads, shows and writes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from zip_rc_jax.cli.common import zip_options
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.overrides import from_dotlist
from zip_rc_jax.data.prediction_items import PredictionLine, prediction_lines
from zip_rc_jax.evaluation.token_heat_map import (
    HTML_END,
    HTML_HEAD,
    cells_of,
    color_of,
    html_section,
    lines_of,
    number_of,
    numbers_under,
    printable,
    svg_picture,
)
from zip_rc_jax.models.io.calibrations import calibration_line, stored_calibration
from zip_rc_jax.models.io.chat import check_variable
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.predictions import (
    Item,
    TokenizedItem,
    TokenPredictions,
    predict,
    tokenize_items,
)
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import DECODE_RULES, Layout, make_mesh, mesh_sizes
from zip_rc_jax.runtime.storage import check_writable, json_line, text_file, write_text


def run_predict(arguments: argparse.Namespace) -> None:
    """Texts in, predictions out.

    Raises:
      UsageError: no texts, both kinds of texts, a bad option, mesh, path, file or text; before the
        model is loaded where possible, and before it runs otherwise.
    """
    lines = _given(arguments)
    files = _outputs(arguments, len(lines))
    template = from_dotlist(arguments.template_arg, "--template-arg", "enable_thinking=false")
    if template and not arguments.chat and all(isinstance(x.prompt, str) for x in lines):
        value = f"--template-arg {shown(list(template))}"
        reason = "no template is used, which reads it"
        raise UsageError(value, reason, "add --chat, or leave it out")
    for name in template:
        check_variable(name)
    sizes = mesh_sizes(arguments.mesh, ("data", "tensor"))
    layout = Layout(make_mesh(**sizes), DECODE_RULES)
    lm = load(
        arguments.model,
        dtype=arguments.dtype,
        layout=layout,
        **zip_options(arguments),
    )
    with _lines_named(arguments.input, lines):
        texts = [_item(lm, i, line, arguments.chat) for i, line in enumerate(lines)]
        items = tokenize_items(lm, texts, chat_template_kwargs=template)
    predictions = predict(lm, iter(items), batch_tokens=arguments.batch_tokens, progress=False)
    console = Console() if Console().is_terminal else Console(width=170)
    if record := stored_calibration(lm, arguments.model, arguments.head):
        said = calibration_line(record)
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if not files:
        for i, (line, one) in enumerate(zip(lines, predictions, strict=True)):
            _print(console, one, _heading(line, i) if len(lines) > 1 else "")
        return
    _write(arguments, lines, items, predictions)
    for path in files:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


# ---- what to read


def _given(arguments: argparse.Namespace) -> list[PredictionLine]:
    """The texts of the command line or of the file."""
    if bool(arguments.prompt) == bool(arguments.input):
        fix = "add one of them" if not arguments.input else "leave one of them out"
        raise UsageError("texts", "give either --prompt (once or more) or --input FILE", fix)
    prompts, responses = arguments.prompt, arguments.response
    if responses and len(responses) != len(prompts):
        value = f"{len(responses)} times --response with {len(prompts)} times --prompt"
        reason = "each response belongs to the prompt of the same place"
        raise UsageError(value, reason, "give as many of both, or no response")
    if prompts:
        pairs = zip(prompts, responses or [None] * len(prompts), strict=True)
        return [PredictionLine(0, prompt, response) for prompt, response in pairs]
    lines = prediction_lines(arguments.input)
    unanswered = [x.line for x in lines if x.decoded and x.response is None]
    kept = [x for x in lines if not x.decoded or x.response is not None]
    if not kept:
        reason = "none of its results has an answer"
        raise UsageError(
            f"{arguments.input}", reason, "decode again, perhaps with allow_no_answer=false"
        )
    if unanswered:
        numbers = ", ".join(map(str, unanswered[:10])) + ", ..." * (len(unanswered) > 10)
        note = f"left out {len(unanswered)} results without an answer (lines {numbers})"
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
    if arguments.chat and any(x.decoded or not isinstance(x.prompt, str) for x in kept):
        reason = "its prompts are chats, or results whose prompts are rendered already"
        raise UsageError(f"--chat with {arguments.input}", reason, "leave out --chat")
    return kept


def _item(lm: LanguageModel, number: int, line: PredictionLine, chat: bool) -> Item:
    """What `predict` gets for a line. Raises UsageError for a result of another tokenizer."""
    if not line.decoded:
        turns: Any = [{"role": "user", "content": line.prompt}] if chat else line.prompt
        return turns if line.response is None else (turns, line.response)
    assert isinstance(line.prompt, str)
    assert isinstance(line.response, list)
    # A rendered chat is to be continued, so nothing is put behind it.
    encode = functools.partial(lm.tokenizer.encode_prompt, line.prompt, chat=line.chat)
    full, plain = (encode(add_special_tokens=added) for added in (True, False))
    prompt = next((ids for ids in (full, plain) if len(ids) == line.prompt_tokens), None)
    if prompt is None:
        value = f"item {number} with a prompt of {line.prompt_tokens} tokens"
        reason = f"this model's tokenizer makes {len(full)} of it, so another model decoded it"
        raise UsageError(value, reason, "predict with the model that decoded")
    return prompt, line.response


@contextlib.contextmanager
def _lines_named(path: pathlib.Path | None, lines: Sequence[PredictionLine]) -> Iterator[None]:
    """An error about "item 3" inside names the line of the file that `lines[3]` comes from."""
    try:
        yield
    except UsageError as error:
        number = re.match(r"item ([0-9]+)\b", error.value)
        if path is None or number is None or int(number[1]) >= len(lines):
            raise
        value = f"{path}, line {lines[int(number[1])].line}, {error.value}"
        raise UsageError(value, error.reason, error.fix) from error


# ---- what to write


def _outputs(arguments: argparse.Namespace, count: int) -> list[pathlib.Path]:
    """The files that are asked for, after a check that each can be written."""
    options = {"--output": arguments.output, "--html": arguments.html, "--svg": arguments.svg}
    given = {name: path for name, path in options.items() if path is not None}
    for name, path in given.items():
        if path.is_dir():
            raise UsageError(f"{name} {path}", "it is a directory", "give the path of a file")
        check_writable(path.parent, name)
    if len({path.absolute() for path in given.values()}) < len(given):
        value = ", ".join(f"{name} {path}" for name, path in given.items())
        raise UsageError(value, "two of them are one file", "give each a path of its own")
    if arguments.svg and count > 1:
        reason = f"a picture shows one text, and there are {count}"
        raise UsageError(f"--svg {arguments.svg}", reason, "use --html, or one --prompt")
    if arguments.joints and not arguments.output:
        raise UsageError("--joints", "joints are written to --output only", "add --output FILE")
    return list(given.values())


def _write(
    arguments: argparse.Namespace,
    lines: Sequence[PredictionLine],
    items: Sequence[TokenizedItem],
    predictions: Iterator[TokenPredictions],
) -> None:
    """Writes every prediction as it comes; no more than a few are held."""
    many = sum(len(item.ids) for item in items) > arguments.batch_tokens
    with contextlib.ExitStack() as stack:
        output = arguments.output and stack.enter_context(text_file(arguments.output))
        page = arguments.html and stack.enter_context(text_file(arguments.html))
        bar = stack.enter_context(progress("predict", len(lines))) if many else None
        if page:
            page(HTML_HEAD)
        for i, (line, one) in enumerate(zip(lines, predictions, strict=True)):
            if output:
                output(json_line(_row(i, line, one, arguments.joints)))
            if page:
                page(html_section(one, _heading(line, i)))
            if arguments.svg:
                write_text(arguments.svg, svg_picture(one))
            if bar:
                bar(i + 1, None)
        if page:
            page(HTML_END)


def _row(number: int, line: PredictionLine, one: TokenPredictions, joints: bool) -> dict[str, Any]:
    row = one.to_dict()
    if not joints:
        del row["joint"], row["grid"]
    return {"index": number} | ({"line": line.line} if line.line else {}) | row


def _heading(line: PredictionLine, number: int) -> str:
    return f"text {number}" + (f" (line {line.line})" if line.line else "")


# ---- what to show


def _print(console: Console, one: TokenPredictions, heading: str) -> None:
    """One item: a heat map on a terminal with colors, else a table."""
    if heading:
        console.print(heading, style="bold", highlight=False)
    colored = console.is_terminal and not console.no_color and console.color_system is not None
    if colored:
        console.print(heat_map(one, console.width), end="")
        console.print(legend())
    else:
        console.print(number_table(one))


def heat_map(one: TokenPredictions, columns: int) -> Text:
    """The text over its colors, and numbers of the tokens still to come underneath."""
    map_ = Text(end="", overflow="fold")
    for line in lines_of(cells_of(one), max(20, columns - 6)):  # room for the last number
        for cell in line:
            style = Style(dim=True)
            if cell.p_correct is not None:
                r, g, b = color_of(cell.p_correct)
                style = Style(color="rgb(0,0,0)", bgcolor=f"rgb({r},{g},{b})")
            map_.append(cell.text, style)
        map_.append("\n")
        numbers = ""
        for column, cell in numbers_under(line):
            numbers = numbers.ljust(column) + number_of(cell.remaining or 0.0)
        if numbers:
            map_.append(numbers + "\n", Style(dim=True))
    return map_


def legend() -> Text:
    """What the colors and the numbers of a heat map are."""
    text = Text("P(correct) 0 ")
    for i in range(11):
        r, g, b = color_of(i / 10)
        text.append(" ", Style(bgcolor=f"rgb({r},{g},{b})"))
    return text.append(" 1; underneath: expected tokens still to come")


def number_table(one: TokenPredictions) -> Table:
    """The numbers of every token that the map would color."""
    title = f"from the last token of the prompt on ({one.prompt_tokens} tokens)"
    shown = {"title": title, "title_justify": "left", "title_style": ""} if one.start else {}
    table = Table(box=None, **shown)  # type: ignore[arg-type]
    for name in ("position", "id", "P(correct)", "to come", "logprob"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("token", overflow="fold")
    for t in range(one.start, len(one)):
        table.add_row(
            str(t),
            str(one.token_ids[t]),
            f"{one.p_correct[t]:.3f}",
            f"{one.remaining[t]:.1f}",
            f"{one.logprob[t]:.3f}" if t else "",
            Text(printable(one.pieces[t])),
        )
    return table
