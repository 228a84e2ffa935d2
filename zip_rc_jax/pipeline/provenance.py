"""What a stage records about its inputs, so that a later call does not go on with the work of other
settings.
"""

from __future__ import annotations

import pathlib
from typing import Any

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.data.prompts import prompt_time
from zip_rc_jax.data.rollouts import read_metadata
from zip_rc_jax.models.io.tokenizer import Tokenizer
from zip_rc_jax.pipeline.chunks import remove_remains
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.settings import check_same_settings


def prompt_record(config: PipelineConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decided the text of the prompts, for the records of what was made from them."""
    found = {
        "prompt": prompt_settings(config),
        "template_hash": tokenizer.template_hash if config.prompt.style == "chat" else None,
    }
    seen = prompt_time(config, tokenizer)  # recorded only where a template writes the date
    return found | {"prompt_time": seen.isoformat()} if seen else found


def prompt_settings(config: PipelineConfig) -> dict[str, Any]:
    """The section `prompt`, for records."""
    settings = to_dict(config.prompt)
    if not config.prompt.variants:  # as records were before there were any
        del settings["variants"], settings["seed"]
    return settings


def added_record(config: PipelineConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids that prompts begin and end with by the tokenizer's own settings; empty if there are none,
    as before these were added.
    """
    added = [list(ids) for ids in tokenizer.added_ids] if config.decode.add_special_tokens else []
    return {"added_ids": added} if any(added) else {}


def check_same_source(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises UsageError if the finished dataset there was made with other settings. What an
    interruption left beside it is removed.
    """
    if distributed.is_primary():
        remove_remains(directory)
    check_same_settings(
        f"dataset {directory}",
        read_metadata(directory),
        settings,
        fix="use another run_dir, or delete it to make it again",
    )
