"""One problem, and the set that a stage works on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

MATH = "math"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem with its reference answer.

    Attributes:
      index: number within its set.
      level: rank of its level's name among those of the set, from 0.
      seed: the seed that made it (0 for problems from a file).
      question: as shown to the model, before the chat template.
      answer: reference answer.
      task: reasoning-gym dataset name, or "math".
      entry_json: `{"options", "seed", "index"}` that make the full reasoning-gym entry again, for
        scorers that need its metadata; "" for maths.
      line: of the file that it comes from, counted from 1; 0 for generated ones.
      id: what its source calls it; else the source and its row.
      level_name: such as "Level 3" or "Algebra"; "" where the source names none.
      source: as the config names it, such as "gym:chain_sum" or "jsonl:mine.jsonl".
    """

    index: int
    level: int
    seed: int
    question: str
    answer: str
    task: str
    entry_json: str = ""
    line: int = 0
    id: str = ""
    level_name: str = ""
    source: str = ""


def level_title(name: str, level: int = 0) -> str:
    """A level for people: "level 2" for numbers and for what has no name, else the name."""
    name = name or str(level)
    return f"level {name}" if re.fullmatch(r"[0-9]+(\.[0-9]+)?", name) else name


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Different names, with numbers inside them ordered as numbers: "Level 2" before
    "Level 10"."""

    def key(name: str) -> tuple[Any, ...]:
        parts = re.split(r"([0-9]+)", name)
        return tuple((0, int(x), "") if x.isdigit() else (1, 0, x.casefold()) for x in parts), name

    return tuple(sorted(set(names), key=key))


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """The problems of a stage, and where they come from.

    Attributes:
      problems: `problems[i].index == i`.
      level_names: `level_names[p.level]` is the name of the level of `p`.
      record: what rollouts, models and reports keep about it: every source with its settings,
        digest and counts (JSON-able).
    """

    problems: tuple[Problem, ...]
    level_names: tuple[str, ...]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.problems)


def ranked(found: Sequence[Problem]) -> tuple[tuple[Problem, ...], tuple[str, ...]]:
    """The problems numbered from 0, with the ranks of their levels' names; and these names."""
    names = natural_order(p.level_name for p in found)
    rank = {name: number for number, name in enumerate(names)}
    numbered = tuple(
        dataclasses.replace(p, index=index, level=rank[p.level_name])
        for index, p in enumerate(found)
    )
    return numbered, names
