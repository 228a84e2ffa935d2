"""What a reader sees of a training run: metrics.jsonl, TensorBoard event files, heat maps, and the status of the progress bar."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from zip_rc_jax import drawing
from zip_rc_jax.grid import Grid
from zip_rc_jax.run_files import plain
from zip_rc_jax.training.event_file import EventFile
from zip_rc_jax.training.predict import MeanJoints

_SHOWN = {
    "train/loss": "loss",
    "train/joint": "joint",
    "train/nll": "nll",
    "train/kl": "kl",
    "eval/within_prompt_auc": "within-prompt AUC",
}


class Tracker:
    """The one writer of a run's records. A context manager.

    In `directory` it keeps `metrics.jsonl` (one strict JSON object per record, null where there is no number), `tensorboard/` (the same
    numbers and the images, as event files) and `heatmaps/` (PNG files, named by step). What an interrupted run wrote there about steps
    after `start` is dropped, since those steps come again.

    Args:
      directory: of the training run; exists.
      start: optimizer steps done before.
      writes: False keeps everything but the status off the disk: of several processes only one may write.
    """

    def __init__(self, directory: pathlib.Path, start: int, *, writes: bool = True):
        self._latest: dict[str, float] = {}
        self._heatmaps = directory / "heatmaps"
        self._log, self._events = None, None
        if not writes:
            return
        path = directory / "metrics.jsonl"
        kept = _lines(path, start)
        for line in kept:
            self._latest |= {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        for image in self._heatmaps.glob("step_*.png"):
            if int(image.stem.removeprefix("step_")) > start:
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
            self._events.scalars(record["step"], {name: value for name, value in record.items() if name != "step"})

    def sync(self) -> None:
        """Everything so far survives a power cut, and lies in the bucket where the directory is one: gcsfuse uploads no sooner."""
        if self._log and self._events:
            os.fsync(self._log.fileno())
            self._events.sync()

    def heatmap(self, step: int, joints: MeanJoints, grid: Grid) -> None:
        """Draws the predicted beside the observed joint."""
        if not self._events:
            return
        note = f"mean over {joints.positions:,} positions of {joints.rollouts:,} held-back rollouts"
        if joints.left_out:
            note += f"; {joints.left_out:,} more were cut off before their end or have no label, and are left out"
        figure = drawing.joint_heatmaps(joints.predicted, joints.observed, grid, [f"step {step}"], note)
        self._heatmaps.mkdir(exist_ok=True)
        path = drawing.save(figure, self._heatmaps / f"step_{step:06d}.png")
        self._events.image(step, "eval/joint", path.read_bytes())

    @property
    def status(self) -> str:
        """The newest value of what a progress bar shows, also of what is not in every record."""
        parts = [f"{name} {self._latest[key]:.4f}" for key, name in _SHOWN.items() if key in self._latest]
        return "  ".join([*parts, f"{self._latest['train/tokens_per_second']:,.0f} tok/s"])


def _lines(path: pathlib.Path, last: int) -> list[str]:
    """The lines of a JSONL file up to step `last`, without one that was cut in half."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}") and json.loads(line)["step"] <= last]
