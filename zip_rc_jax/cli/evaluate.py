"""`zip-rc evaluate`: the search against its baselines on held-out problems."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_stage_parser, read_config
from zip_rc_jax.config import PipelineConfig


def add_parser(commands: argparse._SubParsersAction) -> None:
    add_stage_parser(
        commands,
        "evaluate",
        "compare the search with its baselines on held-out problems",
        "Decodes `evaluate.prompts` held-out problems online with every setting of the sweep and "
        "with the baselines,\n"
        "under one cost meter, on all accelerators of the host.\n"
        "Output: run_dir/report with report.html, pareto.png, results.jsonl, pool.jsonl, "
        "metadata.json.\n"
        "Finished settings survive Ctrl-C.\n\n"
        "example: zip-rc evaluate configs/chain_sum.yaml evaluate.prompts=800",
        together=False,
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    run_evaluation(read_config(arguments), argv)


def run_evaluation(config: PipelineConfig, argv: Sequence[str]) -> None:
    """Evaluates `run_dir/final` on all accelerators, and prints the tables (the long one by level
    is in the report).
    """
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.tables import full_table, headline_table, metric_table, print_table
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.pipeline.evaluate import evaluate
    from zip_rc_jax.pipeline.problems import evaluation_problems, tell
    from zip_rc_jax.pipeline.rollouts import sampling_layout
    from zip_rc_jax.pipeline.run_dir import check_output, run_directory

    directory = run_directory(config)
    check_output(config, "report", ".partial")
    problems = evaluation_problems(config)
    for note in problems.notes:
        tell(note)
    layout = sampling_layout(
        config.decode.max_num_seqs, max(config.evaluate.samples, config.decode.n)
    )
    lite = (
        load(directory / "lite", layout=layout, dtype=config.dtype)
        if (directory / "lite" / "model").is_dir()
        else None
    )
    final = load(directory / "final", layout=layout, dtype=config.dtype)
    found = evaluate(config, final, argv=argv, lite=lite, problems=problems)
    for table in (
        full_table(found.runs, found.curves, found.pool, found.alphas),
        metric_table("Policy and prediction quality", found.quality),
        metric_table("Policy drift", found.drift),
        headline_table(found.headline),
    ):
        print_table(table, console)
