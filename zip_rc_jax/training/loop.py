"""The training loop: batches in, checkpoints, metrics and a finished model out. Interrupted runs resume exactly."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zip_rc_jax.config import TrainConfig, to_dict
from zip_rc_jax.data.batches import TrainBatch, advice, fill_rate, train_batches
from zip_rc_jax.data.rollouts import Rollout, Selection, summary_of
from zip_rc_jax.models.io.load import load
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.models.stacks import restack, unstack
from zip_rc_jax.models.transformer import param_axes
from zip_rc_jax.predict import ForwardSettings, labelled_features, teacher_features, validate
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.malloc import give_back_freed_memory
from zip_rc_jax.runtime.progress import progress
from zip_rc_jax.runtime.sharding import TRAIN_RULES, Layout
from zip_rc_jax.runtime.signals import Interrupted, stop_signal
from zip_rc_jax.runtime.storage import check_writable, fit_path, in_short, run_metadata, write_json, write_text, writing
from zip_rc_jax.training.checkpoint import Checkpoints, check_earlier, check_settings
from zip_rc_jax.training.loss import TopK
from zip_rc_jax.training.step import StepSettings, TrainState, change_bodies, frozen, init_state, prefers_unrolled, train_step
from zip_rc_jax.training.tracking import Tracker

TEACHER = "teacher_top_k.npz"
SKIPPED = "skipped_in_a_row"  # in a checkpoint, beside the position of the data


def train(
    lm: LanguageModel,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    directory: str | pathlib.Path,
    *,
    source: dict[str, Any],
    validation: Sequence[Rollout] = (),
    validation_last: int = 1,
    title: str = "train",
) -> LanguageModel:
    """Trains the head (and, unless Lite, the body) of `lm` and saves the result as `directory/model`.

    The same call after an interruption continues where it stopped; after the end it loads the finished model. `directory` also
    holds `checkpoints/`, `settings.json`, `environment.json` (commit, versions, devices of the latest start), what `tracking`
    writes: `metrics.jsonl`, `tensorboard/` and `heatmaps/`, and until the end what `cache_teacher` keeps.

    With several processes, all call it with the same arguments, and all see `directory`. Each feeds the rows of its own devices.

    Args:
      lm: starting point with a head, which is trained on the mesh of its layout; with `kl_weight` its body is also the frozen teacher.
        Whoever keeps it pays for its parameters on the devices as long as the training lasts.
      rollouts: training data with the label that `config.label` names. Read batch by batch, by each process for its own rows alone.
      source: what the data and the starting point were made from (JSON-able); a later run with another source is refused.
      validation: held-back rollouts with `correct`, for the within-prompt AUC, `config.evaluations` times in the run.
      validation_last: labelled positions averaged for the final value.

    Raises:
      UsageError: the directory belongs to other settings, the data does not fit, a checkpoint cannot be written, or
        `config.max_skipped` steps in a row had no finite loss and gradient.
      Interrupted: after SIGINT or SIGTERM (to any of several processes), once the state is saved.
    """
    if lm.head is None:
        raise ValueError("attach a head first: lm.with_head(grid, label)")
    directory = pathlib.Path(directory)
    # Without the head's decoding defaults: no training depends on them.
    head = lm.head.identity()
    settings: dict[str, Any] = {"train": to_dict(config), "model": to_dict(lm.config)}
    settings |= {"head": head, "source": source}
    settings = json.loads(json.dumps(settings))
    if (directory / "model").is_dir():
        done = load(directory / "model", layout=lm.layout)
        if not isinstance(done.info.get("settings"), dict):
            raise UsageError(
                f"model {directory / 'model'}", "it does not say what it was trained with", "use another run_dir, or move it away"
            )
        check_settings(done.info["settings"], settings, str(directory))
        return done

    # Before hours of work for features or a teacher.
    check_writable(fit_path(directory, "training directory") / "checkpoints", "training directory")
    check_earlier(directory / "checkpoints", settings)
    directory.mkdir(parents=True, exist_ok=True)
    layout = Layout(lm.layout.mesh, TRAIN_RULES)
    packing = {name: getattr(config, name) for name in ("batch_rows", "row_tokens", "pack_batches", "seed")}
    dataset = train_batches(
        rollouts,
        label=config.label,
        **packing,
        own=layout.rows_of(jax.local_devices(), config.batch_rows),
        features=labelled_features(lm, rollouts, ForwardSettings.of(config)) if config.cache_features else None,
        teacher=_cached_teacher(lm, rollouts, config, settings, directory / TEACHER) if config.cache_teacher else None,
    )
    for note in advice(rollouts, steps=config.steps, labelled_only=config.cache_features, **packing) if distributed.is_chief() else ():
        print(f"zip-rc {title}: {note}", file=sys.stderr)
    batches = iter(dataset)
    axes = {"body": param_axes(lm.config), "zip_rows": ("cells", "embed")}
    # Copies: the step donates its state, and the caller's model (also the teacher) must stay alive.
    state = init_state(layout.shard(jax.tree.map(jnp.array, lm.params), axes), config)
    teacher = layout.shard(frozen(lm.params["body"], config), axes["body"]) if config.kl_weight and not config.cache_teacher else None
    step_settings = StepSettings(lm.config, lm.head, layout, config, prefers_unrolled(layout, config))
    lm = dataclasses.replace(lm, params={})  # what the caller does not keep need not lie on the devices all through the training
    # The counters too lie on the whole mesh: a restored state is laid out like this one, and one step takes one set of devices.
    state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, layout.sharding(())), state)
    checkpoints = Checkpoints(directory / "checkpoints", settings, config.keep_checkpoints)
    skips = _Skips(config.max_skipped, directory)
    with stop_signal() as received:
        try:
            state, skips.count = _restored(state, batches, checkpoints)
            if step_settings.unrolled:
                state = change_bodies(state, functools.partial(unstack, lm.config))
                teacher = teacher and unstack(lm.config, teacher)
            if distributed.is_chief():
                write_text(directory / "settings.json", json.dumps(settings, indent=2) + "\n")
                mesh = {"mesh": dict(layout.mesh.shape), "processes": jax.process_count()}
                write_json(directory / "environment.json", run_metadata(settings) | mesh)
            state = _run(
                state, batches, step_settings, teacher, checkpoints, skips, directory, received, lm, validation, validation_last, title
            )
        finally:
            checkpoints.close()  # before signals count again: who is in a hurry sends a second one, and the last save is still on its way
    params = jax.tree.map(jnp.asarray, stacked(step_settings, state).params)
    finished = _with_params(lm, params, {**lm.info, "settings": settings, "skipped_steps": int(state.skipped)})
    del state  # its moments make room for what `save` reads back
    finished.save(directory / "model")
    if distributed.is_chief():
        (directory / TEACHER).unlink(missing_ok=True)
        (directory / TEACHER).with_suffix(".tmp").unlink(missing_ok=True)
    return finished


def _cached_teacher(
    lm: LanguageModel, rollouts: Sequence[Rollout], config: TrainConfig, settings: dict[str, Any], path: pathlib.Path
) -> TopK:
    """`teacher_features`, made once and kept in `path` as long as the run lasts."""
    made_from = {**settings, "start": lm.digest(), "positions": int(summary_of(rollouts).output.sum())}
    found = _read_teacher(path, made_from)
    if distributed.everywhere(found is not None) and found:
        return found
    made = teacher_features(lm, rollouts, config)
    if distributed.is_chief():
        temporary = path.with_suffix(".tmp")
        with writing(f"file {path}"), temporary.open("wb") as file:
            np.savez(file, made_from=json.dumps(made_from), **made._asdict())
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    return made


def _read_teacher(path: pathlib.Path, made_from: dict[str, Any]) -> TopK | None:
    """None if there is none, or one that is damaged (the CRC of an array is checked as it is read) or was made from something else."""
    if not os.path.lexists(path):
        return None
    try:
        with np.load(path) as file:
            check_settings(json.loads(str(file["made_from"])), made_from, str(path))
            found = TopK(file["ids"], file["log_probs"])
        shape = (made_from["positions"], found.ids.shape[-1])
        if (found.ids.shape, found.log_probs.shape, found.ids.dtype, found.log_probs.dtype) != (shape, shape, np.int32, np.float32):
            raise ValueError("its arrays have other shapes or types")
        return found
    except Exception as error:  # a damaged archive or header makes zipfile and NumPy raise ten kinds
        print(f"zip-rc: {path} is made again ({in_short(error)})", file=sys.stderr)
        return None


def stacked(settings: StepSettings, state: TrainState) -> TrainState:
    """The state as checkpoints hold it, whatever form the step works on."""
    return change_bodies(state, functools.partial(restack, settings.model)) if settings.unrolled else state


def _with_params(lm: LanguageModel, params: dict[str, Any], info: dict[str, Any]) -> LanguageModel:
    return dataclasses.replace(lm, params=params, info=info)


def _restored(state: TrainState, batches: Any, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The state of the newest checkpoint, and how many steps in a row were skipped before it; the given one if there is none.

    `batches` then go on after it.
    """
    found = checkpoints.restore(state)
    if found is None:
        return state, 0
    state, position = found
    skipped = position.pop(SKIPPED, 0)  # older checkpoints do not say it
    batches.set_state(position)
    return state, skipped


def _run(
    state: TrainState,
    batches: Any,
    settings: StepSettings,
    teacher: Any,
    checkpoints: Checkpoints,
    skips: _Skips,
    directory: pathlib.Path,
    received: list[int],
    lm: LanguageModel,
    validation: Sequence[Rollout],
    validation_last: int,
    title: str,
) -> TrainState:
    config = settings.train
    start = step = int(state.step)
    saved = logged = time.monotonic()
    tokens, fill = 0, 0.0
    agree = distributed.Agreement()
    with Tracker(directory, start, writes=distributed.is_chief()) as tracker, progress(title, config.steps, start) as bar:
        while step < config.steps:
            batch = next(batches)
            tokens += int(np.sum(batch.segment_ids > 0))
            fill += fill_rate(batch)
            state, metrics = train_step(settings, state, teacher, _on_mesh(batch, settings.layout))
            step += 1
            skips.add(step, batch, metrics)
            evaluates = bool(validation) and step * config.evaluations // config.steps > (step - 1) * config.evaluations // config.steps
            if step % config.log_every == 0 or evaluates or step == config.steps:
                recent = {k: float(v) for k, v in metrics.items()}  # waits for the step, so the clock is read after it
                now = time.monotonic()
                record = {"step": step, **{f"train/{k}": v for k, v in recent.items()}, "train/tokens_per_second": tokens / (now - logged)}
                record["train/fill"] = fill_rate(batch)
                tokens, logged = 0, now
                if evaluates:
                    current = _with_params(lm, stacked(settings, state).params, {})
                    found = validate(current, validation, label=config.label, last=validation_last, settings=ForwardSettings.of(config))
                    record |= found.metrics
                    if found.joints:
                        tracker.heatmap(step, found.joints, settings.head.grid)
                    logged = time.monotonic()
                tracker.record(record)
                bar(step, f"{tracker.status}  rows {fill / (step - start):.1%} full")
            else:
                bar(step, None)
            stop, save = agree(bool(received), time.monotonic() - saved > config.save_seconds)
            if stop or save:
                skips.check()
                give_back_freed_memory()
                checkpoints.save(stacked(settings, state), {**batches.get_state(), SKIPPED: skips.count})
                tracker.sync()
                saved = time.monotonic()
            if stop:
                reason = f"signal {received[0]}" if received else "a signal to another process"
                raise Interrupted(f"{title}: stopped by {reason} at step {step} of {config.steps}")
        skips.check()
    return state


@dataclasses.dataclass
class _Skips:
    """Ends a run whose steps no longer change anything. It looks one step back, so that no device waits for the host.

    Attributes:
      limit: skipped steps in a row that are too many.
      directory: where the last batch goes.
      count: skipped steps in a row.
    """

    limit: int
    directory: pathlib.Path
    count: int = 0
    _last: tuple[int, TrainBatch, dict[str, jax.Array]] | None = None

    def add(self, step: int, batch: TrainBatch, metrics: dict[str, jax.Array]) -> None:
        """Checks the step before this one. Raises as `check`."""
        self.check()
        self._last = step, batch, metrics

    def check(self) -> None:
        """Raises UsageError, once the batch is saved, if the last step was one skipped step too many."""
        if self._last is None:
            return
        step, batch, metrics = self._last
        self._last = None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.count = 0 if math.isfinite(loss) and math.isfinite(norm) else self.count + 1
        if self.count < self.limit:
            return
        # Each process has the tokens of its own rows.
        path = self.directory / f"skipped_batch_{step}{f'_of_{jax.process_index()}' if distributed.several() else ''}.npz"
        np.savez_compressed(path, **{k: v for k, v in vars(batch).items() if v is not None})
        raise UsageError(
            f"step {step}",
            f"loss {loss} and gradient norm {norm}: {self.count} steps in a row were not finite and changed nothing",
            f"look at the last batch ({path}); raise max_skipped to go on, or train with a lower learning rate in another run_dir",
        )


def _on_mesh(batch: TrainBatch, layout: Layout) -> TrainBatch:
    """The batch on the mesh, with empty rows at its end if its rows do not divide over it (losses are means over labelled positions).

    Every process has the plan of the whole batch, which is a function of seed and position alone, and hands over the rows of its own
    devices, the only ones whose tokens it read. So any number of processes trains on the same batches, and a position saved by one
    number of them is valid for every other.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.pad(x, [(0, layout.padded(len(x), "batch") - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return jax.make_array_from_callback(x.shape, layout.sharding(("batch", "sequence", "embed_act")[: x.ndim], x.shape), x.__getitem__)

    return jax.tree.map(put, batch)


def split_validation(rollouts: Sequence[Rollout], count: int) -> tuple[Sequence[Rollout], list[Rollout]]:
    """(training, validation): about `count` rollouts are held back, and read. Of equal prompts, all are on the same side.

    Which prompts depends on their tokens alone, and not on how often they come, so that validation is like training.

    Raises:
      UsageError: nothing would be left to train on.
    """
    if not count:
        return rollouts, []
    _, prompt, copies = np.unique(summary_of(rollouts).prompt_hash, return_inverse=True, return_counts=True)
    # In the order of their hashes; as many of the first ones as come nearest to `count`.
    held = prompt <= np.argmin(np.abs(np.cumsum(copies) - count))
    if held.all():
        raise UsageError(f"eval_rollouts={count}", f"there are only {len(rollouts)} rollouts", "lower it or make more rollouts")
    return Selection(rollouts, np.flatnonzero(~held)), Selection(rollouts, np.flatnonzero(held))[:]
