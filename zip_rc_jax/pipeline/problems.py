"""The problems of the stages: what is trained on, what is held out, and what is told about both.

All of it is known before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.config.benchmarks import asked_benchmarks
from zip_rc_jax.data.problems import MATH, Problem, ProblemSet, problem_set, with_seeds
from zip_rc_jax.data.problems.hub import needs_network
from zip_rc_jax.data.problems.overlap import HeldOut
from zip_rc_jax.data.problems.sets import open_source
from zip_rc_jax.data.rollouts import RolloutSource
from zip_rc_jax.grading.grader import Grader
from zip_rc_jax.pipeline.run_dir import run_directory, source_path
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import console
from zip_rc_jax.runtime.working_copy import refresh

MOST_WORDS = 15  # of an answer; more read as a worked solution
_PLAIN_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
# In the directory of a training stage: where rollouts from elsewhere lay.
TRAINED_ON = "trained_on.json"
GIVE_HELDOUT = (
    "set problems.heldout to what it is to be evaluated on, such as "
    "problems.heldout={source: 'hf:openai/gsm8k/main', split: test}"
)


def readable(answers: Sequence[str]) -> list[bool]:
    """Which reference answers the grader of mathematics can read: a response that states the answer
    as it stands is right, and it is no worked solution."""
    with Grader() as grader:

        @functools.cache
        def fits(answer: str) -> bool:
            if _PLAIN_NUMBER.fullmatch(answer):
                return True  # as most are, and the grader takes a millisecond
            if len(_WORD.findall(answer)) > MOST_WORDS:
                return False
            problem = Problem(0, 0, 0, "", answer, MATH)
            return grader.score(problem, f"Answer: \\boxed{{{answer}}}") == 1.0

        return [fits(answer) for answer in answers]


def heldout_problems(config: PipelineConfig, more: int = 0) -> ProblemSet:
    """The `evaluate.prompts` held-out problems, and `more` behind them. Raises as `problem_set`."""
    count = config.evaluate.prompts
    return problem_set(config.problems, "heldout", count + more if count else 0, readable=readable)


def live_problem(config: PipelineConfig) -> Problem:
    """A hard held-out problem for a demonstration: behind those of the evaluation where there are
    more, else the last of the hardest level."""
    sources = with_seeds(config.problems).heldout
    if all(source.kind == "gym" and not source.count for source in sources):
        more = 4 * sum(max(1, len(source.levels)) for source in sources)
        return heldout_problems(config, more).problems[-1]
    return max(heldout_problems(config).problems, key=lambda p: (p.level, p.index))


def protected(config: PipelineConfig) -> tuple[Problem, ...]:
    """The problems that no training problem may repeat: the held-out ones that an evaluation with
    this config would take, and all problems of its benchmarks.

    Without those of sources that are not given, or whose number of generated problems is not known
    yet; the evaluation compares them with what was trained on.
    """
    e = config.evaluate
    found = list(heldout_problems(config).problems) if _is_known(config) else []
    for one in asked_benchmarks(e.benchmarks, e.benchmark_table):
        problems = dataclasses.replace(config.problems, heldout=one.problems)
        everything = dataclasses.replace(e, prompts=0)
        benchmark = dataclasses.replace(config, problems=problems, evaluate=everything)
        if one.problems and _is_known(benchmark):
            found += heldout_problems(benchmark).problems
    return tuple(found)


def _is_known(config: PipelineConfig) -> bool:
    """Whether there are held-out sources, and how many problems an evaluation takes."""
    sources = with_seeds(config.problems).heldout
    endless = any(source.kind == "gym" and not source.count for source in sources)
    return bool(sources) and (not endless or config.evaluate.prompts > 0)


def check_local_sources(config: PipelineConfig) -> None:
    """Where a source needs the network, all others are read before it: a mistake in them is found
    at once. Raises as `open_source`."""
    p = with_seeds(config.problems)
    sources = [*p.train, *p.heldout, *p.examples]
    if any(map(needs_network, sources)):
        for source in sources:
            if not needs_network(source):
                open_source(source).take(1)


def training_problems(config: PipelineConfig, count: int) -> ProblemSet:
    """The first `count` training problems (0: all), without those that are held out.

    Tells what was left out. Raises as `problem_set`.
    """
    check_local_sources(config)
    found = problem_set(config.problems, "train", count, avoid=protected(config), readable=readable)
    for note in notes(found):
        tell(note)
    return found


def notes(found: ProblemSet) -> list[str]:
    """What is worth saying about a set of problems."""
    said, record = list[str](), found.record
    parts = [record, *record["sources"]]
    equal = sum(part.get("repeat_heldout", 0) for part in parts)
    contained = sum(part.get("contain_heldout", 0) for part in parts)
    if equal or contained:
        kept = record["overlap"] == "keep"
        said.append(
            f"{'warning: ' if kept else ''}{equal + contained} training problems are held-out ones "
            f"({equal} have the same question, {contained} contain one) and "
            + ("stay (problems.overlap=keep)" if kept else "were left out")
        )
    for part in record["sources"]:
        if dropped := part.get("unreadable", 0):
            said.append(f"{dropped} rows of {part['source']} have no readable answer: left out")
        if repeated := part.get("repeated_ids", 0):
            said.append(
                f"{repeated} rows of {part['source']} repeat an id: rows are named by their place"
            )
    generated = all(part["source"].startswith("gym:") for part in record["sources"])
    if (again := record.get("repeated_questions", 0)) and not generated:
        said.append(f"{again} of {len(found)} problems have the question of an earlier one")
    return said


def tell(text: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.is_primary():
        style = "yellow" if text.startswith("warning") else None
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def sources_of(config: PipelineConfig) -> dict[str, object]:
    """The section `problems` with its seeds, for records."""
    seeded = with_seeds(config.problems)
    return {
        "train": [source.to_dict() for source in seeded.train],
        "heldout": [source.to_dict() for source in seeded.heldout],
        "examples": [source.to_dict() for source in seeded.examples],
        "overlap": seeded.overlap,
        "ngram": seeded.ngram,
    }


# What a run was trained on.


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What the final model of a run directory was trained on.

    Attributes:
      sources: as `SourceConfig.source`; () where it is a table of rollouts from elsewhere.
      title: for people.
    """

    sources: tuple[str, ...]
    title: str


def trained_on(config: PipelineConfig, stage: str = "final") -> TrainedOn | None:
    """From the record that training left in `run_dir/STAGE`; None where there is none.

    The records of 0.1 and 0.2 name a task.
    """
    path = run_directory(config) / stage / "settings.json"
    refresh(path)
    refresh(path.with_name(TRAINED_ON))
    try:
        data = json.loads(path.read_bytes())["source"]["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    while isinstance(data, dict) and (parent := data.get("graded") or data.get("rollouts")):
        data = parent
    if not isinstance(data, dict):
        return None
    if isinstance(record := data.get("problems"), dict):
        names = tuple(dict.fromkeys(part["source"] for part in record["sources"]))
        return TrainedOn(names, f"{record['problems']} problems of {', '.join(names)}")
    if isinstance(task := data.get("task"), dict):
        return TrainedOn((f"gym:{task.get('name')}",), f"problems of gym:{task.get('name')}")
    if digest := data.get("parquet"):
        try:
            name = json.loads(path.with_name(TRAINED_ON).read_bytes())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            name = "a Parquet table"
        return TrainedOn((), f"the rollouts of {name} (digest {digest})")
    return None


@dataclasses.dataclass(frozen=True)
class HeldOutProblems:
    """What an evaluation works on, and what it says about it.

    Attributes:
      found: the problems.
      notes: for the output and the report.
      record: for `metadata.json`: the sources, what was trained on, and how many problems were.
    """

    found: ProblemSet
    notes: tuple[str, ...]
    record: dict[str, Any]


def evaluation_problems(config: PipelineConfig) -> HeldOutProblems:
    """The held-out problems of an evaluation, compared with what the run was trained on.

    Raises:
      UsageError: `problems.heldout` is empty and the run was trained on anything but the generators
        of `problems.train`; held-out problems were trained on and `problems.overlap` is "refuse";
        or see `problem_set`.
    """
    trained = trained_on(config)
    if not config.problems.heldout:
        _check_default(config, trained)
    check_local_sources(config)
    found = heldout_problems(config)
    names = tuple(dict.fromkeys(part["source"] for part in found.record["sources"]))
    said = list[str]()
    record: dict[str, Any] = {"evaluated": found.record}

    # Trained on X, evaluated on Y.
    if trained is not None:
        record["trained"] = {"sources": list(trained.sources), "title": trained.title}
        other = set(names) != set(trained.sources)
        said.append(
            f"trained on {trained.title}, evaluated on {len(found)} "
            + (f"problems of {', '.join(names)}" if other else "held-out problems of the same")
        )

    # The same problem in both.
    questions, reason = trained_questions(config)
    if questions is None:
        said += [reason] if reason else []
    else:
        seen = HeldOut([p.question for p in found.problems], config.problems.ngram).seen_in(
            questions
        )
        record["seen_in_training"] = int(seen.sum())
        if seen.any():
            said.append(_seen(config, found, seen))
    return HeldOutProblems(found, (*said, *notes(found)), record)


def _check_default(config: PipelineConfig, trained: TrainedOn | None) -> None:
    """Raises UsageError where the generators of `problems.train` are not what was trained on."""
    if config.data:
        raise UsageError(
            f"problems.heldout=[] with data={config.data!r}",
            "the training problems are those of that file, and it has no held-out ones",
            GIVE_HELDOUT,
        )
    configured = {source.source for source in config.problems.train}
    if trained is not None and configured and set(trained.sources) != configured:
        raise UsageError(
            "problems.heldout=[]",
            f"{run_directory(config) / 'final'} was trained on {trained.title}, not on "
            f"problems.train ({', '.join(sorted(configured))})",
            GIVE_HELDOUT,
        )


def _seen(config: PipelineConfig, found: ProblemSet, seen: np.ndarray) -> str:
    """A warning. Raises UsageError if such problems are refused."""
    first = found.problems[int(np.flatnonzero(seen)[0])]
    said = f"{int(seen.sum())} of {len(found)} held-out problems were trained on"
    if config.problems.overlap == "refuse":
        raise UsageError(
            said,
            f"such as {first.id}",
            "evaluate on others, train again without them, or set problems.overlap=keep",
        )
    return f"warning: {said}, such as {first.id}"


def trained_questions(config: PipelineConfig) -> tuple[list[str] | None, str]:
    """The different questions of the rollouts of the run (or of `config.data`); None where they are
    not there, and why if that is worth saying."""
    path = source_path(config, "rollouts")
    if not path.exists():
        return None, ""
    try:
        rollouts = _open(path)
        return list(dict.fromkeys(rollout.question for rollout in rollouts)), ""
    except UsageError as error:
        return None, f"training and held-out problems were not compared: {error.reason}"


def _open(path: pathlib.Path) -> Any:
    if path.is_dir() and not any(path.glob("*.parquet")):
        return RolloutSource(path)
    from zip_rc_jax.data.parquet import open_rollouts  # needs pyarrow

    return open_rollouts(path)[0]
