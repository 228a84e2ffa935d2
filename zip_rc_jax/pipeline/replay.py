"""The replay stage: samples are decoded once, and every setting is decided again from them."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.config.replay import ReplayedSetting, replayed_settings
from zip_rc_jax.data.sample_pool import PoolFiles, remove_partial
from zip_rc_jax.evaluation.baselines import METHODS, baseline_point
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.replay import (
    ReplayPool,
    check_replayable,
    load_pool,
    replayed_in_order,
)
from zip_rc_jax.evaluation.replay_report import (
    ReplayRow,
    fixed_row,
    replayed_row,
    write_replay,
)
from zip_rc_jax.evaluation.subsets import choose_subsets, fixed_ns
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.pool import (
    check_pool,
    make_pool,
    planned_pool,
    pool_decode,
)
from zip_rc_jax.pipeline.rollouts import sampling_layout
from zip_rc_jax.pipeline.run_dir import check_output, run_directory
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.storage import read_json, run_metadata, write_json

POOL, MODEL = "pool", "final"
CHECKED = "checked_model.json"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What a replay found.

    Attributes:
      rows: fixed methods, then the replayed settings.
      alphas: of the costs: those of the evaluation, and those that the search was replayed at.
      prompts, samples: of the pool.
      seconds: of the replay alone.
    """

    rows: tuple[ReplayRow, ...]
    alphas: tuple[float, ...]
    prompts: int
    samples: int
    seconds: float


def replay_settings(
    config: PipelineConfig, length_budgets: Sequence[int] = (1,)
) -> list[ReplayedSetting]:
    """What the section `replay` asks for.

    Args:
      length_budgets: where it names none.

    Raises:
      UsageError: an impossible setting.
    """
    e = config.evaluate
    return replayed_settings(
        config.replay, config.decode, e.alphas, e.betas, e.headline_beta, tuple(length_budgets)
    )


def run_replay(config: PipelineConfig, *, argv: Sequence[str]) -> ReplayReport:
    """Makes `run_dir/pool` if it is not there, replays every setting, and writes
    `run_dir/replay`.

    The model is loaded only to make the pool, or where its files have changed since.

    Raises:
      UsageError: an impossible setting, a pool of another model or of other settings, a damaged
        one, or one that does not give a setting. All but the model's identity is checked first.
    """
    started = time.time()
    settings, directory = replay_settings(config), run_directory(config)
    check_output(config, "replay", ".partial")
    files = _pool(config, settings, directory)
    began = time.perf_counter()
    alphas = tuple(dict.fromkeys((*config.evaluate.alphas, *config.replay.alphas)))
    rows, pool = _rows(config, files, alphas)
    seconds = time.perf_counter() - began
    metadata = run_metadata(to_dict(config), argv, started) | {
        "pool": {"path": str(files.directory), **files.metadata},
        "replay_seconds": round(seconds, 3),
    }
    write_replay(directory / "replay", rows, alphas, metadata)
    return ReplayReport(tuple(rows), alphas, pool.n_prompts, pool.n_samples, seconds)


def _pool(
    config: PipelineConfig, settings: Sequence[ReplayedSetting], directory: pathlib.Path
) -> PoolFiles:
    """The pool in the run directory, which is made if it is not there."""
    path, source = directory / POOL, directory / MODEL
    if path.exists():
        files = PoolFiles(path)
        remove_partial(path)
        check_pool(files, config)
        _check_settings(settings, files.metadata)
        _check_model(config, files, source)
        return files
    _check_settings(settings, planned_pool(config))
    check_output(config, POOL)
    return make_pool(config, _load(config, source), path, _stamps(source))


def _check_settings(settings: Sequence[ReplayedSetting], about: dict[str, Any]) -> None:
    for setting in settings:
        try:
            check_replayable(setting.decode, about)
        except UsageError as error:
            value = f"replay of {setting.name}: {error.value}"
            raise UsageError(value, error.reason, error.fix) from None


def _load(config: PipelineConfig, source: pathlib.Path) -> LanguageModel:
    """The model with a head. Raises UsageError."""
    decode = pool_decode(config)
    layout = sampling_layout(max(decode.max_num_seqs, decode.n), decode.n)
    lm = load(source, layout=layout, dtype=config.dtype)
    if lm.head is None:
        raise UsageError(
            f"model {source}",
            "it has no ZIP head, so there are no joints to store",
            "train one with `zip-rc train --stage final`",
        )
    return lm


def _stamps(source: pathlib.Path) -> dict[str, list[int]]:
    """Size and time of every file of a model: whether they are the same is known at once."""
    found = {}
    for folder, _, names in os.walk(source):
        for name in names:
            path = pathlib.Path(folder, name)
            status = path.stat()
            found[path.relative_to(source).as_posix()] = [status.st_size, status.st_mtime_ns]
    return dict(sorted(found.items()))


def _check_model(config: PipelineConfig, files: PoolFiles, source: pathlib.Path) -> None:
    """Raises UsageError for a pool of another model than the run directory's, if that is there."""
    stamps = _stamps(source)
    if not stamps or stamps == files.metadata["source"]:
        return
    # Other times or places: the weights decide, and what was found is kept.
    kept = run_directory(config) / "replay" / CHECKED
    digest = files.metadata["settings"]["model"]
    if kept.is_file() and read_json(kept, fix="delete it") == {"model": digest, "source": stamps}:
        return
    if _load(config, source).digest() != digest:
        raise UsageError(
            f"pool {files.directory}",
            f"it was drawn from another model than the one in {source}",
            "restore that model, use another run_dir, or delete the pool to make it again",
        )
    write_json(kept, {"model": digest, "source": stamps})


def _rows(
    config: PipelineConfig, files: PoolFiles, alphas: tuple[float, ...]
) -> tuple[list[ReplayRow], ReplayPool]:
    """The rows of the report, with costs at `alphas`, and the pool in memory."""
    r, e = config.replay, config.evaluate

    @functools.lru_cache(maxsize=2)
    def pool_of(window: int) -> ReplayPool:
        return load_pool(
            files, samples=r.samples, window=window, unfinished=config.grade.unfinished
        )

    pool = pool_of(config.decode.window)
    common: Any = (alphas, e.bootstrap, e.seed)
    samples = pool.samples()
    draws = Draws(enumerated=r.baseline_subsets, sampled=r.baseline_subsets, seed=r.seed)
    rows = [
        fixed_row(baseline_point(samples, method, n, draws), *common)
        for method in METHODS
        for n in fixed_ns(pool.n_samples)
    ]
    lengths = np.quantile(pool.length, QUANTILES).astype(int)
    settings = replay_settings(config, sorted({max(1, int(x)) for x in lengths}))
    subsets = {
        n: choose_subsets(pool.n_samples, n, r.subsets, r.seed)
        for n in sorted({setting.decode.n for setting in settings})
    }
    members = {n: chosen.members for n, chosen in subsets.items()}
    with progress("replay", len(settings)) as bar:
        found = replayed_in_order(pool_of, [setting.decode for setting in settings], members)
        for done, (setting, result) in enumerate(zip(settings, found, strict=True), 1):
            exact = subsets[setting.decode.n].exact
            rows.append(replayed_row(setting, result, pool, exact, *common))
            bar(done, setting.name)
    return rows, pool
