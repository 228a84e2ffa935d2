"""What the parsers and the ends of several commands share."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext as nothing
from typing import Any, Protocol

from zip_rc_jax.config import LABELS, LENGTH_COUNTS, PipelineConfig
from zip_rc_jax.runtime.processes import HELP

CONFIG_HELP = "YAML file with one section per stage, e.g. configs/chain_sum_demo.yaml"
DATA_HELP = (
    "data=PATH takes the rollouts from there instead: a Parquet file in the schema of the ZIP-RC "
    "authors' code, a directory of\n"
    "such *.parquet files, or a directory of rollouts that zip-rc wrote. Responses of a table that "
    "end with any end token of\npolicy.path are finished; data_ends=table takes its own column."
)
OVERRIDE_HELP = (
    "settings to override, e.g. run_dir=runs/mine (or gs://BUCKET/run) decode.beta=0.02 "
    "critic.steps=2000; "
    "unknown keys are errors"
)


class Command(Protocol):
    """A module of this folder: the command of its name."""

    def add_parser(self, commands: argparse._SubParsersAction) -> object:
        """Adds the command's parser.

        Nothing heavy is imported for it, so that `--help` is quick.
        """

    def run(self, arguments: argparse.Namespace, argv: Sequence[str]) -> int | None:
        """Does it. Returns the exit status, None for 0."""


def add_stage_parser(
    commands: argparse._SubParsersAction, name: str, summary: str, details: str, *, together: bool
) -> argparse.ArgumentParser:
    """A parser with a config file and overrides; `together` if several processes may run the
    command together.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=details,
        epilog=HELP if together else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(together=together)
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDE_HELP)
    return parser


def add_format(parser: argparse.ArgumentParser, stage: str) -> None:
    """Adds `--format`; see `run_with_format`."""
    parser.add_argument(
        "--format",
        choices=("tfds", "parquet"),
        default="tfds",
        help=f"parquet: write run_dir/{stage}.parquet too, from run_dir/{stage}, in the schema of "
        "the ZIP-RC authors' code",
    )


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Adds `--fleet`; see `pipeline/fleet.py`."""
    parser.add_argument(
        "--fleet",
        metavar="auto|HOST:PORT",
        help="have the chunks made by all machines of a Ray cluster (extra `fleet`): one engine on "
        "each, on its own accelerators. auto: the cluster of this machine; HOST:PORT: as `ray "
        "start --head` prints it. Machines may come and go; the result is that of one process. "
        "All must see the model, and run_dir where the stage reads it (a bucket, or a shared file "
        "system)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model and what says how to read checkpoints of the paper's authors."""
    parser.add_argument(
        "model",
        help="checkpoint or training directory of ours, Hugging Face directory or model id, GGUF "
        "file, or embedded:NAME",
    )
    parser.add_argument(
        "--zip-label",
        choices=LABELS,
        help="for checkpoints of the paper's authors: what the joint was trained on",
    )
    parser.add_argument(
        "--zip-first-id",
        type=int,
        metavar="ID",
        help="and its first reserved id (151669 with Qwen3)",
    )
    parser.add_argument(
        "--zip-length-counts",
        choices=LENGTH_COUNTS,
        help="and whether the lengths that it was trained on count the end token (default: "
        "without_end, as in the authors' code; the grid's edges are then one token higher)",
    )
    parser.add_argument(
        "--head",
        metavar="FILE",
        help="a trained head for a model without one: a file of `zip-rc export --head-only`, or "
        "builtin:NAME for one that ships with the package",
    )


def zip_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_model` read about the head, as keywords of `load`."""
    names = ("zip_label", "zip_first_id", "zip_length_counts", "head")
    return {name: getattr(arguments, name) for name in names}


def read_config(arguments: argparse.Namespace) -> PipelineConfig:
    """The config file of the arguments with their overrides. Raises UsageError if it cannot be
    read.
    """
    from zip_rc_jax.config.files import load_config

    return load_config(arguments.config, arguments.overrides)


def run_with_format(
    arguments: argparse.Namespace, stage: Callable[[PipelineConfig], pathlib.Path]
) -> None:
    """Runs a stage that makes a dataset, and writes the dataset as `--format` says."""
    from zip_rc_jax.pipeline.run_dir import opened
    from zip_rc_jax.runtime import distributed

    config = read_config(arguments)
    if arguments.fleet:
        from zip_rc_jax.pipeline.fleet import fleet
    made_by = fleet(arguments.fleet, arguments.command, config) if arguments.fleet else nothing()
    with made_by, opened(config, arguments.command):
        directory = stage(config)
        if arguments.format == "parquet":
            from zip_rc_jax.pipeline.parquet import export_parquet

            if distributed.is_primary():
                export_parquet(config, directory)
            # a process that ends waits for the others for a minute, and then ends them
            distributed.barrier()
