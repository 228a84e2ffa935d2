"""`zip-rc label`: rollouts are labelled with the critic's value."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import (
    DATA_HELP,
    add_fleet,
    add_format,
    add_stage_parser,
    run_with_format,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_stage_parser(
        commands,
        "label",
        "label the rollouts with the critic's value",
        "value = mean expected reward of the critic over the last `label.last` labelled "
        "positions.\n"
        "Reads run_dir/graded and run_dir/critic, writes run_dir/labelled. Finished chunks "
        "survive Ctrl-C.\n"
        f"{DATA_HELP}\n\n"
        "example: zip-rc label configs/chain_sum_demo.yaml\n"
        "example: zip-rc label configs/chain_sum_demo.yaml run_dir=runs/theirs "
        "data=theirs_graded.parquet --format parquet",
        together=True,
    )
    add_format(parser, "labelled")
    add_fleet(parser)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.pipeline.label import make_labels

    run_with_format(arguments, make_labels)
