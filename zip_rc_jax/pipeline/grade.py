"""The grade stage: every rollout gets `correct` from its task's own scorer, or from the grader that
the settings name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.config.grade import JUDGE
from zip_rc_jax.data.problems import MATH
from zip_rc_jax.data.rollouts import Rollout, RolloutSource
from zip_rc_jax.grading.custom import grader_of
from zip_rc_jax.grading.grader import check_entry, correct
from zip_rc_jax.grading.judge import Judge
from zip_rc_jax.grading.summary import summarize, to_json
from zip_rc_jax.pipeline.chunks import write_in_chunks
from zip_rc_jax.pipeline.ends import with_all_ends
from zip_rc_jax.pipeline.provenance import check_same_source
from zip_rc_jax.pipeline.run_dir import (
    check_output,
    in_run_dir,
    random_access,
    run_directory,
    source_path,
)
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import console
from zip_rc_jax.runtime.storage import read_json, write_json
from zip_rc_jax.runtime.working_copy import publish

GRADED_ROLLOUTS = 1024  # of a chunk: minutes of work at most, and an interruption loses one chunk
JUDGED_ROLLOUTS = 64  # a judge takes longer; what it said is kept in any case


@in_run_dir("grade")
def make_grades(config: PipelineConfig) -> pathlib.Path:
    """Grades the rollouts with the task's own scorer, those without a task as free-form
    mathematics, or all of them with `grade.grader`; result in `run_dir/graded`.

    Then it prints the share of right responses, of those without an answer and of those that were
    cut off, and writes the counts to `run_dir/grades.json`. See `GradeConfig` for what a cut-off
    response is worth, and `chunks.write_in_chunks` for interruptions and several processes.

    Raises:
      UsageError: no rollouts there, one without a reference answer, or the result was made from
        others.
    """
    directory = run_directory(config) / "graded"
    check_output(config, "graded")
    rollouts, metadata = random_access(source_path(config, "rollouts"))
    rollouts, ends = with_all_ends(config, rollouts)
    settings = {"rollouts": metadata, "grade": config.grade.record(), **ends}
    if directory.is_dir():
        check_same_source(directory, settings)
        _tell_grades(config)
        return directory
    if not config.grade.grader:  # another grader may need no reference answer
        _check_answers(rollouts)
    chunk = JUDGED_ROLLOUTS if config.grade.grader == JUDGE else GRADED_ROLLOUTS
    with grader_of(config.grade, run_directory(config)) as grader:

        def grade(part: Sequence[Rollout]) -> list[Rollout]:
            scores = grader.grade_many(
                (r if r.task else dataclasses.replace(r, task=MATH), r.response) for r in part
            )
            publish(run_directory(config) / "judge")  # what was paid for is not lost
            return [
                dataclasses.replace(
                    r,
                    correct=0.0
                    if config.grade.unfinished == "wrong" and not r.finished
                    else correct(s),
                )
                for r, s in zip(part, scores, strict=True)
            ]

        write_in_chunks("grade", directory, settings, rollouts, chunk, grade)
        if isinstance(grader, Judge) and grader.unreadable:
            console.print(
                f"warning: the judge gave no readable verdict on {grader.unreadable} responses, "
                f"which are graded 0; its replies are in {grader.directory}",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    _tell_grades(config)
    return directory


def _tell_grades(config: PipelineConfig) -> None:
    if not distributed.is_primary():
        return
    found = summarize(RolloutSource(run_directory(config) / "graded"))
    path, counted = run_directory(config) / "grades.json", to_json(found)
    if (
        not path.is_file()
        or read_json(path, fix="delete it; the same command writes it") != counted
    ):
        write_json(path, counted)  # only then: a finished run may lie where nobody can write
    for name, counts in found.items():
        if name or len(found) > 2:  # one task and level is all there is
            console.print(
                f"{name or 'all'}: {counts.responses} responses, {counts.line()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    # Another grader may call a response right that states no answer.
    warning = None if config.grade.grader else found[""].warning()
    if warning:
        console.print(
            f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )


def _check_answers(rollouts: Sequence[Rollout]) -> None:
    """Against no answer at all, every response would be graded wrong."""
    for number, r in enumerate(rollouts):
        if not r.answer.strip() and not r.entry_json:
            raise UsageError(
                f"rollout {number}",
                "it has no reference answer to grade against",
                "fill `answer`, or leave the rollout out",
            )
        try:
            check_entry(r)
        except UsageError as error:
            raise UsageError(f"rollout {number}, {error.value}", error.reason, error.fix) from None
