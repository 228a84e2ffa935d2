"""The held-out comparison: every method decoded online on the same problems, graded by the task's
scorer, under one cost meter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.evaluation.benchmark_table import (
    BenchmarkTable,
    Measured,
    benchmark_table,
    write_table,
)
from zip_rc_jax.evaluation.explored import INTROSPECTION, introspection_rows
from zip_rc_jax.evaluation.report import (
    Evaluation,
    pool_rows,
    result_rows,
    write_index,
    write_report,
)
from zip_rc_jax.grading.custom import grader_of
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation import stages
from zip_rc_jax.pipeline.evaluation.benchmarks import (
    Benchmark,
    evaluation_benchmarks,
    heldout_benchmark,
)
from zip_rc_jax.pipeline.problems import HeldOutProblems
from zip_rc_jax.pipeline.provenance import prompt_record
from zip_rc_jax.pipeline.run_dir import in_run_dir, load_policy, run_directory
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import run_metadata, write_json, write_jsonl


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
      evaluations: by the name of the benchmark; unions have none of their own.
      table: methods x benchmarks.
    """

    evaluations: dict[str, Evaluation]
    table: BenchmarkTable


def evaluate(
    config: PipelineConfig,
    lm: LanguageModel,
    *,
    argv: Sequence[str],
    lite: LanguageModel | None = None,
    problems: HeldOutProblems | None = None,
) -> Evaluation:
    """Decodes the held-out problems with every method, and writes report, plots, `results.jsonl`,
    `pool.jsonl` and `metadata.json`, and the table.

    Args:
      config: all but the sections of training and rollouts; the report goes to `run_dir/report`.
      lm: the final model. All others are put on its devices.
      argv: the command, for the record.
      lite: the ZIP-RC-Lite model, whose drift and predictions are shown next to the full one's.
      problems: what `evaluation_problems(config)` gave; None asks it.
    """
    benchmark = heldout_benchmark(config, problems)
    report = evaluate_benchmarks(config, lm, argv=argv, lite=lite, benchmarks=(benchmark,))
    return report.evaluations[benchmark.name]


@in_run_dir("evaluate")
def evaluate_benchmarks(
    config: PipelineConfig,
    lm: LanguageModel,
    *,
    argv: Sequence[str],
    lite: LanguageModel | None = None,
    benchmarks: Sequence[Benchmark] | None = None,
) -> EvaluationReport:
    """Evaluates every benchmark, and writes a report for each and one table for all.

    Args:
      benchmarks: what `evaluation_benchmarks(config)` gave; None asks it. The rest as in
        `evaluate`.

    Raises:
      UsageError: a model without a head; and see `evaluation_benchmarks`, `SelfEvaluation`,
        `RewardModelScorer` and `EvaluationRunner.decode`.
    """
    if lm.head is None:
        raise UsageError(
            "model without a ZIP head",
            "there is nothing to evaluate",
            "train one with `zip-rc train --stage final`",
        )
    started, directory = time.time(), run_directory(config) / "report"
    every = evaluation_benchmarks(config) if benchmarks is None else tuple(benchmarks)
    decoded = [one for one in every if not one.union]
    models = stages.Models(lm, load_policy(config, lm.layout, config.dtype), lite)
    # What must be refused is refused for all benchmarks before one is decoded.
    others = [
        stages.opinions(one.config, models.lm, one.problems.found.problems) for one in decoded
    ]

    found = dict[str, Evaluation]()
    for one, judges in zip(decoded, others, strict=True):
        with grader_of(one.config.grade, directory.parent) as grader:
            decodes = stages.decode(one, models, grader)
        heads = stages.predict(one, models, decodes)
        curves, asked = stages.measure(one, models, decodes, heads, judges)
        evaluation = stages.compare(one, models, decodes, heads, curves, asked)
        # The clock of the metadata stops here, when everything has been decoded and compared.
        record = run_metadata(to_dict(one.config), argv, started)
        record |= {"problems": one.problems.record, "notes": list(one.problems.notes)}
        if one.tries > 1:
            record |= {"tries": one.tries}
        found[one.name] = dataclasses.replace(evaluation, metadata=record)
        _write(one, lm, found[one.name])

    table = _table(config, every, found)
    metadata = run_metadata(to_dict(config), argv, started)
    notes = [note for one in decoded for note in one.problems.notes]
    write_table(directory, table, metadata | {"notes": notes})
    if config.evaluate.benchmarks:
        write_index(directory, table, metadata | {"notes": notes}, list(found))
    return EvaluationReport(found, table)


def _table(
    config: PipelineConfig, every: Sequence[Benchmark], found: dict[str, Evaluation]
) -> BenchmarkTable:
    """The table of all benchmarks, a union after its parts."""
    e, measured = config.evaluate, dict[str, Measured]()
    for one in every:
        values: dict[str, Any] = {"parts": tuple(measured[part] for part in one.union)}
        if not one.union:
            mine = found[one.name]
            values = {"pool": mine.pool, "curves": mine.curves, "runs": mine.runs}
        measured[one.name] = Measured(one.name, one.title, **values)
    return benchmark_table(
        list(measured.values()),
        alphas=e.alphas,
        headline_beta=e.headline_beta,
        answer=config.decode.answer,
        resamples=e.bootstrap,
        seed=e.seed,
        predictions={name: mine.predictions for name, mine in found.items()},
    )


def _write(one: Benchmark, lm: LanguageModel, evaluation: Evaluation) -> None:
    """The files of one benchmark."""
    title = "ZIP-RC evaluation"
    if one.config.evaluate.benchmarks:
        title = f"{title}: {one.title}"
    questions = [p.question for p in one.problems.found.problems]
    write_report(one.directory, evaluation, title, questions)
    write_jsonl(
        one.directory / "results.jsonl", result_rows(evaluation.runs, evaluation.pool, questions)
    )
    write_jsonl(one.directory / "pool.jsonl", pool_rows(evaluation.pool))
    told = introspection_rows(evaluation.searches)
    if told:
        write_jsonl(one.directory / INTROSPECTION, told)
    record = {
        **evaluation.metadata,
        **prompt_record(one.config, lm.tokenizer),
        "quality": evaluation.quality,
        "drift": evaluation.drift,
        "predictions": evaluation.predictions,
    }
    write_json(one.directory / "metadata.json", record)
