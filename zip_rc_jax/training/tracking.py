"""What a reader sees of a training run: metrics.jsonl, TensorBoard event files, heat maps, and the
status of the progress bar."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from zip_rc_jax.evaluation.rollout_predictions import MeanJoints
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.runtime.storage import in_short, parse_json, plain, write_jsonl
from zip_rc_jax.runtime.temporaries import remove_leftovers
from zip_rc_jax.training.event_file import EventFile

_SHOWN = {
    "train/loss": "loss",
    "train/joint": "joint",
    "train/nll": "nll",
    "train/kl": "kl",
    "eval/within_prompt_auc": "within-prompt AUC",
}


class Tracker:
    """The one writer of a run's records. A context manager.

    In `directory` it keeps
      `metrics.jsonl`: one strict JSON object per record, null where there is no number;
      `tensorboard/`: the same numbers and the images, as event files;
      `heatmaps/`: PNG files, named by step.
    What an interrupted run wrote there about steps after `start` is dropped: those steps come
    again.

    Args:
      directory: of the training run; exists. None keeps everything but the status off the disk.
      start: optimizer steps done before.
      writes: False does so too: of several processes only one may write.
    """

    def __init__(self, directory: pathlib.Path | None, start: int, *, writes: bool = True):
        self._latest: dict[str, float] = {}
        self._log, self._events = None, None
        if directory is None or not writes:
            return
        from zip_rc_jax.evaluation import drawing  # Matplotlib: half the time that JAX takes

        self._drawing = drawing
        self._heatmaps = directory / "heatmaps"
        remove_leftovers(directory)
        path = directory / "metrics.jsonl"
        kept = _records(path, start)
        for record in kept:
            self._latest |= {
                name: math.nan if value is None else value for name, value in record.items()
            }
        write_jsonl(path, kept)
        for image in self._heatmaps.glob("step_*.png"):
            if (step := image.stem.removeprefix("step_")).isdecimal() and int(step) > start:
                image.unlink()
        self._log = path.open("a", encoding="utf-8")
        self._events = EventFile(directory / "tensorboard", start)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        if self._log and self._events:
            self._log.close()
            self._events.close()

    def record(self, record: dict[str, Any]) -> None:
        """Adds a record: `step`, and named numbers."""
        self._latest |= record
        if self._log and self._events:
            self._log.write(json.dumps(plain(record), allow_nan=False) + "\n")
            self._log.flush()
            self._events.scalars(
                record["step"], {name: value for name, value in record.items() if name != "step"}
            )

    def sync(self) -> None:
        """Everything so far survives a power cut, and lies in the bucket where the directory is
        one: gcsfuse uploads no sooner."""
        if self._log and self._events:
            os.fsync(self._log.fileno())
            self._events.sync()

    def heatmap(self, step: int, joints: MeanJoints, grid: Grid) -> None:
        """Draws the predicted beside the observed joint."""
        if not self._events:
            return
        note = f"mean over {joints.positions:,} positions of {joints.rollouts:,} held-back rollouts"
        if joints.left_out:
            note += f"; {joints.left_out:,} more have no end or no label, and are left out"
        figure = self._drawing.joint_heatmaps(
            joints.predicted, joints.observed, grid, [f"step {step}"], note
        )
        self._heatmaps.mkdir(exist_ok=True)
        path = self._drawing.save(figure, self._heatmaps / f"step_{step:06d}.png")
        self._events.image(step, "eval/joint", path.read_bytes())

    @property
    def status(self) -> str:
        """The newest value of what a progress bar shows, also of what is not in every record."""
        parts = [
            f"{name} {self._latest[key]:.4f}" for key, name in _SHOWN.items() if key in self._latest
        ]
        return "  ".join([*parts, f"{self._latest['train/tokens_per_second']:,.0f} tok/s"])


def _records(path: pathlib.Path, last: int) -> list[dict[str, Any]]:
    """The records of metrics.jsonl up to step `last`, without a line that a kill cut in half.

    Raises:
      UsageError: the file cannot be read, or another line is no record.
    """
    fix = (
        "correct or delete the line, or move the file away: the run then goes on without these "
        "records"
    )
    if not os.path.lexists(path):
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"file {path}", f"it cannot be read ({in_short(error)})", fix) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("it is no object with a whole number as `step`")
            if wrong := [
                name
                for name, value in record.items()
                if not (value is None or type(value) in (int, float))
            ]:
                raise ValueError(f"{wrong[0]} is no number")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break  # without an end of line: it was being written when the process was killed
            raise UsageError(
                f"file {path}, line {number}", f"it is damaged ({in_short(error)})", fix
            ) from error
        if record["step"] <= last:
            records.append(record)
    return records
