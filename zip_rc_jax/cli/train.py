"""`zip-rc train`: policy, critic, final model or ZIP-RC-Lite are trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import DATA_HELP, add_stage_parser, read_config
from zip_rc_jax.config import TRAIN_STAGES


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_stage_parser(
        commands,
        "train",
        "train the policy, the critic, the final model or ZIP-RC-Lite",
        "Stages:\n"
        "  policy  next-token training of a demo policy on worked chain sums, from scratch or "
        "from policy.start\n"
        "  critic  the joint on `correct`, no KL (reads run_dir/graded)\n"
        "  final   the joint on `value`, with KL to the starting policy (reads run_dir/labelled)\n"
        "  lite    only the reserved rows, so every next-token logit stays bit-identical (reads "
        "run_dir/labelled)\n"
        "Output: run_dir/STAGE with model/, checkpoints/, metrics.jsonl, tensorboard/, heatmaps/, "
        "settings.json, environment.json.\n"
        "It runs on all devices there are: `mesh.data`, `mesh.fsdp`, `mesh.tensor` say how, and "
        "any of them gives the same model.\n"
        "Watch eval/within_prompt_auc: at 0.5 the head cannot select.\n"
        f"{DATA_HELP}\n\n"
        "example: zip-rc train configs/chain_sum_demo.yaml --stage critic critic.steps=1000\n"
        "example: zip-rc train configs/chain_sum_demo.yaml --stage critic run_dir=runs/theirs "
        "data=theirs_graded.parquet",
        together=True,
    )
    parser.add_argument("--stage", required=True, choices=TRAIN_STAGES, help="what to train")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.pipeline.train import train_stage

    train_stage(read_config(arguments), arguments.stage)
