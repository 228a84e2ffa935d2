"""What `zip-rc predict --input` reads: prompts, responses, and results of `zip-rc decode`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from zip_rc_jax.data.problems.columns import COLUMNS, plain_value
from zip_rc_jax.data.problems.files import READERS, kind_of_file
from zip_rc_jax.data.problems.jsonl import read_jsonl, without_repeats
from zip_rc_jax.runtime.errors import UsageError

PROMPTS = COLUMNS["question"]
RESPONSES = ("response", "output", "completion")
WANTED = "pass a JSONL file with `prompt` on each line, or results.jsonl of `zip-rc decode`"
EXAMPLE = 'write one object a line, such as {"prompt": "What is 1 + 1?", "response": "2"}'


@dataclasses.dataclass(frozen=True)
class PredictionLine:
    """One line of the file.

    Attributes:
      line: its number, from 1.
      prompt: a text, or a chat.
      response: a text, token ids, or None where the line has none.
      decoded: the line is a result of `zip-rc decode`, whose prompt is already rendered.
      chat: a chat template rendered that prompt.
      prompt_tokens: tokens that the prompt had then; None where the line does not say.
    """

    line: int
    prompt: str | list[dict[str, Any]]
    response: str | list[int] | None = None
    decoded: bool = False
    chat: bool = False
    prompt_tokens: int | None = None


def prediction_lines(path: str | pathlib.Path) -> list[PredictionLine]:
    """The lines of a JSONL file that are not blank, or the rows of a CSV or Parquet table.

    A line is an object. It has a prompt under `question`, `problem` or `prompt` (a text or a chat),
    and may have a response under `response`, `output` or `completion` (a text or ids). Or it is
    a line of the `results.jsonl` that `zip-rc decode` writes: then the response is the answer's
    token ids, and None where there is no answer. A key whose value is null counts as absent.

    Raises:
      UsageError: see `read_jsonl`.
    """
    kind = kind_of_file(path)
    if kind == "jsonl":
        return read_jsonl(path, _parse, kind="prompts", wanted=WANTED, example=EXAMPLE)
    found = []
    for row in READERS[kind](pathlib.Path(path)):
        values = {name: plain_value(value) for name, value in row.values.items()}
        try:
            found.append(_of_row(values, row.number))
        except ValueError as error:
            raise UsageError(row.where, str(error), "correct the row, or leave it out") from None
    if not found:
        raise UsageError(f"prompts {path}", "the file has no prompts", WANTED)
    return found


def _parse(text: str, number: int) -> PredictionLine:
    """Raises ValueError for what is wrong with a line."""
    data = json.loads(text, parse_constant=_no_number, object_pairs_hook=without_repeats)
    if not isinstance(data, dict):
        raise ValueError(f"it holds {json.dumps(data)[:40]}, not an object")
    if "prefixes" in data and "prefix_id" in data:
        return _of_result(data, number)
    return _of_row(data, number)


def _of_row(data: dict[str, Any], number: int) -> PredictionLine:
    """Raises ValueError for what is wrong with a row."""
    prompt: Any = next((data[key] for key in PROMPTS if data.get(key) is not None), None)
    chat = isinstance(prompt, list) and prompt and all(isinstance(x, dict) for x in prompt)
    if not chat and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(f"it has no text or chat under {_names(PROMPTS)}")
    given = [key for key in RESPONSES if data.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"it has a response under {_names(given)}, and one is needed")
    response = data[given[0]] if given else None
    if response is not None and not isinstance(response, str) and not _are_ids(response):
        raise ValueError(f"its `{given[0]}` is no text and no list of token ids")
    if response is not None and not len(response):
        raise ValueError(f"its `{given[0]}` is empty; leave it out to read the prompt alone")
    return PredictionLine(number, prompt, response)


def _of_result(data: dict[str, Any], number: int) -> PredictionLine:
    incomplete = ValueError("it is no complete result of `zip-rc decode`")
    try:
        token_ids = {prefix["id"]: prefix["token_ids"] for prefix in data["prefixes"]}
        answer = token_ids.get(data["prefix_id"])
        prompt, tokens = data["prompt"], data["usage"]["prompt_tokens"]
    except (KeyError, TypeError):
        raise incomplete from None
    if not isinstance(prompt, str) or type(tokens) is not int or not _are_ids(answer or []):
        raise incomplete
    chat = data.get("template_hash") is not None
    return PredictionLine(number, prompt, answer or None, True, chat, tokens)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _names(keys: Any) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON value")
