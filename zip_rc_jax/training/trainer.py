"""Training: batches in, checkpoints, metrics and a finished model out. An interrupted run resumes
exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import TrainConfig, to_dict
from zip_rc_jax.data.batches import (
    TrainBatch,
    advice,
    fill_rate,
    steps_of_epochs,
    train_batches,
)
from zip_rc_jax.data.rollouts import Rollout, Selection, summary_of
from zip_rc_jax.evaluation.rollout_predictions import validate
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import restack, unstack
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.predictions import ScoringConfig
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.malloc import give_back_freed_memory
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout
from zip_rc_jax.runtime.signals import Interrupted, stop_signal
from zip_rc_jax.runtime.storage import (
    check_writable,
    fit_path,
    in_short,
    run_metadata,
    write_json,
    write_text,
    writing,
)
from zip_rc_jax.runtime.temporaries import whole_file
from zip_rc_jax.training.checkpoint import Checkpoints, check_earlier, check_settings
from zip_rc_jax.training.features import labelled_features, teacher_features
from zip_rc_jax.training.loss import TopK
from zip_rc_jax.training.step import (
    TrainSpec,
    TrainState,
    cast_teacher,
    change_bodies,
    init_state,
    prefers_unrolled,
    train_step,
)
from zip_rc_jax.training.tracking import Tracker

# Settings that were added later, with what runs from before them did; see `recorded`.
LATER_FIELDS = {
    "epochs": 0.0,  # the steps that it takes are recorded
    "kl_mask": "unused",
    "unfinished_length": "censored",
    "mean_over": "positions",
}
TEACHER = "teacher_top_k.npz"
SKIPPED = "skipped_in_a_row"  # in a checkpoint, beside the position of the data


@dataclasses.dataclass(frozen=True)
class Reporting:
    """What a run tells while it trains.

    Attributes:
      title: of the progress bar.
      validation: held-back rollouts with `correct`, for the within-prompt AUC.
      validation_last: labelled positions averaged for the final value.
      on_record: called with every metric record, a dict of `step` and named numbers.
    """

    title: str = "train"
    validation: Sequence[Rollout] = ()
    validation_last: int = 1
    on_record: Callable[[dict[str, Any]], object] | None = None


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run records and a resumed one must repeat.

    Settings that were added later are left out at their defaults, so that earlier runs go on.
    """
    return {
        name: value
        for name, value in to_dict(config).items()
        if name not in LATER_FIELDS or value != LATER_FIELDS[name]
    }


def train(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    directory: str | pathlib.Path | None = None,
    *,
    source: dict[str, Any],
    validation: Sequence[Rollout] = (),
    validation_last: int = 1,
    title: str = "train",
    on_record: Callable[[dict[str, Any]], object] | None = None,
) -> LanguageModel:
    """Trains the head (and, unless Lite, the body) of `lm`.

    With a directory, the result is saved as `directory/model`. The same call after an interruption
    continues where it stopped; after the end it loads the finished model. `directory` also holds
    `checkpoints/`, `settings.json` and `environment.json` (commit, versions, devices of the latest
    start). `tracking` writes `metrics.jsonl`, `tensorboard/` and `heatmaps/` there. What
    `cache_teacher` keeps stays there until the end. Without a directory nothing is written.

    With several processes, all call it with the same arguments, and all see `directory`. Each feeds
    the rows of its own devices.

    Args:
      lm: starting point with a head. It is trained on the mesh of its layout. With `kl_weight` its
        body is also the frozen teacher. A caller that keeps `lm` keeps its parameters on the
        devices as long as the training lasts.
      rollouts: training data with the label that `config.label` names. Each process reads them
        batch by batch, for its own rows alone.
      directory: where the run is kept; None for nowhere.
      source: what the data and the starting point were made from (JSON-able). A later run in the
        same directory with another source is refused.
      validation: held-back rollouts with `correct`, for the within-prompt AUC,
        `config.evaluations` times in the run.
      validation_last: labelled positions averaged for the final value.
      title: of the progress bar.
      on_record: see `Reporting`.

    Raises:
      UsageError: the model has no head, the directory belongs to other settings, the data does not
        fit, a checkpoint cannot be written, or `config.max_skipped` steps in a row had no finite
        loss and gradient.
      Interrupted: with a directory, after SIGINT or SIGTERM (to any of several processes), once the
        state is saved.
    """
    if lm.head is None:
        raise UsageError(
            "the model",
            "it has no ZIP head to train",
            "attach one first: lm.with_head(grid, label)",
        )
    # Without the head's decoding defaults: no training depends on them.
    head = lm.head.identity()
    epochs, config = config.epochs, with_steps(config, rollouts)
    settings: dict[str, Any] = {"train": recorded(config), "model": to_dict(lm.config)}
    if epochs:
        settings["train"]["epochs"] = epochs
    settings |= {"head": head, "source": source}
    settings = json.loads(json.dumps(settings))
    if directory is not None:
        directory = pathlib.Path(directory)
        if (directory / "model").is_dir():
            return _finished_before(directory, settings, lm.layout)
        # Before hours of work for features or a teacher.
        check_writable(
            fit_path(directory, "training directory") / "checkpoints", "training directory"
        )
        check_earlier(directory / "checkpoints", settings)
        directory.mkdir(parents=True, exist_ok=True)
    reporting = Reporting(title, validation, validation_last, on_record)
    trainer = Trainer(lm, rollouts, config, directory, settings, reporting)
    del lm  # what the caller does not keep need not lie on the devices all through the training
    return trainer.run()


def with_steps(config: TrainConfig, rollouts: Sequence[Rollout]) -> TrainConfig:
    """The config with the steps that its epochs take on these rollouts; itself where it counts
    steps. Raises as `train_batches`."""
    if not config.epochs:
        return config
    packing = {
        name: getattr(config, name) for name in ("batch_rows", "row_tokens", "pack_batches", "seed")
    }
    steps = steps_of_epochs(
        rollouts,
        config.epochs,
        label=config.label,
        labelled_only=config.cache_features,
        **packing,
    )
    return dataclasses.replace(config, steps=steps, epochs=0.0)


def _finished_before(
    directory: pathlib.Path, settings: dict[str, Any], layout: Layout
) -> LanguageModel:
    """The model that an earlier call left. Raises UsageError if that call had other settings."""
    done = load(directory / "model", layout=layout)
    if not isinstance(done.info.get("settings"), dict):
        raise UsageError(
            f"model {directory / 'model'}",
            "it does not say what it was trained with",
            "use another run_dir, or move it away",
        )
    check_settings(done.info["settings"], settings, str(directory))
    return done


class Trainer:
    """One training run: its batches, its state on the devices, and the files that let it resume.

    Attributes:
      config: how it trains.
      spec: what the step is compiled for.
      model: the model without its parameters.
      state: see `TrainState`; replaced by every step.
      teacher: parameters of the frozen policy; None where no step runs it.
      batches: an iterator of `TrainBatch` whose position can be saved.
      directory, checkpoints: None if the run is kept nowhere.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rollouts: Sequence[Rollout],
        config: TrainConfig,
        directory: pathlib.Path | None,
        settings: dict[str, Any],
        reporting: Reporting,
    ):
        """Args: as `train`; `settings` are what a checkpoint belongs to."""
        assert lm.head is not None
        self.config, self.directory, self.reporting, self._settings = (
            config,
            directory,
            reporting,
            settings,
        )
        layout = Layout(lm.layout.mesh, TRAIN_RULES)

        # Data: what a frozen body says about it is computed once.
        packing = {
            name: getattr(config, name)
            for name in ("batch_rows", "row_tokens", "pack_batches", "seed")
        }
        dataset = train_batches(
            rollouts,
            label=config.label,
            **packing,
            unfinished_length=config.unfinished_length,
            mean_over=config.mean_over,
            local_rows=layout.rows_of(jax.local_devices(), config.batch_rows),
            features=labelled_features(lm, rollouts, ScoringConfig.of(config))
            if config.cache_features
            else None,
            teacher=self._cached_teacher(lm, rollouts) if config.cache_teacher else None,
        )
        notes = (
            advice(rollouts, steps=config.steps, labelled_only=config.cache_features, **packing)
            if distributed.is_primary()
            else ()
        )
        for note in notes:
            print(f"zip-rc {reporting.title}: {note}", file=sys.stderr)
        self.batches = iter(dataset)

        # State. Copies: the step donates its state, and the caller's model (also the teacher) must
        # stay alive.
        axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
        state = init_state(layout.shard(jax.tree.map(jnp.array, lm.params), axes), config)
        runs_teacher = config.kl_weight and not config.cache_teacher
        self.teacher = (
            layout.shard(cast_teacher(lm.params["body"], config), axes["body"])
            if runs_teacher
            else None
        )
        # The counters too lie on the whole mesh: a restored state is laid out like this one, and
        # one step takes one set of devices.
        self.state = jax.tree.map(
            lambda x: x if x.ndim else jax.device_put(x, layout.sharding(())), state
        )

        self.spec = TrainSpec(lm.config, lm.head, layout, config, prefers_unrolled(layout, config))
        self.model = dataclasses.replace(lm, params={})
        self.checkpoints = (
            Checkpoints(directory / "checkpoints", settings, config.keep_checkpoints)
            if directory
            else None
        )
        self._skips = _Skips(config.max_skipped, directory)

    def run(self) -> LanguageModel:
        """Trains to the last step. Returns the finished model, which a directory holds as `model`.
        See `train`.
        """
        # Without a directory there is nothing to save first, so a signal interrupts at once.
        nothing: contextlib.AbstractContextManager[list[int]] = contextlib.nullcontext([])
        with stop_signal() if self.checkpoints else nothing as received:
            try:
                self._resume()
                self._loop(received)
            finally:
                # Before signals count again: a second one, in a hurry, finds the last save still on
                # its way.
                if self.checkpoints:
                    self.checkpoints.close()
        params = jax.tree.map(jnp.asarray, stacked(self.spec, self.state).params)
        info = {
            **self.model.info,
            "settings": self._settings,
            "skipped_steps": int(self.state.skipped),
        }
        finished = _with_params(self.model, params, info)
        del self.state  # its moments make room for what `save` reads back
        if self.directory:
            finished.save(self.directory / "model")
            if distributed.is_primary():
                (self.directory / TEACHER).unlink(missing_ok=True)
        return finished

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, in the form that the step works on, and says where
        the run is done.
        """
        if self.checkpoints and (restored := self.checkpoints.restore(self.state)):
            self.state, position = restored
            self._skips.count = position.pop(SKIPPED, 0)  # older checkpoints do not say it
            self.batches.set_state(position)
        if self.spec.unrolled:
            self.state = change_bodies(self.state, functools.partial(unstack, self.spec.model))
            self.teacher = self.teacher and unstack(self.spec.model, self.teacher)
        if self.directory and distributed.is_primary():
            write_text(
                self.directory / "settings.json", json.dumps(self._settings, indent=2) + "\n"
            )
            mesh = {"mesh": dict(self.spec.layout.mesh.shape), "processes": jax.process_count()}
            write_json(self.directory / "environment.json", run_metadata(self._settings) | mesh)

    def _loop(self, received: list[int]) -> None:
        """All steps that are left. `received` gets the signals that ask to stop."""
        config, title = self.config, self.reporting.title
        start = step = int(self.state.step)
        saved = time.monotonic()
        meter = _Meter(saved)
        agree = distributed.DelayedAny()
        writes = self.directory is not None and distributed.is_primary()
        with (
            Tracker(self.directory, start, writes=writes) as tracker,
            progress(title, config.steps, start) as bar,
        ):
            while step < config.steps:
                # Step: nothing here waits for the devices.
                batch = next(self.batches)
                meter.add(batch)
                self.state, metrics = train_step(
                    self.spec, self.state, self.teacher, _on_mesh(batch, self.spec.layout)
                )
                step += 1
                self._skips.add(step, batch, metrics)

                # Record.
                evaluates = self._evaluates(step)
                if step % config.log_every == 0 or evaluates or step == config.steps:
                    record = {"step": step, **meter.read(batch, metrics)}
                    if evaluates:
                        record |= self._validate(step, tracker)
                        meter.logged = time.monotonic()
                    tracker.record(record)
                    if self.reporting.on_record:
                        self.reporting.on_record(dict(record))
                    bar(step, f"{tracker.status}  rows {meter.fill / (step - start):.1%} full")
                else:
                    bar(step, None)

                # Save, and stop if any process was asked to.
                if self.checkpoints is None:
                    continue
                stop, save = agree(bool(received), time.monotonic() - saved > config.save_seconds)
                if stop or save:
                    self._skips.check()
                    give_back_freed_memory()
                    self.checkpoints.save(
                        stacked(self.spec, self.state),
                        {**self.batches.get_state(), SKIPPED: self._skips.count},
                    )
                    tracker.sync()
                    saved = time.monotonic()
                if stop:
                    reason = f"signal {received[0]}" if received else "a signal to another process"
                    raise Interrupted(
                        f"{title}: stopped by {reason} at step {step} of {config.steps}"
                    )
            self._skips.check()

    def _evaluates(self, step: int) -> bool:
        """Whether the validation comes after this step: `evaluations` times in the run, the last
        time at its end.
        """
        done, before = (s * self.config.evaluations // self.config.steps for s in (step, step - 1))
        return bool(self.reporting.validation) and done > before

    def _validate(self, step: int, tracker: Tracker) -> dict[str, float]:
        """The metrics of the held-back rollouts; their heat map goes to the tracker."""
        current = _with_params(self.model, stacked(self.spec, self.state).params, {})
        validation = validate(
            current,
            self.reporting.validation,
            label=self.config.label,
            last=self.reporting.validation_last,
            settings=ScoringConfig.of(self.config),
        )
        if validation.joints:
            tracker.heatmap(step, validation.joints, self.spec.head.grid)
        return validation.metrics

    def _cached_teacher(self, lm: LanguageModel, rollouts: Sequence[Rollout]) -> TopK:
        """`teacher_features`, made once; a directory keeps them as long as the run lasts."""
        if self.directory is None:
            return teacher_features(lm, rollouts, self.config)
        return _cached_teacher(lm, rollouts, self.config, self._settings, self.directory / TEACHER)


@dataclasses.dataclass
class _Meter:
    """Tokens per second since the last record, and how full the rows are.

    Attributes:
      logged: when the last record was made, in seconds of `time.monotonic`.
      tokens: since then.
      fill: sum of the fill rates of all batches of this process's run.
    """

    logged: float
    tokens: int = 0
    fill: float = 0.0

    def add(self, batch: TrainBatch) -> None:
        self.tokens += int(np.sum(batch.segment_ids > 0))
        self.fill += fill_rate(batch)

    def read(self, batch: TrainBatch, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The numbers of a record after the step on `batch`; then it counts from 0."""
        # waits for the step, so the clock is read after it
        recent = {k: float(v) for k, v in metrics.items()}
        now = time.monotonic()
        record = {f"train/{k}": v for k, v in recent.items()} | {
            "train/tokens_per_second": self.tokens / (now - self.logged)
        }
        record["train/fill"] = fill_rate(batch)
        self.tokens, self.logged = 0, now
        return record


def _cached_teacher(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    settings: dict[str, Any],
    path: pathlib.Path,
) -> TopK:
    """`teacher_features`, made once and kept in `path` as long as the run lasts."""
    made_from = {
        **settings,
        "start": lm.digest(),
        "positions": int(summary_of(rollouts).output.sum()),
    }
    teacher = _read_teacher(path, made_from)
    if distributed.all_processes(teacher is not None) and teacher:
        return teacher
    made = teacher_features(lm, rollouts, config)
    if distributed.is_primary():
        with writing(f"file {path}"), whole_file(path) as file:
            np.savez(file, made_from=json.dumps(made_from), **made._asdict())
    return made


def _read_teacher(path: pathlib.Path, made_from: dict[str, Any]) -> TopK | None:
    """The teacher in the file `path`; None without a file, or if it was made from something else
    or is damaged (reading an array checks its CRC).
    """
    if not os.path.lexists(path):
        return None
    try:
        with np.load(path) as file:
            check_settings(json.loads(str(file["made_from"])), made_from, str(path))
            teacher = TopK(file["ids"], file["log_probs"])
        shape = (made_from["positions"], teacher.ids.shape[-1])
        if (
            teacher.ids.shape,
            teacher.log_probs.shape,
            teacher.ids.dtype,
            teacher.log_probs.dtype,
        ) != (
            shape,
            shape,
            np.int32,
            np.float32,
        ):
            raise ValueError("its arrays have other shapes or types")
        return teacher
    # a damaged archive or header makes zipfile and NumPy raise ten kinds
    except Exception as error:
        print(f"zip-rc: {path} is made again ({in_short(error)})", file=sys.stderr)
        return None


def stacked(settings: TrainSpec, state: TrainState) -> TrainState:
    """The state as checkpoints hold it, whatever form the step works on."""
    return (
        change_bodies(state, functools.partial(restack, settings.model))
        if settings.unrolled
        else state
    )


def _with_params(lm: LanguageModel, params: dict[str, Any], info: dict[str, Any]) -> LanguageModel:
    return dataclasses.replace(lm, params=params, info=info)


@dataclasses.dataclass
class _Skips:
    """Ends a run whose steps no longer change anything. It looks one step back, so that no device
    waits for the host.

    Attributes:
      limit: skipped steps in a row that are too many.
      directory: where the last batch goes; None for nowhere.
      count: skipped steps in a row.
    """

    limit: int
    directory: pathlib.Path | None
    count: int = 0
    _last: tuple[int, TrainBatch, dict[str, jax.Array]] | None = None

    def add(self, step: int, batch: TrainBatch, metrics: dict[str, jax.Array]) -> None:
        """Checks the step before this one. Raises as `check`."""
        self.check()
        self._last = step, batch, metrics

    def check(self) -> None:
        """Raises UsageError, once the batch is saved, if the last step was one skipped step too
        many.
        """
        if self._last is None:
            return
        step, batch, metrics = self._last
        self._last = None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.count = 0 if math.isfinite(loss) and math.isfinite(norm) else self.count + 1
        if self.count < self.limit:
            return
        raise UsageError(
            f"step {step}",
            f"loss {loss} and gradient norm {norm}: {self.count} steps in a row were not finite "
            "and changed nothing",
            f"{self._saved(step, batch)}raise max_skipped to go on, or train with a lower "
            "learning rate" + (" in another run_dir" if self.directory else ""),
        )

    def _saved(self, step: int, batch: TrainBatch) -> str:
        """Writes the batch if there is a directory, and says so."""
        if self.directory is None:
            return ""
        # Each process has the tokens of its own rows.
        whose = f"_of_{jax.process_index()}" if distributed.is_multiprocess() else ""
        path = self.directory / f"skipped_batch_{step}{whose}.npz"
        np.savez_compressed(path, **{k: v for k, v in vars(batch).items() if v is not None})
        return f"look at the last batch ({path}); "


def _on_mesh(batch: TrainBatch, layout: Layout) -> TrainBatch:
    """The batch on the mesh, with empty rows at its end if its rows do not divide over it (losses
    are means over labelled positions, or over rollouts).

    Every process has the plan of the whole batch: a function of seed and position alone. It read
    the tokens of the rows of its own devices, and hands over these rows. So any number of processes
    trains on the same batches, and a saved position is valid for any number of them.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.pad(x, [(0, layout.padded(len(x), "batch") - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return jax.make_array_from_callback(
            x.shape,
            layout.sharding(("batch", "sequence", "embed_act")[: x.ndim], x.shape),
            x.__getitem__,
        )

    return jax.tree.map(put, batch)


def split_validation(
    rollouts: Sequence[Rollout], count: int
) -> tuple[Sequence[Rollout], list[Rollout]]:
    """(training, validation): about `count` rollouts are held back, and read. Of equal prompts, all
    are on the same side.

    Which prompts depends on their tokens alone, and not on how often they come, so that validation
    is like training.

    Raises:
      UsageError: nothing would be left to train on.
    """
    if not count:
        return rollouts, []
    _, prompt, copies = np.unique(
        summary_of(rollouts).prompt_hash, return_inverse=True, return_counts=True
    )
    # In the order of their hashes; as many of the first ones as come nearest to `count`.
    held = prompt <= np.argmin(np.abs(np.cumsum(copies) - count))
    if held.all():
        raise UsageError(
            f"eval_rollouts={count}",
            f"there are only {len(rollouts)} rollouts",
            "lower it or make more rollouts",
        )
    return Selection(rollouts, np.flatnonzero(~held)), Selection(rollouts, np.flatnonzero(held))[:]
