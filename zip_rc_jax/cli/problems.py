"""`zip-rc problems`: what the sources of a config hold, before anything is sampled."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zip_rc_jax.cli.common import CONFIG_HELP, OVERRIDE_HELP, read_config

SPLITS = ("train", "heldout", "examples")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "problems",
        help="show the problems of a config: sources, counts, levels, answers, overlaps",
        description="Reads the sources of `problems` and runs the checks that rollout and evaluate "
        "begin with. No model is loaded.\n"
        "Shown are every source with its counts, the levels, some problems with their reference "
        "answers, how many\n"
        "training problems are held-out ones, and answers that no grader can read.\n\n"
        "example: zip-rc problems configs/chain_sum.yaml problems.train=jsonl:mine.jsonl "
        "rollout.prompts=0 --show 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDE_HELP)
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="train",
        help="train, heldout or examples (default train)",
    )
    parser.add_argument(
        "--show", type=int, default=1, metavar="N", help="problems to show (default 1)"
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Prints the problems of a split. Raises UsageError for what the stages would refuse."""
    from zip_rc_jax.cli.console import console
    from zip_rc_jax.cli.problems_output import lines
    from zip_rc_jax.data.problems import ProblemSet, problem_set
    from zip_rc_jax.pipeline.problems import (
        evaluation_problems,
        notes,
        protected,
        readable,
    )
    from zip_rc_jax.runtime.errors import UsageError

    if arguments.show < 0:
        raise UsageError(f"--show {arguments.show}", "it counts problems", "use a number >= 0")
    config = read_config(arguments)
    said: Sequence[str]
    found: ProblemSet
    if arguments.split == "heldout" and config.run_dir:
        heldout = evaluation_problems(config)
        found, said = heldout.found, heldout.notes
    else:
        count = config.rollout.prompts if arguments.split == "train" else 0
        avoid = protected(config) if arguments.split == "train" else ()
        found = problem_set(config.problems, arguments.split, count, avoid=avoid, readable=readable)
        said = notes(found)
    for line in [*lines(found, arguments.split, arguments.show), *said]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
