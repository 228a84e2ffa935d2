"""All end tokens of the policy, for the rollouts of a foreign table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.data.ends import finish_at_ends
from zip_rc_jax.data.rollouts import Rollout, RolloutSource
from zip_rc_jax.models.io.load import load_tokenizer
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.pipeline.run_dir import trained_policy
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import console


def with_all_ends(
    config: PipelineConfig, rollouts: Sequence[Rollout], tokenizer: Tokenizer | None = None
) -> tuple[Sequence[Rollout], dict[str, Any]]:
    """The rollouts of a stage, those of a Parquet table finished as `config.data_ends` says.

    What it changed, and what it could not look at, is printed.

    Args:
      tokenizer: of the policy; None reads it where it is needed.

    Returns:
      the rollouts, and what a stage records of it: `{"ends": ids}`, empty where nothing changed.
    """
    if config.data_ends == "table" or isinstance(rollouts, RolloutSource):
        return rollouts, {}  # ours know all ends
    cut = sum(not r.finished for r in rollouts)
    if not cut:
        return rollouts, {}
    tokenizer = tokenizer or _policy_tokenizer(config)
    if tokenizer is None:
        _tell(
            f"{cut} of {len(rollouts)} rollouts are unfinished, says the table. It is not known "
            "whether they ended with another end token: name the model in policy.path"
        )
        return rollouts, {}
    found, changed = finish_at_ends(rollouts, tokenizer.eos_ids)
    if not changed:
        return rollouts, {}
    _tell(
        f"{changed} rollouts that the table calls unfinished end with an end token of the model, "
        "so they count as finished. A grader that skipped them called them wrong: `zip-rc grade` "
        "grades them (data_ends=table takes the table's word)"
    )
    return found, {"ends": list(tokenizer.eos_ids)}


def _policy_tokenizer(config: PipelineConfig) -> Tokenizer | None:
    """None where no policy is named and none was trained."""
    if not config.policy.path and not trained_policy(config).is_dir():
        return None
    try:
        return load_tokenizer(config.policy.path or trained_policy(config))
    except UsageError as error:
        fix = f"{error.fix}; or set data_ends=table, which needs no model"
        raise UsageError(error.value, error.reason, fix) from None


def _tell(text: str) -> None:
    if distributed.is_primary():
        console.print(text, markup=False, highlight=False, soft_wrap=True)
