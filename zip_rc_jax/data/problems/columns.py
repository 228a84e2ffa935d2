"""From the columns of a row to a problem: question, reference answer, level and id."""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.filters import Filter
from zip_rc_jax.data.problems.jsonl import Number
from zip_rc_jax.data.problems.problem import MATH, Problem
from zip_rc_jax.runtime.errors import UsageError

# What a column is looked for under, where the config names none.
COLUMNS = {
    "question": ("question", "problem", "prompt"),
    "answer": ("answer", "solution", "final_answer"),
    "level": ("level", "difficulty", "subject"),
    "id": ("id", "unique_id"),
}
EXAMPLE = 'such as {"question": "What is 1 + 1?", "answer": "2"}'
LONGEST_NAME = 200  # characters of a level or an id
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
      values: by column.
      where: file and place, for messages, such as "mine.jsonl, line 3".
      number: its line, from 1, or its row, from 0.
    """

    values: Mapping[str, Any]
    where: str
    number: int


@dataclasses.dataclass(frozen=True)
class ReadRows:
    """The problems of rows, and what was left out.

    Attributes:
      problems: in the order of the rows.
      rows: how many there were.
      filtered: how many the filter left out.
      unreadable: where an answer could not be read, and why.
      columns: field -> columns that were read for it.
      repeated_ids: how many rows have an id that an earlier one has; then rows are named by place.
    """

    problems: list[Problem]
    rows: int
    filtered: int
    unreadable: list[str]
    columns: dict[str, list[str]]
    repeated_ids: int


def read_rows(
    rows: Sequence[Row],
    source: SourceConfig,
    *,
    answers: bool = True,
    readable: Callable[[Sequence[str]], Sequence[bool]] | None = None,
) -> ReadRows:
    """The problems of rows, as the columns of `source` say.

    Args:
      answers: every row needs one; else it is "" where there is none.
      readable: says which of some answers a grader can read; None takes all.

    Raises:
      UsageError: no rows; a column that is not there; a filter that reads none of the columns, or
        leaves nothing; a question or level of a wrong type; ids that repeat in a column that the
        config names; or, unless `source.unreadable` drops them, answers that cannot be read.
    """
    if not rows:
        raise UsageError(
            f"problems of {shown(source.source)}", "there are none", "give a source with problems"
        )
    present = list(dict.fromkeys(name for row in rows for name in row.values))
    names = {field: _candidates(field, source, present, answers) for field in COLUMNS}

    # Rows that the filter keeps.
    kept = _filtered(rows, source, present)

    # Problems.
    found, faults = list[Problem](), list[tuple[str, str]]()
    places = list[str]()
    used: dict[str, list[str]] = {field: [] for field in COLUMNS}
    for row in kept:
        values: dict[str, Any] = {}
        for field, candidates in names.items():
            column, values[field] = first_value(row.values, candidates)
            if column and column not in used[field]:
                used[field].append(column)
            if field == "answer":
                answer_column = column
        question = _question(row, values["question"], names["question"])
        try:
            answer = read_answer(values["answer"], answer_column, source.answer_from, answers)
        except ValueError as error:
            faults.append((row.where, str(error)))
            continue
        places.append(row.where)
        level, name = _level(row, values["level"]), _id(row, values["id"], source)
        found.append(
            Problem(
                len(found),
                0,
                0,
                question,
                answer,
                MATH,
                line=row.number,
                id=name,
                level_name=level,
                source=source.source,
            )
        )
    if readable is not None:
        fits = list(readable([p.answer for p in found]))
        faults += [
            (where, f"no grader can read its answer {shown(p.answer, 60)}")
            for where, p, fit in zip(places, found, fits, strict=True)
            if not fit
        ]
        found = [p for p, fit in zip(found, fits, strict=True) if fit]
    if faults and source.unreadable == "refuse":
        raise _unreadable(faults, len(kept), source)
    if not found:
        raise _unreadable(faults, len(kept), source)
    repeated = sum(
        n - 1 for n in collections.Counter(p.id for p in found if p.id).values() if n > 1
    )
    return ReadRows(
        _with_ids(found, source, repeated),
        len(rows),
        len(rows) - len(kept),
        [f"{where}: {reason}" for where, reason in faults],
        {field: columns for field, columns in used.items() if columns},
        repeated,
    )


def _candidates(
    field: str, source: SourceConfig, present: Sequence[str], answers: bool
) -> tuple[str, ...]:
    """The columns to look for a field under. Raises UsageError if none is there and one must be."""
    named: str = getattr(source, field)
    wanted = (named,) if named else COLUMNS[field]
    there = tuple(x for x in wanted if x in present or x.partition(".")[0] in present)
    needed = field == "question" or (field == "answer" and answers) or named
    if there or not needed:
        return there
    columns = ", ".join(map(str, present[:20])) or "none"
    raise UsageError(
        f"{field} of {shown(source.source)}",
        f"there is no column {' or '.join(f'`{x}`' for x in wanted)}; the columns are {columns}",
        f"name the column: {field}: COLUMN beside `source`; every row needs a question and an "
        f"answer, {EXAMPLE}",
    )


def first_value(values: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any]:
    """The first column that is not null, and its value."""
    for name in names:
        value = _field(values, name)
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return name, value
    return "", None


def _field(values: Mapping[str, Any], name: str) -> Any:
    """A column, or for "a.b" the field `b` inside the column `a`."""
    if name in values:
        return plain_value(values[name])
    value: Any = values
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return plain_value(value)


def plain_value(value: Any) -> Any:
    """Text for bytes, Python's numbers for NumPy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain_value(value.item())
    return value.tolist() if hasattr(value, "tolist") else value


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Number) or (
        isinstance(value, numbers.Number) and not isinstance(value, bool)
    ):
        return "a number"
    kinds = {str: "a text", bool: "true or false", type(None): "null"}
    for kind, name in ((Mapping, "an object"), (list, "an array"), (tuple, "an array")):
        if isinstance(value, kind):
            return name
    return kinds.get(type(value), f"a {type(value).__name__}")


def _filtered(rows: Sequence[Row], source: SourceConfig, present: Sequence[str]) -> Sequence[Row]:
    if not source.filter:
        return rows
    condition = Filter.parse(source.filter)
    where = f"filter={shown(source.filter)} of {shown(source.source)}"
    absent = [name for name in condition.columns if name not in present]
    if absent:
        columns = ", ".join(map(str, present[:20]))
        raise UsageError(where, f"no row has {absent[0]!r}; the columns are {columns}", "name one")
    kept = []
    for row in rows:
        values = {name: _comparable(row.values.get(name)) for name in condition.columns}
        try:
            if condition(values):
                kept.append(row)
        except TypeError:
            kinds = ", ".join(f"{name} is {kind_of(value)}" for name, value in values.items())
            raise UsageError(
                where, f"it cannot be compared in {row.where}: {kinds}", "compare like with like"
            ) from None
    if not kept:
        raise UsageError(where, f"it leaves none of {len(rows)} rows", "widen the condition")
    return kept


def _comparable(value: Any) -> Any:
    value = plain_value(value)
    if not isinstance(value, Number):
        return value
    try:
        return int(value)
    except ValueError:
        return float(value)


def _question(row: Row, value: Any, names: Sequence[str]) -> str:
    under = " or ".join(f"`{name}`" for name in names)
    if not isinstance(value, str) or isinstance(value, Number) or not value.strip():
        fits = value is None or (isinstance(value, str) and not isinstance(value, Number))
        reason = f"it has no text under {under}" if fits else f"{under} is {kind_of(value)}"
        raise UsageError(row.where, reason, f"give every row a question as text, {EXAMPLE}")
    # JSON can spell it; no tokenizer reads it, and no file of results can hold it
    if _SURROGATE.search(value):
        raise UsageError(
            row.where, "its question or answer holds half of a surrogate pair", "write it in UTF-8"
        )
    return str(value)


def read_answer(value: Any, column: str, how: str, needed: bool = True) -> str:
    """The reference answer in a cell.

    Args:
      column: its name; it decides where `how` is "auto".
      how: see `SourceConfig.answer_from`.
      needed: an absent one is an error; else it is "".

    Raises:
      ValueError: no answer is there; the message says why.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = plain_value(value[0])
    if value is None and not needed:
        return ""
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        value = spelled(value)
    if not isinstance(value, str) or not value.strip():
        found = "" if value is None or isinstance(value, str) else f" ({kind_of(value)})"
        under = f"`{column}`" if column else "`answer`"
        raise ValueError(f"it has no text or number under {under}{found}")
    if _SURROGATE.search(value):
        raise ValueError("its question or answer holds half of a surrogate pair")
    if how == "auto":
        how = "hash" if "####" in value else "boxed" if "solution" in column else "text"
    if how == "hash":
        _, mark, behind = value.rpartition("####")
        if not mark:
            raise ValueError(f"its `{column}` has no ####")
        if not behind.strip():
            raise ValueError(f"its `{column}` has nothing behind ####")
        return behind.strip()
    if how == "boxed":
        boxed = last_boxed(value)
        if not boxed:
            raise ValueError(f"its `{column}` has no \\boxed{{}} with an answer")
        return boxed
    return str(value) if how == "text" else value


def spelled(value: Any) -> str:
    """A number of a table as text; 27.0 is "27"."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` (or `\\fbox{...}`) of a text holds; None without a whole one."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, position = 1, match.end()
        while position < len(text) and depth:
            character = text[position]
            if character == "\\":
                position += 1  # an escaped brace opens and closes nothing
            depth += (character == "{") - (character == "}")
            position += 1
        if not depth:
            return text[match.end() : position - 1].strip()
    return None


def _level(row: Row, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Number):
        value = re.sub(r"\.0*$", "", value)  # a table with gaps writes its whole numbers as 3.0
    elif isinstance(value, numbers.Number) and not isinstance(value, bool):
        value = spelled(value)
    if not isinstance(value, str):
        raise UsageError(
            row.where,
            f"its level is {kind_of(value)}, not a number or a text",
            "name another column as `level`",
        )
    return _name(row, "level", value)


def _id(row: Row, value: Any, source: SourceConfig) -> str:
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        value = spelled(value)
    if value is not None and not isinstance(value, str):
        if not source.id:
            return ""  # a column of that name which is no id
        raise UsageError(
            row.where, f"its id is {kind_of(value)}, not a number or a text", "name another column"
        )
    return _name(row, "id", value or "")


def _name(row: Row, field: str, value: str) -> str:
    if len(value) > LONGEST_NAME:
        raise UsageError(
            row.where,
            f"its {field} has {len(value)} characters",
            f"name another column as `{field}`, or shorten it to {LONGEST_NAME}",
        )
    if _SURROGATE.search(value):
        raise UsageError(
            row.where, f"its {field} holds half of a surrogate pair", "write it in UTF-8"
        )
    return value.strip()


def _with_ids(found: list[Problem], source: SourceConfig, repeated: int) -> list[Problem]:
    """Problems with ids: of their column, or the source and the row."""
    if repeated and source.id:
        counted = collections.Counter(p.id for p in found)
        most, times = counted.most_common(1)[0]
        raise UsageError(
            f"id={shown(source.id)} of {shown(source.source)}",
            f"{repeated} rows have an id that an earlier row has, such as {most[:60]!r} "
            f"({times} times)",
            "name a column of unique ids, or leave `id` out: rows are then named by their place",
        )
    if not repeated and all(p.id for p in found):
        return found
    return [dataclasses.replace(p, id=f"{source.name[:LONGEST_NAME]}#{p.line}") for p in found]


def _unreadable(faults: Sequence[tuple[str, str]], rows: int, source: SourceConfig) -> UsageError:
    where, reason = faults[0]
    if len(faults) > 1:
        more = "; ".join(place for place, _ in faults[1:3])
        reason += f"; {len(faults)} of {rows} rows have no answer that can be read (also {more})"
    return UsageError(
        where,
        reason,
        f"correct the rows, {EXAMPLE}; or name another column (answer:), another way to read it "
        f"(answer_from: {', '.join(ANSWER_WAYS)}), or leave them out (unreadable: drop)",
    )


ANSWER_WAYS = ("text", "hash", "boxed")
