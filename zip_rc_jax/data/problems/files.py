"""Problems from files: JSON lines, CSV tables and Parquet tables."""

from __future__ import annotations

import csv
import dataclasses
import glob
import gzip
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.config.checks import in_short, shown
from zip_rc_jax.data.problems.columns import COLUMNS, EXAMPLE, Row, first_value, read_rows
from zip_rc_jax.data.problems.jsonl import in_brief, parse_object, read_jsonl
from zip_rc_jax.data.problems.problem import Problem
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import

Prompt = str | list[dict[str, Any]]
NO_LINES = "pass a JSONL file with `question` and `answer` on each line"
ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".json", ".json.gz"),
    "csv": (".csv", ".csv.gz"),
    "parquet": (".parquet",),
}


def problems_from_jsonl(path: str | pathlib.Path, answers: bool = True) -> list[Problem]:
    """Problems of a JSONL file with the columns of `SourceConfig`'s defaults.

    Args:
      answers: every line needs an answer; else it is "" where there is none.

    Raises:
      UsageError: no such file, one that is not UTF-8 text with an object a line, or a line without
        what is needed; the message has its line number.
    """
    rows = jsonl_rows(pathlib.Path(path))
    return read_rows(rows, SourceConfig(f"jsonl:{path}"), answers=answers).problems


def kind_of_file(path: str | pathlib.Path) -> str:
    """ "csv" or "parquet" by the ending of its name; else "jsonl"."""
    name = pathlib.Path(path).name
    return next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), "jsonl")


def problems_from_file(path: str | pathlib.Path, answers: bool = True) -> list[Problem]:
    """Problems of a JSONL, CSV or Parquet file, see `problems_from_jsonl`."""
    kind = kind_of_file(path)
    rows = READERS[kind](pathlib.Path(path))
    return read_rows(rows, SourceConfig(f"{kind}:{path}"), answers=answers).problems


def prompts_from_file(path: str | pathlib.Path) -> tuple[list[Problem], list[Prompt]]:
    """What `zip-rc decode --input` reads: problems, whose answers may be absent, and the prompt of
    each.

    A prompt is the question, or a chat: a list of turns under `question`, `problem` or `prompt`.
    The question of a chat is its last user turn.

    Raises:
      UsageError: see `problems_from_jsonl`; or turns without a role and a content.
    """
    kind = kind_of_file(path)
    rows, chats = list[Row](), dict[int, list[dict[str, Any]]]()
    for row in READERS[kind](pathlib.Path(path)):
        column, value = first_value(row.values, COLUMNS["question"])
        if isinstance(value, list) and value:
            chats[len(rows)] = turns = _turns(row, column, value)
            asked = [x["content"] for x in turns if x["role"] == "user"] or [turns[-1]["content"]]
            last = asked[-1]
            text = str(last) if isinstance(last, str) else json.dumps(last, ensure_ascii=False)
            row = dataclasses.replace(row, values={**row.values, column: text})
        rows.append(row)
    found = read_rows(rows, SourceConfig(f"{kind}:{path}"), answers=False).problems
    return found, [chats.get(number, p.question) for number, p in enumerate(found)]


def _turns(row: Row, column: str, value: list[Any]) -> list[dict[str, Any]]:
    """A chat as plain turns. Raises UsageError where a turn is none."""
    for turn in value:
        whole = isinstance(turn, Mapping) and turn.get("content") is not None
        if not whole or not isinstance(turn.get("role"), str):
            raise UsageError(
                f"{row.where}, `{column}`",
                "it is an array, and not every entry has a role and a content",
                'write a text, or a chat such as [{"role": "user", "content": "What is 1 + 1?"}]',
            )
    # A table has all columns in every turn; those without a value were not there.
    return [{key: x for key, x in turn.items() if x is not None} for turn in value]


def file_rows(source: SourceConfig) -> tuple[list[Row], list[str]]:
    """All rows of the files of a source, in the order of their names; and these names.

    Raises:
      UsageError: no such files, or one that cannot be read.
    """
    paths = shards(source)
    read = READERS[source.kind]
    return list(itertools.chain.from_iterable(read(path) for path in paths)), [
        path.name for path in paths
    ]


def shards(source: SourceConfig) -> list[pathlib.Path]:
    """The files of a source: one, those of a directory, or those that a pattern names.

    Raises:
      UsageError: there are none.
    """
    name, endings = source.name, ENDINGS[source.kind]
    path = pathlib.Path(name).expanduser()
    try:
        if path.is_dir():
            found = sorted(x for x in path.iterdir() if x.name.endswith(endings) and x.is_file())
            reason = f"the directory holds no {' or '.join(endings)} file"
        elif path.exists() or not glob.has_magic(name):
            return [path]
        else:
            found = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
            reason = "no file fits the pattern"
    except (OSError, ValueError) as error:
        raise UsageError(
            f"problems {in_brief(path)}", in_short(error), "correct the path"
        ) from None
    if not found:
        raise UsageError(f"problems {in_brief(path)}", reason, "correct the path")
    return found


def jsonl_rows(path: pathlib.Path) -> list[Row]:
    """The lines of a file that are not blank. Raises UsageError, see `read_jsonl`."""
    return read_jsonl(
        path,
        lambda text, number: Row(parse_object(text), f"{in_brief(path)}, line {number}", number),
        kind="problems",
        wanted=NO_LINES,
        example=f"write one object a line, {EXAMPLE}",
    )


def csv_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a table of comma-separated texts, whose first line names the columns.

    Numbers stay as the file spells them. An empty cell counts as absent.

    Raises:
      UsageError: no such file, no UTF-8 text, no header, or a row of another width.
    """
    csv.field_size_limit(1 << 30)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise UsageError(
            f"problems {in_brief(path)}",
            f"it cannot be read ({in_short(error)})",
            "check the file, its name and its permissions",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"problems {in_brief(path)}",
            f"it is not UTF-8 text ({error.reason} at byte {error.start})",
            "convert it to UTF-8",
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(_csv_rows(path, reader))
    except csv.Error as error:
        raise UsageError(
            f"{in_brief(path)}, line {reader.line_num}",
            f"it is no CSV ({error})",
            "quote texts with commas, quotes or line breaks",
        ) from None


def _csv_rows(path: pathlib.Path, reader: Iterator[list[str]]) -> Iterator[Row]:
    header = next(reader, None)
    if not header:
        raise UsageError(
            f"problems {in_brief(path)}",
            "its first line names no columns",
            "begin it with a line such as question,answer",
        )
    names = [name.strip() for name in header]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise UsageError(
            f"problems {in_brief(path)}",
            f"its first line names {shown(repeated[0])} twice",
            "rename one of these columns",
        )
    for cells in reader:
        if not cells:
            continue  # a blank line
        line = reader.line_num  # type: ignore[attr-defined]
        where = f"{in_brief(path)}, line {line}"
        if len(cells) != len(names):
            raise UsageError(
                where,
                f"it has {len(cells)} cells, and the first line names {len(names)} columns",
                "quote texts with commas, quotes or line breaks",
            )
        yield Row({n: c for n, c in zip(names, cells, strict=True) if c.strip()}, where, line)


def parquet_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a Parquet table. Raises UsageError for what is none."""
    with optional_import():
        import pyarrow as pa
        import pyarrow.parquet as pq
    if not path.is_file():
        raise UsageError(f"problems {in_brief(path)}", "there is no such file", "correct the path")
    try:
        rows = pq.read_table(path, partitioning=None).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"problems {in_brief(path)}",
            f"it cannot be read as a Parquet table ({in_short(error)})",
            "check the file",
        ) from None
    return [Row(row, f"{in_brief(path)}, row {i}", i) for i, row in enumerate(rows)]


READERS: dict[str, Callable[[pathlib.Path], list[Row]]] = {
    "jsonl": jsonl_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
}
