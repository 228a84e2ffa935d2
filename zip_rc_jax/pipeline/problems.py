"""The problems of the stages: what is trained on, what is held out, and what is told about both."""

from __future__ import annotations

import dataclasses

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.problems import Problem, ProblemSet, problem_set, with_seeds
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.progress import console


def heldout_problems(config: PipelineConfig, more: int = 0) -> ProblemSet:
    """The `evaluate.prompts` held-out problems, and `more` behind them. Raises as `problem_set`."""
    count = config.evaluate.prompts
    return problem_set(config.problems, "heldout", count + more if count else 0)


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
    this config would take."""
    sources = with_seeds(config.problems).heldout
    endless = any(source.kind == "gym" and not source.count for source in sources)
    if not sources or (endless and not config.evaluate.prompts):
        return ()  # how many will be taken is not known yet; the evaluation compares them then
    return heldout_problems(config).problems


def training_problems(config: PipelineConfig, count: int) -> ProblemSet:
    """The first `count` training problems (0: all), without those that are held out.

    Tells what was left out. Raises as `problem_set`.
    """
    found = problem_set(config.problems, "train", count, avoid=protected(config))
    for note in notes(found):
        tell(note)
    return found


def notes(found: ProblemSet) -> list[str]:
    """What is worth saying about a set of training problems."""
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
                f"{repeated} rows of {part['source']} repeat an id: rows are named by place"
            )
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


def resolved(config: PipelineConfig) -> PipelineConfig:
    """The config with a first seed for every generator."""
    return dataclasses.replace(config, problems=with_seeds(config.problems))
