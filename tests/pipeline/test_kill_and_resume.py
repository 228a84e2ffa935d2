"""Nothing is lost: runs that are killed, checkpoints that are cut, disks that are full, and batches
that cannot be learned from."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from harness.processes import cut, prepare, records, rollouts, started, wait_for_step
from harness.tiny import TINY_MODEL, tiny_lm
from zip_rc_jax.cli.main import main
from zip_rc_jax.config import TrainConfig
from zip_rc_jax.models.io.load import load
from zip_rc_jax.runtime.errors import UsageError
from zip_rc_jax.training import trainer
from zip_rc_jax.training.step import train_step
from zip_rc_jax.training.trainer import Interrupted, train

CONFIG = TrainConfig(
    label="value",
    steps=6,
    batch_rows=4,
    row_tokens=48,
    learning_rate=1e-2,
    kl_weight=0.5,
    kl_top_k=5,
    loss_chunk=64,
    log_every=1,
)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def run(directory, config=CONFIG):
    return train(tiny_lm(), rollouts(), config, directory, source={})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return run(directory), records(directory)


def stop_at(monkeypatch, *steps):
    """SIGTERM after each of these steps of the process, one per call of `run`."""
    count = itertools.count(1)

    def hooked(*args):
        result = train_step(*args)
        if next(count) in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer, "train_step", hooked)


# ---- killed


KILLED_STEPS = 150  # more than three kills let pass, however fast a step is


def kill_again_and_again(directory, seed, kills):
    """Starts a run, kills it `kills` times at moments between its steps that nothing but `seed`
    decides, and lets it finish."""
    draw = random.Random(seed)
    # a checkpoint is on its way at almost every moment
    config = prepare(directory, steps=KILLED_STEPS, save_seconds=0.01)
    stage, reached = directory / "run" / "final", 0
    for number in range(kills):
        with started(["train", config, "--stage", "final"], directory) as here:
            # no earlier process came so far: this one is at its steps
            wait_for_step(stage, reached + draw.randint(1, 5), here)
            time.sleep(draw.random() * 0.3)
            how = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
            here.processes[0].send_signal(how)
            assert here.wait() == [130 if how == signal.SIGTERM else -9], here.text()
        assert not (stage / "model").exists(), "it was killed before its end"
        reached = max(r["step"] for r in records(stage))
        assert reached < KILLED_STEPS
    with started(["train", config, "--stage", "final"], directory) as here:
        assert here.wait() == [0], here.text()
    return records(stage), load(stage)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unharmed")
    return kill_again_and_again(directory, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_any_moments_ends_bit_for_bit_as_an_unharmed_one(tmp_path, unharmed, seed):
    found, model = kill_again_and_again(tmp_path, seed, 3)
    assert found == unharmed[0]
    assert [r["step"] for r in found] == list(range(1, KILLED_STEPS + 1))
    assert_equal(model.params, unharmed[1].params)


@pytest.mark.slow
def test_a_run_killed_once_ends_bit_for_bit_as_an_unharmed_one(tmp_path):
    """The same in short: one SIGKILL, while the next checkpoint is being written."""
    assert (
        main(["train", str(prepare(tmp_path / "a", steps=20)), "--stage", "final", "mesh.fsdp=1"])
        == 0
    )
    config, stage = (
        prepare(tmp_path / "b", steps=20, save_seconds=0.01),
        tmp_path / "b" / "run" / "final",
    )
    with started(["train", config, "--stage", "final"], tmp_path) as here:
        wait_for_step(stage, 3, here)
        here.processes[0].kill()
        assert here.wait() == [-9]
    assert not (stage / "model").exists()
    assert main(["train", str(config), "--stage", "final", "mesh.fsdp=1"]) == 0
    unharmed = tmp_path / "a" / "run" / "final"
    assert records(stage) == records(unharmed)
    assert_equal(load(stage).params, load(unharmed).params)


def test_a_second_signal_does_not_cut_the_save_that_the_first_one_asked_for(
    tmp_path, monkeypatch, whole
):
    """It comes after the run has stopped, while the checkpoint is still being written in the
    background."""
    close, unheard = trainer.Checkpoints.close, []

    def signalled(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        close(checkpoints)

    def ended(*_):
        unheard.append("SIGTERM")
        raise SystemExit(143)

    monkeypatch.setattr(trainer.Checkpoints, "close", signalled)
    stop_at(monkeypatch, 2)
    # what would end the process at once, were it not for the run
    before = signal.signal(signal.SIGTERM, ended)
    try:
        with pytest.raises(Interrupted, match="stopped by signal 15 at step 2 of 6"):
            run(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (unheard, [p.name for p in (tmp_path / "checkpoints").iterdir()]) == ([], ["2"])
    monkeypatch.undo()
    assert_equal(run(tmp_path).params, whole[0].params)


def test_a_run_holds_parameters_and_moments_and_nothing_else_of_their_size(tmp_path, monkeypatch):
    """Of the table's shape: the parameter and its two moments.

    Started afresh and resumed, no other copy outlives the start.
    """
    config = prepare(tmp_path, steps=4)
    arguments = [
        "train",
        str(config),
        "--stage",
        "final",
        "mesh.fsdp=1",
        "final.kl_weight=0",
        "final.eval_rollouts=0",
    ]
    tables = []

    def counting(*args):
        result = hooked(*args)
        tables.append(
            sum(x.shape == (TINY_MODEL.vocab_size, TINY_MODEL.d_model) for x in jax.live_arrays())
            - before
        )
        return result

    stop_at(monkeypatch, 2)
    hooked = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", counting)
    gc.collect()
    before = sum(x.shape == (TINY_MODEL.vocab_size, TINY_MODEL.d_model) for x in jax.live_arrays())
    assert main(arguments) == 130
    assert main(arguments) == 0
    assert tables == [3, 3, 3, 3]


# ---- damaged


def empty_every(name):
    return lambda path: [file.write_bytes(b"") for file in path.rglob(name)]


def directory_instead(path):
    path.unlink()
    path.mkdir()


def foreign(path):
    """What another program of Orbax left there."""
    shutil.rmtree(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(theirs=ocp.args.JsonSave({"a": 1})))


DAMAGES = {
    "cut in half": cut,
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no position": lambda path: shutil.rmtree(path / "data"),
    "empty index": empty_every("manifest.ocdbt"),
    "empty settings": empty_every("metadata"),
    "foreign": foreign,
    "a directory for the position": lambda path: directory_instead(path / "data" / "metadata"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped twice, so that there are checkpoints of the steps 2 and 4."""
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, 4)
        for _ in range(2):
            with pytest.raises(Interrupted):
                run(directory)
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["2", "4"]
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_after_damage_the_run_goes_on_from_the_checkpoint_before_and_says_so(
    tmp_path, capsys, stopped, whole, damage
):
    directory = shutil.copytree(stopped, tmp_path / "run")
    DAMAGES[damage](directory / "checkpoints" / "4")
    model = run(directory)
    message = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint {directory}/checkpoints/4 cannot be read" in message
    assert "Going on from step 2" in message
    assert len(list(directory.glob("damaged-4-*"))) == 1
    assert_equal(model.params, whole[0].params)
    assert records(directory) == whole[1]


def test_when_no_checkpoint_can_be_read_they_are_refused_by_name(tmp_path, stopped):
    directory = shutil.copytree(stopped, tmp_path / "run")
    for step in "24":
        cut(directory / "checkpoints" / step)
    with pytest.raises(
        UsageError,
        match=r"checkpoints/4 cannot be read.*checkpoints/2 .*Fix: delete .*/checkpoints",
    ):
        run(directory)
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["2", "4"], (
        "nothing is deleted"
    )


def test_as_many_checkpoints_are_kept_as_the_config_says(tmp_path):
    config = dataclasses.replace(CONFIG, keep_checkpoints=3, save_seconds=1e-9)
    run(tmp_path, config)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5", "6"]


def test_memory_that_was_kept_is_given_back_before_a_checkpoint_copies_the_state(
    tmp_path, monkeypatch
):
    order, saved, stacked = [], [], trainer.stacked
    monkeypatch.setattr(trainer, "give_back_freed_memory", lambda: order.append("give back"))
    monkeypatch.setattr(trainer, "stacked", lambda *args: order.append("copy") or stacked(*args))
    monkeypatch.setattr(
        trainer.Checkpoints, "save", lambda self, state, position: saved.append(int(state.step))
    )
    run(tmp_path, dataclasses.replace(CONFIG, save_seconds=1e-9))
    assert saved == [1, 2, 3, 4, 5, 6]
    assert order == ["give back", "copy"] * 6 + ["copy"], "the last one is the model"


# ---- a full disk


def test_a_full_disk_is_reported_and_the_last_checkpoint_survives(tmp_path, whole):
    directory = tmp_path / "run"
    often = dataclasses.replace(CONFIG, save_seconds=1e-9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(directory, often)
    before = sorted(p.name for p in (directory / "checkpoints").iterdir())
    try:
        # every longer file fails to be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(
            UsageError,
            match=r"could not be written .*the last complete one is that of step 2\. Fix: make "
            r"room",
        ):
            run(directory, often)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(before) <= {p.name for p in (directory / "checkpoints").iterdir()}
    assert_equal(run(directory, often).params, whole[0].params)


def test_a_full_disk_is_reported_where_the_model_itself_no_longer_fits(tmp_path, whole):
    """The run is so short that nothing but the finished model is large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(
            UsageError,
            match=rf"model {tmp_path}/model: it could not be written \(.*\), and .*\. Fix: make "
            r"room",
        ):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "model").exists()
    assert_equal(run(tmp_path).params, whole[0].params)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == [], (
        "what was half written is gone"
    )


def test_a_full_disk_is_reported_by_every_command_of_the_shell(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = prepare(tmp_path, steps=2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        assert main(["train", str(config), "--stage", "final", "mesh.fsdp=1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Fix: make room on the disk; the same command then resumes." in capsys.readouterr().err
    assert main(["train", str(config), "--stage", "final", "mesh.fsdp=1"]) == 0


# ---- batches that cannot be learned from


def test_a_run_that_no_longer_learns_ends_and_leaves_the_batch(tmp_path, monkeypatch):
    """Non-finite steps 2, 4, 5 and 6 with a limit of two in a row: step 5 ends the run."""
    batches, on_mesh = [], trainer._on_mesh
    monkeypatch.setattr(
        trainer, "_on_mesh", lambda batch, layout: batches.append(batch) or on_mesh(batch, layout)
    )

    def poisoned(settings, state, teacher, batch):
        bad = len(batches) in (2, 4, 5, 6)
        return train_step(
            settings, state, jax.tree.map(lambda x: x * np.nan, teacher) if bad else teacher, batch
        )

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(
        UsageError, match=r"step 5: loss nan .*2 steps in a row .*skipped_batch_5\.npz"
    ):
        run(tmp_path, dataclasses.replace(CONFIG, max_skipped=2))
    with np.load(tmp_path / "skipped_batch_5.npz") as found:
        assert set(found) == {k for k, v in vars(batches[4]).items() if v is not None}
        for name in found:
            np.testing.assert_array_equal(found[name], getattr(batches[4], name))
    assert not (tmp_path / "model").exists()


def test_skipped_steps_that_are_not_in_a_row_end_nothing(tmp_path, monkeypatch):
    count = itertools.count(1)

    def poisoned(settings, state, teacher, batch):
        return train_step(
            settings,
            state,
            jax.tree.map(lambda x: x * np.nan, teacher) if next(count) % 2 else teacher,
            batch,
        )

    monkeypatch.setattr(trainer, "train_step", poisoned)
    assert run(tmp_path, dataclasses.replace(CONFIG, max_skipped=2)).info["skipped_steps"] == 3


@pytest.mark.parametrize("remembered", [True, False], ids=["", "a checkpoint of before"])
def test_skipped_steps_in_a_row_are_counted_across_a_resume(tmp_path, monkeypatch, remembered):
    """Steps 3 and 4 are not finite, and between them the run is stopped.

    Checkpoints that do not have the count begin at 0.
    """

    def poisoned(settings, state, teacher, batch):
        step = int(state.step) + 1
        bad = step in (3, 4)
        result = train_step(
            settings, state, jax.tree.map(lambda x: x * np.nan, teacher) if bad else teacher, batch
        )
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer, "train_step", poisoned)
    config = dataclasses.replace(CONFIG, max_skipped=2)
    with pytest.raises(Interrupted, match="at step 3"):
        run(tmp_path, config)
    position = tmp_path / "checkpoints" / "3" / "data" / "metadata"
    stored = json.loads(position.read_text())
    assert stored.pop("skipped_in_a_row") == 1
    del stored["digests"]  # it is older than them, too
    if remembered:
        with pytest.raises(UsageError, match=r"step 4: loss nan .*2 steps in a row"):
            run(tmp_path, config)
    else:
        position.write_text(json.dumps(stored))
        assert run(tmp_path, config).info["skipped_steps"] == 2
