"""Problems with exact answers: procedural ones from reasoning-gym, level by level, and maths
problems from JSONL files."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

from zip_rc_jax.config import TaskConfig
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.settings import nearest

T = TypeVar("T")
MATH = "math"
SPLITS = ("train", "heldout")
# reasoning-gym 0.1.25 iterates over sets of strings here, so the same seed gives other problems in
# every process.
HASH_DEPENDENT = (
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem with its reference answer.

    Attributes:
      index: number within its split; problem `i` has level `i % n_levels`.
      level: index into `TaskConfig.levels`, easiest first.
      seed: the seed that made it (0 for problems from a file).
      question: as shown to the model, before the chat template.
      answer: reference answer.
      task: reasoning-gym dataset name, or "math".
      entry_json: `{"options", "seed", "index"}` that make the full reasoning-gym entry again, for
        scorers that need its metadata; "" for maths.
      line: of the file that it comes from, counted from 1; 0 for generated ones.
    """

    index: int
    level: int
    seed: int
    question: str
    answer: str
    task: str
    entry_json: str = ""
    line: int = 0


def problems(task: TaskConfig, split: str, count: int) -> list[Problem]:
    """The first `count` problems of a split, round-robin over the levels.

    Every (split, level) owns a range of seeds that no other shares: the distance between the two
    first seeds, divided by the number of levels. So problem `i` does not depend on `count`, and no
    problem of one split can be generated in the other. (Two seeds can still produce the same
    question where a level has few distinct ones.)

    Raises:
      UsageError: unknown split, dataset or option; an option value that the dataset refuses;
        negative seeds; more problems than fit between the two first seeds; or a dataset in
        `HASH_DEPENDENT` without PYTHONHASHSEED.
    """
    if split not in SPLITS:
        raise UsageError(
            f"split={split!r}", f"the splits are {' and '.join(SPLITS)}", "use one of them"
        )
    if count < 0:
        raise UsageError(f"count={count}", "it counts problems", "use a number >= 0")
    levels = task.levels or ({},)
    if min(task.train_seed, task.heldout_seed) < 0:
        raise UsageError(
            f"train_seed={task.train_seed}, heldout_seed={task.heldout_seed}",
            "Python's random generator ignores the sign of a seed, so negative ranges repeat "
            "positive ones",
            "use seeds >= 0",
        )
    per_level = -(-count // len(levels))
    stride = abs(task.heldout_seed - task.train_seed) // len(levels)
    if per_level > stride:
        raise UsageError(
            f"{count} problems with train_seed={task.train_seed}, heldout_seed={task.heldout_seed}",
            f"{len(levels)} levels leave {stride} seeds for each before the two splits overlap, "
            f"and {per_level} are needed",
            f"set the two seeds at least {per_level * len(levels)} apart",
        )
    first = task.train_seed if split == "train" else task.heldout_seed
    starts = [first + level * stride for level in range(len(levels))]
    names = [str(options.get("name", task.name)) for options in levels]
    levels = tuple(
        {key: value for key, value in options.items() if key != "name"} for options in levels
    )
    datasets = [
        create(*item, max(per_level, 1)) for item in zip(names, levels, starts, strict=True)
    ]
    result = []
    for index in range(count):
        position, level = divmod(index, len(levels))
        try:
            entry = datasets[level][position]
        # some values pass the dataset's own validation and fail only here
        except Exception as error:
            raise _impossible(names[level], levels[level], error) from error
        reference = {"options": levels[level], "seed": starts[level], "index": position}
        result.append(
            Problem(
                index,
                level,
                starts[level] + position,
                entry["question"],
                str(entry["answer"]),
                names[level],
                json.dumps(reference),
            )
        )
    return result


def create(name: str, options: dict[str, Any], seed: int, size: int) -> Any:
    """`reasoning_gym.create_dataset` with errors that help.

    Raises `UsageError` for an unknown name, option or value.
    """
    with optional_import():
        # a second to import, and only this stage needs it
        from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise UsageError(
            f"task.name={name!r}",
            "reasoning-gym has no such dataset",
            nearest(name, sorted(DATASETS), "known are", 3),
        )
    if name in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise UsageError(
            f"task.name={name!r}",
            "its problems depend on Python's hash seed, so no run would repeat another",
            "set PYTHONHASHSEED=0",
        )
    known = [
        field.name
        for field in dataclasses.fields(DATASETS[name][1])
        if field.name not in ("seed", "size")
    ]
    for key in options:
        if key in ("seed", "size"):
            raise UsageError(
                f"task.levels option {key!r}",
                "seeds and sizes follow from the split and the number of problems",
                "remove it from the level",
            )
        if key not in known:
            raise UsageError(
                f"task.levels option {key!r} of {name}",
                "the dataset has no such option",
                nearest(str(key), known, "known are", 3),
            )
    try:
        return create_dataset(name, seed=seed, size=size, **options)
    # each dataset validates in its own way: assertions, ValueError, TypeError
    except Exception as error:
        raise _impossible(name, options, error) from error


def _impossible(name: str, options: dict[str, Any], error: Exception) -> UsageError:
    return UsageError(
        f"task.levels {options} of {name}", str(error) or type(error).__name__, "correct the value"
    )


NO_LINES = "pass a JSONL file with `question` and `answer` on each line"
EXAMPLE = 'write one object a line, such as {"question": "What is 1 + 1?", "answer": "2"}'
MAX_LEVEL_DIGITS = 9


class _Number(str):
    """A JSON number as the file spells it.

    As a float, 0.00001 would become "1e-05", and 1e16 another number.
    """


def problems_from_jsonl(path: str | pathlib.Path, answers: bool = True) -> list[Problem]:
    """Maths problems: one JSON object a line, with `question` (or `problem`) and `answer`.

    Blank lines are skipped.

    A key whose value is null counts as absent. A number under `answer` is taken as the file spells
    it. A worked solution that ends in `#### 72` (GSM8K) is cut to `72`. An integer `level` or a
    string such as "Level 3" (MATH) is kept.

    Args:
      answers: every line needs an `answer`; else it is "" where there is none.

    Raises:
      UsageError: no such file, one that is not UTF-8 text with an object a line, or a line without
        what is needed; the message has its line number.
    """
    indices = itertools.count()
    return read_jsonl(
        path,
        lambda line, number: _parse_line(line, number, next(indices), answers),
        kind="problems",
        wanted=NO_LINES,
        example=EXAMPLE,
    )


def read_jsonl(
    path: str | pathlib.Path,
    parse: Callable[[str, int], T],
    *,
    kind: str,
    wanted: str,
    example: str,
) -> list[T]:
    """What `parse(line, line number)` makes of every line of a file that is not blank.

    Args:
      parse: raises ValueError for what is wrong with a line.
      kind: what the file holds, for messages, e.g. "problems".
      wanted: the fix where the file is none of these.
      example: the fix where a line is wrong.

    Raises:
      UsageError: no such file, no lines, or a line that is not UTF-8 or that `parse` refuses; the
        message has its line number.
    """
    path = pathlib.Path(path)
    result: list[T] = []
    try:
        if not path.is_file():
            reason = (
                "it is a directory"
                if path.is_dir()
                else "it is no regular file"
                if path.exists()
                else "there is no such file"
            )
            raise UsageError(f"{kind} {in_brief(path)}", reason, wanted)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = _text_of_line(path, number, line)
                if text.strip():
                    result.append(_parsed(path, number, text, parse, example))
    except OSError as error:
        reason = f"it cannot be read ({error.strerror or type(error).__name__})"
        fix = "check the file, its name and its permissions"
        raise UsageError(f"{kind} {in_brief(path)}", reason, fix) from None
    if not result:
        raise UsageError(f"{kind} {in_brief(path)}", f"the file has no {kind}", wanted)
    return result


def in_brief(path: str | pathlib.Path) -> str:
    """A path for a message; a name of thousands of characters is cut."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


# How files begin that are no text, and what unpacks them.
_BINARY = (
    (b"\x1f\x8b", "gzip", "gunzip -c"),
    (b"BZh", "bzip2", "bunzip2 -c"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
)


def _text_of_line(path: pathlib.Path, number: int, line: bytes) -> str:
    """Raises `UsageError` with file and line number."""
    where, name = f"{in_brief(path)}, line {number}", in_brief(path.name)
    for begin, kind, command in _BINARY:
        if line.startswith(begin):
            raise UsageError(
                where,
                f"the file is compressed ({kind})",
                f"unpack it: {command} {name} > unpacked.jsonl",
            )
    if line.startswith(b"PAR1"):
        raise UsageError(
            where, "the file is a Parquet table", "write one JSON object a line from it"
        )
    encoding = json.detect_encoding(line).removesuffix("-sig")
    if encoding != "utf-8":
        shown = encoding.upper()
        fix = f"if it is text, convert it: iconv -f {shown} -t UTF-8 {name} > utf8.jsonl"
        raise UsageError(where, f"it is not UTF-8 text, but {shown} or no text at all", fix)
    try:
        # A mark in the middle comes from files that were joined.
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        raise UsageError(
            where,
            reason,
            f"if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {name} > utf8.jsonl",
        ) from None


def _parsed(
    path: pathlib.Path,
    number: int,
    text: str,
    parse: Callable[[str, int], T],
    example: str,
) -> T:
    """Raises `UsageError` with file and line number."""
    where, name = f"{in_brief(path)}, line {number}", in_brief(path.name)
    try:
        return parse(text, number)
    except RecursionError:
        raise UsageError(where, "its JSON is nested too deeply", example) from None
    except ValueError as error:
        if text.lstrip().startswith("["):
            fix = f"write one object a line: jq -c '.[]' {name} > lines.jsonl"
            raise UsageError(
                where, "it begins a JSON array, and the file should have one object a line", fix
            ) from None
        if isinstance(error, json.JSONDecodeError) and not text[error.pos :].strip():
            reason = "its JSON goes on in the next line, or is cut off"
            raise UsageError(where, reason, example) from None
        reason = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise UsageError(where, reason[:300], example) from None


def _parse_line(line: str, number: int, index: int, answers: bool) -> Problem:
    data = json.loads(
        line,
        parse_float=_Number,
        parse_int=_Number,
        parse_constant=_no_number,
        object_pairs_hook=without_repeats,
    )
    if not isinstance(data, dict):
        raise ValueError(f"it holds {_kind(data)}, not an object")
    question = next(
        (data[key] for key in ("question", "problem") if data.get(key) is not None), None
    )
    if not isinstance(question, str) or isinstance(question, _Number) or not question.strip():
        raise ValueError("it has no text under `question` or `problem`")
    answer = data.get("answer")
    if answer is None and not answers:
        answer = ""
    elif not isinstance(answer, str) or not answer.strip():
        raise ValueError("it has no text or number under `answer`")
    # JSON can spell it; no tokenizer reads it, and no file of results can hold it
    if re.search("[\ud800-\udfff]", f"{question}{answer}"):
        raise ValueError("its question or answer holds half of a surrogate pair")
    if answer and not (answer := answer.rpartition("####")[2].strip()):
        raise ValueError("its `answer` has nothing behind ####")
    return Problem(index, _level(data.get("level")), 0, question, str(answer), MATH, line=number)


def _level(value: Any) -> int:
    """A whole number, or the first one in a text such as "Level 3"; 0 without any."""
    if value is None:
        return 0
    # A table with gaps writes its whole numbers as 3.0.
    digits = (
        re.fullmatch(r"([0-9]+)(?:\.0*)?", value)
        if isinstance(value, _Number)
        else re.search(r"([0-9]+)", str(value))
    )
    if not isinstance(value, str) or (digits is None and isinstance(value, _Number)):
        raise ValueError(
            f"its level is {_kind(value) if not isinstance(value, _Number) else value[:40]}, not "
            "a whole number or a text"
        )
    if digits and len(digits[1]) > MAX_LEVEL_DIGITS:
        raise ValueError(f"its level has {len(digits[1])} digits")
    return int(digits[1]) if digits else 0


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON value and no answer")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(
            key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1
        )
        raise ValueError(f"it has the key {repeated[:100]!r} twice")
    return found


def _kind(value: Any) -> str:
    names = {
        _Number: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
    }
    return names[type(value)]
