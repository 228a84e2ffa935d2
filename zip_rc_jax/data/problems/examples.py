"""Worked examples: solved problems that come before a question in its prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.data.problems.gym import generated
from zip_rc_jax.data.problems.problem import Problem
from zip_rc_jax.data.problems.sets import example_seeds, problem_set
from zip_rc_jax.runtime.errors import UsageError


def worked_examples(config: ProblemsConfig, count: int) -> Callable[[Problem], list[Problem]]:
    """A function that gives the `count` worked examples of a problem, always the same.

    With `config.examples` they come from there: first those of the problem's own level name, then
    others; the problem itself is never among them. Without, a generated problem gets examples of
    its own generator and level, with seeds that no split has. (A level of few distinct questions
    can still repeat a question of a split.)

    Raises:
      UsageError: a source of examples that cannot be read or has too few; by the function, for a
        problem of a file without `config.examples`.
    """
    if not count:
        return lambda p: []
    if config.examples:
        return _from_sources(config, count)
    found = dict[tuple[str, str], list[Problem]]()
    for source in example_seeds(config):
        levels = len(source.levels) or 1
        pool = generated(source, count * levels)
        for level in range(levels):
            found.setdefault(_key(pool[level]), pool[level::levels])

    def examples(p: Problem) -> list[Problem]:
        if not p.entry_json or _key(p) not in found:
            raise UsageError(
                f"prompt.examples={count} with {shown(p.source or p.task)}",
                "only generators make worked examples, and problems.examples is empty",
                "set problems.examples to a source of solved problems, or prompt.examples=0",
            )
        return found[_key(p)]

    return examples


def _key(p: Problem) -> tuple[str, str]:
    """Generator and options of a generated problem."""
    return p.task, json.dumps(json.loads(p.entry_json)["options"], sort_keys=True)


def _from_sources(config: ProblemsConfig, count: int) -> Callable[[Problem], list[Problem]]:
    sources = tuple(_enough(source, count) for source in config.examples)
    pool = problem_set(dataclasses.replace(config, examples=sources), "examples").problems
    # One more than needed, for the problem itself may be among them.
    if len(pool) <= count:
        raise UsageError(
            f"prompt.examples={count}",
            f"problems.examples has {len(pool)} problems, and {count + 1} are needed",
            "give more of them, or ask for fewer",
        )

    def examples(p: Problem) -> list[Problem]:
        others = [x for x in pool if x.question != p.question]
        same = [x for x in others if x.level_name == p.level_name]
        return [*same, *(x for x in others if x.level_name != p.level_name)][:count]

    return examples


def _enough(source: SourceConfig, count: int) -> SourceConfig:
    """A generator of examples makes as many for each of its levels."""
    endless = source.kind == "gym" and not source.count
    levels = len(source.levels) or 1
    return dataclasses.replace(source, count=(count + 1) * levels) if endless else source
