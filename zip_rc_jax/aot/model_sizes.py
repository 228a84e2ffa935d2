"""The sizes of a model that is to be compiled, read without its parameters where the format
allows."""

from __future__ import annotations

import dataclasses
import pathlib

from zip_rc_jax.config import ModelConfig, PipelineConfig
from zip_rc_jax.models.io import huggingface
from zip_rc_jax.models.io.families import read_config
from zip_rc_jax.models.io.load import load
from zip_rc_jax.runtime.errors import UsageError


def with_model(config: PipelineConfig, name: str) -> PipelineConfig:
    """The config with the sizes of its model in `model`: those of `policy.path` or `policy.start`
    if it is on this machine, else as they stand.

    Args:
      name: of the file, for messages.

    Raises:
      UsageError: the policy is not here and the config does not give its sizes.
    """
    path = config.policy.path or config.policy.start
    sizes = sizes_on_disk(path) if path else None
    if sizes is None and path and config.model == ModelConfig():
        raise UsageError(
            f"policy.{'path' if config.policy.path else 'start'}={path!r} of {name}",
            "it is not on this machine, and there is no model section",
            "write its sizes in a model section",
        )
    return config if sizes is None else dataclasses.replace(config, model=sizes)


def sizes_on_disk(path: str) -> ModelConfig | None:
    """Sizes of a model on this machine, without its parameters where the format allows; None if it
    is not here.

    Raises:
      UsageError: it is here and damaged.
    """
    local = pathlib.Path(path).expanduser()
    if (local / huggingface.CONFIG).is_file():
        settings = huggingface.read_json(local / huggingface.CONFIG)
        settings.pop("zip_rc", None)
        return read_config(settings, str(local))[1]
    if local.suffix == ".gguf" and local.is_file():
        from zip_rc_jax.models.io.gguf import GgufSource

        return read_config(GgufSource(local).settings, path)[1]
    return load(path).config if path.startswith("embedded:") or local.is_dir() else None
