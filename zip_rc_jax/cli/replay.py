"""`zip-rc replay`: samples are decoded once, and every setting is decided again from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import add_stage_parser, read_config
from zip_rc_jax.cli.evaluate import add_benchmarks, benchmark_overrides


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = add_stage_parser(
        commands,
        "replay",
        "decode samples once, and replay every setting from them in seconds",
        "Draws `replay.samples` full samples of each of the `evaluate.prompts` held-out problems "
        "into run_dir/pool,\n"
        "with the joint at every decision point. Then it decides again from these, without the "
        "model: all baselines,\n"
        "curves of the pruning rules, the search at all prices and n, and ablations of window, "
        "interval, skill and sharpening.\n"
        "What the pool does not give is named below the table, with the reason. With benchmarks, "
        "each has a pool of its own\n"
        "(run_dir/pools/NAME) with the tries and samples of the table, and a table "
        "(run_dir/replay/NAME).\n"
        "It decides as an online decode with the same random numbers would. Branching is online "
        "only: `zip-rc evaluate`.\n"
        "Output: run_dir/replay with results.json, results.csv, replay.png. Finished files of the "
        "pool survive Ctrl-C.\n\n"
        "example: zip-rc replay configs/chain_sum.yaml replay.samples=64 "
        "'replay.ns=[2,4,8,16]' 'replay.selection_exponents=[0,0.5]'\n"
        "example: zip-rc replay configs/qwen3_1.7b.yaml --benchmarks gsm8k,math500,mixed",
        together=False,
    )
    add_benchmarks(parser, "replay")
    parser.add_argument(
        "--beside-online",
        action="store_true",
        help="compare with what `zip-rc evaluate` decoded in the same run_dir: token for token, "
        "and the figures side by side",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.evaluation.replay_report import replay_table
    from zip_rc_jax.evaluation.tables import print_table
    from zip_rc_jax.pipeline.against_online import online_table
    from zip_rc_jax.pipeline.replay import replay_benchmarks

    arguments.overrides += benchmark_overrides(arguments.benchmarks)
    config, beside = read_config(arguments), arguments.beside_online
    for found in replay_benchmarks(config, argv=argv, beside_online=beside).values():
        title = f"Replay of {found.samples} samples of each of {found.prompts} problems"
        if found.title:
            tries = "" if found.tries == "1" else f", {found.tries} tries"
            title = f"{found.title}: {title[0].lower()}{title[1:]}{tries}"
        print_table(replay_table(found.rows, found.alphas, title), console)
        for name, why in found.left_out.items():
            line = f"left out: {name}: {why}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if found.online is not None:
            print_table(online_table(found.online, f"Online and replayed: {title}"), console)
            for name, why in found.online.left_out.items():
                line = f"not compared: {name}: {why}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
