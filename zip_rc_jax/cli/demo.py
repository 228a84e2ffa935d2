"""`zip-rc demo`: all stages from the policy to the report, and one problem solved live."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from zip_rc_jax.cli.common import CONFIG_HELP, OVERRIDE_HELP
from zip_rc_jax.config import PipelineConfig


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole path on the embedded policy, in minutes on 2 CPU cores",
        description="Samples rollouts from the embedded chain_sum policy, grades them, trains "
        "critic, final model and ZIP-RC-Lite,\n"
        "decodes held-out problems with the adaptive search and all baselines, shows one problem "
        "being solved, and writes\n"
        "pareto.png, report.html, results.jsonl, pool.jsonl and metadata.json to "
        "run_dir/report.\n\n"
        "example: zip-rc demo run_dir=runs/mine final.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDE_HELP)
    parser.add_argument(
        "--config", default=None, help=f"default: the embedded demo config. {CONFIG_HELP}"
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.config.files import load_config
    from zip_rc_jax.models.io.load import embedded

    path = arguments.config if arguments.config is not None else embedded("chain_sum_demo.yaml")
    run_demo(load_config(path, arguments.overrides), argv)


def run_demo(config: PipelineConfig, argv: Sequence[str]) -> None:
    """All stages from the policy to the report, each timed; then one problem is solved live."""
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.cli.evaluate import run_evaluation
    from zip_rc_jax.cli.live import decode_prompts
    from zip_rc_jax.data.prompts import prompt_texts
    from zip_rc_jax.models.io.load import load
    from zip_rc_jax.pipeline.grade import make_grades
    from zip_rc_jax.pipeline.label import make_labels
    from zip_rc_jax.pipeline.problems import live_problem
    from zip_rc_jax.pipeline.rollouts import make_rollouts
    from zip_rc_jax.pipeline.run_dir import run_directory
    from zip_rc_jax.pipeline.train import train_stage
    from zip_rc_jax.runtime.malloc import give_back_freed_memory

    stages = [
        *(
            []
            if config.policy.path
            else [("train the policy", lambda: train_stage(config, "policy"))]
        ),
        ("sample rollouts", lambda: make_rollouts(config)),
        ("grade", lambda: make_grades(config)),
        ("train critic", lambda: train_stage(config, "critic")),
        ("label values", lambda: make_labels(config)),
        ("train ZIP-RC-Lite", lambda: train_stage(config, "lite")),
        ("train final model", lambda: train_stage(config, "final")),
        ("decode and compare", lambda: run_evaluation(config, argv)),
    ]
    for number, (title, stage) in enumerate(stages, 1):
        started = time.monotonic()
        console.rule(f"[{number}/{len(stages)}] {title}", align="left")
        stage()
        give_back_freed_memory()
        console.print(f"{title}: {time.monotonic() - started:.0f} s", style="dim")
    console.rule("one held-out problem, live", align="left")
    hard = live_problem(config)
    final = load(run_directory(config) / "final", dtype=config.dtype)
    decode_prompts(
        final,
        prompt_texts([hard], config, final.tokenizer),
        config.decode,
        config.evaluate.seed,
        live=True,
    )
    console.print(f"answer: {hard.answer}", markup=False)
    console.print(f"report: {run_directory(config) / 'report' / 'report.html'}")
