"""`zip-rc replay`: samples are decoded once, and every setting is decided again from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_stage_parser, read_config


def add_parser(commands: argparse._SubParsersAction) -> None:
    add_stage_parser(
        commands,
        "replay",
        "decode samples once, and replay every setting from them in seconds",
        "Draws `replay.samples` full samples of each of the `evaluate.prompts` held-out problems "
        "into run_dir/pool,\n"
        "with the joint at every decision point. Then it decides again from these, without the "
        "model: fixed n,\n"
        "curves of the pruning rules, the search at all prices and n, and ablations of window, "
        "interval, skill and sharpening.\n"
        "It decides as an online decode with the same random numbers would. Branching is online "
        "only: `zip-rc evaluate`.\n"
        "Output: run_dir/replay with results.json, results.csv, replay.png. Finished files of the "
        "pool survive Ctrl-C.\n\n"
        "example: zip-rc replay configs/chain_sum.yaml replay.samples=64 "
        "'replay.ns=[2,4,8,16]' 'replay.selection_exponents=[0,0.5]'",
        together=False,
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.replay_report import replay_table
    from zip_rc_jax.evaluation.tables import print_table
    from zip_rc_jax.pipeline.replay import run_replay

    found = run_replay(read_config(arguments), argv=argv)
    title = f"Replay of {found.samples} samples of each of {found.prompts} problems"
    print_table(replay_table(found.rows, found.alphas, title), console)
