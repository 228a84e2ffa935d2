"""What an evaluation works on: the held-out problems, or the benchmarks that the config names.

All of it is known, and checked, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import pathlib

from zip_rc_jax.config import PipelineConfig, PromptConfig
from zip_rc_jax.config.benchmarks import HELDOUT, BenchmarkConfig, asked_benchmarks
from zip_rc_jax.config.checks import shown
from zip_rc_jax.config.decode import ANSWERS
from zip_rc_jax.pipeline.problems import (
    HeldOutProblems,
    evaluation_problems,
    heldout_problems,
)
from zip_rc_jax.pipeline.run_dir import run_directory
from zip_rc_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark with its problems.

    Attributes:
      name, title: of the table; "heldout" for `problems.heldout`.
      config: of the whole run, with the problems, the prompt and the samples of the benchmark.
      tries: how often it is decoded.
      heldout: its problems; None for a union, and before `with_problems`.
      union: names of its parts.
      directory: of its report.
      entry: of the table.
    """

    name: str
    title: str
    config: PipelineConfig
    tries: int
    heldout: HeldOutProblems | None
    union: tuple[str, ...]
    directory: pathlib.Path
    entry: BenchmarkConfig = BenchmarkConfig(HELDOUT)

    @property
    def problems(self) -> HeldOutProblems:
        assert self.heldout is not None
        return self.heldout


def heldout_benchmark(config: PipelineConfig, problems: HeldOutProblems | None = None) -> Benchmark:
    """The held-out problems, decoded once. Raises as `evaluation_problems`."""
    directory = run_directory(config) / "report"
    benchmark = Benchmark(HELDOUT, "held-out", config, 1, problems, (), directory)
    return benchmark if problems else with_problems(benchmark)


def evaluation_benchmarks(config: PipelineConfig) -> tuple[Benchmark, ...]:
    """Everything that an evaluation decodes, in order.

    Raises:
      UsageError: an unknown benchmark, problems that cannot be read (see `problem_set`), problems
        that were trained on where that is refused, an id in `evaluate.joint_prompts` that no
        problem has, or an answer that an evaluation cannot show.
    """
    if config.decode.answer not in ANSWERS:
        raise UsageError(
            f"decode.answer={shown(config.decode.answer)} in an evaluation",
            "its tables compare the answers by value and by vote",
            "set decode.answer to value or vote",
        )
    # All names first: a mistake in the last one is told before the first is fetched.
    found = tuple(with_problems(one) for one in planned_benchmarks(config))
    _check_ids(config, found)
    return found


def planned_benchmarks(config: PipelineConfig) -> tuple[Benchmark, ...]:
    """The benchmarks that the config names, or the held-out problems as one, in order. Nothing is
    fetched: their problems are None.

    Raises:
      UsageError: an unknown benchmark, or a setting of one that the config does not allow.
    """
    e, directory = config.evaluate, run_directory(config) / "report"
    if not e.benchmarks:
        return (Benchmark(HELDOUT, "held-out", config, 1, None, (), directory),)
    return tuple(
        Benchmark(
            one.name,
            one.title,
            for_benchmark(config, one),
            one.tries,
            None,
            one.union,
            directory / one.name,
            one,
        )
        for one in asked_benchmarks(e.benchmarks, e.benchmark_table)
    )


def for_benchmark(config: PipelineConfig, benchmark: BenchmarkConfig) -> PipelineConfig:
    """The config of the run with what the table says of a benchmark. Raises UsageError."""
    e = config.evaluate
    evaluate = dataclasses.replace(e, samples=benchmark.samples or e.samples)
    problems = dataclasses.replace(config.problems, heldout=benchmark.problems)
    prompt = with_instruction(config.prompt, benchmark.instruction)
    try:
        return dataclasses.replace(config, evaluate=evaluate, problems=problems, prompt=prompt)
    except UsageError as error:
        value = f"benchmark {benchmark.name}: {error.value}"
        raise UsageError(value, error.reason, error.fix) from None


def with_instruction(prompt: PromptConfig, instruction: str) -> PromptConfig:
    """How prompts are made with the instruction of a benchmark, in every variant. Raw prompts are
    the question alone."""
    if prompt.style == "raw" or not instruction:
        return prompt
    variants = tuple(
        {key: value for key, value in variant.items() if key != "instruction"}
        for variant in prompt.variants
    )
    return dataclasses.replace(prompt, instruction=instruction, variants=variants)


def with_problems(one: Benchmark) -> Benchmark:
    """A planned benchmark with its problems; a union has none of its own.

    Raises UsageError as `evaluation_problems`, with the benchmark's name.
    """
    config = one.config
    if one.union:
        return one
    if one.name == HELDOUT:
        return dataclasses.replace(one, heldout=evaluation_problems(config))
    try:
        found, most = _at_most(config)
    except UsageError as error:
        value = f"benchmark {one.name}: {error.value}"
        raise UsageError(value, error.reason, error.fix) from None
    said = [f"{one.name}: {note}" for note in found.notes]
    if most:
        said.append(
            f"{one.name}: the first {len(found.found)} of {most} problems (evaluate.prompts)"
        )
    if one.entry.instruction and config.prompt.style == "raw":
        said.append(
            f"{one.name}: raw prompts are the question alone, so its instruction is not used "
            "(prompt.style=chat uses it)"
        )
    return dataclasses.replace(one, heldout=dataclasses.replace(found, notes=tuple(said)))


def _at_most(config: PipelineConfig) -> tuple[HeldOutProblems, int]:
    """The problems of a benchmark, at most `evaluate.prompts`; and how many there are if some were
    left out, else 0."""
    most = config.evaluate.prompts
    endless = any(s.kind == "gym" and not s.count for s in config.problems.heldout)
    if not most or endless:
        return evaluation_problems(config), 0
    everything = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, prompts=0)
    )
    size = len(heldout_problems(everything))
    if size <= most:
        return evaluation_problems(everything), 0
    return evaluation_problems(config), size


def _check_ids(config: PipelineConfig, found: tuple[Benchmark, ...]) -> None:
    """Raises UsageError for an id that no problem has."""
    known = {p.id for b in found if b.heldout is not None for p in b.heldout.found.problems}
    unknown = [name for name in config.evaluate.joint_prompts if name not in known]
    if unknown:
        examples = ", ".join(sorted(known - {""})[:3]) or "none"
        raise UsageError(
            f"evaluate.joint_prompts with {shown(unknown[0])}",
            "no problem of this evaluation has that id",
            f"use ids such as {examples[:200]}",
        )
