"""Reading a `PipelineConfig` from strict YAML with `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from zip_rc_jax.config import PipelineConfig
from zip_rc_jax.errors import UsageError


def load_config(path: str | pathlib.Path, overrides: list[str] | tuple[str, ...] = ()) -> PipelineConfig:
    """Reads a YAML file, applies `section.key=value` overrides and validates everything.

    Raises:
      UsageError: the file is missing or not YAML, a key is unknown (the message names the nearest known key), or a value is
        impossible.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UsageError(f"config {path}", "there is no such file", "pass one of the files in configs/")
    for item in overrides:
        if "=" not in item:
            raise UsageError(f"override {item!r}", "overrides have the form section.key=value", "write for example decode.beta=0.02")
    schema = OmegaConf.structured(PipelineConfig)
    try:
        merged = OmegaConf.merge(schema, OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UsageError(f"config key {error.full_key!r} in {path}", "no stage reads this key", _nearest(error)) from None
    except UsageError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError, OSError, yaml.YAMLError) as error:  # OmegaConf raises all of these
        first = str(error).splitlines()[0]
        raise UsageError(f"config {path}", first, "correct the value") from None
    assert isinstance(config, PipelineConfig)
    config.grid.grid("correct"), config.grid.grid("value")
    return config


def _nearest(error: ConfigKeyError) -> str:
    known = [f.name for f in dataclasses.fields(error.object_type)] if dataclasses.is_dataclass(error.object_type) else []
    close = difflib.get_close_matches(str(error.key), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys here are {', '.join(known)}"
