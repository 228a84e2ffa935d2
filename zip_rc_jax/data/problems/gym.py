"""Problems that reasoning-gym generates: exact answers, level by level."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from zip_rc_jax.config import SourceConfig
from zip_rc_jax.data.problems.problem import Problem
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.settings import nearest

# reasoning-gym 0.1.25 iterates over sets of strings here, so the same seed gives other problems in
# every process.
HASH_DEPENDENT = (
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)


def generated(source: SourceConfig, count: int) -> list[Problem]:
    """The first `count` problems of a generator, round-robin over its levels.

    Every level owns a range of seeds, its part of `source.span`. So problem `i` does not depend on
    `count`, and two sources with other seeds never generate the same entry. (Two seeds can still
    produce the same question where a level has few distinct ones.) The name of a level is its
    number.

    Raises:
      UsageError: unknown dataset or option; an option value that the dataset refuses; more problems
        than the source has seeds; or a dataset in `HASH_DEPENDENT` without PYTHONHASHSEED.
    """
    levels, first = source.levels or ({},), source.seed or 0
    per_level, stride = -(-count // len(levels)), source.span // len(levels)
    if per_level > stride:
        raise UsageError(
            f"{count} problems of {source.source} with span={source.span}",
            f"{len(levels)} levels have {stride} seeds each, and {per_level} are needed",
            f"set span to {per_level * len(levels)} or more",
        )
    starts = [first + level * stride for level in range(len(levels))]
    names = [str(options.get("name", source.name)) for options in levels]
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
        seed = starts[level] + position
        result.append(
            Problem(
                index,
                level,
                seed,
                entry["question"],
                str(entry["answer"]),
                names[level],
                json.dumps(reference),
                id=f"{names[level]}#{seed}",
                level_name=str(level),
                source=source.source,
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
            f"generator {name!r}",
            "reasoning-gym has no such dataset",
            nearest(name, sorted(DATASETS), "known are", 3),
        )
    if name in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise UsageError(
            f"generator {name!r}",
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
                f"levels option {key!r}",
                "seeds and sizes follow from the split and the number of problems",
                "remove it from the level",
            )
        if key not in known:
            raise UsageError(
                f"levels option {key!r} of {name}",
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
        f"levels {options} of {name}", str(error) or type(error).__name__, "correct the value"
    )
