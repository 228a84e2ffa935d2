"""The run directory that all stages read and write: its paths, the starting policy, and the
rollouts of a stage.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.data.rollouts import Rollout, RolloutSource
from zip_rc_jax.models.io.load import embedded, load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.runtime.storage import check_writable, fit_path


def run_directory(config: PipelineConfig) -> pathlib.Path:
    """Where all stages read and write; a leading `~` is the home directory.

    Raises:
      UsageError: the config names none, or one below which checkpoints would be lost (see
        `fit_path`).
    """
    if not config.run_dir:
        raise UsageError(
            "run_dir=''", "every stage reads and writes there", "add run_dir=runs/NAME"
        )
    return fit_path(config.run_dir, "run_dir")


def check_output(config: PipelineConfig, name: str, *parts: str) -> None:
    """Before anything expensive: what the stage writes to `run_dir/NAME` can be written, unless it
    is there already.

    Args:
      parts: of the name of the directory below `run_dir/NAME` that files go to.

    Raises:
      UsageError: a file has that name, or nothing can be written there.
    """
    directory = run_directory(config) / name
    if directory.exists() and not directory.is_dir():
        raise UsageError(
            f"run_dir {config.run_dir!r}",
            f"{name} in it is a file, not a directory",
            "rename it, or use another run_dir",
        )
    if parts or not directory.is_dir():
        check_writable(directory.joinpath(*parts), f"{name} in run_dir")


def source_path(config: PipelineConfig, stage: str) -> pathlib.Path:
    """The rollouts that a stage reads: `config.data`, or those that the stage before left in the
    run directory.
    """
    return pathlib.Path(config.data) if config.data else run_directory(config) / stage


def load_policy(
    config: PipelineConfig, layout: Layout | None = None, dtype: str = "float32"
) -> LanguageModel:
    """The starting policy: `policy.path`, or what `train --stage policy` left in the run directory.
    `layout`, `dtype`: see `load`.

    Raises:
      UsageError: there is none, or see `load`.
    """
    if config.policy.path:
        return load(config.policy.path, layout=layout, dtype=dtype)
    trained = run_directory(config) / "policy"
    if not trained.is_dir():
        raise _no_policy(trained)
    return load(trained, layout=layout, dtype=dtype)


def _no_policy(path: pathlib.Path) -> UsageError:
    return UsageError(
        "policy.path=''",
        f"there is no {path}",
        "set policy.path to a model, or run `zip-rc train --stage policy` to make one",
    )


def check_policy(config: PipelineConfig) -> None:
    """Before problems are fetched: the starting policy is there, as far as that shows without
    loading it. Raises UsageError as `load_policy`."""
    path = pathlib.Path(config.policy.path).expanduser()
    if config.policy.path.startswith("embedded:"):
        embedded(config.policy.path.removeprefix("embedded:"))
    elif not config.policy.path:
        if not (run_directory(config) / "policy").is_dir():
            raise _no_policy(run_directory(config) / "policy")
    elif config.policy.path.startswith((".", "/", "~")) and not path.exists():
        raise UsageError(
            f"policy.path={config.policy.path!r}",
            "there is no such file or directory",
            "set it to a model",
        )


def train_layout(config: PipelineConfig) -> Layout:
    """Where training lies. Raises UsageError for a mesh that the devices do not give."""
    return Layout(make_mesh(**to_dict(config.mesh)), TRAIN_RULES)


def random_access(path: pathlib.Path) -> tuple[Sequence[Rollout], dict[str, Any]]:
    """See `open_rollouts`. Those of a dataset are read as they are used; those of Parquet files,
    which are read in order, lie in memory.
    """
    from zip_rc_jax.data.parquet import open_rollouts  # needs pyarrow, and evaluation does not

    source, metadata = open_rollouts(path)
    return source if isinstance(source, RolloutSource) else list(source), metadata
