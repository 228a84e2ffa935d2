"""A set of problems as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from zip_rc_jax.data.problems import Problem, ProblemSet, level_title

LONGEST = 400  # characters of a question that are shown
_TOLD = ("source", "problems", "digest", "columns", "rows", "files", "filtered", "levels")


def lines(found: ProblemSet, split: str, show: int) -> Iterator[str]:
    """Sources, levels, and the first `show` problems."""
    record = found.record
    yield f"{split}: {len(found)} problems"
    for part in record["sources"]:
        yield f"  {_source(part)}"
    counts = Counter(p.level for p in found.problems)
    levels = [
        f"{level_title(name, level)} ({counts[level]})"
        for level, name in enumerate(found.level_names)
    ]
    if len(levels) > 1:
        yield f"levels: {', '.join(levels[:30])}{', ...' if len(levels) > 30 else ''}"
    for p in found.problems[:show]:
        yield from _problem(p)


def _source(part: dict[str, Any]) -> str:
    told = [f"{part['source']}: {part['problems']} problems"]
    if "rows" in part:
        told.append(f"of {part['rows']} rows")
    if part.get("filtered"):
        told.append(f"{part['filtered']} left out by the filter")
    if files := part.get("files"):
        told.append(f"{len(files)} files")
    for field, columns in part.get("columns", {}).items():
        told.append(f"{field} from {' and '.join(f'`{name}`' for name in columns)}")
    told += [f"{name}={value}" for name, value in part.items() if name not in _TOLD]
    return ", ".join([*told, f"digest {part['digest']}"])


def _problem(p: Problem) -> Iterator[str]:
    question = p.question if len(p.question) <= LONGEST else f"{p.question[:LONGEST]}..."
    yield f"\n{p.id} ({level_title(p.level_name, p.level)})"
    yield f"question: {question}"
    yield f"answer:   {p.answer}"
