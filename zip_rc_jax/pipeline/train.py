"""The training stages: policy, critic, final model, and ZIP-RC-Lite."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from zip_rc_jax.config import TRAIN_STAGES, PipelineConfig, TrainConfig
from zip_rc_jax.data.checks import check_tokens
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.head import HeadDefaults
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.ends import with_all_ends
from zip_rc_jax.pipeline.policy import make_policy
from zip_rc_jax.pipeline.problems import TRAINED_ON
from zip_rc_jax.pipeline.run_dir import (
    check_output,
    load_policy,
    opened,
    random_access,
    run_directory,
    source_path,
    train_layout,
)
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import write_json
from zip_rc_jax.training.trainer import split_validation, train


def train_stage(config: PipelineConfig, stage: str) -> LanguageModel:
    """Trains "critic", "final" or "lite" from the starting policy; result in `run_dir/STAGE`.

    Raises:
      UsageError: an unknown stage, the stage before it has not run, or rollouts that another model
        sampled or that lack the label.
    """
    if stage not in TRAIN_STAGES:
        raise UsageError(
            f"stage {stage!r}", f"the stages are {', '.join(TRAIN_STAGES)}", "choose one of them"
        )
    with opened(config, stage):
        return _train_stage(config, stage)


def _train_stage(config: PipelineConfig, stage: str) -> LanguageModel:
    if not (run_directory(config) / stage / "model").is_dir():
        check_output(config, stage, "checkpoints")
    if stage == "policy":
        return make_policy(config)

    # What it trains on, and what it starts from.
    settings: TrainConfig = getattr(config, stage)
    path = source_path(config, "graded" if settings.label == "correct" else "labelled")
    if not config.data and not path.is_dir():
        before = {"graded": "zip-rc grade", "labelled": "zip-rc label"}[path.name]
        raise UsageError(
            f"dataset {path}",
            f"stage {stage!r} trains on the label {settings.label!r}",
            f"run `{before}` first",
        )
    policy = load_policy(config, train_layout(config))
    grid = config.grid.grid(settings.label)
    lm = policy.with_head(grid, settings.label, defaults=head_defaults(config))
    if settings.rows_from:
        lm = _with_rows_of(lm, run_directory(config) / settings.rows_from)
    rollouts, metadata = random_access(path)
    check_tokens(rollouts, policy.tokenizer.used)
    rollouts, ends = with_all_ends(config, rollouts, policy.tokenizer)

    # What is held back, and the record of all inputs.
    training, validation = split_validation(rollouts, settings.eval_rollouts)
    _check_graded(validation, stage, settings)
    source = {"data": metadata, "policy": policy.digest(), **ends} | (
        {"rows": lm.digest()} if settings.rows_from else {}
    )
    # a run that was begun with another split would go on with rollouts that it has been tested on
    if validation:
        source["validation"] = "by prompt"
    start = [lm]
    del lm, policy  # see `train`
    trained = train(
        start.pop(),
        training,
        settings,
        run_directory(config) / stage,
        source=source,
        validation=validation,
        validation_last=config.label.last,
        title=stage,
    )
    if config.data and distributed.is_primary():
        directory = run_directory(config) / stage
        if not (directory / TRAINED_ON).exists():  # a finished run may be read-only
            write_json(directory / TRAINED_ON, {"data": config.data})
    return trained


def head_defaults(config: PipelineConfig) -> HeadDefaults:
    """What a trained head says about decoding: the config's own `decode` section."""
    d = config.decode
    return HeadDefaults(d.interval, d.window, d.max_tokens)


def _with_rows_of(lm: LanguageModel, stage: pathlib.Path) -> LanguageModel:
    """`lm` with the trained reserved rows of another stage of the run."""
    if not stage.is_dir():
        raise UsageError(
            f"rows_from={stage.name!r}",
            f"there is no {stage}",
            f"run `zip-rc train --stage {stage.name}` first",
        )
    trained = load(stage, layout=lm.layout)
    if trained.head != lm.head:
        raise UsageError(
            f"rows_from={stage.name!r}",
            f"its head is {trained.head}, this stage trains {lm.head}",
            "use a stage of the same label",
        )
    return dataclasses.replace(lm, params={**lm.params, "zip_rows": trained.params["zip_rows"]})


def _check_graded(validation: Sequence[Rollout], stage: str, settings: TrainConfig) -> None:
    """Foreign rollouts may have values but no grades, and then nothing says whether the head can
    tell good from bad.
    """
    if any(math.isnan(r.correct) for r in validation):
        raise UsageError(
            f"{stage}.eval_rollouts={settings.eval_rollouts}",
            "the rollouts held back for validation have no 'correct' label",
            "run `zip-rc grade`"
            + (
                f", or set {stage}.eval_rollouts=0 to train without validation"
                if settings.label == "value"
                else ""
            ),
        )
