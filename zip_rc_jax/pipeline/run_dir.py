"""The run directory that all stages read and write: its paths, the starting policy, and the
rollouts of a stage.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax

from zip_rc_jax.config import TRAIN_STAGES, PipelineConfig, TrainConfig, to_dict
from zip_rc_jax.data.rollouts import Rollout, RolloutSource
from zip_rc_jax.models.io.load import embedded, load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline import chunks
from zip_rc_jax.runtime import distributed, working_copy
from zip_rc_jax.runtime.buckets import is_bucket
from zip_rc_jax.runtime.claims import SILENT_SECONDS, Claims
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress_file import (
    BUCKET_SECONDS,
    ProgressFile,
    local_file,
    recorded,
)
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout, make_mesh
from zip_rc_jax.runtime.storage import check_writable


def run_directory(config: PipelineConfig) -> pathlib.Path:
    """Where all stages read and write; a leading `~` is the home directory. Of a bucket, the
    local folder that the stages work in (see `runtime/working_copy.py`).

    Raises:
      UsageError: the config names none, one below which checkpoints would be lost (see
        `fit_path`), or a bucket that cannot be used (see `Bucket`).
    """
    if not config.run_dir:
        raise UsageError(
            "run_dir=''", "every stage reads and writes there", "add run_dir=runs/NAME"
        )
    return working_copy.run_directory(config.run_dir)


# What a stage may read of the run directory, its own output included: units and files, or folders
# with all that is in them. Of a bucket nothing else is fetched.
_PROMPTS = ("prompt_time.json",)
_HELD_OUT = ("final/model", "final/settings.json", "final/trained_on.json")
READS: dict[str, tuple[str, ...]] = {
    "rollout": ("rollouts", "rollouts.parquet", *_PROMPTS),
    "grade": ("rollouts", "graded", "graded.parquet", "grades.json", "judge"),
    "label": ("critic/model", "graded", "labelled", "labelled.parquet"),
    "policy": ("policy", *_PROMPTS),
    "critic": ("critic",),
    "lite": ("lite",),
    "final": ("final",),
    "evaluate": (*_HELD_OUT, "lite/model", "report", "judge", *_PROMPTS),
    "replay": (
        *(*_HELD_OUT, "pool", ".pool.partial", "pools", "replay", "report", "judge"),
        *_PROMPTS,
    ),
}  # fmt: skip


CLAIMS = ".claims/commands"
# Several machines may run these on one bucket at a time: they share the chunks.
SHARED = ("rollout", "grade", "label")


@contextlib.contextmanager
def opened(config: PipelineConfig, stage: str) -> Iterator[pathlib.Path]:
    """The run directory for the duration of a stage, a key of `READS`. A local one is yielded as
    it is; of a bucket, what the stage reads is fetched, and what it finished is published at the
    end, after an error or a signal, too.

    Raises UsageError as `run_directory`; and if the bucket cannot be read or written.
    """
    directory, reads = run_directory(config), READS[stage]
    if stage in TRAIN_STAGES and stage != "policy":
        settings: TrainConfig = getattr(config, stage)
        reads += () if config.data else ("graded" if settings.label == "correct" else "labelled",)
        reads += (f"{settings.rows_from}/model",) if settings.rows_from else ()
    if chunks.is_worker():
        # A worker of a fleet reads; its driver writes.
        if is_bucket(config.run_dir):
            working_copy.working_copy(config.run_dir).fetch(reads)
        yield directory
        return
    processes = jax.process_count() if distributed.is_multiprocess() else 1
    if not is_bucket(config.run_dir):
        with recorded(local_file(directory, stage, processes)):
            yield directory
        return
    if distributed.is_multiprocess() and stage in TRAIN_STAGES:
        raise UsageError(
            f"run_dir={config.run_dir!r}",
            "several processes write parts of one checkpoint, and their working copies are apart",
            "mount the bucket (gcsfuse) and give all processes the same folder, or train in one "
            "process",
        )
    copy = working_copy.working_copy(config.run_dir)
    alone = stage not in SHARED and distributed.is_primary() and not copy.is_open
    held = only_command(copy, stage) if alone else contextlib.nullcontext()
    file = ProgressFile(
        stage, copy.bucket.write, BUCKET_SECONDS, processes=processes, background=True
    )
    with held, recorded(file), working_copy.opened(config.run_dir, reads):
        yield directory


@contextlib.contextmanager
def only_command(copy: working_copy.WorkingCopy, stage: str) -> Iterator[None]:
    """Holds a stage of a run in a bucket for this process.

    Raises UsageError if another process of any machine holds it: it says which.
    """
    with Claims(copy.bucket, CLAIMS) as claims:
        if not claims.take(stage):
            holder = claims.holder(stage) or {}
            who = "process {pid} on {host}, since {since},".format_map(
                {"pid": "?", "host": "another machine", "since": "?"} | holder
            )
            raise UsageError(
                f"{stage} in run_dir={copy.bucket.url!r}",
                f"{who} is at work there",
                "wait for it, or use another run_dir; if that machine is gone, its place is free "
                f"{SILENT_SECONDS:.0f} s after its last sign of life",
            )

        def guard() -> None:
            if claims.lost(stage):
                holder = claims.holder(stage) or {}
                raise UsageError(
                    f"{stage} in run_dir={copy.bucket.url!r}",
                    "this process was cut off from the bucket, and meanwhile process "
                    f"{holder.get('pid')} on {holder.get('host')} took over",
                    "let that one finish",
                )

        copy.guard = guard
        try:
            yield
        finally:
            copy.guard = lambda: None


P = ParamSpec("P")
R = TypeVar("R")


def in_run_dir(
    stage: str,
) -> Callable[
    [Callable[Concatenate[PipelineConfig, P], R]], Callable[Concatenate[PipelineConfig, P], R]
]:
    """A decorator of stages, functions of a config: see `opened`."""

    def decorate(
        function: Callable[Concatenate[PipelineConfig, P], R],
    ) -> Callable[Concatenate[PipelineConfig, P], R]:
        @functools.wraps(function)
        def run(config: PipelineConfig, *args: P.args, **keywords: P.kwargs) -> R:
            with opened(config, stage):
                return function(config, *args, **keywords)

        return run

    return decorate


def trained_policy(config: PipelineConfig) -> pathlib.Path:
    """Where `train --stage policy` leaves the policy; from a bucket it is fetched first."""
    path = run_directory(config) / "policy"
    if not (path / "model").is_dir():
        working_copy.refresh(path / "model")
    return path


def check_output(config: PipelineConfig, name: str, *parts: str) -> None:
    """Before anything expensive: what the stage writes to `run_dir/NAME` can be written, unless it
    is there already.

    Args:
      parts: of the name of the directory below `run_dir/NAME` that files go to.

    Raises:
      UsageError: a file has that name, or nothing can be written there.
    """
    if chunks.is_worker():
        return  # its driver writes
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
    if is_bucket(config.data):
        return working_copy.fetched(config.data, "data")
    if config.data:
        return pathlib.Path(config.data)
    path = run_directory(config) / stage
    if not path.exists():
        working_copy.refresh(path)
    return path


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
    trained = trained_policy(config)
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
        if not trained_policy(config).is_dir():
            raise _no_policy(trained_policy(config))
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
