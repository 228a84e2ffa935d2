"""Training checkpoints (Orbax): everything that a run needs to continue exactly."""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import sys
import uuid
from typing import Any

import jax

from zip_rc_jax.models.io.digests import array_digests, differing, json_digest
from zip_rc_jax.models.io.stored import try_to_read
from zip_rc_jax.runtime import distributed
from zip_rc_jax.runtime.errors import UsageError, shortened
from zip_rc_jax.runtime.settings import check_same_settings
from zip_rc_jax.runtime.storage import fit_path, writing
from zip_rc_jax.runtime.working_copy import PublishedLater
from zip_rc_jax.training.step import TrainState

# beside the position of the data: {"state": {path: digest}, "json": digest of position and
# settings}
DIGESTS = "digests"
INDEX = "manifest.ocdbt"  # of the arrays; Orbax makes it of those of all processes


class Checkpoints:
    """The checkpoints of one run: train state, data-iterator position, and the settings that they
    belong to.

    Orbax writes each to a temporary name and renames it, keeps the last few, and saves in the
    background. With several processes all call every method, and each writes its own shards.
    """

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any], keep: int = 2):
        """Raises UsageError if the directory cannot be made, or is one where Orbax loses arrays."""
        self.settings = settings
        self.directory = fit_path(directory, "checkpoint directory").absolute()
        self._last: int | None = None  # the step whose save was begun last
        self._published = PublishedLater()
        import orbax.checkpoint as ocp  # a third of the time that JAX takes to import

        with writing(f"checkpoint directory {self.directory}"):
            self.manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True
                ),
                item_names=("state", "data", "settings"),
            )

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to save; the state may be donated at once.

        Raises:
          UsageError: this save or the one before failed.
        """
        import orbax.checkpoint as ocp

        digests = {"state": array_digests(state), "json": json_digest([data_state, self.settings])}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({**data_state, DIGESTS: digests}),
            settings=ocp.args.JsonSave(self.settings),
        )
        with self._failures():
            self._finish_last()
            # Forced: Orbax would leave it out while the one before is still being written.
            self.manager.save(int(state.step), args=args, force=True)
            self._last = int(state.step)
        # Its name appears when it is whole: Orbax renames it.
        self._published.publish(self.directory.parent, self.directory / str(self._last))

    def _finish_last(self) -> None:
        """Waits until the last save is over.

        Raises OSError if it left no index of its arrays: Orbax only warns of that.
        """
        last, self._last = self._last, None  # a failure is reported once
        self.manager.wait_until_finished()
        if (
            last is not None
            and distributed.is_primary()
            and not (self.directory / str(last) / "state" / INDEX).is_file()
        ):
            raise OSError(
                errno.EIO, "no index of the arrays was written", str(self.directory / str(last))
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and data position, laid out like `like`; None if there is no checkpoint.

        A damaged checkpoint is named on standard error and set aside, and the one before it is
        taken. Damaged is also one whose arrays or settings do not fit the digests in it.
        Checkpoints from before there were digests are taken unchecked.

        Raises:
          UsageError: the checkpoints belong to a run with other settings, or none of them can be
            read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        steps = sorted(self.manager.all_steps(), reverse=True)
        damaged: list[str] = []
        for step in steps:
            restored, reason = self._read(step, abstract)
            if distributed.all_processes(restored is not None) and restored:
                # All devices sum up their parts of the digests, so all processes come to the same
                # conclusion.
                unlike = _unlike(*restored)
                if not unlike:
                    if damaged:
                        self._set_aside(
                            [s for s in steps if s > step],
                            f"{'; '.join(damaged)}. Going on from step {step}",
                        )
                    return restored[0], {
                        key: value for key, value in restored[1].items() if key != DIGESTS
                    }
                reason = (
                    f"{unlike} of the state, in {step}/state, does not fit its digest: a bit "
                    "flipped on the disk, perhaps"
                )
            # so that the names of all fit into one message
            why = shortened(reason or "by another process", 120)
            damaged.append(f"checkpoint {self.directory / str(step)} cannot be read ({why})")
            del restored  # its arrays make room for those of the one before
        if damaged:
            raise UsageError(
                "; ".join(damaged[:3]),
                "there is none before to go on from",
                f"delete {self.directory} to start afresh, or use a copy of it",
            )
        return None

    def _read(
        self, step: int, abstract: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """State and data position; or None, and why this process cannot read them.

        The others may be able to, and do not wait for it.
        """
        import orbax.checkpoint as ocp

        path = self.directory / str(step)
        texts = ocp.args.Composite(settings=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())

        def read() -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
            # Not through the manager, which ends with a barrier: a process whose read fails would
            # not come to it.
            with contextlib.closing(ocp.CompositeCheckpointHandler()) as reader:
                stored = reader.restore(path, texts)
                position, settings = stored["data"], stored["settings"]
                if not isinstance(settings, dict) or not isinstance(position, dict):
                    return None, "its settings are those of no training run"
                if not _genuine(position, settings):
                    return None, "its data/metadata and settings/metadata do not fit their digest"
                check_settings(settings, self.settings, str(self.directory))
                state = reader.restore(
                    path, ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                )["state"]
            return (state, position), ""

        restored, failure = try_to_read(read)
        if failure is None:
            return restored
        # the file system is at fault, and may be better when the command is called again
        if failure.fix:
            raise UsageError(
                f"checkpoint {path}", f"it could not be read ({failure.reason})", failure.fix
            )
        return None, failure.reason

    def _set_aside(self, steps: list[int], message: str) -> None:
        """Renames checkpoints, for a run that goes on from an earlier one will want their names."""
        if distributed.is_primary():
            print(
                f"zip-rc train: {message}; what cannot be read was renamed to damaged-STEP",
                file=sys.stderr,
            )
            with writing(
                f"new name of a damaged checkpoint in {self.directory}",
                lambda: "the others are as they were",
            ):
                for step in steps:
                    (self.directory / str(step)).rename(
                        self.directory.parent / f"damaged-{step}-{uuid.uuid4().hex[:8]}"
                    )
        distributed.barrier()
        self.manager.reload()

    def close(self) -> None:
        """Waits until the last save lies on disk. Raises UsageError if it failed."""
        with self._failures():
            try:
                self._finish_last()
            finally:
                self.manager.close()
        self._published.wait(give_up=True)

    def _failures(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"checkpoint in {self.directory}", self._kept)

    def _kept(self) -> str:
        self.manager.reload()
        last = self.manager.latest_step()
        return (
            "there is none before it"
            if last is None
            else f"the last complete one is that of step {last}"
        )


def _genuine(position: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether position and settings fit the digest beside them; true where there is none."""
    rest = {key: value for key, value in position.items() if key != DIGESTS}
    if DIGESTS not in position:
        return True
    digests = position[DIGESTS]
    return (
        isinstance(digests, dict)
        and isinstance(digests.get("state"), dict)
        and digests.get("json") == json_digest([rest, settings])
    )


def _unlike(state: TrainState, position: dict[str, Any]) -> str:
    """Names of the first arrays that do not fit their digests; "" if all do, or if there are none.

    All processes must call it.
    """
    return (
        differing(array_digests(state), position[DIGESTS]["state"]) if DIGESTS in position else ""
    )


def check_earlier(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises UsageError if the newest checkpoint below `directory` is of other settings: at once,
    while `Checkpoints` reads states too."""
    for step in sorted(
        (int(p.name) for p in directory.glob("[0-9]*") if p.name.isdecimal()), reverse=True
    ):
        try:
            stored, position = (
                json.loads((directory / str(step) / name / "metadata").read_text())
                for name in ("settings", "data")
            )
        except (OSError, ValueError, RecursionError):
            continue  # `Checkpoints.restore` will say so
        if isinstance(stored, dict) and isinstance(position, dict) and _genuine(position, stored):
            check_settings(stored, settings, str(directory))
            return


# They decide when something is written, or how the same numbers are computed: a run may go on, or
# be read, with others.
FREE_TO_CHANGE = (
    "save_seconds",
    "keep_checkpoints",
    "log_every",
    "evaluations",
    "max_skipped",
    "loss_chunk",
    "remat",
    "attention",
)


def check_settings(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises UsageError naming the first settings that differ, those of `FREE_TO_CHANGE` aside."""
    free = [f"train.{name}" for name in FREE_TO_CHANGE]
    check_same_settings(
        f"run {where}",
        stored,
        wanted,
        fix="use another run_dir, or delete it to start afresh",
        free=free,
    )
