"""`zip-rc rollout`: the policy is sampled on the training problems."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_fleet, add_format, add_stage_parser, run_with_format


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_stage_parser(
        commands,
        "rollout",
        "sample the policy on the training problems",
        "Samples `rollout.samples` responses to each of `rollout.prompts` training problems from "
        "the starting policy.\n"
        "Output: run_dir/rollouts, a TensorFlow Datasets directory in ArrayRecord files. Finished "
        "chunks survive Ctrl-C.\n"
        "With --format parquet also run_dir/rollouts.parquet; after the sampling too, which is "
        "not repeated for it.\n\n"
        "example: zip-rc rollout configs/chain_sum_demo.yaml rollout.prompts=1000 "
        "run_dir=runs/small --format parquet\n"
        "example: zip-rc rollout configs/chain_sum_demo.yaml run_dir=runs/many --fleet auto",
        together=True,
    )
    add_format(parser, "rollouts")
    add_fleet(parser)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.pipeline.rollouts import make_rollouts

    run_with_format(arguments, make_rollouts)
