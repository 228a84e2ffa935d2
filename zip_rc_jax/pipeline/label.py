"""The label stage: every rollout gets the critic's `value`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.checks import check_tokens
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.evaluation.rollout_predictions import final_values, predict_rollouts
from zip_rc_jax.models.io.load import load
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
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime.sharding import TRAIN_RULES, devices_worth_using, side_by_side

LABELLED_ROLLOUTS = 1024  # of a chunk: minutes of work at most, and an interruption loses one chunk


@in_run_dir("label")
def make_labels(config: PipelineConfig) -> pathlib.Path:
    """Labels the rollouts with the critic's value; result in `run_dir/labelled`.

    See `chunks.write_in_chunks` for interruptions and several processes.

    Raises:
      UsageError: no rollouts or critic there, rollouts of another model, or the result was made
        from others.
    """
    directory = run_directory(config) / "labelled"
    check_output(config, "labelled")
    critic = load(
        run_directory(config) / "critic",
        layout=side_by_side(devices_worth_using(), TRAIN_RULES),
        dtype=config.dtype,
    )
    rollouts, metadata = random_access(source_path(config, "graded"))
    rollouts, ends = with_all_ends(config, rollouts, critic.tokenizer)
    settings = {"graded": metadata, "critic": critic.digest(), "label": {"last": config.label.last}}
    settings |= ends
    if directory.is_dir():
        check_same_source(directory, settings)
        return directory
    check_tokens(rollouts, critic.tokenizer.used)

    def label(part: Sequence[Rollout]) -> list[Rollout]:
        values = final_values(
            predict_rollouts(critic, part, ScoringConfig(config.label.batch_tokens)),
            config.label.last,
        )
        return [dataclasses.replace(r, value=v) for r, v in zip(part, values.tolist(), strict=True)]

    return write_in_chunks("label", directory, settings, rollouts, LABELLED_ROLLOUTS, label)
