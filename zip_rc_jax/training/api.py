"""Training a head from records: the function that a user calls."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from zip_rc_jax.config import LabelConfig, TrainConfig
from zip_rc_jax.data.checks import check_records, check_tokens, digest_of
from zip_rc_jax.data.rollouts import Rollout
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.training.trainer import split_validation, train


def train_head(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    directory: str | pathlib.Path | None = None,
    *,
    validation_last: int = LabelConfig.last,
    title: str = "train",
    on_record: Callable[[dict[str, Any]], object] | None = None,
) -> LanguageModel:
    """Trains the joint head of a model on labelled rollouts. Returns the trained model.

    About `config.eval_rollouts` of the rollouts are held back, whole prompts at a time. They tell
    `config.evaluations` times in the run how well the head separates right from wrong.

    Args:
      lm: the model that sampled the rollouts, with a head: `lm.with_head(grid, label)`. Training
        runs on the devices of its layout. It stays as it is.
      rollouts: a sequence of `Rollout` with the label that `config.label` names: `correct` is the
        grade, `value` is a critic's estimate. Rollouts with equal `prompt_index` share a prompt.
      config: see `TrainConfig`. Set `batch_rows` and `row_tokens` to your memory, and
        `eval_rollouts` to your data.
      directory: where checkpoints, metrics, TensorBoard files and the model are kept. The same call
        after an interruption resumes there. Without one nothing is written.
      validation_last: labelled positions at the end of a rollout whose mean expected reward is its
        final value.
      title: of the progress bar.
      on_record: called with every metric record, a dict of `step`, `train/...` and `eval/...`;
        `records.append` keeps them.

    Raises:
      UsageError: the head, the label, the config and the rollouts do not fit together, the
        directory belongs to another run, or the training diverges. See `train`.
      Interrupted: with a directory, after SIGINT or SIGTERM, once the state is saved.
    """
    _check_head(lm, config)
    rollouts = check_records(rollouts)
    check_tokens(rollouts, lm.tokenizer.used)
    training, validation = split_validation(rollouts, config.eval_rollouts)
    if any(math.isnan(r.correct) for r in validation):
        raise UsageError(
            f"eval_rollouts={config.eval_rollouts}",
            "some rollouts have no `correct`, so nothing says whether the head tells right from "
            "wrong",
            "set `correct` of every rollout, or eval_rollouts=0 to train without validation",
        )
    source: dict[str, Any] = {}
    if directory is not None:  # a run that is resumed goes on with the same data and model
        source = {"rollouts": digest_of(rollouts), "start": lm.digest()}
    start = [lm]
    del lm  # see `train`
    return train(
        start.pop(),
        training,
        config,
        directory,
        source=source,
        validation=validation,
        validation_last=validation_last,
        title=title,
        on_record=on_record,
    )


def _check_head(lm: LanguageModel, config: TrainConfig) -> None:
    if not isinstance(config, TrainConfig):
        raise UsageError(
            f"config of type {type(config).__name__}",
            "it says how to train",
            "pass a zip_rc_jax.TrainConfig(...)",
        )
    if not isinstance(lm, LanguageModel):
        raise UsageError(
            f"model of type {type(lm).__name__}",
            "it cannot be trained",
            "pass what zip_rc_jax.load returns",
        )
    if lm.head is None:
        raise UsageError(
            "the model",
            "it has no ZIP head to train",
            f"attach one first: lm.with_head(zip_rc_jax.Grid.authors({config.label!r}), "
            f"{config.label!r})",
        )
    if lm.head.label != config.label:
        raise UsageError(
            f"label={config.label!r}",
            f"the head of the model is for {lm.head.label!r}",
            f"set label={lm.head.label!r}, or attach a head for {config.label!r}",
        )
    if config.rows_from:
        raise UsageError(
            f"rows_from={config.rows_from!r}",
            "it names a stage of a run directory, and there is none here",
            "leave it out: training starts from the rows that the model has",
        )
