"""`zip-rc evaluate`: the search against its baselines on held-out problems."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_stage_parser, read_config
from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.runtime.errors import UsageError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_stage_parser(
        commands,
        "evaluate",
        "compare the search with its baselines on held-out problems",
        "Decodes `evaluate.prompts` held-out problems online with every setting of the sweep and "
        "with the baselines,\n"
        "under one cost meter, on all accelerators of the host.\n"
        "Output: run_dir/report with report.html (the explorer), pareto.png, results.jsonl, "
        "pool.jsonl, metadata.json,\n"
        "and the table of methods and benchmarks: table.json, table.csv, table.md, table.tex. With "
        "benchmarks, each has a directory there.\n"
        "Finished settings and tries survive Ctrl-C.\n\n"
        "example: zip-rc evaluate configs/chain_sum.yaml evaluate.prompts=800\n"
        "example: zip-rc evaluate configs/qwen3_1.7b.yaml --benchmarks gsm8k,math500,mixed",
        together=False,
    )
    add_benchmarks(parser, "evaluate")


def add_benchmarks(parser: argparse.ArgumentParser, verb: str) -> None:
    """The flag `--benchmarks`, see `benchmark_overrides`."""
    parser.add_argument(
        "--benchmarks",
        metavar="NAME,NAME,...",
        help=f"{verb} on these instead of problems.heldout: gsm8k, math500, amc23, aime24, "
        "aime25, mixed, or those of a table of your own (evaluate.benchmark_table=PATH). For "
        "fewer tries: evaluate.benchmarks=[{name: gsm8k, tries: 1}]",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    arguments.overrides += benchmark_overrides(arguments.benchmarks)
    run_evaluation(read_config(arguments), argv)


def benchmark_overrides(names: str | None) -> list[str]:
    """The override that `--benchmarks NAMES` stands for. Raises UsageError for no name."""
    if names is None:
        return []
    each = [name.strip() for name in names.split(",") if name.strip()]
    if not each:
        raise UsageError(
            f"--benchmarks {names!r}",
            "it names none",
            "write for example --benchmarks gsm8k,math500",
        )
    return [f"evaluate.benchmarks={json.dumps(each)}"]


def run_evaluation(config: PipelineConfig, argv: Sequence[str]) -> None:
    """Evaluates `run_dir/final` on all accelerators, and prints the tables (the long one by level
    is in the report).
    """
    from zip_rc_jax.pipeline.run_dir import opened

    with opened(config, "evaluate"):
        _evaluate(config, argv)


def _evaluate(config: PipelineConfig, argv: Sequence[str]) -> None:
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.benchmark_table import alphas_of, prediction_tables, text_table
    from zip_rc_jax.evaluation.tables import full_table, headline_table, metric_table, print_table
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.pipeline.evaluate import evaluate_benchmarks
    from zip_rc_jax.pipeline.evaluation.benchmarks import evaluation_benchmarks
    from zip_rc_jax.pipeline.problems import tell
    from zip_rc_jax.pipeline.rollouts import sampling_layout
    from zip_rc_jax.pipeline.run_dir import check_output, run_directory

    directory = run_directory(config)
    check_output(config, "report", ".partial")
    benchmarks = evaluation_benchmarks(config)
    for one in benchmarks:
        for note in () if one.heldout is None else one.heldout.notes:
            tell(note)
    most = max(one.config.evaluate.samples for one in benchmarks)
    layout = sampling_layout(config.decode.max_num_seqs, max(most, config.decode.n))
    lite = (
        load(directory / "lite", layout=layout, dtype=config.dtype)
        if (directory / "lite" / "model").is_dir()
        else None
    )
    final = load(directory / "final", layout=layout, dtype=config.dtype)
    report = evaluate_benchmarks(config, final, argv=argv, lite=lite, benchmarks=benchmarks)
    if not config.evaluate.benchmarks:
        for found in report.evaluations.values():
            for table in (
                full_table(found.runs, found.curves, found.pool, found.alphas),
                metric_table("Policy and prediction quality", found.quality),
                metric_table("Policy drift", found.drift),
                headline_table(found.headline),
            ):
                print_table(table, console)
        return
    for alpha in alphas_of(report.table):
        print_table(text_table(report.table, alpha), console)
    for table in prediction_tables(report.table):
        print_table(table, console)
    console.print(f"Reports and tables: {directory / 'report'}", markup=False, highlight=False)
