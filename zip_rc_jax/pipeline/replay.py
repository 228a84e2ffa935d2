"""The replay stage: samples are decoded once, and every setting is decided again from them."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zip_rc_jax.config import PipelineConfig, to_dict
from zip_rc_jax.config.replay import ReplayedSetting, replayed_settings
from zip_rc_jax.data.problems import Problem
from zip_rc_jax.data.sample_pool import PoolFiles, remove_partial
from zip_rc_jax.evaluation.baselines import METHODS, SELF_EVALUATION
from zip_rc_jax.evaluation.draws import Draws
from zip_rc_jax.evaluation.method_table import ALL_TOKENS, METHOD_TABLE
from zip_rc_jax.evaluation.pool_curves import Readings, pool_curves
from zip_rc_jax.evaluation.pool_readings import load_readings
from zip_rc_jax.evaluation.replay import (
    ReplayPool,
    check_replayable,
    load_pool,
    replayed_in_order,
)
from zip_rc_jax.evaluation.replay_report import (
    ReplayPoint,
    ReplayRow,
    baseline_replay_point,
    replay_row,
    replayed_point,
    write_replay,
)
from zip_rc_jax.evaluation.reward_model import BEST, WEIGHTED
from zip_rc_jax.evaluation.subsets import choose_subsets, fixed_ns
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.against_online import AgainstOnline, against_online
from zip_rc_jax.pipeline.evaluation.benchmarks import Benchmark, planned_benchmarks
from zip_rc_jax.pipeline.pool import (
    check_pool,
    held_out,
    make_pool,
    planned_pool,
    pool_decode,
    readings_settings,
)
from zip_rc_jax.pipeline.rollouts import sampling_layout
from zip_rc_jax.pipeline.run_dir import check_output, in_run_dir, run_directory
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.storage import read_json, run_metadata, write_json

POOL, POOLS, MODEL = "pool", "pools", "final"
CHECKED = "checked_model.json"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAKE_AGAIN = "delete the pool, and the same command makes it with them"


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What a replay found for one benchmark.

    Attributes:
      rows: baselines, then the replayed settings.
      alphas: of the costs: those of the evaluation, and those that the search was replayed at.
      prompts, samples, tries: problems of the pool, samples of a try, tries of a problem ("4 to 32"
        of a union).
      seconds: of the replay alone.
      title: of the benchmark; "" for `problems.heldout`.
      left_out: why what this table might have is not in it, by its name.
      online: the comparison with the online evaluation, where that was asked for.
    """

    rows: tuple[ReplayRow, ...]
    alphas: tuple[float, ...]
    prompts: int
    samples: int
    seconds: float
    tries: str = "1"
    title: str = ""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    online: AgainstOnline | None = None


@dataclasses.dataclass(frozen=True)
class _Place:
    """A benchmark of a replay, with its own settings, and where its pool and its table lie."""

    benchmark: Benchmark
    pool: pathlib.Path
    report: pathlib.Path

    @property
    def config(self) -> PipelineConfig:
        return self.benchmark.config

    @property
    def name(self) -> str:
        return self.benchmark.name


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
    """`replay_benchmarks` of the one benchmark, or of the held-out problems."""
    [report] = replay_benchmarks(config, argv=argv).values()
    return report


@in_run_dir("replay")
def replay_benchmarks(
    config: PipelineConfig, *, argv: Sequence[str], beside_online: bool = False
) -> dict[str, ReplayReport]:
    """Makes the pools that are not there, replays every setting from each, and writes a table for
    each benchmark and each union: by name.

    Without `evaluate.benchmarks`, the pool is `run_dir/pool` and the table lies in
    `run_dir/replay`. With them, these are `run_dir/pools/NAME` and `run_dir/replay/NAME`.

    The model is loaded only to make a pool, or where its files have changed since.

    Args:
      beside_online: compare each with the online evaluation in the run directory, see
        `against_online`.

    Raises:
      UsageError: an impossible setting, a pool of another model or of other settings, a damaged
        one, or one that does not give a setting. All but the model's identity is checked first, for
        all benchmarks.
    """
    started, source = time.time(), run_directory(config) / MODEL
    places = [_place(config, one) for one in planned_benchmarks(config)]
    own = [place for place in places if not place.benchmark.union]
    problems = {place.name: _checked(place) for place in own}

    @functools.cache
    def model() -> LanguageModel:
        return _load(config, source, [pool_decode(place.config).n for place in own])

    files = {place.name: _pool(place, problems[place.name], source, model) for place in own}
    # The seconds of the metadata are those of the replay alone, without the model.
    found = dict[str, tuple[list[ReplayPoint], ReplayReport]]()
    for place in places:
        replayed = _union(place, found) if place.benchmark.union else _replay(place, files)
        points, report = replayed
        if beside_online and not place.benchmark.union:
            online = against_online(
                place.config,
                files[place.name],
                report.rows,
                place.benchmark.directory,
                place.name,
            )
            report = dataclasses.replace(report, online=online)
        found[place.name] = points, report
        metadata = run_metadata(to_dict(place.config), argv, started) | {
            "replay_seconds": round(report.seconds, 3),
            "left_out": dict(report.left_out),
        }
        if report.online is not None:
            metadata["beside_online"] = dataclasses.asdict(report.online)
        if mine := files.get(place.name):
            metadata["pool"] = {"path": str(mine.directory), **mine.metadata}
        write_replay(place.report, report.rows, report.alphas, metadata)
    return {name: report for name, (_, report) in found.items()}


# ---- before a model is loaded


def _place(config: PipelineConfig, one: Benchmark) -> _Place:
    """Where a benchmark's files lie. Raises UsageError for places that cannot be written."""
    directory, named = run_directory(config), bool(config.evaluate.benchmarks)
    check_output(config, "replay", *([one.name] if named else []), ".partial")
    if not named:
        return _Place(one, directory / POOL, directory / "replay")
    one = dataclasses.replace(one, config=_with_samples(one))
    return _Place(one, directory / POOLS / one.name, directory / "replay" / one.name)


def _with_samples(one: Benchmark) -> PipelineConfig:
    """Its config, with the samples that the table names. Raises UsageError."""
    config, samples = one.config, one.entry.samples
    try:
        replay = dataclasses.replace(config.replay, samples=samples or config.replay.samples)
    except UsageError as error:
        raise UsageError(
            f"benchmark {one.name}: {error.value}",
            error.reason,
            f"ask for more of them: evaluate.benchmarks=[{{name: {one.name}, samples: "
            f"{max(config.replay.ns)}}}]",
        ) from None
    return dataclasses.replace(config, replay=replay)


def _checked(place: _Place) -> Sequence[Problem] | None:
    """The problems of a pool that is still to be made; None where there is a pool.

    Raises UsageError as `replay_benchmarks`.
    """
    config, tries = place.config, place.benchmark.tries
    settings = replay_settings(config)
    if place.pool.exists():
        files = PoolFiles(place.pool)
        remove_partial(place.pool)
        check_pool(files, config, tries)
        _check_settings(settings, files.metadata)
        return None
    _check_settings(settings, planned_pool(config, tries))
    check_output(config, place.pool.relative_to(run_directory(config)).parts[0])
    return held_out(place.benchmark)


def _check_settings(settings: Sequence[ReplayedSetting], about: dict[str, Any]) -> None:
    for setting in settings:
        try:
            check_replayable(setting.decode, about)
        except UsageError as error:
            value = f"replay of {setting.name}: {error.value}"
            raise UsageError(value, error.reason, error.fix) from None


# ---- the pool


def _pool(
    place: _Place,
    problems: Sequence[Problem] | None,
    source: pathlib.Path,
    model: Callable[[], LanguageModel],
) -> PoolFiles:
    """The pool of a benchmark, which is made of `problems` if it is not there."""
    if problems is None:
        files = PoolFiles(place.pool)
        _check_model(place, files, source, model)
        return files
    tries, stamps = place.benchmark.tries, _stamps(source)
    return make_pool(place.config, model(), place.pool, stamps, problems, tries)


def _load(config: PipelineConfig, source: pathlib.Path, samples: Sequence[int]) -> LanguageModel:
    """The model with a head. Raises UsageError."""
    most, rows = max(samples), config.decode.max_num_seqs
    lm = load(source, layout=sampling_layout(max(rows, most), most), dtype=config.dtype)
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


def _check_model(
    place: _Place, files: PoolFiles, source: pathlib.Path, model: Callable[[], LanguageModel]
) -> None:
    """Raises UsageError for a pool of another model than the run directory's, if that is there."""
    stamps = _stamps(source)
    if not stamps or stamps == files.metadata["source"]:
        return
    # Other times or places: the weights decide, and what was found is kept.
    kept = place.report / CHECKED
    digest = files.metadata["settings"]["model"]
    if kept.is_file() and read_json(kept, fix="delete it") == {"model": digest, "source": stamps}:
        return
    if model().digest() != digest:
        raise UsageError(
            f"pool {files.directory}",
            f"it was drawn from another model than the one in {source}",
            "restore that model, use another run_dir, or delete the pool to make it again",
        )
    place.report.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"model": digest, "source": stamps})


# ---- the replay


def _replay(
    place: _Place, files: Mapping[str, PoolFiles]
) -> tuple[list[ReplayPoint], ReplayReport]:
    """Every baseline and every setting of one benchmark, from its pool."""
    began, config, mine = time.perf_counter(), place.config, files[place.name]
    points, pool, absent = _points(config, mine, _alphas(config))
    rows = tuple(replay_row([x], config.evaluate.bootstrap, config.evaluate.seed) for x in points)
    return points, ReplayReport(
        rows,
        _alphas(config),
        pool.n_prompts // pool.tries,
        pool.n_samples,
        time.perf_counter() - began,
        f"{pool.tries}",
        place.benchmark.title if config.evaluate.benchmarks else "",
        absent,
    )


def _union(
    place: _Place, found: Mapping[str, tuple[list[ReplayPoint], ReplayReport]]
) -> tuple[list[ReplayPoint], ReplayReport]:
    """The settings that all parts of a union have, over all of their problems."""
    began, config = time.perf_counter(), place.config
    parts = [{x.name: x for x in found[name][0]} for name in place.benchmark.union]
    reports = [found[name][1] for name in place.benchmark.union]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    rows = tuple(
        replay_row([p[name] for p in parts], config.evaluate.bootstrap, config.evaluate.seed)
        for name in names
    )
    absent = {method: why for report in reports for method, why in report.left_out.items()}
    for name in dict.fromkeys(name for part in parts for name in part):
        if name not in names:
            absent[name] = "a part of the union has it not"
    tries = sorted({int(report.tries) for report in reports})
    return [], ReplayReport(
        rows,
        _alphas(config),
        sum(report.prompts for report in reports),
        min(report.samples for report in reports),
        time.perf_counter() - began,
        f"{tries[0]}" if len(tries) == 1 else f"{tries[0]} to {tries[-1]}",
        place.benchmark.title,
        absent,
    )


def _alphas(config: PipelineConfig) -> tuple[float, ...]:
    return tuple(dict.fromkeys((*config.evaluate.alphas, *config.replay.alphas)))


def _points(
    config: PipelineConfig, files: PoolFiles, alphas: tuple[float, ...]
) -> tuple[list[ReplayPoint], ReplayPool, dict[str, str]]:
    """The points of a table, with costs at `alphas`; the pool in memory; and what is left out."""
    r = config.replay

    @functools.lru_cache(maxsize=2)
    def pool_of(window: int) -> ReplayPool:
        return load_pool(
            files, samples=r.samples, window=window, unfinished=config.grade.unfinished
        )

    pool = pool_of(config.decode.window)
    samples = pool.samples()
    points, absent = list[ReplayPoint](), left_out(config, files)
    further = config.evaluate.baselines == "all"
    readings = _asked(config, files, load_readings(files, r.samples, along=further))
    draws = Draws(enumerated=r.baseline_subsets, sampled=r.baseline_subsets, seed=r.seed)
    curves = pool_curves(
        samples,
        readings,
        window=config.decode.window,
        interval=config.decode.interval,
        further=further,
        ns=fixed_ns(pool.n_samples),
        draws=draws,
        orders=draws,
    )
    for curve in curves.values():
        points += [baseline_replay_point(point, samples, alphas) for point in curve]
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
            points.append(replayed_point(setting, result, pool, exact, alphas))
            bar(done, setting.name)
    return points, pool, absent


def _asked(config: PipelineConfig, files: PoolFiles, readings: Readings) -> Readings:
    """Those readings that the config asks for, and that were made as it says."""
    reasons = _missing_readings(config, files)
    unused: dict[str, Any] = dict.fromkeys(reasons)
    return dataclasses.replace(readings, **unused)


def _missing_readings(config: PipelineConfig, files: PoolFiles) -> dict[str, str]:
    """Why readings of the pool are not used, by their names."""
    asked, stored = readings_settings(config), files.metadata.get("readings", {})
    titles = {
        "statistics": "probabilities of all tokens",
        "self_evaluation": "answers of the policy about its samples",
        "reward_model": "scores of a reward model",
    }
    off = {
        "statistics": "evaluate.baselines=plain leaves it out",
        "self_evaluation": "evaluate.self_evaluation.question is empty",
        "reward_model": "evaluate.reward_model.path is empty",
    }
    found = {}
    for name, title in titles.items():
        held = stored.get(name)
        if asked[name] is None:
            found[name] = off[name]
        elif held is None:
            found[name] = f"the pool was made without {title}: {MAKE_AGAIN}"
        elif held != asked[name]:
            found[name] = f"the pool has {title} by other settings of evaluate.{name}: {MAKE_AGAIN}"
    return found


def left_out(config: PipelineConfig, files: PoolFiles) -> dict[str, str]:
    """Why methods of the table of methods, and candidate sets, are not in a replay: by name."""
    missing, found = _missing_readings(config, files), dict[str, str]()
    read = {SELF_EVALUATION: "self_evaluation", WEIGHTED: "reward_model", BEST: "reward_model"}
    plain = config.evaluate.baselines == "plain"
    for method in METHOD_TABLE:
        every_token = "statistics" if ALL_TOKENS in method.probabilities else ""
        reading = read.get(method.name, every_token)
        if reading in missing:
            found[method.name] = missing[reading]
        elif plain and not reading and method.name not in METHODS:
            found[method.name] = "evaluate.baselines=plain leaves it out"
    if "branching" in config.evaluate.candidates:
        found["search with candidates=branching"] = (
            "it starts prefixes in the middle of others, and a pool has samples from the root: "
            "`zip-rc evaluate` decodes it online"
        )
    return found
