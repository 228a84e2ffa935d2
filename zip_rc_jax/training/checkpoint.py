"""Training checkpoints (Orbax): everything that a run needs to continue exactly."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from zip_rc_jax.errors import UsageError
from zip_rc_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run: train state, data-iterator position, and the settings that they belong to.

    Orbax writes each to a temporary name and renames it, keeps the last two, and saves in the background.
    """

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any]):
        self.settings = settings
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True),
            item_names=("state", "data", "settings"),
        )

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state), settings=ocp.args.JsonSave(self.settings)
        )
        self.manager.save(int(state.step), args=args)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and data position, laid out like `like`; None if there is no checkpoint.

        Raises:
          UsageError: the checkpoints belong to a run with other settings.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        stored = self.manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
        check_settings(stored, self.settings, str(self.manager.directory))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=args)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until the last save lies on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def check_settings(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises UsageError naming the first settings that differ."""
    differing = [k for k in sorted({*stored, *wanted}) if stored.get(k) != wanted.get(k)]
    if differing:
        shown = "; ".join(f"{k}: {stored.get(k)!r} there, {wanted.get(k)!r} now" for k in differing[:5])
        raise UsageError(
            f"run {where}", f"it was started with other settings ({shown})", "use another run_dir, or delete it to start afresh"
        )
