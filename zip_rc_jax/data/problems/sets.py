"""The problems of a stage, from all the sources that the config names for it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import ProblemsConfig, SourceConfig
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.problems import GYM_SEEDS
from zip_rc_jax.data.problems.columns import Row, read_rows
from zip_rc_jax.data.problems.files import file_rows
from zip_rc_jax.data.problems.gym import generated
from zip_rc_jax.data.problems.hub import hub_rows, needs_network
from zip_rc_jax.data.problems.mixture import interleaved
from zip_rc_jax.data.problems.overlap import HeldOut
from zip_rc_jax.data.problems.problem import Problem, ProblemSet, ranked
from zip_rc_jax.data.problems.tfds import tfds_rows
from zip_rc_jax.runtime.errors import UsageError

SPLITS = ("train", "heldout", "examples")
MOST_TRIES = 20  # problems that a generator makes for each that is wanted and no repeat


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source has.

    Attributes:
      config: its settings.
      size: how many problems; None for a generator without end.
      take: the first problems, as many as asked for and there are.
      notes: for the record: files, revision, columns, rows.
    """

    config: SourceConfig
    size: int | None
    take: Callable[[int], Sequence[Problem]]
    notes: dict[str, Any]


def with_seeds(config: ProblemsConfig) -> ProblemsConfig:
    """The same section with a first seed for every generator, and with held-out sources.

    Training begins at 0. Held-out seeds follow all training seeds, those of worked examples follow
    both. Where no held-out source is given, the generators of `train` make them.

    Raises:
      UsageError: held-out seeds that training has too.
    """
    train = tuple(_seeded(source, 0) for source in config.train)
    past = max((s.seed + s.span for s in _gyms(train)), default=GYM_SEEDS)
    first = min((s.seed for s in _gyms(train)), default=0)
    # The same generators further on, with the same distances between them.
    heldout = tuple(_seeded(source, past) for source in config.heldout) or (
        tuple(_moved(s, past - first) for s in train) if _generated_alone(train) else ()
    )
    past = max((s.seed + s.span for s in (*_gyms(train), *_gyms(heldout))), default=2 * GYM_SEEDS)
    for one in _gyms(train):
        for other in _gyms(heldout):
            if one.name == other.name and (
                one.seed < other.seed + other.span and other.seed < one.seed + one.span
            ):
                raise UsageError(
                    f"problems.heldout {other.source} with seed={other.seed}, span={other.span}",
                    f"training has seeds {one.seed} to {one.seed + one.span - 1} of it",
                    f"leave seed out, or use one from {past} on",
                )
    examples = tuple(_seeded(source, past) for source in config.examples)
    return dataclasses.replace(config, train=train, heldout=heldout, examples=examples)


def example_seeds(config: ProblemsConfig) -> tuple[SourceConfig, ...]:
    """The generators of training and evaluation with seeds for worked examples, which neither
    has."""
    config = with_seeds(config)
    gyms = [*_gyms(config.train), *_gyms(config.heldout)]
    past = max((s.seed + s.span for s in gyms), default=0)
    found = list[SourceConfig]()
    for sources in (config.train, config.heldout):
        first = min((s.seed for s in _gyms(sources)), default=0)
        found += [_moved(s, past - first) for s in _gyms(sources)]
    return tuple(found)


def _gyms(sources: Iterable[SourceConfig]) -> list[Any]:
    """The generators, whose seed is set."""
    return [source for source in sources if source.kind == "gym"]


def _generated_alone(sources: Sequence[SourceConfig]) -> bool:
    return all(source.kind == "gym" for source in sources)


def _seeded(source: SourceConfig, seed: int) -> SourceConfig:
    unset = source.kind == "gym" and source.seed is None
    return dataclasses.replace(source, seed=seed) if unset else source


def _moved(source: SourceConfig, by: int) -> SourceConfig:
    return dataclasses.replace(source, seed=(source.seed or 0) + by)


# Which of some reference answers a grader can read.
Readable = Callable[[Sequence[str]], Sequence[bool]]


def open_source(config: SourceConfig, readable: Readable | None = None) -> Source:
    """What a source has: a file is read whole, a generator makes what it is asked for.

    Args:
      readable: see `problem_set`.

    Raises:
      UsageError: see `generated`, `file_rows`, `hub_rows`, `tfds_rows` and `read_rows`.
    """
    if config.kind == "gym":
        return Source(config, config.count or None, functools.partial(_generate, config), {})
    rows, notes = _rows(config)
    read = read_rows(rows, config, readable=readable)
    found = read.problems
    if config.shuffle is not None:
        order = np.random.default_rng(config.shuffle).permutation(len(found))
        found = [found[i] for i in order]
    if config.count > len(found):
        raise UsageError(
            f"count={config.count} of {shown(config.source)}",
            f"it has {len(found)} problems",
            f"use {len(found)} or fewer, or 0 for all",
        )
    found = found[: config.count or None]
    counted = {"filtered": read.filtered, "unreadable": len(read.unreadable)}
    counted |= {"repeated_ids": read.repeated_ids}
    notes |= {"rows": read.rows, "columns": read.columns}
    notes |= {name: n for name, n in counted.items() if n}
    return Source(config, len(found), lambda count: found[:count], notes)


def _generate(config: SourceConfig, count: int) -> list[Problem]:
    return generated(config, min(count, config.count or count))


def _rows(config: SourceConfig) -> tuple[list[Row], dict[str, Any]]:
    if config.kind in ("jsonl", "csv", "parquet"):
        rows, files = file_rows(config)
        return rows, {"files": files} if len(files) > 1 else {}
    return hub_rows(config) if config.kind == "hf" else tfds_rows(config)


def without_repeats_of(heldout: HeldOut, source: Source) -> Source:
    """The problems of a source that repeat no held-out question.

    A generator makes the next ones in their place.

    Raises:
      UsageError: (by `take`) a generator makes hardly anything else.
    """
    if source.size is not None and source.config.kind != "gym":
        found = source.take(source.size)
        repeats = heldout.repeated_by([p.question for p in found])
        kept = [p for p, again in zip(found, repeats.any, strict=True) if not again]
        notes = source.notes | _counted(repeats)
        return Source(source.config, len(kept), lambda count: kept[:count], notes)
    notes = dict(source.notes)

    def take(count: int) -> Sequence[Problem]:
        made, kept = count, list[Problem]()
        while True:
            found = source.take(made)
            repeats = heldout.repeated_by([p.question for p in found])
            kept = [p for p, again in zip(found, repeats.any, strict=True) if not again]
            if len(kept) >= count or len(found) < made:
                break
            if made > MOST_TRIES * count:
                raise UsageError(
                    f"{count} problems of {source.config.source}",
                    f"{made - len(kept)} of {made} that it made are held-out questions",
                    "give it levels with more different questions, ask for fewer, or set "
                    "problems.overlap=keep",
                )
            made = min(2 * made + 16, source.size or 2 * made + 16)
        notes.update(_counted(repeats))
        return kept[:count]

    return Source(source.config, source.size, take, notes)


def _counted(repeats: Any) -> dict[str, int]:
    found = {"repeat_heldout": repeats.equal, "contain_heldout": repeats.contained}
    return {name: n for name, n in found.items() if n}


def problem_set(
    config: ProblemsConfig,
    split: str,
    count: int = 0,
    *,
    avoid: Sequence[Problem] = (),
    readable: Readable | None = None,
) -> ProblemSet:
    """The problems of a split: of all its sources, mixed by their weights.

    The first `k` problems do not depend on `count`.

    Args:
      split: "train", "heldout" or "examples".
      count: how many; 0 for all.
      avoid: held-out problems. Training problems that repeat one are left out, refused or kept, as
        `config.overlap` says; the record counts them.
      readable: says which reference answers of files a grader can read. The others are refused or
        left out, as `unreadable` of their source says.

    Raises:
      UsageError: an unknown split or one without sources; more problems than there are; a source
        that cannot be read (see `open_source`); overlaps with overlap="refuse".
    """
    if split not in SPLITS:
        raise UsageError(
            f"split={split!r}", f"the splits are {', '.join(SPLITS)}", "use one of them"
        )
    if count < 0:
        raise UsageError(f"count={count}", "it counts problems", "use a number >= 0")
    sources: tuple[SourceConfig, ...] = getattr(with_seeds(config), split)
    if not sources:
        raise _no_sources(config, split)

    # Sources: those that may wait for a network come last, after the mistakes of all others.
    later = sorted(range(len(sources)), key=lambda i: needs_network(sources[i]))
    read = {i: open_source(sources[i], readable) for i in later}
    opened = [read[i] for i in range(len(sources))]
    overlap: dict[str, Any] = {}
    if avoid:
        heldout = HeldOut([p.question for p in avoid], config.ngram)
        overlap = {"overlap": config.overlap, "heldout": len(avoid)}
        if config.overlap == "drop":
            opened = [without_repeats_of(heldout, source) for source in opened]
            _check_left(opened)

    # Mixture.
    order = interleaved(
        [_label(source) for source in opened],
        [source.config.weight for source in opened],
        [source.size for source in opened],
        count,
    )
    wanted = [order.count(number) for number in range(len(opened))]
    taken = [list(source.take(number)) for source, number in zip(opened, wanted, strict=True)]
    _check_taken(opened, taken, wanted)
    if len(opened) > 1:
        taken = [[_named_level(p) for p in part] for part in taken]
    parts = [iter(part) for part in taken]
    problems, names = ranked([next(parts[number]) for number in order])

    # Record.
    if avoid and config.overlap != "drop":
        repeats = heldout.repeated_by([p.question for p in problems])
        overlap |= _counted(repeats)
        if config.overlap == "refuse" and repeats.any.any():
            raise _refused(problems, avoid, repeats)
    described = [
        source.config.to_dict() | source.notes | {"problems": len(part), "digest": _digest(part)}
        for source, part in zip(opened, taken, strict=True)
    ]
    questions = len({p.question for p in problems})
    record = {"split": split, "problems": len(problems), "sources": described} | overlap
    if questions < len(problems):
        record["repeated_questions"] = len(problems) - questions
    return ProblemSet(problems, names, record)


def _label(source: Source) -> str:
    """Its name, for a message about its size."""
    left_out = sum(source.notes.get(n, 0) for n in ("repeat_heldout", "contain_heldout"))
    held = f" (without {left_out} held-out ones)" if left_out and source.size is not None else ""
    return f"{source.config.source}{held}"


def _no_sources(config: ProblemsConfig, split: str) -> UsageError:
    if split == "heldout" and config.train:
        names = ", ".join(source.source for source in config.train if source.kind != "gym")
        return UsageError(
            "problems.heldout=[]",
            f"evaluation takes no other problems than those asked for, and {names} has no held-out "
            "part of its own",
            "set problems.heldout to a source, such as hf:openai/gsm8k/main with split: test",
        )
    return UsageError(
        f"problems.{split}=[]",
        "there are no problems to work on",
        f"set problems.{split}, such as problems.{split}=jsonl:mine.jsonl or gym:chain_sum",
    )


def _named_level(p: Problem) -> Problem:
    """Levels of several generators are told apart by their names."""
    return dataclasses.replace(p, level_name=f"{p.task} {p.level_name}") if p.entry_json else p


def _check_left(opened: Sequence[Source]) -> None:
    for source in opened:
        if source.size == 0:
            raise UsageError(
                f"problems.train {shown(source.config.source)}",
                "every problem of it is a held-out one",
                "train on others, or set problems.overlap=keep",
            )


def _check_taken(
    opened: Sequence[Source], taken: Sequence[Sequence[Problem]], wanted: Sequence[int]
) -> None:
    for source, part, number in zip(opened, taken, wanted, strict=True):
        if len(part) < number:
            raise UsageError(
                f"{number} problems of {shown(source.config.source)}",
                f"{len(part)} of its {source.config.count} are no held-out ones",
                "raise its count, or ask for fewer",
            )


def _refused(problems: Sequence[Problem], avoid: Sequence[Problem], repeats: Any) -> UsageError:
    first = int(np.flatnonzero(repeats.any)[0])
    p, other = problems[first], avoid[int(repeats.of[first])]
    return UsageError(
        f"{int(repeats.any.sum())} of {len(problems)} training problems",
        f"they are held-out ones: {p.id} is {other.id} of {other.source}, {shown(p.question)}",
        "leave them out (problems.overlap=drop), or evaluate on others",
    )


def _digest(found: Sequence[Problem]) -> str:
    """Of the content that a source gave."""
    hasher = hashlib.blake2b(digest_size=16)
    for p in found:
        parts = [p.question, p.answer, p.level_name, p.id]
        hasher.update(json.dumps(parts).encode() + b"\n")
    return hasher.hexdigest()
