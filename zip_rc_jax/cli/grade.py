"""`zip-rc grade`: rollouts are graded by their task's own scorer."""

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
        "grade",
        "grade the rollouts with the task's own scorer",
        "Reads run_dir/rollouts, writes run_dir/graded with `correct` in {0, 1}. reasoning-gym "
        "problems are graded by their own\n"
        "score_answer, free-form mathematics by math-verify in a process that is killed if it "
        "hangs. Finished chunks survive Ctrl-C.\n"
        f"{DATA_HELP}\nRollouts without a task are graded against their `answer`, as free-form "
        "mathematics.\n"
        "grade.grader=module:function grades with a function of yours instead, and "
        "grade.grader=judge with a language model\n"
        "behind an OpenAI-compatible URL (grade.judge.base_url, grade.judge.model); its prompts "
        "and replies are kept in run_dir/judge.\n\n"
        "example: zip-rc grade configs/chain_sum_demo.yaml\n"
        "example: zip-rc grade configs/chain_sum_demo.yaml grade.grader=judge "
        "grade.judge.base_url=http://localhost:8000/v1 grade.judge.model=Qwen3-32B\n"
        "example: zip-rc grade configs/chain_sum_demo.yaml run_dir=runs/theirs "
        "data=theirs.parquet --format parquet",
        together=True,
    )
    add_format(parser, "graded")
    add_fleet(parser)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from zip_rc_jax.pipeline.grade import make_grades

    run_with_format(arguments, make_grades)
